"""Pictures of classes, from top to bottom: codes of an image tokenizer, a transformer, a bundle, a report.

The folder of a run (see stages.py):

    image_tokenizer/   the image tokenizer, in half precision
    tokens/            train and held-out pictures as codes, with their label in place of the text
    model/             the transformer's training: checkpoints, curves.csv, curves.png, tensorboard
    bundle/            what `ClassPipeline.load` reads
    report.md, report.json, guidance.png, classes.png
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from smalti.bundle import LABEL, Bundle, Classes, Sampling
from smalti.data.labelled_pictures import Labelled, open_labelled, split, write_codes
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.evaluate.classes import evaluate_classes
from smalti.evaluate.reconstruction import default_image_size
from smalti.files import made_again
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer
from smalti.likelihood import Likelihood
from smalti.models.config import LLAMAGEN, TransformerConfig
from smalti.models.families import AnyModel
from smalti.models.rar import RARConfig
from smalti.progress import stage
from smalti.recipes import ClassesRecipe, claim_folder
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.systems.stages import finish, given_image_tokenizer, stored_image_tokenizer, team
from smalti.tasks.classes import ClassPipeline
from smalti.training.estimate import Estimate
from smalti.training.token_model import nats_by_order, train_model

ORDER = "label to image"


def train_classes(recipe: ClassesRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes the tables, all of them train the transformer. Raises InputError if the
    folder holds a run of another recipe, or as the stages do.
    """
    if recipe.data.train is None or recipe.image_tokenizer is None:
        raise InputError(
            "give data.train, pictures of classes (a folder with one folder for each, a table with the columns image "
            "and label, or MNIST's four files), and image_tokenizer, a folder or a bundle that has one."
        )
    output, given = recipe.output, given_image_tokenizer(recipe.image_tokenizer)
    train, held_out = _read(recipe)
    with team(output) as processes:
        if processes.is_first:
            claim_folder(recipe, output, free=("evaluate", "sample", "about"))
            stored = stored_image_tokenizer(output / "image_tokenizer", lambda: load_image_tokenizer(given).eval())
            size = default_image_size(stored.config)
            for name, pictures in (("train", train), ("held_out", held_out)):
                path = output / "tokens" / f"{name}.parquet"
                if not path.exists():
                    ten = recipe.data.ten_crop and name == "train"
                    write_codes(pictures, path, stored, size, ten_crop=ten, show_progress=show_progress)
        processes.wait()
        image_tokenizer: Any = load_image_tokenizer(output / "image_tokenizer").eval()
        rows, columns = image_tokenizer.config.grid
        shape, layout = _model(recipe, len(train.names), image_tokenizer.config.codebook_size, (rows, columns))
        tables = {}
        for name in ("train", "held_out"):
            with made_again(output / "tokens" / f"{name}.parquet"):
                tables[name] = TokenTable.open(output / "tokens" / f"{name}.parquet", image_length=rows * columns)
        model = train_model(
            shape,
            layout,
            tables["train"],
            tables["held_out"],
            recipe.training,
            output / "model",
            show_progress=show_progress,
            estimate=Estimate(recipe.minutes, {"transformer": recipe.train.length}),
        )
        if processes.is_first:
            height, width = default_image_size(image_tokenizer.config)
            trained = Bundle(
                model=model.cpu(),
                layout=layout,
                image_tokenizer=image_tokenizer,
                pictures=PictureConfig(height=height, width=width, scale=recipe.data.scale),
                classes=Classes(num=len(train.names), names=train.names),
                sampling=recipe.sample,
                about={**recipe.about, "Trained by": f"`{command}`", "Seed": str(recipe.train.seed)},
                name=output.name,
            )

            def measure(bundle: Bundle) -> dict[str, str]:
                return _figures(bundle, recipe, (train, held_out), tables["held_out"], command, show_progress)

            finish(trained, output / "bundle", measure)
    return output / "bundle"


def _read(recipe: ClassesRecipe) -> tuple[Labelled, Labelled]:
    """Training pictures, and those held out: MNIST's own, those of `data.held_out`, or a share of the first."""
    data = recipe.data
    assert data.train is not None
    found = open_labelled(data.train)
    if isinstance(found, dict):
        if data.held_out is not None:
            raise InputError("data.held_out is given, but MNIST has test pictures of its own; leave it out.")
        return found["train"], found["test"]
    if data.held_out is None:
        return split(found, data.held_out_share, recipe.train.seed)
    other = open_labelled(data.held_out)
    if isinstance(other, dict) or other.names != found.names:
        theirs = "MNIST's digits" if isinstance(other, dict) else ", ".join(other.names[:6])
        raise InputError(
            f"{data.held_out} has other classes ({theirs}) than {data.train} ({', '.join(found.names[:6])})."
        )
    return found, other


def _model(
    recipe: ClassesRecipe, num_classes: int, codebook_size: int, grid: tuple[int, int]
) -> tuple[TransformerConfig | RARConfig, Layout]:
    model, num_codes = recipe.model, grid[0] * grid[1]
    sizes: dict[str, Any] = {
        "num_layers": model.num_layers,
        "d_model": model.d_model,
        "num_heads": model.num_heads,
        "d_ff": model.d_ff,
        "dropout": model.dropout,
    }
    if model.family == "rar":
        config = RARConfig(
            codebook_size=codebook_size,
            num_classes=num_classes,
            num_codes=num_codes,
            attention_dropout=model.dropout,
            **sizes,
        )
        return config, config.layout
    vocabulary = Vocabulary({"image": codebook_size, LABEL: num_classes + 1})
    layout = Layout.parse(vocabulary, {ORDER: f"label{{1}} image{{{num_codes}}}"})
    # as LlamaGen, but a label is not rotated where its weights multiply it by zero
    return TransformerConfig(max_length=layout.max_length, grid=grid, prefix_length=1, **LLAMAGEN, **sizes), layout


def _figures(
    bundle: Bundle,
    recipe: ClassesRecipe,
    pictures: tuple[Labelled, Labelled],
    table: TokenTable,
    command: str,
    show_progress: bool,
) -> dict[str, str]:
    """What the report says; the bundle then draws with the scale that came nearest to real pictures."""
    with stage("measuring likelihood", show=show_progress):
        nats = _nats(bundle.model, bundle.layout, table, recipe.train.evaluation_rows)
    pipe = ClassPipeline(bundle)
    report = evaluate_classes(pipe, *pictures, recipe.evaluate, nats, command=command, show_progress=show_progress)
    report.write(recipe.output, force=True)
    drawn_with = replace(bundle.sampling.picture, guidance_scale=report.best.guidance_scale)
    bundle.sampling = Sampling(picture=drawn_with)
    return report.figures()


def _nats(model: AnyModel, layout: Layout, table: TokenTable, most: int | None) -> dict[str, str]:
    num_rows = min(len(table), most or len(table))

    def text(found: Likelihood) -> str:
        return f"{found.nats_per_token:.4f} ± {found.standard_error:.4f}"

    given, none = (
        nats_by_order(model, layout, table, num_rows, captioned=captioned)[ORDER]["picture"]
        for captioned in (True, False)
    )
    return {"given the class": text(given), "under the null condition": text(none)}

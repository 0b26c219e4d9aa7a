"""The digits system from top to bottom: data, image tokenizer, tokens, transformer, bundle, report.

The folder of a run (see stages.py):

    data/              pictures and captions: train, validation and test as parquet
    image_tokenizer/   the trained image tokenizer, and its training in image_tokenizer_training/
    tokens/            the same three tables as codes and text ids
    model/             the transformer's training: checkpoints, curves.csv, curves.png, tensorboard
    bundle/            what `Pipeline.load` reads
    report.md, report.json, and the 3×3 figures
"""

from pathlib import Path
from typing import Any

from smalti.bundle import Bundle
from smalti.data.digit_sources import read_coloured_pickle, read_mnist, scikit_learn_digits
from smalti.data.digits import PICTURE_SIZE, SPLITS, ColouredDigits, SourceDigits, words, write_digits
from smalti.data.pairs import PairTable
from smalti.data.tokenize_pairs import TokenizeConfig
from smalti.data.tokens import TokenTable
from smalti.evaluate.galleries import draw_galleries
from smalti.evaluate.report import evaluate_digits, find_report, read_held_out
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer
from smalti.progress import stage
from smalti.recipes import DigitsData, Recipe, claim_folder
from smalti.systems.stages import check_grid, finish, stored_image_tokenizer, stored_tokens, team
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import TextTokenizer
from smalti.training.estimate import Estimate, Length
from smalti.training.image_tokenizer import train_tokenizer
from smalti.training.token_model import train_model

PICTURES = PictureConfig(height=PICTURE_SIZE, width=PICTURE_SIZE, levels=4, scale=8)


def train_digits(recipe: Recipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes the tables and the image tokenizer, all of them train the transformer.
    Raises InputError if the folder holds a run of another recipe, or as the stages do.
    """
    output, tokenizer = recipe.output, recipe.image_tokenizer
    text_tokenizer = TextTokenizer.from_words(words(), spellings={"eigth": "eight"})
    of_tokenizer = Length("image_tokenizer.train.num_steps", tokenizer.train.num_steps)
    estimate = Estimate(recipe.minutes, {"image tokenizer": of_tokenizer, "transformer": recipe.train.length})
    shown: Any = {"show_progress": show_progress, "estimate": estimate}

    def make_image_tokenizer() -> Any:
        if tokenizer.path is not None:
            return load_image_tokenizer(tokenizer.path)
        train, validation = (PairTable(output / "data" / f"{split}.parquet").read().pictures for split in SPLITS[:2])
        folder = output / "image_tokenizer_training"
        return train_tokenizer(train, validation, tokenizer.model, tokenizer.train, folder, **shown)

    with team(output) as processes:
        if processes.is_first:
            splits, data = _read_source(recipe.data), recipe.data
            claim_folder(recipe, output, free=("evaluate", "sample"))
            write_digits(output / "data", data.source, splits, data.colouring, show_progress=show_progress)
            stored = stored_image_tokenizer(output / "image_tokenizer", make_image_tokenizer)
            for split in SPLITS:
                pairs, tokens = (output / folder / f"{split}.parquet" for folder in ("data", "tokens"))
                stored_tokens(pairs, tokens, stored, text_tokenizer, TokenizeConfig(), show_progress=show_progress)
        processes.wait()
        image_tokenizer: Any = load_image_tokenizer(output / "image_tokenizer")
        codebook_size = image_tokenizer.config.codebook_size
        layout = recipe.layout.make(codebook_size=codebook_size, text_vocab_size=text_tokenizer.vocab_size)
        check_grid(layout, image_tokenizer)
        train, validation = (TokenTable.open(output / "tokens" / f"{split}.parquet") for split in SPLITS[:2])
        model = train_model(recipe.model, layout, train, validation, recipe.train, output / "model", **shown)
        if processes.is_first:
            trained = Bundle(
                model=model.cpu(),
                layout=layout,
                image_tokenizer=image_tokenizer,
                text_tokenizer=text_tokenizer,
                pictures=PICTURES,
                sampling=recipe.sample,
                about=_about(recipe, command),
                name=output.name,
            )
            finish(trained, output / "bundle", lambda bundle: _figures(bundle, recipe, command, show_progress))
    return output / "bundle"


def _read_source(data: DigitsData) -> dict[str, SourceDigits] | dict[str, ColouredDigits]:
    if data.path is None:
        return scikit_learn_digits()
    return read_mnist(data.path) if data.source == "mnist" else read_coloured_pickle(data.path)


def _figures(bundle: Bundle, recipe: Recipe, command: str, show_progress: bool) -> dict[str, Any]:
    """What the report says of the bundle; it and the galleries are made if there is none of these weights."""
    output, pipe = recipe.output, Pipeline(bundle)
    report = find_report(output, pipe.weights_sha256, recipe.evaluate)
    if report is None:
        held_out = read_held_out(output / "data")
        report = evaluate_digits(pipe, held_out, recipe.evaluate, command=command, show_progress=show_progress)
        with stage("drawing galleries", show=show_progress):
            draw_galleries(pipe, held_out.pictures, held_out.captions, output, seed=recipe.evaluate.seed, force=True)
        report.write(output, force=True)
    return report.figures()


DATA_NOTES = {
    "mnist": "MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0), coloured and captioned by `smalti.data.digits`",
    "scikit-learn": "scikit-learn's digits (Alpaydin, Kaynak; UCI, CC BY 4.0), coloured and captioned by "
    "`smalti.data.digits`",
    "pickle": "coloured MNIST with text of Berkeley CS294-158, homework 1 (MNIST: CC BY-SA 3.0)",
}


def _about(recipe: Recipe, command: str) -> dict[str, str]:
    """What a model card says of where the weights come from."""
    return {
        "data": DATA_NOTES[recipe.data.source],
        "licence of the weights": "Apache-2.0, as the package",
        "made by": f"`{command}`" if command else "`smalti.systems.digits.train_digits`",
        "seeds": f"data {recipe.data.colouring.seed}, image tokenizer {recipe.image_tokenizer.train.seed}, "
        f"model {recipe.train.seed}",
        "intended for": "study and demonstration: small coloured digits, nothing else",
    }

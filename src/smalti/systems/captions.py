"""Pictures from free captions, from top to bottom: text tokenizer, tokens, transformer, bundle.

Everything lies in one folder, each stage in a place of its own, written whole or not at all. A run that was stopped,
or killed, goes on from what is there; run again when it is done, it finds nothing left to do.

    image_tokenizer/      the image tokenizer, in half precision
    text_tokenizer.json   pieces of words, learned from the training captions
    tokens/               train and validation pairs as codes and numbers
    model/                the transformer's training: checkpoints, curves.csv, curves.png, tensorboard
    samples/              the same prompts with the same seeds on the way: table.png, table.md
    bundle/               what `Pipeline.load` reads
    compositions.md       held-out compositions, where the recipe asks for them
"""

import shlex
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from smalti.bundle import Bundle
from smalti.data.pair_sources import open_pairs
from smalti.data.ready_tokens import are_tokens, open_tokens
from smalti.data.tokenize_pairs import TokenizeConfig, require_tokenizers, tokenize_pairs, tokenizer_metadata
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.evaluate.compositions import evaluate_compositions
from smalti.evaluate.reconstruction import find_image_tokenizer
from smalti.files import made_again
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.models.decoder_only import DecoderOnly
from smalti.progress import stage, track
from smalti.recipes import CaptionsRecipe, claim_folder
from smalti.sequences.layout import Layout
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import BPEConfig, TextTokenizer
from smalti.training.checkpoint import run_lock
from smalti.training.estimate import Estimate
from smalti.training.sample_table import SampleTable
from smalti.training.token_model import Pairs, nats_by_order, processes, train_model


def train_captions(recipe: CaptionsRecipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes the tables, all of them train the transformer. Raises InputError if the
    folder holds a run of another recipe, the layout does not fit the image tokenizer, or as the stages do.
    """
    if recipe.data.train is None or recipe.data.validation is None or recipe.image_tokenizer is None:
        raise InputError("give data.train and data.validation, pictures with captions, and image_tokenizer, a folder.")
    output = recipe.output
    image_tokenizer: Any = load_image_tokenizer(find_image_tokenizer(recipe.image_tokenizer)).eval()
    config = BPEConfig(
        image_size=image_tokenizer.config.codebook_size,
        text_size=recipe.text_size,
        specials=recipe.layout.specials,
        order=recipe.segments,
    )
    layout = Layout.parse(config.vocabulary, recipe.layout.orders)
    max_text_length = _check_spans(layout, image_tokenizer)
    size = recipe.data.size or _picture_size(image_tokenizer)
    sources = {"train": recipe.data.train, "validation": recipe.data.validation}
    given = None if recipe.text_tokenizer is None else TextTokenizer.load(recipe.text_tokenizer)
    if given is not None:
        given.check_vocabulary(layout.vocabulary)
    elif tokens := [str(source) for source in sources.values() if are_tokens(source)]:
        raise InputError(f"{tokens[0]} is tokens: give the text_tokenizer that goes with them, a file.")
    with processes() as (rank, world_size), run_lock(output, rank):
        # tokens that are there are of the image tokenizer as it was given, not of its copy in half precision
        opened = {
            split: open_tokens(
                source,
                split,
                image_tokenizer,
                given,
                max_text_length=max_text_length,
                seed=recipe.train.seed,
            )
            for split, source in sources.items()
            if given is not None and are_tokens(source)
        }
        if rank == 0:
            claim_folder(recipe, output, free=("sample", "evaluate", "about"))
            image_tokenizer = _stored(image_tokenizer, output / "image_tokenizer")
            if not (output / "text_tokenizer.json").exists():
                if given is None:
                    records = open_pairs(recipe.data.train)
                    shown = track(
                        records.records(), "reading captions", unit="pair", show=show_progress, total=len(records)
                    )
                    captions = [pair.caption for pair in shown if pair.caption]
                    with stage("learning words", show=show_progress):
                        given, _ = TextTokenizer.train(captions, config)
                given.save(output / "text_tokenizer.json")
        if world_size > 1:
            dist.barrier()
        with made_again(output / "text_tokenizer.json"):
            text_tokenizer = TextTokenizer.load(output / "text_tokenizer.json")
        if rank == 0:
            tokenizing = TokenizeConfig(size=size, max_text_length=max_text_length, on_error=recipe.data.on_error)
            for split in (split for split in sources if split not in opened):
                tokens = output / "tokens" / f"{split}.parquet"
                _tokenize(sources[split], tokens, image_tokenizer, text_tokenizer, tokenizing, show_progress)
        if world_size > 1:
            dist.barrier()
        train, validation = (
            opened[split] if split in opened else TokenTable.open(output / "tokens" / f"{split}.parquet")
            for split in sources
        )

        def make_pipeline(model: DecoderOnly, **described: Any) -> Pipeline:
            bundle = Bundle(
                model=model,
                layout=layout,
                image_tokenizer=image_tokenizer,
                text_tokenizer=text_tokenizer,
                pictures=PictureConfig(height=size[0], width=size[1], scale=recipe.data.scale),
                sampling=recipe.sample,
                name=output.name,
                **described,
            )
            return Pipeline(bundle)

        watch = recipe.watch
        model = train_model(
            recipe.model,
            layout,
            train,
            validation,
            recipe.train,
            output / "model",
            sampler=SampleTable(output / "samples", watch, make_pipeline) if watch.prompts else None,
            sample_every=watch.every,
            show_progress=show_progress,
            estimate=Estimate(recipe.minutes, {"transformer": recipe.train.length}),
        )
        if rank == 0:
            _finish(recipe, make_pipeline(model.cpu()), validation, command, show_progress)
    return output / "bundle"


def _stored(image_tokenizer: Any, folder: Path) -> Any:
    """The image tokenizer as the bundle holds it, in half precision, and read back: so that the tables have the codes
    that the bundle gives."""
    if not (folder / "config.json").exists():
        save_image_tokenizer(image_tokenizer, folder, dtype=torch.float16)
    with made_again(folder):
        return load_image_tokenizer(folder).eval()


def _finish(recipe: CaptionsRecipe, trained: Pipeline, validation: Pairs, command: str, show_progress: bool) -> None:
    """The bundle, with what is measured of it: of the model as the bundle holds it, in half precision."""
    folder = recipe.output / "bundle"
    trained.bundle.about = {**recipe.about, "Trained by": f"`{command}`", "Seed": str(recipe.train.seed)}
    trained.save(folder, half=True, force=True)
    pipe = Pipeline.load(folder)
    num_rows = min(len(validation), recipe.train.evaluation_rows or len(validation))
    with stage("measuring likelihood", show=show_progress):
        figures = _likelihood_figures(pipe, validation, num_rows)
    if recipe.evaluate is not None:
        assert recipe.data.train is not None and recipe.data.validation is not None
        measure = shlex.join(["smalti", "evaluate", "compositions", str(folder)])
        report = evaluate_compositions(
            pipe,
            recipe.data.validation,
            recipe.data.train,
            recipe.evaluate,
            command=f"{measure} --test {recipe.data.validation} --train {recipe.data.train}",
            show_progress=show_progress,
        )
        report.write(recipe.output, force=True)
        figures |= report.figures()
    pipe.bundle.figures = figures
    pipe.save(folder, half=True, force=True)


def _likelihood_figures(pipe: Pipeline, validation: Pairs, num_rows: int) -> dict[str, str]:
    """Nats per token of each part that an order learns, on the validation pairs; of pictures also without captions."""
    figures = {}
    for captioned in (True, False):
        for name, found in nats_by_order(pipe.model, pipe.layout, validation, num_rows, captioned=captioned).items():
            for part, nats in found.items():
                if nats.num_tokens and part in ("picture", "caption") and (captioned or part == "picture"):
                    given = "" if captioned else ", captions empty"
                    what = f"validation nats per {part} token, {name}{given}"
                    figures[what] = f"{nats.nats_per_token:.4f} ± {nats.standard_error:.4f}"
    return figures


def _picture_size(image_tokenizer: Any) -> tuple[int, int]:
    """Rows and columns that an image tokenizer was trained on."""
    size = image_tokenizer.config.image_size
    return (size, size) if isinstance(size, int) else size


def _check_spans(layout: Layout, image_tokenizer: Any) -> int:
    """How many tokens of a caption fit every order. Raises InputError if the pictures' spans have other lengths than
    the image tokenizer's grid, or a caption's is not of open length."""
    rows, columns = image_tokenizer.config.grid
    lengths = []
    for order in layout.orders.values():
        if order.span("image").length != rows * columns:
            raise InputError(
                f"the image tokenizer gives {rows} × {columns} codes, but the order {order.name!r} has "
                f"{order.span('image')}; write image{{{rows * columns}}}."
            )
        if order.span("text").end is None:
            raise InputError(
                f"the order {order.name!r} has {order.span('text')}, but free captions have any length; write "
                f"text{{..{order.span('text').length}}} with a marker behind it."
            )
        lengths.append(order.span("text").length)
    return min(lengths)


def _tokenize(
    pairs: Path,
    tokens: Path,
    image_tokenizer: Any,
    text_tokenizer: TextTokenizer,
    config: TokenizeConfig,
    show_progress: bool,
) -> None:
    if tokens.exists():
        with made_again(tokens):
            found, wanted = TokenTable.open(tokens).metadata, tokenizer_metadata(image_tokenizer, text_tokenizer)
        require_tokenizers(found, wanted, tokens, f"Remove {tokens.parent} to make it anew.")
        return
    report = tokenize_pairs(pairs, tokens, image_tokenizer, text_tokenizer, config, show_progress=show_progress)
    if report.skipped:
        name, fault = report.skipped[0]
        print(f"{tokens}: {len(report.skipped)} broken pairs were skipped, the first: {name}: {fault}", flush=True)
    if report.num_cut:
        print(
            f"{tokens}: {report.num_cut} of {report.num_rows} captions were cut to {config.max_text_length} tokens",
            flush=True,
        )

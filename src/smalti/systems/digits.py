"""The digits system from top to bottom: data, image tokenizer, tokens, transformer, bundle, report.

Everything lies in one folder, each stage in a place of its own, written whole or not at all. A run that was stopped,
or killed, goes on from what is there; run again when it is done, it finds nothing left to do.

    data/              pictures and captions: train, validation and test as parquet
    image_tokenizer/   the trained image tokenizer, and its training in image_tokenizer_training/
    tokens/            the same three tables as codes and word numbers
    model/             the transformer's training: checkpoints, curves.csv, curves.png, tensorboard
    bundle/            what `Pipeline.load` reads
    report.md, report.json, and the 3×3 figures
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smalti.bundle import Bundle
from smalti.data.digit_sources import read_coloured_pickle, read_mnist, scikit_learn_digits
from smalti.data.digits import PICTURE_SIZE, SPLITS, ColouredDigits, SourceDigits, words, write_digits
from smalti.data.pairs import PairTable
from smalti.data.tokenize_pairs import require_tokenizers, tokenize_pairs, tokenizer_metadata
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.evaluate.galleries import draw_galleries
from smalti.evaluate.report import evaluate_digits, find_report, read_held_out
from smalti.files import made_again
from smalti.image_files import PictureConfig
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.models.decoder_only import DecoderOnly
from smalti.progress import stage
from smalti.recipes import DigitsData, ImageTokenizer, Recipe, claim_folder
from smalti.sequences.layout import Layout
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import TextTokenizer
from smalti.training.checkpoint import run_lock
from smalti.training.estimate import Estimate, Length
from smalti.training.image_tokenizer import train_tokenizer
from smalti.training.token_model import processes, train_model

PICTURES = PictureConfig(height=PICTURE_SIZE, width=PICTURE_SIZE, levels=4, scale=8)


def train_digits(recipe: Recipe, *, command: str = "", show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes the tables and the image tokenizer, all of them train the transformer.
    Raises InputError if the folder holds a run of another recipe, or as the stages do.
    """
    output = recipe.output
    text_tokenizer = TextTokenizer.from_words(words(), spellings={"eigth": "eight"})
    of_tokenizer = Length("image_tokenizer.train.steps", recipe.image_tokenizer.train.steps)
    estimate = Estimate(recipe.minutes, {"image tokenizer": of_tokenizer, "transformer": recipe.train.length})
    with processes() as (rank, world_size), run_lock(output, rank):
        if rank == 0:
            splits = _read_source(recipe.data)
            claim_folder(recipe, output, free=("evaluate", "sample"))
            write_digits(
                output / "data", recipe.data.source, splits, recipe.data.colouring, show_progress=show_progress
            )
            _train_image_tokenizer(recipe.image_tokenizer, output, show_progress, estimate)
            _tokenize(output, load_image_tokenizer(output / "image_tokenizer"), text_tokenizer, show_progress)
        if world_size > 1:
            dist.barrier()
        layout = _layout(recipe, output, text_tokenizer)
        train, validation = (TokenTable.open(output / "tokens" / f"{split}.parquet") for split in SPLITS[:2])
        folder = output / "model"
        shown: Any = {"show_progress": show_progress, "estimate": estimate}
        model = train_model(recipe.model, layout, train, validation, recipe.train, folder, **shown)
        if rank == 0:
            _finish(recipe, model, layout, text_tokenizer, command, show_progress)
    return output / "bundle"


# Data, image tokenizer, tokens ---------------------------------------------------------------------------------


def _read_source(data: DigitsData) -> dict[str, SourceDigits] | dict[str, ColouredDigits]:
    if data.path is None:
        return scikit_learn_digits()
    return read_mnist(data.path) if data.source == "mnist" else read_coloured_pickle(data.path)


def _train_image_tokenizer(recipe: ImageTokenizer, output: Path, show_progress: bool, estimate: Estimate) -> None:
    """Puts an image tokenizer into its folder: the one given, or a new one. Stored in half precision, as the bundle
    holds it, and read back, so that the tables have the codes that the bundle gives."""
    folder = output / "image_tokenizer"
    if (folder / "config.json").exists():
        with made_again(folder):
            load_image_tokenizer(folder)
        return
    if recipe.path is not None:
        trained = load_image_tokenizer(recipe.path)
    else:
        train, validation = (PairTable(output / "data" / f"{split}.parquet").read().pictures for split in SPLITS[:2])
        training = output / "image_tokenizer_training"
        shown: Any = {"show_progress": show_progress, "estimate": estimate}
        trained = train_tokenizer(train, validation, recipe.model, recipe.train, training, **shown)
    save_image_tokenizer(trained, folder, dtype=torch.float16)


def _tokenize(output: Path, image_tokenizer: nn.Module, text_tokenizer: TextTokenizer, show_progress: bool) -> None:
    for split in SPLITS:
        pairs, tokens = output / "data" / f"{split}.parquet", output / "tokens" / f"{split}.parquet"
        if not tokens.exists():
            tokenize_pairs(pairs, tokens, image_tokenizer, text_tokenizer, show_progress=show_progress)
        else:
            with made_again(tokens):
                found, wanted = TokenTable.open(tokens).metadata, tokenizer_metadata(image_tokenizer, text_tokenizer)
            require_tokenizers(found, wanted, tokens, f"Remove {tokens.parent} to make it anew.")


# Model, bundle, report -----------------------------------------------------------------------------------------


def _layout(recipe: Recipe, output: Path, text_tokenizer: TextTokenizer) -> Layout:
    config: Any = load_image_tokenizer(output / "image_tokenizer").config
    layout = recipe.layout.make(codebook_size=config.codebook_size, text_vocab_size=text_tokenizer.vocab_size)
    rows, columns = config.grid
    for order in layout.orders.values():
        if order.span("image").length != rows * columns:
            raise InputError(
                f"{recipe.image_tokenizer.path} gives {rows} × {columns} codes, but the order {order.name!r} has "
                f"{order.span('image')}; write image{{{rows * columns}}}."
            )
    return layout


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


def _finish(
    recipe: Recipe,
    model: DecoderOnly,
    layout: Layout,
    text_tokenizer: TextTokenizer,
    command: str,
    show_progress: bool,
) -> None:
    """Bundles, then measures the bundle as a user will load it, rounded to half precision."""
    output, bundle = recipe.output, recipe.output / "bundle"
    Bundle(
        model=model.cpu(),
        layout=layout,
        image_tokenizer=load_image_tokenizer(output / "image_tokenizer"),
        text_tokenizer=text_tokenizer,
        pictures=PICTURES,
        sampling=recipe.sample,
        about=_about(recipe, command),
        name=output.name,
    ).save(bundle, half=True, force=True)
    pipe = Pipeline.load(bundle)
    report = find_report(output, pipe.weights_sha256, recipe.evaluate)
    if report is None:
        held_out = read_held_out(output / "data")
        report = evaluate_digits(pipe, held_out, recipe.evaluate, command=command, show_progress=show_progress)
        with stage("drawing galleries", show=show_progress):
            draw_galleries(pipe, held_out.pictures, held_out.captions, output, seed=recipe.evaluate.seed, force=True)
        report.write(output, force=True)
    pipe.bundle.figures = report.figures()
    pipe.save(bundle, half=True, force=True)

"""Pictures from free captions, from top to bottom: text tokenizer, tokens, transformer, bundle.

Everything lies in one folder, each stage in a place of its own, written whole or not at all. A run that was stopped,
or killed, goes on from what is there; run again when it is done, it finds nothing left to do.

    text_tokenizer.json   pieces of words, learned from the training captions
    tokens/               train and validation pairs as codes and numbers
    model/                the transformer's training: checkpoints, curves.csv, curves.png, tensorboard
    bundle/               what `Pipeline.load` reads

Letters: n rows of a batch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Integer

from smalti.data.pair_sources import open_pairs
from smalti.data.tokenize_pairs import TokenizeConfig, require_tokenizers, tokenize_pairs, tokenizer_metadata
from smalti.data.tokens import TokenBatch, TokenTable
from smalti.errors import InputError
from smalti.image_tokenizers import load_image_tokenizer
from smalti.layout import Layout
from smalti.pictures import PictureConfig
from smalti.pipeline import Pipeline
from smalti.recipes import CaptionsRecipe, claim_folder
from smalti.text_tokenizer import BPEConfig, TextTokenizer
from smalti.train_model import processes, train_model


class WithoutSomeCaptions:
    """A token table in which a share of the captions is empty, so that the model also learns pictures without one.

    Which are is drawn from the seed and the rows of the batch: another choice in every epoch, but the same when a
    training is resumed.
    """

    def __init__(self, table: TokenTable, share: float, seed: int):
        self._table, self._share, self._seed = table, share, seed

    def __len__(self) -> int:
        return len(self._table)

    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch:
        batch = self._table.batch(rows)
        empty = np.random.default_rng([self._seed, *rows.tolist()]).random(len(rows)) < self._share
        return batch._replace(text_lengths=np.where(empty, 0, batch.text_lengths))


def train_captions(recipe: CaptionsRecipe, *, show_progress: bool = True) -> Path:
    """Trains the system of a recipe in its output folder, from wherever it stands; returns the bundle's folder.

    Under `torchrun` the first process makes the tables, all of them train the transformer. Raises InputError if the
    folder holds a run of another recipe, the layout does not fit the image tokenizer, or as the stages do.
    """
    if recipe.data.train is None or recipe.data.validation is None or recipe.image_tokenizer is None:
        raise InputError("give data.train and data.validation, pictures with captions, and image_tokenizer, a folder.")
    output = recipe.output
    image_tokenizer: Any = load_image_tokenizer(recipe.image_tokenizer).eval()
    config = BPEConfig(
        image_size=image_tokenizer.config.codebook_size,
        text_size=recipe.text_size,
        specials=recipe.layout.specials,
        order=recipe.segments,
    )
    layout = Layout.parse(config.vocabulary, recipe.layout.orders)
    max_text_length = _check_spans(layout, image_tokenizer)
    with processes() as (rank, world_size):
        if rank == 0:
            claim_folder(recipe, output, free=("sample",))
            if not (output / "text_tokenizer.json").exists():
                captions = [pair.caption for pair in open_pairs(recipe.data.train).records() if pair.caption]
                TextTokenizer.train(captions, config)[0].save(output / "text_tokenizer.json")
        if world_size > 1:
            dist.barrier()
        text_tokenizer = TextTokenizer.load(output / "text_tokenizer.json")
        if rank == 0:
            tokenizing = TokenizeConfig(
                size=recipe.data.size, max_text_length=max_text_length, on_error=recipe.data.on_error
            )
            for split, pairs in (("train", recipe.data.train), ("validation", recipe.data.validation)):
                tokens = output / "tokens" / f"{split}.parquet"
                _tokenize(pairs, tokens, image_tokenizer, text_tokenizer, tokenizing, show_progress)
        if world_size > 1:
            dist.barrier()
        train, validation = (TokenTable.open(output / "tokens" / f"{s}.parquet") for s in ("train", "validation"))
        rows = WithoutSomeCaptions(train, recipe.caption_dropout, recipe.train.seed)
        model = train_model(
            recipe.model, layout, rows, validation, recipe.train, output / "model", show_progress=show_progress
        )
        if rank == 0:
            height, width = recipe.data.size
            Pipeline(
                model=model.cpu(),
                layout=layout,
                image_tokenizer=image_tokenizer,
                text_tokenizer=text_tokenizer,
                pictures=PictureConfig(height=height, width=width),
                sampling=recipe.sample,
                name=output.name,
            ).save(output / "bundle", half=True, force=True)
    return output / "bundle"


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

"""What systems do alike: prepare the tokenizers and tokens, train, finish with a bundle that was measured.

Everything lies in one folder, each stage in a place of its own, written whole or not at all. A run that was stopped, or
killed, goes on from what is there; run again when it is done, it finds nothing left to do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from smalti.bundle import Bundle, find_bundle
from smalti.data.tokenize_pairs import TokenizeConfig, require_tokenizers, tokenize_pairs, tokenizer_metadata
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.evaluate.reconstruction import find_image_tokenizer
from smalti.files import made_again
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.sequences.layout import Layout
from smalti.text_tokenizer import TextTokenizer
from smalti.training.checkpoint import run_lock
from smalti.training.distributed import processes, wait_for_all


class Team(NamedTuple):
    """The processes of a run: the first makes what all of them read."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        wait_for_all(self.size)


@contextmanager
def team(output: Path) -> Iterator[Team]:
    """The processes that `torchrun` started, or this one, while the first holds the folder of the run."""
    with processes() as (rank, size), run_lock(output, rank):
        yield Team(rank, size)


# Prepare -------------------------------------------------------------------------------------------------------


def given_image_tokenizer(path: Path) -> Path:
    """The folder of an image tokenizer, from it, from one that holds it, or from a bundle's name."""
    return find_image_tokenizer(path if path.is_dir() else find_bundle(path))


def stored_image_tokenizer(folder: Path, make: Callable[[], nn.Module]) -> Any:
    """The image tokenizer in a run's folder, or the one that is made. It is stored as the bundle holds it, in half
    precision, and read back, so that the tables have the codes that the bundle gives."""
    if not (folder / "config.json").exists():
        save_image_tokenizer(make(), folder, dtype=torch.float16)
    with made_again(folder):
        return load_image_tokenizer(folder).eval()


def check_grid(layout: Layout, image_tokenizer: Any) -> None:
    """Raises InputError if the pictures' spans have another length than the image tokenizer's grid."""
    rows, columns = image_tokenizer.config.grid
    for order in layout.orders.values():
        if order.span("image").length != rows * columns:
            raise InputError(
                f"the image tokenizer gives {rows} × {columns} codes, but the order {order.name!r} has "
                f"{order.span('image')}; write image{{{rows * columns}}}."
            )


def stored_tokens(
    pairs: Path,
    tokens: Path,
    image_tokenizer: nn.Module,
    text_tokenizer: TextTokenizer | None,
    config: TokenizeConfig,
    *,
    show_progress: bool,
) -> None:
    """Puts the tokens of pictures and captions into their table. One that is there must be of these tokenizers."""
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


# Finish --------------------------------------------------------------------------------------------------------


def finish(trained: Bundle, folder: Path, measure: Callable[[Bundle], Mapping[str, Any]]) -> Path:
    """Writes the bundle of what was trained, with the figures that are measured of it as a user will load it, rounded
    to half precision; returns its folder."""
    trained.save(folder, half=True, force=True)
    loaded = Bundle.load(folder)
    loaded.figures = dict(measure(loaded))
    loaded.save(folder, half=True, force=True)
    return folder

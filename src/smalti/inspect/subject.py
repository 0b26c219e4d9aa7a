"""What a report is about: a model, the codes it is looked at on, and an image tokenizer if there is one.

Letters: N lines, L codes of a line, h w grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from smalti.bundle import CONFIG, IMAGE_TOKENIZER, Bundle, find_bundle
from smalti.data.lines import LineFormat, read_lines
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.image_tokenizers import load_image_tokenizer
from smalti.inspect.grid import Grid
from smalti.inspect.sequences import code_positions, has_picture_order, pack_codes, picture_order
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Layout, Packed, Slot


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """Lines and the model that predicts them."""

    bundle: Bundle
    order: str | None
    """What the model is looked at in; None: it cannot be looked into, since it has other than plain blocks, or its
    codes have no fixed place. What captions do to them can be found out all the same."""
    codes: Integer[np.ndarray, "N L"]
    text_tokens: Integer[np.ndarray, "N Lt"] | None
    image_tokenizer: Any
    code_offset: int = 0
    """What a line's code is above the image tokenizer's."""
    captions: list[str] | None = None
    """Of the pictures that the lines are, where the bundle draws from captions."""
    heard: Callable[[Any], None] = lambda finding: None
    """Told of each finding as it comes."""

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def layout(self) -> Layout:
        return self.bundle.layout

    @property
    def model(self) -> DecoderOnly:
        """The model that is looked into. Raises InputError if it has other than plain blocks."""
        return self.bundle.decoder_only("looking inside")

    @property
    def vocab_size(self) -> int:
        return self.layout.vocabulary["image"].size

    @property
    def positions(self) -> range:
        """Where in the model's sequences the codes stand."""
        assert self.order is not None
        return code_positions(self.layout, self.order)

    def packed(self, num: int) -> Packed:
        """The first `num` lines as the model reads them."""
        assert self.order is not None
        text_tokens = None if self.text_tokens is None else self.text_tokens[:num]
        return pack_codes(self.layout, self.order, self.codes[:num], text_tokens)

    def pictures(self, codes: Int[Tensor, "*some L"], grid: Grid | None) -> Int[Tensor, "*some h w"] | None:
        """Lines of codes as the image tokenizer takes them; None if there is none, the grid found is not its own, or a
        code in it is not.

        Codes of a picture model stand as its tokenizer made them. In lines the grid found says where the cells are:
        it must have the tokenizer's shape and its columns in order, or mirroring could not be told.
        """
        if self.image_tokenizer is None:
            return None
        rows, columns = self.image_tokenizer.config.grid
        if rows * columns == codes.shape[-1]:
            codes = codes[..., torch.arange(rows * columns)] if grid is None else codes[..., self._cells(grid)]
        elif grid is not None and (grid.rows, grid.columns) == (rows, columns) and grid.is_upright:
            codes = codes[..., torch.from_numpy(grid.positions.ravel())]
        else:
            return None
        codes = codes - self.code_offset
        within = int(codes.min()) >= 0 and int(codes.max()) < self.image_tokenizer.config.codebook_size
        return codes.unflatten(-1, (rows, columns)) if within else None

    def _cells(self, grid: Grid) -> Tensor:
        rows, columns = self.image_tokenizer.config.grid
        same = (grid.rows, grid.columns) == (rows, columns) and grid.is_upright
        return torch.from_numpy(grid.positions.ravel()) if same else torch.arange(rows * columns)


def load_subject(
    bundle: str | Path,
    data: Path,
    *,
    num_lines: int,
    image_tokenizer: str | Path | None = None,
    code_offset: int = 0,
    seed: int = 0,
) -> Subject:
    """A bundle of pictures or of lines, and `num_lines` lines drawn from a token table (parquet) or a text file.

    `image_tokenizer` is the folder of one for a bundle of lines, or a bundle of pictures that has it; the lines' codes
    may be raised by `code_offset`. Raises InputError for what does not fit.
    """
    loaded = Bundle.load(bundle, device="cpu")
    tokenizer = loaded.image_tokenizer
    if tokenizer is None:
        tokenizer = _image_tokenizer(image_tokenizer) if image_tokenizer else None
    elif image_tokenizer or code_offset:
        raise InputError(f"{bundle} has an image tokenizer of its own; leave out --image-tokenizer and --code-offset.")
    segment, order = loaded.layout.vocabulary["image"], None
    if isinstance(loaded.model, DecoderOnly) or not loaded.can_draw:
        model = loaded.decoder_only("inspect")
        if not model.can_score(Slot(((segment.offset, segment.end),))):
            raise InputError(
                f"{bundle} was trained to be given pictures, not to predict them: there is nothing to inspect."
            )
        order = picture_order(loaded.layout) if has_picture_order(loaded.layout) or not loaded.can_draw else None
    read_in = loaded.order("text", "image") if order is None else order
    codes, text_tokens, captions = _read(Path(data), loaded, read_in, num_lines, seed)
    return Subject(
        bundle=loaded,
        order=order,
        codes=codes,
        text_tokens=text_tokens,
        image_tokenizer=tokenizer,
        code_offset=code_offset,
        captions=captions,
    )


def _image_tokenizer(name: str | Path) -> Any:
    folder = Path(name)
    is_bundle = (folder / IMAGE_TOKENIZER).is_dir() or not (folder / CONFIG).is_file()
    return load_image_tokenizer(find_bundle(name) / IMAGE_TOKENIZER if is_bundle else folder)


def _read(
    path: Path, bundle: Bundle, order: str, num_lines: int, seed: int
) -> tuple[Integer[np.ndarray, "N L"], Integer[np.ndarray, "N Lt"] | None, list[str] | None]:
    layout = bundle.layout
    length, vocab_size = layout[order].span("image").length, layout.vocabulary["image"].size
    needs_text = any(span.segment == "text" and not span.end for span in layout[order].spans)
    generator = np.random.default_rng(seed)
    if path.is_file() and path.suffix != ".parquet":
        if needs_text:
            raise InputError(f"{path} is a file of lines, without the captions that {order!r} needs; give a parquet.")
        line_format = LineFormat(vocab_size=vocab_size, length=length)
        blocks = [lines.padded() for lines in read_lines(path, line_format)]
        codes = np.concatenate([np.zeros((0, length), np.int64), *blocks])
        return codes[_some(path, len(codes), num_lines, generator)], None, None
    table = TokenTable.open(path, image_length=length, image_vocab_size=vocab_size)
    batch = table.batch(_some(path, len(table), num_lines, generator))
    captions, tokenizer = None, bundle.text_tokenizer
    if bundle.can_draw and tokenizer is not None and batch.text_lengths.any():
        rows = zip(batch.text_tokens, batch.text_lengths, strict=True)
        captions = [tokenizer.decode(ids[:num].tolist()) for ids, num in rows]  # type: ignore[union-attr]
    return batch.image_tokens, batch.text_tokens if needs_text else None, captions


def _some(path: Path, num_there: int, num_wanted: int, generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    if num_there < 2:
        raise InputError(f"{path} has {num_there} lines; at least 2 are needed to compare any.")
    return generator.permutation(num_there)[:num_wanted]  # in random order: the first few are to be any

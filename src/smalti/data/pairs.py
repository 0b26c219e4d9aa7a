"""Pictures with captions, read lazily from parquet tables.

A table has one column of encoded pictures (PNG, JPEG or whatever Pillow reads; as bytes, or as the {bytes, path}
pairs of Hugging Face data sets), one column of captions, and may have a column `__key__` that names its rows.
Letters: N pictures of H rows and W columns.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from smalti.data import arrow_types
from smalti.data.parquet_files import ParquetReader
from smalti.data.text_tables import find_column
from smalti.errors import InputError, first_line
from smalti.picture_files import load_picture

_KEY_COLUMN = "__key__"
_PLAIN_MODES = ("RGB", "L", "1", "P", "CMYK", "YCbCr")
_ALPHA_MODES = ("RGBA", "LA", "PA")


class Record(NamedTuple):
    """One picture as it is stored, and its caption; what is missing is None."""

    name: str
    """The file and the place in it, for people."""
    key: str | None
    caption: str | None
    encoded: bytes | None
    fault: str | None = None
    """Why the picture or the caption is missing, where that is known."""


class Pair(NamedTuple):
    """One picture, values 0..255, and its caption."""

    key: str
    caption: str
    picture: UInt8[np.ndarray, "H W 3"]


class Pairs(NamedTuple):
    """Pictures of one size, values 0..255, and their captions, all in memory."""

    keys: list[str]
    captions: list[str]
    pictures: UInt8[np.ndarray, "N H W 3"]


class PairTable:
    """A parquet table of pictures and captions; iterating reads and decodes a few hundred rows at a time.

    Without `caption_column` it is "caption", or the one column of text with another usual name. A row with a list of
    captions is as many pairs. Rows without a `__key__` column are named by their number, "00000000" first. Whatever is
    wrong with the file raises InputError naming the file and the row group or row, counted from 0.
    """

    def __init__(self, path: Path | str, *, image_column: str = "image", caption_column: str | None = None) -> None:
        self.path = Path(path)
        self._reader = ParquetReader(self.path)
        self._image_column = image_column
        self._caption_column = self._columns(caption_column)
        self._group_pairs = self._count_pairs()

    def _columns(self, caption_column: str | None) -> str:
        """The column of captions, once those needed are there and hold what they must."""
        schema = self._reader.schema
        pictures = ", ".join(field.name for field in schema if arrow_types.is_pictures(field.type))
        hint = f"Name one by --image-column; pictures may be in {pictures}." if pictures else "Name one of pictures."
        self._reader.require_columns([self._image_column], hint)
        if caption_column is None:
            text = [field.name for field in schema if field.name != _KEY_COLUMN and _may_be_captions(field.type)]
            caption_column = (
                "caption" if "caption" in schema.names else find_column(text or schema.names, None, self.path)
            )
        self._reader.require_columns([caption_column], "Name one of them by --caption-column.")
        arrow_types.require_pictures(schema.field(self._image_column).type, self.path, self._image_column)
        arrow_types.require_text(schema.field(caption_column).type, self.path, caption_column, or_lists=True)
        if _KEY_COLUMN in schema.names:
            self._reader.require_columns([_KEY_COLUMN], "")
            arrow_types.require_key(schema.field(_KEY_COLUMN).type, self.path, _KEY_COLUMN)
        return caption_column

    def _count_pairs(self) -> list[int]:
        """The pairs of each row group: its rows, unless they hold lists of captions."""
        if not arrow_types.is_texts(self._reader.schema.field(self._caption_column).type):
            return self._reader.group_rows
        return [
            sum(
                len(captions)
                for batch in self._reader.batches([self._caption_column], [group])
                for captions in arrow_types.captions(batch[self._caption_column])
            )
            for group in range(self.num_row_groups)
        ]

    def __len__(self) -> int:
        return sum(self._group_pairs)

    @property
    def num_row_groups(self) -> int:
        return self._reader.num_row_groups

    def __iter__(self) -> Iterator[Pair]:
        for index in range(self.num_row_groups):
            yield from self.row_group(index)

    def row_group(self, index: int) -> Iterator[Pair]:
        """The pairs of one row group, so that several readers can share a table."""
        for record in self._group_records(index):
            yield self._pair(record)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The pairs from number `start` on, pictures not decoded; row groups before it are not read."""
        for index, num_pairs in enumerate(self._group_pairs):
            if start < num_pairs:
                yield from islice(self._group_records(index), start, None)
            start = max(start - num_pairs, 0)

    def _group_records(self, index: int) -> Iterator[Record]:
        row = sum(self._reader.group_rows[:index])
        wanted = {_KEY_COLUMN, self._image_column, self._caption_column}
        columns = [name for name in self._reader.schema.names if name in wanted]
        for batch in self._reader.batches(columns, [index]):
            keys = arrow_types.strings(batch[_KEY_COLUMN]) if _KEY_COLUMN in batch.schema.names else None
            images = arrow_types.encoded_pictures(batch[self._image_column])
            captions = arrow_types.captions(batch[self._caption_column])
            for offset, (image, several) in enumerate(zip(images, captions, strict=True)):
                key = keys[offset] if keys else f"{row:08d}"
                for caption in several:
                    fault = image.fault or ("its caption is empty, or not UTF-8 text" if caption is None else None)
                    yield Record(f"{self.path}: row {row}", key, caption, image.content, fault)
                row += 1

    def _pair(self, record: Record) -> Pair:
        columns = {_KEY_COLUMN: record.key, self._image_column: record.encoded, self._caption_column: record.caption}
        for column in (self._image_column, self._caption_column, _KEY_COLUMN):
            if columns[column] is None:
                why = f" ({record.fault})" if record.fault else ""
                raise InputError(
                    f"{record.name}: column {column!r} is empty{why}; every row needs a picture and a caption"
                )
        assert record.key is not None and record.caption is not None and record.encoded is not None
        try:
            return Pair(record.key, record.caption, decode_picture(record.encoded))
        except InputError as error:
            raise InputError(f"{record.name}: {error}") from error

    def read(self) -> Pairs:
        """All pairs in memory, for small tables of one picture size. Raises InputError for another size or no rows."""
        if not len(self):
            raise InputError(f"{self.path} holds no rows")
        keys: list[str] = []
        captions: list[str] = []
        pictures = np.empty((0, 0, 0, 3), np.uint8)
        for row, pair in enumerate(self):
            if row == 0:
                pictures = np.empty((len(self), *pair.picture.shape), np.uint8)
            if pair.picture.shape != pictures.shape[1:]:
                raise InputError(
                    f"{self.path}: row {row}: the picture is {_size(pair.picture)} but the first is "
                    f"{_size(pictures[0])} (rows × columns); to be read together all must have one size"
                )
            keys.append(pair.key)
            captions.append(pair.caption)
            pictures[row] = pair.picture
        return Pairs(keys, captions, pictures)


def decode_picture(encoded: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The red, green and blue values, 0..255, of a picture file's bytes, upright; transparent parts are laid on white.

    Raises InputError if the bytes are no whole picture or its mode has no plain meaning in 8-bit colours.
    """
    try:
        image = load_picture(encoded)
    except InputError as error:
        raise InputError(f"the {len(encoded)} bytes are not a whole picture ({error})") from error
    try:
        return np.asarray(_to_rgb(image))
    except InputError:
        raise
    except Exception as error:  # a palette or transparency that cannot be
        raise InputError(f"the {len(encoded)} bytes are not a whole picture ({first_line(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _ALPHA_MODES or (image.mode in _PLAIN_MODES and "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode not in _PLAIN_MODES:
        raise InputError(f"the picture has mode {image.mode}; expected 8-bit colours, grey or a palette")
    return image.convert("RGB")


def _may_be_captions(kind: Any) -> bool:
    return arrow_types.is_text(kind) or arrow_types.is_texts(kind)


def _size(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    return f"{picture.shape[0]}×{picture.shape[1]}"

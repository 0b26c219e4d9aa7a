"""Pictures with captions, read lazily from parquet tables.

A table has one column of encoded pictures (PNG, JPEG or whatever Pillow reads; as bytes, or as the {bytes, path}
pairs of Hugging Face data sets), one column of captions, and may have a column `__key__` that names its rows.
Letters: N pictures of H rows and W columns.
"""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from smalti.errors import InputError

_KEY_COLUMN = "__key__"
_ROWS_AT_ONCE = 256  # bounds the memory of reading, however large the table's row groups are
_PLAIN_MODES = ("RGB", "L", "1", "P", "CMYK", "YCbCr")
_ALPHA_MODES = ("RGBA", "LA", "PA")


class Record(NamedTuple):
    """One picture as it is stored, and its caption; what is missing is None."""

    name: str
    """The file and the place in it, for people."""
    key: str | None
    caption: str | None
    encoded: bytes | None


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

    Rows without a `__key__` column are named by their number, "00000000" first. Whatever is wrong with the file raises
    InputError naming the file and the row group or row, counted from 0.
    """

    def __init__(self, path: Path | str, *, image_column: str = "image", caption_column: str = "caption") -> None:
        self.path = Path(path)
        self._image_column, self._caption_column = image_column, caption_column
        try:
            # Without its checksums verified, a flipped bit in a page can pass as another caption.
            self._file = pq.ParquetFile(self.path, page_checksum_verification=True)
        except FileNotFoundError as error:
            raise InputError(f"there is no file {self.path}; name a parquet table of pictures and captions") from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path} is not a readable parquet file ({_first_line(error)}); if it was copied or downloaded, "
                "it may be cut short: fetch it again"
            ) from error
        self._check_columns(self._file.schema_arrow)

    def _check_columns(self, schema: pa.Schema) -> None:
        for column, holds, is_right in (
            (self._image_column, "encoded pictures (binary)", _holds_bytes),
            (self._caption_column, "captions (string)", _holds_text),
        ):
            if column not in schema.names:
                raise InputError(
                    f"{self.path} has no column {column!r}; it has {', '.join(schema.names)}: name one of them"
                )
            if not is_right(schema.field(column).type):
                raise InputError(
                    f"{self.path}: column {column!r} should hold {holds}, but it is {schema.field(column).type}"
                )

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def num_row_groups(self) -> int:
        return self._file.num_row_groups

    def __iter__(self) -> Iterator[Pair]:
        for index in range(self.num_row_groups):
            yield from self.row_group(index)

    def row_group(self, index: int) -> Iterator[Pair]:
        """The pairs of one row group, so that several readers can share a table."""
        for record in self._group_records(index):
            yield self._pair(record)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The rows from number `start` on, pictures not decoded; row groups before it are not read."""
        for index in range(self.num_row_groups):
            num_rows = self._file.metadata.row_group(index).num_rows
            if start < num_rows:
                yield from islice(self._group_records(index), start, None)
            start = max(start - num_rows, 0)

    def _group_records(self, index: int) -> Iterator[Record]:
        row = sum(self._file.metadata.row_group(i).num_rows for i in range(index))
        for batch in self._batches(index):
            keys = batch[_KEY_COLUMN].to_pylist() if _KEY_COLUMN in batch.schema.names else None
            images, captions = batch[self._image_column].to_pylist(), batch[self._caption_column].to_pylist()
            for offset, (image, caption) in enumerate(zip(images, captions, strict=True)):
                key = keys[offset] if keys else f"{row:08d}"
                encoded = image.get("bytes") if isinstance(image, dict) else image
                yield Record(f"{self.path}: row {row}", None if key is None else str(key), caption, encoded)
                row += 1

    def _batches(self, index: int) -> Iterator[pa.RecordBatch]:
        wanted = {_KEY_COLUMN, self._image_column, self._caption_column}
        columns = [name for name in self._file.schema_arrow.names if name in wanted]
        try:
            yield from self._file.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path}: row group {index} of {self.num_row_groups} is damaged ({_first_line(error)}); "
                "fetch or make the file again"
            ) from error

    def _pair(self, record: Record) -> Pair:
        columns = {_KEY_COLUMN: record.key, self._image_column: record.encoded, self._caption_column: record.caption}
        for column in (self._image_column, self._caption_column, _KEY_COLUMN):
            if columns[column] is None:
                raise InputError(f"{record.name}: column {column!r} is empty; every row needs a picture and a caption")
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
    """The red, green and blue values, 0..255, of a picture file's bytes; transparent parts are laid on white.

    Raises InputError if the bytes are no whole picture or its mode has no plain meaning in 8-bit colours.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            return np.asarray(_to_rgb(image))
    except InputError:
        raise
    except UnidentifiedImageError as error:  # its own words name a place in memory
        raise InputError(f"the {len(encoded)} bytes are not a whole picture (of no format that is known)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the {len(encoded)} bytes are not a whole picture ({_first_line(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _ALPHA_MODES or (image.mode in _PLAIN_MODES and "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode not in _PLAIN_MODES:
        raise InputError(f"the picture has mode {image.mode}; expected 8-bit colours, grey or a palette")
    return image.convert("RGB")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _size(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    return f"{picture.shape[0]}×{picture.shape[1]}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")

"""Which Arrow types are text, pictures and codes, and their values: decided here, for every reader of tables.

Writers leave one meaning in many types: polars writes large strings and views, pandas dictionaries (its categoricals),
Hugging Face data sets {bytes, path} pairs. Each refusal names the file, the column and its type.
Letters in shapes: n rows, m codes in all of them together.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64

from smalti.errors import InputError

_MAX_INT64 = 2**63 - 1
_compute: Any = pyarrow.compute  # its functions are made at import, unknown to type checkers


def is_text(kind: pa.DataType) -> bool:
    """Strings of any width, views and dictionaries of them."""
    kind = _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_texts(kind: pa.DataType) -> bool:
    """Lists of text: several captions of one picture."""
    kind = _plain(kind)
    return _is_list(kind) and is_text(kind.value_type)


def is_pictures(kind: pa.DataType) -> bool:
    """Encoded picture files: bytes, or structs with `bytes` as Hugging Face data sets have."""
    kind = _plain(kind)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = _plain(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_codes(kind: pa.DataType) -> bool:
    """Lists of integers, of any width and any form of list; or of nothing, where all lists are empty."""
    kind = _plain(kind)
    return _is_list(kind) and (pa.types.is_integer(_plain(kind.value_type)) or is_empty(kind.value_type))


def is_key(kind: pa.DataType) -> bool:
    """What may name rows: text or numbers."""
    return is_text(kind) or pa.types.is_integer(_plain(kind))


def is_empty(kind: pa.DataType) -> bool:
    """The type of a column in which no row holds anything."""
    return pa.types.is_null(_plain(kind))


def require_text(kind: pa.DataType, path: Path | str, column: str, *, or_lists: bool = False) -> None:
    if not (is_text(kind) or (or_lists and is_texts(kind))):
        mend = "every row is empty: give another column" if is_empty(kind) else "cast it, or give another column"
        raise InputError(f"{path}: column {column!r} holds {kind}, expected text (string); {mend}.")


def require_pictures(kind: pa.DataType, path: Path | str, column: str) -> None:
    if not is_pictures(kind):
        raise InputError(
            f"{path}: column {column!r} holds {kind}, expected encoded pictures (binary, or a struct with bytes); give "
            "another column."
        )


def require_codes(kind: pa.DataType, path: Path | str, column: str, *, or_empty: bool = False) -> None:
    if not (is_codes(kind) or (or_empty and is_empty(kind))):
        raise InputError(
            f"{path}: column {column!r} holds {kind}, expected lists of integers, one list a picture; write it as such."
        )


def require_key(kind: pa.DataType, path: Path | str, column: str) -> None:
    if not (is_key(kind) or is_empty(kind)):
        raise InputError(f"{path}: column {column!r} holds {kind}, expected names (string) or whole numbers.")


def strings(column: pa.Array) -> list[str | None]:
    """The values of a column of text, or of numbers as text. Bytes that are not UTF-8, which parquet does not rule out,
    are None."""
    try:
        return as_text(column).to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in as_text(column).cast(pa.large_binary()).to_pylist()]


def as_text(column: pa.Array) -> pa.LargeStringArray:
    """A column of text, of numbers or of nothing as plain text."""
    return column.cast(pa.large_string())


def captions(column: pa.Array) -> list[list[str | None]]:
    """The captions of each row of a column of text, or of lists of it: one at least, which is None if it is missing."""
    if is_text(column.type) or is_empty(column.type):
        return [[caption] for caption in strings(column)]
    ends = np.cumsum(_compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False))
    values = strings(_compute.list_flatten(column))
    starts = [0, *ends.tolist()]
    return [values[start:end] or [None] for start, end in pairwise(starts)]


class Encoded(NamedTuple):
    """A picture as its file is, or why there is none."""

    content: bytes | None
    fault: str | None = None


def encoded_pictures(column: pa.Array) -> list[Encoded]:
    """The picture files in a column."""
    return [encoded_picture(value) for value in column.to_pylist()]


def encoded_picture(value: bytes | dict[str, Any] | None) -> Encoded:
    """The picture file in one value of a column of pictures."""
    if not isinstance(value, dict):
        return Encoded(value, "there is no picture in this row" if value is None else None)
    if value.get("bytes") is not None:
        return Encoded(value["bytes"])
    if value.get("path"):
        return Encoded(
            None,
            f"there is only the path {value['path']!r}, not the picture itself; write the table with its bytes "
            "(datasets: cast_column(name, Image(decode=True)), then to_parquet), or give the folder of pictures",
        )
    return Encoded(None, "there is no picture in this row")


class Codes(NamedTuple):
    """Lists of integers, one after the other; a missing list is of length 0, a missing or too large integer is -1."""

    lengths: Int64[np.ndarray, " n"]
    values: Int64[np.ndarray, " m"]
    is_missing: Bool[np.ndarray, " n"]


def codes(column: pa.Array) -> Codes:
    """The values of a column of codes, or of nothing."""
    is_missing = column.is_null().to_numpy(zero_copy_only=False)
    if is_empty(column.type):
        return Codes(np.zeros(len(column), np.int64), np.zeros(0, np.int64), is_missing)
    # Not by a cast: pyarrow's from list views to lists loses rows (version 26).
    lengths = _compute.list_value_length(column).cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    values = _compute.list_flatten(column)
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    if pa.types.is_uint64(values.type):
        values = _compute.if_else(_compute.less_equal(values, pa.scalar(_MAX_INT64, pa.uint64())), values, None)
    return Codes(lengths, values.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False), is_missing)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves, of dictionaries and extension types."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return _plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None

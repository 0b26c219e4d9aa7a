"""Codes of pictures in arrays of NumPy and in JSON lines, as blocks of rows; `lines.py` checks them as it checks text.

Letters in shapes: n rows, m codes in all of them together.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Int64, Shaped

from smalti.arrays import read_npz
from smalti.errors import InputError, first_line

CODE_FIELDS = ("image_tokens", "tokens", "codes", "indices", "token_ids", "ids")
"""What the field of codes of a JSON line is called, the likeliest first, where several hold lists of integers."""
TAG_FIELDS = ("__key__", "key", "tag", "file_name", "filename", "name", "path", "id")
_CODES_AT_ONCE = 2**20
_LARGEST = 2**63 - 1


class CodeRows(NamedTuple):
    """Some rows of a file, not yet checked. Codes that no int64 holds are the largest or the smallest that one does."""

    tags: list[str] | None
    """None: the rows have no names."""
    codes: Int64[np.ndarray, " m"]
    lengths: Int64[np.ndarray, " n"]
    faults: dict[int, str]
    """Rows that hold no codes at all, with the reason; their lengths are 0."""
    shown: list[bytes]
    """The rows as they are in the file, for the list of bad ones; empty for arrays."""


def array_rows(path: Path) -> Iterator[CodeRows]:
    """The rows of a two-dimensional array in a `.npy` file, or of the only one in a `.npz`. Raises InputError for an
    array of another form, saying which."""
    array = _array(path)
    if array.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds an array of {array.dtype}, expected integers; write it as such: array.astype('int64')."
        )
    shape = array.shape
    while array.ndim > 2 and array.shape[0] == 1:  # a picture by itself, as LlamaGen writes
        array = array[0]
    if array.ndim != 2:
        raise InputError(
            f"{path} holds an array of shape {shape}, expected one row of codes for each picture; write "
            "array.reshape(number of pictures, codes of a picture)."
        )
    rows_at_once = max(1, _CODES_AT_ONCE // max(1, array.shape[1]))
    for start in range(0, len(array), rows_at_once):
        rows = np.asarray(array[start : start + rows_at_once])
        codes = np.minimum(rows, np.uint64(_LARGEST)) if rows.dtype == np.uint64 else rows
        yield CodeRows(None, codes.reshape(-1).astype(np.int64), np.full(len(rows), rows.shape[1], np.int64), {}, [])


def _array(path: Path) -> Shaped[np.ndarray, "..."]:
    if zipfile.is_zipfile(path):
        arrays = read_npz(path, "write it again")
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        has = ", ".join(arrays) or "none"
        raise InputError(f"{path} holds several arrays or none ({has}); write the one of codes by itself: numpy.save.")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (Exception, MemoryError) as error:
        raise InputError(f"{path} is not a whole array of NumPy: {first_line(error)}; write it again.") from error


def json_rows(lines: Iterable[bytes], path: Path) -> Iterator[CodeRows]:
    """The rows of JSON lines: objects with one list of integers, or such lists themselves."""
    names: tuple[str | None, str] | None = None
    waiting: list[tuple[str | None, list[int] | str, bytes]] = []
    num_waiting = 0
    for line in lines:
        tag, codes, fault = None, [], None
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                names = names or _names(row, path)
                tag, row = _text(row.get(names[0])) if names[0] else None, row.get(names[1])
            if _are_codes(row):
                codes = row
            else:
                fault = f"{names[1] if names else 'the line'} is no list of integers"
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            fault = f"not JSON: {first_line(error)}"
        waiting.append((tag, fault or codes, line.rstrip(b"\r\n")))
        num_waiting += max(len(codes), 1)
        if num_waiting >= _CODES_AT_ONCE:
            yield _joined(waiting)
            waiting, num_waiting = [], 0
    if waiting:
        yield _joined(waiting)


def _names(row: dict[str, Any], path: Path) -> tuple[str | None, str]:
    """The fields of the tag, if there is one, and of the codes."""
    lists = [name for name, value in row.items() if value and _are_codes(value)]
    usual = [name for name in CODE_FIELDS if name in lists]
    if len(lists) != 1 and not usual:
        which = f"several lists of integers ({', '.join(lists)})" if lists else "no list of integers"
        has = ", ".join(f"{name} ({_kind(value)})" for name, value in row.items()) or "its fields"
        raise InputError(
            f"{path}: its first row has {which} among {has}; write the codes of a picture as one list of integers, "
            f"called {CODE_FIELDS[0]}."
        )
    return next((name for name in TAG_FIELDS if _text(row.get(name))), None), (usual or lists)[0]


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return {str: "text", bool: "a truth value", dict: "an object"}.get(type(value), "no list")
    kinds = {type(part).__name__ for part in value}
    return f"a list of {' and '.join(sorted(kinds))}" if kinds else "an empty list"


def _text(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return "_".join(str(value).split()) or None


def _are_codes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(code) is int for code in value)


def _joined(rows: list[tuple[str | None, list[int] | str, bytes]]) -> CodeRows:
    faults = {i: codes for i, (_, codes, _) in enumerate(rows) if isinstance(codes, str)}
    lists = [[] if isinstance(codes, str) else codes for _, codes, _ in rows]
    flat = [min(max(code, -_LARGEST), _LARGEST) for codes in lists for code in codes]
    tags = [tag for tag, _, _ in rows]
    return CodeRows(
        tags=None if None in tags else [tag for tag in tags if tag is not None],
        codes=np.array(flat, np.int64),
        lengths=np.array([len(codes) for codes in lists], np.int64),
        faults=faults,
        shown=[line for _, _, line in rows],
    )

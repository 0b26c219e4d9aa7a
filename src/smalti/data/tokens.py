"""The token table: tokenized pictures with their captions on disk, and random access to them with flat memory.

On disk it is parquet with the columns of the CC3M data set's own schema, `__key__`, `image_tokens`, `text_tokens` and
`text`; further columns are ignored. What the numbers mean (codebook size, grid, hash of the image tokenizer's weights)
stands as JSON in the file's metadata. Parquet is read in row groups, a training loop wants single rows in any order: so
a large table is unpacked once into memory-mapped arrays in a cache folder and reopens at once.
Letters in shapes: n rows asked for, L the length of the longest of them.
"""

import fcntl
import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Integer, Shaped

from smalti.data import arrow_types
from smalti.data.parquet_files import ParquetReader, parquet_writer
from smalti.documents import read_json
from smalti.errors import InputError
from smalti.file_kinds import refuse_pipe, visible
from smalti.files import cause, failed_write, new_file, temporary_files, user_cache, write_json
from smalti.stopping import end_if_stopped

SCHEMA = pa.schema(
    [
        ("__key__", pa.string()),
        ("image_tokens", pa.list_(pa.int64())),
        ("text_tokens", pa.list_(pa.int64())),
        ("text", pa.string()),
    ]
)
PAD = -1  # fills short rows in a batch; no token is negative
ROWS_PER_GROUP = 65_536
KEEP_IN_MEMORY_BYTES = 64 * 2**20

_METADATA_KEY = b"smalti"
_CACHE_VERSION = 1  # part of the fingerprint: raise it when the cache's layout changes
TOKEN_COLUMNS = ("image_tokens", "text_tokens")
_TEXT_COLUMNS = ("__key__", "text")
_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.int64))
_SCAN_VALUES = 4 * 2**20  # how many values are looked at, or copied, at a time


class TokenBatch(NamedTuple):
    """Rows of a token table, short ones filled up with -1 at the end."""

    image_tokens: Int64[np.ndarray, "n L"]
    image_lengths: Int64[np.ndarray, " n"]
    text_tokens: Int64[np.ndarray, "n Lt"]
    text_lengths: Int64[np.ndarray, " n"]


# ---- writing ----


def token_rows(
    keys: Sequence[str] | pa.Array,
    image_tokens: Integer[np.ndarray, "n L"] | Sequence[Any] | pa.Array,
    text_tokens: Integer[np.ndarray, "n Lt"] | Sequence[Any] | pa.Array | None = None,
    texts: Sequence[str] | pa.Array | None = None,
) -> pa.RecordBatch:
    """One batch of rows for `write_token_table`. Tokens are a matrix, or one sequence of integers a row; without
    `text_tokens` or `texts` the rows have empty ones."""
    num_rows = len(keys)
    columns = [
        pa.array(keys, pa.string()),
        _list_array(image_tokens),
        _list_array(np.zeros((num_rows, 0), np.int64) if text_tokens is None else text_tokens),
        pa.repeat("", num_rows) if texts is None else pa.array(texts, pa.string()),
    ]
    for name, column in zip(SCHEMA.names, columns, strict=True):
        if len(column) != num_rows:
            raise ValueError(f"{len(column)} rows of {name} for {num_rows} keys: every column needs one row per key.")
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _list_array(rows: Shaped[np.ndarray, "n L"] | Sequence[Any] | pa.Array) -> pa.Array:
    if isinstance(rows, np.ndarray):
        num_rows, length = rows.shape
        offsets = np.arange(num_rows + 1, dtype=np.int32) * np.int32(length)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.astype(np.int64).reshape(-1)))
    if isinstance(rows, Sequence):
        return pa.array([np.asarray(row, np.int64) for row in rows], pa.list_(pa.int64()))
    return rows.cast(pa.list_(pa.int64()))


def write_token_table(
    path: str | Path, batches: Iterable[pa.RecordBatch], metadata: Mapping[str, Any], *, force: bool = False
) -> int:
    """Writes the batches (see `token_rows`) as one parquet file and returns the number of rows.

    Batches are taken one by one and joined to row groups of 65,536 rows, so memory stays flat. `metadata` must be
    expressible as JSON; it is read after the last batch, so that a generator of batches may add what it has counted.
    The file appears under its name only when complete. Raises InputError if it exists and `force` is not set.
    """
    num_rows = 0
    with new_file(path, force=force) as temporary:
        # Keys are all different: a dictionary of them is work for nothing.
        dictionaries = ["image_tokens.list.element", "text_tokens.list.element", "text"]
        writer = parquet_writer(temporary, SCHEMA, use_dictionary=dictionaries)
        with writer:
            for table in _row_groups(batches):
                writer.write_table(table, row_group_size=max(table.num_rows, 1))
                num_rows += table.num_rows
            writer.add_key_value_metadata({_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True).encode()})
    return num_rows


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        if num_waiting >= ROWS_PER_GROUP:
            yield pa.Table.from_batches(waiting, SCHEMA)
            waiting, num_waiting = [], 0
    if num_waiting:
        yield pa.Table.from_batches(waiting, SCHEMA)


# ---- reading ----


class TokenTable:
    """Rows of one or several parquet files by number, counted through the files in the order of their names.

    A table of up to 64 MB is held in memory. A larger one is unpacked on first opening, row group by row group, into
    memory-mapped arrays of the narrowest integer type under `$XDG_CACHE_HOME/smalti/tables` (default `~/.cache`); it
    is unpacked anew when a file's size or time of change differs.
    """

    def __init__(self, files: list["_File"], metadata: dict[str, Any], columns: dict[str, "_Column"]):
        self.metadata = metadata
        self._files = files
        self._columns = columns
        self._num_rows = sum(file.num_rows for file in files)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        image_length: int | None = None,
        image_vocab_size: int | None = None,
        text_vocab_size: int | None = None,
    ) -> "TokenTable":
        """The table in a parquet file, in all parquet files of a folder, or in those a pattern (`data/train-*`) names.

        If given, every row must have `image_length` image tokens, in [0, image_vocab_size), and its text tokens in
        [0, text_vocab_size). Raises InputError, naming file and row, if one has not; also for a file that is cut
        short or damaged (naming the row group), lacks a column, or has other metadata than the first.
        """
        paths = _table_files(path)
        metadata = _common_metadata(paths)
        table = cls(*(_unpacked_in_memory(paths, metadata) or _load(_cached(paths), metadata, memory_map=True)))
        table._require(image_length, image_vocab_size, text_vocab_size)
        return table

    def __len__(self) -> int:
        return self._num_rows

    @property
    def image_length(self) -> int | None:
        """The number of image tokens, if it is the same in every row."""
        return self._columns["image_tokens"].length

    @property
    def max_image_token(self) -> int:
        """The largest image token in the table, -1 if there is none."""
        return self._columns["image_tokens"].max_value

    @property
    def max_text_length(self) -> int:
        """The number of text tokens of the row that has most."""
        return self._columns["text_tokens"].max_length

    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch:
        """The tokens of these rows, in the order given; the same row may be asked for twice."""
        self._check(rows)
        image, text = (self._columns[name] for name in TOKEN_COLUMNS)
        return TokenBatch(image.padded(rows), image.lengths(rows), text.padded(rows), text.lengths(rows))

    def keys(self, rows: Integer[np.ndarray, " n"]) -> list[str]:
        """`__key__` of these rows: names for people and files, never given to a model."""
        self._check(rows)
        return self._columns["__key__"].strings(rows)

    def texts(self, rows: Integer[np.ndarray, " n"]) -> list[str]:
        """The captions of these rows, "" where there is none."""
        self._check(rows)
        return self._columns["text"].strings(rows)

    def where(self, row: int) -> str:
        """The file of a row and its number there, counted from 0, for messages."""
        for file in self._files:
            if row < file.num_rows:
                return f"{file.path}, row {row}"
            row -= file.num_rows
        raise AssertionError("a row past the last file")

    def _check(self, rows: Integer[np.ndarray, " n"]) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self._num_rows):
            raise ValueError(f"rows {rows.min()} to {rows.max()} of a table that has rows 0 to {self._num_rows - 1}.")

    def _require(self, image_length: int | None, image_vocab_size: int | None, text_vocab_size: int | None) -> None:
        image = self._columns["image_tokens"]
        if image_length is not None and (row := image.first_row_not_of_length(image_length)) is not None:
            raise InputError(
                f"{self.where(row)}: image_tokens has {image.lengths(np.array([row]))[0]} tokens, expected "
                f"{image_length}. Tokenize the picture again, or give the length that fits the table."
            )
        for name, vocab_size in zip(TOKEN_COLUMNS, (image_vocab_size, text_vocab_size), strict=True):
            column = self._columns[name]
            if vocab_size is not None and (row := column.first_row_with_value_from(vocab_size)) is not None:
                raise InputError(
                    f"{self.where(row)}: {name} has the value {column.padded(np.array([row])).max()}, expected "
                    f"0 to {vocab_size - 1}. The table was made with another vocabulary: use the tokenizer it was "
                    "made with, or tokenize again."
                )


# ---- finding and opening the parquet files ----


def _table_files(path: str | Path) -> list[Path]:
    path = Path(path)
    refuse_pipe(path)
    if path.is_file():
        return [path.resolve()]
    if path.is_dir():
        found = visible(sorted(path.glob("*.parquet")), path)
        splits = {match[1] for file in found if (match := re.match(r"(train|val|test)[a-z]*[-_.]", file.name))}
        if len(splits) > 1:
            raise InputError(
                f"{path} holds several splits ({', '.join(sorted(splits))}), which would be mixed: "
                f"name one by a pattern such as '{path}/train-*'."
            )
    else:
        found = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
    if not found:
        raise InputError(
            f"no token table at {path}: expected a parquet file, a folder of them or a pattern (data/train-*)."
        )
    return [file.resolve() for file in found]


def is_token_table(path: str | Path) -> bool:
    """Whether the parquet files at a path, or the first of them, hold image tokens. False if there is none."""
    path = Path(path)
    files = sorted(glob.glob(str(path / "*.parquet") if path.is_dir() else str(path)))
    if not files or not str(files[0]).endswith(".parquet"):
        return False
    try:
        return "image_tokens" in ParquetReader(files[0]).schema.names
    except InputError:
        return False  # who opens it says what is wrong with it


def _open_parquet(path: Path) -> ParquetReader:
    reader = ParquetReader(path)
    check_columns(reader.schema, path, SCHEMA.names)
    return reader


def check_columns(schema: pa.Schema, path: Path | str, needed: Sequence[str]) -> None:
    """Raises InputError listing the columns of a file if one that is needed is missing, or holds no tokens."""
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise InputError(
            f"{path}: no column {' or '.join(missing)}; it has {', '.join(schema.names)}. "
            f"A token table needs {', '.join(needed)}."
        )
    for name in needed:
        kind = schema.field(name).type
        if name in TOKEN_COLUMNS:
            arrow_types.require_codes(kind, path, name, or_empty=name != "image_tokens")
        elif name == "__key__":
            arrow_types.require_key(kind, path, name)
        elif not arrow_types.is_empty(kind):
            arrow_types.require_text(kind, path, name)


def _common_metadata(paths: list[Path]) -> dict[str, Any]:
    """What the writer said of the tokens, which must be the same in all files: codes of two tokenizers do not mix."""
    common: dict[str, Any] | None = None
    for path in paths:
        metadata = read_metadata(_open_parquet(path))
        if common is None:
            common = metadata
        elif metadata != common:
            different = [key for key in sorted({*metadata, *common}) if metadata.get(key) != common.get(key)]
            raise InputError(
                f"{path} does not belong with {paths[0]}: they differ in "
                + "; ".join(f"{key} ({metadata.get(key)!r} and {common.get(key)!r})" for key in different)
                + ". Open them one at a time, or tokenize both alike."
            )
    assert common is not None
    return common


def read_metadata(reader: ParquetReader) -> dict[str, Any]:
    """What the writer of a file said of its tokens; nothing, if another program wrote it."""
    try:
        found = json.loads(reader.metadata(_METADATA_KEY) or b"{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{reader.path}: its metadata is not JSON ({error}); write the table again.") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{reader.path}: its metadata is {type(found).__name__}, not a mapping; write the table again."
        )
    return found


# ---- unpacking ----


@dataclass(frozen=True, kw_only=True)
class _File:
    path: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class _ColumnLayout:
    """What is needed to read an unpacked column again. `length` is that of all rows, None if it varies."""

    dtype: str
    num_values: int
    max_value: int
    length: int | None


class _ColumnWriter:
    """One column of sequences, as a file of all values and a file of where each row starts. Text is a sequence of
    bytes. Values are kept in the narrowest type; one that does not fit widens those written so far."""

    def __init__(self, folder: Path, name: str, open_files: ExitStack):
        self._values_path = folder / f"{name}.values"
        self._offsets_path = folder / f"{name}.offsets"
        self._values_file = self._values_path.open("wb")
        self._offsets_file = self._offsets_path.open("wb")
        open_files.callback(self.close)
        np.zeros(1, np.int64).tofile(self._offsets_file)
        self._dtype = _DTYPES[0]
        self._num_values = 0
        self._max_value = -1
        self._lengths_seen: set[int] = set()  # at most two: one length is worth knowing, others are just "several"

    def append(self, lengths: Int64[np.ndarray, " n"], values: Shaped[np.ndarray, " m"]) -> None:
        if len(values):
            self._max_value = max(self._max_value, int(values.max()))
            if self._max_value > np.iinfo(self._dtype).max:
                self._widen(next(dtype for dtype in _DTYPES if self._max_value <= np.iinfo(dtype).max))
        values.astype(self._dtype).tofile(self._values_file)
        (self._num_values + np.cumsum(lengths)).tofile(self._offsets_file)
        self._num_values += len(values)
        if len(self._lengths_seen) < 2 and len(lengths):
            self._lengths_seen |= {int(lengths.min()), int(lengths.max())}

    def _widen(self, dtype: np.dtype) -> None:
        self._values_file.close()
        narrow = self._values_path.rename(self._values_path.with_suffix(".narrow"))
        self._values_file = self._values_path.open("wb")
        with narrow.open("rb") as file:
            while len(values := np.fromfile(file, self._dtype, _SCAN_VALUES)):
                values.astype(dtype).tofile(self._values_file)
        narrow.unlink()
        self._dtype = dtype

    def close(self) -> None:
        self._values_file.close()
        self._offsets_file.close()

    @property
    def num_bytes(self) -> int:
        return self._num_values * self._dtype.itemsize

    def finish(self) -> _ColumnLayout:
        self.close()
        length = next(iter(self._lengths_seen)) if len(self._lengths_seen) == 1 else None
        if length is not None:
            self._offsets_path.unlink()
        return _ColumnLayout(
            dtype=self._dtype.name, num_values=self._num_values, max_value=self._max_value, length=length
        )


class _TooLarge(Exception):
    """The unpacked table is larger than was allowed."""


def _unpacked_in_memory(
    paths: list[Path], metadata: dict[str, Any]
) -> tuple[list[_File], dict[str, Any], dict[str, "_Column"]] | None:
    """The parts of a table of up to KEEP_IN_MEMORY_BYTES; None for a larger one. What sizes a footer states is not
    asked: a damaged one lies, and reading the columns' part of it, where it is damaged, can end the process."""
    if sum(path.stat().st_size for path in paths) > KEEP_IN_MEMORY_BYTES:
        return None
    with (
        temporary_files(f"opening the table {paths[0]}"),
        tempfile.TemporaryDirectory(prefix="smalti-table-") as folder,
    ):
        try:
            _unpack(paths, Path(folder), most_bytes=KEEP_IN_MEMORY_BYTES)
        except _TooLarge:
            return None
        return _load(Path(folder), metadata, memory_map=False)


def _unpack(paths: list[Path], folder: Path, *, most_bytes: int | None = None) -> None:
    with ExitStack() as open_files:
        writers = {name: _ColumnWriter(folder, name, open_files) for name in SCHEMA.names}
        files = [_File(path=str(path), num_rows=_unpack_file(path, writers, most_bytes)) for path in paths]
        columns = {name: asdict(writer.finish()) for name, writer in writers.items()}
    table = {"files": [asdict(file) for file in files], "columns": columns}
    write_json(folder / "table.json", table)


def _unpack_file(path: Path, writers: dict[str, _ColumnWriter], most_bytes: int | None) -> int:
    num_rows = 0
    for batch in _column_batches(path):
        for name in TOKEN_COLUMNS:
            writers[name].append(*token_values(batch.column(name), path, num_rows, name))
        for name in _TEXT_COLUMNS:
            writers[name].append(*_bytes_of(batch.column(name)))
        num_rows += batch.num_rows
        if most_bytes is not None and sum(writer.num_bytes for writer in writers.values()) > most_bytes:
            raise _TooLarge
    return num_rows


def _column_batches(path: Path) -> Iterator[pa.RecordBatch]:
    yield from _open_parquet(path).batches(SCHEMA.names, rows_at_once=ROWS_PER_GROUP)


def token_values(
    column: pa.Array, path: Path | str, first_row: int, name: str
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]:
    """Lengths and values of lists of integers. A caption without tokens may be null, a picture may not: InputError."""
    lengths, values, is_missing = arrow_types.codes(column)
    if name == "image_tokens" and is_missing.any():
        row = first_row + int(np.flatnonzero(is_missing)[0])
        raise InputError(f"{path}, row {row}: image_tokens is null, expected a list of integers.")
    if values.min(initial=0) < 0:
        index = int(np.flatnonzero(values < 0)[0])
        row = int(np.searchsorted(np.cumsum(lengths), index, side="right"))
        value = column[row].as_py()[index - int(lengths[:row].sum())]
        shown = "null" if value is None else value
        raise InputError(
            f"{path}, row {first_row + row}: {name} has the value {shown}, expected integers from 0 up, below 2^63."
        )
    return lengths, values


def _bytes_of(column: pa.Array) -> tuple[Int64[np.ndarray, " n"], Shaped[np.ndarray, " m"]]:
    column = arrow_types.as_text(column).fill_null("")
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    if not len(column) or data is None:
        return np.zeros(len(column), np.int64), np.zeros(0, np.uint8)
    return np.diff(offsets), np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]


# ---- the cache ----


def _cached(paths: list[Path]) -> Path:
    """The folder with these files unpacked, made if need be. The name is a hash of the paths and one of the files'
    sizes and times, so that an outdated copy is known by its first half and removed."""
    of_paths = _hash([str(path) for path in paths])
    of_state = _hash([_CACHE_VERSION, *((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)])
    root = user_cache("tables")
    folder = root / f"{of_paths}-{of_state}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Of several processes that open the table at once, one unpacks it and the others wait.
        with _locked(root / f"{of_paths}.lock"):
            if not _is_complete(folder):
                for outdated in root.glob(f"{of_paths}-*"):
                    shutil.rmtree(outdated)
                unfinished = root / f"{of_paths}-unfinished"
                try:
                    unfinished.mkdir()
                    _unpack(paths, unfinished)
                    end_if_stopped()
                    unfinished.rename(folder)
                except OSError:
                    shutil.rmtree(unfinished, ignore_errors=True)  # a disk that is full stays so otherwise
                    raise
    except OSError as error:
        raise InputError(
            f"the table {paths[0]} cannot be unpacked in {root}: {failed_write(error) or cause(error)}. "
            "Set XDG_CACHE_HOME to a folder with room, about the size of the tokens at 2 bytes each."
        ) from error
    return folder


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_complete(folder: Path) -> bool:
    """Whether all is there: programs that clean caches may have removed files."""
    try:
        columns = _read_layout(folder)[1]
        return all(
            (folder / f"{name}.values").stat().st_size == column.num_values * np.dtype(column.dtype).itemsize
            and (column.length is not None or (folder / f"{name}.offsets").exists())
            for name, column in columns.items()
        )
    except (OSError, InputError, LookupError, TypeError, AttributeError):  # a damaged copy is made anew
        return False


def _read_layout(folder: Path) -> tuple[list[_File], dict[str, _ColumnLayout]]:
    table = read_json(folder / "table.json", f"remove the folder {folder}")
    files = [_File(**file) for file in table["files"]]
    return files, {name: _ColumnLayout(**column) for name, column in table["columns"].items()}


def _load(
    folder: Path, metadata: dict[str, Any], *, memory_map: bool
) -> tuple[list[_File], dict[str, Any], dict[str, "_Column"]]:
    files, layouts = _read_layout(folder)
    num_rows = sum(file.num_rows for file in files)

    def array(path: Path, dtype: str, size: int) -> Shaped[np.ndarray, " m"]:
        if not memory_map or size == 0:  # nothing cannot be mapped
            return np.fromfile(path, dtype)
        return np.memmap(path, dtype, mode="r", shape=(size,)).view(np.ndarray)

    columns = {}
    for name, layout in layouts.items():
        values = array(folder / f"{name}.values", layout.dtype, layout.num_values)
        offsets = array(folder / f"{name}.offsets", "int64", num_rows + 1) if layout.length is None else None
        columns[name] = _Column(values, offsets, layout, num_rows)
    return files, metadata, columns


class _Column:
    """A column of sequences: row i is `values[offsets[i]:offsets[i + 1]]`, or row i of a matrix if all rows have the
    same length."""

    def __init__(
        self,
        values: Shaped[np.ndarray, " m"],
        offsets: Int64[np.ndarray, " offsets"] | None,
        layout: _ColumnLayout,
        num_rows: int,
    ):
        self.length = layout.length
        self.max_value = layout.max_value
        self._values = values
        self._offsets = offsets
        self._num_rows = num_rows

    def _starts(self, rows: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        if self._offsets is not None:
            return self._offsets[rows]
        return rows.astype(np.int64) * (self.length or 0)

    @property
    def max_length(self) -> int:
        if self._offsets is None:
            return self.length or 0
        starts = range(0, self._num_rows, _SCAN_VALUES)
        return max(int(np.diff(self._offsets[start : start + _SCAN_VALUES + 1]).max(initial=0)) for start in starts)

    def lengths(self, rows: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        if self._offsets is None:
            return np.full(len(rows), self.length or 0, np.int64)
        rows = rows.astype(np.int64)  # an unsigned type could overflow at + 1
        return self._offsets[rows + 1] - self._offsets[rows]

    def padded(self, rows: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, "n L"]:
        if self.length is not None:
            return self._values.reshape(self._num_rows, self.length)[rows].astype(np.int64)
        lengths = self.lengths(rows)
        places = np.arange(lengths.max(initial=0))
        inside = places < lengths[:, None]
        padded = np.full(inside.shape, PAD, np.int64)
        padded[inside] = self._values[(self._starts(rows)[:, None] + places)[inside]]
        return padded

    def strings(self, rows: Integer[np.ndarray, " n"]) -> list[str]:
        starts = self._starts(rows)
        ends = starts + self.lengths(rows)
        return [
            self._values[start:end].tobytes().decode(errors="replace")
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]

    def first_row_not_of_length(self, length: int) -> int | None:
        if self._num_rows == 0 or self.length == length:
            return None
        if self._offsets is None:
            return 0
        for start in range(0, self._num_rows, _SCAN_VALUES):
            wrong = np.flatnonzero(np.diff(self._offsets[start : start + _SCAN_VALUES + 1]) != length)
            if len(wrong):
                return start + int(wrong[0])
        return None

    def first_row_with_value_from(self, limit: int) -> int | None:
        if self.max_value < limit:
            return None
        for start in range(0, len(self._values), _SCAN_VALUES):
            wrong = np.flatnonzero(self._values[start : start + _SCAN_VALUES] >= limit)
            if len(wrong):
                index = start + int(wrong[0])
                if self._offsets is None:
                    return index // (self.length or 1)
                return int(np.searchsorted(self._offsets, index, side="right")) - 1
        raise AssertionError("the largest value is not in the column")

"""Pictures with captions, wherever they lie: parquet tables, folders, webdataset shards (tar files).

Every source gives the same records in the same order each time and can start at any of them, so that a long job can be
done in parts. Nothing is decoded here, and nothing raised for a single broken record: what is missing is None.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from smalti.data.pairs import PairTable, Record
from smalti.data.tar_shards import PICTURE_SUFFIXES, TarShard, caption_of_text
from smalti.data.text_tables import (
    FILE_NAMES,
    NO_HEADER,
    Row,
    TextTable,
    caption_column,
    is_coco,
    open_text_table,
)
from smalti.data.text_tables import SUFFIXES as TABLE_SUFFIXES
from smalti.errors import InputError, shortened
from smalti.file_kinds import PARQUET, TAR, is_hidden, kind_of, refuse_pipe, visible


class PairSource(Protocol):
    """Pictures with captions in a fixed order."""

    def __len__(self) -> int: ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """All records from number `start` on."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and, for tables and shards, times of change."""
        ...


def open_pairs(
    path: Path | str, *, image_column: str = "image", caption_column: str | None = None, delimiter: str | None = None
) -> PairSource:
    """The source at a path: a parquet table, a tar shard, a folder of either or of pictures, or a pattern of files.

    `delimiter` separates the fields of a folder's CSV or TSV file. Warns of files passed over. Raises InputError if
    there is no source, or it holds several kinds.
    """
    path = Path(path)
    if path.is_dir():
        tables, shards = (visible(sorted(path.glob(f"*{suffix}")), path) for suffix in (".parquet", ".tar"))
        if tables and shards:
            raise InputError(
                f"{path} holds parquet tables and tar shards; name one kind by a pattern ('{path}/*.tar')."
            )
        files = tables or shards
        if not files:
            return PictureFolder(path, caption_column=caption_column, delimiter=delimiter)
    else:
        refuse_pipe(path)
        files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path)))
    for file in files:
        refuse_pipe(file)
    if files and all(file.suffix == ".tar" for file in files):
        return TarShards(files)
    if files and all(file.suffix == ".parquet" for file in files):
        return ParquetTables(files, image_column, caption_column)
    raise InputError(f"no pictures with captions at {path}: expected {_EXPECTED}.{_what_is(files)}")


_EXPECTED = "a parquet table, a tar shard, a folder of those or of pictures, or a pattern such as 'shards/*.tar'"


def _what_is(files: list[Path]) -> str:
    """What the first of files is that are no source."""
    file = next((file for file in files if file.is_file() and file.suffix not in (".tar", ".parquet")), None)
    kind = None if file is None else kind_of(file)
    if kind is None:
        return ""
    if kind in (TAR, PARQUET):
        return f" {file} is {kind.what}: give it a name that ends in .{kind.name}."
    return f" {file} is {kind.what}{f': {kind.advice}' if kind.advice else ''}."


class ParquetTables:
    """The rows of parquet tables, one table after the other."""

    def __init__(self, files: list[Path], image_column: str, caption_column: str | None):
        self._files = files
        self._image_column, self._caption_column = image_column, caption_column
        self._counts = [len(self._open(file)) for file in files]

    def _open(self, file: Path) -> PairTable:
        return PairTable(file, image_column=self._image_column, caption_column=self._caption_column)

    def __len__(self) -> int:
        return sum(self._counts)

    def records(self, start: int = 0) -> Iterator[Record]:
        for file, count in zip(self._files, self._counts, strict=True):
            if start < count:
                yield from self._open(file).records(start)
            start = max(start - count, 0)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._files)


class TarShards:
    """Samples of webdataset shards, one shard after the other (see `tar_shards.py`)."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._shards = [TarShard.scan(file) for file in files]
        if not len(self):
            raise InputError(f"{' and '.join(map(str, files[:2]))}: no member is part of a picture with a caption.")

    def __len__(self) -> int:
        return sum(shard.num_records for shard in self._shards)

    def records(self, start: int = 0) -> Iterator[Record]:
        for shard in self._shards:
            if start < shard.num_records:
                yield from shard.records(start)
            start = max(start - shard.num_records, 0)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._files)


class _Entry(NamedTuple):
    """A picture of a folder by its path in there, and its caption if a table gives it."""

    where: str
    name: str | None
    caption: str | None
    fault: str | None = None


class PictureFolder:
    """Pictures of a folder with captions from its one table (JSON lines, CSV, TSV or COCO's JSON, with a column naming
    the picture; or `metadata` of these in a subfolder, as Hugging Face's image folders have), or from the `.txt` file
    beside each picture, subfolders included. A row with a list of captions is as many records."""

    def __init__(self, folder: Path, *, caption_column: str | None = None, delimiter: str | None = None):
        self._folder = folder
        self._tables = _tables(folder)
        if self._tables:
            self._entries = _table_entries(self._tables[0], folder, caption_column, delimiter)
        else:
            found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
            names = [str(file.relative_to(folder)) for file in visible(found, folder)]
            self._entries = [_Entry(str(folder / name), name, None) for name in sorted(names)]
        if not self._entries:
            raise InputError(
                f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}), parquet tables or tar shards."
            )

    def __len__(self) -> int:
        return len(self._entries)

    def records(self, start: int = 0) -> Iterator[Record]:
        for entry in self._entries[start:]:
            if entry.name is None:
                yield Record(entry.where, None, None, None, entry.fault)
                continue
            file, key = self._folder / entry.name, str(Path(entry.name).with_suffix(""))
            caption, fault = (entry.caption, entry.fault) if self._tables else _caption_beside(file)
            encoded = file.read_bytes() if os.path.isfile(file) else None
            if encoded is None:
                fault = _absent(file, entry.where)
            yield Record(str(file), key, caption, encoded, fault)

    @property
    def fingerprint(self) -> str:
        pictures = hashlib.sha256()
        for entry in self._entries:
            file = self._folder / (entry.name or "")
            size = file.stat().st_size if os.path.isfile(file) else None
            pictures.update(json.dumps([entry.name, entry.caption, size]).encode())
        return pictures.hexdigest()[:16] + _fingerprint(self._tables)


def _caption_beside(file: Path) -> tuple[str | None, str | None]:
    """The caption in the text file beside a picture, or why there is none."""
    beside = file.with_suffix(".txt")
    if not os.path.isfile(beside):
        return None, f"there is no caption: expected {beside.name} beside it, or a table that names the picture"
    return caption_of_text(beside.read_bytes(), beside.name)


def _absent(file: Path, where: str) -> str:
    endings = [suffix for suffix in PICTURE_SUFFIXES if os.path.isfile(f"{file}{suffix}")]
    if endings:
        name = f"{file.name}{endings[0]}"
        return f"there is no file {file.name}, which {where} names, but {name}: write the ending there too"
    return f"there is no picture {shortened(file.name)}, which {where} names"


def _tables(folder: Path) -> list[Path]:
    """The one table of captions in a folder, or below it if called `metadata`. Raises InputError for several."""
    here = sorted(file for file in folder.iterdir() if file.suffix.lower() in TABLE_SUFFIXES)
    tables = [file for file in visible(here, folder) if file.suffix.lower() != ".json" or _is_caption_table(file)]
    if not tables:
        below = sorted(file for suffix in TABLE_SUFFIXES for file in folder.rglob(f"metadata{suffix}"))
        tables = [file for file in below if not is_hidden(file.relative_to(folder))]
    if len(tables) > 1:
        names = ", ".join(str(table.relative_to(folder)) for table in tables)
        raise InputError(
            f"{folder} has several tables of captions ({names}); keep the one to use, or give the folder of one."
        )
    return tables


def _is_caption_table(file: Path) -> bool:
    """Whether a JSON file is a table: COCO's captions or a list of objects, not what is noted beside one picture."""
    if any(file.with_suffix(suffix).is_file() for suffix in PICTURE_SUFFIXES):
        return False
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return True  # who opens it says what is wrong with it
    return is_coco(content) or (isinstance(content, list) and all(isinstance(row, dict) for row in content))


def _table_entries(path: Path, folder: Path, wanted: str | None, delimiter: str | None) -> list[_Entry]:
    """The pictures and captions that a table names, all rows in their order."""
    table = open_text_table(path, wanted=wanted, delimiter=delimiter)
    file_column = _file_column(table)
    name = caption_column(table, wanted, besides=file_column)
    return [entry for row in table.rows() for entry in _row_entries(row, file_column, name, path.parent, folder)]


def _row_entries(row: Row, file_column: str, name: str, base: Path, folder: Path) -> Iterator[_Entry]:
    picture, captions = row.values.get(file_column), row.values.get(name)
    if not isinstance(picture, str | int) or not Path(str(picture)).name:
        yield _Entry(row.where, None, None, f"it names no picture: {file_column!r} is {shortened(repr(picture))}")
        return
    picture = str(picture)
    if "\\" in picture and not os.path.exists(base / picture):  # as paths are written on Windows
        picture = picture.replace("\\", "/")
    found = str(base.relative_to(folder) / picture)
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        if isinstance(caption, str):
            yield _Entry(row.where, found, caption)
        else:
            yield _Entry(
                row.where, found, None, f"{row.where}: {name!r} is {shortened(repr(caption))}, expected a caption"
            )


def _file_column(table: TextTable) -> str:
    found = next((name for wanted in FILE_NAMES for name in table.columns if name.lower() == wanted), None)
    if found is None:
        has = ", ".join(table.columns) or "none"
        mend = f"call one {FILE_NAMES[0]}" if table.has_header else "add a header line with file_name and caption"
        more = f" {NO_HEADER}" if table.has_header is False else ""
        raise InputError(f"{table.path}: no column names the pictures; it has {has}: {mend}.{more}")
    return found


def _fingerprint(files: list[Path]) -> str:
    states = [(file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]

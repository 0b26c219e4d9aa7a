"""Pictures with captions, wherever they lie: parquet tables, folders, webdataset shards (tar files).

Every source gives the same records in the same order each time and can start at any of them, so that a long job can be
done in parts. Nothing is decoded here, and nothing raised for a single broken record: what is missing is None.
"""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from smalti.data.captions import find_column, read_csv_column, read_json_rows
from smalti.data.pairs import PairTable, Record
from smalti.errors import InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
"""What the column of a caption table that names the pictures is called."""
CAPTION_FIELDS = ("caption", "text", "prompt")
"""Where a shard's `.json` may hold the caption."""


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


def open_pairs(path: Path | str, *, image_column: str = "image", caption_column: str | None = None) -> PairSource:
    """The source at a path: a parquet table, a tar shard, a folder of either or of pictures, or a pattern of files.

    Raises InputError if there is none, or it holds several kinds.
    """
    path = Path(path)
    if path.is_dir():
        tables, shards = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
        if tables and shards:
            raise InputError(
                f"{path} holds parquet tables and tar shards; name one kind by a pattern ('{path}/*.tar')."
            )
        files = tables or shards
        if not files:
            return PictureFolder(path, caption_column=caption_column)
    else:
        files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path)))
    if files and all(file.suffix == ".tar" for file in files):
        return TarShards(files)
    if files and all(file.suffix == ".parquet" for file in files):
        return ParquetTables(files, image_column, caption_column or "caption")
    raise InputError(
        f"no pictures with captions at {path}: expected a parquet table, a tar shard, a folder of those or of "
        "pictures, or a pattern such as 'shards/*.tar'."
    )


class ParquetTables:
    """The rows of parquet tables, one table after the other."""

    def __init__(self, files: list[Path], image_column: str, caption_column: str):
        self._files = files
        self._columns = {"image_column": image_column, "caption_column": caption_column}
        self._counts = [len(self._open(file)) for file in files]

    def _open(self, file: Path) -> PairTable:
        return PairTable(file, **self._columns)

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
    """Samples of webdataset shards: neighbouring members with one name up to its first dot, of which one is a picture,
    and `.txt` or the field `caption` of `.json` the caption. The shards are scanned once, headers only."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._counts = [sum(1 for _ in self._samples(file)) for file in files]

    def __len__(self) -> int:
        return sum(self._counts)

    def records(self, start: int = 0) -> Iterator[Record]:
        for file, count in zip(self._files, self._counts, strict=True):
            if start < count:
                for number, (archive, key, members) in enumerate(self._samples(file)):
                    if number >= start:
                        yield _tar_record(file, archive, key, members)
            start = max(start - count, 0)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._files)

    def _samples(self, file: Path) -> Iterator[tuple[tarfile.TarFile, str, dict[str, tarfile.TarInfo]]]:
        try:
            with tarfile.open(file, "r:") as archive:
                key, members = None, {}
                for member in archive:
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it would keep them all)
                    if not member.isfile():
                        continue
                    found, suffix = _split_name(member.name)
                    if found != key and key is not None:
                        yield archive, key, members
                        members = {}
                    key = found
                    members[suffix] = member
                if key is not None:
                    yield archive, key, members
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{file} is not a whole tar file ({error}); fetch or make the shard again.") from error


def _split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.png` → `a/b` and `.seg.png`, as webdataset does."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (dot + suffix).lower()


def _tar_record(file: Path, archive: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> Record:
    def read(suffix: str) -> bytes | None:
        held = archive.extractfile(members[suffix]) if suffix in members else None
        return None if held is None else held.read()

    picture = next((suffix for suffix in members if suffix in PICTURE_SUFFIXES), None)
    text, fields = read(".txt"), read(".json")
    caption = None
    if text is not None:
        caption = _decoded(text)
    elif fields is not None:
        caption = _caption_field(fields)
    return Record(f"{file}: {key}", key, caption, read(picture) if picture else None)


def _caption_field(content: bytes) -> str | None:
    try:
        fields = json.loads(content)
    except ValueError:
        return None
    found = [fields[name] for name in CAPTION_FIELDS if name in fields] if isinstance(fields, dict) else []
    return found[0] if found and isinstance(found[0], str) else None


class PictureFolder:
    """Pictures of a folder with captions from its one table (JSON lines, CSV or TSV, with a column naming the
    picture), or from the `.txt` file beside each picture, subfolders included."""

    def __init__(self, folder: Path, *, caption_column: str | None = None):
        self._folder = folder
        tables = sorted(file for file in folder.iterdir() if file.suffix.lower() in TABLE_SUFFIXES)
        if len(tables) > 1:
            names = ", ".join(table.name for table in tables)
            raise InputError(f"{folder} has several tables of captions ({names}); keep the one to use.")
        self._tables = tables
        if tables:
            self._entries = list(_table_entries(tables[0], caption_column))
        else:
            found = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
            self._entries = [(name, None) for name in sorted(str(file.relative_to(folder)) for file in found)]
        if not self._entries:
            raise InputError(
                f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}), parquet tables or tar shards."
            )

    def __len__(self) -> int:
        return len(self._entries)

    def records(self, start: int = 0) -> Iterator[Record]:
        for name, caption in self._entries[start:]:
            file = self._folder / name
            if not self._tables:
                beside = _read(file.with_suffix(".txt"))
                caption = None if beside is None else _decoded(beside)
            yield Record(str(file), str(Path(name).with_suffix("")), caption, _read(file))

    @property
    def fingerprint(self) -> str:
        pictures = hashlib.sha256()
        for name, caption in self._entries:
            file = self._folder / name
            pictures.update(json.dumps([name, caption, file.stat().st_size if file.is_file() else None]).encode())
        return pictures.hexdigest()[:16] + _fingerprint(self._tables)


def _table_entries(table: Path, caption_column: str | None) -> Iterator[tuple[str, str | None]]:
    """The picture's file and caption of every row."""
    if table.suffix.lower() == ".jsonl":
        for number, row in read_json_rows(table):
            file_column = _file_column(list(row), f"{table}, line {number}")
            rest = [name for name in row if name != file_column]
            name = find_column(rest, caption_column, f"{table}, line {number}")
            yield str(row[file_column]), row[name] if isinstance(row[name], str) else None
        return
    with table.open(encoding="utf-8-sig") as file:
        header = file.readline().strip().split("\t" if table.suffix.lower() == ".tsv" else ",")
    columns = [name.strip('"') for name in header]
    file_column = _file_column(columns, table)
    name = find_column([name for name in columns if name != file_column], caption_column, table)
    for row, caption in read_csv_column(table, name):
        yield row[file_column], caption


def _file_column(columns: list[str], where: Path | str) -> str:
    found = next((name for wanted in FILE_COLUMNS for name in columns if name.lower() == wanted), None)
    if found is None:
        raise InputError(
            f"{where}: no column names the pictures; it has {', '.join(columns)}. Call one {FILE_COLUMNS[0]}."
        )
    return found


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None


def _fingerprint(files: list[Path]) -> str:
    states = [(file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]

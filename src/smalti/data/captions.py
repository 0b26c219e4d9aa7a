"""Captions alone, from tables of text: what a text tokenizer is trained on."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from smalti.errors import InputError

CAPTION_NAMES = ("caption", "captions", "text", "prompt")
"""What a column of captions is called; capital letters do not matter."""
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


def read_captions(path: Path | str, column: str | None = None) -> list[str]:
    """The captions in a file: a column of a CSV, TSV, JSON lines or parquet table, or the lines of a text file.

    Without `column` it is the only one, or the one with such a name as `CAPTION_NAMES`. Raises InputError listing the
    columns if it is not among them, and naming the row that has no caption.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: captions are read from {', '.join(SUFFIXES)} files; rename it to what it is.")
    try:
        captions = list(_read(path, column))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give the path of a file of captions.") from error
    except (OSError, pa.ArrowException, csv.Error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read ({reason}); fetch or save it again.") from error
    if not captions:
        raise InputError(f"{path} holds no captions.")
    return captions


def find_column(columns: Sequence[str], wanted: str | None, where: Path | str) -> str:
    """The column of captions among `columns`. Raises InputError listing them."""
    if wanted is not None:
        if wanted not in columns:
            raise InputError(
                f"{where} has no column {wanted!r}; it has {', '.join(columns)}: name one of them by --caption-column."
            )
        return wanted
    found = [name for name in columns if name.lower() in CAPTION_NAMES]
    if len(columns) == 1:
        return columns[0]
    if len(found) != 1:
        problem = "several columns may be" if found else "no column is known to be"
        raise InputError(
            f"{where}: {problem} the captions; it has {', '.join(columns)}: name one of them by --caption-column."
        )
    return found[0]


def _read(path: Path, column: str | None) -> Iterator[str]:
    kind = path.suffix.lower()
    if kind == ".txt":
        if column is not None:
            raise InputError(f"{path} is plain text, a caption on each line; it has no column {column!r}.")
        yield from path.read_text(encoding="utf-8-sig").splitlines()
    elif kind == ".parquet":
        yield from _read_parquet(path, column)
    elif kind == ".jsonl":
        yield from _read_json_lines(path, column)
    else:
        yield from (caption for _, caption in read_csv_column(path, column))


def read_csv_column(path: Path, column: str | None) -> Iterator[tuple[dict[str, str], str]]:
    """Every row of a CSV or TSV file with its caption. A file of one column is often written without quotes round its
    commas: if it has rows of several fields, every line is a caption."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        header = next(rows, [])
        name = find_column(header, column, path)
        if len(header) == 1 and any(len(row) > 1 for row in rows):
            yield from (({name: line}, line) for line in path.read_text(encoding="utf-8-sig").splitlines()[1:])
            return
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter)
        next(rows)
        for row in rows:
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True)), row[header.index(name)]
            elif row:
                raise InputError(
                    f"{path}, line {rows.line_num}: the row has {len(row)} fields, the header {len(header)}; put text "
                    "with commas or line breaks in quotes."
                )


def read_json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file of JSON lines, with the number of their line from 1."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} holds {type(row).__name__}; expected an object.")
            yield number, row


def _read_json_lines(path: Path, column: str | None) -> Iterator[str]:
    name = None
    for number, row in read_json_rows(path):
        name = name or find_column(list(row), column, path)
        if not isinstance(row.get(name), str):
            raise InputError(f"{path}, line {number}: {name!r} is {row.get(name)!r}; expected a caption.")
        yield row[name]


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    text = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
    name = find_column(file.schema_arrow.names if column is not None else text, column, path)
    if name not in text:
        raise InputError(f"{path}: column {name!r} holds {file.schema_arrow.field(name).type}; expected text.")
    row = 0
    for batch in file.iter_batches(columns=[name]):
        for caption in batch[name].to_pylist():
            if caption is None:
                raise InputError(f"{path}: row {row}: column {name!r} is empty; every row needs a caption.")
            yield caption
            row += 1

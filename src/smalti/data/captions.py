"""Captions alone, from tables of text: what a text tokenizer is trained on."""

import os
from collections.abc import Iterator
from pathlib import Path

from smalti.data import arrow_types
from smalti.data.parquet_files import ParquetReader
from smalti.data.text_tables import caption_column, find_column, open_text_table, text_lines
from smalti.errors import InputError, shortened
from smalti.file_kinds import refuse_pipe, why_not

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


def read_captions(path: Path | str, column: str | None = None, *, delimiter: str | None = None) -> list[str]:
    """The captions in a file: a column of a CSV, TSV, JSON or parquet table, or the lines of a text file; all of a row
    that has several.

    Without `column` it is the only one, or the one with such a name as `CAPTION_NAMES`. Raises InputError listing the
    columns if it is not among them, and naming the row that has no caption.
    """
    path = Path(path)
    refuse_pipe(path)
    if path.suffix.lower() not in SUFFIXES:
        kinds = f"captions are read from {', '.join(SUFFIXES)} files"
        raise InputError(f"{path}: {why_not(path, kinds, f'{kinds}; rename it to what it is')}.")
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; give the path of a file of captions.")
    captions = list(_read(path, column, delimiter))
    if not captions:
        raise InputError(f"{path} holds no captions.")
    return captions


def _read(path: Path, column: str | None, delimiter: str | None) -> Iterator[str]:
    if path.suffix.lower() == ".txt":
        if column is not None:
            raise InputError(f"{path} is plain text, a caption on each line; it has no column {column!r}.")
        yield from text_lines(path)
    elif path.suffix.lower() == ".parquet":
        yield from _read_parquet(path, column)
    else:
        table = open_text_table(path, wanted=column, delimiter=delimiter)
        if not table.columns:
            return
        name = caption_column(table, column)
        for row in table.rows():
            value = row.values.get(name)
            found = value if isinstance(value, list) else [value]
            for caption in found:
                if not isinstance(caption, str):
                    raise InputError(f"{row.where}: {name!r} is {shortened(repr(caption))}; expected a caption.")
                yield caption


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    reader = ParquetReader(path)
    text = [
        field.name for field in reader.schema if arrow_types.is_text(field.type) or arrow_types.is_texts(field.type)
    ]
    if column is None and not text:
        kinds = ", ".join(f"{field.name} ({field.type})" for field in reader.schema)
        raise InputError(f"{path} has no column of text; it has {kinds}.")
    name = find_column(reader.schema.names if column is not None else text, column, path)
    arrow_types.require_text(reader.schema.field(name).type, path, name, or_lists=True)
    row = 0
    for batch in reader.batches([name]):
        for captions in arrow_types.captions(batch[name]):
            if None in captions:
                raise InputError(
                    f"{path}: row {row}: column {name!r} is empty or not UTF-8 text; every row needs a caption."
                )
            yield from (caption for caption in captions if caption is not None)
            row += 1

"""Rows of a table of lines as training takes them: some of the rows, and none that the validation also holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from smalti.data.lines import MAX_UNTOLD_VOCAB_SIZE, code_hashes, split_rows
from smalti.data.tokens import PAD, ROWS_PER_GROUP, TokenBatch, TokenTable, token_rows, write_token_table
from smalti.errors import InputError
from smalti.progress import stage


@dataclass(frozen=True)
class TableRows:
    """Some rows of a table, numbered anew from 0. A row's tag stays in the table: it never reaches a model."""

    table: TokenTable
    rows: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch:
        return self.table.batch(self.rows[rows])


def rows_not_in(table: TokenTable, other: TokenTable) -> Int64[np.ndarray, " n"]:
    """The rows of a table whose codes no row of the other has."""
    return np.flatnonzero(~np.isin(_hashes(table), _hashes(other)))


def _hashes(table: TokenTable) -> UInt64[np.ndarray, " n"]:
    found = []
    for start in range(0, len(table), ROWS_PER_GROUP):
        batch = table.batch(np.arange(start, min(start + ROWS_PER_GROUP, len(table))))
        found.append(code_hashes(batch.image_tokens[batch.image_tokens != PAD], batch.image_lengths))
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def write_rows(path: Path, table: TokenTable, rows: Int64[np.ndarray, " n"]) -> None:
    """A table of its own with these rows, without their captions."""
    chunks = (rows[start : start + ROWS_PER_GROUP] for start in range(0, len(rows), ROWS_PER_GROUP))
    batches = (token_rows(table.keys(chunk), table.batch(chunk).image_tokens) for chunk in chunks)
    write_token_table(path, batches, table.metadata)


class LineData(NamedTuple):
    train: TableRows
    validation: TokenTable
    length: int
    vocab_size: int


def read_line_data(
    data: Path,
    validation: Path | None,
    *,
    held_out: float | int,
    split_seed: int,
    vocab_size: int | None,
    held_out_path: Path,
    show_progress: bool = False,
) -> LineData:
    """The rows to train on and the table to validate with. Without a `validation` table rows are held out, a share or
    a number, and written to `held_out_path` if they are not there.

    Raises InputError if there is no table, its lines differ in length, or nothing is left to train on.
    """
    table = TokenTable.open(data, image_vocab_size=vocab_size)
    length, vocab_size = table.image_length, vocab_size or find_vocab_size(table, data)
    if not length:
        raise InputError(
            f"{data} has lines of different lengths, or empty ones; training needs lines of one length. Import them "
            "again with length=N and --skip-bad to set the others aside."
        )
    checks: Any = {"image_length": length, "image_vocab_size": vocab_size}
    with stage("comparing lines", show=show_progress):
        if validation is not None:
            measured = TokenTable.open(validation, **checks)
            rows = rows_not_in(table, measured)
        else:
            rows, chosen = split_rows(table, held_out, split_seed)
            if not held_out_path.exists():
                write_rows(held_out_path, table, chosen)
            measured = TokenTable.open(held_out_path, **checks)
    if not len(rows):
        raise InputError(f"all lines of {data} are in {validation} too: nothing is left to train on.")
    return LineData(TableRows(table, rows), measured, length, vocab_size)


def find_vocab_size(table: TokenTable, path: Path) -> int:
    """As the import wrote it; tables tokenized with an image tokenizer of ours have its codebook's size; else what the
    largest code needs. Raises InputError if a model of so many codes would be a mistake, before one is made."""
    told = table.metadata.get("image_vocab_size") or table.metadata.get("codebook_size")
    if told is None:
        if table.max_image_token >= MAX_UNTOLD_VOCAB_SIZE:
            raise InputError(
                f"{path} holds the code {table.max_image_token}, more than any codebook has; if the vocabulary is that "
                f"large, give its size: vocab_size={table.max_image_token + 1}."
            )
        return table.max_image_token + 1
    if type(told) is not int or told < 1:
        raise InputError(f"{path}: its metadata say {told!r} for the size of the vocabulary; import the lines again.")
    if table.max_image_token >= told:
        TokenTable.open(path, image_vocab_size=told)  # raises, naming the row
    return told

"""Rows of a table of lines as training takes them: some of the rows, and none that the validation also holds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from smalti.data.lines import code_hashes
from smalti.data.tokens import PAD, ROWS_PER_GROUP, TokenBatch, TokenTable, token_rows, write_token_table


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

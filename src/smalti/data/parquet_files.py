"""The one door to parquet files: whatever reads a table reads it here, and what we write is written here.

pyarrow raises many kinds of errors for a damaged file, and none for some damage: a page whose header says too little
ends its column early. So every exception becomes an InputError that names the file (its cause kept), the rows that come
are counted against the footer, and pages are written with checksums, which are verified where a file has them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from smalti.errors import InputError, first_line
from smalti.file_kinds import PARQUET, refuse_pipe, why_not

ROWS_AT_ONCE = 256
"""Bounds the memory of reading pictures, however large a table's row groups are."""


class ParquetReader:
    """An open parquet file. Raises InputError naming the file if it is missing or no whole parquet file, at opening;
    naming the row group as well if that is damaged or has fewer rows than the footer says, at reading.

    `opened` is the file already open, of which `path` is then only the name: a file of the hub.
    """

    def __init__(self, path: Path | str, *, opened: IO[bytes] | None = None) -> None:
        self.path = path
        if opened is None:
            refuse_pipe(path)
        try:
            # Without pre-buffering, pages are read as they are needed: a file of one huge row group stays cheap.
            # Without its checksums verified, a flipped bit in a page can pass as another caption.
            self._file = pq.ParquetFile(
                Path(path) if opened is None else opened, pre_buffer=False, page_checksum_verification=True
            )
            self.footer: pq.FileMetaData = self._file.metadata
            self.schema: pa.Schema = self._file.schema_arrow
            self.group_rows = [self.footer.row_group(i).num_rows for i in range(self.footer.num_row_groups)]
        except FileNotFoundError as error:
            raise InputError(f"there is no file {path}; give the path of a parquet table.") from error
        except PermissionError as error:
            raise InputError(f"{path} may not be read; ask its owner for leave to read it.") from error
        except Exception as error:
            if opened is None and Path(path).is_dir():
                raise InputError(f"{path} is a folder; give the path of a parquet table in it.") from error
            damaged = f"{first_line(error)}; if it was copied or downloaded, it may be cut short: fetch it again"
            reason = damaged if opened is not None else why_not(path, PARQUET.what, damaged)
            raise InputError(f"{path} is not a whole parquet file: {reason}.") from error
        if min(self.group_rows, default=0) < 0 or sum(self.group_rows) != self.footer.num_rows:
            raise InputError(
                f"{path}: its footer says {self.footer.num_rows} rows, its row groups have {sum(self.group_rows)}; "
                "fetch or make the file again."
            )

    def __len__(self) -> int:
        return self.footer.num_rows

    @property
    def num_row_groups(self) -> int:
        return len(self.group_rows)

    def batches(
        self, columns: Sequence[str], groups: Sequence[int] | None = None, *, rows_at_once: int = ROWS_AT_ONCE
    ) -> Iterator[pa.RecordBatch]:
        """The rows of some row groups (of all, by default) in their order, some at a time; columns in the file's
        order."""
        for group in range(self.num_row_groups) if groups is None else groups:
            num_rows = 0
            with self._named_errors(group):
                batches = self._file.iter_batches(rows_at_once, row_groups=[group], columns=list(columns))
            while True:
                with self._named_errors(group):
                    batch = next(batches, None)
                if batch is None:
                    break
                num_rows += batch.num_rows
                if num_rows > self.group_rows[group]:
                    break
                yield batch
            if num_rows != self.group_rows[group] and columns:
                raise self._damaged(group, f"it gives {num_rows} rows, the footer says {self.group_rows[group]}")

    def column(self, name: str) -> pa.ChunkedArray:
        """All of one column."""
        chunks = [batch.column(0) for batch in self.batches([name], rows_at_once=65_536)]
        return pa.chunked_array(chunks, self.schema.field(name).type if not chunks else None)

    def require_columns(self, names: Sequence[str], advice: str) -> None:
        """Raises InputError listing the file's columns, and ending with `advice`, if it lacks one of these or has it
        twice."""
        has = ", ".join(self.schema.names) or "none"
        missing = [name for name in names if name not in self.schema.names]
        if missing:
            raise InputError(f"{self.path} has no column {' or '.join(map(repr, missing))}; it has {has}. {advice}")
        if twice := [name for name in names if self.schema.names.count(name) > 1]:
            raise InputError(f"{self.path} has several columns {twice[0]!r}; it has {has}. Rename all but one.")

    def metadata(self, key: bytes) -> bytes | None:
        """What the writer noted under a key."""
        return (self.footer.metadata or {}).get(key)

    @contextmanager
    def _named_errors(self, group: int) -> Iterator[None]:
        try:
            yield
        except (Exception, MemoryError) as error:  # of a flipped bit, pyarrow may ask for any amount of memory
            raise self._damaged(group, first_line(error)) from error

    def _damaged(self, group: int, reason: str) -> InputError:
        return InputError(
            f"{self.path}: row group {group} (of 0 to {self.num_row_groups - 1}) is damaged: {reason}; fetch or make "
            "the file again."
        )


def parquet_writer(path: Path | str, schema: pa.Schema, **settings: Any) -> pq.ParquetWriter:
    """A writer of zstd-compressed pages with checksums."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True, **settings)

"""Parquet files: what is damaged is named, and no row is lost in silence."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti.data.parquet_files import ParquetReader, parquet_writer
from smalti.errors import InputError

NUM_ROWS = 37


@pytest.fixture
def table() -> pa.Table:
    return pa.table({"text": [f"caption {i}" for i in range(NUM_ROWS)], "codes": [[i, i + 1] for i in range(NUM_ROWS)]})


def test_rows_come_in_order_from_all_row_groups(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    reader = ParquetReader(tmp_path / "t.parquet")
    assert len(reader) == NUM_ROWS and reader.group_rows == [10, 10, 10, 7]
    read = [row for batch in reader.batches(["codes", "text"], rows_at_once=3) for row in batch.to_pylist()]
    assert read == table.to_pylist()
    assert [row for batch in reader.batches(["text"], [2]) for row in batch["text"].to_pylist()] == [
        f"caption {i}" for i in range(20, 30)
    ]
    assert reader.column("text").to_pylist() == table["text"].to_pylist()
    with pytest.raises(InputError, match=r"t.parquet has no column 'tokens'; it has text, codes. Rename one."):
        reader.require_columns(["text", "tokens"], "Rename one.")


def test_a_page_that_ends_early_is_no_end_of_the_table(tmp_path: Path, table: pa.Table) -> None:
    """A flipped bit in a page's header makes pyarrow alone give fewer rows without a word."""
    path = tmp_path / "t.parquet"
    pq.write_table(table.select(["text"]), path, use_dictionary=False, compression="none", write_statistics=False)
    content, num_silent = path.read_bytes(), 0
    for position in range(4, 24):  # the page's header follows the magic bytes
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                num_rows = sum(batch.num_rows for batch in ParquetReader(path).batches(["text"]))
            except InputError as error:
                num_silent += "rows, the footer says 37" in str(error)
            else:
                assert num_rows == NUM_ROWS
    assert num_silent


def test_a_flipped_bit_in_a_page_is_seen(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "t.parquet"
    with parquet_writer(path, table.schema, use_dictionary=False) as writer:
        writer.write_table(table)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    content[start + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t.parquet: row group 0 \(of 0 to 0\) is damaged: .*; fetch or make"):
        list(ParquetReader(path).batches(["text"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is an empty file: fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "it is a web page.*download the file itself"),
        (b"PAR1" + bytes(40), "it may be cut short: fetch it again"),
        (b"\x1f\x8b" + bytes(40), "it is a gzip-compressed file: unpack it"),
    ],
    ids=["empty", "pointer", "page", "cut", "gzip"],
)
def test_what_is_no_parquet_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(InputError, match=f"t.parquet is not a whole parquet file: .*{message}") as caught:
        ParquetReader(tmp_path / "t.parquet")
    assert caught.value.__cause__ is not None
    with pytest.raises(InputError, match=r"there is no file .*absent"):
        ParquetReader(tmp_path / "absent.parquet")
    with pytest.raises(InputError, match="is a folder"):
        ParquetReader(tmp_path)

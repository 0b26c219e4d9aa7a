"""Token tables: what is written is what is read, in any order, from memory or from the cache; damage is named."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.data import tokens
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.errors import InputError

ROWS = [
    ("a.png", [3, 1, 1024], [5], "ein Wort"),
    ("b.png", [0, 0, 0], [], ""),
    ("ü.png", [7, 70_000, 7], [1, 2, 3], "drei kleine Wörter"),
]


def batch_of(rows: list[tuple[str, list[int], list[int], str]]) -> pa.RecordBatch:
    keys, image_tokens, text_tokens, texts = map(list, zip(*rows, strict=True))
    return token_rows(keys, image_tokens, text_tokens, texts)


def write(path: Path, rows: list[tuple[str, list[int], list[int], str]], **metadata: object) -> Path:
    write_token_table(path, [batch_of(rows)], metadata)
    return path


@pytest.fixture
def memory_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every table counts as large; the folder its cache lies in."""
    monkeypatch.setattr(tokens, "KEEP_IN_MEMORY_BYTES", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "smalti" / "tables"


def check_rows(table: TokenTable, rows: list[tuple[str, list[int], list[int], str]], order: list[int]) -> None:
    """The obvious loop over Python lists as the oracle."""
    numbers = np.array(order, np.int64)
    batch = table.batch(numbers)
    assert batch.image_tokens.dtype == batch.text_tokens.dtype == np.int64
    for place, row in enumerate(order):
        _, image, text, _ = rows[row]
        assert batch.image_lengths[place] == len(image) and batch.text_lengths[place] == len(text)
        assert batch.image_tokens[place].tolist() == image + [-1] * (batch.image_tokens.shape[1] - len(image))
        assert batch.text_tokens[place].tolist() == text + [-1] * (batch.text_tokens.shape[1] - len(text))
    assert table.keys(numbers) == [rows[row][0] for row in order]
    assert table.texts(numbers) == [rows[row][3] for row in order]


def test_a_small_table_is_read_back(tmp_path: Path) -> None:
    table = TokenTable.open(write(tmp_path / "t.parquet", ROWS, codebook_size=1025, grid=[1, 3]))
    assert len(table) == 3 and table.image_length == 3
    assert table.max_image_token == 70_000
    assert table.metadata == {"codebook_size": 1025, "grid": [1, 3]}
    check_rows(table, ROWS, [2, 0, 2, 1])
    assert table.batch(np.array([0, 1, 2], np.uint32)).text_tokens.tolist() == [[5, -1, -1], [-1] * 3, [1, 2, 3]]


def test_a_memory_mapped_table_is_read_back_and_reopened_without_parquet(
    tmp_path: Path, memory_mapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    check_rows(TokenTable.open(path), ROWS, [1, 2, 0])
    monkeypatch.setattr(tokens, "_unpack", None)  # the second opening must not need it
    table = TokenTable.open(path)
    check_rows(table, ROWS, [2, 2, 0, 1])
    assert len(list(memory_mapped.glob("*-*"))) == 1


def test_the_cache_follows_the_file_and_is_made_anew_when_incomplete(tmp_path: Path, memory_mapped: Path) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    TokenTable.open(path)
    write_token_table(path, [batch_of(ROWS[:2])], {}, force=True)
    os.utime(path, ns=(1, 1))
    assert len(TokenTable.open(path)) == 2
    (folder,) = memory_mapped.glob("*-*")  # the outdated copy is gone
    (folder / "image_tokens.values").unlink()
    check_rows(TokenTable.open(path), ROWS[:2], [1, 0])


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), max_size=5),
            st.lists(st.sampled_from([0, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32]), max_size=5),
            st.lists(st.integers(0, 300), max_size=3),
            st.text(st.characters(codec="utf-8"), max_size=5),
        ),
        min_size=1,
        max_size=7,
    ),
    data=st.data(),
)
def test_any_rows_in_any_order(rows: list, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("table")
    cut = data.draw(st.integers(0, len(rows)))
    groups = [batch_of(part) for part in (rows[:cut], rows[cut:]) if part]
    write_token_table(folder / "t.parquet", groups, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "KEEP_IN_MEMORY_BYTES", data.draw(st.sampled_from([-1, 2**20])))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        table = TokenTable.open(folder / "t.parquet")
    check_rows(table, rows, data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=11)))
    assert table.max_image_token == max((code for row in rows for code in row[1]), default=-1)


def test_values_are_kept_in_the_narrowest_type(tmp_path: Path, memory_mapped: Path) -> None:
    def row(value: int) -> list[tuple[str, list[int], list[int], str]]:
        return [("k", [value, 1], [], "")]

    write_token_table(tmp_path / "t.parquet", [batch_of(row(value)) for value in (255, 256, 65_535)], {})
    TokenTable.open(tmp_path / "t.parquet")
    (folder,) = memory_mapped.glob("*-*")
    assert (folder / "image_tokens.values").stat().st_size == 2 * 6
    assert not (folder / "image_tokens.offsets").exists()


def test_row_groups_are_joined_and_large_ones_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_PER_GROUP", 5)
    codes = np.arange(31 * 3).reshape(31, 3)
    batches = [token_rows([str(i) for i in range(a, a + 2)], codes[a : a + 2]) for a in range(0, 30, 2)]
    assert write_token_table(tmp_path / "t.parquet", batches, {}) == 30
    assert pq.ParquetFile(tmp_path / "t.parquet").metadata.num_row_groups == 5  # 6 rows each
    table = TokenTable.open(tmp_path / "t.parquet")
    assert np.array_equal(table.batch(np.arange(30)).image_tokens, codes[:30])


def test_metadata_is_read_after_the_last_batch(tmp_path: Path) -> None:
    counts = {"rows": 0}

    def batches():
        for row in ROWS:
            counts["rows"] += 1
            yield batch_of([row])

    write_token_table(tmp_path / "t.parquet", batches(), counts)
    assert TokenTable.open(tmp_path / "t.parquet").metadata == {"rows": 3}


def test_an_empty_table(tmp_path: Path) -> None:
    assert write_token_table(tmp_path / "t.parquet", [], {}) == 0
    table = TokenTable.open(tmp_path / "t.parquet", image_length=5, image_vocab_size=7)
    assert len(table) == 0 and table.max_image_token == -1
    assert table.batch(np.zeros(0, np.int64)).image_tokens.shape == (0, 0)


def test_columns_of_other_types_are_understood(tmp_path: Path) -> None:
    """As the hub's files have them: narrower integers, fixed-size lists, large strings, nulls, further columns."""
    table = pa.table(
        {
            "data": pa.array([b"x", b"y"]),
            "__key__": pa.array(["a", "b"], pa.large_string()),
            "text": pa.array(["one", None]),
            "text_tokens": pa.array([[4], None], pa.large_list(pa.uint8())),
            "image_tokens": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    check_rows(TokenTable.open(tmp_path / "t.parquet"), [("a", [1, 2], [4], "one"), ("b", [3, 4], [], "")], [1, 0])


# ---- several files ----


def test_files_of_a_folder_or_pattern_are_joined_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train-00001.parquet", ROWS[2:], codebook_size=9)
    write(tmp_path / "train-00000.parquet", ROWS[:2], codebook_size=9)
    check_rows(TokenTable.open(tmp_path), ROWS, [2, 1, 0])
    write(tmp_path / "validation-0.parquet", ROWS[:1], codebook_size=9)
    check_rows(TokenTable.open(f"{tmp_path}/train-*"), ROWS, [0, 2])
    with pytest.raises(InputError, match=r"several splits \(train, val\).*name one by a pattern such as .*/train-\*"):
        TokenTable.open(tmp_path)


def test_files_of_different_tokenizers_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS, codebook_size=9, image_tokenizer="11aa")
    write(tmp_path / "b.parquet", ROWS, codebook_size=9, image_tokenizer="22bb")
    message = r"b\.parquet does not belong with .*a\.parquet: they differ in image_tokenizer \('22bb' and '11aa'\)"
    with pytest.raises(InputError, match=message):
        TokenTable.open(tmp_path)


def test_the_row_is_counted_in_its_own_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS[:2])
    write(tmp_path / "b.parquet", [ROWS[0], ("k", [1, 2], [], "")])
    with pytest.raises(InputError, match=r"b\.parquet, row 1: image_tokens has 2 tokens, expected 3"):
        TokenTable.open(tmp_path, image_length=3)


# ---- bad input ----


@pytest.mark.parametrize("mapped", [False, True])
def test_expected_values_are_checked(
    tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if mapped:
        request.getfixturevalue("memory_mapped")
    path = write(tmp_path / "t.parquet", ROWS)
    TokenTable.open(path, image_length=3, image_vocab_size=70_001, text_vocab_size=6)
    with pytest.raises(InputError, match=r"row 0: image_tokens has 3 tokens, expected 5"):
        TokenTable.open(path, image_length=5)
    with pytest.raises(InputError, match=r"row 2: image_tokens has the value 70000, expected 0 to 69999"):
        TokenTable.open(path, image_vocab_size=70_000)
    with pytest.raises(InputError, match=r"row 0: text_tokens has the value 5, expected 0 to 4"):
        TokenTable.open(path, text_vocab_size=5)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"t\.parquet is not a whole parquet file: .* fetch it again"):
        TokenTable.open(path)


def test_a_damaged_row_group_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_PER_GROUP", 3)
    path = tmp_path / "t.parquet"
    write_token_table(path, [batch_of(ROWS), batch_of(ROWS)], {})
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content[column.data_page_offset + column.total_compressed_size - 25] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.parquet: row group 1 \(of 0 to 1\) is damaged: "):
        TokenTable.open(path)


def test_a_missing_column_lists_those_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"__key__": ["a"], "tokens": [[1]]}), tmp_path / "t.parquet")
    message = r"no column image_tokens or text_tokens or text; it has __key__, tokens\."
    with pytest.raises(InputError, match=message):
        TokenTable.open(tmp_path / "t.parquet")


def test_a_column_of_another_kind(tmp_path: Path) -> None:
    columns = {"__key__": ["a"], "image_tokens": ["1 2"], "text_tokens": [[1]], "text": [""]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="column 'image_tokens' holds string, expected lists of integers"):
        TokenTable.open(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("image_tokens", "message"),
    [
        ([[1], [2, -3]], r"row 1: image_tokens has the value -3, expected integers from 0 up"),
        ([[], [2, None]], r"row 1: image_tokens has the value null"),
        ([[1], None], r"row 1: image_tokens is null"),
    ],
)
def test_values_that_are_no_tokens(tmp_path: Path, image_tokens: list, message: str) -> None:
    columns = {"__key__": ["a", "b"], "image_tokens": image_tokens, "text_tokens": [[1], [2]], "text": ["", ""]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        TokenTable.open(tmp_path / "t.parquet")


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.parquet", tmp_path / "train-*"):
        with pytest.raises(InputError, match=f"no token table at {re.escape(str(path))}: expected a parquet file"):
            TokenTable.open(path)


def test_rows_outside_the_table(tmp_path: Path) -> None:
    table = TokenTable.open(write(tmp_path / "t.parquet", ROWS))
    for rows in ([-1, 0], [0, 3]):
        with pytest.raises(ValueError, match="of a table that has rows 0 to 2"):
            table.batch(np.array(rows))


def test_an_existing_file_is_kept_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already: give another name, or --force"):
        write(path, ROWS[:1])

    def failing():
        yield batch_of(ROWS)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_token_table(path, failing(), {}, force=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_columns_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 rows of image_tokens for 3 keys"):
        token_rows(["a", "b", "c"], np.zeros((2, 5), np.int64))


def test_the_file_is_plain_parquet(tmp_path: Path) -> None:
    """Anyone can read it: pyarrow alone gives the rows, and the metadata is JSON."""
    table = pq.read_table(write(tmp_path / "t.parquet", ROWS, grid=[1, 3]))
    assert [tuple(row.values()) for row in table.to_pylist()] == ROWS
    assert json.loads(pq.ParquetFile(tmp_path / "t.parquet").metadata.metadata[b"smalti"]) == {"grid": [1, 3]}


def test_a_cache_that_cannot_be_made(tmp_path: Path, memory_mapped: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(
        InputError, match=r"t\.parquet cannot be unpacked in .*tables: .* Set XDG_CACHE_HOME to a folder"
    ):
        TokenTable.open(write(tmp_path / "t.parquet", ROWS))


def test_an_interrupted_unpacking_is_begun_again(
    tmp_path: Path, memory_mapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_bytes_of", lambda column: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TokenTable.open(path)
    assert [folder.name[-10:] for folder in memory_mapped.glob("*-*")] == ["unfinished"]
    check_rows(TokenTable.open(path), ROWS, [2, 1])
    assert [folder.name[-10:] == "unfinished" for folder in memory_mapped.glob("*-*")] == [False]


# ---- types that other writers leave ----

CODE_ROWS = [[1, 2, 3], [], [4, 999]]
CODE_COLUMNS = {
    "uint16": pa.array(CODE_ROWS, pa.list_(pa.uint16())),
    "large list": pa.array(CODE_ROWS, pa.large_list(pa.int32())),
    "list view": pa.array(CODE_ROWS, pa.list_view(pa.int64())),
    "large list view": pa.array(CODE_ROWS, pa.large_list_view(pa.uint64())),
}


@pytest.mark.parametrize("kind", CODE_COLUMNS)
def test_every_arrow_type_of_codes_is_read(tmp_path: Path, kind: str) -> None:
    keys = pa.array([7, 8, 9]) if kind == "uint16" else pa.array(["7", "8", "9"]).dictionary_encode()
    columns = {"__key__": keys, "image_tokens": CODE_COLUMNS[kind], "text_tokens": pa.nulls(3), "text": pa.nulls(3)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = TokenTable.open(tmp_path / "t.parquet")
    batch = table.batch(np.arange(3))
    assert [row[row >= 0].tolist() for row in batch.image_tokens] == CODE_ROWS
    assert table.keys(np.arange(3)) == ["7", "8", "9"] and table.texts(np.arange(3)) == ["", "", ""]
    assert batch.text_lengths.tolist() == [0, 0, 0]


def test_lists_of_one_length_with_a_null_among_them_and_codes_too_large(tmp_path: Path) -> None:
    for codes, message in (
        (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2)), "row 1: image_tokens is null"),
        (
            pa.array([[1], [2**63 + 1], [3]], pa.list_(pa.uint64())),
            "row 1: image_tokens has the value 9223372036854775809",
        ),
        (pa.array([[1], [2], [None]], pa.list_(pa.int64())), "row 2: image_tokens has the value null"),
    ):
        columns = {"__key__": ["a", "b", "c"], "image_tokens": codes, "text_tokens": [[]] * 3, "text": [""] * 3}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        with pytest.raises(InputError, match=message):
            TokenTable.open(tmp_path / "t.parquet")
    columns |= {"image_tokens": [[1]] * 3, "text": [["a"]] * 3}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet: column 'text' holds list<.*>, expected text"):
        TokenTable.open(tmp_path / "t.parquet")

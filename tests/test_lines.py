"""Lines of codes: read as plain Python would, bad ones named by line and column, duplicates on one side of a split."""

import bz2
import gzip
import json
import lzma
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.cli.app import run
from smalti.data import lines as lines_module
from smalti.data.lines import (
    LineFormat,
    Lines,
    code_hashes,
    import_lines,
    read_lines,
    split_rows,
    table_lines,
    write_lines,
)
from smalti.data.loader import batches
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.errors import InputError, InputWarning

SAMPLE = "000d1f2aa107dbed4cea301effa6e0d8.png 0 152 276 348 643 1005 99 180 816 265 348 557 721 754 429 847 7"
SAMPLE_CODES = [0, 152, 276, 348, 643, 1005, 99, 180, 816, 265, 348, 557, 721, 754, 429, 847, 7]
SPACES = " \t\v\f\r"

Row = tuple[str, list[int]]
tags = st.text(st.characters(codec="utf-8", exclude_characters=" \t\n\r\v\f"), min_size=1, max_size=5)


def flat(blocks) -> list[Row]:
    """Blocks of lines as plain Python."""
    rows = []
    for block in blocks:
        parts = np.split(block.codes, np.cumsum(block.lengths)[:-1])
        rows += zip(block.tags.to_pylist(), [part.tolist() for part in parts], strict=True)
    return rows


def lines_of(rows: list[Row]) -> Lines:
    codes = [code for _, row in rows for code in row]
    return Lines(
        pa.array([tag for tag, _ in rows], pa.string()),
        np.array(codes, np.int64),
        np.array([len(row) for _, row in rows], np.int64),
    )


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def random_rows(count: int, length: int = 7, vocab_size: int = 1025, seed: int = 0) -> list[Row]:
    source = random.Random(seed)
    return [(f"{i:05d}.png", [source.randrange(vocab_size) for _ in range(length)]) for i in range(count)]


def text_of(rows: list[Row]) -> str:
    return "".join(" ".join([tag, *map(str, codes)]) + "\n" for tag, codes in rows)


# ---- reading ----


def test_the_example_line(tmp_path: Path) -> None:
    for end in ("", "\n", "\r\n", " \n"):
        path = write(tmp_path / "a.txt", SAMPLE + end)
        assert flat(read_lines(path)) == [(SAMPLE.split()[0], SAMPLE_CODES)]


@given(
    rows=st.lists(st.tuples(tags, st.lists(st.integers(0, 2**31 - 1), max_size=5)), min_size=1, max_size=9),
    gap=st.text(SPACES, min_size=1, max_size=3),
    block_bytes=st.integers(1, 60),
)
def test_any_lines_as_python_splits_them(
    rows: list[Row], gap: str, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join(gap[1:] + gap.join([tag, *map(str, codes)]) + gap[1:] + "\n" for tag, codes in rows)
    path = write(tmp_path_factory.mktemp("lines") / "a.txt", text)
    oracle = [line.split() for line in text.encode().split(b"\n")[:-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_BLOCK_BYTES", block_bytes)
        read = flat(read_lines(path, LineFormat(allow_short=True), warns=False))
    assert read == [(words[0].decode(), [int(word) for word in words[1:]]) for words in oracle]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_files_are_known_by_their_content(tmp_path: Path, compression: str) -> None:
    rows = random_rows(101)
    parts = [pa.compress(text_of(part).encode(), compression, asbytes=True) for part in (rows[:50], rows[50:])]
    assert flat(read_lines(write(tmp_path / "a.txt", b"".join(parts)))) == rows
    path = write(tmp_path / "b.txt", parts[0] + parts[1][:-9])
    with pytest.raises(InputError, match=r"b\.txt: damaged or cut short after line \d+ \(.*\)\. Copy or compress"):
        flat(read_lines(path))


def test_files_follow_each_other_and_a_byte_order_mark_is_no_tag(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", b"\xef\xbb\xbfa 1 2\n")
    second = write(tmp_path / "b.txt", "b 3 4")
    assert flat(read_lines([first, second])) == [("a", [1, 2]), ("b", [3, 4])]


def test_prefixes_of_any_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a 5 6 7\nb\nc 8\n")
    (block,) = read_lines(path, LineFormat(length=5, allow_short=True))
    assert block.lengths.tolist() == [3, 0, 1]
    assert block.padded().tolist() == [[5, 6, 7], [-1, -1, -1], [8, -1, -1]]
    with pytest.raises(InputError, match=r"line 1, column 7: 3 codes after the tag, expected at most 2"):
        flat(read_lines(path, LineFormat(length=2, allow_short=True)))


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "_MAX_LINE_BYTES", 100)
    monkeypatch.setattr(lines_module, "_BLOCK_BYTES", 30)
    with pytest.raises(InputError, match="line 2: longer than 0 MB; expected a text file with one picture a line"):
        flat(read_lines(write(tmp_path / "a.txt", "a 1\n" + "b" + 99 * " 12")))


# ---- bad lines ----

BAD_LINES = [
    (b"a 1 two 3", 5, "the word 'two' among the codes, expected integers written in digits"),
    (b"a 1 2.0 3", 5, "the word '2.0' among the codes, expected integers written in digits, not as fractions"),
    (b"a 1 2 3x", 7, "the word '3x' among the codes, expected integers written in digits"),
    (b"a 1 2 1025", 7, "the code 1025 is out of range, expected 0 to 1024"),
    (b"a 1 +2 3", 5, "the word '+2' among the codes, expected integers written in digits"),
    (b"a 1 -2 3", 5, "the code -2 is out of range, expected 0 to 1024"),
    (b"a 1 9999999999999999999999 3", 5, "the code 9999999999999999999999 is out of range, expected 0 to 1024"),
    (b"a 1 2", 6, "2 codes after the tag, expected 3"),
    (b"a", 2, "0 codes after the tag, expected 3"),
    (b"a  1 2 3 4 5", 10, "5 codes after the tag, expected 3"),
    (b"", 1, "an empty line, expected a tag and its codes"),
    (b" \t ", 1, "an empty line, expected a tag and its codes"),
    ("äö 1 x 3".encode(), 6, "the word 'x' among the codes, expected integers written in digits"),
    ("ä\u00a01 2 3".encode(), 8, "2 codes after the tag, expected 3"),
    (b"a\xc3 1 2 3", 2, "the byte 0xc3 is not UTF-8"),
    (b"a 1 \xff 3", 5, "the byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize(("line", "column", "reason"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, column: int, reason: str) -> None:
    path = write(tmp_path / "a.txt", b"ok 1 2 3\nok 4 5 6\n" + line + b"\nok 7 8 1024\n")
    place = re.escape(f"a.txt, line 3, column {column}: {reason}. Mend the line, or set bad lines aside")
    with pytest.raises(InputError, match=place):
        import_lines(path, tmp_path / "a.parquet", vocab_size=1025)
    assert not (tmp_path / "a.parquet").exists()


def test_bad_lines_are_set_aside_until_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "_BLOCK_BYTES", 25)
    content = b"".join(b"ok%d 1 2 %d\n" % (index, index) + line + b"\n" for index, (line, _, _) in enumerate(BAD_LINES))
    path = write(tmp_path / "a.txt", content)
    output = tmp_path / "out.parquet"
    report = import_lines(path, output, vocab_size=1025, length=3, skip_bad=16)
    assert (report.num_lines, report.num_bad) == (16, 16)
    assert report.bad_lines_path == tmp_path / "out.bad.txt"
    table = TokenTable.open(output)
    assert table.keys(np.arange(16)) == [f"ok{index}" for index in range(16)]
    assert table.batch(np.arange(16)).image_tokens.tolist() == [[1, 2, index] for index in range(16)]
    expected = [
        f"{path}, line {2 * index + 2}, column {column}: {reason}\t".encode() + line + b"\n"
        for index, (line, column, reason) in enumerate(BAD_LINES)
    ]
    assert (tmp_path / "out.bad.txt").read_bytes() == b"".join(expected)
    with pytest.raises(
        InputError, match=r"line 32, .* It is one more than --skip-bad 15; the others are listed in .*bad"
    ):
        import_lines(path, tmp_path / "new.parquet", vocab_size=1025, length=3, skip_bad=15)
    assert not (tmp_path / "new.parquet").exists()
    assert (tmp_path / "new.bad.txt").read_bytes() == b"".join(expected[:-1])
    good = write(tmp_path / "good.txt", "a 1 2\n")
    with pytest.raises(InputError, match="exists already"):
        import_lines(good, output, skip_bad=1)
    assert (tmp_path / "out.bad.txt").exists()
    import_lines(good, output, skip_bad=1, force=True)
    assert not (tmp_path / "out.bad.txt").exists(), "the list of the import before would pass for this one's"


@given(lines=st.lists(st.text("a1 \u00e4-+\t0", max_size=7).map(str.encode), min_size=1, max_size=11), data=st.data())
def test_good_and_bad_as_the_obvious_loop_finds(
    lines: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def is_good(line: bytes) -> bool:
        words = line.split()
        codes = [re.fullmatch(rb"[0-9]+", word) and int(word) < 11 for word in words[1:]]
        return len(words) == 3 and codes == [True, True]

    folder = tmp_path_factory.mktemp("lines")
    good = [line.split() for line in lines if is_good(line)]
    path = write(folder / "a.txt", b"\n".join(lines) + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_BLOCK_BYTES", data.draw(st.integers(1, 40)))
        if not good:
            with pytest.raises(InputError, match="no good line"):
                import_lines(path, folder / "a.parquet", 11, 2, skip_bad=99)
            return
        report = import_lines(path, folder / "a.parquet", 11, 2, skip_bad=99)
    assert (report.num_lines, report.num_bad) == (len(good), len(lines) - len(good))
    table = TokenTable.open(folder / "a.parquet")
    assert table.batch(np.arange(len(good))).image_tokens.tolist() == [[int(b), int(c)] for _, b, c in good]


# ---- import ----


def test_import_finds_length_and_vocabulary(tmp_path: Path) -> None:
    rows = random_rows(211, vocab_size=900)
    rows[3] = ("a", [0, 1, 2, 3, 4, 5, 1000])
    report = import_lines(write(tmp_path / "a.txt", text_of(rows)), tmp_path / "a.parquet")
    assert (report.num_lines, report.num_bad, report.num_duplicates) == (211, 0, 0)
    assert (report.length, report.vocab_size, report.bad_lines_path) == (7, 1001, None)
    table = TokenTable.open(tmp_path / "a.parquet", image_length=7, image_vocab_size=1001)
    assert table.metadata == {"image_vocab_size": 1001, "image_length": 7, "num_duplicates": 0}
    assert flat(table_lines(table)) == rows
    assert table.texts(np.array([5])) == [""] and table.batch(np.array([5])).text_lengths.tolist() == [0]


def test_the_most_common_length_is_expected_even_if_the_first_line_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a 1\n" + 9 * "\n" + text_of(random_rows(5, length=3)))
    with pytest.raises(InputError, match=r"line 1, column 4: 1 codes after the tag, expected 3"):
        import_lines(path, tmp_path / "a.parquet")


def test_given_values_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a 1 2\nb 3 4\n")
    assert import_lines(path, tmp_path / "a.parquet", vocab_size=1025, length=2).vocab_size == 1025
    report = import_lines(write(tmp_path / "b.txt", "a 1 2\nb\n"), tmp_path / "b.parquet", length=5, allow_short=True)
    assert report.length is None
    assert TokenTable.open(tmp_path / "b.parquet").batch(np.array([1, 0])).image_tokens.tolist() == [[-1, -1], [1, 2]]


def test_duplicates_are_counted_by_codes_alone(tmp_path: Path) -> None:
    rows = random_rows(50)
    rows += [("again", rows[7][1]), ("and again", rows[7][1]), ("other", rows[8][1]), ("reversed", rows[9][1][::-1])]
    rows = [(tag.replace(" ", "-"), codes) for tag, codes in rows]
    report = import_lines(write(tmp_path / "a.txt", text_of(rows)), tmp_path / "a.parquet")
    assert (report.num_lines, report.num_duplicates) == (54, 3)


def test_tags_never_reach_the_training_tensors(tmp_path: Path) -> None:
    """Other tags, longer and not ASCII: the same split, the same order, the same bytes."""
    rows = random_rows(101, length=5)
    renamed = [(f"ünrelated-{index * 7919}", codes) for index, (_, codes) in enumerate(rows)]
    seen = []
    for name, version in (("a", rows), ("b", renamed)):
        import_lines(write(tmp_path / f"{name}.txt", text_of(version)), tmp_path / f"{name}.parquet")
        table = TokenTable.open(tmp_path / f"{name}.parquet")
        kept, held = split_rows(table, 0.2)
        steps = batches(len(kept), 13, seed=3)
        tensors = [array for _ in range(11) for array in table.batch(kept[next(steps)])]
        seen.append([array.tobytes() for array in (*tensors, kept, held, *table.batch(held))])
    assert seen[0] == seen[1]
    assert table.keys(np.array([0])) == ["ünrelated-0"]


def test_nothing_is_overwritten_or_made_of_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a 1 2\n")
    import_lines(path, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="exists already"):
        import_lines(path, tmp_path / "a.parquet")
    import_lines(path, tmp_path / "a.parquet", force=True)
    with pytest.raises(InputError, match=r"no such file: .*b\.txt\. Expected lines of text, plain or compressed"):
        import_lines(tmp_path / "b.txt", tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"empty\.txt: no good line, nothing to import"):
        import_lines(write(tmp_path / "empty.txt", ""), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"tags\.txt: tags alone, expected a tag and its codes on each line"):
        import_lines(write(tmp_path / "tags.txt", "a\nb\n"), tmp_path / "b.parquet")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.parquet", "a.txt", "empty.txt", "tags.txt"]
    assert import_lines(tmp_path / "tags.txt", tmp_path / "b.parquet", allow_short=True).num_lines == 2


def test_progress_counts_the_bytes_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(text_of(random_rows(300)).encode()))
    import_lines(path, tmp_path / "a.parquet", show_progress=True)
    size = f"{path.stat().st_size / 1e6:.3g} MB"
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"reading lines: {size}" and last.startswith(f"reading lines: done, {size} in ")
    assert last.endswith(", 300 lines")


@pytest.mark.parametrize(
    ("values", "message"), [({"vocab_size": 0}, "vocab_size 0 must be 1 to"), ({"length": -1}, "length -1 must be")]
)
def test_formats_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LineFormat(**values)


# ---- hashes and splits ----


@given(rows=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=30))
def test_hashes_are_equal_exactly_for_equal_sequences(rows: list[list[int]]) -> None:
    lines = lines_of([("t", row) for row in rows])
    hashes = code_hashes(lines.codes, lines.lengths)
    for first, a in zip(hashes, rows, strict=True):
        for second, b in zip(hashes, rows, strict=True):
            assert (first == second) == (a == b)
    alone = [code_hashes(np.array(row, np.int64), np.array([len(row)]))[0] for row in rows]
    assert hashes.tolist() == alone  # whatever else is in the block


def table_of(codes: np.ndarray, path: Path) -> TokenTable:
    write_token_table(path, [token_rows([str(i) for i in range(len(codes))], codes)], {}, force=True)
    return TokenTable.open(path)


def test_equal_sequences_are_on_one_side(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 5, (997, 3))  # 125 different sequences
    table = table_of(codes, tmp_path / "t.parquet")
    for held_out in (0.3, 100, 1):
        kept, held = split_rows(table, held_out)
        assert sorted([*kept, *held]) == list(range(997))
        assert not {tuple(codes[row]) for row in kept} & {tuple(codes[row]) for row in held}
    assert not np.array_equal(split_rows(table, 0.3, seed=1)[1], split_rows(table, 0.3)[1])


def test_the_size_of_a_split(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 1025, (5003, 7))
    table = table_of(codes, tmp_path / "t.parquet")
    assert len(split_rows(table, 101)[1]) == 101
    _, held = split_rows(table, 0.1)
    assert abs(len(held) - 500.3) < 4 * (5003 * 0.1 * 0.9) ** 0.5
    _, of_fewer = split_rows(table_of(codes[:3001], tmp_path / "fewer.parquet"), 0.1)
    assert of_fewer.tolist() == [row for row in held if row < 3001]  # a share keeps its rows when others are added
    for nothing in (0, 0.0, -1, 5003, 6000, 1.0, 1e-9):
        with pytest.raises(InputError, match=f"held_out {nothing} of 5003 rows would leave one side"):
            split_rows(table, nothing)


# ---- writing ----


@given(rows=st.lists(st.tuples(tags, st.lists(st.integers(0, 2**31 - 1), max_size=5)), min_size=1, max_size=9))
def test_written_lines_are_read_back(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lines")
    assert write_lines(folder / "a.txt", [lines_of(rows)]) == len(rows)
    assert (folder / "a.txt").read_bytes() == text_of(rows).encode()
    assert flat(read_lines(folder / "a.txt", LineFormat(allow_short=True), warns=False)) == rows


@pytest.mark.parametrize(("suffix", "compression"), [(".gz", "gzip"), (".zst", "zstd")])
def test_lines_are_compressed_by_name(tmp_path: Path, suffix: str, compression: str) -> None:
    rows = random_rows(57)
    write_lines(tmp_path / f"a.txt{suffix}", [lines_of(rows[:20]), lines_of(rows[20:])])
    with pa.input_stream(str(tmp_path / f"a.txt{suffix}"), compression=compression) as stream:
        assert stream.read().decode() == text_of(rows)
    assert flat(read_lines(tmp_path / f"a.txt{suffix}")) == rows


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_no_byte_of_compressed_lines_can_change_unseen(tmp_path: Path, suffix: str) -> None:
    rows = random_rows(23)
    path = tmp_path / f"a.txt{suffix}"
    write_lines(path, [lines_of(rows)])
    whole = path.read_bytes()
    assert flat(read_lines(path)) == rows
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read = flat(read_lines(path))
        except InputError:
            continue
        assert read == rows  # a byte of the header that says nothing of the content, such as its time


def test_zstd_without_its_package_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(23)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.warns(InputWarning, match=r"without a checksum.*pip install 'smalti\[zstd\]', or write \.gz"):
        write_lines(tmp_path / "a.txt.zst", [lines_of(rows)])
    assert flat(read_lines(tmp_path / "a.txt.zst")) == rows


@pytest.mark.parametrize("tag", ["", "a b", "a\n"])
def test_tags_that_a_line_cannot_hold(tmp_path: Path, tag: str) -> None:
    with pytest.raises(InputError, match="is empty or has white space, which a line cannot hold"):
        write_lines(tmp_path / "a.txt", [lines_of([(tag, [1])])])
    assert not (tmp_path / "a.txt").exists()


def test_a_table_as_lines_with_specials_around(tmp_path: Path) -> None:
    table = table_of(np.array([[5, 6], [7, 8], [0, 1]]), tmp_path / "t.parquet")
    rows = np.array([2, 0])
    assert flat(table_lines(table, rows)) == [("2", [0, 1]), ("0", [5, 6])]
    dressed = {"before": [0], "after": [10, 11], "code_offset": 1}
    assert flat(table_lines(table, rows, **dressed)) == [("2", [0, 1, 2, 10, 11]), ("0", [0, 6, 7, 10, 11])]
    assert flat(table_lines(table, rows, **dressed, num_codes=2)) == [("2", [0, 1]), ("0", [0, 6])]
    assert flat(table_lines(table, rows, num_codes=0)) == [("2", []), ("0", [])]


def test_a_ragged_table_as_lines(tmp_path: Path) -> None:
    write_token_table(tmp_path / "t.parquet", [token_rows(["a", "b"], [[1], [2, 3, 2]])], {})
    table = TokenTable.open(tmp_path / "t.parquet")
    assert flat(table_lines(table, after=[9])) == [("a", [1, 9]), ("b", [2, 3, 2, 9])]
    assert flat(table_lines(table, after=[9, "distinct"])) == [("a", [1, 9, 1]), ("b", [2, 3, 2, 9, 2])]


@pytest.mark.parametrize("wrong", [{"before": [-1]}, {"after": ["count"]}, {"code_offset": -2}])
def test_specials_that_no_line_can_hold(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot stand in a line; specials are integers "):
        next(table_lines(table_of(np.array([[5, 6]]), tmp_path / "t.parquet"), **wrong))


def test_tables_are_exported_and_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures of 8 × 8 codes with a start and two specials behind become lines of 67, as foreign files have."""
    source = np.random.default_rng(0)
    first, second = source.integers(0, 64, (5, 64)), source.integers(0, 64, (3, 64))
    first[0] = 7
    tables = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, codes in zip(tables, (first, second), strict=True):
        table_of(codes, path)
    export = ["data", "export-lines", *map(str, tables), "--code-offset", "1", "--before", "0"]
    export += ["--after", "65,distinct", "-o"]
    assert run([*export, str(tmp_path / "lines.txt.gz")]) == 0
    assert "lines.txt.gz: 8 lines" in capsys.readouterr().out
    report = import_lines(tmp_path / "lines.txt.gz", tmp_path / "lines.parquet")
    assert (report.num_lines, report.length) == (8, 67)
    found = TokenTable.open(tmp_path / "lines.parquet")
    codes = found.batch(np.arange(8)).image_tokens
    pictures = np.concatenate([first, second])
    assert (codes[:, 1:65] == pictures + 1).all()
    assert codes[:, 0].tolist() == [0] * 8 and codes[:, 65].tolist() == [65] * 8
    assert codes[:, 66].tolist() == [len(set(row)) for row in pictures.tolist()]
    assert found.keys(np.arange(8)) == [*map(str, range(5)), *map(str, range(3))]

    assert run([*export, str(tmp_path / "prefixes.txt"), "--num-codes", "3", "--max-rows", "2"]) == 0
    expected = [(key, [0, *(row[:2] + 1).tolist()]) for key, row in (("0", first[0]), ("1", first[1]))]
    expected += [(key, [0, *(row[:2] + 1).tolist()]) for key, row in (("0", second[0]), ("1", second[1]))]
    assert flat(read_lines(tmp_path / "prefixes.txt")) == expected
    capsys.readouterr()
    assert run([*export, str(tmp_path / "prefixes.txt")]) == 2
    assert "exists" in capsys.readouterr().err
    assert run(["data", "export-lines", str(tables[0]), "-o", str(tmp_path / "x.txt"), "--after", "65,end"]) == 2
    assert "after is 'end'; expected whole numbers" in capsys.readouterr().err


# ---- other files of codes ----


def table_rows(path: Path | list[Path], tmp_path: Path, **options: Any) -> list[tuple[str, list[int]]]:
    """The rows of the table that an import makes."""
    import_lines(path, tmp_path / "out.parquet", force=True, **options)
    table = TokenTable.open(tmp_path / "out.parquet")
    rows = np.arange(len(table))
    return list(zip(table.keys(rows), table.batch(rows).image_tokens.tolist(), strict=True))


CODES = np.random.default_rng(0).integers(0, 1000, (11, 5))
NUMBERED = [(f"{i:08d}", row) for i, row in enumerate(CODES.tolist())]


def test_lines_without_tags_are_numbered_if_that_is_said_and_warned_of_if_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(" ".join(map(str, row)) + "\n" for row in CODES))
    assert table_rows(path, tmp_path, tags=False) == NUMBERED
    with pytest.warns(InputWarning, match=rf"the first word of every line is a number \({CODES[0, 0]} .*--no-tags"):
        rows = table_rows(path, tmp_path)
    assert rows == [(str(row[0]), row[1:]) for row in CODES.tolist()]
    with pytest.warns(InputWarning, match="--no-tags"):
        list(read_lines(path))
    assert table_rows([path, path], tmp_path, tags=False)[-1] == ("00000021", CODES[-1].tolist())
    write(path, "1 2 3\n4 x 6\n")
    with pytest.raises(InputError, match="line 2, column 3: the word 'x' among the codes"):
        import_lines(path, tmp_path / "bad.parquet", tags=False)
    write(path, "1 2 3\n4 5\n7 8 9\n")
    with pytest.raises(InputError, match=r"line 2, column 4: 2 codes, expected 3"):
        import_lines(path, tmp_path / "bad.parquet", tags=False)


def test_numbers_that_count_the_lines_are_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"{i % 7} 5 6\n" for i in range(14)))
    assert [tag for tag, _ in table_rows(path, tmp_path)] == [str(i % 7) for i in range(14)]


def test_arrays_are_read_by_what_they_are(tmp_path: Path) -> None:
    for name, array in {
        "a.npy": CODES.astype(np.uint16),
        "b.npy": np.asfortranarray(CODES),
        "c.npy": CODES[None],
    }.items():
        np.save(tmp_path / name, array)
        assert table_rows(tmp_path / name, tmp_path) == NUMBERED
    np.savez(tmp_path / "d.npz", codes=CODES)
    assert table_rows(tmp_path / "d.npz", tmp_path) == NUMBERED
    (tmp_path / "no suffix").write_bytes((tmp_path / "a.npy").read_bytes())
    assert table_rows(tmp_path / "no suffix", tmp_path) == NUMBERED


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (CODES.astype(float), "holds an array of float64, expected integers"),
        (CODES.reshape(11, 5, 1), r"holds an array of shape \(11, 5, 1\), expected one row of codes for each picture"),
        (CODES.reshape(-1), r"holds an array of shape \(55,\)"),
        (
            np.where(CODES[3, 2] == CODES, -1, CODES),
            r"a\.npy, row 4: the code -1 is out of range, expected 0 to 1048575",
        ),
        (
            np.where(CODES[3, 2] == CODES, 2**64 - 3, CODES.astype(np.uint64)),
            r"a\.npy, row 4: the code 9223372036854775807 is out of range",
        ),
        (np.array([[1, 2], [3, 4]], object), "is not a whole array of NumPy"),
    ],
)
def test_arrays_that_are_no_codes_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        import_lines(tmp_path / "a.npy", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_arrays_with_others_beside_them_or_cut_short_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", codes=CODES, labels=CODES[:, 0])
    with pytest.raises(InputError, match=r"holds several arrays or none \(codes, labels\)"):
        import_lines(tmp_path / "a.npz", tmp_path / "out.parquet")
    np.save(tmp_path / "b.npy", CODES)
    write(tmp_path / "b.npy", (tmp_path / "b.npy").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"b\.npy is not a whole array of NumPy"):
        import_lines(tmp_path / "b.npy", tmp_path / "out.parquet")


def test_json_lines_are_read_and_their_bad_ones_counted(tmp_path: Path) -> None:
    rows = [json.dumps({"class_id": 7, "tokens": row}) for row in CODES.tolist()]
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    assert table_rows(path, tmp_path) == NUMBERED
    named = [
        json.dumps({"file_name": f"a {i}.png", "size": [3, 4], "codes": row}) for i, row in enumerate(CODES.tolist())
    ]
    write(tmp_path / "b.jsonl.gz", gzip.compress("\n".join(named).encode()))
    assert table_rows(tmp_path / "b.jsonl.gz", tmp_path) == [
        (f"a_{i}.png", row) for i, row in enumerate(CODES.tolist())
    ]
    rows[2], rows[4], rows[5] = "{broken", json.dumps({"tokens": [1, 2.5]}), json.dumps({"tokens": [2**70, 1, 2, 3, 4]})
    write(path, "\n".join(rows))
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: not JSON"):
        import_lines(path, tmp_path / "bad.parquet")
    report = import_lines(path, tmp_path / "some.parquet", skip_bad=3)
    assert (report.num_lines, report.num_bad) == (8, 3)
    assert (
        (tmp_path / "some.bad.txt")
        .read_text()
        .splitlines()[1]
        .endswith('tokens is no list of integers\t{"tokens": [1, 2.5]}')
    )
    write(path, '{"a": [1, 2], "b": [3, 4]}\n')
    with pytest.raises(InputError, match=r"several lists of integers \(a, b\) among a \(a list of int\), b "):
        import_lines(path, tmp_path / "bad.parquet")


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_bzip2_and_xz_are_known_by_their_content(tmp_path: Path, compress: Any) -> None:
    rows = random_rows(50)
    path = write(tmp_path / "a.txt", compress(text_of(rows[:20]).encode()) + compress(text_of(rows[20:]).encode()))
    assert flat(read_lines(path)) == rows
    write(path, path.read_bytes()[:-20])
    with pytest.raises(InputError, match="damaged or cut short after line"):
        list(read_lines(path))


def test_a_code_that_needs_a_vocabulary_beyond_any_must_be_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a 1 2\nb 3 1999888087\n")
    message = (
        r"line 2, column 5: the code 1999888087 is out of range, expected 0 to 1048575 \(a larger .* --vocab-size\)"
    )
    with pytest.raises(InputError, match=message):
        import_lines(path, tmp_path / "out.parquet")
    assert import_lines(path, tmp_path / "out.parquet", vocab_size=2**31).vocab_size == 2**31
    assert import_lines(path, tmp_path / "some.parquet", skip_bad=1).num_bad == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>sign in</html>", "is a web page, not the file that it offers, not lines of codes; download"),
        ("a 1 2\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"a 1 2\rb 3 4\r", r"carriage returns alone: write line feeds"),
        (b"a [1, 2, 3]\n", r"the word '\[1,' among the codes.*; separate codes by spaces alone"),
        (b'{"tokens": [1, 2]}\n', r"a file of JSON lines is known by its name, \.jsonl"),
    ],
)
def test_what_else_a_file_may_be_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_lines(write(tmp_path / "a.txt", content), tmp_path / "out.parquet")

"""Text files of tokenized pictures: on each line a tag and the codes of one picture as decimal integers.

    000d1f2aa107dbed4cea301effa6e0d8.png 0 152 276 348 643 1005 99 180 816 265 348 557 721 754 429 847 ...

White space separates them. The tag names the picture for people and becomes `__key__` of a token table; it never
reaches a model. Files may be plain or compressed (gzip, zstd, bzip2, xz) and larger than memory: they are read in
blocks of whole lines, and a block is parsed by array operations over its bytes. Arrays of NumPy and JSON lines are read
too (`code_files.py`); what has no tags is named by its number. Only a line that is found wrong is looked at word by
word, to say what is wrong where.
Letters in shapes: n lines, m codes in all of them together.
"""

import lzma
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64, Integer, Shaped, UInt8, UInt64

from smalti.data.code_files import CodeRows, array_rows, json_rows
from smalti.data.loader import prefetch
from smalti.data.tokens import PAD, ROWS_PER_GROUP, TokenTable, token_rows, write_token_table
from smalti.errors import InputError, InputWarning, first_line
from smalti.file_kinds import NPY, ZIP, kind_of, refuse_pipe
from smalti.files import new_file, refuse_existing, temporary_files
from smalti.progress import stage

# Small enough that the arrays made of a block stay in the processor's cache, large enough to hide Python's own time.
_BLOCK_BYTES = 2**20
_MAX_LINE_BYTES = 64 * 2**20
_MAX_DIGITS = 18  # what an int64 holds for certain
_MAX_VOCAB_SIZE = 2**31  # a larger "code" is a damaged line, whatever the vocabulary
MAX_UNTOLD_VOCAB_SIZE = 2**20
"""Codes from here on are taken for something else, such as a hash, unless the vocabulary's size is told: a model has a
row of weights for each, and the largest codebooks in use have 2^18."""
_compute: Any = pyarrow.compute  # its functions are made at import, unknown to type checkers
_WORD = re.compile(rb"[^ \t\n\r\v\f]+")
_UTF8_MARK = b"\xef\xbb\xbf"
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_XZ = b"\xfd7zXZ\x00"
_JSON_NAME = re.compile(r"\.(jsonl|ndjson)(\.\w+)?$", re.IGNORECASE)
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
DISTINCT = "distinct"
"""Among the specials behind a written line: the number of different codes of its picture."""


@dataclass(frozen=True, kw_only=True)
class LineFormat:
    """What a good line looks like. Without `vocab_size` any code below 2^31 is good; without `length` the most common
    length of the file's first lines is expected of all. `allow_short` admits lines of any length up to `length`, also
    0: prefixes to be completed. Without `tags` the first word of a line is a code too."""

    vocab_size: int | None = None
    length: int | None = None
    allow_short: bool = False
    tags: bool = True
    is_told: bool = True
    """Whether the user gave `vocab_size`, or it is a bound of ours that a message should speak of."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and not 1 <= self.vocab_size <= _MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size {self.vocab_size} must be 1 to {_MAX_VOCAB_SIZE}.")
        if self.length is not None and self.length < 0:
            raise ValueError(f"length {self.length} must be at least 0.")

    @property
    def max_code(self) -> int:
        return (self.vocab_size or _MAX_VOCAB_SIZE) - 1

    @property
    def range(self) -> str:
        """The codes that are good, for messages."""
        return f"0 to {self.max_code}" + ("" if self.is_told else " (a larger vocabulary is told by --vocab-size)")


class Lines(NamedTuple):
    """Some lines, in the order of the file: their tags, and their codes one after the other."""

    tags: pa.StringArray
    codes: Int64[np.ndarray, " m"]
    lengths: Int64[np.ndarray, " n"]

    def padded(self) -> Int64[np.ndarray, "n L"]:
        """The codes line by line, short lines filled up with -1."""
        inside = np.arange(self.lengths.max(initial=0)) < self.lengths[:, None]
        padded = np.full(inside.shape, PAD, np.int64)
        padded[inside] = self.codes
        return padded


# ---- reading ----


def read_lines(
    paths: str | Path | Sequence[str | Path],
    line_format: LineFormat | None = None,
    *,
    advice: str = "Mend the line.",
    warns: bool = True,
) -> Iterator[Lines]:
    """The lines of one or several files, some thousands at a time. Raises InputError, naming file, line and column,
    for a line that is not as `line_format` says, is empty, or is not UTF-8; the error ends with `advice`. At the end it
    warns, unless `warns` is off, if every tag is a number: lines without tags lose their first code so."""
    paths = _paths(paths)
    seen = _TagsSeen(paths)
    with _BadLines(0, None, advice) as bad_lines:
        for _, lines in _read(paths, line_format or LineFormat(), bad_lines, seen):
            yield lines
    if warns:
        seen.warn()


class _TagsSeen:
    """Whether the tags of text files may be codes: whole numbers as codes are written, and not the lines counted."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._first: str | None = None
        self._last: int | None = None
        self._may_be_codes = True
        self._are_counted = True

    def add(self, tags: pa.StringArray) -> None:
        if not self._may_be_codes or not len(tags):
            return
        self._first = self._first or tags[0].as_py()
        self._may_be_codes = bool(_compute.all(_compute.match_substring_regex(tags, "^(0|[1-9][0-9]{0,8})$")).as_py())
        if self._may_be_codes:
            numbers = tags.cast(pa.int64()).to_numpy()
            before = numbers[:1] - 1 if self._last is None else [self._last]
            is_next, is_restart = np.diff(numbers, prepend=before) == 1, numbers == int(self._first)
            self._are_counted &= bool((is_next | is_restart).all())
            self._last = int(numbers[-1])

    def warn(self) -> None:
        if self._first is not None and self._may_be_codes and not self._are_counted:
            warnings.warn(
                f"{', '.join(map(str, self._paths))}: the first word of every line is a number ({self._first} in the "
                "first) and taken for its tag, not for a code. If the lines have no tags, import them with --no-tags: "
                "smalti data import-lines (tags=False).",
                InputWarning,
                stacklevel=3,
            )


def _paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    found = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in found:
        refuse_pipe(path)
        if not path.is_file():
            raise InputError(
                f"no such file: {path}. Expected lines of text, plain or compressed, .npy, .npz or .jsonl."
            )
        kind = kind_of(path)
        if kind is not None and kind.name not in _READ_KINDS:
            raise InputError(
                f"{path} is {kind.what}, not lines of codes; {kind.advice or 'give the lines themselves'}."
            )
        if kind is None and _is_utf16(path):
            raise InputError(f"{path} is UTF-16 text; save it as UTF-8: iconv -f utf-16 -t utf-8.")
    return found


_READ_KINDS = ("empty", "gzip", "zstd", "bzip2", "xz", "npy", "zip")


def _is_utf16(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in _UTF16_MARKS


def _read(
    paths: list[Path], line_format: LineFormat, bad_lines: "_BadLines", seen: _TagsSeen
) -> Iterator[tuple[int, Lines]]:
    """Blocks of good lines, each with the number of bytes read so far of the files as they lie on disk."""
    num_before = 0
    for path in paths:
        num_lines = 0
        for num_bytes, block in _line_blocks(path):
            if isinstance(block, CodeRows):
                length = line_format.length or _common_length(block.lengths)
                if line_format.length is None and not line_format.allow_short:
                    line_format = replace(line_format, length=length)
                lines = _checked(block, line_format, bad_lines, path, num_lines, num_before)
                num_here = len(block.lengths)
            else:
                words = _split(block, has_tags=line_format.tags)
                if line_format.length is None and not line_format.allow_short:
                    length = _common_length(words.lengths[words.num_words > 0])
                    line_format = replace(line_format, length=length)
                lines, bad = _parse(block, words, line_format, num_before + num_lines)
                for index in np.flatnonzero(bad).tolist():
                    line = block[words.line_starts[index] : words.line_ends[index]]
                    column, reason = _complaint(line, line_format)
                    bad_lines.add(f"{path}, line {num_lines + index + 1}, column {column}: {reason}", line)
                num_here = len(words.lengths)
                if line_format.tags:
                    seen.add(lines.tags)
            num_lines += num_here
            yield num_bytes, lines
        num_before += num_lines


def _common_length(lengths: Int64[np.ndarray, " n"]) -> int:
    return int(np.bincount(lengths, minlength=1).argmax())


def _line_blocks(path: Path) -> Iterator[tuple[int, bytes | CodeRows]]:
    """Blocks of a file with the number of bytes read since the last: of text, or of rows as arrays and JSON hold."""
    kind = kind_of(path)
    if kind in (NPY, ZIP):
        size = path.stat().st_size
        for number, rows in enumerate(array_rows(path)):
            yield (0 if number else size), rows
    elif _JSON_NAME.search(path.name):
        size = path.stat().st_size
        with path.open("rb") as file, _decompressed(file) as stream:
            for number, rows in enumerate(json_rows(_text_lines(stream, path), path)):
                yield (0 if number else size), rows
    else:
        yield from _blocks(path)


def _text_lines(stream: Any, path: Path) -> Iterator[bytes]:
    rest, num_lines = b"", 0
    while chunk := _read_chunk(stream, path, num_lines):
        *lines, rest = (rest + chunk).removeprefix(_UTF8_MARK).split(b"\n")
        num_lines += len(lines)
        yield from lines
    if rest:
        yield rest


def _checked(
    rows: CodeRows, line_format: LineFormat, bad_lines: "_BadLines", path: Path, num_before: int, num_tagged: int
) -> Lines:
    """The good ones of rows that are codes already. `num_before` rows of the file came before, `num_tagged` lines of
    other files."""
    what = "row" if rows.tags is None and not rows.shown else "line"
    ends = np.cumsum(rows.lengths)
    is_wrong = (rows.codes < 0) | (rows.codes > line_format.max_code)
    bad = np.zeros(len(rows.lengths), bool)
    bad[np.searchsorted(ends, np.flatnonzero(is_wrong), side="right")] = True
    if line_format.length is not None:
        bad |= (rows.lengths < line_format.length) & (not line_format.allow_short)
        bad |= rows.lengths > line_format.length
    bad[list(rows.faults)] = True
    for index in np.flatnonzero(bad).tolist():
        codes = rows.codes[ends[index] - rows.lengths[index] : ends[index]]
        reason = rows.faults.get(index) or _code_complaint(codes, line_format)
        line = rows.shown[index] if rows.shown else " ".join(map(str, codes.tolist())).encode()
        bad_lines.add(f"{path}, {what} {num_before + index + 1}: {reason}", line)
    good = ~bad
    if rows.tags is None:
        tags = _numbers(num_tagged + num_before, len(bad))
    else:
        tags = pa.array(rows.tags, pa.string())
    return Lines(tags.filter(pa.array(good)), rows.codes[np.repeat(good, rows.lengths)], rows.lengths[good])


def _code_complaint(codes: Int64[np.ndarray, " m"], line_format: LineFormat) -> str:
    wrong = codes[(codes < 0) | (codes > line_format.max_code)]
    if len(wrong):
        return f"the code {wrong[0]} is out of range, expected {line_format.range}"
    at_most = "at most " if line_format.allow_short else ""
    return f"{len(codes)} codes, expected {at_most}{line_format.length}"


def _numbers(start: int, num: int) -> pa.StringArray:
    """Tags for lines without: their numbers, counted from 0."""
    return pa.array([f"{number:08d}" for number in range(start, start + num)], pa.string())


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines, each block ending with a line feed, with the number of bytes read since the last block."""
    reported, num_lines, rest = 0, 0, b""
    with path.open("rb") as file, _decompressed(file) as stream:
        first = True
        while chunk := _read_chunk(stream, path, num_lines):
            if first:
                chunk, first = chunk.removeprefix(_UTF8_MARK), False
            cut = chunk.rfind(b"\n") + 1
            if not cut:
                rest += chunk
                if len(rest) > _MAX_LINE_BYTES:
                    raise InputError(
                        f"{path}, line {num_lines + 1}: longer than {_MAX_LINE_BYTES // 2**20} MB; "
                        "expected a text file with one picture a line."
                    )
                continue
            block, rest = rest + chunk[:cut], chunk[cut:]
            num_lines += block.count(b"\n")
            position = file.tell()
            yield position - reported, block
            reported = position
        if rest:
            yield file.tell() - reported, rest + b"\n"


@contextmanager
def _decompressed(file: IO[bytes]) -> Iterator[Any]:
    """The file's content, by what its first bytes say rather than by its name."""
    magic = file.read(8)
    file.seek(0)
    if magic.startswith(_XZ):
        with lzma.open(file) as stream:
            yield stream
        return
    for start, compression in _COMPRESSIONS.items():
        if magic.startswith(start):
            with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression) as stream:
                yield stream
            return
    yield file


def _read_chunk(stream: Any, path: Path, num_lines: int) -> bytes:
    try:
        return stream.read(_BLOCK_BYTES)
    except Exception as error:
        raise InputError(
            f"{path}: damaged or cut short after line {num_lines} ({first_line(error)}). Copy or compress it again."
        ) from error


class _Words(NamedTuple):
    """Where the words of a block stand. The first word of a line is its tag; an empty line has none, and no line if
    there are no tags."""

    text: UInt8[np.ndarray, " bytes"]
    line_starts: Int64[np.ndarray, " n"]
    line_ends: Int64[np.ndarray, " n"]
    num_words: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]  # how many words are codes
    tag_starts: Int64[np.ndarray, " tagged"]
    tag_ends: Int64[np.ndarray, " tagged"]
    code_starts: Int64[np.ndarray, " m"]
    code_ends: Int64[np.ndarray, " m"]


def _split(block: bytes, *, has_tags: bool) -> _Words:
    text = np.frombuffer(block, np.uint8)
    # 9 to 13 are tab, line feed, vertical tab, form feed, carriage return; below 9 the subtraction wraps to 247 and up.
    is_space = (text == 32) | ((text - np.uint8(9)) < 5)
    edges = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    if not is_space[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[0::2], edges[1::2]  # the block ends with white space, so every word has its end
    line_ends = np.flatnonzero(text == 10)
    words_so_far = np.searchsorted(starts, line_ends)
    num_words = np.diff(words_so_far, prepend=0)
    tags = (words_so_far - num_words)[num_words > 0] if has_tags else np.zeros(0, np.int64)
    is_code = np.ones(len(starts), bool)
    is_code[tags] = False
    return _Words(
        text=text,
        line_starts=np.concatenate([[0], line_ends[:-1] + 1]),
        line_ends=line_ends,
        num_words=num_words,
        lengths=np.maximum(num_words - has_tags, 0),
        tag_starts=starts[tags],
        tag_ends=ends[tags],
        code_starts=starts[is_code],
        code_ends=ends[is_code],
    )


def _parse(
    block: bytes, words: _Words, line_format: LineFormat, num_before: int
) -> tuple[Lines, Bool[np.ndarray, " lines"]]:
    """The good lines, and which of all lines are bad. `num_before` lines came before."""
    codes, is_number = _decimals(words.text, words.code_starts, words.code_ends)
    is_wrong = ~is_number | (codes > line_format.max_code)
    bad = words.num_words == 0
    if line_format.length is not None:
        too_short = (words.lengths < line_format.length) & (not line_format.allow_short)
        bad |= too_short | (words.lengths > line_format.length)
    if is_wrong.any():
        bad[np.searchsorted(np.cumsum(words.lengths), np.flatnonzero(is_wrong), side="right")] = True
    if not _is_utf8(block):
        bad |= [not _is_utf8(block[start:end]) for start, end in zip(words.line_starts, words.line_ends, strict=True)]
    tags = _strings(words.text, words.tag_starts, words.tag_ends)
    tags = tags if line_format.tags else _numbers(num_before, len(bad))
    if not bad.any():
        return Lines(tags, codes, words.lengths), bad
    good = ~bad
    tags = tags.filter(pa.array(good[words.num_words > 0] if line_format.tags else good))
    return Lines(tags, codes[np.repeat(good, words.lengths)], words.lengths[good]), bad


def _decimals(
    text: UInt8[np.ndarray, " bytes"], starts: Int64[np.ndarray, " m"], ends: Int64[np.ndarray, " m"]
) -> tuple[Int64[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """The words from `starts` to `ends` read as decimal integers, and which of them are such, digit by digit from the
    last; every round goes on with the words that have a further digit."""
    num_digits = ends - starts
    values = np.zeros(len(starts), np.int64)
    is_number = num_digits <= _MAX_DIGITS
    going_on: Any = slice(None)
    for place in range(min(int(num_digits.max(initial=0)), _MAX_DIGITS)):
        if place >= num_digits.min():
            going_on = np.flatnonzero(num_digits > place)
        digits = text[ends[going_on] - (place + 1)] - np.uint8(ord("0"))  # wraps to above 9 for what is no digit
        values[going_on] += digits * np.int64(10**place)
        if digits.max() > 9:
            is_number[going_on] &= digits <= 9
    return values, is_number


def _is_utf8(block: bytes) -> bool:
    if block.isascii():
        return True
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def _strings(
    text: UInt8[np.ndarray, " bytes"], starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]
) -> pa.StringArray:
    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
    return pa.StringArray.from_buffers(len(starts), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text[places]))


def _complaint(line: bytes, line_format: LineFormat) -> tuple[int, str]:
    """The column (in characters, from 1) and what is wrong there, for a line known to be bad."""

    def column(place: int) -> int:
        return len(line[:place].decode(errors="replace")) + 1

    try:
        line.decode()
    except UnicodeDecodeError as error:
        return column(error.start), f"the byte 0x{line[error.start]:02x} is not UTF-8"
    words = list(_WORD.finditer(line))
    num_tags = int(line_format.tags)
    if not words:
        return 1, "an empty line, expected a tag and its codes" if num_tags else "an empty line, expected codes"
    for word in words[num_tags:]:
        shown = word[0][:40].decode(errors="replace")
        if not re.fullmatch(rb"-?[0-9]+", word[0]):
            why = _why_no_code(word[0], line)
            return column(word.start()), f"the word {shown!r} among the codes, expected integers written in digits{why}"
        if not word[0].isdigit() or len(word[0]) > _MAX_DIGITS or int(word[0]) > line_format.max_code:
            return column(word.start()), f"the code {shown} is out of range, expected {line_format.range}"
    num_codes, length = len(words) - num_tags, line_format.length
    assert length is not None and num_codes != length
    first_wrong = words[length + num_tags].start() if num_codes > length else words[-1].end()
    at_most = "at most " if line_format.allow_short else ""
    after = " after the tag" if num_tags else ""
    why = "; separate codes by spaces, not commas" if num_codes == 0 and b"," in line else ""
    return column(first_wrong), f"{num_codes} codes{after}, expected {at_most}{length}{why}"


def _why_no_code(word: bytes, line: bytes) -> str:
    """What may be the matter with the first word that is no code, in words that follow on."""
    if b"\r" in line.rstrip(b"\r"):
        return "; its lines end in carriage returns alone: write line feeds (tr '\\r' '\\n')"
    if line.startswith(b'{"'):
        return "; a file of JSON lines is known by its name, .jsonl"
    if word.strip(b"[](),;").isdigit():
        return "; separate codes by spaces alone (tr -d '[](),')"
    if re.fullmatch(rb"[0-9]+\.[0-9eE+]*", word):
        return ", not as fractions"
    return ""


# ---- bad lines ----


class _BadLines:
    """Counts bad lines and writes each with its place to a side file, until there are more than allowed."""

    def __init__(self, num_allowed: int, path: Path | None, advice: str):
        self.count = 0
        self._advice = advice
        self._num_allowed = num_allowed
        self._path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "_BadLines":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, complaint: str, line: bytes) -> None:
        self.count += 1
        if self.count > self._num_allowed:
            advice = f"It is one more than --skip-bad {self._num_allowed}; the others are listed in {self._path}."
            raise InputError(f"{complaint}. {advice if self._num_allowed else self._advice}")
        if self._file is None:
            assert self._path is not None
            self._file = self._path.open("wb")
        self._file.write(f"{complaint}\t".encode() + line + b"\n")


# ---- import ----


class LinesReport(NamedTuple):
    """What came of an import. `length` is None if the lines differ in it. A duplicate has the codes of an earlier
    line, whatever its tag; it is written all the same (see `split_rows`)."""

    num_lines: int
    num_bad: int
    num_duplicates: int
    length: int | None
    vocab_size: int
    bad_lines_path: Path | None


def import_lines(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    vocab_size: int | None = None,
    length: int | None = None,
    skip_bad: int = 0,
    *,
    allow_short: bool = False,
    tags: bool = True,
    force: bool = False,
    show_progress: bool = False,
) -> LinesReport:
    """Writes the lines of one or several files, in order, as a token table (see `tokens.py`) with empty captions.

    Vocabulary size and length are found from the data unless given, but a vocabulary above 2^20 must be; see
    `LineFormat` for them, `allow_short` and `tags`. Warns if every tag is a number: without tags, it would be a code.
    Up to `skip_bad` bad lines are left out and listed in `<output without suffix>.bad.txt`: place and reason, a tab,
    the line as it was. One more raises InputError, and nothing is written but that list; so do lines of tags alone,
    unless `allow_short`. The table's metadata holds `image_vocab_size`, `image_length` and `num_duplicates`.
    """
    paths, output = _paths(paths), Path(output)
    refuse_existing([output], force=force)
    line_format = LineFormat(
        vocab_size=vocab_size or MAX_UNTOLD_VOCAB_SIZE,
        length=length,
        allow_short=allow_short,
        tags=tags,
        is_told=vocab_size is not None,
    )
    bad_lines_path = output.with_suffix(".bad.txt") if skip_bad else None
    if bad_lines_path is not None:
        bad_lines_path.unlink(missing_ok=True)  # an earlier import's list would pass for this one's
    advice = "Mend the line, or set bad lines aside with --skip-bad (skip_bad=N)."
    metadata: dict[str, Any] = {}
    seen = _TagsSeen(paths)
    with (
        _hashes_file(output) as hashes_file,
        _BadLines(skip_bad, bad_lines_path, advice) as bad_lines,
        stage("reading lines", _megabytes(paths), unit="MB", show=show_progress) as progress,
        # Reading and parsing run in a thread beside the writing; both are array code that leaves Python's lock free.
        closing(prefetch(_read(paths, line_format, bad_lines, seen))) as blocks,
    ):
        found = _Found(hashes_file, output)

        def rows() -> Iterator[pa.RecordBatch]:
            for num_bytes, lines in blocks:
                found.add(lines)
                offsets = pa.array(np.concatenate([[0], np.cumsum(lines.lengths)]), pa.int32())
                yield token_rows(lines.tags, pa.ListArray.from_arrays(offsets, pa.array(lines.codes)))
                progress.advance(num_bytes / 1e6, f"{found.num_lines:,} lines")
            if not found.num_lines:
                raise InputError(f"{', '.join(map(str, paths))}: no good line, nothing to import.")
            if found.max_code < 0 and not allow_short:
                raise InputError(
                    f"{', '.join(map(str, paths))}: tags alone, expected a tag and its codes on each line, with spaces "
                    "between them and nothing else: other separators are to be replaced (tr ',;|' ' ')."
                )
            seen.warn()
            metadata.update(
                image_vocab_size=vocab_size or found.max_code + 1,
                image_length=found.length,
                num_duplicates=found.num_duplicates(),
            )

        write_token_table(output, rows(), metadata, force=force)
    return LinesReport(
        num_lines=found.num_lines,
        num_bad=bad_lines.count,
        num_duplicates=metadata["num_duplicates"],
        length=metadata["image_length"],
        vocab_size=metadata["image_vocab_size"],
        bad_lines_path=bad_lines_path if bad_lines.count else None,
    )


@contextmanager
def _hashes_file(output: Path) -> Iterator[IO[bytes]]:
    with temporary_files(output):
        file = tempfile.TemporaryFile(prefix="smalti-hashes-")  # noqa: SIM115 (closed below, whatever it says)
    try:
        yield file
    finally:
        with suppress(OSError):  # what a full disk kept in its buffer is not needed any more
            file.close()


class _Found:
    """What the lines tell when all are read. Their hashes wait in a temporary file, so that memory stays flat."""

    def __init__(self, hashes_file: IO[bytes], output: Path) -> None:
        self.num_lines = 0
        self.max_code = -1
        self._lengths: set[int] = set()  # at most two: one length is worth knowing, others are just "several"
        self._hashes_file = hashes_file
        self._output = output

    def add(self, lines: Lines) -> None:
        self.num_lines += len(lines.lengths)
        self.max_code = max(self.max_code, int(lines.codes.max(initial=-1)))
        if len(self._lengths) < 2 and len(lines.lengths):
            self._lengths |= {int(lines.lengths.min()), int(lines.lengths.max())}
        with temporary_files(self._output):
            self._hashes_file.write(code_hashes(lines.codes, lines.lengths).tobytes())

    @property
    def length(self) -> int | None:
        return next(iter(self._lengths)) if len(self._lengths) == 1 else None

    def num_duplicates(self) -> int:
        with temporary_files(self._output):
            self._hashes_file.flush()
        hashes = np.memmap(self._hashes_file, np.uint64, mode="r+")
        hashes.sort()
        return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def _megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


# ---- duplicates and splits ----


def code_hashes(codes: Int64[np.ndarray, " m"], lengths: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A 64-bit hash of each sequence, given one after the other; it depends on nothing but the codes and their order.
    Among 5 million different sequences the chance that any two agree is one in a million."""
    hashes = np.full(len(lengths), 0x9E3779B97F4A7C15, np.uint64)
    if len(lengths) and lengths.min() == lengths.max():
        for column in np.ascontiguousarray(codes.reshape(len(lengths), -1).T).view(np.uint64):
            hashes = _mixed(hashes, column)
        return _mixed(hashes, lengths.astype(np.uint64))
    starts = np.cumsum(lengths) - lengths
    going_on = np.arange(len(lengths))
    for place in range(lengths.max(initial=0)):
        going_on = going_on[lengths[going_on] > place]
        hashes[going_on] = _mixed(hashes[going_on], codes[starts[going_on] + place].astype(np.uint64))
    return _mixed(hashes, lengths.astype(np.uint64))


def _mixed(hashes: UInt64[np.ndarray, " n"], values: UInt64[np.ndarray, " #n"]) -> UInt64[np.ndarray, " n"]:
    """A step that is one-to-one in `hashes`, and carries every bit upwards (product) and downwards (shift). The
    multiplier is that of Steele, Lea and Flood 2014 (SplitMix)."""
    hashes = (hashes ^ values) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(31))


def split_rows(
    table: TokenTable, held_out: float | int, seed: int = 0
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """Row numbers to keep and to hold out, both ascending, so that rows with equal image tokens are on the same side.

    `held_out` is a share in (0, 1), met on average, with which a sequence stays on its side when rows are added; or a
    number of rows, met exactly unless that would part equal rows (then a few more). Raises InputError if either side
    would be empty.
    """
    values = np.empty(len(table), np.uint64)
    salt = _mixed(np.zeros(1, np.uint64), np.array([seed % 2**64], np.uint64))
    for start in range(0, len(table), ROWS_PER_GROUP):
        batch = table.batch(np.arange(start, min(start + ROWS_PER_GROUP, len(table))))
        codes = batch.image_tokens[batch.image_tokens != PAD]
        values[start : start + len(batch.image_lengths)] = _mixed(code_hashes(codes, batch.image_lengths), salt)
    is_held = np.zeros(len(table), bool)
    if isinstance(held_out, int) and 0 < held_out <= len(table):
        is_held = values <= np.partition(values, held_out - 1)[held_out - 1]
    elif 0 < held_out < 1:
        is_held = values < np.uint64(held_out * 2**64)
    if is_held.all() or not is_held.any():
        raise InputError(
            f"held_out {held_out} of {len(table)} rows would leave one side of the split empty: "
            "give a share between 0 and 1, or a number of rows."
        )
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


# ---- writing ----


def write_lines(path: str | Path, blocks: Iterable[Lines], *, force: bool = False) -> int:
    """Writes lines in the order given and returns their number; a name ending in .gz or .zst compresses. Raises
    InputError if a tag is empty or has white space, or if the file exists and `force` is not set."""
    num_lines = 0
    with new_file(path, force=force) as temporary, _compressed(temporary, Path(path).suffix) as stream:
        for lines in blocks:
            stream.write("".join(_formatted(lines)).encode())
            num_lines += len(lines.lengths)
    return num_lines


@contextmanager
def _compressed(path: Path, suffix: str) -> Iterator[Any]:
    """A new file, compressed as a name that ends so says, with a checksum of the content. Arrow writes none into zstd,
    where one flipped bit can then be read as other codes; it verifies one that is there."""
    if suffix == ".zst":
        try:
            from zstandard import ZstdCompressor
        except ImportError:
            warnings.warn(
                "without the package zstandard, .zst is written without a checksum, so that damage to the file may "
                "pass unseen; pip install 'smalti[zstd]', or write .gz.",
                InputWarning,
                stacklevel=4,
            )
        else:
            compressor = ZstdCompressor(write_checksum=True)
            with path.open("wb") as file, compressor.stream_writer(file, closefd=False) as stream:
                yield stream
            return
    with pa.output_stream(str(path), compression=_SUFFIXES.get(suffix)) as stream:
        yield stream


def _formatted(lines: Lines) -> Iterator[str]:
    codes = list(map(str, lines.codes.tolist()))
    ends = np.cumsum(lines.lengths)
    places = zip((ends - lines.lengths).tolist(), ends.tolist(), strict=True)
    for tag, (start, end) in zip(lines.tags.to_pylist(), places, strict=True):
        if not _WORD.fullmatch(tag.encode()):
            raise InputError(
                f"the tag {tag!r} is empty or has white space, which a line cannot hold; rename the picture."
            )
        yield " ".join([tag, *codes[start:end]]) + "\n"


def table_lines(
    table: TokenTable,
    rows: Integer[np.ndarray, " n"] | None = None,
    *,
    before: Sequence[int] = (),
    after: Sequence[int | str] = (),
    code_offset: int = 0,
    num_codes: int | None = None,
) -> Iterator[Lines]:
    """The image tokens of a table (of these rows, in this order) as lines tagged with their keys, for `write_lines`.

    Every code is raised by `code_offset` and the line put between the codes `before` and `after`, as special codes
    stand in foreign files; DISTINCT among those after it stands for how many different codes the picture has.
    `num_codes` cuts what results to its first so many: prefixes to be completed. Raises ValueError for a special or an
    offset below 0, or another word than DISTINCT.
    """
    for special in (*before, *after, code_offset):
        if special != DISTINCT and (isinstance(special, str) or not 0 <= special < _MAX_VOCAB_SIZE):
            raise ValueError(
                f"{special!r} cannot stand in a line; specials are integers of 0 to {_MAX_VOCAB_SIZE - 1}, or "
                f"{DISTINCT!r}."
            )
    if table.max_image_token + code_offset >= _MAX_VOCAB_SIZE:
        raise ValueError(
            f"the code {table.max_image_token} raised by {code_offset} is beyond {_MAX_VOCAB_SIZE - 1}, the largest "
            "that is read from lines; give a smaller offset."
        )
    rows = np.arange(len(table)) if rows is None else rows
    for start in range(0, len(rows), ROWS_PER_GROUP):
        here = rows[start : start + ROWS_PER_GROUP]
        batch = table.batch(here)
        parts: list[Shaped[np.ndarray, "n P"]] = [
            *(_special(special, batch.image_tokens) for special in before),
            np.where(batch.image_tokens == PAD, PAD, batch.image_tokens + code_offset),
            *(_special(special, batch.image_tokens) for special in after),
        ]
        codes = np.concatenate(parts, axis=1)
        is_code = codes != PAD
        if num_codes is not None:
            is_code &= np.cumsum(is_code, axis=1) <= num_codes
        yield Lines(pa.array(table.keys(here), pa.string()), codes[is_code], is_code.sum(axis=1))


def _special(special: int | str, codes: Int64[np.ndarray, "n L"]) -> Int64[np.ndarray, "n 1"]:
    if special != DISTINCT:
        return np.full((len(codes), 1), special, np.int64)
    ordered = np.sort(codes, axis=1, kind="stable")
    is_new = ordered != PAD
    is_new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return is_new.sum(axis=1, keepdims=True)

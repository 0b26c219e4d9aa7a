"""Tables of text as people have them: CSV and TSV, JSON lines, one JSON (a list of objects, or COCO's captions).

Nothing is guessed in silence: where the delimiter, the header line or the encoding is not what the file's name says, it
is recognised and said in a warning, or asked for. Every error names the file and the line.
"""

import csv
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smalti.errors import InputError, InputWarning, first_line, shortened
from smalti.file_kinds import EMPTY, kind_of_bytes

CAPTION_NAMES = ("caption", "captions", "text", "prompt")
"""What a column of captions is called; capital letters do not matter."""
OTHER_CAPTION_NAMES = ("comment", "sentence", "description", "txt")
"""What it may also be called, where none has a name of the first kind."""
FILE_NAMES = ("file_name", "filename", "file", "image", "path", "image_name", "image_path", "filepath", "file_path")
"""What the column that names the pictures is called, the likeliest first."""
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
_DELIMITERS = {",": "commas", ";": "semicolons", "|": "bars", "\t": "tabs"}
_UNQUOTED = "\t|"
"""In files with these delimiters quotes are plain characters, as in CC3M's and Flickr30k's."""
_PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Row(NamedTuple):
    where: str
    """The file, and the line or entry in it."""
    values: dict[str, Any]


class TextTable(NamedTuple):
    """The columns of a table, and its rows, read anew at every call."""

    path: Path
    columns: list[str]
    rows: Callable[[], Iterator[Row]]
    has_header: bool | None = True
    """None: the first line is taken for one, but holds no name that is known."""


def open_text_table(path: Path | str, *, wanted: str | None = None, delimiter: str | None = None) -> TextTable:
    """The table in a file. `wanted` is a column that is looked for; in a CSV or TSV without a header line the columns
    are called by their numbers from 1. Raises InputError for what cannot be read, here or as rows come."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            kind = kind_of_bytes(file.read(512))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give the path of a table.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; give the path of a table.") from error
    if kind is not None and kind is not EMPTY:
        raise InputError(
            f"{path} is {kind.what}, not a {path.suffix} table{f': {kind.advice}' if kind.advice else ''}."
        )
    if path.suffix.lower() == ".jsonl":
        return _objects(path, lambda: _json_lines(path))
    if path.suffix.lower() == ".json":
        found = _json_rows(path)
        return _objects(path, lambda: iter(found))
    return _open_separated(path, wanted, delimiter)


def find_column(columns: Sequence[str], wanted: str | None, where: Path | str, *, more: str = "") -> str:
    """The column of captions among `columns`. Raises InputError listing them, ending with `more`."""
    name_one = f"name one of them by --caption-column.{more}"
    has = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{where} has no column {wanted!r}; it has {has}: {name_one}")
        if columns.count(wanted) > 1:
            raise InputError(f"{where} has several columns {wanted!r}; it has {has}: rename all but one.")
        return wanted
    if len(columns) == 1:
        return columns[0]
    for names in (CAPTION_NAMES, OTHER_CAPTION_NAMES):
        found = [name for name in columns if name.lower() in names]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{where}: several columns may be the captions; it has {has}: {name_one}")
    raise InputError(f"{where}: no column is known to be the captions; it has {has}: {name_one}")


def caption_column(table: TextTable, wanted: str | None, *, besides: str | None = None) -> str:
    """The column of captions of a table; `besides` is one that it is not."""
    columns = [name for name in table.columns if name != besides]
    more = f" {MAYBE_NO_HEADER}" if table.has_header is None else f" {NO_HEADER}" if table.has_header is False else ""
    if table.has_header is None and wanted is None and len(columns) == 1:
        raise InputError(
            f"{table.path}: its one column is called {shortened(columns[0])!r}, which need not be captions: name it by "
            f"--caption-column, or call it caption.{more}"
        )
    return find_column(columns, wanted, table.path, more=more)


MAYBE_NO_HEADER = "If the first line is a row already, put a header line with the names of the columns before it."
NO_HEADER = (
    "Its first line looks like a row, not like names, so columns go by their numbers; if it is the names, rename them."
)


# CSV and TSV -----------------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """How the lines of a CSV or TSV file are read."""

    delimiter: str
    skips_spaces: bool
    encoding: str

    def reader(self, lines: Iterator[str]) -> Any:
        quoting = csv.QUOTE_NONE if self.delimiter in _UNQUOTED else csv.QUOTE_MINIMAL
        return csv.reader(
            lines, delimiter=self.delimiter, quoting=quoting, skipinitialspace=self.skips_spaces, strict=True
        )


def _open_separated(path: Path, wanted: str | None, delimiter: str | None) -> TextTable:
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise InputError(f"the delimiter {delimiter!r} is not one character; give ',', ';', '|' or a tab.")
    encoding = _encoding(path)
    first = next(_lines(path, encoding), "")
    if "\0" in first:
        raise InputError(f"{path}, line 1: it holds null bytes, as UTF-16 without its mark does; save it as UTF-8.")
    form = _form(path, first, wanted, delimiter, encoding)
    header = [name.strip() for name in next(_parsed(path, form), (1, [""]))[1]]
    if header == [""]:
        raise InputError(f"{path} is empty; expected a header line with the names of the columns.")
    names, is_header = _names(path, header, form, wanted)
    # A file of one column is often written without quotes round its commas: then every line is a value.
    is_one_column = len(header) == 1 and is_header is not False and form.delimiter not in _UNQUOTED
    if is_one_column and any(len(fields) > 1 for _, fields in _parsed(path, form)):
        return TextTable(path, names, lambda: _whole_lines(path, encoding, names[0]), is_header)
    return TextTable(path, names, lambda: _separated_rows(path, form, names, is_header is not False), is_header)


def _form(path: Path, first: str, wanted: str | None, delimiter: str | None, encoding: str) -> _Form:
    """The form of a file, by its name unless its header line is one field then and several otherwise."""
    chosen = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    if delimiter is None and chosen not in first:
        others = [other for other in _DELIMITERS if other in first]
        known = [other for other in others if _known(_split(first, other), wanted)]
        if len(known) == 1:
            chosen = known[0]
            _say(f"{path}: its fields are separated by {_DELIMITERS[chosen]}, as its header line tells.")
        elif others:
            raise InputError(
                f"{path}: the header line {shortened(first.strip())!r} is one field if {_DELIMITERS[chosen]} separate "
                f"fields; say what does: --delimiter {' or '.join(map(repr, others))}, or {chosen!r} if it is one."
            )
    fields = _split(first, chosen, strip=False)
    skips = len(fields) > 1 and all(field.startswith(" ") for field in fields[1:])
    return _Form(chosen, skips, encoding)


def _split(line: str, delimiter: str, *, strip: bool = True) -> list[str]:
    return [field.strip(' "\r\n') if strip else field for field in line.split(delimiter)]


def _known(fields: Sequence[str], wanted: str | None) -> bool:
    """Whether names that are looked for are among these."""
    lower = [field.lower() for field in fields]
    return wanted in fields or any(name in lower for name in (*CAPTION_NAMES, *OTHER_CAPTION_NAMES, *FILE_NAMES))


def _names(path: Path, first: list[str], form: _Form, wanted: str | None) -> tuple[list[str], bool | None]:
    """The columns' names, and whether the first line holds them; None if that is not sure."""
    if _known(first, wanted):
        return first, True
    numbers = [str(i + 1) for i in range(len(first))]
    if wanted in numbers:
        _say(f"{path}: its first line, {shortened(' '.join(first))!r}, is taken for a row; the columns have no names.")
        return numbers, False
    if not any(_is_value(field) for field in first):
        return first, None
    if form.delimiter == "\t" and len(first) == 2 and "://" in first[1] and wanted is None:
        _say(f"{path}: it has no header line; its columns are taken for caption and url, as CC3M's are.")
        return ["caption", "url"], False
    return numbers, False


def _is_value(field: str) -> bool:
    """Whether a field is surely no name of a column: an address, a number, a picture's file."""
    try:
        float(field)
    except ValueError:
        return "://" in field or field.lower().endswith(_PICTURE_ENDINGS)
    return True


def _separated_rows(path: Path, form: _Form, names: list[str], has_header: bool) -> Iterator[Row]:
    num_joined, first_joined, last_line = 0, 0, 0
    for line, fields in _parsed(path, form):
        start, last_line = last_line + 1, line
        if (has_header and start == 1) or not fields:  # the header line, and empty ones
            continue
        if len(fields) != len(names):
            advice = (
                "no field can hold the delimiter or a line break"
                if form.delimiter in _UNQUOTED
                else "put text with delimiters or line breaks in quotes"
            )
            raise InputError(
                f"{path}, line {line}: the row has {len(fields)} fields, the header {len(names)}; {advice}."
            )
        if line > start:
            num_joined, first_joined = num_joined + 1, first_joined or start
        yield Row(f"{path}, line {start}", dict(zip(names, fields, strict=True)))
    if num_joined:
        _say(
            f"{path}: {num_joined} of its rows have line breaks within quotes, the first from line {first_joined} on; "
            "if quotes are plain characters there, save it with tabs as .tsv, where they are."
        )


def _parsed(path: Path, form: _Form) -> Iterator[tuple[int, list[str]]]:
    """The fields of every row, with the number of its last line."""
    reader, start = form.reader(_lines(path, form.encoding)), 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason:
                reason = "a quote that opens there is never closed"
            elif "field limit" in reason:
                reason = f"a field is longer than {csv.field_size_limit():,} letters; is a quote never closed?"
            raise InputError(
                f"{path}, line {start}: the row cannot be read ({reason}); quotes within text are doubled, or save the "
                "table with tabs as .tsv, where quotes are plain characters."
            ) from error
        if fields is None:
            return
        yield reader.line_num, fields
        start = reader.line_num + 1


def _whole_lines(path: Path, encoding: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, encoding), 1):
        if number > 1:
            yield Row(f"{path}, line {number}", {name: line.rstrip("\r\n")})


# JSON ------------------------------------------------------------------------------------------------------------


def _objects(path: Path, rows: Callable[[], Iterator[Row]]) -> TextTable:
    """A table of objects; its columns are all the names that stand in any of them."""
    columns = dict.fromkeys(name for row in rows() for name in row.values)
    return TextTable(path, list(columns), rows)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, _encoding(path)), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _object(_loaded(line, where), where))


def _json_rows(path: Path) -> list[Row]:
    content = _loaded("".join(_lines(path, _encoding(path))), str(path))
    if isinstance(content, list):
        wheres = [f"{path}, entry {number}" for number in range(len(content))]
        return [Row(where, _object(row, where)) for where, row in zip(wheres, content, strict=True)]
    if is_coco(content):
        return _coco_rows(path, content)
    found = ", ".join(map(repr, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    raise InputError(
        f"{path} holds {found}; expected a list of objects, or COCO's captions (images and annotations with captions)."
    )


def is_coco(content: Any) -> bool:
    """Whether a JSON file is laid out as COCO's annotations are."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    )


def _coco_rows(path: Path, content: dict[str, Any]) -> list[Row]:
    """A row for every annotation: a picture has as many rows as captions."""
    images = {
        image["id"]: image.get("file_name")
        for image in content["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), int | str)
    }
    rows = []
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path}, annotation {number}"
        annotation = _object(annotation, where)
        if "caption" not in annotation:
            raise InputError(f"{where} has no caption but {', '.join(annotation)}; give COCO's captions_*.json.")
        picture = annotation.get("image_id")
        name = images.get(picture) if isinstance(picture, int | str) else None
        rows.append(Row(where, {FILE_NAMES[0]: name, "caption": annotation["caption"]}))
    return rows


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {first_line(error)}.") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where} holds {type(row).__name__}; expected an object.")
    return row


# Lines of text ---------------------------------------------------------------------------------------------------


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends. Raises InputError naming the line that is not UTF-8."""
    for line in _lines(path, _encoding(path)):
        yield line.rstrip("\r\n")


def _encoding(path: Path) -> str:
    """UTF-16 where the file begins with its mark, as Excel's "Unicode text" does; else UTF-8, with a mark or not."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _lines(path: Path, encoding: str) -> Iterator[str]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield from file
    except UnicodeError as error:
        raise InputError(_not_text(path, encoding)) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _not_text(path: Path, encoding: str) -> str:
    if encoding == "utf-16":
        return f"{path} begins as UTF-16 text and does not go on as such; save it as UTF-8."
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: it is not UTF-8 text (byte {error.start} of the line is "
                    f"0x{line[error.start]:02x}); save it as UTF-8: iconv -f latin1 -t utf-8, if it is Latin-1."
                )
    return f"{path} is not UTF-8 text; save it as UTF-8."


def _say(message: str) -> None:
    warnings.warn(message, InputWarning, stacklevel=3)

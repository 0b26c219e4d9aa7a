"""JSON and YAML from files and settings, within bounds: whatever a document holds, reading it ends soon.

Both languages can nest a value so deep that who walks it runs out of stack, YAML can name a list in a list in a list
until a page stands for terabytes, and each library has errors of its own. So every document is read here. What comes
back is dicts, lists, text, numbers of 64 bits, truth values and None, nested at most MAX_DEPTH deep.
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from smalti.errors import InputError, first_line, shortened

Config = TypeVar("Config")
MAX_DEPTH = 64
"""No document of ours or of those we read nests deeper than ten."""
MAX_JSON_BYTES = 256 * 2**20
MAX_YAML_BYTES = 2**20
"""YAML is read by a slow library: a second for each 100 KB."""
MAX_VALUES = 1_000_000
"""Values of a YAML document, counted wherever an alias repeats them."""


def parse_json(text: str | bytes, where: Path | str, mend: str, *, kind: type = dict) -> Any:
    """The value written as JSON, a dict unless `kind` says otherwise. Raises InputError naming `where` and ending with
    `mend`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = "it is empty" if not text.strip() else _reason(error)
        raise InputError(f"{where} is not JSON: {found}; {mend}.") from error
    return _checked(value, where, mend, kind)


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but what nests beyond MAX_DEPTH is refused where it does: its scanner takes time in
    proportion to the square of the depth."""

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        self._refuse_depth()
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._refuse_depth()
        return super().add_indent(column)

    def _refuse_depth(self) -> None:
        if self.flow_level + len(self.indents) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"values are nested more than {MAX_DEPTH} deep", problem_mark=self.get_mark()
            )


def parse_yaml(text: str, where: Path | str, mend: str, *, loader: type = BoundedLoader, kind: type = dict) -> Any:
    """The value written as YAML, a dict unless `kind` says otherwise. Raises InputError naming `where`, the line, and
    ending with `mend`."""
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{where} has {len(text):,} characters, at most {MAX_YAML_BYTES:,} are read as YAML; {mend}.")
    try:
        value = yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: not YAML: {shortened(str(error.problem), 200)}; {mend}.") from error
    # PyYAML lets pass what the types of Python raise for a tag that does not fit: `!!bool abc` is a KeyError.
    except Exception as error:
        raise InputError(f"{where} is not YAML: {_reason(error)}; {mend}.") from error
    return _checked(value, where, mend, kind)


def read_json(path: Path, mend: str, *, kind: type = dict) -> Any:
    """The JSON in a file, as `parse_json`. Raises InputError naming the file and ending with `mend`."""
    return parse_json(_read(path, mend, MAX_JSON_BYTES), path, mend, kind=kind)


def read_yaml(path: Path, mend: str, *, loader: type = BoundedLoader) -> Any:
    """The YAML in a file, as `parse_yaml`. Raises InputError naming the file and ending with `mend`."""
    content = _read(path, mend, MAX_YAML_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); {mend}.") from error
    return parse_yaml(text, path, mend, loader=loader)


def read_text_list(path: Path, mend: str) -> list[str]:
    """The entries of a JSON list of text, or else the lines of a text file that are not empty. Raises InputError naming
    the file and ending with `mend`."""
    if path.suffix == ".json":
        entries = read_json(path, mend, kind=list)
        if odd := [entry for entry in entries if not isinstance(entry, str)]:
            raise InputError(f"{path} holds {shortened(repr(odd[0]))}, expected text; {mend}.")
        return entries
    try:
        lines = _read(path, mend, MAX_JSON_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); {mend}.") from error
    return [line.strip() for line in lines if line.strip()]


def config_of(config_class: type[Config], values: Any, where: Path | str) -> Config:
    """The config dataclass of JSON or YAML values, of which each must be of the field's own type: no text for a number,
    no number for text. Raises InputError naming `where`, the field and what was expected."""
    from pydantic import ValidationError

    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of names to values, found {_name(values)}.")
    try:
        # As JSON, whose strict rules take a list for a tuple and text for a path.
        config: Any = _adapter(config_class).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "config"
        raise InputError(f"{where}: {field}: {first['msg']}; found {shortened(repr(first['input']))}.") from error
    known = json.loads(json.dumps(asdict(config), default=str))
    if unknown := _unknown_keys(values, known):
        raise InputError(f"{where}: unknown field {shortened(unknown[0])}; known are {', '.join(known)}.")
    return config


@cache
def _adapter(config_class: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(config_class)


def _unknown_keys(given: dict[str, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    unknown = []
    for name, value in given.items():
        if name not in known:
            unknown.append(prefix + name)
        elif isinstance(value, dict) and isinstance(known[name], dict):
            unknown += _unknown_keys(value, known[name], f"{prefix}{name}.")
    return unknown


def _read(path: Path, mend: str, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise InputError(f"cannot read {path}: {reason}; {mend}.") from error
    if len(content) > most:
        raise InputError(f"{path} is larger than {most:,} bytes, more than any such file has; {mend}.")
    return content


def _reason(error: Exception) -> str:
    return "it nests too deep" if isinstance(error, RecursionError) else first_line(error)


def _checked(value: Any, where: Path | str, mend: str, kind: type) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{where} holds {_name(value)}, expected {_name(kind())}; {mend}.")
    num_values, waiting = 0, [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        num_values += 1
        if fault := _fault(item, depth, num_values):
            raise InputError(f"{where}: {fault}; {mend}.")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set):
            waiting += [(part, depth + 1) for part in item]
    return value


def _fault(item: Any, depth: int, num_values: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"values are nested more than {MAX_DEPTH} deep"
    if num_values > MAX_VALUES and depth:  # text bounds JSON, aliases do not bound YAML
        return f"it holds more than {MAX_VALUES:,} values"
    if isinstance(item, dict) and (odd := [key for key in item if not isinstance(key, str | int | float | None)]):
        return f"a name is {shortened(repr(odd[0]))}, expected text"
    if isinstance(item, int) and not -(2**63) <= item < 2**63:
        return f"the number {shortened(str(item), 30)} is beyond 64 bits"
    if isinstance(item, str) and not item.isascii() and any("\ud800" <= letter <= "\udfff" for letter in item):
        return f"the text {shortened(ascii(item), 60)} is not valid Unicode"
    return None


def _name(value: Any) -> str:
    names = {dict: "a mapping of names to values", list: "a list", str: "text", type(None): "nothing", bool: "a bool"}
    return names.get(type(value), f"a {type(value).__name__}")

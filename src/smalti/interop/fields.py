"""Strict reading of foreign configs: every field is taken, passed over by name, or an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType
from typing import Any

from smalti.errors import InputError, shortened

REQUIRED = object()
HEADER = ("peer", "peer_commit", "class", "image_range", "smallest_nearest_code_gap", "distinct_codes_used")
"""What reference configs say beside the sizes. Where sizes stand in sections, whatever else stands beside the
sections is passed over; where they stand bare, these fields are and others are an error."""


@contextmanager
def sizes_go_together(where: str = "config") -> Iterator[None]:
    """What a config of ours says of sizes that cannot be, as an InputError that names the foreign config."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


class Fields:
    """One section of a foreign config. Take what is needed, then call `finish`, which rejects the rest."""

    def __init__(self, values: object, where: str):
        if not isinstance(values, dict):
            raise InputError(f"{where} is {shortened(repr(values))}; expected a mapping of names to values.")
        self.values = values
        self.where = where
        self.taken: set[str] = set()

    def take(self, name: str, kind: type | UnionType, default: Any = REQUIRED) -> Any:
        """The value of a field, checked to be of `kind`; whole floats pass as int and ints as float."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise InputError(f"{self.where} has no field {name!r}; it fixes the network and has no default.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(
                f"{self.where}.{name} is {shortened(repr(value))}; expected {getattr(kind, '__name__', kind)}."
            )
        return value

    def take_ints(self, name: str, default: Any = REQUIRED) -> tuple[int, ...]:
        values = self.take(name, list | tuple, default)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise InputError(f"{self.where}.{name} is {shortened(repr(values))}; expected a list of whole numbers.")
        return tuple(values)

    def take_size(self, name: str, default: Any = REQUIRED) -> tuple[int, int]:
        """Rows and columns, from one number for both or a list of the two."""
        if isinstance(self.values.get(name, default), list | tuple):
            size = self.take_ints(name, default)
            if len(size) != 2:
                raise InputError(f"{self.where}.{name} is {list(size)}; expected one number, or rows and columns.")
            return size[0], size[1]
        side = self.take(name, int, default)
        return side, side

    def take_square(self, name: str) -> int:
        """The side of something square, from one number or two equal ones."""
        rows, columns = self.take_size(name)
        if rows != columns:
            raise InputError(f"{self.where}.{name} is {rows} x {columns}; only squares are supported.")
        return rows

    def expect(self, name: str, *supported: Any) -> Any:
        """The value of a field of which only some values are supported; the first is the default."""
        self.taken.add(name)
        value = self.values.get(name, supported[0])
        if value not in supported:
            allowed = " or ".join(repr(choice) for choice in supported)
            raise InputError(f"{self.where}.{name} is {shortened(repr(value))}; only {allowed} is supported.")
        return value

    def section(self, name: str, default: Any = REQUIRED) -> "Fields":
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise InputError(f"{self.where} has no section {name!r}.")
        return Fields(value, f"{self.where}.{name}")

    def finish(self, *ignored: str) -> None:
        """Raises InputError if a field was neither taken nor is among those that do not shape the network."""
        for name in self.values:
            if name not in self.taken and name not in ignored:
                raise InputError(
                    f"{self.where}.{shortened(name)} is not a field known here; its value is "
                    f"{shortened(repr(self.values[name]))}. If it does not shape the network, remove it."
                )


def check_header(config: dict, class_name: str, image_range: tuple[float, float] | None) -> None:
    """Raises InputError if a config in the golden form names another class or range of pixel values, where the
    kind has one."""
    fields = Fields(config, "config")
    given = fields.take("class", str, class_name)
    if given.rpartition(".")[2] != class_name.rpartition(".")[2]:
        raise InputError(f"config.class is {given!r}; this kind reads {class_name}.")
    if image_range and tuple(fields.take("image_range", list, list(image_range))) != image_range:
        raise InputError(f"config.image_range is {config['image_range']}; this kind has {list(image_range)}.")

"""Reading a recipe, with the changes that a command line makes to it; and whether a run's folder is of that recipe."""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError

from smalti.documents import BoundedLoader, parse_yaml, read_json, read_yaml
from smalti.errors import InputError, shortened
from smalti.files import write_json
from smalti.models.config import PRESETS, TransformerConfig
from smalti.recipes.schema import SYSTEMS, AnyRecipe, System
from smalti.sequences.layout import Order, parse_order
from smalti.training.settings import FREE, OLD_NAMES, as_json, first_difference, renamed, renamed_in_sections

# Reading -------------------------------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(str(resources.files("smalti.recipes"))).glob("*.yaml"))}


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """A shipped recipe by its name, or the one in a YAML file, with settings changed by `overrides`.

    An override is "key=value": the key dotted, as in `train.learning_rate`, or its last word alone where only one
    setting ends in it; the value as in YAML. Raises InputError for a recipe, key or value that is not as expected,
    with a line for each.
    """
    known = shipped_recipes()
    path = known.get(str(name), Path(name))
    if not os.path.isfile(path):  # which, unlike Path's, knows no name that is too long
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"there is no recipe {shortened(repr(str(name)))}; there are {', '.join(known)}, or give the path of a "
            f".yaml file.{hint}"
        )
    content = _read_yaml(path)
    system = SYSTEMS.get(str(content.get("system")))
    if system is None:
        raise InputError(
            f"recipe {name}: system is {shortened(repr(content.get('system')))}; expected one of {', '.join(SYSTEMS)}."
        )
    content, problems = renamed_in_sections(content, f"recipe {name}"), []
    for override in overrides:
        try:
            for one in _one_by_one(override, system):
                if not _keeps_pace(_apply(content, one, system)):
                    content.pop("minutes", None)
        except InputError as error:
            problems.append(str(error))
    recipe, more = _checked(content, str(name), system)
    if recipe is None or problems:
        raise InputError(_all_of([*problems, *more]))
    return recipe


def _all_of(problems: Sequence[str]) -> str:
    """One message of them all: one line for one, and for more a line for each."""
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join((f"{len(problems)} settings are not as expected:", *problems))


class _Loader(BoundedLoader):
    """YAML, but 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (self.construct_object(key) for key, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    return read_yaml(path, "a recipe has sections such as data: and train:, in YAML", loader=_Loader)


def _checked(content: dict[str, Any], name: str, system: System) -> tuple[AnyRecipe | None, list[str]]:
    """The recipe, or what is wrong with it."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    try:
        _set_max_length(content, name)
        # As JSON, whose strict rules take a list for a tuple and text for a path, but never text for a number.
        return system.model_validate_json(json.dumps(content, default=str), strict=True), []
    except ValidationError as error:
        return None, [f"recipe {name}: {problem}" for problem in _problems(content, error, system)]
    except InputError as error:
        return None, [str(error)]


def _set_max_length(content: dict[str, Any], name: str) -> None:
    """Gives the model section the length of the layout's longest sequence."""
    model, layout = content.get("model"), content.get("layout")
    if not isinstance(model, dict) or not isinstance(layout, dict) or not isinstance(layout.get("orders"), dict):
        return  # the check that follows says so
    if "max_length" in model:
        raise InputError(f"recipe {name}: model.max_length follows from the layout; leave it out.")
    if (preset := model.pop("preset", None)) is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(
                f"recipe {name}: model.preset {shortened(repr(preset))} is unknown; choose one of {', '.join(PRESETS)}."
            )
        model.update({**PRESETS[preset], **model})
    try:
        lines = [line if isinstance(line, str) else str(line[0]) for line in layout["orders"].values()]
        model["max_length"] = max(Order(name="", parts=parse_order(line)).max_length for line in lines)
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"recipe {name}: layout.orders: {error}") from error


def _problems(content: dict[str, Any], error: ValidationError, system: System) -> Iterator[str]:
    """What is wrong, each in words. Where a section can be of several kinds, only what is wrong with the first."""
    tried: dict[str, int | str] = {}
    for found in error.errors():
        key, kinds = _place(content, found["loc"], is_missing=found["type"].startswith("missing"))
        if all(tried.setdefault(at, kind) == kind for at, kind in kinds.items()):
            yield _explain(key, found["type"], found["msg"], found["input"], system)


def _place(content: Any, location: Sequence[int | str], *, is_missing: bool) -> tuple[str, dict[str, int | str]]:
    """A validation error's location as a dotted key, without the names of kinds that were tried for a section or a
    value, which are no places in the file; and these, by the key of what they were tried for."""
    places: list[str] = []
    kinds: dict[str, int | str] = {}
    for index, place in enumerate(location):
        inside = place in content if isinstance(content, dict) else isinstance(place, int)
        if inside or (is_missing and index == len(location) - 1):
            places.append(str(place))
            content = content.get(place) if isinstance(content, dict) else None  # lists hold no sections
        else:
            kinds[".".join(places)] = place
    return ".".join(places), kinds


_WORDS = {
    "a valid integer": "a whole number",
    "an object": "a section",
    "a valid array": "a list",
    "a valid ": "a ",
    "Input tag": "the kind",
}
"""JSON's words in error messages, and what a writer of YAML calls them."""


def _explain(key: str, kind: str, message: str, given: object, system: System) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be", "expected")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no setting {shortened(key)}; {_suggest(key, system)}"
    if kind in ("missing", "missing_argument"):
        return f"{key} is missing; add it."
    for json_word, word in _WORDS.items():
        message = message.replace(json_word, word)
    return f"{key} is {given!r}; {message}."


# Overrides -----------------------------------------------------------------------------------------------------


def _one_by_one(override: str, system: System) -> list[str]:
    """A setting as it is given, but with today's name, and `precision=...` alone for every section that trains."""
    key, equals, text = override.partition("=")
    section, _, last = key.rpartition(".")
    if last == "bf16":
        last, text = "precision", renamed({last: _value(text, override)})["precision"]
    if last == "precision":
        keys = [f"{section}.{last}"] if section else [name for name in _keys(system) if name.rpartition(".")[2] == last]
        return [f"{key}{equals}{text}" for key in keys]
    if last in OLD_NAMES and section in ("", "train", "image_tokenizer.train"):
        of_tokenizer = f"image_tokenizer.train.{OLD_NAMES[last]}"
        key = (
            of_tokenizer if not section and of_tokenizer in _keys(system) else f"{section or 'train'}.{OLD_NAMES[last]}"
        )
    return [f"{key}{equals}{text}"]


_ANY_PACE = ("evaluate", "sample", "watch", "about", "minutes", "output", "pictures", "held_out", "text_tokenizer")
_DATA = ("data.path", "data.train", "data.validation", "data.held_out", "image_tokenizer", "image_tokenizer.path")


def _value(text: str, override: str) -> Any:
    return parse_yaml(text, shortened(repr(override)), "put the value in quotes", loader=_Loader, kind=object)


def _keeps_pace(key: str) -> bool:
    """Whether a recipe takes as long with another value of a setting."""
    section, last = key.partition(".")[0], key.rpartition(".")[2]
    return section in _ANY_PACE or key in _DATA or last in ("seed", "precision", "device")


def _apply(content: dict[str, Any], override: str, system: System) -> str:
    """Changes a setting in the content of a recipe; returns its full key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(
            f"{shortened(repr(override))} is no setting; write key=value, for example train.learning_rate=1e-3."
        )
    value = _value(text, override)
    full_key = _full_key(key, system)
    *sections, last = full_key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise InputError(
                f"{shortened(repr(override))}: the recipe's {section} is not a section but {shortened(repr(content))}."
            )
    if isinstance(value, str) and isinstance(content.get(last), dict) and f"{full_key}.preset" in _keys(system):
        content, last = content[last], "preset"  # model=llama-60m
    content[last] = value
    return full_key


def _full_key(key: str, system: System) -> str:
    known = list(_keys(system))
    patterns = [re.escape(name).replace(r"\*", r"[^.]+") for name in known]
    if any(re.fullmatch(pattern, key) for pattern in patterns) or any(name.startswith(f"{key}.") for name in known):
        return key
    found = [name for name in known if name.rpartition(".")[2] == key]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"several settings are named {key}; write {' or '.join(found)}.")
    raise InputError(f"there is no setting {shortened(key)}; {_suggest(key, system)}")


def _suggest(key: str, system: System) -> str:
    known = [name for name in _keys(system) if "*" not in name]
    by_last_word = {name.rpartition(".")[2]: name for name in [*known, *system.model_fields]}
    near = [by_last_word[word] for word in difflib.get_close_matches(key.rpartition(".")[2], by_last_word, n=1)]
    near += difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(near))}?"
    section = key
    while section and not any(name.startswith(f"{section}.") for name in known):
        section = section.rpartition(".")[0]
    prefix = f"{section}." if section else ""
    inside = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in known if name.startswith(prefix))
    return f"there are {', '.join(f'{prefix}{name}' for name in inside)}."


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings below a section; `*` stands for a name of one's own."""
    for name, inner in _fields(annotation).items():
        below = [kind for kind in (inner, *get_args(inner)) if _fields(kind)]
        if name == "max_length" and annotation is TransformerConfig:
            yield f"{prefix}preset"  # the length follows from the layout; a preset stands for the other fields
            continue
        if not below:
            yield f"{prefix}{name}"
            if getattr(inner, "__origin__", None) is dict:
                yield f"{prefix}{name}.*"
        yield from dict.fromkeys(key for kind in below for key in _keys(kind, f"{prefix}{name}."))


def _fields(annotation: Any) -> Mapping[str, Any]:
    """Names and kinds of the settings of a section; none for anything else."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return {name: kind for name, kind in get_type_hints(annotation).items() if name != "model_config"}
    return {}


def claim_folder(recipe: BaseModel, folder: Path, *, free: Collection[str]) -> None:
    """Writes the recipe into a run's folder, or checks that the run there is of the same one, but for the sections in
    `free`, which say how a run is described and measured and not what it makes.

    Raises InputError naming the setting that differs.
    """
    path = folder / "recipe.json"
    free = (*free, "output", "description", "expects", "minutes")
    if not path.exists():
        write_json(path, {name: value for name, value in as_json(recipe).items() if name not in free})
        return
    found = read_json(path, "remove this file if the run there is of the settings you give, or give another folder")
    if (difference := first_difference(renamed_in_sections(found, path), recipe, (*FREE, *free))) is not None:
        raise InputError(
            f"{folder} holds a run with other settings ({difference}; see {path}): resume it with the same "
            "settings, or give another folder, output=FOLDER."
        )

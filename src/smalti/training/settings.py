"""What the settings of a training are called and which values they take; and whether two starts of a run have the same.

A setting has one name in all configs. Earlier versions had others, which recipes, command lines, folders of runs and
checkpoints may still hold: they are read here, and nowhere else.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from smalti.errors import InputError
from smalti.precision import AUTO, with_precision

OLD_NAMES = {
    "steps": "num_steps",
    "weight_ema_decay": "ema_decay",
    "gradient_clip": "max_grad_norm",
    "save_every": "checkpoint_every",
}
"""What trainings of image tokenizers called their settings, and what all trainings call them. `bf16` of all trainings
is read by `with_precision`."""

FREE = (
    "checkpoint_every", "keep_checkpoints", "log_every", "sample_every", "evaluation_rows", "patience", "device",
    "workers", "sharding", "tensor_parallel", "recompute",
)  # fmt: skip
"""Settings that a run may change when it goes on: they do not decide its weights."""


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training in today's names. Raises InputError if one is given under both."""
    settings = with_precision(settings)
    for old, new in OLD_NAMES.items():
        if old in settings and new in settings:
            raise InputError(f"{old} is the old name of {new}; give one of them.")
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}


def renamed_in_sections(settings: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The settings of a recipe in today's names, in every section that trains. Raises InputError naming `where`."""
    found = {}
    for key, section in settings.items():
        if isinstance(section, dict):
            try:
                section = renamed(section) if key == "train" else section
            except InputError as error:
                raise InputError(f"{where}: {key}: {error}") from error
            section = renamed_in_sections(section, where)
        found[key] = section
    return found


def renamed_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run, as one of today does: settings in the sections model, training, data ..."""
    run = dict(run)
    if isinstance(run.get("model"), str):  # a token model's, with all settings of the training in one row
        model, layout, num_rows = json.loads(run.pop("model")), json.loads(run.pop("layout")), run.pop("num_rows")
        run = {"model": model, "layout": layout, "training": run, "data": {"num_rows": num_rows}}
    if "num_training" in run.get("pictures", {}):
        pictures = dict(run["pictures"])
        run |= {"data": {"num_rows": pictures.pop("num_training")}, "pictures": pictures}
    return as_json(run | {"training": renamed(run["training"])})


def as_json(settings: Any) -> Any:
    """Settings as a file holds them."""

    def plain(part: Any) -> Any:
        if isinstance(part, BaseModel):
            return part.model_dump(mode="json")
        return dataclasses.asdict(part) if dataclasses.is_dataclass(part) else str(part)  # pyright: ignore

    return json.loads(json.dumps(settings, default=plain))


def first_difference(there: Mapping[str, Any], here: Any, free: Collection[str] = FREE, prefix: str = "") -> str | None:
    """The first setting, in words, in which an earlier start of a run differs from this one; None if there is none.

    `there` was read from its file, `here` is a config or a mapping of configs. A setting that is not `there` was not
    known then: it is the same if it is None or at its default here. A precision "auto" is any, since a training that
    goes on keeps what it began with.
    """
    ours = _with_defaults(here)
    for name in dict.fromkeys([*ours, *there]):
        value, default = ours.get(name, (None, None))
        theirs, value_here = there.get(name), as_json(value)
        if name in free or theirs == value_here or (name == "precision" and AUTO in (theirs, value_here)):
            continue
        if name not in there and value_here == default:
            continue
        if isinstance(theirs, dict) and _with_defaults(value):
            if (found := first_difference(theirs, value, free, f"{prefix}{name}.")) is not None:
                return found
        else:
            return f"{prefix}{name} is {theirs} there, {value_here} here"
    return None


def _with_defaults(settings: Any) -> dict[str, tuple[Any, Any]]:
    """Values by name, each with its default as JSON; of a setting that is required the default is none that it can
    have. Empty for what is no config."""
    if isinstance(settings, Mapping):
        return {name: (value, None) for name, value in settings.items()}
    if isinstance(settings, BaseModel):
        defaults = {name: info.get_default() for name, info in type(settings).model_fields.items()}
    elif dataclasses.is_dataclass(settings):
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    else:
        return {}
    return {name: (getattr(settings, name), as_json(default)) for name, default in defaults.items()}


def check_ranges(
    config: Any, *, positive: str = "", not_negative: str = "", below_one: str = "", shares: str = ""
) -> None:
    """Raises ValueError naming every setting of the config that is out of its range; None is in every range. The
    settings are named in words: `positive` ones are above 0, `below_one` in [0, 1), `shares` in [0, 1]."""
    rules = (
        (positive, lambda value: value > 0, "it must be more than 0"),
        (not_negative, lambda value: value >= 0, "it must be at least 0"),
        (below_one, lambda value: 0 <= value < 1, "expected a number in [0, 1)"),
        (shares, lambda value: 0 <= value <= 1, "expected a share in [0, 1]"),
    )
    problems = []
    for names, holds, expected in rules:
        for name in names.split():
            given = getattr(config, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and not holds(value):
                    problems.append(f"{name} is {value}; {expected}.")
    if problems:
        raise ValueError(" ".join(problems))

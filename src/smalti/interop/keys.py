"""Carrying tensors between a foreign state dict and an image tokenizer, key by key.

A key map says for every tensor of ours the foreign key and the foreign shape. Import and export read the same
map, so that one undoes the other.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti.errors import InputError, first_line
from smalti.files import new_file
from smalti.image_tokenizers.quantizer import AnyQuantizerConfig, QuantizerConfig
from smalti.weight_files import require_values
from smalti.weights import BUILD_ERRORS, build_within


class Foreign(NamedTuple):
    """A tensor in a foreign state dict. The shape may differ from ours by axes of length 1. `copies` are further
    keys that hold the same values, where a layer is used several times."""

    key: str
    shape: tuple[int, ...]
    copies: tuple[str, ...] = ()


KeyMap = dict[str, Foreign]


class Moved(NamedTuple):
    foreign_key: str
    our_key: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was done with every tensor of a foreign file: `moved` to a key of ours, or `dropped` with the reason.
    `sizes` tells where the sizes of the network were taken from."""

    sizes: str
    moved: tuple[Moved, ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text, one line per tensor."""
        num_read = len({moved.foreign_key for moved in self.moved})
        return [
            *(f"{m.foreign_key} -> {m.our_key} {list(m.shape)}" for m in self.moved),
            *(f"{key} dropped: {reason}" for key, reason in self.dropped),
            f"{num_read} tensors read, {len(self.dropped)} dropped, none missing or unexpected",
            f"sizes: {self.sizes}",
        ]


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """All that is particular to one kind of foreign checkpoint.

    `read_config` and `write_config` translate the original's field names; `key_map` gives the foreign key of each
    tensor of a module; `outputs` recomputes the arrays of a reference folder (see `verifying`). `published` holds
    the sizes of files that need no config; where weights tell all sizes, `infer_config` finds them instead.
    `prepare` puts variants of the original (weights and config) into the one form that the rest reads.
    `droppable` holds the beginnings of keys to pass over, with the reason; `part_of` the prefixes of the keys
    inside a larger model; `container` the outer key under which the original keeps its state dict.
    """

    name: str
    build: Callable[[Any], nn.Module]
    read_config: Callable[[dict], Any]
    write_config: Callable[[Any], dict]
    key_map: Callable[[Any], KeyMap]
    outputs: Callable[[Any, Any], Mapping[str, Callable[[], Tensor]]]
    published: Mapping[str, Any] = field(default_factory=dict)
    droppable: Mapping[str, str] = field(default_factory=dict)
    part_of: tuple[str, ...] = ()
    container: str | None = None
    infer_config: Callable[[Mapping[str, Tensor]], Any] | None = None
    prepare: Callable[[Mapping[str, Tensor], dict | None], tuple[Mapping[str, Tensor], dict | None]] | None = None


def import_foreign(
    layout: KeyLayout, state: Mapping[str, Tensor], config: dict | None = None, *, allow_nonfinite: bool = False
) -> tuple[nn.Module, ImportReport]:
    """The module that a foreign state dict describes, in evaluation mode. `config` has the original's field names;
    without one the shapes must be those of exactly one published model. Raises InputError if a tensor is
    missing, has another shape, is left over, or holds values that are not finite (unless allowed)."""
    state, outside = _part_of_larger(state, layout.part_of)
    if layout.prepare is not None:
        state, config = layout.prepare(state, config)
    dropped = {key: reason for key in state if (reason := _why_dropped(key, layout.droppable)) is not None}
    if config is not None:
        ours, sizes = layout.read_config(config), "from the config"
    elif layout.infer_config is not None:
        ours, sizes = layout.infer_config(state), "from the shapes of the weights"
    else:
        name = _choose_published(layout, state, dropped)
        ours, sizes = layout.published[name], f"of the published {name}"
    try:
        module = build_within(lambda: layout.build(ours), sum(tensor.numel() for tensor in state.values()), "the file")
        key_map = layout.key_map(module)
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(f"no network can be built of the config: {first_line(error)}.") from error
    problems = shape_problems(state, key_map, dropped) or _unequal_copies(state, key_map)
    if problems:
        raise InputError(misfit(problems))
    notes = require_values(state, [foreign.key for foreign in key_map.values()], allow_nonfinite=allow_nonfinite)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    module.load_state_dict({name: state[foreign.key].reshape(shapes[name]) for name, foreign in key_map.items()})
    moved = tuple(
        Moved(key, name, foreign.shape) for name, foreign in key_map.items() for key in (foreign.key, *foreign.copies)
    )
    return module.eval(), ImportReport(
        sizes=sizes, moved=moved, dropped=tuple((outside | dropped).items()), notes=notes
    )


def export_foreign(layout: KeyLayout, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `module` under their foreign keys and in their foreign shapes. Raises ValueError if the
    layout cannot express the module, so that its import would be another one."""
    layout.write_config(module)
    state = module.state_dict()
    return {
        key: state[name].detach().cpu().reshape(foreign.shape).clone()
        for name, foreign in layout.key_map(module).items()
        for key in (foreign.key, *foreign.copies)
    }


def write_foreign(
    file: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], *, container: str | None, force: bool = False
) -> Path:
    """Writes tensors as safetensors if `file` is called so, and otherwise as torch does, under `container` if there is
    one; the original's config comes beside it, and its path is returned."""
    config_file = config_beside(file)
    with new_file(file, force=force) as temporary:
        if file.suffix == ".safetensors":
            save_file(dict(state), temporary)
        else:
            torch.save({container: dict(state)} if container else dict(state), temporary)
    with new_file(config_file, force=force) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config_file


def config_beside(file: Path) -> Path:
    """Where an export leaves the original's config, and an import looks for it."""
    return file.with_suffix(".config.json")


def first_renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """The name with the first pattern of `renames` that matches replaced; as it is if none does."""
    for pattern, replacement in renames:
        new, found = re.subn(pattern, replacement, name)
        if found:
            return new
    return name


def rename_all(module: nn.Module, foreign_key: Callable[[str], str]) -> KeyMap:
    """The key map of a layout whose shapes are ours and whose keys are a function of ours. How a codebook was
    learning (running counts and the like) has no place in a foreign file."""
    return {
        name: Foreign(foreign_key(name), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
        if not name.startswith("quantizer.") or name == "quantizer.codebook"
    }


def learned_codebook(quantizer: AnyQuantizerConfig, layout_name: str) -> QuantizerConfig:
    """Raises ValueError if the codes are not the nearest of a learned codebook, which is all that most foreign layouts
    hold."""
    if not isinstance(quantizer, QuantizerConfig):
        raise ValueError(
            f"the {layout_name} layout holds a learned codebook; this tokenizer's codes are {quantizer.kind!r}."
        )
    return quantizer


def check_expressible(ours: Any, read_back: Any, layout_name: str, *ignored: str) -> None:
    """Raises ValueError if exporting would lose something: `read_back` is the config that an import of the
    export would have. How a codebook learns is not part of any layout."""
    for name in (f.name for f in fields(ours)):
        mine, theirs = getattr(ours, name), getattr(read_back, name)
        if name == "quantizer":
            for part in ("kind", "codebook_size", "code_dim", "l2_normalised"):
                _require_equal(getattr(mine, part, None), getattr(theirs, part, None), f"quantizer.{part}", layout_name)
        elif name not in ignored:
            _require_equal(mine, theirs, name, layout_name)


def _require_equal(mine: Any, theirs: Any, name: str, layout_name: str) -> None:
    if mine != theirs:
        raise ValueError(f"the {layout_name} layout cannot hold {name} {mine!r}; it would be read as {theirs!r}.")


def _choose_published(layout: KeyLayout, state: Mapping[str, Tensor], dropped: Mapping[str, str]) -> str:
    """The one published model whose every shape agrees with `state`; InputError if none agrees, or several do."""
    problems = {}
    for name, config in layout.published.items():
        with torch.device("meta"):  # shapes alone, no memory for weights
            key_map = layout.key_map(layout.build(config))
        problems[name] = shape_problems(state, key_map, dropped)
    fitting = [name for name, found in problems.items() if not found]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(
            f"the shapes of these weights fit several published {layout.name} models ({', '.join(fitting)}); "
            "give the original's config."
        )
    if not problems:
        raise InputError(f"no sizes of published {layout.name} models are known; give the original's config.")
    closest = min(problems, key=lambda name: len(problems[name]))
    raise InputError(
        f"the shapes of these weights fit none of the published {layout.name} models. Closest is {closest}, where "
        f"{len(problems[closest])} tensors differ ({problems[closest][0]}). Give the original's config."
    )


def shape_problems(state: Mapping[str, Tensor], key_map: KeyMap, dropped: Mapping[str, str]) -> list[str]:
    """One line for every tensor of `state` that is missing, unexpected or of another shape than mapped."""
    expected = {key: foreign.shape for foreign in key_map.values() for key in (foreign.key, *foreign.copies)}
    missing = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    unexpected = [
        f"unexpected: {key} {list(tensor.shape)}"
        for key, tensor in state.items()
        if key not in expected and key not in dropped
    ]
    other_shape = [
        f"shape: {key} is {list(state[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    return missing + unexpected + other_shape


def _part_of_larger(
    state: Mapping[str, Tensor], prefixes: tuple[str, ...]
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors under the prefix that a larger model has for this one, and the other keys with the reason."""
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)), "")
    inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return inside, {key: f"outside {prefix}" for key in state if not key.startswith(prefix)}


def _unequal_copies(state: Mapping[str, Tensor], key_map: KeyMap) -> list[str]:
    return [
        f"unequal: {copy} should repeat {foreign.key}, which is the same layer"
        for foreign in key_map.values()
        for copy in foreign.copies
        if not torch.equal(state[copy], state[foreign.key])
    ]


def _why_dropped(key: str, droppable: Mapping[str, str]) -> str | None:
    return next((reason for start, reason in droppable.items() if key.startswith(start)), None)


def misfit(problems: list[str]) -> str:
    """What to say of the lines that `shape_problems` gave."""
    shown = "; ".join(problems[:8])
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return (
        f"the weights do not fit the network, {len(problems)} tensors differ: {shown}{more}. "
        "Check that the kind and the config belong to this file."
    )

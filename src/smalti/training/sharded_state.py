"""A training's state by the names of its tensors: written in shares by all processes, read by any other number of them.

A checkpoint of shares holds `model.NAME`, perhaps `average.NAME`, and `optimizer.NAME.WHAT` for all that the optimizer
keeps of a parameter. One of a plain model holds the same in the order of its parameters: both are read into either.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.training.checkpoint import Checkpoint, load_shards, shapes_of_shards
from smalti.training.muon import Optimizers
from smalti.training.parallel import Parts, Shares, fill, fused_parts, join, split

Optimizer = torch.optim.Optimizer | Optimizers
Kept = dict[str, dict[str, Tensor]]
"""What an optimizer keeps, by the parameter's name."""


def _optimizers(optimizer: Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.optimizers if isinstance(optimizer, Optimizers) else (optimizer,)


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters of each optimizer, in the order in which its state numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names[id(parameter)] for group in one.param_groups for parameter in group["params"]]
        for one in _optimizers(optimizer)
    ]


def tensors_of(model: nn.Module, averaged: nn.Module | None, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of a state, as a checkpoint of shares names them."""
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if averaged is not None:
        found |= {f"average.{name}": tensor for name, tensor in averaged.state_dict().items()}
    for name, parameter in model.named_parameters():
        for one in _optimizers(optimizer):
            for what, value in one.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{what}"] = value
    return found


def read_into_shares(
    checkpoint: Checkpoint,
    model: nn.Module,
    averaged: nn.Module | None,
    optimizer: Optimizer,
    shares: Shares,
    names: list[list[str]],
) -> None:
    """Fills a model in shares from either kind of checkpoint. `names` are those of the plain model's parameters."""
    if checkpoint.shards is not None:
        shapes = shapes_of_shards(checkpoint.shards)
        _make_room(model, optimizer, shapes)
        load_shards(checkpoint.shards, tensors_of(model, averaged, optimizer))
        return
    whole = {"model": checkpoint.training_state.get("model", checkpoint.weights), "average": checkpoint.weights}
    kept = _kept_by_name(checkpoint.training_state["optimizer"], names, shares.parts)
    shapes = {f"optimizer.{name}.{what}": value.shape for name, held in kept.items() for what, value in held.items()}
    _make_room(model, optimizer, shapes)
    for prefix, module in (("model", model), ("average", averaged)):
        parts = split(whole[prefix], shares.parts) if module is not None else {}
        for name, tensor in module.state_dict().items() if module is not None else ():
            fill(tensor, parts[name])
    for name, tensor in tensors_of(model, None, optimizer).items():
        if name.startswith("optimizer."):
            parameter, _, what = name.removeprefix("optimizer.").rpartition(".")
            fill(tensor, kept[parameter][what])


def read_whole(shards: Path, model: nn.Module, averaged: nn.Module | None, optimizer: Optimizer) -> None:
    """Fills a plain model from a checkpoint of shares."""
    parts, shapes = fused_parts(model), shapes_of_shards(shards)
    found = {name: torch.zeros(shape) for name, shape in shapes.items()}
    load_shards(shards, found)
    by_kind: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            rest, _, what = rest.rpartition(".")
            kind = f"optimizer.{what}"
        by_kind.setdefault(kind, {})[rest] = tensor
    joined = {kind: join(tensors, parts) for kind, tensors in by_kind.items()}
    model.load_state_dict(joined["model"])
    if averaged is not None:
        averaged.load_state_dict(joined["average"])
    for one, names in zip(_optimizers(optimizer), parameter_names(model, optimizer), strict=True):
        state = {
            index: {kind.partition(".")[2]: held[name] for kind, held in joined.items() if _is_kept(kind, held, name)}
            for index, name in enumerate(names)
        }
        one.load_state_dict({"state": {i: held for i, held in state.items() if held}, "param_groups": _groups(one)})


def _is_kept(kind: str, held: Mapping[str, Tensor], name: str) -> bool:
    return kind.startswith("optimizer.") and name in held


def _groups(optimizer: torch.optim.Optimizer) -> Any:
    return optimizer.state_dict()["param_groups"]


def _kept_by_name(state: Mapping[str, Any], names: list[list[str]], parts: Parts) -> Kept:
    """What a plain model's optimizers keep, taken apart."""
    found: Kept = {}
    states = [state[str(index)] for index in range(len(names))] if "0" in state else [state]
    for one, own in zip(states, names, strict=True):
        for index, held in one["state"].items():
            for what, value in held.items():
                for name, part in split({own[int(index)]: value}, parts).items():
                    found.setdefault(name, {})[what] = part
    return found


def _make_room(model: nn.Module, optimizer: Optimizer, shapes: Mapping[str, torch.Size]) -> None:
    """Tensors for what an optimizer keeps of each parameter, in the parameter's shares where it is as large."""
    for name, parameter, one in _owned(model, optimizer):
        prefix = f"optimizer.{name}."
        for key, shape in shapes.items():
            if key.startswith(prefix) and "." not in (what := key.removeprefix(prefix)):
                alike = shape == parameter.shape
                made = torch.zeros_like(parameter) if alike else torch.zeros(shape, device=parameter.device)
                one.state[parameter][what] = made.detach()


def _owned(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for one in _optimizers(optimizer):
        for group in one.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, one

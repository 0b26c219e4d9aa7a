"""What all trainings do alike: a run's folder with what it goes on from, learning rate, average, finite check."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import InputError
from smalti.progress import Stage, stage
from smalti.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_run,
    save_checkpoint,
    save_shards,
)
from smalti.training.distributed import Processes
from smalti.training.estimate import Estimate, Reasons
from smalti.training.settings import as_json, first_difference, renamed_run


class Run:
    """A folder of checkpoints, and what an earlier start of the run has left there. Hold it by `run_lock`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.found = latest_checkpoint(directory)
        self._begun = None if self.found is None else renamed_run(load_run(self.found))
        self._settings: Any = None

    @property
    def precision(self) -> str | None:
        """What the run began in; None if it begins here."""
        return None if self._begun is None else self._begun["training"]["precision"]

    def begun(self, section: str) -> dict[str, Any] | None:
        """A section of the settings that the run began with; None if it begins here."""
        return None if self._begun is None else self._begun[section]

    def claim(self, settings: Mapping[str, Any]) -> Checkpoint | None:
        """What the run goes on from; None if it begins here. `settings` are all that decides the weights, configs by
        section. Raises InputError if those found in the folder are others."""
        self._settings = as_json(settings)
        if self.found is None or self._begun is None:
            return None
        if (difference := first_difference(self._begun, settings)) is not None:
            raise InputError(
                f"{self.directory} holds a run with other settings ({difference}): resume it with the same "
                "settings, or give another folder."
            )
        return load_checkpoint(self.found)

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any], *, keep: int) -> None:
        """Writes the checkpoint of `step`; `state` is what the run needs besides the weights to go on."""
        save_checkpoint(self.directory, step, weights, {"run": self._settings, **state}, keep)

    def save_shards(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], team: Processes, *, keep: int
    ) -> None:
        """`save` by all processes together, each of which writes its shares."""
        how: Any = {"rank": team.rank, "size": team.size, "wait": team.wait}
        save_shards(self.directory, step, tensors, {"run": self._settings, **state}, keep, **how)


def training_stage(
    name: str, num_steps: int, *, completed: int, show: bool, estimate: Estimate | None, why: Reasons
) -> AbstractContextManager[Stage]:
    """The progress of a training; `estimate` says early how long a recipe takes in all, `why` what makes it slow."""
    watch = None if estimate is None else estimate.watch(why)
    return stage(name, num_steps, completed=completed, show=show, watch=watch)


def is_due(interval: int, step: int) -> bool:
    """Whether what is done every `interval` steps (0: never) is done at this one."""
    return interval > 0 and step % interval == 0


def scheduled(step: int, *, peak: float, warmup_steps: int, final_share: float, lowest_at: int) -> float:
    """The learning rate of the update after `step` updates: a linear rise over the warm-up, then half a cosine from the
    peak down to `final_share` of it at the step `lowest_at`. With a `final_share` of 1 it stays at the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, lowest_at - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, step: int, decay: float, *, in_shares: bool = False) -> None:
    """averaged ← d · averaged + (1 − d) · model with d = min(decay, (1 + step) / (10 + step)), which soon forgets the
    first, random weights. Buffers are copied. Of weights in shares each process averages its own."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    both: list[list[Tensor]] = [list(averaged.parameters()), list(model.parameters())]
    if in_shares:
        from smalti.training.parallel import own_share

        both = [[own_share(parameter) for parameter in parameters] for parameters in both]
    lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
    lerp_(both[0], both[1], share)
    for average, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


def require_finite_weights(model: nn.Module, step: int, mend: str) -> None:
    """Raises InputError if a weight is not finite; `mend` says what to do."""
    parameters: list[Tensor] = list(model.parameters())
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):  # in shares
        from smalti.training.parallel import total_norm

        norm = total_norm(parameters)
    else:
        norm = nn.utils.get_total_norm(parameters)
    if not bool(norm.isfinite()):
        raise InputError(f"the weights after step {step} are not finite: training diverged. {mend}")


@contextmanager
def going_astray(model: nn.Module, step: int, mend: str) -> Iterator[None]:
    """Says so where a library fails over numbers that are not finite, or too large to be computed with."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, ArithmeticError) as error:
        require_finite_weights(model, step, mend)
        unsolved = isinstance(error, torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]
        if unsolved or re.search(r"\b(inf|nan)\b", str(error), re.IGNORECASE):
            raise InputError(f"step {step} cannot be computed: training diverged. {mend}") from error
        raise

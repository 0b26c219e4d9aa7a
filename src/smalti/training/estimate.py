"""How long a recipe will take on this machine, said once, early; and, if that is far beyond what the recipe states, why
and what to set."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from smalti import processor
from smalti.precision import BFLOAT16, multiplies_bfloat16
from smalti.progress import Stage, duration

AFTER_STEPS = 20
TOO_LONG = 2.0
"""Times what the recipe states."""

Reasons = Callable[[], list[str]]


class Length(NamedTuple):
    """The setting that says how long a stage trains, and its value."""

    setting: str
    value: float


class Estimate:
    """What a recipe's training takes in all, from the pace of its first training stage; said anew where a later one is
    found to take TOO_LONG times as long as was said, as a transformer does whose kernel cannot be compiled.

    `minutes` are what the recipe states for its stages, in their order; `lengths` the settings that shorten them.
    """

    def __init__(self, minutes: Mapping[Any, float] | None = None, lengths: Mapping[str, Length] | None = None):
        self.minutes, self.lengths = minutes or {}, lengths or {}
        self.said_s: dict[str, float] = {}
        """What was said of the stages."""

    def watch(self, why: Reasons) -> Callable[[Stage], str | None]:
        """What a training stage calls after every step; it gets the estimate, if it is to be said, after AFTER_STEPS of
        them. `why` are the reasons that may make the stage slow, each with what to do about it."""
        first_step_ended_at, is_known = None, False

        def watching(stage: Stage) -> str | None:
            nonlocal first_step_ended_at, is_known
            done = stage.completed - stage.first
            if is_known or done < 1 or stage.total is None:
                return None
            if first_step_ended_at is None:  # that step has set up what the others find ready
                first_step_ended_at = (stage.clock(), done)
                return None
            if done < AFTER_STEPS:
                return None
            is_known = True
            started_at, before = first_step_ended_at
            pace_s = (stage.clock() - started_at) / (done - before)
            here_s = pace_s * (stage.total - stage.first)
            if self.said_s and here_s <= TOO_LONG * self.said_s.get(stage.name, math.inf):
                return None
            return self.text(stage.name, here_s, pace_s * stage.total, why)

        return watching

    def text(self, name: str, here_s: float, whole_stage_s: float, why: Reasons) -> str:
        """`here_s` is what the stage at hand takes from this start on, `whole_stage_s` from its own beginning."""
        stated_s = {stage: 60 * minutes for stage, minutes in self.minutes.items()}
        if name not in stated_s:
            self.said_s[name] = here_s
            return f"{name} will take about {duration(here_s)}"
        slower = whole_stage_s / stated_s[name]
        names = list(stated_s)
        parts = {name: here_s} | {later: slower * stated_s[later] for later in names[names.index(name) + 1 :]}
        what = "what is left" if self.said_s else "the whole"
        self.said_s |= parts
        text = f"{what} will take about {duration(sum(parts.values()))}"
        if len(parts) > 1:
            text += f": {', '.join(f'{stage} {duration(seconds)}' for stage, seconds in parts.items())}"
        if slower <= TOO_LONG:
            return text
        reasons = why() or ["nothing that can be told from here: this processor may just be slower"]
        text += f". The recipe states {duration(sum(stated_s.values()))}. Why: {'; '.join(reasons)}."
        return text + self._shorter(slower, parts)

    def _shorter(self, slower: float, stages: Mapping[str, float]) -> str:
        ahead = [length for stage, length in self.lengths.items() if stage in stages]
        changes = [f"{length.setting}={_shortened(length.value / slower)}" for length in ahead]
        return f" In the time that it states you can have a shorter training: {' '.join(changes)}." if changes else ""


def _shortened(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def why_slow(precision: str, device: torch.device | str, *, no_kernel: str | None = None) -> list[str]:
    """What may make a training slow here, each with what to do about it. `no_kernel` says why the native training
    kernel is not used; None: it is, or there is none for what is trained."""
    reasons, device = [], torch.device(device)
    if not multiplies_bfloat16(device):
        what = f"this processor ({processor.instruction_set()})" if device.type == "cpu" else f"this {device.type}"
        if precision == BFLOAT16:
            reasons.append(f"{what} emulates bfloat16: set precision=float32, in a new folder")
        else:
            reasons.append(f"{what} does not multiply in bfloat16, in which recipes are timed")
    if no_kernel is not None:
        reasons.append(f"there is no native training kernel ({no_kernel})")
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        if torch.get_num_threads() < 2:
            reasons.append(f"one thread is used of {cores} cores: give it two, OMP_NUM_THREADS=2")
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > 1.5 * cores:
            reasons.append(f"other programs want the processor too ({load:.0f} at once on {cores} cores): end them")
    return reasons

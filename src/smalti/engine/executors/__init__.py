"""Executors: what runs a model's steps. They agree within rounding, so that a draw may rarely differ between two of
them; with one of them, the same seed gives the same tokens."""

from collections.abc import Iterator

from smalti.engine.executors.base import Draws, Eager
from smalti.engine.executors.compiled import Compiled
from smalti.engine.executors.cuda_graph import CudaGraph
from smalti.engine.executors.native import Native
from smalti.engine.executors.packed import Packed
from smalti.engine.executors.static_steps import Ahead, StaticSteps
from smalti.errors import InputError
from smalti.models.base import SequenceModel

EXECUTORS: dict[str, type[Eager]] = {
    executor.name: executor for executor in (CudaGraph, Native, Packed, Eager, Compiled)
}
"""In the order in which they are preferred; what stands behind `eager`, which takes every job, is taken by name
alone."""


def executors_for(model: SequenceModel, num_steps: int | None = None) -> Iterator[str]:
    """Those that take a job of so many decode steps unasked, the preferred ones first; `eager` is the last."""
    for name, executor in EXECUTORS.items():
        if not executor.why_not(model, num_steps):
            yield name
        if executor is Eager:
            return


def choose_executor(model: SequenceModel, num_steps: int | None = None) -> str:
    """The first that takes a job of so many decode steps. A job asks once, so that all of it takes one path."""
    return next(executors_for(model, num_steps))


def make_executor(model: SequenceModel, name: str | None = None, num_steps: int | None = None) -> Eager:
    """The executor of that name, else the one that is chosen, ready for the model as it is now.

    Raises InputError, with every reason, if the one asked for cannot take the model here.
    """
    if name is not None and name not in EXECUTORS:
        raise InputError(f"executor {name!r} is unknown; there are {', '.join(EXECUTORS)}.")
    name = choose_executor(model, num_steps) if name is None else name
    if reasons := EXECUTORS[name].why_not(model):
        raise InputError(f"the executor {name!r} cannot run this model here: {'; '.join(reasons)}.")
    return EXECUTORS[name](model)


__all__ = ["EXECUTORS", "Ahead", "Draws", "Eager", "StaticSteps", "choose_executor", "executors_for", "make_executor"]

"""Rates of this machine, measured in some seconds: a few training steps, a few decode steps of the model itself.

Of a model that is large for the machine two shallow ones are run, and their difference is taken for each layer more.
"""

import time
from dataclasses import replace
from typing import NamedTuple

import torch

from smalti.engine.engine import Engine
from smalti.engine.sampling import SampleConfig
from smalti.models.families import AnyModel
from smalti.planning.footprint import DEEPEST, DEPTHS, Task, example, make_model
from smalti.sequences.layout import Span
from smalti.sequences.request import Request
from smalti.training.distributed import recompute_activations
from smalti.training.token_model import (
    TrainConfig,
    TrainState,
    make_loss,
    make_optimizer,
    train_step,
    with_choices,
)

PROBE_S = 8.0
"""About as long is measured, once all is ready."""
LARGEST_PARAMETERS = 2e8
"""Of a model that is run whole."""


class Trained(NamedTuple):
    """Training steps as they were found."""

    step_s: float
    workspace_bytes: float | None
    """What the native training kernel holds; None: operators of torch are run."""
    precision: str


class DrawnSteps(NamedTuple):
    """Decode steps as they were found."""

    rows: int
    tokens_per_s: float
    executor: str


def probe_training(task: Task, num_steps: int, device: torch.device) -> Trained:
    """Seconds of one step with the task's batch, in its micro-batches, on `device`."""
    found = [_train(part, num_steps, device) for part in _parts(task)]
    if len(found) == 1:
        return found[0]
    shallow, *deeper = found
    step_s, workspace = shallow.step_s, shallow.workspace_bytes
    for one, depth in zip(deeper, _depths(task).values(), strict=True):
        more = depth - DEEPEST + 1
        step_s += more * max(0.0, one.step_s - shallow.step_s)
        if workspace is not None and one.workspace_bytes is not None and shallow.workspace_bytes is not None:
            workspace += more * (one.workspace_bytes - shallow.workspace_bytes)
    return shallow._replace(step_s=step_s, workspace_bytes=workspace)


def _depths(task: Task) -> dict[str, int]:
    return {name: getattr(task.shape, name) for name in DEPTHS if hasattr(task.shape, name)}


def _parts(task: Task) -> list[Task]:
    """The task itself, or shallow ones in its place: with two layers a stack, and with one more of each stack."""
    depths = _depths(task)
    with torch.device("meta"):
        size = make_model(task).num_parameters
    if size <= LARGEST_PARAMETERS or max(depths.values()) <= DEEPEST:
        return [task]
    shallow = dict.fromkeys(depths, DEEPEST - 1)
    sizes = [shallow, *(shallow | {name: DEEPEST} for name in depths)]
    return [task._replace(shape=replace(task.shape, **size)) for size in sizes]


def _train(task: Task, num_steps: int, device: torch.device) -> Trained:
    asked = replace(task.train, compile=False) if task.train.compile is None else task.train
    with torch.random.fork_rng(devices=[]):
        model = make_model(task).to(device).train()
        config = with_choices(asked, task.layout, num_steps, device, parameters_dtype=torch.float32)
        loss = make_loss(model, task.layout, asked, config, num_steps)
        if config.recompute:
            recompute_activations(model)
        averaged = make_model(task).to(device).eval() if config.ema_decay else None
        state = TrainState(step=0, model=model, averaged=averaged, optimizer=make_optimizer(model, config, device))
        rows = config.batch_size // config.num_micro_batches
        pieces = [example(task, rows).to(device)] * config.num_micro_batches
        step_s = _median_s(lambda: train_step(state, loss, pieces, config, num_steps), device)
    native = getattr(loss, "native", None)
    workspace = None if native is None or native.workspace is None else float(native.workspace.nbytes)
    return Trained(step_s, workspace, config.precision)


def _median_s(run, device: torch.device, longest_s: float = PROBE_S) -> float:
    """Behind one round that makes all ready."""
    found: list[float] = []
    began_at = None
    while began_at is None or (len(found) < 9 and (len(found) < 2 or time.perf_counter() - began_at < longest_s)):
        started_at = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if began_at is None:
            began_at = time.perf_counter()
        else:
            found.append(time.perf_counter() - started_at)
    return sorted(found)[len(found) // 2]


def probe_drawing(task: Task, num_pictures: int, device: torch.device, *, guided: bool) -> DrawnSteps | None:
    """Tokens a second of so many pictures drawn together, by some steps of an engine; None for a layout that draws
    none, and for a model that is too large to be run here."""
    order = next((o for o in task.layout.orders.values() if any(s.segment == "image" for s in o.spans)), None)
    with torch.device("meta"):
        too_large = make_model(task).num_parameters > LARGEST_PARAMETERS
    if order is None or too_large or task.feature_width is not None:
        return None
    given = {
        span.segment: torch.zeros(span.length, dtype=torch.long)
        for span in order.spans
        if isinstance(span, Span) and span.segment != "image"
    }
    with torch.random.fork_rng(devices=[]):
        model: AnyModel = make_model(task).to(device).eval()
    engine = Engine(model, task.layout, capacity=num_pictures)
    config = SampleConfig(guidance_scale=2.0 if guided else 1.0)
    for seed in range(num_pictures):
        null = Request(order=order.name, given=given) if guided else None
        engine.submit(Request(order=order.name, given=given, seed=seed, null=null), config)
    engine.step()
    started_at, drawn = time.perf_counter(), 0
    while not engine.is_idle and time.perf_counter() - started_at < PROBE_S / 4:
        drawn += len(engine.step())
    return DrawnSteps(num_pictures, drawn / (time.perf_counter() - started_at), engine.executor.name)


def choose_train(train: TrainConfig, num_rows: int | None) -> int:
    """Updates of a training; 1,000 where its rows are not known."""
    return 1000 if train.num_steps is None and num_rows is None else train.steps(num_rows or 1)

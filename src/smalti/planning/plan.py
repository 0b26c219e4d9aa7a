"""A plan: what a training, and drawing from what it trains, will take here and on GPUs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from smalti.errors import InputError
from smalti.models.decode_state import SLOT_BLOCK
from smalti.planning.footprint import Footprint, Task, footprint
from smalti.planning.gpus import BANDWIDTH_EFFICIENCY, GPU, KEPT_FREE, STEP_S, TRAINING_EFFICIENCY
from smalti.planning.layouts import Footprints, ParallelLayout, choose_layout
from smalti.planning.probe import choose_train, probe_drawing, probe_training
from smalti.planning.subjects import Subject
from smalti.precision import BFLOAT16, FLOAT32

DAY_S = 86_400
MOST_AT_ONCE = 4096
"""Rows that a server takes."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """The training in one process of this machine."""

    device: str
    threads: int
    precision: str
    path: str
    memory: dict[str, float]
    peak_bytes: float
    """At any moment, beside what Python and its libraries take."""
    step_s: float
    tokens_per_s: float
    days: float | None


@dataclass(frozen=True, kw_only=True)
class OnGPUs:
    """The training on so many GPUs of a kind; without a layout it does not fit."""

    gpu: str
    num_devices: int
    settings: str | None = None
    memory: dict[str, float] = field(default_factory=dict)
    total_bytes: float | None = None
    rows: int | None = None
    num_micro_batches: int | None = None
    step_s: float | None = None
    bound_by: str | None = None
    tokens_per_s: float | None = None
    days: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    why: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures drawn together on one device."""

    device: str
    pictures: int
    """At once; each under guidance has two rows."""
    most_pictures: int | None
    """For which the device has room."""
    pictures_per_s: float
    seconds: float
    """From a picture's first step to its last."""
    bound_by: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    num_parameters: int
    flops_per_token: float
    """Forward and backward pass, products alone."""
    tokens_per_sequence: int
    batch_size: int
    num_steps: int | None
    num_tokens: float | None
    assumptions: list[str]
    here: Here | None
    gpus: list[OnGPUs]
    drawing: list[Drawing]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    subject: Subject,
    *,
    gpus: Sequence[GPU] = (),
    device_counts: Sequence[int] = (1,),
    price: float | None = None,
    efficiency: float = TRAINING_EFFICIENCY,
    measure: bool = True,
    device: torch.device | str = "cpu",
) -> Plan:
    """`price` is that of a GPU's hour, in any currency; `efficiency` the share of a GPU's data sheet that the training
    reaches; `measure` probes this machine."""
    task, train = subject.task, subject.task.train
    if not 0 < efficiency <= 1:
        raise InputError(f"efficiency is {efficiency}; expected a share in (0, 1].")
    known = train.num_steps is not None or subject.num_rows is not None
    num_steps = train.steps(subject.num_rows or 1) if known else None
    length = task.layout.max_length
    one = footprint(task, 1, precision=FLOAT32, sharded=True)
    here = _here(subject, num_steps, torch.device(device)) if measure else None
    footprints = {FLOAT32: Footprints(task, FLOAT32), BFLOAT16: Footprints(task, BFLOAT16)}
    on_gpus = []
    for gpu in gpus:
        for count in device_counts:
            precision = FLOAT32 if train.precision == FLOAT32 else BFLOAT16
            layout, why = choose_layout(task, gpu, count, footprints[precision], efficiency)
            on_gpus.append(_on_gpus(gpu, count, layout, why, train.batch_size * length, num_steps, price))
    return Plan(
        name=subject.name,
        num_parameters=round(one.num_parameters),
        flops_per_token=one.flops / length,
        tokens_per_sequence=length,
        batch_size=train.batch_size,
        num_steps=num_steps,
        num_tokens=None if num_steps is None else num_steps * train.batch_size * length,
        assumptions=subject.assumptions,
        here=here,
        gpus=on_gpus,
        drawing=[*_drawing_here(subject, torch.device(device), measure), *_drawing_on(subject, one, gpus)],
    )


def _here(subject: Subject, num_steps: int | None, device: torch.device) -> Here:
    task, train = subject.task, subject.task.train
    found = probe_training(task, num_steps or choose_train(train, subject.num_rows), device)
    rows = max(1, train.batch_size // train.num_micro_batches)
    fused = device.type != "cpu"
    counted = footprint(task, rows, precision=found.precision, recompute=train.recompute, fused=fused)
    activations, peak = counted.activations_bytes, counted.peak_bytes
    if found.workspace_bytes is not None:
        activations = found.workspace_bytes
        peak = max(counted.state_bytes + activations, counted.evaluation_bytes)
    return Here(
        device=str(device),
        threads=torch.get_num_threads(),
        precision=found.precision,
        path="torch, operator by operator" if found.workspace_bytes is None else "the native kernel",
        memory=_parts(counted, activations),
        peak_bytes=peak,
        step_s=found.step_s,
        tokens_per_s=train.batch_size * task.layout.max_length / found.step_s,
        days=None if num_steps is None else num_steps * found.step_s / DAY_S,
    )


def _parts(counted: Footprint, activations: float) -> dict[str, float]:
    return {
        "weights": counted.weights_bytes,
        "gradients": counted.gradients_bytes,
        "optimizer": counted.optimizer_bytes,
        "average": counted.average_bytes,
        "activations": activations,
    }


def _on_gpus(
    gpu: GPU,
    count: int,
    layout: ParallelLayout | None,
    why: list[str],
    tokens: float,
    num_steps: int | None,
    price: float | None,
) -> OnGPUs:
    if layout is None:
        return OnGPUs(gpu=gpu.name, num_devices=count, why=why)
    days = None if num_steps is None else num_steps * layout.step_s / DAY_S
    hours = None if days is None else days * 24 * count
    return OnGPUs(
        gpu=gpu.name,
        num_devices=count,
        settings=layout.settings,
        memory=layout.memory._asdict(),
        total_bytes=layout.memory.total,
        rows=layout.rows,
        num_micro_batches=layout.num_micro_batches,
        step_s=layout.step_s,
        bound_by=layout.bound_by,
        tokens_per_s=tokens / layout.step_s,
        days=days,
        gpu_hours=hours,
        cost=None if hours is None or price is None else hours * price,
        why=why,
    )


# Drawing -------------------------------------------------------------------------------------------------------


def _codes(task: Task) -> int | None:
    """Codes of a picture; None for a layout without pictures."""
    return next(
        (span.length for order in task.layout.orders.values() for span in order.spans if span.segment == "image"), None
    )


def _drawing_here(subject: Subject, device: torch.device, measure: bool) -> list[Drawing]:
    codes, found = _codes(subject.task), []
    if not measure or codes is None:
        return []
    for pictures in (1, 16):
        drawn = probe_drawing(subject.task, pictures, device, guided=subject.is_guided)
        if drawn is not None:
            rate = drawn.tokens_per_s / codes
            found.append(
                Drawing(
                    device=f"{device}, {torch.get_num_threads()} threads, {drawn.executor}",
                    pictures=pictures,
                    most_pictures=None,
                    pictures_per_s=rate,
                    seconds=pictures / rate,
                    bound_by="measured",
                )
            )
    return found


def cache_bytes_per_row(task: Task, width: int = 2) -> float:
    """Keys and values of a sequence, in numbers of `width` bytes; of an encoder-decoder those of its captions too."""
    shape: Any = task.shape
    stack = getattr(shape, "decoder", None) or getattr(shape, "transformer", shape)
    slots = -(-stack.max_length // SLOT_BLOCK) * SLOT_BLOCK
    looked_at = shape.encoder.max_length if hasattr(shape, "encoder") else 0
    return 2 * stack.num_layers * stack.kv_width * width * (slots + looked_at)


def _drawing_on(subject: Subject, one: Footprint, gpus: Sequence[GPU]) -> list[Drawing]:
    """In bfloat16. A step reads all weights and what the cache holds so far, half of it on average."""
    codes, found = _codes(subject.task), []
    if codes is None:
        return []
    rows_each, cache = (2 if subject.is_guided else 1), cache_bytes_per_row(subject.task)
    weights = 2 * one.num_parameters
    products = one.flops / 3 / subject.task.layout.max_length  # of a token's forward pass
    for gpu in gpus:
        room = gpu.memory_bytes * (1 - KEPT_FREE) - weights
        most = int(room // (cache * rows_each))
        for pictures in sorted({1, 8, 64, min(most, MOST_AT_ONCE)} if most >= 1 else ()):
            if pictures > most:
                continue
            rows = pictures * rows_each
            reading_s = (weights + rows * cache / 2) / (gpu.memory_bytes_per_s * BANDWIDTH_EFFICIENCY)
            computing_s = rows * products / (gpu.bfloat16_flops * TRAINING_EFFICIENCY)
            step_s = max(reading_s, computing_s, STEP_S)
            bound_by = {reading_s: "memory", computing_s: "products", STEP_S: "launches"}[step_s]
            found.append(
                Drawing(
                    device=gpu.name,
                    pictures=pictures,
                    most_pictures=most,
                    pictures_per_s=pictures / (step_s * codes),
                    seconds=step_s * codes,
                    bound_by=bound_by,
                )
            )
    return found

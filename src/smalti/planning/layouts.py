"""How a training is laid out on so many GPUs: what fits, how long a step takes, and which is the fastest.

A layout says how many processes share each layer (tensor parallel), whether weights lie in shares (FSDP2), whether
activations are computed again, and in how many micro-batches a process takes its rows. Memory is counted
(`footprint.py`). Time is products over what trainings reach of a GPU's rate, and bytes over what its links move:
gathering weights goes on beside the products, sums within layers do not.
"""

from dataclasses import replace
from typing import NamedTuple

from smalti.planning.footprint import DEPTHS, Footprint, Task, footprint
from smalti.planning.gpus import BANDWIDTH_EFFICIENCY, GPU, KEPT_FREE, LAYER_S, TRAINING_EFFICIENCY
from smalti.precision import BFLOAT16

RECOMPUTED = 4 / 3
"""Products with activations that are computed again: the forward pass twice."""


class Memory(NamedTuple):
    """Bytes of one device, by part."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    """Weights that are whole for a while: two layers, and what is in none."""
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


class ParallelLayout(NamedTuple):
    """One way to train on so many devices."""

    num_devices: int
    sharding: str
    tensor_parallel: int
    recompute: bool
    num_micro_batches: int
    rows: int
    """Sequences of a micro-batch."""
    memory: Memory
    step_s: float
    bound_by: str

    @property
    def settings(self) -> str:
        """What `smalti train` is told."""
        parts = {"train.sharding": self.sharding, "train.tensor_parallel": self.tensor_parallel}
        parts |= {"train.recompute": str(self.recompute).lower(), "train.num_micro_batches": self.num_micro_batches}
        plain = {"train.sharding": "none", "train.tensor_parallel": 1, "train.recompute": "false"}
        plain |= {"train.num_micro_batches": 1}
        return " ".join(f"{name}={value}" for name, value in parts.items() if plain.get(name) != value)


class Footprints:
    """What a sequence takes in each way of computing, counted once for each."""

    def __init__(self, task: Task, precision: str):
        # as with several micro-batches: layouts reckon with all gradients, and a peak of one alone need not be found
        self.task = task._replace(train=replace(task.train, num_micro_batches=2))
        self.precision = precision
        self._found: dict[tuple[bool, int, bool], Footprint] = {}

    def __call__(self, *, sharded: bool, tensor_parallel: int, recompute: bool) -> Footprint:
        key = sharded, tensor_parallel, recompute
        if key not in self._found:
            found = footprint(
                self.task,
                1,
                precision=self.precision,
                sharded=sharded,
                tensor_parallel=tensor_parallel,
                recompute=recompute,
            )
            self._found[key] = found
        return self._found[key]


def choose_layout(
    task: Task, gpu: GPU, num_devices: int, footprints: Footprints, efficiency: float = TRAINING_EFFICIENCY
) -> tuple[ParallelLayout | None, list[str]]:
    """The fastest layout that fits, and why, in words; None where none does."""
    found: list[ParallelLayout] = []
    reasons: list[str] = []
    room = gpu.memory_bytes * (1 - KEPT_FREE)
    for tensor_parallel in (1, 2, 4, 8):
        if tensor_parallel > min(num_devices, gpu.per_machine) or num_devices % tensor_parallel:
            continue
        for sharding in ("none", "full"):
            in_shares = sharding == "full" or tensor_parallel > 1
            if (in_shares and task.train.optimizer != "adamw") or (sharding == "none" and tensor_parallel > 1):
                continue
            if sharding == "full" and num_devices == 1:
                continue
            before = len(found)
            least = None
            for recompute in (False, True):
                made, smallest = _layouts(
                    task, gpu, num_devices, sharding, tensor_parallel, recompute, footprints, efficiency, room
                )
                found += made
                least = smallest if least is None or smallest < least else least
            name = _name(sharding, tensor_parallel)
            if least == float("inf"):
                share = num_devices // tensor_parallel
                reasons.append(f"{name}: a batch of {task.train.batch_size} is not divisible by {share}")
            elif len(found) == before and least is not None:
                reasons.append(f"{name} needs {least / 1e9:,.0f} GB a device at least, and {room / 1e9:,.0f} are free")
        if found:
            break  # sums within layers only cost where layers fit
    if not found:
        return None, reasons
    best = min(found, key=lambda layout: (layout.step_s, layout.recompute, layout.sharding != "none"))
    others = {_name(one.sharding, one.tensor_parallel) + (" with recompute" if one.recompute else ""): one for one in
              sorted(found, key=lambda layout: -layout.step_s)}  # fmt: skip
    for name, one in reversed(others.items()):
        if (one.sharding, one.tensor_parallel, one.recompute) != (best.sharding, best.tensor_parallel, best.recompute):
            reasons.append(f"{name} would take {one.step_s:.3g} s a step, this {best.step_s:.3g}")
    return best, reasons


def _name(sharding: str, tensor_parallel: int) -> str:
    plain = "all weights on every device" if sharding == "none" else "weights in shares"
    return plain if tensor_parallel == 1 else f"{plain}, layers by {tensor_parallel} devices together"


def _layouts(
    task: Task,
    gpu: GPU,
    num_devices: int,
    sharding: str,
    tensor_parallel: int,
    recompute: bool,
    footprints: Footprints,
    efficiency: float,
    room: float,
) -> tuple[list[ParallelLayout], float]:
    """Those with the largest micro-batch that fits, and the memory of the smallest one."""
    data = num_devices // tensor_parallel
    if task.train.batch_size % data:
        return [], float("inf")
    share = task.train.batch_size // data
    counts = sorted(count for count in range(1, share + 1) if share % count == 0)
    smallest = float("inf")
    for count in counts:
        rows = share // count
        memory = memory_of(
            task, footprints, rows, data if sharding == "full" else 1, sharding, tensor_parallel, recompute
        )
        smallest = min(smallest, memory.total)
        if memory.total <= room:
            step_s, bound_by = _step_s(
                task, gpu, footprints, num_devices, sharding, tensor_parallel, recompute, count, efficiency
            )
            layout = ParallelLayout(
                num_devices, sharding, tensor_parallel, recompute, count, rows, memory, step_s, bound_by
            )
            return [layout], smallest
    return [], smallest


def memory_of(
    task: Task,
    footprints: Footprints,
    rows: int,
    num_shares: int,
    sharding: str,
    tensor_parallel: int,
    recompute: bool,
) -> Memory:
    """Of one device that takes `rows` sequences at a time."""
    sharded = sharding == "full"
    whole = footprints(sharded=sharded, tensor_parallel=1, recompute=recompute)
    one = footprints(sharded=sharded, tensor_parallel=tensor_parallel, recompute=recompute)
    held = _held(whole, tensor_parallel) / whole.num_parameters / num_shares
    copies = 0.0  # of the weights in the precision of the products, where they are not gathered in it
    if footprints.precision == BFLOAT16 and not sharded:
        copies = min(2 * one.num_parameters, one.activations_bytes)
    activations = copies + rows * (one.activations_bytes - copies)
    gathered = 0.0
    if sharded:
        width = 2 if footprints.precision == BFLOAT16 else 4
        root = whole.num_parameters - whole.in_blocks
        gathered = width * (2 * whole.block_parameters / tensor_parallel + 2 * root)  # with the root's gradients
    return Memory(
        whole.weights_bytes * held,
        whole.gradients_bytes * held,
        whole.optimizer_bytes * held,
        whole.average_bytes * held,
        gathered,
        activations,
    )


def num_layers(task: Task) -> int:
    return sum(getattr(task.shape, name, 0) for name in DEPTHS)


def _held(whole: Footprint, tensor_parallel: int) -> float:
    """Parameters of one device of a group that shares layers: its part of them, and all else."""
    return whole.num_parameters - whole.in_blocks + whole.in_blocks / tensor_parallel


def _step_s(
    task: Task,
    gpu: GPU,
    footprints: Footprints,
    num_devices: int,
    sharding: str,
    tensor_parallel: int,
    recompute: bool,
    num_micro_batches: int,
    efficiency: float,
) -> tuple[float, str]:
    """Seconds of a step, and what they go to."""
    one = footprints(sharded=sharding == "full", tensor_parallel=1, recompute=recompute)
    rate = gpu.bfloat16_flops if footprints.precision == BFLOAT16 else gpu.float32_flops
    flops = task.train.batch_size * one.flops * (RECOMPUTED if recompute else 1)
    products_s = flops / num_devices / (rate * efficiency)
    launches_s = num_micro_batches * num_layers(task) * LAYER_S
    data = num_devices // tensor_parallel
    parameters = _held(one, tensor_parallel)
    width = 2 if footprints.precision == BFLOAT16 else 4
    # Every process sends, and gets, all but its own share of what is gathered or summed.
    moved = parameters * (data - 1) / data
    if sharding == "full":  # weights for both passes of each micro-batch, gradients in float32
        moved *= num_micro_batches * (2 * width + 4)
    else:  # gradients summed: scattered and gathered
        moved *= 8
    link = gpu.link_bytes_per_s
    if num_devices > gpu.per_machine:  # a machine's GPUs send their parts of it side by side
        link = min(link, gpu.network_bytes_per_s * gpu.per_machine / tensor_parallel)
    weights_s = moved / (link * BANDWIDTH_EFFICIENCY) if data > 1 else 0.0
    sums_s = 0.0
    if tensor_parallel > 1:  # two sums a layer and pass, of all tokens of the group's rows
        tokens = task.train.batch_size / data * task.layout.max_length
        passes = 3 if recompute else 2
        moved = 2 * passes * num_layers(task) * tokens * task.shape.d_model * width
        moved *= 2 * (tensor_parallel - 1) / tensor_parallel
        sums_s = moved / (gpu.link_bytes_per_s * BANDWIDTH_EFFICIENCY)
    parts = {"products": products_s, "moving weights": weights_s, "launches": launches_s}
    bound_by = max(parts, key=lambda name: parts[name])
    return parts[bound_by] + sums_s, bound_by

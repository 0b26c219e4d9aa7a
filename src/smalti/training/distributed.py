"""Training by several processes, which `torchrun` starts."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from smalti.errors import InputError, first_line
from smalti.models.transformer import Attention, Transformer

NONE, FULL = SHARDINGS = ("none", "full")
DATA, TENSOR = "data", "tensor"


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that `torchrun` started; (0, 1), and nothing set up, for a single one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), world_size
    finally:
        if ours:
            dist.destroy_process_group()


class Processes(NamedTuple):
    """The processes of a training: which this one is, and what it shares with which others."""

    rank: int = 0
    size: int = 1
    tensor_parallel: int = 1
    """Neighbours that compute each layer together; they read the same rows."""
    mesh: DeviceMesh | None = None
    """None: every process has all weights."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which rows are this process's."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        """How many shares of rows there are."""
        return self.size // self.tensor_parallel

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all shares of rows."""
        if self.size > 1:
            dist.all_reduce(values, group=None if self.mesh is None else self.mesh.get_group(DATA))
        return values

    def wait(self) -> None:
        wait_for_all(self.size)


def make_processes(rank: int, size: int, device: torch.device, *, sharding: str, tensor_parallel: int) -> Processes:
    """Raises ValueError where the processes cannot be divided."""
    if size % tensor_parallel and size > 1:
        raise ValueError(
            f"tensor_parallel is {tensor_parallel}, and there are {size} processes: start a multiple of it, "
            f"torchrun --nproc-per-node {-(-size // tensor_parallel) * tensor_parallel}."
        )
    if size == 1 or (sharding == NONE and tensor_parallel == 1):
        return Processes(rank, size)
    mesh = init_device_mesh(device.type, (size // tensor_parallel, tensor_parallel), mesh_dim_names=(DATA, TENSOR))
    return Processes(rank, size, tensor_parallel, mesh)


@contextmanager
def others_alive(processes: Processes, last_checkpoint: Callable[[], str]) -> Iterator[None]:
    """Raises InputError, saying what the run goes on from, where a process cannot go on since another one has ended."""
    try:
        yield
    except RuntimeError as error:
        if processes.size == 1 or not re.search(r"gloo|nccl|connection|timed? ?out|peer", str(error), re.IGNORECASE):
            raise
        raise InputError(
            f"process {processes.rank} of {processes.size} ends, since another one does not answer any more "
            f"({first_line(error, 120)}): it was killed, or its machine is gone. {last_checkpoint()} Start the same "
            "command again, with as many processes or another number of them."
        ) from error


def wait_for_all(world_size: int) -> None:
    """Until every process has come here."""
    if world_size > 1:
        dist.barrier()


def gradients_kept_back(module: nn.Module, keep: bool) -> AbstractContextManager:
    """Of a batch's micro-batches only the last has the processes exchange gradients."""
    if keep and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers: every module that has an attention of its own."""
    return [m for m in model.modules() if any(isinstance(child, Attention) for child in m.children())]


def recompute_activations(model: nn.Module) -> None:
    """From now on training computes layers again in the backward pass, and keeps their input alone
    (arXiv:1604.06174)."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recomputes = True
    if not any(isinstance(module, Transformer) for module in model.modules()):  # blocks of a family's own
        for block in blocks_of(model):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

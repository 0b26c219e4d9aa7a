"""Training by several processes, which `torchrun` starts."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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


def wait_for_all(world_size: int) -> None:
    """Until every process has come here."""
    if world_size > 1:
        dist.barrier()


def summed(values: Tensor, world_size: int) -> Tensor:
    """The sum over all processes."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def gradients_kept_back(module: nn.Module, keep: bool) -> AbstractContextManager:
    """Of a batch's micro-batches only the last has the processes exchange gradients."""
    if keep and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def own_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; for None this process's GPU, if there is one."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")

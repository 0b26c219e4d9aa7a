"""Checkpoints that a kill at any moment cannot spoil, and the state of all random numbers.

A run's directory holds one folder per checkpoint, `step_00001200`, with `model.safetensors` (what is published),
`training_state.pt` (what only the run itself needs) and the checksums of both. Of a run whose weights lie in shares
(`parallel.py`), the folder `shards` holds what each process has of all tensors, in torch's distributed checkpoint,
which any other number of processes reads; its files are safetensors, so that nothing is unpickled. A folder is written
and synced under a temporary name and then renamed: a folder that has its final name is complete, and everything else is
ignored and later removed.
"""

import inspect
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from smalti.documents import read_json
from smalti.errors import InputError
from smalti.files import cause, locked, sync, write_json
from smalti.stopping import end_if_stopped
from smalti.weights import file_sha256

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "training_state.pt"
CHECKSUMS_FILE = "checksums.json"
SHARDS = "shards"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial-"


LOCK_FILE = ".lock"

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def run_lock(directory: Path, rank: int = 0) -> Iterator[None]:
    """Holds a run's folder while the block runs; of several processes of one run the first does. Raises InputError if
    another run holds it. However a process ends, the folder is free again."""
    with locked(directory / LOCK_FILE, directory) if rank == 0 else nullcontext():
        yield


def one_run_at_a_time(train: Callable[P, R]) -> Callable[P, R]:
    """The training function, which holds the folder that its argument `directory` names (see `run_lock`)."""
    signature = inspect.signature(train)

    @wraps(train)
    def held(*args: P.args, **settings: P.kwargs) -> R:
        with run_lock(Path(signature.bind(*args, **settings).arguments["directory"])):
            return train(*args, **settings)

    return held


class Checkpoint(NamedTuple):
    step: int
    weights: dict[str, Tensor]
    training_state: dict[str, Any]
    shards: Path | None = None
    """Where the tensors lie in shares; then there are no weights here."""


def check_writable(directory: Path | str, expected_bytes: int = 0) -> None:
    """Makes the directory and proves that it can be written, so that a run fails before its first step, not
    at its first checkpoint; also removes what an interrupted save left there.

    Raises InputError if it cannot be made or written, or has fewer than `expected_bytes` free.
    """
    directory = Path(directory)
    probe = directory / f"{_PARTIAL}probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
        for leftover in directory.glob(f"{_PARTIAL}step_*"):
            shutil.rmtree(leftover)
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        raise InputError(
            f"cannot write checkpoints to {directory}: {cause(error)}; choose a folder that can be written."
        ) from error
    if free_bytes < expected_bytes:
        raise InputError(
            f"{directory} has {_megabytes(free_bytes)} free, but the checkpoints of this run need about "
            f"{_megabytes(expected_bytes)}; free some space, keep fewer of them or choose another folder."
        )


def save_checkpoint(
    directory: Path | str,
    step: int,
    weights: dict[str, Tensor],
    training_state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of `step` and removes all but the last `keep`; returns the new folder.

    `training_state` may nest dicts, lists, tuples, tensors, numbers, strings and None, which is what
    `load_checkpoint` can read back without running code. Raises InputError if the disk is full or cannot be
    written; checkpoints already there are then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept.")
    directory = Path(directory)
    final = directory / f"step_{step:08d}"
    partial = directory / f"{_PARTIAL}{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        safetensors.torch.save_file(_unshared(weights), partial / WEIGHTS_FILE)
        with open(partial / STATE_FILE, "wb") as file:
            torch.save(training_state, file)
        write_json(partial / CHECKSUMS_FILE, {name: file_sha256(partial / name) for name in (WEIGHTS_FILE, STATE_FILE)})
        for name in (WEIGHTS_FILE, STATE_FILE, "."):
            sync(partial / name)
        end_if_stopped()
        _remove(final)
        os.rename(partial, final)
        sync(directory)
        for old in _complete(directory)[:-keep]:
            _remove(old)
    # torch and safetensors report a full disk by errors of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _not_saved(directory, step, error) from error
    return final


def _not_saved(directory: Path, step: int, error: Exception) -> InputError:
    latest = latest_checkpoint(directory)
    kept = f"the run can go on from {latest.name}" if latest else "there is no earlier checkpoint"
    return InputError(
        f"cannot save the checkpoint of step {step} to {directory}: {error}; {kept}. "
        "Free some space or make the folder writable, then start the same run again."
    )


def save_shards(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    training_state: dict[str, Any],
    keep: int,
    *,
    rank: int,
    size: int,
    wait: Callable[[], None],
) -> None:
    """`save_checkpoint` by all processes of a run together, each of which writes and hashes its part. `wait` waits for
    all of them; `directory` lies where all of them see it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    final = directory / f"step_{step:08d}"
    partial = directory / f"{_PARTIAL}{final.name}"
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / SHARDS).mkdir(parents=True)
        wait()
        with _without_notices():
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial / SHARDS), save_distributed=True))
        wait()
        own = sorted((partial / SHARDS).glob("*.safetensors"))[rank::size]
        write_json(partial / f"{rank}-{CHECKSUMS_FILE}", {f"{SHARDS}/{file.name}": file_sha256(file) for file in own})
        for file in own:
            sync(file)
        wait()
        if rank == 0:
            with open(partial / STATE_FILE, "wb") as file:
                torch.save(training_state, file)
            checksums = {STATE_FILE: file_sha256(partial / STATE_FILE)}
            for part in sorted(partial.glob(f"*-{CHECKSUMS_FILE}")):
                checksums |= read_json(part, f"remove the folder {partial}")
                part.unlink()
            write_json(partial / CHECKSUMS_FILE, checksums)
            for name in (STATE_FILE, SHARDS, "."):
                sync(partial / name)
            end_if_stopped()
            _remove(final)
            os.rename(partial, final)
            sync(directory)
            for old in _complete(directory)[:-keep]:
                _remove(old)
        wait()
    except (OSError, SafetensorError) as error:
        raise _not_saved(directory, step, error) from error


def load_shards(shards: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, whole or in shares of any number of processes, from those of the same names."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _without_notices():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(shards)))


def shapes_of_shards(shards: Path) -> dict[str, torch.Size]:
    """The tensors in a checkpoint of shares."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: dict[str, Any] = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in found.items()}


@contextmanager
def _without_notices() -> Iterator[None]:
    """What torch's checkpoint says of a process alone is no warning: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.checkpoint.*")
        yield


def latest_checkpoint(directory: Path | str) -> Path | None:
    """The folder of the last complete checkpoint, or None; incomplete ones are ignored."""
    complete = _complete(Path(directory))
    return complete[-1] if complete else None


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads one checkpoint folder, on the CPU. Raises InputError naming the file that is missing or
    damaged."""
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if not match:
        raise InputError(f"{path} is not a checkpoint; expected a folder with a name such as step_00001200.")
    mend = f"remove the folder {path} to go on from the checkpoint before it"
    checksums = path / CHECKSUMS_FILE
    if checksums.exists():  # checkpoints of an earlier version have none
        for name, sha256 in read_json(checksums, mend).items():
            inside = path / SHARDS if name.startswith(f"{SHARDS}/") else path
            if not (inside / Path(name).name).is_file() or file_sha256(inside / Path(name).name) != sha256:
                raise InputError(f"{inside / Path(name).name} is damaged: its checksum is not the one saved; {mend}.")
    file, shards = path / WEIGHTS_FILE, path / SHARDS if (path / SHARDS).is_dir() else None
    try:
        weights = {} if shards else safetensors.torch.load_file(file)
        file = path / STATE_FILE
        training_state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise _unreadable(file, error) from error
    if not isinstance(training_state, dict):
        raise InputError(f"{file} holds no state of a training; {mend}.")
    return Checkpoint(int(match[1]), weights, training_state, shards)


def load_run(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to, `training_state["run"]`, without reading its tensors. Raises
    InputError naming the file if it is damaged."""
    file = path / STATE_FILE
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)["run"]
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(
        f"cannot read {file}: {error}; remove the folder {file.parent} to go on from the checkpoint before it."
    )


def random_state() -> dict[str, Any]:
    """The state of the global generators of Python, NumPy and torch (with every GPU), for
    `training_state`."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": (version, torch.tensor(internal), gauss_next),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned. The number of GPUs must be the same."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])


def _complete(directory: Path) -> list[Path]:
    """Checkpoint folders in the order of their steps."""
    if not directory.is_dir():
        return []
    found = {int(match[1]): path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def _remove(checkpoint: Path) -> None:
    """Takes the final name away first: a folder half removed must not look complete."""
    if not checkpoint.exists():
        return
    doomed = checkpoint.with_name(f"{_PARTIAL}{checkpoint.name}-old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _unshared(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors; safetensors refuses two names for one memory, so tied weights are written
    twice."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return unshared


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"

"""Weights in safetensors files: written, and read once, straight into the tensors of a module, hashed on the way.

A file is read in chunks, into the tensors' own memory where they are stored as they are wanted, else through one of two
buffers. While another thread hashes a chunk, it is searched for numbers that are not finite, and converted or moved to
another device: beside the module no more than two chunks are in memory.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smalti.errors import InputError, first_line, shortened

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
"""What a folder with a network in it holds."""
ANEW = "fetch or save the bundle again"
CHUNK_BYTES = 2**22
SERIAL_NUMBERS = 2**15
"""Of more numbers torch shares out the work to its threads, which here would compete with the one that hashes."""
FREE_NUMBERS = 2**26
"""That a network may ask for beside its weights: tables of positions, and what its initialisation takes."""
BUILD_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
"""What building a network of odd numbers raises, in Python and in torch."""
STORED_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The format's names of what a weight may be stored in."""
Module = TypeVar("Module", bound=nn.Module)


# Writing and hashing -------------------------------------------------------------------------------------------


def save_weights(state: Mapping[str, Tensor], path: Path, *, half: bool = False) -> None:
    """Writes tensors as safetensors. With `half`, floating ones in float16, but for those beyond its range."""
    save_file({name: (_halved(t) if half else t).contiguous() for name, t in state.items()}, path)
    path.chmod(0o644)  # safetensors lets nobody else read its files; a bundle is there to be shared


def _halved(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    halved = tensor.half()
    return halved if halved.isfinite().all() else tensor


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {ANEW}.") from error


def check_sha256(path: Path, sha256: object) -> None:
    """Raises InputError if a file's checksum is another one."""
    if file_sha256(path) != sha256:
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) is damaged or was changed: its checksum is not the one in the "
            f"config; {ANEW}."
        )


def weights_sha256(*modules: nn.Module) -> str:
    """A hash of all weights and buffers as they are in memory: the same however they are stored."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Reading -------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    """Of its bytes, among those behind the header."""


def load_module(
    build: Callable[[], Module],
    path: Path,
    *,
    sha256: object = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Module:
    """The module of a bundle's config with the weights of a safetensors file, floating ones in `dtype`.

    The file is read once; on the device "meta" only its header is, and no weights are there. While the module is
    built, it may take the memory that tensors of the file's sizes need and little more: a config of sizes that the
    file does not bear out is told at once. Raises InputError naming a file that is damaged, or has another checksum
    than `sha256` if that is given; naming the tensor that differs, or holds a number that is not finite; or whatever
    `build` raises.
    """
    with _damage_told_first(path, sha256):
        stored, num_header_bytes = _read_header(path)
        module = build_within(build, sum(tensor.shape.numel() for tensor in stored.values()), path)
        wanted = module.state_dict()
        _check_fit(path, stored, wanted)
        types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in wanted.items()}
        state = {name: torch.empty(stored[name].shape, dtype=types[name], device=device) for name in wanted}
        if torch.device(device).type != "meta":
            _fill(state, stored, path, num_header_bytes, sha256)
        module.load_state_dict(state, assign=True)
        return module.to(device)  # the tables that are no weights


@contextmanager
def _damage_told_first(path: Path, sha256: object) -> Iterator[None]:
    """Of a file that is not the one meant, whatever else is wrong with it follows from that."""
    try:
        yield
    except InputError:
        if sha256 is not None:
            check_sha256(path, sha256)
        raise


def _read_header(path: Path) -> tuple[dict[str, Stored], int]:
    """The tensors in the order of their bytes, and how many bytes come before those of the first."""
    try:
        with safe_open(path, "pt"):  # checks that the tensors lie end to end, and fill the file
            pass
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(num_bytes))
        content.pop("__metadata__", None)
        stored = {
            name: Stored(STORED_TYPES[tensor["dtype"]], torch.Size(tensor["shape"]), tensor["data_offsets"][0])
            for name, tensor in sorted(content.items(), key=lambda item: item[1]["data_offsets"])
        }
    except KeyError as error:
        raise InputError(f"{path} holds weights of the type {error}, expected {', '.join(STORED_TYPES)}.") from error
    except Exception as error:  # it raises errors of Rust, of Python and of torch
        raise InputError(f"{path} is not a whole safetensors file ({first_line(error)}); {ANEW}.") from error
    return stored, 8 + num_bytes


def _check_fit(path: Path, stored: Mapping[str, Stored], wanted: Mapping[str, Tensor]) -> None:
    if differing := [name for name in {**wanted, **stored} if _shape(wanted.get(name)) != _shape(stored.get(name))]:
        name = differing[0]
        raise InputError(
            f"{path} does not fit the config beside it: {len(differing)} tensors differ, the first {shortened(name)}, "
            f"which is {_shape(stored.get(name))} in the file and {_shape(wanted.get(name))} by the config; {ANEW}."
        )
    for name, tensor in stored.items():
        if tensor.dtype.is_floating_point != wanted[name].is_floating_point():
            raise InputError(f"{path}: the tensor {name} holds {tensor.dtype}, expected {wanted[name].dtype}; {ANEW}.")


def _shape(tensor: Tensor | Stored | None) -> str:
    return "not there" if tensor is None else "×".join(map(str, tensor.shape)) or "a single number"


def _fill(
    state: Mapping[str, Tensor], stored: Mapping[str, Stored], path: Path, num_header_bytes: int, sha256: object
) -> None:
    nonfinite = None
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as other_thread:
        reader = _Chunks(file, other_thread if sha256 is not None else None)
        for _ in reader.next_bytes(num_header_bytes):
            pass
        for name, tensor in stored.items():
            rest = state[name].view(-1)
            as_stored = rest.dtype == tensor.dtype and rest.is_cpu
            where = rest.view(torch.uint8).numpy().data if as_stored else None
            for chunk in reader.next_bytes(rest.numel() * tensor.dtype.itemsize, where):
                for numbers in torch.frombuffer(chunk, dtype=tensor.dtype).split(SERIAL_NUMBERS):
                    if nonfinite is None and not _all_finite(numbers):
                        nonfinite = name
                    if not as_stored:
                        rest[: len(numbers)].copy_(numbers)
                        rest = rest[len(numbers) :]
        if sha256 is not None and reader.sha256() != sha256:
            check_sha256(path, sha256)
    if nonfinite is not None:
        raise InputError(
            f"{path}: the tensor {shortened(nonfinite)} holds numbers that are not finite, with which nothing can be "
            "drawn: the training diverged, or the file was damaged before its checksum was made; train it anew."
        )


def _all_finite(numbers: Tensor) -> bool:
    """A sum passes on what is not finite, and takes a tenth of the time of looking at each; it may also overflow."""
    if not numbers.is_floating_point() or math.isfinite(numbers.sum(dtype=torch.float32)):
        return True
    return bool(numbers.isfinite().all())


class _Chunks:
    """The bytes of a file from its start to its end, hashed by another thread if one is given."""

    def __init__(self, file: FileIO, hashing: ThreadPoolExecutor | None):
        self.file, self.hashing, self.digest = file, hashing, hashlib.sha256()
        self.buffers = [bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)]
        self.hashed: Future | None = None

    def next_bytes(self, num_bytes: int, where: memoryview | None = None) -> Iterator[memoryview]:
        """In chunks, in the memory given, or else in buffers of which each holds until the next chunk but one."""
        for start in range(0, num_bytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, num_bytes - start)
            view = memoryview(self.buffers[0])[:size] if where is None else where[start : start + size]
            filled = 0
            while filled < len(view):
                if not (num_read := self.file.readinto(view[filled:])):
                    raise InputError(f"{self.file.name} became shorter while it was read; {ANEW}.")
                filled += num_read
            if self.hashing is not None:
                self._wait()
                self.hashed = self.hashing.submit(self.digest.update, view)
            self.buffers.reverse()
            yield view

    def sha256(self) -> str:
        self._wait()
        return self.digest.hexdigest()

    def _wait(self) -> None:
        if self.hashed is not None:
            self.hashed.result()


# Building ------------------------------------------------------------------------------------------------------


def build_within(build: Callable[[], Module], num_weights: int, where: Path | str) -> Module:
    """The module without initial values, which must not ask for much more than `num_weights` numbers, those there are
    for it. Raises InputError before it is given them."""
    with _Uninitialised(4 * num_weights + FREE_NUMBERS, where):
        return build()


class _Uninitialised(TorchFunctionMode):
    """Counts the numbers of new tensors, and leaves out to fill them: the system gives memory to those that are
    written to, so that what is built takes none. Not the device "meta": initialising there makes torch import its
    compiler, which takes ten times as long as loading a bundle."""

    def __init__(self, num_left: int, where: Path | str):
        super().__init__()
        self.num_left, self.where = num_left, where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        if func in _FACTORIES:
            self.num_left -= _num_asked(func, args, kwargs or {})
            if self.num_left < 0:
                raise InputError(
                    f"{self.where} holds far fewer numbers than the config beside it asks for: they do not belong "
                    f"together, or a size in the config is wrong; {ANEW}."
                )
        return func(*args, **(kwargs or {}))


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange)
_INITIALISERS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)


def _num_asked(func: Any, args: Any, settings: dict[str, Any]) -> int:
    if func is torch.arange:
        start, stop = ([0, *args] if len(args) == 1 else args)[:2]
        return int(stop - start)
    size = settings.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return math.prod(int(side) for side in size if isinstance(side, int))

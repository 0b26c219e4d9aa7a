"""Reading foreign weight and config files without running anything they contain.

Pickled files go through `torch.load(weights_only=True)`, which builds tensors and plain containers and refuses
every other object. Three harmless kinds are let in: `argparse.Namespace`, which training scripts save beside
their weights, and what Lightning and NumPy leave in a checkpoint, which is replaced by an inert stand-in.
"""

import argparse
import io
import os
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor

from smalti.documents import read_json, read_yaml
from smalti.errors import InputError, shortened

EMA_NAMES = ("ema", "model_ema", "state_dict_ema")
CONTAINER_NAMES = ("model", "module", "state_dict")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """The tensors of a weight file by their names, and notes on where in the file they were found."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


class Unread(dict):
    """Stands where a checkpoint holds an object of a class that is not needed for its weights."""

    def __init__(self, *_args):
        super().__init__()

    def __setstate__(self, _state):
        """Whatever the object held is not kept."""


def read_weights(path: Path) -> ForeignWeights:
    """The state dict in a `.safetensors` file or in anything `torch.save` wrote: bare, or under `model`,
    `module` or `state_dict`, with or without the prefixes that DDP and torch.compile add. Averaged (EMA)
    weights are chosen where there are any. Raises InputError if the file cannot be read as that, or asks for
    anything but tensors and plain values."""
    content = read_torch_file(path) if not _is_safetensors(path) else _read_safetensors(path)
    state, notes = _choose_state(content, path)
    tensors, prefixes = _strip_wrappers(state, path)
    _require_plain(tensors, path)
    if prefixes:
        notes.append(f"took off the prefix {' and '.join(prefixes)}")
    return ForeignWeights(tensors=tensors, notes=tuple(notes))


def read_config(path: Path) -> dict:
    """A config as a dict, from JSON, YAML, or a dict or Namespace that `torch.save` wrote."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a JSON, YAML or .pt file with the original's config.")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        content = read_torch_file(path)
        content = vars(content) if isinstance(content, argparse.Namespace) else content
    else:
        mend = "give the original's config, in JSON or YAML"
        content = (read_json if path.suffix == ".json" else read_yaml)(path, mend)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a mapping of names to values.")
    return content


def read_torch_file(path: Path) -> object:
    """What `torch.save` wrote, on the CPU. Raises InputError on anything but tensors and plain values."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the weight file itself.")
    allowed = [argparse.Namespace, *((Unread, name) for name in _inert_names(path))]
    try:
        with torch.serialization.safe_globals(allowed), _WholeFile(io.FileIO(path)) as file:
            source = path if zipfile.is_zipfile(path) else file
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        asks = f"it asks to load {wanted[1]}" if wanted else _one_line(error)
        raise InputError(
            f"{path} is refused and nothing in it was run: {asks}, where only tensors and plain values are "
            "read. If you trust its author, have it saved again as a bare state dict or as safetensors."
        ) from None
    except Exception as error:  # a damaged file makes it raise nearly anything
        raise InputError(
            f"{path} cannot be read as a PyTorch weight file: {type(error).__name__}, {_one_line(error)}; fetch or "
            "save it again."
        ) from None
    _check_crc(path)
    return content


class _WholeFile(io.BufferedReader):
    """A file of which nobody is given memory for more than it holds, whatever length its content states."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _check_crc(path: Path) -> None:
    """Raises InputError if a record of a zip file of torch.save has another checksum than was noted. torch does not
    look; and a file saved without checksums, in which no record has its own, passes."""
    if not zipfile.is_zipfile(path):  # of a PyTorch before 1.6, which wrote none
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if record.file_size]
            damaged = [record.filename for record in records if not _is_whole(archive, record)]
    except Exception as error:
        raise InputError(f"{path} is a damaged zip file: {_one_line(error)}; fetch or save it again.") from None
    if damaged and len(damaged) < len(records):
        raise InputError(
            f"{path}: the record {damaged[0]} is damaged, its checksum is not the one noted; fetch or save it again."
        )


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    found = 0
    try:
        with archive.open(record) as file:
            while block := file.read(2**22):
                found = zlib.crc32(block, found)
    except zipfile.BadZipFile:  # it compares the checksum itself, at the end
        return False
    return found == record.CRC


def _require_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises InputError naming a tensor that is not dense and plain, or that a few numbers in the file are said to fill
    over and over."""
    for name, tensor in tensors.items():
        fault = None
        if tensor.is_quantized:
            fault = "is quantized; save it in floating point (tensor.dequantize())"
        elif tensor.layout != torch.strided or tensor.is_nested:
            fault = f"is of the layout {tensor.layout}; save it dense (tensor.to_dense())"
        elif tensor.is_meta:
            fault = "has no numbers (it is on the device meta); save the weights themselves"
        elif tensor.is_complex():
            fault = f"holds {tensor.dtype}; weights are real numbers"
        elif (num_bytes := tensor.numel() * tensor.element_size()) > max(2**26, tensor.untyped_storage().nbytes()):
            fault = f"would fill {num_bytes:,} bytes with the {tensor.untyped_storage().nbytes():,} there are"
        if fault is not None:
            raise InputError(f"{path}: the tensor {shortened(name)} {fault}.")


def _inert_names(path: Path) -> list[str]:
    """Full names of classes in the file that may be passed over, found without unpickling it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file of torch.save: torch.load will say what is wrong with it
        return []
    return [name for name in names if _INERT.fullmatch(name)]


_INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\.[\w.]+"
    r"|numpy\.(_?core\.multiarray\.scalar|dtype|dtypes\.\w+|float64|float32|int64)"
    r"|typing\.Any|collections\.defaultdict|builtins\.(list|dict|int)"
)


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with the length of its JSON header, whatever the file is called."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the weight file itself.")
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # of Rust, of Python, of torch
        raise InputError(f"{path} cannot be read as safetensors: {_one_line(error)}") from None


def _choose_state(content: object, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    if _is_state(content):
        return content, ["the file is a bare state dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict.")
    for name in (*EMA_NAMES, *CONTAINER_NAMES):
        state = content.get(name)
        if not _is_state(state):
            continue
        notes = [f"weights taken from `{name}`"]
        if name in EMA_NAMES:
            notes = [f"averaged (EMA) weights taken from `{name}`, not the last ones"]
        passed_over = sorted(str(other) for other in content if other != name)
        if passed_over:
            notes.append(f"passed over beside it: {', '.join(passed_over)}")
        return state, notes
    names = ", ".join(sorted(map(str, content))[:8])
    raise InputError(
        f"{path} holds no state dict: expected names to tensors, alone or under one of "
        f"{', '.join((*EMA_NAMES, *CONTAINER_NAMES))}; found {names or 'nothing'}."
    )


def _is_state(content: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _strip_wrappers(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    stripped: list[str] = []
    state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}  # of torch's AveragedModel
    while prefix := next((p for p in WRAPPER_PREFIXES if state and all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        stripped.append(prefix)
    if any("_orig_mod." in key for key in state):  # parts compiled one by one
        renamed = {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}
        if len(renamed) < len(state):
            raise InputError(f"{path} holds some weights both with and without the prefix _orig_mod.")
        state = renamed
        stripped.append("_orig_mod.")
    return state, stripped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

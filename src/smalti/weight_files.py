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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor

from smalti.documents import read_json, read_yaml
from smalti.errors import InputError, shortened
from smalti.file_kinds import PICKLE, SAFETENSORS, ZIP, FileKind, kind_of, refuse_pipe

EMA_NAMES = ("ema", "model_ema", "state_dict_ema")
CONTAINER_NAMES = ("model", "module", "state_dict")
INNER_NAMES = ("shadow", *CONTAINER_NAMES)
"""Under which averaged weights may lie within theirs."""
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What stands within keys where parts were compiled, sharded or checkpointed one by one."""
MAPPINGS = 32
"""Of a large file; each takes addresses for all of it."""
CHECKED_AT_ONCE = 2**20
"""Values of a tensor, so that what is made of them on the way stays small."""
MAX_NESTING = 3
"""How deep a state dict is looked for that lies under none of the names above."""


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """The tensors of a weight file by their names, and notes on where in the file they were found."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    """What a training script noted of itself beside its weights, under `args`."""


class Unread(dict):
    """Stands where a checkpoint holds an object of a class that is not needed for its weights."""

    def __init__(self, *_args):
        super().__init__()

    def __setstate__(self, _state):
        """Whatever the object held is not kept."""


def read_weights(path: Path) -> ForeignWeights:
    """The state dict in a `.safetensors` file or in anything `torch.save` wrote: bare, or under `model`, `module` or
    `state_dict`, or the only one deeper in, with or without the prefixes that DDP, FSDP and torch.compile add. Averaged
    (EMA) weights are chosen where there are any. Raises InputError if the file cannot be read as that, saying what it
    is instead, or asks for anything but tensors and plain values."""
    kind = _weight_kind(path)
    content = _read_safetensors(path) if kind is SAFETENSORS else read_torch_file(path)
    state, notes = _choose_state(content, path)
    state, more = _averaged_within(state)
    tensors, prefixes = _strip_wrappers(state, path)
    _require_plain(tensors, path)
    if prefixes:
        more.append(f"took off the prefix {' and '.join(prefixes)}")
    noted = content.get("args") if isinstance(content, dict) else None
    settings = vars(noted) if isinstance(noted, argparse.Namespace) else noted
    return ForeignWeights(
        tensors=tensors, notes=(*notes, *more), settings=settings if isinstance(settings, dict) else {}
    )


def _weight_kind(path: Path) -> FileKind | None:
    """What a weight file is by its first bytes. Raises InputError if it is surely none, saying what it is."""
    refuse_pipe(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a file"
        raise InputError(f"{path} is {what}; give the weight file itself.")
    kind = kind_of(path)
    if kind in (ZIP, PICKLE, SAFETENSORS):
        return kind
    if kind is not None:
        raise InputError(f"{path} is {kind.what}, not weights: {kind.advice or 'give the weight file itself'}.")
    if path.suffix == ".safetensors":
        return SAFETENSORS
    return None


def read_config(path: Path) -> dict:
    """A config as a dict, from JSON, YAML, or a dict or Namespace that `torch.save` wrote."""
    refuse_pipe(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a JSON, YAML or .pt file with the original's config.")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        content = read_torch_file(path)
        content = vars(content) if isinstance(content, argparse.Namespace) else content
    else:
        kind = kind_of(path)
        if kind is not None and kind.advice:
            raise InputError(f"{path} is {kind.what}, not a config: {kind.advice}.")
        mend = "give the original's config, in JSON or YAML"
        content = (read_json if path.suffix == ".json" else read_yaml)(path, mend)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a mapping of names to values.")
    return content


def read_torch_file(path: Path) -> object:
    """What `torch.save` wrote, on the CPU. Raises InputError on anything but tensors and plain values."""
    refuse_pipe(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the weight file itself.")
    allowed = [argparse.Namespace, *((Unread, name) for name in _inert_names(path))]
    try:
        with torch.serialization.safe_globals(allowed), _WholeFile(io.FileIO(path)) as file:
            # By the first bytes, as torch does: to zipfile a list of contents at the end is enough.
            source = path if kind_of(path) is ZIP else file
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} is refused and nothing in it was run: it asks to load {wanted[1]}, where only tensors and "
                "plain values are read. If you trust its author, have it saved again as a bare state dict or as "
                "safetensors."
            ) from error
        raise InputError(_no_torch_file(path, "it is no pickle that torch.save wrote")) from error
    except (Exception, MemoryError) as error:  # a damaged file may ask for any amount of memory
        raise InputError(_no_torch_file(path, _one_line(error))) from error
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
        raise InputError(f"{path} is a damaged zip file: {_one_line(error)}; fetch or save it again.") from error
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


def _no_torch_file(path: Path, reason: str) -> str:
    size = path.stat().st_size
    advice = f"it has {size} bytes: compare with where it is from, and fetch it again"
    if kind_of(path) is ZIP:
        # torch.save writes a zip archive too; the list of what is in it stands at its end.
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
        except Exception:  # a damaged list makes zipfile raise nearly anything
            reason = f"it is cut short or damaged ({reason})"
        else:
            if "data.pkl" not in names:
                reason, advice = f"it is {ZIP.what} of other things", ZIP.advice
    return f"{path} cannot be read as a PyTorch weight file: {reason}; {advice}."


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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the order of their bytes, which are read where they are first looked at. Every few have a mapping
    of the file of their own: what was read of it leaves memory when they do."""
    try:
        with safe_open(path, "pt") as file:
            names = file.offset_keys()
        tensors, at_once = dict[str, Tensor](), -(-len(names) // MAPPINGS)
        for start in range(0, len(names), at_once or 1):
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names[start : start + at_once]}
        return tensors
    except (Exception, MemoryError) as error:
        size = path.stat().st_size
        raise InputError(
            f"{path} cannot be read as safetensors: {_one_line(error)}; it has {size} bytes and may be cut short: "
            "compare with where it is from, and fetch it again."
        ) from error


def _choose_state(content: object, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    if _is_state(content):
        return content, ["the file is a bare state dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict.")
    places: dict[str, object] = {name: content.get(name) for name in EMA_NAMES}
    for name in EMA_NAMES:
        if isinstance(inner := content.get(name), dict):
            places |= {f"{name}.{below}": inner.get(below) for below in INNER_NAMES}
    places |= {name: content.get(name) for name in CONTAINER_NAMES}
    for place, state in places.items():
        if not _is_state(state):
            continue
        top = place.partition(".")[0]
        notes = [f"weights taken from `{place}`"]
        if top in EMA_NAMES:
            notes = [f"averaged (EMA) weights taken from `{place}`, not the last ones"]
        passed_over = sorted(str(other) for other in content if other != top)
        if passed_over:
            notes.append(f"passed over beside it: {', '.join(passed_over)}")
        return state, notes
    deeper = dict(_states_within(content, "", MAX_NESTING))
    if len(deeper) == 1:
        place, state = next(iter(deeper.items()))
        return state, [f"weights taken from `{place}`, the only state dict in the file"]
    names = ", ".join(sorted(map(str, content))[:8])
    found = f"several, {', '.join(deeper)}; save the one to use by itself" if deeper else names or "nothing"
    raise InputError(
        f"{path} holds no state dict: expected names to tensors, alone or under one of "
        f"{', '.join((*EMA_NAMES, *CONTAINER_NAMES))}; found {found}."
    )


def _states_within(content: dict, place: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, value in content.items():
        if _is_state(value):
            yield f"{place}{name}", value
        elif isinstance(value, dict) and depth > 1:
            yield from _states_within(value, f"{place}{name}.", depth - 1)


def _averaged_within(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights with those that latent-diffusion's LitEma keeps of them in their place: `model_ema` and the key
    without its dots."""
    prefix = "model_ema."
    if f"{prefix}decay" not in state:
        return state, []
    averaged = {key: state.get(prefix + key.replace(".", "")) for key in state if not key.startswith(prefix)}
    found = {key: tensor for key, tensor in averaged.items() if tensor is not None}
    if not found:
        return state, []
    return {key: found.get(key, state[key]) for key in averaged}, [
        f"averaged (EMA) weights taken from `model_ema` for {len(found)} of {len(averaged)} tensors, not the last ones"
    ]


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
    for wrapper in INNER_WRAPPERS:
        if any(wrapper in key for key in state):
            renamed = {key.replace(wrapper, ""): tensor for key, tensor in state.items()}
            if len(renamed) < len(state):
                raise InputError(f"{path} holds some weights both with and without the prefix {wrapper}")
            state = renamed
            stripped.append(wrapper)
    return state, stripped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def require_values(
    tensors: Mapping[str, Tensor], used: Iterable[str], *, allow_nonfinite: bool = False
) -> tuple[str, ...]:
    """Raises InputError naming the first tensor of those `used` that is no floating-point one (quantized weights have
    scales beside them, which are not read), or holds NaN or infinity, as a run that diverged leaves them: unless they
    are allowed; then a note counts them."""
    used = tuple(used)
    require_floating(tensors, used)
    return nonfinite_notes({key: count_nonfinite(tensors[key]) for key in used}, allow_nonfinite=allow_nonfinite)


def require_floating(tensors: Mapping[str, Tensor], used: Iterable[str]) -> None:
    """Raises InputError naming the first tensor of those `used` that holds whole numbers."""
    for key in used:
        if not tensors[key].is_floating_point():
            raise InputError(
                f"{key} holds {str(tensors[key].dtype).removeprefix('torch.')}, expected floating-point numbers: "
                "quantized weights are not read; take the original ones."
            )


class Nonfinite(NamedTuple):
    num: int
    of: int


def count_nonfinite(tensor: Tensor) -> Nonfinite:
    """How many values are NaN or infinite."""
    if tensor.is_meta:
        return Nonfinite(0, tensor.numel())
    pieces = tensor.flatten().split(CHECKED_AT_ONCE)
    return Nonfinite(sum(int((~piece.isfinite()).sum()) for piece in pieces), tensor.numel())


def nonfinite_notes(found: Mapping[str, Nonfinite], *, allow_nonfinite: bool) -> tuple[str, ...]:
    """Raises InputError of values that are NaN or infinite, by the names of their tensors; if they are allowed, the
    note on them."""
    nonfinite = [key for key, counted in found.items() if counted.num]
    if not nonfinite:
        return ()
    first = found[nonfinite[0]]
    what = f"{nonfinite[0]} holds {first.num} of {first.of} values that are NaN or infinite"
    others = f", and so do {len(nonfinite) - 1} other tensors" if len(nonfinite) > 1 else ""
    if allow_nonfinite:
        return (f"warning: {what}{others}",)
    raise InputError(
        f"{what}{others}: the run they are from diverged, or the file is damaged; take an earlier checkpoint, or go on "
        "with --allow-nonfinite."
    )

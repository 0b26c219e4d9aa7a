"""The directory a user loads: what is in it, how it is written whole, how it is checked when read.

config.json             format version, layout, model, pictures, sampling defaults, measured figures, checksums
model.safetensors       the transformer's weights; may be in half precision
text_tokenizer.json     the words, as the `tokenizers` library saves them
image_tokenizer/        config.json and model.safetensors of the image tokenizer
README.md               the model card
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smalti.documents import read_json
from smalti.errors import InputError, first_line, shortened
from smalti.files import new_folder

FORMAT = "smalti bundle"
FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TEXT_TOKENIZER = "text_tokenizer.json"
IMAGE_TOKENIZER = "image_tokenizer"
CARD = "README.md"
PARTS = (WEIGHTS, TEXT_TOKENIZER, f"{IMAGE_TOKENIZER}/config.json", f"{IMAGE_TOKENIZER}/model.safetensors")
"""Files of which a bundle's config must know the checksum, where they are there."""
ANEW = "fetch or save the bundle again"
FREE_NUMBERS = 2**26
"""That a network may ask for beside its weights: tables of positions, and what its initialisation takes."""
BUILD_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
"""What building a network of odd numbers raises, in Python and in torch."""
Module = TypeVar("Module", bound=nn.Module)


def shipped_bundles() -> dict[str, Path]:
    """The bundles that come with the package, by name."""
    folder = Path(str(resources.files("smalti"))) / "bundles"
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def find_bundle(name: str | Path) -> Path:
    """The folder of a bundle: a folder given as it is, a shipped bundle by name, or a hub's `owner/name`, fetched.

    Raises InputError listing what there is.
    """
    shipped = shipped_bundles()
    # A folder of that name which is no bundle, such as one of data, does not hide a shipped one.
    if Path(name).is_dir() and (str(name) not in shipped or (Path(name) / CONFIG).is_file()):
        return Path(name)
    if str(name) in shipped:
        return shipped[str(name)]
    # A mistyped path must not turn into a download: `out/demo` is a hub's name only if there is no folder `out`.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not Path(name).parent.exists():
        return _fetch(str(name))
    raise InputError(
        f"there is no bundle {str(name)!r}: expected a folder with a {CONFIG}, a hub's owner/name, or one that ships: "
        f"{', '.join(shipped) or '(none)'}."
    )


def _fetch(repository: str) -> Path:
    hub = import_hub()
    try:
        return Path(hub.snapshot_download(repository))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise InputError(
            f"there is no folder {repository}, and the hub does not give a bundle of that name: {first_line(error)}"
        ) from error


def import_hub() -> Any:
    """The `huggingface_hub` module. Raises InputError naming the extra that installs it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("this needs huggingface_hub, which is an extra: pip install 'smalti[hub]'.") from error
    return huggingface_hub


def write_bundle(directory: Path | str, write_files: Callable[[Path], dict[str, Any]], *, force: bool = False) -> None:
    """Lets `write_files` fill a temporary folder and return what `config.json` should hold; adds the format and the
    files' checksums, and puts the folder in place. Raises InputError if `directory` exists and is not empty, unless
    `force`; what `force` replaces must be a bundle."""
    with new_folder(directory, force=force, holds=_is_bundle, what="bundle") as temporary:
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **write_files(temporary)}
        config["sha256"] = {
            str(path.relative_to(temporary)): file_sha256(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and path.name != CARD
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(directory: Path) -> dict[str, Any]:
    """A bundle's `config.json`, after checking that every file it names is there and unharmed.

    Raises InputError naming the file and the mend.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} is not a bundle: it has no {CONFIG}.")
    config = read_json(path, ANEW)
    if config.get("format") != FORMAT:
        raise InputError(f'{path} is not the config of a bundle: expected the entry "format": {FORMAT!r}.')
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {config.get('format_version')}, this smalti reads version {FORMAT_VERSION}; "
            f"{'upgrade smalti' if _newer(config) else 'save the bundle again with this smalti'}."
        )
    checksums = config.get("sha256")
    if not isinstance(checksums, dict):
        raise InputError(f"{path}: the entry sha256 is no list of files with their checksums; {ANEW}.")
    for name in (file for file in PARTS if (directory / file).is_file() and file not in checksums):
        raise InputError(f"{path}: the entry sha256 has no checksum of {name}; {ANEW}.")
    for name, sha256 in checksums.items():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()) or not os.path.isfile(file):
            raise InputError(f"{directory} lacks {shortened(name)}; {ANEW}.")
        if file_sha256(file) != sha256:
            raise InputError(
                f"{file} ({file.stat().st_size} bytes) is damaged or was changed: its checksum is not the one in "
                f"{CONFIG}; {ANEW}."
            )
    return config


def _newer(config: dict[str, Any]) -> bool:
    version = config.get("format_version")
    return isinstance(version, int) and version > FORMAT_VERSION


def _is_bundle(directory: Path) -> bool:
    """Whether a bundle's config lies there, or nothing but what a bundle has: then its config may be damaged."""
    try:
        return read_json(directory / CONFIG, ANEW).get("format") == FORMAT
    except InputError:
        names = {path.name for path in directory.iterdir()}
        return CONFIG in names and names <= {CONFIG, WEIGHTS, TEXT_TOKENIZER, IMAGE_TOKENIZER, CARD}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {ANEW}.") from error


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Whatever a bundle's config makes the block raise as an InputError that names the config."""
    try:
        yield
    except InputError:
        raise
    except BUILD_ERRORS as error:
        what = f"the entry {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path} does not describe a bundle ({what}); {ANEW}.") from error


def save_weights(state: Mapping[str, Tensor], path: Path, *, half: bool = False) -> None:
    """Writes tensors as safetensors. With `half`, floating ones in float16, but for those beyond its range."""
    save_file({name: (_halved(t) if half else t).contiguous() for name, t in state.items()}, path)
    path.chmod(0o644)  # safetensors lets nobody else read its files; a bundle is there to be shared


def _halved(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    halved = tensor.half()
    return halved if halved.isfinite().all() else tensor


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, floating ones in float32. Raises InputError naming a damaged file, and the tensor
    that holds a number that is not finite."""
    try:
        state = load_file(path)
    except Exception as error:  # it raises errors of Rust, of Python and of torch
        raise InputError(f"{path} is not a whole safetensors file ({first_line(error)}); {ANEW}.") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{path}: the tensor {shortened(name)} holds numbers that are not finite, with which nothing can be "
                "drawn: the training went astray, or the file was damaged before its checksum was made; train it anew."
            )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def load_module(build: Callable[[], Module], path: Path) -> Module:
    """The module of a bundle's config with the weights in a safetensors file, as `load_weights` reads them.

    While it is built, it may take the memory that tensors of the file's sizes need and little more: a config of sizes
    that the file does not bear out is told at once. Raises InputError naming what differs, or whatever `build` raises.
    """
    weights = load_weights(path)
    module = build_within(build, sum(tensor.numel() for tensor in weights.values()), path)
    wanted = module.state_dict()
    if differing := [name for name in {**wanted, **weights} if _shape(wanted.get(name)) != _shape(weights.get(name))]:
        name = differing[0]
        raise InputError(
            f"{path} does not fit the config beside it: {len(differing)} tensors differ, the first {shortened(name)}, "
            f"which is {_shape(weights.get(name))} in the file and {_shape(wanted.get(name))} by the config; {ANEW}."
        )
    for name, tensor in weights.items():
        if tensor.is_complex() or tensor.is_floating_point() != wanted[name].is_floating_point():
            raise InputError(f"{path}: the tensor {name} holds {tensor.dtype}, expected {wanted[name].dtype}; {ANEW}.")
    module.load_state_dict(weights)
    return module


def build_within(build: Callable[[], Module], num_weights: int, where: Path | str) -> Module:
    """The module, which must not ask for much more than `num_weights` numbers, those there are for it. Raises
    InputError before it is given them."""
    with _Allowance(4 * num_weights + FREE_NUMBERS, where):
        return build()


class _Allowance(TorchFunctionMode):
    """Counts the numbers of new tensors. Not the device "meta": torch then imports its compiler, which takes ten times
    as long as loading a bundle."""

    def __init__(self, num_left: int, where: Path | str):
        super().__init__()
        self.num_left, self.where = num_left, where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            self.num_left -= _num_asked(func, args, kwargs or {})
            if self.num_left < 0:
                raise InputError(
                    f"{self.where} holds far fewer numbers than the config beside it asks for: they do not belong "
                    f"together, or a size in the config is wrong; {ANEW}."
                )
        return func(*args, **(kwargs or {}))


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange)


def _num_asked(func: Any, args: Any, settings: dict[str, Any]) -> int:
    if func is torch.arange:
        start, stop = ([0, *args] if len(args) == 1 else args)[:2]
        return int(stop - start)
    size = settings.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return math.prod(int(side) for side in size if isinstance(side, int))


def _shape(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else "×".join(map(str, tensor.shape)) or "a single number"


def weights_sha256(*modules: nn.Module) -> str:
    """A hash of all weights and buffers as they are in memory: the same however they are stored."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

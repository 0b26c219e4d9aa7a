"""The directory a user loads: what is in it, how it is written whole, how it is checked when read.

config.json             format version, layout, model, pictures, sampling defaults, measured figures, checksums
model.safetensors       the transformer's weights; may be in half precision
text_tokenizer.json     the words, as the `tokenizers` library saves them
image_tokenizer/        config.json and model.safetensors of the image tokenizer
README.md               the model card
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
MAX_TABLE_BYTES = 2**30
"""Of positions and the like, which are computed and not in the file; the longest published Llamas need 64 MB."""
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
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"there is no folder {repository}, and the hub does not give a bundle of that name: {reason}"
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
        if not file.resolve().is_relative_to(directory.resolve()) or not file.is_file():
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
        what = f"the entry {error} is missing" if isinstance(error, KeyError) else shortened(first_line(error), 1000)
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

    It is built without memory first and its shapes are compared with the file's: a config of sizes that the file does
    not bear out costs nothing. Raises InputError naming what differs, or whatever `build` raises.
    """
    weights = load_weights(path)
    require_shapes(build, {name: tensor.shape for name, tensor in weights.items()}, path)
    module = build()
    wanted = module.state_dict()
    for name, tensor in weights.items():
        if tensor.is_complex() or tensor.is_floating_point() != wanted[name].is_floating_point():
            raise InputError(f"{path}: the tensor {name} holds {tensor.dtype}, expected {wanted[name].dtype}; {ANEW}.")
    module.load_state_dict(weights)
    return module


def require_shapes(build: Callable[[], nn.Module], shapes: Mapping[str, Sequence[int]], where: Path | str) -> None:
    """Builds the module without memory. Raises InputError if its tensors are not those of `shapes`, or if beside them
    it would take more memory than any model of that size does."""
    with torch.device("meta"):
        module = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(shape) for name, shape in shapes.items()}
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{where} does not fit the config beside it: {len(differing)} tensors differ, the first {shortened(name)}, "
            f"which is {_shape(found.get(name))} in the file and {_shape(wanted.get(name))} by the config; {ANEW}."
        )
    _require_small_tables(module, where)


def require_small_tables(build: Callable[[], nn.Module], where: Path | str) -> None:
    """Raises InputError if a module would make more of what is not in its file than any model of its kind does."""
    with torch.device("meta"):
        _require_small_tables(build(), where)


def _require_small_tables(module: nn.Module, where: Path | str) -> None:
    saved = module.state_dict().keys()
    unsaved = sum(b.numel() * b.element_size() for name, b in module.named_buffers() if name not in saved)
    if unsaved > MAX_TABLE_BYTES:
        raise InputError(
            f"{where}: tables of {unsaved / 2**20:,.0f} MB would be made, at most {MAX_TABLE_BYTES // 2**20:,} are; is "
            "the length that the config states (max_length, max_position_embeddings) right?"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "×".join(map(str, shape)) or "a single number"


def weights_sha256(*modules: nn.Module) -> str:
    """A hash of all weights and buffers as they are in memory: the same however they are stored."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

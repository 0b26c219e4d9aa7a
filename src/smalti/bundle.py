"""The directory a user loads: what is in it, how it is written whole, how it is checked when read.

config.json             format version, layout, model, pictures, sampling defaults, measured figures, checksums
model.safetensors       the transformer's weights; may be in half precision
text_tokenizer.json     the words, as the `tokenizers` library saves them
image_tokenizer/        config.json and model.safetensors of the image tokenizer
README.md               the model card
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.errors import InputError
from smalti.files import cause, refuse_existing

FORMAT = "smalti bundle"
FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TEXT_TOKENIZER = "text_tokenizer.json"
IMAGE_TOKENIZER = "image_tokenizer"
CARD = "README.md"


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
    directory = Path(directory)
    refuse_existing([directory], force=force)
    if directory.is_dir() and any(directory.iterdir()) and not _is_bundle(directory):
        raise InputError(f"{directory} is not a bundle, so --force does not replace it: give another name.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.", suffix=".part"))
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {cause(error)}; give a folder you can write.") from error
    try:
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **write_files(temporary)}
        config["sha256"] = {
            str(path.relative_to(temporary)): _sha256(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and path.name != CARD
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error):
            raise InputError(f"{directory}: no space left on its disk; free some, or write elsewhere.") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(directory: Path) -> dict[str, Any]:
    """A bundle's `config.json`, after checking that every file it names is there and unharmed.

    Raises InputError naming the file and the mend.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{directory} is not a bundle: it has no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; fetch or save the bundle again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f'{path} is not the config of a bundle: expected the entry "format": {FORMAT!r}.')
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {config.get('format_version')}, this smalti reads version {FORMAT_VERSION}; "
            f"{'upgrade smalti' if _newer(config) else 'save the bundle again with this smalti'}."
        )
    checksums = config.get("sha256", {})
    if not isinstance(checksums, dict):
        raise InputError(f"{path}: the entry sha256 is no list of files; fetch or save the bundle again.")
    for name, sha256 in checksums.items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{directory} lacks {name}; fetch or save the bundle again.")
        if _sha256(file) != sha256:
            raise InputError(
                f"{file} ({file.stat().st_size} bytes) is damaged or was changed: its checksum is not the one in "
                f"{CONFIG}; fetch or save the bundle again."
            )
    return config


def _newer(config: dict[str, Any]) -> bool:
    version = config.get("format_version")
    return isinstance(version, int) and version > FORMAT_VERSION


def _is_bundle(directory: Path) -> bool:
    try:
        return json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Tensors of a safetensors file, floating ones in float32. Raises InputError naming a damaged file."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); fetch or save the bundle again."
        ) from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def weights_sha256(*modules: nn.Module) -> str:
    """A hash of all weights and buffers as they are in memory: the same however they are stored."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

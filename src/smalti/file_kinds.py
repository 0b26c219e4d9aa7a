"""What a file is by its first bytes, so that a reader which cannot use it says what was given and what to do.

People often have something else than they believe: the pointer that git-lfs leaves in a clone, the web page of a
download that asks for a sign-in, an archive that is still packed.
"""

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from smalti.errors import InputError, InputWarning

_NUM_BYTES = 512  # a tar file is known by its bytes 257 to 261


class FileKind(NamedTuple):
    """`name` is for programs, `what` for people ("a web page"); `advice` says what to do where the file itself is
    wanted, and is empty for a kind that some reader takes."""

    name: str
    what: str
    advice: str = ""


_FETCH = "fetch it again"
EMPTY = FileKind("empty", "an empty file", _FETCH)
LFS_POINTER = FileKind(
    "lfs-pointer",
    "a git-lfs pointer, the few lines that stand for a large file in a clone",
    "fetch the file itself: git lfs pull in the clone, or download it from the web page of the repository",
)
WEB_PAGE = FileKind(
    "web-page",
    "a web page, not the file that it offers",
    "download the file itself: open the link in a browser, sign in or confirm there if it asks",
)
GGUF = FileKind(
    "gguf", "a GGUF file of llama.cpp", "take the original weights, as safetensors: GGUF may hold them quantized"
)
ZIP = FileKind("zip", "a zip archive", "unpack it, and give the file in it")
TAR = FileKind("tar", "a tar archive", "unpack it (tar xf), and give the file in it")
GZIP = FileKind("gzip", "a gzip-compressed file", "unpack it (gunzip), and give the file in it")
BZIP2 = FileKind("bzip2", "a bzip2-compressed file", "unpack it (bunzip2), and give the file in it")
XZ = FileKind("xz", "an xz-compressed file", "unpack it (unxz), and give the file in it")
ZSTD = FileKind("zstd", "a zstd-compressed file", "unpack it (unzstd), and give the file in it")
PARQUET = FileKind("parquet", "a parquet table")
ARROW = FileKind("arrow", "an Arrow file", "write it as parquet: pyarrow.parquet.write_table")
NPY = FileKind("npy", "an array of NumPy (.npy)")
HDF5 = FileKind("hdf5", "an HDF5 file", "convert it: HDF5 is not read")
PICTURE = FileKind("picture", "a picture")
SAFETENSORS = FileKind("safetensors", "a safetensors file")
PICKLE = FileKind("pickle", "a Python pickle")
PIPE = FileKind(
    "pipe",
    "a pipe or a device, which cannot be read twice or from its end",
    "save what comes out of it to a file, and give that",
)
PDF = FileKind("pdf", "a PDF document", "give the file itself, not a document about it")

_MAGIC = (
    (b"version https://git-lfs.github.com/spec/", LFS_POINTER),
    (b"GGUF", GGUF),
    (b"PK\x03\x04", ZIP),
    (b"\x1f\x8b", GZIP),
    (b"BZh", BZIP2),
    (b"\xfd7zXZ\x00", XZ),
    (b"\x28\xb5\x2f\xfd", ZSTD),
    (b"PAR1", PARQUET),
    (b"ARROW1", ARROW),
    (b"\x93NUMPY", NPY),
    (b"\x89HDF", HDF5),
    (b"\x89PNG", PICTURE),
    (b"\xff\xd8\xff", PICTURE),
    (b"GIF8", PICTURE),
    (b"%PDF", PDF),
)
_TESTS: tuple[tuple[Callable[[bytes], bool], FileKind], ...] = (
    (lambda start: not start, EMPTY),
    (lambda start: start[257:262] == b"ustar", TAR),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"WEBP", PICTURE),
    (lambda start: start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32, SAFETENSORS),
    (lambda start: start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"), PICKLE),
    (lambda start: start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")), WEB_PAGE),
)


def kind_of(path: Path | str) -> FileKind | None:
    """The kind of a file; None if it is not known, a plain text for example. Raises OSError if it cannot be read. A
    pipe is not opened: that could wait for ever."""
    if is_pipe(path):
        return PIPE
    with Path(path).open("rb") as file:
        return kind_of_bytes(file.read(_NUM_BYTES))


def refuse_pipe(path: Path | str) -> None:
    """Raises InputError if a path is there but is neither a file nor a folder, as `<(zcat lines.gz)` of a shell."""
    if is_pipe(path):
        raise InputError(f"{path} is {PIPE.what}: {PIPE.advice}.")


def is_pipe(path: Path | str) -> bool:
    """Whether a path is there but is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # who opens it says what is wrong with it
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def kind_of_bytes(start: bytes) -> FileKind | None:
    """The kind of a file that starts so; 512 bytes tell all that can be told."""
    found = next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)
    return found or next((kind for is_kind, kind in _TESTS if is_kind(start)), None)


def why_not(path: Path | str, wanted: str, otherwise: str) -> str:
    """What to say of a file that could not be read as `wanted` ("a parquet table"): what it is instead and what to do,
    or else `otherwise`."""
    try:
        kind = kind_of(path)
    except OSError:
        return otherwise
    if kind is None or kind.what == wanted:
        return otherwise
    return f"it is {kind.what}: {kind.advice}" if kind.advice else f"it is {kind.what}, not {wanted}"


_HIDDEN_FOLDERS = ("__MACOSX", "@eaDir")
"""What macOS and Synology leave beside the files of others; also hidden is whatever begins with a dot."""


def is_hidden(name: PurePath | str) -> bool:
    """Whether a path within a folder or an archive names something hidden: `._a.png`, `.ipynb_checkpoints/a.png`."""
    parts = PurePath(name).parts
    return any(part in _HIDDEN_FOLDERS or (part.startswith(".") and part not in (".", "..")) for part in parts)


def visible(files: Sequence[Path], folder: Path) -> list[Path]:
    """The files that are not hidden within a folder; a warning counts the others."""
    shown = [file for file in files if not is_hidden(file.relative_to(folder))]
    if len(shown) < len(files):
        first = next(file for file in files if is_hidden(file.relative_to(folder)))
        warn_passed_over(len(files) - len(shown), "hidden files", folder, first.relative_to(folder))
    return shown


def warn_passed_over(number: int, what: str, where: Path | str, first: object) -> None:
    """Says how many things of a file or folder are not used."""
    warnings.warn(f"{where}: {number} {what} passed over (the first: {first}).", InputWarning, stacklevel=3)

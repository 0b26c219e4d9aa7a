"""Arrays of numbers from `.npz` files, within bounds."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from smalti.errors import InputError, first_line, shortened

FREE_BYTES = 2**28
MAX_EXPANSION = 100
"""What unpacks to more than FREE_BYTES may be this many times as large as its file: zeros shrink to nothing."""


def read_npz(path: Path, mend: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of an `.npz` file by their names, in this machine's byte order, their checksums verified; nothing is
    unpickled. Raises InputError naming the file and ending with `mend`."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size):
                raise InputError(f"{path} would unpack to {unpacked:,} bytes; {mend}.")
            if damaged := archive.testzip():
                raise InputError(f"{path}: {shortened(damaged)} in it is damaged, its checksum is another; {mend}.")
            if unclear := _ambiguous(archive.namelist()):
                raise InputError(f"{path}: the name {shortened(unclear)} stands for two arrays; {mend}.")
        with np.load(path, allow_pickle=False) as arrays:
            found: dict[str, Any] = {name: arrays[name] for name in arrays.files}
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; {mend}.") from error
    # zipfile, zlib and numpy raise nearly anything for a damaged file, a damaged size a want of memory.
    except Exception as error:
        raise InputError(f"{path} is no whole .npz file: {first_line(error)}; {mend}.") from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
            kind = array.dtype if isinstance(array, np.ndarray) else "no array"
            raise InputError(f"{path}: {shortened(name)} holds {kind}, expected numbers; {mend}.")
    return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in found.items()}


def _ambiguous(members: list[str]) -> str | None:
    """A name by which numpy would give one array for another: a repeated one, and `a.npy` beside `a`, since `a` is kept
    in a member called `a.npy` and members are looked up first."""
    names = Counter(member.removesuffix(".npy") for member in members)
    repeated = [name for name, times in names.items() if times > 1]
    hidden = [member for member in members if member.endswith(".npy") and member in names]
    return next(iter(repeated + hidden), None)

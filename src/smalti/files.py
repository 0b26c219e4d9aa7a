"""Writing a file so that it is there whole or not at all, and never over another one unasked."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smalti.errors import InputError


def refuse_existing(paths: Iterable[Path | str], *, force: bool = False) -> None:
    """Raises InputError naming the first of the paths that exists, unless `force`, or that stands in no folder which
    can be written: before work, not after it."""
    for path in map(Path, paths):
        folder = next(place for place in path.absolute().parents if place.exists())
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: {folder} is a file, not a folder; give a path in a folder.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                f"{path} cannot be written: the folder {folder} is not yours to write in; give a path in one that is."
            )
        if path.is_dir() and any(path.iterdir()) and not force:
            raise InputError(f"the folder {path} exists and is not empty: give another name, or --force to replace it.")
        if path.is_file() and not force:
            raise InputError(f"{path} exists already: give another name, or --force to replace it.")


def cause(error: OSError) -> str:
    """Why a file or folder cannot be made, in words; where a file stands in a folder's place, which."""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        for place in (Path(error.filename), *Path(error.filename).parents):
            if place.is_file():
                return f"{place} is a file, not a folder"
    return error.strerror or str(error)


@contextmanager
def new_file(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name if the block ends well, and is removed if it does not.

    Raises InputError if `path` exists and `force` is not set, its folder cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it.")
    refuse_existing([path], force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {cause(error)}; give a path in a folder you can write.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes it readable by its owner alone
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"{path}: no space left on its disk; free some, or write elsewhere.") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path | str, *, force: bool = False, holds: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name if the block ends well, and is removed if it does not.

    Raises InputError if `path` exists and is not empty, unless `force`; what `force` replaces must be `what`, a folder
    of which `holds` is true. Also if its folder cannot be written, or the disk is full.
    """
    path = Path(path)
    refuse_existing([path], force=force)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not holds(path)):
        raise InputError(f"{path} holds no {what}, so --force does not replace it: give another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {cause(error)}; give a folder you can write.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"{path}: no space left on its disk; free some, or write elsewhere.") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

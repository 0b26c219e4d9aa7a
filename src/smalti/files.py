"""Writing a file so that it is there whole or not at all, and never over another one unasked; one writer at a time."""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smalti.errors import InputError, first_line
from smalti.stopping import end_if_stopped


def refuse_existing(paths: Iterable[Path | str], *, force: bool = False) -> None:
    """Raises InputError naming the first of the paths that exists, unless `force`, or that stands in no folder which
    can be written: before work, not after it. The lock of a path that exists goes, if no process holds it: one that was
    killed behind its last step has left it."""
    for path in map(Path, paths):
        try:
            folder = next(place for place in path.absolute().parents if place.exists())
            is_folder, is_file = path.is_dir(), path.is_file()
        except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
            raise InputError(f"{str(path)[:200]!r} cannot be written: {cause(error)}; give another name.") from error
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: {folder} is a file, not a folder; give a path in a folder.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                f"{path} cannot be written: the folder {folder} is not yours to write in; give a path in one that is."
            )
        if (is_folder or is_file) and not force and (lock := lock_of(path)).exists():
            with suppress(InputError), locked(lock, path):
                pass
        if is_folder and any(path.iterdir()) and not force:
            raise InputError(f"the folder {path} exists and is not empty: give another name, or --force to replace it.")
        if is_file and not force:
            raise InputError(_exists(path))


def _exists(path: Path) -> str:
    return f"{path} exists already: give another name, or --force to replace it."


def cause(error: OSError | ValueError) -> str:
    """Why a file or folder cannot be made, in words; where a file stands in a folder's place, which."""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        for place in (Path(error.filename), *Path(error.filename).parents):
            if place.is_file():
                return f"{place} is a file, not a folder"
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors, torch, numpy, pyarrow, Pillow and zlib make of a write that failed.
_FAILED_WRITE = re.compile(
    r"\d+ requested and \d+ written"
    r"|No space left|quota exceeded|File too large|os error (28|122|27)\b|file write failed|failed writing file"
    r"|[Ee]rror writing bytes|encoder error -\d+ when writing|unexpected pos \d+ vs \d+"
)


def failed_write(error: BaseException) -> str | None:
    """Why a library could not write, where it could not because a disk is full or a file grew beyond its limit; every
    library says so by an error of its own. None for any other error."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return {errno.EFBIG: "the file grew beyond what is allowed"}.get(found.errno, "no space left on its disk")
        if isinstance(found, OSError | RuntimeError) or type(found).__name__ == "SafetensorError":
            if re.search(r"File too large|os error 27\b", str(found)):
                return "the file grew beyond what is allowed"
            if _FAILED_WRITE.search(str(found)):
                return "no space left on its disk"
        found = found.__cause__ or found.__context__
    return None


def user_cache(name: str) -> Path:
    """The folder in which what is made once is kept for later runs: `$XDG_CACHE_HOME/smalti/NAME` (default `~/.cache`).
    It need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "smalti" / name


@contextmanager
def made_again(path: Path) -> Iterator[None]:
    """For what a run reads of its own making: an InputError says as well that it may be removed."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} If it is damaged, remove {path}: the next start makes it again.") from error


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Failed writes as InputErrors that name the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if reason := failed_write(error):
            raise InputError(f"{path}: {reason}; free some, or write elsewhere.") from error
        raise


@contextmanager
def temporary_files(what: Path | str) -> Iterator[None]:
    """What fails where only temporary files are written, as InputErrors: they say what for, and how to choose another
    folder for them."""
    try:
        yield
    except OSError as error:
        try:
            folder = tempfile.gettempdir()
        except OSError:
            folder = os.environ.get("TMPDIR", "/tmp")
        raise InputError(
            f"{what} needs temporary files, which cannot be written in {folder}: "
            f"{failed_write(error) or cause(error)}; set TMPDIR to a folder with room."
        ) from error


@contextmanager
def locked(lock: Path, what: Path | str) -> Iterator[None]:
    """Holds a lock file while the block runs. The lock goes with the process, however it ends; the file is removed, and
    so are folders made for it in which nothing else was put.

    Raises InputError if another process holds it: `what` is then being written. Where a file system knows no locks,
    nothing is held.
    """
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock, what)
    except OSError as error:
        raise InputError(f"{what} cannot be written: {cause(error)}; give a path in a folder you can write.") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is let go: who waits for it looks whether it is still there
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _lock(lock: Path, what: Path | str) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            by = f"the process {holder}" if holder.isdecimal() else "another process"
            raise InputError(f"{what} is being written by {by}: wait for its end, or give another name.") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                os.close(descriptor)
                raise
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            break
        os.close(descriptor)  # the holder before has removed it meanwhile
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except OSError:  # a full disk: who holds it is then not told
        pass
    return descriptor


def lock_of(path: Path) -> Path:
    """The lock of a file or folder, beside it."""
    return path.with_name(f".{path.name.lstrip('.')}.lock")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what cannot be synced, such as some network folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name if the block ends well, and is removed if it does not. What a
    killed process left there is written over. The content has reached the disk before it gets its name.

    Raises InputError if `path` exists and `force` is not set, its folder cannot be written, the disk is full, or
    another process is writing it.
    """
    path = Path(path)
    if os.path.isdir(path):  # which, unlike Path's, knows no name that is too long
        raise InputError(f"{path} is a folder: give the name of a file in it.")
    refuse_existing([path], force=force)
    temporary = path.with_name(f".{path.name}.new")
    with locked(lock_of(path), path):
        try:
            temporary.unlink(missing_ok=True)
            with named_failure(path):
                temporary.touch()
                yield temporary
                temporary.chmod(0o644)  # safetensors lets nobody else read its files
                sync(temporary)
                end_if_stopped()
                _take_name(temporary, path, force=force)
        finally:
            temporary.unlink(missing_ok=True)


def _take_name(temporary: Path, path: Path, *, force: bool) -> None:
    """Gives a whole file its name. Without `force`, one that appeared there since the start is not written over."""
    if not force:
        try:
            os.link(temporary, path)
            sync(path.parent)
            return
        except FileExistsError as error:
            raise InputError(_exists(path)) from error
        except OSError:  # a file system without hard links
            if path.exists():
                raise InputError(_exists(path)) from None
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path | str, text: str, *, force: bool = False) -> None:
    """Writes UTF-8 text as `new_file` does."""
    with new_file(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: Any, *, force: bool = False) -> None:
    """Writes JSON as `new_file` does."""
    write_text(path, json.dumps(content, indent=1) + "\n", force=force)


@contextmanager
def new_folder(path: Path | str, *, force: bool = False, holds: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name if the block ends well, and is removed if it does not. All
    that it holds has reached the disk by then.

    Raises InputError if `path` exists and is not empty, unless `force`; what `force` replaces must be `what`, a folder
    of which `holds` is true. Also if its folder cannot be written, the disk is full, or another process writes it.
    """
    path = Path(path)
    refuse_existing([path], force=force)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not holds(path)):
        raise InputError(f"{path} holds no {what}, so --force does not replace it: give another name.")
    temporary = path.with_name(f".{path.name}.new")
    with locked(lock_of(path), path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            with named_failure(path):
                temporary.mkdir()
                yield temporary
                for place in temporary.rglob("*"):
                    sync(place)
                end_if_stopped()
                _replace_folder(temporary, path, force=force)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(temporary: Path, path: Path, *, force: bool) -> None:
    if path.is_dir() and any(path.iterdir()):
        refuse_existing([path], force=force)  # it may have appeared since the start
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)  # half removed it must not have the name
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    sync(path.parent)

"""Kernels in C++, compiled on the user's machine when it first pays off. Everything works without them, only slower.

`load("decode")` gives `decode.cpp` of this folder as a library of plain C functions: arguments are numbers and
addresses (`Tensor.data_ptr()`), so that nothing but a C++ compiler is needed, neither torch's headers nor Python's.
A library is built for the processor at hand and kept in the user's cache folder, `$XDG_CACHE_HOME/smalti/native` or
`~/.cache/smalti/native`, under a name that tells what it was built from and what it must hold.

The environment variable SMALTI_NATIVE=0 turns all of it off; SMALTI_NATIVE=1 compiles at the first use of anything,
without waiting until it pays off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from smalti import processor
from smalti.files import user_cache

SOURCES = Path(__file__).parent
# GCC splits 512-bit work in two unless told; FMA and square roots need no errno and no traps. Nothing here lets sums
# be reordered: what a row of a batch computes must not depend on how the loop around it was unrolled.
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math"]
LINKED = ["-ldl"]
SOURCE_OF = {"train_bfloat16": ("train", "-DSMALTI_BFLOAT16"), "train_float32": ("train",)}
"""Libraries that are not just the source of their name: the source, and what is defined for it."""
COMPILE_SECONDS = 120.0
"""A compiler that takes longer is given up on."""

_log = logging.getLogger(__name__)
_loaded: dict[str, ctypes.CDLL | None] = {}
_absent: set[str] = set()  # looked for and not found, not yet built
_lock = threading.Lock()


def load(name: str, *, build: bool = True) -> ctypes.CDLL | None:
    """The library of `<name>.cpp`, or None where it cannot be had: one line of the log says why. Never raises for that.

    Compiles it if nobody has before, which takes some seconds, unless `build` is false. Threads may call it at the same
    time, and so may processes: a library appears in the cache folder whole.
    """
    switch = os.environ.get("SMALTI_NATIVE", "")
    if switch == "0":
        return None
    build = build or switch == "1"
    with _lock:
        if name not in _loaded and (build or name not in _absent):
            path = cached_library(name)
            if path is None and not build:
                _absent.add(name)
            else:
                _loaded[name] = _open(name, path)
        return _loaded.get(name)


def cached_library(name: str) -> Path | None:
    """Where the library lies, if it was compiled before from the same source by the same compiler for such a processor.

    A file whose content is not what its name promises is removed: loading it could end the process.
    """
    try:
        for path in sorted(cache_folder().glob(f"{_build_key(name)}-*.so")):
            if path.stem.endswith(f"-{_digest(path.read_bytes())}"):
                return path
            _log.info("%s is damaged; removed", path)
            path.unlink()
    except OSError as error:
        _log.info("native %s: the cache folder cannot be used: %s", name, error)
    return None


def cache_folder() -> Path:
    return user_cache("native")


def _open(name: str, path: Path | None) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path or _compile(name)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        _log.info("native %s is not used: %s %s", name, error, output[:2000])
        return None


def _compile(name: str) -> Path:
    """Compiles into the cache folder under a temporary name; the library takes its own when it is whole."""
    compiler, folder = _compiler(), cache_folder()
    if compiler is None:
        raise OSError("there is no C++ compiler (looked for $CXX, c++, g++, clang++)")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}-", suffix=".so")
    os.close(handle)
    try:
        source = [*_defines(name), str(_source(name)), "-o", temporary, *LINKED]
        command = _first_that_works([*compiler, *FLAGS, *flags, *source] for flags in _processor_flags())
        _log.info("compiled native %s: %s", name, shlex.join(command))
        path = folder / f"{_build_key(name)}-{_digest(Path(temporary).read_bytes())}.so"
        os.replace(temporary, path)
        return path
    finally:
        Path(temporary).unlink(missing_ok=True)


def _first_that_works(commands: Iterable[list[str]]) -> list[str]:
    """Runs one after the other until one ends well, and returns it. Raises the error of the last."""
    failure = None
    for command in commands:
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True)
            return command
        except subprocess.CalledProcessError as error:
            failure = error
    raise failure or OSError("there is nothing to run")


def _build_key(name: str) -> str:
    """Names what a library is built from: source, headers, flags, compiler and processor."""
    told = (FLAGS, LINKED, _defines(name), _processor_flags(), _compiler_identity(), _processor())
    content = hashlib.sha256(repr(told).encode())
    for path in [_source(name), *sorted(SOURCES.glob("*.h"))]:
        content.update(path.read_bytes())
    return f"{name}-{content.hexdigest()[:20]}"


def _source(name: str) -> Path:
    return SOURCES / f"{SOURCE_OF.get(name, (name,))[0]}.cpp"


def _defines(name: str) -> list[str]:
    return list(SOURCE_OF.get(name, (name,))[1:])


def _processor_flags() -> list[list[str]]:
    """What to tell the compiler of the processor, in the order of preference: not every compiler knows every one."""
    if os.environ.get("SMALTI_ISA"):
        flags = {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}.get(processor.instruction_set())
        if flags:
            return [[flags]]
        if processor.instruction_set() == "avx512_bf16":
            return [["-march=native", "-mno-amx-tile", "-mno-amx-bf16"]]
    return [["-march=native"], ["-mcpu=native"], []]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _compiler() -> list[str] | None:
    """The command that compiles C++, with its arguments; None where there is none."""
    if sys.platform == "win32":
        return None
    for candidate in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def _compiler_identity() -> object:
    """Changes with the compiler and its version, without running it: what file it is, how large, and from when."""
    command = _compiler()
    if command is None:
        return None
    path = Path(os.path.realpath(shutil.which(command[0]) or command[0]))
    status = path.stat()
    return command, str(path), status.st_size, status.st_mtime_ns


def _processor() -> list[str]:
    """What tells processors apart that run different instructions."""
    found = [platform.system(), platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        lines = info.read_text().partition("\n\n")[0].splitlines()  # the first core stands for all
        found += [line for line in lines if line.startswith(telling)]
    return found

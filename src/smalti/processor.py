"""What the processor can do, and which part of it may be used: the one place that decides kernels by hardware.

`SMALTI_ISA` names the instructions that may be used at the most, so that a newer processor can stand for an older
one: `avx2`, `avx512` (without bfloat16 products), `avx512_bf16`, `amx`, and `neon`, all that an ARM processor is used
for. Torch and oneDNN have switches of their own, `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`; `torch_capability`
says whether the first one took.
"""

import os
import platform
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from smalti.errors import InputError

LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets of x86-64 that kernels are written for, each with all before it."""
NEON = "neon"
PLAIN = "plain"
"""Any other processor: the compiler's own choice of vectors."""


def instruction_set() -> str:
    """What kernels may use here: one of `LEVELS`, "neon" or "plain", at most what SMALTI_ISA names.

    Raises InputError for an unknown SMALTI_ISA, or one of another kind of processor.
    """
    found, asked = _found(), os.environ.get("SMALTI_ISA", "")
    if not asked:
        return found
    known = LEVELS if found in LEVELS else (found,)
    if asked not in known:
        raise InputError(f"SMALTI_ISA is {asked!r}; this processor knows {', '.join(known)}.")
    return min(found, asked, key=known.index)


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products run on the processor's own units; elsewhere they are emulated, ten times as slow."""
    return instruction_set() in ("avx512_bf16", "amx")


def torch_capability() -> str:
    """What torch's own kernels use, by its name for it: "AVX2", "AVX512", "DEFAULT" ..."""
    return torch.backends.cpu.get_cpu_capability()


@cache
def memory_bytes() -> int:
    """What programs may use here: the machine's memory, or less if a control group (a container's, as a rule) says so.

    Neither depends on what is in use.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such group, or "max"
            found.append(int(Path(file).read_text()))
    return min(found)


def separate_compile_cache() -> None:
    """Has torch.compile keep what it makes apart for each `torch_capability`, unless TORCHINDUCTOR_CACHE_DIR is set.

    By default it does not tell them apart (torch 2.13): what was compiled where ATEN_CPU_CAPABILITY held torch to AVX2
    was taken up by a later process with AVX-512, whose packed weights are laid out otherwise, and ended it.
    """
    folder = f"smalti-torchinductor-{os.getuid()}-{torch_capability().lower()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / folder))


@cache
def _found() -> str:
    if platform.machine() in ("arm64", "aarch64"):
        return NEON
    can = torch.cpu.get_capabilities()
    needed = {
        "amx": ("amx_bf16", "avx512_bf16"),
        "avx512_bf16": ("avx512_bf16",),
        "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
        "avx2": ("avx2", "fma3"),
    }
    return next((level for level, names in needed.items() if all(can.get(name) for name in names)), PLAIN)

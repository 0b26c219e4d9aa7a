"""The vectors and float32 products under both kernels, compiled for this processor, for older ones, and for ARM."""

import shutil
import subprocess
from pathlib import Path

import pytest

from smalti import native
from smalti.processor import LEVELS, instruction_set

SOURCE = Path(__file__).parent / "native_vectors.cpp"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
FLAGS = [flag for flag in native.FLAGS if flag not in ("-shared", "-fPIC")]


def run(command: list[str], program: Path, emulator: list[str]) -> str:
    subprocess.run([*command, *FLAGS, f"-I{native.SOURCES}", str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.mark.parametrize(("isa", "flag", "lanes"), [("plain", None, 4), ("avx2", "v3", 8), ("avx512", "v4", 16)])
def test_functions_and_products_are_those_of_plain_loops(tmp_path, isa, flag, lanes):
    compiler, here = native._compiler(), instruction_set()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    if flag and (here not in LEVELS or LEVELS.index(here) < LEVELS.index(isa)):
        pytest.skip(f"the processor has no {isa}")
    flags = [f"-march=x86-64-{flag}"] if flag else []
    assert run([*compiler, *flags], tmp_path / "check", []) == f"{lanes} lanes, 0 failures\n"


def test_the_same_on_neon_under_an_emulator(tmp_path):
    emulator = next((name for name in ARM_EMULATOR if shutil.which(name)), None)
    if not shutil.which(ARM_COMPILER) or emulator is None:
        pytest.skip(f"needs {ARM_COMPILER} and one of {', '.join(ARM_EMULATOR)}")
    assert run([ARM_COMPILER, "-static"], tmp_path / "check", [emulator]) == "4 lanes, 0 failures\n"


@pytest.mark.parametrize("name", ["train", "decode"])
def test_kernels_compile_for_neon(tmp_path, name):
    if not shutil.which(ARM_COMPILER):
        pytest.skip(f"needs {ARM_COMPILER}")
    library = tmp_path / f"{name}.so"
    subprocess.run([ARM_COMPILER, *native.FLAGS, str(native.SOURCES / f"{name}.cpp"), "-o", str(library)], check=True)
    assert library.read_bytes()[:4] == b"\x7fELF"

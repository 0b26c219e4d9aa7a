"""Compiling, keeping and loading kernels; what happens where that fails; the threads they share with torch."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti import native

SOURCE = """
#include "threads.h"
extern "C" int answer() { return 42; }
extern "C" void squares(const float* x, float* y, long n, int threads) {
    smalti::parallel(threads, [&](int rank, int size) {
        smalti::Share share(n, rank, size);
        for (long i = share.begin; i < share.end; ++i) y[i] = x[i] * x[i];
    });
}
// Each round, every thread adds what the one before it wrote in the last: wrong unless all wait for all.
extern "C" int relay(int threads, int rounds, long* cells) {
    smalti::Barrier barrier = {};
    int granted = 1;
    smalti::parallel(threads, [&](int rank, int size) {
        if (rank == 0) granted = size;
        for (int round = 1; round <= rounds; ++round) {
            long before = cells[(round - 1) % 2 * size + (rank + 1) % size];
            cells[round % 2 * size + rank] = before + 1;
            barrier.wait(size);
        }
    });
    return granted;
}
"""

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of compiled libraries, empty; sources with one more, `probe.cpp`; nothing is loaded yet."""
    sources = tmp_path / "sources"
    sources.mkdir()
    shutil.copy(native.SOURCES / "threads.h", sources)
    (sources / "probe.cpp").write_text(SOURCE)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setattr(native, "FLAGS", [flag for flag in native.FLAGS if flag != "-O3"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SMALTI_NATIVE", raising=False)
    forget(monkeypatch)
    return native.cache_folder()


def forget(monkeypatch) -> None:
    """As a new process would begin."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_absent", set())


def never_compile(*_, **__):  # subprocess.run itself is also what platform.processor() asks
    raise AssertionError("compiled although it should not")


@needs_compiler
def test_a_library_is_compiled_once_and_then_found(cache, monkeypatch):
    library = native.load("probe")
    assert library is not None and library.answer() == 42
    assert native.load("probe") is library
    (path,) = cache.iterdir()  # nothing temporary is left
    forget(monkeypatch)
    monkeypatch.setattr(native, "_first_that_works", never_compile)
    assert native.cached_library("probe") == path
    found = native.load("probe", build=False)
    assert found is not None and found.answer() == 42


@needs_compiler
def test_another_source_header_flag_or_compiler_is_another_library(cache, monkeypatch):
    keys = {native._build_key("probe")}
    for changed in ("probe.cpp", "threads.h"):
        with (native.SOURCES / changed).open("a") as file:
            file.write("// one more line\n")
        keys.add(native._build_key("probe"))
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-DMORE"])
    keys.add(native._build_key("probe"))
    monkeypatch.setattr(native, "_processor", lambda: ["another"])
    keys.add(native._build_key("probe"))
    monkeypatch.setenv("CXX", f"{native._compiler()[0]} -DSTILL_MORE")
    keys.add(native._build_key("probe"))
    assert len(keys) == 6


@needs_compiler
@pytest.mark.parametrize("damage", [lambda content: content[:3000], lambda content: content[:-1] + b"?", lambda _: b""])
def test_a_damaged_library_is_compiled_again(cache, monkeypatch, damage):
    assert native.load("probe") is not None
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    forget(monkeypatch)
    assert native.load("probe", build=False) is None
    again = native.load("probe")
    assert again is not None and again.answer() == 42
    (path,) = cache.iterdir()
    assert native.cached_library("probe") == path


def test_nothing_is_compiled_unless_asked_for(cache, monkeypatch):
    monkeypatch.setattr(native, "_first_that_works", never_compile)
    assert native.load("probe", build=False) is None
    monkeypatch.setenv("SMALTI_NATIVE", "0")
    assert native.load("probe") is None
    assert not cache.exists()


@needs_compiler
def test_the_switch_compiles_at_once(cache, monkeypatch):
    assert native.load("probe", build=False) is None
    monkeypatch.setenv("SMALTI_NATIVE", "1")
    assert native.load("probe", build=False) is not None
    monkeypatch.setenv("SMALTI_NATIVE", "0")  # also after it was loaded
    assert native.load("probe") is None


@pytest.mark.parametrize("hindrance", ["no compiler", "bad source", "slow compiler", "cache is a file", "no source"])
def test_what_hinders_it_is_logged_and_harms_nothing(cache, monkeypatch, caplog, hindrance):
    caplog.set_level(logging.INFO, "smalti.native")
    if hindrance == "no compiler":
        monkeypatch.setattr(native.shutil, "which", lambda _: None)
        expected = "there is no C++ compiler"
    elif hindrance == "cache is a file":
        cache.parent.mkdir(parents=True)
        cache.write_text("")
        expected = "exists" if native._compiler() else "there is no C++ compiler"
    elif hindrance == "no source":
        (native.SOURCES / "probe.cpp").unlink()
        expected = "No such file"
    elif native._compiler() is None:
        pytest.skip("needs a C++ compiler")
    elif hindrance == "bad source":
        (native.SOURCES / "probe.cpp").write_text("this is no C++")
        expected = "error: "
    else:
        expected = "timed out"

        def run(command, **_):
            raise subprocess.TimeoutExpired(command, 1.0)

        monkeypatch.setattr(native.subprocess, "run", run)
    assert native.load("probe") is None
    assert "native probe is not used" in caplog.text and expected in caplog.text
    assert not cache.is_dir() or not list(cache.iterdir())
    assert native.load("probe") is None
    assert caplog.text.count("is not used") == 1  # once a process, not once a job


@needs_compiler
def test_processes_may_compile_at_the_same_time(cache):
    program = f"""
from pathlib import Path
from smalti import native
native.SOURCES, native.FLAGS = Path({str(native.SOURCES)!r}), {native.FLAGS}
print(native.load("probe").answer())
"""
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in both] == ["42\n", "42\n"]
    assert native.cached_library("probe") is not None
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_work_and_wait_for_each_other(cache, threads):
    library = native.load("probe")
    assert library is not None
    x, y = torch.arange(1000.0), torch.zeros(1000)
    library.squares(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(x)), threads)
    assert torch.equal(y, x * x)
    cells = torch.zeros(2 * threads, dtype=torch.long)
    granted = library.relay(threads, 500, ctypes.c_void_p(cells.data_ptr()))
    assert 1 <= granted <= threads
    assert cells[: 2 * granted].sort().values.tolist() == [499] * granted + [500] * granted


@needs_compiler
def test_a_forked_process_works_on_its_own_thread(cache):
    library = native.load("probe")
    assert library is not None
    cells = torch.zeros(4, dtype=torch.long)
    library.relay(2, 10, ctypes.c_void_p(cells.data_ptr()))  # the threads exist before the fork
    child = os.fork()
    if child == 0:
        os._exit(library.relay(2, 10, ctypes.c_void_p(cells.data_ptr())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

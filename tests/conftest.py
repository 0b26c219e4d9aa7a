"""Shared fixtures: where the optional reference data lies, one thread for repeatable arithmetic."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from smalti import native

# Compiled only for the tests that ask for `native_kernels`; SMALTI_NATIVE=1 runs the whole suite on kernels.
os.environ.setdefault("SMALTI_NATIVE", "0")

hypothesis.settings.register_profile("smalti", deadline=None, derandomize=True)
hypothesis.settings.load_profile("smalti")
torch.set_num_threads(1)


def pytest_addoption(parser) -> None:
    parser.addoption("--device", default="auto", help="Where test_cuda.py holds executors to the CPU's numbers: cuda.")


@pytest.fixture
def gpu(request) -> torch.device:
    """The GPU of `--device`; a test that asks for it is skipped, and says so, where there is none."""
    asked = request.config.getoption("--device")
    if asked == "cpu" or not torch.cuda.is_available():
        pytest.skip(f"needs a GPU: --device {asked} finds none")
    return torch.device("cuda" if asked == "auto" else asked)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The optional folder of reference models and real data: `../shared`, or what SMALTI_SHARED names."""
    folder = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the reference data folder, which is not at {folder} (set SMALTI_SHARED to point at it)")
    return folder


@pytest.fixture
def native_kernels(tmp_path_factory, monkeypatch) -> None:
    """Kernels are compiled at their first use, once in a session."""
    if native._compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("SMALTI_NATIVE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))

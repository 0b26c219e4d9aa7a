"""Shared fixtures: where the optional reference data lies, one thread for repeatable arithmetic."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("smalti", deadline=None, derandomize=True)
hypothesis.settings.load_profile("smalti")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The optional folder of reference models and real data: `../shared`, or what SMALTI_SHARED names."""
    folder = Path(os.environ.get("SMALTI_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the reference data folder, which is not at {folder} (set SMALTI_SHARED to point at it)")
    return folder

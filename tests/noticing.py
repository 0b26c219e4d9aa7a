"""How a test of a planted defect says which assertion has to notice it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def fails_at(statement: str, check: Callable[..., None], *arguments: Any) -> None:
    """The check fails, and does so where its source says `statement`: a failure anywhere else proves nothing."""
    with pytest.raises(AssertionError) as caught:
        check(*arguments)
    ours = [entry for entry in caught.traceback if Path(entry.path).parent == Path(__file__).parent]
    found = " ".join(str(ours[-1].statement).split())
    assert statement in found, f"{check.__name__} fails at another place than `{statement}`: {found}"

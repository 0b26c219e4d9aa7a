"""The Hugging Face hub, where a name is one of its `owner/name`."""

import re
from pathlib import Path
from typing import Any

from smalti.errors import InputError


def import_hub() -> Any:
    """The `huggingface_hub` module. Raises InputError naming the extra that installs it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("this needs huggingface_hub, which is an extra: pip install 'smalti[hub]'.") from error
    return huggingface_hub


def is_hub_name(name: str | Path) -> bool:
    """Whether a name can be the hub's. A mistyped path must not turn into a download: `out/demo` is a hub's name only
    if there is no folder `out`."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(name).parent.exists()

"""On what device and with what numbers things run: one word for each, for all commands, recipes and classes.

"auto" is what `SMALTI_DEVICE` and `SMALTI_DTYPE` say, which `smalti --device` and `--dtype` set for a command and the
processes that it starts; or else a GPU where there is one, and float32. What a training multiplies in is a setting of
its own (`precision.py`).
"""

import os

import torch

from smalti.errors import InputError

AUTO = "auto"
DEVICES = (AUTO, "cpu", "cuda", "mps")
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICE_VARIABLE, DTYPE_VARIABLE = "SMALTI_DEVICE", "SMALTI_DTYPE"


def choose_device(name: torch.device | str = AUTO) -> torch.device:
    """The device of a name; of a process of `torchrun` its own GPU. "meta" has shapes and no numbers.

    Raises InputError for one that is unknown, or not there.
    """
    source = ""
    if name == AUTO and (found := os.environ.get(DEVICE_VARIABLE, AUTO)) != AUTO:
        name, source = found, f" ({DEVICE_VARIABLE})"
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {str(name)!r}{source} is unknown; give one of {', '.join(DEVICES)}.") from error
    if chosen.type not in (*DEVICES, "meta"):
        raise InputError(f"device {str(name)!r}{source} is not one of {', '.join(DEVICES)}.")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not there.get(chosen.type, lambda: True)():
        raise InputError(f"device {str(name)!r}{source} is not there: torch finds no GPU; give auto or cpu.")
    if chosen.type == "cuda" and chosen.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def choose_dtype(name: str = AUTO) -> torch.dtype:
    """What weights of transformers are kept and multiplied in. Raises InputError for a name that is not of DTYPES."""
    found = os.environ.get(DTYPE_VARIABLE, AUTO) if name == AUTO else name
    if found not in DTYPES:
        raise InputError(f"dtype {found!r} is unknown; choose one of {', '.join(DTYPES)}.")
    return DTYPES[found]

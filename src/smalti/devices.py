"""On what device and with what numbers things run: one word for each, for all commands, recipes and classes."""

import torch

from smalti.errors import InputError

AUTO = "auto"
DEVICES = (AUTO, "cpu", "cuda", "mps")
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: torch.device | str = AUTO) -> torch.device:
    """The device of a name: "auto" is a GPU where there is one, else the processor; "cuda:1" the second GPU. Raises
    InputError for one that is unknown, or not there."""
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {str(name)!r} is unknown; give one of {', '.join(DEVICES)}.") from error
    return chosen

"""The one error class for bad input, so that the command line can tell it from our own bugs; and its warnings."""

import math

MAX_MESSAGE = 2000
"""Letters of a message; of a longer one the middle is left out."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what was given, where, what was expected
    and how to mend it; the command line prints it without a traceback and exits with status 2. Of a message that
    repeats a megabyte of what was given, the middle is left out."""

    def __init__(self, message: object = ""):
        super().__init__(shortened(str(message), MAX_MESSAGE))


class InputWarning(UserWarning):
    """Something the user gave is used, but not as it is. The command line prints it in one line."""


def require_finite(loss: float, step: int, mend: str) -> None:
    """Raises InputError if a training's loss is not finite; `mend` says what to do."""
    if not math.isfinite(loss):
        raise InputError(f"the loss of step {step} is {loss}: training diverged. {mend}")


def shortened(text: str, most: int = 80) -> str:
    """A text for a message, its middle left out if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what a library says of an error, or else the error's name, to stand in a message of ours; its
    middle left out if it is long, as where it repeats what it was given."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], most).rstrip(".")

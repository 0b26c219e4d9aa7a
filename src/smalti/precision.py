"""In what precision a training multiplies: `auto`, `float32` or `bfloat16`, decided once for each training.

bfloat16 pays where the processor or the GPU has units that multiply in it. Elsewhere it is emulated and takes several
times as long as float32, so `auto` takes float32 there. Weights, optimizer, sums and losses are float32 either way.
"""

import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from smalti import processor
from smalti.errors import InputError, InputWarning

AUTO, FLOAT32, BFLOAT16 = PRECISIONS = ("auto", "float32", "bfloat16")

_log = logging.getLogger(__name__)


def check_precision(precision: str) -> None:
    """Raises ValueError for what is not one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 run on units of the device's own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and processor.multiplies_bfloat16()


def resolve_precision(precision: str, device: torch.device | str, *, begun: str | None = None) -> str:
    """ "float32" or "bfloat16": what is asked for, or, where that is "auto", what the training was `begun` in (None: it
    begins here) or else what the device multiplies fast.

    So a training that is resumed on another machine keeps its precision, slow as it may be there. Says so by an
    InputWarning where it is bfloat16 and emulated.
    """
    device = torch.device(device)
    fast = multiplies_bfloat16(device)
    if precision == AUTO:
        precision = begun or (BFLOAT16 if fast else FLOAT32)
        _log.info("precision: %s, %s", precision, "as the run began" if begun else f"chosen for the {device.type}")
    if precision == BFLOAT16 and not fast:
        warnings.warn(_slow(device, begun == BFLOAT16), InputWarning, stacklevel=3)
    return precision


def _slow(device: torch.device, begun: bool) -> str:
    # Processor time of one thread with SMALTI_ISA, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA at AVX2: 0.22 s and
    # 1.62 s for a step of the demo's image tokenizer, 0.18 s and 1.93 s for one of its transformer.
    where = "this GPU" if device.type == "cuda" else f"this processor ({processor.instruction_set()})"
    instead = (
        "The run began in bfloat16 and keeps it; a new run, in another folder, takes float32 here by itself."
        if begun
        else "precision=auto takes float32 here."
    )
    return (
        f"precision is bfloat16, which {where} emulates: with AVX2 a training step of an image tokenizer takes about 8 "
        f"times as long as in float32, one of a transformer 11 times as long. {instead}"
    )


def with_precision(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training, with the `bf16` (true, false, null) of earlier versions written as `precision`."""
    if "bf16" not in settings:
        return dict(settings)
    if "precision" in settings:
        raise InputError("bf16 is the old name of precision; give one of them.")
    given = settings["bf16"]
    if given is not None and not isinstance(given, bool):
        raise InputError(f"bf16 is {given!r}; expected true, false or null, or better: precision=auto.")
    renamed = AUTO if given is None else BFLOAT16 if given else FLOAT32
    return {name: value for name, value in settings.items() if name != "bf16"} | {"precision": renamed}


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """Products in a precision that is resolved. Raises ValueError for any other."""
    if precision not in (FLOAT32, BFLOAT16):
        raise ValueError(f"precision is {precision!r}; resolve it to {FLOAT32} or {BFLOAT16} first.")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == BFLOAT16)


def compute_precision(device: torch.device | str, precision: str) -> AbstractContextManager:
    """`autocast` for a transformer, with the attention kernel that goes with it."""
    stack = ExitStack()
    stack.enter_context(autocast(device, precision))
    if precision == BFLOAT16 and torch.device(device).type == "cpu":
        # The CPU's fused attention takes 4 times as long as the plain one in bfloat16 at some 60 tokens.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack

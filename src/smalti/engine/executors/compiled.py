"""Static steps fused by `torch.compile`, and on a GPU captured then: few kernels instead of some two hundred operators.

A step takes up to a minute to compile. So it is taken where it is asked for by name, steps look at few different
widths, and tokens that are run without a draw behind them, which is seldom, take the model itself.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.engine.executors.base import Eager
from smalti.engine.executors.cuda_graph import capture
from smalti.engine.executors.static_steps import StaticSteps
from smalti.models.decode_state import DecodeState, Rows
from smalti.models.decoder_only import DecoderOnly

LEAST_WIDTH = 256
"""Slots that a step looks at: so many, and their doubles. A picture of 256 codes needs one step."""


class Compiled(StaticSteps):
    name: ClassVar[str] = "compiled"
    backend: ClassVar[str] = "inductor"

    def __init__(self, model: DecoderOnly):
        super().__init__(model)
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def width_for(self, num_slots: int) -> int:
        return LEAST_WIDTH << (-(-num_slots // LEAST_WIDTH) - 1).bit_length()

    def extend(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R D"]:
        return Eager.extend(self, state, rows, tokens)

    def prepare(self, step: Callable[[], None]) -> Callable[[], None]:
        assert isinstance(step, FunctionType)
        # as a function with code of its own: of one piece of code torch compiles eight, and then no more
        own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        fused = torch.compile(own, fullgraph=True, dynamic=False, backend=self.backend)
        if self.pool is not None:
            return capture(fused, self.pool)
        fused()
        return fused

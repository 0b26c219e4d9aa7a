"""Static steps on a GPU as captured graphs: the processor launches one thing a step instead of some two hundred."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from smalti.engine.executors.static_steps import StaticSteps
from smalti.models.base import SequenceModel
from smalti.models.decoder_only import DecoderOnly

WARM_UPS = 3


class CudaGraph(StaticSteps):
    name: ClassVar[str] = "cuda_graph"

    @classmethod
    def why_not(cls, model: SequenceModel, num_steps: int | None = None) -> list[str]:
        away = [] if model.device.type == "cuda" else [f"the model is on {model.device}, not on a GPU"]
        return super().why_not(model) + away

    def __init__(self, model: DecoderOnly):
        super().__init__(model)
        self.pool = torch.cuda.graph_pool_handle()

    def prepare(self, step: Callable[[], None]) -> Callable[[], None]:
        return capture(step, self.pool)


def capture(step: Callable[[], None], pool: Any) -> Callable[[], None]:
    """The replay of a step. Graphs of one pool share their memory: one runs at a time, and what it is to leave lies in
    tensors made before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay

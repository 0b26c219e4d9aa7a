"""Decode steps on a GPU as captured graphs: the processor launches one thing a step instead of some two hundred.

A graph holds one step of some number of rows, for states filled up to some width. Free rows behind those that are
wanted run along, up to a power of two, so that few graphs serve requests that come and go; what they write is
overwritten before it is read. Prompts, and rows that do not stand side by side, take the model itself.

Letters: R rows, D model width, S slots of the state.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smalti.engine.executors.base import Eager, why_not_plain
from smalti.models.base import SequenceModel
from smalti.models.decode_state import SLOT_BLOCK, DecodeState, Places, Rows
from smalti.models.decoder_only import DecoderOnly

MOST_GRAPHS = 64
"""Of one state; the oldest is dropped for a new one."""
WARM_UPS = 3


class CudaGraph(Eager):
    name: ClassVar[str] = "cuda_graph"

    @classmethod
    def why_not(cls, model: SequenceModel, num_steps: int | None = None) -> list[str]:
        reasons = why_not_plain(model)
        if model.device.type != "cuda":
            reasons.append(f"the model is on {model.device}, not on a GPU")
        if model.training:
            reasons.append("the model is in training mode")
        return reasons

    model: DecoderOnly

    def __init__(self, model: DecoderOnly):
        super().__init__(model)
        self.state: DecodeState | None = None
        self.graphs: dict[tuple[int, int, int], _Step] = {}

    def extend(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R D"]:
        if not isinstance(rows, slice) or max(map(len, tokens)) > 1:
            return super().extend(state, rows, tokens)
        state.check_room(rows, 1, self.model.config.transformer.max_length)
        if self.state is not state:
            self.state, self.graphs = state, {}
        count = rows.stop - rows.start
        around = slice(rows.start, min(rows.start + (1 << (count - 1).bit_length()), state.capacity))
        longest = max(state.lengths[row] for row in state.indices(rows)) + 1
        width = min(-(-longest // SLOT_BLOCK) * SLOT_BLOCK, state.both[0].shape[3])
        key = around.start, around.stop, width
        if key not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = _Step(self.model, state, around, width)
        hidden = self.graphs[key].run([token for (token,) in tokens])[:count]
        state.advance(rows, 1)
        return hidden


class _Step:
    """One captured step."""

    def __init__(self, model: DecoderOnly, state: DecodeState, rows: slice, width: int):
        self.state, self.rows = state, rows
        num_rows, device = rows.stop - rows.start, model.device
        self.inputs = torch.zeros(2, num_rows, dtype=torch.long, device=device)
        """Token ids, and the slot that each goes to."""
        self.pinned = torch.zeros(2, num_rows, dtype=torch.long).pin_memory()
        self.places = places = _StaticPlaces(state, rows, self.inputs[1], width)  # the graph reads its tensors
        kept = [both[:, rows].clone() for both in state.both]  # warming up writes
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._hidden(model, places)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = self._hidden(model, places)
        for both, before in zip(state.both, kept, strict=True):
            both[:, rows] = before

    def _hidden(self, model: DecoderOnly, places: "_StaticPlaces") -> Float[Tensor, "R D"]:
        x = model.embed_tokens(self.inputs[0][:, None])
        return model.transformer(x, places=places)[:, -1]

    def run(self, tokens: Sequence[int]) -> Float[Tensor, "R D"]:
        lengths, last = self.state.lengths, self.state.both[0].shape[3] - 1
        self.pinned[0, : len(tokens)] = torch.tensor(tokens)
        self.pinned[1] = torch.tensor([min(lengths[row], last) for row in self.state.indices(self.rows)])
        self.inputs.copy_(self.pinned, non_blocking=True)
        self.graph.replay()
        return self.hidden


class _StaticPlaces(Places):
    """`Places` of one token a row, told by a tensor on the device instead of numbers on the host."""

    def __init__(self, state: DecodeState, rows: slice, slots: Tensor, width: int):
        self.state, self.rows, self.width, self.num_tokens = state, rows, width, 1
        self.device = slots.device
        self.slots = slots[:, None]
        self.index = torch.arange(len(slots), device=self.device)

    def write(
        self, layer: int, keys: Float[Tensor, "R M 1 Dh"], values: Float[Tensor, "R M 1 Dh"]
    ) -> tuple[Float[Tensor, "R M S Dh"], Float[Tensor, "R M S Dh"]]:
        found = []
        for held, new in ((self.state.keys(layer), keys), (self.state.values(layer), values)):
            held = held[self.rows]
            held.transpose(1, 2).index_put_((self.index, self.slots[:, 0]), new[:, :, 0])
            found.append(held[:, :, : self.width])
        return found[0], found[1]

    def mask(self) -> Bool[Tensor, "R 1 1 S"]:
        return (torch.arange(self.width, device=self.device) <= self.slots)[:, None, None]

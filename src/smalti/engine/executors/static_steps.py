"""Decode steps as one function of tensors that stay where they are: what a GPU can capture, and a compiler can fuse.

A step runs each row's last token, scores the slot's ids, guides, filters, draws, and puts what it drew where the next
step reads it. Lengths, random numbers, scales and settings of every row are on the device; a step takes nothing from
the host and tells it nothing. So the host launches as many steps as are known to be alike, and reads their tokens
once, at the end.

Rows run in powers of two, so that few steps serve requests that come and go: free rows run along, and what they write
is overwritten before it is read. Prompts, and rows that do not stand side by side, take the model itself.

Letters: R rows that run, of which U draw and, where they are guided, N before them are null rows; D model width, S
slots of the state, K most steps at once, n the ids of a slot.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.engine.executors.base import Draws, Eager, Token, why_not_plain
from smalti.engine.sampling import SampleConfig, Settings, guide, log_prob_of, sample_rows, settings_of
from smalti.models.base import SequenceModel
from smalti.models.decode_state import SLOT_BLOCK, DecodeState, Places, Rows
from smalti.models.decoder_only import DecoderOnly
from smalti.sequences.layout import Slot

MOST_STEPS = 64
"""That are kept of one state; the oldest is dropped for a new one."""


class Ahead(NamedTuple):
    """Tokens that rows side by side draw one after the other, all from one slot."""

    rows: slice
    null_rows: list[int]
    """The null row of each, all right before them; empty: nothing is guided."""
    token_ids: list[int]
    """What each row runs first."""
    slot: Slot
    uniforms: Float[Tensor, "n R"]
    """Of each of n tokens, on the host."""
    scales: Float[Tensor, "n R"] | None
    configs: list[SampleConfig]


class StaticSteps(Eager, ABC):
    """What executors of static steps have in common: which rows run together, and what is put on the device."""

    model: DecoderOnly

    @classmethod
    def why_not(cls, model: SequenceModel, num_steps: int | None = None) -> list[str]:
        return why_not_plain(model) + (["the model is in training mode"] if model.training else [])

    def __init__(self, model: DecoderOnly):
        super().__init__(model)
        self.state: DecodeState | None = None
        self.inputs: dict[tuple[int, int, int], Inputs] = {}
        self.launches: dict[tuple[object, ...], Callable[[], None]] = {}

    @abstractmethod
    def prepare(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does as `step` does, faster. It may run `step` before: whoever asks fills the inputs in again."""

    def width_for(self, num_slots: int) -> int:
        """How many slots a step looks at that needs so many, at most S: each width is prepared by itself."""
        return -(-num_slots // SLOT_BLOCK) * SLOT_BLOCK

    def extend(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R D"]:
        if not isinstance(rows, slice) or max(map(len, tokens)) > 1:
            return super().extend(state, rows, tokens)
        state.check_room(rows, 1, self.model.config.transformer.max_length)
        inputs = self._inputs(state, rows, 0)
        fields = Fields([token for (token,) in tokens], [], [], None, None)
        self._launch(state, inputs, fields, max(state.lengths[rows]) + 1, None, False)
        state.advance(rows, 1)
        return inputs.hidden[: len(tokens)]

    def draw_ahead(self, state: DecodeState, ahead: Ahead) -> list[list[Token]]:
        """n times: runs each row's last token and draws the next. The tokens, step by step; the host waits once.

        Raises ValueError where a row would get too long.
        """
        rows, num_tokens = ahead.rows, len(ahead.uniforms)
        running = slice(rows.start - len(ahead.null_rows), rows.stop)
        state.check_room(running, num_tokens, self.model.config.transformer.max_length)
        inputs = self._inputs(state, rows, len(ahead.null_rows))
        fields = Fields(ahead.token_ids, ahead.null_rows, ahead.configs, ahead.uniforms, ahead.scales)
        filtered = any(config.is_filtered for config in ahead.configs)
        longest = max(state.lengths[running])
        for number in range(num_tokens):
            given = None if number else fields
            self._launch(state, inputs, given, longest + number + 1, ahead.slot, filtered)
        state.advance(running, num_tokens)
        return inputs.read(num_tokens, len(ahead.token_ids))

    def _inputs(self, state: DecodeState, rows: slice, num_null: int) -> "Inputs":
        """Of these rows, and free ones beside them up to a power of two."""
        if self.state is not state:
            self.state, self.inputs, self.launches = state, {}, {}
        size = 1 << (rows.stop - rows.start - 1).bit_length()
        start = max(rows.start - size, 0) if num_null else rows.start
        stop = min(rows.start + size, state.capacity)
        beside = state.lengths[start : rows.start - num_null] + state.lengths[rows.stop : stop]
        if max(beside, default=0) >= state.both[0].shape[3]:  # a full row has no slot to write to
            start, stop = rows.start - num_null, rows.stop
        key = start, rows.start, stop
        if key not in self.inputs:
            self.inputs[key] = Inputs(self.model, state, *key)
        return self.inputs[key]

    def _launch(
        self,
        state: DecodeState,
        inputs: "Inputs",
        fields: "Fields | None",
        num_slots: int,
        slot: Slot | None,
        filtered: bool,
    ) -> None:
        """A step; `fields` are filled in first, None: it goes on from the one before. It draws where there is a
        slot."""
        width = min(self.width_for(num_slots), state.both[0].shape[3])
        key = inputs.start, inputs.first, inputs.stop, width, slot, filtered
        if fields is not None:
            inputs.fill(fields)
        if key not in self.launches:
            if len(self.launches) == MOST_STEPS:
                del self.launches[next(iter(self.launches))]
            held = inputs.held()
            places = StaticPlaces(state, slice(inputs.start, inputs.stop), inputs.slots, width)
            self.launches[key] = self.prepare(lambda: static_step(self.model, inputs, places, slot, filtered))
            inputs.restore(held)
        self.launches[key]()


class Fields(NamedTuple):
    """What the first of some steps is told by the host."""

    token_ids: Sequence[int]
    """Of the rows that draw."""
    null_rows: Sequence[int]
    """The null row of each, as a row of the state; empty: there are none."""
    configs: Sequence[SampleConfig]
    uniforms: Float[Tensor, "K U"] | None
    scales: Float[Tensor, "K U"] | None


class Inputs:
    """The static tensors of rows [start, stop) of a state, of which those from `first` on draw."""

    def __init__(self, model: DecoderOnly, state: DecodeState, start: int, first: int, stop: int):
        self.state, self.start, self.first, self.stop = state, start, first, stop
        self.num_null = first - start
        R, U, K = stop - start, stop - first, state.both[0].shape[3]
        device = model.device
        self.whole = torch.zeros(2 * R + 2 * U + 1, dtype=torch.long, device=device)
        self.token_ids, self.null_of, self.slots, self.source, self.at = self.whole.split((U, U, R, R, 1))
        """Last tokens of the rows that draw; the null row of each; the slot each row writes to; whose token it runs;
        and the step, from 0."""
        self.numbers = torch.zeros(2 + K, 2, U, dtype=torch.float64, device=device)
        """Settings (temperature, top_k; top_p, ln min_p), and behind them each step's uniform numbers and scales."""
        self.drawn = torch.zeros(K, 3, U, dtype=torch.float64, device=device)
        """Of each step: token ids, and their two log-probabilities."""
        self.hidden = torch.zeros(R, model.config.transformer.d_model, dtype=state.both[0].dtype, device=device)

    def fill(self, fields: Fields) -> None:
        """Puts what the host knows onto the device; the steps start at 0 again."""
        size, U, last = len(fields.token_ids), self.stop - self.first, self.state.both[0].shape[3] - 1
        free = [0] * (U - size)
        null_of = [row - self.start for row in fields.null_rows] or [0] * size
        slots = [min(length, last) for length in self.state.lengths[self.start : self.stop]]
        source = [0] * self.num_null + list(range(U))
        for number, row in enumerate(null_of if fields.null_rows else []):
            source[row] = number
        self.whole.copy_(torch.tensor([*fields.token_ids, *free, *null_of, *free, *slots, *source, 0]))
        if fields.uniforms is None:
            return
        numbers = torch.zeros(2 + len(fields.uniforms), 2, U, dtype=torch.float64)
        numbers[:2] = settings_of([*fields.configs, *[SampleConfig()] * len(free)])
        numbers[2:, 0, :size] = fields.uniforms
        if fields.scales is not None:
            numbers[2:, 1, :size] = fields.scales
        self.numbers[: len(numbers)].copy_(numbers)

    def held(self) -> Int[Tensor, " numbers"]:
        return self.whole.clone()

    def restore(self, held: Int[Tensor, " numbers"]) -> None:
        self.whole.copy_(held)

    def read(self, num_steps: int, num_rows: int) -> list[list[Token]]:
        """What was drawn, step by step. The device is waited for once."""
        drawn = self.drawn[:num_steps, :, :num_rows].transpose(1, 2).tolist()
        return [[(int(token_id), *log_probs) for token_id, *log_probs in step] for step in drawn]


class StaticPlaces(Places):
    """`Places` of one token a row, told by a tensor on the device instead of numbers on the host."""

    def __init__(self, state: DecodeState, rows: slice, slots: Int[Tensor, " R"], width: int):
        self.rows, self.width, self.num_tokens = rows, width, 1
        self.device = slots.device
        self.slots = slots[:, None]
        self.index = torch.arange(len(slots), device=self.device)
        self.layers = [(both[0][rows], both[1][rows]) for both in state.both]

    def write(
        self, layer: int, keys: Float[Tensor, "R M 1 Dh"], values: Float[Tensor, "R M 1 Dh"]
    ) -> tuple[Float[Tensor, "R M S Dh"], Float[Tensor, "R M S Dh"]]:
        found = []
        for held, new in zip(self.layers[layer], (keys, values), strict=True):
            held.transpose(1, 2).index_put_((self.index, self.slots[:, 0]), new[:, :, 0])
            found.append(held[:, :, : self.width])
        return found[0], found[1]

    def mask(self) -> Bool[Tensor, "R 1 1 S"]:
        return (torch.arange(self.width, device=self.device) <= self.slots)[:, None, None]


def static_step(model: DecoderOnly, inputs: Inputs, places: StaticPlaces, slot: Slot | None, filtered: bool) -> None:
    """One step: reads and writes `inputs` and the state alone, and nothing of it depends on a value on the device."""
    x = model.embed_tokens(inputs.token_ids[inputs.source][:, None])
    hidden = model.transformer(x, places=places)[:, -1]
    if slot is None:
        inputs.hidden.copy_(hidden)
        return
    uniforms, scales = inputs.numbers.index_select(0, inputs.at + 2)[0]
    draws = drawn_of(model, hidden, slot, inputs, uniforms, scales.float(), Settings.of(inputs.numbers), filtered)
    inputs.drawn.index_copy_(0, inputs.at, torch.stack([values.double() for values in draws])[None])
    inputs.token_ids.copy_(draws.token_ids)
    inputs.slots.add_(1).clamp_(max=inputs.drawn.shape[0] - 1)
    inputs.at.add_(1)


def drawn_of(
    model: DecoderOnly,
    hidden: Float[Tensor, "R D"],
    slot: Slot,
    inputs: Inputs,
    uniforms: Float[Tensor, " U"],
    scales: Float[Tensor, " U"],
    settings: Settings,
    filtered: bool,
) -> Draws:
    """`Eager.draw`, of null rows and rows that draw in one product."""
    logits = model.logits(hidden, slot).float()
    cond = logits[inputs.num_null :]
    guided = guide(cond, logits[inputs.null_of], scales[:, None]) if inputs.num_null else cond
    local, draw_log_probs = sample_rows(guided, uniforms, settings, filtered=filtered)
    return Draws(slot.token_ids(local), log_prob_of(cond, local), draw_log_probs)

"""Keys and values of the tokens so far, for rows that come and go one by one.

Letters: C rows there is room for, R rows of a call, T new tokens, M key-value heads, Dh head width, S slots of a row.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.models.config import TransformerConfig

SLOT_BLOCK = 64
"""Slots are allocated in whole blocks: the executor `packed` attends to a block at a time."""

Rows: TypeAlias = "slice | list[int]"
"""Rows of a state: side by side, which is faster, or in any places."""


class DecodeState:
    """Keys and values, allocated once: per layer (capacity, M, max_length in whole blocks, Dh).

    Row r holds `lengths[r]` tokens, in its slots from 0 on, but for those at its beginning that an encoder read. What
    lies behind them is left from before, finite, and nobody looks at it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        capacity: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        num_slots = -(-max_length // SLOT_BLOCK) * SLOT_BLOCK
        shape = (2, capacity, config.kv_heads, num_slots, config.head_dim)
        self.capacity, self.max_length = capacity, max_length
        self.both = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        """Keys and values of each layer in one tensor, so that one copy can write both."""
        self.lengths = [0] * capacity
        """On the host: whoever drives the rows knows them, and nothing waits for the device."""
        self.encoded = [0] * capacity
        """How many of a row's tokens, at its beginning, an encoder read: they have no slots."""
        self.conditions: list[Any] = [None] * capacity
        """What a row is conditioned on beside the tokens in its slots, if anything: features, a label's embedding, the
        `Context` that an encoder made of its text."""
        self.contexts: dict[tuple[int, ...], Any] = {}
        """What an encoder made of the texts that rows began with lately, by their token ids."""
        self.row_contexts: Any = None
        """The contexts of the rows that ran last, put together; the same rows run next, as a rule."""

    def keys(self, layer: int) -> Float[Tensor, "C M S Dh"]:
        return self.both[layer][0]

    def values(self, layer: int) -> Float[Tensor, "C M S Dh"]:
        return self.both[layer][1]

    def indices(self, rows: Rows) -> list[int]:
        return list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows

    def num_filled(self, row: int) -> int:
        """Slots of a row that hold a token."""
        return self.lengths[row] - self.encoded[row]

    def advance(self, rows: Rows, counts: int | Sequence[int]) -> None:
        """The rows are so many tokens longer now."""
        indices = self.indices(rows)
        if isinstance(counts, int):
            for row in indices:
                self.lengths[row] += counts
        else:
            for row, count in zip(indices, counts, strict=True):
                self.lengths[row] += count

    def check_room(self, rows: Rows, counts: int | Sequence[int], most: int) -> None:
        """Raises ValueError if a row has no room for so many tokens more, or they would be more than `most`."""
        indices = self.indices(rows)
        each = [counts] * len(indices) if isinstance(counts, int) else counts
        longest = max((self.num_filled(row) + count for row, count in zip(indices, each, strict=True)), default=0)
        self.check_length(longest, most)

    def check_length(self, num_tokens: int, most: int) -> None:
        """Raises ValueError if a row has no room for so many tokens, or they are more than `most`."""
        limit = min(most, self.max_length)
        if num_tokens > limit:
            raise ValueError(f"{num_tokens} tokens exceed the limit of {limit} (max_length).")

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Row targets[i] becomes what row sources[i] was: candidates of one prompt, a beam that follows its parent."""
        if not sources:
            return
        width = max(map(self.num_filled, sources))
        into, taken = torch.tensor(targets), torch.tensor(sources)
        for both in self.both:
            both[:, into, :, :width] = both[:, taken, :, :width]
        held = [(self.lengths[source], self.encoded[source], self.conditions[source]) for source in sources]
        for target, found in zip(targets, held, strict=True):
            self.lengths[target], self.encoded[target], self.conditions[target] = found

    def begin(self, row: int, condition: Float[Tensor, "..."] | None = None) -> None:
        """The row is to hold a new sequence; what it held before is finite and may stay."""
        self.lengths[row], self.encoded[row], self.conditions[row] = 0, 0, condition

    def begin_encoded(self, row: int, num_tokens: int, context: Any) -> None:
        """The row begins with so many tokens that an encoder read, and `context` is what it made of them."""
        self.lengths[row], self.encoded[row], self.conditions[row] = num_tokens, num_tokens, context

    def clear(self, row: int) -> None:
        """Empties a row; what it held may not have been finite."""
        for both in self.both:
            both[:, row] = 0
        self.begin(row)


class Places:
    """Where T new tokens of some rows go, and what each of them sees. `counts` tells how many of each row are real."""

    def __init__(self, state: DecodeState, rows: Rows, num_tokens: int, counts: Sequence[int] | None = None):
        self.state, self.rows = state, rows
        self.device = state.both[0].device
        lengths = [state.num_filled(row) for row in state.indices(rows)]
        self.past, longest = min(lengths), max(lengths)
        self.num_tokens, self.width = num_tokens, longest + num_tokens
        self.are_level = self.past == longest and counts is None
        """Whether all rows are equally long, before and behind: then nothing needs to be looked up."""
        places = torch.arange(num_tokens, device=self.device)
        if self.are_level:
            self.slots: Int[Tensor, ...] = self.past + places  # (T,)
            return
        self.width = min(self.width, state.both[0].shape[3])
        self.slots = torch.tensor(lengths, device=self.device)[:, None] + places  # (R, T)
        real = [num_tokens] * len(lengths) if counts is None else counts
        self.real = (places < torch.tensor(real, device=self.device)[:, None]).nonzero(as_tuple=True)
        index = torch.tensor(list(state.indices(rows)), device=self.device)
        self.real_rows, self.real_slots = index[self.real[0]], self.slots[self.real]

    def write(
        self, layer: int, keys: Float[Tensor, "R M T Dh"], values: Float[Tensor, "R M T Dh"]
    ) -> tuple[Float[Tensor, "R M S Dh"], Float[Tensor, "R M S Dh"]]:
        """Puts new keys and values into the state; returns the rows' so far, S = `width`."""
        found = []
        for held, new in ((self.state.keys(layer), keys), (self.state.values(layer), values)):
            if self.are_level:
                held[self.rows, :, self.past : self.width] = new
            else:
                held.transpose(1, 2)[self.real_rows, self.real_slots] = new.transpose(1, 2)[self.real]
            found.append(held[self.rows, :, : self.width])
        return found[0], found[1]

    def mask(self) -> Bool[Tensor, "..."] | None:
        """True at the slots each new token may look at; None where plain causal attention is the same."""
        if self.are_level and (self.num_tokens == 1 or self.past == 0):
            return None
        seen = torch.arange(self.width, device=self.device) <= self.slots[..., None]  # (…, T, S)
        return seen if seen.ndim == 2 else seen[:, None]

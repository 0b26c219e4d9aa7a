"""Keys and values of the tokens so far."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.models.config import TransformerConfig

SLOT_BLOCK = 64
"""Slots of a cache are allocated in whole blocks: `fast_decode` attends to a block at a time."""


class KVCache:
    """Keys and values of the tokens so far, allocated once: per layer (B, M, max_length in whole blocks, Dh).

    `length` slots are filled, the same in all rows; only the loop that owns the cache advances it, through
    `advance`. Rows whose sequence is shorter are padded on the left: row b's first token is in slot `starts[b]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        *,
        starts: Int[Tensor, " B"] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        num_slots = -(-max_length // SLOT_BLOCK) * SLOT_BLOCK
        shape = (batch_size, config.kv_heads, num_slots, config.head_dim)
        self.max_length = max_length
        self._set([torch.zeros(2, *shape, device=device, dtype=dtype) for _ in range(config.num_layers)])
        self.length = 0
        self.starts = starts if starts is not None and bool(starts.any()) else None

    def _set(self, both: list[Float[Tensor, "2 B M S Dh"]]) -> None:
        self.both = both
        """Keys and values of each layer in one tensor, so that one copy can write both."""
        self.keys, self.values = [layer[0] for layer in both], [layer[1] for layer in both]

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens

    def rows(self, start: int, end: int) -> "KVCache":
        """Rows [start, end) as a cache of their own that shares this one's memory."""
        view = object.__new__(KVCache)
        view._set([layer[:, start:end] for layer in self.both])
        view.length, view.max_length = self.length, self.max_length
        view.starts = None if self.starts is None else self.starts[start:end]
        return view

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Row i becomes what row rows[i] was: a beam follows its parent."""
        for held in (*self.keys, *self.values):
            held[:, :, : self.length] = held[rows, :, : self.length]
        if self.starts is not None:
            self.starts = self.starts[rows]

    def write(
        self, layer: int, keys: Float[Tensor, "B M T Dh"], values: Float[Tensor, "B M T Dh"]
    ) -> tuple[Float[Tensor, "B M S Dh"], Float[Tensor, "B M S Dh"]]:
        """Puts new keys and values behind the filled slots; returns all of the layer so far, S = length + T."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

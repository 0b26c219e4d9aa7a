"""The one transformer: every model here is this file with another config.

Pre-norm blocks (norm, attention, add; norm, feed-forward, add) and one more norm at the end. What varies between
GPT-2, Llama, LlamaGen and Parti is in `TransformerConfig`: the norm, the feed-forward, the positions, grouped
key-value heads, cross-attention. Embeddings and heads are in `models.py`.

Letters: B batch, T query tokens, S key tokens, D model width, N heads, M key-value heads, Dh head width, L layers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.models.config import TransformerConfig
from smalti.models.decode_state import DecodeState, Places, Rows


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """LayerNorm, or RMSNorm (arXiv:1910.07467), over the last axis. RMSNorm is computed in float32 or better."""

    def __init__(self, kind: str, width: int, eps: float):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads, on `scaled_dot_product_attention`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.d_model, config.q_width + 2 * config.kv_width, bias=config.bias)
        self.out = nn.Linear(config.q_width, config.d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = Norm(config.norm, config.head_dim, config.norm_eps)
            self.k_norm = Norm(config.norm, config.head_dim, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Float[Tensor, "... T half 2"] | None,
        mask: Bool[Tensor, "..."] | None,
        places: Places | None,
        layer: int,
    ) -> Float[Tensor, "B T D"]:
        """`mask` is true where a query may look; None: causal among the T tokens if the config is causal."""
        B, T, _ = x.shape
        config = self.config
        q, k, v = self.qkv(x).split((config.q_width, config.kv_width, config.kv_width), dim=-1)
        q = q.view(B, T, config.num_heads, config.head_dim).transpose(1, 2)  # (B, N, T, Dh)
        k = k.view(B, T, config.kv_heads, config.head_dim).transpose(1, 2)  # (B, M, T, Dh)
        v = v.view(B, T, config.kv_heads, config.head_dim).transpose(1, 2)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if places is not None:
            k, v = places.write(layer, k, v)  # (B, M, S, Dh)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=config.attention_dropout if self.training else 0.0,
            is_causal=config.causal and mask is None and T > 1,
            enable_gqa=config.kv_heads < config.num_heads,
        )
        return self.out(attended.transpose(1, 2).reshape(B, T, config.q_width))


class Context(NamedTuple):
    """What an encoder said, as the layers of a decoder look at it: computed once, for all tokens that follow."""

    keys: list[Float[Tensor, "B N S Dh"]]
    values: list[Float[Tensor, "B N S Dh"]]
    mask: Bool[Tensor, "B S"] | None
    """True at the real tokens; None: all are."""

    def attend(self, q: Float[Tensor, "B N T Dh"], layer: int, dropout: float = 0.0) -> Float[Tensor, "B N T Dh"]:
        """What a layer's queries find."""
        allowed = None if self.mask is None else self.mask[:, None, None]
        return F.scaled_dot_product_attention(
            q, self.keys[layer], self.values[layer], attn_mask=allowed, dropout_p=dropout
        )


MOST_RUNS = 4
"""Contexts of a step that are attended to one after the other; more are put into one tensor."""


class RowContexts:
    """The contexts of a decode step's rows, each made of one text.

    Rows side by side that have one context, as the candidates of a prompt and all null rows do, attend to it together:
    it is read once for all of them. Many different ones are laid into one tensor, which is made once for all steps of
    the same rows.
    """

    def __init__(self, contexts: Sequence[Context]):
        self.contexts = list(contexts)
        ends = [i + 1 for i in range(len(contexts)) if i + 1 == len(contexts) or contexts[i + 1] is not contexts[i]]
        self.runs = list(zip([0, *ends], ends, strict=False))
        self.stacked = _stacked(contexts) if len(self.runs) > MOST_RUNS else None

    def attend(self, q: Float[Tensor, "R N T Dh"], layer: int, dropout: float = 0.0) -> Float[Tensor, "R N T Dh"]:
        """What a layer's queries find, each row's in its own context."""
        if self.stacked is not None:
            return self.stacked.attend(q, layer, dropout)
        found = [self._attend_alike(q[start:end], self.contexts[start], layer, dropout) for start, end in self.runs]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _attend_alike(
        self, q: Float[Tensor, "R N T Dh"], context: Context, layer: int, dropout: float
    ) -> Float[Tensor, "R N T Dh"]:
        R, N, T, Dh = q.shape
        together = q.transpose(0, 1).reshape(1, N, R * T, Dh)
        return context.attend(together, layer, dropout).view(N, R, T, Dh).transpose(0, 1)


def _stacked(contexts: Sequence[Context]) -> Context:
    """Contexts of one text each as one of several, filled up with keys that nobody sees."""
    lengths = [context.keys[0].shape[2] for context in contexts]
    longest, device = max(lengths), contexts[0].keys[0].device
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]

    def together(parts: Sequence[Float[Tensor, "1 N S Dh"]]) -> Float[Tensor, "R N S Dh"]:
        return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])

    keys, values = (
        [together([getattr(context, name)[layer] for context in contexts]) for layer in range(len(contexts[0].keys))]
        for name in ("keys", "values")
    )
    return Context(keys, values, mask)


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to an encoder's output."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.d_model, config.q_width, bias=config.bias)
        self.kv = nn.Linear(config.d_model, 2 * config.q_width, bias=config.bias)
        self.out = nn.Linear(config.q_width, config.d_model, bias=config.bias)

    def keys_and_values(self, encoded: Float[Tensor, "B S D"]) -> Float[Tensor, "2 B N S Dh"]:
        kv = self.kv(encoded).view(*encoded.shape[:2], 2, self.config.num_heads, self.config.head_dim)
        return kv.permute(2, 0, 3, 1, 4)

    def forward(self, x: Float[Tensor, "B T D"], context: Context | RowContexts, layer: int) -> Float[Tensor, "B T D"]:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.config.num_heads, self.config.head_dim).transpose(1, 2)
        attended = context.attend(q, layer, self.config.attention_dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).reshape(B, T, self.config.q_width))


class FeedForward(nn.Module):
    """Two matrices with an activation between, or SwiGLU's three: down(silu(gate x) · up x) (arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.kind = config.feed_forward
        wide = config.d_ff * (2 if self.kind == "swiglu" else 1)  # gate and up in one product
        self.up = nn.Linear(config.d_model, wide, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.kind == "gelu":
            x = F.gelu(x)
        elif self.kind == "gelu_tanh":
            x = F.gelu(x, approximate="tanh")
        else:
            x = torch.relu(x) if self.kind == "relu" else torch.tanh(x)
        return self.down(x)


class Block(nn.Module):
    """One layer: attention, perhaps cross-attention, feed-forward; each normed before and added after."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.attention = Attention(config)
        if config.cross_attention:
            self.cross_norm = Norm(config.norm, config.d_model, config.norm_eps)
            self.cross_attention = CrossAttention(config)
        self.feed_forward_norm = Norm(config.norm, config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Float[Tensor, "... T half 2"] | None,
        mask: Bool[Tensor, "..."] | None,
        context: Context | RowContexts | None,
        places: Places | None,
        layer: int,
    ) -> Float[Tensor, "B T D"]:
        x = x + self._drop(self.attention(self.attention_norm(x), rotation, mask, places, layer))
        if context is not None:
            x = x + self._drop(self.cross_attention(self.cross_norm(x), context, layer))
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return F.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """Blocks, positions and the final norm: embeddings in, hidden states out."""

    table: Tensor
    """Sines and cosines by position, of whichever fixed kind the config asks for."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.recomputes = False
        """Whether training computes each block again in the backward pass instead of keeping what it computed: a third
        more work, memory for the activations of one block alone."""
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = Norm(config.norm, config.d_model, config.norm_eps)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length, config.d_model)
        elif config.positions == "sinusoidal":
            self.register_buffer("table", sinusoids(config.max_length, config.d_model), persistent=False)
        elif config.positions == "rotary":
            table = rotary_table(config.max_length, config.head_dim, config.rotary_base)
            self.register_buffer("table", table, persistent=False)
        elif config.positions == "rotary_2d":
            self.register_buffer("table", rotary_table_2d(config), persistent=False)
        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # GPT-2: the residual sum keeps its size with depth
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers))

    def context(self, encoded: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | None = None) -> Context:
        """An encoder's output, ready for every layer; `mask` is true at its real tokens. Raises ValueError without
        cross-attention."""
        if not self.config.cross_attention:
            raise ValueError("this transformer has no cross-attention; its config says cross_attention=False.")
        both = [block.cross_attention.keys_and_values(encoded) for block in self.blocks]  # type: ignore[union-attr]
        return Context([keys for keys, _ in both], [values for _, values in both], mask)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        positions: Int[Tensor, "..."] | None = None,
        places: Places | None = None,
        context: Context | RowContexts | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states of T new tokens. With `places` they stand behind the tokens of a state; the caller then
        advances it.

        `positions`, (T,) or (B, T), by default count a sequence's tokens. `mask` (true where a query may look) replaces
        the causal one. Raises ValueError beyond max_length.
        """
        config, T = self.config, x.shape[1]
        if positions is None:
            positions = torch.arange(T, device=x.device) if places is None else places.slots
            if places is None and config.max_length < T:
                raise ValueError(f"{T} tokens exceed the limit of {config.max_length} (max_length).")
        if positions.ndim == 2:  # what fills a row up on the right needs some position too
            positions = positions.clamp(max=config.max_length - 1)
        rotation = None
        if config.positions == "learned":
            x = x + self.positions(positions)
        elif config.positions == "sinusoidal":
            x = x + self.table[positions].to(x.dtype)
        elif config.positions != "none":
            rotation = self.table[positions]  # (T, Dh/2, 2), or (B, T, Dh/2, 2) where rows have their own
            rotation = rotation[:, None] if rotation.ndim == 4 else rotation
        x = F.dropout(x, config.dropout, self.training)
        if mask is None and places is not None and config.causal:
            mask = places.mask()
        for layer, block in enumerate(self.blocks):
            if self.recomputes and self.training and places is None:
                x = checkpoint(block, x, rotation, mask, context, None, layer, use_reentrant=False)
            else:
                x = block(x, rotation, mask, context, places, layer)
        return self.norm(x)

    def extend(
        self,
        x: Float[Tensor, "R T D"],
        state: DecodeState,
        rows: Rows,
        counts: Sequence[int] | None = None,
        context: Context | RowContexts | None = None,
        *,
        ahead: Int[Tensor, " R"] | None = None,
    ) -> Float[Tensor, "R T D"]:
        """Runs T new tokens of rows of a state, of which the first `counts[i]` of row i are real (None: all), and
        advances it. A row's positions are `ahead[i]` more than the slots of its tokens. Raises ValueError beyond
        max_length, and where the state is full."""
        state.check_room(rows, x.shape[1] if counts is None else counts, self.config.max_length)
        places = Places(state, rows, x.shape[1], counts)
        positions = None if ahead is None else places.slots + ahead[:, None]  # (R, T)
        hidden = self(x, positions=positions, places=places, context=context)
        state.advance(rows, x.shape[1] if counts is None else counts)
        return hidden


def rotate(x: Float[Tensor, "B N T Dh"], rotation: Float[Tensor, "... T half 2"]) -> Float[Tensor, "B N T Dh"]:
    """Rotary positions (arXiv:2104.09864) on neighbouring channel pairs: (a, b) → (a cos − b sin, b cos + a sin)."""
    a, b = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def rotary_table(max_length: int, head_dim: int, base: float) -> Float[Tensor, "T half 2"]:
    """Cosine and sine of position · base^(−2j / head_dim) for each channel pair j."""
    angles = torch.outer(torch.arange(max_length).double(), _frequencies(head_dim, base))
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotary_table_2d(config: TransformerConfig) -> Float[Tensor, "T half 2"]:
    """The first half of the pairs turns with a cell's row, the second with its column (LlamaGen, gpt.py).

    Cells stand in raster order behind the prefix, which is not rotated at all: cosine 1, sine 0. LlamaGen's
    released weights want cosine 0 there, see `zero_prefix_rotation`.
    """
    assert config.grid is not None
    rows, columns = config.grid
    frequencies = _frequencies(config.head_dim // 2, config.rotary_base)
    by_row = torch.outer(torch.arange(rows).double(), frequencies)[:, None].expand(rows, columns, -1)
    by_column = torch.outer(torch.arange(columns).double(), frequencies)[None].expand(rows, columns, -1)
    angles = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)  # (cells, Dh/2)
    cells = torch.stack((angles.cos(), angles.sin()), dim=-1)
    prefix = torch.zeros(config.prefix_length, *cells.shape[1:], dtype=cells.dtype)
    prefix[..., 0] = 0.0 if config.zero_prefix_rotation else 1.0
    return torch.cat((prefix, cells)).float()


def _frequencies(width: int, base: float) -> Float[Tensor, " half"]:
    return base ** -(torch.arange(0, width, 2).double() / width)


def sinusoids(max_length: int, width: int) -> Float[Tensor, "T D"]:
    """Fixed positions: sines in the first half of the channels, cosines in the second (arXiv:1706.03762, §3.5)."""
    angles = torch.outer(torch.arange(max_length).double(), _frequencies(2 * math.ceil(width / 2), 10000.0))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :width].float()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

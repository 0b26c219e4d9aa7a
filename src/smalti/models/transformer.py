"""The one transformer: every model here is this file with another config.

Pre-norm blocks (norm, attention, add; norm, feed-forward, add) and one more norm at the end. What varies between
GPT-2, Llama, LlamaGen and Parti is in `TransformerConfig`: the norm, the feed-forward, the positions, grouped
key-value heads, cross-attention. Embeddings and heads are in `models.py`.

Letters: B batch, T query tokens, S key tokens, D model width, N heads, M key-value heads, Dh head width, L layers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.bounds import MAX_TABLE, check_sizes

NORMS = ("layer", "rms")
FEED_FORWARDS = ("gelu", "gelu_tanh", "relu", "tanh", "swiglu")
POSITIONS = ("learned", "sinusoidal", "rotary", "rotary_2d", "none")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and kind of a transformer. Raises ValueError where the numbers do not fit together."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    max_length: int
    """Most tokens in a sequence, the prefix included."""
    num_kv_heads: int | None = None
    """Key-value heads, each shared by num_heads / num_kv_heads query heads (arXiv:2305.13245); None: one each."""
    head_width: int | None = None
    """Channels of a head; None: d_model / num_heads."""
    norm: str = "layer"
    norm_eps: float = 1e-5
    feed_forward: str = "gelu"
    bias: bool = True
    """Biases in the linear layers."""
    positions: str = "learned"
    rotary_base: float = 10000.0
    grid: tuple[int, int] | None = None
    """Rows and columns of the picture, for 2-D rotary positions."""
    prefix_length: int = 0
    """Tokens before the picture; under 2-D rotary positions they are not rotated."""
    zero_prefix_rotation: bool = False
    """LlamaGen's released weights multiply queries and keys of the prefix by zero instead (LlamaGen issue 54)."""
    qk_norm: bool = False
    causal: bool = True
    cross_attention: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "num_layers")
        _one_of("norm", self.norm, NORMS)
        _one_of("feed_forward", self.feed_forward, FEED_FORWARDS)
        _one_of("positions", self.positions, POSITIONS)
        for name in ("num_layers", "d_model", "num_heads", "d_ff", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.head_width is None and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}.")
        if self.head_width is not None and self.head_width < 1:
            raise ValueError(
                f"head_width is {self.head_width}; it must be at least 1, or None for d_model / num_heads."
            )
        if self.num_kv_heads is not None and self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; it must be at least 1, or None for one per head.")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}.")
        if self.positions == "rotary_2d":
            self._check_2d()
        self._check_table()
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1).")

    def _check_table(self) -> None:
        """Of positions that are computed, all at once; the learned ones are weights."""
        length, width = self.max_length, self.d_model if self.positions == "sinusoidal" else self.head_dim
        if self.grid is not None:
            length = max(length, self.prefix_length + self.grid[0] * self.grid[1])
        if self.positions not in ("none", "learned") and length * width > MAX_TABLE:
            raise ValueError(
                f"the table of {self.positions} positions would have {length} rows of {width} numbers; at most "
                f"{MAX_TABLE // width} rows are possible: is max_length, or grid, right?"
            )

    def _check_2d(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"2-D rotary positions need a head width divisible by 4, not {self.head_dim}.")
        if self.grid is None:
            raise ValueError("2-D rotary positions need grid=(rows, columns).")
        if min(self.grid) < 1 or self.prefix_length < 0:
            raise ValueError(
                f"grid is {self.grid} and prefix_length {self.prefix_length}; "
                "expected at least 1 row and 1 column, and no negative prefix."
            )
        cells = self.prefix_length + self.grid[0] * self.grid[1]
        if cells < self.max_length:
            raise ValueError(
                f"max_length {self.max_length} exceeds prefix_length + the grid's cells, "
                f"{self.prefix_length} + {self.grid[0]} × {self.grid[1]} = {cells}."
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads if self.head_width is None else self.head_width

    @property
    def q_width(self) -> int:
        """Channels of all query heads together: d_model, unless `head_width` says otherwise."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


GPT = dict(norm="layer", feed_forward="gelu", bias=True, positions="learned")
LLAMA = dict(norm="rms", feed_forward="swiglu", bias=False, positions="rotary")
LLAMAGEN = LLAMA | dict(positions="rotary_2d")

PRESETS: dict[str, dict[str, Any]] = {
    # Berkeley CS294-158 (spring 2024), homework 1, question 6. 800,768 parameters with 58 positions.
    "digits": GPT | dict(num_layers=4, d_model=128, num_heads=4, d_ff=512),
    # LlamaGen (arXiv:2406.06525), autoregressive/models/gpt.py. Parameters of the class-conditional models, embeddings
    # and head (16,384 codes, 1,001 classes) included; `grid` and `prefix_length` are given with the length.
    "llamagen-b": LLAMAGEN | dict(num_layers=12, d_model=768, num_heads=12, d_ff=2048),  # 110,888,448
    "llamagen-l": LLAMAGEN | dict(num_layers=24, d_model=1024, num_heads=16, d_ff=2816),  # 342,910,976
    "llamagen-xl": LLAMAGEN | dict(num_layers=36, d_model=1280, num_heads=20, d_ff=3584),  # 774,699,520
    "llamagen-xxl": LLAMAGEN | dict(num_layers=48, d_model=1536, num_heads=24, d_ff=4096),  # 1,410,972,672
    "llamagen-xxxl": LLAMAGEN | dict(num_layers=48, d_model=2560, num_heads=40, d_ff=6912),  # 3,893,027,840
    "llamagen-1b": LLAMAGEN | dict(num_layers=22, d_model=2048, num_heads=32, d_ff=5632),  # 1,199,616,000
    "llamagen-3b": LLAMAGEN | dict(num_layers=24, d_model=3200, num_heads=32, d_ff=8704),  # 3,096,659,200
    "llamagen-7b": LLAMAGEN | dict(num_layers=32, d_model=4096, num_heads=32, d_ff=11008),  # 6,614,589,440
    # Llama (arXiv:2302.13971) in sizes for pictures from captions. Parameters with the 30,000 ids of the CC3M data
    # set's card; embeddings and head, 60,000 × d_model, are most of the small ones.
    "llama-5m": LLAMA | dict(num_layers=4, d_model=80, num_heads=5, d_ff=216),  # 5,110,480
    "llama-20m": LLAMA | dict(num_layers=8, d_model=256, num_heads=8, d_ff=704),  # 21,786,880
    "llama-60m": LLAMA | dict(num_layers=10, d_model=512, num_heads=8, d_ff=1408),  # 62,843,392
    "llama-130m": LLAMA | dict(num_layers=12, d_model=768, num_heads=12, d_ff=2048),  # 131,033,856
    "llama-350m": LLAMA | dict(num_layers=22, d_model=1024, num_heads=16, d_ff=2816),  # 344,077,312
    "llama-1b": LLAMA | dict(num_layers=18, d_model=2048, num_heads=16, d_ff=5632),  # 1,047,799,808
}


def preset_config(name: str, *, max_length: int, **changes: Any) -> TransformerConfig:
    """A preset for up to `max_length` tokens, with some fields changed. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"transformer preset {name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return TransformerConfig(max_length=max_length, **(PRESETS[name] | changes))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}.")


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
        kv_cache: KVCache | None,
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
        if kv_cache is not None:
            k, v = kv_cache.write(layer, k, v)  # (B, M, S, Dh)
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


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to an encoder's output."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.d_model, config.q_width, bias=config.bias)
        self.kv = nn.Linear(config.d_model, 2 * config.q_width, bias=config.bias)
        self.out = nn.Linear(config.q_width, config.d_model, bias=config.bias)

    def forward(
        self, x: Float[Tensor, "B T D"], context: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T D"]:
        """`mask` is true at the real tokens of the context."""
        B, T, _ = x.shape
        heads = (self.config.num_heads, self.config.head_dim)
        q = self.q(x).view(B, T, *heads).transpose(1, 2)
        k, v = self.kv(context).view(B, context.shape[1], 2, *heads).permute(2, 0, 3, 1, 4)  # (B, N, S, Dh) each
        dropout = self.config.attention_dropout if self.training else 0.0
        allowed = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
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
        context: tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"] | None] | None,
        kv_cache: KVCache | None,
        layer: int,
    ) -> Float[Tensor, "B T D"]:
        x = x + self._drop(self.attention(self.attention_norm(x), rotation, mask, kv_cache, layer))
        if context is not None:
            x = x + self._drop(self.cross_attention(self.cross_norm(x), *context))
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

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        kv_cache: KVCache | None = None,
        context: Float[Tensor, "B S D"] | None = None,
        context_mask: Bool[Tensor, "B S"] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states of T new tokens. With a cache they follow the tokens in it; the caller then advances it.

        `mask` (true where a query may look) replaces the causal one. Raises ValueError beyond max_length.
        """
        config, T = self.config, x.shape[1]
        past = 0 if kv_cache is None else kv_cache.length
        self.check_length(past + T, kv_cache)
        positions = self._positions(past, T, kv_cache, x.device)
        rotation = None
        if config.positions == "learned":
            x = x + self.positions(positions)
        elif config.positions == "sinusoidal":
            x = x + self.table[positions].to(x.dtype)
        elif config.positions != "none":
            rotation = self.table[positions]  # (T, Dh/2, 2), or (B, T, Dh/2, 2) where rows start at their own slots
            rotation = rotation[:, None] if rotation.ndim == 4 else rotation
        x = F.dropout(x, config.dropout, self.training)
        if mask is None and kv_cache is not None and config.causal:
            mask = cache_mask(past, T, kv_cache.starts, x.device)
        context_and_mask = None if context is None else (context, context_mask)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, mask, context_and_mask, kv_cache, layer)
        return self.norm(x)

    def check_length(self, num_tokens: int, kv_cache: KVCache | None) -> None:
        """Raises ValueError if there is no room for this many tokens, those in the cache included."""
        limit = self.config.max_length
        if kv_cache is not None:  # padding on the left may take slots beyond max_length, a sequence itself may not
            limit = kv_cache.max_length if kv_cache.starts is not None else min(limit, kv_cache.max_length)
        if num_tokens > limit:
            raise ValueError(f"{num_tokens} tokens exceed the limit of {limit} (max_length).")

    def _positions(
        self, past: int, num_tokens: int, kv_cache: KVCache | None, device: torch.device
    ) -> Int[Tensor, "..."]:
        """Positions of the new tokens: (T,), or (B, T) counted from each row's own start."""
        slots = torch.arange(past, past + num_tokens, device=device)
        if kv_cache is None or kv_cache.starts is None:
            return slots
        # padding before a start, and rows that are done while others go on, need some position: nobody reads them
        return (slots - kv_cache.starts[:, None]).clamp(0, self.config.max_length - 1)


def cache_mask(
    past: int, num_tokens: int, starts: Int[Tensor, " B"] | None, device: torch.device
) -> Bool[Tensor, "..."] | None:
    """Which of the `past + num_tokens` slots each new token may look at; None where plain attention is the same.

    Slots before a row's start hold padding: no real token looks there. A padded query keeps itself, so that no
    row of the softmax is empty; what it computes is never read.
    """
    if starts is None and (num_tokens == 1 or past == 0):
        return None
    queries = torch.arange(past, past + num_tokens, device=device)[:, None]
    keys = torch.arange(past + num_tokens, device=device)
    causal = keys <= queries  # (T, S)
    if starts is None:
        return causal
    real = keys >= starts[:, None, None, None]
    return (causal & real) | (keys == queries)  # (B, 1, T, S)


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

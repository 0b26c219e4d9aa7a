"""Decode steps on a CPU in a fraction of the time: the same arithmetic in fewer and cheaper operators.

A decode step of a small model is a few hundred operators of a few microseconds each, and little of that time is
arithmetic. `PackedDecoder` takes a model's place in a generation loop for the length of one job. It holds weights
transposed, which thin products read faster; products add onto the residual stream in place, and carry the scale of
the attention and the constants of GELU in their own `alpha`; one query attends to the filled part of the cache by
two batched products.

The plain path, `DecoderOnly.decode_step`, is the oracle: both agree within rounding. `make_stepper` chooses.

Letters: B batch, D model width, N heads, M key-value heads, Dh head width, S slots of the cache, n the ids of a slot.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from smalti.layout import Slot
from smalti.models import DecoderOnly
from smalti.transformer import Block, KVCache, Norm

FEWEST_STEPS = 8
"""Packing costs about what it saves in this many steps."""
MOST_COPIED_BYTES = 64 * 2**20
"""Larger models keep their weights as they are: reading those takes the time, and a copy takes memory."""


def make_stepper(model: DecoderOnly, num_steps: int) -> "DecoderOnly | PackedDecoder":
    """What a job of `num_steps` decode steps calls in the model's place; the model itself where that is best.

    The weights must not change during the job, and no gradient passes through it.
    """
    on_cpu = model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    plain_float = model.embed_tokens.weight.dtype in (torch.float32, torch.float64)
    if on_cpu and plain_float and not model.training and num_steps >= FEWEST_STEPS:
        return PackedDecoder(model)
    return model


class PackedDecoder:
    """Decodes in a model's place, through the same cache; prefill is the model's own."""

    def __init__(self, model: DecoderOnly):
        self.model, self.config, self.device = model, model.config.transformer, model.device
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.transpose = _transposed_copy if num_bytes <= MOST_COPIED_BYTES else Tensor.t
        self.layers = [_PackedBlock(block, self.transpose) for block in model.transformer.blocks]  # type: ignore[arg-type]
        self.heads: dict[Slot | None, Float[Tensor, "D n"]] = {}
        self.views: _CacheViews | None = None

    def new_cache(
        self, batch_size: int, max_length: int | None = None, starts: Int[Tensor, " B"] | None = None
    ) -> KVCache:
        return self.model.new_cache(batch_size, max_length, starts)

    def prefill(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        return self.model.prefill(token_ids, kv_cache)

    @torch.no_grad()
    def decode_step(self, token_ids: Int[Tensor, " B"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """`DecoderOnly.decode_step`, within rounding. Raises ValueError where the cache is full."""
        length = kv_cache.length
        self.model.transformer.check_length(length + 1, kv_cache)
        if self.views is None or not self.views.are_of(kv_cache):
            self.views = _CacheViews(kv_cache)
        x, rotation = self._embed(token_ids, length, kv_cache.starts)
        for index, layer in enumerate(self.layers):
            layer.attend(x, rotation, self.views, index, length)
            layer.feed_forward(x)
        kv_cache.advance(1)
        return _norm(x, self.model.transformer.norm)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "R D"], slot: Slot | None = None) -> Float[Tensor, "R n"]:
        """`DecoderOnly.logits`; a slot's part of the head is gathered and transposed at its first use."""
        if slot not in self.heads:
            weight = self.model.head_weight.detach()
            rows = weight if slot is None else torch.cat([weight[start:end] for start, end in slot.ranges])
            self.heads[slot] = self.transpose(rows)
        return torch.mm(hidden, self.heads[slot])

    def _embed(
        self, token_ids: Int[Tensor, " B"], length: int, starts: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "..."] | None]:
        """What enters the first layer, and the rotation of channel pairs at this position, cos + i sin."""
        transformer, positions = self.model.transformer, self.config.positions
        x = F.embedding(token_ids, self.model.embed_tokens.weight)
        if positions == "none":
            return x, None
        table = transformer.positions.weight if positions == "learned" else transformer.table
        if starts is None:
            here = table[length]
        else:  # padding, and a row that is done while others go on, need some position too: nobody reads them
            here = table[(length - starts).clamp(0, self.config.max_length - 1)]
        if positions in ("learned", "sinusoidal"):
            return x.add_(here), None
        rotation = torch.view_as_complex(here)  # (Dh/2,), or (B, Dh/2) where rows start at their own slots
        return x, rotation if starts is None else rotation[:, None]


class _CacheViews:
    """A cache as batched products want it: rows and heads on one axis, and what hides a row's padding."""

    def __init__(self, kv_cache: KVCache):
        self.kv_cache, self.starts = kv_cache, kv_cache.starts
        self.keys = [keys.flatten(0, 1).transpose(1, 2) for keys in kv_cache.keys]  # (B·M, Dh, S)
        self.values = [values.flatten(0, 1) for values in kv_cache.values]  # (B·M, S, Dh)
        first = kv_cache.keys[0]
        self.padding = first.new_zeros(1, 1, kv_cache.max_length)  # is added to the scores
        if self.starts is not None:
            hidden = torch.arange(kv_cache.max_length) < self.starts.repeat_interleave(first.shape[1])[:, None, None]
            self.padding = self.padding.masked_fill(hidden, torch.finfo(first.dtype).min)  # (B·M, 1, S)

    def are_of(self, kv_cache: KVCache) -> bool:
        return self.kv_cache is kv_cache and self.starts is kv_cache.starts


class _PackedBlock:
    """A block with its weights as a decode step wants them. Both halves add onto the residual stream in place."""

    def __init__(self, block: Block, transpose: Callable[[Tensor], Tensor]):
        self.block, self.config = block, block.attention.config
        config, attention, feed_forward = self.config, block.attention, block.feed_forward
        widths = (config.d_model, 2 * config.kv_heads * config.head_dim)
        q, kv = attention.qkv.weight.detach().split(widths)
        self.q, self.kv = transpose(q), transpose(kv)
        self.q_bias, self.kv_bias = _bias(attention.qkv).split(widths)
        self.out, self.out_bias = transpose(attention.out.weight.detach()), _bias(attention.out)
        self.up, self.up_bias = transpose(feed_forward.up.weight.detach()), _bias(feed_forward.up)
        self.down, self.down_bias = transpose(feed_forward.down.weight.detach()), _bias(feed_forward.down)
        # gelu(y) = y / 2 · (1 + erf(y / √2)): with z = y / √2 it is √½ · (z + z · erf z)
        self.alpha = math.sqrt(0.5) if config.feed_forward == "gelu" else 1.0
        self.up_bias = self.up_bias * self.alpha

    def attend(
        self,
        x: Float[Tensor, "B D"],
        rotation: Complex[Tensor, "..."] | None,
        views: _CacheViews,
        layer: int,
        length: int,
    ) -> None:
        """Adds the attention. The new key and value go into slot `length` of the cache."""
        config, attention, B = self.config, self.block.attention, len(x)
        normed = _norm(x, self.block.attention_norm)
        q = torch.addmm(self.q_bias, normed, self.q).view(B, config.num_heads, config.head_dim)
        kv = torch.addmm(self.kv_bias, normed, self.kv).view(B, 2, config.kv_heads, config.head_dim)
        k, v = kv.unbind(1)
        if config.qk_norm:
            q, k = _norm(q, attention.q_norm), _norm(k, attention.k_norm)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        views.kv_cache.keys[layer].select(2, length).copy_(k)
        views.kv_cache.values[layer].select(2, length).copy_(v)
        q = q.view(B * config.kv_heads, -1, config.head_dim)  # the query heads of one key-value head together
        filled = length + 1
        scores = torch.baddbmm(
            views.padding[:, :, :filled], q, views.keys[layer][:, :, :filled], alpha=config.head_dim**-0.5
        )
        attended = torch.bmm(scores.softmax(-1), views.values[layer][:, :filled])
        x.add_(self.out_bias).addmm_(attended.view(B, -1), self.out)

    def feed_forward(self, x: Float[Tensor, "B D"]) -> None:
        """Adds the feed-forward."""
        wide = torch.addmm(self.up_bias, _norm(x, self.block.feed_forward_norm), self.up, alpha=self.alpha)
        kind = self.config.feed_forward
        if kind == "gelu":
            wide = torch.addcmul(wide, wide, wide.erf())  # a third of the time of F.gelu on one row
        elif kind == "gelu_tanh":
            wide = F.gelu(wide, approximate="tanh")
        elif kind == "swiglu":
            gate, wide = wide.chunk(2, dim=-1)
            wide = F.silu(gate).mul_(wide)
        else:
            wide = wide.relu_() if kind == "relu" else wide.tanh_()
        x.add_(self.down_bias).addmm_(wide, self.down, alpha=self.alpha)


def _transposed_copy(weight: Float[Tensor, "i o"]) -> Float[Tensor, "o i"]:
    return weight.t().contiguous()


def _bias(linear: nn.Linear) -> Float[Tensor, " o"]:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def _norm(x: Float[Tensor, "... D"], norm: Norm) -> Float[Tensor, "... D"]:
    """`Norm.forward` without the module call."""
    if norm.kind == "layer":
        return torch.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return norm.forward(x)


def _rotate(x: Float[Tensor, "B N Dh"], rotation: Complex[Tensor, "..."]) -> Float[Tensor, "B N Dh"]:
    """`transformer.rotate` of one token: neighbouring channels are a complex number, and turning is a product."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

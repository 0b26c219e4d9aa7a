"""Decode steps on a CPU in half the time: the same arithmetic in fewer and cheaper operators.

A decode step of a small model is some two hundred operators of a few microseconds each, and little of that time is
arithmetic. `FastDecoder` takes a model's place in a generation loop for the length of one job. Nothing is looked up
or checked twice; products add onto the residual stream in place and carry the scale of the attention and the constants
of GELU in their own `alpha`; one query attends to the filled part of the cache by two batched products.

The plain path, `DecoderOnly.decode_step`, is the oracle: both agree within rounding. `make_stepper` chooses.

Letters: B batch, D model width, N heads, M key-value heads, Dh head width, S slots of the cache, n the ids of a slot.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from smalti.layout import Slot
from smalti.models import DecoderOnly
from smalti.native.decode import NativeDecoder, load
from smalti.transformer import Block, KVCache, Norm, at_least_float32

FEWEST_STEPS = 2
"""Tokens to generate from which a `FastDecoder` pays: the first comes from the prefill."""
STEPS_BEFORE_COMPILING = 2000
"""Steps a process takes before it compiles the native library: about as long as that takes, so that never more than
twice the time is spent that would have been best."""
MOST_PACKED_BYTES = 2**30
"""Larger models are not copied."""

Stepper: TypeAlias = "DecoderOnly | FastDecoder | NativeDecoder"

_steps_taken = 0  # in this process, without the native library


def make_stepper(model: DecoderOnly, num_steps: int) -> Stepper:
    """What generates `num_steps` tokens in the model's place; the model itself where that is best.

    The weights must not change during the job, and no gradient passes through it.
    """
    on_cpu = model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    if not on_cpu or model.training or num_steps < FEWEST_STEPS or not dtypes <= {torch.float32, torch.float64}:
        return model
    if dtypes == {torch.float32} and 4 * model.num_parameters <= MOST_PACKED_BYTES:
        global _steps_taken
        library = load(build=_steps_taken >= STEPS_BEFORE_COMPILING)
        if library is not None:
            return NativeDecoder(library, model)
        _steps_taken += num_steps
    return FastDecoder(model)


class FastDecoder:
    """Decodes in a model's place, through the same cache; prefill is the model's own."""

    def __init__(self, model: DecoderOnly):
        self.model, self.config, self.device = model, model.config.transformer, model.device
        self.embedding = model.embed_tokens.weight.detach()
        self.blocks = [_FastBlock(block) for block in model.transformer.blocks]  # type: ignore[arg-type]
        self.norm = _norm_function(model.transformer.norm)
        self.heads: dict[Slot | None, Float[Tensor, "D n"]] = {}
        self.views: _CacheViews | None = None

    def prefill(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        return self.model.prefill(token_ids, kv_cache)

    def decode_step(self, token_ids: Int[Tensor, " B"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """`DecoderOnly.decode_step`, within rounding. Raises ValueError where the cache is full."""
        length = kv_cache.length
        self.model.transformer.check_length(length + 1, kv_cache)
        if self.views is None or not self.views.are_of(kv_cache):
            self.views = _CacheViews(kv_cache)
        x, rotation = self._embed(token_ids, length, kv_cache.starts)
        mask = self.views.mask[:, :, : length + 1]
        for block, views in zip(self.blocks, self.views.layers, strict=True):
            block.attend(x, rotation, views, mask, length)
            block.feed_forward(x)
        kv_cache.advance(1)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "R D"], slot: Slot | None = None) -> Float[Tensor, "R n"]:
        """`DecoderOnly.logits`; what several ranges of ids take of the head is gathered once."""
        if slot not in self.heads:
            weight = self.model.head_weight.detach()
            pieces = [weight] if slot is None else [weight[start:end] for start, end in slot.ranges]
            self.heads[slot] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).t()
        return torch.mm(hidden, self.heads[slot])

    def _embed(
        self, token_ids: Int[Tensor, " B"], length: int, starts: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "..."] | None]:
        """What enters the first block, and the rotation of channel pairs at this position, cos + i sin."""
        transformer, positions = self.model.transformer, self.config.positions
        x = F.embedding(token_ids, self.embedding)
        if positions == "none":
            return x, None
        table = transformer.positions.weight.detach() if positions == "learned" else transformer.table
        if starts is None:
            here = table[length]
        else:  # padding, and a row that is done while others go on, need some position too: nobody reads them
            here = table[(length - starts).clamp(0, self.config.max_length - 1)]
        if positions in ("learned", "sinusoidal"):
            return x.add_(here), None
        rotation = torch.view_as_complex(here)  # (Dh/2,), or (B, Dh/2) where rows start at their own slots
        return x, rotation if starts is None else rotation[:, None]


class _LayerViews(NamedTuple):
    """Keys and values of one layer, as they are written and as batched products read them: B and M on one axis."""

    keys: Float[Tensor, "B M max_length Dh"]
    values: Float[Tensor, "B M max_length Dh"]
    joint_keys: Float[Tensor, "BM Dh max_length"]
    joint_values: Float[Tensor, "BM max_length Dh"]


class _CacheViews:
    """The layers of a cache, and what hides the padding of its rows."""

    def __init__(self, kv_cache: KVCache):
        self.kv_cache, self.starts = kv_cache, kv_cache.starts
        self.layers = [
            _LayerViews(keys, values, keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1))
            for keys, values in zip(kv_cache.keys, kv_cache.values, strict=True)
        ]
        first = kv_cache.keys[0]
        self.mask = first.new_zeros(1, 1, kv_cache.max_length)  # is added to the scores
        if self.starts is not None:
            padding = torch.arange(kv_cache.max_length) < self.starts.repeat_interleave(first.shape[1])[:, None, None]
            self.mask = self.mask.masked_fill(padding, torch.finfo(first.dtype).min)  # (B·M, 1, S)

    def are_of(self, kv_cache: KVCache) -> bool:
        return self.kv_cache is kv_cache and self.starts is kv_cache.starts


class _FastBlock:
    """A block, ready for decode steps. Both its halves add onto the residual stream in place."""

    def __init__(self, block: Block):
        attention, feed_forward, config = block.attention, block.feed_forward, block.attention.config
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.scale, self.kind = config.head_dim**-0.5, config.feed_forward
        self.attention_norm, self.feed_forward_norm = map(
            _norm_function, (block.attention_norm, block.feed_forward_norm)
        )
        self.q_norm, self.k_norm = (
            (_norm_function(attention.q_norm), _norm_function(attention.k_norm)) if config.qk_norm else (None, None)
        )
        linears = (attention.qkv, attention.out, feed_forward.up, feed_forward.down)
        self.qkv, self.out, self.up, self.down = (linear.weight.detach().t() for linear in linears)
        self.qkv_bias, self.out_bias, self.up_bias, self.down_bias = map(_bias, linears)
        # gelu(y) = y / 2 · (1 + erf(y / √2)): with z = y / √2 it is √½ · (z + z · erf z)
        self.alpha = math.sqrt(0.5) if self.kind == "gelu" else 1.0
        self.up_bias = self.up_bias * self.alpha

    def attend(
        self,
        x: Float[Tensor, "B D"],
        rotation: Complex[Tensor, "..."] | None,
        views: _LayerViews,
        mask: Float[Tensor, "#BM 1 S"],
        length: int,
    ) -> None:
        """Adds the attention. The new key and value go into slot `length` of the cache, S = length + 1."""
        B = len(x)
        qkv = torch.addmm(self.qkv_bias, self.attention_norm(x), self.qkv)
        heads = qkv.view(B, -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotated(q, rotation), _rotated(k, rotation)
        views.keys[:, :, length] = k
        views.values[:, :, length] = v
        q = q.reshape(B * self.kv_heads, -1, self.head_dim)  # the query heads of one key-value head together
        scores = torch.baddbmm(mask, q, views.joint_keys[:, :, : length + 1], alpha=self.scale)
        attended = torch.bmm(scores.softmax(-1), views.joint_values[:, : length + 1])
        x.add_(self.out_bias).addmm_(attended.view(B, -1), self.out)

    def feed_forward(self, x: Float[Tensor, "B D"]) -> None:
        """Adds the feed-forward."""
        wide = torch.addmm(self.up_bias, self.feed_forward_norm(x), self.up, alpha=self.alpha)
        if self.kind == "gelu":
            wide = torch.addcmul(wide, wide, wide.erf())  # a third of the time of F.gelu on one row
        elif self.kind == "gelu_tanh":
            wide = F.gelu(wide, approximate="tanh")
        elif self.kind == "swiglu":
            gate, wide = wide.chunk(2, dim=-1)
            wide = F.silu(gate).mul_(wide)
        else:
            wide = wide.relu_() if self.kind == "relu" else wide.tanh_()
        x.add_(self.down_bias).addmm_(wide, self.down, alpha=self.alpha)


def _bias(linear: nn.Linear) -> Float[Tensor, " o"]:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def _norm_function(norm: Norm) -> Callable[[Tensor], Tensor]:
    """`Norm.forward` without looking anything up."""
    weight, eps = norm.weight.detach(), norm.eps
    if norm.bias is not None:
        shape, bias = list(weight.shape), norm.bias.detach()
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x: F.rms_norm(at_least_float32(x), x.shape[-1:], eps=eps).to(x.dtype) * weight


def _rotated(x: Float[Tensor, "B N Dh"], rotation: Complex[Tensor, "..."]) -> Float[Tensor, "B N Dh"]:
    """`transformer.rotate` of one token: neighbouring channels are a complex number, and turning is a product."""
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

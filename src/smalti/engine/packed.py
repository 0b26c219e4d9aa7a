"""Decode steps on a CPU in half the time, with torch alone: the same arithmetic in fewer and cheaper operators.

A decode step of a small model is some two hundred operators of a few microseconds each, and little of that time is
arithmetic. `FastDecoder` takes a model's place in a generation loop for the length of one job. Nothing is looked up
or checked twice; products add onto the residual stream in place and carry the scale of the attention and the constants
of GELU in their own `alpha`.

What a row computes is the same to the last bit whatever rows stand beside it, and on any number of threads:

- A row's first token is in slot 0 of its part of the cache, however much padding its prefix has in the batch; a query
  attends to whole steps of slots, so that its sums have one order. Empty slots add exact zeros.
- A library's product may sum in another order for other numbers of rows: rows come in steps that `product_rows` has
  found to agree, and those that are missing are filled up. Where threads change a sum, one thread computes it.
- What a vector of the processor holds last, and a scalar routine would compute instead, is filled up too.

The plain path, `DecoderOnly.decode_step`, is the oracle: both agree within rounding. `make_stepper` chooses.

Letters: B batch, T tokens, Q queries at once, R rows (B·T filled up), D model width, N heads, M key-value heads,
G = N / M, Dh head width, S slots of the cache, n rows of the head.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.engine.native import NativeDecoder, load
from smalti.errors import InputError
from smalti.models.decode_state import SLOT_BLOCK, KVCache
from smalti.models.decoder_only import DecoderOnly
from smalti.models.transformer import Block, Norm
from smalti.sequences.layout import Slot

EXECUTORS = ("native", "packed", "eager")
"""What generates: `NativeDecoder`, `FastDecoder`, or the model itself. They agree within rounding, so that a draw may
rarely differ between two of them; with one of them, the same seed gives the same tokens."""
FEWEST_STEPS = 1
"""Shorter jobs are left to the model itself: none. Tests raise it to have the oracle generate."""
STEPS_THAT_REPAY_COMPILING = 1000
"""Decode steps of one job from which the native library is compiled for it: they take about as long without."""
MOST_PACKED_BYTES = 2**30
"""Larger models are not copied."""
MOST_ROWS = 64
"""Rows of one product."""
QUERIES = 8
"""Tokens of a row that attend at once in a prefill."""
LANES = 32
"""Floats that torch's kernels take at once, at the most."""
GRAIN = 2**15
"""Numbers that torch's elementwise kernels leave to one thread."""

Stepper: TypeAlias = "DecoderOnly | FastDecoder | NativeDecoder"


def choose_executor(model: DecoderOnly, num_steps: int) -> str:
    """Which of `EXECUTORS` a job of so many decode steps runs on.

    It depends on the model, the length of the job, SMALTI_NATIVE, and whether the native library is there or can be
    compiled; never on what the process did before. A job asks once, so that all its batches take one path.
    """
    on_cpu = model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    dtypes = _dtypes(model)
    if not on_cpu or model.training or num_steps < FEWEST_STEPS or not dtypes <= {torch.float32, torch.float64}:
        return "eager"
    packs = dtypes == {torch.float32} and 4 * model.num_parameters <= MOST_PACKED_BYTES
    return "native" if packs and load(build=num_steps >= STEPS_THAT_REPAY_COMPILING) is not None else "packed"


def make_stepper(model: DecoderOnly, num_steps: int, executor: str | None = None) -> Stepper:
    """What generates in the model's place; the model itself where that is best. `executor` names it, else it is chosen.

    The weights must not change during the job, and no gradient passes through it. Raises InputError if the executor is
    missing here.
    """
    executor = choose_executor(model, num_steps) if executor is None else executor
    if executor == "native":
        library = load()
        if library is None or _dtypes(model) != {torch.float32} or model.device.type != "cpu":
            raise InputError(MISSING_NATIVE)
        return NativeDecoder(library, model)
    if executor not in EXECUTORS:
        raise InputError(f"executor {executor!r} is unknown; there are {', '.join(EXECUTORS)}.")
    return FastDecoder(model) if executor == "packed" else model


MISSING_NATIVE = (
    "the native decoder is missing here: it needs a C++ compiler, float32 on a CPU, and SMALTI_NATIVE other than 0."
)


def _dtypes(model: DecoderOnly) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}


class FastDecoder:
    """Prefills and decodes in a model's place, in a cache that it alone has written."""

    def __init__(self, model: DecoderOnly):
        self.model, self.config, self.device = model, model.config.transformer, model.device
        self.embedding = model.embed_tokens.weight.detach()
        self.blocks = [_FastBlock(block) for block in model.transformer.blocks]  # type: ignore[arg-type]
        self.norm = _norm_function(model.transformer.norm)
        self.heads: dict[Slot | None, Float[Tensor, "D n"]] = {}
        self.views: _CacheViews | None = None
        self.positions = _position_table(model)
        shapes = {tuple(product.weight.shape) for block in self.blocks for product in block.products}
        self.rows = _rows_of(shapes, self.embedding.dtype)
        self.one_thread = not self._threads_agree(shapes)

    def prefill(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """`DecoderOnly.prefill`, within rounding. Raises ValueError where the cache has no room."""
        B, T = token_ids.shape
        length, starts = kv_cache.length, kv_cache.starts
        last: int | Int[Tensor, " B"] = T - 1
        if starts is not None:  # the padding on the left goes to the right
            skipped = (starts - length).clamp(min=0)
            last = (T - 1 - skipped).clamp(min=0)
            token_ids = token_ids.gather(1, (torch.arange(T) + skipped[:, None]).clamp(max=T - 1))
        with self._threads():
            x = self._run(token_ids, kv_cache)
            return self.norm(x[torch.arange(B) * T + last])

    def decode_step(self, token_ids: Int[Tensor, " B"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """`DecoderOnly.decode_step`, within rounding. Raises ValueError where the cache is full."""
        with self._threads():
            return self.norm(self._run(token_ids[:, None], kv_cache)[: len(token_ids)])

    def logits(self, hidden: Float[Tensor, "n D"], slot: Slot | None = None) -> Float[Tensor, "n ids"]:
        """`DecoderOnly.logits`; what several ranges of ids take of the head is gathered once."""
        if slot not in self.heads:
            weight = self.model.head_weight.detach()
            pieces = [weight] if slot is None else [weight[start:end] for start, end in slot.ranges]
            self.heads[slot] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).t()
        head, num_rows = self.heads[slot], len(hidden)
        rows = product_rows(*head.shape, head.dtype)
        agree = threads_agree(*head.shape, head.dtype, torch.get_num_threads())
        with nullcontext() if agree else one_thread():
            if missing := _filled_up(num_rows, rows.step) - num_rows:
                hidden = F.pad(hidden, (0, 0, 0, missing))
            if len(hidden) <= rows.most:
                return torch.mm(hidden, head)[:num_rows]
            return torch.cat([torch.mm(part, head) for part in hidden.split(rows.most)])[:num_rows]

    def _run(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache) -> Float[Tensor, "R D"]:
        """The residual stream behind the last block."""
        B, T = token_ids.shape
        self.model.transformer.check_length(kv_cache.length + T, kv_cache)
        if self.views is None or not self.views.are_of(kv_cache):
            self.views = _CacheViews(kv_cache)
        where = _Where(self.views, kv_cache, B, T, self.config.num_heads // self.config.kv_heads)
        x, rotation = self._embed(token_ids, where)
        for block, views in zip(self.blocks, self.views.layers, strict=True):
            block.attend(x, rotation, views, where, self.rows.most)
            block.feed_forward(x, self.rows.most)
        kv_cache.advance(T)
        return x

    def _embed(
        self, token_ids: Int[Tensor, "B T"], where: "_Where"
    ) -> tuple[Float[Tensor, "R D"], tuple[Tensor, Tensor] | None]:
        """What enters the first block, and the rotation of each channel at the tokens' positions, cosine and sine."""
        B, T = token_ids.shape
        missing = _filled_up(B * T, self.rows.step) - B * T
        x = F.embedding(F.pad(token_ids.reshape(-1), (0, missing)), self.embedding)
        if self.positions is None:
            return x, None
        here = where.positions
        if not isinstance(here, int):  # padding, and a row that is done while others go on, need some position too
            here = here.clamp(max=self.config.max_length - 1)
        if len(self.positions) == 1:
            x[: B * T].view(B, T, -1).add_(self.positions[0][here])
            return x, None
        cosine, sine = (table[here].unsqueeze(-2) for table in self.positions)
        return x, (cosine, sine)

    def _threads_agree(self, shapes: set[tuple[int, ...]]) -> bool:
        threads, config = torch.get_num_threads(), self.config
        dtype = self.embedding.dtype
        agree = all(threads_agree(*shape, dtype, threads) for shape in shapes)
        return agree and attention_agrees(config.kv_heads, config.num_heads, config.head_dim, dtype, threads)

    def _threads(self):
        return one_thread() if self.one_thread else nullcontext()


class _LayerViews(NamedTuple):
    """Keys and values of one layer, as they are written and as batched products read them: B and M on one axis."""

    both: Float[Tensor, "2 B M S Dh"]
    joint_keys: Float[Tensor, "BM Dh S"]
    joint_values: Float[Tensor, "BM S Dh"]


class _CacheViews:
    """The layers of a cache, and what hides slots that are still to come."""

    def __init__(self, kv_cache: KVCache):
        self.kv_cache, self.starts = kv_cache, kv_cache.starts
        self.layers = [
            _LayerViews(both, both[0].flatten(0, 1).transpose(1, 2), both[1].flatten(0, 1)) for both in kv_cache.both
        ]
        first = kv_cache.keys[0]
        self.num_slots = first.shape[2]
        # Zeros and then what hides, as long each: a window that starts early enough hides what is behind a position.
        self.edge = first.new_zeros(2 * self.num_slots)
        self.edge[self.num_slots :] = torch.finfo(first.dtype).min

    def are_of(self, kv_cache: KVCache) -> bool:
        return self.kv_cache is kv_cache and self.starts is kv_cache.starts

    def mask(self, positions: int | Int[Tensor, "..."], width: int) -> Float[Tensor, "... S"]:
        """What is added to the scores of queries at the positions, for the first `width` slots."""
        first = self.num_slots - 1 - positions
        if isinstance(first, int):
            return self.edge[first : first + width]
        return self.edge.unfold(0, width, 1)[first.clamp(min=0)]


class _Where:
    """Where the new tokens of a batch stand: their positions, the slots they are written to, and what they see."""

    def __init__(self, views: _CacheViews, kv_cache: KVCache, B: int, T: int, group: int):
        self.B, self.T = B, T
        length, starts, M = kv_cache.length, kv_cache.starts, kv_cache.keys[0].shape[1]
        self.width = _filled_up(length + T, slot_step(kv_cache.keys[0].shape[3], kv_cache.keys[0].dtype))
        self.begin: int | Int[Tensor, " B"] = length
        if starts is not None and length:
            self.begin = (length - starts).clamp(min=0)
        same = isinstance(self.begin, int)
        if T == 1:
            self.positions = self.begin if same else self.begin[:, None]  # type: ignore[index]
            mask = views.mask(self.begin, self.width)
            self.masks = [mask.view(1, 1, -1) if same else mask.repeat_interleave(M, 0)[:, None]]
        else:
            self.positions = torch.arange(T) + (self.begin if same else self.begin[:, None])  # type: ignore[index]
            mask = views.mask(self.positions, self.width)  # (…, T, S)
            mask = F.pad(mask, (0, 0, 0, _filled_up(T, QUERIES) - T)).repeat_interleave(group, -2)
            mask = mask[None] if same else mask.repeat_interleave(M, 0)
            self.masks = list(mask.split(QUERIES * group, -2))
        self.rows = self.slots = None
        if not same:
            self.rows = torch.arange(B)[:, None]
            self.slots = self.begin[:, None] + torch.arange(T)  # type: ignore[index]

    def write(self, cache: Float[Tensor, "2 B M S Dh"], new: Float[Tensor, "B T KM Dh"]) -> None:
        """Keys, and behind them values, into the cache of a layer."""
        new = new.unflatten(2, (2, -1))  # (B, T, 2, M, Dh)
        if self.slots is None:
            cache[:, :, :, self.begin : self.begin + self.T] = new.permute(2, 0, 3, 1, 4)
        else:
            cache.permute(1, 3, 0, 2, 4)[self.rows, self.slots] = new


class _Product:
    """x W + b. The inputs of the weight, or its outputs, may be filled up with zeros."""

    def __init__(self, linear: nn.Linear, *, fill_inputs: bool = False, fill_outputs: int = 0):
        weight = linear.weight.detach()  # (outputs, inputs)
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        if fill_outputs:  # each of so many parts by itself
            missing = -len(weight) // fill_outputs % LANES
            if missing:
                weight = torch.cat([F.pad(part, (0, 0, 0, missing)) for part in weight.chunk(fill_outputs)])
                bias = torch.cat([F.pad(part, (0, missing)) for part in bias.chunk(fill_outputs)])
        if fill_inputs and weight.shape[1] % LANES:
            weight = F.pad(weight, (0, -weight.shape[1] % LANES))
        self.weight, self.bias = weight.contiguous().t(), bias

    def __call__(self, x: Float[Tensor, "R i"], most: int, alpha: float = 1.0) -> Float[Tensor, "R o"]:
        if len(x) <= most:
            return torch.addmm(self.bias, x, self.weight, alpha=alpha)
        return torch.cat([torch.addmm(self.bias, part, self.weight, alpha=alpha) for part in x.split(most)])

    def add_to(self, x: Float[Tensor, "R o"], y: Float[Tensor, "R i"], most: int, alpha: float = 1.0) -> None:
        x.add_(self.bias)
        if len(x) <= most:
            x.addmm_(y, self.weight, alpha=alpha)
            return
        for part, new in zip(x.split(most), y.split(most), strict=True):
            part.addmm_(new, self.weight, alpha=alpha)


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
        self.qkv, self.out = _Product(attention.qkv), _Product(attention.out)
        self.up = _Product(feed_forward.up, fill_outputs=2 if self.kind == "swiglu" else 1)
        self.down = _Product(feed_forward.down, fill_inputs=True)
        self.products = (self.qkv, self.out, self.up, self.down)
        # gelu(y) = y / 2 · (1 + erf(y / √2)): with z = y / √2 it is √½ · (z + z · erf z)
        self.alpha = math.sqrt(0.5) if self.kind == "gelu" else 1.0
        self.up.bias = self.up.bias * self.alpha

    def attend(
        self,
        x: Float[Tensor, "R D"],
        rotation: tuple[Tensor, Tensor] | None,
        views: _LayerViews,
        where: _Where,
        most: int,
    ) -> None:
        """Adds the attention. The new keys and values go into the cache first."""
        B, T = where.B, where.T
        qkv = self.qkv(self.attention_norm(x), most)
        heads = qkv[: B * T].view(B, T, -1, self.head_dim)
        q, new = heads[:, :, : self.num_heads], heads[:, :, self.num_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            new = torch.cat((self.k_norm(new[:, :, : self.kv_heads]), new[:, :, self.kv_heads :]), 2)
            q = self.q_norm(q)
        if rotation is not None:
            new = torch.cat((_rotated(new[:, :, : self.kv_heads], *rotation), new[:, :, self.kv_heads :]), 2)
            q = _rotated(q, *rotation)
        where.write(views.both, new)
        if T == 1:
            q = q.reshape(B * self.kv_heads, -1, self.head_dim)  # the query heads of one key-value head together
            attended = self._attended(q, views, where.masks[0]).view(B, -1)
        else:
            q = q.unflatten(2, (self.kv_heads, -1)).transpose(1, 2)  # (B, M, T, G, Dh)
            q = F.pad(q, (0, 0, 0, 0, 0, _filled_up(T, QUERIES) - T)).reshape(B * self.kv_heads, -1, self.head_dim)
            queries = q.split(where.masks[0].shape[1], dim=1)
            parts = [self._attended(*part) for part in zip(queries, [views] * len(queries), where.masks, strict=True)]
            attended = torch.cat(parts, 1).view(B, self.kv_heads, _filled_up(T, QUERIES), -1)[:, :, :T]
            attended = attended.transpose(1, 2).reshape(B * T, -1)
        if len(x) != len(attended):  # the rows that fill up
            attended = F.pad(attended, (0, 0, 0, len(x) - len(attended)))
        self.out.add_to(x, attended, most)

    def _attended(
        self, q: Float[Tensor, "BM Q Dh"], views: _LayerViews, mask: Float[Tensor, "#BM Q S"]
    ) -> Float[Tensor, "BM Q Dh"]:
        """Block by block of the slots. Slots still to come add exact zeros."""
        width = mask.shape[-1]
        blocks = [slice(start, min(start + SLOT_BLOCK, width)) for start in range(0, width, SLOT_BLOCK)]
        scores = [
            torch.baddbmm(mask[:, :, block], q, views.joint_keys[:, :, block], alpha=self.scale) for block in blocks
        ]
        if len(blocks) == 1:
            return torch.bmm(scores[0].softmax(-1), views.joint_values[:, :width])
        weights = torch.cat(scores, -1).softmax(-1)
        attended = torch.bmm(weights[:, :, :SLOT_BLOCK], views.joint_values[:, :SLOT_BLOCK])
        for block in blocks[1:]:
            attended += torch.bmm(weights[:, :, block], views.joint_values[:, block])
        return attended

    def feed_forward(self, x: Float[Tensor, "R D"], most: int) -> None:
        """Adds the feed-forward."""
        wide = self.up(self.feed_forward_norm(x), most, self.alpha)
        at_once = max(1, GRAIN // wide.shape[1])
        if len(wide) <= at_once:
            wide = self._activated(wide)
        else:  # torch would share the numbers out among threads at odd places
            wide = torch.cat([self._activated(part) for part in wide.split(at_once)])
        self.down.add_to(x, wide, most, self.alpha)

    def _activated(self, wide: Float[Tensor, "R F"]) -> Float[Tensor, "R f"]:
        if self.kind == "gelu":
            return torch.addcmul(wide, wide, wide.erf())  # a third of the time of F.gelu on one row
        if self.kind == "gelu_tanh":
            return F.gelu(wide, approximate="tanh")
        if self.kind == "swiglu":
            gate, wide = wide.chunk(2, dim=-1)
            return F.silu(gate).mul_(wide)
        return wide.relu_() if self.kind == "relu" else wide.tanh_()


def _norm_function(norm: Norm) -> Callable[[Tensor], Tensor]:
    """`Norm.forward` without looking anything up."""
    weight, eps = norm.weight.detach(), norm.eps
    if norm.bias is not None:
        shape, bias = list(weight.shape), norm.bias.detach()
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x: F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def _position_table(model: DecoderOnly) -> tuple[Tensor, ...] | None:
    """What is added at each position, or the cosine and the signed sine by which each channel is turned."""
    positions = model.config.transformer.positions
    if positions == "none":
        return None
    if positions == "learned":
        return (model.transformer.positions.weight.detach(),)
    table: Tensor = model.transformer.table
    if positions == "sinusoidal":
        return (table.to(model.embed_tokens.weight.dtype),)
    cosine, sine = table.unbind(-1)
    return cosine.repeat_interleave(2, -1), torch.stack((-sine, sine), -1).flatten(-2)


def _rotated(x: Float[Tensor, "B T N Dh"], cosine: Tensor, sine: Tensor) -> Float[Tensor, "B T N Dh"]:
    """`transformer.rotate`: (a, b) → (a cos − b sin, b cos + a sin), every product and sum rounded by itself."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cosine).add_(swapped.mul_(sine))


# ---- products whose rows do not depend on how many there are ----


class ProductRows(NamedTuple):
    """A product's rows do not depend on their number where it is a multiple of `step`, `most` at the most."""

    step: int
    most: int


ROW_BY_ROW = ProductRows(1, 1)
"""What holds for any library."""


@cache
def product_rows(inputs: int, outputs: int, dtype: torch.dtype) -> ProductRows:
    """Found by trying: numbers of rows, and places of a row, for which the library rounds alike on one thread.

    The order of a sum does not depend on the numbers, so that one product of random ones tells.
    """
    with one_thread():
        x, weight, addend = _random_product(inputs, outputs, dtype)
        whole = torch.addmm(addend, x, weight), torch.mm(x, weight)
        shifted = torch.addmm(addend.roll(1, 0), x.roll(1, 0), weight), torch.mm(x.roll(1, 0), weight)
        if not all(torch.equal(one.roll(1, 0), other) for one, other in zip(whole, shifted, strict=True)):
            return ROW_BY_ROW
        for step in (1, 4, 8, 16, 32):
            if _agree(x, weight, addend, whole, step):
                return ProductRows(step, MOST_ROWS)
    return ProductRows(MOST_ROWS, MOST_ROWS)


@cache
def threads_agree(inputs: int, outputs: int, dtype: torch.dtype, num_threads: int) -> bool:
    """Whether so many threads, the number now in use, round as one does."""
    if num_threads == 1:
        return True
    step, most = product_rows(inputs, outputs, dtype)
    x, weight, addend = _random_product(inputs, outputs, dtype)
    x, addend = x[:most], addend[:most]
    with one_thread():
        whole = torch.addmm(addend, x, weight), torch.mm(x, weight)
    return _agree(x, weight, addend, whole, step)


@cache
def attention_agrees(kv_heads: int, num_heads: int, head_dim: int, dtype: torch.dtype, num_threads: int) -> bool:
    """Whether the batched products of attention do not depend on how many there are, on the threads now in use."""
    generator = torch.Generator().manual_seed(0)
    B, group = 16, num_heads // kv_heads
    keys = torch.randn(B * kv_heads, SLOT_BLOCK, head_dim, generator=generator, dtype=dtype)

    def attend(q: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        keys_here = keys[: num_rows * kv_heads]
        scores = torch.baddbmm(q.new_zeros(1, 1, SLOT_BLOCK), q, keys_here.transpose(1, 2), alpha=0.3)
        return scores, torch.bmm(scores, keys_here)

    for queries in (group, QUERIES * group):
        q = torch.randn(B * kv_heads, queries, head_dim, generator=generator, dtype=dtype)
        with one_thread():
            whole = attend(q, B)
        for num_rows in (1, 2, 3, 4, 7, 8, B):
            found = attend(q[: num_rows * kv_heads], num_rows)
            if not all(torch.equal(a, b[: len(a)]) for a, b in zip(found, whole, strict=True)):
                return False
    return True


@cache
def slot_step(head_dim: int, dtype: torch.dtype) -> int:
    """Slots that attention is rounded up to: 16, if a sum over them is that over a whole block whose other slots add
    zeros, else a block."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, QUERIES, head_dim, generator=generator, dtype=dtype)
    keys = torch.randn(4, SLOT_BLOCK, head_dim, generator=generator, dtype=dtype)
    step = 16
    for width in range(step, SLOT_BLOCK, step):
        for length, queries in product((1, width - step + 1, width), (1, QUERIES)):
            mask = q.new_zeros(1, 1, SLOT_BLOCK)
            mask[:, :, length:] = torch.finfo(dtype).min
            found = [
                torch.bmm(
                    torch.baddbmm(mask[:, :, :w], q[:, :queries], keys[:, :w].transpose(1, 2), alpha=0.3).softmax(-1),
                    keys[:, :w],
                )
                for w in (width, SLOT_BLOCK)
            ]
            if not torch.equal(*found):
                return SLOT_BLOCK
    return step


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators on one thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows_of(shapes: set[tuple[int, ...]], dtype: torch.dtype) -> ProductRows:
    """What holds for products of all the shapes."""
    found = [product_rows(*shape, dtype) for shape in sorted(shapes)]
    return ROW_BY_ROW if ROW_BY_ROW in found else ProductRows(max(rows.step for rows in found), MOST_ROWS)


def _random_product(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (MOST_ROWS, inputs), (outputs, inputs), (MOST_ROWS, outputs)
    x, weight, addend = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, weight.t(), addend


def _agree(x: Tensor, weight: Tensor, addend: Tensor, whole: tuple[Tensor, Tensor], step: int) -> bool:
    """Whether every multiple of `step` rows, from the first on and up to the last, gives the rows of the whole."""
    for num_rows in range(step, len(x) + 1, step):
        for rows in (slice(num_rows), slice(len(x) - num_rows, None)):
            found = torch.addmm(addend[rows], x[rows], weight), torch.mm(x[rows], weight)
            if not all(torch.equal(one, other[rows]) for one, other in zip(found, whole, strict=True)):
                return False
    return True


def _filled_up(number: int, step: int) -> int:
    return -(-number // step) * step

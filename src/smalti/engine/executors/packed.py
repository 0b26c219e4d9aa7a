"""Decode steps on a CPU in half the time, with torch alone: the same arithmetic in fewer and cheaper operators.

A decode step of a small model is some two hundred operators of a few microseconds each, and little of that time is
arithmetic. Here nothing is looked up or checked twice; products add onto the residual stream in place and carry the
scale of the attention and the constants of GELU in their own `alpha`.

What a row computes is the same to the last bit whatever rows stand beside it, and on any number of threads:

- A query attends to whole steps of slots, so that its sums have one order. Slots still to come add exact zeros.
- A library's product may sum in another order for other numbers of rows: rows come in steps that `product_rows` has
  found to agree, and those that are missing are filled up. Where threads change a sum, one thread computes it.
- What a vector of the processor holds last, and a scalar routine would compute instead, is filled up too.

Letters: B rows of the state in a call, T tokens (`tokens`: of all rows), R rows of a product (B·T filled up), D model
width, N heads, M key-value heads, G = N / M, Dh head width, S slots of the state, n rows of the head.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.engine.executors.base import Eager, filled_up_on_the_right, why_not_plain
from smalti.engine.executors.products import (
    QUERIES,
    attention_agrees,
    filled_up,
    one_thread,
    product_rows,
    rows_of,
    slot_step,
    threads_agree,
)
from smalti.models.base import SequenceModel
from smalti.models.decode_state import SLOT_BLOCK, DecodeState, Rows
from smalti.models.decoder_only import DecoderOnly
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.models.janus import Janus
from smalti.models.rar import RAR
from smalti.models.stored_weights import StoredWeight
from smalti.models.transformer import Block, Norm
from smalti.sequences.layout import Slot

LANES = 32
"""Floats that torch's kernels take at once, at the most."""
GRAIN = 2**15
"""Numbers that torch's elementwise kernels leave to one thread."""


def why_no_copy(
    model: DecoderOnly | EncoderDecoder | RAR | Janus,
    dtypes: set[torch.dtype],
    storages: tuple[str, ...] = ("float32",),
) -> list[str]:
    """What keeps an executor for CPUs that copies weights, of these dtypes and stored so, from a model that it knows,
    in words."""
    reasons = []
    if model.device.type != "cpu":
        reasons.append(f"the model is on {model.device}, not on a CPU")
    if model.storage not in storages:
        reasons.append(f"it reads weights stored as {' or '.join(storages)}, not as {model.storage}")
    stored = {id(module.values) for module in model.modules() if isinstance(module, StoredWeight)}
    tensors = (*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point()))
    found = {tensor.dtype for tensor in tensors if id(tensor) not in stored}
    if not found <= dtypes or torch.is_autocast_enabled("cpu"):
        given = "autocast" if found <= dtypes else ", ".join(sorted(map(str, found)))
        reasons.append(f"it computes in {' or '.join(sorted(map(str, dtypes)))}, not in {given}")
    if model.training:
        reasons.append("the model is in training mode")
    return reasons


class Packed(Eager):
    """Runs a model's steps on a CPU in states that it alone has written, with a copy of the weights."""

    name: ClassVar[str] = "packed"

    @classmethod
    def why_not(cls, model: SequenceModel, num_steps: int | None = None) -> list[str]:
        reasons = why_not_plain(model)
        if isinstance(model, DecoderOnly):
            reasons += why_no_copy(model, {torch.float32, torch.float64})
        return reasons

    model: DecoderOnly

    def __init__(self, model: DecoderOnly):
        super().__init__(model)
        self.config = model.config.transformer
        self.embedding = model.embed_tokens.weight.detach()
        self.blocks = [_FastBlock(block) for block in model.transformer.blocks]  # type: ignore[arg-type]
        self.norm = _norm_function(model.transformer.norm)
        self.heads: dict[Slot | None, Float[Tensor, "D n"]] = {}
        self.views: _StateViews | None = None
        self.positions = _position_table(model)
        shapes = {tuple(product.weight.shape) for block in self.blocks for product in block.products}
        self.rows = rows_of(shapes, self.embedding.dtype)
        self.one_thread = not self._threads_agree(shapes)

    def extend(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "B D"]:
        token_ids, counts = filled_up_on_the_right(tokens)
        B, T = token_ids.shape
        if T == 1:
            return self._run(state, rows, token_ids, counts, slice(B))
        last = T - 1 if counts is None else torch.tensor(counts) - 1
        return self._run(state, rows, token_ids, counts, torch.arange(B) * T + last)

    def extend_all(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "tokens D"]:
        token_ids, counts = filled_up_on_the_right(tokens)
        B, T = token_ids.shape
        real = torch.arange(T) < torch.tensor([T] * B if counts is None else counts)[:, None]
        return self._run(state, rows, token_ids, counts, real.flatten().nonzero()[:, 0])

    def _run(
        self,
        state: DecodeState,
        rows: Rows,
        token_ids: Int[Tensor, "B T"],
        counts: list[int] | None,
        wanted: slice | Int[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens D"]:
        """Runs new tokens into the state; returns the hidden states of those wanted, counted row after row."""
        T = token_ids.shape[1]
        state.check_room(rows, T if counts is None else counts, self.config.max_length)
        if self.views is None or self.views.state is not state:
            self.views = _StateViews(state)
        where = _Where(self.views, rows, T, counts, self.config.num_heads // self.config.kv_heads)
        with self._threads():
            x, rotation = self._embed(token_ids, where)
            for block, layer in zip(self.blocks, where.layers, strict=True):
                block.attend(x, rotation, layer, where, self.rows.most)
                block.feed_forward(x, self.rows.most)
            state.advance(rows, T if counts is None else counts)
            return self.norm(x[wanted])

    def logits(self, hidden: Float[Tensor, "B D"], slot: Slot | None = None) -> Float[Tensor, "B n"]:
        """What several ranges of ids take of the head is gathered once."""
        if slot is None and self.model.config.head_ranges is not None:
            return self.model.spread(self.logits(hidden, self.model.config.head_slot))
        if slot not in self.heads:
            weight = self.model.head_weight.detach()
            pieces = [weight] if slot is None else [weight[start:end] for start, end in self.model.head_rows(slot)]
            self.heads[slot] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).t()
        head, num_rows = self.heads[slot], len(hidden)
        rows = product_rows(*head.shape, head.dtype)
        agree = threads_agree(*head.shape, head.dtype, torch.get_num_threads())
        with nullcontext() if agree else one_thread():
            if missing := filled_up(num_rows, rows.step) - num_rows:
                hidden = F.pad(hidden, (0, 0, 0, missing))
            if len(hidden) <= rows.most:
                return torch.mm(hidden, head)[:num_rows]
            return torch.cat([torch.mm(part, head) for part in hidden.split(rows.most)])[:num_rows]

    def _embed(
        self, token_ids: Int[Tensor, "B T"], where: "_Where"
    ) -> tuple[Float[Tensor, "R D"], tuple[Tensor, Tensor] | None]:
        """What enters the first block, and the rotation of each channel at the tokens' positions, cosine and sine."""
        B, T = token_ids.shape
        missing = filled_up(B * T, self.rows.step) - B * T
        x = F.embedding(F.pad(token_ids.reshape(-1), (0, missing)), self.embedding)
        if self.positions is None:
            return x, None
        here = where.positions
        if not isinstance(here, int):  # what fills a row up needs some position too
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

    both: Float[Tensor, "2 C M S Dh"]
    joint_keys: Float[Tensor, "BM Dh S"]
    joint_values: Float[Tensor, "BM S Dh"]

    def of(self, rows: slice) -> "_LayerViews":
        M = self.both.shape[2]
        joint = slice(rows.start * M, rows.stop * M)
        return _LayerViews(self.both[:, rows], self.joint_keys[joint], self.joint_values[joint])


class _StateViews:
    """The layers of a state, and what hides slots that are still to come."""

    def __init__(self, state: DecodeState):
        self.state = state
        self.layers = [
            _LayerViews(both, both[0].flatten(0, 1).transpose(1, 2), both[1].flatten(0, 1)) for both in state.both
        ]
        first = state.both[0]
        self.num_slots = first.shape[3]
        self.parts: dict[tuple[int, int], list[_LayerViews]] = {}
        # Zeros and then what hides, as long each: a window that starts early enough hides what is behind a position.
        self.edge = first.new_zeros(2 * self.num_slots)
        self.edge[self.num_slots :] = torch.finfo(first.dtype).min

    def of(self, rows: slice) -> list[_LayerViews]:
        """The layers for rows side by side, which as a rule are those of the step before."""
        part = rows.start, rows.stop
        if part not in self.parts:
            self.parts = {part: [layer.of(rows) for layer in self.layers]}
        return self.parts[part]

    def mask(self, positions: int | Int[Tensor, "..."], width: int) -> Float[Tensor, "... S"]:
        """What is added to the scores of queries at the positions, for the first `width` slots."""
        first = self.num_slots - 1 - positions
        if isinstance(first, int):
            return self.edge[first : first + width]
        return self.edge.unfold(0, width, 1)[first.clamp(min=0)]


class _Where:
    """Where the new tokens of some rows stand: their positions, the slots they are written to, and what they see."""

    def __init__(self, views: _StateViews, rows: Rows, T: int, counts: list[int] | None, group: int):
        state = views.state
        lengths = [state.lengths[row] for row in state.indices(rows)]
        self.B, self.T = len(lengths), T
        shape = state.both[0].shape
        most, step = shape[3], slot_step(shape[4], state.both[0].dtype)
        self.width = min(filled_up(max(lengths) + T, step), most)
        level = min(lengths) == max(lengths)
        begin = lengths[0] if level else torch.tensor(lengths)[:, None]
        self.is_view = isinstance(rows, slice)
        self.layers = views.of(rows) if isinstance(rows, slice) else views.layers
        self.index = None if isinstance(rows, slice) else torch.tensor(rows)
        M = shape[2]
        if T == 1:
            self.positions: int | Int[Tensor, ...] = begin
            mask = views.mask(begin if level else begin[:, 0], self.width)  # type: ignore[index]
            self.masks = [mask.view(1, 1, -1) if level else mask.repeat_interleave(M, 0)[:, None]]
        else:
            self.positions = torch.arange(T) + begin
            mask = views.mask(self.positions, self.width)  # (…, T, S)
            mask = F.pad(mask, (0, 0, 0, filled_up(T, QUERIES) - T)).repeat_interleave(group, -2)
            mask = mask[None] if level else mask.repeat_interleave(M, 0)
            self.masks = list(mask.split(QUERIES * group, -2))
        self.begin = lengths[0] if level and counts is None and self.is_view else None
        if self.begin is None:
            real = torch.arange(T) < torch.tensor([T] * self.B if counts is None else counts)[:, None]
            self.real = real.nonzero(as_tuple=True)
            self.real_slots = (torch.arange(T) + begin).expand(self.B, T)[self.real]

    def write(self, layer: _LayerViews, new: Float[Tensor, "B T KM Dh"]) -> _LayerViews:
        """Puts keys, and behind them values, into a layer; returns what to read."""
        new = new.unflatten(2, (2, -1))  # (B, T, 2, M, Dh)
        if self.begin is not None:
            layer.both[:, :, :, self.begin : self.begin + self.T] = new.permute(2, 0, 3, 1, 4)
            return layer
        into = self.real[0] if self.index is None else self.index[self.real[0]]
        layer.both.permute(1, 3, 0, 2, 4)[into, self.real_slots] = new[self.real]
        if self.index is None:
            return layer
        keys, values = layer.both[:, self.index, :, : self.width].flatten(1, 2)
        return _LayerViews(layer.both, keys.transpose(1, 2), values)


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
        views = where.write(views, new)
        if T == 1:
            q = q.reshape(B * self.kv_heads, -1, self.head_dim)  # the query heads of one key-value head together
            attended = self._attended(q, views, where.masks[0]).view(B, -1)
        else:
            q = q.unflatten(2, (self.kv_heads, -1)).transpose(1, 2)  # (B, M, T, G, Dh)
            q = F.pad(q, (0, 0, 0, 0, 0, filled_up(T, QUERIES) - T)).reshape(B * self.kv_heads, -1, self.head_dim)
            queries = q.split(where.masks[0].shape[1], dim=1)
            parts = [self._attended(*part) for part in zip(queries, [views] * len(queries), where.masks, strict=True)]
            attended = torch.cat(parts, 1).view(B, self.kv_heads, filled_up(T, QUERIES), -1)[:, :, :T]
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

"""Decode steps on a CPU in one call: `decode.cpp` from Python. The structures here mirror those there, field by field.

Letters: R rows, `tokens` those of all rows together, D model width, n the ids of a slot.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int, c_long, c_void_p
from functools import partial
from itertools import accumulate, chain, repeat
from operator import add
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti import native, processor
from smalti.engine.executors.base import Draws, Eager, unknown_blocks, why_not_plain
from smalti.engine.executors.packed import why_no_copy
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.models.base import SequenceModel
from smalti.models.config import FEED_FORWARDS
from smalti.models.decode_state import DecodeState, Rows
from smalti.models.decoder_only import NO_FEATURES, DecoderOnly
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.models.janus import Janus
from smalti.models.rar import RAR, AdaptiveBlock
from smalti.models.stored_weights import STORAGES, StoredLinear, StoredWeight
from smalti.models.transformer import Block, Context, Norm
from smalti.sequences.layout import Slot
from smalti.sequences.vocabulary import FEATURE

Model = DecoderOnly | EncoderDecoder | RAR | Janus

FEED_FORWARD_CODES = {name: code for code, name in enumerate(FEED_FORWARDS)}
MOST_ROWS = 1024
"""Tokens of all rows together that run at once: more need memory and gain nothing."""
STEPS_THAT_REPAY_COMPILING = 1000
"""Decode steps of one job from which the library is compiled for it: they take about as long without."""
BYTES_THAT_REPAY_COMPILING = 2e10
"""The same for models that no other executor makes faster, in bytes of weights times steps: RAR-B's 20 steps."""
LARGEST_COPY = 0.25
"""Of the machine's memory: the weights are there twice."""
MISSING = (
    "the native library is not there: it needs a C++ compiler, a job of many steps, and SMALTI_NATIVE other than 0"
)
POSITION_CODES = {"none": 0, "learned": 1, "sinusoidal": 1, "rotary": 2, "rotary_2d": 2}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double)]


class _Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("scales", c_void_p)]
    _fields_ += [("inputs", c_long), ("outputs", c_long), ("gated", c_long), ("storage", c_long)]


class _Layer(Structure):
    _fields_ = [(name, _Norm) for name in ("attention_norm", "q_norm", "k_norm", "feed_forward_norm", "cross_norm")]
    _fields_ += [(name, _Matrix) for name in ("qkv", "out", "up", "down", "cross_q", "cross_out", "modulation")]


class _Context(Structure):
    _fields_ = [("length", c_long), ("keys", c_void_p), ("values", c_void_p)]


class _Model(Structure):
    _fields_ = [(name, c_long) for name in ("vocab_size", "num_layers", "width", "num_heads", "kv_heads")]
    _fields_ += [(name, c_long) for name in ("head_width", "wide", "feed_forward", "positions")]
    _fields_ += [("embedding", c_void_p), ("table", c_void_p), ("steps", c_void_p)]
    _fields_ += [("norm", _Norm), ("modulation", _Matrix), ("layers", POINTER(_Layer))]


class _Batch(Structure):
    _fields_ = [("size", c_long), ("num_tokens", c_long)]
    _fields_ += [(name, c_void_p) for name in ("token_ids", "slots", "positions", "vectors", "firsts", "rows")]
    _fields_ += [("most_slots", c_long), ("keys", c_void_p), ("values", c_void_p), ("row_stride", c_long)]
    _fields_ += [("head_stride", c_long), ("contexts", c_void_p), ("labels", c_void_p), ("every", c_long)]
    _fields_ += [("hidden", c_void_p), ("workspace", c_void_p)]


class _Draw(Structure):
    _fields_ = [("rows", c_long), ("stride", c_long), ("hidden", c_void_p), ("null_hidden", c_void_p)]
    _fields_ += [("scales", c_void_p), ("uniforms", c_void_p), ("scale_stride", c_long), ("uniform_stride", c_long)]
    _fields_ += [("ids", c_void_p), ("temperature", c_double), ("token_ids", c_void_p), ("log_probs", c_void_p)]
    _fields_ += [("draw_log_probs", c_void_p), ("workspace", c_void_p)]


def load(*, build: bool = True) -> ctypes.CDLL | None:
    """The library, its functions declared; None where there is none, see `native.load`."""
    library = native.load("decode", build=build)
    if library is not None:
        library.packed_bytes.restype = library.workspace_floats.restype = c_long
        library.packed_bytes.argtypes = [c_void_p]
        library.pack.argtypes = [c_void_p, c_void_p, c_int]
        library.workspace_floats.argtypes = [c_void_p, c_long, c_long, c_int]
        library.decode.argtypes = [c_void_p, c_void_p, c_int]
        library.head.argtypes = [c_void_p, c_void_p, c_long, c_long, c_void_p, c_int]
        library.draw.argtypes = [c_void_p, c_void_p, c_int]
    return library


class Native(Eager):
    """Runs a model's steps in one call each; draws too, where nothing filters the ids.

    What a row computes is the same to the last bit whatever rows stand beside it. Holds a packed copy of the weights.
    """

    name: ClassVar[str] = "native"

    @classmethod
    def why_not(cls, model: SequenceModel, num_steps: int | None = None) -> list[str]:
        if not isinstance(model, Model):
            return [f"it does not know {type(model).__name__}"]
        reasons = _unknown_parts(model) + why_no_copy(model, {torch.float32}, STORAGES)
        most = LARGEST_COPY * processor.memory_bytes()
        held = sum(parameter.nbytes for parameter in model.parameters())
        if held > most:
            reasons.append(
                f"a copy of the weights, {held:,} bytes, would take more than {LARGEST_COPY:.0%} of the memory"
            )
        build = (
            num_steps is None
            or num_steps >= STEPS_THAT_REPAY_COMPILING
            or (num_steps * held >= BYTES_THAT_REPAY_COMPILING and bool(why_not_plain(model)))
        )
        if not reasons and load(build=build) is None:
            reasons.append(MISSING)
        return reasons

    model: Model

    def __init__(self, model: Model):
        super().__init__(model)
        library = load()
        if library is None:
            raise InputError(MISSING)
        self.library = library
        self.kept: list[Tensor] = []  # what the structures point to
        embedding = model.embed_codes if isinstance(model, EncoderDecoder) else model.embed_tokens
        if isinstance(model, RAR):
            config, blocks, kind, table = model.config.transformer, model.blocks, "learned", model.position_table()
            ones = torch.ones(config.d_model)  # scale and shift of the last norm are modulated alone
            norm = _Norm(self._address(ones), self._address(torch.zeros_like(ones)), config.norm_eps)
        else:
            transformer = model.decoder if isinstance(model, EncoderDecoder) else model.transformer
            config, blocks, norm = transformer.config, transformer.blocks, self._norm(transformer.norm)
            kind, table = config.positions, getattr(transformer, "table", None)
            if isinstance(model, EncoderDecoder):
                kind, table = "learned", model.position_table()
            elif kind == "learned":
                table = transformer.positions.weight
        self.config = config
        self.fields = _Model(
            vocab_size=embedding.num_embeddings,
            num_layers=config.num_layers,
            width=config.d_model,
            num_heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_width=config.head_dim,
            wide=config.d_ff,
            feed_forward=FEED_FORWARD_CODES[config.feed_forward],
            positions=POSITION_CODES[kind],
            embedding=self._address(embedding.weight),
            table=self._address(table),
            steps=self._address(model.steps.weight) if isinstance(model, RAR) else None,
            norm=norm,
            modulation=self._linear(model.modulation) if isinstance(model, RAR) else _Matrix(),
            layers=(_Layer * config.num_layers)(*map(self._layer, blocks)),  # type: ignore[arg-type]
        )
        # What makes vectors that stand in place of embeddings, and what stands before the head.
        self.projection: list[_Matrix] = []
        if isinstance(model, Janus):
            self.projection = [self._linear(layer) for layer in model.aligner.layers]  # type: ignore[arg-type]
            self.before_head = self._linear(model.head.first)
        elif isinstance(model, DecoderOnly) and model.num_features:
            self.projection = [self._linear(model.features.first), self._linear(model.features.second)]
        self.heads: dict[Slot | None, _Head] = {}
        self.bound: _BoundState | None = None
        self.workspace = self.draw_workspace = torch.empty(0)

    def extend(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R D"]:
        indices = state.indices(rows)
        if self.bound is None or self.bound.state is not state:
            self.bound = _BoundState(state)
        if isinstance(self.model, EncoderDecoder):
            tokens = [self.model.decoder_ids(new) for new in self.model.begin(state, indices, tokens)]
        elif isinstance(self.model, RAR):
            self.model.begin(state, indices, tokens)
        counts = list(map(len, tokens))
        columns = max(1, MOST_ROWS // len(indices))
        if max(counts) <= columns:
            return self._run(state, indices, tokens, counts)
        hidden = torch.empty(len(indices), self.fields.width)
        for start in range(0, max(counts), columns):
            left = [i for i, count in enumerate(counts) if count > start]
            part = [tokens[i][start : start + columns] for i in left]
            hidden[left] = self._run(state, [indices[i] for i in left], part, list(map(len, part)))
        return hidden

    def extend_all(self, state: DecodeState, rows: Rows, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "tokens D"]:
        indices = state.indices(rows)
        if self.bound is None or self.bound.state is not state:
            self.bound = _BoundState(state)
        if isinstance(self.model, EncoderDecoder):
            begun = self.model.begin(state, indices, tokens)
            hidden = self._run_all(state, indices, [self.model.decoder_ids(new) for new in begun])
            before = [len(new) - len(left) for new, left in zip(tokens, begun, strict=True)]
            parts = hidden.split(list(map(len, begun)))
            return torch.cat([F.pad(part, (0, 0, given, 0)) for part, given in zip(parts, before, strict=True)])
        if isinstance(self.model, RAR):
            self.model.begin(state, indices, tokens)
        return self._run_all(state, indices, tokens)

    def _run_all(
        self, state: DecodeState, indices: list[int], tokens: Sequence[Sequence[int]]
    ) -> Float[Tensor, "tokens D"]:
        counts = list(map(len, tokens))
        at_once = max(1, MOST_ROWS // max(counts))  # rows
        parts = [slice(start, start + at_once) for start in range(0, len(indices), at_once)]
        found = [self._run(state, indices[part], tokens[part], counts[part], every=True) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def logits(self, hidden: Float[Tensor, "R D"], slot: Slot | None = None) -> Float[Tensor, "R n"]:
        """What they take of the head is packed once."""
        if slot is None and not isinstance(self.model, DecoderOnly):
            return self.model.logits(hidden)
        if slot is None and isinstance(self.model, DecoderOnly) and self.model.config.head_ranges is not None:
            return self.model.spread(self.logits(hidden, self.model.config.head_slot))
        return self._product(self._head(slot).matrix, self._before_head(hidden))

    def draw(
        self,
        hidden: Float[Tensor, "R D"],
        null_hidden: Float[Tensor, "R D"] | None,
        slot: Slot,
        uniforms: Float[Tensor, " R"],
        scales: Float[Tensor, " R"] | None,
        config: SampleConfig,
    ) -> Draws:
        if config.is_filtered or config.temperature == 0:
            return super().draw(hidden, null_hidden, slot, uniforms, scales, config)
        head, hidden, R = self._head(slot), self._before_head(hidden).contiguous(), len(hidden)
        if len(self.draw_workspace) < 3 * R * head.matrix.outputs:
            self.draw_workspace = torch.empty(3 * R * head.matrix.outputs)
        token_ids, log_probs = torch.empty(R, dtype=torch.long), torch.empty(2, R)
        null_hidden = None if null_hidden is None else self._before_head(null_hidden).contiguous()
        fields = _Draw(
            rows=R,
            stride=hidden.shape[1],
            hidden=hidden.data_ptr(),
            null_hidden=None if null_hidden is None else null_hidden.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            uniforms=uniforms.data_ptr(),
            scale_stride=0 if scales is None else scales.stride(0),
            uniform_stride=uniforms.stride(0),
            ids=head.ids.data_ptr(),
            temperature=config.temperature,
            token_ids=token_ids.data_ptr(),
            log_probs=log_probs.data_ptr(),
            draw_log_probs=log_probs[1].data_ptr(),
            workspace=self.draw_workspace.data_ptr(),
        )
        self.library.draw(byref(head.matrix), byref(fields), torch.get_num_threads())
        return Draws(token_ids, log_probs[0], log_probs[1])

    def _run(
        self,
        state: DecodeState,
        indices: list[int],
        tokens: Sequence[Sequence[int]],
        counts: list[int],
        *,
        every: bool = False,
    ) -> Float[Tensor, "R D"]:
        """Runs new tokens into the state; returns what predicts the token behind each row's last, or behind every
        one."""
        assert self.bound is not None
        lengths = [state.num_filled(row) for row in indices]
        ends = list(map(add, lengths, counts))
        most = max(ends)
        state.check_length(most, self.config.max_length)
        token_ids = array("q", chain.from_iterable(tokens))
        slots, firsts = array("q", lengths), None
        if len(token_ids) > len(counts):
            slots = array("q", chain.from_iterable(map(range, lengths, ends)))
            firsts = array("q", accumulate(counts, initial=0))
        rows, threads, batch = array("q", indices), torch.get_num_threads(), self.bound.batch
        beside = self._beside(state, indices, counts, token_ids, slots)
        widest = max(most, beside.longest_context)
        needed = self.library.workspace_floats(byref(self.fields), len(token_ids), widest, threads)
        if len(self.workspace) < needed:
            self.workspace = torch.empty(needed)
        hidden = torch.empty(len(token_ids) if every else len(counts), self.fields.width)
        batch.size, batch.num_tokens, batch.most_slots = len(counts), len(token_ids), widest
        batch.token_ids, batch.slots, batch.rows = map(_address, (token_ids, slots, rows))
        batch.positions = _address(beside.positions or slots)
        batch.firsts, batch.vectors, batch.contexts, batch.labels = (
            None if given is None else _address(given)
            for given in (firsts, beside.vectors, beside.contexts, beside.labels)
        )
        batch.every, batch.hidden, batch.workspace = every, hidden.data_ptr(), self.workspace.data_ptr()
        if self.library.decode(byref(self.fields), byref(batch), threads):
            raise IndexError(f"a token id is outside 0..{self.fields.vocab_size - 1}.")
        state.advance(indices, counts)
        return hidden

    def _beside(
        self, state: DecodeState, indices: list[int], counts: list[int], token_ids: array, slots: array
    ) -> "_Beside":
        """What some tokens have beside their ids and slots. Where a vector stands, the id becomes a known one."""
        if isinstance(self.model, DecoderOnly) and not self.projection:
            return NOTHING_BESIDE
        if isinstance(self.model, Janus):
            return self._codes_beside(self.model, token_ids)
        assert self.bound is not None
        given = [state.conditions[row] for row in indices]
        if self.config.cross_attention:
            found = [self.bound.context(one) for one in given]
            longest = max(one.length for one in found)
            return _Beside(contexts=array("q", map(ctypes.addressof, found)), longest_context=longest)
        if isinstance(self.model, RAR):
            return _Beside(labels=array("q", (label.data_ptr() for label in given)))
        assert isinstance(self.model, DecoderOnly)
        features = [self.bound.features(one, self._project) for one in given]
        of_tokens = list(chain.from_iterable(repeat(one, n) for one, n in zip(features, counts, strict=True)))
        most = self.model.num_features
        positions = array("q", (slot + most - len(one) for slot, one in zip(slots, of_tokens, strict=True)))
        if FEATURE not in token_ids:
            return _Beside(positions=positions)
        vectors = array("q", bytes(8 * len(token_ids)))
        for i, (one, slot) in enumerate(zip(of_tokens, slots, strict=True)):
            if token_ids[i] == FEATURE:
                token_ids[i], vectors[i] = 0, one[slot].data_ptr()
        return _Beside(positions=positions, vectors=vectors, kept=features)

    def _codes_beside(self, model: Janus, token_ids: array) -> "_Beside":
        """Codes become vectors by the aligner; the marker before them is a word."""
        first, end = model.config.first_code, model.vocab_size
        places = [i for i, token_id in enumerate(token_ids) if token_id >= model.config.text_size]
        codes = [i for i in places if first <= token_ids[i] < end]
        vectors, found = array("q", bytes(8 * len(token_ids))), None
        if codes:
            numbers = torch.tensor([token_ids[i] - first for i in codes])
            found = self._project(model.embed_codes(numbers))
            for row, i in zip(found, codes, strict=True):
                vectors[i] = row.data_ptr()
        for i in places:
            if token_ids[i] < end:
                token_ids[i] = model.config.start_id
        return _Beside(vectors=vectors, kept=[found])

    def _before_head(self, hidden: Float[Tensor, "R D"]) -> Float[Tensor, "R k"]:
        if not isinstance(self.model, Janus):
            return hidden
        return _by_row(F.gelu, self._product(self.before_head, hidden))

    def _product(self, matrix: _Matrix, x: Float[Tensor, "R k"]) -> Float[Tensor, "R n"]:
        """A row's sums are the same whatever rows stand beside it."""
        x = x.contiguous()
        R, k = x.shape
        y = torch.empty(R, matrix.outputs)
        self.library.head(byref(matrix), x.data_ptr(), k, R, y.data_ptr(), torch.get_num_threads())
        return y

    def _project(self, x: Float[Tensor, "n C"]) -> Float[Tensor, "n D"]:
        """As `FeatureProjection` and `Aligner` do, but the same to the last bit in any batch on any threads."""
        activation = F.gelu if isinstance(self.model, Janus) else partial(F.gelu, approximate="tanh")
        x = x.float()
        for number, matrix in enumerate(self.projection):
            x = self._product(matrix, _by_row(activation, x) if number else x)
        return x

    def _head(self, slot: Slot | None) -> "_Head":
        if slot not in self.heads:
            weight: StoredWeight | Tensor = self.model.stored_head or self.model.head_weight
            bias = getattr(self.model, "head_bias", None)
            num_rows = len(weight.values if isinstance(weight, StoredWeight) else weight)
            ids = ((0, num_rows),) if slot is None else slot.ranges
            rows = ids if slot is None else self.model.head_rows(slot)
            matrix = self._matrix(weight, bias, rows=rows)
            self.heads[slot] = _Head(matrix, torch.cat([torch.arange(start, end) for start, end in ids]))
        return self.heads[slot]

    def _layer(self, block: Block | AdaptiveBlock) -> _Layer:
        attention, feed_forward = block.attention, block.feed_forward
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            q_norm=self._norm(getattr(attention, "q_norm", None)),
            k_norm=self._norm(getattr(attention, "k_norm", None)),
            feed_forward_norm=self._norm(block.feed_forward_norm),
            **self._cross_attention(block),
            modulation=self._linear(block.modulation) if isinstance(block, AdaptiveBlock) else _Matrix(),
            qkv=self._linear(attention.qkv),
            out=self._linear(attention.out),
            up=self._linear(feed_forward.up, gated=feed_forward.kind == "swiglu"),
            down=self._linear(feed_forward.down),
        )

    def _cross_attention(self, block: Block | AdaptiveBlock) -> dict[str, Structure]:
        if isinstance(block, AdaptiveBlock) or not self.config.cross_attention:
            return {}
        cross = block.cross_attention
        return {
            "cross_norm": self._norm(block.cross_norm),
            "cross_q": self._linear(cross.q),
            "cross_out": self._linear(cross.out),
        }

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        return _Norm(self._address(norm.weight), self._address(norm.bias), norm.eps)

    def _linear(self, linear: nn.Linear | StoredLinear, *, gated: bool = False) -> _Matrix:
        weight = linear.stored if isinstance(linear, StoredLinear) else linear.weight
        return self._matrix(weight, linear.bias, gated=gated)

    def _matrix(
        self,
        weight: StoredWeight | Float[Tensor, "n k"],
        bias: Float[Tensor, " n"] | None = None,
        *,
        gated: bool = False,
        rows: tuple[tuple[int, int], ...] | None = None,
    ) -> _Matrix:
        """Packed weights, as they are stored; `rows`: of these ranges of outputs."""
        stored = isinstance(weight, StoredWeight)
        storage, scales = (weight.storage, weight.scales) if stored else ("float32", None)
        values = _rows_of((weight.values if stored else weight).detach(), rows)
        scales = None if scales is None else _rows_of(scales, rows)
        bias = None if bias is None else _rows_of(bias.detach(), rows)
        n, k = values.shape
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in (values, bias, scales)]
        matrix = _Matrix(*addresses, k, n, gated, STORAGES.index(storage))
        memory = torch.empty(self.library.packed_bytes(byref(matrix)), dtype=torch.uint8)
        threads = torch.get_num_threads() if values.numel() >= 2**20 else 1  # less is done before another one wakes
        self.library.pack(byref(matrix), memory.data_ptr(), threads)
        self.kept.append(memory)
        return matrix

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()


class _Beside(NamedTuple):
    """Addresses that the library reads; None where there are none."""

    positions: array | None = None
    """Of tokens that do not stand at their slots."""
    vectors: array | None = None
    contexts: array | None = None
    labels: array | None = None
    longest_context: int = 0
    kept: Any = None
    """What the addresses point to, if nobody else keeps it."""


NOTHING_BESIDE = _Beside()


def _by_row(function: Callable[[Tensor], Tensor], x: Float[Tensor, "R k"]) -> Float[Tensor, "R k"]:
    """torch's own kernels round other numbers last where a thread's share of them ends: a row alone is one thread's."""
    return torch.stack([function(row) for row in x])


class _Head(NamedTuple):
    """Part of the head, and the ids its outputs stand for."""

    matrix: _Matrix
    ids: Int[Tensor, " n"]


def _rows_of(tensor: Tensor, ranges: tuple[tuple[int, int], ...] | None) -> Tensor:
    if ranges is None:
        return tensor.contiguous()
    return torch.cat([tensor[start:end] for start, end in ranges])


def _unknown_parts(model: Model) -> list[str]:
    """What of a model this executor does not know, in words."""
    if isinstance(model, RAR):
        return []
    if not isinstance(model, EncoderDecoder):
        return unknown_blocks(model.config.transformer)
    local = model.config.local_kernel is not None
    reasons = ["it has no convolution-shaped attention (local_kernel)"] if local else []
    return reasons + unknown_blocks(model.config.decoder)


def _address(numbers: array) -> int:
    return numbers.buffer_info()[0]


class _BoundState:
    """Where the keys and values of a state lie, and what its rows are conditioned on as the library reads it."""

    def __init__(self, state: DecodeState):
        self.state = state
        self.contexts: dict[int, tuple[Context, _Context, list[Any]]] = {}
        self.projected: dict[int, tuple[Tensor, Float[Tensor, "n D"]]] = {}
        self.addresses = [(c_void_p * len(state.both))(*(both[i].data_ptr() for both in state.both)) for i in range(2)]
        row_stride, head_stride, slot_stride, channel_stride = state.keys(0).stride()
        assert (slot_stride, channel_stride) == (state.keys(0).shape[3], 1)
        self.batch = _Batch(
            keys=ctypes.addressof(self.addresses[0]),
            values=ctypes.addressof(self.addresses[1]),
            row_stride=row_stride,
            head_stride=head_stride,
        )

    def context(self, context: Context) -> _Context:
        """What is kept here is alive, so that no other can have its number."""
        if id(context) not in self.contexts:
            self._forget_oldest(self.contexts)
            both = [
                (c_void_p * len(part))(*(one.data_ptr() for one in part)) for part in (context.keys, context.values)
            ]
            fields = _Context(context.keys[0].shape[2], *map(ctypes.addressof, both))
            self.contexts[id(context)] = context, fields, both
        return self.contexts[id(context)][1]

    def features(
        self, features: Float[Tensor, "n C"] | None, project: Callable[[Tensor], Float[Tensor, "n D"]]
    ) -> Float[Tensor, "n D"]:
        """A row's features as wide as the model. Raises ValueError where there are none."""
        if features is None:
            raise ValueError(NO_FEATURES)
        if id(features) not in self.projected:
            self._forget_oldest(self.projected)
            self.projected[id(features)] = features, project(features)
        return self.projected[id(features)][1]

    def _forget_oldest(self, held: dict[int, Any]) -> None:
        while len(held) > 2 * self.state.capacity:
            del held[next(iter(held))]

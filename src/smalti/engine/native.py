"""Decode steps on a CPU in one call: `decode.cpp` from Python. The structures here mirror those there, field by field.

Letters: B batch, T new tokens, D model width, R rows, n the ids of a slot.
"""

import ctypes
from ctypes import POINTER, Structure, byref, c_double, c_int, c_long, c_void_p
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti import native
from smalti.models.config import FEED_FORWARDS
from smalti.models.decode_state import KVCache
from smalti.models.decoder_only import DecoderOnly
from smalti.models.transformer import Block, Norm
from smalti.sequences.layout import Slot

FEED_FORWARD_CODES = {name: code for code, name in enumerate(FEED_FORWARDS)}
MOST_ROWS = 1024
"""Tokens of all rows together that run at once: more need memory and gain nothing."""
POSITION_CODES = {"none": 0, "learned": 1, "sinusoidal": 1, "rotary": 2, "rotary_2d": 2}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double)]


class _Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("inputs", c_long), ("outputs", c_long), ("gated", c_long)]


class _Layer(Structure):
    _fields_ = [(name, _Norm) for name in ("attention_norm", "q_norm", "k_norm", "feed_forward_norm")]
    _fields_ += [(name, _Matrix) for name in ("qkv", "out", "up", "down")]


class _Model(Structure):
    _fields_ = [(name, c_long) for name in ("vocab_size", "num_layers", "width", "num_heads", "kv_heads")]
    _fields_ += [(name, c_long) for name in ("head_width", "wide", "max_length", "feed_forward", "positions")]
    _fields_ += [("embedding", c_void_p), ("table", c_void_p), ("norm", _Norm), ("layers", POINTER(_Layer))]


class _Batch(Structure):
    _fields_ = [("size", c_long), ("new_tokens", c_long), ("token_ids", c_void_p), ("starts", c_void_p)]
    _fields_ += [("length", c_long), ("keys", c_void_p), ("values", c_void_p), ("row_stride", c_long)]
    _fields_ += [("head_stride", c_long), ("hidden", c_void_p), ("workspace", c_void_p)]


class _Draw(Structure):
    _fields_ = [("rows", c_long), ("stride", c_long), ("hidden", c_void_p), ("null_hidden", c_void_p)]
    _fields_ += [("scales", c_void_p), ("uniforms", c_void_p), ("scale_stride", c_long), ("uniform_stride", c_long)]
    _fields_ += [("ids", c_void_p), ("temperature", c_double), ("token_ids", c_void_p), ("log_probs", c_void_p)]
    _fields_ += [("draw_log_probs", c_void_p), ("workspace", c_void_p)]


def load(*, build: bool = True) -> ctypes.CDLL | None:
    """The library, its functions declared; None where there is none, see `native.load`."""
    library = native.load("decode", build=build)
    if library is not None:
        library.packed_floats.restype = library.workspace_floats.restype = c_long
        library.packed_floats.argtypes = [c_void_p]
        library.pack.argtypes = [c_void_p, c_void_p, c_int]
        library.workspace_floats.argtypes = [c_void_p, c_long, c_long, c_int]
        library.decode.argtypes = [c_void_p, c_void_p, c_int]
        library.head.argtypes = [c_void_p, c_void_p, c_long, c_long, c_void_p, c_int]
        library.draw.argtypes = [c_void_p, c_void_p, c_int]
    return library


class NativeDecoder:
    """Prefills and decodes in a model's place, through the same cache; draws too, where nothing filters the ids.

    What a row computes is the same to the last bit whatever rows stand beside it. Holds a packed copy of the weights.
    """

    def __init__(self, library: ctypes.CDLL, model: DecoderOnly):
        self.model, self.device, self.library = model, model.device, library
        self.kept: list[Tensor] = []  # what the structures point to
        transformer, config = model.transformer, model.config.transformer
        table = transformer.positions.weight if config.positions == "learned" else getattr(transformer, "table", None)
        self.fields = _Model(
            vocab_size=model.config.vocab_size,
            num_layers=config.num_layers,
            width=config.d_model,
            num_heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_width=config.head_dim,
            wide=config.d_ff,
            max_length=config.max_length,
            feed_forward=FEED_FORWARD_CODES[config.feed_forward],
            positions=POSITION_CODES[config.positions],
            embedding=self._address(model.embed_tokens.weight),
            table=self._address(table),
            norm=self._norm(transformer.norm),
            layers=(_Layer * config.num_layers)(*map(self._layer, transformer.blocks)),  # type: ignore[arg-type]
        )
        self.heads: dict[Slot | None, _Head] = {}
        self.cache: _BoundCache | None = None
        self.workspace = self.draw_workspace = torch.empty(0)

    def prefill(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """`DecoderOnly.prefill`, within rounding. Raises ValueError where the cache has no room."""
        B, T = token_ids.shape
        self.model.transformer.check_length(kv_cache.length + T, kv_cache)
        hidden = torch.empty(B, self.fields.width)
        columns = max(1, MOST_ROWS // B)
        for start in range(0, T, columns):
            self._run(token_ids[:, start : start + columns].contiguous(), kv_cache, hidden)
        return hidden

    def decode_step(self, token_ids: Int[Tensor, " B"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """`DecoderOnly.decode_step`, within rounding. Raises ValueError where the cache is full."""
        return self.prefill(token_ids[:, None], kv_cache)

    def logits(self, hidden: Float[Tensor, "R D"], slot: Slot | None = None) -> Float[Tensor, "R n"]:
        """`DecoderOnly.logits`; what they take of the head is packed once."""
        matrix, hidden = self._head(slot).matrix, hidden.contiguous()
        R, D = hidden.shape
        logits = torch.empty(R, matrix.outputs)
        self.library.head(byref(matrix), hidden.data_ptr(), D, R, logits.data_ptr(), torch.get_num_threads())
        return logits

    def draw(
        self,
        hidden: Float[Tensor, "R D"],
        null_hidden: Float[Tensor, "R D"] | None,
        slot: Slot,
        uniforms: Float[Tensor, " R"],
        scales: Float[Tensor, " R"] | None,
        temperature: float,
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
        """An id per row, its ln p under the model, and under what it was drawn from.

        As `sampling.guide` and `sampling.sample` would have it of the slot's logits, with a `temperature` above 0 and
        no filter; `null_hidden` and `scales` are given together.
        """
        head, hidden, R = self._head(slot), hidden.contiguous(), len(hidden)
        if len(self.draw_workspace) < 3 * R * head.matrix.outputs:
            self.draw_workspace = torch.empty(3 * R * head.matrix.outputs)
        token_ids, log_probs = torch.empty(R, dtype=torch.long), torch.empty(2, R)
        null_hidden = None if null_hidden is None else null_hidden.contiguous()
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
            temperature=temperature,
            token_ids=token_ids.data_ptr(),
            log_probs=log_probs.data_ptr(),
            draw_log_probs=log_probs[1].data_ptr(),
            workspace=self.draw_workspace.data_ptr(),
        )
        self.library.draw(byref(head.matrix), byref(fields), torch.get_num_threads())
        return token_ids, log_probs[0], log_probs[1]

    def _run(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache, hidden: Float[Tensor, "B D"]) -> None:
        """Runs new tokens into the cache; fills `hidden` with what predicts the token behind them."""
        B, T = token_ids.shape
        if self.cache is None or not self.cache.is_of(kv_cache):
            self.cache = _BoundCache(kv_cache)
        threads, slots = torch.get_num_threads(), kv_cache.length + T
        needed = self.library.workspace_floats(byref(self.fields), B * T, slots, threads)
        if len(self.workspace) < needed:
            self.workspace = torch.empty(needed)
        batch = self.cache.batch
        batch.size, batch.new_tokens, batch.length = B, T, kv_cache.length
        batch.token_ids, batch.hidden = token_ids.data_ptr(), hidden.data_ptr()
        batch.workspace = self.workspace.data_ptr()
        if self.library.decode(byref(self.fields), byref(batch), threads):
            raise IndexError(f"a token id is outside 0..{self.fields.vocab_size - 1}.")
        kv_cache.advance(T)

    def _head(self, slot: Slot | None) -> "_Head":
        if slot not in self.heads:
            weight = self.model.head_weight.detach()
            ranges = ((0, len(weight)),) if slot is None else slot.ranges
            ids = torch.cat([torch.arange(start, end) for start, end in ranges])
            self.heads[slot] = _Head(self._matrix(torch.cat([weight[start:end] for start, end in ranges])), ids)
        return self.heads[slot]

    def _layer(self, block: Block) -> _Layer:
        attention, feed_forward = block.attention, block.feed_forward
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            q_norm=self._norm(getattr(attention, "q_norm", None)),
            k_norm=self._norm(getattr(attention, "k_norm", None)),
            feed_forward_norm=self._norm(block.feed_forward_norm),
            qkv=self._linear(attention.qkv),
            out=self._linear(attention.out),
            up=self._linear(feed_forward.up, gated=feed_forward.kind == "swiglu"),
            down=self._linear(feed_forward.down),
        )

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        return _Norm(self._address(norm.weight), self._address(norm.bias), norm.eps)

    def _linear(self, linear: nn.Linear, *, gated: bool = False) -> _Matrix:
        return self._matrix(linear.weight, linear.bias, gated=gated)

    def _matrix(self, weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None, *, gated=False) -> _Matrix:
        n, k = weight.shape
        weight = weight.detach().contiguous()
        bias = None if bias is None else bias.detach().contiguous()
        matrix = _Matrix(weight.data_ptr(), None if bias is None else bias.data_ptr(), k, n, gated)
        memory = torch.empty(self.library.packed_floats(byref(matrix)))
        self.library.pack(byref(matrix), memory.data_ptr(), torch.get_num_threads())
        self.kept.append(memory)
        return matrix

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()


class _Head(NamedTuple):
    """Part of the head, and the ids its outputs stand for."""

    matrix: _Matrix
    ids: Int[Tensor, " n"]


class _BoundCache:
    """Where the keys and values of a cache lie."""

    def __init__(self, kv_cache: KVCache):
        self.kv_cache, self.starts = kv_cache, kv_cache.starts
        self.addresses = [
            (c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))
            for layers in (kv_cache.keys, kv_cache.values)
        ]
        row_stride, head_stride, slot_stride, channel_stride = kv_cache.keys[0].stride()
        assert (slot_stride, channel_stride) == (kv_cache.keys[0].shape[3], 1)
        self.batch = _Batch(
            starts=None if self.starts is None else self.starts.data_ptr(),
            keys=ctypes.addressof(self.addresses[0]),
            values=ctypes.addressof(self.addresses[1]),
            row_stride=row_stride,
            head_stride=head_stride,
        )

    def is_of(self, kv_cache: KVCache) -> bool:
        return self.kv_cache is kv_cache and self.starts is kv_cache.starts

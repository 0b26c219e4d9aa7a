"""Training steps on a CPU in a fraction of the time: loss and gradients from one native kernel (`native/train.cpp`).

`NativeLoss` gives what `models.slot_nll` gives, as one node of autograd's graph: gradients reach the parameters, their
hooks and what else the graph holds as usual. Products are in float32 on any processor, or in bfloat16 where it has
units for them, and are then rounded as autocast rounds them; residual stream, norms, softmax and sums stay in float32.
Results do not depend on the number of threads.

`make_native_loss` says whether it can take a model. The plain path is the oracle.

Letters: B batch, T tokens, n targets.
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from smalti import native
from smalti.models.config import FEED_FORWARDS
from smalti.models.decoder_only import DecoderOnly
from smalti.models.families import AnyModel
from smalti.models.loss import SlotTargets, check_full_head
from smalti.models.transformer import Block
from smalti.processor import multiplies_bfloat16
from smalti.sequences.layout import Slot

LONGEST = 512
"""Tokens of a sequence up to which attention, whose scores of one head are held at once, stays in the cache."""
WIDEST_HEAD = 512
EDGE = 32
"""Widths must be multiples of it: products are made of such blocks."""
POSITIONS = {"none": 0, "learned": 1, "sinusoidal": 2, "rotary": 3, "rotary_2d": 3}
_ALIGNMENT = 64

_Address = ctypes.c_void_p


class _Slot(ctypes.Structure):
    """`Slot` of native/train.cpp."""

    _fields_ = (
        ("num_targets", ctypes.c_int64),
        ("rows", _Address),
        ("local", _Address),
        ("num_ranges", ctypes.c_int64),
        ("ranges", _Address),
    )


class _Task(ctypes.Structure):
    """`Task` of native/train.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_layers", "width", "num_heads", "kv_heads", "wide", "activation")),
        *((name, ctypes.c_int64) for name in ("rms_norm", "positions", "num_sequences", "length", "token_stride")),
        *((name, ctypes.c_int64) for name in ("num_slots", "num_threads", "with_gradients")),
        ("norm_eps", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        *((name, _Address) for name in ("token_ids", "table", "slots", "parameters", "workspace")),
    )


def why_not(model: AnyModel, precision: str = "float32") -> str | None:
    """Everything that keeps the kernel from training this model here, in words and in one order; None if it can.

    `precision`, "float32" or "bfloat16", is that of the products."""
    if not isinstance(model, DecoderOnly):
        return f"it knows decoder-only models, not {type(model).__name__}"
    config = model.config.transformer
    widths = {"d_model": config.d_model, "d_ff": config.d_ff, "key-value width": config.kv_width}
    uneven = [f"{name} {width}" for name, width in widths.items() if width % EDGE]
    checks = {
        "it reads token ids, no features": model.config.feature_width is None,
        "the model is not on the CPU": model.device.type == "cpu",
        "the weights are not float32": all(weight.dtype == torch.float32 for weight in model.parameters()),
        "the processor has no bfloat16 products": precision != "bfloat16" or multiplies_bfloat16(),
        f"{', '.join(uneven)}: not a multiple of {EDGE}": not uneven,
        f"heads are wider than {WIDEST_HEAD}": config.head_dim <= WIDEST_HEAD,
        "the heads together are not as wide as d_model": config.q_width == config.d_model,
        f"sequences are longer than {LONGEST} tokens": config.max_length <= LONGEST,
        "queries and keys are normed": not config.qk_norm,
        "attention and feed-forward have norms within": not config.normformer,
        "the feed-forward is GEGLU": config.feed_forward != "geglu",
        "attention has dropout": not config.attention_dropout,
    }
    return "; ".join(reason for reason, fine in checks.items() if not fine) or None


def make_native_loss(model: AnyModel, precision: str = "float32") -> "NativeLoss | None":
    """The kernel for this model, compiled if it has not been yet; None where it does not fit or cannot be compiled."""
    if not isinstance(model, DecoderOnly) or why_not(model, precision) is not None:
        return None
    library = native.load(f"train_{precision}")
    return None if library is None else NativeLoss(model, library)


class NativeLoss:
    """`slot_nll` of one model."""

    def __init__(self, model: DecoderOnly, library: ctypes.CDLL):
        self.model, self.library = model, library
        library.smalti_train_bytes.restype = ctypes.c_int64
        self.workspace: Tensor | None = None
        """Buffers of the last backward pass: new memory costs as much time as what is done in it."""

    def __call__(
        self, token_ids: Int[Tensor, "B T"], targets: Sequence[SlotTargets], slots: Sequence[Slot]
    ) -> Float[Tensor, " n"]:
        """Nats of the targets, one slot after the other. Gradients can be taken once."""
        return _Nats.apply(_Call(self, token_ids, targets, slots), *self._parameters())  # pyright: ignore

    def _parameters(self) -> list[Tensor | None]:
        """In the order of native/train.cpp."""
        model, transformer = self.model, self.model.transformer
        learned = model.config.transformer.positions == "learned"
        found = [model.embed_tokens.weight, model.head_weight, transformer.positions.weight if learned else None]
        modules: list[Any] = [transformer.norm]
        for block in cast(Iterable[Block], transformer.blocks):
            attention, feed_forward = block.attention, block.feed_forward
            modules += [block.attention_norm, attention.qkv, attention.out]
            modules += [block.feed_forward_norm, feed_forward.up, feed_forward.down]
        return found + [tensor for module in modules for tensor in (module.weight, module.bias)]


class _Call:
    """A forward pass and its backward pass: the task, and the tensors that its addresses point to."""

    def __init__(self, loss: NativeLoss, token_ids: Tensor, targets: Sequence[SlotTargets], slots: Sequence[Slot]):
        self.loss, self.workspace = loss, None
        config, training = loss.model.config.transformer, loss.model.training
        if any(target.slot is None for target in targets):
            check_full_head(loss.model)
        every_id = ((0, loss.model.config.vocab_size),)
        self.token_ids = token_ids.contiguous()
        self.targets = [(target.rows.contiguous(), target.local.contiguous()) for target in targets]
        self.num_targets = sum(len(rows) for rows, _ in self.targets)
        self.ranges = [
            torch.tensor(every_id if target.slot is None else loss.model.head_rows(slots[target.slot]))
            for target in targets
        ]
        self.slots = (_Slot * len(targets))(
            *(
                _Slot(len(rows), rows.data_ptr(), local.data_ptr(), len(ranges), ranges.data_ptr())
                for (rows, local), ranges in zip(self.targets, self.ranges, strict=True)
            )
        )
        self.task = _Task(
            num_layers=config.num_layers,
            width=config.d_model,
            num_heads=config.num_heads,
            kv_heads=config.kv_heads,
            wide=config.d_ff,
            activation=FEED_FORWARDS.index(config.feed_forward),
            rms_norm=config.norm == "rms",
            positions=POSITIONS[config.positions],
            num_sequences=token_ids.shape[0],
            length=token_ids.shape[1] - 1,  # the last token is predicted only
            token_stride=token_ids.shape[1],
            num_slots=len(targets),
            num_threads=torch.get_num_threads(),
            norm_eps=config.norm_eps,
            dropout=config.dropout if training else 0.0,
            seed=int(torch.randint(2**62, ())) if config.dropout and training else 0,
            token_ids=self.token_ids.data_ptr(),
            table=loss.model.transformer.table.data_ptr() if POSITIONS[config.positions] > 1 else None,
            slots=ctypes.addressof(self.slots),
        )

    def forward(self, parameters: Sequence[Tensor | None], with_gradients: bool) -> Float[Tensor, " n"]:
        library, self.task.with_gradients = self.loss.library, with_gradients
        num_bytes = library.smalti_train_bytes(ctypes.byref(self.task)) + _ALIGNMENT
        self.workspace, self.loss.workspace = self.loss.workspace, None
        if self.workspace is None or len(self.workspace) < num_bytes:
            self.workspace = torch.empty(num_bytes, dtype=torch.uint8)
        self.task.workspace = -(-self.workspace.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        nats = torch.empty(self.num_targets)
        self._run(library.smalti_train_forward, parameters, nats.data_ptr())
        if not with_gradients:
            self.give_back()
        return nats

    def backward(self, parameters: Sequence[Tensor | None], nats_gradient: Float[Tensor, " n"]) -> list[Tensor | None]:
        if self.workspace is None:
            raise RuntimeError("gradients of a native loss can be taken once: call it again for others.")
        nats_gradient = nats_gradient.contiguous()
        sparse = 3  # embeddings, head and positions: only rows that occur are added to
        gradients = [None if p is None else torch.zeros_like(p) for p in parameters[:sparse]]
        gradients += [None if p is None else torch.empty_like(p) for p in parameters[sparse:]]
        to = _addresses(gradients)
        self._run(self.loss.library.smalti_train_backward, parameters, nats_gradient.data_ptr(), ctypes.addressof(to))
        self.give_back()
        return gradients

    def _run(self, function: Any, parameters: Sequence[Tensor | None], *addresses: int) -> None:
        found = _addresses(parameters)
        self.task.parameters = ctypes.addressof(found)
        function(ctypes.byref(self.task), *map(_Address, addresses))

    def give_back(self) -> None:
        self.loss.workspace, self.workspace = self.workspace, None


class _Nats(torch.autograd.Function):
    """The loss as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor | None) -> Float[Tensor, " n"]:
        ctx.call = call
        ctx.save_for_backward(*parameters)
        return call.forward(parameters, any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nats_gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return None, *ctx.call.backward(ctx.saved_tensors, nats_gradient)


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (_Address * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))

"""What a training step holds and computes, found by running the step itself on tensors without numbers.

The model is built and stepped under torch's `FakeTensorMode`: every operator runs with shapes alone. A count of the
storages that are alive gives memory, torch's flop counter the products. So whatever a model does is counted as it does
it, without a formula for each family; a deep model is run at two small depths, since layers are alike.

Letters: B rows of a micro-batch, T tokens, L layers.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.models.families import AnyModel, build_model
from smalti.models.loss import SlotTargets
from smalti.models.rar import RARConfig
from smalti.precision import BFLOAT16, FLOAT32, autocast
from smalti.sequences.layout import Layout, Packed, SpanValues
from smalti.training.distributed import recompute_activations
from smalti.training.token_model import (
    MicroBatch,
    NextTokenLoss,
    TrainConfig,
    draw_orders,
    joined,
    make_micro_batch,
    make_optimizer,
    rows_at_once,
)

DEPTHS = ("num_layers", "encoder_layers", "decoder_layers")
"""What configs call their numbers of layers."""
DEEPEST = 3
"""Layers of the models that are run in place of deeper ones."""
Shape = TransformerConfig | RARConfig | EncoderDecoderConfig


class Footprint(NamedTuple):
    """Of one process; bytes, and products of a micro-batch."""

    num_parameters: float
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    average_bytes: float
    """Of the weights' running average, if one is kept."""
    activations_bytes: float
    """What a micro-batch needs at most beside them, while gradients are summed up."""
    peak_bytes: float
    """At any moment of a step or of an evaluation. In a step of one micro-batch gradients grow while activations
    shrink, so it is less than all."""
    evaluation_bytes: float
    """At any moment of an evaluation."""
    flops: float
    """Of the forward and the backward pass of a micro-batch, without what is computed twice."""
    block_parameters: float
    """Of the largest layer."""
    in_blocks: float
    """Parameters of all layers."""

    @property
    def state_bytes(self) -> float:
        """What is held all the time: weights, optimizer, average, and gradients where they are accumulated."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.average_bytes

    def plus(self, more: "Footprint", less: "Footprint", times: float) -> "Footprint":
        """self + times · (more − less)."""
        return Footprint(*(own + times * (a - b) for own, a, b in zip(self, more, less, strict=True)))


class Task(NamedTuple):
    """A model's shape with what it is trained on, and how."""

    shape: Shape
    layout: Layout
    train: TrainConfig
    feature_width: int | None = None


def footprint(
    task: Task,
    num_rows: int,
    *,
    precision: str,
    sharded: bool = False,
    tensor_parallel: int = 1,
    recompute: bool = False,
    fused: bool = True,
) -> Footprint:
    """Of a step with micro-batches of `num_rows` sequences of full length, products in `precision`.

    `sharded` weights are gathered in the precision of the products, where others are copied into it and the copies
    held. With `tensor_parallel`, of one of so many processes that share each layer: it has its heads and its part of
    the feed-forward. `fused` attention keeps no scores, as on a GPU; without it they are held, as a CPU does in
    bfloat16.
    """
    task = task._replace(shape=_share(task.shape, tensor_parallel))
    how: Any = {"precision": precision, "sharded": sharded, "recompute": recompute, "fused": fused}
    depths = {name: getattr(task.shape, name) for name in DEPTHS if hasattr(task.shape, name)}
    if max(depths.values()) <= DEEPEST:
        return _run(task, num_rows, **how)
    shallow = dict.fromkeys(depths, DEEPEST - 1)
    first = found = _run(task._replace(shape=replace(task.shape, **shallow)), num_rows, **how)
    block_parameters = in_blocks = 0.0
    for name, depth in depths.items():
        deeper = _run(task._replace(shape=replace(task.shape, **(shallow | {name: DEEPEST}))), num_rows, **how)
        found = found.plus(deeper, first, depth - DEEPEST + 1)
        each = deeper.num_parameters - first.num_parameters
        block_parameters, in_blocks = max(block_parameters, each), in_blocks + depth * each
    return found._replace(block_parameters=block_parameters, in_blocks=in_blocks)


def _share(shape: Shape, num_processes: int) -> Any:
    """The shape of one process's part of every layer. Raises ValueError where heads or widths cannot be divided."""
    if num_processes == 1:
        return shape
    parts = {"num_heads": shape.num_heads, "d_ff": shape.d_ff}
    if isinstance(shape, TransformerConfig):
        parts["num_kv_heads"] = shape.kv_heads
    for name, value in parts.items():
        if value % num_processes:
            raise ValueError(f"{name} {value} is not divisible by {num_processes} processes that share a layer.")
    if not isinstance(shape, TransformerConfig):  # its heads are as wide as their number makes them
        return replace(shape, d_ff=shape.d_ff // num_processes)
    shared = {name: value // num_processes for name, value in parts.items()}
    return replace(shape, head_width=shape.head_dim, **shared)


def make_model(task: Task) -> AnyModel:
    """A fresh model of a task."""
    if isinstance(task.shape, RARConfig | EncoderDecoderConfig):
        return build_model(task.shape)
    full = task.train.full_softmax
    return new_model(task.layout, task.shape, full_head=full, feature_width=task.feature_width)


def _knows_starts(model: AnyModel, piece: MicroBatch) -> None:
    """Tells an encoder-decoder where its sequences' pictures begin: it would read that from the ids, which are none."""
    if isinstance(model, EncoderDecoder):
        start = piece.token_ids.shape[1] - model.config.num_codes - 1
        model._starts = lambda token_ids: [start] * len(token_ids)  # pyright: ignore


def example(task: Task, num_rows: int) -> MicroBatch:
    """A micro-batch of sequences of full length, each order with its share; all ids 0."""
    layout = task.layout
    weights = [order.weight for order in layout.orders.values()]
    orders = draw_orders(weights, num_rows, 0, 0)
    packed: list[Packed] = []
    for index, order in enumerate(layout.orders.values()):
        if not (count := int((orders == index).sum())):
            continue
        spans = {span.segment: _zeros(count, span.length) for span in order.spans}
        features = None
        if order.features is not None:
            spans = {name: values for name, values in spans.items() if name != order.features.segment}
            features = [torch.zeros(order.features.length, task.feature_width or 1)] * count
        packed.append(layout.pack(order.name, spans, features))
    return make_micro_batch(layout, joined(packed), full_softmax=task.train.full_softmax)


def _zeros(count: int, length: int) -> SpanValues:
    return SpanValues(torch.zeros(count, length, dtype=torch.long), torch.full((count,), length))


def _run(task: Task, num_rows: int, *, precision: str, sharded: bool, recompute: bool, fused: bool) -> Footprint:
    most = rows_at_once(task.layout)
    piece, evaluated = example(task, num_rows), example(task, min(most, task.train.evaluation_rows or most))
    gathered = sharded and precision == BFLOAT16
    with _fake(torch.bfloat16 if gathered else torch.float32) as fake:
        model, living, counter = make_model(task), _Living(), _counter()
        _knows_starts(model, piece)
        if gathered:
            precision = FLOAT32  # nothing is copied
        optimizer = make_optimizer(model, task.train, torch.device("cpu"))
        loss, piece, evaluated = NextTokenLoss(model, task.layout), _faked(piece, fake), _faked(evaluated, fake)
        with living, _attention(fused or precision != BFLOAT16):
            for tensor in (*model.parameters(), *model.buffers()):
                living.add(tensor)
            weights = living.num_bytes
            model.eval()
            with torch.no_grad():
                loss(evaluated.token_ids, evaluated.targets, None, evaluated.features)
            evaluation = living.most_bytes
            model.train()
            with counter, autocast("cpu", precision):
                loss(piece.token_ids, piece.targets, None, piece.features).sum().backward()
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.step()
            gc.collect()  # frames of the backward pass go round in circles
            state = living.num_bytes - weights - gradients
            if recompute:
                recompute_activations(model)

            def micro_batch() -> int:
                living.most_bytes = 0
                with autocast("cpu", precision):
                    loss(piece.token_ids, piece.targets, None, piece.features).sum().backward()
                return living.most_bytes

            step = micro_batch()  # beside the gradients of the one before, which are there from its beginning
            activations = step - weights - state - gradients
            living.most_bytes = 0
            optimizer.step()
            update = living.most_bytes
            if task.train.num_micro_batches == 1:
                optimizer.zero_grad(set_to_none=True)
                step = micro_batch()
            step = max(step, update)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = 4 * num_parameters / sum(p.nbytes for p in model.parameters())  # what is stored is float32
    weights, gradients, state = weights * whole, gradients * whole, state * whole
    average = weights if task.train.ema_decay else 0
    peak = average + max(step, evaluation + state)
    return Footprint(
        num_parameters=num_parameters,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=state,
        average_bytes=average,
        activations_bytes=activations,
        peak_bytes=peak,
        evaluation_bytes=average + evaluation + state,
        flops=counter.get_total_flops(),
        block_parameters=0.0,
        in_blocks=0.0,
    )


@contextmanager
def _fake(dtype: torch.dtype) -> Iterator[FakeTensorMode]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            yield fake
    finally:
        torch.set_default_dtype(before)


def _counter() -> FlopCounterMode:
    """torch's, with the attention of CPUs, which it leaves out: all T × T scores, as it counts that of GPUs."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


@contextmanager
def _attention(fused: bool) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if fused else SDPBackend.MATH):
        yield


def _faked(piece: MicroBatch, fake: FakeTensorMode) -> MicroBatch:
    def of(tensor: Tensor) -> Tensor:
        return cast(Tensor, fake.from_tensor(tensor))

    targets = [SlotTargets(target.slot, of(target.rows), of(target.local)) for target in piece.targets]
    features = None if piece.features is None else of(piece.features)
    return piece._replace(token_ids=of(piece.token_ids), targets=targets, features=features)


class _Living(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.most_bytes = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.num_bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.num_bytes += size
        self.most_bytes = max(self.most_bytes, self.num_bytes)

"""The training loop of the token models, one story from top to bottom.

The loss is the mean of −ln p over the *counted* predicted positions of a batch, in nats per token: all but the first
token of a sequence, padding, and what the layout writes in parentheses. A marker that can only be itself is counted and
costs 0. Every digits sequence counts 57: 49 of the picture, 6 of the caption, 2 markers, of which only the first costs.

Everything random is a function of (seed, step): which rows a batch holds, in which order each is laid out, what dropout
drops. So a step number, the weights and the optimizer are all that a run needs to go on as if it had never stopped.

Letters: B batch, T tokens, n counted positions that cost something, P parts, F features at most of a row, C channels.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smalti.data.featured_pairs import FeaturedPairs
from smalti.data.loader import prefetch, step_rows
from smalti.data.tokens import TokenBatch
from smalti.devices import choose_device
from smalti.engine.executors import native as native_decode
from smalti.errors import InputError, require_finite
from smalti.likelihood import Likelihood, evaluate_nll
from smalti.models.base import SequenceModel
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.models.families import AnyModel, build_model
from smalti.models.loss import SlotTargets, slot_nll, slot_targets, token_nll
from smalti.models.rar import RAR, RARConfig
from smalti.precision import (
    AUTO,
    FLOAT32,
    check_precision,
    compute_precision,
    resolve_precision,
)
from smalti.processor import separate_compile_cache
from smalti.sequences.layout import NO_SLOT, PARTS, Layout, Marker, Order, Packed, Span, SpanValues
from smalti.sequences.vocabulary import SPECIAL, Vocabulary
from smalti.training.adafactor import Adafactor
from smalti.training.checkpoint import (
    Checkpoint,
    check_writable,
    latest_checkpoint,
    load_checkpoint,
    run_lock,
    save_checkpoint,
)
from smalti.training.curves import Curves
from smalti.training.distributed import (
    NONE,
    SHARDINGS,
    Processes,
    blocks_of,
    gradients_kept_back,
    make_processes,
    others_alive,
    processes,
    recompute_activations,
)
from smalti.training.estimate import Estimate, Length, why_slow
from smalti.training.muon import Muon, Optimizers
from smalti.training.native_loss import NativeLoss, make_native_loss, why_not
from smalti.training.run import (
    Run,
    require_finite_weights,
    scheduled,
    set_learning_rate,
    training_stage,
    update_average,
)
from smalti.training.settings import check_ranges

if TYPE_CHECKING:
    from smalti.training.parallel import Shares

SCHEDULES = ("constant", "cosine", "exponential")
OPTIMIZERS = ("adamw", "muon", "adafactor")
EVALUATION_BATCH_SIZE = 256
EVALUATION_LOGITS = 2**28
"""Numbers that an evaluation holds of them at once at most: a gigabyte."""
CHECKPOINTS, BEST = "checkpoints", "best"
COMPILE_FROM_TOKENS = 10_000_000
"""Tokens a training must have for compiling to pay off: some minutes' worth on two cores, at the digits' size."""
NATIVE_FROM_TOKENS = 200_000
"""Tokens a training must have for the native kernel to be taken: compiling it takes as long as they would without."""
STAGE = "transformer"
MEND = (
    "Start the run again from the last checkpoint or anew with a lower learning_rate, a longer warm-up or "
    "max_grad_norm=1."
)
LOG_EVERY = 50
"""Steps between fetches of the losses from the device."""

_log = logging.getLogger(__name__)


class TokenPairs(Protocol):
    """Rows of picture and caption tokens by number: a `TokenTable`, `TokenArrays`, or a `TokenStream` by its places."""

    def __len__(self) -> int: ...
    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch: ...


Sampler = Callable[[AnyModel, int], None]
"""What may look at the model on its way, with the number of updates made; it leaves the model as it was."""


@dataclass(frozen=True)
class TokenArrays:
    """Pairs in memory, all pictures of one length and all captions of one length; numbers count from 0."""

    image_tokens: Integer[np.ndarray, "N L"]
    text_tokens: Integer[np.ndarray, "N Lt"]

    def __len__(self) -> int:
        return len(self.image_tokens)

    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch:
        image, text = self.image_tokens[rows].astype(np.int64), self.text_tokens[rows].astype(np.int64)
        return TokenBatch(
            image, np.full(len(rows), image.shape[1]), text, np.full(len(rows), text.shape[1], dtype=np.int64)
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Raises ValueError for a number out of range."""

    num_epochs: float | None = None
    """Length of the training in passes over the rows; give this or `num_steps`."""
    num_steps: int | None = None
    """Length of the training in updates of the weights."""
    batch_size: int = 32
    """Sequences per update, over all processes and micro-batches together."""
    num_micro_batches: int = 1
    """Pieces in which each process takes its share of a batch, to save memory; gradients are accumulated."""
    optimizer: str = "adamw"
    """`adamw`, or `muon`: Muon (`smalti.training.muon`) for the matrices of the blocks, AdamW for embeddings, head,
    norms and biases, both at `learning_rate` and `weight_decay`; or `adafactor` (`smalti.training.adafactor`), which
    needs a quarter of AdamW's memory."""
    learning_rate: float = 1e-3
    schedule: str = "constant"
    """After the warm-up: "constant", or "cosine" down to `final_share` of the learning rate at the last step, or
    "exponential" down to it from the share `decay_from` of the training on."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly."""
    final_share: float = 0.1
    decay_from: float = 0.0
    """Share of the training up to which the schedule "exponential" is constant (Parti: 85,000 of 450,000 updates)."""
    weight_decay: float = 0.0
    """AdamW's (arXiv:1711.05101), on tensors of two or more dimensions; at 0 this is Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None
    """Gradients of a larger norm are scaled down to it; None: never."""
    ema_decay: float = 0.0
    """Of the average of the weights that is evaluated and returned; it starts lower, min(decay, (1 + s) / (10 + s)) at
    step s. 0: no average."""
    sharding: str = NONE
    """Under `torchrun`: "none", every process has all weights, or "full", every process has a share of weights,
    gradients and optimizer, and gathers a layer while it computes it (FSDP2). A run may go on with the other."""
    tensor_parallel: int = 1
    """Neighbouring processes that compute every layer together, each with some heads and a part of the feed-forward:
    for layers that are too large for one device, within a machine. It implies sharding."""
    precision: str = AUTO
    """Of products: "float32", "bfloat16" (weights and optimizer stay in float32), or "auto", bfloat16 where the
    hardware multiplies in it."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping its activations (activation checkpointing): a
    third more work, and memory for the activations of one block."""
    compile: bool | None = None
    """Pass the model through `torch.compile`. None: where training is long enough for a minute or two of compiling to
    pay off."""
    full_softmax: bool = False
    """Take the softmax over the whole vocabulary instead of what can stand at a position, for comparison."""
    dropout_from: float = 0.0
    """Share of the training behind which the model's dropout begins. Late dropout (arXiv:2303.01500) regularises as
    well, and leaves what is hard to find undisturbed until it is found."""
    token_dropout: float = 0.0
    """Share of the input tokens, markers apart, that are replaced by random ones of their segment while training; what
    is to be predicted stays. It keeps the model from relying on any one token of its context."""
    caption_dropout: float = 0.0
    """Share of the captions left empty where a caption comes before its picture, and of the labels that are the null
    label: so the model also learns pictures without one, which guidance needs."""
    permuted: tuple[float, float] | None = None
    """Of a RAR: up to the first share of the training every picture is visited in an order of its own, from the second
    on all are in raster order, and between them fewer and fewer (arXiv:2411.00776, §3.3). None: always raster."""
    patience: int | None = None
    """Stop after so many evaluations without a lower validation loss, and return the weights of the lowest instead of
    the last. None: never stop early, return the last."""
    seed: int = 0
    evaluation_rows: int | None = None
    """Validation rows evaluated before training and after every epoch; None: all."""
    checkpoint_every: int = 1000
    """Updates between checkpoints."""
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if (self.num_epochs is None) == (self.num_steps is None):
            given = f"num_epochs is {self.num_epochs} and num_steps {self.num_steps}"
            raise ValueError(f"{given}; give one of them and not both: the other is null.")
        check_precision(self.precision)
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        check_ranges(
            self,
            positive="num_epochs num_steps batch_size num_micro_batches tensor_parallel learning_rate max_grad_norm "
            "patience evaluation_rows checkpoint_every keep_checkpoints",
            not_negative="warmup_steps weight_decay seed",
            below_one="ema_decay dropout_from decay_from token_dropout caption_dropout betas",
            shares="final_share permuted",
        )
        if self.optimizer != "adamw" and (self.sharding != NONE or self.tensor_parallel > 1):
            raise ValueError(
                f"optimizer is {self.optimizer}, which looks at whole matrices, and sharding gives each process a "
                "share of them; use adamw, or sharding none with tensor_parallel 1."
            )
        if self.permuted is not None and self.permuted[0] > self.permuted[1]:
            raise ValueError(f"permuted is {self.permuted}; the first share must not be above the second.")

    @property
    def length(self) -> Length:
        """The setting that says how long is trained."""
        if self.num_steps is not None:
            return Length("train.num_steps", self.num_steps)
        assert self.num_epochs is not None
        return Length("train.num_epochs", self.num_epochs)

    def steps(self, num_rows: int) -> int:
        """Updates in all, for this many rows."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return math.ceil(self.num_epochs * num_rows / self.batch_size)


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Of the update after `step` updates, the last of which has the lowest."""
    if config.schedule == "exponential" and step >= config.warmup_steps:
        first = config.decay_from * num_steps
        progress = max(0.0, step - first) / (num_steps - first)
        return config.learning_rate * config.final_share**progress
    return scheduled(
        step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        final_share=1.0 if config.schedule == "constant" else config.final_share,
        lowest_at=num_steps - 1,
    )


# ---- batches ----


class MicroBatch(NamedTuple):
    """What one forward and backward pass takes."""

    token_ids: Int[Tensor, "B T"]
    targets: list[SlotTargets]
    parts: Int[Tensor, " n"]
    """Which part each target belongs to, as an index into `part_names`."""
    counts: Int[Tensor, " P"]
    """Counted positions of each part, those that cost nothing included; stays on the CPU."""
    positions: Int[Tensor, "B T"] | None = None
    """Where each token stands, if pictures are not all visited in raster order."""
    features: Float[Tensor, "B F C"] | None = None
    """What stands in place of the first tokens, if sequences begin with features."""

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        moved = [SlotTargets(t.slot, t.rows.to(device), t.local.to(device)) for t in self.targets]
        positions = None if self.positions is None else self.positions.to(device)
        features = None if self.features is None else self.features.to(device)
        return MicroBatch(self.token_ids.to(device), moved, self.parts.to(device), self.counts, positions, features)


def part_names(layout: Layout) -> list[str]:
    """What the loss is split into: one part for each segment of the vocabulary."""
    return [PARTS.get(name, name) for name in layout.vocabulary.segments]


def draw_orders(weights: Sequence[float], num_rows: int, seed: int, step: int) -> Int[np.ndarray, " rows"]:
    """Which order each row of a step's batch is laid out in, ascending: the first rows have the first order.

    Systematic sampling: num_rows points, evenly spaced behind one random offset, fall into intervals as long as the
    weights. So every order gets its share of every batch rounded down or up (two equal orders get exactly half
    each of an even batch) and exactly its share on average.
    """
    ends = np.cumsum(weights) / np.sum(weights)
    offset = np.random.default_rng([seed, step, 0]).random()
    return np.searchsorted(ends[:-1], (np.arange(num_rows) + offset) / num_rows, side="right")


def pack_rows(
    layout: Layout,
    pairs: TokenPairs,
    rows: Integer[np.ndarray, " n"],
    orders: Integer[np.ndarray, " n"],
    uncaptioned: Bool[np.ndarray, " n"] | None = None,
) -> Packed:
    """Sequences of these rows, each in its order (an index into `layout.orders`), which must ascend. Of the rows that
    are `uncaptioned`, those with the caption before the picture have an empty one, those with a label the null label.
    Labels stand in the rows' `text_tokens`, one in each. Where sequences begin with features, `pairs` have them."""
    packed = []
    for index, order in enumerate(layout.orders):
        chosen = rows[orders == index]
        if len(chosen):
            image, image_lengths, text, text_lengths = map(torch.from_numpy, pairs.batch(chosen))
            features = None
            if layout[order].features is not None:
                assert isinstance(pairs, FeaturedPairs)
                features = pairs.features(chosen, None if uncaptioned is None else uncaptioned[orders == index])
            elif uncaptioned is not None and _has_label(layout[order]):
                null = layout.vocabulary["label"].size - 1
                text = text.masked_fill(torch.from_numpy(uncaptioned[orders == index])[:, None], null)
            elif uncaptioned is not None and _may_lack_caption(layout[order]):
                text_lengths = text_lengths.masked_fill(torch.from_numpy(uncaptioned[orders == index]), 0)
            beside = SpanValues(text, text_lengths)
            spans = {"image": SpanValues(image, image_lengths), "text": beside, "label": beside}
            given = {s.segment: spans[s.segment] for s in layout[order].spans if s.segment in spans}
            packed.append(layout.pack(order, given, features))
    return joined(packed)


def _has_label(order: Order) -> bool:
    return any(span.segment == "label" for span in order.spans)


def _may_lack_caption(order: Order) -> bool:
    """Whether a caption of open length, its features, or a label come before the picture."""
    return (
        _has_label(order)
        or order.features is not None
        or ([span.segment for span in order.spans] == ["text", "image"] and order.spans[0].end is not None)
    )


def joined(packed: Sequence[Packed]) -> Packed:
    """Packed batches one below the other, padded to the longest. Features have layouts of one order."""
    if len(packed) == 1:
        return packed[0]
    length = max(batch.token_ids.shape[1] for batch in packed)
    padded = [
        [nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill) for tensor in tensors]
        for fill, tensors in zip((0, NO_SLOT, False), zip(*(one[:3] for one in packed), strict=True), strict=True)
    ]
    return Packed(*map(torch.cat, padded))


def make_micro_batch(layout: Layout, packed: Packed, *, full_softmax: bool) -> MicroBatch:
    """Targets by slot, and the part of each, in the order in which `slot_nll` gives their nats."""
    targets = slot_targets(packed, layout.slots, full_softmax=full_softmax)
    ends = torch.tensor([segment.end for segment in layout.vocabulary.segments.values()])
    parts = torch.bucketize(packed.token_ids, ends, right=True)
    rows = torch.cat([target.rows for target in targets])
    counts = torch.bincount(parts[packed.counted], minlength=len(ends))
    return MicroBatch(packed.token_ids, targets, parts[:, 1:].flatten()[rows], counts, features=packed.features)


def micro_batches(
    layout: Layout,
    pairs: TokenPairs,
    config: TrainConfig,
    *,
    start_step: int,
    rank: int,
    world_size: int,
    num_steps: int | None = None,
) -> Iterator[list[MicroBatch]]:
    """For each step from `start_step` on, without end, this process's share of the batch.

    Of the pieces that a batch falls into, one for each process and micro-batch, piece i takes the rows i, i + pieces,
    i + 2 pieces ..., so that each has its share of every order, and a layout of fixed length gives equal shapes.
    """
    weights = [order.weight for order in layout.orders.values()]
    num_pieces = world_size * config.num_micro_batches
    for step, rows in enumerate(step_rows(pairs, config.batch_size, config.seed, start_step), start_step):
        orders = draw_orders(weights, len(rows), config.seed, step)
        uncaptioned = None
        if config.caption_dropout:
            uncaptioned = np.random.default_rng([config.seed, step, 3]).random(len(rows)) < config.caption_dropout
        permutations = None
        if config.permuted is not None:
            share = permuted_share(step, num_steps or config.steps(len(pairs)), config.permuted)
            permutations = draw_permutations(layout, len(rows), share, config.seed, step)
        pieces = []
        for piece in range(rank, num_pieces, world_size):
            empty = None if uncaptioned is None else uncaptioned[piece::num_pieces]
            packed = pack_rows(layout, pairs, rows[piece::num_pieces], orders[piece::num_pieces], empty)
            positions = None if permutations is None else permutations[piece::num_pieces]
            if positions is not None:
                packed = packed._replace(token_ids=packed.token_ids.gather(1, positions))
            made = make_micro_batch(layout, packed, full_softmax=config.full_softmax)
            if config.token_dropout:  # the targets are made: only what the model reads is changed
                uniforms = _dropout_uniforms(layout, config, step)[piece::num_pieces]
                made = made._replace(
                    token_ids=drop_tokens(layout.vocabulary, made.token_ids, config.token_dropout, uniforms)
                )
            pieces.append(made._replace(positions=positions))
        yield pieces


def permuted_share(step: int, num_steps: int, between: tuple[float, float]) -> float:
    """Share of the pictures that are visited in an order of their own at a step (RAR, §3.3)."""
    first, last = (share * num_steps for share in between)
    if step < first:
        return 1.0
    return 0.0 if step >= last else (last - step) / (last - first)


def draw_permutations(layout: Layout, num_rows: int, share: float, seed: int, step: int) -> Int[Tensor, "B T"] | None:
    """For each row of a step's batch the position that is visited at each place: what comes before the picture as it
    is, and then the picture's cells, in raster order or any other. None: all in raster order."""
    if share == 0:
        return None
    length = next(iter(layout.orders.values())).span("image").length
    generator = np.random.default_rng([seed, step, 4])
    chosen = generator.random(num_rows) < share
    ranks = np.where(chosen[:, None], generator.random((num_rows, length)), np.arange(length))
    before = layout.max_length - length
    ahead = np.broadcast_to(np.arange(before), (num_rows, before))
    return torch.from_numpy(np.concatenate((ahead, before + ranks.argsort(1, kind="stable")), axis=1))


def _dropout_uniforms(layout: Layout, config: TrainConfig, step: int) -> Float[Tensor, "B T 2"]:
    """Two uniform numbers for every token of a step's batch, the same however the batch is cut into pieces."""
    generator = np.random.default_rng([config.seed, step, 2])
    return torch.from_numpy(generator.random((config.batch_size, layout.max_length, 2)))


def drop_tokens(
    vocabulary: Vocabulary, token_ids: Int[Tensor, "B T"], share: float, uniforms: Float[Tensor, "B T_max 2"]
) -> Int[Tensor, "B T"]:
    """The tokens, but where the first uniform number is below `share` a random one of the same segment, which the
    second picks. Specials stay; padding may change, which nothing reads."""
    chances, picks = uniforms[:, : token_ids.shape[1]].unbind(-1)
    found = token_ids
    for segment in vocabulary.segments.values():
        if segment.name != SPECIAL:
            inside = (token_ids >= segment.offset) & (token_ids < segment.end) & (chances < share)
            found = torch.where(inside, segment.offset + (picks * segment.size).long(), found)
    return found


# ---- one step ----


class NextTokenLoss(nn.Module):
    """The nats of a micro-batch's targets, as a module, so that it can be compiled and wrapped."""

    def __init__(self, model: AnyModel, layout: Layout, native: NativeLoss | None = None):
        super().__init__()
        self.model, self.slots, self.native = model, layout.slots, native

    def forward(
        self,
        token_ids: Int[Tensor, "B T"],
        targets: list[SlotTargets],
        positions: Int[Tensor, "B T"] | None = None,
        features: Float[Tensor, "B F C"] | None = None,
    ) -> Float[Tensor, " n"]:
        if self.native is not None:
            return self.native(token_ids, targets, self.slots)
        return slot_nll(self.model, token_ids, targets, self.slots, positions, features)

    def packed_nll(self, packed: Packed) -> Float[Tensor, "B T"]:
        """`token_nll` of whole sequences, for evaluations."""
        return token_nll(self.model, packed, self.slots)


@dataclass(kw_only=True)
class TrainState:
    """What must survive a restart: exactly what a checkpoint holds."""

    step: int
    """Updates made."""
    model: AnyModel
    averaged: AnyModel | None
    optimizer: torch.optim.Optimizer | Optimizers
    evaluations: dict[int, float] = field(default_factory=dict)
    """Validation nats per token by step, in the order of the steps."""
    shares: "Shares | None" = None
    """How the model, and likewise the average, lies in shares; None: this process has all of it."""
    averaged_shares: "Shares | None" = None
    plain_names: list[list[str]] = field(default_factory=list)
    """Of the plain model's parameters, by optimizer, where the model lies in shares."""

    @property
    def best_step(self) -> int:
        """The first step with the lowest validation loss."""
        return min(self.evaluations, key=lambda step: (self.evaluations[step], step))

    def has_stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations all came after the best."""
        if patience is None or not self.evaluations:
            return False
        return sum(step > self.best_step for step in self.evaluations) >= patience

    @property
    def trained(self) -> AnyModel:
        """The model that is evaluated and returned."""
        return self.averaged or self.model

    @property
    def num_bytes(self) -> int:
        """About the size of a checkpoint: weights, Adam's two moments, perhaps the average, each in 4 bytes."""
        return self.model.num_parameters * 4 * (4 if self.averaged else 3)

    def whole_weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Of the model that is evaluated and returned, gathered from all processes where they lie in shares; if not
        `keep`, for the others alone."""
        shares = self.averaged_shares or self.shares
        return self.trained.state_dict() if shares is None else shares.whole(keep=keep)

    def save(self, run: Run, keep: int) -> None:
        """Of a state in shares all processes call it, of another the first alone."""
        if self.shares is not None:
            from smalti.training.sharded_state import tensors_of

            tensors = tensors_of(self.model, self.averaged, self.optimizer)
            run.save_shards(self.step, tensors, {"evaluations": self.evaluations}, self.shares.processes, keep=keep)
            return
        state = {"optimizer": self.optimizer.state_dict(), "evaluations": self.evaluations}
        if self.averaged:
            state["model"] = self.model.state_dict()
        run.save(self.step, self.trained.state_dict(), state, keep=keep)

    def load(self, checkpoint: Checkpoint) -> None:
        self.step, weights, state, where = checkpoint
        self.evaluations = state.get("evaluations", {})
        if self.shares is not None or where is not None:
            from smalti.training.sharded_state import read_into_shares, read_whole

            if self.shares is None:
                assert where is not None
                read_whole(where, self.model, self.averaged, self.optimizer)
            else:
                parts = self.model, self.averaged, self.optimizer
                read_into_shares(checkpoint, *parts, self.shares, self.plain_names)
            return
        self.trained.load_state_dict(weights)
        if self.averaged:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(model: AnyModel, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer | Optimizers:
    """AdamW, or Muon and AdamW beside it, or Adafactor, as `config.optimizer` says."""
    muon = config.optimizer == "muon"
    matrices = [p for p in _block_parameters(model) if p.ndim == 2] if muon else []
    taken = set(matrices)
    others = [parameter for parameter in model.parameters() if parameter not in taken]
    decayed = [parameter for parameter in others if parameter.ndim >= 2]
    plain = [parameter for parameter in others if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=config.learning_rate, betas=config.betas)
    # Fused, in one pass over memory: a third of the time of the other ways on a CPU.
    fused = device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)
    if not muon:
        return adamw
    return Optimizers(Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay), adamw)


def _block_parameters(model: AnyModel) -> Iterator[Tensor]:
    if isinstance(model, RAR):
        return model.blocks.parameters()
    stacks = (model.encoder, model.decoder) if isinstance(model, EncoderDecoder) else (model.transformer,)
    return chain.from_iterable(stack.blocks.parameters() for stack in stacks)


def with_choices(
    config: TrainConfig,
    layout: Layout,
    num_steps: int,
    device: torch.device,
    *,
    parameters_dtype: torch.dtype,
    begun: str | None = None,
) -> TrainConfig:
    """The config with `precision` and `compile` decided, if they were left open, by device, dtype, layout and length,
    and the precision by what an earlier start of the run has `begun` in."""
    precision, compiled = config.precision, config.compile
    if precision == AUTO and begun is None and parameters_dtype != torch.float32:
        precision = FLOAT32  # as the weights are
    precision = resolve_precision(precision, device, begun=begun)
    if compiled is None:
        # Batches whose length varies are compiled anew, or for any shape, which gains little.
        long_enough = num_steps * config.batch_size * layout.max_length >= COMPILE_FROM_TOKENS
        compiled = layout.is_fixed and long_enough and (device.type == "cuda" or _has_cpp_compiler())
    return replace(config, precision=precision, compile=compiled)


def _has_cpp_compiler() -> bool:
    """Whether torch.compile can work on the CPU: it writes C++."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def make_loss(
    model: AnyModel, layout: Layout, asked: TrainConfig, chosen: TrainConfig, num_steps: int
) -> NextTokenLoss:
    """The loss by the native kernel where it covers the model and the run is long enough, else compiled if so chosen.

    Only what a run that goes on finds again decides, so that it takes the same path.
    """
    native = None
    many = num_steps * chosen.batch_size * layout.max_length >= NATIVE_FROM_TOKENS
    if not asked.compile and not asked.recompute and many:
        native = make_native_loss(model, chosen.precision)
        if native is not None:
            native_decode.load()  # who trains for so long draws from the model next, in jobs too short to compile it
    loss = NextTokenLoss(model, layout, native)
    compiled = bool(chosen.compile) and native is None
    path = "the native kernel" if native else "torch.compile" if compiled else "torch, operator by operator"
    _log.info("training by %s in %s", path, chosen.precision)
    if not compiled:
        return loss
    separate_compile_cache()
    return cast(NextTokenLoss, torch.compile(loss))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Sets torch's generators, which dropout draws from, by the step alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, 1, rank]).generate_state(1, np.uint64)[0]))


# ---- evaluation ----


def rows_at_once(layout: Layout) -> int:
    """Sequences that are evaluated together."""
    widest = max(slot.size for slot in layout.slots)
    return max(1, min(EVALUATION_BATCH_SIZE, EVALUATION_LOGITS // (layout.max_length * widest)))


def evaluate(
    model: SequenceModel,
    layout: Layout,
    pairs: TokenPairs,
    num_rows: int,
    *,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    packed_nll: Callable[[Packed], Float[Tensor, "B T"]] | None = None,
) -> dict[str, float | None]:
    """Nats per counted token, in all and by part, of the first `num_rows` pairs, each in every order.

    Orders count by their weight. In float32 and over slots, whatever the training does; by `packed_nll` where the
    weights lie in shares, in the precision that they are gathered in.
    """
    names = ["total", *part_names(layout)]
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # nats, tokens
    at_once, rank, size = rows_at_once(layout), processes.data_rank, processes.data_size
    for index, order in enumerate(layout.orders.values()):
        batches = _evaluation_batches(layout, pairs, num_rows, index, rank, size)
        found = evaluate_nll(model, layout, batches, packed_nll)
        if packed_nll is not None:  # which gathers weights from all processes: each calls it as often
            own, most = (len(range(first * at_once, num_rows, size * at_once)) for first in (rank, 0))
            if own < most:
                (again,) = _evaluation_batches(layout, pairs, 1, index)
                evaluate_nll(model, layout, [again] * (most - own), packed_nll)
        for column, name in enumerate(names):
            if name in found:
                sums[0, column] += order.weight * found[name].total_nats
                sums[1, column] += order.weight * found[name].num_tokens
    nats, tokens = processes.summed(sums.to(model.device)).tolist()
    means = [n / t if t else None for n, t in zip(nats, tokens, strict=True)]
    return dict(zip(curve_columns(layout), means, strict=True))


def _evaluation_batches(
    layout: Layout,
    pairs: TokenPairs,
    num_rows: int,
    order: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    captioned: bool = True,
) -> Iterator[Packed]:
    at_once = rows_at_once(layout)
    for start in range(rank * at_once, num_rows, world_size * at_once):
        rows = np.arange(start, min(start + at_once, num_rows))
        uncaptioned = None if captioned else np.ones(len(rows), dtype=bool)
        packed = pack_rows(layout, pairs, rows, np.full(len(rows), order), uncaptioned)
        yield packed._replace(slot_ids=torch.where(packed.counted, packed.slot_ids, NO_SLOT))


def nats_by_order(
    model: SequenceModel, layout: Layout, pairs: TokenPairs, num_rows: int, *, captioned: bool = True
) -> dict[str, dict[str, Likelihood]]:
    """Likelihood of the counted tokens of the first `num_rows` pairs by order and part. If not `captioned`, only of the
    orders in which a caption of open length comes before the picture, with the caption left empty."""
    found = {}
    for index, order in enumerate(layout.orders.values()):
        if captioned or _may_lack_caption(order):
            found[order.name] = evaluate_nll(
                model, layout, _evaluation_batches(layout, pairs, num_rows, index, captioned=captioned)
            )
    return found


def curve_columns(layout: Layout) -> list[str]:
    return ["nats_per_token", *part_names(layout)]


# ---- the loop ----


class LossLog:
    """Losses by minibatch: kept on the device, fetched together every LOG_EVERY steps, so that no step waits."""

    def __init__(self, layout: Layout, num_rows: int, config: TrainConfig, processes: Processes):
        self.columns = curve_columns(layout)
        self.epochs_per_step = config.batch_size / num_rows
        self.processes = processes
        self.nats: list[Float[Tensor, " P"]] = []
        self.counts: list[Int[Tensor, " P"]] = []

    def add(self, nats: Float[Tensor, " P"], counts: Int[Tensor, " P"]) -> None:
        """One step's sum of nats, and number of counted positions, by part."""
        self.nats.append(nats)
        self.counts.append(counts)

    def fetch(self, step: int, curves: Curves | None) -> float | None:
        """Moves what was added before `step` to the curves; returns the last loss. Raises InputError if one is not
        finite."""
        if not self.nats:
            return None
        nats = torch.stack(self.nats).double()
        counts = torch.stack(self.counts).to(nats)
        nats, counts = self.processes.summed(torch.stack((nats, counts))).cpu()
        first = step - len(nats)
        self.nats.clear()
        self.counts.clear()
        means = torch.cat((nats.sum(1, keepdim=True), nats), 1) / torch.cat((counts.sum(1, keepdim=True), counts), 1)
        for index, loss in enumerate(means[:, 0].tolist()):
            require_finite(loss, first + index, MEND)
            if curves is not None:
                values = [None if math.isnan(value) else value for value in means[index].tolist()]
                at = first + index
                curves.add("train", at, at * self.epochs_per_step, dict(zip(self.columns, values, strict=True)))
        return float(means[-1, 0])


class Pace:
    """Tokens per second since the last `restart`: only while steps are made, not while something else is."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.num_tokens, self._started_at = 0, time.perf_counter()

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / (time.perf_counter() - self._started_at)


def train_model(
    model: AnyModel | TransformerConfig | RARConfig | EncoderDecoderConfig,
    layout: Layout,
    train: TokenPairs,
    validation: TokenPairs,
    config: TrainConfig,
    directory: Path | str,
    *,
    resume: bool = True,
    device: torch.device | str | None = None,
    sampler: Sampler | None = None,
    sample_every: int = 1000,
    show_progress: bool = True,
    estimate: Estimate | None = None,
) -> AnyModel:
    """Trains a model, or a fresh one of this shape, on pairs packed by the layout; returns it, averaged if so asked.

    `directory` gets `checkpoints/`, `curves.csv`, `curves.png` and `tensorboard/`, and `best/` if the run may stop
    early. A run found there goes on from its last checkpoint and ends with the weights it would have had without the
    stop. Under `torchrun` all processes work on shares of the same batches. `device` None is "auto" (`smalti.devices`).
    `sampler` is shown the model every `sample_every` updates, before the first and after the last. `estimate` says
    early how long a recipe takes in all, if progress is shown.

    Raises InputError if the folder cannot be written or holds a run with other settings (any run, if not `resume`),
    or if the loss is not finite; ValueError if batches cannot be divided or the layout counts nothing.
    """
    directory = Path(directory)
    with processes() as (rank, world_size), ExitStack() as stack:
        # The run and its model.
        device = choose_device("auto" if device is None else device)
        divided: Any = {"sharding": config.sharding, "tensor_parallel": config.tensor_parallel}
        team = make_processes(rank, world_size, device, **divided)
        _check_task(layout, train, validation, config, team.data_size)
        num_steps = config.steps(len(train))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(run_lock(directory, rank))
        stack.enter_context(others_alive(team, partial(_last_checkpoint, directory)))
        run = Run(directory / CHECKPOINTS)
        # Of a model in shares no process's device need hold all of it.
        model, asked = _ready_model(model, layout, config, run, device if team.mesh is None else None), config
        dtype = next(model.parameters()).dtype
        config = with_choices(config, layout, num_steps, device, parameters_dtype=dtype, begun=run.precision)
        averaged = deepcopy(model).eval() if config.ema_decay else None
        if team.mesh is None:
            loss_module, packed_nll = make_loss(model, layout, asked, config, num_steps), None
            why = partial(_why_slow, model, asked, config, loss_module)
            if world_size > 1:
                loss_module = DistributedDataParallel(loss_module)
            optimizer = make_optimizer(model, config, device)
            state = TrainState(step=0, model=model, averaged=averaged, optimizer=optimizer)
        else:
            state, loss_module, packed_nll = _shared_out(model, averaged, layout, asked, config, team, device)
            why = partial(why_slow, config.precision, device)

        # Where it goes on.
        if run.found is not None and not resume:
            raise InputError(f"{directory} holds a run already: resume it, or give a new folder.")
        data = {"num_rows": len(train)}
        settings = {"model": model.config, "layout": layout.to_dict(), "training": config, "data": data}
        if (checkpoint := run.claim(settings)) is not None:
            state.load(checkpoint)
        if state.step == num_steps or state.has_stalled(config.patience):
            return _result(state, config, directory)

        # Where it is written down.
        curves = None
        if rank == 0:
            check_writable(run.directory, state.num_bytes * (config.keep_checkpoints + 1))
            curves = Curves(directory, curve_columns(layout), start_step=state.step, label=_label(layout))
            stack.callback(curves.close)
        log = LossLog(layout, len(train), config, team)
        shown = show_progress and rank == 0
        progress = stack.enter_context(
            training_stage(STAGE, num_steps, completed=state.step, show=shown, estimate=estimate, why=why)
        )
        batches = micro_batches(
            layout,
            train,
            config,
            start_step=state.step,
            rank=team.data_rank,
            world_size=team.data_size,
            num_steps=num_steps,
        )
        stream = prefetch(batches)
        stack.callback(stream.close)

        evaluation_rows = min(len(validation), config.evaluation_rows or len(validation))
        evaluation_steps = _evaluation_steps(len(train), num_steps, config)
        first_step, pace = state.step, Pace()
        for step in range(first_step, num_steps + 1):
            if step in evaluation_steps:
                log.fetch(step, curves)
                nats = evaluate(
                    state.trained, layout, validation, evaluation_rows, processes=team, packed_nll=packed_nll
                )
                _keep_evaluation(state, nats, curves, step * config.batch_size / len(train), config, directory)
                pace.restart()

            ends_here = step == num_steps or state.has_stalled(config.patience)
            if sampler is not None and (step % sample_every == 0 or ends_here):
                shown_model = _plain_model(state, keep=rank == 0)
                if rank == 0:
                    sampler(shown_model, step)
                pace.restart()

            if step > first_step and (step % config.checkpoint_every == 0 or ends_here):
                log.fetch(step, curves)
                require_finite_weights(model, step, MEND)
                if curves is not None:
                    curves.flush()
                if curves is not None or state.shares is not None:
                    state.save(run, config.keep_checkpoints)
            if ends_here:
                break

            pieces = [piece.to(device) for piece in next(stream)]
            log.add(*train_step(state, loss_module, pieces, config, num_steps, team))
            pace.num_tokens += team.data_size * sum(piece.token_ids.numel() for piece in pieces)
            progress.update(step + 1)
            if (step + 1) % LOG_EVERY == 0:
                loss = log.fetch(step + 1, curves)
                progress.update(step + 1, f"loss {loss:.4f} nats/token, {pace.tokens_per_s:,.0f} tokens/s")
        team.wait()  # the first process has written the best weights
        return _result(state, config, directory)


def _last_checkpoint(directory: Path) -> str:
    found = latest_checkpoint(directory / CHECKPOINTS)
    return "There is no checkpoint yet." if found is None else f"The run goes on from {found.name}."


def _shared_out(
    model: AnyModel,
    averaged: AnyModel | None,
    layout: Layout,
    asked: TrainConfig,
    config: TrainConfig,
    team: Processes,
    device: torch.device,
) -> tuple[TrainState, nn.Module, Callable[[Packed], Float[Tensor, "B T"]]]:
    """The state of a training whose weights lie in shares, its loss, and how it evaluates."""
    from smalti.training.parallel import Shares
    from smalti.training.sharded_state import parameter_names

    names = parameter_names(model, make_optimizer(model, config, device))
    shares = Shares(model, team)
    if asked.compile:  # layer by layer, so that weights are gathered between them
        separate_compile_cache()
        for block in blocks_of(model):
            block.compile()
    loss = NextTokenLoss(model, layout)
    shares.wrap(loss, "packed_nll", precision=config.precision)
    of_average, evaluated = None, loss
    if averaged is not None:
        of_average, evaluated = Shares(averaged, team), NextTokenLoss(averaged, layout)
        of_average.wrap(evaluated, "packed_nll", precision=config.precision)
    loss.to(device)  # buffers, which are in no shares
    evaluated.to(device)
    state = TrainState(
        step=0,
        model=model,
        averaged=averaged,
        optimizer=make_optimizer(model, config, device),
        shares=shares,
        averaged_shares=of_average,
        plain_names=names,
    )

    def packed_nll(packed: Packed) -> Float[Tensor, "B T"]:
        nll = evaluated.packed_nll(packed)
        cast(Any, evaluated).reshard()  # without a backward pass the outermost weights would stay whole
        return nll

    return state, loss, packed_nll


def _plain_model(state: TrainState, *, keep: bool = True) -> AnyModel:
    """The model that is evaluated and returned, whole. Of one in shares all processes call it; if not `keep`, for the
    others alone."""
    if state.shares is None:
        return state.trained
    weights = state.whole_weights(keep=keep)
    plain = build_model(state.model.config) if keep else state.trained
    if keep:
        plain.load_state_dict(weights)
    return plain.eval()


def _ready_model(
    model: AnyModel | TransformerConfig | RARConfig | EncoderDecoderConfig,
    layout: Layout,
    config: TrainConfig,
    run: Run,
    device: torch.device | None,
) -> AnyModel:
    """The model on its device (None: as it is), in training mode: the one given, or a fresh one of this shape."""
    if isinstance(model, TransformerConfig | RARConfig | EncoderDecoderConfig):
        torch.manual_seed(config.seed)
    if isinstance(model, TransformerConfig):
        model = new_model(layout, model, full_head=config.full_softmax or _has_full_head(run))
    elif isinstance(model, RARConfig | EncoderDecoderConfig):
        model = build_model(model)
    if config.permuted is not None and not isinstance(model, RAR):
        raise ValueError("permuted is for a RAR, which is told which cell comes next; leave it out.")
    if config.recompute:
        recompute_activations(model)
    return (model if device is None else model.to(device)).train()


def _keep_evaluation(
    state: TrainState,
    nats: dict[str, float | None],
    curves: Curves | None,
    epoch: float,
    config: TrainConfig,
    directory: Path,
) -> None:
    """Notes the validation loss of this step; the process that has the curves writes it down, and the weights if they
    are the best so far and the run may stop early."""
    state.evaluations[state.step] = cast(float, nats["nats_per_token"])
    if curves is not None:
        curves.add("validation", state.step, epoch, nats)
        curves.draw()
    if config.patience is not None and state.best_step == state.step:
        weights = state.whole_weights(keep=curves is not None)
        if curves is not None:
            save_checkpoint(directory / BEST, state.step, weights, {}, keep=1)


def train_step(
    state: TrainState,
    loss_module: nn.Module,
    pieces: Sequence[MicroBatch],
    config: TrainConfig,
    num_steps: int,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
    """One step of the optimizer on this process's pieces of a batch, and of the average; returns the pieces' sum of
    nats, and their number of counted positions, by part."""
    model, step, device = state.model, state.step, pieces[0].token_ids.device
    model.train(step >= config.dropout_from * num_steps)  # dropout is all that differs
    seed_step(config.seed, step, processes.data_rank)
    set_learning_rate(state.optimizer, learning_rate(step, num_steps, config))
    counts = torch.stack([piece.counts for piece in pieces]).sum(0)
    total = processes.summed(counts.sum().to(device)) if processes.size > 1 else counts.sum()
    precision = FLOAT32 if state.shares else config.precision  # shares are gathered in the precision of the products
    nats = torch.zeros(len(counts), dtype=torch.float32, device=device)
    for piece in pieces:
        with (
            gradients_kept_back(loss_module, piece is not pieces[-1]),
            compute_precision(device, precision),
        ):
            nll = loss_module(piece.token_ids, piece.targets, piece.positions, piece.features)
            # Processes average their gradients: times their number, it is the sum over the joined batch.
            (nll.sum() * (processes.data_size / total)).backward()
        nats.index_add_(0, piece.parts, nll.detach().float())
    if config.max_grad_norm is not None:
        clip = nn.utils.clip_grad_norm_ if state.shares is None else state.shares.clip
        clip(model.parameters(), config.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.averaged is not None:
        update_average(state.averaged, model, step, config.ema_decay, in_shares=state.shares is not None)
    state.step = step + 1
    return nats, counts


def _result(state: TrainState, config: TrainConfig, directory: Path) -> AnyModel:
    """The trained model: the last weights, or, in a run that may stop early, those of the best evaluation."""
    trained = _plain_model(state)
    if config.patience is not None and (best := latest_checkpoint(directory / BEST)) is not None:
        trained.load_state_dict(load_checkpoint(best).weights)
    return trained.eval()


def _has_full_head(run: Run) -> bool:
    """Whether a run was begun with rows in the head for all ids, as all were once, also for those never predicted."""
    begun = run.begun("model")
    return begun is not None and begun.get("head_ranges") is None


def _check_task(
    layout: Layout, train: TokenPairs, validation: TokenPairs, config: TrainConfig, num_shares: int
) -> None:
    for pairs, purpose in ((train, "train on"), (validation, "validate with")):
        if not len(pairs):
            raise InputError(f"there are no rows to {purpose}: give a table that holds some.")
    pieces = num_shares * config.num_micro_batches
    if config.batch_size % pieces:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by {num_shares} processes × {config.num_micro_batches} "
            f"micro-batches; use {-(-config.batch_size // pieces) * pieces}."
        )
    if config.caption_dropout and not any(map(_may_lack_caption, layout.orders.values())):
        raise ValueError(
            f"caption_dropout is {config.caption_dropout}, but no caption can be left empty: no order has one of open "
            f"length, text{{..n}}, before its picture. The layout has:\n{layout}"
        )
    for pairs in (train, validation):
        if any(order.features for order in layout.orders.values()) != isinstance(pairs, FeaturedPairs):
            raise ValueError(f"features of captions go with a layout that begins with them, and no other:\n{layout}")
    for order in layout.orders.values():
        open_slots = [
            isinstance(part, Marker) or part.counted
            for index, part in enumerate(order.parts)
            if index and layout.slots[layout.slot_index(order.name, index)].size > 1
        ]
        if not any(open_slots):
            raise ValueError(
                f"order {order.name!r} counts no position that has to be predicted ({order}), so nothing can be "
                "learned from it; leave out parentheses, or the order."
            )


def _evaluation_steps(num_rows: int, num_steps: int, config: TrainConfig) -> set[int]:
    """Before training, after every epoch, and at the end."""
    num_epochs = num_steps * config.batch_size // num_rows
    ends = {math.ceil(epoch * num_rows / config.batch_size) for epoch in range(num_epochs + 1)}
    return {step for step in ends if step <= num_steps} | {num_steps}


def _why_slow(model: AnyModel, asked: TrainConfig, chosen: TrainConfig, loss: NextTokenLoss) -> list[str]:
    """What may keep this training from the speed it has elsewhere."""
    no_kernel = None
    if loss.native is None and not asked.compile and model.device.type == "cpu":
        no_kernel = why_not(model, chosen.precision) or (
            None if _has_cpp_compiler() else "no compiler is found: install g++ or clang"
        )
    return why_slow(chosen.precision, model.device, no_kernel=no_kernel)


def _label(layout: Layout) -> str:
    """What a nat of the curves is per: how many positions of a sequence are counted, of which part."""
    counted = {order.name: _counted_positions(order) for order in layout.orders.values()}
    kinds = list(dict.fromkeys(counted.values()))
    return "nats per counted token\n(" + " or ".join(kinds) + ")"


def _counted_positions(order: Order) -> str:
    counts: dict[str, int] = {}
    upto = False
    for index, part in enumerate(order.parts):
        if isinstance(part, Span) and not part.counted:
            continue
        segment = part.segment if isinstance(part, Span) else SPECIAL
        length = part.length if isinstance(part, Span) else 1
        counts[segment] = counts.get(segment, 0) + length - (index == 0)
        if isinstance(part, Span) and part.end:
            counts[SPECIAL] = counts.get(SPECIAL, 0) + 1
            upto = True
    pieces = ", ".join(f"{count} {PARTS.get(name, name)}" for name, count in sorted(counts.items()) if count)
    return f"{'up to ' if upto else ''}{sum(counts.values())} a sequence: {pieces}"

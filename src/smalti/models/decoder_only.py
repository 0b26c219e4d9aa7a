"""Models: token embeddings, the transformer, and a head of which any slice can be computed alone.

What generates and what scores sees a model only through `prefill`, `decode_step`, `hidden` and `logits`.

Letters: B batch, T tokens, V vocabulary, D model width, n the ids of a slot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.bounds import check_sizes
from smalti.documents import config_of
from smalti.models.transformer import KVCache, Transformer, TransformerConfig, at_least_float32
from smalti.sequences.layout import NO_SLOT, Layout, Packed, Slot


@dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig:
    """A causal transformer over one vocabulary. Raises ValueError if the transformer is not causal."""

    vocab_size: int
    transformer: TransformerConfig
    tie_embeddings: bool = False
    """Use the embedding table as the head."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 1.")
        if not self.transformer.causal or self.transformer.cross_attention:
            raise ValueError("a decoder-only model needs causal=True and cross_attention=False.")

    def to_dict(self) -> dict:
        content = asdict(self)
        if self.transformer.head_width is None:  # as bundles and checkpoints of before there was the field
            del content["transformer"]["head_width"]
        return content

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the model's config") -> "DecoderOnlyConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


class DecoderOnly(nn.Module):
    """Reads `token_ids`, predicts the next one: p(token t | tokens < t)."""

    def __init__(self, config: DecoderOnlyConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.transformer.d_model)
        self.transformer = Transformer(config.transformer)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.transformer.d_model))
            nn.init.normal_(self.head, std=0.02)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        return self.embed_tokens.weight if self.config.tie_embeddings else self.head

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if the layout's sequences are longer than the model takes."""
        longest, most = layout.max_length, self.config.transformer.max_length
        if longest > most:
            raise ValueError(f"the layout's sequences have up to {longest} tokens; the model takes {most}.")

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache | None = None) -> Float[Tensor, "B T D"]:
        """Hidden states; the one at position t predicts token t + 1. Does not advance the cache."""
        return self.transformer(self.embed_tokens(token_ids), kv_cache)

    def prefill(self, token_ids: Int[Tensor, "B T"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """Runs a whole prompt into the cache; returns what predicts the token behind it."""
        hidden = self.hidden(token_ids, kv_cache)
        kv_cache.advance(token_ids.shape[1])
        return hidden[:, -1]

    def decode_step(self, token_ids: Int[Tensor, " B"], kv_cache: KVCache) -> Float[Tensor, "B D"]:
        """Runs one new token of each row; returns what predicts the next."""
        return self.prefill(token_ids[:, None], kv_cache)

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        """Scores of a slot's ids alone, in the slot's own numbering; None: of all V ids."""
        weight = self.head_weight
        if slot is not None:
            pieces = [weight[start:end] for start, end in slot.ranges]
            weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # one range is a view: nothing is copied
        return F.linear(hidden, weight.to(hidden.dtype))

    def new_cache(
        self, batch_size: int, max_length: int | None = None, starts: Int[Tensor, " B"] | None = None
    ) -> KVCache:
        return KVCache(
            self.config.transformer,
            batch_size,
            max_length or self.config.transformer.max_length,
            starts=starts,
            device=self.device,
            dtype=self.embed_tokens.weight.dtype,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout for a while; left as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def token_nll(
    model: DecoderOnly, packed: Packed, slots: Sequence[Slot], *, full_softmax: bool = False
) -> Float[Tensor, "B T"]:
    """−ln p(token t | tokens < t), in nats, from one teacher-forced pass; 0 where nothing was predicted.

    The softmax runs over the position's slot; `full_softmax` takes all V ids instead, for comparison. A slot of one
    id costs exactly 0 nats and no arithmetic. Positions of one slot are gathered, so the head computes only rows
    and columns that are wanted.
    """
    hidden = model.hidden(packed.token_ids[:, :-1]).flatten(0, 1)  # (B * (T - 1), D)
    targets = packed.token_ids[:, 1:].flatten()
    target_slots = packed.slot_ids[:, 1:].flatten()
    nll = hidden.new_zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for index, slot in enumerate(slots):
        if slot.size == 1 and not full_softmax:
            continue
        rows = (target_slots == index).nonzero()[:, 0]
        if not len(rows):
            continue
        logits = model.logits(hidden[rows], None if full_softmax else slot)
        local = targets[rows] if full_softmax else slot.local(targets[rows])
        nll = nll.index_copy(0, rows, F.cross_entropy(logits.to(nll.dtype), local, reduction="none"))
    return F.pad(nll.view(len(packed.token_ids), -1), (1, 0))


class SlotTargets(NamedTuple):
    """The predicted positions of a batch whose tokens were drawn from one slot."""

    slot: int | None
    """Index into `Layout.slots`; None: all V ids."""
    rows: Int[Tensor, " n"]
    """Where they stand among the B · (T − 1) hidden states that predict something."""
    local: Int[Tensor, " n"]
    """The true token of each, in the slot's own numbering."""


def slot_targets(packed: Packed, slots: Sequence[Slot], *, full_softmax: bool = False) -> list[SlotTargets]:
    """The counted positions of a batch by slot, without those where there is nothing to predict: a slot of one id.

    This is the part of `token_nll` that depends on the data alone. A loader does it ahead, so that a training step
    never waits to learn how many rows a slot has.
    """
    targets = packed.token_ids[:, 1:].flatten()
    target_slots = torch.where(packed.counted, packed.slot_ids, NO_SLOT)[:, 1:].flatten()
    if full_softmax:
        rows = (target_slots != NO_SLOT).nonzero()[:, 0]
        return [SlotTargets(None, rows, targets[rows])]
    found = []
    for index, slot in enumerate(slots):
        rows = (target_slots == index).nonzero()[:, 0]
        if slot.size > 1 and len(rows):
            found.append(SlotTargets(index, rows, slot.local(targets[rows])))
    return found


def slot_nll(
    model: DecoderOnly, token_ids: Int[Tensor, "B T"], targets: Sequence[SlotTargets], slots: Sequence[Slot]
) -> Float[Tensor, " n"]:
    """The values of `token_nll` at the targets alone, one after the other: what training minimises the sum of."""
    hidden = model.hidden(token_ids[:, :-1]).flatten(0, 1)  # (B * (T - 1), D)
    found = []
    for target in targets:
        logits = model.logits(hidden.index_select(0, target.rows), None if target.slot is None else slots[target.slot])
        found.append(F.cross_entropy(at_least_float32(logits), target.local, reduction="none"))
    return torch.cat(found)


def new_model(layout: Layout, transformer: TransformerConfig, *, tie_embeddings: bool = False) -> DecoderOnly:
    """A fresh model for a layout. Raises ValueError if a sequence can be longer than the transformer takes."""
    if layout.max_length > transformer.max_length:
        raise ValueError(
            f"the layout's sequences have up to {layout.max_length} tokens, max_length is {transformer.max_length}."
        )
    config = DecoderOnlyConfig(
        vocab_size=layout.vocabulary.size, transformer=transformer, tie_embeddings=tie_embeddings
    )
    return DecoderOnly(config)

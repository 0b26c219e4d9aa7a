"""−ln p of tokens from a teacher-forced pass, the softmax over what can stand at a place.

Letters: B batch, T tokens, V vocabulary, D model width, n predicted positions of a slot.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.models.base import Inputs, SequenceModel
from smalti.models.transformer import at_least_float32
from smalti.sequences.layout import NO_SLOT, Packed, Slot


def token_nll(
    model: SequenceModel, packed: Packed, slots: Sequence[Slot], *, full_softmax: bool = False
) -> Float[Tensor, "B T"]:
    """−ln p(token t | tokens < t), in nats, from one teacher-forced pass; 0 where nothing was predicted.

    The softmax runs over the position's slot; `full_softmax` takes all V ids instead, for comparison. A slot of one
    id costs exactly 0 nats and no arithmetic. Positions of one slot are gathered, so the head computes only rows
    and columns that are wanted. A position whose slot the head has no rows for is not predicted: `is_predicted` tells.
    Raises ValueError for `full_softmax` if the head does not have rows for all ids.
    """
    if full_softmax:
        check_full_head(model)
    hidden = model.hidden(_inputs(packed.token_ids, features=packed.features))
    return nll_of_hidden(model, hidden, packed, slots, full_softmax=full_softmax)


def nll_of_hidden(
    model: SequenceModel,
    hidden: Float[Tensor, "B T_1 D"],
    packed: Packed,
    slots: Sequence[Slot],
    *,
    full_softmax: bool = False,
) -> Float[Tensor, "B T"]:
    """`token_nll` of sequences whose T − 1 hidden states are known."""
    hidden = hidden.flatten(0, 1)
    targets = packed.token_ids[:, 1:].flatten()
    target_slots = packed.slot_ids[:, 1:].flatten()
    nll = hidden.new_zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for index, slot in enumerate(slots):
        if not full_softmax and (slot.size == 1 or not model.can_score(slot)):
            continue
        rows = (target_slots == index).nonzero()[:, 0]
        if not len(rows):
            continue
        logits = model.logits(hidden[rows], None if full_softmax else slot)
        local = targets[rows] if full_softmax else slot.local(targets[rows])
        nll = nll.index_copy(0, rows, F.cross_entropy(logits.to(nll.dtype), local, reduction="none"))
    return F.pad(nll.view(len(packed.token_ids), -1), (1, 0))


def is_predicted(model: SequenceModel, slot_ids: Int[Tensor, "B T"], slots: Sequence[Slot]) -> Bool[Tensor, "B T"]:
    """Where the model says how likely the token is: at every slot that its head can score, and where only one id can
    stand. A caption that training only ever gave is not among them."""
    known = [slot.size == 1 or model.can_score(slot) for slot in slots]
    return torch.tensor([*known, False], device=slot_ids.device)[slot_ids]  # NO_SLOT is −1: the last


def check_full_head(model: SequenceModel) -> None:
    """Raises ValueError if the head does not have rows for all ids."""
    if not model.can_score(Slot(((0, model.vocab_size),))):
        raise ValueError(
            "a softmax over the whole vocabulary (full_softmax) needs a head with rows for all ids; this one has only "
            "those that are predicted. Make the model with new_model(..., full_head=True)."
        )


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
    model: SequenceModel,
    token_ids: Int[Tensor, "B T"],
    targets: Sequence[SlotTargets],
    slots: Sequence[Slot],
    positions: Int[Tensor, "B T"] | None = None,
    features: Float[Tensor, "B n_features C"] | None = None,
) -> Float[Tensor, " n"]:
    """The values of `token_nll` at the targets alone, one after the other: what training minimises the sum of.

    With `positions` the tokens are visited in another order than raster: each token's own, from which follows which one
    comes next. `features` stand in place of the first tokens.
    """
    hidden = model.hidden(_inputs(token_ids, positions, features)).flatten(0, 1)  # (B * (T - 1), D)
    found = []
    for target in targets:
        if target.slot is None:
            check_full_head(model)
        logits = model.logits(hidden.index_select(0, target.rows), None if target.slot is None else slots[target.slot])
        found.append(F.cross_entropy(at_least_float32(logits), target.local, reduction="none"))
    return torch.cat(found)


def _inputs(
    token_ids: Int[Tensor, "B T"],
    positions: Int[Tensor, "B T"] | None = None,
    features: Float[Tensor, "B n_features C"] | None = None,
) -> Inputs | Int[Tensor, "B T_1"]:
    """What predicts the tokens behind the first."""
    if features is not None:
        return Inputs(token_ids[:, :-1], features=features)
    if positions is None:
        return token_ids[:, :-1]
    targets = positions[:, 1:].clone()
    targets[:, 0] = -1  # the start token is told of none
    return Inputs(token_ids[:, :-1], positions[:, :-1], targets)

"""How likely sequences are: exact nats by span from teacher-forced passes.

Nats are sums of −ln p(token | tokens before), the softmax taken over what can stand at the place (the slot), with
dropout and guidance off. Averages are micro averages: total nats over total tokens. Standard errors treat sequences,
not tokens, as the independent draws, since the tokens of one picture are correlated.

Letters: N sequences, B batch, T tokens.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smalti.models.base import SequenceModel, evaluating
from smalti.models.loss import is_predicted, token_nll
from smalti.sequences.layout import NO_SLOT, PARTS, Layout, Packed, SpanValues


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Nats of one part over a set of sequences."""

    total_nats: float
    num_tokens: int
    standard_error: float
    """Of `nats_per_token`, from the spread between sequences."""

    @property
    def nats_per_token(self) -> float:
        return self.total_nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


@torch.no_grad()
def segment_nats(
    model: SequenceModel, layout: Layout, packed: Packed, segments: Collection[str] | None = None
) -> dict[str, Float[Tensor, " B"]]:
    """Each row's nats by the segment of the predicted tokens ("image", "text", "special", ...).

    With `segments` only theirs: the head then computes nothing else. A segment of which training only ever gave some
    tokens has no likelihood: it is left out, and a ValueError if it was asked for.
    """
    masks = _segment_masks(layout, packed, packed.slot_ids != NO_SLOT)
    known = is_predicted(model, packed.slot_ids, layout.slots)
    unknown = {name for name, inside in masks.items() if (inside & ~known).any()}
    if segments is None:
        masks = {name: inside for name, inside in masks.items() if name not in unknown}
    else:
        if given := sorted(unknown & set(segments)):
            raise ValueError(
                f"{', '.join(given)} has no likelihood here: the model was always given it and never learned to "
                "predict it. Score in an order that predicts it."
            )
        masks = {name: masks[name] for name in segments}
        wanted = torch.stack(list(masks.values())).any(0)
        packed = packed._replace(slot_ids=packed.slot_ids.where(wanted, NO_SLOT))
    nll = token_nll(model, packed, layout.slots).double()
    return {name: (nll * inside).sum(1) for name, inside in masks.items()}


def _segment_masks(layout: Layout, packed: Packed, predicted: Bool[Tensor, "B T"]) -> dict[str, Bool[Tensor, "B T"]]:
    """Where each segment's predicted tokens stand."""
    masks = {}
    for segment in layout.vocabulary.segments.values():
        inside = (packed.token_ids >= segment.offset) & (packed.token_ids < segment.end)
        masks[segment.name] = inside & predicted
    return masks


def score(
    model: SequenceModel,
    layout: Layout,
    order: str,
    spans: Mapping[str, SpanValues],
    *,
    features: Sequence[Float[Tensor, "n C"]] | None = None,
    segments: Collection[str] | None = None,
    batch_size: int = 256,
) -> dict[str, Float[Tensor, " N"]]:
    """Nats of N sequences in one order, by segment: all of them, or those asked for and no others computed. `features`
    are each sequence's, where the order begins with some.

    In an order with the caption first, "image" is −ln p(picture | caption) and "text" is −ln p(caption); in one with
    the picture first, "text" is −ln p(caption | picture) and "image" is −ln p(picture). A segment that training only
    ever gave has no likelihood: it is left out, and a ValueError if asked for.
    """
    batches = _packed(layout, order, spans, features, batch_size)
    with evaluating(model):
        found = [segment_nats(model, layout, to_device(packed, model.device), segments) for packed in batches]
    names = layout.vocabulary.segments if segments is None else segments
    names = [name for name in names if all(name in part for part in found)]
    return {name: torch.cat([part[name] for part in found]).cpu() for name in names}


def _packed(
    layout: Layout,
    order: str,
    spans: Mapping[str, SpanValues],
    features: Sequence[Float[Tensor, "n C"]] | None,
    batch_size: int,
) -> Iterator[Packed]:
    num_rows = len(next(iter(spans.values())).lengths)
    for start in range(0, num_rows, batch_size):
        chosen = slice(start, start + batch_size)
        part = {name: SpanValues(v.values[chosen], v.lengths[chosen]) for name, v in spans.items()}
        yield layout.pack(order, part, None if features is None else features[chosen])


def to_device(packed: Packed, device: torch.device) -> Packed:
    return packed.map(lambda tensor: tensor.to(device))


def evaluate_nll(
    model: SequenceModel,
    layout: Layout,
    batches: Iterable[Packed],
    packed_nll: Callable[[Packed], Float[Tensor, "B T"]] | None = None,
) -> dict[str, Likelihood]:
    """Likelihood of packed sequences: by part ("picture", "caption", "markers", ...) and in all ("total").

    Every predicted token is counted, also those that only one id can be, at 0 nats: only the first token of a
    sequence, padding, and what training only ever gave (see `is_predicted`) are left out. "total" therefore divides by
    all positions but the first where the head has rows for all ids. `packed_nll` stands for the model's `token_nll`.
    """
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad(), evaluating(model):
        for packed in batches:
            moved = to_device(packed, model.device)
            found = token_nll(model, moved, layout.slots) if packed_nll is None else packed_nll(moved)
            nll = found.double()
            predicted = is_predicted(model, moved.slot_ids, layout.slots)
            masks = _segment_masks(layout, moved, predicted)
            for name, inside in masks.items():
                rows.setdefault(PARTS.get(name, name), []).append(((nll * inside).sum(1).cpu(), inside.sum(1).cpu()))
            rows.setdefault("total", []).append(((nll * predicted).sum(1).cpu(), predicted.sum(1).cpu()))
    return {part: _likelihood(*map(torch.cat, zip(*found, strict=True))) for part, found in rows.items()}


def _likelihood(nats: Float[Tensor, " N"], counts: Float[Tensor, " N"]) -> Likelihood:
    """The ratio Σ nats / Σ tokens, with the standard error of a ratio of sums over N independent sequences."""
    total, tokens, N = float(nats.sum()), int(counts.sum()), len(nats)
    error = math.nan
    if N > 1 and tokens:
        residual = nats - total / tokens * counts
        error = math.sqrt(float((residual**2).sum()) * N / (N - 1)) / tokens
    return Likelihood(total_nats=total, num_tokens=tokens, standard_error=error)

"""One sequence on its way: what was asked for, what it holds so far, and what may come next.

Nothing here knows a model; the engine carries out the plans.

Letters: L tokens of a span, T tokens of a sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.sequences.layout import Layout, Marker, Order, Span
from smalti.sequences.vocabulary import FEATURE, FEATURES


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate."""

    order: str | None = None
    """Name of the layout's order; None lets the model choose by its first marker."""
    given: Mapping[str, Int[Tensor, " L"]] = field(default_factory=dict)
    """Each segment's own numbers, from 0: whole spans, or the beginning of the first span that is not whole."""
    features: Float[Tensor, "n C"] | None = None
    """What stands in place of token ids at the beginning, at most as many as the layout says."""
    begun: str | None = None
    """The segment of an open span of which the given numbers are but the beginning: without it they are all of it."""
    kept: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Numbers that are to stand at positions of a segment's span, behind what is given of it; what is drawn between
    them sees those before it alone."""
    seed: int = 0
    null: "Request | None" = None
    """What guidance steers away from: the same spans ahead, under another condition or none."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A finished sequence."""

    order: str
    token_ids: Int[Tensor, " T"]
    """`FEATURE` where a feature stood."""
    spans: dict[str, Int[Tensor, " L"]]
    """Each segment's own numbers, given and generated."""
    log_probs: Float[Tensor, " T"]
    """The model's own ln p of each generated token; 0 where a token was given or the only one possible."""
    draw_log_probs: Float[Tensor, " T"]

    @property
    def log_prob(self) -> float:
        """The model's own ln p of all that was generated."""
        return float(self.log_probs.double().sum())


class Plan(NamedTuple):
    """What a sequence generates next, up to the first span whose length is open."""

    slot_ids: list[int]
    """The slot of each coming position."""
    forced: list[int]
    """The token there, if only one is possible; else −1."""
    steps: list[tuple[int, int]]
    """Each position's number in its span, and the span's length: what a guidance schedule runs on."""
    stop: int
    """The marker that ends the plan early; −1 if none."""


class TokenSequence:
    """One request on its way: what it holds so far, and what may come next."""

    def __init__(self, layout: Layout, request: Request):
        self.layout = layout
        self.orders = list(layout.orders.values()) if request.order is None else [layout[request.order]]
        if request.order is None and request.given:
            raise ValueError("a request that gives something names its order.")
        if not 0 <= request.seed < 2**63:
            raise ValueError(f"seed {request.seed} is out of range; expected 0 <= seed < 2^63.")
        self.seed = request.seed
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.draw_log_probs: list[float] = []
        self.part = 0  # the part the next token belongs to
        self.filled = 0  # tokens that part has already
        self.null: TokenSequence | None = None
        self.features = request.features
        self.kept = {name: self._kept(name, numbers) for name, numbers in request.kept.items()}
        self._give(dict(request.given), request.begun)
        self._check_kept()
        if request.null is not None:
            self.null = TokenSequence(layout, request.null)

    @cached_property
    def uniforms(self) -> Float[Tensor, " T"]:
        """One number in [0, 1) for each position: what is drawn there hangs on it alone."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.layout.max_length, generator=generator, dtype=torch.float64)

    @property
    def order(self) -> Order:
        return self.orders[0]

    @property
    def is_finished(self) -> bool:
        return self.part == len(self.order.parts)

    @property
    def chooses_order(self) -> bool:
        """Whether the next token decides which order this is."""
        return self._differ_at(self.part)

    def _differ_at(self, part: int) -> bool:
        return len(self.orders) > 1 and len({order.parts[part] for order in self.orders}) > 1

    def open_parts(self) -> Iterator[tuple[Order, int]]:
        """Every part, of each order that may still be, from which a token may be drawn: where more than one id can
        stand."""
        for order in self.orders:
            for index in range(self.part, len(order.parts)):
                if self.layout.slots[self.layout.slot_index(order.name, index)].size > 1:
                    yield order, index

    def plan(self) -> Plan:
        """What comes next: to the end, or through the first open span, or just the marker that picks the order."""
        plan = Plan([], [], [], -1)
        for index in range(self.part, len(self.order.parts)):
            part = self.order.parts[index]
            slot_id = self.layout.slot_index(self.order.name, index)
            if isinstance(part, Marker):
                chosen = self._differ_at(index)
                forced = -1 if chosen else self.layout.vocabulary.special(part.special)
                _plan_tokens(plan, slot_id, [(0, 1)], forced)
                if chosen:
                    return plan
                continue
            coming, kept = range(self.filled if index == self.part else 0, part.length), self.kept.get(part.segment, {})
            _plan_tokens(plan, slot_id, [(step, part.length) for step in coming], -1)
            for step in kept.keys() & set(coming):
                plan.forced[step - part.length] = kept[step]
            if part.end is not None:
                stop = self.layout.vocabulary.special(part.end)
                _plan_tokens(plan, self.layout.end_slot_index(part), [(0, 1)], stop)
                return plan._replace(stop=stop)
        return plan

    def push(self, token: int, log_prob: float = 0.0, draw_log_prob: float = 0.0) -> None:
        """Appends a token and moves on to the next part where this one is full or ended."""
        if len(self.orders) > 1 and self.chooses_order:
            special = self.layout.vocabulary.special
            self.orders = [o for o in self.orders if special(str(o.parts[self.part])) == token]
        self.token_ids.append(token)
        self.log_probs.append(log_prob)
        self.draw_log_probs.append(draw_log_prob)
        part = self.orders[0].parts[self.part]
        self.filled += 1
        if isinstance(part, Marker):
            full = True
        elif part.end is None:
            full = self.filled == part.length
        else:
            full = token == self.layout.vocabulary.special(part.end)
        if full:
            self.part, self.filled = self.part + 1, 0

    def push_all(self, tokens: Sequence[tuple[int, float, float]]) -> None:
        """`push` of each; what goes into one span of fixed length at once."""
        start = 0
        while start < len(tokens):
            part = self.order.parts[self.part]
            if isinstance(part, Marker) or part.end is not None or len(self.orders) > 1:
                self.push(*tokens[start])
                start += 1
                continue
            new = tokens[start : start + part.length - self.filled]
            columns = zip(*new, strict=True)
            for held, values in zip((self.token_ids, self.log_probs, self.draw_log_probs), columns, strict=True):
                held += values
            start, self.filled = start + len(new), self.filled + len(new)
            if self.filled == part.length:
                self.part, self.filled = self.part + 1, 0

    def finished(self) -> Generated:
        spans = {}
        for span in self.order.spans:
            segment = self.layout.vocabulary[span.segment]
            start, end = segment.offset, segment.end
            numbers = [token - start for token in self.token_ids if start <= token < end]
            spans[span.segment] = torch.tensor(numbers, dtype=torch.long)
        return Generated(
            order=self.order.name,
            token_ids=torch.tensor(self.token_ids, dtype=torch.long),
            spans=spans,
            log_probs=torch.tensor(self.log_probs),
            draw_log_probs=torch.tensor(self.draw_log_probs),
        )

    def completed(self, token_ids: list[int], log_probs: list[float]) -> Generated:
        """The finished sequence that these tokens, the likeliest or otherwise chosen, would make of it."""
        whole = copy(self)
        whole.token_ids = self.token_ids + token_ids
        whole.log_probs = whole.draw_log_probs = self.log_probs + log_probs
        return whole.finished()

    def _kept(self, segment: str, numbers: Mapping[int, int]) -> dict[int, int]:
        """The token ids that are to stand at positions of a span."""
        span = self.order.span(segment)
        if span.end is not None or len(self.orders) > 1:
            raise ValueError(f"codes are kept in a span of fixed length and a named order; {self.order} has none.")
        if not all(0 <= position < span.length for position in numbers):
            raise ValueError(
                f"{segment} tokens are kept at {sorted(numbers)}; the span has positions to {span.length}."
            )
        size, values = self.layout.vocabulary[segment].size, list(numbers.values())
        if not all(0 <= number < size for number in values):
            raise ValueError(f"a kept {segment} token is outside 0..{size - 1}: {values}.")
        ids = self.layout.vocabulary.ids(segment, torch.tensor(values, dtype=torch.long)).tolist()
        return dict(zip(numbers, ids, strict=True))

    def _check_kept(self) -> None:
        """What comes next is drawn: a number that is kept there belongs to what is given."""
        part = None if self.is_finished or self.chooses_order else self.order.parts[self.part]
        for segment, numbers in self.kept.items():
            first = self.filled if isinstance(part, Span) and part.segment == segment else -1
            if self.is_finished or (numbers and min(numbers) <= first):
                raise ValueError(
                    f"{segment} token {min(numbers, default=0)} is kept next to what is given; give it too."
                )

    def _give(self, given: dict[str, Int[Tensor, " L"]], begun: str | None) -> None:
        """Pushes what is certain: markers, and given spans as far as they reach."""
        while not self.is_finished and not self.chooses_order:
            part = self.order.parts[self.part]
            if isinstance(part, Marker):
                self.push(self.layout.vocabulary.special(part.special))
            elif part.segment == FEATURES:
                self._give_features(part)
            elif part.segment not in given or not self._give_span(part, given.pop(part.segment), begun):
                break
        if self.features is not None and FEATURE not in self.token_ids:
            raise ValueError(f"features are given, but order {self.order.name!r} ({self.order}) has none.")
        if given:
            raise ValueError(
                f"{sorted(given)} cannot be given: order {self.order.name!r} ({self.order}) has no such span, "
                "or a span before it is not given whole."
            )
        if not self.token_ids and not self.chooses_order:
            raise ValueError(
                f"order {self.order.name!r} ({self.order}) has nothing to start from: give its first span."
            )

    def _give_features(self, span: Span) -> None:
        """Pushes the features, which may be fewer than the span holds."""
        if self.features is None:
            raise ValueError(f"order {self.order.name!r} ({self.order}) begins with features: give Request.features.")
        if self.features.ndim != 2 or not 1 <= len(self.features) <= span.length:
            raise ValueError(
                f"the features have shape {tuple(self.features.shape)}; the layout takes 1 to {span.length} vectors."
            )
        num_features = len(self.features)
        self.token_ids += [FEATURE] * num_features
        self.log_probs += [0.0] * num_features
        self.draw_log_probs += [0.0] * num_features
        self.part, self.filled = self.part + 1, 0

    def _give_span(self, span: Span, numbers: Int[Tensor, " L"], begun: str | None) -> bool:
        """Pushes a span's given tokens; whether the span is whole now. An open one is unless it is `begun`."""
        size = self.layout.vocabulary[span.segment].size
        if numbers.ndim != 1 or numbers.is_floating_point():
            raise ValueError(
                f"given {span.segment} tokens are one row of whole numbers, not {numbers.dtype} of shape "
                f"{tuple(numbers.shape)}."
            )
        if numbers.numel() > span.length:
            raise ValueError(f"{numbers.numel()} {span.segment} tokens are given; the layout takes {span.length}.")
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
            raise ValueError(f"a given {span.segment} token is outside 0..{size - 1}: {numbers.tolist()}.")
        for token in self.layout.vocabulary.ids(span.segment, numbers).tolist():
            self.push(token)
        if span.end is None or span.segment == begun:
            return span.end is None and numbers.numel() == span.length
        self.push(self.layout.vocabulary.special(span.end))
        return True


def _plan_tokens(plan: Plan, slot_id: int, steps: list[tuple[int, int]], forced: int) -> None:
    plan.slot_ids.extend([slot_id] * len(steps))
    plan.forced.extend([forced] * len(steps))
    plan.steps.extend(steps)

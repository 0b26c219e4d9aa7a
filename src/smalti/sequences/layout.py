"""What a sequence is made of, written down once.

A layout is one or more weighted *orders*; an order is a line of parts, in a small notation of its own:

    <bos> <end of image> text{6} <end of text> image{49}     the specials in angle brackets, spans with their length
    (text{..64}) <|startofimage|> image{32} <|endofimage|>   up to 64 tokens, ended by the marker that follows;
                                                             parentheses: given, not counted in the loss
    features{120} image{256}                                 up to 120 vectors, as of a text encoder, in place of ids

From it follow, for every position, the **slot**: which ids can stand there. The loss takes its softmax over the
slot, the sampler draws from it, likelihood counts by it. A slot that holds one id costs nothing.

Letters: B batch, T tokens, n features of a row, C their channels.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.bounds import check_sizes
from smalti.sequences.vocabulary import FEATURE, FEATURES, SPECIAL, Vocabulary

PARTS = {"image": "picture", "text": "caption", SPECIAL: "markers", "label": "label"}
"""What the nats of a segment's tokens are called in reports."""

NO_SLOT = -1
"""The slot id of padding and of a first token: nothing predicts them."""


@dataclass(frozen=True)
class Marker:
    """One special, always the same."""

    special: str

    def __str__(self) -> str:
        return self.special


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens of one segment: exactly `length`, or at most `length` and then the special `end`."""

    segment: str
    length: int
    end: str | None = None
    counted: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.length < 1:
            raise ValueError(f"span {self.segment}{{{self.length}}} is empty; a span holds at least one token.")

    def __str__(self) -> str:
        text = f"{self.segment}{{{'..' if self.end else ''}{self.length}}}"
        text = text if self.counted else f"({text})"
        return f"{text} {self.end}" if self.end else text


@dataclass(frozen=True)
class Slot:
    """The ids that can stand at a position: ascending, disjoint, half-open ranges."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self.ranges)

    def local(self, token_ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Where each id stands among the slot's own ids. The ids must be in the slot."""
        if len(self.ranges) == 1:
            return token_ids - self.ranges[0][0]
        local, before = torch.zeros_like(token_ids), 0
        for start, end in self.ranges:
            local = torch.where(token_ids >= start, token_ids - start + before, local)
            before += end - start
        return local

    def token_ids(self, local: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The inverse of `local`."""
        token_ids = local + self.ranges[0][0]
        for (_, end), (start, _) in pairwise(self.ranges):  # what lies behind a gap moves over it
            token_ids = torch.where(token_ids >= end, token_ids + (start - end), token_ids)
        return token_ids


@dataclass(frozen=True, kw_only=True)
class Order:
    """One way to lay out a sequence; `weight` is its share of the training sequences."""

    name: str
    parts: tuple[Marker | Span, ...]
    weight: float = 1.0

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(part for part in self.parts if isinstance(part, Span))

    @property
    def features(self) -> Span | None:
        """The span of features that the order begins with, if it does."""
        first = self.parts[0]
        return first if isinstance(first, Span) and first.segment == FEATURES else None

    @property
    def max_length(self) -> int:
        return sum(1 if isinstance(part, Marker) else part.length + bool(part.end) for part in self.parts)

    def span(self, segment: str) -> Span:
        for span in self.spans:
            if span.segment == segment:
                return span
        raise ValueError(f"order {self.name!r} has no span of {segment!r}: {self}")

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.parts)


class Packed(NamedTuple):
    """Sequences ready for a model. Padding stands on the right with id 0 and slot `NO_SLOT`."""

    token_ids: Int[Tensor, "B T"]
    slot_ids: Int[Tensor, "B T"]
    """Index into `Layout.slots` of the slot each token was drawn from."""
    counted: Bool[Tensor, "B T"]
    """Whether the token counts in the loss."""
    features: Float[Tensor, "B n C"] | None = None
    """What stands in place of the first tokens, where the order begins with features; a shorter row's end in zeros."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The batch with every tensor changed alike: rows chosen, or moved to a device."""
        features = None if self.features is None else change(self.features)
        return Packed(change(self.token_ids), change(self.slot_ids), change(self.counted), features)


class SpanValues(NamedTuple):
    """A segment's own numbers for one span of B sequences, with how many of each row are real."""

    values: Int[Tensor, "B L"]
    lengths: Int[Tensor, " B"]


class Layout:
    """A vocabulary and the orders in which its spans may stand.

    Orders must tell themselves apart by a marker: where two of them first differ, each has a marker of its own, so
    none is the beginning of another. Raises ValueError where that fails, and for what the vocabulary does not hold.
    """

    def __init__(self, vocabulary: Vocabulary, orders: Sequence[Order]):
        if not orders:
            raise ValueError("a layout needs at least one order.")
        self.vocabulary = vocabulary
        self.orders = {order.name: order for order in orders}
        if len(self.orders) != len(orders):
            raise ValueError(f"two orders have one name: {[order.name for order in orders]}.")
        self.slots: list[Slot] = []
        for order in orders:
            self._check(order)
        for short, long in itertools.permutations(orders, 2):
            if long.parts[: len(short.parts)] == short.parts:
                raise ValueError(
                    f"order {long.name!r} begins with all of order {short.name!r}, {short}: nothing tells the two "
                    "apart. Give each a marker of its own where they part."
                )
        self._templates = {order.name: self._template(order) for order in orders}
        self._end_slots = {
            part.end: self._slot_of([self._marker(part.end)]) for o in orders for part in o.spans if part.end
        }

    @classmethod
    def parse(cls, vocabulary: Vocabulary, orders: Mapping[str, str | tuple[str, float]]) -> "Layout":
        """A layout from `{"text to image": "<bos> ...", ...}`; a pair gives the order's weight too."""
        parsed = []
        for name, text in orders.items():
            line, weight = (text, 1.0) if isinstance(text, str) else text
            parsed.append(Order(name=name, parts=parse_order(line), weight=float(weight)))
        return cls(vocabulary, parsed)

    def to_dict(self) -> dict:
        """Vocabulary and orders, ready for JSON; `Layout.from_dict` reads it back."""
        orders = {order.name: [str(order), order.weight] for order in self.orders.values()}
        return {"vocabulary": self.vocabulary.to_dict(), "orders": orders}

    @classmethod
    def from_dict(cls, content: Mapping) -> "Layout":
        orders = {name: (line, weight) for name, (line, weight) in content["orders"].items()}
        return cls.parse(Vocabulary(content["vocabulary"]), orders)

    def __repr__(self) -> str:
        return "\n".join(f"{order.weight:g} × {order}" for order in self.orders.values())

    def __getitem__(self, order: str) -> Order:
        if order not in self.orders:
            raise ValueError(f"no order {order!r} in the layout; there are {', '.join(self.orders)}.")
        return self.orders[order]

    @cached_property
    def max_length(self) -> int:
        return max(order.max_length for order in self.orders.values())

    @property
    def is_fixed(self) -> bool:
        """Whether every sequence has the same length, known in advance."""
        orders = self.orders.values()
        varies = any(order.features or any(span.end for span in order.spans) for order in orders)
        return not varies and len({order.max_length for order in orders}) == 1

    @cached_property
    def predicted(self) -> Slot | None:
        """The ids that training predicts: those in some slot of more than one id at a counted position. None: none.

        A first token is never predicted, a token in parentheses is given, and a lone id needs no arithmetic.
        """
        ranges: set[tuple[int, int]] = set()
        for order in self.orders.values():
            for index, part in enumerate(order.parts):
                is_first_alone = index == 0 and (isinstance(part, Marker) or (part.length == 1 and not part.end))
                slot = self.slots[self.slot_index(order.name, index)]
                if slot.size > 1 and not is_first_alone and (isinstance(part, Marker) or part.counted):
                    ranges.update(slot.ranges)
        return Slot(_merge(sorted(ranges))) if ranges else None

    def slot_index(self, order: str, part: int) -> int:
        """Index into `slots` of what can stand at a part of an order."""
        return self._templates[order][part]

    def end_slot_index(self, span: Span) -> int:
        """Index into `slots` of what can follow a full open span: its end alone."""
        assert span.end is not None
        return self._end_slots[span.end]

    def pack(
        self,
        order: str,
        spans: Mapping[str, SpanValues],
        features: Sequence[Float[Tensor, "n C"]] | None = None,
    ) -> Packed:
        """Sequences of one order from each span's local ids (codes, text ids, both from 0), and each row's `features`
        where the order begins with some.

        Raises ValueError where a span is missing, has other rows than the rest, the wrong length, or a number outside
        its segment.
        """
        spans = self._with_features(self[order], spans, features)
        rows = self._check_spans(self[order], spans)
        length = max(self._row_lengths(self[order], spans), default=0)
        token_ids = torch.zeros(rows, length, dtype=torch.long)
        slot_ids = torch.full((rows, length), NO_SLOT, dtype=torch.long)
        counted = torch.zeros(rows, length, dtype=torch.bool)
        at = torch.zeros(rows, dtype=torch.long)  # where each row's next part starts
        for index, part in enumerate(self[order].parts):
            values, lengths, counts = self._part_tokens(part, spans, rows)
            columns = torch.arange(values.shape[1])
            real = columns < lengths[:, None]
            row, column = real.nonzero(as_tuple=True)
            target = at[row] + column
            token_ids[row, target] = values[row, column]
            slot_ids[row, target] = self._templates[order][index]
            counted[row, target] = counts
            at += lengths
            if isinstance(part, Span) and part.end:  # a full span leaves no choice: only its end can follow
                full = (lengths > part.length).nonzero()[:, 0]
                slot_ids[full, at[full] - 1] = self._end_slots[part.end]
        begins = (token_ids == FEATURE) | (torch.arange(length) == 0)
        slot_ids[begins], counted[begins] = NO_SLOT, False
        filled = None if features is None else torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        return Packed(token_ids, slot_ids, counted, filled)

    def _with_features(
        self, order: Order, spans: Mapping[str, SpanValues], features: Sequence[Float[Tensor, "n C"]] | None
    ) -> Mapping[str, SpanValues]:
        """The spans, and that of the features, in which every token is `FEATURE`."""
        if order.features is None:
            if features is not None:
                raise ValueError(f"features are given, but order {order.name!r} ({order}) has none.")
            return spans
        if features is None:
            raise ValueError(
                f"order {order.name!r} begins with features, which cannot be packed as token ids: give each row's."
            )
        most, lengths = order.features.length, torch.tensor([len(row) for row in features])
        if bool(((lengths < 1) | (lengths > most)).any()):
            row = int(((lengths < 1) | (lengths > most)).nonzero()[0])
            raise ValueError(f"row {row} has {int(lengths[row])} features; the layout takes 1 to {most}.")
        return {**spans, FEATURES: SpanValues(torch.full((len(features), most), FEATURE), lengths)}

    def _part_tokens(
        self, part: Marker | Span, spans: Mapping[str, SpanValues], rows: int
    ) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"], bool]:
        if isinstance(part, Marker):
            marker = self.vocabulary.special(part.special)
            return torch.full((rows, 1), marker), torch.ones(rows, dtype=torch.long), True
        values, lengths = spans[part.segment]
        if part.segment == FEATURES:
            return values, lengths, False
        token_ids = self.vocabulary.ids(part.segment, values.long())
        if part.end:  # the marker that ends the span takes the place after each row's last token
            token_ids = torch.nn.functional.pad(token_ids, (0, 1))
            token_ids[torch.arange(rows), lengths] = self.vocabulary.special(part.end)
            lengths = lengths + 1
        return token_ids, lengths, part.counted

    def _check_spans(self, order: Order, spans: Mapping[str, SpanValues]) -> int:
        """How many rows there are."""
        counts = {name: (len(values), len(lengths)) for name, (values, lengths) in spans.items()}
        if len(set(itertools.chain(*counts.values()))) > 1:
            found = ", ".join(f"{name} {a} of values and {b} of lengths" for name, (a, b) in counts.items())
            raise ValueError(f"the spans have different numbers of rows: {found}.")
        for index, span in enumerate(order.spans):
            if span.segment in (earlier.segment for earlier in order.spans[:index]):
                raise ValueError(
                    f"order {order.name!r} has two spans of {span.segment!r}; values are given by segment."
                )
            if span.segment not in spans:
                raise ValueError(f"order {order.name!r} needs a span of {span.segment!r}; given were {sorted(spans)}.")
            if span.segment != FEATURES:
                self._check_values(span, *spans[span.segment])
        return next(iter(counts.values()))[0] if counts else 1

    def _check_values(self, span: Span, values: Int[Tensor, "B L"], lengths: Int[Tensor, " B"]) -> None:
        wrong = (lengths < 0) | (lengths > span.length) if span.end else lengths != span.length
        if wrong.any():
            row = int(wrong.nonzero()[0])
            rule = f"at most {span.length}" if span.end else f"exactly {span.length}"
            raise ValueError(f"row {row} has {int(lengths[row])} {span.segment} tokens; the layout wants {rule}.")
        if (lengths > values.shape[1]).any():
            row = int((lengths > values.shape[1]).nonzero()[0])
            raise ValueError(
                f"row {row} is said to have {int(lengths[row])} {span.segment} tokens; {values.shape[1]} are given."
            )
        size = self.vocabulary[span.segment].size
        real = torch.arange(values.shape[1]) < lengths[:, None]
        bad = real & ((values < 0) | (values >= size))
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            found = int(values[row, column])
            raise ValueError(f"row {row}, {span.segment} token {column} is {found}; expected 0..{size - 1}.")

    def _row_lengths(self, order: Order, spans: Mapping[str, SpanValues]) -> list[int]:
        fixed = sum(1 if isinstance(part, Marker) else bool(part.end) for part in order.parts)
        used = [spans[span.segment].lengths for span in order.spans]
        return (fixed + torch.stack(used).sum(0)).tolist() if used else [fixed]

    def _check(self, order: Order) -> None:
        if not order.parts:
            raise ValueError(f"order {order.name!r} is empty; an order holds at least one marker or span.")
        if not 0 < order.weight < math.inf:
            raise ValueError(f"order {order.name!r} has weight {order.weight}; weights are positive and finite.")
        for part in order.parts:
            if isinstance(part, Span):
                self.vocabulary[part.segment]
                if part.segment == FEATURES and (part.end or part is not order.parts[0]):
                    raise ValueError(
                        f"order {order.name!r} ({order}): {FEATURES}{{n}} stands first and is not ended by a marker, "
                        "since it holds up to n."
                    )
            special = part.end if isinstance(part, Span) else part.special
            if special is not None:
                self.vocabulary.special(special)

    def _template(self, order: Order) -> list[int]:
        """The slot of each part of an order, as an index into `slots`."""
        return [self._slot_id(order, index) for index in range(len(order.parts))]

    def _slot_id(self, order: Order, index: int) -> int:
        ranges = set()
        for other in self.orders.values():
            if other.parts[:index] == order.parts[:index] and len(other.parts) > index:
                part = other.parts[index]
                if part != order.parts[index] and not (
                    isinstance(part, Marker) and isinstance(order.parts[index], Marker)
                ):
                    raise ValueError(
                        f"orders {order.name!r} and {other.name!r} part at {order.parts[index]} and {part}; "
                        "where two orders part, each needs a marker of its own."
                    )
                ranges.update(self._part_ranges(part))
        return self._slot_of(ranges)

    def _slot_of(self, ranges: Iterable[tuple[int, int]]) -> int:
        slot = Slot(_merge(sorted(ranges)))
        if slot not in self.slots:
            self.slots.append(slot)
        return self.slots.index(slot)

    def _marker(self, special: str) -> tuple[int, int]:
        return self.vocabulary.special(special), self.vocabulary.special(special) + 1

    def _part_ranges(self, part: Marker | Span) -> list[tuple[int, int]]:
        special = part.special if isinstance(part, Marker) else part.end
        ranges = []
        if special is not None:
            ranges.append(self._marker(special))
        if isinstance(part, Span):
            segment = self.vocabulary[part.segment]
            ranges.append((segment.offset, segment.end))
        return ranges


def _merge(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending ranges with those that touch joined, so that a slot is as few slices of the head as can be."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


_PART = re.compile(r"\s*(?:(?P<marker><[^>]*>)|(?P<open>\()?(?P<name>\w+)\{(?P<upto>\.\.)?(?P<n>\d+)\}(?(open)\)))\s*")


def parse_order(line: str) -> tuple[Marker | Span, ...]:
    """The parts written in a line; `str` of them gives the line back. Raises ValueError at the first odd character."""
    found: list[Marker | dict] = []
    at = 0
    while at < len(line):
        match = _PART.match(line, at)
        if match is None:
            raise ValueError(
                f"cannot read the layout at character {at}: {line[at : at + 24]!r}. "
                "Expected a marker <...> or a span name{n}, name{..n} or (name{n})."
            )
        at = match.end()
        if match["marker"]:
            found.append(Marker(match["marker"]))
        else:
            found.append(
                dict(
                    segment=match["name"],
                    length=int(match["n"]),
                    upto=bool(match["upto"]),
                    counted=not match["open"],
                )
            )
    return _join_ends(found, line)


def _join_ends(found: list[Marker | dict], line: str) -> tuple[Marker | Span, ...]:
    """An open span takes the marker behind it as its end."""
    parts: list[Marker | Span] = []
    waiting: dict | None = None
    for item in found:
        if waiting is not None:
            if not isinstance(item, Marker):
                break
            parts.append(Span(**waiting, end=item.special))
            waiting = None
        elif isinstance(item, Marker):
            parts.append(item)
        else:
            upto = item.pop("upto")
            if upto:
                waiting = item
            else:
                parts.append(Span(**item))
    if waiting is not None:
        raise ValueError(
            f"span {waiting['segment']}{{..{waiting['length']}}} has no marker behind it to end it, in {line!r}."
        )
    return tuple(parts)

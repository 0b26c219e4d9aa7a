"""The sequences that the model is looked at on: the codes of a table packed into one order of its layout.

Letters: N lines, L codes of a line.
"""

import torch
from jaxtyping import Integer
from numpy import ndarray

from smalti.sequences.layout import Layout, Marker, Packed, SpanValues


def picture_order(layout: Layout) -> str:
    """The name of the order that has the fewest tokens before the codes: there they are predicted from least else.

    Raises ValueError if there is none that predicts them in a fixed place.
    """
    starts = {name: _start(layout, name) for name in layout.orders if _can_be_looked_into(layout, name)}
    if not starts:
        raise ValueError(f"no order of the layout predicts codes in a fixed place: {layout}")
    return min(starts, key=lambda name: starts[name])


def has_picture_order(layout: Layout) -> bool:
    """Whether an order predicts codes in a fixed place."""
    return any(_can_be_looked_into(layout, name) for name in layout.orders)


def _can_be_looked_into(layout: Layout, order: str) -> bool:
    """Whether the codes are predicted, not given, and no span of open length stands before them."""
    for span in layout[order].spans:
        if span.segment == "image":
            return span.counted
        if span.end is not None:
            return False
    return False


def code_positions(layout: Layout, order: str) -> range:
    """Where in a sequence of this order the codes stand: position p is predicted from the tokens before it.

    Raises ValueError if a span of open length comes before them.
    """
    start = _start(layout, order)
    return range(start, start + layout[order].span("image").length)


def _start(layout: Layout, order: str) -> int:
    start = 0
    for part in layout[order].parts:
        if isinstance(part, Marker):
            start += 1
        elif part.end is not None:
            raise ValueError(f"order {order!r} has the open span {part} before its codes; they have no fixed place.")
        elif part.segment == "image":
            return start
        else:
            start += part.length
    raise ValueError(f"order {order!r} has no codes: {layout[order]}")


def pack_codes(
    layout: Layout, order: str, codes: Integer[ndarray, "N L"], text_tokens: Integer[ndarray, "N Lt"] | None = None
) -> Packed:
    """Sequences of codes, and of captions where the order has them, cut behind the last code or caption it predicts
    them from. Raises ValueError for what does not fit the layout."""
    spans = {"image": _whole(codes)}
    if text_tokens is not None and any(span.segment == "text" for span in layout[order].spans):
        spans["text"] = _whole(text_tokens)
    packed = layout.pack(order, spans)
    end = code_positions(layout, order).stop
    return packed.map(lambda tensor: tensor[:, :end])


def _whole(values: Integer[ndarray, "N L"]) -> SpanValues:
    return SpanValues(torch.from_numpy(values.astype("int64")), torch.full((len(values),), values.shape[1]))

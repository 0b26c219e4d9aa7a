"""Layouts against the definition: what can stand at a position is what stands there in some possible sequence."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.sequences.layout import NO_SLOT, Layout, Marker, Order, Slot, Span, SpanValues, parse_order
from smalti.sequences.vocabulary import Vocabulary

VOCABULARY = Vocabulary({"special": ["<bos>", "<i>", "<t>"], "image": 3, "text": 2, "label": 5})
LAYOUTS = {
    "two orders of fixed length": {"a": "<bos> <i> text{2} <t> image{3}", "b": "<bos> <t> image{3} <i> text{2}"},
    "open caption": {"a": "<bos> text{..3} <i> image{2} <t>"},
    "open caption first": {"a": "text{..2} <i> image{2}"},
    "given caption": {"a": "(text{..2}) <i> image{2} <t>"},
    "label": {"a": "label{1} image{3}"},
    "open at the end": {"a": ("<bos> <i> image{2} text{..2} <t>", 3.0), "b": ("<bos> <t> text{..2} <i>", 0.5)},
    "three orders, two of which part late": {
        "a": "<bos> <i> image{2} <i> text{1}",
        "b": "<bos> <i> image{2} <t> label{1}",
        "c": "<bos> <t> label{1} text{..2} <bos>",
    },
}


def parse(name: str) -> Layout:
    return Layout.parse(VOCABULARY, LAYOUTS[name])


def sequences_of(layout: Layout, order: Order) -> list[tuple[list[int], list[bool], dict[str, tuple[int, ...]]]]:
    """Every possible sequence: its token ids, whether each counts, and its spans' own numbers."""
    found: list = [([], [], {})]
    for part in order.parts:
        choices: list = []
        if isinstance(part, Marker):
            choices.append(([layout.vocabulary.special(part.special)], [True], {}))
        else:
            segment = layout.vocabulary[part.segment]
            end = [] if part.end is None else [layout.vocabulary.special(part.end)]
            for length in range(0 if part.end else part.length, part.length + 1):
                for numbers in itertools.product(range(segment.size), repeat=length):
                    tokens = [segment.offset + number for number in numbers] + end
                    choices.append((tokens, [part.counted] * len(tokens), {part.segment: numbers}))
        found = [(ids + i, counts + c, spans | s) for ids, counts, spans in found for i, c, s in choices]
    return found


def span_values(rows: list[dict[str, tuple[int, ...]]]) -> dict[str, SpanValues]:
    """Rows side by side, with rubbish where a row is shorter."""
    return {
        name: SpanValues(
            torch.tensor([list(row[name]) + [-77] * (9 - len(row[name])) for row in rows]),
            torch.tensor([len(row[name]) for row in rows]),
        )
        for name in rows[0]
    }


def ids_of(slot: Slot) -> set[int]:
    return {token_id for start, end in slot.ranges for token_id in range(start, end)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_and_slots_follow_from_the_list_of_all_sequences(name):
    layout = parse(name)
    every = {order: sequences_of(layout, layout[order]) for order in layout.orders}
    all_ids = [ids for found in every.values() for ids, _, _ in found]
    assert max(map(len, all_ids)) == layout.max_length
    following: dict[tuple[int, ...], set[int]] = {}
    for ids in all_ids:
        for at in range(len(ids)):
            following.setdefault(tuple(ids[:at]), set()).add(ids[at])
    for order, found in every.items():
        packed = layout.pack(order, span_values([spans for _, _, spans in found]))
        assert packed.token_ids.shape == (len(found), max(len(ids) for ids, _, _ in found))
        for row, (ids, counts, _) in enumerate(found):
            padding = packed.token_ids.shape[1] - len(ids)
            assert packed.token_ids[row].tolist() == ids + [0] * padding
            assert packed.counted[row].tolist() == [False, *counts[1:]] + [False] * padding
            assert packed.slot_ids[row, 0] == NO_SLOT
            assert packed.slot_ids[row, len(ids) :].tolist() == [NO_SLOT] * padding
            for at in range(1, len(ids)):
                slot = layout.slots[packed.slot_ids[row, at]]
                assert ids_of(slot) == following[tuple(ids[:at])], (order, ids, at)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_survives_json(name):
    layout = parse(name)
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again.vocabulary == layout.vocabulary
    assert again.orders == layout.orders
    assert again.slots == layout.slots


def test_weights_are_kept():
    layout = parse("open at the end")
    assert [order.weight for order in layout.orders.values()] == [3.0, 0.5]
    assert repr(layout) == "3 × <bos> <i> image{2} text{..2} <t>\n0.5 × <bos> <t> text{..2} <i>"


segments = st.sampled_from(["image", "text", "label", "depth_2"])
markers = st.sampled_from(["<bos>", "<end of image>", "<|startofimage|>", "<(text{3})>"])
spans = st.builds(Span, segment=segments, length=st.integers(1, 9999), end=st.none() | markers, counted=st.booleans())


@given(st.lists(spans | markers.map(Marker), min_size=1, max_size=7).map(tuple))
def test_an_order_reads_back_as_it_is_written(parts):
    line = str(Order(name="a", parts=parts))
    assert parse_order(line) == parts
    assert parse_order(f"  {line}  ") == parts
    assert parse_order(line.replace("> ", ">").replace("} <", "}<")) == parts


def test_the_notation_by_hand():
    assert parse_order("<bos> (label{1}) text{..64} <end of text> image{49}") == (
        Marker("<bos>"),
        Span(segment="label", length=1, counted=False),
        Span(segment="text", length=64, end="<end of text>"),
        Span(segment="image", length=49),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<bos> image(3)", r"at character 6: 'image\(3\)'. Expected a marker <...> or a span"),
        ("<bos> (image{3}", r"at character 6: '\(image\{3\}'"),
        ("image{3})", r"at character 8: '\)'"),
        ("image{-3}", "at character 0"),
        ("image{0}", r"span image\{0\} is empty; a span holds at least one token"),
        ("image{..0} <t>", r"span image\{0\} is empty"),
        ("<bos> text{..4}", r"span text\{..4\} has no marker behind it to end it, in '<bos> text"),
        ("text{..4} image{3}", r"span text\{..4\} has no marker behind it"),
    ],
)
def test_a_line_that_cannot_be_read_is_explained(line, message):
    with pytest.raises(ValueError, match=message):
        parse_order(line)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({}, "needs at least one order"),
        ({"a": ""}, "order 'a' is empty"),
        ({"a": "<bos> depth{3}"}, "no vocabulary segment 'depth'; there are special, image, text, label"),
        ({"a": "<eos> image{3}"}, "no special '<eos>' in the vocabulary"),
        ({"a": "text{..3} <eos>"}, "no special '<eos>' in the vocabulary"),
        ({"a": ("<bos> image{3}", 0)}, r"order 'a' has weight 0\.0; weights are positive"),
        ({"a": ("<bos> image{3}", float("nan"))}, "order 'a' has weight nan"),
        ({"a": "<bos> image{3}", "b": "<bos> text{2}"}, r"orders 'a' and 'b' part at image\{3\} and text\{2\}"),
        ({"a": "<bos> image{3}", "b": "<bos> <i> text{2}"}, r"'a' and 'b' part at image\{3\} and <i>; .*own"),
        ({"a": "<bos> text{..2} <i>", "b": "<bos> text{..2} <t>"}, "part at"),
        ({"a": "<bos> image{3}", "b": "<bos> image{3} <i> text{2}"}, "order 'b' begins with all of order 'a'"),
        ({"a": "<bos> image{3} <i>", "b": "<bos> image{3}"}, "order 'a' begins with all of order 'b'"),
        ({"a": "<bos> image{3}", "b": "<bos> image{3}"}, "nothing tells the two apart"),
    ],
)
def test_orders_that_cannot_be_are_explained(orders, message):
    with pytest.raises(ValueError, match=message):
        Layout.parse(VOCABULARY, orders)


def test_two_orders_of_one_name_are_refused():
    parts = parse_order("<bos> image{3}")
    with pytest.raises(ValueError, match="two orders have one name: "):
        Layout(VOCABULARY, [Order(name="a", parts=parts), Order(name="a", parts=(Marker("<i>"), *parts))])


def test_unknown_names_list_the_known_ones():
    layout = parse("two orders of fixed length")
    with pytest.raises(ValueError, match="no order 'c' in the layout; there are a, b"):
        layout.pack("c", {})
    with pytest.raises(ValueError, match="order 'a' has no span of 'label': <bos> <i> text"):
        layout["a"].span("label")
    assert layout["a"].span("image") == Span(segment="image", length=3)


def values(rows: list[list[int]], lengths: list[int]) -> SpanValues:
    return SpanValues(torch.tensor(rows), torch.tensor(lengths))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"image": values([[0, 0]] * 2, [2, 2])}, r"order 'a' needs a span of 'text'; given were \['image'\]"),
        ({"text": values([[0] * 4, [0] * 4], [1, 4])}, "row 1 has 4 text tokens; the layout wants at most 3"),
        ({"text": values([[0, 0], [0, 0]], [1, -1])}, "row 1 has -1 text tokens; the layout wants at most 3"),
        ({"text": values([[0, 1], [1, 2]], [2, 2])}, r"row 1, text token 1 is 2; expected 0\.\.1"),
        ({"text": values([[0, 1], [-1, 2]], [2, 1])}, r"row 1, text token 0 is -1; expected 0\.\.1"),
        ({"image": values([[0] * 3, [0] * 3], [2, 3])}, "row 1 has 3 image tokens; the layout wants exactly 2"),
        ({"image": values([[0], [0]], [2, 2])}, "row 0 is said to have 2 image tokens; 1 are given"),
        ({"text": values([[0]], [1])}, "different numbers of rows: text 1 of values and 1 of lengths, image 2"),
        ({"text": values([[0], [1]], [1])}, "different numbers of rows: text 2 of values and 1 of lengths"),
    ],
)
def test_spans_that_do_not_fit_are_explained(given_, message):
    layout = parse("open caption")
    good = {"text": values([[0, 1], [1, 0]], [2, 1]), "image": values([[0, 2], [2, 1]], [2, 2])}
    assert layout.pack("a", good).token_ids.shape == (2, 7)
    with pytest.raises(ValueError, match=message):
        layout.pack("a", (good if "needs" not in message else {}) | given_)


def test_two_spans_of_one_segment_cannot_be_packed():
    """Values are given by segment: nothing would say which span they are for."""
    layout = Layout.parse(VOCABULARY, {"a": "<bos> image{2} <i> image{2}"})
    with pytest.raises(ValueError, match="order 'a' has two spans of 'image'; values are given by segment"):
        layout.pack("a", {"image": values([[0, 1]], [2])})


def test_what_stands_behind_a_rows_length_is_not_looked_at():
    layout = parse("open caption")
    image = values([[0, 2], [2, 1]], [2, 2])
    clean = layout.pack("a", {"text": values([[1, 0], [0, 0]], [1, 0]), "image": image})
    dirty = layout.pack("a", {"text": values([[1, 99], [-1, 99]], [1, 0]), "image": image})
    for first, second in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(first, second)


def test_packing_leaves_its_input_as_it_was_and_takes_small_integers():
    layout = parse("open caption")
    text, image = torch.tensor([[0, 1], [1, 0]], dtype=torch.int16), torch.tensor([[0, 2], [2, 1]], dtype=torch.int8)
    lengths = torch.tensor([2, 0]), torch.tensor([2, 2])
    before = [tensor.clone() for tensor in (text, image, *lengths)]
    packed = layout.pack("a", {"text": SpanValues(text, lengths[0]), "image": SpanValues(image, lengths[1])})
    assert packed.token_ids.tolist() == [[0, 6, 7, 1, 3, 5, 2], [0, 1, 5, 4, 2, 0, 0]]
    assert all(torch.equal(a, b) for a, b in zip(before, (text, image, *lengths), strict=True))


def test_an_order_of_markers_alone_is_one_row():
    layout = Layout.parse(VOCABULARY, {"a": "<bos> <t>", "b": "<bos> <i>"})
    packed = layout.pack("a", {})
    assert packed.token_ids.tolist() == [[0, 2]]
    assert ids_of(layout.slots[packed.slot_ids[0, 1]]) == {1, 2}


@st.composite
def slot_ranges(draw) -> tuple[tuple[int, int], ...]:
    cuts = sorted(draw(st.sets(st.integers(0, 40), min_size=2, max_size=8)))
    cuts = cuts[: len(cuts) // 2 * 2]
    return tuple(zip(cuts[::2], cuts[1::2], strict=True))


@given(slot_ranges())
def test_a_slots_own_numbers_run_from_zero_in_the_order_of_the_ids(ranges):
    slot = Slot(ranges)
    expected = sorted(ids_of(slot))
    token_ids = slot.token_ids(torch.arange(slot.size))
    assert token_ids.tolist() == expected
    assert slot.local(token_ids).tolist() == list(range(slot.size))
    assert slot.size == len(expected)


def test_ranges_that_touch_are_one():
    """Text and its end marker next to each other in the vocabulary are a single slice of the head."""
    vocabulary = Vocabulary({"text": 5, "special": ["<end>", "<bos>"], "image": 3})
    layout = Layout.parse(vocabulary, {"a": "<bos> text{..4} <end> image{2}"})
    assert layout.slots[layout.slot_index("a", 1)].ranges == ((0, 6),)
    apart = Layout.parse(vocabulary, {"a": "<bos> text{..4} <bos> image{2}"})
    assert apart.slots[apart.slot_index("a", 1)].ranges == ((0, 5), (6, 7))
    both = Layout.parse(vocabulary, {"a": "<bos> <end> image{2}", "b": "<bos> <bos> image{2}"})
    assert both.slots[both.slot_index("a", 1)].ranges == ((5, 7),)
    assert both.slot_index("a", 1) == both.slot_index("b", 1)


def test_a_full_open_span_is_followed_by_its_end_alone():
    layout = parse("open caption")
    span = layout["a"].span("text")
    assert ids_of(layout.slots[layout.end_slot_index(span)]) == {1}
    assert ids_of(layout.slots[layout.slot_index("a", 1)]) == {1, 6, 7}


@pytest.mark.parametrize(
    ("orders", "fixed"),
    [
        (LAYOUTS["two orders of fixed length"], True),
        (LAYOUTS["label"], True),
        (LAYOUTS["open caption"], False),
        ({"a": "<bos> <i> image{2}", "b": "<bos> <t> text{3}"}, False),
    ],
)
def test_a_layout_knows_whether_all_sequences_have_one_length(orders, fixed):
    layout = Layout.parse(VOCABULARY, orders)
    assert layout.is_fixed is fixed
    lengths = {len(ids) for order in layout.orders.values() for ids, _, _ in sequences_of(layout, order)}
    assert (len(lengths) == 1) is fixed
    assert layout.max_length == max(lengths)

"""Segments and offsets, by hand and against a plain list of all ids."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.sequences.vocabulary import Segment, Vocabulary

SIZES = {"image": 13, "special": ["<bos>", "<end of image>", "<end of text>"], "text": 7}


@st.composite
def all_sizes(draw) -> dict:
    names = draw(st.lists(st.sampled_from(["special", "image", "text", "label", "depth"]), min_size=1, unique=True))
    specials = st.integers(1, 5).map(lambda n: [f"<{i}>" for i in range(n)])
    return {name: draw(specials if name == "special" else st.integers(1, 40)) for name in names}


def test_offsets_by_hand():
    vocabulary = Vocabulary(SIZES)
    assert vocabulary.size == 23
    assert vocabulary["image"] == Segment(name="image", size=13, offset=0)
    assert vocabulary["special"] == Segment(name="special", size=3, offset=13)
    assert vocabulary["text"] == Segment(name="text", size=7, offset=16)
    assert vocabulary["text"].end == 23
    assert vocabulary.specials == {"<bos>": 13, "<end of image>": 14, "<end of text>": 15}
    assert vocabulary.special("<end of text>") == 15
    assert "image" in vocabulary
    assert "label" not in vocabulary
    assert repr(vocabulary) == "Vocabulary(image 0..12, special 13..15, text 16..22)"


@given(all_sizes())
def test_segments_cover_every_id_once(sizes):
    vocabulary = Vocabulary(sizes)
    covered = [token_id for segment in vocabulary.segments.values() for token_id in range(segment.offset, segment.end)]
    assert covered == list(range(vocabulary.size))


@given(all_sizes())
def test_ids_and_local_numbers_are_inverse(sizes):
    vocabulary = Vocabulary(sizes)
    for name, segment in vocabulary.segments.items():
        numbers = torch.arange(segment.size)
        token_ids = vocabulary.ids(name, numbers)
        assert token_ids.tolist() == list(range(segment.offset, segment.end))
        assert torch.equal(vocabulary.local(name, token_ids), numbers)


@given(all_sizes())
def test_a_vocabulary_survives_json(sizes):
    vocabulary = Vocabulary(sizes)
    again = Vocabulary(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.segments == vocabulary.segments
    assert again.specials == vocabulary.specials


def test_vocabularies_are_equal_only_if_every_id_means_the_same():
    assert Vocabulary(SIZES) == Vocabulary(dict(SIZES))
    assert Vocabulary(SIZES) != Vocabulary(dict(reversed(SIZES.items())))  # the same sizes at other offsets
    assert Vocabulary(SIZES) != Vocabulary(SIZES | {"image": 12})
    assert Vocabulary(SIZES) != Vocabulary(SIZES | {"special": ["<bos>", "<end of text>", "<end of image>"]})
    assert Vocabulary(SIZES) != SIZES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image": 0}, "segment 'image' has size 0; a segment holds at least one id"),
        ({"image": -4}, "segment 'image' has size -4"),
        ({"special": []}, "segment 'special' has size 0"),
        ({"special": 3}, r'"special" is given as the list of its names, not as a size \(3\)'),
        ({"text": ["a", "b"]}, "segment 'text' is given as names; only .* Give its size"),
        ({"special": ["<bos>", "<end>", "<bos>"]}, r"a special is named twice in \['<bos>', '<end>', '<bos>'\]"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_explained(sizes, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(sizes)


def test_unknown_names_list_the_known_ones():
    vocabulary = Vocabulary(SIZES)
    with pytest.raises(ValueError, match="no vocabulary segment 'label'; there are image, special, text"):
        vocabulary["label"]
    with pytest.raises(ValueError, match="no vocabulary segment 'label'"):
        vocabulary.ids("label", torch.zeros(1).long())
    with pytest.raises(ValueError, match="no special '<eos>' in the vocabulary; there are <bos>, <end of image>"):
        vocabulary.special("<eos>")
    with pytest.raises(ValueError, match="no special '<eos>' in the vocabulary; there are none"):
        Vocabulary({"image": 2}).special("<eos>")

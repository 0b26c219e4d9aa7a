"""Unigram pieces of captions: words that are pieces, text that no piece spells, names that are only typed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.errors import InputError
from smalti.text_tokenizer import LETTERS, NUM_BYTES, TextTokenizer, UnigramConfig, byte_piece

CAPTIONS = [
    f"a {colour} {shape} on a {stuff} table"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("square", "circle", "ball")
    for stuff in ("wood", "glass")
] * 10
SIZE = 500
WORDS, NUM_UNUSED = TextTokenizer.train_unigram(CAPTIONS, UnigramConfig(text_size=SIZE))


def pieces(caption: str) -> list[str]:
    return [WORDS.words[number] for number in WORDS.encode(caption)]


def test_every_frequent_word_is_a_piece():
    """The library alone proposes none of a word that stands within no other."""
    for word in ("red", "green", "blue", "yellow", "square", "circle", "ball", "on", "wood", "glass", "table"):
        assert f"▁{word}" in WORDS.words
    assert pieces("a red square")[-2:] == ["▁red", "▁square"]
    assert not any("\ue000" in word for word in WORDS.words)


def test_sizes_and_the_order_of_ids():
    assert WORDS.vocab_size == SIZE and WORDS.vocabulary is None  # text alone
    assert WORDS.words[0] == "<unk>" and WORDS.words[1 : NUM_BYTES + 1] == list(map(byte_piece, range(NUM_BYTES)))
    learned = WORDS.words[NUM_BYTES + 1 : SIZE - NUM_UNUSED]
    assert learned == sorted(learned) and set(LETTERS) <= set(learned)
    again, num_unused = TextTokenizer.train_unigram(CAPTIONS, UnigramConfig(text_size=SIZE))
    assert (again.words, num_unused) == (WORDS.words, NUM_UNUSED)


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=30))
def test_any_text_comes_back(text):
    assert WORDS.decode(WORDS.encode(text)) == text
    assert WORDS.unknown_words(text) == []


@pytest.mark.parametrize("name", ["<unk>", "<0x41>", "<unused 3>", "<eot>", "<sot>"])
def test_names_of_markers_are_text_when_they_are_typed(name):
    ids = WORDS.encode(f"a {name}")
    assert WORDS.decode(ids) == f"a {name}" and min(ids) > NUM_BYTES
    assert not any(WORDS.words[number].startswith("<unused") for number in ids)


def test_a_cut_keeps_characters_whole_and_files_are_read_back(tmp_path):
    cut = WORDS.encode_within("red 🎉🎉", 8)
    assert cut.was_cut and WORDS.decode(cut.numbers) == "red 🎉"
    assert WORDS.decode(WORDS.encode_within("红色的球" * 50, 128).numbers) == ("红色的球" * 50)[:42]  # 3 bytes each
    WORDS.save(tmp_path / "words.json")
    assert json.loads((tmp_path / "words.json").read_text())["model"]["type"] == "Unigram"
    read = TextTokenizer.load(tmp_path / "words.json")
    assert read.encode("a Straße 🎉") == WORDS.encode("a Straße 🎉") and read.words == WORDS.words


def test_what_cannot_be_is_said():
    with pytest.raises(InputError, match="no captions to train a text tokenizer on"):
        TextTokenizer.train_unigram(["", ""])
    with pytest.raises(ValueError, match="it is at least 352"):
        UnigramConfig(text_size=351)
    with pytest.raises(ValueError, match="at most"):
        UnigramConfig(text_size=2**30)
    assert UnigramConfig().text_size == 16_000
    smallest, unused = TextTokenizer.train_unigram(["a red ball"], UnigramConfig(text_size=352))
    assert smallest.decode(smallest.encode("a red ball")) == "a red ball" and unused <= 1

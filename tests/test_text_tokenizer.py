"""Words to numbers and back, and what an unknown word says."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.data.digits import words
from smalti.errors import InputError
from smalti.text_tokenizer import TextTokenizer

WORDS = ["dark", "green", "eight", "on", "bright"]


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return TextTokenizer.from_words(WORDS, spellings={"eigth": "eight"})


def test_numbers_are_places_in_the_word_list(tokenizer: TextTokenizer):
    assert tokenizer.vocab_size == 5
    assert tokenizer.words == WORDS
    assert tokenizer.encode("bright on dark dark") == [4, 3, 0, 0]
    assert tokenizer.decode([4, 3, 0, 0]) == "bright on dark dark"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_case_spaces_and_other_spellings_do_not_matter(tokenizer: TextTokenizer):
    assert tokenizer.encode("  Dark\tGREEN \n eigth ") == [0, 1, 2]


def test_a_spelling_is_replaced_as_a_whole_word_only():
    tokenizer = TextTokenizer.from_words(["eight", "eigths"], spellings={"eigth": "eight"})
    assert tokenizer.encode("eigths eigth") == [1, 0]


@given(st.lists(st.sampled_from(words())))
def test_decode_inverts_encode(chosen: list[str]):
    tokenizer = TextTokenizer.from_words(words())
    caption = " ".join(chosen)
    assert tokenizer.encode(caption) == [words().index(word) for word in chosen]
    assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_unknown_words_are_all_named_once_with_near_ones(tokenizer: TextTokenizer):
    with pytest.raises(InputError, match=r"outside the vocabulary: 'drak' \(did you mean dark") as error:
        tokenizer.encode("drak green drak brigt")
    assert str(error.value).count("'drak' (") == 1
    assert "'brigt' (did you mean bright" in str(error.value)


def test_an_unknown_word_with_nothing_near_lists_the_vocabulary(tokenizer: TextTokenizer):
    with pytest.raises(InputError, match=re.escape("'xylophone'. Known words: dark green eight on bright.")):
        tokenizer.encode("xylophone")


def test_a_number_outside_the_vocabulary_is_refused(tokenizer: TextTokenizer):
    with pytest.raises(ValueError, match=re.escape("word 1 has number 5; expected 0..4.")):
        tokenizer.decode([0, 5])


@pytest.mark.parametrize("bad", ["", "two words", "Upper", " space"])
def test_words_are_lower_case_without_spaces(bad: str):
    with pytest.raises(ValueError, match="expected lower case without spaces"):
        TextTokenizer.from_words(["one", bad])


def test_a_repeated_word_is_refused():
    with pytest.raises(ValueError, match="'one' is in the vocabulary twice"):
        TextTokenizer.from_words(["one", "two", "one"])


def test_saved_is_the_librarys_own_format_and_reads_back(tokenizer: TextTokenizer, tmp_path):
    path = tmp_path / "text_tokenizer.json"
    tokenizer.save(path)
    assert json.loads(path.read_text())["model"]["type"] == "WordLevel"
    again = TextTokenizer.load(path)
    assert again.words == WORDS
    assert again.encode("Dark eigth") == [0, 2]
    with pytest.raises(InputError, match="exists already"):
        tokenizer.save(path)
    tokenizer.save(path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text_tokenizer.json"]


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the text tokenizer .*none\.json: No such file"):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"odd\.json is not a text tokenizer"):
        TextTokenizer.load(tmp_path / "odd.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.json is not a text tokenizer"):
        TextTokenizer.load(tmp_path / "bytes.json")

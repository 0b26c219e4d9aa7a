"""Words to numbers and back, and what an unknown word says."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from smalti.data.digits import words
from smalti.errors import InputError, InputWarning
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
    with pytest.raises(InputError, match=r"cannot read the text tokenizer .*none\.json: "):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"odd\.json is not a text tokenizer"):
        TextTokenizer.load(tmp_path / "odd.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.json is not a text tokenizer"):
        TextTokenizer.load(tmp_path / "bytes.json")


# Files of other projects ------------------------------------------------------------------------------------------

CORPUS = ["a red door in the rain", "two dogs on a beach", "a cat asleep on books"] * 5


def foreign_bpe(*specials: str) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(CORPUS, trainer)
    return found


def loaded(tokenizer: Tokenizer, tmp_path) -> TextTokenizer:
    tokenizer.save(str(tmp_path / "foreign.json"))
    return TextTokenizer.load(tmp_path / "foreign.json")


def truncates(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(3)


def pads(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=30, pad_id=1, pad_token="</s>")


def drops_out(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.9


def frames(tokenizer: Tokenizer) -> None:
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncates, r"not applied: truncation to 3 tokens \(--max-text-length cuts captions\)"),
        (pads, "not applied: padding with </s>"),
        (drops_out, "not applied: dropout of 0.9"),
        (frames, "not applied: the template that adds 2 special tokens"),
    ],
)
def test_settings_that_change_captions_are_switched_off_and_said(tmp_path, change, message):
    expected = loaded(foreign_bpe("<s>", "</s>"), tmp_path).encode(CORPUS[0])
    assert len(expected) > 3
    changed = foreign_bpe("<s>", "</s>")
    change(changed)
    with pytest.warns(InputWarning, match=message):
        found = loaded(changed, tmp_path)
    assert found.encode(CORPUS[0]) == expected
    assert max(expected) < found.vocab_size


def test_added_words_are_words_of_the_text(tmp_path):
    tokenizer = foreign_bpe()
    tokenizer.add_tokens(["astronaut"])
    found = loaded(tokenizer, tmp_path)
    numbers = found.encode("an astronaut")
    assert numbers[-1] == found.vocab_size - 1 and found.decode(numbers) == "an astronaut"


def word_pieces() -> Tokenizer:
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    return found


def unigram(unk_token: str | None) -> Tokenizer:
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", *([unk_token] if unk_token else [])]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token=unk_token, show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    return found


def letters(unk_token: str | None) -> Tokenizer:
    found = Tokenizer(models.BPE(unk_token=unk_token))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=[unk_token] if unk_token else [], show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    return found


MODELS = {
    "WordPiece": word_pieces,
    "Unigram": lambda: unigram("<unk>"),
    "Unigram without an unknown token": lambda: unigram(None),
    "BPE": lambda: letters("<unk>"),
    "BPE that drops what it does not know": lambda: letters(None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_no_piece_spells_is_named_for_every_kind_of_model(tmp_path, kind):
    found = loaded(MODELS[kind](), tmp_path)
    known = found.encode("a red cat on the beach")
    assert known and all(0 <= number < found.vocab_size for number in known)
    assert found.unknown_words("a red cat on the beach") == []
    assert any("\N{GRINNING FACE}" in word for word in found.unknown_words("a cat \N{GRINNING FACE} on books"))
    with pytest.raises(InputError, match="has words outside the vocabulary: .*" + "\N{GRINNING FACE}"):
        found.encode("a cat \N{GRINNING FACE} on books")


def test_a_caption_is_cut_where_a_tokenizer_changes_its_letters(tmp_path):
    tokenizer = foreign_bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    found = loaded(tokenizer, tmp_path)
    numbers, was_cut = found.encode_within("TWO Dogs on a beach \N{GRINNING FACE}", 4)
    assert was_cut and len(numbers) == 4
    whole = found.encode("TWO Dogs \N{GRINNING FACE}")
    assert found.encode_within("TWO Dogs \N{GRINNING FACE}", len(whole) - 1).numbers == whole[:-4]


def test_files_that_are_no_tokenizers_say_what_they_are(tmp_path):
    tokenizer = foreign_bpe()
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    with pytest.raises(InputError, match=r"it is a vocabulary alone, .*give the tokenizer\.json beside it"):
        TextTokenizer.load(tmp_path / "vocab.json")
    content = json.loads(tokenizer.to_str())
    content["model"]["type"] = "FutureBPE"
    (tmp_path / "newer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"it may be of a newer release than the one here, [0-9.]+, or damaged"):
        TextTokenizer.load(tmp_path / "newer.json")
    (tmp_path / "lfs.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match=r"it is a git-lfs pointer.*git lfs pull"):
        TextTokenizer.load(tmp_path / "lfs.json")

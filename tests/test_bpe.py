"""Byte-level pieces of words: any text, sizes as asked, controls only where asked; and the tables learned from."""

import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import BPE_CAPTIONS, BPE_CONFIG, tiny_bpe_pipeline
from tokenizers import Tokenizer

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.data.captions import read_captions
from smalti.errors import InputError, InputWarning
from smalti.interop.huggingface import export_llama
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import SPECIALS, BPEConfig, TextTokenizer, image_token

LINE = "two cats<|startofimage|><|image:36|><|image:0|><|image:36|><|endofimage|>"


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    return TextTokenizer.train(BPE_CAPTIONS, BPE_CONFIG)[0]


def test_default_sizes_are_those_of_the_card():
    vocabulary = BPEConfig().vocabulary
    assert vocabulary.size == 30_000
    assert repr(vocabulary) == "Vocabulary(image 0..4095, special 4096..4104, text 4105..29999)"
    assert len(SPECIALS) == 9


def test_a_line_of_text_and_codes_parses_exactly(small: TextTokenizer):
    ids = small.parse(LINE)
    assert ids[-5:] == [37, 36, 0, 36, 38]
    assert ids[:-5] == [number + 46 for number in small.encode("two cats")]
    assert small.parse("") == []


def test_the_whole_vocabulary_parses_the_issues_own_line():
    tokenizer, num_unused = TextTokenizer.train(BPE_CAPTIONS)
    line = (
        "a river has burst it 's banks and has spread out onto arable farmland alongside"
        "<|startofimage|><|image:2931|><|image:560|><|image:4095|><|endofimage|>"
    )
    ids = tokenizer.parse(line)
    assert ids[-5:] == [4096, 2931, 560, 4095, 4097]
    assert tokenizer.vocab_size == 25_895
    assert 0 < num_unused < 25_895 - 256


def test_the_file_alone_tells_everything(small: TextTokenizer, tmp_path):
    small.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocabulary == BPE_CONFIG.vocabulary
    assert loaded.to_json() == small.to_json()
    assert loaded.encode("two cats") == small.encode("two cats")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(LINE).ids == small.parse(LINE)
    assert library.decode(library.encode(LINE).ids, skip_special_tokens=False) == LINE
    assert library.get_vocab_size() == 37 + 9 + 290


@given(st.text())
def test_any_caption_comes_back(small: TextTokenizer, caption: str):
    numbers = small.encode(caption)
    assert all(0 <= number < 290 for number in numbers)
    assert small.decode(numbers) == caption


@given(st.lists(st.sampled_from(["<|endofimage|>", "<|image:3|>", "<|pad|>", "<|", "|>", "image:3", " dog", "\x00"])))
def test_typed_markers_are_text_in_a_caption(small: TextTokenizer, pieces: list[str]):
    caption = "".join(pieces)
    assert small.decode(small.encode(caption)) == caption


def test_only_parse_takes_typed_markers_for_markers(small: TextTokenizer):
    assert len(small.encode("<|endofimage|>")) > 5
    assert small.parse("<|endofimage|>") == [38]
    small.parse(LINE)
    assert len(small.encode("<|endofimage|>")) > 5  # asking once does not stay


def test_odd_captions(small: TextTokenizer):
    assert small.encode("") == []
    long = " ".join(["dog"] * 10_000)
    assert small.decode(small.encode(long)) == long
    with pytest.raises(InputError, match="half a surrogate pair"):
        small.encode("half \ud83d of it")
    with pytest.raises(ValueError, match=r"word 1 has number 290; expected 0\.\.289"):
        small.decode([0, 290])


@given(st.text(min_size=1), st.integers(1, 20))
def test_a_caption_is_cut_between_characters(small: TextTokenizer, caption: str, most: int):
    numbers, was_cut = small.encode_within(caption, most)
    assert len(numbers) <= most
    assert was_cut == (len(small.encode(caption)) > most)
    assert caption.startswith(small.decode(numbers))
    assert was_cut or small.decode(numbers) == caption


def test_four_bytes_of_one_character_are_not_cut_apart(small: TextTokenizer):
    assert len(small.encode("a🎉")) == 5
    assert small.encode_within("a🎉", 4) == (small.encode("a"), True)


@pytest.mark.parametrize(
    "order", [("text", "special", "image"), ("special", "text", "image"), ("text", "image", "special")]
)
def test_segments_stand_in_any_order(order, tmp_path):
    config = BPEConfig(image_size=5, text_size=270, specials=("<s>", "<e>"), order=order)
    tokenizer, num_unused = TextTokenizer.train(BPE_CAPTIONS, config)
    assert num_unused == 0
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.vocabulary == config.vocabulary
    offsets = {name: config.vocabulary[name].offset for name in order}
    assert tokenizer.parse("a<image>"[:1] + "<s>" + image_token(4) + "<e>") == [
        tokenizer.encode("a")[0] + offsets["text"],
        offsets["special"],
        offsets["image"] + 4,
        offsets["special"] + 1,
    ]
    assert tokenizer.decode(tokenizer.encode("Straße <s>")) == "Straße <s>"


def test_merges_are_learned_and_the_same_each_time(small: TextTokenizer):
    assert len(small.encode("a dog on a tree")) < 9
    again, _ = TextTokenizer.train(BPE_CAPTIONS, BPE_CONFIG)
    assert again.to_json() == small.to_json()


def test_unused_numbers_are_counted_and_never_encoded():
    tokenizer, num_unused = TextTokenizer.train(["ab ab"], BPEConfig(image_size=2, text_size=300))
    # 256 bytes, "ab" and " ab": nothing else is there to merge.
    assert num_unused == 42
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode("<|unused:3|>") != [tokenizer.words.index("<|unused:3|>")]
    assert max(tokenizer.encode("ab ab<|unused:3|>")) < 258


def test_segments_that_do_not_match_are_both_printed(small: TextTokenizer):
    small.check_vocabulary(BPE_CONFIG.vocabulary)
    other = Vocabulary({"special": SPECIALS, "image": 37, "text": 290})
    with pytest.raises(ValueError, match=r"image 0\.\.36, special 37\.\.45.*the model's Vocabulary\(special 0\.\.8"):
        small.check_vocabulary(other)
    TextTokenizer.from_words(["dog"]).check_vocabulary(other)  # words alone say nothing of segments
    with pytest.raises(ValueError, match="holds words alone"):
        TextTokenizer.from_words(["dog"]).parse("dog")


def test_a_file_whose_segments_are_mixed_is_refused(small: TextTokenizer, tmp_path):
    content = small.to_json().replace("<|image:0|>", "<|image:99|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="picture codes are not numbered 0, 1, 2"):
        TextTokenizer.load(tmp_path / "tokenizer.json")
    content = json.loads(small.to_json())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 40]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="other tokens lie among them"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_size": 255}, "holds the 256 bytes at least"),
        ({"image_size": 0}, "image_size is 0"),
        ({"order": ("image", "text")}, "expected image, special, text in any order"),
        ({"specials": ("end",)}, "not a name in angle brackets"),
        ({"specials": ("<|image:3|>",)}, "not a name in angle brackets"),
        ({"specials": ("<a>", "<a>")}, "named twice"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BPEConfig(**changes)


def test_nothing_to_learn_from():
    with pytest.raises(InputError, match="no captions"):
        TextTokenizer.train(["", ""])


def test_transformers_reads_an_exported_tokenizer(small: TextTokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

    layout = Layout.parse(
        BPE_CONFIG.vocabulary, {"text to image": "text{..7} <|startofimage|> image{3} <|endofimage|>"}
    )
    transformer = TransformerConfig(
        num_layers=1, d_model=8, num_heads=2, d_ff=11, max_length=13, bias=False,
        norm="rms", feed_forward="swiglu", positions="rotary",
    )  # fmt: skip
    torch.manual_seed(0)
    small.save(tmp_path / "text.json")
    model = new_model(layout, transformer)
    Bundle(model=model, layout=layout, name="t", text_tokenizer=tmp_path / "text.json").save(tmp_path / "bundle")
    files, notes = export_llama(tmp_path / "bundle", tmp_path / "llama")
    assert len(notes) == 1 and "predicts 328 of its 336 ids" in notes[0]
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in files}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs(LINE)["input_ids"] == small.parse(LINE)
    assert theirs.decode(small.parse(LINE)) == LINE
    assert theirs.decode(small.parse(LINE), skip_special_tokens=True) == "two cats"
    assert len(theirs) == BPE_CONFIG.vocabulary.size


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_bpe_pipeline()


def test_any_prompt_draws_a_picture(pipe: Pipeline, tmp_path):
    pipe.save(tmp_path / "bundle")
    loaded = Pipeline.load(tmp_path / "bundle")
    prompts = ["a dog", "", "\x00\x1b", "🎉", "<|pad|>"]
    drawn = loaded.generate_codes(prompts, seed=3)
    assert drawn.shape == (5, 7, 7)
    assert torch.equal(drawn, pipe.generate_codes(prompts, seed=3))
    assert len({tuple(codes.flatten().tolist()) for codes in drawn}) == 5


def test_a_long_prompt_is_cut_with_a_warning(pipe: Pipeline, small: TextTokenizer):
    prompt = "dog and cat " * 5000
    with pytest.warns(UserWarning, match=r"the caption was cut to 11 tokens, .*; the longest has \d{5}\."):
        drawn = pipe.generate_codes(prompt)
    kept = small.decode(small.encode(prompt)[:11])
    assert torch.equal(drawn, pipe.generate_codes(kept))
    with pytest.warns(UserWarning, match="2 of 3 captions were cut to 11 tokens") as found:
        pipe.generate_codes([prompt, "dog", prompt[:-9]], n=2, best_of=2, rerank="pmi")
    assert len(found) == 1


def test_guidance_steers_away_from_the_empty_caption(pipe: Pipeline):
    plain = pipe.generate_codes(["a dog", ""], seed=5)
    guided = pipe.generate_codes(["a dog", ""], seed=5, guidance_scale=4.0)
    assert not torch.equal(guided[0], plain[0])
    assert torch.equal(guided[1], plain[1])  # null + 4 · (null − null)
    named = pipe.generate_codes("a dog", seed=5, guidance_scale=4.0, negative_prompt="")
    assert torch.equal(named[0], guided[0])


def test_an_exported_bundle_goes_on_from_its_own_text(pipe: Pipeline, tmp_path):
    pipe.save(tmp_path / "bundle")
    export_llama(tmp_path / "bundle", tmp_path / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path / "llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    prompt = words("a dog<|startofimage|>", return_tensors="pt")
    line = words.decode(theirs.generate(**prompt, do_sample=False)[0])
    ours = pipe.generate_codes("a dog", temperature=0.0).flatten().tolist()
    assert line == "a dog<|startofimage|>" + "".join(map(image_token, ours)) + "<|endofimage|>"
    empty = words("<|startofimage|>", return_tensors="pt").input_ids
    guided = theirs.generate(**prompt, do_sample=False, guidance_scale=3.0, negative_prompt_ids=empty)[0, -50:-1]
    codes = pipe.generate_codes("a dog", temperature=0.0, guidance_scale=3.0).flatten().tolist()
    assert codes != ours and guided.tolist() == codes  # the pictures' ids come first


def test_another_tokenizer_in_a_bundle_is_refused_with_both_layouts(pipe: Pipeline):
    other, _ = TextTokenizer.train(
        BPE_CAPTIONS, BPEConfig(image_size=37, text_size=290, order=("text", "special", "image"))
    )
    with pytest.raises(
        ValueError, match=r"segments are Vocabulary\(text 0\.\.289.*the model's Vocabulary\(image 0\.\.36"
    ):
        Bundle(
            model=pipe.model,
            layout=pipe.layout,
            image_tokenizer=pipe.image_tokenizer,
            text_tokenizer=other,
            pictures=pipe.pictures,
        )


def test_train_through_the_command_line(tmp_path, capsys):
    (tmp_path / "captions.csv").write_text("id,Caption\n" + "".join(f'{i},"{c}"\n' for i, c in enumerate(BPE_CAPTIONS)))
    command = ["train", "text-tokenizer", str(tmp_path / "captions.csv"), "-o", str(tmp_path / "tokenizer.json")]
    assert run([*command, "--image-size", "37", "--text-size", "290"]) == 0
    assert "12 captions, 336 ids: Vocabulary(image 0..36" in capsys.readouterr().out
    assert TextTokenizer.load(tmp_path / "tokenizer.json").vocabulary == BPE_CONFIG.vocabulary
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*command, "--force", "--column", "words"]) == 2
    assert "has no column 'words'; it has id, Caption" in capsys.readouterr().err
    assert run([*command, "--force", "--text-size", "2000"]) == 0
    assert "numbers of the text are unused" in capsys.readouterr().err


def test_a_recipe_is_still_found_behind_train(capsys):
    assert run(["train", "no-such-recipe"]) == 2
    assert "no-such-recipe" in capsys.readouterr().err


def test_captions_are_found_in_every_kind_of_table(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = ["a dog, red", "zwei\nKatzen", "🎉"]
    (tmp_path / "a.csv").write_text('key,TEXT\n1,"a dog, red"\n2,"zwei\nKatzen"\n3,🎉\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text('Prompt\tNote\na dog, red\t\nzwei "Katzen\t\n🎉\t\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"n": 1, "caption": c}) + "\n" for c in expected))
    pq.write_table(pa.table({"__key__": [1, 2, 3], "caption": expected, "other": [b""] * 3}), tmp_path / "d.parquet")
    for name in ("a.csv", "c.jsonl", "d.parquet"):
        breaks = (
            pytest.warns(InputWarning, match="1 of its rows have line breaks") if name == "a.csv" else nullcontext()
        )
        with breaks:
            assert read_captions(tmp_path / name) == expected
    assert read_captions(tmp_path / "b.tsv") == ["a dog, red", 'zwei "Katzen', "🎉"]  # quotes are text there
    (tmp_path / "e.txt").write_text("a dog\ntwo\n")
    assert read_captions(tmp_path / "e.txt") == ["a dog", "two"]
    (tmp_path / "f.csv").write_text("whatever\nx\n")
    with pytest.raises(InputError, match="its one column is called 'whatever'"):
        read_captions(tmp_path / "f.csv")
    (tmp_path / "g.csv").write_text('Prompt\nMeal of "salad", apple\nx\n')
    assert read_captions(tmp_path / "g.csv") == ['Meal of "salad", apple', "x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,words\n1,x\n", "no column is known to be the captions; it has id, words"),
        ("a.csv", b"text,caption\n1,x\n", "several columns may be the captions; it has text, caption"),
        ("a.csv", b"caption,id\na, b, c\n", r"line 2: the row has . fields, the header 2"),
        ("a.csv", b"id,caption\n1\n", r"line 2: the row has . fields, the header 2"),
        ("a.csv", b"id,caption\n1,\xff\n", "line 2: it is not UTF-8 text"),
        ("a.csv", b"caption\n", "holds no captions"),
        ("a.jsonl", b'{"caption": 3}\n', r"line 1: 'caption' is 3; expected a caption"),
        ("a.jsonl", b'{"caption": "a"}\n{"caption\n', "line 2 is not JSON"),
        ("a.parquet", b"PAR1PAR1", "is not a whole parquet file"),
        ("a.docx", b"words", r"read from \.csv"),
    ],
)
def test_a_file_without_captions_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_captions(tmp_path / name)
    with pytest.raises(InputError, match="there is no file"):
        read_captions(tmp_path / "missing.csv")


def test_the_corpora_at_hand(shared_dir):
    captions = read_captions(shared_dir / "data" / "text" / "coco_captions.csv")
    assert len(captions) == 30_000
    assert len(read_captions(shared_dir / "data" / "text" / "PartiPrompts.tsv")) == 1_632
    assert len(read_captions(shared_dir / "data" / "emoji" / "train.parquet")) == 3_471
    tokenizer, num_unused = TextTokenizer.train(captions[:2000], BPEConfig(text_size=1500))
    assert num_unused == 0
    assert all(tokenizer.decode(tokenizer.encode(caption)) == caption for caption in captions[-200:])

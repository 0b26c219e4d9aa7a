"""Training on tokens that are there already: a table that was made before, or a data set of the hub."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_train_captions import CAPTIONS, NUM, recipe  # noqa: F401 (a fixture)

from smalti.cli.app import run
from smalti.data.ready_tokens import are_tokens
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import BPEConfig, TextTokenizer

SHORT = "layout.orders={text to image: '(text{..3}) <|startofimage|> image{49} <|endofimage|>'}"


@pytest.fixture
def given(recipe, tmp_path):  # noqa: F811
    """The command that trains, with a text tokenizer of its own."""
    TextTokenizer.train(CAPTIONS[::-1] * 2, BPEConfig(image_size=37, text_size=280))[0].save(tmp_path / "words.json")
    return ["train", str(recipe), "--quiet", f"text_tokenizer={tmp_path / 'words.json'}"]


def tokenize(tmp_path, capsys, *options: str) -> None:
    command = ["tokenize", str(tmp_path / "train.parquet"), "-o", str(tmp_path / "tokens.parquet"), "--force", *options]
    assert run([*command, "--image-tokenizer", str(tmp_path / "image_tokenizer")]) == 0
    capsys.readouterr()


def write_hub_set(tmp_path, metadata: dict | None = None) -> None:
    """A data set in the card's schema, whose text_tokens are another tokenizer's."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    codes = np.random.default_rng(1).integers(37, size=(NUM, 49))
    for split in ("train", "validation"):
        rows = {"__key__": CAPTIONS, "image_tokens": list(codes), "text_tokens": [[29_999]] * NUM, "text": CAPTIONS}
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        if metadata is None:
            pq.write_table(pa.table(rows | {"data": ["{}"] * NUM}), path)
        else:
            write_token_table(path, [token_rows(CAPTIONS, codes, None, CAPTIONS)], metadata)


def test_a_table_made_before_is_trained_on_as_it_is(given, tmp_path, capsys):
    words = ["--text-tokenizer", str(tmp_path / "words.json"), "--max-text-length", "9"]
    tokenize(tmp_path, capsys, *words)
    tokens = f"data.train={tmp_path / 'tokens.parquet'}"
    assert run([*given, tokens]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "tokens").iterdir()) == ["validation.parquet"]
    assert (
        Pipeline.load(tmp_path / "out" / "bundle").text_tokenizer.words
        == TextTokenizer.load(tmp_path / "words.json").words
    )


def test_a_data_set_of_the_hub_is_trained_on_as_it_streams(given, tmp_path, capsys):
    pytest.importorskip("datasets")
    write_hub_set(tmp_path)
    sources = [f"data.{split}=hub:{tmp_path / 'set'}" for split in ("train", "validation")]
    sources.append(SHORT)
    assert run([*given, *sources]) == 0
    assert "captions just read are cut to 3 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokens").exists()
    assert len(Pipeline.load(tmp_path / "out" / "bundle").generate("")) == 1
    assert run([*given, *sources]) == 0  # nothing is left to do


def test_tokens_need_their_text_tokenizer(recipe, given, tmp_path, capsys):  # noqa: F811
    tokenize(tmp_path, capsys)
    tokens = f"data.train={tmp_path / 'tokens.parquet'}"
    assert run(["train", str(recipe), "--quiet", tokens]) == 2
    assert "holds tokens: give the text_tokenizer that goes with them" in capsys.readouterr().err
    assert run([*given, tokens]) == 2
    assert "does not say which text tokenizer made its text_tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_refused_naming_both(given, tmp_path, capsys):
    TextTokenizer.train(CAPTIONS, BPEConfig(image_size=37, text_size=280, order=("text", "image", "special")))[0].save(
        tmp_path / "other.json"
    )
    tokenize(tmp_path, capsys, "--text-tokenizer", str(tmp_path / "other.json"))
    tokens = f"data.train={tmp_path / 'tokens.parquet'}"
    assert run([*given, tokens]) == 2
    error = capsys.readouterr().err
    assert "made with another tokenizer: text_tokenizer_sha256" in error
    found = TokenTable.open(tmp_path / "tokens.parquet").metadata["text_tokenizer_sha256"]
    assert error.count(found) == 1 and ", now " in error
    assert run([*given[:-1], tokens, f"text_tokenizer={tmp_path / 'other.json'}"]) == 2
    error = capsys.readouterr().err  # the recipe's segments
    assert "segments are Vocabulary(text 0..279, image 280" in error and "the model's Vocabulary(image 0..36" in error


def test_captions_longer_than_the_layout_takes_are_refused(given, tmp_path, capsys):
    tokenize(tmp_path, capsys, "--text-tokenizer", str(tmp_path / "words.json"))
    longest = max(map(len, map(TextTokenizer.load(tmp_path / "words.json").encode, CAPTIONS)))
    assert run([*given, f"data.train={tmp_path / 'tokens.parquet'}", SHORT]) == 2
    assert f"captions of up to {longest} tokens, the layout takes 3. Tokenize with" in capsys.readouterr().err


def test_a_hub_set_of_another_image_tokenizer_is_refused(given, tmp_path, capsys):
    pytest.importorskip("datasets")
    write_hub_set(tmp_path, {"image_tokenizer_sha256": "0" * 64, "grid": [7, 7], "codebook_size": 37})
    assert run([*given, f"data.train=hub:{tmp_path / 'set'}"]) == 2
    assert f"image_tokenizer_sha256 {'0' * 64}, now " in capsys.readouterr().err


def test_a_bad_row_of_a_table_is_named(given, tmp_path, capsys):
    codes = [[1] * 49, [1] * 48, [1] * 48 + [37]]
    for rows, message in (
        (codes[:2], "row 1: image_tokens has 48 tokens, expected 49"),
        (codes[::2], "row 1: image_tokens has the value 37, expected 0 to 36"),
    ):
        path = tmp_path / "tokens.parquet"
        write_token_table(path, [token_rows(["a", "b"], rows)], {}, force=True)
        assert run([*given, f"data.train={path}"]) == 2
        assert f"{path}, {message}" in capsys.readouterr().err


def test_what_are_tokens(tmp_path):
    write_token_table(tmp_path / "a" / "t.parquet", [token_rows(["a"], [[1]])], {})
    assert are_tokens("hub:owner/name") and are_tokens(tmp_path / "a") and are_tokens(tmp_path / "a" / "*.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for path in ("b.parquet", "none.parquet", "."):
        assert not are_tokens(tmp_path / path)

"""What can be wrong with captions, prompts and tokens, as the command line says it: one line that names the place."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import BPE_CAPTIONS, BPE_CONFIG, tiny_bpe_pipeline

from smalti.cli import app as cli
from smalti.image_files import read_receipt
from smalti.image_tokenizers import save_image_tokenizer
from smalti.text_tokenizer import BPEConfig, TextTokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "words"
    tiny_bpe_pipeline().save(folder)
    return folder


@pytest.fixture
def smalti(capsys):
    def run(*arguments: object) -> tuple[int, str]:
        code = cli.run([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, err

    return run


@pytest.mark.parametrize("prompt", ["", "tab\tbell\x07escape\x1b[31m", "🎉\u202e\u0301", "<|endofimage|>"])
def test_odd_prompts_are_drawn_as_they_are(smalti, bundle: Path, tmp_path, prompt: str):
    path = tmp_path / "a.png"
    code, err = smalti("generate", prompt, "-o", path, "--bundle", bundle)
    assert code == 0 and err.count("\n") <= 1
    assert read_receipt(path)["prompt"] == prompt
    assert smalti("replay", path, "--bundle", bundle)[0] == 0


def test_a_typed_marker_is_text(smalti, bundle: Path):
    pipe = tiny_bpe_pipeline()
    numbers = pipe.text_tokenizer.encode("<|endofimage|>")
    assert pipe.text_tokenizer.decode(numbers) == "<|endofimage|>"
    segment = pipe.layout.vocabulary["text"]
    assert all(0 <= number < segment.size for number in numbers)  # not an id of the markers


def test_ten_thousand_words_are_cut_with_a_warning_in_one_line(smalti, bundle: Path, tmp_path):
    code, err = smalti("generate", "dog " * 10_000, "-o", tmp_path / "a.png", "--bundle", bundle)
    assert code == 0
    assert err.startswith("warning: the caption was cut to 11 tokens, as many as this bundle takes; the longest has ")
    assert err.count("\n") == 1


def test_ten_thousand_unknown_words_are_an_error_of_readable_length(smalti, tmp_path):
    prompt = " ".join(f"word{i}" for i in range(10_000))
    code, err = smalti("generate", prompt, "-o", tmp_path / "a.png", "--bundle", "digits")
    assert code == 2 and "and 9994 more" in err and len(err) < 1000
    code, err = smalti("generate", "", "-o", tmp_path / "a.png", "--bundle", "digits")
    assert code == 2 and "has 0 words; this bundle's captions have 6" in err


def test_bytes_that_are_no_text(smalti, bundle: Path, tmp_path):
    prompt = b"caf\xe9".decode(errors="surrogateescape")  # how a shell passes Latin-1 on
    code, err = smalti("generate", prompt, "-o", tmp_path / "a.png", "--bundle", bundle)
    assert code == 2 and "is not valid Unicode: not UTF-8" in err


def test_captions_without_the_named_column(smalti, tmp_path):
    (tmp_path / "c.csv").write_text("id,words\n1,a dog\n")
    for options in ([], ["--caption-column", "caption"]):
        code, err = smalti("train", "text-tokenizer", tmp_path / "c.csv", "-o", tmp_path / "t.json", *options)
        assert code == 2 and "it has id, words: name one of them by --caption-column" in err
    code, err = smalti("train", "text-tokenizer", tmp_path / "none.csv", "-o", tmp_path / "t.json")
    assert code == 2 and "there is no file" in err


def test_pictures_without_the_named_column_and_a_table_cut_short(smalti, bundle: Path, tmp_path):
    (tmp_path / "pairs").mkdir()
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "pairs" / "a.png")
    (tmp_path / "pairs" / "captions.csv").write_text("file_name,words\na.png,a dog\n")
    command = ["tokenize", tmp_path / "pairs", "-o", tmp_path / "t.parquet", "--bundle", bundle]
    code, err = smalti(*command, "--caption-column", "caption")
    assert code == 2 and "captions.csv has no column 'caption'; it has words" in err
    assert smalti(*command, "--caption-column", "words")[0] == 0
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "t.parquet").read_bytes()[:-200])
    code, err = smalti("tokenize", cut, "-o", tmp_path / "u.parquet", "--bundle", bundle)
    assert code == 2 and "cut.parquet is not a whole parquet file" in err and "cut short" in err


def test_a_tokenizer_json_of_other_segments_prints_both_layouts(smalti, bundle: Path, tmp_path):
    other, _ = TextTokenizer.train(
        BPE_CAPTIONS, BPEConfig(image_size=37, text_size=290, order=("text", "special", "image"))
    )
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    other.save(changed / "text_tokenizer.json", force=True)
    code, err = smalti("generate", "a dog", "-o", tmp_path / "a.png", "--bundle", changed)
    assert code == 2 and "text_tokenizer.json" in err and "its checksum is not the one in the config" in err
    config = json.loads((changed / "config.json").read_text())
    content = (changed / "text_tokenizer.json").read_bytes()
    config["sha256"]["text_tokenizer.json"] = hashlib.sha256(content).hexdigest()
    (changed / "config.json").write_text(json.dumps(config))
    code, err = smalti("generate", "a dog", "-o", tmp_path / "a.png", "--bundle", changed)
    assert code == 2
    assert "segments are Vocabulary(text 0..289, special 290..298, image 299..335)" in err
    assert f"the model's {BPE_CONFIG.vocabulary!r}" in err


def test_a_text_tokenizer_that_is_none(smalti, tmp_path):
    save_image_tokenizer(tiny_bpe_pipeline().image_tokenizer, tmp_path / "image_tokenizer")
    (tmp_path / "words.json").write_text('{"version": "1.0"}')
    options = ["--image-tokenizer", tmp_path / "image_tokenizer", "--text-tokenizer", tmp_path / "words.json"]
    code, err = smalti("tokenize", tmp_path, "-o", tmp_path / "t.parquet", *options)
    assert code == 2 and "words.json is not a text tokenizer of the tokenizers library" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "import-lines", "PIPE.txt", "-o", "OUT.parquet"),
        ("data", "export-lines", "PIPE.parquet", "-o", "OUT.txt"),
        ("train", "text-tokenizer", "PIPE.parquet", "-o", "OUT.json"),
        ("train", "text-tokenizer", "PIPE.csv", "-o", "OUT.json"),
        ("tokenize", "PIPE.parquet", "-o", "OUT.parquet", "--bundle", "BUNDLE"),
        ("tokenize", "PIPE*.tar", "-o", "OUT.parquet", "--bundle", "BUNDLE"),
        ("evaluate", "tokenizer", "BUNDLE", "PIPE.parquet"),
        ("evaluate", "tokenizer", "BUNDLE", "FOLDER"),
        ("evaluate", "BUNDLE", "--data", "PIPE.parquet"),
        ("inspect", "digits", "--data", "PIPE.txt", "-o", "OUT"),
        ("caption", "PIPE.png", "--bundle", "BUNDLE"),
        ("replay", "PIPE.png", "--bundle", "BUNDLE"),
        ("import", "hf-llama", "PIPE.safetensors", "-o", "OUT"),
        ("import", "llamagen-vq", "PIPE.pt", "-o", "OUT"),
    ],
)
def test_a_pipe_in_place_of_a_file_is_named_and_never_waited_for(smalti, bundle: Path, tmp_path, arguments):
    """As `<(zcat lines.gz)` of a shell gives one. Nobody writes to these: whoever opened one would wait for ever."""
    (tmp_path / "pictures").mkdir()
    for name in ("p.txt", "p.parquet", "p.csv", "p.tar", "p.png", "p.safetensors", "p.pt", "pictures/p.png"):
        os.mkfifo(tmp_path / name)
    names = {"BUNDLE": bundle, "FOLDER": tmp_path / "pictures"}
    given = [
        names.get(word) or word.replace("PIPE", f"{tmp_path}/p").replace("OUT", f"{tmp_path}/out") for word in arguments
    ]
    code, err = smalti(*given)
    assert code == 2 and "is a pipe or a device" in err and "save what comes out of it to a file" in err
    assert not list(tmp_path.glob("out*"))

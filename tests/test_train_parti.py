"""Parti as a system: trained on a handful of pairs through the command line, then drawn from; and its parts."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from serving import Running, picture_of
from test_train_captions import CAPTIONS, encoded_pictures
from tiny_parti import GRID, image_tokenizer, tiny

from smalti.cli.app import run
from smalti.image_files import read_receipt
from smalti.image_tokenizers import save_image_tokenizer
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.recipes import load_recipe, shipped_recipes
from smalti.tasks.doctor import examine
from smalti.tasks.images import Pipeline

SIZE = (8 * GRID[0], 8 * GRID[1])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A small recipe in the shipped one's form, with pairs and an image tokenizer beside it."""
    folder = tmp_path_factory.mktemp("parti")
    table = pa.table({"image": encoded_pictures(SIZE), "caption": CAPTIONS})
    for name in ("train", "validation"):
        pq.write_table(table, folder / f"{name}.parquet")
    save_image_tokenizer(image_tokenizer(), folder / "image_tokenizer")
    content = yaml.safe_load(shipped_recipes()["parti"].read_text())
    content |= {
        "data": {name: str(folder / f"{name}.parquet") for name in ("train", "validation")},
        "image_tokenizer": str(folder / "image_tokenizer"),
        "text_size": 390,
        "max_text": 12,
        "watch": {"prompts": ["a red bird", ""], "every": 2},
        "output": str(folder / "out"),
    }
    content["train"] |= {"num_epochs": None, "num_steps": 3, "batch_size": 5, "evaluation_rows": 7, "warmup_steps": 1}
    content["train"] |= {"optimizer": "adafactor", "schedule": "exponential", "decay_from": 0.5, "recompute": True}
    content["reranker"] = {
        "model": {"picture_layers": 1, "embedding_width": 7},
        "train": {"num_steps": 3, "batch_size": 6, "masked_weight": 1.0},
        "lends_encoder": True,
    }
    content["model"] |= {"encoder_layers": 1, "decoder_layers": 2, "d_model": 24, "num_heads": 3, "d_ff": 29}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def trained(recipe):
    assert run(["train", str(recipe), "--quiet"]) == 0
    return recipe.parent / "out"


def test_the_whole_system_from_pairs_to_pictures(recipe, trained, capsys):
    pipe = Pipeline.load(trained / "bundle")
    assert isinstance(pipe.model, EncoderDecoder) and pipe.bundle.can_draw and not pipe.bundle.can_caption
    assert str(pipe.layout) == "1 × (text{..12}) <eot> <sot> image{15}"
    assert set(pipe.bundle.figures) == {
        "validation nats per picture token, text to image",
        "validation nats per picture token, text to image, captions empty",
    }
    assert (trained / "samples" / "table.png").exists()
    assert pipe.rerankers == ("contrastive", "pmi", "picture")
    made = (trained / "model" / "curves.csv").stat().st_mtime_ns
    assert run(["train", str(recipe), "--quiet"]) == 0  # nothing is left to do
    assert (trained / "model" / "curves.csv").stat().st_mtime_ns == made
    assert run(["train", str(recipe), "--quiet", "d_model=48"]) == 2
    assert "model.d_model is 24 there, 48 here" in capsys.readouterr().err


def test_drawn_by_the_command_line_and_again_from_the_receipt(trained, tmp_path, capsys):
    bundle, out = str(trained / "bundle"), tmp_path / "birds.png"
    prompt = ["generate", "two red birds", "--bundle", bundle, "-n", "3", "-o", str(out), "--guidance-scale", "2"]
    assert run([*prompt, "--negative-prompt", "a blue bird", "--best-of", "2"]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    with Image.open(pictures[0]) as picture:
        assert len(pictures) == 3 and picture.size == SIZE[::-1]
    receipt = read_receipt(pictures[0])
    assert (
        receipt["prompt"] == "two red birds"
        and receipt["executor"] in ("eager", "native")
        and receipt["rerank"] == "contrastive"
    )
    assert run(["replay", str(pictures[1]), "--bundle", bundle, "-o", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(pictures[1])))
    capsys.readouterr()
    assert run(["score", str(pictures[0]), "two red birds", "--bundle", bundle]) == 0
    assert run(["info", bundle]) == 0
    assert "(text{..12}) <eot> <sot> image{15}" in capsys.readouterr().out


def test_a_bundle_keeps_its_promises(tmp_path):
    pipe = tiny(local_kernel=3)
    pipe.save(tmp_path / "bundle")
    loaded = Pipeline.load(tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["model"]["family"] == "encoder_decoder"
    assert loaded.weights_sha256 == pipe.weights_sha256
    certificate = examine(loaded.bundle, num_tokens=20)
    assert certificate.holds, [check for check in certificate.checks if not check.holds]
    codes = pipe.generate_codes(["a red ball", ""], seed=[3, 4], guidance_scale=2.0)
    assert torch.equal(codes, loaded.generate_codes(["a red ball", ""], seed=[3, 4], guidance_scale=2.0))
    *_, last = loaded.stream("a red ball", seed=3, guidance_scale=2.0)
    assert torch.equal(last.codes, codes[0].flatten())


def test_what_does_not_go_with_it_is_refused_by_name(recipe, tmp_path, capsys):
    tiny().save(tmp_path / "bundle")
    bundle, prompt = str(tmp_path / "bundle"), "a red ball"
    refused = str(tmp_path / "refused")
    generate = ["generate", prompt, "--bundle", bundle, "-o", f"{refused}.png"]
    for command, message in (
        ([*generate, "--best-of", "2", "--rerank", "caption"], "so it cannot rerank by 'caption'"),
        ([*generate, "--guidance-scale", "1", "--negative-prompt", "a ball"], "guidance_scale is 1, which is none"),
        (["export", "hf", bundle, refused], "is an EncoderDecoder"),
    ):
        assert run(command) == 2, command
        assert message in capsys.readouterr().err, command
    assert not list(tmp_path.glob("refused*"))


def test_it_is_served_as_the_library_draws():
    pipe = tiny()
    body = {"model": "tiny", "prompt": "a red ball", "n": 2, "seed": 3, "guidance_scale": 2.0, "size": "auto"}
    with Running(pipe, executor="eager") as server:
        status, answer, _ = server.request("POST", "/v1/images/generations", body)
    assert status == 200, answer
    expected = pipe.generate("a red ball", n=2, seed=3, guidance_scale=2.0)
    for found, picture in zip(answer["data"], expected, strict=True):
        assert np.array_equal(np.asarray(picture_of(found["b64_json"])), np.asarray(picture))


def test_a_caption_that_is_too_long_is_cut_and_counted():
    pipe = tiny()
    long = "a red ball " * 9
    with pytest.warns(
        UserWarning, match="the caption was cut to 9 tokens, as many as this bundle takes; the longest has"
    ):
        cut = pipe.generate_codes(long, seed=1)
    assert cut.shape == (1, *GRID)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model=parti-9b", "preset 'parti-9b' is unknown; choose one of parti-350m"),
        ("model.local_kernel=4", "local_kernel is 4; expected an odd number"),
        ("text_size=300", "it is at least 352"),
        ("data.validation=null", "give data.train and data.validation"),
        ("optimizer=lion", "optimizer 'lion' is unknown; choose one of adamw, muon, adafactor"),
        ("train.decay_from=1.5", "decay_from is 1.5"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(recipe, tmp_path, capsys, setting, message):
    assert run(["train", str(recipe), "--quiet", setting, f"output={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipe_takes_every_preset():
    for preset in ("parti-350m", "parti-750m", "parti-3b", "parti-20b"):
        recipe = load_recipe("parti", [f"model={preset}"])
        assert recipe.model.config(text_size=16_000, max_text=128, codebook_size=8192, grid=(32, 32)).dropout == 0.1

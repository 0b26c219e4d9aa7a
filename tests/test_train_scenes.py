"""The system of scenes from grammar to report: it ends with a bundle whose prompts were read back, and running it again
changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smalti.bundle import CONFIG, Bundle
from smalti.cli.app import run
from smalti.data.pairs import PairTable
from smalti.data.scenes import parse_caption
from smalti.errors import InputError
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.recipes import load_recipe
from smalti.systems.scenes import train_scenes
from smalti.tasks.images import Pipeline

SETTINGS = [
    "data.num_train=120",
    "data.num_validation=6",
    "data.num_test=4",
    "tokenizer_pictures=16",
    "image_tokenizer.model.width=8",
    "image_tokenizer.model.num_heads=2",
    "image_tokenizer.model.decoder_blocks=1",
    "codebook_size=23",
    "image_tokenizer.train.num_steps=3",
    "image_tokenizer.train.batch_size=8",
    "text_size=440",
    "model.num_layers=1",
    "model.d_model=12",
    "model.num_heads=2",
    "model.d_ff=17",
    "train.num_steps=3",
    "train.warmup_steps=1",
    "train.batch_size=8",
    "watch={}",
    "evaluate.num=4",
    "evaluate.best_of=[1, 2]",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("scenes") / "run").parent


def train(output: Path, *settings: str) -> Path:
    recipe = load_recipe("scenes", [*SETTINGS, *settings, f"output={output}"])
    return train_scenes(recipe, command="smalti train scenes", show_progress=False)


def test_a_run_has_everything_and_running_again_changes_nothing(whole: Path):
    pipe = Pipeline.load(whole / "bundle")
    assert pipe.grid == (8, 8) and pipe.bundle.about["Trained by"] == "`smalti train scenes`"
    report = json.loads((whole / "prompts.json").read_text())
    assert report["weights_sha256"] == pipe.weights_sha256 and report["config"]["num"] == 4
    assert any(name.startswith("prompts, unseen: best of 2") for name in pipe.bundle.figures)
    assert len(PairTable(whole / "data" / "train.parquet")) == 120
    watched = [path for path in whole.rglob("*") if path.is_file() and "bundle" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in watched if "prompts" not in path.name}
    assert train(whole) == whole / "bundle"
    assert {path: path.stat().st_mtime_ns for path in before if "prompts" not in path.name} == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.num_train=121", r"data\.num_train is 120 there, 121 here"),
        ("image_tokenizer.train.num_steps=4", r"num_steps is 3 there, 4 here"),
        ("model.d_ff=19", r"model\.d_ff is 17 there, 19 here"),
    ],
)
def test_another_recipe_is_refused(whole: Path, setting: str, message: str):
    with pytest.raises(InputError, match=message):
        train(whole, setting)


def test_an_encoder_decoder_learns_scenes_whose_captions_leave_nothing_out(tmp_path):
    small = ["model.d_model=12", "model.num_heads=2", "model.d_ff=17", "model.encoder_layers=1", "text_size=360"]
    shared = [one for one in SETTINGS if not one.startswith(("model.", "text_size"))]
    recipe = load_recipe("scenes-parti", [*shared, *small, "max_text=100", f"output={tmp_path / 'run'}"])
    pipe = Pipeline.load(train_scenes(recipe, command="smalti train scenes-parti", show_progress=False))
    assert isinstance(pipe.model, EncoderDecoder) and pipe.rerankers[0] == "picture"
    assert pipe.bundle.about["Trained by"] == "`smalti train scenes-parti`"
    assert any(name.startswith("prompts, unseen: best of 2") for name in pipe.bundle.figures)
    claims = [parse_caption(text) for text in PairTable(tmp_path / "run/data/train.parquet").read().captions]
    assert sum(bool(claim.background and claim.texture) for claim in claims) > 90


def test_the_recipe_as_it_ships():
    recipe = load_recipe("scenes")
    assert recipe.image_tokenizer.model.palette == 4 and recipe.layout.orders.keys() == {
        "text to image",
        "image to text",
    }


def test_the_bundle_is_measured_by_the_command(whole: Path, capsys):
    command = ["evaluate", "prompts", str(whole / "bundle"), "--num", "4", "--best-of", "1", "--guidance", "1,2"]
    assert run([*command, "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "4 prompts of scenes drawn by run" in said and "1 picture, guidance 2" in said
    assert "unseen shape and colour" in said


def test_a_training_begins_with_a_bundles_weights_if_it_is_of_the_same_shape(whole: Path, tmp_path):
    again, image_tokenizer = tmp_path / "again", "image_tokenizer"
    shutil.copytree(whole / image_tokenizer, again / image_tokenizer)
    other = ["data.complete_captions=1", "data.num_train=100"]  # words learned from these would have other numbers
    begin = f"begin_with={whole / 'bundle'}"
    with pytest.raises(InputError, match="its model differ from the recipe's; name a bundle of the same"):
        train(again, begin, *other, "model.d_ff=19")
    (again / "recipe.json").unlink()
    still = ["train.learning_rate=1e-12", "train.weight_decay=0", "train.ema_decay=0"]
    trained = train(again, begin, *other, *still)
    before, after = (Pipeline.load(folder) for folder in (whole / "bundle", trained))
    weights = after.model.state_dict()
    assert all(torch.allclose(tensor, weights[name], atol=1e-6) for name, tensor in before.model.state_dict().items())
    assert before.text_tokenizer.words == after.text_tokenizer.words
    claims = [parse_caption(text) for text in PairTable(again / "data" / "train.parquet").read().captions]
    assert all(claim.background and claim.texture and all(group.size for group in claim.groups) for claim in claims)


def test_what_the_best_is_chosen_by_is_the_recipes_and_must_be_there(whole: Path, tmp_path):
    # refused before anything is trained
    line = "<|startoftext|> (text{..32}) <|startofimage|> image{64} <|endofimage|>"
    one_order = f'layout.orders={{"text to image": "{line}"}}'
    shutil.copytree(whole / "image_tokenizer", tmp_path / "one" / "image_tokenizer")
    with pytest.raises(ValueError, match="rerank is 'both'; a bundle of this layout ranks by pmi, picture"):
        train(tmp_path / "one", one_order, "sample.rerank=both")
    bundle = Bundle.load(whole / "bundle")
    bundle.sampling = replace(bundle.sampling, rerank="both")
    bundle.save(tmp_path / "chosen", half=True)
    assert Pipeline.load(tmp_path / "chosen").rerankers == ("both", "caption", "pmi", "picture")
    config = tmp_path / "chosen" / CONFIG
    config.write_text(config.read_text().replace('"both"', '"luck"'))
    with pytest.raises(InputError, match="rerank is 'luck'; a bundle of this layout ranks by caption, both, pmi"):
        Bundle.load(tmp_path / "chosen")

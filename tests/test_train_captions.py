"""Pictures from free captions: the whole system on a handful of pairs, through the command line."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from smalti.cli.app import run
from smalti.data.tokens import TokenTable
from smalti.image_tokenizers import save_image_tokenizer
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqvae import VQVAE, VQVAEConfig
from smalti.interop.huggingface import export_llama, read_llama
from smalti.models.decoder_only import new_model
from smalti.recipes import load_recipe, shipped_recipes
from smalti.sequences.layout import Layout
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import BPEConfig

NUM = 17
CAPTIONS = [f"{colour} Straße with {number} birds" for colour in ("red", "blue") for number in range(9)][:NUM]


def encoded_pictures(size: tuple[int, int]) -> list[bytes]:
    """A picture of noise for each of CAPTIONS."""
    pictures = np.random.default_rng(0).integers(256, size=(NUM, *size, 3)).astype(np.uint8)
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    return encoded


@pytest.fixture
def recipe(tmp_path):
    """A small recipe in the shipped one's form, with pairs and an image tokenizer beside it."""
    encoded = encoded_pictures((28, 28))
    for name in ("train", "validation"):
        pq.write_table(pa.table({"image": encoded, "caption": CAPTIONS}), tmp_path / f"{name}.parquet")
    torch.manual_seed(0)
    quantizer = QuantizerConfig(codebook_size=37, code_dim=5, update="gradient")
    config = VQVAEConfig(width=8, num_heads=2, encoder_blocks=1, decoder_blocks=1, quantizer=quantizer)
    save_image_tokenizer(VQVAE(config), tmp_path / "image_tokenizer")
    content = yaml.safe_load(shipped_recipes()["cc3m"].read_text())
    content |= {
        "data": {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")},
        "image_tokenizer": str(tmp_path / "image_tokenizer"),
        "text_size": 280,
        "train": {"num_steps": 3, "batch_size": 5, "evaluation_rows": 7, "caption_dropout": 0.1},
        "watch": {"prompts": ["a | red bird", ""], "every": 2},
        "output": str(tmp_path / "out"),
    }
    content["model"] |= {"num_layers": 1, "d_model": 24, "num_heads": 3, "d_ff": 29}
    content["layout"]["orders"] = {"text to image": "(text{..9}) <|startofimage|> image{49} <|endofimage|>"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_the_whole_system_from_pairs_to_pictures_and_to_a_llama(recipe, tmp_path, capsys):
    assert run(["train", str(recipe), "--quiet"]) == 0
    assert "smalti export hf" in capsys.readouterr().out
    out = tmp_path / "out"
    table = TokenTable.open(out / "tokens" / "train.parquet", image_length=49, image_vocab_size=37)
    assert len(table) == NUM
    pipe = Pipeline.load(out / "bundle")
    assert (out / "samples" / "table.md").read_text().startswith("| iteration | a \\| red bird | (no caption) |")
    assert [path.name for path in sorted((out / "samples").glob("*-2.png"))] == [
        "00000000-2.png",
        "00000002-2.png",
        "00000003-2.png",
    ]
    assert set(pipe.bundle.figures) == {
        "validation nats per picture token, text to image",
        "validation nats per picture token, text to image, captions empty",
    }
    assert pipe.bundle.about["Trained by"] == f"`smalti train {recipe} --quiet`".replace(" --quiet", "")
    assert pipe.layout.vocabulary == pipe.text_tokenizer.vocabulary
    [picture] = pipe.generate("a 🎉", seed=1)
    assert picture.size == (28, 28)
    (note,) = export_llama(out / "bundle", tmp_path / "llama")[1]
    held = pipe.model.config.head_slot
    left_out = pipe.layout.vocabulary.size - held.size
    assert f"the rows of lm_head.weight for the other {left_out} are zeros" in note and held.size == 37
    exported = read_llama(tmp_path / "llama").model.head
    assert int((exported == 0).all(1).sum()) == left_out
    assert torch.equal(exported[held.token_ids(torch.arange(held.size))], pipe.model.head)
    made = (out / "tokens" / "train.parquet").stat().st_mtime_ns
    claimed = json.loads((out / "recipe.json").read_text())
    del claimed["model"]["head_width"]  # as a version wrote it that did not have this setting
    (out / "recipe.json").write_text(json.dumps(claimed))
    assert run(["train", str(recipe), "--quiet"]) == 0  # nothing is left to do
    assert (out / "tokens" / "train.parquet").stat().st_mtime_ns == made
    assert run(["train", str(recipe), "--quiet", "caption_dropout=0.3"]) == 2
    assert "other settings (train.caption_dropout is 0.1 there, 0.3 here; see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("layout.orders={a: '(text{..9}) <|startofimage|> image{48} <|endofimage|>'}", "7 × 7 codes, but the order"),
        ("layout.orders={a: 'text{9} <|startofimage|> image{49} <|endofimage|>'}", "free captions have any length"),
        ("caption_dropout=1.0", "caption_dropout is 1.0"),
        ("text_size=200", "holds the 256 bytes"),
        ("data.validation=null", "give data.train and data.validation"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(recipe, tmp_path, capsys, setting, message):
    assert run(["train", str(recipe), "--quiet", setting]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipe_is_the_cards():
    recipe = load_recipe("cc3m")
    config = BPEConfig(text_size=recipe.text_size, specials=recipe.layout.specials, order=recipe.segments)
    assert config == BPEConfig()
    layout = Layout.parse(config.vocabulary, recipe.layout.orders)
    assert layout.max_length == recipe.model.max_length == 98
    with torch.device("meta"):
        assert new_model(layout, recipe.model).num_parameters == 15_155_456  # the recipe says so
        assert new_model(layout, recipe.model, full_head=True).num_parameters == 21_786_880


def test_the_joint_recipe_learns_pictures_and_captions_apart_and_measures_compositions(recipe, tmp_path, capsys):
    content = yaml.safe_load(recipe.read_text())
    joint = yaml.safe_load(shipped_recipes()["cc3m-joint"].read_text())
    orders = {name: line.replace("64", "9").replace("32", "49") for name, line in joint["layout"]["orders"].items()}
    for name in ("train", "validation"):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        table = table.append_column("base", table["caption"])
        pq.write_table(
            table.append_column("skin_tones", pa.array([[]] * NUM, pa.list_(pa.string()))), tmp_path / f"{name}.parquet"
        )
    content["layout"]["orders"] = orders
    content |= {"evaluate": {"guidance_scales": [1.0], "best_of": 2, "num": 3}, "watch": {}, "about": {"Data": "noise"}}
    recipe.write_text(yaml.safe_dump(content))
    assert run(["train", str(recipe), "--quiet"]) == 0
    out = tmp_path / "out"
    with (out / "model" / "curves.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert last["split"] == "validation" and float(last["caption"]) > 0 and float(last["picture"]) > 0
    pipe = Pipeline.load(out / "bundle")
    captions = [name for name in pipe.bundle.figures if "per caption token" in name]
    assert captions == ["validation nats per caption token, image to text"]
    assert float(pipe.bundle.figures[captions[0]].split()[0]) == pytest.approx(float(last["caption"]), abs=0.02)
    assert "held-out compositions, pixels: greedy, guidance 1" in pipe.bundle.figures
    assert "captions of true pictures" in (out / "bundle" / "README.md").read_text()
    assert json.loads((out / "compositions.json").read_text())["num"] == 3
    assert not (out / "samples").exists()
    assert len(pipe.caption_codes(pipe.generate_codes("red Straße"))) == 1

"""Training on features of captions: what a batch holds and costs, and whole runs in two stages, small."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_t5 import CODES, PREFIX, WIDTH, save_t5, tiny_bundle, tiny_vqgan

from smalti.cli.app import run
from smalti.data.featured_pairs import FeaturedPairs
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.image_tokenizers import save_image_tokenizer
from smalti.models.base import Inputs
from smalti.models.config import TransformerConfig
from smalti.models.loss import slot_nll
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURE
from smalti.tasks.features import FeaturePipeline
from smalti.training import token_model
from smalti.training.checkpoint import latest_checkpoint, load_checkpoint
from smalti.training.native_loss import why_not
from smalti.training.token_model import TokenArrays, TrainConfig, micro_batches, nats_by_order, train_model

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 200, 60)}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """Bars of three colours, in two directions, with a text file beside each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(30):
        pixels, name = np.zeros((20, 20, 3), np.uint8), list(COLOURS)[number % 3]
        place = 2 + number % 13
        bar = (slice(place, place + 5), slice(0, 20))
        pixels[bar if number % 2 else bar[::-1]] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {name} bar {'across' if number % 2 else 'down'}")
    return folder


@pytest.fixture
def command(tmp_path, pictures, t5):
    save_image_tokenizer(tiny_vqgan(), tmp_path / "vq")
    settings = {
        **{"data": pictures, "text_encoder": t5, "image_tokenizer": tmp_path / "vq", "output": tmp_path / "run"},
        **{"held_out": 0.2, "num_features": PREFIX, "model.num_layers": 1, "model.d_model": 24, "model.num_heads": 3},
        **{"model.d_ff": 32, "stage1.image_size": "[8, 8]", "stage2.image_size": "[16, 16]"},
        **{"evaluate.num_shown": 2, "evaluate.guidance_scales": "[1.0, 7.5]"},
    }
    for stage, steps in (("stage1", 4), ("stage2", 3)):
        settings |= {f"{stage}.train.num_epochs": "null", f"{stage}.train.num_steps": steps}
        settings |= {f"{stage}.train.batch_size": 8, f"{stage}.train.warmup_steps": 1}
    return ["train", "t2i", *(f"{name}={value}" for name, value in settings.items()), "--quiet"]


# ---- batches ----

CAPTIONS = {"a red bar": 3, "down": 2, "": 0, "a long one": PREFIX}


@pytest.fixture
def pairs(tmp_path):
    """Eight rows with captions of several lengths, two of them without."""
    generator = np.random.default_rng(0)
    texts = [list(CAPTIONS)[i % 4] for i in range(8)]
    codes = generator.integers(0, CODES, (8, 16))
    write_token_table(tmp_path / "t.parquet", [token_rows([str(i) for i in range(8)], codes, None, texts)], {})
    cache = {text: torch.from_numpy(generator.standard_normal((n, WIDTH))).float() for text, n in CAPTIONS.items() if n}
    null = tiny_bundle().model.features.null_features
    return FeaturedPairs(TokenTable.open(tmp_path / "t.parquet"), np.arange(8), cache, null, cleaned=False)


def expected_nats(bundle, features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Of one picture, from a pass over it alone, filled up on the left with what nobody sees."""
    model, n = bundle.model, len(features)
    token_ids = torch.cat((torch.full((n,), FEATURE), codes[:-1]))[None]
    positions = torch.arange(token_ids.shape[1])[None] + PREFIX - n
    hidden = model.hidden(Inputs(token_ids, positions, features=features[None]))
    return F.cross_entropy(model.logits(hidden)[0, n - 1 :], codes, reduction="none")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_loss_of_a_batch_is_that_of_its_pictures_alone(pairs, dropout):
    bundle = tiny_bundle()
    train = TrainConfig(num_steps=9, batch_size=8, num_micro_batches=2, caption_dropout=dropout, seed=3)
    pieces = next(micro_batches(bundle.layout, pairs, train, start_step=2, rank=0, world_size=1))
    rows = next(iter_rows(8, train))
    dropped = np.random.default_rng([3, 2, 3]).random(8) < dropout
    assert not dropout or 1 < dropped.sum() < 7
    for number, piece in enumerate(pieces):
        with torch.no_grad():
            nats = slot_nll(
                bundle.model, piece.token_ids, piece.targets, bundle.layout.slots, None, piece.features
            ).view(4, 16)
        for row, without, found in zip(rows[number::2], dropped[number::2], nats, strict=True):
            caption, null = pairs.table.texts(np.array([row]))[0], pairs.null_features
            features = pairs.cache[caption] if caption else null
            features = null[-len(features) :] if without else features
            codes = torch.from_numpy(pairs.batch(np.array([row])).image_tokens[0])
            with torch.no_grad():
                assert torch.allclose(found, expected_nats(bundle, features, codes), atol=1e-5)
        assert int(piece.counts.sum()) == 64 and piece.parts.unique().tolist() == [1]


def iter_rows(num_rows: int, train: TrainConfig):
    from smalti.data.loader import batches

    return batches(num_rows, train.batch_size, train.seed, 2)


def test_features_are_refused_where_they_would_be_misread(pairs):
    bundle = tiny_bundle()
    assert "it reads token ids, no features" in (why_not(bundle.model) or "")
    assert not bundle.layout.is_fixed
    how = {"config": TrainConfig(num_steps=1, batch_size=4), "directory": "never", "show_progress": False}
    arrays = TokenArrays(np.zeros((4, 16), int), np.zeros((4, 1), int))
    with pytest.raises(ValueError, match="features of captions go with a layout that begins with them"):
        train_model(bundle.model, bundle.layout, arrays, arrays, **how)
    plain = Layout.parse(bundle.layout.vocabulary, {"alone": "image{16}"})
    shape = TransformerConfig(num_layers=1, d_model=12, num_heads=3, d_ff=16, max_length=16)
    with pytest.raises(ValueError, match="features of captions go with a layout that begins with them"):
        train_model(shape, plain, pairs, pairs, **how)
    with pytest.raises(ValueError, match="row 1 has 8 features; the layout takes 1 to 7"):
        bundle.layout.pack("caption to image", {}, [torch.zeros(2, WIDTH), torch.zeros(8, WIDTH)])


def test_a_model_learns_what_captions_say_and_a_stopped_run_ends_as_if_it_had_not(tmp_path, monkeypatch):
    """Each caption has a code of its own, which is all of its picture."""
    N = 960  # which 60 steps see once
    texts = [f"caption {i % 4}" for i in range(N)]
    codes = np.repeat(np.arange(N)[:, None] % 4, 16, 1)
    write_token_table(tmp_path / "t.parquet", [token_rows([str(i) for i in range(N)], codes, None, texts)], {})
    generator = torch.Generator().manual_seed(0)
    cache = {text: torch.randn(2 + i % 3, WIDTH, generator=generator) for i, text in enumerate(dict.fromkeys(texts))}
    config = TrainConfig(
        num_steps=60,
        batch_size=16,
        learning_rate=3e-3,
        caption_dropout=0.2,
        checkpoint_every=30,
        ema_decay=0.5,
        evaluation_rows=32,
    )

    def trained(folder: str):
        bundle = tiny_bundle()
        null = bundle.model.features.null_features.clone()
        table = TokenTable.open(tmp_path / "t.parquet")
        pairs = FeaturedPairs(table, np.arange(N), cache, null, cleaned=False)
        model = train_model(bundle.model, bundle.layout, pairs, pairs, config, tmp_path / folder, show_progress=False)
        return model, bundle.layout, pairs

    model, layout, pairs = trained("whole")
    given, none = (
        nats_by_order(model, layout, pairs, 32, captioned=captioned)["caption to image"]["picture"].nats_per_token
        for captioned in (True, False)
    )
    assert given < 0.05 and none > 3 * given  # without a caption the first code is a guess among four
    step, plain = iter(range(99)), token_model.train_step

    def stopping(*args, **kwargs):
        if next(step) == 40:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(token_model, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained("parts")
    monkeypatch.undo()
    resumed, *_ = trained("parts")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


# ---- whole runs ----


def test_a_whole_run_in_two_stages(tmp_path, command, t5, capsys):
    output = tmp_path / "run"
    settings = ["stage2.train.learning_rate=1e-12", "stage2.train.weight_decay=0", "watch.prompts=[a red bar]"]
    assert run([*command, *settings, "watch.every=2"]) == 0
    bundle = str(output / "bundle")
    pipe = FeaturePipeline.load(bundle)
    assert pipe.grid == (8, 8) and str(pipe.layout["caption to image"]) == "features{7} image{64}"
    assert pipe.sampling.picture.guidance_scale == 7.5 and pipe.bundle.text_encoder.name == str(t5)
    # the second stage began with the weights that the first ended with
    first = load_checkpoint(latest_checkpoint(output / "stage1" / "model" / "checkpoints")).weights
    for name, weight in pipe.model.state_dict().items():
        assert torch.allclose(weight, first[name], atol=1e-3)
    report = json.loads((output / "report.json").read_text())
    assert list(report["stages"]) == ["8×8 pixels", "16×16 pixels"]
    for found in report["stages"].values():
        assert len(found["nats_per_code"]) == 3 and all(0 < mean < 4 for mean, _ in found["nats_per_code"].values())
    assert "given another picture's caption" in (output / "report.md").read_text()
    assert (output / "captions.png").stat().st_size > 1000 and (output / "stage1/samples/table.png").exists()
    # held out: the same pictures in both stages
    tables = [TokenTable.open(output / stage / "tokens" / "train.parquet") for stage in ("stage1", "stage2")]
    assert tables[0].keys(np.arange(30)) == tables[1].keys(np.arange(30))
    weights = pipe.weights_sha256
    assert run([*command, *settings, "watch.every=2"]) == 0
    assert FeaturePipeline.load(bundle).weights_sha256 == weights
    picture = str(tmp_path / "x.png")
    assert run(["generate", "a red bar across", "-o", picture, "--bundle", bundle]) == 0
    with Image.open(picture) as image:
        assert image.size == (16, 16)
    assert run(["replay", picture, "--bundle", bundle]) == 0 and run(["doctor", bundle, "--tokens", "8"]) == 0
    capsys.readouterr()
    assert run([*command, *settings, "watch.every=2", f"text_encoder={save_t5(tmp_path / 'other', seed=1)}"]) == 2
    assert "holds a run with the text encoder" in capsys.readouterr().err
    assert run([*command, *settings, "watch.every=2", "stage1.train.learning_rate=1e-5"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_a_run_with_other_pictures_to_measure_on_and_one_stage(tmp_path, command, pictures, capsys):
    (pictures / "03.txt").write_text("a red bar across , in the snow , in the snow")
    (pictures / "04.txt").write_text(" ")
    assert run([*command, "stage2=null", f"validation={pictures}", f"features={tmp_path / 'shared'}"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 7 different captions are cut to 7 tokens; the longest has 13" in printed
    assert "2 of 60 captions are empty: they train the null condition" in printed
    assert list((tmp_path / "shared").glob("*/*.safetensors"))
    assert FeaturePipeline.load(tmp_path / "run" / "bundle").grid == (4, 4)


def test_what_a_run_needs_is_asked_for(tmp_path, command, pictures, t5, capsys):
    output = f"output={tmp_path / 'other'}"
    save_image_tokenizer(tiny_vqgan(), tmp_path / "vq")
    digits = "image_tokenizer=digits"
    for changes, message in (
        (["data=null"], "give data, pictures with captions"),
        (["text_encoder=null"], "text_encoder, the folder of a T5 encoder"),
        ([f"text_encoder={tmp_path}/none"], "there is no text encoder"),
        (["image_tokenizer=nowhere"], "there is no bundle 'nowhere'"),
        ([f"data={tmp_path / 'vq'}"], "holds no pictures"),
        (["model.num_heads=5"], "d_model 24 is not divisible by num_heads 5"),
        (["stage1.image_size=[9, 9]"], "image_size does not suit the image tokenizer: image_size 9 x 9"),
        ([digits], "is a VQVAE, which knows pictures of 28×28 alone, and image_size is 8×8"),
        (["held_out=0"], "held_out is 0; it must be more than 0"),
        (["num_steps=3"], "write stage1.train.num_steps or stage2.train.num_steps"),
        (["evaluate.num_pictures=1"], "num_pictures is 1"),
    ):
        assert run([*command, output, *changes]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.strip().count("\n") == 0
    (pictures / "07.txt").unlink()
    assert run([*command, output]) == 2
    assert "there is no caption: expected 07.txt beside it" in capsys.readouterr().err

"""Class-conditional training: sources of labelled pictures, RAR's permuted orders, and a whole run, small."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

from smalti.cli.app import run
from smalti.data.labelled_pictures import open_labelled, split, write_codes
from smalti.data.tokens import TokenTable
from smalti.errors import InputError
from smalti.evaluate.classes import in_shares, look_at, train_judge
from smalti.evaluate.reconstruction import frechet_distance
from smalti.interop.rar import read_rar
from smalti.models.config import TransformerConfig
from smalti.models.loss import slot_nll
from smalti.models.rar import RAR, RARConfig
from smalti.recipes import load_recipe
from smalti.tasks.classes import ClassPipeline
from smalti.training.token_model import (
    TokenArrays,
    TrainConfig,
    draw_permutations,
    micro_batches,
    permuted_share,
    train_model,
)

SIZES = RARConfig(codebook_size=7, num_classes=3, num_codes=4, num_layers=1, d_model=12, num_heads=3, d_ff=16)


def draw_picture(kind: int, seed: int) -> Image.Image:
    """A white bar on black at one of three angles, somewhere: what a digit's tokenizer can read."""
    pixels, random = np.zeros((28, 28, 3), np.uint8), np.random.default_rng([kind, seed])
    place, start = random.integers(6, 20), random.integers(2, 8)
    if kind == 0:
        pixels[place : place + 3, start : start + 18] = 255
    elif kind == 1:
        pixels[start : start + 18, place : place + 3] = 255
    else:
        pixels[place : place + 6, place : place + 6] = 255
    return Image.fromarray(pixels)


NAMES = ("across", "block", "down")


@pytest.fixture
def folder(tmp_path):
    """Three classes of ten pictures, one folder each."""
    for kind, name in enumerate(("across", "down", "block")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for seed in range(10):
            draw_picture(kind, seed).save(tmp_path / "pictures" / name / f"{seed}.png")
    return tmp_path / "pictures"


def encoded(picture: Image.Image, path) -> bytes:
    picture.save(path)
    return path.read_bytes()


# ---- sources ----


def test_folders_tables_and_mnist_are_read_alike(tmp_path, folder, shared_dir):
    found = open_labelled(folder)
    assert found.names == NAMES and np.bincount(found.labels).tolist() == [10, 10, 10]
    assert np.array_equal(np.asarray(found.picture(10)), np.asarray(draw_picture(2, 0)))  # sorted: block/0.png
    pictures = [encoded(draw_picture(kind, 0), tmp_path / "x.png") for kind in (2, 0, 1)]
    for labels, names in ((["b", "a", "c"], ("a", "b", "c")), ([2, 0, 1], ("0", "1", "2"))):
        pq.write_table(pa.table({"image": pictures, "label": labels}), tmp_path / "t.parquet")
        table = open_labelled(tmp_path / "t.parquet")
        assert table.names == names and [names[i] for i in table.labels] == [str(label) for label in labels]
    digits = open_labelled(shared_dir / "data" / "mnist")
    assert set(digits) == {"train", "test"} and digits["train"].names[8] == "eight"
    shown = digits["test"].picture(0)
    assert shown.mode == "RGB" and set(np.unique(np.asarray(shown))) == {0, 255}


def test_a_split_holds_out_each_picture_once(folder):
    found = open_labelled(folder)
    train, held_out = split(found, 0.2, 0)
    assert len(held_out) == 6 and sorted([*train.rows, *held_out.rows]) == list(range(30))
    assert np.array_equal(found.labels[held_out.rows], held_out.labels)
    with pytest.raises(InputError, match="too few to hold"):
        split(found, 0.999, 0)


class Fake:
    """An image tokenizer whose codes are the mean brightness of each quarter."""

    def encode_images(self, images):
        return (F.adaptive_avg_pool2d(images.mean(1), 2) * 6).round().long()


def test_ten_crops_are_ten_rows_with_the_picture_s_label(tmp_path, folder):
    found = open_labelled(folder)
    write_codes(found, tmp_path / "one.parquet", Fake(), (28, 28), ten_crop=False, show_progress=False)
    write_codes(found, tmp_path / "ten.parquet", Fake(), (28, 28), ten_crop=True, show_progress=False)
    one, ten = TokenTable.open(tmp_path / "one.parquet"), TokenTable.open(tmp_path / "ten.parquet")
    assert (len(one), len(ten)) == (30, 300)
    assert ten.batch(np.arange(300)).text_tokens[:, 0].tolist() == np.repeat(found.labels, 10).tolist()
    crops = ten.batch(np.arange(10)).image_tokens.reshape(2, 5, 2, 2)
    assert np.array_equal(crops[0, :, :, ::-1], crops[1])  # the second five are mirrored


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: draw_picture(0, 0).save(folder / "stray.png"), "stray.png lies in no class's folder"),
        (lambda folder: [(folder / name).rename(folder.parent / name) for name in NAMES[1:]], "pictures of 1 class"),
    ],
)
def test_folders_that_are_no_classes(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        open_labelled(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 2], "row 1: label is -1"),
        ([0.5, 1.0, 2.0], r"row 0: label is 0\.5"),
        ([0, 1, 10**9], "a label is 1000000000, but there are 3 pictures"),
        (["a", "a", "a"], "pictures of 1 class, a;"),
    ],
)
def test_tables_that_are_no_classes(tmp_path, labels, message):
    picture = encoded(draw_picture(0, 0), tmp_path / "x.png")
    pq.write_table(pa.table({"image": [picture] * 3, "label": labels}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        open_labelled(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": [picture] * 3}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="label"):
        open_labelled(tmp_path / "t.parquet")


# ---- RAR's training ----


@torch.no_grad()
def test_the_loss_of_a_permuted_picture_is_the_original_s(shared_dir):
    folder = shared_dir / "golden" / "rar"
    config = json.loads((folder / "config.json").read_text())
    model, _ = read_rar(torch.load(folder / "weights.bin", weights_only=True), config)
    with np.load(folder / "io.npz") as arrays:
        io = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    layout = model.config.layout
    pairs = TokenArrays(io["tokens"].numpy(), io["class_ids"].numpy()[:, None])
    train = TrainConfig(num_steps=9, batch_size=3, permuted=(1.0, 1.0))
    [made] = next(micro_batches(layout, pairs, train, start_step=0, rank=0, world_size=1))
    assert made.positions is not None and sorted(made.positions[0].tolist()) == list(range(18))
    # the same orders as the reference's, of which the losses are known
    begin = torch.arange(2).expand(3, -1)
    made = made._replace(positions=torch.cat((begin, io["orders"] + 2), dim=1))
    start = torch.full((3, 1), layout.vocabulary.special("<start>"))
    token_ids = torch.cat((start, io["condition_ids"][:, None], io["labels_permuted"]), dim=1)
    targets = [made.targets[0]._replace(local=io["labels_permuted"].flatten())]
    nats = slot_nll(model, token_ids, targets, layout.slots, made.positions)
    expected = F.cross_entropy(io["logits_permuted"][:, :-1].transpose(1, 2), io["labels_permuted"], reduction="none")
    assert torch.allclose(nats, expected.flatten(), atol=1e-4)


def test_permutations_are_annealed_to_raster_order():
    shares = [permuted_share(step, 100, (0.5, 0.75)) for step in (0, 49, 50, 60, 74, 75, 99)]
    assert shares == pytest.approx([1, 1, 1, 0.6, 0.04, 0, 0])
    assert permuted_share(5, 10, (0.5, 0.5)) == 0
    layout = SIZES.layout
    raster = torch.arange(6)
    drawn = [draw_permutations(layout, 200, share, 0, 3) for share in (1.0, 0.3)]
    for found, share in zip(drawn, (1.0, 0.3), strict=True):
        assert torch.equal(found.sort(1).values, raster.expand(200, -1)) and torch.equal(
            found[:, :2], raster[:2].expand(200, -1)
        )
        changed = float((found != raster).any(1).float().mean())
        assert share * 23 / 24 - 0.1 < changed < share * 23 / 24 + 0.1
    assert torch.equal(drawn[0], draw_permutations(layout, 200, 1.0, 0, 3)) and not torch.equal(
        drawn[0], draw_permutations(layout, 200, 1.0, 0, 4)
    )
    assert draw_permutations(layout, 200, 0.0, 0, 3) is None


def arrays(num_rows: int = 40) -> TokenArrays:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, num_rows)
    return TokenArrays((labels[:, None] * 2 + generator.integers(0, 2, (num_rows, 4))) % 7, labels[:, None])


def test_a_rar_learns_and_a_stopped_run_ends_as_if_it_had_not_stopped(tmp_path):
    config = TrainConfig(
        num_steps=8, batch_size=8, learning_rate=1e-2, permuted=(0.5, 0.75), caption_dropout=0.2, checkpoint_every=4
    )
    how = {"layout": SIZES.layout, "train": arrays(), "validation": arrays(), "config": config, "show_progress": False}
    whole = train_model(SIZES, directory=tmp_path / "whole", **how)
    assert isinstance(whole, RAR)
    with pytest.raises(KeyboardInterrupt):
        train_model(SIZES, directory=tmp_path / "parts", sampler=_stop_at(6), sample_every=1, **how)
    resumed = train_model(SIZES, directory=tmp_path / "parts", **how)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    curves = (tmp_path / "whole" / "curves.csv").read_text().splitlines()
    assert len(curves) > 8
    with pytest.raises(ValueError, match="permuted is for a RAR"):
        shape = TransformerConfig(num_layers=1, d_model=12, num_heads=3, d_ff=16, max_length=6)
        train_model(shape, directory=tmp_path / "other", **how)
    with pytest.raises(ValueError, match="the first share must not be above the second"):
        TrainConfig(num_steps=1, permuted=(0.7, 0.5))


def _stop_at(step: int):
    def sampler(model, at: int) -> None:
        if at == step:
            raise KeyboardInterrupt

    return sampler


def test_dropped_labels_are_the_null_label():
    train = TrainConfig(num_steps=9, batch_size=40, caption_dropout=0.5)
    [made] = next(micro_batches(SIZES.layout, arrays(), train, start_step=0, rank=0, world_size=1))
    labels = made.token_ids[:, 1] - SIZES.layout.vocabulary["label"].offset
    assert 8 < int((labels == 3).sum()) < 32 and int(labels.max()) == 3 and made.positions is None


# ---- the judge ----


def test_classes_are_drawn_in_the_shares_of_real_pictures():
    real = torch.tensor([2] * 60 + [0] * 30 + [1] * 10)
    assert torch.bincount(in_shares(real, 1000)).tolist() == [300, 100, 600]
    assert torch.bincount(in_shares(real, 7)).tolist() == [3, 0, 4]


def test_the_frechet_distance_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(50, 5, generator=generator), torch.randn(70, 5, generator=generator) * 2 + 1
    one, two = np.cov(first.numpy().T), np.cov(second.numpy().T)
    root = scipy.linalg.sqrtm(one @ two).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-4)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_a_judge_learns_to_tell_classes_and_is_decided_by_its_seed():
    pictures = np.stack([np.asarray(draw_picture(kind, seed)) for kind in range(3) for seed in range(20)])
    labels = np.repeat(np.arange(3), 20)
    judges = [train_judge(pictures, labels, 3, num_steps=40, batch_size=16, show_progress=False) for _ in range(2)]
    unseen = np.stack([np.asarray(draw_picture(kind, seed)) for kind in range(3) for seed in range(90, 100)])
    images = torch.from_numpy(unseen).permute(0, 3, 1, 2).float() / 255
    seen = [look_at(judge, images) for judge in judges]
    assert float((seen[0].labels == torch.arange(3).repeat_interleave(10)).float().mean()) > 0.8
    assert torch.equal(seen[0].features, seen[1].features)


# ---- a whole run ----

TINY = (
    *("model.num_layers=1", "model.d_model=24", "model.num_heads=3", "model.d_ff=32", "train.num_steps=4"),
    *("train.batch_size=8", "train.evaluation_rows=4", "train.warmup_steps=1", "evaluate.num_pictures=6"),
    *("evaluate.guidance_scales=[1.0, 2.0]", "evaluate.judge_steps=3", "data.held_out_share=0.2"),
)


@pytest.mark.parametrize("family", ["llamagen", "rar"])
def test_a_whole_run_ends_with_a_bundle_and_a_report(tmp_path, folder, family, capsys):
    output = tmp_path / "run"
    command = ["train", "c2i", f"data.train={folder}", f"output={output}", f"model.family={family}", *TINY, "--quiet"]
    assert run(command) == 0
    pipe = ClassPipeline.load(output / "bundle")
    assert pipe.classes.names == NAMES and pipe.bundle.null_label == 3
    report = json.loads((output / "report.json").read_text())
    assert [at["guidance_scale"] for at in report["scales"]] == [1.0, 2.0]
    assert all(0 <= at["class_accuracy"] <= 1 and at["frechet_distance"] >= 0 for at in report["scales"])
    assert pipe.sampling.picture.guidance_scale in (1.0, 2.0)
    assert re.search(r"given the class \| \d\.\d{4} ± 0\.\d{4}", (output / "report.md").read_text())
    with Image.open(output / "classes.png") as sheet:
        assert sheet.size == (300, 90)
    assert (output / "guidance.png").stat().st_size > 1000
    weights = pipe.weights_sha256
    assert run(command) == 0 and ClassPipeline.load(output / "bundle").weights_sha256 == weights
    assert run(["generate", "--class", "block", "-o", str(tmp_path / "x.png"), "--bundle", str(output / "bundle")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (224, 224)
    assert run(["replay", str(tmp_path / "x.png"), "--bundle", str(output / "bundle")]) == 0
    capsys.readouterr()
    assert run([*command, "train.learning_rate=1e-5"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_what_a_run_needs_is_asked_for(tmp_path, folder, capsys):
    for changes, message in (
        ([], "give data.train, pictures of classes"),
        ([f"data.train={tmp_path}/none"], "there is no"),
        ([f"data.train={folder}", "image_tokenizer=nowhere"], "there is no bundle 'nowhere'"),
        ([f"data.train={folder}", "model.num_heads=5"], "d_model 128 is not divisible by num_heads 5"),
        ([f"data.train={folder}", "evaluate.num_pictures=1"], "num_pictures is 1"),
        ([f"data.train={folder}", "permuted=[0.9, 0.1]", "model.family=rar"], "the first share must not be above"),
    ):
        assert run(["train", "c2i", *changes, f"output={tmp_path / 'run'}", "--quiet"]) == 2
        assert message in capsys.readouterr().err
    assert load_recipe("c2i").system == "classes"

"""Held-out compositions: nearest neighbours by hand, what is read and refused, and the whole evaluation."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_captions import BOTH, FIGURES, ONE, TONES, H, K, W, tiny

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.evaluate import compositions as module
from smalti.evaluate.compositions import (
    CEILING,
    REPORT_FILES,
    Collection,
    CompositionsConfig,
    evaluate_compositions,
    features,
    read_collection,
    score_nearest,
)


def picture(figure: int, tone: int) -> np.ndarray:
    """Shape by figure, colour by tone: no two are alike."""
    pixels = np.full((H, W, 3), 255, np.uint8)
    pixels[2 : 6 + 4 * figure, 3:15] = (40 + 120 * tone, 90, 200 - 90 * tone)
    return pixels


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_table(path, pairs):
    table = {
        "image": [encoded(picture(f, t)) for f, t in pairs],
        "caption": [f"{FIGURES[f]}, {TONES[t]} skin tone" for f, t in pairs],
        "base": [FIGURES[f] for f, _ in pairs],
        "skin_tones": [[TONES[t]] for _, t in pairs],
    }
    pq.write_table(pa.table(table), path)


TRAIN = [(0, 0), (1, 0), (1, 1), (2, 1)]
TEST = [(0, 1), (2, 0)]


@pytest.fixture
def tables(tmp_path):
    write_table(tmp_path / "train.parquet", TRAIN)
    write_table(tmp_path / "test.parquet", TEST)
    return tmp_path


# Nearest neighbours


def collection(labels) -> Collection:
    return Collection(
        np.zeros((len(labels), 1, 1, 3), np.uint8), ["" for _ in labels], [f for f, _ in labels], [t for _, t in labels]
    )


def test_ranks_figures_and_tones_worked_by_hand():
    labels = [("a", ("x",)), ("a", ("y",)), ("b", ("x",)), ("b", ("y",)), ("c", ()), ("d", ()), ("e", ("x", "y"))]
    true = torch.arange(7.0)[:, None] * torch.tensor([[1.0, 0.0]])
    ours = torch.tensor([[0.2, 5.0], [1.4, 0.0], [5.9, 0.0], [0.0, 0.0]])
    # nearest are 0, 1, 6, 0; wanted are 0, 2, 5, 6, of which 0, 1, 1 and 6 are nearer
    found = score_nearest(ours, true, torch.tensor([0, 2, 5, 6]), collection(labels))
    assert found.top_1.tolist() == [True, False, False, False]
    assert found.top_5.tolist() == [True, True, True, False]
    assert found.figure.tolist() == [True, False, False, False]
    assert found.tone.tolist() == [True, False, False, False]


def test_pictures_that_are_the_same_stand_for_each_other():
    labels = [("a", ("x",)), ("b", ("y",)), ("c", ("z",))]
    true = torch.tensor([[0.0], [0.0], [3.0]])
    found = score_nearest(torch.tensor([[1.0], [1.0]]), true, torch.tensor([0, 1]), collection(labels))
    assert found.top_1.all() and found.figure.all() and found.tone.all()


def test_the_latents_compared_are_the_quantizers():
    pipe = tiny(ONE)
    images = torch.rand(3, 3, H, W, generator=torch.Generator().manual_seed(1))
    assert torch.equal(features(pipe, images, "pixels"), images.flatten(1))
    plain = pipe.image_tokenizer.encode_latents(images)
    torch.testing.assert_close(features(pipe, images, "encoder"), plain.flatten(1))
    object.__setattr__(pipe.image_tokenizer.config.quantizer, "l2_normalised", True)
    directions = features(pipe, images, "encoder").view(plain.shape)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, 2, 3))
    torch.testing.assert_close(directions * plain.norm(dim=-1, keepdim=True), plain)


# Tables


def test_tables_are_read_one_behind_the_other(tables):
    found = read_collection([tables / "test.parquet", tables / "train.parquet"], (H, W))
    assert found.figures == [FIGURES[f] for f, _ in TEST + TRAIN]
    assert found.tones == [(TONES[t],) for _, t in TEST + TRAIN]
    np.testing.assert_array_equal(found.pictures, np.stack([picture(f, t) for f, t in TEST + TRAIN]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("base"), "has no column 'base'; it has image, caption, skin_tones"),
        (
            lambda table: table.set_column(3, "skin_tones", pa.array(["x"] * len(TEST))),
            "column 'skin_tones' holds string, expected lists of names",
        ),
        (lambda table: table.slice(0, 0), "no rows; name tables that hold some"),
    ],
)
def test_a_table_that_tells_no_compositions_is_named(tables, change, message):
    path = tables / "test.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(InputError, match=message):
        read_collection([path], (H, W))


# The whole evaluation


@pytest.mark.parametrize("orders", [ONE, BOTH], ids=["one order", "both"])
def test_the_command_measures_every_way_of_drawing(tables, monkeypatch, orders, capsys):
    pipe = tiny(orders)
    pipe.save(tables / "bundle")
    arguments = [
        str(tables / "bundle"),
        "--test",
        str(tables / "test.parquet"),
        "--train",
        str(tables / "train.parquet"),
    ]
    options = ["--guidance", "1,2", "--best-of", "3", "-o", str(tables / "report")]
    assert run(["evaluate", "compositions", *arguments, *options]) == 0
    assert "nearest among 6 true pictures" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tables / "report" / REPORT_FILES[0]).read_text())
    strategies = [row["strategy"] for row in content["rows"] if row["space"] == "pixels"]
    rerankers = 3 if len(orders) == 2 else 2
    assert len(strategies) == 1 + 2 * (2 + rerankers) and strategies[0] == CEILING
    assert len(content["rows"]) == 2 * len(strategies)
    assert all(rate["num"] == 2 for row in content["rows"] for rate in row["rates"].values())
    assert (content["captions"] is None) == (len(orders) == 1)
    assert "| greedy, guidance 2 | encoder |" in (tables / "report" / REPORT_FILES[1]).read_text()
    assert run(["evaluate", "compositions", *arguments, *options]) == 2
    assert "exists" in capsys.readouterr().err
    assert run(["evaluate", "compositions", *arguments, "--guidance", "much"]) == 2
    assert "--guidance is 'much'" in capsys.readouterr().err


def test_a_bundle_that_draws_the_truth_is_right_throughout(tables, monkeypatch):
    pipe = tiny(BOTH)
    read = read_collection([tables / "test.parquet", tables / "train.parquet"], (H, W))
    images = torch.from_numpy(read.pictures).permute(0, 3, 1, 2).float() / 255
    numbers = {caption: i for i, caption in enumerate(read.captions)}
    # codes that say which picture they are, and a tokenizer that knows them all
    monkeypatch.setattr(pipe.image_tokenizer, "decode_codes", lambda codes: images[codes[:, 0, 0]])
    monkeypatch.setattr(
        pipe,
        "generate_codes",
        lambda prompts, n=1, **_: (
            torch.tensor([numbers[p] for p in prompts for _ in range(n)]).view(-1, 1, 1).expand(-1, 2, 3)
        ),
    )
    monkeypatch.setattr(
        pipe, "encode_images", lambda images, **_: torch.arange(len(images)).view(-1, 1, 1).expand(-1, 2, 3)
    )
    monkeypatch.setattr(pipe, "caption_codes", lambda codes, **_: ["cook, light skin tone", "cook, dark skin tone"])
    config = CompositionsConfig(guidance_scales=(1.0,), best_of=2)
    report = evaluate_compositions(pipe, tables / "test.parquet", tables / "train.parquet", config, show_progress=False)
    assert {rate["rate"] for row in report.rows for rate in row.rates.values()} == {1.0}
    assert report.captions is not None
    assert {name: rate["rate"] for name, rate in report.captions.items()} == {
        "exact": 0.5,
        "figure": 0.5,
        "skin tone": 1.0,
    }
    assert report.figures()["held-out compositions, pixels: greedy, guidance 1"].startswith("top-1 100.0% ± 0.0%")


def test_candidates_are_chosen_by_each_likelihood(monkeypatch):
    pipe = tiny(BOTH)
    candidates = torch.randint(0, K, (6, 2, 3), generator=torch.Generator().manual_seed(2))
    prompts = ["cook, dark skin tone", "flag, light skin tone"]
    found = module._rerank(pipe, candidates, prompts, 3)
    words = [torch.tensor(pipe.text_tokenizer.encode(prompt)) for prompt in prompts for _ in range(3)]
    scores = pipe.score_codes(candidates, words)
    for rerank, values in (("picture", -scores[0]), ("caption", -scores[1]), ("pmi", scores[2])):
        expected = [int(values[:3].argmax()), 3 + int(values[3:].argmax())]
        assert found[rerank].tolist() == expected, rerank


@pytest.mark.parametrize("bad", [{"best_of": 0}, {"num": 0}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CompositionsConfig(**bad)


def test_a_card_has_each_way_at_its_best_guidance():
    def row(strategy, space, rate):
        return module.Row(strategy, space, {"top_1": {"rate": rate, "standard_error": 0.0, "num": 10}})

    rows = [
        row(CEILING, "pixels", 1.0),
        row("greedy, guidance 1", "pixels", 0.5),
        row("greedy, guidance 1", "encoder", 0.7),
        row("sampled, guidance 1", "pixels", 0.3),
        row("greedy, guidance 2", "pixels", 0.6),
        row("greedy, guidance 2", "encoder", 0.7),
        row("sampled, guidance 2", "pixels", 0.2),
    ]
    assert module.best_of_each_kind(rows) == [rows[0], rows[4], rows[2], rows[3]]

"""The table of what a bundle learned, against countings by hand, and its files and figures."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import tiny_pipeline
from tiny_captions import BOTH, tiny

from smalti.data.digit_sources import scikit_learn_digits
from smalti.data.digits import (
    COLORS,
    DIGITS,
    ColouringConfig,
    colour_digits,
    images_to_levels,
    read_colours,
)
from smalti.data.pairs import PairTable
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.evaluate import report as report_module
from smalti.evaluate.digits import DigitClassifier, classify_digits
from smalti.evaluate.galleries import GALLERIES, draw_galleries
from smalti.evaluate.report import (
    HeldOut,
    Report,
    ReportConfig,
    Row,
    describe_sampling,
    evaluate_digits,
    find_report,
    pairs_agree,
    read_held_out,
)
from smalti.tasks.images import Pipeline

N = 13


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    coloured = colour_digits(scikit_learn_digits()["test"], "test", ColouringConfig())
    return HeldOut(coloured.pictures[:N], coloured.captions[:N], "thirteen digits")


@pytest.fixture(scope="module")
def judge() -> DigitClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DigitClassifier().eval()


@pytest.fixture(scope="module")
def report(pipe: Pipeline, held_out: HeldOut, judge: DigitClassifier) -> Report:
    config = ReportConfig(num_prompts=7, num_captions=5, num_pairs=3, best_of=(1, 2), seed=4)
    return evaluate_digits(pipe, held_out, config, classifier=judge, command="smalti evaluate …", show_progress=False)


def rows(report: Report, part: str) -> dict[str, Row]:
    return {row.figure: row for row in report.rows if row.part.startswith(part)}


def test_every_part_is_there_with_its_counts(report: Report):
    nats = rows(report, "test nats a token")
    assert nats["text to image: picture"].num == N * 49
    assert nats["image to text: caption"].num == N * 6
    assert nats["all orders: total"].num == 2 * N * 57
    assert rows(report, "prompt accuracy, temperature 1.0")["all"].num == 7
    assert rows(report, "caption accuracy")["all"].num == 5
    assert {row.num for row in rows(report, "agreement of pairs").values()} == {3}
    assert [*rows(report, "prompt accuracy, temperature 1.0, reranked")] == [
        "best of 1",
        "best of 2 by p(picture | caption)",
        "best of 2 by p(caption | picture)",
        "best of 2 by mutual information",
    ]
    assert all(0 <= row.value <= 1 for row in report.rows if row.unit == "share")


def test_nats_agree_with_each_pairs_own_score(report: Report, pipe: Pipeline, held_out: HeldOut):
    pictures = [Image.fromarray(picture * 85) for picture in held_out.pictures]
    scores = [pipe.score([picture], [text]) for picture, text in zip(pictures, held_out.captions, strict=True)]
    given_caption = torch.cat([score.picture_nll_nats for score in scores])
    nats = rows(report, "test nats a token")["text to image: picture"]
    assert nats.value == pytest.approx(float(given_caption.sum()) / (N * 49), rel=1e-6)
    pair = rows(report, "nats a pair")["−ln p(picture | caption)"]
    assert pair.value == pytest.approx(float(given_caption.mean()), rel=1e-6)
    assert pair.standard_error == pytest.approx(float(given_caption.std()) / math.sqrt(N), rel=1e-5)


def test_reconstruction_figures_are_those_of_a_plain_count(report: Report, pipe: Pipeline, held_out: HeldOut):
    images = torch.from_numpy(held_out.pictures).permute(0, 3, 1, 2).float() / 3
    with torch.no_grad():
        codes = pipe.image_tokenizer.encode_images(images)
        rebuilt = pipe.image_tokenizer.decode_codes(codes).clamp(0, 1)
    found = rows(report, "image tokenizer")
    exact = [
        (rebuilt[n, :, y, x] * 3).round().equal(images[n, :, y, x] * 3)
        for n in range(N)
        for y in range(28)
        for x in range(28)
    ]
    assert found["pixels exact after rounding"].value == pytest.approx(sum(exact) / len(exact))
    assert found["mean squared error"].value == pytest.approx(float(((rebuilt - images) ** 2).mean()), rel=1e-5)
    assert found["PSNR"].value == pytest.approx(-10 * math.log10(found["mean squared error"].value))
    used = {int(code) for code in codes.flatten()}
    assert found["codebook usage"].value == pytest.approx(len(used) / 37)
    shares = [float((codes == code).double().mean()) for code in used]
    assert found["codebook perplexity"].value == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_reranking_keeps_what_the_scores_say(pipe: Pipeline, held_out: HeldOut, judge: DigitClassifier, monkeypatch):
    """With pictures judged right when their first code is even, the share is that of the likeliest of two."""
    config = ReportConfig(num_prompts=7, best_of=(1, 2), seed=4)

    class Judged:
        def __init__(self, pictures: np.ndarray):
            self.all_ok = pictures[:, 0, 0, 0] > 1

    monkeypatch.setattr(report_module, "judge_pictures", lambda pictures, captions, classifier: Judged(pictures))
    found = report_module._best_of_rows(pipe, held_out.captions, config, judge, lambda share: None)
    kept = []
    for i, text in enumerate(held_out.captions[:7]):
        [picture] = pipe.generate(text, seed=4 + 2 * i, best_of=2, rerank="pmi", scale=1)
        kept.append(np.asarray(picture)[0, 0, 0] > 85)
    assert found[-1].figure == "best of 2 by mutual information"
    assert found[-1].value == pytest.approx(np.mean(kept))


def test_pairs_agree_needs_a_real_caption(held_out: HeldOut, judge: DigitClassifier):
    pictures = held_out.pictures[:3]
    seen = read_colours(pictures)
    digits = classify_digits(judge, seen.mask)
    foreground, background = (tuple(colour[0].tolist()) for colour in (seen.foreground, seen.background))
    names = {colour: " ".join(name) for name, colour in COLORS.items()}
    right = f"{names[foreground]} {DIGITS[digits[0]]} on {names[background]}"
    other_digit = right.replace(right.split()[2], "zero" if "zero" not in right else "one")
    captions = [right, "one four gray one seven pink", ""]
    assert pairs_agree(pictures, captions, judge).tolist() == [True, False, False]
    assert pairs_agree(pictures[:1], [other_digit], judge).tolist() == [False]


def test_text_of_rows():
    assert Row("a", "b", 0.5, 0.0123, "share", 9).text() == "50.0 ± 1.2 %"
    assert Row("a", "b", 2.41234, 0.0111, "nats", 9).text() == "2.412 ± 0.011 nats"
    assert Row("a", "b", 123.456, None, "dB", 9).text() == "123.5 dB"


def test_sampling_is_described_by_what_differs():
    assert describe_sampling(SampleConfig()) == "temperature 1.0"
    config = SampleConfig(temperature=0.8, guidance_scale=2.0)
    assert describe_sampling(config) == "temperature 0.8, guidance_scale 2.0"


def test_report_files_hold_every_row_and_are_not_overwritten(report: Report, tmp_path):
    report.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert len(content["rows"]) == len(report.rows)
    assert content["rows"][0] == report.rows[0]._asdict()
    assert content["command"] == "smalti evaluate …" and content["weights_sha256"] == report.weights_sha256
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.count("\n|") == 2 + len(report.rows)
    assert "    smalti evaluate …\n" in markdown
    assert find_report(tmp_path, report.weights_sha256, report.config) == report
    assert find_report(tmp_path, "other weights", report.config) is None
    assert find_report(tmp_path, report.weights_sha256, ReportConfig()) is None
    assert find_report(tmp_path / "none", report.weights_sha256, report.config) is None
    with pytest.raises(InputError, match=r"report\.json exists already"):
        report.write(tmp_path)
    report.write(tmp_path, force=True)
    assert set(report.figures().values()) == {row.text() for row in report.rows}


def test_galleries_are_three_readable_pictures(pipe: Pipeline, held_out: HeldOut, tmp_path):
    paths = draw_galleries(pipe, held_out.pictures, held_out.captions, tmp_path)
    assert [path.name for path in paths] == list(GALLERIES)
    for path in paths:
        with Image.open(path) as figure:
            assert min(figure.size) > 700
            assert len(figure.convert("RGB").reduce(8).getcolors(1 << 20) or []) > 50
    with pytest.raises(InputError, match=r"text_conditioned\.png exists already"):
        draw_galleries(pipe, held_out.pictures, held_out.captions, tmp_path)


def test_held_out_pairs_are_levels(tmp_path, held_out: HeldOut):
    from smalti.data.digits import ColouredDigits, write_digits

    write_digits(tmp_path, "x", {"test": ColouredDigits(held_out.pictures, held_out.captions)}, show_progress=False)
    for path in (tmp_path, tmp_path / "test.parquet"):
        found = read_held_out(path)
        np.testing.assert_array_equal(found.pictures, held_out.pictures)
        assert found.captions == held_out.captions
    assert images_to_levels(torch.ones(1, 3, 28, 28)).max() == 3
    assert len(PairTable(tmp_path / "test.parquet")) == N


def test_bundles_of_other_pictures_are_refused(held_out: HeldOut):
    with pytest.raises(InputError, match="tiny draws pictures of 24×16, and this measures bundles of coloured digits"):
        evaluate_digits(tiny(BOTH), held_out, show_progress=False)


def test_nothing_to_measure_is_an_error(pipe: Pipeline, judge: DigitClassifier):
    with pytest.raises(InputError, match="x holds no pictures"):
        evaluate_digits(pipe, HeldOut(np.zeros((0, 28, 28, 3), np.uint8), [], "x"), classifier=judge)


@pytest.mark.parametrize("caption", ["foo bar", "dark green eight on bright", "blueish green eight on bright cyan"])
def test_a_caption_that_says_no_digit_is_named_by_its_row(
    pipe: Pipeline, held_out: HeldOut, judge: DigitClassifier, caption: str
):
    captions = [*held_out.captions[:4], caption, *held_out.captions[5:]]
    with pytest.raises(InputError, match=f"^thirteen digits: row 4: caption '{caption}'"):
        evaluate_digits(pipe, held_out._replace(captions=captions), classifier=judge, show_progress=False)


@pytest.mark.parametrize("bad", [{"num_pairs": 0}, {"best_of": (0,)}])
def test_config_is_checked(bad: dict):
    with pytest.raises(ValueError, match=re.escape(next(iter(bad)))):
        ReportConfig(**bad)

"""Prompts that are drawn and read back: what is counted, with which interval, and what of it is written."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smalti.cli.app import run
from smalti.data.scene_tables import scene_row
from smalti.data.scenes import KINDS, UNSEEN, render
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.evaluate.prompts import (
    REPORT_FILES,
    DigitsSubject,
    PromptsConfig,
    ScenesSubject,
    Share,
    evaluate_prompts,
    rows_of,
    wilson_interval,
)
from smalti.image_files import PictureConfig


class Painter:
    """Stands for a pipeline that draws every prompt rightly but for its first candidate of every fourth prompt, in
    which all things are gone."""

    name, weights_sha256, rerankers = "painter", "0" * 64, ("caption",)
    sampling = SimpleNamespace(picture=SampleConfig(temperature=0.5, guidance_scale=2.0))
    pictures = SimpleNamespace(height=64, width=64)
    text_tokenizer = SimpleNamespace(encode=lambda text: [0])
    image_tokenizer = torch.nn.Identity()

    def check_drawing(self, n: int, best_of: int, rerank: str) -> None:
        assert (n, best_of, rerank) == (1, 3, "caption")

    def __init__(self, num: int):
        self.rows = {row.caption: row for row in (scene_row("test", i, 0) for i in range(num))}
        self.order = list(self.rows)
        self.asked: list[dict[str, Any]] = []

    def generate_codes(self, texts: list[str], *, seed, n: int, **sampling: Any) -> torch.Tensor:
        self.asked.append(sampling | {"seed": list(seed), "n": n})
        return torch.tensor([[self.order.index(text), i] for text in texts for i in range(n)])

    def encode_images(self, images: torch.Tensor, batch_size: int) -> torch.Tensor:
        assert images.shape == (len(self.order), 3, 64, 64)
        return torch.tensor([[index, 1] for index in range(len(images))])

    def decode_images(self, codes: torch.Tensor, batch_size: int) -> torch.Tensor:
        pictures = []
        for index, candidate in codes.tolist():
            content = self.rows[self.order[index]].scene.content
            lost = index % 4 == 1 and candidate == 0
            picture = render(content._replace(things=()) if lost else content)
            pictures.append(torch.tensor(picture).permute(2, 0, 1) / 255)
        return torch.stack(pictures)

    def merit(self, codes: torch.Tensor, words: Any, rerank: str, batch_size: int) -> torch.Tensor:
        return (codes[:, 1] == 1).float()


@pytest.fixture(scope="module")
def report():
    painter = Painter(40)
    config = PromptsConfig(num=40, best_of=(1, 3), guidance_scales=(1.0, 4.0))
    pipe: Any = painter
    return painter, evaluate_prompts(pipe, config, command="smalti evaluate prompts x", show_progress=False)


def test_rates_are_of_what_was_read(report):
    _, found = report
    rows = {(row.guidance_scale, row.best_of, row.group): row.shares for row in found.rows}
    assert rows[1.0, 0, "seen"]["all"] == rows[1.0, 0, "unseen"]["all"] == Share(20, 20)  # the image tokenizer's own
    for scale in (1.0, 4.0):
        # prompts 1, 5, 9 … are unseen ones, ten of the twenty
        assert rows[scale, 1, "seen"]["all"] == Share(20, 20)
        assert rows[scale, 1, "unseen"]["all"] == Share(10, 20)
        assert rows[scale, 1, "unseen"]["count"] == rows[scale, 1, "unseen"]["shape"] == Share(10, 20)
        assert rows[scale, 1, "unseen"]["background"].rate == 1
        assert sum(rows[scale, 1, kind]["all"].num for kind in KINDS) == 40
        assert rows[scale, 3, "unseen"]["all"] == Share(20, 20)
        assert sum(rows[scale, 1, f"unseen {kind}"]["all"].num for kind in UNSEEN) == 20
        relations = rows[scale, 1, "unseen shape and relation"]["relation"]
        assert relations.num == 4 and rows[scale, 3, "unseen shape and relation"]["relation"].right == 4


def test_candidates_are_drawn_once_with_the_bundles_settings(report):
    painter, _ = report
    assert {(asked["guidance_scale"], asked["temperature"], asked["n"]) for asked in painter.asked} == {
        (1.0, 0.5, 3),
        (4.0, 0.5, 3),
    }
    seeds = [seed for asked in painter.asked if asked["guidance_scale"] == 1 for seed in asked["seed"]]
    assert seeds == list(range(0, 120, 3))


def test_curves_against_the_number_of_candidates(report, tmp_path):
    _, found = report
    curves = {(curve.guidance_scale, curve.category, curve.group): curve for curve in found.curves}
    # Of three candidates the first is wrong in half of the unseen prompts, and the second is always preferred: so the
    # best of one, two and three is right in 2/3, 1, and 1 of them; of two, the first and the third are drawn in a
    # third of all choices, tie, and either may be kept.
    unseen = curves[4.0, "all", "unseen"]
    assert unseen.num == 20
    assert unseen.kept == pytest.approx([1 / 2 + 1 / 2 * 2 / 3, 1 / 2 + 1 / 2 * (1 - 1 / 3 * 1 / 2), 1])
    assert unseen.any == pytest.approx([1 / 2 + 1 / 2 * 2 / 3, 1, 1])
    assert curves[1.0, "count", "seen"].kept == [1, 1, 1]
    found.write(tmp_path)
    assert (tmp_path / "prompts.png").read_bytes().startswith(b"\x89PNG")
    assert "| all | unseen | 4 | 83.3 / 83.3 | 91.7 / 100.0 | 100.0 / 100.0 |" in (tmp_path / "prompts.md").read_text()


def test_a_ranker_chooses_for_another_bundle():
    painter: Any = Painter(4)
    ranker: Any = Painter(4)
    ranker.name, ranker.merit = "critic", lambda codes, words, rerank, batch_size: -codes[:, 1].float()
    config = PromptsConfig(num=4, best_of=(3,))
    found = evaluate_prompts(painter, config, ranker=ranker, show_progress=False)
    # the first candidate, which of the second prompt is wrong
    assert [row.shares["all"].right for row in found.rows if row.best_of and row.group == "unseen"] == [1]
    assert "the best by p(caption | picture) of critic" in found.markdown()
    with pytest.raises(InputError, match="there is one picture to choose from"):
        evaluate_prompts(painter, PromptsConfig(num=4, best_of=(1,)), ranker=ranker, show_progress=False)
    ranker.image_tokenizer = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="critic has another image tokenizer than painter"):
        evaluate_prompts(painter, config, ranker=ranker, show_progress=False)


def test_what_is_written(report, tmp_path):
    _, found = report
    found.write(tmp_path)
    content = json.loads((tmp_path / "prompts.json").read_text())
    first = content["rows"][0]
    assert (first["group"], first["best_of"], first["shares"]["all"]["right"]) == ("seen", 0, 20)
    assert first["shares"]["all"]["interval_95"] == pytest.approx([0.8389, 1.0], abs=1e-4)
    page = (tmp_path / "prompts.html").read_text()
    assert page.count("<figure") == 4 * 40 and page.count('class="wrong"') == 2 * 10
    assert "unseen shape and count" in page and 'src="http' not in page
    assert "| 1 picture, guidance 4 | unseen | 50.0% [29.9, 70.1] |" in (tmp_path / "prompts.md").read_text()
    with pytest.raises(InputError, match=r"prompts\.json"):
        found.write(tmp_path)
    assert next(iter(found.figures())) == "prompts, seen: true pictures, rebuilt"


def test_wilsons_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, num, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip  # noqa: E501
        assert wilson_interval(right, num) == pytest.approx((low, high), abs=5e-5)
        assert wilson_interval(num - right, num) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_what_a_prompt_does_not_say_is_not_counted():
    verdicts = [{"all": True, "size": None}, {"all": False, "size": False}]
    [row] = rows_of(verdicts, ["seen", "seen"], ["all", "size"], 1.0, 1)
    assert row.shares == {"all": Share(1, 2), "size": Share(0, 1)}


def test_prompts_depend_on_the_seed_alone():
    for subject in (ScenesSubject(), DigitsSubject()):
        assert subject.prompts(9, 1) == subject.prompts(20, 1)[:9] != subject.prompts(9, 2)
    kinds = [prompt.group for prompt in ScenesSubject().prompts(20, 0)]
    assert kinds.count("seen") == 10 and {kinds.count(kind) for kind in UNSEEN} == {2}


def test_the_command_measures_digits(tmp_path, capsys):
    command = ["evaluate", "prompts", "digits", "--num", "6", "--best-of", "1,2", "-o", str(tmp_path), "--quiet"]
    assert run(command) == 0
    assert "6 prompts of digits drawn by digits, the best by p(caption | picture)" in capsys.readouterr().out
    content = json.loads((tmp_path / "prompts.json").read_text())
    assert content["command"] == "smalti evaluate prompts digits --num 6 --best-of 1,2 --seed 0"
    assert [(row["best_of"], row["group"]) for row in content["rows"]] == [(1, "any"), (2, "any")]
    assert content["rows"][1]["shares"]["background"]["right"] >= 5
    assert run(command) == 2 and "prompts.json" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best-of", "0"], "--best-of is '0'; expected numbers of 1 to"),
        (["--best-of", "1,x"], "--best-of is '1,x'"),
        (["--guidance", "a"], "--guidance is 'a'; expected numbers"),
        (["--rerank", "luck"], "rerank 'luck' is unknown; choose one of picture, caption, pmi"),
        (["--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message: str, capsys):
    assert run(["evaluate", "prompts", "digits", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_whose_pictures_cannot_be_read_is_refused():
    pipe: Any = SimpleNamespace(name="odd", pictures=PictureConfig(height=30, width=20))
    with pytest.raises(InputError, match="odd draws pictures of 20×30; prompts can be checked"):
        evaluate_prompts(pipe, show_progress=False)

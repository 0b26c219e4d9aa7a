"""The bundle of emoji that ships: small enough, its card complete, and pictures that say what was asked for."""

import json

import pytest

from smalti.bundle import CARD, CONFIG, shipped_bundles
from smalti.cli.app import run
from smalti.image_files import read_picture, read_receipt
from smalti.tasks.images import Pipeline

PROMPTS = ["woman astronaut, dark skin tone", "red heart", "man singer, dark skin tone"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load("emoji")


def test_it_is_small_and_says_where_it_comes_from():
    folder = shipped_bundles()["emoji"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    card = (folder / CARD).read_text()
    for said in ("Noto Color Emoji", "Open Font License", "made by", "seeds", "held-out compositions, pixels"):
        assert said in card
    config = json.loads((folder / CONFIG).read_text())
    assert config["name"] == "emoji" and config["about"]["made by"].startswith("`smalti train emoji ")


def test_what_it_draws_it_reads_back(pipe):
    drawn = pipe.generate_codes(PROMPTS, seed=0, temperature=0.0)
    said = pipe.caption_codes(drawn)
    assert said[0].endswith("astronaut, dark skin tone")  # a woman's, a man's and a person's helmets hide the hair
    assert said[1] == "red heart"
    assert said[2].startswith("man ") and said[2].endswith(", dark skin tone")


def test_the_command_draws_with_the_best_of_several(tmp_path, capsys):
    assert run(["generate", PROMPTS[0], "--bundle", "emoji", "-o", str(tmp_path / "a.png"), "--best-of", "2"]) == 0
    receipt = read_receipt(tmp_path / "a.png")
    assert receipt["rerank"] == "caption" and receipt["prompt"] == PROMPTS[0]
    assert read_picture(tmp_path / "a.png").size == (256, 256)
    assert run(["caption", str(tmp_path / "a.png"), "--bundle", "emoji"]) == 0
    assert capsys.readouterr().out.splitlines()[-1]

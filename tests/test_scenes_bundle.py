"""The bundle of scenes that ships: small enough, its card complete, and pictures that show what was asked for."""

import json

import pytest

from smalti.bundle import CARD, CONFIG, shipped_bundles
from smalti.cli.app import run
from smalti.data.scene_reading import check, read_picture
from smalti.data.scene_tables import scene_row
from smalti.data.scenes import parse_caption
from smalti.evaluate.prompts import to_pixels
from smalti.image_files import read_picture as read_png
from smalti.image_files import read_receipt
from smalti.tasks.images import Pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load("scenes")


def test_it_is_small_and_says_where_it_comes_from():
    folder = shipped_bundles()["scenes"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8e6
    card = (folder / CARD).read_text()
    for said in ("Scenes of a grammar", "smalti train scenes-parti", "prompts, unseen: best of 16", "Apache-2.0"):
        assert said in card
    assert json.loads((folder / CONFIG).read_text())["name"] == "scenes"


def test_most_of_what_it_draws_is_what_was_asked_for(pipe):
    captions = [scene_row("test", i, 11).caption for i in range(24)]
    pictures = to_pixels(pipe.decode_images(pipe.generate_codes(captions, seed=range(24))))
    found = [check(parse_caption(text), read_picture(p)) for text, p in zip(captions, pictures, strict=True)]
    assert sum(one.attributes for one in found) >= 20 and sum(one.count for one in found) >= 22


def test_the_command_chooses_it_for_a_scene(tmp_path, capsys):
    prompt = "three small orange squares on a dotted gray background"
    assert run(["generate", prompt, "-o", str(tmp_path / "a.png"), "--best-of", "4"]) == 0
    assert "drawn by the bundle scenes (a scene of shapes)" in capsys.readouterr().err
    receipt = read_receipt(tmp_path / "a.png")
    assert receipt["bundle"] == "scenes" and receipt["rerank"] == "picture"
    assert read_png(tmp_path / "a.png").size == (256, 256)
    assert run(["score", str(tmp_path / "a.png"), prompt, "a large red ring"]) == 0
    captured = capsys.readouterr()
    assert "read by the bundle scenes (it drew the picture)" in captured.err
    assert run(["caption", str(tmp_path / "a.png")]) == 2
    assert "no order with image before text" in capsys.readouterr().err

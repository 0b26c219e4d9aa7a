"""A picture redrawn from its receipt: the same, or an error that says what is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import tiny_bpe_pipeline, tiny_pipeline

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.image_files import GRID_GAP, RECEIPT, read_receipt, read_receipts, save_picture, to_grid, with_receipt
from smalti.tasks.replay import replay

PROMPTS = {"tiny": "dark green eight on bright cyan", "words": "zwei Katzen <|endofimage|> \x07"}
SETTINGS = {"temperature": 0.7, "top_k": 30, "guidance_scale": 2.5, "guidance_interval": (3, 40)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for pipe in (tiny_pipeline(), tiny_bpe_pipeline()):
        pipe.save(folder / pipe.name)
    return {name: folder / name for name in PROMPTS}


@pytest.fixture
def drawn(tmp_path) -> Path:
    save_picture(tiny_pipeline().generate(PROMPTS["tiny"], seed=4)[0], tmp_path / "a.png")
    return tmp_path / "a.png"


def tampered(path: Path, **changes) -> Path:
    """The picture with another receipt."""
    with Image.open(path) as picture:
        picture.load()
    receipt = {name: value for name, value in {**read_receipt(path), **changes}.items() if value is not None}
    save_picture(with_receipt(picture, receipt), path.with_name("tampered.png"), force=True)
    return path.with_name("tampered.png")


@pytest.mark.parametrize("name", PROMPTS)
def test_every_kind_of_bundle_writes_what_replay_needs(bundles, tmp_path, capsys, name: str):
    command = ["generate", PROMPTS[name], "--bundle", str(bundles[name]), "--seed", "5", "--guidance-scale", "2"]
    assert run([*command, "-o", str(tmp_path / "a.png")]) == 0
    receipt = read_receipt(tmp_path / "a.png")
    assert (receipt["prompt"], receipt["seed"], len(receipt["codes"])) == (PROMPTS[name], 5, 49)
    assert receipt["sampling"]["guidance_scale"] == 2 and len(receipt["weights_sha256"]) == 64
    again = tmp_path / "again.png"
    assert run(["replay", str(tmp_path / "a.png"), "-o", str(again), "--bundle", str(bundles[name])]) == 0
    assert "drawn again identically (49 codes" in capsys.readouterr().out
    assert again.read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("coupling", ["maximal", "gumbel", "inverse"])
def test_a_picture_drawn_with_drafts_is_drawn_again(bundles, tmp_path, capsys, coupling: str):
    """The receipt says how many drafts there were, and how they were verified."""
    plain, ahead = tmp_path / "plain.png", tmp_path / "ahead.png"
    command = ["generate", PROMPTS["tiny"], "--bundle", str(bundles["tiny"]), "--seed", "5"]
    assert run([*command, "-o", str(plain)]) == 0
    assert run([*command, "--speculative", "6", "--coupling", coupling, "-o", str(ahead)]) == 0
    receipt = read_receipt(ahead)
    assert (receipt["sampling"]["speculative"], receipt["sampling"]["coupling"]) == (6, coupling)
    assert (receipt["codes"] == read_receipt(plain)["codes"]) == (coupling == "inverse")
    assert run(["replay", str(ahead), "--bundle", str(bundles["tiny"])]) == 0
    assert "drawn again identically (49 codes" in capsys.readouterr().out
    assert run([*command, "--speculative", "-2", "-o", str(tmp_path / "b.png")]) == 2
    assert "speculative is -2; expected 0 (off) to 1024 drafts" in capsys.readouterr().err


def test_a_picture_of_stored_weights_is_drawn_again_with_them(bundles, tmp_path, capsys):
    path = tmp_path / "int8.png"
    command = ["generate", PROMPTS["tiny"], "--bundle", str(bundles["tiny"]), "-o", str(path)]
    assert run([*command, "--weights", "int8"]) == 0
    assert read_receipt(path)["weights"] == "int8"
    assert run(["replay", str(path), "--bundle", str(bundles["tiny"])]) == 0
    assert "drawn again identically (49 codes" in capsys.readouterr().out
    with pytest.raises(InputError, match="receipt is damaged: weights is 'int3', expected float32, bfloat16, int8"):
        replay(tampered(path, weights="int3"), bundles["tiny"])
    assert run([*command, "--weights", "int3", "--force"]) == 2
    assert "weights 'int3' is unknown; choose one of float32, bfloat16, int8" in capsys.readouterr().err


@pytest.mark.parametrize("n", [2, 5])
def test_a_grid_is_drawn_again_with_all_its_pictures(bundles, tmp_path, capsys, n: int):
    path = tmp_path / "grid.png"
    command = ["generate", PROMPTS["tiny"], "--bundle", str(bundles["tiny"]), "--best-of", "2", "-n", str(n)]
    assert run([*command, "-o", str(path), "--grid", "--scale", "3"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    found = replay(path, bundles["tiny"])
    assert (found.difference, found.num_pictures, found.num_codes) == (None, n, n * 49)
    alone = tiny_pipeline().generate(PROMPTS["tiny"], n=n, best_of=2, scale=3)
    step = 3 * 28 + GRID_GAP
    with Image.open(path) as grid:
        for i, picture in enumerate(alone):
            row, column = divmod(i, {2: 2, 5: 3}[n])
            left, top = column * step, row * step
            assert grid.crop((left, top, left + 84, top + 84)).tobytes() == picture.tobytes()
    assert read_receipts(path) == [json.loads(picture.info[RECEIPT]) for picture in alone]


def test_prompts_and_settings_of_one_grid_may_differ(bundles, tmp_path):
    pipe = tiny_pipeline()
    other = "plain red two on light gray"
    pictures = pipe.generate([PROMPTS["tiny"], other], seed=[7, 3], **SETTINGS)
    pictures += pipe.generate(other, negative_prompt=PROMPTS["tiny"], guidance_scale=2.0)
    save_picture(to_grid(pictures), tmp_path / "grid.png")
    assert replay(tmp_path / "grid.png", bundles["tiny"]).difference is None


@pytest.mark.parametrize(("caption", "rows"), [(None, 2), (PROMPTS["tiny"], 3), (None, 0)])
def test_a_completed_picture_is_completed_again(bundles, drawn: Path, tmp_path, caption, rows: int):
    pictures = tiny_pipeline().complete(drawn, rows=rows, caption=caption, n=2, seed=8)
    save_picture(pictures[1], tmp_path / "completed.png")
    assert replay(tmp_path / "completed.png", bundles["tiny"]).difference is None


def test_a_bundle_of_the_hub_is_fetched_by_its_name(bundles, tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name: asked.append(name) or str(bundles["words"]))
    path, of_hub = tmp_path / "a.png", ["--bundle", "owner/words"]
    assert run(["generate", "two cats", "-o", str(path), *of_hub]) == 0
    assert run(["replay", str(path), *of_hub]) == 0
    assert run(["info", "owner/words"]) == 0
    assert asked == ["owner/words"] * len(asked) and len(asked) >= 3

    def refuse(name: str) -> str:
        raise hub.errors.LocalEntryNotFoundError("Cannot reach the hub\nand more")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    assert run(["replay", str(path), *of_hub]) == 2
    assert "the hub does not give a bundle of that name: Cannot reach the hub" in capsys.readouterr().err


def test_other_weights_are_refused_naming_both(drawn: Path, tmp_path, capsys):
    other = tiny_pipeline(seed=1)
    other.save(tmp_path / "other")
    assert run(["replay", str(drawn), "--bundle", str(tmp_path / "other"), "-o", str(tmp_path / "b.png")]) == 2
    error = capsys.readouterr().err
    assert tiny_pipeline().weights_sha256 in error and other.weights_sha256 in error
    assert not (tmp_path / "b.png").exists()


def test_without_a_bundle_its_name_is_looked_up(drawn: Path):
    with pytest.raises(InputError, match=r"bundle 'tiny' of weights [0-9a-f]{64}: say by --bundle where it is"):
        replay(drawn)
    with pytest.raises(InputError, match="was drawn with weights"):  # the shipped one
        replay(tampered(drawn, bundle="digits"))


def test_what_differs_is_said_with_its_place(bundles, drawn: Path, capsys):
    codes = read_receipt(drawn)["codes"]
    codes[17] += 1
    changed = tampered(drawn, codes=codes)
    assert run(["replay", str(changed), "--bundle", str(bundles["tiny"])]) == 1
    assert f"row 2, column 3 is code {codes[17] - 1}, the receipt says {codes[17]}" in capsys.readouterr().err
    assert "has 48 codes, the bundle draws 49" in str(replay(tampered(drawn, codes=codes[1:]), bundles["tiny"]))
    assert "is code" in str(replay(tampered(drawn, seed=5), bundles["tiny"]).difference)


def test_changed_pixels_and_sizes_are_seen(bundles, drawn: Path, tmp_path, monkeypatch):
    with Image.open(drawn) as picture:
        picture.load()
    pixels = np.asarray(picture).copy()
    pixels[9, 20] = 255 - pixels[9, 20]
    for changed, message in (
        (Image.fromarray(pixels), "the codes agree, but 1 pixels differ, the first at column 20, row 9, which is ("),
        (picture.crop((0, 0, 56, 50)), "it is 56 × 56 × 3, the file 56 × 50 × 3"),
        (picture.convert("RGBA"), "it is 56 × 56 × 3, the file 56 × 56 × 4"),
    ):
        changed.info[RECEIPT] = picture.info[RECEIPT]
        save_picture(changed, tmp_path / "changed.png", force=True)
        difference = replay(tmp_path / "changed.png", bundles["tiny"]).difference
        assert difference is not None and message in difference
    small = picture.resize((20, 20))
    small.info[RECEIPT] = picture.info[RECEIPT]
    save_picture(small, tmp_path / "small.png")
    monkeypatch.setattr("smalti.tasks.replay._draw_codes", None)  # said before anything is drawn
    with pytest.raises(InputError, match="it was made smaller after it was drawn"):
        replay(tmp_path / "small.png", bundles["tiny"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "its receipt has seed None"),
        ({"executor": {"a": 1}}, r"its receipt has executor \{'a': 1\}; this version knows cuda_graph, native"),
        ({"executor": "fast"}, "its receipt has executor 'fast'"),
        ({"sampling": [1]}, r"its receipt has sampling \[1\]"),
        ({"codes": ["x"]}, "not all of its codes are whole numbers"),
        ({"task": "complete"}, "its receipt has rows None"),
        ({"task": "dream"}, "task 'dream' cannot be drawn again"),
        ({"pictures": []}, "is not a list of receipts"),
    ],
)
def test_receipts_that_do_not_tell_enough(bundles, drawn: Path, changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        replay(tampered(drawn, **changes), bundles["tiny"])


def test_a_setting_of_another_version_is_named(bundles, drawn: Path, capsys):
    changed = tampered(drawn, sampling={"warmth": 3})
    assert run(["replay", str(changed), "--bundle", str(bundles["tiny"])]) == 2
    assert "sampling: unknown field warmth; known are temperature" in capsys.readouterr().err


def test_files_that_tell_nothing(tmp_path, capsys):
    Image.new("RGB", (28, 28)).save(tmp_path / "plain.png")
    for path, message in (
        ("plain.png", "plain.png has no receipt"),
        ("none.png", "there is no file"),
        ("", "is a folder"),
    ):
        assert run(["replay", str(tmp_path / path)]) == 2
        assert message in capsys.readouterr().err


def test_a_grid_too_large_is_refused():
    with pytest.raises(ValueError, match="more than 4096 a side"):
        to_grid([Image.new("RGB", (1000, 10))] * 25)
    with pytest.raises(ValueError, match="at least one"):
        to_grid([])

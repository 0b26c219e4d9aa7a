"""Pictures by the thousand: the same whatever draws them, through kills, and laid out as judges read them."""

import json
import os
import re
import signal
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_bundle import save_tiny_bundle

from smalti.cli.app import run
from smalti.data.parts import remove_leftovers
from smalti.data.prompt_lists import read_prompts
from smalti.errors import InputError
from smalti.image_files import read_picture
from smalti.tasks import draw_samples as draw_module
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.draw_samples import SamplesJob, SamplingConfig, Subjects, draw_samples, parse_classes

CLASSES = Subjects(labels=(1, 4, 9))
SMALL = {"num": 10, "pictures_per_part": 4, "seed": 5}
PROMPTS = ["dark green eight on bright cyan", "plain red two on light gray", "bright blue one on dark orange"]


def drawn(output: Path, **more) -> dict[str, np.ndarray]:
    config = SamplingConfig(**(SMALL | more))
    draw_samples("mnist-classes", CLASSES, output, config, show_progress=False)
    with np.load(output) as found:
        return dict(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, np.ndarray]:
    return drawn(tmp_path_factory.mktemp("samples") / "a.npz")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(save_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


def test_picture_i_has_the_seed_and_class_of_its_number(whole):
    assert whole["arr_0"].shape == (10, 28, 28, 3) and whole["arr_0"].dtype == np.uint8
    assert whole["arr_1"].tolist() == [1, 4, 9, 1, 4, 9, 1, 4, 9, 1]  # in turn: every beginning is balanced
    pipe = ClassPipeline.load("mnist-classes")
    for number in (0, 7):
        [alone] = pipe.generate(int(whole["arr_1"][number]), seed=5 + number, scale=1)
        assert np.array_equal(np.asarray(alone), whole["arr_0"][number])


@pytest.mark.parametrize("how", [{"batch_size": 1}, {"workers": 2, "batch_size": 3}, {"pictures_per_part": 3}])
def test_the_pictures_do_not_depend_on_who_draws_them(tmp_path, whole, how):
    found = drawn(tmp_path / "b.npz", **how)
    assert np.array_equal(found["arr_0"], whole["arr_0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.npz", "b.npz.card.json"]


def test_a_killed_job_resumes_with_what_it_has(tmp_path, whole, monkeypatch):
    output, parts = tmp_path / "c.npz", tmp_path / ".c.npz.parts"
    plain = SamplesJob.do

    def killed_at_the_second(job, part):
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(job, part)

    if not (child := os.fork()):
        monkeypatch.setattr(SamplesJob, "do", killed_at_the_second)
        drawn(output)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not output.exists() and [path.name for path in parts.glob("*.npz")] == ["00000000.npz"]
    with pytest.raises(InputError, match=r"begun with other settings \(seed differ\).*--force"):
        drawn(output, seed=6)
    before = (parts / "00000000.npz").stat().st_mtime_ns
    times = []
    monkeypatch.setattr(SamplesJob, "do", lambda job, part: times.append(part) or plain(job, part))
    assert np.array_equal(drawn(output)["arr_0"], whole["arr_0"]) and times == [1, 2] and before
    assert not parts.exists()
    with pytest.raises(InputError, match="exists already"):
        drawn(output)


@pytest.mark.parametrize("newer", [False, True])
def test_leftovers_go_and_parts_of_a_forced_run_stay(tmp_path, newer):
    card = tmp_path / "a.npz.card.json"
    card.write_text("{}")
    (tmp_path / ".a.npz.parts").mkdir()
    part = tmp_path / ".a.npz.parts" / "0.npz"
    part.write_bytes(b"")
    when = card.stat().st_mtime_ns + (10**9 if newer else -(10**9))
    os.utime(part, ns=(when, when))
    remove_leftovers(tmp_path / "a.npz", card)
    assert part.exists() == newer


def test_a_damaged_part_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_module, "_write_npz", lambda *_: (_ for _ in ()).throw(InputError("stop here")))
    with pytest.raises(InputError, match="stop here"):
        drawn(tmp_path / "d.npz")
    monkeypatch.undo()
    part = tmp_path / ".d.npz.parts" / "00000001.npz"
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"{re.escape(str(part))}.*remove .*00000001"):
        drawn(tmp_path / "d.npz")
    part.unlink()
    assert len(drawn(tmp_path / "d.npz")["arr_0"]) == 10


def test_the_card_says_how_they_were_drawn(tmp_path, capsys):
    words = ["sample", "--bundle", "mnist-classes", "--classes", "0-2,seven", "-n", "4", "--guidance-scale", "1.5"]
    assert run([*words, "-o", str(tmp_path / "e.parquet"), "--quiet"]) == 0, capsys.readouterr().err
    card = json.loads((tmp_path / "e.parquet.card.json").read_text())
    assert card["classes"] == [0, 1, 2, 7] and card["sampling"]["guidance_scale"] == 1.5 and card["num"] == 4
    assert card["executor"] and len(card["weights_sha256"]) == len(card["sha256"]) == 64
    assert card["command"].startswith("smalti sample --bundle mnist-classes --classes 0-2,seven -n 4")
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column("label").to_pylist() == [0, 1, 2, 7] and table.column("seed").to_pylist() == [0, 1, 2, 3]


def test_random_labels_are_drawn_by_the_seed():
    config = SamplingConfig(num=300, labels="random", seed=3)
    found = CLASSES.of(range(300), config)
    assert found[100:200] == CLASSES.of(range(100, 200), config) and found != CLASSES.of(
        range(300), SamplingConfig(num=300, labels="random", seed=4)
    )
    assert all(80 < found.count(label) < 120 for label in (1, 4, 9))


# Prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_read_as_benchmarks_publish_them(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\tNote\na "red" fox\tAnimals\tx\nbond\tAbstract\ty\n')
    found = read_prompts(tmp_path / "p.tsv")
    assert found.prompts == ('a "red" fox', "bond") and found.rows[1]["Category"] == "Abstract"
    (tmp_path / "p.jsonl").write_text('{"tag": "counting", "include": [], "prompt": "two dogs"}\n')
    assert read_prompts(tmp_path / "p.jsonl").rows == ({"tag": "counting", "include": [], "prompt": "two dogs"},)
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt").prompts == ("one", "two")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "partiprompts7.txt").write_text("a long\nprompt")
    assert read_prompts(tmp_path / "dpg").names == ("partiprompts7",)
    assert read_prompts(tmp_path / "dpg").prompts == ("a long prompt",)
    pq.write_table(pa.table({"caption": ["a", "b"], "image": [b"", b""]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet").rows == ({"caption": "a"}, {"caption": "b"})
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: the prompt is ''"):
        read_prompts(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="there is no"):
        read_prompts(tmp_path / "none.txt")


def test_published_lists_have_the_prompts_that_they_say(shared_dir):
    assert len(read_prompts(shared_dir / "data" / "text" / "PartiPrompts.tsv")) == 1632
    assert len(read_prompts(shared_dir / "data" / "text" / "coco_captions.csv")) == 30_000


def sample_prompts(tiny: str, prompts: Path, output: Path, *more: str) -> int:
    return run(["sample", "--bundle", tiny, "--prompts", str(prompts), "-o", str(output), "--quiet", *more])


def test_genevals_judge_finds_its_folders(tiny, tmp_path):
    rows = [{"tag": "colors", "include": [{"class": "8", "count": 1}], "prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ["--layout", "geneval", "--per-prompt", "2"]
    assert sample_prompts(tiny, tmp_path / "m.jsonl", tmp_path / "out", *how) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000", "00001", "00002"]
    for number, row in enumerate(rows):  # as evaluate_images.py reads them
        folder = tmp_path / "out" / f"{number:05d}"
        assert folder.name.isdigit() and json.loads((folder / "metadata.jsonl").read_text()) == row
        pictures = sorted(path.name for path in (folder / "samples").iterdir())
        assert pictures == ["0000.png", "0001.png"] and all(re.match(r"\d+\.png", name) for name in pictures)
    assert sample_prompts(tiny, tmp_path / "m.jsonl", tmp_path / "plain.npz", "--per-prompt", "2") == 0
    flat = np.load(tmp_path / "plain.npz")["arr_0"]
    assert np.array_equal(np.asarray(read_picture(tmp_path / "out/00002/samples/0001.png")), flat[5])
    with zipfile.ZipFile(tmp_path / "plain.npz") as archive:
        assert archive.namelist() == ["arr_0.npy"]  # no labels of prompts


def test_geneval2_finds_a_picture_of_every_prompt(tiny, tmp_path, monkeypatch):
    rows = [{"prompt": prompt, "atom_count": 3, "vqa_list": [], "skills": []} for prompt in PROMPTS]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample_prompts(tiny, tmp_path / "g.jsonl", tmp_path / "out", "--layout", "geneval2") == 0
    monkeypatch.chdir(tmp_path / "out")
    paths = json.loads(Path("image_paths.json").read_text())
    assert list(paths) == PROMPTS and all(read_picture(path).size == (28, 28) for path in paths.values())


def test_dpgs_judge_cuts_the_four_apart(tiny, tmp_path):
    (tmp_path / "prompts").mkdir()
    for number, prompt in enumerate(PROMPTS):
        (tmp_path / "prompts" / f"item{number}.txt").write_text(prompt)
    how = ["--layout", "dpg", "--per-prompt", "4"]
    assert sample_prompts(tiny, tmp_path / "prompts", tmp_path / "out", *how) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["item0.png", "item1.png", "item2.png"]
    assert sample_prompts(tiny, tmp_path / "prompts", tmp_path / "flat", "--per-prompt", "4") == 0
    size = 28
    for number in range(3):
        whole = read_picture(tmp_path / "out" / f"item{number}.png")
        assert whole.size == (56, 56)
        boxes = [(0, 0, size, size), (size, 0, 56, size), (0, size, size, 56), (size, size, 56, 56)]  # their crops
        for i, box in enumerate(boxes):
            alone = read_picture(tmp_path / "flat" / f"{4 * number + i:06d}.png")
            assert np.array_equal(np.asarray(whole.crop(box)), np.asarray(alone))
    lines = [json.loads(line) for line in (tmp_path / "flat" / "metadata.jsonl").read_text().splitlines()]
    assert lines[5] == {
        "file_name": "000005.png",
        "seed": 5,
        "text": PROMPTS[1],
        "row": {"item_id": "item1", "prompt": PROMPTS[1]},
    }


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "a.npz"], "what to draw?"),
        (["--classes", "all", "--prompts", "p.txt", "-o", "a.npz"], "what to draw?"),
        (["--classes", "all", "-o", "a.npz"], "how many pictures? Give -n"),
        (["--classes", "0-11", "-n", "3", "-o", "a.npz"], "class 11 is out of range; expected 0 to 9"),
        (["--classes", "0,3,zero", "-n", "3", "-o", "a.npz"], "names class 0 twice"),
        (["--classes", "all", "-n", "3", "-o", "a.png"], "written as .npz or .parquet, or to a folder"),
        (["--classes", "all", "-n", "3", "-o", "a", "--layout", "geneval"], "is one of prompts"),
        (["--classes", "all", "-n", "3", "-o", "a", "--layout", "grid"], "choose one of plain, geneval"),
        (["--classes", "all", "-n", "3", "-o", "a.npz", "--labels", "sorted"], "choose one of balanced, random"),
        (["--classes", "all", "-n", "3", "-o", "a.npz", "--per-prompt", "2"], "without --per-prompt"),
        (["--prompts", "p.txt", "-o", "a.npz"], "draws classes, not captions"),
        (["--prompts", "p.txt", "-n", "3", "-o", "a.npz"], "-n is 3, but p.txt gives 1 pictures"),
    ],
)
def test_one_error_says_what_is_wrong(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red fox\n")
    assert run(["sample", "--bundle", "mnist-classes", *words]) == 2
    assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_prompts_that_the_bundle_cannot_read_are_told_before_the_work(tiny, tmp_path, capsys):
    (tmp_path / "p.txt").write_text(f"{PROMPTS[0]}\ndark green fox on bright cyan\n")
    assert sample_prompts(tiny, tmp_path / "p.txt", tmp_path / "a.npz") == 2
    assert "prompt 1: " in (error := capsys.readouterr().err) and "fox" in error
    assert run(["sample", "--bundle", tiny, "--classes", "all", "-n", "2", "-o", str(tmp_path / "a.npz")]) == 2
    assert "knows no classes" in capsys.readouterr().err
    for layout, more in (("geneval", []), ("geneval2", ["--per-prompt", "2"]), ("dpg", [])):
        (tmp_path / "p.txt").write_text(PROMPTS[0])
        assert sample_prompts(tiny, tmp_path / "p.txt", tmp_path / "out", "--layout", layout, *more) == 2
        assert "judge" in capsys.readouterr().err


def test_classes_are_given_by_numbers_ranges_and_names():
    classes = ClassPipeline.load("mnist-classes").classes
    assert parse_classes("all", classes) == tuple(range(10)) and parse_classes("7, one,2-4", classes) == (7, 1, 2, 3, 4)
    with pytest.raises(InputError, match="give all, or numbers"):
        parse_classes(",", classes)

"""The command line: what it prints and writes, and one line with exit code 2 for whatever a user can mend."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from tiny_bundle import save_tiny_bundle, tiny_pipeline

from smalti.bundle import shipped_bundles
from smalti.cli import app as cli
from smalti.cli.evaluate import parse_size
from smalti.data.tokens import TokenTable
from smalti.evaluate.digits import DigitClassifier
from smalti.image_files import read_receipt
from smalti.recipes import TokenizerRecipe, load_recipe, shipped_recipes

CAPTION = "dark green eight on bright cyan"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def smalti(capsys, tiny: Path):
    """Runs a command on the tiny bundle; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument).replace("TINY", str(tiny)) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def picture(tmp_path, smalti) -> Path:
    path = tmp_path / "eight.png"
    assert smalti("generate", CAPTION, "-o", path, "--bundle", "TINY", "--seed", 3)[0] == 0
    return path


def complaint(result: tuple[int, str, str]) -> str:
    """The one line of an error; fails unless it is the last on stderr, after at most lines of progress, with exit 2."""
    code, out, err = result
    assert (code, out) == (2, ""), (code, out, err)
    *before, line = err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in err, err
    assert all(line.endswith(" …") or ": " in line for line in before) and "error: " not in "".join(before), err
    return line.removeprefix("error: ")


def test_generate_writes_the_pictures_the_library_draws(smalti, tmp_path):
    code, out, err = smalti(
        "generate", CAPTION, "-o", tmp_path / "a.png", "--bundle", "TINY", "--seed", 3, "-n", 2, "--scale", 5,
        "--temperature", 0.8, "--guidance-scale", 2, "--top-k", 30, "--top-p", 0.9, "--min-p", 0.01,
        "--guidance-schedule", "linear", "--best-of", 2, "--rerank", "pmi",
        "--negative-prompt", "plain red two on light gray",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.split() == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    expected = tiny_pipeline().generate(
        CAPTION, seed=3, n=2, scale=5, temperature=0.8, guidance_scale=2, top_k=30, top_p=0.9, min_p=0.01,
        guidance_schedule="linear", best_of=2, rerank="pmi", negative_prompt="plain red two on light gray",
    )  # fmt: skip
    for i, picture in enumerate(expected, 1):
        with Image.open(tmp_path / f"a-{i}.png") as found:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))
        assert read_receipt(tmp_path / f"a-{i}.png")["sampling"]["guidance_schedule"] == "linear"


def test_nothing_is_overwritten_without_force(smalti, picture: Path):
    before = picture.read_bytes()
    arguments = ("generate", CAPTION, "-o", picture, "--bundle", "TINY", "--seed", 4)
    assert complaint(smalti(*arguments)) == f"{picture} exists already: give another name, or --force to replace it."
    assert picture.read_bytes() == before
    assert smalti(*arguments, "--force")[0] == 0
    assert picture.read_bytes() != before


def test_caption_score_and_complete(smalti, picture: Path, tmp_path):
    pipe = tiny_pipeline()
    assert smalti("caption", picture, "--bundle", "TINY")[1].split("\n")[:-1] == pipe.caption([picture])
    code, out, _ = smalti("score", picture, CAPTION, "plain red two on light gray", "--bundle", "TINY", "--json")
    scores = pipe.score([picture] * 2, [CAPTION, "plain red two on light gray"])
    assert code == 0
    rows = json.loads(out)
    assert [row["caption"] for row in rows] == [CAPTION, "plain red two on light gray"]
    assert [row["picture_nll_nats"] for row in rows] == pytest.approx(scores.picture_nll_nats.tolist(), rel=1e-6)
    assert f"{scores.pmi_nats[0]:.2f} nats" in smalti("score", picture, CAPTION, "--bundle", "TINY")[1]
    code, out, _ = smalti("complete", "dark green", "-n", 2, "--bundle", "TINY")
    assert out.split("\n")[:-1] == pipe.complete_caption("dark green", n=2)
    target = tmp_path / "new.png"
    assert smalti("complete", "--picture", picture, "--rows", 2, "-o", target, "--bundle", "TINY")[0] == 0
    with Image.open(target) as found:
        assert found.tobytes() == pipe.complete(picture, rows=2)[0].tobytes()


def test_info_says_what_a_bundle_holds(smalti, tiny: Path):
    code, out, _ = smalti("info", "TINY")
    assert code == 0
    for expected in ("8,765 (transformer)", "special 0..2, image 3..39, text 40..70", "text{6}", "test nats per token"):
        assert expected in out
    code, out, _ = smalti("info", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_bundles())


def test_data_digits_tokenize_and_evaluate(smalti, tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.evaluate.report.load_digit_classifier", lambda _: DigitClassifier().eval())
    assert smalti("data", "digits", tmp_path / "digits", "--seed", 1)[0] == 0
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]
    assert "was made with seed 1, not 2" in complaint(smalti("data", "digits", tmp_path / "digits", "--seed", 2))
    tokens = tmp_path / "tokens.parquet"
    pairs = tmp_path / "digits" / "test.parquet"
    code, out, _ = smalti("tokenize", pairs, "-o", tokens, "--bundle", "TINY", "--batch-size", 128)
    assert code == 0 and "300 rows" in out
    table = TokenTable.open(tokens, image_length=49, image_vocab_size=37, text_vocab_size=31)
    pipe = tiny_pipeline()
    batch = table.batch(np.array([17]))
    assert pipe.text_tokenizer.decode(batch.text_tokens[0].tolist()) == table.texts(np.array([17]))[0]
    assert table.metadata["grid"] == [7, 7] and table.metadata["codebook_size"] == 37
    assert "exists already" in complaint(smalti("tokenize", pairs, "-o", tokens, "--bundle", "TINY"))
    out_folder = tmp_path / "report"
    arguments = ("evaluate", "TINY", "--data", tmp_path / "digits", "-o", out_folder, "--num", 2, "--best-of", "1,2")
    code, out, _ = smalti(*arguments)
    assert code == 0 and "prompt accuracy" in out
    assert len(list(out_folder.iterdir())) == 5
    assert "report.json exists already" in complaint(smalti(*arguments))
    assert "expected whole numbers" in complaint(smalti(*arguments[:-1], "x"))


def test_import_lines(smalti, tmp_path):
    (tmp_path / "codes.txt").write_text("a.png 0 1 2\nb.png 3 4 5\n")
    code, out, _ = smalti("data", "import-lines", tmp_path / "codes.txt", "-o", tmp_path / "t.parquet")
    assert code == 0
    assert "2 lines of 3 codes below 6, 0 duplicates, 0 bad lines" in out
    (tmp_path / "codes.txt").write_text("a.png 0 1 2\nb.png 3 x 5\n")
    error = complaint(smalti("data", "import-lines", tmp_path / "codes.txt", "-o", tmp_path / "u.parquet"))
    assert re.search(r"codes\.txt, line 2, column 9: the word 'x'", error)
    assert not (tmp_path / "u.parquet").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("frobnicate",), "'frobnicate'. Try smalti --help."),
        (("generate",), "'-o' / '--output'. Try smalti generate --help."),
        (("generate", CAPTION), "'-o' / '--output'. Try smalti generate --help."),
        (("generate", CAPTION, "-o", "TMP/a.png", "--seed", "x"), "'--seed'"),
        (
            ("generate", CAPTION, "-o", "TMP/gray.png/a.png"),
            "gray.png is a file, not a folder; give a path in a folder",
        ),
        (("generate", CAPTION, "-o", "TMP/gray.png/b/a.png"), "gray.png is a file, not a folder; give a path in a f"),
        (("generate", CAPTION, "-o", "TMP/a.png", "--frob", "x"), "--frob"),
        (("generate", CAPTION, "-o", "TMP/a.jpg"), "a.jpg: pictures are written as PNG"),
        (("generate", CAPTION, "-o", "TMP/no/such/\0/a.png"), "/no/such/\\x00/a.png' holds a null byte"),
        (
            ("generate", "drak green eight on bright cyan", "-o", "TMP/a.png", "--bundle", "digits"),
            "'drak' (did you mean dark",
        ),
        (("generate", "dark green", "-o", "TMP/a.png"), "has 2 words; this bundle's captions have 6"),
        (("generate", CAPTION, "-o", "TMP/a.png", "--top-p", "7"), "top_p is 7.0; expected a share in (0, 1]"),
        (
            ("generate", CAPTION, "-o", "TMP/a.png", "--best-of", "2", "--rerank", "x"),
            "rerank 'x' is unknown; choose one of picture",
        ),
        (("generate", CAPTION, "-o", "TMP/a.png", "--rerank", "pmi"), "one picture to choose from; give --best-of 2"),
        (
            ("generate", CAPTION, "-o", "TMP/a.png", "--negative-prompt", CAPTION, "--guidance-scale", "1"),
            "steers by guidance, and guidance_scale is 1",
        ),
        (("caption", "TMP/none.png"), "there is no file"),
        (("caption", "TMP/gray.png"), "mode L, expected RGB; convert it"),
        (("caption", "TMP/odd.png"), "30×30 pixels, expected 28×28 or a whole multiple of it; resize it"),
        (("score", "TMP/odd.png", CAPTION), "30×30 pixels"),
        (("complete", "--picture", "TMP/odd.png"), "add -o FILE.png"),
        (("complete", "drak"), "'drak' (did you mean dark"),
        (("data", "digits", "TMP/d", "--mnist", "TMP"), "holds no train-images-idx3-ubyte"),
        (("data", "digits", "TMP/d", "--mnist", "TMP", "--pickle", "TMP/p"), "give one of them"),
        (("data", "digits", "TMP/gray.png"), "gray.png is a file, not a folder"),
        (("evaluate", "TINY", "--data", "TMP/none"), "there is no file"),
    ],
)
def test_what_a_user_can_mend_is_one_line(smalti, tmp_path, arguments: tuple[str, ...], message: str):
    Image.new("L", (28, 28)).save(tmp_path / "gray.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "odd.png")
    given = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    if given[0] in ("generate", "caption", "score", "complete"):
        given += ["--bundle", "TINY"]
    assert message in complaint(smalti(*given))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gray.png", "odd.png"]


def test_the_version_is_the_installed_one(smalti):
    status, out, _ = smalti("--version")
    assert (status, out) == (0, f"smalti {version('smalti')}\n")


def test_a_bundle_that_is_not_there(smalti, tmp_path):
    error = complaint(smalti("info", "nonesuch"))
    assert error.startswith("there is no bundle 'nonesuch': expected a folder with a config.json")


def test_a_full_disk_is_one_line(smalti, picture: Path, tmp_path, monkeypatch):
    def no_space(*_: object, **__: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    error = complaint(smalti("generate", CAPTION, "-o", tmp_path / "b.png", "--bundle", "TINY"))
    assert "b.png: no space left on its disk" in error
    assert not (tmp_path / "b.png").exists()


def test_an_unwritable_folder_is_one_line(smalti, tmp_path):
    (tmp_path / "file").write_text("x")
    error = complaint(smalti("generate", CAPTION, "-o", tmp_path / "file" / "a.png", "--bundle", "TINY"))
    assert "a.png cannot be written" in error


def test_our_own_bugs_keep_their_traceback(smalti, monkeypatch):
    monkeypatch.setattr("smalti.bundle.find_bundle", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        smalti("info", "TINY")


@pytest.mark.parametrize("text, size", [("64", (64, 64)), ("64x48", (64, 48)), ("1x4096", (1, 4096))])
def test_sizes_are_read_alike_by_all_commands(text: str, size: tuple[int, int]):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "x64", "big", "-1", "0", "4097", "64x48x3", "٦٤x", "6 4"])
def test_sizes_that_are_none_are_refused(text: str):
    with pytest.raises(ValueError, match=r"--size is '.*'; expected (ROWSxCOLUMNS, such as|rows and columns of 1 to)"):
        parse_size(text)


def commands(group: Any, names: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, and every group of commands, by the words that call it."""
    inner = getattr(group, "commands", {})
    return [names, *(found for name, command in inner.items() for found in commands(command, (*names, name)))]


COMMANDS = commands(typer.main.get_command(cli.app))
assert {("generate",), ("train", "recipe"), ("evaluate", "bundle")} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(smalti, command: tuple[str, ...]):
    code, out, err = smalti(*command, "--help")
    assert (code, err) == (0, "") and f"Usage: smalti {' '.join(command)}".strip() in out
    assert out == smalti(*command, "-h")[1]
    assert "Example" in out or any(other[:-1] == command for other in COMMANDS if other)  # or is a group


PARTS_OF_EVALUATE = [command[1] for command in COMMANDS if command[:1] == ("evaluate",) and len(command) == 2]


@pytest.mark.parametrize("name", [name for name in PARTS_OF_EVALUATE if name != "bundle"])
def test_a_bundle_may_have_the_name_of_a_part_of_evaluate(smalti, tmp_path, name: str):
    error = complaint(smalti("evaluate", name, "--data", tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in error and "option" not in error


def test_help_names_what_ships(smalti, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = Path(cli.__file__).parent.parent
    bundles = ", ".join(sorted(path.name for path in (folder / "bundles").iterdir() if path.is_dir()))
    recipes = ", ".join(sorted(path.stem for path in (folder / "recipes").glob("*.yaml")))
    out = smalti("--help")[1]
    assert bundles in out and recipes in out
    assert recipes in smalti("train", "recipe", "--help")[1]
    tokenizers = [name for name in shipped_recipes() if isinstance(load_recipe(name), TokenizerRecipe)]
    assert len(tokenizers) >= 4 and f"({', '.join(sorted(tokenizers))})" in smalti("train", "tokenizer", "--help")[1]
    for command in ("generate", "caption", "score", "complete", "info"):
        assert bundles in smalti(command, "--help")[1]


def test_each_picture_is_captioned_by_the_bundle_of_its_size(smalti, tmp_path):
    for name, size in (("a", 28), ("b", 64), ("c", 56)):
        Image.new("RGB", (size, size), (0, 85, 255)).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in "abc"]
    code, out, _ = smalti("caption", *paths, "--json")
    found = json.loads(out)
    assert code == 0 and [row["picture"] for row in found] == paths
    assert [row["bundle"] for row in found] == ["digits", "emoji", "digits"]
    assert [row["caption"] for row in found] == [smalti("caption", path)[1].strip() for path in paths]


def test_info_is_whole_where_no_terminal_shows_it(smalti):
    out = smalti("info", "digits")[1]
    rows = json.loads(smalti("info", "digits", "--json")[1])
    assert "…" not in out and all(value in out for value in rows.values())
    assert len(rows["weights"]) == len("sha256 ") + 64


def test_as_a_process(tiny: Path, tmp_path):
    """What a shell sees: exit codes, streams, and that drawing a picture loads no library it does not need."""
    script = (
        "import sys; from smalti.cli.app import run; code = run(sys.argv[1:]); "
        "heavy = {'matplotlib', 'sklearn', 'pyarrow', 'pandas', 'tensorboard'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    command = ["generate", CAPTION, "-o", str(tmp_path / "a.png"), "--bundle", str(tiny)]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a.png'}\n", "")
    again = subprocess.run([sys.executable, "-m", "smalti", *command], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stdout == "" and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1

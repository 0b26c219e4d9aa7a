"""Which bundle a command uses when none is named, and what it says of that."""

import pytest
from PIL import Image

from smalti.cli.app import run
from smalti.default_bundle import bundle_for_picture, bundle_for_prompt
from smalti.errors import InputError
from smalti.image_files import read_receipt

DIGIT = "dark green eight on bright cyan"


@pytest.mark.parametrize(
    ("prompts", "name", "why"),
    [
        ((DIGIT, ""), "digits", "it knows every word"),
        (("  Dark GREEN eigth on bright cyan",), "digits", "it knows every word"),  # as the bundle itself reads them
        (("dark green",), "digits", "it knows every word"),
        (("drak green eight on bright cyan",), "emoji", "'drak' is no word of digits"),
        ((DIGIT, "red heart"), "emoji", "'heart' is no word of digits"),  # what is steered away from
        (("a red circle left of a blue square",), "scenes", "a scene of shapes"),
        (("three small orange rings on a dotted gray background", ""), "scenes", "a scene of shapes"),
        (("a red circle", "a dog"), "emoji", "'a' is no word of digits"),
        (("a dog " * 10_000,), "emoji", "'a' is no word of digits"),
        (("x" * 1000,), "emoji", f"'{'x' * 20} … {'x' * 10}' is no word of digits"),
        (("<|endofimage|>",), "emoji", "'<|endofimage|>' is no word of digits"),
        (("", ""), "emoji", "an empty prompt"),
        (("  \n",), "emoji", "an empty prompt"),
    ],
)
def test_the_words_of_a_prompt_decide(prompts, name: str, why: str):
    assert bundle_for_prompt(*prompts) == (name, why)


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(InputError, match="not valid Unicode"):
        bundle_for_prompt("caf\udce9")


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((28, 28), "digits"),
        ((280, 280), "digits"),
        ((64, 64), "emoji"),
        ((256, 256), "emoji"),
        ((448, 448), "digits"),  # a multiple of both
        ((128, 64), "digits"),  # of neither: the usual bundle says what it expects
        ((30, 30), "digits"),
    ],
)
def test_the_size_of_a_picture_decides(tmp_path, size, name: str):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert bundle_for_picture(tmp_path / "a.png").name == name


def test_what_is_no_picture_is_left_to_who_reads_it(tmp_path):
    (tmp_path / "a.png").write_bytes(b"none")
    assert bundle_for_picture(tmp_path / "a.png").name == bundle_for_picture(tmp_path / "b.png").name == "digits"


def test_the_commands_choose_and_say_so_in_one_line(tmp_path, capsys):
    heart, eight = tmp_path / "heart.png", tmp_path / "eight.png"
    assert run(["generate", "red heart", "-o", str(heart)]) == 0
    said = capsys.readouterr().err
    assert said == "drawn by the bundle emoji ('heart' is no word of digits); --bundle chooses another\n"
    assert run(["generate", DIGIT, "-o", str(eight)]) == 0
    assert capsys.readouterr().err == "drawn by the bundle digits (it knows every word); --bundle chooses another\n"
    assert [read_receipt(path)["bundle"] for path in (heart, eight)] == ["emoji", "digits"]
    assert run(["generate", "red heart", "-o", str(tmp_path / "no.png"), "--bundle", "digits"]) == 2
    assert "'heart'" in capsys.readouterr().err and not (tmp_path / "no.png").exists()
    assert run(["caption", str(heart)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "read by the bundle emoji (the picture is 256×256); --bundle chooses another\n"
    assert len(captured.out.splitlines()) == 1
    assert run(["score", str(heart), "red heart", "dark green eight", "--json"]) == 0
    assert "read by the bundle emoji" in capsys.readouterr().err
    assert run(["caption", str(eight)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and len(captured.out.split()) == 6
    assert run(["complete", "--picture", str(heart), "--rows", "7", "-o", str(tmp_path / "new.png")]) == 0
    assert read_receipt(tmp_path / "new.png")["bundle"] == "emoji"

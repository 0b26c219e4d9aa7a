"""README.md says what runs: its Python, its commands, and in every command of the documentation only known options."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from smalti.cli import app as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TYPED = re.compile(r"^    \$ (smalti .*(?:\n {8}.*)*)$", re.MULTILINE)
INLINE = re.compile(r"`(smalti [^`]+)`")
SHORT_FOR = {"train": "recipe", "evaluate": "bundle"}
"""`smalti train demo` is `smalti train recipe demo`."""


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(page.read_text()) if kind == language]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `smalti` of each line that calls it, without its comment."""
    waiting = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines(keepends=True):
        waiting += line
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        waiting = ""
        if words[:1] == ["smalti"]:
            yield words[1:]


def shown(page: Path) -> Iterator[list[str]]:
    """Every command line of a page: in blocks of code, and in running text, where it may be broken over lines."""
    text = page.read_text()
    for _, body in FENCED.findall(text):
        yield from command_lines(body)
    yield from command_lines("\n".join(TYPED.findall(text)))
    for command in INLINE.findall(FENCED.sub("", text)):
        yield from command_lines(" ".join(command.split()))


def unknown_words(words: list[str]) -> list[str]:
    """The words of a command line that are neither commands nor options, beside those that stand for a user's own."""
    command, rest = typer.main.get_command(cli.app), [word.strip("[]") for word in words]
    while rest and hasattr(command, "commands"):
        names = [name for name in rest[0].split("|") if name in command.commands]
        if names:
            command, rest = command.commands[names[0]], rest[1:]
        elif command.name in SHORT_FOR:
            command = command.commands[SHORT_FOR[command.name]]
        else:
            return rest[:1]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in rest if word.startswith("-") and word not in known]


def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks(ROOT / "README.md", "python")
    exec(compile(lines, "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eight.png", "two.png"]
    captions, _ = capsys.readouterr().out.split("\n", 1)
    assert captions == "['dark green eight on bright cyan', 'plain red two on light gray']"


def test_the_command_lines_run(tmp_path, monkeypatch, capsys):
    """In their order, in an empty folder, with nothing but what ships."""
    monkeypatch.chdir(tmp_path)
    (commands,) = (found for body in blocks(ROOT / "README.md", "") if (found := list(command_lines(body))))
    assert len(commands) == 7
    for command in commands:
        assert cli.run(command) == 0, capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["astronaut.png", "eight.png", "other.png"]
    said = capsys.readouterr().out
    assert "dark green eight on bright cyan" in said and "drawn again identically" in said


def test_the_commands_of_the_documentation_are_known():
    found = [(page.name, words) for page in PAGES for words in shown(page)]
    assert len(found) > 40
    assert [(page, words, wrong) for page, words in found if (wrong := unknown_words(words))] == []
    assert unknown_words(["generate", "a", "-o", "b", "--frob"]) == ["--frob"] and unknown_words(["frob"]) == ["frob"]


def test_the_map_names_every_module_and_no_other():
    """A module stands in the map by its name, or its folder does, beside which its files are named as in the folder."""
    source, named = ROOT / "src" / "smalti", set[Path]()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| .* \|$", text.partition("## The map")[2].partition("## ")[0], re.MULTILINE):
        names = re.findall(r"`([\w./]+(?:/|\.py|\.cpp|\.h))`", row)
        folders = [source]
        for name in names:
            found = next((folder / name for folder in reversed(folders) if (folder / name).exists()), None)
            assert found, f"{name} is in the map, but not in {source.name}"
            named.add(found)
            folders += [found] if found.is_dir() else []
    modules = {path for path in source.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != "_")}
    missing = {path.name for path in modules - named} - {"__init__.py"}
    assert not missing, f"{missing} are not in the map"

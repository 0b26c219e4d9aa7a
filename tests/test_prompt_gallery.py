"""Galleries of prompts: each drawn as alone, a killed run ends as one that never stopped, nothing is changed unsaid."""

import json
import os
import re
import signal
from html.parser import HTMLParser

import pytest
from tiny_bundle import tiny_bpe_pipeline, tiny_pipeline

from smalti.cli import app as cli
from smalti.errors import InputError
from smalti.evaluate import prompt_gallery as module
from smalti.evaluate.prompt_gallery import GalleryConfig, PromptRow, chosen_prompts, draw_gallery, read_prompts
from smalti.image_files import read_receipt

PROMPTS = [
    ("a purple dog", "Animals", "Basic", ""),
    ("two cats & <b>", "Animals", "Quantity", "counts"),
    ("a dog and two red cats on a tree on a red tree on a red tree", "Arts", "Basic", ""),
    ("a tree", "Arts", "Basic", ""),
]


@pytest.fixture
def table(tmp_path):
    lines = ["Prompt\tCategory\tChallenge\tNote", *("\t".join(row) for row in PROMPTS)]
    path = tmp_path / "prompts.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


class Parsed(HTMLParser):
    """What a page refers to, and whether its tags are closed in their order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.sources, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_prompts_are_read_from_tables_and_lines(table, tmp_path):
    assert read_prompts(table)[1] == PromptRow(2, *PROMPTS[1])
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog\na cat\n")
    assert read_prompts(lines) == [PromptRow(1, "a dog", "–", "–", ""), PromptRow(2, "a cat", "–", "–", "")]
    found = chosen_prompts(read_prompts(table), category="Arts", challenge="Basic", num=1)
    assert [row.number for row in found] == [3]
    with pytest.raises(InputError, match="no prompt has the category 'Cars'; there are Animals, Arts"):
        chosen_prompts(read_prompts(table), category="Cars", challenge=None, num=None)
    with pytest.raises(InputError, match="category 'Arts' and the challenge 'Quantity'"):
        chosen_prompts(read_prompts(table), category="Arts", challenge="Quantity", num=None)


def test_partiprompts_are_read_as_they_were_counted(shared_dir):
    found = read_prompts(shared_dir / "data" / "text" / "PartiPrompts.tsv")
    assert len(found) == 1632
    assert sum(row.category == "Animals" for row in found) == 314
    assert sum(row.challenge == "Fine-grained Detail" for row in found) == 312


def test_each_prompt_is_drawn_as_alone_and_shown_in_its_place(table, tmp_path):
    pipe, config = tiny_bpe_pipeline(), GalleryConfig(n=2, seed=5, sampling={"temperature": 0.9})
    counts = draw_gallery(pipe, read_prompts(table), tmp_path / "out", config, source=str(table), command="smalti …")
    assert counts == {"prompts": 4, "drawn": 4, "cut": 1, "not drawn": 0}
    for number, (prompt, *_) in enumerate(PROMPTS[:2], 1):
        [first, second] = pipe.generate(prompt, seed=5 + 2 * (number - 1), n=2, temperature=0.9)
        for i, alone in enumerate((first, second), 1):
            receipt = read_receipt(tmp_path / "out" / "pictures" / f"{number:05d}-{i}.png")
            assert receipt["codes"] == read_receipt(alone)["codes"] and receipt["prompt"] == prompt
    text = (tmp_path / "out" / "index.html").read_text()
    page = Parsed(text)
    assert not page.open and not re.search(r"https?://", text)  # opens without a network
    pictures = [source for source in page.sources if source.endswith(".png")]
    assert len(pictures) == 8 and all((tmp_path / "out" / name).is_file() for name in pictures)
    assert {"#c0", "#c1"} <= set(page.sources)
    shown = "".join(page.texts)
    for part in ("Animals (2)", "Quantity (1)", "2. two cats & <b>", "counts", "temperature 0.9"):
        assert part in shown
    assert "the caption was cut to 11 tokens" in shown and "5 (prompt k, picture i: seed + " in shown
    assert pipe.weights_sha256 in shown and "smalti …" in shown
    summary = json.loads((tmp_path / "out" / "gallery.json").read_text())
    assert summary["counts"] == counts and summary["prompts"][2]["cut"]


def test_words_that_a_bundle_does_not_know_are_counted_and_shown(tmp_path):
    prompts = ["dark green eight on bright cyan", "a dark green xylophone on a bright cyan", "dark green eight"]
    rows = [PromptRow(i, prompt, "–", "–", "") for i, prompt in enumerate(prompts, 1)]
    counts = draw_gallery(tiny_pipeline(), rows, tmp_path, GalleryConfig())
    assert counts == {"prompts": 3, "drawn": 1, "cut": 0, "not drawn": 2}
    shown = "".join(Parsed((tmp_path / "index.html").read_text()).texts)
    assert "unknown words: a, xylophone" in shown and prompts[1] in shown
    assert "1 of 3 prompts drawn; 2 were not" in shown and "has 3 words; this bundle's captions have 6" in shown
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["00001-1.png"]


def test_a_killed_run_goes_on_where_it_was(table, tmp_path, monkeypatch):
    pipe, prompts, out = tiny_bpe_pipeline(), read_prompts(table), tmp_path / "out"
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    how = {"source": str(table)}
    draw_gallery(pipe, prompts, tmp_path / "whole", **how)
    if (pid := os.fork()) == 0:
        saved, plain = [], module.save_picture

        def save_and_die(*given, **more):
            plain(*given, **more)
            saved.append(0)
            if len(saved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        module.save_picture = save_and_die
        draw_gallery(pipe, prompts, out, **how)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(list((out / "pictures").iterdir())) == 2 and not (out / "index.html").exists()
    drawn = []
    plain = pipe.generate
    monkeypatch.setattr(pipe, "generate", lambda prompts, **more: drawn.extend(prompts) or plain(prompts, **more))
    draw_gallery(pipe, prompts, out, **how)
    assert drawn == [row.prompt for row in prompts[2:]]
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
    )
    for file in files:
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    with pytest.raises(InputError, match="holds a gallery of another config"):
        draw_gallery(pipe, prompts, out, GalleryConfig(seed=1), **how)
    with pytest.raises(InputError, match="holds a gallery of another bundle"):
        draw_gallery(tiny_pipeline(), prompts, out, **how)
    assert draw_gallery(pipe, prompts, out, GalleryConfig(seed=1), force=True, **how)["drawn"] == 4


def test_a_part_may_be_drawn_first_and_the_rest_later(table, tmp_path, capsys):
    tiny_bpe_pipeline().save(tmp_path / "bundle")
    command = ["gallery", str(table), "-o", str(tmp_path / "out"), "--bundle", str(tmp_path / "bundle")]
    assert cli.run([*command, "--category", "Arts", "--quiet"]) == 0, capsys.readouterr().err
    first = (tmp_path / "out" / "pictures" / "00003-1.png").stat().st_mtime_ns
    assert "2 prompts, 2 drawn, 1 cut, 0 not drawn" in capsys.readouterr().out
    assert cli.run(command) == 0
    assert "drawing: 4 prompts, 2 done before" in capsys.readouterr().err
    assert (tmp_path / "out" / "pictures" / "00003-1.png").stat().st_mtime_ns == first
    assert cli.run([*command, "--upscale", "--force"]) == 2
    assert "has no upsampler" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").exists()  # nothing is lost by a command that is refused

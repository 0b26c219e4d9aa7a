"""The report: everything inside one page, every finding with a function that exists."""

import html
import importlib
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_inspect_grid import as_lines, markov_field
from tiny_bundle import CODEBOOK_SIZE, save_tiny_bundle

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.data.lines import DISTINCT, Lines, table_lines, write_lines
from smalti.data.tokens import TokenTable, token_rows, write_token_table
from smalti.errors import InputError
from smalti.image_tokenizers import load_image_tokenizer
from smalti.inspect import figures, report
from smalti.inspect.findings import InspectConfig
from smalti.inspect.grid import Grid, GridFinding
from smalti.inspect.patches import average_patches
from smalti.inspect.report import inspect_bundle
from smalti.inspect.subject import load_subject
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.recipes.line_presets import line_layout

SMALL = InspectConfig(num_lines=300, num_scored=20, num_pairs=2, num_captions=3)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def check_report(folder, sections):
    text = (folder / "index.html").read_text()
    page = Page(text)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert images and all(source.startswith("data:image/png;base64,iVBOR") for source in images)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().split()
    written = json.loads((folder / "findings.json").read_text())
    assert [section["section"] for section in written] == [section.title for section in sections]
    for section in written:
        assert section["findings"]
        for finding in section["findings"]:
            for name in finding["function"].removeprefix("smalti.inspect.").split(", "):
                module, function = name.split(".")
                assert callable(getattr(importlib.import_module(f"smalti.inspect.{module}"), function))
    return text, [section.title for section in sections]


def test_report_of_a_picture_bundle(tmp_path):
    bundle = save_tiny_bundle(tmp_path / "bundle")
    codes = markov_field(300, 7, 7, CODEBOOK_SIZE).reshape(300, -1)
    rows = token_rows([f"{i}" for i in range(300)], codes, np.ones((300, 6), int))
    write_token_table(tmp_path / "tokens.parquet", [rows], {})
    sections = inspect_bundle(bundle, tmp_path / "tokens.parquet", tmp_path / "report", SMALL)
    text, titles = check_report(tmp_path / "report", sections)
    assert "The lines are pictures of 7 × 7 codes read row by row" in text
    assert titles[-2:] == ["What the caption does", "What the codes look like"]
    assert "With its caption a picture costs" in text and "pictures drawn from captions the nearest of" in text


def test_the_grid_is_kept_for_the_same_lines(lines_and_bundle, tmp_path, monkeypatch):
    subject = load_subject(lines_and_bundle / "bundle", lines_and_bundle / "lines.txt", num_lines=300)
    path = tmp_path / "grid.json"
    found = report.kept_grid(subject, SMALL, path)
    monkeypatch.setattr(report, "infer_grid", lambda *given, **more: pytest.fail("it was looked for again"))
    kept = report.kept_grid(subject, SMALL, path)
    assert (kept.grid, kept.confidence, kept.runner_up) == (found.grid, found.confidence, found.runner_up)
    assert (kept.information == found.information).all()
    monkeypatch.setattr(report, "infer_grid", lambda *given, **more: found)
    for content in ("[]", '{"lines": 3}', "["):
        path.write_text(content)
        assert report.kept_grid(subject, SMALL, path) is found
    other = load_subject(lines_and_bundle / "bundle", lines_and_bundle / "lines.txt", num_lines=200)
    assert report.kept_grid(other, SMALL, path) is found


@pytest.fixture(scope="module")
def lines_and_bundle(tmp_path_factory):
    """Pictures of 5 × 7 codes, read as a snake between one code before and two behind; a model that knows nothing."""
    folder = tmp_path_factory.mktemp("lines")
    codes = as_lines(markov_field(300, 5, 7, 11), "snake", None, 1, 2)
    tags = [f"{i}.png" for i in range(300)]
    write_lines(folder / "lines.txt", [Lines(np_strings(tags), codes.ravel(), np.full(300, 38))])
    layout = line_layout(38, 14)
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, d_model=12, num_heads=2, d_ff=13, max_length=layout.max_length)
    Bundle(model=new_model(layout, config), layout=layout).save(folder / "bundle")
    return folder


def np_strings(tags):
    import pyarrow as pa

    return pa.array(tags, pa.string())


def test_report_of_lines_by_the_command(lines_and_bundle, tmp_path, capsys):
    folder = lines_and_bundle
    arguments = ["inspect", str(folder / "bundle"), "--data", str(folder / "lines.txt"), "-o", str(tmp_path / "report")]
    small = ["--lines", "300", "--scored", "20"]
    assert run([*arguments, *small]) == 0
    printed = capsys.readouterr().out
    assert "pictures of 5 × 7 codes read row by row, every other row backwards" in printed
    assert "positions 0, 36, 37 are outside" in printed
    assert str(tmp_path / "report" / "index.html") in printed
    assert run([*arguments, *small]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["map", "spiral"])
def test_lines_of_any_arrangement_are_explained(order, lines_and_bundle, tmp_path, monkeypatch):
    """Specials, grid, order and three causes by intervention, in words; what cannot be known stands there once."""
    monkeypatch.setattr(figures, "png_bytes", lambda figure: b"\x89PNG")  # drawing figures takes most of the time
    cells = tuple(np.random.default_rng(0).permutation(35).tolist())
    grid = Grid(
        rows=5, columns=7, before=1, after=1, between=(9,), order=order, cell_order=cells if order == "map" else None
    )
    lines = np.full((300, 38), 11)
    lines[:, grid.positions.ravel()] = markov_field(300, 5, 7, 11).reshape(300, -1)
    lines[:, grid.outside] = 11, 12, 13
    write_token_table(tmp_path / "lines.parquet", [token_rows([f"{i}" for i in range(300)], lines)], {})
    found = GridFinding(
        grid=grid, confidence=0.95, column_confidence=0.95, explained=0.6, chance_explained=0.1, runner_up=None,
        runner_up_explained=0.2, line_explained=0.1, agreement=0.97 if order == "map" else None, num_halvings=20,
        information=np.zeros((38, 38)),
    )  # fmt: skip
    monkeypatch.setattr(report, "infer_grid", lambda *given, **more: found)
    heard: list[str] = []
    inspect_bundle(
        lines_and_bundle / "bundle", tmp_path / "lines.parquet", tmp_path / "report", SMALL,
        heard=lambda finding: heard.append(finding.text),
    )  # fmt: skip
    text = html.unescape((tmp_path / "report" / "index.html").read_text())
    reading = {"map": "in an order without a name", "spiral": "from a corner along the border, and so inwards"}[order]
    assert f"pictures of 5 × 7 codes read {reading}" in text and "positions 0, 9, 37 are outside" in text
    assert "Positions that always hold one code: 0 (code 11), 9 (code 12), 37 (code 13)" in text
    assert len(re.findall("mirrored|turned|transposed|mirroring", text)) == 3, "what cannot be known is said once"
    written = json.loads((tmp_path / "report" / "findings.json").read_text())
    told = [
        finding["function"].removeprefix("smalti.inspect.") for section in written for finding in section["findings"]
    ]
    for cause in ("causes.ablation_losses", "causes.patching_map", "causes.influence", "causes.influence_by_offset"):
        assert cause in told
    assert heard == [finding["text"] for section in written for finding in section["findings"]]


def test_report_without_a_grid(lines_and_bundle, tmp_path):
    """The page is whole where there is no grid to draw maps on."""
    codes = np.random.default_rng(0).integers(0, 14, (300, 38))
    write_token_table(tmp_path / "noise.parquet", [token_rows([f"{i}" for i in range(300)], codes)], {})
    sections = inspect_bundle(lines_and_bundle / "bundle", tmp_path / "noise.parquet", tmp_path / "report", SMALL)
    text, titles = check_report(tmp_path / "report", sections)
    assert "No grid is found, of a known order or another" in text and "Confidence that there is none: 95%" in text
    headlines = {finding.function for section in sections for finding in section.findings if finding.headline}
    assert {"causes.ablation_losses", "causes.influence", "codebook.swappable_codes, causes.swap_cost"} <= headlines
    assert "What the codes look like" not in titles


def test_lines_become_pictures_where_the_grid_is_the_tokenizers(lines_and_bundle):
    subject = load_subject(lines_and_bundle / "bundle", lines_and_bundle / "lines.txt", num_lines=10)
    codes = torch.from_numpy(subject.codes)
    everything = load_subject(lines_and_bundle / "bundle", lines_and_bundle / "lines.txt", num_lines=300).codes
    written = np.array([line.split()[1:] for line in (lines_and_bundle / "lines.txt").read_text().splitlines()], int)
    assert sorted(map(tuple, everything)) == sorted(map(tuple, written)) and (everything != written).any()
    grid = Grid(rows=5, columns=7, before=1, after=2, order="snake")
    assert subject.pictures(codes, grid) is None, "there is no image tokenizer"

    class Tokenizer:
        class config:
            grid, codebook_size = (5, 7), 11

    object.__setattr__(subject, "image_tokenizer", Tokenizer())
    pictures = subject.pictures(codes, grid)
    assert pictures is not None and pictures.shape == (10, 5, 7)
    assert torch.equal(pictures[:, 1], codes[:, 8:15].flip(-1))
    assert subject.pictures(codes, None) is None
    assert subject.pictures(codes, Grid(rows=7, columns=5, before=1, after=2)) is None
    assert subject.pictures(codes, Grid(rows=5, columns=7, before=0, after=3)) is None, "a special is no code"
    object.__setattr__(subject, "code_offset", 1)
    assert subject.pictures(codes, grid) is None, "code 0 is below the tokenizer's"
    raised = subject.pictures(codes + 1, grid)
    assert raised is not None and torch.equal(raised, pictures)


def test_codes_are_named_as_in_the_lines_where_they_are_raised(tmp_path, monkeypatch):
    """The tokenizer's code c stands as c + 1 between a start and an end, and a count that looks like a code."""
    blank = io.BytesIO()
    Image.new("L", (1, 1)).save(blank, "PNG")
    monkeypatch.setattr(figures, "png_bytes", lambda figure: blank.getvalue())  # drawing figures takes most of the time
    bundle = save_tiny_bundle(tmp_path / "bundle")
    codes = markov_field(300, 7, 7, CODEBOOK_SIZE).reshape(300, -1)
    write_token_table(tmp_path / "tokens.parquet", [token_rows([f"{i}" for i in range(300)], codes)], {})
    end = CODEBOOK_SIZE + 1
    dressed = table_lines(
        TokenTable.open(tmp_path / "tokens.parquet"), before=[0], after=[end, DISTINCT], code_offset=1
    )
    write_lines(tmp_path / "lines.txt", dressed)
    layout = line_layout(52, end + 1)
    config = TransformerConfig(num_layers=1, d_model=12, num_heads=2, d_ff=13, max_length=layout.max_length)
    Bundle(model=new_model(layout, config), layout=layout).save(tmp_path / "lines")
    image_tokenizer = bundle / "image_tokenizer"
    arguments = {"image_tokenizer": image_tokenizer, "code_offset": 1}
    sections = inspect_bundle(tmp_path / "lines", tmp_path / "lines.txt", tmp_path / "report", SMALL, **arguments)
    text, titles = check_report(tmp_path / "report", sections)
    assert "7 × 7 codes read row by row; positions 0, 50, 51 are outside" in text
    assert "Position 51 tells the number of different codes in the line" in text
    assert titles[-1] == "What the codes look like"
    assert "patches.decoded_lens" in text, "a special code, which has no picture, was guessed in one"
    [flattest] = re.findall(r"The flattest is code (\d+)", text)
    tokenizer: Any = load_image_tokenizer(image_tokenizer)
    average, num_cells = average_patches(tokenizer, torch.from_numpy(codes).view(-1, 7, 7))
    contrast = torch.where(num_cells > 0, average.flatten(1).std(1), torch.inf)
    assert int(flattest) == int(contrast.argmin()) + 1


def test_what_does_not_fit_is_refused(lines_and_bundle, tmp_path, capsys):
    codes = np.zeros((5, 9), int)
    write_token_table(tmp_path / "short.parquet", [token_rows(list("abcde"), codes)], {})
    bundle = str(lines_and_bundle / "bundle")
    assert run(["inspect", bundle, "--data", str(tmp_path / "short.parquet"), "-o", str(tmp_path / "report")]) == 2
    assert "image_tokens has 9 tokens, expected 38" in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_scored is 3; it must be at least 10"):
        InspectConfig(num_scored=3)
    picture_bundle = save_tiny_bundle(tmp_path / "pictures")
    lines = lines_and_bundle / "lines.txt"
    for tokenizer in (picture_bundle, picture_bundle / "image_tokenizer"):
        found = load_subject(lines_and_bundle / "bundle", lines, num_lines=9, image_tokenizer=tokenizer)
        assert found.image_tokenizer.config.codebook_size == CODEBOOK_SIZE
    for content, num in (("", 0), ("one 1 2\n", 1)):
        path = tmp_path / "few.txt"
        path.write_text(content.replace("1 2", " ".join(["1"] * 38)))
        with pytest.raises(InputError, match=rf"few\.txt has {num} lines; at least 2 are needed"):
            load_subject(bundle, path, num_lines=300)
    with pytest.raises(InputError, match="there is no bundle 'nowhere'"):
        load_subject(lines_and_bundle / "bundle", lines, num_lines=9, image_tokenizer="nowhere")
    with pytest.raises(ValueError, match="has an image tokenizer of its own"):
        load_subject(picture_bundle, tmp_path / "x.parquet", num_lines=10, image_tokenizer=tmp_path)

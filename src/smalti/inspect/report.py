"""`smalti inspect`: one page of HTML that needs nothing else, and the same findings as JSON.

The page is a file of text with its pictures inside, without scripts: it can be mailed, and opens without a network.
"""

import base64
import hashlib
import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from smalti.files import new_file, refuse_existing
from smalti.inspect import figures
from smalti.inspect.findings import (
    Finding,
    InspectConfig,
    Section,
    caption_section,
    cause_section,
    code_section,
    picture_section,
    position_section,
    prediction_section,
)
from smalti.inspect.grid import Grid, GridFinding, infer_grid
from smalti.inspect.subject import Subject, load_subject
from smalti.progress import stage

PAGE, FINDINGS, GRID = "index.html", "findings.json", "grid.json"
GRID_VERSION = 3
"""Of how grids are looked for: what another version found is not taken from `grid.json`."""


def inspect_bundle(
    bundle: str | Path,
    data: Path,
    output: Path,
    config: InspectConfig = InspectConfig(),  # noqa: B008 (frozen)
    *,
    image_tokenizer: str | Path | None = None,
    code_offset: int = 0,
    force: bool = False,
    show_progress: bool = False,
    heard: Callable[[Finding], None] = lambda finding: None,
) -> list[Section]:
    """Writes `index.html` and `findings.json` into the folder `output`; returns what is in them.

    Both are written anew after each section, and `heard` is told of each finding, so that the first can be read while
    the last is looked for. The grid is kept in `grid.json`: another report on the same lines takes it from there.
    Raises InputError if they exist and `force` is not set, or bundle and data do not fit together.
    """
    output = Path(output)
    refuse_existing([output / PAGE, output / FINDINGS], force=force)
    with stage("reading lines", show=show_progress):
        subject = load_subject(
            bundle,
            data,
            num_lines=config.num_lines,
            image_tokenizer=image_tokenizer,
            code_offset=code_offset,
            seed=config.seed,
        )
    in_order = "" if subject.order is None else f", in the order “{subject.layout[subject.order]}”"
    about = (
        f"{subject.name}: {subject.bundle.model.num_parameters:,} parameters, looked at on {len(subject.codes):,} "
        f"lines of {subject.codes.shape[1]} codes from {Path(data).name}{in_order}."
    )
    sections = []
    with stage("inspecting", unit="finding", show=show_progress) as progress:

        def told(finding: Finding) -> None:
            heard(finding)
            progress.advance(note=finding.function)

        looked_at = inspect_subject(replace(subject, heard=told), config, kept_in=output / GRID)
        for section in looked_at:
            sections.append(section)
            first = len(sections) == 1
            with new_file(output / PAGE, force=force or not first) as temporary:
                temporary.write_text(page(subject.name, about, sections), encoding="utf-8")
            with new_file(output / FINDINGS, force=force or not first) as temporary:
                text = json.dumps(_as_json(sections), indent=1, ensure_ascii=False)
                temporary.write_text(text + "\n", encoding="utf-8")
    return sections


def inspect_subject(subject: Subject, config: InspectConfig, *, kept_in: Path | None = None) -> Iterator[Section]:
    """All sections as they come, the first being about the positions, whose grid the others use."""
    found = kept_grid(subject, config, kept_in)
    yield position_section(subject, config, found)
    for section in (code_section, prediction_section, cause_section, caption_section, picture_section):
        if (looked_at := section(subject, config, found.grid)) is not None:
            yield looked_at


def kept_grid(subject: Subject, config: InspectConfig, path: Path | None) -> GridFinding:
    """The grid of the lines: as an earlier report on the same lines kept it, else looked for, and kept."""
    key = hashlib.sha256(np.ascontiguousarray(subject.codes, dtype="<i8").tobytes())
    key.update(json.dumps([GRID_VERSION, subject.vocab_size, config.num_halvings, config.seed]).encode())
    if path is not None and path.is_file() and (kept := _read_grid(path, key.hexdigest())) is not None:
        return kept
    found = infer_grid(subject.codes, subject.vocab_size, num_halvings=config.num_halvings, seed=config.seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {**asdict(found), "information": found.information.tolist()}
        with new_file(path, force=True) as temporary:
            temporary.write_text(json.dumps({"lines": key.hexdigest(), "finding": kept}) + "\n", encoding="utf-8")
    return found


def _read_grid(path: Path, key: str) -> GridFinding | None:
    """What is kept, if it is of these lines and whole; a file of anything else is as good as none."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["lines"] != key:
            return None
        given = kept["finding"]
        grids = {name: given[name] and _as_grid(given[name]) for name in ("grid", "runner_up")}
        return GridFinding(**{**given, **grids, "information": np.array(given["information"])})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _as_grid(given: dict[str, Any]) -> Grid:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Grid(**fields)


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The HTML, pictures and style inside."""
    headlines = [finding for section in sections for finding in section.findings if finding.headline]
    parts = [_findings(headlines, "In short")]
    for section in sections:
        shown = "".join(_picture(caption, png) for caption, png in section.drawn(figures.png_bytes))
        parts.append(_findings(section.findings, section.title) + shown)
    body = "\n".join(f"<section>{part}</section>" for part in parts)
    return _PAGE.format(title=html.escape(title), about=html.escape(about), body=body)


def _findings(findings: Sequence, title: str) -> str:
    items = "".join(
        f"<li>{html.escape(finding.text)} <code>{html.escape(finding.function)}</code></li>" for finding in findings
    )
    return f"<h2>{html.escape(title)}</h2><ul>{items}</ul>"


def _picture(caption: str, png: bytes) -> str:
    source = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'


def _as_json(sections: Sequence[Section]) -> list[dict]:
    return [
        {
            "section": section.title,
            "findings": [{"text": f.text, "function": f"smalti.inspect.{f.function}"} for f in section.findings],
        }
        for section in sections
    ]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Inside {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ margin-bottom: 0; }} h2 {{ border-bottom: 1px solid #ccc; margin-top: 2.5rem; }}
li {{ margin: .45rem 0; }} code {{ font-size: .75rem; color: #666; background: #f3f3f3; padding: 0 .3em; }}
figure {{ margin: 1.5rem 0; }} img {{ max-width: 100%; }} figcaption {{ color: #555; font-size: .9rem; }}
</style></head>
<body><h1>Inside {title}</h1><p>{about} Grey names are the functions of <code>smalti.inspect</code> that computed a
finding.</p>
{body}
</body></html>
"""

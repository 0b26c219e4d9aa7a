"""`smalti inspect`: one page of HTML that needs nothing else, and the same findings as JSON.

The page is a file of text with its pictures inside, without scripts: it can be mailed, and opens without a network.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from smalti.files import new_file, refuse_existing
from smalti.inspect import figures
from smalti.inspect.findings import (
    InspectConfig,
    Section,
    cause_section,
    code_section,
    picture_section,
    position_section,
    prediction_section,
)
from smalti.inspect.subject import Subject, load_subject
from smalti.progress import stage

PAGE, FINDINGS = "index.html", "findings.json"


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
) -> list[Section]:
    """Writes `index.html` and `findings.json` into the folder `output`; returns what is in them.

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
    sections = inspect_subject(subject, config, show_progress=show_progress)
    about = (
        f"{subject.name}: {subject.model.num_parameters:,} parameters, looked at on {len(subject.codes):,} lines of "
        f"{subject.codes.shape[1]} codes from {Path(data).name}, in the order “{subject.layout[subject.order]}”."
    )
    with new_file(output / PAGE, force=force) as temporary:
        temporary.write_text(page(subject.name, about, sections), encoding="utf-8")
    with new_file(output / FINDINGS, force=force) as temporary:
        temporary.write_text(json.dumps(_as_json(sections), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return sections


def inspect_subject(subject: Subject, config: InspectConfig, *, show_progress: bool = False) -> list[Section]:
    """All sections, the first being about the positions, whose grid the others use."""
    with stage("inspecting positions", show=show_progress):
        first, found = position_section(subject, config)
    others = {
        "codes": code_section,
        "predictions": prediction_section,
        "causes": cause_section,
        "pictures": picture_section,
    }
    sections: list[Section | None] = [first]
    for name, section in others.items():
        with stage(f"inspecting {name}", show=show_progress):
            sections.append(section(subject, config, found.grid))
    return [section for section in sections if section is not None]


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    """The HTML, pictures and style inside."""
    headlines = [finding for section in sections for finding in section.findings if finding.headline]
    parts = [_findings(headlines, "In short")]
    for section in sections:
        shown = "".join(_picture(caption, figures.png_bytes(figure)) for caption, figure in section.figures)
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

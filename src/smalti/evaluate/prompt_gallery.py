"""A gallery of a list of prompts, PartiPrompts say: one page of HTML by category and challenge, and its picture files.

What is drawn lies in `pictures/`, a file for each picture, which appears whole. A run that was stopped or killed draws
what is missing. `job.json` says which bundle, prompts and settings the pictures are of; others are refused.

A prompt that the bundle cannot read is not drawn: the page shows it with its unknown words, and counts it. None is
changed; one that is longer than the bundle takes is drawn from its beginning, and the page says so.
"""

import hashlib
import html
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from smalti.bundle import smalti_version
from smalti.data.captions import read_captions
from smalti.data.text_tables import SUFFIXES, caption_column, open_text_table
from smalti.documents import read_json
from smalti.errors import InputError, InputWarning
from smalti.files import lock_of, locked, refuse_existing, write_json, write_text
from smalti.image_files import save_picture
from smalti.progress import stage
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import TextTokenizer

PAGE, SUMMARY, JOB, PICTURES = "index.html", "gallery.json", "job.json", "pictures"
NONE = "–"
_AT_ONCE = 16


class PromptRow(NamedTuple):
    """A prompt and what its table says of it, as PartiPrompts does."""

    number: int
    """In its file, from 1; its pictures and seeds go by it."""
    prompt: str
    category: str
    challenge: str
    note: str


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """What is drawn of each prompt. Raises ValueError for a number out of range."""

    n: int = 1
    best_of: int = 1
    seed: int = 0
    """Picture i of prompt k is drawn with the seed `seed` + ((k − 1) · n + i) · best_of."""
    scale: int | None = None
    upscale: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


class Reading(NamedTuple):
    """What a bundle makes of a prompt."""

    unknown: list[str]
    """Words that it does not know."""
    refusal: str | None
    """Why it is not drawn; None: it is."""
    cut: str | None
    """What is left out of it, in words."""


def read_prompts(path: Path | str, column: str | None = None) -> list[PromptRow]:
    """The prompts of a table with the columns Prompt, Category, Challenge and Note, of which all but the first may be
    missing, or the lines of a text file. Raises InputError as `read_captions`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        return [PromptRow(i, prompt, NONE, NONE, "") for i, prompt in enumerate(read_captions(path, column), 1)]
    table = open_text_table(path, wanted=column)
    name = caption_column(table, column)
    lower = {name.lower(): name for name in table.columns}
    names = {known: lower.get(known) for known in ("category", "challenge", "note")}
    found = []
    for number, row in enumerate(table.rows(), 1):
        prompt = row.values.get(name)
        if not isinstance(prompt, str):
            raise InputError(f"{row.where}: {name!r} is {prompt!r}; expected a prompt.")
        about = {known: str(row.values.get(c) or "").strip() if c else "" for known, c in names.items()}
        found.append(PromptRow(number, prompt, about["category"] or NONE, about["challenge"] or NONE, about["note"]))
    if not found:
        raise InputError(f"{path} holds no prompts.")
    return found


def chosen_prompts(
    prompts: Sequence[PromptRow], *, category: str | None, challenge: str | None, num: int | None
) -> list[PromptRow]:
    """Those of a category and a challenge, the first `num` of them. Raises InputError listing what there is."""
    found = list(prompts)
    for what, wanted in (("category", category), ("challenge", challenge)):
        if wanted is not None:
            there = dict.fromkeys(getattr(row, what) for row in prompts)
            found = [row for row in found if getattr(row, what) == wanted]
            if wanted not in there:
                raise InputError(f"no prompt has the {what} {wanted!r}; there are {', '.join(there)}.")
    if not found:
        raise InputError(f"no prompt has the category {category!r} and the challenge {challenge!r}.")
    return found[:num]


def reading_of(pipe: Pipeline | FeaturePipeline, prompt: str) -> Reading:
    """Whether a bundle can draw a prompt as it is."""
    if isinstance(pipe, FeaturePipeline):
        return Reading([], None, None)
    words = pipe.text_tokenizer
    unknown = words.unknown_words(prompt) if isinstance(words, TextTokenizer) else []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", InputWarning)
        try:
            pipe.whole(prompt)
        except InputError as error:
            return Reading(list(dict.fromkeys(unknown)), str(error), None)
    return Reading([], None, str(said[0].message) if said else None)


def draw_gallery(
    pipe: Pipeline | FeaturePipeline,
    prompts: Sequence[PromptRow],
    directory: Path | str,
    config: GalleryConfig = GalleryConfig(),
    *,
    source: str = "",
    command: str = "",
    force: bool = False,
    show_progress: bool = False,
) -> dict[str, int]:
    """Draws what is missing in `directory`, and writes `index.html` and `gallery.json`; returns how many prompts were
    drawn, cut, and not drawn.

    Raises InputError if the folder holds a gallery of another bundle, list of prompts or settings, or another finished
    one, unless `force`, which begins it anew; and for settings that the bundle has no use for.
    """
    directory = Path(directory)
    sampling = pipe.sample_config(pipe.bundle.sampling.picture, config.sampling)
    pipe.check_drawn_size(config.scale, config.upscale)
    candidates = {} if config.best_of == 1 else {"best_of": config.best_of}
    if candidates and isinstance(pipe, FeaturePipeline):
        raise InputError(f"{pipe.name} has no likelihood to choose by; leave best_of out.")
    job = {
        "bundle": pipe.name,
        "weights_sha256": pipe.weights_sha256,
        "upsampler_sha256": pipe.bundle.upsampler_sha256 if config.upscale else None,
        "prompts_sha256": _sha256(prompts_of=source, rows=prompts),
        "config": {**asdict(config), "sampling": json.loads(json.dumps(asdict(sampling)))},
    }
    with locked(lock_of(directory), directory):
        _claim(directory, job, force)
        readings = {row.number: reading_of(pipe, row.prompt) for row in prompts}
        drawable = [row for row in prompts if readings[row.number].refusal is None]
        missing = [row for row in drawable if not all(path.exists() for path in _files(directory, row, config.n))]
        done = len(drawable) - len(missing)
        with stage("drawing", len(drawable), unit="prompt", completed=done, show=show_progress) as progress:
            for start in range(0, len(missing), _AT_ONCE):
                part = missing[start : start + _AT_ONCE]
                _draw(pipe, part, directory, config, candidates)
                progress.advance(len(part))
        counts = {
            "prompts": len(prompts),
            "drawn": len(drawable),
            "cut": sum(reading.cut is not None for reading in readings.values()),
            "not drawn": len(prompts) - len(drawable),
        }
        entries = [
            {**row._asdict(), **reading._asdict(), "pictures": _names_of(directory, row, config.n, reading)}
            for row, reading in ((row, readings[row.number]) for row in prompts)
        ]
        about = {"command": command, "source": source, "smalti_version": smalti_version(), **job, "counts": counts}
        write_json(directory / SUMMARY, {**about, "prompts": entries}, force=True)
        write_text(directory / PAGE, page(about, entries), force=True)
    return counts


def _sha256(*, prompts_of: str, rows: Sequence[PromptRow]) -> str:
    """Of the file of prompts, so that a part of it may be drawn first; of the prompts where there is none."""
    path = Path(prompts_of)
    content = path.read_bytes() if prompts_of and path.is_file() else json.dumps(rows).encode()
    return hashlib.sha256(content).hexdigest()


def _claim(directory: Path, job: dict[str, Any], force: bool) -> None:
    path = directory / JOB
    if force and path.exists():
        for name in (PAGE, SUMMARY, JOB):
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / PICTURES, ignore_errors=True)
    if path.exists():
        found = read_json(path, "give another folder, or --force to begin anew")
        for name, value in json.loads(json.dumps(job)).items():
            if found.get(name) != value:
                raise InputError(
                    f"{directory} holds a gallery of another {name.removesuffix('_sha256')} ({found.get(name)}, not "
                    f"{value}); give another folder, or --force to begin anew."
                )
        return
    refuse_existing([directory / PAGE, directory / SUMMARY], force=force)
    (directory / PICTURES).mkdir(parents=True, exist_ok=True)
    write_json(path, job)


def _files(directory: Path, row: PromptRow, n: int) -> list[Path]:
    return [directory / PICTURES / f"{row.number:05d}-{i}.png" for i in range(1, n + 1)]


def _names_of(directory: Path, row: PromptRow, n: int, reading: Reading) -> list[str]:
    if reading.refusal is not None:
        return []
    return [path.relative_to(directory).as_posix() for path in _files(directory, row, n)]


def _draw(
    pipe: Pipeline | FeaturePipeline,
    part: Sequence[PromptRow],
    directory: Path,
    config: GalleryConfig,
    candidates: dict[str, int],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # the page says which prompts are cut
        drawn = pipe.generate(
            [row.prompt for row in part],
            seed=[config.seed + (row.number - 1) * config.n * config.best_of for row in part],
            n=config.n,
            scale=config.scale,
            upscale=config.upscale,
            **candidates,
            **config.sampling,
        )
    files = [path for row in part for path in _files(directory, row, config.n)]
    for picture, path in zip(drawn, files, strict=True):
        save_picture(picture, path, force=True)


# The page ----------------------------------------------------------------------------------------------------------


def page(about: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """The HTML, its style inside, its pictures in files beside it."""
    categories = list(dict.fromkeys(entry["category"] for entry in entries))
    challenges = list(dict.fromkeys(entry["challenge"] for entry in entries))
    body = [_counts(entries, categories, challenges)] if len(categories) > 1 or len(challenges) > 1 else []
    for i, category in enumerate(categories):
        inside = [entry for entry in entries if entry["category"] == category]
        body.append(f'<h2 id="c{i}">{html.escape(category)} ({len(inside)})</h2>' if len(categories) > 1 else "")
        for challenge in (c for c in challenges if any(entry["challenge"] == c for entry in inside)):
            alike = [entry for entry in inside if entry["challenge"] == challenge]
            body.append(f"<h3>{html.escape(challenge)} ({len(alike)})</h3>" if len(challenges) > 1 else "")
            body.append(f'<div class="row">{"".join(map(_entry, alike))}</div>')
    counts = about["counts"]
    what = f"{counts['drawn']:,} of {counts['prompts']:,} prompts drawn"
    if counts["not drawn"]:
        what += f"; {counts['not drawn']:,} were not, and are shown with the words that the bundle does not know"
    if counts["cut"]:
        what += f"; of {counts['cut']:,} only the beginning was read, as is said below them"
    config = about["config"]
    settings = {
        "bundle": f"{about['bundle']}, weights {about['weights_sha256']}",
        "prompts": about["source"] or NONE,
        "seed": f"{config['seed']} (prompt k, picture i: seed + ((k − 1) · {config['n']} + i) · {config['best_of']})",
        "pictures of a prompt": f"{config['n']}, each the best of {config['best_of']}",
        "sampling": ", ".join(f"{name} {value}" for name, value in config["sampling"].items()),
        "upsampler": about["upsampler_sha256"] or "none",
        "smalti": about["smalti_version"],
        "command": about["command"] or NONE,
    }
    rows = "".join(f"<tr><td>{name}</td><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items())
    title = html.escape(f"{about['bundle']}: {Path(about['source']).name or 'prompts'}")
    return _PAGE.format(title=title, what=html.escape(what), settings=rows, body="\n".join(filter(None, body)))


def _counts(entries: Sequence[dict[str, Any]], categories: Sequence[str], challenges: Sequence[str]) -> str:
    """How many prompts each category has of each challenge, with links."""
    found = Counter((entry["category"], entry["challenge"]) for entry in entries)
    head = "".join(f"<th>{html.escape(challenge)}</th>" for challenge in challenges)
    lines = [f"<tr><th></th>{head}<th>all</th></tr>"]
    for i, category in enumerate(categories):
        cells = [found[category, challenge] for challenge in challenges]
        link = f'<a href="#c{i}">{html.escape(category)}</a>'
        lines.append(f"<tr><td>{link}</td>{''.join(f'<td>{n or NONE}</td>' for n in cells)}<td>{sum(cells)}</td></tr>")
    totals = [sum(found[category, challenge] for category in categories) for challenge in challenges]
    lines.append(f"<tr><td>all</td>{''.join(f'<td>{n}</td>' for n in totals)}<td>{sum(totals)}</td></tr>")
    return f'<div class="wide"><table class="counts">{"".join(lines)}</table></div>'


def _entry(entry: dict[str, Any]) -> str:
    prompt = html.escape(entry["prompt"])
    shown = "".join(f'<img loading="lazy" alt="{prompt}" src="{html.escape(name)}">' for name in entry["pictures"])
    if entry["refusal"] is not None:
        words = ", ".join(entry["unknown"])
        why = f"unknown words: {words}" if words else entry["refusal"]
        shown = f'<div class="none">not drawn<br><small>{html.escape(why)}</small></div>'
    below = f"{entry['number']}. {prompt}"
    below += f'<br><small class="cut">{html.escape(entry["cut"])}</small>' if entry["cut"] else ""
    below += f"<br><small>{html.escape(entry['note'])}</small>" if entry["note"] else ""
    return f"<figure>{shown}<figcaption>{below}</figcaption></figure>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h2 {{ border-bottom: 1px solid #ccc; margin-top: 2.5rem; }} h3 {{ color: #555; }}
table {{ border-collapse: collapse; font-size: .85rem; }} td, th {{ padding: .15rem .5rem; text-align: left;
vertical-align: top; }} .counts td + td, .counts th {{ text-align: right; }} .wide {{ overflow-x: auto; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem; }} figure {{ margin: 0; width: 11rem; }}
img {{ width: 100%; image-rendering: pixelated; }} figcaption, small {{ font-size: .8rem; color: #444; }}
.none {{ background: #f3e7e7; color: #b00020; min-height: 7rem; padding: .5rem; overflow-wrap: anywhere; }}
.cut {{ color: #b00020; }}
</style></head>
<body><h1>{title}</h1><p>{what}. Nothing is picked.</p><table>{settings}</table>
{body}
</body></html>
"""

"""Does a bundle draw what its prompt says? Every picture is read back exactly, without any network that finds objects.

Prompts are drawn by a grammar, pictures of them by the bundle, and each picture is held against its prompt:

    scenes    shapes, colours, sizes, count, relation, background and texture, by `smalti.data.scene_reading`: half of
              the prompts combine what no training scene shows together, of each kind alike
    digits    digit and both colours, by the judge of `smalti.evaluate.digits`

The ceiling is what is read of true pictures of the same prompts, through the bundle's image tokenizer and back. For
each guidance scale the candidates of a prompt are drawn once, with the bundle's other settings. "1 picture" is the
first of them, "best of n" the one among the first n that the bundle ranks highest, or another bundle that has the same
codes. Curves tell both against n as `candidates.py` does, exactly and over all choices of n, beside the share of
prompts of which any of n candidates is right: what a ranking that is never wrong would reach.

Letters: P prompts, c candidates of each.
"""

import base64
import html
import io
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from smalti.data.digits import COLOUR_PAIRS, DIGITS, images_to_levels
from smalti.data.digits import PICTURE_SIZE as DIGITS_SIDE
from smalti.data.scene_reading import CATEGORIES, check, read_picture
from smalti.data.scene_tables import scene_row
from smalti.data.scenes import SIDE as SCENES_SIDE
from smalti.data.scenes import UNSEEN, parse_caption, render
from smalti.errors import InputError
from smalti.evaluate.candidates import accuracy_by_n, any_by_n
from smalti.evaluate.digits import judge_pictures, load_digit_classifier
from smalti.files import new_file, refuse_existing
from smalti.progress import stage
from smalti.tasks.images import RERANKERS, Pipeline
from smalti.weights import weights_sha256

REPORT_FILES = ("prompts.json", "prompts.md", "prompts.html", "prompts.png")
SEEN = "seen"
_AT_ONCE = 256
_SHOWN = 96
"""Pictures on the page, the first of the prompts."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """How much is drawn. Raises ValueError for a number out of range."""

    num: int = 400
    guidance_scales: tuple[float, ...] | None = None
    """None: the bundle's own alone."""
    best_of: tuple[int, ...] = (1, 16)
    """Candidates of which one is kept; 1 is no choice."""
    rerank: str | None = None
    """By which likelihood (`RERANKERS`); None: the bundle's first."""
    temperature: float | None = None
    """None: the bundle's own."""
    seed: int = 0
    """Of the prompts; the candidates of the i-th are drawn with the seeds from `seed` + i · c on."""

    def __post_init__(self) -> None:
        if self.num < 2:
            raise ValueError(f"num is {self.num}; it must be at least 2.")
        if not self.best_of or min(self.best_of) < 1:
            raise ValueError(f"best_of is {self.best_of}; expected numbers of candidates, each at least 1.")
        if self.rerank is not None and self.rerank not in RERANKERS:
            raise ValueError(f"rerank {self.rerank!r} is unknown; choose one of {', '.join(RERANKERS)}.")
        if self.guidance_scales is not None and not self.guidance_scales:
            raise ValueError("guidance_scales is empty; give at least one, or None for the bundle's own.")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0.")


class Prompt(NamedTuple):
    text: str
    group: str
    """"seen", or which kind of combination training never shows."""
    kind: str | None = None
    """What kind of thing is asked for, if there are several."""


Verdict = Mapping[str, bool | None]
"""By category whether it is right; None where the prompt says nothing of it."""


class Subject(Protocol):
    """What prompts are about."""

    name: str
    categories: tuple[str, ...]
    plotted: tuple[str, ...]
    """Categories whose shares are plotted against the number of candidates."""

    def prompts(self, num: int, seed: int) -> list[Prompt]: ...
    def true_images(self, num: int, seed: int) -> Float[torch.Tensor, "B 3 H W"] | None:
        """A true picture of each of the prompts; None where there are none."""
        ...

    def judge(self, images: Float[torch.Tensor, "B 3 H W"], prompts: Sequence[str]) -> list[Verdict]: ...


class ScenesSubject:
    """Scenes of `smalti.data.scenes`."""

    name = "scenes"
    categories: tuple[str, ...] = ("all", "attributes", *CATEGORIES)
    plotted: tuple[str, ...] = ("attributes", "count", "relation")

    def prompts(self, num: int, seed: int) -> list[Prompt]:
        """Seen and unseen in turn."""
        rows = [scene_row("test", index, seed) for index in range(num)]
        return [Prompt(row.caption, row.unseen or SEEN, row.scene.claim.kind) for row in rows]

    def true_images(self, num: int, seed: int) -> Float[torch.Tensor, "B 3 H W"] | None:
        pictures = np.stack([render(scene_row("test", index, seed).scene.content) for index in range(num)])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255

    def judge(self, images: Float[torch.Tensor, "B 3 H W"], prompts: Sequence[str]) -> list[Verdict]:
        pictures = to_pixels(images)
        found = [check(parse_caption(text), read_picture(p)) for text, p in zip(prompts, pictures, strict=True)]
        return [{"all": one.all, "attributes": one.attributes, **asdict(one)} for one in found]


class DigitsSubject:
    """Coloured digits. Which pairs of colours a bundle has seen is not known."""

    name = "digits"
    categories: tuple[str, ...] = ("all", "digit", "foreground", "background")
    plotted: tuple[str, ...] = ("all",)

    def __init__(self) -> None:
        self.classifier = load_digit_classifier()

    def prompts(self, num: int, seed: int) -> list[Prompt]:
        stream = random.Random(f"smalti prompts of digits {seed}")
        texts = []
        for _ in range(num):
            foreground, background = COLOUR_PAIRS[int(stream.random() * len(COLOUR_PAIRS))]
            digit = DIGITS[int(stream.random() * len(DIGITS))]
            texts.append(f"{' '.join(foreground)} {digit} on {' '.join(background)}")
        return [Prompt(text, "any") for text in texts]

    def true_images(self, num: int, seed: int) -> Float[torch.Tensor, "B 3 H W"] | None:
        return None

    def judge(self, images: Float[torch.Tensor, "B 3 H W"], prompts: Sequence[str]) -> list[Verdict]:
        found = judge_pictures(images_to_levels(images), prompts, self.classifier)
        columns = (found.all_ok, found.digit_ok, found.foreground_ok, found.background_ok)
        return [dict(zip(self.categories, map(bool, row), strict=True)) for row in zip(*columns, strict=True)]


def subject_of(pipe: Pipeline) -> Subject:
    """What a bundle's pictures can be checked for. Raises InputError if nothing fits."""
    size = (pipe.pictures.height, pipe.pictures.width)
    if size == (DIGITS_SIDE, DIGITS_SIDE):
        return DigitsSubject()
    if size == (SCENES_SIDE, SCENES_SIDE):
        return ScenesSubject()
    raise InputError(
        f"{pipe.name} draws pictures of {size[1]}×{size[0]}; prompts can be checked on coloured digits of "
        f"{DIGITS_SIDE}×{DIGITS_SIDE} and on scenes of {SCENES_SIDE}×{SCENES_SIDE} (smalti data scenes)."
    )


def to_pixels(images: Float[torch.Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B H W 3"]:
    """Values 0..255 of images in [0, 1]."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


# Rates -------------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """How many of `num` trials were right, with Wilson's interval of 95 % for the share (Wilson 1927)."""

    right: int
    num: int

    @property
    def rate(self) -> float:
        return self.right / self.num

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.num)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def wilson_interval(right: int, num: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The shares of which the observed one is no more than `z` standard errors away, by default 95 %."""
    share, z2 = right / num, z * z
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = z / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    # At the ends the sums are exact in arithmetic, not in floating point.
    return 0.0 if right == 0 else max(0.0, middle - half), 1.0 if right == num else min(1.0, middle + half)


class Row(NamedTuple):
    """The shares of right pictures by category, for one group of prompts and one way of drawing."""

    guidance_scale: float
    best_of: int
    """Of how many one was kept; 0: true pictures, rebuilt by the image tokenizer."""
    group: str
    shares: dict[str, Share]

    @property
    def way(self) -> str:
        if not self.best_of:
            return "true pictures, rebuilt"
        chosen = "1 picture" if self.best_of == 1 else f"best of {self.best_of}"
        return f"{chosen}, guidance {self.guidance_scale:g}"


def rows_of(
    verdicts: Sequence[Verdict], groups: Sequence[str], categories: Sequence[str], guidance_scale: float, best_of: int
) -> list[Row]:
    """A row for what is seen, for all that is not where there are several kinds of it, and for each kind."""
    kinds = list(dict.fromkeys(groups))
    unseen = [kind for kind in UNSEEN if kind in kinds]
    wanted = {kind: [kind] for kind in kinds if kind not in unseen}
    wanted |= {"unseen": unseen} if len(unseen) > 1 else {}
    wanted |= {f"unseen {kind}": [kind] for kind in unseen}
    rows = []
    for name, members in wanted.items():
        chosen = [verdict for verdict, group in zip(verdicts, groups, strict=True) if group in members]
        shares = {}
        for category in categories:
            told = [verdict[category] for verdict in chosen if verdict[category] is not None]
            if told:
                shares[category] = Share(sum(map(bool, told)), len(told))
        rows.append(Row(guidance_scale, best_of, name, shares))
    return rows


class Curve(NamedTuple):
    """The share of right pictures against the number of candidates, n from 1 on; means over prompts."""

    guidance_scale: float
    category: str
    group: str
    num: int
    """Prompts that say something of the category."""
    kept: list[float]
    """The best of n is right."""
    any: list[float]
    """Any of n is."""


def curves_of(
    verdicts: Sequence[Verdict],
    merit: Float[np.ndarray, "P c"],
    groups: Sequence[str],
    categories: Sequence[str],
    guidance_scale: float,
) -> list[Curve]:
    """Of the candidates of every prompt, those of one together; a curve for what is seen and one for what is not."""
    P, c = merit.shape
    found = []
    for category in categories:
        told = np.array([verdicts[i * c][category] is not None for i in range(P)])
        right: Bool[np.ndarray, "P c"] = np.array([bool(verdict[category]) for verdict in verdicts]).reshape(P, c)
        for name in dict.fromkeys("unseen" if group in UNSEEN else group for group in groups):
            members = np.array([("unseen" if group in UNSEEN else group) == name for group in groups]) & told
            if members.any():
                by_n = accuracy_by_n(merit[members], right[members]), any_by_n(right[members])
                kept, any_right = (shares.mean(0).tolist() for shares in by_n)
                found.append(Curve(guidance_scale, category, name, int(members.sum()), kept, any_right))
    return found


# The report --------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A picture on the page."""

    prompt: Prompt
    picture: Image.Image
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class PromptsReport:
    rows: list[Row]
    subject: str
    categories: tuple[str, ...]
    plotted: tuple[str, ...]
    curves: list[Curve]
    rerank: str | None
    """By what the best was chosen."""
    ranker: str | None
    """Which bundle chose, if not the one that drew."""
    temperature: float
    bundle: str
    weights_sha256: str
    config: PromptsConfig
    command: str
    elapsed_s: float
    shown: dict[str, list[Shown]]
    """The first pictures of some ways of drawing."""

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                "guidance_scale": row.guidance_scale,
                "best_of": row.best_of,
                "group": row.group,
                "shares": {
                    name: {"right": s.right, "num": s.num, "rate": s.rate, "interval_95": list(s.interval)}
                    for name, s in row.shares.items()
                },
            }
            for row in self.rows
        ]
        return {
            "bundle": self.bundle,
            "weights_sha256": self.weights_sha256,
            "subject": self.subject,
            "command": self.command,
            "config": asdict(self.config),
            "temperature": self.temperature,
            "rerank": self.rerank,
            "ranker": self.ranker,
            "elapsed_s": self.elapsed_s,
            "rows": rows,
            "curves": [curve._asdict() for curve in self.curves],
        }

    @property
    def _title(self) -> str:
        of = f" of {self.ranker}" if self.ranker else ""
        chosen = f", the best by {RERANKED[self.rerank]}{of}" if self.rerank else ""
        return f"{self.config.num} prompts of {self.subject} drawn by {self.bundle}{chosen}"

    def table(self) -> Table:
        """For the terminal."""
        table = Table("drawn", "prompts", *self.categories, title=self._title)
        for row in self.rows:
            table.add_row(row.way, row.group, *self._cells(row))
        table.caption = "shares of pictures read back as right, with Wilson's intervals of 95 %"
        return table

    def _cells(self, row: Row) -> list[str]:
        return [str(row.shares.get(name, "–")) for name in self.categories]

    def markdown(self) -> str:
        names = ("drawn", "prompts", *self.categories)
        head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
        lines = "\n".join("| " + " | ".join((row.way, row.group, *self._cells(row))) + " |" for row in self.rows)
        return (
            f"# {self._title}\n\nMeasured in {self.elapsed_s:.0f} s by\n\n    {self.command}\n\nwith the weights "
            f"{self.weights_sha256[:16]}, temperature {self.temperature:g}. Shares of pictures that are read back as "
            f"right, with Wilson's intervals of 95 %.\n\n{head}\n{lines}\n{self._candidates()}"
        )

    def _candidates(self) -> str:
        """The curves as a table; nothing where there was no choice."""
        most = max(self.config.best_of)
        if most == 1:
            return ""
        shown = sorted({2**power for power in range(most.bit_length())} | {most})
        lines = [
            f"| {curve.category} | {curve.group} | {curve.guidance_scale:g} | "
            + " | ".join(f"{100 * curve.kept[n - 1]:.1f} / {100 * curve.any[n - 1]:.1f}" for n in shown)
            + " |"
            for curve in self.curves
        ]
        numbers = " | ".join(f"n = {n}" for n in shown)
        head = f"| right | prompts | guidance | {numbers} |\n|---|---|---|{'---|' * len(shown)}"
        return (
            "\nIn %, on the average over all choices of n candidates: the one that is kept is right / any is right.\n\n"
            + "\n".join([head, *lines, ""])
        )

    def plot(self) -> Figure:
        """Shares against the number of candidates; dashed, whether any is right."""
        scales = list(dict.fromkeys(curve.guidance_scale for curve in self.curves))
        figure = Figure(figsize=(3.2 * len(self.plotted) + 0.6, 3 * len(scales) + 0.4), layout="constrained")
        panels = figure.subplots(len(scales), len(self.plotted), squeeze=False, sharey=True)
        for scale, row in zip(scales, panels, strict=True):
            for category, axes in zip(self.plotted, row, strict=True):
                for curve in self.curves:
                    if (curve.guidance_scale, curve.category) != (scale, category):
                        continue
                    numbers = range(1, len(curve.kept) + 1)
                    [line] = axes.plot(numbers, curve.kept, marker=".", label=curve.group)
                    axes.plot(numbers, curve.any, linestyle="--", color=line.get_color())
                axes.set(xscale="log", title=category if len(scales) == 1 else f"{category}, guidance {scale:g}")
                ticks = [2**power for power in range(max(self.config.best_of).bit_length())]
                axes.set_xticks(ticks, list(map(str, ticks)))
                axes.minorticks_off()
                axes.grid(alpha=0.3)
                axes.set_xlabel("candidates, n")
            row[0].set_ylabel("share right (dashed: any of n)")
        panels[0, 0].legend(title="prompts")
        return figure

    def figures(self) -> dict[str, str]:
        """What a bundle's card holds."""
        found = {}
        for row in self.rows:
            if row.group in (SEEN, "unseen", "any"):
                what = ", ".join(f"{name} {share}" for name, share in row.shares.items())
                found[f"prompts, {row.group}: {row.way}"] = what
        return found

    def page(self) -> str:
        """An HTML page of pictures, complete in one file."""
        sections = [_section(way, shown) for way, shown in self.shown.items()]
        rows = "".join(
            f"<tr><td>{html.escape(row.way)}</td><td>{html.escape(row.group)}</td>"
            + "".join(f"<td>{cell}</td>" for cell in self._cells(row))
            + "</tr>"
            for row in self.rows
        )
        head = "".join(f"<th>{name}</th>" for name in ("drawn", "prompts", *self.categories))
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f"<style>{_STYLE}</style><h1>{html.escape(self._title)}</h1>"
            f"<p>Weights {self.weights_sha256[:16]}, temperature {self.temperature:g}. "
            f"<code>{html.escape(self.command)}</code></p>"
            f"<table><tr>{head}</tr>{rows}</table>{''.join(sections)}</html>\n"
        )

    def write(self, directory: Path | str, *, force: bool = False) -> None:
        """Writes REPORT_FILES. Raises InputError if one exists, unless `force`."""
        *paths, picture = (Path(directory) / name for name in REPORT_FILES)
        refuse_existing([*paths, picture], force=force)
        texts = (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", self.markdown(), self.page())
        for path, text in zip(paths, texts, strict=True):
            with new_file(path, force=force) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with new_file(picture, force=force) as temporary:
            self.plot().savefig(temporary, format="png", dpi=80)


RERANKED = {
    "picture": "p(picture | caption)",
    "caption": "p(caption | picture)",
    "both": "p(picture | caption) · p(caption | picture)",
    "pmi": "mutual information",
    "contrastive": "cosine by the dual encoder",
    "clip": "cosine by CLIP",
}
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse;font-size:12px}"
    "td,th{border:1px solid #ccc;padding:2px 6px;text-align:left}"
    ".pictures{display:flex;flex-wrap:wrap;gap:12px}figure{width:140px;margin:0;font-size:12px}"
    "img{width:140px;image-rendering:pixelated;border:3px solid #2a7a2a}.wrong img{border-color:#b00020}"
    "b{color:#b00020;font-weight:normal}i{color:#666}"
)


def _section(way: str, shown: Sequence[Shown]) -> str:
    figures = []
    for prompt, picture, verdict in shown:
        wrong = [name for name, right in verdict.items() if right is False and name not in ("all", "attributes")]
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        kind = "" if prompt.group in (SEEN, "any") else f"<br><i>unseen {html.escape(prompt.group)}</i>"
        fault = f"<br><b>{', '.join(wrong)}</b>" if wrong else ""
        figures.append(
            f'<figure class="{"wrong" if wrong else "right"}"><img alt="" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(prompt.text)}{kind}{fault}</figcaption></figure>"
        )
    return f'<h2>{html.escape(way)}</h2><div class="pictures">{"".join(figures)}</div>'


# The whole evaluation ----------------------------------------------------------------------------------------------


def evaluate_prompts(
    pipe: Pipeline,
    config: PromptsConfig = PromptsConfig(),
    *,
    subject: Subject | None = None,
    ranker: Pipeline | None = None,
    command: str = "",
    show_progress: bool = True,
) -> PromptsReport:
    """Draws prompts in several ways and reads the pictures back. `subject` is by default what the bundle's size says.
    `ranker` chooses among the candidates in place of the bundle that draws them.

    Raises InputError for a bundle whose pictures cannot be read, or whose vocabulary lacks a word of the prompts, and
    for a ranker with another image tokenizer.
    """
    started_at = time.perf_counter()
    subject = subject or subject_of(pipe)
    prompts = subject.prompts(config.num, config.seed)
    base = pipe.sampling.picture
    if config.temperature is not None:
        base = replace(base, temperature=config.temperature)
    scales = (base.guidance_scale,) if config.guidance_scales is None else config.guidance_scales
    most = max(config.best_of)
    rerank = None
    if most == 1 and (ranker or config.rerank):
        raise InputError(
            f"best_of is {config.best_of}: there is one picture to choose from; give 2 or more candidates as well, or "
            "neither rerank nor a ranker."
        )
    judge = _same_codes(pipe, ranker) if ranker else pipe
    if most > 1:
        rerank = config.rerank or judge.rerankers[0]
        judge.check_drawing(1, most, rerank)
    rows: list[Row] = []
    curves: list[Curve] = []
    shown: dict[str, list[Shown]] = {}
    groups = [prompt.group for prompt in prompts]
    kinds = [prompt.kind for prompt in prompts if prompt.kind is not None]
    if (true := subject.true_images(config.num, config.seed)) is not None:
        with stage("rebuilding true pictures", show=show_progress):
            rebuilt = pipe.decode_images(pipe.encode_images(true, batch_size=_AT_ONCE), batch_size=_AT_ONCE)
            found = subject.judge(rebuilt, [prompt.text for prompt in prompts])
        rows += rows_of(found, groups, subject.categories, 1.0, 0)
    total = len(scales) * len(prompts)
    with stage("drawing prompts", total, unit="prompt", show=show_progress) as progress:
        for scale in scales:
            sampling = replace(base, guidance_scale=scale)
            verdicts: dict[int, list[Verdict]] = {n: [] for n in config.best_of}
            candidates: list[Verdict] = []
            merits: list[Float[np.ndarray, "P c"]] = []
            for start in range(0, len(prompts), at_once := max(1, _AT_ONCE // most)):
                chosen = prompts[start : start + at_once]
                texts = [prompt.text for prompt in chosen]
                drawn = _draw(pipe, judge, subject, texts, sampling, config.seed + start * most, most, rerank)
                candidates += drawn.verdicts
                merits.append(drawn.merit)
                for n in config.best_of:
                    kept = drawn.best(n)
                    found = [drawn.verdicts[i] for i in kept]
                    verdicts[n] += found
                    way = Row(scale, n, "", {}).way
                    room = _SHOWN - len(shown.setdefault(way, []))
                    shown[way] += [
                        Shown(prompt, Image.fromarray(drawn.pixels[i]), verdict)
                        for prompt, i, verdict in list(zip(chosen, kept, found, strict=True))[:room]
                    ]
                progress.advance(len(chosen))
            for n, found in verdicts.items():
                rows += rows_of(found, groups, subject.categories, scale, n)
                if kinds:
                    rows += rows_of(found, kinds, subject.categories, scale, n)
            curves += curves_of(candidates, np.concatenate(merits), groups, subject.categories, scale)
    return PromptsReport(
        rows=rows,
        subject=subject.name,
        categories=subject.categories,
        plotted=subject.plotted,
        curves=curves,
        rerank=rerank,
        ranker=judge.name if ranker and rerank else None,
        temperature=base.temperature,
        bundle=pipe.name,
        weights_sha256=pipe.weights_sha256,
        config=config,
        command=command,
        elapsed_s=round(time.perf_counter() - started_at, 1),
        shown=shown,
    )


class _Drawn(NamedTuple):
    """The candidates of some prompts, those of one together."""

    pixels: UInt8[np.ndarray, "B H W 3"]
    verdicts: list[Verdict]
    merit: Float[np.ndarray, "P c"]

    def best(self, n: int) -> list[int]:
        """Which candidate of each prompt is the best of the first `n`."""
        _, c = self.merit.shape
        return [i * c + int(best) for i, best in enumerate(self.merit[:, :n].argmax(1))]


def _same_codes(pipe: Pipeline, ranker: Pipeline) -> Pipeline:
    """The ranker. Raises InputError if its codes are of another image tokenizer."""
    if weights_sha256(pipe.image_tokenizer) != weights_sha256(ranker.image_tokenizer):
        raise InputError(
            f"{ranker.name} has another image tokenizer than {pipe.name}, so it cannot rank its codes; give a bundle "
            "with the same."
        )
    return ranker


def _draw(
    pipe: Pipeline,
    judge: Pipeline,
    subject: Subject,
    texts: list[str],
    sampling: Any,
    seed: int,
    most: int,
    rerank: str | None,
) -> _Drawn:
    repeated = [text for text in texts for _ in range(most)]
    seeds = [seed + i * most for i in range(len(texts))]
    codes = pipe.generate_codes(texts, seed=seeds, n=most, batch_size=_AT_ONCE, **vars(sampling))
    images = pipe.decode_images(codes, batch_size=_AT_ONCE)
    merit = np.zeros((len(texts), most))
    if rerank is not None:
        words = [torch.tensor(judge.text_tokenizer.encode(text)) for text in repeated]
        merit = judge.merit(codes, words, rerank, batch_size=_AT_ONCE).view(-1, most).double().numpy()
    return _Drawn(to_pixels(images), subject.judge(images, repeated), merit)

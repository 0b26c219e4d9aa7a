"""Does a bundle draw what it has never seen together? Held-out compositions of a figure and a skin tone.

A drawn picture counts as the true picture that is nearest to it among *all* of a collection, those it was trained on
included, by Euclidean distance in two spaces:

    pixels    red, green and blue in [0, 1] of all pixels, at the bundle's size
    encoder   the latents of the bundle's own image tokenizer, what its quantizer is given; of unit length in every cell
              if the quantizer compares directions alone

Top-k is right if fewer than k true pictures are nearer than the one that was asked for; the figure, or the skin tone,
if the nearest picture has it. The reconstruction of the true picture is the ceiling: nothing that is drawn through the
tokenizer can be expected to come nearer.

Letters: N true pictures, n held-out ones of them, D features.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from smalti.data import arrow_types
from smalti.data.pairs import PairTable
from smalti.data.parquet_files import ParquetReader
from smalti.data.tokenize_pairs import fit
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.evaluate.digits import Rate, binomial_rate
from smalti.files import new_file, refuse_existing
from smalti.progress import stage, track
from smalti.tasks.images import Pipeline
from smalti.tasks.sample_table import wrapped

REPORT_FILES = ("compositions.json", "compositions.md", "compositions.png")
PIXELS, ENCODER = "pixels", "encoder"
CEILING = "the true picture through the image tokenizer"
_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class CompositionsConfig:
    """How much is drawn. Raises ValueError for a number out of range."""

    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0)
    best_of: int = 16
    """Candidates at temperature 1, of which the bundle's own likelihoods keep one; 1: no reranking."""
    num: int | None = None
    """Held-out compositions drawn; None: all."""
    seed: int = 0
    """The i-th composition is drawn with the seed `seed` + i, its candidates from `seed` + i · best_of on."""

    def __post_init__(self) -> None:
        if self.best_of < 1:
            raise ValueError(f"best_of is {self.best_of}; it must be at least 1.")
        if self.num is not None and self.num < 1:
            raise ValueError(f"num is {self.num}; it must be at least 1.")


class Collection(NamedTuple):
    """True pictures and what they show."""

    pictures: UInt8[np.ndarray, "N H W 3"]
    captions: list[str]
    figures: list[str]
    tones: list[tuple[str, ...]]
    """The skin tones of each, from left to right; () for one that has none."""


class Scores(NamedTuple):
    """What is right about n pictures, in one space."""

    top_1: Bool[np.ndarray, " n"]
    top_5: Bool[np.ndarray, " n"]
    figure: Bool[np.ndarray, " n"]
    tone: Bool[np.ndarray, " n"]

    def rates(self) -> dict[str, Rate]:
        return {name: binomial_rate(right) for name, right in zip(self._fields, self, strict=True)}


class Row(NamedTuple):
    strategy: str
    space: str
    rates: dict[str, Rate]


@dataclass(frozen=True, kw_only=True)
class CompositionsReport:
    rows: list[Row]
    captions: dict[str, Rate] | None
    """How often the caption of a true picture is right: in all words, in its figure, in its skin tone. None from a
    bundle that writes no captions."""
    num: int
    num_true: int
    bundle: str
    weights_sha256: str
    config: CompositionsConfig
    command: str
    elapsed_s: float
    grid: Figure
    """The first compositions: true, rebuilt, and drawn in some of the ways."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "weights_sha256": self.weights_sha256,
            "command": self.command,
            "config": asdict(self.config),
            "num": self.num,
            "num_true": self.num_true,
            "elapsed_s": self.elapsed_s,
            "rows": [row._asdict() for row in self.rows],
            "captions": self.captions,
        }

    @property
    def _title(self) -> str:
        return f"{self.num} held-out compositions of {self.bundle}, nearest among {self.num_true:,} true pictures"

    def table(self) -> Table:
        """For the terminal."""
        table = Table("drawn", "space", *_COLUMNS.values(), title=self._title)
        for row in self.rows:
            table.add_row(row.strategy, row.space, *(_percent(row.rates[name]) for name in _COLUMNS))
        if self.captions:
            table.caption = f"captions of the true pictures: {self._caption_line()}"
        return table

    def markdown(self) -> str:
        lines = [
            f"| {row.strategy.replace('|', chr(92) + '|')} | {row.space} | "
            + " | ".join(_percent(row.rates[name]) for name in _COLUMNS)
            + " |"
            for row in self.rows
        ]
        captions = f"\nCaptions of the true pictures, greedy: {self._caption_line()}.\n" if self.captions else ""
        return (
            f"# {self._title}\n\nMeasured in {self.elapsed_s:.0f} s by\n\n    {self.command}\n\nwith the weights "
            f"{self.weights_sha256[:16]}. ± is one standard error. Near is near in pixels, or in the latents of the "
            "image tokenizer's encoder.\n\n"
            f"| drawn | space | {' | '.join(_COLUMNS.values())} |\n|---|---|---|---|---|---|\n"
            + "\n".join(lines)
            + "\n"
            + captions
        )

    def _caption_line(self) -> str:
        assert self.captions is not None
        return ", ".join(f"{name} {_percent(rate)}" for name, rate in self.captions.items())

    def figures(self) -> dict[str, str]:
        """What a bundle's card holds: the ceiling, and every way of drawing at the guidance that is best for it."""
        found = {}
        for row in best_of_each_kind(self.rows):
            what = ", ".join(f"{title} {_percent(row.rates[name])}" for name, title in _COLUMNS.items())
            found[f"held-out compositions, {row.space}: {row.strategy}"] = what
        if self.captions:
            found["held-out compositions: captions of true pictures"] = self._caption_line()
        return found

    def write(self, directory: Path | str, *, force: bool = False) -> None:
        """Writes REPORT_FILES. Raises InputError if one exists, unless `force`."""
        paths = [Path(directory) / name for name in REPORT_FILES]
        refuse_existing(paths, force=force)
        texts = (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", self.markdown())
        for path, text in zip(paths[:2], texts, strict=True):
            with new_file(path, force=force) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with new_file(paths[2], force=force) as temporary:
            self.grid.savefig(temporary, format="png", dpi=100)


def best_of_each_kind(rows: Sequence[Row]) -> list[Row]:
    """Of every way of drawing, in each space, the guidance scale with the best top-1; the first of several."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        kind = row.strategy.partition(", guidance")[0], row.space
        if kind not in best or row.rates["top_1"]["rate"] > best[kind].rates["top_1"]["rate"]:
            best[kind] = row
    return list(best.values())


_COLUMNS = {"top_1": "top-1", "top_5": "top-5", "figure": "figure", "tone": "skin tone"}


def _percent(rate: Rate) -> str:
    return f"{rate['rate']:.1%} ± {rate['standard_error']:.1%}"


# Data --------------------------------------------------------------------------------------------------------------


def read_collection(paths: Sequence[Path | str], size: tuple[int, int]) -> Collection:
    """The pictures of parquet tables with the columns `image`, `caption`, `base` (the figure) and `skin_tones` (a
    list), one table after the other, cropped and resized to `size` (rows, columns) as for tokenizing.

    Raises InputError naming the table and the column, or the row, that is not as expected.
    """
    pictures, captions, figures, tones = [], [], [], []
    for path in paths:
        for pair in PairTable(path):
            pictures.append(fit(pair.picture, size))
            captions.append(pair.caption)
        columns = _read_columns(path)
        figures += columns["base"]
        tones += [tuple(found or ()) for found in columns["skin_tones"]]
    if not pictures:
        raise InputError(f"{', '.join(map(str, paths))}: no rows; name tables that hold some.")
    return Collection(np.stack(pictures), captions, figures, tones)


def _read_columns(path: Path | str) -> dict[str, list]:
    reader = ParquetReader(path)
    reader.require_columns(["base", "skin_tones"], "Compositions are told by base, the figure, and skin_tones, a list.")
    arrow_types.require_text(reader.schema.field("base").type, path, "base")
    kind = reader.schema.field("skin_tones").type
    if not arrow_types.is_texts(kind):
        raise InputError(f"{path}: column 'skin_tones' holds {kind}, expected lists of names.")
    tones = [names for batch in reader.batches(["skin_tones"]) for names in arrow_types.captions(batch["skin_tones"])]
    figures = [name for batch in reader.batches(["base"]) for name in arrow_types.strings(batch["base"])]
    return {"base": figures, "skin_tones": [[name for name in names if name is not None] for names in tones]}


# Nearest neighbours ------------------------------------------------------------------------------------------------


def features(pipe: Pipeline, images: Float[Tensor, "N 3 H W"], space: str) -> Float[Tensor, "N D"]:
    """What distances are taken of (see above). Raises InputError if the image tokenizer gives no latents."""
    if space == PIXELS:
        return images.flatten(1)
    encode = getattr(pipe.image_tokenizer, "encode_latents", None)
    if encode is None:
        raise InputError(f"the image tokenizer of {pipe.name} has no latents to compare in the space {space!r}.")
    with torch.inference_mode():
        latents = torch.cat([encode(i.to(pipe.bundle.device)).cpu() for i in images.split(_AT_ONCE)])
    if getattr(pipe.image_tokenizer.config.quantizer, "l2_normalised", False):
        latents = F.normalize(latents, dim=-1)
    return latents.flatten(1)


def score_nearest(
    ours: Float[Tensor, "n D"], true: Float[Tensor, "N D"], wanted: Int[Tensor, " n"], collection: Collection
) -> Scores:
    """What is right about the pictures with features `ours` that should be the true pictures number `wanted`.

    True pictures at one distance stand for each other: pictures that are the same bear several captions.
    """
    distances = torch.cdist(ours.double(), true.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearer = (distances < distances.gather(1, wanted[:, None])).sum(1).numpy()
    nearest = (distances <= distances.amin(1, keepdim=True)).numpy()
    figure, tone = np.zeros((2, len(ours)), dtype=bool)
    for i, target in enumerate(wanted.tolist()):
        found = np.flatnonzero(nearest[i])
        figure[i] = any(collection.figures[j] == collection.figures[target] for j in found)
        tone[i] = any(collection.tones[j] == collection.tones[target] for j in found)
    return Scores(nearer < 1, nearer < 5, figure, tone)


# The whole evaluation ----------------------------------------------------------------------------------------------


def evaluate_compositions(
    pipe: Pipeline,
    test: Path | str,
    train: Path | str,
    config: CompositionsConfig = CompositionsConfig(),
    *,
    num_shown: int = 12,
    command: str = "",
    show_progress: bool = True,
) -> CompositionsReport:
    """Draws the captions of the table `test` in several ways, and looks for each picture among those of both tables.

    The ways: greedy, sampled, and the best of `best_of` samples by each likelihood the bundle has, at every guidance
    scale. Raises InputError as `read_collection` does.
    """
    started_at = time.perf_counter()
    size = (pipe.pictures.height, pipe.pictures.width)
    with stage("reading pictures", show=show_progress):
        collection = read_collection([test, train], size)
    num_test = len(PairTable(test))
    wanted = torch.arange(num_test if config.num is None else min(config.num, num_test))
    images = torch.from_numpy(collection.pictures).permute(0, 3, 1, 2).float() / 255
    spaces = [PIXELS, ENCODER] if hasattr(pipe.image_tokenizer, "encode_latents") else [PIXELS]
    with stage("encoding true pictures", show=show_progress):
        true = {space: features(pipe, images, space) for space in spaces}
        codes = pipe.encode_images(images[: len(wanted)], batch_size=_AT_ONCE)
    drawn: dict[str, Int[Tensor, "n h w"]] = {CEILING: codes}
    prompts = collection.captions[: len(wanted)]
    num_drawn = len(wanted) * len(config.guidance_scales)
    with stage("drawing compositions", num_drawn, unit="caption", show=show_progress) as progress:
        for scale in config.guidance_scales:
            drawn |= _draw(pipe, prompts, scale, config, progress.advance)
    rows, pictures = [], {}
    for strategy, found in track(drawn.items(), "comparing pictures", unit="way", show=show_progress):
        pictures[strategy] = pipe.decode_images(found, batch_size=_AT_ONCE).clamp(0, 1)
        for space in spaces:
            ours = features(pipe, pictures[strategy], space)
            rows.append(Row(strategy, space, score_nearest(ours, true[space], wanted, collection).rates()))
    captions = None
    if "caption" in pipe.rerankers:
        with stage("captioning true pictures", show=show_progress):
            captions = _caption_rates(pipe, codes, collection)
    shown = _shown(rows, images[: len(wanted)], pictures, num_shown)
    return CompositionsReport(
        rows=rows,
        captions=captions,
        num=len(wanted),
        num_true=len(images),
        bundle=pipe.name,
        weights_sha256=pipe.weights_sha256,
        config=config,
        command=command,
        elapsed_s=round(time.perf_counter() - started_at, 1),
        grid=_grid(shown, prompts[:num_shown]),
    )


def _draw(
    pipe: Pipeline, prompts: list[str], scale: float, config: CompositionsConfig, advance: Callable[[int], None]
) -> dict[str, Int[Tensor, "n h w"]]:
    """Codes of every prompt, by the name of the way they were drawn."""
    sampled = SampleConfig(guidance_scale=scale)
    greedy = replace(sampled, temperature=0.0)
    name = f"guidance {scale:g}"
    kept: dict[str, list[Tensor]] = {}
    at_once = max(1, _AT_ONCE // config.best_of)
    for start in range(0, len(prompts), at_once):
        chosen = prompts[start : start + at_once]
        seeds = [config.seed + start + i for i in range(len(chosen))]
        found = {
            f"greedy, {name}": pipe.generate_codes(chosen, seed=seeds, **vars(greedy)),
            f"sampled, {name}": pipe.generate_codes(chosen, seed=seeds, **vars(sampled)),
        }
        if config.best_of > 1:
            first = [config.seed + (start + i) * config.best_of for i in range(len(chosen))]
            candidates = pipe.generate_codes(chosen, seed=first, n=config.best_of, batch_size=_AT_ONCE, **vars(sampled))
            for rerank, best in _rerank(pipe, candidates, chosen, config.best_of).items():
                found[f"best of {config.best_of} by {_RERANKED[rerank]}, {name}"] = candidates[best]
        for strategy, codes in found.items():
            kept.setdefault(strategy, []).append(codes)
        advance(len(chosen))
    return {strategy: torch.cat(codes) for strategy, codes in kept.items()}


_RERANKED = {
    "picture": "p(picture | caption)",
    "caption": "p(caption | picture)",
    "pmi": "mutual information",
}


def _rerank(
    pipe: Pipeline, candidates: Int[Tensor, "c h w"], prompts: list[str], best_of: int
) -> dict[str, Int[Tensor, " n"]]:
    """Which candidate of each prompt is the best, by each likelihood of the bundle."""
    words = [torch.tensor(pipe.text_tokenizer.encode(prompt)) for prompt in prompts for _ in range(best_of)]
    scores = pipe.score_codes(candidates, words, batch_size=_AT_ONCE)
    first = torch.arange(len(prompts)) * best_of
    return {
        rerank: first + scores.merit(rerank).view(-1, best_of).argmax(1)
        for rerank in _RERANKED
        if rerank in pipe.rerankers
    }


def _caption_rates(pipe: Pipeline, codes: Int[Tensor, "n h w"], collection: Collection) -> dict[str, Rate]:
    said = pipe.caption_codes(codes, batch_size=_AT_ONCE)
    wanted = collection.captions[: len(said)]
    pairs = [(_parts(ours), _parts(theirs)) for ours, theirs in zip(said, wanted, strict=True)]
    return {
        "exact": binomial_rate(np.array([ours == theirs for ours, theirs in zip(said, wanted, strict=True)])),
        "figure": binomial_rate(np.array([ours[0] == theirs[0] for ours, theirs in pairs])),
        "skin tone": binomial_rate(np.array([ours[1] == theirs[1] for ours, theirs in pairs])),
    }


def _parts(caption: str) -> tuple[str, str]:
    """A caption's figure and what it says behind the last comma, the skin tone."""
    figure, _, tone = caption.rpartition(", ")
    return (figure, tone) if figure else (tone, "")


# The grid of pictures ----------------------------------------------------------------------------------------------


def _shown(
    rows: list[Row], images: Float[Tensor, "n 3 H W"], pictures: Mapping[str, Float[Tensor, "n 3 H W"]], num: int
) -> dict[str, Float[Tensor, "_ 3 H W"]]:
    """The first `num` of: true, rebuilt, and of each kind of drawing the guidance scale that is best in top-1."""
    shown = {"true": images[:num], "rebuilt": pictures[CEILING][:num]}
    best = [row for row in best_of_each_kind(rows) if row.space == rows[-1].space and row.strategy != CEILING]
    return shown | {row.strategy: pictures[row.strategy][:num] for row in best}


def _grid(shown: Mapping[str, Float[Tensor, "_ 3 H W"]], captions: Sequence[str]) -> Figure:
    """One column for each caption, which stands above it, and one row for each way."""
    figure = Figure(figsize=(1.05 * len(captions) + 1.5, 1.05 * len(shown) + 0.8))
    width, height = figure.get_size_inches()
    cells = figure.subplots(len(shown), len(captions), squeeze=False)
    figure.subplots_adjust(
        left=1.45 / width, right=1 - 0.05 / width, top=1 - 0.75 / height, bottom=0.05 / height, wspace=0.05, hspace=0.05
    )
    for (name, images), row in zip(shown.items(), cells, strict=True):
        for image, axes in zip(images, row, strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(wrapped(name, 22), rotation=0, ha="right", va="center", fontsize=7)
    for caption, axes in zip(captions, cells[0], strict=True):
        axes.set_title(wrapped(caption, 17), fontsize=6)
    return figure

"""How well a bundle that reads features of captions goes by them: what codes of held-out pictures cost given their
caption, given another picture's and given none, and pictures beside what they should show, against guidance.

Letters: N pictures, h w of codes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from smalti.bounds import MAX_PICTURES
from smalti.data.featured_pairs import FeaturedPairs
from smalti.evaluate.digits import binomial_rate
from smalti.files import new_file, refuse_existing, write_text
from smalti.progress import stage
from smalti.tasks.codes import Codes
from smalti.tasks.features import FeaturePipeline
from smalti.tasks.sample_table import wrapped

REPORT_FILES = ("report.json", "report.md", "captions.png")
OWN, OTHER, NONE = "given its caption", "given another picture's caption", "under the null condition"


@dataclass(frozen=True, kw_only=True)
class CaptionsReportConfig:
    """What is measured of a bundle of captions. Raises ValueError for a number out of range."""

    num_pictures: int = 256
    """Held-out pictures whose codes are scored at most."""
    num_shown: int = 6
    """Of them, those whose captions are drawn."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0, 7.5)
    """Columns of the figure."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.num_pictures <= MAX_PICTURES:
            raise ValueError(f"num_pictures is {self.num_pictures}; expected 2 to {MAX_PICTURES}.")
        if not 1 <= self.num_shown <= self.num_pictures or self.seed < 0 or not self.guidance_scales:
            raise ValueError(
                f"num_shown is {self.num_shown}, seed {self.seed} and guidance_scales {self.guidance_scales}; expected "
                f"1 to {self.num_pictures}, at least 0, and at least one."
            )


class CaptionNats(NamedTuple):
    """What held-out pictures cost."""

    num_pictures: int
    nats_per_code: dict[str, tuple[float, float]]
    """By condition, with standard errors."""
    prefers_own: tuple[float, float]
    """Share of pictures that their own caption makes likelier than another picture's, with its standard error."""

    def rows(self) -> dict[str, str]:
        """In words."""
        found = {f"held-out nats per code, {name}": f"{m:.4f} ± {e:.4f}" for name, (m, e) in self.nats_per_code.items()}
        rate, error = self.prefers_own
        found["pictures likelier given their own caption than another's"] = f"{rate:.1%} ± {error:.1%}"
        return found


def caption_nats(pipe: FeaturePipeline, held_out: FeaturedPairs, config: CaptionsReportConfig) -> CaptionNats:
    """Of the first held-out pictures; another picture's caption is that of the next with a different one."""
    rows = np.arange(min(len(held_out), config.num_pictures))
    codes, captions, features = _codes(pipe, held_out, rows), held_out.captions(rows), held_out.features(rows)
    others = [_next_other(captions, number) for number in range(len(rows))]
    given = {
        OWN: features,
        OTHER: [features[other] for other in others],
        NONE: [held_out.null_features[-len(one) :] for one in features],
    }
    nats = {name: pipe.nats(codes, one) / codes[0].numel() for name, one in given.items()}
    own_wins = (nats[OWN] < nats[OTHER])[[other != number for number, other in enumerate(others)]]
    rate = binomial_rate(own_wins.numpy()) if len(own_wins) else {"rate": math.nan, "standard_error": math.nan}
    return CaptionNats(
        num_pictures=len(rows),
        nats_per_code={name: _mean(values) for name, values in nats.items()},
        prefers_own=(rate["rate"], rate["standard_error"]),
    )


def _codes(pipe: FeaturePipeline, held_out: FeaturedPairs, rows: np.ndarray) -> Codes:
    return torch.from_numpy(held_out.batch(rows).image_tokens).view(-1, *pipe.grid)


def _next_other(captions: Sequence[str], number: int) -> int:
    """The next row with another caption; the row itself if there is none."""
    later = ((number + step) % len(captions) for step in range(1, len(captions)))
    return next((other for other in later if captions[other] != captions[number]), number)


def _mean(values: Float[Tensor, " N"]) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class CaptionsReport:
    command: str
    stages: Mapping[str, CaptionNats]
    """By the size of the pictures."""
    figure: Figure
    """A row for each held-out caption."""

    def figures(self) -> dict[str, str]:
        """What the model card says: of the last stage."""
        return list(self.stages.values())[-1].rows()

    def write(self, folder: Path, *, force: bool = False) -> None:
        """Writes REPORT_FILES. Raises InputError if one exists, unless `force`."""
        refuse_existing([folder / name for name in REPORT_FILES], force=force)
        stages = {name: found._asdict() for name, found in self.stages.items()}
        content = json.dumps({"command": self.command, "stages": stages}, indent=2, ensure_ascii=False)
        write_text(folder / "report.json", content + "\n", force=force)
        write_text(folder / "report.md", self.text(), force=force)
        with new_file(folder / "captions.png", force=force) as temporary:
            self.figure.savefig(temporary, format="png", dpi=110)

    def text(self) -> str:
        parts = [f"`{self.command}`\n"]
        for name, found in self.stages.items():
            rows = [f"| {what} | {value} |" for what, value in found.rows().items()]
            parts += [f"{name}, {found.num_pictures} held-out pictures:\n", "| | |\n|---|---|", *rows, ""]
        parts.append("![Held-out captions, drawn with several guidance scales](captions.png)\n")
        return "\n".join(parts)


def evaluate_captions(
    pipe: FeaturePipeline,
    held_out: FeaturedPairs,
    config: CaptionsReportConfig,
    earlier: Mapping[str, CaptionNats],
    *,
    command: str = "",
    show_progress: bool = True,
) -> CaptionsReport:
    """The report of the last stage; `earlier` are those before."""
    with stage("measuring likelihood", show=show_progress):
        found = caption_nats(pipe, held_out, config)
    with stage("drawing held-out captions", show=show_progress):
        figure = _figure(pipe, held_out, config)
    size = f"{pipe.pictures.width}×{pipe.pictures.height} pixels"
    return CaptionsReport(command=command, stages={**earlier, size: found}, figure=figure)


def _figure(pipe: FeaturePipeline, held_out: FeaturedPairs, config: CaptionsReportConfig) -> Figure:
    """A row for each caption: the picture as the image tokenizer gives it back, and drawn with each scale."""
    rows = np.arange(min(len(held_out), config.num_shown))
    texts = held_out.table.texts(held_out.rows[rows])
    columns: dict[str, list[Image.Image]] = {"rebuilt": pipe.decode(_codes(pipe, held_out, rows), scale=1)}
    for scale in config.guidance_scales:
        settings: dict[str, Any] = {**asdict(pipe.sampling.picture), "guidance_scale": scale}
        seeds = range(config.seed, config.seed + len(rows))
        codes = pipe.generate_codes(texts, seed=list(seeds), **settings)
        columns[f"guidance {scale:g}"] = pipe.decode(codes, scale=1)
    figure = Figure(figsize=(1.5 * len(columns) + 1.6, 1.5 * len(rows) + 0.4), layout="constrained")
    cells = figure.subplots(len(rows), len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        cells[0][column].set_title(name, fontsize=8)
        for row, picture in enumerate(pictures):
            axes = cells[row][column]
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
    for row, text in enumerate(texts):
        label = wrapped(text or "(no caption)", 22)
        cells[row][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=6)
    return figure

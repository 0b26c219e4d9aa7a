"""What a training draws on its way: the same prompts with the same seeds every so many steps, in one table.

samples/00002000-1.png   the picture of the first prompt after 2,000 steps
samples/table.png        all of them, one row for each iteration, one column for each prompt
samples/table.md         the same as a table in Markdown, which shows the files
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure
from PIL import Image

from smalti.files import new_file
from smalti.image_files import read_picture, save_picture
from smalti.models.base import evaluating
from smalti.models.families import AnyModel

TABLE_PNG, TABLE_MD = "table.png", "table.md"


@dataclass(frozen=True, kw_only=True)
class SampleTableConfig:
    """Which prompts are drawn, and how often. Raises ValueError for a number out of range."""

    prompts: tuple[str, ...] = ()
    """The i-th, counted from 0, is drawn with the seed `seed` + i. Without any, nothing is drawn."""
    every: int = 1000
    """Updates of the weights from one row of the table to the next."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1.")


class Drawing(Protocol):
    """What draws pictures of captions."""

    def generate(
        self, prompts: Sequence[str], *, seed: Sequence[int], scale: int | None = None
    ) -> list[Image.Image]: ...


class SampleTable:
    """Draws the prompts' pictures with a model as it is, and keeps the table of all so far in `directory`.

    `make_pipeline` gives the face of the bundle that a model is part of. Called again for a step whose pictures are
    there, as when a training is resumed, it draws nothing.
    """

    def __init__(self, directory: Path, config: SampleTableConfig, make_pipeline: Callable[[AnyModel], "Drawing"]):
        self.directory, self.config, self._make_pipeline = directory, config, make_pipeline

    def __call__(self, model: AnyModel, step: int) -> None:
        paths = [self._path(step, column) for column in range(len(self.config.prompts))]
        if all(path.exists() for path in paths):
            return
        with evaluating(model):
            seeds = [self.config.seed + column for column in range(len(paths))]
            pictures = self._make_pipeline(model).generate(self.config.prompts, seed=seeds, scale=1)
        for picture, path in zip(pictures, paths, strict=True):
            save_picture(picture, path, force=True)
        with new_file(self.directory / TABLE_MD, force=True) as temporary:
            temporary.write_text(self._markdown(), encoding="utf-8")
        with new_file(self.directory / TABLE_PNG, force=True) as temporary:
            self._figure().savefig(temporary, format="png", dpi=100)

    def _path(self, step: int, column: int) -> Path:
        return self.directory / f"{step:08d}-{column + 1}.png"

    @property
    def steps(self) -> list[int]:
        """The iterations whose pictures are all there, ascending."""
        names = [re.fullmatch(r"(\d{8})-1\.png", path.name) for path in self.directory.glob("*-1.png")]
        steps = sorted(int(name[1]) for name in names if name)
        return [s for s in steps if all(self._path(s, column).exists() for column in range(len(self.config.prompts)))]

    def _markdown(self) -> str:
        prompts = [prompt.replace("|", "\\|") or "(no caption)" for prompt in self.config.prompts]
        lines = [f"| iteration | {' | '.join(prompts)} |", "|---" * (len(prompts) + 1) + "|"]
        for step in self.steps:
            cells = [f"![]({self._path(step, column).name})" for column in range(len(prompts))]
            lines.append(f"| {step} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _figure(self) -> Figure:
        steps, prompts = self.steps, self.config.prompts
        figure = Figure(figsize=(1.3 * len(prompts) + 0.8, 1.3 * len(steps) + 0.9))
        cells = figure.subplots(len(steps), len(prompts), squeeze=False)
        inches = figure.get_size_inches()
        figure.subplots_adjust(
            left=0.75 / inches[0], right=1 - 0.05 / inches[0], top=1 - 0.8 / inches[1], bottom=0.05 / inches[1]
        )
        for step, row in zip(steps, cells, strict=True):
            for column, axes in enumerate(row):
                axes.imshow(read_picture(self._path(step, column)), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
            row[0].set_ylabel(f"{step:,}", rotation=0, ha="right", va="center", fontsize=8)
        for prompt, axes in zip(prompts, cells[0], strict=True):
            axes.set_title(wrapped(prompt or "(no caption)", 18), fontsize=7)
        return figure


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, as far as its words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)

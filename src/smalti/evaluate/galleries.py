"""Figures of nine: pictures of captions, captions of pictures, and pairs from nothing. Nothing in them is picked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image

from smalti.data.digits import LEVEL_STEP
from smalti.files import new_file, refuse_existing
from smalti.tasks.images import Pipeline

GALLERIES = ("text_conditioned.png", "image_conditioned.png", "unconditional.png")
SIDE = 3
_RED = "#b00020"


def draw_galleries(
    pipe: Pipeline,
    pictures: UInt8[np.ndarray, "N 28 28 3"],
    captions: Sequence[str],
    directory: Path | str,
    *,
    seed: int = 0,
    force: bool = False,
) -> list[Path]:
    """Writes three 3×3 figures into `directory`: the first nine captions drawn, the first nine pictures (levels 0..3)
    captioned, nine pairs from nothing. Drawn with the bundle's own settings and the seeds from `seed` on.

    Raises InputError if one of the files exists, unless `force`.
    """
    paths = [Path(directory) / name for name in GALLERIES]
    refuse_existing(paths, force=force)
    n = SIDE * SIDE
    shown = [Image.fromarray(picture * np.uint8(LEVEL_STEP)) for picture in pictures[:n]]
    said = list(captions[:n])
    drawn = pipe.generate(said, seed=range(seed, seed + len(said)), scale=1)
    predicted = pipe.caption(shown, seed=seed)
    pairs = pipe.pairs(n, seed, scale=1)
    figures = (
        gallery("Pictures drawn for the captions below them", drawn, said),
        gallery("Captions written for the pictures above them", shown, predicted, truths=said),
        gallery(
            "Pictures and captions, both drawn from nothing", [p.picture for p in pairs], [p.caption for p in pairs]
        ),
    )
    for path, figure in zip(paths, figures, strict=True):
        with new_file(path, force=force) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    return paths


def gallery(
    title: str, pictures: Sequence[Image.Image], captions: Sequence[str], *, truths: Sequence[str] | None = None
) -> Figure:
    """Up to nine pictures with captions under them. With `truths`, a caption that differs is red, with
    the truth under it."""
    figure = Figure(figsize=(7.5, 9.0))
    figure.suptitle(title, fontsize=13)
    figure.subplots_adjust(left=0.03, right=0.97, top=0.93, bottom=0.08, hspace=0.34, wspace=0.1)
    for i, axes in enumerate(figure.subplots(SIDE, SIDE).flat):
        axes.set_axis_off()
        if i >= len(pictures):
            continue
        axes.imshow(pictures[i], interpolation="nearest")
        wrong = truths is not None and truths[i] != captions[i]
        below = {"transform": axes.transAxes, "ha": "center", "va": "top"}
        axes.text(0.5, -0.03, _two_lines(captions[i]), fontsize=10, color=_RED if wrong else "black", **below)
        if truths and wrong:
            axes.text(0.5, -0.2, f"(it is: {truths[i]})", fontsize=7, color="0.35", **below)
    return figure


def _two_lines(caption: str) -> str:
    """A caption broken near its middle, so that it is not wider than its picture."""
    words = caption.split()
    half = (len(words) + 1) // 2
    return f"{' '.join(words[:half])}\n{' '.join(words[half:])}"

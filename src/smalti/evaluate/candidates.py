"""How much better the best of n candidates is, against n: for every way of ranking that a bundle has.

Of each prompt N candidates are drawn once. The best of n is right as often as it is on the average over all choices of
n of them, which is told exactly and not drawn: of candidates in falling merit, number i (from 0) is the best of n with
the probability C(N − 1 − i, n − 1) / C(N, n). "any" is the ceiling: a ranker that always knows which is right.

Letters: P prompts, N candidates of each, D features.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch import Tensor

from smalti.data.pairs import PairTable
from smalti.data.tokenize_pairs import fit
from smalti.errors import InputError
from smalti.evaluate.compositions import ENCODER, features
from smalti.files import new_file, refuse_existing, write_json
from smalti.image_files import to_images
from smalti.progress import track
from smalti.tasks.images import Pipeline

REPORT_FILES = ("candidates.json", "candidates.md", "candidates.png")
ANY = "any"

Judge = Callable[[Sequence[Image.Image], str], Bool[np.ndarray, " N"]]
"""Which of the pictures that were drawn of a prompt are right."""


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig:
    """How much is drawn. Raises ValueError for a number out of range."""

    num_prompts: int | None = None
    """The first of the table; None: all."""
    num_candidates: int = 16
    guidance_scale: float | None = None
    """None: the bundle's own."""
    seed: int = 0
    """Candidate k of prompt i is drawn with the seed `seed` + i · num_candidates + k."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")


def accuracy_by_n(merit: Float[np.ndarray, "P N"], right: Bool[np.ndarray, "P N"]) -> Float[np.ndarray, "P N"]:
    """For each prompt, how often the best of n is right, n from 1 to N. Candidates of one merit share its place."""
    N = merit.shape[1]
    order = np.argsort(-merit, axis=1, kind="stable")
    ranked, sorted_merit = np.take_along_axis(right.astype(float), order, 1), np.take_along_axis(merit, order, 1)
    for row, values in zip(ranked, sorted_merit, strict=True):
        for start in np.flatnonzero(np.r_[True, values[1:] != values[:-1]]):
            tied = values == values[start]
            row[tied] = row[tied].mean()
    chances = [[math.comb(N - 1 - i, n - 1) / math.comb(N, n) for n in range(1, N + 1)] for i in range(N)]
    return ranked @ np.array(chances)


def any_by_n(right: Bool[np.ndarray, "P N"]) -> Float[np.ndarray, "P N"]:
    """For each prompt, how often any of n candidates is right, n from 1 to N."""
    return accuracy_by_n(right.astype(float), right)


@dataclass(frozen=True, kw_only=True)
class CandidatesReport:
    """Accuracy against n, with its standard error over prompts, by ranker; "any" among them."""

    accuracy: Mapping[str, list[float]]
    standard_error: Mapping[str, list[float]]
    bundle: str
    weights_sha256: str
    num_prompts: int
    judged: str
    """What right means, in words."""
    config: CandidatesConfig
    command: str = ""

    @classmethod
    def of(
        cls, merits: Mapping[str, Float[np.ndarray, "P N"]], right: Bool[np.ndarray, "P N"], **described: Any
    ) -> "CandidatesReport":
        curves = {name: accuracy_by_n(merit, right) for name, merit in merits.items()} | {ANY: any_by_n(right)}
        P = len(right)
        errors = {
            name: (curve.std(0, ddof=1) / math.sqrt(P) if P > 1 else curve[0] * math.nan).tolist()
            for name, curve in curves.items()
        }
        means = {name: curve.mean(0).tolist() for name, curve in curves.items()}
        return cls(accuracy=means, standard_error=errors, num_prompts=P, **described)

    @property
    def shown(self) -> list[int]:
        """The numbers of candidates in tables: powers of two, and the last."""
        N = len(next(iter(self.accuracy.values())))
        return sorted({2**power for power in range(N.bit_length()) if 2**power <= N} | {N})

    def _cell(self, name: str, n: int) -> str:
        mean, error = self.accuracy[name][n - 1], self.standard_error[name][n - 1]
        return f"{100 * mean:.1f} %" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")

    def table(self) -> Table:
        table = Table("kept by", *(f"best of {n}" for n in self.shown), box=None)
        for name in self.accuracy:
            table.add_row(name, *(self._cell(name, n) for n in self.shown))
        return table

    def markdown(self) -> str:
        head = " | ".join(f"best of {n}" for n in self.shown)
        rows = [f"| {name} | {' | '.join(self._cell(name, n) for n in self.shown)} |" for name in self.accuracy]
        return "\n".join(
            [
                f"# Candidates of {self.bundle}\n",
                f"{self.num_prompts} prompts, {self.config.num_candidates} candidates each; right: {self.judged}. "
                f"± is a standard error over prompts. Weights sha256 `{self.weights_sha256}`.\n",
                f"`{self.command}`\n" if self.command else "",
                f"| kept by | {head} |\n|---|{'---|' * len(self.shown)}",
                *rows,
                "",
            ]
        )

    def plot(self) -> Figure:
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for name, means in self.accuracy.items():
            numbers, errors = range(1, len(means) + 1), np.array(self.standard_error[name])
            [line] = axes.plot(numbers, means, label=name, linestyle="--" if name == ANY else "-")
            if not np.isnan(errors).any():
                axes.fill_between(numbers, means - errors, means + errors, alpha=0.15, color=line.get_color())
        axes.set(xlabel="candidates, n", ylabel="share right", ylim=(0, 1.02), xscale="log")
        axes.set_xticks(self.shown, list(map(str, self.shown)))
        axes.minorticks_off()
        axes.legend(title="kept by")
        axes.grid(alpha=0.3)
        return figure

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, directory: Path | str, *, force: bool = False) -> None:
        """Writes REPORT_FILES. Raises InputError if one exists, unless `force`."""
        data, text, picture = (Path(directory) / name for name in REPORT_FILES)
        refuse_existing([data, text, picture], force=force)
        write_json(data, json.loads(json.dumps(self.to_dict()).replace("NaN", "null")), force=force)
        with new_file(text, force=force) as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")
        with new_file(picture, force=force) as temporary:
            self.plot().savefig(temporary, format="png", dpi=100)


def evaluate_candidates(
    pipe: Pipeline,
    prompts: Sequence[str],
    judge: Judge,
    config: CandidatesConfig,
    *,
    judged: str,
    command: str = "",
    show_progress: bool = True,
) -> CandidatesReport:
    """Draws candidates of every prompt, and tells how good the best of n is by each of the bundle's rankers."""
    guidance: dict[str, Any] = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}
    N, merits, right = config.num_candidates, {name: [] for name in pipe.rerankers}, []
    for number, prompt in enumerate(track(prompts, "drawing candidates", unit="prompt", show=show_progress)):
        codes = pipe.generate_codes(prompt, seed=config.seed + number * N, n=N, **guidance)
        words = [pipe.whole(prompt)] * N
        for name, found in merits.items():
            found.append(pipe.merit(codes, words, name).double().numpy())
        right.append(judge(pipe.decode(codes, scale=1), prompt))
    return CandidatesReport.of(
        {name: np.stack(found) for name, found in merits.items()},
        np.stack(right),
        bundle=pipe.name,
        weights_sha256=pipe.weights_sha256,
        judged=judged,
        config=config,
        command=command,
    )


class NearestJudge:
    """A picture is right if the true picture nearest to it, in the latents of the bundle's image tokenizer, is one of
    the prompt's. Raises InputError for an empty table, or an image tokenizer without latents."""

    judged = "the nearest true picture is one of the prompt's"

    def __init__(self, pipe: Pipeline, table: Path):
        self.pipe, size = pipe, (pipe.pictures.height, pipe.pictures.width)
        pairs = list(PairTable(table))
        if not pairs:
            raise InputError(f"{table} holds no rows; give pictures with captions.")
        self.captions = [pair.caption for pair in pairs]
        images = torch.from_numpy(np.stack([fit(pair.picture, size) for pair in pairs])).permute(0, 3, 1, 2)
        self.true: Float[Tensor, "T D"] = features(pipe, images / 255, ENCODER)

    def __call__(self, pictures: Sequence[Image.Image], prompt: str) -> Bool[np.ndarray, " N"]:
        drawn = features(self.pipe, to_images(pictures, self.pipe.pictures), ENCODER)
        nearest = torch.cdist(drawn, self.true).argmin(1).tolist()
        return np.array([self.captions[index] == prompt for index in nearest])

"""Pictures that a model drew beside real ones: every figure that the field reports, with intervals, in one pass.

Features are written to a folder as they are computed, so that memory is bounded whatever the number of pictures, and a
run that was killed resumes. All that the figures depend on goes into a card (`protocol_card.py`).

Letters: N samples, M reference pictures, D features.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smalti.arrays import read_npz
from smalti.data.sample_sets import PICTURES, SampleSet, npz_names, open_samples
from smalti.errors import InputError, InputWarning, first_line
from smalti.evaluate.confidence import (
    Extrapolation,
    Figure,
    extrapolate,
    frechet_figure,
    linear_figure,
    mean_figure,
    resampled_counts,
)
from smalti.evaluate.distances import (
    ClassOdds,
    class_odds,
    frechet_distance,
    inception_score,
    inception_score_of_splits,
    kernel_distance,
    kernel_distance_of_subsets,
    neighbours,
    sliced_wasserstein,
)
from smalti.evaluate.feature_networks import FeatureNetwork
from smalti.evaluate.moments import Gaussian, Moments, Statistics, holds_statistics, statistics_of
from smalti.evaluate.protocols import Protocol, score_splits
from smalti.files import lock_of, locked, write_json
from smalti.progress import stage
from smalti.weights import file_sha256

BATCH_SIZE = 64
BLOCK = 4096
FEATURES = "features"
GIVEN = "given"
"""The name of features that come in a file, of a network that is not known here."""
WIDE = 512
"""Features wider than this have a bootstrap of few replicates unless more are asked for: each takes seconds."""

FIGURES = {
    "frechet": "Fréchet distance",
    "frechet_infinity": "Fréchet distance, extrapolated to pictures without end",
    "frechet_spatial": "spatial Fréchet distance",
    "inception_score": "inception score",
    "inception_score_splits": "inception score, mean of the protocol's splits",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "kid": "kernel distance, cubic, all pairs",
    "kid_subsets": "kernel distance, cubic, mean of the protocol's subsets",
    "cmmd": "kernel distance, Gaussian (CMMD)",
    "mind": "sliced Wasserstein distance (MIND)",
}
"""Figures by the names that they have in a card."""
FALLING = ("frechet", "frechet_infinity", "frechet_spatial", "kid", "kid_subsets", "cmmd", "mind")
"""Of which less is better."""
OF_INCEPTION = {"frechet": "FID", "frechet_infinity": "FID∞", "frechet_spatial": "sFID", "kid": "KID, all pairs",
                "kid_subsets": "KID, mean of the protocol's subsets"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured. Raises ValueError for what cannot be."""

    figures: tuple[str, ...] = tuple(FIGURES)
    num_replicates: int | None = None
    """Of the bootstrap; 0: no intervals; None: 200, or 20 for features wider than WIDE."""
    seed: int = 0
    """Of the bootstrap."""
    most_neighbours: int = 50_000
    """Pictures of each set, the first ones, for figures that compare every picture with every other."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.figures if name not in FIGURES]:
            raise ValueError(f"there is no figure {unknown[0]!r}; choose of {', '.join(FIGURES)}.")
        if self.num_replicates is not None and not 0 <= self.num_replicates <= 10_000:
            raise ValueError(f"num_replicates is {self.num_replicates}; expected 0 to 10,000.")
        if self.seed < 0 or self.most_neighbours < 10:
            raise ValueError(f"seed is {self.seed} and most_neighbours {self.most_neighbours}; expected 0, 10 or more.")

    def replicates_of(self, width: int) -> int:
        return (200 if width <= WIDE else 20) if self.num_replicates is None else self.num_replicates


# Features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Features:
    """Of a set of pictures, in their order; on disk where there are many."""

    pooled: Float[Tensor, "N D"]
    spatial: Float[Tensor, "N _"] | None = None
    logits: Float[Tensor, "N _"] | None = None

    def __len__(self) -> int:
        return len(self.pooled)


def extract(
    samples: SampleSet,
    network: FeatureNetwork,
    folder: Path,
    *,
    batch_size: int = BATCH_SIZE,
    show_progress: bool = True,
) -> Features:
    """The features of all pictures, kept in `folder`; those that an earlier run left there are not computed again.

    Raises InputError naming the picture for features that are not finite.
    """
    wanted = {"pictures": samples.sha256, "num": len(samples), "network": network.sha256, "resizer": network.resizer}
    parts: dict[str, np.ndarray] = {}
    begun = folder / "begun.json"
    done = _done(begun, wanted)
    if done == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    else:
        parts = {file.stem: np.lib.format.open_memmap(file, mode="r+") for file in folder.glob("*.npy")}
    name = f"{network.name} features of {samples.path.name}"
    with stage(name, len(samples), unit="picture", completed=done, show=show_progress) as progress:
        for pictures in samples.batches(batch_size, done):
            found = network(pictures, done, samples.path)
            for part, values in found._asdict().items():
                if values is None:
                    continue
                if part not in parts:
                    shape = (len(samples), values.shape[1])
                    file = folder / f"{part}.npy"
                    parts[part] = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
                parts[part][done : done + len(values)] = values.numpy()
            done += len(pictures)
            # What is in a mapped file outlives the process, and the count is written behind it.
            write_json(begun, wanted | {"done": done}, force=True)
            progress.update(done)
    return Features(**{part: torch.from_numpy(_read_only(folder / f"{part}.npy")) for part in parts})


def _done(begun: Path, wanted: dict[str, Any]) -> int:
    """Of how many pictures an earlier run left the features."""
    try:
        found = json.loads(begun.read_text(encoding="utf-8"))
        done = found.pop("done")
        return done if found == wanted and 0 <= done <= wanted["num"] else 0
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0


def _read_only(file: Path) -> np.ndarray:
    """Mapped, and copied on write, which nobody does: torch takes no memory that it may not write."""
    return np.load(file, mmap_mode="c")


@dataclass(frozen=True, eq=False)
class Measured:
    """One side of a comparison: features, or statistics alone, and what a card says of it."""

    features: Features | None
    pooled: Gaussian
    spatial: Gaussian | None
    about: dict[str, Any]


def measured(
    path: Path,
    network: FeatureNetwork | None,
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    split: str | None = None,
    batch_size: int = BATCH_SIZE,
    show_progress: bool = True,
) -> Measured:
    """A set of pictures, or what a file holds of one: `mu` and `sigma`, with or without pictures as ADM's reference
    files have them; or `features`, of any network. Statistics in a file take precedence over those of its pictures,
    as in ADM's evaluator. Raises InputError for what is none of these, and for features of another network."""
    names = npz_names(path) if path.suffix.lower() == ".npz" and not path.is_dir() else [PICTURES]
    statistics: Statistics | None = None
    about: dict[str, Any] = {"path": str(path)}
    if FEATURES in names or (holds_statistics(names) and PICTURES not in names):
        arrays = read_npz(path, "give pictures (arr_0), statistics (mu, sigma) or features")
        statistics = statistics_of(arrays, path) if holds_statistics(names) else None
        features = _given(arrays[FEATURES], path) if FEATURES in names else None
        if features is not None and network is not None and not (statistics and statistics.note):
            raise InputError(
                f"{path} holds features, and does not say of which network: they are measured by --features given, not "
                f"with the {network.name}."
            )
        _require_same_network(statistics, network, path)
        pooled = statistics.pooled if statistics else _moments(features.pooled).gaussian  # pyright: ignore
        about |= {"sha256": file_sha256(path), "num": pooled.num, "size": None}
        return Measured(features, pooled, statistics.spatial if statistics else None, about)
    if network is None:
        raise InputError(f"{path} holds pictures; say by --features what network is to look at them.")
    if holds_statistics(names):
        statistics = statistics_of(_beside_pictures(path, names), path)
        _require_same_network(statistics, network, path)
    samples = open_samples(path, size=size, split=split)
    if len(samples) < 2:
        raise InputError(f"{path} holds {len(samples)} picture; a distance needs at least 2.")
    features = extract(samples, network, folder, batch_size=batch_size, show_progress=show_progress)
    about |= {"sha256": samples.sha256, "num": len(samples), "size": list(samples.size)}
    if statistics is not None:
        about["num_of_statistics"] = statistics.pooled.num or "not said"
        return Measured(features, statistics.pooled, statistics.spatial, about)
    spatial = None if features.spatial is None else _moments(features.spatial).gaussian
    return Measured(features, _moments(features.pooled).gaussian, spatial, about)


def _beside_pictures(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of a file but its pictures, which may be many."""
    try:
        with np.load(path, allow_pickle=False) as opened:
            return {name: opened[name] for name in names if not name.startswith("arr_")}
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything for a damaged file
        raise InputError(f"{path}: its statistics cannot be read: {first_line(error)}; fetch it again.") from error


def _moments(features: Float[Tensor, "N D"]) -> Moments:
    return Moments.of_batches(features.split(BLOCK))


def _given(values: np.ndarray, path: Path) -> Features:
    if values.ndim != 2 or len(values) < 2 or values.dtype.kind != "f":
        raise InputError(
            f"{path}: features are {values.dtype} of {values.shape}; expected floating-point numbers of (N, D), N at "
            "least 2."
        )
    if not (finite := np.isfinite(values).all(1)).all():
        raise InputError(f"{path}: the features of picture {int(np.flatnonzero(~finite)[0])} hold NaN or infinity.")
    return Features(torch.from_numpy(np.ascontiguousarray(values)))


def _require_same_network(statistics: Statistics | None, network: FeatureNetwork | None, path: Path) -> None:
    if statistics is None or network is None or not statistics.note:
        return
    try:
        noted = json.loads(statistics.note)
    except ValueError:
        return
    for name, now in (("sha256", network.sha256), ("resizer", network.resizer)):
        if noted.get(name, now) != now:
            raise InputError(
                f"{path} holds statistics of the {noted.get('name')} with {name} {noted[name]}, now it is {now}: they "
                "do not compare. Make them again with smalti evaluate statistics."
            )


def note_of(network: FeatureNetwork, **more: Any) -> str:
    """What statistics say of the network that they are of."""
    return json.dumps({"name": network.name, "sha256": network.sha256, "resizer": network.resizer, **more})


@contextmanager
def work_folder(output: Path | None) -> Iterator[Path]:
    """Where features lie: beside the output, to resume with after a kill, until the block ends well; or for a while."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="smalti-") as folder:
            yield Path(folder)
        return
    folder = output.with_name(f".{output.name}.parts")
    with locked(lock_of(folder), output):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder)


# Figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was found, by FIGURES' names, and what is to be said of it."""

    found: dict[str, Figure]
    notes: tuple[str, ...]
    extrapolation: Extrapolation | None
    num_replicates: int


def measure(
    samples: Measured,
    reference: Measured,
    protocol: Protocol,
    config: MeasureConfig = MeasureConfig(),
    *,
    resizer: str = "none",
    show_progress: bool = True,
) -> Figures:
    """All figures that the two sides and `config` allow. Intervals are of what is drawn: the reference stays as it is,
    but for recall and coverage, which are means over reference pictures. `resizer` is the network's. Raises InputError
    for features of two widths, and for pictures of two sizes that are not resized."""
    if samples.pooled.width != reference.pooled.width:
        raise InputError(
            f"the samples' features are {samples.pooled.width} numbers wide, the reference's {reference.pooled.width}: "
            "they are not of one network."
        )
    notes = _warnings(samples, reference, protocol, config, resizer)
    found: dict[str, Figure] = {}
    num_replicates = config.replicates_of(samples.pooled.width)
    job = _Job(samples, reference, protocol, config, num_replicates)
    work: dict[Callable[[], dict[str, Figure]], tuple[str, ...]] = {
        job.frechet: ("frechet", "frechet_infinity"),
        job.frechet_spatial: ("frechet_spatial",),
        job.scores: ("inception_score", "inception_score_splits"),
        job.neighbours: ("precision", "recall", "density", "coverage"),
        job.kid: ("kid",),
        job.kid_subsets: ("kid_subsets",),
        job.cmmd: ("cmmd",),
        job.mind: ("mind",),
    }
    wanted = [one for one, names in work.items() if set(names) & set(config.figures)]
    with stage("figures", len(wanted), unit="step", show=show_progress) as progress:
        num_distances = 0

        def count() -> None:
            nonlocal num_distances
            num_distances += 1
            progress.update(progress.completed, note=f"{num_distances} Fréchet distances")

        job.on_distance = count
        for one in wanted:
            progress.update(progress.completed, note=one.__name__)
            found |= {name: figure for name, figure in one().items() if name in config.figures}
            progress.advance()
    ordered = {name: found[name] for name in FIGURES if name in found}
    return Figures(found=ordered, notes=notes, extrapolation=job.extrapolation, num_replicates=num_replicates)


class _Job:
    """Each figure as far as the two sides have what it needs; nothing, where they have not."""

    def __init__(
        self, samples: Measured, reference: Measured, protocol: Protocol, config: MeasureConfig, num_replicates: int
    ):
        self.ours, self.theirs, self.protocol = samples, reference, protocol
        self.seed, self.num_replicates, self.config = config.seed, num_replicates, config
        self.extrapolation: Extrapolation | None = None
        self.on_distance: Callable[[], None] = lambda: None

    def frechet(self) -> dict[str, Figure]:
        if self.ours.features is None:
            return {"frechet": Figure(value=frechet_distance(self.ours.pooled, self.theirs.pooled))}
        figure, replicates = frechet_figure(
            self.ours.features.pooled, self.theirs.pooled, self.seed, self.num_replicates, self.on_distance
        )
        found = {"frechet": figure}
        if "frechet_infinity" in self.config.figures:
            self.extrapolation = extrapolate(replicates, self.seed)
        if self.extrapolation is not None:
            found["frechet_infinity"] = Figure(
                value=self.extrapolation.value, replicates=self._of_extrapolation(replicates)
            )
        return found

    def _of_extrapolation(self, replicates: Any) -> tuple[float, ...]:
        """Of few features alone: every one takes as many distances as the extrapolation has parts."""
        assert self.ours.features is not None
        if self.ours.pooled.width > 128:
            return ()
        counts = resampled_counts(len(self.ours.features), self.seed, min(self.num_replicates, 50))
        again = (extrapolate(replicates, self.seed, rows=np.repeat(np.arange(len(c)), c)) for c in counts)
        return tuple(one.value for one in again if one is not None)

    def frechet_spatial(self) -> dict[str, Figure]:
        if self.ours.spatial is None or self.theirs.spatial is None:
            return {}
        if self.ours.features is None or self.ours.features.spatial is None:
            return {"frechet_spatial": Figure(value=frechet_distance(self.ours.spatial, self.theirs.spatial))}
        figure, _ = frechet_figure(
            self.ours.features.spatial, self.theirs.spatial, self.seed, self.num_replicates, self.on_distance
        )
        return {"frechet_spatial": figure}

    def scores(self) -> dict[str, Figure]:
        if self.ours.features is None or self.ours.features.logits is None:
            return {}
        parts = [class_odds(part) for part in self.ours.features.logits.split(BLOCK)]
        odds = ClassOdds(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        num = len(odds.probabilities)
        replicates = tuple(
            float(inception_score(odds, torch.from_numpy(counts / num)[None]))
            for counts in resampled_counts(num, self.seed, self.num_replicates)
        )
        found = {"inception_score": Figure(value=float(inception_score(odds)), replicates=replicates)}
        splits = score_splits(self.protocol, num)
        if len(splits) > 1:
            found["inception_score_splits"] = Figure(value=inception_score_of_splits(odds, splits)[0])
        return found

    def neighbours(self) -> dict[str, Figure]:
        sides, protocol = self._pooled(), self.protocol
        if sides is None or min(map(len, sides)) <= protocol.num_neighbours_density:
            return {}
        found = neighbours(*sides, k=protocol.num_neighbours, k_density=protocol.num_neighbours_density)
        over = {"precision": "samples", "recall": "reference", "density": "samples", "coverage": "reference"}
        return {
            name: mean_figure(getattr(found, name), self.seed, self.num_replicates, over=of)
            for name, of in over.items()
        }

    def kid(self) -> dict[str, Figure]:
        return self._kernel("kid", "cubic")

    def cmmd(self) -> dict[str, Figure]:
        return self._kernel("cmmd", "gaussian")

    def _kernel(self, name: str, kernel: str) -> dict[str, Figure]:
        sides = self._pooled()
        if sides is None:
            return {}
        found = kernel_distance(*sides, kernel=kernel)
        return {name: linear_figure(found.value, found.influence, self.seed, self.num_replicates)}

    def kid_subsets(self) -> dict[str, Figure]:
        sides = self._pooled()
        if sides is None or not self.protocol.kid.startswith("100 subsets") or min(map(len, sides)) < 1000:
            return {}
        return {"kid_subsets": Figure(value=kernel_distance_of_subsets(*sides)[0])}

    def mind(self) -> dict[str, Figure]:
        sides = self._pooled()
        if sides is None:
            return {}
        found = sliced_wasserstein(*sides)
        return {"mind": linear_figure(found.value, found.influence, self.seed, self.num_replicates)}

    def _pooled(self) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M D"]] | None:
        """Both sides' features, the first of them where there are too many to compare each with each."""
        if self.ours.features is None or self.theirs.features is None:
            return None
        most = self.config.most_neighbours
        return self.ours.features.pooled[:most], self.theirs.features.pooled[:most]


def _warnings(
    samples: Measured, reference: Measured, protocol: Protocol, config: MeasureConfig, resizer: str
) -> tuple[str, ...]:
    """What a reader must know of the numbers; each is a warning as well."""
    notes = []
    for name, side in (("samples", samples), ("reference", reference)):
        num, width = side.pooled.num, side.pooled.width
        if num is not None and num <= width and "frechet" in config.figures:
            notes.append(
                f"the {num} pictures of the {name} are no more than the {width} features: their covariance is "
                f"singular, and the Fréchet distance far above what more pictures would give; use at least {10 * width}"
            )
    num = samples.pooled.num
    if protocol.num_samples is not None and num != protocol.num_samples:
        notes.append(
            f"published figures of the protocol {protocol.name} are of {protocol.num_samples:,} samples, these of "
            f"{num:,}: a Fréchet distance falls with their number"
        )
    sizes = samples.about.get("size"), reference.about.get("size")
    if sizes[0] is not None and sizes[1] is not None and sizes[0] != sizes[1]:
        ours, theirs = ("×".join(map(str, size)) for size in sizes if size is not None)
        said = f"the samples are of {ours} pixels (rows × columns), the reference of {theirs}"
        mend = "--size brings the reference's files to the samples' size"
        if resizer == "none":
            raise InputError(f"{said}, and these features see pictures as they are: {mend}.")
        notes.append(f"{said}: the distance between them is one of sharpness, too; {mend}")
    for note in notes:
        warnings.warn(f"{note}.", InputWarning, stacklevel=3)
    return tuple(notes)

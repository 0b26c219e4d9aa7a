"""How sure a figure is: intervals by the bootstrap over pictures, the bias of Fréchet distances, tests between two
models.

Replicate r of a bootstrap draws N pictures of N with a generator of (seed, r) alone. So two models whose pictures stand
in the same order, as with the same seeds and classes, get the same pictures in each replicate, and the difference of
their replicates is that of a paired bootstrap, though each was measured by itself.

Letters: N samples, M reference pictures, D features, R replicates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.evaluate.distances import frechet_distance, matrix_root
from smalti.evaluate.moments import Gaussian, Moments

LEVEL = 0.95
SUBSETS = 5
"""The extrapolation looks at the whole, halves, thirds, … of this many parts."""
BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number with what is known of its error. `replicates` are those of the bootstrap, in order."""

    value: float
    replicates: tuple[float, ...] = ()
    over: str = "samples"
    """What was resampled."""

    @property
    def standard_error(self) -> float | None:
        return float(np.std(self.replicates, ddof=1)) if len(self.replicates) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of LEVEL. A replicate of a biased figure is biased once more, so the replicates' quantiles are taken about
        their own mean."""
        if len(self.replicates) < 2:
            return None
        around = np.asarray(self.replicates) - np.mean(self.replicates)
        low, high = np.quantile(around, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return self.value + float(low), self.value + float(high)


def resampled_counts(num: int, seed: int, num_replicates: int) -> Iterator[Int64[np.ndarray, " N"]]:
    """How often each of `num` pictures is drawn, for each replicate."""
    for replicate in range(num_replicates):
        drawn = np.random.default_rng([seed, replicate]).integers(0, num, num)
        yield np.bincount(drawn, minlength=num)


def mean_figure(values: Float[Tensor, " N"], seed: int, num_replicates: int, *, over: str = "samples") -> Figure:
    """The mean of what pictures contribute."""
    numbers = values.double().numpy()
    replicates = [float(c @ numbers) / len(numbers) for c in resampled_counts(len(numbers), seed, num_replicates)]
    return Figure(value=float(numbers.mean()), replicates=tuple(replicates), over=over)


def linear_figure(value: float, influence: Float[Tensor, " N"], seed: int, num_replicates: int) -> Figure:
    """A figure that is moved by each picture as `influence` says."""
    around = mean_figure(influence, seed, num_replicates)
    return Figure(value=value, replicates=tuple(value + moved for moved in around.replicates))


def counted_figure(
    value: float,
    num: int,
    of_counts: Callable[[Int64[np.ndarray, " N"]], float],
    seed: int,
    num_replicates: int,
) -> Figure:
    """Any figure of pictures that are each taken so many times."""
    found = tuple(of_counts(counts) for counts in resampled_counts(num, seed, num_replicates))
    return Figure(value=value, replicates=found)


class FrechetReplicates:
    """Fréchet distances from one reference to many subsets and resamplings of one set of features, which is never
    copied whole. The reference's root is taken once, and the eigenvalues of R S R replace singular values: quicker, and
    as good as 1e-6 of the distance."""

    def __init__(self, features: Float[Tensor, "N D"], reference: Gaussian):
        self.features, self.reference = features, reference
        self.on_distance: Callable[[], None] = lambda: None
        """Called before each, as a sign of progress: wide features take seconds."""
        self.root = matrix_root(reference.covariance)

    def of_counts(self, counts: Int64[np.ndarray, " N"]) -> float:
        """With each picture taken so many times."""
        return self._distance(self._weighted(torch.from_numpy(counts).double()))

    def of_rows(self, rows: Int64[np.ndarray, " n"]) -> float:
        return self._distance(Moments.of_batches(self.features[part] for part in torch.from_numpy(rows).split(BLOCK)))

    def _weighted(self, counts: Float[Tensor, " N"]) -> Moments:
        num, origin = int(counts.sum()), self.reference.mean
        total, products = torch.zeros_like(origin), torch.zeros_like(self.root)
        for part, taken in zip(self.features.split(BLOCK), counts.split(BLOCK), strict=True):
            deviations = part.double() - origin  # near the mean, so that little is lost in the difference below
            weighted = deviations * taken[:, None]
            total += weighted.sum(0)
            products += weighted.T @ deviations
        mean = total / num
        return Moments(num, mean + origin, products - num * torch.outer(mean, mean))

    def _distance(self, moments: Moments) -> float:
        self.on_distance()
        covariance = moments.covariance
        cross = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp(min=0).sqrt().sum()
        apart = (moments.mean - self.reference.mean).square().sum()
        return float(apart + covariance.trace() + self.reference.covariance.trace() - 2 * cross)


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """What a Fréchet distance would be with pictures without end (Chong and Forsyth 2020, arXiv:1911.07023): the
    distance falls along 1/n, and a line through subsets of several sizes is read at 0."""

    value: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]

    @property
    def bias(self) -> float:
        """What the whole's distance has too much, of the samples' number alone: the reference has a bias of its own."""
        return self.distances[0] - self.value


def extrapolate(replicates: FrechetReplicates, seed: int, *, rows: np.ndarray | None = None) -> Extrapolation | None:
    """The samples in random order are cut into 1, 2, … SUBSETS equal parts, and the parts' distances averaged. None
    where the smallest parts have no more pictures than features: there the distance is not yet on the line."""
    num, width = len(replicates.features) if rows is None else len(rows), replicates.features.shape[1]
    if num // SUBSETS <= width + 1:
        return None
    order = np.random.default_rng([seed, 2**20]).permutation(num)
    order = order if rows is None else rows[order]
    sizes, distances = [], []
    for parts in range(1, SUBSETS + 1):
        size = num // parts
        found = [replicates.of_rows(order[i * size : (i + 1) * size]) for i in range(parts)]
        sizes.append(size)
        distances.append(float(np.mean(found)))
    _slope, intercept = np.polyfit(1 / np.asarray(sizes), distances, 1)
    return Extrapolation(value=float(intercept), sizes=tuple(sizes), distances=tuple(distances))


def frechet_figure(
    samples: Float[Tensor, "N D"],
    reference: Gaussian,
    seed: int,
    num_replicates: int,
    on_distance: Callable[[], None] = lambda: None,
) -> tuple[Figure, FrechetReplicates]:
    """The distance of a set of features, and what further ones of its parts are taken with."""
    value = frechet_distance(Moments.of_batches(samples.split(BLOCK)).gaussian, reference)
    replicates = FrechetReplicates(samples, reference)
    replicates.on_distance = on_distance
    return counted_figure(value, len(samples), replicates.of_counts, seed, num_replicates), replicates


# Two models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a figure between two models, B's less A's. `p_value` is that of no difference, two-sided, by the normal
    distribution; None without replicates."""

    value: float
    standard_error: float | None
    paired: bool

    @property
    def p_value(self) -> float | None:
        if not self.standard_error:
            return None if self.standard_error is None else float(self.value == 0)
        return math.erfc(abs(self.value) / self.standard_error / math.sqrt(2))


def difference(ours: Figure, theirs: Figure, *, paired: bool) -> Difference:
    """`paired`: replicate by replicate, the same pictures were drawn of both."""
    value = theirs.value - ours.value
    if paired and len(ours.replicates) == len(theirs.replicates) > 1:
        apart = np.asarray(theirs.replicates) - np.asarray(ours.replicates)
        return Difference(value=value, standard_error=float(apart.std(ddof=1)), paired=True)
    errors = ours.standard_error, theirs.standard_error
    error = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
    return Difference(value=value, standard_error=error, paired=False)

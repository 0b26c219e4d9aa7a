"""How far one set of features lies from another: the figures that papers report, as functions of features alone.

Letters: N samples, M reference pictures, D features, K classes, P projections, R replicates of a bootstrap. All is
computed in float64. What pictures contribute is given one by one where there is such a thing, so that intervals can be
taken over them (`confidence.py`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smalti.evaluate.moments import Gaussian

BLOCK = 512
"""Rows whose distances to all others are in memory at once."""
COLUMNS = 4096
"""Of the other set, how many are in float64 at once."""
DIRECTIONS = 32
"""Directions along which all pictures are in memory at once."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
MIND_PROJECTIONS = 1000


class Estimate(NamedTuple):
    """A distance, and what each sample moves it by."""

    value: float
    influence: Float[Tensor, " N"]
    """The mean of all is 0: with weights w that sum to 1 the distance is value + the sum of w · influence, to first
    order."""


# Fréchet ---------------------------------------------------------------------------------------------------------


def frechet_distance(ours: Gaussian, theirs: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500), never below 0.

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): unlike the roots of the eigenvalues
    of S1 S2, they are not noise of 1e-8 where the covariances are singular, so equal sets are 0 apart. Raises
    ValueError for features of two widths.
    """
    _same_width(ours.width, theirs.width)
    cross = torch.linalg.svdvals(matrix_root(ours.covariance) @ matrix_root(theirs.covariance)).sum()
    apart = (ours.mean - theirs.mean).square().sum()
    return max(0.0, float(apart + ours.covariance.trace() + theirs.covariance.trace() - 2 * cross))


def matrix_root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The symmetric root of a covariance; what rounding made negative of its eigenvalues is 0."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


# Inception score -------------------------------------------------------------------------------------------------


class ClassOdds(NamedTuple):
    """What the inception score is made of."""

    probabilities: Float[Tensor, "N K"]
    negative_entropies: Float[Tensor, " N"]
    """Sum of p ln p of each picture."""


def class_odds(logits: Float[Tensor, "N K"]) -> ClassOdds:
    log_probs = logits.double().log_softmax(1)
    return ClassOdds(log_probs.exp(), (log_probs.exp() * log_probs).sum(1))


def inception_score(odds: ClassOdds, weights: Float[Tensor, "R N"] | None = None) -> Float[Tensor, " R"]:
    """exp E KL(p(class | picture) || p(class)) (Salimans et al. 2016, arXiv:1606.03498) over all pictures, or with
    rows of weights that sum to 1."""
    N = len(odds.probabilities)
    weights = torch.full((1, N), 1 / N, dtype=torch.float64) if weights is None else weights.double()
    marginal = weights @ odds.probabilities
    entropy = torch.special.entr(marginal).sum(1)  # 0 where a class never occurs
    return (weights @ odds.negative_entropies + entropy).exp()


def inception_score_of_splits(odds: ClassOdds, splits: list[np.ndarray]) -> tuple[float, float]:
    """Mean and population standard deviation over splits: rows of the pictures in each."""
    scores = [
        float(inception_score(ClassOdds(odds.probabilities[rows], odds.negative_entropies[rows]))) for rows in splits
    ]
    return float(np.mean(scores)), float(np.std(scores))


# Neighbours ------------------------------------------------------------------------------------------------------


class Neighbours(NamedTuple):
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991) and density and coverage (Naeem et al. 2020,
    arXiv:2002.09797): each the mean of the values given here."""

    precision: Float[Tensor, " N"]
    """Of each sample: whether it lies in the ball of a reference picture, which reaches to its k-th neighbour."""
    recall: Float[Tensor, " M"]
    """Of each reference picture: whether it lies in a sample's ball."""
    density: Float[Tensor, " N"]
    """Of each sample: in how many reference balls it lies, over k."""
    coverage: Float[Tensor, " M"]
    """Of each reference picture: whether its ball holds a sample."""


def neighbours(
    samples: Float[Tensor, "N D"], reference: Float[Tensor, "M D"], *, k: int = 3, k_density: int = 5
) -> Neighbours:
    """Balls of precision and recall have `k` neighbours and hold their boundary, as ADM's evaluator has it; those of
    density and coverage have `k_density` and do not, as their authors' code. Raises ValueError for sets no larger than
    that."""
    _same_width(samples.shape[1], reference.shape[1])
    largest = max(k, k_density)
    if min(len(samples), len(reference)) <= largest:
        raise ValueError(
            f"{len(samples)} samples and {len(reference)} reference pictures; neighbours need more than {largest} of "
            "each."
        )
    # Distances do not change with the origin; near it, less of them is lost in squares.
    centre = reference.double().mean(0)
    radii_samples = neighbour_distances(samples, [k], centre)[:, 0]
    radii_k, radii_density = neighbour_distances(reference, [k, k_density], centre).T
    precision, density = torch.zeros(len(samples)), torch.zeros(len(samples))
    recall = torch.zeros(len(reference), dtype=torch.bool)
    coverage = torch.zeros(len(reference), dtype=torch.bool)
    for rows, distances in _distance_blocks(samples, reference, centre):
        precision[rows] = (distances <= radii_k).any(1).float()
        within: Bool[Tensor, "b M"] = distances < radii_density
        density[rows] = within.sum(1).float() / k_density
        coverage |= within.any(0)
        recall |= (distances <= radii_samples[rows, None]).any(0)
    return Neighbours(precision.double(), recall.double(), density.double(), coverage.double())


def neighbour_distances(
    features: Float[Tensor, "N D"], ks: list[int], centre: Float[Tensor, " D"]
) -> Float[Tensor, "N k"]:
    """Squared distance of each from its k-th neighbour, itself not counted, for each of `ks`."""
    found = torch.zeros(len(features), len(ks), dtype=torch.float64)
    for rows, distances in _distance_blocks(features, features, centre):
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = -1.0  # itself, before its copies
        nearest = distances.topk(max(ks) + 1, dim=1, largest=False, sorted=True).values
        found[rows] = nearest[:, ks]
    return found


def _distance_blocks(
    ours: Float[Tensor, "N D"], theirs: Float[Tensor, "M D"], centre: Float[Tensor, " D"]
) -> Iterator[tuple[slice, Float[Tensor, "b M"]]]:
    """Squared distances, some rows at a time, of features that need not fit into memory in float64."""
    for start in range(0, len(ours), BLOCK):
        rows = slice(start, min(start + BLOCK, len(ours)))
        block = ours[rows].double() - centre
        norms = block.square().sum(1, keepdim=True)
        parts = []
        for other in theirs.split(COLUMNS):
            other = other.double() - centre
            parts.append((norms - 2 * block @ other.T + other.square().sum(1)).clamp_(min=0))
        yield rows, torch.cat(parts, 1)


# Kernels ---------------------------------------------------------------------------------------------------------


def kernel_distance(
    samples: Float[Tensor, "N D"], reference: Float[Tensor, "M D"], *, kernel: str = "cubic"
) -> Estimate:
    """The squared maximum mean discrepancy, without bias, of all pairs: "cubic" is (x·y / D + 1)^3, of KID (Bińkowski
    et al. 2018, arXiv:1801.01401); "gaussian" is exp(-|x - y|^2 / (2 · 10^2)) of features of length 1, times 1000, of
    CMMD (Jayasumana et al. 2024, arXiv:2401.09603), here without its bias. Raises ValueError for fewer than two of
    either."""
    _same_width(samples.shape[1], reference.shape[1])
    N, M = len(samples), len(reference)
    if min(N, M) < 2:
        raise ValueError(f"{N} samples and {M} reference pictures; a kernel distance needs at least 2 of each.")
    if kernel not in ("cubic", "gaussian"):
        raise ValueError(f"kernel {kernel!r} is unknown; choose cubic or gaussian.")
    x, y, scale = samples, reference, CMMD_SCALE if kernel == "gaussian" else 1.0
    within = _kernel_sums(x, x, kernel, without_itself=True) / (N - 1)
    across = _kernel_sums(x, y, kernel) / M
    of_reference = float(_kernel_sums(y, y, kernel, without_itself=True).mean()) / (M - 1)
    value = float(within.mean()) + of_reference - 2 * float(across.mean())
    influence = 2 * ((within - within.mean()) - (across - across.mean()))
    return Estimate(scale * value, scale * influence)


def kernel_distance_of_subsets(
    samples: Float[Tensor, "N D"],
    reference: Float[Tensor, "M D"],
    *,
    num: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and population standard deviation of KID over random subsets, drawn as torch-fidelity draws them. Raises
    ValueError for sets smaller than a subset."""
    if min(len(samples), len(reference)) < size:
        raise ValueError(
            f"{len(samples)} samples and {len(reference)} reference pictures, fewer than {size} in a subset."
        )
    random, found = np.random.RandomState(seed), []
    for _ in range(num):
        ours = samples[random.choice(len(samples), size, replace=False)]
        theirs = reference[random.choice(len(reference), size, replace=False)]
        found.append(kernel_distance(ours, theirs).value)
    return float(np.mean(found)), float(np.std(found))


def _kernel_sums(
    ours: Float[Tensor, "N D"], theirs: Float[Tensor, "M D"], kernel: str, *, without_itself: bool = False
) -> Float[Tensor, " N"]:
    sums = torch.zeros(len(ours), dtype=torch.float64)
    for start in range(0, len(ours), BLOCK):
        block = _prepared(ours[start : start + BLOCK], kernel)
        for first in range(0, len(theirs), COLUMNS):
            values = _kernel(block @ _prepared(theirs[first : first + COLUMNS], kernel).T, kernel, ours.shape[1])
            sums[start : start + BLOCK] += values.sum(1)
        if without_itself:
            sums[start : start + BLOCK] -= _kernel(block.square().sum(1), kernel, ours.shape[1])
    return sums


def _kernel(products: Tensor, kernel: str, D: int) -> Tensor:
    if kernel == "cubic":
        return (products / D + 1) ** 3
    return ((products - 1) / CMMD_SIGMA**2).exp()  # of length 1, so that |x - y|^2 is 2 - 2 x·y


def _prepared(features: Float[Tensor, "N D"], kernel: str) -> Float[Tensor, "N D"]:
    return _unit(features.double()) if kernel == "gaussian" else features.double()


def _unit(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)


# Sliced Wasserstein ----------------------------------------------------------------------------------------------


def sliced_wasserstein(
    samples: Float[Tensor, "N D"], reference: Float[Tensor, "M D"], *, num: int = MIND_PROJECTIONS, seed: int = 2020
) -> Estimate:
    """Squared 2-Wasserstein distance along random directions of length 1, their mean, times 3 D: MIND (Berthet et al.,
    arXiv:2605.06797), with directions drawn as torch-fidelity draws them. Sets of two sizes are compared whole. It is
    0 for equal sets and biased upwards for others, the more so the fewer pictures."""
    _same_width(samples.shape[1], reference.shape[1])
    D = samples.shape[1]
    directions = torch.randn(num, D, generator=torch.Generator().manual_seed(seed))
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    pieces = _pieces(len(samples), len(reference))
    total, influence = 0.0, torch.zeros(len(samples), dtype=torch.float64)
    for some in directions.double().split(DIRECTIONS):
        ours, order = _along(samples, some).sort(1)
        theirs = _along(reference, some).sort(1).values
        i, j, lengths = pieces
        total += float(((ours[:, i] - theirs[:, j]).square() @ lengths).sum())
        influence.scatter_add_(0, order.flatten(), _potentials(ours, theirs).flatten())
    scale = 3.0 * D / num
    return Estimate(scale * total, scale * (influence - influence.mean()))


def _along(features: Float[Tensor, "N D"], directions: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
    return torch.cat([directions @ block.double().T for block in features.split(COLUMNS)], 1)


def _pieces(N: int, M: int) -> tuple[Tensor, Tensor, Float[Tensor, " n"]]:
    """The pieces of [0, 1] on which the quantiles of N and of M equal masses are both constant: which of each, and the
    pieces' lengths."""
    common = math.lcm(N, M)
    ends = np.unique(np.concatenate([np.arange(1, N + 1) * (common // N), np.arange(1, M + 1) * (common // M)]))
    starts = np.concatenate([[0], ends[:-1]])
    i, j = starts // (common // N), starts // (common // M)
    return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy((ends - starts) / common)


def _potentials(ours: Float[Tensor, "P N"], theirs: Float[Tensor, "P M"]) -> Float[Tensor, "P N"]:
    """Of sorted sets, Kantorovich's potential at each of ours: the distance's derivative by its mass. It grows from one
    point to the next by the integral of 2 (x - T), where T is the quantile of theirs at the mass between the two."""
    N, M = ours.shape[1], theirs.shape[1]
    between = theirs[:, torch.arange(1, N) * M // N]
    steps = (ours[:, 1:].square() - ours[:, :-1].square()) - 2 * between * (ours[:, 1:] - ours[:, :-1])
    return torch.cat([torch.zeros_like(ours[:, :1]), steps.cumsum(1)], 1)


def _same_width(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ValueError(f"features are {ours} and {theirs} numbers wide; both sets need those of one network.")

"""Groups of points and their places in a plane: k-means, leading singular vectors, principal components.

A few hundred points of a few dozen coordinates. What is compared is rounded, so that groups do not depend on the last
bit of a sum, as those of libraries do.

Letters: M points, E coordinates, k groups, r singular vectors.
"""

import numpy as np
from jaxtyping import Float64, Int64

_DIGITS = 9  # distances are compared by so many digits: what is equal but for rounding is a tie, and the first is taken
_MOST_ROUNDS = 300
_POWERS = 7  # of the matrix, so that what little stands out between singular values stands out enough
_SPARE = 10  # singular vectors computed beside those asked for


def k_means(
    points: Float64[np.ndarray, "M E"],
    num_groups: int,
    *,
    weights: Float64[np.ndarray, " M"] | None = None,
    num_starts: int = 4,
    seed: int = 0,
) -> Int64[np.ndarray, " M"]:
    """A group in [0, num_groups) for each point: the best of several runs of Lloyd's algorithm (1957), each started as
    k-means++ is (Arthur and Vassilvitskii 2007). As many groups as there are different points at most."""
    different, number = np.unique(points.round(12), axis=0, return_inverse=True)
    mass = np.bincount(number.ravel(), weights)
    k = min(num_groups, len(different))
    generator = np.random.default_rng(seed)
    scale = max(float(np.abs(different).max()), 1e-300)
    best, least = np.zeros(len(different), np.int64), np.inf
    for _ in range(num_starts):
        groups, spread = _lloyd(different / scale, mass, _spread_out(different / scale, mass, k, generator))
        if spread < least:
            best, least = groups, spread
    return best[number.ravel()]


def _spread_out(
    points: Float64[np.ndarray, "M E"], mass: Float64[np.ndarray, " M"], k: int, generator: np.random.Generator
) -> Float64[np.ndarray, "k E"]:
    """Points far from one another: each, of a few drawn by their squared distances from the nearest drawn before, the
    one that brings the others nearest."""
    chosen = [int(generator.choice(len(points), p=mass / mass.sum()))]
    apart = ((points - points[chosen[0]]) ** 2).sum(1)
    for _ in range(k - 1):
        chance = np.cumsum(np.round(apart * mass / (apart * mass).sum(), _DIGITS))
        drawn = generator.random(2 + int(np.log(k))) * chance[-1]
        tried = np.searchsorted(chance, drawn, side="right")
        left = np.minimum(apart, ((points[tried, None] - points) ** 2).sum(-1))  # (tried, M)
        best = int(np.round((left * mass).sum(1) / mass.sum(), _DIGITS).argmin())
        chosen.append(int(tried[best]))
        apart = left[best]
    return points[chosen]


def _lloyd(
    points: Float64[np.ndarray, "M E"], mass: Float64[np.ndarray, " M"], centres: Float64[np.ndarray, "k E"]
) -> tuple[Int64[np.ndarray, " M"], float]:
    """Groups, and the squared distances from their centres; the better, the smaller."""
    k, groups = len(centres), np.full(len(points), -1)
    apart = np.empty((len(points), k))
    for _ in range(_MOST_ROUNDS):
        apart = np.round((points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1), _DIGITS)
        now = apart.argmin(1)
        for empty in np.flatnonzero(np.bincount(now, minlength=k) == 0):  # it gets the point that lies worst
            farthest = int((apart[np.arange(len(points)), now] * mass).argmax())
            now[farthest] = empty
            apart[farthest, empty] = 0.0
        if (now == groups).all():
            break
        groups = now
        total = np.bincount(groups, mass, k)
        sums = np.stack([np.bincount(groups, mass * column, k) for column in points.T], axis=1)
        centres = sums / np.maximum(total, 1e-300)[:, None]
    return groups, round(float((apart[np.arange(len(points)), groups] * mass).sum() / mass.sum()), _DIGITS)


def leading_vectors(
    matrix: Float64[np.ndarray, "M M2"], num: int, *, seed: int = 0
) -> tuple[Float64[np.ndarray, "M r"], Float64[np.ndarray, " r"]]:
    """Left singular vectors and singular values of a large matrix, the first few, by a random projection that powers
    of the matrix sharpen (Halko, Martinsson and Tropp 2011)."""
    width = min(num + _SPARE, *matrix.shape)
    basis = np.random.default_rng(seed).standard_normal((matrix.shape[1], width))
    for _ in range(_POWERS):
        basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
    left = np.linalg.qr(matrix @ basis)[0]
    turned, values, _ = np.linalg.svd(left.T @ matrix, full_matrices=False)
    return (left @ turned)[:, :num], values[:num]


def principal_components(points: Float64[np.ndarray, "M E"], num: int = 2) -> Float64[np.ndarray, "M r"]:
    """The points in the plane of most variance. The largest coordinate of each axis is made positive: a sign means
    nothing."""
    left, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    left, values = left[:, :num], values[:num]
    largest = left[np.abs(left).argmax(0), np.arange(left.shape[1])]
    return left * values * np.where(largest < 0, -1.0, 1.0)

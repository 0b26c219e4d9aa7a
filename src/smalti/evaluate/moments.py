"""Mean and covariance of features, taken batch by batch in float64, and files of them.

A set may be cut into shards that are measured apart, in any order: moments merge (Chan et al. 1979), and the whole's
are those of its parts up to the rounding of float64. Files are `.npz` with the arrays of ADM's evaluator: `mu` and
`sigma` of the pooled features, `mu_s` and `sigma_s` of spatial ones; ours have `num` besides, without which nothing can
be merged.

Letters: N pictures, D features.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smalti.arrays import read_npz
from smalti.errors import InputError
from smalti.files import new_file

POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
MEND = "give statistics of pictures: arrays mu and sigma, and mu_s and sigma_s with sFID"


@dataclass(frozen=True, eq=False)
class Moments:
    """What a Gaussian needs of N features: their mean, and the sum of the squares and products of their deviations."""

    num: int
    mean: Float[Tensor, " D"]
    scatter: Float[Tensor, "D D"]

    @classmethod
    def of(cls, features: Float[Tensor, "N D"]) -> "Moments":
        """Of a batch, in float64."""
        features = features.double()
        mean = features.mean(0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    @classmethod
    def of_batches(cls, batches: Iterable[Float[Tensor, "N D"]]) -> "Moments":
        """Of batches as they come, none of which is kept. Raises ValueError if there are none."""
        return cls.merged(map(cls.of, batches))

    @classmethod
    def merged(cls, parts: Iterable["Moments"]) -> "Moments":
        """Of several sets together. Raises ValueError if there are none."""
        found: Moments | None = None
        for part in parts:
            found = part if found is None else found + part
        if found is None:
            raise ValueError("there are no features, so no moments of them.")
        return found

    def __add__(self, other: "Moments") -> "Moments":
        num = self.num + other.num
        between = other.mean - self.mean
        mean = self.mean + between * (other.num / num)
        products = torch.outer(between, between) * (self.num * other.num / num)
        return Moments(num, mean, self.scatter + other.scatter + products)

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Unbiased. Raises ValueError for fewer than two pictures."""
        if self.num < 2:
            raise ValueError(f"{self.num} picture has no covariance; give at least 2.")
        return self.scatter / (self.num - 1)

    @property
    def gaussian(self) -> "Gaussian":
        return Gaussian(self.mean, self.covariance, self.num)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance, of `num` pictures if that is known."""

    mean: Float[Tensor, " D"]
    covariance: Float[Tensor, "D D"]
    num: int | None = None

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def moments(self) -> Moments:
        """Raises InputError if the number of pictures is not known."""
        if self.num is None:
            raise InputError(
                "these statistics do not say of how many pictures they are (num), so they cannot be merged; make them "
                "again with smalti evaluate statistics."
            )
        return Moments(self.num, self.mean, self.covariance * (self.num - 1))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a file of statistics holds."""

    pooled: Gaussian
    spatial: Gaussian | None = None
    note: str = ""
    """What features they are of, as JSON; empty in files of others."""


def holds_statistics(names: Iterable[str]) -> bool:
    return set(POOLED) <= set(names)


def statistics_of(arrays: dict[str, Any], where: Path | str) -> Statistics:
    """The statistics among an `.npz` file's arrays. Raises InputError naming what is missing, of another shape, or not
    finite."""
    num = int(arrays["num"]) if "num" in arrays else None
    if num is not None and num < 2:
        raise InputError(f"{where}: num is {num}; statistics are of at least 2 pictures.")
    pooled = _gaussian(arrays, POOLED, num, where)
    spatial = _gaussian(arrays, SPATIAL, num, where) if set(SPATIAL) & arrays.keys() else None
    note = bytes(arrays["note"].astype(np.uint8)).decode(errors="replace") if "note" in arrays else ""
    return Statistics(pooled, spatial, note)


def read_statistics(path: Path) -> Statistics:
    """Raises InputError naming the file for what is none."""
    return statistics_of(read_npz(path, MEND), path)


def write_statistics(path: Path, statistics: Statistics, *, force: bool = False, **arrays: np.ndarray) -> None:
    """Writes the file, and other arrays with it, such as ADM's `arr_0`. Raises InputError if it exists, unless
    `force`."""
    content: dict[str, Any] = dict(arrays)
    for names, gaussian in ((POOLED, statistics.pooled), (SPATIAL, statistics.spatial)):
        if gaussian is not None:
            content |= {names[0]: gaussian.mean.numpy(), names[1]: gaussian.covariance.numpy()}
    if statistics.pooled.num is not None:
        content["num"] = np.int64(statistics.pooled.num)
    if statistics.note:
        content["note"] = np.frombuffer(statistics.note.encode(), np.uint8)
    with new_file(path, force=force) as temporary, temporary.open("wb") as file:
        np.savez(file, **content)


def _gaussian(arrays: dict[str, Any], names: tuple[str, str], num: int | None, where: Path | str) -> Gaussian:
    for name in names:
        if name not in arrays:
            raise InputError(f"{where} has no array {name}; {MEND}.")
    mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in names)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{where}: {names[0]} is {mean.shape} and {names[1]} {covariance.shape}; expected (D) and (D, D)."
        )
    for name, values in zip(names, (mean, covariance), strict=True):
        if not np.isfinite(values).all():
            raise InputError(f"{where}: {name} holds values that are NaN or infinite; make the statistics again.")
    if not np.allclose(covariance, covariance.T, atol=1e-6 * max(1.0, float(np.abs(covariance).max(initial=0)))):
        raise InputError(f"{where}: {names[1]} is not symmetric, so it is no covariance; make the statistics again.")
    return Gaussian(torch.from_numpy(mean), torch.from_numpy((covariance + covariance.T) / 2), num)

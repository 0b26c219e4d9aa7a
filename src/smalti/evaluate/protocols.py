"""Which convention each of the field's tools follows where figures depend on one.

| | resizer to 299 × 299 | inception score | KID | precision and recall | reference |
|---|---|---|---|---|---|
| `adm` | `tf1` | contiguous splits of 5,000 | – | 3 neighbours, boundary in | a file: `mu`, `sigma` of the training pictures, `mu_s`, `sigma_s`, and 10,000 pictures |
| `torch-fidelity` | `tf1` | 10 splits, shuffled with seed 2020 | 100 subsets of 1,000, seed 2020 | 3 neighbours, boundary in | whatever is given |
| `clean-fid` | `clean` | – | 100 subsets of 1,000 | – | whatever is given |
| `pytorch-fid` | `half-pixel` | – | – | – | whatever is given |
| `smalti` | none, or the network's own | all pictures together | all pairs | 3 neighbours, boundary in | whatever is given |

Where a tool has no convention for a figure, `smalti`'s is taken. All sums are in float64: the tools add features up in
float32 (ADM's means) or compare distances in float16 (ADM's neighbours where they fit), which is not imitated.
"""  # noqa: E501

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smalti.errors import shortened


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is decided before anything is measured."""

    name: str
    resizer: str = "none"
    """Of Inception's input, one of `RESIZERS`; other networks resize as they were trained."""
    score_splits: str = "all pictures together"
    kid: str = "all pairs"
    num_neighbours: int = 3
    num_neighbours_density: int = 5
    num_samples: int | None = None
    """What published figures were taken with."""


ADM = Protocol(name="adm", resizer="tf1", score_splits="contiguous splits of 5,000", num_samples=50_000)
TORCH_FIDELITY = Protocol(
    name="torch-fidelity",
    resizer="tf1",
    score_splits="10 splits, shuffled with seed 2020",
    kid="100 subsets of 1,000, seed 2020",
)
CLEAN_FID = Protocol(name="clean-fid", resizer="clean", kid="100 subsets of 1,000, seed 2020")
PYTORCH_FID = Protocol(name="pytorch-fid", resizer="half-pixel")
SMALTI = Protocol(name="smalti")
PROTOCOLS = {one.name: one for one in (ADM, TORCH_FIDELITY, CLEAN_FID, PYTORCH_FID, SMALTI)}
OF_INCEPTION = tuple(name for name in PROTOCOLS if PROTOCOLS[name].resizer != "none")


def find_protocol(name: str) -> Protocol:
    """Raises ValueError listing those there are."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {shortened(name)!r} is unknown; choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def score_splits(protocol: Protocol, num: int) -> list[np.ndarray]:
    """The rows of each split of `num` pictures."""
    return SPLITTERS[protocol.score_splits](num)


def _contiguous(num: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + 5000, num)) for start in range(0, num, 5000)]


def _shuffled(num: int) -> list[np.ndarray]:
    order = np.random.RandomState(2020).permutation(num)
    return [rows for i in range(10) if len(rows := order[i * num // 10 : (i + 1) * num // 10])]


SPLITTERS: dict[str, Callable[[int], list[np.ndarray]]] = {
    SMALTI.score_splits: lambda num: [np.arange(num)],
    ADM.score_splits: _contiguous,
    TORCH_FIDELITY.score_splits: _shuffled,
}

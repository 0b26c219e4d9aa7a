"""Whether a picture was learned by heart: the training pictures nearest to it, by codes and by what is to be seen.

A distance alone says little, since simple pictures are near to many. So those of pictures that are certainly new, a
held-out set, are the measure: a drawn picture nearer to the training set than nearly all of them is suspect.
Letters: B pictures asked about, N training pictures, M held out, L codes of a picture, F features.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Int64, Integer
from torch import Tensor

from smalti.image_tokenizers import ImageTokenizer
from smalti.stopping import end_if_stopped


class Nearest(NamedTuple):
    """The training pictures nearest to each picture, the nearest first; of equals the one that comes first."""

    rows: Int64[np.ndarray, "B num"]
    distances: Float64[np.ndarray, "B num"]


class Memorised(NamedTuple):
    """How near pictures are to the training set, beside new ones."""

    distances: Float64[np.ndarray, " B"]
    """To the nearest training picture."""
    nearer_than_new: Float64[np.ndarray, " B"]
    """Share of the held-out pictures that are farther from the training set: near 1 is suspect."""


def edit_distances(line: Integer[np.ndarray, " L"], lines: Integer[np.ndarray, "N L"]) -> Int64[np.ndarray, " N"]:
    """Levenshtein's distance of one line of codes to each of others: the fewest codes to put in, take out or change. A
    picture that was moved by a cell is near, though no cell holds the same code."""
    N, width = lines.shape
    steps = np.arange(width + 1, dtype=np.int32)
    before = np.tile(steps, (N, 1))
    for number, code in enumerate(line.tolist(), start=1):
        now = np.empty_like(before)
        now[:, 0] = number
        np.minimum(before[:, 1:] + 1, before[:, :-1] + (lines != code), out=now[:, 1:])
        # putting codes in runs along the row: now[j] = min over i ≤ j of now[i] + j − i
        before = np.minimum.accumulate(now - steps, axis=1) + steps
    return before[:, -1].astype(np.int64)


def nearest_by_codes(
    codes: Integer[np.ndarray, "B L"], training: Integer[np.ndarray, "N L"], *, num: int = 5
) -> Nearest:
    """By edit distance of the codes, read as lines."""
    return _nearest(len(codes), lambda row: edit_distances(codes[row], training).astype(float), num)


def nearest_by_features(features: Float[Tensor, "B F"], training: Float[Tensor, "N F"], *, num: int = 5) -> Nearest:
    """By Euclidean distance of features."""
    known = training.double()
    return _nearest(len(features), lambda row: (known - features[row].double()).norm(dim=1).numpy(), num)


def _nearest(num_asked: int, distances: Callable[[int], Float64[np.ndarray, " N"]], num: int) -> Nearest:
    rows, found = [], []
    for row in range(num_asked):
        end_if_stopped()
        to_all = distances(row)
        order = np.argsort(to_all, kind="stable")[:num]
        rows.append(order)
        found.append(to_all[order])
    return Nearest(np.array(rows), np.array(found))


def memorised(drawn: Nearest, new: Nearest) -> Memorised:
    """Drawn pictures beside held-out ones, both looked for in the same training set."""
    nearest, measure = drawn.distances[:, 0], np.sort(new.distances[:, 0])
    farther = 1 - np.searchsorted(measure, nearest, side="right") / len(measure)
    return Memorised(nearest, farther)


@torch.no_grad()
def picture_features(
    image_tokenizer: ImageTokenizer, codes: Int[Tensor, "B h w"], *, side: int = 8, batch_size: int = 128
) -> Float[Tensor, "B F"]:
    """The decoded pictures, each shrunk to `side` × `side` mean colours: what is to be seen from afar."""
    parts = [
        F.adaptive_avg_pool2d(image_tokenizer.decode_codes(codes[start : start + batch_size]).clamp(0, 1), side)
        for start in range(0, len(codes), batch_size)
    ]
    return torch.cat(parts).flatten(1).cpu()

"""How often two codes stand at two positions, counted once for blocks of lines, so that any half of them is a sum.

Mutual information of random halves is what tells a finding from chance (`grid.py`). Lines are sorted first and counts
are whole numbers: neither the order of the lines nor the number of threads changes a bit of the result.
Letters: N lines, L positions, P pairs of positions, C classes of codes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Integer, Shaped

_MAX_COUNTS = 2**26  # entries of a table of counts: 128 MiB, or 256 MiB from 2^16 lines a block on
_MAX_COUNTED = 2**31  # pairs of codes that are counted; of longer lines fewer are taken
_NUM_BLOCKS = 20
_LEAST_BLOCKS = 4


class Halves(NamedTuple):
    """Mutual information in nats from two disjoint halves of the lines, over pairs of positions, the diagonal 0."""

    fitted: Float64[np.ndarray, "L L"]
    judged: Float64[np.ndarray, "L L"]


def num_classes_for(length: int) -> int:
    """Classes of codes between which information is measured: fewer for long lines, whose pairs are many."""
    return 24 if length <= 128 else 16 if length <= 320 else 8


def sorted_lines(codes: Integer[np.ndarray, "N L"]) -> Integer[np.ndarray, "N L"]:
    """The same lines in an order of their own, whatever order they came in."""
    narrow = np.ascontiguousarray(codes.astype(">u4"))  # big-endian bytes sort as the numbers do
    whole_lines = narrow.view(np.dtype((np.void, narrow.shape[1] * narrow.itemsize))).ravel()
    return codes[np.argsort(whole_lines, kind="stable")]


class PairCounts:
    """Counts of pairs of classes at every two positions, by block of lines, beside those of unrelated lines."""

    def __init__(self, classes: Integer[np.ndarray, "N L"], num_classes: int, *, seed: int = 0) -> None:
        N, L = classes.shape
        self.num_classes, self.pairs = num_classes, np.triu_indices(L, 1)
        num_pairs = len(self.pairs[0])
        N = min(N, max(2000, _MAX_COUNTED // max(num_pairs, 1)))
        generator = np.random.default_rng(seed)
        classes = classes[generator.permutation(len(classes))[:N]]
        room = _MAX_COUNTS // max(2 * num_pairs * num_classes**2, 1)
        num_blocks = min(max(room, _LEAST_BLOCKS), _NUM_BLOCKS, N)
        self.num_blocks, self.num_lines = num_blocks, np.zeros(num_blocks, np.int64)
        kind = np.uint16 if N // num_blocks + 1 < 2**16 else np.uint32
        shape = (num_blocks, num_pairs, num_classes**2)
        self._together, self._apart = np.zeros(shape, kind), np.zeros(shape, kind)
        self._alone = np.zeros((num_blocks, L, num_classes), np.int64)
        for block, rows in enumerate(np.array_split(np.arange(N), num_blocks)):
            part = classes[rows].T.astype(np.int32)  # (L, n)
            others = part[:, generator.permutation(len(rows))]
            self.num_lines[block] = len(rows)
            self._alone[block] = (part[:, :, None] == np.arange(num_classes)).sum(1)
            for table, second in ((self._together, part), (self._apart, others)):
                _count(table[block], part, second, num_classes)
        self._n_log_n = np.arange(N + 1) * np.log(np.maximum(np.arange(N + 1), 1))

    def information(self, blocks: Shaped[np.ndarray, " some"] | None = None) -> Float64[np.ndarray, "L L"]:
        """Mutual information of every two positions from these blocks (None: all lines), in nats.

        The plug-in estimate less that of unrelated lines, so that independent positions get 0 on average.
        """
        chosen = np.arange(self.num_blocks) if blocks is None else blocks
        joint, unrelated = (self._entropies(table, chosen) for table in (self._together, self._apart))
        found = np.zeros((self._alone.shape[1],) * 2)
        found[self.pairs] = np.round(unrelated - joint, 12)  # the entropies of single positions cancel
        return found + found.T

    def _entropies(self, table: Integer[np.ndarray, "b P CC"], chosen: np.ndarray) -> Float64[np.ndarray, " P"]:
        total = int(self.num_lines[chosen].sum())
        found = np.empty(table.shape[1])
        for start in range(0, len(found), 256):  # a few pairs at a time, so that the sums stay in the cache
            counts = table[chosen, start : start + 256].sum(0, dtype=np.int64)
            found[start : start + 256] = np.log(total) - self._n_log_n[counts].sum(-1) / total
        return found

    def halvings(self, num: int, *, seed: int = 0) -> Iterator[Halves]:
        """Random halvings of the blocks."""
        generator = np.random.default_rng(seed)
        for _ in range(num):
            order = generator.permutation(self.num_blocks)
            half = self.num_blocks // 2
            yield Halves(self.information(order[:half]), self.information(order[half:]))


def _count(
    table: Integer[np.ndarray, "P CC"],
    first: Integer[np.ndarray, "L n"],
    second: Integer[np.ndarray, "L n"],
    num_classes: int,
) -> None:
    start, L = 0, len(first)
    squared = num_classes**2
    for i in range(L - 1):
        rest = L - 1 - i
        pairs = second[i + 1 :] + first[i] * num_classes + (np.arange(rest, dtype=np.int32) * squared)[:, None]
        table[start : start + rest] = np.bincount(pairs.ravel(), minlength=rest * squared).reshape(rest, squared)
        start += rest

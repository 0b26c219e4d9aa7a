"""Which cell of a grid each position is, from nothing but how much every two positions share: a free permutation.

Placing positions so that those that share much are neighbours is a quadratic assignment problem (Koopmans and Beckmann
1957), too large to be solved exactly. It is solved as jigsaw puzzles are: patches grow from every position by the
best match, a tabu search swaps pairs of cells (Taillard 1991), and then part of the best picture is kept, put elsewhere
and the rest grown anew (ruin and recreate; Schrimpf et al. 2000), as long as that explains more.

Letters: L positions, n = h · w cells, K kinds of pairs of cells.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from smalti.stopping import end_if_stopped

REACH = 2
"""Rows or columns apart up to which two cells are a kind of their own."""
_SIDE = REACH + 1
_MIRRORED_COLUMNS = _SIDE**2  # and one more if a row apart
_MIRRORED_ROWS = _MIRRORED_COLUMNS + 2
_MIRRORED_BOTH = _MIRRORED_ROWS + 2
_FAR = _MIRRORED_BOTH + 1
NUM_KINDS = _FAR + 1
_DIGITS = 9  # sums are compared by so many digits: what is equal but for rounding is a tie, and the first is taken
_CANDIDATES = 4  # cells with most around them that are filled, among which a growing picture goes on
_NOISE = 0.1  # of the scores in regrowing, so that it does not end in the same picture each time
_SAME = 0.005  # explained shares that differ by less, relatively, are those of one picture but for some empty cells
_PATIENCE = 40  # rounds without a gain after which the search ends


class Placement(NamedTuple):
    """A position for each cell, row by row."""

    positions: Int64[np.ndarray, " n"]
    explained: float
    """Share of the variance of what positions share that the kinds of pairs explain."""


def cell_kinds(rows: int, columns: int) -> Int64[np.ndarray, "n n"]:
    """How two cells lie to each other, as a number: by rows and columns apart, if they are near; else whether one is,
    or is next to, the other's mirror image, left and right or above and below, or lies opposite it; else far."""
    row, column = np.mgrid[:rows, :columns].reshape(2, -1)
    down, right = np.abs(row[:, None] - row), np.abs(column[:, None] - column)
    across, upside = column[:, None] + column == columns - 1, row[:, None] + row == rows - 1
    kinds = np.full(down.shape, _FAR)
    kinds[across & upside] = _MIRRORED_BOTH
    for mirrored, apart, first in ((upside, right, _MIRRORED_ROWS), (across, down, _MIRRORED_COLUMNS)):
        there = mirrored & (apart <= 1)
        kinds[there] = (first + apart)[there]
    near = (down <= REACH) & (right <= REACH)
    kinds[near] = (down * _SIDE + right)[near]
    return kinds


class Criterion:
    """How well a placement of positions explains what they share: the variance between kinds of pairs over all. Pairs
    with a position that is in no cell are one more kind."""

    def __init__(self, shared: Float64[np.ndarray, "L L"], rows: int, columns: int) -> None:
        self.shared, self.rows, self.columns = shared, rows, columns
        self.kinds = cell_kinds(rows, columns)
        self._upper = np.triu_indices(rows * columns, 1)
        self._kind = self.kinds[self._upper]
        self._num = np.maximum(np.bincount(self._kind, minlength=NUM_KINDS), 1)
        every = shared[np.triu_indices(len(shared), 1)]
        self._total, self._num_pairs = float(every.sum()), len(every)
        self._variance = max(float(((every - every.mean()) ** 2).sum()), 1e-300)

    def means(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " K"]:
        """Of what pairs of each kind share."""
        return self._sums(positions) / self._num

    def __call__(self, positions: Int64[np.ndarray, " n"]) -> float:
        sums = self._sums(positions)
        outside = self._num_pairs - len(self._kind)
        between = float((sums**2 / self._num).sum()) - self._total**2 / self._num_pairs
        if outside:
            between += (self._total - float(sums.sum())) ** 2 / outside
        return round(between / self._variance, _DIGITS)

    def _sums(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " K"]:
        inside = self.shared[np.ix_(positions, positions)]
        return np.bincount(self._kind, inside[self._upper], minlength=NUM_KINDS)


def fit_lattice(
    shared: Float64[np.ndarray, "L L"],
    candidates: Int64[np.ndarray, " n"],
    rows: int,
    columns: int,
    *,
    num_rounds: int = 100,
    num_starts: int = 12,
    seed: int = 0,
) -> Placement:
    """The best placement found of these positions in a grid, up to mirror images, turns and, if it is square,
    transposition. It ends where two starts lead to the same. `shared` must not be negative."""
    generator = np.random.default_rng(seed)
    criterion = Criterion(shared, rows, columns)
    best: Placement | None = None
    for start in grown_starts(criterion, candidates, generator)[:num_starts]:
        found = _recreated(criterion, start, num_rounds, generator)
        if best is not None and abs(found.explained - best.explained) <= _SAME * best.explained:
            return max(best, found, key=lambda placement: placement.explained)
        if best is None or found.explained > best.explained:
            best = found
    assert best is not None
    return best


def grown_starts(
    criterion: Criterion, candidates: Int64[np.ndarray, " n"], generator: np.random.Generator
) -> list[Placement]:
    """Pictures grown from up to 64 of the positions by their next neighbours alone, then improved by swaps; the best
    first."""
    rows, columns = criterion.rows, criterion.columns
    down_right = np.abs(np.mgrid[:rows, :columns].reshape(2, -1, 1) - np.mgrid[:rows, :columns].reshape(2, 1, -1))
    adjacent = (down_right.sum(0) == 1).astype(float)
    found = {}
    for first in candidates[:: -(-len(candidates) // 64)].tolist():
        end_if_stopped()
        grown = _grown_from(criterion.shared, candidates, first, rows, columns)
        improved = _swapped(criterion.shared, adjacent, grown, 100, generator)
        found.setdefault(criterion(improved), improved)
    return [Placement(found[explained], explained) for explained in sorted(found, reverse=True)]


def refined(criterion: Criterion, start: Int64[np.ndarray, " n"], *, seed: int = 0) -> Placement:
    """The placement after swaps of cells, as long as they explain more."""
    generator, best = np.random.default_rng(seed), Placement(start, criterion(start))
    for _ in range(4):
        swapped = _swapped(criterion.shared, _weights(criterion, best.positions), best.positions, 100, generator)
        if (explained := criterion(swapped)) <= best.explained:
            return best
        best = Placement(swapped, explained)
    return best


def _recreated(criterion: Criterion, best: Placement, num_rounds: int, generator: np.random.Generator) -> Placement:
    """Better and better pictures: a rectangle of the best one is kept, perhaps mirrored or moved, the rest grown anew.

    The weights of the kinds are those of pictures in general first: the means of a start that is wrong would only
    confirm it.
    """
    rows, columns = criterion.rows, criterion.columns
    weights, since = _general_weights(criterion), 0
    for number in range(num_rounds):
        end_if_stopped()
        height, width = int(generator.integers(2, rows + 1)), int(generator.integers(2, columns + 1))
        top, left = int(generator.integers(rows - height + 1)), int(generator.integers(columns - width + 1))
        kept = best.positions.reshape(rows, columns)[top : top + height, left : left + width]
        if generator.random() < 0.5:
            kept = kept[::-1]
        if generator.random() < 0.3 and width <= rows and height <= columns:
            kept = kept.T
        height, width = kept.shape
        top, left = int(generator.integers(rows - height + 1)), int(generator.integers(columns - width + 1))
        picture = np.full((rows, columns), -1)
        picture[top : top + height, left : left + width] = kept
        grown = _regrown(criterion.shared, weights, np.sort(best.positions), picture.ravel(), generator)
        swapped = _swapped(criterion.shared, weights, grown, 60, generator)
        since += 1
        if (explained := criterion(swapped)) > best.explained:
            best, since = Placement(swapped, explained), 0
            if number > num_rounds // 5:
                weights = _weights(criterion, best.positions)
        if since >= _PATIENCE:
            break
    return refined(criterion, best.positions, seed=int(generator.integers(2**31)))


def _weights(criterion: Criterion, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, "n n"]:
    return _centred(criterion.means(positions)[criterion.kinds])


def _general_weights(criterion: Criterion) -> Float64[np.ndarray, "n n"]:
    """What cells of coloured digits and of emoji share on average, by kind, in units of the mean of all pairs."""
    means = np.full(NUM_KINDS, 0.8)
    means[: _SIDE**2] = 0, 3.2, 1.5, 3.4, 2.1, 1.3, 1.8, 1.4, 1.1
    means[_MIRRORED_COLUMNS : _MIRRORED_COLUMNS + 2] = 1.5, 1.2
    return means[criterion.kinds] * criterion.shared.mean()


def _centred(weights: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
    weights = weights - weights.mean()
    np.fill_diagonal(weights, 0.0)
    return weights


def _swapped(
    shared: Float64[np.ndarray, "L L"],
    weights: Float64[np.ndarray, "n n"],
    positions: Int64[np.ndarray, " n"],
    num_swaps: int,
    generator: np.random.Generator,
) -> Int64[np.ndarray, " n"]:
    """Tabu search: the best swap of two cells each time, better or not, but none that brings two positions back to
    where they lately were, unless it beats all so far. The sum of shared · weights over pairs is made large."""
    n, order = len(positions), positions.copy()
    inside = shared[np.ix_(order, order)]
    now = top = float((inside * weights).sum()) / 2
    best, until = order.copy(), np.zeros((len(shared), n), np.int64)
    lower = np.tril_indices(n)
    for number in range(num_swaps):
        pull = inside @ weights  # (cell whose position, cell where): what it would share with all others there
        own = np.diag(pull)
        gain = pull + pull.T - own[:, None] - own + 2 * inside * weights
        tabu = until[order] > number
        gain[tabu & tabu.T & (now + gain <= top + 1e-9)] = -np.inf
        gain[lower] = -np.inf
        first, second = divmod(int(np.round(gain, _DIGITS).argmax()), n)
        now += gain[first, second]
        until[order[first], first], until[order[second], second] = number + generator.integers(n // 2, 2 * n, 2)
        pair, turned = [first, second], [second, first]
        order[pair], inside[pair] = order[turned], inside[turned]
        inside[:, pair] = inside[:, turned]
        if now > top + 1e-9:
            top, best = now, order.copy()
    return best


def _grown_from(
    shared: Float64[np.ndarray, "L L"], candidates: Int64[np.ndarray, " n"], first: int, rows: int, columns: int
) -> Int64[np.ndarray, " n"]:
    """A picture that grows from one position, wherever in it that is: each time the position and the place beside those
    taken that share most, as long as all fits into the grid."""
    high, wide = 2 * rows + 1, 2 * columns + 1
    picture = np.full((high, wide), -1)
    sums, num = np.zeros((len(shared), high, wide)), np.zeros((high, wide))
    row, column = np.arange(high)[:, None], np.arange(wide)
    left = np.zeros(len(shared), bool)
    left[candidates] = True
    top = bottom = rows
    start = end = columns
    position, place = first, (rows, columns)
    while True:
        picture[place], left[position] = position, False
        r, c = place
        top, bottom, start, end = min(top, r), max(bottom, r), min(start, c), max(end, c)
        for there in ((r, c + 1), (r + 1, c), (r, c - 1), (r - 1, c)):
            if 0 <= there[0] < high and 0 <= there[1] < wide:
                sums[(slice(None), *there)] += shared[position]
                num[there] += 1
        if not left.any():
            return picture[top : top + rows, start : start + columns].ravel()
        fits = (np.maximum(row, bottom) - np.minimum(row, top) < rows) & (
            np.maximum(column, end) - np.minimum(column, start) < columns
        )
        able = (picture < 0) & (num > 0) & fits
        score = sums[left][:, able] / np.sqrt(num[able])
        which, where = divmod(int(np.round(score, _DIGITS).argmax()), score.shape[1])
        position = int(np.flatnonzero(left)[which])
        place = tuple(np.argwhere(able)[where].tolist())


def _regrown(
    shared: Float64[np.ndarray, "L L"],
    weights: Float64[np.ndarray, "n n"],
    candidates: Int64[np.ndarray, " n"],
    picture: Int64[np.ndarray, " n"],
    generator: np.random.Generator,
) -> Int64[np.ndarray, " n"]:
    """The picture with its empty cells (−1) filled: of the cells with most around them that is known, the one whose
    best position stands out most from the second."""
    picture, left = picture.copy(), np.zeros(len(shared), bool)
    left[candidates] = True
    known = np.flatnonzero(picture >= 0)
    left[picture[known]] = False
    score = shared[:, picture[known]] @ weights[known]  # (L, n)
    around, strength = np.abs(weights[known]).sum(0), np.abs(weights)
    while left.any():
        free, able = np.flatnonzero(picture < 0), np.flatnonzero(left)
        cells = free[np.argsort(-np.round(around[free], _DIGITS), kind="stable")[:_CANDIDATES]]
        found = score[np.ix_(able, cells)]
        found = found + _NOISE * found.std() * generator.standard_normal(found.shape)
        ranked = np.sort(found, axis=0)
        margin = ranked[-1] - ranked[-2] if len(able) > 1 else ranked[0]
        which = int(margin.argmax())
        position, cell = able[int(found[:, which].argmax())], cells[which]
        picture[cell], left[position] = position, False
        score += np.outer(shared[:, position], weights[cell])
        around = around + strength[cell]
    return picture

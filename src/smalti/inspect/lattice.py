"""Which cell of a grid each position is, from nothing but how much every two positions share: a free permutation.

Placing positions so that those that share much are neighbours is a quadratic assignment problem (Koopmans and Beckmann
1957), too large to be solved exactly. It is solved as jigsaw puzzles are: patches grow from every position by the
best match, a tabu search swaps pairs of cells (Taillard 1991), and then part of the best picture is kept, put elsewhere
and the rest grown anew (ruin and recreate; Schrimpf et al. 2000), as long as that explains more. What is right but for
the order of its rows or columns, folded pictures above all, is mended as a whole.

The sums that are compared in it are exact: what is added is rounded to few enough binary digits. So they do not depend
on the order in which a processor adds.

Letters: L positions, n = h · w cells, K kinds of pairs of cells.
"""

from collections.abc import Iterator
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
_DIGITS = 9  # explained shares are compared by so many digits: what is equal but for rounding is a tie
_BINARY_DIGITS = 16  # of what is multiplied and added up, in units of its mean: the sums then need fewer than 53
_CANDIDATES = 4  # cells with most around them that are filled, among which a growing picture goes on
_NOISE = 0.1  # of the scores in regrowing, so that it does not end in the same picture each time
SAME = 0.005
"""Explained shares that differ by less, relatively, are those of one picture but for some empty cells."""
_PATIENCE = 120  # rounds without a gain after which a start is given up
_NUM_SWAPS = 40  # of the tabu search after a picture is grown anew
_NUM_MENDED = 3  # of the pictures with rows or columns changed, the best, in which cells are swapped


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

        # what a search adds up: in units of the mean, and rounded so that sums are exact
        self.unit = max(float(every.mean()), 1e-300)
        self.exact = _exact(shared / self.unit)

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


def _exact(values: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Rounded to so few binary digits that sums of products do not depend on the order."""
    return np.rint(values * 2.0**_BINARY_DIGITS) / 2.0**_BINARY_DIGITS


def fit_lattice(
    shared: Float64[np.ndarray, "L L"],
    candidates: Int64[np.ndarray, " n"],
    rows: int,
    columns: int,
    *,
    num_rounds: int = 400,
    num_starts: int = 10,
    goal: float | None = None,
    seed: int = 0,
) -> Placement:
    """The best placement found of these positions in a grid, up to mirror images, turns and, if it is square,
    transposition. It ends where two starts lead to the same, or one explains as much as `goal`. `shared` must not be
    negative."""
    generator = np.random.default_rng(seed)
    criterion = Criterion(shared, rows, columns)
    best: Placement | None = None
    starts = grown_starts(criterion, candidates, generator)
    for number in range(num_starts):
        found = _recreated(criterion, starts[number % len(starts)], num_rounds, generator, goal)
        agrees = best is not None and abs(found.explained - best.explained) <= SAME * best.explained
        if best is None or found.explained > best.explained:
            best = found
        if agrees or (goal is not None and is_reached(best, goal)):
            break
    assert best is not None
    return best


def is_reached(placement: Placement, goal: float) -> bool:
    """Whether it explains as much, but for the place of some empty cells."""
    return placement.explained >= (1 - SAME) * goal


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
        improved = _swapped(criterion.exact, adjacent, grown, 100, generator)
        found.setdefault(criterion(improved), improved)
    return [Placement(found[explained], explained) for explained in sorted(found, reverse=True)]


def refined(criterion: Criterion, start: Int64[np.ndarray, " n"], *, seed: int = 0) -> Placement:
    """The placement after swaps of cells, as long as they explain more."""
    generator, best = np.random.default_rng(seed), Placement(start, criterion(start))
    for _ in range(4):
        swapped = _swapped(criterion.exact, _weights(criterion, best.positions), best.positions, 100, generator)
        if (explained := criterion(swapped)) <= best.explained:
            return best
        best = Placement(swapped, explained)
    return best


def _recreated(
    criterion: Criterion, start: Placement, num_rounds: int, generator: np.random.Generator, goal: float | None
) -> Placement:
    """Better and better pictures: a rectangle of the best one is kept, perhaps mirrored or moved, the rest grown anew.

    The weights of the kinds are those of pictures in general first: the means of a start that is wrong would only
    confirm it.
    """
    rows, columns = criterion.rows, criterion.columns
    weights, since = _general_weights(criterion), 0
    best = mended(criterion, start, weights, generator)
    for number in range(num_rounds):
        if since >= _PATIENCE or (goal is not None and is_reached(best, goal)):
            break
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
        grown = _regrown(criterion.exact, weights, np.sort(best.positions), picture.ravel(), generator)
        swapped = _swapped(criterion.exact, weights, grown, _NUM_SWAPS, generator)
        since += 1
        if (explained := criterion(swapped)) > best.explained:
            best, since = mended(criterion, Placement(swapped, explained), weights, generator), 0
            if number > num_rounds // 20:
                weights = _weights(criterion, best.positions)
    return refined(criterion, best.positions, seed=int(generator.integers(2**31)))


def mended(
    criterion: Criterion,
    best: Placement,
    weights: Float64[np.ndarray, "n n"] | None = None,
    generator: np.random.Generator | None = None,
) -> Placement:
    """The picture with whole rows or columns put elsewhere or turned round, and cells swapped then, as long as that
    explains more. Swaps are judged by `weights`: None, those of pictures in general."""
    weights = _general_weights(criterion) if weights is None else weights
    generator = generator or np.random.default_rng(0)
    shape = criterion.rows, criterion.columns
    while True:
        changed = np.unique([one.ravel() for one in _with_lines_changed(best.positions.reshape(shape))], axis=0)
        explained = np.array([criterion(positions) for positions in changed])
        before = best
        for place in np.argsort(-explained, kind="stable")[:_NUM_MENDED]:
            swapped = _swapped(criterion.exact, weights, changed[place], _NUM_SWAPS, generator)
            found = max((changed[place], swapped), key=criterion)
            if criterion(found) > best.explained:
                best = Placement(found, criterion(found))
        if best.explained <= before.explained:
            return best


def _with_lines_changed(picture: Int64[np.ndarray, "h w"]) -> Iterator[Int64[np.ndarray, "h w"]]:
    """Every stretch of columns, and of rows, in reverse order, upside down, or both; put at the beginning; its ends
    swapped. And folded pictures unfolded, in which mirror images lie side by side: 4 3 5 2 6 1 7 0, or 0 7 6 1 2 5 4 3.
    """
    for lines, turn in ((picture.T, True), (picture, False)):  # `lines` is a list of columns, or of rows
        found = [
            np.concatenate([lines[1::2][::-1], lines[::2]]),
            np.concatenate([lines[np.isin(np.arange(len(lines)) % 4, (0, 3)) == first][::step] for first, step in
                            ((True, 1), (False, -1))]),
        ]  # fmt: skip
        for start in range(len(lines)):
            for end in range(start + 1, len(lines) + 1):
                before, stretch, after = lines[:start], lines[start:end], lines[end:]
                ends_swapped = np.concatenate([stretch[-1:], stretch[1:-1], stretch[:1]])[: len(stretch)]
                for one in (stretch[::-1], stretch[:, ::-1], stretch[::-1, ::-1], ends_swapped):
                    found.append(np.concatenate([before, one, after]))
                found.append(np.concatenate([stretch, before, after]))
        yield from (one.T if turn else one for one in found)


def _weights(criterion: Criterion, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, "n n"]:
    return _centred(criterion.means(positions)[criterion.kinds] / criterion.unit)


def _general_weights(criterion: Criterion) -> Float64[np.ndarray, "n n"]:
    """What cells of coloured digits and of emoji share on average, by kind, in units of the mean of all pairs."""
    means = np.full(NUM_KINDS, 0.8)
    means[: _SIDE**2] = 0, 3.2, 1.5, 3.4, 2.1, 1.3, 1.8, 1.4, 1.1
    means[_MIRRORED_COLUMNS : _MIRRORED_COLUMNS + 2] = 1.5, 1.2
    return _centred(means[criterion.kinds])


def _centred(weights: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
    weights = _exact(weights - weights.mean())
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
    where they lately were, unless it beats all so far. The sum of shared · weights over pairs is made large; both are
    `_exact`."""
    n, order = len(positions), positions.copy()
    inside = shared[np.ix_(order, order)]
    pull = inside @ weights  # (cell whose position, cell where): what it would share with all others there
    now = top = float(pull.trace()) / 2
    best, until = order.copy(), np.zeros((n, n), np.int64)  # row: the position that is in that cell now
    tenures, twice = generator.integers(n // 2, 2 * n, (num_swaps, 2)), 2 * weights
    not_again = np.where(np.tri(n, dtype=bool), -np.inf, 0.0)  # each pair of cells once
    for number in range(num_swaps):
        own = pull.diagonal()
        gain = pull + pull.T
        gain -= own[:, None]
        gain -= own
        gain += inside * twice
        gain += not_again
        place = int(gain.argmax())
        if now + gain.flat[place] <= top:
            tabu = until > number
            place = int(np.where(tabu & tabu.T, -np.inf, gain).argmax())
        pair, turned = list(divmod(place, n)), list(divmod(place, n))[::-1]
        now += float(gain.flat[place])
        until[pair, pair] = number + tenures[number]
        for rows in (order, until, inside, pull):
            rows[pair] = rows[turned]
        first, second = pair
        pull += np.outer(inside[:, second] - inside[:, first], weights[first] - weights[second])
        inside[:, pair] = inside[:, turned]
        if now > top:
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
    strength = np.abs(weights)
    around = strength[known].sum(0)
    while left.any():
        free, able = np.flatnonzero(picture < 0), np.flatnonzero(left)
        cells = free[np.argsort(-around[free], kind="stable")[:_CANDIDATES]]
        found = score[np.ix_(able, cells)]
        found = found + np.round(_NOISE * found.std(), _DIGITS) * generator.standard_normal(found.shape)
        ranked = np.sort(found, axis=0)
        margin = ranked[-1] - ranked[-2] if len(able) > 1 else ranked[0]
        which = int(margin.argmax())
        position, cell = able[int(found[:, which].argmax())], cells[which]
        picture[cell], left[position] = position, False
        score += np.outer(shared[:, position], weights[cell])
        around = around + strength[cell]
    return picture

"""The grid that lines of codes were read from, found in the mutual information between their positions.

A hypothesis is a shape, the positions outside it, and an order of reading: row by row (raster), every other row
backwards (snake), from the border inwards (spiral), along the diagonals, or row by row with the columns in another
order. It says which pairs of positions are neighbours and which mirror images: in a face the halves of a row tell more
of each other than neighbours do. How much pairs share is averaged over each kind of pair on one half of the lines, and
judged on the other. A named order has three rivals:

- the best that any named order explains of the same lines with their cells shuffled: what chance can look like;
- the line without a picture, where positions share by how far apart they stand;
- every other map: if no named order is the best, the cells are placed freely (`lattice.py`), twice more on halves of
  the lines, and a map is believed that far as the halves find the same neighbours again.

"No grid" is an answer. What codes alone cannot tell: which side is left, which is up, and rows from columns, since the
mirrored or transposed picture has the same neighbours. Letters: N lines, L positions, w columns, h rows, n cells.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Integer

from smalti.inspect.lattice import (
    NUM_KINDS,
    REACH,
    Criterion,
    Placement,
    cell_kinds,
    fit_lattice,
    is_reached,
    refined,
)
from smalti.inspect.pair_counts import Halves, PairCounts, num_classes_for, sorted_lines
from smalti.inspect.positions import (
    check_codes,
    merge_codes,
    position_statistics,
    positions_that_count,
    special_positions,
)
from smalti.stopping import end_if_stopped

ORDERS = ("raster", "snake", "spiral", "diagonal", "map")
OUTSIDE = -1
"""Row and column of a position outside the grid."""
MIN_EXPLAINED = 0.1
"""A grid that explains less of what positions share than this is none."""
MIN_AGREEMENT = 0.85
"""Share of a free map's neighbours that halves of the lines must find again for it to be believed."""
MAX_FREE_CELLS = 144
"""Larger grids are looked for in named orders only: a free map takes the square of the cells, often."""
NUM_SHUFFLES = 20
_NUM_REFITS = 2
_NUM_SEARCHES = 2  # for a map, if halves find a better one than all lines did
_NUM_CHECKED = 4  # halvings on which swaps are tried
_TIE = 0.05  # hypotheses whose explained shares differ by less, relatively, are told apart by their special positions
_COLUMN_TIE = 0.02  # the same for orders of columns, which are told apart by their emptiness
_NUM_JUDGED = 40  # hypotheses, the best by all lines, that are judged on halves
_MAX_REORDERED = 64  # more columns than this are taken as read: finding their order takes the cube of their number
_NUM_REORDERED = 12  # shapes whose columns are put in order
_MOST_ALIKE = 2  # of them of one size and order, but with other positions outside
_MAX_REFINED = 12  # more columns than this keep the order of a path through neighbours
_MIN_GAIN = 1.1  # what reordered columns, chosen among many, must explain over those as read, and a map over both
_STANDS = 1.15  # times what a right order explains, swaps of cells may: some cells are empty, and no picture is even
_MIN_ALIKE = 0.3  # correlation of what positions share in two halves of the lines
_CLEAR = 5.0  # standard deviations above shuffled cells that a named order must be
_MAX_REMOVED = 4  # positions with codes of their own of which all subsets are taken out
_LINE_REACH = 4  # places apart in a line that are told apart
_MAX_ASPECT = 4  # times as wide as high, beyond which a free map is not looked for
_MAX_FREE_SHAPES = 4


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which cell of a picture each position of a line is. Raises ValueError for an order that is none."""

    rows: int
    columns: int
    before: int = 0
    """Positions in front of the first cell."""
    after: int = 0
    order: str = "raster"
    column_order: tuple[int, ...] | None = None
    """The column of each cell of the first row as read; None: from left to right. For raster and snake."""
    between: tuple[int, ...] = ()
    """Positions outside the grid that stand between cells."""
    cell_order: tuple[int, ...] | None = None
    """For "map": the cell, counted row by row, of each position inside, in the order of the line."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is unknown; choose one of {', '.join(ORDERS)}.")
        if self.column_order is not None and sorted(self.column_order) != list(range(self.columns)):
            raise ValueError(f"column_order {self.column_order} does not name each of {self.columns} columns once.")
        if (self.order == "map") != (self.cell_order is not None):
            raise ValueError(f'cell_order belongs to the order "map", and only to it; the order is {self.order!r}.')
        if self.cell_order is not None and sorted(self.cell_order) != list(range(self.rows * self.columns)):
            raise ValueError(f"cell_order does not name each of {self.rows * self.columns} cells once.")
        if not all(self.before < place < self.length - self.after - 1 for place in self.between):
            raise ValueError(f"between {self.between} has positions that do not stand between cells.")

    @property
    def length(self) -> int:
        return self.before + self.rows * self.columns + len(self.between) + self.after

    @property
    def outside(self) -> list[int]:
        """The positions that are no cell."""
        return sorted([*range(self.before), *self.between, *range(self.length - self.after, self.length)])

    @cached_property
    def positions(self) -> Int64[np.ndarray, "h w"]:
        """The position of each cell: `codes[:, grid.positions]` are the pictures."""
        inside = np.delete(np.arange(self.length), self.outside)
        positions = np.empty(self.rows * self.columns, np.int64)
        visited = reading_order(self.order, self.rows, self.columns) if self.cell_order is None else self.cell_order
        positions[list(visited)] = inside
        positions = positions.reshape(self.rows, self.columns)
        if self.column_order is None:
            return positions
        placed = np.empty_like(positions)
        placed[:, list(self.column_order)] = positions
        return placed

    @cached_property
    def cells(self) -> Int64[np.ndarray, "L 2"]:
        """Row and column of each position, OUTSIDE for those not in the grid."""
        cells = np.full((self.length, 2), OUTSIDE)
        row, column = np.mgrid[: self.rows, : self.columns]
        cells[self.positions.ravel()] = np.stack([row.ravel(), column.ravel()], axis=1)
        return cells

    def neighbours(self, down: int, right: int) -> Int64[np.ndarray, " L"]:
        """The position so many rows down and columns right of each, OUTSIDE where there is none."""
        found = np.full(self.length, OUTSIDE)
        for position, (row, column) in enumerate(self.cells.tolist()):
            if row != OUTSIDE and 0 <= row + down < self.rows and 0 <= column + right < self.columns:
                found[position] = self.positions[row + down, column + right]
        return found

    @cached_property
    def edges(self) -> frozenset[tuple[int, int]]:
        """Pairs of positions, the smaller first, whose cells touch: what mirroring, turning and transposing keep."""
        here = self.positions
        pairs = [
            *zip(here[:, :-1].flat, here[:, 1:].flat, strict=True),
            *zip(here[:-1].flat, here[1:].flat, strict=True),
        ]
        return frozenset((int(min(pair)), int(max(pair))) for pair in pairs)

    @property
    def is_upright(self) -> bool:
        """Whether the order says where the picture begins, so that it stands as it was read."""
        return self.order != "map" and self.column_order is None

    def __str__(self) -> str:
        order = self.order if self.column_order is None else f"{self.order}, columns read as {self.column_order}"
        around = f", {self.before} before and {self.after} after" if self.before or self.after else ""
        inner = f", {', '.join(map(str, self.between))} between" if self.between else ""
        return f"{self.rows}×{self.columns} {order}{around}{inner}"


@lru_cache(maxsize=512)
def reading_order(order: str, rows: int, columns: int) -> tuple[int, ...]:
    """The cells, counted row by row, in the order in which they are read."""
    cells = np.arange(rows * columns).reshape(rows, columns)
    if order == "snake":
        cells[1::2] = cells[1::2, ::-1].copy()
    if order == "spiral":
        found = []
        while cells.size:
            found += cells[0].tolist()
            cells = np.rot90(cells[1:])  # what is left, turned so that its next side lies on top
        return tuple(found)
    if order == "diagonal":  # from corner to corner, every other diagonal backwards, as JPEG reads its coefficients
        diagonals = [np.fliplr(cells).diagonal(columns - 1 - number).tolist() for number in range(rows + columns - 1)]
        turned = [diagonal[::-1] if number % 2 == 0 else diagonal for number, diagonal in enumerate(diagonals)]
        return tuple(chain.from_iterable(turned))
    return tuple(cells.ravel().tolist())


@dataclass(frozen=True, kw_only=True)
class GridFinding:
    """What the lines say of their grid."""

    grid: Grid | None
    """None if no grid explains the lines better than chance, their order alone, or any other map."""
    confidence: float
    """How likely the answer is right, in [0, 1]: the grid, up to mirroring, turning and transposing; of a map, nine in
    ten of its neighbours; or that there is none. Never 1; `benchmarks/grid_calibration.py` counts how often it is."""
    column_confidence: float
    """Of the order of the columns; that of the grid if they stand as read."""
    explained: float
    """Share of the variance of what positions share, on lines not used in fitting, that the winner explains."""
    chance_explained: float
    """The most that any named order explains of the same lines with their cells shuffled."""
    runner_up: Grid | None
    """The shape or order that explains most of those that did not win."""
    runner_up_explained: float
    line_explained: float
    """The same for a model without a grid: distance along the line."""
    agreement: float | None
    """Of a map: share of its neighbours that halves of the lines find again, each by itself."""
    num_halvings: int
    information: Float64[np.ndarray, "L L"]
    """Mutual information between the positions, in nats, from all lines."""


def infer_grid(
    codes: Integer[np.ndarray, "N L"],
    vocab_size: int,
    *,
    num_halvings: int = 20,
    max_outside: int = 8,
    seed: int = 0,
) -> GridFinding:
    """The grid of lines that all have the same length. At most `max_outside` positions at the ends are taken to be
    outside it, and such between cells as look special.

    A few thousand lines are enough for 1,000 codes. The order of the lines makes no difference. Raises InputError for
    a code out of range.
    """
    check_codes(codes, vocab_size)
    codes = sorted_lines(codes)
    num_classes = num_classes_for(codes.shape[1])
    classes = merge_codes(codes, vocab_size, num_classes, seed=seed)[codes]
    counts = PairCounts(classes, num_classes, seed=seed)
    evidence = _evidence(counts, num_halvings, seed)
    statistics = position_statistics(codes, vocab_size)
    strange = {
        special.position: 2 if special.kind == "constant" else 1 for special in special_positions(codes, vocab_size)
    }
    strange |= {explained.position: 2 for explained in positions_that_count(codes)}
    named = _named(codes.shape[1], max_outside, strange)
    found = _decide_named(evidence, named, strange, statistics.entropy_nats, seed)
    if found.grid is None and _is_told(evidence, found):
        return replace(found, confidence=0.95)
    if found.grid is None or not _stands(found.grid, evidence):
        found = _decide_map(evidence, found, strange, seed)
    return found


# ---- what positions share ----


class _Shared(NamedTuple):
    """What positions share on the half that a hypothesis is fitted to, and on the one that it is judged by."""

    fitted: Float64[np.ndarray, "L L"]
    judged: Float64[np.ndarray, "L L"]
    information: Float64[np.ndarray, "L L"]
    """Of the half that is fitted, as it is."""


@dataclass(frozen=True)
class _Evidence:
    information: Float64[np.ndarray, "L L"]
    shared: Float64[np.ndarray, "L L"]
    halves: list[_Shared]


def _evidence(counts: PairCounts, num_halvings: int, seed: int) -> _Evidence:
    information = counts.information()
    halves = list(counts.halvings(num_halvings, seed=seed))
    noise = float(np.median([np.abs(half.fitted - half.judged) for half in halves]))
    return _Evidence(
        information, _shared(information, information, noise), [_shared_halves(half, noise) for half in halves]
    )


def _shared_halves(half: Halves, noise: float) -> _Shared:
    fitted, judged = (_shared(part, half.fitted, noise) for part in half)
    return _Shared(fitted, judged, half.fitted)


def _shared(
    information: Float64[np.ndarray, "L L"], by: Float64[np.ndarray, "L L"], noise: float
) -> Float64[np.ndarray, "L L"]:
    """Information over the root of what is expected from how much both positions share with all others (the average
    product, Dunn et al. 2008). Over all of it, noise would rule: nearly empty cells share next to nothing with any; by
    the information itself, only the full ones would count."""
    mean = np.maximum(by, 0).mean(1)
    expected = np.outer(mean, mean) / max(float(mean.mean()), 1e-12)
    return np.round(np.maximum(information, 0) / np.sqrt(expected + max((4 * noise) ** 2, 1e-9)), 9)


class _Judge:
    """Explained shares of the hypotheses of one length."""

    def __init__(self, length: int) -> None:
        self._upper = np.triu_indices(length, 1)

    def kinds(self, grid: Grid) -> Int64[np.ndarray, " pairs"]:
        """How two positions lie to each other; one kind more for pairs that are not both inside."""
        kinds = np.full((grid.length, grid.length), NUM_KINDS)
        positions = grid.positions.ravel()
        kinds[np.ix_(positions, positions)] = _cell_kinds(grid.rows, grid.columns)
        return kinds[self._upper]

    def line_kinds(self) -> Int64[np.ndarray, " pairs"]:
        """How two positions lie in a line that is no picture: some places apart, or far."""
        return np.minimum(self._upper[1] - self._upper[0], _LINE_REACH + 1)

    def within(self, kinds: Int64[np.ndarray, " pairs"], shared: Float64[np.ndarray, "L L"]) -> float:
        """Share of the variance that the means of the kinds explain where they were taken."""
        return self._share(kinds, shared, shared)

    def across(self, kinds: Int64[np.ndarray, " pairs"], halves: list[_Shared]) -> Float64[np.ndarray, " S"]:
        """The same for means of one half on the other, for every halving."""
        return np.array([self._share(kinds, half.fitted, half.judged) for half in halves])

    def _share(self, kinds: Int64[np.ndarray, " pairs"], fitted: np.ndarray, judged: np.ndarray) -> float:
        fitted, judged = fitted[self._upper], judged[self._upper]
        if not len(kinds):
            return 0.0
        mean = np.bincount(kinds, fitted) / np.maximum(np.bincount(kinds), 1)
        error = ((judged - mean[kinds]) ** 2).sum()
        return round(float(1 - error / max(((judged - fitted.mean()) ** 2).sum(), 1e-300)), 9)


_cell_kinds = lru_cache(maxsize=256)(cell_kinds)


# ---- hypotheses ----


def _named(length: int, max_outside: int, strange: dict[int, int]) -> list[Grid]:
    """Every shape in every named order as it is read. Positions between cells are left out if they look special: none
    of them, or all that are constant, with any of the others."""
    found = dict.fromkeys(_shapes(length, (), max_outside))
    for removed in _removable(strange):
        found |= dict.fromkeys(_shapes(length, removed, min(max_outside, 2)))
    return list(found)


def _removable(strange: dict[int, int]) -> Iterator[tuple[int, ...]]:
    constant = [position for position, how in strange.items() if how == 2]
    own = [position for position, how in strange.items() if how == 1]
    sizes = range(len(own) + 1) if len(own) <= _MAX_REMOVED else (0, len(own))
    for some in chain.from_iterable(combinations(own, size) for size in sizes):
        if removed := sorted([*constant, *some]):
            yield tuple(removed)


def _shapes(length: int, removed: tuple[int, ...], max_outside: int) -> Iterator[Grid]:
    left = [position for position in range(length) if position not in removed]
    for outside in range(min(max_outside, len(left) - 4) + 1):
        inside = len(left) - outside
        for columns in range(2, inside // 2 + 1):
            if inside % columns:
                continue
            for before in range(outside + 1):
                cells = left[before : before + inside]
                for order in ORDERS[:-1]:
                    yield _grid_of(length, cells, inside // columns, columns, order)


def _grid_of(length: int, cells: list[int], rows: int, columns: int, order: str, **given) -> Grid:
    """The grid that has these positions, in rising order, inside."""
    between = tuple(sorted(set(range(cells[0], cells[-1])) - set(cells)))
    before, after = cells[0], length - 1 - cells[-1]
    return Grid(rows=rows, columns=columns, before=before, after=after, order=order, between=between, **given)


# ---- named orders ----


def _decide_named(
    evidence: _Evidence,
    named: list[Grid],
    strange: dict[int, int],
    entropy: Float64[np.ndarray, " L"],
    seed: int,
) -> GridFinding:
    length, num_halvings = len(evidence.shared), len(evidence.halves)
    judge = _Judge(length)
    kinds = {grid: judge.kinds(grid) for grid in named}
    by_all = {grid: judge.within(kinds[grid], evidence.shared) for grid in named}
    best = sorted(named, key=lambda grid: by_all[grid], reverse=True)[:_NUM_JUDGED]
    scores = {grid: judge.across(kinds[grid], evidence.halves) for grid in best}
    as_read = max((float(score.mean()) for score in scores.values()), default=0.0)
    for shape in _best_apart_from_columns(named, evidence.shared):
        reordered = _with_columns_in_order(shape, evidence.information, entropy)
        if reordered.column_order is not None:
            score = judge.across(judge.kinds(reordered), evidence.halves)
            if score.mean() > _MIN_GAIN * as_read:
                scores[reordered] = score
    line = judge.across(judge.line_kinds(), evidence.halves)
    wins = Counter(_winner({grid: s[i] for grid, s in scores.items()}, strange) for i in range(num_halvings))
    mean = {grid: float(score.mean()) for grid, score in scores.items()}
    winner = max(wins, key=lambda grid: (wins[grid], -1 if grid is None else mean[grid])) if wins else None
    runner_up = max((grid for grid in mean if grid != winner), key=lambda grid: mean[grid], default=None)
    explained = mean[winner] if winner is not None else 0.0
    chance, clear = _chance(judge, evidence, winner, kinds, entropy, seed)
    is_grid = (
        winner is not None
        and explained >= MIN_EXPLAINED
        and explained > float(line.mean()) + MIN_EXPLAINED / 2
        and clear
    )
    confidence = _of_votes(wins[winner], num_halvings) if is_grid else 0.5
    columns = confidence
    if is_grid and winner is not None and winner.column_order is not None:
        plain = replace(winner, column_order=None)
        agree = [
            _with_columns_in_order(plain, half.information, entropy).edges == winner.edges for half in evidence.halves
        ]
        columns = _of_votes(sum(agree), num_halvings)
    return GridFinding(
        grid=winner if is_grid else None,
        confidence=min(confidence, columns),
        column_confidence=columns,
        explained=explained,
        chance_explained=chance,
        runner_up=runner_up if is_grid else winner,
        runner_up_explained=mean[runner_up] if is_grid and runner_up is not None else explained,
        line_explained=float(line.mean()),
        agreement=None,
        num_halvings=num_halvings,
        information=evidence.information,
    )


def _of_votes(num_agreeing: int, num: int) -> float:
    """The rule of succession: twenty halvings that agree make no certainty."""
    return (num_agreeing + 1) / (num + 2)


def _winner(scores: dict[Grid, float], strange: dict[int, int]) -> Grid | None:
    """The best score; among equals, the grid that leaves outside what looks special, a constant before all, and nothing
    else. `strange` holds how special such a position is. A grid that only adds cells to the best is its equal further
    on: a nearly empty row fits as well outside."""
    if not scores:
        return None
    top = max(scores, key=lambda grid: scores[grid])
    best, tie = scores[top], _TIE * abs(scores[top])
    near = [grid for grid, score in scores.items() if score >= best - 2 * tie]
    equals = [grid for grid in near if scores[grid] >= best - tie or top.edges < grid.edges]
    return max(equals, key=lambda grid: (_fits_specials(grid, strange), scores[grid]))


def _fits_specials(grid: Grid, strange: dict[int, int]) -> int:
    return sum(strange.get(position, -1) for position in grid.outside)


def _chance(
    judge: _Judge,
    evidence: _Evidence,
    winner: Grid | None,
    kinds: dict[Grid, np.ndarray],
    entropy: Float64[np.ndarray, " L"],
    seed: int,
) -> tuple[float, bool]:
    """The most that the best hypothesis explains of shuffled cells, and whether the winner is clearly above it."""
    if winner is None:
        return 0.0, False
    generator = np.random.default_rng(seed)
    tried = sorted(kinds, key=lambda grid: judge.within(kinds[grid], evidence.shared), reverse=True)[:200]
    found = []
    for _ in range(NUM_SHUFFLES):
        end_if_stopped()
        shuffled = generator.permutation(len(evidence.shared))
        shared = evidence.shared[np.ix_(shuffled, shuffled)]
        best = max(judge.within(kinds[grid], shared) for grid in tried)
        if winner.column_order is not None:
            plain, information = replace(winner, column_order=None), evidence.information[np.ix_(shuffled, shuffled)]
            best = max(best, judge.within(judge.kinds(_with_columns_in_order(plain, information, entropy)), shared))
        found.append(best)
    explained = judge.within(judge.kinds(winner), evidence.shared)
    clear = explained > max(found) and explained > np.mean(found) + _CLEAR * np.std(found)
    return float(max(found)), bool(clear)


def _is_told(evidence: _Evidence, found: GridFinding) -> bool:
    """Whether there is no grid to look for: halves of the lines do not agree on what positions share, or the line alone
    explains most of it, and more than any named order."""
    upper = np.triu_indices(len(evidence.shared), 1)
    alike = np.mean([_correlation(half.fitted[upper], half.judged[upper]) for half in evidence.halves])
    return bool(alike < _MIN_ALIKE) or found.line_explained > max(0.5, found.explained)


def _correlation(first: Float64[np.ndarray, " pairs"], second: Float64[np.ndarray, " pairs"]) -> float:
    """0 where there are no pairs, or one is the same for all."""
    if not len(first):
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / max(np.sqrt((first**2).sum() * (second**2).sum()), 1e-300))


def _stands(grid: Grid, evidence: _Evidence) -> bool:
    """Whether swaps of cells that explain more of one half of the lines do not of the other."""
    judge, start = _Judge(grid.length), grid.positions.ravel()
    halves = evidence.halves[:_NUM_CHECKED]
    swapped = []
    for half in halves:
        positions = refined(Criterion(half.fitted, grid.rows, grid.columns), start).positions
        swapped += judge.across(
            judge.kinds(_map(grid.length, positions.reshape(grid.rows, grid.columns))), [half]
        ).tolist()
    return float(np.mean(swapped)) <= _STANDS * float(judge.across(judge.kinds(grid), halves).mean())


# ---- free maps ----


def _decide_map(evidence: _Evidence, named: GridFinding, strange: dict[int, int], seed: int) -> GridFinding:
    """A free map where it explains more than the best named order, and halves of the lines find it again."""
    judge, length = _Judge(len(evidence.shared)), len(evidence.shared)

    def placed(shared: np.ndarray, cells: list[int], rows: int, columns: int, **given: Any) -> Placement:
        end_if_stopped()
        return fit_lattice(shared, np.array(cells), rows, columns, **given)

    def explained_by(placement: Placement, rows: int, columns: int) -> float:
        return judge.within(judge.kinds(_map(length, placement.positions.reshape(rows, columns))), evidence.shared)

    shapes = list(_free_shapes(evidence, strange))
    if len(shapes) > 1:  # a short search each tells which of them is worth a long one
        tried = [placed(evidence.shared, *shape, num_starts=1, num_rounds=40, seed=seed) for shape in shapes]
        explained = [explained_by(one, *shape[1:]) for one, shape in zip(tried, shapes, strict=True)]
        shapes = [shapes[int(np.argmax(explained))]]
    if not shapes:
        return named
    [(cells, rows, columns)] = shapes
    criterion = Criterion(evidence.shared, rows, columns)
    found, again = placed(evidence.shared, cells, rows, columns, seed=seed), []
    halves = evidence.halves[:_NUM_REFITS]
    for _ in range(_NUM_SEARCHES):  # a half that finds what explains more of all lines shows that the search had failed
        again = [
            placed(half.fitted, cells, rows, columns, goal=goal, seed=seed + 1 + number)
            for number, half in enumerate(halves)
            for goal in [refined(Criterion(half.fitted, rows, columns), found.positions).explained]
        ]
        better = max((refined(criterion, one.positions) for one in again), key=lambda one: one.explained)
        is_found = is_reached(found, better.explained)
        found = max(found, better, key=lambda one: one.explained)
        if is_found:
            break
    best = recognised(length, found.positions.reshape(rows, columns))
    refits = [_map(length, one.positions.reshape(rows, columns)) for one in again]
    agreements = [len(refit.edges & best.edges) / len(best.edges) for refit in refits]
    judged = [float(judge.across(judge.kinds(refit), [half])[0]) for refit, half in zip(refits, halves, strict=True)]
    agreement, explained = float(np.mean(agreements)), float(np.mean(judged))
    rival = max(named.explained if named.grid is not None else 0.0, named.line_explained)
    if agreement >= MIN_AGREEMENT and explained >= max(MIN_EXPLAINED, rival + MIN_EXPLAINED / 2):
        confidence = min(agreement, 0.95)
        return replace(
            named,
            grid=best,
            confidence=confidence,
            column_confidence=confidence,
            explained=explained,
            runner_up=named.grid or named.runner_up,
            runner_up_explained=named.explained,
            agreement=agreement,
        )
    # a named order that a better map exists for is not right, even if that map is not sure
    doubted = named.grid is None or explained > _MIN_GAIN * named.explained
    unsure = 0.9 if agreement < MIN_AGREEMENT / 2 else 0.5
    return replace(
        named,
        grid=None if doubted else named.grid,
        confidence=unsure if doubted else min(named.confidence, 0.9),
        runner_up=best,
        runner_up_explained=explained,
        agreement=agreement,
    )


def _free_shapes(evidence: _Evidence, strange: dict[int, int]) -> Iterator[tuple[list[int], int, int]]:
    """Positions and shapes that a map is looked for in: with all positions, without those that always hold one code or
    a count, and without any others that look special too; the squarest shape of each, the squarest of all first."""
    length = len(evidence.shared)
    found = []
    for removed in dict.fromkeys([(), *_removable(strange)]):
        cells = [position for position in range(length) if position not in removed]
        rows = next((rows for rows in range(int(len(cells) ** 0.5), 2, -1) if len(cells) % rows == 0), None)
        if rows is not None and len(cells) <= MAX_FREE_CELLS and len(cells) // rows <= _MAX_ASPECT * rows:
            special = sum(strange[position] for position in removed)
            found.append((round(len(cells) / rows**2, 2), -special, cells, rows))
    for _, _, cells, rows in sorted(found)[:_MAX_FREE_SHAPES]:
        yield cells, rows, len(cells) // rows


def recognised(length: int, positions: Int64[np.ndarray, "h w"]) -> Grid:
    """The map by name where it has one, in one of the eight ways to turn and mirror it: a named order, perhaps with its
    columns in another order."""
    cells = sorted(positions.ravel().tolist())
    rank = np.searchsorted(cells, positions)
    for turned in _turned(rank):
        rows, columns = turned.shape
        for order in ORDERS[:-1]:
            if reading_order(order, rows, columns) == tuple(np.argsort(turned.ravel()).tolist()):
                return _grid_of(length, cells, rows, columns, order)
        for order in ("raster", "snake"):
            as_read = np.empty(rows * columns, np.int64)
            as_read[list(reading_order(order, rows, columns))] = np.arange(rows * columns)
            if turned[0].max() == columns - 1 and (turned == as_read.reshape(rows, columns)[:, turned[0]]).all():
                return _grid_of(length, cells, rows, columns, order, column_order=tuple(np.argsort(turned[0]).tolist()))
    return _map(length, positions)


def _map(length: int, positions: Int64[np.ndarray, "h w"]) -> Grid:
    order = np.argsort(positions.ravel())
    (rows, columns), cells = positions.shape, np.sort(positions.ravel()).tolist()
    return _grid_of(length, cells, rows, columns, "map", cell_order=tuple(order.tolist()))


def _turned(picture: Int64[np.ndarray, "h w"]) -> Iterable[Int64[np.ndarray, "h w"]]:
    for number in range(4):
        yield np.rot90(picture, number)
        yield np.rot90(picture, number)[:, ::-1]


def _best_apart_from_columns(shapes: list[Grid], shared: Float64[np.ndarray, "L L"]) -> list[Grid]:
    """The raster and snake shapes that explain most when nothing is assumed of the order of the columns, few of them
    of one size: half of a row explains as much where nothing is assumed, and so do other positions outside."""
    upper = np.triu_indices(len(shared), 1)
    score = {}
    for shape in shapes:
        if shape.order in ("raster", "snake") and shape.columns <= _MAX_REORDERED:
            row, column = shape.cells.T
            down = np.abs(row[:, None] - row)
            apart = np.minimum(down, REACH + 1) * 2 + (column[:, None] != column)
            inside = row != OUTSIDE
            kinds = np.where(inside[:, None] & inside, apart, 2 * REACH + 4)[upper]
            values = shared[upper]
            sums, num = np.bincount(kinds, values), np.maximum(np.bincount(kinds), 1)
            score[shape] = round(float((sums**2 / num).sum()), 9)
    chosen, num = [], Counter()
    for shape in sorted(score, key=lambda shape: score[shape], reverse=True):
        alike = shape.rows, shape.columns, shape.order
        num[alike] += 1
        if num[alike] <= _MOST_ALIKE:
            chosen.append(shape)
    return chosen[:_NUM_REORDERED]


# ---- the order of columns ----


class _ColumnFit:
    """How well an order of a grid's columns explains the information between rows at most two apart, each pair by the
    mean of its kind, which is rows and columns apart, or rows apart and mirror images.

    Unlike `_Judge`, it judges the information itself, not its ratio to what is expected, and knows exact mirror
    images only. Nearly empty columns share next to nothing with any other: by that ratio they fit anywhere, and an
    order with such columns as gaps between the others explained more of tokenized MNIST than the right one.
    """

    def __init__(self, shape: Grid, information: Float64[np.ndarray, "L L"]) -> None:
        (h, w), cells = shape.positions.shape, shape.positions.ravel()
        inside = information[np.ix_(cells, cells)]
        pairs = inside.reshape(h, w, h, w).transpose(0, 2, 1, 3)  # (h, h, w, w)
        row, column = np.arange(h), np.arange(w)
        rows_apart, columns_apart = (np.abs(place[:, None] - place) for place in (row, column))
        num_near = min(REACH + 1, h)
        self._by_rows = np.stack([pairs[rows_apart == apart].sum(0) for apart in range(num_near)])  # (3, w, w)
        mirrored = (column[:, None] + column == w - 1) & (columns_apart > 0)
        kind = np.where(mirrored, REACH + 2, np.minimum(columns_apart, REACH + 1))
        self._kinds = np.stack([kind + apart * (REACH + 3) for apart in range(num_near)]).ravel()
        num_pairs = [np.full((w, w), (rows_apart == apart).sum()) for apart in range(num_near)]
        num_pairs[0] -= h * np.eye(w, dtype=int)  # a position and itself are no pair
        self._num = np.maximum(np.bincount(self._kinds, np.ravel(num_pairs)), 1)
        in_rows = self._by_rows.sum((1, 2)) ** 2 / [max(num.sum(), 1) for num in num_pairs]
        squares = sum((pairs[rows_apart == apart] ** 2).sum() for apart in range(num_near))
        self._common, self._variance = float(in_rows.sum()), max(float(squares - in_rows.sum()), 1e-300)

    def __call__(self, order: list[int]) -> float:
        """The share of the variance that is explained if these columns, as read, stand from left to right."""
        sums = np.bincount(self._kinds, self._by_rows[:, np.array(order)[:, None], order].ravel())
        return float((sums**2 / self._num).sum() - self._common) / self._variance


def _with_columns_in_order(
    shape: Grid, information: Float64[np.ndarray, "L L"], entropy: Float64[np.ndarray, " L"]
) -> Grid:
    """The shape with its columns in the order that explains most.

    In symmetric pictures a column tells most of its mirror image: a path through columns that tell most of each other
    jumps from side to side. So that path, and the same unfolded from either end, are improved until no change explains
    more. Where the ring of columns is cut, and which are the inner ones, may make next to no difference; then `entropy`
    decides: pictures are emptier at their edges.
    """
    positions = shape.positions
    shared = np.mean([information[np.ix_(row, row)] for row in positions], axis=0)  # (w, w)
    order = _longest_path(shared)
    if shape.columns <= _MAX_REFINED:
        explained = _ColumnFit(shape, information)
        starts = (order, _unfolded(order), _unfolded(order[::-1]))
        order = max((_improved(start, explained) for start in starts), key=explained)
        half = len(order) // 2
        ways = [order[cut:] + order[:cut] for cut in range(len(order))]
        ways.append(order[:half][::-1] + order[half:-half] + order[-half:][::-1])
        as_good = [way for way in ways if explained(way) >= (1 - _COLUMN_TIE) * explained(order)]
        order = min(as_good, key=lambda way: entropy[positions[:, [way[0], way[-1]]]].mean())
    if order[0] > order[-1]:  # a mirrored picture has the same neighbours: one of the two is as good
        order = order[::-1]
    column_order = np.argsort(order)
    if (np.diff(column_order) == 1).all():
        return shape
    return replace(shape, column_order=tuple(column_order.tolist()))


def _unfolded(path: list[int]) -> list[int]:
    """A path that goes to and fro between mirror images, 0 7 6 1 2 5 4 3, as the row it folds: 0 1 2 3 4 5 6 7."""
    first = [node for place, node in enumerate(path) if place % 4 in (0, 3)]
    return first + [node for place, node in enumerate(path) if place % 4 in (1, 2)][::-1]


def _improved(order: list[int], score: Callable[[list[int]], float]) -> list[int]:
    """The order after swaps, moves and turned stretches, as long as one raises the score."""
    best, improved = score(order), True
    while improved:
        improved = False
        for start in range(len(order)):
            for end in range(start + 1, len(order)):
                swapped = order.copy()
                swapped[start], swapped[end] = swapped[end], swapped[start]
                for candidate in (swapped, *_changed(order, start, end + 1)):
                    if (found := score(candidate)) > best + 1e-9:
                        order, best, improved = candidate, found, True
    return order


def _longest_path(weights: Float64[np.ndarray, "w w"]) -> list[int]:
    """A path of much weight through all nodes: the best greedy one, then stretches turned or moved while that helps."""
    num = len(weights)
    path = max((_greedy_path(weights, start) for start in range(num)), key=lambda path: _path_weight(weights, path))
    improved = True
    while improved:
        improved = False
        for start in range(num):
            for end in range(start + 1, num):
                for candidate in _changed(path, start, end + 1):
                    if _path_weight(weights, candidate) > _path_weight(weights, path) + 1e-12:
                        path, improved = candidate, True
    return path


def _changed(path: list[int], start: int, end: int) -> Iterator[list[int]]:
    stretch, rest = path[start:end], path[:start] + path[end:]
    yield path[:start] + stretch[::-1] + path[end:]
    for place in (0, len(rest)):
        yield rest[:place] + stretch + rest[place:]
    if end - start == 2:  # a single node, to every other place
        node, others = path[start], path[:start] + path[start + 1 :]
        yield from ([*others[:place], node, *others[place:]] for place in range(len(path)))


def _greedy_path(weights: Float64[np.ndarray, "w w"], start: int) -> list[int]:
    path, left = [start], set(range(len(weights))) - {start}
    while left:
        path.append(max(left, key=lambda node: weights[path[-1], node]))
        left.remove(path[-1])
    return path


def _path_weight(weights: Float64[np.ndarray, "w w"], path: list[int]) -> float:
    return float(weights[path[:-1], path[1:]].sum())

"""The grid that lines of codes were read from, found in the mutual information between their positions.

A hypothesis is a shape, the number of positions before and after it, and an order of reading: row by row (raster),
every other row backwards (snake), either with the columns in another order. It says how far apart in the picture any
two positions are, and which are mirror images: in a face the halves of a row tell more of each other than neighbours
do. Mutual information is fitted as a function of that on one half of the lines and judged on the other; the hypothesis
that explains most wins, and how often it wins over random halvings is the confidence.

What codes alone cannot tell: which side is left, which is up, and rows from columns, since the mirrored or transposed
picture has the same neighbours. Letters: N lines, L positions, w columns, h rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64, Integer

from smalti.inspect.positions import (
    check_codes,
    merge_codes,
    mutual_information,
    position_statistics,
    special_positions,
)

ORDERS = ("raster", "snake")
OUTSIDE = -1
"""Row and column of a position outside the grid."""
MIN_EXPLAINED = 0.1
"""A grid that explains less of the mutual information than this is none."""
_MAX_DISTANCE = 2
_NUM_CLASSES = 24  # of codes with the same company, between which information is measured
_NEAR, _MIRRORED_COLUMNS, _MIRRORED_ROWS, _FAR = (part * (_MAX_DISTANCE + 1) ** 2 for part in range(4))
_NOT_INSIDE = _FAR + 1
_NUM_KINDS = _FAR + 2
_TIE = 0.02  # hypotheses whose explained shares differ by less, relatively, are told apart by their special positions
_MAX_REORDERED = 64  # more columns than this are taken as read: finding their order takes the cube of their number
_MAX_REFINED = 12  # more columns than this keep the order of a path through neighbours
_SHUFFLE_GAIN = 1.1  # what reordered columns must explain over those as read: their order is chosen among many


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
    """The column of each cell of the first row as read; None: from left to right."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is unknown; choose one of {', '.join(ORDERS)}.")
        if self.column_order is not None and sorted(self.column_order) != list(range(self.columns)):
            raise ValueError(f"column_order {self.column_order} does not name each of {self.columns} columns once.")

    @property
    def length(self) -> int:
        return self.before + self.rows * self.columns + self.after

    @cached_property
    def positions(self) -> Int64[np.ndarray, "h w"]:
        """The position of each cell: `codes[:, grid.positions]` are the pictures."""
        as_read = self.before + np.arange(self.rows * self.columns).reshape(self.rows, self.columns)
        if self.order == "snake":
            as_read[1::2] = as_read[1::2, ::-1].copy()
        if self.column_order is None:
            return as_read
        positions = np.empty_like(as_read)
        positions[:, list(self.column_order)] = as_read
        return positions

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

    def __str__(self) -> str:
        order = self.order if self.column_order is None else f"{self.order}, columns read as {self.column_order}"
        around = f", {self.before} before and {self.after} after" if self.before or self.after else ""
        return f"{self.rows}×{self.columns} {order}{around}"


@dataclass(frozen=True, kw_only=True)
class GridFinding:
    """What the lines say of their grid."""

    grid: Grid | None
    """None if no grid explains the lines better than their order alone."""
    confidence: float
    """Share of the random halvings in which this shape and order of reading won, in [0, 1]."""
    column_confidence: float
    """Share of the halvings that, each by itself, put the columns in this order; 1 if they stand as read."""
    explained: float
    """Share of the mutual information between positions, unseen in fitting, that the winner explains."""
    runner_up: Grid | None
    """The shape or order that explains most of those that did not win."""
    runner_up_explained: float
    line_explained: float
    """The same for a model without a grid: distance along the line."""
    num_halvings: int
    information: Float64[np.ndarray, "L L"]
    """Mutual information between the positions, in nats, from all lines."""


def infer_grid(
    codes: Integer[np.ndarray, "N L"],
    vocab_size: int,
    *,
    num_halvings: int = 10,
    max_outside: int = 8,
    seed: int = 0,
) -> GridFinding:
    """The grid of lines that all have the same length. At most `max_outside` positions are taken to be outside it.

    A few thousand lines are enough for 1,000 codes. Raises InputError for a code out of range.
    """
    check_codes(codes, vocab_size)
    classes = merge_codes(codes, vocab_size, _NUM_CLASSES, seed=seed)[codes]
    generator = np.random.default_rng(seed)
    halves = [_halves(classes, generator) for _ in range(num_halvings)]
    shapes = list(_shapes(codes.shape[1], max_outside))
    strange = {
        special.position: 2 if special.kind == "constant" else 1 for special in special_positions(codes, vocab_size)
    }
    scores = {shape: _explained(_kinds(shape), halves) for shape in shapes}
    entropy = position_statistics(codes, vocab_size).entropy_nats
    as_read = max((score.mean() for score in scores.values()), default=0.0)
    for shape in _best_apart_from_columns(shapes, halves):
        if shape.columns > _MAX_REORDERED:
            continue
        reordered = _with_columns_in_order(shape, halves, entropy)
        if reordered.column_order is None:
            continue
        score = _explained(_kinds(reordered), halves)
        if score.mean() > _SHUFFLE_GAIN * as_read:
            scores[reordered] = score
    line = _explained(_line_kinds(codes.shape[1]), halves)
    found = _decide(scores, line, strange, mutual_information(classes, _NUM_CLASSES, seed=seed))
    if found.grid is None or found.grid.column_order is None:
        return found
    as_read_shape = replace(found.grid, column_order=None)
    agree = [_with_columns_in_order(as_read_shape, [half], entropy) == found.grid for half in halves]
    return replace(found, column_confidence=sum(agree) / num_halvings)


def _decide(
    scores: dict[Grid, Float64[np.ndarray, " S"]],
    line: Float64[np.ndarray, " S"],
    strange: dict[int, int],
    information: Float64[np.ndarray, "L L"],
) -> GridFinding:
    num_halvings = len(line)
    wins = Counter(_winner({grid: s[i] for grid, s in scores.items()}, strange) for i in range(num_halvings))
    mean = {grid: float(s.mean()) for grid, s in scores.items()}
    ranked = sorted(wins, key=lambda grid: (wins[grid], -1 if grid is None else mean[grid]), reverse=True)
    winner = ranked[0] if ranked else None
    explained = mean[winner] if winner is not None else 0.0
    others = [grid for grid in mean if grid != winner]
    second = max(others, key=lambda grid: mean[grid], default=None)
    is_grid = winner is not None and explained >= MIN_EXPLAINED and explained > float(line.mean())
    return GridFinding(
        grid=winner if is_grid else None,
        confidence=wins[winner] / num_halvings if is_grid else 0.0,
        column_confidence=1.0,
        explained=explained if is_grid else 0.0,
        runner_up=second,
        runner_up_explained=mean[second] if second is not None else 0.0,
        line_explained=float(line.mean()),
        num_halvings=num_halvings,
        information=information,
    )


def _winner(scores: dict[Grid, float], strange: dict[int, int]) -> Grid | None:
    """The best score; among equals, the grid that leaves outside what looks special, a constant before all, and nothing
    else. `strange` holds how special such a position is."""
    if not scores:
        return None
    best = max(scores.values())
    equals = [grid for grid, score in scores.items() if score >= best - _TIE * abs(best)]
    return max(equals, key=lambda grid: (_fits_specials(grid, strange), scores[grid]))


def _fits_specials(grid: Grid, strange: dict[int, int]) -> int:
    outside = {*range(grid.before), *range(grid.length - grid.after, grid.length)}
    return sum(strange.get(position, -1) for position in outside)


# ---- hypotheses ----


def _shapes(length: int, max_outside: int) -> Iterator[Grid]:
    for outside in range(min(max_outside, length - 4) + 1):
        inside = length - outside
        for columns in range(2, inside // 2 + 1):
            if inside % columns == 0:
                for before in range(outside + 1):
                    for order in ORDERS:
                        yield Grid(
                            rows=inside // columns,
                            columns=columns,
                            before=before,
                            after=outside - before,
                            order=order,
                        )


def _kinds(grid: Grid, *, columns_known: bool = True) -> Int64[np.ndarray, "L L"]:
    """How two positions lie to each other, as a number: by rows and columns apart; else by those of one and the other's
    mirror image, left and right or above and below; else far, or not both inside. Without knowledge of the columns'
    order all different columns are equally far apart."""
    row, column = grid.cells.T
    down = np.abs(row[:, None] - row)
    right = np.abs(column[:, None] - column)
    if not columns_known:
        right = np.minimum(right, 1)
    kinds = np.full(down.shape, _FAR)
    ways = [(_MIRRORED_ROWS, np.abs(row[:, None] + row - (grid.rows - 1)), right)]
    if columns_known:
        ways.append((_MIRRORED_COLUMNS, down, np.abs(column[:, None] + column - (grid.columns - 1))))
    for first, rows_apart, columns_apart in (*ways, (_NEAR, down, right)):
        close = (rows_apart <= _MAX_DISTANCE) & (columns_apart <= _MAX_DISTANCE)
        kinds[close] = (first + rows_apart * (_MAX_DISTANCE + 1) + columns_apart)[close]
    if columns_known:  # where the halves of a row meet, mirror images are neighbours: they are like other mirror images
        across = (right > 0) & (down <= _MAX_DISTANCE) & (column[:, None] + column == grid.columns - 1)
        kinds[across] = (_MIRRORED_COLUMNS + down * (_MAX_DISTANCE + 1))[across]
    inside = row != OUTSIDE
    return np.where(inside[:, None] & inside, kinds, _NOT_INSIDE)


def _line_kinds(length: int) -> Int64[np.ndarray, "L L"]:
    """How two positions lie in a line that is no picture: one or two apart, or far."""
    place = np.arange(length)
    return np.minimum(np.abs(place[:, None] - place), _MAX_DISTANCE + 1)


def _best_apart_from_columns(shapes: list[Grid], halves: list["_Halves"]) -> list[Grid]:
    """The eight shapes that explain most when nothing is assumed of the order of the columns."""
    score = {shape: _explained(_kinds(shape, columns_known=False), halves).mean() for shape in shapes}
    return sorted(shapes, key=lambda shape: score[shape], reverse=True)[:8]


# ---- fitting ----


@dataclass(frozen=True, kw_only=True)
class _Halves:
    """Mutual information from two disjoint halves of the lines, over the pairs of positions, and what is expected of
    each pair from how much its two positions share with all others (the average product, Dunn et al. 2008)."""

    fitted: Float64[np.ndarray, "L L"]
    judged: Float64[np.ndarray, "L L"]
    expected: Float64[np.ndarray, "L L"]


def _halves(classes: Integer[np.ndarray, "N L"], generator: np.random.Generator) -> _Halves:
    rows = generator.permutation(len(classes))
    half = len(rows) // 2
    seed = int(generator.integers(2**31))
    fitted, judged = (
        mutual_information(classes[chosen], _NUM_CLASSES, seed=seed) for chosen in (rows[:half], rows[half:])
    )
    mean = np.maximum(fitted, 0).mean(1)
    return _Halves(fitted=fitted, judged=judged, expected=np.outer(mean, mean) / max(mean.mean(), 1e-12))


def _explained(kinds: Int64[np.ndarray, "L L"], halves: list[_Halves]) -> Float64[np.ndarray, " S"]:
    """1 − squared error / squared information on the judged half, the information being fitted as `expected` times a
    factor for each kind of pair; for every halving."""
    pairs = np.triu_indices(len(kinds), 1)
    kind = kinds[pairs]
    found = []
    for half in halves:
        expected, fitted, judged = half.expected[pairs], half.fitted[pairs], half.judged[pairs]
        products = np.bincount(kind, expected * fitted, minlength=_NUM_KINDS)
        squares = np.bincount(kind, expected**2, minlength=_NUM_KINDS)
        factor = products / np.maximum(squares, 1e-300)
        # what any model explains, one factor for all, is no merit of the grid
        common = products.sum() / max(squares.sum(), 1e-300)
        error = ((judged - factor[kind] * expected) ** 2).sum()
        found.append(1 - error / max(((judged - common * expected) ** 2).sum(), 1e-300))
    return np.array(found)


# ---- the order of columns ----


class _ColumnFit:
    """How well an order of a grid's columns explains the information between rows at most two apart, by the fitted
    halves: each pair by the mean of its kind, which is rows and columns apart, or rows apart and mirror images.

    Unlike `_explained`, it judges the information itself, not its ratio to what is expected, and knows exact mirror
    images only. Nearly empty columns share next to nothing with any other: by that ratio they fit anywhere, and an
    order with such columns as gaps between the others explained more of tokenized MNIST than the right one.
    """

    def __init__(self, shape: Grid, halves: list[_Halves]) -> None:
        (h, w), cells = shape.positions.shape, shape.positions.ravel()
        information = np.mean([half.fitted[np.ix_(cells, cells)] for half in halves], axis=0)
        pairs = information.reshape(h, w, h, w).transpose(0, 2, 1, 3)  # (h, h, w, w)
        row, column = np.arange(h), np.arange(w)
        rows_apart, columns_apart = (np.abs(place[:, None] - place) for place in (row, column))
        num_near = min(_MAX_DISTANCE + 1, h)
        self._by_rows = np.stack([pairs[rows_apart == apart].sum(0) for apart in range(num_near)])  # (3, w, w)
        mirrored = (column[:, None] + column == w - 1) & (columns_apart > 0)
        kind = np.where(mirrored, _MAX_DISTANCE + 2, np.minimum(columns_apart, _MAX_DISTANCE + 1))
        self._kinds = np.stack([kind + apart * (_MAX_DISTANCE + 3) for apart in range(num_near)]).ravel()
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


def _with_columns_in_order(shape: Grid, halves: list[_Halves], entropy: Float64[np.ndarray, " L"]) -> Grid:
    """The shape with its columns in the order that explains most.

    In symmetric pictures a column tells most of its mirror image: a path through columns that tell most of each other
    jumps from side to side. So that path, and the same unfolded from either end, are improved until no change explains
    more. Where the ring of columns is cut, and which are the inner ones, may make next to no difference; then `entropy`
    decides: pictures are emptier at their edges.
    """
    positions = shape.positions
    shared = np.mean([half.fitted[np.ix_(row, row)] for half in halves for row in positions], axis=0)  # (w, w)
    order = _longest_path(shared)
    if shape.columns <= _MAX_REFINED:
        explained = _ColumnFit(shape, halves)
        starts = (order, _unfolded(order), _unfolded(order[::-1]))
        order = max((_improved(start, explained) for start in starts), key=explained)
        half = len(order) // 2
        ways = [order[cut:] + order[:cut] for cut in range(len(order))]
        ways.append(order[:half][::-1] + order[half:-half] + order[-half:][::-1])
        as_good = [way for way in ways if explained(way) >= (1 - _TIE) * explained(order)]
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

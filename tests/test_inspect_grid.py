"""The grid is found in planted fields, however they were read; positions are told for what they are."""

import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from smalti.data.digit_sources import read_idx
from smalti.data.digits import LEVEL_STEP, ColouringConfig, SourceDigits, colour_digits
from smalti.errors import InputError
from smalti.inspect.grid import ORDERS, OUTSIDE, Grid, infer_grid, reading_order, recognised
from smalti.inspect.lattice import Criterion, Placement, cell_kinds, fit_lattice, mended
from smalti.inspect.pair_counts import PairCounts, sorted_lines
from smalti.inspect.positions import (
    explain_by_counts,
    merge_codes,
    mutual_information,
    position_statistics,
    special_positions,
)
from smalti.tasks.images import Pipeline


def markov_field(num: int, rows: int, columns: int, num_codes: int, seed: int = 0) -> np.ndarray:
    """Pictures whose cells mostly copy the cell to the left or the one above."""
    generator = np.random.default_rng(seed)
    field = generator.integers(0, num_codes, (num, rows, columns))
    chance = generator.random(field.shape)
    for r in range(rows):
        for c in range(columns):
            if c:
                field[:, r, c] = np.where(chance[:, r, c] < 0.4, field[:, r, c - 1], field[:, r, c])
            if r:
                field[:, r, c] = np.where(chance[:, r, c] > 0.6, field[:, r - 1, c], field[:, r, c])
    return field


def as_lines(field: np.ndarray, order: str, columns: tuple[int, ...] | None, before: int, after: int) -> np.ndarray:
    if columns is not None:
        field = field[:, :, list(columns)]
    if order == "snake":
        field = field.copy()
        field[:, 1::2] = field[:, 1::2, ::-1].copy()
    specials = field.max() + 1 + np.arange(before + after)
    specials = np.tile(specials, (len(field), 1))
    return np.concatenate([specials[:, :before], field.reshape(len(field), -1), specials[:, before:]], axis=1)


@pytest.mark.parametrize(
    ("rows", "width", "order", "columns", "before", "after"),
    [
        (5, 7, "raster", None, 0, 0),
        (7, 7, "raster", None, 1, 2),
        (7, 5, "snake", None, 1, 0),
        (3, 11, "snake", None, 0, 0),
        (7, 5, "raster", (2, 0, 4, 1, 3), 0, 1),
        (5, 7, "snake", (3, 0, 6, 2, 5, 1, 4), 1, 1),
    ],
)
def test_the_grid_is_found(rows, width, order, columns, before, after):
    lines = as_lines(markov_field(700, rows, width, 5), order, columns, before, after)
    found = infer_grid(lines, int(lines.max()) + 1, max_outside=4)
    assert found.grid is not None and found.column_confidence >= 0.5
    assert (found.grid.rows, found.grid.columns) == (rows, width)
    assert (found.grid.order, found.grid.before, found.grid.after) == (order, before, after)
    # an order of columns and its mirror image have the same neighbours
    expected = columns and {columns, tuple(width - 1 - c for c in columns)}
    assert found.grid.column_order is None if columns is None else found.grid.column_order in expected
    assert found.confidence >= 0.9
    assert found.explained > found.line_explained + 0.1


def faces(num: int, rows: int, columns: int, num_codes: int) -> np.ndarray:
    """Pictures whose right half mostly mirrors the left, with little in the outer columns."""
    field = markov_field(num, rows, columns, num_codes)
    generator = np.random.default_rng(2)
    mirrored = np.where(generator.random(field.shape) < 0.6, field[:, :, ::-1], field)
    field[:, :, columns // 2 :] = mirrored[:, :, columns // 2 :]
    for column in (0, columns - 1):
        field[:, :, column] = np.where(generator.random(field.shape[:2]) < 0.6, 0, field[:, :, column])
    return field


@pytest.fixture(scope="module")
def real_codes(shared_dir) -> dict[str, np.ndarray]:
    """Codes of pictures by the tokenizers that ship: coloured MNIST, 7 × 7, and emoji, 8 × 8."""
    ink = read_idx(shared_dir / "data" / "mnist" / "t10k-images-idx3-ubyte.gz", num_axes=3)[:2500]
    source = SourceDigits(ink > 127, np.zeros(len(ink), np.uint8))
    digits = colour_digits(source, "test", ColouringConfig()).pictures * LEVEL_STEP
    pngs = pq.read_table(shared_dir / "data" / "emoji" / "train.parquet", columns=["image"])["image"].to_pylist()
    pictures = {
        "digits": [Image.fromarray(picture) for picture in digits],
        "emoji": [Image.open(io.BytesIO(png)).resize((64, 64), Image.Resampling.BOX) for png in pngs[::4]],
    }
    return {name: Pipeline.load(name).encode(listed).numpy() for name, listed in pictures.items()}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("order", ["raster", "snake"])
@pytest.mark.parametrize(("name", "width"), [("digits", 7), ("emoji", 8)])
def test_the_grid_of_real_pictures_is_found(name, width, order, shuffled, real_codes):
    """Between a start and two specials behind, of which the second counts the different codes."""
    columns = tuple(np.random.default_rng(3).permutation(width).tolist())
    field = real_codes[name].reshape(-1, width, width)
    inside = as_lines(field, order, columns if shuffled else None, 0, 0) + 1
    count = np.array([[len(set(line))] for line in inside.tolist()])
    lines = np.concatenate([np.zeros_like(count), inside, np.full_like(count, 1025), count], axis=1)
    found = infer_grid(lines, 1026)
    grid = found.grid
    assert grid is not None and found.confidence >= 0.9
    assert (grid.rows, grid.columns, grid.order, grid.before, grid.after) == (width, width, order, 1, 2)
    if not shuffled:
        assert grid.column_order is None
    else:
        assert grid.column_order in (columns, tuple(width - 1 - column for column in columns))
        assert found.column_confidence >= 0.5


@pytest.mark.parametrize("seed", [3, 5])
def test_the_columns_of_plain_digits_are_put_in_order(seed):
    """Nearly empty columns tell next to nothing of any other: an order that uses them as gaps has its best chance."""
    columns = tuple(np.random.default_rng(seed).permutation(8).tolist())
    lines = as_lines(load_digits().images.astype(int) // 5, "raster", columns, 0, 0)
    found = infer_grid(lines, 4, max_outside=0)
    assert found.grid is not None and (found.grid.rows, found.grid.columns, found.grid.order) == (8, 8, "raster")
    assert found.grid.column_order in (columns, tuple(7 - column for column in columns))


@pytest.mark.parametrize("order", ["raster", "snake"])
@pytest.mark.parametrize("columns", [None, (3, 0, 6, 2, 7, 5, 1, 4)])
def test_symmetric_pictures_are_not_folded(order, columns):
    """Each half of a row tells most of the other: a grid of half the width, every other row backwards, would bring
    mirror images together; so would an order of columns that goes to and fro."""
    lines = as_lines(faces(900, 7, 8, 5), order, columns, 1, 2)
    found = infer_grid(lines, int(lines.max()) + 1, max_outside=4)
    assert found.grid is not None
    assert (found.grid.rows, found.grid.columns, found.grid.order) == (7, 8, order)
    assert (found.grid.before, found.grid.after) == (1, 2)
    expected = columns and {columns, tuple(7 - c for c in columns)}
    assert found.grid.column_order is None if columns is None else found.grid.column_order in expected


def test_the_grid_is_found_through_many_codes_of_few_kinds():
    """210 codes, 30 of each of 7 kinds: pairs of codes are too rare to count, their kinds are not."""
    kinds = markov_field(1500, 5, 7, 7)
    codes = kinds * 30 + np.random.default_rng(1).integers(0, 30, kinds.shape)
    lines = as_lines(codes, "raster", None, 1, 0)
    found = infer_grid(lines, int(lines.max()) + 1, max_outside=3)
    assert str(found.grid) == "5×7 raster, 1 before and 0 after"


def test_unrelated_positions_have_no_grid():
    lines = np.random.default_rng(0).integers(0, 7, (500, 35))
    found = infer_grid(lines, 7, max_outside=2)
    assert found.grid is None and found.confidence >= 0.9


def test_a_line_that_is_no_picture_has_no_grid():
    lines = markov_field(500, 1, 35, 7)[:, 0]
    found = infer_grid(lines, 7, max_outside=2)
    assert found.grid is None
    assert found.line_explained > 0.8


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 5),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    order=st.sampled_from(["raster", "snake"]),
    shuffled=st.booleans(),
    data=st.data(),
)
def test_a_grid_gives_back_the_picture(rows, width, before, after, order, shuffled, data):
    columns = tuple(data.draw(st.permutations(range(width)))) if shuffled else None
    picture = np.arange(rows * width).reshape(1, rows, width)
    line = as_lines(picture, order, columns, before, after)
    grid = Grid(rows=rows, columns=width, before=before, after=after, order=order, column_order=columns)
    assert (line[:, grid.positions] == picture).all()
    assert (
        (grid.cells == OUTSIDE).all(1).nonzero()[0] == [*range(before), *range(grid.length - after, grid.length)]
    ).all()
    below = grid.neighbours(1, 0)
    for position, (row, column) in enumerate(grid.cells.tolist()):
        if row == OUTSIDE or row + 1 == rows:
            assert below[position] == OUTSIDE
        else:
            assert grid.cells[below[position]].tolist() == [row + 1, column]


# ---- maps, chance, and what must make no difference ----


@pytest.fixture(scope="module")
def shuffled_cells() -> tuple[np.ndarray, frozenset]:
    """Pictures of 5 × 6 codes whose cells stand under one random permutation; the pairs that are neighbours."""
    field = markov_field(900, 5, 6, 5).reshape(900, -1)
    cells = np.random.default_rng(4).permutation(30)
    position = np.argsort(cells)
    edges = frozenset(tuple(sorted(int(position[c]) for c in edge)) for edge in Grid(rows=5, columns=6).edges)
    return field[:, cells], edges


def test_permuted_cells_are_mapped_and_not_called_a_raster(shuffled_cells):
    lines, edges = shuffled_cells
    found = infer_grid(lines, 5, max_outside=2)
    assert found.grid is not None and found.grid.order == "map" and found.confidence >= 0.9
    assert len(found.grid.edges & edges) >= 0.9 * len(edges)
    assert found.agreement is not None and found.agreement >= 0.9
    assert found.explained > 2 * found.runner_up_explained, "the best named order, which is none"


@pytest.mark.parametrize("order", ["spiral", "diagonal"])
def test_specials_may_stand_anywhere(order):
    field = markov_field(900, 5, 7, 5).reshape(900, -1)[:, list(reading_order(order, 5, 7))]
    lines = np.insert(field, [0, 11, 20], [5, 6, 7], axis=1)
    found = infer_grid(lines, 8, max_outside=2)
    assert found.grid is not None and found.confidence >= 0.9
    assert (found.grid.rows, found.grid.columns, found.grid.order) == (5, 7, order)
    assert found.grid.outside == [0, 12, 22] and found.grid.between == (12, 22)


@pytest.mark.parametrize("shape", [(2, 9), (5, 1), (50, 3), (3, 12)])
def test_too_little_to_tell_is_no_grid(shape):
    assert infer_grid(np.random.default_rng(0).integers(0, 3, shape), 3).grid is None
    assert infer_grid(np.zeros(shape, int), 3).grid is None


def test_bags_of_codes_have_no_grid():
    """Every line keeps its codes, but in an order of its own: positions share, and all alike."""
    lines = np.random.default_rng(0).permuted(markov_field(600, 5, 6, 5).reshape(600, -1), axis=1)
    assert infer_grid(lines, 5, max_outside=1).grid is None


def test_neither_the_order_of_lines_nor_threads_nor_a_last_bit_make_a_difference(monkeypatch):
    lines = as_lines(markov_field(700, 6, 5, 5), "raster", (2, 0, 4, 1, 3), 1, 0)
    plain = infer_grid(lines, 6, max_outside=1)
    with threadpoolctl.threadpool_limits(2):
        moved = infer_grid(lines[np.random.default_rng(1).permutation(len(lines))], 6, max_outside=1)
    assert (moved.information == plain.information).all()
    assert (moved.grid, moved.confidence, moved.explained) == (plain.grid, plain.confidence, plain.explained)
    exact = PairCounts.information

    def rounded(self, blocks=None):
        return exact(self, blocks).astype(np.float32).astype(np.float64)

    monkeypatch.setattr(PairCounts, "information", rounded)
    single = infer_grid(lines, 6, max_outside=1)
    assert (single.grid, single.confidence) == (plain.grid, plain.confidence)


def test_counts_by_block_give_the_same_information():
    lines = markov_field(2000, 3, 4, 6).reshape(2000, -1)
    counts = PairCounts(lines, 6)
    assert counts.num_blocks == 20
    difference = counts.information() - mutual_information(lines, 6)
    assert np.abs(difference).max() < 0.01  # each takes off the information of other unrelated lines
    pair = np.stack([lines[:, 0], lines[:, 1]], axis=1)
    joint = np.bincount(pair @ [6, 1], minlength=36) / 2000
    entropy = -(joint[joint > 0] * np.log(joint[joint > 0])).sum()
    assert counts._entropies(counts._together, np.arange(20))[0] == pytest.approx(entropy)
    [half] = counts.halvings(1)
    assert np.abs(half.fitted + half.judged - 2 * counts.information()).max() < 0.05
    assert (sorted_lines(lines[::-1]) == sorted_lines(lines)).all()


def test_explained_is_the_variance_between_kinds():
    generator = np.random.default_rng(0)
    shared = generator.random((13, 13))
    shared = shared + shared.T
    positions = generator.permutation(13)[:12]
    kinds = cell_kinds(3, 4)
    values: dict[int, list[float]] = {}
    for i in range(13):
        for j in range(i):
            inside = i in positions and j in positions
            kind = kinds[positions.tolist().index(i), positions.tolist().index(j)] if inside else -1
            values.setdefault(int(kind), []).append(float(shared[i, j]))
    every = np.concatenate([np.array(some) for some in values.values()])
    between = sum(len(some) * (np.mean(some) - every.mean()) ** 2 for some in values.values())
    expected = between / ((every - every.mean()) ** 2).sum()
    assert Criterion(shared, 3, 4)(positions) == pytest.approx(expected, abs=1e-8)


def test_a_lattice_is_placed_by_what_neighbours_share():
    """What cells share falls with their distance: the true placement, mirrored or turned, is the best."""
    row, column = np.mgrid[:4, :6].reshape(2, -1)
    distance = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    cells = np.random.default_rng(2).permutation(24)
    shared = np.where(distance > 0, 0.5**distance, 0)[np.ix_(cells, cells)]
    placed = fit_lattice(shared, np.arange(24), 4, 6, num_rounds=30, num_starts=2)
    position = np.argsort(cells).reshape(4, 6)
    assert recognised(24, placed.positions.reshape(4, 6)).edges == recognised(24, position).edges


@pytest.mark.parametrize("folded", [(4, 3, 5, 2, 6, 1, 7, 0), (0, 7, 6, 1, 2, 5, 4, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_folded_pictures_are_unfolded(folded, turned):
    """Each cell shares with its mirror image nearly as much as with its neighbours: no swap of two cells mends that."""
    row, column = np.mgrid[:8, :8].reshape(2, -1)
    apart = np.abs(row[:, None] - row) + np.minimum(
        np.abs(column[:, None] - column), 0.7 + np.abs(column[:, None] + column - 7)
    )
    shared = np.where(apart > 0, 0.6**apart, 0) * (1 - np.eye(64))
    criterion, picture = Criterion(shared, 8, 8), np.arange(64).reshape(8, 8)
    wrong = picture[:, list(folded)].T if turned else picture[:, list(folded)]
    start = Placement(wrong.ravel(), criterion(wrong.ravel()))
    found = mended(criterion, start)
    assert start.explained < found.explained == criterion(picture.ravel())
    assert recognised(64, found.positions.reshape(8, 8)).edges == Grid(rows=8, columns=8).edges


@given(
    rows=st.integers(2, 5), width=st.integers(2, 5), order=st.sampled_from(ORDERS[:-1]), turn=st.integers(0, 7),
    shuffled=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_map_is_called_by_its_name(rows, width, order, turn, shuffled, data):
    columns = tuple(data.draw(st.permutations(range(width)))) if shuffled and order in ("raster", "snake") else None
    grid = Grid(rows=rows, columns=width, before=1, order=order, column_order=columns)
    turned = np.rot90(grid.positions, turn % 4)
    called = recognised(grid.length, turned[:, ::-1] if turn > 3 else turned)
    assert called.order != "map" and called.edges == grid.edges


def test_a_grid_is_checked():
    with pytest.raises(ValueError, match="order 'hilbert' is unknown; choose one of raster, snake"):
        Grid(rows=2, columns=3, order="hilbert")
    with pytest.raises(ValueError, match='cell_order belongs to the order "map"'):
        Grid(rows=2, columns=3, order="map")
    with pytest.raises(ValueError, match="cell_order does not name each of 6 cells once"):
        Grid(rows=2, columns=3, order="map", cell_order=(0, 0, 1, 2, 3, 4))
    with pytest.raises(ValueError, match="that do not stand between cells"):
        Grid(rows=2, columns=3, before=1, between=(1,))
    with pytest.raises(ValueError, match="does not name each of 3 columns once"):
        Grid(rows=2, columns=3, column_order=(0, 0, 1))


def test_mutual_information_by_hand():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 4, 4000)
    lines = np.stack([first, first, first // 2, generator.integers(0, 4, 4000)], axis=1)
    information = mutual_information(lines, 4)
    assert information[0, 1] == pytest.approx(math.log(4), abs=0.01)
    assert information[0, 2] == pytest.approx(math.log(2), abs=0.01)
    assert abs(information[0, 3]) < 0.005
    assert (information == information.T).all() and (np.diag(information) == 0).all()


def test_independent_positions_have_no_information_on_average():
    """40 lines and 12 codes: the plug-in estimate alone would be above 1 nat everywhere."""
    information = mutual_information(np.random.default_rng(0).integers(0, 12, (40, 31)), 12)
    assert abs(information[np.triu_indices(31, 1)].mean()) < 0.02


def test_codes_of_one_kind_share_a_class():
    kinds = markov_field(2000, 5, 7, 5)
    codes = (kinds * 20 + np.random.default_rng(1).integers(0, 20, kinds.shape)).reshape(2000, -1)
    classes = merge_codes(codes, 100, 5).reshape(5, 20)
    assert all(len(set(row)) == 1 for row in classes.tolist())
    assert len(set(classes[:, 0].tolist())) == 5


def test_positions_are_told_for_what_they_are():
    field = markov_field(600, 5, 7, 5)
    field[:, 0, 3] = 0  # an empty place, whose code is common elsewhere
    lines = as_lines(field, "raster", None, 1, 1)
    rest = lines[:, 1:-1]
    lines[:, -1] = 100 + np.array([len(set(row)) for row in rest.tolist()])
    special = special_positions(lines, 110)
    assert [(s.position, s.kind) for s in special] == [(0, "constant"), (36, "own codes")]
    [explained] = [e for e in explain_by_counts(lines, 110, [36]) if "different codes" in e.property]
    assert explained.position == 36 and explained.share > 0.9


def test_position_statistics_by_hand():
    lines = np.array([[0, 1], [0, 2], [0, 1], [0, 2]])
    statistics = position_statistics(lines, 3)
    assert statistics.entropy_nats == pytest.approx([0.0, math.log(2) + 1 / 8])  # Miller and Madow: (2 − 1) / (2 · 4)
    assert statistics.num_used.tolist() == [1, 2]
    assert statistics.top_share.tolist() == [1.0, 0.5]
    assert statistics.kinship.tolist() == [0.0, 0.0]


def test_codes_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"codes run from 0 to 9; expected 0..7"):
        position_statistics(np.array([[0, 9], [1, 2]]), 8)
    with pytest.raises(InputError, match="at least 2 lines"):
        infer_grid(np.zeros((1, 9), int), 8)

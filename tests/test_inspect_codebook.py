"""Codes with planted habits are told by them: clumped, bound to a place, exchangeable, close in an embedding."""

import math

import numpy as np
import pytest
import torch

from smalti.inspect import clusters, codebook
from smalti.inspect.grid import Grid
from smalti.inspect.patches import average_patches, decoded_lens, swap_picture
from smalti.inspect.sequences import code_positions, pack_codes, picture_order
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.recipes.line_presets import line_layout
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary

GRID = Grid(rows=5, columns=7)


def random_lines(num: int, num_codes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_codes, (num, 35))


def test_burstiness():
    """Code 8 fills four places of one line in ten, code 9 each place of any line alike."""
    generator = np.random.default_rng(0)
    lines = random_lines(3000, 8)
    lines[generator.random(lines.shape) < 0.02] = 9
    for row in np.flatnonzero(generator.random(3000) < 0.1):
        lines[row, generator.permutation(35)[:4]] = 8
    statistics = codebook.code_statistics(lines, 11)
    assert statistics.burstiness[9] == pytest.approx(1, abs=0.05)
    # 4 · 0.1 / 35 at each place: a line has the code with 1 − (1 − p)^35 instead of 0.1
    expected = (1 - (1 - 0.4 / 35) ** 35) / 0.1
    assert statistics.burstiness[8] == pytest.approx(expected, rel=0.1)
    assert statistics.num_lines[8] * 4 >= statistics.num_occurrences[8] > statistics.num_lines[8] * 3
    assert math.isnan(statistics.burstiness[10]) and statistics.num_occurrences[10] == 0


def test_places():
    lines = random_lines(2000, 5)
    lines[:, 3] = 5
    places = codebook.code_places(lines, 7)
    assert places.binding_nats[5] == pytest.approx(math.log(35))
    assert places.top_position[5] == 3
    assert places.binding_nats[:5].max() < 0.05  # but for position 3 they stand anywhere
    assert math.isnan(places.binding_nats[6])
    share = codebook.border_share(places, GRID)
    assert share[5] == 1.0
    assert share[0] == pytest.approx(19 / 34, abs=0.03)  # 20 of 35 cells are border, one of them is taken


def test_background_keeps_to_the_border():
    """Code 5 fills the border but for one cell of every other line, where code 2 stands; inside are codes 0 to 4."""
    field = random_lines(400, 5).reshape(-1, 5, 7)
    inner = field[:, 1:-1, 1:-1].copy()
    field[:] = 5
    field[:, 1:-1, 1:-1] = inner
    field[::2, 0, 3] = 2
    border, inside = codebook.border_and_inside(field.reshape(-1, 35), 7, GRID)
    assert border[5] == pytest.approx(1 - 0.5 / 20) and border[2] == pytest.approx(0.5 / 20)
    assert inside[5] == 0 and inside[:5].sum() == pytest.approx(1)
    assert inside[2] == pytest.approx((inner == 2).mean())
    flat = codebook.border_and_inside(np.zeros((3, 14), int), 2, Grid(rows=2, columns=7))
    assert flat[0][0] == 1 and np.isnan(flat[1]).all(), "two rows have no inside"


def test_attracted_neighbours():
    field = random_lines(800, 11).reshape(-1, 5, 7)
    field[:, :, 1:][(field[:, :, :-1] == 3)] = 4
    table = codebook.co_occurrence(field.reshape(-1, 35), 11, GRID, down=0, right=1)
    assert table.sum() == 800 * 5 * 6
    assert table[3, 4] == table[3].sum()
    best = codebook.attracted_pairs(table, num=1)[0]
    assert (best.code, best.other) == (3, 4)
    below = codebook.co_occurrence(np.arange(35)[None].repeat(2, 0), 35, GRID, down=1, right=0)
    assert {(a, b) for a, b in zip(*below.nonzero(), strict=True)} == {(p, p + 7) for p in range(28)}


@pytest.mark.parametrize("grid", [GRID, None])
def test_codes_that_swap_are_found(grid):
    """Each code copies its left neighbour often; codes 2 and 9 are one code written at random in two ways."""
    generator = np.random.default_rng(0)
    field = generator.integers(0, 9, (1500, 5, 7))
    for column in range(1, 7):
        copied = generator.random((1500, 5)) < 0.6
        field[:, :, column] = np.where(copied, (field[:, :, column - 1] + 1) % 9, field[:, :, column])
    field[(field == 2) & (generator.random(field.shape) < 0.5)] = 9
    lines = field.reshape(-1, 35)
    similarity = codebook.context_similarity(lines, 11, grid)
    assert np.allclose(similarity, similarity.T) and np.allclose(np.diag(similarity)[:10], 1)
    assert (similarity[10] == 0).all()
    swaps = codebook.swappable_codes(similarity, np.bincount(lines.ravel(), minlength=11), num=3)
    assert (swaps[0].code, swaps[0].other) == (2, 9)
    assert swaps[0].score > 0.9 > 0.5 > swaps[1].score
    named = [code for swap in swaps for code in (swap.code, swap.other)]
    assert len(named) == len(set(named))


def test_what_the_model_expects_instead_counts():
    similarity = np.eye(5)
    instead = np.full((5, 5), 0.01)
    np.fill_diagonal(instead, 0.5)
    instead[1, 3] = instead[3, 1] = 0.4
    count = np.full(5, 100)
    [best, *_] = codebook.swappable_codes(similarity, count, instead, num=1)
    assert (best.code, best.other) == (1, 3)
    assert best.score == pytest.approx(0.8 / 2)


def tiny_model(num_codes: int = 11, length: int = 35):
    torch.manual_seed(0)
    layout = line_layout(length, num_codes)
    config = TransformerConfig(num_layers=2, d_model=24, num_heads=3, d_ff=29, max_length=layout.max_length)
    return new_model(layout, config).eval(), layout


def test_predicted_instead_is_a_mean_of_distributions():
    model, layout = tiny_model()
    lines = random_lines(5, 10)
    packed = pack_codes(layout, "lines", lines)
    found = codebook.predicted_instead(model, layout, packed, batch_size=2)
    assert found[:10].sum(1).numpy() == pytest.approx(np.ones(10))
    assert (found[10] == 0).all()
    log_probs = model.logits(model.hidden(packed.token_ids[:, :-1]))[..., 1:].double().softmax(-1)
    by_hand = log_probs[packed.token_ids[:, 1:] == 4 + 1].mean(0)
    assert torch.allclose(found[4], by_hand, atol=1e-7)


def test_neighbours_and_clusters_of_embeddings():
    """Codes 0..9 point one way, 10..19 another; all are far from the origin, which must not matter."""
    generator = np.random.default_rng(0)
    centres = np.repeat(np.array([[10.0, 0, 0], [0, 10.0, 0]]), 10, axis=0)
    table = 100 + centres + generator.normal(size=(20, 3))
    nearest = codebook.nearest_codes(table, [3, 14], among=range(20), num=9)
    assert sorted([3, *nearest[3]]) == list(range(10))
    assert sorted([14, *nearest[14]]) == list(range(10, 20))
    groups = codebook.cluster_codes(table, range(20), 2)
    assert len(set(groups[:10])) == len(set(groups[10:])) == 1 and groups[0] != groups[10]
    for method in codebook.PROJECTIONS:
        points = codebook.project_codes(table, range(20), method)
        apart = np.linalg.norm(points[:10].mean(0) - points[10:].mean(0))
        assert points.shape == (20, 2) and apart > points[:10].std()
    with pytest.raises(ValueError, match="method 'umap' is unknown; choose one of pca, t-sne"):
        codebook.project_codes(table, range(20), "umap")


def test_k_means_by_hand():
    """On a line, with a weight: the centre of the left group is drawn to the heavy point."""
    points = np.array([[0.0], [1.0], [1.0], [10.0], [11.0], [40.0]])
    groups = clusters.k_means(points, 3)
    assert groups[0] == groups[1] == groups[2] and groups[3] == groups[4] and len(set(groups)) == 3
    heavy = clusters.k_means(points, 2, weights=np.array([1.0, 1, 1, 1, 1, 1e-6]))
    assert heavy[0] == heavy[2] != heavy[3] == heavy[4], "a point that weighs nothing has no group of its own"
    assert sorted(set(clusters.k_means(points, 20).tolist())) == list(range(5)), "equal points are one"
    assert (clusters.k_means(np.ones((4, 2)), 3) == 0).all()


def test_singular_vectors_and_components():
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(60, 5)) * (9, 5, 3, 2, 1) @ generator.normal(size=(5, 40))
    matrix += generator.normal(size=(60, 40)) * 0.1
    left, values = clusters.leading_vectors(matrix, 4)
    true_left, true_values, _ = np.linalg.svd(matrix, full_matrices=False)
    assert values == pytest.approx(true_values[:4])
    assert np.abs((left * true_left[:, :4]).sum(0)) == pytest.approx(np.ones(4))
    plane = clusters.principal_components(matrix)
    variance = np.linalg.eigvalsh(np.cov(matrix.T))[::-1]
    assert plane.var(0, ddof=1) == pytest.approx(variance[:2]) and plane.mean(0) == pytest.approx(np.zeros(2))
    assert abs(plane[:, 0] @ plane[:, 1]) < 1e-6


def test_embeddings_are_the_codes_rows():
    model, layout = tiny_model()
    tables = codebook.code_embeddings(model, layout)
    assert tables["input"].shape == tables["output"].shape == (11, 24)
    assert np.allclose(tables["input"][4], model.embed_tokens.weight[5].detach().numpy())


def test_sequences_end_with_the_codes():
    vocabulary = Vocabulary({"special": ["<bos>", "<eoi>", "<eot>"], "image": 11, "text": 7})
    orders = {"first": "<bos> <eoi> text{2} <eot> image{5}", "last": "<bos> <eot> image{5} <eoi> text{2}"}
    layout = Layout.parse(vocabulary, orders)
    assert picture_order(layout) == "last"
    assert code_positions(layout, "first") == range(5, 10)
    codes, text = random_lines(3, 11)[:, :5], np.ones((3, 2), int)
    packed = pack_codes(layout, "last", codes, text)
    assert packed.token_ids.shape == (3, 7)
    assert (packed.token_ids[:, 2:].numpy() - 3 == codes).all()
    open_layout = Layout.parse(vocabulary, {"open": "<bos> text{..4} <eot> image{5}"})
    with pytest.raises(ValueError, match="open span"):
        code_positions(open_layout, "open")


class FlatCells:
    """An image tokenizer whose code k paints its 2 × 3 cell with k / 10."""

    class config:
        codebook_size, grid = 11, (5, 7)

    def decode_codes(self, codes):
        return (codes / 10).repeat_interleave(2, 1).repeat_interleave(3, 2)[:, None]


def test_patches():
    codes = torch.from_numpy(random_lines(13, 10)).view(13, 5, 7)
    average, count = average_patches(FlatCells(), codes, batch_size=4)  # pyright: ignore[reportArgumentType]
    assert average.shape == (11, 1, 2, 3)
    assert torch.allclose(average[:10, 0, 0, 0], torch.arange(10) / 10)
    assert count.sum() == 13 * 35 and count[10] == 0 and (average[10] == 0).all()
    before, after = swap_picture(FlatCells(), codes[0], 4, 9)  # pyright: ignore[reportArgumentType]
    differs = (before != after)[0, ::2, ::3]
    assert (differs == (codes[0] == 4)).all()
    lens = decoded_lens(FlatCells(), torch.stack([codes, codes + 1]))  # pyright: ignore[reportArgumentType]
    assert lens.shape == (2, 13, 1, 10, 21)
    with pytest.raises(ValueError, match="one row"):
        average_patches(FlatCells(), codes.view(13, 1, 35))  # pyright: ignore[reportArgumentType]

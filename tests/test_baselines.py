"""Baselines: hand-worked counts, distributions that sum to one, and sources whose entropy is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from smalti.evaluate.baselines import (
    Counts,
    KneserNey,
    PlaceBigram,
    PositionUnigram,
    lzma_nats,
    mixture_weights,
    score_baselines,
    unigram,
)

CODES = arrays.arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 5)), elements=st.integers(0, 4))
PREDICTORS = {
    "position": PositionUnigram.fit,
    "bigram": lambda codes, size: KneserNey.fit(codes, size, 1),
    "4-gram": lambda codes, size: KneserNey.fit(codes, size, 3),
    "place bigram": PlaceBigram.fit,
}


def markov_lines(transition, num_lines, length, seed=0):
    """Lines of a first-order Markov chain that starts in code 0's row."""
    source = np.random.default_rng(seed)
    cumulative = transition.cumsum(1)
    codes = np.zeros((num_lines, length), np.int64)
    before = np.zeros(num_lines, np.int64)
    for place in range(length):
        before = (source.random(num_lines)[:, None] > cumulative[before]).sum(1)
        codes[:, place] = before
    return codes


def test_the_unigram_by_hand():
    # 0, 0, 1 of four codes: (2 + 1) / (3 + 4), (1 + 1) / 7, 1 / 7, 1 / 7
    assert unigram(np.array([[0, 0, 1]]), 4) == pytest.approx([3 / 7, 2 / 7, 1 / 7, 1 / 7])


def test_interpolation_by_hand():
    contexts = np.array([9, 9, 9, 9, 5], np.uint64)
    counts = Counts.of(contexts, np.array([0, 0, 1, 2, 3]))
    # Pairs seen once: (9, 1), (9, 2), (5, 3); twice: (9, 0). So d = 3 / (3 + 2) = 0.6.
    assert counts.discount == pytest.approx(0.6)
    asked = np.array([9, 9, 9, 7], np.uint64)
    lower = np.array([0.5, 0.2, 0.1, 0.25])
    found = counts.interpolate(asked, np.array([0, 1, 4, 0]), lower)
    # Context 9: 4 tokens, 3 different codes, so 0.6 · 3 / 4 = 0.45 goes to the lower order; context 7 was never seen.
    assert found == pytest.approx([1.4 / 4 + 0.45 * 0.5, 0.4 / 4 + 0.45 * 0.2, 0.45 * 0.1, 0.25])


def test_the_lowest_order_counts_what_a_code_followed_not_how_often():
    # 1 follows the start, 0 and 2; 0 follows the start (twice) and 1; 2 follows the start: six different pairs.
    model = KneserNey.fit(np.array([[0, 1], [0, 1], [1, 0], [2, 1]]), 4, 1)
    assert model.lower == pytest.approx(np.array([2 + 1, 3 + 1, 1 + 1, 1]) / (6 + 4))


@pytest.mark.parametrize("name", PREDICTORS)
@given(train=CODES, held_out=CODES)
def test_every_prediction_is_a_distribution(name, train, held_out):
    fitted = PREDICTORS[name](train, 5)
    place = held_out.shape[1] - 1
    total = 0
    for code in range(5):
        held_out[:, place] = code
        total = total + fitted.probabilities(held_out).reshape(held_out.shape)[:, place]
    np.testing.assert_allclose(total, 1, atol=1e-12)


def test_a_bigram_source_is_learned_to_its_entropy():
    transition = np.random.default_rng(1).dirichlet(np.full(7, 0.5), 7)
    train, held_out = markov_lines(transition, 3000, 23), markov_lines(transition, 500, 23, seed=1)
    before = np.concatenate([np.zeros((500, 1), np.int64), held_out[:, :-1]], axis=1)
    true_nats = -np.log(transition[before, held_out]).mean()  # of this very sample: nothing is left to chance
    scores = {score.name: score.nats_per_token for score in score_baselines(train, held_out, 7)}
    assert scores["bigram (Kneser-Ney)"] == pytest.approx(true_nats, abs=0.01)
    assert scores["uniform"] == pytest.approx(math.log(7))
    assert scores["unigram"] > true_nats + 0.1
    assert scores["mixture of the four above"] < true_nats + 0.01


def test_a_source_of_positions_is_learned_by_position_alone():
    source = np.random.default_rng(2)
    shares = source.dirichlet(np.full(5, 0.5), 11)

    def lines(n):
        return (source.random((n, 11, 1)) > shares.cumsum(1)).sum(2)

    train, held_out = lines(3000), lines(500)
    true_nats = -np.log(shares[np.arange(11), held_out]).mean()
    scores = {score.name: score.nats_per_token for score in score_baselines(train, held_out, 5)}
    assert scores["per-position unigram"] == pytest.approx(true_nats, abs=0.01)
    assert scores["unigram"] > true_nats + 0.1


def test_the_mixture_finds_who_is_right():
    good, bad = np.full(100, 0.5), np.full(100, 0.01)
    assert mixture_weights(np.stack([good, bad])) == pytest.approx([1, 0], abs=1e-6)
    # Two experts, each sure of its own half: at equal weights nothing improves on one half each.
    halves = np.where(np.arange(100) < 50, 0.9, 0.1)
    assert mixture_weights(np.stack([halves, 1 - halves])) == pytest.approx([0.5, 0.5])


def test_the_standard_error_is_of_lines():
    train = np.array([[0, 1], [1, 0], [0, 0]])
    held_out = np.array([[0, 0], [1, 1]])
    [_, score, *_] = score_baselines(train, held_out, 2)
    nats = -np.log(np.array([5, 3]) / 8)  # (4 + 1) and (2 + 1) of (6 + 2)
    assert score.nats_per_token == pytest.approx(nats.mean())
    assert score.standard_error == pytest.approx(abs(nats[0] - nats[1]) / 2)


def test_the_compressor_sees_that_lines_come_again():
    codes = np.random.default_rng(0).integers(0, 256, (200, 20))
    again, new = lzma_nats(codes, codes[:50]), lzma_nats(codes, codes[50:100, ::-1])
    assert again < 0.5 < 4 < new


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ([[0, 7]], [[0, 1]], r"training codes are 0 to 7; expected 0 to 4"),
        ([[0, 1]], [[0, -1]], r"held-out codes are -1 to 0; expected 0 to 4"),
        (np.zeros((0, 3)), [[0, 1]], "there are no training codes"),
    ],
)
def test_bad_codes_are_explained(train, held_out, message):
    with pytest.raises(ValueError, match=message):
        score_baselines(np.array(train, np.int64), np.array(held_out, np.int64), 5)

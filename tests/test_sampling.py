"""From logits to ids: filters against brute force, draws against the inverse of the cumulative distribution."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from noticing import fails_at

from smalti.engine.sampling import SampleConfig, draw, filter_logits, guide, log_prob_of, sample

# Quarters make ties frequent and sums of probabilities that reach p exactly rare.
tied_logits = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=17)


def kept(logits: torch.Tensor, *, by: Callable = filter_logits, **filters) -> set[int]:
    """The ids a filter leaves of one row; checks that it leaves their logits alone."""
    filtered = by(logits[None], **filters)[0]
    left = filtered > -math.inf
    assert torch.equal(filtered[left], logits[left])
    return set(left.nonzero()[:, 0].tolist())


def ranked(logits: list[float]) -> list[int]:
    """The likeliest first; among equals the lower id first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def check_top_k(logits: list[float], k: int, by: Callable = filter_logits) -> None:
    assert kept(torch.tensor(logits), by=by, top_k=k) == set(ranked(logits)[:k])


@given(tied_logits, st.integers(1, 20))
def test_top_k_keeps_exactly_k_even_among_equals(logits, k):
    check_top_k(logits, k)


def test_top_k_of_zero_keeps_all():
    assert kept(torch.tensor([1.0, 1.0, -3.0]), top_k=0) == {0, 1, 2}


@given(tied_logits, st.floats(0.001, 0.999))
def test_top_p_keeps_the_fewest_ids_that_reach_p(logits, p):
    probs = softmax(logits)
    found = kept(torch.tensor(logits, dtype=torch.float64), top_p=p)
    order = ranked(logits)
    assert found == set(order[: len(found)])
    # up to rounding the set reaches p, and no smaller set does: the likeliest of one fewer stay below it
    assert math.fsum(probs[i] for i in order[: len(found)]) > p - 1e-12
    assert math.fsum(probs[i] for i in order[: len(found) - 1]) < p + 1e-12


@given(tied_logits, st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, share):
    probs = softmax(logits)
    found = kept(torch.tensor(logits, dtype=torch.float64), min_p=share)
    assert ranked(logits)[0] in found
    for token_id, prob in enumerate(probs):
        if abs(prob - share * max(probs)) > 1e-12:
            assert (token_id in found) == (prob > share * max(probs))


@given(tied_logits, st.integers(1, 9), st.floats(0.05, 0.95), st.floats(0.01, 0.9))
def test_filters_apply_one_after_the_other(logits, k, p, share):
    together = filter_logits(torch.tensor([logits]), top_k=k, top_p=p, min_p=share)
    after = torch.tensor([logits])
    for one in ({"top_k": k}, {"top_p": p}, {"min_p": share}):
        after = filter_logits(after, **one)
    assert torch.equal(together, after)
    assert (together > -math.inf).any()


def test_top_p_takes_its_share_of_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    assert kept(logits, top_p=0.55) == {0, 1}
    assert kept(logits, top_k=2, top_p=0.55) == {0}  # 0.4 of 0.7 is 0.571


def test_rows_are_filtered_on_their_own():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    filters = {"top_k": 6, "top_p": 0.8, "min_p": 0.05}
    together = filter_logits(logits, **filters)
    for row in range(7):
        assert torch.equal(filter_logits(logits[row : row + 1], **filters)[0], together[row])


def test_filters_equal_llamagens(shared_dir):
    folder = shared_dir / "golden" / "llamagen_gpt_c2i"
    io = np.load(folder / "io.npz")
    logits = torch.from_numpy(io["filter_logits"])
    for settings in json.loads((folder / "config.json").read_text())["filters"]:
        ordered = logits.sort(descending=True).values
        k = settings["top_k"]
        if k:  # LlamaGen keeps whatever equals the k-th; without ties that is exactly k
            assert bool((ordered[:, k - 1] > ordered[:, k]).all())
        found = filter_logits(logits, top_k=k, top_p=settings["top_p"]) > -math.inf
        assert torch.equal(found, torch.from_numpy(io[settings["name"]]))


def test_a_filter_that_keeps_ties_is_found_out():
    def by_threshold(logits, *, top_k):
        return logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)

    check_top_k([1.0, 2.0, 0.0, 0.5], 2, by_threshold)
    check_top_k([1.0, 2.0, 1.0, 1.0], 2)
    fails_at("assert kept(", check_top_k, [1.0, 2.0, 1.0, 1.0], 2, by_threshold)


def test_draws_on_a_grid_of_uniform_numbers_count_out_the_distribution():
    """Numbers (i + 1/2) / 1000 hit an id of probability m / 1000 exactly m times."""
    shares = [0, 250, 1, 0, 0, 500, 49, 200, 0]
    logits = torch.tensor(shares, dtype=torch.float64).log().expand(1000, -1)
    ids = draw(logits.softmax(-1), (torch.arange(1000).double() + 0.5) / 1000)
    assert torch.bincount(ids, minlength=9).tolist() == shares
    assert torch.equal(ids, ids.sort().values)  # the inverse of an increasing function increases


LARGEST_UNIFORM = 1 - 2**-53


@given(
    st.lists(st.floats(-40, 40) | st.just(-math.inf), min_size=1, max_size=40).filter(lambda x: max(x) > -math.inf),
    st.sampled_from([0.0, 2**-53, 0.5, 1 - 2**-24, LARGEST_UNIFORM]) | st.floats(0, LARGEST_UNIFORM),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_an_id_of_probability_zero_is_never_drawn(logits, uniform, dtype):
    row = torch.tensor([logits], dtype=dtype)
    (token_id,) = draw(row.softmax(-1), torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert 0 <= token_id < len(logits)
    assert row[0, token_id] > -math.inf
    cumulative = row[0].double().softmax(-1).cumsum(-1)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    assert cumulative[token_id] >= uniform - rounding
    assert token_id == 0 or cumulative[token_id - 1] <= uniform + rounding


@pytest.mark.parametrize("n", [1, 2, 1021, 16411])
def test_the_largest_uniform_number_draws_the_last_possible_id(n):
    """Sums of many probabilities end a little beside 1, on either side."""
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(200, n, generator=generator)
    logits = torch.cat((torch.full((200, 3), -math.inf), logits, torch.full((200, 5), -math.inf)), dim=1)
    last = draw(logits.softmax(-1), torch.full((200,), LARGEST_UNIFORM, dtype=torch.float64))
    assert bool((last < n + 3).all())
    first = draw(logits.softmax(-1), torch.zeros(200, dtype=torch.float64))
    assert first.tolist() == [3] * 200


def test_a_row_draws_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 1021, generator=generator)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    config = SampleConfig(temperature=0.9, top_k=100, top_p=0.95)
    ids, log_probs = sample(logits, uniforms, config)
    for rows in (slice(5, 6), slice(0, 7), slice(63, 64)):
        alone, alone_log_probs = sample(logits[rows], uniforms[rows], config)
        assert torch.equal(alone, ids[rows])
        assert torch.allclose(alone_log_probs, log_probs[rows], atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(),
        SampleConfig(temperature=0.6),
        SampleConfig(temperature=1.7, top_k=5),
        SampleConfig(top_p=0.7),
        SampleConfig(temperature=1.3, top_k=7, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_log_probs_are_those_of_what_is_drawn(config):
    """They sum to 1 over all ids, equal the formula, and are the frequencies (chi-square, 0.1 %)."""
    generator = torch.Generator().manual_seed(11)
    logits = 1.5 * torch.randn(1, 11, generator=generator, dtype=torch.float64)
    scaled = filter_logits(logits / config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    probs = log_prob_of(scaled.expand(11, -1), torch.arange(11)).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    left = [i for i in range(11) if scaled[0, i] > -math.inf]
    by_hand = softmax([float(logits[0, i]) / config.temperature for i in left])
    assert probs[left].tolist() == pytest.approx(by_hand)

    N = 20000
    ids, log_probs = sample(logits.expand(N, -1), torch.rand(N, generator=generator, dtype=torch.float64), config)
    assert torch.allclose(log_probs, probs[ids].log())
    counts = torch.bincount(ids, minlength=11)
    assert set(counts.nonzero()[:, 0].tolist()) <= set(left)
    assert len(left) == 1 or scipy.stats.chisquare(counts[left], N * probs[left]).pvalue > 1e-3


def test_temperature_zero_takes_the_likeliest_with_certainty():
    ids, log_probs = sample(
        torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]]), torch.rand(2), SampleConfig(temperature=0)
    )
    assert ids.tolist() == [1, 0]
    assert log_probs.tolist() == [0, 0]


def test_a_low_temperature_goes_over_into_the_greedy_choice():
    logits = torch.randn(50, 13, generator=torch.Generator().manual_seed(0)) * 80
    ids, log_probs = sample(logits, torch.full((50,), 0.999), SampleConfig(temperature=1e-6))
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(log_probs, torch.zeros(50))


def test_sampling_leaves_the_logits_as_they_were():
    logits = torch.randn(3, 7)
    before = logits.clone()
    sample(logits, torch.rand(3), SampleConfig(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1))
    assert torch.equal(logits, before)


def test_guidance_by_hand():
    cond, null = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[1.0, 1.0], [0.5, -1.0]])
    assert torch.equal(guide(cond, null, 1.0), cond)
    assert torch.equal(guide(cond, null, 0.0), null)
    assert guide(cond, null, 3.0).tolist() == [[4.0, -5.0], [0.5, 11.0]]
    assert guide(cond, null, -1.0).tolist() == [[0.0, 3.0], [0.5, -5.0]]
    assert guide(cond, null, torch.tensor([[3.0], [0.0]])).tolist() == [[4.0, -5.0], [0.5, -1.0]]


@given(st.floats(-3, 9), st.integers(0, 6))
def test_guidance_multiplies_odds(scale, seed):
    """Guided probabilities are proportional to cond^scale · null^(1 − scale)."""
    cond, null = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    guided = guide(cond, null, scale).softmax(-1)
    product = cond.softmax(-1) ** scale * null.softmax(-1) ** (1 - scale)
    assert torch.allclose(guided, product / product.sum(), atol=1e-12)


def test_schedules_by_hand():
    def scales(**options) -> list[float]:
        config = SampleConfig(guidance_scale=5.0, **options)
        return [config.guidance_at(step, 4) for step in range(4)]

    assert scales() == [5, 5, 5, 5]
    assert scales(guidance_schedule="linear") == pytest.approx([1, 2, 3, 4])
    assert scales(guidance_schedule="linear", guidance_power=2.0) == pytest.approx([1, 1.25, 2, 3.25])
    root = math.sqrt(0.5)
    assert scales(guidance_schedule="cosine") == pytest.approx([1, 3 - 2 * root, 3, 3 + 2 * root])
    assert scales(guidance_interval=(1, 3)) == [1, 5, 5, 1]
    assert scales(guidance_interval=(2, None)) == [1, 1, 5, 5]
    assert scales(guidance_interval=(0, 0)) == [1, 1, 1, 1]
    assert scales(guidance_schedule="linear", guidance_interval=(2, 3)) == pytest.approx([1, 1, 3, 1])


def test_power_cosine_is_rars(shared_dir):
    folder = shared_dir / "golden" / "rar"
    settings = json.loads((folder / "config.json").read_text())["generate"]
    expected = np.load(folder / "io.npz")["cfg_scale_per_step"]
    config = SampleConfig(
        guidance_scale=settings["guidance_scale"],
        guidance_schedule="cosine",
        guidance_power=settings["guidance_scale_pow"],
    )
    assert [config.guidance_at(step, 16) for step in range(16)] == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1; expected 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, r"top_k is -1; expected 0 \(off\) or more"),
        ({"top_p": 0.0}, r"top_p is 0\.0; expected a share in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"min_p": -0.1}, r"min_p is -0\.1; expected a share in \[0, 1\]"),
        ({"min_p": 1.1}, r"min_p is 1\.1"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf; expected a number within"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan; expected a number within"),
        ({"guidance_scale": -1e31}, r"guidance_scale is -1e\+31; expected a number within"),
        ({"guidance_schedule": "cubic"}, "guidance_schedule is cubic; expected constant, linear, cosine"),
        ({"guidance_power": 0.0}, r"guidance_power is 0\.0; expected more than 0"),
        ({"guidance_interval": (-1, None)}, r"guidance_interval is \(-1, None\); expected 0 <= start <= end"),
        ({"guidance_interval": (3, 2)}, r"guidance_interval is \(3, 2\)"),
    ],
)
def test_settings_that_cannot_be_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.9}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"guidance_scale": 2.0}],
)
def test_whatever_reshapes_the_distribution_is_not_plain(options):
    assert SampleConfig().is_plain
    assert not SampleConfig(**options).is_plain

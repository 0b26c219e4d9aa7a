"""Distances of features: against closed forms, slow oracles, and torchmetrics on the same features."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from smalti.arrays import read_npz
from smalti.errors import InputError
from smalti.evaluate.confidence import (
    Figure,
    FrechetReplicates,
    counted_figure,
    difference,
    extrapolate,
    frechet_figure,
    linear_figure,
    mean_figure,
    resampled_counts,
)
from smalti.evaluate.distances import (
    class_odds,
    frechet_distance,
    inception_score,
    inception_score_of_splits,
    kernel_distance,
    kernel_distance_of_subsets,
    neighbours,
    sliced_wasserstein,
)
from smalti.evaluate.moments import Gaussian, Moments, Statistics, read_statistics, write_statistics
from smalti.evaluate.protocols import ADM, SMALTI, TORCH_FIDELITY, find_protocol, score_splits


def normal(num: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(num, width, generator=torch.Generator().manual_seed(seed)) + shift


def gaussian(features: torch.Tensor) -> Gaussian:
    return Moments.of(features).gaussian


# Moments ---------------------------------------------------------------------------------------------------------


def test_shards_in_any_order_have_the_moments_of_the_whole():
    features = normal(211, 7, 0, shift=3.0)
    whole = Moments.of(features)
    shards = list(features.split([2, 101, 1, 60, 47]))
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        found = Moments.of_batches(shards[i] for i in order)
        assert found.num == 211
        assert torch.allclose(found.mean, whole.mean, rtol=0, atol=1e-13)
        assert torch.allclose(found.covariance, whole.covariance, rtol=0, atol=1e-13)
    assert np.allclose(whole.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-13)


def test_sums_are_float64():
    """In float32 the variance of numbers near 4,096 with deviation 0.001 would be lost altogether."""
    features = (4096 + 2.0**-10 * torch.tensor([-1.0, 1.0]).repeat(500)).view(-1, 1)
    found = Moments.of_batches(features.split(10))
    assert float(found.covariance) == pytest.approx(2.0**-20 * 1000 / 999, rel=1e-9)


def test_statistics_go_to_a_file_and_come_back(tmp_path):
    pooled, spatial = gaussian(normal(20, 3, 0)), gaussian(normal(20, 5, 1))
    path = tmp_path / "a.npz"
    write_statistics(path, Statistics(pooled, spatial, '{"name": "ä"}'))
    assert set(read_npz(path, "")) == {"mu", "sigma", "mu_s", "sigma_s", "num", "note"}  # the first four are ADM's
    found = read_statistics(path)
    assert found.note == '{"name": "ä"}' and found.pooled.num == 20 and found.spatial is not None
    assert torch.equal(found.pooled.covariance, pooled.covariance) and torch.equal(found.spatial.mean, spatial.mean)
    both = found.pooled.moments + Moments.of(normal(9, 3, 2))
    assert torch.allclose(both.covariance, Moments.of(torch.cat([normal(20, 3, 0), normal(9, 3, 2)])).covariance)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(3)}, "has no array sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu holds values that are NaN"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "sigma is not symmetric"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "num": np.int64(1)}, "num is 1"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "has no array sigma_s"),
    ],
)
def test_bad_statistics_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=said):
        read_statistics(tmp_path / "a.npz")


def test_statistics_without_their_number_do_not_merge(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(InputError, match="do not say of how many pictures"):
        _ = read_statistics(tmp_path / "a.npz").pooled.moments


# Fréchet ---------------------------------------------------------------------------------------------------------


def test_frechet_of_gaussians_in_closed_form():
    """Of diagonal covariances the roots are numbers: the sum of (sd1 - sd2)^2 and of (m1 - m2)^2."""
    m1, m2 = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    sd1, sd2 = torch.tensor([1.0, 2.0, 0.1]).double(), torch.tensor([3.0, 2.0, 0.7]).double()
    ours, theirs = Gaussian(m1, sd1.square().diag()), Gaussian(m2, sd2.square().diag())
    wanted = float((m1 - m2).square().sum() + (sd1 - sd2).square().sum())
    assert frechet_distance(ours, theirs) == pytest.approx(wanted, abs=1e-12)
    # The same turned by any rotation.
    turn, _ = torch.linalg.qr(normal(3, 3, 5).double())
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (ours, theirs)]
    assert frechet_distance(*turned) == pytest.approx(wanted, abs=1e-6)


def test_frechet_is_that_of_scipys_root():
    ours, theirs = gaussian(normal(50, 11, 0)), gaussian(normal(60, 11, 1, shift=0.2, scale=1.3))
    root = scipy.linalg.sqrtm((ours.covariance @ theirs.covariance).numpy())
    wanted = (ours.mean - theirs.mean).square().sum() + (ours.covariance + theirs.covariance).trace()
    assert frechet_distance(ours, theirs) == pytest.approx(float(wanted) - 2 * np.trace(root).real, rel=1e-10)
    assert frechet_distance(theirs, ours) == pytest.approx(frechet_distance(ours, theirs), rel=1e-12)


@pytest.mark.parametrize("num", [500, 20])  # of 20 the covariance of 64 features is singular
def test_equal_sets_are_0_apart(num):
    features = 100 * normal(num, 64, 0)
    assert frechet_distance(gaussian(features), gaussian(features.flip(0))) < 1e-6


class _Features(nn.Module):
    """Twelve numbers of a picture, as torchmetrics asks for them."""

    num_features = 12

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pictures.double(), 2).flatten(1)


@pytest.fixture(scope="module")
def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ours = torch.randint(0, 256, (90, 3, 6, 6), generator=random, dtype=torch.uint8)
    theirs = torch.randint(20, 256, (70, 3, 6, 6), generator=random, dtype=torch.uint8)
    return ours, theirs


@pytest.mark.filterwarnings(r"ignore:std\(\).* degrees of freedom:UserWarning")
@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")
def test_torchmetrics_finds_the_same_of_the_same_features(two_sets):
    ours, theirs = two_sets
    features = _Features()
    fid = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    fid.update(theirs, real=True)
    fid.update(ours, real=False)
    found = frechet_distance(gaussian(features(ours)), gaussian(features(theirs)))
    assert found == pytest.approx(float(fid.compute()), rel=1e-6)

    kid = KernelInceptionDistance(feature=features, subsets=1, subset_size=70)
    kid.update(theirs, real=True)
    kid.update(ours[:70], real=False)
    found = kernel_distance(features(ours[:70]), features(theirs)).value
    assert found == pytest.approx(float(kid.compute()[0]), rel=1e-5)
    assert kernel_distance_of_subsets(features(ours[:70]), features(theirs), num=3, size=70)[0] == pytest.approx(found)

    score = InceptionScore(feature=features, splits=1)
    score.update(ours)
    odds = class_odds(features(ours))
    assert float(inception_score(odds)) == pytest.approx(float(score.compute()[0]), rel=1e-5)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="3 and 4 numbers wide"):
        frechet_distance(gaussian(normal(9, 3, 0)), gaussian(normal(9, 4, 0)))


# Inception score ---------------------------------------------------------------------------------------------------


def test_inception_score_by_hand():
    """Sure of four classes, each as often: 4. Sure of one class always: 1. Never sure: 1."""
    sure = 100 * torch.eye(4).repeat(3, 1)
    assert float(inception_score(class_odds(sure))) == pytest.approx(4)
    assert float(inception_score(class_odds(sure[:1].repeat(5, 1)))) == pytest.approx(1)
    assert float(inception_score(class_odds(torch.zeros(5, 4)))) == pytest.approx(1)
    # Weights: two of the four classes.
    weights = torch.tensor([[0.5, 0.5, 0, 0] + [0] * 8])
    assert float(inception_score(class_odds(sure), weights)) == pytest.approx(2)


def test_splits_are_those_of_the_protocols():
    assert [len(rows) for rows in score_splits(ADM, 11_000)] == [5000, 5000, 1000]
    assert list(score_splits(ADM, 11_000)[1][:2]) == [5000, 5001]
    shuffled = score_splits(TORCH_FIDELITY, 25)
    assert sorted(np.concatenate(shuffled)) == list(range(25)) and len(shuffled) == 10
    assert list(np.concatenate(shuffled)) == list(np.random.RandomState(2020).permutation(25))
    assert [len(rows) for rows in score_splits(SMALTI, 7)] == [7]
    # Pictures sorted by class are what contiguous splits must not be given: each would hold one class.
    odds = class_odds(100 * torch.eye(2).repeat_interleave(10, 0))
    halves = [np.arange(10), np.arange(10, 20)]
    assert inception_score_of_splits(odds, halves)[0] == pytest.approx(1) and float(inception_score(odds)) > 1.99
    with pytest.raises(ValueError, match="choose one of adm"):
        find_protocol("tf")


# Neighbours --------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_a_slow_oracle(monkeypatch):
    monkeypatch.setattr("smalti.evaluate.distances.BLOCK", 7)
    monkeypatch.setattr("smalti.evaluate.distances.COLUMNS", 5)
    samples, reference = normal(41, 3, 0), normal(37, 3, 1, shift=0.6)
    samples[5] = samples[6]  # two copies: the nearest neighbour of each is the other
    found = neighbours(samples, reference, k=2, k_density=4)

    def apart(a, b):
        return math.dist(a.tolist(), b.tolist())

    def radius(features, i, k):
        return sorted(apart(features[i], features[j]) for j in range(len(features)) if j != i)[k - 1]

    small = [radius(reference, i, 2) for i in range(37)]
    large = [radius(reference, i, 4) for i in range(37)]
    of_samples = [radius(samples, i, 2) for i in range(41)]
    assert [float(v) for v in found.precision] == [
        any(apart(x, y) <= r + 1e-9 for y, r in zip(reference, small, strict=True)) for x in samples
    ]
    assert [float(v) for v in found.recall] == [
        any(apart(x, y) <= r + 1e-9 for x, r in zip(samples, of_samples, strict=True)) for y in reference
    ]
    assert found.density.tolist() == pytest.approx(
        [sum(apart(x, y) < r for y, r in zip(reference, large, strict=True)) / 4 for x in samples]
    )
    assert [float(v) for v in found.coverage] == [
        any(apart(x, y) < r for x in samples) for y, r in zip(reference, large, strict=True)
    ]
    assert 0 < found.precision.mean() < 1 and 0 < found.coverage.mean() < 1


def test_neighbours_need_more_pictures_than_they_look_at():
    with pytest.raises(ValueError, match="need more than 5 of each"):
        neighbours(normal(5, 3, 0), normal(9, 3, 0))


# Kernels and slices ------------------------------------------------------------------------------------------------


def test_kernel_distances_are_those_of_a_slow_oracle(monkeypatch):
    monkeypatch.setattr("smalti.evaluate.distances.BLOCK", 7)
    monkeypatch.setattr("smalti.evaluate.distances.COLUMNS", 5)
    x, y = normal(19, 3, 0).double(), normal(23, 3, 1, shift=0.5).double()

    def slow(kernel, x, y):
        within = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        other = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
        return np.mean(within) + np.mean(other) - 2 * np.mean([kernel(a, b) for a in x for b in y])

    cubic = slow(lambda a, b: float(a @ b / 3 + 1) ** 3, x, y)
    assert kernel_distance(x, y).value == pytest.approx(cubic, rel=1e-10)
    u, v = F.normalize(x), F.normalize(y)
    gaussian_kernel = slow(lambda a, b: math.exp(-float((a - b).square().sum()) / 200), u, v)
    assert kernel_distance(x, y, kernel="gaussian").value == pytest.approx(1000 * gaussian_kernel, rel=1e-7)
    with pytest.raises(ValueError, match="choose cubic or gaussian"):
        kernel_distance(x, y, kernel="rbf")
    with pytest.raises(ValueError, match="fewer than 30 in a subset"):
        kernel_distance_of_subsets(x, y, size=30)


def test_sliced_wasserstein_in_closed_form():
    """MIND of a shift by m of every coordinate is 3 d m^2 of many directions; of one feature, and sets of two sizes, it
    is three times the squared distance that quantiles give."""
    features = normal(300, 8, 0)
    assert sliced_wasserstein(features, features.flip(0), num=20).value == 0
    assert sliced_wasserstein(features, features + 2, num=4000).value == pytest.approx(3 * 8 * 4, rel=0.05)
    x, y = normal(6, 1, 0), normal(4, 1, 1, shift=1.0)
    fine = [np.repeat(np.sort(v.double().numpy()[:, 0]), 12 // len(v)) for v in (x, y)]
    wanted = 3 * np.mean((fine[0] - fine[1]) ** 2)
    assert sliced_wasserstein(x, y, num=3).value == pytest.approx(wanted, rel=1e-9)
    assert scipy.stats.wasserstein_distance(*fine) ** 2 <= wanted / 3 + 1e-12


def test_influences_are_what_pictures_taken_more_often_do():
    """Against distances of the resampled sets themselves."""
    x, y = normal(150, 4, 0), normal(130, 4, 1, shift=0.4, scale=1.2)
    for distance in (lambda a: kernel_distance(a, y), lambda a: sliced_wasserstein(a, y, num=60)):
        found = distance(x)
        assert float(found.influence.mean()) == pytest.approx(0, abs=1e-10)
        linear = linear_figure(found.value, found.influence, 0, 40)
        counts = resampled_counts(150, 0, 40)
        whole = [distance(x[torch.from_numpy(np.repeat(np.arange(150), c))]).value for c in counts]
        assert np.corrcoef(linear.replicates, whole)[0, 1] > 0.9
        assert linear.standard_error == pytest.approx(np.std(whole), rel=0.3)


# Confidence --------------------------------------------------------------------------------------------------------


def test_a_mean_has_the_error_that_it_has():
    values = normal(400, 1, 0)[:, 0]
    found = mean_figure(values, 0, 400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.standard_error == pytest.approx(float(values.std()) / 20, rel=0.15)
    low, high = found.interval or (0, 0)
    assert low < found.value < high and high - low == pytest.approx(4 * found.standard_error, rel=0.15)
    assert Figure(value=1.0).interval is None and Figure(value=1.0).standard_error is None


def test_the_bootstrap_of_a_frechet_distance_tells_how_it_varies():
    """Over 30 draws of 200 pictures: the mean of the errors that are found, against the spread of the distances; and
    their mean lies within most intervals."""
    reference = Gaussian(torch.zeros(4).double(), torch.eye(4).double())
    found = [frechet_figure(normal(200, 4, 100 + i, shift=0.5), reference, 0, 40)[0] for i in range(30)]
    values = [one.value for one in found]
    assert np.mean([one.standard_error for one in found]) == pytest.approx(np.std(values), rel=0.35)
    mean = np.mean(values)
    assert sum(low <= mean <= high for low, high in (one.interval for one in found if one.interval)) >= 25


def test_replicates_are_the_distance_of_what_they_take():
    features, reference = normal(60, 5, 0, shift=7.0), gaussian(normal(50, 5, 1))
    replicates = FrechetReplicates(features, reference)
    counts = next(resampled_counts(60, 3, 1))
    taken = features[torch.from_numpy(np.repeat(np.arange(60), counts))]
    assert replicates.of_counts(counts) == pytest.approx(frechet_distance(gaussian(taken), reference), rel=1e-9)
    rows = np.arange(10, 40)
    assert replicates.of_rows(rows) == pytest.approx(frechet_distance(gaussian(features[10:40]), reference), rel=1e-9)
    figure = counted_figure(1.0, 60, replicates.of_counts, 3, 1)
    assert figure.replicates == (replicates.of_counts(counts),)


def test_the_extrapolation_takes_the_bias_away():
    """Of pictures from the reference's own Gaussian the true distance is 0."""
    reference = Gaussian(torch.zeros(16).double(), torch.eye(16).double())
    found = [extrapolate(FrechetReplicates(normal(400, 16, i), reference), 0) for i in range(6)]
    measured, extrapolated = (np.mean([getattr(one, name) for one in found]) for name in ("bias", "value"))
    assert measured > 0.1 and abs(extrapolated) < 0.2 * measured
    assert found[0] is not None and found[0].sizes == (400, 200, 133, 100, 80)
    assert list(found[0].distances) == sorted(found[0].distances)
    assert extrapolate(FrechetReplicates(normal(80, 16, 0), reference), 0) is None  # parts of 16 are too few


def test_paired_differences_are_finer_than_independent_ones():
    """The second model draws what the first does, and a little worse."""
    first = normal(300, 6, 0)
    second = first + 0.3 * normal(300, 6, 1)
    reference = Gaussian(torch.full((6,), 0.5).double(), torch.eye(6).double())
    a, b = (frechet_figure(features, reference, 0, 100)[0] for features in (first, second))
    paired, independent = difference(a, b, paired=True), difference(a, b, paired=False)
    assert paired.paired and not independent.paired and paired.value == independent.value == b.value - a.value
    assert paired.standard_error < 0.6 * independent.standard_error and paired.p_value < independent.p_value
    assert difference(a, a, paired=True).p_value == 1
    assert difference(a, Figure(value=1.0), paired=True).p_value is None


def test_no_difference_is_found_where_there_is_none():
    """Two models that draw alike: of 24 tests on the level of 5 %, few say otherwise."""
    reference = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    figures = [frechet_figure(normal(150, 3, i, shift=0.4), reference, i, 25)[0] for i in range(48)]
    tests = [difference(a, b, paired=False) for a, b in zip(figures[::2], figures[1::2], strict=True)]
    assert sum((one.p_value or 0) < 0.05 for one in tests) <= 4

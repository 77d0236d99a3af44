"""Fréchet distance, inception score and intervals against closed forms and other programs."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from t2v.evaluation.scores import (
    KernelDistance,
    Moments,
    frechet_distance,
    inception_score,
    interval,
    moments,
    normal_quantile,
    split_inception_score,
)


def gaussian(seed: int, dims: int, rank: int) -> Moments:
    """Random moments; the covariance has that rank."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dims, rank))
    return Moments(1000, rng.normal(size=dims), factor @ factor.T)


def by_scipy(a: Moments, b: Moments) -> float:
    """The distance as the published programs have it, by the root of the asymmetric product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of products without full rank
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.trace(a.covariance + b.covariance - 2 * np.real(root)))


@pytest.mark.parametrize("dims", [1, 3, 40])
def test_distance_is_that_of_scipys_matrix_root(dims):
    a, b = gaussian(1, dims, 2 * dims), gaussian(2, dims, 2 * dims)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_distance_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    turn = scipy.linalg.qr(rng.normal(size=(6, 6)))[0]
    (m, n), (s, t) = rng.normal(size=(2, 6)), rng.uniform(0, 3, size=(2, 6))
    a, b = (Moments(9, mean, turn @ np.diag(d**2) @ turn.T) for mean, d in ((m, s), (n, t)))
    expected = np.square(m - n).sum() + np.square(s - t).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_of_covariances_without_full_rank():
    # Two planes in 20 dimensions that are turned against each other: the closed form is in 2x2.
    rng = np.random.default_rng(3)
    basis = scipy.linalg.qr(rng.normal(size=(20, 20)))[0]
    one, other = basis[:, :2] * [2.0, 3.0], basis[:, 1:3] * [5.0, 7.0]
    a, b = (Moments(9, np.zeros(20), f @ f.T) for f in (one, other))
    cross = np.linalg.svd(one.T @ other, compute_uv=False).sum()
    expected = 4 + 9 + 25 + 49 - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    nothing = Moments(9, np.ones(20), np.zeros((20, 20)))
    assert frechet_distance(a, nothing) == pytest.approx(20 + 13, rel=1e-12)


def test_distance_to_itself_is_zero_and_symmetric():
    for rank in (2, 30):  # degenerate, and not
        a, b = gaussian(4, 30, rank), gaussian(5, 30, rank)
        assert frechet_distance(a, a) <= 1e-9 * np.trace(a.covariance)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


@pytest.mark.slow  # its import takes long
def test_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(300, 12)), rng.normal(0.3, 1.4, size=(200, 12))
    first, second = moments(a), moments(b)
    arrays = [first.mean, first.covariance, second.mean, second.covariance]
    theirs = _compute_fid(*(torch.from_numpy(array) for array in arrays))
    assert frechet_distance(first, second) == pytest.approx(float(theirs), rel=1e-8)


def test_moments_are_numpys_and_counts_repeat_clips():
    rng = np.random.default_rng(7)
    features, counts = rng.normal(size=(10, 4)).astype(np.float32), rng.integers(0, 4, 10)
    repeated = np.repeat(features, counts, axis=0).astype(np.float64)
    found = moments(features, counts)
    assert found.clips == counts.sum()
    np.testing.assert_allclose(found.mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(repeated, rowvar=False), rtol=1e-9)
    assert not moments(features[:4]).is_full_rank
    assert moments(features[:5]).is_full_rank


def test_inception_score_runs_from_one_to_the_number_of_classes():
    assert inception_score(np.full((50, 7), 1 / 7)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(7), (3, 1))) == pytest.approx(7)  # log 0 does not matter
    assert inception_score(np.eye(7)[:2]) == pytest.approx(2)


@pytest.mark.slow  # its import takes long
def test_inception_score_is_that_of_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Stand(torch.nn.Module):
        """Answers images with logits that they carry as their only pixels."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, 0, 0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all features; one split has no deviation
        theirs = InceptionScore(feature=Stand(), normalize=False, splits=1)
        theirs.update(logits[:, :, None, None])
        expected = float(theirs.compute()[0])
    probabilities = logits.softmax(1).numpy()
    assert inception_score(probabilities) == pytest.approx(expected, rel=1e-6)
    value, deviation = split_inception_score(probabilities, 1, seed=3)
    assert (value, deviation) == (pytest.approx(expected, rel=1e-6), 0.0)


def test_splits_are_equal_parts_of_all_clips():
    rows = np.eye(4)[np.arange(40) % 4]
    value, deviation = split_inception_score(rows, 10, seed=0)
    assert 2 < value < 4  # four clips of a split seldom show all classes
    assert deviation > 0
    assert split_inception_score(rows, 10, seed=0) == (value, deviation)


def test_interval_knows_the_error_of_a_mean():
    values = np.random.default_rng(8).normal(size=400)

    def mean(counts: np.ndarray) -> float:
        return float(counts @ values / counts.sum())

    found = [
        interval(mean, 400, value=0.5, resamples=400, seed=1, confidence=0.95) for _ in range(2)
    ]
    assert found[0] == found[1]  # seeded
    # 400 resamples know a deviation to about 4 %.
    assert found[0].standard_error == pytest.approx(values.std() / 20, rel=0.2)
    assert found[0].high - 0.5 == pytest.approx(normal_quantile(0.975) * found[0].standard_error)
    assert 0.5 - found[0].low == pytest.approx(found[0].high - 0.5)


def test_interval_of_a_distance_has_the_width_of_its_sampling():
    rng = np.random.default_rng(9)
    known = Moments(10_000, np.zeros(12), np.eye(12))
    values, errors = [], []
    for turn in range(150):
        features = 1.2 * rng.normal(size=(100, 12)) + 0.1
        values.append(frechet_distance(known, moments(features)))

        def again(counts: np.ndarray, features: np.ndarray = features) -> float:
            return frechet_distance(known, moments(features, counts))

        if turn < 10:
            found = interval(again, 100, value=0, resamples=60, seed=turn, confidence=0.95)
            errors.append(found.standard_error)
    # 150 values know a deviation to 6 %; the estimate is known to lie somewhat high.
    assert 0.8 < np.mean(errors) / np.std(values) < 1.5


def test_distance_between_halves_is_small_and_grows_with_every_shift():
    rng = np.random.default_rng(9)
    halves = rng.normal(size=(2, 2000, 8))
    known = moments(halves[0])
    shifted = [frechet_distance(known, moments(halves[1] + by)) for by in (0, 0.1, 0.2, 0.4, 0.8)]
    assert shifted[0] < 0.05  # 8 dimensions, 2000 clips
    assert shifted == sorted(shifted)


def test_kernel_distance_is_the_mean_over_pairs_of_different_clips():
    rng = np.random.default_rng(11)
    real, made = rng.normal(size=(7, 3)), rng.normal(0.5, 2.0, size=(5, 3))

    def mean(a: np.ndarray, b: np.ndarray, skip: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return float(np.mean([(a[i] @ b[j] / 3 + 1) ** 2 for i, j in pairs]))

    def plain(made: np.ndarray) -> float:
        return mean(real, real, True) + mean(made, made, True) - 2 * mean(real, made, False)

    distance = KernelDistance(real, made)
    assert distance() == pytest.approx(plain(made), rel=1e-12)
    counts = np.array([1, 0, 1, 1, 0])
    assert distance(counts) == pytest.approx(plain(made[counts == 1]), rel=1e-12)


def test_kernel_distance_has_no_bias_where_the_frechet_distance_has():
    """Few clips of one distribution: 0 on average, against a Fréchet distance far above it."""
    rng = np.random.default_rng(12)
    sets = [rng.normal(size=(2, 30, 8)) for _ in range(200)]
    found = np.array([KernelDistance(*pair)() for pair in sets])
    # Five standard errors.
    assert abs(found.mean()) < 5 * found.std() / len(sets) ** 0.5
    assert (found < 0).any()
    assert min(frechet_distance(*map(moments, pair)) for pair in sets) > 0.5
    apart = KernelDistance(sets[0][0], 1.5 * sets[0][1] + 0.5)()
    assert apart > found.max()

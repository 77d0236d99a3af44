"""Fréchet distance, maximum mean discrepancy, inception score and their uncertainty, from features;
float64, numpy alone."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

Features = Float[np.ndarray, "clips dims"]
Matrix = Float[np.ndarray, "dims dims"]
Counts = Int[np.ndarray, " clips"]

LEFT_OUT = 5  # one of so many clips, in each resample


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features of so many clips."""

    clips: int
    mean: Float[np.ndarray, " dims"]
    covariance: Matrix

    @property
    def is_full_rank(self) -> bool:
        """Whether so many clips can determine the covariance in all its dimensions."""
        return self.clips > len(self.mean)


@dataclass(frozen=True)
class Estimate:
    """A value, the standard error of its sampling, and the interval that follows from it."""

    value: float
    standard_error: float
    low: float
    high: float


def moments(features: Features, counts: Counts | None = None) -> Moments:
    """Mean and unbiased covariance; `counts` says how often each clip counts (none: once)."""
    features = features.astype(np.float64)
    weights = np.ones(len(features)) if counts is None else counts.astype(np.float64)
    total = weights.sum()
    mean = weights @ features / total
    centred = features - mean
    covariance = (centred * weights[:, None]).T @ centred / (total - 1)
    return Moments(int(total), mean, covariance)


def symmetric_root(matrix: Matrix) -> Matrix:
    """The positive root of a covariance; directions without variance, to rounding, have none."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    noise = np.finfo(np.float64).eps * len(values) * max(float(values[-1]), 0.0)
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    return (vectors * roots) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, eq. 6).

    The trace of `(A B)^(1/2)` is the sum of the singular values of `A^(1/2) B^(1/2)`, which needs
    no root of an asymmetric matrix and stands covariances without full rank.
    """
    roots = symmetric_root(a.covariance) @ symmetric_root(b.covariance)
    shared = np.linalg.svd(roots, compute_uv=False).sum()
    apart = np.square(a.mean - b.mean).sum()
    distance = apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(float(distance), 0.0)  # equal Gaussians: rounding alone


class KernelDistance:
    """Squared maximum mean discrepancy under the kernel `(x.y / dims + 1)^2`, unbiased (Gretton et
    al. 2012, eq. 3; JEDi, arXiv 2410.05203): as many clips as there are tell how far, not how few
    they were, and equal distributions give 0 on average, so that it may be below 0."""

    def __init__(self, real: Features, generated: Features) -> None:
        real, generated = real.astype(np.float64), generated.astype(np.float64)
        self.within = kernel(generated, generated)
        np.fill_diagonal(self.within, 0.0)
        self.across = kernel(generated, real).mean(axis=1)
        of_real = kernel(real, real)
        pairs = len(real) * (len(real) - 1)
        self.real = float(of_real.sum() - np.trace(of_real)) / pairs

    def __call__(self, counts: Counts | None = None) -> float:
        """The distance of the clips that count; `counts` is 1 or 0 for each generated one."""
        kept = np.ones(len(self.across)) if counts is None else counts.astype(np.float64)
        clips = kept.sum()
        within = kept @ self.within @ kept / (clips * (clips - 1))
        return float(within + self.real - 2 * kept @ self.across / clips)


def kernel(a: Features, b: Features) -> Matrix:
    """`(x.y / dims + 1)^2` of every pair."""
    return (a @ b.T / a.shape[1] + 1) ** 2


def inception_score(probabilities: Features, counts: Counts | None = None) -> float:
    """exp of the mean divergence of each clip's classes from all clips' (Salimans et al. 2016)."""
    rows = probabilities.astype(np.float64)
    weights = np.ones(len(rows)) if counts is None else counts.astype(np.float64)
    weights = weights / weights.sum()
    marginal = weights @ rows
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(rows > 0, rows * (np.log(rows) - np.log(marginal)), 0.0)
    return float(np.exp(weights @ parts.sum(axis=1)))


def split_inception_score(probabilities: Features, splits: int, seed: int) -> tuple[float, float]:
    """(mean, standard deviation) over equal parts of the clips in a shuffled order, as published
    scores have it."""
    order = np.random.default_rng(seed).permutation(len(probabilities))
    bounds = [number * len(order) // splits for number in range(splits + 1)]
    scores = [inception_score(probabilities[order[low:high]]) for low, high in pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def interval(
    statistic: Callable[[Counts], float],
    clips: int,
    *,
    value: float,
    resamples: int,
    seed: int,
    confidence: float,
) -> Estimate:
    """The interval around `value` that follows from resamples, each without a random fifth of the
    clips (the delete-d jackknife: Shao & Wu 1989).

    A bootstrap draws clips twice, which costs a covariance rank: it gave Fréchet distances 1.2 to
    2.4 times their true error, this 1.1 to 1.3 times (benchmarks/score_error.py).
    """
    rng, left_out = np.random.default_rng(seed), max(1, clips // LEFT_OUT)
    drawn = []
    for _ in range(resamples):
        counts = np.ones(clips, np.int64)
        counts[rng.permutation(clips)[:left_out]] = 0
        drawn.append(statistic(counts))
    error = float(np.std(drawn, ddof=1)) * ((clips - left_out) / left_out) ** 0.5
    reach = normal_quantile((1 + confidence) / 2) * error
    return Estimate(value, error, value - reach, value + reach)


def normal_quantile(share: float) -> float:
    """Where the standard normal law has that share below it."""
    return NormalDist().inv_cdf(share)

"""From one value per image to what may be said about a setting: averages with intervals.

Rows of the same image (other seeds, other rounds) are not independent of each other, so whole
images are resampled: `clusters` names the image of each row. Values that are missing (None, NaN,
infinite) are left out and counted, never replaced.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fedsec.checks import require

MARGIN = 3.0  # dB above the best null from which on an image counts as leaked
Value = float | int | None
Interval = tuple[float | None, float | None, float | None]  # estimate, low, high

_CHUNK = 2**21  # resampled clusters in memory at a time


def bootstrap(
    values: Sequence[Value],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over rows and its percentile bootstrap interval, whole clusters resampled.

    The percentiles are widened for few clusters (the expanded percentile interval of Hesterberg
    2015): an interval over 5 clusters would otherwise be 37 % short. No resampling can reach 95 %
    with 2 to 5 clusters, so say how many there were: `summary` counts them. The interval is None
    with fewer than 2 clusters, the mean too when nothing was measured. Equal input, in any order of
    the rows, gives an equal interval up to rounding.
    """
    require(0 < level < 1, "level", "must be in (0, 1)", level)
    require(draws >= 1, "draws", "must be at least 1", draws)
    sums, counts = _by_cluster(values, clusters)
    if not len(sums):
        return None, None, None
    mean = float(sums.sum() / counts.sum())
    n = len(sums)
    if n < 2:
        return mean, None, None
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, step := max(1, _CHUNK // n)):
        pick = rng.integers(0, n, (min(step, draws - start), n))
        means.append(sums[pick].sum(1) / counts[pick].sum(1))
    tail = _expanded((1 - level) / 2, n)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return mean, float(low), float(high)


def _by_cluster(
    values: Sequence[Value], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the measured values of each cluster that has any."""
    x = _floats(values)
    require(len(x) == len(clusters), "clusters", f"must be as many as values, {len(x)}",
            len(clusters))  # fmt: skip
    order = {name: i for i, name in enumerate(sorted(set(clusters), key=repr))}
    index = np.array([order[name] for name in clusters], dtype=np.int64)
    known = np.isfinite(x)
    counts = np.bincount(index[known], minlength=len(order))
    sums = np.bincount(index[known], x[known], minlength=len(order))
    return sums[counts > 0], counts[counts > 0]


def _floats(values: Sequence[Value]) -> np.ndarray:
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def _expanded(tail: float, n: int) -> float:
    """The tail of the bootstrap distribution that makes up for its variance being (n-1)/n too
    small and for t being wider than the normal."""
    from scipy.special import stdtrit  # quantiles of Student's t, without all of scipy.stats

    return NormalDist().cdf(np.sqrt(n / (n - 1)) * stdtrit(n - 1, tail))


def paired_difference(
    a: Sequence[Value],
    b: Sequence[Value],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over rows that measured both, with its interval; row i of each is one pair."""
    require(len(a) == len(b), "b", f"must be as many as a, {len(a)}", len(b))
    return bootstrap((_floats(a) - _floats(b)).tolist(), clusters, level, draws, seed)


def wilson(successes: float | int, trials: float | int, level: float = 0.95) -> Interval:
    """A share and its score interval (Wilson 1927), which stays in [0, 1] and holds for 0 and 1.

    None without trials.
    """
    require(0 <= successes <= trials, "successes", f"must be in [0, {trials}]", successes)
    require(0 < level < 1, "level", "must be in (0, 1)", level)
    if trials == 0:
        return None, None, None
    p, z2 = successes / trials, NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * p * (1 - p) / trials + z2**2 / (4 * trials**2)) / (1 + z2 / trials)
    # the interval holds the share itself, whatever rounding did
    return p, float(min(p, max(0, centre - half))), float(max(p, min(1, centre + half)))


def success(
    psnr: Sequence[Value],
    null_psnr: Sequence[Value],
    clusters: Sequence[Hashable],
    margin: float | int = MARGIN,
    level: float = 0.95,
) -> Interval:
    """Share of images that leaked: PSNR more than `margin` dB above the best null's on that image.

    With several rows for an image, the image counts with the share of them that leaked, so that
    the interval is that of as many trials as there are images.
    """
    require(len(psnr) == len(null_psnr), "null_psnr", f"must be as many as psnr, {len(psnr)}",
            len(null_psnr))  # fmt: skip
    above = _floats(psnr) - _floats(null_psnr)
    leaked = np.where(np.isfinite(above), above > margin, np.nan)
    sums, counts = _by_cluster(leaked.tolist(), clusters)
    return wilson(float((sums / counts).sum()), len(sums), level)


@dataclass(frozen=True)
class Summary:
    """One metric over the rows of one setting. All but the counts are None when nothing was
    measured."""

    mean: float | None
    low: float | None  # bootstrap interval of the mean; None with fewer than 2 clusters
    high: float | None
    median: float | None
    worst: float | None  # what the most leaking image scored
    count: int  # values used
    missing: int  # values left out
    clusters: int  # images behind the values used


def summary(
    values: Sequence[Value],
    clusters: Sequence[Hashable],
    leaks_upward: bool = True,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Summary:
    """Mean with interval, median, worst case and what was missing.

    `leaks_upward`: a higher value means more leaked, as for PSNR and SSIM; False for MSE, LPIPS.
    """
    x = _floats(values)
    known = x[np.isfinite(x)]
    sums, _ = _by_cluster(values, clusters)
    mean, low, high = bootstrap(values, clusters, level, draws, seed)
    median = worst = None
    if len(known):
        median, worst = float(np.median(known)), float(known.max() if leaks_upward else known.min())
    return Summary(mean, low, high, median, worst, len(known), len(x) - len(known), len(sums))

"""From one value per image to what may be said about a setting: averages with intervals.

Rows of the same image (other seeds, other rounds) are not independent of each other, so whole
images are resampled: `clusters` names the image of each row. Values that are missing (None, NaN,
infinite) are left out and counted, never replaced.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from statistics import NormalDist

import numpy as np

from fedsec.checks import require

MARGIN = 3.0  # dB above the best null from which on an image counts as leaked
Value = float | int | None
Interval = tuple[float | None, float | None, float | None]  # estimate, low, high

_CHUNK = 2**21  # resampled clusters in memory at a time
_EXACT = 14  # clusters up to which all their signs are tried
_SIGNS = 20_000  # draws of signs beyond that


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
    means = [(times @ sums) / (times @ counts) for times in _resamples(n, draws, seed)]
    tail = _expanded((1 - level) / 2, n)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return mean, float(low), float(high)


def _resamples(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n clusters is drawn: [draws, n] in parts, the same at every call."""
    if n * draws <= _CHUNK:
        yield _resampled(n, draws, seed)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, draws, step := max(1, _CHUNK // n)):
        yield _counted(rng.integers(0, n, (min(step, draws - start), n)), n)


@lru_cache(maxsize=8)
def _resampled(n: int, draws: int, seed: int) -> np.ndarray:
    """Kept: a report asks for the same thousands of times."""
    return _counted(np.random.default_rng(seed).integers(0, n, (draws, n)), n)


def _counted(pick: np.ndarray, n: int) -> np.ndarray:
    rows = n * np.arange(len(pick))[:, None]
    times = np.bincount((pick + rows).ravel(), minlength=n * len(pick))
    return times.reshape(pick.shape).astype(np.float64)


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


def chance(a: Sequence[Value], b: Sequence[Value], clusters: Sequence[Hashable]) -> float | None:
    """Two-sided p of "a and b do not differ", over rows that measured both; None below 2 clusters.

    The randomisation test of Fisher 1935: if nothing differs, each cluster's sum of differences
    might as well have the other sign. All signs are tried up to 14 clusters, and 20,000 draws of
    them beyond, which count the observed signs as one: p is at least 1 in 20,001.
    """
    require(len(a) == len(b), "b", f"must be as many as a, {len(a)}", len(b))
    sums, _ = _by_cluster((_floats(a) - _floats(b)).tolist(), clusters)
    n = len(sums)
    if n < 2:
        return None
    seen = abs(sums.sum()) * (1 - 1e-9)  # equal sums in another order are equal
    hits = sum(int((abs(signs @ sums) >= seen).sum()) for signs in _signs(n))
    return hits / 2**n if n <= _EXACT else (hits + 1) / (_SIGNS + 1)


def _signs(n: int) -> Iterator[np.ndarray]:
    """All signs of n clusters, or draws of them: [draws, n] in parts, the same at every call."""
    if n <= _EXACT or n * _SIGNS <= _CHUNK:
        yield _kept_signs(n)
        return
    rng = np.random.default_rng(0)
    for start in range(0, _SIGNS, step := max(1, _CHUNK // n)):
        yield 2.0 * rng.integers(0, 2, (min(step, _SIGNS - start), n)) - 1


@lru_cache(maxsize=4)
def _kept_signs(n: int) -> np.ndarray:
    if n <= _EXACT:
        return 1.0 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    return 2.0 * np.random.default_rng(0).integers(0, 2, (_SIGNS, n)) - 1


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """p values of comparisons that are made together, each corrected for the others (Holm 1979).

    Where none of them differs, one falls below 0.05 in at most 5 % of reports, however they depend
    on each other. A missing one (None) is no comparison.
    """
    known = sorted((p, i) for i, p in enumerate(chances) if p is not None)
    scaled = [min(1.0, p * (len(known) - rank)) for rank, (p, _) in enumerate(known)]
    adjusted: list[float | None] = [None] * len(chances)
    for (_, i), p in zip(known, accumulate(scaled, max), strict=True):
        adjusted[i] = p
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: smaller in one coordinate, and not larger in the other."""
    least, front = float("inf"), set()
    for point in sorted(set(points)):
        if point[1] < least:
            front.add(point)
            least = point[1]
    return [point in front for point in points]


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

"""Intervals against a plain loop, against their level, and against the temptation to invent one."""

import math
import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsec import stats
from fedsec.checks import Refused
from fedsec.stats import (
    bootstrap,
    chance,
    holm,
    paired_difference,
    pareto,
    success,
    summary,
    wilson,
)


def rows(n, per=1, spread=2.0, noise=1.0, seed=0):
    """`n` images with `per` rows each, which share the image's own level."""
    rng = np.random.default_rng(seed)
    values = 20 + spread * rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, per))
    return values.ravel().tolist(), np.repeat(np.arange(n), per).tolist()


def plain(values, clusters, level, draws, seed):
    """The same interval in words: draw images, pool their rows, average, sort, cut off."""
    from scipy.stats import t

    groups = {}
    for value, cluster in zip(values, clusters, strict=True):
        if value is not None and math.isfinite(value):
            groups.setdefault(cluster, []).append(value)
    names, n = sorted(groups, key=repr), len(groups)
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        pooled = [v for i in rng.integers(0, n, n) for v in groups[names[i]]]
        means.append(sum(pooled) / len(pooled))
    tail = NormalDist().cdf(t.ppf((1 - level) / 2, n - 1) * math.sqrt(n / (n - 1)))
    known = [v for group in groups.values() for v in group]
    low, high = np.quantile(means, [tail, 1 - tail])
    return sum(known) / len(known), low, high


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 999), st.sampled_from([0.8, 0.95]))
def test_bootstrap_is_the_plain_loop(n, per, seed, level):
    values, clusters = rows(n, per, seed=seed)
    if per > 1:
        values[0], values[-1] = None, math.nan  # clusters of unequal size
    got = bootstrap(values, clusters, level, 100, seed)
    assert got == pytest.approx(plain(values, clusters, level, 100, seed), rel=1e-9)


def test_chunks_draw_the_same_numbers(monkeypatch):
    values, clusters = rows(7, 2)
    whole = bootstrap(values, clusters)
    monkeypatch.setattr(stats, "_CHUNK", 100)
    assert bootstrap(values, clusters) == pytest.approx(whole, rel=1e-12)


def test_equal_input_in_any_order_gives_equal_numbers():
    values, clusters = rows(12, 3)
    shuffled = np.random.default_rng(5).permutation(len(values))
    again = bootstrap([values[i] for i in shuffled], [clusters[i] for i in shuffled])
    assert bootstrap(values, clusters) == bootstrap(values, clusters)
    assert again == pytest.approx(bootstrap(values, clusters), rel=1e-12)
    assert bootstrap(values, clusters, seed=1) != bootstrap(values, clusters)


def coverage(n, per, cluster_by_image=True, times=400):
    hits = 0
    for seed in range(times):
        values, clusters = rows(n, per, seed=seed)
        by = clusters if cluster_by_image else list(range(len(values)))
        _, low, high = bootstrap(values, by, draws=400)
        hits += low <= 20 <= high
    return hits / times


def test_95_percent_of_intervals_hold_the_truth():
    assert 0.92 <= coverage(40, 3) <= 0.98
    assert 0.91 <= coverage(8, 2) <= 0.98  # few images: the widened percentiles
    # positive control: rows of one image taken for independent give intervals that are too short
    assert coverage(40, 5, cluster_by_image=False) < 0.8


@pytest.mark.parametrize(
    ("values", "clusters", "mean"),
    [
        ([], [], None),
        ([None, math.nan], [0, 1], None),
        ([3.0], [0], 3.0),
        ([3.0, 5.0], [7, 7], 4.0),
        ([3.0, None], [0, 1], 3.0),
    ],
)
def test_no_interval_is_made_up(values, clusters, mean):
    assert bootstrap(values, clusters) == (mean, None, None)
    assert paired_difference(values, values, clusters)[1:] == (None, None)


def test_an_interval_of_equal_values_has_no_width():
    assert bootstrap([4.0] * 5, range(5)) == (4, 4, 4)


def test_missing_values_are_left_out_and_counted():
    values = [10.0, None, 30.0, math.nan, math.inf, 20.0]
    s = summary(values, ["a", "a", "b", "c", "d", "b"])
    assert (s.mean, s.median, s.worst) == (20, 20, 30)
    assert (s.count, s.missing, s.clusters) == (3, 3, 2)
    assert (s.mean, s.low, s.high) == bootstrap([10.0, 30.0, 20.0], ["a", "b", "b"])
    assert summary(values, range(6), leaks_upward=False).worst == 10
    empty = summary([None], [0])
    assert (empty.mean, empty.median, empty.worst, empty.missing) == (None, None, None, 1)


def test_clusters_may_be_any_names():
    values, clusters = rows(6, 2)
    names = [("cifar10", c) for c in clusters]
    assert bootstrap(values, names) == bootstrap(values, clusters)


def test_pairs_that_move_together_differ_precisely():
    values, clusters = rows(20, 1)
    noise = np.random.default_rng(1).normal(scale=0.1, size=20)
    other = [v - 1 + e for v, e in zip(values, noise, strict=True)]
    mean, low, high = paired_difference(values, other, clusters)
    assert mean == pytest.approx(1 - noise.mean())
    assert low < 1 < high
    assert high - low < 0.2 < 1 < np.subtract(*bootstrap(values, clusters)[:0:-1])
    other[3] = None
    assert paired_difference(values, other, clusters)[0] == pytest.approx(
        1 - np.delete(noise, 3).mean()
    )


# Newcombe 1998, table I, method 3
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(k, n, low, high):
    assert wilson(k, n) == pytest.approx((k / n, low, high), abs=5e-5)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (None, None, None)
    assert wilson(4, 4)[2] == 1
    assert 0.5 < wilson(4, 4)[1] < 0.52
    with pytest.raises(Refused, match="successes"):
        wilson(3, 2)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_stays_within_0_and_1(n, share, level):
    p, low, high = wilson(share * n, n, level)
    assert 0 <= low <= p <= high <= 1


def test_success_is_measured_against_each_image_s_own_null():
    psnr, null = [20.0, 20.0, 13.0, None, 16.0], [12.0, 18.0, 9.0, 12.0, 13.0]
    assert success(psnr, null, range(5)) == pytest.approx(wilson(2, 4))  # 3.0 dB is not more than 3
    assert success(psnr, null, range(5), margin=0)[0] == 1
    assert success([None], [1.0], [0]) == (None, None, None)


def test_success_counts_images_not_rows():
    psnr, null = [20.0] * 10 + [5.0], [10.0] * 11
    assert success(psnr, null, [0] * 10 + [1]) == pytest.approx(wilson(1, 2))
    assert success([20.0, 5.0, 5.0], [10.0] * 3, [0, 0, 1])[0] == pytest.approx(0.25)


def test_lengths_and_levels_are_checked():
    with pytest.raises(Refused, match="clusters"):
        bootstrap([1.0, 2.0], [0])
    with pytest.raises(Refused, match="level"):
        bootstrap([1.0, 2.0], [0, 1], level=1.0)
    with pytest.raises(Refused, match="b: must be as many"):
        paired_difference([1.0, 2.0], [1.0], [0, 1])


def test_twenty_thousand_rows_take_seconds():
    values, clusters = rows(20_000)
    start = time.perf_counter()
    mean, low, high = bootstrap(values, clusters)
    assert time.perf_counter() - start < 10
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20_000**0.5, rel=0.1)


# ---- comparisons --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 12, 14, 15, 40, 200])
def test_the_chance_of_a_difference_is_that_of_scipy(n):
    from scipy.stats import permutation_test

    rng = np.random.default_rng(n)
    a, b = 20 + rng.normal(size=n), 20.4 + rng.normal(size=n)
    tried = np.inf if n <= 15 else 20_000
    twin = permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
        n_resamples=tried, rng=np.random.default_rng(1),
    )  # fmt: skip
    p = twin.pvalue  # where it draws, of one side, and twice that
    deviation = math.sqrt(p * (1 - p) / 20_000 + p * (2 - p) / tried) if n > 14 else 0.0
    tolerance = 4 * deviation + 1e-12
    assert chance(a.tolist(), b.tolist(), range(n)) == pytest.approx(twin.pvalue, abs=tolerance)


def test_the_chance_of_a_difference_takes_whole_images():
    """Copies of a row tell nothing new; rows that lack one side are no pairs."""
    a, b = [1.0, 2.0, 3.5, 1.5, 0.5], [0.0, 0.5, 1.0, 0.0, 1.0]
    once = chance(a, b, range(5))
    assert once == 4 / 32  # +++++, ++++-, and their opposites
    assert chance(a * 3, b * 3, [*range(5)] * 3) == once
    assert chance([*a, None, 9.0], [*b, 1.0, math.nan], [*range(5), 7, 8]) == once
    assert chance(a[:1], b[:1], [0]) is None
    assert chance([], [], []) is None
    assert chance([2.0, 3.0], [2.0, 3.0], [0, 1]) == 1.0


@pytest.mark.slow
def test_a_difference_that_is_none_is_found_as_often_as_is_said():
    rng = np.random.default_rng(0)
    for n in (8, 20):
        low = [chance(rng.normal(size=n).tolist(), rng.normal(size=n).tolist(), range(n))
               for _ in range(2000)]  # fmt: skip
        share = np.mean([p <= 0.05 for p in low])
        assert 0.03 < share < 0.065


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2, and then never less than the one before
    expected = [0.06, 0.04, None, 0.06, 0.06]
    assert holm([0.03, 0.01, None, 0.04, 0.02]) == pytest.approx(expected)
    assert holm([0.4, 0.9, 0.8]) == [1.0, 1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_keeps_the_share_of_reports_that_err():
    """Uncorrected, a report of twenty differences that are none would err in 64 %."""
    rng = np.random.default_rng(0)
    reports = rng.random((4000, 20))
    plain = np.mean([min(ps) < 0.05 for ps in reports])
    corrected = np.mean([min(p for p in holm(ps.tolist()) if p is not None) < 0.05
                         for ps in reports])  # fmt: skip
    assert plain > 0.6
    assert 0.035 < corrected < 0.06


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float))))
def test_the_front_is_that_of_comparing_each_with_each(points):
    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    assert pareto(points) == [not beaten(p) for p in points]

"""Epsilon: published and independently computed numbers, and what must be refused."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from fedsec.checks import Refused
from fedsec.privacy import (
    ACCOUNTANTS,
    POOLS,
    Mechanism,
    epsilon,
    formal,
    gdp_mu,
    named,
    naming,
    naming_bounds,
    noise_multiplier,
)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "prv", "rdp"),
    [
        (1.0, 0.02, 2000, 5.626, 6.150),
        (1.5, 0.04, 2250, 6.779, 7.3291),  # published: RDP of these steps
        (1.5, 0.04, 2249, 6.7774, 7.327),  # published: PRV of these
        (4.0, 0.01, 10_000, 0.957, 1.0355),  # Abadi et al. 2016: see the old conversion
    ],
)
def test_known_runs(noise, rate, steps, prv, rdp):
    assert epsilon(noise, rate, steps, 1e-5, accountant="prv") == pytest.approx(prv, abs=6e-4)
    assert epsilon(noise, rate, steps, 1e-5, accountant="rdp") == pytest.approx(rdp, abs=6e-4)


def exact_gaussian(noise: float, steps: int, delta: float) -> float:
    """Without subsampling, in closed form: Balle and Wang 2018, theorem 8."""
    mu = math.sqrt(steps) / noise

    def excess(e: float) -> float:
        return norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta

    return float(brentq(excess, 0, 1000))


@pytest.mark.parametrize(
    ("noise", "steps", "delta"),
    [(5.0, 100, 1e-5), (1.0, 40, 1e-5), (0.6, 40, 1e-6), (20.0, 10, 1e-3)],
)
def test_without_subsampling_prv_is_the_closed_form(noise, steps, delta):
    exact = exact_gaussian(noise, steps, delta)
    prv = epsilon(noise, 1.0, steps, delta)
    assert exact <= prv <= exact + 0.03  # an upper bound: the error of 0.01 is added
    assert exact < epsilon(noise, 1.0, steps, delta, accountant="rdp")


def test_it_composes_over_all_steps_and_falls_with_noise():
    assert epsilon(1.0, 0.1, 1, 1e-5) < epsilon(1.0, 0.1, 40, 1e-5) < epsilon(1.0, 0.1, 80, 1e-5)
    assert epsilon(2.0, 0.1, 40, 1e-5) < epsilon(1.0, 0.1, 40, 1e-5)
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0.0


def test_orders_are_wide_enough_at_both_ends():
    # Opacus's own orders end at 63, which gives 0.1029 for the first and 1294 for the second
    assert epsilon(100.0, 0.01, 10, 1e-5, accountant="rdp") < 0.005
    assert epsilon(0.15, 0.1, 200, 1e-5, accountant="rdp") < 900


def test_a_long_run_fits_in_memory_and_stays_a_bound():
    # with Opacus's error of 0.01 the grid would have 8e6 points
    prv, rdp = (epsilon(1.0, 0.01, 100_000, 1e-5, accountant=a) for a in ("prv", "rdp"))
    assert 0.8 * rdp < prv < rdp


@pytest.mark.parametrize(
    ("noise", "delta"),
    [(0.15, 1e-5), (1e-3, 1e-5), (1.0, 1e-14)],
)
def test_where_prv_has_no_number_it_says_so_and_rdp_has_one(noise, delta):
    with pytest.raises(ArithmeticError, match="PRV has no number here"):
        epsilon(noise, 0.1, 200, delta)
    assert epsilon(noise, 0.1, 200, delta, accountant="rdp") > 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"steps": -1}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"accountant": "gdp"}, "accountant"),
    ],
)
def test_refuses_what_is_no_run(change, key):
    run = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5} | change
    with pytest.raises(Refused) as refusal:
        epsilon(**run)
    assert refusal.value.key == key


def test_another_method_agrees():
    """Privacy loss distributions (Google's dp-accounting) give 5.616 for the first known run."""
    assert epsilon(1.0, 0.02, 2000, 1e-5, accountant="prv") == pytest.approx(5.616, abs=0.015)


def test_the_old_conversion_is_that_of_older_papers():
    """Abadi et al. 2016 published 1.26 for this run."""
    old = epsilon(4.0, 0.01, 10_000, 1e-5, accountant="rdp_mironov")
    assert old == pytest.approx(1.2586, abs=1e-4)
    assert all(year in how for year, how in zip(("2021", "2020", "2017"), ACCOUNTANTS.values(),
                                                strict=True))  # fmt: skip


def test_the_old_conversion_of_one_gaussian_is_the_formula_over_all_orders():
    """Without subsampling the divergence of order a is a steps / (2 sigma^2)."""
    rho, delta = 40 / (2 * 5.0**2), 1e-5
    best = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    old = epsilon(5.0, 1.0, 40, delta, accountant="rdp_mironov")
    assert best <= old <= best * 1.001  # orders are a grid
    assert epsilon(5.0, 1.0, 40, delta, accountant="rdp") < old


# How much noise an epsilon takes


def test_noise_for_a_published_run():
    sigma = noise_multiplier(8.0, 1e-5, 0.04, steps=90 * 25)  # 90 epochs of 25 batches
    assert sigma == pytest.approx(1.416, abs=5e-4)
    assert epsilon(sigma, 0.04, 2250, 1e-5, "rdp") <= 8 < epsilon(0.999 * sigma, 0.04, 2250, 1e-5,
                                                                 "rdp")  # fmt: skip


@pytest.mark.parametrize("target", [0.1, 3.0, 200.0])
def test_noise_keeps_its_promise_and_no_more_is_needed(target):
    sigma = noise_multiplier(target, 1e-5, 1.0, 1, accountant="prv")
    exact = exact_gaussian(sigma, 1, 1e-5)
    assert exact <= target <= exact + 0.03


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"target": 0.0}, "epsilon"),
        ({"target": math.inf}, "epsilon"),
        ({"target": 1e-4}, "epsilon"),  # below what RDP's orders reach
        ({"target": 0.005, "accountant": "prv"}, "epsilon"),  # below PRV's error
        ({"steps": 0}, "steps"),
        ({"sample_rate": 0.0}, "sample_rate"),
    ],
)
def test_refuses_noise_that_does_not_exist(change, key):
    asked = {"target": 8.0, "delta": 1e-5, "sample_rate": 1.0, "steps": 2} | change
    with pytest.raises(Refused) as refusal:
        noise_multiplier(**asked)
    assert refusal.value.key == key


# Mu, and what an adversary may name


def test_mu():
    assert gdp_mu(2.0, 1.0, 16) == 2.0
    central = 0.01 * 100 * math.sqrt(math.exp(1 / 16) - 1)
    assert gdp_mu(4.0, 0.01, 10_000) == pytest.approx(central)
    assert gdp_mu(0.01, 0.5, 10) == math.inf


@pytest.mark.parametrize(
    ("mu", "chance"), [(1.0, 0.3891), (2.0, 0.7638), (4.0, 0.9967), (0.0, 0.1)]
)
def test_naming_one_of_ten(mu, chance):
    assert naming(mu, 10) == pytest.approx(chance, abs=5e-5)
    assert naming(mu, 1) == 1.0


def best_namer(mu: float, pool: int) -> float:
    """How often the best guess is right where candidate i shifts coordinate i by mu."""
    return quad(lambda x: norm.pdf(x - mu) * norm.cdf(x) ** (pool - 1), -10, mu + 10)[0]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mu", [0.1, 1.0, 2.0, 4.0])
def test_no_namer_beats_the_bound(mu, pool):
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((4000, pool)) + mu * (np.arange(pool) == 0)
    right, exact = (seen.argmax(1) == 0).mean(), best_namer(mu, pool)
    assert abs(right - exact) < 5 * math.sqrt(exact * (1 - exact) / 4000) + 1e-9
    assert exact <= naming(mu, pool)
    assert naming(mu, pool) < 3 * exact  # and the bound is no empty one


def monte_carlo(run: Mechanism, pool: int, draws: int = 20_000) -> tuple[float, float]:
    """Hayes et al. 2023: the likeliest 1 / pool without the example, and their chance with it.

    With its standard error, twice, since the threshold is drawn too.
    """
    rng = np.random.default_rng(0)

    def losses(there: bool) -> np.ndarray:
        total = np.zeros(draws)
        for _ in range(run.steps):
            drawn = there & (rng.random(draws) < run.sample_rate)
            seen = run.noise_multiplier * rng.standard_normal(draws) + drawn
            ratio = (2 * seen - 1) / (2 * run.noise_multiplier**2)
            total += np.log1p(run.sample_rate * np.expm1(ratio))
        return total

    with_it, without = losses(True), losses(False)
    chance = (with_it > np.quantile(without, 1 - 1 / pool)).mean()
    return chance, 2 * math.sqrt(chance * (1 - chance) / draws * (1 + pool * chance))


@pytest.mark.parametrize("run", [(1.0, 0.2, 200), (1.0, 0.02, 200), (0.6, 0.1, 20)])
@pytest.mark.parametrize("pool", [10, 100])
def test_the_bound_of_a_run_is_what_monte_carlo_finds(run, pool):
    found, error = monte_carlo(Mechanism(*run), pool)
    bound = naming_bounds(Mechanism(*run), [pool])[pool]
    assert found - 3 * error < bound < found + 3 * error + 0.01 * found


def test_bounds_of_a_run_without_subsampling_are_the_closed_form():
    almost, whole = (naming_bounds(Mechanism(4.0, q, 16)) for q in (1 - 1e-9, 1.0))
    assert whole == {pool: naming(1.0, pool) for pool in POOLS}
    for pool in POOLS:
        assert whole[pool] <= almost[pool] < 1.01 * whole[pool] + 1e-6


def test_bounds_stay_chances_at_both_ends():
    assert naming_bounds(Mechanism(1.0, 0.1, 0)) == pytest.approx({p: 1 / p for p in POOLS})
    assert set(naming_bounds(Mechanism(1e-3, 0.1, 200)).values()) == {1.0}
    quiet = naming_bounds(Mechanism(100.0, 0.01, 10))
    assert all(1 / pool <= chance < 1.02 / pool for pool, chance in quiet.items())


def test_what_was_named_stands_beside_the_bound():
    run = Mechanism(1.0, 1.0, 1)
    few = named(2, 64, 1000, run, "attack=candidates")
    assert (few.name, few.kind, few.value) == ("naming 1 of 1000", "measured", 2 / 64)
    assert few.low < 2 / 64 < few.high
    assert few.bound == naming(1.0, 1000)
    none = sum(math.comb(64, k) * few.bound**k * (1 - few.bound) ** (64 - k) for k in range(2))
    assert few.chance == pytest.approx(1 - none)
    assert named(0, 64, 1000, run, "").chance == 1.0
    assert named(30, 64, 1000, run, "").chance < 1e-20  # the mechanism is not what it claims


def test_the_table_names_where_each_number_is_from():
    lines = formal(Mechanism(1.5, 0.04, 2250), 1e-5)
    of = {(line.name, line.how): line.value for line in lines}
    assert of["epsilon", ACCOUNTANTS["rdp"]] == pytest.approx(7.3291, abs=1e-4)
    assert of["epsilon", ACCOUNTANTS["prv"]] == pytest.approx(6.779, abs=1e-3)
    assert [line.name for line in lines][-4:] == ["mu", *(f"naming 1 of {p}" for p in POOLS)]
    assert {line.kind for line in lines} == {"bound", "approximation"}
    loud = formal(Mechanism(0.01, 0.1, 200), 1e-5)  # PRV has no number, and mu overflows
    assert [line.how for line in loud][:2] == [ACCOUNTANTS["rdp"], ACCOUNTANTS["rdp_mironov"]]
    assert "mu" not in {line.name for line in loud}

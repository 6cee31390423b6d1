"""Epsilon: published and independently computed numbers, and what must be refused."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedsec.checks import Refused
from fedsec.privacy import epsilon


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "prv", "rdp"),
    [
        (1.0, 0.02, 2000, 5.626, 6.150),
        (1.5, 0.04, 2250, 6.779, 7.3291),
        (1.5, 0.04, 2249, 6.7774, 7.327),
        (4.0, 0.01, 10_000, 0.957, 1.0355),  # Abadi et al. 2016: 1.26 by their older conversion
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

"""What a private training run guarantees: epsilon, mu, and how often an adversary can be right.

A run is the Poisson-subsampled Gaussian mechanism, composed over its steps; neighbours differ in
one example that is there or not. Opacus composes; here is what it composes, and the conversions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fedsec.checks import require

if TYPE_CHECKING:
    from opacus.accountants.analysis.prv import DiscretePRV

# Accountants, and how each comes to its epsilon.
ACCOUNTANTS = {
    "prv": "PRV (Gopi et al. 2021)",
    "rdp": "RDP, converted by Balle et al. 2020",
    "rdp_mironov": "RDP, converted by Mironov 2017",
}
POOLS = (10, 100, 1000)  # candidates among which an adversary names one

# Orders of the Renyi divergence: near 1 for little noise, thousands for much.
_ORDERS = (
    *(1 + x / 100 for x in range(1, 10)),
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *(2**e * m // 4 for e in range(6, 12) for m in range(4, 8)),
    4096,
)
_GRID = 2**22  # points of PRV's grid at most: a few seconds
_PRV_RANGE = 500.0  # of epsilon; Opacus's PRV overflows exp() towards 700
_TAIL = 1e-8  # probability left out where PRV bounds a chance, which is added to it
_MOST_NOISE = 1e5  # where the search for a noise multiplier gives up


class Mechanism(NamedTuple):
    """The Poisson-subsampled Gaussian mechanism, composed."""

    noise_multiplier: float  # deviation of the noise over the clipping norm, > 0
    sample_rate: float  # chance of an example to be in a step, in (0, 1]
    steps: int  # >= 0


@lru_cache(maxsize=256)
def epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str = "prv"
) -> float:
    """Epsilon at `delta` after `steps` steps: an upper bound; neighbours add or remove one example.

    "prv": numerical composition of privacy loss variables (Gopi et al. 2021), the tighter one. Its
    error, 0.01 (more where the grid would exceed `_GRID` points), is added to the result.
    "rdp": Renyi divergence of the sampled Gaussian mechanism (Mironov et al. 2019), converted by
    theorem 21 of Balle et al. 2020 (Canonne et al. 2020, proposition 12).
    "rdp_mironov": the same converted by proposition 3 of Mironov 2017, which older papers used, and
    so published larger numbers for the same run.

    Refuses what is no such run. PRV raises ArithmeticError where it has no number in floating
    point: epsilon above `_PRV_RANGE`, or delta near 1e-14; there RDP still has one, which may be
    infinite.
    """
    run = _checked(noise_multiplier, sample_rate, steps)
    require(0 < delta < 1, "delta", "must be in (0, 1)", delta)
    known = ", ".join(ACCOUNTANTS)
    require(accountant in ACCOUNTANTS, "accountant", f"must be among {known}", accountant)
    if steps == 0:
        return 0.0
    compute = {"prv": _prv, "rdp": _rdp, "rdp_mironov": _rdp_mironov}[accountant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return max(0.0, compute(run, delta))


def noise_multiplier(
    target: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp"
) -> float:
    """The least noise multiplier with which a run's epsilon is at most `target`, to 1e-5 of itself.

    Rounded up, so that it keeps the promise. Refuses a target that no noise reaches: with RDP's
    greatest order, and with PRV's error, epsilon does not fall to 0.
    """
    require(0 < target < math.inf, "epsilon", "must be above 0 and finite", target)
    require(steps >= 1, "steps", "must be at least 1", steps)

    def spent(sigma: float) -> float:
        try:
            return epsilon(sigma, sample_rate, steps, delta, accountant)
        except ArithmeticError:  # PRV's range is left by large epsilons only
            return epsilon(sigma, sample_rate, steps, delta, "rdp")

    rdp = noise_multiplier(target, delta, sample_rate, steps) if accountant == "prv" else 1.0
    return _least(spent, target, first=rdp)  # PRV takes a second a look, and little less noise


def gaussian_noise(target: float, delta: float, steps: int) -> float:
    """The same without subsampling, by the exact epsilon (`gaussian_epsilon`)."""
    require(0 < target < math.inf, "epsilon", "must be above 0 and finite", target)
    require(steps >= 1, "steps", "must be at least 1", steps)

    return _least(lambda sigma: gaussian_epsilon(gdp_mu(sigma, 1.0, steps), delta), target)


def _least(spent: Callable[[float], float], target: float, first: float = 1.0) -> float:
    """The least noise multiplier whose `spent` epsilon is at most `target`, near `first`.

    To 1e-5 of itself, rounded up.
    """
    from scipy.optimize import brentq

    def gap(sigma: float) -> float:
        found = spent(sigma)
        return math.log(found / target) if 0 < found < math.inf else math.copysign(99, found - 1)

    high = first
    while gap(high) > 0:
        high *= 2
        least = "no noise reaches it with this accountant, delta and steps; ask for more"
        require(high < _MOST_NOISE, "epsilon", least, target)
    low = high / 1.1
    while gap(low) <= 0:
        low, high = low / 1.5, low
    root = float(brentq(gap, low, high, xtol=1e-6 * low, rtol=1e-6))  # type: ignore[arg-type]
    while gap(root) > 0:
        root *= 1 + 5e-6
    return root


def gdp_mu(noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """Mu of Gaussian differential privacy: the run hides an example as N(0, 1) against N(mu, 1).

    Without subsampling sqrt(steps) / noise_multiplier, exactly. With it the central limit of Bu et
    al. 2020 ("Deep learning with Gaussian differential privacy", Poisson sampling): sample_rate
    sqrt(steps (exp(noise_multiplier^-2) - 1)), an approximation for many steps, much noise and a
    small rate: no bound, and off both ways elsewhere. Infinite where it overflows.
    """
    _checked(noise_multiplier, sample_rate, steps)
    if sample_rate == 1:
        return math.sqrt(steps) / noise_multiplier
    from opacus.accountants.analysis.gdp import compute_mu_poisson

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(
            compute_mu_poisson(
                steps=steps, noise_multiplier=noise_multiplier, sample_rate=sample_rate
            )
        )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at `delta` of a mu-GDP mechanism: exact, rounded up by at most 1e-9 of it.

    Balle and Wang 2018, theorem 8 ("Improving the Gaussian mechanism"). Infinite where mu is.
    """
    from scipy.special import log_ndtr

    require(mu >= 0, "mu", "must be at least 0", mu)
    require(0 < delta < 1, "delta", "must be in (0, 1)", delta)

    def over(e: float) -> bool:
        first, second = log_ndtr(mu / 2 - e / mu), e + log_ndtr(-mu / 2 - e / mu)
        gap = math.exp(min(0.0, second - first))
        return gap < 1 and bool(first + math.log1p(-gap) > math.log(delta))

    if mu == 0 or not over(0.0):
        return 0.0
    if not math.isfinite(mu) or mu > 1e6:
        return math.inf
    low, high = 0.0, 1.0
    while over(high):
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) else (low, middle)
    return high


def others(run: Mechanism, delta: float) -> tuple[tuple[str, float], ...]:
    """Epsilon by PRV and by RDP, as far as they have a number."""
    found = []
    for accountant in ("prv", "rdp"):
        try:
            found.append((accountant.upper(), epsilon(*run, delta, accountant)))
        except ArithmeticError:
            continue
    return tuple((name, e) for name, e in found if math.isfinite(e))


def naming(mu: float, pool: int) -> float:
    """The greatest chance of naming the right one of `pool` equally likely candidates under mu-GDP.

    Hayes, Mahloujifar and Balle 2023 ("Bounding training data reconstruction in DP-SGD", section
    3), with a uniform prior over `pool` candidates and the exact one asked for: the blow-up
    function at 1 / pool, which for a Gaussian is Phi(Phi^-1(1 / pool) + mu). The adversary knows
    all else: the other examples, model and defense.
    """
    from scipy.stats import norm

    require(mu >= 0, "mu", "must be at least 0", mu)
    require(pool >= 1, "pool", "must be at least 1", pool)
    return 1.0 if pool == 1 else float(norm.cdf(norm.ppf(1 / pool) + mu))


def naming_bounds(run: Mechanism, pools: Iterable[int] = POOLS) -> dict[int, float]:
    """The same for a run: an upper bound for each pool, in [1 / pool, 1].

    Without subsampling `naming` at the exact mu. With it the blow-up function is read off the
    privacy loss as PRV composes it: a set that has chance k without the example has at most
    exp(e) k + delta(e) with it, for every e, here with PRV's error in e and in delta added. Hayes
    et al. estimate the same by Monte Carlo, without a guarantee. 1 where PRV has no number.
    """
    run = _checked(*run)
    for pool in pools:
        require(pool >= 1, "pool", "must be at least 1", pool)
    if run.steps == 0 or run.sample_rate == 1:
        mu = gdp_mu(*run)
        return {pool: naming(mu, pool) for pool in pools}
    import numpy as np

    try:
        loss, error = _composed(run, _TAIL)
    except ArithmeticError:
        return dict.fromkeys(pools, 1.0)
    e, mass = loss.domain.ts, np.maximum(loss.pmf, 0)
    above = mass[::-1].cumsum()[::-1]  # P[loss >= e] with the example
    with np.errstate(over="ignore"):
        without = (mass * np.exp(-e))[::-1].cumsum()[::-1]  # and without it
        excess = above - np.exp(e) * without + _TAIL  # delta(e)
        chance = {pool: np.exp(e + error) / pool + excess for pool in pools}
    return {pool: float(np.nanmin(c).clip(1 / pool, 1)) for pool, c in chance.items()}


@dataclass(frozen=True)
class Line:
    """One number about a private run, and where it is from."""

    name: str
    value: float
    how: str  # accountant, conversion or theorem; or how it was measured
    kind: str  # "bound", "approximation" or "measured"


@lru_cache(maxsize=64)
def formal(run: Mechanism, delta: float) -> tuple[Line, ...]:
    """What is proven about a run, in one table; what is measured can be appended to it.

    Epsilon at `delta` by each accountant that has a number, mu, and the greatest chance of naming
    one of 10, 100 and 1,000 candidates.
    """
    lines = []
    if run.sample_rate == 1:
        how = "Gaussian, exact (Balle and Wang 2018)"
        lines.append(Line("epsilon", gaussian_epsilon(gdp_mu(*run), delta), how, "bound"))
    for accountant, how in ACCOUNTANTS.items():
        try:
            lines.append(Line("epsilon", epsilon(*run, delta, accountant), how, "bound"))
        except ArithmeticError:
            continue
    exact = run.sample_rate == 1
    how = "sqrt(steps) / noise multiplier" if exact else "central limit (Bu et al. 2020)"
    lines.append(Line("mu", gdp_mu(*run), how, "bound" if exact else "approximation"))
    how = "Hayes et al. 2023, " + ("exact mu" if exact else "blow-up function by PRV")
    for pool, chance in naming_bounds(run).items():
        lines.append(Line(f"naming 1 of {pool}", chance, how, "bound"))
    return tuple(line for line in lines if math.isfinite(line.value))


@dataclass(frozen=True)
class Named(Line):
    """How often an attack named the right one of a pool, beside the most that is proven."""

    low: float  # of the share's 95 % interval (Wilson 1927)
    high: float
    right: int
    made: int
    bound: float  # on the chance of each guess
    chance: float  # of at least so many right guesses under the bound


def named(right: int, made: int, pool: int, run: Mechanism, how: str) -> Named:
    """`right` of `made` guesses, each of one of `pool` candidates, under the mechanism `run`.

    A `chance` of next to nothing contradicts the bound, and with it the mechanism.
    """
    from scipy.stats import binom

    from fedsec.stats import wilson

    share, low, high = wilson(right, made)
    assert share is not None
    assert low is not None
    assert high is not None
    bound = naming_bounds(run, (pool,))[pool]
    chance = float(binom.sf(right - 1, made, bound))
    name = f"naming 1 of {pool}"
    return Named(name, share, how, "measured", low, high, right, made, bound, chance)


def _checked(noise_multiplier: float, sample_rate: float, steps: int) -> Mechanism:
    finite = 0 < noise_multiplier < math.inf
    require(finite, "noise_multiplier", "must be above 0 and finite", noise_multiplier)
    require(0 < sample_rate <= 1, "sample_rate", "must be in (0, 1]", sample_rate)
    require(steps >= 0, "steps", "must be at least 0", steps)
    return Mechanism(noise_multiplier, sample_rate, steps)


def _rdp(run: Mechanism, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [tuple(run)]
    return float(accountant.get_epsilon(delta, alphas=list(_ORDERS)))


def _rdp_mironov(run: Mechanism, delta: float) -> float:
    import numpy as np
    from opacus.accountants.analysis.rdp import compute_rdp

    divergence = compute_rdp(
        q=run.sample_rate, noise_multiplier=run.noise_multiplier, steps=run.steps,
        orders=list(_ORDERS),
    )  # fmt: skip
    return float(np.nanmin(divergence + math.log(1 / delta) / (np.array(_ORDERS) - 1)))


def _prv(run: Mechanism, delta: float) -> float:
    tail = delta / 1000  # Opacus's share of delta for errors
    loss, error = _composed(run, tail)
    try:
        result = float(loss.compute_epsilon(delta, tail, error)[2])
    except (ValueError, RuntimeError) as trouble:
        raise ArithmeticError(f"PRV has no number here: {trouble}") from trouble
    if not math.isfinite(result):
        raise ArithmeticError("PRV has no number here: floating point overflow")
    return result


@lru_cache(maxsize=2)
def _composed(run: Mechanism, tail: float) -> tuple[DiscretePRV, float]:
    """The privacy loss of the whole run, and the error of epsilon, but for probability `tail`.

    Gopi et al. 2021, algorithm 1, with Opacus's parts.
    """
    from opacus.accountants.analysis import prv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width = 2 * (_rdp(run, tail / 4) + 3)
        per_unit = math.sqrt(run.steps * math.log(12 / tail) / 2)
        error = max(0.01, width * per_unit / _GRID)
        if width > 2 * _PRV_RANGE or error > 0.5:
            raise ArithmeticError(
                "PRV has no number here: epsilon or steps are too large for its grid"
            )
        one = prv.PoissonSubsampledGaussianPRV(run.sample_rate, run.noise_multiplier)
        try:
            most = prv.compute_safe_domain_size([one], [run.steps], error, tail)
            domain = prv.Domain.create_aligned(-most, most, error / per_unit)
            # a truncated variable has what discretize asks of one
            cut = prv.TruncatedPrivacyRandomVariable(one, domain.t_min, domain.t_max)
            return prv.compose_heterogeneous([prv.discretize(cut, domain)], [run.steps]), error
        except (ValueError, RuntimeError) as trouble:
            raise ArithmeticError(f"PRV has no number here: {trouble}") from trouble

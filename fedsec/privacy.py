"""Epsilon of a training run with the Poisson-subsampled Gaussian mechanism, by Opacus."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

from fedsec.checks import require

ACCOUNTANTS = ("prv", "rdp")

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


@lru_cache(maxsize=256)
def epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str = "prv"
) -> float:
    """Epsilon at `delta` after `steps` steps: an upper bound; neighbours add or remove one example.

    "prv": numerical composition of privacy loss variables (Gopi et al. 2021), the tighter one. Its
    error, 0.01 (more where the grid would exceed `_GRID` points), is added to the result.
    "rdp": Renyi divergence of the sampled Gaussian mechanism (Mironov et al. 2019), converted by
    theorem 21 of Balle et al. 2020; older papers converted by Mironov 2017 and published larger
    numbers for the same run.

    Refuses what is no such run. PRV raises ArithmeticError where it has no number in floating
    point: epsilon above `_PRV_RANGE`, or delta near 1e-14; there RDP still has one, which may be
    infinite.
    """
    finite = 0 < noise_multiplier < math.inf
    require(finite, "noise_multiplier", "must be above 0 and finite", noise_multiplier)
    require(0 < sample_rate <= 1, "sample_rate", "must be in (0, 1]", sample_rate)
    require(steps >= 0, "steps", "must be at least 0", steps)
    require(0 < delta < 1, "delta", "must be in (0, 1)", delta)
    require(accountant in ACCOUNTANTS, "accountant", "must be prv or rdp", accountant)
    if steps == 0:
        return 0.0
    compute = {"prv": _prv, "rdp": _rdp}[accountant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return max(0.0, compute((noise_multiplier, sample_rate, steps), delta))


Run = tuple[float, float, int]  # noise multiplier, sampling rate, steps


def _rdp(run: Run, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [run]
    return float(accountant.get_epsilon(delta, alphas=list(_ORDERS)))


def _prv(run: Run, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    steps = run[2]
    tail = delta / 1000  # Opacus's share of delta for errors
    width = 2 * (_rdp(run, tail / 4) + 3)
    per_unit = math.sqrt(steps * math.log(12 / tail) / 2)
    error = max(0.01, width * per_unit / _GRID)
    if width > 2 * _PRV_RANGE or error > 0.5:
        raise ArithmeticError("PRV has no number here: epsilon or steps are too large for its grid")
    accountant = PRVAccountant()
    accountant.history = [run]
    try:
        result = float(accountant.get_epsilon(delta, eps_error=error))
    except (ValueError, RuntimeError) as trouble:
        raise ArithmeticError(f"PRV has no number here: {trouble}") from trouble
    if not math.isfinite(result):
        raise ArithmeticError("PRV has no number here: floating point overflow")
    return result

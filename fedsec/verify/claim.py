"""A number of the suite that can be measured again: what was published, and what must come out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedsec.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of `python -m fedsec.verify`: it holds where least <= measure(images) <= most."""

    attack: str  # an option of configs/attack
    paper: str  # authors, year, and where the number stands
    threat: str  # the least preset of configs/threat under which it is measured
    setting: str  # model, batch, steps: what decides the number
    published: str  # the paper's number, or "none usable: " and why
    unit: str  # of the measured number: dB, share, s
    measure: Callable[[Dataset], float]
    least: float = -math.inf
    most: float = math.inf
    data: str = "photos"  # or cifar10, which the user has to have

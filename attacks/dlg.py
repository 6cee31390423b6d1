"""Deep Leakage from Gradients."""

import math
from dataclasses import dataclass

from fedsec import engine
from fedsec.attack import Attack
from fedsec.checks import require

EVALUATIONS = 20  # gradient evaluations in one step of the L-BFGS that the paper uses


@dataclass(frozen=True, kw_only=True)
class DLG(Attack):
    """Images and labels whose gradient equals the observed one (Zhu et al. 2019, algorithm 1).

    Minimises the squared distance by L-BFGS without line search over pixels and label logits
    jointly, from standard normal values. Differs from the paper: returns the best iterate, and
    `restarts` starts afresh, as its authors did by hand where it diverged.
    """

    steps: int  # L-BFGS steps of 20 evaluations each, >= 1
    lr: float  # step length, > 0
    restarts: int  # random starts, the best objective wins, >= 1

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        require(self.steps >= 1, "steps", "must be at least 1", self.steps)
        require(0 < self.lr < math.inf, "lr", "must be above 0 and finite", self.lr)
        require(self.restarts >= 1, "restarts", "must be at least 1", self.restarts)

    @property
    def evaluations(self):
        return self.steps * EVALUATIONS * self.restarts

    def __call__(self, seen, rngs, progress):
        targets = seen.labels if "labels" in seen.grants else None
        return engine.match(seen, targets, search(self), rngs, progress)


def search(attack) -> engine.Search:
    """DLG's way of matching, which iDLG shares."""
    return engine.Search(
        distance=engine.squared,
        rule=engine.LBFGS(lr=attack.lr),
        steps=attack.steps * EVALUATIONS,
        restarts=attack.restarts,
    )

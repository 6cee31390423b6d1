"""Deep Leakage from Gradients."""

from dataclasses import dataclass

from fedsec import engine, rules
from fedsec.attack import Attack
from fedsec.checks import at_least, positive

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
        at_least(self, 1, "steps", "restarts")
        positive(self, "lr")

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
        rule=rules.LBFGS(lr=attack.lr),
        steps=attack.steps * EVALUATIONS,
        restarts=attack.restarts,
    )

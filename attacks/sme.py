"""Surrogate model extension: SME."""

import math
from dataclasses import dataclass

from fedsec import engine, labels, priors
from fedsec.attack import Attack
from fedsec.checks import require


@dataclass(frozen=True, kw_only=True)
class SME(Attack):
    """Images behind many local steps, by one gradient (Zhu et al. 2023, ICML).

    Local training goes from the weights before to the weights after. Some point on the straight
    line between them has a gradient that points almost along the whole update (section 3): the
    cosine distance to it is minimised over images and point together. A step costs what a step
    against a single gradient costs, however many local steps there were.
    """

    steps: int  # optimisation steps, >= 1
    lr: float  # length of a step, in normalised pixels, > 0; the point on the line moves lr / 100
    tv: float  # weight of the total variation of normalised pixels, >= 0
    restarts: int  # random starts, the best objective wins, >= 1

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        require(self.steps >= 1, "steps", "must be at least 1", self.steps)
        require(0 < self.lr < math.inf, "lr", "must be above 0 and finite", self.lr)
        require(0 <= self.tv < math.inf, "tv", "must be at least 0 and finite", self.tv)
        require(self.restarts >= 1, "restarts", "must be at least 1", self.restarts)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        search = engine.Search(
            distance=engine.cosine,
            priors=priors.smooth(seen, self.tv),
            rule=engine.Adam(lr=self.lr, betas=(0.9, 0.9)),
            schedule=engine.anneal(self.steps),
            steps=self.steps,
            restarts=self.restarts,
            surrogate=True,
            spread=0.1,
            spectrum=engine.PHOTOGRAPHS,
            boxed=True,
        )
        targets, spent = labels.targets_of(seen, rngs)
        return engine.match(seen, targets, search, rngs, progress, spent)

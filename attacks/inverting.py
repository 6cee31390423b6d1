"""Inverting Gradients: how easy is it to break privacy in federated learning?"""

import math
from dataclasses import dataclass

from fedsec import engine, labels
from fedsec.attack import Attack
from fedsec.checks import require


@dataclass(frozen=True, kw_only=True)
class Inverting(Attack):
    """Images whose update points the way the observed one does (Geiping et al. 2020, section 4).

    Minimises 1 - cosine similarity + `tv` x total variation by Adam on the sign of the gradient,
    from standard normal pixels, with the step length divided by ten after 3/8, 5/8 and 7/8 of the
    steps, inside the data range. Labels are recovered where they are withheld. Differs from the
    paper: returns the best iterate instead of the last.
    """

    steps: int  # optimisation steps, >= 1
    lr: float  # step length in normalised pixels, > 0
    tv: float  # weight of the total variation of normalised pixels, >= 0
    restarts: int  # random starts, the best objective wins, >= 1

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        require(self.steps >= 1, "steps", "must be at least 1", self.steps)
        require(0 < self.lr < math.inf, "lr", "must be above 0 and finite", self.lr)
        require(0 <= self.tv < math.inf, "tv", "must be at least 0 and finite", self.tv)
        require(self.restarts >= 1, "restarts", "must be at least 1", self.restarts)

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        search = engine.Search(
            distance=engine.cosine,
            priors=((self.tv, engine.total_variation),),
            rule=engine.Adam(lr=self.lr, signed=True),
            schedule=engine.decay(self.steps),
            steps=self.steps,
            restarts=self.restarts,
            boxed=True,
            direction=True,
        )
        targets, spent = labels.targets_of(seen, rngs)
        return engine.match(seen, targets, search, rngs, progress, spent)

"""Surrogate model extension: SME."""

from dataclasses import dataclass, replace

from fedsec import engine, labels, priors
from fedsec.attack import Attack
from fedsec.checks import at_least, positive


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
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        at_least(self, 1, "steps", "restarts")
        at_least(self, 0, "tv")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        terms = priors.smooth(seen, self.tv)
        search = engine.spectral(steps=self.steps, lr=self.lr, priors=terms, restarts=self.restarts)
        search = replace(search, surrogate=True, direction=False)  # the line needs the length
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        return engine.match(seen, targets, search, rngs, progress, spent)

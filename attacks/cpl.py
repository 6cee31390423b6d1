"""CPL: a framework for evaluating client privacy leakages."""

from dataclasses import dataclass

from attacks.dlg import EVALUATIONS
from fedsec import engine, labels, priors, rules
from fedsec.attack import Attack
from fedsec.checks import at_least, positive


@dataclass(frozen=True, kw_only=True)
class CPL(Attack):
    """DLG from a patterned start, with the label's loss as a regulariser (Wei et al. 2020).

    Minimises the squared distance of the gradients + `label` x the squared distance of the model's
    output from the label (equation 6) by L-BFGS, from a small random square that is repeated
    over the image (section 3.3), which converges where noise does not. Returns the best iterate.
    """

    steps: int  # L-BFGS steps of 20 evaluations each, >= 1
    lr: float  # step length, > 0
    label: float  # weight of the label regulariser, >= 0
    tile: int  # pixels of the side of the repeated square, >= 0; 0: no pattern
    restarts: int  # random starts, the best objective wins, >= 1
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        at_least(self, 1, "steps", "restarts")
        at_least(self, 0, "label", "tile")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * EVALUATIONS * self.restarts

    def __call__(self, seen, rngs, progress):
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        search = engine.Search(
            distance=engine.squared,
            priors=((self.label, priors.same_labels(seen, targets)),),
            rule=rules.LBFGS(lr=self.lr),
            steps=self.steps * EVALUATIONS,
            restarts=self.restarts,
            tile=self.tile,
        )
        return engine.match(seen, targets, search, rngs, progress, spent)

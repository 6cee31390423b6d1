"""iDLG: Improved Deep Leakage from Gradients."""

from dataclasses import dataclass

from attacks.dlg import EVALUATIONS, search
from fedsec import engine, labels
from fedsec.attack import Attack
from fedsec.checks import at_least, positive


@dataclass(frozen=True, kw_only=True)
class IDLG(Attack):
    """DLG with the label read off the last layer's gradient first (Zhao et al. 2020).

    At batch 1 the label is exact: the one class whose output gradient is negative (section 3.1).
    Differs from the paper: larger batches use label counts; returns the best iterate.
    """

    steps: int  # L-BFGS steps of 20 evaluations each, >= 1
    lr: float  # step length, > 0
    restarts: int  # random starts, the best objective wins, >= 1
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        at_least(self, 1, "steps", "restarts")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def evaluations(self):
        return self.steps * EVALUATIONS * self.restarts

    def __call__(self, seen, rngs, progress):
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        return engine.match(seen, targets, search(self), rngs, progress, spent)

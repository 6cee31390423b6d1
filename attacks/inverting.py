"""Inverting Gradients: how easy is it to break privacy in federated learning?"""

import math
from dataclasses import dataclass

from fedsec import engine, labels, priors
from fedsec.attack import Attack
from fedsec.checks import require


@dataclass(frozen=True, kw_only=True)
class Inverting(Attack):
    """Images whose update points the way the observed one does (Geiping et al. 2020, section 4).

    Minimises 1 - cosine similarity + `tv` x total variation inside the data range, and returns the
    best iterate. Labels are recovered where they are withheld.

    `rule` signed is the paper's: Adam on the sign of the gradient, from standard normal pixels, the
    step length divided by ten after 3/8, 5/8 and 7/8 of the steps. spectral minimises the same in a
    fraction of the steps: Adam on cosine coefficients (engine.Spectrum), from nearly grey, its step
    length annealed to nothing.
    """

    rule: str  # signed or spectral
    steps: int  # optimisation steps, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    tv: float  # weight of the total variation of normalised pixels, >= 0
    restarts: int  # random starts, the best objective wins, >= 1
    patience: int  # steps without progress that end a restart, >= 0; 0: none do
    halving: bool  # give up the worse half of the restarts after 1/8, 1/4 and 1/2 of the steps
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        require(
            self.rule in ("signed", "spectral"), "rule", "must be signed or spectral", self.rule
        )
        require(self.steps >= 1, "steps", "must be at least 1", self.steps)
        require(0 < self.lr < math.inf, "lr", "must be above 0 and finite", self.lr)
        require(0 <= self.tv < math.inf, "tv", "must be at least 0 and finite", self.tv)
        require(self.restarts >= 1, "restarts", "must be at least 1", self.restarts)
        require(self.patience >= 0, "patience", "must be at least 0", self.patience)
        labels.known(self.labels)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        if not self.halving or self.restarts == 1:
            return self.steps * self.restarts
        left = [max(1, -(-self.restarts // 2**n)) for n in range(4)]
        eighths = sum(n * share for n, share in zip(left, (1, 1, 2, 4), strict=True))
        return math.ceil(self.steps * eighths / 8)

    def __call__(self, seen, rngs, progress):
        spectral = self.rule == "spectral"
        search = engine.Search(
            distance=engine.cosine,
            priors=priors.smooth(seen, self.tv),
            rule=engine.Adam(
                lr=self.lr, signed=not spectral, betas=(0.9, 0.9 if spectral else 0.999)
            ),
            schedule=engine.anneal(self.steps) if spectral else engine.decay(self.steps),
            steps=self.steps,
            restarts=self.restarts,
            spread=0.1 if spectral else 1.0,
            spectrum=engine.PHOTOGRAPHS if spectral else None,
            boxed=True,
            direction=True,
            patience=self.patience,
            halving=self.halving,
        )
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        return engine.match(seen, targets, search, rngs, progress, spent)

"""Inverting Gradients: how easy is it to break privacy in federated learning?"""

import math
from dataclasses import dataclass, replace

from fedsec import engine, labels, priors, rules
from fedsec.attack import Attack
from fedsec.checks import at_least, one_of, positive, require


@dataclass(frozen=True, kw_only=True)
class Inverting(Attack):
    """Images whose update points the way the observed one does (Geiping et al. 2020, section 4).

    Minimises 1 - cosine similarity + `tv` x total variation inside the data range, and returns the
    best iterate. Labels are recovered where they are withheld.

    `rule` signed is the paper's: Adam on the sign of the gradient, from standard normal pixels, the
    step length divided by ten after 3/8, 5/8 and 7/8 of the steps. spectral minimises the same in a
    fraction of the steps: Adam on cosine coefficients (rules.Spectrum), from nearly grey, its step
    length annealed to nothing. `variation` anisotropic with a `fade` of 1 is the paper's, too;
    double_opponent, for which edges of all channels lie at one place, and a weight that falls from
    `fade` times `tv` to `tv` (engine.Fade) give better images.
    """

    rule: str  # signed or spectral
    steps: int  # optimisation steps, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    tv: float  # weight of the total variation of normalised pixels, >= 0
    fade: float = 1.0  # times `tv` that the weight is at first, >= 1
    power: float = rules.PHOTOGRAPHS  # of rules.Spectrum: how fast steps shorten with detail, >= 0
    variation: str = "anisotropic"  # or double_opponent: one of priors.VARIATIONS
    restarts: int  # random starts, the best objective wins, >= 1
    patience: int  # steps without progress that end a restart, >= 0; 0: none do
    half: float = 0.0  # share of the steps, from the first on, in bfloat16 where layers allow, <= 1
    halving: bool  # give up the worse half of the restarts after 1/8, 1/4 and 1/2 of the steps
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        one_of(self, "rule", "signed", "spectral")
        one_of(self, "variation", *priors.VARIATIONS)
        at_least(self, 1, "steps", "restarts", "fade")
        at_least(self, 0, "tv", "patience", "power", "half")
        require(self.half <= 1, "half", "must be at most 1", self.half)
        positive(self, "lr")
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
        terms = priors.smooth(seen, self.tv, priors.VARIATIONS[self.variation], self.fade)
        search = engine.spectral(steps=self.steps, lr=self.lr, priors=terms, restarts=self.restarts)
        if self.rule == "signed":
            signed, decay = rules.Adam(lr=self.lr, signed=True), rules.decay(self.steps)
            search = replace(search, rule=signed, schedule=decay, spread=1.0, spectrum=None)
        else:
            search = replace(search, spectrum=self.power)
        search = replace(search, patience=self.patience, halving=self.halving, half=self.half)
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        return engine.match(seen, targets, search, rngs, progress, spent)

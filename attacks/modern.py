"""The published parts of gradient matching that have proved strongest, put together."""

import math
from dataclasses import dataclass

from fedsec import engine, labels, priors
from fedsec.attack import Attack
from fedsec.checks import require


@dataclass(frozen=True, kw_only=True)
class Modern(Attack):
    """Soft-sign Adam from a patterned start, warmed up and annealed, with double-opponent TV.

    Minimises 1 - cosine similarity (Geiping et al. 2020) + `tv` x the total variation of channels
    and their differences, as the preset "modern" of the `breaching` library does, from a square of
    normal pixels that is repeated over the image (Wei et al. 2020). Differs from it: soft sign is
    the hyperbolic tangent of the gradient over its root mean square. `attack=inverting` is stronger
    in as many steps: this one stands for what was published.
    """

    steps: int  # optimisation steps, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    warmup: int  # steps over which the length rises, >= 0
    tv: float  # weight of the double-opponent total variation, >= 0
    tile: int  # pixels of the side of the repeated square, >= 0; 0: no pattern
    restarts: int  # random starts, the best objective wins, >= 1

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        for key, least in (("steps", 1), ("restarts", 1), ("warmup", 0), ("tile", 0)):
            value = getattr(self, key)
            require(value >= least, key, f"must be at least {least}", value)
        require(0 < self.lr < math.inf, "lr", "must be above 0 and finite", self.lr)
        require(0 <= self.tv < math.inf, "tv", "must be at least 0 and finite", self.tv)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        search = engine.Search(
            distance=engine.cosine,
            priors=priors.smooth(seen, self.tv, priors.double_opponents),
            rule=engine.Adam(lr=self.lr, soft=self.steps),
            schedule=engine.warmed(engine.anneal(self.steps), self.warmup),
            steps=self.steps,
            restarts=self.restarts,
            tile=self.tile,
            boxed=True,
            direction=True,
        )
        targets, spent = labels.targets_of(seen, rngs)
        return engine.match(seen, targets, search, rngs, progress, spent)

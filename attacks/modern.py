"""The published parts of gradient matching that have proved strongest, put together."""

from dataclasses import dataclass

from fedsec import engine, labels, priors, rules
from fedsec.attack import Attack
from fedsec.checks import at_least, positive


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
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        at_least(self, 1, "steps", "restarts")
        at_least(self, 0, "warmup", "tile", "tv")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        search = engine.Search(
            distance=engine.cosine,
            priors=priors.smooth(seen, self.tv, priors.double_opponents, 1.0),
            rule=rules.Adam(lr=self.lr, soft=self.steps),
            schedule=rules.warmed(rules.anneal(self.steps), self.warmup),
            steps=self.steps,
            restarts=self.restarts,
            tile=self.tile,
            boxed=True,
            direction=True,
        )
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        return engine.match(seen, targets, search, rngs, progress, spent)

"""GradInversion: See through gradients."""

from dataclasses import dataclass

from fedsec import engine, labels, priors, rules
from fedsec.attack import Attack
from fedsec.checks import at_least, positive, require


@dataclass(frozen=True, kw_only=True)
class GradInversion(Attack):
    """Batches by gradient matching, image priors, and agreement of restarts (Yin et al. 2021).

    Minimises the squared distance of the gradients, relative to the observed one's length, +
    total variation, L2 norm and BatchNorm statistics of the images (section 3.3), + the distance
    of each restart from the mean of all (section 3.4), by Adam with warm-up and cosine decay.

    `statistics` says what stands for the batch statistics of the private images: `exact` ones,
    which a client hardly ever sends; the `running` averages of the model; or those `inferred` from
    the buffers that come with the update. Differs from the paper: restarts are averaged pixel by
    pixel without registration, no noise is added to the steps, and the best iterate is returned.
    """

    steps: int  # optimisation steps, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    warmup: int  # steps over which the length rises, >= 0
    tv: float  # weight of the total variation, >= 0
    l2: float  # weight of the mean squared pixel, >= 0
    statistics: str  # inferred, running, exact or none
    bn: float  # weight of the distance of the BatchNorm statistics, >= 0
    group: float  # weight of the distance from the restarts' mean, >= 0
    restarts: int  # random starts, which agree; the best objective wins, >= 1
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    def __post_init__(self):
        known = ", ".join(priors.STATISTICS)
        inside = self.statistics in priors.STATISTICS
        require(inside, "statistics", f"must be among {known}", self.statistics)
        at_least(self, 1, "steps", "restarts")
        at_least(self, 0, "warmup", "tv", "l2", "bn", "group")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def needs(self):  # type: ignore[override]
        more = {"inferred": {"buffers"}, "exact": {"norm_stats"}}.get(self.statistics, set())
        return frozenset({"model", "update|aggregate", "count", "shape"} | more)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        terms = [(self.tv, engine.total_variation), (self.l2, priors.length)]
        if self.statistics != "none" and self.bn > 0:
            same = priors.same_statistics(seen, self.statistics)
            terms += [(self.bn, same)] if same else []
        search = engine.Search(
            distance=engine.relative,
            priors=tuple(terms),
            group=self.group if self.restarts > 1 else 0.0,
            rule=rules.Adam(lr=self.lr),
            schedule=rules.warmed(rules.anneal(self.steps), self.warmup),
            steps=self.steps,
            restarts=self.restarts,
            boxed=True,
        )
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        return engine.match(seen, targets, search, rngs, progress, spent)

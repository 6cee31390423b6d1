"""Which images of a pool are behind the update? The adversary that formal bounds speak of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from fedsec import cost, solve
from fedsec.attack import Attack
from fedsec.checks import at_least
from fedsec.defense import Defense, parts
from fedsec.likelihood import NATS, Pool
from fedsec.models import BatchNorm2d, last_linear

FITS = 1e-3  # misfit up to which a candidate explains an update without noise


@dataclass(frozen=True, kw_only=True)
class Candidates(Attack):
    """Chooses the candidates under which the update is likeliest: the informed adversary.

    For one image that adversary is optimal: nobody who knows model, defense and pool is right more
    often (Balle et al. 2022, section 3; Hayes et al. 2023, section 4.1: the prior-aware attack,
    which ranks by inner product instead). Each candidate's update is simulated as the defense would
    send it, and compared by likelihood (fedsec.likelihood). Labels that are withheld are tried, and
    summed over where there is noise.

    An update of a batch is taken for the mean of its images' own: how much of each hypothesis is in
    it is a least squares problem, and the largest shares win (not in the papers). It is not quite
    that mean where images meet: in BatchNorm, over local steps, and where a defense mixes them or
    rounds their sum.
    """

    classes: int  # labels tried with each candidate, the likeliest by the output's gradient, >= 1

    private = True
    needs = frozenset({"candidates", "model", "update", "count", "shape"})

    def __post_init__(self):
        at_least(self, 1, "classes")

    def gflop_at_most(self, seen):
        tried = len(seen.candidates[0]) * self.classes
        entries = sum(t[0].numel() for t in seen.update.tensors.values())
        products = 2e-9 * tried * (tried + 2) * entries if seen.count > 1 else 0.0
        looks = (tried + seen.count) * max(1, seen.step.steps)
        return products + looks * cost.update_gflop(seen.model, 1, seen.shape)

    def __call__(self, seen, rngs, progress):
        def one(update, v):
            pool = Pool(seen, update, v, self._tried(seen, v))
            pairs, lead = pool.batch() if seen.count > 1 else pool.single()
            misfit = float(pool.misfit({k: t.sum(0, True) for k, t in pool.shares(pairs).items()}))
            flags = tuple(_words(seen, pool, misfit, lead))
            return solve.Found(*pool.named(pairs), torch.tensor(misfit), flags)

        return solve.each(seen, rngs, progress, one)

    def _tried(self, seen, victim: int) -> Int[Tensor, " k"]:
        if "labels" in seen.grants:
            return seen.labels[victim].argmax(-1).unique()
        name, layer = last_linear(seen.model)
        weight = seen.update.tensors[f"{name}.weight"][victim].sum(-1)
        bias = None if layer.bias is None else seen.update.tensors[f"{name}.bias"][victim]
        return (weight if bias is None else bias).argsort()[: self.classes]


def _words(seen, pool: Pool, misfit: float, lead: float) -> Iterator[str]:
    if (pool.defense or Defense()).mixes:
        yield "candidates: the defense mixes images, and single ones were compared"
    if seen.count > 1 and any(isinstance(m, BatchNorm2d) for m in seen.model.modules()):
        yield "candidates: BatchNorm joins the images of the batch, and single ones were compared"
    if seen.count > 1 and (pool.defense or Defense()).rounds:
        yield "candidates: the defense rounds their sum, and single ones were compared"
    if seen.count > 1 and any(not part.turns for part in parts(pool.defense or Defense())):
        yield "candidates: the defense scales their sum, and single ones were compared"
    if seen.count > 1 and pool.local.kind == "fedavg" and pool.local.steps > 1:
        yield "candidates: local steps join the images of the batch, and single ones were compared"
    if not pool.misfit.nats and misfit > FITS:
        yield "candidates: none explains the update; the nearest ones are shown"
    if lead < NATS:
        yield "candidates: not certain; others are nearly as likely"

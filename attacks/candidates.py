"""Which images of a pool are behind the update? The adversary that formal bounds speak of."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fedsec import cost
from fedsec.attack import Attack
from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.likelihood import Misfit, alone, products, shares
from fedsec.models import BatchNorm2d, last_linear
from fedsec.types import Reconstruction, Tensors

CHUNK, HELD = 2**24, 2**30  # bytes of simulated updates: at a time, and of all for a batch
FITS = 1e-3  # misfit up to which a candidate explains an update without noise
NATS = 3.0  # lead over the next candidate below which a choice is not certain: odds of 20 to 1


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

    needs = frozenset({"candidates", "model", "update", "count", "shape"})

    def __post_init__(self):
        require(self.classes >= 1, "classes", "must be at least 1", self.classes)

    def gflop_at_most(self, seen):
        tried = len(seen.candidates[0]) * self.classes
        entries = sum(t[0].numel() for t in seen.update.tensors.values())
        products = 2e-9 * tried * (tried + 2) * entries if seen.count > 1 else 0.0
        looks = (tried + seen.count) * max(1, seen.step.steps)
        return products + looks * cost.update_gflop(seen.model, 1, seen.shape)

    def __call__(self, seen, rngs, progress):
        images, told, loss, flags, spent = [], [], [], [], []

        def one(victim: int) -> None:
            pool = _Pool(seen, victim, self._tried(seen, victim))
            pairs, lead = pool.batch() if seen.count > 1 else pool.single()
            misfit = float(pool.misfit({k: t.sum(0, True) for k, t in pool.shares(pairs).items()}))
            images.append(pool.images[pairs // len(pool.tried)])
            told.append(pool.tried[pairs % len(pool.tried)])
            loss.append(torch.tensor(misfit))
            flags.append(tuple(_words(seen, pool, misfit, lead)))

        for v in range(len(rngs)):
            spent.append(cost.flops(partial(one, v)))
            progress(v + 1, len(rngs), float(loss[-1]))
        found = torch.stack(images), torch.stack(told), torch.stack(loss)
        nothing = torch.zeros(len(rngs), dtype=torch.long)
        gflop = torch.tensor(spent, dtype=torch.float64)
        return Reconstruction(*found, nothing, gflop, tuple(flags))

    def _tried(self, seen, victim: int) -> Int[Tensor, " k"]:
        if "labels" in seen.grants:
            return seen.labels[victim].argmax(-1).unique()
        name, layer = last_linear(seen.model)
        weight = seen.update.tensors[f"{name}.weight"][victim].sum(-1)
        bias = None if layer.bias is None else seen.update.tensors[f"{name}.bias"][victim]
        return (weight if bias is None else bias).argsort()[: self.classes]


class _Pool:
    """The hypotheses about one victim: pair p is image p // tried with the label p % tried."""

    def __init__(self, seen, victim: int, tried: Int[Tensor, " k"]):
        self.sent = {k: t[victim] for k, t in seen.update.tensors.items()}
        self.local = seen.step
        self.defense = seen.defense if "defense" in seen.grants else None
        self.misfit = Misfit(self.sent, self.local, self.defense)
        self.model, self.count = seen.model, seen.count
        self.images, self.tried = seen.candidates[victim], tried
        self.targets = F.one_hot(tried, last_linear(seen.model)[1].out_features).to(self.images)
        self.bytes = sum(t.nbytes for t in self.sent.values())  # of a pair's update
        pairs = torch.arange(len(self.images) * len(tried), device=tried.device)
        self.chunks = pairs.split(max(1, CHUNK // self.bytes))

    def shares(self, pairs: Int[Tensor, " n"]) -> Tensors:
        """What each of the pairs adds to the update, [n, *parameter]."""
        images = self.images[pairs // len(self.tried)]
        targets = self.targets[pairs % len(self.tried)]
        each = alone(self.model, images, targets, self.local, self.defense or Defense())
        return {k: t / self.count for k, t in each.items()}

    def single(self) -> tuple[Int[Tensor, " 1"], float]:
        """The likeliest pair, and by how many nats its image leads."""
        misfits = torch.cat([self.misfit(self.shares(chunk)) for chunk in self.chunks])
        rows = misfits.view(len(self.images), -1)
        each = -(-rows).logsumexp(1) if self.misfit.nats else rows.amin(1).clamp_min(1e-30).log()
        image = each.argmin()
        first = each.sort().values[:2]
        pair = image * len(self.tried) + rows[image].argmin()
        return pair[None], float(first[-1] - first[0])

    def batch(self) -> tuple[Int[Tensor, " b"], float]:
        """The pairs with the largest shares, and a lead: 0 where the next image's is as large."""
        kept = self.misfit.mask or {k: torch.ones_like(t) for k, t in self.sent.items()}
        where = torch.cat([m.flatten() for m in kept.values()]).nonzero()[:, 0]
        size = len(where) * self.bytes // sum(t.numel() for t in self.sent.values())
        where = where[:: 1 + size * self.chunks[-1][-1].item() // HELD]  # what there is room for

        def rows(tensors: Tensors, lead: int) -> Tensor:
            return torch.cat([t.flatten(lead) for t in tensors.values()], -1)[..., where]

        each = torch.cat([rows(self.shares(chunk), 1) for chunk in self.chunks])
        gram, along = products(each, rows(self.sent, 0))
        found = shares(gram, along, self.count).view(len(self.images), -1)
        most, images = found.sum(1).sort(descending=True)
        images = images[: self.count]
        pairs = images * len(self.tried) + found[images].argmax(1)
        gap = float(most[self.count - 1] - most[self.count]) if len(most) > self.count else 1.0
        return pairs, 2 * NATS * gap


def _words(seen, pool: _Pool, misfit: float, lead: float) -> Iterator[str]:
    if (pool.defense or Defense()).mixes:
        yield "candidates: the defense mixes images, and single ones were compared"
    if seen.count > 1 and any(isinstance(m, BatchNorm2d) for m in seen.model.modules()):
        yield "candidates: BatchNorm joins the images of the batch, and single ones were compared"
    if seen.count > 1 and (pool.defense or Defense()).rounds:
        yield "candidates: the defense rounds their sum, and single ones were compared"
    if seen.count > 1 and pool.local.kind == "fedavg" and pool.local.steps > 1:
        yield "candidates: local steps join the images of the batch, and single ones were compared"
    if not pool.misfit.nats and misfit > FITS:
        yield "candidates: none explains the update; the nearest ones are shown"
    if lead < NATS:
        yield "candidates: not certain; others are nearly as likely"

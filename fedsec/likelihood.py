"""How well an update that a known batch would cause explains the one that was sent.

A defense publishes its transform, its mask and its noise (fedsec.defense); this is where who knows
them compares updates. Tensors carry hypotheses as their leading axis.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from fedsec.defense import Defense, clips, parts
from fedsec.engine import simulate
from fedsec.models import last_linear
from fedsec.threat import Observation
from fedsec.types import Local, Tensors, Update

CHUNK, HELD = 2**24, 2**30  # bytes of simulated updates: at a time, and of all for a batch
NATS = 3.0  # lead over the next candidate below which a choice is not certain: odds of 20 to 1


def alone(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n k"],
    local: Local,
    defense: Defense,
) -> Tensors:
    """The update [n, *parameter] that each image alone would cause, as the defense's steps do it.

    Without noise, and before what the defense does to a whole update.
    """

    clip = defense.per_example if clips(defense) else None
    own = replace(local, parts=())

    def one(image: Tensor, target: Tensor) -> Tensors:
        return simulate(model, image[None], target[None], own, clip)

    return vmap(one)(images, targets)


class Misfit:
    """Of clean updates to one that was sent: negative log likelihood, up to a constant, in nats.

    Squared error for Gaussian noise (and for a mix with Laplace, by their variance), absolute error
    for Laplace noise. `nats` is False where no noise is known of: then it is the squared error over
    the square of what is compared of the sent update. An unknown defense may have changed the
    length of the update, and so may one that scales all of it by the length of layers that carry
    draws, so that clean ones are scaled to fit first: it is one minus the squared cosine
    similarity.
    """

    def __init__(self, sent: Tensors, local: Local, defense: Defense | None):
        self.sized = defense is not None and not _lengthless(defense)
        defense = defense or Defense()
        self.mask = defense.mask(Update(sent, {}, 0))
        self.expected = defense.expected
        gaussian, laplace = (sd * local.diluted for sd in defense.noise(local))
        variance = gaussian**2 + laplace**2
        self.nats, self.absolute = variance > 0, gaussian == 0 < laplace
        self.sent = sent if self.mask is None else {k: t * self.mask[k] for k, t in sent.items()}
        square = max(1e-300, sum(float(t.double().square().sum()) for t in self.sent.values()))
        scale = math.sqrt(2) / laplace if self.absolute else None
        self.scale = scale or (1 / (2 * variance) if self.nats else 1 / square)

    def __call__(self, clean: Tensors) -> Float[Tensor, " n"]:
        rows = [{k: t[i] for k, t in clean.items()} for i in range(_len(clean))]
        each = [self.expected(row, self.sent) for row in rows]
        clean = {k: torch.stack([e[k] for e in each]) for k in clean}
        if not self.sized:
            fit = _dot(clean, {k: t[None] for k, t in self.sent.items()}) / _dot(
                clean, clean
            ).clamp_min(1e-300)
            clean = {k: _times(fit.clamp_min(0), t) for k, t in clean.items()}
        total = torch.zeros((), dtype=torch.float64)
        for name, sent in self.sent.items():
            apart = clean[name] - sent
            apart = apart.abs() if self.absolute else apart.square()
            total = total.to(apart.device) + apart.reshape(len(apart), -1).sum(
                1, dtype=torch.float64
            )
        return self.scale * total


def _lengthless(defense: Defense) -> bool:
    """Whether what is compared is scaled by a length that nobody knows."""
    every = parts(defense)
    return any(part.layers for part in every) and not all(part.turns for part in every)


def _len(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def _times(factors: Float[Tensor, " n"], tensor: Tensor) -> Tensor:
    return tensor * factors.to(tensor).view(-1, *[1] * (tensor.dim() - 1))


def _dot(one: Tensors, other: Tensors) -> Float[Tensor, " n"]:
    """Inner products over all parameters, in double; both are [n, *parameter]."""
    parts = [(one[k] * other[k]).reshape(_len(one), -1).sum(1, dtype=torch.float64) for k in one]
    return torch.stack(parts).sum(0)


def products(
    each: Float[Tensor, "n p"], sent: Float[Tensor, " p"]
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Inner products of hypotheses with each other and with the sent update, in double."""
    parts = each.split(256)  # not all of it in double at once
    gram = torch.cat([torch.cat([a.double() @ b.double().T for b in parts], 1) for a in parts])
    return gram, torch.cat([a.double() @ sent.double() for a in parts])


def shares(gram: Float[Tensor, "n n"], along: Float[Tensor, " n"], count: int) -> Tensor:
    """How much of each hypothesis is in a sum of `count` of them, [n]: at least 0, `count` in all.

    Least squares (Lawson and Hanson 1974), exact where hypotheses are independent and noise is
    none. Without the sum, labels would cancel: an image's gradients under all of its labels, each
    as often as the model predicts it, add up to nothing.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-13 * values[-1].clamp_min(1e-300)
    root, basis = values[kept].sqrt(), vectors[:, kept].T
    weight = 10 * values[-1].clamp_min(1e-300).sqrt()  # of the sum: it holds to rounding
    left = torch.cat([root[:, None] * basis, weight.expand(1, len(gram))])
    right = torch.cat([basis @ along / root, count * weight[None]])
    found, _ = nnls(left.cpu().numpy(), right.cpu().numpy(), maxiter=100 * len(gram))
    return torch.from_numpy(found).to(gram.device)


class Pool:
    """The hypotheses about one victim: pair p is image p // tried with the label p % tried."""

    def __init__(self, seen: Observation, sent: Tensors, victim: int, tried: Int[Tensor, " k"]):
        self.sent = sent
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
        images, targets = self.named(pairs)[0], self.targets[pairs % len(self.tried)]
        each = alone(self.model, images, targets, self.local, self.defense or Defense())
        return {k: t / self.count for k, t in each.items()}

    def named(self, pairs: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """The pairs' images and labels."""
        return self.images[pairs // len(self.tried)], self.tried[pairs % len(self.tried)]

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

"""Cocktail party attack: breaking aggregation-based privacy in federated learning using ICA."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import cost, engine
from fedsec.attack import Attack
from fedsec.checks import Refused, require
from fedsec.ica import cocktail, edges, likelihood, minimised, principal, whitened
from fedsec.models import first_layer
from fedsec.spear import labels_of
from fedsec.types import Local, Reconstruction, Tensors

INSIDE = 0.75  # share of an image's pixels in range from which its length is believed


@dataclass(frozen=True, kw_only=True)
class Cocktail(Attack):
    """Images that a first linear layer's gradient mixes, told apart by ICA (Kariyappa et al. 2023).

    Each row of the gradient is a weighted sum of the batch's inputs. Whitened to rank `count`, it
    is unmixed by one of two contrasts (fedsec/ica.py). `pixels` is the paper's, here by
    L-BFGS. `edges` makes differences of neighbouring pixels independent: it has both of the paper's
    priors at once, few edges and vectors that differ, with no weights between them.

    An unmixing vector gives an image up to sign and length. Unlike in the paper, the vector's sum
    of the bias's gradient gives both, as far as the vector is right; where that leaves too many
    pixels out of range the image is stretched to [0, 1], which is the paper's, and a flag says so.
    `loss` is 1 - cosine similarity of the re-computed update; labels as in attacks/spear.py.
    """

    rule: str  # edges or pixels: what is made independent
    steps: int  # of L-BFGS, at most, >= 1
    tv: float  # weight of the total variation in pixels, >= 0
    apart: float  # weight of the likeness of unmixing vectors in pixels, >= 0

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        require(self.rule in ("edges", "pixels"), "rule", "must be edges or pixels", self.rule)
        require(self.steps >= 1, "steps", "must be at least 1", self.steps)
        require(0 <= self.tv < math.inf, "tv", "must be at least 0 and finite", self.tv)
        require(0 <= self.apart < math.inf, "apart", "must be at least 0 and finite", self.apart)

    def gflop_at_most(self, seen):
        """Of the products of rows: the steps are little beside them."""
        layer = first_layer(seen.model)[1]
        assert isinstance(layer, nn.Linear), "check refuses other models"
        return 2e-9 * layer.out_features**2 * layer.in_features

    def check(self, model: nn.Module) -> None:
        name, layer = first_layer(model)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            rule = "attack=cocktail needs a fully connected first layer with bias (model=mlp)"
            raise Refused("model", rule, f"{type(layer).__name__} {name}")

    def __call__(self, seen, rngs, progress):
        update = seen.sent
        found, spent = [], []

        def one(observed: Tensors, rng: torch.Generator) -> None:
            found.append(self._unmix(seen, observed, rng))

        for v, rng in enumerate(rngs):
            observed = {k: t[v] for k, t in update.tensors.items()}
            spent.append(cost.flops(partial(one, observed, rng)))
            progress(v + 1, len(rngs), float(found[-1][2]))
        images, labels, loss, steps, flags = zip(*found, strict=True)
        images, labels, loss = (torch.stack(part) for part in (images, labels, loss))
        gflop = torch.tensor(spent, dtype=torch.float64)
        return Reconstruction(images, labels, loss, torch.tensor(steps), gflop, flags)

    def _unmix(self, seen, observed: Tensors, rng: torch.Generator):
        """Images [b c h w], labels [b], loss [], steps and flags of one victim."""
        model, (name, _) = seen.model, first_layer(seen.model)
        rows, bias = observed[f"{name}.weight"], observed[f"{name}.bias"].double()
        images = rows.new_full((seen.count, *seen.shape), 0.5)
        labels = torch.full((seen.count,), -1, device=rows.device)
        finite = all(t.isfinite().all() for t in observed.values())
        if not finite or not rows.any():
            why = "cocktail found no image: the first layer's gradient is zero or not finite"
            return images, labels, rows.new_ones(()), 0, (why,)
        left = principal(rows.double(), seen.count, 64 * torch.finfo(rows.dtype).eps)
        n, mixed = left.shape[1], left.T @ rows.double()
        if self.rule == "edges":
            whiten, white = whitened(edges(mixed.reshape(-1, *seen.shape)))
            start, objective = torch.eye(n).to(white), partial(likelihood, white)
        else:
            whiten, white = whitened(mixed - mixed.mean(1, keepdim=True))
            start = torch.randn(n, n, generator=rng, dtype=torch.float64).to(white)
            view = white.reshape(n, *seen.shape)
            objective = partial(cocktail, view, tv=self.tv, apart=self.apart)
        unmixing, steps = minimised(objective, start, self.steps)
        vectors = (unmixing if self.rule == "edges" else F.normalize(unmixing)) @ whiten
        sums = vectors @ (left.T @ bias)
        images[:n], believed = _lengthened(vectors @ mixed, sums, model.normalise, seen.shape)
        passed = (left @ torch.linalg.pinv(vectors)).T * sums.sign()[:, None]
        labels[:n] = labels_of(model, f"{name}.bias", images[:n], passed.to(images.dtype))
        whole = "local" in seen.grants and n == seen.count
        local = seen.local if whole else Local(kind="gradient", lr=1.0)
        targets = F.one_hot(labels[:n], len(model(images[:1])[0])).to(images.dtype)
        loss = engine.cosine(engine.simulate(model, images[:n], targets, local), observed)
        flags = []
        if believed < n:
            flags.append(f"cocktail stretched {n - believed} of {n} images of unknown length")
        if n < seen.count:
            flags.append(f"cocktail tells {n} of {seen.count} images apart; the rest are grey")
        return images, labels, loss.detach(), steps, tuple(flags)


def _lengthened(
    x: Float[Tensor, "n d"], sums: Float[Tensor, " n"], normalise: Any, shape: tuple[int, ...]
) -> tuple[Float[Tensor, "n c h w"], int]:
    """Images in [0, 1], inputs over their vectors' sums of the bias's gradient, and how many.

    The other ones are stretched: they would leave the range, or have no sum.
    """
    pixels = (x / sums[:, None]).reshape(-1, *shape) * normalise.std + normalise.mean
    inside = ((pixels > -0.02) & (pixels < 1.02)).flatten(1).double().mean(1) >= INSIDE
    signed = torch.where(sums[:, None] < 0, -x, x).reshape(-1, *shape) * normalise.std
    low, high = (signed.flatten(1).aminmax(dim=1)[i][:, None, None, None] for i in (0, 1))
    stretched = (signed - low) / (high - low).clamp_min(1e-300)
    images = torch.where(inside[:, None, None, None], pixels, stretched)
    return images.clamp(0, 1), int(inside.sum())

"""Soteria: the last layer's gradient without the features that say most about the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.models import drawing, last_linear, tracking
from fedsec.rng import stream
from fedsec.types import Batch, Tensors, Update


@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    """Perturbed representation: Sun et al., "Provable defense against privacy leakage", CVPR 2021.

    Of the d features r that the last fully connected layer sees, the floor(ratio d) with the
    largest |r_i| / |d r_i / d x|, averaged over the batch, are left out of that layer's weight
    gradient: their columns are zero. Bias and all other gradients are sent as they are. x is the
    batch in [0, 1]. The Jacobian's rows are not computed one by one as in the authors' code, which
    takes d backward passes: their lengths are estimated from its products with `probes` random
    directions, which are public and the same in every step.

    Guarantee: none; the paper's bounds what the representation says, which the gradients of earlier
    layers say again. Adaptive attack: zeros show the columns, so match only under `mask`: what is
    left in the layer is exact, and so are the layers before. Known break: Balunovic et al.,
    "Bayesian framework for gradient leakage", ICLR 2022, leave the layer out of the match.
    """

    ratio: float  # in [0, 1), share of the features whose gradient becomes zero
    probes: int  # >= 1, directions; the lengths are right to about 1 / sqrt(2 probes)

    rereads = True

    def __post_init__(self):
        require(0 <= self.ratio < 1, "ratio", "must be in [0, 1)", self.ratio)
        require(self.probes >= 1, "probes", "must be at least 1", self.probes)

    def perturb(
        self, model: nn.Module, batch: Batch, gradient: Tensors, step: int, rng: torch.Generator
    ) -> Tensors:
        if len(batch) == 0:
            return gradient
        name, _ = last_linear(model)
        key = f"{name}.weight" if name else "weight"
        scores = self.scores(model, batch.images).mean(0)
        count = math.floor(Fraction(str(self.ratio)) * len(scores))
        hidden = scores.argsort(descending=True, stable=True)[:count]
        return gradient | {key: gradient[key].index_fill(1, hidden, 0.0)}

    def mask(self, update: Update) -> Tensors:
        """Which entries of a sent update carry a value: what an attack should compare."""
        return {k: t != 0 for k, t in update.tensors.items()}

    def scores(self, model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """|r_i| / |d r_i / d x| of each image's features; 0 where r_i is."""
        with tracking(model, False), drawing(model, False), torch.enable_grad():
            x = images.detach().requires_grad_()
            r = _features(model, x)
            rows = torch.zeros_like(r, requires_grad=True)  # J' rows is linear in them
            (back,) = torch.autograd.grad(r, x, rows, create_graph=True)
        squares = torch.zeros_like(r.detach())
        for probe in range(self.probes):
            rng = stream(0, "soteria", probe)
            direction = torch.randn(images.shape, generator=rng, dtype=images.dtype)
            (along,) = torch.autograd.grad(back, rows, direction.to(back), retain_graph=True)
            squares += along.square() / self.probes
        size = r.detach().abs()
        return torch.where(size > 0, size / squares.sqrt().clamp_min(1e-30), 0.0)


def _features(model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """What the last fully connected layer sees."""
    seen: list[Tensor] = []
    _, layer = last_linear(model)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[0]

"""CENSOR: what is sent is orthogonal to the gradient, and as long."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedsec.checks import at_least, positive
from fedsec.defense import Defense
from fedsec.models import drawing, tracking
from fedsec.types import Batch, Tensors


@dataclass(frozen=True, kw_only=True)
class Censor(Defense):
    """CENSOR: Zhang et al., "Defense against gradient inversion via orthogonal subspace Bayesian
    sampling", NDSS 2025.

    In each step `trials` directions are drawn: for each tensor of the gradient standard normal
    entries, less their projection on the tensor, scaled to its length. That one is taken after
    which, by a step of size `lr`, the loss on the batch is least. A tensor of one entry has no
    orthogonal one, and becomes zero. The projection is exact here; the authors' code divides it by
    the tensor's length once too few, which leaves its direction in. They measure the loss in eval
    mode, here it is measured in the mode of the step, without moving running statistics.

    Guarantee: none. Adaptive attack: two numbers of each tensor stay, its length, and that the
    gradient is orthogonal to what was sent (`expected`). They single out the right one of a pool
    of candidates: on the default lenet all of 16 images among 1,000 each (attack=candidates
    threat=informed_labels). For pixels they are far too few, ten tensors against thousands, so that
    matching attacks do not use them, and only guess from priors; a batch or several local steps are
    sums of what these numbers describe. Known break: none published.
    """

    trials: int  # >= 1, directions drawn in a step; each costs a forward pass
    lr: float  # > 0, step size at which a direction is tried

    random = True
    rereads = True
    matched = False

    def __post_init__(self):
        at_least(self, 1, "trials")
        positive(self, "lr")

    def perturb(
        self, model: nn.Module, batch: Batch, gradient: Tensors, step: int, rng: torch.Generator
    ) -> Tensors:
        if len(batch) == 0:
            return gradient
        best, least = gradient, math.inf
        for _ in range(self.trials):
            tried = {name: orthogonal(g, rng) for name, g in gradient.items()}
            loss = self.loss_after(model, batch, tried)
            if loss < least or best is gradient:  # not a number: still never the gradient itself
                best, least = tried, loss
        return best

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        """Of all that each gradient may have become, the one nearest to what was sent."""
        if sent is None:
            return tensors
        return {k: nearest(t, sent[k]) for k, t in tensors.items()}

    @torch.no_grad()
    def loss_after(self, model: nn.Module, batch: Batch, direction: Tensors) -> float:
        """The loss on the batch after a step of size `lr` along the direction."""
        named = dict(model.named_parameters())
        moved = {k: named[k] - self.lr * d for k, d in direction.items()}
        with tracking(model, False), drawing(model, False):
            logits = functional_call(model, moved, (batch.images,))
        return float(cross_entropy(logits, batch.targets.to(logits.dtype)))


def nearest(tensor: Tensor, sent: Tensor) -> Tensor:
    """What is orthogonal to the tensor and as long, as near to `sent` as can be."""
    if tensor.numel() == 1:
        return torch.zeros_like(tensor)
    length = tensor.norm()
    unit = tensor / length.clamp_min(1e-30)
    rest = sent - (sent * unit).sum() * unit
    return rest * (length / rest.norm().clamp_min(1e-30))


def orthogonal(tensor: Tensor, rng: torch.Generator) -> Tensor:
    """A random tensor of the same length whose inner product with it is zero."""
    if tensor.numel() == 1:
        return torch.zeros_like(tensor)
    drawn = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype).to(tensor.device)
    length = tensor.norm()
    unit = tensor / length.clamp_min(1e-30)
    for _ in range(2):  # twice: the first leaves rounding errors of the projection
        drawn = drawn - (drawn * unit).sum() * unit
    return drawn * (length / drawn.norm().clamp_min(1e-30))

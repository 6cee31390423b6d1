"""OUTPOST: pruning, and noise by how far a layer's weights are spread, ever more rarely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from defenses.prune import smallest
from fedsec.checks import at_least, require
from fedsec.defense import Defense
from fedsec.types import Batch, Tensors, Update


@dataclass(frozen=True, kw_only=True)
class Outpost(Defense):
    """OUTPOST: Wang et al., "More than enough is too much: adaptive defenses against gradient
    leakage in production federated learning", INFOCOM 2023.

    The t-th local step of an update, from 0, is perturbed with probability 1 / (1 + decay t), else
    it is sent as it is: a reply of one gradient always is perturbed. Then, of each tensor, the
    floor(prune n) entries of least magnitude become zero, and N(0, (scale r)^2) is added where its
    Fisher information, the squared gradient averaged over the tensor's first axis, is among the
    largest `share` of all tensors'. The risk r of a tensor is the variance of its weights, at most
    1; 0 for a single weight. This follows the authors' code, of which the version that we read
    computes it and then returns the gradient unchanged; details of the paper may differ.

    Guarantee: none; nothing is clipped. Adaptive attack: zeros show what was pruned and got no
    noise, so match only under `mask`. That the rest has noise of known deviation by tensor is not
    used: it is not in `noise`. Known break: none published.
    """

    prune: float  # in [0, 1), share of each tensor's entries that become zero
    scale: float  # >= 0, deviation of the noise at risk 1, in units of the gradient's entries
    share: float  # in [0, 1], of the Fisher information's entries that get noise
    decay: float  # >= 0, how fast perturbed steps become rare

    random = True

    def __post_init__(self):
        require(0 <= self.prune < 1, "prune", "must be in [0, 1)", self.prune)
        require(0 <= self.share <= 1, "share", "must be in [0, 1]", self.share)
        at_least(self, 0, "scale", "decay")

    def perturb(
        self, model: nn.Module, batch: Batch, gradient: Tensors, step: int, rng: torch.Generator
    ) -> Tensors:
        if float(torch.rand((), generator=rng)) >= 1 / (1 + self.decay * step):
            return gradient
        weights = dict(model.named_parameters())
        noisy = self.noisy(gradient)
        return {
            name: self._pruned(g) + self.scale * risk(weights[name]) * noisy[name] * _normal(g, rng)
            for name, g in gradient.items()
        }

    def mask(self, update: Update) -> Tensors:
        """Which entries of a sent update carry a value: what an attack should compare."""
        return {k: t != 0 for k, t in update.tensors.items()}

    def noisy(self, gradient: Tensors) -> Tensors:
        """Where noise is added: entries of the largest Fisher information."""
        fisher = {k: g.square().mean(0) if g.dim() else g.square() for k, g in gradient.items()}
        every = torch.cat([f.flatten() for f in fisher.values()])
        count = math.floor(Fraction(str(1 - self.share)) * every.numel())
        least = every.kthvalue(count).values if count else every.new_full((), -1.0)
        return {k: (f > least).expand_as(gradient[k]) for k, f in fisher.items()}

    def _pruned(self, tensor: Tensor) -> Tensor:
        count = math.floor(Fraction(str(self.prune)) * tensor.numel())
        return tensor.masked_fill(smallest(tensor, count), 0.0) if count else tensor


def risk(weights: Tensor) -> float:
    """How spread out a tensor's weights are, in [0, 1]."""
    return min(1.0, float(weights.detach().var())) if weights.numel() > 1 else 0.0


def _normal(tensor: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype).to(tensor.device)

"""Additive noise on the update, without clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.types import Local, Update

DISTRIBUTIONS = ("gaussian", "laplace")


@dataclass(frozen=True, kw_only=True)
class Noise(Defense):
    """Independent noise on every entry of the update: Zhu et al., "Deep leakage", NeurIPS 2019.

    `std` is the standard deviation of both distributions, in units of the update's entries.
    Running statistics get none.

    Guarantee: none, whatever the noise: the update is not clipped, so one example can change it by
    any amount, and no noise is large beside an unbounded change. Use dpsgd for a guarantee.
    Adaptive attack: the likelihood is known, so match by squared error (gaussian) or absolute
    error (laplace), and average over the rounds. Known break: Zhu et al. (2019) and Wei et al.
    (2020) invert through noise that training survives.
    """

    std: float  # >= 0, standard deviation, in units of the update's entries
    distribution: str  # gaussian or laplace

    random = True

    def __post_init__(self):
        require(0 <= self.std < math.inf, "std", "must be at least 0 and finite", self.std)
        rule = f"must be {' or '.join(DISTRIBUTIONS)}"
        require(self.distribution in DISTRIBUTIONS, "distribution", rule, self.distribution)

    def update(self, update: Update, rng: torch.Generator) -> Update:
        noisy = {k: t + self.std * self._draw(t, rng) for k, t in update.tensors.items()}
        return replace(update, tensors=noisy)

    def noise(self, local: Local) -> tuple[float, float]:
        return (self.std, 0.0) if self.distribution == "gaussian" else (0.0, self.std)

    def _draw(self, tensor: Tensor, rng: torch.Generator) -> Tensor:
        """Noise of unit variance in the shape of `tensor`."""
        if self.distribution == "gaussian":
            unit = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype)
        else:  # the difference of two exponential variables is Laplace's, of variance 2
            left, right = (
                torch.empty(tensor.shape, dtype=tensor.dtype).exponential_(generator=rng)
                for _ in range(2)
            )
            unit = (left - right) / math.sqrt(2)
        return unit.to(tensor.device)

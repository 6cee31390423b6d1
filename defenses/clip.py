"""Clipping: an update that is too long is scaled down as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from defenses.dpsgd import clip_factors, norms
from fedsec.checks import positive
from fedsec.defense import Defense
from fedsec.types import Tensors, Update


@dataclass(frozen=True, kw_only=True)
class Clip(Defense):
    """Norm clipping: Pascanu et al., ICML 2013; of clients' updates, McMahan et al., ICLR 2018.

    The update, all its tensors together and 0-dimensional ones included, is multiplied by
    min(1, norm / its L2 norm). Running statistics are not clipped. DP-SGD clips each example
    instead, and adds noise.

    Guarantee: none: it bounds what a client can do to the model, and hides nothing. Adaptive
    attack: clip the guess's update too; by directions alone (cosine) nothing needs to be known.
    Known break: every gradient inversion attack that compares directions, first Geiping et al.,
    "Inverting gradients", NeurIPS 2020.
    """

    norm: float  # > 0, largest L2 norm of an update

    turns = False

    def __post_init__(self):
        positive(self, "norm")

    def update(self, update: Update, rng: torch.Generator) -> Update:
        return replace(update, tensors=self.expected(update.tensors))

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        factor = clip_factors(norms({k: t[None] for k, t in tensors.items()}), self.norm)[0]
        return {k: factor * t for k, t in tensors.items()}

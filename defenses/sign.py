"""Signs: of each entry of the update only its sign is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.types import Tensors, Update

SCALES = ("mean", "one")


@dataclass(frozen=True, kw_only=True)
class Sign(Defense):
    """signSGD: Bernstein et al., "signSGD: compressed optimisation", ICML 2018.

    An entry g becomes sign(g), +1, -1, or 0 where it is zero, times what `scale` says: 1 with one,
    the paper's, whose step size is the server's alone; with mean the mean of |g| over the entry's
    tensor (Karimireddy et al., "Error feedback fixes signSGD", ICML 2019), for which the step size
    of plain gradients will do. Nothing is carried over to the next round (no error feedback), and
    the server takes the mean, not the majority. Running statistics are sent as they are.

    Guarantee: none. Adaptive attack: compare the signs of the guess's update with those that were
    sent, and differentiate as if they had not been taken (see `engine.through`). Known break: an
    update has many more entries than the images behind it have pixels, so that one bit of each is
    enough; a cosine match that does not know of the signs finds much less.
    """

    scale: str  # mean or one: what signs are multiplied by in each tensor

    rounds = True

    def __post_init__(self):
        require(self.scale in SCALES, "scale", f"must be {' or '.join(SCALES)}", self.scale)

    def update(self, update: Update, rng: torch.Generator) -> Update:
        return replace(update, tensors=self.expected(update.tensors))

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        return {k: t.sign() * self._size(t) for k, t in tensors.items()}

    def bytes(self, update: Update) -> int:
        """A bit for an entry, two where some are zero, and the scale of each tensor."""
        if any(t[t != 0].abs().unique().numel() > 1 for t in update.tensors.values()):
            return super().bytes(update)
        bits = [t.numel() * (2 if (t == 0).any() else 1) for t in update.tensors.values()]
        entries = sum(4 + -(-b // 8) for b in bits)
        return entries + sum(t.nbytes for t in update.buffers.values())

    def _size(self, tensor: Tensor) -> Tensor | float:
        return tensor.abs().mean() if self.scale == "mean" else 1.0

"""Quantisation: each entry of the update becomes one of few equally spaced values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.types import Tensors, Update

ROUNDINGS = ("stochastic", "nearest")
COARSE = 3  # bits up to which a match gains by knowing what stochastic rounding may have sent


@dataclass(frozen=True, kw_only=True)
class Quantize(Defense):
    """Uniform quantisation: QSGD, Alistarh et al., NeurIPS 2017; with 2 bits TernGrad (Wen 2017).

    With s = 2^(bits - 1) - 1 and step = max |g| / s over a tensor, its entry g becomes step times
    one of -s, ..., s: a `bits` wide integer. nearest: round(g / step), a half to the even
    neighbour. stochastic: the integer below g / step, or the one above with probability
    g / step - floor(g / step), so that the mean over draws is g. QSGD takes the L2 norm for the
    length s of a tensor, its experiments (section 5) the maximum, as here. The largest entry, zeros
    and 0-dimensional tensors stay as they are. Running statistics are not rounded.

    Guarantee: none: random rounding hides nothing of an entry that falls on a step. Adaptive
    attack: round the guess's update too, at random towards what was sent, and differentiate as if
    it had not been rounded (see `engine.through`); with stochastic rounding to 4 or more bits a
    plain match finds more, since the mean of what is sent is the update itself. Known break: at 8
    bits it is no defense at all, and at 2 what is left of many entries still fixes the image.
    """

    bits: int  # in [2, 16], of an entry
    rounding: str  # stochastic or nearest

    rounds = True

    def __post_init__(self):
        require(2 <= self.bits <= 16, "bits", "must be in [2, 16]; defense=sign is 1", self.bits)
        rule = f"must be {' or '.join(ROUNDINGS)}"
        require(self.rounding in ROUNDINGS, "rounding", rule, self.rounding)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.rounding == "stochastic"

    @property
    def matched(self) -> bool:  # type: ignore[override]
        return not self.random or self.bits <= COARSE

    @property
    def levels(self) -> int:
        """Values above zero."""
        return 2 ** (self.bits - 1) - 1

    def update(self, update: Update, rng: torch.Generator) -> Update:
        if not self.random:
            return replace(update, tensors=self.expected(update.tensors))
        drawn = {}
        for name, tensor in update.tensors.items():
            whole, step = self._levels(tensor)
            coin = torch.rand(tensor.shape, generator=rng, dtype=tensor.dtype).to(tensor.device)
            drawn[name] = (whole.floor() + (coin < whole - whole.floor())) * step
        return replace(update, tensors=drawn)

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        """The rounded update; of stochastic rounding the draw nearest to `sent`, or the mean."""
        if self.random and sent is None:
            return tensors
        rounded = {}
        for name, tensor in tensors.items():
            whole, step = self._levels(tensor)
            if sent is None or not self.random:
                rounded[name] = whole.round() * step
            else:
                told = self._levels(sent[name])[0].round()
                rounded[name] = told.maximum(whole.floor()).minimum(whole.ceil()) * step
        return rounded

    def bytes(self, update: Update) -> int:
        """`bits` for an entry, and the step of each tensor."""
        whole = [self._levels(t)[0] for t in update.tensors.values()]
        rounding = max(1e-3, 4e-7 * self.levels)
        if any(((w - w.round()).abs() > rounding).any() for w in whole):
            return super().bytes(update)
        entries = sum(4 + -(-t.numel() * self.bits // 8) for t in update.tensors.values())
        return entries + sum(t.nbytes for t in update.buffers.values())

    def _levels(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor in steps, not yet rounded, and the step. Zeros stay zeros."""
        most = tensor.abs().amax()
        step = most / self.levels
        # not tensor / step: the largest entry is a whole number of steps, whatever rounding did
        return tensor / torch.where(most > 0, most, 1) * self.levels, step

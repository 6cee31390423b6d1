"""Gradient pruning: only the largest entries are sent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.types import Tensors, Update

SCOPES = ("tensor", "global")


@dataclass(frozen=True, kw_only=True)
class Prune(Defense):
    """Gradient sparsification: Aji and Heafield, "Sparse communication", EMNLP 2017.

    The floor(ratio n) entries of least magnitude become zero, of each tensor of the update (`scope`
    tensor) or of all its entries together (global: one threshold, which empties layers of small
    gradients first); among equal ones the first go first. Zhu et al. (2019) proposed it as a
    defense, Huang et al. (2021, GradAttack) measured it. Nothing is carried over to the next round
    (no error feedback). Running statistics are not pruned.

    Guarantee: none. Adaptive attack: the zeros show which entries were dropped, so match only
    under `mask`. Known break: at 90 % images stay recognisable (Huang et al. 2021).
    """

    ratio: float  # in [0, 1), share of the entries that become zero
    scope: str = "tensor"  # share of each tensor, or of all of them: "tensor" or "global"

    def __post_init__(self):
        require(0 <= self.ratio < 1, "ratio", "must be in [0, 1)", self.ratio)
        rule = f"must be {' or '.join(SCOPES)}"
        require(self.scope in SCOPES, "scope", rule, self.scope)

    def update(self, update: Update, rng: torch.Generator) -> Update:
        return replace(update, tensors=self.expected(update.tensors))

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        if sent is not None:
            return super().expected(tensors, sent)
        if self.scope == "tensor":
            return {k: self._pruned(t) for k, t in tensors.items()}
        whole = self._pruned(torch.cat([t.flatten() for t in tensors.values()]))
        parts = whole.split([t.numel() for t in tensors.values()])
        return {k: p.view_as(t) for (k, t), p in zip(tensors.items(), parts, strict=True)}

    def bytes(self, update: Update) -> int:
        """The entries that are not zero, with their 4-byte positions or with a bit for each entry.

        Whichever is smaller, and dense where nothing is gained.
        """
        size, count = sum(t.numel() for t in update.tensors.values()), 0
        values = 0
        for tensor in update.tensors.values():
            kept = int(tensor.count_nonzero())
            count, values = count + kept, values + kept * tensor.element_size()
        dense = super().bytes(update)
        beside = dense - sum(t.nbytes for t in update.tensors.values())
        return min(dense, beside + values + min(4 * count, -(-size // 8)))

    def mask(self, update: Update) -> Tensors:
        """Which entries of a sent update carry a value: what an attack should compare."""
        return {k: t != 0 for k, t in update.tensors.items()}

    def _pruned(self, tensor: Tensor) -> Tensor:
        # the fraction that the user wrote: 0.29 of 100 is 29, though 0.29 * 100 < 29
        count = math.floor(Fraction(str(self.ratio)) * tensor.numel())
        return tensor.masked_fill(smallest(tensor, count), 0.0) if count else tensor.clone()


def smallest(tensor: Tensor, count: int) -> Tensor:
    """Where the `count` entries of least magnitude are; among equal ones, the first.

    By selection: torch.quantile refuses more than 2^24 entries before torch 2.15.
    """
    magnitude = tensor.abs().flatten()
    threshold = magnitude.kthvalue(count).values
    below = magnitude < threshold
    tied = magnitude == threshold
    first = tied.cumsum(0) <= count - below.sum()
    return (below | (tied & first)).view_as(tensor)

"""Mixup: the loss sees convex combinations of the images of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.types import Batch


@dataclass(frozen=True, kw_only=True)
class Mixup(Defense):
    """Mixup of k images: Zhang et al., ICLR 2018, as a defense in Huang et al. (ICML 2020, 2021).

    Encoding i is a sum of image i and k - 1 other images of the batch, drawn without replacement
    for each encoding, with coefficients |N(0, 1)| scaled to sum to one and redrawn while one of
    them exceeds `upper` (a hundred times; then they move towards 1 / k until they fit). The
    targets are mixed with the same coefficients. An encoding stays in [0, 1]. A batch of fewer
    than k images is refused; the empty one stays empty. The published code mixes with k - 1
    permutations of the batch instead, which may mix an image with itself.

    Guarantee: none. Adaptive attack: reconstruct the encodings, then separate the images, each of
    which appears in several. Known break: Carlini et al., "Is private learning possible with
    instance encoding?", IEEE S&P 2021.
    """

    k: int  # >= 2, images in one encoding
    upper: float  # in [1 / k, 1], bound on the largest coefficient

    mixes = True
    random = True

    def __post_init__(self):
        require_mixable(self.k, self.upper)

    def batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        return mixed(batch, self.k, self.upper, rng, "mixup")


def mixed(batch: Batch, k: int, upper: float, rng: torch.Generator, name: str) -> Batch:
    """`batch` with its images and its targets multiplied by one draw of `mixing`."""
    if len(batch) == 0:
        return batch
    rule = f"{name} needs at least {k} images in a batch; lower its k, or raise this"
    require(len(batch) >= k, "victim_batch", rule, len(batch))
    weights = mixing(len(batch), k, upper, rng).to(batch.images)
    images = (weights @ batch.images.flatten(1)).view_as(batch.images)
    targets = weights.to(batch.targets) @ batch.targets
    mix = weights if batch.mix is None else weights @ batch.mix
    return Batch(images.clamp(0.0, 1.0), targets, mix=mix)


def mixing(n: int, k: int, upper: float, rng: torch.Generator) -> Float[Tensor, "n n"]:
    """Row i: the weights of encoding i, k of them above zero, its own image's among them."""
    order = torch.rand(n, n, generator=rng)
    order.fill_diagonal_(-1.0)  # its own image comes first
    partners = order.argsort(dim=1)[:, :k]
    return torch.zeros(n, n).scatter(1, partners, coefficients(n, k, upper, rng))


def coefficients(n: int, k: int, upper: float, rng: torch.Generator) -> Float[Tensor, "n k"]:
    def draw(rows: int) -> Tensor:
        magnitude = torch.randn(rows, k, generator=rng).abs()
        return magnitude / magnitude.sum(dim=1, keepdim=True)

    rows = draw(n)
    for _ in range(100):
        over = rows.amax(dim=1) > upper
        if not over.any():
            return rows
        rows[over] = draw(int(over.sum()))
    excess = (rows.amax(dim=1, keepdim=True) - 1 / k).clamp(min=1e-9)
    return 1 / k + (rows - 1 / k) * ((upper - 1 / k) / excess).clamp(max=1.0)


def require_mixable(k: int, upper: float) -> None:
    """Refuse numbers for which no such mix exists."""
    require(k >= 2, "k", "must be at least 2", k)
    require(1 / k <= upper <= 1, "upper", f"must be in [1 / k, 1] = [{1 / k:g}, 1]", upper)

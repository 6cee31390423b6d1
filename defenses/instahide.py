"""InstaHide: mixup, then a random sign for every pixel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from defenses.mixup import mixed, require_mixable
from fedsec.defense import Defense
from fedsec.types import Batch


@dataclass(frozen=True, kw_only=True)
class InstaHide(Defense):
    """Intra-dataset InstaHide: Huang et al., "InstaHide", ICML 2020.

    Mixup of k images of the batch (see `defenses.mixup.Mixup`), then a fresh random sign for each
    pixel and channel. Images live in [0, 1] here, so the sign turns about mid-grey:
    0.5 + s (mix - 0.5), s = +1 or -1, that is, a pixel p stays or becomes 1 - p, and an encoding
    stays in [0, 1]. The published code flips the sign after mean/std normalisation, about the data
    set's mean colour instead of 0.5. The targets are mixed, without signs. The paper also encodes
    the images that it tests on; accuracy here is measured on plain ones, and is lower.

    Guarantee: none. Adaptive attack: the magnitude |encoding - 0.5| = |mix - 0.5| survives the
    signs, see `magnitude`; compare magnitudes over many encodings. Known break: Carlini et al.,
    "Is private learning possible with instance encoding?", IEEE S&P 2021.
    """

    k: int  # >= 2, images in one encoding
    upper: float  # in [1 / k, 1], bound on the largest coefficient

    mixes = True
    random = True

    def __post_init__(self):
        require_mixable(self.k, self.upper)

    def batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        mix = mixed(batch, self.k, self.upper, rng, "instahide")
        coins = torch.randint(2, mix.images.shape, generator=rng).to(mix.images.device)
        return replace(mix, images=torch.where(coins == 1, mix.images, 1 - mix.images))

    def magnitude(self, encodings: Float[Tensor, "*v c h w"]) -> Float[Tensor, "*v c h w"]:
        """|mix - 0.5| in [0, 0.5]: what the signs do not hide."""
        return (encodings - 0.5).abs()

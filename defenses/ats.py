"""ATS: images go through a searched, published policy of transformations before the loss."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.types import Batch

# Those of the authors' fifty that their policies for CIFAR-100 name: what, and how far.
TRANSFORMS = {
    1: ("contrast", 0.5 * 6 / 9),
    3: ("across", 150 / 331 * 9 / 9),  # share of the width
    7: ("down", 150 / 331 * 2 / 9),  # share of the height
    18: ("contrast", 0.5 * 7 / 9),
    43: ("down", 150 / 331 * 3 / 9),
}


@dataclass(frozen=True, kw_only=True)
class ATS(Defense):
    """Automatic transformation search: Gao et al., "Privacy-preserving collaborative learning with
    automatic transformation search", CVPR 2021. The search is not repeated: its results are used.

    A policy is a list of numbers of the authors' table, applied in that order, always. 3 shifts an
    image across by 45 % of its width, 7 down by 10 % and 43 by 15 % of its height, to a side drawn
    by a fair coin, in whole pixels, and black comes in; 1 and 18 multiply its distance from its
    mean brightness by 1 + c or 1 - c, c a third and 0.39, and clip to [0, 1]. Of several policies
    each image gets one, drawn anew in each step. 3-1-7 with 43-18-18 is the authors' hybrid for
    CIFAR-100 on ResNet20. Targets stay as they are. Their code transforms after random crops and
    flips, which are not done here.

    Guarantee: none. Adaptive attack: attacks find the transformed images, and take back what gave
    them: of all policies and signs the one that, applied to what it leads back to, comes closest
    (`undone`). The black that came in, and what contrast made of it, tell; what was shifted out is
    lost, and becomes the mean colour. Known break: Balunovic et al., "Bayesian framework for
    gradient leakage", ICLR 2022, early in training.
    """

    policies: tuple[str, ...]  # numbers of TRANSFORMS, joined by "-"

    random = True
    undoes = True

    def __post_init__(self):
        require(len(self.policies) > 0, "policies", "must name at least one", self.policies)
        known = {str(number) for number in TRANSFORMS}
        for policy in self.policies:
            rule = f'must be numbers among {", ".join(sorted(known, key=int))}, joined by "-"'
            require(set(policy.split("-")) <= known, "policies", rule, policy)

    def batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        if len(batch) == 0:
            return batch
        choice = torch.randint(len(self.policies), (len(batch),), generator=rng).tolist()
        images = [
            transformed(image, self.policies[policy], rng)
            for image, policy in zip(batch.images, choice, strict=True)
        ]
        return replace(batch, images=torch.stack(images))

    def undone(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Each taken back by the policy and signs that, applied to that again, give it best."""
        chances = [
            (policy, signs)
            for policy in self.policies
            for signs in itertools.product((1, -1), repeat=policy.count("-") + 1)
        ]

        def likeliest(image: Tensor) -> Tensor:
            found = [(taken_back(image, *chance), chance) for chance in chances]
            apart = [(applied(was, *c) - image).square().sum() for was, c in found]
            return found[int(torch.stack(apart).argmin())][0]

        return torch.stack([likeliest(image) for image in images])


def transformed(
    image: Float[Tensor, "c h w"], policy: str, rng: torch.Generator
) -> Float[Tensor, "c h w"]:
    """The image after the policy's transformations, each with a sign of its own."""
    signs = tuple(1 - 2 * int(torch.randint(2, (), generator=rng)) for _ in policy.split("-"))
    return applied(image, policy, signs)


def applied(
    image: Float[Tensor, "c h w"], policy: str, signs: tuple[int, ...]
) -> Float[Tensor, "c h w"]:
    for number, sign in zip(policy.split("-"), signs, strict=True):
        kind, size = TRANSFORMS[int(number)]
        if kind == "contrast":
            grey = brightness(image).mean()
            image = (grey + (1 + sign * size) * (image - grey)).clamp(0, 1)
        else:
            axis = {"down": -2, "across": -1}[kind]
            image = shifted(image, sign * round(size * image.shape[axis]), axis)
    return image


def taken_back(
    image: Float[Tensor, "c h w"], policy: str, signs: tuple[int, ...]
) -> Float[Tensor, "c h w"]:
    """What was transformed into the image, where it still shows, and its mean colour elsewhere."""
    known = torch.ones_like(image)
    for number, sign in reversed([*zip(policy.split("-"), signs, strict=True)]):
        kind, size = TRANSFORMS[int(number)]
        if kind == "contrast":  # which keeps the mean brightness, but for what it clips
            grey = brightness(image).mean()
            image = (grey + (image - grey) / (1 + sign * size)).clamp(0, 1)
        else:
            axis = {"down": -2, "across": -1}[kind]
            by = -sign * round(size * image.shape[axis])
            image, known = shifted(image, by, axis), shifted(known, by, axis)
    mean = (image * known).sum((1, 2)) / known.sum((1, 2)).clamp_min(1)
    return torch.where(known > 0, image, mean[:, None, None])


def brightness(image: Float[Tensor, "c h w"]) -> Float[Tensor, "h w"]:
    """Luma (ITU-R 601) of three channels, the mean of any other number."""
    if len(image) != 3:
        return image.mean(0)
    return torch.einsum("chw,c->hw", image, image.new_tensor([0.299, 0.587, 0.114]))


def shifted(image: Float[Tensor, "c h w"], by: int, axis: int) -> Float[Tensor, "c h w"]:
    """Moved by so many pixels along an axis; black comes in."""
    moved = image.roll(by, axis)
    start, length = (0, by) if by > 0 else (image.shape[axis] + by, -by)
    moved.narrow(axis, start, length).zero_()
    return moved

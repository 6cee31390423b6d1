"""What the cocktail party attack is known to reach, measured again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedsec.data import Dataset
from fedsec.models import MLPSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local
from fedsec.verify.claim import Claim, fresh, sent


def mixed(images: Dataset, count: int, first: int = 0) -> tuple[Observation, Tensor]:
    """What is seen of one gradient of the first layer's 1,024 neurons, and the private images."""
    from fedsec.engine import simulate

    model = fresh(MLPSpec(), images)
    batch = images.test.batch(range(first, first + count), images.classes)
    update = simulate(model, batch.images, batch.targets, Local(kind="gradient", lr=1.0))
    return sent(model, [update], count, images), batch.images


def told_apart(
    guess: Float[Tensor, "g c h w"], truth: Float[Tensor, "b c h w"], least: float = 0.9
) -> float:
    """Share of originals whose match, one to one, correlates with them by at least `least`."""
    from scipy.optimize import linear_sum_assignment

    x, y = (i.flatten(1).double() for i in (truth, guess))
    x, y = (F.normalize(i - i.mean(1, keepdim=True)) for i in (x, y))
    likeness = (x @ y.T).abs()
    row, column = linear_sum_assignment(-likeness.numpy())
    return float((likeness[row, column] >= least).double().mean())


def _share(images: Dataset, count: int, rule: str) -> float:
    from attacks.cocktail import Cocktail

    seen, truth = mixed(images, count)
    attack = Cocktail(rule=rule, steps=200, tv=10.0, apart=0.1)
    return told_apart(attack(seen, [stream(0, "attack")], lambda *_: None).images[0], truth)


def _whitened(images: Dataset, count: int) -> float:
    """What whitening alone tells apart: the null of any ICA."""
    seen, truth = mixed(images, count)
    rows = seen.update.tensors["layers.linear0.weight"][0].double()
    right = torch.linalg.svd(rows - rows.mean(1, keepdim=True), full_matrices=False)[2]
    return told_apart(right[:count].reshape(truth.shape), truth)


def _claim(setting: str, measure, least: float = 0.0, most: float = 1.0) -> Claim:
    return Claim(
        attack="cocktail",
        paper="Kariyappa et al. 2023, abstract",
        threat="eavesdropper",
        setting=f"mlp 3 x 1024, fresh, batch 64, {setting}: images with correlation >= 0.9",
        published="none usable: works to batch 1,024, measured by LPIPS on other networks",
        unit="share",
        measure=measure,
        least=least,
        most=most,
    )


CLAIMS: tuple[Claim, ...] = (
    _claim("edges", lambda images: _share(images, 64, "edges"), least=0.6),
    _claim("pixels (the paper's contrast)", lambda images: _share(images, 64, "pixels"), least=0.1),
    _claim("whitened rows (null)", lambda images: _whitened(images, 64), most=0.05),
)

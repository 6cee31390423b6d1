"""Manifold mixup: the hidden states of a batch are mixed, at a layer drawn anew for each step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fedsec.checks import positive, require
from fedsec.defense import Defense
from fedsec.types import Batch, Tensors


@dataclass(frozen=True, kw_only=True)
class ManifoldMixup(Defense):
    """Manifold mixup: Verma et al., ICML 2019, which was meant to generalise better.

    In each step a weight w ~ Beta(alpha, alpha), a permutation p of the batch and one of the
    network's `places` are drawn, and there state i becomes w h_i + (1 - w) h_p(i); the targets are
    mixed alike. Places are the normalised images (which is mixup), and what its blocks, or
    nonlinear layers where it has none, hand on; each is as likely. A permutation may leave an
    image in its place. A batch of one image is refused; the empty one stays empty.

    Guarantee: none. Adaptive attack: none; attacks explain the update by a batch that nobody
    mixed. A joint search for images, weight, permutation and place is not implemented, so that what
    is measured against this defense is no worst case. Known break: none published for the mixing of
    hidden states; that of images is broken (Carlini et al., IEEE S&P 2021).
    """

    alpha: float  # > 0 of the Beta distribution; 1: weights are uniform in [0, 1]

    mixes = True
    random = True

    def __post_init__(self):
        positive(self, "alpha")

    def batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The same; refuses a batch that cannot be mixed."""
        rule = "manifold_mixup needs at least 2 images in a batch; raise this"
        require(len(batch) != 1, "victim_batch", rule, len(batch))
        return batch

    def gradients(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, expected: int
    ) -> Tensors:
        if len(batch) == 0:
            return super().gradients(model, batch, rng, expected)
        weight, order, place = self.drawn(len(batch), len(places(model)), rng)
        order = order.to(batch.images.device)

        def mixed(states: torch.Tensor) -> torch.Tensor:
            return weight * states + (1 - weight) * states[order]

        hook = places(model)[place].register_forward_hook(lambda *call: mixed(call[-1]))
        try:
            told = replace(batch, targets=mixed(batch.targets))
            return super().gradients(model, told, rng, expected)
        finally:
            hook.remove()

    def check(self, model: nn.Module) -> None:
        rule = "must have layers one after the other, between which manifold_mixup can mix"
        require(len(places(model)) > 0, "model", rule, type(model).__name__)

    def drawn(self, n: int, places: int, rng: torch.Generator) -> tuple[float, torch.Tensor, int]:
        """The weight, the permutation and the number of the place of one step."""
        seed = int(torch.randint(2**62, (), generator=rng))  # torch draws no Beta from a stream
        weight = np.random.default_rng(seed).beta(self.alpha, self.alpha)
        order = torch.randperm(n, generator=rng)
        return weight, order, int(torch.randint(places, (), generator=rng))


LINEAR = (nn.Linear, nn.Conv2d, nn.Identity, nn.Flatten, nn.GroupNorm, nn.LayerNorm)


def places(model: nn.Module) -> list[nn.Module]:
    """Modules whose output may be mixed, in their order: what the model's own children, and those
    of sequences among them, hand on, but for linear maps, norms, and whatever gives the logits.

    It takes for granted that these children are called one after the other, as in fedsec.models.
    """

    def steps(module: nn.Module) -> list[nn.Module]:
        if not isinstance(module, nn.Sequential):
            return [module]
        return [step for child in module for step in steps(child)]

    found = [step for child in model.children() for step in steps(child)][:-1]
    norms = nn.modules.batchnorm._BatchNorm
    return [m for m in found if not isinstance(m, LINEAR) and not isinstance(m, norms)]

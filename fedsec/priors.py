"""What attacks know of images before they see an update: terms of an engine.Search.

Each takes the images of one lane in the model's normalised coordinates, and works under torch.func.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsec.engine import Fade, Informed, Prior, Weight, total_variation
from fedsec.models import recording
from fedsec.threat import Observation
from fedsec.types import Tensors

FADE = 100.0  # times its last weight that total variation has at first
NOISY = 0.4  # weight of total variation for an update that is all noise
STATISTICS = ("inferred", "running", "exact", "none")
Statistics = list[tuple[Float[Tensor, "v c"], Float[Tensor, "v c"]]]  # mean, biased variance


def double_opponents(images: Float[Tensor, "b c h w"]) -> Tensor:
    """Isotropic total variation of the channels and of the differences between them.

    Mean length of the spatial gradient; edges of all channels at one place cost less than at
    several. A regulariser of the `breaching` library (its preset "modern").
    """
    pairs = [(i, j) for i in range(images.shape[1]) for j in range(i)]
    opponents = [images[:, i] - images[:, j] for i, j in pairs]
    x = torch.cat([images, torch.stack(opponents, 1)], 1) if opponents else images
    down = x[..., 1:, :-1] - x[..., :-1, :-1]
    across = x[..., :-1, 1:] - x[..., :-1, :-1]
    return (down.square() + across.square() + 1e-8).sqrt().mean()


VARIATIONS: dict[str, Prior] = {
    "anisotropic": total_variation,
    "double_opponent": double_opponents,
}


def smooth(
    seen: Observation, weight: float, variation: Prior = double_opponents, fade: float = FADE
) -> tuple[tuple[Weight, Prior | Informed], ...]:
    """Terms of a cosine match: `weight` of `variation`, and more where noise is known to be in it.

    It begins with `fade` times the weight. On tuning images (lenet at 300 steps, resnet18 at 150)
    that and double opponents were worth 4 dB over a constant weight of the anisotropic one.

    The share r of noise in an update's squared length is known where the defense is; matching
    it as closely as a clean one draws noise. NOISY r more of total variation was near the best of
    six weights at five levels of noise on lenet (r from 0.02 to 0.94).
    """
    share = noise_share(seen)
    falling = Fade(fade * weight, weight) if weight > 0 and fade > 1 else weight
    terms = ((falling, variation),)
    if share is None or not bool(share.any()):
        return terms

    def noisy(images: Tensor, facts: Tensors) -> Tensor:
        return facts["share"] * total_variation(images)

    return (*terms, (NOISY, Informed(noisy, {"share": share})))


def noise_share(seen: Observation) -> Float[Tensor, " v"] | None:
    """Expected squared length of the defense's noise over the update's own, in [0, 1]."""
    if "defense" not in seen.grants:
        return None
    update = seen.sent
    deviation = seen.step.diluted * math.hypot(*seen.defense.noise(seen.step))
    entries = sum(t[0].numel() for t in update.tensors.values())
    squares = [t.reshape(len(t), -1).square().sum(1) for t in update.tensors.values()]
    whole = torch.stack(squares).sum(0).clamp_min(1e-30)
    return (deviation**2 * entries / whole).clamp(max=1.0)


def length(images: Float[Tensor, "b c h w"]) -> Tensor:
    """Mean square of the pixels (Yin et al. 2021, equation 5)."""
    return images.square().mean()


def same_labels(seen: Observation, targets: Float[Tensor, "v b k"]) -> Informed:
    """Squared distance of the model's output from the labels (Wei et al. 2020, equation 6)."""

    def distance(images: Tensor, facts: Tensors) -> Tensor:
        logits = seen.model(_unnormalised(seen.model, images))
        return (logits.softmax(-1) - facts["targets"]).square().sum(-1).mean()

    return Informed(distance, {"targets": targets})


def same_statistics(seen: Observation, kind: str) -> Informed | None:
    """Distance of the images' batch statistics from the victim's (Yin et al. 2021, equation 7).

    Summed over BatchNorm layers: the length of the difference of the means, and of the variances.
    `kind`: exact, running (the model's averages stand in for the batch's) or inferred (from the
    running averages that the client sends). None where the model has no BatchNorm.
    """
    wanted = {"exact": _exact, "running": _running, "inferred": _inferred}[kind](seen)
    if not wanted:
        return None

    def distance(images: Tensor, facts: Tensors) -> Tensor:
        with recording(seen.model) as found:
            seen.model(_unnormalised(seen.model, images))
        gaps = [
            (value - facts[f"{what}{i}"]).square().sum().clamp_min(1e-12).sqrt()
            for i, both in enumerate(found)
            for what, value in zip(("mean", "variance"), both, strict=True)
        ]
        return torch.stack(gaps).sum()

    facts = {f"mean{i}": mean for i, (mean, _) in enumerate(wanted)}
    return Informed(distance, facts | {f"variance{i}": var for i, (_, var) in enumerate(wanted)})


def _exact(seen: Observation) -> Statistics:
    return seen.norm_stats


def _running(seen: Observation) -> Statistics:
    update = seen.sent
    victims = len(next(iter(update.tensors.values())))
    return [
        (before["running_mean"].expand(victims, -1), before["running_var"].expand(victims, -1))
        for _, before, _, _ in _layers(seen)
    ]


def _inferred(seen: Observation) -> Statistics:
    """The batch statistics that moved the running averages from the model's to the client's.

    Exact after one step in train mode; of several steps, a mean that weighs late ones more. After a
    step in eval mode nothing has moved, and these are the running averages.
    """
    local = seen.local if "local" in seen.grants else None
    steps = 1 if local is None else local.steps
    images = seen.count if local is None else min(local.batch or seen.count, seen.count)
    found = []
    for name, before, momentum, values in _layers(seen):
        rest = (1 - momentum) ** steps
        mean, var = (
            (seen.buffers[f"{name}.{which}"] - rest * average) / (1 - rest)
            for which, average in before.items()
        )
        n = images * values
        biased = (n - 1) / n if seen.model.training else 1.0
        found.append((mean, (biased * var).clamp_min(0)))
    return found


def _layers(seen: Observation) -> list[tuple[str, Tensors, float, int]]:
    """Of each BatchNorm: name, running averages, momentum, values of a channel in one image."""
    kind = nn.modules.batchnorm._BatchNorm
    layers = [(name, m) for name, m in seen.model.named_modules() if isinstance(m, kind)]
    sizes: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: sizes.append(args[0][0, 0].numel()))
        for _, layer in layers
    ]
    with torch.no_grad():
        seen.model(torch.zeros(2, *seen.shape).to(next(seen.model.parameters())))
    for hook in hooks:
        hook.remove()
    averages = ("running_mean", "running_var")
    return [
        (name, {which: layer.get_buffer(which) for which in averages}, layer.momentum or 0.1, size)
        for (name, layer), size in zip(layers, sizes, strict=True)
    ]


def _unnormalised(model: nn.Module, images: Tensor) -> Tensor:
    normalise: Any = getattr(model, "normalise", None)
    return images if normalise is None else images * normalise.std + normalise.mean

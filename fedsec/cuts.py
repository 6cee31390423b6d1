"""Single images' gradients out of a batch's: a last layer that answers to one feature, at cuts.

All logits are zero but that of one class, a steep step of one feature of the image, at a cut. An
image above the cut then passes back the gradient of the feature times its probability, one, less
one if it is of that class; an image below it, only the latter. So updates at two cuts differ by the
images between them, whatever their classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsec import rules
from fedsec.models import last_linear
from fedsec.rng import stream
from fedsec.solve import Found
from fedsec.threat import Observation
from fedsec.types import Reconstruction, Tensors, Update

WHOLE = 0.02  # how far from one a count of images may be: more says that one is astride of a cut


def answering(model: nn.Module, fished: int, row: Float[Tensor, " d"], bias: Tensor) -> nn.Module:
    """A copy of `model` whose logits are zero, but for class `fished`: row @ features + bias."""
    changed = copy.deepcopy(model)
    _, layer = last_linear(changed)
    with torch.no_grad():
        layer.weight.zero_()[fished] = row
        layer.bias.zero_()[fished] = bias
    return changed


def caught(seen: Observation, victim: int, fished: int) -> list[Tensors]:
    """What each image that is alone between two neighbouring cuts would send, at the first cut.

    The first model's cut lies above all images: on it, one image of class `fished` alone, sent as
    the only update, is caught too. In units of the victim's update; the label that it seems to have
    is `fished`, whatever its own.
    """
    name, layer = last_linear(seen.model)
    prefix = f"{name}." if name else ""
    observed = [seen.update, *(update for _, update in seen.queries)]
    updates = [{k: t[victim] for k, t in update.tensors.items()} for update in observed]
    local = seen.local if "local" in seen.grants else None
    whole = local.lr / seen.count if local and local.kind == "fedavg" else 1 / seen.count

    def one(bias: Tensor) -> bool:
        return abs(float(bias[fished]) / whole - 1) <= WHOLE

    if len(updates) > 1:
        differences = [{k: a[k] - b[k] for k in a} for a, b in pairwise(updates)]
        return [d for d in differences if one(-d[f"{prefix}bias"])]
    (only,) = updates
    if not one(-only[f"{prefix}bias"]):
        return []
    others = layer.out_features - 1  # the last layer saw the other images too; its row did not
    for key in (f"{prefix}weight", f"{prefix}bias"):
        row = only[key][fished].clone()
        only[key] = (-row / others).expand_as(only[key]).clone()
        only[key][fished] = row
    return [only]


def apart(
    seen: Observation, caught: Sequence[Sequence[Tensors]], rngs: Sequence[torch.Generator]
) -> tuple[Observation, list[torch.Generator]]:
    """All victims' caught updates as updates of one image each, and a stream for each of them."""
    updates = [update for own in caught for update in own]
    tensors = {k: torch.stack([u[k] for u in updates]) for k in updates[0]}
    single = seen.of([], ("model", "shape", "data_range"))
    own = [stream(rng.initial_seed(), i) for rng, c in zip(rngs, caught, strict=True)
           for i in range(len(c))]  # fmt: skip
    return single.having(update=Update(tensors, {}, 1), count=1), own


def dealt(
    each: Sequence[Found], single: Reconstruction, caught: Sequence[Sequence[Tensors]]
) -> list[Found]:
    """What was found of each victim, with the images that were made of its caught updates."""
    out, first = [], 0
    for found, own in zip(each, caught, strict=True):
        mine = slice(first, first + len(own))
        first = mine.stop
        if own:
            images = torch.cat([single.images[mine, 0], found.images[len(own) :]])
            flags = sorted({flag for flags in single.flags[mine] for flag in flags})
            found = replace(
                found,
                images=images,
                loss=single.loss[mine].mean(),
                flags=(*found.flags, *flags),
                steps=int(single.steps[mine].max()),
                gflop=found.gflop + float(single.gflop[mine].sum()),
            )
        out.append(found)
    return out


def places(feature: Float[Tensor, " n"], queries: int) -> list[Tensor]:
    """Cuts, from the highest: one above all images; where there are more, one below them all.

    Quantiles of the feature between.
    """
    parts = max(1, queries - 1)
    at = torch.arange(1, parts, dtype=torch.float64, device=feature.device) / parts
    inner, far = feature.double().quantile(at.flip(0)).to(feature), 100 * feature.std()
    return [feature.max() + far, *inner, feature.min() - far][:queries]


@torch.no_grad()
def features(model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """What the last layer of `model` sees."""
    parts: list[Tensor] = []
    _, layer = last_linear(model)
    hook = layer.register_forward_pre_hook(lambda _, args: parts.append(args[0]))
    parameter = next(model.parameters())
    try:
        model(images.to(parameter.device, parameter.dtype))
    finally:
        hook.remove()
    return parts[0]


def like_photographs(
    normalise: nn.Module, shape: tuple[int, ...], count: int, rng: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Noise with the spectrum of photographs, and about their mean and deviation by channel."""
    mean, std = (t.detach().cpu() for t in normalise.buffers())
    noise = torch.randn(count, *shape, generator=rng)
    rough = rules.Spectrum(shape, rules.PHOTOGRAPHS, noise).outward(noise)
    return (rough / rough.std() * std + mean).clamp(0, 1)

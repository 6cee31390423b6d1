"""DP-SGD with sample-level privacy: clip each example's gradient, sum, add Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.checks import Refused, at_least, require
from fedsec.defense import Defense, Privacy, Training
from fedsec.ghost import scaled_sum
from fedsec.rng import stream
from fedsec.types import Batch, Local, Tensors

SMALL = 2**16  # parameters up to which per-example gradients are faster than norms without them
# Per-example gradients held at once: on a CPU about what its caches hold, which is the fastest.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**29}


@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Differentially private SGD: Abadi et al., "Deep learning with differential privacy", 2016.

    Each example's gradient is scaled to an L2 norm of at most `clip` over all trainable tensors
    together; the sum gets N(0, (noise_multiplier clip)^2) on every coordinate, 0-dimensional
    tensors included, and is divided by the expected batch size: the real size is itself private.

    With `augmentations` the gradient is that of an example's mean loss over random views of it (De
    et al., "Unlocking high-accuracy differentially private image classification through scale",
    2022, section 3.2). Epsilon stays as it is, since the mean comes before the clipping.

    Guarantee: (epsilon, delta) for adding or removing one example of a client, over all its
    steps, with Poisson sampling of the batches, against who sees every update. It covers the
    updates, not an evaluation on private data; and it trusts the noise, which here comes
    from a seeded generator and floating point numbers (Mironov 2012): fit for measuring leakage,
    not for protecting people.

    Adaptive attack: the noise is Gaussian of known deviation `noise_std`; clipping keeps
    each example's direction, so a matching attack compares directions or weighs by likelihood.
    Known break: none at small epsilon. A large one promises nothing by itself; what it still stops
    has to be measured (Hayes et al., "Bounding training data reconstruction in DP-SGD", 2023).
    The guarantee is for one example, not for a client or for what its examples share.
    """

    clip: float  # > 0, L2 norm of one example's gradient
    # >= 0, deviation of the noise in units of clip; null: 1.0, or what `epsilon` takes
    noise_multiplier: float | None
    delta: float  # in (0, 1), below 1 / examples of a client
    epsilon: float | None = None  # > 0, of the whole run, for which to find the noise; null: none
    augmentations: int = 0  # views of each example in its gradient, >= 0; 0: the image as it is

    poisson = True
    random = True

    def __post_init__(self):
        require(0 < self.clip < math.inf, "clip", "must be above 0 and finite", self.clip)
        noise_or_epsilon(self)
        require(0 < self.delta < 1, "delta", "must be in (0, 1)", self.delta)
        at_least(self, 0, "augmentations")

    def gradients(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, expected: int
    ) -> Tensors:
        """The noisy sum of clipped gradients over `expected`; an empty batch gives only noise."""
        deviation = self.sigma * self.clip
        views = None
        if self.augmentations:
            draws = stream(rng.initial_seed(), "augmentations")
            views = augmented(batch.images, self.augmentations, draws)
        return {
            name: (total + deviation * normal_like(total, rng)) / expected
            for name, total in clipped_sum(model, batch, self.clip, views).items()
        }

    @property
    def sigma(self) -> float:
        """The noise multiplier, which `epsilon` must not still leave open: see `fitted`."""
        return known_noise(self)

    def fitted(self, training: Sequence[Training]) -> DPSGD:
        """With the least noise that keeps `epsilon` for every client, by the claim's accountant."""
        from fedsec.privacy import noise_multiplier

        if self.epsilon is None:
            return self
        runs = {(min(1.0, t.batch / t.examples), t.steps) for t in training}
        least = (noise_multiplier(self.epsilon, self.delta, *run, "prv") for run in sorted(runs))
        return replace(self, epsilon=None, noise_multiplier=max(least))

    def noise_std(self, expected: int) -> float:
        """The standard deviation of the noise on each coordinate of one gradient step."""
        return self.sigma * self.clip / expected

    def noise(self, local: Local) -> tuple[float, float]:
        """Noise of all steps; what later steps make of the earlier ones' is left out."""
        change = local.lr * local.steps**0.5 if local.kind == "fedavg" else 1.0
        return change * self.noise_std(local.batch), 0.0

    def per_example(self, gradients: Tensors) -> Tensors:
        """Each example's gradient, scaled to a norm of at most `clip`."""
        scale = clip_factors(norms(gradients), self.clip)
        return {k: torch.einsum("n,n...->n...", scale, g) for k, g in gradients.items()}

    def privacy(self, training: Training) -> Privacy:
        """Epsilon at `delta` by PRV (RDP beside it), or by RDP alone where PRV has no number."""
        from fedsec.privacy import Mechanism, epsilon

        if self.sigma == 0:
            return Privacy(None, self.delta, None, reason="no noise: noise_multiplier is 0")
        if self.delta * training.examples >= 1:
            why = f"delta {self.delta:g} is not below 1/{training.examples}, one over the examples"
            return Privacy(None, self.delta, None, reason=why)
        rate = min(1.0, training.batch / training.examples)
        run = Mechanism(self.sigma, rate, training.steps)
        rdp = epsilon(*run, self.delta, accountant="rdp")
        if not math.isfinite(rdp):
            why = f"noise_multiplier {self.sigma:g} is too small for a finite epsilon"
            return Privacy(None, self.delta, None, reason=why, mechanism=run)
        try:
            prv = epsilon(*run, self.delta, accountant="prv")
        except ArithmeticError:
            return Privacy(rdp, self.delta, "RDP", mechanism=run)
        return Privacy(prv, self.delta, "PRV", others=(("RDP", rdp),), mechanism=run)

    def covers(self, training: Training) -> None:
        """Without noise there is nothing to cover: an ablation that claims no epsilon."""
        rule = f"must be below 1/{training.examples}, one over a client's examples: sending one of "
        rule += "them as it is keeps such a promise; lower it, or noise_multiplier=0 claims nothing"
        covered = self.sigma == 0 or self.delta * training.examples < 1
        require(covered, "delta", rule, f"{self.delta:g}")

    def check(self, model: nn.Module) -> None:
        for module in model.modules():
            kind = type(module).__name__
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                rule = (
                    "dpsgd clips each example's own gradient, and BatchNorm mixes the examples of"
                    " a batch; use model.norm=group or model.norm=none"
                )
                raise Refused("model.norm", rule, kind)
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                rule = "dpsgd adds no noise to running statistics; use track_running_stats=False"
                require(not module.track_running_stats, "model", rule, kind)


def augmented(
    images: Float[Tensor, "n c h w"], times: int, rng: torch.Generator
) -> Float[Tensor, "n k c h w"]:
    """Views of each image: a crop of it, mirrored at its edges by 4 pixels, flipped or not."""
    n, _, height, width = images.shape
    by = min(4, height - 1, width - 1)  # as far as reflection goes
    top, left = torch.randint(2 * by + 1, (2, n, times, 1), generator=rng)
    flipped = torch.rand(n, times, 1, generator=rng) < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(flipped, columns.flip(2), columns)
    padded = F.pad(images, (by,) * 4, mode="reflect").movedim(1, 3) if n else images.movedim(1, 3)
    each = torch.arange(n).view(-1, 1, 1, 1)
    return padded[each, rows[..., None], columns[:, :, None]].movedim(4, 2)


def clipped_sum(
    model: nn.Module, batch: Batch, clip: float, views: Float[Tensor, "n k c h w"] | None = None
) -> Tensors:
    """The sum over the batch of each example's gradient, scaled to a norm of at most `clip`.

    The gradient is that of the mean loss on the example's `views`: its image alone if not given.

    A layer sees one example at a time, so none can mix two. The order of the sum depends on model,
    device and batch alone, and memory has a bound whatever the batch. A network of more than
    `SMALL` parameters has its norms from activations where its layers allow (`fedsec.ghost`).
    """
    views = batch.images[:, None] if views is None else views
    if sum(p.numel() for p in model.parameters() if p.requires_grad) > SMALL:
        scales = partial(clip_factors, clip=clip)
        found = scaled_sum(model, views, batch.targets, scales)
        if found is not None:
            return found
    return sum_by_example(model, views, batch.targets, clip)


def sum_by_example(
    model: nn.Module,
    views: Float[Tensor, "n k c h w"],
    targets: Float[Tensor, "n classes"],
    clip: float,
) -> Tensors:
    """The same for any network, from per-example gradients, of which `CHUNK_BYTES` are held."""
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def loss(weights: Tensors, images: Tensor, target: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (images,))
        return F.cross_entropy(logits, target.to(logits.dtype).expand(len(images), -1))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    total = {k: torch.zeros_like(w) for k, w in weights.items()}
    bytes_each = sum(w.nbytes for w in weights.values())
    chunk = max(1, CHUNK_BYTES[views.device.type] // max(1, bytes_each))
    for start in range(0, len(views), chunk):
        part = slice(start, start + chunk)
        grads = each(weights, views[part], targets[part])
        scale = clip_factors(norms(grads), clip)
        for name, grad in grads.items():
            total[name] += torch.einsum("n,n...->...", scale, grad)
    return total


def norms(grads: Tensors) -> Float[Tensor, " n"]:
    """Each example's norm over all tensors `[n, *parameter]`."""
    return torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in grads.values()]).norm(dim=0)


def clip_factors(norms: Float[Tensor, " n"], clip: float) -> Float[Tensor, " n"]:
    """min(1, clip / norm) of each example."""
    return (clip / norms).clamp(max=1.0)  # a zero gradient: 1


def noise_or_epsilon(defense: Any) -> None:
    """Refuse the two fields together, and values that neither may have; 1.0 where both are null."""
    noise, epsilon = defense.noise_multiplier, defense.epsilon
    rule = "must be null where noise_multiplier is given: each determines the other"
    require(noise is None or epsilon is None, "epsilon", rule, epsilon)
    require(epsilon is None or 0 < epsilon < math.inf, "epsilon", "must be above 0 and finite",
            epsilon)  # fmt: skip
    rule = "must be at least 0 and finite"
    require(noise is None or 0 <= noise < math.inf, "noise_multiplier", rule, noise)


def known_noise(defense: Any) -> float:
    """The noise multiplier of a defense that has these two fields: 1.0 where both are null."""
    assert defense.epsilon is None, "a training run decides: see `fitted`"
    return 1.0 if defense.noise_multiplier is None else defense.noise_multiplier


def normal_like(tensor: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype).to(tensor.device)

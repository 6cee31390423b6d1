"""The exact leak of a fully connected layer that sees the input."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fedsec import cost, engine, labels
from fedsec.attack import Attack
from fedsec.checks import Refused
from fedsec.models import first_layer
from fedsec.types import Reconstruction, Tensors

NEURONS = 2048  # read per victim, those with the largest bias gradients


@dataclass(frozen=True, kw_only=True)
class Linear(Attack):
    """Reads images off the first layer's gradient (Phong et al. 2018, section 3; no optimisation).

    For weights W and bias b, row i of dW over entry i of db is the input: exactly, when one image
    alone drove neuron i; else a mean weighted by what each image passed back. Several neurons that
    agree on an image certify it, since mixtures differ; rows outside the data range are mixtures.
    So the images that most neurons agree on are returned, each once; the largest bias gradients
    decide between equals. With one image all neurons agree.
    """

    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape", "data_range"})

    def __post_init__(self):
        labels.known(self.labels)

    def check(self, model: nn.Module) -> None:
        name, layer = first_layer(model)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            kind = type(layer).__name__
            raise Refused("model", "attack=linear needs a fully connected first layer with bias "
                          "(model=mlp)", f"{kind} {name}")  # fmt: skip

    def __call__(self, seen, rngs, progress):
        update = seen.sent
        name, _ = first_layer(seen.model)
        targets, told = labels.targets_of(seen, rngs, self.labels)
        local = seen.step
        images, loss, spent = [], [], []

        def one(observed: Tensors, victim: int) -> None:
            rows, bias = observed[f"{name}.weight"], observed[f"{name}.bias"]
            images.append(_read(seen, rows, bias))
            # re-computing the update certifies the result
            guess = engine.simulate(seen.model, images[-1], targets[victim], local)
            loss.append(engine.cosine(guess, observed).detach())

        for v in range(len(rngs)):
            observed = {k: t[v] for k, t in update.tensors.items()}
            spent.append(told + cost.flops(partial(one, observed, v)))
            progress(v + 1, len(rngs), float(loss[-1]))
        nothing = torch.zeros(len(rngs), dtype=torch.long)
        gflop = torch.tensor(spent, dtype=torch.float64)
        found = torch.stack(images).clamp(0, 1)
        return Reconstruction(found, targets.argmax(-1), torch.stack(loss), nothing, gflop)


def _read(seen, rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The `count` most credible images [b, c, h, w] among the neurons of one victim."""
    if not (rows.isfinite().all() and bias.isfinite().all()):
        return rows.new_full((seen.count, *seen.shape), 0.5)
    order = bias.abs().argsort(descending=True)
    order = order[bias[order] != 0][:NEURONS]
    normalise = seen.model.normalise
    flat = rows[order] / bias[order, None]
    images = flat.reshape(-1, *seen.shape) * normalise.std + normalise.mean
    if len(images) == 0:
        return images.new_full((seen.count, *seen.shape), 0.5)
    low, high = seen.data_range
    outside = (low - images).clamp_min(0) + (images - high).clamp_min(0)
    mixture = outside.flatten(1).amax(1) > 1e-3 * (high - low)
    same = _equal(images.flatten(1), 1e-3 * (high - low))
    told = torch.where(mixture, 0, same.sum(1))
    first = ~same.tril(-1).any(1)
    credible = torch.where(first, told, -1).argsort(descending=True, stable=True)
    picked = images[credible[: seen.count]]
    return torch.cat([picked, picked[:1].expand(seen.count - len(picked), *seen.shape)])


def _equal(rows: torch.Tensor, within: float) -> torch.Tensor:
    """Which rows equal which, up to a root mean square difference: [n n], true on the diagonal."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(rows, rows, compute_mode=exact) <= within * rows.shape[1] ** 0.5

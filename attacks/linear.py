"""The exact leak of a fully connected layer that sees the input."""

from dataclasses import dataclass

import torch
from torch import nn

from fedsec import labels, neurons, solve
from fedsec.attack import Attack
from fedsec.models import first_layer
from fedsec.solve import Found
from fedsec.types import Tensors

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
        neurons.first_linear("linear", model)

    def __call__(self, seen, rngs, progress):
        name, _ = first_layer(seen.model)
        targets, told = labels.targets_of(seen, rngs, self.labels)

        def one(update: Tensors, victim: int) -> Found:
            rows, bias = update[f"{name}.weight"], update[f"{name}.bias"]
            images, target = _read(seen, rows, bias), targets[victim]
            # re-computing the update certifies the result
            loss = solve.misfit(seen, images, target, update)
            return Found(images.clamp(0, 1), target.argmax(-1), loss)

        return solve.each(seen, rngs, progress, one, told)


def _read(seen, rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The `count` most credible images [b, c, h, w] among the neurons of one victim."""
    if not (rows.isfinite().all() and bias.isfinite().all()):
        return rows.new_full((seen.count, *seen.shape), 0.5)
    order = bias.abs().argsort(descending=True)
    order = order[bias[order] != 0][:NEURONS]
    images = neurons.pixels(seen, rows[order] / bias[order, None])
    if len(images) == 0:
        return images.new_full((seen.count, *seen.shape), 0.5)
    low, high = seen.data_range
    outside = (low - images).clamp_min(0) + (images - high).clamp_min(0)
    mixture = outside.flatten(1).amax(1) > 1e-3 * (high - low)
    same = neurons.equal(images.flatten(1), 1e-3 * (high - low))
    told = torch.where(mixture, 0, same.sum(1))
    first = ~same.tril(-1).any(1)
    credible = torch.where(first, told, -1).argsort(descending=True, stable=True)
    picked = images[credible[: seen.count]]
    return torch.cat([picked, picked[:1].expand(seen.count - len(picked), *seen.shape)])

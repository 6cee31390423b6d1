"""When the Curious Abandon Honesty: Federated Learning Is Not Private."""

from dataclasses import dataclass

import torch
from torch import nn

from fedsec import labels, neurons
from fedsec.attack import Attack
from fedsec.checks import Refused, require
from fedsec.models import first_layer


@dataclass(frozen=True, kw_only=True)
class Trap(Attack):
    """Images that fire a neuron of the first layer alone (Boenisch et al. 2023, section 5).

    The server sends trap weights: in each row a random half of the entries negative, the other half
    the same values, positive and shrunk. Sums over pixels are then mostly negative, ReLU lets few
    images of a batch fire a neuron, and a row's gradient over its bias gradient is the image where
    one alone did (`attack=linear` reads the same off honest weights).

    Rows act on pixels in [0, 1], where the paper's argument holds: the bias undoes the model's
    normalisation. Which neurons held one image is not known. Rows outside the data range are
    blends, equal ones are taken once, and what one image alone would have passed back to the neuron
    certifies it; the paper leaves this to the eye.
    """

    shrink: float  # positive weights over negative ones, in (0, 1]: smaller fires less often
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape", "data_range"})

    def __post_init__(self):
        require(0 < self.shrink <= 1, "shrink", "must be in (0, 1]", self.shrink)
        labels.known(self.labels)

    def check(self, model: nn.Module) -> None:
        neurons.first_linear("trap", model)
        if neurons.coupled(model):  # and it would take the bias away
            rule = "attack=trap needs neurons that one image can fire: take model.norm=none"
            raise Refused("model", rule, "BatchNorm in train mode")

    def craft(self, model, known, rng):
        neurons.refuse_steps("trap", known)
        _, layer = neurons.first_linear("trap", model)
        mean, std = model.get_submodule("normalise").buffers()
        half = layer.in_features // 2
        negative = -torch.randn(layer.out_features, half, generator=rng).abs()
        negative /= layer.in_features**0.5
        signed = torch.cat([negative, -self.shrink * negative], 1)  # section 5.2
        places = torch.rand(layer.out_features, layer.in_features, generator=rng).argsort(1)
        rows = torch.zeros(layer.weight.shape).scatter(1, places[:, : 2 * half], signed)
        with torch.no_grad():
            images = rows.to(layer.weight).view(-1, *known.shape)
            layer.weight.copy_((images * std).flatten(1))
            layer.bias.copy_((images * mean).flatten(1).sum(1))
        return (model,)

    def __call__(self, seen, rngs, progress):
        name, _ = first_layer(seen.model)

        def ratios(rows, bias):
            fired = neurons.beyond_rounding(bias).nonzero().flatten()
            images = neurons.pixels(seen, rows[fired] / bias[fired, None])
            return images, bias[fired], fired

        return neurons.reconstruct(seen, name, ratios, rngs, progress, self.labels)

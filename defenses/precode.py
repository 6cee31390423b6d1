"""PRECODE: a variational bottleneck before the output layer, whose draws the gradients carry."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsec.checks import at_least
from fedsec.defense import Defense
from fedsec.models import Random, last_linear, replace_layer
from fedsec.types import Tensors, Update


@dataclass(frozen=True, kw_only=True)
class Precode(Defense):
    """PRECODE: Scheliga et al., "a generic model extension to prevent deep gradient leakage", 2022.

    The last fully connected layer, of input r, is preceded by a bottleneck: one linear layer gives
    mean m and log variance s of `size` Gaussians, z is drawn from them, and another linear layer
    makes of z what the output layer sees instead of r. The loss gets `beta` times the divergence
    KL(N(m, e^s) | N(0, 1)), summed over z and averaged over the batch. z is drawn anew for each
    image and step; where no client computes an update (evaluation, attacks) it is m.

    Guarantee: none. Adaptive attack: `mask` leaves out the gradients of the bottleneck and of the
    output layer, and the layers before are matched on the mean path z = m; drawing z in the attack,
    or optimising it, is not implemented. Known break: Balunovic et al., "Bayesian framework for
    gradient leakage", ICLR 2022; and the authors themselves leave those gradients out (Scheliga et
    al., "Combining variational modeling with partial gradient perturbation", 2022).
    """

    size: int  # of z, >= 1
    beta: float  # weight of the divergence in the loss, >= 0

    random = True
    layers = True

    def __post_init__(self):
        at_least(self, 1, "size")
        at_least(self, 0, "beta")

    def architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        name, output = last_linear(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.initial_seed())
            bottleneck = Bottleneck(output.in_features, self.size, self.beta)
        parts: OrderedDict[str, nn.Module]
        parts = OrderedDict([(BOTTLENECK, bottleneck), (OUTPUT, output)])
        return replace_layer(model, name, nn.Sequential(parts))

    def mask(self, update: Update) -> Tensors:
        """All entries but the bottleneck's and the output layer's."""
        around = {k.partition(f"{BOTTLENECK}.")[0] for k in update.tensors if f"{BOTTLENECK}." in k}
        stochastic = tuple(f"{a}{part}." for a in around for part in (BOTTLENECK, OUTPUT))
        return {
            k: torch.full_like(t, not k.startswith(stochastic), dtype=torch.bool)
            for k, t in update.tensors.items()
        }


BOTTLENECK, OUTPUT = "precode_bottleneck", "precode_output"


class Bottleneck(Random):
    """r -> z ~ N(m(r), e^s(r)) -> what stands for r, with the price of z in the loss."""

    def __init__(self, features: int, size: int, beta: float):
        super().__init__()
        self.encoder = nn.Linear(features, 2 * size)
        self.decoder = nn.Linear(size, features)
        self.beta = beta

    def forward(self, r: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        mean, log_variance = self.encoder(r).chunk(2, dim=-1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        z = mean
        if self.draws:
            z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        price = self.beta * divergence.mean()
        return self.decoder(priced(z, price))


@torch.fx.wrap  # a trace that went inside would crash: it has no tensors
def priced(value: Tensor, price: Tensor) -> Tensor:
    """`value`, with a derivative as if `price` were added to the loss."""
    return _Priced.apply(value, price)


class _Priced(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, price: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (price,) = grad_outputs, ctx.saved_tensors
        return grad, torch.ones_like(price)

    @staticmethod
    def jvp(ctx, *grad_inputs: Tensor) -> Tensor:
        return grad_inputs[0].clone()  # of the value: a price is no part of it

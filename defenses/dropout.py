"""Dropout as a defense: the server does not know which features a step switched off."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsec.checks import Refused, require
from fedsec.defense import Defense
from fedsec.models import Random, first_layer, replace_layer, tracking
from fedsec.types import Tensors


@dataclass(frozen=True, kw_only=True)
class Dropout(Defense):
    """Dropout before the fully connected layers, as in Scheliga et al., "Dropout is NOT all you
    need to prevent gradient leakage", AAAI 2023.

    Each input of a fully connected layer, but of one that sees the image, becomes zero with
    probability `rate`, and else is divided by 1 - `rate` (Srivastava et al. 2014), drawn anew for
    each image and step. Where no client computes an update (evaluation, attacks), nothing is
    dropped, whatever model.mode says.

    Guarantee: none. Adaptive attack, and known break: the paper's own (DIA) optimises images and
    masks jointly. Here masks begin with what the update says: a column of a layer's gradient is
    zero where all images lack the input, so that of one image all draws can be read off, and only
    those of a batch are searched for, as logits (`hidden`). Not used: over several local steps,
    under clipping of examples, and where another part makes zeros or noise; there attacks compute
    with nothing dropped.
    """

    rate: float  # in [0, 1), probability with which an input is dropped

    random = True

    def __post_init__(self):
        require(0 <= self.rate < 1, "rate", "must be in [0, 1)", self.rate)

    def architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        first, _ = first_layer(model)
        layers = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.Linear)]
        after = [(k, m) for k, m in layers if k != first]
        rule = "must have a fully connected layer that does not see the image, for dropout"
        if not after:
            raise Refused("model", rule, type(model).__name__)
        for name, layer in after:
            parts: OrderedDict[str, nn.Module]
            parts = OrderedDict([("drop", Drop(self.rate)), ("linear", layer)])
            model = replace_layer(model, name, nn.Sequential(parts))
        return model

    def hidden(self, model: nn.Module, sent: Tensors, inputs: Tensor) -> Tensors:
        """A column of a layer's gradient that is zero was dropped for all images, or may as well.

        Another was not, for one image at least: for the only one, where there is one.
        """
        starts = {}
        for name, shape in shapes(model, inputs).items():
            dead = (sent[f"{name.removesuffix('drop')}linear.weight"] == 0).all(0)
            kept = (1 - self.rate) / (1 - self.rate ** shape[:-1].numel())
            odds = math.log(kept / (1 - kept)) if kept < 1 else CERTAIN
            start = torch.where(dead, -CERTAIN, odds).to(inputs)
            starts[f"{name}.kept"] = start.expand(shape).clone()
        return starts


CERTAIN = 20.0  # a logit that stays where it is


def shapes(model: nn.Module, inputs: Tensor) -> dict[str, torch.Size]:
    """Of what reaches each `Drop`, by its name."""
    found: dict[str, torch.Size] = {}
    layers = [(k, m) for k, m in model.named_modules() if isinstance(m, Drop)]

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found.update({name: inputs[0].shape})

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers]
    try:
        with torch.no_grad(), tracking(model, False):
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Drop(Random):
    """Zeros and scales as torch.nn.Dropout does in train mode, but only where it draws.

    Elsewhere as an adversary has it who takes `kept`, in [0, 1], for what was drawn; None: nothing.
    """

    kept: Tensor | None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("kept", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.draws:
            return nn.functional.dropout(x, self.rate, training=True)
        return x if self.kept is None else x * self.kept / (1 - self.rate)

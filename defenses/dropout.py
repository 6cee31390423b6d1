"""Dropout as a defense: the server does not know which features a step switched off."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsec.checks import Refused, require
from fedsec.defense import Defense
from fedsec.models import Random, first_layer, replace_layer


@dataclass(frozen=True, kw_only=True)
class Dropout(Defense):
    """Dropout before the fully connected layers, as in Scheliga et al., "Dropout is NOT all you
    need to prevent gradient leakage", AAAI 2023.

    Each input of a fully connected layer, but of one that sees the image, becomes zero with
    probability `rate`, and else is divided by 1 - `rate` (Srivastava et al. 2014), drawn anew for
    each image and step. Where no client computes an update (evaluation, attacks), nothing is
    dropped, whatever model.mode says.

    Guarantee: none. Adaptive attack: none; attacks compute with nothing dropped, which is the mean
    of what is. Known break: the paper's own attack (DIA) optimises images and masks jointly, and
    gets around dropout; it is not implemented here, so that what is measured against this defense
    is no worst case.
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


class Drop(Random):
    """Zeros and scales as torch.nn.Dropout does in train mode, but only where it draws."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.rate, training=True) if self.draws else x

"""A number of the suite that can be measured again: what was published, and what must come out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedsec.data import Dataset
from fedsec.models import ModelSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Tensors, Update


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of `python -m fedsec.verify`: it holds where least <= measure(images) <= most."""

    attack: str  # an option of configs/attack
    paper: str  # authors, year, and where the number stands
    threat: str  # the least preset of configs/threat under which it is measured
    setting: str  # model, batch, steps: what decides the number
    published: str  # the paper's number, or "none usable: " and why
    unit: str  # of the measured number: dB, share, s
    measure: Callable[[Dataset], float]
    least: float = -math.inf
    most: float = math.inf
    data: str = "photos"  # or cifar10, which the user has to have


def fresh(
    spec: ModelSpec, dataset: Dataset, rng: torch.Generator | None = None, dtype=torch.float32
) -> nn.Module:
    """An untrained model for these images."""
    about = (dataset.shape, dataset.classes, dataset.mean, dataset.std)
    return spec.build(*about, rng or stream(0, "model")).to(dtype)


def sent(
    model: nn.Module, updates: Sequence[Tensors], count: int, dataset: Dataset, **granted: object
) -> Observation:
    """What is seen of victims that sent these updates on `model`, of `count` images each."""
    stacked = {k: torch.stack([u[k].detach() for u in updates]) for k in updates[0]}
    frozen = copy.deepcopy(model).requires_grad_(False)
    known = {"model": frozen, "update": Update(stacked, {}, count)}
    return Observation("verify", {**known, "count": count, "shape": dataset.shape, **granted})

"""The suite: it knows when it is exact, and is worth its budget where nothing is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from fedsec import cost
from fedsec.data import Dataset
from fedsec.models import LeNetSpec, MLPSpec
from fedsec.types import Exchange
from fedsec.verify.claim import Claim
from fedsec.verify.matching import found_by, presets, scored, victims_of

THREAT = "honest_server"


def worst_certified(dataset: Dataset, *, count: int, budget: float) -> float:
    """PSNR in dB of the worst image of two batches; 0 unless both are certified."""
    exchanges = victims_of(dataset, MLPSpec(hidden=(256, 128)), victims=2, count=count)
    found = found_by(replace(presets("attack")["auto"], budget=budget), exchanges, THREAT)
    sure = torch.stack([stage.certified for stage in found.stages]).any(0)
    return min(scored(found, exchanges)) if sure.all() else 0.0


def gained(dataset: Dataset, *, victims: int, count: int, budget: float) -> float:
    """Mean dB more than attack=inverting, as many steps of which cost `budget`."""
    exchanges = victims_of(dataset, LeNetSpec(), victims=victims, count=count)
    steps = round(budget / _step(exchanges))
    reached = []
    for name, changed in (("auto", {"budget": budget}), ("inverting", {"steps": steps})):
        found = found_by(replace(presets("attack")[name], **changed), exchanges, THREAT)
        reached.append(scored(found, exchanges))
    return (sum(reached[0]) - sum(reached[1])) / len(reached[0])


def _step(exchanges: list[Exchange]) -> float:
    """Backprop equivalents of one step of attack=inverting on one update."""
    one, two = (
        found_by(replace(presets("attack")["inverting"], steps=steps), exchanges[:1], THREAT)
        for steps in (1, 2)
    )
    images = exchanges[0].batch.images
    unit = cost.update_gflop(exchanges[0].model, len(images), tuple(images.shape[1:]))
    return float(two.gflop - one.gflop) / unit


_row = partial(
    Claim,
    attack="auto",
    paper="Croce and Hein 2020 (AutoAttack): the method only",
    threat=THREAT,
    published="none usable: nobody has one for gradient inversion",
    unit="dB",
)
_OVER = "600 backprops, mean PSNR over inverting's at as many"

CLAIMS: tuple[Claim, ...] = (
    _row(
        setting="mlp 256-128, untrained, 2 batches of 8, 2000 backprops, worst image, certified",
        measure=partial(worst_certified, count=8, budget=2000.0),
        least=60.0,
    ),
    _row(
        setting=f"lenet, untrained, batch 1, 4 images, {_OVER}",
        measure=partial(gained, victims=4, count=1, budget=600.0),
        least=-0.5,
    ),
    _row(
        setting=f"lenet, untrained, one batch of 8, {_OVER}",
        measure=partial(gained, victims=1, count=8, budget=600.0),
        least=1.0,
    ),
)

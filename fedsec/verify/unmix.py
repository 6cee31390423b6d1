"""Mixing defenses solved for their sources: encodings as they are, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from defenses.instahide import InstaHide
from defenses.mixup import Mixup
from fedsec import metrics
from fedsec.client import Gradient, client_streams, local_update
from fedsec.data import Dataset
from fedsec.defense import Defense
from fedsec.match import match
from fedsec.models import LeNetSpec, MLPSpec, ModelSpec
from fedsec.rng import stream
from fedsec.threat import ThreatModel
from fedsec.types import Batch, Exchange
from fedsec.verify.claim import Claim, fresh
from fedsec.verify.matching import presets

COUNT = 4  # images in a batch
MLP = MLPSpec(hidden=(256,))


def leaked(
    dataset: Dataset,
    *,
    attack: str,
    spec: ModelSpec,
    defense: Defense,
    threat: str,
    victims: int,
    distinct: bool = False,
    **changed: Any,
) -> float:
    """Mean PSNR of the private images behind victims x COUNT encodings.

    `distinct`: batches in which every image has a class of its own.
    """
    model = fresh(spec, dataset, stream(0, "verify", "model"))
    local, exchanges = Gradient(lr=0.1, batch=COUNT).local, []
    for v, batch in enumerate(_batches(dataset, victims, distinct)):
        streams = client_streams(0, v, 0, "verify")
        update, trained = local_update(model, [batch], defense, local, streams, COUNT)
        known = (update, batch, trained, local, defense)
        exchanges.append(Exchange(0, (v,), model, spec.mode, *known))
    seen = ThreatModel(grants=presets("threat")[threat].grants, name=threat).observe(exchanges)
    rngs = [stream(0, "attack", v) for v in range(victims)]
    found = replace(presets("attack")[attack], **changed)(seen, rngs, lambda *_: None)
    truths = [e.batch.images for e in exchanges]
    pairs = zip(found.images, truths, strict=True)
    scores = [metrics.psnr(guess[match(guess, truth)], truth) for guess, truth in pairs]
    return float(torch.cat(scores).mean())


def _batches(dataset: Dataset, victims: int, distinct: bool) -> list[Batch]:
    found, v = [], 0
    while len(found) < victims:
        # neighbours look alike
        rows = [(53 * (v * COUNT + i)) % len(dataset.test) for i in range(COUNT)]
        batch = dataset.test.batch(rows, dataset.classes)
        if not distinct or len(batch.labels.unique()) == COUNT:
            found.append(batch)
        v += 1
    return found


def gain(dataset: Dataset, *, over: dict[str, Any], **setting: Any) -> float:
    """Mean dB more than in the setting changed by `over`."""
    return leaked(dataset, **setting) - leaked(dataset, **(setting | over))


def _row(setting: str, measure, least: float, threat: str = "honest_server") -> Claim:
    return Claim(
        attack="unmix",
        paper="Carlini et al. 2021, sections 4 and 5",
        threat=threat,
        setting=setting,
        published="none usable: 5,000 encodings of 100 images were given, not an update",
        unit="dB",
        measure=measure,
        least=least,
    )


CLAIMS: tuple[Claim, ...] = (
    _row(
        "mlp 256, untrained, batch 4, mixup of 2, no label or weight known, 4 victims",
        partial(
            leaked, attack="unmix", spec=MLP, defense=Mixup(k=2, upper=0.65),
            threat="honest_server", victims=4,
        ),
        35.0,
    ),
    _row(
        "the same with the true weights, PSNR capped",
        partial(
            leaked, attack="unmix", spec=MLP, defense=Mixup(k=2, upper=0.65),
            threat="known_mixing", victims=4,
        ),
        75.0,
        "known_mixing",
    ),
    _row(
        "mlp 256, untrained, batch 4 of 4 classes, instahide of 4, labels withheld, 4 victims",
        partial(
            leaked, attack="unmix", spec=MLP, defense=InstaHide(k=4, upper=0.65),
            threat="honest_server", victims=4, distinct=True,
        ),
        25.0,
    ),
    _row(
        "lenet, untrained, batch 4, mixup of 2, 6 victims; gain of true weights over "
        "inverting with as many steps",
        partial(
            gain, attack="unmix", spec=LeNetSpec(), defense=Mixup(k=2, upper=0.65),
            threat="known_mixing", victims=6, over={"attack": "inverting"},
        ),
        0.5,
        "known_mixing",
    ),
)  # fmt: skip

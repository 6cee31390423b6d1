"""Attacks by optimisation, on small untrained networks: what their papers find, in minutes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from defenses.noise import Noise
from defenses.prune import Prune
from fedsec import config, metrics
from fedsec.attack import Attack
from fedsec.client import FedAvg, Gradient, client_streams, local_update, schedule
from fedsec.data import Dataset
from fedsec.defense import Compose, Defense
from fedsec.match import match
from fedsec.models import LeNetSpec, MLPSpec, ModelSpec, ResNetSpec, norm_stats
from fedsec.rng import stream
from fedsec.threat import ThreatModel
from fedsec.types import Batch, Exchange, Reconstruction, Stage
from fedsec.verify.claim import Claim, fresh

PLAIN = LeNetSpec(mean=(0.0,) * 3, std=(1.0,) * 3)  # images as they are, as in DLG's own code


@cache
def presets(group: str) -> dict[str, Any]:
    """The options of configs/GROUP, with the values of their YAML."""
    return config.presets(group, [config.OPTIONS])


def victims_of(
    dataset: Dataset,
    spec: ModelSpec,
    *,
    victims: int,
    count: int,
    client: Gradient | FedAvg | None = None,
    defense: Defense | None = None,
    model: nn.Module | None = None,
) -> list[Exchange]:
    """Updates that clients sent of victims x count test images; of a fresh model, or of `model`."""
    client = client or Gradient(lr=0.1, batch=count)
    model = model or fresh(spec, dataset, stream(0, "verify", "model"))
    exchanges = []
    for v in range(victims):
        # neighbours look alike
        rows = [(53 * (v * count + i)) % len(dataset.test) for i in range(count)]
        batch = dataset.test.batch(rows, dataset.classes)
        parts = [Batch(batch.images[i], batch.targets[i]) for i in schedule(count, client.local)]
        streams = client_streams(0, v, 0, "verify")
        protect = defense or Compose(())
        sent, trained = local_update(model, parts, protect, client.local, streams, count)
        known = (client.local, protect, norm_stats(model, batch.images))
        exchanges.append(Exchange(0, (v,), model, spec.mode, sent, batch, trained, *known))
    return exchanges


def found_by(
    attack: Attack, exchanges: list[Exchange], threat: str, without: frozenset[str] = frozenset()
) -> Reconstruction:
    """What the attack makes of the exchanges, as one stack."""
    grants = tuple(g for g in presets("threat")[threat].grants if g not in without)
    seen = ThreatModel(grants=grants, name=threat).observe(exchanges)
    rngs = [stream(0, "attack", v) for v in range(len(exchanges))]
    with torch.no_grad():
        return attack(seen, rngs, lambda *_: None)


def scored(found: Reconstruction | Stage, exchanges: list[Exchange]) -> list[float]:
    """PSNR of each image, matched one to one within an update."""
    scores = []
    for guess, exchange in zip(found.images, exchanges, strict=True):
        truth = exchange.batch.images
        scores += metrics.psnr(guess[match(guess, truth)], truth).tolist()
    return scores


def decibels(
    dataset: Dataset,
    *,
    attack: str,
    spec: ModelSpec | None = None,
    victims: int = 8,
    count: int = 1,
    client: Gradient | FedAvg | None = None,
    threat: str = "honest_server",
    defense: Defense | None = None,
    without: frozenset[str] = frozenset(),
    **changed: Any,
) -> list[float]:
    """PSNR of each of victims x count test images, from updates that a client sent of them."""
    of = {"victims": victims, "count": count, "client": client, "defense": defense}
    exchanges = victims_of(dataset, spec or LeNetSpec(), **of)
    solver = replace(presets("attack")[attack], **changed)
    return scored(found_by(solver, exchanges, threat, without), exchanges)


def mean(dataset: Dataset, **setting: Any) -> float:
    scores = decibels(dataset, **setting)
    return sum(scores) / len(scores)


def share(dataset: Dataset, *, above: float, **setting: Any) -> float:
    """Of images that come out above so many dB."""
    scores = decibels(dataset, **setting)
    return sum(score > above for score in scores) / len(scores)


def gain(dataset: Dataset, *, over: dict[str, Any], **setting: Any) -> float:
    """Mean dB more than in the setting changed by `over`."""
    return mean(dataset, **setting) - mean(dataset, **(setting | over))


def linear(dataset: Dataset) -> float:
    return min(decibels(dataset, attack="linear", spec=MLPSpec(hidden=(128, 64))))


_row = partial(Claim, threat="honest_server", unit="dB")
_plain = {"spec": PLAIN, "victims": 5, "steps": 100}
_signed = {"over": {"attack": "inverting_signed"}}
OTHER = "none usable: other networks and images"
LENET = "lenet, untrained, train mode, batch 1, 8 images"
SHORT = "lenet, untrained, images not normalised, 100 steps, share of 5 images above 30 dB"
_local = {
    "spec": MLPSpec(hidden=(256,)),
    "client": FedAvg(lr=0.01, batch=4, steps=20),
    "count": 4,
    "victims": 2,
    "steps": 150,
}
LOCAL = "mlp 256, untrained, 20 local steps on a batch of 4, 2 victims, 150 steps"
_batchnorm = {"spec": ResNetSpec(), "victims": 2, "steps": 200, "restarts": 2}
BATCHNORM = "resnet20, untrained, train mode, batch 1, 2 images, 200 steps, 2 restarts"

CLAIMS: tuple[Claim, ...] = (
    _row(
        attack="linear",
        paper="Geiping et al. 2020, proposition 3.1",
        setting="mlp 128-64, untrained, batch 1, worst of 8 images, PSNR capped",
        published="exact",
        measure=linear,
        least=80.0,
    ),
    _row(
        attack="dlg",
        paper="Zhu et al. 2019, figure 5",
        setting=SHORT,
        published=OTHER,
        unit="share",
        measure=partial(share, attack="dlg", above=30.0, **_plain),
        least=0.2,
    ),
    _row(
        attack="idlg",
        paper="Zhao et al. 2020, figure 2: more images than DLG",
        setting=SHORT,
        published=OTHER,
        unit="share",
        measure=partial(share, attack="idlg", above=30.0, **_plain),
        least=0.6,
    ),
    _row(
        attack="cpl",
        paper="Wei et al. 2020, table 1",
        setting=SHORT,
        published=OTHER,
        unit="share",
        measure=partial(share, attack="cpl", above=30.0, **_plain),
        least=0.6,
    ),
    _row(
        attack="inverting_signed",
        paper="Geiping et al. 2020, table 1",
        setting=f"{LENET}, 600 steps",
        published=OTHER,
        measure=partial(mean, attack="inverting_signed"),
        least=19.0,
        most=24.0,
    ),
    _row(
        attack="inverting",
        paper="the same objective; the steps are ours",
        setting=f"{LENET}, 300 spectral steps; gain over 600 signed ones",
        published="none usable: ours",
        measure=partial(gain, attack="inverting", **_signed),
        least=3.0,
    ),
    _row(
        attack="inverting",
        paper="Huang et al. 2021, section 4.3: pruning alone does not protect",
        setting=f"{LENET}, prune 0.9; gain of knowing the mask",
        published="none usable: attacked without the mask",
        measure=partial(
            gain,
            attack="inverting",
            defense=Compose((Prune(ratio=0.9),)),
            over={"without": frozenset({"defense"})},
        ),
        least=2.0,
    ),
    _row(
        attack="inverting",
        paper="Zhu et al. 2019, section 5.1: noise of 0.01 stops it",
        setting=f"{LENET}, noise 0.1; gain of knowing the noise",
        published="none usable: attacked as if there were none",
        measure=partial(
            gain,
            attack="inverting",
            defense=Compose((Noise(std=0.1, distribution="gaussian"),)),
            over={"without": frozenset({"defense"})},
        ),
        least=4.0,
    ),
    _row(
        attack="modern",
        paper="breaching's preset modern",
        setting=f"{LENET}, 600 steps; gain over as many signed ones",
        published=OTHER,
        measure=partial(gain, attack="modern", **_signed),
        least=1.0,
    ),
    _row(
        attack="sme",
        paper="Zhu et al. 2023, table 1",
        setting=LOCAL,
        published=OTHER,
        measure=partial(mean, attack="sme", **_local),
        least=20.0,
    ),
    _row(
        attack="fedavg",
        paper="Dimitrov et al. 2022, table 2",
        setting=LOCAL,
        published=OTHER,
        measure=partial(mean, attack="fedavg", **_local),
        least=17.0,
    ),
    _row(
        attack="gradinversion",
        paper="Yin et al. 2021, table 3: statistics help",
        setting=f"{BATCHNORM}; gain of inferred statistics over none",
        published=OTHER,
        measure=partial(gain, attack="gradinversion", over={"bn": 0.0}, **_batchnorm),
        least=0.0,
    ),
)

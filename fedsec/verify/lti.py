"""What a network learns from public images: more than nulls, and more if it knows the defense."""

from functools import partial

import torch

from defenses.dpsgd import DPSGD
from fedsec import match, metrics
from fedsec.client import client_streams, local_update
from fedsec.data import Dataset
from fedsec.defense import Defense
from fedsec.models import LeNetSpec
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.claim import Claim, fresh, sent


def psnr(dataset: Dataset, *, defense: Defense, told: bool, victims: int = 16) -> tuple[list, list]:
    """Of each victim: the attack's PSNR in dB and the best null's; `told` of the defense or not."""
    from attacks.lti import LTI

    rng, local = stream(0, "verify", "lti"), Local("gradient", 1.0, 1, 1)
    model = fresh(LeNetSpec(), dataset, rng)
    picked = torch.randperm(len(dataset.train), generator=rng)
    batch = dataset.train.batch(picked[:victims], dataset.classes)
    updates = []
    for v in range(victims):
        one = dataset.train.batch(picked[[v]], dataset.classes)
        streams = client_streams(0, v, 0, "verify")
        updates.append(local_update(model, [one], defense, local, streams, 1)[0].tensors)
    public = torch.randperm(len(dataset.test), generator=rng)[:1000]
    aux = dataset.test.batch(public, dataset.classes)
    known = {"local": local, "aux": aux} | ({"defense": defense} if told else {})
    attack = LTI(
        updates=1000, shift=4, mirror=True, features=512, width=512, steps=500, batch=64, lr=1e-3
    )
    rngs = [stream(0, "attack", v) for v in range(victims)]
    found = attack(sent(model, updates, 1, dataset, **known), rngs, lambda *_: None)
    others = dataset.train.batch(picked[victims : victims + 500], dataset.classes).images
    nulls = [match.nulls(x[None], dataset.mean_image, others, rng) for x in batch.images]
    reached = metrics.psnr(found.images[:, 0], batch.images).tolist()
    return reached, [float(match.best_null(null)[1]) for null in nulls]


def above_null(dataset: Dataset) -> float:
    """Mean dB above the best null of each image, without a defense."""
    reached, nulls = psnr(dataset, defense=Defense(), told=False)
    return (sum(reached) - sum(nulls)) / len(nulls)


def of_knowing(dataset: Dataset, *, defense: Defense) -> float:
    """Mean dB that are gained by simulating the defense, not an undefended client."""
    knowing, ignorant = (psnr(dataset, defense=defense, told=told)[0] for told in (True, False))
    return (sum(knowing) - sum(ignorant)) / len(knowing)


_SETTING = "lenet untrained, batch 1, 16 victims, 1,000 public images and updates, 500 steps"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        attack="lti",
        paper="Wu et al. 2023, section 4",
        threat="informed",
        setting=f"{_SETTING}, PSNR above each image's best null",
        published="none usable: learned from 50,000 public images, on a GPU",
        unit="dB",
        measure=above_null,
        least=2.0,
    ),
    Claim(
        attack="lti",
        paper="Wu et al. 2023, section 4",
        threat="informed",
        setting=f"{_SETTING}, dpsgd (noise 0.1): PSNR above learning without the defense",
        published="none usable: the paper's attacker always knows the defense",
        unit="dB",
        measure=partial(of_knowing, defense=DPSGD(clip=1.0, noise_multiplier=0.1, delta=1e-5)),
        least=0.5,
    ),
)

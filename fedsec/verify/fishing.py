"""What fishing isolates, measured."""

from __future__ import annotations

import torch

from fedsec import cuts, engine
from fedsec.data import Dataset
from fedsec.models import LeNetSpec, last_linear
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.claim import Claim, fresh
from fedsec.verify.imprint import apart, drawn, probed

QUERIES, IMAGES = 16, 8
POOL = 1000  # training images whose quantiles are known, and that batches are drawn from


def _caught(images: Dataset, number: int):
    """A batch, the model that it was sent first, its fishing class, and what is isolated."""
    from attacks.fishing import Fishing

    attack = Fishing(queries=QUERIES, steps=1, lr=0.5, tv=0.003)
    known = images.train.batch(range(POOL), images.classes)
    batch = drawn(images, IMAGES, number, POOL)
    seen = probed(attack, fresh(LeNetSpec(), images), batch, known)
    fishing = int(last_linear(seen.model)[1].weight.abs().sum(1).argmax())
    return batch, seen.model, fishing, cuts.caught(seen, 0, fishing)


def isolated(images: Dataset, draws: int) -> float:
    """The share of images that are isolated."""
    caught = sum(len(_caught(images, number)[-1]) for number in range(draws))
    return caught / (IMAGES * draws)


def distance(images: Dataset, draws: int) -> float:
    """The worst cosine distance of an isolated update to the nearest image's own."""
    worst = 0.0
    for number in range(draws):
        batch, model, fishing, updates = _caught(images, number)
        target, local = torch.eye(images.classes)[fishing][None], Local("gradient", 1.0)
        own = [engine.simulate(model, x[None], target, local) for x in batch.images]
        for update in updates:
            worst = max(worst, min(float(engine.cosine(one, update)) for one in own))
    return worst


def seen_of(images: Dataset, count: int) -> float:
    """Mean PSNR in dB of the fished images of a batch of `count`."""
    from attacks.fishing import Fishing

    attack = Fishing(queries=QUERIES, steps=300, lr=0.5, tv=0.003)
    batch = drawn(images, count, 0)
    found = attack(
        probed(attack, fresh(LeNetSpec(), images), batch), [stream(0, "attack")], lambda *_: None
    )
    number = int(found.flags[0][0].split()[0])
    return float(apart(found.images[0][:number], batch.images).amax(1).mean())


CLAIMS: tuple[Claim, ...] = (
    Claim(
        attack="fishing",
        paper="Wen et al. 2022, section 3: one image's gradient",
        threat="malicious_server",
        setting="lenet, fresh, 8 images, 16 queries at the pool's own quantiles; mean of 80 draws",
        published="(1 - 1/15)^7 = 0.617, from the cuts alone",
        unit="share isolated",
        measure=lambda images: isolated(images, 80),
        least=0.557,
        most=0.677,
    ),
    Claim(
        attack="fishing",
        paper="Wen et al. 2022, section 3: it is that image's own",
        threat="malicious_server",
        setting="the same, 10 draws: worst distance to the nearest image's own gradient",
        published="none usable: exact up to rounding",
        unit="1 - cosine",
        measure=lambda images: distance(images, 10),
        most=1e-4,
    ),
    Claim(
        attack="fishing",
        paper="Wen et al. 2022, section 4: as good as a batch of one",
        threat="malicious_server",
        setting="lenet, fresh, 32 images, 16 queries, 300 steps: those that are isolated",
        published="none usable: other models and data",
        unit="dB",
        measure=lambda images: seen_of(images, 32),
        least=24.0,
    ),
)

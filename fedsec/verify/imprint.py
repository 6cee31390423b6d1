"""What an imprint block is expected to give away, measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsec.attack import Attack, crafted
from fedsec.client import mean_gradient
from fedsec.data import Dataset
from fedsec.defense import Defense
from fedsec.models import LeNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation, ThreatModel
from fedsec.types import Batch, Exchange, Local, Update
from fedsec.verify.claim import Claim, fresh

EXACT = 60.0  # dB, above which an image counts as found
SERVER = ("model", "update", "queries", "count", "shape", "data_range", "mode")


def probed(attack: Attack, model: nn.Module, batch: Batch, aux: Batch | None = None) -> Observation:
    """What a malicious server sees of `batch`: gradients on the models that the attack crafts."""
    threat = ThreatModel(grants=(*SERVER, "aux") if aux else SERVER, tampers=True)
    mode, local = "train" if model.training else "eval", Local("gradient", 1.0)
    nobody = Batch(torch.zeros_like(batch.images), torch.zeros_like(batch.targets))
    blank = Exchange(
        0, (0,), model, mode, Update({}, {}, 0), nobody, nobody, local, Defense(), aux=aux
    )
    models, _ = crafted(attack, threat, blank, stream(0, "craft"))
    updates = [Update(mean_gradient(m, batch), {}, len(batch)) for m in models]
    queries = tuple(zip(models[1:], updates[1:], strict=True))
    exchange = Exchange(
        0, (0,), models[0], mode, updates[0], batch, batch, local, Defense(), aux=aux,
        queries=queries,
    )  # fmt: skip
    return threat.observe([exchange])


def drawn(images: Dataset, count: int, number: int, pool: int | None = None) -> Batch:
    """A random batch of training images: of the first `pool` of them, or of all."""
    order = torch.randperm(pool or len(images.train), generator=stream(number, "verify"))
    return images.train.batch(order[:count], images.classes)


def apart(found: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB, up to 200, of each image found against each original: [found, truth]."""
    error = (found[:, None] - truth[None]).double().square().flatten(2).mean(2)
    return -10 * error.clamp_min(1e-20).log10()


def exact(images: Dataset, draws: int) -> tuple[float, float]:
    """The mean share of 64 images that are found exactly, and dB of the worst certified one."""
    from attacks.imprint import Imprint

    attack = Imprint(bins=128)
    model = fresh(LeNetSpec(), images)
    known = images.train.batch(range(len(images.train)), images.classes)  # the very distribution
    shares, worst = [], 200.0
    for number in range(draws):
        batch = drawn(images, 64, number)
        seen = probed(attack, model, batch, known)
        found = attack(seen, [stream(0, "attack")], lambda *_: None)
        psnr = apart(found.images[0], batch.images)
        shares.append(float((psnr.amax(0) > EXACT).double().mean()))
        certified = int(found.flags[0][0].split()[0])
        worst = min(worst, float(psnr[:certified].amax(1).min()))
    return sum(shares) / draws, worst


CLAIMS: tuple[Claim, ...] = (
    Claim(
        attack="imprint",
        paper="Fowl et al. 2022, section 4: one image a bin",
        threat="malicious_server",
        setting="lenet, fresh, 64 images, 128 bins at the pool's own quantiles; mean of 40 draws",
        published="(1 - 1/129)^63 128/129 = 0.608, from the bins alone",
        unit="share above 60 dB",
        measure=lambda images: exact(images, 40)[0],
        least=0.578,
        most=0.638,
    ),
    Claim(
        attack="imprint",
        paper="Fowl et al. 2022, section 4: exact up to rounding",
        threat="malicious_server",
        setting="the same in single precision, 10 draws: worst of all certified images",
        published="none usable: exact",
        unit="dB",
        measure=lambda images: exact(images, 10)[1],
        least=60.0,
    ),
)

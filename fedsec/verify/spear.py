"""What SPEAR is known to reach, measured again."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fedsec.data import Dataset
from fedsec.match import match
from fedsec.models import MLPSpec
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.claim import Claim, fresh, sent


def _worst(
    images: Dataset, count: int, dtype: torch.dtype, hidden: tuple[int, ...] = (200,) * 6
) -> tuple[float, float]:
    """PSNR in dB, without a cap, of the worst image; and the attack's seconds."""
    from attacks.spear import Spear
    from fedsec.engine import simulate

    model = fresh(MLPSpec(hidden=hidden), images, dtype=dtype)
    batch = images.test.batch(range(count), images.classes)
    truth, targets = batch.images.to(dtype), batch.targets.to(dtype)
    update = simulate(model, truth, targets, Local(kind="gradient", lr=1.0))
    seen = sent(model, [update], count, images)
    begun = time.perf_counter()
    attack = Spear(rule="annealed", starts=192, chunk=64)
    found = attack(seen, [stream(0, "attack")], lambda *_: None).images[0]
    seconds = time.perf_counter() - begun
    error = (found[match(found, truth)] - truth).double().square().flatten(1).mean(1)
    return float(-10 * error.max().clamp_min(1e-40).log10()), seconds


def _claim(setting: str, unit: str, measure: Callable[[Dataset], float], **bounds) -> Claim:
    return Claim(
        attack="spear",
        paper="Dimitrov et al. 2024, abstract",
        threat="eavesdropper",
        setting=setting,
        published="none usable: exact for batches up to about 25, on a GPU",
        unit=unit,
        measure=measure,
        **bounds,
    )


CLAIMS: tuple[Claim, ...] = (
    _claim(
        "mlp 6 x 200, fresh, batch 8, double precision: worst image",
        "dB",
        lambda images: _worst(images, 8, torch.float64)[0],
        least=200.0,
    ),
    _claim(
        "mlp 6 x 200, fresh, batch 4, then 8, double precision: the slower one",
        "s",
        lambda images: max(_worst(images, n, torch.float64)[1] for n in (4, 8)),
        most=5.0,
    ),
    _claim(
        "mlp 6 x 200, fresh, batch 16, single precision: worst image",
        "dB",
        lambda images: _worst(images, 16, torch.float32)[0],
        least=120.0,
    ),
    _claim(
        "mlp 3 x 1024, fresh, batch 64, single precision: worst image",
        "dB",
        lambda images: _worst(images, 64, torch.float32, (1024,) * 3)[0],
        least=100.0,
        data="cifar10",
    ),
)

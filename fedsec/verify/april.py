"""APRIL on a small vision transformer: exact up to rounding, by the paper's system and by a nearer
one."""

from functools import partial

import torch

from attacks.april import April
from fedsec import metrics
from fedsec.client import mean_gradient
from fedsec.data import Dataset
from fedsec.models import ViTSpec
from fedsec.rng import stream
from fedsec.types import Batch
from fedsec.verify.claim import Claim, fresh, sent

IMAGES = 8


def worst(dataset: Dataset, *, through: str, encoder: str, dtype: torch.dtype) -> float:
    """Least PSNR, in dB without a cap, over test images that were attacked one by one."""
    model = fresh(ViTSpec(encoder=encoder), dataset, stream(0, "verify", "april"), dtype)
    batch = dataset.test.batch(range(IMAGES), dataset.classes)
    images, targets = batch.images.to(dtype), batch.targets.to(dtype)
    each = [Batch(images[i, None], targets[i, None]) for i in range(IMAGES)]
    seen = sent(model, [mean_gradient(model, one) for one in each], 1, dataset)
    rngs = [stream(0, "attack", v) for v in range(IMAGES)]
    found = April(through=through)(seen, rngs, lambda *_: None)
    return float(metrics.psnr(found.images[:, 0], images, cap=torch.inf).min())


def _claim(through: str, encoder: str, dtype: torch.dtype, least: float, said: str) -> Claim:
    bits = torch.finfo(dtype).bits
    return Claim(
        attack="april",
        paper="Lu et al. 2022, section 4.2" if through == "attention" else "none: a consequence",
        threat="eavesdropper",
        setting=f"vit {encoder}, 4 blocks, untrained, float{bits}, batch 1, through {through}, "
        f"worst of {IMAGES} images",
        published=said,
        unit="dB",
        measure=partial(worst, through=through, encoder=encoder, dtype=dtype),
        least=least,
    )


EXACT = "none usable: the paper proves that the image is unique, and prints other networks' errors"
OWN = "none usable: not in the paper; exact in real arithmetic"

CLAIMS: tuple[Claim, ...] = (
    _claim("attention", "sequential", torch.float64, 140.0, EXACT),
    _claim("embedding", "residual", torch.float64, 230.0, OWN),
    _claim("embedding", "residual", torch.float32, 75.0, OWN),
)

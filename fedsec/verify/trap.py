"""What trap weights give away, measured."""

from __future__ import annotations

import torch

from fedsec.data import Dataset
from fedsec.models import MLPSpec
from fedsec.rng import stream
from fedsec.verify.claim import Claim, fresh
from fedsec.verify.imprint import EXACT, apart, drawn, probed


def extracted(images: Dataset, count: int, shrink: float, draws: int = 5) -> dict[str, float]:
    """Images that fired some neuron alone, that came out, and wrong certificates; by image."""
    from attacks.trap import Trap

    attack, model = Trap(shrink=shrink), fresh(MLPSpec(), images)
    total = {"alone": 0.0, "out": 0.0, "wrong": 0.0}
    for number in range(draws):
        batch = drawn(images, count, number)
        seen = probed(attack, model, batch)
        found = attack(seen, [stream(0, "attack")], lambda *_: None)
        with torch.no_grad():
            first = seen.model.layers[0](seen.model.normalise(batch.images).flatten(1)) > 0
        alone = first[:, first.sum(0) == 1].any(1)
        certified = int(found.flags[0][0].split()[0])
        psnr = apart(found.images[0], batch.images)[:certified]
        total["alone"] += float(alone.sum()) / (count * draws)
        total["out"] += float((psnr > EXACT).any(0).sum()) / (count * draws)
        total["wrong"] += float((psnr <= EXACT).all(1).sum()) / (count * draws)
    return total


def _share(images: Dataset) -> float:
    found = extracted(images, 64, 0.95)
    return found["out"] / found["alone"] - found["wrong"]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        attack="trap",
        paper="Boenisch et al. 2023, section 5: who fires a neuron alone is exact",
        threat="malicious_server",
        setting="mlp, fresh, 64 images, shrink 0.95: certified, of all that fired a neuron alone",
        published="1, less what rounding hides from the certificate",
        unit="share above 60 dB",
        measure=_share,
        least=0.95,
    ),
    Claim(
        attack="trap",
        paper="Boenisch et al. 2023, section 6: extraction recall",
        threat="malicious_server",
        setting="mlp, fresh, 1024 neurons, 20 images, shrink 0.97",
        published="none usable: it depends on the data and on a factor tuned for each data set",
        unit="share above 60 dB",
        measure=lambda images: extracted(images, 20, 0.97)["out"],
        least=0.6,
    ),
)

"""The informed adversary at both ends: always right, and at chance."""

from functools import partial

import torch

from attacks.candidates import Candidates
from defenses.dpsgd import DPSGD
from fedsec.client import client_streams, local_update
from fedsec.data import Dataset
from fedsec.defense import Defense
from fedsec.models import LeNetSpec
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.claim import Claim, fresh, sent


def right(dataset: Dataset, *, pool: int, victims: int, sigma: float | None) -> float:
    """Share of victims whose image was chosen among `pool` training images, labels withheld."""
    clipped = DPSGD(clip=1.0, noise_multiplier=sigma or 0.0, delta=1e-5)
    defense = Defense() if sigma is None else clipped
    rng, local = stream(0, "verify", "candidates", pool), Local("gradient", 1.0, 1, 1)
    model = fresh(LeNetSpec(), dataset, rng)
    hits = 0
    for v in range(victims):
        picked = torch.randperm(len(dataset.train), generator=rng)[:pool]
        private = int(torch.randint(pool, (), generator=rng))
        images = dataset.train.batch(picked, dataset.classes).images
        batch = dataset.train.batch(picked[[private]], dataset.classes)
        streams = client_streams(0, v, 0, "verify")
        update, _ = local_update(model, [batch], defense, local, streams, 1)
        known = {"local": local, "defense": defense, "candidates": images[None]}
        seen = sent(model, [update.tensors], 1, dataset, **known)
        found = Candidates(classes=10)(seen, [stream(0, "attack", v)], lambda *_: None)
        hits += torch.equal(found.images[0, 0], images[private])
    return hits / victims


def _claim(
    pool: int, victims: int, sigma: float | None, said: str, least: float, most: float = 1.0
) -> Claim:
    how = "no defense" if sigma is None else f"dpsgd with clip 1 and noise {sigma:g}"
    return Claim(
        attack="candidates",
        paper="Hayes et al. 2023, section 4.1",
        threat="informed",
        setting=f"lenet untrained, batch 1, {pool} candidates, {victims} victims, {how}",
        published=said,
        unit="share",
        measure=partial(right, pool=pool, victims=victims, sigma=sigma),
        least=least,
        most=most,
    )


SURE = "1, as noise goes to nothing"
CHANCE = "one over the candidates, as noise grows"

CLAIMS: tuple[Claim, ...] = (
    _claim(1000, 4, None, SURE, least=1.0),
    _claim(1000, 4, 0.01, SURE, least=1.0),
    # 1 / 8 of 160, within three standard errors
    _claim(8, 160, 100.0, CHANCE, least=0.047, most=0.203),
)

"""Inter-dataset InstaHide mixes two private images with public ones, and tells only of the two."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_defenses import batch_of

from attacks.unmix import _mixer
from defenses.instahide import InstaHide, Inter
from defenses.noise import Noise
from fedsec.checks import Refused
from fedsec.defense import Compose, Defense
from fedsec.rng import stream
from fedsec.types import Batch

SHAPE, K, UPPER = (3, 16, 16), 5, 0.65
PUBLIC = batch_of(20, shape=SHAPE, seed=1)
PRIVATE = batch_of(8, classes=7, shape=SHAPE)
ASKED = InstaHide(k=K, upper=UPPER, inter=True)


def supplied() -> Inter:
    found = ASKED.supplied(PUBLIC)
    assert isinstance(found, Inter)
    return found


def mixes_two_with_public_ones(defense: Inter) -> bool:
    """Read off the images by least squares: which are in each encoding, and how much of them."""
    encoded = defense.mix(PRIVATE, stream(0))
    sources = torch.cat([PRIVATE.images, PUBLIC.images]).flatten(1)
    weights = torch.linalg.lstsq(sources.T, encoded.images.flatten(1).T).solution.T
    own, public = weights[:, :8], weights[:, 8:]
    told = own / own.sum(1, keepdim=True) @ PRIVATE.targets
    chosen = public > 1e-6
    return bool(
        torch.allclose(weights.sum(1), torch.ones(8).double(), atol=1e-6)
        and ((own > 1e-6).sum(1) == 2).all()
        and (own.diagonal() > 1e-6).all()
        and (chosen.sum(1) == K - 2).all()
        and len({tuple(row) for row in chosen.tolist()}) == 8  # each has public ones of its own
        and weights.max() <= UPPER + 1e-6
        and torch.allclose(encoded.targets, told, atol=1e-6)
        and encoded.mix is not None
        and torch.allclose(encoded.mix, own, atol=1e-6)
    )


def test_its_parameters_are_published_and_its_images_are_not():
    assert supplied().published == ASKED
    both = Compose((supplied(), Noise(std=0.1, distribution="gaussian"))).published
    assert isinstance(both, Compose)
    assert both.parts[0] == ASKED
    kept = [v for part in both.parts for v in vars(part).values() if isinstance(v, torch.Tensor)]
    assert kept == []
    assert any(isinstance(v, torch.Tensor) for v in vars(supplied()).values())


class TellsOfPublicOnes(Inter):
    def mix(self, batch, rng):
        mix = super().mix(batch, rng)
        assert mix.mix is not None
        return Batch(mix.images, mix.mix @ batch.targets, mix=mix.mix)


class SamePublicOnes(Inter):
    def mix(self, batch, rng):
        few = Inter(k=self.k, upper=self.upper, inter=True, public=self.public[: self.k - 2])
        return few.mix(batch, rng)


class OnePrivate(Inter):
    def mix(self, batch, rng):
        other = Batch(batch.images[:1].repeat(len(batch), 1, 1, 1), batch.targets)
        return super().mix(other, rng)


def test_two_private_images_are_mixed_with_public_ones():
    assert mixes_two_with_public_ones(supplied())
    for broken in (TellsOfPublicOnes, SamePublicOnes, OnePrivate):
        assert not mixes_two_with_public_ones(broken(**vars(supplied())))


def test_signs_hide_the_mix_and_its_magnitude_survives():
    defense = supplied()
    encoded, mix = defense.batch(PRIVATE, stream(0)), defense.mix(PRIVATE, stream(0))
    assert torch.equal(encoded.targets, mix.targets)
    assert (defense.magnitude(encoded.images) - (mix.images - 0.5).abs()).abs().max() < 1e-15
    flipped = (encoded.images - mix.images).abs() > 1e-12
    assert flipped.double().mean() == pytest.approx(0.5, abs=0.03)
    assert len(defense.batch(batch_of(0, shape=SHAPE), stream(0))) == 0


def test_public_images_reach_it_within_a_list_too():
    noise = Noise(std=1.0, distribution="gaussian")
    both = Compose([ASKED, noise]).supplied(PUBLIC)
    assert isinstance(both, Compose)
    assert isinstance(both.parts[0], Inter)
    assert both.parts[1] is noise
    assert Defense().supplied(PUBLIC).supplied(PUBLIC) is not None
    intra = InstaHide(k=K, upper=UPPER)
    assert intra.supplied(PUBLIC) is intra
    assert _mixer(supplied()) is None  # unmix does not know the public images
    assert _mixer(intra) is intra


def test_a_run_mixes_in_public_images(tmp_path, monkeypatch, capsys):
    more = ("defense=instahide", "defense.inter=true", "victim_batch=2", "attack.steps=1")
    assert tiny.call(monkeypatch, tiny.words(tmp_path, *more, "rounds=1")) == 0, capsys.readouterr()
    assert [row["defense"] for row in tiny.rows(tmp_path / "out")] == ["none"] * 4 + [
        "instahide"
    ] * 4


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(Refused, match=r"^k: must be at least 3 with inter, got 2$"):
        InstaHide(k=2, upper=UPPER, inter=True)
    with pytest.raises(Refused, match=r"^defense: .* at most 2 \+ 20, .*, got 23$"):
        InstaHide(k=23, upper=UPPER, inter=True).supplied(PUBLIC)
    with pytest.raises(Refused, match=r"^victim_batch: .* at least 2 images .*, got 1$"):
        supplied().batch(batch_of(1, shape=SHAPE), stream(0))
    with pytest.raises(Refused, match="supplied"):
        ASKED.batch(PRIVATE, stream(0))

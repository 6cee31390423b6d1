"""ATS transforms each image by a published policy, with fair signs, and leaves targets alone."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image, ImageEnhance
from test_defenses import DP, batch_of

from defenses.ats import ATS, TRANSFORMS, brightness, transformed
from defenses.dpsgd import DPSGD
from defenses.none import Undefended
from defenses.sign import Sign
from fedsec.attack import undone
from fedsec.checks import Refused
from fedsec.client import client_streams, encode
from fedsec.config import OPTIONS, presets
from fedsec.defense import Compose
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Reconstruction

HYBRID = ATS(policies=("3-1-7", "43-18-18"))


def photo(size=32) -> torch.Tensor:
    """Smooth, bright nowhere near black, in whole bytes."""
    grid = torch.linspace(0.3, 0.9, size)
    planes = [grid[:, None] * grid, grid.flip(0)[:, None] * grid, grid[:, None].expand(size, size)]
    return (torch.stack(planes) * 255).round() / 255


def by_pillow(image: torch.Tensor, policy: str, signs: list[int]) -> torch.Tensor:
    """The same by an imaging library."""
    shown = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    for number, sign in zip(policy.split("-"), signs, strict=True):
        kind, size = TRANSFORMS[int(number)]
        if kind == "contrast":
            shown = ImageEnhance.Contrast(shown).enhance(1 + sign * size)
        else:
            step = -sign * size * 32
            affine = (1, 0, step, 0, 1, 0) if kind == "across" else (1, 0, 0, 0, 1, step)
            shown = shown.transform(shown.size, Image.Transform.AFFINE, affine)
    return torch.tensor(list(shown.getdata())).T.reshape(3, 32, 32) / 255


@pytest.mark.parametrize("policy", ["3", "7", "43", "1", "18", "3-1-7", "43-18-18"])
def test_a_policy_does_what_an_imaging_library_does(policy):
    matched = set()
    for seed in range(24):
        got = transformed(photo(), policy, stream(0, seed))
        for code in range(2 ** len(policy.split("-"))):
            signs = [1 - 2 * (code >> i & 1) for i in range(len(policy.split("-")))]
            if (got - by_pillow(photo(), policy, signs)).abs().max() < 4 / 255:  # it rounds
                matched.add(code)
                break
        else:
            raise AssertionError("no signs give this image")
    assert len(matched) == 2 ** len(policy.split("-"))


def follows_the_policies(defense: ATS) -> bool:
    """Each image is one that a policy can make of its own, and each outcome comes up."""
    same = Batch(photo().expand(64, 3, 32, 32), torch.eye(64))
    encoded = defense.batch(same, stream(0))
    distinct = {tuple((255 * i).round().flatten().tolist()) for i in encoded.images}
    able = {
        tuple((255 * transformed(photo(), p, stream(1, s))).round().flatten().tolist())
        for p in HYBRID.policies
        for s in range(80)
    }
    return bool(
        torch.equal(encoded.targets, same.targets)
        and distinct == able
        and encoded.images.min() >= 0
        and encoded.images.max() <= 1
    )


class OneDrawForTheBatch(ATS):
    def batch(self, batch, rng):
        images = [transformed(i, self.policies[0], stream(0)) for i in batch.images]
        return Batch(torch.stack(images), batch.targets)


class RollsAround(ATS):
    def batch(self, batch, rng):
        return Batch(batch.images.roll(15, -1), batch.targets)


def test_each_image_has_draws_of_its_own():
    assert follows_the_policies(HYBRID)
    assert not follows_the_policies(ATS(policies=("3-1-7",)))
    for broken in (OneDrawForTheBatch, RollsAround):
        assert not follows_the_policies(broken(policies=HYBRID.policies))


def test_a_client_transforms_anew_in_each_step():
    batch = Batch(photo()[None].repeat(8, 1, 1, 1), torch.eye(8), tuple(range(8)))
    first, second = encode([batch, batch], HYBRID, client_streams(0, 0, 0))
    assert not torch.equal(first.images, second.images)
    assert first.index == batch.index
    again = encode([batch, batch], HYBRID, client_streams(0, 0, 0))[1]
    assert torch.equal(again.images, second.images)
    assert len(HYBRID.batch(batch_of(0), stream(0))) == 0
    Compose([HYBRID, DPSGD(**DP)])  # an image's transformation knows no other: epsilon holds


def test_brightness_of_one_channel_is_the_channel():
    grey = torch.rand(1, 4, 4)
    assert torch.equal(brightness(grey), grey[0])
    assert math.isclose(float(brightness(torch.ones(3, 2, 2)).mean()), 1, abs_tol=1e-6)


@pytest.mark.parametrize("policies", [(), ("",), ("3-2",), ("3-1-7", "x")])
def test_unknown_policies_are_refused(policies):
    with pytest.raises(Refused, match=r"^policies: must "):
        ATS(policies=policies)


# What an adversary who knows the policies takes back


def taken_back_right(defense: ATS) -> bool:
    """What is known of each image comes back as it was, whatever was drawn."""
    for seed in range(24):
        private = Batch(photo()[None], torch.eye(1))
        sent = defense.batch(private, stream(1, seed)).images
        again = defense.undone(sent)
        exact = ((again - private.images).abs() < 1e-4).float().mean()
        if exact < 0.45:  # a shift across leaves 55 %, one down takes 10 % more
            return False
    return True


class OnePolicyOnly(ATS):
    """Thinks that all images went through the first policy."""

    def undone(self, images):
        return ATS(policies=self.policies[:1]).undone(images)


class ShiftsTheWrongWay(ATS):
    def undone(self, images):
        return super().undone(images.flip(-1)).flip(-1).flip(-2)


SHIFTS = ATS(policies=("3-7", "43"))  # contrast clips some of an image for good


def test_shifts_are_taken_back_and_what_takes_back_others_is_found():
    assert taken_back_right(SHIFTS)
    assert not taken_back_right(OnePolicyOnly(policies=SHIFTS.policies))
    assert not taken_back_right(ShiftsTheWrongWay(policies=SHIFTS.policies))


def gains(defense: ATS) -> list[float]:
    """Decibels nearer to the private image than what the loss saw, over draws, in order."""
    found = []
    for seed in range(24):
        private = photo()[None]
        sent = HYBRID.batch(Batch(private, torch.eye(1)), stream(2, seed)).images
        before, after = ((x - private).square().mean() for x in (sent, defense.undone(sent)))
        found.append(float(10 * torch.log10(before / after.clamp_min(1e-8))))
    return sorted(found)


def test_the_hybrid_is_taken_back_but_for_what_is_lost():
    right, wrong = gains(HYBRID), gains(OnePolicyOnly(policies=HYBRID.policies))
    assert min(right) > 0
    assert min(wrong) < 0  # the broken twin makes some worse
    assert sum(right) > sum(wrong) + 24


def test_only_images_that_the_loss_saw_are_taken_back():
    seen = Observation("knowing", {"defense": HYBRID})
    images = HYBRID.batch(Batch(photo()[None], torch.eye(1)), stream(0)).images[None]
    one = torch.zeros(1)
    found = Reconstruction(images, torch.zeros(1, 1, dtype=torch.long), one, one.long(), one)
    assert torch.equal(undone(found, seen).images[0], HYBRID.undone(images[0]))
    for other in (Observation("naive", {}), Observation("other", {"defense": Undefended()})):
        assert undone(found, other) is found
    both = Compose((Sign(scale="one"), HYBRID))
    assert both.undoes
    assert torch.equal(both.undone(images[0]), HYBRID.undone(images[0]))
    assert not Compose((Sign(scale="one"),)).undoes
    private = {name for name, attack in presets("attack", [OPTIONS]).items() if attack.private}
    assert private == {"auto", "candidates", "lti", "unmix"}

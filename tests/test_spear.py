"""SPEAR is exact, and says so only where it is."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.spear import Spear
from fedsec import engine
from fedsec.checks import Refused
from fedsec.data import Npz, Photos
from fedsec.match import match
from fedsec.models import LeNetSpec, MLPSpec
from fedsec.rng import stream
from fedsec.spear import basis, factors, inputs, refined, sampled, swapped, widened, zeros
from fedsec.threat import Observation
from fedsec.types import Local, Update
from fedsec.verify.spear import CLAIMS

GRADIENT = Local(kind="gradient", lr=1.0)
ATTACK = Spear(rule="annealed", starts=192, chunk=64)
CIFAR = Path(os.environ.get("FEDSEC_DATA", "nowhere")) / "cifar10.npz"
MLP = MLPSpec(hidden=(200,) * 6)


@pytest.fixture(scope="module")
def photos():
    return Photos().load()


def observed(photos, count, dtype=torch.float64, local=GRADIENT, first=0, spec=MLP, change=None):
    """One victim's update on test images, what is seen of it, and the images and labels."""
    model = spec.build(photos.shape, 10, photos.mean, photos.std, stream(0, "model")).to(dtype)
    batch = photos.test.batch(range(first, first + count), 10)
    images, targets = batch.images.to(dtype), batch.targets.to(dtype)
    if change is not None:
        images, targets = change(images, targets)
    update = engine.simulate(model, images, targets, local)
    stacked = {k: t.detach()[None] for k, t in update.items()}
    for p in model.parameters():
        p.requires_grad_(False)
    facts = {"model": model, "count": count, "shape": photos.shape,
             "update": Update(stacked, {}, count)}  # fmt: skip
    return Observation("test", facts), images, targets.argmax(1)


def exactness(found, images):
    """PSNR without a cap of each image's match, dB."""
    guess = found.images[0][match(found.images[0], images)]
    return -10 * (guess - images).double().square().flatten(1).mean(1).clamp_min(1e-40).log10()


def nothing(*_):
    pass


def run(seen, attack=ATTACK, victims=1):
    return attack(seen, [stream(0, "attack", v) for v in range(victims)], nothing)


def assert_not_found(found):
    assert torch.equal(found.images, torch.full_like(found.images, 0.5))
    assert (found.labels == -1).all()
    assert (found.loss == 1).all()
    assert all("spear found no image" in flags[0] for flags in found.flags)


# ---- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 8, 16])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 200), (torch.float32, 120)])
def test_every_image_and_label_is_exact(photos, count, dtype, least):
    """6 x 200 ReLU MLP: the worst image at least 200 dB in double, 120 dB in single precision."""
    seen, images, labels = observed(photos, count, dtype)
    found = run(seen)
    assert exactness(found, images).min() >= least
    assert torch.equal(found.labels[0][match(found.images[0], images)], labels)
    assert found.loss[0] < 1e-5
    assert found.flags == ((),)


def test_sampling_neurons_finds_what_annealing_finds(photos):
    """The paper's own search is the dumb twin."""
    seen, images, _ = observed(photos, 8)
    found = run(seen), run(seen, replace(ATTACK, rule="sampled", chunk=8192, starts=8192))
    assert all(exactness(f, images).min() >= 200 for f in found)


def test_a_local_step_scales_the_update_and_changes_no_image(photos):
    seen, images, labels = observed(photos, 4, local=Local("fedavg", 0.01, 1, 4))
    found = run(seen)
    assert exactness(found, images).min() >= 200
    assert torch.equal(found.labels[0][match(found.images[0], images)], labels)


def test_directions_are_the_gradients_that_images_passed_back(photos):
    """D = L Q holds exactly what the layer's output got back, image by image."""
    seen, images, labels = observed(photos, 4)
    model, update = seen.model, {k: t[0] for k, t in seen.update.tensors.items()}
    f = factors(update["layers.linear0.weight"])
    q, _ = basis(f, widened(f, f.left.new_zeros(0, 4), "annealed", 64, stream(0, "a")))
    hidden = model.layers[0](model.normalise(images).flatten(1)).requires_grad_()
    output = model.layers[1:](hidden)
    truth = torch.autograd.grad(torch.nn.functional.cross_entropy(output, labels), hidden)[0]
    cosine = torch.nn.functional.cosine_similarity((q @ f.left.T)[:, None], truth[None], dim=2)
    assert torch.allclose(cosine.abs().amax(0), torch.ones(4).double(), atol=1e-12)
    silent = (truth == 0)[:, f.alive].sum(1)
    assert torch.equal(zeros(f, q).sum(1).sort().values, silent.sort().values)


def test_a_swap_mends_a_basis_with_a_mixture_in_it():
    """Stage two on factors made by hand: 3 sparse columns, one replaced by a mixture."""
    rng = stream(0, "by hand")
    d = torch.randn(40, 3, generator=rng).double() * (torch.rand(40, 3, generator=rng) < 0.5)
    f = factors(d @ torch.randn(3, 50, generator=rng).double())
    true = torch.nn.functional.normalize((f.left.T @ d).T)

    def score(q):
        same = (q @ true.T).abs() > 1 - 1e-9
        return same.any(2).double()

    mixture = torch.nn.functional.normalize(true[:1] + true[1:2])
    mended = swapped(torch.cat([mixture, true[1:]]), true[:1], score)
    assert score(mended[None]).min() == 1
    assert (inputs(f, mended[None], d.sum(1))[0] @ f.left.T @ d).allclose(
        torch.eye(3).double()[(mended @ true.T).abs().argmax(1)], atol=1e-9
    )


def test_drawn_kernels_silence_the_drawn_neurons():
    rng = stream(0, "kernels")
    f = factors(
        torch.randn(30, 4, generator=rng).double() @ torch.randn(4, 9, generator=rng).double()
    )
    q = sampled(f, 16, rng)
    assert (zeros(f, q).sum(1) == 3).all()
    assert len(refined(f, q)) == 0, "three zeros are what any direction has"


# ---- not found ----------------------------------------------------------------------------------


def noisy(update):
    for t in update.tensors.values():
        t += 1e-6 * t.std() * torch.randn(t.shape, generator=stream(0, "noise")).to(t)


def pruned(update):
    for t in update.tensors.values():
        t[t.abs() < t.abs().flatten().quantile(0.5)] = 0


def dead(update):
    for t in update.tensors.values():
        t.zero_()


def not_finite(update):
    update.tensors["layers.linear3.weight"][0, 0, 0] = torch.nan


def unrelated_bias(update):
    update.tensors["layers.linear0.bias"] = torch.rand(1, 200, dtype=torch.float64)


@pytest.mark.parametrize("spoil", [noisy, pruned, dead, not_finite, unrelated_bias])
def test_a_spoiled_update_ends_with_nothing(photos, spoil):
    seen, _, _ = observed(photos, 4)
    spoil(seen.update)
    assert_not_found(run(seen, replace(ATTACK, starts=16)))


def assert_exact_or_grey(found, images, within=1e-6):
    """`within`: distance over all pixels."""
    grey = (found.images[0] == 0.5).flatten(1).all(1)
    assert torch.equal(grey, found.labels[0] == -1)
    best = torch.cdist(found.images[0][~grey].flatten(1), images.flatten(1)).amin(1)
    assert (best < within).all()
    assert bool(found.flags[0]) == bool(grey.any())


def test_of_several_local_steps_only_what_no_step_changed_is_believed(photos):
    """The update is still of the images' rank, but its zeros are those of all steps together."""
    seen, images, _ = observed(photos, 4, local=Local("fedavg", 0.1, 4, 2))
    found = run(seen, replace(ATTACK, starts=32))
    assert_exact_or_grey(found, images)
    assert found.flags[0], "not all"


def test_more_images_than_the_layer_can_tell_apart_end_with_nothing(photos):
    seen, _, _ = observed(photos, 24, spec=MLPSpec(hidden=(32, 32)))
    assert_not_found(run(seen, replace(ATTACK, starts=16)))


def test_what_is_returned_is_exact_or_grey_where_the_search_is_too_short(photos):
    seen, images, _ = observed(photos, 20)
    for starts in (3, 6, 8):
        assert_exact_or_grey(run(seen, replace(ATTACK, starts=starts)), images)


def test_an_image_that_is_in_the_batch_twice_is_found_once(photos):
    def twice(images, targets):
        return images[[0, 1, 2, 2]], targets[[0, 1, 2, 2]]

    seen, images, _ = observed(photos, 4, change=twice)
    found = run(seen)
    assert exactness(found, images).topk(3).values.min() >= 200
    assert (found.images[0, 3] == 0.5).all()
    assert found.flags == (("spear found 3 of 4 images; the rest are grey",),)


def test_models_without_a_linear_layer_and_relu_are_refused():
    for spec in (LeNetSpec(), MLPSpec(hidden=()), MLPSpec(hidden=(8,), norm="batch")):
        model = spec.build((3, 16, 16), 10, (0.5,) * 3, (0.2,) * 3, stream(0, "model"))
        with pytest.raises(Refused, match="^model: attack=spear needs a fully connected first"):
            ATTACK.check(model)
    ATTACK.check(MLP.build((3, 16, 16), 10, (0.5,) * 3, (0.2,) * 3, stream(0, "model")))


@pytest.mark.parametrize(
    "claim", [c for c in CLAIMS if c.data == "photos"], ids=lambda c: c.setting
)
def test_the_claims_hold(photos, claim):
    measured = claim.measure(photos)
    print(claim.setting, measured, claim.unit)
    assert claim.least <= measured <= claim.most


@pytest.mark.skipif(not CIFAR.exists(), reason="FEDSEC_DATA names no folder with cifar10.npz")
@pytest.mark.slow
def test_the_claims_on_cifar_hold():
    images = Npz(path=str(CIFAR)).load()
    for claim in (c for c in CLAIMS if c.data == "cifar10"):
        assert claim.least <= claim.measure(images) <= claim.most


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whatever_is_believed_is_right_where_images_are_alike(photos, dtype):
    """24 patches of ten photographs: some are so alike that the search ends without them."""
    for first in (0, 60, 120):
        seen, images, _ = observed(photos, 24, dtype, first=first)
        assert_exact_or_grey(run(seen), images, within=1e-10 if dtype == torch.float64 else 1e-2)

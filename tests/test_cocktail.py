"""ICA on a linear layer's gradient, against whitening alone and against known mixtures."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from attacks.cocktail import Cocktail
from fedsec.checks import Refused
from fedsec.data import Photos
from fedsec.engine import simulate
from fedsec.ica import cocktail, lengthened, likelihood, minimised, whitened
from fedsec.match import match
from fedsec.metrics import psnr
from fedsec.models import LeNetSpec, Normalise
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.cocktail import CLAIMS, mixed, told_apart

EDGES = Cocktail(rule="edges", steps=200, tv=10.0, apart=0.1)


@pytest.fixture(scope="module")
def photos():
    return Photos().load()


def run(seen, attack=EDGES):
    return attack(seen, [stream(0, "attack")], lambda *_: None)


def test_one_image_is_exact(photos):
    """A gradient of rank one is a multiple of the input, and the bias's gradient is the multiple's
    length: only single precision's rounding is left."""
    seen, images = mixed(photos, 1)
    found = run(seen)
    assert psnr(found.images[0], images, cap=torch.inf) >= 120
    assert found.loss[0] < 1e-5


def test_sixteen_photographs_are_told_apart_where_whitening_tells_none(photos):
    seen, images = mixed(photos, 16)
    found = run(seen)
    share = told_apart(found.images[0], images)
    rows = seen.update.tensors["layers.linear0.weight"][0].double()
    white = torch.linalg.svd(rows, full_matrices=False)[2][:16].reshape(images.shape)
    print(share, told_apart(white, images))
    assert told_apart(white, images) <= 0.1
    assert share >= 0.8
    scores = psnr(found.images[0][match(found.images[0], images)], images)
    grey = psnr(torch.full_like(images, 0.5), images)
    print(scores.mean(), grey.mean())
    assert scores.mean() >= grey.mean() + 12


@pytest.mark.slow
def test_the_papers_contrast_beats_whitening_too(photos):
    """Its minima depend on the start: 0.19 to 0.38 measured, against 0.06."""
    seen, images = mixed(photos, 16)
    found = run(seen, replace(EDGES, rule="pixels"))
    rows = seen.update.tensors["layers.linear0.weight"][0].double()
    white = torch.linalg.svd(rows, full_matrices=False)[2][:16].reshape(images.shape)
    assert told_apart(found.images[0], images) > told_apart(white, images)


def test_the_papers_contrast_is_its_formula():
    rng = stream(0, "formula")
    white = torch.randn(3, 1, 4, 4, generator=rng).double()
    u = F.normalize(torch.randn(3, 3, generator=rng).double())
    value = 0.0
    for i in range(3):
        image = u[i, 0] * white[0, 0] + u[i, 1] * white[1, 0] + u[i, 2] * white[2, 0]
        value -= float(image.cosh().log().square().mean()) / 3
        value += 2 * float((image[1:] - image[:-1]).abs().mean()) / 3
        value += 2 * float((image[:, 1:] - image[:, :-1]).abs().mean()) / 3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        value += 0.5 * float((5 * (u[i] @ u[j]).abs()).exp()) / 3
    assert float(cocktail(white, 7 * u, tv=2.0, apart=0.5)) == pytest.approx(value)


def test_the_likelihood_unmixes_independent_heavy_tails():
    """Sources of the very density that is assumed: every unmixing row times the mixing is one of
    the unit vectors, up to sign and length, as far as 4,000 samples say."""
    rng = stream(0, "ica")
    sources = torch.randn(6, 4000, generator=rng).double()
    sources = sources / torch.randn(6, 4000, generator=rng).double().abs().clamp_min(0.2)
    mixing = torch.randn(6, 6, generator=rng).double()
    whiten, white = whitened(mixing @ sources)
    unmixing, _ = minimised(lambda u: likelihood(white, u), torch.eye(6).double(), 200)
    share = F.normalize(unmixing @ whiten @ mixing).abs()
    assert (share.amax(1) > 0.998).all()
    assert len(share.argmax(1).unique()) == 6


def test_images_of_a_noisy_update_are_still_told_apart(photos):
    """Unlike exact attacks: noise of a hundredth of the gradient's deviation changes little."""
    seen, images = mixed(photos, 16)
    for t in seen.update.tensors.values():
        t += 0.01 * t.std() * torch.randn(t.shape, generator=stream(0, "noise"))
    assert told_apart(run(seen).images[0], images) >= 0.5


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_an_update_that_says_nothing_ends_with_grey(photos, value):
    seen, _ = mixed(photos, 2)
    for t in seen.update.tensors.values():
        t.fill_(value)
    found = run(seen)
    assert (found.images == 0.5).all()
    assert (found.labels == -1).all()
    assert found.loss == 1
    assert "cocktail found no image" in found.flags[0][0]


def test_a_constant_image_has_no_edges_and_is_exact_all_the_same(photos):
    seen, _ = mixed(photos, 1)
    model, flat = seen.model, torch.full((1, 3, 32, 32), 0.25)
    targets = torch.eye(10)[:1]
    update = simulate(model, flat, targets, Local(kind="gradient", lr=1.0))
    for k, t in update.items():
        seen.update.tensors[k][0] = t
    assert psnr(run(seen).images[0], flat, cap=torch.inf) >= 120


def test_an_image_of_unknown_length_is_stretched_and_flagged():
    x = torch.tensor([[1.0, 2.0, 3.0, 5.0], [-0.1, 0.1, 0.2, 0.3], [-1.0, -2.0, -3.0, -5.0]])
    found, believed = lengthened(
        x.double(), torch.tensor([0.001, 1.0, -0.001]).double(), Normalise([0.5], [1.0]), (1, 2, 2)
    )
    assert believed == 1
    assert found[0].flatten().tolist() == pytest.approx([0, 0.25, 0.5, 1])
    assert found[1].flatten().tolist() == pytest.approx([0.4, 0.6, 0.7, 0.8])
    assert torch.equal(found[2], found[0]), "its sign is that of its sum"


def test_models_without_a_first_linear_layer_are_refused():
    model = LeNetSpec().build((3, 16, 16), 10, (0.5,) * 3, (0.2,) * 3, stream(0, "model"))
    with pytest.raises(Refused, match="^model: attack=cocktail needs a fully connected first"):
        EDGES.check(model)


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.setting)
def test_the_claims_hold(photos, claim):
    measured = claim.measure(photos)
    print(claim.setting, measured, claim.unit)
    assert claim.least <= measured <= claim.most

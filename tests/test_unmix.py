"""Mixing defenses solved for their sources: exactly where that can be, and said where it cannot."""

import itertools

import pytest
import torch
from test_attacks import nothing, rngs
from torch.nn import functional as F

from attacks.unmix import EXACT, Unmix
from defenses.instahide import InstaHide
from defenses.mixup import Mixup, mixing
from fedsec import engine, metrics, unmix
from fedsec.checks import Refused
from fedsec.client import client_streams, joined, local_update
from fedsec.data import Photos
from fedsec.defense import Compose, Defense
from fedsec.match import match
from fedsec.models import LeNetSpec, MLPSpec
from fedsec.rng import stream
from fedsec.threat import ThreatModel
from fedsec.types import Batch, Exchange, Local
from fedsec.verify import unmix as verify

ATTACK = Unmix(steps=4, lr=0.5, tv=0.003, smooth=0.01, starts=8)
MIXUP, HIDE = (kind(k=2, upper=0.65) for kind in (Mixup, InstaHide))
SERVER = ("model", "update", "count", "shape", "data_range", "local", "defense")
UPPER = (*SERVER, "labels", "mixing")


@pytest.fixture(scope="module")
def photos():
    return Photos().load()


def batch_of(dataset, first=0, count=4, distinct=False):
    rows = [(53 * (first * count + i)) % len(dataset.test) for i in range(count)]
    batch = dataset.test.batch(rows, dataset.classes)
    labels = torch.arange(count) if distinct else batch.labels
    return Batch(batch.images, F.one_hot(labels, dataset.classes).float(), batch.index)


def decibels(guess, truth):
    return metrics.psnr(guess[match(guess, truth)], truth)


def encoded(images, k=2, draw=0):
    """True encodings and the weights that made them, in double."""
    weights = mixing(len(images), k, 0.65, stream(0, "weights", draw)).double()
    return (weights @ images.flatten(1).double()).view(images.shape), weights


def sent(dataset, defense, spec=None, victims=1, count=4, grants=SERVER, distinct=False):
    model = (spec or MLPSpec(hidden=(256,))).build(
        dataset.shape, dataset.classes, dataset.mean, dataset.std, stream(0, "model")
    )
    local, exchanges = Local("gradient", 0.1, 1, count), []
    for v in range(victims):
        batch = batch_of(dataset, v, count, distinct)
        streams = client_streams(0, v, 0, "probe")
        update, trained = local_update(model, [batch], defense, local, streams, count)
        one = Exchange(0, (v,), model, "train", update, batch, trained, local, defense)
        exchanges.append(one)
    return ThreatModel(grants=grants).observe(exchanges), exchanges


# ---- decoding true encodings --------------------------------------------------------------------


@pytest.mark.parametrize(("count", "k"), [(4, 2), (4, 4), (8, 4)])
def test_with_known_weights_mixup_is_exact(photos, count, k):
    """The twin is a general solver."""
    images = batch_of(photos, count=count).images
    encodings, weights = encoded(images, k)
    found = unmix.sources(encodings, weights)
    twin = torch.linalg.solve(weights, encodings.flatten(1)).view(images.shape)
    torch.testing.assert_close(found, twin.clamp(0, 1), atol=1e-9, rtol=0)
    assert metrics.psnr(found, images.double(), cap=torch.inf).min() > 200


@pytest.mark.parametrize(("count", "k"), [(4, 2), (4, 4), (8, 2)])
def test_without_weights_edges_tell_mixups_sources(photos, count, k):
    images = batch_of(photos, count=count).images
    encodings, _ = encoded(images, k)
    weights = unmix.separated(encodings, stream(0, "start"))
    assert decibels(encodings.float(), images).mean() < 18
    assert decibels(unmix.sources(encodings, weights).float(), images).mean() > 28


def test_the_separation_does_not_depend_on_the_weights(photos):
    """ICA is equivariant: another mix of the same sources gives the same sources."""
    images = batch_of(photos).images
    solved = []
    for draw in (0, 1):
        encodings, _ = encoded(images, draw=draw)
        solved.append(unmix.sources(encodings, unmix.separated(encodings, stream(0, "start"))))
    one, other = solved
    assert decibels(other.float(), one.float()).min() > 60


def test_permuted_pairings_fail(photos):
    images = batch_of(photos).images
    encodings, weights = encoded(images)
    wrong = unmix.sources(encodings, weights[torch.tensor([1, 2, 3, 0])]).float()
    assert decibels(wrong, images).mean() < 18
    again = (weights[torch.tensor([1, 2, 3, 0])] @ wrong.double().flatten(1)).view_as(encodings)
    assert (again - encodings).square().mean().sqrt() > 0.02, "re-mixing tells"


def test_with_known_weights_smoothness_finds_instahides_signs(photos):
    images = batch_of(photos, first=1).images
    encodings, weights = encoded(images)
    found, gflop = unmix.unsigned((encodings - 0.5).abs(), weights, 8)
    assert decibels(found.float(), images).mean() > 40
    assert gflop > 0
    wrong, _ = unmix.unsigned((encodings - 0.5).abs(), weights[[1, 2, 3, 0]], 2)
    assert decibels(wrong.float(), images).mean() < 20


def test_growing_finds_what_is_as_smooth_as_the_truth():
    """The twin tries every sign of every pixel, 4^6 of two sources of six pixels.

    Growing is greedy: it need not reach the least of them, and nothing can be below that.
    """
    weights = torch.tensor([[0.6, 0.4], [0.3, 0.7]], dtype=torch.float64)
    ramp = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
    truth = torch.stack([ramp, 0.9 - ramp.square()]).view(2, 1, 2, 3)
    mix = (weights @ (truth - 0.5).flatten(1)).abs()
    inverse = torch.linalg.inv(weights)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=2)), dtype=torch.float64)
    each = (inverse @ (signs[:, :, None] * mix)).permute(0, 2, 1)  # [pattern, pixel, source]
    chosen = torch.tensor(list(itertools.product(range(4), repeat=6)))
    x = each[chosen, torch.arange(6)].view(-1, 2, 3, 2)
    rough = x.diff(dim=1).abs().sum((1, 2, 3)) + x.diff(dim=2).abs().sum((1, 2, 3))
    rough += unmix.OUTSIDE * (x.abs() - 0.5).clamp_min(0).sum((1, 2, 3))
    found, _ = unmix.unsigned(mix.view(2, 1, 2, 3), weights, 2)
    y = (found - 0.5).permute(1, 2, 3, 0)
    mine = y.diff(dim=1).abs().sum() + y.diff(dim=2).abs().sum()
    of_truth = sum(truth.diff(dim=d).abs().sum() for d in (2, 3))
    assert rough.min() - 1e-9 <= mine <= of_truth + 1e-9
    assert mine < rough.quantile(0.01)


def test_labels_tell_the_weights_where_all_classes_differ():
    weights = mixing(4, 3, 0.65, stream(0, "weights"))
    told = unmix.told(weights @ torch.eye(10)[[7, 2, 9, 4]])
    assert told is not None
    torch.testing.assert_close(told, weights[:, [1, 3, 0, 2]].double())  # by class
    assert unmix.told(weights @ torch.eye(10)[[7, 2, 2, 4]]) is None


def test_exact_encodings_tell_their_mixed_labels(photos):
    seen, (one,) = sent(photos, MIXUP)
    tensors = {k: t[0] for k, t in seen.update.tensors.items()}
    told = unmix.mixed_labels(seen.model, one.trained.images, tensors, seen.local)
    torch.testing.assert_close(told, one.trained.targets, atol=1e-3, rtol=0)


# ---- from updates -------------------------------------------------------------------------------


def test_mixup_gives_every_image_away_where_encodings_are_exact(photos):
    """No label and no weight is known: 43 to 80 dB measured, 13 to 18 for the encodings."""
    seen, exchanges = sent(photos, MIXUP, victims=2)
    found = ATTACK(seen, rngs(2), nothing)
    for v, one in enumerate(exchanges):
        assert decibels(one.trained.images, one.batch.images).mean() < 18
        assert decibels(found.images[v], one.batch.images).mean() > 35
        assert sorted(found.labels[v].tolist()) == sorted(one.batch.labels.tolist())
    assert found.flags == ((), ())


def test_true_pairings_are_an_upper_bound(photos):
    seen, (one,) = sent(photos, MIXUP, grants=UPPER)
    found = ATTACK(seen, rngs(1), nothing)
    spear = EXACT(seen, rngs(1), nothing).images[0]
    spear = spear[match(spear, one.trained.images)]
    amplified = torch.linalg.matrix_norm(torch.linalg.inv(one.trained.mix), 2)
    worst = amplified * (spear - one.trained.images).norm()
    assert (found.images[0] - one.batch.images).norm() <= 1.01 * worst, "in the private order"
    assert worst < 0.02 * one.batch.images.norm()
    assert torch.equal(found.labels[0], one.batch.labels)


def test_instahide_gives_images_away_where_classes_differ(photos):
    seen, (one,) = sent(photos, HIDE, distinct=True)
    found = ATTACK(seen, rngs(1), nothing)
    assert decibels(found.images[0], one.batch.images).mean() > 30
    assert "negative" in found.flags[0][0]


def test_instahides_encodings_are_returned_where_nothing_tells_the_weights(photos):
    seen, (one,) = sent(photos, HIDE)
    assert len(one.batch.labels.unique()) < 4, "or the labels tell them"
    found = ATTACK(seen, rngs(1), nothing)
    assert decibels(found.images[0], one.trained.images).min() > 60
    assert "nothing tells" in found.flags[0][0]


def test_without_a_mixing_defense_it_matches_images(photos):
    seen, (one,) = sent(photos, Defense())
    found = ATTACK(seen, rngs(1), nothing)
    assert decibels(found.images[0], one.batch.images).min() > 60
    assert found.flags == ((),)


def test_two_defenses_that_mix_are_not_solved(photos):
    seen, _ = sent(photos, Compose((MIXUP, HIDE)))
    assert "no mixing that it can solve" in ATTACK(seen, rngs(1), nothing).flags[0][0]


def test_facts_count_as_read_only_where_they_are_used(photos):
    """Exact encodings need no data range, images that nobody mixed no weights."""
    for defense, spec, unread in (
        (MIXUP, None, ("data_range",)),
        (Defense(), LeNetSpec(), ("mixing",)),
        (MIXUP, LeNetSpec(), ()),
    ):
        seen, _ = sent(photos, defense, spec, grants=UPPER)
        ATTACK(seen, rngs(1), nothing)
        assert seen.unread == unread


def test_a_victims_result_does_not_depend_on_who_else_is_there(photos):
    grants = (*SERVER, "labels")
    both, _ = sent(photos, MIXUP, LeNetSpec(), victims=2, grants=grants)
    one, _ = sent(photos, MIXUP, LeNetSpec(), victims=1, grants=grants)
    joint, single = ATTACK(both, rngs(2), nothing), ATTACK(one, rngs(1), nothing)
    assert torch.equal(joint.images[0], single.images[0])
    assert joint.gflop[0] == pytest.approx(float(single.gflop[0]))


def test_a_model_through_weights_has_the_update_of_the_mixed_images(photos):
    """The twin mixes first."""
    batch, (_, weights) = batch_of(photos), encoded(batch_of(photos).images)
    model = LeNetSpec().build(photos.shape, 10, photos.mean, photos.std, stream(0, "model"))
    local, mixed = Local("gradient", 1.0), weights.float() @ batch.targets
    images = (weights.float() @ batch.images.flatten(1)).view_as(batch.images)
    twin = engine.simulate(model, images, mixed, local)
    found = engine.simulate(unmix.Through(model, weights), batch.images, mixed, local)
    for name, tensor in twin.items():
        torch.testing.assert_close(found[f"model.{name}"], tensor)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("starts", 0), ("tv", -1.0), ("smooth", -1.0), ("lr", 0.0)]
)
def test_bad_values_are_refused(key, value):
    with pytest.raises(Refused, match=f"^{key}: "):
        Unmix(**(vars(ATTACK) | {key: value}))


# ---- the fact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [MIXUP, Compose((MIXUP, Mixup(k=3, upper=0.5)))])
def test_the_weights_of_a_batch_are_those_that_made_it(photos, defense):
    batch = batch_of(photos)
    mixed = defense.batch(batch, stream(0, "defense"))
    assert mixed.mix is not None
    torch.testing.assert_close(mixed.targets, mixed.mix @ batch.targets)
    again = (mixed.mix @ batch.images.flatten(1)).view_as(batch.images)
    torch.testing.assert_close(mixed.images, again)
    assert mixed.to("cpu").mix is not None


def test_joined_batches_mix_apart(photos):
    parts = [MIXUP.batch(batch_of(photos, v), stream(v, "defense")) for v in range(2)]
    whole = joined(parts)
    assert whole.mix is not None
    assert torch.equal(whole.mix, torch.block_diag(*(p.mix for p in parts)))
    assert joined([batch_of(photos)]).mix is None


def test_the_fact_is_the_weights_and_one_without_a_mix(photos):
    seen, (one,) = sent(photos, MIXUP, grants=("mixing",))
    assert torch.equal(seen.mixing[0], one.trained.mix)
    seen.mixing.fill_(7)
    assert one.trained.mix.max() < 1, "a copy"
    assert torch.equal(sent(photos, Defense(), grants=("mixing",))[0].mixing[0], torch.eye(4))


@pytest.mark.slow
@pytest.mark.parametrize("claim", verify.CLAIMS, ids=lambda c: c.setting)
def test_its_claims_hold(photos, claim):
    assert claim.least <= claim.measure(photos) <= claim.most

"""Soteria hides the features that say most about the image, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from test_defenses import DP, Scaled, batch_of, flat

from defenses.dpsgd import DPSGD
from defenses.noise import Noise
from defenses.prune import Prune
from defenses.soteria import Soteria, _features
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_gradient
from fedsec.defense import Compose, Defense
from fedsec.models import ConvNetSpec
from fedsec.rng import stream
from fedsec.types import Batch, Local, Update

RATIO, FEATURES = 0.3, 64
LOCAL = Local("gradient", 0.1, 1, 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaled().double()


def one_by_one(model: Scaled, batch: Batch) -> torch.Tensor:
    """|r_i| / |d r_i / d x| averaged over the images, a backward pass for each feature."""
    scores = torch.zeros(len(batch), FEATURES, dtype=torch.float64)
    for n, image in enumerate(batch.images):
        x = image[None].clone().requires_grad_()
        r = torch.sigmoid(model.norm(model.conv(x))).flatten()
        for i in range(FEATURES):
            (row,) = torch.autograd.grad(r[i], x, retain_graph=True)
            scores[n, i] = r[i].detach().abs() / row.norm()
    return scores.mean(0)


def hides_what_says_most(defense: Defense, model: Scaled, batch: Batch) -> bool:
    """The floor(ratio d) columns of the greatest exact scores are zero, up to the estimate's error;
    everything else is as it was."""
    plain = mean_gradient(model, batch)
    sent = defense.perturb(model, batch, plain, 0, stream(0))
    hidden = ~sent["linear.weight"].any(0)
    kept = torch.equal(sent["linear.weight"][:, ~hidden], plain["linear.weight"][:, ~hidden])
    others = all(torch.equal(sent[k], plain[k]) for k in plain if k != "linear.weight")
    exact = one_by_one(model, batch)
    count = math.floor(RATIO * FEATURES)
    right = exact[hidden].sum() > 0.99 * exact.topk(count).values.sum()
    return bool(kept and others and right and hidden.sum() == count)


class Least(Soteria):
    def scores(self, model, images):
        return -super().scores(model, images)


class ForgetsTheJacobian(Soteria):
    def scores(self, model, images):
        return _features(model, images).detach().abs()


class Rows(Soteria):
    def perturb(self, model, batch, gradient, step, rng):
        sent = gradient["linear.weight"].clone()
        sent[:1] = 0
        return gradient | {"linear.weight": sent}


class HidesTheBias(Soteria):
    def perturb(self, model, batch, gradient, step, rng):
        bias = torch.zeros_like(gradient["linear.bias"])
        return super().perturb(model, batch, gradient, step, rng) | {"linear.bias": bias}


def test_the_features_that_say_most_are_hidden(model):
    assert hides_what_says_most(Soteria(ratio=RATIO, probes=1000), model, batch_of(3))
    for broken in (Least, ForgetsTheJacobian, Rows, HidesTheBias):
        assert not hides_what_says_most(broken(ratio=RATIO, probes=1000), model, batch_of(3))


def test_scores_are_those_of_the_exact_jacobian(model):
    batch, exact = batch_of(3), one_by_one(model, batch_of(3))
    many = Soteria(ratio=RATIO, probes=4000).scores(model, batch.images).mean(0)
    few = Soteria(ratio=RATIO, probes=32).scores(model, batch.images).mean(0)
    assert (many / exact - 1).abs().max() < 0.05
    assert 0.01 < (few / exact - 1).square().mean().sqrt() < 2 / math.sqrt(2 * 32)


def test_what_is_sent_is_hidden_and_leaves_running_statistics_alone():
    spec = ConvNetSpec(width=2)
    model = spec.build((3, 16, 16), 4, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    images = torch.rand(4, 3, 16, 16, generator=stream(0, "images"))
    batch = Batch(images, torch.eye(4))

    def sent(defense):
        return local_update(model, [batch], defense, LOCAL, client_streams(0, 0, 0), 4)[0]

    plain, hidden = sent(Defense()), sent(Soteria(ratio=0.5, probes=4))
    weight = hidden.tensors["model.linear.weight"]
    assert int((~weight.any(0)).sum()) >= weight.shape[1] // 2
    assert all(torch.equal(b, hidden.buffers[k]) for k, b in plain.buffers.items())
    mask = Soteria(ratio=0.5, probes=4).mask(hidden)
    for k, t in plain.tensors.items():
        assert torch.equal(hidden.tensors[k], t * mask[k])


def test_no_images_no_change(model):
    gradient = mean_gradient(model, batch_of(0))
    sent = Soteria(ratio=0.5, probes=2).perturb(model, batch_of(0), gradient, 0, stream(0))
    assert not flat(sent).any()


def test_it_composes_but_not_with_a_guarantee():
    soteria = Soteria(ratio=0.5, probes=2)
    update = Update({"w": torch.tensor([0.0, 1.0, 2.0, 3.0])}, {}, 1)
    both = Compose([soteria, Prune(ratio=0.5)])
    mask = both.mask(both.update(update, stream(0)))
    assert mask is not None
    assert mask["w"].tolist() == [False, False, True, True]
    assert Compose([soteria, Noise(std=1.0, distribution="gaussian")]).mask(update) is None
    with pytest.raises(Refused, match="no epsilon holds"):
        Compose([DPSGD(**DP), soteria])


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"ratio": 1.0, "probes": 1}, "ratio"), ({"ratio": math.nan, "probes": 1}, "ratio"),
     ({"ratio": 0.5, "probes": 0}, "probes")],
)  # fmt: skip
def test_values_out_of_range_are_refused(fields, key):
    with pytest.raises(Refused) as refusal:
        Soteria(**fields)
    assert refusal.value.key == key

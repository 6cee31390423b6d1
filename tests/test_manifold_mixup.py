"""Manifold mixup mixes states and targets alike, at every place as often."""

from __future__ import annotations

import math

import pytest
import torch
from test_defenses import DP, batch_of
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.dpsgd import DPSGD
from defenses.manifold_mixup import ManifoldMixup, places
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_gradient
from fedsec.defense import Compose
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ResNetSpec, ViTSpec
from fedsec.rng import stream
from fedsec.types import Local

LOCAL = Local("gradient", 0.1, 1, 0)
MIXUP = ManifoldMixup(alpha=2.0)


def built(spec, shape=(3, 16, 16)):
    return spec.build(shape, 3, (0.5,) * shape[0], (0.25,) * shape[0], stream(0, "model"))


def explicit(model, batch, weight, order, place):
    """LeNet's layers one after the other, with the states after `place` of them mixed."""
    states = model.normalise(batch.images)
    targets = weight * batch.targets + (1 - weight) * batch.targets[order]
    for layer in (0, 1, 2, 3):
        if layer == place:
            states = weight * states + (1 - weight) * states[order]
        if layer < 3:
            states = torch.sigmoid(model.body[2 * layer](states))
    loss = cross_entropy(model.fc[0](states.flatten(1)), targets)
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def mixes_alike(defense: ManifoldMixup, steps: int = 12) -> bool:
    model, batch, seen = built(LeNetSpec(), (2, 6, 6)).double(), batch_of(5), set()
    for step in range(steps):
        weight, order, place = MIXUP.drawn(5, 4, stream(0, step))
        right = explicit(model, batch, weight, order, place)
        sent = defense.gradients(model, batch, stream(0, step), 5)
        if not all(torch.allclose(sent[k], right[k], atol=1e-12) for k in right):
            return False
        seen.add(place)
    return seen == {0, 1, 2, 3}


class KeepsTargets(ManifoldMixup):
    def gradients(self, model, batch, rng, expected):
        weight, order, place = self.drawn(len(batch), len(places(model)), rng)
        mix = lambda *a: weight * a[2] + (1 - weight) * a[2][order]  # noqa: E731
        hook = places(model)[place].register_forward_hook(mix)
        grads = mean_gradient(model, batch)
        hook.remove()
        return grads


class InputOnly(ManifoldMixup):
    def drawn(self, n, places, rng):
        return *super().drawn(n, places, rng)[:2], 0


def test_states_and_targets_are_mixed_alike():
    assert mixes_alike(MIXUP)
    assert not mixes_alike(KeepsTargets(alpha=2.0))
    assert not mixes_alike(InputOnly(alpha=2.0))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_draws_are_beta_and_every_place_is_as_likely(alpha):
    defense, n = ManifoldMixup(alpha=alpha), 1500
    draws = [defense.drawn(4, 3, stream(0, i)) for i in range(n)]
    weights = torch.tensor([w for w, _, _ in draws], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(weights.mean() - 0.5) < 5 * math.sqrt(variance / n)
    assert abs(weights.var() / variance - 1) < 0.2
    often = torch.tensor([p for _, _, p in draws]).bincount() / n
    assert (often - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / n)
    orders = torch.stack([o for _, o, _ in draws])
    assert (orders == torch.arange(4)).double().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("spec", "count"),
    [(LeNetSpec(), 4), (ConvNetSpec(width=2), 11), (ConvNetSpec(width=2, norm="none"), 11),
     (MLPSpec(hidden=(8, 8)), 3), (ResNetSpec(depth=8), 4), (ViTSpec(width=8, depth=3), 4)],
)  # fmt: skip
def test_all_that_a_place_hands_on_is_mixed(spec, count):
    """With equal states everywhere else, half of each of two images gives the same logits."""
    model, images = built(spec).eval(), torch.rand(2, 3, 16, 16)
    found = places(model)
    assert len(found) == count
    for place in found:
        swap = place.register_forward_hook(lambda _, args, out: out.flip(0))
        with torch.no_grad():
            swapped = model(images)
        swap.remove()
        assert torch.allclose(swapped, model(images).flip(0), atol=1e-6)


def test_a_client_sends_it_and_leaves_no_hook():
    model, batch = built(LeNetSpec(), (2, 6, 6)).double(), batch_of(4)

    def sent(number):
        return local_update(model, [batch], MIXUP, LOCAL, client_streams(0, number, 0), 4)[0]

    first, again, other = sent(0), sent(0), sent(1)
    for k, t in first.tensors.items():
        assert torch.equal(t, again.tensors[k])
        assert not torch.equal(t, other.tensors[k])
    assert not any(m._forward_hooks for m in model.modules())


def test_what_cannot_be_mixed_is_refused():
    assert MIXUP.batch(batch_of(2), stream(0)).images.shape[0] == 2
    assert len(MIXUP.batch(batch_of(0), stream(0))) == 0
    model = built(LeNetSpec(), (2, 6, 6)).double()
    assert not any(g.any() for g in MIXUP.gradients(model, batch_of(0), stream(0), 4).values())
    with pytest.raises(Refused, match=r"^victim_batch: .* at least 2 images .*, got 1$"):
        MIXUP.batch(batch_of(1), stream(0))
    with pytest.raises(Refused, match=r"^model: "):
        MIXUP.check(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(Refused, match="at most one"):
        Compose([MIXUP, DPSGD(**DP)])
    for alpha in (0.0, math.inf, math.nan):
        with pytest.raises(Refused, match=r"^alpha: "):
            ManifoldMixup(alpha=alpha)

"""CENSOR sends an orthogonal gradient of the same length, the one after which the loss is least."""

from __future__ import annotations

import math

import pytest
import torch
from test_defenses import DP, Scaled, batch_of, flat
from torch.nn.functional import cross_entropy

from defenses.censor import Censor, nearest, orthogonal
from defenses.dpsgd import DPSGD
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_gradient
from fedsec.defense import Compose, Defense, matched
from fedsec.likelihood import Misfit
from fedsec.models import ConvNetSpec
from fedsec.rng import stream
from fedsec.types import Batch, Local

LOCAL = Local("gradient", 0.1, 1, 0)
CENSOR = Censor(trials=30, lr=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaled().double()


def loss_at(model, batch, direction, lr) -> float:
    """The loss after moving the weights for real."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for k, d in direction.items():
            named[k] -= lr * d
        loss = float(cross_entropy(model(batch.images), batch.targets))
        for k, d in direction.items():
            named[k] += lr * d
    return loss


def says_nothing_along(defense: Defense, model, batch) -> bool:
    """Each tensor is orthogonal to its gradient, and as long; its loss is among the least."""
    gradient = mean_gradient(model, batch)
    sent = defense.perturb(model, batch, gradient, 0, stream(0))
    for k, g in gradient.items():
        if g.numel() == 1:
            if sent[k].any():
                return False
            continue
        if abs((g * sent[k]).sum()) > 1e-12 * g.square().sum():
            return False
        if not math.isclose(g.norm(), sent[k].norm(), rel_tol=1e-9):
            return False
    others = [
        loss_at(model, batch, {k: orthogonal(g, stream(1, i)) for k, g in gradient.items()}, 0.1)
        for i in range(30)
    ]
    return sorted(others)[2] > loss_at(model, batch, sent, 0.1)  # the best of thirty draws


class DividesOnceTooFew(Censor):
    """As the authors' code."""

    def perturb(self, model, batch, gradient, step, rng):
        sent = {}
        for k, g in gradient.items():
            r = torch.randn(g.shape, generator=rng, dtype=g.dtype)
            r = r / r.norm()
            r = r - (r * g).sum() / g.norm() * g
            sent[k] = r / r.norm() * g.norm() if g.numel() > 1 else torch.zeros_like(g)
        return sent


class TakesTheLast(Censor):
    def loss_after(self, model, batch, direction):
        return -super().loss_after(model, batch, direction)


class Unscaled(Censor):
    def perturb(self, model, batch, gradient, step, rng):
        sent = super().perturb(model, batch, gradient, step, rng)
        return {k: 2 * t for k, t in sent.items()}


class OverAllTensors(Censor):
    def perturb(self, model, batch, gradient, step, rng):
        whole = orthogonal(flat(gradient), rng).split([g.numel() for g in gradient.values()])
        return {k: w.view_as(g) for (k, g), w in zip(gradient.items(), whole, strict=True)}


def test_what_is_sent_is_orthogonal_and_lowers_the_loss_most(model):
    assert says_nothing_along(CENSOR, model, batch_of(4))
    for broken in (DividesOnceTooFew, TakesTheLast, Unscaled, OverAllTensors):
        assert not says_nothing_along(broken(trials=30, lr=0.1), model, batch_of(4))


def test_the_loss_is_that_of_moved_weights(model):
    batch = batch_of(4)
    gradient = mean_gradient(model, batch)
    direction = {k: orthogonal(g, stream(0, k)) for k, g in gradient.items()}
    assert CENSOR.loss_after(model, batch, direction) == pytest.approx(
        loss_at(model, batch, direction, 0.1)
    )


@pytest.mark.parametrize("kind", ["gradient", "fedavg"])
def test_a_client_sends_it_and_its_running_statistics_stay(kind):
    spec = ConvNetSpec(width=2)
    model = spec.build((3, 16, 16), 4, (0.5,) * 3, (0.25,) * 3, stream(0, "model")).double()
    images = torch.rand(4, 3, 16, 16, generator=stream(0, "images")).double()
    batch, local = Batch(images, torch.eye(4).double()), Local(kind, 0.1, 1, 4)
    before = {k: t.clone() for k, t in model.state_dict().items()}

    def sent(defense):
        return local_update(model, [batch], defense, local, client_streams(0, 0, 0), 4)[0]

    plain, hidden = sent(Defense()), sent(CENSOR)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(torch.equal(b, hidden.buffers[k]) for k, b in plain.buffers.items())
    for k, t in plain.tensors.items():
        other = hidden.tensors[k]
        assert abs((t * other).sum()) < 1e-8 * t.square().sum() + 1e-20


def test_it_takes_no_images_and_no_gradient(model):
    empty = mean_gradient(model, batch_of(0))
    assert not flat(CENSOR.perturb(model, batch_of(0), empty, 0, stream(0))).any()
    assert not orthogonal(torch.zeros(5), stream(0)).any()
    assert orthogonal(torch.randn(1000), stream(0)).isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(Refused, match="no epsilon holds"):
        Compose([DPSGD(**DP), CENSOR])
    for fields, key in (({"trials": 0, "lr": 1.0}, "trials"), ({"trials": 1, "lr": 0.0}, "lr"),
                        ({"trials": 1, "lr": math.nan}, "lr")):  # fmt: skip
        with pytest.raises(Refused) as refusal:
            Censor(**fields)
        assert refusal.value.key == key


# What an adversary who knows it can still compare


@pytest.mark.parametrize("lr", [1.0, 0.05])
def test_the_private_gradient_explains_what_was_sent_and_another_does_not(model, lr):
    batch, other = batch_of(3), batch_of(3, seed=5)
    gradient, another = mean_gradient(model, batch), mean_gradient(model, other)
    sent = CENSOR.perturb(model, batch, gradient, 0, stream(0))
    scaled = [{k: lr * t for k, t in each.items()} for each in (gradient, another, sent)]
    misfit = Misfit(scaled[2], LOCAL, CENSOR)
    one, two = (float(misfit({k: t[None] for k, t in g.items()})) for g in scaled[:2])
    assert one < 1e-12
    assert two > 1e-3
    # the broken twin, which compares the gradient itself, prefers nobody
    naive = Misfit(scaled[2], LOCAL, None)
    assert float(naive({k: t[None] for k, t in scaled[0].items()})) > 0.9


def test_the_nearest_outcome_is_an_outcome_and_no_drawn_one_is_nearer():
    torch.manual_seed(0)
    gradient, sent = torch.randn(5, dtype=torch.double), torch.randn(5, dtype=torch.double)
    found = nearest(gradient, sent)
    assert abs(float(gradient @ found)) < 1e-12
    assert math.isclose(found.norm(), gradient.norm(), rel_tol=1e-12)
    drawn = [orthogonal(gradient, stream(3, i)) for i in range(2000)]
    assert min((d - sent).norm() for d in drawn) >= (found - sent).norm() - 1e-12
    assert not nearest(torch.ones(1), torch.ones(1)).any()


def test_a_match_of_pixels_does_not_go_through_it():
    assert matched(CENSOR, LOCAL) is None
    assert CENSOR.expected({"one": torch.ones(2)})["one"].equal(torch.ones(2))

"""Dropout drops where a client computes, anew for each image, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_defenses import batch_of
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.clip import Clip
from defenses.dropout import Drop, Dropout
from defenses.noise import Noise
from defenses.precode import Precode
from defenses.prune import Prune
from defenses.sign import Sign
from fedsec.checks import Refused
from fedsec.client import Gradient, client_streams, local_update, mean_gradient
from fedsec.data import Photos
from fedsec.defense import Compose, Defense
from fedsec.engine import judged, simulate, spectral
from fedsec.federation import Federation, Job, federate
from fedsec.models import MLPSpec, ViTSpec, drawing, norm_stats
from fedsec.rng import stream
from fedsec.threat import ThreatModel
from fedsec.types import Local

LOCAL = Local("gradient", 0.1, 1, 0)


def mlp(defense, norm="none"):
    spec = MLPSpec(hidden=(40, 30), norm=norm)
    model = spec.build((2, 6, 6), 3, (0.5,) * 2, (0.25,) * 2, stream(0, "model"))
    return defense.architecture(model, stream(0)).double()


def drops(defense: Dropout, rate: float) -> bool:
    """Hidden features reach their layers as torch.nn.Dropout's, and the gradients with them."""
    model, batch = mlp(defense), batch_of(5)
    twin = mlp(Dropout(rate=rate))
    for name, module in list(twin.named_modules()):
        if isinstance(module, Drop):
            twin.set_submodule(name, nn.Dropout(rate))
    torch.manual_seed(1)
    loss = cross_entropy(twin(batch.images), batch.targets)
    right = torch.autograd.grad(loss, list(twin.parameters()))
    torch.manual_seed(1)
    with drawing(model):
        sent = mean_gradient(model, batch)
    return all(torch.allclose(s, r) for s, r in zip(sent.values(), right, strict=True))


class OneMaskForAll(Drop):
    def forward(self, x):
        return x * super().forward(torch.ones_like(x[:1])) if self.draws else x


class Unscaled(Drop):
    def forward(self, x):
        return super().forward(x) * (1 - self.rate) if self.draws else x


class Broken(Dropout):
    kind = Drop

    def architecture(self, model, rng):
        model = super().architecture(model, rng)
        for module in model.modules():
            if isinstance(module, Drop):
                module.__class__ = self.kind
        return model


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_it_is_dropout(rate):
    assert drops(Dropout(rate=rate), rate)


def test_what_is_not_dropout_is_found():
    for kind in (OneMaskForAll, Unscaled):
        assert not drops(type("Broken", (Broken,), {"kind": kind})(rate=0.3), 0.3)
    assert not drops(Dropout(rate=0.4), 0.3)


def test_it_draws_for_a_client_and_for_nobody_else():
    defense, batch = Dropout(rate=0.5), batch_of(4)
    model = mlp(defense)

    def sent(model, number):
        return local_update(model, [batch], defense, LOCAL, client_streams(0, number, 0), 4)[0]

    for mode in (True, False):  # in eval mode, too
        first, again, other = (sent(model.train(mode), n) for n in (0, 0, 1))
        for k, t in first.tensors.items():
            assert torch.equal(t, again.tensors[k])
            assert not torch.equal(t, other.tensors[k])
    plain = MLPSpec(hidden=(40, 30)).build((2, 6, 6), 3, (0.5,) * 2, (0.25,) * 2,
                                           stream(0, "model")).double()  # fmt: skip
    assert torch.equal(model(batch.images), plain(batch.images))


def test_every_fully_connected_layer_but_the_images_is_behind_it():
    layers = [type(m) for m in mlp(Dropout(rate=0.5)).layers]
    assert layers.count(nn.Sequential) == 2
    assert layers[0] is nn.Linear
    vit = ViTSpec(width=8, depth=1, heads=2).build((3, 8, 8), 4, (0.5,) * 3, (0.25,) * 3, stream(0))
    vit = Dropout(rate=0.5).architecture(vit, stream(0))
    assert sum(isinstance(m, Drop) for m in vit.modules()) == 5
    assert vit(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    with pytest.raises(Refused, match=r"^model: .* for dropout, got Sequential$"):
        Dropout(rate=0.5).architecture(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), stream(0))


@pytest.mark.parametrize("order", [1, -1])
def test_it_composes_with_a_bottleneck(order):
    both = Compose([Dropout(rate=0.5), Precode(size=3, beta=0.1)][::order])
    model, batch = mlp(both), batch_of(4)
    sent = local_update(model, [batch], both, LOCAL, client_streams(0, 0, 0), 4)[0]
    mask = both.mask(sent)
    assert mask is not None
    assert {k for k, m in mask.items() if m.all()} == {k for k in mask if "precode" not in k}
    assert sum("precode" in k for k in mask) == 6


def test_batch_statistics_are_those_of_the_step_that_drew():
    """Statistics that an adversary is granted come from the very forward pass of the victim."""
    photos = Photos(size=16, per_class=4).load()
    split = Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2)
    job = Job(
        dataset=None, model=MLPSpec(hidden=(20, 20), norm="batch"), defense=Dropout(rate=0.5),
        client=Gradient(lr=0.1, batch=4), federation=split, clients=1, rounds=0, seed=0,
        attack_rounds=(0,), probes=((0, (0, 1, 2, 3)),),
    )  # fmt: skip
    (exchange,) = federate(job, photos, lambda *_: None).exchanges
    mean, var = exchange.norm_stats[1]  # behind a dropout
    n = len(exchange.batch)
    running = exchange.update.buffers["layers.norm1.running_var"]
    assert torch.allclose(exchange.update.buffers["layers.norm1.running_mean"], 0.1 * mean)
    assert torch.allclose(running, 0.9 + 0.1 * var * n / (n - 1))
    with torch.no_grad():
        without = norm_stats(exchange.model, exchange.batch.images)
    assert not torch.allclose(without[1][0], mean)


@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan])
def test_values_out_of_range_are_refused(rate):
    with pytest.raises(Refused) as refusal:
        replace(Dropout(rate=0.5), rate=rate)
    assert refusal.value.key == "rate"


# What a knowing adversary reads off an update


def explains(found: dict[str, torch.Tensor], model, batch, sent) -> bool:
    """Whether the batch causes the update that was sent if layers drew `found`."""
    drawn = {name: logits.sigmoid().round() for name, logits in found.items()}
    again = simulate(model, batch.images, batch.targets, LOCAL, None, drawn)
    return all(torch.allclose(again[k], sent[k], atol=1e-12) for k in sent)


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_one_images_draws_are_read_off_the_zero_columns(rate):
    defense = Dropout(rate=rate)
    model, batch = mlp(defense), batch_of(1)
    sent = local_update(model, [batch], defense, LOCAL, client_streams(0, 0, 0), 1)[0].tensors
    found = defense.hidden(model, sent, torch.zeros_like(batch.images))
    assert [tuple(t.shape) for t in found.values()] == [(1, 40), (1, 30)]
    assert explains(found, model, batch, sent)
    assert not explains({}, model, batch, sent)  # nobody's draws: nothing dropped
    other = {k: t.roll(1, -1) for k, t in found.items()}  # the broken twin: its neighbour's
    assert not explains(other, model, batch, sent)


def test_of_a_batch_only_what_all_images_lack_is_certain():
    defense = Dropout(rate=0.5)
    model, batch = mlp(defense), batch_of(4)
    sent = local_update(model, [batch], defense, LOCAL, client_streams(0, 0, 0), 4)[0].tensors
    for name, logits in defense.hidden(model, sent, torch.zeros_like(batch.images)).items():
        weight = sent[f"{name.removesuffix('drop.kept')}linear.weight"]
        dead = (weight == 0).all(0)
        assert dead.any()
        assert not dead.all()
        assert (logits[:, dead] < -10).all()
        chance = 0.5 / (1 - 0.5**4)  # of each image, given that one of the four has it
        assert torch.allclose(logits[:, ~dead].sigmoid(), torch.tensor(chance).to(logits))


def test_draws_are_told_only_where_no_other_part_makes_zeros_or_noise():
    defense = Dropout(rate=0.5)
    model, batch = mlp(defense), batch_of(1)
    sent = local_update(model, [batch], defense, LOCAL, client_streams(0, 0, 0), 1)[0].tensors
    alone = defense.hidden(model, sent, batch.images)

    def told(*others) -> dict[str, torch.Tensor]:
        return Compose((defense, *others)).hidden(model, sent, batch.images)

    assert told().keys() == told(Clip(norm=1.0)).keys() == alone.keys()
    assert not told(Prune(ratio=0.5, scope="tensor"))
    assert not told(Noise(std=0.1, distribution="gaussian"))
    assert not told(Sign(scale="mean"))
    assert not Defense().hidden(model, sent, batch.images)


def test_the_true_images_are_the_best_match_only_with_the_draws():
    """The search's objective, at the private image and at another."""
    photos = Photos(size=16, per_class=4).load()
    split = Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2)
    job = Job(
        dataset=None, model=MLPSpec(hidden=(20, 20), norm="none"), defense=Dropout(rate=0.5),
        client=Gradient(lr=0.1, batch=4), federation=split, clients=1, rounds=0, seed=0,
        attack_rounds=(0,), probes=((0, (0,)),),
    )  # fmt: skip
    (exchange,) = federate(job, photos, lambda *_: None).exchanges
    search = spectral(steps=1, lr=1.0, priors=())

    def at_truth(*more: str) -> float:
        grants = ("model", "update", "count", "shape", "labels", "local", *more)
        seen = ThreatModel(name="some", grants=grants).observe([exchange])
        return float(judged(seen, seen.labels, search, exchange.batch.images[None]))

    assert at_truth("defense") < 1e-5
    assert at_truth() > 0.1

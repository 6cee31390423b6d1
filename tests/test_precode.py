"""PRECODE's bottleneck draws where a client computes, has its price, and is known to everybody."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from test_defenses import DP, batch_of
from torch.nn.functional import cross_entropy

from defenses.clip import Clip
from defenses.dpsgd import DPSGD
from defenses.noise import Noise
from defenses.precode import BOTTLENECK, Bottleneck, Precode, priced
from defenses.prune import Prune
from fedsec import engine, likelihood
from fedsec.checks import Refused
from fedsec.client import Gradient, client_streams, local_update, mean_gradient
from fedsec.data import Photos
from fedsec.defense import Compose, Defense
from fedsec.federation import Federation, Job, Site, federate
from fedsec.likelihood import Misfit
from fedsec.models import LeNetSpec, drawing, last_linear
from fedsec.rng import stream
from fedsec.threat import ThreatModel
from fedsec.types import Batch, Local, Update

PRECODE = Precode(size=5, beta=0.1)
LOCAL = Local("gradient", 0.1, 1, 0)


def lenet(defense: Defense = PRECODE):
    model = LeNetSpec().build((2, 6, 6), 3, (0.5,) * 2, (0.25,) * 2, stream(0, "model"))
    return defense.architecture(model, stream(0, "defense")).double()


def explicit(model, batch: Batch, beta: float) -> dict[str, torch.Tensor]:
    """The gradient of cross entropy + beta KL, written out; draws come as in the model."""
    bottleneck = next(m for m in model.modules() if isinstance(m, Bottleneck))
    r = model.body(model.normalise(batch.images)).flatten(1)
    mean, s = bottleneck.encoder(r).split(bottleneck.decoder.in_features, 1)
    z = mean + torch.exp(s / 2) * torch.randn_like(mean)
    loss = cross_entropy(last_linear(model)[1](bottleneck.decoder(z)), batch.targets)
    normal = torch.distributions.Normal(mean, torch.exp(s / 2))
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = torch.distributions.kl_divergence(normal, standard).sum(1).mean()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss + beta * divergence, list(named.values()))
    return dict(zip(named, grads, strict=True))


def sends_its_loss(defense: Precode, beta: float, draws: bool = True) -> bool:
    model, batch = lenet(defense), batch_of(4)
    torch.manual_seed(3)
    right = explicit(model, batch, beta)
    torch.manual_seed(3)
    with drawing(model, draws):
        sent = mean_gradient(model, batch)
    return all(torch.allclose(sent[k], right[k], atol=1e-12) for k in right)


def test_the_gradient_is_that_of_the_papers_loss():
    assert sends_its_loss(PRECODE, 0.1)
    assert not sends_its_loss(replace(PRECODE, beta=0.0), 0.1)  # forgets the divergence
    assert not sends_its_loss(replace(PRECODE, beta=0.1 / 4), 0.1)  # divides it twice
    assert not sends_its_loss(PRECODE, 0.1, draws=False)


def test_it_draws_for_a_client_and_for_nobody_else():
    model, batch = lenet(), batch_of(4)

    def sent(number: int) -> Update:
        return local_update(model, [batch], PRECODE, LOCAL, client_streams(0, number, 0), 4)[0]

    first, again, other = sent(0), sent(0), sent(1)
    mask = PRECODE.mask(first)
    for k, t in first.tensors.items():
        assert torch.equal(t, again.tensors[k])
        assert not torch.equal(t, other.tensors[k])
        assert mask[k].all() == k.startswith("body.")
        assert mask[k].any() == mask[k].all()
    assert torch.equal(model(batch.images), model(batch.images))
    plain = mean_gradient(model, batch)
    simulated = engine.simulate(model, batch.images, batch.targets, LOCAL)
    for k, t in plain.items():
        assert torch.allclose(simulated[k], t, atol=1e-12)
        assert not torch.allclose(first.tensors[k], t, atol=1e-6)


def test_each_example_has_draws_of_its_own_under_dpsgd():
    model, one = lenet(), batch_of(1)
    twice = Batch(one.images.repeat(2, 1, 1, 1), one.targets.repeat(2, 1))
    defense = Compose([PRECODE, DPSGD(**DP | {"clip": 1e6, "noise_multiplier": 0.0})])
    defense.check(model)
    torch.manual_seed(0)
    with drawing(model):
        sent = defense.gradients(model, twice, stream(0), 2)["fc.0.precode_output.weight"]
        torch.manual_seed(0)
        alone = defense.gradients(model, one, stream(0), 1)["fc.0.precode_output.weight"]
    assert not torch.allclose(sent, alone, rtol=1e-3)


@pytest.fixture(scope="module")
def photos():
    return Photos(size=16, per_class=4).load()


def job(defense: Defense) -> Job:
    split = Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2)
    return Job(
        dataset=None, model=LeNetSpec(), client=Gradient(lr=0.1, batch=4), federation=split,
        defense=defense, clients=2, rounds=1, seed=0, attack_rounds=(0, 1),
        probes=((0, (0,)), (1, (1,))),
    )  # fmt: skip


def test_server_clients_and_attack_have_one_architecture(photos):
    plain, defended = Site(job(Defense()), photos).model, Site(job(PRECODE), photos).model
    names = [k.replace("precode_output.", "") for k in defended.state_dict()]
    assert [k for k in names if "bottleneck" not in k] == [k for k, _ in plain.named_parameters()]
    done = federate(job(PRECODE), photos, lambda *_: None)
    threat = ThreatModel(grants=("model", "update", "count", "shape", "defense"))
    assert [e.round for e in done.exchanges] == [0, 0, 1, 1]
    for exchange in done.exchanges:
        seen = threat.observe([exchange])
        assert seen.model.state_dict().keys() == defended.state_dict().keys()
        assert seen.update.tensors.keys() == dict(defended.named_parameters()).keys()
    assert done.model.state_dict().keys() == defended.state_dict().keys()


def test_lengths_are_compared_before_layers_are_left_out():
    """The order of the two is nothing to the client, and so to who knows them."""
    sent = {"conv": torch.full((100,), 0.01), f"{BOTTLENECK}.w": torch.full((100,), 0.2)}
    clean = {k: 50 * t for k, t in sent.items()}
    clip = Clip(norm=float(torch.cat(list(sent.values())).norm()))
    for parts in ((PRECODE, clip), (clip, PRECODE)):
        found = Compose(parts).expected(clean, sent)
        assert torch.allclose(found["conv"], sent["conv"])
        assert not found[f"{BOTTLENECK}.w"].any()


def test_its_price_has_no_tangent():
    value, price = torch.randn(3, 4), torch.tensor(2.0)
    moved = torch.func.jvp(priced, (value, price), (torch.ones(3, 4), torch.tensor(5.0)))
    assert torch.equal(moved[0], value)
    assert torch.equal(moved[1], torch.ones(3, 4))


def test_who_knows_it_compares_only_the_layers_before(photos):
    exchange = federate(job(PRECODE), photos, lambda *_: None).exchanges[0]
    changed = {k: t + 1 if "precode" in k else t for k, t in exchange.update.tensors.items()}
    other = replace(exchange, update=replace(exchange.update, tensors=changed))
    search = engine.spectral(steps=1, lr=1.0, priors=())

    def judged(e, *more: str) -> float:
        threat = ThreatModel(grants=("model", "update", "count", "shape", *more))
        seen = threat.observe([e])
        return float(engine.judged(seen, e.batch.targets[None], search, e.batch.images[None]))

    assert judged(exchange, "defense") == judged(other, "defense")
    assert judged(exchange, "defense") < judged(exchange) < judged(other)
    grey = {k: torch.zeros_like(t)[None] for k, t in exchange.update.tensors.items()}
    assert float(Misfit(exchange.update.tensors, LOCAL, PRECODE)(grey)) == pytest.approx(1)


def test_noise_and_pruning_leave_the_layers_masked():
    model, noise = lenet(), Noise(std=1.0, distribution="gaussian")
    update = local_update(model, [batch_of(4)], PRECODE, LOCAL, client_streams(0, 0, 0), 4)[0]
    alone = PRECODE.mask(update)
    for parts in ([PRECODE, noise], [Prune(ratio=0.5), PRECODE, noise], [noise, PRECODE]):
        mask = Compose(parts).mask(update)
        assert mask is not None
        assert all(torch.equal(mask[k], alone[k]) for k in alone)
    both = Compose([PRECODE, Prune(ratio=0.5)])
    sent = both.update(update, stream(0))
    mask = both.mask(sent)
    assert mask is not None
    assert all(torch.equal(mask[k], alone[k] & (t != 0)) for k, t in sent.tensors.items())


def test_who_does_not_know_it_can_attack_it(tmp_path):
    """In a process without type checks, which would keep a trace of the model from going inside."""
    naive = "threat.grants=[model,update,count,shape]"
    more = ("defense=precode", naive, "control=false", "rounds=0", "images=2")
    done = tiny.spawn(tiny.words(tmp_path, *more), tmp_path)
    assert done.wait() == 0, done.communicate()
    assert len(tiny.rows(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"size": 0, "beta": 0.1}, "size"), ({"size": 1, "beta": -0.1}, "beta"),
     ({"size": 1, "beta": math.nan}, "beta")],
)  # fmt: skip
def test_values_out_of_range_are_refused(fields, key):
    with pytest.raises(Refused) as refusal:
        Precode(**fields)
    assert refusal.value.key == key


def test_behind_a_clip_candidates_are_compared_by_direction(monkeypatch):
    """The clip's length counts layers that drew, so that what is left has any length."""
    both = Compose((PRECODE, Clip(norm=0.1)))
    sent = {"one": torch.randn(40, generator=stream(0)), "precode_bottleneck.w": torch.ones(3)}
    other = torch.randn(40, generator=stream(1))
    clean = {"one": torch.stack([7 * sent["one"], other]), "precode_bottleneck.w": torch.ones(2, 3)}
    right, wrong = Misfit(sent, LOCAL, both)(clean).tolist()
    assert right < 1e-6
    assert wrong > 0.5
    monkeypatch.setattr(likelihood, "_lengthless", lambda _: False)  # the broken twin: by length
    unscaled, _ = Misfit(sent, LOCAL, both)(clean).tolist()
    assert unscaled > 0.5

"""Servers that tamper: the crafted model reaches the client, and leaks what it is meant to."""

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch import nn

from attacks.fishing import Fishing
from attacks.imprint import Imprint
from attacks.trap import Trap
from defenses.prune import Prune
from fedsec import cuts, neurons
from fedsec.attack import Attack, crafted
from fedsec.checks import Refused
from fedsec.client import FedAvg, Gradient, mean_gradient
from fedsec.data import Npz, Photos
from fedsec.defense import Defense
from fedsec.engine import simulate
from fedsec.federation import Federation, Job, federate
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, last_linear
from fedsec.rng import stream
from fedsec.threat import BEFOREHAND, ThreatModel, Withheld, admit
from fedsec.types import Batch, Exchange, Local, Update
from fedsec.verify import fishing, imprint, trap
from fedsec.verify.imprint import apart, drawn, probed

RNGS = [stream(0, "attack")]
GRADIENT = Local(kind="gradient", lr=1.0)
FISHING = {"steps": 20, "lr": 0.5, "tv": 0.003}


def nothing(step, steps, loss):
    pass


# ---- the federation -----------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Another architecture: the parameters have other names, and there is one more."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.gain = model, nn.Parameter(torch.tensor(1.5))

    def forward(self, images):
        return self.gain * self.model(images)


def craft(model, round):
    """Two models, the second of the same architecture with other weights."""
    first, second = Wrapped(deepcopy(model)), Wrapped(deepcopy(model))
    with torch.no_grad():
        second.gain += 1 + round
    return first, second


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Npz(path=str(tiny.npz(tmp_path_factory.mktemp("data"))))


def job(small, **changed) -> Job:
    engine = {"engine": "inline", "strategy": "fedavg", "split": "iid", "alpha": 0.5, "shards": 2}
    todo = Job(
        dataset=small, model=LeNetSpec(), client=Gradient(lr=0.1, batch=4),
        federation=Federation(**engine), defense=Defense(), clients=2, rounds=2, seed=0,
        attack_rounds=(1,), probes=((0, (0, 1)), (1, (2, 3))),
    )  # fmt: skip
    return replace(todo, **changed)


def by_hand(exchange: Exchange, model: nn.Module) -> dict:
    return mean_gradient(model, exchange.batch)


def test_probes_are_computed_on_the_crafted_models_and_training_is_not(small):
    data = small.load()
    honest = federate(job(small), data, lambda *_: None)
    run = federate(job(small), data, lambda *_: None, craft)
    for key, tensor in honest.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[key], tensor), "utility is untouched"
    for exchange, other in zip(run.exchanges, honest.exchanges, strict=True):
        assert exchange.batch.index == other.batch.index
        assert set(exchange.update.tensors) == {"gain"} | {
            f"model.{key}" for key in other.update.tensors
        }
        ((second, answer),) = exchange.queries
        for model, update in ((exchange.model, exchange.update), (second, answer)):
            for key, expected in by_hand(exchange, model).items():
                torch.testing.assert_close(update.tensors[key], expected)
        assert second.gain.item() == 3.5, "of round 1"
        assert torch.equal(exchange.model.model.fc[0].weight, other.model.fc[0].weight)


def test_a_crafted_model_goes_through_the_defense(small):
    run = federate(job(small, defense=Prune(ratio=0.9)), small.load(), lambda *_: None, craft)
    for key, tensor in run.exchanges[0].update.tensors.items():
        if tensor.numel() > 20:
            assert 0.88 < (tensor == 0).double().mean() < 0.95, key


def test_local_steps_start_from_the_crafted_model(small):
    client = FedAvg(lr=0.1, batch=2, steps=2)
    run = federate(job(small, client=client), small.load(), lambda *_: None, craft)
    exchange = run.exchanges[0]
    steps = Wrapped(exchange.model.model)
    steps.load_state_dict(exchange.model.state_dict())
    before = {k: p.detach().clone() for k, p in steps.named_parameters()}
    for _ in range(2):
        gradient = by_hand(exchange, steps)
        with torch.no_grad():
            for key, p in steps.named_parameters():
                p -= 0.1 * gradient[key]
    for key, p in steps.named_parameters():
        moved = before[key] - p.detach()
        torch.testing.assert_close(exchange.update.tensors[key], moved, atol=1e-6, rtol=1e-3)


def test_a_query_more_draws_its_own_noise(small):
    from defenses.noise import Noise

    twice = federate(
        job(small, defense=Noise(distribution="gaussian", std=1.0)), small.load(),
        lambda *_: None, lambda model, round: (deepcopy(model), deepcopy(model)),
    ).exchanges[0]  # fmt: skip
    ((_, answer),) = twice.queries
    first, second = (u.tensors["fc.0.weight"] for u in (twice.update, answer))
    assert (first - second).std() > 1, "two independent draws of deviation one"


@pytest.mark.slow
def test_ray_carries_the_crafted_models_too(small):
    ray = replace(job(small).federation, engine="ray")
    runs = [
        federate(job(small, **more), small.load(), lambda *_: None, craft)
        for more in ({}, {"federation": ray})
    ]
    for one, two in zip(*(run.exchanges for run in runs), strict=True):
        for (_, a), (_, b) in zip(one.queries, two.queries, strict=True):
            for key, tensor in a.tensors.items():
                torch.testing.assert_close(tensor, b.tensors[key])
        for key, tensor in one.update.tensors.items():
            torch.testing.assert_close(tensor, two.update.tensors[key])


# ---- the boundary -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curious(Attack):
    """Says what it knew."""

    needs = frozenset({"model"})

    def craft(self, model, known, rng):
        assert set(known.grants) <= set(BEFOREHAND)
        with pytest.raises(Withheld):
            _ = known.update
        return (model,)


def test_before_an_exchange_nothing_private_is_known():
    model = LeNetSpec().build((3, 16, 16), 4, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    blank = Batch(torch.zeros(2, 3, 16, 16), torch.zeros(2, 4))
    exchange = Exchange(
        0, (), model, "train", Update({}, {}, 0), blank, blank, Local("gradient", 1.0), Defense()
    )
    threat = ThreatModel(grants=("model", "update", "count", "labels", "local"), tampers=True)
    _, known = crafted(Curious(), threat, exchange, stream(0, "craft"))
    assert known.grants == ("count", "local")
    private = replace(exchange, batch=Batch(torch.ones(2, 3, 16, 16), torch.zeros(2, 4)))
    with pytest.raises(AssertionError):
        threat.foresee(private)


def test_tampering_is_admitted_where_the_threat_model_says_so():
    plain = ThreatModel(grants=("model", "update"), name="honest_server")
    evil = replace(plain, name="malicious_server", tampers=True)
    presets = {"honest_server": plain, "malicious_server": evil}
    admit("curious", Curious.needs, evil, presets, Curious().tampers)
    with pytest.raises(Refused) as told:
        admit("curious", Curious.needs, plain, presets, Curious().tampers)
    said = "threat: attack=curious replaces the model that the client gets; use "
    assert str(told.value).startswith(said + "threat=malicious_server, got honest_server")
    assert not Attack().tampers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("attack=imprint", "threat: attack=imprint replaces the model that the client gets; use "
         "threat=malicious_server, got honest_server"),
        ("attack=imprint threat=malicious_server victim_batch=same",
         "victim_batch: must be a number: attack=imprint replaces the model of probes"),
        ("attack=imprint threat=malicious_server client=fedavg client.steps=2",
         "client: attack=imprint reads a single gradient; use client=gradient or client.steps=1"),
        ("attack=trap threat=malicious_server", "model: attack=trap needs a fully connected"),
        ("attack=fishing threat=malicious_server model=convnet model.width=2",
         "model: attack=fishing needs images that do not change each other's gradients"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, words, said
):
    line = tiny.words(tmp_path, *words.split(), steps=0)
    assert tiny.call(monkeypatch, line) == 1
    (last,) = [x for x in capsys.readouterr().err.splitlines() if x]
    assert last.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_a_run_says_that_the_model_was_tampered_with(tmp_path, monkeypatch):
    words = ("attack=imprint", "threat=malicious_server", "victim_batch=4", "attack.bins=32")
    assert tiny.call(monkeypatch, tiny.words(tmp_path, *words, steps=0)) == 0
    told = [f for f in tiny.whole(tmp_path / "out")["flags"] if "replaced the model" in f]
    assert len(told) == 1
    assert "threat=malicious_server" in told[0]
    assert {row["threat"] for row in tiny.rows(tmp_path / "out")} == {"malicious_server"}


# ---- neurons ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos():
    return Photos().load()


def built(spec, photos, dtype=torch.float32):
    rng = stream(0, "model")
    return spec.build(photos.shape, photos.classes, photos.mean, photos.std, rng).to(dtype)


def doubled(batch: Batch) -> Batch:
    return Batch(batch.images.double(), batch.targets.double(), batch.index)


def test_an_images_own_gradient_is_that_of_autograd(photos):
    model, batch = (
        built(MLPSpec(hidden=(8, 6)), photos, torch.float64),
        doubled(drawn(photos, 3, 0)),
    )
    which = torch.tensor([0, 5, 7])
    own = neurons.own_gradients(model, "layers.linear0", batch.images, which)
    for i, neuron in enumerate(which):
        for label in range(photos.classes):
            one = Batch(batch.images[i : i + 1], torch.eye(10).double()[label][None])
            expected = mean_gradient(model, one)["layers.linear0.bias"][neuron]
            torch.testing.assert_close(own[i, label], expected)


def test_labels_that_are_certified_leave_the_others_to_what_was_recovered():
    assert neurons.all_labels([3, 1], [1, 1, 2, 3]) == [3, 1, 1, 2]
    assert neurons.all_labels([9], [1, 2]) == [9, 1]
    assert neurons.all_labels([], [1, 2]) == [1, 2]


# ---- imprint ------------------------------------------------------------------------------------


def test_imprint_finds_exactly_the_images_that_are_alone_in_their_bin(photos):
    attack, batch = Imprint(bins=32), doubled(drawn(photos, 16, 0))
    known = doubled(photos.test.batch(range(500), 10))
    seen = probed(attack, built(LeNetSpec(), photos, torch.float64), batch, known)
    found = attack(seen, RNGS, nothing)
    cut = -seen.model.bins.bias
    bins = (batch.images.flatten(1).mean(1)[:, None] > cut).sum(1)
    alone = (bins > 0) & ((bins[:, None] == bins).sum(1) == 1)
    exact = apart(found.images[0], batch.images) > 150
    assert 3 <= alone.sum() <= 13
    assert torch.equal(exact.any(0), alone)
    certified = int(found.flags[0][0].split()[0])
    assert certified == alone.sum()
    assert exact[:certified].any(1).all(), "certified images come first, and are exact"
    for i in range(certified):  # with their labels
        assert found.labels[0, i] == batch.labels[exact[i].nonzero()[0, 0]]


def test_an_imprinted_model_still_tells_images_apart(photos):
    model, batch = built(MLPSpec(hidden=(32,)), photos), drawn(photos, 64, 0)
    sent = probed(Imprint(bins=64), model, batch).model
    with torch.no_grad():
        before, after = model(batch.images), sent(batch.images)
    assert (before - after).std() < 0.5 * before.std()


def test_imprint_certifies_nothing_where_images_are_coupled(photos):
    attack, batch = Imprint(bins=16), drawn(photos, 4, 0)
    found = attack(probed(attack, built(ConvNetSpec(width=4), photos), batch), RNGS, nothing)
    assert found.flags[0][0].startswith("0 of 4 images drove a neuron alone")
    assert neurons.UNCERTAIN in found.flags[0]
    assert (apart(found.images[0], batch.images) > 60).any(), "exact all the same"


def test_imprint_says_not_found_of_an_update_of_noise(photos):
    attack, batch = Imprint(bins=16), drawn(photos, 4, 0)
    seen = probed(attack, built(LeNetSpec(), photos), batch)
    for tensor in seen.update.tensors.values():
        tensor.normal_(generator=stream(0, "noise"))
    found = attack(seen, RNGS, nothing)
    assert "4 were not found and are grey" in found.flags[0][0]
    assert (found.images == 0.5).all()
    assert found.loss.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("claim", [*imprint.CLAIMS, *trap.CLAIMS, *fishing.CLAIMS],
                         ids=lambda c: f"{c.attack} {c.unit}")  # fmt: skip
def test_claims_hold(photos, claim):
    assert claim.least <= claim.measure(photos) <= claim.most


# ---- trap ---------------------------------------------------------------------------------------


def test_trap_weights_see_pixels_and_are_half_negative(photos):
    model = built(MLPSpec(hidden=(64,)), photos)
    sent = probed(Trap(shrink=0.9), model, drawn(photos, 4, 0)).model
    layer, std = sent.layers[0], sent.normalise.std
    rows = (layer.weight.view(-1, *photos.shape) / std).flatten(1)
    assert ((rows < 0).sum(1) == rows.shape[1] // 2).all()
    assert ((rows > 0).sum(1) == rows.shape[1] // 2).all()
    grown = rows.clamp_min(0).sum(1) / -rows.clamp_max(0).sum(1)
    torch.testing.assert_close(grown, torch.full_like(grown, 0.9))
    black = sent.layers[0](sent.normalise(torch.zeros(1, *photos.shape)).flatten(1))
    assert black.abs().max() < 1e-4, "a black image drives nothing: weights act on pixels"


def test_trap_finds_exactly_the_images_that_fire_a_neuron_alone(photos):
    attack, batch = Trap(shrink=0.97), doubled(drawn(photos, 8, 1))
    seen = probed(attack, built(MLPSpec(hidden=(128, 32)), photos, torch.float64), batch)
    found = attack(seen, RNGS, nothing)
    fires = seen.model.layers[0](seen.model.normalise(batch.images).flatten(1)) > 0
    alone = fires[:, fires.sum(0) == 1].any(1)
    exact = apart(found.images[0], batch.images) > 150
    assert 1 <= alone.sum() <= 7
    assert torch.equal(exact.any(0), alone)
    assert int(found.flags[0][0].split()[0]) == alone.sum()


# ---- fishing ------------------------------------------------------------------------------------


def test_fishing_ends_on_four_images_that_collide_and_says_so(photos):
    attack, one = Fishing(queries=8, **FISHING), drawn(photos, 1, 0)
    four = Batch(one.images.repeat(4, 1, 1, 1), one.targets.repeat(4, 1), (0, 1, 2, 3))
    found = attack(probed(attack, built(LeNetSpec(), photos), four), RNGS, nothing)
    assert found.flags[0][0].startswith("0 of 4 images were fished")
    assert (found.images == 0.5).all()
    assert found.loss.isfinite().all()
    assert torch.equal(found.labels[0], one.labels.expand(4))


def test_fishing_isolates_what_lies_between_two_cuts(photos):
    attack, batch = Fishing(queries=8, **FISHING), doubled(drawn(photos, 6, 0))
    known = doubled(photos.test.batch(range(500), 10))
    model = built(LeNetSpec(), photos, torch.float64)
    seen = probed(attack, model, batch, known)
    fished = int(last_linear(seen.model)[1].weight.abs().sum(1).argmax())
    layers = [last_linear(m)[1] for m in (seen.model, *(m for m, _ in seen.queries))]
    assert len(layers) == 8
    logits = cuts.features(model, batch.images) @ layers[0].weight[fished]
    above = torch.stack([(logits + layer.bias[fished] > 0).sum() for layer in layers])
    assert above[0] == 0
    assert above[-1] == 6
    caught = cuts.caught(seen, 0, fished)
    assert len(caught) == (above.diff() == 1).sum() >= 1
    target = torch.eye(10).double()[fished][None]
    own = [simulate(seen.model, x[None], target, GRADIENT) for x in batch.images]
    for update in caught:  # that image's own gradient, a sixth of it
        assert any(
            all(torch.allclose(6 * update[k], one[k], rtol=1e-6, atol=1e-9) for k in one)
            for one in own
        )
    found = attack(seen, RNGS, nothing)
    assert torch.equal(found.labels[0], batch.labels.sort().values), "labels are exact"
    assert (found.images[0, len(caught) :] == 0.5).all()
    assert not (found.images[0, : len(caught)] == 0.5).flatten(1).all(1).any()


@pytest.mark.parametrize(("alike", "count"), [(1, 1), (2, 0)])
def test_one_query_fishes_a_class_that_has_one_image(photos, alike, count):
    attack, batch = Fishing(queries=1, **FISHING), drawn(photos, 6, 0)
    model = built(LeNetSpec(), photos)
    fished = int(last_linear(probed(attack, model, batch).model)[1].weight.abs().sum(1).argmax())
    labels = torch.tensor([fished] * alike + [(fished + 1) % 10] * (6 - alike))
    batch = replace(batch, targets=torch.eye(10)[labels])
    seen = probed(attack, model, batch)
    caught = cuts.caught(seen, 0, fished)
    assert len(caught) == count
    if caught:
        own = simulate(seen.model, batch.images[:1], torch.eye(10)[fished][None], GRADIENT)
        for key, tensor in own.items():
            torch.testing.assert_close(6 * caught[0][key], tensor, rtol=1e-3, atol=1e-3)

"""Flower against plain loops, the tap against what was sent, and failures that must be loud."""

import logging
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsec import flower
from fedsec.checks import Refused
from fedsec.client import (
    FedAvg,
    Gradient,
    client_streams,
    draw,
    joined,
    local_update,
    parameters,
    schedule,
)
from fedsec.data import Dataset, Split
from fedsec.defense import Defense
from fedsec.federation import (
    STRATEGIES,
    Average,
    ClientFailed,
    Federation,
    Job,
    accuracy,
    federate,
    load,
    shares,
)
from fedsec.models import BatchNorm2d
from fedsec.rng import stream
from fedsec.types import Batch, Exchange, Update

# Plain dataclasses at module level: a Ray worker unpickles them.


@dataclass(frozen=True)
class Blocks:
    """Tiny images whose brightness is their class."""

    size: int = 40

    def load(self) -> Dataset:
        rng = torch.Generator().manual_seed(0)
        labels = torch.arange(self.size) % 4
        images = torch.rand(self.size, 3, 6, 6, generator=rng) / 4 + labels.view(-1, 1, 1, 1) / 5
        split = Split(images, labels)
        return Dataset("blocks", split, split, 4, ("a", "b", "c", "d"))


@dataclass(frozen=True)
class Net:
    norm: bool = True
    mode: str = "train"

    def build(self, shape, classes, mean, std, rng) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            layers = [nn.Conv2d(3, 4, 3), BatchNorm2d(4) if self.norm else nn.Identity(), nn.ReLU()]
            model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, classes))
        return model.train(self.mode == "train")


@dataclass(frozen=True)
class Noise(Defense):
    """Noise on what is sent, and images that the loss sees upside down."""

    scale: float = 0.1

    def batch(self, batch, rng):
        return Batch(batch.images.flip(2), batch.targets, batch.index)

    def update(self, update, rng):
        noisy = {
            k: t + self.scale * torch.randn(t.shape, generator=rng)
            for k, t in update.tensors.items()
        }
        return Update(noisy, update.buffers, update.count)


@dataclass(frozen=True)
class Poisson(Defense):
    poisson = True


@dataclass(frozen=True)
class Careless(Defense):
    """Draws from the global generators, as layers and libraries do."""

    def batch(self, batch, rng):
        shift = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return Batch(batch.images * shift, batch.targets, batch.index)


@dataclass(frozen=True)
class Broken(Defense):
    """Fails on the client that draws image 3."""

    def gradients(self, model, batch, rng, expected):
        if 3 in batch.index:
            raise ArithmeticError("the third image is cursed")
        return super().gradients(model, batch, rng, expected)


DATA = Blocks().load()
INLINE = Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2)
GRADIENT = Gradient(lr=0.5, batch=5)
FEDAVG = FedAvg(lr=0.2, batch=5, steps=3)
PROBES = ((0, (1,)), (2, (5, 7)))


def job(**changes) -> Job:
    plain = Job(Blocks(), Net(), GRADIENT, INLINE, Defense(), 3, 3, 0, "cpu", (0, 2), PROBES)
    return replace(plain, **changes)


def run(of: Job, dataset: Dataset = DATA):
    return federate(of, dataset, lambda done, rounds: None)


def built(of: Job, dataset: Dataset = DATA) -> nn.Module:
    rng = stream(of.seed, "model")
    return of.model.build(dataset.shape, dataset.classes, dataset.mean, dataset.std, rng)


def plain_loop(of: Job, dataset: Dataset) -> list[dict[str, torch.Tensor]]:
    """FedSGD and FedAvg as the papers write them: the weights before each round, and the last."""
    model, held = built(of, dataset), shares(dataset, of.federation, of.clients, of.seed)
    rounds = []
    for r in range(of.rounds):
        rounds.append({k: v.clone() for k, v in model.state_dict().items()})
        new, total = {k: torch.zeros_like(v).double() for k, v in rounds[-1].items()}, 0
        for client in range(of.clients):
            model.load_state_dict(rounds[-1])
            steps = draw(of.client, held[client], r, client, of.seed, of.defense)
            optimizer = torch.optim.SGD(model.parameters(), lr=of.client.lr)
            for i in steps:
                optimizer.zero_grad()
                for layer in model.modules():
                    if isinstance(layer, BatchNorm2d):
                        layer.track = True
                F.cross_entropy(model(dataset.train.pixels[i]), dataset.train.labels[i]).backward()
                optimizer.step()
            count = sum(len(i) for i in steps)
            total += count
            for k, v in model.state_dict().items():
                new[k] += count * v.double()
        model.load_state_dict({k: v / total for k, v in new.items()})
    return [*rounds, model.state_dict()]


def close(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


def recomputed(of: Job, exchange: Exchange, probe: int | None) -> tuple[Update, Batch]:
    client = exchange.clients[0]
    if probe is None:
        held = shares(DATA, of.federation, of.clients, of.seed)[client]
        steps = draw(of.client, held, exchange.round, client, of.seed, of.defense)
        kind = ("train",)
    else:
        indices = torch.tensor(of.probes[probe][1])
        steps = [indices[i] for i in schedule(len(indices), of.client.local)]
        kind = ("probe", *indices.tolist())
    rngs = client_streams(of.seed, client, exchange.round, *kind)
    batches = [DATA.train.batch(i, DATA.classes) for i in steps]
    update, _ = local_update(
        exchange.model, batches, of.defense, exchange.local, rngs, exchange.local.batch
    )
    return update, joined(batches)


@pytest.mark.parametrize("client", [GRADIENT, FEDAVG], ids=["gradient", "fedavg"])
@pytest.mark.parametrize("size", [40, 13])  # 13: the clients hold 5, 4, 4 images and weigh so
def test_flower_is_the_plain_loop(client, size):
    dataset = Blocks(size).load()
    of = job(client=client, attack_rounds=(0, 1, 2, 3), dataset=Blocks(size))
    twin, result = plain_loop(of, dataset), run(of, dataset)
    close(result.model, twin[-1])
    assert any(not torch.equal(twin[0][k], twin[-1][k]) for k in twin[0])
    for exchange in result.exchanges:  # round r attacks what the server sent in round r
        close(exchange.model, twin[exchange.round])
    assert [e.round for e in result.exchanges] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("client", [GRADIENT, FEDAVG], ids=["gradient", "fedavg"])
@pytest.mark.parametrize("keep", [False, True], ids=["probes", "training"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_attacked_update_is_the_sent_update(client, keep, mode):
    of = job(client=client, defense=Noise(), keep_training=keep, model=Net(mode=mode))
    exchanges = run(of).exchanges
    assert len(exchanges) == 2 * (of.clients if keep else len(PROBES))
    for number, exchange in enumerate(exchanges):
        probe = None if keep else number % len(PROBES)
        update, used = recomputed(of, exchange, probe)
        for name, tensor in update.tensors.items():
            assert torch.equal(exchange.update.tensors[name], tensor)
        for name, buffer in update.buffers.items():
            assert torch.equal(exchange.update.buffers[name], buffer)
        assert exchange.update.count == update.count
        assert exchange.mode == mode
        count = len(used) if keep else len(PROBES[number % 2][1])
        assert len(exchange.batch) == len(exchange.trained) == count
        assert torch.equal(exchange.batch.images, used.images[:count])
        assert torch.equal(exchange.trained.images, used.images[:count].flip(2))
        index = torch.tensor(exchange.batch.index)
        assert torch.equal(exchange.batch.images, DATA.train.pixels[index])
        mean, var = exchange.norm_stats[0]
        seen = exchange.model[0](exchange.trained.images)
        torch.testing.assert_close(mean, seen.mean((0, 2, 3)))
        torch.testing.assert_close(var, seen.var((0, 2, 3), correction=0))
        assert not mean.requires_grad


def test_one_model_a_round_in_the_declared_mode_and_unchanged():
    of = job(defense=Noise(), attack_rounds=(0, 1))
    exchanges = run(of).exchanges
    assert exchanges[0].model is exchanges[1].model
    assert exchanges[0].model is not exchanges[2].model
    start = built(of).state_dict()
    for name, value in exchanges[0].model.state_dict().items():
        assert torch.equal(value, start[name])
    assert exchanges[0].model.training
    moved = exchanges[2].model.state_dict()
    assert moved["1.num_batches_tracked"].item() == 1  # its statistics are the clients' mean
    assert not torch.equal(moved["1.running_mean"], start["1.running_mean"])


def test_noise_reaches_the_attacked_update():
    """Mishap 1, through Flower: noise of scale 100 must be there."""
    clean, noisy = (
        run(job(rounds=1, attack_rounds=(0,))),
        run(job(rounds=1, attack_rounds=(0,), defense=Noise(100.0))),
    )
    for a, b in zip(clean.exchanges, noisy.exchanges, strict=True):
        difference = torch.cat([
            (a.update.tensors[k] - b.update.tensors[k]).flatten() for k in a.update.tensors
        ])  # fmt: skip
        assert 90 < difference.std() < 110


def test_aggregate_and_history():
    of = job(attack_rounds=(0, 1, 2), clients=3)
    probes, training = run(of).exchanges, run(replace(of, keep_training=True)).exchanges
    by_round = {r: [e for e in training if e.round == r] for r in (0, 1, 2)}
    for exchange in [*probes, *training]:
        clients = by_round[exchange.round]
        summands = [exchange if e.clients == exchange.clients else e for e in clients]
        total = sum(e.update.count for e in summands)
        for name, tensor in exchange.aggregate.tensors.items():
            plain = sum(e.update.count / total * e.update.tensors[name] for e in summands)
            torch.testing.assert_close(tensor, plain)
        assert exchange.aggregate.count == total
        assert len(exchange.history) == exchange.round
    last = training[-1]
    earlier = [e.update for e in training if e.clients == last.clients][:-1]
    assert all(a is b for a, b in zip(last.history, earlier, strict=True))


def test_no_rounds_at_all():
    of = job(rounds=0, attack_rounds=(0,))
    result = run(of)
    start = built(of).state_dict()
    for model in (result.model, result.exchanges[0].model):
        assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert len(result.exchanges) == 2
    assert result.exchanges[0].aggregate is not None
    assert run(job(rounds=0, attack_rounds=())).exchanges == []


def test_attacking_more_changes_no_number():
    plain, attacked = run(job(attack_rounds=(), probes=())), run(job(attack_rounds=(0, 1, 2, 3)))
    for a, b in zip(plain.model.parameters(), attacked.model.parameters(), strict=True):
        assert torch.equal(a, b)
    alone = run(job(attack_rounds=(2,), probes=PROBES[1:], defense=Noise()))
    both = run(job(attack_rounds=(2,), defense=Noise()))
    for name, tensor in alone.exchanges[0].update.tensors.items():
        assert torch.equal(tensor, both.exchanges[1].update.tensors[name])
    assert [t.steps for t in plain.training] == [3, 3, 3]
    assert [t.steps for t in attacked.training] == [4, 4, 4]  # round 3 sends one more
    assert [(t.examples, t.batch) for t in plain.training] == [(14, 5), (13, 5), (13, 5)]


def test_same_seed_same_numbers_and_nobody_elses_draws():
    """Even where a library draws from the process's global generators."""
    careless = job(defense=Careless())
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = run(careless)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    two, other = run(careless), run(replace(careless, seed=1))
    for a, b, c in zip(
        one.model.parameters(), two.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_replies_may_come_in_any_order(monkeypatch):
    straight = run(job())

    def reversed_replies(self, ids):
        return [self.replies.pop(i) for i in reversed(list(ids)) if i in self.replies]

    def shuffled_nodes(self):
        return [3, 1, 2]

    monkeypatch.setattr(flower.InlineGrid, "pull_messages", reversed_replies)
    monkeypatch.setattr(flower.InlineGrid, "get_node_ids", shuffled_nodes)
    mixed = run(job())
    for a, b in zip(straight.model.parameters(), mixed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(straight.exchanges, mixed.exchanges, strict=True):
        assert a.clients == b.clients
        assert all(torch.equal(t, b.update.tensors[k]) for k, t in a.update.tensors.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains(name):
    client = FEDAVG if name == "fedadam" else GRADIENT
    of = job(federation=replace(INLINE, strategy=name), client=client, clients=4, rounds=4)
    result = run(of)
    state, start = result.model.state_dict(), built(of).state_dict()
    assert all(v.isfinite().all() for v in state.values())
    assert not torch.equal(state["4.weight"], start["4.weight"])
    assert state["1.running_var"].gt(0).all()  # FedAdam on a variance would go below zero
    assert state["1.num_batches_tracked"].item() == 4 * client.local.steps
    plain = plain_loop(replace(of, client=client), DATA)[-1]
    assert torch.allclose(state["4.weight"], plain["4.weight"], atol=1e-5) == (name == "fedavg")


def test_the_median_is_the_median():
    of = job(
        federation=replace(INLINE, strategy="fedmedian"), rounds=1, attack_rounds=(0,),
        keep_training=True,
    )  # fmt: skip
    result = run(of)
    start = built(of)
    for name, p in parameters(result.model).items():
        stacked = torch.stack([e.update.tensors[name] for e in result.exchanges])
        expected = dict(start.named_parameters())[name] - 0.5 * stacked.median(0).values
        torch.testing.assert_close(p, expected)


def test_a_failing_client_fails_the_run_with_its_traceback():
    with pytest.raises(ClientFailed) as failed:
        run(job(defense=Broken(), client=Gradient(lr=0.1, batch=13)))
    text = str(failed.value)
    assert "the third image is cursed" in text
    assert "ArithmeticError" in text
    assert "test_federation.py" in text  # the line that raised
    assert failed.value.round == 0
    assert f"client {failed.value.client} failed in round 0" in text
    held = shares(DATA, INLINE, 3, 0)
    assert 3 in held[failed.value.client]


def test_an_empty_reply_fails_the_run(monkeypatch):
    monkeypatch.setattr(flower, "_update", lambda *a: flower.RecordDict())
    with pytest.raises(ClientFailed, match="must hold every parameter, got nothing"):
        run(job())


def test_private_images_do_not_travel(monkeypatch):
    """Every byte between server and clients, searched for rows of the victims' pixels."""
    travelled = []
    push, pull = flower.InlineGrid.push_messages, flower.InlineGrid.pull_messages
    monkeypatch.setattr(
        flower.InlineGrid, "push_messages",
        lambda self, ms: push(self, [travelled.append(pickle.dumps(m.content)) or m for m in ms]),
    )  # fmt: skip
    monkeypatch.setattr(
        flower.InlineGrid, "pull_messages",
        lambda self, ids: [travelled.append(pickle.dumps(r.content)) or r for r in pull(self, ids)],
    )  # fmt: skip
    exchanges = run(job()).exchanges
    rows = [row.numpy().tobytes() for e in exchanges for row in e.batch.images.flatten(0, 2)]
    assert len(travelled) > 20
    assert not any(row in content for content in travelled for row in rows)
    control = flower.ArrayRecord({"leak": exchanges[0].batch.images})
    assert any(row in pickle.dumps(control) for row in rows)


def test_poisson_sampling_skips_empty_draws_and_hides_the_rest():
    of = job(defense=Poisson(), client=Gradient(lr=0.1, batch=1), keep_training=True, rounds=8,
             attack_rounds=tuple(range(8)))  # fmt: skip
    exchanges = run(of).exchanges
    held = shares(DATA, INLINE, 3, 0)
    sizes = [
        len(draw(of.client, held[c], r, c, 0, of.defense)[0]) for r in range(8) for c in range(3)
    ]
    assert [len(e.batch) for e in exchanges] == [n for n in sizes if n]
    assert 0 in sizes
    assert max(sizes) > 1
    assert {e.update.count for e in exchanges} == {1}


def test_flower_is_silent_and_its_logger_is_given_back(capfd, caplog):
    run(job())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not logging.getLogger("flwr").disabled


def test_progress_counts_rounds():
    heard = []
    federate(job(attack_rounds=(3,)), DATA, lambda done, rounds: heard.append((done, rounds)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"attack_rounds": (4,)}, "attack_rounds"),
        ({"attack_rounds": (-1,)}, "attack_rounds"),
        ({"rounds": -1}, "rounds"),
        ({"clients": 0}, "clients"),
        ({"clients": 41}, "clients"),
        ({"probes": ((3, (1,)),)}, "probes"),
        ({"probes": ((0, ()),)}, "victim_batch"),
        ({"client": FEDAVG, "probes": ((0, tuple(range(16))),)}, "victim_batch"),
        ({"federation": replace(INLINE, split="shards", shards=30)}, "federation.shards"),
    ],
)
def test_refusals(changes, key):
    with pytest.raises(Refused) as refused:
        run(job(**changes))
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"engine": "spark"}, "engine"),
        ({"strategy": "fedprox2"}, "strategy"),
        ({"split": "fair"}, "split"),
        ({"alpha": 0.0}, "alpha"),
        ({"shards": 0}, "shards"),
    ],
)
def test_federation_refusals(change, key):
    with pytest.raises(Refused) as refused:
        replace(INLINE, **change)
    assert refused.value.key == key


def test_accuracy_is_the_share_of_right_answers_in_eval_mode():
    model = built(job())
    model.eval()
    answers = [int(model(DATA.test.pixels[i : i + 1]).argmax()) for i in range(len(DATA.test))]
    plain = sum(a == int(y) for a, y in zip(answers, DATA.test.labels, strict=True)) / 40
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert accuracy(model, DATA.test, "cpu", batch=7) == plain
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(2.5),
        torch.tensor(7),
        torch.zeros(0, 3),
        torch.randn(5, dtype=torch.float64),
        torch.randn(5).half(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}",  # without values: workers must agree
)
def test_arrays_are_flowers_own(tensor):
    ours, theirs = flower.arrays_of({"t": tensor}), flower.ArrayRecord({"t": tensor})
    assert np.array_equal(ours["t"].numpy(), tensor.numpy())
    for record in (ours, theirs):
        back = flower.tensors_of(record)["t"]
        assert torch.equal(back, tensor)
        assert back.dtype == tensor.dtype
    if tensor.is_contiguous():
        assert ours["t"] == theirs["t"]


def test_weights_are_loaded_in_place():
    model = built(job())
    where = [p.data_ptr() for p in model.parameters()]
    load(model, {k: torch.full_like(v, 2) for k, v in model.state_dict().items()})
    assert [p.data_ptr() for p in model.parameters()] == where
    assert all(p.eq(2).all() for p in model.parameters())


RAY = replace(INLINE, engine="ray")


@pytest.mark.slow
@pytest.mark.parametrize("client", [GRADIENT, FEDAVG], ids=["gradient", "fedavg"])
def test_ray_equals_inline(client, capfd):
    of = job(client=client, defense=Noise(), attack_rounds=(0, 3))
    path = os.environ.get("PYTHONPATH")
    here, there = run(of), run(replace(of, federation=RAY))
    assert capfd.readouterr() == ("", "")
    assert os.environ.get("PYTHONPATH") == path
    close(there.model, here.model.state_dict())
    assert len(here.exchanges) == len(there.exchanges) == 4
    for a, b in zip(here.exchanges, there.exchanges, strict=True):
        assert (a.round, a.clients, a.batch.index) == (b.round, b.clients, b.batch.index)
        for name, tensor in a.update.tensors.items():
            torch.testing.assert_close(tensor, b.update.tensors[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_failing_client_fails_the_ray_run_with_its_traceback():
    of = job(defense=Broken(), client=Gradient(lr=0.1, batch=13), federation=RAY)
    with pytest.raises(ClientFailed, match="the third image is cursed") as failed:
        run(of)
    assert "test_federation.py" in str(failed.value)
    assert failed.value.round == 0


@pytest.mark.slow
def test_ray_is_refused_inside_ray():
    code = """
import ray
from dataclasses import replace
from test_federation import DATA, RAY, Refused, job, run
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
try:
    run(job(federation=RAY))
except Refused as refused:
    print(refused, ray.is_initialized())
"""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("federation.engine: cannot start in a process that runs Ray")
    assert done.stdout.strip().endswith("True")


# The average of the global weights


def final(rounds: int, **changes) -> dict[str, torch.Tensor]:
    todo = job(rounds=rounds, attack_rounds=(0,), **changes)
    return flower_state(federate(todo, todo.dataset.load(), lambda *_: None).model)


def flower_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


def averaged(decays, models) -> dict[str, torch.Tensor]:
    """The dumb twin, from the models after 0, 1, 2... rounds."""
    first, *later = models
    kept = dict(first)
    for decay, new in zip(decays, later, strict=True):
        kept = {
            k: decay * kept[k] + (1 - decay) * t if t.is_floating_point() else t
            for k, t in new.items()
        }
    return kept


def test_the_average_is_that_of_the_models_after_each_round_and_changes_none_of_them():
    models = [final(rounds) for rounds in range(4)]
    todo = job(rounds=3, attack_rounds=(0, 3), ema=0.15)
    found = federate(todo, todo.dataset.load(), lambda *_: None)
    assert found.averaged is not None
    for name, tensor in flower_state(found.model).items():
        assert torch.equal(tensor, models[3][name]), name
    right = averaged((1 / 10, 0.15, 0.15), models)  # warm-up: 1/10, 2/11, 3/12
    wrong = averaged((0.15, 0.15, 0.15), models)  # the broken twin: no warm-up
    apart = 0.0
    for name, tensor in flower_state(found.averaged).items():
        torch.testing.assert_close(tensor, right[name], msg=name)
        apart = max(apart, float((tensor - wrong[name]).abs().max()))
    assert apart > 1e-4
    assert found.training == federate(job(rounds=3, attack_rounds=(0, 3)), todo.dataset.load(),
                                      lambda *_: None).training  # fmt: skip


def test_the_average_forgets_its_start_as_fast_as_the_warm_up_says():
    average = Average(0.999, {"w": torch.ones(1)})
    for t in range(1, 50):
        average.take({"w": torch.zeros(1)})
        share = np.prod([(1 + s) / (10 + s) for s in range(t)])
        assert float(average.weights["w"]) == pytest.approx(share, rel=1e-4)
    for _ in range(20000):
        average.take({"w": torch.ones(1)})
    assert float(average.weights["w"]) == pytest.approx(1.0, abs=1e-3)


def test_without_a_decay_there_is_no_average():
    todo = job(rounds=1, attack_rounds=(0,))
    assert federate(todo, todo.dataset.load(), lambda *_: None).averaged is None

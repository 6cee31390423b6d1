"""What a run hands to an attack: the true images explain the observed update, under every setting.

An attack that starts from the wrong picture of the protocol would make a defense of it.
"""

import os

import pytest
import tiny
import torch

from fedsec import engine, experiment
from fedsec.client import FedAvg, Gradient
from fedsec.data import Dataset, Split
from fedsec.defense import Compose
from fedsec.federation import Federation, Job, federate, summed
from fedsec.models import ConvNetSpec, MLPSpec
from fedsec.rng import stream
from fedsec.types import Update

INLINE = Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2)


def dataset() -> Dataset:
    rng = stream(0, "pixels")

    def split(n: int) -> Split:
        pixels = torch.randint(256, (n, 3, 12, 12), generator=rng).to(torch.uint8)
        return Split(pixels, torch.arange(n) % 4)

    return Dataset("noise", split(40), split(8), 4, ("a", "b", "c", "d"))


CLIENTS = {
    "gradient": Gradient(lr=0.1, batch=4),
    "fedavg": FedAvg(lr=0.05, batch=2, steps=3),
}
MODELS = {"mlp": MLPSpec(hidden=(16,)), "convnet": ConvNetSpec(width=2, norm="batch")}


def job(client: str, model: str, training: bool, defense=None) -> Job:
    probes = tuple((c, (4 * c, 4 * c + 1)) for c in range(3))
    return Job(
        dataset=None,
        model=MODELS[model],
        client=CLIENTS[client],
        federation=INLINE,
        defense=defense or Compose(()),
        clients=3,
        rounds=2,
        seed=0,
        attack_rounds=(0, 1),
        probes=() if training else probes,
        keep_training=training,
    )


def loss_at_the_truth(exchange) -> float:
    batch = exchange.trained
    guess = engine.simulate(exchange.model, batch.images, batch.targets, exchange.local)
    return float(engine.cosine(guess, exchange.update.tensors))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("client", CLIENTS)
def test_the_true_images_explain_single_updates_and_sums(client, model, training):
    todo = job(client, model, training)
    exchanges = federate(todo, dataset(), lambda done, rounds: None).exchanges
    assert len(exchanges) == 6
    for e in exchanges:
        assert loss_at_the_truth(e) < 1e-5
    for round in (0, 1):
        here = [e for e in exchanges if e.round == round]
        (whole,) = summed(here, None if todo.keep_training else todo.clients)
        assert len(whole.batch) == sum(len(e.batch) for e in here)
        assert loss_at_the_truth(whole) < 1e-5


class Sparse(Compose):
    """Draws by Poisson sampling, so that some clients draw nothing."""

    poisson = True

    def update(self, update: Update, rng: torch.Generator) -> Update:
        noise = {k: t + torch.randn(t.shape, generator=rng) for k, t in update.tensors.items()}
        return Update(noise, update.buffers, update.count)


def test_a_sum_holds_every_reply_also_of_clients_that_drew_nothing():
    todo = job("gradient", "mlp", True, Sparse(()))
    todo = Job(**(vars(todo) | {"client": Gradient(lr=0.1, batch=1), "rounds": 6,
                                "attack_rounds": tuple(range(6))}))  # fmt: skip
    exchanges = federate(todo, dataset(), lambda done, rounds: None).exchanges
    short = 0
    for round in range(6):
        here = [e for e in exchanges if e.round == round]
        if not here:
            continue
        short += len(here) < 3
        (whole,) = summed(here, None if todo.keep_training else todo.clients)
        assert whole.update.count == 3, "one expected image for each of three clients"
        assert whole.local.parts == (), "who drew how many is private"
        assert here[0].aggregate is not None
        for k, t in whole.update.tensors.items():
            assert torch.equal(t, here[0].aggregate.tensors[k])
    assert short, "else this test could not fail"


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gflop", "cores", "threads"),
    [(0.03, 16, 1), (1.9, 16, 1), (4.1, 16, 2), (26.6, 2, 2), (26.6, 16, 13), (500.0, 16, 16)],
)
def test_threads_follow_the_size_of_a_stack_up_to_the_cores(gflop, cores, threads):
    assert experiment._threads(gflop, cores) == threads


def test_no_more_cores_are_taken_than_the_machine_or_the_caller_gives(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    there = experiment._cores()
    assert 1 <= there <= (os.cpu_count() or 0)
    for said, cores in (("1", 1), ("100000", there), ("", there), ("0", there), ("4,2", there)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert experiment._cores() == cores


def test_restarts_count_in_the_size_of_a_stack(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "_cores", lambda: 64)
    asked = []
    monkeypatch.setattr(experiment, "_threads", lambda gflop, cores: asked.append(gflop) or 1)
    for restarts in (1, 6):
        words = tiny.words(tmp_path, f"attack.restarts={restarts}", f"out={tmp_path}/{restarts}")
        assert tiny.call(monkeypatch, words) == 0
    first, training, second, same_training = asked
    assert second == pytest.approx(6 * first)
    assert training == same_training, "it may be another attack's too"


@pytest.mark.parametrize(("threads", "said"), [("auto", "1 thread (auto)"), (2, "2 threads\n")])
def test_the_choice_of_threads_is_said_and_recorded(tmp_path, capsys, monkeypatch, threads, said):
    words = tiny.words(tmp_path, f"threads={threads}")
    try:
        assert tiny.call(monkeypatch, words) == 0
        assert torch.get_num_threads() == (1 if threads == "auto" else threads)
    finally:
        torch.set_num_threads(1)
    assert not torch.backends.cudnn.allow_tf32, "a GPU would round to ten bits"
    assert said.rstrip("\n") in capsys.readouterr().out
    assert tiny.whole(tmp_path / "out")["cost"]["device"].startswith(f"cpu, {said[:8]}")

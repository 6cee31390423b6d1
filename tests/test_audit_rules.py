"""Each rule finds what it is about, and nothing in a twin without it."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.app import Message as Sent
from flwr.clientapp.mod import LocalDpMod
from scipy.stats import norm
from torch import nn

from fedsec.audit.claims import LOCAL, of_mod
from fedsec.audit.claims import mechanisms as measured
from fedsec.audit.lint import lint
from fedsec.audit.mechanisms import Promise, composed, judged, sigma
from fedsec.audit.structure import GIVEN, NAMES, SEEN, guessed, of_module
from fedsec.audit.traffic import About, Claim, Mechanism, Message, Traffic, Watched
from fedsec.audit.watch import Watch
from fedsec.flower import name_this_process

Arrays = dict[str, np.ndarray]


def traffic(before: Arrays, *after: Arrays, watched: Watched | None = None, **more) -> Traffic:
    """One round: each client gets `before` and replies with its own `after`."""
    messages = []
    for client, arrays in enumerate(after):
        down = {"arrays": {k: Array(v) for k, v in before.items()}}
        up = {"arrays": {k: Array(v) for k, v in arrays.items()}}
        number = 2 * client
        metrics, configs = more.get("metrics", {}), more.get("configs", {})
        messages.append(Message(number, False, "train", 1, client, None, down, {}, {}))
        messages.append(
            Message(
                number + 1,
                True,
                "train",
                1,
                client,
                number,
                up,
                metrics,
                configs,
                watched=watched or Watched(),
            )
        )
    about = About("app", len(after), {}, {"flwr": "1.41.0"}, more.get("claims", ()))
    return Traffic(about, tuple(messages))


def state(model: nn.Module) -> Arrays:
    return {k: t.detach().numpy().copy() for k, t in model.state_dict().items()}


def step(model: nn.Module, images: torch.Tensor, lr: float = 0.1) -> tuple[Arrays, Arrays]:
    """The state before and after one step on these images."""
    before = state(model)
    optimiser = torch.optim.SGD(model.parameters(), lr)
    F.cross_entropy(model(images), torch.arange(len(images)) % 10).backward()
    optimiser.step()
    return before, state(model)


def ids(findings) -> set[str]:
    return {f.id for f in findings}


def mlp(bias: bool = True, out: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(64, 32, bias=bias), nn.ReLU(), nn.Linear(32, 10, bias=out)
    return nn.Sequential(nn.Flatten(), *layers)


IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_first_linear_layer_with_bias_gives_inputs_away_exactly(count, names):
    before, after = step(mlp(), IMAGES[:count])
    if not names:  # a NumPyClient's
        before, after = ({str(i): v for i, v in enumerate(s.values())} for s in (before, after))
    (found,) = lint(traffic(before, after))
    assert (found.rule.id, found.sure, found.level) == ("input-linear", "certified", "high")
    assert "32 neurons could hold as many inputs of 64 values" in found.evidence
    held = next(e for e in found.evidence if "read off" in e)
    assert int(held.partition("client 0: ")[2].partition(" ")[0]) >= 1


def test_blended_inputs_are_no_certificate_and_no_bias_no_finding():
    before, after = step(mlp(), IMAGES)
    (found,) = lint(traffic(before, after))
    assert (found.sure, found.level) == ("inferred", "medium")
    before, after = step(mlp(bias=False), IMAGES[:1])
    assert lint(traffic(before, after)) == []


def test_random_changes_are_not_taken_for_inputs():
    before = state(mlp())
    rng = np.random.default_rng(0)
    after = {k: (v + 0.01 * rng.normal(size=v.shape)).astype(v.dtype) for k, v in before.items()}
    (found,) = lint(traffic(before, after))
    assert found.sure == "inferred"


def test_noise_that_drowns_the_update_silences_what_reads_it():
    model = mlp(out=True)
    before, after = step(model, IMAGES[:1])
    names = list(before)

    def ask(noise: float) -> set[str]:
        each = {k: Mechanism(before[k].size, 1.0, noise, 1.0, False, False) for k in names}
        return ids(lint(traffic(before, after, watched=Watched(mechanisms=each))))

    assert ask(10.0) == set()
    assert ask(1e-6) == {"input-linear@1", "last-bias@3"}


def test_running_statistics_that_change_are_found_and_frozen_ones_are_not():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10, bias=False)
    model = nn.Sequential(*layers)
    before, after = step(model, IMAGES[:20])
    assert ids(lint(traffic(before, after))) == {"batchnorm-buffers@1"}
    numbered = ({str(i): v for i, v in enumerate(s.values())} for s in (before, after))
    assert ids(lint(traffic(*numbered), of_module(model))) == {"batchnorm-buffers@1"}
    model.eval()
    before, after = step(model, IMAGES[:20])
    assert lint(traffic(before, after)) == []


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(100, 8)
        self.pos_embedding = nn.Parameter(torch.randn(1, 4, 8))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, tokens):
        return self.head((self.embed(tokens) + self.pos_embedding).mean(1))


def test_rows_of_an_embedding_and_positions_are_found():
    tokens = torch.randint(100, (5, 4), generator=torch.Generator().manual_seed(0))
    before, after = step(Words(), tokens)
    for given in (None, of_module(Words())):
        found = lint(traffic(before, after), given)
        assert ids(found) == {"embedding-rows@embed", "position-embedding@pos_embedding"}
        rows = next(f for f in found if f.rule.id == "embedding-rows")
        assert f"{len(tokens.unique())} of 100 rows changed" in rows.evidence[1]
    model = Words()
    model.embed.weight.requires_grad_(False)
    model.pos_embedding.requires_grad_(False)
    before, after = step(model, tokens)
    assert lint(traffic(before, after)) == []


def test_the_structure_that_names_tell_is_the_modules():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    for model in (mlp(), mlp(bias=False, out=True), conv, Words()):
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        known, told = of_module(model), guessed(shapes)
        assert (known.source, told.source) == (GIVEN, NAMES)
        assert {(x.kind, x.weight, x.bias) for x in told.layers} == {
            (x.kind, x.weight, x.bias) for x in known.layers
        }
        assert of_module(model).named(shapes) == known


class Backwards(nn.Module):
    """Defines its layers in another order than data passes them."""

    file: ClassVar[str] = __file__

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 10)
        self.first = nn.Linear(64, 16)

    def forward(self, x):
        return self.last(F.relu(self.first(x.flatten(1))))


def test_a_watched_pass_knows_the_order_the_batches_and_the_steps():
    model, watch = Backwards(), Watch()
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    with watch():
        for batch in IMAGES.split(16):
            F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long)).backward()
            optimiser.step()
        model.eval()
        model(IMAGES)
    model.train()(IMAGES)  # unseen
    assert (watch.batches, watch.steps, watch.lr) == ([16, 16, 8], 3, 0.5)
    assert watch.structure is not None
    assert [layer.name for layer in watch.structure.layers] == ["first", "last"]
    assert watch.structure.source == SEEN
    assert [layer.name for layer in of_module(model).layers] == ["last", "first"]


# ---------------------------------------------------------------- the messages


@pytest.fixture
def plain():
    """An exchange in which nothing is to be found."""
    before, after = step(mlp(bias=False), IMAGES)
    return before, after


def test_numbers_are_found_where_they_tell_clients_apart(plain):
    before, after = plain
    same = traffic(before, after, after, metrics={"m": {"num-examples": 64, "train_loss": 0.5}})
    assert lint(same) == []
    replies = [m if not m.up else replace(m, metrics={"m": {"num-examples": 64 + m.client,
               "train_loss": 0.5 + m.client}}) for m in same.messages]  # fmt: skip
    differing = replace(same, messages=tuple(replies))
    assert ids(lint(differing)) == {"sample-counts@num-examples", "training-loss@train_loss"}


def test_few_examples_are_found_by_what_was_watched_or_by_what_is_sent(plain):
    before, after = plain
    for batches, expected in (((8,), {"few-images@train"}), ((8, 8, 8), set())):
        assert ids(lint(traffic(before, after, watched=Watched(batches=batches)))) == expected
    said = traffic(before, after, after, metrics={"m": {"num-examples": 4}})
    assert ids(lint(said)) == {"few-images@train"}


def test_plain_updates_under_secure_aggregation_are_found(plain):
    before, after = plain
    claim = Claim("secagg", "SecAggPlusWorkflow", {})
    assert ids(lint(traffic(before, after, claims=(claim,)))) == {"secagg-in-clear@train"}
    assert lint(traffic(before, {}, claims=(claim,))) == []


def test_more_than_the_model_and_less_than_training_are_found(plain):
    before, after = plain
    momenta = {f"momentum.{k}": v for k, v in after.items()}
    assert ids(lint(traffic(before, after | momenta))) == {"optimiser-state@momentum.1.weight"}
    frozen = after | {"1.weight": before["1.weight"]}
    assert ids(lint(traffic(before, frozen, frozen))) == {"frozen-weights@1.weight"}


def test_pickles_in_messages_are_found_and_other_bytes_are_not(plain):
    before, after = plain
    evil = traffic(before, after, configs={"c": {"extra": pickle.dumps([1])}})
    assert ids(lint(evil)) == {"pickled-object@extra"}
    assert lint(traffic(before, after, configs={"c": {"extra": b"\x80\x04 but no pickle"}})) == []


# ---------------------------------------------------------------- mechanisms


def through(mod, before: Arrays, after: Arrays) -> Arrays:
    """What Flower's own mod makes of a reply."""
    name_this_process()
    content = RecordDict({"arrays": ArrayRecord({k: Array(v) for k, v in before.items()})})
    asked = Sent(content, 1, "train")
    asked.metadata.__dict__["_message_id"] = "1"
    content = RecordDict({"arrays": ArrayRecord({k: Array(v) for k, v in after.items()})})
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply = mod(asked, context, lambda *_: Sent(content, reply_to=asked))
    return {k: np.asarray(a.numpy()) for k, a in reply.content.array_records["arrays"].items()}


def audited(mod, before: Arrays, after: Arrays, rounds: int = 1, **more) -> set[str]:
    """The findings of so many rounds, each with noise of its own unless `sent` travelled."""
    claim, known = of_mod(mod), more.pop("sent", None)
    assert claim is not None
    messages = []
    for r in range(rounds):
        sent = known or through(mod, before, after)
        seen = Watched(mechanisms=measured(before, after, sent, mod.clipping_norm))
        one = traffic(before, sent, watched=seen, claims=(claim,))
        for m in one.messages:
            about = m.about if m.about is None else 2 * r
            messages.append(replace(m, number=m.number + 2 * r, round=r + 1, about=about))
    return ids(judged(replace(one, messages=tuple(messages)), **more))


DP = {"clipping_norm": 1.0, "sensitivity": 2.0, "epsilon": 1.0, "delta": 1e-5}
BEFORE = {"w": np.zeros((50, 40), np.float32), "t": np.zeros((), np.float32)}
AFTER = {"w": np.full((50, 40), 0.5, np.float32), "t": np.array(100.0, np.float32)}
SHAPED = [{k: v.reshape(v.shape or (1,)) for k, v in arrays.items()} for arrays in (BEFORE, AFTER)]


def test_a_scalar_escapes_flowers_own_mod_and_one_dimension_is_the_way_out():
    sent = through(LocalDpMod(**DP), BEFORE, AFTER)
    assert sent["t"] == 100.0  # a change of 100, at a clipping norm of 1
    assert audited(LocalDpMod(**DP), BEFORE, AFTER) == {"dp-scalar@t"}
    assert audited(LocalDpMod(**DP), *SHAPED) == set()


def test_a_counter_that_dominates_the_norm_is_found():
    before, after = ({"w": a["w"], "n": np.array(n)} for a, n in ((BEFORE, 0), (AFTER, 1000)))
    assert audited(LocalDpMod(**DP), before, after) == {"dp-counter@n"}
    assert audited(LocalDpMod(**DP), before, after | {"n": np.array(1)}) == set()


def test_noise_that_is_missing_on_a_tensor_is_found():
    mod = LocalDpMod(**DP)
    honest = through(mod, *SHAPED)
    factor = 1.0 / np.sqrt(sum((a**2).sum() for a in SHAPED[1].values()))
    exact = SHAPED[1]["w"] * np.float32(factor)
    assert audited(mod, *SHAPED, sent=honest) == set()
    assert audited(mod, *SHAPED, sent=honest | {"w": exact}) == {"dp-noise@w"}
    halved = exact + (honest["w"] - exact) / 2
    assert audited(mod, *SHAPED, sent=honest | {"w": halved}) == {"dp-noise@w"}


@pytest.mark.parametrize(("sensitivity", "level"), [(2.0, None), (1.0, "medium"), (0.5, "high")])
def test_a_sensitivity_below_twice_the_clip_is_found(sensitivity, level):
    claim = Claim(LOCAL, "LocalDpMod", DP | {"sensitivity": sensitivity})
    found = judged(Traffic(About("app", 1, {}, {}, (claim,)), ()))
    assert [f.level for f in found] == ([level] if level else [])


def exact_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8, written down again."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("rounds", [1, 10])
def test_the_composed_epsilon_is_the_gaussian_mechanisms(rounds):
    claim = Claim(LOCAL, "LocalDpMod", DP)
    assert sigma(claim) == pytest.approx(2.0 * math.sqrt(2 * math.log(1.25e5)))
    epsilon = composed(claim, rounds, 1e-5)
    assert exact_delta(epsilon, 2.0 / sigma(claim) * math.sqrt(rounds)) == pytest.approx(1e-5)


def test_an_epsilon_that_does_not_compose_is_found_unless_the_total_is_stated():
    mod = LocalDpMod(**DP)
    assert audited(mod, *SHAPED, rounds=1) == set()
    assert audited(mod, *SHAPED, rounds=10) == {"dp-composition@LocalDpMod"}
    total = composed(Claim(LOCAL, "LocalDpMod", DP), 10, 1e-5)
    assert audited(mod, *SHAPED, rounds=10, promise=Promise(1.01 * total, 1e-5)) == set()
    less = Promise(0.99 * total, 1e-5)
    assert audited(mod, *SHAPED, rounds=10, promise=less) == {"dp-composition@LocalDpMod"}


def test_an_epsilon_that_the_classical_formula_promises_in_vain_is_found():
    for epsilon, expected in ((1.0, set()), (50.0, {"dp-formula@LocalDpMod"})):
        claim = Claim(LOCAL, "LocalDpMod", DP | {"epsilon": epsilon, "delta": 0.01})
        exact = composed(claim, 1, 0.01)
        assert (exact > epsilon) == bool(expected)
        assert ids(judged(Traffic(About("app", 1, {}, {}, (claim,)), ()))) == expected

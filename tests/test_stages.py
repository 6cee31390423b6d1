"""Several attacks as one: what is believed of them, what it costs, and what becomes of it."""

import io
import math
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import tiny
import torch
from rich.console import Console
from test_attacks import nothing, rngs
from test_report import _page, _row, _rows, _run
from test_resume import Killed, dying, hearing, kept
from test_threat import exchanges
from torch import nn
from torch.nn import functional as F

from attacks import auto
from attacks.auto import Auto
from attacks.candidates import Candidates
from attacks.lti import LTI
from attacks.rgap import RGAP
from defenses.mixup import Mixup
from defenses.noise import Noise
from defenses.prune import Prune
from defenses.sign import Sign
from fedsec import cost, engine, experiment, metrics, priors, records, resume
from fedsec.attack import Attack
from fedsec.client import FedAvg, Gradient, client_streams, local_update
from fedsec.defense import Compose, Defense
from fedsec.match import match
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ModelSpec
from fedsec.report import console, numbers, words
from fedsec.rng import stream
from fedsec.stages import CHANCE, EXACT, Race, chosen, smooth
from fedsec.threat import FACTS, SHARED, Observation, ThreatModel
from fedsec.types import Batch, Exchange, Reconstruction, Stage, Update
from fedsec.verify.auto import CLAIMS

SHAPE, CLASSES = (3, 12, 12), 5
MEAN, STD = (0.5,) * 3, (0.25,) * 3
BARE = ("model", "update", "count", "shape")
SERVER = (*BARE, "mode", "data_range", "local", "buffers", "defense")
NONE, PRUNE, MIXUP = Compose(()), Prune(ratio=0.9), Mixup(k=2, upper=0.65)
SIGN = Sign(scale="mean")


def noise(std):
    return Noise(std=std, distribution="gaussian")


def sent(defense: Defense = NONE, spec: ModelSpec | None = None, victims=2, count=1, **known):
    """Exchanges of clients with images whose colour varies slowly."""
    model = (spec or LeNetSpec()).build(SHAPE, CLASSES, MEAN, STD, stream(0, "model"))
    local, found = Gradient(lr=0.1, batch=count).local, []
    for v in range(victims):
        rng = stream(0, "private", v)
        coarse = torch.rand(count, 3, 3, 3, generator=rng)
        images = F.interpolate(coarse, SHAPE[1:], mode="bilinear").clamp(0, 1)
        targets = torch.eye(CLASSES)[torch.randint(CLASSES, (count,), generator=rng)]
        batch, streams = Batch(images, targets, tuple(range(count))), client_streams(0, v, 0, "t")
        update, trained = local_update(model, [batch], defense, local, streams, count)
        one = Exchange(0, (v,), model, "train", update, batch, trained, local, defense)
        found.append(replace(one, **known))
    return found


def seen_of(stack, *grants: str) -> Observation:
    return ThreatModel(grants=grants or SERVER).observe(stack)


def told(stack) -> tuple[torch.Tensor, torch.Tensor]:
    """The private images and labels, stacked."""
    images = torch.stack([e.batch.images for e in stack])
    return images, torch.stack([e.batch.labels for e in stack])


def saying(images, named, gflop: float = 0.0, flag: str = "no more than said"):
    """An attack that says this whatever it sees."""

    def attack(seen, streams, progress):
        v = len(images)
        loss, steps = torch.zeros(v), torch.zeros(v, dtype=torch.long)
        spent = torch.full((v,), gflop, dtype=torch.float64)
        return Reconstruction(images, named, loss, steps, spent, ((flag,) if flag else (),) * v)

    return attack


# ---- what an attacker believes ------------------------------------------------------------------


def stage(name: str, loss, certified=None, images=None, gflop=1.0) -> Stage:
    loss = torch.tensor(loss, dtype=torch.float64)
    v = len(loss)
    images = torch.full((v, 1, *SHAPE), 0.5) if images is None else images
    named = torch.zeros(images.shape[:2], dtype=torch.long)
    sure = torch.zeros(v, dtype=torch.bool) if certified is None else torch.tensor(certified)
    spent = torch.full((v,), gflop, dtype=torch.float64) * loss.isfinite()
    return Stage(name, images, named, loss, sure, spent, 2 * spent)


@pytest.mark.parametrize(
    ("losses", "certified", "expected"),
    [
        ([0.5, 0.2, 0.3], [0, 0, 0], 1),
        ([0.5, 0.2, 0.9], [0, 0, 1], 2),  # whatever its objective
        ([0.5, math.inf, 0.6], [0, 0, 0], 0),  # the second did not run
        ([math.inf, math.inf, 0.6], [0, 0, 0], 2),
        ([math.inf, math.inf, math.inf], [0, 0, 0], 0),
        ([0.0, 3e38, 0.1], [0, 1, 0], 1),
    ],
)
def test_what_is_certified_goes_first_then_the_least_objective(losses, certified, expected):
    stages = [stage("s", [x], [bool(c)]) for x, c in zip(losses, certified, strict=True)]
    assert chosen(stages) == [expected]


def test_each_victim_has_its_own_choice_and_later_stages_may_be_left_out():
    stages = [stage("a", [0.5, 0.5]), stage("b", [0.4, math.inf]), stage("c", [0.9, 0.1])]
    assert chosen(stages) == [1, 2]
    assert [chosen(stages, n) for n in (1, 2, 3)] == [[0, 0], [1, 0], [1, 2]]


def certified(stack, images, named, *grants: str) -> list[bool]:
    race = Race(seen_of(stack, *grants), rngs(len(stack)), nothing, 1000.0)
    race.run("said", saying(images, named), race.open)
    return race.stages[-1].certified.tolist()


@pytest.mark.parametrize(
    ("spec", "count"), [(LeNetSpec(), 1), (MLPSpec(hidden=(16,)), 2), (ConvNetSpec(width=4), 1)]
)
@pytest.mark.parametrize("grants", [SERVER, BARE])
def test_the_true_images_are_certified_and_nearly_true_ones_are_not(spec, count, grants):
    stack = sent(spec=spec, count=count)
    images, named = told(stack)
    other = images.clone()
    other[1] = (other[1] + 0.03 * torch.randn(other[1].shape)).clamp(0, 1)  # 30 dB
    race = Race(seen_of(stack, *grants), rngs(2), nothing, 1000.0)
    for guess in ((images, named), (other, named), (images, (named + 1) % CLASSES)):
        race.run("said", saying(*guess), [0, 1])
    verdicts = [stage.certified.tolist() for stage in race.stages]
    assert verdicts == [[False, False], [True, True], [True, False], [False, False]]


def test_certified_is_what_a_plain_gradient_explains_to_exact():
    """The twin, on images ever nearer to the true ones."""
    stack = sent(victims=1)
    images, named = told(stack)
    model, update = stack[0].model, stack[0].update.tensors
    away, verdicts = torch.randn(images.shape), []
    for far in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003):
        guess = (images + far * away).clamp(0, 1)
        weights = [p.requires_grad_() for p in model.parameters()]
        loss = F.cross_entropy(model(guess[0]), named[0])
        again = torch.autograd.grad(loss, weights)
        pairs = list(zip(again, update.values(), strict=True))
        apart = sum(float((g - u).double().square().sum()) for g, u in pairs)
        verdicts.append(apart <= EXACT * sum(float(u.double().square().sum()) for _, u in pairs))
        assert certified(stack, guess, named) == verdicts[-1:]
    assert set(verdicts) == {True, False}, "else this could not fail"


def test_an_update_of_unknown_length_is_explained_by_its_direction_alone():
    stack = sent()
    images, named = told(stack)
    for e in stack:
        for tensor in e.update.tensors.values():
            tensor *= 0.1
    assert certified(stack, images, named, *BARE) == [True, True]
    assert certified(stack, images, named) == [False, False], "known to be undefended"


@pytest.mark.parametrize("known", [True, False])
def test_nothing_is_certified_where_there_is_noise(known):
    stack = sent(noise(0.1))
    images, named = told(stack)
    grants = SERVER if known else BARE
    assert certified(stack, images, named, *grants) == [False, False]


def test_nothing_is_certified_where_images_are_mixed():
    """Neither the sources nor the encodings, which do explain the update: others are private."""
    stack = sent(MIXUP, count=4)
    images, named = told(stack)
    assert certified(stack, images, named) == [False, False]
    encodings = torch.stack([e.trained.images for e in stack])
    grants = (*SERVER, "labels")
    assert certified(stack, encodings, named, *grants) == [False, False]
    without = [g for g in grants if g != "defense"]
    assert certified(stack, encodings, named, *without) == [True, True], "else this says nothing"


@pytest.mark.parametrize(("std", "believed"), [(0.01, True), (3.0, False)])
def test_what_noise_alone_would_gain_is_not_believed(std, believed):
    stack = sent(noise(std), victims=1)
    images, named = told(stack)
    sent_, model = stack[0].update.tensors, stack[0].model

    def apart(x, label) -> float:
        gradient = torch.autograd.grad(F.cross_entropy(model(x), label), list(model.parameters()))
        pairs = zip(gradient, sent_.values(), strict=True)
        return sum(float((g - u).double().square().sum()) for g, u in pairs) / (2 * std**2)

    race = Race(seen_of(stack), rngs(1), nothing, 1000.0)
    guess = race.stages[0].labels[0]
    for p in model.parameters():
        p.requires_grad_()
    gain = apart(torch.full_like(images[0], 0.5), guess) - apart(images[0], named[0])
    assert (gain >= CHANCE) == believed, "else the noise is badly chosen"
    race.run("said", saying(images, named), [0])
    found = race.result()
    assert torch.equal(found.images, images) == believed
    assert bool(race.stages[-1].loss.isfinite()) == believed
    words = "not found: nothing explains the update better than grey, by more than chance"
    assert (words in found.flags[0]) != believed
    assert found.loss.isfinite().all()


def test_a_search_that_fits_noise_is_not_believed():
    stack = sent(noise(3.0))
    found = Auto(budget=80.0)(seen_of(stack), rngs(2), nothing)
    matched = found.stages[-1]
    assert matched.name == "match"
    assert (found.steps > 20).all()
    assert matched.images.std() > 0.05, "it did find something"
    assert (found.images == 0.5).all()
    assert all("not found" in flags[0] for flags in found.flags)


@pytest.mark.parametrize("defense", [NONE, noise(3.0)])
@pytest.mark.parametrize("flag", ["", "candidates: not certain"])
def test_a_candidate_is_certified_by_its_odds(defense, flag):
    """Even where noise hides the update: nobody knows better (attacks/candidates.py)."""
    stack = sent(defense, victims=1)
    images, named = told(stack)
    race = Race(seen_of(stack), rngs(1), nothing, 1000.0)
    race.run("candidates", saying(1 - images, named, flag=flag), [0])
    assert race.stages[-1].certified.tolist() == [not flag]
    assert torch.equal(race.result().images, 1 - images) == (not flag)
    race.run("other", saying(1 - images, named, flag=flag), [0])
    assert not race.stages[-1].certified.any(), "of candidates alone"


def test_what_is_certified_is_what_comes_back():
    stack = sent()
    images, named = told(stack)
    race = Race(seen_of(stack), rngs(2), nothing, 1000.0)
    race.run("wrong", saying(1 - images, named, gflop=1e-4), [0, 1])
    race.run("right", saying(images[:1], named[:1]), [0])
    assert race.open == [1]
    found = race.result()
    assert chosen(found.stages)[0] == 2
    assert torch.equal(found.images[0], images[0])
    assert found.stages[2].loss.isinf().tolist() == [False, True]
    assert found.stages[2].gflop[1] == found.stages[2].seconds[1] == 0
    assert (found.stages[2].images[1] == 0.5).all()
    spent = torch.stack([s.gflop for s in found.stages]).sum(0)
    torch.testing.assert_close(found.gflop, spent)
    race.run("nobody", saying(images, named), [])
    assert len(race.stages) == 3


# ---- the budget ---------------------------------------------------------------------------------

DEFENSES = {"none": (NONE, 1), "none, batch 8": (NONE, 8), "prune": (PRUNE, 1),
            "prune, batch 8": (PRUNE, 8), "mixup, batch 8": (MIXUP, 8)}  # fmt: skip


@pytest.mark.parametrize("case", DEFENSES)
def test_a_budget_is_kept_to_and_used(case):
    defense, count = DEFENSES[case]
    seen = seen_of(sent(defense, victims=1, count=count))
    unit, steps = cost.update_gflop(seen.model, count, SHAPE), []
    for budget in (80.0, 160.0) if defense is MIXUP else (50.0, 100.0):
        found = Auto(budget=budget)(seen, rngs(1), nothing)
        share = float(found.gflop[0]) / unit / budget
        assert 0.85 <= share <= 1.05
        assert not any("times its budget" in flag for flag in found.flags[0])
        steps.append(int(found.steps[0]))
    assert steps[1] > 1.5 * steps[0]


def test_what_costs_more_than_the_budget_is_said():
    seen = seen_of(sent())
    found = Auto(budget=1.0)(seen, rngs(2), nothing)
    unit = cost.update_gflop(seen.model, 1, SHAPE)
    times = float(found.gflop[0]) / unit
    assert times > 1.05
    assert names(found) == ["labels"]
    said = ("not found: the budget did not reach beyond labels",
            f"auto: spent {times:.1f} times its budget")  # fmt: skip
    assert found.flags[0] == said


# ---- the suite, of fakes ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fake(Attack):
    """Says grey, or the truth of some victims; remembers the updates that it saw."""

    heard: list
    needs: frozenset = frozenset(BARE)  # type: ignore[misc]
    dear: float = 0.0  # GFLOP
    truth: tuple[torch.Tensor, torch.Tensor] | None = None
    knows: tuple[int, ...] = ()
    steps: int = 0

    def gflop_at_most(self, seen):
        return self.dear

    def __call__(self, seen, rngs, progress):
        for need in self.needs:
            assert getattr(seen, need) is not None
        self.heard.append(seen.update.tensors)
        v, first = len(rngs), next(iter(seen.update.tensors.values()))
        images = torch.full((v, seen.count, *seen.shape), 0.4)
        named = torch.zeros((v, seen.count), dtype=torch.long)
        for v in range(len(rngs)):
            for known in self.knows:
                assert self.truth is not None
                if torch.equal(first[v], self.all[known]):
                    images[v], named[v] = (t[known] for t in self.truth)
        return saying(images, named, 1e-4)(seen, rngs, progress)

    @property
    def all(self) -> torch.Tensor:
        return self.heard[0]


NAMES = ("linear", "april", "rgap", "spear", "cocktail", "candidates", "lti", "unmix")


@pytest.fixture
def suite(monkeypatch):
    """Fakes instead of the suite, changed by name; the updates that each saw, by name."""

    def patched(stack, **changed):
        first = torch.stack([next(iter(e.update.tensors.values())) for e in stack])
        fakes = {name: Fake(heard=[first], truth=told(stack)) for name in (*NAMES, "match")}
        fakes |= {name: replace(fakes[name], **how) for name, how in changed.items()}
        monkeypatch.setattr(auto, "_suite", lambda: fakes)
        monkeypatch.setattr(auto, "_matching", lambda race, victims, share: fakes["match"])
        return fakes

    return patched


def saw(fake: Fake) -> list[list[int]]:
    """The victims that it was shown, call by call."""
    calls = [next(iter(tensors.values())) for tensors in fake.heard[1:]]
    return [
        [next(v for v, t in enumerate(fake.all) if torch.equal(t, row)) for row in call]
        for call in calls
    ]


def names(found: Reconstruction) -> list[str]:
    return [s.name for s in found.stages]


def test_an_explained_victim_is_not_attacked_again_while_others_are(suite):
    stack = sent(victims=4)
    fakes = suite(stack, linear={"knows": (2,)}, rgap={"knows": (0, 3)})
    found = Auto(budget=200.0)(seen_of(stack), rngs(4), nothing)
    expected = {"linear": [0, 1, 2, 3], "april": [0, 1, 3], "rgap": [0, 1, 3], "spear": [1]}
    expected |= {"cocktail": [1], "candidates": [1], "lti": [1], "match": [1]}
    assert {name: saw(fakes[name]) for name in expected} == {k: [v] for k, v in expected.items()}
    assert saw(fakes["unmix"]) == [], "nothing is mixed"
    assert names(found) == ["labels", *expected]
    images, _ = told(stack)
    assert [torch.equal(found.images[v], images[v]) for v in range(4)] == [True, False, True, True]


def test_once_all_are_explained_it_ends(suite):
    stack = sent()
    suite(stack, april={"knows": (0, 1)})
    assert names(Auto(budget=60.0)(seen_of(stack), rngs(2), nothing)) == [
        "labels",
        "linear",
        "april",
    ]


@pytest.mark.parametrize(("budget", "runs"), [(39.0, [False]), (60.0, [0, 1]), (120.0, [True])])
@pytest.mark.parametrize("name", ["rgap", "candidates", "lti"])
def test_what_may_cost_more_than_half_of_what_is_left_is_left_out(suite, name, budget, runs):
    stack = sent(victims=1)
    unit = cost.update_gflop(stack[0].model, 1, SHAPE)
    suite(stack, **{name: {"dear": 20 * unit}})
    found = Auto(budget=budget)(seen_of(stack), rngs(1), nothing)
    before = NAMES[: NAMES.index(name)]
    spent = sum(float(s.gflop[0]) for s in found.stages if s.name in ("labels", *before))
    assert (name in names(found)) == (spent + 40 * unit <= budget * unit)
    assert (name in names(found)) in runs
    assert set(names(found)) >= {*before}


GRANTS = {
    BARE: ("candidates", "lti"),
    (*BARE, "aux"): ("candidates",),
    (*BARE, "candidates"): ("lti",),
    (*SERVER, "aux", "candidates"): (),
}


@pytest.mark.parametrize("grants", GRANTS)
def test_fewer_facts_mean_fewer_stages(suite, grants):
    """A fake reads all that it needs: what is withheld would raise."""
    pool = Batch(torch.rand(4, *SHAPE), torch.eye(CLASSES)[:4])
    stack = sent(aux=pool, candidates=pool)
    needs = {"candidates": {"needs": frozenset({*BARE, "candidates"})},
             "lti": {"needs": frozenset({*BARE, "aux"})}}  # fmt: skip
    suite(stack, **needs)
    found = Auto(budget=200.0)(seen_of(stack, *grants), rngs(2), nothing)
    expected = [name for name in NAMES[:-1] if name not in GRANTS[grants]]
    assert names(found) == ["labels", *expected, "match"]


@pytest.mark.parametrize("defense", [PRUNE, noise(1e-3), SIGN, Compose([noise(1e-3), SIGN])])
def test_equations_are_not_solved_where_they_are_known_not_to_hold(suite, defense):
    stack = sent(defense)
    suite(stack)
    some = [n for n in NAMES[:-1] if n not in ("april", "rgap", "spear", "cocktail")]
    found = Auto(budget=200.0)(seen_of(stack), rngs(2), nothing)
    assert names(found) == ["labels", *some, "match"]
    unknowing = Auto(budget=200.0)(seen_of(stack, *BARE), rngs(2), nothing)
    assert names(unknowing) == ["labels", *NAMES[:-1], "match"]


def test_images_that_are_mixed_are_solved_for_where_that_is_known(suite):
    stack = sent(MIXUP, count=4)
    suite(stack)
    assert "unmix" in names(Auto(budget=100.0)(seen_of(stack), rngs(2), nothing))
    grants = [g for g in SERVER if g != "defense"]
    assert "unmix" not in names(Auto(budget=100.0)(seen_of(stack, *grants), rngs(2), nothing))


# ---- parts that it stands on, against twins -----------------------------------------------------


def same(one, other) -> bool:
    """Whether two facts are equal, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, nn.Module):
        return same(one.state_dict(), other.state_dict()) and one.training == other.training
    if isinstance(one, (Update, Batch)):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Compose):
        return repr(one.__dict__) == repr(other.__dict__)
    return one == other


@pytest.fixture(scope="module")
def stack() -> list[Exchange]:
    """Three exchanges that carry every fact, with what they share shared."""
    made = exchanges(victims=3)
    other = ConvNetSpec(width=2, mode="train").build(
        (3, 12, 12), 5, (0.5,) * 3, (0.25,) * 3, stream(1, "model")
    )
    return [
        replace(
            e,
            aux=made[0].aux,
            queries=((other, e.update),),
            history=(e.update, e.update),
            trained=replace(e.trained, mix=torch.rand(2, 2)),
        )
        for e in made
    ]


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("rows", [[0], [2], [0, 2], [2, 0, 1]])
def test_a_part_of_an_observation_is_that_of_those_victims_alone(stack, fact, rows):
    whole = seen_of(stack, fact)
    part = whole.of(rows)
    alone = seen_of([stack[v] for v in rows], fact)
    assert part.grants == alone.grants
    assert whole.unread == (fact,)
    assert same(getattr(part, fact), getattr(alone, fact))
    assert whole.unread == ()
    if fact not in SHARED and fact != "labels":
        others = seen_of([stack[(v + 1) % 3] for v in rows], fact)
        assert not same(getattr(part, fact), getattr(others, fact)), "else this could not fail"


@pytest.mark.parametrize("count", [1, 3])
def test_judged_equals_a_plain_gradients_cosine_and_terms(count):
    stack = sent(count=count)
    seen, (_, named) = seen_of(stack), told(stack)
    targets, images = F.one_hot(named, CLASSES).float(), torch.rand(2, count, *SHAPE)
    terms = (*smooth(seen), (0.1, engine.total_variation))
    search = engine.spectral(steps=1, lr=1.0, priors=terms)
    found = engine.judged(seen, targets, search, images)
    entries = sum(t.numel() for t in stack[0].update.tensors.values())
    for v, exchange in enumerate(stack):
        model = exchange.model
        loss = F.cross_entropy(model(images[v]), targets[v])
        weights = [p.requires_grad_() for p in model.parameters()]
        loss = F.cross_entropy(model(images[v]), targets[v])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        observed = torch.cat([t.flatten() for t in exchange.update.tensors.values()])
        z = (images[v] - 0.5) / 0.25
        tv = 0.003 * (1 + count * math.prod(SHAPE) / entries / 2)
        twin = 1 - F.cosine_similarity(gradient, observed, 0)
        twin = twin + tv * priors.double_opponents(z) + 0.1 * engine.total_variation(z)
        torch.testing.assert_close(found[v], twin.detach(), rtol=1e-4, atol=1e-5)


def test_fewer_known_entries_ask_for_more_smoothness():
    weights = []
    for defense in (NONE, PRUNE):
        seen = seen_of(sent(defense, victims=1))
        (_, term) = smooth(seen)[0]
        assert isinstance(term, engine.Informed)
        weights.append(float(term.facts["weight"]))
        known = sum(int((t != 0).sum()) for t in seen.update.tensors.values())
        assert weights[-1] == pytest.approx(0.003 * (1 + math.prod(SHAPE) / known / 2), rel=1e-3)
        (_, longer), *_ = smooth(seen, steps=600)
        assert isinstance(longer, engine.Informed)  # twice the steps: half of what steps ask for
        assert weights[-1] - float(longer.facts["weight"]) == pytest.approx(0.0015, rel=1e-3)
    assert weights[1] > weights[0]


@pytest.mark.parametrize("spec", [LeNetSpec(), ConvNetSpec(width=4), MLPSpec(hidden=(16,))])
@pytest.mark.parametrize("count", [1, 5])
def test_the_unit_is_a_backprop_of_a_real_batch(spec, count):
    (exchange,) = sent(spec=spec, victims=1, count=count)
    real = cost.backprop_gflop(exchange.model, exchange.batch)
    assert cost.update_gflop(exchange.model, count, SHAPE) == pytest.approx(real, rel=1e-12)


def test_the_unit_is_known_where_batchnorm_refuses_a_single_image():
    spec = MLPSpec(hidden=(16,), norm="batch")
    model = spec.build(SHAPE, CLASSES, MEAN, STD, stream(0, "model")).train()
    batch = Batch(torch.rand(4, *SHAPE), torch.eye(CLASSES)[:4])
    four = cost.backprop_gflop(model, batch)
    assert cost.update_gflop(model, 1, SHAPE) == pytest.approx(four / 4, rel=1e-9)


TINY = LTI(updates=40, shift=1, mirror=True, features=16, width=16, steps=20, batch=8, lr=1e-3)
DEAR = {
    "rgap": (RGAP(weight=0.1, iterations=200, residual=0.1), LeNetSpec(), ()),
    "rgap, a linear model": (
        RGAP(weight=0.1, iterations=200, residual=0.1), MLPSpec(hidden=(16,)), ()
    ),
    "candidates": (Candidates(classes=3), LeNetSpec(), ("candidates",)),
    "lti": (TINY, LeNetSpec(), ("aux",)),
    "lti, labels": (TINY, LeNetSpec(), ("aux", "labels")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "count", "local_steps"),
    [
        ("rgap", 1, 1),
        ("rgap, a linear model", 1, 1),
        ("candidates", 1, 1),
        ("candidates", 1, 4),
        ("candidates", 4, 1),
        ("lti", 1, 1),
        ("lti", 1, 4),
        ("lti", 4, 1),
        ("lti, labels", 1, 1),
    ],
)
def test_the_most_that_an_attack_may_cost_is_more_than_it_costs(case, count, local_steps):
    attack, spec, more = DEAR[case]
    pool = Batch(torch.rand(20, *SHAPE), torch.eye(CLASSES)[torch.arange(20) % CLASSES])
    stack = sent(spec=spec, count=count, aux=pool, candidates=pool)
    if local_steps > 1:
        local = FedAvg(lr=0.1, batch=count, steps=local_steps).local
        stack = [replace(e, local=local) for e in stack]
    seen = seen_of(stack, *SERVER, *more)
    found = attack(seen, rngs(2), nothing)
    assert (found.gflop > 0).all()
    assert float(found.gflop.max()) <= attack.gflop_at_most(seen)


# ---- what becomes of it -------------------------------------------------------------------------


def two_stages() -> tuple[Reconstruction, torch.Tensor]:
    """Of two victims: grey at first; then the first's images, the second is not tried."""
    truth = torch.rand(2, 2, *SHAPE)
    grey, near = torch.full_like(truth, 0.5), truth.flip(1) + 0.01  # in another order
    worse = near.clone()
    worse[0, 0] = 0.9  # the second original gets worse
    second = stage("b", [0.2, math.inf], [False, False], worse, gflop=6.0)
    third = stage("c", [0.3, 0.8], [True, False], near, gflop=2.0)
    stages = (stage("a", [0.5, 0.5], None, grey, gflop=4.0), second, third)
    loss, nothing_ = torch.tensor([0.3, 0.5]), torch.zeros(2, dtype=torch.long)
    labels = torch.zeros(2, 2, dtype=torch.long)
    spent = torch.tensor([12.0, 6.0], dtype=torch.float64)
    flags = (("one",), ())
    return Reconstruction(near, labels, loss, nothing_, spent, flags, stages), truth


def test_steps_by_hand():
    found, truth = two_stages()

    def db(guess, x) -> float:
        return -10 * math.log10(float((guess.double() - x.double()).square().mean()))

    x = truth[0]
    one, two = experiment._steps(found, 0, x, unit=2.0)
    assert [s.stage for s in one] == ["a", "b", "c"]
    grey = [db(torch.full_like(i, 0.5), i) for i in x]
    bad = db(torch.full_like(x[1], 0.9), x[1])
    assert [s.psnr for s in one] == pytest.approx([grey[0], 40, 40], abs=1e-3)
    assert [s.psnr for s in two] == pytest.approx([grey[1], bad, 40], abs=1e-3)
    assert [s.chosen_psnr for s in two] == [s.psnr for s in two]
    best = max(grey[1], bad)
    assert [s.best_psnr for s in two] == pytest.approx([grey[1], best, 40], abs=1e-3)
    assert [s.certified for s in one] == [False, False, True]
    assert [s.backprops for s in one] == [2.0, 3.0, 1.0]
    assert [s.seconds for s in one] == [4.0, 6.0, 2.0], "8, 12 and 4, shared by two images"

    for i, steps in enumerate(experiment._steps(found, 1, truth[1], unit=2.0)):
        grey = db(torch.full_like(truth[1, i], 0.5), truth[1, i])
        assert steps[1].psnr is None, "it did not run"
        assert [s.chosen_psnr for s in steps] == pytest.approx([grey] * 3, abs=1e-3)
        assert [s.best_psnr for s in steps] == pytest.approx([grey, grey, 40], abs=1e-3)
        assert steps[1].backprops == steps[1].seconds == 0
    assert experiment._steps(replace(found, stages=()), 0, truth[0], 1.0) == [[], []]


def test_stages_are_kept_and_come_back_equal(tmp_path):
    found, _ = two_stages()
    stack = sent(count=2)
    attacked = experiment._Attacked(stack, found, 3.0, None, {"peak_mb": "why"}, frozenset("ab"))
    resume.write(tmp_path / "a", *attacked.to_keep())
    read = resume.read(tmp_path / "a")
    assert read is not None
    back = experiment._Attacked.kept(stack, *read)
    for f in fields(Reconstruction):
        if f.name != "stages":
            assert same(getattr(back.found, f.name), getattr(found, f.name)), f.name
    assert len(back.found.stages) == 3
    for one, other in zip(back.found.stages, found.stages, strict=True):
        for f in fields(Stage):
            assert same(getattr(one, f.name), getattr(other, f.name)), f.name
    assert replace(back, found=found) == attacked


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_killed_attack_goes_on_to_the_same_stages(tmp_path, monkeypatch, share):
    monkeypatch.setattr(engine, "EVERY", 2)
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    seen, attack, heard = seen_of(sent()), Auto(budget=60.0), []
    whole = attack(seen, rngs(2), hearing(heard))
    looks = int(share * len(heard))
    with pytest.raises(Killed):
        attack(seen, rngs(2), kept(tmp_path, dying(looks)))
    again = []
    found = attack(seen, rngs(2), kept(tmp_path, hearing(again)))
    assert again[-len(heard) + looks :] == heard[looks:]
    assert len(again) < len(heard), "it went on where it was"
    for name in ("images", "labels", "loss", "steps", "gflop", "flags"):
        assert same(getattr(found, name), getattr(whole, name)), name
    for one, other in zip(found.stages, whole.stages, strict=True):
        assert all(same(v, vars(other)[k]) for k, v in vars(one).items() if k != "seconds")


LINE = ("attack=auto", "attack.budget=120", "defense=noise", "model=lenet", "images=2", "stack=1")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "EVERY", 5)
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    line = partial(tiny.words, tmp_path, *LINE, steps=0)
    assert tiny.call(monkeypatch, line(out="whole")) == 0
    heard, hear = [], resume.Kept.__call__

    def dying(self, step, steps, loss):
        heard.append(step)
        if len(heard) == looks:
            raise KeyboardInterrupt
        hear(self, step, steps, loss)

    looks = 10**9
    with monkeypatch.context() as patch:
        patch.setattr(resume.Kept, "__call__", dying)
        assert tiny.call(monkeypatch, line(out="heard")) == 0
        looks, whole = len(heard) - 2, len(heard)
        heard.clear()
        assert tiny.call(monkeypatch, line(out="killed")) == 130
        looks = 10**9
        heard.clear()
        assert tiny.call(monkeypatch, line(out="killed")) == 0
        assert 0 < len(heard) < whole / 4, "it went on where it was"
    rows = [tiny.numbers(tmp_path / out) for out in ("whole", "killed")]
    for step in (step for some in rows for row in some for step in row["stages"]):
        step.pop("seconds")
    assert len(rows[0]) == 4
    assert all(row["stages"][-1]["stage"] == "match" for row in rows[0])
    assert rows[0] == rows[1]


# ---- the report ---------------------------------------------------------------------------------


def step(name, psnr, chosen_psnr, best, sure=False, seconds=1.0, backprops=10.0) -> dict:
    return vars(
        records.Step(
            stage=name, psnr=psnr, chosen_psnr=chosen_psnr, best_psnr=best, certified=sure,
            seconds=seconds, backprops=backprops,
        )
    )  # fmt: skip


FIRST = (step("labels", 9.0, 9.0, 9.0), step("linear", 50.0, 50.0, 50.0, True, 2.0, 5.0))
SECOND = (step("labels", 11.0, 11.0, 11.0), step("linear", 14.0, 11.0, 14.0, False, 4.0, 5.0),
          step("match", 13.0, 13.0, 14.0, False, 8.0, 100.0))  # fmt: skip


def staged_rows() -> list[records.Row]:
    rows = []
    for victim, (psnr, stages) in enumerate(((50.0, FIRST), (13.0, SECOND))):
        oracle = stages[-1]["best_psnr"]
        more = {"attack": "auto", "stages": stages, "oracle_psnr": oracle, "stage": "match"}
        rows.append(_row("none", victim, psnr, **more))
    return rows


def test_numbers_by_stage_by_hand(tmp_path):
    runs = [records.read(_run(tmp_path / "a", staged_rows()))]
    (split,) = numbers.by_stage(numbers.scenarios(numbers.groups(runs)))
    assert split.names == tuple(f"none (control): {s}" for s in ("labels", "linear", "match"))
    labels, linear, matched = split.groups
    assert labels.psnr.mean == 10.0
    assert linear.psnr.mean == (50.0 + 11.0) / 2
    assert matched.psnr.mean == (50.0 + 13.0) / 2, "the first was explained before"
    uppers = [g.estimate("oracle_psnr").mean for g in split.groups]
    assert uppers == [10.0, (50.0 + 14.0) / 2, (50.0 + 14.0) / 2]
    assert [g.estimate("seconds").mean for g in split.groups] == [1.0, 4.0, 8.0]
    assert [g.estimate("backprops").mean for g in split.groups] == [10.0, 15.0, 65.0]
    assert [words._certified(g)[0] for g in split.groups] == ["0", "50", "50"]


def printed(*folders) -> str:
    out = io.StringIO()
    console.show([records.read(f) for f in folders], Console(file=out, width=400))
    return out.getvalue()


def test_the_stages_of_several_attacks_are_shown_and_nothing_of_others(tmp_path):
    staged = _run(tmp_path / "auto", staged_rows(), pictures=False)
    plain = _run(tmp_path / "plain", _rows("none", 20.0, 2), pictures=False)
    said = "stage by stage"
    for show in (printed, _page):
        assert said in show(staged).lower()
        assert "upper bound" in show(staged).lower()
        assert said not in show(plain).lower()
        both = show(staged, plain)
        assert said in both.lower()
        assert both.count(": linear") == 1
    lines = [line for line in printed(staged).splitlines() if ": " in line]
    (line,) = [line.split() for line in lines if "(control): linear" in line]
    assert "30.5" in line[3]


# ---- claims -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.setting)
def test_claims_hold(claim, photos):
    assert claim.least <= claim.measure(photos) <= claim.most


@pytest.fixture(scope="module")
def photos():
    from fedsec.data import Photos

    return Photos().load()


def test_the_best_by_the_truth_is_no_worse_than_what_is_believed():
    stack = sent()
    images, _ = told(stack)
    found = Auto(budget=100.0)(seen_of(stack), rngs(2), nothing)
    for v, exchange in enumerate(stack):
        (steps,) = experiment._steps(found, v, exchange.batch.images, 1.0)
        guess = found.images[v]
        own = float(metrics.psnr(guess[match(guess, images[v])], images[v]))
        assert steps[-1].chosen_psnr == pytest.approx(own, abs=1e-4)
        assert (steps[-1].best_psnr or 0) >= own - 1e-4

"""What else attacks by matching add to the distance: against plain formulas and plain autograd."""

from dataclasses import replace

import pytest
import torch
from test_engine import CLASSES, GRADIENT, SHAPE, built, nothing, observed, private, rngs, signed
from torch.nn import functional as F

from attacks.fedavg import _averaged, _epochs
from defenses.clip import Clip
from defenses.dpsgd import DPSGD
from defenses.noise import Noise
from defenses.prune import Prune
from defenses.quantize import Quantize
from defenses.sign import Sign
from fedsec import engine, priors, rules
from fedsec.client import FedAvg, Gradient, client_streams, local_update
from fedsec.defense import Compose
from fedsec.models import norm_stats
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local, Update

NORMED = ("mlp batch", "convnet", "resnet8", "resnet18")


def sent(model, batch, spec=None):
    """What a client's reply shows: update and running statistics after training on `batch`."""
    spec = spec or Gradient(lr=0.1, batch=len(batch))
    for p in model.parameters():
        p.requires_grad_(True)
    steps = [batch] * spec.local.steps
    streams = client_streams(0, 0, 0)
    update, _ = local_update(model, steps, Compose(()), spec.local, streams, len(batch))
    for p in model.parameters():
        p.requires_grad_(False)
    return update


def stacked(updates: list[Update]) -> Update:
    return Update(
        {k: torch.stack([u.tensors[k] for u in updates]) for k in updates[0].tensors},
        {k: torch.stack([u.buffers[k] for u in updates]) for k in updates[0].buffers},
        updates[0].count,
    )


def seen_of(model, batches, spec=None, **facts):
    update = stacked([sent(model, b, spec) for b in batches])
    local = (spec or Gradient(lr=0.1, batch=len(batches[0]))).local
    seen = observed(model, batches, update=update, buffers=update.buffers, **facts)
    seen._facts["local"] = local
    return seen


def value(prior: engine.Informed, images, victim: int):
    pixels = (images - 0.5) / 0.25
    with torch.no_grad():
        return float(prior.of(pixels, {k: t[victim] for k, t in prior.facts.items()}))


# ---- BatchNorm statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NORMED)
def test_exact_statistics_are_met_by_the_true_images_alone(name, mode):
    """Mishap 5: a biased against an unbiased variance left 1.12 at the true image."""
    model, batches = built(name, mode), [private(3, seed=v) for v in range(2)]
    each = [norm_stats(model, b.images) for b in batches]
    layers = range(len(each[0]))
    exact = [tuple(torch.stack([e[i][j] for e in each]) for j in (0, 1)) for i in layers]
    prior = priors.same_statistics(seen_of(model, batches, norm_stats=exact), "exact")
    assert prior is not None
    for v in range(2):
        assert value(prior, batches[v].images, v) < 1e-4
        assert value(prior, batches[1 - v].images, v) > 1e-2


@pytest.mark.parametrize("name", NORMED)
def test_statistics_inferred_after_a_step_in_train_mode_are_exact(name):
    model, batches = built(name, "train"), [private(3, seed=v) for v in range(2)]
    before = {k: b.clone() for k, b in model.named_buffers()}
    found = priors._inferred(seen_of(model, batches))
    for v, batch in enumerate(batches):
        for (mean, var), (m, s) in zip(found, norm_stats(model, batch.images), strict=True):
            torch.testing.assert_close(mean[v], m)
            torch.testing.assert_close(var[v], s)
    for k, b in model.named_buffers():
        assert torch.equal(b, before[k]), "the attack changes nothing of the model"


def test_statistics_inferred_after_several_steps_are_those_of_steps_that_were_alike():
    """With a step length of nothing all local steps see the same statistics."""
    model, batch = built("resnet8", "train"), private(4)
    seen = seen_of(model, [batch], FedAvg(lr=1e-12, batch=4, steps=5))
    found = priors._inferred(seen)
    for (mean, var), (m, s) in zip(found, norm_stats(model, batch.images), strict=True):
        torch.testing.assert_close(mean[0], m, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(var[0], s, rtol=1e-4, atol=1e-6)


def test_where_nothing_moves_the_running_averages_stand_in():
    model, batch = built("resnet8", "eval"), private(3)
    seen = seen_of(model, [batch])
    pairs = zip(priors._inferred(seen), priors._running(seen), strict=True)
    for (mean, var), (m, s) in pairs:
        torch.testing.assert_close(mean, m)
        torch.testing.assert_close(var, s)


def test_a_model_without_batch_norm_has_no_statistics():
    assert priors.same_statistics(seen_of(built("lenet"), [private(2)]), "inferred") is None


@pytest.mark.parametrize("name", ["mlp batch", "resnet8"])
def test_the_engine_tells_each_lane_of_its_own_victim(name):
    """Stacked priors against plain autograd on one lane at a time."""
    model, batches = built(name, "train"), [private(2, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = seen_of(model, batches)
    same = priors.same_statistics(seen, "inferred")
    assert same is not None
    search = signed(1, restarts=2, priors=((0.3, same), (0.2, priors.length)))
    lanes = engine._Lanes(seen, targets, search)
    bare = engine._Lanes(seen, targets, replace(search, priors=()))
    x, active = torch.randn(3, lanes.pixels, dtype=torch.float64), torch.tensor([0, 2, 3])
    (loss, gradient), (own, slope) = lanes.objective(x, active), bare.objective(x, active)
    by_autograd = lanes.by_autograd(x, active)
    torch.testing.assert_close(by_autograd[0], loss)
    torch.testing.assert_close(by_autograd[1], gradient)
    for i, victim in enumerate((0, 1, 1)):
        z = x[i].reshape(2, *SHAPE).clone().requires_grad_()
        found = norm_stats(model, z * 0.25 + 0.5)
        wanted = norm_stats(model, batches[victim].images)
        gaps = [(a - b).norm() for got, true in zip(found, wanted, strict=True)
                for a, b in zip(got, true, strict=True)]  # fmt: skip
        term = 0.3 * torch.stack(gaps).sum() + 0.2 * z.square().mean()
        (more,) = torch.autograd.grad(term, z)
        torch.testing.assert_close(loss[i] - own[i], term.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient[i] - slope[i], more.flatten(), rtol=1e-6, atol=1e-9)


# ---- labels, smoothness -------------------------------------------------------------------------


def test_the_label_regulariser_vanishes_where_the_model_says_the_labels():
    model, batch = built("lenet"), private(2)
    with torch.no_grad():
        said = model(batch.images).softmax(-1)
    seen = observed(model, [batch])
    assert value(priors.same_labels(seen, said[None]), batch.images, 0) < 1e-12
    away = priors.same_labels(seen, batch.targets[None])
    expected = (said - batch.targets).square().sum(1).mean()
    assert value(away, batch.images, 0) == pytest.approx(float(expected))


def test_double_opponents_count_each_edge_of_channels_and_of_their_differences():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    lengths = []
    for image in x:
        for plane in (*image, image[1] - image[0], image[2] - image[0], image[2] - image[1]):
            for i in range(3):
                for j in range(4):
                    down, across = plane[i + 1, j] - plane[i, j], plane[i, j + 1] - plane[i, j]
                    lengths.append((down**2 + across**2 + 1e-8).sqrt())
    assert float(priors.double_opponents(x)) == pytest.approx(float(torch.stack(lengths).mean()))
    grey = priors.double_opponents(torch.rand(1, 1, 4, 4))
    assert grey > 0, "one channel has no opponents"


def test_noise_that_the_defense_publishes_asks_for_more_smoothness():
    model, batches = built("lenet"), [private(1, seed=v) for v in range(2)]
    seen = observed(model, batches, local=GRADIENT)
    assert len(priors.smooth(seen, 0.1)) == 1, "nothing is known"
    seen._facts["defense"] = Compose((Prune(ratio=0.5),))
    assert len(priors.smooth(seen, 0.1)) == 1, "it has no noise"
    seen._facts["defense"] = Compose((Noise(std=0.01, distribution="laplace"),))
    (weight, _), (more, noisy) = priors.smooth(seen, 0.1)
    assert (weight, more) == (engine.Fade(10.0, 0.1), priors.NOISY), "and it does not fade"
    assert priors.smooth(seen, 0.1, fade=1.0)[0][0] == 0.1
    assert priors.smooth(seen, 0.0)[0][0] == 0.0
    assert isinstance(noisy, engine.Informed)
    rows = [[t[v].flatten() for t in seen.update.tensors.values()] for v in range(2)]
    shares = [1e-4 * len(torch.cat(row)) / torch.cat(row).square().sum() for row in rows]
    torch.testing.assert_close(noisy.facts["share"], torch.stack(shares))
    x = torch.randn(1, *SHAPE, dtype=torch.float64)
    term = noisy.of(x, {"share": shares[0]})
    torch.testing.assert_close(term, shares[0] * engine.total_variation(x))
    seen._facts["defense"] = Noise(std=1e9, distribution="gaussian")
    share = priors.noise_share(seen)
    assert share is not None
    assert share.tolist() == [1.0, 1.0]


# ---- the group ----------------------------------------------------------------------------------


def test_restarts_are_drawn_to_the_mean_of_their_own_victim():
    model, batches = built("mlp"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = observed(model, batches)
    alone = engine._Lanes(seen, targets, signed(1, restarts=3))
    group = engine._Lanes(seen, targets, signed(1, restarts=3, group=0.7))
    active = torch.tensor([0, 2, 3, 4, 5])  # the second lane has retired
    x = torch.randn(5, alone.pixels, dtype=torch.float64)
    (one, g1), (two, g2) = alone.objective(x, active), group.objective(x, active)
    z = x.clone().requires_grad_()
    for rows in ([0, 1], [2, 3, 4]):
        apart = z[rows] - z[rows].mean(0)
        own = 0.7 * apart.square().mean(1)
        torch.testing.assert_close((two - one)[rows], own.detach())
        (pull,) = torch.autograd.grad(own.sum(), z, retain_graph=True)
        torch.testing.assert_close((g2 - g1)[rows], pull[rows])


def test_a_strong_group_ends_at_one_image():
    model, batch = built("lenet"), private(1)
    seen = observed(model, [batch])
    spreads = []
    for weight in (0.0, 100.0):
        search = signed(60, restarts=3, group=weight, rule=rules.Adam(lr=0.1), priors=())
        lanes = engine._Lanes(seen, batch.targets[None], search)
        state, x = search.rule.start(lanes.begin(rngs(1))), lanes.begin(rngs(1))
        for step in range(60):
            _, gradient = lanes.objective(x, torch.arange(3))
            move, state, _ = search.rule.step(gradient, state, step, 1.0)
            x = x + move
        spreads.append(float((x - x.mean(0)).abs().mean()))
    assert spreads[1] < spreads[0] / 10


# ---- what is compared ---------------------------------------------------------------------------


def test_relative_is_squared_over_the_observed_length():
    model, batches = built("lenet"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = observed(model, batches)
    x, active = torch.randn(2, 432, dtype=torch.float64), torch.arange(2)
    plain, relative = (
        engine._Lanes(seen, targets, signed(1, distance=d, priors=()))
        for d in (engine.squared, engine.relative)
    )
    assert relative.swept is not None
    squares = [t.flatten(1).square().sum(1) for t in seen.update.tensors.values()]
    whole = torch.stack(squares).sum(0)
    (one, g1), (two, g2) = plain.objective(x, active), relative.objective(x, active)
    torch.testing.assert_close(two, one / whole)
    torch.testing.assert_close(g2, g1 / whole[:, None])
    torch.testing.assert_close(relative.by_autograd(x, active)[0], two)
    torch.testing.assert_close(relative.by_autograd(x, active)[1], g2)


def test_under_a_mask_only_what_was_sent_is_compared():
    model, batch = built("lenet"), private(1)
    seen = observed(model, [batch])
    for tensor in seen.update.tensors.values():
        tensor[tensor.abs() < tensor.abs().median()] = 0
    seen._facts["defense"] = Compose((Prune(ratio=0.5),))
    lanes = engine._Lanes(seen, batch.targets[None], signed(1, priors=()))
    x = torch.randn(1, lanes.pixels, dtype=torch.float64)
    guess = engine.simulate(model, lanes.images(x)[0], batch.targets, GRADIENT)
    goal = torch.cat([t[0].flatten() for t in seen.update.tensors.values()])
    flat = torch.cat([guess[k].flatten() for k in seen.update.tensors]) * (goal != 0)
    expected = 1 - F.cosine_similarity(flat, goal, 0)
    loss, _ = lanes.objective(x, torch.zeros(1, dtype=torch.long))
    assert float(loss) == pytest.approx(float(expected), rel=1e-9)
    truth = ((batch.images - 0.5) / 0.25).reshape(1, -1)
    assert float(lanes.objective(truth, torch.zeros(1, dtype=torch.long))[0]) < 1e-12


TRANSFORMS = {
    "sign": Sign(scale="mean"),
    "nearest": Quantize(bits=3, rounding="nearest"),
    "drawn": Quantize(bits=2, rounding="stochastic"),
    "clip": Clip(norm=0.1),
    "prune-sign": Compose([Prune(ratio=0.5), Sign(scale="one")]),
    "clip-prune": Compose([Clip(norm=0.1), Prune(ratio=0.5)]),
    "prune-noise": Compose([Prune(ratio=0.5), Noise(std=1e-9, distribution="gaussian")]),
}


def known_to(defense, model, batches, local=GRADIENT, **more):
    """Lanes that know the defense behind what they see, and its updates."""
    seen = observed(model, batches, local)
    seen._facts["local"] = local
    for v in range(len(batches)):
        alone = Update({k: t[v] for k, t in seen.update.tensors.items()}, {}, 1)
        for k, t in defense.update(alone, stream(0, v)).tensors.items():
            seen.update.tensors[k][v] = t
    blind = Observation("blind", dict(seen._facts))
    seen._facts["defense"] = defense
    targets, search = torch.stack([b.targets for b in batches]), signed(1, priors=(), **more)
    return engine._Lanes(seen, targets, search), engine._Lanes(blind, targets, search)


@pytest.mark.parametrize("local", [GRADIENT, Local("fedavg", 0.1, 3, 2)], ids=["one", "steps"])
@pytest.mark.parametrize("distance", [engine.cosine, engine.squared])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_match_goes_through_what_the_defense_does(name, distance, local, monkeypatch):
    """The true images explain what was sent of them; the way is as without a defense."""
    defense, model = TRANSFORMS[name], built("lenet")
    batches = [private(2, seed=v) for v in range(2)]
    lanes, naive = known_to(defense, model, batches, local, distance=distance)
    active = torch.arange(2)
    truth = torch.stack([((b.images - 0.5) / 0.25).flatten() for b in batches])
    assert float(lanes.objective(truth, active)[0].max()) < 1e-12
    if not (name == "clip" and distance is engine.cosine):
        assert float(naive.objective(truth, active)[0].min()) > 1e-6

    x = torch.randn(2, lanes.pixels, dtype=torch.float64)
    found = lanes.objective(x, active)
    assert (lanes.swept is None) == (local.kind == "fedavg"), "no double backward"
    for mine, plain in zip(found, lanes.by_autograd(x, active), strict=True):
        torch.testing.assert_close(mine, plain)
    for lane in active:  # the twin: a straight line through the point that is compared
        z = x[lane].clone().requires_grad_()
        images, targets = z.view(2, *SHAPE) * 0.25 + 0.5, batches[lane].targets
        guess = engine.simulate(model, images, targets, local)
        told = {k: t[lane] for k, t in lanes.observed.items()}
        mild = [p for p in getattr(defense, "parts", (defense,)) if not isinstance(p, Noise)]
        given = None if name == "prune-noise" else told
        made = Compose(mild).expected({k: g.detach() for k, g in guess.items()}, given)
        made = {k: m.clone().requires_grad_() for k, m in made.items()}
        loss = distance(made, told)
        slopes = torch.autograd.grad(loss, list(made.values()))
        flat = (torch.cat([t.detach().flatten() for t in d.values()]) for d in (made, guess))
        ratio = float(next(flat).norm() / next(flat).norm())
        along = sum((guess[k] * s).sum() for k, s in zip(made, slopes, strict=True))
        (slope,) = torch.autograd.grad(ratio * along, z)
        torch.testing.assert_close(found[0][lane], loss.detach())
        torch.testing.assert_close(found[1][lane], slope)


def test_a_direction_needs_to_know_of_no_length():
    """Exactly the search that knows of no clipping, in the fast path."""
    for distance, same in ((engine.cosine, True), (engine.squared, False)):
        known, naive = known_to(Clip(norm=0.1), built("lenet"), [private(1)], distance=distance)
        assert (known.distance is naive.distance) == same


def test_without_a_straight_line_signs_lead_nowhere(monkeypatch):
    """The broken twin: the derivative of a sign is zero, but for its scale's."""

    def honest(defense, distance):
        return lambda guess, observed: distance(defense.expected(guess, observed), observed)

    x, active = torch.randn(1, 432, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    lanes, _ = known_to(Sign(scale="one"), built("lenet"), [private(1)])
    assert lanes.objective(x, active)[1].abs().max() > 0
    monkeypatch.setattr(engine, "through", honest)
    lanes, _ = known_to(Sign(scale="one"), built("lenet"), [private(1)])
    assert lanes.objective(x, active)[1].abs().max() == 0


def test_clipped_examples_and_a_rounded_sum_are_matched_together():
    """What one does to examples and what the other does to their sum: both, in that order."""
    model, batch = built("lenet"), private(3)
    clip, sign = DPSGD(clip=0.5, noise_multiplier=0.0, delta=1e-5), Sign(scale="mean")
    sums = clip.gradients(model, batch, stream(0, "noise"), 3)
    seen = observed(model, [batch])
    for k, t in sign.expected(sums).items():
        seen.update.tensors[k][0] = t
    truth = ((batch.images - 0.5) / 0.25).reshape(1, -1)
    for parts, least, most in (([clip, sign], 0, 1e-12), ([clip], 1e-3, 2), ([sign], 1e-9, 2)):
        seen._facts["defense"] = Compose(parts)
        lanes = engine._Lanes(seen, batch.targets[None], signed(1, priors=()))
        loss = float(lanes.objective(truth, torch.zeros(1, dtype=torch.long))[0])
        assert least <= abs(loss) <= most, parts


@pytest.mark.parametrize("distance", [engine.cosine, engine.squared])
def test_clipping_is_matched_example_by_example(distance):
    """What DP-SGD without noise sends of a batch is met by the true images, and by a twin."""
    model, batch = built("lenet"), private(3)
    clip = DPSGD(clip=0.5, noise_multiplier=0.0, delta=1e-5)
    sums = clip.gradients(model, batch, stream(0, "noise"), 3)
    seen = observed(model, [batch])
    for k, t in sums.items():
        seen.update.tensors[k][0] = t
    search = signed(1, distance=distance, priors=())
    naive = engine._Lanes(seen, batch.targets[None], search)
    seen._facts["defense"] = Compose((clip,))
    lanes = engine._Lanes(seen, batch.targets[None], search)
    active = torch.zeros(1, dtype=torch.long)
    truth = ((batch.images - 0.5) / 0.25).reshape(1, -1)
    assert float(lanes.objective(truth, active)[0]) < 1e-12
    assert float(naive.objective(truth, active)[0]) > 1e-6
    x = torch.randn(1, lanes.pixels, dtype=torch.float64).requires_grad_()
    each = [engine.simulate(model, (x.reshape(3, *SHAPE) * 0.25 + 0.5)[i, None],
                            batch.targets[i, None], GRADIENT) for i in range(3)]  # fmt: skip
    total = {k: torch.zeros(()) for k in sums}
    for one in each:
        norm = torch.cat([g.flatten() for g in one.values()]).norm()
        total = {k: total[k] + g * (0.5 / norm).clamp(max=1) / 3 for k, g in one.items()}
    expected = distance(total, sums)
    (slope,) = torch.autograd.grad(expected, x)
    loss, gradient = lanes.objective(x.detach(), active)
    torch.testing.assert_close(loss[0], expected.detach())
    torch.testing.assert_close(gradient, slope)


def test_one_clipped_example_is_matched_by_the_fast_path():
    """Its direction is the same, and the cosine asks for no more."""
    model, batch = built("lenet"), private(1)
    seen = observed(model, [batch])
    seen._facts["defense"] = DPSGD(clip=0.5, noise_multiplier=1.0, delta=1e-5)
    assert engine._Lanes(seen, batch.targets[None], signed(1)).per_example is None
    squared = signed(1, distance=engine.squared)
    assert engine._Lanes(seen, batch.targets[None], squared).per_example is not None


def test_a_surrogate_lies_between_the_weights_before_and_after():
    model, batch = built("mlp"), private(3)
    local = FedAvg(lr=0.1, batch=3, steps=4)
    update = sent(model, batch, local).tensors
    start = engine.simulate(model, batch.images, batch.targets, GRADIENT)
    zero, one = torch.zeros(()), torch.ones(())
    at_start = engine.surrogate(model, batch.images, batch.targets, update, zero)
    at_end = engine.surrogate(model, batch.images, batch.targets, update, one)
    with torch.no_grad():
        for k, p in model.named_parameters():
            p -= update[k]
    end = engine.simulate(model, batch.images, batch.targets, GRADIENT)
    for k in update:
        torch.testing.assert_close(at_start[k], start[k])
        torch.testing.assert_close(at_end[k], end[k])


def test_a_point_on_the_way_matches_better_than_the_start_at_the_true_images():
    """Zhu et al. 2023, section 3: what SME rests on."""
    model, batch = built("mlp"), private(4)
    seen = seen_of(model, [batch], FedAvg(lr=0.3, batch=4, steps=8))
    update = {k: t[0] for k, t in seen.update.tensors.items()}
    at = torch.linspace(0, 1, 11, dtype=torch.float64)
    apart = [
        engine.cosine(engine.surrogate(model, batch.images, batch.targets, update, a), update)
        for a in at
    ]
    best = int(torch.stack(apart).argmin())
    assert 0 < best < 10
    assert apart[best] < apart[0] / 3


def test_a_surrogates_point_is_searched_for_and_stays_on_the_way():
    model, batch = built("mlp"), private(2)
    spec = FedAvg(lr=0.3, batch=2, steps=6)
    seen = seen_of(model, [batch], spec)
    search = signed(1, surrogate=True, priors=())
    lanes = engine._Lanes(seen, batch.targets[None], search)
    x = lanes.begin(rngs(1))
    assert x.shape[1] == lanes.pixels + 1
    truth = torch.cat([((batch.images - 0.5) / 0.25).reshape(1, -1), x.new_zeros(1, 1)], 1)
    _, gradient = lanes.objective(truth, torch.zeros(1, dtype=torch.long))
    assert gradient[0, -1] != 0
    beyond = truth.clone()
    beyond[0, -1] = 1e6
    loss, slope = lanes.objective(beyond, torch.zeros(1, dtype=torch.long))
    assert loss.isfinite().all()
    assert slope[0, -1] == 0
    found = engine.match(seen, batch.targets[None], replace(search, steps=5), rngs(1), nothing)
    assert found.images.shape == (1, 2, *SHAPE)


# ---- starts, schedules, steps -------------------------------------------------------------------


def test_a_tiled_start_repeats_its_first_square():
    model, batch = built("lenet"), private(2)
    seen = observed(model, [batch])
    lanes = engine._Lanes(seen, batch.targets[None], signed(1, tile=5, boxed=False))
    start = lanes._normalised(lanes.begin(rngs(1)))[0]
    for i in range(12):
        for j in range(12):
            assert torch.equal(start[..., i, j], start[..., i % 5, j % 5])
    assert not torch.equal(start[0], start[1])
    assert start[0, 0, :5, :5].unique().numel() == 25


def test_warming_rises_and_then_leaves_the_schedule_as_it_is():
    schedule = rules.warmed(rules.anneal(100), 10)
    plain = rules.anneal(100)
    assert schedule(0) == pytest.approx(0.1 * plain(0))
    assert schedule(4) == pytest.approx(0.5 * plain(4))
    assert [schedule(s) for s in (9, 50, 100)] == [plain(s) for s in (9, 50, 100)]


def test_a_soft_sign_goes_from_nearly_the_sign_to_the_gradient():
    rule = rules.Adam(lr=1.0, soft=10, betas=(0.0, 0.0), eps=1e30)  # the move is -g / eps
    gradient = torch.tensor([[1.0, -2.0, 0.1, 0.0]])
    unit = gradient / gradient.square().mean().sqrt()
    for step, share in ((0, 1.0), (5, 0.5), (10, 1e-3)):
        move, _, _ = rule.step(gradient, rule.start(gradient), step, 1.0)
        torch.testing.assert_close(-1e30 * move, (share * unit).tanh() / share, rtol=1e-4, atol=0)


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "count", "epochs"),
    [
        (Local(kind="gradient", lr=1.0), 4, 1),
        (Local(kind="fedavg", lr=1.0, steps=2, batch=2), 4, 1),
        (Local(kind="fedavg", lr=1.0, steps=4, batch=2), 4, 2),
        (Local(kind="fedavg", lr=1.0, steps=5, batch=2), 4, 3),
        (Local(kind="fedavg", lr=1.0, steps=6, batch=0), 4, 6),
        (Local(kind="fedavg", lr=1.0, steps=6, batch=3), 4, 1),
        (Local(kind="fedavg", lr=1.0, steps=6, batch=2, parts=(2, 2)), 4, 1),
    ],
)
def test_epochs_behind_an_update(local, count, epochs):
    seen = observed(built("mlp"), [private(count)], local=GRADIENT)
    seen._facts["local"] = local
    assert _epochs(seen) == epochs


def test_each_epoch_of_a_lane_is_what_the_client_saw_in_it():
    """Equal copies simulate the client that cycles over its chunks."""
    model, batch = built("mlp"), private(4)
    local = Local(kind="fedavg", lr=0.2, steps=4, batch=2)
    seen = observed(model, [batch], local)
    seen._facts["local"] = local
    lanes = engine._Lanes(seen, batch.targets[None], signed(1, copies=2, priors=()))
    truth = ((batch.images - 0.5) / 0.25).repeat(2, 1, 1, 1).reshape(1, -1)
    loss, _ = lanes.objective(truth, torch.zeros(1, dtype=torch.long))
    assert float(loss) < 1e-12


def test_epochs_are_matched_among_equal_labels_and_averaged():
    images = torch.rand(4, *SHAPE)
    labels = torch.tensor([0, 0, 1, 1])
    order = torch.tensor([1, 0, 3, 2])
    both = torch.stack([images, images[order] + 0.1])
    torch.testing.assert_close(_averaged(both, torch.stack([labels, labels])), images + 0.05)
    swapped = torch.stack([images, images[[2, 3, 0, 1]]])
    told = torch.stack([labels, labels[[2, 3, 0, 1]]])
    torch.testing.assert_close(_averaged(swapped, told), images)
    assert CLASSES > 1

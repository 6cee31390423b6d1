"""The matching engine against plain twins: autograd, torch.optim, one lane at a time."""

from dataclasses import replace

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from fedsec import cost, engine, priors, rules
from fedsec.client import FedAvg, Gradient, client_streams, local_update
from fedsec.defense import Compose
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ResNet18Spec, ResNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Local, Update

SHAPE, CLASSES = (3, 12, 12), 5
GRADIENT = Local(kind="gradient", lr=1.0)

MODELS = {
    "lenet": LeNetSpec(),
    "mlp": MLPSpec(hidden=(16, 16)),
    "mlp batch": MLPSpec(hidden=(16,), norm="batch"),
    "convnet": ConvNetSpec(width=2),
    "convnet group": ConvNetSpec(width=2, norm="group"),
    "resnet8": ResNetSpec(depth=8, width=4),
    "resnet18": ResNet18Spec(width=2),
}


def built(name: str, mode: str = "eval", seed: int = 0, dtype=torch.float64):
    model = MODELS[name].build(SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3, stream(seed, "model"))
    return model.to(dtype).train(mode == "train")


def private(count: int, seed: int = 0, dtype=torch.float64) -> Batch:
    rng = stream(seed, "private")
    images = torch.rand(count, *SHAPE, generator=rng).to(dtype)
    return Batch(images, torch.eye(CLASSES, dtype=dtype)[torch.randint(CLASSES, (count,))])


def observed(model, batches: list[Batch], local: Local = GRADIENT, **facts) -> Observation:
    updates = [engine.simulate(model, b.images, b.targets, local) for b in batches]
    stacked = {k: torch.stack([u[k] for u in updates]).detach() for k in updates[0]}
    for p in model.parameters():
        p.requires_grad_(False)
    known = {"model": model, "update": Update(stacked, {}, len(batches[0])), "shape": SHAPE}
    return Observation("test", known | {"count": len(batches[0]), "data_range": (0.0, 1.0)} | facts)


def nothing(step: int, steps: int, loss: float) -> None:
    pass


def rngs(victims: int, seed: int = 0):
    return [stream(seed, "attack", v) for v in range(victims)]


def signed(steps: int, **more) -> engine.Search:
    rule = rules.Adam(lr=0.1, signed=True)
    tv = ((1e-2, engine.total_variation),)
    search = {"distance": engine.cosine, "rule": rule, "steps": steps, "priors": tv, "boxed": True}
    return engine.Search(**(search | more))


# ---- the simulated update -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_simulate_equals_what_a_client_sends(name, mode):
    model, batch = built(name, mode), private(3)
    for spec in (Gradient(lr=0.1, batch=3), FedAvg(lr=0.1, batch=3, steps=3)):
        steps = [batch] * spec.local.steps
        rng = client_streams(0, 0, 0, "train")
        sent, _ = local_update(model, steps, Compose(()), spec.local, rng, 3)
        guess = engine.simulate(model, batch.images, batch.targets, spec.local)
        assert guess.keys() == sent.tensors.keys()
        for k in guess:
            torch.testing.assert_close(guess[k], sent.tensors[k], rtol=1e-9, atol=1e-12)


def test_simulate_cycles_over_chunks_as_a_probe_does():
    model, batch = built("mlp"), private(4)
    local = Local(kind="fedavg", lr=0.2, steps=3, batch=2)
    halves = [Batch(batch.images[i : i + 2], batch.targets[i : i + 2]) for i in (0, 2, 0)]
    sent, _ = local_update(model, halves, Compose(()), local, client_streams(0, 0, 0), 2)
    guess = engine.simulate(model, batch.images, batch.targets, local)
    for k in guess:
        torch.testing.assert_close(guess[k], sent.tensors[k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_lane_gradients_equal_a_plain_double_backward(name, mode):
    """The stacked objective and its gradient against autograd's create_graph, one lane a time."""
    model = built(name, mode)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    targets = private(2).targets
    seen = observed(model, [private(2, seed=v) for v in range(2)])
    search = signed(1, restarts=2)
    lanes = engine._Lanes(seen, targets.expand(2, -1, -1), search)
    x = torch.randn(4, lanes.pixels, dtype=torch.float64)
    loss, gradient = lanes.objective(x, torch.arange(4))

    for lane in range(4):
        z = x[lane].reshape(2, *SHAPE).clone().requires_grad_()
        params = [p.requires_grad_() for p in model.parameters()]
        out = F.cross_entropy(model(z * 0.25 + 0.5), targets)
        inner = torch.autograd.grad(out, params, create_graph=True)
        goal = [seen.update.tensors[k][lane // 2] for k, _ in model.named_parameters()]
        g, t = (torch.cat([p.flatten() for p in some]) for some in (inner, goal))
        twin = 1 - g @ t / (g.norm() * t.norm())
        twin = twin + 1e-2 * (
            (z[:, :, 1:] - z[:, :, :-1]).abs().mean() + (z[..., 1:] - z[..., :-1]).abs().mean()
        )
        (expected,) = torch.autograd.grad(twin, z)
        torch.testing.assert_close(loss[lane], twin.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(gradient[lane], expected.flatten(), rtol=1e-6, atol=1e-9)
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), f"the attack changed {k}"


# ---- distances and priors -----------------------------------------------------------------------


def test_cosine_is_zero_on_any_multiple_and_two_on_the_opposite():
    a = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    assert engine.cosine({k: 5 * v for k, v in a.items()}, a).abs() < 1e-6
    assert (engine.cosine({k: -v for k, v in a.items()}, a) - 2).abs() < 1e-6
    zero = {k: torch.zeros_like(v) for k, v in a.items()}
    assert engine.cosine(zero, a) == 1


def test_total_variation_by_hand():
    image = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    assert engine.total_variation(image) == (0 + 2) / 2 + (1 + 3) / 2
    assert engine.total_variation(torch.full((2, 3, 4, 4), 0.7)) == 0


def test_squared_is_the_sum_over_all_parameters():
    a = {"w": torch.ones(2, 2), "b": torch.zeros(2)}
    b = {"w": torch.zeros(2, 2), "b": torch.full((2,), 3.0)}
    assert engine.squared(a, b) == 4 + 18


def test_decay_follows_the_paper():
    factors = [rules.decay(80)(s) for s in range(80)]
    expected = [1.0] * 30 + [0.1] * 20 + [0.01] * 20 + [0.001] * 10
    assert factors == pytest.approx(expected)


# ---- step rules against torch.optim -------------------------------------------------------------


def rosenbrock(x):
    return ((1 - x[..., 0]) ** 2 + 10 * (x[..., 1] - x[..., 0] ** 2) ** 2).sum(-1)


def trajectory(rule, start, steps):
    x, state, path = start.clone(), rule.start(start), []
    for step in range(steps):
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rosenbrock(z).sum(), z)
        move, state, _ = rule.step(gradient, state, step, 1.0)
        x = x + move
        path.append(x.clone())
    return torch.stack(path, 1)


STARTS = torch.tensor([[-1.2, 1.0], [0.5, 0.3], [2.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("sign", [False, True])
def test_adam_equals_torch(sign):
    ours = trajectory(rules.Adam(lr=0.05, signed=sign), STARTS, 40)
    for lane, start in enumerate(STARTS):
        x = start.clone().requires_grad_()
        twin = torch.optim.Adam([x], lr=0.05)
        for step in range(40):
            twin.zero_grad()
            rosenbrock(x).backward()
            assert x.grad is not None
            x.grad = x.grad.sign() if sign else x.grad
            twin.step()
            torch.testing.assert_close(ours[lane, step], x.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("history", [3, 100])
def test_lbfgs_equals_torch(history):
    """Every iterate of each lane, also of lanes that skip a curvature pair at different times."""
    steps = 18
    ours = trajectory(rules.LBFGS(lr=0.3, history=history), STARTS, steps)
    for lane, start in enumerate(STARTS):
        x = start.clone().requires_grad_()
        twin = torch.optim.LBFGS(
            [x], lr=0.3, max_iter=1, history_size=history, tolerance_change=0, tolerance_grad=0
        )

        def closure(x=x, twin=twin):
            twin.zero_grad()
            loss = rosenbrock(x)
            loss.backward()
            return loss

        for step in range(steps):
            twin.step(closure)
            torch.testing.assert_close(ours[lane, step], x.detach(), rtol=1e-6, atol=1e-9)


def test_lbfgs_ignores_a_pair_without_curvature_in_its_lane_only():
    rule = rules.LBFGS()
    start = torch.zeros(2, 2, dtype=torch.float64)
    first = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    _, state, _ = rule.step(first, rule.start(start), 0, 1.0)
    # lane 0 sees the same gradient again, y = 0: no pair; lane 1 sees less of it
    second = torch.stack([first[0], 0.5 * first[1]])
    _, state, _ = rule.step(second, state, 1, 1.0)
    assert state["kept"][0].eq(0).all()
    assert state["kept"][1].gt(0).all()


def test_lbfgs_says_when_it_is_stuck():
    rule, x = rules.LBFGS(), torch.zeros(2, 3)
    gradient = torch.stack([torch.zeros(3), torch.ones(3)])
    _, _, stuck = rule.step(gradient, rule.start(x), 0, 1.0)
    assert stuck.tolist() == [True, False]


# ---- the loop -----------------------------------------------------------------------------------


def test_a_stack_equals_its_victims_one_by_one():
    model, batches = built("lenet"), [private(1, seed=v) for v in range(3)]
    targets = torch.stack([b.targets for b in batches])
    search = signed(30, restarts=2)
    together = engine.match(observed(model, batches), targets, search, rngs(3), nothing)
    for v in range(3):
        alone = observed(model, [batches[v]])
        one = engine.match(alone, targets[v : v + 1], search, [rngs(3)[v]], nothing)
        torch.testing.assert_close(together.images[v], one.images[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(together.loss[v], one.loss[0], rtol=1e-6, atol=1e-9)


class Overshooting(rules.Adam):
    """Leaves the best point on purpose."""

    def step(self, gradient, state, step, scale):
        move, state, stuck = super().step(gradient, state, step, scale)
        return (move if step < 5 else move + 3.0), state, stuck


def test_the_best_iterate_is_returned_not_the_last():
    model, batch = built("lenet"), private(1)
    seen, targets = observed(model, [batch]), batch.targets[None]
    short = signed(5, boxed=False, priors=(), spread=0.1)
    best = engine.match(seen, targets, short, rngs(1), nothing)
    rule = Overshooting(lr=0.1, signed=True)
    astray = signed(40, boxed=False, priors=(), rule=rule, spread=0.1)
    found = engine.match(seen, targets, astray, rngs(1), nothing)
    assert found.loss[0] <= best.loss[0]
    again = engine.simulate(model, found.images[0], batch.targets, GRADIENT)
    goal = {k: t[0] for k, t in seen.update.tensors.items()}
    assert found.images.min() > 0, "else clamping has moved it"
    assert found.images.max() < 1
    torch.testing.assert_close(engine.cosine(again, goal), found.loss[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [3, 48, 49, 101])
def test_a_curve_holds_what_shorter_searches_end_with(steps):
    """Each point of it, two restarts of two victims at once."""
    model, targets = built("mlp"), private(1).targets.expand(2, -1, -1)
    seen = observed(model, [private(1, seed=v) for v in range(2)])
    whole = engine.match(seen, targets, signed(steps, restarts=2), rngs(2), nothing)
    at, least = whole.curve.unbind(-1)
    assert len(at[0]) <= engine.POINTS
    assert at[0].tolist() == at[1].tolist()
    assert (at[0, 0], at[0, -1]) == (0, steps)
    torch.testing.assert_close(least[:, -1], whole.loss.double())
    for point in {1, len(at[0]) // 2, len(at[0]) - 2}:
        short = signed(int(at[0, point]), restarts=2)
        found = engine.match(seen, targets, short, rngs(2), nothing)
        torch.testing.assert_close(least[:, point], found.loss.double())


def test_a_curve_ends_with_its_search():
    seen = observed(built("mlp"), [private(1)])
    search = signed(200, enough=10.0)  # the first look is good enough
    found = engine.match(seen, private(1).targets[None], search, rngs(1), nothing)
    known = found.curve[0, :, 1].isfinite().tolist()
    assert known == sorted(known, reverse=True)
    assert 0 < sum(known) < len(known)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_reconstructions_can_reach_black_and_white(level):
    """The box is the data range, whatever normalisation the model uses (mishap 3)."""
    model = built("mlp")
    image = torch.full((1, *SHAPE), level, dtype=torch.float64)
    batch = Batch(image, torch.eye(CLASSES, dtype=torch.float64)[:1])
    smooth = ((1e-4, engine.total_variation),)
    search = signed(400, schedule=rules.decay(400), priors=smooth)
    found = engine.match(observed(model, [batch]), batch.targets[None], search, rngs(1), nothing)
    distance = (found.images - level).abs()
    assert distance.min() < 1e-6, "the limit itself is within reach"
    assert distance.max() < 0.1
    assert found.images.min() >= 0
    assert found.images.max() <= 1


def test_lanes_that_are_done_retire_and_cost_no_more():
    model, batches = built("mlp"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = observed(model, batches)
    rule = rules.LBFGS()
    search = engine.Search(distance=engine.squared, rule=rule, steps=400, enough=1e-3)
    found = engine.match(seen, targets, search, rngs(2), nothing)
    assert found.loss[0] <= 1e-3
    assert found.steps[0] < 400
    assert found.steps[1] == 400, "the other lane goes on"
    lanes, x = engine._Lanes(seen, targets, search), torch.randn(1, 432, dtype=torch.float64)
    per_step = cost.flops(lambda: lanes._plain_step(x))
    looks = found.steps + torch.tensor([0, 1])  # who ran out looks once more where it arrived
    torch.testing.assert_close(found.gflop, looks.double() * per_step)


def test_a_lane_that_breaks_is_flagged_and_harms_no_other():
    model, batches = built("mlp"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = observed(model, batches)
    for tensor in seen.update.tensors.values():
        tensor[0] = torch.nan
    found = engine.match(seen, targets, signed(30), rngs(2), nothing)
    assert found.flags[0] == ("1 of 1 restarts became non-finite",)
    assert found.flags[1] == ()
    assert found.images.isfinite().all()
    assert found.loss[1].isfinite()
    assert not found.loss[0].isfinite(), "no objective was ever finite: the row has none"


def test_the_cost_is_steps_times_one_counted_lane_step():
    model, batch = built("lenet"), private(2)
    seen, targets = observed(model, [batch]), batch.targets[None]
    found = engine.match(seen, targets, signed(7, restarts=3), rngs(1), nothing)
    lanes = engine._Lanes(seen, targets, signed(7))
    x = torch.randn(3, lanes.pixels, dtype=torch.float64)
    active = torch.zeros(3, dtype=torch.long)
    stacked = cost.flops(lambda: lanes.by_autograd(x, active))
    # eight looks: seven moves, and the evaluation of where the last one led
    assert found.gflop[0].item() == pytest.approx(8 * stacked, rel=1e-9)
    assert found.steps[0] == 7 * 3


def test_a_lane_step_computes_no_outer_weight_gradients():
    """7.1 plain forwards for LeNet at batch 1, not the 8.2 of a library that throws them away."""
    model = LeNetSpec().build((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    batch = Batch(torch.rand(1, 3, 32, 32), torch.eye(10)[:1])
    forward = cost.flops(lambda: model(batch.images))
    updates = engine.simulate(model, batch.images, batch.targets, GRADIENT)
    stacked = Update({k: v.detach()[None] for k, v in updates.items()}, {}, 1)
    for p in model.parameters():
        p.requires_grad_(False)
    seen = Observation("t", {"model": model, "update": stacked, "shape": (3, 32, 32), "count": 1})
    lanes = engine._Lanes(seen, batch.targets[None], signed(1))
    step = cost.flops(lambda: lanes._plain_step(torch.randn(1, 3072)))
    assert step / forward == pytest.approx(7.145, abs=0.01)


def test_joint_labels_are_what_was_optimised():
    """Mishap 10: not the argmax of the random start."""
    model, batches = built("lenet", dtype=torch.float32), []
    for v in range(4):
        rng = stream(v, "private")
        image = torch.rand(1, *SHAPE, generator=rng)
        batches.append(Batch(image, torch.eye(CLASSES)[[v % CLASSES]]))
    seen = observed(model, batches)
    search = engine.Search(distance=engine.squared, rule=rules.LBFGS(), steps=200)
    found = engine.match(seen, None, search, rngs(4), nothing)
    starts = [torch.randn(432 + CLASSES, generator=r)[432:].argmax().item() for r in rngs(4)]
    truth = [b.labels.item() for b in batches]
    assert starts != truth, "else this test could not fail"
    assert found.labels.flatten().tolist() == truth


def test_simulate_survives_vmap_over_lanes_with_local_steps():
    model, local = built("convnet", "train"), Local(kind="fedavg", lr=0.1, steps=2, batch=2)
    images = torch.rand(3, 2, *SHAPE, dtype=torch.float64)
    targets = private(2).targets
    stacked = vmap(lambda i: engine.simulate(model, i, targets, local))(images)
    for lane in range(3):
        one = engine.simulate(model, images[lane], targets, local)
        for k in one:
            torch.testing.assert_close(stacked[k][lane], one[k], rtol=1e-8, atol=1e-10)


def test_a_scaled_down_update_still_points_somewhere():
    """Scaling is no defense against a direction, also where float32 squares underflow."""
    model, batch = built("lenet", dtype=torch.float32), private(1, dtype=torch.float32)
    seen = observed(model, [batch])
    search = signed(3, direction=True)
    whole = engine.match(seen, batch.targets[None], search, rngs(1), nothing)
    for tensor in seen.update.tensors.values():
        tensor *= 1e-25
    small = engine.match(seen, batch.targets[None], search, rngs(1), nothing)
    torch.testing.assert_close(small.loss, whole.loss, rtol=1e-3, atol=1e-5)


def test_smoothness_of_a_single_pixel_is_zero():
    assert engine.total_variation(torch.rand(2, 3, 1, 1)) == 0


# ---- coordinates, and who goes on ---------------------------------------------------------------


@pytest.mark.parametrize("image", [(2, 3, 8, 8), (1, 1, 5, 7), (1, 2, 1, 1)])
def test_a_spectrum_is_the_inverse_cosine_transform_of_weighted_coefficients(image):
    from scipy.fft import idctn

    basis = rules.Spectrum(image, 1.5, torch.zeros(1, dtype=torch.float64))
    coefficients = torch.randn(3, *image, dtype=torch.float64)
    rows, columns = image[-2:]
    weights = torch.tensor(
        [
            [(rows * columns) ** 0.5 * (1 + (i * i + j * j) ** 0.5) ** -1.5 for j in range(columns)]
            for i in range(rows)
        ],
        dtype=torch.float64,
    )
    twin = torch.from_numpy(idctn((weights * coefficients).numpy(), axes=(-2, -1), norm="ortho"))
    if image[1] == 3:  # brightness, red against green, both against blue
        light, red, blue = twin.unbind(2)
        red, blue = red * 0.2 * 3**0.5 / 2**0.5, blue * 0.2 * 3**0.5 / 6**0.5
        twin = torch.stack([light + red + blue, light - red + blue, light - 2 * blue], 2)
    pixels = basis.outward(coefficients)
    torch.testing.assert_close(pixels, twin)
    slope = torch.randn_like(pixels)
    there, back = (pixels * slope).sum(), (coefficients * basis.inward(slope)).sum()
    torch.testing.assert_close(there, back)


def test_a_step_of_the_brightness_is_as_long_as_in_pixels():
    for channels, size in ((1, 8), (1, 32), (3, 8)):
        image = (1, channels, size, size)
        basis = rules.Spectrum(image, 1.5, torch.zeros(1, dtype=torch.float64))
        move = torch.zeros(image, dtype=torch.float64)
        move[:, 0, 0, 0] = 0.25
        torch.testing.assert_close(basis.outward(move), torch.full_like(move, 0.25))


# ---- weights that fall --------------------------------------------------------------------------


def test_a_weight_fades_by_the_same_factor_every_step():
    fade = engine.Fade(8.0, 0.5, over=0.5)
    assert [fade.at(s / 16) for s in (0, 2, 4, 8, 16)] == pytest.approx([8, 4, 2, 0.5, 0.5])


def test_a_search_whose_weight_fades_is_a_step_after_another_with_a_weight_each():
    model, batches = built("lenet"), [private(2, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = observed(model, batches)
    fade, rule = engine.Fade(3.0, 0.01), rules.Adam(lr=0.1)
    fading = signed(6, rule=rule, priors=((fade, priors.double_opponents), (0.1, priors.length)))
    found = engine.match(seen, targets, fading, rngs(2), nothing)

    active, best = torch.arange(2), torch.full((2,), torch.inf, dtype=torch.float64)
    x = engine._Lanes(seen, targets, fading).begin(rngs(2))
    state = rule.start(x)
    for step in range(7):
        weight = 3.0 * (0.01 / 3.0) ** min(1, step / 6 / 0.8)
        terms = ((weight, priors.double_opponents), (0.1, priors.length))
        lanes = engine._Lanes(seen, targets, replace(fading, priors=terms))
        loss, gradient = lanes.objective(x, active)
        best_x = x if step == 0 else torch.where((loss < best)[:, None], x, best_x)
        best = torch.minimum(best, loss)
        move, state, _ = rule.step(gradient, state, step, fading.schedule(step))
        x = lanes.boxed(x + move)
    torch.testing.assert_close(found.loss, best)
    torch.testing.assert_close(found.images, lanes.images(best_x).clamp(0, 1))
    constant = replace(fading, priors=((0.01, priors.double_opponents), (0.1, priors.length)))
    assert not torch.allclose(
        engine.match(seen, targets, constant, rngs(2), nothing).images, found.images, atol=1e-3
    )


def test_what_another_found_is_judged_by_the_last_weight():
    model, batch = built("lenet"), private(2)
    seen, images = observed(model, [batch]), torch.rand(1, 2, *SHAPE, dtype=torch.float64)
    search = signed(1, priors=((engine.Fade(3.0, 0.01), engine.total_variation),))
    last = replace(search, priors=((0.01, engine.total_variation),))
    targets = batch.targets[None]
    torch.testing.assert_close(
        engine.judged(seen, targets, search, images), engine.judged(seen, targets, last, images)
    )


def test_a_recorded_step_reads_its_weights_where_they_were():
    model, batch = built("lenet"), private(2)
    search = signed(4, priors=((engine.Fade(3.0, 0.01), engine.total_variation),))
    lanes = engine._Lanes(observed(model, [batch]), batch.targets[None], search)
    place, seen = lanes.faded.data_ptr(), []
    for step in range(3):
        lanes.weigh(step)
        seen.append(float(lanes.faded[0]))
    assert lanes.faded.data_ptr() == place
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 3.0


@pytest.mark.parametrize("known", [True, False])
def test_steps_in_a_spectrum_are_the_rules_on_its_coefficients(known):
    """One step against autograd with respect to the coefficients; label logits stay as they are."""
    model, batch = built("lenet"), private(2)
    targets = batch.targets[None] if known else None
    seen = observed(model, [batch])
    search = signed(1, rule=rules.Adam(lr=0.1), boxed=False, spectrum=1.0, priors=())
    lanes = engine._Lanes(seen, targets, search)
    start = torch.randn(1, lanes.pixels + 2 * CLASSES * (not known), dtype=torch.float64)
    basis = rules.Spectrum(lanes.image, 1.0, start)
    z = torch.zeros(1, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    own = torch.cat([basis.outward(z).flatten(1), torch.zeros_like(start[:, lanes.pixels :])], 1)
    moved = start + own
    images = moved[0, : lanes.pixels].reshape(2, *SHAPE) * 0.25 + 0.5
    told = batch.targets
    if not known:
        told = moved[0, lanes.pixels :].reshape(2, CLASSES).softmax(-1)
    goal = {k: t[0] for k, t in seen.update.tensors.items()}
    loss = engine.cosine(engine.simulate(model, images, told, GRADIENT), goal)
    (slope,) = torch.autograd.grad(loss, z)
    _, gradient = lanes.objective(start, torch.zeros(1, dtype=torch.long))
    inward = lanes.inward(gradient)
    torch.testing.assert_close(inward[:, : lanes.pixels].reshape(slope.shape), slope)
    torch.testing.assert_close(inward[:, lanes.pixels :], gradient[:, lanes.pixels :])


def test_smooth_images_are_found_in_fewer_steps_in_a_spectrum():
    model = built("lenet", seed=1)
    across, down = torch.linspace(0.2, 0.8, 12), torch.linspace(0.7, 0.3, 12)
    image = (across[None, :] * down[:, None]).expand(1, *SHAPE).double().contiguous()
    batch = Batch(image, torch.eye(CLASSES, dtype=torch.float64)[:1])
    seen = observed(model, [batch])
    rule = rules.Adam(lr=0.1, betas=(0.9, 0.9))
    errors = []
    for spectrum in (None, 1.5):
        search = signed(60, rule=rule, spectrum=spectrum, schedule=rules.anneal(60), spread=0.1)
        found = engine.match(seen, batch.targets[None], search, rngs(1), nothing)
        errors.append((found.images[0] - image).square().mean())
    assert errors[1] < errors[0] / 2


def test_annealing_ends_at_nothing():
    schedule = rules.anneal(10)
    assert [schedule(0), schedule(5), schedule(10)] == pytest.approx([1.0, 0.5, 0.0])


def test_successive_halving_ends_the_worse_restarts_of_each_victim():
    model, batches = built("lenet"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen = observed(model, batches)
    every = engine.match(seen, targets, signed(200, restarts=4), rngs(2), nothing)
    found = engine.match(seen, targets, signed(200, restarts=4, halving=True), rngs(2), nothing)
    # of four, two end after 25 steps and one after 50
    assert found.steps.tolist() == [25 + 25 + 50 + 200] * 2
    assert every.steps.tolist() == [800] * 2
    # who is left was the best after 50 steps, by the objective alone
    after = signed(50, restarts=4, schedule=rules.constant)
    assert found.loss.max() < engine.match(seen, targets, after, rngs(2), nothing).loss.min()


def test_which_lanes_halving_ends_follows_their_best_objective():
    best = torch.tensor([0.4, 0.1, torch.inf, 0.2, 3.0, 2.0, 1.0, 0.0])

    def go_on(left):
        return [i for i, worse in enumerate(engine._worse(best, 4, left)) if not worse]

    assert go_on(4) == list(range(8))
    assert go_on(2) == [1, 3, 6, 7]
    assert go_on(1) == [1, 7]
    assert engine._halvings(signed(80, restarts=4, halving=True)) == {10: 2, 20: 1, 40: 1}
    assert engine._halvings(signed(12, restarts=5, halving=True)) == {2: 3, 3: 2, 6: 1}
    assert engine._halvings(signed(80, restarts=4)) == {}


def test_a_short_search_is_halved_on_time():
    model, batch = built("lenet"), private(1)
    seen = observed(model, [batch])
    search = signed(16, restarts=4, halving=True)
    found = engine.match(seen, batch.targets[None], search, rngs(1), nothing)
    assert found.steps.tolist() == [2 + 2 + 4 + 16]


def test_a_lane_that_has_ended_is_nobodys_better_half(monkeypatch):
    """The first of two restarts leads until it breaks; the other one goes on to the end."""
    model, batch = built("lenet"), private(1)
    seen, targets = observed(model, [batch]), batch.targets[None]
    whole, calls = engine._Lanes.objective, []

    def breaks(lanes, x, active):
        loss, gradient = whole(lanes, x, active)
        calls.append(active)
        first = (active == 0) & (len(calls) <= 10)
        loss = torch.where(first, 0.0, loss + 0.01)
        return torch.where((active == 0) & (len(calls) > 10), torch.nan, loss), gradient

    monkeypatch.setattr(engine._Lanes, "objective", breaks)
    search = signed(200, restarts=2, halving=True, enough=-1.0)
    found = engine.match(seen, targets, search, rngs(1), nothing)
    assert found.steps.tolist() == [25 + 200]


@pytest.mark.parametrize(("patience", "steps"), [(0, 200), (30, 50), (60, 75)])
def test_a_lane_that_stands_still_ends_after_its_patience(patience, steps):
    model, batch = built("mlp"), private(1)
    still = signed(200, rule=rules.Adam(lr=1e-9), patience=patience)
    seen, targets = observed(model, [batch]), batch.targets[None]
    assert engine.match(seen, targets, still, rngs(1), nothing).steps.tolist() == [steps]


def test_a_lane_that_still_falls_goes_on():
    model, batch = built("lenet"), private(1)
    seen, targets = observed(model, [batch]), batch.targets[None]
    falling = signed(100, patience=25, rule=rules.Adam(lr=0.05))
    assert engine.match(seen, targets, falling, rngs(1), nothing).steps.tolist() == [100]


class FirstStill(rules.Adam):
    """Moves all lanes but the first."""

    def step(self, gradient, state, step, scale):
        move, state, stuck = super().step(gradient, state, step, scale)
        if len(move) == 2:  # the other one goes on alone
            move[0] = 0.0
        return move, state, stuck


def test_patience_is_a_lanes_own():
    model, batches = built("lenet"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    search = signed(100, patience=30, rule=FirstStill(lr=0.05))
    found = engine.match(observed(model, batches), targets, search, rngs(2), nothing)
    assert found.steps.tolist() == [50, 100]


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_steps_do_not_grow_memory():
    model, batch = built("lenet", dtype=torch.float32), private(1, dtype=torch.float32)
    seen, targets = observed(model, [batch]), batch.targets[None]
    peaks = []
    for steps in (500, 500, 10_000):  # the first also loads what is loaded lazily
        search = signed(steps, restarts=4, spectrum=1.0, patience=20_000)
        with cost.Clock() as clock:
            engine.match(seen, targets, search, rngs(1), nothing)
        peaks.append(clock.peak_mb)
    print(peaks, "MB")
    assert peaks[2] < peaks[1] + 2, "MB: 0.2 kB a step would show"


@pytest.mark.slow
def test_sixteen_lanes_of_resnet18_fit_in_eight_gigabytes():
    spec = ResNet18Spec(mode="eval")
    model = spec.build((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    images, targets = torch.rand(16, 1, 3, 32, 32), torch.eye(10)[torch.arange(16) % 10][:, None]
    with cost.Clock() as clock:
        pairs = zip(images, targets, strict=True)
        updates = [engine.simulate(model, x, t, GRADIENT) for x, t in pairs]
        stacked = {k: torch.stack([u.pop(k).detach() for u in updates]) for k in list(updates[0])}
        for p in model.parameters():
            p.requires_grad_(False)
        known = {"model": model, "update": Update(stacked, {}, 1), "shape": (3, 32, 32)}
        seen = Observation("test", known | {"count": 1, "data_range": (0.0, 1.0)})
        engine.match(seen, targets, signed(2), rngs(16), nothing)
    print(f"{clock.peak_mb:.0f} MB")
    assert clock.peak_mb is not None
    assert clock.peak_mb < 8000, "of this process, the sixteen observed updates included"


# ---- what a GPU does, played on a CPU -----------------------------------------------------------


def played(fn):
    """A CUDA graph's contract: recorded once, its tensors are written to anew by each replay."""
    out = fn()

    def replay():
        for old, new in zip(out, fn(), strict=True):
            old.copy_(new)

    return replay, out


@pytest.mark.parametrize("known", [True, False])
def test_recorded_steps_leave_a_rule_what_it_remembers(monkeypatch, known):
    """L-BFGS holds on to the last gradient, which a replay writes to."""
    model, batches = built("lenet"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches]) if known else None
    seen = observed(model, batches)
    search = engine.Search(distance=engine.squared, rule=rules.LBFGS(), steps=40)
    plain = engine.match(seen, targets, search, rngs(2), nothing)
    monkeypatch.setattr(engine, "recorded", lambda fn, device: engine.Recorded(fn, played))
    again = engine.match(seen, targets, search, rngs(2), nothing)
    assert torch.equal(plain.images, again.images)
    assert torch.equal(plain.loss, again.loss)


@pytest.mark.parametrize("spectrum", [None, 1.0])
def test_recorded_steps_are_the_same_steps(monkeypatch, spectrum):
    """Also as lanes retire, and although a replay overwrites what the last one returned."""
    model, batches = built("mlp"), [private(1, seed=v) for v in range(2)]
    targets = torch.stack([b.targets for b in batches])
    seen, calls = observed(model, batches), []

    def record(fn):
        calls.append(1)
        return played(fn)

    search = signed(200, restarts=4, halving=True, spectrum=spectrum)
    plain = engine.match(seen, targets, search, rngs(2), nothing)
    monkeypatch.setattr(engine, "recorded", lambda fn, device: engine.Recorded(fn, record))
    again = engine.match(seen, targets, search, rngs(2), nothing)
    assert len(calls) == 3, "eight lanes, four, two"
    for field in ("images", "loss", "steps", "gflop"):
        assert torch.equal(getattr(plain, field), getattr(again, field))


def test_steps_that_cannot_be_recorded_are_taken_one_by_one_and_said(monkeypatch):
    model, batch = built("mlp"), private(1)
    seen, targets = observed(model, [batch]), batch.targets[None]

    def record(fn):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain = engine.match(seen, targets, signed(30), rngs(1), nothing)
    monkeypatch.setattr(engine, "recorded", lambda fn, device: engine.Recorded(fn, record))
    again = engine.match(seen, targets, signed(30), rngs(1), nothing)
    assert torch.equal(plain.images, again.images)
    (said,) = again.flags[0]
    assert said.endswith("CUDA graph: operation not permitted when stream is capturing")


def test_only_a_gpu_records():
    def fn(x, active):
        return x, x

    assert engine.recorded(fn, torch.device("cpu")) is fn
    assert isinstance(engine.recorded(fn, torch.device("cuda")), engine.Recorded)

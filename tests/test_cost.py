"""Arithmetic against hand counts, clocks against known allocations."""

import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from attacks.inverting import Inverting
from fedsec import cost, engine, rules
from fedsec.attack import Attack, Place, Progress
from fedsec.cost import Clock, backprop_gflop, flops, flops_once
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ModelSpec, ResNet18Spec, ResNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Local, Update


def lenet() -> nn.Module:
    convs = [nn.Conv2d(3, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 1, 2)]
    layers = [layer for conv in convs for layer in (conv, nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 10))


def normed() -> nn.Module:
    """Every kind of product that the zoo has: strided, grouped, 1 x 1, batch norm, linear."""
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    convs = [nn.Conv2d(3, 8, 3, 2, 1), norm, nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)]
    return nn.Sequential(*convs, nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.LazyLinear(10))


def batch(n: int = 1) -> Batch:
    return Batch(torch.rand(n, 3, 32, 32), torch.softmax(torch.rand(n, 10), 1))


# Multiply-adds of LeNet's layers on one image: outputs x inputs of each.
LENET = [16 * 16 * 12 * 75, 8 * 8 * 12 * 300, 8 * 8 * 12 * 300, 768 * 10]


def test_an_mlp_costs_what_the_hand_count_says():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    # forward and weight gradient of both layers, input gradient of the second only
    hand = 2 * 7 * (2 * 3072 * 64 + 3 * 64 * 10) / 1e9
    assert backprop_gflop(model, batch(7)) == pytest.approx(hand, rel=1e-9)


def test_lenet_costs_what_the_hand_count_says():
    hand = 2 * 5 * (3 * sum(LENET) - LENET[0]) / 1e9
    assert backprop_gflop(lenet(), batch(5)) == pytest.approx(hand, rel=1e-9)


def test_counting_leaves_the_model_alone_and_ignores_what_is_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))
    model(batch(2).images)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    free = backprop_gflop(model, batch(4))
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        assert backprop_gflop(model, batch(4)) == free > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def matching(model: nn.Module):
    """One lane of a gradient-matching attack: loss gradient, distance, gradient for the image."""
    weights = {k: p.detach() for k, p in model.named_parameters()}

    def loss(w, x, t):
        return F.cross_entropy(functional_call(model, w, (x,)), t)

    def distance(x, t):
        return sum(g.square().sum() for g in grad(loss)(weights, x, t).values())

    def plain(x, t):
        leaf = x.clone().requires_grad_()
        w = {k: p.clone().requires_grad_() for k, p in weights.items()}
        gs = torch.autograd.grad(loss(w, leaf, t), list(w.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gs), leaf)

    return weights, loss, grad(distance), plain


@pytest.mark.parametrize("make", [lenet, normed])
def test_lanes_under_vmap_count_as_many_times_one_lane(make):
    model = make()
    model(batch(2).images)
    weights, loss, double, plain = matching(model)
    lanes = 5
    x, t = torch.rand(lanes, 2, 3, 32, 32), torch.softmax(torch.rand(lanes, 2, 10), -1)

    one = flops(lambda: grad(loss)(weights, x[0], t[0]))
    assert one == pytest.approx(backprop_gflop(model, Batch(x[0], t[0])))
    own = {k: w.expand(lanes, *w.shape).clone() for k, w in weights.items()}  # local steps
    assert flops(lambda: vmap(grad(loss), (None, 0, 0))(weights, x, t)) == pytest.approx(5 * one)
    assert flops(lambda: vmap(grad(loss))(own, x, t)) == pytest.approx(5 * one)

    step = flops(lambda: double(x[0], t[0]))
    assert step == pytest.approx(flops(lambda: plain(x[0], t[0])))
    assert flops(lambda: vmap(double)(x, t)) == pytest.approx(5 * step)


def test_an_attack_step_on_lenet_is_seven_forwards_and_eight_with_unused_weight_gradients():
    model, b = lenet(), batch()
    weights, loss, double, _ = matching(model)
    forward = flops(lambda: model(b.images))
    assert forward == pytest.approx(2 * sum(LENET) / 1e9)
    assert flops(lambda: double(b.images, b.targets)) / forward == pytest.approx(7.145, abs=1e-3)

    def wasteful():  # mishap: `backward` also computes the outer gradients of the weights
        leaf = b.images.clone().requires_grad_()
        w = {k: p.clone().requires_grad_() for k, p in weights.items()}
        gs = torch.autograd.grad(loss(w, leaf, b.targets), list(w.values()), create_graph=True)
        sum(g.square().sum() for g in gs).backward()

    assert flops(wasteful) / forward == pytest.approx(8.156, abs=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_convolution_costs_the_same_three_times(groups):
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.rand(2, 8, 16, 16)
    x.requires_grad_()
    forward = 2 * 2 * 16 * 16 * 8 * (8 // groups) * 9 / 1e9
    assert flops(lambda: conv(x).sum().backward()) == pytest.approx(3 * forward)


def test_products_with_vectors_count_too():
    a, x, b = torch.rand(10, 20), torch.rand(20), torch.rand(10)
    assert flops(lambda: a @ x) == flops(lambda: F.linear(x, a)) == 400e-9
    assert flops(lambda: torch.addmv(b, a, x, beta=2)) == flops(lambda: F.linear(x, a, b)) == 400e-9
    assert flops(lambda: x @ x) == 40e-9
    assert flops(lambda: x + x) == 0


def test_inference_mode_counts_the_same():
    model, x = lenet(), batch().images
    with torch.inference_mode():
        assert flops(lambda: model(x)) == pytest.approx(2 * sum(LENET) / 1e9)


def test_the_function_is_run_once():
    calls = []
    flops(lambda: calls.append(1))
    assert calls == [1]


class Halved(torch.nn.Linear):
    """Like its parent, but for its arithmetic."""

    def forward(self, x):
        return F.linear(x[:, :2], self.weight[:, :2])


def test_a_count_is_kept_for_models_that_are_alike_in_all_that_matters(monkeypatch):
    monkeypatch.setattr(cost, "_counted", {})
    linear, conv = torch.nn.Linear(4, 4), torch.nn.Conv2d(4, 4, 3)
    strided, doubled = torch.nn.Conv2d(4, 4, 3, stride=2), torch.nn.Linear(4, 4).double()
    calls = []
    for model in (linear, torch.nn.Linear(4, 4), torch.nn.Linear(4, 5), Halved(4, 4), conv,
                  strided, doubled, torch.nn.Linear(4, 4).eval(), linear):  # fmt: skip
        assert flops_once(lambda model=model: calls.append(model), model, "a step") == 0
    assert len(calls) == 7, "only the weights of the second, and the last, were other ones"
    flops_once(lambda: calls.append(0), linear, "another step")
    assert len(calls) == 8


# ---- whole attacks ------------------------------------------------------------------------------

SIDE, WIDE = 32, 64  # pixels across; the MLP's hidden layer

# Of a lane-step on one image: multiply-adds of each layer's forward pass, and how many such
# products a double backward needs. A linear layer: its output; its weights' gradient and its
# input's; by the weights' gradient two, by the input's gradient one; by the output one. The first
# layer's input gradient is not needed, nor what follows from it: two less.
# A convolution has one more, unless it is the first: PyTorch also differentiates the input's
# gradient by the weights. At stride 2 that one spans 6 x 6 positions of the kernel, not 5 x 5.
DOUBLE = {
    "mlp": [(3 * SIDE * SIDE * WIDE, 5), (WIDE * WIDE, 7), (WIDE * 10, 7)],
    "lenet": list(zip(LENET, [5, 7 + 36 / 25, 8, 7], strict=True)),
}
# Of one plain pass: output, weights' gradient, and, but for the first layer, input's gradient.
PLAIN = {
    name: 2e-9 * sum(m * (2 if i == 0 else 3) for i, (m, _) in enumerate(layers))
    for name, layers in DOUBLE.items()
}
# Of one image's way from pixels to coefficients and back: cosines of rows and of columns of three
# channels, and three colours of three channels.
COEFFICIENTS = 2e-9 * 2 * (2 * 3 * SIDE**3 + 3 * 3 * SIDE**2)
HAND = {name: 2e-9 * sum(m * times for m, times in layers) for name, layers in DOUBLE.items()}
SPECS: dict[str, ModelSpec] = {"mlp": MLPSpec(hidden=(WIDE, WIDE)), "lenet": LeNetSpec()}


def attacked(spec: ModelSpec, victims: int, count: int, side: int = SIDE) -> Observation:
    """Victims of a gradient on `count` images each; the labels are known."""
    shape, half = (3, side, side), (0.5,) * 3
    model = spec.build(shape, 10, half, half, stream(0, "model"))
    targets = torch.eye(10)[:count].expand(victims, -1, -1)
    images = torch.rand(victims, count, *shape)
    updates = [
        engine.simulate(model, x, t, Local(kind="gradient", lr=1.0))
        for x, t in zip(images, targets, strict=True)
    ]
    stacked = {k: torch.stack([u[k] for u in updates]).detach() for k in updates[0]}
    model.requires_grad_(False)
    update = Update(stacked, {}, count)
    known = {"model": model, "update": update, "count": count, "shape": shape}
    return Observation("test", known | {"labels": targets, "data_range": (0.0, 1.0)})


def searched(**more) -> engine.Search:
    search = {"distance": engine.cosine, "rule": rules.Adam(lr=0.1), "steps": 5, "restarts": 3}
    return engine.Search(**(search | more))


def streams(victims: int) -> list[torch.Generator]:
    return [stream(0, "attack", v) for v in range(victims)]


def silent(step: int, steps: int, loss: float) -> None:
    pass


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", SPECS)
def test_a_search_costs_what_the_hand_count_says(name, count):
    seen = attacked(SPECS[name], 2, count)
    found = engine.match(seen, seen.labels, searched(), streams(2), silent)
    # five steps, and a look at where the last one led
    assert found.gflop.tolist() == pytest.approx([3 * 6 * count * HAND[name]] * 2, rel=0.01)


def inverting() -> Attack:
    """As its file has it, but with four steps."""
    file = Path(__file__).parents[1] / "configs/attack/inverting.yaml"
    fields: dict[str, Any] = yaml.safe_load(file.read_text()) | {"steps": 4}
    del fields["_target_"]
    return Inverting(**fields)


@pytest.mark.parametrize("name", SPECS)
def test_the_inverting_attack_costs_what_the_hand_count_says(name):
    found = inverting()(attacked(SPECS[name], 1, 2), streams(1), silent)
    assert found.gflop.item() == pytest.approx(5 * 2 * (HAND[name] + COEFFICIENTS), rel=0.01)


@pytest.mark.parametrize("name", SPECS)
def test_a_row_s_backprops_are_those_of_the_hand_count(name, tmp_path, monkeypatch):
    words = [f"model={name}", "defense=none", "victim_batch=1"]
    words += ["model.hidden=[64,64]"] if name == "mlp" else []
    path = tiny.npz(tmp_path, size=SIDE, classes=10)
    line = tiny.words(tmp_path, *words, "data=npz", f"data.path={path}", steps=4)
    assert tiny.call(monkeypatch, line) == 0
    whole = 5 * (HAND[name] + COEFFICIENTS)
    for row in tiny.rows(tmp_path / "out"):
        assert row["gflop"] == pytest.approx(whole, rel=0.01)
        assert row["backprops"] == pytest.approx(whole / PLAIN[name], rel=0.01)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "spec", [ConvNetSpec(width=4), ResNetSpec(depth=20, width=4), ResNet18Spec(width=4)]
)
def test_a_step_costs_what_pytorch_counts(spec, mode):
    """One lane, plain autograd. `1 *`: the counter's hooks break at a leaf that enters a module."""
    seen = attacked(spec, 1, 2, side=12)
    seen.model.train(mode == "train")
    found = engine.match(seen, seen.labels, searched(steps=1, restarts=1), streams(1), silent)
    images = torch.rand(2, 3, 12, 12).requires_grad_()
    weights = {k: p.detach().clone().requires_grad_() for k, p in seen.model.named_parameters()}
    goal = {k: t[0] for k, t in seen.update.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(functional_call(seen.model, weights, (1 * images,)), seen.labels[0])
        inner = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        distance = engine.cosine(dict(zip(weights, inner, strict=True)), goal)
        torch.autograd.grad(distance, images)
    assert found.gflop.item() == pytest.approx(2 * counter.get_total_flops() / 1e9, rel=1e-9)


class Early(rules.Adam):
    """Says after the second step that its first lane is stuck."""

    def step(self, gradient, state, step, scale):
        move, state, stuck = super().step(gradient, state, step, scale)
        stuck[0] = step == 2
        return move, state, stuck


def test_lanes_that_retire_cost_as_many_steps_as_they_took(monkeypatch):
    monkeypatch.setattr(engine, "EVERY", 5)
    seen = attacked(SPECS["lenet"], 2, 1)
    search = searched(steps=20, restarts=1, rule=Early(lr=0.1))
    found = engine.match(seen, seen.labels, search, streams(2), silent)
    assert found.steps.tolist() == [5, 20]
    looks = [5, 21]  # who ran out looks once more where the last step led
    assert found.gflop.tolist() == pytest.approx([n * HAND["lenet"] for n in looks], rel=0.01)


class Cut(Progress, Place):
    """Keeps one search, and dies at the third look at it."""

    looks = 0

    def place(self, problem, inputs):
        return self

    def save(self, state, over=False):
        self.saved = {k: t.clone() for k, t in state.items()}
        self.looks += 1
        if self.looks == 3:
            raise KeyboardInterrupt


def test_a_resumed_search_costs_as_much_as_an_unbroken_one(monkeypatch):
    monkeypatch.setattr(engine, "EVERY", 5)
    seen, cut = attacked(SPECS["mlp"], 1, 1), Cut()
    search = searched(steps=20, restarts=2)
    with pytest.raises(KeyboardInterrupt):
        engine.match(seen, seen.labels, search, streams(1), cut)
    assert cut.saved is not None
    assert cut.saved["step"] == 15
    found = engine.match(seen, seen.labels, search, streams(1), cut)
    assert found.gflop.item() == pytest.approx(2 * 21 * HAND["mlp"], rel=0.01)


# ---- clocks -------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def hold(mb: int) -> None:
    torch.ones(mb * 250_000)  # 1e6 bytes each


def test_seconds_are_wall_time_also_when_the_block_fails():
    clock = Clock()

    def fail():
        with clock:
            time.sleep(0.05)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert 0.05 <= clock.seconds < 1
    assert cost._open == []
    assert clock.joules is None
    assert "GPU" in clock.reasons["joules"]


@linux
def test_peak_memory_is_that_of_the_block_and_not_of_the_past():
    hold(400)
    with Clock() as clock:
        hold(100)
    assert clock.peak_mb == pytest.approx(100, abs=15)


@linux
def test_nested_clocks_do_not_hide_a_peak_from_each_other():
    with Clock() as outer:
        hold(200)
        with Clock() as inner:
            hold(50)
        hold(20)
    assert inner.peak_mb == pytest.approx(50, abs=15)
    assert outer.peak_mb == pytest.approx(200, abs=20)


def test_without_proc_the_peak_is_none_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(cost._ProcessMemory, "root", tmp_path / "none")
    with Clock() as clock:
        pass
    assert clock.peak_mb is None
    assert "no peak memory" in clock.reasons["peak_mb"]
    assert clock.seconds >= 0


class FakeGpu:
    """torch.cuda and NVML as far as a clock looks at them: 3 MB held, 10 MB at most, 7 J."""

    def __init__(self, monkeypatch, nvml: bool = True, energy: bool = True):
        self.calls = []
        properties = types.SimpleNamespace(uuid="abc")
        for name, value in {
            "synchronize": lambda d: self.calls.append("synchronize"),
            "reset_peak_memory_stats": lambda d: self.calls.append("reset"),
            "memory_allocated": lambda d: 3_000_000,
            "max_memory_allocated": lambda d: 10_000_000,
            "get_device_properties": lambda d: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        error = type("NVMLError", (Exception,), {})
        joules = iter([0, 1_000, 8_000])  # the first read only asks whether it can

        def read(handle):
            assert handle == "GPU-abc"
            if not energy:
                raise error("Not Supported")
            return next(joules)

        module = types.SimpleNamespace(
            NVMLError=error,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
            nvmlDeviceGetTotalEnergyConsumption=read,
        )
        monkeypatch.setitem(sys.modules, "pynvml", module if nvml else None)


def test_on_a_gpu_both_ends_are_synchronised_and_energy_is_read(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    with Clock("cuda") as clock:
        gpu.calls.append("block")
    assert gpu.calls == ["reset", "synchronize", "block", "synchronize"]
    assert clock.peak_mb == 7.0
    assert clock.joules == 7.0
    assert clock.reasons == {}


@pytest.mark.parametrize(("nvml", "why"), [(False, "nvidia-ml-py"), (True, "Not Supported")])
def test_no_energy_comes_with_its_reason(monkeypatch, nvml, why):
    FakeGpu(monkeypatch, nvml=nvml, energy=False)
    with Clock("cuda") as clock:
        pass
    assert clock.joules is None
    assert why in clock.reasons["joules"]
    assert clock.peak_mb == 7.0


@linux
def test_a_second_equal_block_needs_as_much_memory_as_the_first():
    """What the allocator keeps from an earlier block would make it look free."""

    def block() -> float:
        with cost.Clock() as clock:
            kept = [torch.ones(25_000) for _ in range(400)]  # small enough to stay on the heap
            del kept
        assert clock.peak_mb is not None
        return clock.peak_mb

    first, second = block(), block()
    assert first == pytest.approx(40, abs=15)
    assert second == pytest.approx(first, abs=15)


@linux
@pytest.mark.parametrize(("before", "least", "most"), [("", 40, 400), ("cost.loaded()", 0, 20)])
def test_what_pytorch_loads_at_first_is_not_an_attack_s_memory(before, least, most):
    code = f"""
import torch
from fedsec import cost
{before}
with cost.Clock() as clock:
    torch.func.grad(torch.sum)(torch.zeros(1))
print(clock.peak_mb)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=tiny.ENV)
    assert least <= float(done.stdout) <= most

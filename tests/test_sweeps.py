"""The layer-by-layer step against a plain double backward, and the engine with and without it."""

import weakref

import pytest
import torch
from test_engine import (
    CLASSES,
    GRADIENT,
    MODELS,
    SHAPE,
    built,
    nothing,
    observed,
    private,
    rngs,
    signed,
)
from torch import nn
from torch.nn import functional as F

from fedsec import cost, engine, rules, sweeps
from fedsec.models import ResNet18Spec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local


def manhattan(guess, observed):
    """No function of inner products."""
    return sum((guess[k] - observed[k]).abs().sum() for k in observed)


DISTANCES = {
    engine.cosine: sweeps.COSINE,
    engine.squared: sweeps.SQUARED,
    manhattan: manhattan,
}


class Odd(nn.Module):
    """Sums that the images enter directly, one of them read twice, and a layer nobody reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        self.fc = nn.Linear(432, CLASSES)

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(x + y)
        F.relu(z)
        return self.fc((z + y + x).flatten(1))


class Straight(nn.Module):
    """Only the images enter the sum before the ReLU: what it writes to, others must not read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(432, CLASSES)

    def forward(self, x):
        y = self.conv(x)
        return self.fc((F.relu(y + x) + torch.sigmoid(y)).flatten(1))


def foreign(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "wide":  # a convolution of many weights on a large map
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 128, (1, 3), padding=(0, 1), bias=False), nn.Sigmoid(),
            nn.Conv2d(128, 144, 3, padding=1), nn.MaxPool2d(2), nn.Identity(), nn.Flatten(),
            nn.Linear(1296, CLASSES, bias=False),
        )  # fmt: skip
    return {"odd": Odd, "straight": Straight}[name]()


EXTRA = {
    "resnet18 wide": ResNet18Spec(width=16),
    "resnet18 group": ResNet18Spec(width=4, norm="group"),
}
NAMES = [*MODELS, *EXTRA, "odd", "straight", "wide"]


def shaken(name: str, mode: str) -> nn.Module:
    """A model with no parameter or statistic at its initial zero or one."""
    if name in EXTRA:
        model = EXTRA[name].build(SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    else:
        model = built(name, mode) if name in MODELS else foreign(name)
    model = model.double().train(mode == "train")
    torch.manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer += 0.3 * torch.rand_like(buffer)
    return model


def anything(model: nn.Module, lanes: int, count: int, victims: int):
    """Random images, soft targets that need not sum to one, and observed updates."""
    images = torch.rand(lanes, count, *SHAPE, dtype=torch.float64)
    targets = torch.rand(lanes, count, CLASSES, dtype=torch.float64)
    named = list(model.named_parameters())
    seen = {k: torch.randn(victims, *p.shape, dtype=torch.float64) for k, p in named}
    return images, targets, seen


def twin(model, images, targets, seen, distance):
    """Distance and its gradients for one lane, by create_graph."""
    x, t = images.clone().requires_grad_(), targets.clone().requires_grad_()
    params = {k: p.requires_grad_() for k, p in model.named_parameters()}
    loss = F.cross_entropy(model(x), t)
    inner = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    value = distance(dict(zip(params, inner, strict=True)), seen)
    return value.detach(), *torch.autograd.grad(value, (x, t))


def close(one: torch.Tensor, other: torch.Tensor, within: float = 1e-8) -> None:
    assert (one - other).norm() <= within * other.norm(), (one - other).norm() / other.norm()


# ---- the step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_sweeps_equal_a_plain_double_backward(name, mode, count, distance):
    """Several victims and restarts, every layer's way of computing, float64 to 1e-8."""
    if (name, mode, count) == ("mlp batch", "train", 1):
        pytest.skip("BatchNorm of a single value: refused elsewhere")
    model = shaken(name, mode)
    images, targets, seen = anything(model, 3, count, 2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    step = sweeps.LaneStep(model, seen, DISTANCES[distance])
    for victims in ([0], [0, 0, 1], [1, 0, 1]):  # one step serves different lanes
        lanes = len(victims)
        loss, of_images, of_targets = step(images[:lanes], targets[:lanes], victims)
        for lane, victim in enumerate(victims):
            told = {k: t[victim] for k, t in seen.items()}
            expected = twin(model, images[lane], targets[lane], told, distance)
            close(loss[lane], expected[0])
            close(of_images[lane], expected[1])
            close(of_targets[lane], expected[2])
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), f"the step changed {k}"


def test_the_models_above_take_every_way():
    taken = set()
    for name in NAMES:
        model = shaken(name, "train")
        images, targets, seen = anything(model, 2, 2, 1)
        step = sweeps.LaneStep(model, seen, sweeps.COSINE)
        step(images, targets, [0, 0])
        taken |= {y.way for y, _ in step.program.steps if isinstance(y, sweeps.Conv)}
        taken |= {type(y).__name__ for y, _ in step.program.steps if y is not None}
    ways = {"gram", "columns", "lanes", "groups"}
    layers = {"Conv", "Linear", "BatchNorm", "GroupNorm", "ReLU", "Sigmoid", "MaxPool"}
    assert taken >= ways | layers


@pytest.mark.parametrize("name", ["lenet", "resnet18 wide"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("far", [1.0, 1e-2])
def test_float32_is_as_accurate_as_autograd(name, distance, far):
    """Also near the truth, where the distance is a small difference of large terms."""
    model, batch = shaken(name, "train"), private(2)
    update = engine.simulate(model, batch.images, batch.targets, GRADIENT)
    seen = {k: t[None] for k, t in update.items()}
    images = batch.images + far * torch.randn_like(batch.images)
    _, exact, _ = twin(model, images, batch.targets, update, distance)
    model, single = model.float(), {k: t.float() for k, t in seen.items()}
    told = {k: t[0] for k, t in single.items()}
    _, plain, _ = twin(model, images.float(), batch.targets.float(), told, distance)
    step = sweeps.LaneStep(model, single, DISTANCES[distance])
    _, ours, _ = step(images.float()[None], batch.targets.float()[None], [0])
    error, usual = (ours[0] - exact).norm() / exact.norm(), (plain - exact).norm() / exact.norm()
    assert error < 3 * usual + 1e-5, (error, usual)


# ---- what it does not know ----------------------------------------------------------------------


class Asking(nn.Module):
    """Python that depends on the input: it runs, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(432, CLASSES)

    def forward(self, x):
        if x.shape[-1] > 8:
            x = x.flatten(1)
        return self.fc(torch.sigmoid(x))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = x * 1 if x is None else self.relu(x)
        return y + x


def conv(**more) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=more.pop("padding", 1), **more)


def hooked() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def twice() -> nn.Module:
    layer = conv()
    return nn.Sequential(layer, layer)


STRANGERS = {
    "groups": lambda: conv(groups=3),
    "padding by name": lambda: conv(padding="same"),
    "padding by reflection": lambda: conv(padding_mode="reflect"),
    "unknown layer": lambda: nn.Sequential(conv(), nn.Tanh()),
    "an axis kept": lambda: nn.Sequential(conv(), Mean(), nn.Flatten(), nn.Linear(3, 432)),
    "another flatten": lambda: nn.Sequential(conv(), nn.Flatten(2)),
    "a constant": lambda: nn.Sequential(conv(), Plus()),
    "hooks": hooked,
    "a layer twice": twice,
    "weights derived": lambda: nn.utils.parametrizations.weight_norm(conv()),
    "no statistics": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(3, track_running_stats=False).eval()
    ),
    "no weights": lambda: nn.Sequential(conv(), nn.BatchNorm2d(3, affine=False)),
    "a kink first": lambda: nn.Sequential(nn.ReLU(), conv()),
    "a norm first": lambda: nn.Sequential(nn.BatchNorm2d(3), conv()),
    "in place": lambda: nn.Sequential(conv(), Changing()),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_known_is_not_guessed(name):
    whole = nn.Sequential(STRANGERS[name](), nn.Flatten(), nn.Linear(432, CLASSES))
    with pytest.raises(sweeps.Unsupported):
        sweeps.Program(whole)


def test_an_update_of_some_parameters_is_not_known():
    model = built("lenet")
    _, _, seen = anything(model, 1, 1, 1)
    seen.pop("fc.0.bias")
    with pytest.raises(sweeps.Unsupported):
        sweeps.LaneStep(model, seen, sweeps.COSINE)


# ---- in the engine ------------------------------------------------------------------------------


def autograd_only(monkeypatch) -> None:
    monkeypatch.setattr(engine._Lanes, "_sweeps", lambda lanes, *kinds: None)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_zoo_are_swept(name):
    """Under the tests' type checks, too: else what follows would compare autograd with itself."""
    seen, targets = observed(built(name), [private(2)]), private(2).targets[None]
    assert engine._Lanes(seen, targets, signed(1)).swept is not None
    joint = engine.Search(distance=engine.squared, rule=rules.LBFGS(), steps=1)
    assert engine._Lanes(seen, None, joint).swept is not None


@pytest.mark.parametrize(
    "local",
    [Local(kind="fedavg", lr=0.1, steps=2), Local(kind="gradient", lr=0.1, parts=(1, 1))],
)
def test_other_updates_are_not_swept(local):
    seen = observed(built("lenet"), [private(2)], local)
    seen = Observation("test", {k: getattr(seen, k) for k in seen.grants} | {"local": local})
    assert engine._Lanes(seen, private(2).targets[None], signed(1)).swept is None


@pytest.mark.parametrize("model", [Asking(), nn.Sequential(nn.Flatten(), nn.Linear(432, CLASSES))])
def test_a_foreign_model_is_attacked_with_or_without_sweeps(model):
    model, batch = model.double(), private(2)
    seen = observed(model, [batch])
    lanes = engine._Lanes(seen, batch.targets[None], signed(1, priors=()))
    assert (lanes.swept is None) == isinstance(model, Asking)
    x = torch.randn(1, lanes.pixels, dtype=torch.float64)
    loss, gradient = lanes.objective(x, torch.zeros(1, dtype=torch.long))
    told = {k: t[0] for k, t in seen.update.tensors.items()}
    expected = twin(model, x.reshape(2, *SHAPE), batch.targets, told, engine.cosine)
    close(loss[0], expected[0])
    close(gradient[0], expected[1].flatten())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet8"])
def test_a_run_is_the_same_with_and_without_sweeps(name, mode, monkeypatch):
    batches = [private(2, seed=v) for v in range(2)]
    seen = observed(built(name, mode), batches)
    targets = torch.stack([b.targets for b in batches])
    swept = engine.match(seen, targets, signed(6, restarts=2), rngs(2), nothing)
    autograd_only(monkeypatch)
    plain = engine.match(seen, targets, signed(6, restarts=2), rngs(2), nothing)
    torch.testing.assert_close(swept.images, plain.images, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(swept.loss, plain.loss, rtol=1e-8, atol=1e-10)
    assert torch.equal(swept.gflop, plain.gflop)
    assert torch.equal(swept.steps, plain.steps)


@pytest.mark.parametrize("known", [True, False])
def test_lanes_retire_alike_with_and_without_sweeps(known, monkeypatch):
    """Labels known, or optimised jointly; victims lose lanes at different times."""
    batches = [private(1, seed=v) for v in range(3)]
    seen = observed(built("lenet"), batches)
    targets = torch.stack([b.targets for b in batches]) if known else None
    rule = rules.Adam(lr=0.1)
    first = engine.Search(distance=engine.squared, rule=rule, steps=24, restarts=2)
    losses = engine.match(seen, targets, first, rngs(3), nothing).loss.sort().values
    search = engine.Search(
        distance=engine.squared, rule=rule, steps=90, restarts=2, enough=float(losses[:2].mean())
    )
    swept = engine.match(seen, targets, search, rngs(3), nothing)
    autograd_only(monkeypatch)
    plain = engine.match(seen, targets, search, rngs(3), nothing)
    assert len(set(swept.steps.tolist())) > 1, "else nothing was compacted"
    assert torch.equal(swept.steps, plain.steps)
    assert torch.equal(swept.labels, plain.labels)
    torch.testing.assert_close(swept.images, plain.images, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(swept.loss, plain.loss, rtol=1e-6, atol=1e-9)


def test_joint_labels_have_the_gradient_of_autograd():
    seen = observed(built("resnet8", "train"), [private(2, seed=v) for v in range(2)])
    search = engine.Search(distance=engine.squared, rule=rules.LBFGS(), steps=1, restarts=2)
    lanes, active = engine._Lanes(seen, None, search), torch.tensor([0, 2, 3])
    x = torch.randn(3, lanes.pixels + 2 * CLASSES, dtype=torch.float64)
    for ours, plain in zip(lanes.objective(x, active), lanes.by_autograd(x, active), strict=True):
        close(ours, plain)


def test_a_run_leaves_no_activations_behind(monkeypatch):
    """They would stay until the garbage collector runs: gigabytes for resnet18."""
    made = []

    class Watched(sweeps.LaneStep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(sweeps, "LaneStep", Watched)
    batch = private(1)
    seen = observed(built("convnet", "train"), [batch])
    engine.match(seen, batch.targets[None], signed(2), rngs(1), nothing)
    assert [ref() for ref in made] == [None]


def test_the_recorded_count_is_the_double_backwards_and_not_below_what_was_done():
    seen, targets = observed(built("lenet"), [private(2)]), private(2).targets[None]
    lanes, active = engine._Lanes(seen, targets, signed(1)), torch.zeros(3, dtype=torch.long)
    x = torch.randn(3, lanes.pixels, dtype=torch.float64)
    counted = cost.flops(lambda: lanes._plain_step(x))
    done = cost.flops(lambda: lanes.objective(x, active)) / 3
    assert 0.5 * counted < done <= counted

"""Sweeps in half precision: exact in float64, close in bfloat16; and searches that use them."""

import pytest
import torch
from test_engine import CLASSES, SHAPE, nothing, observed, private, rngs
from test_sweeps import DISTANCES, anything, close, shaken, twin
from torch import nn

from fedsec import columns, engine, sweeps
from fedsec.models import ResNet18Spec
from fedsec.rng import stream
from fedsec.types import Local

# in eval mode: no norm, BatchNorm after a convolution, strides, odd kernels, maps of few positions
NAMES = ["lenet", "convnet", "resnet8", "resnet18 wide", "straight", "wide"]


class Deep(nn.Module):
    """Convolutions with a bias before BatchNorm, on maps of so few positions that Grams pay."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=4), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(256, CLASSES),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def model_of(name: str) -> nn.Module:
    if name != "deep":
        return shaken(name, "eval")
    torch.manual_seed(0)
    model = Deep().double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer += 0.3 * torch.rand_like(buffer)
    return model


def updates(model, victims: int, count: int):
    """What clients with private batches send, by name [v, ...]."""
    batches = [private(count, seed=v) for v in range(victims)]
    each = [engine.simulate(model, b.images, b.targets, Local(kind="gradient", lr=1.0))
            for b in batches]  # fmt: skip
    return {k: torch.stack([u[k] for u in each]) for k in each[0]}


@pytest.mark.parametrize("sent", ["noise", "gradients"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [*NAMES, "deep"])
def test_they_equal_a_plain_double_backward_in_float64(name, count, distance, sent):
    """Gradients of a batch have a low rank on maps of few positions; noise has none."""
    model = model_of(name)
    images, targets, seen = anything(model, 3, count, 2)
    if sent == "gradients":
        seen = updates(model, 2, count)
    step = sweeps.LaneStep(model, seen, DISTANCES[distance], columns.kinds(torch.float64))
    for victims in ([0], [0, 0, 1], [0, 1], [1]):
        lanes = len(victims)
        found = step(images[:lanes], targets[:lanes], victims)
        for lane, victim in enumerate(victims):
            told = {k: t[victim] for k, t in seen.items()}
            expected = twin(model, images[lane], targets[lane], told, distance)
            for ours, plain in zip(found, expected, strict=True):
                close(ours[lane], plain)


def test_the_models_above_take_every_way():
    taken = set()
    for name in [*NAMES, "deep"]:
        for count, sent in ((1, "noise"), (1, "gradients")):
            model = model_of(name)
            images, targets, seen = anything(model, 2, count, 2)
            seen = updates(model, 2, count) if sent == "gradients" else seen
            step = sweeps.LaneStep(model, seen, sweeps.COSINE, columns.kinds(torch.float64))
            step(images, targets, [0, 1])
            layers = [y for y, _ in step.program.steps if isinstance(y, columns.Conv)]
            taken |= {(y.gram, bool(y.normed), y.factors is not None) for y in layers}
            taken |= {("strides", y.gram) for y in layers if y.turned is None}
            both = [y for y in layers if y.normed and y.offset is not None]
            taken |= {("bias and norm", y.gram) for y in both}
    assert taken >= {(True, True, True), (True, True, False), (True, False, True)}
    assert taken >= {(False, True, False), (False, False, False)}
    assert taken >= {("strides", True), ("strides", False), ("bias and norm", True)}


def test_factors_that_miss_something_are_not_taken():
    model = model_of("deep")
    images, targets, seen = anything(model, 1, 1, 1)
    seen = updates(model, 1, 1)
    name = "layers.6.weight"
    seen[name] = seen[name] + 1e-3 * seen[name].abs().mean() * torch.randn_like(seen[name])
    step = sweeps.LaneStep(model, seen, sweeps.COSINE, columns.kinds(torch.float64))
    step(images, targets, [0])
    layers = [y for y, _ in step.program.steps if isinstance(y, columns.Conv)]
    found = {y.name: y.factors for y in layers if y.gram}
    assert found.pop("layers.6") is None
    assert len(found) == 1
    assert all(factors is not None for factors in found.values())


@pytest.mark.parametrize("count", [1, 3])
def test_bfloat16_points_the_same_way(count):
    spec = ResNet18Spec(width=16, mode="eval")
    model = spec.build(SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    images, targets, _ = (t if isinstance(t, dict) else t.float()
                          for t in anything(model, 2, count, 1))  # fmt: skip
    seen = {k: t.float() for k, t in updates(model.double(), 2, count).items()}
    model = model.float()
    exact = sweeps.LaneStep(model, seen, sweeps.COSINE)(images, targets, [0, 1])
    rough = sweeps.LaneStep(model, seen, sweeps.COSINE, columns.kinds(torch.bfloat16))
    loss, gradient, _ = rough(images, targets, [0, 1])
    assert (loss - exact[0]).abs().max() < 0.01
    cosine = torch.cosine_similarity(gradient.flatten(1), exact[1].flatten(1))
    assert cosine.min() > 0.95, cosine
    assert cosine.max() < 1 - 1e-7, "it is bfloat16"


STRANGERS = {
    "statistics of the batch": lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)),
    "a norm of something else": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)
    ),
    "a norm read beside its convolution": lambda: Beside(),
    "dilation": lambda: nn.Conv2d(3, 3, 3, dilation=2),
    "no weights": lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, affine=False)),
    "a norm first": lambda: nn.BatchNorm2d(3),
}


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_known_is_not_guessed(name):
    whole = nn.Sequential(STRANGERS[name](), nn.Flatten(), nn.LazyLinear(CLASSES))
    whole(torch.zeros(2, *SHAPE))
    whole.train(name == "statistics of the batch")
    with pytest.raises(sweeps.Unsupported):
        sweeps.Program(whole, columns.kinds(torch.float64))


# ---- a search -----------------------------------------------------------------------------------


def searched(share: float, steps: int = 20, **more) -> engine.Search:
    terms = ((0.01, engine.total_variation),)
    search = engine.spectral(steps=steps, lr=0.5, priors=terms)
    return engine.replace(search, half=share, **more)


def resnet(norm: str = "batch"):
    spec = ResNet18Spec(width=4, mode="eval", norm=norm)
    return spec.build(SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))


def run(search, model, victims: int = 2):
    torch.manual_seed(0)  # of the labels
    batches = [private(1, seed=v, dtype=torch.float32) for v in range(victims)]
    seen = observed(model, batches)
    targets = torch.stack([b.targets for b in batches])
    return engine.match(seen, targets, search, rngs(victims), nothing), seen, targets


def test_a_search_ends_exactly(monkeypatch):
    """Its objective is that of its images, whatever bfloat16 thought of them."""
    for share in (0.5, 1.0):
        search = searched(share, restarts=2)
        found, seen, targets = run(search, resnet())
        judged = engine.judged(seen, targets, search, found.images)
        torch.testing.assert_close(found.loss, judged, rtol=1e-4, atol=1e-6)


def test_rough_objectives_that_are_kept_would_be_noticed(monkeypatch):
    class Boasting(sweeps.LaneStep):
        def __call__(self, *args):
            loss, *gradients = super().__call__(*args)
            rough = any(isinstance(y, columns.Conv) for y, _ in self.program.steps)
            return (loss - 10 if rough else loss), *gradients

    monkeypatch.setattr(sweeps, "LaneStep", Boasting)
    found, seen, targets = run(searched(0.5, restarts=2), resnet())
    assert (found.loss > 0).all()
    search = searched(0.5)
    torch.testing.assert_close(found.loss, engine.judged(seen, targets, search, found.images))


def test_steps_are_in_half_precision_as_long_as_asked(monkeypatch):
    taken = []

    class Watched(sweeps.LaneStep):
        def __call__(self, *args):
            taken.append(any(isinstance(y, columns.Conv) for y, _ in self.program.steps))
            return super().__call__(*args)

    monkeypatch.setattr(sweeps, "LaneStep", Watched)
    run(searched(0.75, steps=8), resnet())
    assert taken == [True] * 6 + [False] + [False] * 3  # the best so far again, and the last look
    taken.clear()
    run(searched(0.0, steps=8), resnet())
    assert taken == [False] * 9


def test_a_model_without_such_a_way_is_said():
    found, _, _ = run(searched(0.5), resnet("group"))
    plain, _, _ = run(searched(0.0), resnet("group"))
    assert torch.equal(found.images, plain.images)
    assert all("half:" in " ".join(flags) for flags in found.flags)


@pytest.mark.parametrize("count", [1, 2])
def test_large_models_take_columns_for_single_images_to_the_same_result(monkeypatch, count):
    def found(large: int):
        monkeypatch.setattr(engine, "LARGE", large)
        torch.manual_seed(0)
        batch = private(count)
        seen = observed(resnet().double(), [batch])
        search = searched(0.0, steps=3)
        layers = engine._Lanes(seen, batch.targets[None], search).swept.program.steps
        used = any(isinstance(y, columns.Conv) for y, _ in layers)
        return used, engine.match(seen, batch.targets[None], search, rngs(1), nothing)

    (used, ours), (plainly, plain) = found(0), found(10**9)
    assert (used, plainly) == (count == 1, False)
    torch.testing.assert_close(ours.images, plain.images, rtol=0, atol=1e-9)

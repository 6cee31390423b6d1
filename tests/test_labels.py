"""Label recovery: exact where it must be, and never with more than was granted."""

import pytest
import torch
from torch.nn import functional as F

from fedsec import engine, labels
from fedsec.cost import flops
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ResNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local, Update

SPECS = {
    "lenet": LeNetSpec(),
    "convnet": ConvNetSpec(width=8, norm="group"),
    "resnet20": ResNetSpec(depth=20, norm="group"),
    "mlp": MLPSpec(hidden=(64,)),
}
SHAPE = (3, 16, 16)


def observation(spec, batches, kind=None, **facts) -> tuple[Observation, torch.Tensor]:
    """What a server sees of `batches` of random labels, and those labels, sorted."""
    model = spec.build(SHAPE, 10, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    kind = kind or Local(kind="gradient", lr=1.0)
    updates, truth = [], []
    for v in range(len(batches)):
        rng = stream(0, "private", v)
        y = torch.randint(10, (batches[v],), generator=rng)
        x = torch.rand(batches[v], *SHAPE, generator=rng)
        updates.append(engine.simulate(model, x, F.one_hot(y, 10).float(), kind))
        truth.append(y.sort().values)
    stacked = {k: torch.stack([u[k] for u in updates]).detach() for k in updates[0]}
    known = {"model": model, "update": Update(stacked, {}, batches[0]), "shape": SHAPE}
    seen = Observation("test", known | {"count": batches[0]} | facts)
    return seen, torch.stack(truth)


def rngs(n):
    return [stream(0, "attack", v) for v in range(n)]


def accuracy(found, truth) -> float:
    """Share of labels recovered, with their multiplicity."""
    hits = [
        torch.minimum(F.one_hot(f, 10).sum(0), F.one_hot(t, 10).sum(0)).sum()
        for f, t in zip(found, truth, strict=True)
    ]
    return float(torch.stack(hits).sum()) / truth.numel()


@pytest.mark.parametrize("name", SPECS)
def test_idlg_is_exact_at_batch_one(name):
    seen, truth = observation(SPECS[name], [1] * 12)
    assert torch.equal(labels.recover(seen, rngs(12)), truth)


@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet20"])
@pytest.mark.parametrize("count", [8, 32])
def test_bias_counts_on_untrained_networks(name, count):
    seen, truth = observation(SPECS[name], [count] * 8)
    found = labels.recover(seen, rngs(8))
    assert found.shape == truth.shape
    assert accuracy(found, truth) >= 0.95


def test_bias_counts_are_exact_with_the_true_mean_prediction():
    """n_k = B (p_k - g_k) holds with equality: any error comes from estimating p."""
    model = SPECS["mlp"].build(SHAPE, 10, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    x, y = torch.rand(16, *SHAPE), torch.randint(10, (16,))
    local = Local(kind="gradient", lr=1.0)
    update = engine.simulate(model, x, F.one_hot(y, 10).float(), local)
    bias = [v for k, v in update.items() if k.endswith("bias")][-1]
    p = model(x).softmax(1).mean(0)
    found = labels.bias_counts(bias[None], p[None], 16)
    assert torch.equal(found[0], y.sort().values)
    assert not torch.equal(labels.bias_counts(-bias[None], p[None], 16)[0], y.sort().values)


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("count", [2, 7, 40])
def test_bias_counts_always_name_as_many_labels_as_images(count, shift):
    """Also where noise denies every class, or claims far too many of each."""
    for v in range(20):
        rng = stream(v, "noise")
        gradient = torch.randn(3, 10, generator=rng) + shift
        expected = torch.rand(3, 10, generator=rng).softmax(1)
        assert labels.bias_counts(gradient, expected, count).shape == (3, count)


def test_local_steps_are_brought_back_to_one_gradients_scale():
    local = Local(kind="fedavg", lr=0.001, steps=4, batch=8)
    seen, truth = observation(SPECS["lenet"], [8] * 8, local, local=local)
    assert accuracy(labels.recover(seen, rngs(8)), truth) >= 0.95
    blind, _ = observation(SPECS["lenet"], [8] * 8, local)
    assert accuracy(labels.recover(blind, rngs(8)), truth) < 0.95, "the scale matters"


def test_granted_labels_are_taken_as_they_are():
    mixed = torch.rand(2, 4, 10).softmax(-1)
    seen, _ = observation(SPECS["mlp"], [4, 4], labels=mixed)
    targets, spent = labels.targets_of(seen, rngs(2))
    assert torch.equal(targets, mixed)
    assert spent == 0


def test_what_recovery_costs_is_counted():
    """The mean prediction takes a forward pass of 256 noise images for each victim."""
    seen, _ = observation(SPECS["mlp"], [4, 4])
    one = flops(lambda: seen.model(torch.rand(256, *SHAPE)))
    assert labels.targets_of(seen, rngs(2))[1] == pytest.approx(one, rel=1e-6)


def test_without_an_output_bias_one_image_still_tells_its_label():
    seen, truth = observation(SPECS["lenet"], [1] * 8)
    seen.model.fc[0].register_parameter("bias", None)
    name = "fc.0.bias"
    rest = {k: v for k, v in seen.update.tensors.items() if k != name}
    known = {"model": seen.model, "update": Update(rest, {}, 1), "count": 1, "shape": SHAPE}
    assert torch.equal(labels.recover(Observation("test", known), rngs(8)), truth)

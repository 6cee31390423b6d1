"""Unrolled local steps against plain autograd, one graph for each lane; and their memory."""

import pytest
import torch
from test_engine import CLASSES, MODELS, SHAPE, built, nothing, observed, private, rngs, signed
from torch.func import functional_call, grad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsec import cost, engine, unroll
from fedsec.models import MLPSpec, ModelSpec, ResNet18Spec, ResNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local

WAYS = ("lanes", "stack", "graph")
LOCALS = {  # with the images behind one update
    "one step": (Local("fedavg", 0.1, 1), 2),
    "uneven chunks": (Local("fedavg", 0.1, 3, 3), 5),
    "chunks again": (Local("fedavg", 0.1, 5, 2), 4),
    "gradients of parts": (Local("gradient", 1.0, parts=(2, 3)), 5),
    "parts": (Local("fedavg", 0.1, 3, 2, parts=(2, 4)), 6),
}


def manhattan(guess, goal):
    return torch.stack([(guess[k] - goal[k]).abs().sum() for k in goal]).sum()


def twin(model, images, targets, told, distance, local):
    """Distance and both gradients by one graph of all steps, `create_graph` at each."""
    x, t = images.clone().requires_grad_(), targets.clone().requires_grad_()
    before = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    parts, update = local.parts or (len(x),), dict.fromkeys(before, 0.0)
    for own_x, own_t in zip(x.split(parts), t.split(parts), strict=True):
        weights, lr, chunks = before, 1.0, [(own_x, own_t)]
        if local.kind == "fedavg":
            size, lr = local.batch or len(own_x), local.lr
            chunks = list(zip(own_x.split(size), own_t.split(size), strict=True))
        for step in range(local.steps):
            chunk_x, chunk_t = chunks[step % len(chunks)]
            loss = F.cross_entropy(functional_call(model, weights, (chunk_x,)), chunk_t)
            inner = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            pairs = zip(weights.items(), inner, strict=True)
            weights = {k: w - lr * g for (k, w), g in pairs}
        for k in update:
            update[k] = update[k] + len(own_x) / len(x) * (before[k] - weights[k])
    found = distance(update, told)
    return found.detach(), *torch.autograd.grad(found, (x, t))


def close(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8 * float(plain.abs().max()))


def lanes(count: int, lanes: int = 3):
    rng = stream(0, "lanes")
    images = torch.rand(lanes, count, *SHAPE, generator=rng, dtype=torch.float64)
    mixed = torch.randn(lanes, count, CLASSES, generator=rng, dtype=torch.float64).softmax(-1)
    return images, mixed


def compare(name, mode, kind, distance, ways=WAYS):
    local, count = LOCALS[kind]
    model = built(name, mode)
    seen = observed(model, [private(count, seed=v) for v in range(2)], local)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    goals, victims = seen.update.tensors, [1, 0, 1]
    images, targets = lanes(count)
    expected = [
        twin(model, x, t, {k: o[v] for k, o in goals.items()}, distance, local)
        for x, t, v in zip(images, targets, victims, strict=True)
    ]
    plains = list(zip(*expected, strict=True))
    for way in ways:
        step = unroll.Unrolled(model, goals, distance, local)
        step.way = lambda images, way=way: way
        for ours, plain in zip(step(images, targets, victims), plains, strict=True):
            close(ours, torch.stack(plain))
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), f"the attack changed {k}"


@pytest.mark.parametrize("kind", LOCALS)
@pytest.mark.parametrize(
    ("name", "mode"),
    [("lenet", "train"), ("mlp", "eval")]  # without BatchNorm both modes are the same
    + [(name, mode) for name in ("convnet", "resnet8", "resnet18") for mode in ("train", "eval")],
)
def test_every_way_equals_one_plain_graph(name, mode, kind):
    """Distance, image and target gradients, for lanes of several victims in any order."""
    compare(name, mode, kind, engine.cosine)


@pytest.mark.parametrize("distance", [engine.squared, manhattan])
@pytest.mark.parametrize("name", ["convnet group", "resnet8"])
def test_any_distance_will_do(name, distance):
    compare(name, "train", "uneven chunks", distance)


@pytest.mark.parametrize("steps", range(1, 11))
def test_any_number_of_steps_is_cut_into_segments(steps, monkeypatch):
    monkeypatch.setitem(LOCALS, "steps", (Local("fedavg", 0.1, steps, 1), 2))
    compare("mlp", "eval", "steps", engine.cosine, ("lanes", "stack"))


def told(model, batches, local: Local) -> Observation:
    seen = observed(model, batches, local)
    facts: dict[str, object] = {k: getattr(seen, k) for k in seen.grants}
    return Observation("test", facts | {"local": local})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("known", [True, False])
def test_the_engine_s_objective_is_that_of_its_whole_graph(known, way, monkeypatch):
    """With priors, normalisation and labels optimised jointly, for what is left of the lanes."""
    monkeypatch.setattr(unroll.Unrolled, "way", lambda self, images: way)
    local, count = LOCALS["parts"]
    batches = [private(count, seed=v) for v in range(2)]
    seen = told(built("resnet8", "train"), batches, local)
    targets = torch.stack([b.targets for b in batches]) if known else None
    stack = engine._Lanes(seen, targets, signed(1, restarts=2))
    width = stack.pixels + (0 if known else count * CLASSES)
    x, active = torch.randn(3, width, dtype=torch.float64), torch.tensor([0, 2, 3])
    for ours, plain in zip(stack.objective(x, active), stack.by_autograd(x, active), strict=True):
        close(ours, plain)


def test_a_run_is_the_same_whichever_way_it_goes(monkeypatch):
    local, count = LOCALS["uneven chunks"]
    batches = [private(count, seed=v) for v in range(2)]
    seen = told(built("lenet"), batches, local)
    targets = torch.stack([b.targets for b in batches])
    found = []
    for way in WAYS:
        monkeypatch.setattr(unroll.Unrolled, "way", lambda self, images, way=way: way)
        search = signed(6, restarts=2)
        found.append(engine.match(seen, targets, search, rngs(2), nothing))
    for other in found[1:]:
        torch.testing.assert_close(other.images, found[0].images, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(other.loss, found[0].loss, rtol=1e-8, atol=1e-10)
        assert torch.equal(other.gflop, found[0].gflop)


# ---- which way ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lanes", "steps", "way"),
    [
        ("lenet", 1, 2, "lanes"),
        ("lenet", 4, 2, "graph"),
        ("lenet", 4, 2000, "stack"),
        ("wide", 4, 2, "lanes"),
    ],
)
def test_small_lanes_share_calls_and_a_graph_while_it_fits(name, lanes, steps, way, monkeypatch):
    monkeypatch.setitem(MODELS, "wide", ResNet18Spec(width=64))
    model, local = built(name, dtype=torch.float32), Local("fedavg", 0.1, steps)
    goal = {k: p.detach()[None] for k, p in model.named_parameters()}
    step = unroll.Unrolled(model, goal, engine.cosine, local)
    assert step.way(torch.rand(lanes, 2, *SHAPE)) == way


# ---- memory -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it held at once, looked at after 20 operations."""

    def __init__(self):
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.operations += 1
        if self.operations % 20 == 0:
            self.held = {k: held for k, held in self.held.items() if not held[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def peak(way: str, steps: int, spec: ModelSpec) -> int:
    model = spec.build(SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    goal = {k: torch.randn(1, *p.shape) for k, p in model.named_parameters()}
    step = unroll.Unrolled(model, goal, engine.cosine, Local("fedavg", 0.1, steps))
    step.way = lambda images: way
    images, targets = torch.rand(2, 4, *SHAPE), torch.eye(CLASSES)[:4].expand(2, -1, -1)
    with Live() as live:
        step(images, targets, [0, 0])
    return live.peak


def test_four_times_the_steps_take_hardly_more_memory():
    """Where activations are most of it."""
    spec = ResNetSpec(depth=8, width=4)
    few, many = ({way: peak(way, steps, spec) for way in WAYS} for steps in (4, 16))
    assert many["lanes"] < 1.5 * few["lanes"]
    assert many["stack"] < 1.5 * few["stack"]
    assert many["graph"] > 3 * few["graph"], "else this test could not fail"
    assert few["lanes"] < few["stack"] < 0.5 * few["graph"]


@pytest.mark.parametrize("way", ["lanes", "stack"])
def test_of_the_weights_a_square_root_of_the_steps_is_kept(way):
    """Where weights are most of it: nine times the steps keep three times as many."""
    four, many = (peak(way, steps, MLPSpec(hidden=(256,))) for steps in (4, 36))
    assert many < 2.5 * four


# ---- arithmetic ---------------------------------------------------------------------------------


def product(images):
    """A prior that multiplies matrices."""
    rows = images.flatten(1)
    return (rows @ rows.T).sum()


@pytest.mark.parametrize(
    ("kind", "known"), [*((kind, True) for kind in LOCALS), ("uneven chunks", False)]
)
@pytest.mark.parametrize(("name", "mode"), [("lenet", "eval"), ("mlp batch", "train"),
                                            ("resnet8", "train")])  # fmt: skip
def test_the_count_is_that_of_the_whole_graph(name, mode, kind, known):
    local, count = LOCALS[kind]
    batch = private(count)
    seen = told(built(name, mode), [batch], local)
    targets = batch.targets[None] if known else None
    stack = engine._Lanes(seen, targets, signed(1, priors=((1.0, product),)))
    width = stack.pixels + (0 if known else count * CLASSES)
    x, goal = torch.randn(width, dtype=torch.float64), {k: t[0] for k, t in stack.observed.items()}
    facts = batch.targets if known else torch.zeros(())
    whole = cost.flops(lambda: grad(stack._one)(x, facts, goal, []))
    assert cost.flops(lambda: stack._plain_step(x[None])) == pytest.approx(whole, rel=1e-12)

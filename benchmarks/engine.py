"""The engine's step beside one plain forward and backward pass of the same model and batch.

    python benchmarks/engine.py                              four models, batch 1 and 16
    python benchmarks/engine.py --models lenet --seconds 1   a look in seconds
    python benchmarks/engine.py --device cuda                64 and 256 lanes as well
    python benchmarks/engine.py --overhead                   what counting and clocks add to a run
    python benchmarks/engine.py --profile                    where the time goes (profile.txt)

Columns, for one lane: `plain`, milliseconds of one forward and backward pass; then as multiples of
it, the median over turns that they take with it: `twin`, an eager double backward; `autograd`, the
engine without sweeps; `sweeps`, the engine's step; `half`, the same in bfloat16, where the layers
have such a way. GFLOP are counted: of the double backward, which
records state, and of the sweeps. MB: what the sweeps' step adds to memory in use, of all lanes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

if __name__ == "__main__":  # before torch loads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import cost, engine, models, rules
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Local, Update

MODELS = {
    "lenet": models.LeNetSpec(),
    "convnet": models.ConvNetSpec(),
    "resnet20": models.ResNetSpec(),
    "resnet18": models.ResNet18Spec(),
}
SHAPE, CLASSES, LEAST = (3, 32, 32), 10, 3  # turns, at least
Step = Callable[[], object]


def median_ratios(
    steps: dict[str, Step], lanes: dict[str, int], seconds: float, cuda: bool
) -> tuple[float, dict[str, float]]:
    """Seconds of "plain", and of each other step, for one lane, its median multiple of "plain"."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # not timed: kernels are chosen, memory is taken
        step()
    end = time.perf_counter() + seconds
    while len(taken["plain"]) < LEAST or time.perf_counter() < end:
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - start) / lanes[name])
    turns = {name: zip(taken[name], taken["plain"], strict=True) for name in steps}
    ratios = {name: statistics.median(t / p for t, p in both) for name, both in turns.items()}
    return statistics.median(taken["plain"]), ratios


def ways(
    name: str, mode: str, count: int, lanes: int, device: torch.device
) -> tuple[float, dict[str, Step]]:
    """GFLOP of a double backward, and a plain pass and the step's ways on one problem."""
    spec, grey = MODELS[name], (0.5,) * 3
    model = spec.build(SHAPE, CLASSES, grey, grey, stream(0, "model")).to(device)
    model.train(mode == "train").requires_grad_(False)
    rng = stream(0, "images")
    x = torch.rand(count, *SHAPE, generator=rng).to(device)
    targets = torch.eye(CLASSES)[torch.randint(CLASSES, (count,), generator=rng)].to(device)
    private = torch.rand(count, *SHAPE, generator=rng).to(device)
    update = {k: g[None] for k, g in gradients(model, private, targets, False).items()}
    known = {"model": model, "update": Update(update, {}, count), "count": count, "shape": SHAPE}
    seen = Observation("benchmark", known)
    search = engine.Search(distance=engine.cosine, rule=rules.Adam(lr=0.1), steps=1, restarts=lanes)
    stack = engine._Lanes(seen, targets[None], search)
    halved = engine._Lanes(seen, targets[None], engine.replace(search, half=1.0))
    z = stack.begin([stream(0, "attack")])
    active = torch.zeros(lanes, dtype=torch.long, device=device)
    step = engine.recorded(stack.objective, device)
    rough = engine.recorded(halved.objective, device)
    in_half: dict[str, Step] = {"half": lambda: rough(z, active)} if halved.halved else {}
    return stack.gflop_step, in_half | {
        "plain": lambda: gradients(model, x, targets, False),
        "twin": lambda: double_backward(model, x, targets, update),
        "autograd": lambda: stack.by_autograd(z, active),
        "sweeps": lambda: step(z, active),
        "eager": lambda: stack.objective(z, active),
    }


def row(name: str, mode: str, count: int, lanes: int, options: argparse.Namespace) -> str:
    """One line of the table: a model in a mode, at a batch size, with so many restarts."""
    device = torch.device(options.device)
    double, steps = ways(name, mode, count, lanes, device)
    did = cost.flops(steps.pop("eager")) / lanes
    each = {"plain": 1, "twin": 1, "autograd": lanes, "sweeps": lanes, "half": lanes}
    with cost.Clock(device) as clock:
        steps["sweeps"]()
    plain, ratio = median_ratios(steps, each, options.seconds, device.type == "cuda")
    half = f"{ratio['half']:.2f}" if "half" in ratio else "-"
    memory = "-" if clock.peak_mb is None else f"{clock.peak_mb:.0f}"
    return (
        f"{name:9}{mode:6}{count:5}{lanes:6}{1e3 * plain:10.2f}{ratio['twin']:8.2f}"
        f"{ratio['autograd']:10.2f}{ratio['sweeps']:8.2f}{half:>6}{double:10.3f}{did:9.3f}"
        f"{memory:>8}"
    )


def gradients(model: nn.Module, x: Tensor, targets: Tensor, create_graph: bool):
    weights = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), targets)
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph)
    return dict(zip(weights, found, strict=True))


def double_backward(model: nn.Module, x: Tensor, targets: Tensor, update: dict[str, Tensor]):
    x = x.clone().requires_grad_()
    guess = gradients(model, x, targets, True)
    return torch.autograd.grad(engine.cosine(guess, {k: t[0] for k, t in update.items()}), x)


def profile(name: str, lanes: int, steps: int = 10) -> str:
    """Where a step's time goes on a CPU thread: operators by their own share, before and after."""
    _, which = ways(name, "eval", 1, lanes, torch.device("cpu"))
    parts = []
    for title, way in (("before: autograd", "autograd"), ("after: sweeps", "eager")):
        step = which[way]
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            for _ in range(steps):
                step()
        found = sorted(seen.key_averages(), key=lambda o: -o.self_cpu_time_total)
        total = sum(o.self_cpu_time_total for o in found)
        calls = sum(o.count for o in found) / steps
        parts.append(
            f"{name}, batch 1, {lanes} lane{'s' * (lanes > 1)}, {title}: "
            f"{total / steps / 1e3:.1f} ms a step, {calls:.0f} operator calls"
        )
        parts += [
            f"    {o.self_cpu_time_total / total:6.1%} {o.count / steps:8.0f} x {o.key}"
            for o in found[:12]
        ]
    return "\n".join(parts)


def overhead(lanes: int, steps: int = 300) -> float:
    """Share of measuring in the CPU seconds of one search on lenet."""
    half, local = (0.5,) * 3, Local(kind="gradient", lr=1.0)
    model = models.LeNetSpec().build(SHAPE, CLASSES, half, half, stream(0, "model"))
    batch = Batch(torch.rand(1, *SHAPE), torch.eye(CLASSES)[:1])
    update = engine.simulate(model, batch.images, batch.targets, local)
    model.requires_grad_(False)
    seen = Observation("benchmark", {"model": model, "count": 1, "shape": SHAPE,
        "update": Update({k: t.detach()[None] for k, t in update.items()}, {}, 1)})  # fmt: skip
    rule = rules.Adam(lr=0.1)
    search = engine.Search(distance=engine.cosine, rule=rule, steps=steps, restarts=lanes)

    measuring = 0.0

    def timed(fn: Callable) -> Callable:
        def run(*given: object) -> object:
            nonlocal measuring
            start = time.process_time()
            try:
                return fn(*given)
            finally:
                measuring += time.process_time() - start

        return run

    counted, engine.flops_once = engine.flops_once, timed(engine.flops_once)
    clock, start = cost.Clock(), time.process_time()
    try:
        timed(clock.__enter__)()
        rngs = [stream(0, "attack")]
        engine.match(seen, batch.targets[None], search, rngs, lambda step, steps, loss: None)
        timed(clock.__exit__)(None, None, None)
        timed(cost.backprop_gflop)(model, batch)
    finally:
        engine.flops_once = counted
    return measuring / (time.process_time() - start)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--lanes", nargs="+", type=int, help="default 1 4 16; 64 256 on a GPU")
    parser.add_argument("--mode", nargs="+", choices=["train", "eval"], default=["eval", "train"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line of the table")
    parser.add_argument("--profile", action="store_true", help="only where the time goes")
    parser.add_argument("--overhead", action="store_true", help="only what measuring a cost adds")
    options = parser.parse_args(arguments)
    if options.overhead:
        overhead(1)  # loads what is loaded lazily
        for some in options.lanes or (1, 8):
            first, later = [], []
            for _ in range(5):
                cost._counted.clear()  # as in a fresh process
                first.append(overhead(some))
                later.append(overhead(some))
            print(
                f"lenet, {some} lane(s), 300 steps: measuring takes {statistics.median(first):.2%} "
                f"of the first stack, {statistics.median(later):.2%} of a later one"
            )
        return 0
    if options.profile:
        print(f"{__file__.rpartition('/')[2]} --profile   torch {torch.__version__}, one thread")
        for name in options.models:
            for some in options.lanes or (1, 8):
                print(profile(name, some), flush=True)
        return 0
    gpu = options.device == "cuda"
    lanes = options.lanes or [1, 4, 16, *([64, 256] if gpu else [])]
    machine = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}   {machine}   threads {torch.get_num_threads()}")
    print(f"{'multiples of plain':>55}{'GFLOP: double':>26}")
    print(
        "model    mode  batch lanes  plain ms    twin  autograd  sweeps  half  backward   sweeps"
        "      MB"
    )
    cases = [(m, k, b) for m in options.models for b in options.batch for k in options.mode]
    for name, mode, count in cases:
        for some in lanes:
            print(row(name, mode, count, some, options), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

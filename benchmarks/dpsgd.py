"""DP-SGD's step beside one plain forward and backward pass of the same model and batch.

    python benchmarks/dpsgd.py                              resnet18, lenet and others, batch 16, 64
    python benchmarks/dpsgd.py --models lenet --turns 3     a look in seconds

Columns: `plain`, milliseconds of the mean gradient, in CPU time on one thread; then as multiples of
it, the median over turns that they take with it: `examples`, clipping per-example gradients;
`ghost`, without them (fedsec/ghost.py); a star marks what dpsgd takes. MB: what each adds to the
memory of the process at its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

if __name__ == "__main__":  # before torch loads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from defenses.dpsgd import SMALL, clip_factors, sum_by_example
from fedsec import cost, models
from fedsec.client import mean_gradient, parameters
from fedsec.ghost import scaled_sum
from fedsec.rng import stream
from fedsec.types import Batch

MODELS = {
    "lenet": models.LeNetSpec(),
    "vit": models.ViTSpec(),
    "resnet20": models.ResNetSpec(norm="group"),
    "wrn16_4": models.WideResNetSpec(),
    "resnet18": models.ResNet18Spec(norm="group"),
}
SHAPE, CLASSES, CLIP = (3, 32, 32), 10, 1.0
Step = Callable[[], object]


def steps(name: str, count: int) -> tuple[int, dict[str, Step]]:
    """The number of parameters, and one step's ways."""
    half = (0.5,) * 3
    model = MODELS[name].build(SHAPE, CLASSES, half, half, stream(0, "model"))
    rng = stream(0, "images")
    labels = torch.randint(CLASSES, (count,), generator=rng)
    batch = Batch(torch.rand(count, *SHAPE, generator=rng), torch.eye(CLASSES)[labels])
    views, scales = batch.images[:, None], partial(clip_factors, clip=CLIP)
    return sum(p.numel() for p in parameters(model).values()), {
        "plain": lambda: mean_gradient(model, batch),
        "examples": lambda: sum_by_example(model, views, batch.targets, CLIP),
        "ghost": lambda: scaled_sum(model, views, batch.targets, scales),
    }


def timed(ways: dict[str, Step], turns: int) -> dict[str, list[float]]:
    """CPU seconds of each way in each turn; the ways take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.process_time()
            way()
            taken[name].append(time.process_time() - start)
    return taken


def peak(way: Step) -> str:
    """MB that the process holds more while it does this; it first gives back what it holds free."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with cost.Clock() as clock:
        way()
    return "-" if clock.peak_mb is None else f"{clock.peak_mb:.0f}"


def row(name: str, count: int, turns: int) -> str:
    """One line of the table."""
    size, ways = steps(name, count)
    held = {way: peak(step) for way, step in ways.items()}  # not timed: kernels are chosen
    taken = timed(ways, turns)
    ratio = {
        way: statistics.median(t / p for t, p in zip(taken[way], taken["plain"], strict=True))
        for way in ways
    }
    star = "ghost" if size > SMALL else "examples"
    marked = {way: f"{ratio[way]:.2f}" + (" *" if way == star else "  ") for way in ways}
    return (
        f"{name:9}{count:6}{1e3 * statistics.median(taken['plain']):10.1f}"
        f"{marked['examples']:>12}{marked['ghost']:>10}"
        f"{held['plain']:>10}{held['examples']:>10}{held['ghost']:>8}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    machine = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}   {machine}   threads {torch.get_num_threads()}")
    print(f"{'multiples of plain':>45}{'MB: plain':>12}")
    print("model     batch  plain ms  examples     ghost            examples   ghost")
    for name in options.models:
        for count in options.batch:
            print(row(name, count, options.turns), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

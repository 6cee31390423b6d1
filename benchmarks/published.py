"""Prints the README's figures for `linear` and `inverting`: PSNR in dB, with their spread.

    python benchmarks/published.py CIFAR10.npz [DRAWS]

Ten test images of CIFAR-10 (an .npz file with MedMNIST's keys), untrained networks, eval mode,
batch 1; DRAWS (default 5) are draws of LeNet's weights.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from attacks.inverting import Inverting
from attacks.linear import Linear
from fedsec import engine, metrics
from fedsec.data import Npz
from fedsec.models import LeNetSpec, MLPSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local, Update
from fedsec.verify.matching import presets

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

REST = {"restarts": 1, "patience": 0, "halving": False}


def attacked(attack, spec, seed: int, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """PSNR of each image [n], uncapped, from its gradient alone."""
    model = spec.build((3, 32, 32), 10, MEAN, STD, stream(seed, "model")).to(images.dtype)
    local = Local(kind="gradient", lr=1.0)
    pairs = zip(images.split(1), targets.split(1), strict=True)
    updates = [engine.simulate(model, x, t, local) for x, t in pairs]
    stacked = {k: torch.stack([u[k] for u in updates]).detach() for k in updates[0]}
    facts = {"model": model.requires_grad_(False), "update": Update(stacked, {}, 1), "count": 1}
    seen = Observation("published", facts | {"shape": (3, 32, 32), "data_range": (0.0, 1.0)})
    rngs = [stream(0, "attack", v) for v in range(len(images))]
    found = attack(seen, rngs, lambda step, steps, loss: None)
    return metrics.psnr(found.images[:, 0], images, cap=torch.inf)


def main(path: str, draws: int) -> None:
    torch.set_num_threads(1)
    batch = Npz(path=path).load().test.batch(range(10), 10)
    for dtype in (torch.float64, torch.float32):
        images, targets = batch.images.to(dtype), batch.targets.to(dtype)
        worst = attacked(Linear(), MLPSpec(hidden=(128, 64)), 0, images, targets).min()
        print(f"linear, {dtype}: worst of 10 {worst:.0f} dB")
    for rule, lr, steps, tv in (
        ("signed", 0.1, 3000, 1e-4),
        ("signed", 0.1, 1000, 1e-2),
        ("spectral", 0.5, 300, 3e-3),  # the same objective
        ("configured", 0.5, 300, 3e-3),
        ("configured", 0.5, 1000, 1e-3),
    ):
        if rule == "configured":
            attack = replace(presets("attack")["inverting"], lr=lr, steps=steps, tv=tv)
        else:
            attack = Inverting(rule=rule, lr=lr, steps=steps, tv=tv, **REST)
        spec = LeNetSpec(mode="eval")
        means = [
            float(attacked(attack, spec, s, batch.images, batch.targets).mean())
            for s in range(draws)
        ]
        each = " ".join(f"{m:.1f}" for m in means)
        print(
            f"inverting, {rule}, {steps} steps, tv {tv:g}: {each}, mean {sum(means) / draws:.1f} dB"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)

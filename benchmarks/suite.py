"""`attack=auto` against single attacks at the same budget: PSNR in dB, over models and defenses.

    python benchmarks/suite.py [--budget 300] [--images 8] [--rounds 50] [--models lenet ...]

Photographs that come with fedsec; threat honest_server. For each model, fresh and after --rounds
rounds of undefended training, batches of 1 and of 8, and five defenses. Every attack gets as many
steps as --budget pays, in backprop equivalents for each update. Prints a Markdown table as it goes,
and then by how much auto's choice is above each single attack on the same image, with a bootstrap
interval that resamples images.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fedsec import cost, records, stats
from fedsec.client import Gradient
from fedsec.data import Photos
from fedsec.federation import Federation, Job, accuracy, federate
from fedsec.models import ConvNetSpec, LeNetSpec, ModelSpec, ResNetSpec
from fedsec.verify.matching import found_by, presets, scored, victims_of

MODELS: dict[str, ModelSpec] = {
    "lenet": LeNetSpec(),
    "convnet": ConvNetSpec(width=16),
    "resnet20": ResNetSpec(),
}
DEFENSES = ("none", "prune", "noise", "mixup", "dpsgd")
SINGLE = ("inverting", "modern", "gradinversion", "unmix")


def trained(dataset, spec: ModelSpec, rounds: int) -> tuple[torch.nn.Module, float]:
    """A model after so many undefended rounds, and its test accuracy."""
    job = Job(
        dataset=None, model=spec, client=Gradient(lr=0.1, batch=16), clients=4, rounds=rounds,
        federation=Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2),
        defense=presets("defense")["none"], seed=0,
    )  # fmt: skip
    model = federate(job, dataset, lambda *_: None).model
    return model, accuracy(model, dataset.test, "cpu")


def single(name: str, exchanges, gflop: float):
    """The attack with as many steps as `gflop` pays, or None where it does not apply."""
    attack = presets("attack")[name]
    norms = any("running_mean" in k for k in exchanges[0].model.state_dict())
    defense = exchanges[0].defense
    if (name == "gradinversion" and not norms) or (name == "unmix" and not defense.mixes):
        return None
    if name == "unmix":  # it matches twice
        few = found_by(replace(attack, steps=1), exchanges[:1], "honest_server")
        more = found_by(replace(attack, steps=3), exchanges[:1], "honest_server")
        step = float(more.gflop[0] - few.gflop[0]) / 2
        return replace(attack, steps=max(1, int(gflop / max(step, 1e-12)) - 2))
    one = replace(attack, restarts=1)
    few, more = (found_by(replace(one, steps=n), exchanges[:1], "honest_server") for n in (1, 3))
    step = float(more.gflop[0] - few.gflop[0]) / 2
    restarts = min(attack.restarts, 2) if name == "gradinversion" else 1
    return replace(one, restarts=restarts, steps=max(1, int(gflop / step / restarts) - 1))


def main(budget: float, images: int, rounds: int, models: list[str]) -> None:
    torch.set_num_threads(1)
    dataset = Photos().load()
    machine = f"{os.cpu_count()} cores, torch {torch.__version__.split('+')[0]}, one thread"
    print(f"commit {records.commit()}, {machine}; {budget:g} backprops an update, {images} images")
    print(
        "| model | age | batch | defense | null | auto | best stage | " + " | ".join(SINGLE) + " |"
    )
    print("|" + "---|" * (7 + len(SINGLE)))
    above: dict[str, list[float]] = defaultdict(list)
    clusters: dict[str, list[tuple]] = defaultdict(list)
    for name in models:
        for age in (0, rounds):
            for defense in DEFENSES:
                spec = MODELS[name]
                if defense == "dpsgd" and spec.norm == "batch":
                    spec = replace(spec, norm="group")
                model, said = (None, "fresh")
                if age:
                    model, right = _trained(dataset, spec, age)
                    said = f"{age} rounds, {100 * right:.0f} %"
                for count in (1, 8):
                    if defense == "mixup" and count == 1:
                        continue  # one image has none to be mixed with
                    _row(
                        dataset, (name, said, count, defense), spec, model, budget,
                        max(1, images // count), above, clusters,
                    )  # fmt: skip
    for other, gains in above.items():
        mean, low, high = stats.bootstrap(gains, clusters[other])
        level = sum(g >= -0.5 for g in gains) / len(gains)
        print(
            f"auto above {other}: {mean:+.2f} dB [{low:+.2f}, {high:+.2f}] over {len(gains)} "
            f"images; not more than 0.5 dB below on {100 * level:.0f} %"
        )


_models: dict[tuple, tuple[torch.nn.Module, float]] = {}


def _trained(dataset, spec: ModelSpec, rounds: int) -> tuple[torch.nn.Module, float]:
    key = (spec, rounds)
    if key not in _models:
        _models[key] = trained(dataset, spec, rounds)
    return _models[key]


def _row(dataset, cell, spec, model, budget, victims, above, clusters) -> None:
    name, said, count, defense = cell
    protect = presets("defense")[defense]
    exchanges = victims_of(
        dataset, spec, victims=victims, count=count, defense=protect, model=model
    )
    gflop = budget * cost.backprop_gflop(exchanges[0].model, exchanges[0].batch)
    grey = torch.full((victims, count, *dataset.shape), 0.5)
    null = _mean([v for e, g in zip(exchanges, grey, strict=True) for v in _psnr(g, e)])
    start = time.time()
    auto = found_by(replace(presets("attack")["auto"], budget=budget), exchanges, "honest_server")
    reached = scored(auto, exchanges)
    stages = [scored(stage, exchanges) for stage in auto.stages]
    cells = [
        f"{null:.1f}",
        f"{_mean(reached):.1f}",
        f"{_mean(map(max, zip(*stages, strict=True))):.1f}",
    ]
    for other in SINGLE:
        attack = single(other, exchanges, gflop)
        if attack is None:
            cells.append("")
            continue
        own = scored(found_by(attack, exchanges, "honest_server"), exchanges)
        cells.append(f"{_mean(own):.1f}")
        above[other] += [a - b for a, b in zip(reached, own, strict=True)]
        clusters[other] += [(i,) for i in range(len(own))]  # the same photographs everywhere
    print(f"| {name} | {said} | {count} | {defense} | {' | '.join(cells)} |", flush=True)
    print(f"  {time.time() - start:.0f} s", file=sys.stderr, flush=True)


def _psnr(guess, exchange) -> list[float]:
    from fedsec import metrics

    return metrics.psnr(guess, exchange.batch.images).tolist()


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    asked = parser.parse_args()
    main(asked.budget, asked.images, asked.rounds, asked.models)

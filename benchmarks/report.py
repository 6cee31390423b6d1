"""How long a report over many runs takes, and how large its page is.

    python benchmarks/report.py                       20,000 rows in 625 runs, 130 settings
    python benchmarks/report.py --images 2 --seeds 40     as many rows in 5,000 runs

It makes up a sweep of attacks x defenses x seeds as `fedsec.run` would leave it, every run with its
control, its pictures and its configuration, and reports on it in a process of its own. CPU seconds
are those of that process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedsec import records, report
from fedsec.records import Row

ATTACKS = ("inverting", "modern", "dlg", "gradinversion", "cpl")
DEFENSES = ("dpsgd", "prune", "noise", "quantize", "clip")
STRENGTHS = (1, 2, 3, 4, 5)
SAMPLES = 8  # different pictures: to draw thousands takes longer than to report on them
POINTS = 50  # of a loss curve
CONFIG = """images: {images}
victim_batch: 1
rounds: 40
seed: {seed}
out: {out}
attack:
  _target_: attacks.{attack}.Attack
  steps: 300
  lr: 0.5
  restarts: 1
defense:
  _target_: defenses.{defense}.Defense
  strength: {strength}
threat:
  _target_: fedsec.threat.ThreatModel
  name: honest_server
  grants: [model, update, count, shape]
  tampers: false
client: {{_target_: fedsec.client.Gradient, lr: 0.2, batch: 32}}
data: {{_target_: fedsec.data.Photos, size: 32, per_class: 500, contrast: 0.03}}
model: {{_target_: fedsec.models.LeNetSpec, norm: none, mode: train, weights: null}}
federation: {{engine: inline, strategy: fedavg, split: iid, alpha: 0.5, shards: 2}}
"""


def made_up(folder: Path, images: int, seeds: int, attacks: int = 5, strengths: int = 5) -> int:
    """A sweep's folders; the number of rows in them."""
    dice = random.Random(0)
    pictures = _pictures(folder, images)
    count = 0
    for attack in ATTACKS[:attacks]:
        for defense in DEFENSES:
            for strength in STRENGTHS[:strengths]:
                for seed in range(seeds):
                    out = folder / f"{attack}-{defense}-{strength}-{seed}"
                    out.mkdir()
                    rows = [
                        _row(attack, name, seed, i, dice, strength)
                        for name in ("none", defense)
                        for i in range(images)
                    ]
                    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
                    (out / records.ROWS).write_text(text)
                    said = {"images": images, "seed": seed, "out": out, "attack": attack,
                            "defense": defense, "strength": strength}  # fmt: skip
                    (out / records.CONFIG).write_text(CONFIG.format(**said))
                    (out / records.RUN).write_text(json.dumps(_run(said, dice)))
                    drawn = pictures[defense, dice.randrange(SAMPLES)]
                    (out / records.GRID).write_bytes(drawn)
                    count += len(rows)
    return count


def _row(attack: str, defense: str, seed: int, i: int, dice: random.Random, strength: int) -> Row:
    # the control's numbers are the same in each cell of a sweep
    own = random.Random(f"{attack} {seed} {i}") if defense == "none" else dice
    psnr = own.gauss(20 if defense == "none" else 20 - 2.5 * strength, 2)
    curve = [[6 * n, float(f"{0.5 * 0.9**n + 0.01 * own.random():.4g}")] for n in range(POINTS)]
    return Row(
        run="made up", attack=attack, defense=defense, threat="honest_server", client="gradient",
        data="photos", model="lenet", seed=seed, round=0, victim=i, image=1000 * seed + i, batch=1,
        psnr=psnr, ssim=psnr / 40, mse=10 ** (-psnr / 10), lpips=1 - psnr / 40, null_psnr=13.0,
        null="grey", label_true=3, label_pred=3, label_ok=True, loss=0.01, steps=300, seconds=0.4,
        gflop=3.3, backprops=886.0, peak_mb=20.0, mode="train", curve=tuple(map(tuple, curve)),
    )  # fmt: skip


def _run(said: dict, dice: random.Random) -> dict:
    lost = 0.1 * said["strength"] / (said["strength"] + 1) + 0.005 * dice.random()
    words = (f"{key}={said[key]}" for key in ("attack", "defense", "seed", "out"))
    return records.filled({
        "status": "done",
        "utility": {"accuracy": 0.6 - lost, "control_accuracy": 0.6, "accuracy_loss": lost,
                    "test_images": 1000, "chance_accuracy": 0.1},
        "privacy": {"epsilon": 8 / said["strength"] if said["defense"] == "dpsgd" else None,
                    "delta": 1e-5, "accountant": "PRV"},
        "cost": {"device": "cpu, 1 thread", "seconds_per_round": 0.05, "sent_bytes": 63304.0,
                 "control_seconds_per_round": 0.04, "control_sent_bytes": 63304.0},
        "nulls": {"grey": 13.0, "mean": 12.8, "unrelated": 9.0},
        "grants": ["count", "model", "shape", "update"], "flags": [], "commit": "abc1234",
        "versions": {"torch": "2.15.0"}, "random_defense": True,
        "choices": {k: said[k] for k in ("attack", "defense")},
        "command": f"python -m fedsec.run {' '.join(words)}",
    })  # fmt: skip


def _pictures(folder: Path, images: int) -> dict[tuple[str, int], bytes]:
    drawn, path = {}, folder / "one.png"
    rng = np.random.default_rng(0)
    for defense in DEFENSES:
        for n in range(SAMPLES):
            few = rng.random((min(images, 16), 3, 32, 32))
            captions = ["20.0 dB"] * len(few)
            rows = [("none (control)", few, captions), (defense, few, captions)]
            report.grid(path, few, rows)
            drawn[defense, n] = path.read_bytes()
    path.unlink()
    return drawn


def measured(folder: Path) -> tuple[float, float, float]:
    """CPU seconds and MB of memory that the report takes, and MB of its page."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fedsec.report", str(folder)],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, after.ru_maxrss / 1024, (folder / records.REPORT).stat().st_size / 2**20


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="of a run and defense")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="leave everything in this new folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as aside:
        folder = options.keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        rows = made_up(folder, options.images, options.seeds)
        runs = len(list(folder.glob(f"*/{records.RUN}")))
        seconds, memory, page = measured(folder)
    print(f"{rows} rows in {runs} runs: {seconds:.1f} CPU seconds, {memory:.0f} MB of memory, "
          f"a page of {page:.1f} MB")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

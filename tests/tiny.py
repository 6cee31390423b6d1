"""The smallest runs that are still whole ones: data, words, and two ways to run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsec import run

ROOT = Path(run.__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
SMALL = ("rounds=1", "images=4", "clients=2", "client.batch=4", "store=null")
TIMINGS = ("seconds", "peak_mb")  # what differs between equal runs


def arrays(size: int = 16, classes: int = 4, train: int = 80, test: int = 24) -> dict:
    """Noise around a brightness of its own for each class, as MedMNIST keys it."""
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        noise = rng.integers(0, 60, (count, size, size, 3))
        return (noise + 40 * labels[:, None, None, None]).astype(np.uint8), labels

    images, labels = part(train)
    held, answers = part(test)
    return {"train_images": images, "train_labels": labels,
            "test_images": held, "test_labels": answers}  # fmt: skip


def npz(folder: Path, **kind: int) -> Path:
    np.savez(folder / "tiny.npz", **arrays(**kind))
    return folder / "tiny.npz"


def words(folder: Path, *more: str, steps: int = 2, out: str = "out") -> list[str]:
    """A run into `folder`/`out`, on tiny images unless `more` says otherwise; 0 steps: not said."""
    given = {word.partition("=")[0] for word in more}
    first = [*SMALL, f"out={folder / out}"]
    if "data" not in given:
        path = folder / "tiny.npz"
        first += ["data=npz", f"data.path={path if path.exists() else npz(folder)}"]
    first += [f"attack.steps={steps}"] if steps else []
    return [word for word in first if word.partition("=")[0] not in given] + list(more)


def call(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> int:
    """The command line in this process."""
    monkeypatch.setattr(sys, "argv", ["fedsec"])
    return run.main(line)


def spawn(line: list[str], cwd: Path, **more) -> subprocess.Popen:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsec.run", *line], cwd=cwd, env=ENV, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def whole(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def numbers(folder: Path) -> list[dict]:
    """The rows without what may differ between equal runs."""
    apart = ("run", *TIMINGS)
    return [{k: v for k, v in row.items() if k not in apart} for row in rows(folder)]

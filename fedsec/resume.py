"""What a run keeps in OUT/state while it is not done, so that the same command goes on.

Finished stacks of victims with their cost, and how far the searches of the half-done one are. Each
is one safetensors file (no code is run on reading it) with a checksum, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsec import records
from fedsec.attack import Place, Progress, Told
from fedsec.types import Tensors

SECONDS = 30.0  # between two times that an attack keeps how far it is
ROUNDING = 1e-4  # relative: a GPU gives equal inputs up to this only


def write(path: Path, tensors: Tensors, about: dict[str, Any]) -> None:
    """One file with `tensors` and with `about`, which JSON can hold. Raises records.NotSaved."""
    from safetensors.torch import save

    alone = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    text = json.dumps(about)
    whole = save(alone, {"about": text, "checksum": checksum(text, alone)})
    path.parent.mkdir(exist_ok=True)
    records.write_whole(path, whole)


def read(path: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """What `write` wrote; None where there is no such file, or not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        if said["checksum"] != checksum(said["about"], tensors):
            return None
        return tensors, json.loads(said["about"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def checksum(text: str, tensors: Tensors) -> str:
    """A digest of a text and of tensors on the CPU, by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code(attacks: bool = True, aside: Collection[Path] = ()) -> str:
    """A digest of the sources of fedsec, attacks and defenses, their YAML, and what was imported.

    An attack of the user's own may import modules of theirs; what is installed has a version.
    Without `attacks`, and files `aside`: of what determines a federation.
    """
    root = Path(__file__).resolve().parent.parent
    parts = [root / name for name in ("fedsec", "defenses", *["attacks"] * attacks)]
    files = {p for part in parts for p in part.rglob("*.py")}
    if attacks:
        files |= set((root / "configs").rglob("*.yaml"))  # of the attacks that attack=auto runs
    for path in _imported():
        if attacks or root / "attacks" not in path.parents:
            files.add(path)
    digest = hashlib.sha256()
    for file in sorted(files - set(aside)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _imported() -> Iterator[Path]:
    """The source files of the modules in use that are not installed."""
    for module in list(sys.modules.values()):
        path = _own(getattr(module, "__file__", None) or "")
        if path is not None:
            yield path


@cache
def _own(file: str) -> Path | None:
    """The source at a path, if it is one and not installed: there are thousands to ask about."""
    libraries = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = {Path(sysconfig.get_path(name)).resolve() for name in libraries}
    path = Path(file).resolve()
    own = path.suffix == ".py" and path.is_file() and not installed & set(path.parents)
    return path if own else None


@dataclass(frozen=True)
class Problem:
    """By what a kept file is known again: a text, and the norm of each input."""

    text: str
    norms: Tensor
    rounding: float

    @staticmethod
    def of(text: str, inputs: Iterable[Tensor]) -> Problem:
        inputs = list(inputs)
        norms = [t.detach().double().nan_to_num(0, 0, 0).norm() for t in inputs]
        norms = torch.stack(norms).cpu()
        return Problem(text, norms, ROUNDING if any(t.is_cuda for t in inputs) else 0.0)

    def kept(self, path: Path) -> tuple[Tensors, dict[str, Any]] | None:
        """What `keep` wrote for the same problem."""
        found = read(path)
        if found is None or found[1].get("problem") != self.text:
            return None
        tensors, about = found
        norms = tensors.pop("norms", torch.empty(0))
        shaped = norms.shape == self.norms.shape
        equal = shaped and torch.allclose(norms, self.norms, rtol=self.rounding, atol=0.0)
        return (tensors, about) if equal else None

    def keep(self, state: State, path: Path, tensors: Tensors, about: dict[str, Any]) -> bool:
        about = about | {"problem": self.text}
        return state.write(path, tensors | {"norms": self.norms}, about)


class State:
    """The folder OUT/state of one run. A run goes on without where something cannot be kept."""

    def __init__(self, folder: Path):
        self.folder, self.anew, self.trouble = folder, "", ""  # `trouble`: why it was not kept

    def open(self, made: dict[str, Any]) -> None:
        """Drop what was not `made` so, but by another version, say; `anew` tells what differs."""
        path = self.folder / "made.safetensors"
        kept = read(path)
        earlier = kept[1] if kept else {}
        if earlier != made:
            changed = [k for k in made if earlier and earlier.get(k) != made[k]]
            self.anew = ", ".join(f"{k} {earlier.get(k)} -> {made[k]}" for k in changed)
            self.remove()
            self.write(path, {}, made)

    def write(self, path: Path, tensors: Tensors, about: dict[str, Any]) -> bool:
        """Whether it could be kept; what was there before stays where it could not."""
        try:
            write(path, tensors, about)
        except (OSError, records.NotSaved) as error:
            self.trouble = self.trouble or f"an interruption would cost more: {error}"
            return False
        return True

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def stack(self, defense: int, number: int, text: str, inputs: Iterable[Tensor]) -> Stack:
        """Where the `number`th stack of victims of a defense is kept; see `Problem`."""
        return Stack(self, f"{defense}-{number:05d}", Problem.of(text, inputs))

    def said(self) -> str:
        """What is reused, for a person."""
        if self.anew:
            return f"all is attacked anew, since this differs: {self.anew}"
        done, reused = 0, []
        for path in sorted(self.folder.glob("*-*.safetensors")):
            _, about = read(path) or ({}, {})
            done += about.get("images", 0)
            if "at" in about:
                reused = ["the next up to step {} of {}".format(*about["at"])]
        if done:
            reused.insert(0, f"{done} reconstruction{'s' * (done > 1)}")
        return f"{' and '.join(reused) or 'nothing'} can be reused"


class Stack:
    """One stack of victims: its result once it is finished, and before that its searches."""

    def __init__(self, state: State, name: str, problem: Problem):
        self.state, self.path, self.problem = state, state.folder / f"{name}.safetensors", problem

    def finished(self) -> tuple[Tensors, dict[str, Any]] | None:
        """What `finish` kept."""
        return self.problem.kept(self.path)

    def finish(self, tensors: Tensors, about: dict[str, Any]) -> None:
        """Keep the result; its searches need not be kept any more."""
        if self.problem.keep(self.state, self.path, tensors, about):
            for path in self.state.folder.glob(f"{self.path.stem}-*"):
                with suppress(OSError):
                    path.unlink()

    def progress(self, told: Told) -> Kept:
        return Kept(self.state, self.path, told)


class Kept(Progress):
    """Progress of the attack on one stack, whose searches are kept every `SECONDS`."""

    def __init__(self, state: State, path: Path, told: Told):
        self.state, self.path, self.told = state, path, told
        self.earlier = 0.0  # seconds that killed processes spent on what is reused
        self.start = self.last = time.monotonic()
        self.at, self.searches = (0, 0), 0
        self.over: list[tuple[_Search, Tensors]] = []  # searches that ended and are not kept yet

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.at = step, steps
        self.told(step, steps, loss)

    def place(self, problem: str, inputs: Iterable[Tensor]) -> Place:
        path = self.path.with_stem(f"{self.path.stem}-{self.searches:05d}")
        self.searches += 1
        return _Search(self, path, Problem.of(problem, inputs))


class _Search(Place):
    def __init__(self, progress: Kept, path: Path, problem: Problem):
        self.progress, self.path, self.problem = progress, path, problem
        kept = problem.kept(path)
        if kept:
            self.saved, about = kept
            progress.earlier = max(progress.earlier, about["seconds"])

    def save(self, state: Tensors, over: bool = False) -> None:
        progress = self.progress
        if over:
            progress.over.append((self, state))
        if time.monotonic() - progress.last < SECONDS:
            return
        for search, last in progress.over:
            search.write(last)
        progress.over.clear()
        if not over:
            self.write(state)
        progress.last = time.monotonic()

    def write(self, state: Tensors) -> None:
        progress = self.progress
        seconds = progress.earlier + time.monotonic() - progress.start
        about = {"at": progress.at, "seconds": seconds}
        self.problem.keep(progress.state, self.path, state, about)

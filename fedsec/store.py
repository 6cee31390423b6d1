"""Trained federations, each trained once for all attacks on it: `python -m fedsec.store list`.

A folder that many processes and nodes may share. An entry is one safetensors file (no code is run
on reading it), named by a digest of everything that determines the training. It holds the models of
the attack rounds and the last one, from which the exchanges follow, with the utility and what the
training cost. What an attack chooses (images, victim_batch, threat, what a malicious server sends)
is not part of it. A file that is cut off, changed or misnamed is never used.

The lock on an entry is a lease that its holder refreshes: creating a file exclusively is all that
it asks of the file system, so it holds across nodes. Where it fails, two train the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedsec import process, records, resume
from fedsec.checks import Refused, home_read, require
from fedsec.data import Dataset
from fedsec.federation import Job, Trajectory, initial
from fedsec.types import Tensors

if TYPE_CHECKING:
    from filelock import SoftFileLease

FOLDER = Path("outputs/.store")
LEASE = 180.0  # seconds after which a lock that nobody refreshes is taken over; NFS caches for 60
HEARTBEAT = 20.0  # seconds between two refreshes
POLL = 0.5  # seconds between two looks at what another process trains
ENTRY, LOCK = ".safetensors", ".lock"

Made = dict[str, Any]  # what determines a training, as JSON can hold it


@dataclass(frozen=True)
class Kept:
    """What an entry holds."""

    trajectory: Trajectory
    accuracy: float  # on the test split, in [0, 1]
    seconds: float  # that the federation took where it was trained
    run: str  # the folder of the run that trained it
    averaged: float | None = None  # accuracy of the average of all rounds' weights, if taken


def made(job: Job, dataset: Dataset, device: str, attack: type) -> Made:
    """Everything that determines a training. Raises TypeError for what cannot be described.

    `device` names the hardware and its threads. The source of `attack` has no part in it, unless a
    part of the job comes from the same file.
    """
    parts = {k: getattr(job, k) for k in ("model", "client", "federation", "defense")}
    splits = {
        f"{part} {name}": tensor
        for part, split in (("train", dataset.train), ("test", dataset.test))
        for name, tensor in (("pixels", split.pixels), ("labels", split.labels))
    }
    model = initial(job, dataset)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "data": _digest(f"{dataset.classes} classes", splits),
        "initial": _digest(repr(model), weights),
        **{name: described(part) for name, part in parts.items()},
        "clients": job.clients,
        "rounds": job.rounds,
        "seed": job.seed,
        "ema": job.ema,
        "attack_rounds": sorted(job.attack_rounds),
        "device": device,
        "versions": records.versions(),
        "code": resume.code(False, _sources(attack) - _sources(*map(type, parts.values()))),
    }


def described(value: object) -> Any:
    """A value as JSON, by which it is known again: a dataclass by its class and its fields.

    Raises TypeError for an object of which that cannot be said.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": _digest("", {"": value})}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if isinstance(value, Mapping):
        return {"mapping": [[described(k), described(v)] for k, v in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    raise TypeError(f"{type(value).__name__} is not a number, a text, a tensor or a dataclass")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    return resume.checksum(text, {k: t.detach().cpu() for k, t in tensors.items()})


def _sources(*classes: type) -> set[Path]:
    modules = (sys.modules.get(cls.__module__) for cls in classes)
    found = (getattr(module, "__file__", None) for module in modules)
    return {Path(file).resolve() for file in found if file}


class Store:
    """A folder of entries. Where it cannot be used, `troubles` say so, and the run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.troubles: list[str] = []

    def path(self, made: Made) -> Path:
        text = json.dumps(made, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{ENTRY}"

    def once(
        self, made: Made, title: Made, train: Callable[[], Kept], waits: Callable[[str], None]
    ) -> Kept:
        """The entry of what was `made` so. Where there is none, `train` makes it.

        Only one process trains an entry, and the others wait for it; `waits` hears why. `title`
        says what an entry is, for a person.
        """
        path, told = self.path(made), False
        with ExitStack() as held:
            kept, lease = self._read(path, made), None
            while kept is None:
                lease = lease or self._lease(path)
                if lease is None or self._locked(lease, held):
                    break
                if not told:
                    waits(f"another process trains this federation ({path.with_suffix(LOCK)})")
                told = True
                kept = self._read(path, made)
            kept = kept or self._read(path, made)  # it may have ended before the lock was ours
            if kept is not None:
                with suppress(OSError):
                    os.utime(path)  # prune goes by the last use
                return kept
            kept = train()
            self._write(path, made, title, kept)
            return kept

    def _lease(self, path: Path) -> SoftFileLease | None:
        from filelock import SoftFileLease

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._say(f"{self.folder} cannot be used ({error.strerror}); it was trained without it")
            return None
        lock = path.with_suffix(LOCK)
        return SoftFileLease(lock, lease_duration=LEASE, heartbeat_interval=HEARTBEAT)

    def _locked(self, lease: SoftFileLease, held: ExitStack) -> bool:
        """Whether there is nobody to wait for; in most cases since the lock is ours."""
        try:
            held.enter_context(lease.acquire(timeout=POLL, poll_interval=POLL / 5))
        except TimeoutError:
            return False
        except OSError as error:
            self._say(f"{self.folder} cannot be locked ({error.strerror or error})")
        return True

    def _read(self, path: Path, made: Made) -> Kept | None:
        try:
            path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"{path} cannot be read ({error.strerror}); it was trained anew")
            return None
        found = _entry(path)
        if found is None or found[1]["made"] != made:
            self._say(f"{path} is damaged; it was trained anew")
            return None
        return _kept(*found)

    def _write(self, path: Path, made: Made, title: Made, kept: Kept) -> None:
        """Whole or not at all; a name of its own first, should another process write it too."""
        course = kept.trajectory
        tensors = {f"final {name}": tensor for name, tensor in course.final.items()}
        for name, tensor in (course.averaged or {}).items():
            tensors[f"averaged {name}"] = tensor
        for round, sent in course.sent.items():
            tensors |= {f"{round} {name}": tensor for name, tensor in sent.items()}
        about = {
            "made": made,
            "title": title,
            "rounds": sorted(course.sent),
            "written": time.time(),
            **{k: getattr(course, k) for k in ("seconds_per_round", "sent_bytes")},
            **{k: getattr(kept, k) for k in ("accuracy", "seconds", "run", "averaged")},
        }
        half = path.with_name(f"{path.stem}-{os.urandom(8).hex()}.half")
        try:
            resume.write(half, tensors, about)
            os.replace(half, path)
        except (OSError, records.NotSaved) as error:
            self._say(f"a federation was not kept for other runs: {error}")
            with suppress(OSError):
                half.unlink(missing_ok=True)

    def _say(self, trouble: str) -> None:
        if f"store: {trouble}" not in self.troubles:
            self.troubles.append(f"store: {trouble}")


def _entry(path: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The tensors of a file and what is said about them; None unless it is as it was written."""
    found = resume.read(path)
    return found if found and "made" in found[1] else None


def _kept(tensors: Tensors, about: dict[str, Any]) -> Kept:
    def state(prefix: str) -> Tensors:
        return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    course = Trajectory(
        {round: state(f"{round} ") for round in about["rounds"]},
        state("final "),
        about["seconds_per_round"],
        about["sent_bytes"],
        state("averaged ") or None,
    )
    return Kept(course, *(about[k] for k in ("accuracy", "seconds", "run", "averaged")))


# ---- the command line


@dataclass(frozen=True)
class Found:
    """A file of a store, as it lies there."""

    path: Path
    size: int  # bytes
    used: float  # when it was last used, as time.time() counts
    about: dict[str, Any] | None  # None: it is damaged

    @staticmethod
    def at(path: Path) -> Found:
        stat, entry = path.stat(), _entry(path)
        return Found(path, stat.st_size, stat.st_mtime, entry and entry[1])

    @property
    def written(self) -> float:
        return self.used if self.about is None else self.about["written"]

    def line(self, now: float) -> str:
        start = f"{self.path.stem[:12]}  {_size(self.size):>9}  {_days(now - self.used):>8}"
        if self.about is None:
            return f"{start}  damaged"
        title = " ".join(f"{k}={v}" for k, v in self.about["title"].items())
        accuracy, seconds = self.about["accuracy"], self.about["seconds"]
        return f"{start}  {100 * accuracy:5.1f} %  {seconds:7.1f} s  {title}"


def find(folder: Path) -> tuple[list[Found], list[Path]]:
    """The entries of a store, the last used first, and what killed processes left beside them."""
    require(folder.is_dir(), "folder", "must be a store", folder)
    entries, left = [], []
    for path in sorted(folder.iterdir()):
        with suppress(FileNotFoundError):  # others may prune too
            if path.suffix == ENTRY and not path.name.startswith("."):
                entries.append(Found.at(path))
            elif path.suffix in (".half", LOCK) and time.time() - path.stat().st_mtime > LEASE:
                left.append(path)
    return sorted(entries, key=lambda found: -found.used), left


def prune(
    folder: Path, *, age: float | None, unused: float | None, size: float | None, dry: bool
) -> list[tuple[Path, str]]:
    """Remove entries, the least recently used first, and say which and why.

    Those written more than `age` seconds ago, not used for `unused` seconds, or beyond `size` bytes
    in all; damaged ones and leftovers always. With `dry` nothing is removed.
    """
    entries, left = find(folder)
    now, total = time.time(), 0
    going = [(path, "left by a process that was killed") for path in left]
    for found in entries:
        why = ""
        if found.about is None:
            why = "damaged"
        elif age is not None and now - found.written > age:
            why = f"written {_days(now - found.written)} ago"
        elif unused is not None and now - found.used > unused:
            why = f"not used for {_days(now - found.used)}"
        elif size is not None and total + found.size > size:
            why = f"beyond {_size(size)} in all"
        if why:
            going.append((found.path, why))
        else:
            total += found.size
    for path, _ in going if not dry else ():
        path.unlink(missing_ok=True)
    return going


def _size(count: int | float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _days(seconds: float) -> str:
    if seconds < 3600:
        return f"{max(0, seconds) / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


def _bytes(text: str) -> float:
    """`500MB` or `20GB`."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    number = float(text[:-2]) * units[text[-2:]]
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def _period(text: str) -> float:
    """Days, in seconds."""
    days = float(text)
    if not 0 <= days < float("inf"):
        raise ValueError
    return 86400 * days


def main(words: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0; 1 wrong input; 2 `verify` found damage."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m fedsec.store", description="Trained federations, kept for other runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, said in (
        ("list", "what is there"),
        ("verify", "read every entry and compare checksums"),
        ("prune", "remove damaged entries, leftovers, and what the options say"),
    ):
        command = commands.add_parser(name, help=said, description=said)
        command.add_argument("folder", nargs="?", default=str(FOLDER), help=f"default: {FOLDER}")
    command.add_argument("--age", type=_period, metavar="DAYS", help="written longer ago")
    command.add_argument("--unused", type=_period, metavar="DAYS", help="not used for so long")
    command.add_argument("--size", type=_bytes, metavar="20GB", help="most that may be left in all")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    try:
        asked = parser.parse_args(words)
    except SystemExit as stop:
        return 1 if stop.code else 0
    try:
        folder = home_read("folder", asked.folder)
        if asked.command == "prune":
            limits = {"age": asked.age, "unused": asked.unused, "size": asked.size}
            return _pruned(folder, dry=asked.dry_run, **limits)
        return _listed(folder, asked.command == "verify")
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def _listed(folder: Path, verify: bool) -> int:
    entries, left = find(folder)
    damaged = [found for found in entries if found.about is None]
    if not verify:
        print(f"{'entry':<12}  {'size':>9}  {'used':>8}  {'accur.':>7}  {'trained':>9}")
        for found in entries:
            print(found.line(time.time()))
    total = _size(sum(found.size for found in entries))
    print(f"{folder}: {len(entries)} federations, {total}, {len(damaged)} damaged")
    for found in damaged if verify else ():
        print(f"damaged: {found.path}; it will be trained anew, or prune removes it")
    if left:
        print(f"{len(left)} files were left by killed processes; prune removes them")
    return 2 if verify and damaged else 0


def _pruned(folder: Path, **limits: Any) -> int:
    sizes = {path: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}
    gone = prune(folder, **limits)
    done = "would remove" if limits["dry"] else "removed"
    for path, why in gone:
        print(f"{done} {path.name}: {why}")
    freed = sum(sizes.get(path, 0) for path, _ in gone)
    print(f"{folder}: {done} {len(gone)} files, {_size(freed)}; {len(sizes) - len(gone)} left")
    return 0


if __name__ == "__main__":
    process.enter()
    process.leave(main())

"""What a run leaves behind: one row for each attacked image, and one object for the whole run.

OUT/records.jsonl grows while the run goes on. OUT/run.json is written last and atomically: where
it is present, nothing more will come, unless the same command goes on with a run that was not done:
OUT/state holds what it needs for that. A missing value is null and its reason is a flag that starts
with the field's name (`"lpips: VGG's features are not on this machine"`), never 0 and never NaN.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from fedsec.checks import Refused, require

ROWS, RUN, CONFIG, GRID, REPORT = (
    "records.jsonl",
    "run.json",
    "config.yaml",
    "grid.png",
    "report.html",
)
TRACE, STATE = "error.txt", "state"  # of a run that failed, and of one that is not done
STATUS = ("done", "failed", "interrupted")

# What run.json always holds, and the fields of its groups. More may be added.
CONTRACT: dict[str, tuple[str, ...]] = {
    "status": (),
    "utility": ("accuracy", "control_accuracy", "accuracy_loss"),  # shares in [0, 1]
    "privacy": ("epsilon", "delta", "accountant"),
    "cost": (
        "federate_seconds",
        "attack_seconds",
        "seconds_per_image",
        "gflop_per_image",
        "backprops_per_image",
        "peak_mb",
        "device",
    ),
    "nulls": (),  # by name: mean PSNR over the attacked images
    "grants": (),  # names of fedsec.threat.FACTS
    "flags": (),
    "commit": (),
    "versions": (),
    "command": (),
}


class Taken(Refused):
    """The result folder holds something, perhaps that of a run which started meanwhile."""


class NotSaved(Exception):
    """The disk did not take what the run wanted to write; what was written before is intact."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One victim image under one attack and one defense."""

    run: str
    attack: str
    defense: str  # "none" is the control
    threat: str
    client: str
    data: str
    model: str
    seed: int
    round: int  # server rounds that the attacked model had seen
    victim: int  # running number of the attacked image in the run
    image: int  # index in the data set's split
    batch: int  # images behind the attacked update
    psnr: float | None = None  # dB, at most 80; higher = more leaked
    ssim: float | None = None  # higher = more leaked
    mse: float | None = None  # lower = more leaked
    lpips: float | None = None  # lower = more leaked
    null_psnr: float | None = None  # dB, of the best null baseline on this image
    label_true: int | None = None
    label_pred: int | None = None
    label_ok: bool | None = None
    loss: float | None = None  # the attack's own objective
    steps: int | None = None
    seconds: float | None = None
    gflop: float | None = None
    backprops: float | None = None  # forward and backward passes that cost as much
    peak_mb: float | None = None
    flags: tuple[str, ...] = ()
    null: str | None = None  # which baseline was the best null
    mode: str | None = None  # how BatchNorm behaved in the victim's step
    stage: str | None = None  # of several attacks, the one that the attacker believes
    oracle_psnr: float | None = None  # dB, of the best of them by the truth: an upper bound
    stages: tuple[Mapping[str, Any], ...] = ()  # of each, in order: see `Step`
    # (step, least objective so far), at most 50; only in the row of an update's first image
    curve: tuple[Sequence[float | int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one of several attacks on a victim, one after the other, made of one image."""

    stage: str
    psnr: float | None  # dB, of its own reconstruction; None where it did not run
    chosen_psnr: float | None  # dB, of the reconstruction that the attacker believes from here on
    best_psnr: float | None  # dB, of the best so far by the truth: an upper bound
    certified: bool  # it explains the update exactly
    seconds: float  # of this attack alone
    backprops: float


@dataclass(frozen=True)
class Run:
    """A run folder as read. `run` is None while it is under way, or after it was killed."""

    folder: Path
    run: dict | None
    rows: tuple[Row, ...]
    truncated: bool  # the last line was cut off in mid-write and is left out

    @property
    def status(self) -> str:
        return "unfinished" if self.run is None else str(self.run.get("status", "unfinished"))

    @property
    def whole(self) -> bool:
        return self.status == "done"


@dataclass
class Records:
    """The folder that a run writes to, locked against other runs until it is closed or killed."""

    folder: Path
    lock: IO[bytes]
    at: int = 0  # bytes of records.jsonl that this process has written, or would have

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows to records.jsonl, all or none of them. Raises NotSaved.

        Rows that a killed process wrote alike are left; what else it wrote from there on goes.
        """
        text = "".join(json.dumps(_row(r), allow_nan=False) + "\n" for r in rows).encode()
        path = self.folder / ROWS
        try:
            path.touch()
            with open(path, "r+b", buffering=0) as file:
                file.seek(self.at)
                if file.read(len(text)) != text:
                    file.seek(self.at)
                    file.truncate()
                    try:
                        _write(file, text)
                    except OSError:
                        file.truncate(self.at)
                        raise
        except OSError as error:
            raise _not_saved(path, error) from error
        self.at += len(text)

    def finish(self, run: Mapping[str, object]) -> None:
        """Write run.json, whole or not at all. Raises NotSaved."""
        assert run.get("status") in STATUS, run.get("status")
        text = json.dumps(filled(run), indent=2, allow_nan=False) + "\n"
        write_whole(self.folder / RUN, text.encode())

    def close(self) -> None:
        self.lock.close()


@contextmanager
def saving(path: Path) -> Iterator[Path]:
    """A path to write to, whose file becomes `path` when it is whole. Raises NotSaved."""
    half = path.with_name(f".{path.name}")
    if path.exists() and not path.is_file():
        half = path  # a device, which cannot be replaced
    try:
        yield half
        if half != path:
            os.replace(half, path)
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            if half != path:
                half.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _not_saved(path, error) from error
        raise


def write_whole(path: Path, content: bytes) -> None:
    """`path` with this content, or as it was. Raises NotSaved."""
    with saving(path) as half, open(half, "wb", buffering=0) as file:
        _write(file, content)


def check_folder(path: Path) -> None:
    """Refuse a result folder that holds something or cannot be written. Creates nothing."""
    try:
        free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError:
        raise Refused("out", "must be writable", path) from None
    if not free:
        raise Taken("out", "must be empty or new", path)
    at = next(p for p in (path, *path.absolute().parents) if p.exists())
    require(at.is_dir() and os.access(at, os.W_OK | os.X_OK), "out", "must be writable", path)


def open_folder(path: str | Path, config: str = "") -> Records:
    """Create the result folder and config.yaml in it, by which it is taken.

    Refuses what `check_folder` refuses, and what another run opens at the same time. Raises
    NotSaved where the disk has no room for `config`. After either it leaves nothing.
    """
    path = Path(path)
    check_folder(path)
    made = [p for p in (path, *path.absolute().parents) if not p.exists()]
    taken = path / CONFIG
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(taken, "xb", buffering=0) as file:
            try:
                _write(file, config.encode(errors="surrogateescape"))
            except OSError as error:
                taken.unlink()
                raise _not_saved(taken, error) from error
    except FileExistsError:
        raise Taken("out", "must be empty or new", path) from None
    except (OSError, NotSaved) as error:
        for folder in made:
            with suppress(OSError):  # another run's by now
                folder.rmdir()
        if isinstance(error, NotSaved):
            raise
        raise Refused("out", "must be writable", path) from None
    return Records(path, _locked(path))


def unfinished(path: Path) -> bool:
    """Whether `path` holds a run, and nothing else, that ended before it was done."""
    own = {ROWS, RUN, CONFIG, GRID, REPORT, TRACE, STATE}
    own |= {Path(REPORT).stem + suffix for suffix in (".csv", ".md", ".tex")}
    try:
        inside = {p.name for p in path.iterdir()}
        files = {name.removeprefix(".") for name in inside}  # a dot: half of one, see `saving`
        return CONFIG in inside and files <= own and not read(path).whole
    except (OSError, Refused):  # not even a folder; or not a run that can be read
        return False


def reopen(path: str | Path, config: str = "") -> Records:
    """The folder of an unfinished run, to go on with it: what said how it ended is removed.

    A config.yaml that holds only the beginning of `config`, as a process that was killed leaves it,
    gets the rest. Refuses the folder of a run that still goes on, or is done meanwhile.
    """
    path = Path(path)
    writer = Records(path, _locked(path))
    try:
        if not unfinished(path):
            raise Taken("out", "must be empty or new", path)
        for name in (RUN, TRACE):
            (path / name).unlink(missing_ok=True)
        there, whole = (path / CONFIG).read_bytes(), config.encode(errors="surrogateescape")
        if whole.startswith(there):  # in place: the lock is on this very file
            with open(path / CONFIG, "ab", buffering=0) as file:
                _write(file, whole[len(there) :])
        (path / CONFIG).touch()  # when this process took it
    except BaseException as error:
        writer.close()
        if isinstance(error, OSError):
            raise Refused("out", "must be writable", path) from None
        raise
    return writer


def _locked(path: Path) -> IO[bytes]:
    """A lock on the run in `path`, which dies with this process."""
    try:
        file = open(path / CONFIG, "rb")  # noqa: SIM115
    except OSError:
        raise Refused("out", "must be readable", path) from None
    for wait in (0.1, 0.2, 0.4, 0.8, None):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait:  # perhaps somebody only looks, see `running`
                time.sleep(wait)
                continue
            file.close()
            rule = "must be empty or new, or left by a run that has ended; one is writing to it"
            raise Taken("out", rule, path) from None
        except OSError:
            pass  # a file system without locks
        break
    return file


def running(path: Path) -> bool:
    """Whether a process writes to the run in `path`. On a file system without locks: no."""
    try:
        with open(path / CONFIG, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def default_folder(base: str | Path, attack: str, defense: str, seed: int, date: str) -> Path:
    """BASE/DATE/ATTACK-DEFENSE-SEED, or the first free one of ...-2, ...-3. `date` is ISO."""
    name = re.sub(r"[^\w.+-]+", "_", f"{attack}-{defense}-{seed}")
    first = Path(base) / date / name
    folder, count = first, 1
    while folder.exists():
        count += 1
        folder = first.with_name(f"{name}-{count}")
    return folder


def find(folders: Sequence[str | Path]) -> list[Path]:
    """All run folders at or below `folders`, each once, in the order given and then by name."""
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        require(folder.is_dir(), "folder", "must exist", folder)
        inside = {p.parent for name in (ROWS, RUN) for p in folder.rglob(name)}
        require(bool(inside), "folder", f"must hold a run ({ROWS}), itself or below", folder)
        found |= dict.fromkeys(sorted(inside))
    return list(found)


def read_all(folders: Sequence[str | Path]) -> tuple[list[Run], list[Refused]]:
    """The runs at or below `folders`, and why others cannot be read. Refuses where none can."""
    runs, refused = [], []
    for folder in find(folders):
        try:
            runs.append(read(folder))
        except Refused as wrong:
            refused.append(wrong)
        except OSError as error:
            refused.append(Refused(str(folder), "must be readable", error.strerror))
    if not runs:
        raise refused[0]
    return runs, refused


def read(folder: str | Path) -> Run:
    """Read a run folder, also one whose run still goes on or was killed.

    A last line without its end is left out, and said so. Anything else that is not JSON is refused.
    """
    folder = Path(folder)
    run = None
    if (folder / RUN).exists():
        run = _json((folder / RUN).read_bytes(), folder / RUN)
        _check_run(run, folder / RUN)
    text = (folder / ROWS).read_bytes() if (folder / ROWS).exists() else b""
    *lines, rest = text.split(b"\n")
    rows = [
        _parsed(line, f"{folder / ROWS}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    return Run(folder, run, tuple(rows), truncated=bool(rest))


def commit() -> str | None:
    """The short hash of the checkout that runs, with "-dirty" after local changes, or None."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere below another project's checkout
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers, read without importing any of it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fedsec", "torch", "flwr", "opacus", "lpips", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


_ASIDE = ("null", "stage", "oracle_psnr")  # absent where they mean nothing
_MEASURED = tuple(f.name for f in fields(Row) if f.default is None and f.name not in _ASIDE)
_WHY = {"commit": "fedsec does not run from a checkout"}
_TYPES = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}
_WORDS = {f.name: str(f.type) for f in fields(Row)}
_KINDS = {  # what a row may hold, by the annotations above
    name: (*_TYPES[said.removesuffix(" | None")], *([type(None)] if "None" in said else []))
    for name, said in _WORDS.items()
    if said.removesuffix(" | None") in _TYPES
}
_REQUIRED = tuple(f.name for f in fields(Row) if f.default is MISSING)


def _row(row: Row) -> dict:
    flags = list(row.flags)
    values = {name: _plain(value, name, flags) for name, value in asdict(row).items()}
    for name in _MEASURED:
        _explain(values[name], name, flags)
    return values | {"flags": flags}


def filled(run: Mapping[str, object]) -> dict:
    """`run` with every field of the contract; what is missing is null, with a flag."""
    flags = [str(flag) for flag in _listed(run.get("flags"))]
    values: dict[str, Any] = {key: _plain(value, key, flags) for key, value in run.items()}
    for key, inner in CONTRACT.items():
        if inner:
            values[key] = dict.fromkeys(inner) | (values.get(key) or {})
            for name in inner:
                # without an epsilon there is no delta or accountant to explain
                also = (key, "epsilon") if key == "privacy" else (key,)
                _explain(values[key][name], name, flags, also)
        elif key != "flags":
            _explain(values.setdefault(key, None), key, flags)
    return values | {"flags": flags}


def _listed(flags: object) -> Sequence:
    return flags if isinstance(flags, list | tuple) else ()


def _plain(value: object, name: str, flags: list[str]):
    """What JSON can hold. A number that is not finite becomes null, with a flag."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, str(k), flags) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, name, flags) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # NumPy and torch scalars
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, float) and not math.isfinite(value):
        flags.append(f"{name}: the value was {value}")
        return None
    return value


def _explain(value: object, name: str, flags: list[str], also: tuple[str, ...] = ()) -> None:
    """Add a flag for a missing value unless a flag gives its reason: `"name, name: why"`."""
    given = {part.strip() for flag in flags for part in flag.partition(":")[0].split(",")}
    if value is None and not given & {name, *also}:
        why = _WHY.get(name, "missing, and the run gave no reason")
        flags.append(f"{name}: {why}")


def _parsed(line: bytes, where: str) -> Row:
    values = _json(line, where)
    missing = [name for name in _REQUIRED if name not in values]
    require(not missing, where, "must have every field of a row; missing", ", ".join(missing))
    known: dict[str, Any] = {f.name: values[f.name] for f in fields(Row) if f.name in values}
    for name, value in known.items():
        if name in _KINDS and type(value) not in _KINDS[name]:
            raise Refused(where, f"must have {_WORDS[name]} as {name}", json.dumps(value))
    for name in ("flags", "stages", "curve"):
        known[name] = tuple(_listed(known.get(name)))
    return Row(**known)


def _check_run(run: Mapping[str, Any], where: Path) -> None:
    """Refuse a run.json that holds something else than it says; older ones may lack fields."""
    for key, inner in CONTRACT.items():
        group = run.get(key)
        if inner and group is not None:
            require(isinstance(group, dict), str(where), f"must have an object as {key}", group)
            for name in set(inner) - {"device", "accountant"}:
                value = group.get(name)
                number = value is None or type(value) in (int, float)
                require(number, str(where), f"must have a number as {key}.{name}", value)
                share = key != "utility" or value is None or -1 <= value <= 1
                require(share, str(where), f"must have a share as {key}.{name}", value)
    for name in ("accuracy", "control_accuracy"):
        value = (run.get("utility") or {}).get(name) or 0.0
        require(value >= 0, str(where), f"must have a share as utility.{name}", value)
    for key in ("grants", "flags"):
        listed = run.get(key) is None or isinstance(run[key], list)
        require(listed, str(where), f"must have a list as {key}", run.get(key))


def _json(text: bytes, where: str | Path) -> dict:
    try:
        value = json.loads(text, parse_constant=_not_json)
    except ValueError as error:
        raise Refused(str(where), "must be JSON", error) from None
    require(isinstance(value, dict), str(where), "must be a JSON object", type(value).__name__)
    return value


def _not_json(word: str):
    raise ValueError(f"{word} is not JSON")


def _write(file, text: bytes) -> None:
    while text:
        text = text[file.write(text) :]  # a nearly full disk takes the beginning only
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_saved(path: Path, error: OSError) -> NotSaved:
    return NotSaved(f"{path}: {error.strerror or error}; what was saved before is kept")

"""The cells of a sweep, as their folders show them: whole, half, failed. Loads at once.

Nothing else decides what a sweep that is started again does with a cell, so that any process on
any node sees the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedsec import records
from fedsec.checks import Refused

NAME = re.compile(r"\d{3,}-")  # of a cell's folder: its number in the sweep, then what it is
PLAN, LOGS = "multirun.yaml", ".logs"  # beside the cells: Hydra's, and what workers printed
ABSENT, WHOLE, HALF, RUNNING, FAILED, REFUSED = STATES = (
    "not started",
    "done",
    "not done",  # killed or interrupted: the same command goes on with it
    "running",
    "failed",
    "refused",  # before anything was computed
)


@dataclass(frozen=True)
class Cell:
    """A cell's folder and the state that it is in."""

    folder: Path
    state: str  # one of STATES
    why: str = ""  # it failed or was refused
    reused: dict[str, bool] = field(default_factory=dict)  # by defense: another run trained it
    commit: str | None = None  # of fedsec, where it is whole
    began: float | None = None  # seconds since the epoch: when its last process took it
    seconds: float | None = None  # how long that one took, where it ended by itself
    rows: int = 0  # attacked images that are in its records


def named(number: int, attack: str, defense: str, seed: object) -> str:
    return f"{number:03d}-{attack}-{defense}-{seed}"


def log(folder: Path) -> Path:
    """Where a cell prints that another process than the sweep's runs."""
    return folder.parent / LOGS / f"{folder.name}.txt"


def find(sweep: Path, known: Mapping[Path, Cell] = MappingProxyType({})) -> list[Cell]:
    """The cells of a sweep's folder that were started, by number. Raises Refused.

    `known`: of those that are whole what an earlier look found is taken as it is.
    """
    try:
        inside = sorted(sweep.iterdir()) if sweep.is_dir() else []
    except OSError as error:
        raise Refused("out", f"must be readable ({error.strerror})", sweep) from None
    folders = [p for p in inside if p.is_dir() and NAME.match(p.name)]
    old = {folder: cell for folder, cell in known.items() if cell.state == WHOLE}
    return [old.get(folder) or look(folder) for folder in folders]


def every(sweep: Path, known: Mapping[Path, Cell] = MappingProxyType({})) -> list[Cell]:
    """All cells of a sweep, by number, also those that were not started. Raises Refused."""
    found = find(sweep, known)
    there = {_number(cell.folder) for cell in found}
    words = enumerate(planned(sweep))
    absent = (Cell(sweep / f"{n:03d}-", ABSENT, why) for n, why in words if n not in there)
    return sorted([*found, *absent], key=lambda cell: _number(cell.folder))


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[0])


def planned(sweep: Path) -> list[str]:
    """What tells each cell of a sweep from the others, in the command's words, by number.

    Nothing where Hydra has not said so.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    axes: dict[str, list[str]] = {}
    try:
        said: Any = OmegaConf.load(sweep / PLAN)
        params = [f"{key}={value}" for key, value in (said.hydra.sweeper.params or {}).items()]
        for word in OverridesParser.create().parse_overrides([*params, *said.hydra.overrides.task]):
            key = word.get_key_element()
            axes[key] = []  # what comes later replaces it
            if word.is_discrete_sweep():
                axes[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
    except Exception:  # no plan, half of one, or one that only Hydra can read
        return []
    return [" ".join(words) for words in itertools.product(*(a for a in axes.values() if a))]


def look(folder: Path) -> Cell:
    """The state of one cell. A folder that no run made counts as not done."""
    try:
        inside = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if records.TRACE in inside and records.CONFIG not in inside:
            text = (folder / records.TRACE).read_text(encoding="utf-8", errors="replace")
            first, last = text.strip().splitlines()[:1], text.strip().splitlines()[-1:]
            refused = "".join(first).startswith("error: ")
            why = "".join(last).removeprefix("error: ")
            return Cell(folder, REFUSED if refused else FAILED, why)
        if not inside:
            return Cell(folder, ABSENT)
        found = records.read(folder)
    except Refused as damaged:
        return Cell(folder, FAILED, str(damaged))
    except OSError as error:
        return Cell(folder, FAILED, f"{error.filename}: {error.strerror}")
    said = found.run or {}
    cell = Cell(folder, HALF, reused=said.get("reused") or {}, rows=len(found.rows))
    cell = replace(cell, **_times(folder))
    if found.whole:
        return replace(cell, state=WHOLE, commit=said.get("commit"))
    if records.running(folder):
        return replace(cell, state=RUNNING)
    if found.status == "failed":
        why = (flag for flag in said.get("flags", ()) if flag.startswith("failed: "))
        return replace(cell, state=FAILED, why=next(why, "failed").removeprefix("failed: "))
    return cell


def _times(folder: Path) -> dict[str, float | None]:
    began = seconds = None
    with suppress(OSError):
        began = (folder / records.CONFIG).stat().st_mtime
        seconds = max(0.0, (folder / records.RUN).stat().st_mtime - began)
    return {"began": began, "seconds": seconds}


def leave(folder: Path, why: str) -> None:
    """Write error.txt for a cell that did not come to a run of its own."""
    with suppress(OSError, records.NotSaved):
        if not folder.exists() or {p.name for p in folder.iterdir()} <= {records.TRACE}:
            folder.mkdir(parents=True, exist_ok=True)
            records.write_whole(folder / records.TRACE, f"{why.strip()}\n".encode())


def clear(folder: Path) -> None:
    """Remove what `leave` left, so that the cell is as if it had not been tried."""
    own = {records.TRACE, f".{records.TRACE}"}
    with suppress(OSError):
        if {p.name for p in folder.iterdir()} <= own:
            for name in own:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def counted(cells: Sequence[Cell]) -> str:
    """How many cells are in which state."""
    counts = [f"{n} {state}" for state in STATES if (n := sum(c.state == state for c in cells))]
    return f"{len(cells)} cells: {', '.join(counts)}"


def summary(cells: Sequence[Cell], before: set[Path], again: str) -> list[str]:
    """What became of a sweep, for a person; at the end, which cells are not done, and why.

    `before`: the cells that were whole at its start; `again`: the command that goes on with it.
    """
    skipped = sum(cell.folder in before for cell in cells)
    earlier = f"; {skipped} were done before" if skipped else ""
    lines = [f"{'sweep':<12} {counted(cells)}{earlier}"]
    reused = [each for cell in cells for each in cell.reused.values()]
    if reused:
        count = f"{len(reused) - sum(reused)} trained, {sum(reused)} reused"
        lines.append(f"{'federations':<12} {count}")
    if again:
        lines.append(f"{'go on with':<12} {again}")
    others = (c for c in cells if c.state not in (WHOLE, ABSENT))
    return lines + [f"{c.state:<12} {c.folder.name}{f': {c.why}' * bool(c.why)}" for c in others]

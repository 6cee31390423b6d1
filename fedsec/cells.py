"""The cells of a sweep, as their folders show them: whole, half, failed. Loads at once.

Nothing else decides what a sweep that is started again does with a cell, so that any process on
any node sees the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedsec import records
from fedsec.checks import Refused

NAME = re.compile(r"\d{3,}-")  # of a cell's folder: its number in the sweep, then what it is
ABSENT, WHOLE, HALF, RUNNING, FAILED, REFUSED = STATES = (
    "absent",
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


def named(number: int, attack: str, defense: str, seed: object) -> str:
    return f"{number:03d}-{attack}-{defense}-{seed}"


def find(sweep: Path) -> list[Cell]:
    """The cells of a sweep's folder that were started, by number. Raises Refused."""
    try:
        inside = sorted(sweep.iterdir()) if sweep.is_dir() else []
    except OSError as error:
        raise Refused("out", f"must be readable ({error.strerror})", sweep) from None
    return [look(p) for p in inside if p.is_dir() and NAME.match(p.name)]


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
    reused = said.get("reused") or {}
    if found.whole:
        return Cell(folder, WHOLE, reused=reused, commit=said.get("commit"))
    if records.running(folder):
        return Cell(folder, RUNNING)
    if found.status == "failed":
        why = (flag for flag in said.get("flags", ()) if flag.startswith("failed: "))
        return Cell(folder, FAILED, next(why, "failed").removeprefix("failed: "), reused)
    return Cell(folder, HALF, reused=reused)


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


def summary(cells: Sequence[Cell], before: set[Path], again: str) -> list[str]:
    """What became of a sweep, for a person; at the end, which cells are not done, and why.

    `before`: the cells that were whole at its start; `again`: the command that goes on with it.
    """
    counts = [f"{n} {state}" for state in STATES if (n := sum(c.state == state for c in cells))]
    skipped = sum(cell.folder in before for cell in cells)
    earlier = f"; {skipped} were done before" if skipped else ""
    lines = [f"{'sweep':<12} {len(cells)} cells: {', '.join(counts)}{earlier}"]
    reused = [each for cell in cells for each in cell.reused.values()]
    if reused:
        count = f"{len(reused) - sum(reused)} trained, {sum(reused)} reused"
        lines.append(f"{'federations':<12} {count}")
    if again:
        lines.append(f"{'go on with':<12} {again}")
    others = (c for c in cells if c.state != WHOLE)
    return lines + [f"{c.state:<12} {c.folder.name}{f': {c.why}' * bool(c.why)}" for c in others]

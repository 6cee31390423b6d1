"""How a sweep stands, from its folder: `python -m fedsec.status FOLDER [--watch SECONDS]`.

Any process on any node that sees the folder may ask, while the sweep runs and afterwards.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedsec import cells, process
from fedsec.cells import Cell
from fedsec.checks import Refused, require
from fedsec.console import Console, duration

LOOK = 2.0  # seconds between two looks of a sweep that waits for its cells
SHOWN = 20  # cells that were not started


def lines(found: Sequence[Cell], now: float) -> list[str]:
    """A line for each cell, by number, and the totals. `now`: seconds since the epoch."""
    absent = [cell for cell in found if cell.state == cells.ABSENT]
    kept = [cell for cell in found if cell not in absent[SHOWN:]]
    said = [line(cell, now) for cell in kept]
    if len(absent) > SHOWN:
        said.append(f"{'':<12} and {len(absent) - SHOWN} more that were not started")
    return [*said, totals(found, now)]


def line(cell: Cell, now: float) -> str:
    name = cell.folder.name if cell.state != cells.ABSENT else cell.folder.name.rstrip("-")
    return f"{cell.state:<12} {name}{''.join(f'  {part}' for part in _said(cell, now))}"


def _said(cell: Cell, now: float) -> Iterator[str]:
    if cell.state == cells.RUNNING and cell.began is not None:
        since = time.strftime("%H:%M:%S", time.localtime(cell.began))
        yield f"since {since} ({duration(now - cell.began)})"
    elif cell.seconds is not None:
        yield duration(cell.seconds)
    reused = [name for name, was in cell.reused.items() if was]
    if reused:
        yield f"reused {', '.join(reused)}"
    if cell.rows and cell.state != cells.WHOLE:
        yield f"{cell.rows} row{'s' * (cell.rows > 1)}"
    if cell.state == cells.RUNNING:
        yield from _printed(cell)
    if cell.why:
        yield cell.why


def _printed(cell: Cell) -> Iterator[str]:
    """The last that a running cell printed, where a worker runs it: its stage and time left."""
    try:
        text = cells.log(cell.folder).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    last = " ".join(text.strip().rpartition("\n")[2].split())
    if last:
        yield last


def totals(found: Sequence[Cell], now: float) -> str:
    left = _left(found, now)
    return f"{'sweep':<12} {cells.counted(found)}{left and f'; {left}'}"


def _left(found: Sequence[Cell], now: float) -> str:
    """Until the running cells and those not started are done, if they last like those done."""
    took = [c.seconds for c in found if c.state == cells.WHOLE and c.seconds is not None]
    running = [c for c in found if c.state == cells.RUNNING]
    if not took or not running:
        return ""
    mean = sum(took) / len(took)
    waiting = sum(c.state == cells.ABSENT for c in found) * mean
    under_way = sum(max(0.0, mean - (now - (c.began or now))) for c in running)
    return f"about {duration((waiting + under_way) / len(running))} left"


@contextmanager
def shown(sweep: Path, console: Console) -> Iterator[None]:
    """While others run a sweep's cells: a line for each that changes; on a terminal also a live one
    for each that runs.
    """
    ended = threading.Event()
    watcher = threading.Thread(target=_follow, args=(sweep, console, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _follow(sweep: Path, console: Console, ended: threading.Event) -> None:
    from rich.live import Live
    from rich.text import Text

    before: dict[Path, Cell] = {cell.folder: cell for cell in cells.every(sweep)}
    with Live(console=console.terminal, transient=True, auto_refresh=False) as live:
        while True:
            last = ended.wait(LOOK)
            try:
                found = cells.every(sweep, before)
            except Refused:  # perhaps for a moment
                found = []
            now = time.time()
            for changed in changes(before, found, now):
                console.terminal.print(changed, markup=False)
            before |= {cell.folder: cell for cell in found}
            running = [line(cell, now) for cell in found if cell.state == cells.RUNNING]
            if console.terminal.is_terminal:
                width = console.terminal.width
                rows = [row[:width] for row in (*running, totals(found, now))]
                live.update(Text("\n".join(rows)), refresh=True)
            if last:
                return


def changes(before: Mapping[Path, Cell], found: Sequence[Cell], now: float) -> list[str]:
    """A line for each cell whose state is another than before."""
    known = {folder: cell.state for folder, cell in before.items()}
    new = (c for c in found if c.state != known.get(c.folder, cells.ABSENT))
    return [line(cell, now) for cell in new]


def read(folder: Path) -> list[Cell]:
    """The cells of a sweep, or the one run that the folder holds. Raises Refused."""
    require(folder.is_dir(), "folder", "must exist", folder)
    found = cells.every(folder)
    if not found and (one := cells.look(folder)).began is not None:
        found = [one]
    require(bool(found), "folder", "must hold a sweep or a run", folder)
    return found


def _watch(folder: Path, seconds: float, say: Callable[[str], None]) -> None:
    """Say it all again and again, until no cell is running or waiting."""
    while True:
        found = read(folder)
        clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
        say(clear + "\n".join(lines(found, time.time())))
        if all(c.state not in (cells.RUNNING, cells.ABSENT) for c in found):
            return
        time.sleep(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedsec.status", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a sweep: its out=")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again until it is done")
    words = parser.parse_args(argv)
    try:
        if words.watch is not None:
            require(words.watch > 0, "--watch", "must be above 0 seconds", words.watch)
            _watch(words.folder, words.watch, print)
        else:
            print("\n".join(lines(read(words.folder), time.time())))
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    process.enter()
    process.listen()
    process.leave(main())

"""What a run shows in a terminal, and as plain lines in a log. Loads without torch."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedsec import __version__

LEFT = 12  # width of the first column
QUIET = 60.0  # seconds of a run in a log without lines about its progress
EVERY = 30.0  # seconds between two such lines


@dataclass
class Stage:
    """One line of work: a bar while it runs, one plain line when it is done."""

    console: Console
    title: str
    name: str
    total: int
    unit: str
    bar: Progress
    closing: str = ""

    def __post_init__(self):
        self.task = self.bar.add_task(f"{self.title:<{LEFT}} {self.name}", total=max(1, self.total),
                                      extra="")  # fmt: skip
        self.first: tuple[float, float] | None = None  # when work was first told of, and how much
        self.said = self.console.now()

    def advance(self, done: int, total: int) -> None:
        self._show(float(done), max(1, total), [])

    def skip(self, done: int) -> None:
        """`done` units are done, without work."""
        self.bar.update(self.task, completed=done)

    def within(self, first: int, share: int) -> Callable[[int, int, float], None]:
        """Progress of a part of the stage, `share` units from `first` on."""
        last, start, start_step = -1, 0.0, 0  # of one search: its last step, its first and when

        def progress(step: int, steps: int, loss: float) -> None:
            nonlocal last, start, start_step
            now = self.console.now()
            if last < 0 or step < last:  # a search; what came before its first look may be reused
                start, start_step = now, step
            last = step
            said = [f"step {step}/{steps}", f"loss {loss:.4f}"]
            if step > start_step and now > start:
                said.append(f"{_rate((step - start_step) / (now - start))} steps/s")
            self._show(first + share * step / max(1, steps), self.total, said)

        return progress

    def _show(self, done: float, total: int, said: list[str]) -> None:
        now, log = self.console.now(), not self.console.terminal.is_terminal
        self.first = self.first or (now, done)
        seconds, units = now - self.first[0], done - self.first[1]
        if seconds > 0 and units > 0 and done < total:
            said = [*said, f"about {duration((total - done) * seconds / units)} left"]
        self.bar.update(self.task, completed=done, total=total, extra="  ".join(said))
        if log and now - self.console.began >= QUIET and now - self.said >= EVERY:
            self.said = now
            count = f"{done:.{0 if done == int(done) else 1}f}/{total} {self.unit}"
            self.console.terminal.print(
                f"{self.title:<{LEFT}} {self.name:<10} {'  '.join([count, *said])}", markup=False
            )

    def close(self, text: str) -> None:
        self.closing = text


class Console:
    """Prints to `file`; colours and moving bars only where that is a terminal."""

    def __init__(self, file: Any = None, now: Callable[[], float] = time.monotonic):
        self.terminal = Terminal(file=file or sys.stdout, highlight=False, soft_wrap=True)
        self.now, self.began = now, now()

    def line(self, left: str, text: str) -> None:
        """`text` in the second column, wrapped to the terminal's width within it."""
        width = max(40, min(self.terminal.width, 100) - LEFT - 1)
        for row in textwrap.wrap(text, width, break_on_hyphens=False) or [""]:
            self.terminal.print(f"{left:<{LEFT}} {row}", markup=False)
            left = ""

    def banner(self, names: dict[str, str], threat: str, grants: list[str]) -> None:
        """Printed before torch loads: what was asked for, and what the adversary sees."""
        chosen = " · ".join(f"{g} {names[g]}" for g in ("attack", "defense", "data", "model"))
        version = f"fedsec {'.'.join(__version__.split('.')[:2])}"
        self.line(version, chosen)
        self.line("threat", f"{threat} grants {', '.join(grants)}")
        if "labels" not in grants:
            self.line("", "labels withheld: the attack infers them")

    def plan(self, device: str, torch_version: str, seed: int, work: str, seconds: float) -> None:
        self.line("device", f"{device}   torch {torch_version}   seed {seed}")
        self.line("plan", work)
        self.line("", f"about {duration(seconds)}")
        self.terminal.print()

    @contextmanager
    def stage(self, title: str, name: str, total: int, unit: str) -> Iterator[Stage]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(f"{unit}  {{task.fields[extra]}}"),
        )
        bar = Progress(*columns, console=self.terminal, transient=True,
                       disable=not self.terminal.is_terminal)  # fmt: skip
        if not self.terminal.is_terminal:
            self.terminal.print(f"{title:<{LEFT}} {name:<10} started", markup=False)
        stage = Stage(self, title, name, total, unit, bar)
        with bar:
            yield stage
        done = f"{stage.total}/{stage.total} {unit}"
        self.terminal.print(f"{title:<{LEFT}} {name:<10} {done:<16} {stage.closing}", markup=False)

    def result(self, run: Any, why: str, again: str = "") -> None:
        """The table, the flags, where the files are, and what to try next.

        `again` is the command that goes on with a run that is not done.
        """
        from fedsec import records, report

        self.terminal.print()
        if run.rows:
            report.show([run], self.terminal)
        if why:
            self.terminal.print(f"\n{why}", markup=False)
        there = (records.ROWS, records.RUN, records.GRID, records.REPORT)
        files = "  ".join(f for f in there if (run.folder / f).exists())
        self.terminal.print(f"\nwrote {run.folder}/   {files}", markup=False)
        table = f"python -m fedsec.report {run.folder.parent}" if run.rows else ""
        more = "python -m fedsec.run images=64"
        self.terminal.print(f"next  {table:<40}  {more}", markup=False)
        if again:
            self.terminal.print(f"\nit goes on where it was with\n  {again}", markup=False)

    def trouble(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _rate(steps: float) -> str:
    return f"{steps:.0f}" if steps >= 10 else f"{steps:.2g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

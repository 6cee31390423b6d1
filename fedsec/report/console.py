"""The command line of the report, and its tables on the console."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from fedsec import records
from fedsec.checks import Refused, require
from fedsec.records import Run
from fedsec.report import tables
from fedsec.report.numbers import Group, Scenario, by_stage, config, groups, scenarios
from fedsec.report.page import write
from fedsec.report.words import (
    KINDS,
    PROVEN,
    STAGES,
    UPPER,
    Column,
    answers,
    common,
    directions,
    headline,
    private,
    sheets,
    warnings,
)


def show(
    runs: Sequence[Run],
    console,
    found: Sequence[Group] | None = None,
    left_out: Sequence[object] = (),
) -> None:
    """Print the answer, the tables and the flags on a rich console.

    `found`: the runs' `groups`, where they are known; `left_out`: why others could not be read.
    """
    from rich.text import Text

    found = groups(runs) if found is None else found
    wide = min(console.width, 100)
    console.print(Text(_wrapped(common(found), wide)))
    said = answers(found)
    if len(said) > 1:
        console.print(Text(_wrapped(f"\n{headline(found)}", wide), "bold"))
    for heading, text in said:
        console.print(Text(f"\n{heading}".rstrip(), "bold"))
        console.print(Text(_wrapped(text, wide)))
    for sheet, shown in sheets(found):
        console.print(Text(f"\n{sheet.title}, mean [95 % interval]", "bold"))
        said_of = " ".join(filter(None, [f"{directions(sheet.columns)}.", sheet.note]))
        console.print(Text(_wrapped(said_of, wide, "  "), "dim"))
        for scenario in shown:
            if scenario.heading:
                console.print(Text(f"\n{scenario.heading}"))
            table = _table(sheet.columns, scenario, narrow=console.width < 120)
            console.print(Text(table), soft_wrap=True)
    claimed = private(found)
    if claimed:
        console.print(Text(f"\n{PROVEN}", "bold"))
    for name, facts in claimed:
        console.print(Text(_wrapped(name, wide, "  ")))
        rows = [("", *KINDS.values()), *((f"    {what}", *rest) for what, *rest in facts)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for first, *rest in rows:
            cells = (cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))
            console.print(Text("  ".join([first.ljust(widths[0]), *cells])), soft_wrap=True)
    staged = by_stage(scenarios(found))
    if staged:
        console.print(Text("\nstage by stage: what the attacker believes after it", "bold"))
        console.print(Text(_wrapped(UPPER, wide, "  "), "dim"))
    for scenario in staged:
        if scenario.heading:
            console.print(Text(f"\n{scenario.heading}"))
        console.print(Text(_table(STAGES, scenario, narrow=console.width < 120)), soft_wrap=True)
    flags = warnings(runs, found, left_out)
    if flags:
        console.print()
    for flag in flags:
        console.print(Text(_wrapped(flag, wide, "  ! ", "    ")))


def _table(columns: Sequence[Column], scenario: Scenario, narrow: bool) -> str:
    """One line for each defense, never cut; on a narrow console intervals stand below means."""
    between, gap = ("\n", " ") if narrow else (" ", "  ")
    heads = [c.name.replace(" ", between) if len(c.name) > 10 else c.name for c in columns]
    rows = [["", *(f"{h}{between}{c.unit}".strip() for h, c in zip(heads, columns, strict=True))]]
    for name, group in zip(scenario.labels, scenario.groups, strict=True):
        cells = (between.join(filter(None, column.cell(group))) for column in columns)
        rows.append([f"  {name}", *cells])
    split = [[cell.split("\n") for cell in row] for row in rows]
    widths = [max(len(line) for row in split for line in row[i]) for i in range(len(rows[0]))]
    lines = []
    for row in split:
        for parts in zip_longest(*row, fillvalue=""):
            first, *rest = (part.rjust(w) for part, w in zip(parts, widths, strict=True))
            lines.append(gap.join([parts[0].ljust(len(first)), *rest]).rstrip())
    return "\n".join(lines)


def _wrapped(text: str, width: int, first: str = "", then: str | None = None) -> str:
    import textwrap

    rest = first if then is None else then
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest)


def main(words: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, or 1 where nothing can be shown."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m fedsec.report",
        description="Print the table of one or many runs and write report.html.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or above them")
    parser.add_argument("--out", help="the HTML file (default: report.html in the first FOLDER)")
    try:
        asked = parser.parse_args(words)
    except SystemExit as stop:
        return 1 if stop.code else 0
    try:
        return _report(asked.folders, asked.out)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1


def _report(folders: Sequence[str], out: str | None) -> int:
    from rich.console import Console

    read, broken = records.read_all(folders)
    runs = []
    for run in read:
        try:
            config(run.folder)
            runs.append(run)
        except Refused as refused:
            broken.append(refused)
    if not runs:
        raise broken[0]
    for refused in broken:
        print(f"left out: {refused}", file=sys.stderr)
    empty = not any(run.rows for run in runs)
    require(not empty, "folder", "must hold at least one finished image", " ".join(folders))
    console = Console() if sys.stdout.isatty() else Console(width=400, no_color=True)
    found = groups(runs)
    show(runs, console, found, broken)
    path = Path(out) if out else Path(folders[0]) / records.REPORT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = tables.write(found, path)
        write(runs, path, found, broken)
    except (records.NotSaved, OSError) as error:
        why = getattr(error.__cause__ or error, "strerror", None) or error
        raise Refused("out", f"must be writable ({why})", path) from None
    print(f"\nwrote {path}   {'  '.join(file.name for file in beside)}")
    return 0

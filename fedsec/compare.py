"""Runs side by side, on the same images: `python -m fedsec.compare FOLDER`.

For every run, defense and model age: mean PSNR, and the difference to another. Differences are
taken image by image where both attacked the same image of the same data and seed, so that what
images differ in among themselves does not widen them. Runs that differ in their seed are one.
`--by threat` sets runs that differ in that option alone beside each other, one line for all.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsec import process, records, stats
from fedsec.checks import Refused, require
from fedsec.records import Row, Run

HEAD = (
    *("run", "defense", "round", "images", "PSNR dB"),
    *("against", "difference dB", "pairs", "p (Holm)"),
)
Victim = tuple[str, int, int]  # data, seed, image
Scores = dict[Victim, float]  # mean PSNR over its rows
CONTROL = "none"
CORRECTED = """intervals: 95 %, each by itself
p: by drawing the signs of the images' differences anew; corrected (Holm) for how many there are"""
BY = ("threat", "attack", "client", "model")  # fields of a row


@dataclass(frozen=True)
class Cell:
    """One setting but for its seeds, one defense and model age."""

    run: str
    defense: str
    round: int
    scores: Scores
    value: str = ""  # of the field by which cells stand side by side


def named(runs: Sequence[Run], by: str | None = None) -> list[str]:
    """What of each run's command, seeds and option `by` aside, the others lack.

    Its folder where runs of one seed cannot be told apart so.
    """
    left_out = ("out=", "seed=", "-", "hydra.", *([f"{by}=", f"{by}."] if by else []))
    words = []
    for run in runs:
        typed = shlex.split(str((run.run or {}).get("command", "")))
        words.append([w for w in typed if "=" in w and not w.startswith(left_out)])
    shared = set(words[0]).intersection(*words)
    names = [" ".join(w for w in each if w not in shared) or "as it is" for each in words]
    each = {(name, row.seed, _value(row, by), run.folder)
            for name, run in zip(names, runs, strict=True) for row in run.rows}  # fmt: skip
    if len({where[:-1] for where in each}) < len(each):
        return [run.folder.name for run in runs]
    return names


def _value(row: Row, by: str | None) -> str:
    return str(getattr(row, by)) if by else ""


def cells(runs: Sequence[Run], by: str | None = None) -> list[Cell]:
    """In the order of the runs, their defenses and rounds."""
    parts: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    for name, run in zip(named(runs, by) if runs else (), runs, strict=True):
        for row in run.rows:
            parts[name, row.defense, row.round, _value(row, by)].append(row)
    return [
        Cell(name, defense, round, scores(rows), value)
        for (name, defense, round, value), rows in parts.items()
    ]


def scores(rows: Sequence[Row]) -> Scores:
    """Of each image: its index says which it is within one data set, split by one seed."""
    each: dict[Victim, list[float]] = defaultdict(list)
    for row in rows:
        if row.psnr is not None:
            each[row.data, row.seed, row.image].append(row.psnr)
    return {image: sum(values) / len(values) for image, values in each.items()}


@dataclass(frozen=True)
class Gap:
    """A difference in PSNR, on the images that both attacked."""

    interval: stats.Interval  # dB
    chance: float | None  # two-sided p, before any correction
    pairs: int


def difference(own: Scores, other: Scores) -> Gap:
    """Of the means over the images that both attacked; an image is one, whatever the seed."""
    both = [image for image in own if image in other]
    pairs = [own[v] for v in both], [other[v] for v in both], _clusters(both)
    return Gap(stats.paired_difference(*pairs), stats.chance(*pairs), len(both))


def _clusters(victims: Sequence[Victim]) -> list[Hashable]:
    """An image is one, whatever the seed."""
    return [(data, image) for data, _, image in victims]


def beside(found: Sequence[Cell]) -> list[list[str]]:
    """A head, and a line for each run, defense and age with the PSNR of each value of the field.

    The difference of each to the first, on the images that both attacked.
    """
    values = list(dict.fromkeys(cell.value for cell in found))
    first, *rest = values
    gaps = ("difference dB" if len(rest) == 1 else f"{value} - {first} dB" for value in rest)
    heads = [word for gap in gaps for word in (gap, "pairs", "p (Holm)")]
    table = [["run", "defense", "round", *(f"{value} dB" for value in values), *heads]]
    by_place: dict[tuple, dict[str, Cell]] = defaultdict(dict)
    for cell in found:
        by_place[cell.run, cell.defense, cell.round][cell.value] = cell
    measured = {
        (place, value): difference(same[value].scores, same[first].scores)
        for place, same in by_place.items()
        for value in rest
        if value in same and first in same
    }
    corrected = _corrected(measured)
    for place, same in by_place.items():
        words = [*map(str, place), *(_mean(same.get(value)) for value in values)]
        for value in rest:
            words += _told(measured.get((place, value)), corrected.get((place, value)))
        table.append(words)
    return table


def _corrected(measured: dict[Any, Gap]) -> dict[Any, float | None]:
    """The p of each, corrected for that there are the others."""
    return dict(zip(measured, stats.holm([g.chance for g in measured.values()]), strict=True))


def _told(gap: Gap | None, chance: float | None) -> list[str]:
    return ["", "", ""] if gap is None else [said(gap.interval, "+"), str(gap.pairs), p(chance)]


def p(chance: float | None) -> str:
    if chance is None:
        return ""
    return "< 0.001" if chance < 0.001 else f"{chance:.{2 if chance >= 0.1 else 3}f}"


def _mean(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return said(stats.bootstrap(list(cell.scores.values()), _clusters(list(cell.scores))), "")


def lines(found: Sequence[Cell], to: str | None) -> list[list[str]]:
    """A head, and a line for each cell: the difference to run `to` at the same age and defense.

    Cells of that run itself, and all without `to`: a defense's to the control of the same age, the
    control's to that of the youngest model.
    """
    others = [_beside(cell, found, to) for cell in found]
    measured = {
        i: difference(cell.scores, other.scores)
        for i, (cell, (_, other)) in enumerate(zip(found, others, strict=True))
        if other is not None and other is not cell
    }
    corrected = _corrected(measured)
    table: list[list[str]] = [list(HEAD)]
    for i, (cell, (name, _)) in enumerate(zip(found, others, strict=True)):
        words = [cell.run, cell.defense, str(cell.round), str(len(cell.scores)), _mean(cell)]
        against = name if i in measured else ""
        table.append([*words, against, *_told(measured.get(i), corrected.get(i))])
    return table


def _beside(cell: Cell, found: Sequence[Cell], to: str | None) -> tuple[str, Cell | None]:
    """What a cell is compared with, and its name."""
    if to not in (None, cell.run):
        same = (c for c in found if (c.run, c.defense, c.round) == (to, cell.defense, cell.round))
        return str(to), next(same, None)
    own = [c for c in found if c.run == cell.run]
    control = [c for c in own if c.defense == CONTROL and c.round == cell.round]
    if cell.defense != CONTROL and control:
        return f"{CONTROL} (control)", control[0]
    youngest = min((c for c in own if c.defense == cell.defense), key=lambda c: c.round)
    return f"round {youngest.round}", youngest


def said(interval: stats.Interval, sign: str) -> str:
    mean, low, high = interval
    if mean is None:
        return ""
    ends = "" if low is None else f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return f"{mean:{sign}.1f}{ends}"


def shown(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """The table, whose first line is its head; columns that are empty below it are left out."""
    kept = [i for i in range(len(table[0])) if any(row[i] for row in table[1:])]
    rows = [[row[i] for i in kept] for row in table]
    if markdown:
        rule = ["---"] * len(kept)
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
    wide = [max(len(row[i]) for row in rows) for i in range(len(kept))]
    return "\n".join(
        "  ".join(word.ljust(w) for word, w in zip(row, wide, strict=True)).rstrip() for row in rows
    )


def main(words: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, or 1 where nothing can be compared."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m fedsec.compare", description="Paired differences between runs."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or above them")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--to", metavar="RUN", help="as the table names it; default: the control")
    either.add_argument("--by", choices=BY, help="what differs between the columns")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    try:
        asked = parser.parse_args(words)
    except SystemExit as stop:
        return 1 if stop.code else 0
    try:
        runs, broken = records.read_all(asked.folders)
        found = cells(runs, asked.by)
        require(bool(found), "folder", "must hold at least one finished image",
                " ".join(asked.folders))  # fmt: skip
        known = list(dict.fromkeys(cell.run for cell in found))
        if asked.to is not None:
            require(asked.to in known, "--to", f"must be among {', '.join(known)}", asked.to)
        table = beside(found) if asked.by else lines(found, asked.to)
        print(shown(table, asked.markdown))
        print("\n" + CORRECTED)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    for refused in broken:
        print(f"left out: {refused}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    process.enter()
    process.leave(main())

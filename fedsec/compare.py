"""Runs side by side, on the same images: `python -m fedsec.compare FOLDER`.

For every run, defense and model age: mean PSNR, and the difference to another run. Differences are
taken image by image where both runs attacked the same image of the same data and seed, so that what
images differ in among themselves does not widen them.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsec import records, stats
from fedsec.checks import Refused, require
from fedsec.records import Row, Run

HEAD = ("run", "defense", "round", "images", "PSNR dB", "against", "difference dB", "pairs")
Scores = dict[Hashable, float]  # image -> mean PSNR over its rows


@dataclass(frozen=True)
class Cell:
    """One run, defense and model age."""

    run: str
    defense: str
    round: int
    scores: Scores


def named(runs: Sequence[Run]) -> list[str]:
    """What of each run's command the others lack, or else its folder."""
    words = []
    for run in runs:
        said = shlex.split(str((run.run or {}).get("command", "")))
        words.append([w for w in said if "=" in w and not w.startswith(("out=", "-", "hydra."))])
    shared = set(words[0]).intersection(*words)
    own = [" ".join(w for w in each if w not in shared) for each in words]
    if len(runs) == 1:
        return [runs[0].folder.name]
    names = [name or "as it is" for name in own]
    unique = len(set(names)) == len(names)
    return names if unique else [run.folder.name for run in runs]


def cells(runs: Sequence[Run]) -> list[Cell]:
    """In the order of the runs, their defenses and rounds."""
    found = []
    for name, run in zip(named(runs), runs, strict=True):
        parts: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for row in run.rows:
            parts[row.defense, row.round].append(row)
        for (defense, age), rows in parts.items():
            found.append(Cell(name, defense, age, _scores(rows)))
    return found


def _scores(rows: Sequence[Row]) -> Scores:
    """Of each image: its index says which it is within one data set, split by one seed."""
    each: dict[Hashable, list[float]] = defaultdict(list)
    for row in rows:
        if row.psnr is not None:
            each[row.data, row.seed, row.image].append(row.psnr)
    return {image: sum(values) / len(values) for image, values in each.items()}


def difference(cell: Cell, other: Cell) -> tuple[stats.Interval, int]:
    """Mean over the images that both attacked, its 95 % interval, and how many they are."""
    both = [image for image in cell.scores if image in other.scores]
    a, b = ([c.scores[image] for image in both] for c in (cell, other))
    return stats.paired_difference(a, b, both), len(both)


def lines(found: Sequence[Cell], to: str | None) -> list[list[str]]:
    """A line for each cell: beside it, the difference to run `to` at the same age and defense.

    Cells of that run itself, or of all runs without `to`, stand beside their youngest model.
    """
    table = []
    for cell in found:
        alike = [other for other in found if other.defense == cell.defense]
        if to in (None, cell.run):
            own = [other for other in alike if other.run == cell.run]
            beside = [min(own, key=lambda other: other.round)]
        else:
            beside = [o for o in alike if o.run == to and o.round == cell.round]
        mean = stats.bootstrap(list(cell.scores.values()), list(cell.scores))
        words = [cell.run, cell.defense, str(cell.round), str(len(cell.scores)), _said(mean, "")]
        if beside and beside[0] is not cell:
            gap, pairs = difference(cell, beside[0])
            who = f"round {beside[0].round}" if beside[0].run == cell.run else str(to)
            words += [who, _said(gap, "+"), str(pairs)] if pairs else [who, "", "0"]
        else:
            words += ["", "", ""]
        table.append(words)
    return table


def _said(interval: stats.Interval, sign: str) -> str:
    mean, low, high = interval
    if mean is None:
        return ""
    ends = "" if low is None else f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return f"{mean:{sign}.1f}{ends}"


def shown(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """The table with its head; columns that are empty throughout are left out."""
    rows = [HEAD, *table]
    kept = [i for i in range(len(HEAD)) if any(row[i] for row in table)]
    rows = [[row[i] for i in kept] for row in rows]
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
    parser.add_argument("--to", metavar="RUN", help="as the table names it; default: own first age")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    try:
        asked = parser.parse_args(words)
    except SystemExit as stop:
        return 1 if stop.code else 0
    try:
        runs = [records.read(folder) for folder in records.find(list(map(Path, asked.folders)))]
        found = cells(runs)
        require(bool(found), "folder", "must hold at least one finished image",
                " ".join(asked.folders))  # fmt: skip
        known = list(dict.fromkeys(cell.run for cell in found))
        if asked.to is not None:
            require(asked.to in known, "--to", f"must be among {', '.join(known)}", asked.to)
        print(shown(lines(found, asked.to), asked.markdown))
        print("\n95 % intervals, each by itself: one difference of 20 that are nothing looks real")
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

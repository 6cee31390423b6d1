"""What each defense costs those who use it: `python -m fedsec.price FOLDER`.

For every defense in the runs there: test accuracy, what it loses against training without one,
seconds per round and bytes that a client sends, both as ratios to none's. A defended run is paired
with the undefended one of its seed: its own control, or a run of `defense=none` that differs in
nothing else. Attack and threat model change no price: runs that differ in these alone are one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fedsec import process, records, stats
from fedsec.checks import Refused, require
from fedsec.compare import CONTROL, said, shown
from fedsec.records import Run
from fedsec.report.numbers import config, inner

HEAD = ("defense", "seeds", "accuracy %", "lost, points", "s/round", "x none", "bytes", "x none")
# keys of no price
ATTACKING = ("attack", "threat", "victim_batch", "lpips", "attack_rounds", "candidates")


@dataclass(frozen=True)
class Price:
    """Of one seed; None where it was not measured."""

    accuracy: float | None
    seconds: float | None  # per round
    sent: float | None  # bytes of one client in one round


Setting = tuple[tuple[str, str], ...]  # hyperparameters by dotted key, without those of an attack
Prices = dict[int, Price]  # by seed


def prices(runs: Sequence[Run]) -> dict[tuple[str, Setting], tuple[Prices, Prices]]:
    """Of each defense and setting its prices and none's on the same seeds, undefended ones first.

    Of several runs with one seed the fastest counts: what made others slower was no defense.
    """
    own: dict[tuple[str, Setting], Prices] = {}
    plain: dict[Setting, Prices] = {}
    for run in (run for run in runs if run.whole and run.rows):
        name, seed = _defense(run), run.rows[0].seed
        setting = tuple(sorted((k, v) for k, v in config(run.folder).items()
                               if k.split(".")[0] not in ATTACKING))  # fmt: skip
        rest = _undefended(setting)
        utility, cost = inner(run, "utility"), inner(run, "cost")
        price = Price(utility.get("accuracy"), cost.get("seconds_per_round"),
                      cost.get("sent_bytes"))  # fmt: skip
        _add(own.setdefault((name, setting), {}), seed, price)
        control = Price(utility.get("control_accuracy"), cost.get("control_seconds_per_round"),
                        cost.get("control_sent_bytes"))  # fmt: skip
        _add(plain.setdefault(rest, {}), seed, price if name == CONTROL else control)
    for rest, each in plain.items():  # controls of defended runs stand for themselves
        if not any(name == CONTROL and _undefended(s) == rest for name, s in own):
            known = {seed: price for seed, price in each.items() if price.accuracy is not None}
            own |= {(CONTROL, rest): known} if known else {}
    first = sorted(own, key=lambda which: which[0] != CONTROL)
    return {which: (own[which], plain[_undefended(which[1])]) for which in first}


def _undefended(setting: Setting) -> Setting:
    return tuple((k, v) for k, v in setting if k.split(".")[0] != "defense")


def _add(known: Prices, seed: int, price: Price) -> None:
    before = known.get(seed, price)
    seconds = [s for s in (before.seconds, price.seconds) if s is not None]
    accuracy = price.accuracy if before.accuracy is None else before.accuracy
    sent = price.sent if before.sent is None else before.sent
    known[seed] = Price(accuracy, min(seconds, default=None), sent)


def _defense(run: Run) -> str:
    choices = inner(run, "choices")
    return str(choices.get("defense") or next((r.defense for r in run.rows if r.defense != CONTROL),
                                              CONTROL))  # fmt: skip


def lines(found: dict[tuple[str, Setting], tuple[Prices, Prices]]) -> list[list[str]]:
    """A head, and a line for each defense and setting. Pairs and intervals are over seeds."""
    table: list[list[str]] = [list(HEAD)]
    for (name, setting), (own, plain) in found.items():
        seeds = list(own)
        accuracy = stats.bootstrap([_percent(own[s].accuracy) for s in seeds], seeds)
        words = [_named(name, setting, list(found)), str(len(seeds)), said(accuracy, "")]
        nothing = Price(None, None, None)
        there = [plain.get(s, nothing) for s in seeds]
        lost = stats.paired_difference(
            [_percent(p.accuracy) for p in there],
            [_percent(own[s].accuracy) for s in seeds],
            seeds,
        )
        words.append("" if name == CONTROL else said(lost, "+"))
        for field, digits in (("seconds", 3), ("sent", 0)):
            pairs = [(getattr(own[s], field), getattr(p, field))
                     for s, p in zip(seeds, there, strict=True)]  # fmt: skip
            measured = [a for a, _ in pairs if a is not None]
            ratios = [a / b for a, b in pairs if a is not None and b]
            words.append(f"{_mean(measured):,.{digits}f}" if measured else "")
            words.append(f"{_mean(ratios):.2f}" if ratios and name != CONTROL else "")
        table.append(words)
    return table


def _named(name: str, setting: Setting, others: Sequence[tuple[str, Setting]]) -> str:
    """The defense, with the hyperparameters in which settings of the same name differ."""
    peers = [dict(s) for other, s in others if other == name]
    differing = (f"{k.rpartition('.')[2]} {v}" for k, v in setting
                 if any(peer.get(k) != v for peer in peers))  # fmt: skip
    return " · ".join([name, *differing])


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(words: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, or 1 where there is nothing to price."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m fedsec.price", description="What each defense costs: accuracy, time, bytes."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or above them")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    try:
        asked = parser.parse_args(words)
    except SystemExit as stop:
        return 1 if stop.code else 0
    try:
        runs, broken = records.read_all(asked.folders)
        found = prices(runs)
        require(bool(found), "folder", "must hold at least one finished run",
                " ".join(asked.folders))  # fmt: skip
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    for refused in broken:
        print(f"left out: {refused}", file=sys.stderr)
    print(shown(lines(found), asked.markdown))
    print("\nbytes: of one client in one round, in the update's natural encoding; intervals: 95 %,")
    print("over seeds, which have to be several. Seconds are this machine's: compare within it.")
    return 0


if __name__ == "__main__":
    process.enter()
    process.leave(main())

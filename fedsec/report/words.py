"""The columns of the tables, the answer in sentences, and what a reader must be warned of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import filterfalse

from fedsec import flags
from fedsec.records import Run
from fedsec.report.numbers import FEWEST, Estimate, Group, Scenario, inner, scenarios

ENOUGH = 30  # images from which on an interval is worth citing
ABSENT = "—"  # how a missing value reads; a flag gives its reason

# What a granted fact tells the adversary, by the names of fedsec.threat.FACTS.
FACTS = {
    "model": "the architecture and the weights before the step",
    "update": "the update of one client",
    "aggregate": "the mean of all clients' updates",
    "count": "how many images are behind the update",
    "shape": "the shape of an image",
    "labels": "the labels that the loss was told",
    "norm_stats": "BatchNorm statistics of the private batch",
    "buffers": "running statistics that the client sends",
    "local": "learning rate, steps and batch size of a local step",
    "mode": "whether the step ran in train or in eval mode",
    "data_range": "the least and the greatest value of a pixel",
    "defense": "the defense and its public parameters",
    "history": "earlier updates of the same client",
    "aux": "public images of the same kind",
    "candidates": "a pool of images that holds the private one",
    "queries": "further models that the server sent, and the answers to them",
    "mixing": "which private images a mixing defense mixed, and how much of each",
}

PROVEN = "what is proven at most, and what was measured"
KINDS = {"formal": "whole run", "formal_update": "one update", "measured": "measured"}
ROUGH = 10.0  # mu from which on its central limit says nothing
Fact = tuple[str, ...]  # what, and a figure of each of `KINDS`
Cell = tuple[str, str]  # a value, and its interval or a remark


@dataclass(frozen=True)
class Column:
    """One figure of a setting, the same on the console and on the page."""

    name: str
    unit: str
    direction: str
    cell: Callable[[Group], Cell]


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return ABSENT if value is None else f"{value * scale:,.{digits}f}"


def _cell(found: Estimate, digits: int, scale: float = 1.0) -> Cell:
    mean = _number(found.mean, digits, scale)
    low, high = (_number(v, digits, scale) for v in (found.low, found.high))
    remark = "" if found.low is None or low == high == mean else f"[{low}, {high}]"
    if 0 < found.count < found.total:
        remark = f"{remark} {found.count} of {found.total}".strip()
    return mean, remark


def _decibel(found: Estimate) -> str:
    mean, interval = _cell(found, 1)
    return f"{mean} dB {interval}".strip()


def _worst(group: Group) -> Cell:
    scored = [row for row in group.rows if row.psnr is not None]
    if not scored:
        return ABSENT, ""
    worst = max(scored, key=lambda row: row.psnr or 0)
    return _number(worst.psnr, 1), f"image {worst.image}"


def _median(group: Group) -> Cell:
    from statistics import median

    scored = [row.psnr for row in group.rows if row.psnr is not None]
    return (_number(median(scored), 1) if scored else ABSENT), ""


def _verdict(group: Group) -> Cell:
    return {None: "too few images", True: "leaks", False: "not above"}[group.leaks], ""


def _spent(group: Group) -> Cell:
    claim = group.privacy
    if not claim:
        return ABSENT, "" if group.control else "no bound"
    delta = f"{claim.get('delta') or 0:g}".replace("e-0", "e-")
    unit = claim.get("unit", "example")  # runs before there was another do not say it
    return f"{claim['epsilon']:.3g}", f"δ {delta}, {claim.get('accountant')}, one {unit}"


def _loss(group: Group) -> Cell:
    return (ABSENT, "") if group.control else _cell(group.lost, 1, 100.0)


def _mean(field: str, digits: int) -> Callable[[Group], Cell]:
    return lambda group: _cell(group.estimate(field), digits)


LEAKAGE = (
    Column("images", "", "", lambda g: (str(g.images), "")),
    Column("PSNR", "dB", "higher = more leaked", lambda g: _cell(g.psnr, 1)),
    Column("best null", "dB", "", lambda g: (_cell(g.estimate("null_psnr"), 1)[0], g.null)),
    Column("above null", "dB", "higher = more leaked", lambda g: _cell(g.gain, 1)),
    Column("verdict", "", "", _verdict),
)
IMAGES = (
    Column("median", "dB", "higher = more leaked", _median),
    Column("worst", "dB", "higher = more leaked", _worst),
    Column("success", "%", "higher = more leaked", lambda g: _cell(g.success, 0, 100.0)),
    Column("SSIM", "", "higher = more leaked", _mean("ssim", 2)),
    Column("LPIPS", "", "lower = more leaked", _mean("lpips", 2)),
    Column("labels", "% right", "higher = more leaked", lambda g: _cell(g.labels, 0, 100.0)),
)
UTILITY = (
    Column("accuracy", "%", "higher = better", lambda g: _cell(g.accuracy, 1, 100.0)),
    Column("accuracy lost", "points", "lower = better", _loss),
    Column("epsilon", "", "lower = more private", _spent),
)
COST = (
    Column("backprops", "per image", "lower = cheaper attack", _mean("backprops", 0)),
    Column("time", "s per image", "lower = cheaper attack", _mean("seconds", 1)),
    Column("arithmetic", "GFLOP per image", "lower = cheaper attack", _mean("gflop", 1)),
    Column("peak memory", "MB", "lower = cheaper attack", _mean("peak_mb", 0)),
    Column("steps", "", "", _mean("steps", 0)),
)


UPPER = (
    "An attacker believes what explains the update exactly, or else has the least objective. The "
    "upper bound is the best of the stages by the truth, which no attacker can choose."
)
STAGES = (
    Column("PSNR", "dB", "higher = more leaked", lambda g: _cell(g.psnr, 1)),
    Column("upper bound", "dB", "higher = more leaked", _mean("oracle_psnr", 1)),
    Column("success", "%", "higher = more leaked", lambda g: _cell(g.success, 0, 100.0)),
    Column("certified", "% of images", "higher = more leaked", lambda g: _certified(g)),
    Column("backprops", "so far", "lower = cheaper attack", _mean("backprops", 0)),
    Column("time", "s so far", "lower = cheaper attack", _mean("seconds", 1)),
)


def _certified(group: Group) -> Cell:
    sure = [any(step["certified"] for step in row.stages) for row in group.rows]
    return _number(sum(sure) / max(1, len(sure)), 0, 100.0), ""


def private(found: Sequence[Group]) -> list[tuple[str, list[Fact]]]:
    """Settings with a formal claim: what is proven, and what was measured beside it.

    Of the run with the weakest guarantee, and of one attacked update, in which the image is known
    to be.
    """
    settings = [(s.heading, s.label(g), g) for s in scenarios(found) for g in s.groups]
    return [(": ".join(filter(None, h)), facts) for *h, g in settings if (facts := _proven(g))]


def _proven(group: Group) -> list[Fact]:
    claims = [] if group.control else [inner(run, "privacy") for run in group.runs]
    claim = max(claims, key=_weakness, default={})
    facts: dict[str, dict[str, str]] = {}
    for key in KINDS:
        for line in claim.get(key, ()):
            how = line["how"].replace(", converted by", " by")
            what = line["name"] + (f", {how}" if line["name"] == "epsilon" else "")
            facts.setdefault(what, {})[key] = _line(line)
    if not facts:
        return []
    psnr, null = (" ".join(_cell(group.estimate(key), 1)) for key in ("psnr", "null_psnr"))
    facts = dict(sorted(facts.items(), key=lambda fact: not fact[0].startswith("epsilon")))
    facts["PSNR, dB"] = {"measured": psnr}
    facts["the best null's PSNR, dB"] = {"measured": null}
    return [(what, *(told.get(key, ABSENT) for key in KINDS)) for what, told in facts.items()]


def _weakness(claim: dict) -> float:
    return math.inf if claim.get("epsilon") is None else claim["epsilon"]


def _line(line: dict) -> str:
    """One number of fedsec.privacy.Line."""
    share = line["name"].startswith("naming")
    said = f"{100 * line['value']:.3g} %" if share else f"{line['value']:.3g}"
    if line["kind"] == "measured":
        return f"{said} [{100 * line['low']:.3g}, {100 * line['high']:.3g}]"
    if line["kind"] == "approximation":
        return f"about {said}" if line["value"] < ROUGH else ABSENT
    return said


def answers(found: Sequence[Group]) -> list[tuple[str, str]]:
    """For each scenario its heading, and what leaked, whether the defense helped, at what price."""
    return [(scenario.heading, _answer(scenario)) for scenario in scenarios(found)]


def _answer(scenario: Scenario) -> str:
    first = scenario.groups[0]
    control = first if first.control else None
    defended = [group for group in scenario.groups if not group.control]
    said = [] if first.status == "done" else [f"Not whole ({first.status}); of what was finished:"]
    if control:
        said.append(_leak_sentence("Without a defense", control))
        if control.leaks is False and defended:
            said.append("As nothing is shown to leak without a defense, none can be credited.")
    if len(defended) > 4:
        return " ".join([*said, _many(scenario, defended)])
    names = {id(group): _defense(group, scenario) for group in defended}
    said += [_leak_sentence(f"Under {names[id(group)]}", group) for group in defended]
    for group in defended:
        said.append(_price(group, f" under {names[id(group)]}" if len(defended) > 1 else ""))
    return " ".join(part for part in said if part)


def _many(scenario: Scenario, defended: Sequence[Group]) -> str:
    """Which of many defended settings leak, and which of the others costs least accuracy."""
    leaking = [_defense(group, scenario) for group in defended if group.leaks]
    names = f": {', '.join(leaking)}" if leaking else ""
    said = f"{len(leaking)} of {len(defended)} defended settings still leak{names}."
    held = [g for g in defended if g.leaks is False and g.lost.mean is not None]
    if held:
        best = min(held, key=lambda group: group.lost.mean or 0)
        points = _number(best.lost.mean, 1, 100.0)
        said += (
            f" Of those not above the null, {_defense(best, scenario)} costs the least accuracy: "
            f"{points} points."
        )
    return said


def _defense(group: Group, scenario: Scenario) -> str:
    name = scenario.label(group).replace(" · ", " ")
    return f"{name} (epsilon {_spent(group)[0]})" if group.privacy else name


def _leak_sentence(lead: str, group: Group) -> str:
    attack = group["attack"]
    if group.psnr.mean is None:
        return f"{lead}, no reconstruction could be scored."
    reached = _decibel(group.psnr)
    null = "the best null"
    if group.leaks is None:
        images = "image is" if group.images == 1 else "images are"
        return (
            f"{lead}, {attack} reaches {reached}; {group.images} {images} too few to say "
            f"whether that is above {null}."
        )
    if group.leaks:
        recovers = "recovers" if group.control else "still recovers"
        above = f"{_decibel(group.gain)} above {null}"
        return f"{lead}, {attack} {recovers} images at {reached}, {above}."
    return f"{lead}, {attack} reaches {reached}, not above {null}."


def _price(group: Group, whose: str) -> str:
    after, lost = group.accuracy.mean, group.lost.mean
    if after is None or lost is None:
        return ""
    ends = _number(after + lost, 1, 100.0), _number(after, 1, 100.0)
    if ends[0] == ends[1]:
        return f"Test accuracy{whose} stays at {ends[1]} %."
    verb = "falls" if lost > 0 else "rises"
    return f"Test accuracy{whose} {verb} from {ends[0]} % to {ends[1]} %."


def directions(columns: Iterable[Column]) -> str:
    said: dict[str, list[str]] = {}
    for column in columns:
        if column.direction:
            said.setdefault(column.direction, []).append(column.name)
    return "; ".join(f"{', '.join(names)}: {way}" for way, names in said.items())


def common(found: Sequence[Group]) -> str:
    """The facts that all settings share, in one line."""
    if not found:
        return "no rows yet"
    shared = [
        f"{key} {value}"
        for key, value in found[0].setting
        if key != "defense" and all(group[key] == value for group in found)
    ]
    return " · ".join(shared)


def warnings(runs: Sequence[Run], found: Sequence[Group]) -> list[str]:
    """What a reader must know before citing a number, in plain words."""
    said = []
    least = fewest(found)
    if least < ENOUGH:
        word = "image" if least == 1 else "images"
        wide = "too few for any claim" if least < FEWEST else "intervals are wide"
        if FEWEST <= least < 6:
            wide += " and hold less often than stated"
        said.append(f"{least} {word}: {wide}; images=64 gives a result that can be cited")
    said += flags.suspicious(scenarios(found))
    if found and not any(group.control for group in found):
        said.append("no control: whether the defense or the setting stopped the attack is unknown")
    attacks: dict[str, set[str]] = {}
    for group in found:
        if not group.control:
            attacks.setdefault(group["defense"], set()).add(group["attack"])
    for defense, names in attacks.items():
        if len(names) == 1 and names != {"auto"}:
            said.append(
                f"{defense} was attacked by {min(names)} only; attack=auto tries the others"
            )
    if any(g.accuracy.count == 1 and not g.control for g in found):
        said.append("accuracy lost comes from one training run; more seeds give an interval")
    for run in runs:
        if not run.whole:
            count = len(run.rows)
            rows = f"{count} {'row' if count == 1 else 'rows'}"
            said.append(f"{run.folder}: {run.status} after {rows}; not averaged with whole runs")
        if run.truncated:
            said.append(f"{run.folder}: the last row was cut off in mid-write and is left out")
    return list(dict.fromkeys(said)) + _flags(runs, found)


def fewest(found: Sequence[Group]) -> int:
    whole = [group for group in found if group.status == "done"]
    return min((group.images for group in whole or found), default=ENOUGH)


def _flags(runs: Sequence[Run], found: Sequence[Group]) -> list[str]:
    """The runs' own flags, and those of their rows, with how often each was raised.

    Without what `flags.suspicious` says of all of them.
    """
    own = (str(f) for run in runs for f in (run.run or {}).get("flags") or ())
    said = Counter(f for f in own if not f.endswith(tuple(f"[{n}]" for n in flags.NAMES)))
    lines = [text + (f" ({n} runs)" if n > 1 else "") for text, n in said.items()]
    rows = [row for group in found for row in group.rows]
    raised: dict[str, Counter[str]] = {}
    for row in rows:
        for flag in filterfalse(flags.SUMMED.match, row.flags):
            raised.setdefault(flag, Counter())[row.defense] += 1
    totals = Counter(row.defense for row in rows)
    for text, counts in raised.items():
        where = ", ".join(f"{name} {n} of {totals[name]} images" for name, n in counts.items())
        lines.append(f"{text} ({where})")
    return lines

"""The columns of the tables, the answer in sentences, and what a reader must be warned of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from typing import TYPE_CHECKING

from fedsec import flags
from fedsec.records import Run
from fedsec.report.numbers import (
    FEWEST,
    Estimate,
    Group,
    Scenario,
    World,
    claims,
    scenarios,
    worlds,
)

if TYPE_CHECKING:
    from fedsec.compare import Gap

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
    worst = group.worst
    return (ABSENT, "") if worst is None else (_number(worst.psnr, 1), f"image {worst.image}")


def _verdict(group: Group) -> Cell:
    return {None: "too few images", True: "leaks", False: "not above"}[group.leaks], ""


def _spent(group: Group) -> Cell:
    """Each claim's epsilon, and what it is of."""
    if not group.claims:
        return ABSENT, "" if group.control else "no bound"
    said = []
    for claim in group.claims:
        delta = f"{claim.get('delta') or 0:g}".replace("e-0", "e-")
        unit = claim.get("unit", "example")  # runs before there was another do not say it
        said.append(f"δ {delta}, {claim.get('accountant')}, one {unit}")
    each = " and ".join(f"{claim['epsilon']:.3g}" for claim in group.claims)
    return each, "; ".join(said)


def _loss(group: Group) -> Cell:
    return (ABSENT, "") if group.control else _cell(group.lost, 1, 100.0)


def _gap(group: Group, cell: Callable[[Gap], Cell]) -> Cell:
    return (ABSENT, "") if group.against is None else cell(group.against)


def _difference(gap: Gap) -> Cell:
    mean, low, high = gap.interval
    return (ABSENT, "") if mean is None else (
        f"{mean:+.1f}", "" if low is None else f"[{low:+.1f}, {high:+.1f}]")  # fmt: skip


def _chance(value: float | None) -> str:
    from fedsec.compare import p

    return p(value) or ABSENT


def _changed(group: Group) -> str:
    """What the corrected p and the direction say of a defense."""
    gap, chance = group.against, group.chance
    if gap is None or gap.interval[0] is None or chance is None:
        return ABSENT
    if chance >= 0.05:
        return "not shown"
    return "leaks less" if gap.interval[0] < 0 else "leaks more"


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
    Column("median", "dB", "higher = more leaked", lambda g: (_number(g.median, 1), "")),
    Column("worst", "dB", "higher = more leaked", _worst),
    Column("success", "%", "higher = more leaked", lambda g: _cell(g.success, 0, 100.0)),
    Column("SSIM", "", "higher = more leaked", _mean("ssim", 2)),
    Column("LPIPS", "", "lower = more leaked", _mean("lpips", 2)),
    Column("labels", "% right", "higher = more leaked", lambda g: _cell(g.labels, 0, 100.0)),
)
PAIRED = (
    Column("images", "in both", "", lambda g: _gap(g, lambda gap: (str(gap.pairs), ""))),
    Column("difference", "dB", "lower = defense helps", lambda g: _gap(g, _difference)),
    Column("p", "", "", lambda g: _gap(g, lambda gap: (_chance(gap.chance), ""))),
    Column("p (Holm)", "", "", lambda g: _gap(g, lambda _: (_chance(g.chance), ""))),
    Column("verdict", "", "", lambda g: (_changed(g), "")),
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


@dataclass(frozen=True)
class Sheet:
    """A table of the report, the same on the console, on the page and in the files beside it."""

    title: str
    columns: tuple[Column, ...]
    shown: Callable[[Sequence[Group]], Sequence[Scenario]]  # its lines
    note: str = ""


def strongest(found: Sequence[Group]) -> Sequence[Scenario]:
    """Of each defended setting the attack that reconstructs best; nothing of a single attack."""
    return worlds(found) if len({group["attack"] for group in found}) > 1 else []


def compared(found: Sequence[Group]) -> Sequence[Scenario]:
    """All that has a control to be compared with."""
    kept = []
    for scenario in scenarios(found):
        pairs = zip(scenario.labels, scenario.groups, strict=True)
        some = [(name, group) for name, group in pairs if group.against is not None]
        if some:
            names, members = zip(*some, strict=True)
            kept.append(Scenario(scenario.heading, members, names))
    return kept


SHEETS = (
    Sheet(
        "the strongest attack on each setting",
        (Column("attack", "", "", lambda g: (g["attack"], "")), *LEAKAGE),
        strongest,
        "By mean PSNR; the intervals are that attack's own.",
    ),
    Sheet("what leaked", LEAKAGE, scenarios),
    Sheet(
        "against the control, on the same images",
        PAIRED,
        compared,
        "PSNR minus the control's, image by image. p: how often as large a mean comes out if each "
        "image's difference might have the other sign. p (Holm): corrected for how many there are "
        "in this report; a difference is shown where that is below 0.05.",
    ),
    Sheet("image by image", IMAGES, scenarios),
    Sheet("what the defense costs", UTILITY, worlds),
    Sheet("what the attack costs", COST, scenarios),
)


def sheets(found: Sequence[Group]) -> list[tuple[Sheet, Sequence[Scenario]]]:
    """The report's tables, each with its lines; none is empty."""
    return [(sheet, shown) for sheet in SHEETS if (shown := sheet.shown(found))]


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
    settings = [(s.heading, s.label(g), g) for s in worlds(found) for g in s.groups]
    said = []
    for *heading, group in settings:
        of = _worst_claims(group)
        for unit, claim in of.items():
            about = [*heading, f"one {unit}"] if len(of) > 1 else heading
            if facts := _proven(group, claim):
                said.append((": ".join(filter(None, about)), facts))
    return said


def _worst_claims(group: Group) -> dict[str, dict]:
    """Of each thing that is hidden the run with the weakest claim."""
    found: dict[str, list[dict]] = {}
    for run in () if group.control else group.runs:
        for claim in claims(run):
            found.setdefault(claim.get("unit", "example"), []).append(claim)
    return {unit: max(same, key=_weakness) for unit, same in found.items()}


def _proven(group: Group, claim: dict) -> list[Fact]:
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


def headline(found: Sequence[Group]) -> str:
    """The answer in one sentence: what leaks without a defense, and what the defenses change."""
    whole = [group for group in found if group.status == "done"]
    split = worlds(whole or found)
    if not split:
        return "No image was attacked yet."
    controls = [g for w in split for g in w.groups if g.control and g.gain.mean is not None]
    defended = [(w, g) for w in split for g in w.groups if not g.control]
    attacks = len({group["attack"] for group in found})
    by = f"the strongest of {attacks} attacks" if attacks > 1 else found[0]["attack"]
    start = "" if whole else "Not whole yet: "
    control = max(controls, key=lambda g: g.gain.mean or 0.0, default=None)
    plain = _plainly(control, by)
    if not defended:
        return f"{start}{plain}." if plain else f"{start}no reconstruction could be scored."
    if control is not None and control.leaks is False:
        return f"{start}{plain}, so that no defense can be credited."
    lead = f"{start}{plain}; " if plain else start
    said = lead + (_single(*defended[0]) if len(defended) == 1 else _several(defended)) + "."
    return said[0].upper() + said[1:]


def _plainly(control: Group | None, by: str) -> str:
    if control is None:
        return ""
    reached = f"Without a defense, {by} "
    if control.leaks:
        above = f"{_decibel(control.gain)} above the best null"
        return f"{reached}recovers images at {_decibel(control.psnr)}, {above}"
    if control.leaks is None:
        few = "1 image is" if control.images == 1 else f"{control.images} images are"
        unsure = f"and {few} too few to say whether that is above the best null"
        return f"{reached}reaches {_decibel(control.psnr)}, {unsure}"
    return f"{reached}reaches {_decibel(control.psnr)}, not above the best null"


def _single(world: World, group: Group) -> str:
    reached = f"under {_defense(group, world)} it reaches {_decibel(group.psnr)}"
    verdicts = {
        True: "still above the null",
        False: "not above the null",
        None: "too few images to say whether above the null",
    }
    price = _price(group, "").rstrip(".").replace("Test", "and test", 1)
    return ", ".join(filter(None, [reached, verdicts[group.leaks], price]))


def _several(defended: Sequence[tuple[World, Group]]) -> str:
    leaking = sum(g.leaks is True for _, g in defended)
    held = [(w, g) for w, g in defended if g.leaks is False]
    unknown = len(defended) - leaking - len(held)
    leak = {0: "none is shown to leak", 1: "1 still leaks"}.get(leaking, f"{leaking} still leak")
    said = [f"of {len(defended)} defended settings {leak}"]
    said += [f"{unknown} met too few images to say"] if unknown else []
    priced = [(w, g) for w, g in held if g.lost.mean is not None]
    if priced:
        world, best = min(priced, key=lambda each: each[1].lost.mean or 0.0)
        points = _number(best.lost.mean, 1, 100.0)
        where = f" ({world.heading})" if world.heading else ""
        which = f"the cheapest of the {len(held)}" if len(held) > 1 else "the only one"
        said += [f"{which} not shown to, {_defense(best, world)}{where}, costs {points} points of "
                 "test accuracy"]  # fmt: skip
    return ", and ".join(said)


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
    said = [_accuracy_sentence(group, whose)]
    if group.averaged.mean is not None:
        reached = " ".join(_cell(group.averaged, 1, 100.0))
        said.append(f"With weights averaged over the rounds it is {reached} %{whose}.")
    return " ".join(filter(None, said))


def _accuracy_sentence(group: Group, whose: str) -> str:
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


def warnings(
    runs: Sequence[Run], found: Sequence[Group], left_out: Sequence[object] = ()
) -> list[str]:
    """What a reader must know before citing a number, in plain words.

    `left_out`: what could not be read.
    """
    said = [f"left out: {why}" for why in left_out]
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

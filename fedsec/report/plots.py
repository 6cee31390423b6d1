"""Where everything stands in the figures, in pixels: the page draws them as SVG, without a script.

Leakage against what it costs the defender (test accuracy) and the attacker (backprops), and the
attacks' objectives over their steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from fedsec.report.numbers import Estimate, Group, Scenario, World, by_stage, scenarios

Number = float | int
SIZES = ((720, 400), (340, 330))  # of a figure on a screen, and on a phone
APART = 10  # largest over least value from which on a scale is logarithmic
LINES = 8  # of one figure: more cannot be told apart
NAMED = 8  # points up to which each has its name beside it; of more, those on the front have
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 14, 46


@dataclass(frozen=True)
class Axis:
    """Values <-> pixels; `log`: equal ratios are equally far apart."""

    title: str
    ticks: tuple[Number, ...]
    low: Number
    high: Number
    begin: Number  # pixel of `low`
    end: Number
    log: bool = False

    def at(self, value: Number) -> Number:
        ends = _scaled(self.low, self.log), _scaled(self.high, self.log)
        share = (_scaled(value, self.log) - ends[0]) / (ends[1] - ends[0])
        return self.begin + share * (self.end - self.begin)

    def drawn(self) -> list[tuple[Number, str]]:
        return [(self.at(tick), f"{tick:,g}") for tick in self.ticks]


def _scaled(value: Number, log: bool) -> Number:
    return math.log10(value) if log else value


def axis(
    title: str, values: Sequence[Number], begin: Number, end: Number, most: int, log: bool = False
) -> Axis:
    ticks = (log_ticks if log else even_ticks)(min(values), max(values), most)
    return Axis(title, tuple(ticks), ticks[0], ticks[-1], begin, end, log)


def even_ticks(low: Number, high: Number, most: int) -> list[Number]:
    """Round values around [low, high], at most `most` steps."""
    span = max(high - low, 1e-6)
    step = next(
        s * 10.0**k for k in range(-7, 9) for s in (1, 2, 5) if span / (s * 10.0**k) <= most - 1
    )
    start, stop = int(low // step), int(-(-high // step))
    return [round(i * step, 9) for i in range(start, max(stop, start + 1) + 1)]


def log_ticks(low: Number, high: Number, most: int) -> list[Number]:
    """Round values around [low, high], in equal ratios or nearly so."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for leads in ((1, 2, 5), (1,)):
        ticks = [lead * 10.0**k for k in range(first, last + 1) for lead in leads]
        begin = max([t for t in ticks if t <= low * (1 + 1e-9)], default=ticks[0])
        end = min([t for t in ticks if t >= high * (1 - 1e-9) and t > begin], default=10 * begin)
        ticks = [t for t in ticks if begin <= t <= end] + ([end] if end > ticks[-1] else [])
        if len(ticks) <= most + 1:
            return ticks
    steps = [*range(first, last, -(-(last - first) // most)), last]
    return [10.0**k for k in steps]


# ---- leakage against what the defense costs ---------------------------------------------------


def front(scenario: Scenario) -> dict[int, bool]:
    """By a group's id: whether no other loses less accuracy and leaks no more (Pareto).

    Leakage is PSNR above the best null, and nothing where it is below: more error than guessing is
    no more privacy.
    """
    from fedsec import stats

    known = [g for g in scenario.groups if g.gain.mean is not None and g.lost.mean is not None]
    points = [(g.lost.mean or 0.0, max(0.0, g.gain.mean or 0.0)) for g in known]
    return dict(zip(map(id, known), stats.pareto(points), strict=True))


def tradeoff(scenario: Scenario) -> list[dict[str, Any]]:
    """Leakage against accuracy lost, for each of `SIZES`; nothing without a defended setting."""
    shown = [g for g in scenario.groups if g.psnr.mean is not None and g.lost.mean is not None]
    if all(g.control for g in shown):
        return []
    return [_tradeoff(scenario, shown, *size) for size in SIZES]


def _tradeoff(
    scenario: Scenario, shown: Sequence[Group], width: int, height: int
) -> dict[str, Any]:
    nulls = [m for g in shown if (m := g.estimate("null_psnr").mean) is not None]
    lost = [100 * v for g in shown for v in _known(g.lost)]
    leak = [v for g in shown for v in _known(g.psnr)]
    wide = width > 500
    x = axis("test accuracy lost, percentage points", [min(0.0, *lost), max(5.0, *lost)],
             LEFT, width - RIGHT, 6 if wide else 4)  # fmt: skip
    # the control sits at zero: keep it and its label clear of the axis
    x = replace(x, low=x.low - (x.high - x.low) * 0.05)
    y = axis("PSNR, dB", [*leak, *nulls], height - BOTTOM, TOP, 6)
    best = front(scenario)
    points = [
        {
            "x": x.at(100 * (g.lost.mean or 0.0)),
            "y": y.at(g.psnr.mean or 0.0),
            "across": _reach(g.lost, x, 100.0),
            "up": _reach(g.psnr, y),
            "leaks": g.leaks,
            "front": best.get(id(g), False),
            "label": scenario.label(g),
            "named": len(shown) <= NAMED or g.control or best.get(id(g), False),
        }
        for g in shown
    ]
    lines = null_lines(nulls, (y.high - y.low) / 20)
    place_labels([p for p in points if p["named"]], width, [y.at(v) for v, _ in lines])
    steps = sorted((p["x"], p["y"]) for p in points if p["front"])
    return _frame(x, y, width, height) | {
        "nulls": [(y.at(v), text) for v, text in lines],
        "points": points,
        "front": _staircase(steps, x.end, y.end) if len(steps) > 1 else "",
    }


def _staircase(steps: Sequence[tuple[Number, Number]], right: Number, top: Number) -> str:
    """What the front leaves possible: everything above and to the right of it."""
    corners = [(steps[0][0], top)]
    for (x0, y0), (x1, _) in zip(steps, [*steps[1:], (right, 0.0)], strict=True):
        corners += [(x0, y0), (x1, y0)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def _known(found: Estimate) -> list[Number]:
    return [v for v in (found.mean, found.low, found.high) if v is not None]


def _reach(found: Estimate, along: Axis, scale: Number = 1.0) -> tuple[Number, Number] | None:
    if found.low is None or found.high is None:
        return None
    return along.at(found.low * scale), along.at(found.high * scale)


def _frame(x: Axis, y: Axis, width: int, height: int) -> dict[str, Any]:
    return {
        "width": width,
        "height": height,
        "left": LEFT,
        "right": width - RIGHT,
        "top": TOP,
        "bottom": height - BOTTOM,
        "x_title": x.title,
        "y_title": y.title,
        "x_ticks": x.drawn(),
        "y_ticks": y.drawn(),
        "nulls": [],
        "points": [],
        "front": "",
        "lines": [],
    }


def null_lines(nulls: Sequence[Number], near: Number) -> list[tuple[Number, str]]:
    """One line for all null baselines that lie within `near` dB of each other."""
    bunches: list[list[Number]] = []
    for value in sorted(nulls):
        if bunches and value - bunches[-1][0] <= near:
            bunches[-1].append(value)
        else:
            bunches.append([value])
    lines = []
    for bunch in bunches:
        ends = dict.fromkeys(f"{v:.1f}" for v in (bunch[0], bunch[-1]))
        lines.append((sum(bunch) / len(bunch), f"best null {' to '.join(ends)} dB"))
    return lines


def place_labels(points: list[dict], width: int, lines: Sequence[Number]) -> None:
    """Write each label beside its point, moved up or down until it covers no other label."""
    taken: list[tuple[Number, Number, Number]] = [(0, width, y - 7) for y in lines]
    for point in sorted(points, key=lambda p: p["y"]):
        long = 7.2 * len(point["label"])
        after = point["x"] + 10 + long < width
        start = point["x"] + 10 if after else point["x"] - 10 - long
        height = point["y"] + 4
        for move in (0, -16, 16, -32, 32, -48, 48, -64, 64):
            height = point["y"] + 4 + move
            if not any(
                start < right and start + long > left and abs(height - other) < 14
                for left, right, other in taken
            ):
                break
        taken.append((start, start + long, height))
        point |= {"at": (start if after else point["x"] - 10, height), "after": after}


# ---- lines: what more arithmetic buys an attacker, and objectives over steps --------------------

Series = tuple[str, list[tuple[Number, Number]]]  # a name, and its points from left to right


def spending(world: World) -> list[Series]:
    """Of each defended setting what its attacks reach by backprops per image: the most so far.

    Stages of an attack count as attacks that end there. Nothing where all attacks cost the same.
    """
    staged = [
        group for scenario in by_stage(scenarios(world.attacked)) for group in scenario.groups
    ]
    found: dict[tuple, list[tuple[Number, Number]]] = defaultdict(list)
    for group in (*world.attacked, *staged):
        cost, psnr = group.estimate("backprops").mean, group.psnr.mean
        if cost is not None and psnr is not None and cost > 0:
            found[group.without("attack")].append((cost, psnr))
    if len({round(cost, 3) for points in found.values() for cost, _ in points}) < 2:
        return []
    names = zip(world.labels, world.groups, strict=True)
    each = [(name, rising(found[group.without("attack")])) for name, group in names]
    return [(name, points) for name, points in each if points]


def rising(points: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    """The attacks that reach more than every cheaper one (Pareto)."""
    from fedsec import stats

    best = stats.pareto([(cost, -psnr) for cost, psnr in points])
    return sorted({point for point, kept in zip(points, best, strict=True) if kept})


def objectives(scenario: Scenario) -> list[Series]:
    """Of each setting the median over its updates of the least objective so far, by step."""
    curves = [
        (name, [row.curve for row in group.rows if row.curve])
        for name, group in zip(scenario.labels, scenario.groups, strict=True)
    ]
    return [(name, middle(each)) for name, each in curves if each]


def middle(curves: Sequence[Sequence[Sequence[Number]]]) -> list[tuple[Number, Number]]:
    """The median of curves at every step of any; one that has ended stays where it was."""
    steps = sorted({point[0] for curve in curves for point in curve})
    held = [([p[0] for p in curve], [p[1] for p in curve]) for curve in curves]
    middles = []
    for step in steps:
        there = [values[bisect_right(at, step) - 1] for at, values in held if at[0] <= step]
        middles.append((step, median(there)))
    return middles


def lines(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> list[dict[str, Any]]:
    """Series as lines with their names at their ends, for each of `SIZES`; nothing without any.

    The first `LINES` of them. Logarithms are taken where values are `APART`.
    """
    kept = [(name, points) for name, points in series[:LINES] if points]
    return [_lines(kept, x_title, y_title, log_x, log_y, *size) for size in SIZES if kept]


def _lines(
    series: Sequence[Series], x_title: str, y_title: str, log_x: bool, log_y: bool,
    width: int, height: int,
) -> dict[str, Any]:  # fmt: skip
    xs, ys = ([p[i] for _, points in series for p in points] for i in (0, 1))
    long = 7.2 * max(len(name) for name, _ in series) + 10 if width > 500 else 0.0
    x = axis(
        x_title, xs, LEFT, width - RIGHT - long, 6 if width > 500 else 3, log_x and min(xs) > 0
    )
    y = axis(y_title, ys, height - BOTTOM, TOP, 6, log_y and wide(ys))
    drawn = []
    for colour, (name, points) in enumerate(series):
        places = [(x.at(a), y.at(b)) for a, b in points]
        drawn.append({
            "label": name, "colour": colour, "dots": places if len(places) < 12 else [],
            "path": " ".join(f"{a:.1f},{b:.1f}" for a, b in places),
            "x": places[-1][0], "y": places[-1][1],
        })  # fmt: skip
    place_ends(drawn, TOP, height - BOTTOM)
    return _frame(x, y, width, height) | {"lines": drawn, "legend": width <= 500}


def wide(values: Sequence[Number]) -> bool:
    return min(values) > 0 and max(values) > APART * min(values)


def place_ends(drawn: Sequence[dict[str, Any]], top: Number, bottom: Number) -> None:
    """Names at the ends of lines, 14 pixels apart at least, in the lines' order."""
    order = sorted(drawn, key=lambda line: line["y"])
    height = top
    for line in order:
        height = line["name_y"] = max(line["y"] + 4, height)
        height += 14
    height = bottom
    for line in reversed(order):
        line["name_y"] = min(line["name_y"], height)
        height = line["name_y"] - 14

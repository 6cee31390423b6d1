"""report.html: one file that needs no network, no script and no other file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsec import records
from fedsec.records import Run
from fedsec.report.numbers import Estimate, Group, Scenario, by_stage, groups, inner, scenarios
from fedsec.report.pictures import grid_cells
from fedsec.report.words import (
    ABSENT,
    COST,
    ENOUGH,
    FACTS,
    IMAGES,
    KINDS,
    LEAKAGE,
    PROVEN,
    STAGES,
    UPPER,
    UTILITY,
    answers,
    common,
    fewest,
    private,
    warnings,
)


def write(runs: Sequence[Run], path: str | Path) -> None:
    """Write one HTML file that needs no network, no script and no other file. Raises NotSaved."""
    import jinja2

    found = groups(runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedsec"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["typeset"] = _typeset
    page = environment.get_template(records.REPORT).render(_page(runs, found))
    with records.saving(Path(path)) as half:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(page, encoding="utf-8", errors="replace")


def _margin() -> float:
    from fedsec import stats

    return stats.MARGIN


def _typeset(text: str) -> str:
    """Keep a number with its unit and its interval on one line, with a true minus sign."""
    text = re.sub(r"(?<=\d) (?=dB|%)|(?<=\d,) (?=-?\d)|(?<=epsilon) ", "\u00a0", text)
    return re.sub(r"(?<!\w)-(?=\d)", "\u2212", text)


def _page(runs: Sequence[Run], found: Sequence[Group]) -> dict[str, Any]:
    first, *others = answers(found) or [("", "No image was attacked yet.")]
    return {
        "title": _title(found),
        "common": common(found),
        "answer": first,
        "answers": others,
        "flags": warnings(runs, found),
        "few": fewest(found) < ENOUGH,
        "scenarios": scenarios(found),
        "staged": by_stage(scenarios(found)),
        "upper": UPPER,
        "private": private(found),
        "proven": PROVEN,
        "kinds": list(KINDS.values()),
        "stages": STAGES,
        "tables": {"leakage": LEAKAGE, "images": IMAGES, "utility": UTILITY, "cost": COST},
        "plots": [
            (scenario.heading, plot, _plot(scenario, 340, 330))
            for scenario in scenarios(found)
            if (plot := _plot(scenario, 720, 400))
        ],
        "grids": [grid for scenario in scenarios(found) for grid in _grids(scenario)],
        "known": _known(found),
        "nulls": _nulls(runs),
        "runs": runs,
        "commands": list(dict.fromkeys(filter(None, map(_command, runs)))),
        "versions": list(dict.fromkeys(filter(None, map(_versions, runs)))),
        "configs": _configs(runs),
        "margin": _margin(),
        "lpips": next((n for r in runs if (n := inner(r, "metrics").get("lpips"))), "LPIPS"),
    }


def _grids(scenario: Scenario) -> list[dict[str, Any]]:
    """The scenario's images: one row for each setting, under the originals that it shares.

    A setting shows its first run; its row is found by its title, which begins with the defense.
    """
    shown: dict[tuple, dict[str, Any]] = {}
    for name, group in zip(scenario.labels, scenario.groups, strict=True):
        path = next((p for run in group.runs if (p := run.folder / records.GRID).exists()), None)
        if path is None:
            continue
        cells = grid_cells(path)
        rows = cells["rows"]
        own = [row for row in rows[1:] if row["title"].split(" ")[0] == group["defense"]]
        if not own:
            shown.setdefault((path,), cells | {"heading": scenario.heading})
            continue
        fresh = cells | {"heading": scenario.heading, "rows": rows[:1]}
        pictures = shown.setdefault(tuple(source for source, _ in rows[0]["cells"]), fresh)
        pictures["rows"] += [row | {"title": name} for row in own]
    return list(shown.values())


def _title(found: Sequence[Group]) -> str:
    attacks = dict.fromkeys(group["attack"] for group in found)
    defenses = dict.fromkeys(group["defense"] for group in found if not group.control)
    against = f" against {', '.join(defenses)}" if defenses else " without a defense"
    return ", ".join(attacks) + against if found else "No rows yet"


def _known(found: Sequence[Group]) -> list[dict]:
    """Who knew what: for each threat model and model age, the facts granted and withheld."""
    cases: dict[tuple, dict] = {}
    for group in found:
        key = (group["threat"], group["mode"], group["round"], group["batch"])
        grants = next((r.run["grants"] for r in group.runs if r.run and r.run.get("grants")), ())
        case = cases.setdefault(key, {"granted": tuple(grants)})
        case["granted"] = case["granted"] or tuple(grants)
    return [
        {
            "threat": threat,
            "mode": mode,
            "round": int(age),
            "batch": int(batch),
            "granted": [(fact, FACTS.get(fact, "")) for fact in case["granted"]],
            "withheld": [f for f in FACTS.items() if f[0] not in case["granted"]],
        }
        for (threat, mode, age, batch), case in cases.items()
    ]


def _nulls(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """By run folder, the baselines and their figures."""
    seen: dict[tuple, str] = {}
    for run in runs:
        figures = tuple((name, _figures(v)) for name, v in inner(run, "nulls").items())
        if figures:
            seen.setdefault(figures, str(run.folder))
    return [(folder, list(figures)) for figures, folder in seen.items()]


def _figures(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figures(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(_figures(v) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _command(run: Run) -> str:
    command = (run.run or {}).get("command") or ""
    return " ".join(command) if isinstance(command, list) else str(command)


def _versions(run: Run) -> str:
    return " · ".join(f"{k} {v or ABSENT}" for k, v in inner(run, "versions").items())


def _configs(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Each configuration once, with the folders that share it."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        path = run.folder / records.CONFIG
        if path.exists():
            seen.setdefault(path.read_text("utf-8", "replace"), []).append(str(run.folder))
    return [(", ".join(folders), text) for text, folders in seen.items()]


def _plot(scenario: Scenario, width: int, height: int) -> dict[str, Any] | None:
    """Where everything stands in the scatter of leakage against accuracy lost, in pixels."""
    shown = [
        (group, group.psnr, group.lost)
        for group in scenario.groups
        if group.psnr.mean is not None and group.lost.mean is not None
    ]
    if not any(not g.control for g, _, _ in shown):
        return None
    nulls = [m for g, _, _ in shown if (m := g.estimate("null_psnr").mean) is not None]
    left, right, top, bottom = 46, 18, 14, 46
    lost = [100 * v for _, _, e in shown for v in (e.mean, e.low, e.high) if v is not None]
    leak = [v for _, e, _ in shown for v in (e.mean, e.low, e.high) if v is not None]
    x_ticks = _ticks(min(0.0, *lost), max(5.0, *lost), 6 if width > 500 else 4)
    y_ticks = _ticks(min([*leak, *nulls]), max([*leak, *nulls]), 6)
    # the control sits at zero: keep it and its label clear of the axis
    x_low, x_high = x_ticks[0] - (x_ticks[-1] - x_ticks[0]) * 0.05, x_ticks[-1]

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return (
            height
            - bottom
            - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - bottom - top)
        )

    def ends(found: Estimate, place: Callable[[float], float], scale: float = 1.0):
        if found.low is None or found.high is None:
            return None
        return place(found.low * scale), place(found.high * scale)

    points = [
        {
            "x": x(100 * (lost.mean or 0.0)),
            "y": y(psnr.mean or 0.0),
            "across": ends(lost, x, 100.0),
            "up": ends(psnr, y),
            "leaks": group.leaks,
            "control": group.control,
            "label": scenario.label(group),
        }
        for group, psnr, lost in shown
    ]
    lines = _null_lines(nulls, (y_ticks[-1] - y_ticks[0]) / 20)
    _place_labels(points, width, [y(v) for v, _ in lines])
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": top,
        "bottom": height - bottom,
        "x_ticks": [(x(v), f"{v:g}") for v in x_ticks],
        "y_ticks": [(y(v), f"{v:g}") for v in y_ticks],
        "nulls": [(y(v), text) for v, text in lines],
        "points": points,
    }


def _null_lines(nulls: Sequence[float], near: float) -> list[tuple[float, str]]:
    """One line for all null baselines that lie within `near` dB of each other."""
    bunches: list[list[float]] = []
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


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values around [low, high], at most `most` steps."""
    span = max(high - low, 1e-6)
    step = next(
        s * 10.0**k for k in range(-3, 5) for s in (1, 2, 5) if span / (s * 10.0**k) <= most - 1
    )
    start, stop = int(low // step), int(-(-high // step))
    return [round(i * step, 6) for i in range(start, max(stop, start + 1) + 1)]


def _place_labels(points: list[dict], width: int, lines: Sequence[float]) -> None:
    """Write each label beside its point, moved up or down until it covers no other label."""
    taken: list[tuple[float, float, float]] = [(0, width, y - 7) for y in lines]
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

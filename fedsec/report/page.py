"""report.html: one file that needs no network, no script and no other file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsec import records
from fedsec.records import Run
from fedsec.report import plots
from fedsec.report.numbers import Group, World, by_stage, groups, inner, scenarios, worlds
from fedsec.report.pictures import RULE, album
from fedsec.report.tables import SUFFIXES
from fedsec.report.words import (
    ABSENT,
    ENOUGH,
    FACTS,
    KINDS,
    PROVEN,
    STAGES,
    UPPER,
    answers,
    common,
    fewest,
    headline,
    private,
    sheets,
    warnings,
)

FIGURES = 12  # of each kind
OPEN = 12  # lines of a list from which on the rest is folded


def write(
    runs: Sequence[Run],
    path: str | Path,
    found: Sequence[Group] | None = None,
    left_out: Sequence[object] = (),
) -> None:
    """Write one HTML file that needs no network, no script and no other file. Raises NotSaved.

    `found`: the runs' `groups`, where they are known; `left_out`: why others could not be read.
    """
    import jinja2

    path = Path(path)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedsec"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["typeset"] = _typeset
    shown = _page(runs, groups(runs) if found is None else found, left_out)
    shown["beside"] = [file.name for s in SUFFIXES if (file := path.with_suffix(s)).exists()]
    page = environment.get_template(records.REPORT).render(shown)
    with records.saving(path) as half:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(page, encoding="utf-8", errors="replace")


def _margin() -> float:
    from fedsec import stats

    return stats.MARGIN


def _typeset(text: str) -> str:
    """Keep a number with its unit and its interval on one line, with a true minus sign."""
    text = re.sub(r"(?<=\d) (?=dB|%)|(?<=\d,) (?=[-+]?\d)|(?<=epsilon) ", "\u00a0", text)
    return re.sub(r"(?<!\w)-(?=\d)", "\u2212", text)


def _page(
    runs: Sequence[Run], found: Sequence[Group], left_out: Sequence[object]
) -> dict[str, Any]:
    from fedsec import price

    split, apart = scenarios(found), worlds(found)
    pictures = album(apart)
    flags = warnings(runs, found, [*left_out, *pictures.damaged])
    return {
        "title": _title(found),
        "common": common(found),
        "headline": headline(found),
        "answers": answers(found) if len(found) > 2 else [],
        "flags": flags,
        "few": next((f for f in flags if "intervals are wide" in f or "too few" in f), "")
        if fewest(found) < ENOUGH
        else "",
        "open": OPEN,
        "sheets": sheets(found),
        "attacks": len({group["attack"] for group in found}),
        "staged": by_stage(split),
        "upper": UPPER,
        "private": private(found),
        "proven": PROVEN,
        "kinds": list(KINDS.values()),
        "stages": STAGES,
        "album": pictures,
        "rule": RULE,
        **_figures(apart, split),
        "price": price.lines(price.prices(runs)),
        "known": _known(found),
        "facts": FACTS,
        "nulls": _nulls(runs),
        "runs": runs,
        "commands": list(dict.fromkeys(filter(None, map(_command, runs)))),
        "versions": list(dict.fromkeys(filter(None, map(_versions, runs)))),
        "commits": list(dict.fromkeys(str(c) for r in runs if (c := (r.run or {}).get("commit")))),
        "configs": _configs(runs),
        "margin": _margin(),
        "lpips": next((n for r in runs if (n := inner(r, "metrics").get("lpips"))), "LPIPS"),
    }


def _figures(apart: Sequence[World], split: Sequence) -> dict[str, Any]:
    """By the name of a kind: (heading, figure for each size), and how many had no room."""
    spent = "arithmetic of the attack, backprops per image"
    made = {
        "tradeoffs": ((w.heading, plots.tradeoff(w)) for w in apart),
        "spendings": (
            (w.heading, plots.lines(plots.spending(w), spent, "PSNR, dB", log_x=True))
            for w in apart
        ),
        "curves": (
            (s.heading, plots.lines(plots.objectives(s), "step", "objective", log_y=True))
            for s in split
        ),
    }
    drawn = {name: [each for each in kind if each[1]] for name, kind in made.items()}
    few = {name: kind[:FIGURES] for name, kind in drawn.items()}
    return few | {"undrawn": {name: len(kind[FIGURES:]) for name, kind in drawn.items()}}


def _title(found: Sequence[Group]) -> str:
    attacks = dict.fromkeys(group["attack"] for group in found)
    defenses = dict.fromkeys(group["defense"] for group in found if not group.control)
    against = f" against {', '.join(defenses)}" if defenses else " without a defense"
    return ", ".join(attacks) + against if found else "No rows yet"


def _known(found: Sequence[Group]) -> list[dict[str, Any]]:
    """Of each threat model its grants (None: not recorded), and which models it attacked."""
    grants: dict[str, tuple[str, ...]] = {}
    cases: dict[str, dict[tuple[str, int, int], None]] = defaultdict(dict)
    for group in found:
        name = group["threat"]
        told = next((r.run["grants"] for r in group.runs if r.run and r.run.get("grants")), ())
        grants[name] = grants.get(name) or tuple(map(str, told))
        cases[name][group["mode"], int(group["round"]), int(group["batch"])] = None
    return [
        {"threat": name, "grants": known or None, "cases": sorted(cases[name], key=repr)}
        for name, known in grants.items()
    ]


def _nulls(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The baselines' mean PSNR, from the least to the largest of any run."""
    seen: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, value in inner(run, "nulls").items():
            if isinstance(value, int | float):
                seen[name].append(value)
    ends = {
        name: dict.fromkeys(f"{v:.1f}" for v in (min(all_), max(all_)))
        for name, all_ in seen.items()
    }
    return [(name, " to ".join(values)) for name, values in ends.items()]


def _command(run: Run) -> str:
    command = (run.run or {}).get("command") or ""
    return " ".join(command) if isinstance(command, list) else str(command)


def _versions(run: Run) -> str:
    return " · ".join(f"{k} {v or ABSENT}" for k, v in inner(run, "versions").items())


def _configs(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Each configuration once but for its seed and folder, with the runs that share it."""
    seen: dict[str, list[Run]] = defaultdict(list)
    texts: dict[str, str] = {}
    for run in runs:
        path = run.folder / records.CONFIG
        if path.exists():
            text = path.read_text("utf-8", "replace")
            shared = re.sub(r"(?m)^(seed|out):.*$", "", text)
            seen[shared].append(run)
            texts.setdefault(shared, text)
    return [(_folders(shared), texts[key]) for key, shared in seen.items()]


def _folders(runs: Sequence[Run]) -> str:
    more = f" and {len(runs) - 1} more, which differ in their seed at most" if len(runs) > 1 else ""
    return f"{runs[0].folder}{more}"

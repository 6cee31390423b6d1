"""The report's tables for other programs and for papers: report.csv, report.md, report.tex."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsec import records
from fedsec.report.numbers import Estimate, Group, Scenario, scenarios, worlds
from fedsec.report.plots import front
from fedsec.report.words import ABSENT, headline, sheets

SUFFIXES = (".csv", ".md", ".tex")

ESTIMATES: dict[str, Callable[[Group], Estimate]] = {  # each with _low and _high in the CSV
    "psnr_db": lambda g: g.psnr,
    "null_psnr_db": lambda g: g.estimate("null_psnr"),
    "above_null_db": lambda g: g.gain,
    "success": lambda g: g.success,
    "ssim": lambda g: g.estimate("ssim"),
    "lpips": lambda g: g.estimate("lpips"),
    "labels_right": lambda g: g.labels,
    "accuracy": lambda g: g.accuracy,
    "accuracy_lost": lambda g: g.lost,
    "backprops": lambda g: g.estimate("backprops"),
    "seconds": lambda g: g.estimate("seconds"),
    "gflop": lambda g: g.estimate("gflop"),
    "peak_mb": lambda g: g.estimate("peak_mb"),
    "steps": lambda g: g.estimate("steps"),
}


def write(found: Sequence[Group], path: Path) -> list[Path]:
    """Beside the page at `path`: its tables as CSV, Markdown and LaTeX. Raises NotSaved."""
    texts = (as_csv(found), as_markdown(found), as_latex(found))
    written = [path.with_suffix(suffix) for suffix in SUFFIXES]
    for file, text in zip(written, texts, strict=True):
        records.write_whole(file, text.encode("utf-8", "replace"))
    return written


def as_csv(found: Sequence[Group]) -> str:
    """A line for each setting, all digits; shares in [0, 1]; empty where nothing was measured."""
    fronts = {key: value for world in worlds(found) for key, value in front(world).items()}
    lines = [
        _line(scenario, name, group, fronts)
        for scenario in scenarios(found)
        for name, group in zip(scenario.labels, scenario.groups, strict=True)
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _line(
    scenario: Scenario, name: str, group: Group, fronts: dict[int, bool]
) -> dict[str, object]:
    seeds = {row.seed for row in group.rows}
    line: dict[str, object] = {"scenario": scenario.heading, "setting": name, **group.named}
    line |= {"status": group.status, "runs": len(group.runs), "seeds": len(seeds)}
    line |= {"rows": len(group.rows), "images": group.images}
    for key, estimate in ESTIMATES.items():
        got = estimate(group)
        line |= {key: got.mean, f"{key}_low": got.low, f"{key}_high": got.high}
    line |= {"median_psnr_db": group.median, "worst_psnr_db": group.worst and group.worst.psnr}
    line |= {"worst_image": group.worst and group.worst.image, "leaks": group.leaks}
    gap, claim = group.against, group.privacy
    ends = gap.interval if gap else (None, None, None)
    names = ("against_control_db", "against_control_db_low", "against_control_db_high")
    line |= dict(zip(names, ends, strict=True))
    line |= {"pairs": gap and gap.pairs, "p": gap and gap.chance, "p_holm": group.chance}
    line |= {key: claim.get(key) for key in ("epsilon", "delta", "accountant")}
    return line | {"pareto": fronts.get(id(group))}


def as_markdown(found: Sequence[Group]) -> str:
    parts = [headline(found)]
    for sheet, shown in sheets(found):
        heads = ["setting", *(f"{c.name}, {c.unit}" if c.unit else c.name for c in sheet.columns)]
        lines = [heads, ["---", *("---:" for _ in sheet.columns)]]
        for scenario in shown:
            lead = f"{scenario.heading}: " if scenario.heading else ""
            for name, group in zip(scenario.labels, scenario.groups, strict=True):
                cells = (" ".join(filter(None, c.cell(group))) for c in sheet.columns)
                lines.append([lead + name, *cells])
        table = "\n".join("| " + " | ".join(map(_piped, line)) + " |" for line in lines)
        parts += [f"## {sheet.title.capitalize()}", *([sheet.note] if sheet.note else []), table]
    return "\n\n".join(parts) + "\n"


def _piped(text: str) -> str:
    safe = {"\\": r"\\", "|": r"\|", "<": "&lt;", ">": "&gt;", "*": r"\*", "`": r"\`"}
    return "".join(safe.get(c, c) for c in " ".join(text.split()))


def as_latex(found: Sequence[Group]) -> str:
    r"""A table environment for each table, to be \input; needs booktabs and nothing else."""
    parts = [r"% \usepackage{booktabs}"]
    for sheet, shown in sheets(found):
        heads = [latex(f"{c.name}, {c.unit}" if c.unit else c.name) for c in sheet.columns]
        body = []
        for scenario in shown:
            if scenario.heading:
                wide = len(sheet.columns) + 1
                body.append(rf"\multicolumn{{{wide}}}{{l}}{{\emph{{{latex(scenario.heading)}}}}}")
            for name, group in zip(scenario.labels, scenario.groups, strict=True):
                cells = (" ".join(filter(None, c.cell(group))) for c in sheet.columns)
                body.append(" & ".join([latex(name), *map(latex, cells)]))
        parts.append("\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{latex(sheet.title.capitalize())}}}",
            rf"\begin{{tabular}}{{l{'r' * len(sheet.columns)}}}", r"\toprule",
            " & ".join(["", *heads]) + r" \\", r"\midrule", *(line + r" \\" for line in body),
            r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "\u00b7": r"$\cdot$", "\u00d7": r"$\times$", "\u03b4": r"$\delta$", "\u2212": "$-$",
    "\u03b5": r"$\varepsilon$", "\u03c3": r"$\sigma$", "\u03bc": r"$\mu$", "\u00b5": r"$\mu$",
    "\u2264": r"$\leq$", "\u2265": r"$\geq$", "\u00b1": r"$\pm$", "\u2013": "--", ABSENT: "---",
    "\u2026": r"\ldots{}", "\u00a0": "~",
} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip


def latex(text: str) -> str:
    """Text that compiles and reads as it is, with any engine and no package.

    What LaTeX's own fonts lack is named by its number.
    """
    whole = re.sub(r"\s+", " ", text.replace("\u00a0", "\x00")).replace("\x00", "\u00a0")
    minus = re.sub(r"(?<!\w)-(?=\d)", "\u2212", whole)
    safe = "".join(_SPECIAL.get(c) or _letter(c) for c in minus)
    # after a line's end these would be its arguments
    return f"{{{safe[0]}}}{safe[1:]}" if safe[:1] in ("[", "*") else safe


def _letter(c: str) -> str:
    latin = "\u00c0" <= c <= "\u00ff" and c.isalpha() and c not in "ÐðÞþ"  # these need T1
    return c if latin or (c.isascii() and c.isprintable()) else f"(U+{ord(c):04X})"

"""What is suspicious about results: signs that a number does not mean what it seems to.

A flag is a sentence with its numbers. It ends with the name of its paragraph in docs/flags.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedsec.records import Row

if TYPE_CHECKING:
    from fedsec.report.numbers import Estimate, Group, Scenario

NEAR = 0.01  # objective below which an update counts as explained: lenet's images end below 0.005
CHANCE = 1e-3  # of so many right guesses under a bound, below which it counts as contradicted
MANY = 2  # settings from which on a report would say the same too often

NOT_FINITE = re.compile(r"loss: the value was ")  # in the flags of a row
LOST = re.compile(r"(\d+) of (\d+) restarts became non-finite")
SUMMED = re.compile(f"{NOT_FINITE.pattern}|{LOST.pattern}")  # flags of rows that are told of here

# What `suspicious` says; a report works it out anew from all runs of a setting.
NAMES = (
    *("control-does-not-leak", "accuracy-at-chance", "below-null", "leaks-more", "one-draw"),
    *("matched-by-another", "loss-not-finite", "restarts-lost", "more-than-proven"),
)


def suspicious(found: Sequence[Scenario]) -> list[str]:
    """A line for each suspicion, beginning with its scenario where there are several.

    The first of many settings that raise the same stands for the others. Of settings whose runs did
    not finish only the objective and lost restarts count; of those with too few images for an
    interval nothing that needs one.
    """
    said: dict[str, dict[str, None]] = {}  # lines by name
    for scenario in found:
        lead = f"{scenario.heading}: " if scenario.heading else ""
        control = next((g for g in scenario.groups if g.control), None)
        for group in scenario.groups:
            lines = [*_of_any(group, scenario.label(group))]
            if group.status == "done":
                lines += _of_control(group) if group.control else []
                lines += [] if group.control else _of_defended(group, control, scenario)
            for line in lines:
                said.setdefault(line[line.rindex(" [") :], {})[lead + line] = None
    return [line for name, lines in said.items() for line in _folded(list(lines), name)]


def _folded(lines: list[str], name: str) -> list[str]:
    if len(lines) <= MANY:
        return lines
    return [f"{lines[0].removesuffix(name)}; likewise {len(lines) - 1} other settings{name}"]


def _of_control(group: Group) -> Iterator[str]:
    if group.leaks is False:
        yield (
            f"the control is not above the null ({_decibel(group.gain)}): this says nothing about "
            "a defense [control-does-not-leak]"
        )
    accuracy = group.accuracy
    utilities = [(run.run or {}).get("utility") or {} for run in group.runs]
    chance = max((u.get("chance_accuracy") or 0.0 for u in utilities), default=0.0)
    if accuracy.low is not None and accuracy.low <= chance:
        yield (
            f"the control's accuracy, {100 * (accuracy.mean or 0):.1f} %, is not above that of "
            f"guessing, {100 * chance:.1f} %: what a defense costs cannot show [accuracy-at-chance]"
        )


def _of_defended(group: Group, control: Group | None, scenario: Scenario) -> Iterator[str]:
    from fedsec.report.numbers import claims

    name = scenario.label(group)
    if group.leaks is not None and group.gain.high is not None and group.gain.high < 0:
        yield (
            f"{group['attack']} under {name} is below the null ({_decibel(group.gain)}): guessing "
            "would have come closer; that this attack fails does not make others fail [below-null]"
        )
    if group.against is not None and group.leaks is not None and control is not None:
        more, low, high = group.against.interval
        if control.leaks is not None and low is not None and low > 0:
            yield (
                f"{name} leaks more than the control, by {more:.1f} dB [{low:.1f}, {high:.1f}] on "
                "the same images: either the defense gives more away, or the attack suits it "
                "better [leaks-more]"
            )
    made = [c for run in group.runs for c in claims(run)]
    for measured in (m for claim in made for m in claim.get("measured", ())):
        if measured["chance"] < CHANCE:
            yield (
                f"{group['attack']} under {name} named {measured['right']} of {measured['made']} "
                f"images among the candidates, more than the {100 * measured['bound']:.1f} % that "
                "are proven to be possible: the mechanism is broken [more-than-proven]"
            )
    seeds = {row.seed for row in group.rows}
    if any((run.run or {}).get("random_defense") for run in group.runs) and len(seeds) == 1:
        yield (
            f"{name} draws at random and was seen with one seed: an image's own number is one "
            "draw; more seeds average over draws [one-draw]"
        )


def _of_any(group: Group, name: str) -> Iterator[str]:
    def images(where: Callable[[Row], bool]) -> str:
        hit = {row.image for row in group.rows if where(row)}
        return f"{name}, {len(hit)} of {group.images} images" if hit else ""

    def matched(row: Row) -> bool:
        known = row.loss is not None and row.psnr is not None and row.null_psnr is not None
        return known and 0 <= row.loss <= NEAR and row.psnr < row.null_psnr  # type: ignore

    def not_finite(row: Row) -> bool:
        """As computed, or as read back."""
        bad = row.loss is not None and not math.isfinite(row.loss)
        return bad or any(NOT_FINITE.match(flag) for flag in row.flags)

    def lost(row: Row) -> bool:
        """Without an objective that is lost too: that is told of by itself."""
        return any(map(LOST.match, row.flags)) and not not_finite(row)

    if where := images(matched):
        yield (
            f"{where}: the attack's objective ended near zero (at most {NEAR:g}) below the null: "
            "it does not tell these images from others [matched-by-another]"
        )
    if where := images(not_finite):
        yield f"{where}: the attack's objective ended non-finite [loss-not-finite]"
    if where := images(lost):
        yield f"{where}: restarts became non-finite and were dropped [restarts-lost]"


def _decibel(found: Estimate) -> str:
    return f"{found.mean:.1f} dB [{found.low:.1f}, {found.high:.1f}]"

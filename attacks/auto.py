"""What the update gives away, by every attack that the threat model admits: the worst case."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fedsec import config, engine
from fedsec.attack import Attack
from fedsec.checks import positive
from fedsec.stages import Race, admitted, matching, whole
from fedsec.types import Reconstruction

EXACT = ("linear", "april", "rgap", "spear", "cocktail")  # cheap to dear
LONG = 2000  # steps up to which a longer run gains more than another start does


@dataclass(frozen=True, kw_only=True)
class Auto(Attack):
    """The suite, from cheap to dear, at one budget: no other parameter (cf. Croce and Hein 2020).

    After AutoAttack, whose worst case over diverse attacks, none of them tuned to the defense, made
    robustness claims comparable. The stages, each as far as the threat model admits it and the
    model suits it, with the values of its own YAML: labels; exact leaks (linear, april, rgap,
    spear, cocktail); candidates; learning to invert; and matching that knows the defense, of `LONG`
    steps, with as many restarts as the budget pays beyond that. Where a defense is known to mix
    images, only matching runs, and unmix where it may be exact or is told the weights: what the
    others find is no image that was private.

    A stage that may cost more than half of what is left is left out (rgap, spear, cocktail,
    candidates and lti). A reconstruction that explains the update exactly, or a candidate that is
    likelier than all others by odds of 20 to 1, is certified, and ends the search for its victim.
    Else that with the least objective is chosen (fedsec/stages.py): by what an attacker has. Every
    stage's result is returned beside it, so that the best of them by the truth, which no attacker
    could choose, can be reported as an upper bound.
    """

    budget: float  # backprop equivalents for each attacked update, > 0

    private = True  # of its stages those that are not have it undone
    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        positive(self, "budget")

    @property
    def evaluations(self):
        return max(1, int(self.budget / 3))

    def __call__(self, seen, rngs, progress):
        race, suite = Race(seen, rngs, progress, self.budget), _suite()
        mixes = "defense" in seen.grants and seen.defense.mixes
        exact = EXACT if whole(seen) else EXACT[:1]  # with noise a row can be read off, no more
        for name in () if mixes else (*exact, "candidates", "lti"):
            attack = suite[name]
            if admitted(attack, seen):
                race.run(name, attack, race.able(2 * attack.gflop_at_most(seen)))
        # without weights or exact encodings it matches, too, less well than what comes next
        solves = "mixing" in seen.grants or admitted(suite["spear"], seen)
        if mixes and solves and admitted(suite["unmix"], seen):  # twice: jointly with labels too
            for share, victims in race.left.items():
                steps = race.steps_of(victims, share / 4)
                race.run("unmix", replace(suite["unmix"], steps=steps), victims, share / 2)
        for share, victims in race.left.items():
            race.run("match", _matching(race, victims, share), victims, share)
        return race.result()


def _matching(race: Race, victims: list[int], share: float) -> Callable[..., Reconstruction]:
    """`attack=inverting`, with BatchNorm statistics as well, for `share` of the budget."""
    steps, targets = race.steps_of(victims, share), race.targets[victims]
    restarts = max(1, steps // LONG)

    def matched(seen, rngs, progress):
        search = replace(matching(seen, steps // restarts), restarts=restarts)
        return engine.match(seen, targets, search, rngs, progress)

    return matched


@cache
def _suite() -> dict[str, Any]:
    """The attacks with the values of their YAML."""
    return config.presets("attack", [config.OPTIONS])

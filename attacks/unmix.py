"""Solving mixing defenses for their sources."""

from dataclasses import dataclass, replace
from functools import partial

from attacks.spear import Spear
from defenses.instahide import InstaHide
from defenses.mixup import Mixup
from fedsec import engine, labels, priors, solve, unmix
from fedsec.attack import Attack
from fedsec.checks import at_least, positive
from fedsec.types import Reconstruction

EXACT = Spear(rule="annealed", starts=192, chunk=64)  # as in configs/attack/spear.yaml


@dataclass(frozen=True, kw_only=True)
class Unmix(Attack):
    """Encodings behind an update, then their sources (Carlini et al. 2021, IEEE S&P).

    Encodings come exactly from a first layer with ReLU (SPEAR), and tell their mixed labels; else
    they are matched with the granted labels, or jointly with labels. Weights are those that the
    threat model grants, or what mixed labels or independent edges tell (fedsec/unmix.py). Exact
    encodings are decoded with them. Where others' weights are granted, or told by labels, the
    sources are matched instead, mixed on their way into the model.

    Differs from the paper, where each image is in many of thousands of encodings, which similarity
    clusters: here there are as many encodings as images. Encodings are returned, with a flag that
    says why, where nothing tells the weights, or re-mixed sources do not explain them.
    """

    steps: int  # optimisation steps, where encodings are not exact, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    tv: float  # weight of the total variation of normalised encodings, >= 0
    smooth: float  # of that of sources, >= 0
    starts: int  # pixels from which the signs of InstaHide are solved, >= 1

    private = True
    needs = frozenset({"model", "update", "count", "shape", "defense"})

    def __post_init__(self):
        at_least(self, 1, "steps", "starts")
        at_least(self, 0, "tv", "smooth")
        positive(self, "lr")

    @property
    def evaluations(self):
        return self.steps

    def __call__(self, seen, rngs, progress):
        known = (*self.needs, "local", "data_range", "labels", "mixing")
        each = [self._one(seen.of([v], known), rng, progress) for v, rng in enumerate(rngs)]
        return solve.joined(each)

    def _one(self, seen, rng, progress) -> Reconstruction:
        """One victim's sources, or its encodings and why."""
        mixer = _mixer(seen.defense)
        hard, spent = labels.targets_of(seen, [rng])
        targets = seen.labels if "labels" in seen.grants else None
        found, told = unmix.exact(EXACT, seen, rng, targets)
        spent = spent + (found.gflop if found else 0.0)
        mixed = told if targets is None else targets[0]  # labels
        weights = unmix.weights(seen, mixed) if mixer else None
        if told is None and isinstance(mixer, Mixup) and weights is not None and mixed is not None:
            through = unmix.through(seen, weights)
            found = self._match(through, targets, self.smooth, rng, progress)
            believed = unmix.classes(weights, mixed)
            return replace(found, labels=believed, gflop=found.gflop + spent)
        if found is None or told is None:
            match = partial(self._match, seen, tv=self.tv, rng=rng, progress=progress)
            found = unmix.matched(match, targets, hard, seen.defense.mixes)
            spent = spent + found.gflop
        found = replace(found, labels=hard.argmax(-1), gflop=spent)
        if not seen.defense.mixes:
            return found
        magnitude = mixer.magnitude if isinstance(mixer, InstaHide) else None
        for stuck, why in (
            (mixer is None, "no mixing that it can solve"),
            (told is None, "too inexact to solve for their sources"),
            (unmix.several(seen), "local steps mix anew, or parts of the batch"),
            (magnitude and weights is None, "nothing tells InstaHide's weights"),
        ):
            if stuck:
                return found.saying(f"unmix: {why}; these are the encodings")
        if weights is not None and mixed is not None:
            found = replace(found, labels=unmix.classes(weights, mixed))
        else:
            weights = unmix.separated(found.images[0], rng)
        return unmix.decoded(found, weights, magnitude, self.starts)

    def _match(self, seen, targets, tv: float, rng, progress) -> Reconstruction:
        search = engine.spectral(steps=self.steps, lr=self.lr, priors=priors.smooth(seen, tv))
        return engine.match(seen, targets, search, [rng], progress)


def _mixer(defense):
    found = unmix.mixer(defense, Mixup, InstaHide)  # with public images: too few equations
    return None if isinstance(found, InstaHide) and found.inter else found

"""Solving mixing defenses for their sources."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attacks.spear import Spear
from defenses.instahide import InstaHide
from defenses.mixup import Mixup
from fedsec import cost, engine, labels, priors, unmix
from fedsec.attack import Attack
from fedsec.checks import Refused, at_least, positive
from fedsec.defense import Compose, Defense
from fedsec.threat import Observation
from fedsec.types import Reconstruction, Update

EXACT = Spear(rule="annealed", starts=192, chunk=64)  # as in configs/attack/spear.yaml
CERTAIN = 1e-4  # misfit of the re-computed update up to which encodings are exact
STUCK = 0.1  # misfit of a match with labels, above which recovered ones are tried
REST = 0.02  # of re-mixed sources from the encodings, up to which decoded ones do; of [0, 1]


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

    needs = frozenset({"model", "update", "count", "shape", "defense"})

    def __post_init__(self):
        at_least(self, 1, "steps", "starts")
        at_least(self, 0, "tv", "smooth")
        positive(self, "lr")

    @property
    def evaluations(self):
        return self.steps

    def __call__(self, seen, rngs, progress):
        each = [self._one(_alone(seen, v), rng, progress) for v, rng in enumerate(rngs)]
        fields = ("images", "labels", "loss", "steps", "gflop")
        joined: dict[str, Any] = {k: torch.cat([vars(one)[k] for one in each]) for k in fields}
        return Reconstruction(**joined, flags=tuple(f for one in each for f in one.flags))

    def _one(self, seen: Observation, rng: torch.Generator, progress) -> Reconstruction:
        """One victim's sources, or its encodings and why."""
        mixer = _mixer(seen.defense)
        hard, spent = labels.targets_of(seen, [rng])
        targets = seen.labels if "labels" in seen.grants else None
        found, told = _exact(seen, rng, targets)
        spent = spent + (found.gflop if found else torch.zeros(1).double())
        mixed = told if targets is None else targets[0]  # labels
        given = mixer is not None and {"mixing", "labels"} <= set(seen.grants)
        weights = seen.mixing[0] if given else None
        if mixer is not None and weights is None and mixed is not None:
            weights = unmix.told(mixed)
        matched = told is None
        if _several(seen):
            weights = None
        if matched and isinstance(mixer, Mixup) and weights is not None and mixed is not None:
            sources = self._match(_through(seen, weights), targets, self.smooth, rng, progress)
            believed = _labels(weights, mixed)
            return replace(sources, labels=believed, gflop=sources.gflop + spent)
        if found is None or told is None:
            found = self._encodings(seen, targets, hard, rng, progress)
            spent = spent + found.gflop
        found = replace(found, labels=hard.argmax(-1), gflop=spent)
        if mixer is None:
            why = "no mixing that it can solve; these are the encodings"
            return _said(found, why) if seen.defense.mixes else found
        if matched:
            return _said(found, "too inexact to solve for their sources; these are the encodings")
        if _several(seen):
            return _said(found, "local steps mix anew, or parts of the batch; these are encodings")
        if weights is None and isinstance(mixer, Mixup):
            weights = unmix.separated(found.images[0], rng)
        elif weights is not None and mixed is not None:
            found = replace(found, labels=_labels(weights, mixed))
        if weights is None:
            return _said(found, "nothing tells InstaHide's weights; these are the encodings")
        return self._decoded(found, mixer, weights)

    def _encodings(self, seen, targets, hard: Tensor, rng, progress) -> Reconstruction:
        """Matched with labels that are granted, else jointly with mixed ones where images mix."""
        start = targets if targets is not None or seen.defense.mixes else hard
        found = self._match(seen, start, self.tv, rng, progress)
        if start is not None or found.loss <= STUCK:
            return found
        other = self._match(seen, hard, self.tv, rng, progress)
        best = other if other.loss < found.loss else found
        return replace(best, gflop=found.gflop + other.gflop, steps=found.steps + other.steps)

    def _match(self, seen, targets: Tensor | None, tv: float, rng, progress) -> Reconstruction:
        search = engine.spectral(steps=self.steps, lr=self.lr, priors=priors.smooth(seen, tv))
        return engine.match(seen, targets, search, [rng], progress)

    def _decoded(self, found: Reconstruction, mixer: Defense, weights: Tensor) -> Reconstruction:
        """Sources of the encodings `found`, if re-mixed they are those again."""
        encodings, solved = found.images[0], []
        if isinstance(mixer, InstaHide):
            if len(encodings) > unmix.MOST:
                return _said(found, f"signs of more than {unmix.MOST} encodings are too many")
            sources, gflop = unmix.unsigned(mixer.magnitude(encodings), weights, self.starts)
        else:
            gflop = cost.flops(lambda: solved.append(unmix.sources(encodings, weights)))
            sources = solved[0]
        again = (weights.to(sources) @ sources.flatten(1)).view_as(sources)
        gap = again - encodings
        if isinstance(mixer, InstaHide):
            gap = mixer.magnitude(again) - mixer.magnitude(encodings)
        rest = gap.square().mean().sqrt()
        spent = found.gflop + gflop
        if not rest <= REST:
            why = "re-mixed sources are not the encodings, which are shown"
            return _said(replace(found, gflop=spent), why)
        found = replace(found, images=sources[None], loss=found.loss + rest, gflop=spent)
        if isinstance(mixer, InstaHide):
            return _said(found, "images and their negatives fit alike; the likelier are shown")
        return found


def _alone(seen: Observation, victim: int) -> Observation:
    """What is seen of one victim of the stack; only facts that are used here."""
    shared = ("model", "count", "shape", "local", "data_range", "defense")
    facts: dict[str, object] = {k: getattr(seen, k) for k in shared if k in seen.grants}
    for k in ("labels", "mixing"):
        if k in seen.grants:
            facts[k] = getattr(seen, k)[victim, None]
    tensors = {k: t[victim, None] for k, t in seen.update.tensors.items()}
    return Observation("one", facts | {"update": Update(tensors, {}, seen.update.count)})


def _through(seen: Observation, weights: Tensor) -> Observation:
    """The same of a model that mixes before it looks: its images are the sources."""
    facts: dict[str, object] = {k: getattr(seen, k) for k in seen.grants}
    tensors = {f"model.{k}": t for k, t in seen.update.tensors.items()}
    facts["update"] = replace(seen.update, tensors=tensors)
    return Observation("through", facts | {"model": unmix.Through(seen.model, weights)})


def _mixer(defense: Defense) -> Mixup | InstaHide | None:
    """The one part that mixes, if it is one that can be solved."""
    parts = defense.parts if isinstance(defense, Compose) else (defense,)
    mixing = [part for part in parts if part.mixes]
    first = mixing[0] if len(mixing) == 1 else None
    return first if isinstance(first, Mixup | InstaHide) else None


def _exact(
    seen: Observation, rng: torch.Generator, targets: Tensor | None
) -> tuple[Reconstruction | None, Tensor | None]:
    """Encodings as SPEAR has them, with their labels [b k] if re-computing the update says so.

    In the order of `targets`, where they are known.
    """
    try:
        EXACT.check(seen.model)
    except Refused:
        return None, None
    local = seen.step
    found, solved = EXACT(seen, [rng], lambda *_: None), []

    def tell() -> None:
        sent = {k: t[0] for k, t in seen.update.tensors.items()}
        told = unmix.mixed_labels(seen.model, found.images[0], sent, local)
        again = engine.simulate(seen.model, found.images[0], told, local)
        solved.extend((told, engine.cosine(again, sent).detach()))

    found = replace(found, gflop=found.gflop + cost.flops(tell))
    told, misfit = solved
    if found.flags[0] or not misfit <= CERTAIN:
        return found, None
    found = replace(found, loss=misfit[None])
    if targets is None:
        return found, told
    order = unmix.paired(told, targets[0])
    return replace(found, images=found.images[:, order]), told[order]


def _several(seen: Observation) -> bool:
    """Whether the update is of more than one mix of the whole batch."""
    local = seen.step
    part = local.kind == "fedavg" and 0 < local.batch < seen.count
    return part or local.steps > 1


def _labels(weights: Tensor, mixed: Tensor) -> Tensor:
    """Classes [1 b] of the sources, from mixed labels [b k]."""
    sources = torch.linalg.pinv(weights.double()) @ mixed.double()
    return sources.argmax(-1)[None]


def _said(found: Reconstruction, why: str) -> Reconstruction:
    return replace(found, flags=((*(found.flags[0] if found.flags else ()), f"unmix: {why}"),))

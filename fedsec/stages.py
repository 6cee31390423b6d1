"""Several attacks on the same victims, one after the other: what each made of them, at what cost.

Reconstructions of different attacks are compared as an attacker can: an update is computed anew
from each. One that explains the observed update exactly is certified, and its victim needs no more
attacks; among others the least objective of one and the same search wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fedsec import cost, engine, labels, priors
from fedsec.attack import Attack, Place, Progress, Told, undone
from fedsec.checks import Refused
from fedsec.defense import Defense, clips
from fedsec.likelihood import Misfit
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Reconstruction, Stage, Tensors

Attacking = Callable[..., Reconstruction]  # as an Attack is called
LR, BN = 0.5, 0.3  # of matching: as in attack=inverting; weight of BatchNorm statistics
TV, STEPS = 0.003, 300  # last weight of smoothness for so many steps; more find finer detail
EXACT = 1e-5  # squared error over the update's square, up to which it counts as explained
CHANCE = 48.0  # nats for each image that fitting noise may gain: 3 channels of 4 x 4 coarse pixels
PARTS = 64  # of a budget, in whole ones of which the rest is dealt out: victims stay together


def admitted(attack: Attack, seen: Observation) -> bool:
    """Whether the facts that `attack` needs are granted, and it works on the model."""
    if attack.tampers or not all(set(n.split("|")) & set(seen.grants) for n in attack.needs):
        return False
    try:
        attack.check(seen.model)
    except Refused:
        return False
    return True


def smooth(
    seen: Observation, steps: int = STEPS
) -> tuple[tuple[engine.Weight, engine.Prior | engine.Informed], ...]:
    """Terms of a match: double-opponent smoothness, more where pixels have few numbers, or steps.

    TV (STEPS / steps + unknown pixels / known entries of the update / 2) at last. The formula was
    near the best of three or four constant weights on lenet, at batch 1 and 8, whole and with a
    tenth of the entries, with 300 to 800 steps; TV and the fade were chosen likewise at 340 steps.
    """
    update = seen.sent
    mask = seen.defense.mask(update) if "defense" in seen.grants else None
    if mask is not None:
        known = torch.stack([kept.reshape(len(kept), -1).sum(1) for kept in mask.values()]).sum(0)
    else:
        first = next(iter(update.tensors.values()))
        known = first.new_full((len(first),), sum(t[0].numel() for t in update.tensors.values()))
    unknown = seen.count * math.prod(seen.shape)
    weight = TV * (min(1.0, STEPS / steps) + 0.5 * unknown / known.clamp_min(1))

    def weighed(images: Tensor, facts: Tensors) -> Tensor:
        return facts["weight"] * priors.double_opponents(images)

    noise = priors.smooth(seen, 0.0)[1:]
    fade = engine.Fade(priors.FADE, 1.0)
    return (fade, engine.Informed(weighed, {"weight": weight})), *noise


def matching(seen: Observation, steps: int) -> engine.Search:
    """`attack=inverting`, smooth as above, and with BatchNorm statistics where they are sent."""
    terms = smooth(seen, steps)
    # a step in eval mode leaves no trace of its batch in the buffers
    if "buffers" in seen.grants and "mode" in seen.grants and seen.mode == "train":
        same = priors.same_statistics(seen, "inferred")
        terms = (*terms, (BN, same)) if same else terms
    return engine.spectral(steps=steps, lr=LR, priors=terms)


def whole(seen: Observation) -> bool:
    """Whether, as far as is known, all the update's entries were sent, unrounded, without noise."""
    if "defense" not in seen.grants:
        return True
    update, defense = seen.sent, seen.defense
    return not defense.rounds and defense.mask(update) is None and not any(defense.noise(seen.step))


@dataclass
class Part(Progress):
    """Progress of one stage of several, in thousandths of all."""

    whole: Progress | Told
    first: float  # of the share, in [0, 1]
    share: float

    def __call__(self, step: int, steps: int, loss: float) -> None:
        done = self.first + self.share * step / max(1, steps)
        self.whole(int(1000 * min(done, 1.0)), 1000, loss)

    def place(self, problem: str, inputs: Iterable[Tensor]) -> Place:
        return self.whole.place(problem, inputs) if isinstance(self.whole, Progress) else Place()


class Race:
    """Stages run so far on the victims of a stack, and what is left of each victim's budget."""

    def __init__(
        self,
        seen: Observation,
        rngs: Sequence[torch.Generator],
        progress: Progress | Told,
        budget: float,  # backprop equivalents of an update
    ):
        self.seen, self.rngs, self.progress = seen, rngs, progress
        start = time.perf_counter()
        self.targets, told = labels.targets_of(seen, rngs)
        self.unit = cost.update_gflop(seen.model, seen.count, seen.shape)
        self.budget = budget * self.unit
        v = len(rngs)
        self.steps = torch.zeros(v, dtype=torch.long)
        self.spent = torch.zeros(v, dtype=torch.float64)
        self.private = {"labels"}  # stages that found no image that a defense had changed
        self.flags: list[list[tuple[str, ...]]] = []  # of each stage, of each victim
        self.blank: list[float] = []  # nats of the misfit of grey images, where noise is known
        everybody = list(range(v))
        grey = torch.full((v, seen.count, *seen.shape), 0.5)
        grey = grey.to(next(seen.model.parameters()))
        self.stages: list[Stage] = []
        named = self.targets.argmax(-1)
        self.curves: dict[tuple[int, int], Tensor] = {}  # of (victim, stage): [p, 2]
        self._add("labels", everybody, grey, named, [()] * v, self.spent + told, start)

    @property
    def open(self) -> list[int]:
        """Victims whose update is not explained yet, and whose budget is not spent."""
        explained = torch.stack([s.certified for s in self.stages]).any(0).tolist()
        rich = (self.spent < self.budget).tolist()
        return [v for v, known in enumerate(explained) if not known and rich[v]]

    def able(self, gflop: float) -> list[int]:
        """Open victims whose budget has so much left."""
        return [v for v in self.open if self.spent[v] + gflop <= self.budget]

    @property
    def left(self) -> dict[float, list[int]]:
        """Open victims by the share that is left of their budget, in whole `PARTS`."""
        found: dict[float, list[int]] = {}
        for v in self.open:
            share = int(PARTS * (1 - float(self.spent[v]) / self.budget)) / PARTS
            found.setdefault(share, []).append(v)
        return found

    def steps_of(self, victims: Sequence[int], share: float) -> int:
        """Of matching, with `share` of these victims' budget; the last look costs one."""
        seen, targets = self.seen.of(victims), self.targets[list(victims)]
        step = engine.step_gflop(seen, targets, matching(seen, 1))
        return max(1, int(share * self.budget / step) - 1)

    def run(
        self, name: str, attack: Attacking, victims: Sequence[int], share: float = 0.02
    ) -> None:
        """Have `attack` try these victims, with about `share` of the budget."""
        if not victims:
            return
        first = min(1.0, float(self.spent.mean()) / self.budget)
        seen, part = self.seen.of(victims), Part(self.progress, first, share)
        rngs = [stream(self.rngs[v].initial_seed(), name) for v in victims]
        start = time.perf_counter()
        found = attack(seen, rngs, part)
        self.steps[list(victims)] += found.steps
        for v, curve in zip(victims, found.curve.double(), strict=False):  # none: no search
            self.curves[v, len(self.stages)] = curve
        if isinstance(attack, Attack) and attack.private:
            self.private.add(name)
        flags = list(found.flags) or [()] * len(victims)
        # where images are mixed, a source causes another update than what the loss was told
        own = "defense" in seen.grants and seen.defense.mixes
        loss = found.loss if own else None
        self._add(name, victims, found.images, found.labels, flags, found.gflop, start, loss)

    def _add(
        self,
        name: str,
        victims: Sequence[int],
        images: Float[Tensor, "n b c h w"],
        named: Int[Tensor, "n b"],
        flags: list[tuple[str, ...]],
        gflop: Float[Tensor, " n"],
        start: float,
        loss: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Keep what a stage found of some victims, judged by `loss`, or else by what it causes."""
        rows, v = list(victims), len(self.rngs)
        targets = self._told(rows, named)
        seen = self.seen.of(rows)
        search = engine.spectral(steps=1, lr=1.0, priors=smooth(seen))
        gflop = gflop.double().cpu()
        if loss is None:
            loss = engine.judged(seen, targets, search, images)
            gflop = gflop + engine.step_gflop(seen, targets, search)
        gflop = gflop + self.unit * max(1, seen.step.steps)
        loss = loss.double().cpu()
        exact = torch.zeros(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            misfit, nats = self._misfit(seen, i, images[i], targets[i])
            # of one that is certain of a candidate nobody knows better
            exact[i] = (not nats and misfit <= EXACT) or (name == "candidates" and not flags[i])
            if nats and len(self.blank) < v:
                self.blank.append(misfit)
            elif nats and not exact[i] and self.blank[row] - misfit < CHANCE * seen.count:
                loss[i] = torch.inf  # noise alone would do as much

        def spread(values: Tensor, rest: float | int) -> Tensor:
            whole = torch.full((v, *values.shape[1:]), rest).to(values)
            whole[rows] = values
            return whole

        self.spent[rows] += gflop
        seconds = (time.perf_counter() - start) / len(rows)  # numbers were read: it is over
        each = torch.full((len(rows),), seconds, dtype=torch.float64)
        self.stages.append(
            Stage(
                name,
                spread(images, 0.5),
                spread(named, -1),
                spread(loss.nan_to_num(torch.inf, torch.inf), torch.inf),
                spread(exact, False),
                spread(gflop, 0.0),
                spread(each, 0.0),
            )
        )
        said: list[tuple[str, ...]] = [()] * v
        for i, row in enumerate(rows):
            said[row] = flags[i]
        self.flags.append(said)

    def _told(self, rows: list[int], named: Int[Tensor, "n b"]) -> Float[Tensor, "n b k"]:
        """What the loss is taken to have been told of a stage's images."""
        known = self.targets[rows]
        own = F.one_hot(named.clamp_min(0), known.shape[-1]).to(known)
        mixed = (known.amax(-1) < 1).any(1)
        return torch.where(((named >= 0).all(1) & ~mixed)[:, None, None], own, known)

    def _misfit(
        self, seen: Observation, victim: int, images: Tensor, targets: Tensor
    ) -> tuple[float, bool]:
        """How badly the update that these images cause explains the observed one; if in nats.

        Infinite where images were mixed: then others than these are private.
        """
        update = seen.sent
        defense = seen.defense if "defense" in seen.grants else None
        if (defense or Defense()).mixes:
            return math.inf, False
        local = seen.step
        misfit = Misfit({k: t[victim] for k, t in update.tensors.items()}, local, defense)
        clip = defense.per_example if defense is not None and clips(defense) else None
        again = engine.simulate(seen.model, images.to(targets), targets, local, clip)
        return float(misfit({k: t.detach()[None] for k, t in again.items()})), misfit.nats

    def result(self) -> Reconstruction:
        """Of each victim the certified reconstruction, or else the one with the least objective."""
        pick = chosen(self.stages)
        rows = range(len(self.rngs))
        # they were judged by what they cause, and shown as what they were made of
        self.stages = [s if s.name in self.private else undone(s, self.seen) for s in self.stages]
        images = torch.stack([self.stages[s].images[v] for v, s in zip(rows, pick, strict=True)])
        named = torch.stack([self.stages[s].labels[v] for v, s in zip(rows, pick, strict=True)])
        loss = torch.stack([self.stages[s].loss[v] for v, s in zip(rows, pick, strict=True)])
        flags = tuple(
            (*self.flags[s][v], *self._words(v, s)) for v, s in zip(rows, pick, strict=True)
        )
        stages, unknown = tuple(self.stages), torch.zeros(0, 2).double()
        curves = [self.curves.get((v, s), unknown) for v, s in zip(rows, pick, strict=True)]
        curve = pad_sequence(curves, batch_first=True, padding_value=torch.nan)
        return Reconstruction(images, named, loss, self.steps, self.spent, flags, stages, curve)

    def _words(self, victim: int, stage: int) -> Iterable[str]:
        if stage == 0 and any(float(s.gflop[victim]) > 0 for s in self.stages[1:]):
            yield "not found: nothing explains the update better than grey, by more than chance"
        elif stage == 0:
            yield "not found: the budget did not reach beyond labels"
        share = float(self.spent[victim]) / self.budget
        if share > 1.05:
            yield f"auto: spent {share:.1f} times its budget"


def chosen(stages: Sequence[Stage], upto: int | None = None) -> list[int]:
    """For each victim the stage, of the first `upto`, that an attacker believes."""
    some = stages[:upto]
    loss = torch.stack([s.loss for s in some])
    sure = torch.stack([s.certified for s in some])
    return torch.where(sure, loss - torch.finfo(loss.dtype).max, loss).argmin(0).tolist()

"""The privacy boundary: what an adversary could know, and the only code that copies it out.

`FACTS` is the whole table. A threat model grants some of its names; `observe` copies those, and
nothing else, out of exchanges that the harness holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsec.checks import Refused, require
from fedsec.defense import Defense
from fedsec.types import Batch, Exchange, Local, Update

Stack = Sequence[Exchange]  # exchanges that share one model


class Withheld(Exception):
    """The threat model does not grant the fact that was read."""


def _stacked(updates: Sequence[Update]) -> Update:
    """One update whose tensors have a leading axis: the victims."""
    first = updates[0]
    return Update(
        {k: torch.stack([u.tensors[k] for u in updates]).clone() for k in first.tensors},
        {k: torch.stack([u.buffers[k] for u in updates]).clone() for k in first.buffers},
        first.count,
    )


def _model(stack: Stack):
    return _frozen(stack[0].model)


def _frozen(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _queries(stack: Stack) -> list[tuple[nn.Module, Update]]:
    return [
        (_frozen(model), _without_buffers(_stacked([e.queries[i][1] for e in stack])))
        for i, (model, _) in enumerate(stack[0].queries)
    ]


def _aggregate(stack: Stack) -> Update:
    sums = [e.aggregate for e in stack]
    assert all(s is not None for s in sums), "the harness computes aggregates for every round"
    return _stacked([s for s in sums if s is not None])


def _published(defense: object) -> Defense:
    assert isinstance(defense, Defense), "the harness provides the defense when it is granted"
    return copy.deepcopy(defense.published)


def _pool(stack: Stack, name: str) -> list[Batch]:
    pools = [getattr(e, name) for e in stack]
    assert all(p is not None for p in pools), f"the harness provides {name} when it is granted"
    return pools


def _mixing(trained: Batch) -> Tensor:
    alone = torch.eye(len(trained)).to(trained.images)
    return alone if trained.mix is None else trained.mix.to(alone, copy=True)


def _norm_stats(stack: Stack) -> list[tuple[Tensor, Tensor]]:
    layers = range(len(stack[0].norm_stats))
    return [
        (
            torch.stack([e.norm_stats[i][0] for e in stack]),
            torch.stack([e.norm_stats[i][1] for e in stack]),
        )
        for i in layers
    ]


def _without_buffers(update: Update) -> Update:
    return Update(update.tensors, {}, update.count)


# Each fact: its name, and how to copy it out of a stack of exchanges. Tensors that differ between
# victims get a leading victim axis; what the victims share (model, count, shape, ...) does not.
FACTS: dict[str, Callable[[Stack], object]] = {
    # architecture and weights before the step, in the declared mode
    "model": _model,
    # gradient, or weights before - after, by parameter name: [v, *parameter]
    "update": lambda stack: _without_buffers(_stacked([e.update for e in stack])),
    # the same, but only the count-weighted mean over all clients of the round
    "aggregate": lambda stack: _without_buffers(_aggregate(stack)),
    # private images behind one update
    "count": lambda stack: len(stack[0].batch),
    # (channels, height, width) of an image
    "shape": lambda stack: tuple(stack[0].batch.images.shape[1:]),
    # what the loss was told: [v, count, classes], mixed where a defense mixes
    "labels": lambda stack: torch.stack([e.trained.targets for e in stack]).clone(),
    # (mean, biased variance) of the input of each BatchNorm on the private batch: [v, channels]
    "norm_stats": _norm_stats,
    # running statistics that the client sends, by name: [v, channels]
    "buffers": lambda stack: _stacked([e.update for e in stack]).buffers,
    # learning rate, steps, batch size of a local step
    "local": lambda stack: Local(**vars(stack[0].local)),
    # "train" or "eval": how BatchNorm behaved in the victim's step
    "mode": lambda stack: stack[0].mode,
    # the least and the greatest value of a pixel
    "data_range": lambda stack: (0.0, 1.0),
    # the defense and its public parameters (Kerckhoffs); never its random draws, nor images
    "defense": lambda stack: _published(stack[0].defense),
    # the same clients' earlier updates, oldest first
    "history": lambda stack: [
        _stacked([e.history[i] for e in stack]) for i in range(len(stack[0].history))
    ],
    # public images of the same kind: [n, c, h, w], with their labels
    "aux": lambda stack: copy.deepcopy(_pool(stack, "aux")[0]),
    # a pool that holds the private images: [v, n, c, h, w], in an order that says nothing
    "candidates": lambda stack: torch.stack(
        [pool.images for pool in _pool(stack, "candidates")]
    ).clone(),
    # further models that a malicious server sent, each with the updates on it, as `update`
    "queries": _queries,
    # how much of each private image is in each that the loss was told: [v, count, count]
    "mixing": lambda stack: torch.stack([_mixing(e.trained) for e in stack]),
}
# Facts that all victims of a stack share; all others have the victims as their leading axis.
SHARED = ("model", "count", "shape", "local", "mode", "data_range", "defense", "aux")
# What an adversary that replaces the model knows when it makes the one that it sends.
BEFOREHAND = ("count", "shape", "mode", "data_range", "local", "defense", "aux")


def _rows(fact: object, rows: list[int]) -> Any:
    """A fact of several victims -> of some of them."""
    match fact:
        case Tensor():
            return fact[rows]
        case Update():
            return Update(_rows(fact.tensors, rows), _rows(fact.buffers, rows), fact.count)
        case dict():
            return {k: _rows(value, rows) for k, value in fact.items()}
        case list() | tuple():
            return type(fact)(_rows(value, rows) for value in fact)
        case _:  # a further model, in `queries`
            return fact


class Observation:
    """What one adversary sees of a stack of victims: exactly the granted facts, as attributes.

    The attributes' shapes are those of `FACTS`. Reading a fact that is not granted raises Withheld.
    """

    def __init__(self, threat: str, facts: dict[str, object]):
        self.__dict__.update(_threat=threat, _facts=facts, _read=set())

    @property
    def grants(self) -> tuple[str, ...]:
        return tuple(sorted(self._facts))

    @property
    def unread(self) -> tuple[str, ...]:
        """Granted facts that nobody has looked at: an attack may assume less than it is given."""
        return tuple(name for name in self.grants if name not in self._read)

    @property
    def sent(self) -> Update:
        """The update of each victim; where only sums are granted, the clients' mean."""
        return self.update if "update" in self._facts else self.aggregate

    @property
    def step(self) -> Local:
        """`local` where it is granted, or else one gradient of the whole batch."""
        if "local" in self._facts:
            return self.local
        return Local(kind="gradient", lr=1.0, batch=self.count)

    def of(self, victims: Sequence[int], facts: Iterable[str] = tuple(FACTS)) -> Observation:
        """What is seen of these victims of the stack alone, as far as it is among `facts`."""
        rows = list(victims)
        kept = {k: f for k, f in self._facts.items() if k in facts}
        return self._with({k: f if k in SHARED else _rows(f, rows) for k, f in kept.items()})

    def having(self, **facts: object) -> Observation:
        """The same with these facts in place of its own."""
        return self._with(self._facts | facts)

    def _with(self, facts: dict[str, object]) -> Observation:
        """What is read there is read here."""
        other = Observation(self._threat, facts)
        other.__dict__["_read"] = self._read
        return other

    def __getattr__(self, name: str) -> Any:
        if name in self._facts:
            self._read.add(name)
            return self._facts[name]
        if name in FACTS:
            grants = ", ".join(self.grants)
            raise Withheld(f"threat={self._threat} withholds '{name}'; it grants {grants}")
        raise AttributeError(name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an observation is read-only: {name}")


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """A named list of granted facts."""

    grants: tuple[str, ...]  # names of FACTS
    name: str = "custom"  # how the report calls it
    tampers: bool = False  # may an attack replace the model that an attacked client gets?

    def __post_init__(self):
        require(len(self.grants) > 0, "grants", "must name at least one fact", self.grants)
        once = len(set(self.grants)) == len(self.grants)
        require(once, "grants", "must name each fact once", list(self.grants))
        for fact in self.grants:
            known = ", ".join(FACTS)
            require(fact in FACTS, "grants", f"must be among {known}", fact)

    @property
    def sums_only(self) -> bool:
        """Whether single updates are hidden in their sum (secure aggregation)."""
        return "update" not in self.grants and "aggregate" in self.grants

    def observe(self, stack: Stack) -> Observation:
        """Copy the granted facts out of exchanges that share one model and one batch size."""
        assert len({e.round for e in stack}) == 1
        assert len({len(e.batch) for e in stack}) == 1
        facts = {fact: FACTS[fact](stack) for fact in self.grants}
        model = facts.get("model")
        if "mode" not in facts and isinstance(model, nn.Module):
            model.train()  # its flag would tell; clients mostly train
        return Observation(self.name, facts)

    def foresee(self, blank: Exchange) -> Observation:
        """The granted facts that are known before an exchange: those of BEFOREHAND.

        `blank` is the exchange to come, with nothing private in it: no image, label or update.
        """
        assert len(blank.update.tensors) == 0
        assert not blank.batch.images.any()
        known = (fact for fact in BEFOREHAND if fact in self.grants)
        return Observation(self.name, {fact: FACTS[fact]([blank]) for fact in known})


def admit(
    attack: str,
    needs: frozenset[str],
    threat: ThreatModel,
    presets: dict[str, ThreatModel],
    tampers: bool = False,
):
    """Refuse an attack that needs what the threat model withholds, and name a way out."""
    missing = _missing(needs, threat)
    able = [
        name
        for name, preset in presets.items()
        if not _missing(needs, preset) and (preset.tampers or not tampers)
    ]
    if tampers and not threat.tampers:
        way = f"use threat={' or threat='.join(able)}" if able else "add threat.tampers=true"
        rule = f"attack={attack} replaces the model that the client gets; {way}"
        raise Refused("threat", rule, f"{threat.name}, which does not tamper")
    if not missing:
        return
    way = f"use threat={' or threat='.join(able)}" if able else f"add threat.grants={missing}"
    what = ", ".join(f"'{m}'" for m in missing)
    raise Refused(
        "threat",
        f"attack={attack} needs {what.replace('|', ' or ')}; {way}",
        f"{threat.name}, which grants {', '.join(sorted(threat.grants))}",
    )


def _missing(needs: frozenset[str], threat: ThreatModel) -> list[str]:
    return sorted(n for n in needs if not any(fact in threat.grants for fact in n.split("|")))

"""What an attack is: hyperparameters, the facts it needs, and a call on what an adversary sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fedsec.threat import Observation, ThreatModel
from fedsec.types import Exchange, Reconstruction, Stage, Tensors

Told = Callable[[int, int, float], None]  # steps done, steps in all, current mean objective


class Place:
    """Where one search of an attack keeps how far it is; here: nowhere."""

    saved: Tensors | None = None  # what an earlier process kept of the same search, on the CPU

    def save(self, state: Tensors, over: bool = False) -> None:
        """Offer the state after a look at the lanes; `over`: it is the search's last one."""


class Progress:
    """What an attack passes on to its searches: they tell it how far they are, and keep it there.

    This one says and keeps nothing. A plain function of `Told`'s arguments serves as well, where
    nothing is to be kept.
    """

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """`step` of `steps` are done, with this mean objective."""

    def place(self, problem: str, inputs: Iterable[Tensor]) -> Place:
        """The place of the attack's next search; `problem` and `inputs` tell searches apart."""
        return Place()


class Attack:
    """A frozen keyword-only dataclass; its fields are its hyperparameters and its YAML keys.

    It holds no model, no device and no ground truth.
    """

    needs: ClassVar[frozenset[str]]  # facts; "update|aggregate" means either
    private = False  # finds private images, not those that a defense made of them for the loss
    labels = "auto"  # how withheld ones are recovered; some attacks have a field of this name

    @property
    def evaluations(self) -> int:
        """Gradient evaluations for one victim, for the plan; 0 for an analytic attack."""
        return 0

    @property
    def lanes(self) -> int:
        """Of one victim, worked on at the same time: its restarts."""
        return 1

    def gflop_at_most(self, seen: Observation) -> float:
        """GFLOP that one victim may take, where that may be much and is not said otherwise."""
        return 0.0

    def __call__(
        self, seen: Observation, rngs: Sequence[torch.Generator], progress: Progress | Told
    ) -> Reconstruction:
        """Reconstruct every victim of the stack. `rngs` has one stream for each victim."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Refuse a model on which the attack cannot work."""

    @property
    def tampers(self) -> bool:
        """Whether it replaces the model: that takes a malicious server."""
        return type(self).craft is not Attack.craft

    def craft(
        self, model: nn.Module, known: Observation, rng: torch.Generator
    ) -> tuple[nn.Module, ...]:
        """What a malicious server sends to an attacked client instead of `model`.

        `model` is the attack's own to change; its architecture may change too. `known` is what the
        server knows before the client computes anything (threat.BEFOREHAND). The client answers
        each of the models that are returned: to the first by the observation's `update`, to the
        others by its `queries`.
        """
        return (model,)


Found = TypeVar("Found", Reconstruction, Stage)


def undone(found: Found, seen: Observation) -> Found:
    """With what a known defense did to the images, before the loss saw them, taken back."""
    if "defense" not in seen.grants or not seen.defense.undoes:
        return found
    return replace(found, images=torch.stack([seen.defense.undone(each) for each in found.images]))


def crafted(
    attack: Attack, threat: ThreatModel, blank: Exchange, rng: torch.Generator
) -> tuple[tuple[nn.Module, ...], Observation]:
    """The models that an attack under `threat` sends, and what it knew when it made them.

    `blank` is an exchange as it will be, but for everything private: see `ThreatModel.foresee`.
    """
    known = threat.foresee(blank)
    models = attack.craft(deepcopy(blank.model), known, rng)
    return tuple(m.train(blank.mode == "train") for m in models), known

"""What an attack is: hyperparameters, the facts it needs, and a call on what an adversary sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from fedsec.threat import Observation
from fedsec.types import Reconstruction

Progress = Callable[[int, int, float], None]  # steps done, steps in all, current mean objective


class Attack:
    """A frozen keyword-only dataclass; its fields are its hyperparameters and its YAML keys.

    It holds no model, no device and no ground truth.
    """

    needs: ClassVar[frozenset[str]]  # facts; "update|aggregate" means either

    @property
    def evaluations(self) -> int:
        """Gradient evaluations for one victim, for the plan; 0 for an analytic attack."""
        return 0

    def __call__(
        self, seen: Observation, rngs: Sequence[torch.Generator], progress: Progress
    ) -> Reconstruction:
        """Reconstruct every victim of the stack. `rngs` has one stream for each victim."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Refuse a model on which the attack cannot work."""

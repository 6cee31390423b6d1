"""User-level privacy: each client's whole update is clipped, and noise hides that it was there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from defenses.dpsgd import known_noise, noise_or_epsilon, normal_like
from fedsec.checks import require
from fedsec.defense import RELEASED, SENT, Defense, Privacy, Training, bare
from fedsec.types import Local, Tensors, Update

PLACES = ("central", "local")


@dataclass(frozen=True, kw_only=True)
class UserDP(Defense):
    """DP-FedAvg with fixed clipping: McMahan et al., "Learning differentially private recurrent
    language models", ICLR 2018.

    A client's update, all its tensors together and 0-dimensional ones included, is scaled to an L2
    norm of at most `clip`; an update of zeros stays, and one that is not finite becomes zeros.
    place=central: the server adds N(0, (noise_multiplier clip)^2) to the clients' sum, divides by
    their number and steps along that. The server itself is trusted: it sees clipped updates without
    noise, and so does an attack on one. place=local: each client adds that noise to its own update
    before it sends it. Every client counts the same, however much data it has. All clients take
    part in every round here, so that no sampling amplifies the guarantee, and where the paper
    samples clients with a fixed rate epsilon would be smaller.

    Guarantee: (epsilon, delta) for a whole client over all rounds: exact, as rounds of a Gaussian
    mechanism without sampling are one such mechanism. Central: a client's update is there or zero,
    with the number of clients known, against who sees the released models. Local: a client's data
    is any or any other (twice the clipping norm apart), against who sees every update. A model that
    is attacked after the last round counts as one more. The caveats of `DPSGD` on the generator
    and on floating point hold here too. Flower's own parts are not used: their clipping and noise
    pass over 0-dimensional tensors (seen in 1.41 and 1.42), counters of BatchNorm count in their
    norm, and an update of zeros is an error.

    Adaptive attack: clipping keeps the direction; the local noise is Gaussian of known deviation.
    Known break: none of the guarantee. The central form protects nothing from the server.
    """

    clip: float  # > 0, L2 norm of one client's update
    # >= 0, deviation of the noise in units of clip; null: 1.0, or what `epsilon` takes
    noise_multiplier: float | None
    delta: float  # in (0, 1), below 1 / clients
    place: str  # central: the server adds the noise; local: each client does
    epsilon: float | None = None  # > 0, of the whole run, for which to find the noise; null: none

    sums = True
    turns = False

    def __post_init__(self):
        require(0 < self.clip < math.inf, "clip", "must be above 0 and finite", self.clip)
        noise_or_epsilon(self)
        require(0 < self.delta < 1, "delta", "must be in (0, 1)", self.delta)
        require(self.place in PLACES, "place", f"must be {' or '.join(PLACES)}", self.place)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.place == "local"

    @property
    def bounds(self) -> bool:  # type: ignore[override]
        return self.place == "central"

    @property
    def deviation(self) -> float:
        """Of the noise on one entry of the clients' sum (central) or of one update (local)."""
        return self.sigma * self.clip

    @property
    def sigma(self) -> float:
        """The noise multiplier, which `epsilon` must not still leave open: see `fitted`."""
        return known_noise(self)

    @property
    def apart(self) -> int:
        """How far apart, in multiples of `clip`, what is hidden may move what is noised."""
        return 1 if self.place == "central" else 2

    def fitted(self, training: Sequence[Training]) -> UserDP:
        """With the least noise that keeps `epsilon`, by the claim's own, exact, accounting."""
        from fedsec.privacy import gaussian_noise

        if self.epsilon is None:
            return self
        noise = gaussian_noise(self.epsilon, self.delta, max(t.updates for t in training))
        return replace(self, epsilon=None, noise_multiplier=self.apart * noise)

    def update(self, update: Update, rng: torch.Generator) -> Update:
        sent = self.expected(update.tensors)
        sent = _noisy(sent, self.deviation, rng) if self.place == "local" else sent
        return replace(update, tensors=sent, count=1)

    def release(self, mean: Update, clients: int, rng: torch.Generator) -> Update:
        if self.place == "local":
            return mean
        return replace(mean, tensors=_noisy(mean.tensors, self.deviation / clients, rng))

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        """The same direction, of a norm of at most `clip`."""
        norm = torch.stack([t.double().norm() for t in tensors.values()]).norm()
        scale = (self.clip / norm).clamp(max=1.0)  # an update of zeros: 1
        return {
            k: torch.where(norm.isfinite(), t * scale.to(t), torch.zeros_like(t))
            for k, t in tensors.items()
        }

    def noise(self, local: Local) -> tuple[float, float]:
        return (self.deviation if self.place == "local" else 0.0), 0.0

    def privacy(self, training: Training) -> Privacy:
        """Epsilon of one client, exact; PRV's and RDP's beside it."""
        from fedsec.privacy import Mechanism, gaussian_epsilon, gdp_mu, others

        central = self.place == "central"
        zero = "one client's update replaced by zero, the number of clients known"
        claim = Privacy(
            None,
            self.delta,
            None,
            unit="client",
            neighbours=zero if central else "all data of one client replaced by any other",
            against=RELEASED if central else SENT,
        )
        why = ""
        if self.sigma == 0:
            why = "no noise: noise_multiplier is 0"
        elif self.delta * training.clients >= 1:
            why = f"delta {self.delta:g} is not below 1/{training.clients}, one over the clients"
        if why:
            return replace(claim, reason=why)
        run = Mechanism(self.sigma / self.apart, 1.0, training.updates)
        epsilon = gaussian_epsilon(gdp_mu(*run), self.delta)
        if not math.isfinite(epsilon):
            why = f"noise_multiplier {self.sigma:g} is too small for a finite epsilon"
            return replace(claim, reason=why)
        found = {"epsilon": epsilon, "accountant": "Gaussian", "mechanism": run}
        return replace(claim, others=others(run, self.delta), **found)

    def check(self, model: nn.Module) -> None:
        bare(self, model)


def _noisy(tensors: Tensors, deviation: float, rng: torch.Generator) -> Tensors:
    """Gaussian noise on every entry, a draw for each tensor in their order."""
    return {k: t + deviation * normal_like(t, rng) for k, t in tensors.items()}

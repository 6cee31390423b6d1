"""A lower bound of epsilon, measured on the very code that claims an upper one.

Canaries are planted in a client's data, each there or not by a fair coin, and the client trains as
in any run: its own sampler, its own steps, the defense's own hooks. Who sees all updates guesses
the coins; too many right guesses contradict the claim (Steinke, Nasr and Jagielski 2023, "Privacy
auditing with one (1) training run").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedsec.checks import Refused, require
from fedsec.client import FedAvg, Gradient
from fedsec.defense import Defense, Privacy
from fedsec.federation import Federation, Job, Site
from fedsec.models import BatchNorm2d
from fedsec.rng import stream
from fedsec.types import Batch, Update

LENGTH = 1e6  # L2 norm of a canary's gradient, in whatever tensor it is: far above any clip in use
MOST = {"vector": 2000, "scalars": 128, "statistics": 128}  # canaries in each place: seconds
# How many of the canaries are guessed to be in and how many to be out, the surest ones; the rest
# is abstained from. Fixed beforehand: each is a test of its own.
GUESSED = ((1 / 2, 1 / 2), (1 / 8, 1 / 8), (1 / 32, 1 / 32), (1 / 8, 0.0), (1 / 32, 0.0))


def p_value(right: int, made: int, canaries: int, epsilon: float, delta: float) -> float:
    """The chance of at least `right` right guesses of `made` under (epsilon, delta), or more.

    Steinke, Nasr and Jagielski 2023, theorem 5.2. Under pure DP each guess is right with chance at
    most exp(epsilon) / (1 + exp(epsilon)) whatever came before it, so that their number is at most
    W, a binomial. Each of the `canaries`, guessed or not, adds chance 2 delta of being given away:
    i of them at a time lift a count of at least right - i over the threshold, whence
    P[W >= right] + 2 canaries delta max_i P[right > W >= right - i] / i.
    """
    import numpy as np
    from scipy.stats import binom

    rate = 1 / (1 + math.exp(-epsilon))
    chance = float(binom.sf(right - 1, made, rate))
    if delta > 0 and right > 0:
        below = np.arange(1, right + 1)
        missed = binom.pmf(right - below, made, rate).cumsum()
        chance += 2 * canaries * delta * float((missed / below).max())
    return min(1.0, chance)


def lower_bound(
    right: int, made: int, canaries: int, delta: float, confidence: float = 0.95
) -> float:
    """The greatest epsilon that so many right guesses contradict, at this confidence; at least 0.

    `canaries` were in or out by a fair coin each, and `made` guesses were chosen without knowledge
    of the coins. Where the p-value is not monotone in epsilon it ends at the first one not
    contradicted, on a grid of 0.05: all below are.
    """
    require(0 <= right <= made, "right", f"must be within 0 and the {made} guesses made", right)
    require(made <= canaries, "made", f"must be at most the {canaries} canaries", made)
    require(0 <= delta < 1, "delta", "must be in [0, 1)", delta)
    require(0 < confidence < 1, "confidence", "must be in (0, 1)", confidence)

    def refuted(epsilon: float) -> bool:
        return p_value(right, made, canaries, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 0.05
    while refuted(high):
        low, high = high, high + 0.05
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Look:
    """The guesses on the canaries of one place, and what they contradict."""

    place: str  # of the canaries' gradients: a key of PLACES
    canaries: int
    made: int  # guesses; the other canaries are abstained from
    right: int
    epsilon: float  # at least this, at the audit's confidence and the claim's delta


@dataclass(frozen=True)
class Audit:
    """A claim, and what contradicts it or does not."""

    claim: Privacy
    confidence: float  # of all looks together
    looks: tuple[Look, ...]  # the best of each place
    refused: tuple[tuple[str, str], ...]  # places that the defense refuses to train, and its words
    most: float  # epsilon that it could have shown, with every guess right

    @property
    def epsilon(self) -> float:
        """At least this, at `confidence`."""
        return max(look.epsilon for look in self.looks)

    @property
    def contradicts(self) -> bool:
        assert self.claim.epsilon is not None
        return self.epsilon > self.claim.epsilon


class Planted(nn.Module):
    """A model whose gradient on canary i is -`LENGTH` times the i-th unit vector, at any weights.

    The canary is the one-hot image i; the loss is the cross entropy of two equal logits, and
    weights enter as w - detach(w): zero, with the slope of w. A blank image has no gradient, as if
    it were not there.
    """

    def __init__(self, canaries: int):
        super().__init__()
        self.canaries = canaries

    def weights(self) -> Float[Tensor, " m"]:
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "n m 1 2"]) -> Float[Tensor, "n 2"]:
        weights = self.weights()
        logit = 2 * LENGTH * (images.mean((2, 3)) @ (weights - weights.detach()))
        return torch.stack([logit, torch.zeros_like(logit)], 1)

    def seen(self, update: Update) -> Float[Tensor, " m"]:
        """Of each canary what an update shows: large where it was in."""
        raise NotImplementedError


class Vector(Planted):
    """One tensor with an entry for each canary."""

    def __init__(self, canaries: int):
        super().__init__(canaries)
        self.entries = nn.Parameter(torch.zeros(canaries))

    def weights(self):
        return self.entries

    def seen(self, update):
        return -update.tensors["entries"]


class Scalars(Planted):
    """A 0-dimensional tensor for each canary: what Flower's own clipping and noise pass over."""

    def __init__(self, canaries: int):
        super().__init__(canaries)
        self.entries = nn.ParameterList(torch.zeros(()) for _ in range(canaries))

    def weights(self):
        return torch.stack(list(self.entries))

    def seen(self, update):
        return -torch.stack([update.tensors[f"entries.{i}"] for i in range(self.canaries)])


class Statistics(Vector):
    """BatchNorm with a channel for each canary: its running mean travels with the update."""

    def __init__(self, canaries: int):
        super().__init__(canaries)
        self.norm = BatchNorm2d(canaries, affine=False)

    def forward(self, images):
        self.norm(images)
        return super().forward(images)

    def seen(self, update):
        return update.buffers["norm.running_mean"]


PLACES: dict[str, type[Planted]] = {
    "vector": Vector,
    "scalars": Scalars,
    "statistics": Statistics,
}


@dataclass(frozen=True)
class _Coins:
    """A client's data: canaries that are there or not, and blanks. What a Job asks of a data set.

    Image i < len(coins) is canary i, one-hot, or a blank where its coin says that it is not there:
    a blank has no gradient, and the client's number of examples, which is public, does not tell.
    """

    coins: Bool[Tensor, " m"]
    examples: int

    classes = 2
    mean, std = (), ()

    @property
    def train(self):
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.coins), 1, 2

    @property
    def labels(self) -> Tensor:
        return torch.zeros(self.examples, dtype=torch.long)

    def batch(self, indices: Tensor, classes: int) -> Batch:
        images = torch.zeros(len(indices), *self.shape)
        (rows,) = torch.nonzero(indices < len(self.coins), as_tuple=True)
        images[rows, indices[rows]] = self.coins[indices[rows]].float()[:, None, None]
        targets = torch.tensor([1.0, 0.0]).expand(len(indices), classes)
        return Batch(images, targets, tuple(indices.tolist()))


@dataclass(frozen=True)
class _Build:
    """What a Job asks of a model's specification."""

    place: str

    def build(self, shape, classes, mean, std, rng) -> nn.Module:
        return PLACES[self.place](shape[0]).train()


def observe(
    place: str, defense: Defense, client: Gradient | FedAvg, rounds: int, examples: int, seed: int
) -> tuple[Bool[Tensor, " m"], Float[Tensor, " m"]]:
    """Train one client with canaries in `place`: its coins, and the sum of what its updates show.

    The server sends the same model each round, as a malicious one may. What the client does with it
    is `fedsec.federation.Site`, as in every run. Refuses what the defense refuses.
    """
    coins = torch.rand(min(examples, MOST[place]), generator=stream(seed, "coins", place)) < 0.5
    iid = Federation(engine="inline", strategy="fedavg", split="iid", alpha=1.0, shards=1)
    data = _Coins(coins, examples)
    job = Job(data, _Build(place), client, iid, defense, clients=1, rounds=rounds, seed=seed)
    site = Site(job, data)
    defense.check(site.model)
    assert isinstance(site.model, Planted)
    total = torch.zeros(len(coins), dtype=torch.float64)
    for round in range(rounds):
        total += site.model.seen(site.update(site.model, 0, round, None))
    return coins, total


def looked(
    place: str,
    coins: Bool[Tensor, " m"],
    shown: Float[Tensor, " m"],
    delta: float,
    confidence: float,
) -> Look:
    """The look, of one for each row of `GUESSED`, that contradicts most: at this confidence each.

    Guessed to be in are those that the updates show most, to be out those that they show least.
    """
    order, looks = shown.argsort(descending=True, stable=True), []
    for inside, outside in GUESSED:
        ins, outs = (math.ceil(share * len(coins) - 0.5) for share in (inside, outside))
        outs = min(outs, len(coins) - ins)
        right = int(coins[order[:ins]].sum()) + int((~coins[order[len(coins) - outs :]]).sum())
        bound = lower_bound(right, ins + outs, len(coins), delta, confidence)
        looks.append(Look(place, len(coins), ins + outs, right, bound))
    return max(looks, key=lambda look: look.epsilon)


def audit(
    defense: Defense,
    client: Gradient | FedAvg,
    claim: Privacy,
    rounds: int,
    examples: int,
    *,
    seed: int = 0,
    repeats: int = 1,
    confidence: float = 0.95,
    places: Sequence[str] = tuple(PLACES),
    progress: Callable[[str, int, int], None] = lambda place, done, of: None,
) -> Audit:
    """Audit a claim about a client with `examples` examples after `rounds` rounds of training.

    Canaries stand in a vector, in 0-dimensional tensors, and in running statistics; all looks
    share the error of 1 - `confidence`. `repeats` runs on fresh canaries are one audit with that
    many times as many: an example is in one of them only, so that each has the claimed epsilon.
    A lower bound of 0 says nothing, and no audit shows more than all guesses right would (see
    `Audit.most`).

    Refuses a claim without epsilon or about whole clients, and a defense that refuses every place.
    """
    for key, least, got in (("rounds", 1, rounds), ("examples", 1, examples),
                            ("repeats", 1, repeats)):  # fmt: skip
        require(got >= least, key, f"must be at least {least}", got)
    require(0 < confidence < 1, "confidence", "must be in (0, 1)", confidence)
    reason = f"claims no epsilon that could be audited ({claim.reason})"
    require(claim.epsilon is not None, "defense", reason, type(defense).__name__.lower())
    reason = "claims epsilon for a whole client; canaries here are examples of one client"
    require(claim.unit == "example", "defense", reason, type(defense).__name__.lower())
    each = 1 - (1 - confidence) / (len(places) * len(GUESSED))
    looks, refused = [], []
    for place in places:
        runs = []
        try:
            for repeat in range(repeats):
                own = stream(seed, "audit", repeat).initial_seed()
                runs.append(observe(place, defense, client, rounds, examples, own))
                progress(place, repeat + 1, repeats)
        except Refused as refusal:
            refused.append((place, str(refusal)))
            continue
        coins, shown = (torch.cat(parts) for parts in zip(*runs, strict=True))
        looks.append(looked(place, coins, shown, claim.delta or 0.0, each))
    if not looks:
        raise Refused("defense", "refuses every model of the audit", refused[0][1])
    canaries = max(look.canaries for look in looks)
    most = lower_bound(canaries, canaries, canaries, claim.delta or 0.0, each)
    return Audit(claim, confidence, tuple(looks), tuple(refused), most)

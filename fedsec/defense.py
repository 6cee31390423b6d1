"""What a defense is: hooks, each the identity unless overridden, and what it guarantees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsec.checks import Refused, require
from fedsec.privacy import Mechanism
from fedsec.rng import stream
from fedsec.types import Batch, Local, Party, Tensors, Update

SENT, RELEASED = "who sees every update", "who sees released models, not the server"


@dataclass(frozen=True)
class Training:
    """The facts of a training run that a privacy guarantee depends on, for one client."""

    steps: int  # gradient steps that touched the client's data
    examples: int  # the client's data set
    batch: int  # expected batch size
    per_update: int = 1  # gradient steps behind one update
    clients: int = 1  # of the federation

    @property
    def updates(self) -> int:
        return self.steps // self.per_update


@dataclass(frozen=True)
class Privacy:
    """A formal guarantee, or the reason why there is none."""

    epsilon: float | None  # at `delta`, by `accountant`
    delta: float | None
    accountant: str | None  # with its conversion, e.g. "PRV"
    others: tuple[tuple[str, float], ...] = ()  # the same run by other accountants
    reason: str = ""  # why epsilon is None
    mechanism: Mechanism | None = None  # what the guarantee is about, where it is a known one
    unit: str = "example"  # what it hides: one example of a client, or all of one client
    neighbours: str = "one example added or removed"
    against: str = SENT  # who learns no more than epsilon allows


class Defense:
    """Identity hooks. A defense is a frozen keyword-only dataclass that overrides some of them."""

    poisson = False  # training batches are drawn by Poisson sampling
    mixes = False  # images of the sent batch are no longer single private images
    random = False  # the same batch twice gives different updates
    rounds = False  # entries of an update are sent as one of few values
    turns = True  # what is sent of an update may point elsewhere
    matched = True  # a match gains by comparing what `expected` makes of its guess
    bounds = False  # its guarantee holds only if no later part changes the update
    sums = False  # clients send changes, also under client=fedavg; the server has their sum alone
    rereads = False  # `perturb` looks at the private batch again
    undoes = False  # `undone` is not the identity
    layers = False  # `mask` names whole layers, which noise does not bring back

    def architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """The network that server, clients and attack use instead; `model` may be changed.

        Layers that draw are `fedsec.models.Random`; new weights are drawn from `rng`.
        """
        return model

    def supplied(self, public: Batch) -> Defense:
        """The defense with public images at hand, if it needs any."""
        return self

    def fitted(self, training: Sequence[Training]) -> Defense:
        """The defense with what it leaves to the run solved, for the `training` of each client.

        Refuses, under the defense's own key, what cannot be reached.
        """
        return self

    @property
    def published(self) -> Defense:
        """What the fact `defense` tells: its parameters, and not what it was supplied with."""
        return self

    def batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        """What the loss is computed on, instead of the private batch."""
        return batch

    def gradients(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, expected: int
    ) -> Tensors:
        """One gradient step's gradient, by parameter name.

        `expected` is the batch size that the sampling aims at; `len(batch)` may differ from it,
        and may be zero, only under Poisson sampling.
        """
        from fedsec.client import mean_gradient

        return mean_gradient(model, batch)

    def perturb(
        self, model: nn.Module, batch: Batch, gradient: Tensors, step: int, rng: torch.Generator
    ) -> Tensors:
        """What the local step of this number, from 0, takes instead of its gradient on `batch`."""
        return gradient

    def update(self, update: Update, rng: torch.Generator) -> Update:
        """What is sent instead of `update`."""
        return update

    def seal(self, update: Update, party: Party) -> Update:
        """What travels instead of `update` in a sum over clients: of those with `sums`."""
        return update

    def mean(self, updates: Sequence[Update]) -> Update:
        """What the server makes of what one sum's clients sent: of those with `sums`."""
        from fedsec.client import mean_update

        return mean_update(updates)

    def release(self, mean: Update, clients: int, rng: torch.Generator) -> Update:
        """What the server steps along instead of the clients' mean: of those with `sums`."""
        return mean

    def opened(self, update: Update, party: Party) -> Update:
        """What was sealed: for the harness, which knows every draw, and never for an adversary."""
        return update

    def bytes(self, update: Update) -> int:
        """The size of a sent update in its natural encoding: here every entry, as it is stored.

        It has to hold for any update: one that an encoding does not suit takes the dense size.
        """
        return sum(t.nbytes for t in (*update.tensors.values(), *update.buffers.values()))

    def privacy(self, training: Training) -> Privacy | None:
        """The guarantee for `training`; None if the defense claims none."""
        return None

    def claims(self, training: Training) -> tuple[Privacy, ...]:
        """Every guarantee, each with what it hides; `privacy` is the first that has an epsilon."""
        claim = self.privacy(training)
        return () if claim is None else (claim,)

    # What a knowing adversary computes with: public, and without the defense's draws.

    def per_example(self, gradients: Tensors) -> Tensors:
        """Examples' gradients [n, *parameter] as a step sums them."""
        return gradients

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        """What becomes of an update, but for noise. Works under torch.func.

        `sent`: what became of the update that is looked for, if no noise covers it. Of several
        outcomes this is the one nearest to it: here zero where `mask` says that it was dropped.
        """
        mask = None if sent is None else self.mask(Update(sent, {}, 1))
        if mask is None:
            return tensors
        return {k: torch.where(mask[k], t, 0) for k, t in tensors.items()}

    def mask(self, update: Update) -> Tensors | None:
        """Which entries of a sent update are worth comparing; None: all."""
        return None

    def undone(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The private images behind those that the loss saw, as far as they can be told."""
        return images

    def hidden(self, model: nn.Module, sent: Tensors, inputs: Tensor) -> Tensors:
        """What random layers drew for `inputs`, as far as `sent` tells: starts of a search for it.

        By name of the buffer that holds it in `model`, as logits of shares in [0, 1]. `sent` is one
        update, of which nothing but the length was changed.
        """
        return {}

    def noise(self, local: Local) -> tuple[float, float]:
        """Deviations of the Gaussian and of the Laplace noise on an entry of an update.

        0.0 where there is none, and where what it has become is not known.
        """
        return 0.0, 0.0

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the defense cannot protect."""

    def check_clients(self, clients: int) -> None:
        """Refuse a number of clients with which the defense does nothing."""

    def covers(self, training: Training) -> None:
        """Refuse a training run, under the defense's own key, whose guarantee would be empty."""


def weakest(
    defense: Defense, training: Sequence[Training]
) -> tuple[Privacy | None, Training | None]:
    """The guarantee of the client that is worst off, and its training; Nones where none is claimed.

    No epsilon at all is worse than any.
    """
    claims = [(claim, t) for t in training if (claim := defense.privacy(t)) is not None]
    if not claims:
        return None, None
    return max(claims, key=lambda c: _spent(c[0]))


def guarantees(defense: Defense, training: Sequence[Training]) -> tuple[Privacy, ...]:
    """Of each claim, in the order of `Defense.claims`, that of the client that is worst off."""
    each = [[c for t in training for c in part.claims(t)] for part in parts(defense)]
    worst = [max(claims, key=_spent) for claims in each if claims]
    return tuple(sorted(worst, key=lambda claim: claim.epsilon is None))


def _spent(claim: Privacy) -> float:
    return math.inf if claim.epsilon is None else claim.epsilon


@dataclass(frozen=True)
class Compose(Defense):
    """Several defenses, applied left to right. At most one may replace the gradient step.

    Each draws from a stream of its own, so that adding one shifts no other's draws.
    """

    parts: Sequence[Defense]

    def __post_init__(self):
        stepping = [p for p in self.parts if _steps(p)]
        if len(stepping) > 1:
            names = ", ".join(type(p).__name__.lower() for p in stepping)
            raise Refused("defense", "at most one defense may compute the gradient", names)
        if self.poisson and self.mixes:
            why = "mixing lets one example touch several clipped gradients, and no epsilon holds"
            names = ", ".join(type(p).__name__.lower() for p in self.parts)
            raise Refused("defense", f"do not combine: {why}", names)
        if self.poisson and self.rereads:
            why = "one reads private images after the noise was added, and no epsilon holds"
            names = ", ".join(type(p).__name__.lower() for p in self.parts)
            raise Refused("defense", f"do not combine: {why}", names)

        sealing = [type(p).__name__.lower() for p in self.parts if _seals(p)]
        if len(sealing) > 1:
            raise Refused("defense", "at most one defense may mask updates", ", ".join(sealing))
        for part, *later in (self.parts[i:] for i in range(len(self.parts))):
            if part.bounds:
                after = [p for p in later if type(p).update is not Defense.update]
                names = ", ".join(type(p).__name__.lower() for p in after)
                own = type(part).__name__.lower()
                rule = f"{own} bounds what is sent, which {names} would change; name it after that"
                require(not after, "defense", rule, f"{own} before {names}")

    @property
    def poisson(self) -> bool:  # type: ignore[override]
        return any(p.poisson for p in self.parts)

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return any(p.mixes for p in self.parts)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(p.random for p in self.parts)

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        return any(p.rounds for p in self.parts)

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return any(p.sums for p in self.parts)

    @property
    def rereads(self) -> bool:  # type: ignore[override]
        return any(p.rereads for p in self.parts)

    @property
    def undoes(self) -> bool:  # type: ignore[override]
        return any(p.undoes for p in self.parts)

    def architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        for part in self.parts:
            model = part.architecture(model, _own(rng, part))
        return model

    def supplied(self, public: Batch) -> Defense:
        return Compose(tuple(part.supplied(public) for part in self.parts))

    def fitted(self, training: Sequence[Training]) -> Defense:
        fitted = []
        for part in self.parts:
            with _named(part):
                fitted.append(part.fitted(training))
        return Compose(tuple(fitted))

    @property
    def published(self) -> Defense:
        return Compose(tuple(part.published for part in self.parts))

    def batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        for part in self.parts:
            batch = part.batch(batch, _own(rng, part))
        return batch

    def gradients(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, expected: int
    ) -> Tensors:
        for part in self.parts:
            if _steps(part):
                return part.gradients(model, batch, _own(rng, part), expected)
        return super().gradients(model, batch, rng, expected)

    def perturb(
        self, model: nn.Module, batch: Batch, gradient: Tensors, step: int, rng: torch.Generator
    ) -> Tensors:
        for part in self.parts:
            gradient = part.perturb(model, batch, gradient, step, _own(rng, part))
        return gradient

    def update(self, update: Update, rng: torch.Generator) -> Update:
        for part in self.parts:
            update = part.update(update, _own(rng, part))
        return update

    def seal(self, update: Update, party: Party) -> Update:
        for part in self.parts:
            update = part.seal(update, party)
        return update

    def mean(self, updates: Sequence[Update]) -> Update:
        own = [p for p in self.parts if type(p).mean is not Defense.mean]
        return own[0].mean(updates) if own else super().mean(updates)

    def release(self, mean: Update, clients: int, rng: torch.Generator) -> Update:
        for part in self.parts:
            mean = part.release(mean, clients, _own(rng, part))
        return mean

    def opened(self, update: Update, party: Party) -> Update:
        for part in reversed(self.parts):
            update = part.opened(update, party)
        return update

    def bytes(self, update: Update) -> int:
        """That of the part whose encoding is the shortest."""
        return min((part.bytes(update) for part in self.parts), default=super().bytes(update))

    def privacy(self, training: Training) -> Privacy | None:
        return next(iter(self.claims(training)), None)

    def claims(self, training: Training) -> tuple[Privacy, ...]:
        """Each part's, those with an epsilon first: what comes after a part does not weaken it."""
        claims = [claim for part in self.parts for claim in part.claims(training)]
        return tuple(sorted(claims, key=lambda claim: claim.epsilon is None))

    def per_example(self, gradients: Tensors) -> Tensors:
        for part in self.parts:
            gradients = part.per_example(gradients)
        return gradients

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        # what is left out of a comparison is left out last: it does count for a norm
        for part, _, covered in sorted(self._order(), key=lambda each: each[0].layers):
            tensors = part.expected(tensors, sent if part.layers or not covered else None)
        return tensors

    def mask(self, update: Update) -> Tensors | None:
        """Entries that every part left; where noise came later, of the parts that drop layers."""
        own = [p.mask(update) for p, _, covered in self._order() if p.layers or not covered]
        masks = [mask for mask in own if mask is not None]
        return reduce(_both, masks) if masks else None

    def undone(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        for part in reversed(self.parts):
            images = part.undone(images)
        return images

    def hidden(self, model: nn.Module, sent: Tensors, inputs: Tensor) -> Tensors:
        """That of a part to whose updates others do no more than to scale them."""
        telling = [p for p in self.parts if type(p).hidden is not Defense.hidden]
        rest = [p for p in self.parts if p not in telling]
        if len(telling) != 1 or any(_draws(p) or _alters(p) for p in rest):
            return {}
        return telling[0].hidden(model, sent, inputs)

    def noise(self, local: Local) -> tuple[float, float]:
        """Not known where entries are rounded at random, or changed when noise is in them."""
        # the rounding before a mask is noise of its own, in what `noise` says
        order = [(part, noisy) for part, noisy, _ in self._order() if not _seals(part)]
        changes = [(part, noisy) for part, noisy in order if _changes(part)]
        lost = (noisy or (part.random and not _draws(part)) for part, noisy in changes)
        if any(lost):
            return 0.0, 0.0
        each = [part.noise(local) for part in self.parts]
        return math.hypot(*(g for g, _ in each)), math.hypot(*(x for _, x in each))

    def _order(self) -> list[tuple[Defense, bool, bool]]:
        """Each part; whether noise is in what it gets, and whether noise covers what it makes."""
        parts = sorted(self.parts, key=_seals)  # masks come last
        # a gradient step's noise comes before all that changes updates
        first = any(_draws(part) and _steps(part) for part in parts)
        later = [_draws(part) and not _steps(part) for part in parts]
        return [(part, first or any(later[:i]), any(later[i:])) for i, part in enumerate(parts)]

    def check(self, model: nn.Module) -> None:
        for part in self.parts:
            part.check(model)

    def check_clients(self, clients: int) -> None:
        for part in self.parts:
            part.check_clients(clients)

    def covers(self, training: Training) -> None:
        for part in self.parts:
            with _named(part):
                part.covers(training)


@contextmanager
def _named(part: Defense) -> Iterator[None]:
    """What is refused inside is a key of this part."""
    try:
        yield
    except Refused as wrong:
        raise wrong.under(type(part).__name__.lower()) from None


def _both(one: Tensors, other: Tensors) -> Tensors:
    return {k: kept & other[k] for k, kept in one.items()}


def _own(rng: torch.Generator, part: Defense) -> torch.Generator:
    return stream(rng.initial_seed(), type(part).__name__)


def _steps(part: Defense) -> bool:
    """Whether it computes the gradient."""
    return type(part).gradients is not Defense.gradients


def _seals(part: Defense) -> bool:
    """Whether it masks updates."""
    return type(part).seal is not Defense.seal


def _draws(part: Defense) -> bool:
    """Whether it adds noise."""
    return any(part.noise(Local("gradient", 1.0, 1, 1)))


def _drops(part: Defense) -> bool:
    """Whether it leaves out entries of an update."""
    return type(part).mask is not Defense.mask


def _changes(part: Defense) -> bool:
    """Whether entries of an update that it sends are other than they came."""
    return type(part).expected is not Defense.expected and not _drops(part)


def _alters(part: Defense) -> bool:
    """Whether it makes of a gradient, or an update, more than a multiple of it."""
    hooks = ("gradients", "perturb", "update", "seal")
    own = any(getattr(type(part), hook) is not getattr(Defense, hook) for hook in hooks)
    return own and part.turns


def parts(defense: Defense) -> Sequence[Defense]:
    return defense.parts if isinstance(defense, Compose) else (defense,)


def bare(defense: Defense, model: nn.Module) -> None:
    """Refuse running statistics, which would travel beside an update as they are."""
    from fedsec.client import buffers

    found = list(buffers(model))
    rule = (
        f"{type(defense).__name__.lower()} covers updates, and running statistics would travel "
        "beside them as they are; use model.norm=group or model.norm=none"
    )
    require(not found, "model.norm", rule, ", ".join(found[:2]))


def clips(defense: Defense) -> bool:
    """Whether the defense changes examples' gradients before they are summed."""
    return any(type(part).per_example is not Defense.per_example for part in parts(defense))


def matched(defense: Defense, local: Local, directions: bool = False) -> Defense | None:
    """The parts whose `expected` a match compares its guess through; None: there are none.

    Not those that change entries when noise is in them: of rounding it leaves hardly more than a
    straight line, on average. Of a sum of clients only which entries all of them dropped. Where
    `directions` alone are compared, not those that change no direction.
    """
    whole = defense if isinstance(defense, Compose) else Compose((defense,))
    kept = [
        part
        for part, noisy, covered in whole._order()
        if (part.turns or not directions)
        and (
            (part.matched and not noisy and not local.parts)
            or not (_changes(part) or (covered and local.parts))
        )
    ]
    if not any(_changes(part) or _drops(part) for part in kept):
        return None
    return Compose(kept)

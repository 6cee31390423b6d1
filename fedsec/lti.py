"""What learning to invert needs: simulated clients, numbers that stand for an update, a network.

It stands apart from attacks/lti.py so that the attack reads on one screen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import cost
from fedsec.client import local_update, mean_update, schedule
from fedsec.defense import Defense, clips
from fedsec.engine import simulate
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Tensors, Update

BUCKETS = 2**14  # numbers that a longer update is hashed into
EVERY = 25  # updates, or steps of the training, between two words on progress
KNOWN = 1000  # updates among which the principal components are found

Streams = Callable[..., torch.Generator]  # by their names


def streams_of(model: nn.Module) -> Streams:
    """Streams that all victims of a model share, and no other model has."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    seed = int.from_bytes(digest.digest()[:8], "big")
    return lambda *names: stream(seed, "lti", *names)


# ---- pairs to learn from ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Simulated updates and what is behind them."""

    rows: Float[Tensor, "n k"]  # hashed
    images: Float[Tensor, "n b c h w"]
    told: Float[Tensor, "n classes"]  # mean of what the loss was told
    noise: Float[Tensor, "m k"]  # to be added to any of `rows`; zeros where they hold it already


class Clients:
    """Clients with public images, through the client's own code and the defense's own hooks.

    The defense draws anew for each; noise that it adds to one is kept apart, as any could have it.
    Where the defense is withheld there is none; where the local steps are, there is one gradient.
    """

    def __init__(self, seen: Observation, streams: Streams, shift: int, mirror: bool):
        update = seen.sent
        self.model = deepcopy(seen.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in update.tensors)
        self.local = seen.step
        self.defense = seen.defense.supplied(seen.aux) if "defense" in seen.grants else Defense()
        like = next(self.model.parameters())
        self.aux = Batch(seen.aux.images.to(like), seen.aux.targets.to(like))
        self.count, self.streams = seen.count, streams
        self.shift, self.mirror = shift, mirror
        self.hashed = Hashed(sum(t[0].numel() for t in update.tensors.values()), streams("hash"))

    def pairs(self, updates: int, told: Callable[[int, float], None]) -> tuple[Pairs, float]:
        """Updates of moved public images, and the GFLOP of simulating them.

        `told` hears how many are done, and what the mean image scores.
        """
        order, rng = self.drawn(updates), self.streams("moves")
        images = moved(self.aux.images[order.flatten()], self.shift, self.mirror, rng)
        images = images.unflatten(0, order.shape)
        targets = self.aux.targets[order]
        start = float(images.var(0, correction=0).mean())
        rows, mixed, noise, spent = [], [], [], 0.0

        def one(turn: int) -> None:
            if self.apart and turn >= KNOWN:
                mixed.append(targets[turn].mean(0))
                rows.append(self.hashed(self.expected(images[turn], targets[turn])))
                return
            sent, trained = self.answer(images[turn], targets[turn], turn)
            mixed.append(trained)
            rows.append(self.hashed(sent))
            if self.apart:
                clean = self.hashed(self.expected(images[turn], targets[turn]))
                noise.append(rows[-1] - clean)
                rows[-1] = clean

        for turn in range(updates):
            if turn in (0, KNOWN):
                each = cost.flops(partial(one, turn))
                spent += each * (min(updates, KNOWN) if turn == 0 else updates - KNOWN)
            else:
                one(turn)
            if turn % EVERY == 0:
                told(turn, start)
        drawn = torch.stack(noise) if noise else torch.zeros_like(rows[0])[None]
        return Pairs(torch.stack(rows), images.float(), torch.stack(mixed).float(), drawn), spent

    @property
    def apart(self) -> bool:
        """Whether what the defense draws is noise on an update, that may be on any other."""
        masks = self.defense.mask(Update({"one": torch.ones(1)}, {}, 1)) is not None
        return any(self.defense.noise(self.local)) and not masks and not self.defense.mixes

    def drawn(self, updates: int) -> Int[Tensor, "n b"]:
        """Which public images are behind each update: all equally often, but for the last pass."""
        passes = math.ceil(updates * self.count / len(self.aux))
        rng = self.streams("order")
        order = torch.cat([torch.randperm(len(self.aux), generator=rng) for _ in range(passes)])
        return order[: updates * self.count].view(updates, self.count)

    def answer(
        self, images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"], turn: int
    ) -> tuple[Tensors, Float[Tensor, " k"]]:
        """The update that is sent, and the mean of what the loss was told."""
        updates, told = [], []
        parts = self.local.parts or (len(images),)
        for i, (x, t) in enumerate(zip(images.split(parts), targets.split(parts), strict=True)):
            whole, steps = Batch(x, t), schedule(len(x), self.local)
            batches = [Batch(whole.images[s], whole.targets[s]) for s in steps]
            local = replace(self.local, parts=(), batch=len(steps[0]))

            def rngs(hook: str, step: int, part: int = i) -> torch.Generator:
                return self.streams("client", turn, part, hook, step)

            sent, trained = local_update(
                self.model, batches, self.defense, local, rngs, len(steps[0])
            )
            updates.append(sent)
            told.append(trained.targets[: len(x)])
        return mean_update(updates).tensors, torch.cat(told).mean(0)

    def expected(self, images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"]) -> Tensors:
        """The same update but for noise, as far as the defense publishes what it does."""
        per_example = self.defense.per_example if clips(self.defense) else None
        update = simulate(self.model, images, targets, self.local, per_example)
        return self.defense.expected({k: t.detach() for k, t in update.items()})


def moved(
    images: Float[Tensor, "n c h w"], shift: int, mirror: bool, rng: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Each image shifted by up to so many pixels, its border repeated, and mirrored or not."""
    n, _, height, width = images.shape
    down, across = torch.randint(2 * shift + 1, (2, n), generator=rng).tolist()
    flips = (torch.rand(n, generator=rng) < 0.5).tolist()
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    cut = [
        p[:, y : y + height, x : x + width] for p, y, x in zip(padded, down, across, strict=True)
    ]
    return torch.stack([c.flip(-1) if mirror and f else c for c, f in zip(cut, flips, strict=True)])


# ---- numbers that stand for an update -----------------------------------------------------------


class Hashed:
    """An update as at most `BUCKETS` numbers: each entry goes to a bucket, with a sign.

    Feature hashing (Weinberger et al. 2009): inner products are kept in expectation. Linear. An
    update that is no longer than that is kept as it is.
    """

    def __init__(self, length: int, rng: torch.Generator, buckets: int = BUCKETS):
        self.length, self.buckets = length, min(length, buckets)
        if length > buckets:
            self.bucket = torch.randint(buckets, (length,), generator=rng)
            self.sign = torch.randint(2, (length,), generator=rng).float() * 2 - 1

    def __call__(self, update: Tensors) -> Float[Tensor, " k"]:
        row = torch.cat([t.flatten() for t in update.values()]).float().nan_to_num(0, 0, 0)
        assert len(row) == self.length
        if self.buckets == self.length:
            return row
        out = row.new_zeros(self.buckets)
        return out.index_add(0, self.bucket.to(row.device), row * self.sign.to(row.device))


@dataclass(frozen=True)
class Components:
    """Rows along the main directions of a set of rows."""

    mean: Float[Tensor, " k"]
    along: Float[Tensor, "k f"]

    @staticmethod
    def of(rows: Float[Tensor, "n k"], noise: Float[Tensor, "m k"], features: int) -> Components:
        """Directions in which `rows` vary most, each in the share that `noise` leaves of it.

        That is Wiener's filter. All together they have unit deviation over rows with noise.
        """
        mean = rows.mean(0)
        centred = (rows[:KNOWN] - rows[:KNOWN].mean(0)).double()
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        kept = values > 1e-10 * values[-1].clamp_min(1e-300)  # below that it is rounding
        kept[: max(0, len(kept) - features)] = False
        along = (centred.T @ (vectors[:, kept] / values[kept].sqrt())).to(rows)
        clean, noisy = ((x @ along).square().mean(0) for x in (rows - mean, noise))
        along = along * (clean / (clean + noisy).clamp_min(1e-30))
        both = [(x @ along).square().mean() for x in (rows - mean, noise)]
        deviation = torch.stack(both).sum().sqrt()
        return Components(mean, along / deviation.nan_to_num(1).clamp_min(1e-30))

    def __call__(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, "n f"]:
        return (rows - self.mean) @ self.along


# ---- the network --------------------------------------------------------------------------------


class Network:
    """Three fully connected layers with ReLU, and a sigmoid: features -> pixels, flat."""

    def __init__(
        self,
        before: int,
        width: int,
        mean: Float[Tensor, "c h w"],  # of images: what it starts with
        count: int,
        rng: torch.Generator,
    ):
        mean = mean.flatten().repeat(count)
        sizes = (before, width, width, len(mean))
        self.weights: list[Tensor] = []
        self.biases = [mean.new_zeros(after) for after in sizes[1:]]
        for i, (fan, after) in enumerate(pairwise(sizes)):
            bound = (math.sqrt(6) if i < 2 else 0.1) / math.sqrt(max(1, fan))
            weight = bound * (2 * torch.rand(after, fan, generator=rng) - 1)
            self.weights.append(weight.to(mean).requires_grad_())
        self.biases[-1] = torch.logit(mean.clamp(0.01, 0.99))
        for bias in self.biases:
            bias.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        for weight, bias in zip(self.weights[:-1], self.biases, strict=False):
            x = F.linear(x, weight, bias).relu()
        return F.linear(x, self.weights[-1], self.biases[-1]).sigmoid()


@dataclass(frozen=True)
class Reader:
    """From an update to images: hashed, along components, through the network."""

    hashed: Hashed
    components: Components
    network: Network
    labels: bool  # whether the network is told the mean label too
    image: tuple[int, ...]  # b, c, h, w

    @staticmethod
    def of(
        pairs: Pairs, hashed: Hashed, labels: bool, features: int, width: int, rng: torch.Generator
    ) -> tuple[Reader, Float[Tensor, "n f"], Float[Tensor, "m f"]]:
        """With a network that has learned nothing but the mean image.

        And what the network sees of the pairs, and of their noise.
        """
        components = Components.of(pairs.rows, pairs.noise, features)
        before = components.along.shape[1] + labels * pairs.told.shape[1]
        network = Network(before, width, pairs.images.mean((0, 1)), len(pairs.images[0]), rng)
        reader = Reader(hashed, components, network, labels, tuple(pairs.images.shape[1:]))
        noise = components(pairs.noise + components.mean)
        x = reader.features(pairs.rows, pairs.told)
        return reader, x, F.pad(noise, (0, x.shape[1] - noise.shape[1]))  # none on labels

    def features(self, rows: Float[Tensor, "n k"], told: Float[Tensor, "n classes"]) -> Tensor:
        along = self.components(rows)
        return torch.cat([along, told.to(along)], 1) if self.labels else along

    @torch.no_grad()
    def __call__(
        self, update: Tensors, told: Float[Tensor, " classes"]
    ) -> Float[Tensor, "b c h w"]:
        row = self.features(self.hashed(update)[None], told[None])
        return self.network(row).view(self.image).to(told.dtype)


def assigned(guess: Float[Tensor, "n b d"], truth: Float[Tensor, "n b d"]) -> Tensor:
    """Mean squared error under each row's best assignment: a batch has no order."""
    if guess.shape[1] == 1:
        return F.mse_loss(guess, truth)
    with torch.no_grad():  # of |g - t|^2, what an assignment can change
        costs = -2 * (guess @ truth.mT) + truth.square().sum(-1)[:, None]
        chosen = [linear_sum_assignment(cost)[1] for cost in costs.double().cpu().numpy()]
    order = torch.stack([torch.from_numpy(c) for c in chosen]).to(truth.device)
    return F.mse_loss(guess, truth.gather(1, order[..., None].expand_as(truth)))


def trained(
    network: Network,
    x: Float[Tensor, "n f"],
    noise: Float[Tensor, "m f"],
    images: Float[Tensor, "n b d"],
    steps: int,
    batch: int,
    lr: float,
    rng: torch.Generator,
    told: Callable[[int, float], None],
) -> float:
    """Adam on `assigned` (equation 3), along half a cosine from `lr` on; and its GFLOP.

    Each update of a step gets the noise of another. `told` hears how many steps are done, and the
    loss.
    """
    adam = torch.optim.Adam(network.parameters, lr=lr)

    def step(lr: float) -> Tensor:
        some = torch.randint(len(x), (batch,), generator=rng).to(x.device)
        others = torch.randint(len(noise), (batch,), generator=rng).to(x.device)
        guess = network(x[some] + noise[others]).view(-1, *images.shape[1:])
        loss = assigned(guess, images[some])
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = lr
        adam.step()
        return loss.detach()

    with torch.enable_grad():
        loss, once = cost.counted(partial(step, lr))
        for done in range(1, steps):
            loss = step(lr * (1 + math.cos(math.pi * done / steps)) / 2)
            if done % EVERY == 0:
                told(done, float(loss))
    told(steps, float(loss))
    return steps * once

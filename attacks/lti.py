"""Learning to invert: LTI."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fedsec import cost, engine, labels
from fedsec.attack import Attack
from fedsec.checks import at_least, positive
from fedsec.lti import BUCKETS, KNOWN, Clients, Reader, assigned, streams_of
from fedsec.types import Reconstruction, Tensors

EVERY = 25  # steps between two words on progress


@dataclass(frozen=True, kw_only=True)
class LTI(Attack):
    """A network that was taught to read images off updates (Wu et al. 2023, UAI, section 3).

    Clients with public images are simulated, defense and noise included; three layers learn to go
    from their updates to their images, under the best assignment of a batch (equation 3). No
    optimisation sees the victim's update, so that whatever a defense does is learned with the rest.
    `loss` is 1 - cosine similarity of the re-computed undefended update; labels are those of
    fedsec.labels. All victims share one network. It draws from streams of the model's weights, not
    of a victim, so that a stack gives what its victims give alone; and each victim is charged for
    the whole training: what it would cost alone.

    Differs from the paper: a thousand public images, not fifty thousand, are moved about to make
    more; longer updates are hashed, as there, and then all are brought to their main directions,
    less where a defense's noise covers them; in training, one update's noise is added to another;
    Adam's steps follow half a cosine; labels that are granted are told to the network.
    """

    updates: int  # simulated, >= 2
    shift: int  # pixels that a public image is moved by, at most, >= 0
    mirror: bool  # whether half of the public images are mirrored
    features: int  # directions of updates that the network sees, >= 1
    width: int  # of its two hidden layers, >= 1
    steps: int  # of its training, >= 1
    batch: int  # updates in one of them, >= 1
    lr: float  # of Adam at first, > 0

    needs = frozenset({"aux", "model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        at_least(self, 2, "updates")
        at_least(self, 1, "features", "width", "steps", "batch")
        at_least(self, 0, "shift")
        positive(self, "lr")

    def gflop_at_most(self, seen):
        pixels = seen.count * math.prod(seen.shape)
        weights = self.width * (self.features + self.width + pixels)
        training = 6e-9 * weights * self.batch * self.steps  # forward and backward
        update = seen.sent
        entries = min(sum(t[0].numel() for t in update.tensors.values()), BUCKETS)
        components = 2e-9 * entries * (KNOWN**2 + 4 * self.updates * self.features)
        updates = (self.updates + 1) * max(1, seen.step.steps)
        one = cost.update_gflop(seen.model, seen.count, seen.shape)
        return training + components + updates * one

    def __call__(self, seen, rngs, progress):
        update = seen.sent
        reader, spent = self._taught(seen, progress)
        targets, told = labels.targets_of(seen, rngs)
        local = seen.step
        images, loss, flags, gflop = [], [], [], []

        def one(observed: Tensors, victim: int) -> None:
            images.append(reader(observed, targets[victim].mean(0)))
            guess = engine.simulate(seen.model, images[-1], targets[victim], local)
            loss.append(engine.cosine(guess, observed).detach())

        for v in range(len(rngs)):
            observed = {k: t[v] for k, t in update.tensors.items()}
            gflop.append(spent + told + cost.flops(partial(one, observed, v)))
            flags.append(())
            if not all(t.isfinite().all() for t in observed.values()):
                images[-1], loss[-1] = torch.full_like(images[-1], 0.5), torch.ones_like(loss[-1])
                flags[-1] = ("lti found no image: the update is not finite",)
        found = torch.stack(images), targets.argmax(-1), torch.stack(loss)
        steps = torch.full((len(rngs),), self.steps)
        costs = torch.tensor(gflop, dtype=torch.float64)
        return Reconstruction(*found, steps, costs, tuple(flags))

    def _taught(self, seen, progress) -> tuple[Reader, float]:
        """What reads images off an update, and the GFLOP of learning it."""
        streams = streams_of(seen.model)
        clients = Clients(seen, streams, self.shift, self.mirror)
        updates = min(self.updates, self.steps * self.batch)  # more would never be looked at
        everything = updates + self.steps
        pairs, spent = clients.pairs(updates, lambda done, loss: progress(done, everything, loss))
        sizes, granted = (self.features, self.width), "labels" in seen.grants
        made: list[Any] = []

        def read() -> None:
            reader = Reader.of(pairs, clients.hashed, granted, *sizes, streams("network"))
            noise = reader.components(pairs.noise + reader.components.mean)
            made.extend((reader, reader.features(pairs.rows, pairs.told), noise))

        spent += cost.flops(read)
        (reader, x, noise), y = made, pairs.images.flatten(2)
        noise = F.pad(noise, (0, x.shape[1] - noise.shape[1]))  # none on labels
        network, rng = reader.network, streams("training")
        adam = torch.optim.Adam(network.parameters, lr=self.lr)
        losses = []

        def step(lr: float) -> None:
            some = torch.randint(len(x), (self.batch,), generator=rng).to(x.device)
            others = torch.randint(len(noise), (self.batch,), generator=rng).to(x.device)
            guess = network(x[some] + noise[others]).view(-1, *y.shape[1:])
            loss = assigned(guess, y[some])
            adam.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = lr
            adam.step()
            losses.append(loss.detach())

        with torch.enable_grad():
            spent += self.steps * cost.flops(partial(step, self.lr))
            for done in range(1, self.steps):
                step(self.lr * (1 + math.cos(math.pi * done / self.steps)) / 2)
                if done % EVERY == 0:
                    progress(updates + done, everything, float(losses[-1]))
        progress(everything, everything, float(losses[-1]))
        return reader, spent

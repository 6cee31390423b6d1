"""Learning to invert: LTI."""

import math
from dataclasses import dataclass, replace

from fedsec import cost, labels, solve
from fedsec.attack import Attack
from fedsec.checks import at_least, positive
from fedsec.lti import BUCKETS, KNOWN, Clients, Reader, streams_of, trained


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

    private = True
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
        entries = min(sum(t[0].numel() for t in seen.sent.tensors.values()), BUCKETS)
        components = 2e-9 * entries * (KNOWN**2 + 4 * self.updates * self.features)
        updates = (self.updates + 1) * max(1, seen.step.steps)
        one = cost.update_gflop(seen.model, seen.count, seen.shape)
        return training + components + updates * one

    def __call__(self, seen, rngs, progress):
        reader, spent = self._taught(seen, progress)
        targets, told = labels.targets_of(seen, rngs)

        def one(update, v):
            images = reader(update, targets[v].mean(0))
            loss = solve.misfit(seen, images, targets[v], update)
            found = solve.Found(images, targets[v].argmax(-1), loss, (), self.steps)
            if solve.finite(update):
                return found
            nothing = solve.none(seen, update, "lti found no image: the update is not finite")
            return replace(nothing, labels=found.labels, steps=self.steps)

        return solve.each(seen, rngs, lambda *_: None, one, spent + told)

    def _taught(self, seen, progress) -> tuple[Reader, float]:
        """What reads images off an update, and the GFLOP of learning it."""
        streams, granted = streams_of(seen.model), "labels" in seen.grants
        updates = min(self.updates, self.steps * self.batch)  # more would never be looked at
        everything = updates + self.steps
        clients = Clients(seen, streams, self.shift, self.mirror)
        pairs, simulated = clients.pairs(updates, lambda n, loss: progress(n, everything, loss))
        sizes, rng = (self.features, self.width), streams("network")
        (reader, x, noise), read = cost.counted(
            lambda: Reader.of(pairs, clients.hashed, granted, *sizes, rng)
        )
        learned = trained(
            reader.network, x, noise, pairs.images.flatten(2), self.steps, self.batch, self.lr,
            streams("training"), lambda n, loss: progress(updates + n, everything, loss),
        )  # fmt: skip
        return reader, simulated + read + learned

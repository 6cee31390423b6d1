"""Data leakage in federated averaging."""

import math
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedsec import engine, labels, priors
from fedsec.attack import Attack
from fedsec.checks import at_least, positive


@dataclass(frozen=True, kw_only=True)
class FedAvg(Attack):
    """Images behind several local epochs (Dimitrov et al. 2022, TMLR, algorithm 1).

    Simulates the client's local steps and matches the whole update. The attacker does not know in
    which order an epoch took its images, so each epoch has images of its own (section 4.1), tied
    by a prior on what no order changes: the mean over an epoch's images (section 4.2). In the end
    each epoch's images are matched with the first epoch's, one to one among equal labels, and
    averaged. An update of one gradient or one epoch is matched as `inverting` does.
    """

    steps: int  # optimisation steps, >= 1
    lr: float  # length of a step, in normalised pixels, > 0
    tv: float  # weight of the total variation of normalised pixels, >= 0
    order: float  # weight of the order-invariant prior, >= 0
    restarts: int  # random starts, the best objective wins, >= 1
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape", "local"})

    def __post_init__(self):
        at_least(self, 1, "steps", "restarts")
        at_least(self, 0, "tv", "order")
        positive(self, "lr")
        labels.known(self.labels)

    @property
    def lanes(self):
        return self.restarts

    @property
    def evaluations(self):
        return self.steps * self.restarts

    def __call__(self, seen, rngs, progress):
        epochs, count = _epochs(seen), seen.count

        def same_mean(images: Tensor) -> Tensor:
            means = images.unflatten(0, (epochs, count)).mean(1)
            return (means - means.mean(0)).square().mean()

        order = ((self.order, same_mean),) if epochs > 1 else ()
        terms = (*priors.smooth(seen, self.tv), *order)
        search = engine.spectral(steps=self.steps, lr=self.lr, priors=terms, restarts=self.restarts)
        search = replace(search, copies=epochs)
        targets, spent = labels.targets_of(seen, rngs, self.labels)
        found = engine.match(seen, targets, search, rngs, progress, spent)
        told = found.labels.unflatten(1, (epochs, count))
        each = found.images.unflatten(1, (epochs, count))
        images = torch.stack([_averaged(e, t) for e, t in zip(each, told, strict=True)])
        return replace(found, images=images, labels=told[:, 0].contiguous())


def _epochs(seen) -> int:
    """Passes over the data behind the update, the last one counted whole."""
    local = seen.local
    if local.kind == "gradient" or local.parts:
        return 1
    size = min(local.batch or seen.count, seen.count)
    whole = seen.count % size == 0  # else an epoch's chunks would straddle two
    return max(1, math.ceil(local.steps * size / seen.count)) if whole else 1


def _averaged(images: Tensor, labels: Tensor) -> Tensor:
    """The mean over epochs of [e b c h w], each epoch's images in the order of the first one's."""
    first, total = images[0], images[0].clone()
    for other, said in zip(images[1:], labels[1:], strict=True):
        apart = torch.cdist(first.flatten(1), other.flatten(1))
        apart = apart + 1e6 * (labels[0][:, None] != said[None])
        total += other[linear_sum_assignment(apart.cpu().numpy())[1]]
    return total / len(images)

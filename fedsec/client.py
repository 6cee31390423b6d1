"""What a client computes on its private data, in pure torch. It knows no Flower.

`local_update` is the only way from private images to an update, for training and for what is
attacked: the gradient that is attacked is the gradient that is sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsec.checks import require
from fedsec.defense import Defense
from fedsec.rng import stream
from fedsec.types import Batch, Local, Tensors, Update

Streams = Callable[[str, int], torch.Generator]  # a fresh stream for a hook's name and a local step


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """FedSGD: each round's reply is one gradient of the mean loss on one batch."""

    lr: float  # step size of the server, > 0
    batch: int  # images behind one gradient, >= 1

    def __post_init__(self):
        require(0 < self.lr < float("inf"), "lr", "must be above 0 and finite", self.lr)
        require(self.batch >= 1, "batch", "must be at least 1", self.batch)

    @property
    def local(self) -> Local:
        return Local("gradient", self.lr, 1, self.batch)


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Local SGD: each round's reply is the weights after `steps` steps (McMahan et al. 2017)."""

    lr: float  # step size of the client, > 0
    batch: int  # images in one local step, >= 1
    steps: int  # local steps in one round, >= 1

    def __post_init__(self):
        require(0 < self.lr < float("inf"), "lr", "must be above 0 and finite", self.lr)
        require(self.batch >= 1, "batch", "must be at least 1", self.batch)
        require(self.steps >= 1, "steps", "must be at least 1", self.steps)

    @property
    def local(self) -> Local:
        return Local("fedavg", self.lr, self.steps, self.batch)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name: what an update has a tensor for."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> Tensors:
    """The running statistics that travel with an update: persistent ones, not constants."""
    kept = model.state_dict(keep_vars=True)
    return {
        name: b
        for name, b in model.named_buffers()
        if name in kept and (b.is_floating_point() or name.endswith("num_batches_tracked"))
    }


def mean_gradient(model: nn.Module, batch: Batch) -> Tensors:
    """The gradient of the mean cross entropy on `batch`, by parameter name.

    Targets may be mixed. A parameter that the loss does not touch, and every parameter on an
    empty batch, gets zeros.
    """
    named = parameters(model)
    if len(batch) == 0:
        return {name: torch.zeros_like(p) for name, p in named.items()}
    with torch.enable_grad():
        loss = F.cross_entropy(model(batch.images), batch.targets.to(batch.images.dtype))
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


def client_streams(seed: int, client: int, round: int, *kind: str | int) -> Streams:
    """The client's own streams in one round; `kind` tells its training from each of its probes.

    Each hook and each local step has its own, so that a hook that draws more shifts no other.
    """
    return lambda hook, step: stream(seed, "client", client, round, *kind, hook, step)


def encode(batches: Sequence[Batch], defense: Defense, rngs: Streams) -> list[Batch]:
    """What the loss sees in each local step, instead of the private batches."""
    with own_draws(rngs("batch draws", 0), batches[0].images.device):
        return [defense.batch(batch, rngs("batch", step)) for step, batch in enumerate(batches)]


def local_update(
    model: nn.Module,
    batches: Sequence[Batch],
    defense: Defense,
    local: Local,
    rngs: Streams,
    expected: int,
) -> tuple[Update, Batch]:
    """The update on private `batches`, one for each local step, and the encoded batches joined.

    A function of its arguments only: it leaves `model` as it was, and what layers (dropout) and
    libraries draw comes from `rngs` too. `expected` is the batch size that the sampling aims at.
    """
    from fedsec.models import drawing, tracking

    assert local.kind == "fedavg" or len(batches) == 1, "a gradient has one step"
    encoded, named = encode(batches, defense, rngs), parameters(model)
    touched = buffers(model) | (named if local.kind == "fedavg" else {})
    tensors: Tensors = {}
    with own_draws(rngs("layer draws", 0), encoded[0].images.device):
        with _restored(touched) as before, tracking(model), drawing(model):
            for step, batch in enumerate(encoded):
                tensors = defense.gradients(model, batch, rngs("gradients", step), expected)
                tensors = defense.perturb(model, batch, tensors, step, rngs("perturb", step))
                assert tensors.keys() == named.keys(), "a gradient for each trainable parameter"
                if local.kind == "fedavg":
                    with torch.no_grad():
                        for name, p in named.items():
                            p -= local.lr * tensors[name]
            if local.kind == "fedavg":
                tensors = {name: before[name] - p.detach() for name, p in named.items()}
            running = {name: b.detach().clone() for name, b in buffers(model).items()}
        # Under Poisson sampling the drawn number of images is private.
        count = expected * len(batches) if defense.poisson else sum(len(b) for b in batches)
        update = defense.update(Update(tensors, running, count), rngs("update", 0))
    if local.kind == "fedavg" and not defense.sums:
        # the reply is weights: their rounding is part of what is seen
        after = weights_after(model, update)
        seen = {name: p.detach() - after[name] for name, p in named.items()}
        update = Update(seen, update.buffers, update.count)
    return update, joined(encoded)


def weights_after(model: nn.Module, update: Update, lr: float = 1.0) -> Tensors:
    """The model's trainable parameters after a step of size `lr` along `update`."""
    named = parameters(model)
    return {k: torch.sub(p.detach(), update.tensors[k], alpha=lr) for k, p in named.items()}


def draw(
    spec: Gradient | FedAvg,
    client_indices: Tensor,
    round: int,
    client: int,
    seed: int,
    defense: Defense,
) -> list[Tensor]:
    """Which of the client's images each local step of `round` uses: one index tensor for a step.

    Without replacement within an update for as long as whole batches are left, then anew. Poisson
    sampling, where the defense's guarantee needs it: each image on its own with probability
    batch / len(client_indices), so that a draw may be empty.
    """
    local, held = spec.local, len(client_indices)
    size = min(local.batch, held)
    rng = stream(seed, "draw", client, round)
    if defense.poisson:
        chosen = [torch.rand(held, generator=rng) < size / held for _ in range(local.steps)]
        return [client_indices[c] for c in chosen]
    whole = held // size  # batches in one pass over the data
    passes = -(-local.steps // whole)
    order = [torch.randperm(held, generator=rng)[: whole * size] for _ in range(passes)]
    return [client_indices[i] for i in torch.cat(order).split(size)[: local.steps]]


def schedule(count: int, local: Local) -> list[Tensor]:
    """Which of `count` probe images each local step uses: chunks of `batch` in order, cycling.

    The last chunk may be smaller, as in the attacks' simulation of a client. A gradient is taken
    on all images at once.
    """
    if local.kind == "gradient":
        return [torch.arange(count)]
    chunks = torch.arange(count).split(local.batch or count)
    return [chunks[step % len(chunks)] for step in range(local.steps)]


def joined(batches: Sequence[Batch]) -> Batch:
    """All the batches as one, in their order."""
    mixes = [b.mix for b in batches if b.mix is not None]
    return Batch(
        torch.cat([b.images for b in batches]),
        torch.cat([b.targets for b in batches]),
        tuple(i for b in batches for i in b.index),
        torch.block_diag(*mixes) if len(mixes) == len(batches) else None,
    )


def mean_update(updates: Sequence[Update]) -> Update:
    """The mean weighted by each update's count: FedAvg's formula. Counters are rounded."""
    total = sum(u.count for u in updates)
    weights = [u.count / total for u in updates]

    def mean(each: list[Tensors]) -> Tensors:
        return {name: _mean([t[name] for t in each], weights) for name in each[0]}

    return Update(mean([u.tensors for u in updates]), mean([u.buffers for u in updates]), total)


def _mean(tensors: list[Tensor], weights: list[float]) -> Tensor:
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        return _mean([t.double() for t in tensors], weights).round().to(dtype)
    mean = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        mean += weight * tensor
    return mean


@contextmanager
def _restored(tensors: Tensors) -> Iterator[Tensors]:
    """A copy of `tensors`, which is written back on leaving. Cheaper than a copy of the module."""
    before = {name: t.detach().clone() for name, t in tensors.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])


@contextmanager
def own_draws(rng: torch.Generator, device: torch.device) -> Iterator[None]:
    """The process's global generators seeded from `rng` inside, and as they were afterwards."""
    import numpy as np

    seed = rng.initial_seed()
    saved, saved_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(saved)
            np.random.set_state(saved_numpy)  # noqa: NPY002

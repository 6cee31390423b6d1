"""The exact gradient of matching an update of k local steps, in the memory of about one.

Reverse mode by hand. With u the update so far, w the server's weights and g the gradient of the
loss on a step's chunk of images, a local step is u' = u + lr g(w - u, x). The steps are taken
without a graph, and u is kept at the start of each segment of sqrt(k) steps. Then, last to first,
with s the derivative of the distance by u': by x it is that of lr <g, s>, s held constant, and by u
s minus that of lr <g, s> by the weights. Inside a segment u is computed again.

The mean over clients (`local.parts`) is linear: each client has steps of its own, and its share of
the distance's derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F

from fedsec.cost import flops
from fedsec.types import Local, Tensors

Distance = Callable[[Tensors, Tensors], Tensor]  # guessed update, observed update -> scalar
SMALL = 5e6  # operations of a layer's forward pass on a chunk, below which lanes share calls
SPARE = 2.5e8  # bytes: lanes that share calls also share a graph of all steps while it fits


class Unrolled:
    """The distance of each lane's update from its victim's, and its gradients, for one model.

    The update is what `engine.simulate` gives for `local`; `observed` holds, by parameter name, one
    of each victim, [v, ...]. Any distance that torch.func can differentiate will do. The model's
    weights and mode must stay as they are.

    On a GPU, and where a layer has little to do, all lanes go through vmap together: in one graph
    of all steps while that is small, which saves computing steps again. Elsewhere they go one by
    one: on a CPU thread, grouped convolutions with a weight for each lane take up to twice as long.
    """

    def __init__(self, model: nn.Module, observed: Tensors, distance: Distance, local: Local):
        self.observed = {k: o.detach() for k, o in observed.items()}
        self.distance, self.local = distance, local
        self.victims, self.rows = list[int](), torch.empty(0)  # the last call's lanes
        self.alone, self.stacked, self.joined = _Alone(model), _Stacked(model), _Joined(model)
        self.size: tuple[float, float] | None = None

    def __call__(
        self,
        images: Float[Tensor, "l b c h w"],
        targets: Float[Tensor, "l b k"],
        victims: list[int],
    ) -> tuple[Float[Tensor, " l"], Float[Tensor, "l b c h w"], Float[Tensor, "l b k"]]:
        """Distance, and its gradients with respect to images and targets.

        Lane i is matched with `victims[i]`.
        """
        way = self.way(images)
        if way == "lanes":
            slopes, told = grad_and_value(self.distance), self.observed
            lanes = [
                self._matched(self.alone, x, t, {k: o[v] for k, o in told.items()}, slopes)
                for x, t, v in zip(images, targets, victims, strict=True)
            ]
            loss, of_images, of_targets = (torch.stack(each) for each in zip(*lanes, strict=True))
            return loss, of_images, of_targets
        if victims != self.victims:  # a copy to the device, which a CUDA graph cannot hold
            self.victims, self.rows = victims, torch.tensor(victims, device=images.device)
        observed = {k: o[self.rows] for k, o in self.observed.items()}
        if way == "stack":
            slopes = vmap(grad_and_value(self.distance), randomness="error")
            return self._matched(self.stacked, images, targets, observed, slopes)
        lane = vmap(grad_and_value(self._distance, (0, 1)), randomness="error")
        (of_images, of_targets), loss = lane(images, targets, observed)
        return loss, of_images, of_targets

    def plain_step(self, images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b k"]) -> None:
        """The products of one lane's double backward through a graph of all local steps.

        Done step by step, to be counted: products do not depend on where the steps have led.
        """
        slope = {k: o[0] for k, o in self.observed.items()}
        guess = {k: s.clone().requires_grad_() for k, s in slope.items()}
        with torch.enable_grad():
            distance = self.distance(guess, slope)
        torch.autograd.grad(distance, list(guess.values()), allow_unused=True)
        for client, _ in self._clients(self.alone, images, targets):
            for step in range(client.steps):
                start = None if step == 0 else slope
                self.alone.pull(start, *client.chunk(step), slope)

    def _matched(
        self, how: _Alone | _Stacked, images: Tensor, targets: Tensor, observed: Tensors, slopes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one lane, or of all with a leading axis, as `how` takes them."""
        clients = list(self._clients(how, images, targets))
        update = _mean(clients)
        slope, loss = slopes(update, observed)
        parts = [c.pull({k: share * s for k, s in slope.items()}) for c, share in clients]
        of_images, of_targets = zip(*parts, strict=True)
        return loss, torch.cat(of_images, -4), torch.cat(of_targets, -2)

    def _distance(self, images: Tensor, targets: Tensor, observed: Tensors) -> Tensor:
        """Of one lane, for torch.func."""
        return self.distance(_mean(self._clients(self.joined, images, targets)), observed)

    def _clients(self, how, images: Tensor, targets: Tensor) -> Iterator[tuple[_Client, float]]:
        """Each client, and its share of the mean."""
        counts = list(self.local.parts or images.shape[-4:-3])
        for x, t in zip(images.split(counts, -4), targets.split(counts, -2), strict=True):
            yield _Client(how, x, t, self.local), x.shape[-4] / sum(counts)

    def way(self, images: Float[Tensor, "l b c h w"]) -> str:
        """How lanes are computed: by shape alone, so that results repeat."""
        counts = self.local.parts or (images.shape[1],)
        if self.size is None:
            self.size = self.joined.size(images[0, : _chunk(max(counts), self.local)])
        operations, held = self.size
        if not images.is_cuda and (len(images) == 1 or operations > SMALL):
            return "lanes"
        steps = len(counts) * (1 if self.local.kind == "gradient" else self.local.steps)
        return "graph" if len(images) * steps * held < SPARE else "stack"


def _chunk(count: int, local: Local) -> int:
    """Images in one local step of a client that has so many."""
    return count if local.kind == "gradient" else min(local.batch or count, count)


class _Client:
    """One client's local steps: where they lead, and back."""

    def __init__(self, how: _Alone | _Stacked, images: Tensor, targets: Tensor, local: Local):
        self.how = how
        # a gradient is the update of one step of length one
        self.lr, self.steps = (1.0, 1) if local.kind == "gradient" else (local.lr, local.steps)
        size = _chunk(images.shape[-4], local)
        self.chunks = list(zip(images.split(size, -4), targets.split(size, -2), strict=True))
        self.every = math.ceil(math.sqrt(self.steps))
        self.kept: list[Tensors | None] = []  # updates so far at each segment's start,
        self.recent: list[Tensors | None] = []  # and at each step of the current segment

    def chunk(self, step: int) -> tuple[Tensor, Tensor]:
        return self.chunks[step % len(self.chunks)]

    def update(self) -> Tensors:
        """Weights before - after all steps."""
        u = None
        for step in range(self.steps):
            if step % self.every == 0:
                self.kept.append(u)
                self.recent = []
            self.recent.append(u)
            u = self._onward(u, step)
        assert u is not None, "at least one step"
        return u

    def pull(self, slope: Tensors) -> tuple[Tensor, Tensor]:
        """From a derivative by the update those by images and targets. Writes to `slope`."""
        found = [(torch.zeros_like(x), torch.zeros_like(t)) for x, t in self.chunks]
        for step in reversed(range(self.steps)):
            if not self.recent:
                self.recent = [self.kept[-1]]
                for earlier in range(step // self.every * self.every, step):
                    self.recent.append(self._onward(self.recent[-1], earlier))
            of_weights, *of_chunk = self.how.pull(self.recent.pop(), *self.chunk(step), slope)
            for total, own in zip(found[step % len(found)], of_chunk, strict=True):
                total.add_(own, alpha=self.lr)
            for k, own in of_weights.items():
                slope[k].sub_(own, alpha=self.lr)
            if not self.recent:
                self.kept.pop()
        of_images, of_targets = zip(*found, strict=True)
        return torch.cat(of_images, -4), torch.cat(of_targets, -2)

    def _onward(self, u: Tensors | None, step: int) -> Tensors:
        g = self.how.gradient(u, *self.chunk(step))
        return {k: self.lr * g[k] if u is None else u[k].add(g[k], alpha=self.lr) for k in g}


def _mean(clients: Iterable[tuple[_Client, float]]) -> Tensors:
    """The clients' updates, each times its share."""
    update: Tensors = {}
    for client, share in clients:
        for k, own in client.update().items():
            update[k] = share * own if k not in update else update[k].add_(own, alpha=share)
    return update


# ---- one step -----------------------------------------------------------------------------------
# gradient(u, x, t): of the loss at weights w - u; u None: at w. pull(u, x, t, s): the derivatives
# of <gradient, s> by the weights (at w nobody asks for them: none), images and targets.


class _Step:
    """What the ways to take one share."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.before = {k: p.detach() for k, p in model.named_parameters()}

    def gradient(self, u: Tensors | None, x: Tensor, t: Tensor) -> Tensors:
        raise NotImplementedError

    def weights(self, u: Tensors | None) -> Tensors:
        return self.before if u is None else {k: w - u[k] for k, w in self.before.items()}

    def loss(self, weights: Tensors, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.model, weights, (x,)), t)


class _Alone(_Step):
    """One lane, by autograd: x [b c h w], u as the weights."""

    def gradient(self, u, x, t):
        return self._gradient(self.leaves(u), x, t, False)

    def pull(self, u: Tensors | None, x: Tensor, t: Tensor, slope: Tensors):
        weights = self.leaves(u)
        x, t = (leaf.detach().requires_grad_() for leaf in (x, t))
        g = self._gradient(weights, x, t, True)
        asked = {} if u is None else weights
        moving = [k for k in g if g[k].requires_grad]  # not those of parameters without effect
        along, of = [slope[k] for k in moving], [g[k] for k in moving]
        leaves = [*asked.values(), x, t]
        *own, of_x, of_t = torch.autograd.grad(of, leaves, along, materialize_grads=True)
        return dict(zip(asked, own, strict=True)), of_x, of_t

    def leaves(self, u: Tensors | None) -> Tensors:
        return {k: w.detach().requires_grad_() for k, w in self.weights(u).items()}

    def _gradient(self, weights: Tensors, x: Tensor, t: Tensor, create_graph: bool) -> Tensors:
        with torch.enable_grad():
            loss, inputs = self.loss(weights, x, t), list(weights.values())
        g = torch.autograd.grad(loss, inputs, create_graph=create_graph, materialize_grads=True)
        return dict(zip(weights, g, strict=True))


class _Joined(_Step):
    """One lane, for torch.func, which keeps the graph of all steps."""

    def gradient(self, u, x, t):
        return grad(self.loss)(self.weights(u), x, t)

    def size(self, x: Float[Tensor, "b c h w"]) -> tuple[float, float]:
        """Operations of a layer's forward pass; about how many bytes the graph has for one step."""
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        weights = {k: w.detach().requires_grad_() for k, w in self.before.items()}
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            operations = 1e9 * flops(lambda: functional_call(self.model, weights, (x,)))
        layers = sum(w.dim() > 1 for w in weights.values())
        # measured on the zoo: 2.3 to 3.6 times what a forward pass keeps, and twice the weights
        held = 3.5 * sum(kept) + 2 * sum(w.nbytes for w in weights.values())
        return operations / max(1, layers), held


class _Stacked(_Step):
    """All lanes, their axis first; weights are shared until the first step.

    Each derivative is taken inside vmap: autograd's, of what vmap returns, is wrong for BatchNorm
    in train mode (PyTorch 2.15).
    """

    def gradient(self, u, x, t):
        own = (None if u is None else 0, 0, 0)
        return vmap(grad(self.loss), own, randomness="error")(self.weights(u), x, t)

    def pull(self, u: Tensors | None, x: Tensor, t: Tensor, slope: Tensors):
        def along(w: Tensors, x: Tensor, t: Tensor, slope: Tensors) -> Tensor:
            return _inner(grad(self.loss)(w, x, t), slope)

        own = (None if u is None else 0, 0, 0, 0)
        asked = (1, 2) if u is None else (0, 1, 2)
        lane = vmap(grad(along, asked), own, randomness="error")
        *of_weights, of_x, of_t = lane(self.weights(u), x, t, slope)
        return of_weights[0] if of_weights else {}, of_x, of_t


def _inner(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[k] * b[k]).sum() for k in a]).sum()

"""R-GAP: recursive gradient attack on privacy."""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedsec import cost, engine
from fedsec.attack import Attack
from fedsec.checks import require
from fedsec.models import last_linear
from fedsec.rgap import chain, heads, walk
from fedsec.types import Local, Reconstruction, Tensors

GRADIENT = Local(kind="gradient", lr=1.0)


@dataclass(frozen=True)
class Found:
    """Of one victim."""

    images: Float[Tensor, "b c h w"]
    label: int  # -1: unknown
    loss: float
    gflop: float
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """The image behind one gradient in closed form, layer by layer (Zhu and Blaschko 2021).

    The last layer's gradient gives its input, the label and the loss's derivative by the logits.
    From there to the image each layer's input solves two linear systems stacked: the weights give
    the layer's output, and the input gives the weights' gradient (fedsec/rgap.py).

    For one image, and an update of one local step whose length need not be known. The objective is
    the relative residual of the update re-computed from the image. Above `residual` the image is
    not the one: it is not found, and grey. So it is where a layer does not determine its input.

    Not in the paper, which has two classes and one output: softmax and its labels, by the last
    bias or by the logarithms of the gradient. The systems are weighted and solved by LSMR, not by a
    pseudo-inverse of the dense matrices; and it works in float64 whatever the update came in.
    """

    weight: float  # of a layer's weights against its gradient in the system, in [1e-6, 1e6]
    iterations: int  # of LSMR for one layer, at most, >= 1
    residual: float  # relative, of the re-computed update: an image is found up to it, in (0, 1)

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        require(1e-6 <= self.weight <= 1e6, "weight", "must be in [1e-6, 1e6]", self.weight)
        require(self.iterations >= 1, "iterations", "must be at least 1", self.iterations)
        require(0 < self.residual < 1, "residual", "must be in (0, 1)", self.residual)

    def check(self, model):
        chain(model)

    def gflop_at_most(self, seen):
        # a layer's system is solved twice, and a step of LSMR is four forward passes
        return 2 * self.iterations * 4 / 3 * cost.update_gflop(seen.model, seen.count, seen.shape)

    def __call__(self, seen, rngs, progress):
        update = seen.sent
        model = copy.deepcopy(seen.model).double()
        found = []
        for v, rng in enumerate(rngs):
            observed = {k: t[v].double() for k, t in update.tensors.items()}
            found.append(self._one(seen, model, observed, rng))
            progress(v + 1, len(rngs), found[-1].loss)
        like = next(seen.model.parameters())
        return Reconstruction(
            torch.stack([f.images for f in found]).to(like),
            torch.tensor([[f.label] * seen.count for f in found], device=like.device),
            torch.tensor([f.loss for f in found], device=like.device, dtype=torch.float64),
            torch.zeros(len(found), dtype=torch.long),
            torch.tensor([f.gflop for f in found], dtype=torch.float64),
            tuple(f.flags for f in found),
        )

    def _one(self, seen, model, observed: Tensors, rng) -> Found:
        """What is found of one victim."""
        ways, spent, why = [], 0.0, "the last layer's gradient is not that of one image"
        if seen.count > 1:
            why = f"{seen.count} images are behind one update, and R-GAP inverts one"
        elif not all(t.isfinite().all() for t in observed.values()):
            why = "the update is not finite"
        else:
            layers, local = chain(model), seen.local if "local" in seen.grants else GRADIENT
            lr = local.lr if local.kind == "fedavg" else 1.0
            for head in heads(layers[-1], observed, lr):
                way = walk(layers, head, observed, seen.shape, self.weight, self.iterations, rng)
                spent += way.gflop
                why = f"{way.stuck} does not determine its input"
                if way.image is not None:
                    image = (way.image * model.normalise.std + model.normalise.mean).clamp(0, 1)
                    target = F.one_hot(torch.tensor([head.label]), len(head.dz)).to(image)
                    loss, gflop = _residual(model, image, target, head.scale, observed)
                    ways.append(Found(image, head.label, loss, gflop))
        ways.sort(key=lambda f: f.loss)
        spent += sum(f.gflop for f in ways)
        if ways and ways[0].loss <= self.residual:
            twin = len(ways) > 1 and ways[1].loss <= self.residual
            flags = ("another image sends the same update: the last layer allows two",) * twin
            return replace(ways[0], gflop=spent, flags=flags)
        if ways:
            why = f"the image it leads to sends another update, residual {ways[0].loss:.2g}"
        grey = torch.full((seen.count, *seen.shape), 0.5).to(next(model.parameters()))
        even = torch.full_like(model(grey), 1 / last_linear(model)[1].out_features)
        loss, gflop = _residual(model, grey, even, 1.0, observed)
        return Found(grey, -1, loss, spent + gflop, (f"not found: {why}",))


def _residual(model, images, targets, scale: float, observed: Tensors) -> tuple[float, float]:
    """How far the re-computed update is, over the longer one's length, at most 2; and its GFLOP."""
    again: list[Tensors] = []
    spent = cost.flops(lambda: again.append(engine.simulate(model, images, targets, GRADIENT)))
    pairs = [(scale * again[0][k].flatten(), observed[k].flatten()) for k in observed]
    guess, sent = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    length = torch.maximum(guess.norm(), sent.norm()).clamp_min(1e-300)
    return float(((guess - sent).norm() / length).nan_to_num(2.0)), spent

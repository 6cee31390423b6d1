"""R-GAP: recursive gradient attack on privacy."""

import copy
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from fedsec import cost, solve
from fedsec.attack import Attack
from fedsec.checks import at_least, require
from fedsec.models import last_linear
from fedsec.rgap import chain, heads, residual, walk
from fedsec.solve import Found


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
        at_least(self, 1, "iterations")
        require(0 < self.residual < 1, "residual", "must be in (0, 1)", self.residual)

    def check(self, model):
        chain(model)

    def gflop_at_most(self, seen):
        # a layer's system is solved twice, and a step of LSMR is four forward passes
        return 2 * self.iterations * 4 / 3 * cost.update_gflop(seen.model, seen.count, seen.shape)

    def __call__(self, seen, rngs, progress):
        like, model = next(seen.model.parameters()), copy.deepcopy(seen.model).double()

        def one(update, v):
            observed = {k: t.double() for k, t in update.items()}
            found = self._walked(seen, model, observed, rngs[v])
            return replace(found, images=found.images.to(like))

        return solve.each(seen, rngs, progress, one, counts=False)  # LSMR's steps: see `walk`

    def _walked(self, seen, model, observed, rng) -> Found:
        """The image that the last layer's gradient leads to, or grey and why."""
        ways, spent, why = [], 0.0, "the last layer's gradient is not that of one image"
        if seen.count > 1:
            why = f"{seen.count} images are behind one update, and R-GAP inverts one"
        elif not solve.finite(observed):
            why = "the update is not finite"
        else:
            layers, local = chain(model), seen.step
            lr = local.lr if local.kind == "fedavg" else 1.0
            for head in heads(layers[-1], observed, lr):
                way = walk(layers, head, observed, seen.shape, self.weight, self.iterations, rng)
                spent += way.gflop
                why = f"{way.stuck} does not determine its input"
                if way.image is not None:
                    image = (way.image * model.normalise.std + model.normalise.mean).clamp(0, 1)
                    label = torch.tensor([head.label], device=image.device)
                    target = F.one_hot(label, len(head.dz)).to(image)
                    loss, gflop = residual(model, image, target, head.scale, observed)
                    ways.append(Found(image, label, loss, gflop=gflop))
        ways.sort(key=lambda f: float(f.loss))
        spent += sum(f.gflop for f in ways)
        if ways and ways[0].loss <= self.residual:
            twin = len(ways) > 1 and bool(ways[1].loss <= self.residual)
            flags = ("another image sends the same update: the last layer allows two",) * twin
            return replace(ways[0], gflop=spent, flags=flags)
        if ways:
            why = f"the image it leads to sends another update, residual {ways[0].loss:.2g}"
        grey = solve.none(seen, observed, f"not found: {why}")
        even = torch.full_like(model(grey.images), 1 / last_linear(model)[1].out_features)
        loss, gflop = residual(model, grey.images, even, 1.0, observed)
        return replace(grey, loss=loss, gflop=spent + gflop)

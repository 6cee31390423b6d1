"""The exact gradient of a matching objective, layer by layer: no graph, and lanes share products.

With v the distance's derivative at the current weight gradients, held constant, the derivative of
the distance with respect to the images is that of h = d/de loss(weights + e v), the directional
derivative of the loss. Four sweeps over the layers give it: values, then derivatives of the loss
(forward, backward: the weight gradients), then values and derivatives of h (tangent, adjoint).

Activations are [b * l, c, h, w], the images' axis outside the lanes': a view [b, l * c, h, w] gives
grouped convolutions (one weight for each lane) and BatchNorm (one statistic for each lane).

Cosine-like distances need only inner products of weight gradients. Where a map has few positions p,
they come from Gram matrices, p x p, and the weight gradient itself is never formed: with U the
unfolded input and D the output's derivative, g = D U', |g|^2 = <U'U, D'D>, g U = D (U'U),
g' D = U (D'D). For any other distance every weight gradient is formed, and autograd gives v.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from fedsec.models import BatchNorm2d, Normalise, Pad
from fedsec.types import Tensors
from fedsec.unroll import Distance

aten = torch.ops.aten


class Unsupported(Exception):
    """The model is not a plain sequence of the layers known here: the message says where."""


# ---- distances ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """A distance that is a function of <guess, observed>, |guess|^2 and |observed|^2, lane by lane.

    Its derivative is v = 2 d/d|g|^2 g + d/d<g, o> o. Where inner products are not accurate enough,
    as for a difference that goes to zero, `exact` has the value from v, [l n], and nothing is left
    to Gram matrices.
    """

    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor] | None = None

    def __call__(self, dot: Tensor, norm: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, factor of the guess, factor of the observed: each [l]."""
        with torch.enable_grad():
            dot, norm = dot.detach().requires_grad_(), norm.detach().requires_grad_()
            value = self.value(dot, norm, target)
            b, a = torch.autograd.grad(value.sum(), (dot, norm))
        return value.detach(), 2 * a, b


SQUARED = Inner(
    lambda dot, norm, target: norm - 2 * dot + target, exact=lambda v: v.square().sum(1) / 4
)
RELATIVE = Inner(lambda dot, norm, target: (norm - 2 * dot + target) / target.clamp_min(1e-30))
COSINE = Inner(lambda dot, norm, target: 1 - dot / (norm * target).clamp_min(1e-30).sqrt())


# ---- what a sweep shares ------------------------------------------------------------------------


class Sweep:
    """One step's lanes, and the weight gradients and directions by parameter name."""

    def __init__(
        self, count: int, lanes: int, observed: Tensors, victims: list[int], told: Tensor,
        grams: bool,
    ):  # fmt: skip
        self.b, self.l = count, lanes
        self.observed = observed  # by name: [v, ...]
        self.victims = victims  # of each lane; the same ones are neighbours
        self.told = told  # the same as an index on the device
        self.grams = grams
        self.g: Tensors = {}  # by name: [l, ...]
        self.v: Tensors = {}
        self.dot = self.norm = torch.zeros(())  # [l], what Gram layers contribute
        self.wide = next(iter(observed.values())).dtype  # of sums
        self.a = self.o = torch.empty(0)  # [l], factors of the guess and of the observed

    def by_lane(self, x: Tensor) -> Tensor:
        """[b l, ...] -> [b, l, ...]"""
        return x.view(self.b, self.l, *x.shape[1:])

    def grouped(self, x: Tensor) -> Tensor:
        """[b l, c, ...] -> [b, l c, ...]"""
        return x.view(self.b, self.l * x.shape[1], *x.shape[2:])

    def runs(self) -> list[tuple[int, slice]]:
        """Each victim with its run of lanes."""
        runs, start = [], 0
        for end in range(1, self.l + 1):
            if end == self.l or self.victims[end] != self.victims[start]:
                runs.append((self.victims[start], slice(start, end)))
                start = end
        return runs

    def per_run(self, product: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """`product(victim, its rows)` over [b l, ...], whose rows keep their order."""
        runs = self.runs()
        if len(runs) == 1:
            return product(runs[0][0], x)
        lanes = self.by_lane(x)
        parts = []
        for victim, run in runs:
            rows = lanes[:, run]
            out = product(victim, rows.reshape(-1, *x.shape[1:]))
            parts.append(out.view(*rows.shape[:2], *out.shape[1:]))
        return torch.cat(parts, 1).flatten(0, 1)

    def each(self, x: Tensor) -> list[Tensor]:
        """[b l, ...] -> l times [b, ...], contiguous"""
        return [lane.contiguous() for lane in self.by_lane(x).unbind(1)]

    def joined(self, lanes: list[Tensor]) -> Tensor:
        """The inverse of `each`."""
        return torch.stack(lanes, 1).flatten(0, 1)

    def lanewise(self, factor: Tensor, x: Tensor) -> Tensor:
        """[l] times [b l, ...]"""
        return (self.by_lane(x) * factor.view(1, -1, *[1] * (x.dim() - 1))).flatten(0, 1)


# ---- layers -------------------------------------------------------------------------------------
# forward(s, x) -> y; backward(s, G) -> G of x; tangent(s, t) -> t of y; adjoint(s, A) -> A of x.
# G, A: derivatives of the loss and of h. t None: the direction does not reach x. `wanted` False:
# nobody asks for G of x.


class Layer:
    name = ""  # of the module whose parameters it has
    normed = ""  # of another, whose parameters it has as well
    wanted = True
    fresh = False  # whether it keeps what it returns to itself: others may write to it

    def forward(self, s: Sweep, x: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, s: Sweep, G: Tensor) -> Tensor | None:
        raise NotImplementedError

    def tangent(self, s: Sweep, t) -> Tensor | None:  # after a weight t is a tensor
        raise NotImplementedError

    def adjoint(self, s: Sweep, A: Tensor) -> Tensor:
        return self.backward(s, A)  # type: ignore[return-value]


class Joining(Layer):
    """Becomes part of the layer whose output it alone reads."""

    def join(self, before: Layer | None) -> None:
        """Raises Unsupported."""
        raise NotImplementedError


class Conv(Layer):
    """Convolution with one weight for all lanes; gradients and directions for each lane.

    Four ways, chosen by shape alone so that results repeat: maps of few positions by Gram matrices;
    few or odd channels as products with the unfolded input; small weights as one grouped
    convolution over lanes; and lane by lane, whose arithmetic pays for the loop.
    """

    fresh = True

    def __init__(self, module: nn.Conv2d, name: str):
        if module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise Unsupported(f"{name} has groups, or padding other than a number of zeros")
        self.name = name
        self.weight = module.weight.detach()
        self.bias = None if module.bias is None else module.bias.detach()
        self.how = (module.stride, module.padding, module.dilation)
        out, into = self.weight.shape[:2]
        self.unfolds = out % 16 > 0 or into % 16 > 0
        self.small = self.weight.numel() <= 150_000
        simple = self.how[0] == (1, 1) and self.how[2] == (1, 1) and not self.unfolds
        self.turned = self.weight.flip(2, 3).transpose(0, 1).contiguous() if simple else None

    def conv(self, x: Tensor, weight: Tensor, groups: int = 1, bias=None) -> Tensor:
        return F.conv2d(x, weight, bias, *self.how, groups)

    def back(self, G: Tensor, x: Tensor, weight: Tensor, mask, groups: int = 1):
        how = (list(h) for h in self.how)
        return aten.convolution_backward(G, x, weight, [0], *how, False, [0, 0], groups, mask)

    def back_shared(self, G: Tensor) -> Tensor:
        if self.turned is not None:  # the same, without turning the weights in every step
            reach = [k - 1 - p for k, p in zip(self.weight.shape[2:], self.how[1], strict=True)]
            return F.conv2d(G, self.turned, None, 1, reach)
        return self.back(G, self.x, self.weight, [True, False, False])[0]

    def unfold(self, x: Tensor) -> Tensor:
        """F.unfold, twice as fast."""
        (down, across), (top, left), dilation = self.how
        if dilation != (1, 1):
            return F.unfold(x, self.weight.shape[2:], dilation, self.how[1], self.how[0])
        height, width = self.weight.shape[2:]
        x = F.pad(x, (left, left, top, top)).unfold(2, height, down).unfold(3, width, across)
        n, c, rows, columns = x.shape[:4]
        return x.permute(0, 1, 4, 5, 2, 3).reshape(n, c * height * width, rows * columns)

    def fold(self, columns: Tensor) -> Tensor:
        stride, padding, dilation = self.how
        shape, size = self.x.shape[2:], self.weight.shape[2:]
        return F.fold(columns, shape, size, dilation, padding, stride)

    def forward(self, s, x):
        self.x = x
        out, fan = len(self.weight), self.weight[0].numel()
        size = [
            (n + 2 * p - d * (k - 1) - 1) // t + 1
            for n, k, t, p, d in zip(x.shape[2:], self.weight.shape[2:], *self.how, strict=True)
        ]
        positions = s.b * size[0] * size[1]
        self.gram = s.grams and positions * (out + fan) * 2.5 < out * fan
        fits = s.b <= 4 and s.l * positions * fan <= 2**19  # beyond, unfolding costs more
        self.way = "gram" if self.gram else "columns" if self.unfolds and fits else "lanes"
        if self.way == "lanes" and s.l > 1 and self.small:
            self.way = "groups"
        if self.way != "columns":
            return self.conv(x, self.weight, bias=self.bias)
        self.U = self.unfold(x)
        y = torch.matmul(self.weight.flatten(1), self.U)
        if self.bias is not None:
            y += self.bias[:, None]
        return y.view(len(x), out, *size)

    def backward(self, s, G):
        self.G = G
        if self.bias is not None:
            s.g[self.name + ".bias"] = s.by_lane(G).sum((0, 3, 4))
        if self.gram:
            self._gram_backward(s, G)
        else:
            s.g[self.name + ".weight"] = self._weight_gradient(s, G)
        if not self.wanted:
            return None
        if self.way == "columns":
            return self.fold(torch.matmul(self.weight.flatten(1).T, G.flatten(2)))
        return self.back_shared(G)

    def _weight_gradient(self, s, G):
        shape, only = self.weight.shape, [False, True, False]
        if self.way == "columns":
            return s.by_lane(G.flatten(2) @ self.U.mT).sum(0).view(s.l, *shape)
        if s.l == 1:
            return self.back(G, self.x, self.weight, only)[1][None]
        if self.way == "groups":
            like = self.weight.new_empty(()).expand(s.l * shape[0], *shape[1:])
            out = self.back(s.grouped(G), s.grouped(self.x), like, only, s.l)[1]
            return out.view(s.l, *shape)
        pairs = zip(s.each(G), s.each(self.x), strict=True)
        return torch.stack([self.back(g, x, self.weight, only)[1] for g, x in pairs])

    def tangent(self, s, t):
        y = self._gram_tangent(s) if self.gram else self._direction(s)
        if self.bias is not None:
            s.by_lane(y).add_(s.v[self.name + ".bias"][None, :, :, None, None])
        if t is None:
            return y
        return y.add_(self.conv(t, self.weight))

    def _direction(self, s):
        v, x = s.v[self.name + ".weight"], self.x
        if self.way == "columns":
            return torch.matmul(v.flatten(2), s.by_lane(self.U)).view(self.G.shape)
        if s.l == 1:
            return self.conv(x, v[0])
        if self.way == "groups":
            return self.conv(s.grouped(x), v.flatten(0, 1), s.l).view(self.G.shape)
        return s.joined([self.conv(x, w) for x, w in zip(s.each(x), v, strict=True)])

    def adjoint(self, s, A):
        if self.way == "columns":
            v = s.v[self.name + ".weight"].flatten(2)
            columns = torch.matmul(v.mT, s.by_lane(self.G.flatten(2))).flatten(0, 1)
            return self.fold(columns.add_(torch.matmul(self.weight.flatten(1).T, A.flatten(2))))
        Ax = self.back_shared(A)
        return Ax.add_(self._gram_adjoint(s) if self.gram else self._direction_back(s))

    def _direction_back(self, s):
        v, only = s.v[self.name + ".weight"], [True, False, False]
        if s.l == 1:
            return self.back(self.G, self.x, v[0], only)[0]
        if self.way == "groups":
            out = self.back(s.grouped(self.G), s.grouped(self.x), v.flatten(0, 1), only, s.l)[0]
            return out.view_as(self.x)
        lanes = zip(s.each(self.G), s.each(self.x), v, strict=True)
        return s.joined([self.back(g, x, w, only)[0] for g, x, w in lanes])

    # maps of few positions: the weight gradient only as Gram matrices

    def _columns(self, s, x):
        """[b l, k, p] -> [l, k, b p]"""
        return s.by_lane(x).permute(1, 2, 0, 3).flatten(2)

    def _gram_backward(self, s, G):
        self.U = self._columns(s, self.unfold(self.x))
        self.D = self._columns(s, G.flatten(2))
        self.UU, self.DD = self.U.mT @ self.U, self.D.mT @ self.D
        s.norm = s.norm + (self.UU * self.DD).sum((1, 2))
        observed = s.observed[self.name + ".weight"]
        self.along = s.per_run(lambda victim, x: self.conv(x, observed[victim]), self.x)
        s.dot = s.dot + s.by_lane(self.along * G).sum((0, 2, 3, 4))

    def _gram_tangent(self, s):
        own = self.D @ self.UU  # [l, out, b p]
        own = own.view(*own.shape[:2], s.b, -1).permute(2, 0, 1, 3).reshape(self.G.shape)
        return s.lanewise(s.a, own).add_(s.lanewise(s.o, self.along))

    def _gram_adjoint(self, s):
        own = (self.U @ self.DD) * s.a[:, None, None]
        own = own.view(*own.shape[:2], s.b, -1).permute(2, 0, 1, 3).flatten(0, 1)
        Ax = self.fold(own)
        observed, only = s.observed[self.name + ".weight"], [True, False, False]

        def back(victim, G):
            x = self.x[: len(G)]  # its shape is all that matters
            return self.back(G, x, observed[victim], only)[0]

        return Ax.add_(s.per_run(back, s.lanewise(s.o, self.G)))


class Linear(Layer):
    """Fully connected; the rows of a lane are its images."""

    fresh = True

    def __init__(self, module: nn.Linear, name: str):
        self.name, self.weight, self.bias = name, module.weight.detach(), module.bias

    def forward(self, s, x):
        self.x = x
        self.gram = s.grams
        return F.linear(x, self.weight, self.bias)

    def backward(self, s, G):
        self.G = G
        self.X, self.D = s.by_lane(self.x).transpose(0, 1), s.by_lane(G).transpose(0, 1)  # [l b .]
        if self.bias is not None:
            s.g[self.name + ".bias"] = self.D.sum(1)
        if self.gram:
            self.XX, self.DD = self.X @ self.X.mT, self.D @ self.D.mT  # [l b b]
            s.norm = s.norm + (self.XX * self.DD).sum((1, 2))
            observed = s.observed[self.name + ".weight"]
            self.along = s.per_run(lambda victim, x: x @ observed[victim].T, self.x)
            s.dot = s.dot + s.by_lane(self.along * G).sum((0, 2))
        else:
            s.g[self.name + ".weight"] = self.D.mT @ self.X
        return G @ self.weight if self.wanted else None

    def tangent(self, s, t):
        if self.gram:
            own = (self.XX @ self.D).transpose(0, 1).reshape(self.G.shape)
            y = s.lanewise(s.a, own).add_(s.lanewise(s.o, self.along))
        else:
            y = (self.X @ s.v[self.name + ".weight"].mT).transpose(0, 1).reshape(self.G.shape)
        if self.bias is not None:
            y = (s.by_lane(y) + s.v[self.name + ".bias"]).flatten(0, 1)
        return y if t is None else y.addmm_(t, self.weight.T)

    def adjoint(self, s, A):
        if self.gram:
            own = (self.DD @ self.X).transpose(0, 1).reshape(self.x.shape)
            observed = s.observed[self.name + ".weight"]
            scaled = s.lanewise(s.o, self.G)
            out = s.lanewise(s.a, own)
            out += s.per_run(lambda victim, G: G @ observed[victim], scaled)
        else:
            out = (self.D @ s.v[self.name + ".weight"]).transpose(0, 1).reshape(self.x.shape)
        return out.addmm_(A, self.weight)


def _column(p: Tensor, x: Tensor) -> Tensor:
    """[c] or [l c] so that it broadcasts over [.., c or l c, ...]"""
    return p.reshape(-1, *[1] * (x.dim() - 2))


class Norm(Layer):
    """y = weight z + bias, z = (x - mean) r: what BatchNorm and GroupNorm share."""

    fresh = True
    X: Tensor  # the last input, as `sets`; its means and reciprocal deviations
    mean: Tensor
    r: Tensor

    def __init__(self, module: nn.BatchNorm2d | nn.GroupNorm, name: str):
        if module.weight is None or module.bias is None:
            raise Unsupported(f"{name} has no weights")
        self.name = name
        self.weight, self.bias, self.eps = module.weight.detach(), module.bias.detach(), module.eps

    def sets(self, s: Sweep, x: Tensor) -> Tensor:
        """A view of [b l, c, ...] whose middle axis counts what is normalised together."""
        raise NotImplementedError

    def project(self, s: Sweep, u: Tensor, weight: Tensor | None, mask=(True, True, False)):
        """weight r P(u), and over each set the sums of u z and of u.

        P(u) = u - mean(u) - z mean(u z) is symmetric,
        and r P(t) is the derivative of z along t.
        """
        out, dot, total = aten.native_batch_norm_backward(
            self.sets(s, u), self.X, weight, None, None, self.mean, self.r, True, self.eps, mask
        )
        return out.view(u.shape), dot, total

    def keep(self, s, dot: Tensor, total: Tensor) -> None:
        """The parameters' gradients, from [l c]: sums of G z and of G."""
        s.g[self.name + ".weight"], s.g[self.name + ".bias"] = (
            p.view(s.l, -1) for p in (dot, total)
        )


class FixedNorm(Norm):
    """BatchNorm in eval mode: a scale and a shift for each channel."""

    def __init__(self, module: nn.BatchNorm2d, name: str):
        super().__init__(module, name)
        if module.running_mean is None or module.running_var is None:
            raise Unsupported(f"{name} has no running statistics")
        self.at, self.var = module.running_mean, module.running_var
        self.r = (self.var + self.eps).rsqrt()
        self.scale = self.weight * self.r
        self.shift = self.bias - self.at * self.scale
        self.lanes = 0

    def forward(self, s, x):
        self.x = x
        if self.lanes != s.l:
            repeated = (self.weight, self.at, self.var, self.r)
            self.lanes, self.wide = s.l, [p.repeat(s.l) for p in repeated]
        return torch.addcmul(_column(self.shift, x), x, _column(self.scale, x))

    def backward(self, s, G):
        self.G = G
        weight, at, var, _ = self.wide
        x, all3 = s.grouped(self.x), [True] * 3
        out, dot, total = aten.native_batch_norm_backward(
            s.grouped(G), x, weight, at, var, None, None, False, self.eps, all3
        )
        self.keep(s, dot, total)
        return out.view(G.shape)

    def tangent(self, s, t):
        _, at, _, r = self.wide
        self.k = s.v[self.name + ".weight"].flatten() * r
        shift = s.v[self.name + ".bias"].flatten() - self.k * at
        x = s.grouped(self.x)
        y = torch.addcmul(_column(shift, x), x, _column(self.k, x)).view(t.shape)
        return y.addcmul_(t, _column(self.scale, t))

    def adjoint(self, s, A):
        G, out = s.grouped(self.G), A * _column(self.scale, A)
        s.grouped(out).addcmul_(G, _column(self.k, G))
        return out


class BatchNorm(Norm):
    """BatchNorm in train mode: statistics of the lane's own batch; one set a lane and channel."""

    def sets(self, s, x):
        return x.reshape(s.b, s.l * x.shape[1], -1)

    def forward(self, s, x):
        self.X, self.wide = self.sets(s, x), self.weight.repeat(s.l)
        bias = self.bias.repeat(s.l)
        y, self.mean, self.r = torch.native_batch_norm(
            self.X, self.wide, bias, None, None, True, 0, self.eps
        )
        self.m = self.X.shape[0] * self.X.shape[2]
        return y.view(x.shape)

    def backward(self, s, G):
        self.G = G
        self.Q, self.gz, total = self.project(s, G, torch.ones_like(self.r), [True] * 3)
        self.keep(s, self.gz, total)
        return self.Q * _column(self.weight, G)

    def tangent(self, s, t):
        self.T, self.tz, _ = self.project(s, t, self.wide)
        self.v = s.v[self.name + ".weight"].flatten()
        k = self.v * self.r
        shift = s.v[self.name + ".bias"].flatten() - k * self.mean
        y = torch.addcmul(shift[:, None], self.X, k[:, None])
        return y.add_(self.sets(s, self.T)).view(t.shape)

    def adjoint(self, s, A):
        out, _, _ = self.project(s, A, self.wide, [True, False, False])
        T, r = self.sets(s, self.T), self.r / self.m
        spread = (self.sets(s, self.G) * T).sum((0, 2))
        k = r * spread * self.r
        y = torch.addcmul((k * self.mean)[:, None], self.X, -k[:, None])
        y.addcmul_(self.sets(s, self.Q), (self.v - r * self.tz * self.wide)[:, None])
        y.addcmul_(T, -(r * self.gz)[:, None])
        return y.add_(self.sets(s, out)).view(A.shape)


class GroupNorm(Norm):
    """Statistics of each image's groups of channels; one set an image and group."""

    def __init__(self, module: nn.GroupNorm, name: str):
        super().__init__(module, name)
        self.groups = module.num_groups

    def sets(self, s, x):
        return x.reshape(1, len(x) * self.groups, -1)

    def forward(self, s, x):
        self.X = self.sets(s, x)
        z, self.mean, self.r = torch.native_batch_norm(
            self.X, None, None, None, None, True, 0, self.eps
        )
        self.z, self.ones, self.m = z.view(x.shape), torch.ones_like(self.r), self.X.shape[2]
        return torch.addcmul(_column(self.bias, x), self.z, _column(self.weight, x))

    def backward(self, s, G):
        self.G, rest = G, (0, *range(3, G.dim() + 1))
        s.g[self.name + ".bias"] = s.by_lane(G).sum(rest)
        s.g[self.name + ".weight"] = s.by_lane(G * self.z).sum(rest)
        self.u = G * _column(self.weight, G)
        self.Q, self.uz, _ = self.project(s, self.u, self.ones)
        return self.Q

    def tangent(self, s, t):
        self.T, self.tz, _ = self.project(s, t, self.ones)
        z = s.grouped(self.z)
        v, shift = (s.v[self.name + end].flatten() for end in (".weight", ".bias"))
        y = torch.addcmul(_column(shift, z), z, _column(v, z)).view(t.shape)
        return y.addcmul_(self.T, _column(self.weight, t))

    def adjoint(self, s, A):
        u, G = A * _column(self.weight, A), s.grouped(self.G)
        s.grouped(u).addcmul_(G, _column(s.v[self.name + ".weight"].flatten(), G))
        out = self.sets(s, self.project(s, u, self.ones, [True, False, False])[0])
        T, r = self.sets(s, self.T), self.r / self.m
        spread = (self.sets(s, self.u) * T).sum((0, 2))
        out.addcmul_(self.sets(s, self.z), -(r * spread)[:, None])
        out.addcmul_(self.sets(s, self.Q), -(r * self.tz)[:, None])
        return out.addcmul_(T, -(r * self.uz)[:, None]).view(A.shape)


def batch_norm(module: nn.BatchNorm2d, name: str) -> Norm:
    return BatchNorm(module, name) if module.training else FixedNorm(module, name)


class ReLU(Layer):
    alone = False  # nobody else reads what comes in

    def forward(self, s, x):
        self.y = x.relu_() if self.alone else x.relu()
        return self.y

    def backward(self, s, G):
        return aten.threshold_backward(G, self.y, 0)

    def tangent(self, s, t):
        if self.alone:
            return aten.threshold_backward.grad_input(t, self.y, 0, grad_input=t)
        return aten.threshold_backward(t, self.y, 0)


class Sigmoid(Layer):
    def forward(self, s, x):
        self.y = x.sigmoid()
        return self.y

    def backward(self, s, G):
        self.G = G
        return aten.sigmoid_backward(G, self.y)

    def tangent(self, s, t):
        self.t = aten.sigmoid_backward(t, self.y)
        return self.t

    def adjoint(self, s, A):
        bend = torch.addcmul(self.t, self.t, self.y, value=-2)  # second derivative along t
        return aten.sigmoid_backward(A, self.y).addcmul_(self.G, bend)


class MaxPool(Layer):
    def __init__(self, module: nn.MaxPool2d):
        self.module = module

    def forward(self, s, x):
        m, self.shape = self.module, x.shape
        y, self.chosen = F.max_pool2d(
            x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, return_indices=True
        )
        return y

    def backward(self, s, G):
        flat = G.new_zeros(*self.shape[:2], self.shape[2:].numel())
        return flat.scatter_add_(2, self.chosen.flatten(2), G.flatten(2)).view(self.shape)

    def tangent(self, s, t):
        return t.flatten(2).gather(2, self.chosen.flatten(2)).view(self.chosen.shape)


class Fixed(Layer):
    """A linear map without parameters."""

    def __init__(self, there: Callable, back: Callable):
        self.there, self.back = there, back

    def forward(self, s, x):
        self.shape = x.shape
        return self.there(x)

    def backward(self, s, G):
        return self.back(G, self.shape)

    def tangent(self, s, t):
        return None if t is None else self.there(t)


def flatten() -> Fixed:
    return Fixed(lambda x: x.flatten(1), lambda G, shape: G.reshape(shape))


def mean() -> Fixed:
    return Fixed(
        lambda x: x.mean((2, 3)),
        lambda G, shape: (G / (shape[2] * shape[3]))[:, :, None, None].expand(shape).contiguous(),
    )


def pad(module: Pad) -> Fixed:
    def back(G, shape):
        out = G.new_zeros(shape)
        out[:, :, ::2, ::2] = G[:, module.channels : G.shape[1] - module.channels]
        return out

    return Fixed(module, back)


class Affine(Fixed):
    """(x - mean) / std: the first thing that happens to the images."""

    def __init__(self, module: Normalise):
        super().__init__(module, lambda G, shape: G / module.std)
        self.std = module.std

    def tangent(self, s, t):
        return None if t is None else t / self.std


Kinds = Mapping[type[nn.Module], Callable[[Any, str], Layer]]  # of modules with parameters
PARAMETRIC: Kinds = {
    nn.Conv2d: Conv,
    nn.Linear: Linear,
    nn.BatchNorm2d: batch_norm,
    BatchNorm2d: batch_norm,
    nn.GroupNorm: GroupNorm,
}
PLAIN = {
    nn.ReLU: lambda module: ReLU(),
    nn.Sigmoid: lambda module: Sigmoid(),
    nn.MaxPool2d: MaxPool,
    Normalise: Affine,
    Pad: pad,
}
FUNCTIONS = {F.relu: ReLU, torch.relu: ReLU, torch.sigmoid: Sigmoid}
METHODS = {("flatten", (1,)): flatten, ("mean", ((2, 3),)): mean}


# ---- the program --------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Passes for the tensor that it stands for, where a forward checks its argument."""

    @property
    def __class__(self):  # type: ignore[override]
        return Tensor


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a):
        return a.node if type(a) is _Proxy else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in PARAMETRIC or type(m) in PLAIN
        return known or super().is_leaf_module(m, module_qualified_name)


class Program:
    """A model as a list of layers, each with its inputs: slot 0 has the images, slot i the output
    of layer i - 1. None stands for a sum. Raises Unsupported.
    """

    def __init__(self, model: nn.Module, kinds: Kinds = PARAMETRIC):
        self.steps: list[tuple[Layer | None, tuple[int, ...]]] = []
        self.carries = [False]  # whether a slot is downstream of a parameter
        self.names = [k for k, _ in model.named_parameters()]
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if module._forward_hooks or module._forward_pre_hooks:
                raise Unsupported(f"{name} has hooks")
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # whatever a foreign forward raises on being traced
            raise Unsupported(f"cannot be traced: {error}") from error
        slots: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                if slots:
                    raise Unsupported("more inputs than the images")
                slots[node] = 0
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise Unsupported("more outputs than the logits")
                self.out = slots[node.args[0]]
            else:
                inputs = tuple(slots[a] for a in node.all_input_nodes)
                layer = _layer(node, modules, kinds)
                if isinstance(layer, Joining):
                    if len(node.all_input_nodes[0].users) > 1 or inputs[0] == 0:
                        raise Unsupported(f"{layer.name} does not follow a layer")
                    layer.join(self.steps[inputs[0] - 1][0])
                    layer = "same"
                slots[node] = inputs[0] if isinstance(layer, str) else self._append(layer, inputs)
        layers = [layer for layer, _ in self.steps if layer]
        used = [name for layer in layers for name in (layer.name, layer.normed) if name]
        if len(used) > len(set(used)):
            raise Unsupported("a layer is used twice")
        known = {f"{n}.{p}" for n in used for p, _ in modules[n].named_parameters(recurse=False)}
        if known != set(self.names):
            raise Unsupported("parameters outside the layers, or shared")
        for layer, inputs in self.steps:
            if isinstance(layer, ReLU) and inputs[0] > 0:
                readers = sum(inputs[0] in others for _, others in self.steps)
                made_by = self.steps[inputs[0] - 1][0]
                layer.alone = readers == 1 and (made_by is None or made_by.fresh)

    def _append(self, layer: Layer | None, inputs: tuple[int, ...]) -> int:
        """The slot of its output."""
        carried = [self.carries[i] for i in inputs]
        if layer is not None:
            layer.wanted = carried[0]
            if not carried[0] and isinstance(layer, Norm | ReLU | Sigmoid | MaxPool):
                raise Unsupported("a layer that is not linear comes before all weights")
        self.steps.append((layer, inputs))
        self.carries.append(any(carried) or bool(layer and layer.name))
        return len(self.steps)

    def down(self, s: Sweep, kind: str, seed: Tensor | None) -> Tensor:
        """`forward` or `tangent` of every layer, first to last."""
        values = [seed]
        for layer, inputs in self.steps:
            if layer is None:
                a, b = (values[i] for i in inputs)
                values.append(_sum(a, b))
            else:
                values.append(getattr(layer, kind)(s, values[inputs[0]]))
        out = values[self.out]
        assert out is not None, "the output is downstream of a parameter"
        return out

    def up(self, s: Sweep, kind: str, seed: Tensor) -> Tensor | None:
        """`backward` or `adjoint` of every layer, last to first."""
        values: list[Tensor | None] = [None] * (len(self.steps) + 1)
        values[self.out] = seed
        everywhere = kind == "adjoint"
        for at in range(len(self.steps), 0, -1):
            (layer, inputs), G = self.steps[at - 1], values[at]
            values[at] = None
            if G is None:  # its output is not read
                continue
            if layer is None:
                outs = [G] * len(inputs)
            elif everywhere or self.carries[inputs[0]] or layer.name:
                outs = [getattr(layer, kind)(s, G)]
            else:
                continue
            for i, out in zip(inputs, outs, strict=True):
                if out is not None:
                    before = values[i]
                    values[i] = out if before is None else before + out
        return values[0]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is not None and b is not None:
        return a + b
    only = b if a is None else a
    return None if only is None else only.clone()  # what reads the sum may write to it


def _layer(node: fx.Node, modules: dict[str, nn.Module], kinds: Kinds) -> Layer | str | None:
    """What a node of the graph does; None: it adds two; "same": nothing. Raises Unsupported."""
    alone = len(node.all_input_nodes) == 1
    if node.op == "call_module" and alone and not node.kwargs:
        name = str(node.target)
        module = modules[name]
        if getattr(module, "inplace", False) and len(node.all_input_nodes[0].users) > 1:
            raise Unsupported(f"{name} changes what others read")
        if type(module) is nn.Identity:
            return "same"
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return flatten()
        if type(module) in kinds:
            return kinds[type(module)](module, name)
        if type(module) in PLAIN:
            return PLAIN[type(module)](module)
    if node.op == "call_function":
        if node.target is operator.add and len(node.all_input_nodes) == 2:
            return None
        if node.target in FUNCTIONS and len(node.args) == 1:
            if node.kwargs.get("inplace", False):
                raise Unsupported("a function in place")
            return FUNCTIONS[node.target]()  # type: ignore[index]
    if node.op == "call_method" and alone and not node.kwargs:
        for method, layer in METHODS.items():
            if method == (node.target, tuple(node.args[1:])):
                return layer()
    raise Unsupported(f"{node.op} {node.target}")


class LaneStep:
    """The distance of each lane's update from its victim's, and its gradients, for one model.

    The update is one gradient of the mean cross-entropy; `observed` holds, by parameter name, one
    of each victim, [v, ...]. The model's weights and mode must stay as they are. Between two calls
    it holds a step's activations. Raises Unsupported.
    """

    def __init__(
        self, model: nn.Module, observed: Tensors, distance: Inner | Distance,
        kinds: Kinds = PARAMETRIC,
    ):  # fmt: skip
        self.program = Program(model, kinds)
        if set(observed) != set(self.program.names):
            raise Unsupported("the update is not of all parameters")
        self.observed = {k: observed[k].detach().contiguous() for k in self.program.names}
        self.distance = distance
        flat = [o.reshape(len(o), -1).square().sum(1) for o in self.observed.values()]
        self.target = torch.stack(flat).sum(0)  # [v]
        self.victims: list[int] = []  # of the last call's lanes,
        self.rows = torch.empty(0)  # and the same as an index on the device
        self.formed: tuple[str, ...] = ()  # parameters whose gradients are formed,
        self.flat = torch.empty(0)  # and what was observed of them: [v, n]

    @torch.no_grad()
    def __call__(
        self,
        images: Float[Tensor, "l b c h w"],
        targets: Float[Tensor, "l b k"],
        victims: list[int],
    ) -> tuple[Float[Tensor, " l"], Float[Tensor, "l b c h w"], Float[Tensor, "l b k"]]:
        """Distance, and its gradients with respect to images and targets.

        Lane i is matched with `victims[i]`; lanes of the same victim share products as neighbours.
        """
        lanes, count = images.shape[:2]
        if victims != self.victims:
            self.victims = victims
            self.rows = torch.tensor(victims, device=images.device)
        grams = isinstance(self.distance, Inner) and self.distance.exact is None
        s = Sweep(count, lanes, self.observed, victims, self.rows, grams)
        logits = self.program.down(s, "forward", images.transpose(0, 1).flatten(0, 1))
        t = targets.transpose(0, 1).flatten(0, 1)
        p, weight = logits.softmax(1), t.sum(1, keepdim=True) / count
        self.program.up(s, "backward", p * weight - t / count)
        loss = self._direct(s)
        d = self.program.down(s, "tangent", None)
        centred = d - (p * d).sum(1, keepdim=True)
        out = self.program.up(s, "adjoint", p * centred * weight)
        assert out is not None, "the logits depend on the images"
        of_images, of_targets = (s.by_lane(x).transpose(0, 1) for x in (out, -centred / count))
        return loss, of_images, of_targets

    def _direct(self, s: Sweep) -> Tensor:
        """The distance [l]; leaves its derivative at the weight gradients in the sweep."""
        if not isinstance(self.distance, Inner):
            told = {k: self.observed[k][self.rows] for k in s.g}
            s.v, loss = vmap(grad_and_value(self.distance), randomness="error")(s.g, told)
            return loss
        if self.formed != tuple(s.g):
            self.formed = tuple(s.g)
            self.flat = torch.cat([self.observed[k].flatten(1) for k in self.formed], 1)
        g = torch.cat([s.g[k].flatten(1) for k in self.formed], 1)
        runs = s.runs()
        # torch.sum adds pairwise; a product or a norm of millions of float32 loses two digits
        dot = torch.cat([(g[run] * self.flat[v]).sum(1) for v, run in runs]) + s.dot
        size = (g * g).sum(1) + s.norm  # `square` is ten times slower than a product
        loss, s.a, s.o = self.distance(dot, size, self.target[self.rows])
        g *= s.a[:, None]
        for v, run in runs:
            g[run].addcmul_(self.flat[v], s.o[run, None])
        if self.distance.exact is not None:
            loss = self.distance.exact(g)
        shapes = [s.g[k].shape for k in self.formed]
        parts = g.split([shape[1:].numel() for shape in shapes], 1)
        s.v = {k: p.reshape(h) for k, p, h in zip(self.formed, parts, shapes, strict=True)}
        return loss

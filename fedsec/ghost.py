"""Scaled sums of per-example gradients, without the per-example gradients.

One forward and one backward pass keep each layer's input x and the gradient g of its output. They
give the norm of each example's gradient (Goodfellow 2015) and, once the scales are known, the
scaled sum, without a second backward pass ("book-keeping", Bu et al. 2023). A convolution's or
linear layer's norm comes the cheaper of two ways ("mixed ghost clipping", Bu et al. 2022): from
the Gram matrices of x and g over positions (Li et al. 2022), or from the examples' gradients, where
they are no larger than x and g.

The forward pass is mapped over single examples, so that no network can mix two. A layer is known
by what is done with its weight, not by its class alone: a second use of it, or another than the
layer's, is noticed. A trainable tensor that no layer owns (a class token, a scalar) is copied for
each example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from fedsec.models import standardised
from fedsec.types import Tensors

# Pixels in one pass: activations grow with them, in every network. On a CPU 32 images of CIFAR.
CHUNK_PIXELS = {"cpu": 2**15, "cuda": 2**18}
LAYERS = nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm  # their weights have rules below

Scales = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]  # from the norms of the gradients


def scaled_sum(
    model: nn.Module,
    views: Float[Tensor, "n k c h w"],
    targets: Float[Tensor, "n classes"],
    scales: Scales,
) -> Tensors | None:
    """The sum over n examples of scale x gradient of the mean loss on the k views, by name.

    None where the weight of a layer is used twice, or in another way than the layer's, or where
    activations are written to: per-example gradients then have to be computed.

    The chunks, and so the order of the sum, depend on the views' shape and the device alone.
    """
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    owned = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        if isinstance(module, LAYERS)
        for name, _ in module.named_parameters(recurse=False)
    }
    total = {k: torch.zeros_like(w) for k, w in weights.items()}
    pixels = views.shape[1] * views.shape[3] * views.shape[4]
    chunk = max(1, CHUNK_PIXELS[views.device.type] // max(1, pixels))
    for start in range(0, len(views), chunk):
        some = slice(start, start + chunk)
        try:
            parts = _parts(model, weights, owned, views[some], targets[some])
        except _Uncovered:
            return None
        norms = torch.stack([p.squares for p in parts.values()]).sum(0).clamp(min=0).sqrt()
        scale = scales(norms)
        for name in parts:
            total[name] += parts[name].total(scale)
        del parts  # before the next chunk's activations
    return total


@dataclass(frozen=True)
class _Part:
    """One parameter's share in a chunk of examples."""

    squares: Float[Tensor, " n"]  # of the norms of the examples' gradients
    total: Callable[[Float[Tensor, " n"]], Tensor]  # the sum of the gradients times the scales


class _Uncovered(Exception):
    """A weight is used in a way that has no rule here."""


def _parts(
    model: nn.Module, weights: Tensors, owned: set[str], views: Tensor, targets: Tensor
) -> dict[str, _Part]:
    tape: list[_Use] = []
    watched: Tensors = {k: _Watched.of(w, k, tape) for k, w in weights.items() if k in owned}
    copies = {
        k: w.expand(len(views), *w.shape).requires_grad_()
        for k, w in weights.items()
        if k not in owned
    }

    def loss(images: Tensor, target: Tensor, copies: Tensors) -> Tensor:
        logits = torch.func.functional_call(model, watched | copies, (images,))
        return F.cross_entropy(logits, target.to(logits.dtype).expand(len(images), -1))

    images = views.detach().requires_grad_()  # so that each activation has a gradient
    with torch.enable_grad():
        losses = torch.vmap(loss, randomness="different")(images, targets, copies).sum()
    if any((use.x._version, use.y._version) != use.versions for use in tape):
        raise _Uncovered("an activation was written to")
    outputs = [use.y for use in tape] + list(copies.values())
    grads = list(torch.autograd.grad(losses, outputs, materialize_grads=True) if outputs else ())
    del outputs, losses
    parts: dict[str, _Part] = {}
    with torch.no_grad():
        for name in reversed(copies):
            parts[name] = _kept(grads.pop())
        while tape:  # activations go as soon as no part needs them
            parts |= tape.pop().parts(grads.pop())
    return parts


# ---------------------------------------------------------------- what is done with a weight


class _Watched(Tensor):
    """A parameter that knows only the functions of layers, and puts them on its tape."""

    key: str  # the parameter's name
    plain: Tensor
    tape: list[_Use]
    parameter: Tensor | None  # that it was standardised from; None: it is the parameter

    @staticmethod
    def of(plain: Tensor, key: str, tape: list[_Use], parameter: Tensor | None = None) -> _Watched:
        watched = plain.as_subclass(_Watched)
        watched.key, watched.plain, watched.tape, watched.parameter = key, plain, tape, parameter
        return watched

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func not in _FUNCTIONS:
            raise _Uncovered(func)
        return _FUNCTIONS[func](*args, **(kwargs or {}))


_FACTS = {Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__}  # type: ignore


@dataclass(frozen=True)
class _Use:
    """One call of a layer's function: its input and output with all examples in front."""

    rule: Callable[..., _Part]
    settings: tuple[Any, ...]
    own: dict[int, _Watched]  # 0: the weight, 1: the bias, where they are watched
    after: int  # dimensions of y after those of the bias
    x: Tensor
    y: Tensor
    versions: tuple[int, int]  # of x and y, which count what is written to them

    def parts(self, g: Tensor) -> dict[str, _Part]:
        """Those of weight and bias, from the gradient of y."""
        parts: dict[str, _Part] = {}
        if 0 in self.own:
            weight = self.own[0]
            x = self.x.detach()

            def rule(x: Tensor, g: Tensor) -> _Part:
                return self.rule(x, g, weight.plain, *self.settings)

            if weight.parameter is None:
                parts[weight.key] = rule(x, g)
            else:
                parts[weight.key] = _pulled(rule, x, g, weight.parameter)
        if 1 in self.own:
            bias = self.own[1].plain
            parts[self.own[1].key] = _kept(_folded(g, bias.shape, self.after))
        return parts


class _Noted(torch.autograd.Function):
    """The identity on y. Under vmap it sees x and y with all examples, and hands them on."""

    @staticmethod
    def forward(x, y, note):
        raise _Uncovered("a layer whose input does not depend on the example")

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x, y, note):  # type: ignore[override]
        if in_dims[0] is None or in_dims[1] is None:
            raise _Uncovered("a layer whose input does not depend on the example")
        y = y.movedim(in_dims[1], 0)
        note(x.movedim(in_dims[0], 0), y)
        return y, 0


def _noted(
    rule: Callable[..., _Part],
    call: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    after: int,
    *settings: Any,
) -> Tensor:
    own = {i: t for i, t in enumerate((weight, bias)) if isinstance(t, _Watched)}
    if not own or isinstance(x, _Watched):
        raise _Uncovered("a weight as the input")
    tape = next(iter(own.values())).tape
    if {t.key for t in own.values()} & {t.key for use in tape for t in use.own.values()}:
        raise _Uncovered("a weight that is used twice")
    w, b = (own[i].plain if i in own else t for i, t in enumerate((weight, bias)))

    def note(x: Tensor, y: Tensor) -> None:
        tape.append(_Use(rule, settings, own, after, x, y, (x._version, y._version)))

    return _Noted.apply(x, call(x, w, b), note)  # type: ignore[return-value]


def _standardised(weight: _Watched) -> _Watched:
    if weight.parameter is not None:
        raise _Uncovered("a weight that is standardised twice")
    return _Watched.of(standardised(weight.plain), weight.key, weight.tape, weight.plain)


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        raise _Uncovered("padding by name")
    how = stride, padding, dilation, groups

    def call(x, w, b):
        return F.conv2d(x, w, b, *how)

    return _noted(_of_conv2d, call, x, weight, bias, 2, *how)


def _linear(x, weight, bias=None):
    return _noted(_of_linear, F.linear, x, weight, bias, 0)


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    def call(x, w, b):
        return F.group_norm(x, groups, w, b, eps)

    return _noted(_of_group_norm, call, x, weight, bias, x.dim() - 2, groups, eps)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    def call(x, w, b):
        return F.layer_norm(x, shape, w, b, eps)

    return _noted(_of_layer_norm, call, x, weight, bias, 0, eps)


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    standardised: _standardised,
}


# ---------------------------------------------------------------- from x and g to parts


def _kept(each: Float[Tensor, "n ..."]) -> _Part:
    """From the examples' gradients themselves."""
    flat = each.reshape(len(each), -1)
    return _Part(flat.square().sum(1), lambda scale: (scale @ flat).view_as(each[0]))


def _pulled(rule: Callable[..., _Part], x: Tensor, g: Tensor, parameter: Tensor) -> _Part:
    """Of the parameter whose standardised weight the layer used, by the chain rule.

    One example's gradient at a time, which only its norm outlives.
    """
    pull = torch.func.vjp(standardised, parameter)[1]

    def total(some: slice, scale: Tensor) -> Tensor:
        return pull(rule(x[some], g[some]).total(scale))[0]

    one = torch.ones_like(g[:1].flatten()[:1])
    squares = [total(slice(i, i + 1), one).square().sum() for i in range(len(x))]
    return _Part(torch.stack(squares), partial(total, slice(None)))


def _folded(g: Tensor, shape: torch.Size, after: int) -> Float[Tensor, "n ..."]:
    """The sum over positions of a tensor like a layer's output [n, ..., *shape, *after]."""
    inner = g.shape[g.dim() - after :].numel()
    return g.reshape(len(g), -1, *shape, inner).sum((1, -1))


def _gram(x: Float[Tensor, "n p i"], g: Float[Tensor, "n p o"]) -> Float[Tensor, " n"]:
    """Squared norms of the sums over p of g x^T: the sum over p, q of (x_p x_q) (g_p g_q)."""
    return ((x @ x.mT) * (g @ g.mT)).sum((1, 2))


def _of_linear(x: Tensor, g: Tensor, weight: Tensor) -> _Part:
    x, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
    if _ghost(x.shape[1], *weight.shape):
        return _Part(_gram(x, g), lambda scale: torch.einsum("n,npo,npi->oi", scale, g, x))
    return _kept(g.mT @ x)


def _of_conv2d(
    x: Tensor, g: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> _Part:
    x, g = (t.reshape(len(t), -1, *t.shape[-3:]) for t in (x, g))  # [n, k, c, h, w]
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    gradient = partial(conv2d_weight, weight_size=weight.shape, groups=groups, **how)
    positions, outputs, inputs = g.shape[1] * g.shape[3] * g.shape[4], *weight.flatten(1).shape
    if groups > 1 or not _ghost(positions, outputs, inputs):
        return _kept(torch.vmap(lambda x, g: gradient(x, grad_output=g))(x, g))

    def total(scale: Tensor) -> Tensor:
        scaled = g * scale.view(-1, 1, 1, 1, 1)
        return gradient(x.flatten(0, 1), grad_output=scaled.flatten(0, 1))

    seen = F.unfold(x.flatten(0, 1), weight.shape[2:], **how).unflatten(0, x.shape[:2])
    return _Part(_gram(*(t.movedim(2, 3).flatten(1, 2) for t in (seen, g.flatten(3)))), total)


def _ghost(positions: int, outputs: int, inputs: int) -> bool:
    """Whether Gram matrices are cheaper than a gradient, which then exceeds x and g in size."""
    return positions * (outputs + inputs) < outputs * inputs


def _of_group_norm(x: Tensor, g: Tensor, weight: Tensor, groups: int, eps: float) -> _Part:
    normal = F.group_norm(x.flatten(0, 1), groups, eps=eps).view_as(x)
    return _kept(_folded(g * normal, weight.shape, x.dim() - 3))


def _of_layer_norm(x: Tensor, g: Tensor, weight: Tensor, eps: float) -> _Part:
    normal = F.layer_norm(x, weight.shape, eps=eps)
    return _kept(_folded(g * normal, weight.shape, 0))

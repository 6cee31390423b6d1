"""The recursion of R-GAP: from the last layer's gradient to the image, one linear system a layer.

A layer sends z = W x on, and its weights' gradient is K x, where K holds the loss's derivative by z
(Zhu and Blaschko 2021, section 3). Both are linear in the input x, and both right-hand sides are
known once the layer above is solved: so x solves the two systems stacked.

It stands apart from attacks/rgap.py because these are problems of their own: to read a model as a
chain of layers; the last layer, in which the derivative is unknown too; and the system of each
other layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fedsec.checks import Refused
from fedsec.cost import counted, flops
from fedsec.engine import simulate
from fedsec.models import Normalise, Shape
from fedsec.types import Local, Tensors

OFF = 1e-6  # of the largest output of a ReLU: below it, the unit was off
TAIL = 1e-15  # how near a sigmoid's or a tanh's output may come to its limits
EXACT = 1e-12  # relative tolerance at which LSMR stops
KNOWN = 1e-3  # relative error up to which a known input comes back from a layer that does
TWIN = 1.278464542761074  # the margin m at which m sigmoid(-m) is largest

# ---- a model as a chain -------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution, or a fully connected layer as one of a single pixel, and what follows it."""

    name: str
    module: nn.Conv2d | nn.Linear
    activation: nn.Module | None  # the last layer has none

    @property
    def stride(self) -> tuple[int, int]:
        return self.module.stride if isinstance(self.module, nn.Conv2d) else (1, 1)  # type: ignore[return-value]

    @property
    def padding(self) -> tuple[int, int]:
        return self.module.padding if isinstance(self.module, nn.Conv2d) else (0, 0)  # type: ignore[return-value]

    @property
    def weight(self) -> Float[Tensor, "o i k l"]:
        weight = self.module.weight.detach()
        return weight if weight.dim() == 4 else weight[:, :, None, None]

    def shaped(self, x: Tensor) -> Float[Tensor, "1 i h w"]:
        """The layer's input, for the output of the layer before it."""
        return x if isinstance(self.module, nn.Conv2d) else x.reshape(1, -1, 1, 1)

    def forward(self, x: Float[Tensor, "1 i h w"]) -> Float[Tensor, "1 o p q"]:
        """Without bias."""
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)

    def backward(self, z: Float[Tensor, "1 o p q"], size: Sequence[int]) -> Tensor:
        """The adjoint of `forward` for inputs of `size`."""
        geometry = {"stride": self.stride, "padding": self.padding}  # typed as single integers
        return conv2d_input(list(size), self.weight, z, **geometry)  # type: ignore[arg-type]


def chain(model: nn.Module) -> list[Layer]:
    """The model's layers, first to last. Raises Refused where they are no chain to walk back.

    The kinds of its modules, in their order, decide; whether `forward` uses them in that order,
    only the re-computed update tells.
    """
    aside = (nn.Sequential, nn.Identity, nn.Flatten, Normalise)
    leaves = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)  # activations may be one
        if not any(module.children()) and not isinstance(module, aside)
    ]
    layers = []
    for (name, module), (after, activation) in zip(
        leaves[::2], [*leaves[1::2], ("", None)], strict=False
    ):
        _require(_plain(module), name, module)
        _require(activation is None or _invertible(activation), after, activation)
        layers.append(Layer(name, module, activation))  # type: ignore[arg-type]
    last, module = leaves[-1] if leaves else ("", model)
    _require(len(leaves) % 2 == 1 and isinstance(module, nn.Linear), last, module)
    return layers


def _plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        simple = module.groups == 1 and module.dilation == (1, 1)
        return simple and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _invertible(module: nn.Module) -> bool:
    if isinstance(module, nn.LeakyReLU):
        return module.negative_slope > 0
    return isinstance(module, nn.ReLU | nn.Sigmoid | nn.Tanh)


def _require(holds: bool, name: str, module: nn.Module | None) -> None:
    if not holds:
        rule = "attack=rgap needs convolutions and linear layers, each but a linear last one with "
        rule += "LeakyReLU, ReLU, sigmoid or tanh after it (model=cnn6, model=mlp, model=lenet)"
        raise Refused("model", rule, f"{type(module).__name__} {name}")


def undo(activation: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """What went into an activation that gave `x`, and its slope there.

    The slope is 0 where a ReLU was off: what went in is unknown.
    """
    if isinstance(activation, nn.LeakyReLU):
        slope = torch.where(x > 0, 1.0, activation.negative_slope).to(x)
        return x / slope, slope
    if isinstance(activation, nn.ReLU):
        return x, (x > OFF * x.max()).to(x)
    if isinstance(activation, nn.Sigmoid):
        x = x.clamp(TAIL, 1 - TAIL)
        return x.logit(), x * (1 - x)
    assert isinstance(activation, nn.Tanh)
    x = x.clamp(TAIL - 1, 1 - TAIL)
    return x.atanh(), 1 - x.square()


# ---- the last layer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What the last layer's gradient says: an input of it, what the loss passed back, a label."""

    x: Float[Tensor, " n"]
    dz: Float[Tensor, " k"]  # the gradient by the logits: softmax - one-hot
    label: int
    scale: float  # the update over the gradient: the learning rate of a local step


def heads(layer: Layer, observed: Tensors, lr: float) -> list[Head]:
    """All that could have sent the last layer's gradient dz x^T, for one image; maybe nothing.

    A bias's gradient is dz, and x follows. Without one, dW gives both up to a factor, dz ~ u and
    x ~ v, where u has its one negative entry at the label. With three classes or more the logits
    are W v / s, and among the other classes log u = W v / s + const: a line, whose slope is 1 / s.
    Either way the update's scale comes out too. With two classes there is no line: their margin m
    solves an equation that may have two solutions, which are the paper's twin data, for either
    label: up to four heads, between which the other layers and the data range have to decide.
    """
    weight, rows = layer.module.weight.detach(), observed[f"{layer.name}.weight"]
    bias = layer.module.bias
    if bias is not None:
        told = observed[f"{layer.name}.bias"]
        x = told @ rows / told.square().sum()
        return _scaled(x, (weight @ x + bias.detach()), told, int(told.argmin()))
    if len(rows) == 2:
        return [head for y in (0, 1) for head in _binary(weight, rows / lr, y, lr)]
    left, size, right = torch.linalg.svd(rows, full_matrices=False)
    label = int(left[:, 0].abs().argmax())
    sign = -left[label, 0].sign()
    u, v = sign * size[0] * left[:, 0], sign * right[0]
    logits = weight @ v
    trust = u.clamp_min(0).square()  # u is rounded alike everywhere, so log u by 1 / u
    centred = logits - (trust @ logits) / trust.sum()
    slope = (trust * centred) @ u.clamp_min(1e-300).log() / (trust @ centred.square())
    return _scaled(slope * v, slope * logits, u / slope, label) if slope > 0 else []


def _scaled(x: Tensor, logits: Tensor, told: Tensor, label: int) -> list[Head]:
    dz = logits.softmax(0)
    dz[label] -= 1
    scale = float(told @ dz / dz.square().sum())
    return [Head(x, dz, label, scale)] if 0 < scale < math.inf and x.isfinite().all() else []


def _binary(weight: Tensor, rows: Tensor, label: int, lr: float) -> list[Head]:
    """The margin m is in m sigmoid(-m) = (w_y - w_o) dz_o x, in which all but m is known."""
    row = (rows[1 - label] - rows[label]) / 2  # sigmoid(-m) x
    product = float((weight[label] - weight[1 - label]) @ row)

    def excess(margin: float) -> float:
        return margin / (1 + np.exp(margin)) - product

    spans = ((-700.0, TWIN), (TWIN, 700.0))
    spans = [s for s in spans if excess(s[0]) * excess(s[1]) < 0]
    found = []
    for span in spans:
        margin = float(brentq(excess, *span, xtol=1e-15))  # type: ignore[arg-type]
        back = 1 / (1 + np.exp(margin))
        dz = row.new_full((2,), back)
        dz[label] *= -1
        found.append(Head(row / back, dz, label, lr))
    return found


# ---- the other layers ---------------------------------------------------------------------------


class System:
    """One layer's equations for its input x: slope (W x) = slope z, and K x = dW.

    Each of the weights' equations counts as much as the activation's slope, by which errors in z
    were magnified, and all together `weight` times as much as the gradient's. K has the same block
    for each input channel, so that block's Cholesky factor makes LSMR converge in tens to hundreds
    of steps, and neither W nor K is ever formed.
    """

    def __init__(
        self, layer: Layer, size: Sequence[int], slope: Tensor, dz: Tensor, weight: float, most: int
    ):
        self.layer, self.size, self.slope, self.most = layer, size, slope, most
        self.block = _gradient_block(layer, size, dz)
        known = slope.square().sum((0, 2, 3)) @ layer.weight.square().sum((1, 2, 3))
        total = self.block.square().sum()
        self.solvable = bool(known > 0) and bool(total > 0) and bool((known + total).isfinite())
        if self.solvable:
            inputs, pixels = math.prod(size), self.block.shape[1]
            self.by_weight = weight * float(known / inputs) ** -0.5
            self.by_gradient = float(total / pixels) ** -0.5
            gram = self.by_gradient**2 * self.block.T @ self.block
            gram += weight**2 * torch.eye(pixels).to(gram)
            lower = torch.linalg.cholesky(gram)
            self.inverse = torch.linalg.solve_triangular(
                lower, torch.eye(pixels).to(gram), upper=False
            )

    def forward(self, x: Float[Tensor, "1 i h w"]) -> tuple[Tensor, Float[Tensor, "o i k l"]]:
        """Both left-hand sides, unweighted."""
        told = x.flatten(2)[0] @ self.block.T
        outputs, inputs, *taps = self.layer.weight.shape
        told = told.view(inputs, outputs, *taps).transpose(0, 1)
        return self.slope * self.layer.forward(x), told

    def adjoint(self, z: Tensor, told: Float[Tensor, "o i k l"]) -> Float[Tensor, "1 i h w"]:
        x = told.transpose(0, 1).flatten(1) @ self.block
        return self.layer.backward(self.slope * z, self.size) + x.view(*self.size)

    def solve(
        self, z: Tensor, told: Float[Tensor, "o i k l"]
    ) -> tuple[Float[Tensor, "1 i h w"], float]:
        """The least squares solution for these right-hand sides, and the GFLOP of finding it."""

        def unknown(y: np.ndarray) -> Float[Tensor, "1 i h w"]:
            return (torch.as_tensor(y).to(z).view(self.size[1], -1) @ self.inverse).view(self.size)

        def joined(z: Tensor, told: Tensor) -> np.ndarray:
            parts = [self.by_weight * z.flatten(), self.by_gradient * told.flatten()]
            return torch.cat(parts).cpu().numpy()

        def product(y: np.ndarray) -> np.ndarray:
            return joined(*self.forward(unknown(y)))

        def adjoint(residual: np.ndarray) -> np.ndarray:
            both = torch.as_tensor(residual).to(z)
            x = self.adjoint(
                self.by_weight * both[: z.numel()].view_as(z),
                self.by_gradient * both[z.numel() :].view_as(told),
            )
            return (x.flatten(2)[0] @ self.inverse.T).flatten().cpu().numpy()

        right = joined(z, told)
        shape = (len(right), math.prod(self.size))
        stacked = LinearOperator(shape, matvec=product, rmatvec=adjoint, dtype=np.float64)  # type: ignore[call-arg]
        y, _, steps, *_ = lsmr(stacked, right, atol=EXACT, btol=EXACT, conlim=0, maxiter=self.most)
        once = flops(lambda: product(adjoint(right)))  # counting each would double the time
        return unknown(y), steps * once


def _gradient_block(layer: Layer, size: Sequence[int], dz: Tensor) -> Float[Tensor, "okl hw"]:
    """dW of one input channel as a matrix by that channel's pixels: where each dz meets them."""
    (above, beside), (down, across) = layer.padding, layer.stride
    (outputs, _, rows, columns), (height, width) = layer.weight.shape, size[2:]
    p, q = dz.shape[2:]
    block = dz.new_zeros(outputs, rows, columns, height + 2 * above, width + 2 * beside)
    for i in range(rows):
        for j in range(columns):
            block[:, i, j, i : i + down * p : down, j : j + across * q : across] = dz[0]
    block = block[..., above : above + height, beside : beside + width]
    return block.reshape(outputs * rows * columns, height * width)


@dataclass(frozen=True)
class Walk:
    """Where a head leads to: the normalised image, unless a layer is in the way."""

    image: Float[Tensor, "1 c h w"] | None
    stuck: str  # the layer that no derivative reaches, or that does not determine its input
    gflop: float


def walk(
    layers: Sequence[Layer],
    head: Head,
    observed: Tensors,
    shape: Shape,
    weight: float,
    most: int,
    rng: torch.Generator,
) -> Walk:
    """From the input of the last layer to the image, by `System(weight, most)` at each layer.

    A layer does not determine its input if a random input, sent through its equations, is not what
    solving them gives.
    """
    sizes = [torch.Size((1, *shape))]
    for layer in layers[:-1]:
        sizes.append(layer.forward(layer.shaped(torch.zeros(sizes[-1]).to(layer.weight))).shape)
    x, dz = head.x.view(sizes[-1]), (head.dz @ layers[-1].weight[..., 0, 0]).view(sizes[-1])
    spent = 0.0
    for layer, size in zip(reversed(layers[:-1]), reversed(sizes[:-1]), strict=True):
        z, slope = undo(layer.activation, x)
        if layer.module.bias is not None:
            z = z - layer.module.bias.detach().view(-1, 1, 1)
        dz = dz * slope
        probe = layer.shaped(torch.randn(size, generator=rng).to(x))
        system = System(layer, probe.shape, slope, dz, weight, most)
        if not system.solvable:
            return Walk(None, layer.name, spent)
        back, gflop = system.solve(*system.forward(probe))
        spent += gflop
        if not (back - probe).norm() <= KNOWN * probe.norm():
            return Walk(None, layer.name, spent)
        told = observed[f"{layer.name}.weight"] / head.scale
        x, gflop = system.solve(slope * z, told.view(layer.weight.shape))
        spent += gflop
        x, dz = x.view(size), layer.backward(dz, probe.shape).view(size)
    return Walk(x, "", spent)


# ---- what an image explains ---------------------------------------------------------------------


def residual(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    scale: float,
    observed: Tensors,
) -> tuple[Float[Tensor, ""], float]:
    """How far the re-computed update is, over the longer one's length, at most 2; and its GFLOP."""
    gradient = Local(kind="gradient", lr=1.0)
    again, spent = counted(lambda: simulate(model, images, targets, gradient))
    pairs = [(scale * again[k].flatten(), observed[k].flatten()) for k in observed]
    guess, sent = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    length = torch.maximum(guess.norm(), sent.norm()).clamp_min(1e-300)
    return ((guess - sent).norm() / length).nan_to_num(2.0), spent

"""The networks whose updates are attacked. They take images in [0, 1] and normalise themselves."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from fedsec.checks import Refused, home_read, require

Shape = tuple[int, int, int]  # channels, height, width of an image
Layer = Callable[..., nn.Module]  # makes one, from its channels

# ---------------------------------------------------------------- parts


class Normalise(nn.Module):
    """(x - mean) / std by channel. Not part of the state dict, so that published weights fit."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", _by_channel(mean), persistent=False)
        self.register_buffer("std", _by_channel(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def _by_channel(values: Sequence[float]) -> Float[Tensor, "c 1 1"]:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, for [n c h w] and [n c], but a forward pass in train mode leaves no trace.

    Running statistics move only where `track` is set (see `tracking`), so the same module serves a
    training client, and torch.func transforms of an attack that must not touch the victim's state.
    """

    track = False

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.track:
            return F.batch_norm(
                input, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
        return super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() in (2, 4)


@contextmanager
def tracking(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within it, BatchNorm in train mode updates its running statistics as PyTorch's does.

    With `on` false it does not, whatever holds around it.
    """
    with _switched(model, BatchNorm2d, "track", on):
        yield


class Random(nn.Module):
    """A layer that draws while a client computes its update, see `drawing`; elsewhere it does not.

    So the same module serves the client, and attacks, which cannot know its draws.
    """

    draws = False


@contextmanager
def drawing(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within it, random layers draw from PyTorch's own generators; not so with `on` false."""
    with _switched(model, Random, "draws", on):
        yield


@contextmanager
def _switched(model: nn.Module, kind: type[nn.Module], switch: str, on: bool) -> Iterator[None]:
    """Within it, that switch of all layers of a kind."""
    layers = [m for m in model.modules() if isinstance(m, kind)]
    before = [getattr(layer, switch) for layer in layers]
    for layer in layers:
        setattr(layer, switch, on)
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            setattr(layer, switch, was)


@contextmanager
def recording(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that fills with (mean, biased variance) of each BatchNorm's input, in module order.

    It works on batched tensors, within torch.func transforms too; the hooks go on leaving.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        others = [d for d in range(args[0].dim()) if d != 1]
        var, mean = torch.var_mean(args[0], others, correction=0)
        seen.append((mean, var))

    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def norm_stats(
    model: nn.Module, images: Float[Tensor, "n c h w"]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(mean, biased variance), [channels] each, of the input of each BatchNorm for `images`.

    Differentiable; the model keeps its mode, and its buffers stay as they are.
    """
    with recording(model) as seen:
        model(images)
    return tuple(seen)


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The last fully connected layer and its name: the one whose bias gradient tells labels."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    require(len(layers) > 0, "model", "must have a fully connected layer", type(model).__name__)
    return layers[-1]


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """`model` with another layer in the place of that name; "" is the model itself."""
    if not name:
        return layer
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
    return model


def first_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The first layer with weights, the one that sees the normalised image, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            return name, module
    raise Refused("model", "must have a linear or convolutional layer", type(model).__name__)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return BatchNorm2d(channels)
    if kind == "group":  # 16 channels a group (Wu and He 2018, table 3)
        return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)
    return nn.Identity()


# ---------------------------------------------------------------- networks


class LeNet(nn.Module):
    """The sigmoid LeNet of DLG (Zhu et al. 2019): smooth, so that second derivatives exist."""

    def __init__(self, normalise: nn.Module, shape: Shape, classes: int, norm: str):
        super().__init__()
        self.normalise = normalise
        layers: list[nn.Module] = []
        for channels, stride in ((shape[0], 2), (12, 2), (12, 1)):
            layers.append(nn.Conv2d(channels, 12, 5, stride, padding=2))
            layers += [] if norm == "none" else [_norm(norm, 12)]
            layers.append(nn.Sigmoid())
        self.body = nn.Sequential(*layers)
        height, width = (math.ceil(side / 4) for side in shape[1:])
        self.fc = nn.Sequential(nn.Linear(12 * height * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(self.normalise(images)).flatten(1))


class CNN6(nn.Module):
    """CNN6 of R-GAP (Zhu and Blaschko 2021), with an output for each class instead of one.

    Strides and widths are such that weights and their gradients determine each layer's input;
    nothing has a bias.
    """

    def __init__(self, normalise: nn.Module, shape: Shape, classes: int, norm: str):
        super().__init__()
        self.normalise = normalise
        layers: list[nn.Module] = []
        before, *sides = shape
        halved, kept = (3, 2, 1), (3, 1, 1)  # kernel, stride, padding
        sizes = ((4, 2, 2), halved, kept, kept, halved, kept)
        widths = (12, 36, 36, 36, 64, 128)
        for channels, (kernel, stride, padding) in zip(widths, sizes, strict=True):
            layers.append(nn.Conv2d(before, channels, kernel, stride, padding, bias=False))
            layers += [] if norm == "none" else [_norm(norm, channels)]
            layers.append(nn.LeakyReLU(0.2))
            before = channels
            sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(before * math.prod(sides), classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(self.normalise(images)).flatten(1))


class ConvNet(nn.Module):
    """ConvNet of Inverting Gradients (Geiping et al. 2020): eight convolutions, two max pools."""

    def __init__(self, normalise: nn.Module, shape: Shape, classes: int, norm: str, width: int):
        super().__init__()
        self.normalise = normalise
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = shape[0]
        for i, times in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            layers[f"conv{i}"] = nn.Conv2d(before, times * width, 3, padding=1)
            layers[f"bn{i}"] = _norm(norm, times * width)
            layers[f"relu{i}"] = nn.ReLU()
            before = times * width
            if i in (5, 7):
                layers[f"pool{(i - 5) // 2}"] = nn.MaxPool2d(3)
        layers["flatten"] = nn.Flatten()
        height, width = (side // 3 // 3 for side in shape[1:])
        layers["linear"] = nn.Linear(before * height * width, classes)
        self.model = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))


class MLP(nn.Module):
    """Fully connected layers with ReLU; the first one sees the whole normalised image."""

    def __init__(
        self,
        normalise: nn.Module,
        shape: Shape,
        classes: int,
        norm: str,
        hidden: Sequence[int],
    ):
        super().__init__()
        self.normalise = normalise
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = math.prod(shape)
        for i, width in enumerate(hidden):
            layers[f"linear{i}"] = nn.Linear(before, width)
            layers[f"norm{i}"] = _norm(norm, width)
            layers[f"relu{i}"] = nn.ReLU()
            before = width
        layers[f"linear{len(hidden)}"] = nn.Linear(before, classes)
        self.layers = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.normalise(images).flatten(1))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int, norm: str, option: str):
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=bias)
        self.bn1 = _norm(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.bn2 = _norm(norm, after)
        self.shortcut: nn.Module = nn.Sequential()
        if before != after and option == "A":
            self.shortcut = Pad((after - before) // 2)
        elif before != after:
            skip = nn.Conv2d(before, after, 1, stride, bias=bias)
            self.shortcut = nn.Sequential(skip, _norm(norm, after))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class Pad(nn.Module):
    """Option A: every second pixel, and zeros for the new channels. It has no parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels  # new ones on each side

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


class ResNet(nn.Module):
    """ResNet with the CIFAR stem: one 3 x 3 convolution, no max pool (He et al. 2016)."""

    def __init__(
        self,
        normalise: nn.Module,
        shape: Shape,
        classes: int,
        norm: str,
        width: int,
        blocks: Sequence[int],
        option: str,
    ):
        super().__init__()
        self.normalise = normalise
        self.conv1 = nn.Conv2d(shape[0], width, 3, padding=1, bias=norm == "none")
        self.bn1 = _norm(norm, width)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (stage, depth) in enumerate(zip(self.stages, blocks, strict=True)):
            after = width * 2**i
            first = Block(after // 2 if i else width, after, 2 if i else 1, norm, option)
            rest = [Block(after, after, 1, norm, option) for _ in range(depth - 1)]
            self.add_module(stage, nn.Sequential(first, *rest))
        self.linear = nn.Linear(width * 2 ** (len(blocks) - 1), classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalise(images))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(x.mean((2, 3)))


def standardised(weight: Float[Tensor, "o i h w"]) -> Float[Tensor, "o i h w"]:
    """Each output's weights with mean 0 and variance 1 / (i h w) (Qiao et al. 2019, section 3).

    Qiao et al. make the variance 1; over i h w is Brock et al. 2021's, which De et al. 2022 took.
    """
    if has_torch_function_unary(weight):
        return handle_torch_function(standardised, (weight,), weight)
    var, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) / ((var + 1e-5) * weight[0].numel()).sqrt()


class StandardisedConv2d(nn.Conv2d):
    """A convolution with its weight standardised in each forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self.weight), self.bias)


class WideBlock(nn.Module):
    """Two 3 x 3 convolutions, each after norm and ReLU, which the projection shares."""

    def __init__(self, before: int, after: int, stride: int, norm: Layer, conv: Layer):
        super().__init__()
        self.bn1 = norm(before)
        self.conv1 = conv(before, after, 3, stride, padding=1)
        self.bn2 = norm(after)
        self.conv2 = conv(after, after, 3, padding=1)
        self.shortcut = conv(before, after, 1, stride) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(inner)
        return x + self.conv2(F.relu(self.bn2(self.conv1(inner))))


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko and Komodakis 2016), without dropout.

    De et al. 2022 (section 3.1): 16 groups in each GroupNorm, every convolution standardised.
    """

    def __init__(
        self,
        normalise: nn.Module,
        shape: Shape,
        classes: int,
        norm: str,
        depth: int,
        widen: int,
        standardise: bool,
    ):
        super().__init__()
        self.normalise = normalise
        conv = partial(StandardisedConv2d if standardise else nn.Conv2d, bias=norm == "none")
        layer = partial(nn.GroupNorm, 16) if norm == "group" else partial(_norm, norm)
        self.conv1 = conv(shape[0], 16, 3, padding=1)
        before, blocks = 16, []
        for i, after in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for j in range((depth - 4) // 6):
                blocks.append(WideBlock(before, after, 2 if i and j == 0 else 1, layer, conv))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.bn1 = layer(before)
        self.linear = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.conv1(self.normalise(images)))
        return self.linear(F.relu(self.bn1(x)).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), written out: it has second derivatives."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        n, t, width = tokens.shape
        each = width // self.heads
        split = self.qkv(tokens).view(n, t, 3, self.heads, each).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        weights = (query @ key.mT / each**0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Self-attention and an MLP with GELU, each with a LayerNorm.

    residual: norm first, around shortcuts, as in ViT. sequential: no shortcuts, norm after each.
    """

    def __init__(self, width: int, heads: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.norm2(self.mlp(self.norm1(self.attn(x))))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) with a class token; no dropout."""

    def __init__(
        self,
        normalise: nn.Module,
        shape: Shape,
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        residual: bool,
    ):
        super().__init__()
        self.normalise = normalise
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.patch_embed = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + tokens, width))  # learnable
        self.blocks = nn.Sequential(*(Encoder(width, heads, residual) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(self.normalise(images)).flatten(2).mT
        first = self.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([first, patches], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])

    def folded(self, patches: Float[Tensor, "n t p"], shape: Shape) -> Float[Tensor, "n c h w"]:
        """The images that these patches make up."""
        side = self.patch_embed.kernel_size
        return F.fold(patches.mT, shape[1:], side, stride=side)


# ---------------------------------------------------------------- their specifications


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What all networks share. A subclass adds its own fields and its `network`."""

    norm: str = "batch"  # batch, group (16 channels a group) or none
    mode: str = "train"  # train or eval: BatchNorm's behaviour in the victim's step
    weights: str | None = None  # .safetensors, or a PyTorch file of tensors; null: a fresh draw
    mean: tuple[float, ...] | None = None  # by channel, [0, 1] units; null: the data set's
    std: tuple[float, ...] | None = None  # by channel, above 0; null: the data set's

    norms: ClassVar = ("batch", "group", "none")  # what `norm` may be

    def __post_init__(self):
        norms, modes = self.norms, ("train", "eval")
        require(self.norm in norms, "norm", f"must be among {', '.join(norms)}", self.norm)
        require(self.mode in modes, "mode", f"must be among {', '.join(modes)}", self.mode)
        finite = self.mean is None or all(math.isfinite(m) for m in self.mean)
        require(finite, "mean", "must be finite", self.mean)
        positive = self.std is None or all(0 < s < math.inf for s in self.std)
        require(positive, "std", "must be above 0 and finite", self.std)

    def build(
        self,
        shape: Shape,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        rng: torch.Generator,
    ) -> nn.Module:
        """The network in its declared mode, on the CPU; fresh weights are drawn from `rng` alone.

        `mean` and `std` are the data set's, used where the specification has none; a channel that
        never varies is left unscaled. Raises Refused where weights or images do not fit.
        """
        mean = tuple(self.mean or mean)
        std = tuple(s or 1.0 for s in self.std or std)
        for key, values in (("model.mean", mean), ("model.std", std)):
            rule = f"must have one value for each of {shape[0]} channels"
            require(len(values) == shape[0], key, rule, len(values))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            model = self.network(Normalise(mean, std), shape, classes)
        if self.weights is not None:
            load_weights(model, self.weights)
        return model.train(self.mode == "train")

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LeNetSpec(ModelSpec):
    norm: str = "none"
    init: str = "uniform"  # uniform: weights and biases U(-0.5, 0.5) as in DLG; default: PyTorch's

    def __post_init__(self):
        super().__post_init__()
        inits = ("default", "uniform")
        require(self.init in inits, "init", f"must be among {', '.join(inits)}", self.init)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        model = LeNet(normalise, shape, classes, self.norm)
        if self.init == "uniform":
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    for parameter in layer.parameters():
                        nn.init.uniform_(parameter, -0.5, 0.5)
        return model


@dataclass(frozen=True, kw_only=True)
class CNN6Spec(ModelSpec):
    norm: str = "none"

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        return CNN6(normalise, shape, classes, self.norm)


@dataclass(frozen=True, kw_only=True)
class ConvNetSpec(ModelSpec):
    width: int = 64  # channels of the first convolution

    def __post_init__(self):
        super().__post_init__()
        require(self.width >= 1, "width", "must be at least 1", self.width)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        rule = "convnet needs images of at least 9 x 9 pixels for its two max pools"
        require(min(shape[1:]) >= 9, "model", rule, f"{shape[1]} x {shape[2]}")
        return ConvNet(normalise, shape, classes, self.norm, self.width)


@dataclass(frozen=True, kw_only=True)
class MLPSpec(ModelSpec):
    norm: str = "none"
    hidden: tuple[int, ...] = (1024, 1024, 1024)  # units of each hidden layer; may be empty

    def __post_init__(self):
        super().__post_init__()
        positive = all(width >= 1 for width in self.hidden)
        require(positive, "hidden", "must be at least 1 for each layer", self.hidden)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        return MLP(normalise, shape, classes, self.norm, self.hidden)


@dataclass(frozen=True, kw_only=True)
class ResNet18Spec(ModelSpec):
    """The ResNet-18 of ImageNet with the CIFAR stem; names of layers as in pytorch-cifar."""

    width: int = 64  # channels of the first stage

    def __post_init__(self):
        super().__post_init__()
        require(self.width >= 1, "width", "must be at least 1", self.width)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        return ResNet(normalise, shape, classes, self.norm, self.width, (2, 2, 2, 2), "B")


@dataclass(frozen=True, kw_only=True)
class ResNetSpec(ModelSpec):
    """The CIFAR ResNets of He et al. 2016, section 4.2; names of layers as in akamaster's."""

    depth: int = 20  # 6 n + 2
    width: int = 16  # channels of the first stage; even

    def __post_init__(self):
        super().__post_init__()
        fits = self.depth >= 8 and self.depth % 6 == 2
        require(fits, "depth", "must be 6 n + 2 and at least 8", self.depth)
        even = self.width >= 2 and self.width % 2 == 0
        require(even, "width", "must be even and at least 2", self.width)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        blocks = ((self.depth - 2) // 6,) * 3
        model = ResNet(normalise, shape, classes, self.norm, self.width, blocks, "A")
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        return model


@dataclass(frozen=True, kw_only=True)
class WideResNetSpec(ModelSpec):
    """WRN-depth-widen; by default as De et al. 2022 train it with DP-SGD."""

    norm: str = "group"  # 16 groups; batch as published by Zagoruyko and Komodakis, or none
    depth: int = 16  # 6 n + 4
    widen: int = 4  # channels of the stages over 16, 32 and 64
    standardise: bool = True  # the convolutions' weights (Qiao et al. 2019)

    def __post_init__(self):
        super().__post_init__()
        fits = self.depth >= 10 and self.depth % 6 == 4
        require(fits, "depth", "must be 6 n + 4 and at least 10", self.depth)
        require(self.widen >= 1, "widen", "must be at least 1", self.widen)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        sizes = self.depth, self.widen, self.standardise
        model = WideResNet(normalise, shape, classes, self.norm, *sizes)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        return model


@dataclass(frozen=True, kw_only=True)
class ViTSpec(ModelSpec):
    """A small vision transformer; weights and biases as in Dosovitskiy et al., but for the head.

    They start the head at zero, which passes nothing back: the first update would leak no image.
    """

    norm: str = "layer"  # a transformer's own; it knows no other
    encoder: str = "residual"  # residual as in ViT, or sequential: no shortcuts, norms after
    patch: int = 4  # side of a patch, pixels; divides the image's sides
    width: int = 96  # of a token
    depth: int = 4  # encoder blocks
    heads: int = 4  # of self-attention; divide the width

    norms: ClassVar = ("layer",)

    def __post_init__(self):
        super().__post_init__()
        kinds = ("residual", "sequential")
        rule = f"must be among {', '.join(kinds)}"
        require(self.encoder in kinds, "encoder", rule, self.encoder)
        for key in ("patch", "width", "depth", "heads"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        fits = self.width % self.heads == 0
        require(fits, "heads", f"must divide the width {self.width}", self.heads)

    def network(self, normalise: nn.Module, shape: Shape, classes: int) -> nn.Module:
        rule = f"must divide the image's sides, {shape[1]} x {shape[2]}"
        fits = shape[1] % self.patch == 0 and shape[2] % self.patch == 0
        require(fits, "model.patch", rule, self.patch)
        sizes = (self.patch, self.width, self.depth, self.heads, self.encoder == "residual")
        model = ViT(normalise, shape, classes, *sizes)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        return model


# ---------------------------------------------------------------- weights from files


def load_weights(model: nn.Module, path: str) -> None:
    """Fill `model` from a file, whole or not at all.

    A .safetensors file, or a PyTorch file that holds tensors only (no code is run), on its own or
    under "state_dict", with or without the prefix "module." of data-parallel training.
    """
    found = _read_weights(home_read("model.weights", path))
    wanted = model.state_dict()
    # old files have no count of batches; it matters only to BatchNorm without momentum
    fill = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    found = fill | found
    for name, tensor in wanted.items():
        require(name in found, "model.weights", f"{path} must hold {name}", "none")
        shape, got = tuple(tensor.shape), found[name]
        rule = f"{name} in {path} must be of shape {shape}"
        require(tuple(got.shape) == shape, "model.weights", rule, tuple(got.shape))
        alike = got.is_floating_point() == tensor.is_floating_point() and not got.is_complex()
        require(alike, "model.weights", f"{name} in {path} must be {tensor.dtype}", got.dtype)
        finite = bool(got.isfinite().all())
        require(finite, "model.weights", f"{name} in {path} must be finite", "NaN or infinity")
    for name in found:
        rule = f"{path} must hold nothing that the model has no place for"
        require(name in wanted, "model.weights", rule, name)
    model.load_state_dict(found)


def _read_weights(file: Path) -> dict[str, Tensor]:
    require(file.is_file(), "model.weights", "must be a file that exists", file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(file)
        else:
            with warnings.catch_warnings():  # about pickle protocols; the refusal says enough
                warnings.simplefilter("ignore")
                stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on which byte is damaged
        reason = type(error).__name__
        rule = "must be a .safetensors file, or a PyTorch file that holds tensors only"
        raise Refused("model.weights", rule, f"{file} ({reason})") from error
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    named = stored if isinstance(stored, dict) else {}
    tensors = len(named) > 0 and all(isinstance(tensor, Tensor) for tensor in named.values())
    require(tensors, "model.weights", "must hold a state dict: tensors by name", file)
    return {str(name).removeprefix("module."): tensor for name, tensor in named.items()}

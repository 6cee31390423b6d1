"""Which layers a model has, and which of them sees the input: observed, given, or guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SEEN = "seen in a client's forward pass"
GIVEN = "of the given model, in the order of its definition"
NAMES = "guessed from the arrays' names, shapes and order"

RUNNING = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer with parameters, and the names that its tensors have in the messages."""

    name: str
    kind: str  # linear, conv, norm, batchnorm, embedding, position, other
    tensors: dict[str, Shape]  # by name, in the message's own order
    weight: str = ""
    bias: str = ""  # empty: it has none


@dataclass(frozen=True)
class Structure:
    """Layers in the order in which data passes them, as far as `source` knows it."""

    layers: tuple[Layer, ...]
    source: str  # SEEN, GIVEN or NAMES
    model: str = ""  # the class
    file: str = ""  # where it is defined, and on which line
    line: int = 0

    @staticmethod
    def of(said: dict[str, Any]) -> Structure:
        """From what JSON made of one."""
        layers = tuple(
            Layer(**{**each, "tensors": {k: tuple(v) for k, v in each["tensors"].items()}})
            for each in said["layers"]
        )
        return Structure(**{**said, "layers": layers})

    @property
    def first(self) -> Layer | None:
        """The layer that sees the input."""
        return next(iter(self.layers), None)

    @property
    def last(self) -> Layer | None:
        """The layer that tells classes apart: the last linear one."""
        return next((each for each in reversed(self.layers) if each.kind == "linear"), None)

    def within(self, folder: Path) -> Structure:
        """The same with its file as it is called from `folder` on; without one of elsewhere."""
        inside = bool(self.file) and Path(self.file).is_relative_to(folder)
        if not inside:
            return replace(self, file="", line=0)
        return replace(self, file=Path(self.file).relative_to(folder).as_posix())

    def named(self, shapes: dict[str, Shape]) -> Structure:
        """The same with the names that these arrays have: by name, or by order and shape.

        Where neither fits, what the arrays themselves say.
        """
        own = {name: shape for layer in self.layers for name, shape in layer.tensors.items()}
        if own.items() <= shapes.items():
            return self
        trained = {k: s for k, s in own.items() if _trainable(k)}
        for ours in (own, trained):  # a state dict, or the parameters alone
            order = sorted(ours, key=_position(self.layers))
            if [ours[name] for name in order] == list(shapes.values()):
                return self._renamed(dict(zip(order, shapes, strict=True)))
        return guessed(shapes)

    def _renamed(self, names: dict[str, str]) -> Structure:
        layers = [
            replace(
                layer,
                tensors={names[k]: s for k, s in layer.tensors.items() if k in names},
                weight=names.get(layer.weight, ""),
                bias=names.get(layer.bias, ""),
            )
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers))


def _trainable(name: str) -> bool:
    return name.rpartition(".")[2] not in (*RUNNING, COUNTER)


def _position(layers: Sequence[Layer]) -> Callable[[str], int]:
    """Where a tensor stands in the state dict: `Layer.tensors` of a module are in that order."""
    places = {name: layer.tensors for layer in layers for name in layer.tensors}
    order = {name: i for i, name in enumerate(places)}
    return order.__getitem__


def guessed(shapes: dict[str, Shape]) -> Structure:
    """What names and shapes say. A layer is a weight and the bias that follows it."""
    layers: list[Layer] = []
    names = list(shapes)
    taken: set[str] = set()
    for index, name in enumerate(names):
        if name in taken:
            continue
        own = [name]
        prefix, _, part = name.rpartition(".")
        for other in names[index + 1 :]:
            sibling = prefix and other.rpartition(".")[0] == prefix
            follows = not prefix and len(own) == 1 and _biases(shapes, name, other)
            if not (sibling or follows) or (follows and other != names[index + 1]):
                break
            own.append(other)
        taken.update(own)
        layers.append(_guessed_layer(prefix or part, {k: shapes[k] for k in own}))
    return Structure(tuple(layers), NAMES)


def _biases(shapes: dict[str, Shape], weight: str, other: str) -> bool:
    """Whether `other`, which has no name of its own, may be the bias of `weight`."""
    shape = shapes[weight]
    bare = len(shape) == 2 or len(shape) > 3 or len(shape) == 1
    return bare and bool(shape) and shapes[other] == shape[:1]


def _guessed_layer(name: str, tensors: dict[str, Shape]) -> Layer:
    weight, *rest = tensors
    shape, parts = tensors[weight], {k.rpartition(".")[2] for k in tensors}
    bias = next((k for k in rest if tensors[k] == shape[:1] and _is_bias(k)), "")
    if parts & {*RUNNING}:
        kind = "batchnorm"
    elif re.search(r"pos(ition)?(al)?_?(emb|enc|$)", weight, re.IGNORECASE) and len(shape) >= 2:
        kind = "position"
    elif re.search(r"emb|wte", weight, re.IGNORECASE) and len(shape) == 2 and not bias:
        kind = "embedding"
    elif len(shape) == 2:
        kind = "linear"
    elif len(shape) >= 3:
        kind = "conv" if len(shape) > 3 or bias or "conv" in weight else "other"
    else:
        kind = "norm" if bias else "other"
    return Layer(name, kind, tensors, weight, bias)


def _is_bias(name: str) -> bool:
    part = name.rpartition(".")[2]
    return "bias" in part or part.isdigit()


def of_module(model: nn.Module, called: Sequence[str] | None = None) -> Structure:
    """The layers of a network; in the order in which they were `called`, or of its definition."""
    import inspect

    state = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    modules = dict(model.named_modules())
    holders = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    layers = {}
    for name in holders:
        own = {k: s for k, s in state.items() if k.rpartition(".")[0] == name}
        layers |= {each.name: each for each in _layers(name, modules[name], own)}
    ordered = list(dict.fromkeys(name for name in [*(called or ()), *layers] if name in layers))
    try:
        file = inspect.getsourcefile(type(model)) or ""
        line = inspect.getsourcelines(type(model))[1]
    except (OSError, TypeError):
        file, line = "", 0
    source = GIVEN if called is None else SEEN
    chosen = tuple(layers[name] for name in ordered)
    return Structure(chosen, source, type(model).__name__, file, line)


def _layers(name: str, module: nn.Module, own: dict[str, Shape]) -> list[Layer]:
    from torch import nn

    kinds = {
        "batchnorm": nn.modules.batchnorm._BatchNorm,
        "embedding": nn.Embedding | nn.EmbeddingBag,
        "linear": nn.Linear,
        "conv": nn.modules.conv._ConvNd,
        "norm": nn.GroupNorm | nn.LayerNorm,
    }
    kind = next((k for k, classes in kinds.items() if isinstance(module, classes)), "other")
    full = {part: f"{name}.{part}" if name else part for part in ("weight", "bias")}
    if kind == "other":  # parameters of a module of the app's own: each for itself
        return [_guessed_layer(k, {k: s}) for k, s in own.items()]
    weight, bias = (full[part] if full[part] in own else "" for part in ("weight", "bias"))
    return [Layer(name, kind, own, weight, bias)]

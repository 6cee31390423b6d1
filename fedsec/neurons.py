"""Images read off single neurons of a fully connected layer, and what certifies them.

What neuron i passes back from an image x is a number g times x in its row of the weight gradient,
and g in its entry of the bias gradient. So the row over the entry is x where one image alone drove
the neuron, and else a blend of several. Malicious servers arrange for the former.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import one_hot

from fedsec import solve
from fedsec.attack import Progress, Told
from fedsec.checks import Refused
from fedsec.labels import targets_of
from fedsec.models import first_layer
from fedsec.threat import Observation
from fedsec.types import Reconstruction, Tensors

# From a layer's weight and bias gradient: images [n c h w] that single neurons may hold, the bias
# gradient [n] that each would have caused, and the neurons [n].
Candidates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

CLOSE = 1e-3  # of the data range: what rounding may do to a pixel
CERTAIN = 1e-4  # relative: what it may do to a gradient; blends come this close by chance too
CHUNK = 64  # candidates certified at a time
UNCERTAIN = "BatchNorm in train mode couples the images of a batch, so that nothing is certified"


@dataclass(frozen=True)
class Read:
    """The images of one victim: first the certified ones, then blends, then grey."""

    images: Float[Tensor, "b c h w"]
    labels: list[int]  # of the certified ones
    blends: int  # how many are inside the data range, but not certified

    @property
    def flag(self) -> str:
        count = len(self.images)
        grey = count - len(self.labels) - self.blends
        return (
            f"{len(self.labels)} of {count} images drove a neuron alone, certified by their own "
            f"gradient; {self.blends} may be blends; {grey} were not found and are grey"
        )


def reconstruct(
    seen: Observation,
    layer: str,
    candidates: Candidates,
    rngs: Sequence[torch.Generator],
    progress: Progress | Told,
    method: str = "auto",
) -> Reconstruction:
    """The images that the neurons of `layer` hold, for every victim of the stack.

    Labels are certified with their images, and else recovered by `method` (labels.METHODS). The
    objective is the cosine distance between the observed update and the one that the result would
    cause.
    """
    targets, told = targets_of(seen, rngs, method)
    scale = seen.step.lr if seen.step.kind == "fedavg" else 1.0

    def one(update: Tensors, victim: int) -> solve.Found:
        held = candidates(update[f"{layer}.weight"], update[f"{layer}.bias"] / scale)
        found = read(seen, layer, *held)
        recovered = targets[victim].argmax(-1).tolist()
        named = torch.tensor(all_labels(found.labels, recovered), device=targets.device)
        told_so = one_hot(named, targets.shape[-1]).to(targets)
        loss = solve.misfit(seen, found.images, told_so, update)
        flags = (found.flag, UNCERTAIN) if coupled(seen.model) else (found.flag,)
        return solve.Found(found.images, named, loss, flags)

    return solve.each(seen, rngs, progress, one, told)


def first_linear(
    attack: str, model: nn.Module, needs: str = "with bias", holds: bool = True
) -> tuple[str, nn.Linear]:
    """The layer that sees the images. Refused unless it is linear, with bias, and `holds`."""
    name, layer = first_layer(model)
    if not holds or not isinstance(layer, nn.Linear) or layer.bias is None:
        rule = f"attack={attack} needs a fully connected first layer {needs} (model=mlp)"
        raise Refused("model", rule, f"{type(layer).__name__} {name}")
    return name, layer


def pixels(seen: Observation, inputs: Float[Tensor, "n *d"]) -> Float[Tensor, "n c h w"]:
    """The images that are these inputs of the first layer, once they are normalised."""
    normalise = seen.model.normalise
    return inputs.reshape(-1, *seen.shape) * normalise.std + normalise.mean


def refuse_steps(attack: str, known: Observation) -> None:
    """Neurons say exact things of one gradient only: refuse a client that takes several steps."""
    if "local" in known.grants and known.local.kind == "fedavg" and known.local.steps > 1:
        rule = f"attack={attack} reads a single gradient; use client=gradient or client.steps=1"
        raise Refused("client", rule, f"{known.local.steps} local steps")


def beyond_rounding(passed: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which neurons passed something back that is more than rounding."""
    return passed.abs() > 32 * torch.finfo(passed.dtype).eps * passed.abs().max()


def read(
    seen: Observation,
    layer: str,
    candidates: Float[Tensor, "n c h w"],
    passed: Float[Tensor, " n"],
    neurons: Int[Tensor, " n"],
) -> Read:
    """The `count` most credible of the images that `neurons` of `layer` hold.

    `passed` is the gradient of one neuron's bias that each candidate is said to have caused, of the
    mean loss. Candidates outside the data range are blends and go; equal ones count once.
    """
    low, high = seen.data_range
    close = CLOSE * (high - low)
    outside = (low - candidates).clamp_min(0) + (candidates - high).clamp_min(0)
    inside = outside.flatten(1).amax(1) <= close
    candidates, passed, neurons = candidates[inside], passed[inside], neurons[inside]
    same = equal(candidates.flatten(1), close)
    first = ~same.tril(-1).any(1)
    # images that more neurons hold are more credible, and then those that passed more back
    order = sorted(
        first.nonzero().flatten().tolist(),
        key=lambda i: (-int(same[i].sum()), -float(passed[i].abs())),
    )
    candidates, passed, neurons = candidates[order], passed[order], neurons[order]
    alone, labels = certify(seen.model, layer, candidates, passed * seen.count, neurons)
    sure, rest = alone.nonzero().flatten()[: seen.count], (~alone).nonzero().flatten()
    rest = rest[: seen.count - len(sure)]
    images = candidates[torch.cat([sure, rest])].clamp(low, high)
    grey = images.new_full((seen.count - len(images), *seen.shape), (low + high) / 2)
    return Read(torch.cat([images, grey]), labels[sure].tolist(), len(rest))


def certify(
    model: nn.Module,
    layer: str,
    images: Float[Tensor, "n c h w"],
    passed: Float[Tensor, " n"],
    neurons: Int[Tensor, " n"],
) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
    """Which images, alone, pass `passed` back to the bias of their neuron; and with which label.

    BatchNorm in train mode makes an image's gradient depend on the others: then none is certified.
    """
    if len(images) == 0 or coupled(model):
        return torch.zeros_like(passed, dtype=torch.bool), torch.full_like(neurons, -1)
    own = own_gradients(model, layer, images, neurons)
    error, labels = (own - passed[:, None]).abs().min(1)
    return error <= CERTAIN * passed.abs(), labels


def own_gradients(
    model: nn.Module, layer: str, images: Float[Tensor, "n c h w"], neurons: Int[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    """The gradient of an image's cross entropy in its neuron's bias, for each label it may have.

    (p - y) times the derivative of the logits along the bias: one forward-mode pass for all labels.
    """
    name = f"{layer}.bias"
    bias = model.get_parameter(name).detach()

    def one(image: Tensor, neuron: Tensor) -> Tensor:
        along = one_hot(neuron, len(bias)).to(bias)

        def logits_at(b: Tensor) -> Tensor:
            return functional_call(model, {name: b}, (image[None],))[0]

        logits, slope = jvp(logits_at, (bias,), (along,))[:2]
        return (logits.softmax(0) * slope).sum() - slope

    return vmap(one, chunk_size=CHUNK)(images, neurons)


def coupled(model: nn.Module) -> bool:
    """Whether the images of a batch change each other's gradients."""
    norms = nn.modules.batchnorm._BatchNorm
    return any(m.training for m in model.modules() if isinstance(m, norms))


def equal(rows: Float[Tensor, "n d"], within: float) -> Bool[Tensor, "n n"]:
    """Which rows equal which, up to a root mean square difference."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(rows, rows, compute_mode=exact) <= within * rows.shape[1] ** 0.5


def all_labels(sure: Sequence[int], recovered: Sequence[int]) -> list[int]:
    """The certified labels, then those of the `recovered` ones that they leave."""
    rest = list(recovered)
    for label in sure:
        if label in rest:
            rest.remove(label)
    return [*sure, *rest[: len(recovered) - len(sure)]]

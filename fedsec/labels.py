"""Label recovery, a part of its own that every attack can use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec.checks import Refused
from fedsec.cost import flops
from fedsec.models import last_linear
from fedsec.threat import Observation

NOISE_IMAGES = 256  # inputs from which the mean prediction of a model is estimated


def targets_of(
    seen: Observation, rngs: Sequence[torch.Generator]
) -> tuple[Float[Tensor, "v b k"], float]:
    """What the loss was told, as granted or else recovered, one-hot; and GFLOP for each victim."""
    if "labels" in seen.grants:
        return seen.labels, 0.0
    found: list[Tensor] = []
    spent = flops(lambda: found.append(recover(seen, rngs)))
    targets = F.one_hot(found[0], classes(seen.model))
    return targets.to(next(seen.model.parameters()).dtype), spent / len(rngs)


def recover(seen: Observation, rngs: Sequence[torch.Generator]) -> Int[Tensor, "v b"]:
    """Each victim's labels, sorted by class: the iDLG rule at batch 1, bias counts above it."""
    gradient = output_gradient(seen)
    if seen.count == 1:
        return idlg(gradient)[:, None]
    expected = torch.stack([mean_prediction(seen, rng) for rng in rngs])
    return bias_counts(gradient, expected, seen.count)


def idlg(gradient: Float[Tensor, "v k"]) -> Int[Tensor, " v"]:
    """The class whose output gradient is negative (Zhao et al. 2020, section 3.1): p_k - y_k.

    Exact for one image and an undefended update; under noise the least entry is the best guess.
    """
    return gradient.argmin(1)


def bias_counts(
    gradient: Float[Tensor, "v k"], expected: Float[Tensor, "v k"], count: int
) -> Int[Tensor, "v b"]:
    """Labels of a batch from n_k = B (p_k - gradient of bias k), rounded to sum to B.

    `expected` is the mean prediction p on the batch, which the attacker estimates. Largest
    remainders get what rounding leaves over.
    """
    counts = (count * (expected - gradient)).clamp_min(0)
    told = counts.sum(1, keepdim=True) > 0  # noise may deny every class: then guess from p
    counts = torch.where(told, counts, expected)
    counts = count * (counts / counts.sum(1, keepdim=True))
    whole = counts.floor()
    rest = (count - whole.sum(1)).long()
    order = (counts - whole).argsort(1, descending=True)
    rank = torch.arange(counts.shape[1], device=counts.device).expand_as(order)
    whole.scatter_add_(1, order, (rank < rest[:, None]).to(whole.dtype))
    named = torch.arange(counts.shape[1], device=counts.device)
    return torch.stack([named.repeat_interleave(row.long()) for row in whole])


def output_gradient(seen: Observation) -> Float[Tensor, "v k"]:
    """The mean gradient of the loss with respect to the logits, read off the last layer.

    It is the bias's gradient; without a bias, the weight's summed over its inputs gives its signs
    where those are positive (Zhao et al. 2020). An update of several local steps is brought back to
    one gradient's scale if the server's knowledge of them is granted.
    """
    name, layer = last_linear(seen.model)
    update = seen.update if "update" in seen.grants else seen.aggregate
    prefix = f"{name}." if name else ""
    if layer.bias is not None:
        gradient = update.tensors[f"{prefix}bias"]
    elif seen.count == 1:
        gradient = update.tensors[f"{prefix}weight"].sum(-1)
    else:
        raise Refused("attack", "label counts need a bias in the last layer", name)
    if "local" in seen.grants and seen.local.kind == "fedavg":
        gradient = gradient / (seen.local.lr * seen.local.steps)
    return gradient


@torch.no_grad()
def mean_prediction(seen: Observation, rng: torch.Generator) -> Float[Tensor, " k"]:
    """The model's mean class probabilities on noise in the data range."""
    noise = torch.rand(NOISE_IMAGES, *seen.shape, generator=rng)
    parameter = next(seen.model.parameters())
    return seen.model(noise.to(parameter.device, parameter.dtype)).softmax(1).mean(0)


@torch.no_grad()
def classes(model: nn.Module) -> int:
    return last_linear(model)[1].out_features

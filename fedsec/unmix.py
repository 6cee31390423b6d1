"""Sources from encodings that mix them: E = W X, or |E - 0.5| = |W X - 0.5| where signs are random.

n encodings [n c h w] of n sources, by weights W [n n] whose rows sum to one. With W known, mixed
images are a linear system (`sources`); random signs leave 2^n solutions for each pixel, among which
smoothness chooses (`unsigned`): but for a negative of all sources at once, which is as smooth. W is
told by mixed labels, if all sources have classes of their own (`told`), or by the encodings, since
edges of photographs are sparse and independent (`separated`). The last part is about updates: what
they tell of encodings, and of what was mixed. attacks/unmix.py puts these together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedsec import cost, ica, solve
from fedsec.attack import Attack
from fedsec.defense import Defense, parts
from fedsec.models import last_linear
from fedsec.stages import admitted
from fedsec.threat import Observation
from fedsec.types import Local, Reconstruction, Tensors

STARTS = 3  # random rotations that the separation begins with
STEPS = 300  # of L-BFGS, for each; about 50 suffice
MASS = 0.01  # of a class over all encodings, below which it is rounding
SIGHT = 64  # sign patterns kept for a pixel, those that are nearest to the box
ACROSS = 0.5  # weight of a difference between two channels of a pixel; of two neighbours: 1
OUTSIDE = 10.0  # of a unit outside the box
SWEEPS = 30  # over all pixels, at most, after growing
FLAT = 1e-6  # determinant of weights up to which they do not tell sources apart
MOST = 10  # encodings whose 2^n sign patterns are solved for
STUCK = 0.1  # misfit of a match with labels, above which recovered ones are tried
CERTAIN = 1e-4  # misfit of the re-computed update up to which encodings are exact
REST = 0.02  # of re-mixed sources from the encodings, up to which decoded ones do; of [0, 1]


def separated(encodings: Float[Tensor, "n c h w"], rng: torch.Generator) -> Float[Tensor, "n n"]:
    """Weights under which the sources' edges are likeliest, by independent component analysis.

    Columns in any order. Mixtures tell sources but for a factor each; that W's rows sum to one says
    that those of its inverse do, which is the factor.
    """
    n = len(encodings)
    white, edges = ica.whitened(ica.edges(encodings.double()))
    found = []
    for _ in range(STARTS):
        start = torch.linalg.qr(torch.randn(n, n, generator=rng).to(edges))[0]
        u, _ = ica.minimised(lambda u: ica.likelihood(edges, u), start, STEPS)
        found.append((float(ica.likelihood(edges, u)), u))
    inverse = min(found, key=lambda pair: pair[0])[1] @ white
    total = inverse.sum(1, keepdim=True)
    return torch.linalg.pinv(inverse / torch.where(total.abs() > 1e-9, total, 1))


def told(labels: Float[Tensor, "n k"]) -> Float[Tensor, "n n"] | None:
    """Weights from mixed labels W Y: the columns of Y's classes. None if two sources share one."""
    n, labels = len(labels), labels.double()
    classes = (labels.sum(0) > MASS * n).nonzero()[:, 0]
    if len(classes) != n:
        return None
    weights = labels[:, classes]
    weights = weights / weights.sum(1, keepdim=True)
    return weights if float(torch.linalg.det(weights).abs()) > FLAT else None


def sources(
    encodings: Float[Tensor, "n c h w"], weights: Float[Tensor, "n n"]
) -> Float[Tensor, "n c h w"]:
    """argmin |W X - E|^2, the shortest where W has no inverse; then moved into [0, 1]."""
    inverse = torch.linalg.pinv(weights.double())
    flat = inverse @ encodings.flatten(1).double()
    return flat.view(encodings.shape).clamp(0, 1).to(encodings.dtype)


def unsigned(
    magnitudes: Float[Tensor, "n c h w"], weights: Float[Tensor, "n n"], starts: int
) -> tuple[Float[Tensor, "n c h w"], float]:
    """Sources whose mixtures are `magnitudes` away from 0.5; and GFLOP.

    For each pixel and channel the 2^n sign patterns give as many solutions W^-1 s |E - 0.5|. From
    one of `starts` pixels the region of pixels with a chosen pattern grows, the surest pixel next:
    the one whose best pattern leads by most, in absolute differences to its chosen neighbours and
    to [0, 1]. Then single pixels change while that lowers the sum, and the smoothest of all starts
    wins. Of the two negatives the one that is darker, and brighter above than below, as
    photographs mostly are.
    """
    n = len(magnitudes)
    assert n <= MOST, "2^n patterns for each pixel"
    signs = torch.tensor(list(product((1.0, -1.0), repeat=n)), dtype=torch.float64)
    flat = magnitudes.flatten(1).T.double().cpu()
    inverse = torch.linalg.pinv(weights.double().cpu())
    each = (signs * flat[:, None]) @ inverse.T  # [p s n]
    outside = OUTSIDE * (each.abs() - 0.5).clamp_min(0).sum(2)
    outside, kept = outside.topk(min(SIGHT, len(signs)), largest=False)
    each = each.gather(1, kept[..., None].expand(-1, -1, n))
    near = _neighbours(magnitudes.shape[1:])
    sure = flat.amin(1).argsort(descending=True)  # far from every sign's change
    seeds = sure[:: max(1, len(sure) // (4 * starts))][:starts].tolist()
    grown = [_grown(each.numpy(), outside.numpy(), near, seed) for seed in seeds]
    chosen = min(grown, key=lambda one: one[1])[0]
    x = torch.from_numpy(chosen).T.reshape(magnitudes.shape)
    middle = x.shape[2] // 2
    light = x[:, :, :middle].mean() - x[:, :, middle:].mean() - x.mean()
    x = x if light >= 0 else -x
    spent = sum(v for *_, v in grown) * each.shape[1] * n * 3 + each.numel() * 2 * n
    return (0.5 + x).clamp(0, 1).to(magnitudes), spent / 1e9


Near = list[list[tuple[int, float]]]  # of each pixel: its neighbours, and their weights


def _neighbours(shape: torch.Size) -> Near:
    place = np.arange(shape.numel()).reshape(shape)
    near: Near = [[] for _ in range(place.size)]
    for dim, weight in enumerate((ACROSS, 1.0, 1.0)):
        one, other = (np.delete(place, i, dim).ravel().tolist() for i in (-1, 0))
        for p, q in zip(one, other, strict=True):
            near[p].append((q, weight))
            near[q].append((p, weight))
    return near


def _grown(
    each: np.ndarray, outside: np.ndarray, near: Near, seed: int
) -> tuple[np.ndarray, float, int]:
    """The pixels' chosen solutions [p n], what they cost, and how often two were compared."""
    cost, chosen = outside.copy(), np.full(len(each), -1)
    queue, visits = [(0.0, seed)], 0
    while queue:
        _, p = heapq.heappop(queue)
        if chosen[p] >= 0:
            continue
        chosen[p] = cost[p].argmin()
        for q, weight in near[p]:
            if chosen[q] < 0:
                visits += 1
                cost[q] += weight * np.abs(each[q] - each[p, chosen[p]]).sum(1)
                best = np.partition(cost[q], 1)
                heapq.heappush(queue, (best[0] - best[1], q))
    whole = 0.0
    for _ in range(SWEEPS):
        before, whole = chosen.copy(), 0.0
        for p, beside in enumerate(near):
            pulls = [w * np.abs(each[p] - each[q, chosen[q]]).sum(1) for q, w in beside]
            visits += len(beside)
            here = outside[p] + sum(pulls)
            chosen[p] = here.argmin()
            whole += here[chosen[p]]
        if (chosen == before).all():
            break
    rows = np.arange(len(each))
    return each[rows, chosen], float(whole + outside[rows, chosen].sum()) / 2, visits


def decoded(
    found: Reconstruction,
    weights: Float[Tensor, "n n"],
    magnitude: Callable[[Tensor], Tensor] | None,
    starts: int,
) -> Reconstruction:
    """Sources of the encodings `found`, if re-mixed they are those again.

    `magnitude` is what random signs leave of an encoding; None: there are none.
    """
    encodings = found.images[0]
    if magnitude and len(encodings) > MOST:
        return found.saying(f"unmix: signs of more than {MOST} encodings are too many")
    if magnitude:
        images, gflop = unsigned(magnitude(encodings), weights, starts)
    else:
        images, gflop = cost.counted(lambda: sources(encodings, weights))
    found = replace(found, gflop=found.gflop + gflop)
    again = (weights.to(images) @ images.flatten(1)).view_as(images)
    gap = magnitude(again) - magnitude(encodings) if magnitude else again - encodings
    rest = gap.square().mean().sqrt()
    if not rest <= REST:
        return found.saying("unmix: re-mixed sources are not the encodings, which are shown")
    found = replace(found, images=images[None], loss=found.loss + rest)
    both = "unmix: images and their negatives fit alike; the likelier are shown"
    return found.saying(both) if magnitude else found


# ---- what an update tells -----------------------------------------------------------------------


def mixer(defense: Defense, *kinds: type) -> Defense | None:
    """The one part that mixes, if it is of these kinds."""
    mixing = [part for part in parts(defense) if part.mixes]
    return mixing[0] if len(mixing) == 1 and isinstance(mixing[0], kinds) else None


def several(seen: Observation) -> bool:
    """Whether the update is of more than one mix of the whole batch."""
    local = seen.step
    part = local.kind == "fedavg" and 0 < local.batch < seen.count
    return part or local.steps > 1


def weights(seen: Observation, mixed: Float[Tensor, "n k"] | None) -> Float[Tensor, "n n"] | None:
    """W as it is granted, with the labels, or as `mixed` labels tell it; None: nothing does."""
    if several(seen):
        return None
    if {"mixing", "labels"} <= set(seen.grants):
        return seen.mixing[0]
    return None if mixed is None else told(mixed)


def classes(weights: Float[Tensor, "n n"], mixed: Float[Tensor, "n k"]) -> Int[Tensor, "1 n"]:
    """Of the sources."""
    sources = torch.linalg.pinv(weights.double()) @ mixed.double()
    return sources.argmax(-1)[None]


def exact(
    solver: Attack, seen: Observation, rng: torch.Generator, known: Float[Tensor, "1 n k"] | None
) -> tuple[Reconstruction | None, Float[Tensor, "n k"] | None]:
    """One victim's encodings as `solver` has them, with their mixed labels.

    Without labels where re-computing the update does not confirm them. In the order of the labels
    `known`, where there are any.
    """
    if not admitted(solver, seen):
        return None, None
    found = solver(seen, [rng], lambda *_: None)
    sent = {k: t[0] for k, t in seen.update.tensors.items()}

    def tell() -> tuple[Tensor, Tensor]:
        mixed = mixed_labels(seen.model, found.images[0], sent, seen.step)
        return mixed, solve.misfit(seen, found.images[0], mixed, sent)

    (mixed, misfit), gflop = cost.counted(tell)
    found = replace(found, gflop=found.gflop + gflop)
    if found.flags[0] or not misfit <= CERTAIN:
        return found, None
    found = replace(found, loss=misfit[None])
    if known is None:
        return found, mixed
    order = paired(mixed, known[0])
    return replace(found, images=found.images[:, order]), mixed[order]


def mixed_labels(
    model: nn.Module, encodings: Float[Tensor, "n c h w"], sent: Tensors, local: Local
) -> Float[Tensor, "n k"]:
    """What the loss was told of encodings that are known exactly: p - n D, with D H = the gradient.

    H [n d] are the last layer's inputs, p its predictions, D [n k] what they pass back of it.
    """
    inputs: list[Tensor] = []
    name, layer = last_linear(model)
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = model(encodings)
    hook.remove()
    scale = 1.0 if local.kind == "gradient" else local.lr * local.steps
    rows = sent[f"{name}.weight" if name else "weight"].double() / scale
    back = (rows @ torch.linalg.pinv(inputs[0].double())).T
    told = logits.double().softmax(1) - len(encodings) * back
    return told.to(encodings.dtype)


def paired(told: Float[Tensor, "n k"], known: Float[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """For each row of `known` the row of `told` that is taken for it, one to one."""
    from scipy.optimize import linear_sum_assignment

    far = torch.cdist(known.double(), told.double()).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(far)[1]).to(told.device)


class Through(nn.Module):
    """A model that is given sources and sees their mixtures: `weights` are its first layer."""

    weights: Tensor

    def __init__(self, model: nn.Module, weights: Float[Tensor, "n n"]):
        super().__init__()
        self.model, self.normalise = model, model.get_submodule("normalise")
        self.register_buffer("weights", weights.to(next(model.parameters())))
        self.train(model.training)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        whole = len(x) == len(self.weights)  # an engine asks for the classes with two
        return self.model((self.weights @ x.flatten(1)).view_as(x) if whole else x)


def matched(
    match: Callable[[Float[Tensor, "1 n k"] | None], Reconstruction],
    known: Float[Tensor, "1 n k"] | None,
    hard: Float[Tensor, "1 n k"],
    mixes: bool,
) -> Reconstruction:
    """Encodings by `match` with labels that are known, else jointly with mixed ones if it `mixes`.

    Where that gets stuck, with `hard` labels.
    """
    start = known if known is not None or mixes else hard
    found = match(start)
    if start is not None or found.loss <= STUCK:
        return found
    other = match(hard)
    best = other if other.loss < found.loss else found
    return replace(best, gflop=found.gflop + other.gflop, steps=found.steps + other.steps)


def through(seen: Observation, weights: Float[Tensor, "n n"]) -> Observation:
    """The same of a model that mixes before it looks: its images are the sources."""
    tensors = {f"model.{k}": t for k, t in seen.update.tensors.items()}
    update = replace(seen.update, tensors=tensors)
    return seen.having(update=update, model=Through(seen.model, weights))

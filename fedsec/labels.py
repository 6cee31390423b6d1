"""Label recovery, a part of its own that every attack can use.

All methods read the last fully connected layer. With p the model's predictions on the private
batch, y the labels, and h the layer's inputs, the gradient of its bias is mean(p - y) and that of
its weight mean((p - y) h'). So counts follow from the mean prediction; methods differ in how they
estimate it. What they need of a model besides is read off dummy images: public ones where the
threat model grants them, else coloured noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsec.checks import require
from fedsec.cost import counted
from fedsec.defense import parts
from fedsec.models import last_linear
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Local

DUMMIES = 512  # images that stand for the private ones
FEWEST = 16  # public images below which noise says more
TOGETHER = 64  # dummies in one forward pass: about a client's batch, as BatchNorm sees it
LOUD = 1e-4  # noise over the greatest entry of the rows, above which rounding does not explain it
PAIRS = 1e7  # class x class x dummy numbers that `rlu` holds at once


def targets_of(
    seen: Observation, rngs: Sequence[torch.Generator], method: str = "auto"
) -> tuple[Float[Tensor, "v b k"], float]:
    """What the loss was told, as granted or else recovered, one-hot; and GFLOP for each victim.

    Victims share the pass over the dummies, and each is charged for it: what it would cost alone.
    """
    if "labels" in seen.grants:
        return seen.labels, 0.0
    last = _last_layers(seen)
    tell = METHODS[_chosen(method, seen.count)]
    first, spent = counted(lambda: tell(last[0]))
    found = [first, *(tell(one) for one in last[1:])]
    assert len(found) == len(rngs)
    targets = F.one_hot(torch.stack(found), classes(seen.model))
    return targets.to(next(seen.model.parameters()).dtype), spent


def recover(seen: Observation, method: str = "auto") -> Int[Tensor, "v b"]:
    """Each victim's labels, sorted by class. It draws nothing: equal updates give equal labels."""
    tell = METHODS[_chosen(method, seen.count)]
    return torch.stack([tell(last) for last in _last_layers(seen)])


def known(method: str) -> None:
    """Refuse a field `labels` that names no method."""
    names = ("auto", *METHODS)
    require(method in names, "labels", f"must be among {', '.join(names)}", method)


def fits(method: str, count: int, classes: int) -> None:
    """Refuse a method that cannot tell so many labels."""
    rule = "idlg tells one image's label; auto serves batches"
    require(method != "idlg" or count == 1, "attack.labels", rule, count)
    rule = f"yin finds different labels, at most {classes} here; auto serves larger batches"
    require(method != "yin" or count <= classes, "attack.labels", rule, count)


def _chosen(method: str, count: int) -> str:
    """auto: exact for one image; above it the method that was never far from the best measured."""
    if method != "auto":
        return method
    return "idlg" if count == 1 else "rlu"


# ---------------------------------------------------------------- what a method is given


Look = Callable[[], tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]]  # inputs, logits


@dataclass(frozen=True)
class Last:
    """The last layer of one victim; gradients at the scale of one, of the mean loss."""

    rows: Float[Tensor, "k d"]  # gradient of the weight
    gradient: Float[Tensor, " k"]  # of the bias: mean of prediction - label
    noise: float  # standard deviation of what a defense added to an entry of `rows`
    error: float  # variance of an entry of `gradient`
    weight: Float[Tensor, "k d"]  # before the update
    bias: Float[Tensor, " k"]
    count: int
    local: Local  # a gradient, where the adversary does not know better
    start: Look  # what the dummies are for the model before the update
    end: Look  # and after it


def _last_layers(seen: Observation) -> list[Last]:
    """One for each victim.

    An update of several local steps is brought back to one gradient's scale if the server's
    knowledge of them is granted; and one that a defense shortened, as it is known to do.
    """
    shortens = "defense" in seen.grants and any(not part.turns for part in parts(seen.defense))
    name, layer = last_linear(seen.model)
    update = seen.sent
    local = seen.step
    scale = 1.0 if local.kind == "gradient" else 1 / (local.lr * local.steps)
    prefix = f"{name}." if name else ""
    before = {k: p.detach() for k, p in seen.model.named_parameters()}
    weight = layer.weight.detach().double()
    bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias.detach().double()
    images = functools.cache(lambda: dummies(seen))
    start = functools.cache(lambda: _outputs(seen.model, before, images()))
    sent = dict(update.tensors)

    def end(v: int) -> tuple[Tensor, Tensor]:
        after = {k: w - _finite(sent[k][v]) if k in sent else w for k, w in before.items()}
        return _outputs(seen.model, after, images())

    found = []
    for v, rows in enumerate(_finite(sent[f"{prefix}weight"]).double() * scale):
        # p and y both sum to one, so that in each column only noise does not cancel
        noise = float((rows.sum(0).square().mean() / len(rows)).sqrt())
        if layer.bias is not None:
            gradient, error = _finite(sent[f"{prefix}bias"][v]).double() * scale, noise**2
        else:
            gradient, error = rows.sum(1), math.inf
        if noise > LOUD * float(rows.abs().max()) or (layer.bias is None and seen.count > 1):
            gradient, error = _from_rows(rows, start()[0], noise, gradient, error, seen.count)
        if shortens:
            length = kept(gradient, start()[1].softmax(1).mean(0), seen.count)
            rows, gradient = rows / length, gradient / length
            noise, error = noise / length, error / length**2
        after = functools.partial(end, v)
        found.append(
            Last(rows, gradient, noise, error, weight, bias, seen.count, local, start, after)
        )
    return found


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, posinf=0, neginf=0)


def _from_rows(
    rows: Tensor, inputs: Tensor, noise: float, gradient: Tensor, error: float, count: int
) -> tuple[Tensor, float]:
    """The bias's gradient, and its variance, joined with what the weight's says along inputs.

    The weight's is about `gradient` times the mean input: a sum over many entries, so that noise
    counts less in it, but images differ in their inputs. Each counts by its variance.
    """
    mean = inputs.mean(0)
    mean = mean / mean.square().sum().clamp_min(1e-30)
    apart = float((inputs @ mean).var()) / (count * len(rows))
    other = noise**2 * float(mean.square().sum()) + apart + 1e-30
    own = 1 / error if error > 0 else 0.0
    joined = (gradient * own + rows @ mean / other) / (own + 1 / other)
    return joined, 1 / (own + 1 / other)


def dummies(seen: Observation) -> Float[Tensor, "n c h w"]:
    """Public images where granted and not too few, else noise with the spectrum of photographs.

    The noise has the mean and spread to which the model normalises, amplitudes that fall with
    frequency, and brightness, tint and contrast that vary. It is the same for every victim.
    """
    parameter = next(seen.model.parameters())
    if "aux" in seen.grants and len(seen.aux) >= FEWEST:
        return seen.aux.images[:DUMMIES].to(parameter.device, parameter.dtype)
    rng = stream(0, "labels", "dummies")
    c, h, w = seen.shape
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w))
    frequency[0, 0] = math.inf  # brightness is drawn apart
    white = torch.fft.fft2(torch.randn(DUMMIES, c + 1, h, w, generator=rng))
    noise = torch.fft.ifft2(white / frequency**1.6).real
    grey, colour = noise[:, :1], noise[:, 1:]
    pattern = grey + 0.3 * colour
    pattern = pattern / pattern.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    contrast = 0.2 + 1.2 * torch.rand(DUMMIES, 1, 1, 1, generator=rng)
    bright = 0.6 * torch.randn(DUMMIES, 1, 1, 1, generator=rng)
    tint = 0.18 * torch.randn(DUMMIES, c, 1, 1, generator=rng)
    centred = (contrast * pattern + bright + tint).to(parameter.device, parameter.dtype)
    normalise = getattr(seen.model, "normalise", None)
    mean, std = (0.5, 0.25) if normalise is None else (normalise.mean, normalise.std)
    return (mean + std * centred).clamp(0, 1)


@torch.no_grad()
def _outputs(model: nn.Module, weights: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer's inputs [n d] and outputs [n k], in double."""
    inputs: list[Tensor] = []
    hook = last_linear(model)[1].register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    try:
        parts = images.chunk(math.ceil(len(images) / TOGETHER))
        logits = [functional_call(model, weights, (part,)) for part in parts]
    finally:
        hook.remove()
    return torch.cat(inputs).double(), torch.cat(logits).double()


@torch.no_grad()
def classes(model: nn.Module) -> int:
    return last_linear(model)[1].out_features


# ---------------------------------------------------------------- methods


def idlg(gradient: Float[Tensor, " k"], count: int = 1) -> Int[Tensor, " b"]:
    """The class whose output gradient is negative (Zhao et al. 2020, section 3.1): p_k - y_k.

    Exact for one image and an undefended update; under noise the least entry is the best guess.
    """
    fits("idlg", count, len(gradient))
    return gradient.argmin()[None]


def yin(rows: Float[Tensor, "k d"], count: int) -> Int[Tensor, " b"]:
    """The classes with the smallest entries in their rows (Yin et al. 2021, equation 7).

    For inputs of the last layer that are not negative, as after a ReLU. No label comes twice.
    """
    fits("yin", count, len(rows))
    return rows.amin(1).argsort(stable=True)[:count].sort().values


def llg(
    rows: Float[Tensor, "k d"],
    inputs: Float[Tensor, "n d"],
    logits: Float[Tensor, "n k"],
    count: int,
) -> Int[Tensor, " b"]:
    """Labels taken one by one, each with its impact (Wainakh et al. 2022, algorithm 1, LLG*).

    Of the rows' sums: negative ones name a label each; then the least one does, in turn. Each label
    takes away its impact m, the same for all classes; s_k is what is there without label k. Both
    are what dummies give in closed form: no dummy gradients are computed.
    """
    sums = inputs.sum(1)
    impact = -sums.mean() / count
    offset = (logits.softmax(1) * sums[:, None]).mean(0)
    left = rows.sum(1)
    counts = torch.zeros_like(left)
    sure = left.argsort(stable=True)[:count]
    sure = sure[left[sure] < 0]
    counts[sure] += 1
    left = left - impact * counts - offset
    for _ in range(count - len(sure)):
        least = left.argmin()
        counts[least] += 1
        left[least] -= impact
    return named(counts)


def bias_counts(
    gradient: Float[Tensor, " k"], expected: Float[Tensor, " k"], count: int
) -> Int[Tensor, " b"]:
    """Labels of a batch from n_k = B (p_k - gradient of bias k), rounded to sum to B.

    `expected` is the mean prediction p on the batch, for which that on dummies is taken.
    """
    share = (expected - gradient).clamp_min(0)
    # noise may deny every class: then guess from p
    return named(whole(share if share.sum() > 0 else expected, count))


def kept(gradient: Float[Tensor, " k"], expected: Float[Tensor, " k"], count: int) -> float:
    """What is left of the length of an update that was scaled down, in (0, 1]; ours.

    The bias gradient of a class that no image has is its mean prediction p itself: the median of
    gradient / `expected` over as many classes, with the largest ratios, as must be absent; with as
    many images as classes, of one, which assumes that one is.
    """
    absent = max(1, len(gradient) - count)
    ratios = (gradient / expected).sort(descending=True).values[:absent]
    return float(ratios.median().clamp(1e-9, 1.0))


def ilrg(
    rows: Float[Tensor, "k d"],
    gradient: Float[Tensor, " k"],
    weight: Float[Tensor, "k d"],
    bias: Float[Tensor, " k"],
    count: int,
) -> Int[Tensor, " b"]:
    """Counts from embeddings of each class (Ma et al. 2023, section 3).

    Row k over entry k of the bias is taken for the embedding of class k, and what the layer
    predicts on it for the predictions p_k on that class. Counts n then solve
    sum_c n_c (p_ck - [c = k]) = B gradient_k with sum n = B, in least squares.
    """
    safe = torch.where(gradient.abs() < 1e-12, 1e-12, gradient)
    given = (rows / safe[:, None] @ weight.T + bias).softmax(1)
    ones = torch.ones_like(gradient)
    system = torch.cat([given.T - torch.eye(len(ones), device=ones.device), ones[None]])
    right = torch.cat([gradient, ones[:1]])
    share = (torch.linalg.pinv(system) @ right).clamp_min(0)
    return named(whole(share if share.sum() > 0 else ones, count))


SHIFT = 0.03  # variance of a batch's mean logits between batches, over that between dummies
CLASS = 0.5  # that of a class's mean logits around the batch's
TRUST = 2.0  # error of the dummies' covariance of prediction and logits, as a share of prediction


def rlu(
    rows: Float[Tensor, "k d"],
    gradient: Float[Tensor, " k"],
    weight: Float[Tensor, "k d"],
    bias: Float[Tensor, " k"],
    logits: Float[Tensor, "n k"],
    count: int,
    sent: float = 0.0,
    error: float = 0.0,
) -> Int[Tensor, " b"]:
    """Counts by least squares from what each class is predicted as (Chen and Vikalo 2024).

    As there, gradient = sum_c r_c (p_c - e_c) is solved for the shares r >= 0, with p_c the mean
    prediction on class c. Differs from the paper, which takes p_c from labelled public images: here
    it is what dummies are predicted as, their logits moved to the class's mean, which is fitted to
    the weight's gradient. In logits that says W rows_k + gradient_k bias = gradient_k z + C_k -
    r_k (m_k - z), with z the batch's mean, m_k that of class k, and C_k the covariance of
    prediction k with the logits, which the dummies tell. `sent` is the standard deviation of noise
    in `rows`, `error` the variance of that in `gradient`. For local steps see `stepped`.
    """
    k = len(gradient)
    logits = logits[:: math.ceil(len(logits) * k * k / PAIRS)]
    told = rows @ weight.T + gradient[:, None] * bias
    mean = logits.mean(0)
    around = logits - mean
    given = logits.softmax(1)
    expected = given.mean(0)
    noise = given.var(0, correction=0) / count + 0.01 / count**2 + error
    doubt = _doubt(gradient, expected)
    heard = sent**2 * weight.square().sum(1).mean() / logits.var(0).mean().clamp_min(1e-30)
    covariance = (given - expected).T @ around / len(logits)
    share = (expected - gradient).clamp_min(0)
    share = share if share.sum() > 0 else expected
    share = share / share.sum()
    guess = given.mean(0).expand(k, k)
    for _ in range(4):
        apart = CLASS + 1 / (share * count).clamp_min(1)
        wrong = (TRUST * expected).square() + heard + 1e-12
        trust = gradient / (share.square() * apart + wrong)
        z = trust @ (told - covariance) + mean / SHIFT
        z = z / (trust @ gradient + 1 / SHIFT)
        shrunk = share * apart / (share.square() * apart + wrong)
        means = z + shrunk[:, None] * (gradient[:, None] * z + covariance - told)
        moved = around + means[:, None]  # [c n k]
        given = moved.softmax(2)
        guess = given.mean(1) + doubt * (1 / k - given.mean(1))
        share = (share + _shares(guess, gradient, noise, count)) / 2
        expected = share @ given.mean(1)
        mixed = (share[:, None, None] * given).flatten(0, 1)
        joint = mixed.T @ moved.flatten(0, 1) / len(logits)
        covariance = joint - expected[:, None] * (share @ means)
    return named(whole(_shares(guess, gradient, noise, count), count))


def _doubt(gradient: Float[Tensor, " k"], expected: Float[Tensor, " k"]) -> float:
    """How little the dummies stand for the private images, in [0, 1].

    No gradient exceeds the mean prediction of its class. Where they exceed that on dummies by half
    or more, those are another kind of image to the model, as noise is to a converged one.
    """
    beyond = (gradient - expected).clamp_min(0).sum() / gradient.clamp_min(0).sum().clamp_min(1e-12)
    return min(1.0, float(2 * beyond) ** 2)


def _shares(
    given: Float[Tensor, "c k"],
    gradient: Float[Tensor, " k"],
    noise: Float[Tensor, " k"],
    count: int,
) -> Float[Tensor, " c"]:
    """Shares r >= 0 of the classes that sum to one, with gradient = sum_c r_c (given_c - e_c).

    In least squares, by the variances `noise`; where that leaves them open, towards equal shares,
    as far as those of a batch vary whose class frequencies are anything (Dirichlet, all ones).
    """
    from scipy.optimize import nnls

    k = len(gradient)
    eye = torch.eye(k, dtype=gradient.dtype, device=gradient.device)
    prior = (1 / k) * math.sqrt(1 + k / count)
    scale = noise.rsqrt()[:, None]
    system = torch.cat([(given.T - eye) * scale, eye / prior, torch.ones_like(eye[:1]) * 1e4])
    gradient = gradient.clamp(-1, 1)  # as a mean of p - y is
    right = torch.cat([gradient * scale[:, 0], torch.full_like(gradient, 1 / k / prior)])
    right = torch.cat([right, right.new_full((1,), 1e4)])
    solved, _ = nnls(system.cpu().numpy(), right.cpu().numpy(), maxiter=30 * k)
    found = torch.from_numpy(solved).to(gradient)
    return found / found.sum()


def _at_once(last: Last) -> Int[Tensor, " b"]:
    return rlu(
        last.rows, last.gradient, last.weight, last.bias, last.start()[1], last.count,
        last.noise, last.error,
    )  # fmt: skip


def _several(local: Local) -> bool:
    return local.kind == "fedavg" and local.steps > 1


ROUNDS = 12  # simulations of a client, each with better counts
CLIENTS = 16  # simulated at once, with different dummies


def stepped(last: Last) -> Int[Tensor, " b"]:
    """`rlu` for local steps: what each class is predicted as while the client trains.

    Clients with dummies for images and labels by the shares so far are simulated: the last layer
    learns, and its inputs go from what the model before the update makes of the dummies to what the
    model after it does. Shares are solved for again, with the mean predictions over all steps, and
    those are returned whose simulated gradient was nearest the observed one. Differs from the
    paper, which interpolates the predictions between the first and the last step.
    """
    (begun, logits), (ended, _) = last.start(), last.end()
    rng = stream(0, "labels", "clients")
    size = min(last.count, len(begun))
    clients = min(CLIENTS, len(begun) // size)
    order = torch.randperm(len(begun), generator=rng)[: clients * size].to(begun.device)
    first, change = ((h[order].unflatten(0, (clients, size))) for h in (begun, ended - begun))
    offset = torch.rand(clients, 1, generator=rng, dtype=torch.float64).to(begun.device)
    mixed = torch.rand(clients, size, generator=rng).argsort(1).to(begun.device)
    given = logits.softmax(1)
    noise = given.var(0, correction=0) / last.count + 0.01 / last.count**2 + last.error
    share = torch.full_like(last.bias, 1 / len(last.bias))
    best, least = share, math.inf
    for _ in range(ROUNDS):
        # as many of each class as its share says, up to one
        place = (torch.arange(size, device=begun.device) + offset) / size
        labels = torch.searchsorted(share.cumsum(0), place).clamp_max(len(share) - 1)
        labels = labels.gather(1, mixed)
        given, gradient = _trained(last, first, change, F.one_hot(labels, len(share)).double())
        residual = float((gradient - last.gradient).square().sum())
        if residual < least:
            best, least = share, residual
        share = (share + _shares(given, last.gradient, noise, last.count)) / 2
    return named(whole(best, last.count))


def _trained(
    last: Last,
    first: Float[Tensor, "n b d"],
    change: Float[Tensor, "n b d"],
    targets: Float[Tensor, "n b k"],
) -> tuple[Float[Tensor, "c k"], Float[Tensor, " k"]]:
    """Clients' mean predictions on each class over all local steps, and their mean gradient."""
    steps, size = last.local.steps, min(last.local.batch or first.shape[1], first.shape[1])
    weight, bias = (w.expand(len(first), *w.shape) for w in (last.weight, last.bias))
    chunks = torch.arange(first.shape[1], device=first.device).split(size)
    given = torch.zeros_like(last.weight[:, :1] * last.bias)
    told, gradient = torch.zeros_like(last.bias), torch.zeros_like(last.bias)
    for step in range(steps):
        rows = chunks[step % len(chunks)]
        h, y = first[:, rows] + step / steps * change[:, rows], targets[:, rows]
        p = torch.baddbmm(bias[:, None], h, weight.mT).softmax(2)
        error = (p - y) / len(rows)
        weight = weight - last.local.lr * error.mT @ h
        bias = bias - last.local.lr * error.sum(1)
        gradient += error.sum(1).mean(0) / steps
        given += torch.einsum("nbc,nbk->ck", y, p)
        told += y.sum((0, 1))
    mean = given.sum(0) / told.sum()  # for classes that no client has
    return torch.where(told[:, None] > 0, given / told.clamp_min(1)[:, None], mean), gradient


METHODS: dict[str, Callable[[Last], Int[Tensor, " b"]]] = {
    "idlg": lambda a: idlg(a.gradient, a.count),
    "yin": lambda a: yin(a.rows, a.count),
    "llg": lambda a: llg(a.rows, *a.start(), a.count),
    "bias_counts": lambda a: bias_counts(a.gradient, a.start()[1].softmax(1).mean(0), a.count),
    "ilrg": lambda a: ilrg(a.rows, a.gradient, a.weight, a.bias, a.count),
    "rlu": lambda a: stepped(a) if _several(a.local) else _at_once(a),
}


# ---------------------------------------------------------------- from shares to labels


def whole(share: Float[Tensor, " k"], count: int) -> Float[Tensor, " k"]:
    """Whole numbers that sum to `count`, in the proportions of `share`: by largest remainders."""
    counts = count * share / share.sum()
    found = counts.floor()
    rest = count - int(found.sum())
    found[(found - counts).argsort(stable=True)[:rest]] += 1
    return found


def named(counts: Float[Tensor, " k"]) -> Int[Tensor, " b"]:
    """Each class as often as it counts, sorted."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts.long())

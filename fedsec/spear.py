"""Exact factors of a ReLU layer's gradient: the mathematics of SPEAR (Dimitrov et al. 2024).

The gradient of a linear layer's weights is D X: D [m b] is what each image passed back to each of m
neurons, X [b n] the layer's inputs. Any factorisation of rank b is L R with D = L Q, X = Q^-1 R. A
neuron that ReLU silenced for an image has a zero in D, so the columns of Q are the directions q for
which L q has many zeros. `directions` finds such, `basis` and `swapped` choose among them, and
`inputs` gives them their lengths. All in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

SPARE = 5  # zeros beyond the r - 1 that any direction can have; chance hardly gives one
POWER = 0.8  # of an entry's size in the annealed search
COOLING = 0.85  # of the annealed search's width in a step
CROSSED = 256  # mixtures that are taken apart at a time

Score = Callable[[Float[Tensor, "s r r"]], Float[Tensor, "s r"]]  # of bases, 1 for a true row


@dataclass(frozen=True)
class Factors:
    """Of one gradient: left @ right, and what is needed to tell a zero from a rounding error."""

    left: Float[Tensor, "m r"]  # orthonormal columns
    right: Float[Tensor, "r n"]
    rows: Float[Tensor, "a r"]  # of `left`, of length one; neurons silent for all are left out
    alive: Bool[Tensor, " m"]  # which neurons are not
    blur: float  # the size up to which an entry of rows @ q is zero, for |q| = 1

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def enough(self) -> float:
        """Share of neurons that a true image's pattern agrees on: chance zeros blur the others."""
        neurons = len(self.left)
        return 1 - max(0, math.ceil(10 * neurons * self.blur - 0.1)) / neurons


def factors(gradient: Float[Tensor, "m n"]) -> Factors:
    """The factors of the rank that stands out of the rounding errors of the gradient's dtype."""
    eps = torch.finfo(gradient.dtype).eps
    left, sizes, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = int((sizes > max(64 * eps, 1e-12) * sizes[0]).sum())
    left, right = left[:, :rank].contiguous(), sizes[:rank, None] * right[:rank]
    length = left.norm(dim=1)
    alive = length > 64 * eps
    spread = float(sizes[0] / sizes[max(rank, 1) - 1]) if rank else 1.0
    blur = min(max(8 * eps * spread, 1e-8), 1e-2)
    return Factors(left, right, left[alive] / length[alive, None], alive, blur)


def zeros(f: Factors, q: Float[Tensor, "k r"]) -> Bool[Tensor, "k a"]:
    """Which of the neurons that are alive a direction of length one silences."""
    return (q @ f.rows.T).abs() <= f.blur


# ---- directions with many zeros -----------------------------------------------------------------


def widened(
    f: Factors, known: Float[Tensor, "c r"], rule: str, starts: int, rng: torch.Generator
) -> Float[Tensor, "k r"]:
    """The `known` directions, which are independent, and what a search from `starts` adds."""
    found = sampled(f, starts, rng) if rule == "sampled" else annealed(f, known, starts, rng)
    return distinct(f, torch.cat([known, refined(f, found), refined(f, crossed(f, known))]))


def refined(f: Factors, q: Float[Tensor, "k r"]) -> Float[Tensor, "n r"]:
    """What of `q` has more zeros than any direction has, made exact by all its zeros together."""
    for _ in range(2):
        silent = zeros(f, q[q.isfinite().all(1)])
        silent = silent[silent.sum(1) >= (f.rank + SPARE if f.rank > 1 else 0)]
        weights = silent.unique(dim=0).to(f.rows)
        q = torch.linalg.eigh((weights[:, :, None] * f.rows).mT @ f.rows)[1][..., 0]
    return distinct(f, q)


def distinct(f: Factors, q: Float[Tensor, "k r"]) -> Float[Tensor, "n r"]:
    """Each direction once, the sparsest first."""
    q = q[zeros(f, q).sum(1).argsort(descending=True, stable=True)]
    same = (q @ q.T).square() > 1 - max(100 * f.blur**2, 1e-12)
    return q[~same.tril(-1).any(1)]


def sampled(f: Factors, starts: int, rng: torch.Generator) -> Float[Tensor, "k r"]:
    """What silences r - 1 neurons drawn at random (the paper's search).

    It is a column of Q if one image silences them all: about one in 2^r / 2r draws.
    """
    drawn = torch.rand(starts, len(f.rows), generator=rng).topk(f.rank - 1, 1).indices
    plane = torch.randn(1, 1, f.rank, generator=rng, dtype=torch.float64)  # one solution's length
    some = f.rows[drawn.to(f.rows.device)]
    system = torch.cat([plane.to(some.device).expand(starts, 1, -1), some], 1)
    ahead = torch.eye(f.rank, 1, dtype=torch.float64, device=some.device)
    return F.normalize(torch.linalg.solve_ex(system, ahead.expand(starts, -1, -1))[0][..., 0])


def annealed(
    f: Factors, known: Float[Tensor, "c r"], starts: int, rng: torch.Generator
) -> Float[Tensor, "k r"]:
    """Minima over |q| = 1 of sum_j (entry_j^2 + width^2)^(POWER / 2), entry = rows q, width -> 0.

    Iteratively re-weighted least squares, each started at a neuron's row, away from some of the
    `known`. Its hits get rarer with the batch by far less than those of `sampled`: the columns are
    atoms of a sparse dictionary, which SPEAR++ (Bakarsky et al. 2025) finds by other means.
    """
    drawn = torch.randint(len(f.rows), (starts,), generator=rng)
    some = int(torch.randint(min(len(known), f.rank - 1) + 1, (), generator=rng))
    span = torch.linalg.qr(known[:some].mT)[0]
    q = f.rows[drawn.to(f.rows.device)]
    q, width = F.normalize(q - (q @ span) @ span.mT), 1.0
    while width > f.blur:
        squares = (q @ f.rows.T).square()
        width *= COOLING
        soft = width**2 * squares.mean(1, keepdim=True)
        weights = (squares + soft) ** (POWER / 2 - 1)
        gram = (weights[:, :, None] * f.rows).mT @ f.rows
        q = F.normalize(torch.linalg.solve_ex(gram, q[..., None])[0][..., 0])
    return q


def crossed(f: Factors, q: Float[Tensor, "c r"]) -> Float[Tensor, "n r"]:
    """Directions between two of `q` that silence three neurons or more which neither does.

    Two images that most neurons treat alike hide in their mixtures; these lead out in one step.
    """
    one, two = torch.triu_indices(len(q), len(q), 1, device=q.device)
    entry = q @ f.rows.T
    angle = torch.atan2(entry[one], entry[two]) % torch.pi
    silent = zeros(f, q)
    apart = 10.0 + torch.arange(len(f.rows), device=q.device)
    angle = torch.where(silent[one] | silent[two], apart, angle).sort(1).values
    near = 4 * f.blur  # equal up to rounding; chance has this many as near: a wide layer, more
    run = 2 + math.ceil(2 * near * len(f.rows))
    width = (angle[:, run:] - angle[:, :-run]).flatten()
    least = width.topk(min(CROSSED, len(width)), largest=False)
    at = least.indices[least.values < near]
    count = angle.shape[1] - run
    pair, turn = at // count, angle[at // count, at % count + run // 2, None]
    return turn.cos() * q[one[pair]] - turn.sin() * q[two[pair]]


# ---- the choice among them ----------------------------------------------------------------------


def basis(f: Factors, q: Float[Tensor, "k r"]) -> tuple[Float[Tensor, "c r"], Float[Tensor, "s r"]]:
    """The first independent ones of `q`, the sparsest first, and the rest (first stage, greedy).

    True directions always win where all are among them: mixtures of some of them have at most
    as many zeros as the least of these, but for a few, and depend on them.
    """
    chosen, left = [], []
    span = q.new_zeros(0, f.rank)  # an orthonormal basis of the chosen
    for i in range(len(q)):
        rest = q[i] - (q[i] @ span.T) @ span
        rest = rest - (rest @ span.T) @ span
        independent = len(chosen) < f.rank and float(rest.norm()) > 10 * f.blur
        (chosen if independent else left).append(i)
        if independent:
            span = torch.cat([span, F.normalize(rest[None])])
    return q[chosen], q[left]


def swapped(
    q: Float[Tensor, "r r"], others: Float[Tensor, "s r"], score: Score
) -> Float[Tensor, "r r"]:
    """The basis after each exchange with another direction that raises its score (second stage)."""
    best = float(score(q[None]).mean())
    for other in others:
        tried = q.repeat(len(q), 1, 1)
        tried[range(len(q)), range(len(q))] = other
        scores = score(tried).mean(1)
        if float(scores.max()) > best:
            q, best = tried[int(scores.argmax())], float(scores.max())
    return q


def agreement(
    f: Factors,
    through: Float[Tensor, "r m"],
    offset: Float[Tensor, " m"],
    bias: Float[Tensor, " m"],
    q: Float[Tensor, "s r r"],
) -> Float[Tensor, "s r"]:
    """The share of neurons that each input silences just where its direction does.

    `through` is f.right after the layer's weights, `offset` the layer's bias, `bias` its gradient.
    """
    hidden = inputs(f, q, bias) @ through + offset
    silent = torch.ones_like(hidden, dtype=torch.bool)
    silent[..., f.alive] = (q @ f.rows.T).abs() <= f.blur
    return ((hidden <= 0) == silent).double().mean(2)


def believed(f: Factors, q: Float[Tensor, "c r"], score: Score) -> Bool[Tensor, " c"]:
    """The rows of a basis whose inputs are exact; of fewer than r directions, none.

    They agree, and no row that does not can be a mixture with theirs: a mixture silences what all
    its parts silence, and fewer than r neurons more.
    """
    if len(q) < f.rank:
        return q.new_zeros(len(q), dtype=torch.bool)
    agree = score(q[None])[0] >= f.enough
    silent = zeros(f, q).double()
    return agree & (silent[~agree] @ (1 - silent).T >= f.rank).all(0)


def inputs(
    f: Factors, q: Float[Tensor, "s r r"], bias: Float[Tensor, " m"]
) -> Float[Tensor, "s r r"]:
    """Q^-1 with each row at its length, so that `inputs(...) @ right` are the layer's inputs.

    `q` holds columns of Q as rows; the bias's gradient, the sum of D's columns, gives lengths.
    """
    inverse = torch.linalg.inv_ex(q.mT)[0]
    return inverse / (inverse @ (f.left.T @ bias))[..., None]


def labels_of(
    model: nn.Module, name: str, images: Float[Tensor, "n c h w"], passed: Float[Tensor, "n m"]
) -> Int[Tensor, " n"]:
    """For each image the class whose gradient at a layer points where `passed` does.

    `passed` is what the image passed back to the layer, up to its length; `name` is the layer's
    bias, whose gradient of one image is just that.
    """

    def logits(bias: Tensor, image: Tensor) -> Tensor:
        return functional_call(model, {name: bias}, (image[None],))[0]

    slopes = vmap(jacrev(logits), (None, 0))(model.get_parameter(name), images)
    p = model(images).softmax(1)[:, None]
    guesses = (p - torch.eye(p.shape[2]).to(p)) @ slopes
    return F.cosine_similarity(guesses, passed[:, None], dim=2).argmax(1)

"""Independent component analysis of images that are mixed linearly, in double precision.

Rows of a mixture are weighted sums of images. `principal` and `whitened` leave as many uncorrelated
rows of variance one as there are images; `minimised` finds the matrix that unmixes these, under
one of two contrasts: `likelihood` of differences of pixels, `cocktail` of pixels. What is unmixed
has neither sign nor length: `lengthened` gives it both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedsec.engine import total_variation

SHARP = 5.0  # of the penalty on unmixing vectors that are alike
INSIDE = 0.75  # share of an image's pixels in range from which its length is believed


def principal(rows: Float[Tensor, "m d"], count: int, least: float) -> Float[Tensor, "m n"]:
    """Orthonormal columns that span `rows`, as far as they exceed `least`, at most `count`."""
    squares, left = torch.linalg.eigh(rows @ rows.T)
    sizes = squares.flip(0).clamp_min(0).sqrt()
    n = min(count, int((sizes > max(least, 1e-6) * sizes[0]).sum()))
    return left.flip(1)[:, :n]


def whitened(views: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n e"]]:
    """The matrix after which rows are uncorrelated and of variance one, and those rows."""
    left, sizes, right = torch.linalg.svd(views, full_matrices=False)
    root = views.shape[1] ** 0.5
    return root * (left / sizes.clamp_min(1e-12 * sizes[0] + 1e-100)).T, root * right


def edges(images: Float[Tensor, "m c h w"]) -> Float[Tensor, "m e"]:
    """Differences of neighbouring pixels, down and across."""
    return torch.cat([images.diff(dim=d).flatten(1) for d in (2, 3)], 1)


def likelihood(white: Float[Tensor, "n e"], u: Float[Tensor, "n n"]) -> Tensor:
    """Minus the log-likelihood of sources with density 1 / (1 + x^2)^2, up to a constant."""
    return 2 * (u @ white).square().log1p().mean(1).sum() - torch.linalg.slogdet(u)[1]


def minimised(
    objective: Callable[[Tensor], Tensor], start: Float[Tensor, "n n"], steps: int
) -> tuple[Float[Tensor, "n n"], int]:
    """L-BFGS from `start`, and how many steps it took."""
    from scipy.optimize import minimize

    def at(flat):
        u = torch.from_numpy(flat).to(start).reshape(start.shape).requires_grad_()
        with torch.enable_grad():
            value = objective(u)
            gradient = torch.autograd.grad(value, u)[0]
        return value.item(), gradient.flatten().cpu().numpy()

    flat = start.flatten().cpu().numpy()
    best = minimize(at, flat, jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return torch.from_numpy(best.x).to(start).reshape(start.shape), int(best.nit)


def cocktail(
    white: Float[Tensor, "n c h w"], u: Float[Tensor, "n n"], tv: float, apart: float
) -> Tensor:
    """Minus the objective of Kariyappa et al. 2023 over unit rows of `u`.

    E[log^2 cosh] of pixels, less `tv` x total variation and `apart` x mean exp(5 |cosine|) of two
    rows.
    """
    u = F.normalize(u)
    x = (u @ white.flatten(1)).reshape(white.shape)
    cosh = x.abs() + F.softplus(-2 * x.abs()) - math.log(2)  # its logarithm
    pairs = max(1, len(u) * (len(u) - 1) // 2)
    alike = (SHARP * (u @ u.T).abs()).exp().triu(1).sum() / pairs
    return tv * total_variation(x) + apart * alike - cosh.square().mean()


def lengthened(
    x: Float[Tensor, "n d"], sums: Float[Tensor, " n"], normalise: Any, shape: tuple[int, ...]
) -> tuple[Float[Tensor, "n c h w"], int]:
    """Images in [0, 1], inputs over their vectors' sums of the bias's gradient, and how many.

    The other ones are stretched: they would leave the range, or have no sum.
    """
    pixels = (x / sums[:, None]).reshape(-1, *shape) * normalise.std + normalise.mean
    inside = ((pixels > -0.02) & (pixels < 1.02)).flatten(1).double().mean(1) >= INSIDE
    signed = torch.where(sums[:, None] < 0, -x, x).reshape(-1, *shape) * normalise.std
    low, high = (signed.flatten(1).aminmax(dim=1)[i][:, None, None, None] for i in (0, 1))
    stretched = (signed - low) / (high - low).clamp_min(1e-300)
    images = torch.where(inside[:, None, None, None], pixels, stretched)
    return images.clamp(0, 1), int(inside.sum())

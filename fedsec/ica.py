"""Independent component analysis of images that are mixed linearly, in double precision.

Rows of a mixture are weighted sums of images. `principal` and `whitened` leave as many uncorrelated
rows of variance one as there are images; `minimised` finds the matrix that unmixes these, under
one of two contrasts: `likelihood` of differences of pixels, `cocktail` of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedsec.engine import total_variation

SHARP = 5.0  # of the penalty on unmixing vectors that are alike


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

"""Cocktail party attack: breaking aggregation-based privacy in federated learning using ICA."""

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from fedsec import ica, neurons, solve
from fedsec.attack import Attack
from fedsec.checks import at_least, one_of
from fedsec.spear import labels_of


@dataclass(frozen=True, kw_only=True)
class Cocktail(Attack):
    """Images that a first linear layer's gradient mixes, told apart by ICA (Kariyappa et al. 2023).

    Each row of the gradient is a weighted sum of the batch's inputs. Whitened to rank `count`, it
    is unmixed by one of two contrasts (fedsec/ica.py). `pixels` is the paper's, here by
    L-BFGS. `edges` makes differences of neighbouring pixels independent: it has both of the paper's
    priors at once, few edges and vectors that differ, with no weights between them.

    An unmixing vector gives an image up to sign and length. Unlike in the paper, the vector's sum
    of the bias's gradient gives both, as far as the vector is right; where that leaves too many
    pixels out of range the image is stretched to [0, 1], which is the paper's, and a flag says so.
    `loss` is 1 - cosine similarity of the re-computed update; labels as in attacks/spear.py.
    """

    rule: str  # edges or pixels: what is made independent
    steps: int  # of L-BFGS, at most, >= 1
    tv: float  # weight of the total variation in pixels, >= 0
    apart: float  # weight of the likeness of unmixing vectors in pixels, >= 0

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        one_of(self, "rule", "edges", "pixels")
        at_least(self, 1, "steps")
        at_least(self, 0, "tv", "apart")

    def gflop_at_most(self, seen):
        """Of the products of rows: the steps are little beside them."""
        outputs, inputs = neurons.first_linear("cocktail", seen.model)[1].weight.shape
        return 2e-9 * outputs**2 * inputs

    def check(self, model):
        neurons.first_linear("cocktail", model)

    def __call__(self, seen, rngs, progress):
        def one(update, v):
            return self._unmixed(seen, update, rngs[v])

        return solve.each(seen, rngs, progress, one)

    def _unmixed(self, seen, update, rng) -> solve.Found:
        """One victim's images."""
        name, _ = neurons.first_linear("cocktail", seen.model)
        rows, bias = update[f"{name}.weight"], update[f"{name}.bias"].double()
        if not solve.finite(update) or not rows.any():
            why = "cocktail found no image: the first layer's gradient is zero or not finite"
            return solve.none(seen, update, why)
        left = ica.principal(rows.double(), seen.count, 64 * torch.finfo(rows.dtype).eps)
        n, mixed = left.shape[1], left.T @ rows.double()
        if self.rule == "edges":
            whiten, white = ica.whitened(ica.edges(mixed.reshape(-1, *seen.shape)))
            start, objective = torch.eye(n).to(white), partial(ica.likelihood, white)
        else:
            whiten, white = ica.whitened(mixed - mixed.mean(1, keepdim=True))
            start = torch.randn(n, n, generator=rng, dtype=torch.float64).to(white)
            view = white.reshape(n, *seen.shape)
            objective = partial(ica.cocktail, view, tv=self.tv, apart=self.apart)
        unmixing, steps = ica.minimised(objective, start, self.steps)
        vectors = (unmixing if self.rule == "edges" else F.normalize(unmixing)) @ whiten
        sums = vectors @ (left.T @ bias)
        images, sure = ica.lengthened(vectors @ mixed, sums, seen.model.normalise, seen.shape)
        passed = (left @ torch.linalg.pinv(vectors)).T * sums.sign()[:, None]
        images, passed = images.to(rows.dtype), passed.to(rows.dtype)
        labels = labels_of(seen.model, f"{name}.bias", images, passed)
        stretched = f"cocktail stretched {n - sure} of {n} images of unknown length"
        fewer = f"cocktail tells {n} of {seen.count} images apart; the rest are grey"
        flags = (stretched,) * (sure < n) + (fewer,) * (n < seen.count)
        return solve.some(seen, images, labels, update, flags, steps)

"""SPEAR: exact gradient inversion of batches in federated learning."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsec import neurons, solve, spear
from fedsec.attack import Attack
from fedsec.checks import at_least, one_of
from fedsec.models import first_layer


@dataclass(frozen=True, kw_only=True)
class Spear(Attack):
    """Every image of a batch, exactly, from a first layer with ReLU (Dimitrov et al. 2024).

    Looks for the directions in the layer's gradient on which many neurons are silent, until they
    explain every image (fedsec/spear.py). The check is forward: an image is believed only if the
    neurons that it silences are those of its direction, and none that fails this can be mixed with
    it. All others are grey, and a flag says why. `loss` is 1 - cosine similarity of the re-computed
    update, 1 where nothing was found. Labels are those whose gradients point where an image's do.

    Differs from the paper: `annealed` searches in place of drawn sets of neurons (`sampled`), and
    mixtures of two images are taken apart. Arithmetic leaves out systems smaller than the batch.
    """

    rule: str  # annealed or sampled: how directions are looked for
    starts: int  # directions looked for, at most, for each image of the batch, >= 1
    chunk: int  # of them between two looks at whether they explain the batch, >= 1

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        one_of(self, "rule", "annealed", "sampled")
        at_least(self, 1, "starts", "chunk")

    def gflop_at_most(self, seen):
        """Of the singular values (Golub and Van Loan 2013, 8.6): the search is little beside it."""
        short, long = sorted(neurons.first_linear("spear", seen.model)[1].weight.shape)
        return (6 * long + 20 * short) * short**2 / 1e9

    def check(self, model):
        leaves = [m for m in model.modules() if not list(m.children())]
        after = leaves[leaves.index(first_layer(model)[1]) + 1 :]
        after = [m for m in after if not isinstance(m, nn.Identity)]
        silences = isinstance(next(iter(after), None), nn.ReLU)
        neurons.first_linear("spear", model, "with bias and ReLU", silences)

    def __call__(self, seen, rngs, progress):
        def one(update, v):
            return self._inverted(seen, update, rngs[v])

        return solve.each(seen, rngs, progress, one, self.gflop_at_most(seen))

    def _inverted(self, seen, update, rng) -> solve.Found:
        """One victim's images: rows of X in D X = L R, with D = L Q and X = Q^-1 R."""

        def nothing(why: str) -> solve.Found:
            return solve.none(seen, update, f"spear found no image: {why}")

        if not solve.finite(update):
            return nothing("the update is not finite")
        name, layer = neurons.first_linear("spear", seen.model)
        rows, bias = update[f"{name}.weight"], update[f"{name}.bias"].double()
        f = spear.factors(rows)
        if not 0 < f.rank <= seen.count:
            return nothing(f"{seen.count} images without a defense do not cause rank {f.rank}")
        weights = f.right @ layer.weight.double().T, layer.bias.double()
        score = partial(spear.agreement, f, *weights, bias)
        q = self._search(f, score, rng)
        sure = spear.believed(f, q, score)
        if not sure.any():
            return nothing(f"none explains the update after {self.starts * f.rank} starts")
        back = spear.inputs(f, q[None], bias)[0]
        images = neurons.pixels(seen, (back @ f.right)[sure]).clamp(0, 1).to(rows.dtype)
        passed = (f.left @ torch.linalg.inv(back)).T[sure].to(rows.dtype)
        labels = spear.labels_of(seen.model, f"{name}.bias", images, passed)
        rest = f"spear found {len(images)} of {seen.count} images; the rest are grey"
        flags = () if len(images) == seen.count else (rest,)
        return solve.some(seen, images, labels, update, flags)

    def _search(self, f: spear.Factors, score: spear.Score, rng) -> Float[Tensor, "c r"]:
        """The best basis, of fewer than r directions where they do not suffice."""
        q = others = f.left.new_zeros(0, f.rank)
        for start in range(0, self.starts * f.rank, self.chunk):
            starts = min(self.chunk, self.starts * f.rank - start)
            q, others = spear.basis(f, spear.widened(f, q, self.rule, starts, rng))
            if len(q) == f.rank and float(score(q[None]).min()) >= f.enough:
                return q
        return spear.swapped(q, others, score) if len(q) == f.rank else q

"""SPEAR: exact gradient inversion of batches in federated learning."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import cost, engine
from fedsec.attack import Attack
from fedsec.checks import Refused, require
from fedsec.models import first_layer
from fedsec.spear import (
    Factors,
    Score,
    agreement,
    basis,
    believed,
    factors,
    inputs,
    labels_of,
    swapped,
    widened,
)
from fedsec.types import Local, Reconstruction, Tensors


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
        known = self.rule in ("annealed", "sampled")
        require(known, "rule", "must be annealed or sampled", self.rule)
        require(self.starts >= 1, "starts", "must be at least 1", self.starts)
        require(self.chunk >= 1, "chunk", "must be at least 1", self.chunk)

    def gflop_at_most(self, seen):
        """Of the singular values (Golub and Van Loan 2013, 8.6): the search is little beside it."""
        layer = first_layer(seen.model)[1]
        assert isinstance(layer, nn.Linear), "check refuses other models"
        short, long = sorted((layer.in_features, layer.out_features))
        return (6 * long + 20 * short) * short**2 / 1e9

    def check(self, model: nn.Module) -> None:
        name, layer = first_layer(model)
        leaves = [m for m in model.modules() if not list(m.children())]
        after = [m for m in leaves[leaves.index(layer) + 1 :] if not isinstance(m, nn.Identity)]
        linear = isinstance(layer, nn.Linear) and layer.bias is not None
        if not linear or not after or not isinstance(after[0], nn.ReLU):
            rule = "attack=spear needs a fully connected first layer with bias and ReLU (model=mlp)"
            raise Refused("model", rule, f"{type(layer).__name__} {name}")

    def __call__(self, seen, rngs, progress):
        update = seen.sent
        found, spent = [], []

        def one(observed: Tensors, rng: torch.Generator) -> None:
            found.append(self._invert(seen, observed, rng))

        for v, rng in enumerate(rngs):
            observed = {k: t[v] for k, t in update.tensors.items()}
            spent.append(cost.flops(partial(one, observed, rng)))
            progress(v + 1, len(rngs), float(found[-1][2]))
        images, labels, loss, flags = zip(*found, strict=True)
        nothing = torch.zeros(len(rngs), dtype=torch.long)
        gflop = torch.tensor(spent, dtype=torch.float64) + self.gflop_at_most(seen)
        images, labels, loss = (torch.stack(part) for part in (images, labels, loss))
        return Reconstruction(images, labels, loss, nothing, gflop, flags)

    def _invert(self, seen, observed: Tensors, rng: torch.Generator):
        """Images [b c h w], labels [b], loss [] and flags of one victim."""
        model, count = seen.model, seen.count
        name, layer = first_layer(model)
        assert isinstance(layer, nn.Linear), "check refuses other models"
        gradient, bias = observed[f"{name}.weight"], observed[f"{name}.bias"].double()
        images = gradient.new_full((count, *seen.shape), 0.5)
        labels = torch.full((count,), -1, device=gradient.device)

        def nothing(why: str):
            return images, labels, gradient.new_ones(()), (f"spear found no image: {why}",)

        if not all(t.isfinite().all() for t in observed.values()):
            return nothing("the update is not finite")
        f = factors(gradient)
        if not 0 < f.rank <= count:
            return nothing(f"{count} images without a defense do not cause rank {f.rank}")
        score = partial(agreement, f, f.right @ layer.weight.double().T, layer.bias.double(), bias)
        q = self._search(f, score, rng)
        sure = believed(f, q, score) if len(q) == f.rank else torch.zeros(f.rank).bool()
        n = int(sure.sum())
        if n == 0:
            return nothing(f"none explains the update after {self.starts * f.rank} starts")
        back = inputs(f, q[None], bias)[0]
        flat = (back @ f.right)[sure].reshape(n, *seen.shape)
        pixels = flat * model.normalise.std + model.normalise.mean
        images[:n] = pixels.clamp(0, 1).to(images.dtype)
        passed = (f.left @ torch.linalg.inv(back)).T[sure]
        labels[:n] = labels_of(model, f"{name}.bias", images[:n], passed.to(images.dtype))
        whole = "local" in seen.grants and n == count
        local = seen.local if whole else Local(kind="gradient", lr=1.0)
        targets = F.one_hot(labels[:n], len(model(images[:1])[0])).to(images.dtype)
        loss = engine.cosine(engine.simulate(model, images[:n], targets, local), observed)
        rest = () if n == count else (f"spear found {n} of {count} images; the rest are grey",)
        return images, labels, loss.detach(), rest

    def _search(self, f: Factors, score: Score, rng: torch.Generator) -> Float[Tensor, "c r"]:
        """The best basis, of fewer than r directions where they do not suffice."""
        q = others = f.left.new_zeros(0, f.rank)
        for start in range(0, self.starts * f.rank, self.chunk):
            starts = min(self.chunk, self.starts * f.rank - start)
            q, others = basis(f, widened(f, q, self.rule, starts, rng))
            if len(q) == f.rank and float(score(q[None]).min()) >= f.enough:
                return q
        return swapped(q, others, score) if len(q) == f.rank else q

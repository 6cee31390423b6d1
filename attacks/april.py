"""APRIL: what the gradient of a vision transformer's position embedding gives away."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedsec import cost, engine, labels
from fedsec.attack import Attack
from fedsec.checks import Refused, require
from fedsec.models import Shape, ViT
from fedsec.types import Reconstruction, Tensors

# of the largest singular value: none but rounding in double, then two a decade
CUTOFFS = (1e-13, *(10 ** (-half / 2) for half in range(16, 0, -1)))
EXACT, FOUND = 1e-9, 0.5  # one minus cosine similarity up to which an update counts as explained


@dataclass(frozen=True, kw_only=True)
class April(Attack):
    """Solves for the image behind a vision transformer's update (Lu et al. 2022, section 4.2).

    A learnable position embedding is added to every token, so its gradient is the loss's derivative
    G at each token, for a single image: sums over a layer's tokens become linear systems in G.
    `through` attention is the paper's closed form: G' Z = sum of W' dW over queries, keys, values
    gives the tokens Z, of which the position embedding and the patch embedding are undone. It needs
    G at the input of the attention, so no norm and no shortcut before it: encoder=sequential.
    `through` embedding solves G' P = dE, with E the patch embedding's weight, for the patches P. It
    is not in the paper, holds whatever follows the embedding, and is better conditioned.

    The solution is by singular values, in double precision. How many of them stand above the
    update's rounding, noise or pruning is decided by re-computing the update, with recovered
    labels: the least one minus cosine similarity wins. A grey image stands for not found. The
    paper inverts as is, and has a second attack, by optimisation, which is left out here.
    """

    through: str  # embedding or attention
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape"})

    def __post_init__(self):
        known = ("embedding", "attention")
        require(self.through in known, "through", "must be embedding or attention", self.through)
        labels.known(self.labels)

    def check(self, model):
        if not isinstance(model, ViT):
            rule = "attack=april needs a learnable position embedding (model=vit)"
            raise Refused("model", rule, type(model).__name__)
        tokens, width = model.pos_embed.shape[1:]
        patch = model.patch_embed.weight[0].numel()
        rule = f"attack=april has {width} equations, and a token or pixel of a patch for each"
        require(max(tokens, patch) <= width, "model.width", rule, max(tokens, patch))
        if self.through == "attention" and model.blocks[0].residual:
            rule = "attack=april through attention needs no norm and no shortcut before it"
            raise Refused("model.encoder", f"{rule} (model.encoder=sequential)", "residual")

    def __call__(self, seen, rngs, progress):
        observed = seen.sent
        targets, told = labels.targets_of(seen, rngs, self.labels)
        local = seen.step
        model, targets = copy.deepcopy(seen.model).double(), targets.double()
        grey = targets.new_full((1, seen.count, *seen.shape), 0.5)
        found, loss, flags, spent = [], [], [], []

        def one(update: Tensors, target: Tensor) -> None:
            guesses = grey
            if seen.count == 1:
                solutions = self._solutions(model, update, seen.shape)
                guesses = torch.cat([grey, solutions[:, None]])

            def distance(images: Tensor) -> Tensor:
                return engine.cosine(engine.simulate(model, images, target, local), update)

            # re-computing the update certifies the result; in single precision it could not choose
            losses = vmap(distance)(guesses).detach()
            best = int(losses.argmin())
            best = best if losses[best] < FOUND else 0
            found.append(guesses[best])
            loss.append(losses[best])
            flags.append(_words(seen.count, best, float(losses[best])))

        for v in range(len(rngs)):
            update = {k: t[v].double() for k, t in observed.tensors.items()}
            spent.append(told + cost.flops(partial(one, update, targets[v])))
            progress(v + 1, len(rngs), float(loss[-1]))
        nothing = torch.zeros(len(rngs), dtype=torch.long)
        gflop = torch.tensor(spent, dtype=torch.float64)
        dtype = next(seen.model.parameters()).dtype
        images, losses = torch.stack(found).to(dtype), torch.stack(loss).to(dtype)
        return Reconstruction(images, targets.argmax(-1), losses, nothing, gflop, tuple(flags))

    def _solutions(self, model, update: Tensors, shape: Shape) -> Float[Tensor, "g c h w"]:
        """The image in [0, 1], once for each cutoff."""
        tokens = update["pos_embed"][0]  # theorem 2: the derivative at the encoder's input
        embed = model.patch_embed.weight.flatten(1)
        if self.through == "embedding":
            patches = _solved(tokens[1:], update["patch_embed.weight"].flatten(1))
        else:
            qkv = model.blocks[0].attn.qkv.weight
            right = qkv.T @ update["blocks.0.attn.qkv.weight"]  # theorem 1, equation 7
            known = model.pos_embed[0] + model.patch_embed.bias
            inner = _solved(tokens, right)[:, 1:] - known[1:]
            patches = inner @ torch.linalg.pinv(embed).T
        side = model.patch_embed.kernel_size
        pixels = F.fold(patches.mT, shape[1:], side, stride=side)
        return (pixels * model.normalise.std + model.normalise.mean).clamp(0, 1)


def _words(count: int, best: int, loss: float) -> tuple[str, ...]:
    if count > 1:
        return (f"not found: april needs an update of one image, and this one is of {count}",)
    if best == 0:
        return ("not found: no solution explains the update",)
    return () if loss <= EXACT else ("inexact: the image explains the update in part; see loss",)


def _solved(left: Float[Tensor, "t d"], right: Float[Tensor, "d k"]) -> Float[Tensor, "g t k"]:
    """X of left' X = right, of least norm, without what each of `CUTOFFS` takes for noise."""
    u, s, v = torch.linalg.svd(left, full_matrices=False)
    inner = (v @ right)[None]
    kept = s > torch.tensor(CUTOFFS).to(s)[:, None] * s[0]
    inverse = torch.where(kept, 1 / s, 0)
    return u @ (inverse[..., None] * inner)

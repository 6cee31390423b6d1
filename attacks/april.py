"""APRIL: what the gradient of a vision transformer's position embedding gives away."""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch.func import vmap

from fedsec import labels, neurons, solve
from fedsec.attack import Attack
from fedsec.checks import Refused, one_of, require
from fedsec.models import ViT

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
        one_of(self, "through", "embedding", "attention")
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
        targets, told = labels.targets_of(seen, rngs, self.labels)
        model, targets = copy.deepcopy(seen.model).double(), targets.double()
        double, count = seen.having(model=model), seen.count

        def one(update, v):
            update = {k: t.double() for k, t in update.items()}
            guesses = targets.new_full((1, count, *seen.shape), 0.5)
            if count == 1:
                solutions = neurons.pixels(double, self._solutions(model, update, seen.shape))
                guesses = torch.cat([guesses, solutions[:, None].clamp(0, 1)])
            # re-computing the update certifies the result; in single precision it could not choose
            losses = vmap(lambda x: solve.misfit(double, x, targets[v], update))(guesses)
            best = int(losses.argmin())
            best = best if losses[best] < FOUND else 0
            said = "inexact: the image explains the update in part; see loss"
            if count > 1:
                said = f"not found: april needs an update of one image, and this one is of {count}"
            elif best == 0:
                said = "not found: no solution explains the update"
            flags = () if best and losses[best] <= EXACT else (said,)
            return solve.Found(guesses[best], targets[v].argmax(-1), losses[best], flags)

        found = solve.each(seen, rngs, progress, one, told)
        dtype = next(seen.model.parameters()).dtype
        return replace(found, images=found.images.to(dtype), loss=found.loss.to(dtype))

    def _solutions(self, model, update, shape) -> Float[torch.Tensor, "g c h w"]:
        """The normalised image, once for each cutoff."""
        tokens = update["pos_embed"][0]  # theorem 2: the derivative at the encoder's input
        embed = model.patch_embed.weight.flatten(1)
        if self.through == "embedding":
            patches = solve.least_norm(tokens[1:], update["patch_embed.weight"].flatten(1))
        else:
            qkv = model.blocks[0].attn.qkv.weight
            right = qkv.T @ update["blocks.0.attn.qkv.weight"]  # theorem 1, equation 7
            known = model.pos_embed[0] + model.patch_embed.bias
            inner = solve.least_norm(tokens, right)[:, 1:] - known[1:]
            patches = inner @ torch.linalg.pinv(embed).T
        return model.folded(patches, shape)

"""Robbing the Fed: Directly Obtaining Private Data in Federated Learning with Modified Models."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import labels, neurons
from fedsec.attack import Attack
from fedsec.checks import require

SPREAD = 0.5  # deviation of images' brightness, over that of pixels, where nothing public tells


class Imprinted(nn.Module):
    """A model behind an imprint block (section 4.1): neuron i fires above the brightness cut i.

    All neurons act alike on what follows, so each image passes the same back to all that it fires.
    What they add to the image is small; the image itself goes on, so that the model still learns.
    """

    def __init__(self, model: nn.Module, cuts: Tensor, back: Tensor):
        super().__init__()
        pixels, bins = back.numel(), len(cuts)
        self.bins = nn.Linear(pixels, bins).to(cuts)
        self.back = nn.Linear(bins, pixels).to(cuts)
        self.model, self.normalise = model, model.get_submodule("normalise")
        with torch.no_grad():
            self.bins.weight.fill_(1 / pixels)
            self.bins.bias.copy_(-cuts)
            self.back.weight.copy_(back[:, None].expand(pixels, bins) / bins)
            self.back.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bins(images.flatten(1)))
        return self.model(images + self.back(hidden).view_as(images))


@dataclass(frozen=True, kw_only=True)
class Imprint(Attack):
    """Images of a batch, each exact that is alone in its bin of brightness (Fowl et al. 2022).

    The server puts a block before the model whose neurons fire above rising cuts. The gradients of
    neighbouring neurons then differ by what the images between their cuts passed back: with one
    image there, row over bias is that image (section 4.1, equation 4). The cuts are quantiles of
    the brightness of public images where `aux` is granted, else of a normal distribution with the
    model's own mean and half its deviation. With b images and the right quantiles the expected
    share of exact ones is (1 - 1/(bins + 1))^(b - 1) bins / (bins + 1).

    Unlike in the paper the image also goes around the block, and each image is certified by what
    it alone would have passed back (not with BatchNorm in train mode, which couples images).
    """

    bins: int  # neurons of the block, >= 2
    labels: str = "auto"  # how withheld ones are recovered: auto or one of labels.METHODS

    needs = frozenset({"model", "update|aggregate", "count", "shape", "data_range"})

    def __post_init__(self):
        require(self.bins >= 2, "bins", "must be at least 2", self.bins)
        labels.known(self.labels)

    def craft(self, model, known, rng):
        neurons.refuse_steps("imprint", known)
        parameter = next(model.parameters())
        at = torch.arange(1, self.bins + 1, dtype=torch.float64) / (self.bins + 1)
        if "aux" in known.grants:
            cuts = known.aux.images.double().flatten(1).mean(1).quantile(at)
        else:
            moments = model.get_submodule("normalise").buffers()
            mean, std = (t.double().mean().cpu() for t in moments)
            cuts = mean + SPREAD * std * 2**0.5 * torch.erfinv(2 * at - 1)
        back = torch.randn(torch.Size(known.shape).numel(), generator=rng).sign()
        return (Imprinted(model, cuts.to(parameter), back.to(parameter)),)

    def __call__(self, seen, rngs, progress):
        def differences(rows, bias):
            above = F.pad(rows[1:], (0, 0, 0, 1)), F.pad(bias[1:], (0, 1))
            rows, bias = rows - above[0], bias - above[1]  # equation 4
            full = neurons.beyond_rounding(bias).nonzero().flatten()
            images = (rows[full] / bias[full, None]).reshape(-1, *seen.shape)
            return images, bias[full], full

        return neurons.reconstruct(seen, "bins", differences, rngs, progress, self.labels)

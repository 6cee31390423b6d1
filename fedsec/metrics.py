"""How near a reconstruction comes to its original: one value for each image, never an average.

Images are [n, c, h, w] in [0, 1]; row i of `guess` is compared with row i of `truth`. A guess with
a pixel that is not finite has the value NaN in every metric, and changes no other image's value.
Values are float64. Originals outside [0, 1] (normalised for a model, say) raise ValueError.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CAP = 80.0  # dB: the PSNR of an exact image; one infinite value would be every mean
_PIXELS = 2**18  # of one channel, measured at a time: 256 images of 32 x 32


def _per_image(metric: Callable[..., Tensor]) -> Callable[..., Float[Tensor, " n"]]:
    """Check the pair, measure it in chunks without a graph, and keep NaN to its own image."""

    @functools.wraps(metric)
    @torch.no_grad()
    def measured(guess: Tensor, truth: Tensor, *args, **kwargs) -> Tensor:
        if guess.shape != truth.shape or truth.ndim != 4:
            shapes = f"{tuple(guess.shape)} and {tuple(truth.shape)}"
            raise ValueError(f"guess and truth must both be [n, c, h, w], got {shapes}")
        if truth.numel() and not (truth.min() >= 0 and truth.max() <= 1):
            raise ValueError("truth must lie in [0, 1]: a model normalises for itself")
        size = max(1, _PIXELS // max(1, truth[0, 0].numel() if len(truth) else 1))
        finite = guess.flatten(1).isfinite().all(1)
        safe = guess.where(finite[:, None, None, None], 0)
        pairs = zip(safe.split(size), truth.split(size), strict=True)
        values = torch.cat([metric(g, t, *args, **kwargs).double() for g, t in pairs])
        return values.where(finite & values.isfinite(), torch.nan)

    return measured


@_per_image
def mse(guess: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean squared error over pixels and channels."""
    return (guess.double() - truth.double()).square().flatten(1).mean(1)


def psnr(
    guess: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"], cap: float = CAP
) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio in dB for a data range of 1, at most `cap`; exact images get it.

    Only what has to tell exact from nearly exact lifts the cap, to infinity.
    """
    return (-10 * mse(guess, truth).log10()).clamp(max=cap)


# ---- SSIM ---------------------------------------------------------------------------------------

WINDOW = 11  # pixels a side


@_per_image
def ssim(guess: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window of sigma 1.5, population
    covariance, K = (0.01, 0.03), mean over all places where the window fits and over channels.

    Equals scikit-image's with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1`. NaN for images smaller than the window (see `unmeasurable`).
    """
    if min(guess.shape[2:]) < WINDOW:
        return guess.new_full((len(guess),), torch.nan)
    x, y = guess.double(), truth.double()
    taps = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    taps = torch.exp(-0.5 * (taps / 1.5) ** 2)
    taps = taps / taps.sum()

    def blur(image: Tensor) -> Tensor:
        flat = image.flatten(0, 1)[:, None]
        blurred = F.conv2d(F.conv2d(flat, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        return blurred.view(*image.shape[:2], *blurred.shape[2:])

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return index.flatten(1).mean(1)


# ---- LPIPS --------------------------------------------------------------------------------------

SIDE = 64  # pixels: smaller images are up-sampled until their shorter side has as many
_TITLES = {"alex": "AlexNet", "vgg": "VGG16"}


def lpips_name(net: str = "alex") -> str:
    """The metric's name as a report has to give it."""
    return f"LPIPS ({_TITLES[net]}, up-sampled to {SIDE} px bilinear)"


LPIPS_NAME = lpips_name()


class _Missing(Exception):
    """A network's weights are not on this machine; `str` is the reason."""


@_per_image
def lpips(
    guess: Float[Tensor, "n c h w"],
    truth: Float[Tensor, "n c h w"],
    net: str = "alex",
    download: bool = False,
) -> Float[Tensor, " n"]:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1); 0 is identical.

    Images smaller than 64 pixels are up-sampled, grey ones repeated to three channels. AlexNet's
    features come with fedsec, the linear heads with the package lpips; neither is imported nor
    downloaded. `net="vgg"` uses torchvision's VGG16 from torch's hub cache, and fetches it only
    with `download=True`. NaN where it cannot be measured (see `unmeasurable`).
    """
    try:
        weights = _weights(net, str(guess.device), download)
    except _Missing:
        weights = None
    if weights is None or guess.shape[1] not in (1, 3):
        return guess.new_full((len(guess),), torch.nan)
    features, heads = weights
    distance = guess.new_zeros(len(guess), dtype=torch.float32)
    pairs = zip(_stages(guess, features, net), _stages(truth, features, net), heads, strict=True)
    for x, y, head in pairs:
        distance += F.conv2d((_unit(x) - _unit(y)).square(), head).mean((1, 2, 3))
    return distance


def unmeasurable(
    shape: tuple[int, ...], net: str = "alex", download: bool = False
) -> dict[str, str]:
    """Which metrics are NaN for every image of `shape` (c, h, w) here, and why."""
    reasons = {}
    if min(shape[1:]) < WINDOW:
        got = f"{shape[1]} x {shape[2]}"
        reasons["ssim"] = f"SSIM needs at least {WINDOW} x {WINDOW} pixels, got {got}"
    if shape[0] not in (1, 3):
        reasons["lpips"] = f"LPIPS needs grey or colour images, got {shape[0]} channels"
    try:
        _weights(net, "cpu", download)
    except _Missing as missing:
        reasons["lpips"] = str(missing)
    return reasons


# torchvision's `features`: indices of the convolutions in each stage, a ReLU after each; the stages
# before which there is a max pooling, and its window.
_STAGES = {
    "alex": ([[0], [3], [6], [8], [10]], {1, 2}, 3),
    "vgg": ([[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]], {1, 2, 3, 4}, 2),
}


def _stages(images: Tensor, weights: dict[str, Tensor], net: str):
    """The activations after each stage's last ReLU."""
    stages, pooled, window = _STAGES[net]
    x = _prepared(images)
    for k, stage in enumerate(stages):
        if k in pooled:
            x = F.max_pool2d(x, window, 2)
        for i in stage:
            weight, bias = weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]
            wide = weight.shape[-1] == 11  # AlexNet's first
            stride, padding = (4, 2) if wide else (1, weight.shape[-1] // 2)
            x = F.conv2d(x, weight, bias, stride, padding).relu()
        yield x


def _prepared(images: Tensor) -> Tensor:
    """[0, 1] images as LPIPS's networks take them."""
    x = images.float()
    if min(x.shape[2:]) < SIDE:
        size = [round(side * SIDE / min(x.shape[2:])) for side in x.shape[2:]]
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    x = 2 * x.expand(-1, 3, -1, -1) - 1
    shift, scale = x.new_tensor([-0.030, -0.088, -0.188]), x.new_tensor([0.458, 0.448, 0.450])
    return (x - shift[:, None, None]) / scale[:, None, None]


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


@functools.cache
def _weights(net: str, device: str, download: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Convolutions by torchvision's names, and the five linear heads."""
    features = _alexnet() if net == "alex" else _vgg16(download)
    found = importlib.util.find_spec("lpips")
    if found is None or not found.submodule_search_locations:
        raise _Missing("LPIPS's linear heads need the package lpips: pip install lpips")
    path = Path(found.submodule_search_locations[0], "weights", "v0.1", f"{net}.pth")
    heads = torch.load(path, map_location=device, weights_only=True)
    return (
        {k: w.to(device) for k, w in features.items() if k.startswith("features.")},
        [heads[f"lin{k}.model.1.weight"] for k in range(5)],
    )


ALEXNET = Path(__file__).parent / "weights" / "lpips_alexnet_features.safetensors"
ALEXNET_SHA256 = "a988b99e9abb616d32f50505a2c8e5eed97d8d77196cf81436f725055886d84f"
VGG16 = "vgg16-397923af.pth"  # torchvision's file; its name holds the start of its SHA-256


def _alexnet() -> dict[str, Tensor]:
    from safetensors.torch import load

    content = ALEXNET.read_bytes() if ALEXNET.exists() else b""
    if hashlib.sha256(content).hexdigest() != ALEXNET_SHA256:
        raise _Missing(f"{ALEXNET} is missing or damaged: reinstall fedsec")
    return load(content)


def _vgg16(download: bool) -> dict[str, Tensor]:
    path = Path(torch.hub.get_dir(), "checkpoints", VGG16)
    if not path.exists():
        if not download:
            raise _Missing(f"VGG16's weights are not at {path}, and download=True was not given")
        try:
            url = f"https://download.pytorch.org/models/{VGG16}"
            torch.hub.load_state_dict_from_url(url, progress=False, map_location="cpu")
        except OSError as error:
            raise _Missing(f"VGG16's weights could not be fetched: {error}") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(path.stem.split("-")[1]):
        raise _Missing(f"{path} is damaged: remove it")
    return torch.load(path, map_location="cpu", weights_only=True)

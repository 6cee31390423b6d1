"""Metrics against scikit-image, lpips and hand-made values: one value per image, whatever it is."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsec import metrics
from fedsec.metrics import lpips, mse, psnr, ssim, unmeasurable

ALL = {"mse": mse, "psnr": psnr, "ssim": ssim, "lpips": lpips}


def pair(n=4, c=3, h=32, w=32, noise=0.1):
    truth = torch.rand(n, c, h, w)
    return (truth + noise * torch.randn(n, c, h, w)).clamp(0, 1), truth


def waves(c=3, side=32):
    """Two deterministic images, [1, c, side, side]: no generator, no file."""
    u = torch.arange(side, dtype=torch.float64) / side
    planes = [torch.sin(7 * u[:, None] + (k + 2) * 5 * u[None] + k) for k in range(c)]
    truth = (torch.stack(planes)[None] + 1) / 2
    return (0.8 * truth.roll(3, 3) + 0.1).float(), truth.float()


# ---- mse and psnr -------------------------------------------------------------------------------


def test_known_values():
    truth = torch.full((3, 1, 4, 4), 0.5)
    guess = truth + torch.tensor([0.1, 0.0, -0.5]).view(3, 1, 1, 1)
    assert mse(guess, truth).tolist() == pytest.approx([0.01, 0, 0.25], abs=1e-7)
    assert psnr(guess, truth).tolist() == pytest.approx([20, 80, 6.0206], abs=1e-4)


def test_an_exact_image_has_the_cap_and_no_other_image_gains_by_it():
    guess, truth = pair(2)
    guess[0] = truth[0]
    alone = psnr(guess[1:], truth[1:])
    both = psnr(guess, truth)
    assert both[0] == 80.0
    assert both[1] == alone[0] < 80
    assert mse(guess, truth)[0] == 0.0  # mishap: RMSE was NaN for a perfect image
    assert both.isfinite().all()


def test_without_the_cap_nearly_exact_images_are_told_apart():
    truth = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    guess = truth.clone()
    guess[0] += 1e-10
    assert psnr(guess, truth).tolist() == [80, 80]
    assert psnr(guess, truth, cap=torch.inf).tolist() == pytest.approx([200, torch.inf], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 9), st.floats(0, 1))
def test_psnr_is_scikit_image_s(n, c, side, noise):
    from skimage.metrics import peak_signal_noise_ratio

    guess, truth = pair(n, c, side, side, noise)
    guess[0, 0, 0, 0] = 1 - truth[0, 0, 0, 0].round()
    twin = []
    for g, t in zip(guess.double().numpy(), truth.double().numpy(), strict=True):
        exact = np.array_equal(g, t)
        twin.append(80.0 if exact else min(80.0, peak_signal_noise_ratio(t, g, data_range=1)))
    assert psnr(guess, truth).tolist() == pytest.approx(twin, rel=1e-9)


# ---- ssim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 11, 11), (3, 64, 40), (4, 12, 33)])
def test_ssim_is_scikit_image_s(shape):
    from skimage.metrics import structural_similarity

    guess, truth = pair(3, *shape)
    guess[2] = truth[2].mean()  # flat
    guess, truth = guess.double(), truth.double()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    twin = [
        structural_similarity(t, g, channel_axis=0, data_range=1, **options)
        for g, t in zip(guess.numpy(), truth.numpy(), strict=True)
    ]
    assert ssim(guess, truth).tolist() == pytest.approx(twin, abs=1e-9)
    assert ssim(guess.float(), truth.float()).tolist() == pytest.approx(twin, abs=1e-5)


def test_ssim_of_an_image_with_itself_is_one():
    _, truth = pair(2)
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_ssim_below_its_window_is_nan_with_a_reason():
    guess, truth = pair(2, 3, 10, 32)
    assert ssim(guess, truth).isnan().all()
    assert unmeasurable((3, 10, 32)) == {"ssim": "SSIM needs at least 11 x 11 pixels, got 10 x 32"}
    assert unmeasurable((3, 11, 11)) == {}


# ---- lpips --------------------------------------------------------------------------------------


def test_lpips_of_the_authors_pairs():
    folder = os.environ.get("FEDSEC_LPIPS_PAIRS")
    if not folder:
        pytest.skip("FEDSEC_LPIPS_PAIRS names no folder with lpips's ex_ref.png, ex_p0, ex_p1")
    from PIL import Image

    def load(name):
        pixels = np.asarray(Image.open(Path(folder, name)).convert("RGB"))
        return torch.tensor(pixels).permute(2, 0, 1)[None] / 255

    truth = load("ex_ref.png")
    assert lpips(load("ex_p0.png"), truth).item() == pytest.approx(0.721881, abs=2e-6)
    assert lpips(load("ex_p1.png"), truth).item() == pytest.approx(0.137566, abs=2e-6)


def test_lpips_pinned_on_waves():
    assert lpips(*waves()).item() == pytest.approx(0.114784, abs=1e-5)
    assert lpips(*waves(1, 28)).item() == pytest.approx(0.111089, abs=1e-5)


def reference(net):
    import lpips as package

    with torch.random.fork_rng():
        return package.LPIPS(net=net, pnet_rand=True, pretrained=True, verbose=False)


def by_reference(model, guess, truth):
    """What the LPIPS authors' module says of images in [0, 1], up-sampled before."""
    up = [F.interpolate(x, (64, 64), mode="bilinear") for x in (guess, truth)]
    with torch.no_grad():
        return model(*(2 * x - 1 for x in up)).flatten()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision on lpips's `pretrained`
def test_lpips_is_the_package_s():
    model = reference("alex")
    carried = metrics._alexnet()
    state = model.net.state_dict()
    model.net.load_state_dict({k: carried["features." + k.split(".", 1)[1]] for k in state})
    guess, truth = pair(5)
    twin = by_reference(model, guess, truth)
    assert lpips(guess, truth).tolist() == pytest.approx(twin.tolist(), abs=1e-6)


@pytest.mark.slow  # builds a whole VGG16 to compare with
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_vgg_is_the_package_s(monkeypatch):
    model = reference("vgg")
    state = model.net.state_dict()
    features = {"features." + k.split(".", 1)[1]: w for k, w in state.items()}
    monkeypatch.setattr(metrics, "_vgg16", lambda download: features)
    metrics._weights.cache_clear()
    guess, truth = pair(3)
    twin = by_reference(model, guess, truth)
    got = lpips(guess, truth, net="vgg")
    metrics._weights.cache_clear()
    assert got.tolist() == pytest.approx(twin.tolist(), rel=1e-5)
    assert unmeasurable((3, 32, 32)) == {}


def test_lpips_knows_grey_and_refuses_other_channels():
    guess, truth = pair(2, 1)
    grey = lpips(guess, truth)
    assert grey.tolist() == pytest.approx(
        lpips(guess.expand(-1, 3, -1, -1), truth.expand(-1, 3, -1, -1)).tolist(), abs=1e-6
    )
    assert lpips(*pair(2, 4)).isnan().all()
    assert "4 channels" in unmeasurable((4, 32, 32))["lpips"]


@pytest.mark.parametrize(
    ("size", "prepared"), [((28, 28), (64, 64)), ((32, 48), (64, 96)), ((64, 80), (64, 80))]
)
def test_lpips_up_samples_small_images_only(size, prepared):
    assert metrics._prepared(torch.rand(1, 1, *size)).shape == (1, 3, *prepared)


def test_vgg_without_its_weights_is_nan_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: 1 / 0)
    assert lpips(*pair(2), net="vgg").isnan().all()
    assert "download=True was not given" in unmeasurable((3, 32, 32), "vgg")["lpips"]

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    assert lpips(*pair(2), net="vgg", download=True).isnan().all()
    assert "no route" in unmeasurable((3, 32, 32), "vgg", True)["lpips"]

    path = tmp_path / "hub" / "checkpoints" / metrics.VGG16
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    assert "damaged" in unmeasurable((3, 32, 32), "vgg")["lpips"]


def test_vgg_is_read_from_the_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    places = [i for stage in metrics._STAGES["vgg"][0] for i in stage]
    state = {"classifier.0.weight": torch.zeros(1)}
    for i, c_in, c_out in zip(places, widths[:-1], widths[1:], strict=True):
        state[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5
        state[f"features.{i}.bias"] = torch.zeros(c_out)
    torch.save(state, folder / "plain")
    digest = hashlib.sha256((folder / "plain").read_bytes()).hexdigest()
    monkeypatch.setattr(metrics, "VGG16", f"vgg16-{digest[:8]}.pth")
    (folder / "plain").rename(folder / metrics.VGG16)
    assert unmeasurable((3, 32, 32), "vgg") == {}
    guess, truth = pair(1)
    assert lpips(guess, truth, net="vgg").item() > 0
    metrics._weights.cache_clear()


def test_damaged_features_are_found_out(monkeypatch, tmp_path):
    broken = bytearray(metrics.ALEXNET.read_bytes())
    broken[-1] ^= 1
    path = tmp_path / "features.safetensors"
    path.write_bytes(broken)
    monkeypatch.setattr(metrics, "ALEXNET", path)
    metrics._weights.cache_clear()
    assert "damaged" in unmeasurable((3, 32, 32))["lpips"]
    assert lpips(*pair(1)).isnan().all()
    monkeypatch.undo()
    assert lpips(*pair(1)).isfinite().all()


def test_lpips_imports_nothing_heavy_prints_nothing_and_draws_nothing(capfd):
    import subprocess
    import sys

    code = (
        "import sys, torch; from fedsec.metrics import lpips; torch.manual_seed(0);"
        "x = torch.rand(2, 3, 32, 32); before = torch.get_rng_state(); lpips(x, 1 - x);"
        "assert torch.equal(before, torch.get_rng_state());"
        "assert not {'lpips', 'torchvision', 'skimage', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---- every metric -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_guess_is_nan_alone(metric, bad):
    guess, truth = pair(4)
    clean = metric(guess, truth)
    guess[1, 2, 5, 7] = bad
    values = metric(guess, truth)
    assert values.isnan().tolist() == [False, True, False, False]
    keep = [0, 2, 3]
    assert values[keep].tolist() == pytest.approx(clean[keep].tolist(), abs=1e-6)


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
def test_one_value_per_image_whatever_its_company(metric, monkeypatch):
    guess, truth = pair(7)
    alone = [metric(g[None], t[None]).item() for g, t in zip(guess, truth, strict=True)]
    assert metric(guess, truth).tolist() == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr(metrics, "_PIXELS", 3 * 32 * 32)  # chunks of 3, 3, 1
    assert metric(guess, truth).tolist() == pytest.approx(alone, abs=1e-5)
    assert metric(guess[:0], truth[:0]).shape == (0,)


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
def test_no_graph_is_kept_and_nothing_is_changed(metric):
    guess, truth = pair(2)
    guess.requires_grad_()
    kept = guess.detach().clone(), truth.clone()
    values = metric(guess, truth)
    assert values.dtype == torch.float64
    assert not values.requires_grad
    assert torch.equal(guess, kept[0])
    assert torch.equal(truth, kept[1])


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
def test_normalised_images_and_batches_that_do_not_pair_are_refused(metric):
    guess, truth = pair(2)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):  # mishap: LPIPS of normalised tensors
        metric((guess - 0.5) / 0.25, (truth - 0.5) / 0.25)
    with pytest.raises((ValueError, TypeError)):  # mishap: each image against the whole batch
        metric(guess, truth[:1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(guess, torch.where(truth > 0.9, torch.nan, truth))


@pytest.mark.parametrize(("metric", "better"), [(psnr, 1), (ssim, 1), (mse, -1), (lpips, -1)])
def test_more_noise_is_worse(metric, better):
    _, truth = waves()
    noise = torch.randn(truth.shape)
    values = [metric((truth + s * noise).clamp(0, 1), truth).item() for s in (0.02, 0.1, 0.4)]
    assert [better * v for v in values] == sorted((better * v for v in values), reverse=True)


def test_the_name_says_network_and_up_sampling():
    assert metrics.LPIPS_NAME == "LPIPS (AlexNet, up-sampled to 64 px bilinear)"
    assert "VGG16" in metrics.lpips_name("vgg")

"""APRIL: exact up to rounding on a vision transformer, and honest where it is not."""

import pytest
import torch
from test_attacks import MEAN, STD, nothing, observed, rngs

from attacks.april import April
from fedsec import engine, metrics
from fedsec.checks import Refused
from fedsec.data import Photos
from fedsec.models import LeNetSpec, ViTSpec
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify import april

SHAPE = (3, 16, 16)
SMALL = {"width": 48, "depth": 2}  # 17 tokens, and 48 pixels of a patch


def vit(shape=SHAPE, **fields):
    return ViTSpec(**(SMALL | fields)).build(shape, 10, MEAN, STD, stream(0, "model"))


def private(count, batch=1, dtype=torch.float64):
    images = torch.rand(count, batch, *SHAPE, generator=stream(0, "private"), dtype=dtype)
    targets = torch.eye(10, dtype=dtype)[torch.arange(count * batch) % 10]
    return images, targets.view(count, batch, 10)


@pytest.mark.parametrize(
    ("through", "encoder", "dtype", "least"),
    [
        ("embedding", "residual", torch.float64, 240),
        ("embedding", "residual", torch.float32, 75),
        ("embedding", "sequential", torch.float64, 200),
        ("attention", "sequential", torch.float64, 200),
    ],
)
def test_the_image_comes_out_up_to_rounding(through, encoder, dtype, least):
    images, targets = private(4, dtype=dtype)
    model = vit(encoder=encoder).to(dtype)
    found = April(through=through)(observed(model, images, targets), rngs(4), nothing)
    psnr = metrics.psnr(found.images[:, 0], images[:, 0], cap=torch.inf)
    assert psnr.min() >= least
    assert torch.equal(found.labels, targets.argmax(-1))
    assert found.flags == ((),) * 4
    assert found.loss.abs().max() < 1e-9


def test_both_systems_hold_at_the_true_tokens():
    """The twin: G' P = dE and G' Z = W' dW, with tokens from the forward pass, G from autograd."""
    model = vit(encoder="sequential").double()
    images, targets = private(1)
    seen: list[torch.Tensor] = []

    def note(_, args):
        args[0].retain_grad()
        seen.append(args[0])

    model.blocks[0].attn.register_forward_pre_hook(note)
    torch.nn.functional.cross_entropy(model(images[0]), targets[0]).backward()
    tokens, slope = seen[0].detach()[0], seen[0].grad[0]
    update = {k: p.grad for k, p in model.named_parameters()}
    torch.testing.assert_close(update["pos_embed"][0], slope)
    qkv = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(slope.T @ tokens, model.get_parameter(qkv).T @ update[qkv])
    patches = torch.nn.functional.unfold(model.normalise(images[0]), 4, stride=4)[0].T
    torch.testing.assert_close(slope[1:].T @ patches, update["patch_embed.weight"].flatten(1))


def test_one_local_step_is_as_good_as_a_gradient():
    images, targets = private(1)
    model, local = vit().double(), Local("fedavg", 0.1, 1, 1)
    seen = observed(model, images, targets, local=local)
    sent = engine.simulate(model, images[0], targets[0], local)
    for name, tensor in seen.update.tensors.items():
        tensor.copy_(sent[name][None])
    found = April(through="embedding")(seen, rngs(1), nothing)
    assert metrics.psnr(found.images[:, 0], images[:, 0], cap=torch.inf) >= 200


def test_under_noise_it_keeps_what_stands_above_it_and_says_so():
    """Every singular value inverted would return noise: 1e-4 of it costs 100 dB, not all."""
    images, targets = private(3, dtype=torch.float32)
    seen = observed(vit(), images, targets)
    for name, tensor in seen.update.tensors.items():
        tensor += 1e-4 * torch.randn(tensor.shape, generator=stream(0, name))
    found = April(through="embedding")(seen, rngs(3), nothing)
    grey = metrics.psnr(torch.full_like(images[:, 0], 0.5), images[:, 0])
    assert (metrics.psnr(found.images[:, 0], images[:, 0]) > grey + 6).all()
    assert all(f[0].startswith("inexact: ") for f in found.flags)


@pytest.mark.parametrize("case", ["noise alone", "nothing", "two images"])
def test_it_says_when_it_found_nothing(case):
    images, targets = private(2, 2 if case == "two images" else 1, torch.float32)
    seen = observed(vit(), images, targets)
    for name, tensor in seen.update.tensors.items():
        if case == "noise alone":
            tensor.copy_(torch.randn(tensor.shape, generator=stream(0, name)))
        elif case == "nothing":
            tensor.zero_()
    found = April(through="embedding")(seen, rngs(2), nothing)
    assert (found.images == 0.5).all()
    assert all(f[0].startswith("not found: ") for f in found.flags)
    assert found.loss.isfinite().all()


@pytest.mark.parametrize(
    ("through", "model", "says"),
    [
        ("embedding", LeNetSpec(), r"model: .* \(model=vit\), got LeNet"),
        ("embedding", ViTSpec(width=32, heads=2), r"model\.width: .* has 32 equations, .* got 48"),
        ("embedding", ViTSpec(width=60, patch=2), r"model\.width: .* has 60 equations, .* got 65"),
        ("attention", ViTSpec(width=48), r"model\.encoder: .*\(model\.encoder=sequential\), got "),
    ],
)
def test_models_that_it_cannot_solve_are_refused(through, model, says):
    built = model.build(SHAPE, 10, MEAN, STD, stream(0, "model"))
    with pytest.raises(Refused, match=f"^{says}"):
        April(through=through).check(built)
    with pytest.raises(Refused, match="^through: must be embedding or attention, got sideways"):
        April(through="sideways")


@pytest.mark.slow
@pytest.mark.parametrize("claim", april.CLAIMS, ids=lambda c: c.setting)
def test_its_claims_hold(claim):
    assert claim.least <= claim.measure(Photos().load()) <= claim.most

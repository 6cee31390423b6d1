"""R-GAP: exact where layers determine their input, and silent where they or the update do not."""

import math

import pytest
import torch
from test_attacks import CIFAR, nothing, observed, rngs
from torch import nn
from torch.nn import functional as F

from attacks.rgap import RGAP
from fedsec import engine, metrics
from fedsec.checks import Refused
from fedsec.data import Npz, Photos
from fedsec.models import CNN6Spec, ConvNetSpec, LeNetSpec, MLPSpec, Normalise, ResNetSpec
from fedsec.rgap import Layer, System, chain, heads, undo
from fedsec.rng import stream
from fedsec.types import Local
from fedsec.verify.rgap import CLAIMS

ATTACK = RGAP(weight=0.1, iterations=3000, residual=0.1)
MEAN, STD = (0.45,) * 3, (0.25,) * 3


class Chain(nn.Module):
    """Layers behind a normalisation, as the zoo's networks have it."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.normalise = Normalise(MEAN, STD)
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(self.normalise(x))


def small(activation, bias: bool = False, classes: int = 5, first: int = 16) -> nn.Module:
    """Two convolutions and two linear layers for 3 x 8 x 8 images, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Chain(
            *(nn.Conv2d(3, first, 3, stride=2, padding=1, bias=bias), activation),
            *(nn.Conv2d(first, 24, 3, padding=1, bias=bias), activation, nn.Flatten()),
            *(nn.Linear(24 * 16, 40, bias=bias), activation, nn.Linear(40, classes, bias=bias)),
        ).double()


def pictures(count: int, classes: int, size: int = 8, dtype=torch.float64):
    images = torch.rand(count, 1, 3, size, size, generator=stream(0, "private"), dtype=dtype)
    return images, torch.eye(classes, dtype=dtype)[[i % classes for i in range(count)]][:, None]


def psnr(found, images):
    return metrics.psnr(found.images[:, 0], images[:, 0], cap=math.inf)


# ---- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh()], ids=lambda a: type(a).__name__
)
def test_a_chain_is_walked_back_to_the_image(activation, bias):
    images, targets = pictures(3, 5)
    found = ATTACK(observed(small(activation, bias), images, targets), rngs(3), nothing)
    assert psnr(found, images).min() > 120
    assert torch.equal(found.labels, targets.argmax(-1))
    assert (found.loss < 1e-6).all()
    assert found.flags == ((),) * 3


@pytest.mark.parametrize("spec", [MLPSpec(hidden=(32, 16)), LeNetSpec(), CNN6Spec()])
def test_networks_of_the_zoo_leak_from_float32_gradients(spec):
    model = spec.build((3, 16, 16), 4, MEAN, STD, stream(0, "model"))
    images, targets = pictures(2, 4, 16, torch.float32)
    found = ATTACK(observed(model, images, targets), rngs(2), nothing)
    assert psnr(found, images).min() > 80
    assert torch.equal(found.labels, targets.argmax(-1))


@pytest.mark.parametrize("bias", [False, True])
def test_two_classes_of_which_both_labels_and_both_margins_are_tried(bias):
    images, targets = pictures(2, 2)
    found = ATTACK(observed(small(nn.LeakyReLU(0.2), bias, 2), images, targets), rngs(2), nothing)
    assert psnr(found, images).min() > 120
    assert torch.equal(found.labels, targets.argmax(-1))


def test_the_length_of_a_local_step_need_not_be_known():
    model, (images, targets) = small(nn.LeakyReLU(0.2)), pictures(1, 5)
    seen = observed(model, images, targets)
    for tensor in seen.update.tensors.values():
        tensor *= 0.037
    found = ATTACK(seen, rngs(1), nothing)
    assert psnr(found, images).min() > 120
    binary, (images, targets) = small(nn.LeakyReLU(0.2), classes=2), pictures(1, 2)
    step = Local(kind="fedavg", lr=0.037)
    seen = observed(binary, images, targets, local=step)
    for tensor in seen.update.tensors.values():
        tensor *= 0.037
    assert psnr(ATTACK(seen, rngs(1), nothing), images).min() > 120, "two classes need the rate"


# ---- its parts, and their dumb twins ------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("bias", [False, True])
def test_the_last_layers_gradient_gives_all_there_is_to_know(classes, bias):
    layer = nn.Linear(30, classes, bias=bias).double()
    x = torch.randn(30, generator=stream(0, "x"), dtype=torch.float64)
    for label in range(classes):
        loss = F.cross_entropy(layer(x)[None], torch.tensor([label]))
        sent = torch.autograd.grad(loss, list(layer.parameters()))
        told = {f"a.{k}": g for (k, _), g in zip(layer.named_parameters(), sent, strict=True)}
        found = heads(Layer("a", layer, None), told, 1.0)
        best = min(found, key=lambda head: float((head.x - x).norm()))
        torch.testing.assert_close(best.x, x, rtol=1e-6, atol=1e-8)
        dz = layer(x).softmax(0).detach()
        dz[label] -= 1
        torch.testing.assert_close(best.dz, dz, rtol=1e-6, atol=1e-8)
        assert best.label == label
        assert best.scale == pytest.approx(1, rel=1e-6)
        for head in found:  # each of them would send the very same gradient
            torch.testing.assert_close(torch.outer(head.dz, head.x), told["a.weight"])
            if not bias:
                again = (layer.weight @ head.x).softmax(0)
                again[head.label] -= 1
                torch.testing.assert_close(again, head.dz, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.Conv2d(2, 6, (3, 2), stride=(1, 2), padding=(2, 0)),
        nn.Conv2d(2, 6, 4, stride=2, padding=2, bias=False),
        nn.Linear(2 * 7 * 6, 9),
    ],
    ids=str,
)
def test_a_layers_equations_are_those_of_autograd_and_lsmr_solves_them(module):
    """Twin: both blocks as dense Jacobians, solved by least squares."""
    module, rng = module.double(), stream(0, "system")
    layer = Layer("a", module, nn.LeakyReLU(0.2))
    size = layer.shaped(torch.zeros(1, 2, 7, 6)).shape

    def sent(x):
        out = module(x.view(1, -1) if isinstance(module, nn.Linear) else x)
        return out - module(torch.zeros_like(x.view(1, -1) if out.dim() == 2 else x))

    x = torch.randn(size, generator=rng, dtype=torch.float64)
    dz = torch.randn(sent(x).shape, generator=rng, dtype=torch.float64)
    slope = torch.where(torch.rand(dz.shape, generator=rng) > 0.5, 1.0, 0.2).double()

    def gradient(x):
        out = module(x.view(1, -1) if isinstance(module, nn.Linear) else x)
        return torch.autograd.grad((out * dz).sum(), module.weight, create_graph=True)[0]

    known = layer.shaped(dz) if isinstance(module, nn.Linear) else dz
    slope = slope.view(known.shape)
    system = System(layer, size, slope, known, 0.1, 3000)
    z, told = system.forward(x)
    torch.testing.assert_close(z, slope * sent(x).view(slope.shape))
    torch.testing.assert_close(told.reshape(module.weight.shape), gradient(x))

    weighed = (system.by_weight, system.by_gradient)
    blocks = []
    for i, w in enumerate(weighed):
        block = torch.autograd.functional.jacobian(lambda x, i=i: system.forward(x)[i], x)
        blocks.append(w * block.reshape(-1, x.numel()))  # type: ignore[union-attr]
    right = [torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in (z, told)]
    flat = torch.cat([w * r.flatten() for w, r in zip(weighed, right, strict=True)])
    dense = torch.linalg.lstsq(torch.cat(blocks), flat[:, None], driver="gelsd").solution
    solved, gflop = system.solve(*right)
    torch.testing.assert_close(solved.flatten(), dense[:, 0], rtol=1e-6, atol=1e-6)
    assert gflop > 0
    down = (right[0] * z).sum() + (right[1] * told).sum()
    torch.testing.assert_close((system.adjoint(*right) * x).sum(), down)


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.2), nn.ReLU(), nn.Sigmoid(), nn.Tanh()], ids=str
)
def test_an_activation_is_undone_and_its_slope_is_autograds(activation):
    z = torch.linspace(-3, 3, 50, dtype=torch.float64).requires_grad_()
    x = activation(z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    back, told = undo(activation, x.detach())
    torch.testing.assert_close(told, slope)
    torch.testing.assert_close(back[slope > 0], z.detach()[slope > 0])


def test_the_residual_is_that_of_an_update_computed_again():
    """Twin: the loss, and PyTorch's own gradient."""
    model, (images, targets) = small(nn.Tanh()), pictures(1, 5)
    seen = observed(model, images, targets)
    seen.update.tensors["body.0.weight"] *= 1.02
    found = ATTACK(seen, rngs(1), nothing)
    weights = [p.detach().requires_grad_() for p in model.parameters()]
    named = dict(zip(dict(model.named_parameters()), weights, strict=True))
    logits = torch.func.functional_call(model, named, (found.images[0],))
    again = torch.autograd.grad(F.cross_entropy(logits, found.labels[0]), weights)
    sent = torch.cat([t[0].flatten() for t in seen.update.tensors.values()])
    guess = torch.cat([g.flatten() for g in again])
    # the update's scale is told by the last layer, which was not touched
    residual = (guess - sent).norm() / max(guess.norm(), sent.norm())
    assert float(found.loss[0]) == pytest.approx(float(residual), rel=1e-3)
    assert 1e-4 < residual < 0.1


# ---- not found ----------------------------------------------------------------------------------


def silent(found, why: str, count: int = 1) -> bool:
    assert found.flags[0][0].startswith("not found: "), found.flags
    assert why in found.flags[0][0]
    assert (found.images == 0.5).all()
    assert (found.labels == -1).all()
    assert found.images.shape[1] == count
    assert 0.1 < found.loss[0] <= 2
    return bool((found.gflop > 0).all())


def noised(tensors, rng):
    every = torch.cat([t.flatten() for t in tensors.values()])
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype)
        tensor += every.std() * noise


def pruned(tensors, rng):
    for tensor in tensors.values():
        tensor[tensor.abs() < tensor.abs().median()] = 0


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (noised, ""),
        (pruned, ""),
        (lambda tensors, rng: [t.zero_() for t in tensors.values()], ""),
        (lambda tensors, rng: tensors["body.0.weight"].fill_(math.nan), "not finite"),
        (lambda tensors, rng: tensors["body.0.weight"].mul_(-1), "sends another update"),
    ],
    ids=["noised", "pruned", "zero", "nan", "another"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_spoilt_update_gives_no_image(spoil, why, bias):
    images, targets = pictures(1, 5)
    seen = observed(small(nn.LeakyReLU(0.2), bias), images, targets)
    spoil(seen.update.tensors, stream(0, "spoil"))
    assert silent(ATTACK(seen, rngs(1), nothing), why)


def test_two_images_or_two_local_steps_give_no_image():
    model, (images, targets) = small(nn.LeakyReLU(0.2)), pictures(2, 5)
    both = observed(model, images.transpose(0, 1), targets.transpose(0, 1))
    assert silent(ATTACK(both, rngs(1), nothing), "2 images are behind one update", 2)
    seen = observed(model, images[:1], targets[:1])
    steps = Local(kind="fedavg", lr=1.0, steps=8)
    sent = engine.simulate(model, images[0], targets[0], steps)
    for name, tensor in seen.update.tensors.items():
        tensor.copy_(sent[name][None].detach())
    assert silent(ATTACK(seen, rngs(1), nothing), "")


def test_a_layer_that_leaves_its_input_open_is_named():
    """Two 3 x 3 filters at stride 2 say too little of an image: many would send this update."""
    images, targets = pictures(1, 5)
    seen = observed(small(nn.LeakyReLU(0.2), first=2), images, targets)
    assert silent(ATTACK(seen, rngs(1), nothing), "body.0 does not determine its input")


@pytest.mark.parametrize(("brightest", "twins"), [(1.0, False), (0.5, True)])
def test_a_twin_is_told_apart_by_the_data_range_or_else_flagged(brightest, twins):
    """With two classes and no bias, an image of margin 1 is like one 1.6 times as bright."""
    layer = nn.Linear(12, 2, bias=False).double()
    x = torch.linspace(0.1, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[1] = layer.weight[0] + x / x.square().sum()  # the margin of label 1
    model = Chain(nn.Flatten(), layer)
    model.normalise = Normalise((0.0,) * 3, (brightest,) * 3).double()
    images = brightest * x.view(1, 1, 3, 2, 2)
    seen = observed(model, images, torch.eye(2, dtype=torch.float64)[None, 1:])
    found = ATTACK(seen, rngs(1), nothing)
    assert found.labels.item() == 1
    if twins:
        assert "another image sends the same update" in found.flags[0][0]
    else:
        assert found.flags == ((),)
        assert psnr(found, images).item() > 120


@pytest.mark.parametrize("spec", [ConvNetSpec(width=4), ResNetSpec(depth=8, norm="none")])
def test_models_that_are_no_chain_are_refused(spec):
    model = spec.build((3, 32, 32), 10, MEAN, STD, stream(0, "model"))
    with pytest.raises(Refused, match=r"^model: attack=rgap needs .*\(model=cnn6, "):
        ATTACK.check(model)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)),
        (nn.Linear(192, 4), nn.ReLU()),
        (nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Linear(6, 2)),
        (nn.Conv2d(3, 6, 3, dilation=2), nn.Tanh(), nn.Linear(6, 2)),
        (nn.Conv2d(3, 6, 3, padding="same"), nn.Tanh(), nn.Linear(6, 2)),
        (nn.Linear(192, 4), nn.LeakyReLU(0.0), nn.Linear(4, 2)),
        (nn.Linear(192, 4), nn.GELU(), nn.Linear(4, 2)),
        (nn.Linear(192, 4), nn.Linear(4, 2)),
        (),
    ],
    ids=str,
)
def test_a_chain_needs_invertible_parts(layers):
    with pytest.raises(Refused, match=r"^model: attack=rgap needs"):
        chain(Chain(*layers))


# ---- the published network ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.data}-{claim.unit}")
def test_cnn6_is_exact_in_a_tenth_of_the_time_and_memory(claim):
    if claim.data == "cifar10" and not CIFAR.exists():
        pytest.skip("FEDSEC_DATA does not name a folder with cifar10.npz")
    photos = Photos(size=32, per_class=20, contrast=0.03)
    dataset = (Npz(path=str(CIFAR)) if claim.data == "cifar10" else photos).load()
    measured = claim.measure(dataset)
    print(measured)
    assert claim.least <= measured <= claim.most

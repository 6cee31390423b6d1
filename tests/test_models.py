"""Networks: published shapes and weights, and no trace of an attack on the victim's BatchNorm."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, grad, vmap

from fedsec import models
from fedsec.checks import Refused
from fedsec.data import Npz
from fedsec.models import (
    BatchNorm2d,
    CNN6Spec,
    ConvNetSpec,
    LeNetSpec,
    MLPSpec,
    Normalise,
    ResNet18Spec,
    ResNetSpec,
    ViTSpec,
    WideResNetSpec,
    first_layer,
    last_linear,
    norm_stats,
    recording,
    tracking,
)
from fedsec.rng import stream

SHAPE, MEAN, STD = (3, 32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
DATA, MODELS = os.environ.get("FEDSEC_DATA"), os.environ.get("FEDSEC_MODELS")
trained = pytest.mark.skipif(not MODELS, reason="FEDSEC_MODELS names no folder with akamaster's")

SMALL = {
    "lenet": (LeNetSpec, {}),
    "cnn6": (CNN6Spec, {}),
    "convnet": (ConvNetSpec, {"width": 4}),
    "mlp": (MLPSpec, {"hidden": (16, 8)}),
    "resnet18": (ResNet18Spec, {"width": 4}),
    "wrn10": (WideResNetSpec, {"depth": 10, "widen": 1}),
    "resnet8": (ResNetSpec, {"depth": 8, "width": 4}),
}

SMALL_VIT = {"width": 12, "heads": 2, "depth": 2}  # apart: patches and norms are its own


def built(spec, shape=SHAPE, classes=10, seed=0, **fields) -> nn.Module:
    channels = shape[0]
    rng = stream(seed, "model")
    return spec(**fields).build(shape, classes, MEAN[:channels], STD[:channels], rng)


def buffers(model: nn.Module) -> dict:
    return {name: b.clone() for name, b in model.named_buffers()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("spec", "fields", "count"),
    [
        (LeNetSpec, {}, 15_826),  # 12*76 + 2*12*301 + 10*769
        (CNN6Spec, {}, 154_256),  # 576 + 3888 + 2*11664 + 20736 + 73728 + 10*3200
        (ConvNetSpec, {}, 2_904_970),  # as breaching prints
        (MLPSpec, {}, 5_256_202),  # 1024*3073 + 2*1024*1025 + 10*1025
        (ResNet18Spec, {}, 11_173_962),  # as pytorch-cifar prints
        (ViTSpec, {}, 459_562),  # 4*(12*96*96 + 13*96) + 96*(48 + 1 + 1 + 65 + 2) + 10*97
        (WideResNetSpec, {"depth": 16}, 2_748_890),  # 2.7 M in De et al.
        (WideResNetSpec, {"depth": 40}, 8_949_210),  # 8.9 M
        (ResNetSpec, {"depth": 20}, 269_722),  # the rest as akamaster prints
        (ResNetSpec, {"depth": 32}, 464_154),
        (ResNetSpec, {"depth": 44}, 658_586),
        (ResNetSpec, {"depth": 56}, 853_018),
    ],
)
def test_parameter_counts_are_the_published_ones(spec, fields, count):
    assert sum(p.numel() for p in built(spec, **fields).parameters()) == count


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 21), (3, 64, 64)])
@pytest.mark.parametrize("name", SMALL)
def test_networks_fit_images_of_many_shapes(name, shape, norm):
    spec, fields = SMALL[name]
    model = built(spec, shape, classes=7, norm=norm, **fields)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    kinds = [type(m) for m in model.modules()]
    assert (BatchNorm2d in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group")


def test_lenet_is_the_published_stack():
    """Twin: DLG's network written out, with the same weights."""
    model = built(LeNetSpec)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 12, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, 2, 2), nn.Sigmoid()),
        *(nn.Conv2d(12, 12, 5, 1, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 10)),
    )
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    images = torch.rand(3, *SHAPE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(model(images), plain((images - mean) / std))


def test_standardised_weights_have_no_mean_and_the_variance_of_one_over_the_fan_in():
    weight = 3 + 0.2 * torch.randn(8, 5, 3, 3, dtype=torch.float64)
    var, mean = torch.var_mean(models.standardised(weight), (1, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(var * 45, torch.ones_like(var), rtol=1e-3, atol=0)
    alike = models.standardised(1e3 * weight + 7)  # what it takes away has no effect
    torch.testing.assert_close(alike, models.standardised(weight), rtol=1e-3, atol=0)


def test_every_convolution_of_a_wide_resnet_is_standardised():
    model, images = built(WideResNetSpec, depth=10, widen=1), torch.rand(2, *SHAPE)
    before = model(images)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(40).add_(1.0)
    torch.testing.assert_close(model(images), before, rtol=1e-2, atol=1e-2)
    plain = built(WideResNetSpec, depth=10, widen=1, standardise=False)
    assert not any(isinstance(m, models.StandardisedConv2d) for m in plain.modules())


def test_normalise_makes_zero_mean_and_unit_variance():
    images = torch.rand(50, *SHAPE) * torch.tensor([0.5, 0.2, 1.0]).view(3, 1, 1)
    var, mean = torch.var_mean(images, (0, 2, 3), correction=0)
    out = Normalise(mean.tolist(), var.sqrt().tolist())(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3))


def test_a_model_carries_the_declared_or_the_data_sets_normalisation():
    model = built(MLPSpec, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert model.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.normalise.std.flatten().tolist() == [1, 2, 3]
    assert built(MLPSpec).normalise.std.flatten().tolist() == pytest.approx(STD)
    assert not any("normalise" in key for key in model.state_dict())
    flat = MLPSpec().build((1, 8, 8), 2, (0.5,), (0.0,), stream(0, "m"))  # a constant data set
    assert flat(torch.rand(2, 1, 8, 8)).isfinite().all()


def test_the_mlps_first_layer_sees_the_normalised_image():
    model = built(MLPSpec, hidden=(16,))
    name, layer = first_layer(model)
    assert name == "layers.linear0"
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.rand(2, *SHAPE)
    model(images)
    assert torch.equal(seen[0], model.normalise(images).flatten(1))
    assert first_layer(built(MLPSpec, hidden=()))[0] == last_linear(built(MLPSpec, hidden=()))[0]


def test_first_and_last_layers_by_name():
    ends = {"lenet": ("body.0", "fc.0"), "convnet": ("model.conv0", "model.linear")}
    for name, (spec, fields) in SMALL.items():
        model = built(spec, **fields)
        (first, stem), (last, head) = first_layer(model), last_linear(model)
        assert model.get_submodule(first) is stem
        assert model.get_submodule(last) is head
        assert head.out_features == 10
        expected = ends.get(name, (first, last))
        assert (first, last) == expected
    for find in (first_layer, last_linear):
        with pytest.raises(Refused, match=r"^model: must have"):
            find(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 16, 24)])
def test_a_vit_fits_images_of_whole_patches(shape):
    model = built(ViTSpec, shape, classes=7, **SMALL_VIT)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert model.pos_embed.shape == (1, 1 + shape[1] * shape[2] // 16, 12)
    assert first_layer(model)[0] == "patch_embed"
    assert last_linear(model)[0] == "head"


def test_a_vits_attention_equals_pytorchs():
    model = built(ViTSpec, **SMALL_VIT).double()
    attention, tokens = model.blocks[0].attn, torch.randn(2, 5, 12, dtype=torch.float64)
    twin = nn.MultiheadAttention(12, 2, batch_first=True).double()
    named = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias",
             "out_proj.weight": "proj.weight", "out_proj.bias": "proj.bias"}  # fmt: skip
    twin.load_state_dict({k: attention.get_parameter(v) for k, v in named.items()})
    torch.testing.assert_close(attention(tokens), twin(tokens, tokens, tokens)[0])


def test_a_vits_blocks_are_pytorchs_encoder_with_norms_first():
    model = built(ViTSpec, **SMALL_VIT).double()
    block, tokens = model.blocks[0], torch.randn(2, 5, 12, dtype=torch.float64)
    twin = nn.TransformerEncoderLayer(12, 2, 48, 0.0, F.gelu, batch_first=True, norm_first=True)
    named = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.0.", "linear2.": "mlp.2.",
             "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
    own = {new + p: block.get_parameter(old + p)
           for new, old in named.items() for p in ("weight", "bias")}  # fmt: skip
    twin.double().load_state_dict(own)
    torch.testing.assert_close(block(tokens), twin(tokens))


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("name", SMALL)
def test_weights_come_from_the_stream_alone(name):
    spec, fields = SMALL[name]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(spec, **fields)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same(first.state_dict(), built(spec, **fields).state_dict())
    other = built(spec, seed=1, **fields)
    assert not torch.equal(first_layer(first)[1].weight, first_layer(other)[1].weight)


def test_the_declared_mode():
    for mode in ("train", "eval"):
        model = built(ResNetSpec, depth=8, mode=mode)
        assert {m.training for m in model.modules()} == {mode == "train"}


def test_lenets_initialisations():
    uniform = torch.cat([p.flatten() for p in built(LeNetSpec).parameters()])
    assert uniform.abs().max() <= 0.5
    assert uniform.std().item() == pytest.approx(12**-0.5, rel=0.02)
    default = torch.cat([p.flatten() for p in built(LeNetSpec, init="default").parameters()])
    assert default.abs().max() < 0.2


@pytest.mark.parametrize(
    ("spec", "fields", "key"),
    [
        (LeNetSpec, {"norm": "layer"}, "norm"),
        (LeNetSpec, {"mode": "test"}, "mode"),
        (LeNetSpec, {"init": "xavier"}, "init"),
        (ConvNetSpec, {"width": 0}, "width"),
        (MLPSpec, {"hidden": (16, 0)}, "hidden"),
        (ResNet18Spec, {"width": 0}, "width"),
        (ResNetSpec, {"depth": 21}, "depth"),
        (ResNetSpec, {"depth": 2}, "depth"),
        (ResNetSpec, {"width": 3}, "width"),
        (ViTSpec, {"norm": "batch"}, "norm"),
        (ViTSpec, {"encoder": "post"}, "encoder"),
        (ViTSpec, {"patch": 0}, "patch"),
        (ViTSpec, {"depth": 0}, "depth"),
        (ViTSpec, {"heads": 5}, "heads"),
        (LeNetSpec, {"std": (0.2, 0.0, 0.2)}, "std"),
        (LeNetSpec, {"mean": (float("nan"),) * 3}, "mean"),
    ],
)
def test_a_field_out_of_range_is_refused_by_its_name(spec, fields, key):
    with pytest.raises(Refused) as refusal:
        spec(**fields)
    assert refusal.value.key == key


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(Refused, match=r"^model: convnet .* 9 x 9 .*, got 8 x 28"):
        built(ConvNetSpec, (1, 8, 28))
    with pytest.raises(Refused, match=r"^model\.mean: .* each of 3 channels, got 1"):
        built(MLPSpec, mean=(0.5,))
    with pytest.raises(Refused, match=r"^model\.patch: must divide .* 28 x 30, got 4"):
        built(ViTSpec, (1, 28, 30))


# ---------------------------------------------------------------- BatchNorm


def test_tracking_batchnorm_equals_pytorchs_over_three_batches():
    mine, theirs = BatchNorm2d(5), nn.BatchNorm2d(5)
    nn.init.uniform_(mine.weight)
    nn.init.uniform_(mine.bias)
    theirs.load_state_dict(mine.state_dict())
    for n in (4, 2, 7):
        x = torch.randn(n, 5, 3, 3) * 2 + 1
        with tracking(mine):
            assert torch.equal(mine(x), theirs(x))
        assert same(mine.state_dict(), theirs.state_dict())
    assert mine.num_batches_tracked == 3
    x = torch.randn(4, 5, 3, 3)
    assert torch.equal(mine(x), theirs(x))  # not tracking: the same output ...
    assert mine.num_batches_tracked == 3
    assert theirs.num_batches_tracked == 4
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.eval()(x), theirs.eval()(x))


def test_tracking_ends_with_its_block_even_after_an_error():
    model = built(ResNetSpec, depth=8)
    before = buffers(model)
    with pytest.raises(RuntimeError), tracking(model):
        model(torch.rand(2, 1, 32, 32, 32))
    model(torch.rand(2, *SHAPE))
    assert same(buffers(model), before)
    with tracking(model):
        model(torch.rand(2, *SHAPE))
    assert not same(buffers(model), before)


def gradient(model, params, image, target):
    def loss(p):
        return F.cross_entropy(functional_call(model, p, (image,)), target)

    return grad(loss)(params)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", SMALL)
def test_lanes_under_vmap_equal_a_loop_and_leave_no_trace(name, norm, mode):
    """Gradients, and gradients of a gradient matching distance, in three lanes of two images."""
    spec, fields = SMALL[name]
    model = built(spec, norm=norm, mode=mode, **fields).double()
    if norm == "batch":
        with tracking(model.train()):
            model(torch.rand(8, *SHAPE, dtype=torch.float64))
        model.train(mode == "train")
    lanes_equal_a_loop(model)


@pytest.mark.parametrize("encoder", ["residual", "sequential"])
def test_lanes_of_a_vit_equal_a_loop(encoder):
    lanes_equal_a_loop(built(ViTSpec, encoder=encoder, **SMALL_VIT).double())


def lanes_equal_a_loop(model: nn.Module) -> None:
    params = {k: p.detach() for k, p in model.named_parameters()}
    before = buffers(model)
    images = torch.rand(3, 2, *SHAPE, dtype=torch.float64)
    labels = torch.tensor([[0, 1], [2, 3], [9, 9]])
    sent = gradient(model, params, torch.rand_like(images[0]), labels[0])

    def distance(guess, label):
        inner = gradient(model, params, guess, label)
        return sum((inner[k] - sent[k]).square().sum() for k in sent)

    lanes = vmap(lambda x, y: gradient(model, params, x, y))(images, labels)
    steps = vmap(grad(distance))(images, labels)
    for i in range(3):
        loss = F.cross_entropy(model(images[i]), labels[i])
        plain = torch.autograd.grad(loss, list(model.parameters()))
        for key, expected in zip(lanes, plain, strict=True):
            torch.testing.assert_close(lanes[key][i], expected)
        guess = images[i].clone().requires_grad_()
        loss = F.cross_entropy(model(guess), labels[i])
        inner = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        value = sum((g - s).square().sum() for g, s in zip(inner, sent.values(), strict=True))
        (expected,) = torch.autograd.grad(value, guess)
        assert expected.abs().max() > 0
        torch.testing.assert_close(steps[i], expected)
    assert same(buffers(model), before)


# ---------------------------------------------------------------- batch statistics


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_norm_stats_are_exact_at_the_true_images_and_leave_no_trace(mode):
    """A regulariser built on them is 0 there: biased variance against biased variance."""
    model = built(ResNet18Spec, width=4, mode=mode)
    before, images = buffers(model), torch.rand(4, *SHAPE)

    def regulariser(guess, told):
        seen = norm_stats(model, guess)
        return sum(
            (m - a).square().sum() + (v - b).square().sum()
            for (m, v), (a, b) in zip(seen, told, strict=True)
        )

    for _ in range(3):
        told = norm_stats(model, images)
    assert len(told) == sum(isinstance(m, BatchNorm2d) for m in model.modules()) == 20
    assert regulariser(images, told) == 0
    assert regulariser(torch.rand(4, *SHAPE), told) > 0
    other = torch.rand(4, *SHAPE, requires_grad=True)
    (pull,) = torch.autograd.grad(regulariser(other, told), other)
    assert pull.abs().max() > 0
    assert same(buffers(model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_norm_stats_are_in_module_order_and_equal_what_pytorch_tracks():
    model = built(ResNet18Spec, width=4)
    images = torch.rand(4, *SHAPE)
    told = norm_stats(model, images)
    sizes, layers = [], [m for m in model.modules() if isinstance(m, BatchNorm2d)]
    hooks = [
        m.register_forward_pre_hook(lambda _, a: sizes.append(a[0].numel() // a[0].shape[1]))
        for m in layers
    ]
    with tracking(model):
        model(images)
    assert len(hooks) == len(told)
    for layer, (mean, var), n in zip(layers, told, sizes, strict=True):
        torch.testing.assert_close(layer.running_mean, 0.1 * mean)
        unbiased = var * n / (n - 1)
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * unbiased)


def test_recording_works_in_lanes_and_removes_its_hooks_after_an_error():
    model = built(ResNetSpec, depth=8, width=4)
    params = dict(model.named_parameters())
    images = torch.rand(3, 2, *SHAPE)

    def stats(x):
        with recording(model) as seen:
            functional_call(model, params, (x,))
        return tuple(seen)

    lanes = vmap(stats)(images)
    for i in range(3):
        for (mean, var), (m, v) in zip(lanes, norm_stats(model, images[i]), strict=True):
            torch.testing.assert_close(mean[i], m)
            torch.testing.assert_close(var[i], v)
    with pytest.raises(RuntimeError):
        norm_stats(model, torch.rand(2, 5, 32, 32))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_copy_of_a_model_is_independent():
    model = built(ResNetSpec, depth=8)
    twin = copy.deepcopy(model)
    with tracking(twin):
        twin(torch.rand(2, *SHAPE))
    assert not any(m.track for m in model.modules() if isinstance(m, BatchNorm2d))
    assert not same(buffers(model), buffers(twin))


# ---------------------------------------------------------------- weights from files


def resnet8(weights=None, **fields) -> nn.Module:
    path = None if weights is None else str(weights)
    return built(ResNetSpec, seed=7, depth=8, width=4, weights=path, **fields)


@pytest.fixture
def source() -> dict:
    return built(ResNetSpec, seed=3, depth=8, width=4).state_dict()


def test_weights_round_trip_in_every_layout(tmp_path, source):
    assert not same(resnet8().state_dict(), source)
    save_file(source, tmp_path / "a.safetensors")
    torch.save(source, tmp_path / "b.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}}, tmp_path / "c.th")
    old = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": old, "best_prec1": 9.0}, tmp_path / "d.tar")
    for file in ("a.safetensors", "b.pt", "c.th", "d.tar"):
        assert same(resnet8(tmp_path / file).state_dict(), source), file


def test_weights_that_do_not_fit_are_one_line(tmp_path, source):
    def refused(says, content, **fields):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(Refused, match=says) as refusal:
            resnet8(tmp_path / "w.pt", **fields)
        assert refusal.value.key == "model.weights"
        assert "\n" not in str(refusal.value)

    refused(r"must hold linear.bias, got none", {k: source[k] for k in list(source)[:-1]})
    refused(r"nothing that .* no place for, got extra", source | {"extra": torch.zeros(1)})
    refused(r"nothing that .* no place for, got bn1.running_mean", source, norm="group")
    wide = source | {"linear.weight": torch.zeros(100, 16)}
    refused(r"linear.weight .* of shape \(10, 16\), got \(100, 16\)", wide)
    refused(
        "conv1.weight .* finite", source | {"conv1.weight": torch.full((4, 3, 3, 3), torch.nan)}
    )
    whole = source | {"linear.bias": torch.zeros(10, dtype=torch.int64)}
    refused("linear.bias .* torch.float32, got torch.int64", whole)
    for content in ({}, [1, 2], torch.zeros(3), {"state_dict": {"a": 1}}):
        refused("state dict", content)


def test_broken_weight_files_are_one_line_and_run_no_code(tmp_path, source):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(source, tmp_path / "whole.pt")
    save_file(source, tmp_path / "whole.safetensors")
    half = {s: (tmp_path / f"whole.{s}").read_bytes()[:2000] for s in ("pt", "safetensors")}
    broken = {"cut.pt": half["pt"], "cut.safetensors": half["safetensors"], "empty.pt": b""}
    broken |= {"text.pt": b"hello", "text.safetensors": b"hello", "trap.pt": pickle.dumps(Trap())}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": Trap()}, tmp_path / "inner.pt")
    for name in (*broken, "inner.pt", "absent.pt", "."):
        with pytest.raises(Refused, match=r"^model\.weights: ") as refusal:
            resnet8(tmp_path / name)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


def published(depth: int) -> nn.Module:
    (file,) = Path(str(MODELS)).glob(f"akamaster_resnet{depth}-*.th")
    means = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return built(ResNetSpec, depth=depth, mode="eval", weights=str(file), **means)


@trained
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load(depth):
    model = published(depth)
    assert not same(model.state_dict(), built(ResNetSpec, depth=depth).state_dict())
    assert model(torch.rand(2, *SHAPE)).isfinite().all()


@trained
@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="FEDSEC_DATA names no folder with cifar10.npz")
def test_resnet20_reaches_its_published_accuracy():
    model, test = published(20), Npz(path=f"{DATA}/cifar10.npz").load().test
    right = 0
    with torch.no_grad():
        for indices in torch.arange(len(test)).split(500):
            batch = test.batch(indices, 10)
            right += int((model(batch.images).argmax(1) == batch.labels).sum())
    assert right == 9173


def test_the_zoo_has_no_in_place_layers():
    for spec, fields in SMALL.values():
        for module in built(spec, **fields).modules():
            assert not (isinstance(module, nn.ReLU) and module.inplace)
    assert "relu_(" not in Path(models.__file__).read_text()

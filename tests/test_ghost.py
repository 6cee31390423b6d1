"""The sum without per-example gradients equals the one with them, on every network."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import defenses.dpsgd as dpsgd
from defenses.dpsgd import clip_factors
from fedsec import ghost
from fedsec.checks import Refused
from fedsec.config import OPTIONS, presets
from fedsec.rng import stream
from fedsec.types import Batch

SHAPE, CLASSES, COUNT = (3, 32, 32), 10, 5
NARROW = {"width": 8, "hidden": (32, 16), "heads": 2, "widen": 1}
ZOO = presets("model", [OPTIONS])


def batch_of(count: int = COUNT, shape=SHAPE) -> Batch:
    rng = stream(0, "images")
    images = torch.rand(count, *shape, generator=rng, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    return Batch(images, F.one_hot(labels, CLASSES).double())


def built(name: str, norm: str, **fields) -> nn.Module:
    """A network of the zoo, with none of its parameters at a special value."""
    spec = ZOO[name]
    narrow = {k: v for k, v in NARROW.items() if hasattr(spec, k)}
    model = type(spec)(**vars(spec) | {"norm": norm} | narrow | fields).build(
        SHAPE, CLASSES, (0.5,) * 3, (0.25,) * 3, stream(0, "model")
    )
    rng = stream(0, "shaken")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng)
    return model.double()


def ghostly(model: nn.Module, batch: Batch, clip: float):
    return ghost.scaled_sum(
        model, batch.images[:, None], batch.targets, partial(clip_factors, clip=clip)
    )


def sum_by_example(model: nn.Module, batch: Batch, clip: float):
    return dpsgd.sum_by_example(model, batch.images[:, None], batch.targets, clip)


def median_norm(model: nn.Module, batch: Batch) -> float:
    seen = []
    ghost.scaled_sum(model, batch.images[:, None], batch.targets, lambda n: seen.append(n) or n)
    return float(torch.cat(seen).median()) if seen else 1.0


def same(got, expected) -> bool:
    assert list(got) == list(expected)
    return all(
        (got[k] - e).abs().max() <= 1e-10 * e.abs().max().clamp(min=1e-300)
        for k, e in expected.items()
    )


CASES = [
    (name, norm, {})
    for name, spec in ZOO.items()
    for norm in spec.norms
    if norm != "batch" and (norm != "none" or name not in ("resnet32", "resnet44", "resnet56"))
] + [("vit", "layer", {"encoder": "sequential"})]


@pytest.mark.parametrize(("name", "norm", "fields"), CASES)
def test_every_network_gives_the_sum_of_per_example_gradients(name, norm, fields):
    model, batch = built(name, norm, **fields), batch_of()
    clip = median_norm(model, batch)  # some are cut and some are not
    got = ghostly(model, batch, clip)
    assert got is not None, "each weight is a layer's"
    assert same(got, sum_by_example(model, batch, clip))


def test_the_zoo_was_found():
    assert len(CASES) >= 14
    assert {"lenet", "resnet18", "vit"} <= {name for name, *_ in CASES}


class Odd(nn.Module):
    """Every way of convolution, and layers that see several positions or rows of an example."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, padding=1, padding_mode="circular")
        self.deep = nn.Conv2d(8, 96, 3, stride=4, bias=False)  # few positions: Gram matrices
        self.norm = nn.LayerNorm([96, 3])
        self.rows = nn.Linear(3, 4)
        self.group = nn.GroupNorm(2, 4, eps=0.1)
        self.head = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(CLASSES, CLASSES).requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        x = self.deep(self.grouped(torch.tanh(self.wide(images)))).flatten(3).mean(2)
        x = self.rows(self.norm(x[..., :3])).movedim(-1, 1)
        return self.frozen(self.scale * self.head(self.group(x).mean(2)))


def test_layers_of_every_setting_and_parameters_of_no_layer():
    model, batch = Odd().double(), batch_of()
    clip = median_norm(model, batch)
    got = ghostly(model, batch, clip)
    assert got is not None
    assert same(got, sum_by_example(model, batch, clip))
    assert not got["unused.weight"].any()


@pytest.mark.parametrize(
    ("positions", "gram"),
    [(8, True), (1, True), (400, False)],
)
def test_both_ways_to_a_norm_are_taken(monkeypatch, positions, gram):
    """A linear layer and the same as a convolution, forced to either way."""
    monkeypatch.setattr(ghost, "_ghost", lambda *_: gram)
    assert ghost._ghost(positions, 6, 3) == gram
    torch.manual_seed(0)
    x = torch.rand(COUNT, 3, positions, 1, dtype=torch.float64)
    tokens = nn.Sequential(nn.Flatten(2), Turned(), nn.Linear(3, 6), Meaned(1), nn.Linear(6, 10))
    pixels = nn.Sequential(nn.Conv2d(3, 6, 1), Meaned((2, 3)), nn.Linear(6, CLASSES))
    for model in (tokens.double(), pixels.double()):
        batch = Batch(x, batch_of().targets)
        clip = median_norm(model, batch)
        assert same(ghostly(model, batch, clip), sum_by_example(model, batch, clip))


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


class Meaned(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.tanh(x).mean(self.dims)


def test_the_cheaper_way_is_chosen():
    assert not ghost._ghost(1024, 64, 576)  # the first stage of resnet18
    assert ghost._ghost(16, 512, 4608)  # its last
    assert ghost._ghost(1, 10, 512)


# ---------------------------------------------------------------- what has no rule


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = nn.Linear(48, CLASSES)

    def forward(self, images):
        return self.b(torch.tanh(self.a(images.flatten(1))))


class CalledTwice(Flat):
    def forward(self, images):
        return self.b(self.a(torch.tanh(self.a(images.flatten(1)))))


class UsedOutside(Flat):
    def forward(self, images):
        return super().forward(images) + (self.a.weight**2).sum()


class Tied(Flat):
    def __init__(self):
        super().__init__()
        self.c = nn.Linear(48, 48)
        self.c.weight = self.a.weight

    def forward(self, images):
        return self.b(self.c(torch.tanh(self.a(images.flatten(1)))))


class BiasShared(Flat):
    def forward(self, images):
        return super().forward(images) + self.a.bias[:CLASSES]


class WritesOutputs(Flat):
    def forward(self, images):
        return self.b(self.a(images.flatten(1)).relu_())


class WritesInputs(Flat):
    def forward(self, images):
        x = images.flatten(1) * 1.0
        y = self.a(x.detach())
        x += 1
        return self.b(y + x)


class ConstantInput(Flat):
    def forward(self, images):
        return self.b(images.flatten(1)) + self.b(torch.ones(1, 48, dtype=images.dtype))


class OnlyConstant(Flat):
    def forward(self, images):
        return self.b(images.flatten(1) * self.a(torch.ones(1, 48, dtype=images.dtype)))


class NamedPadding(Flat):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding="same")

    def forward(self, images):
        return super().forward(self.conv(images))


class Attentive(Flat):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, images):
        tokens = images.flatten(2)[..., :4]
        x = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return super().forward(F.pad(x.flatten(1), (0, 36)))


ODD = [CalledTwice, UsedOutside, Tied, BiasShared, WritesOutputs, ConstantInput, OnlyConstant,
       NamedPadding, Attentive]  # fmt: skip


@pytest.mark.parametrize("cls", ODD)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_has_no_rule_is_noticed_and_computed_by_example(cls, monkeypatch):
    torch.manual_seed(0)
    model, batch = cls().double(), batch_of(shape=(3, 4, 4))
    assert ghostly(model, batch, 0.5) is None
    monkeypatch.setattr(dpsgd, "SMALL", 0)
    got = dpsgd.clipped_sum(model, batch, 0.5)
    expected = sum_by_example(model, batch, 0.5)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_an_input_that_is_written_to_is_noticed():
    """Per-example gradients do not exist there either: autograd says why."""
    model, batch = WritesInputs().double(), batch_of(shape=(3, 4, 4))
    assert ghostly(model, batch, 0.5) is None
    with pytest.raises(RuntimeError, match="inplace"):
        sum_by_example(model, batch, 0.5)


def frozen(layer: nn.Linear) -> None:
    layer.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, frozen])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_biases_of_weights_that_are_no_parameters_are_right(change):
    torch.manual_seed(0)
    model, batch = Flat().double(), batch_of(shape=(3, 4, 4))
    change(model.a)
    got = ghostly(model, batch, 0.5)
    assert got is not None
    assert same(got, sum_by_example(model, batch, 0.5))


def test_a_network_cannot_mix_examples():
    """A mean over the batch is over one example: it changes nothing."""

    class Mixing(Flat):
        def forward(self, images):
            return super().forward(images - images.mean(0, keepdim=True) + images)

    torch.manual_seed(0)
    model, batch = Mixing().double(), batch_of(shape=(3, 4, 4))
    plain = Flat().double()
    plain.load_state_dict(model.state_dict())
    assert same(ghostly(model, batch, 0.5), sum_by_example(plain, batch, 0.5))


# ---------------------------------------------------------------- chunks and repeats


def test_chunks_change_nothing_but_rounding_and_a_repeat_nothing(monkeypatch):
    model, batch = built("resnet20", "group"), batch_of()
    clip = median_norm(model, batch)
    whole = ghostly(model, batch, clip)
    again = ghostly(model, batch, clip)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    monkeypatch.setitem(ghost.CHUNK_PIXELS, "cpu", 2 * 32 * 32)
    assert same(ghostly(model, batch, clip), whole)


def test_an_empty_batch_gives_zeros():
    model = built("lenet", "none")
    got = ghostly(model, batch_of(0), 1.0)
    assert list(got) == [k for k, _ in model.named_parameters()]
    assert not any(g.any() for g in got.values())


def test_the_model_is_left_as_it_was():
    model, batch = built("resnet20", "group"), batch_of()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():  # whatever the caller's mode
        assert ghostly(model, batch, 1.0) is not None
    for k, p in model.named_parameters():
        assert type(p) is nn.Parameter
        assert p.requires_grad
        assert p.grad is None
        assert torch.equal(p, before[k])


def test_a_large_network_takes_the_way_without_per_example_gradients(monkeypatch):
    def refuse(*_):
        raise Refused("by example", "not here")

    monkeypatch.setattr(dpsgd, "sum_by_example", refuse)
    large = built("resnet20", "group", width=16)
    assert (
        dpsgd.clipped_sum(large, batch_of(1), 1.0).keys() == dict(large.named_parameters()).keys()
    )
    with pytest.raises(Refused):
        dpsgd.clipped_sum(built("lenet", "none"), batch_of(1), 1.0)


# ---------------------------------------------------------------- broken versions are found


def bias_forgotten(monkeypatch):
    real = ghost._Use.parts

    def parts(use, g):
        found = real(use, g)
        if 1 in use.own:
            part = found[use.own[1].key]
            found[use.own[1].key] = ghost._Part(0 * part.squares, part.total)
        return found

    monkeypatch.setattr(ghost._Use, "parts", parts)


def norm_of_each_layer(monkeypatch):
    real = ghost._parts

    def parts(*given):
        def clipped(part):
            own = clip_factors(part.squares.sqrt(), CLIP)
            return ghost._Part(0 * part.squares, lambda scale: part.total(own))

        return {k: clipped(p) for k, p in real(*given).items()}

    monkeypatch.setattr(ghost, "_parts", parts)


def positions_taken_for_examples(monkeypatch):
    monkeypatch.setattr(ghost, "_ghost", lambda *_: True)
    monkeypatch.setattr(
        ghost, "_gram", lambda x, g: (x.square().sum(2) * g.square().sum(2)).sum(1)
    )  # Goodfellow's formula, which holds for one position


def copies_not_counted(monkeypatch):
    real = ghost._parts

    def parts(model, weights, owned, *given):
        found = real(model, weights, owned, *given)
        return {
            k: p if k in owned else ghost._Part(0 * p.squares, p.total) for k, p in found.items()
        }

    monkeypatch.setattr(ghost, "_parts", parts)


def sum_left_unscaled(monkeypatch):
    real = ghost._kept
    monkeypatch.setattr(
        ghost, "_kept", lambda each: ghost._Part(real(each).squares, lambda scale: each.sum(0))
    )


CLIP = 0.5


@pytest.mark.parametrize(
    "breaks",
    [bias_forgotten, norm_of_each_layer, positions_taken_for_examples, copies_not_counted,
     sum_left_unscaled],
)  # fmt: skip
def test_a_broken_version_is_found(breaks, monkeypatch):
    model, batch = built("vit", "layer", depth=1), batch_of()
    expected = sum_by_example(model, batch, CLIP)
    assert same(ghostly(model, batch, CLIP), expected)
    breaks(monkeypatch)
    assert not same(ghostly(model, batch, CLIP), expected)


def test_a_forgotten_chain_rule_is_found(monkeypatch):
    model, batch = built("wrn16_4", "group", depth=10), batch_of()
    expected = sum_by_example(model, batch, CLIP)
    assert same(ghostly(model, batch, CLIP), expected)
    monkeypatch.setattr(ghost, "_pulled", lambda rule, x, g, parameter: rule(x, g))
    assert not same(ghostly(model, batch, CLIP), expected)

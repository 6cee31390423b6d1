"""Every defense does what its paper says, and each check fails for a broken version of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import defenses.dpsgd as dpsgd
from defenses.clip import Clip
from defenses.dpsgd import DPSGD
from defenses.instahide import InstaHide
from defenses.mixup import Mixup, mixing
from defenses.noise import Noise
from defenses.none import Undefended
from defenses.prune import Prune
from defenses.quantize import Quantize
from defenses.sign import Sign
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_gradient
from fedsec.config import presets
from fedsec.defense import Compose, Training, matched, weakest
from fedsec.rng import stream
from fedsec.types import Batch, Local, Update

PRESETS = presets("defense", [Path(__file__).parents[1] / "configs"])
LOCAL = Local("gradient", 0.1, 1, 0)


class Scaled(nn.Module):
    """A small network with a learnable scalar, a frozen weight and a GroupNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.Sigmoid()
        self.linear = nn.Linear(4 * 4 * 4, 3)
        self.scale = nn.Parameter(torch.tensor(3.0))  # 0-dimensional
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images):
        hidden = self.act(self.norm(self.conv(images)))
        return self.scale * self.linear(hidden.flatten(1)) * self.frozen


@pytest.fixture
def model():
    return Scaled().double()


def batch_of(n: int, classes: int = 3, shape=(2, 6, 6), seed: int = 0) -> Batch:
    rng = stream(seed, "images")
    images = torch.rand(n, *shape, generator=rng, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=rng)
    return Batch(images, one_hot(labels, classes).double(), tuple(range(n)))


def update_of(seed: int = 0) -> Update:
    rng = stream(seed, "update")
    shapes = {"w": (5, 4, 3), "b": (7,), "scalar": ()}
    tensors = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    return Update(tensors, {"mean": torch.randn(3, generator=rng)}, 4)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def one_by_one(model, batch, clip, expected):
    """DP-SGD without its noise, as the paper writes it: example by example."""
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    total = {k: torch.zeros_like(p) for k, p in weights.items()}
    for image, target in zip(batch.images, batch.targets, strict=True):
        loss = cross_entropy(model(image[None]), target[None])
        grads = torch.autograd.grad(loss, list(weights.values()))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        for name, grad in zip(weights, grads, strict=True):
            total[name] = total[name] + grad * min(1.0, clip / norm)
    return {k: t / expected for k, t in total.items()}


# Two checks of DP-SGD's guarantee: what one example can change, and the noise that hides it.


def bounded(defense: DPSGD, model: nn.Module, batch: Batch) -> bool:
    """Without noise, removing any one example moves the gradient by at most clip / expected."""
    quiet, expected = replace(defense, noise_multiplier=0.0), 50

    def step(part: Batch) -> torch.Tensor:
        return flat(quiet.gradients(model, part, stream(0, "n"), expected))

    whole = step(batch)
    for i in range(len(batch)):
        rest = torch.arange(len(batch)) != i
        moved = (whole - step(Batch(batch.images[rest], batch.targets[rest]))).norm()
        if moved > defense.clip / expected * (1 + 1e-9):
            return False
    return True


def hidden(defense: DPSGD, model: nn.Module, batch: Batch) -> bool:
    """Noise of the declared deviation on every coordinate, independent over coordinates and steps.

    Each bound is five or more standard errors wide.
    """
    expected, steps = 5, 300
    quiet = flat(
        replace(defense, noise_multiplier=0.0).gradients(model, batch, stream(0), expected)
    )
    draws = torch.stack(
        [flat(defense.gradients(model, batch, stream(0, s), expected)) for s in range(steps)]
    )
    noise = (draws - quiet) / (defense.noise_multiplier * defense.clip / expected)
    own_deviation = (noise.std(0) - 1).abs().max() < 6 / math.sqrt(2 * steps)
    deviation = abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.numel())
    correlation = noise.T @ noise / steps - torch.eye(noise.shape[1], dtype=noise.dtype)
    across = correlation.fill_diagonal_(0).abs().max() < 6 / math.sqrt(steps)
    between = (noise[1:] * noise[:-1]).mean().abs() < 5 / math.sqrt(noise.numel())
    return bool(own_deviation and deviation and across and between)


class ClipsTheMean(DPSGD):
    def gradients(self, model, batch, rng, expected):
        mean = mean_gradient(model, batch)
        factor = min(1.0, self.clip / float(flat(mean).norm())) * len(batch)
        return {k: (g * factor + self._noise(g, rng)) / expected for k, g in mean.items()}

    def _noise(self, like, rng):
        return self.noise_multiplier * self.clip * dpsgd.normal_like(like, rng)


class ClipsEachTensor(DPSGD):
    def gradients(self, model, batch, rng, expected):
        total = {k: torch.zeros_like(g) for k, g in mean_gradient(model, batch).items()}
        for image, target in zip(batch.images, batch.targets, strict=True):
            for k, g in mean_gradient(model, Batch(image[None], target[None])).items():
                total[k] += g * min(1.0, self.clip / float(g.norm()))
        return {k: t / expected for k, t in total.items()}


class DividesByTheDrawnBatch(DPSGD):
    def gradients(self, model, batch, rng, expected):
        return super().gradients(model, batch, rng, len(batch))


class ScalarEscapes(DPSGD):
    def gradients(self, model, batch, rng, expected):
        sent = super().gradients(model, batch, rng, expected)
        plain = one_by_one(model, batch, math.inf, expected)
        return {k: plain[k] if g.dim() == 0 else g for k, g in sent.items()}


class ForgetsNoise(DPSGD):
    def gradients(self, model, batch, rng, expected):
        quiet = DPSGD(clip=self.clip, noise_multiplier=0.0, delta=self.delta)
        return quiet.gradients(model, batch, rng, expected)


class DividesNoiseTwice(DPSGD):
    def gradients(self, model, batch, rng, expected):
        weak = DPSGD(
            clip=self.clip, noise_multiplier=self.noise_multiplier / expected, delta=self.delta
        )
        return weak.gradients(model, batch, rng, expected)


class NoiseForEachExample(DPSGD):
    def gradients(self, model, batch, rng, expected):
        parts = [
            super(NoiseForEachExample, self).gradients(
                model, Batch(batch.images[i : i + 1], batch.targets[i : i + 1]), rng, expected
            )
            for i in range(len(batch))
        ]
        return {k: sum(p[k] for p in parts) for k in parts[0]}


class OneDrawForAllTensors(DPSGD):
    def gradients(self, model, batch, rng, expected):
        sent = one_by_one(model, batch, self.clip, expected)
        state, deviation = rng.get_state(), self.noise_std(expected)
        for k, g in sent.items():
            rng.set_state(state)
            sent[k] = g + deviation * dpsgd.normal_like(g, rng)
        return sent


class SameNoiseEachStep(DPSGD):
    def gradients(self, model, batch, rng, expected):
        return super().gradients(model, batch, torch.Generator().manual_seed(1), expected)


DP = {"clip": 0.05, "noise_multiplier": 1.3, "delta": 1e-5}


def test_dpsgd_keeps_its_guarantee(model):
    assert bounded(DPSGD(**DP), model, batch_of(6))
    assert hidden(DPSGD(**DP), model, batch_of(2))
    assert hidden(DPSGD(**DP), model, batch_of(0))  # an empty draw is hidden as well


@pytest.mark.parametrize(
    "broken", [ClipsTheMean, ClipsEachTensor, DividesByTheDrawnBatch, ScalarEscapes]
)
def test_what_leaves_an_example_unbounded_is_found(model, broken):
    assert not bounded(broken(**DP), model, batch_of(6))


@pytest.mark.parametrize(
    "broken",
    [
        ForgetsNoise,
        DividesNoiseTwice,
        NoiseForEachExample,
        OneDrawForAllTensors,
        SameNoiseEachStep,
        ScalarEscapes,
    ],
)
def test_what_leaves_an_example_unhidden_is_found(model, broken):
    assert not hidden(broken(**DP), model, batch_of(2))


@pytest.mark.parametrize("clip", [1e-3, 0.9, 1e3])  # all, some and none of the examples are cut
def test_dpsgd_without_noise_is_the_plain_loop(model, clip, monkeypatch):
    batch = batch_of(9)
    defense = DPSGD(clip=clip, noise_multiplier=0.0, delta=1e-5)
    expected = one_by_one(model, batch, clip, 4)
    for memory in (2**28, 1):  # one chunk; nine chunks
        monkeypatch.setitem(dpsgd.CHUNK_BYTES, "cpu", memory)
        got = defense.gradients(model, batch, stream(0), 4)
        assert list(got) == [k for k, p in model.named_parameters() if p.requires_grad]
        assert (flat(got) - flat(expected)).abs().max() < 1e-14 * max(1.0, clip)


@pytest.mark.parametrize("small", [0, 2**16])  # without and with per-example gradients
def test_an_examples_gradient_is_that_of_its_views_mean_loss(model, small, monkeypatch):
    monkeypatch.setattr(dpsgd, "SMALL", small)
    batch, times = batch_of(6), 5
    views = dpsgd.augmented(batch.images, times, stream(stream(3).initial_seed(), "augmentations"))
    each = list(zip(views, batch.targets, strict=True))
    means = [flat(mean_gradient(model, Batch(v, t.expand(times, -1)))) for v, t in each]
    clip = float(torch.stack(means).norm(dim=1).median())  # some are cut and some are not
    defense = DPSGD(clip=clip, noise_multiplier=0.0, delta=1e-5, augmentations=times)
    got = flat(defense.gradients(model, batch, stream(3), 4))
    assert (got - clipped(means, clip) / 4).abs().max() < 1e-13
    early = [flat(mean_gradient(model, Batch(x[None], t[None]))) for v, t in each for x in v]
    assert (got - clipped(early, clip) / times / 4).abs().max() > 1e-4  # before the mean


def clipped(gradients, clip):
    return sum(g * min(1.0, clip / float(g.norm())) for g in gradients)


def test_views_are_flipped_crops_of_the_mirrored_image():
    images = torch.rand(3, 2, 8, 9)
    views = dpsgd.augmented(images, 40, stream(0))
    assert views.shape == (3, 40, 2, 8, 9)
    padded = torch.nn.functional.pad(images, (4,) * 4, mode="reflect")
    crops = [padded[:, :, i : i + 8, j : j + 9] for i in range(9) for j in range(9)]
    crops = torch.stack(crops + [c.flip(3) for c in crops], 1)
    which = [[int((crops[i] == v).all((1, 2, 3)).nonzero()[0]) for v in views[i]] for i in range(3)]
    assert len({w for row in which for w in row}) > 60
    assert 30 < sum(w >= 81 for row in which for w in row) < 90
    assert dpsgd.augmented(images[:0], 4, stream(0)).shape == (0, 4, 2, 8, 9)


def test_augmentations_shift_no_noise(model):
    loud, none = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-5), batch_of(0)
    sent = [replace(loud, augmentations=k).gradients(model, none, stream(1), 4) for k in (0, 3)]
    assert torch.equal(flat(sent[0]), flat(sent[1]))


def test_dpsgd_that_never_cuts_is_the_mean_gradient(model):
    batch = batch_of(5)
    loose = DPSGD(clip=1e6, noise_multiplier=0.0, delta=1e-5)
    got = loose.gradients(model, batch, stream(0), len(batch))
    assert (flat(got) - flat(mean_gradient(model, batch))).abs().max() < 1e-14


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_dpsgd_is_opacus(monkeypatch):
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3)]
    net = nn.Sequential(*layers).double()
    batch, clip = batch_of(8), 3.6
    norms = [flat(mean_gradient(net, Batch(x[None], t[None]))).norm() for x, t in pairs(batch)]
    assert min(norms) < clip < max(norms), "some examples are cut and some are not"
    ours = DPSGD(clip=clip, noise_multiplier=0.0, delta=1e-5).gradients(net, batch, stream(0), 5)

    wrapped = GradSampleModule(copy.deepcopy(net))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=5,
    )
    cross_entropy(wrapped(batch.images), batch.targets).backward()
    optimizer.pre_step()
    theirs = torch.cat([p.grad.flatten() for p in wrapped.parameters()])
    assert (flat(ours) - theirs).abs().max() < 1e-6 * theirs.abs().max()

    def opacus_factors(norms, clip):
        return (clip / (norms + 1e-6)).clamp(max=1.0)  # the only difference

    monkeypatch.setattr(dpsgd, "clip_factors", opacus_factors)
    same = DPSGD(clip=clip, noise_multiplier=0.0, delta=1e-5).gradients(net, batch, stream(0), 5)
    assert (flat(same) - theirs).abs().max() < 1e-15


def pairs(batch: Batch):
    return zip(batch.images, batch.targets, strict=True)


def test_noise_does_not_depend_on_chunks(model, monkeypatch):
    batch, defense = batch_of(6), DPSGD(**DP)
    whole = defense.gradients(model, batch, stream(3), 6)
    monkeypatch.setitem(dpsgd.CHUNK_BYTES, "cpu", 1)
    assert (flat(defense.gradients(model, batch, stream(3), 6)) - flat(whole)).abs().max() < 1e-15


def test_layers_with_random_draws_draw_for_each_example():
    net = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 3, bias=False)).double()
    one = batch_of(1)
    twice = Batch(one.images.repeat(2, 1, 1, 1), one.targets.repeat(2, 1))
    dropped = DPSGD(clip=1e6, noise_multiplier=0.0, delta=1e-5)
    touched = dropped.gradients(net, twice, stream(0), 1)["2.weight"][0] != 0
    assert touched.double().mean() > 0.6  # two masks of one half each cover three quarters


@pytest.mark.parametrize("kind", ["gradient", "fedavg"])
def test_the_noise_is_in_what_is_sent(model, kind):
    """Mishap: with noise multiplier 100 the attacked gradient differed from the clean one by 0."""
    loud = DPSGD(clip=1.0, noise_multiplier=100.0, delta=1e-5)
    local = Local(kind, 0.1, 1, 4)

    def sent(defense):
        return local_update(model, [batch_of(4)], defense, local, client_streams(0, 0, 0), 4)[0]

    difference = flat(sent(loud).tensors) - flat(sent(replace(loud, noise_multiplier=0.0)).tensors)
    assert difference.std() == pytest.approx(25.0 * (0.1 if kind == "fedavg" else 1.0), rel=0.2)


def test_dpsgd_states_its_guarantee():
    defense = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-5)
    claim = defense.privacy(Training(steps=2000, examples=500, batch=10))
    assert (claim.accountant, claim.delta) == ("PRV", 1e-5)
    assert claim.epsilon == pytest.approx(5.626, abs=6e-4)
    assert dict(claim.others)["RDP"] == pytest.approx(6.150, abs=6e-4)
    assert claim.mechanism == (1.0, 0.02, 2000)
    full = defense.privacy(Training(steps=40, examples=8, batch=32))  # the batch is all there is
    assert full.epsilon == pytest.approx(46.22, abs=0.01)


@pytest.mark.parametrize(
    ("change", "examples", "reason"),
    [
        ({"noise_multiplier": 0.0}, 500, "no noise"),
        ({"delta": 0.002}, 500, "not below 1/500"),
        ({"delta": 0.01}, 500, "not below 1/500"),
    ],
)
def test_dpsgd_says_why_it_guarantees_nothing(change, examples, reason):
    defense = DPSGD(**{"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5} | change)
    claim = defense.privacy(Training(steps=10, examples=examples, batch=10))
    assert claim.epsilon is None
    assert reason in claim.reason


def test_a_delta_that_promises_nothing_is_refused():
    loose = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.002)
    few, many = (Training(10, examples, 10) for examples in (499, 500))
    loose.covers(few)
    with pytest.raises(Refused, match=r"^delta: must be below 1/500, .*; lower it, .*, got 0.002$"):
        loose.covers(many)
    with pytest.raises(Refused, match=r"^dpsgd.delta: "):
        Compose((Prune(ratio=0.5), loose)).covers(many)
    replace(loose, noise_multiplier=0.0).covers(many)  # an ablation claims nothing
    Undefended().covers(many)


def test_the_client_that_is_worst_off_is_the_guarantee():
    defense = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-5)
    many, few, none = (Training(10, examples, 10) for examples in (500, 100, 200_000))
    claim, whose = weakest(defense, [many, few, many])
    assert (claim, whose) == (defense.privacy(few), few)
    assert weakest(defense, [many, none, few])[0].epsilon is None
    assert weakest(Undefended(), [many]) == (None, None)


def test_dpsgd_falls_back_to_rdp_where_prv_has_no_number():
    weak = DPSGD(clip=1.0, noise_multiplier=0.15, delta=1e-5)
    claim = weak.privacy(Training(steps=200, examples=500, batch=50))
    assert claim.accountant == "RDP"
    assert 800 < claim.epsilon < 900


def test_dpsgd_refuses_batchnorm_and_running_statistics():
    defense = DPSGD(**DP)
    defense.check(Scaled())
    defense.check(nn.Sequential(nn.InstanceNorm2d(3)))
    for layer, key in (
        (nn.BatchNorm2d(3), "model.norm"),
        (nn.SyncBatchNorm(3), "model.norm"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "model"),
    ):
        with pytest.raises(Refused) as refusal:
            defense.check(nn.Sequential(nn.Sequential(layer)))
        assert refusal.value.key == key
        assert "use " in refusal.value.rule


# Pruning


def pruned_by_sorting(tensor, count):
    order = sorted(range(tensor.numel()), key=lambda i: (abs(float(tensor.flatten()[i])), i))
    flat_copy = tensor.flatten().clone()
    flat_copy[order[:count]] = 0
    return flat_copy.view_as(tensor)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),  # many ties
    percent=st.integers(0, 99),
)
def test_prune_is_the_stable_sort(values, percent):
    tensor = torch.tensor(values, dtype=torch.float32)
    sent = Prune(ratio=percent / 100).update(Update({"w": tensor}, {}, 1), stream(0))
    expected = pruned_by_sorting(tensor, percent * len(values) // 100)
    assert torch.equal(sent.tensors["w"], expected)


def test_prune_counts_are_exact_and_published():
    update = update_of()
    defense = Prune(ratio=0.9)
    sent = defense.update(update, stream(0))
    zeros = {k: int((t == 0).sum()) for k, t in sent.tensors.items()}
    assert zeros == {"w": 54, "b": 6, "scalar": 0}
    mask = defense.mask(sent)
    for k, t in update.tensors.items():
        assert torch.equal(sent.tensors[k], t * mask[k])
        if k != "scalar":
            assert t[mask[k]].abs().min() >= t[~mask[k]].abs().max()
    assert torch.equal(sent.buffers["mean"], update.buffers["mean"])
    # 0.29 * 100 is 28.999... in floating point
    hundred = Update({"w": torch.arange(1.0, 101.0)}, {}, 1)
    assert int((Prune(ratio=0.29).update(hundred, stream(0)).tensors["w"] == 0).sum()) == 29


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_prune_drops_its_share_of_a_tensor_or_of_all(ratio, scope):
    rng = stream(0, "update")
    tensors = {"small": 1e-3 * torch.randn(40, 50, generator=rng),
               "large": torch.randn(8000, generator=rng)}  # fmt: skip
    sent = Prune(ratio=ratio, scope=scope).update(Update(tensors, {}, 1), stream(0)).tensors
    assert [t.shape for t in sent.values()] == [t.shape for t in tensors.values()]
    if scope == "tensor":
        counts = {k: int((t == 0).sum()) for k, t in sent.items()}
        assert counts == {"small": round(2000 * ratio), "large": round(8000 * ratio)}
    else:
        assert torch.equal(flat(sent), pruned_by_sorting(flat(tensors), round(10_000 * ratio)))
        assert ratio < 0.9 or not sent["small"].any()  # small gradients go first


def test_prune_takes_tensors_that_quantile_refuses():
    """Mishap: torch.quantile takes at most 2^24 entries (before torch 2.15)."""
    big = torch.arange(2**24 + 8, dtype=torch.int32).remainder_(1000).float()
    sent = Prune(ratio=0.9).update(Update({"w": big}, {}, 1), stream(0)).tensors["w"]
    assert int((sent == 0).sum()) == 9 * big.numel() // 10
    assert big[sent != 0].min() >= big[sent == 0].max()


# Mixing


def consistent(encoded: Batch, private: Batch, k: int, upper: float) -> bool:
    """Images and targets of each encoding are the same proper mix of k private images.

    The weights are read off the images by least squares, so this knows nothing of how they came.
    """
    images, mixes = private.images.flatten(1), encoded.images.flatten(1)
    weights = torch.linalg.lstsq(images.T, mixes.T).solution.T
    support = weights > 1e-6
    return bool(
        torch.allclose(weights @ images, mixes, atol=1e-6)
        and torch.allclose(weights @ private.targets, encoded.targets, atol=1e-6)
        and torch.allclose(weights.sum(1), torch.ones(len(encoded), dtype=weights.dtype), atol=1e-6)
        and (support.sum(1) == k).all()  # no image is mixed with itself
        and support.diagonal().all()
        and weights.max() <= upper + 1e-6
    )


@dataclass(frozen=True, kw_only=True)
class StaleRows(Mixup):
    """The mishap: a partial batch is encoded with its own rows, its targets with other ones."""

    def batch(self, batch, rng):
        weights = mixing(32, self.k, self.upper, stream(0, "stale"))[: len(batch), : len(batch)]
        return replace(super().batch(batch, rng), targets=weights.double() @ batch.targets)


def encodings_of_fifty(defense):
    """Fifty images in batches of 32: the last batch is a partial one."""
    private, rng = batch_of(50, classes=7), stream(0, "mix")
    for part in (slice(0, 32), slice(32, 50)):
        whole = Batch(private.images[part], private.targets[part])
        yield defense.batch(whole, rng), whole


@pytest.mark.parametrize(("k", "upper"), [(2, 0.65), (4, 0.65), (4, 0.25), (6, 1.0), (16, 0.1)])
def test_mixup_mixes_images_and_targets_alike_in_every_batch(k, upper):
    for encoded, private in encodings_of_fifty(Mixup(k=k, upper=upper)):
        assert len(encoded) == len(private)
        assert consistent(encoded, private, k, upper)


def test_stale_rows_are_found():
    checks = [consistent(e, p, 4, 0.65) for e, p in encodings_of_fifty(StaleRows(k=4, upper=0.65))]
    assert not any(checks)


def test_every_partner_is_as_likely():
    weights = torch.stack([mixing(6, 3, 0.65, stream(0, s)) for s in range(600)])
    often = (weights > 0).double().mean(0)
    others = often[~torch.eye(6, dtype=torch.bool)]
    assert (often.diagonal() == 1).all()
    assert (others - 2 / 5).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 600)


def test_instahide_is_mixup_behind_signs():
    batch, hide = batch_of(8), InstaHide(k=4, upper=0.65)
    encoded = hide.batch(batch, stream(5))
    mix = Mixup(k=4, upper=0.65).batch(batch, stream(5))
    assert torch.equal(encoded.targets, mix.targets)
    assert (hide.magnitude(encoded.images) - (mix.images - 0.5).abs()).abs().max() < 1e-15
    assert encoded.images.min() >= 0
    assert encoded.images.max() <= 1
    signs = (torch.sign(encoded.images - 0.5) * torch.sign(mix.images - 0.5)).flatten(1)
    assert signs.abs().min() == 1
    assert abs(signs.mean()) < 5 / math.sqrt(signs.numel())
    between = (signs @ signs.T / signs.shape[1]).fill_diagonal_(0)  # fresh signs for each encoding
    assert between.abs().max() < 5 / math.sqrt(signs.shape[1])
    first, second = encoded.images[:, 0], mix.images[:, 0]
    per_channel = (encoded.images[:, 1] == mix.images[:, 1]) == (first == second)
    assert 0.3 < per_channel.double().mean() < 0.7  # channels have signs of their own


@pytest.mark.parametrize("kind", [Mixup, InstaHide])
def test_a_batch_of_fewer_than_k_images_is_refused(kind):
    defense = kind(k=4, upper=0.65)
    assert len(defense.batch(batch_of(4), stream(0))) == 4
    assert len(defense.batch(batch_of(0), stream(0))) == 0
    with pytest.raises(Refused, match=r"^victim_batch: .* at least 4 images .*, got 1$"):
        defense.batch(batch_of(1), stream(0))


# Noise


def rightly_noisy(defense: Noise) -> bool:
    """Every tensor, scalars included, has noise of the declared deviation and shape."""
    shapes = {"w": (300, 200), "b": (60_000,)}
    zeros = Update({k: torch.zeros(s) for k, s in shapes.items()}, {}, 1)
    sent = defense.update(zeros, stream(0)).tensors
    both = flat(sent) / defense.std
    fourth = {"gaussian": 3.0, "laplace": 6.0}[defense.distribution]
    together = (sent["w"].flatten() * sent["b"]).mean() / defense.std**2
    scalars = [
        float(defense.update(Update({"s": torch.zeros(())}, {}, 1), stream(s)).tensors["s"])
        for s in range(400)
    ]
    return bool(
        abs(both.mean()) < 0.015
        and abs(both.std() - 1) < 0.017
        and abs((both**4).mean() - fourth) < 0.15 * fourth
        and abs(together) < 0.021
        and abs(torch.tensor(scalars).std() / defense.std - 1) < 0.4
        and both.isfinite().all()
    )


class LaplaceScaleForDeviation(Noise):
    def _draw(self, tensor, rng):
        return super()._draw(tensor, rng) * math.sqrt(2)


class NoiseSkipsScalars(Noise):
    def _draw(self, tensor, rng):
        return super()._draw(tensor, rng) if tensor.dim() else torch.zeros(())


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_noise_has_the_declared_deviation_and_shape(distribution):
    assert rightly_noisy(Noise(std=0.03, distribution=distribution))
    for broken in (LaplaceScaleForDeviation, NoiseSkipsScalars):
        assert not rightly_noisy(broken(std=0.03, distribution=distribution))


# Signs


def signed_by_hand(tensors, scale):
    """Entry by entry; zeros stay zeros."""
    found = {}
    for name, tensor in tensors.items():
        entries = [float(g) for g in tensor.flatten()]
        size = sum(map(abs, entries)) / len(entries) if scale == "mean" else 1.0
        signs = [size * ((g > 0) - (g < 0)) for g in entries]
        found[name] = torch.tensor(signs).view(tensor.shape)
    return found


class ZeroIsUp(Sign):
    def expected(self, tensors, sent=None):
        return super().expected({k: t + 1e-30 for k, t in tensors.items()})


class OneScaleForAll(Sign):
    def _size(self, tensor):
        return update_of().tensors["w"].abs().mean()


@pytest.mark.parametrize("scale", ["mean", "one"])
def test_signs_are_taken_entry_by_entry_and_zero_stays_zero(scale):
    update = update_of()
    update.tensors["w"][0], update.tensors["none"] = 0, torch.zeros(3)
    expected = flat(signed_by_hand(update.tensors, scale))

    def right(defense) -> bool:
        sent = defense.update(update, stream(0))
        assert sent.buffers is update.buffers
        return torch.allclose(flat(sent.tensors), expected, atol=1e-6)

    assert right(Sign(scale=scale))
    assert not right(OneScaleForAll(scale=scale))
    assert right(ZeroIsUp(scale=scale)) is False


# Quantisation


def quantized_by_hand(tensor, bits):
    """Of all the values that can be sent, the nearest one."""
    most, levels = float(tensor.abs().max()), 2 ** (bits - 1) - 1
    values = torch.tensor([most * i / levels for i in range(-levels, levels + 1)]).to(tensor)
    return values[(tensor[..., None] - values).abs().argmin(-1)]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_nearest_is_the_nearest_of_all_values(bits):
    update = update_of()
    update.tensors["none"] = torch.zeros(3)
    for rounding in ("nearest", "stochastic"):
        defense = Quantize(bits=bits, rounding=rounding)
        sent = defense.update(update, stream(0)).tensors
        for name, tensor in update.tensors.items():
            values = sent[name]
            assert len(values.unique()) <= 2**bits - 1
            torch.testing.assert_close(values, quantized_by_hand(values, bits))  # all on the grid
            step = float(tensor.abs().max()) / defense.levels
            if rounding == "nearest":
                torch.testing.assert_close(values, quantized_by_hand(tensor, bits))
            else:
                assert (values - tensor).abs().max() <= step * (1 + 1e-6)
        assert float(sent["scalar"]) == pytest.approx(float(update.tensors["scalar"]))
        assert torch.equal(sent["none"], torch.zeros(3))


class AlwaysDown(Quantize):
    def update(self, update, rng):
        down = {
            k: self._levels(t)[0].floor() * self._levels(t)[1] for k, t in update.tensors.items()
        }
        return replace(update, tensors=down)


class FairCoin(Quantize):
    """Up or down with one half each, wherever between them the entry is."""

    def update(self, update, rng):
        coins = {k: torch.randint(2, t.shape, generator=rng) for k, t in update.tensors.items()}
        levels = {k: self._levels(t) for k, t in update.tensors.items()}
        up = {k: torch.where(c == 1, levels[k][0].ceil(), levels[k][0].floor()) for k, c in
              coins.items()}  # fmt: skip
        return replace(update, tensors={k: u * levels[k][1] for k, u in up.items()})


class OneCoin(Quantize):
    """One draw for all entries of a tensor."""

    def update(self, update, rng):
        drawn = {}
        for name, tensor in update.tensors.items():
            whole, step = self._levels(tensor)
            drawn[name] = (whole + torch.rand((), generator=rng)).floor() * step
        return replace(update, tensors=drawn)


def unbiased(defense: Quantize, draws: int = 4000) -> bool:
    """The mean over draws is the update, and entries are rounded independently; 5 sigma."""
    tensor = torch.linspace(-1, 1, 41, dtype=torch.float64)
    update, step = Update({"w": tensor}, {}, 1), 1 / defense.levels
    sent = torch.stack([defense.update(update, stream(0, i)).tensors["w"] for i in range(draws)])
    away = (sent - tensor) / step
    free = tensor.remainder(step).minimum(-tensor.remainder(-step)) > 1e-9  # not on the grid
    centred = (away.mean(0).abs() < 5 * 0.5 / math.sqrt(draws)).all()
    unit = away[:, free] / away[:, free].std(0).clamp_min(1e-9)
    together = (unit.T @ unit / draws).fill_diagonal_(0).abs().max() < 6 / math.sqrt(draws)
    return bool(centred and together)


@pytest.mark.parametrize("bits", [2, 4])
def test_stochastic_rounding_is_right_on_average(bits):
    assert unbiased(Quantize(bits=bits, rounding="stochastic"))
    for broken in (AlwaysDown, FairCoin, OneCoin):
        assert not unbiased(broken(bits=bits, rounding="stochastic"))
    assert not unbiased(Quantize(bits=bits, rounding="nearest"), draws=200)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_was_sent_is_expected_of_the_update_behind_it_and_of_no_other(rounding):
    update, other = update_of(), update_of(1)
    for bits in (2, 4):
        defense = Quantize(bits=bits, rounding=rounding)
        sent = defense.update(update, stream(0)).tensors
        torch.testing.assert_close(defense.expected(update.tensors, sent), sent)
        away = defense.expected(other.tensors, sent)
        assert (flat(away) - flat(sent)).norm() > 0.2 * flat(sent).norm()


# Clipping of the whole update


def cut(defense: Clip) -> bool:
    """No update is longer than `norm`; shorter ones, and directions, stay as they are."""
    for scale in (0.0, 1e-3, 1.0, 1e6):
        tensors = {k: scale * t.double() for k, t in update_of().tensors.items()}
        sent = defense.update(Update(tensors, {}, 1), stream(0)).tensors
        whole, left = flat(tensors), flat(sent)
        length = min(float(whole.norm()), defense.norm)
        if not torch.allclose(left, whole * (length / max(1e-300, float(whole.norm())))):
            return False
        if any(sent[k].shape != t.shape for k, t in tensors.items()):
            return False
    return True


class EachTensor(Clip):
    def expected(self, tensors, sent=None):
        alone = [super(EachTensor, self).expected({k: t}) for k, t in tensors.items()]
        return {k: t for one in alone for k, t in one.items()}


class ScalarStays(Clip):
    def expected(self, tensors, sent=None):
        cut = super().expected(tensors)
        return {k: t if t.dim() == 0 else cut[k] for k, t in tensors.items()}


class AlwaysScales(Clip):
    def expected(self, tensors, sent=None):
        return {k: t * self.norm / flat(tensors).norm() for k, t in tensors.items()}


def test_clip_bounds_the_whole_update():
    assert cut(Clip(norm=0.5))
    for broken in (EachTensor, ScalarStays, AlwaysScales):
        assert not cut(broken(norm=0.5))


# What an adversary may know of several


NOISE = Noise(std=0.1, distribution="gaussian")
SIGN, NEAREST = Sign(scale="mean"), Quantize(bits=3, rounding="nearest")
DRAWN, CLIP = Quantize(bits=3, rounding="stochastic"), Clip(norm=0.5)


@pytest.mark.parametrize("defense", [SIGN, NEAREST, DRAWN, CLIP, Prune(ratio=0.5)])
@pytest.mark.parametrize("other", [SIGN, NEAREST, DRAWN, CLIP, Prune(ratio=0.5)])
def test_what_two_make_of_an_update_is_what_one_makes_of_the_others(defense, other):
    both, update = Compose((defense, other)), update_of()
    first = defense.update(update, stream(0))
    if not (defense.random or other.random):
        expected = flat(other.expected(first.tensors))
        assert torch.equal(flat(both.expected(update.tensors)), expected)
        assert torch.equal(flat(both.update(update, stream(0)).tensors), expected)
    sent = both.update(update, stream(0)).tensors
    if not defense.random:  # what is drawn between two parts is not told apart
        torch.testing.assert_close(both.expected(update.tensors, sent), sent)


@pytest.mark.parametrize(
    ("parts", "known"),
    [
        ([SIGN], [SIGN]),
        ([DRAWN], [DRAWN]),
        ([Quantize(bits=4, rounding="stochastic")], []),  # a plain match finds more
        ([NOISE], []),
        ([SIGN, NOISE], [SIGN]),
        ([NOISE, SIGN], []),  # of a sign the noise leaves nearly a straight line
        ([NOISE, Prune(ratio=0.5)], [Prune(ratio=0.5)]),  # which entries were sent is seen
        ([SIGN, DPSGD(**DP)], []),  # a step's noise comes first
        ([SIGN, DPSGD(**DP | {"noise_multiplier": 0.0})], [SIGN]),
    ],
)
def test_a_match_goes_through_what_comes_before_noise(parts, known):
    found = matched(Compose(parts), LOCAL)
    of_updates = [
        p for p in (found.parts if found else ()) if isinstance(p, tuple(map(type, known)))
    ]
    assert of_updates == known
    assert (found is None) == (not known)


def test_of_a_sum_only_dropped_entries_are_known():
    several, prune = replace(LOCAL, parts=(1, 1)), Prune(ratio=0.5)
    assert matched(Compose([SIGN, CLIP]), several) is None
    assert matched(Compose([SIGN, prune]), several).parts == [prune]
    assert matched(Compose([prune, NOISE]), several) is None


def test_noise_that_is_rounded_or_scaled_is_of_unknown_size():
    for known in ([NOISE], [SIGN, NOISE], [NOISE, Prune(ratio=0.5)]):
        assert Compose(known).noise(LOCAL) == (0.1, 0.0)
    for unknown in ([NOISE, SIGN], [NOISE, CLIP], [DRAWN, NOISE], [SIGN, DPSGD(**DP)]):
        assert Compose(unknown).noise(LOCAL) == (0.0, 0.0)


# All of them


def run(defense, seed: int = 0):
    """Every hook, on inputs that must stay as they were: what came out."""
    model, batch, update = Scaled().double(), batch_of(6), update_of()
    before = copy.deepcopy((model.state_dict(), batch, update))
    encoded = defense.batch(batch, stream(seed, "batch"))
    grads = defense.gradients(model, encoded, stream(seed, "gradients"), 6)
    grads = defense.perturb(model, encoded, grads, 0, stream(seed, "perturb"))
    sent = defense.update(update, stream(seed, "update"))
    after = (model.state_dict(), batch, update)
    for old, new in zip(before, after, strict=True):
        assert_same(old, new)
    assert all(p.grad is None for p in model.parameters())
    assert not any(g.requires_grad for g in grads.values())
    return encoded.images, encoded.targets, flat(grads), flat(sent.tensors)


def assert_same(old, new):
    if isinstance(old, dict):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) for k in old)
    else:
        for name, value in vars(old).items():
            other = getattr(new, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other)
            elif isinstance(value, dict):
                assert_same(value, other)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_hooks_change_nothing_they_were_given_and_follow_the_stream(name):
    torch.manual_seed(7)
    first = run(PRESETS[name])
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, run(PRESETS[name]), strict=True))
    torch.manual_seed(7)
    other = run(PRESETS[name], seed=1)
    changed = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    draws = {"dpsgd": [2], "mixup": [0, 1, 2], "instahide": [0, 1, 2], "noise": [3],
             "quantize": [3], "manifold_mixup": [2], "ats": [0, 2], "censor": [2],
             "outpost": [2]}  # fmt: skip
    assert [i for i, c in enumerate(changed) if c] == draws.get(name, [])


def test_the_presets_are_found():
    assert set(PRESETS) >= {"none", "dpsgd", "prune", "mixup", "instahide", "noise", "sign",
                            "quantize", "clip"}  # fmt: skip
    assert {n for n, d in PRESETS.items() if d.rounds} == {"sign", "quantize"}
    assert {n for n, d in PRESETS.items() if d.mixes} == {"mixup", "instahide", "manifold_mixup"}
    assert {n for n, d in PRESETS.items() if d.poisson} == {"dpsgd"}
    training = Training(steps=10, examples=500, batch=10)
    claims = {n for n, d in PRESETS.items() if d.privacy(training) is not None}
    assert claims == {"dpsgd", "userdp"}


def test_no_defense_is_the_identity(model):
    batch, update, none = batch_of(3), update_of(), Undefended()
    assert none.batch(batch, stream(0)) is batch
    assert none.update(update, stream(0)) is update
    got = none.gradients(model, batch, stream(0), 3)
    assert torch.equal(flat(got), flat(mean_gradient(model, batch)))


def test_composition_keeps_a_guarantee_only_where_it_holds():
    private, training = DPSGD(**DP), Training(steps=10, examples=500, batch=10)
    alone = private.privacy(training)
    for after in (Prune(ratio=0.5), SIGN, NEAREST, DRAWN, CLIP):  # post-processing
        assert Compose([private, after]).privacy(training) == alone
        assert Compose([after, private]).privacy(training) == alone  # updates come after steps
        assert Compose([after]).privacy(training) is None
    with pytest.raises(Refused, match="no epsilon holds"):
        Compose([Mixup(k=4, upper=0.65), private])
    with pytest.raises(Refused, match="at most one"):
        Compose([private, private])


def test_composing_shifts_no_draw():
    noise, update = Noise(std=1.0, distribution="gaussian"), update_of()
    alone = Compose([noise]).update(update, stream(0))
    beside = Compose([Prune(ratio=0.0), noise]).update(update, stream(0))
    assert torch.equal(flat(alone.tensors), flat(beside.tensors))


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        (DPSGD, DP | {"clip": 0.0}, "clip"),
        (DPSGD, DP | {"clip": math.inf}, "clip"),
        (DPSGD, DP | {"clip": math.nan}, "clip"),
        (DPSGD, DP | {"noise_multiplier": -1.0}, "noise_multiplier"),
        (DPSGD, DP | {"noise_multiplier": math.inf}, "noise_multiplier"),
        (DPSGD, DP | {"delta": 0.0}, "delta"),
        (DPSGD, DP | {"delta": 1.0}, "delta"),
        (Prune, {"ratio": 1.0}, "ratio"),
        (Prune, {"ratio": -0.1}, "ratio"),
        (Prune, {"ratio": math.nan}, "ratio"),
        (Prune, {"ratio": 0.9, "scope": "layer"}, "scope"),
        (Mixup, {"k": 1, "upper": 1.0}, "k"),
        (Mixup, {"k": 4, "upper": 0.24}, "upper"),  # no four coefficients could pass
        (Mixup, {"k": 4, "upper": 1.1}, "upper"),
        (InstaHide, {"k": 0, "upper": 0.65}, "k"),
        (InstaHide, {"k": 4, "upper": math.nan}, "upper"),
        (Noise, {"std": -0.1, "distribution": "gaussian"}, "std"),
        (Noise, {"std": math.nan, "distribution": "gaussian"}, "std"),
        (Noise, {"std": 0.1, "distribution": "uniform"}, "distribution"),
        (Sign, {"scale": "median"}, "scale"),
        (Quantize, {"bits": 1, "rounding": "nearest"}, "bits"),
        (Quantize, {"bits": 17, "rounding": "nearest"}, "bits"),
        (Quantize, {"bits": 4, "rounding": "up"}, "rounding"),
        (Clip, {"norm": 0.0}, "norm"),
        (Clip, {"norm": math.inf}, "norm"),
        (Clip, {"norm": math.nan}, "norm"),
    ],
)
def test_values_out_of_range_are_refused(kind, fields, key):
    with pytest.raises(Refused) as refusal:
        kind(**fields)
    assert refusal.value.key == key

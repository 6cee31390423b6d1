"""Label recovery: exact where it must be, and never with more than was granted."""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from attacks.idlg import IDLG
from attacks.inverting import Inverting
from defenses.clip import Clip
from fedsec import engine, labels
from fedsec.checks import Refused
from fedsec.client import mean_gradient
from fedsec.cost import flops
from fedsec.data import Npz, Photos
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ResNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Local, Update
from fedsec.verify.labels import CLAIMS, instance_accuracy

SPECS = {
    "lenet": LeNetSpec(),
    "convnet": ConvNetSpec(width=8, norm="group"),
    "resnet20": ResNetSpec(depth=20, norm="group"),
    "mlp": MLPSpec(hidden=(64,)),
}
SHAPE = (3, 16, 16)
GRADIENT = Local(kind="gradient", lr=1.0)
BATCHES = [method for method in labels.METHODS if method not in ("idlg", "yin")]
DATA, MODELS = os.environ.get("FEDSEC_DATA"), os.environ.get("FEDSEC_MODELS")


@pytest.fixture(scope="session")
def photos():
    return Photos(size=16, per_class=100).load()


def observation(spec, drawn, local=GRADIENT, /, **facts) -> tuple[Observation, torch.Tensor]:
    """What a server sees of private batches (images, labels), and their labels, sorted."""
    model = spec.build(tuple(drawn[0][0].shape[1:]), 10, (0.5,) * 3, (0.25,) * 3, stream(0, "m"))
    batches = [Batch(x, F.one_hot(y, 10).float()) for x, y in drawn]
    if local is GRADIENT:
        updates = [mean_gradient(model, batch) for batch in batches]
    else:
        updates = [engine.simulate(model, b.images, b.targets, local) for b in batches]
    stacked = {k: torch.stack([u[k] for u in updates]).detach() for k in updates[0]}
    count, shape = len(drawn[0][1]), tuple(drawn[0][0].shape[1:])
    known = {"model": model, "update": Update(stacked, {}, count), "shape": shape, "count": count}
    return Observation("test", known | facts), torch.stack([y.sort().values for _, y in drawn])


def noise(count: int, victims: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images with random labels."""
    rngs = [stream(0, "private", v) for v in range(victims)]
    y = [torch.randint(10, (count,), generator=rng) for rng in rngs]
    return [(torch.rand(count, *SHAPE, generator=r), t) for r, t in zip(rngs, y, strict=True)]


def patches(dataset, count: int, victims: int = 8, kinds: int = 10):
    """Test patches of `kinds` photographs, which are the classes."""
    drawn = []
    for v in range(victims):
        rng = stream(1, "private", v)
        classes = torch.randperm(10, generator=rng)[:kinds]
        pool = torch.isin(dataset.test.labels, classes).nonzero()[:, 0]
        batch = dataset.test.batch(pool[torch.randint(len(pool), (count,), generator=rng)], 10)
        drawn.append((batch.images, batch.labels))
    return drawn


def without_bias(seen: Observation) -> Observation:
    seen.model.fc[0].register_parameter("bias", None)
    rest = {k: v for k, v in seen.update.tensors.items() if k != "fc.0.bias"}
    known = {"update": Update(rest, {}, seen.count), "shape": seen.shape, "count": seen.count}
    return Observation("test", known | {"model": seen.model})


def rngs(n):
    return [stream(0, "attack", v) for v in range(n)]


# ---- the measure --------------------------------------------------------------------------------


def test_instance_accuracy_is_the_share_of_the_multisets_that_is_common():
    def of(found, truth):
        return instance_accuracy(torch.tensor([found]), torch.tensor([truth]))

    assert of([0, 0, 1, 2], [2, 0, 0, 1]) == 1
    assert of([0, 0, 0, 0], [0, 0, 1, 1]) == 0.5
    assert of([0, 1, 2, 3], [0, 0, 0, 0]) == 0.25
    assert of([3, 3], [0, 1]) == 0


# ---- one image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_idlg_is_exact_at_batch_one(name):
    seen, truth = observation(SPECS[name], noise(1, 12))
    assert torch.equal(labels.recover(seen), truth)
    assert torch.equal(labels.recover(seen, "idlg"), truth)


@pytest.mark.parametrize("method", ["yin", *BATCHES])
def test_the_methods_for_batches_tell_one_label_too(method):
    seen, truth = observation(SPECS["lenet"], noise(1, 12))
    assert torch.equal(labels.recover(seen, method), truth)


def test_without_an_output_bias_one_image_still_tells_its_label():
    seen, truth = observation(SPECS["lenet"], noise(1))
    assert torch.equal(labels.recover(without_bias(seen)), truth)


# ---- exact on constructed cases -----------------------------------------------------------------


def layer(counts, weight, inputs):
    """Gradients of a last layer for `counts[c]` images of class c with inputs [c d], in double."""
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    h = inputs[y]
    error = ((h @ weight.T).softmax(1) - F.one_hot(y, len(counts))) / len(y)
    return error.T @ h, error.sum(0), y


@pytest.mark.parametrize("counts", [(1, 0, 1, 1, 0), (0, 0, 0, 0, 1), (1, 1, 1, 1, 1)])
def test_yin_is_exact_where_each_class_has_an_input_of_its_own(counts):
    eye = torch.eye(5, dtype=torch.float64)
    rows, _, y = layer(counts, 0.1 * torch.randn(5, 5, dtype=torch.float64), eye)
    assert torch.equal(labels.yin(rows, len(y)), y)
    assert not torch.equal(labels.yin(-rows, len(y)), y) or len(y) == 5


@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 6), (2, 2, 2), (1, 0, 7), (5, 4, 0)])
def test_counts_are_exact_where_predictions_are_known(counts):
    """Equal predictions on all images: then every way to count knows p without an error."""
    weight, inputs = torch.zeros(3, 4).double(), torch.ones(3, 4).double()
    rows, gradient, y = layer(counts, weight, inputs)
    dummies = torch.ones(20, 4).double(), torch.zeros(20, 3).double()
    zero = torch.zeros(3).double()
    found = {
        "llg": labels.llg(rows, *dummies, len(y)),
        "bias_counts": labels.bias_counts(gradient, torch.full((3,), 1 / 3).double(), len(y)),
        "ilrg": labels.ilrg(rows, gradient, weight, zero, len(y)),
        "rlu": labels.rlu(rows, gradient, weight, zero, dummies[1], len(y)),
    }
    for method, named in found.items():
        assert torch.equal(named, y), method


def test_shares_are_those_that_brute_force_finds():
    """On a tiny network, every possible count is tried: the nearest gradient names the labels."""
    rng = stream(0, "tiny")
    weight = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    inputs = torch.rand(3, 4, generator=rng, dtype=torch.float64)
    given = (inputs @ weight.T).softmax(1)
    every = [c for c in product(range(5), repeat=3) if sum(c) == 4]
    eye = torch.eye(3, dtype=torch.float64)
    gradients = torch.stack([torch.tensor(c).double() @ (given - eye) / 4 for c in every])
    assert len(every) == 15
    for counts in every:
        _, gradient, _ = layer(counts, weight, inputs)
        nearest = every[int((gradients - gradient).square().sum(1).argmin())]
        share = labels._shares(given, gradient, torch.full((3,), 1e-6).double(), 4)
        assert nearest == counts
        assert tuple(labels.whole(share, 4).int().tolist()) == counts


def test_bias_counts_are_exact_with_the_true_mean_prediction():
    """n_k = B (p_k - g_k) holds with equality: any error comes from estimating p."""
    model = SPECS["mlp"].build(SHAPE, 10, (0.5,) * 3, (0.25,) * 3, stream(0, "model"))
    x, y = torch.rand(16, *SHAPE), torch.randint(10, (16,))
    update = engine.simulate(model, x, F.one_hot(y, 10).float(), GRADIENT)
    bias = [v for k, v in update.items() if k.endswith("bias")][-1]
    p = model(x).softmax(1).mean(0)
    assert torch.equal(labels.bias_counts(bias, p, 16), y.sort().values)
    assert not torch.equal(labels.bias_counts(-bias, p, 16), y.sort().values)


@pytest.mark.parametrize("count", [1, 3, 7, 200])
def test_whole_numbers_are_the_nearest_that_sum_up(count):
    """Largest remainders: no other whole numbers of this sum are nearer."""
    share = torch.rand(6, generator=stream(count, "share"), dtype=torch.float64)
    found = labels.whole(share, count)
    exact = count * share / share.sum()
    assert found.sum() == count
    assert (found - exact).abs().max() < 1
    for up, down in product(range(6), repeat=2):
        other = found.clone()
        other[up] += 1
        other[down] -= 1
        assert (other - exact).square().sum() >= (found - exact).square().sum() - 1e-12


# ---- on networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("count", [8, 32])
def test_auto_on_untrained_networks(photos, name, count):
    seen, truth = observation(SPECS[name], patches(photos, count))
    assert instance_accuracy(labels.recover(seen), truth) >= 0.97


@pytest.mark.parametrize("method", BATCHES)
def test_every_method_beats_equal_counts_on_an_untrained_network(photos, method):
    seen, truth = observation(SPECS["lenet"], patches(photos, 8, 16))
    equal = labels.named(labels.whole(torch.ones(10), 8)).expand_as(truth)
    found = labels.recover(seen, method)
    assert torch.equal(found, found.sort(1).values)
    assert instance_accuracy(found, truth) >= 0.9
    assert instance_accuracy(equal, truth) <= 0.65


def test_yin_names_different_labels(photos):
    drawn = [(x, torch.randperm(10)[:6]) for x, _ in patches(photos, 6)]
    seen, truth = observation(SPECS["convnet"], drawn)
    assert instance_accuracy(labels.recover(seen, "yin"), truth) >= 0.9


def test_few_classes_are_told_where_predictions_on_noise_mislead(photos):
    seen, truth = observation(SPECS["lenet"], patches(photos, 32, kinds=2))
    found = {method: labels.recover(seen, method) for method in ("auto", "bias_counts")}
    score = {method: instance_accuracy(told, truth) for method, told in found.items()}
    assert score["auto"] >= 0.98
    assert score["auto"] > score["bias_counts"]


def test_public_images_stand_for_the_private_ones_where_granted(photos):
    drawn = patches(photos, 32)
    aux = photos.train.batch(range(64), 10)
    seen, truth = observation(SPECS["lenet"], drawn, aux=aux)
    assert torch.equal(labels.dummies(seen), aux.images)
    blind, _ = observation(SPECS["lenet"], drawn)
    with_aux, without = (labels.recover(s, "bias_counts") for s in (seen, blind))
    assert instance_accuracy(with_aux, truth) > instance_accuracy(without, truth)
    few, _ = observation(SPECS["lenet"], drawn, aux=photos.train.batch(range(3), 10))
    assert torch.equal(labels.dummies(few), labels.dummies(blind)), "three images say nothing"


def test_dummies_are_images_about_where_the_model_normalises_to():
    seen, _ = observation(replace(SPECS["lenet"], mean=(0.2, 0.5, 0.8)), noise(1, 1))
    images = labels.dummies(seen)
    assert images.shape == (labels.DUMMIES, *SHAPE)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.2, 0.5, 0.8]), atol=0.06)
    near = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert near < 0.5 * (images[..., 8:] - images[..., :8]).abs().mean(), "smooth"


# ---- local steps --------------------------------------------------------------------------------


def test_local_steps_are_brought_back_to_one_gradients_scale():
    local = Local(kind="fedavg", lr=0.001, steps=4, batch=8)
    seen, truth = observation(SPECS["lenet"], noise(8), local, local=local)
    for method in ("llg", "bias_counts", "rlu"):
        assert instance_accuracy(labels.recover(seen, method), truth) >= 0.95, method
    blind, _ = observation(SPECS["lenet"], noise(8), local)
    assert instance_accuracy(labels.recover(blind), truth) < 0.95, "the scale matters"


def test_long_local_training_is_simulated(photos):
    local = Local(kind="fedavg", lr=0.01, steps=10, batch=16)
    seen, truth = observation(SPECS["lenet"], patches(photos, 16, 4), local, local=local)
    told = {method: labels.recover(seen, method) for method in ("rlu", "bias_counts")}
    score = {method: instance_accuracy(found, truth) for method, found in told.items()}
    equal = labels.named(labels.whole(torch.ones(10), 16)).expand_as(truth)
    assert score["rlu"] >= instance_accuracy(equal, truth) + 0.1
    assert score["rlu"] >= score["bias_counts"] + 0.1, "one gradient is not the whole training"


def test_one_local_step_is_a_gradient(photos):
    local = Local(kind="fedavg", lr=0.05, steps=1, batch=8)
    drawn = patches(photos, 8)
    stepped, _ = observation(SPECS["mlp"], drawn, local, local=local)
    plain, _ = observation(SPECS["mlp"], drawn)
    for method in BATCHES:
        assert torch.equal(labels.recover(stepped, method), labels.recover(plain, method)), method


def test_a_simulated_client_trains_as_a_real_one_does():
    """With the private inputs of a last layer for dummies, the simulation is the client."""
    model = MLPSpec(hidden=()).build(SHAPE, 10, (0.5,) * 3, (0.25,) * 3, stream(0, "m")).double()
    local = Local(kind="fedavg", lr=0.05, steps=5, batch=4)
    x, y = noise(12, 1)[0]
    targets = F.one_hot(y, 10).double()
    update = engine.simulate(model, x.double(), targets, local)
    seen, _ = observation(MLPSpec(hidden=()), noise(12, 1), local, local=local)
    last = labels._last_layers(seen)[0]
    h = ((x.double() - 0.5) / 0.25).flatten(1)[None]  # as the model normalises
    _, gradient = labels._trained(last, h, torch.zeros_like(h), targets[None])
    bias = update["layers.linear0.bias"] / (local.lr * local.steps)
    assert torch.allclose(gradient, bias, atol=1e-6)


# ---- under a defense, and where dummies mislead -------------------------------------------------


@pytest.mark.parametrize(("count", "spread"), [(1, 1.0), (8, 0.1)])
def test_noise_counts_less_in_the_weights_than_in_the_bias(photos, count, spread):
    seen, truth = observation(SPECS["lenet"], patches(photos, count, 16))
    bias = seen.update.tensors["fc.0.bias"]
    for tensor in seen.update.tensors.values():
        tensor += spread * torch.randn(tensor.shape, generator=stream(0, "noise"))
    expected = labels._last_layers(seen)[0].start()[1].softmax(1).mean(0)
    alone = torch.stack([labels.bias_counts(row.double(), expected, count) for row in bias])
    missed, before = (
        1 - instance_accuracy(found, truth) for found in (labels.recover(seen), alone)
    )
    assert before >= 0.25, "the noise matters"
    assert missed <= before / 4


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
def test_what_a_defense_added_is_told_from_what_does_not_cancel(photos, spread):
    seen, _ = observation(SPECS["lenet"], patches(photos, 8, 4))
    for tensor in seen.update.tensors.values():
        tensor += spread * torch.randn(tensor.shape, generator=stream(0, "noise"))
    for last in labels._last_layers(seen):
        assert last.noise == pytest.approx(spread, rel=0.1, abs=1e-6)


def test_dummies_are_given_up_where_the_gradient_contradicts_them():
    """A gradient of +0.2 says that at least a fifth was predicted as that class."""
    gradient = torch.tensor([0.2, -0.2, 0.0, 0.0])
    assert labels._doubt(gradient, torch.tensor([0.25, 0.25, 0.25, 0.25])) == 0
    assert labels._doubt(gradient, torch.tensor([0.01, 0.01, 0.97, 0.01])) == 1
    assert 0 < labels._doubt(gradient, torch.tensor([0.18, 0.42, 0.2, 0.2])) < 0.1


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("method", BATCHES)
def test_an_update_that_is_known_to_be_clipped_tells_the_same_labels(photos, method, count):
    plain, _ = observation(SPECS["lenet"], patches(photos, count))
    facts = {name: getattr(plain, name) for name in plain.grants}
    update, known = facts["update"], labels.recover(plain, method)
    shorter = {k: 0.05 * t for k, t in update.tensors.items()}
    facts["update"] = replace(update, tensors=shorter)
    clipped = Observation("test", facts | {"defense": Clip(norm=1.0)})
    told = labels.recover(clipped, method)
    naive = labels.recover(Observation("test", facts), method)
    right = instance_accuracy(told, known)
    assert right >= 0.85
    if count > 1 and method in ("bias_counts", "rlu"):  # those that go by lengths
        assert right > instance_accuracy(naive, known) + 0.1


def test_what_is_left_of_a_length_is_read_off_absent_classes():
    expected = torch.full((10,), 0.1, dtype=torch.float64)
    share = torch.tensor([2, 1, 1, 0, 0, 0, 0, 0, 0, 0]) / 4
    for left in (1.0, 0.3, 1e-3):
        found = labels.kept(left * (expected - share), expected, 4)
        assert found == pytest.approx(left)
    assert labels.kept(3 * (expected - share), expected, 4) == 1.0  # clipping lengthens nothing


@pytest.mark.parametrize("method", BATCHES)
@pytest.mark.parametrize("local", [GRADIENT, Local("fedavg", 0.05, 3, 4)], ids=["one", "steps"])
@pytest.mark.parametrize("broken", ["zero", "nan", "inf", "positive", "huge"])
def test_as_many_labels_as_images_whatever_the_update(method, local, broken):
    seen, _ = observation(SPECS["mlp"], noise(12, 2), local, local=local)
    for tensor in seen.update.tensors.values():
        value = {"zero": 0.0, "nan": torch.nan, "inf": torch.inf, "positive": 1.0}.get(broken)
        tensor.fill_(value) if value is not None else tensor.mul_(1e6)
    found = labels.recover(seen, method)
    assert found.shape == (2, 12)
    assert found.dtype == torch.int64
    assert 0 <= found.min() <= found.max() < 10


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("count", [2, 7, 40])
def test_bias_counts_always_name_as_many_labels_as_images(count, shift):
    """Also where noise denies every class, or claims far too many of each."""
    for v in range(20):
        rng = stream(v, "noise")
        gradient = torch.randn(10, generator=rng) + shift
        expected = torch.rand(10, generator=rng).softmax(0)
        assert labels.bias_counts(gradient, expected, count).shape == (count,)


@pytest.mark.parametrize("method", BATCHES)
def test_a_batch_of_one_class_is_told(photos, method):
    drawn = [(x, y[:1].expand(12)) for x, y in patches(photos, 12)]
    seen, truth = observation(SPECS["convnet"], drawn)
    assert instance_accuracy(labels.recover(seen, method), truth) >= 0.9


@pytest.mark.parametrize("method", ["auto", "llg", "ilrg", "bias_counts"])
def test_without_an_output_bias_counts_follow_from_the_weights(photos, method):
    drawn = patches(photos, 8)
    seen, truth = observation(SPECS["lenet"], drawn)
    assert instance_accuracy(labels.recover(without_bias(seen), method), truth) >= 0.8


@pytest.mark.parametrize(("method", "count"), [("idlg", 2), ("yin", 11)])
def test_a_method_is_refused_beyond_what_it_can_tell(method, count):
    seen, _ = observation(SPECS["mlp"], noise(count, 1))
    with pytest.raises(Refused, match="^attack.labels: .*auto serves .*batches, got"):
        labels.recover(seen, method)


# ---- what it says and costs ---------------------------------------------------------------------


@pytest.mark.parametrize("method", BATCHES)
@pytest.mark.parametrize("local", [GRADIENT, Local("fedavg", 0.05, 3, 4)], ids=["one", "steps"])
def test_a_victims_labels_depend_on_no_other_victim_and_on_no_order(method, local):
    drawn = noise(6, 3)
    together, _ = observation(SPECS["lenet"], drawn, local, local=local)
    for v, (x, y) in enumerate(drawn):
        alone, _ = observation(SPECS["lenet"], [(x, y)], local, local=local)
        assert torch.equal(labels.recover(together, method)[v], labels.recover(alone, method)[0])
    turned, _ = observation(SPECS["lenet"], [(x.flip(0), y.flip(0)) for x, y in drawn])
    straight, _ = observation(SPECS["lenet"], drawn)
    assert torch.equal(labels.recover(turned, method), labels.recover(straight, method))


def test_granted_labels_are_taken_as_they_are():
    mixed = torch.rand(2, 4, 10).softmax(-1)
    seen, _ = observation(SPECS["mlp"], noise(4, 2), labels=mixed)
    targets, spent = labels.targets_of(seen, rngs(2))
    assert torch.equal(targets, mixed)
    assert spent == 0


@pytest.mark.parametrize("victims", [1, 3])
def test_what_recovery_costs_is_counted(victims):
    """A forward pass of the dummies, which victims share and each is charged for."""
    seen, _ = observation(SPECS["mlp"], noise(4, victims))
    one = flops(lambda: seen.model(labels.dummies(seen)))
    whole = flops(lambda: labels.recover(seen, "bias_counts"))
    assert labels.targets_of(seen, rngs(victims), "bias_counts")[1] == pytest.approx(one, rel=1e-6)
    assert whole == pytest.approx(one, rel=1e-6), "once for all victims"
    assert labels.targets_of(seen, rngs(victims))[1] > one, "and what it computes with it"


@pytest.mark.parametrize("attack", [Inverting, IDLG])
def test_an_attack_uses_the_method_that_it_names(attack):
    fields = {"steps": 1, "lr": 0.1, "restarts": 1}
    if attack is Inverting:
        fields |= {"rule": "signed", "tv": 0.0, "patience": 0, "halving": False}
    seen, _ = observation(SPECS["lenet"], noise(8, 1))
    for method in ("auto", "llg", "ilrg"):
        found = attack(**fields, labels=method)(seen, rngs(1), lambda *_: None)
        assert torch.equal(found.labels[0].sort().values, labels.recover(seen, method)[0])
    with pytest.raises(Refused, match="^labels: must be among auto, idlg, .*, got guess"):
        attack(**fields, labels="guess")


# ---- published numbers --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.setting)
def test_the_claims_hold(claim):
    if claim.data == "cifar10" and not DATA:
        pytest.skip("FEDSEC_DATA names no folder with cifar10.npz")
    dataset = Photos().load() if claim.data == "photos" else Npz(path=f"{DATA}/cifar10.npz").load()
    assert claim.least <= claim.measure(dataset) <= claim.most


@pytest.mark.slow
@pytest.mark.skipif(not (DATA and MODELS), reason="FEDSEC_DATA or FEDSEC_MODELS is not set")
def test_one_image_is_told_by_a_converged_network_and_a_batch_is_hardly():
    """Near-zero gradients: counts are little better than equal ones, and not to be relied on."""
    weights = str(Path(MODELS or "") / "akamaster_resnet20-12fca82f.th")
    spec = ResNetSpec(weights=weights, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    test = Npz(path=f"{DATA}/cifar10.npz").load().test

    def drawn(count, victims):
        batches = [test.batch(range(v * count, (v + 1) * count), 10) for v in range(victims)]
        return [(b.images, b.labels) for b in batches]

    seen, truth = observation(spec, drawn(1, 20))
    assert instance_accuracy(labels.recover(seen), truth) == 1
    seen, truth = observation(spec, drawn(8, 20))
    equal = labels.named(labels.whole(torch.ones(10), 8)).expand_as(truth)
    assert instance_accuracy(labels.recover(seen), truth) > instance_accuracy(equal, truth)

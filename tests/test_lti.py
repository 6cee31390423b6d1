"""Learning to invert: its parts against dumb twins, and what knowing the defense is worth."""

from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
from test_attacks import MEAN, STD, nothing, rngs
from torch import nn
from torch.nn import functional as F

from attacks.lti import LTI
from defenses.dpsgd import DPSGD
from defenses.mixup import Mixup
from defenses.noise import Noise
from defenses.prune import Prune
from fedsec import metrics
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_update
from fedsec.data import Photos
from fedsec.defense import Compose, Defense
from fedsec.lti import BUCKETS, Clients, Components, Hashed, Network, assigned, moved, streams_of
from fedsec.models import MLPSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Local, Update
from fedsec.verify import lti

SHAPE, CLASSES = (3, 8, 8), 4
PRUNE, GAUSS = Prune(ratio=0.9), Noise(std=0.1, distribution="gaussian")
GRADIENT = Local("gradient", 1.0, 1, 4)
SMALL = LTI(updates=200, shift=1, mirror=True, features=64, width=64, steps=120, batch=32, lr=3e-3)


def mlp():
    return MLPSpec(hidden=(12,)).build(SHAPE, CLASSES, MEAN, STD, stream(0, "model"))


def coloured(count, name):
    """Images of one colour each, a little noisy, of random classes."""
    rng = stream(0, name)
    images = 0.1 + 0.7 * torch.rand(count, 3, 1, 1, generator=rng)
    images = images + 0.1 * torch.rand(count, *SHAPE, generator=rng)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    return Batch(images, F.one_hot(labels, CLASSES).float())


def told(defense=None, batch=1, local=None, victims=6, known=True, **granted):
    """What an adversary with public images sees, and the private ones [v b c h w]."""
    defense, local, model = defense or Defense(), local or Local("gradient", 1.0, 1, batch), mlp()
    private, sent = [coloured(batch, f"private {v}") for v in range(victims)], []
    for v, one in enumerate(private):
        streams = client_streams(0, v, 0, "probe")
        sent.append(local_update(model, [one] * local.steps, defense, local, streams, batch)[0])
    update = {k: torch.stack([s.tensors[k] for s in sent]) for k in sent[0].tensors}
    facts = {"model": model, "update": Update(update, {}, batch), "count": batch, "shape": SHAPE,
             "aux": coloured(200, "public"), "local": local}  # fmt: skip
    facts |= {"defense": defense} if known else {}
    return Observation("t", facts | granted), torch.stack([p.images for p in private])


def reached(seen, private):
    """Mean PSNR of batches of one."""
    found = SMALL(seen, rngs(len(private)), nothing)
    return float(metrics.psnr(found.images.flatten(0, 1), private.flatten(0, 1)).mean())


# ---- parts --------------------------------------------------------------------------------------


def test_the_loss_is_the_least_over_all_permutations():
    rng = stream(0, "loss")
    guess = torch.rand(5, 3, 7, generator=rng, requires_grad=True)
    truth = torch.rand(5, 3, 7, generator=rng)
    by_hand = torch.stack(
        [(guess[:, list(p)] - truth).square().mean((1, 2)) for p in permutations(range(3))]
    )
    least, which = by_hand.min(0)
    assert len(which.unique()) > 1, "one order for all would not need a search"
    torch.testing.assert_close(assigned(guess, truth), least.mean())
    mine, theirs = (
        torch.autograd.grad(x, guess, retain_graph=True)[0]
        for x in (assigned(guess, truth), least.mean())
    )
    torch.testing.assert_close(mine, theirs)


def test_hashing_is_the_product_with_a_sparse_matrix_of_signs():
    hashed = Hashed(300, stream(0, "hash"), buckets=20)
    update = {"a": torch.randn(10, 10), "b": torch.randn(200)}
    matrix = torch.zeros(300, 20)
    matrix[torch.arange(300), hashed.bucket] = hashed.sign
    row = torch.cat([update["a"].flatten(), update["b"]])
    torch.testing.assert_close(hashed(update), row @ matrix)
    parts = [{k: t if k == name else 0 * t for k, t in update.items()} for name in update]
    torch.testing.assert_close(sum(hashed(p) for p in parts), hashed(update))
    assert set(hashed.sign.tolist()) == {-1.0, 1.0}


def test_an_update_that_is_short_enough_is_kept_as_it_is():
    hashed = Hashed(BUCKETS, stream(0, "hash"))
    row = torch.randn(BUCKETS)
    assert torch.equal(hashed({"a": row[:5], "b": row[5:]}), row)


def test_components_are_those_of_a_singular_value_decomposition():
    rows = torch.randn(50, 30) * torch.linspace(3, 0.1, 30)
    found = Components.of(rows, torch.zeros(1, 30), 6)
    _, _, vectors = torch.linalg.svd(rows - rows.mean(0))
    plain = (rows - rows.mean(0)) @ vectors[:6].T
    plain = plain / plain.square().mean().sqrt()
    # eigh sorts upwards; signs are free
    torch.testing.assert_close(found(rows).flip(1).abs(), plain.abs(), rtol=1e-3, atol=1e-3)


def test_components_count_for_less_the_more_noise_covers_them():
    clean = torch.randn(600, 2) * torch.tensor([3.0, 1.0])
    noise = torch.randn(600, 2)
    deviation = Components.of(clean, noise, 2)(clean + noise).std(0)
    # variances 10 and 2, times shares 9 / 10 and 1 / 2
    expected = (10**0.5 * 0.9) / (2**0.5 * 0.5)
    assert float(deviation[1] / deviation[0]) == pytest.approx(expected, rel=0.15)


def test_components_of_rows_that_are_all_the_same_are_finite():
    rows = torch.ones(5, 3)
    assert Components.of(rows, 0 * rows, 2)(rows).isfinite().all()


def test_the_network_is_three_layers_and_begins_with_the_mean_image():
    mean = torch.rand(3, 4, 4)
    network = Network(5, 7, mean, 2, stream(0, "network"))
    assert torch.equal(network(torch.zeros(1, 5)), network(torch.zeros(1, 5)))
    plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 96))
    for layer, w, b in zip(plain[::2], network.weights, network.biases, strict=True):
        layer.weight.data, layer.bias.data = w.data, b.data
    x = torch.randn(3, 5)
    torch.testing.assert_close(network(x), plain(x).sigmoid())
    image = network(torch.zeros(1, 5)).view(2, 3, 4, 4)
    torch.testing.assert_close(image[0], mean.clamp(0.01, 0.99))
    assert torch.equal(image[0], image[1])


def test_images_move_within_their_borders():
    images = torch.rand(40, *SHAPE)
    assert torch.equal(moved(images, 0, False, stream(0, "m")), images)
    shifted = moved(images, 2, True, stream(0, "m"))
    padded = F.pad(images, (2,) * 4, mode="replicate")
    for image, big in zip(shifted, padded, strict=True):
        windows = [big[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(-1)) for w in windows)


@pytest.mark.parametrize(
    "defense", [Defense(), Prune(ratio=0.9), Mixup(k=2, upper=0.8)], ids=["none", "prune", "mixup"]
)
@pytest.mark.parametrize(
    "local",
    [
        Local("gradient", 1.0, 1, 4),
        Local("fedavg", 0.1, 3, 2),
        Local("gradient", 1.0, 1, 4, (4, 4)),
    ],
    ids=["gradient", "fedavg", "sum"],
)
def test_a_simulated_client_is_the_client(defense, local):
    count = 8 if local.parts else 4
    seen, _ = told(batch=count, local=local, defense=defense, victims=1)
    for p in seen.model.parameters():
        p.requires_grad_(False)  # as the threat model hands it out
    clients, batch = Clients(seen, streams_of(seen.model), 0, False), seen.aux
    sent, mixed = clients.answer(batch.images[:count], batch.targets[:count], 5)
    plain = []
    for part in range(count // 4):
        chunks = [slice(0, 4)] if local.kind == "gradient" else [slice(0, 2), slice(2, 4)]
        chunks = [chunks[s % len(chunks)] for s in range(local.steps)]
        own = Batch(batch.images[4 * part :][:4], batch.targets[4 * part :][:4])
        steps = [Batch(own.images[c], own.targets[c]) for c in chunks]
        own_streams = partial(streams_of(seen.model), "client", 5, part)
        plain.append(local_update(mlp(), steps, defense, local, own_streams, len(steps[0]))[0])
    for name, tensor in mean_update(plain).tensors.items():
        torch.testing.assert_close(sent[name], tensor)
    assert float(mixed.sum()) == pytest.approx(1)


def test_pairs_use_all_images_equally_and_draw_noise_anew():
    seen, _ = told(defense=Noise(std=0.1, distribution="gaussian"), batch=2)
    clients = Clients(seen, streams_of(seen.model), 0, False)
    order = clients.drawn(200)
    assert order.shape == (200, 2)
    assert (order.flatten().bincount() == 2).all()
    batch = seen.aux
    one, other = (clients.answer(batch.images[:2], batch.targets[:2], t)[0] for t in (0, 1))
    clean = clients.expected(batch.images[:2], batch.targets[:2])
    for name in clean:
        assert not torch.equal(one[name], other[name])
    apart = torch.cat([(one[k] - clean[k]).flatten() for k in clean])
    assert float(apart.std()) == pytest.approx(0.1, rel=0.05)
    pairs, _ = clients.pairs(20, lambda *_: None)
    assert float(pairs.noise.std()) == pytest.approx(0.1, rel=0.05)
    quiet, _ = told(batch=2)
    plain, _ = Clients(quiet, streams_of(quiet.model), 0, False).pairs(20, lambda *_: None)
    torch.testing.assert_close(pairs.rows, plain.rows, rtol=1e-4, atol=1e-5)
    assert not plain.noise.any()


@pytest.mark.parametrize(
    ("defense", "apart"),
    [
        (Defense(), False),
        (GAUSS, True),
        (Compose([PRUNE, GAUSS]), True),
        (Compose([GAUSS, PRUNE]), False),  # which entries are left depends on the noise
        (Compose([Mixup(k=2, upper=0.8), GAUSS]), False),  # its draws are not noise alone
    ],
)
def test_noise_is_moved_to_other_updates_only_where_it_is_the_same_there(defense, apart):
    seen, _ = told(defense=defense, batch=2, victims=1)
    assert Clients(seen, streams_of(seen.model), 0, False).apart == apart


def test_streams_are_a_models_own():
    one, same = (streams_of(mlp())("a", 1).initial_seed() for _ in range(2))
    assert one == same
    assert streams_of(mlp())("a", 2).initial_seed() != one
    changed = mlp()
    next(changed.parameters()).data[0, 0] += 1e-3
    assert streams_of(changed)("a", 1).initial_seed() != one


# ---- the attack ---------------------------------------------------------------------------------


def test_it_learns_to_read_images_off_updates():
    seen, private = told()
    mean = seen.aux.images.mean(0).expand_as(private)
    null = float(metrics.psnr(mean.flatten(0, 1), private.flatten(0, 1)).mean())
    assert reached(seen, private) >= null + 5


@pytest.mark.parametrize(
    "defense",
    [Prune(ratio=0.9), DPSGD(clip=0.1, noise_multiplier=0.01, delta=1e-5)],
    ids=["prune", "dpsgd"],
)
def test_knowing_the_defense_beats_not_knowing_it(defense):
    seen, private = told(defense=defense)
    ignorant, _ = told(defense=defense, known=False)
    assert reached(seen, private) >= reached(ignorant, private) + 1


def test_it_is_told_the_labels_that_are_granted():
    """Under noise that drowns all else, images that depend on the class are told by the label."""
    noise, labels = Noise(std=100.0, distribution="gaussian"), torch.arange(6) % CLASSES
    bright = (0.1 + 0.25 * labels)[:, None, None, None, None].expand(6, 1, *SHAPE)
    public = coloured(200, "public")
    images = (0.1 + 0.25 * public.labels)[:, None, None, None].expand(200, *SHAPE)
    aux = Batch(images.contiguous(), public.targets)
    seen, _ = told(defense=noise, aux=aux)
    one_hot = F.one_hot(labels, CLASSES)[:, None].float()
    granting, _ = told(defense=noise, aux=aux, labels=one_hot)
    assert reached(granting, bright) >= reached(seen, bright) + 10


def test_what_it_made_of_an_update_that_is_not_finite_is_grey_and_said():
    seen, _ = told(victims=2)
    next(iter(seen.update.tensors.values()))[1, 0, 0] = torch.nan
    found = replace(SMALL, steps=1)(seen, rngs(2), nothing)
    assert (found.images[1] == 0.5).all()
    assert float(found.loss[1]) == 1
    assert found.flags == ((), ("lti found no image: the update is not finite",))


def test_it_says_how_far_it_is_and_ends_at_the_end():
    seen, heard = told(victims=1)[0], []
    SMALL(seen, rngs(1), lambda *said: heard.append(said))
    steps = [step for step, _, _ in heard]
    assert steps == sorted(steps)
    assert {total for _, total, _ in heard} == {320}
    assert steps[-1] == 320
    assert heard[-1][2] < heard[0][2] / 2, "the loss falls from what the mean image scores"


@pytest.mark.parametrize(
    ("name", "value"),
    [("updates", 1), ("shift", -1), ("features", 0), ("width", 0), ("steps", 0), ("batch", 0),
     ("lr", 0.0), ("lr", float("inf"))],
)  # fmt: skip
def test_wrong_hyperparameters_are_refused(name, value):
    with pytest.raises(Refused, match=f"^{name}: must be"):
        replace(SMALL, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("claim", lti.CLAIMS, ids=lambda c: c.setting.split(", ")[-1])
def test_the_claims_hold(claim):
    assert claim.measure(Photos().load()) >= claim.least

"""The informed adversary: right where it can be, at chance where nothing is left, never above."""

import numpy as np
import pytest
import torch
from test_attacks import MEAN, STD, nothing, rngs
from torch.nn import functional as F

from attacks.candidates import Candidates
from defenses.clip import Clip
from defenses.dpsgd import DPSGD
from defenses.mixup import Mixup
from defenses.noise import Noise
from defenses.prune import Prune
from defenses.quantize import Quantize
from defenses.sign import Sign
from fedsec import likelihood
from fedsec.client import client_streams, local_update
from fedsec.data import Photos
from fedsec.defense import Compose, Defense
from fedsec.likelihood import Misfit, alone
from fedsec.models import MLPSpec, ResNetSpec
from fedsec.rng import stream
from fedsec.threat import Observation
from fedsec.types import Batch, Local, Update
from fedsec.verify import candidates

SHAPE, CLASSES, POOL = (3, 8, 8), 4, 12
ATTACK = Candidates(classes=10)
GAUSS, LAPLACE = (Noise(std=0.05, distribution=d) for d in ("gaussian", "laplace"))
PRUNE, SIGN, CLIP = Prune(ratio=0.9), Sign(scale="mean"), Clip(norm=0.1)
NEAREST, DRAWN = (Quantize(bits=2, rounding=r) for r in ("nearest", "stochastic"))


def dpsgd(sigma):
    return DPSGD(clip=1.0, noise_multiplier=sigma, delta=1e-5)


def mlp(dtype=torch.float64):
    spec = MLPSpec(hidden=(12,))
    return spec.build(SHAPE, CLASSES, MEAN, STD, stream(0, "model")).to(dtype)


def told(defense, victims=4, batch=1, local=None, model=None, dtype=torch.float64, **granted):
    """What an informed adversary sees, and which of its candidates are private [v b]."""
    model, local = model or mlp(dtype), local or Local("gradient", 1.0, 1, batch)
    rng = stream(0, "pool")
    pool = torch.rand(victims, POOL, *SHAPE, generator=rng, dtype=dtype)
    private = torch.stack([torch.randperm(POOL, generator=rng)[:batch] for _ in range(victims)])
    labels = torch.arange(victims * batch).view(victims, batch) % CLASSES
    targets = F.one_hot(labels, CLASSES).to(dtype)
    sent = []
    for v in range(victims):
        steps = [Batch(pool[v][private[v]], targets[v])] * local.steps
        streams = client_streams(0, v, 0, "probe")
        sent.append(local_update(model, steps, defense, local, streams, batch)[0].tensors)
    stacked = {k: torch.stack([s[k] for s in sent]) for k in sent[0]}
    known = {"model": model, "update": Update(stacked, {}, batch), "count": batch, "shape": SHAPE,
             "local": local, "defense": defense, "candidates": pool}  # fmt: skip
    return Observation("informed", known | granted), private, labels


def chosen(found, seen):
    """Which candidates were chosen [v b], sorted."""
    same = (found.images[:, :, None] == seen.candidates[:, None]).flatten(3).all(-1)
    assert (same.sum(-1) == 1).all()
    return same.double().argmax(-1).sort(1).values


@pytest.mark.parametrize(
    "defense",
    [
        Defense(), GAUSS, LAPLACE, PRUNE, dpsgd(0.01),
        Compose([PRUNE, GAUSS]), Compose([dpsgd(0.001), PRUNE]), Compose([dpsgd(0.001), LAPLACE]),
        SIGN, NEAREST, DRAWN, CLIP, Compose([PRUNE, SIGN]), Compose([CLIP, PRUNE]),
        Compose([SIGN, CLIP]), Compose([NEAREST, Noise(std=1e-4, distribution="gaussian")]),
    ],
    ids=["none", "gauss", "laplace", "prune", "dpsgd", "prune-noise", "dpsgd-prune", "dpsgd-noise",
         "sign", "nearest", "drawn", "clip", "prune-sign", "clip-prune", "sign-clip",
         "nearest-noise"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["gradient", "fedavg"])
def test_it_is_right_with_its_label_where_the_update_says_enough(defense, kind):
    local = Local(kind, 1.0, 1 if kind == "gradient" else 3, 1)
    seen, private, labels = told(defense, local=local)
    found = ATTACK(seen, rngs(4), nothing)
    assert torch.equal(chosen(found, seen), private)
    assert torch.equal(found.labels, labels)
    assert found.flags == ((),) * 4


def test_without_noise_the_misfit_of_the_right_one_is_rounding():
    for defense in (Defense(), PRUNE, SIGN, NEAREST, DRAWN, CLIP, Compose([CLIP, PRUNE])):
        found = ATTACK(told(defense)[0], rngs(4), nothing)
        assert found.loss.max() < 1e-20


def test_signs_of_noise_are_no_certain_choice():
    """Their likelihood is not a Gaussian's, in whose terms any choice would seem certain."""
    seen, _, _ = told(Compose([dpsgd(30.0), SIGN]))
    assert all("not certain" in " ".join(f) for f in ATTACK(seen, rngs(4), nothing).flags)


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("defense", [Defense(), PRUNE, dpsgd(1e-3)], ids=["none", "prune", "dpsgd"])
def test_all_images_of_a_batch_are_chosen(defense, batch):
    seen, private, labels = told(defense, batch=batch)
    found = ATTACK(seen, rngs(4), nothing)
    assert torch.equal(chosen(found, seen), private.sort(1).values)
    assert torch.equal(found.labels.sort(1).values, labels.sort(1).values)


def test_an_unknown_clip_costs_nothing_as_directions_are_compared():
    seen, private, _ = told(dpsgd(0.0))
    blind = Observation("blind", {k: getattr(seen, k) for k in seen.grants if k != "defense"})
    found = ATTACK(blind, rngs(4), nothing)
    assert torch.equal(chosen(found, seen), private)
    assert found.loss.max() < 1e-12
    undefended = dict(zip(seen.grants, map(seen.__getattr__, seen.grants), strict=True))
    wrong = Observation("wrong", undefended | {"defense": Defense()})
    assert ATTACK(wrong, rngs(4), nothing).loss.min() > 0.1


def test_a_single_images_update_equals_the_clients():
    """The twin of the simulation is the client's own code, clipping and local steps included."""
    for defense in (Defense(), dpsgd(0.0)):
        for local in (Local("gradient", 1.0, 1, 1), Local("fedavg", 0.5, 3, 1)):
            seen, private, labels = told(defense, local=local)
            images = seen.candidates[torch.arange(4), private[:, 0]]
            targets = F.one_hot(labels[:, 0], CLASSES).double()
            mine = alone(seen.model, images, targets, local, defense)
            for name, sent in seen.update.tensors.items():
                torch.testing.assert_close(mine[name], sent)


@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_one_image_is_chosen_by_the_optimal_rule(sigma):
    """The twin: maximum likelihood over clean updates that plain autograd and NumPy compare.

    At equal prior odds no rule is right more often, so that equal choices are the Bayes bound.
    """
    victims = 40
    seen, private, labels = told(dpsgd(sigma), victims=victims)
    targets = F.one_hot(labels, CLASSES).double()
    granted = Observation("t", {k: getattr(seen, k) for k in seen.grants} | {"labels": targets})
    found = chosen(ATTACK(granted, rngs(victims), nothing), seen)[:, 0]
    for v in range(victims):
        sent = np.concatenate([t[v].numpy().ravel() for t in seen.update.tensors.values()])
        far = []
        for image in seen.candidates[v]:
            loss = F.cross_entropy(seen.model(image[None]), targets[v])
            parts = torch.autograd.grad(loss, list(seen.model.parameters()))
            clean = np.concatenate([p.numpy().ravel() for p in parts])
            far.append(np.sum((sent - clean * min(1, 1 / np.linalg.norm(clean))) ** 2))
        assert int(np.argmin(far)) == int(found[v])
    right = float((found == private[:, 0]).double().mean())
    assert 1 / POOL < right < 1, "neither end: the rule decides"


def test_under_large_noise_it_is_at_chance_and_says_so():
    """Share right at a deviation of 1,000 clips: 1 / 12 within four standard errors."""
    victims = 200
    seen, private, _ = told(dpsgd(1000.0), victims=victims)
    found = ATTACK(seen, rngs(victims), nothing)
    right = float((chosen(found, seen) == private).double().mean())
    assert abs(right - 1 / POOL) < 4 * (1 / POOL * (1 - 1 / POOL) / victims) ** 0.5
    assert all("not certain" in f[0] for f in found.flags)


def test_what_it_compares_wrongly_is_said():
    flags = ATTACK(told(SIGN, batch=2)[0], rngs(4), nothing).flags
    assert all("the defense rounds their sum" in " ".join(f) for f in flags)
    flags = ATTACK(told(Mixup(k=2, upper=0.65), batch=2)[0], rngs(4), nothing).flags
    assert all("the defense mixes images" in " ".join(f) for f in flags)
    model = ResNetSpec(depth=8, width=4).build(SHAPE, CLASSES, MEAN, STD, stream(0, "m")).double()
    flags = ATTACK(told(Defense(), 1, 2, model=model)[0], rngs(1), nothing).flags
    assert "BatchNorm joins" in " ".join(flags[0])
    local = Local("fedavg", 0.5, 2, 2)
    flags = ATTACK(told(Defense(), 1, 2, local=local)[0], rngs(1), nothing).flags
    assert "local steps join" in " ".join(flags[0])


# ---- the likelihood -----------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "law"), [(GAUSS, "norm"), (LAPLACE, "laplace")])
def test_differences_of_misfits_are_those_of_log_likelihoods(noise, law):
    """The twin is SciPy's density, whose scale is the deviation, or that over sqrt(2)."""
    from scipy import stats

    sent, clean = {"w": torch.randn(3, 4).double()}, {"w": torch.randn(5, 3, 4).double() / 10}
    misfit = Misfit(sent, Local("gradient", 1.0, 1, 1), noise)
    assert misfit.nats
    scale = noise.std if law == "norm" else noise.std / 2**0.5
    apart = (sent["w"] - clean["w"]).numpy()
    density = -getattr(stats, law).logpdf(apart, scale=scale).sum((1, 2))
    mine = misfit(clean).numpy()
    np.testing.assert_allclose(mine - mine[0], density - density[0])


def test_a_mask_hides_what_pruning_dropped_unless_noise_covers_it():
    update = Update({"w": torch.tensor([0.0, 2.0])}, {}, 1)
    for parts, masked in [([PRUNE], True), ([GAUSS, PRUNE], True), ([PRUNE, GAUSS], False),
                          ([PRUNE, dpsgd(1.0)], True), ([dpsgd(1.0)], False)]:  # fmt: skip
        mask = Compose(parts).mask(update)
        assert (mask is not None) == masked, parts
        assert mask is None or mask["w"].tolist() == [False, True]


def test_deviations_of_noise_add_in_squares_and_scale_with_the_step():
    both = Compose([dpsgd(3.0), Noise(std=4.0, distribution="gaussian")])
    assert both.noise(Local("gradient", 0.1, 1, 1)) == (5.0, 0.0)
    assert dpsgd(3.0).noise(Local("fedavg", 0.5, 4, 2)) == (1.5, 0.0)  # 0.5 * sqrt(4) * 3 / 2


def test_the_shares_in_a_sum_are_what_a_general_solver_finds():
    from scipy.optimize import minimize

    rng = stream(0, "shares")
    each = torch.randn(6, 30, generator=rng, dtype=torch.float64)
    sent = each[[1, 4]].sum(0) + torch.randn(30, generator=rng, dtype=torch.float64)
    gram, along = likelihood.products(each, sent)
    mine = likelihood.shares(gram, along, 2).numpy()
    solved = minimize(
        lambda x: ((x @ each.numpy() - sent.numpy()) ** 2).sum(), np.full(6, 1 / 3),
        bounds=[(0, None)] * 6, options={"ftol": 1e-14},
        constraints={"type": "eq", "fun": lambda x: x.sum() - 2},
    )  # fmt: skip
    assert mine.sum() == pytest.approx(2, abs=0.02), "the sum is one more equation, of weight 10"
    np.testing.assert_allclose(mine, solved.x, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("claim", candidates.CLAIMS, ids=lambda c: c.setting)
def test_its_claims_hold(claim):
    assert claim.least <= claim.measure(Photos().load()) <= claim.most

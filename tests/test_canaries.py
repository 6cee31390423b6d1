"""The audit's bound is the paper's, holds for honest mechanisms, and catches broken ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom

import defenses.dpsgd as dpsgd
from defenses.dpsgd import DPSGD
from defenses.noise import Noise
from defenses.prune import Prune
from fedsec import federation
from fedsec.canaries import Audit, audit, lower_bound, observe, p_value
from fedsec.checks import Refused
from fedsec.client import FedAvg, Gradient, mean_gradient
from fedsec.defense import Compose, Privacy, Training

DP = {"clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5}


# The bound


@pytest.mark.parametrize(("right", "made", "epsilon"), [(100, 100, 3.493), (900, 1000, 2.021)])
def test_known_bounds(right, made, epsilon):
    assert lower_bound(right, made, made, 0.0) == pytest.approx(epsilon, abs=5e-4)


def by_hand(right: int, made: int, confidence: float) -> float:
    """The epsilon whose randomized response is right so often with chance 1 - confidence."""

    def tail(epsilon: float) -> float:
        p = 1 / (1 + math.exp(-epsilon))
        return math.fsum(
            math.comb(made, k) * p**k * (1 - p) ** (made - k) for k in range(right, made + 1)
        )

    if tail(0.0) >= 1 - confidence:
        return 0.0
    return float(brentq(lambda e: tail(e) - (1 - confidence), 0, 50))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("right", "made"), [(9, 10), (60, 60), (75, 100), (290, 300)])
def test_without_delta_it_is_the_binomial_tail(right, made, confidence):
    expected = by_hand(right, made, confidence)
    # what was abstained from does not count
    assert lower_bound(right, made, 7 * made, 0.0, confidence) == pytest.approx(expected, abs=1e-5)


def test_with_delta_it_is_the_theorem_word_by_word():
    canaries, made, right, epsilon, delta = 90, 60, 52, 1.2, 1e-4
    w = binom(made, math.exp(epsilon) / (1 + math.exp(epsilon)))
    beta = sum(w.pmf(k) for k in range(right, made + 1))
    alpha = max(
        sum(w.pmf(k) for k in range(right - i, right)) / i for i in range(1, canaries + 1)
    )  # fmt: skip
    expected = beta + 2 * canaries * delta * alpha
    assert p_value(right, made, canaries, epsilon, delta) == pytest.approx(expected)
    assert p_value(right, made, canaries, epsilon, 0.0) == pytest.approx(beta)


def test_delta_and_abstentions_only_weaken_it():
    exact = lower_bound(95, 100, 100, 0.0)
    assert lower_bound(95, 100, 100, 1e-5) < exact
    assert lower_bound(95, 100, 1000, 1e-5) < lower_bound(95, 100, 100, 1e-5)
    assert lower_bound(50, 100, 100, 0.0) == 0.0
    assert lower_bound(0, 0, 100, 1e-5) == 0.0
    assert lower_bound(100, 100, 100, 0.5) == 0.0  # all of them may be given away outright


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (4.0, 0.0), (1.0, 1e-3)])
def test_randomized_response_is_not_contradicted_more_often_than_stated(epsilon, delta):
    """It is the mechanism for which the bound is exact; with chance delta it tells the truth."""
    rng, canaries, times = np.random.default_rng(0), 200, 2000
    true = rng.random((times, canaries)) < 1 / (1 + math.exp(-epsilon))
    right = (true | (rng.random((times, canaries)) < delta)).sum(1)
    bounds = {int(r): lower_bound(int(r), canaries, canaries, delta) for r in set(right)}
    over = np.mean([bounds[int(r)] > epsilon for r in right])
    assert over <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / times)
    if delta == 0:
        assert over >= 0.01  # and it is no looser than the steps of a count


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"right": 11}, "right"),
        ({"right": -1}, "right"),
        ({"made": 30}, "made"),
        ({"delta": 1.0}, "delta"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_refuses_counts_that_cannot_be(change, key):
    asked = {"right": 5, "made": 10, "canaries": 20, "delta": 0.0} | change
    with pytest.raises(Refused) as refusal:
        lower_bound(**asked)
    assert refusal.value.key == key


# The canaries


@pytest.mark.parametrize("place", ["vector", "scalars"])
@pytest.mark.parametrize("kind", [Gradient(lr=0.3, batch=6), FedAvg(lr=0.3, batch=6, steps=3)])
def test_a_canary_is_clipped_to_one_coordinate_of_norm_clip(place, kind):
    """Without noise and sampling: each that is in moves its own coordinate by clip / batch."""
    exact = DPSGD(clip=0.7, noise_multiplier=0.0, delta=1e-5)
    coins, shown = observe(place, exact, kind, 2, 6, seed=3)
    steps = 2 * kind.local.steps * (kind.lr if kind.local.kind == "fedavg" else 1.0)
    assert coins.any()
    assert not coins.all()
    assert torch.allclose(shown, coins.double() * steps * 0.7 / 6, rtol=1e-5, atol=1e-7)


def test_the_clients_own_sampler_draws_them():
    exact = DPSGD(clip=1.0, noise_multiplier=0.0, delta=1e-5)
    coins, shown = observe("vector", exact, Gradient(lr=1.0, batch=100), 50, 1000, seed=0)
    times = shown * 100  # how often each was drawn
    assert torch.allclose(times, times.round(), atol=1e-3)
    assert (times[~coins] == 0).all()
    rate = times[coins].mean() / 50
    assert abs(rate - 0.1) < 5 * math.sqrt(0.1 * 0.9 / (50 * int(coins.sum())))
    assert len(set(times[coins].round().tolist())) > 4  # binomial, not equal shares


# Honest mechanisms


def claimed(defense, client, rounds: int, examples: int, **more) -> Audit:
    """The audit of a defense's own claim."""
    training = Training(rounds * client.local.steps, examples, client.batch)
    claim = defense.privacy(training)
    return audit(defense, client, claim, rounds, examples, **more)


def test_an_honest_mechanism_is_contradicted_no_more_often_than_chance_allows():
    times = 50
    found = [
        claimed(DPSGD(**DP), Gradient(lr=0.1, batch=100), 4, 200, seed=seed, places=["vector"])
        for seed in range(times)
    ]
    assert sum(a.contradicts for a in found) <= binom.ppf(0.999, times, 0.05)
    assert any(a.epsilon > 0 for a in found)


def test_a_weak_honest_mechanism_shows_much_of_what_it_claims():
    weak = DPSGD(**DP | {"noise_multiplier": 0.5})
    found = claimed(weak, Gradient(lr=0.1, batch=1000), 1, 1000)
    assert 1.5 < found.epsilon < found.claim.epsilon
    assert not found.contradicts
    assert found.refused[0][0] == "statistics"
    assert "BatchNorm" in found.refused[0][1]


def test_local_steps_compositions_and_repeats_are_audited_too():
    alone = DPSGD(**DP | {"noise_multiplier": 1.0})
    noisy = Compose([alone, Prune(ratio=0.5), Noise(std=0.01, distribution="gaussian")])
    client = FedAvg(lr=0.1, batch=100, steps=4)
    for defense, repeats in ((alone, 1), (noisy, 2)):
        found = claimed(defense, client, 2, 300, repeats=repeats)
        assert not found.contradicts
        assert [look.canaries for look in found.looks] == [300 * repeats, 128 * repeats]


def test_equal_seeds_give_equal_audits():
    def one(seed: int):
        client = Gradient(lr=0.1, batch=50)
        return claimed(DPSGD(**DP), client, 2, 100, seed=seed, places=["vector"]).looks

    assert one(1) == one(1)
    assert [o.right for o in one(1)] != [o.right for o in one(2)]


# Broken ones, each of which breaks the claim of the honest one


class ForgetsTheNoise(DPSGD):
    def gradients(self, model, batch, rng, expected):
        return replace(DPSGD(**DP), noise_multiplier=0.0).gradients(model, batch, rng, expected)


class DividesTheNoiseTwice(DPSGD):
    """Noise of the mean's size is added to the sum: too little by the batch size."""

    def gradients(self, model, batch, rng, expected):
        less = replace(DPSGD(**DP), noise_multiplier=self.noise_multiplier / expected)
        return less.gradients(model, batch, rng, expected)


class ClipsTheBatch(DPSGD):
    """The batch's mean gradient is clipped instead of each example's."""

    def gradients(self, model, batch, rng, expected):
        mean = mean_gradient(model, batch)
        norm = torch.cat([g.flatten() for g in mean.values()]).norm()
        factor = (self.clip / norm).clamp(max=1.0)
        std = self.noise_std(expected)
        return {k: factor * g + std * dpsgd.normal_like(g, rng) for k, g in mean.items()}


class SkipsScalars(DPSGD):
    """As Flower 1.41 does: 0-dimensional tensors are neither clipped nor noised."""

    def gradients(self, model, batch, rng, expected):
        plain = mean_gradient(model, batch)
        private = super().gradients(model, batch, rng, expected)
        return {k: g if g.dim() else plain[k] for k, g in private.items()}


class NoisesNoScalars(DPSGD):
    """They are clipped, but the noise passes them over."""

    def gradients(self, model, batch, rng, expected):
        total = dpsgd.clipped_sum(model, batch, self.clip)
        std = self.noise_multiplier * self.clip
        return {
            k: (t + std * dpsgd.normal_like(t, rng) if t.dim() else t) / expected
            for k, t in total.items()
        }


class LetsStatisticsThrough(DPSGD):
    """Takes BatchNorm, and sends the running statistics as they are."""

    def check(self, model):
        pass

    def gradients(self, model, batch, rng, expected):
        if len(batch):
            model(batch.images)  # for its running statistics
        calm = model.eval()
        found = super().gradients(calm, batch, rng, expected)
        model.train()
        return found


class ForgetsEarlierRounds(DPSGD):
    def privacy(self, training):
        return super().privacy(replace(training, steps=1))


BROKEN = (
    (ForgetsTheNoise, "vector"),
    (DividesTheNoiseTwice, "vector"),
    (ClipsTheBatch, "vector"),
    (SkipsScalars, "scalars"),
    (NoisesNoScalars, "scalars"),
    (LetsStatisticsThrough, "statistics"),
)


@pytest.mark.parametrize(("broken", "place"), [(DPSGD, None), *BROKEN])
def test_a_broken_mechanism_is_caught_and_the_honest_one_is_not(broken, place):
    found = claimed(broken(**DP), Gradient(lr=0.1, batch=100), 20, 1000)
    assert found.claim.epsilon == pytest.approx(0.439, abs=1e-3)
    over = [look.place for look in found.looks if look.epsilon > found.claim.epsilon]
    assert found.contradicts == bool(over)
    if place is None:
        assert not over
    else:
        assert place in over
        assert found.epsilon > 2.5 * found.claim.epsilon


@pytest.mark.parametrize("accountant", [DPSGD, ForgetsEarlierRounds])
def test_an_accountant_that_forgets_earlier_rounds_is_caught(accountant):
    found = claimed(accountant(**DP), Gradient(lr=0.1, batch=100), 200, 1000, places=["vector"])
    assert found.contradicts == (accountant is ForgetsEarlierRounds)
    if found.contradicts:
        assert found.epsilon > 2.5 * found.claim.epsilon


@pytest.mark.parametrize("poisson", [True, False])
def test_sampling_that_is_not_what_the_accountant_assumes_is_caught(monkeypatch, poisson):
    """It assumes rate 0.1; the same tenth of the client's data is in every batch."""
    if not poisson:
        fixed = torch.arange(200)
        monkeypatch.setattr(federation, "draw", lambda spec, held, *rest: [fixed])
    client = Gradient(lr=0.1, batch=200)
    found = claimed(DPSGD(**DP), client, 200, 2000, places=["vector"])
    assert found.contradicts == (not poisson)
    if found.contradicts:
        assert found.epsilon > found.claim.epsilon + 0.3


# What is refused


def test_refuses_what_claims_nothing():
    nothing = Privacy(None, None, None, reason="no noise: noise_multiplier is 0")
    with pytest.raises(Refused, match=r"^defense: claims no epsilon .*no noise.*, got dpsgd$"):
        audit(DPSGD(**DP), Gradient(lr=0.1, batch=4), nothing, 1, 8)


@pytest.mark.parametrize("key", ["rounds", "examples", "repeats", "confidence"])
def test_refuses_settings_out_of_range(key):
    settings = {"rounds": 1, "examples": 8, "repeats": 1, "confidence": 0.95} | {
        key: 0 if key != "confidence" else 1.0
    }
    with pytest.raises(Refused) as refusal:
        audit(DPSGD(**DP), Gradient(lr=0.1, batch=4), Privacy(1.0, 1e-5, "PRV"), **settings)
    assert refusal.value.key == key

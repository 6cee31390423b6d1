"""OUTPOST perturbs where weights spread and gradients are large, ever more rarely."""

from __future__ import annotations

import math

import pytest
import torch
from test_defenses import DP, Scaled, batch_of, pruned_by_sorting

from defenses.dpsgd import DPSGD
from defenses.outpost import Outpost, risk
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_gradient
from fedsec.defense import Compose
from fedsec.rng import stream
from fedsec.types import Local

FIELDS = {"prune": 0.8, "scale": 0.8, "share": 0.4, "decay": 0.125}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaled().double()


def entry_by_entry(gradient) -> dict[str, list[bool]]:
    """Where noise belongs: Fisher information of each entry, ranked over all tensors."""
    fisher = {}
    for k, g in gradient.items():
        rows = g.reshape(len(g), -1) if g.dim() else g.reshape(1, 1)
        fisher[k] = [sum(float(r[i]) ** 2 for r in rows) / len(rows) for i in range(rows.shape[1])]
    ranked = sorted(f for values in fisher.values() for f in values)
    least = ranked[math.floor(0.6 * len(ranked)) - 1]
    return {k: [f > least for f in values] for k, values in fisher.items()}


def perturbs_as_it_says(defense: Outpost, model, draws: int = 400) -> bool:
    """Pruned as by sorting; noise of the right deviation at the right places, and nowhere else."""
    gradient = mean_gradient(model, batch_of(4))
    where, weights = entry_by_entry(gradient), dict(model.named_parameters())
    sent = [defense.perturb(model, batch_of(4), gradient, 0, stream(0, i)) for i in range(draws)]
    for k, g in gradient.items():
        clean = pruned_by_sorting(g, math.floor(0.8 * g.numel()))
        noise = torch.stack([s[k] for s in sent]) - clean
        rows = max(1, len(g)) if g.dim() else 1
        places = torch.tensor(where[k]).expand(rows, -1).reshape(g.shape)
        if noise[:, ~places].any():
            return False
        wanted = 0.8 * min(1.0, float(weights[k].detach().var())) if g.numel() > 1 else 0.0
        if places.any() and abs(noise[:, places].std() - wanted) > 0.15 * wanted:
            return False
    return True


class ReturnsTheGradient(Outpost):
    """As the authors' code."""

    def perturb(self, model, batch, gradient, step, rng):
        super().perturb(model, batch, gradient, step, rng)
        return gradient


class SameNoiseForAll(Outpost):
    def perturb(self, model, batch, gradient, step, rng):
        noisy = self.noisy(gradient)
        return {
            k: self._pruned(g) + 0.1 * noisy[k] * torch.randn(g.shape, generator=rng)
            for k, g in gradient.items()
        }


class NoiseEverywhere(Outpost):
    def noisy(self, gradient):
        return {k: torch.ones_like(g, dtype=torch.bool) for k, g in gradient.items()}


class NoiseWhereLittleIsSaid(Outpost):
    def noisy(self, gradient):
        return {k: ~places for k, places in super().noisy(gradient).items()}


def test_it_perturbs_by_risk_and_information(model):
    assert perturbs_as_it_says(Outpost(**FIELDS), model)
    for broken in (ReturnsTheGradient, SameNoiseForAll, NoiseEverywhere, NoiseWhereLittleIsSaid):
        assert not perturbs_as_it_says(broken(**FIELDS), model)


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (1, 8 / 9), (8, 0.5), (72, 0.1)])
def test_perturbed_steps_become_rare(model, step, share):
    gradient, defense = mean_gradient(model, batch_of(4)), Outpost(**FIELDS)
    plain = [
        defense.perturb(model, batch_of(4), gradient, step, stream(0, i)) is gradient
        for i in range(300)
    ]
    assert 1 - sum(plain) / 300 == pytest.approx(share, abs=5 * math.sqrt(0.25 / 300))
    assert share < 1 or not any(plain)


def test_a_client_sends_it_and_local_steps_are_counted(model):
    defense = Outpost(**FIELDS | {"decay": 1e12})  # only the first step is perturbed
    batches, local = [batch_of(4)] * 3, Local("fedavg", 0.1, 3, 4)
    seen = []

    class Spy(Outpost):
        def perturb(self, model, batch, gradient, step, rng):
            sent = super().perturb(model, batch, gradient, step, rng)
            seen.append((step, sent is gradient))
            return sent

    local_update(model, batches, Spy(**vars(defense)), local, client_streams(0, 0, 0), 4)
    assert seen == [(0, False), (1, True), (2, True)]
    one = local_update(model, batches[:1], defense, Local("gradient", 0.1, 1, 4),
                       client_streams(0, 0, 0), 4)[0]  # fmt: skip
    mask = defense.mask(one)
    assert all(torch.equal(m, one.tensors[k] != 0) for k, m in mask.items())
    assert not all(m.all() for m in mask.values())


def test_risk_is_a_variance_of_at_most_one():
    assert risk(torch.tensor([0.0, 1.0])) == 0.5
    assert risk(torch.tensor([0.0, 100.0])) == 1
    assert risk(torch.tensor(3.0)) == risk(torch.tensor([3.0])) == 0


def test_after_dpsgd_it_is_post_processing():
    Compose([DPSGD(**DP), Outpost(**FIELDS)])


@pytest.mark.parametrize(
    ("key", "value"),
    [("prune", 1.0), ("prune", math.nan), ("scale", -1.0), ("scale", math.inf), ("share", 1.1),
     ("share", math.nan), ("decay", -0.1)],
)  # fmt: skip
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(Refused) as refusal:
        Outpost(**FIELDS | {key: value})
    assert refusal.value.key == key

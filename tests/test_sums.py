"""Defenses whose server uses the clients' sum alone: user-level privacy and secure aggregation.

Each property is a check that the defense passes and a broken version of it does not.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from test_defenses import Scaled, batch_of, flat, update_of
from test_federation import FEDAVG, GRADIENT, INLINE, Net, Noise, built, job, run
from torch import nn

from defenses.dpsgd import DPSGD
from defenses.prune import Prune
from defenses.quantize import Quantize
from defenses.secagg import RING, SecAgg
from defenses.sign import Sign
from defenses.userdp import UserDP
from fedsec.canaries import audit
from fedsec.checks import Refused
from fedsec.client import client_streams, local_update, mean_update
from fedsec.defense import Compose, Training
from fedsec.federation import Site, summed
from fedsec.privacy import gaussian_epsilon
from fedsec.rng import stream
from fedsec.threat import ThreatModel
from fedsec.types import Local, Party, Update

CENTRAL = UserDP(clip=0.5, noise_multiplier=1.5, delta=1e-5, place="central")
LOCAL = replace(CENTRAL, place="local")
MASKED = SecAgg(bound=4.0, bits=18)
PLAIN = Net(norm=False)  # running statistics would travel bare
KINDS = pytest.mark.parametrize("client", [GRADIENT, FEDAVG], ids=["gradient", "fedavg"])


def norm(tensors) -> float:
    return float(flat(tensors).double().norm())


# ---------------------------------------------------------------- user-level privacy


class ScalarsEscape(UserDP):
    """As Flower's own clipping and noise in 1.41 and 1.42."""

    def update(self, update, rng):
        sent = super().update(update, rng).tensors
        return replace(update, tensors={k: t if t.dim() else update.tensors[k]
                                        for k, t in sent.items()})  # fmt: skip


class CountersCount(UserDP):
    """Likewise: the counters of BatchNorm are part of the norm."""

    def update(self, update, rng):
        both = {**update.tensors, **{k: b.float() for k, b in update.buffers.items()}}
        return replace(update, tensors={k: self.expected(both)[k] for k in update.tensors})


class EachTensorByItself(UserDP):
    def expected(self, tensors):
        own = super().expected
        return {k: own({k: t})[k] for k, t in tensors.items()}


class ZerosFail(UserDP):
    def expected(self, tensors):
        scale = min(1.0, self.clip / norm(tensors))
        return {k: t * scale for k, t in tensors.items()}


def bounded(defense: UserDP) -> bool:
    """What is sent has a norm of at most clip, the update's direction, and all of it if short."""
    long = update_of()
    long = replace(long, tensors={**long.tensors, "scalar": torch.tensor(100.0)})
    counter = {"norm.num_batches_tracked": torch.tensor(1_000_000)}
    for update in (long, replace(long, buffers=counter)):
        sent = defense.update(update, stream(0)).tensors
        if norm(sent) > defense.clip * (1 + 1e-6):
            return False
        along = flat(sent) @ flat(update.tensors) / norm(sent) / norm(update.tensors)
        if along < 1 - 1e-6 or norm(sent) < defense.clip * (1 - 1e-6):
            return False
    short = {k: 1e-3 * t for k, t in update_of().tensors.items()}
    zeros = {k: 0 * t for k, t in short.items()}
    for tensors in (short, zeros):
        try:
            sent = defense.update(Update(tensors, counter, 4), stream(0)).tensors
        except ZeroDivisionError:
            return False
        if not torch.equal(flat(sent), flat(tensors)):
            return False
    return True


def hidden(defense: UserDP, draw) -> bool:
    """Noise of unit deviation, once scaled, on every entry: 0-dimensional ones too."""
    noise = torch.stack([flat(draw(stream(1, i))) for i in range(400)])
    each = (noise.std(0) - 1).abs().max() < 6 / math.sqrt(800)
    correlation = (noise.T @ noise / 400).fill_diagonal_(0).abs().max()
    return bool(each and correlation < 6 / math.sqrt(400))


@pytest.mark.parametrize("broken", [ScalarsEscape, CountersCount, EachTensorByItself, ZerosFail])
def test_a_client_is_bounded_and_what_leaves_one_unbounded_is_found(broken):
    assert bounded(CENTRAL)
    assert not bounded(broken(**vars(CENTRAL)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_sent_as_zeros(bad):
    update = update_of()
    update.tensors["w"][0, 0, 0] = bad
    assert not flat(CENTRAL.update(update, stream(0)).tensors).any()


def test_the_noise_is_on_every_entry_of_the_release_or_of_each_update():
    mean, clients = update_of(), 5

    def released(rng):
        noisy = CENTRAL.release(mean, clients, rng).tensors
        return {k: (noisy[k] - t) / (1.5 * 0.5 / clients) for k, t in mean.tensors.items()}

    def sent(rng, defense=LOCAL):
        noisy, plain = defense.update(mean, rng).tensors, CENTRAL.update(mean, rng).tensors
        return {k: (noisy[k] - t) / (1.5 * 0.5) for k, t in plain.items()}

    assert hidden(CENTRAL, released)
    assert hidden(LOCAL, sent)
    assert LOCAL.release(mean, clients, stream(0)) is mean
    assert not hidden(LOCAL, partial(sent, defense=ScalarsEscape(**vars(LOCAL))))
    assert CENTRAL.noise(Local("gradient", 0.1)) == (0.0, 0.0)
    assert LOCAL.noise(Local("gradient", 0.1)) == (0.75, 0.0)


@KINDS
def test_a_learnable_scalar_is_clipped_with_the_rest_of_a_real_update(client):
    model = Scaled().double()
    sent, _ = local_update(
        model, [batch_of(4)] * client.local.steps, replace(CENTRAL, clip=1e-3), client.local,
        client_streams(0, 0, 0), 4,
    )  # fmt: skip
    assert norm(sent.tensors) == pytest.approx(1e-3, rel=1e-6)
    assert sent.count == 1


@KINDS
def test_without_noise_and_with_a_loose_clip_it_is_the_plain_federation(client):
    loose = UserDP(clip=1e6, noise_multiplier=0.0, delta=1e-5, place="central")
    plain = run(job(model=PLAIN, client=client))
    for defense in (loose, replace(loose, place="local")):
        same = run(job(model=PLAIN, client=client, defense=defense))
        for a, b in zip(plain.model.parameters(), same.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@KINDS
def test_the_server_steps_along_the_noise_and_sees_updates_without(client):
    loud = UserDP(clip=1.0, noise_multiplier=200.0, delta=1e-5, place="central")
    quiet = replace(loud, noise_multiplier=0.0)
    one = {"model": PLAIN, "client": client, "rounds": 1, "attack_rounds": (0,)}
    a, b = (run(job(defense=d, **one)) for d in (loud, quiet))
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    apart = torch.cat([(p - q).detach().flatten() for p, q in pairs])
    length = client.lr if client is GRADIENT else 1.0
    assert float(apart.std()) == pytest.approx(length * 200 / 3, rel=0.2)
    for noisy, plain in zip(a.exchanges, b.exchanges, strict=True):
        assert torch.equal(flat(noisy.update.tensors), flat(plain.update.tensors))
        assert norm(noisy.update.tensors) <= 1 + 1e-6
        assert noisy.aggregate is not None
        assert norm(noisy.aggregate.tensors) <= 1 + 1e-6
    local = run(job(defense=replace(loud, place="local"), **one))
    assert all(norm(e.update.tensors) > 100 for e in local.exchanges)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_every_linear_strategy_steps_along_the_released_mean(strategy):
    defense = UserDP(clip=1e6, noise_multiplier=0.0, delta=1e-5, place="central")
    federation = replace(INLINE, strategy=strategy)
    same, plain = (
        run(job(model=PLAIN, federation=federation, defense=d)).model.parameters()
        for d in (defense, Prune(ratio=0.0))
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(same, plain, strict=True))


def test_it_says_whom_its_epsilon_protects():
    training = Training(steps=40, examples=500, batch=10, per_update=4, clients=4)
    central, local = CENTRAL.privacy(training), LOCAL.privacy(training)
    assert (central.unit, local.unit) == ("client", "client")
    assert central.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(10) / 1.5, 1e-5))
    assert local.epsilon == pytest.approx(gaussian_epsilon(2 * math.sqrt(10) / 1.5, 1e-5))
    assert central.against == "who sees released models, not the server"
    assert local.against == "who sees every update"
    assert "replaced by zero" in central.neighbours
    assert "any other" in local.neighbours
    assert central.epsilon <= dict(central.others)["PRV"] <= dict(central.others)["RDP"]
    for change, training_ in (
        ({"noise_multiplier": 0.0}, training),
        ({"noise_multiplier": 1e-9}, training),
        ({"delta": 0.3}, training),
    ):
        refused = replace(CENTRAL, **change).privacy(training_)
        assert refused.epsilon is None
        assert refused.reason


def test_the_gaussian_epsilon_is_the_inverse_of_its_delta():
    from scipy.stats import norm as normal

    for mu in (0.05, 0.5, 1.0, 4.0):
        for e in (0.01, 0.3, 2.0, 9.0):
            delta = normal.cdf(mu / 2 - e / mu) - math.exp(e) * normal.cdf(-mu / 2 - e / mu)
            if delta > 1e-12:
                assert gaussian_epsilon(mu, float(delta)) == pytest.approx(e, rel=1e-3)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(1.0, 0.9) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf


def test_the_audit_refuses_a_claim_about_clients():
    claim = CENTRAL.privacy(Training(steps=2, examples=50, batch=5, clients=4))
    with pytest.raises(Refused, match="for a whole client"):
        audit(CENTRAL, GRADIENT, claim, rounds=2, examples=50)


# ---------------------------------------------------------------- secure aggregation


class OneMask(SecAgg):
    """The same masks in every sum."""

    def seal(self, update, party):
        return super().seal(update, replace(party, round=0, session=("train",)))


class NoMask(SecAgg):
    def seal(self, update, party):
        return super().seal(update, replace(party, client=0, clients=1))


class SmallMask(SecAgg):
    """Masks that hide little more than the entries' own size."""

    def seal(self, update, party):
        sealed = super().seal(update, party)
        bare = super().seal(update, replace(party, client=0, clients=1))
        return replace(sealed, tensors={k: b + (sealed.tensors[k] - b) / 64
                                        for k, b in bare.tensors.items()})  # fmt: skip


def big(seed: int, size: int = 40_000) -> Update:
    """Small entries with a pattern, as gradients are."""
    entries = 0.01 * torch.randn(size, generator=stream(seed, "big")) + 0.2
    return Update({"w": entries, "scalar": torch.tensor(0.7)}, {}, 5)


def party(client: int, clients: int = 3, round: int = 0, *session) -> Party:
    return Party(client, clients, 0, round, session or ("train",))


def uniform(defense: SecAgg, entries) -> bool:
    """Chi-squared over 64 equal bins of the ring, at one in ten thousand."""
    from scipy.stats import chisquare

    share = (entries.double() / (RING * defense.step) + 0.5).clamp(0, 1 - 1e-12)
    return chisquare((share * 64).long().bincount(minlength=64)).pvalue > 1e-4


def secret(defense: SecAgg) -> bool:
    """One message is uniform whatever it says, and so is the difference of any two of a client's.

    Of the same masks on two updates the difference would be that of the updates.
    """
    read = defense._read
    parties = (
        party(1),
        party(1, 3, 1),
        party(1, 3, 0, "probe", 0, 0),
        party(1, 3, 0, "probe", 1, 0),
    )
    sent = [defense.seal(u, p).tensors["w"] for u in (big(0), big(1)) for p in parties]
    others = [(a, b) for i, a in enumerate(sent[:4]) for b in sent[4 + i + 1 :]]
    apart = [read(((a - b).double() / defense.step).round().long(), a) for a, b in others]
    return all(uniform(defense, each) for each in (*sent, *apart))


@pytest.mark.parametrize("broken", [OneMask, NoMask, SmallMask])
def test_a_single_message_says_nothing_and_what_says_something_is_found(broken):
    assert secret(MASKED)
    assert not secret(broken(**vars(MASKED)))


@pytest.mark.parametrize("bound", [8.0, 0.3, 1 / 3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_of_the_ring_survive_their_floats(bound, dtype):
    defense = SecAgg(bound=bound, bits=20)
    ends = [0, 1, -1, RING // 2 - 1, RING // 2 - 2, -RING // 2, -RING // 2 + 1]
    some = torch.randint(-RING // 2, RING // 2, (100_000,), generator=stream(0))
    whole = torch.cat([torch.tensor(ends), some])
    assert torch.equal(defense._ring(defense._read(whole, torch.zeros(1, dtype=dtype))), whole)


@pytest.mark.parametrize("clients", [2, 3, 15])
@pytest.mark.parametrize("bits", [4, 20])
def test_the_mean_is_the_plain_one_to_the_rounding(clients, bits):
    defense = SecAgg(bound=1.5, bits=bits)
    updates = [update_of(seed) for seed in range(clients)]  # some entries exceed the bound
    sent = [defense.seal(u, party(i, clients)) for i, u in enumerate(updates)]
    cut = [replace(u, count=1, buffers={}, tensors=defense.expected(u.tensors)) for u in updates]
    mean = defense.mean([replace(s, buffers={}) for s in sent])
    apart = (flat(mean.tensors) - flat(mean_update(cut).tensors)).abs().max()
    assert apart <= defense.step + 1e-6
    opened = [defense.opened(s, party(i, clients)) for i, s in enumerate(sent)]
    dumb = [torch.trunc(flat(c.tensors).double() / defense.step) * defense.step for c in cut]
    for own, plain in zip(opened, dumb, strict=True):
        assert torch.allclose(flat(own.tensors).double(), plain, atol=1e-6)
    assert torch.allclose(flat(mean.tensors).double(), sum(dumb) / clients, atol=1e-6)
    assert all(norm(o.tensors) <= norm(c.tensors) for o, c in zip(opened, cut, strict=True))


def test_without_one_message_there_is_no_sum():
    sent = [MASKED.seal(big(seed), party(seed)) for seed in range(3)]
    assert not uniform(MASKED, MASKED.mean(sent).tensors["w"] * 3)
    assert uniform(MASKED, MASKED.mean(sent[:2]).tensors["w"] * 2)


@KINDS
def test_a_masked_federation_trains_like_the_plain_one(client):
    plain, masked = (run(job(model=PLAIN, client=client, defense=d))
                     for d in (Prune(ratio=0.0), MASKED))  # fmt: skip
    for a, b in zip(plain.model.parameters(), masked.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=3 * 3 * MASKED.step)
    local = Local("gradient", 0.1, clients=3)
    assert MASKED.noise(local)[0] < MASKED.step < 1e3 * MASKED.step < MASKED.noise(LOCAL_ONE)[0]
    assert all(norm(e.update.tensors) > 1e3 * norm(p.update.tensors)
               for e, p in zip(masked.exchanges, plain.exchanges, strict=True))  # fmt: skip


LOCAL_ONE = Local("gradient", 0.1)


@KINDS
def test_what_is_seen_of_the_sum_is_the_plain_sum(client):
    """Of a round whose probe stands in for a client, and of probes of all clients together."""
    probes = tuple((c, (c + 3 * turn,)) for turn in range(2) for c in range(3))
    both = [run(job(model=PLAIN, client=client, defense=d, probes=probes, attack_rounds=(0,)))
            for d in (Prune(ratio=0.0), MASKED)]  # fmt: skip
    for plain, masked in zip(*(summed(r.exchanges, 3) for r in both), strict=True):
        seen = ThreatModel(grants=("aggregate",)).observe([masked]).aggregate
        apart = flat(seen.tensors) - flat(plain.update.tensors)
        assert apart.abs().max() <= MASKED.step + 1e-6
        assert masked.local.clients == 3
    kept = [run(job(model=PLAIN, client=client, defense=d, keep_training=True, attack_rounds=(0,)))
            for d in (Prune(ratio=0.0), MASKED)]  # fmt: skip
    for plain, masked in zip(*(summed(r.exchanges, None) for r in kept), strict=True):
        apart = flat(masked.update.tensors) - flat(plain.update.tensors)
        assert apart.abs().max() <= MASKED.step + 1e-6
    own, others = both[1].exchanges[0], kept[1].exchanges[1:]
    assert own.aggregate is not None
    opened = [MASKED.opened(e.update, site(e, client)) for e in others]
    alone = MASKED.opened(own.update, Party(0, 3, 0, 0, ("probe", 0, 0)))
    hand = mean_update([alone, *opened])
    assert torch.allclose(flat(own.aggregate.tensors), flat(hand.tensors), atol=1e-6)


def site(exchange, client) -> Party:
    return Party(exchange.clients[0], 3, 0, exchange.round, ("train",))


def test_no_two_updates_of_a_client_share_masks():
    probes = ((0, (1,)), (2, (5, 7)), (0, (2,)), (0, (3,)))
    of = Site(job(model=PLAIN, probes=probes), job().dataset.load())
    sums = [(0, None, 0), (1, None, 0), *((0, p, q) for p in (0, 2, 3) for q in (0, 1))]
    assert len({of.party(0, *which) for which in sums}) == len(sums)
    assert of.party(0, 0, 0) == replace(of.party(2, 0, 1), client=0), "one sum, of all clients"


# ---------------------------------------------------------------- together


def test_a_clipped_masked_federation_keeps_both_promises():
    both = Compose((CENTRAL, MASKED))
    training = Training(steps=3, examples=14, batch=5, clients=3)
    assert both.privacy(training) == CENTRAL.privacy(training)
    found = run(job(model=PLAIN, defense=both))
    sums = [e.aggregate for e in found.exchanges]
    assert all(norm(s.tensors) <= CENTRAL.clip * (1 + 1e-6) for s in sums)
    assert all(norm(e.update.tensors) > 100 for e in found.exchanges)


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        (
            (CENTRAL, Prune(ratio=0.5)),
            "userdp bounds what is sent, which prune would change; name it after",
        ),
        ((MASKED, SecAgg(bound=1.0, bits=8)), "at most one defense may mask updates"),
    ],
)
def test_parts_that_would_break_a_promise_are_refused(parts, rule):
    with pytest.raises(Refused, match=rule):
        Compose(parts)
    Compose((LOCAL, Prune(ratio=0.5)))  # after the noise, all is allowed


@pytest.mark.parametrize("defense", [CENTRAL, LOCAL, MASKED], ids=["central", "local", "secagg"])
def test_running_statistics_are_refused(defense):
    with pytest.raises(Refused) as refusal:
        run(job(defense=defense))
    assert refusal.value.key == "model.norm"
    assert "use model.norm=group or model.norm=none" in str(refusal.value)
    defense.check(built(job(model=PLAIN)))
    with pytest.raises(Refused, match="krum"):
        run(job(model=PLAIN, defense=defense, federation=replace(INLINE, strategy="krum")))


def test_too_few_and_too_many_clients_are_refused():
    with pytest.raises(Refused, match="clients: must be at least 2 with secagg"):
        run(job(model=PLAIN, defense=MASKED, clients=1, probes=()))
    MASKED.check_clients(63)
    with pytest.raises(Refused, match="at most 63 with secagg at 18 bits"):
        MASKED.check_clients(64)


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        (UserDP, {"clip": 0.0}, "clip"),
        (UserDP, {"clip": math.inf}, "clip"),
        (UserDP, {"noise_multiplier": -1.0}, "noise_multiplier"),
        (UserDP, {"delta": 1.0}, "delta"),
        (UserDP, {"place": "here"}, "place"),
        (SecAgg, {"bound": math.nan}, "bound"),
        (SecAgg, {"bits": 1}, "bits"),
        (SecAgg, {"bits": 23}, "bits"),
    ],
)
def test_values_out_of_range_are_refused(kind, fields, key):
    with pytest.raises(Refused) as refusal:
        kind(**(vars(CENTRAL if kind is UserDP else MASKED) | fields))
    assert refusal.value.key == key


def test_a_run_says_that_its_epsilon_is_a_clients(tmp_path, monkeypatch, capsys):
    line = tiny.words(tmp_path, "defense=userdp", "model=mlp", "model.hidden=[8]")
    assert tiny.call(monkeypatch, line) == 0
    said = capsys.readouterr().out
    assert "(Gaussian, one client)" in said
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    claim = found["privacy"]
    assert (claim["unit"], claim["against"]) == ("client", CENTRAL.privacy(
        Training(1, 10, 1)).against)  # fmt: skip
    assert "formal_update" not in claim
    assert any("[epsilon-not-for-the-server]" in flag for flag in found["flags"])


# ---------------------------------------------------------------- bytes


def test_bytes_of_coarse_entries():
    """A bit for a sign, two with zeros; `bits` for a step; four bytes for a tensor's scale."""
    plain = Update({"w": torch.linspace(-1, 1, 1000), "b": torch.tensor(0.5)}, {}, 1)
    sign, coarse = Sign(scale="mean"), Quantize(bits=4, rounding="nearest")
    assert sign.bytes(sign.update(plain, stream(0))) == 125 + 4 + 1 + 4
    some = Update({"w": torch.tensor([0.0, 1.0, -2.0, 0.0])}, {}, 1)
    assert sign.bytes(sign.update(some, stream(0))) == 1 + 4
    assert coarse.bytes(coarse.update(plain, stream(0))) == 500 + 4 + 1 + 4
    fine = Quantize(bits=16, rounding="nearest")
    assert fine.bytes(fine.update(plain, stream(0))) == 2000 + 4 + 2 + 4
    for defense in (sign, coarse):  # what it did not make does not fit its encoding
        assert defense.bytes(plain) == 4 * 1001
    both = Compose((Prune(ratio=0.9), sign))
    assert both.bytes(both.update(plain, stream(0))) == 250 + 4 + 1 + 4


def test_noise_of_an_own_draw_is_known_after_another_part():
    local = Local("gradient", 1.0, 1, 1)
    masks = SecAgg(bound=8.0, bits=20)
    assert LOCAL.noise(local)[0] > 0
    assert Compose((LOCAL,)).noise(local) == LOCAL.noise(local)
    known = math.hypot(LOCAL.noise(local)[0], masks.noise(local)[0]), 0.0
    assert Compose((LOCAL, masks)).noise(local) == known  # masks come last, wherever they stand
    assert Compose((masks, LOCAL)).noise(local) == known
    rounded = Compose((LOCAL, Quantize(bits=4, rounding="nearest")))
    assert rounded.noise(local) == (0.0, 0.0)


def test_bytes_are_those_of_the_natural_encoding():
    dense = Update({"w": torch.ones(1000), "s": torch.tensor(1.0)}, {"n": torch.tensor(3)}, 1)
    few = replace(dense, tensors={"w": torch.eye(1000)[0], "s": torch.tensor(1.0)})
    assert CENTRAL.bytes(dense) == 4 * 1001 + 8
    assert MASKED.bytes(dense) == 3 * 1001
    prune = Prune(ratio=0.9)
    assert prune.bytes(few) == 2 * (4 + 4) + 8, "values and where they stand"
    half = replace(dense, tensors={"w": (torch.arange(1000) % 2).float()})
    assert prune.bytes(half) == 500 * 4 + 125 + 8, "a bit for each entry"
    assert prune.bytes(dense) == 4 * 1001 + 8, "nothing was dropped"
    assert Compose(()).bytes(dense) == 4 * 1001 + 8
    assert Compose((prune, Noise())).bytes(few) == prune.bytes(few)
    assert Compose((prune, MASKED)).bytes(dense) == 3 * 1001


def test_a_federation_counts_what_its_clients_send():
    plain, pruned = (run(job(model=PLAIN, defense=d)) for d in (DPSGD(
        clip=1.0, noise_multiplier=1.0, delta=1e-5), Prune(ratio=0.75)))  # fmt: skip
    entries = sum(p.numel() for p in plain.model.parameters())
    assert plain.sent_bytes == 4 * entries
    assert 0.25 * 4 * entries < pruned.sent_bytes < 0.35 * 4 * entries
    assert plain.seconds_per_round is not None
    assert plain.seconds_per_round > 0
    none = run(job(model=PLAIN, rounds=0, attack_rounds=(0,)))
    assert (none.seconds_per_round, none.sent_bytes) == (None, None)
    assert isinstance(plain.model, nn.Module)


def test_equal_counts_do_not_make_a_batch_one_image():
    """Clipping of one example keeps the update's direction, of a batch's examples it does not."""
    from fedsec import engine

    dpsgd = DPSGD(clip=0.1, noise_multiplier=0.0, delta=1e-5)
    both = Compose((dpsgd, CENTRAL))
    probes = ((0, (1, 2, 3)), (0, (4,)))
    found = run(job(model=PLAIN, defense=both, probes=probes, attack_rounds=(0,)))
    knows = []
    for exchange in found.exchanges:
        grants = ("model", "update", "count", "shape", "local", "mode", "defense")
        seen = ThreatModel(grants=grants).observe([exchange])
        targets = torch.zeros(1, seen.count, 4)
        lanes = engine._Lanes(seen, targets, engine.spectral(steps=1, lr=0.1, priors=()))
        knows.append(lanes.per_example is not None)
    assert knows == [True, False]

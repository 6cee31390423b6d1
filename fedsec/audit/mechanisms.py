"""What the messages show of privacy mechanisms, against what the app's own settings claim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedsec.audit.claims import CENTRAL, CLIP, LOCAL
from fedsec.audit.findings import INFERRED, MEASURED, Finding, found
from fedsec.audit.traffic import Claim, Mechanism, Traffic, Trained
from fedsec.privacy import gaussian_epsilon

SURE = 5.0  # standard deviations that a measured noise may fall short by chance
SHARE = 0.01  # of the squared norm: what a counter may take
WITHIN = 1.001  # of an epsilon: rounding


@dataclass(frozen=True)
class Promise:
    """An epsilon that somebody states for the whole run."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Tensor:
    """What was measured on one tensor over all replies."""

    name: str
    seen: tuple[Mechanism, ...]

    @property
    def noise(self) -> float:
        """Standard deviation, pooled."""
        entries = sum(m.size for m in self.seen)
        return math.sqrt(sum(m.size * m.noise**2 for m in self.seen) / entries)

    @property
    def entries(self) -> int:
        return sum(m.size for m in self.seen)

    @property
    def untouched(self) -> int:
        """Replies that hold it just as it was computed, although it had changed."""
        return sum(m.untouched and m.before > 0 for m in self.seen)


def tensors(traffic: Traffic) -> list[Tensor]:
    seen: dict[str, list[Mechanism]] = {}
    for trained in traffic.trained:
        for name, mechanism in trained.reply.watched.mechanisms.items():
            seen.setdefault(name, []).append(mechanism)
    return [Tensor(name, tuple(each)) for name, each in seen.items()]


def sigma(claim: Claim) -> float:
    """The deviation of LocalDpMod's noise, by its own formula."""
    sensitivity, epsilon, delta = _settings(claim, "sensitivity", "epsilon", "delta")
    if not (epsilon > 0 and 0 < delta < 1.25):
        return math.nan
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def composed(claim: Claim, rounds: int, delta: float) -> float:
    """Epsilon of so many rounds at `delta`: exact for the Gaussian mechanism."""
    (sensitivity,) = _settings(claim, "sensitivity")
    noise = sigma(claim)
    if not (noise > 0 and 0 < delta < 1):
        return math.inf
    return gaussian_epsilon(sensitivity / noise * math.sqrt(rounds), delta)


def judged(traffic: Traffic, promise: Promise | None = None) -> list[Finding]:
    """Every finding about the mechanisms that the app switches on."""
    measured = tensors(traffic)
    findings: list[Finding] = []
    for claim in traffic.about.claims:
        if claim.kind in (LOCAL, CLIP, CENTRAL):
            findings += _scalars(claim, traffic, measured)
        if claim.kind in (LOCAL, CLIP):
            findings += _counters(claim, measured)
        if claim.kind == LOCAL:
            findings += _noise(claim, measured)
            findings += _sensitivity(claim)
            findings += _formula(claim)
            findings += _composition(claim, traffic, promise)
    return findings


def _settings(claim: Claim, *keys: str) -> list[float]:
    values = [claim.settings.get(key) for key in keys]
    return [float(v) if isinstance(v, int | float) else math.nan for v in values]


def _scalars(claim: Claim, traffic: Traffic, measured: Sequence[Tensor]) -> Iterator[Finding]:
    escaped = [t for t in measured if t.untouched and not t.seen[0].counter]
    for tensor in escaped:
        first = next(m for m in tensor.seen if m.untouched and m.before > 0)
        evidence = [
            f"{claim.name} left {tensor.name} just as the client computed it, in "
            f"{tensor.untouched} of {len(tensor.seen)} replies",
            f"its change of {first.before:.4g} was neither clipped (factor {first.factor:.3g} "
            f"for the rest) nor noised",
        ]
        yield found("dp-scalar", tensor.name, evidence, MEASURED)
    if not measured or claim.kind == CENTRAL:
        for name in _shapeless(traffic.whole):
            version = traffic.about.versions.get("flwr")
            evidence = [
                f"{name} has shape []; {claim.name} of flwr {version} clips and noises arrays in "
                "place, which NumPy scalars ignore",
            ]
            yield found("dp-scalar", name, evidence, INFERRED)


def _shapeless(whole: Sequence[Trained]) -> list[str]:
    """0-dimensional floating point tensors of the replies, which changed."""
    names = [
        name
        for t in whole
        for name, change in t.change.items()
        if change.shape == () and t.got[name].dtype.kind == "f" and change != 0
    ]
    return list(dict.fromkeys(names))


def _counters(claim: Claim, measured: Sequence[Tensor]) -> Iterator[Finding]:
    counters = [t for t in measured if t.seen[0].counter]
    for turn in range(len(measured[0].seen)) if measured else ():
        each = [t.seen[turn] for t in measured if turn < len(t.seen)]
        total = sum(m.before**2 for m in each)
        share = sum(m.before**2 for m in each if m.counter) / total if total else 0.0
        if counters and share > SHARE:
            factor = next(m.factor for m in each)
            evidence = [
                f"{', '.join(t.name for t in counters[:3])}: {100 * share:.1f} % of the squared "
                f"norm that {claim.name} clips; the rest is scaled by {factor:.3g}"
            ]
            yield found("dp-counter", counters[0].name, evidence, MEASURED)
            return


def _noise(claim: Claim, measured: Sequence[Tensor]) -> Iterator[Finding]:
    expected = sigma(claim)
    for tensor in measured:
        if tensor.seen[0].counter or tensor.untouched or not expected > 0:
            continue
        least = expected * (1 - SURE / math.sqrt(2 * tensor.entries))
        if tensor.noise < least:
            evidence = [
                f"{claim.name} claims noise of deviation {expected:.4g}; {tensor.name} has "
                f"{tensor.noise:.4g} over {tensor.entries} entries"
            ]
            yield found("dp-noise", tensor.name, evidence, MEASURED)


def _sensitivity(claim: Claim) -> Iterator[Finding]:
    clip, sensitivity = _settings(claim, "clipping_norm", "sensitivity")
    if sensitivity < 2 * clip:
        evidence = [f"{claim.name}: sensitivity {sensitivity:g}, clipping_norm {clip:g}: two "
                    f"clipped updates may differ by {2 * clip:g}"]  # fmt: skip
        severity = "high" if sensitivity < clip else "medium"
        yield found("dp-sensitivity", claim.name, evidence, INFERRED, severity)


def _formula(claim: Claim) -> Iterator[Finding]:
    epsilon, delta = _settings(claim, "epsilon", "delta")
    exact = composed(claim, 1, delta)
    if exact > WITHIN * epsilon:
        evidence = [f"{claim.name}: epsilon {epsilon:g} at delta {delta:g} claimed for one round; "
                    f"exactly it is {exact:.4g}"]  # fmt: skip
        yield found("dp-formula", claim.name, evidence, MEASURED)


def _composition(claim: Claim, traffic: Traffic, promise: Promise | None) -> Iterator[Finding]:
    rounds = most_rounds(traffic)
    epsilon, delta = _settings(claim, "epsilon", "delta")
    stated, delta = (promise.epsilon, promise.delta) if promise else (epsilon, delta)
    total = composed(claim, rounds, delta)
    if rounds > 1 and total > WITHIN * stated:
        whose = "--claim says" if promise else f"{claim.name} says"
        evidence = [
            f"{whose} epsilon {stated:g} at delta {delta:g}; one client took part in {rounds} "
            f"rounds, which is {total:.4g} together (exact for the Gaussian mechanism)"
        ]
        yield found("dp-composition", claim.name, evidence, MEASURED)


def most_rounds(traffic: Traffic) -> int:
    """Rounds that the client which took part most often took part in."""
    parts: dict[int, set[int]] = {}
    for trained in traffic.trained:
        parts.setdefault(trained.client, set()).add(trained.round)
    return max((len(rounds) for rounds in parts.values()), default=0)

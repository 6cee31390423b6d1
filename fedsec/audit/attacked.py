"""What fedsec's own attacks reconstruct from an app's updates, against what its clients trained on.

The private side is heard by PyTorch's hooks (`watch`), or loaded by a function that the user names;
it stays in this process, and no recording holds it. The attacks get an `Observation` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedsec import match, metrics
from fedsec.attack import Attack
from fedsec.audit.findings import MEASURED, Finding, found
from fedsec.audit.traffic import Traffic, Trained
from fedsec.checks import Refused
from fedsec.client import buffers, parameters
from fedsec.defense import Defense
from fedsec.models import BatchNorm2d, Normalise
from fedsec.rng import stream
from fedsec.stats import MARGIN
from fedsec.threat import ThreatModel
from fedsec.types import Batch, Exchange, Local, Update


@dataclass(frozen=True)
class Truth:
    """What one client trained on for one reply, and with which network."""

    round: int
    client: int
    model: nn.Module  # before the first step
    inputs: Float[Tensor, "n *shape"]  # as the network gets them
    labels: Int[Tensor, " n"]
    batches: tuple[int, ...]  # of each step
    lr: float
    optimiser: str


@dataclass(frozen=True)
class Plan:
    """Which attack tries which updates."""

    name: str
    attack: Attack
    threat: ThreatModel
    rounds: tuple[int, ...]
    victims: int  # updates of a round that are attacked
    seed: int
    defense: Defense = field(default_factory=Defense)  # that the clients use, and attacks know


class Network(nn.Module):
    """An app's network as attacks take one: images in [0, 1], which it normalises for itself."""

    def __init__(self, network: nn.Module, low: float, high: float, shape: Sequence[int]):
        super().__init__()
        scale = 1 / (high - low)
        channels = shape[0] if len(shape) == 3 else 1
        self.normalise = Normalise([-low * scale] * channels, [scale] * channels)
        self.network, self.shape = _functional(network), tuple(shape)

    def forward(self, images: Tensor) -> Tensor:
        inputs = self.normalise(images)
        return self.network(inputs.reshape(len(images), *self.shape))


def _functional(network: nn.Module) -> nn.Module:
    """A copy whose BatchNorm leaves no trace in train mode, as attacks need it."""
    network = deepcopy(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
    return network


def attacked(
    traffic: Traffic, truths: Sequence[Truth], plan: Plan, told: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each attacked image, and remarks about what could not be attacked."""
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    chosen = [t for t in truths if t.round in plan.rounds]
    low, high = _range(chosen)
    for n in plan.rounds:
        of_round = sorted((t for t in chosen if t.round == n), key=lambda t: t.client)
        if not of_round:
            remarks.append(f"attack: no update of round {n} could be attacked")
        for truth in of_round[: plan.victims]:
            others = [t for t in chosen if t.client != truth.client]
            try:
                rows += _one(traffic, truth, others, plan, (low, high))
            except Exception as error:  # an app's network may break any attack; the rest goes on
                first = next(iter(str(error).splitlines()), "")
                who = f"round {truth.round}, client {truth.client}"
                remarks.append(f"attack: {who}: {type(error).__name__}: {first}")
            else:
                told(f"round {truth.round}, client {truth.client}: {len(truth.labels)} images")
    return rows, remarks


def findings(rows: Sequence[dict[str, Any]], plan: Plan) -> list[Finding]:
    """One where an image came out clearly better than without its update, at any stage.

    An auditor asks for the worst case: an attacker may have chosen another stage.
    """
    leaked = [r for r in rows if r["worst_psnr"] >= r["null_psnr"] + MARGIN]
    if not leaked:
        return []
    best = max(leaked, key=lambda r: r["worst_psnr"])
    evidence = [
        f"attack={plan.name} threat={plan.threat.name}: {len(leaked)} of {len(rows)} images at "
        f"least {MARGIN:g} dB above the best guess without the update",
        f"best: round {best['round']}, client {best['client']}, {best['worst_psnr']:.1f} dB "
        f"against {best['null_psnr']:.1f}, in {best['seconds']:.1f} s an image",
    ]
    return [found("leaked-images", "train", evidence, MEASURED)]


def _range(truths: Sequence[Truth]) -> tuple[float, float]:
    """The values that are taken for black and white."""
    low = min((float(t.inputs.min()) for t in truths), default=0.0)
    high = max((float(t.inputs.max()) for t in truths), default=1.0)
    if (low >= 0 and high <= 1) or not low < high:
        return 0.0, 1.0
    return low, high


def _one(
    traffic: Traffic,
    truth: Truth,
    others: Sequence[Truth],
    plan: Plan,
    span: tuple[float, float],
) -> list[dict[str, Any]]:
    trained = next(
        (t for t in traffic.whole if (t.round, t.client) == (truth.round, truth.client)), None
    )
    if trained is None:
        raise Refused("attack", "the update has to travel in clear, and to be kept")
    exchange = replace(_exchange(trained, truth, span), defense=plan.defense)
    plan.attack.check(exchange.model)
    rng = stream(plan.seed, "attack", truth.round, truth.client)
    start = time.perf_counter()
    guessed = plan.attack(plan.threat.observe([exchange]), [rng], lambda *_: None)
    seconds = (time.perf_counter() - start) / len(truth.labels)
    images = exchange.batch.images
    scores = _psnr(guessed.images[0].detach().cpu().float(), images)
    stages = [_psnr(s.images[0].detach().cpu().float(), images) for s in guessed.stages]
    worst = torch.stack([scores, *stages]).amax(0)
    strangers = [_pixels(t.inputs, span) for t in others]
    nulls = torch.stack([_psnr(each, images) for each in _nulls(images, strangers)])
    best = nulls.amax(0)
    return [
        {"round": truth.round, "client": truth.client, "image": i, "batch": len(images),
         "psnr": float(scores[i]), "worst_psnr": float(worst[i]), "null_psnr": float(best[i]),
         "seconds": seconds, "attack": plan.name, "threat": plan.threat.name}
        for i in range(len(images))
    ]  # fmt: skip


def _exchange(trained: Trained, truth: Truth, span: tuple[float, float]) -> Exchange:
    """The reply as fedsec's harness holds one."""
    model = Network(truth.model, *span, truth.inputs.shape[1:]).train()
    images = _pixels(truth.inputs, span)
    classes = int(model(images[:2]).shape[-1])
    batch = Batch(images, nn.functional.one_hot(truth.labels, classes).float())
    change = _named(trained, truth.model)
    own = {k.removeprefix("network."): k for k in parameters(model)}
    running = {k.removeprefix("network."): k for k in buffers(model)}
    update = Update(
        {full: change[name] for name, full in own.items()},
        {full: _after(trained, truth.model)[name] for name, full in running.items()},
        len(images),
    )
    local = Local("fedavg", truth.lr, len(truth.batches), max(truth.batches))
    return Exchange(truth.round, (truth.client,), model, "train", update, batch, batch, local,
                    Defense())  # fmt: skip


def _named(trained: Trained, model: nn.Module) -> dict[str, Tensor]:
    """The change of each tensor of the network, before - after, by the network's own names."""
    sent = _by_name(trained, model, "sent")
    got = _by_name(trained, model, "got")
    return {name: sent[name] - got[name] for name in got}


def _after(trained: Trained, model: nn.Module) -> dict[str, Tensor]:
    return _by_name(trained, model, "got")


def _by_name(trained: Trained, model: nn.Module, side: str) -> dict[str, Tensor]:
    arrays = {k: torch.from_numpy(v.copy()) for k, v in getattr(trained, side).items()}
    state = {k: t.shape for k, t in model.state_dict().items()}
    if set(state) <= set(arrays):
        return arrays
    names = list(state) if len(state) == len(arrays) else [k for k, _ in model.named_parameters()]
    shapes = [tuple(state[k]) for k in names]
    if shapes != [tuple(a.shape) for a in arrays.values()]:
        raise Refused("attack", "the arrays have to be the network's, by name or by order")
    return dict(zip(names, arrays.values(), strict=True))


def _pixels(inputs: Tensor, span: tuple[float, float]) -> Float[Tensor, "n c h w"]:
    """Inputs as images in [0, 1]; a vector is one row of pixels."""
    images = (inputs.float() - span[0]) / (span[1] - span[0])
    return images if images.ndim == 4 else images.reshape(len(images), 1, 1, -1)


def _psnr(guess: Tensor, truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    matched = match.match(guess, truth)
    return metrics.psnr(guess[matched.clamp_min(0)], truth)


def _nulls(truth: Tensor, strangers: Sequence[Tensor]) -> list[Tensor]:
    """Grey, and the mean image and as many images of other clients."""
    nulls = [torch.full_like(truth, 0.5)]
    if strangers:
        pool = torch.cat(list(strangers))
        nulls.append(pool.mean(0).expand_as(truth))
        nulls += [pool[: len(truth)]] if len(pool) >= len(truth) else []
    return nulls


def chosen(
    attack: str, threat: str, words: Sequence[str], rounds: tuple[int, ...], victims: int, seed: int
) -> Plan:
    """The attack and the threat model of these names, with overrides as a run takes them."""
    from fedsec import config, run
    from fedsec.threat import admit

    own_words = [word for word in words if not word.lstrip("+~").startswith("defense.")]
    cfg, names = run.composed([f"attack={attack}", f"threat={threat}", *own_words])
    settings = config.settings(cfg, names)
    presets = config.presets("threat", [run.CONFIGS])
    own: Attack = settings.attack
    admit(names["attack"], own.needs, settings.threat, presets, own.tampers)
    if own.tampers:
        raise Refused("attack", "must leave the app's messages as they are", attack)
    if {"aux", "candidates"} & set(settings.threat.grants):
        raise Refused("threat", "must do without public images: fedsec has none of the app's",
                      threat)  # fmt: skip
    return Plan(names["attack"], own, settings.threat, rounds, victims, seed)


def loaded(
    traffic: Traffic, network: Callable[[], nn.Module], load: Callable[[int], Any]
) -> list[Truth]:
    """What `load(client)` says that each client trained on, images and labels, in one batch.

    Only replies that are known to come from one step on as many images are taken.
    """
    truths = []
    for trained in traffic.whole:
        inputs, labels = (torch.as_tensor(each) for each in load(trained.client))
        seen = trained.reply.watched
        if seen.batches == (len(inputs),) and seen.lr is not None:
            model = network()
            model.load_state_dict(_by_name(trained, model, "sent"))
            truths.append(
                Truth(trained.round, trained.client, model, inputs, labels, seen.batches, seen.lr,
                      seen.optimiser)
            )  # fmt: skip
    return truths

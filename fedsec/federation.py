"""A federated training run whose chosen rounds are kept for attack.

Flower runs it (`fedsec.flower`). Only the harness is here: what a run consists of, how the private
side of a kept exchange is rebuilt from the seed (it never travels), and what comes out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from fedsec.checks import Refused, require
from fedsec.client import (
    FedAvg,
    Gradient,
    Streams,
    buffers,
    client_streams,
    draw,
    encode,
    joined,
    local_update,
    mean_update,
    own_draws,
    parameters,
    schedule,
)
from fedsec.defense import Defense, Training
from fedsec.rng import stream
from fedsec.types import Batch, Exchange, Local, Party, Tensors, Update

# Flower's strategies by our name: its class, and the settings in which we leave its defaults.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("FedAvg", {}),
    "fedavgm": ("FedAvgM", {"server_momentum": 0.9}),  # Flower's 0.0 is FedAvg
    "fedadagrad": ("FedAdagrad", {"eta": 1e-2}),  # Flower's 0.1 moves weights by 0.1 a round
    "fedadam": ("FedAdam", {"eta": 1e-2}),
    "fedyogi": ("FedYogi", {"eta": 1e-2}),
    "fedmedian": ("FedMedian", {}),
    "fedtrimmedavg": ("FedTrimmedAvg", {"beta": 0.25}),  # one of four clients at each end
    "krum": ("Krum", {"num_malicious_nodes": 0}),
}
LINEAR = ("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi")  # they use the mean alone
ENGINES = ("inline", "ray")
SPLITS = ("iid", "dirichlet", "shards")


@dataclass(frozen=True, kw_only=True)
class Federation:
    """How the clients run, how the server combines them, and who holds which data."""

    engine: str  # "inline": in this process; "ray": Flower's simulation engine
    strategy: str  # a key of STRATEGIES
    split: str  # of the training data over clients: "iid", "dirichlet" or "shards"
    alpha: float  # concentration of split=dirichlet, > 0; small is uneven
    shards: int  # shards of one class that each client holds with split=shards, >= 1

    def __post_init__(self):
        for key, known in (("engine", ENGINES), ("strategy", STRATEGIES), ("split", SPLITS)):
            got = getattr(self, key)
            require(got in known, key, f"must be among {', '.join(known)}", got)
        require(self.alpha > 0, "alpha", "must be above 0", self.alpha)
        require(self.shards >= 1, "shards", "must be at least 1", self.shards)


@dataclass(frozen=True)
class Job:
    """Everything that a federation needs, without the data: it is pickled to Ray's workers."""

    dataset: Any  # a spec of fedsec.data: `load()`
    model: Any  # a spec of fedsec.models: `build(shape, classes, mean, std, rng)`
    client: Gradient | FedAvg
    federation: Federation
    defense: Defense
    clients: int
    rounds: int
    seed: int
    device: str = "cpu"
    attack_rounds: tuple[int, ...] = ()  # from 0; `rounds` itself attacks the final model
    probes: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (client, indices of its victim images)
    keep_training: bool = False  # attack the training exchanges themselves instead of probes
    ema: float = 0.0  # decay of the `Average` of the global weights; 0: none is taken


@dataclass(frozen=True)
class Trajectory:
    """What the training left behind; whoever attacks it, the exchanges follow from it."""

    sent: dict[int, Tensors]  # by attack round: parameters and buffers, as the server sent them
    final: Tensors  # the same, after the last round
    seconds_per_round: float | None  # median of the training rounds without an attack
    sent_bytes: float | None  # of one client in one training round, on average
    averaged: Tensors | None = None  # the average of all rounds' weights, if asked for


@dataclass(frozen=True)
class Federated:
    """What a federation leaves behind."""

    exchanges: list[Exchange]  # of all attack rounds, in order: probes, or training exchanges
    model: nn.Module  # after the last round, in the declared mode
    seconds: float  # wall time of the federation
    training: list[Training]  # what each client's guarantee depends on
    trajectory: Trajectory

    @property
    def averaged(self) -> nn.Module | None:
        """The model with the average of all rounds' weights, if asked for."""
        if self.trajectory.averaged is None:
            return None
        model = copy.deepcopy(self.model)
        load(model, self.trajectory.averaged)
        return model

    @property
    def seconds_per_round(self) -> float | None:
        return self.trajectory.seconds_per_round

    @property
    def sent_bytes(self) -> float | None:
        return self.trajectory.sent_bytes


# What a malicious server sends to the probed clients, from the round's model, which it must leave
# alone, and the round's number.
Craft = Callable[[nn.Module, int], tuple[nn.Module, ...]]


@dataclass(frozen=True)
class Tapped:
    """What travelled in one attack round."""

    round: int
    sent: Tensors  # parameters and buffers, as the server sent them
    training: list[Update]  # of each client
    probes: list[list[Update]]  # for each of the job's probes, one for each of the models it got
    crafted: tuple[nn.Module, ...] = ()  # what the probes got instead of `sent`


@dataclass(frozen=True)
class Travelled:
    """What a server leaves behind."""

    final: Tensors  # parameters and buffers
    taps: list[Tapped]  # of the attack rounds
    seconds: list[float]  # of each training round
    sent: list[int]  # bytes of all clients' replies in each training round
    averaged: Tensors | None = None  # as `final`


class Average:
    """An exponential moving average of weights: De et al. 2022, section 3.2, parameter averaging.

    w <- d w + (1 - d) new, with d = min(`decay`, (1 + t) / (10 + t)) at the t-th, from 0: the
    warm-up by which early weights are soon forgotten. It reads models that are released anyhow, so
    that privacy is as it was, and what clients get is not touched. Counters are the last ones.
    """

    def __init__(self, decay: float, first: Tensors):
        self.decay, self.weights, self.taken = decay, dict(first), 0

    def take(self, new: Tensors) -> None:
        decay = min(self.decay, (1 + self.taken) / (10 + self.taken))
        self.taken += 1
        for name, tensor in new.items():
            kept = self.weights[name].to(tensor.device)
            smooth = tensor.is_floating_point()
            self.weights[name] = tensor.lerp(kept, decay) if smooth else tensor.clone()


class ClientFailed(RuntimeError):
    """A client raised an error or sent nothing; its own traceback is in the text."""

    def __init__(self, client: int | None, round: int | None, reason: str):
        who = "a client" if client is None else f"client {client}"
        where = f"{who} failed" + ("" if round is None else f" in round {round}")
        super().__init__(f"{where}\n{reason}")
        self.client, self.round, self.reason = client, round, reason


@dataclass(frozen=True)
class Work:
    """One update's worth of private work."""

    batches: list[Batch]  # one for each local step, on the job's device
    rngs: Streams
    expected: int  # images that the sampling aims at in one step

    def joined(self, batches: list[Batch], count: int | None) -> Batch:
        whole = joined(batches)
        mix = None if whole.mix is None else whole.mix[:count, :count]
        return Batch(whole.images[:count], whole.targets[:count], whole.index[:count], mix)


class Site:
    """What the clients of one process share: the data, who holds what, and one model to load."""

    def __init__(self, job: Job, dataset: Any):
        self.job, self.dataset = job, dataset
        self.shares = shares(dataset, job.federation, job.clients, job.seed)
        self.model: nn.Module = initial(job, dataset).to(job.device)

    def work(self, client: int, round: int, probe: int | None, query: int = 0) -> Work:
        """What `client` does in `round`: its training, or one of the job's probes.

        Each further `query` for the same probe draws anew what a defense draws.
        """
        job = self.job
        if probe is None:
            held = self.shares[client]
            steps = draw(job.client, held, round, client, job.seed, job.defense)
            rngs = client_streams(job.seed, client, round, "train")
            expected = min(job.client.batch, len(held))
        else:
            indices = torch.tensor(job.probes[probe][1])
            steps = [indices[i] for i in schedule(len(indices), job.client.local)]
            again = ("query", query) if query else ()
            rngs = client_streams(job.seed, client, round, "probe", *indices.tolist(), *again)
            expected = len(steps[0])
        train, classes = self.dataset.train, self.dataset.classes
        return Work([train.batch(i, classes).to(job.device) for i in steps], rngs, expected)

    def local(self, work: Work) -> Local:
        return replace(self.job.client.local, batch=work.expected)

    def party(self, client: int, round: int, probe: int | None, query: int = 0) -> Party:
        """The sum that an update is for: the training's, or that of probes, one of each client."""
        job, session = self.job, ("train",)
        if probe is not None:
            turn = sum(1 for other, _ in job.probes[:probe] if other == client)
            session = ("probe", turn, query)
        return Party(client, job.clients, job.seed, round, session)

    def update(
        self, model: nn.Module, client: int, round: int, probe: int | None, query: int = 0
    ) -> Update:
        """The client's update on the model that the server sent."""
        work = self.work(client, round, probe, query)
        update, _ = local_update(
            model, work.batches, self.job.defense, self.local(work), work.rngs, work.expected
        )
        return self.job.defense.seal(update, self.party(client, round, probe, query))

    def released(self, updates: Sequence[Update], round: int) -> Update:
        """What the server steps along, of the updates of all clients."""
        rng = stream(self.job.seed, "server", round)
        defense = self.job.defense
        return defense.release(defense.mean(updates), len(updates), rng)


def initial(job: Job, dataset: Any) -> nn.Module:
    """The model before the first round, on the CPU, with what the defense changes about it."""
    rng = stream(job.seed, "model")
    model = job.model.build(dataset.shape, dataset.classes, dataset.mean, dataset.std, rng)
    changed = job.defense.architecture(model, stream(job.seed, "model", "defense"))
    return changed.train(model.training)


def state(model: nn.Module) -> Tensors:
    """What the server sends: the trainable parameters and the running statistics, copied."""
    return {k: t.detach().clone() for k, t in (parameters(model) | buffers(model)).items()}


def load(model: nn.Module, sent: Tensors) -> None:
    """Write `sent` into the model, in place."""
    with torch.no_grad():
        for name, tensor in (parameters(model) | buffers(model)).items():
            tensor.copy_(sent[name])


def shares(dataset: Any, federation: Federation, clients: int, seed: int) -> list[Tensor]:
    """The positions in the training split that each client holds."""
    from fedsec.data import partition

    rng = stream(seed, "partition")
    how = federation.split, federation.alpha, federation.shards
    try:
        return partition(dataset.train.labels, clients, *how, rng)
    except Refused as wrong:
        raise wrong if wrong.key == "clients" else wrong.under("federation") from None


def federate(
    job: Job,
    dataset: Any,
    progress: Callable[[int, int], None],
    craft: Craft | None = None,
    known: Trajectory | None = None,
) -> Federated:
    """Train for `job.rounds` rounds and keep what travels in the attack rounds.

    A malicious server's `craft` makes the models on which the probes are computed, from the model
    of the attack round; the training never sees them. Where an equal training is `known`, only what
    travels in the attack rounds is computed, in this process, to the same exchanges.

    `progress` hears (rounds done, rounds). Raises Refused before anything is computed, and
    ClientFailed, with the client's traceback, as soon as one client fails.
    """
    from fedsec import flower

    check(job)
    start = time.perf_counter()
    site = Site(job, dataset)
    job.defense.check(site.model)
    if known is None:
        travelled = flower.run(job, site, progress, craft)
        taps, known = travelled.taps, _trajectory(job, travelled)
    else:
        taps = flower.replay(job, site, known.sent, craft)
    if job.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model = copy.deepcopy(site.model)
    load(model, known.final)
    exchanges = _exchanges(site, taps)
    return Federated(exchanges, model, seconds, trained(job, site.shares), known)


def _trajectory(job: Job, travelled: Travelled) -> Trajectory:
    quiet = [s for r, s in enumerate(travelled.seconds) if r not in job.attack_rounds]
    sent = [size / job.clients for size in travelled.sent]
    return Trajectory(
        {tap.round: tap.sent for tap in travelled.taps},
        travelled.final,
        median(quiet or travelled.seconds) if job.rounds else None,
        mean(sent) if sent else None,
        travelled.averaged,
    )


def trained(job: Job, shares: list[Tensor]) -> list[Training]:
    """What each client's guarantee depends on, once the job is done.

    The final model is attacked on one more update of every client, which changes nothing else.
    """
    updates = job.rounds + (job.rounds in job.attack_rounds)
    per_update = job.client.local.steps
    return [
        Training(
            updates * per_update, len(s), min(job.client.batch, len(s)), per_update, job.clients
        )
        for s in shares
    ]


def check(job: Job) -> None:
    """Refuse rounds and probes that the federation cannot serve."""
    require(job.clients >= 1, "clients", "must be at least 1", job.clients)
    require(job.rounds >= 0, "rounds", "must be at least 0", job.rounds)
    job.defense.check_clients(job.clients)
    if job.defense.sums:
        rule = f"the server sees the clients' sum alone; use one of {', '.join(LINEAR)}"
        strategy = job.federation.strategy
        require(strategy in LINEAR, "federation.strategy", rule, strategy)
    for r in job.attack_rounds:
        rule = f"must be between 0 and rounds = {job.rounds}"
        require(0 <= r <= job.rounds, "attack_rounds", rule, r)
    local = job.client.local
    most = local.steps * local.batch
    for client, indices in job.probes:
        if not 0 <= client < job.clients:
            raise Refused("probes", f"must name one of the {job.clients} clients", client)
        require(len(indices) > 0, "victim_batch", "must be at least 1", 0)
        if local.kind == "fedavg" and len(indices) > most:
            rule = f"must be at most client.steps x client.batch = {most}, so that all are used"
            raise Refused("victim_batch", rule, len(indices))


def _exchanges(site: Site, taps: list[Tapped]) -> list[Exchange]:
    """The tapped updates with the private side that the seed rebuilds."""
    job, exchanges = site.job, []
    earlier: dict[tuple[int, int | None], tuple[Update, ...]] = {}
    for tap in taps:
        sent = copy.deepcopy(site.model)
        load(sent, tap.sent)
        model, *others = tap.crafted or (sent,)
        attacked: list[tuple[int, int | None, list[Update]]] = (
            [(client, None, [update]) for client, update in enumerate(tap.training)]
            if job.keep_training
            else [(job.probes[i][0], i, updates) for i, updates in enumerate(tap.probes)]
        )
        for client, probe, (update, *answers) in attacked:
            aggregate = _aggregate(site, tap, client, probe, update)
            queries = tuple(zip(others, answers, strict=True))
            history = earlier.get((client, probe), ())
            earlier[client, probe] = (*history, update)
            exchange = _exchange(site, tap.round, model, client, probe, update)
            if len(exchange.batch):  # a Poisson draw may be empty: nothing to reconstruct
                more = {"aggregate": aggregate, "history": history, "queries": queries}
                exchanges.append(replace(exchange, **more))
    return exchanges


def _aggregate(site: Site, tap: Tapped, client: int, probe: int | None, update: Update) -> Update:
    """The mean of the round, in which a probe stands in for its client's training update.

    That of a probe alone where it is about a crafted model, which nobody else got.
    """
    defense = site.job.defense
    if probe is None:
        return defense.mean(tap.training)
    own = defense.opened(update, site.party(client, tap.round, probe))
    if tap.crafted:
        return own
    others = (site.party(c, tap.round, None) for c in range(len(tap.training)))
    opened = [defense.opened(*pair) for pair in zip(tap.training, others, strict=True)]
    return mean_update([own if c == client else u for c, u in enumerate(opened)])


def summed(exchanges: list[Exchange], clients: int | None) -> list[Exchange]:
    """What secure aggregation shows of one round: one exchange for each sum over all clients.

    Probes are dealt to the `clients` in turn, so that consecutive ones make up a sum. Training
    exchanges (`clients` None) make up one, of every reply: of an empty Poisson draw too.
    """
    size = clients or max(1, len(exchanges))
    sums = []
    for start in range(0, len(exchanges), size):
        some = exchanges[start : start + size]
        defense = some[0].defense
        assert isinstance(defense, Defense)
        whole = defense.mean([e.update for e in some]) if clients else some[0].aggregate
        assert whole is not None
        # how many images each client drew is private under Poisson sampling
        parts = () if defense.poisson else tuple(len(e.batch) for e in some)
        sums.append(
            replace(
                some[0],
                clients=tuple(c for e in some for c in e.clients),
                update=whole,
                aggregate=whole,
                batch=joined([e.batch for e in some]),
                trained=joined([e.trained for e in some]),
                local=replace(some[0].local, parts=parts, clients=len(some)),
                norm_stats=(),
                history=(),
                queries=(),
            )
        )
    return sums


def _exchange(
    site: Site, round: int, model: nn.Module, client: int, probe: int | None, update: Update
) -> Exchange:
    from fedsec.models import drawing, norm_stats

    job = site.job
    work = site.work(client, round, probe)
    # Local steps cycle over a probe's images; its first pass shows each of them once.
    count = None if probe is None else len(job.probes[probe][1])
    trained = work.joined(encode(work.batches, job.defense, work.rngs), count)
    with (
        torch.no_grad(),
        drawing(model),
        own_draws(work.rngs("layer draws", 0), trained.images.device),
    ):
        stats = norm_stats(model, trained.images) if len(trained) else ()
    return Exchange(
        round=round,
        clients=(client,),
        model=model,
        mode="train" if model.training else "eval",
        update=update,
        batch=work.joined(work.batches, count),
        trained=trained,
        local=site.local(work),
        defense=job.defense,
        norm_stats=stats,
    )


def accuracy(model: nn.Module, split: Any, device: str, batch: int = 512) -> float:
    """The share of a fedsec.data split that `model` classifies right, in eval mode: 0 to 1."""
    mode, classes = model.training, int(split.labels.max()) + 1
    model.eval()
    right = 0
    with torch.inference_mode():
        for indices in torch.arange(len(split)).split(batch):
            some = split.batch(indices, classes).to(device)
            right += int((model(some.images).argmax(1) == some.labels).sum())
    model.train(mode)
    return right / len(split)

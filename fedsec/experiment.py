"""One run: a federation with the defense and one without, both attacked, measured and recorded."""

from __future__ import annotations

import itertools
import math
import os
import shlex
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsec import cost, labels, match, metrics, process, records, report, resume
from fedsec.attack import Attack, Told, crafted, undone
from fedsec.checks import Refused, require
from fedsec.client import draw, schedule
from fedsec.config import Settings, difference
from fedsec.console import Console
from fedsec.console import Stage as Shown
from fedsec.data import Dataset
from fedsec.defense import RELEASED, SENT, Compose, Defense, Privacy, guarantees, parts
from fedsec.federation import (
    Craft,
    Federated,
    Job,
    accuracy,
    check,
    federate,
    initial,
    shares,
    summed,
    trained,
)
from fedsec.flags import suspicious
from fedsec.privacy import formal, named
from fedsec.report.numbers import groups, scenarios
from fedsec.rng import stream
from fedsec.stages import chosen
from fedsec.store import Kept, Store
from fedsec.store import made as determined
from fedsec.threat import Observation, ThreatModel, admit
from fedsec.types import Batch, Exchange, Reconstruction, Stage, Tensors, Update

CONTROL = "none"  # how the undefended control is called
STRANGERS = 2000  # training images among which the unrelated null and the decoys are drawn
AUX = 1000  # public images that the fact `aux` grants
GFLOP_PER_THREAD = 2.0  # of a stack: 2 threads gain 1.4 at 3 GFLOP, 1.7 at 11, and lose below 1
PRICE = ("seconds_per_round", "control_seconds_per_round", "sent_bytes", "control_sent_bytes")


@dataclass(frozen=True)
class Plan:
    """Everything that was checked and loaded before the first gradient."""

    settings: Settings
    dataset: Dataset
    device: str
    folder: Path
    config: str  # the composed configuration, as YAML
    command: str
    probes: tuple[tuple[int, tuple[int, ...]], ...]  # (client, its victim images)
    defenses: tuple[tuple[str, Defense], ...]  # the control first
    estimate: float  # seconds, roughly
    flaws: dict[str, str]  # metrics that cannot be measured here, and why
    resumes: bool  # `folder` holds this run, which was not done
    store: Path | None = None  # of trained federations
    found: str = ""  # what the defense left to the run, and was solved for


def plan(
    settings: Settings,
    presets: dict[str, ThreatModel],
    folder: Path,
    config: str,
    command: str,
    store: Path | None = None,
) -> Plan:
    """Refuse what cannot work, in the order of what it costs to find out."""
    values, names = settings.values, settings.names
    attack: Attack = settings.attack
    admit(names["attack"], attack.needs, settings.threat, presets, attack.tampers)
    if attack.tampers and values.victim_batch == "same":
        rule = f"must be a number: attack={names['attack']} replaces the model of probes, and "
        raise Refused("victim_batch", rule + "leaves the training alone", "same")
    device = _device(values.device)
    resumes = _resumes(folder, config)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # ten bits drown what tells two gradients apart
    dataset: Dataset = settings.data.load()
    settings, held, found = fitted(settings, dataset)
    defenses = _defenses(settings, dataset)
    job = job_of(settings, device, (), settings.defense)
    probes = () if values.victim_batch == "same" else _probes(settings, held)
    check(job_of(settings, device, probes, settings.defense))
    if "labels" not in settings.threat.grants:
        for _, defense in defenses:
            labels.fits(attack.labels, _most(settings, held, defense), dataset.classes)
    if "candidates" in settings.threat.grants:
        most = max(_most(settings, held, defense) for _, defense in defenses)
        rule = f"must be above the {most} images behind an update"
        require(values.candidates > most, "candidates", rule, values.candidates)
    models = [initial(job_of(settings, device, probes, d), dataset) for _, d in defenses]
    for (_, defense), model in zip(defenses, models, strict=True):
        attack.check(model)
        defense.check(model)
        for training in trained(job, held):
            try:
                defense.covers(training)
            except Refused as wrong:
                raise wrong.under("defense") from None
        _encodable(settings, dataset, held, probes, defense)
        if attack.tampers:  # it may refuse what it knows by then
            for sent in _crafted(settings, dataset, defense, model, 0)[0]:
                defense.check(sent)
    model = models[-1]
    if values.threads == "auto":
        torch.set_num_threads(_threads(_stack_gflop(settings, dataset, model), _cores()))
    else:
        torch.set_num_threads(int(values.threads))
    estimate = _estimate(settings, dataset, model, len(defenses))
    asked = values.lpips != "alex"  # what does not come with fedsec is fetched for who asks for it
    flaws = metrics.unmeasurable(dataset.shape, values.lpips, download=asked)
    return Plan(
        settings, dataset, device, folder, config, command, probes, defenses, estimate, flaws,
        resumes, store, found,
    )  # fmt: skip


def fitted(settings: Settings, dataset: Dataset) -> tuple[Settings, list[Tensor], str]:
    """The settings with a defense that leaves nothing to the run, what clients hold, what it found.

    Noise that a given epsilon takes depends on the clients' data and on the rounds.
    """
    job = job_of(settings, "cpu", (), settings.defense)
    check(job)
    held = shares(dataset, job.federation, job.clients, job.seed)
    try:
        defense = settings.defense.fitted(trained(job, held))
    except Refused as wrong:
        raise wrong.under("defense") from None
    found = []
    for asked, part in zip(parts(settings.defense), parts(defense), strict=True):
        solved = {k: v for k, v in vars(part).items() if v is not None and v != vars(asked)[k]}
        given = {k: v for k, v in vars(asked).items() if v is not None and vars(part)[k] is None}
        name = type(part).__name__.lower()
        found += [f"{name}.{k} {v:.4g}, the least" for k, v in solved.items()]
        found += [f"for {k} {v:g}" for k, v in given.items()]
    return replace(settings, defense=defense), held, " ".join(found)


def perform(plan: Plan, console: Console) -> int:
    """Run the plan and write its folder; the exit status: 0 done, 2 failed, 130 interrupted."""
    folder = plan.folder
    opened = records.reopen if plan.resumes else records.open_folder
    writer = opened(folder, plan.config)
    state = resume.State(folder / records.STATE)
    run = _Run(plan, console, writer, state)
    status, code, why, full = "done", 0, "", False
    with ExitStack() as closing:
        closing.callback(writer.close)
        try:
            try:
                state.open(_made(plan.device, plan.settings.names))
                if plan.resumes:
                    console.line("resumes", state.said())
                for name, defense in plan.defenses:
                    run.one(name, defense)
            finally:  # a second Ctrl-C does not cost run.json
                closing.enter_context(process.undisturbed())
        except (KeyboardInterrupt, SystemExit):  # Ray answers SIGTERM with SystemExit
            status, code, why = "interrupted", 130, "interrupted: what was finished is kept"
        except Exception as error:
            status, code, why = "failed", 2, _failed(error, plan, console)
            full = isinstance(error, records.NotSaved)
        written = replace(records.read(plan.folder), run=records.filled(run.summary(status, why)))
        try:
            if not full:
                run.pictures()
                report.write([written], plan.folder / records.REPORT)
        except Exception as error:
            status, code, why = "failed", 2, _failed(error, plan, console)
            full = isinstance(error, records.NotSaved)
        try:  # last: run.json says that nothing more will come
            writer.finish(run.summary(status, why))
        except records.NotSaved as error:
            code, why, full = 2, why if full else _failed(error, plan, console), True
        if code == 0:
            state.remove()
        console.result(written, "" if full else why, "" if code == 0 else _again(plan))
    return code


def _made(device: str, names: dict[str, str]) -> dict[str, Any]:
    """What has to be the same for a run to go on with what an earlier process kept."""
    return {
        **records.versions(),
        "commit": records.commit(),
        "code": resume.code(),
        "device": _device_name(device, torch.get_num_threads()),
        **names,
    }


def _again(plan: Plan) -> str:
    """The command that goes on with the run."""
    words = [w for w in shlex.split(plan.command) if not w.lstrip("+").startswith("out=")]
    return shlex.join([*words, f"out={plan.folder}"]) if words else ""


def _resumes(folder: Path, config: str) -> bool:
    """Whether the folder holds this very run, not done. Refuses one that holds anything else."""
    if not records.unfinished(folder):
        records.check_folder(folder)
        return False
    there = (folder / records.CONFIG).read_text(encoding="utf-8", errors="surrogateescape")
    if config.startswith(there):  # or the beginning of it: see `records.reopen`
        return True
    try:
        other = difference(there, config)
    except Refused:
        raise Refused(
            "out", "holds a config.yaml that is damaged; name a new folder", folder
        ) from None
    rule = f"holds an unfinished run with another {other}; repeat its command, or name a new folder"
    require(not other, "out", rule, folder)
    return True


def _failed(error: Exception, plan: Plan, console: Console) -> str:
    """Tell of an error, with its traceback unless the disk is full; one line for the records."""
    if isinstance(error, records.NotSaved):
        console.trouble(f"error: {error}")
        return f"failed: {error}"
    trace = traceback.format_exc()
    console.trouble(trace)
    with suppress(records.NotSaved), records.saving(plan.folder / records.TRACE) as half:
        half.write_text(trace, encoding="utf-8", errors="replace")
    first = next(iter(str(error).splitlines()), "")
    return f"failed: {type(error).__name__}: {first}"


class _Run:
    """What accumulates over the defenses of one run."""

    def __init__(self, plan: Plan, console: Console, writer: records.Records, state: resume.State):
        self.plan, self.console, self.writer, self.state = plan, console, writer, state
        self.settings, self.values = plan.settings, plan.settings.values
        self.accuracy: dict[str, float] = {}
        self.averaged: dict[str, float] = {}  # the same of averaged weights, where ema asks for it
        self.privacy: dict[str, tuple[Privacy, ...]] = {}  # never empty
        self.store = None if plan.store is None else Store(plan.store)
        self.reused: dict[str, bool] = {}  # whether another run trained the federation
        self.federate_seconds: dict[str, float] = {}
        self.price: dict[str, tuple[float | None, float | None]] = {}  # see `Federated`
        self.attack_seconds: dict[str, float] = {}
        self.rows: list[records.Row] = []
        self.nulls: list[dict[str, match.Scores]] = []
        self.unread = set(self.settings.threat.grants) - {"mode"}  # the model's flag says it
        self.flags: list[str] = []
        self.shown: dict[str, list[tuple[Tensor, Tensor, str]]] = {}  # truth, guess, caption

    def one(self, name: str, defense: Defense) -> None:
        """Federate with one defense, measure its utility, attack it, write its rows."""
        plan = self.plan
        job = job_of(self.settings, plan.device, plan.probes, defense)
        with self.console.stage("federate", name, self.values.rounds, "rounds") as stage:
            with self._training_threads(job):
                federated, kept, fresh = self._federated(name, job, stage)
            self.reused[name] = kept.run != str(plan.folder.resolve())
            self.federate_seconds[name] = kept.seconds
            self.price[name] = federated.seconds_per_round, federated.sent_bytes
            self.accuracy[name] = kept.accuracy
            if kept.averaged is not None:
                self.averaged[name] = kept.averaged
            self.privacy[name] = _privacy(defense, federated)
            if not all(p.isfinite().all() for p in federated.model.parameters()):
                self.flags.append(
                    f"{name}: training diverged, the final model is not finite [training-diverged]"
                )
            self._whom(name)
            if defense.poisson and job.keep_training:
                self.flags.append(
                    f"{name}: the attack was told how many images each update holds, which the "
                    "mechanism keeps private and epsilon does not cover [count-is-private]"
                )
            stage.close(
                f"{kept.seconds:.1f} s{', reused' * (not fresh)}"
                f"   accuracy {100 * kept.accuracy:.1f} %"
                + (f", averaged {100 * self.averaged[name]:.1f} %" if self.averaged else "")
                + "".join(map(_epsilon, self.privacy[name]))
            )
        stacks = list(self._stacks(federated.exchanges, job))
        total = sum(len(e.batch) for stack in stacks for e in stack)
        self.attack_seconds[name] = 0.0
        victim = 0
        with self.console.stage("attack", name, total, "images") as stage:
            for number, stack in enumerate(stacks):
                images = sum(len(e.batch) for e in stack)
                attack = self._attack(name, number, stack, victim, stage.within(victim, images))
                self.unread &= attack.unread
                self.attack_seconds[name] += attack.seconds
                self._record(name, attack, victim)
                victim += images
                stage.skip(victim)
            local = self.settings.client.local
            uneven = defense.poisson and job.keep_training and local.kind == "fedavg"
            if uneven and "local" in self.settings.threat.grants and "local" not in self.unread:
                self.flags.append(
                    f"{name}: the attack took each local step for one of {local.batch} images "
                    "(client.batch), but Poisson sampling drew more or fewer, which the mechanism "
                    "keeps private; the update may give away more than is shown [uneven-steps]"
                )
            if self.state.trouble and self.state.trouble not in self.flags:
                self.flags.append(self.state.trouble)
            seconds = self.attack_seconds[name] / max(1, total)
            psnr = [r.psnr for r in self.rows if r.defense == name and r.psnr is not None]
            mean = sum(psnr) / len(psnr) if psnr else math.nan
            stage.close(f"{seconds:.1f} s/image   mean PSNR {mean:.1f} dB")

    def _federated(self, name: str, job: Job, stage: Shown) -> tuple[Federated, Kept, bool]:
        """A federation, what is kept of it, and whether it was trained here and now.

        A store that cannot be used costs the run nothing but time, and a flag.
        """
        plan, craft = self.plan, self._craft(job.defense)
        fresh: list[Federated] = []

        def train() -> Kept:
            with cost.Clock(plan.device) as clock:
                federated = federate(job, plan.dataset, stage.advance, craft)
            fresh.append(federated)
            own, test = str(plan.folder.resolve()), plan.dataset.test
            right = accuracy(federated.model, test, plan.device)
            averaged = federated.averaged and accuracy(federated.averaged, test, plan.device)
            return Kept(federated.trajectory, right, clock.seconds, own, averaged)

        kept = self._stored(name, job, train) or train()
        if fresh:
            return fresh[0], kept, True
        again = federate(job, plan.dataset, stage.advance, craft, kept.trajectory)
        return again, kept, False

    def _stored(self, name: str, job: Job, train: Callable[[], Kept]) -> Kept | None:
        """What the store holds of the federation, once somebody has trained it."""
        if self.store is None:
            return None
        device = _device_name(self.plan.device, torch.get_num_threads())
        try:
            made = determined(job, self.plan.dataset, device, type(self.settings.attack))
        except TypeError as error:
            self.flags.append(f"store: not used, since {error}")
            return None
        title = self._title(name, job)
        kept = self.store.once(made, title, train, lambda why: self.console.line("waits", why))
        self.flags += [said for said in self.store.troubles if said not in self.flags]
        return kept

    def _title(self, name: str, job: Job) -> dict[str, Any]:
        """What a federation is, for a person who lists a store."""
        names = {k: self.settings.names[k] for k in ("data", "model", "client")}
        numbers = {k: getattr(job, k) for k in ("clients", "rounds", "seed")}
        return {**names, "defense": name, **numbers}

    @contextmanager
    def _training_threads(self, job: Job) -> Iterator[None]:
        """As many threads as pay for a client's batch: not by the attack, which others share."""
        before, values, batch = torch.get_num_threads(), self.values, job.client.batch
        if values.threads == "auto":
            model = initial(job, self.plan.dataset)
            gflop = _gflop(self.plan.dataset, model, batch)
            torch.set_num_threads(_threads(gflop, _cores()))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _whom(self, name: str) -> None:
        """Say what an epsilon hides, and from whom, where it is not one example."""
        threat = self.settings.threat
        for claim in self.privacy[name]:
            if claim.epsilon is None or claim.unit == "example":
                continue
            hidden = f"one {claim.unit} ({claim.neighbours})"
            said = f"{name}: epsilon {claim.epsilon:.3g} hides {hidden} from {claim.against}"
            if claim.against == RELEASED and {"update", "aggregate", "history"} & set(
                threat.grants
            ):
                said += f"; threat={threat.name} is the server, and what it sees has no noise"
                said += " [epsilon-not-for-the-server]"
            self.flags.append(said)

    def _craft(self, defense: Defense) -> Craft | None:
        """What the attack makes of the model that the attacked clients get, if it tampers."""
        settings = self.settings
        if not settings.attack.tampers:
            return None
        attack, threat = settings.names["attack"], settings.names["threat"]
        said = f"attack={attack} replaced the model that the attacked clients got, as "
        said += f"threat={threat} may; the training, and so the accuracy, is untouched"
        if said not in self.flags:
            self.flags.append(said)

        def craft(model: nn.Module, round: int) -> tuple[nn.Module, ...]:
            models, known = _crafted(settings, self.plan.dataset, defense, model, round)
            self.unread &= set(known.unread) | (self.unread - set(known.grants))
            return models

        return craft

    def _stacks(self, exchanges: list[Exchange], job: Job) -> Iterator[list[Exchange]]:
        """Victims that can be attacked together: one model, one batch size, at most `stack`."""
        threat: ThreatModel = self.settings.threat
        wanted = self.values.images
        for round in self.values.attack_rounds:
            here = [e for e in exchanges if e.round == round]
            if threat.sums_only:
                here = summed(here, None if job.keep_training else job.clients)
            taken, kept = 0, []
            for e in here:  # victim_batch=same: whole updates until the images are reached
                if taken < wanted:
                    kept.append(e)
                    taken += len(e.batch)
            for size in sorted({len(e.batch) for e in kept}):
                same = [e for e in kept if len(e.batch) == size]
                for i in range(0, len(same), self.values.stack):
                    yield [self._informed(e) for e in same[i : i + self.values.stack]]

    def _informed(self, exchange: Exchange) -> Exchange:
        """The exchange with the public images that its threat model grants."""
        grants, dataset = self.settings.threat.grants, self.plan.dataset
        if "aux" in grants:
            exchange = replace(exchange, aux=_aux(dataset, self.values.seed))
        if "candidates" in grants:
            private = exchange.batch.index
            rng = stream(self.values.seed, "candidates", exchange.round, *private)
            order = torch.randperm(len(dataset.train), generator=rng)
            decoys = order[~torch.isin(order, torch.tensor(private))]
            size = self.values.candidates - len(private)
            pool = torch.cat([torch.tensor(private), decoys[:size]])
            pool = pool[torch.randperm(len(pool), generator=rng)]
            pooled = dataset.train.batch(pool, dataset.classes).to(self.plan.device)
            exchange = replace(exchange, candidates=pooled)
        return exchange

    def _attack(
        self, name: str, number: int, stack: list[Exchange], first: int, told: Told
    ) -> _Attacked:
        """What the attack makes of a stack: now, or as an earlier process kept it."""
        seed, round = self.values.seed, stack[0].round
        inputs = [t for e in stack for t in (e.batch.images, *e.update.tensors.values())]
        text = f"round {round}, images {[e.batch.index for e in stack]}, from {first} on"
        names = [defense for defense, _ in self.plan.defenses]
        place = self.state.stack(names.index(name), number, text, inputs)
        kept = place.finished()
        if kept:
            return _Attacked.kept(stack, *kept)
        # by number: an attacker could tell the images from a stream that was named after them
        starts = itertools.accumulate((len(e.batch) for e in stack[:-1]), initial=first)
        rngs = [stream(seed, "attack", round, victim) for victim in starts]
        progress = place.progress(told)
        if self.settings.attack.evaluations:
            cost.loaded()
        with cost.Clock(self.plan.device) as clock:
            observation = self.settings.threat.observe(stack)
            found = self.settings.attack(observation, rngs, progress)
            found = found if self.settings.attack.private else undone(found, observation)
        seconds = progress.earlier + clock.seconds
        unread = frozenset(observation.unread)
        attacked = _Attacked(stack, found, seconds, clock.peak_mb, clock.reasons, unread)
        place.finish(*attacked.to_keep())
        return attacked

    def _record(self, name: str, attack: _Attacked, first: int) -> None:
        """Match, measure and write the rows of one stack."""
        rows = []
        plan, settings, values = self.plan, self.settings, self.values
        flaws = plan.flaws
        rng = stream(values.seed, "strangers")
        some = torch.randperm(len(plan.dataset.train), generator=rng)[:STRANGERS]
        strangers = plan.dataset.train.batch(some, plan.dataset.classes).images
        unit = cost.backprop_gflop(attack.stack[0].model, attack.stack[0].trained)
        seconds = attack.seconds / sum(len(e.batch) for e in attack.stack)
        for v, exchange in enumerate(attack.stack):
            truth = exchange.batch.images.cpu()
            guess = attack.found.images[v].detach().cpu().float()
            scores = match.score(guess, truth, values.lpips)
            rng = stream(values.seed, "nulls", exchange.round, *exchange.batch.index)
            nulls = match.nulls(truth, plan.dataset.mean_image, strangers, rng, values.lpips)
            if name == plan.defenses[0][0]:
                self.nulls.append(nulls)
            null, null_psnr = match.best_null(nulls)
            truths = exchange.batch.labels.tolist()
            said = match_labels(attack.found.labels[v].tolist(), truths)
            flags = [f"{k}: {why}" for k, why in (flaws | attack.reasons).items()
                     if k != "joules"]  # fmt: skip
            flags += list(attack.found.flags[v]) if attack.found.flags else []
            if None in said:
                flags.append("label_pred, label_ok: the attack has no belief about labels")
            steps = _steps(attack.found, v, truth, unit)
            stages = attack.found.stages
            pick = stages[chosen(stages)[v]].name if stages else None
            loss = float(attack.found.loss[v])
            gflop = float(attack.found.gflop[v])
            for i, index in enumerate(exchange.batch.index):
                rows.append(
                    records.Row(
                        run=plan.folder.name,
                        attack=settings.names["attack"],
                        defense=name,
                        threat=settings.names["threat"],
                        client=settings.names["client"],
                        data=settings.names["data"],
                        model=settings.names["model"],
                        seed=values.seed,
                        round=exchange.round,
                        mode=exchange.mode,
                        victim=first,
                        image=index,
                        batch=len(exchange.batch),
                        psnr=float(scores.psnr[i]),
                        ssim=None if "ssim" in flaws else float(scores.ssim[i]),
                        mse=float(scores.mse[i]),
                        lpips=None if "lpips" in flaws else float(scores.lpips[i]),
                        null=null,
                        null_psnr=float(null_psnr[i]),
                        label_true=truths[i],
                        label_pred=said[i],
                        label_ok=None if said[i] is None else said[i] == truths[i],
                        loss=loss,
                        steps=int(attack.found.steps[v]),
                        seconds=seconds,
                        gflop=gflop / len(exchange.batch),
                        backprops=gflop / unit,
                        peak_mb=attack.peak_mb,
                        flags=tuple(flags),
                        stage=pick,
                        oracle_psnr=steps[i][-1].best_psnr if steps[i] else None,
                        stages=tuple(asdict(step) for step in steps[i]),
                        curve=_curve(attack.found, v) if i == 0 else (),
                    )
                )
                first += 1
                guessed = guess[scores.match[i]] if scores.match[i] >= 0 else torch.zeros_like(
                    truth[i])  # fmt: skip
                self.shown.setdefault(name, []).append(
                    (truth[i], guessed, f"{float(scores.psnr[i]):.1f} dB")
                )
        self.writer.append(rows)
        self.rows += rows

    def pictures(self) -> None:
        """grid.png: the originals over a row for each defense.

        A defense that draws other training batches than the first gets a row of its own originals;
        images that an interrupted run did not reach are grey.
        """
        if not self.shown:
            return
        originals = [truth for truth, _, _ in next(iter(self.shown.values()))]
        count, grey = len(originals), torch.full_like(originals[0], 0.5)
        rows, psnr = [], []
        for name, shown in self.shown.items():
            psnr.append([row.psnr for row in self.rows if row.defense == name])
            missing = [(grey, grey, "not reached")] * (count - len(shown))
            truths, guesses, captions = zip(*(shown[:count] + missing), strict=True)
            alike = all(torch.equal(t, o) for (t, _, _), o in zip(shown, originals, strict=False))
            if not alike:
                rows.append((f"original, {name}", torch.stack(truths).numpy(), [""] * count))
            title = f"{name} (control)" if name == CONTROL else name
            rows.append((title, torch.stack(guesses).numpy(), list(captions)))
        path = self.plan.folder / records.GRID
        report.grid(path, torch.stack(originals).numpy(), rows, psnr)

    def _claimed(self, claim: Privacy, rows: list[records.Row]) -> dict[str, Any]:
        said = ("epsilon", "delta", "accountant", "unit", "neighbours", "against")
        written = {key: getattr(claim, key) for key in said}
        return {**written, "others": dict(claim.others), **self._formal(claim, rows)}

    def _formal(self, claim: Privacy, rows: list[records.Row]) -> dict[str, Any]:
        """What is proven about the whole run and about one update, and what was measured.

        Who attacks an update knows that the image is in it: no sampling hides it there. Where the
        claim is about released models alone it says nothing of an update, and where it is about
        whole clients an update is one step.
        """
        if claim.mechanism is None or claim.delta is None:
            return {}
        written: dict[str, Any] = {
            "mechanism": claim.mechanism._asdict(),
            "formal": [asdict(line) for line in formal(claim.mechanism, claim.delta)],
        }
        if claim.against != SENT:
            return written
        steps = 1 if claim.unit == "client" else self.settings.client.local.steps
        update = claim.mechanism._replace(sample_rate=1.0, steps=steps)
        written["formal_update"] = [asdict(line) for line in formal(update, claim.delta)]
        alone = [row for row in rows if row.batch == 1 and row.mse is not None]
        if "candidates" in self.settings.threat.grants and alone:
            pool = min(self.values.candidates, len(self.plan.dataset.train))
            right = sum(row.mse == 0 for row in alone)
            measured = named(right, len(alone), pool, update, f"attack={alone[0].attack}")
            written["measured"] = [asdict(measured)]
        return written

    def summary(self, status: str, why: str) -> dict[str, Any]:
        """What run.json holds; the defense's numbers, with the control's beside them."""
        settings, values = self.settings, self.values
        name = settings.names["defense"]
        rows = [r for r in self.rows if r.defense == name]
        flags = [why] if why else []
        own, control = self.accuracy.get(name), self.accuracy.get(CONTROL)
        if control is None and status == "done":
            flags.append("control_accuracy, accuracy_loss: control=false, so no control was run")
        ended = (Privacy(None, None, None, reason="the run ended before"),)
        claims = self.privacy.get(name, ended)
        for claim in claims:
            if claim.epsilon is None:
                whose = "" if len(claims) == 1 else f" for one {claim.unit}"
                flags.append(f"epsilon, delta, accountant{whose}: {claim.reason}")
        flags += self.flags
        if self.unread and rows:
            attack, threat = settings.names["attack"], settings.names["threat"]
            facts = ", ".join(sorted(self.unread))
            flags.append(f"{attack} made no use of {facts}, which threat={threat} grants")
        nulls = match.join(self.nulls) if self.nulls else {}
        attacked = self.attack_seconds.get(name)
        price = self.price.get(name, (None, None))
        beside = self.price.get(CONTROL, (None, None))
        if not values.rounds:
            flags.append(f"{', '.join(PRICE)}: rounds=0, so no round was trained")
        test = self.plan.dataset.test
        written = {
            "status": status,
            "utility": {
                "test_images": len(test),
                "accuracy": own,
                "control_accuracy": control,
                "accuracy_loss": None if own is None or control is None else control - own,
                **(
                    {
                        "averaged_accuracy": self.averaged.get(name),
                        "control_averaged_accuracy": self.averaged.get(CONTROL),
                    }
                    if values.ema
                    else {}
                ),
                "chance_accuracy": float(test.labels.bincount().max()) / len(test),
            },
            "privacy": {
                **self._claimed(claims[0], rows),
                "also": [self._claimed(claim, rows) for claim in claims[1:]],
            },
            "cost": {
                "federate_seconds": self.federate_seconds.get(name),
                "control_federate_seconds": self.federate_seconds.get(CONTROL),
                "seconds_per_round": price[0],
                "control_seconds_per_round": beside[0],
                "sent_bytes": price[1],
                "control_sent_bytes": beside[1],
                "attack_seconds": attacked,
                "seconds_per_image": _mean([r.seconds for r in rows]),
                "gflop_per_image": _mean([r.gflop for r in rows]),
                "backprops_per_image": _mean([r.backprops for r in rows]),
                "peak_mb": max((r.peak_mb for r in rows if r.peak_mb is not None), default=None),
                "device": _device_name(self.plan.device, torch.get_num_threads()),
            },
            "nulls": {null: float(s.psnr.mean()) for null, s in nulls.items()},
            "grants": sorted(settings.threat.grants),
            "flags": flags,
            "commit": records.commit(),
            "versions": records.versions(),
            "command": self.plan.command,
            "choices": settings.names,
            "reused": self.reused,  # by defense: whether another run trained it
            "metrics": {"lpips": metrics.lpips_name(values.lpips)},
            "random_defense": settings.defense.random,
        }
        run = records.Run(self.plan.folder, written, tuple(self.rows), truncated=False)
        flags += suspicious(scenarios(groups([run])))
        return written


@dataclass(frozen=True)
class _Attacked:
    stack: list[Exchange]
    found: Reconstruction
    seconds: float  # killed processes' included, as far as they kept what they did
    peak_mb: float | None
    reasons: dict[str, str]  # of what could not be measured
    unread: frozenset[str]  # granted facts that the attack made no use of

    def to_keep(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors, and what JSON can hold."""
        tensors = {k: v for k, v in vars(self.found).items() if k not in ("flags", "stages")}
        for n, stage in enumerate(self.found.stages):
            tensors |= {f"{n} {k}": v for k, v in vars(stage).items() if k != "name"}
        about = {k: v for k, v in vars(self).items() if k not in ("stack", "found")}
        images = sum(len(e.batch) for e in self.stack)
        more = {"unread": sorted(self.unread), "flags": self.found.flags, "images": images}
        more["stages"] = [stage.name for stage in self.found.stages]
        return tensors, about | more

    @staticmethod
    def kept(stack: list[Exchange], tensors: Tensors, about: dict[str, Any]) -> _Attacked:
        """The same from what `to_keep` gave."""
        stages = tuple(
            Stage(
                name,
                **{k.removeprefix(f"{n} "): t for k, t in tensors.items() if k.startswith(f"{n} ")},
            )
            for n, name in enumerate(about["stages"])
        )
        whole = {k: t for k, t in tensors.items() if " " not in k}
        found = Reconstruction(**whole, flags=tuple(map(tuple, about["flags"])), stages=stages)
        own = {k: about[k] for k in ("seconds", "peak_mb", "reasons")}
        return _Attacked(stack, found, **own, unread=frozenset(about["unread"]))


def _curve(found: Reconstruction, victim: int) -> tuple[tuple[int, float], ...]:
    """The objective of a victim over the steps, to four digits."""
    points = found.curve[victim].tolist() if len(found.curve) else []
    return tuple((int(n), float(f"{loss:.4g}")) for n, loss in points if math.isfinite(loss))


def _steps(
    found: Reconstruction, victim: int, truth: Tensor, unit: float
) -> list[list[records.Step]]:
    """Of each image of a victim, the stages of its attack, with `unit` GFLOP a backprop."""
    each: list[list[records.Step]] = [[] for _ in truth]
    scores, best = [], torch.full((len(truth),), -math.inf, dtype=torch.float64)
    for n, stage in enumerate(found.stages):
        guess = stage.images[victim].detach().cpu().float()
        scores.append(metrics.psnr(guess[match.match(guess, truth)], truth).double())
        ran = bool(stage.gflop[victim] > 0 or n == 0)
        best = torch.fmax(best, scores[-1]) if ran else best
        pick = scores[chosen(found.stages, n + 1)[victim]]
        for i, steps in enumerate(each):
            steps.append(
                records.Step(
                    stage=stage.name,
                    psnr=float(scores[-1][i]) if ran else None,
                    chosen_psnr=float(pick[i]),
                    best_psnr=float(best[i]),
                    certified=bool(stage.certified[victim]),
                    seconds=float(stage.seconds[victim]) / len(truth),
                    backprops=float(stage.gflop[victim]) / unit,
                )
            )
    return each


def match_labels(said: list[int], true: list[int]) -> list[int | None]:
    """For each original the recovered label that it is held against, one to one.

    An update says nothing of the order of its labels: equal ones meet first, the rest in order.
    -1, no belief, becomes None.
    """
    rest = list(said)
    held: list[int | None] = []
    for label in true:
        hit = label in rest
        held.append(label if hit else None)
        if hit:
            rest.remove(label)
    spare = iter(rest)
    held = [next(spare, None) if label is None else label for label in held]
    return [None if label == -1 else label for label in held]


def _device(wanted: str) -> str:
    there = torch.cuda.is_available()
    require(wanted != "cuda" or there, "device", "no GPU that torch can use; take device=cpu",
            wanted)  # fmt: skip
    return "cuda" if there and wanted != "cpu" else "cpu"


def _device_name(device: str, threads: int) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def _defenses(settings: Settings, dataset: Dataset) -> tuple[tuple[str, Defense], ...]:
    name, defense = settings.names["defense"], settings.defense
    defense = defense.supplied(_aux(dataset, settings.values.seed))
    if name == CONTROL or not settings.values.control:
        return ((name, defense),)
    return ((CONTROL, Compose(())), (name, defense))


def _aux(dataset: Dataset, seed: int) -> Batch:
    """Public images: of the test split, although utility is measured on it too."""
    some = torch.randperm(len(dataset.test), generator=stream(seed, "aux"))[:AUX]
    return dataset.test.batch(some, dataset.classes)


def _crafted(
    settings: Settings, dataset: Dataset, defense: Defense, model: nn.Module, round: int
) -> tuple[tuple[nn.Module, ...], Observation]:
    """What the attack sends instead of `model`, and what it knew when it made that."""
    values, threat, local = settings.values, settings.threat, settings.client.local
    assert isinstance(values.victim_batch, int)
    count = values.victim_batch * (values.clients if threat.sums_only else 1)
    sizes = [len(chunk) for chunk in schedule(values.victim_batch, local)]
    nobody = Batch(torch.zeros(count, *dataset.shape), torch.zeros(count, dataset.classes))
    blank = Exchange(
        round=round,
        clients=(),
        model=model,
        mode="train" if model.training else "eval",
        update=Update({}, {}, 0),
        batch=nobody,
        trained=nobody,
        local=replace(local, batch=sizes[0]),
        defense=defense,
        aux=_aux(dataset, values.seed) if "aux" in threat.grants else None,
    )
    return crafted(settings.attack, threat, blank, stream(values.seed, "craft", round))


def job_of(settings: Settings, device: str, probes: tuple, defense: Defense) -> Job:
    values = settings.values
    return Job(
        dataset=settings.data,
        model=settings.model,
        client=settings.client,
        federation=settings.federation,
        defense=defense,
        clients=values.clients,
        rounds=values.rounds,
        seed=values.seed,
        device=device,
        ema=values.ema,
        attack_rounds=tuple(values.attack_rounds),
        probes=probes,
        keep_training=values.victim_batch == "same",
    )


def _stack_gflop(settings: Settings, dataset: Dataset, model: nn.Module) -> float:
    """GFLOP of one forward and backward pass of all lanes that are attacked together."""
    values, client = settings.values, settings.client
    attacked = client.batch if isinstance(values.victim_batch, str) else values.victim_batch
    images = min(values.stack * attacked, values.images) * settings.attack.lanes
    return _gflop(dataset, model, images)


def _gflop(dataset: Dataset, model: nn.Module, images: int) -> float:
    """GFLOP of one forward and backward pass."""
    few = torch.arange(min(2, len(dataset.train)))  # BatchNorm may refuse a single one
    batch = dataset.train.batch(few, dataset.classes)
    try:
        return cost.backprop_gflop(model, batch) / len(batch) * images
    except ValueError:  # it does: `_estimate` says so in the words of the settings
        return 0.0


def _threads(gflop: float, cores: int) -> int:
    """Threads that pay for a stack of this size: on fewer products they wait for each other."""
    return max(1, min(cores, int(gflop / GFLOP_PER_THREAD)))


def _cores() -> int:
    """Cores that this process may use, fewer where OMP_NUM_THREADS says so."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(there or 1, int(said)) if said.isdigit() and int(said) else there or 1


def _probes(settings: Settings, held: list[Tensor]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Victim images, dealt to the clients in turn; each from its client's own data, once."""
    values = settings.values
    assert isinstance(values.victim_batch, int)
    size, clients = values.victim_batch, values.clients
    updates = values.images // size
    if settings.threat.sums_only:
        whole = values.images % (size * clients) == 0
        rule = f"must be a multiple of clients x victim_batch = {size * clients}: only sums show"
        require(whole, "images", rule, values.images)
    orders = [h[torch.randperm(len(h), generator=stream(values.seed, "victims", c))].tolist()
              for c, h in enumerate(held)]  # fmt: skip
    probes = []
    for u in range(updates):
        turn, client = divmod(u, clients)
        chosen = orders[client][turn * size : (turn + 1) * size]
        if len(chosen) < size:
            most = sum(len(h) // size for h in held) * size
            raise Refused("images", f"the clients hold {most} in batches of {size}", values.images)
        probes.append((client, tuple(chosen)))
    return tuple(probes)


def _most(settings: Settings, held: list[Tensor], defense: Defense) -> int:
    """Images behind the largest update that may be attacked."""
    values = settings.values
    joint = sum if settings.threat.sums_only else max
    if isinstance(values.victim_batch, int):
        return joint([values.victim_batch] * values.clients)
    drawn = (
        [draw(settings.client, h, r, c, values.seed, defense) for c, h in enumerate(held)]
        for r in values.attack_rounds
    )
    return max(joint(sum(map(len, steps)) for steps in clients) for clients in drawn)


def _encodable(settings: Settings, dataset: Dataset, held, probes, defense: Defense) -> None:
    """Refuse batches, of the training or of a probe's local steps, that mixing cannot encode."""
    local = settings.client.local
    trained = min(local.batch, min(len(h) for h in held))
    probed = [len(chunk) for _, indices in probes for chunk in schedule(len(indices), local)]
    for key, size in (("client.batch", trained), ("victim_batch", min(probed, default=0))):
        batch = dataset.train.batch(held[0][:size], dataset.classes)
        try:
            defense.batch(batch, stream(0, "trial"))
        except Refused as wrong:
            raise Refused(key, wrong.rule, wrong.got) from None


def _estimate(settings: Settings, dataset: Dataset, model: nn.Module, defenses: int) -> float:
    """Seconds that the run may take, from one timed gradient: right to a factor of two."""
    from fedsec.client import mean_gradient

    values, size = settings.values, settings.client.batch
    attacked = size if isinstance(values.victim_batch, str) else values.victim_batch
    seconds = []
    for count in (size, attacked):
        batch = dataset.train.batch(torch.arange(min(count, len(dataset.train))), dataset.classes)
        try:
            mean_gradient(model, batch)
        except ValueError as error:  # BatchNorm cannot normalise a single value
            rule = "batch cannot train on one value per channel; use model.norm=group, "
            rule += "model.mode=eval, or a larger victim_batch"
            raise Refused("model.norm", rule, f"{len(batch)} images") from error
        with cost.Clock() as clock:
            mean_gradient(model, batch)
        seconds.append(clock.seconds)
    training = values.rounds * values.clients * settings.client.local.steps * seconds[0]
    updates = values.images / attacked * len(values.attack_rounds)
    attacks = 3.5 * updates * settings.attack.evaluations * seconds[1]
    return defenses * (training + attacks / min(4, updates))


def _privacy(defense: Defense, federated: Federated) -> tuple[Privacy, ...]:
    """The guarantees, each of the client that is worst off."""
    none = Privacy(None, None, None, reason="the defense makes no formal claim")
    return guarantees(defense, federated.training) or (none,)


def _epsilon(privacy: Privacy) -> str:
    if privacy.epsilon is None:
        return ""
    unit = "" if privacy.unit == "example" else f", one {privacy.unit}"
    at = f"at delta {privacy.delta:g} ({privacy.accountant}{unit})"
    return f"   epsilon {privacy.epsilon:.2f} {at}"


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None

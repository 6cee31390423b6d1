"""fedsec beside `breaching` (PyPI, 0.1.2): the same problem, step for step, in one run.

    python benchmarks/peers.py                                   all four models, photographs
    python benchmarks/peers.py --models lenet --quick            a look in a minute
    python benchmarks/peers.py --data npz:cifar10.npz --images 10 --device cuda

Both sides get the same victim: weights, eval mode, one image with its label, its gradient, start,
and `Inverting Gradients` as the peer's own configuration has it (signed Adam, cosine, boxed, its
smoothness term and schedule). The peer is not changed: where steps are timed, fedsec's engine is
given the peer's smoothness term and schedule instead. Before a clock starts, the peer's loop has to
find fedsec's objective at fedsec's images to 1e-5.

The time to the peer's quality is that of fedsec's own `attack=inverting`. Both sides choose their
smoothness weight, then their step length, among the same number of values, by the mean PSNR on
images that the comparison does not use; the peer's choice is made on its restatement in fedsec's
engine, which finds the same in less time.

The peer lives in a virtual environment of its own that this script makes once. The environment
borrows the packages of this one (torch, above all) through a .pth file and adds breaching and what
it lacks, so both sides run the same torch. It is one process that stays alive and runs on command;
the two sides take turns, and only one of them works at a time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = "OMP_NUM_THREADS"
if __name__ == "__main__":  # before torch loads
    os.environ.setdefault(THREADS, "1")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from attacks.inverting import Inverting  # noqa: E402
from fedsec import engine, metrics, models, records, rules  # noqa: E402
from fedsec.checks import Refused, require  # noqa: E402
from fedsec.data import Npz, Photos, Split  # noqa: E402
from fedsec.rng import stream  # noqa: E402
from fedsec.threat import Observation, ThreatModel  # noqa: E402
from fedsec.types import Batch, Exchange, Local, Reconstruction, Tensors, Update  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BREACHING = "breaching==0.1.2"
MODELS = {
    "lenet": models.LeNetSpec(mode="eval"),
    "resnet20": models.ResNetSpec(mode="eval"),
    "convnet": models.ConvNetSpec(mode="eval"),
    "resnet18": models.ResNet18Spec(mode="eval"),
}
GRANTS = ("model", "update", "count", "shape", "mode", "data_range", "labels")
CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}  # of the module time
STEPS = 75  # of a step timing: 50 of fedsec's are between two marks, 74 of the peer's
TURNS = 3  # of timing the run that reaches the peer's quality
TUNING = 10  # images of the training split on which weights and step lengths are chosen
APART = 53  # between two of them: neighbours look alike
LENGTHS = (0.5, 1.0, 2.0)  # multiples of the configured step length that are tried
ROUNDING = 0.01  # dB by which a run may miss the quality that it is to reach
ALIKE = 1e-5  # how close the two objectives have to be at the same image
Marks = list[tuple[int, float]]  # (steps done, clock), as a loop reports them


# ---- the peer's side ----------------------------------------------------------------------------


class PeerFailed(RuntimeError):
    """The peer cannot be installed or run; `str` is the reason, one line."""


# Runs on the peer's interpreter. Its progress lines are the peer's own log, every 25 steps.
WORKER = """
import os, pickle, sys
answers = os.fdopen(os.dup(1), "wb"); os.dup2(2, 1)  # what the peer prints is not an answer
import breaching, logging, re, time, torch, traceback
from types import SimpleNamespace
device, threads, clock = torch.device(sys.argv[1]), int(sys.argv[2]), getattr(time, sys.argv[3])
torch.set_num_threads(threads)
marks, setup, given = [], dict(dtype=torch.float, device=device), {}

class Note(logging.Handler):
    def emit(self, record):
        line = re.search(r"It: (\\d+)", record.getMessage())
        if line: marks.append((int(line[1]), clock()))

log = logging.getLogger("breaching.attacks.optimization_based_attack")
log.setLevel(logging.INFO); log.propagate = False; log.addHandler(Note())

def hello():
    return f"torch {torch.__version__}, python {sys.version.split()[0]}, {breaching.__file__}"

def victim(model, gradients, label, shape, mean, std):
    facts = SimpleNamespace(shape=shape, mean=mean, std=std, modality="vision")
    weights, buffers = list(model.parameters()), list(model.buffers())
    server = dict(parameters=weights, buffers=buffers, metadata=facts)
    user = dict(num_data_points=1, labels=label.to(device), local_hyperparams=None)
    shared = dict(gradients=[g.to(device) for g in gradients], buffers=None, metadata=user)
    given.update(model=model.to(device), server=server, shared=shared)

def run(steps, tv, lr, start):
    cfg = breaching.get_attack_config("invertinggradients", [f"optim.max_iterations={steps}",
        "optim.callback=25", f"optim.step_size={lr}", f"regularization.total_variation.scale={tv}"])
    loss = torch.nn.CrossEntropyLoss()
    attacker = breaching.attacks.prepare_attack(given["model"], loss, cfg, setup)
    marks.clear()
    told, begun = ([given["server"]], [given["shared"]]), clock()
    found, stats = attacker.reconstruct(*told, server_secrets={}, initial_data=start)
    image = found["data"].cpu()
    return dict(image=image, seconds=clock() - begun, marks=marks, losses=stats["Trial_0_Val"])

while True:
    try: name, words = pickle.load(sys.stdin.buffer)
    except EOFError: break
    try: answer = True, dict(hello=hello, victim=victim, run=run)[name](**words)
    except Exception as error:
        traceback.print_exc()
        answer = False, f"{type(error).__name__}: {error}"
    pickle.dump(answer, answers); answers.flush()
"""


class Peer:
    """A live process of the peer's environment that answers one command at a time."""

    def __init__(self, python: Path, device: str, threads: int, clock: str):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the process
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-c", WORKER, device, str(threads), clock],
            env=os.environ | {"PYTHONPATH": str(ROOT), THREADS: str(threads)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def ask(self, command: str, **words: Any) -> Any:
        try:
            pickle.dump((command, words), self.process.stdin)  # type: ignore[arg-type]
            self.process.stdin.flush()  # type: ignore[union-attr]
            fine, answer = pickle.load(self.process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError) as death:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            raise PeerFailed(said[-1] if said else f"exit {self.process.returncode}") from death
        if not fine:
            raise PeerFailed(str(answer).splitlines()[0])
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def environment(parent: Path) -> Path:
    """The interpreter of the peer's environment, made unless it is there; what is done is said."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    wanted = "\n".join([BREACHING, platform.python_version(), *packages])
    folder = parent / hashlib.sha256(wanted.encode()).hexdigest()[:8]  # each checkout has its own
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = folder / "made.txt"
    if made.exists():
        print(f"peer         {BREACHING} in {folder}")
        return python
    print(f"peer         installs {BREACHING} into {folder}, which borrows from {sys.prefix}")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    _call(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(_call(python, "-c", where).strip())
    (site / "borrowed.pth").write_text("\n".join(packages))
    _call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", BREACHING)
    made.write_text(wanted)
    return python


def _call(*words: str | Path) -> str:
    got = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if got.returncode:
        last = (got.stderr or got.stdout).strip().splitlines() or [f"exit {got.returncode}"]
        raise PeerFailed(f"{' '.join(map(str, words[1:5]))}: {last[-1]}")
    return got.stdout


# ---- one problem, two solvers -------------------------------------------------------------------

Attack = Callable[[Observation, Sequence[torch.Generator], Callable], Reconstruction]


@dataclass(frozen=True)
class Case:
    """Victims of one model: each row one image, its one-hot target, and its gradient."""

    model: nn.Module
    images: Tensor  # [n c h w]
    targets: Tensor  # [n k]
    updates: list[Tensors]
    clock: Callable[[], float]

    def seen(self, rows: Iterable[int]) -> Observation:
        local, exchanges = Local(kind="gradient", lr=1.0), []
        for i in rows:
            batch, sent = Batch(self.images[i, None], self.targets[i, None]), self.updates[i]
            known = Update(sent, {}, 1), batch, batch, local, None
            exchanges.append(Exchange(0, (i,), self.model, "eval", *known))
        return ThreatModel(grants=GRANTS, name="known_labels").observe(exchanges)

    @property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the model's own normalisation, [c 1 1], on the CPU."""
        normalise: Any = self.model.normalise
        return normalise.mean.cpu(), normalise.std.cpu()

    def introduce(self, peer: Peer, row: int) -> None:
        """Make `row` the peer's victim. It normalises for itself, so the model then does not."""
        model: Any = copy.deepcopy(self.model).cpu()
        model.normalise = nn.Identity()
        mean, std = (list(map(float, part.flatten())) for part in self.pixels)
        peer.ask(
            "victim", model=model, gradients=[g.cpu() for g in self.updates[row].values()],
            label=self.targets[row, None].argmax(1).cpu(), shape=tuple(self.images.shape[1:]),
            mean=mean, std=std,
        )  # fmt: skip

    def start(self, row: int) -> Tensor:
        """Standard normal pixels inside the data range: what fedsec's engine begins with."""
        mean, std = self.pixels
        shape = self.images[row].shape
        x = torch.randn(shape.numel(), generator=stream(0, "attack", row)).reshape(1, *shape)
        return torch.max(torch.min(x, (1 - mean) / std), -mean / std)


@dataclass(frozen=True)
class Outcome:
    """Images [n c h w] in [0, 1], the objective at each, clock seconds, and the loop's marks."""

    images: Tensor
    losses: list[float]
    seconds: float
    marks: Marks

    def psnr(self, truth: Tensor) -> float:
        return float(metrics.psnr(self.images, truth.cpu()).mean())


@dataclass(frozen=True)
class Tuned:
    """What is chosen for each side: the smoothness weight, and the length of a step."""

    tv: float
    lr: float = 0.1  # the peer's


def by_peer(peer: Peer, case: Case, steps: int, tuned: Tuned, start: Tensor) -> Outcome:
    """The peer's whole attack on the victim that it was introduced to."""
    got = peer.ask("run", steps=steps, tv=tuned.tv, lr=tuned.lr, start=start)
    mean, std = case.pixels
    images = (got["image"] * std + mean).clamp(0, 1)
    return Outcome(images, got["losses"], got["seconds"], got["marks"])


def by_fedsec(case: Case, attack: Attack, rows: Sequence[int], lanes: int) -> Outcome:
    """Victims `rows`, at most `lanes` of them in one stack."""
    marks: Marks = []
    losses, images, seconds = [], [], 0.0
    for first in range(0, len(rows), lanes):
        part = rows[first : first + lanes]
        seen, rngs = case.seen(part), [stream(0, "attack", row) for row in part]
        begun = case.clock()
        found = attack(seen, rngs, lambda step, of, loss: marks.append((step, case.clock())))
        images.append(found.images[:, 0].cpu())
        seconds += case.clock() - begun
        losses += found.loss.tolist()
    return Outcome(torch.cat(images), losses, seconds, marks)


def padded_variation(images: Tensor) -> Tensor:
    """The peer's total variation: neighbours below and right, zero beyond the rim."""
    x = F.pad(images, (0, 1, 0, 1))
    below, right = x[..., 1:, :-1], x[..., :-1, 1:]
    here = x[..., :-1, :-1]
    return ((below - here).abs() + (right - here).abs()).mean()


def step_lr(steps: int) -> rules.Schedule:
    """The peer's step-lr: a tenth of the step length at about 3/8, 5/8 and 7/8 of the run."""
    return lambda step: 0.1 ** sum(step >= steps // part for part in (2.667, 1.6, 1.142))


def as_the_peer(steps: int, tuned: Tuned, half: float = 0.0) -> Attack:
    """The peer's invertinggradients on fedsec's engine; `half` of the steps in bfloat16."""
    search = engine.Search(
        distance=engine.cosine,
        priors=((tuned.tv, padded_variation),),
        rule=rules.Adam(lr=tuned.lr, signed=True),
        schedule=step_lr(steps),
        steps=steps,
        boxed=True,
        half=half,
    )
    return lambda seen, rngs, progress: engine.match(seen, seen.labels, search, rngs, progress)


def difference(peer: Peer, case: Case, tuned: Tuned) -> float:
    """The greatest gap between the two objectives at fedsec's images after 1 and 30 steps."""
    mean, std = case.pixels
    gaps = []
    for steps in (1, 30):
        ours = by_fedsec(case, as_the_peer(steps, tuned), [0], 1)
        theirs = by_peer(peer, case, 1, tuned, (ours.images - mean) / std)
        gaps.append(abs(ours.losses[0] - theirs.losses[0]))
    return float(torch.tensor(gaps).max())  # NaN if there is one


# ---- measurements -------------------------------------------------------------------------------


def per_step(outcome: Outcome, steps: int) -> float:
    """Seconds a step between the loop's first and last mark; without two marks, of the whole."""
    marks = {done: at for done, at in reversed(outcome.marks)}  # after the last step comes no other
    first, last = min(marks, default=0), max(marks, default=0)
    if first == last:
        return outcome.seconds / steps
    return (marks[last] - marks[first]) / (last - first)


def race(
    peer: Peer | None, case: Case, tuned: Tuned, args: argparse.Namespace
) -> list[list[float]]:
    """Seconds a lane-step: the peer's, fedsec's with one victim, and with several, in turns.

    All are warmed up first; fedsec's first calls, compilation included, are printed. Where
    fedsec's own attack takes steps in bfloat16, these are timed.
    """
    half = float(own(args.attack_overrides).half > 0)

    def pace(lanes: int) -> float:
        outcome = by_fedsec(case, as_the_peer(STEPS, tuned, half), range(lanes), lanes)
        return per_step(outcome, STEPS) / lanes

    begun = time.perf_counter()
    pace(1)
    between = time.perf_counter()
    pace(args.lanes)
    several = f"{time.perf_counter() - between:.1f} s ({args.lanes})"
    print(f"             first calls {between - begun:.1f} s (1 lane), {several}")
    if peer is not None:
        by_peer(peer, case, 10, tuned, case.start(0))
    peers, single, multiple = [], [], []
    for _ in range(args.pairs):
        if peer is not None:
            peers.append(per_step(by_peer(peer, case, STEPS, tuned, case.start(0)), STEPS))
        single.append(pace(1))
        multiple.append(pace(args.lanes))
    return [peers, single, multiple]


def fewest(reaches: Callable[[int], bool], most: int) -> int | None:
    """About the least number of steps whose run reaches the goal, to a tenth; None: not by `most`.

    Doubles from most/32, then halves the last gap: right if more steps are never worse.
    """
    low, high = 0, max(1, most // 32)
    while not reaches(high):
        if high == most:
            return None
        low, high = high, min(most, 2 * high)
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def to_quality(
    case: Case, recipe: Callable[[int], Attack], goal: float, most: int, lanes: int
) -> tuple[int, list[float]] | None:
    """Fewest steps that reach a mean PSNR of `goal` dB, and their seconds an image, `TURNS` times.

    The steps are found on passes that are not measured.
    """
    rows = range(len(case.images))

    def run(steps: int) -> Outcome:
        return by_fedsec(case, recipe(steps), rows, lanes)

    def reaches(steps: int) -> bool:
        quality = run(steps).psnr(case.images)
        print(f"             fedsec: {steps} steps {quality:.1f} dB")
        return quality >= goal - ROUNDING

    steps = fewest(reaches, most)
    return None if steps is None else (steps, [run(steps).seconds / len(rows)
                                               for _ in range(TURNS)])  # fmt: skip


def peer_runs(peer: Peer, case: Case, tuned: Tuned, steps: int) -> tuple[float, float]:
    """Mean seconds and PSNR of the peer's whole run on each image."""
    seconds, quality = [], []
    for row in range(len(case.images)):
        case.introduce(peer, row)
        outcome = by_peer(peer, case, steps, tuned, case.start(row))
        seconds.append(outcome.seconds)
        quality.append(outcome.psnr(case.images[row, None]))
        print(f"             peer: image {row} {quality[-1]:.1f} dB in {seconds[-1]:.1f} s")
    return statistics.mean(seconds), statistics.mean(quality)


# ---- what is compared ---------------------------------------------------------------------------


def cases(args: argparse.Namespace, name: str) -> tuple[Case, Case, Case]:
    """Test images whose steps are timed, those compared, and training images to choose on."""
    kind, _, path = args.data.partition(":")
    require(kind in ("photos", "npz"), "data", "must be photos or npz:PATH", args.data)
    images = (Photos() if kind == "photos" else Npz(path=path)).load()
    colours = images.shape[0]
    require(colours == 3, "data", "must have three channels for the peer's smoothness", colours)
    fresh = stream(args.seed, "model", name)
    model = MODELS[name].build(images.shape, images.classes, images.mean, images.std, fresh)
    model.to(args.device)

    def of(split: Split, count: int, apart: int) -> Case:
        rows = [i * apart % len(split) for i in range(count)]
        batch = split.batch(rows, images.classes).to(args.device)
        local = Local(kind="gradient", lr=1.0)
        updates = []
        for image, target in zip(batch.images.split(1), batch.targets.split(1), strict=True):
            gradient = engine.simulate(model, image, target, local)
            updates.append({k: g.detach() for k, g in gradient.items()})
        return Case(model, batch.images, batch.targets, updates, getattr(time, CLOCKS[args.clock]))

    timed, compared = (of(images.test, count, APART) for count in (args.lanes, args.images))
    return timed, compared, of(images.train, TUNING, APART)


def tune(
    who: str, case: Case, recipe: Callable[[Tuned], Attack], weights: Sequence[float], lr: float,
    lanes: int,
) -> Tuned:  # fmt: skip
    """The weight and then the step length with the best mean PSNR on the tuning images.

    One weight that is offered is taken, and `lr` with it.
    """

    def best(offered: Sequence[Tuned]) -> Tuned:
        if len(offered) == 1:
            return offered[0]
        rows = range(len(case.images))
        quality = {t: by_fedsec(case, recipe(t), rows, lanes).psnr(case.images) for t in offered}
        each = ", ".join(f"tv {t.tv:g} lr {t.lr:g} {q:.1f} dB" for t, q in quality.items())
        print(f"             {who}: {each}")
        return max(quality, key=quality.__getitem__)

    chosen = best([Tuned(tv, lr) for tv in weights])
    lengths = LENGTHS if len(weights) > 1 else (1.0,)
    return best([Tuned(chosen.tv, lr * length) for length in lengths])


def own(overrides: Sequence[str], steps: int | None = None) -> Inverting:
    """configs/attack/inverting.yaml with `key=value` overrides, and so many steps."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    stored: Any = OmegaConf.load(ROOT / "configs/attack/inverting.yaml")
    stored.pop("_target_")
    last = [] if steps is None else [f"steps={steps}"]
    try:
        changes = OmegaConf.from_dotlist([*overrides, *last])
        merged: Any = OmegaConf.merge(OmegaConf.structured(Inverting), stored, changes)
    except OmegaConfBaseException as error:
        raise Refused("attack-overrides", str(error).splitlines()[0]) from error
    return Inverting(**{str(key): merged[key] for key in merged})


HEAD = (
    "model", "peer ms/step", "fedsec ms/step", "ratio", "{lanes} lanes ms/lane-step", "ratio",
    "peer tv, lr", "peer s/image", "peer dB", "fedsec tv, lr", "fedsec s/image to it (steps)",
    "ratio", "fedsec s/image, all steps", "fedsec dB",
)  # fmt: skip


def measure(name: str, peer: Peer | None, args: argparse.Namespace) -> list[str]:
    """One line of the table. Without a peer, what is compared with it is missing."""
    timed, case, tuning = cases(args, name)
    theirs = Tuned(args.tv[0])
    if peer is not None:
        timed.introduce(peer, 0)
        gap = difference(peer, timed, theirs)
        print(f"{name:12} objectives differ by {gap:.1e} at the same images")
        if not gap <= ALIKE:
            raise PeerFailed(f"refused: the objectives differ by {gap:.1e} at the same images")
    peers, single, several = race(peer, timed, theirs, args)
    cells = [name, _ms(peers), _ms(single), _ratios(peers, single)]
    cells += [_ms(several), _ratios(peers, several)]
    if args.images == 0:
        return cells + [""] * (len(HEAD) - len(cells))

    def recipe(tuned: Tuned, steps: int) -> Attack:
        return own([*args.attack_overrides, f"tv={tuned.tv}", f"lr={tuned.lr}"], steps)

    given = own(args.attack_overrides)
    chosen = any(word.startswith("tv=") for word in args.attack_overrides)
    weights, lanes = [given.tv] if chosen else args.tv, args.lanes
    ours = tune("fedsec", tuning, lambda t: recipe(t, given.steps), weights, given.lr, lanes)
    rows = range(args.images)
    if peer is None:
        cells += ["not run"] + [""] * 2 + [_tuned(ours)] + [""] * 2
    else:
        steps, lr = args.steps, theirs.lr
        theirs = tune("peer", tuning, lambda t: as_the_peer(steps, t), args.tv, lr, lanes)
        seconds, goal = peer_runs(peer, case, theirs, args.steps)
        cells += [_tuned(theirs), f"{seconds:.2f}", f"{goal:.1f}", _tuned(ours)]
        reached = to_quality(case, lambda n: recipe(ours, n), goal, args.steps, args.lanes)
        if reached is None:
            cells += [f"not in {args.steps} steps", ""]
        else:
            steps, each = reached
            cells += [f"{statistics.median(each):.3f} ({steps})"]
            cells += [_ratios([seconds] * len(each), each)]
    full = by_fedsec(case, recipe(ours, args.steps), rows, args.lanes)
    return [*cells, f"{full.seconds / args.images:.2f}", f"{full.psnr(case.images):.1f}"]


def _tuned(tuned: Tuned) -> str:
    return f"{tuned.tv:g}, {tuned.lr:g}"


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}" if seconds else "not run"


def _ratios(peer: list[float], fedsec: list[float]) -> str:
    """Median, least and greatest of the pairs' ratios."""
    if not peer:
        return ""
    each = [p / f for p, f in zip(peer, fedsec, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}..{max(each):.2f})"


def table(lines: list[list[str]]) -> str:
    """As Markdown."""
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


# ---- the command line ---------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    plain = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="fedsec beside breaching", formatter_class=plain)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=600, help="of a whole attack, on both sides")
    parser.add_argument("--images", type=int, default=10, help="for quality; 0: only steps")
    parser.add_argument("--lanes", type=int, default=8, help="of fedsec, all in one step")
    parser.add_argument("--pairs", type=int, default=5, help="of step timings, taking turns")
    parser.add_argument(
        "--tv", type=float, nargs="+", default=[0.001, 0.01, 0.03, 0.1],
        help="smoothness weights that are offered to both sides; one: nothing is tuned; fedsec's"
        " is tv=VALUE among its overrides, if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--attack-overrides", nargs="*", metavar="KEY=VALUE", default=[],
        help="changes to configs/attack/inverting.yaml, which fedsec runs to the peer's quality",
    )  # fmt: skip
    parser.add_argument("--data", default="photos", help="or npz:PATH, in MedMNIST's layout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for busy machines")
    parser.add_argument("--seed", type=int, default=0, help="of the victims' weights")
    parser.add_argument("--env", type=Path, default=Path.home() / ".cache/fedsec/peers")
    parser.add_argument("--quick", action="store_true", help="60 steps, one image, two pairs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # lines show at once, in a file too
        sys.stdout.reconfigure(line_buffering=True)
    if args.quick:
        args.steps, args.images, args.pairs, args.tv = 60, 1, 2, [0.01]
    try:
        for key in ("steps", "lanes", "pairs", "threads"):
            require(getattr(args, key) >= 1, key, "must be at least 1", getattr(args, key))
        require(args.images >= 0, "images", "must be at least 0", args.images)
        on_gpu = args.device != "cpu" and args.clock == "cpu"
        require(not on_gpu, "clock", "must be wall on a GPU", args.clock)
        own(args.attack_overrides)
        return compare(args)
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def compare(args: argparse.Namespace) -> int:
    begun, failures = time.perf_counter(), {}
    torch.set_num_threads(args.threads)
    print(f"machine      {_machine(args.device)}")
    print(f"fedsec       {version('fedsec')} at {records.commit()}, torch {torch.__version__}")
    print(f"             {args.threads} thread(s), {args.clock} clock, {date.today()}")
    peer = why = None
    try:
        peer = Peer(environment(args.env), args.device, args.threads, CLOCKS[args.clock])
        print(f"             {peer.ask('hello')}")
    except (PeerFailed, OSError) as failure:
        peer, why = None, str(failure)
        print(f"             not run: {why}")
    lines = [[cell.format(lanes=args.lanes) for cell in HEAD]]
    for name in args.models:
        try:
            lines.append(measure(name, peer, args))
        except PeerFailed as failure:
            failures[name] = str(failure)
            print(f"{name:12} peer not run: {failure}")
            lines.append(measure(name, None, args))
        print("             " + ", ".join(lines[-1]))  # what is measured outlives an interruption
    if peer is not None:
        peer.close()
    print(f"\n{table(lines)}\n")
    print(
        f"batch 1, eval mode, labels known, {args.steps} steps; quality: the mean of {args.images}"
        f"\nimages of {args.data}, the peer's one by one, fedsec's up to {args.lanes} in a stack;"
        f"\nratios: the peer's time over fedsec's, median (least..greatest) of {args.pairs} pairs"
    )
    for name, reason in failures.items() if why is None else [("peer", why)]:
        print(f"not run      {name}: {reason}")
    if torch.get_num_threads() != args.threads:
        print(f"careful      fedsec ended with {torch.get_num_threads()} threads")
    print(f"took         {time.perf_counter() - begun:.0f} s")
    return 0


def _machine(device: str) -> str:
    """Processor, cores, load, and the GPU where one is used."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    gpu = "" if device == "cpu" else f", {torch.cuda.get_device_name(device)}"
    return f"{name}, {os.cpu_count()} cores{load}, python {platform.python_version()}{gpu}"


if __name__ == "__main__":
    sys.exit(main())

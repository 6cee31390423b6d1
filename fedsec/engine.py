"""The loop behind every attack that optimises images until their update matches the observed one.

Lanes = victims x restarts are the leading axis of one tensor and are all stepped together. An
attack contributes its distance, priors, step rule and schedule; the engine owns the loop: it keeps
each lane's best iterate by the attack's own objective, retires lanes that are done, stuck or
non-finite, and talks to the device only to report progress, and to keep how far a long search is. A
step's gradient comes from the sweeps (sweeps.py) where they know the model and the
update; several local steps or clients are unrolled (unroll.py); else it comes from autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from types import FunctionType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fedsec import columns, sweeps
from fedsec.attack import Place, Progress, Told
from fedsec.cost import flops_once
from fedsec.defense import Compose, Defense, clips, matched, parts
from fedsec.rules import PHOTOGRAPHS, Adam, Schedule, Spectrum, StepRule, anneal, constant
from fedsec.threat import Observation
from fedsec.types import Local, Reconstruction, Tensors
from fedsec.unroll import Distance, Unrolled

Prior = Callable[[Float[Tensor, "b c h w"]], Tensor]  # normalised images of one lane -> scalar
EVERY = 25  # steps between two looks at the lanes: the only synchronisations with the device
LARGE = 1_000_000  # parameters from which columns are faster than convolutions, for single images
LANES = 64  # whose columns still fit: more would take gigabytes
POINTS = 50  # of the curve of a search's objective, at most
FALL = 1e-3  # relative: an objective that falls by less is taken to stand still


# ---- the update that a batch would cause --------------------------------------------------------


PerExample = Callable[[Tensors], Tensors]  # examples' gradients [n, *parameter], before and after


def simulate(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    local: Local,
    per_example: PerExample | None = None,
    drawn: Tensors | None = None,
) -> Tensors:
    """The update that a client with this batch would send, differentiable in both arguments.

    One gradient of the mean loss, or weights before - after `local.steps` steps over consecutive
    chunks of the batch; with `local.parts`, the mean over clients that hold consecutive parts of
    it. Works on one lane; `vmap` it for several. The model is not changed. `per_example` is what a
    client does with each example's gradient before it takes the mean; `drawn` are buffers of random
    layers, for what they drew in its one step.
    """
    if local.parts:
        alone = replace(local, parts=())
        shares = zip(images.split(local.parts), targets.split(local.parts), strict=True)
        updates = [simulate(model, x, t, alone, per_example) for x, t in shares]
        weights = [n / sum(local.parts) for n in local.parts]
        return {
            k: torch.stack([w * u[k] for w, u in zip(weights, updates, strict=True)]).sum(0)
            for k in updates[0]
        }
    # detach: parameters belong to the server, images are what is looked for
    before = {k: p.detach() for k, p in model.named_parameters()}

    def loss(weights: Tensors, x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights | (drawn or {}), (x,)), t)

    def gradient_at(weights: Tensors, x: Tensor, t: Tensor) -> Tensors:
        if per_example is None:
            return grad(loss)(weights, x, t)
        each = vmap(lambda image, target: grad(loss)(weights, image[None], target[None]))(x, t)
        return {k: g.mean(0) for k, g in per_example(each).items()}

    if local.kind == "gradient":
        return gradient_at(before, images, targets)
    weights = before
    size = min(local.batch or len(images), len(images))
    chunks = list(zip(images.split(size), targets.split(size), strict=True))
    for step in range(local.steps):
        gradient = gradient_at(weights, *chunks[step % len(chunks)])
        weights = {k: w - local.lr * gradient[k] for k, w in weights.items()}
    return {k: before[k] - weights[k] for k in before}


def surrogate(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    update: Tensors,
    share: Tensor,
) -> Tensors:
    """The gradient at weights before - `share` x update: somewhere on a client's way (SME).

    Zhu et al. 2023, "Surrogate model extension", section 3: there is a point between the weights
    before and after local training whose gradient points almost along the whole update.
    """
    weights = {k: p.detach() - share * update[k] for k, p in model.named_parameters()}

    def loss(weights: Tensors) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (images,)), targets)

    return grad(loss)(weights)


# ---- distances and priors -----------------------------------------------------------------------


def cosine(guess: Tensors, observed: Tensors) -> Tensor:
    """One minus the cosine similarity over all parameters (Geiping et al. 2020, equation 4)."""
    dot = sum((guess[k] * observed[k]).sum() for k in observed)
    norm = sum(guess[k].square().sum() for k in observed)
    target = sum(observed[k].square().sum() for k in observed)
    return 1 - dot / (norm * target).clamp_min(1e-30).sqrt()  # type: ignore[union-attr]


def squared(guess: Tensors, observed: Tensors) -> Tensor:
    """Sum of squared differences over all parameters (Zhu et al. 2019, equation 4)."""
    return torch.stack([(guess[k] - observed[k]).square().sum() for k in observed]).sum()


def relative(guess: Tensors, observed: Tensors) -> Tensor:
    """`squared`, in multiples of the observed update's squared length."""
    return squared(guess, observed) / _square(observed).clamp_min(1e-30)


def through(defense: Defense, distance: Distance) -> Distance:
    """The distance of what the defense would make of the guess.

    Its derivative takes the defense for a mere change of length: the straight-through estimator
    (Bengio et al. 2013), since that of a sign, or of any rounding, is zero nearly everywhere.
    """

    def compared(guess: Tensors, observed: Tensors) -> Tensor:
        plain = {k: g.detach() for k, g in guess.items()}
        sent = defense.expected(plain, observed)
        scale = (_square(sent) / _square(plain).clamp_min(1e-30)).sqrt()
        return distance({k: sent[k] + scale * (g - plain[k]) for k, g in guess.items()}, observed)

    return compared


def _square(tensors: Tensors) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors.values()]).sum()


def total_variation(images: Float[Tensor, "b c h w"]) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down plus across (anisotropic)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    across = (images[..., :, 1:] - images[..., :, :-1]).abs()
    return sum(d.sum() / max(1, d.numel()) for d in (down, across))  # type: ignore[return-value]


@dataclass(frozen=True)
class Informed:
    """A prior that is told something of each victim."""

    of: Callable[[Float[Tensor, "b c h w"], Tensors], Tensor]  # one lane's images, facts -> scalar
    facts: Tensors  # of each victim: the leading axis


@dataclass(frozen=True)
class Fade:
    """A prior's weight that falls by the same factor every step, from `first` to `last`.

    Continuation (Blake and Zisserman 1987): smooth images are found first, and what is fine last.
    Only for priors that are never negative: an objective under a larger weight then is an upper
    bound of the same image's under a smaller, so that the best iterate stays so.
    """

    first: float  # in the first step, > 0
    last: float  # from `over` of the steps on, > 0 and at most `first`
    over: float = 0.8

    def at(self, share: float) -> float:
        """After `share` of the steps."""
        return self.first * (self.last / self.first) ** min(1.0, share / self.over)


Weight = float | Fade


# distances that the sweeps know from inner products alone
INNER: dict[Distance, sweeps.Inner] = {
    cosine: sweeps.COSINE,
    squared: sweeps.SQUARED,
    relative: sweeps.RELATIVE,
}


# ---- the loop -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Search:
    """One attack's way of matching: everything that the loop needs besides the observation."""

    distance: Distance
    rule: StepRule
    steps: int
    schedule: Schedule = constant
    priors: tuple[tuple[Weight, Prior | Informed], ...] = ()
    group: float = 0.0  # weight of a restart's mean squared distance from its victim's mean one
    restarts: int = 1
    copies: int = 1  # of the victim's images that a lane holds, one after the other
    surrogate: bool = False  # match a gradient between the weights before and after the update
    spread: float = 1.0  # standard deviation of the pixels of a start
    tile: int = 0  # pixels of the square that a start repeats; 0: none
    spectrum: float | None = None  # power of the `Spectrum` that steps are taken in; None: pixels
    boxed: bool = False  # keep pixels in the data range after every step
    enough: float = 0.0  # an objective at or below this ends the lane
    patience: int = 0  # steps without a fall of the objective that end the lane; 0: none do
    halving: bool = False  # after 1/8, 1/4 and 1/2 of the steps a victim's better lanes go on
    direction: bool = False  # only the update's direction counts: its length is made one first
    half: float = 0.0  # share of the steps, from the first on, whose convolutions are bfloat16

    @property
    def exact_from(self) -> int:
        """The first step that is not in half precision."""
        return round(self.half * self.steps)


def spectral(
    *, steps: int, lr: float, priors: Sequence[tuple[Weight, Prior | Informed]], restarts: int = 1
) -> Search:
    """The search that gets furthest in few steps: it is ours, the published parts are Geiping's.

    Cosine distance (Geiping et al. 2020); Adam on cosine coefficients (rules.Spectrum) from nearly
    grey, `lr` long in normalised pixels and annealed to nothing over `steps`.
    """
    return Search(
        distance=cosine,
        priors=tuple(priors),
        rule=Adam(lr=lr, betas=(0.9, 0.9)),
        schedule=anneal(steps),
        steps=steps,
        restarts=restarts,
        spread=0.1,
        spectrum=PHOTOGRAPHS,
        boxed=True,
        direction=True,
    )


def match(
    seen: Observation,
    targets: Float[Tensor, "v b k"] | None,
    search: Search,
    rngs: Sequence[torch.Generator],
    progress: Progress | Told,
    spent: float = 0.0,
) -> Reconstruction:
    """Images whose simulated update matches the observed one, for every victim of the stack.

    `targets` None means that labels are optimised jointly, as softmax(logits). Pixels are searched
    in the model's normalised coordinates, where the papers state their step lengths and
    smoothness weights. Each victim's start is drawn from its own stream, so that the result does
    not depend on who else is in the stack. `spent` is GFLOP for each victim that the attack used
    before, on its labels. A search of which `progress` holds a state goes on from there, on a CPU
    to the very same result.
    """
    lanes = _Lanes(seen, targets, search)
    x = lanes.begin(rngs)
    state = search.rule.start(x)
    active = torch.arange(len(x), device=x.device)
    best = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    best_x = x.clone()
    moves, looks = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), dtype=torch.long)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # of the active lanes
    lost = torch.zeros(len(best), dtype=torch.bool, device=x.device)  # of all lanes
    mark = torch.full_like(best, torch.finfo(best.dtype).max)  # objective at its last real fall,
    fallen = torch.zeros(len(best), dtype=torch.long, device=x.device)  # and the step
    stride = -(-search.steps // (POINTS - 2)) or 1
    curve = _curve(search.steps, stride, lanes.victims).to(best)
    place, first = _place(lanes, progress, x), 0
    if place.saved is not None:
        kept = {k: t.to(x.device) for k, t in place.saved.items()}
        x, active, best, best_x, done, lost, mark, fallen, curve = (kept[k] for k in _KEPT)
        moves, looks, first = kept["moves"].cpu(), kept["looks"].cpu(), int(kept["step"])
        state = {k.removeprefix(_RULE): t for k, t in kept.items() if k.startswith(_RULE)}

    def keep_at(step: int, over: bool = False) -> None:
        values = (x, active, best, best_x, done, lost, mark, fallen, curve)
        kept = dict(zip(_KEPT, values, strict=True)) | {_RULE + k: t for k, t in state.items()}
        place.save(kept | {"moves": moves, "looks": looks, "step": torch.tensor(step)}, over)

    halvings = _halvings(search)
    objective = recorded(lanes.objective, x.device)
    for step in range(first, search.steps + 1):  # the last look evaluates, and does not move
        lanes.weigh(step)
        if 0 < step == search.exact_from and lanes.rough is not None:
            lanes.rough = None
            best, _ = lanes.objective(best_x, torch.arange(len(best_x), device=x.device))
            mark[:], fallen[:] = torch.finfo(best.dtype).max, step
            objective = recorded(lanes.objective, x.device)
        loss, gradient = objective(x, active)
        better = loss < best[active]  # false for NaN
        best[active] = torch.where(better, loss, best[active])
        best_x[active] = torch.where(better[:, None], x, best_x[active])
        if step % stride == 0 or step == search.steps:
            curve[:, -(-step // stride), 1] = best.reshape(-1, search.restarts).amin(1)
        broken = ~(loss.isfinite() & gradient.isfinite().all(1))
        lost[active] |= broken
        done = done | broken | (loss <= search.enough)
        if search.patience:
            fell = loss < mark[active] - FALL * mark[active].abs()
            mark[active] = torch.where(fell, loss, mark[active])
            fallen[active] = torch.where(fell, step, fallen[active])
            done = done | (step - fallen[active] >= search.patience)
        if step == search.steps:
            moves[active.cpu()], looks[active.cpu()] = step, step + 1
            break
        slope, scale = lanes.inward(gradient), search.schedule(step)
        move, state, stuck = search.rule.step(slope, state, step, scale)
        done = done | stuck
        x = torch.where(done[:, None], x, lanes.boxed(x + lanes.outward(move)))
        if (step + 1) % EVERY == 0 or step + 1 in halvings:
            progress(step + 1, search.steps, float(best[best.isfinite()].mean()))
            if step + 1 in halvings:
                going = torch.full_like(best, torch.inf)
                going[active] = torch.where(done, torch.inf, best[active])
                done = done | _worse(going, search.restarts, halvings[step + 1])[active]
            if bool(done.any()):
                moves[active[done].cpu()] = looks[active[done].cpu()] = step + 1
                keep = ~done
                x, active, done = x[keep], active[keep], done[keep]
                state = {k: s[keep] for k, s in state.items()}
                if len(x) == 0:
                    break
            keep_at(step + 1)
    state = {}
    keep_at(search.steps + 1, over=True)
    progress(search.steps, search.steps, float(best[best.isfinite()].mean()))
    found = lanes.reconstruction(best, best_x, moves, looks, lost)
    if isinstance(objective, Recorded) and objective.trouble:
        found = found.saying(objective.trouble)
    if search.half and not lanes.halved:
        found = found.saying("half: no step has a way in bfloat16 here, and all were exact")
    return replace(found, gflop=found.gflop + spent, curve=curve.cpu())


def _curve(steps: int, stride: int, victims: int) -> Float[Tensor, "v p 2"]:
    """The steps of a curve's points: every `stride`th and the last; no objective yet."""
    at = torch.tensor([*range(0, steps, stride), steps], dtype=torch.double)
    each = torch.stack([at, torch.full_like(at, torch.nan)], 1)
    return each.repeat(victims, 1, 1)


def judged(
    seen: Observation,
    targets: Float[Tensor, "v b k"],
    search: Search,
    images: Float[Tensor, "v b c h w"],
) -> Float[Tensor, " v"]:
    """The objective of `search` at images in [0, 1] that something else found."""
    lanes = _Lanes(seen, targets, replace(search, restarts=1, half=0.0))
    x = ((images.to(lanes.mean) - lanes.mean) / lanes.std).flatten(1)
    x = torch.cat([x, lanes.starts], 1)
    loss, _ = lanes.objective(lanes.boxed(x), torch.arange(len(x), device=x.device))
    return loss.detach()


def step_gflop(seen: Observation, targets: Float[Tensor, "v b k"], search: Search) -> float:
    """GFLOP of one step of one lane, as records count it."""
    lanes = _Lanes(seen, targets, replace(search, half=0.0))
    width = lanes.pixels + int(search.surrogate) + lanes.starts.shape[1]
    x = torch.zeros(1, width, dtype=lanes.dtype)
    return lanes.counted(x.to(lanes.device))


# ---- on a GPU -----------------------------------------------------------------------------------

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # lanes, which -> value and gradient
Replay = tuple[Callable[[], object], tuple[Tensor, Tensor]]  # writes anew to the tensors beside it


def recorded(objective: Objective, device: torch.device) -> Objective:
    """The same, in the way that suits the device."""
    return Recorded(objective, cuda_graph) if device.type == "cuda" else objective


class Recorded:
    """An objective that is recorded once for each set of lanes, and replayed as a whole.

    To launch the thousand kernels of a step one by one takes a GPU longer than to run them. Where
    recording fails, `trouble` has the reason, and the objective is called as it is.
    """

    def __init__(self, objective: Objective, record: Callable[[Callable], Replay]):
        self.objective, self.record, self.trouble = objective, record, ""
        self.active: Tensor | None = None

    def __call__(self, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        if active is not self.active and not self.trouble:
            self.replay = self.out = None  # free what fewer lanes do not need
            self.active, self.x = active, x.clone()
            try:
                self.replay, self.out = self.record(lambda: self.objective(self.x, active))
            except RuntimeError as error:
                first = next(iter(str(error).splitlines()), "")
                self.trouble = f"the attack's steps could not be recorded as a CUDA graph: {first}"
        if self.replay is None or self.out is None:
            return self.objective(x, active)
        self.x.copy_(x)
        self.replay()
        loss, gradient = self.out
        return loss.clone(), gradient.clone()  # the next replay overwrites them


def cuda_graph(fn: Callable[[], tuple[Tensor, Tensor]]) -> Replay:
    """`fn` as a CUDA graph. Raises RuntimeError where it cannot be captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # kernels are chosen, workspaces are taken
            fn()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    return graph.replay, out


# of the loop, with moves, looks and step
_KEPT = ("x", "active", "best", "best_x", "done", "lost", "mark", "fallen", "curve")
_RULE = "rule."  # before the names of what the step rule remembers


def _halvings(search: Search) -> dict[int, int]:
    """Of successive halving: steps done -> restarts of a victim that go on from there."""
    if not search.halving:
        return {}
    return {
        -(-search.steps // part): max(1, -(-search.restarts * part // 16)) for part in (8, 4, 2)
    }


def _worse(best: Tensor, restarts: int, left: int) -> Tensor:
    """Lanes that are not among the `left` best restarts of their victim.

    `best` is infinite for lanes that have ended, so that they are nobody's better half.
    """
    rank = best.reshape(-1, restarts).argsort(dim=1, stable=True).argsort(dim=1)
    return rank.flatten() >= left


def _place(lanes: _Lanes, progress: Progress | Told, starts: Tensor) -> Place:
    """Where this search keeps how far it is, under all that decides its course."""
    if not isinstance(progress, Progress):
        return Place()
    targets, model = lanes.targets, lanes.model
    inputs = [starts, *lanes.observed.values(), *model.state_dict().values()]
    inputs += [fact for p in lanes.informed for fact in p.facts.values()]
    return progress.place(lanes.said(), inputs if targets is None else [*inputs, targets])


def _described(part: object) -> str:
    """The same text in every process: a function by where it stands and what it closes over.

    Of the latter only plain values and functions: models and tensors are a problem's inputs.
    """
    if isinstance(part, tuple):
        return f"({', '.join(map(_described, part))})"
    if isinstance(part, Informed):
        return _described(part.of)
    if not isinstance(part, FunctionType):
        return repr(part)
    bare = inspect.unwrap(part)
    assert isinstance(bare, FunctionType)
    plain = (bool, int, float, str, tuple, FunctionType)
    cells = [cell.cell_contents for cell in bare.__closure__ or ()]
    held = [_described(value) for value in cells if isinstance(value, plain)]
    return f"{bare.__module__}:{bare.__code__.co_firstlineno} {bare.__qualname__} {held}"


class _Lanes:
    """The coordinates of one search: row of a matrix <-> images and labels of a lane."""

    def __init__(self, seen: Observation, targets: Tensor | None, search: Search):
        update = seen.sent
        self.observed: Tensors = update.tensors
        self.search, self.model, self.local = search, seen.model, seen.step
        self.distance, self.per_example = search.distance, None
        self.victims = len(next(iter(self.observed.values())))
        if "defense" in seen.grants:
            # clients who all count the same say 1, whatever they used
            single = update.count == seen.count == seen.step.steps == 1
            self._know(seen.defense, single)
        if search.direction:  # an update scaled to nothing still points somewhere
            squares = [
                t.double().reshape(len(t), -1).square().sum(1) for t in self.observed.values()
            ]
            length = torch.stack(squares).sum(0).sqrt()
            length = torch.where(length > 0, length, 1)
            self.observed = {
                k: (t / length.view(-1, *[1] * (t.dim() - 1))).to(t.dtype)
                for k, t in self.observed.items()
            }
        self.targets = None if targets is None else targets.repeat(1, search.copies, 1)
        self.informed = [p for _, p in search.priors if isinstance(p, Informed)]
        self.fading = [w for w, _ in search.priors if isinstance(w, Fade)]
        self.one_gradient = self.local.kind == "gradient" and not self.local.parts
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        # a tensor, which a recorded step reads anew; before a search, weights are its last ones
        self.faded = torch.tensor([w.last for w in self.fading], dtype=torch.double).to(parameter)
        self.image = (seen.count * search.copies, *seen.shape)
        self.pixels = torch.Size(self.image).numel()
        normalise = getattr(self.model, "normalise", None)
        mean = normalise.mean if normalise is not None else torch.zeros(1)
        std = normalise.std if normalise is not None else torch.ones(1)
        self.mean = mean.to(self.device, self.dtype).reshape(-1, 1, 1)
        self.std = std.to(self.device, self.dtype).reshape(-1, 1, 1)
        self.box = None
        if search.boxed and "data_range" in seen.grants:
            low, high = seen.data_range
            self.box = ((low - self.mean) / self.std, (high - self.mean) / self.std)
        self.spectrum = None
        if search.spectrum is not None:
            self.spectrum = Spectrum(self.image, search.spectrum, self.mean)
        with torch.no_grad():
            probe = torch.zeros(2, *seen.shape, device=self.device, dtype=self.dtype)
            self.classes = self.model(probe).shape[1]
        self.drawn: dict[str, torch.Size] = {}  # what is looked for besides images, in its order
        self.starts = self._hidden(seen)
        large = sum(p.numel() for p in self.model.parameters()) >= LARGE
        single = self.image[0] == 1 and self.victims * search.restarts <= LANES
        faster = [columns.kinds(self.dtype)] if large and single else []
        self.swept = self._sweeps(*faster, sweeps.PARAMETRIC)
        # in half precision, as long as its steps last
        self.rough = self._sweeps(columns.kinds(torch.bfloat16)) if search.half else None
        self.halved = self.rough is not None
        self.unrolled = Unrolled(self.model, self.observed, self.distance, self.local)
        self.asked: tuple[Tensor, list[int]] = (torch.empty(0), [])  # `active`, and its victims
        self.gflop_step = 0.0

    def _know(self, defense: Defense, single: bool) -> None:
        """What the defense publishes of how an update is made: of an example's part, and of all."""
        made = matched(defense, self.local, directions=self.search.distance is cosine)
        if made is not None:
            self.distance = through(made, self.search.distance)
            left = Compose([part for part in parts(made) if part.layers])
            sent = [{k: t[v] for k, t in self.observed.items()} for v in range(self.victims)]
            kept = [left.expected(each, each) for each in sent]  # of the guess, too
            self.observed = {k: torch.stack([each[k] for each in kept]) for k in self.observed}
        # of one example, a scaled gradient points where the whole one does
        one_scaled = single and self.search.distance is cosine
        if clips(defense) and not one_scaled:
            self.per_example = defense.per_example

    def _hidden(self, seen: Observation) -> Float[Tensor, "v w"]:
        """Where a search for the draws of random layers begins; empty where none are looked for."""
        none = torch.zeros(self.victims, 0, device=self.device, dtype=self.dtype)
        known = "defense" in seen.grants and self.one_gradient and self.per_example is None
        if not known or self.search.surrogate:
            return none
        sent, inputs = seen.sent.tensors, torch.zeros(self.image).to(none)
        each = [
            seen.defense.hidden(self.model, {k: t[v] for k, t in sent.items()}, inputs)
            for v in range(self.victims)
        ]
        self.drawn = {name: start.shape for name, start in each[0].items()}
        rows = [[start.flatten() for start in starts.values()] for starts in each]
        return torch.stack([torch.cat(row) for row in rows]) if self.drawn else none

    def begin(self, rngs: Sequence[torch.Generator]) -> Float[Tensor, "l d"]:
        """Standard normal pixels (and label logits); a victim's restarts are consecutive rows."""
        assert len(rngs) == self.victims, "one stream for each victim"
        width = self.pixels + (0 if self.targets is not None else self.image[0] * self.classes)
        rows = [
            torch.randn(width, generator=rng) for rng in rngs for _ in range(self.search.restarts)
        ]
        x = torch.stack(rows).to(self.device, self.dtype)
        pixels = self._normalised(x) * self.search.spread
        if self.search.tile:
            at = [torch.arange(n, device=x.device) % self.search.tile for n in self.image[-2:]]
            pixels = pixels[..., at[0][:, None], at[1]]
        x = torch.cat([pixels.flatten(1), x[:, self.pixels :]], 1)
        if self.search.surrogate:
            x = torch.cat([x, x.new_zeros(len(x), 1)], 1)
        x = torch.cat([x, self.starts.repeat_interleave(self.search.restarts, 0)], 1)
        self.gflop_step = self.counted(x[:1])
        return self.boxed(x)

    def counted(self, x: Float[Tensor, "1 d"]) -> float:
        """GFLOP of a step of one lane."""
        return flops_once(lambda: self._plain_step(x), self.model, self.said())

    def said(self) -> str:
        """All that decides the search's course besides tensors."""
        about = {f.name: _described(getattr(self.search, f.name)) for f in fields(self.search)}
        about |= {"local": self.local, "images": self.image, "told": self.targets is not None}
        return repr(about | {"training": self.model.training, "dtype": self.dtype})

    @property
    def altered(self) -> bool:
        """Whether what is compared is not the update itself, for which only autograd has a way."""
        return self.search.surrogate or self.per_example is not None or bool(self.drawn)

    def images(self, x: Tensor) -> Float[Tensor, "l b c h w"]:
        """Rows -> images in [0, 1] units."""
        return self._normalised(x) * self.std + self.mean

    def inward(self, gradient: Tensor) -> Tensor:
        """Rows of derivatives -> in the coordinates that the step rule works in."""
        return self._along(gradient, self.spectrum and self.spectrum.inward)

    def outward(self, move: Tensor) -> Tensor:
        """Moves of the step rule -> of the rows."""
        return self._along(move, self.spectrum and self.spectrum.outward)

    def _along(self, x: Tensor, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        if change is None:
            return x
        return torch.cat([change(self._normalised(x)).flatten(1), x[:, self.pixels :]], 1)

    def boxed(self, x: Tensor) -> Tensor:
        if self.box is None:
            return x
        pixels = self._normalised(x).clamp(*self.box).flatten(1)
        return torch.cat([pixels, x[:, self.pixels :]], 1)

    def weigh(self, step: int) -> None:
        """Give each prior its weight after so many steps."""
        for weight, fade in zip(self.faded, self.fading, strict=True):
            weight.fill_(fade.at(step / self.search.steps))
        if step > self.search.exact_from:  # a search that went on from a state
            self.rough = None

    def objective(self, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Each lane's objective [l] and its gradient [l d]."""
        loss, gradient = self._matched(x, active)
        if not self.search.group:
            return loss, gradient
        victim = active // self.search.restarts
        pixels = x[:, : self.pixels]
        sums = pixels.new_zeros(self.victims, self.pixels).index_add(0, victim, pixels)
        lanes = pixels.new_zeros(self.victims).index_add(0, victim, torch.ones_like(loss))
        apart = pixels - sums[victim] / lanes[victim][:, None]
        weight = self.search.group / self.pixels
        pull = F.pad(2 * weight * apart, (0, x.shape[1] - self.pixels))
        return loss + weight * apart.square().sum(1), gradient + pull

    def _matched(self, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The same without the group: by sweeps, or unrolled, or autograd."""
        by_hand = (self.rough or self.swept) if self.one_gradient else self.unrolled
        if by_hand is None or self.altered:
            return self.by_autograd(x, active)
        if self.asked[0] is not active:  # a list costs a synchronisation: one when lanes retire
            self.asked = (active, (active // self.search.restarts).tolist())
        pixels = self._normalised(x)
        if self.targets is None:
            targets = self._logits(x).softmax(-1)
        else:
            targets = self.targets[active // self.search.restarts]
        images = pixels * self.std + self.mean
        loss, of_images, of_targets = by_hand(images, targets, self.asked[1])
        gradient = of_images * self.std
        if self.search.priors:
            of_prior, prior = vmap(grad_and_value(self._prior))(pixels, self._told(active))
            loss, gradient = loss + prior, gradient + of_prior
        if self.targets is not None:
            return loss, gradient.flatten(1)
        centred = of_targets - (targets * of_targets).sum(-1, keepdim=True)
        return loss, torch.cat([gradient.flatten(1), (targets * centred).flatten(1)], 1)

    def by_autograd(self, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The same for any model and update, in one graph: a gradient of a gradient."""
        # the outer gradient is taken inside vmap: autograd's, of what vmap returns, is wrong for
        # BatchNorm in train mode (PyTorch 2.15), which a test compares with plain autograd
        lane = vmap(grad_and_value(self._one), randomness="error")
        gradient, loss = lane(x, *self._facts(active))
        return loss, gradient

    def reconstruction(
        self, best: Tensor, best_x: Tensor, moves: Tensor, looks: Tensor, lost: Tensor
    ) -> Reconstruction:
        """Each victim's best restart by the objective."""
        shape = (self.victims, self.search.restarts)
        pick = best.reshape(shape).argmin(1)
        rows = torch.arange(self.victims, device=pick.device) * shape[1] + pick
        images = self.images(best_x[rows]).clamp(0, 1)
        if self.targets is None:
            labels = self._logits(best_x[rows]).argmax(-1)
        else:
            labels = self.targets.argmax(-1)
        steps = moves.reshape(shape).sum(1)
        said = lost.reshape(shape).sum(1).tolist()
        flags = tuple((f"{n} of {shape[1]} restarts became non-finite",) if n else () for n in said)
        spent = looks.reshape(shape).sum(1).double() * self.gflop_step
        return Reconstruction(images, labels, best[rows], steps, spent, flags)

    def _normalised(self, x: Tensor) -> Tensor:
        return x[:, : self.pixels].reshape(-1, *self.image)

    def _logits(self, x: Tensor) -> Tensor:
        width = self.image[0] * self.classes
        return x[:, self.pixels : self.pixels + width].reshape(-1, self.image[0], self.classes)

    def _facts(self, active: Tensor) -> tuple[Tensor, Tensors, list[Tensors]]:
        """What each active lane is told: its victim's targets (or none), update, and for priors."""
        victim = active // self.search.restarts
        targets = victim if self.targets is None else self.targets[victim]
        return targets, {k: t[victim] for k, t in self.observed.items()}, self._told(active)

    def _told(self, active: Tensor) -> list[Tensors]:
        """What each informed prior is told of each active lane."""
        victim = active // self.search.restarts
        return [{k: t[victim] for k, t in prior.facts.items()} for prior in self.informed]

    def _sweeps(self, *offered: sweeps.Kinds) -> sweeps.LaneStep | None:
        """By the first kinds of layers that know the model; None where none do, as for autograd."""
        if not self.one_gradient or self.altered:
            return None
        distance = INNER.get(self.distance, self.distance)
        for kinds in offered:
            with suppress(sweeps.Unsupported):
                return sweeps.LaneStep(self.model, self.observed, distance, kinds)
        return None

    def _prior(self, pixels: Float[Tensor, "b c h w"], told: list[Tensors]) -> Tensor:
        """One lane's priors."""
        facts, faded = iter(told), iter(self.faded)
        each = [
            (next(faded) if isinstance(weight, Fade) else weight)
            * (p.of(pixels, next(facts)) if isinstance(p, Informed) else p(pixels))
            for weight, p in self.search.priors
        ]
        return torch.stack(each).sum()

    def _one(
        self, x: Float[Tensor, " d"], targets: Tensor, observed: Tensors, told: list[Tensors]
    ) -> Tensor:
        """One lane's objective."""
        pixels = self._normalised(x[None])[0]
        if self.targets is None:
            targets = self._logits(x[None])[0].softmax(-1)
        images = pixels * self.std + self.mean
        if self.search.surrogate:
            share = (0.5 + x[-1] / 100).clamp(0, 1)  # a step is a hundredth of one in pixels
            update = surrogate(self.model, images, targets, observed, share)
        else:
            drawn = self._drawn(x)
            update = simulate(self.model, images, targets, self.local, self.per_example, drawn)
        loss = self.distance(update, observed)
        return loss + self._prior(pixels, told) if self.search.priors else loss

    def _drawn(self, x: Float[Tensor, " d"]) -> Tensors:
        """One lane's belief of what random layers drew."""
        sizes = [shape.numel() for shape in self.drawn.values()]
        each = x[len(x) - sum(sizes) :].sigmoid().split(sizes) if sizes else ()
        pairs = zip(self.drawn.items(), each, strict=True)
        return {name: row.view(shape) for (name, shape), row in pairs}

    def _plain_step(self, x: Tensor) -> None:
        """The first lane's step as a plain double backward, so that its arithmetic can be counted.

        Records state this count, whatever computes the step and however many lanes share it; the
        sweeps do the same with less, and unrolling with more.
        """
        self.outward(self.inward(x))
        facts = self._facts(torch.zeros(1, dtype=torch.long, device=x.device))
        targets, observed, told = tree_map(lambda t: t[0], facts)
        if self.search.surrogate:
            grad(self._one)(x[0], targets, observed, told)
            return
        pixels = self._normalised(x)[0]
        if self.targets is None:
            targets = self._logits(x)[0].softmax(-1)
        self.unrolled.plain_step(pixels * self.std + self.mean, targets)
        if self.search.priors:
            grad(self._prior)(pixels, told)

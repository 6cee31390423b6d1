"""How a search moves: step rules, schedules of their length, and the coordinates they work in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Schedule = Callable[[int], float]  # step -> factor on the step length
PHOTOGRAPHS = 1.25  # power of a `Spectrum`; that of photographs falls with 1 to 1.5
COLOUR = 0.2  # length of a step in colour, over one in brightness: photographs vary less in it

State = dict[str, Tensor]  # each tensor has the lanes as its leading axis


class StepRule(ABC):
    """How a lane moves. Lanes never see each other: every operation is per row."""

    @abstractmethod
    def start(self, x: Float[Tensor, "l d"]) -> State:
        """What a run from `x` remembers."""

    @abstractmethod
    def step(
        self, gradient: Float[Tensor, "l d"], state: State, step: int, scale: float
    ) -> tuple[Tensor, State, Tensor]:
        """How far to move, the next state, and which lanes [l] can go no further."""


@dataclass(frozen=True, kw_only=True)
class Adam(StepRule):
    """Adam (Kingma and Ba 2015); `signed` replaces the gradient by its sign first.

    `soft` is between: tanh(s g / rms) / s, whose s falls from 1 to 0 over so many steps.
    """

    lr: float
    signed: bool = False
    soft: int = (
        0  # steps of a run over which tanh of gradient / rms fades from sign to the gradient
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def start(self, x: Tensor) -> State:
        return {"mean": torch.zeros_like(x), "square": torch.zeros_like(x)}

    def step(self, gradient, state, step, scale):
        gradient = gradient.sign() if self.signed else gradient
        if self.soft:
            share = max(1 - step / self.soft, 1e-3)
            unit = gradient / gradient.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
            gradient = (share * unit).tanh() / share
        first, second = self.betas
        mean = state["mean"].lerp(gradient, 1 - first)
        square = state["square"].lerp(gradient.square(), 1 - second)
        length = self.lr * scale / (1 - first ** (step + 1))
        root = (square / (1 - second ** (step + 1))).sqrt() + self.eps
        stuck = torch.zeros(len(mean), dtype=torch.bool, device=mean.device)
        return -length * mean / root, {"mean": mean, "square": square}, stuck


@dataclass(frozen=True, kw_only=True)
class LBFGS(StepRule):
    """L-BFGS with a fixed step length and no line search: torch.optim.LBFGS, one lane a row."""

    lr: float = 1.0
    history: int = 100
    flat: float = 1e-7  # a gradient whose largest entry is below this has converged
    downhill: float = 1e-9  # a direction that promises less than this is stuck

    def start(self, x: Tensor) -> State:
        lanes, width = x.shape
        return {
            "moves": x.new_zeros(lanes, 0, width),
            "turns": x.new_zeros(lanes, 0, width),
            "products": x.new_zeros(lanes, 0, 0),  # move i times turn j
            "squares": x.new_zeros(lanes, 0, 0),  # turn i times turn j
            "kept": x.new_zeros(lanes, 0),  # the step at which a pair was kept; 0: none was
            "next": torch.zeros(lanes, dtype=torch.long, device=x.device),  # where one will be
            "scale": x.new_ones(lanes),
            "gradient": torch.zeros_like(x),
            "move": torch.zeros_like(x),
        }

    def step(self, gradient, state, step, scale):
        state = dict(state)
        if step > 0:
            self._remember(state, gradient, step)
        direction = self._direction(gradient, state)
        slope = (gradient * direction).sum(1)
        size = torch.full_like(slope, self.lr * scale)
        if step == 0:
            size = size * (1 / gradient.abs().sum(1)).clamp_max(1.0)
        stuck = (gradient.abs().amax(1) <= self.flat) | (slope > -self.downhill)
        move = size[:, None] * direction
        state |= {"gradient": gradient, "move": move}
        return move, state, stuck

    def _remember(self, state: State, gradient: Tensor, step: int) -> None:
        """Keep the last move and turn of each lane where they curve up, instead of the oldest."""
        if state["kept"].shape[1] < self.history:
            for name in ("moves", "turns"):
                state[name] = F.pad(state[name], (0, 0, 0, 1))
            for name in ("products", "squares"):
                state[name] = F.pad(state[name], (0, 1, 0, 1))
            state["kept"] = F.pad(state["kept"], (0, 1))
        else:
            state |= {k: state[k].clone() for k in ("products", "squares", "kept")}
        turn, move, at = gradient - state["gradient"], state["move"], state["next"]
        lane = torch.arange(len(at), device=at.device)
        curvature = (turn * move).sum(1)
        keep = curvature > 1e-10

        def put(name: str, where: tuple, new: Tensor) -> None:
            pick = keep.view(-1, *[1] * (new.dim() - 1))
            state[name][where] = torch.where(pick, new, state[name][where])

        put("moves", (lane, at), move)
        put("turns", (lane, at), turn)
        put("products", (lane, slice(None), at), (state["moves"] @ turn[..., None])[..., 0])
        put("products", (lane, at), (state["turns"] @ move[..., None])[..., 0])
        squares = (state["turns"] @ turn[..., None])[..., 0]
        put("squares", (lane, slice(None), at), squares)
        put("squares", (lane, at), squares)
        put("kept", (lane, at), torch.full_like(curvature, step))
        state["next"] = torch.where(keep, (at + 1) % self.history, at)
        state["scale"] = torch.where(keep, curvature / turn.square().sum(1), state["scale"])

    def _direction(self, gradient: Tensor, state: State) -> Tensor:
        """Minus the inverse Hessian times the gradient, in its compact form.

        Byrd, Nocedal and Schnabel 1994, theorem 2.2, equal to the two-loop recursion. A place where
        nothing was kept has zero products, and a one on the diagonal of R.
        """
        kept, scale = state["kept"], state["scale"].double()[:, None]
        order = kept.argsort(1)

        def sorted_by_age(square: Tensor) -> Tensor:
            rows = square.double().gather(1, order[..., None].expand_as(square))
            return rows.gather(2, order[:, None].expand_as(square))

        with_moves = (state["moves"] @ gradient[..., None])[..., 0].double().gather(1, order)
        with_turns = (state["turns"] @ gradient[..., None])[..., 0].double().gather(1, order)
        products = sorted_by_age(state["products"])
        empty = torch.diag_embed((kept.gather(1, order) == 0).double())
        upper = products.triu() + empty
        curvature = products.diagonal(dim1=1, dim2=2)
        u = torch.linalg.solve_triangular(upper, with_moves[..., None], upper=True)
        right = curvature * u[..., 0] + scale * (sorted_by_age(state["squares"]) @ u)[..., 0]
        right = (right - scale * with_turns)[..., None]
        top = torch.linalg.solve_triangular(upper.mT, right, upper=False)
        back = order.argsort(1)
        of_moves = top[..., 0].gather(1, back).to(gradient.dtype)
        of_turns = (scale * u[..., 0]).gather(1, back).to(gradient.dtype)
        bent = (of_moves[:, None] @ state["moves"] - of_turns[:, None] @ state["turns"])[:, 0]
        return -(state["scale"][:, None] * gradient + bent)


def constant(step: int) -> float:
    return 1.0


def decay(steps: int) -> Schedule:
    """A tenth of the step length after 3/8, 5/8 and 7/8 of the run (Geiping et al. 2020)."""
    return lambda step: 0.1 ** sum(step >= steps * eighths // 8 for eighths in (3, 5, 7))


def anneal(steps: int) -> Schedule:
    """Half a cosine, from the whole step length to none (Loshchilov and Hutter 2017)."""
    return lambda step: (1 + math.cos(math.pi * step / steps)) / 2


def warmed(schedule: Schedule, steps: int) -> Schedule:
    """`schedule`, that rises from nothing over the first steps."""
    return lambda step: min(1.0, (step + 1) / max(1, steps)) * schedule(step)


class Spectrum:
    """Coordinates in which images like photographs are evenly long in every direction.

    Pixels = cosine transform of coefficients times sqrt(h w) (1 + f)^-power, with f in half cycles
    per image: the spectrum of photographs falls so. A step rule that scales each coordinate by
    itself, as Adam does, then settles what is coarse first and what is fine last. Of three
    channels, coefficients are of brightness and of two differences, `COLOUR` as long. After Olah et
    al. 2017, "Feature visualization", who decorrelate pixels and colours so. A change of all the
    image's brightness is as long as in pixels.
    """

    def __init__(self, image: tuple[int, ...], power: float, like: Tensor):
        self.down, self.across = (_cosines(n).to(like) for n in image[-2:])
        f = [torch.arange(n, dtype=torch.float64) for n in image[-2:]]
        far = torch.hypot(f[0][:, None], f[1][None])
        scale = (image[-2] * image[-1]) ** 0.5
        self.weights = (scale * (1 + far) ** -power).to(like)
        self.colours = _opponents().to(like) if image[-3] == 3 else None

    def inward(self, gradient: Float[Tensor, "... c h w"]) -> Tensor:
        """The derivative with respect to pixels -> with respect to coefficients."""
        found = self.weights * (self.down @ gradient @ self.across.T)
        return found if self.colours is None else _mixed(self.colours, found)

    def outward(self, move: Float[Tensor, "... c h w"]) -> Tensor:
        """Coefficients -> pixels."""
        move = move if self.colours is None else _mixed(self.colours.T, move)
        return self.down.T @ (self.weights * move) @ self.across


def _opponents() -> Float[Tensor, "3 3"]:
    """Brightness, red against green, both against blue: orthogonal, a row each over channels."""
    rows = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    long = math.sqrt(3) * torch.tensor([[1], [COLOUR], [COLOUR]], dtype=torch.float64)
    return long * rows / rows.norm(dim=1, keepdim=True)


def _mixed(rows: Float[Tensor, "k c"], images: Float[Tensor, "... c h w"]) -> Tensor:
    return torch.einsum("kc,...chw->...khw", rows, images)


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal cosine transform (DCT-II) as a matrix; a frequency a row."""
    at = (torch.arange(n, dtype=torch.float64) + 0.5) * (math.pi / n)
    rows = torch.cos(torch.arange(n, dtype=torch.float64)[:, None] * at)
    return rows / rows.norm(dim=1, keepdim=True)

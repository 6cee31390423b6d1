"""What attacks share that solve for one victim after the other, where engine.py steps all together.

`each` is the loop. What it is given returns `Found`: all of it, or only some images (`some`), or
none (`none`), which are grey then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedsec import cost, engine
from fedsec.attack import Progress, Told
from fedsec.threat import Observation
from fedsec.types import Local, Reconstruction, Tensors

# of the largest singular value: none but rounding in double, then two a decade
CUTOFFS = (1e-13, *(10 ** (-half / 2) for half in range(16, 0, -1)))
GRADIENT = Local(kind="gradient", lr=1.0)


@dataclass(frozen=True)
class Found:
    """What an attack makes of one victim."""

    images: Float[Tensor, "b c h w"]  # in [0, 1]
    labels: Int[Tensor, " b"]  # -1 where it has no belief
    loss: Float[Tensor, ""]
    flags: tuple[str, ...] = ()
    steps: int = 0
    gflop: float = 0.0  # beside what `each` counts


def each(
    seen: Observation,
    rngs: Sequence[torch.Generator],
    progress: Progress | Told,
    one: Callable[[Tensors, int], Found],
    spent: float = 0.0,
    counts: bool = True,
) -> Reconstruction:
    """`one(update, v)` of every victim v of the stack; its arithmetic is counted if `counts`.

    `spent` is GFLOP for each victim besides.
    """
    found = []
    for v in range(len(rngs)):
        update = {k: t[v] for k, t in seen.sent.tensors.items()}
        solve = partial(one, update, v)
        made, gflop = cost.counted(solve) if counts else (solve(), 0.0)
        found.append(replace(made, gflop=spent + gflop + made.gflop))
        progress(v + 1, len(rngs), float(made.loss))
    return stacked(found)


def stacked(found: Sequence[Found]) -> Reconstruction:
    return Reconstruction(
        torch.stack([f.images for f in found]),
        torch.stack([f.labels for f in found]),
        torch.stack([f.loss for f in found]),
        torch.tensor([f.steps for f in found]),
        torch.tensor([f.gflop for f in found], dtype=torch.float64),
        tuple(f.flags for f in found),
    )


def joined(parts: Sequence[Reconstruction]) -> Reconstruction:
    """Reconstructions of several stacks as that of one."""
    names = ("images", "labels", "loss", "steps", "gflop")
    tensors: dict[str, Any] = {k: torch.cat([vars(part)[k] for part in parts]) for k in names}
    return Reconstruction(**tensors, flags=tuple(flags for part in parts for flags in part.flags))


def misfit(
    seen: Observation,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    update: Tensors,
    local: Local | None = None,
) -> Float[Tensor, ""]:
    """One minus the cosine similarity of the update that these images cause: none certifies them.

    By the client's own steps, as far as they are known, unless `local` says otherwise.
    """
    again = engine.simulate(seen.model, images, targets, local or seen.step)
    return engine.cosine(again, update).detach()


def some(
    seen: Observation,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    update: Tensors,
    flags: tuple[str, ...] = (),
    steps: int = 0,
) -> Found:
    """n of the victim's images; the loss is theirs, by a single gradient where others are missing.

    The others are grey.
    """
    missing = seen.count - len(images)
    targets = F.one_hot(labels, seen.model(images[:1]).shape[1]).to(images.dtype)
    loss = misfit(seen, images, targets, update, GRADIENT if missing else None)
    grey = images.new_full((missing, *seen.shape), 0.5)
    return Found(torch.cat([images, grey]), F.pad(labels, (0, missing), value=-1), loss, flags,
                 steps)  # fmt: skip


def none(seen: Observation, update: Tensors, why: str) -> Found:
    """Grey images without labels."""
    like = next(iter(update.values()))
    grey = like.new_full((seen.count, *seen.shape), 0.5)
    unknown = torch.full((seen.count,), -1, device=like.device)
    return Found(grey, unknown, like.new_ones(()), (why,))


def finite(update: Tensors) -> bool:
    return all(bool(t.isfinite().all()) for t in update.values())


def least_norm(left: Float[Tensor, "t d"], right: Float[Tensor, "d k"]) -> Float[Tensor, "g t k"]:
    """X of left' X = right, of least norm, without what each of `CUTOFFS` takes for noise."""
    u, s, v = torch.linalg.svd(left, full_matrices=False)
    inner = (v @ right)[None]
    kept = s > torch.tensor(CUTOFFS).to(s)[:, None] * s[0]
    inverse = torch.where(kept, 1 / s, 0)
    return u @ (inverse[..., None] * inner)

"""The frozen dataclasses that travel between the parts. Nothing else carries state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Tensors = dict[str, Tensor]  # by parameter or buffer name, in the model's own order


@dataclass(frozen=True)
class Batch:
    """Images with what the loss is told about them.

    A private batch has one-hot `targets`; a mixing defense returns a batch with mixed ones.
    """

    images: Float[Tensor, "n c h w"]  # in [0, 1]; a model normalises for itself
    targets: Float[Tensor, "n k"]  # rows sum to one
    index: tuple[int, ...] = ()  # position of each image in its split; empty once mixed
    mix: Float[Tensor, "n n"] | None = None  # once mixed: each image's weights of the private ones

    @property
    def labels(self) -> Int[Tensor, " n"]:
        return self.targets.argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        mix = None if self.mix is None else self.mix.to(device)
        return Batch(self.images.to(device), self.targets.to(device), self.index, mix)


@dataclass(frozen=True)
class Local:
    """How a client turns its batch into an update; the server chose it."""

    kind: str  # "gradient": the reply is a gradient; "fedavg": the reply is the new weights
    lr: float  # of a local step
    steps: int = 1  # gradient steps behind one update
    batch: int = 0  # images in one local step; 0: the whole batch
    parts: tuple[int, ...] = ()  # images of each client, where only the clients' sum is seen
    clients: int = 1  # behind one update: more where only their sum is seen

    @property
    def diluted(self) -> float:
        """Deviation of the clients' mean noise over that of one client's."""
        return math.sqrt(sum(n * n for n in self.parts)) / (sum(self.parts) or 1) or 1.0


@dataclass(frozen=True)
class Party:
    """One client's place in one sum. Equal (round, session): the same sum, and the same masks."""

    client: int
    clients: int  # in the sum
    seed: int  # of the run
    round: int
    session: tuple[str | int, ...]  # the round's training, or what-if updates of all clients


@dataclass(frozen=True)
class Update:
    """What one client's reply says, in gradient direction.

    `client=gradient`: the gradient of the mean loss. `client=fedavg`: weights before - after.
    """

    tensors: Tensors  # one for each trainable parameter
    buffers: Tensors  # running statistics that travel along; empty where the model has none
    count: int  # examples that the client says it used: the weight in the server's mean


@dataclass(frozen=True)
class Exchange:
    """One reply and everything around it, the truth included. Only the harness holds one.

    With secure aggregation one exchange stands for the sum over several clients: `update` is then
    the sum's mean, and `batch` holds all their images.
    """

    round: int
    clients: tuple[int, ...]
    model: nn.Module  # as the server sent it, in the declared mode; never to be written to
    mode: str  # "train" or "eval": how BatchNorm behaved in the victim's step
    update: Update
    batch: Batch  # the private images
    trained: Batch  # what the loss saw: the same, or what a mixing defense made of it
    local: Local
    defense: object  # a fedsec.defense.Defense: its public parameters
    norm_stats: tuple[tuple[Tensor, Tensor], ...] = ()  # mean, biased var of each BatchNorm input
    aggregate: Update | None = None  # count-weighted mean over the round's clients
    history: tuple[Update, ...] = ()  # the same client's earlier tapped updates
    aux: Batch | None = None  # public images of the same kind
    candidates: Batch | None = None  # a pool that holds the private images
    queries: tuple[tuple[nn.Module, Update], ...] = ()  # a malicious server's further models, and
    # what the client answered on the same images


@dataclass(frozen=True)
class Stage:
    """One of several attacks on the same victims, and what it made of them."""

    name: str
    images: Float[Tensor, "v b c h w"]  # in [0, 1]
    labels: Int[Tensor, "v b"]  # -1 where it has no belief
    loss: Float[
        Tensor, " v"
    ]  # the objective by which stages are compared; infinite: it did not run
    certified: Bool[Tensor, " v"]  # the images explain the update exactly
    gflop: Float[Tensor, " v"]  # of this stage
    seconds: Float[Tensor, " v"]  # of this stage, shared evenly by the victims that it ran on


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns for a stack of `v` victims with `b` images each."""

    images: Float[Tensor, "v b c h w"]  # in [0, 1]
    labels: Int[Tensor, "v b"]  # the attack's belief; -1 where it has none
    loss: Float[Tensor, " v"]  # the attack's own objective at `images`
    steps: Int[Tensor, " v"]  # optimisation steps taken; 0 for an analytic attack
    gflop: Float[Tensor, " v"]  # arithmetic spent on each victim, counted
    flags: tuple[tuple[str, ...], ...] = field(default=())  # plain words, one tuple for each victim
    stages: tuple[Stage, ...] = ()  # where an attack runs several others: each, in order
    # of each victim (step, least objective so far); NaN where it had ended; n = 0: not known
    curve: Float[Tensor, "n p 2"] = field(default_factory=lambda: torch.zeros(0, 0, 2))

    def saying(self, word: str) -> Reconstruction:
        """The same with a flag more for every victim."""
        return replace(self, flags=tuple((*flags, word) for flags in self.flags))

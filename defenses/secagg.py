"""Secure aggregation: masks that cancel in the clients' sum, so that the sum is all one can see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedsec.checks import require
from fedsec.defense import Defense, bare
from fedsec.rng import stream
from fedsec.types import Local, Party, Tensors, Update

RING = 2**24  # masked entries are integers modulo this; centred, each is a float32 exactly


@dataclass(frozen=True, kw_only=True)
class SecAgg(Defense):
    """Pairwise masks: Bonawitz et al., "Practical secure aggregation", CCS 2017, section 4.

    An entry is cut to [-bound, bound] and rounded towards zero (so that no norm grows, as userdp
    needs) to one of 2^bits steps. Each pair of clients shares a secret, from which both stretch one
    uniform mask; the first adds it, the second subtracts it, modulo `RING`. One masked update is
    uniform whatever it says; in the sum over all clients the masks cancel, and the mean is right to
    one step. Every client counts the same. What the server reads of a single client it reads as
    floats, an entry uniform in +-RING/2 steps: attacks on `update` get that, and attacks on
    `aggregate` get the mean.

    Not simulated: the key agreement (a named stream stands for each pair's secret; it is no
    cryptographic generator), the second mask and the secret sharing that survive clients who drop
    out (none does here), and the checks against a server that lies about who takes part. With n
    clients n - 1 colluding ones see the last one's update. Flower's SecAgg+ (Bell et al. 2020) is
    in flwr.client.mod for its legacy clients and workflows only, which this federation does not
    run; its defaults are bound 8, 2^22 steps and a ring of 2^32.

    Guarantee: none about the sum: it may give an image away, the more so the fewer clients.
    Adaptive attack: on the sum (`threat=secure_aggregation`). Known break: a server that deviates
    isolates a client (Pasquini et al., "Eluding secure aggregation", CCS 2022).
    """

    bound: float  # > 0, of an entry's magnitude: larger ones are cut
    bits: int  # in [2, 22], of an entry; clients x 2^(bits - 1) must stay below half the ring

    random = True
    sums = True

    def __post_init__(self):
        require(0 < self.bound < math.inf, "bound", "must be above 0 and finite", self.bound)
        require(2 <= self.bits <= 22, "bits", "must be in [2, 22]", self.bits)

    @property
    def step(self) -> float:
        """Between two values of an entry."""
        return 2 * self.bound / 2**self.bits

    def seal(self, update: Update, party: Party) -> Update:
        cut = self.expected(update.tensors)
        plain = {k: (t.double() / self.step).trunc().long() for k, t in cut.items()}
        masks = _masks(update.tensors, party)
        masked = {k: self._read(plain[k] + masks[k], t) for k, t in update.tensors.items()}
        return replace(update, tensors=masked, count=1)

    def opened(self, update: Update, party: Party) -> Update:
        masks = _masks(update.tensors, party)
        plain = {k: self._read(self._ring(t) - masks[k], t) for k, t in update.tensors.items()}
        return replace(update, tensors=plain)

    def mean(self, updates: Sequence[Update]) -> Update:
        """The masks cancel in the sum, modulo the ring."""
        first, n = updates[0], len(updates)
        each = {k: torch.stack([self._ring(u.tensors[k]) for u in updates]) for k in first.tensors}
        mean = {k: self._read(each[k].sum(0), t) / n for k, t in first.tensors.items()}
        return Update(mean, first.buffers, sum(u.count for u in updates))

    def expected(self, tensors: Tensors, sent: Tensors | None = None) -> Tensors:
        return {k: t.clamp(-self.bound, self.bound).nan_to_num() for k, t in tensors.items()}

    def noise(self, local: Local) -> tuple[float, float]:
        """Rounding towards zero, where sums are seen; else the masks."""
        if local.clients > 1:
            return self.step / math.sqrt(3), 0.0
        return RING * self.step / math.sqrt(12), 0.0

    def bytes(self, update: Update) -> int:
        """Entries of the ring take 3 bytes each."""
        entry = (RING - 1).bit_length() // 8
        return entry * sum(t.numel() for t in update.tensors.values())

    def check(self, model: nn.Module) -> None:
        bare(self, model)

    def check_clients(self, clients: int) -> None:
        rule = "must be at least 2 with secagg: nothing masks the sum over one client"
        require(clients >= 2, "clients", rule, clients)
        most = (RING // 2 - 1) >> (self.bits - 1)
        rule = f"must be at most {most} with secagg at {self.bits} bits, or their sum overflows"
        require(clients <= most, "clients", f"{rule}; lower defense.bits", clients)

    def _ring(self, tensor: Tensor) -> Tensor:
        """The integers that `_read` gave, exactly: float32 is off by less than half a step."""
        return (tensor.double() / self.step).round().long()

    def _read(self, integers: Tensor, like: Tensor) -> Tensor:
        """Centred in the ring, as values of an update."""
        centred = (integers + RING // 2) % RING - RING // 2
        return (centred.double() * self.step).to(like.dtype)


def _masks(tensors: Tensors, party: Party) -> dict[str, Int[Tensor, "..."]]:
    """One client's: of each pair the first adds what the second subtracts."""
    me, sizes = party.client, [t.numel() for t in tensors.values()]
    total = torch.zeros(sum(sizes), dtype=torch.long)
    for other in range(party.clients):
        if other != me:
            pair = stream(party.seed, "mask", party.round, *party.session, *sorted((me, other)))
            mask = torch.randint(RING, total.shape, generator=pair)
            total += mask if me < other else -mask
    parts = zip(tensors.items(), total.split(sizes), strict=True)
    return {k: part.view(t.shape).to(t.device) for (k, t), part in parts}

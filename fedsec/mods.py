"""fedsec's defenses of updates as client mods, for any Flower app in one line.

app = ClientApp(mods=[defend(Prune(ratio=0.9, scope="tensor"))])
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message

from fedsec.checks import Refused
from fedsec.defense import Compose, Defense
from fedsec.flower import arrays_of, tensors_of
from fedsec.rng import stream
from fedsec.types import Tensors, Update

Call = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Call], Message]

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
HOOKS = ("batch", "gradients", "perturb", "architecture", "seal", "mean", "release")


def defend(defense: Defense, seed: int | None = None) -> Mod:
    """A client mod that does to the change of every reply to training what `defense` does.

    Put it first of the mods, so that what it makes is what is sent. The change is what a client
    was sent minus what it replies with; running statistics and integers stay as they are. Draws
    are fresh from the system, or, with `seed`, named by node and round, for experiments: whoever
    knows a seed can take noise off. Refuses a defense that does more than change an update.
    """
    for part in defense.parts if isinstance(defense, Compose) else (defense,):
        own = [hook for hook in HOOKS if getattr(type(part), hook) is not getattr(Defense, hook)]
        if own:
            rule = f"must change updates alone; this one has {', '.join(own)}"
            raise Refused("defense", rule, type(part).__name__)

    def mod(message: Message, context: Context, call: Call) -> Message:
        records = list(message.content.array_records.values())
        if message.metadata.message_type.split(".")[0] != "train" or not records:
            return call(message, context)
        sent = tensors_of(records[0])  # before the client: legacy ones empty it
        reply = call(message, context)
        if reply.has_error():
            return reply
        for name, record in list(reply.content.array_records.items())[:1]:
            reply.content[name] = _defended(sent, record, defense, _draws(seed, message))
        return reply

    return mod


def _draws(seed: int | None, message: Message) -> torch.Generator:
    if seed is None:
        return torch.Generator().manual_seed(secrets.randbits(63))
    meta = message.metadata
    return stream(seed, "mod", meta.dst_node_id, meta.group_id)


def _defended(
    sent: Tensors, record: ArrayRecord, defense: Defense, rng: torch.Generator
) -> ArrayRecord:
    got = tensors_of(record)
    change = {
        name: sent[name] - after
        for name, after in got.items()
        if name in sent and after.is_floating_point() and name.rpartition(".")[2] not in RUNNING
    }
    if not change:
        raise ValueError("defend: the reply must hold floating point arrays of the message's names")
    update = defense.update(Update(change, {}, 1), rng)
    return arrays_of(got | {name: sent[name] - step for name, step in update.tensors.items()})

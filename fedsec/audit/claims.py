"""Which privacy mechanisms an app switches on: heard from Flower while it is set up and runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import client_app

from fedsec.audit.traffic import Claim, Mechanism, Values

LOCAL, CENTRAL, CLIP, SECAGG = "local-dp", "central-dp", "client-clip", "secagg"
MODS = {
    "LocalDpMod": LOCAL,
    "fixedclipping_mod": CLIP,
    "adaptiveclipping_mod": CLIP,
    "secagg_mod": SECAGG,
    "secaggplus_mod": SECAGG,
}
# What a server builds: modules of Flower's, and the beginnings of their classes' names.
SERVER = {
    "flwr.serverapp.strategy.dp_fixed_clipping": ("DifferentialPrivacy", CENTRAL),
    "flwr.serverapp.strategy.dp_adaptive_clipping": ("DifferentialPrivacy", CENTRAL),
    "flwr.server.strategy.dp_fixed_clipping": ("DifferentialPrivacy", CENTRAL),
    "flwr.server.strategy.dp_adaptive_clipping": ("DifferentialPrivacy", CENTRAL),
    "flwr.server.workflow.secure_aggregation.secagg_workflow": ("SecAgg", SECAGG),
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow": ("SecAgg", SECAGG),
}

Arrays = dict[str, Values]
Call = Callable[[Message, Context], Any]  # a Message, if the app does what it should
_listeners: list[Heard] = []  # the last one listens: an app that is loaded once may run often


@dataclass
class Heard:
    """What the app told Flower, and what its last client computed before any mod saw it."""

    claims: list[Claim] = field(default_factory=list)  # in the order in which they were heard
    mods: tuple[Any, ...] = ()  # of the last call
    inner: dict[str, Arrays] | None = None  # of the last call, by record; None: no mod ran

    def innermost(self, mods: Sequence[Any]) -> Callable[[Message, Context, Call], Any]:
        def probe(message: Message, context: Context, call: Call) -> Any:
            reply = call(message, context)
            now = _listeners[-1] if _listeners else self
            now.mods = tuple(mods)
            for claim in map(of_mod, mods):
                now._add(claim)
            if mods and isinstance(reply, Message) and reply.has_content():
                records = reply.content.array_records
                now.inner = {name: dict(arrays) for name, arrays in records.items()}
            return reply

        return probe

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While an app is loaded and runs: its client's mods, and its server's mechanisms."""
        chain = vars(client_app)["make_ffn"]

        def heard(function: Call, mods: list[Any]) -> Call:
            return chain(function, [*mods, self.innermost(mods)])

        with ExitStack() as stack:
            _listeners.append(self)
            stack.callback(_listeners.pop)
            stack.enter_context(patch.object(client_app, "make_ffn", heard))
            for module, (start, kind) in SERVER.items():
                try:
                    named = import_module(module)
                except ImportError:  # another release of Flower's
                    continue
                for name, each in vars(named).items():
                    own = inspect.isclass(each) and each.__module__ == module
                    if own and name.startswith(start) and "__init__" in vars(each):
                        stack.enter_context(patch.object(each, "__init__", self._told(each, kind)))
            yield

    def _told(self, cls: type, kind: str) -> Callable[..., None]:
        plain = cls.__init__

        def init(this: Any, *arguments: Any, **keywords: Any) -> None:
            plain(this, *arguments, **keywords)
            if type(this) is cls:  # not the part of a subclass
                bound = inspect.signature(plain).bind(this, *arguments, **keywords)
                bound.apply_defaults()
                self._add(Claim(kind, cls.__name__, _simple(dict(bound.arguments))))

        return init

    def _add(self, claim: Claim | None) -> None:
        if claim is not None and claim not in self.claims:
            self.claims.append(claim)


def of_mod(mod: Any) -> Claim | None:
    name = mod_name(mod)
    if name not in MODS:
        return None
    return Claim(MODS[name], name, {} if callable_only(mod) else _simple(vars(mod)))


def mod_name(mod: Any) -> str:
    return mod.__name__ if callable_only(mod) else type(mod).__name__


def callable_only(mod: Any) -> bool:
    """Whether a mod is a function: it has a name, and no settings."""
    return inspect.isfunction(mod)


def _simple(settings: dict[str, Any]) -> dict[str, float | int | str | None]:
    return {k: v for k, v in settings.items() if isinstance(v, float | int | str) and k != "self"}


def mechanisms(
    sent: dict[str, np.ndarray],
    inner: dict[str, np.ndarray],
    final: dict[str, np.ndarray],
    clip: float | None,
) -> dict[str, Mechanism]:
    """What the mods did to each tensor of a change, from what went in and what came out.

    The scale is that of clipping to `clip`, where that is claimed; else the one that explains
    most of what came out.
    """
    both = [k for k in inner if k in sent and k in final and sent[k].shape == final[k].shape]
    finite = [k for k in both if all(np.isfinite(a[k]).all() for a in (sent, inner, final))]
    before = {k: np.asarray(inner[k].astype(float) - sent[k].astype(float)) for k in finite}
    after = {k: np.asarray(final[k].astype(float) - sent[k].astype(float)) for k in finite}
    norm = float(np.sqrt(sum((d**2).sum() for d in before.values())))
    if clip is not None:
        factor = min(1.0, clip / norm) if norm else 1.0
    else:
        product = sum(float((before[k] * after[k]).sum()) for k in finite)
        factor = product / norm**2 if norm else 1.0
    return {
        k: Mechanism(
            size=before[k].size,
            before=float(np.linalg.norm(before[k])),
            noise=float(np.sqrt(np.mean((after[k] - factor * before[k]) ** 2))),
            factor=factor,
            untouched=bool(np.array_equal(inner[k], final[k])),
            counter=inner[k].dtype.kind in "iu",
        )
        for k in finite
        if before[k].size
    }

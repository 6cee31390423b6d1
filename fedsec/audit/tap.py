"""Runs an app unchanged on the inline grid, with a tap on everything that passes its Grid."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsec.audit import traffic
from fedsec.audit.app import App
from fedsec.audit.attacked import Truth
from fedsec.audit.claims import LOCAL, Heard, mechanisms, mod_name
from fedsec.audit.structure import Structure
from fedsec.audit.traffic import About, Recording, Traffic, Values, Watched
from fedsec.audit.watch import Watch
from fedsec.flower import InlineGrid, name_this_process, silent
from fedsec.mods import Mod
from fedsec.records import NotSaved, versions

FAILED = 2  # Flower's code of a client that raised an error
ENDING = 5.0  # seconds that an app has to end once it gets no more replies

Told = Callable[[traffic.Message], None]


class Enough(Exception):
    """The rounds that were asked for are over; the app is told by its next message."""


class TapGrid(Grid):
    """A Grid that passes every message on, and tells of each, both ways.

    It wraps any other: the inline one, or Flower's own in a ServerApp of the deployment engine.
    """

    def __init__(self, grid: Grid, tap: Tap):
        self.grid, self.tap = grid, tap

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.tap.down(list(messages), self.grid)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self.grid.pull_messages(message_ids))
        for reply in replies:
            self.tap.up(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: int | float | None = None
    ) -> Iterable[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        waiting = [str(each) for each in self.push_messages(messages)]
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            fresh = list(self.pull_messages(waiting))
            answered = {reply.metadata.reply_to_message_id for reply in fresh}
            waiting = [each for each in waiting if each not in answered]
            replies += fresh
            if waiting and not fresh:
                time.sleep(0.1)
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def __getattr__(self, name: str) -> Any:  # what a later release of Flower adds
        return getattr(self.grid, name)


class Tap:
    """Keeps what passes, up to `limit` bytes of arrays, and hands it to a recording."""

    def __init__(self, limit: int, rounds: int = 0, told: Told = lambda message: None):
        self.left, self.rounds, self.told = limit, rounds, told
        self.messages: list[traffic.Message] = []
        self.numbers: dict[str, int] = {}  # of requests, by Flower's id
        self.clients: dict[int, int] = {}  # by node
        self.trained: dict[int, int] = {}  # rounds of each client, where no group is named
        self.watched: dict[str, Watched] = {}  # of a request's client, by Flower's id
        self.held: set[int] = set()  # arrays that are counted
        self.lock = threading.RLock()
        self.moved = time.monotonic()
        self.over = False

    def down(self, messages: list[Message], grid: Grid) -> list[str]:
        with self.lock:
            known = sorted(grid.get_node_ids())
            for node in (*known, *(m.metadata.dst_node_id for m in messages)):
                self.clients.setdefault(node, len(self.clients))
            for message in messages:
                self._refuse_late(message)
            numbers = [self._keep(m.metadata, dict(m.content.items())) for m in messages]
        ids = [str(each) for each in grid.push_messages(messages)]
        with self.lock:
            self.numbers |= dict(zip(ids, numbers, strict=False))
        return ids

    def up(self, reply: Message) -> None:
        with self.lock:
            asked = reply.metadata.reply_to_message_id
            content = dict(reply.content.items()) if reply.has_content() else {}
            error = (reply.error.reason or "it gave no reason") if reply.has_error() else ""
            about, watched = self.numbers.get(asked), self.watched.pop(asked, Watched())
            self._keep(reply.metadata, content, about, error, watched)

    def _refuse_late(self, message: Message) -> None:
        """Stop an app that goes on after the rounds that were asked for."""
        late = self.rounds and self.round_of(message.metadata) > self.rounds
        if self.over or (late and message.metadata.message_type.startswith("train")):
            self.over = True
            raise Enough(f"{self.rounds} rounds are over")

    def round_of(self, meta: Any) -> int:
        with suppress(ValueError):
            return int(meta.group_id)
        return 1 + self.trained.get(self.clients.get(meta.dst_node_id, -1), 0)

    def _keep(
        self,
        meta: Any,
        content: dict[str, Any],
        about: int | None = None,
        error: str = "",
        watched: Watched | None = None,
    ) -> int:
        """The number of a message: a reply, where it was `watched`."""
        asked = self.messages[about] if about is not None else None
        client = asked.client if asked else self.clients.get(meta.dst_node_id, -1)
        round = asked.round if asked else self.round_of(meta)
        if asked and meta.message_type.startswith("train"):
            self.trained[client] = self.trained.get(client, 0) + 1
        whole = RecordDict(content)
        arrays: dict[str, dict[str, Values]] = {
            name: dict(record) for name, record in whole.array_records.items()
        }
        message = traffic.Message(
            number=len(self.messages),
            up=watched is not None,
            kind=meta.message_type,
            round=round,
            client=client,
            about=about,
            arrays=arrays,
            metrics={name: dict(record) for name, record in whole.metric_records.items()},
            configs={name: dict(record) for name, record in whole.config_records.items()},
            error=error,
            size=sum(len(a.data) for r in whole.array_records.values() for a in r.values()),
            watched=watched or Watched(),
        )
        self.told(message)
        if not self._fits(message):
            message = replace(message, arrays={}, left_out=True)
        self.messages.append(message)
        self.moved = time.monotonic()
        return message.number

    def _fits(self, message: traffic.Message) -> bool:
        """Whether its arrays are kept. One that many messages share counts once."""
        fresh = {
            id(a.data): len(a.data)  # type: ignore[attr-defined]  # Flower's Array
            for a in message.flat.values()
            if id(a.data) not in self.held  # type: ignore[attr-defined]
        }
        if sum(fresh.values()) > self.left:
            self.left = 0
            return False
        self.left -= sum(fresh.values())
        self.held |= set(fresh)
        return True


class AppGrid(InlineGrid):
    """The inline grid for an app of somebody else's: a client's error is its reply.

    Clients take turns, also where a legacy server asks them from several threads.
    """

    def __init__(
        self,
        app: App,
        clients: int,
        heard: Heard,
        tap: Tap,
        attacked: Sequence[int] = (),
        mod: Mod | None = None,
    ):
        super().__init__(app.client, clients, app.config)
        self.heard, self.tap = heard, tap
        self.attacked = set(attacked)  # rounds
        self.mod = mod  # of a defense, around the app's own
        self.truths: list[Truth] = []
        self.structure: Structure | None = None
        self.legacy = _legacy(app.client)
        self.turn = threading.RLock()

    def answer(self, message: Message, context: Context) -> Message:
        with self.turn:
            self.tap.moved = time.monotonic()
            self.heard.inner = None
            kind, round = message.metadata.message_type, self.tap.round_of(message.metadata)
            watch = Watch(self.structure, kind.startswith("train") and round in self.attacked)
            try:
                with watch():
                    reply = self._called(message, context)
            except Exception as error:
                reason = "".join(traceback.format_exception(error))
                return Message(Error(code=FAILED, reason=reason), reply_to=message)
            if not isinstance(reply, Message):
                reason = f"the ClientApp must reply with a Message, got {reply!r}"
                return Message(Error(code=FAILED, reason=reason), reply_to=message)
            self.structure = watch.structure or self.structure
            self._remember(watch, round, context)
            self.tap.watched[message.metadata.message_id] = self._watched(watch, message, reply)
            return reply

    def _called(self, message: Message, context: Context) -> Any:
        return self.mod(message, context, self.app) if self.mod else self.app(message, context)

    def _remember(self, watch: Watch, round: int, context: Context) -> None:
        """What an attack on this reply is measured against, where it was heard whole."""
        if not watch.inputs or watch.before is None or watch.lr is None:
            return
        shapes = {tuple(each.shape[1:]) for each in watch.inputs}
        floats = all(each.is_floating_point() for each in watch.inputs)
        heard = [len(each) for each in watch.labels]
        if floats and len(shapes) == 1 and heard == watch.batches and watch.batches:
            client = int(context.node_config["partition-id"])
            inputs, labels = torch.cat(watch.inputs).cpu(), torch.cat(watch.labels).cpu()
            self.truths.append(
                Truth(round, client, watch.before.cpu(), inputs, labels, tuple(watch.batches),
                      watch.lr, watch.optimiser)
            )  # fmt: skip

    def _watched(self, watch: Watch, message: Message, reply: Message) -> Watched:
        inner, measured = self.heard.inner, {}
        if inner is not None and reply.has_content():
            local = next((c for c in self.heard.claims if c.kind == LOCAL), None)
            clip = float(local.settings["clipping_norm"] or 0.0) if local else None
            own = [_numbers(dict(r)) for r in message.content.array_records.values()]
            after = [_numbers(dict(r)) for r in reply.content.array_records.values()]
            if own and after and inner:
                first = _numbers(next(iter(inner.values())))
                measured = mechanisms(own[0], first, after[0], clip)
        return Watched(
            steps=watch.steps,
            batches=tuple(watch.batches),
            lr=watch.lr,
            optimiser=watch.optimiser,
            mods=tuple(map(mod_name, self.heard.mods)),
            mechanisms=measured,
        )

    @property
    def run(self) -> Any:
        return Run.create_empty(1)

    def set_run(self, run: Any) -> None:
        pass


def _numbers(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}


def _legacy(client: ClientApp) -> bool:
    """Whether a ClientApp is made of a client_fn: its arrays have no names."""
    return client._call is not None


def run(
    app: App,
    heard: Heard,
    *,
    clients: int,
    rounds: int,
    seed: int,
    limit: int,
    patience: float,
    recording: Callable[[About], Recording] | None = None,
    progress: Told = lambda message: None,
    attacked: Sequence[int] = (),
    mod: Mod | None = None,
) -> tuple[Traffic, list[Truth]]:
    """Everything that travelled while the app ran, and what went wrong meanwhile.

    And of the `attacked` rounds, what the clients trained on. `mod` is inserted around the
    client's own.

    `limit`: bytes of arrays that are kept, in memory as in a recording. `patience`: seconds
    without any message after which the app counts as hanging. Nothing of what was seen is lost
    when it fails, hangs or is interrupted.
    """
    about = About(app.name, clients, dict(app.config), versions())
    kept = recording(about) if recording else None
    notes: list[str] = []

    def told(message: traffic.Message) -> None:
        progress(message)
        if kept:
            try:
                kept.add(message)
            except NotSaved as full:
                notes.append(f"error: the recording ends here: {full}")
                kept.add = lambda message: None  # type: ignore[method-assign]

    tap = Tap(limit, rounds, told)
    grid = AppGrid(app, clients, heard, tap, attacked, mod)
    serving = (app, TapGrid(grid, tap), seed, notes)
    ended = threading.Thread(target=_serve, args=serving, daemon=True)
    try:
        with silent(), heard.listening():
            ended.start()
            _wait(ended, tap, patience, notes)
    except KeyboardInterrupt:
        notes.append("interrupted: what was seen until then is kept")
    finally:
        tap.over = True
    about = replace(
        about,
        claims=tuple(heard.claims),
        structure=grid.structure and grid.structure.within(app.folder),
        legacy=grid.legacy,
    )
    with tap.lock:
        messages = tuple(tap.messages)
    if kept:
        try:
            kept.finish(about)
        except NotSaved as full:
            notes.append(f"error: the recording is not whole: {full}")
    if any(m.left_out for m in messages):
        notes.append(f"arrays beyond --limit were not kept: {sum(m.left_out for m in messages)} "
                     "messages are judged by the rest")  # fmt: skip
    return Traffic(about, messages, tuple(notes)), grid.truths


def _serve(app: App, grid: TapGrid, seed: int, notes: list[str]) -> None:
    """The app's server, in a thread of its own, so that it may hang."""
    name_this_process()
    _seed(seed)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(),
                      run_config=dict(app.config))  # fmt: skip
    try:
        app.server(grid, context)
    except BaseException as error:  # of the app's own code: it may even exit
        if not grid.tap.over:
            last = traceback.extract_tb(error.__traceback__)[-1]
            first = next(iter(str(error).splitlines()), "")
            where = f"{last.filename}:{last.lineno}"
            notes.append(f"error: serverapp: {type(error).__name__}: {first} ({where})")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # what apps and Flower's mods draw from
    torch.manual_seed(seed)


def _wait(server: threading.Thread, tap: Tap, patience: float, notes: list[str]) -> None:
    while server.is_alive():
        server.join(0.05)
        if tap.over:  # it hears so by its next message
            server.join(ENDING)
            return
        if time.monotonic() - tap.moved > patience:
            notes.append(f"error: app: must send or answer a message within --patience, got "
                         f"nothing for {patience:g} s")  # fmt: skip
            return

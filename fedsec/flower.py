"""The federation on Flower: its ServerApp and ClientApp, the tap, and the two engines.

Imported only where a federation runs: Flower costs a second, its Ray engine several.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import random
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp, strategy
from torch import Tensor, nn

from fedsec.checks import Refused
from fedsec.client import buffers, mean_update, parameters, weights_after
from fedsec.federation import (
    STRATEGIES,
    Average,
    ClientFailed,
    Craft,
    Job,
    Site,
    Tapped,
    Travelled,
    load,
    state,
)
from fedsec.types import Tensors, Update

Progress = Callable[[int, int], None]


def run(job: Job, site: Site, progress: Progress, craft: Craft | None = None) -> Travelled:
    """The whole federation, on the engine that the job names."""
    server = Server(job, site, progress, craft)
    _serve(server, _inline if job.federation.engine == "inline" else _ray)
    seconds = [after - before for before, after in pairwise(server.began)]
    averaged = server.average.weights if server.average else None
    return Travelled(server.final, server.taps, seconds, server.sent, averaged)


def replay(
    job: Job, site: Site, sent: Mapping[int, Tensors], craft: Craft | None = None
) -> list[Tapped]:
    """What travels in the rounds whose models are known, without the training between them.

    A client's reply is a function of the model that it got: these are those of the whole run.
    """
    server = Server(job, site, lambda done, rounds: None, craft, sent)
    threads = torch.get_num_threads()
    if job.federation.engine == "ray":  # as its workers compute
        torch.set_num_threads(1)
    try:
        _serve(server, _inline)
    finally:
        torch.set_num_threads(threads)
    return server.taps


def _serve(server: Server, engine: Callable[[Server, ClientApp], None]) -> None:
    token = uuid.uuid4().hex  # a key that no worker of another run has seen
    _sites[token] = server.site
    drawn = random.getstate()  # Flower's strategies sample nodes with it
    try:
        with silent():
            engine(server, client_app(server.job, token))
    finally:
        server.stop.set()
        random.setstate(drawn)
        del _sites[token]


# The client side: one ClientApp for all clients. A process finds its site by the run's token; a
# Ray worker, which has none at first, builds it from the job.

_sites: dict[str, Site] = {}


def client_app(job: Job, token: str) -> ClientApp:
    app = ClientApp()
    app.query()(_identify)
    app.train()(partial(_reply, job, token))
    app.train("probe")(partial(_reply, job, token))
    return app


def _identify(message: Message, context: Context) -> Message:
    """Which client a node is: Flower's servers know nodes, not partitions."""
    record = ConfigRecord({"partition-id": _client(context)})
    return Message(RecordDict({"client": record}), reply_to=message)


def _reply(job: Job, token: str, message: Message, context: Context) -> Message:
    try:
        content = _update(job, token, message.content, _client(context))
    except Exception:  # Flower's engines would drop it: it travels as the reply
        return Message(Error(code=0, reason=traceback.format_exc()), reply_to=message)
    return Message(content, reply_to=message)


def _update(job: Job, token: str, content: RecordDict, client: int) -> RecordDict:
    if token not in _sites:  # a Ray worker: several share the machine's cores
        torch.set_num_threads(1)
        _sites[token] = Site(job, job.dataset.load())
    site, config = _sites[token], content.config_records["config"]
    probe = _integer(config, "probe") if "probe" in config else None
    round, query = _integer(config, "server-round") - 1, 0
    if "model" in config:  # a server that tampers has the client run its code, and its weights
        model: nn.Module = pickle.loads(cast(bytes, config["model"])).to(job.device)
        query = _integer(config, "query")
    else:
        arrays, model = content.array_records, site.model
        load(model, tensors_of(arrays["arrays"]) | tensors_of(arrays["buffers"]))
    update = site.update(model, client, round, probe, query)
    tensors = weights_after(model, update) if _sends_weights(job) else update.tensors
    size = job.defense.bytes(update)
    return RecordDict(
        {
            "arrays": arrays_of(tensors),
            "buffers": arrays_of(update.buffers),
            "metrics": MetricRecord({"num-examples": update.count, "bytes": size}),
        }
    )


def _sends_weights(job: Job) -> bool:
    """Whether a reply is the new weights, rather than a gradient or the change of the weights."""
    return job.client.local.kind == "fedavg" and not job.defense.sums


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


# Tensors as Flower's arrays and back: the bytes that NumPy writes, copied once. NumPy's own writer
# and reader take longer over an array's header than over a small network's weights.


def arrays_of(tensors: Tensors) -> ArrayRecord:
    record = ArrayRecord()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().numpy()
        header = _header(str(values.dtype), values.shape)
        data = b"".join((header, values.reshape(-1).view(np.uint8).data))
        record[name] = Array(str(values.dtype), values.shape, "numpy.ndarray", data)
    return record


def tensors_of(record: ArrayRecord) -> Tensors:
    return {name: _tensor(array) for name, array in record.items()}


def _tensor(array: Array) -> Tensor:
    if not array.dtype:  # a legacy client's says neither type nor shape
        return torch.from_numpy(np.array(array.numpy()))
    header = _header(array.dtype, tuple(array.shape))
    if not array.data.startswith(header) or len(array.data) == len(header):
        return torch.from_numpy(np.array(array.numpy()))  # another order of axes, or empty
    values = np.frombuffer(array.data, array.dtype, offset=len(header))
    return torch.from_numpy(values.reshape(array.shape).copy())


@lru_cache(maxsize=4096)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file, kind = BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    layout = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, layout)
    return file.getvalue()


def _integer(record: ConfigRecord | MetricRecord, key: str) -> int:
    value = record[key]
    assert isinstance(value, int)
    return value


# The server side.


class Server:
    """One run as the server sees it: Flower's strategy behind the tap, and what comes out."""

    def __init__(
        self,
        job: Job,
        site: Site,
        progress: Progress,
        craft: Craft | None,
        known: Mapping[int, Tensors] | None = None,  # what was sent: nothing is trained
    ):
        self.job, self.site, self.progress, self.craft = job, site, progress, craft
        self.known = known
        self.stop = threading.Event()
        self.taps: list[Tapped] = []
        self.final: Tensors = {}
        self.began: list[float] = []  # when each training round did, and when the last one ended
        self.sent: list[int] = []  # bytes of all replies of each training round
        self.average = Average(job.ema, state(site.model)) if job.ema else None

    @property
    def app(self) -> ServerApp:
        app = ServerApp()
        app.main()(self._main)
        return app

    def _main(self, grid: Grid, context: Context) -> None:
        job, tap = self.job, Tap(grid, self)
        if self.known is not None:
            for round in sorted(self.known):
                tap.again(round, self.known[round])
            return
        arrays = arrays_of(dict(parameters(self.site.model)))
        if job.rounds:
            result = _strategy(job).start(tap, arrays, num_rounds=job.rounds)
            assert result.arrays is not None
            arrays = result.arrays
            self.began.append(time.perf_counter())
        if job.rounds in job.attack_rounds:  # one more exchange, that no strategy aggregates
            tap.exchange(tap.asking(arrays, job.rounds))
        load(self.site.model, tensors_of(arrays) | tap.buffers)
        self.final = state(self.site.model)
        if self.average and job.rounds:
            self.average.take(self.final)


def _strategy(job: Job) -> strategy.Strategy:
    name, settings = STRATEGIES[job.federation.strategy]
    return getattr(strategy, name)(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=job.clients,
        min_available_nodes=job.clients,
        **settings,
    )


class Tap(Grid):
    """What a server sees: a Grid that passes every message on and keeps those of attack rounds.

    It works with any strategy. A gradient becomes the weights after one server step before the
    strategy sees it; running statistics travel beside the weights and are averaged here, since
    an adaptive strategy would make variances of them negative. Messages go out and replies come
    back in the clients' order, so that sums do not depend on who was first.
    """

    def __init__(self, grid: Grid, server: Server):
        self.grid, self.server, self.job = grid, server, server.job
        self.model = server.site.model
        self.buffers = {k: b.detach().clone() for k, b in buffers(self.model).items()}
        self.client_of = self._clients()  # by node

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: int | float | None = None
    ) -> Iterable[Message]:
        """One round. There is no time limit: every client replies, or fails the run."""
        outgoing = list(messages)
        if not outgoing:
            return []
        self.server.began.append(time.perf_counter())
        round, replies = self.exchange(outgoing)
        job = self.job
        self.buffers = mean_update([self._running(reply) for reply in replies]).buffers
        metrics = [reply.content.metric_records["metrics"] for reply in replies]
        self.server.sent.append(sum(_integer(each, "bytes") for each in metrics))
        released = None
        if job.defense.sums:
            sent = [self._update(reply, self.model) for reply in replies]
            released = self.server.site.released(sent, round)
        for reply in replies:
            self._step(reply, released)
        self.server.progress(round + 1, job.rounds)
        return replies

    def asking(self, arrays: ArrayRecord, round: int) -> list[Message]:
        """What a strategy sends in `round`."""
        config = ConfigRecord({"server-round": round + 1})
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, node, "train") for node in self.get_node_ids()]

    def again(self, round: int, sent: Tensors) -> None:
        """What travels in `round` about the model that was `sent`; nothing is made of it."""
        self.buffers = {k: sent[k].to(b.device) for k, b in self.buffers.items()}
        arrays = arrays_of({k: sent[k] for k in parameters(self.model)})
        self.exchange(self.asking(arrays, round))

    def exchange(self, messages: Iterable[Message]) -> tuple[int, list[Message]]:
        """The round's number and the clients' replies, in their order; attack rounds are kept."""
        outgoing = sorted(messages, key=lambda m: self.client_of[m.metadata.dst_node_id])
        job, content = self.job, outgoing[0].content
        arrays, config = content.array_records["arrays"], content.config_records["config"]
        round = _integer(config, "server-round") - 1
        content = partial(self._content, arrays, arrays_of(self.buffers))
        for message in outgoing:
            message.content = content(message.content.config_records["config"])
        attacked = round in job.attack_rounds
        probing = attacked and not job.keep_training
        crafted: tuple[nn.Module, ...] = ()
        if probing and self.server.craft is not None:
            load(self.model, tensors_of(arrays) | self.buffers)
            crafted = self.server.craft(self.model, round)
        probes = self._probes(content, config, crafted) if probing else []
        trainees, targets = [self.model] * len(outgoing), list(crafted) or [self.model]
        targets *= len(probes) // len(targets)
        replies = self._deliver([*outgoing, *probes], round, trainees + targets)
        trained, probed = replies[: len(outgoing)], replies[len(outgoing) :]
        load(self.model, tensors_of(arrays) | self.buffers)  # what was sent
        if self.server.average and 0 < round < job.rounds:
            self.server.average.take(state(self.model))
        if attacked:
            updates = [self._update(reply, self.model) for reply in trained]
            answers = [self._update(*pair) for pair in zip(probed, targets, strict=True)]
            each = len(crafted) or 1
            grouped = [answers[i : i + each] for i in range(0, len(answers), each)]
            tapped = Tapped(round, state(self.model), updates, grouped, crafted)
            self.server.taps.append(tapped)
        return round, trained

    def _content(
        self, arrays: ArrayRecord, running: ArrayRecord, config: ConfigRecord, **more: int
    ) -> RecordDict:
        config = ConfigRecord({**config, **more})
        return RecordDict({"arrays": arrays, "buffers": running, "config": config})

    def _probes(
        self,
        content: Callable[..., RecordDict],
        config: ConfigRecord,
        crafted: Sequence[nn.Module],
    ) -> list[Message]:
        """For each probe a message; with crafted models, one for each of them, which it carries."""
        node_of = {client: node for node, client in self.client_of.items()}
        pickled = [pickle.dumps(deepcopy(model).cpu()) for model in crafted]

        def contents(probe: int) -> list[RecordDict]:
            if not pickled:
                return [content(config, probe=probe)]
            more = [{"probe": probe, "query": q, "model": m} for q, m in enumerate(pickled)]
            return [RecordDict({"config": ConfigRecord({**config, **m})}) for m in more]

        return [
            Message(each, node_of[client], "train.probe")
            for i, (client, _) in enumerate(self.job.probes)
            for each in contents(i)
        ]

    def _running(self, reply: Message) -> Update:
        """The running statistics of a reply, and the count that weighs them."""
        running = tensors_of(reply.content.array_records["buffers"])
        running = {name: b.to(self.job.device) for name, b in running.items()}
        count = _integer(reply.content.metric_records["metrics"], "num-examples")
        return Update({}, running, count)

    def _update(self, reply: Message, model: nn.Module) -> Update:
        """What a reply says, in gradient direction; `model` holds what was sent."""
        tensors = tensors_of(reply.content.array_records["arrays"])
        tensors = {name: t.to(self.job.device) for name, t in tensors.items()}
        if _sends_weights(self.job):
            before = parameters(model)
            tensors = {name: before[name].detach() - after for name, after in tensors.items()}
        return replace(self._running(reply), tensors=tensors)

    def _step(self, reply: Message, released: Update | None) -> None:
        """Leave the strategy what it expects: weights, and the count that weighs them.

        Those after the step that the server `released`, where it made one of the clients' sum: the
        same in each reply, so that a strategy's mean is that step.
        """
        local, metrics = self.job.client.local, reply.content.metric_records["metrics"]
        arrays = reply.content.array_records["arrays"]
        if local.kind == "gradient" or released is not None:
            step = released or self._update(reply, self.model)
            length = local.lr if local.kind == "gradient" else 1.0
            arrays = arrays_of(weights_after(self.model, step, length))
        reply.content = RecordDict({"arrays": arrays, "metrics": metrics})

    def _clients(self) -> dict[int, int]:
        """The client behind each node, once all of them are there."""
        while len(nodes := list(self.grid.get_node_ids())) < self.job.clients:
            self._pause()
        replies = self._deliver([Message(RecordDict(), node, "query") for node in nodes], None)
        told = [reply.content.config_records["client"] for reply in replies]
        client_of = {n: _integer(t, "partition-id") for n, t in zip(nodes, told, strict=True)}
        return dict(sorted(client_of.items(), key=lambda pair: pair[1]))

    def _deliver(
        self, messages: Sequence[Message], round: int | None, got: Sequence[nn.Module] = ()
    ) -> list[Message]:
        """The replies to `messages`, in their order. Raises ClientFailed at the first bad one.

        A reply has to hold the parameters of the model that its message was about, one of `got`.
        """
        ids = [str(i) for i in self.grid.push_messages(messages)]
        assert len(ids) == len(messages), "Flower took every message"
        model_of = dict(zip(ids, got, strict=False))
        replies: dict[str, Message] = {}
        while True:
            for reply in self.grid.pull_messages([i for i in ids if i not in replies]):
                asked = reply.metadata.reply_to_message_id
                self._check(reply, round, model_of.get(asked))
                replies[asked] = reply
            if len(replies) == len(ids):
                return [replies[i] for i in ids]
            self._pause()

    def _check(self, reply: Message, round: int | None, model: nn.Module | None) -> None:
        client = None if round is None else self.client_of[reply.metadata.src_node_id]
        if reply.has_error():
            raise ClientFailed(client, round, reply.error.reason or "it gave no reason")
        if model is not None:
            arrays = reply.content.array_records.get("arrays", {})
            if set(arrays) != set(parameters(model)):
                got = ", ".join(arrays) or "nothing"
                raise ClientFailed(client, round, f"its reply must hold every parameter, got {got}")

    def _pause(self) -> None:
        """Wait a little; end the server's thread when the run was stopped from outside."""
        if self.server.stop.wait(0.02):
            raise RuntimeError("the federation was stopped")

    # The rest of a Grid is the wrapped one's.

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.client_of)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)


# The engines.


class InlineGrid(Grid):
    """A Grid whose network is a function call: the same ClientApp, in the clients' order.

    Each client has its own Context, each call its own copy of the records (whose bytes are shared).
    """

    def __init__(self, app: ClientApp, clients: int, config: Mapping[str, Any] | None = None):
        self.app = app
        self.contexts = {
            1 + i: Context(
                run_id=1,
                node_id=1 + i,
                node_config={"partition-id": i, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(config or {}),
            )
            for i in range(clients)
        }
        self.replies: dict[str, Message] = {}
        self.ids = itertools.count()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"{next(self.ids)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # as Flower's own grids do
            context = self.contexts[message.metadata.dst_node_id]
            reply = self.answer(_copied(message), context)
            reply.metadata.__dict__["_message_id"] = f"reply {ids[-1]}"
            self.replies[ids[-1]] = reply
        return ids

    def answer(self, message: Message, context: Context) -> Message:
        """What a client makes of a message."""
        return self.app(message, context)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: int | float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("an inline federation has no run to set")

    @property
    def run(self) -> Any:
        raise NotImplementedError("an inline federation has no run record")


def _copied(message: Message) -> Message:
    meta = message.metadata
    content = RecordDict()
    for name, arrays in message.content.array_records.items():
        content[name] = ArrayRecord(dict(arrays))
    for name, config in message.content.config_records.items():
        content[name] = ConfigRecord(dict(config))
    for name, metrics in message.content.metric_records.items():
        content[name] = MetricRecord(dict(metrics))
    copy = Message(content, meta.dst_node_id, meta.message_type, ttl=meta.ttl)
    copy.metadata.__dict__.update(meta.__dict__)
    return copy


def _inline(server: Server, app: ClientApp) -> None:
    name_this_process()
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server.app(InlineGrid(app, server.job.clients), context)


def name_this_process() -> None:
    """Newer Flower reads a process-wide identity whenever a Message is made."""
    with suppress(ImportError):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def _ray(server: Server, app: ClientApp) -> None:
    """Flower's simulation engine: on this machine, or on the cluster that RAY_ADDRESS names."""
    key = "federation.engine"
    if find_spec("ray") is None:
        raise Refused(key, "needs ray: install flwr[simulation]", "ray")
    import ray
    from flwr.simulation import run_simulation

    if ray.is_initialized():  # nested engines hang, and Flower would shut the caller's Ray down
        raise Refused(key, "cannot start in a process that runs Ray already; use inline", "ray")
    cores = os.cpu_count() or 1
    workers = min(server.job.clients, cores)
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    if server.job.device.startswith("cuda"):
        resources["num_gpus"] = min(1.0, torch.cuda.device_count() / workers)
    arguments: dict[str, Any] = {"logging_level": "CRITICAL", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        arguments["num_cpus"] = workers
    path = os.environ.get("PYTHONPATH")
    try:
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        run_simulation(
            server_app=server.app,
            client_app=app,
            num_supernodes=server.job.clients,
            backend_config={"init_args": arguments, "client_resources": resources},
        )
    finally:  # Flower sets it for Ray's workers
        os.environ.pop("PYTHONPATH", None)
        if path is not None:
            os.environ["PYTHONPATH"] = path


@contextmanager
def silent() -> Iterator[None]:
    """No log line of Flower inside: it prints dozens a round, and doubled under Hydra."""
    logger = logging.getLogger("flwr")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was

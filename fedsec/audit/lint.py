"""Findings that take no attack: what the form of the model and of the messages gives away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedsec.audit.claims import SECAGG
from fedsec.audit.findings import CERTIFIED, INFERRED, MEASURED, Finding, found
from fedsec.audit.structure import COUNTER, NAMES, RUNNING, Layer, Structure, guessed
from fedsec.audit.traffic import Message, Traffic, Trained

FEW = 16  # examples behind an update that inversion attacks do well on
READ = 512  # neurons that are compared with each other
AGREE = 1e-3  # relative: two neurons hold the same input
SPARSE = 0.5  # of an embedding's rows: fewer changed
LOSSES = ("loss", "acc", "perplexity", "f1")
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class View:
    """What the rules look at."""

    traffic: Traffic
    structure: Structure

    @cached_property
    def clear(self) -> tuple[Trained, ...]:
        """Replies whose change can be read, one client at a time."""
        return tuple(t for t in self.traffic.whole if t.change)

    def drowned(self, tensor: str) -> bool:
        """Whether measured noise on a tensor exceeds what it says about the data."""
        seen = [t.reply.watched.mechanisms.get(tensor) for t in self.traffic.trained]
        known = [m for m in seen if m is not None]
        return bool(known) and all(m.noise * m.size**0.5 > m.factor * m.before for m in known)

    def said(self, layer: Layer) -> str:
        shapes = ", ".join(f"{k} {list(s)}" for k, s in layer.tensors.items())
        return f"{shapes}; the model's structure is {self.structure.source}"


Rule = Callable[[View], Iterator[Finding]]


def lint(traffic: Traffic, given: Structure | None = None) -> list[Finding]:
    """Every finding of every rule; `given`: the structure of a model that the user names."""
    view = View(traffic, structure_of(traffic, given))
    located = given or traffic.about.structure
    return [
        replace(f, file=located.file, line=located.line) if located and _structural(f) else f
        for rule in RULES
        for f in rule(view)
    ]


def structure_of(traffic: Traffic, given: Structure | None = None) -> Structure:
    """Of the arrays that clients send: as given, as seen, or as names and shapes let guess."""
    replies = traffic.whole or tuple(t for t in traffic.trained if t.request.flat)
    if not replies:
        return Structure((), NAMES)
    arrays = replies[0].got if replies[0].reply.flat else replies[0].sent
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    known = given or traffic.about.structure
    return known.named(shapes) if known else guessed(shapes)


def _structural(finding: Finding) -> bool:
    return finding.rule.id in (
        "input-linear", "last-bias", "batchnorm-buffers", "embedding-rows", "position-embedding",
        "dp-scalar", "dp-counter",
    )  # fmt: skip


# ---------------------------------------------------------------- the model


def input_linear(view: View) -> Iterator[Finding]:
    layer = view.structure.first
    if layer is None or layer.kind != "linear" or not layer.bias or view.drowned(layer.weight):
        return
    replies = [t for t in view.clear if {layer.weight, layer.bias} <= set(t.change)]
    if not replies:
        return
    neurons, size = layer.tensors[layer.weight]
    evidence = [view.said(layer), f"{neurons} neurons could hold as many inputs of {size} values"]
    certified = [(t, n) for t in replies if (n := _held(t, layer))]
    if certified:
        trained, held = max(certified, key=lambda pair: pair[1])
        evidence.append(
            f"round {trained.round}, client {trained.client}: {held} whole "
            f"input{'s' * (held > 1)} read off, each from several neurons that agree; so in "
            f"{len(certified)} of {len(replies)} updates"
        )
        yield found("input-linear", layer.name, evidence, CERTIFIED)
    else:
        evidence.append("no two neurons agree in these updates: their examples blend")
        yield found("input-linear", layer.name, evidence, INFERRED, "medium")


def _held(trained: Trained, layer: Layer) -> int:
    """Inputs that several neurons hold alike: rows over bias entries that agree."""
    rows, bias = trained.change[layer.weight], trained.change[layer.bias]
    if not (np.isfinite(rows).all() and np.isfinite(bias).all()):
        return 0
    # differences of float32 weights: an entry has to rise above their rounding
    rounding = 64 * float(np.finfo(np.float32).eps) * float(np.abs(trained.sent[layer.bias]).max())
    order = np.argsort(-np.abs(bias))[:READ]
    order = order[np.abs(bias[order]) > max(rounding, 1e-12)]
    inputs = rows[order] / bias[order, None]
    length = np.linalg.norm(inputs, axis=1)
    inputs, length = inputs[length > 0], length[length > 0]
    if len(inputs) < 2:
        return 0
    squares = length[:, None] ** 2 + length[None] ** 2 - 2 * inputs @ inputs.T
    alike = np.sqrt(np.maximum(squares, 0)) < AGREE * np.maximum(length[:, None], length[None])
    first = ~np.tril(alike, -1).any(axis=1)
    return int((first & (alike.sum(axis=1) >= 2)).sum())


def last_bias(view: View) -> Iterator[Finding]:
    layer = view.structure.last
    if layer is None or not layer.bias or view.drowned(layer.bias):
        return
    replies = [t for t in view.clear if layer.bias in t.change and t.change[layer.bias].any()]
    if not replies:
        return
    entries = replies[0].change[layer.bias]
    rising = [int(c) for c in np.flatnonzero(entries < 0)]
    evidence = [
        view.said(layer),
        f"round {replies[0].round}, client {replies[0].client}: the bias grew for classes "
        f"{rising[:10]} of {len(entries)}: it holds more of them than the model expected",
    ]
    yield found("last-bias", layer.name, evidence, MEASURED)


def batchnorm_buffers(view: View) -> Iterator[Finding]:
    for layer in view.structure.layers:
        buffers = [k for k in layer.tensors if k.rpartition(".")[2] in (*RUNNING, COUNTER)]
        if layer.kind == "batchnorm" and not buffers:  # named by number
            buffers = list(layer.tensors)[2:4]
        changed = [
            t for t in view.clear if any(t.change.get(k, np.zeros(1)).any() for k in buffers)
        ]
        if layer.kind == "batchnorm" and changed and not view.drowned(buffers[0]):
            t = changed[0]
            evidence = [view.said(layer), f"round {t.round}, client {t.client}: they changed"]
            yield found("batchnorm-buffers", layer.name, evidence, MEASURED)


def embedding_rows(view: View) -> Iterator[Finding]:
    for layer in view.structure.layers:
        if layer.kind != "embedding" or view.drowned(layer.weight):
            continue
        for t in view.clear:
            rows = t.change.get(layer.weight)
            changed = int(rows.any(axis=1).sum()) if rows is not None else 0
            if rows is not None and 0 < changed < SPARSE * len(rows):
                evidence = [
                    view.said(layer),
                    f"round {t.round}, client {t.client}: {changed} of {len(rows)} rows changed",
                ]
                yield found("embedding-rows", layer.name, evidence, MEASURED)
                break


def position_embedding(view: View) -> Iterator[Finding]:
    for layer in view.structure.layers:
        changes = [t for t in view.clear if t.change.get(layer.weight, np.zeros(1)).any()]
        if layer.kind == "position" and changes and not view.drowned(layer.weight):
            yield found("position-embedding", layer.name, [view.said(layer)], INFERRED)


# ---------------------------------------------------------------- the messages


def few_images(view: View) -> Iterator[Finding]:
    small = [(t, n) for t in view.clear if 0 < (n := _examples(t)) <= FEW]
    if not small or all(view.drowned(name) for name in small[0][0].change):
        return
    trained, count = min(small, key=lambda pair: pair[1])
    seen = trained.reply.watched
    how = (
        f"forward passes in training: {', '.join(map(str, seen.batches[:8]))} examples"
        if seen.batches
        else "by the number of examples that it sends"
    )
    evidence = [
        f"round {trained.round}, client {trained.client}: {count} examples ({how})",
        f"{len(small)} of {len(view.clear)} updates have at most {FEW}",
    ]
    yield found("few-images", "train", evidence, MEASURED)


def _examples(trained: Trained) -> int:
    """Examples behind an update: as watched, or as the client says; 0 where neither tells."""
    if trained.reply.watched.batches:
        return sum(trained.reply.watched.batches)
    counts = [int(v) for _, _, v in _counts(trained.reply)]
    return max((n for n in counts if n > 1), default=0)


def sample_counts(view: View) -> Iterator[Finding]:
    yield from _numbers(view, "sample-counts", _counts)


def training_loss(view: View) -> Iterator[Finding]:
    yield from _numbers(view, "training-loss", _losses)


def _numbers(
    view: View, rule: str, read: Callable[[Message], Iterable[tuple[str, str, float]]]
) -> Iterator[Finding]:
    """Numbers in the replies to training that tell clients, or rounds, apart."""
    values: dict[str, list[float]] = {}
    for t in view.traffic.trained:
        for _, key, value in read(t.reply):
            values.setdefault(key, []).append(value)
    for key, each in values.items():
        if len(set(each)) > 1 or (len(each) == 1 and each[0] not in (0, 1)):
            some = ", ".join(f"{v:.6g}" for v in each[:4])
            evidence = [f"{key} in the replies: {some}{', ...' if len(each) > 4 else ''}"]
            yield found(rule, key, evidence, MEASURED)


def _counts(message: Message) -> Iterator[tuple[str, str, float]]:
    for record, key, value in _scalars(message):
        if isinstance(value, int) and "num" in key and ("example" in key or "sample" in key):
            yield record, key, value


def _losses(message: Message) -> Iterator[tuple[str, str, float]]:
    for record, key, value in _scalars(message):
        if isinstance(value, float) and any(word in key.lower() for word in LOSSES):
            yield record, key, value


def _scalars(message: Message) -> Iterator[tuple[str, str, Any]]:
    for records in (message.metrics, message.configs):
        for name, record in records.items():
            for key, value in record.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield name, key, value


def secagg_in_clear(view: View) -> Iterator[Finding]:
    claims = [c for c in view.traffic.about.claims if c.kind == SECAGG]
    stages = any("stage" in record for m in view.traffic.messages if not m.up
                 for record in m.configs.values())  # fmt: skip
    clear = [t for t in view.clear if any(a.dtype.kind == "f" for a in t.got.values())]
    if (claims or stages) and clear:
        names = " and ".join(sorted({c.name for c in claims})) or "its stages in the messages"
        t = clear[0]
        size = sum(a.size for a in t.got.values())
        evidence = [
            f"switched on: {names}",
            f"round {t.round}, client {t.client}: a reply with {size} plain numbers; so in "
            f"{len(clear)} of {len(view.traffic.trained)} replies",
        ]
        yield found("secagg-in-clear", "train", evidence, MEASURED)


def optimiser_state(view: View) -> Iterator[Finding]:
    extra: dict[str, Trained] = {}
    for t in view.clear:
        for name, array in t.got.items():
            if name not in t.sent and array.size > 1:
                extra.setdefault(name, t)
    if extra:
        t = next(iter(extra.values()))
        names = ", ".join(list(extra)[:4])
        evidence = [f"round {t.round}, client {t.client} sends {len(extra)} arrays that it did "
                    f"not get: {names}"]  # fmt: skip
        yield found("optimiser-state", next(iter(extra)), evidence, MEASURED)


def frozen_weights(view: View) -> Iterator[Finding]:
    if len(view.clear) < 2:
        return
    names = set.intersection(*(set(t.change) for t in view.clear))
    frozen = [
        name
        for name in view.clear[0].change
        if name in names
        and name.rpartition(".")[2] not in (*RUNNING, COUNTER)
        and not any(t.change[name].any() for t in view.clear)
    ]
    moved = any(t.change[name].any() for t in view.clear for name in names)
    if frozen and moved:
        size = sum(view.clear[0].got[name].nbytes for name in frozen)
        evidence = [f"{', '.join(frozen[:4])}: unchanged in all {len(view.clear)} replies; "
                    f"{size:,} bytes of each"]  # fmt: skip
        yield found("frozen-weights", frozen[0], evidence, MEASURED)


def pickled_object(view: View) -> Iterator[Finding]:
    for message in view.traffic.messages:
        for record in message.configs.values():
            for key, value in record.items():
                if isinstance(value, bytes) and value[:2] in PICKLES and value[-1:] == b".":
                    side = "client" if message.up else "server"
                    evidence = [f"round {message.round}: {len(value)} bytes from the {side}"]
                    yield found("pickled-object", key, evidence, MEASURED)
                    return


def not_finite(view: View) -> Iterator[Finding]:
    for t in view.traffic.whole:
        bad = [k for k, a in t.got.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
        if bad:
            evidence = [f"round {t.round}, client {t.client}: NaN or infinity in "
                        f"{', '.join(bad[:4])}"]  # fmt: skip
            yield found("not-finite", bad[0], evidence, MEASURED)
            return


RULES: tuple[Rule, ...] = (
    input_linear, last_bias, batchnorm_buffers, embedding_rows, position_embedding, few_images,
    sample_counts, training_loss, secagg_in_clear, optimiser_state, frozen_weights, pickled_object,
    not_finite,
)  # fmt: skip

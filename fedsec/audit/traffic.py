"""What travelled between an app's server and its clients, and what a recording keeps of it.

A recording is a folder of safe formats only: `recording.json`, `messages.jsonl` (one message a
line, each with its checksum) and `arrays/SHA256.safetensors`, named by their content. Nothing in it
is ever executed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedsec import records
from fedsec.audit.structure import Structure
from fedsec.checks import Refused, require

FORMAT = "fedsec recording 1"
HEADER, MESSAGES, ARRAYS = "recording.json", "messages.jsonl", "arrays"
NESTED = 8 * 2**20  # bytes of a message without its arrays, as text: more is left out


@runtime_checkable
class Values(Protocol):
    """An array that may still be on the wire or on the disk: Flower's `Array` is one."""

    def numpy(self) -> np.ndarray: ...


Records = dict[str, dict[str, Any]]  # by the record's name and the key in it


@dataclass(frozen=True)
class Mechanism:
    """What the mods of a client did to one tensor of its change, measured."""

    size: int  # entries
    before: float  # L2 norm of the change as the client computed it
    noise: float  # standard deviation of what was added
    factor: float  # by which the change was scaled before that
    untouched: bool  # sent just as it was computed
    counter: bool  # not trained: an integer


@dataclass(frozen=True)
class Watched:
    """What a client did behind one reply: known where the client ran in this process."""

    steps: int = 0  # of an optimiser
    batches: tuple[int, ...] = ()  # images of each forward pass in training
    lr: float | None = None
    optimiser: str = ""
    mods: tuple[str, ...] = ()
    mechanisms: dict[str, Mechanism] = field(default_factory=dict)  # by tensor


@dataclass(frozen=True)
class Message:
    """One message as it was on the wire."""

    number: int
    up: bool  # from a client to the server
    kind: str  # Flower's message type: train, evaluate, ...
    round: int  # from 1; 0 where nothing says which
    client: int  # from 0, in the order of the node ids
    about: int | None  # the number of the message that a reply is to
    arrays: dict[str, dict[str, Values]]  # by record and name
    metrics: Records
    configs: Records
    error: str = ""
    size: int = 0  # bytes of the arrays
    left_out: bool = False  # its arrays are beyond the limit of what is kept
    watched: Watched = Watched()

    @cached_property
    def flat(self) -> dict[str, Values]:
        """All arrays, by their own name where no other record has it."""
        names = [name for record in self.arrays.values() for name in record]
        return {
            name if names.count(name) == 1 else f"{record}/{name}": values
            for record, arrays in self.arrays.items()
            for name, values in arrays.items()
        }


@dataclass(frozen=True)
class Claim:
    """A privacy mechanism that the app switched on, and its settings."""

    kind: str  # "local-dp", "central-dp", "client-clip" or "secagg"
    name: str  # of Flower's class or function
    settings: dict[str, float | int | str | None]


@dataclass(frozen=True)
class About:
    """What is known of the app beside its messages."""

    app: str
    clients: int
    config: dict[str, Any]
    versions: dict[str, str | None]
    claims: tuple[Claim, ...] = ()
    structure: Structure | None = None
    legacy: bool = False  # a NumPyClient or Client, whose arrays have no names


@dataclass(frozen=True)
class Trained:
    """A client's reply to a model that it was to train, with that model."""

    request: Message
    reply: Message

    @property
    def round(self) -> int:
        return self.request.round

    @property
    def client(self) -> int:
        return self.request.client

    @property
    def whole(self) -> bool:
        """Whether both models are at hand."""
        kept = not (self.request.left_out or self.reply.left_out)
        return kept and bool(self.request.flat) and bool(self.reply.flat)

    @cached_property
    def sent(self) -> dict[str, np.ndarray]:
        return _read(self.request.flat)

    @cached_property
    def got(self) -> dict[str, np.ndarray]:
        return _read(self.reply.flat)

    @cached_property
    def change(self) -> dict[str, np.ndarray]:
        """Before - after of every tensor that went both ways; in float64.

        A difference of 0-dimensional arrays is a NumPy scalar, which is made an array again.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            return {
                name: np.asarray(self.sent[name].astype(np.float64) - after.astype(np.float64))
                for name, after in self.got.items()
                if name in self.sent
                and self.sent[name].shape == after.shape
                and after.dtype.kind in "fiu"
            }


@dataclass(frozen=True)
class Traffic:
    """Everything that travelled, as far as it was kept."""

    about: About
    messages: tuple[Message, ...]
    notes: tuple[str, ...] = ()  # what went wrong, and what is missing

    @cached_property
    def trained(self) -> tuple[Trained, ...]:
        asked = {m.number: m for m in self.messages if not m.up}
        return tuple(
            Trained(asked[m.about], m)
            for m in self.messages
            if m.up and m.about in asked and m.kind.split(".")[0] == "train" and not m.error
        )

    @cached_property
    def whole(self) -> tuple[Trained, ...]:
        """The trained replies whose arrays are at hand."""
        return tuple(t for t in self.trained if t.whole)

    @property
    def rounds(self) -> int:
        return len({t.round for t in self.trained})

    @property
    def failures(self) -> tuple[Message, ...]:
        return tuple(m for m in self.messages if m.error)


def _read(arrays: dict[str, Values]) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in arrays.items()}


# ---------------------------------------------------------------- recording


class Recording:
    """Writes messages to a folder as they travel, up to `limit` bytes of arrays.

    What is written is whole at any time: a killed run leaves a recording that can be replayed.
    """

    def __init__(self, folder: Path, about: About, limit: int):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        require(not taken, "record", "must be a folder that is empty or not there", folder)
        self.folder, self.about, self.left, self.messages = folder, about, limit, 0
        self.full = False
        try:
            (folder / ARRAYS).mkdir(parents=True)
            self.file = open(folder / MESSAGES, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise Refused("record", f"must be writable ({error.strerror})", folder) from None
        self._header("open")

    def add(self, message: Message) -> None:
        """Raises records.NotSaved where the disk is full; what was there stays whole."""
        said = _plain(message)
        said["arrays"] = {name: self._kept(record) for name, record in message.arrays.items()}
        said["left_out"] = None in said["arrays"].values() or message.left_out
        if said["left_out"]:
            said["arrays"] = {name: {"names": {}} for name in message.arrays}
        text = json.dumps(said, allow_nan=False)
        if len(text) > NESTED:
            said |= {"configs": {}, "metrics": {}}
            text = json.dumps(said, allow_nan=False)
        row = json.dumps({"message": said, "sha256": _sha(text.encode())}, allow_nan=False)
        try:
            self.file.write(f"{row}\n".encode())
        except OSError as error:
            raise records.NotSaved(f"{self.folder}: {error.strerror}") from error
        self.messages += 1

    def finish(self, about: About) -> None:
        self.about = about
        self.file.close()
        self._header("whole")

    def _header(self, status: str) -> None:
        said = {"format": FORMAT, "status": status, "messages": self.messages}
        said |= {"full": self.full, "about": asdict(self.about)}
        text = json.dumps(_finite(said), indent=2, allow_nan=False) + "\n"
        records.write_whole(self.folder / HEADER, text.encode())

    def _kept(self, record: dict[str, Values]) -> dict[str, Any] | None:
        """Where the arrays of a record are, or None where they are beyond the limit."""
        from safetensors.numpy import save

        if self.full:  # so that it has gaps at its end only
            return None
        named = {f"{i}": np.asarray(v.numpy(), order="C") for i, v in enumerate(record.values())}
        text = save(named)
        name = f"{_sha(text)}.safetensors"
        path = self.folder / ARRAYS / name
        if not path.exists():
            if len(text) > self.left:
                self.full = True
                return None
            records.write_whole(path, text)
            self.left -= len(text)
        return {"file": name, "names": {key: f"{i}" for i, key in enumerate(record)}}


def _plain(message: Message) -> dict[str, Any]:
    """What JSON can hold of a message, without its arrays."""
    said = {k: getattr(message, k) for k in ("number", "up", "kind", "round", "client", "about")}
    said |= {k: _json(getattr(message, k)) for k in ("metrics", "configs", "error", "size")}
    return said | {"watched": _finite(asdict(message.watched))}


def _json(value: Any) -> Any:
    match value:
        case bytes():
            return {"bytes": base64.b64encode(value).decode()}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case dict():
            return {k: _json(v) for k, v in value.items()}
        case list() | tuple():
            return [_json(v) for v in value]
        case _:
            return value


def _unjson(value: Any) -> Any:
    match value:
        case {"bytes": str(text), **rest} if not rest:
            return base64.b64decode(text)
        case {"float": str(text), **rest} if not rest:
            return float(text)
        case dict():
            return {k: _unjson(v) for k, v in value.items()}
        case list():
            return [_unjson(v) for v in value]
        case _:
            return value


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has not."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case _:
            return value


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- replay


class Damaged(Exception):
    """A file of a recording is not what was written."""


@dataclass(frozen=True)
class Stored:
    """An array of a recording, read when it is asked for."""

    path: Path
    key: str

    def numpy(self) -> np.ndarray:
        return _tensors(self.path)[self.key]


_files: dict[Path, dict[str, np.ndarray]] = {}  # read and checked; the last few


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if path not in _files:
        from safetensors.numpy import load

        content = path.read_bytes()
        if _sha(content) != path.stem:
            raise Damaged(f"arrays/{path.name} is not what was recorded")
        try:
            arrays = load(content)
        except Exception as error:  # of safetensors' own type
            raise Damaged(f"arrays/{path.name} holds no arrays ({error})") from None
        while len(_files) > 8:
            _files.pop(next(iter(_files)))
        _files[path] = arrays
    return _files[path]


def replay(folder: Path) -> Traffic:
    """The traffic of a recording, without what is damaged, which its notes tell.

    Raises Refused where it is none.
    """
    path = folder / HEADER
    try:
        said = _formed(json.loads(path.read_text(encoding="utf-8")), _HEADER)
        require(said["format"] == FORMAT, "replay", f"must be a {FORMAT}", folder)
        about = _about(said["about"])
        status, count, full = said["status"], said["messages"], said["full"]
    except FileNotFoundError:
        raise Refused("replay", f"must be a folder with a {HEADER}", folder) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("replay", f"must hold a {HEADER} that is whole", folder) from None
    messages, notes = [], []
    for number, line in enumerate(_lines(folder / MESSAGES), 1):
        try:
            messages.append(_message(line, folder))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            notes.append(f"error: recording: {MESSAGES} line {number} is damaged; it is left out")
    for index, message in enumerate(messages):
        trouble = _trouble(message)
        if trouble:
            notes.append(f"error: recording: message {message.number} has no arrays: {trouble}")
            messages[index] = replace(message, left_out=True, arrays={})
    if status != "whole":
        notes.append("error: recording: cut short, its run was ended before it was done")
    elif len(messages) < count:
        notes.append(f"error: recording: holds {len(messages)} of its {count} messages")
    if full:
        notes.append("the recording reached its limit: later messages are without their arrays")
    return Traffic(about, tuple(messages), tuple(notes))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        yield from path.read_bytes().splitlines()
    except OSError:
        return


def _message(line: bytes, folder: Path) -> Message:
    row = json.loads(line)
    said = _formed(row["message"], _MESSAGE)
    if _sha(json.dumps(said, allow_nan=False).encode()) != row["sha256"]:
        raise ValueError
    arrays: dict[str, dict[str, Values]] = {
        name: {
            key: Stored(folder / ARRAYS / Path(record["file"]).name, own)
            for key, own in record["names"].items()
        }
        for name, record in said["arrays"].items()
    }
    seen = said["watched"]
    watched = Watched(
        **{k: seen[k] for k in ("steps", "lr", "optimiser")},
        batches=tuple(seen["batches"]),
        mods=tuple(seen["mods"]),
        mechanisms={k: Mechanism(**_measured(m)) for k, m in seen["mechanisms"].items()},
    )
    return Message(
        **{k: said[k] for k in ("number", "up", "kind", "round", "client", "about", "size")},
        **{k: _unjson(said[k]) for k in ("metrics", "configs", "error")},
        arrays={} if said["left_out"] else arrays,
        left_out=said["left_out"],
        watched=watched,
    )


def _measured(said: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in said.items()}  # as _finite left it


# The form of what a recording holds: a type, alternatives, [of each], {of each by name}, and
# {name: of that one} for what has these names.
_NUMBER = (int, float, type(None))  # None: it was not finite
_SETTING = (int, float, str, bool, type(None))
_MESSAGE: dict[str, Any] = {
    "number": int, "up": bool, "kind": str, "round": int, "client": int, "size": int,
    "about": (int, type(None)), "error": str, "left_out": bool,
    "arrays": {str: {"names": {str: str}}},
    "metrics": {str: {str: object}}, "configs": {str: {str: object}},
    "watched": {
        "steps": int, "batches": [int], "lr": _NUMBER, "optimiser": str, "mods": [str],
        "mechanisms": {str: {"size": int, "before": _NUMBER, "noise": _NUMBER, "factor": _NUMBER,
                             "untouched": bool, "counter": bool}},
    },
}  # fmt: skip
_STRUCTURE: dict[str, Any] = {
    "layers": [{"name": str, "kind": str, "tensors": {str: [int]}, "weight": str, "bias": str}],
    "source": str, "model": str, "file": str, "line": int,
}  # fmt: skip
_HEADER: dict[str, Any] = {
    "status": str, "messages": int, "full": bool,
    "about": {
        "app": str, "clients": int, "config": {str: _SETTING}, "versions": {str: _SETTING},
        "legacy": bool, "claims": [{"kind": str, "name": str, "settings": {str: _SETTING}}],
        "structure": (_STRUCTURE, type(None)),
    },
}  # fmt: skip


def _formed(said: Any, form: Any) -> Any:
    """The same where it has this form; raises TypeError or KeyError."""
    match form:
        case tuple():
            if not any(_fits(said, each) for each in form):
                raise TypeError
        case [each]:
            for one in _formed(said, list):
                _formed(one, each)
        case dict() if str in form:
            for one in _formed(said, dict).values():
                _formed(one, form[str])
        case dict():
            _formed(said, dict)
            for name, each in form.items():
                _formed(said[name], each)
        case _:
            if not isinstance(said, form) or (form is int and isinstance(said, bool)):
                raise TypeError
    return said


def _fits(said: Any, form: Any) -> bool:
    try:
        _formed(said, form)
    except (TypeError, KeyError):
        return False
    return True


def _trouble(message: Message) -> str:
    try:
        for values in message.flat.values():
            values.numpy()
    except (Damaged, KeyError, OSError, ValueError) as error:  # a path that cannot be one
        return str(error) if isinstance(error, Damaged) else "an arrays file is missing"
    return ""


def _about(said: dict[str, Any]) -> About:
    claims = tuple(Claim(**claim) for claim in said.pop("claims"))
    structure = said.pop("structure")
    return About(**said, claims=claims, structure=Structure.of(structure) if structure else None)

"""From a composed configuration to objects. Only this file sees a DictConfig.

The class that a YAML names is the schema of that YAML: wrong keys and wrong types are refused with
the key's full name, and so is what the class itself refuses.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from fedsec.checks import Refused, require

GROUPS = ("attack", "defense", "threat", "client", "data", "model", "federation")


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of run.yaml that belong to no group."""

    images: int  # victim images attacked, >= 1
    victim_batch: int | str  # images per attacked update, or "same": the training exchanges
    rounds: int  # of the federation, >= 0
    ema: float  # decay of an average of the global weights that is evaluated too; 0: none
    attack_rounds: tuple[int, ...]  # rounds whose exchanges are attacked; 0: the initial model
    clients: int  # >= 1
    seed: int
    device: str  # auto, cpu or cuda
    out: str | None  # result folder; none: a fresh one under outputs/
    control: bool  # also run without the defense
    lpips: str  # the metric's network: alex, which comes with fedsec, or vgg, which is fetched
    stack: int  # victims attacked together, >= 1: memory against speed
    candidates: int  # images in the pool that the fact of that name grants, >= 2
    threads: int | str  # of torch, on a CPU, >= 1; auto: by the model's size and the cores
    store: str | None = None  # folder of trained federations that runs share; auto: see run.yaml

    def __post_init__(self):
        require(self.images >= 1, "images", "must be at least 1", self.images)
        require(self.rounds >= 0, "rounds", "must not be negative", self.rounds)
        require(0 <= self.ema < 1, "ema", "must be in [0, 1)", self.ema)
        require(self.clients >= 1, "clients", "must be at least 1", self.clients)
        require(self.stack >= 1, "stack", "must be at least 1", self.stack)
        require(self.candidates >= 2, "candidates", "must be at least 2", self.candidates)
        threads, most = self.threads, 4 * (os.cpu_count() or 1)  # far more end the process
        if isinstance(threads, str):
            require(threads == "auto", "threads", "must be a number or auto", threads)
        else:
            require(threads >= 1, "threads", "must be at least 1", threads)
            require(threads <= most, "threads", f"must be at most {most} here", threads)
        devices = ("auto", "cpu", "cuda")
        require(self.device in devices, "device", "must be auto, cpu or cuda", self.device)
        require(self.out != "", "out", "must name a folder", "nothing")
        require(self.store != "", "store", "must name a folder, or be auto or null", "nothing")
        require(self.lpips in ("alex", "vgg"), "lpips", "must be alex or vgg", self.lpips)
        rounds = self.attack_rounds
        require(len(rounds) > 0, "attack_rounds", "must name at least one round", list(rounds))
        for r in rounds:
            within = 0 <= r <= self.rounds
            require(within, "attack_rounds", f"must be within 0 and rounds={self.rounds}", r)
        require(len(set(rounds)) == len(rounds), "attack_rounds", "must differ", list(rounds))
        batch = self.victim_batch
        if isinstance(batch, str):
            require(batch == "same", "victim_batch", "must be a number or same", batch)
            last = max(rounds) < self.rounds
            require(last, "attack_rounds", "must be training rounds with victim_batch=same", rounds)
        else:
            require(batch >= 1, "victim_batch", "must be at least 1", batch)
            fits = self.images % batch == 0
            require(fits, "images", f"must be a multiple of victim_batch={batch}", self.images)


@dataclass(frozen=True)
class Settings:
    """A whole run's configuration as objects; `names` says which option of each group it is."""

    values: Values
    names: dict[str, str]
    attack: Any
    defense: Any
    threat: Any
    client: Any
    data: Any
    model: Any
    federation: Any


def settings(cfg: DictConfig, names: dict[str, str]) -> Settings:
    """Build every object of a run, or refuse."""
    tops = [str(k) for k in cfg if k not in GROUPS and k != "sweep"]
    values = _typed(Values, OmegaConf.masked_copy(cfg, tops), "")
    parts = {group: _part(cfg[group], group) for group in GROUPS}
    parts["threat"] = dataclasses.replace(parts["threat"], name=names["threat"])
    return Settings(values, names, **parts)


def saved(path: Path, names: dict[str, str]) -> Settings:
    """The settings of an earlier run from its config.yaml. Refuses what is none."""
    try:
        cfg = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Refused(str(path), f"must be the config.yaml of a run ({said})") from None
    missing = [group for group in GROUPS if not isinstance(cfg, DictConfig) or group not in cfg]
    require(not missing, str(path), "must be the config.yaml of a run; missing", missing)
    assert isinstance(cfg, DictConfig)
    return settings(cfg, names)


OPTIONS = Path(__file__).resolve().parent.parent / "configs"  # those that come with fedsec


def presets(group: str, folders: list[Path]) -> dict[str, Any]:
    """Every option of a group, built with the values of its YAML."""
    found = {}
    for folder in folders:
        for path in sorted((folder / group).glob("*.yaml")):
            node = OmegaConf.load(path)
            if isinstance(node, DictConfig) and "_target_" in node:
                found.setdefault(path.stem, _part(node, group))
    return found


def difference(one: str, other: str) -> str:
    """The first key in which two configurations, as YAML, differ, but for folders. Else nothing.

    Refuses what is no YAML.
    """

    def flat(node: object, key: str) -> dict[str, object]:
        if not isinstance(node, dict) or not node:
            return {key: node}
        inner = (flat(v, f"{key}.{k}".removeprefix(".")) for k, v in node.items())
        return {k: v for part in inner for k, v in part.items()}

    if one == other:
        return ""
    try:
        a, b = (flat(OmegaConf.to_container(OmegaConf.create(text)), "") for text in (one, other))
    except (YAMLError, OmegaConfBaseException) as error:
        raise Refused("config.yaml", "must be YAML", " ".join(str(error).split())) from None
    keys = (k for k in [*b, *a] if k not in ("out", "store"))
    return next((k for k in keys if repr(a.get(k, ...)) != repr(b.get(k, ...))), "")


def _part(node: object, group: str):
    """The object that a group's node describes; several defenses side by side are composed."""
    if isinstance(node, DictConfig) and "_target_" in node:
        return _typed(locate(node["_target_"], group), node, group)
    several = group == "defense" and isinstance(node, DictConfig) and len(node) > 0
    require(several, group, "must have _target_, or be a list like defense=[prune,noise]", node)
    from fedsec.defense import Compose

    assert isinstance(node, DictConfig)
    return Compose(tuple(_part(node[name], f"{group}.{name}") for name in node))


def locate(target: str, group: str) -> type:
    """The class at a dotted path."""
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refused(f"{group}._target_", f"must name a class ({error})", target) from error
    require(dataclasses.is_dataclass(found), f"{group}._target_", "must be a dataclass", target)
    return found


def _typed(cls: type, node: DictConfig, group: str):
    """An instance of `cls` from exactly its fields, each of its declared type."""
    prefix = f"{group}." if group else ""
    given = OmegaConf.masked_copy(node, [str(k) for k in node if k != "_target_"])
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in given:
        known = ", ".join(fields) or "none"
        require(key in fields, f"{prefix}{key}", f"no such key; there are: {known}", given[key])
        number = isinstance(given[key], (int, float)) and not isinstance(given[key], bool)
        truth = fields[str(key)].type in (bool, "bool")  # OmegaConf takes 2 for true
        require(not (truth and number), f"{prefix}{key}", "must be true or false", given[key])
    try:
        checked = OmegaConf.merge(OmegaConf.structured(cls), given)
        plain = OmegaConf.to_container(checked, resolve=True, throw_on_missing=True)
    except (ValidationError, ConfigKeyError, OmegaConfBaseException) as error:
        key = re.split(r"[.\[]", str(error.full_key or error.key or ""))[0]
        got = OmegaConf.select(given, key) if key else None
        rule = _rule(error, fields.get(key))
        raise Refused(f"{prefix}{key}", rule, "null" if got is None else got) from error
    assert isinstance(plain, dict)
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
    try:
        return cls(**{str(k): v for k, v in plain.items()})
    except Refused as refusal:
        raise (refusal.under(group) if group else refusal) from refusal


def _rule(error: OmegaConfBaseException, field: dataclasses.Field | None) -> str:
    if field is not None:
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        inner = re.match(r"tuple\[(\w+)", kind)
        if inner:
            return f"must be a list of type {inner[1]}, like [0,2]"
        return f"must be of type {kind}" if kind else "has the wrong type"
    return str(error.msg or error).splitlines()[0]

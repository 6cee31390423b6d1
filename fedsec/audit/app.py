"""Somebody's Flower app, loaded as Flower loads it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict, parse_config_args
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from fedsec.checks import Refused, require

CLIENTS = 4  # where the app does not say how many it is for
ROUNDS = "num-server-rounds"  # the key of Flower's templates


@dataclass(frozen=True)
class App:
    """A Flower app, and the run config that it is to run with."""

    name: str
    folder: Path  # what holds its code
    server: ServerApp
    client: ClientApp
    config: dict[str, Any]
    clients: int  # that it asks for; CLIENTS where it does not say


def load(folder: Path, server: str, client: str, overrides: Sequence[str], rounds: int) -> App:
    """The app in `folder`, or of the references `module:app` where they are given.

    `overrides` are words of Flower's --run-config; `rounds` above 0 sets Flower's own key for
    them where the app has it. Raises Refused: nothing ran yet but the app's imports.
    """
    project = _project(folder)
    flwr = project.get("tool", {}).get("flwr", {})
    described = flwr.get("app", {})
    components = described.get("components", {})
    config = _configured(described.get("config", {}), overrides, rounds)
    apps = {}
    for key, given, kind in (("server", server, ServerApp), ("client", client, ClientApp)):
        reference = given or components.get(f"{key}app", "")
        rule = f"must hold a pyproject.toml with {key}app of a Flower app; or name it by --{key}"
        require(bool(reference), "folder", rule, folder)
        apps[key] = _loaded(f"{key}app", reference, folder, kind)
    name = project.get("project", {}).get("name") or folder.resolve().name
    return App(name, folder, apps["server"], apps["client"], config, _clients(flwr))


def _project(folder: Path) -> dict[str, Any]:
    require(folder.is_dir(), "folder", "must be the folder of a Flower app", folder)
    path = folder / "pyproject.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise Refused("folder", f"must hold a pyproject.toml that parses ({error})", path) from None


def _configured(own: dict[str, Any], overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    try:
        config = flatten_dict(own)
        given = parse_config_args(list(overrides)) if overrides else {}
    except Exception as error:  # Flower's own words: click's and TOML's exceptions
        words = " ".join(str(getattr(error, "message", error)).split())
        raise Refused("run-config", f"must be as Flower takes it ({words})") from None
    for key in given:
        rule = f"must be a key of the app's run config: {', '.join(config) or 'it has none'}"
        require(key in config, "run-config", rule, key)
    if rounds and ROUNDS in config:
        given = {ROUNDS: rounds, **given}
    return {**config, **given}


def _loaded(key: str, reference: str, folder: Path, kind: type) -> Any:
    require(reference.count(":") == 1, key, "must be module:attribute", reference)
    try:
        loaded = load_app(reference, ValueError, str(folder))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # an app may even exit when it is imported
        first = next(iter(str(error).splitlines()), "")
        raise Refused(key, f"must import ({type(error).__name__}: {first})", reference) from error
    require(isinstance(loaded, kind), key, f"must be a {kind.__name__} of Flower's", reference)
    return loaded


def _clients(flwr: dict[str, Any]) -> int:
    """The size of the app's default federation, where its pyproject still holds one."""
    federations = flwr.get("federations", {})
    chosen = federations.get(federations.get("default", ""), {})
    said = chosen.get("options", {}).get("num-supernodes") if isinstance(chosen, dict) else None
    return said if isinstance(said, int) and said > 0 else CLIENTS

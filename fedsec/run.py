"""The command line: `python -m fedsec.run attack=inverting defense=dpsgd`.

Only this file knows Hydra. Nothing heavy is imported before the banner is printed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from datetime import date
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its exceptions reach us, and become one line

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsec.checks import Refused, require
from fedsec.console import Console

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUPS = ("attack", "defense", "threat", "client", "data", "model", "federation")
# Hydra's options that make sense here, and the values that each of them takes.
FLAGS = ("-m", "--multirun", "-h", "--help", "--hydra-help", "--version", "--resolve", "--info")
SHOWN = ("job", "hydra", "all")
VALUED = {"--cfg": SHOWN, "-c": SHOWN, "--config-dir": None, "-cd": None}  # None: a folder
LIST = re.compile(r"^(\+{0,2}defense)=\[(.*)\]$")


_statuses: list[int] = []  # of the runs of this process, in order


def main(argv: list[str] | None = None) -> int:
    """Run what the command line says; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    before, typed = signal.signal(signal.SIGTERM, _interrupt), sys.argv
    _statuses.clear()
    try:
        sys.argv = [sys.argv[0], *prepared(words)]
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="run")(task)()
    except Refused as refusal:
        return _refused(str(refusal))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # from Hydra: see `task`
        return _refused(_one_line(error, words))
    except KeyboardInterrupt:
        if not _statuses:
            print("interrupted before anything was computed", file=sys.stderr)
        return 130
    except SystemExit as stop:  # after Hydra's help
        return 1 if stop.code else 0
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.argv = typed
    return max(_statuses, default=0)


def task(cfg: DictConfig) -> int:
    """One run, from its composed configuration; its exit status.

    Never raises: Hydra would print more than the one line that a refusal is worth, and end a sweep.
    """
    try:
        status = _run(cfg)
    except Refused as refusal:
        status = _refused(str(refusal))
    except KeyboardInterrupt:
        print("interrupted before anything was computed", file=sys.stderr)
        status = 130
    except Exception:
        traceback.print_exc()
        status = 2
    _statuses.append(status)
    if status == 130 and str(HydraConfig.get().mode) == "RunMode.MULTIRUN":
        raise KeyboardInterrupt  # ends the sweep too
    return status


def _run(cfg: DictConfig) -> int:
    from fedsec.records import default_folder

    chosen = HydraConfig.get()
    names = _names(cfg, chosen.runtime.choices)
    console = Console()
    grants = sorted(map(str, cfg.threat.get("grants", [])))
    console.banner(names, names["threat"], grants)

    os.environ.setdefault("OMP_NUM_THREADS", str(cfg.threads))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    import torch

    from fedsec import config, experiment

    settings = config.settings(cfg, names)
    extra = [Path(s.path) for s in chosen.runtime.config_sources if s.schema == "file" and s.path]
    presets = config.presets("threat", list(dict.fromkeys([CONFIGS, *extra])))
    today = date.today().isoformat()
    name = names["attack"], names["defense"]
    if str(chosen.mode) == "RunMode.MULTIRUN":
        folder = Path(str(cfg.out)) / f"{chosen.job.num:03d}-{'-'.join(name)}-{cfg.seed}"
    elif cfg.out is None:
        folder = default_folder("outputs", *name, int(cfg.seed), today)
    else:
        folder = Path(str(cfg.out)).expanduser()
    command = shlex.join(["python", "-m", "fedsec.run", *chosen.overrides.task])
    plan = experiment.plan(settings, presets, folder, OmegaConf.to_yaml(cfg), command)
    values = settings.values
    steps = settings.attack.evaluations
    many = len(plan.defenses)
    work = (
        f"{values.clients} clients · {values.rounds} rounds · {values.images} images"
        + (f" x {many} defenses (none = control)" if many > 1 else "")
        + (f" x {steps} gradient evaluations" if steps else "")
    )
    threads = f", {values.threads} thread{'s' * (values.threads > 1)}"
    device = plan.device + (threads if plan.device == "cpu" else "")
    console.plan(device, torch.__version__.split("+")[0], values.seed, work, plan.estimate)
    return experiment.perform(plan, console)


def _names(cfg: DictConfig, choices: Mapping[str, object]) -> dict[str, str]:
    """The option chosen of each group; `prune+noise` for several defenses."""
    names = {}
    for group in GROUPS:
        chosen = choices.get(group)
        if not isinstance(chosen, str):
            way = "sweep with -m and commas" if group != "defense" else "quote it"
            raise Refused(group, f"takes one option; {way}", "a list")
        names[group] = chosen
    if names["defense"] == "composed":
        names["defense"] = "+".join(str(k) for k in cfg.defense or ()) or "composed"
    return names


def prepared(words: list[str]) -> list[str]:
    """The words as Hydra takes them.

    `defense=[prune,mixup]` becomes two options of one group, each under its own name, so that
    `defense.prune.ratio=0.5` reaches it; a sweep gets a folder.
    """
    out: list[str] = []
    values, options = _parted(words)
    for word in values:
        found = LIST.match(word)
        if not found:
            out.append(word)
            continue
        parts = [p.strip() for p in found[2].split(",") if p.strip()]
        if len(set(parts)) != len(parts) or not parts:
            raise Refused("defense", "must name different defenses", found[2] or "[]")
        out += ["defense=composed", *(f"+defense@defense.{p}={p}" for p in parts)]
    sweeps = {"-m", "--multirun"} & set(options) or any(w.startswith("sweep=") for w in out)
    if sweeps:
        given = [w.partition("=")[2] for w in out if w.startswith("out=")]
        folder = given[-1] if given else _fresh(Path("outputs") / date.today().isoformat())
        out += [] if given else [f"out={folder}"]
        out += [f"hydra.sweep.dir={folder}"]
    return out + options


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """Values and options, each in one piece: Hydra's parser stops at values on both sides."""
    values: list[str] = []
    options: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            values.append(word)
        elif name in VALUED:
            value = value if equals else next(rest, "")
            choices = VALUED[name]
            rule = "must be a folder" if choices is None else f"must be among {', '.join(choices)}"
            fits = Path(value).is_dir() and value if choices is None else value in choices
            require(bool(fits), name, rule, value or "nothing")
            options += [name, value]
        else:
            known = ", ".join((*FLAGS, *VALUED))
            require(word in FLAGS, "command line", f"must be key=value, or among {known}", word)
            options.append(word)
    return values, options


def _fresh(parent: Path) -> Path:
    number = 1
    while (parent / f"sweep-{number}").exists():
        number += 1
    return parent / f"sweep-{number}"


def _refused(line: str) -> int:
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr)
    return 1


def _one_line(error: Exception, words: list[str]) -> str:
    """Hydra's and OmegaConf's exceptions as `key: rule, got value`."""
    text = str(error)
    given = dict(w.lstrip("+~").split("=", 1) for w in words if "=" in w)

    def about(key: str, rule: str) -> str:
        return f"{key}: {rule}" + (f", got {given[key]}" if key in given else "")

    option = re.search(r"Could not find '([\w./-]+)/([^'/]*)'", text)
    if option:
        known = re.findall(r"^\t(\w+)$", text.partition("Config search path")[0], re.MULTILINE)
        known = ", ".join(k for k in known if k != "composed")
        return f"{option[1]}: must be among {known}, got {option[2] or 'nothing'}"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return about(key[1], "no such key")
    if isinstance(error, OverrideParseException):
        return f"command line: must be key=value, got {error.override or 'nothing'}"
    many = re.search(r"Ambiguous value for argument '([\w.]+)=([^']*)'", text)
    if many:
        both = f", or compose them: defense=[{many[2]}]" if many[1] == "defense" else ""
        return f"{many[1]}: takes one value; sweep over several with -m{both}, got {many[2]}"
    nulls = [k for k, v in given.items() if v in ("null", "None")]
    if isinstance(error, ValueError) and nulls:
        return f"{nulls[0]}: must name an option, got null"
    return f"command line: {' '.join(text.split())[:300]}"


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

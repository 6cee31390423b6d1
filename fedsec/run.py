"""The command line: `python -m fedsec.run attack=inverting defense=dpsgd`.

Only this file knows Hydra. Nothing heavy is imported before the banner is printed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import warnings
from datetime import date
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its exceptions reach us, and become one line

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsec.checks import Refused
from fedsec.console import Console

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LIST = re.compile(r"^(\+{0,2}defense)=\[(.*)\]$")


class Ended(Exception):
    """A run that ended with an exit status other than 0, its results written."""

    def __init__(self, status: int):
        self.status = status


def main(argv: list[str] | None = None) -> int:
    """Run what the command line says; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.argv = [sys.argv[0], *prepared(words)]
        hydra.main(version_base="1.3", config_path="../configs", config_name="run")(task)()
    except Refused as refusal:
        return _refused(str(refusal))
    except (HydraException, OmegaConfBaseException) as error:
        return _refused(_one_line(error))
    except Ended as ended:
        return ended.status
    except KeyboardInterrupt:
        print("interrupted before anything was computed", file=sys.stderr)
        return 130
    return 0


def task(cfg: DictConfig) -> None:
    """One run, from its composed configuration."""
    from fedsec.records import default_folder

    chosen = HydraConfig.get()
    names = {k: str(v) for k, v in chosen.runtime.choices.items() if "/" not in str(k)}
    if names["defense"] == "composed":
        names["defense"] = "+".join(str(k) for k in cfg.defense)
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
    status = experiment.perform(plan, console)
    if status:
        raise Ended(status)


def prepared(words: list[str]) -> list[str]:
    """The words as Hydra takes them.

    `defense=[prune,mixup]` becomes two options of one group, each under its own name, so that
    `defense.prune.ratio=0.5` reaches it; a sweep gets a folder.
    """
    out: list[str] = []
    for word in words:
        found = LIST.match(word)
        if not found:
            out.append(word)
            continue
        parts = [p.strip() for p in found[2].split(",") if p.strip()]
        if len(set(parts)) != len(parts) or not parts:
            raise Refused("defense", "must name different defenses", found[2] or "[]")
        out += ["defense=composed", *(f"+defense@defense.{p}={p}" for p in parts)]
    sweeps = [w for w in out if w in ("-m", "--multirun") or w.startswith("sweep=")]
    if sweeps:
        given = [w.partition("=")[2] for w in out if w.startswith("out=")]
        folder = given[-1] if given else _fresh(Path("outputs") / date.today().isoformat())
        out += [] if given else [f"out={folder}"]
        out += [f"hydra.sweep.dir={folder}"]
    return out


def _fresh(parent: Path) -> Path:
    number = 1
    while (parent / f"sweep-{number}").exists():
        number += 1
    return parent / f"sweep-{number}"


def _refused(line: str) -> int:
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr)
    return 1


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's exceptions as `key: rule, got value`."""
    text = str(error)
    option = re.search(r"Could not find '([\w./-]+)/([^'/]+)'", text)
    if option:
        known = re.findall(r"^\t(\S+)", text, re.MULTILINE)
        return f"{option[1]}: must be among {', '.join(known)}, got {option[2]}"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return f"{key[1]}: no such key; configs/ lists them"
    group = re.search(r"Could not override '?([\w.@/-]+)'?\.?\s*No match in the defaults", text)
    if group:
        return f"{group[1]}: no such group"
    return " ".join(text.split())[:300]


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

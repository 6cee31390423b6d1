"""The command line: `python -m fedsec.run attack=inverting defense=dpsgd`.

Only this file knows Hydra, but for `fedsec.cells.planned`. Nothing heavy is imported before the
banner is printed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import date
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fedsec import process

if __name__ == "__main__":
    process.enter()
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its exceptions reach us, and become one line

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsec import cells, launch, records, status
from fedsec.cells import Cell
from fedsec.checks import Refused, home_read, require
from fedsec.console import Console

if TYPE_CHECKING:
    from fedsec.experiment import Plan

# Our launchers have the names of the plugins' own, whose types they are checked against.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUPS = ("attack", "defense", "threat", "client", "data", "model", "federation")
# Hydra's options that make sense here, and the values that each of them takes.
FLAGS = ("-m", "--multirun", "-h", "--help", "--hydra-help", "--version", "--resolve", "--info")
SHOWN = ("job", "hydra", "all")
VALUED = {"--cfg": SHOWN, "-c": SHOWN, "--config-dir": None, "-cd": None}  # None: a folder
PATHS = re.compile(r"^(\+{0,2}(?:out|store|data\.path|data\.root|model\.weights))=(.*)$", re.DOTALL)
OWN = "command-line"  # how Hydra calls the source of the options in --config-dir
ONCE = "hydra.mode=RUN"  # a sweep's file, but not its sweep
LIST = re.compile(r"^(\+{0,2}defense)=\[(.*)\]$")


_statuses: list[int] = []  # of the runs of this process, in order
_turned: dict[Path, Cell] = {}  # cells of this process that did not come to a run of their own
_launched: list[launch.Launcher] = []  # what starts the cells of this sweep elsewhere, if so
_watched = ExitStack()  # what shows how they get on, until it is closed


class Launching(Callback):
    """Hydra tells it how the cells of a sweep are started."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        chosen = config.hydra.launcher
        if str(chosen._target_).endswith(".BasicLauncher"):
            return
        process.listen()  # nothing else in this process does
        os.environ[launch.COMMAND] = launch.here()
        name = str(config.hydra.runtime.choices["hydra/launcher"])
        _launched.append(launch.Launcher(name, str(chosen.get("submitit_folder") or "")))
        _watched.enter_context(status.shown(Path(str(config.hydra.sweep.dir)), Console()))


def main(argv: list[str] | None = None) -> int:
    """Run what the command line says; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    typed, sweep, whole, lost = sys.argv, None, set[Path](), ""
    for of_another in (_statuses, _turned, _launched):
        of_another.clear()
    os.environ.pop(launch.COMMAND, None)
    try:
        ready = prepared(words)
        sys.argv = [sys.argv[0], *ready]
        sweep = _sweep(ready)
        if sweep:
            whole = {cell.folder for cell in cells.find(sweep) if cell.state == cells.WHOLE}
        with process.signals_kept(), _swept(sweep, words), _watched:
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="run")(task)()
            except RuntimeError as error:
                lost = _lost(error)
    except Refused as refusal:
        return _refused(str(refusal))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # from Hydra: see `task`
        return _refused(_one_line(error, words))
    except KeyboardInterrupt:
        if sweep and (_statuses or _launched):
            _summed(sweep, whole, words)
        elif not _statuses:
            print("interrupted before anything was computed", file=sys.stderr)
        return 130
    except SystemExit as stop:  # after Hydra's help
        return 1 if stop.code else 0
    finally:
        sys.argv = typed
        os.environ.pop(launch.COMMAND, None)
    if lost:
        print(f"error: {lost}", file=sys.stderr)
    return _summed(sweep, whole, words) if sweep else max(_statuses, default=0)


def _lost(error: RuntimeError) -> str:
    """What a launcher says of jobs that ended without an answer, once all others have ended."""
    unknown = re.search(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+)_launcher", str(error))
    if unknown:
        extra = {"submitit": "slurm"}.get(unknown[1], unknown[1])
        raise Refused("hydra/launcher", f"needs pip install 'fedsec[{extra}]'", unknown[1])
    if not _launched:
        raise error
    said = " ".join(re.split("(?:No e|E)rror stream", str(error))[0].split())
    if said.startswith('Could not detect "srun"'):
        raise Refused("hydra/launcher", "needs Slurm's sbatch and srun", _launched[0].name)
    _launched[0].wait()
    return f"{_launched[0].name}: {said[:300]}"


def task(cfg: DictConfig) -> int:
    """One run, from its composed configuration; its exit status.

    Never raises: Hydra would print more than the one line that a refusal is worth, and end a sweep.
    """
    several = str(HydraConfig.get().mode) == "RunMode.MULTIRUN"
    if not several:
        return _status(cfg, several)
    with launch.job(_cell(cfg)):
        return _status(cfg, several)


def _status(cfg: DictConfig, several: bool) -> int:
    why = ""
    try:
        status = _run(cfg, several)
    except Refused as refusal:
        status, why = _refused(str(refusal)), f"error: {refusal}"
    except records.NotSaved as full:
        print(f"error: {full}", file=sys.stderr)
        status, why = 2, str(full)
    except KeyboardInterrupt:
        print("interrupted before anything was computed", file=sys.stderr)
        status = 130
    except Exception:
        why = traceback.format_exc()
        print(why, end="", file=sys.stderr)
        status = 2
    _statuses.append(status)
    if several and why:
        _turn(_cell(cfg), status, why)
    if several and status == 130:
        raise KeyboardInterrupt  # ends the sweep too
    return status


def _cell(cfg: DictConfig) -> Path:
    """The folder of this cell of a sweep."""
    chosen = HydraConfig.get()
    try:
        names = _names(cfg, chosen.runtime.choices)
    except Refused:
        names = dict.fromkeys(GROUPS, "refused")
    name = cells.named(int(chosen.job.num), names["attack"], names["defense"], cfg.seed)
    return home_read("out", str(cfg.out)) / name


def _turn(folder: Path, status: int, why: str) -> None:
    """Keep why a cell did not come to a run of its own: here, and in its folder if it is free."""
    state = cells.REFUSED if status == 1 else cells.FAILED
    last = why.strip().splitlines()[-1].removeprefix("error: ")
    _turned[folder] = Cell(folder, state, last)
    cells.leave(folder, why)


def _summed(sweep: Path, whole: set[Path], words: list[str]) -> int:
    """Say what became of each cell of a sweep; its exit status.

    What a cell's folder cannot say, since it holds something else, this process may know.
    """
    there = {cell.folder: cell for cell in cells.every(sweep)} | _turned
    found = [there[folder] for folder in sorted(there)]
    tried = [cell for cell in found if cell.state != cells.ABSENT]
    if _turned and all(cell.state == cells.REFUSED for cell in tried):  # see `_forget_refused`
        return 1
    if not tried and not _launched:
        return max(_statuses, default=0)
    done = all(cell.state == cells.WHOLE for cell in found)
    words = [*(w for w in words if not w.startswith("out=")), f"out={sweep}"]
    again = "" if done else shlex.join(["python", "-m", "fedsec.run", *words])
    for line in cells.summary(found, whole, again):
        print(line)
    return 0 if done else 2


def _run(cfg: DictConfig, several: bool) -> int:
    chosen = HydraConfig.get()
    names = _names(cfg, chosen.runtime.choices)
    if several and _done(cfg):
        return 0
    console = Console()
    grants = sorted(map(str, cfg.threat.get("grants", [])))
    console.banner(names, names["threat"], grants)

    if cfg.threads != "auto" and not several:  # the next cell's choice would read it
        os.environ.setdefault("OMP_NUM_THREADS", str(cfg.threads))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from fedsec import config, experiment

    if not launch.worker():  # who started that one has its own way of ending it
        process.listen()  # modules that an exception interrupts may say anything
    settings = config.settings(cfg, names)
    extra = [Path(s.path) for s in chosen.runtime.config_sources if s.schema == "file" and s.path]
    presets = config.presets("threat", list(dict.fromkeys([CONFIGS, *extra])))
    today = date.today().isoformat()
    name = names["attack"], names["defense"]

    def free() -> Path:
        return records.default_folder("outputs", *name, int(cfg.seed), today)

    if several:
        folder = _cell(cfg)
    else:
        folder = free() if cfg.out is None else home_read("out", str(cfg.out))
    store = _store(cfg.store, folder.parent if several else Path("outputs"))
    own = [f"--config-dir={s.path}" for s in chosen.runtime.config_sources if s.provider == OWN]
    given = list(chosen.overrides.task)
    if several:  # this cell alone
        given = [word for word in given if not word.startswith("out=")]
        given.append(f"out={_quoted(str(folder), False)}")
    given += [ONCE] * any(word.startswith("sweep=") for word in given)  # it may set other keys too
    command = shlex.join(["python", "-m", "fedsec.run", *given, *own])
    plan = None
    while True:
        try:
            if plan is None:
                text = OmegaConf.to_yaml(cfg)
                plan = experiment.plan(settings, presets, folder, text, command, store)
                _announce(plan, console)
            return experiment.perform(plan, console)
        except records.Taken:  # meanwhile, by another run: one without a name takes the next
            if several or cfg.out is not None:
                raise
            folder = free()
            plan = plan and replace(plan, folder=folder)


def _done(cfg: DictConfig) -> bool:
    """Whether this cell of a sweep is whole already, which is said. Else it can start, or go on."""
    from fedsec.config import difference

    cell = cells.look(_cell(cfg))
    if cell.state != cells.WHOLE:
        cells.clear(cell.folder)
        return False
    there = (cell.folder / records.CONFIG).read_text(encoding="utf-8", errors="surrogateescape")
    other = difference(there, OmegaConf.to_yaml(cfg))
    rule = f"holds a run with another {other}; repeat its sweep's command, or name a new folder"
    require(not other, "out", rule, cell.folder)
    now = records.commit()
    by = f", at commit {cell.commit}; this is {now}" if cell.commit != now else ""
    print(f"{'skips':<12} {cell.folder.name}: done before{by}")
    return True


def _store(named: object, beside: Path) -> Path | None:
    """The folder of trained federations, if there is to be one."""
    if named is None:
        return None
    return beside / ".store" if named == "auto" else home_read("store", str(named))


def composed(words: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration of the one run that the words describe, and the option of each group.

    Refuses what describes none, in the same line as the run would.
    """
    values, options = _parted(words)
    alone = set(options[::2]) <= {"--config-dir", "-cd"}
    require(alone, "command line", "must describe one run, by key=value", " ".join(options))
    swept = [word for word in values if word.startswith("sweep=")]
    require(not swept, "sweep", "takes one run", " ".join(swept))
    values = prepared(values)
    if options:
        sources = (f"file://{Path(folder).resolve()}" for folder in options[1::2])
        values.append(f"hydra.searchpath=[{','.join(_quoted(s, False) for s in sources)}]")
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("run", values, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        names = _names(cfg, cfg.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        key, _, rule = _one_line(error, words).partition(": ")
        raise Refused(key, rule) from None
    return OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]), names


def _announce(plan: Plan, console: Console) -> None:
    import torch

    values, many = plan.settings.values, len(plan.defenses)
    steps = plan.settings.attack.evaluations
    work = (
        f"{values.clients} clients · {values.rounds} rounds · {values.images} images"
        + (f" x {many} defenses (none = control)" if many > 1 else "")
        + (f" x {steps} gradient evaluations" if steps else "")
    )
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}"
    threads += " (auto)" if values.threads == "auto" else ""
    device = plan.device + (threads if plan.device == "cpu" else "")
    if plan.store is not None:
        console.line("store", f"{plan.store} keeps trained federations for further attacks")
    if plan.found:
        console.line("defense", plan.found)
    console.plan(device, torch.__version__.split("+")[0], values.seed, work, plan.estimate)


def _names(cfg: DictConfig, choices: Mapping[str, object]) -> dict[str, str]:
    """The option chosen of each group; `prune+noise` for several defenses."""
    names = {}
    for group in GROUPS:
        chosen = choices.get(group)
        if not isinstance(chosen, str):
            way = "sweep with -m and commas" if group != "defense" else "quote it"
            raise Refused(group, f"takes one option; {way}", "a list")
        names[group] = chosen
    given = HydraConfig.get().overrides.task
    if any(word.lstrip("+~").startswith("threat.") for word in given):
        names["threat"] = "custom"  # no longer what the preset's name says
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
    named = any(word.startswith("sweep=") for word in values) and ONCE not in values
    sweeps = named or bool({"-m", "--multirun"} & set(options))
    for word in values:
        path = PATHS.match(word)
        if path:
            swept = sweeps and path[1].lstrip("+") not in ("out", "store")
            out.append(f"{path[1]}={_quoted(path[2], swept)}")
            continue
        found = LIST.match(word)
        if not found:
            out.append(word)
            continue
        parts = [p.strip() for p in found[2].split(",") if p.strip()]
        if len(set(parts)) != len(parts) or not parts:
            raise Refused("defense", "must name different defenses", found[2] or "[]")
        out += ["defense=composed", *(f"+defense@defense.{p}={p}" for p in parts)]
    if sweeps:
        given = _folder(words) or str(_fresh(Path("outputs") / date.today().isoformat()))
        out += [] if _folder(words) else [f"out={given}"]
        out += [f"hydra.sweep.dir={_quoted(str(home_read('out', given)), False)}"]
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


def _folder(words: list[str]) -> str:
    """The result folder that the words ask for, or nothing."""
    given = [word.partition("=")[2] for word in words if word.startswith("out=")]
    return "" if not given or given[-1] == "null" else given[-1]


def _fresh(parent: Path) -> Path:
    """A new folder for a sweep, made here: another one which starts now takes the next number."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            with suppress(FileExistsError):
                (parent / f"sweep-{number}").mkdir()
                return parent / f"sweep-{number}"
    except OSError as error:
        raise Refused("out", f"must be writable ({error.strerror})", parent) from None
    raise AssertionError


def _quoted(path: str, sweeps: bool) -> str:
    """`path` as Hydra reads it to the letter. null, quotes, and sweeps over paths stay."""
    try:
        read = OverridesParser.create().parse_override(f"path={path}").value()
        quotes = isinstance(read, str) and f"{path[:1]}{path[-1:]}" in ("''", '""')
        if read is None or read == path or quotes or (sweeps and isinstance(read, Sweep)):
            return path
    except HydraException:
        pass
    if sweeps and "," in path and not os.path.exists(os.path.expanduser(path)):
        return ",".join(_quoted(part, False) for part in path.split(","))
    # a backslash is one to Hydra except before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), path)
    return f"'{escaped}'"


def _sweep(ready: list[str]) -> Path | None:
    """The folder of the sweep that the words describe, if they do."""
    named = [word for word in ready if word.startswith("hydra.sweep.dir=")]
    return Path(str(OverridesParser.create().parse_override(named[-1]).value())) if named else None


@contextmanager
def _swept(folder: Path | None, words: list[str]) -> Iterator[None]:
    """After a sweep without a single cell nothing is left of what Hydra wrote for it."""
    if folder is None:
        yield
        return
    ours = [p for p in (folder, *folder.parents) if not p.exists()]
    ours = ours if _folder(words) else [folder, *folder.parents[:2]]  # see `_fresh`
    before = set(folder.iterdir()) if folder.is_dir() else set()
    plan = folder / "multirun.yaml"
    try:
        yield
    except HydraException:  # some are an OSError too
        raise
    except OSError as error:  # of Hydra: see `task`
        raise Refused("out", f"must be writable ({error.strerror})", folder) from None
    finally:
        _forget_refused(folder)
        if folder.is_dir() and set(folder.iterdir()) - before <= {plan}:
            if plan not in before:
                plan.unlink(missing_ok=True)
            with suppress(OSError):  # they hold something else
                for made in ours:
                    made.rmdir()


def _forget_refused(sweep: Path) -> None:
    """Where every cell was refused the words were wrong, and nothing is written."""
    there = cells.find(sweep)
    if there and all(cell.state == cells.REFUSED for cell in there):
        for cell in there:
            if cell.folder not in _turned:  # a worker said so, in its log
                _refused(cell.why)
                _turned[cell.folder] = cell
            cells.clear(cell.folder)
        for left in (".submitit", cells.LOGS):
            shutil.rmtree(sweep / left, ignore_errors=True)


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
    nulls = [k for k in GROUPS if given.get(k) in ("null", "None")]
    if isinstance(error, ValueError) and nulls:
        return f"{nulls[0]}: must name an option, got null"
    return f"command line: {' '.join(text.split())[:300]}"


if __name__ == "__main__":
    from fedsec.run import main  # by this name a worker in another process finds `task`

    process.leave(main())

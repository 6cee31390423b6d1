"""`python -m fedsec.audit FOLDER`: run somebody's Flower app unchanged, and say what it gives away.

Exit status: 0 done, 1 the input was wrong, 2 the app failed or sent nothing (what was found is
kept), 3 findings fail the gate (--fail-on, --fail-above), 130 interrupted (likewise kept).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedsec import process

if __name__ == "__main__":
    process.enter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

from fedsec import __version__, records
from fedsec.checks import Refused, home_read, require
from fedsec.console import Console

if TYPE_CHECKING:
    from fedsec.audit.attacked import Plan, Truth
    from fedsec.audit.findings import Accepted, Finding
    from fedsec.audit.mechanisms import Promise
    from fedsec.audit.outputs import Result
    from fedsec.audit.structure import Structure
    from fedsec.audit.traffic import About, Message, Recording, Traffic
    from fedsec.mods import Mod

SHOWN = 5  # failures on the console; the files hold all
QUIET = 5.0  # seconds between two lines of progress


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused("command line", f"must be as --help says ({message})")


def parser() -> argparse.ArgumentParser:
    own = _Parser(
        prog="python -m fedsec.audit",
        description="Run a Flower app unchanged, and say what its messages give away.",
        epilog="exit status: 0 done, 1 wrong input, 2 the app failed, 3 the gate, 130 interrupted",
    )
    own.add_argument("folder", nargs="?", metavar="FOLDER", help="of the app; default: this one")
    own.add_argument("--server", default="", metavar="MODULE:APP", help="in place of pyproject's")
    own.add_argument("--client", default="", metavar="MODULE:APP", help="in place of pyproject's")
    own.add_argument("--rounds", type=int, default=0, metavar="N",
                     help="watch so many; default: as many as the app runs")  # fmt: skip
    own.add_argument("--clients", type=int, default=0, metavar="N",
                     help="default: the app's federation's, or 4")  # fmt: skip
    own.add_argument("--run-config", action="append", default=[], metavar="KEY=VALUE",
                     help="as flwr run takes it; may be given often")  # fmt: skip
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--patience", type=float, default=1800.0, metavar="SECONDS",
                     help="without a message, after which the app counts as hanging")  # fmt: skip
    own.add_argument("--limit", type=int, default=2000, metavar="MB",
                     help="of arrays kept in memory, and in a recording")  # fmt: skip
    own.add_argument("--cwd", metavar="FOLDER", help="where the app runs; default: a scratch one")
    own.add_argument("--record", metavar="FOLDER", help="keep what travelled, in safe formats")
    own.add_argument("--replay", metavar="FOLDER", help="judge a recording, without the app")
    own.add_argument("--model", default="", metavar="MODULE:NET",
                     help="the network, where its structure cannot be seen")  # fmt: skip
    own.add_argument("--claim", metavar="EPSILON,DELTA", help="that you state for the whole run")
    own.add_argument("--attack", metavar="NAME", help="of fedsec's attacks, such as auto: try it")
    own.add_argument("--threat", default="honest_server", metavar="NAME",
                     help="what the attack knows; default: honest_server")  # fmt: skip
    own.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="words",
                     help="as attack.budget=2000 or defense.ratio=0.99")  # fmt: skip
    own.add_argument("--attack-rounds", default="1", metavar="N,N", help="default: 1")
    own.add_argument("--victims", type=int, default=2, metavar="N",
                     help="updates of a round that are attacked; default: 2")  # fmt: skip
    own.add_argument("--data", default="", metavar="MODULE:LOAD",
                     help="of a client's number: its images and labels, for --replay")  # fmt: skip
    own.add_argument("--defense", metavar="NAME,NAME",
                     help="run once more with these as client mods, as prune,noise")  # fmt: skip
    own.add_argument("--fail-above", metavar="psnr=DB", help="exit 3 if an image comes out better")
    own.add_argument("--accept", metavar="FILE", help="TOML: findings to live with, and why")
    own.add_argument("--fail-on", choices=("low", "medium", "high"), help="exit 3 from there on")
    own.add_argument("--out", metavar="FOLDER", help="default: outputs/DATE/audit-APP")
    return own


def main(words: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    given = list(sys.argv[1:] if words is None else words)
    try:
        return _main(parser().parse_args(given), given)
    except Refused as refusal:
        sys.stdout.flush()
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    except records.NotSaved as full:
        print(f"error: {full}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # after --help
        return 1 if stop.code else 0
    except KeyboardInterrupt:
        print("interrupted before anything was seen", file=sys.stderr)
        return 130


def _main(asked: argparse.Namespace, words: Sequence[str]) -> int:
    console = Console()
    _checked(asked)
    what = f"replay {asked.replay}" if asked.replay else f"app {asked.folder or '.'}"
    console.line(f"fedsec {'.'.join(__version__.split('.')[:2])}", f"audit · {what}")
    from fedsec.audit import findings, outputs

    process.listen()
    accepted = findings.read_accepted(Path(asked.accept)) if asked.accept else []
    out = _out(asked)
    plan = _plan(asked)
    if asked.defense:
        _refuse_defense(asked)
    seen = _replayed(asked, console) if asked.replay else _watched(asked, console, plan)
    result = _judged(asked, seen, accepted, plan, console, words)
    if asked.defense and result.status == "done":
        result = _compared(asked, seen, result, plan, console)
    out = out or _free(result.traffic.about.app)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused("out", f"must be writable ({error.strerror})", out) from None
    with process.undisturbed():
        outputs.write(result, out, asked.fail_on)
    _show(result, out, console)
    return _status(result, asked, console)


@dataclass(frozen=True)
class Seen:
    """What there is to judge."""

    traffic: Traffic
    truths: list[Truth]
    settings: dict[str, Any]  # that decide what was seen
    given: Structure | None = None  # of the network that the user names
    again: Callable[[Mod], Seen] | None = None  # the app once more, with this mod of its clients


def _checked(asked: argparse.Namespace) -> None:
    """Refuse before anything slow is imported."""
    for key, least in (("rounds", 0), ("clients", 0), ("limit", 1)):
        require(getattr(asked, key) >= least, key, f"must be at least {least}", getattr(asked, key))
    require(asked.patience > 0, "patience", "must be above 0 seconds", asked.patience)
    require(0 <= asked.seed < 2**32, "seed", "must be from 0 to 2^32 - 1", asked.seed)
    for key in ("attack", "defense"):
        unnamed = [w for w in asked.words if w.lstrip("+~").startswith(f"{key}.")]
        require(bool(getattr(asked, key)) or not unnamed, "set", f"needs --{key}", *unnamed[:1])
        require(getattr(asked, key) != "", key, "must be a name", "nothing")
    require(not (asked.replay and asked.defense), "defense", "needs the app, not a recording",
            asked.defense)  # fmt: skip
    alone = not (asked.folder or asked.server or asked.client or asked.record)
    require(not asked.replay or alone, "replay", "takes no app, and records nothing", asked.folder)
    require(asked.victims >= 1, "victims", "must be at least 1", asked.victims)
    promise(asked.claim)
    most(asked.fail_above)
    for key, other in (("fail_above", "attack"), ("data", "attack"), ("data", "model")):
        alone = bool(getattr(asked, key)) and not getattr(asked, other)
        require(not alone, key.replace("_", "-"), f"needs --{other}", getattr(asked, key))
    if asked.accept:
        require(Path(asked.accept).is_file(), "accept", "must be a file", asked.accept)


def promise(claim: str | None) -> tuple[float, float] | None:
    """Epsilon and delta of `8,1e-5`."""
    if claim is None:
        return None
    rule = "must be EPSILON,DELTA, as 8,1e-5, above 0 and delta below 1"
    try:
        epsilon, delta = map(float, claim.split(","))
    except ValueError:
        raise Refused("claim", rule, claim) from None
    require(0 < epsilon < float("inf") and 0 < delta < 1, "claim", rule, claim)
    return epsilon, delta


def most(gate: str | None) -> float:
    """The PSNR of `psnr=20` above which an image fails the gate; without one, none does."""
    if gate is None:
        return float("inf")
    key, _, value = gate.partition("=")
    rule = "must be psnr=DB, as psnr=20"
    require(key == "psnr", "fail-above", rule, gate)
    try:
        psnr = float(value)
    except ValueError:
        raise Refused("fail-above", rule, gate) from None
    require(psnr < float("inf"), "fail-above", rule, gate)  # NaN is not
    return psnr


def _out(asked: argparse.Namespace) -> Path | None:
    if asked.out is None:
        _refuse_unwritable(Path("outputs"))
        return None
    out = home_read("out", asked.out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    require(not taken, "out", "must be a folder that is empty or not there", out)
    _refuse_unwritable(out)
    return out


def _refuse_unwritable(out: Path) -> None:
    """Before the app runs: what is found has to have a place."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(writable, "out", "must be writable", out)


def _free(app: str) -> Path:
    """A folder of today that is not there yet."""
    today = Path("outputs") / date.today().isoformat()
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in app)
    numbered = (today / f"audit-{name}{f'-{n}' if n > 1 else ''}" for n in range(1, 10**6))
    return next(path for path in numbered if not path.exists())


# ---------------------------------------------------------------- what travelled


def _plan(asked: argparse.Namespace) -> Plan | None:
    """The attack that is asked for."""
    if asked.attack is None:
        return None
    from fedsec.audit import attacked

    rule = "must be rounds from 1 on, as 1,3"
    try:
        rounds = tuple(int(n) for n in asked.attack_rounds.split(","))
    except ValueError:
        raise Refused("attack-rounds", rule, asked.attack_rounds) from None
    require(min(rounds) >= 1, "attack-rounds", rule, asked.attack_rounds)
    return attacked.chosen(
        asked.attack, asked.threat, asked.words, rounds, asked.victims, asked.seed
    )


def _refuse_defense(asked: argparse.Namespace) -> None:
    """Before the app runs."""
    from fedsec.audit import price
    from fedsec.mods import defend

    defend(price.named(asked.defense, asked.words))


def _replayed(asked: argparse.Namespace, console: Console) -> Seen:
    from fedsec.audit.traffic import replay

    traffic = replay(home_read("replay", asked.replay))
    console.line("recording", f"{len(traffic.messages)} messages of {traffic.about.app}")
    truths = _loaded(asked, traffic) if asked.data else []
    given = _given(asked, Path.cwd())
    return Seen(traffic, truths, {"replay": asked.replay}, given)


def _loaded(asked: argparse.Namespace, traffic: Traffic) -> list[Truth]:
    """What the named function says that each client trained on, where it is one whole batch."""
    from fedsec.audit.attacked import loaded

    load, network = (_named(key, getattr(asked, key), Path.cwd()) for key in ("data", "model"))
    return loaded(traffic, network, load)


def _named(key: str, reference: str, folder: Path) -> Any:
    """What `module:attribute` refers to, looked for in `folder` too."""
    from flwr.supercore.object_ref import load_app

    require(reference.count(":") == 1, key, "must be module:attribute", reference or "nothing")
    try:
        with _unwritten():
            return load_app(reference, ValueError, str(folder))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise Refused(key, f"must import ({type(error).__name__}: {first})", reference) from None


def _watched(asked: argparse.Namespace, console: Console, plan: Plan | None) -> Seen:
    from fedsec.audit import app as apps
    from fedsec.audit import tap
    from fedsec.audit.claims import Heard
    from fedsec.audit.traffic import Recording

    heard, folder = Heard(), Path(asked.folder or ".").resolve()
    record = home_read("record", asked.record).resolve() if asked.record else None
    with _unwritten(), heard.listening():
        app = apps.load(folder, asked.server, asked.client, asked.run_config, asked.rounds)
    given = _given(asked, folder)
    clients = asked.clients or app.clients
    config = " ".join(f"{k}={v}" for k, v in app.config.items()) or "empty"
    rounds = asked.rounds or app.config.get(apps.ROUNDS) or "the app's own number of"
    console.line("app", f"{app.name}: {clients} clients, {rounds} rounds, seed {asked.seed}")
    console.line("run config", config)
    console.line("limit", f"{asked.limit} MB of arrays are kept"
                 + (f", and recorded in {asked.record}" if record else ""))  # fmt: skip

    def recording(about: About) -> Recording:
        assert record is not None
        return Recording(record, about, asked.limit * 10**6)

    settings = {"clients": clients, "rounds": asked.rounds or "the app's own", "seed": asked.seed,
                "run config": config, "limit": f"{asked.limit} MB of arrays"}  # fmt: skip

    def watch(mod: Mod | None) -> Seen:
        start = time.monotonic()
        with _unwritten(), _placed(asked.cwd):
            traffic, truths = tap.run(
                app, heard, clients=clients, rounds=asked.rounds, seed=asked.seed,
                limit=asked.limit * 10**6, patience=asked.patience,
                recording=recording if record and mod is None else None,
                progress=_progress(console), attacked=plan.rounds if plan else (), mod=mod,
            )  # fmt: skip
        took = time.monotonic() - start
        sent = sum(m.size for m in traffic.messages if m.up) / 1e6
        many = f"{traffic.rounds} rounds, {len(traffic.trained)} updates"
        seen = f"{many}, {len(traffic.messages)} messages, {sent:.1f} MB from clients"
        console.line("defended" if mod else "watched", f"{seen}, in {took:.1f} s")
        return Seen(traffic, truths, settings, given, watch)

    return watch(None)


def _progress(console: Console) -> Callable[[Message], None]:
    said, last = time.monotonic(), 0

    def told(message: Message) -> None:
        nonlocal said, last
        now = time.monotonic()
        if message.round > last and now - said > QUIET:
            console.line("", f"round {message.round}")
            said = now
        last = max(last, message.round)

    return told


@contextmanager
def _unwritten() -> Iterator[None]:
    """No bytecode beside the app's files."""
    was, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = was


@contextmanager
def _placed(folder: str | None) -> Iterator[None]:
    """Within it the app runs in `folder`, or in a scratch one: final models end up nowhere."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fedsec-", ignore_cleanup_errors=True) as scratch:
        try:
            os.chdir(folder or scratch)
        except OSError as error:
            raise Refused("cwd", f"must be a folder ({error.strerror})", folder) from None
        try:
            yield
        finally:
            os.chdir(before)


# ---------------------------------------------------------------- what it says


def _judged(
    asked: argparse.Namespace,
    seen: Seen,
    accepted: Sequence[Accepted],
    plan: Plan | None,
    console: Console,
    words: Sequence[str],
) -> Result:
    from fedsec.audit import findings, lint, mechanisms, outputs

    traffic, given = seen.traffic, seen.given
    found = [*lint.lint(traffic, given), *mechanisms.judged(traffic, _promise(asked))]
    leaks, remarks = _attacked(seen, plan, console)
    if plan is not None:
        from fedsec.audit import attacked

        found += attacked.findings(leaks, plan)
    said = [*traffic.notes, *_failed(traffic), *remarks]
    if asked.fail_above and plan is not None and not leaks and not _hidden(traffic, plan.rounds):
        said.append("error: fail-above: needs an attacked image, got none")
    marked, vain = findings.accepting(findings.ordered(found), accepted, date.today())
    return outputs.Result(
        traffic=traffic,
        findings=tuple(marked),
        structure=lint.structure_of(traffic, given),
        status=_ended(said),
        notes=(*said, *vain),
        command=shlex.join(["python", "-m", "fedsec.audit", *words]),
        settings=seen.settings,
        leaks=tuple(leaks),
    )


def _hidden(traffic: Traffic, rounds: Sequence[int]) -> bool:
    """Whether clients sent no update in clear, as with secure aggregation: nothing to attack."""
    trained = [t for t in traffic.trained if t.round in rounds]
    return bool(trained) and not any(t.reply.flat or t.reply.left_out for t in trained)


def _attacked(seen: Seen, plan: Plan | None, console: Console) -> tuple[list[dict], list[str]]:
    """What the attack makes of the updates, if one is asked for."""
    if plan is None:
        return [], []
    from fedsec.audit.attacked import attacked

    console.line("attack", f"{plan.name}, threat {plan.threat.name}, rounds "
                 f"{', '.join(map(str, plan.rounds))}, {plan.victims} updates of each")  # fmt: skip
    try:
        return attacked(seen.traffic, seen.truths, plan, lambda text: console.line("", text))
    except KeyboardInterrupt:
        return [], ["interrupted: the attack was left out"]


def _compared(
    asked: argparse.Namespace, seen: Seen, result: Result, plan: Plan | None, console: Console
) -> Result:
    """Beside what the app gives away and reaches, the same with a defense, which attacks know."""
    from fedsec.audit import lint, price
    from fedsec.mods import defend

    assert seen.again is not None
    defense = price.named(asked.defense, asked.words)
    mod = defend(defense, seed=asked.seed)
    after = seen.again(mod)
    knowing = replace(plan, defense=defense) if plan else None
    leaks, remarks = _attacked(after, knowing, console)
    more = [f"{note} [{asked.defense}]" for note in
            (*after.traffic.notes, *_failed(after.traffic), *remarks)]  # fmt: skip
    found = lint.lint(after.traffic, after.given)
    if knowing is not None:
        from fedsec.audit import attacked

        found += attacked.findings(leaks, knowing)
    before = [f for f in result.findings if not f.rule.id.startswith("dp-")]  # as `found`
    rows = (
        price.row("none", seen.traffic, before, result.leaks, None),
        price.row(asked.defense, after.traffic, found, leaks, defense),
    )
    notes = (*result.notes, *more)
    return replace(result, compared=rows, notes=notes, status=_ended(notes))


def _promise(asked: argparse.Namespace) -> Promise | None:
    from fedsec.audit.mechanisms import Promise

    given = promise(asked.claim)
    return Promise(*given) if given else None


def _given(asked: argparse.Namespace, folder: Path) -> Structure | None:
    """The structure of the network that the user names."""
    if not asked.model:
        return None
    from fedsec.audit.structure import of_module

    network = _named("model", asked.model, folder)
    try:
        return of_module(network()).within(folder)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        rule = f"must be a network that takes no arguments ({type(error).__name__}: {first})"
        raise Refused("model", rule, asked.model) from None


def _failed(traffic: Traffic) -> list[str]:
    """One line for each client that failed, and for an app that says nothing."""
    lines = []
    for message in traffic.failures:
        last = next(reversed(message.error.strip().splitlines()), "")
        lines.append(f"error: client {message.client}, {message.kind}, round {message.round}: "
                     f"{last}{_place(message.error)}")  # fmt: skip
    trained = traffic.trained
    if not trained and not lines and not any(n.startswith("error") for n in traffic.notes):
        lines.append("error: app: must train: no client was asked to")
    elif trained and not any(t.reply.flat or t.reply.left_out or t.reply.configs for t in trained):
        lines.append(f"error: clients: must send arrays, got none in {len(trained)} replies")
    return list(dict.fromkeys(lines))


def _place(trace: str) -> str:
    """The last line of the app's code in a traceback: file and line."""
    places = [x.strip() for x in trace.splitlines() if x.strip().startswith('File "')]
    if not places:
        return ""
    words = places[-1].split(", ")
    return f" ({words[0][6:-1]}:{words[1].removeprefix('line ')})"


def _ended(notes: Sequence[str]) -> str:
    if any(n.startswith("interrupted") for n in notes):
        return "interrupted"
    return "failed" if any(n.startswith("error") for n in notes) else "done"


def _show(result: Result, out: Path, console: Console) -> None:
    from fedsec.audit import outputs

    console.line("structure", _described(result))
    for claim in result.traffic.about.claims:
        own = ", ".join(f"{k} {v}" for k, v in claim.settings.items())
        console.line("mechanism", f"{claim.name} ({claim.kind}){': ' if own else ''}{own}")
    console.terminal.print()
    for finding in result.findings:
        _tell(finding, console)
    errors = [n for n in result.notes if n.startswith("error")]
    for note in result.notes:
        if note not in errors:
            console.line("note", note)
    accepted = len(result.findings) - len(result.open)
    more = f" ({accepted} more accepted)" if accepted else ""
    if result.leaks:
        console.line("images", _scores(result.leaks))
    for row in result.compared:
        said = ", ".join(f"{k} {v:,.6g}" for k, v in row.items() if isinstance(v, int | float))
        console.line("compared", f"defense {row['defense']}: {said}")
    console.line("found", outputs.counted(result.open) + more)
    if not result.findings:
        console.line("", "no rule found a leak; that is no proof that there is none")
    names = (outputs.JSON, outputs.SARIF, outputs.JUNIT, outputs.PAGE)
    console.line("wrote", f"{out}/   {'  '.join(names)}")
    sys.stdout.flush()
    for line in errors[:SHOWN]:
        console.trouble(line)
    if len(errors) > SHOWN:
        console.trouble(f"error: {len(errors) - SHOWN} more are in {out / outputs.JSON}")


def _scores(leaks: Sequence[dict[str, Any]]) -> str:
    keys = ("psnr", "worst_psnr", "null_psnr")
    chosen, worst, null = (sum(row[key] for row in leaks) / len(leaks) for key in keys)
    return (
        f"{len(leaks)} attacked: mean PSNR {worst:.1f} dB (higher = more leaked), {chosen:.1f} by "
        f"what an attacker chooses without the truth; without the update {null:.1f}"
    )


def _described(result: Result) -> str:
    layers, source = len(result.structure.layers), result.structure.source
    return f"{layers} layers, {source}" if layers else "unknown: no arrays were seen"


def _tell(finding: Finding, console: Console) -> None:
    mark = "accepted" if finding.accepted else finding.level
    console.line(mark, f"{finding.rule.title}  [{finding.id}]")
    for line in finding.evidence:
        console.line("", line)
    if finding.accepted:
        console.line("", f"accepted: {finding.accepted.reason}")
        return
    console.line("", f"gives away: {finding.rule.gets}")
    console.line("", f"fix: {finding.rule.fix}")
    console.terminal.print()


def _status(result: Result, asked: argparse.Namespace, console: Console) -> int:
    from fedsec.audit import outputs

    if result.status == "interrupted":
        return 130
    if result.status == "failed":
        return 2
    failing = outputs.failing(result, asked.fail_on)
    if failing:
        names = ", ".join(f.id for f in failing)
        console.trouble(f"gate: --fail-on {asked.fail_on}: {names}")
    above = [r for r in result.leaks if r["worst_psnr"] > most(asked.fail_above)]
    if above:
        console.trouble(f"gate: --fail-above {asked.fail_above}: {len(above)} images")
    return 3 if failing or above else 0


def _leave(status: int) -> NoReturn:
    """End the process, also where an app that hangs still has threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        _code = main()
    except Exception:
        traceback.print_exc()
        _code = 2
    _leave(_code)

"""Does a run keep the epsilon that it claims? `python -m fedsec.audit_dp defense=dpsgd`.

Takes the words of `python -m fedsec.run`, or the folder of a run, and audits the claim for the
client that is worst off: over all its steps, with its own sampler, through the defense's own code
(`fedsec.canaries`). Exit status: 0 the claim is not contradicted, 1 the input was wrong, 2 the
claim is contradicted, 3 the audit itself failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedsec import process

if __name__ == "__main__":
    process.enter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

from fedsec import records
from fedsec.checks import Refused, require
from fedsec.console import Console

if TYPE_CHECKING:
    from fedsec.canaries import Audit
    from fedsec.config import Settings
    from fedsec.defense import Privacy, Training

SHOWN = ("defense", "client", "data")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused("command line", f"must be as --help says ({message})")


def main(words: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = _Parser(
        prog="python -m fedsec.audit_dp",
        description="Audit the epsilon that a run claims, on the code that claims it.",
        epilog="exit status: 0 not contradicted, 1 wrong input, 2 contradicted, 3 failed",
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE",
                        help="as for python -m fedsec.run; or the FOLDER of one run")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, help="runs on fresh canaries, pooled")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the lower bound")
    parser.add_argument("--config-dir", metavar="FOLDER", help="more options, as for a run")
    try:
        return _audit(parser.parse_intermixed_args(words))
    except Refused as refusal:
        sys.stdout.flush()
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # after --help
        return 1 if stop.code else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 3


def _audit(asked: argparse.Namespace) -> int:
    console = Console()
    settings, recorded = _read(asked, console)
    import torch

    from fedsec.canaries import audit

    torch.set_num_threads(1)
    settings, claim, training, who = _claim(settings)
    console.line("", who)
    left = "claimed"
    for text in _proven(claim):
        console.line(left, text)
        left = ""
    if recorded is not None and recorded != (claim.epsilon, claim.delta):
        claim = replace(claim, epsilon=recorded[0], delta=recorded[1])
        said = f"epsilon {recorded[0]:.3g} at delta {recorded[1]:g} in run.json: this is audited"
        console.line("recorded", said)
    console.terminal.print()
    found = audit(
        settings.defense, settings.client, claim, training.steps // settings.client.local.steps,
        training.examples, seed=settings.values.seed, repeats=asked.repeats,
        confidence=asked.confidence,
    )  # fmt: skip
    left = "audited"
    for text in _seen(found):
        console.line(left, text)
        left = ""
    console.terminal.print()
    console.line("verdict", _verdict(found))
    return 2 if found.contradicts else 0


def _read(
    asked: argparse.Namespace, console: Console
) -> tuple[Settings, tuple[float, float] | None]:
    """The settings of the run, and epsilon and delta as its run.json has them, if it has one."""
    bare = [word for word in asked.words if "=" not in word]
    if not bare:
        from fedsec import run

        own = ["--config-dir", asked.config_dir] if asked.config_dir else []
        cfg, names = run.composed([*asked.words, *own])
        console.line("audit", " · ".join(f"{group} {names[group]}" for group in SHOWN))
        from fedsec import config

        process.listen()
        return config.settings(cfg, names), None
    alone = len(asked.words) == 1 and asked.config_dir is None
    require(alone, "command line", "must be key=value, or the folder of one run alone", bare[0])
    folder = Path(bare[0])
    require(folder.is_dir(), "folder", "must exist", folder)
    there = (folder / records.CONFIG).is_file()
    require(there, "folder", f"must be that of one run ({records.CONFIG})", folder)
    written = records.read(folder).run or {}
    console.line("audit", str(folder))
    from fedsec import config

    process.listen()
    names = dict.fromkeys(config.GROUPS, "") | written.get("choices", {})
    said = written.get("privacy") or {}
    epsilon, delta = said.get("epsilon"), said.get("delta")
    recorded = None if epsilon is None or delta is None else (float(epsilon), float(delta))
    return config.saved(folder / records.CONFIG, names), recorded


def _claim(settings: Settings) -> tuple[Settings, Privacy, Training, str]:
    """What the run claims for the client that is worst off, and who that is. Loads the data.

    The settings with the noise that a given epsilon takes come back with it.
    """
    from fedsec.defense import Privacy, weakest
    from fedsec.experiment import fitted, job_of
    from fedsec.federation import trained

    settings, shares, _ = fitted(settings, settings.data.load())
    held = trained(job_of(settings, "cpu", (), settings.defense), shares)
    claim, training = weakest(settings.defense, held)
    claim = claim or Privacy(None, None, None, reason="it makes no formal claim")
    if claim.epsilon is None or training is None:
        rule = f"must claim an epsilon to be audited, like defense=dpsgd ({claim.reason})"
        raise Refused("defense", rule, settings.names["defense"] or "none that does")
    rule = "claims epsilon for a whole client; the audit's canaries are examples: audit dpsgd"
    require(claim.unit == "example", "defense", rule, settings.names["defense"])
    who = (
        f"client {held.index(training)} of {len(held)}, the worst off: {training.examples} "
        f"examples, {training.batch} a batch, {training.steps} steps"
    )
    return settings, claim, training, who


def _proven(claim: Privacy) -> Iterator[str]:
    from fedsec.privacy import formal

    assert claim.epsilon is not None
    assert claim.delta is not None
    at = f" at delta {claim.delta:g}"
    if claim.mechanism is None:
        yield f"epsilon {claim.epsilon:.3g}{at}: {claim.accountant}"
        return
    for line in formal(claim.mechanism, claim.delta):
        if line.name.startswith("naming"):
            yield f"{line.name}: at most {100 * line.value:.3g} %: {line.how}"
        else:
            yield f"{line.name} {line.value:.4g}{at if line.name == 'epsilon' else ''}: {line.how}"


def _seen(found: Audit) -> Iterator[str]:
    for look in found.looks:
        yield (
            f"{look.place:<11} {look.right} of {look.made} guesses right on {look.canaries} "
            f"canaries: epsilon at least {look.epsilon:.2f}"
        )
    for place, why in found.refused:
        yield f"{place:<11} not trained: {why}"


def _verdict(found: Audit) -> str:
    assert found.claim.epsilon is not None
    lower = f"epsilon is at least {found.epsilon:.2f} at {100 * found.confidence:g} % confidence"
    if found.contradicts:
        return f"CONTRADICTED: {lower}, and {found.claim.epsilon:.3g} is claimed"
    said = f"not contradicted: {lower}, and {found.claim.epsilon:.3g} is claimed"
    if found.most < found.claim.epsilon:
        said += f"; so many canaries could show {found.most:.2f} at most (--repeats adds more)"
    return said


if __name__ == "__main__":
    process.leave(main())

"""`python -m fedsec.verify`: measure the suite's published numbers again, and say which hold.

    python -m fedsec.verify                          every attack, on the built-in photographs
    python -m fedsec.verify rgap spear               these attacks only
    python -m fedsec.verify --cifar10 cifar10.npz    the rows on CIFAR-10 too (MedMNIST's layout)
    python -m fedsec.verify --markdown               the table as the README has it

Exit status: 0 if every number that was measured holds, 1 if one does not or the input was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import pkgutil
import sys
import time
from collections.abc import Iterator, Sequence

if __name__ == "__main__":  # before torch loads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from fedsec import verify
from fedsec.checks import Refused, require
from fedsec.data import Dataset, Npz, Photos
from fedsec.verify.claim import Claim


def claims() -> Iterator[Claim]:
    """Every row of every module beside this one, in the order of their names."""
    for module in sorted(m.name for m in pkgutil.iter_modules(verify.__path__)):
        if module not in ("__main__", "claim"):
            yield from importlib.import_module(f"fedsec.verify.{module}").CLAIMS


def tolerance(claim: Claim) -> str:
    if math.isinf(claim.most):
        return f">= {claim.least:g} {claim.unit}"
    if math.isinf(claim.least):
        return f"<= {claim.most:g} {claim.unit}"
    return f"{claim.least:g} to {claim.most:g} {claim.unit}"


def judged(claim: Claim, data: dict[str, Dataset]) -> tuple[str, str]:
    """The measured number and the verdict, as text: `holds`, `FAILS` or `not run: ...`."""
    if claim.data not in data:
        return "", f"not run: needs --{claim.data} FILE.npz"
    try:
        value = claim.measure(data[claim.data])
    except Exception as error:  # a row that cannot be measured does not hold, and costs no other
        return "", f"FAILS: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return f"{value:.4g} {claim.unit}", "holds" if claim.least <= value <= claim.most else "FAILS"


def markdown(rows: Sequence[tuple[Claim, str, str]]) -> str:
    lines = ["| attack | paper | threat | setting | published | expected | measured |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for claim, measured, verdict in rows:
        said = measured if verdict == "holds" else f"{measured} {verdict}".strip()
        cells = (claim.attack, claim.paper, claim.threat, claim.setting, claim.published)
        lines.append("| " + " | ".join([*cells, tolerance(claim), said]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedsec.verify", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="default: all that have rows")
    parser.add_argument("--cifar10", metavar="FILE.npz")
    parser.add_argument("--markdown", action="store_true", help="end with a table in Markdown")
    options = parser.parse_args(argv)
    rows = list(claims())
    known = list(dict.fromkeys(claim.attack for claim in rows))
    try:
        for name in options.attacks:
            require(name in known, "attack", f"must be among {', '.join(known)}", name)
        data = {"photos": Photos().load()}
        if options.cifar10 is not None:
            data["cifar10"] = Npz(path=options.cifar10).load()
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    begun, done = time.perf_counter(), []
    try:
        for claim in rows:
            if options.attacks and claim.attack not in options.attacks:
                continue
            start = time.perf_counter()
            measured, verdict = judged(claim, data)
            done.append((claim, measured, verdict))
            print(f"{claim.attack:14} {claim.setting}")
            print(
                f"{'':14} {claim.threat} · {claim.paper} · published {claim.published}\n"
                f"{'':14} expected {tolerance(claim)}, measured {measured or 'nothing'}: {verdict}"
                f"   ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    except KeyboardInterrupt:
        return 130
    if options.markdown:
        print(f"\n{markdown(done)}\n")
    failed = sum(verdict.startswith("FAILS") for _, _, verdict in done)
    skipped = sum(verdict.startswith("not run") for _, _, verdict in done)
    held = len(done) - failed - skipped
    took = time.perf_counter() - begun
    print(f"{held} hold, {failed} fail, {skipped} were not run, in {took:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

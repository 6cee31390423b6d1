"""audit.html: a scorecard on top, evidence below; one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsec.audit import outputs
from fedsec.audit.claims import CENTRAL, CLIP, LOCAL, SECAGG
from fedsec.audit.findings import (
    MEMBERSHIP,
    NONE,
    POISONING,
    PROPERTY,
    RECONSTRUCTION,
    RULES,
    SEVERITIES,
    Finding,
)
from fedsec.audit.mechanisms import tensors

TEMPLATE = "audit.html"
CLASSES = {
    RECONSTRUCTION: "recover examples, or parts of them",
    MEMBERSHIP: "tell whether an example was used",
    PROPERTY: "learn facts about a client's data as a whole",
    POISONING: "harm the model or the machines of others",
}
CLAIMS = {
    LOCAL: "local differential privacy: each client adds noise before it sends",
    CENTRAL: "central differential privacy: the server adds noise to what it releases, and itself "
    "sees updates without it",
    CLIP: "clipping by the client",
    SECAGG: "secure aggregation: the server is to see sums only",
}


def page(result: outputs.Result) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedsec"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(_said(result))


def _said(result: outputs.Result) -> dict[str, Any]:
    about = result.traffic.about
    return {
        "app": about.app,
        "answer": answer(result),
        "score": [_row(attack, can, result.open) for attack, can in CLASSES.items()],
        "findings": result.findings,
        "sure": outputs.sure,
        "accepted": [f for f in result.findings if f.accepted],
        "changes": list(dict.fromkeys(f.rule.fix for f in result.open)),
        "notes": result.notes,
        "status": result.status,
        "claims": [(c.name, CLAIMS[c.kind], c.settings) for c in about.claims],
        "measured": tensors(result.traffic),
        "structure": result.structure,
        "summary": outputs.summary(result.traffic),
        "settings": result.settings,
        "leaks": result.leaks,
        "compared": result.compared,
        "passed": [r for r in RULES.values() if all(f.rule is not r for f in result.findings)],
        "versions": ", ".join(f"{k} {v}" for k, v in about.versions.items() if v),
        "command": result.command,
    }


def answer(result: outputs.Result) -> str:
    """The one sentence on top."""
    worst = max((f.rank for f in result.open), default=-1)
    name = result.traffic.about.app
    if result.status != "done":
        start = f"{name} did not run to its end; what was seen until then: "
    else:
        start = f"{name}: "
    if worst < 0:
        return start + "no rule of this audit found a leak. That is no proof that there is none."
    attacks = list(dict.fromkeys(f.rule.attack for f in result.open if f.rank == worst))
    severity = SEVERITIES[worst]
    allow = _listed([a for a in attacks if a != NONE])
    more = f"; the {severity} ones allow {allow}" if allow else ""
    return start + f"{outputs.counted(result.open)}{more}."


def _listed(words: Sequence[str]) -> str:
    if not words:
        return ""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _row(attack: str, can: str, findings: Sequence[Finding]) -> dict[str, Any]:
    own = [f for f in findings if f.rule.attack == attack]
    own.sort(key=lambda f: -f.rank)
    return {
        "attack": attack,
        "can": can,
        "level": own[0].level if own else "none found",
        "who": list(dict.fromkeys(f.rule.who for f in own)),
        "gets": list(dict.fromkeys(f.rule.gets for f in own)),
        "sure": list(dict.fromkeys(outputs.sure(f) for f in own)),
        "cost": list(dict.fromkeys(f.rule.cost for f in own)),
        "change": list(dict.fromkeys(f.rule.fix for f in own)),
    }

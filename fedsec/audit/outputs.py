"""What an audit leaves on the disk: findings as JSON, SARIF and JUnit, and a page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

from fedsec import __version__, records
from fedsec.audit.findings import RULES, SEVERITIES, SURE, Finding, Rule
from fedsec.audit.structure import Structure
from fedsec.audit.traffic import Traffic

JSON, SARIF, JUNIT, PAGE = "findings.json", "findings.sarif", "junit.xml", "audit.html"
FORMAT = "fedsec findings 1"
LEVELS = {"high": "error", "medium": "warning", "low": "note"}  # as SARIF calls them
SCORES = {"high": "8.0", "medium": "5.0", "low": "2.0"}  # GitHub's scale of security severity
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True)
class Result:
    """An audit that is over."""

    traffic: Traffic
    findings: tuple[Finding, ...]  # the worst first
    structure: Structure
    status: str  # done, failed or interrupted
    notes: tuple[str, ...]  # what went wrong, and what was accepted in vain
    command: str
    settings: dict[str, Any] = field(default_factory=dict)  # that decide what was seen
    leaks: tuple[dict[str, Any], ...] = ()  # of attacks: one for each image
    compared: tuple[dict[str, Any], ...] = ()  # without a defense, and with it

    @property
    def open(self) -> tuple[Finding, ...]:
        """Findings that nobody accepts."""
        return tuple(f for f in self.findings if f.accepted is None)


def failing(result: Result, severity: str | None) -> tuple[Finding, ...]:
    """Open findings at least as severe, which fail a gate."""
    if severity is None:
        return ()
    return tuple(f for f in result.open if f.rank >= SEVERITIES.index(severity))


def write(result: Result, out: Path, threshold: str | None) -> None:
    """All four files. Raises records.NotSaved."""
    from fedsec.audit.page import page

    texts = {
        JSON: _text(as_json(result)),
        SARIF: _text(as_sarif(result)),
        JUNIT: as_junit(result, threshold),
        PAGE: page(result),
    }
    for name, text in texts.items():
        records.write_whole(out / name, text.encode("utf-8", errors="replace"))


def _text(said: dict[str, Any]) -> str:
    return json.dumps(said, indent=2, allow_nan=False) + "\n"


def as_json(result: Result) -> dict[str, Any]:
    about = result.traffic.about
    return {
        "format": FORMAT,
        "app": about.app,
        "status": result.status,
        "findings": [_finding(f) for f in result.findings],
        "leaks": list(result.leaks),
        "compared": list(result.compared),
        "notes": list(result.notes),
        "settings": result.settings,
        "traffic": summary(result.traffic),
        "structure": {"source": result.structure.source, "model": result.structure.model,
                      "layers": [f"{x.name} {x.kind}" for x in result.structure.layers]},
        "claims": [{"kind": c.kind, "name": c.name, "settings": c.settings} for c in about.claims],
        "versions": about.versions,
        "commit": records.commit(),
        "command": result.command,
    }  # fmt: skip


def summary(traffic: Traffic) -> dict[str, int]:
    return {
        "messages": len(traffic.messages),
        "rounds": traffic.rounds,
        "clients": len({t.client for t in traffic.trained}),
        "updates": len(traffic.trained),
        "updates_read": len(traffic.whole),
        "bytes_sent_by_clients": sum(m.size for m in traffic.messages if m.up),
        "failures": len(traffic.failures),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    rule, accepted = finding.rule, finding.accepted
    return {
        "id": finding.id,
        "rule": rule.id,
        "severity": finding.level,
        "title": rule.title,
        "where": finding.where,
        "evidence": list(finding.evidence),
        "sure": finding.sure,
        "attack_class": rule.attack,
        "adversary": rule.who,
        "gets": rule.gets,
        "cost": rule.cost,
        "fix": rule.fix,
        "file": finding.file or None,
        "line": finding.line or None,
        "accepted": accepted and {"reason": accepted.reason,
                                  "until": accepted.until and accepted.until.isoformat()},
    }  # fmt: skip


# ---------------------------------------------------------------- SARIF 2.1.0


def as_sarif(result: Result) -> dict[str, Any]:
    used = list(dict.fromkeys(f.rule.id for f in result.findings))
    driver = {
        "name": "fedsec audit",
        "semanticVersion": __version__,
        "rules": [_sarif_rule(RULES[name]) for name in used],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_sarif_result(f, used.index(f.rule.id)) for f in result.findings],
        "invocations": [
            {
                "executionSuccessful": result.status == "done",
                "toolExecutionNotifications": [
                    {"level": "error" if n.startswith("error") else "warning",
                     "message": {"text": n}}
                    for n in result.notes
                ],
            }
        ],
    }  # fmt: skip
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.id.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": f"{rule.title}. An adversary gets {rule.gets}."},
        "help": {"text": f"Fix: {rule.fix}."},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {
            "security-severity": SCORES[rule.severity],
            "tags": ["security", "privacy", rule.attack],
        },
    }


def _sarif_result(finding: Finding, index: int) -> dict[str, Any]:
    said = f"{finding.rule.title}: {finding.where}. " + " ".join(f"{e}." for e in finding.evidence)
    location = {
        "physicalLocation": {
            "artifactLocation": {"uri": finding.file or "pyproject.toml"},
            "region": {"startLine": finding.line or 1},
        },
        "logicalLocations": [{"name": finding.where, "kind": "member"}],
    }
    entry = {
        "ruleId": finding.rule.id,
        "ruleIndex": index,
        "level": LEVELS[finding.level],
        "message": {"text": said},
        "locations": [location],
        "partialFingerprints": {"fedsecFindingId/v1": finding.id},
    }
    if finding.accepted:
        reason = finding.accepted.reason
        entry["suppressions"] = [{"kind": "external", "justification": reason}]
    return entry


# ---------------------------------------------------------------- JUnit


def as_junit(result: Result, threshold: str | None) -> str:
    """One test for each rule: it fails with the findings that fail the gate (any, without one)."""
    failed = failing(result, threshold or SEVERITIES[0])
    suite = xml.Element("testsuite", name="fedsec audit")
    for rule in RULES.values():
        case = xml.SubElement(suite, "testcase", classname=f"fedsec.{rule.severity}", name=rule.id)
        own = [f for f in result.findings if f.rule is rule]
        bad = [f for f in own if f in failed]
        if bad:
            text = "\n".join(f"{f.id}: {'; '.join(f.evidence)}\nfix: {rule.fix}" for f in bad)
            node = xml.SubElement(
                case, "failure", message=_printable(rule.title), type=rule.severity
            )
            node.text = _printable(text)
        elif own:
            said = (f"{f.id}: " + (f"accepted: {f.accepted.reason}" if f.accepted else f.level)
                    for f in own)  # fmt: skip
            xml.SubElement(case, "system-out").text = _printable("\n".join(said))
    if result.status != "done":
        case = xml.SubElement(suite, "testcase", classname="fedsec", name="the app ran")
        text = next((n for n in result.notes if n.startswith("error")), result.status)
        xml.SubElement(case, "error", message=_printable(text))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    xml.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + xml.tostring(suite, "unicode") + "\n"


def _printable(text: str) -> str:
    """XML takes no control characters, which an app's messages may hold."""
    return "".join(c if c in "\n\t" or c.isprintable() else "?" for c in text)


def sure(finding: Finding) -> str:
    return SURE[finding.sure]


def counted(findings: Sequence[Finding]) -> str:
    """`1 high, 2 medium`, or `no findings`."""
    each = [(s, sum(f.level == s for f in findings)) for s in reversed(SEVERITIES)]
    return ", ".join(f"{n} {s}" for s, n in each if n) or "no findings"

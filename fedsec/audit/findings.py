"""What an audit finds: each with a stable id, evidence, what an adversary gets, and the fix."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path

from fedsec.checks import Refused, require

SEVERITIES = ("low", "medium", "high")

# Attack classes of NIST AI 100-2 E2025, section 2.4 (privacy attacks), and beside them.
RECONSTRUCTION, MEMBERSHIP, PROPERTY = (
    "data reconstruction",
    "membership inference",
    "property inference",
)
POISONING = "poisoning and supply chain"
NONE = "no attack, a cost"
CERTIFIED, MEASURED, INFERRED = "certified", "measured", "inferred"
SURE = {
    CERTIFIED: "re-computed from what travelled",
    MEASURED: "measured on what travelled",
    INFERRED: "inferred from the model and the messages' form; not attacked",
}


@dataclass(frozen=True)
class Rule:
    """One kind of finding. Its id never changes its meaning."""

    id: str
    severity: str
    title: str
    attack: str  # class of attacks
    who: str  # adversary
    gets: str
    cost: str  # to the adversary
    fix: str


SERVER = "whoever sees single updates: the server, and the wire without TLS"

RULES = {
    rule.id: rule
    for rule in (
        Rule(
            "input-linear",
            "high",
            "A fully connected layer with a bias sees the input",
            RECONSTRUCTION,
            SERVER,
            "the inputs themselves, exactly, wherever one example alone drives a neuron",
            "one division for each neuron",
            "leave out this layer's bias, or put a convolution before it; or hide single updates "
            "by secure aggregation or user-level differential privacy",
        ),
        Rule(
            "last-bias",
            "medium",
            "The last layer's bias says how many examples of each class were used",
            PROPERTY,
            SERVER,
            "the label counts of a client's data",
            "reading one vector",
            "leave out the last layer's bias; or hide single updates by secure aggregation",
        ),
        Rule(
            "batchnorm-buffers",
            "medium",
            "BatchNorm's running statistics are sent",
            RECONSTRUCTION,
            SERVER,
            "mean and variance of every layer's inputs on private data, the strongest known help "
            "to a reconstruction; and the number of local steps",
            "reading vectors",
            "keep running statistics on the client (FedBN), or use GroupNorm",
        ),
        Rule(
            "sample-counts",
            "low",
            "Numbers of examples that differ between clients travel in clear",
            PROPERTY,
            SERVER,
            "how much data each client holds, and when that changes",
            "reading a number",
            "weigh clients alike (send 1), or round the counts up to a few classes",
        ),
        Rule(
            "training-loss",
            "medium",
            "Losses or accuracies on training data travel in clear",
            MEMBERSHIP,
            SERVER,
            "how well the model fits a client's own data: what membership inference thresholds",
            "reading a number",
            "do not send them, or only their sum over clients",
        ),
        Rule(
            "embedding-rows",
            "high",
            "Only the embedding rows of what a client holds change",
            RECONSTRUCTION,
            SERVER,
            "the set of words or items in the client's data",
            "looking for rows that are not zero",
            "freeze the embedding, or add noise to all rows; or hide single updates by secure "
            "aggregation",
        ),
        Rule(
            "position-embedding",
            "medium",
            "Position embeddings are trained",
            RECONSTRUCTION,
            SERVER,
            "the first block's input in closed form (APRIL), in an update of one example",
            "one linear system",
            "freeze them: fixed sines do as well",
        ),
        Rule(
            "few-images",
            "high",
            "An update is made of few examples",
            RECONSTRUCTION,
            SERVER,
            "the most favourable case for gradient inversion: recognisable inputs",
            "minutes of computation for each update",
            "train on more examples for each update: more local steps, and larger batches",
        ),
        Rule(
            "secagg-in-clear",
            "high",
            "Updates travel in clear although secure aggregation is switched on",
            RECONSTRUCTION,
            SERVER,
            "single updates, which secure aggregation was to hide",
            "nothing",
            "use secure aggregation on both sides: its mod in the ClientApp and its workflow in "
            "the ServerApp, and send nothing else",
        ),
        Rule(
            "optimiser-state",
            "medium",
            "More than the model is sent back",
            RECONSTRUCTION,
            SERVER,
            "a second view of the same data: momenta are averages of gradients",
            "reading arrays",
            "send the model's own arrays only",
        ),
        Rule(
            "frozen-weights",
            "low",
            "Weights that nobody changes travel back",
            NONE,
            "nobody",
            "nothing about the data; it costs bytes, and says which layers are frozen",
            "nothing",
            "send only what was trained",
        ),
        Rule(
            "pickled-object",
            "high",
            "A pickled object travels in a message",
            POISONING,
            "whoever can send a message",
            "code of their choice, run by whoever unpickles it",
            "one crafted message",
            "send arrays, numbers and strings only",
        ),
        Rule(
            "not-finite",
            "medium",
            "An update holds numbers that are not finite",
            POISONING,
            "any client",
            "the whole model: one such update makes every average NaN",
            "one message",
            "check updates before they are averaged, and drop those",
        ),
        Rule(
            "dp-scalar",
            "high",
            "Scalars escape differential privacy",
            MEMBERSHIP,
            SERVER,
            "0-dimensional tensors just as the client computed them, neither clipped nor noised: "
            "the claimed epsilon does not hold",
            "reading a number",
            "give these tensors one dimension (shape [1]); Flower's clipping and noise skip "
            "NumPy scalars",
        ),
        Rule(
            "dp-counter",
            "medium",
            "A counter that is not trained takes part in clipping",
            NONE,
            "nobody",
            "nothing; you lose accuracy: BatchNorm's counter dominates the norm, so that clipping "
            "shrinks everything else",
            "nothing",
            "keep num_batches_tracked out of the arrays that are sent, or use GroupNorm",
        ),
        Rule(
            "dp-noise",
            "high",
            "There is less noise than is claimed",
            MEMBERSHIP,
            SERVER,
            "tensors with less noise than the claimed epsilon needs",
            "reading arrays",
            "let the mechanism be the last mod that touches the update, and cover every tensor",
        ),
        Rule(
            "dp-sensitivity",
            "high",
            "The noise is for a smaller sensitivity than clipping leaves",
            MEMBERSHIP,
            SERVER,
            "more than the claimed epsilon gives: two clipped updates differ by up to twice the "
            "clipping norm",
            "a likelihood ratio",
            "set sensitivity to twice the clipping norm",
        ),
        Rule(
            "dp-formula",
            "medium",
            "The claimed epsilon is outside its formula's range",
            MEMBERSHIP,
            SERVER,
            "more than the claimed epsilon gives: the classical formula of the Gaussian mechanism "
            "is proven up to epsilon 1",
            "a likelihood ratio",
            "claim the epsilon of the exact formula, which the evidence names",
        ),
        Rule(
            "dp-composition",
            "high",
            "The claimed epsilon is that of one round",
            MEMBERSHIP,
            SERVER,
            "the guarantee of all rounds together, which is weaker: Flower's mod composes nothing",
            "seeing all rounds",
            "state the composed epsilon (--claim), or add noise for all rounds",
        ),
        Rule(
            "leaked-images",
            "high",
            "An attack reconstructed private images from what travelled",
            RECONSTRUCTION,
            SERVER,
            "recognisable private images",
            "the seconds that the evidence names",
            "hide single updates by secure aggregation or differential privacy, and audit again",
        ),
    )
}


@dataclass(frozen=True)
class Accepted:
    """Why somebody lives with a finding."""

    id: str  # of findings; * stands for anything
    reason: str
    until: date | None = None


@dataclass(frozen=True)
class Finding:
    """One finding about an app."""

    rule: Rule
    where: str  # tensor, record or mechanism
    evidence: tuple[str, ...]
    sure: str  # a key of SURE
    severity: str = ""  # another than the rule's
    file: str = ""  # of the app's code that it is about, from its folder on, and the line
    line: int = 0
    accepted: Accepted | None = None

    @property
    def id(self) -> str:
        """Stable over runs and machines: the rule, and where it holds."""
        return f"{self.rule.id}@{self.where}"

    @property
    def level(self) -> str:
        return self.severity or self.rule.severity

    @property
    def rank(self) -> int:
        return SEVERITIES.index(self.level)


def found(rule: str, where: str, evidence: Sequence[str], sure: str, severity: str = "") -> Finding:
    return Finding(RULES[rule], where, tuple(evidence), sure, severity)


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """The worst first; equals by the order of RULES."""
    order = list(RULES)
    return sorted(findings, key=lambda f: (-f.rank, order.index(f.rule.id), f.where))


def accepting(
    findings: Sequence[Finding], accepted: Sequence[Accepted], today: date
) -> tuple[list[Finding], list[str]]:
    """The findings with who accepts them, and remarks about what is accepted in vain."""
    valid = [a for a in accepted if a.until is None or today <= a.until]
    marked = [
        replace(f, accepted=next((a for a in valid if fnmatch.fnmatchcase(f.id, a.id)), None))
        for f in findings
    ]
    remarks = [f"{a.id}: accepted until {a.until}, which is over" for a in accepted
               if a not in valid]  # fmt: skip
    used = {id(f.accepted) for f in marked}
    remarks += [f"{a.id}: accepted, but not found any more" for a in valid if id(a) not in used]
    return marked, remarks


def read_accepted(path: Path) -> list[Accepted]:
    """`[[accept]]` tables of a TOML file: `id`, `reason`, and `until` (a date) if it is to end."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise Refused("accept", f"must be a TOML file that parses ({error})", path) from None
    rows = said.get("accept")
    require(isinstance(rows, list) and set(said) == {"accept"}, "accept",
            "must hold [[accept]] tables, and nothing else", path)  # fmt: skip
    return [_accepted(row) for row in rows or []]


def _accepted(row: object) -> Accepted:
    rule = "must hold id, reason, and until = 2027-01-31 if it is to end"
    known = isinstance(row, dict) and {"id", "reason"} <= set(row) <= {"id", "reason", "until"}
    if not isinstance(row, dict) or not known:
        raise Refused("accept", rule, row)
    name, reason, until = row["id"], row["reason"], row.get("until")
    known = isinstance(name, str) and name.partition("@")[0] in {*RULES, "*"}
    require(known, "accept.id", f"must begin with one of {', '.join(RULES)}", name)
    require("@" in name or name == "*", "accept.id", f"must say where, as {name}@*", name)
    spoken = isinstance(reason, str) and bool(reason.strip())
    require(spoken, "accept.reason", "must say why", reason)
    dated = until is None or (isinstance(until, date) and not isinstance(until, datetime))
    require(dated, "accept.until", "must be a date, as 2027-01-31 without quotes", repr(until))
    return Accepted(name, reason, until)

"""What a defense that is put into an app from outside changes: leakage, accuracy and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedsec.audit.findings import Finding
from fedsec.audit.traffic import Traffic
from fedsec.defense import Defense
from fedsec.types import Update


def named(names: str, words: Sequence[str]) -> Defense:
    """The defenses of these names, left to right, with overrides as a run takes them."""
    from fedsec import config, run

    own = [word for word in words if word.lstrip("+~").startswith("defense.")]
    chosen = f"defense=[{names}]" if "," in names else f"defense={names}"
    return config.settings(*run.composed([chosen, *own])).defense


def row(
    name: str,
    traffic: Traffic,
    findings: Sequence[Finding],
    leaks: Sequence[dict[str, Any]],
    defense: Defense | None,
) -> dict[str, Any]:
    """One line of the comparison; None where something was not measured."""
    scores = [leak["worst_psnr"] for leak in leaks]
    return {
        "defense": name,
        "findings": len(findings),
        "psnr": sum(scores) / len(scores) if scores else None,  # mean, dB; higher = more leaked
        "accuracy": accuracy(traffic),
        "bytes": sum(_bytes(t.change, defense or Defense()) for t in traffic.whole),
    }


def _bytes(change: dict[str, Any], defense: Defense) -> int:
    """Of an update in the defense's natural encoding, of 4 bytes a number where it has none."""
    tensors = {k: torch.from_numpy(v).float() for k, v in change.items()}
    return defense.bytes(Update(tensors, {}, 1))


def accuracy(traffic: Traffic) -> float | None:
    """Mean over clients of what they reply to the last round of evaluation, as they call it."""
    replies = [m for m in traffic.messages if m.up and m.kind.startswith("evaluate")]
    last = max((m.round for m in replies), default=0)
    said = [
        float(value)
        for m in replies
        if m.round == last
        for record in (*m.metrics.values(), *m.configs.values())
        for key, value in record.items()
        if "acc" in key and isinstance(value, int | float)
    ]
    return sum(said) / len(said) if said else None

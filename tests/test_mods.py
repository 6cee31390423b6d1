"""A defense as a client mod does to an app's update what it does in fedsec's own federation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from defenses.clip import Clip
from defenses.dpsgd import DPSGD
from defenses.noise import Noise
from defenses.prune import Prune
from fedsec.audit.__main__ import main
from fedsec.checks import Refused
from fedsec.defense import Compose
from fedsec.flower import arrays_of, name_this_process, tensors_of
from fedsec.mods import defend
from fedsec.rng import stream
from fedsec.types import Update

APPS = Path(__file__).parent / "apps"
BEFORE = {"w": torch.zeros(8, 5), "bn.running_mean": torch.zeros(3), "n": torch.tensor(3),
          "t": torch.tensor(0.5)}  # fmt: skip
AFTER = {"w": torch.randn(8, 5, generator=stream(0, "w")), "bn.running_mean": torch.ones(3),
         "n": torch.tensor(4), "t": torch.tensor(0.75)}  # fmt: skip
CHANGE = {name: BEFORE[name] - AFTER[name] for name in ("w", "t")}


def through(mod, kind: str = "train", group: str = "1"):
    """What a client's reply becomes."""
    name_this_process()
    asked = Message(RecordDict({"arrays": arrays_of(BEFORE)}), 7, kind, group_id=group)
    asked.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    content = RecordDict({"arrays": arrays_of(AFTER)})
    reply = mod(asked, context, lambda *_: Message(content, reply_to=asked))
    return tensors_of(reply.content.array_records["arrays"])


def test_the_change_is_defended_as_the_defense_defends_it():
    parts = Prune(ratio=0.5), Clip(norm=0.1)
    sent = through(defend(Compose(parts)))
    expected = Compose(parts).update(Update(CHANGE, {}, 1), stream(0, "any")).tensors
    for name, step in expected.items():
        torch.testing.assert_close(BEFORE[name] - sent[name], step)
    total = sum(float(((BEFORE[k] - sent[k]) ** 2).sum()) for k in CHANGE)
    assert total == pytest.approx(0.01, rel=1e-4)  # the 0-dimensional tensor within


def test_running_statistics_integers_and_evaluation_stay_as_they_are():
    sent = through(defend(Clip(norm=0.1)))
    for name in ("bn.running_mean", "n"):
        assert torch.equal(sent[name], AFTER[name])
    assert all(
        torch.equal(v, AFTER[k]) for k, v in through(defend(Clip(norm=0.1)), "evaluate").items()
    )


def test_draws_are_fresh_or_named_by_round():
    def noise(seed: int | None, group: str):
        return through(defend(Noise(std=1.0, distribution="gaussian"), seed), group=group)["w"]

    assert torch.equal(noise(1, "1"), noise(1, "1"))
    assert not torch.equal(noise(1, "1"), noise(1, "2"))
    assert not torch.equal(noise(None, "1"), noise(None, "1"))


def test_a_defense_that_does_more_than_change_updates_is_refused():
    with pytest.raises(Refused, match="must change updates alone; this one has gradients"):
        defend(DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-5))


def test_an_audit_compares_the_app_with_the_defense_and_without(tmp_path):
    out = tmp_path / "out"
    words = [str(APPS / "numpyclient"), "--attack", "linear", "--victims", "1"]
    more = ["--defense", "prune", "--set", "defense.ratio=0.99"]
    assert main([*words, *more, "--out", str(out)]) == 0
    none, pruned = json.loads((out / "findings.json").read_text())["compared"]
    assert (none["defense"], pruned["defense"]) == ("none", "prune")
    assert pruned["psnr"] < none["psnr"] - 3
    assert pruned["bytes"] < none["bytes"] / 5
    assert None not in (none["accuracy"], pruned["accuracy"])


def test_a_defense_of_batches_is_refused_before_the_app_runs(tmp_path, capsys):
    words = [str(APPS / "numpyclient"), "--defense", "mixup", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("error: defense: must change updates alone")

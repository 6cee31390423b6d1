"""An app's updates, attacked by fedsec's own attacks against what its clients trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsec.audit import attacked
from fedsec.audit.__main__ import main
from fedsec.audit.app import load
from fedsec.audit.claims import Heard
from fedsec.audit.tap import run
from fedsec.engine import simulate

APPS = Path(__file__).parent / "apps"
CHEAP = ["--attack", "linear"]
MECHANISM = {  # of localdp in one round; a defense around it may not explain its noise
    "dp-scalar@temperature",
    "dp-counter@bn1.num_batches_tracked",
    "dp-sensitivity@LocalDpMod",
}


def watched(name: str, *rounds: int):
    """What travelled in an app, and what its clients trained on in these rounds."""
    heard = Heard()
    with heard.listening():
        app = load(APPS / name, "", "", [], 0)
    limits = {"limit": 10**9, "patience": 60.0}
    return run(app, heard, clients=4, rounds=0, seed=0, attacked=rounds, **limits)


@pytest.mark.parametrize("name", ["numpyclient", "numpyclient_clean"])
def test_the_truth_that_was_heard_explains_the_update_that_travelled(name):
    """Of one step on one batch, and of four in their order."""
    traffic, truths = watched(name, 1)
    assert {(t.round, t.client) for t in truths} == {(1, c) for c in range(4)}
    span = attacked._range(truths)
    for truth in truths:
        (trained,) = (t for t in traffic.trained if (t.round, t.client) == (1, truth.client))
        exchange = attacked._exchange(trained, truth, span)
        again = simulate(exchange.model, exchange.batch.images, exchange.batch.targets,
                         exchange.local)  # fmt: skip
        for key, sent in exchange.update.tensors.items():
            torch.testing.assert_close(again[key].detach(), sent, rtol=1e-4, atol=1e-6)
            other = again[key].detach().roll(1)  # the negative control
            assert not torch.allclose(other, sent, rtol=1e-4, atol=1e-6)


def test_an_attack_scores_against_the_true_images_beside_the_nulls(tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(APPS / "numpyclient"), *CHEAP, "--victims", "1", "--attack-rounds", "1,2"]
    assert main([*words, "--out", str(out), "--fail-above", "psnr=15"]) == 3
    said = json.loads((out / "findings.json").read_text())
    assert {(r["round"], r["client"]) for r in said["leaks"]} == {(1, 0), (2, 0)}
    assert len(said["leaks"]) == 16
    mean = sum(r["psnr"] - r["null_psnr"] for r in said["leaks"]) / 16
    assert mean > 3
    assert "leaked-images@train" in {f["id"] for f in said["findings"]}
    assert "gate: --fail-above psnr=15" in capsys.readouterr().err


def test_a_recording_is_attacked_with_the_users_own_network_and_data(tmp_path, monkeypatch):
    record = str(tmp_path / "record")
    words = [str(APPS / "numpyclient"), *CHEAP, "--victims", "1"]
    assert main([*words, "--record", record, "--out", str(tmp_path / "live")]) == 0
    (tmp_path / "mine.py").write_text(
        "from numpyclient_mlp.task import Net, load_data\n"
        "def load_partition(client):\n"
        "    return load_data(client)[0].dataset.tensors\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(APPS / "numpyclient"))
    named = ["--model", "mine:Net", "--data", "mine:load_partition"]
    words = ["--replay", record, *named, *CHEAP, "--victims", "1"]
    assert main([*words, "--out", str(tmp_path / "later")]) == 0
    rows = [json.loads((tmp_path / each / "findings.json").read_text())["leaks"]
            for each in ("live", "later")]  # fmt: skip
    psnr = [sorted(r["psnr"] for r in each) for each in rows]
    assert psnr[1] == pytest.approx(psnr[0], abs=3)  # another order within the batch
    assert sum(psnr[1]) == pytest.approx(sum(psnr[0]), rel=0.1)


def test_what_noise_and_secure_aggregation_hide_is_not_attacked_in_vain(tmp_path):
    out = tmp_path / "out"
    gate = ["--fail-above", "psnr=20"]
    assert main([str(APPS / "secagg"), *CHEAP, *gate, "--out", str(out)]) == 0
    said = json.loads((out / "findings.json").read_text())
    assert said["leaks"] == []
    assert any("the update has to travel in clear" in note for note in said["notes"])


@pytest.mark.parametrize("more", [[], ["--attack-rounds", "9"]])
def test_a_gate_on_images_does_not_pass_where_none_could_be_attacked(more, tmp_path, capsys):
    app = "quickstart" if not more else "numpyclient"  # which linear refuses to attack
    words = [str(APPS / app), *CHEAP, *more, "--out", str(tmp_path / "out")]
    assert main([*words, "--fail-above", "psnr=20"]) == 2
    assert "error: fail-above: needs an attacked image, got none" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "findings.json").read_text())["findings"]


@pytest.mark.parametrize(
    ("attack", "cheap"),
    [
        ("inverting", "attack.steps=2"),
        pytest.param("auto", "attack.budget=20", marks=pytest.mark.slow),
    ],
)
def test_a_network_with_a_scalar_is_attacked_and_its_defense_compared(attack, cheap, tmp_path):
    out = tmp_path / "out"
    tries = ["--attack", attack, "--set", cheap, "--victims", "1", "--rounds", "1"]
    words = [str(APPS / "localdp"), *tries, "--defense", "prune"]
    # a process of its own: what other audits of one process leave behind is not its subject
    audit = [sys.executable, "-m", "fedsec.audit", *words, "--out", str(out)]
    subprocess.run(audit, check=True, capture_output=True)
    said = json.loads((out / "findings.json").read_text())
    assert said["leaks"]
    own = {f["id"] for f in said["findings"]} - {"leaked-images@train"}
    assert own == MECHANISM
    assert [row["findings"] for row in said["compared"]] == [0, 0]


def test_an_attack_that_breaks_loses_nothing_of_what_was_found(tmp_path, monkeypatch):
    def breaks(*_):
        raise IndexError("a network that this attack is not for")

    monkeypatch.setattr(attacked, "_one", breaks)
    out = tmp_path / "out"
    assert main([str(APPS / "numpyclient"), *CHEAP, "--out", str(out)]) == 0
    said = json.loads((out / "findings.json").read_text())
    assert "IndexError: a network that this attack is not for" in " ".join(said["notes"])
    assert said["findings"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--attack", "nothing"], "error: attack: must be among"),
        (["--attack", "imprint"], "error: threat: attack=imprint"),
        (["--attack", "auto", "--set", "attack.budget=-1"], "error: attack.budget: must be above"),
        (["--attack", "auto", "--threat", "informed"], "error: threat: must do without"),
        (["--attack", "auto", "--attack-rounds", "0"], "error: attack-rounds: must be"),
        (["--fail-above", "psnr=20"], "error: fail-above: needs --attack"),
        (["--attack", "auto", "--fail-above", "ssim=1"], "error: fail-above: must be psnr=DB"),
    ],
)
def test_wrong_words_are_refused_before_the_app_runs(words, error, tmp_path, capsys):
    assert main([str(APPS / "numpyclient"), *words, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_worst_case_over_attacks_is_no_better_than_one_of_them(tmp_path):
    scores = []
    for number, attack in enumerate((["linear"], ["auto", "--set", "attack.budget=1000"])):
        out = tmp_path / str(number)
        words = [str(APPS / "numpyclient"), "--attack", *attack, "--victims", "1"]
        assert main([*words, "--out", str(out)]) == 0
        rows = json.loads((out / "findings.json").read_text())["leaks"]
        scores.append([r["worst_psnr"] for r in rows])
    assert all(auto >= linear - 1e-6 for linear, auto in zip(*scores, strict=True))
    assert sum(scores[1]) > sum(scores[0])

"""Prices are paired by seed with none's, and say nothing that was not measured."""

import pytest
import tiny

from fedsec import price, records, stats
from fedsec.records import Row


def run(folder, defense, seed, accuracy, seconds=1.0, sent=1000.0, control=None, threat="t",
        more="", status="done"):  # fmt: skip
    """A run as price reads it; `control`: its own accuracy, seconds and bytes without a defense."""
    text = f"defense:\n  _target_: {defense}\n{more}threat:\n  name: {threat}\nrounds: 9\n"
    out = records.open_folder(folder, text)
    row = Row(run="r", attack="a", defense=defense, threat=threat, client="c", data="d", model="m",
              seed=seed, round=0, victim=0, image=0, batch=1, psnr=9.0)  # fmt: skip
    out.append([row])
    plain = control or (None, None, None)
    out.finish({
        "status": status, "choices": {"defense": defense},
        "utility": {"accuracy": accuracy, "control_accuracy": plain[0]},
        "cost": {"seconds_per_round": seconds, "sent_bytes": sent,
                 "control_seconds_per_round": plain[1], "control_sent_bytes": plain[2]},
    })  # fmt: skip


def told(capsys, *words):
    status = price.main([str(word) for word in words])
    said = capsys.readouterr()
    rows = [[w.strip() for w in line[1:-1].split("|")]
            for line in said.out.splitlines() if line.startswith("|")]  # fmt: skip
    return status, rows[2:], said


def test_defenses_are_paired_with_none_of_their_seed(tmp_path, capsys):
    accuracies = {"none": (0.6, 0.7, 0.5), "prune": (0.55, 0.6, 0.5)}
    for defense, each in accuracies.items():
        for seed, accuracy in enumerate(each):
            for threat in ("naive", "knowing"):  # the same training: counts once
                scale = 2.0 if defense == "prune" else 1.0
                slow = 10.0 if threat == "naive" else 0.0
                run(tmp_path / f"{defense}{seed}{threat}", defense, seed, accuracy,
                    scale + slow, 1000.0 / scale, threat=threat)  # fmt: skip
    run(tmp_path / "prune7", "prune", 7, 0.1, status="failed")
    status, (none, prune), said = told(capsys, tmp_path, "--markdown")
    assert status == 0
    assert "bytes" in said.out
    mean, low, high = stats.paired_difference([60, 70, 50], [55, 60, 50], [0, 1, 2])
    own = stats.bootstrap([55, 60, 50], [0, 1, 2])
    assert prune == [
        "prune", "3", f"{own[0]:.1f} [{own[1]:.1f}, {own[2]:.1f}]",
        f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", "2.000", "2.00", "500", "0.50",
    ]  # fmt: skip
    assert none[:2] == ["none", "3"]
    assert none[4] == "1.000"


def test_a_run_of_its_own_control_needs_no_other(tmp_path, capsys):
    run(tmp_path / "a", "prune", 0, 0.5, 3.0, 100.0, control=(0.6, 2.0, 400.0))
    _, (none, prune), _ = told(capsys, tmp_path, "--markdown")
    assert none == ["none", "1", "60.0", "", "2.000", "", "400", ""]
    assert prune == ["prune", "1", "50.0", "+10.0", "3.000", "1.50", "100", "0.25"]


def test_what_was_not_measured_is_empty_and_settings_are_told_apart(tmp_path, capsys):
    run(tmp_path / "a", "prune", 0, 0.5, None, None, more="  ratio: 0.9\n")
    run(tmp_path / "b", "prune", 0, 0.4, None, None, more="  ratio: 0.99\n")
    _, rows, said = told(capsys, tmp_path)
    assert rows == []
    lines = said.out.splitlines()
    assert lines[0].split() == ["defense", "seeds", "accuracy", "%"]
    assert [line.split() for line in lines[1:3]] == [
        ["prune", "·", "ratio", "0.9", "1", "50.0"],
        ["prune", "·", "ratio", "0.99", "1", "40.0"],
    ]


def test_nothing_to_price_is_one_line(tmp_path, capsys):
    status, _, said = told(capsys, tmp_path / "nowhere")
    assert (status, said.out) == (1, "")
    assert said.err.startswith("error: folder: must exist, got ")
    run(tmp_path / "a", "prune", 0, 0.5, status="interrupted")
    status, _, said = told(capsys, tmp_path)
    assert status == 1
    assert said.err.startswith("error: folder: must hold at least one finished run")


def test_a_real_run_says_what_a_round_costs(tmp_path, monkeypatch, capsys):
    assert tiny.call(monkeypatch, tiny.words(tmp_path, "defense=prune", "rounds=2")) == 0
    cost = tiny.whole(tmp_path / "out")["cost"]
    assert cost["seconds_per_round"] > 0
    assert cost["control_seconds_per_round"] > 0
    assert 0.1 < cost["sent_bytes"] / cost["control_sent_bytes"] < 0.2
    capsys.readouterr()
    status, rows, _ = told(capsys, tmp_path, "--markdown")
    assert status == 0
    assert [row[0] for row in rows] == ["none", "prune"]
    line = tiny.words(tmp_path, "defense=none", "rounds=0", out="none")
    assert tiny.call(monkeypatch, line) == 0
    found = tiny.whole(tmp_path / "none")
    assert found["cost"]["sent_bytes"] is None
    assert any(flag.startswith("seconds_per_round, ") for flag in found["flags"])


@pytest.mark.parametrize("word", ["--help", "--nothing"])
def test_the_command_line_ends_with_a_status(word, capsys):
    assert price.main([word, "x"] if word == "--nothing" else [word]) == (word == "--nothing")

"""The audit's command line: what it prints, what it refuses in one line, and how it ends."""

import json
import re
import subprocess
import sys

import pytest
import tiny
from omegaconf import OmegaConf

from fedsec import audit_dp, canaries
from fedsec.run import CONFIGS

WORDS = ("clients=2", "client.batch=8", "rounds=3", "images=2", "defense=dpsgd")

BROKEN = '''
from dataclasses import dataclass, replace

from defenses.dpsgd import DPSGD


@dataclass(frozen=True, kw_only=True)
class Forgetful(DPSGD):
    """Claims what DPSGD claims, and adds no noise."""

    def gradients(self, model, batch, rng, expected):
        plain = DPSGD(clip=self.clip, noise_multiplier=0.0, delta=self.delta)
        return plain.gradients(model, batch, rng, expected)
'''


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Audit in this process: (status, stdout in one line, stderr)."""
    monkeypatch.chdir(tmp_path)
    data = tiny.npz(tmp_path)

    def run(*words: str, named: bool = True) -> tuple[int, str, str]:
        capsys.readouterr()
        given = [*WORDS, "data=npz", f"data.path={data}", *words] if named else list(words)
        status = audit_dp.main(given)
        out, err = capsys.readouterr()
        return status, " ".join(out.split()), err

    return run


def test_an_honest_run_is_not_contradicted(ask):
    status, out, err = ask()
    assert (status, err) == (0, "")
    assert "client 0 of 2, the worst off: 40 examples, 8 a batch, 3 steps" in out
    for how in ("PRV (Gopi et al. 2021)", "Balle et al. 2020", "Mironov 2017", "Bu et al. 2020"):
        assert how in out
    assert re.search(r"vector \d+ of \d+ guesses right on 40 canaries: epsilon at least \d", out)
    assert "statistics not trained: model.norm: dpsgd clips" in out
    assert "verdict not contradicted: epsilon is at least 0" in out
    assert "could show" in out  # forty canaries are few


def test_local_steps_and_compositions_are_audited(ask):
    status, out, err = ask("client=fedavg", "client.steps=2", "--repeats", "2", "defense.clip=0.5")
    assert (status, err) == (0, "")
    assert "8 a batch, 6 steps" in out
    assert "on 80 canaries" in out
    status, out, err = ask("defense=[dpsgd,prune]", "defense.dpsgd.noise_multiplier=2")
    assert (status, err) == (0, "")
    assert "defense dpsgd+prune" in out


def broken(tmp_path, monkeypatch) -> tuple[str, ...]:
    (tmp_path / "forgetful.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine, or theirs/defense").mkdir(parents=True)
    text = (CONFIGS / "defense/dpsgd.yaml").read_text()
    text = text.replace("defenses.dpsgd.DPSGD", "forgetful.Forgetful")
    (tmp_path / "mine, or theirs/defense/theirs.yaml").write_text(text)
    return (
        "--config-dir", "mine, or theirs", "defense=theirs", "defense.noise_multiplier=30",
        "rounds=10", "client.batch=40", "clients=1", "--repeats", "4",
    )  # fmt: skip


def test_a_broken_defense_of_a_third_party_ends_with_status_2(ask, tmp_path, monkeypatch):
    status, out, err = ask(*broken(tmp_path, monkeypatch))
    assert (status, err) == (2, "")
    assert "verdict CONTRADICTED: epsilon is at least" in out


def test_the_folder_of_a_run_is_audited_by_what_it_says(ask, tmp_path, monkeypatch):
    line = tiny.words(tmp_path, "defense=dpsgd", "rounds=2", "images=2")
    assert tiny.call(monkeypatch, line) == 0
    folder = tmp_path / "out"
    status, out, err = ask(str(folder), named=False)
    assert (status, err) == (0, "")
    assert "recorded" not in out
    written = tiny.whole(folder)
    epsilon = written["privacy"]["epsilon"]
    assert f"epsilon {epsilon:.4g} at delta 1e-05: PRV" in out
    assert f"{epsilon:.3g} is claimed" in out
    (folder / "run.json").unlink()  # a run under way has a claim already
    assert ask(str(folder), named=False)[0] == 0
    written["privacy"]["epsilon"] = 0.01
    (folder / "run.json").write_text(json.dumps(written))
    text = OmegaConf.load(folder / "config.yaml")
    text.defense.noise_multiplier = 0.2
    OmegaConf.save(text, folder / "config.yaml")
    status, out, err = ask(str(folder), "--repeats", "3", named=False)
    assert (status, err) == (2, "")
    assert "recorded epsilon 0.01 at delta 1e-05 in run.json: this is audited" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("defense=none",), r"defense: must claim an epsilon .*like defense=dpsgd.*, got none"),
        (("defense.noise_multiplier=0",), r"defense: .*no noise: noise_multiplier is 0.*dpsgd"),
        (("defense.clip=-1",), r"defense.clip: must be above 0 and finite, got -1.0"),
        (("defense.nois=1",), r"defense.nois: no such key, got 1"),
        (("defense=nothing",), r"defense: must be among .*dpsgd.*, got nothing"),
        (("seed=0,1",), r"seed: takes one value; .*, got 0,1"),
        (("sweep=assumptions",), r"sweep: takes one run, got sweep=assumptions"),
        (("--repeats", "0"), r"repeats: must be at least 1, got 0"),
        (("--repeats", "x"), r"command line: must be as --help says .*--repeats.*"),
        (("--confidence", "1"), r"confidence: must be in \(0, 1\), got 1.0"),
        (("--config-dir", "none"), r"--config-dir: must be a folder, got none"),
        (("-m",), r"command line: must be as --help says .*-m.*"),
        (("rounds=-1",), r"rounds: must not be negative, got -1"),
        (("nowhere",), r"command line: must be key=value, or the folder of .*, got nowhere"),
    ],
)
def test_wrong_words_are_refused_in_one_line(ask, words, line):
    status, _, err = ask(*words)
    assert status == 1
    assert re.fullmatch(f"error: {line}\n", err), err


def test_wrong_folders_are_refused_in_one_line(ask, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.yaml").write_text("a: [")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("defense: 1")
    for folder, rule in (
        ("nowhere", "folder: must exist, got nowhere"),
        ("empty", "folder: must be that of one run .*, got empty"),
        ("odd", "odd/config.yaml: must be the config.yaml of a run .*"),
        ("other", "other/config.yaml: must be the config.yaml of a run; missing, got .*"),
    ):
        status, _, err = ask(folder, named=False)
        assert status == 1
        assert re.fullmatch(f"error: {rule}\n", err), err


def test_a_failure_of_the_audit_is_no_verdict(ask, monkeypatch):
    def fails(*_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(canaries, "observe", fails)
    status, out, err = ask()
    assert status == 3
    assert "verdict" not in out
    assert "the disk is on fire" in err


def test_as_a_command_it_ends_with_its_status(tmp_path, monkeypatch):
    words = [*WORDS, "data=npz", f"data.path={tiny.npz(tmp_path)}"]
    words += broken(tmp_path, monkeypatch)
    env = tiny.ENV | {"PYTHONPATH": f"{tiny.ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-m", "fedsec.audit_dp", *words], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "")
    assert "CONTRADICTED" in done.stdout

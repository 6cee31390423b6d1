"""`python -m fedsec.verify`: its rows, verdicts and exit statuses."""

from pathlib import Path

import pytest

from fedsec.data import Photos
from fedsec.run import CONFIGS
from fedsec.verify import __main__ as verify
from fedsec.verify.claim import Claim


def claim(**changed) -> Claim:
    row = {"attack": "inverting", "paper": "p", "threat": "honest_server", "setting": "s",
           "published": "none usable: made up", "unit": "dB", "measure": lambda images: 20.0,
           "least": 10.0}  # fmt: skip
    return Claim(**(row | changed))


def names(group: str) -> set[str]:
    return {path.stem for path in (CONFIGS / group).glob("*.yaml")}


def test_rows_name_attacks_and_threats_that_there_are():
    rows = list(verify.claims())
    assert len(rows) >= 10
    for row in rows:
        assert row.attack in names("attack"), row.setting
        assert row.threat in names("threat"), row.setting
        assert row.least > -float("inf") or row.most < float("inf"), "a row that cannot fail"
        assert row.paper
        assert row.published
        assert "|" not in row.setting + row.published + row.paper, "it ends in a table"


def test_every_attack_has_a_row():
    """A preset that differs from another by its values stands under the same class."""
    from omegaconf import OmegaConf

    def target(name: str) -> str:
        return str(OmegaConf.load(CONFIGS / f"attack/{name}.yaml")["_target_"])  # type: ignore[index]

    covered = {target(row.attack) for row in verify.claims()}
    missing = {name for name in names("attack") if target(name) not in covered}
    assert not missing


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"least": 20.5}, "FAILS"),
        ({"least": -1.0, "most": 19.0}, "FAILS"),
        ({"measure": lambda images: float("nan")}, "FAILS"),
        ({"measure": lambda images: 1 / 0}, "FAILS: ZeroDivisionError: division by zero"),
        ({"data": "cifar10"}, "not run: needs --cifar10 FILE.npz"),
    ],
)
def test_verdicts(changed, verdict):
    assert verify.judged(claim(**changed), {"photos": Photos().load()})[1] == verdict


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"least": 60.0}, ">= 60 dB"),
        ({"least": float("-inf"), "most": 5.0}, "<= 5 dB"),
        ({"least": 0.578, "most": 0.638}, "0.578 to 0.638 dB"),
    ],
)
def test_tolerances_are_said_as_they_are(bounds, said):
    assert verify.tolerance(claim(**bounds)) == said


def test_one_failing_row_fails_the_whole_and_costs_no_other(monkeypatch, capsys):
    rows = [claim(measure=lambda images: 1.0), claim(attack="dlg", data="cifar10"), claim()]
    monkeypatch.setattr(verify, "claims", lambda: iter(rows))
    assert verify.main(["--markdown"]) == 1
    out = capsys.readouterr().out
    assert "1 hold, 1 fail, 1 were not run" in out
    assert out.count("| inverting | p | honest_server | s | none usable: made up | >= 10 dB |") == 2
    assert "| 1 dB FAILS |" in out
    assert verify.main(["dlg"]) == 0, "what cannot be run does not fail"
    monkeypatch.setattr(verify, "claims", lambda: iter(rows[1:]))
    assert verify.main([]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "error: attack: must be among "),
        (["--cifar10", "/nowhere.npz"], "error: data.path: must be "),
    ],
)
def test_bad_words_are_refused_in_one_line(words, said, capsys):
    assert verify.main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_the_readme_says_how_to_run_it():
    assert "python -m fedsec.verify" in (Path(CONFIGS).parent / "README.md").read_text()

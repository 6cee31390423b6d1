"""An epsilon as a setting: the least noise that keeps it, and one line where none does."""

from __future__ import annotations

import pytest
import tiny

from defenses.dpsgd import DPSGD
from defenses.noise import Noise
from defenses.userdp import UserDP
from fedsec.checks import Refused
from fedsec.defense import Compose, Defense, Training, guarantees, weakest

LARGE = Training(steps=60, examples=400, batch=16, per_update=1, clients=4)
SMALL = Training(steps=60, examples=100, batch=16, per_update=1, clients=4)


def dpsgd(**fields) -> DPSGD:
    return DPSGD(**{"clip": 1.0, "noise_multiplier": None, "delta": 1e-5} | fields)


def userdp(**fields) -> UserDP:
    return UserDP(**{"clip": 1.0, "noise_multiplier": None, "delta": 1e-5} | fields)


def claimed(defense: Defense, *training: Training) -> float:
    claim, _ = weakest(defense, training)
    assert claim is not None
    assert claim.epsilon is not None
    return claim.epsilon


@pytest.mark.parametrize(
    "asked",
    [dpsgd(epsilon=4.0), userdp(epsilon=4.0, place="central"), userdp(epsilon=4.0, place="local")],
)
def test_the_claim_is_the_epsilon_that_was_asked_for_and_less_noise_breaks_it(asked):
    solved = asked.fitted([LARGE, SMALL])
    assert 3.95 < claimed(solved, LARGE, SMALL) <= 4.0
    assert solved.clip == asked.clip
    assert solved.epsilon is None
    less = type(asked)(**vars(solved) | {"noise_multiplier": 0.99 * solved.noise_multiplier})
    assert claimed(less, LARGE, SMALL) > 4.0


def test_noise_for_one_client_alone_breaks_the_promise_to_the_worst_off():
    """The broken twin: fitted to the client with the most data."""
    asked = dpsgd(epsilon=4.0)
    assert claimed(asked.fitted([LARGE]), LARGE, SMALL) > 4.5
    assert claimed(asked.fitted([SMALL]), LARGE, SMALL) <= 4.0


def test_noise_grows_with_the_rounds():
    few, many = (dpsgd(epsilon=4.0).fitted([Training(n, 400, 16)]) for n in (60, 240))
    assert many.sigma > 1.2 * few.sigma


def test_neither_given_is_the_usual_start_and_both_are_refused():
    assert dpsgd().fitted([LARGE]).sigma == 1.0
    assert userdp(place="central").fitted([LARGE]).sigma == 1.0
    for make in (dpsgd, lambda **fields: userdp(place="central", **fields)):
        with pytest.raises(Refused, match=r"^epsilon: must be null where noise_multiplier"):
            make(epsilon=8.0, noise_multiplier=1.0)
        for bad in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(Refused, match=r"^epsilon: must be above 0"):
                make(epsilon=bad)


def test_noise_that_was_not_solved_for_is_never_taken_for_the_usual_start():
    with pytest.raises(AssertionError, match="fitted"):
        dpsgd(epsilon=8.0).noise_std(16)


def test_in_a_list_each_part_is_fitted_and_refuses_under_its_own_key():
    noise = Noise(std=0.1, distribution="gaussian")
    fitted = Compose((noise, dpsgd(epsilon=4.0))).fitted([LARGE])
    assert isinstance(fitted, Compose)
    assert fitted.parts[0] is noise
    assert 3.95 < claimed(fitted, LARGE) <= 4.0
    with pytest.raises(Refused, match=r"^dpsgd\.epsilon: no noise reaches it"):
        Compose((noise, dpsgd(epsilon=1e-4))).fitted([LARGE])


@pytest.mark.slow
def test_a_run_finds_its_noise_and_says_it(tmp_path, monkeypatch, capsys):
    line = tiny.words(tmp_path, "defense=dpsgd", "defense.epsilon=8", "control=false")
    assert tiny.call(monkeypatch, line) == 0
    privacy = tiny.whole(tmp_path / "out")["privacy"]
    assert 7.9 < privacy["epsilon"] <= 8
    said = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("defense "))
    noise = privacy["mechanism"]["noise_multiplier"]
    assert f"dpsgd.noise_multiplier {noise:.4g}, the least for epsilon 8" in said


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        (("defense.epsilon=8", "defense.noise_multiplier=1"), "must be null where"),
        (("defense.epsilon=1e-4",), "no noise reaches it"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(more, rule, tmp_path, monkeypatch, capsys):
    assert tiny.call(monkeypatch, tiny.words(tmp_path, "defense=dpsgd", *more)) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"error: defense.epsilon: {rule}")
    assert not (tmp_path / "out").exists()


# Two claims of one run


def both(**user) -> Compose:
    fields = {"place": "local", "noise_multiplier": 4.0} | user
    return Compose((dpsgd(noise_multiplier=1.0), userdp(**fields)))


def test_each_unit_keeps_its_own_claim_and_its_own_worst_client():
    apart = guarantees(both(), [LARGE, SMALL])
    assert [claim.unit for claim in apart] == ["example", "client"]
    assert apart[0].epsilon == claimed(both().parts[0], SMALL)
    assert apart[1].epsilon == claimed(both().parts[1], LARGE)
    assert apart[0].epsilon != apart[1].epsilon


def test_a_claim_without_an_epsilon_comes_last_and_keeps_its_reason():
    first, last = guarantees(both(noise_multiplier=0.0), [LARGE])
    assert first.unit == "example"
    assert (last.unit, last.epsilon) == ("client", None)
    assert "noise_multiplier is 0" in last.reason
    assert guarantees(Compose((Noise(std=0.1, distribution="gaussian"),)), [LARGE]) == ()


@pytest.mark.slow
def test_a_run_reports_both_claims_everywhere(tmp_path, monkeypatch, capsys):
    parts = ("defense=[dpsgd,userdp]", "defense.userdp.place=local")
    assert tiny.call(monkeypatch, tiny.words(tmp_path, *parts, "control=false")) == 0
    folder, said = tmp_path / "out", capsys.readouterr().out
    privacy = tiny.whole(folder)["privacy"]
    also = privacy["also"][0]
    assert (privacy["unit"], also["unit"]) == ("example", "client")
    assert privacy["accountant"] == "PRV"
    assert also["accountant"] == "Gaussian"
    assert also["formal"]
    page = (folder / "report.html").read_text()
    for text in (said, page):
        assert f"{privacy['epsilon']:.3g} and {also['epsilon']:.3g}" in text
        assert "one example" in text
        assert "one client" in text
    line = next(row for row in said.splitlines() if row.startswith("federate") and "epsilon" in row)
    assert f"epsilon {privacy['epsilon']:.2f}" in line
    assert f"epsilon {also['epsilon']:.2f}" in line

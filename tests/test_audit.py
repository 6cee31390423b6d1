"""Other people's apps, unchanged: each has exactly the findings that it should have."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from flwr.app import Array

from fedsec.audit.__main__ import main
from fedsec.audit.traffic import About, Message, Recording, Values, replay
from fedsec.records import NotSaved

APPS = Path(__file__).parent / "apps"
EXPECTED = {
    "quickstart": {
        "last-bias@fc2",
        "batchnorm-buffers@bn1",
        "training-loss@train_loss",
        "sample-counts@num-examples",
    },
    "numpyclient": {"input-linear@fc1", "few-images@train", "last-bias@fc2"},
    "localdp": {
        "dp-scalar@temperature",
        "dp-counter@bn1.num_batches_tracked",
        "dp-sensitivity@LocalDpMod",
        "dp-composition@LocalDpMod",
    },
    "secagg": {"training-loss@train_loss", "sample-counts@num_examples"},
}
CLEAN = {name: ["--claim", "1.5,1e-5"] if name == "localdp" else [] for name in EXPECTED}


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def findings(out: Path) -> dict[str, dict]:
    said = json.loads((out / "findings.json").read_text())
    return {each["id"]: each for each in said["findings"]}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_app_has_exactly_its_findings_and_keeps_its_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(APPS / name)
    assert main([str(APPS / name), "--out", "out"]) == 0
    assert set(findings(tmp_path / "out")) == EXPECTED[name]
    assert files(APPS / name) == before
    assert set(files(tmp_path)) == {
        f"out/{file}" for file in ("findings.json", "findings.sarif", "junit.xml", "audit.html")
    }


def test_an_app_has_its_mechanisms_findings_however_often_a_process_audits_it(tmp_path):
    for turn in ("first", "second"):  # its modules are imported once
        assert main([str(APPS / "localdp"), "--out", str(tmp_path / turn)]) == 0
        assert set(findings(tmp_path / turn)) == EXPECTED["localdp"]


@pytest.mark.parametrize("name", EXPECTED)
def test_its_clean_twin_has_none(name, tmp_path):
    twin = APPS / f"{name}_clean"
    before = files(twin)
    assert main([str(twin), "--out", str(tmp_path / "out"), *CLEAN[name]]) == 0
    assert findings(tmp_path / "out") == {}
    assert files(twin) == before


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recording_gives_the_same_findings_without_the_app(name, tmp_path):
    live, later = tmp_path / "live", tmp_path / "later"
    record = ["--record", str(tmp_path / "record")]
    assert main([str(APPS / name), "--out", str(live), *record]) == 0
    assert main(["--replay", str(tmp_path / "record"), "--out", str(later)]) == 0
    assert findings(later) == findings(live)


# ---------------------------------------------------------------- apps that fail

FEDAVG = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
app = ServerApp()
@app.main()
def main(grid, context):
    arrays = ArrayRecord({"w": Array(np.zeros((3, 2), np.float32))})
    FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=arrays, num_rounds=2)
"""
CLIENT = """
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(msg, context):
    {does}
"""
SENDS = """
    arrays = ArrayRecord({{"w": Array(np.full((3, 2), {value}, np.float32))}})
    more = MetricRecord({{"num-examples": 1}})
    return Message(RecordDict({{"arrays": arrays, "metrics": more}}), reply_to=msg)
"""
BARE = "return Message(RecordDict({'metrics': MetricRecord({'num-examples': 1})}), reply_to=msg)"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes an app of a client's body and a server's file; its modules are forgotten again."""

    def write(name: str, does: str, server: str = FEDAVG) -> Path:
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        parts = (f'serverapp = "{name}.server:app"', f'clientapp = "{name}.client:app"')
        text = "\n".join(("[tool.flwr.app.components]", *parts))
        (folder / "pyproject.toml").write_text(f"[project]\nname = '{name}'\n{text}\n")
        (folder / name / "__init__.py").touch()
        (folder / name / "server.py").write_text(server)
        (folder / name / "client.py").write_text(CLIENT.format(does=does.strip()))
        return folder

    monkeypatch.setattr(sys, "path", list(sys.path))
    yield write
    for module in [m for m in sys.modules if m.startswith("bad_")]:
        del sys.modules[module]


FAILING = {
    "bad_crash": ("raise ValueError('no data')", "error: client 0, train, round 1: ValueError: "),
    "bad_silent": ("return None", "the ClientApp must reply with a Message, got None"),
    "bad_empty": (BARE, "error: clients: must send arrays, got none in 4 replies"),
    "bad_exit": ("raise SystemExit(3)", "error: serverapp: SystemExit: 3"),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_app_that_fails_is_one_clear_line_and_loses_nothing(name, written, tmp_path, capsys):
    does, line = FAILING[name]
    assert main([str(written(name, does)), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert any(line in each for each in errors)
    assert all(each.startswith("error: ") for each in errors)
    said = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert said["status"] == "failed"
    assert any(line in note for note in said["notes"])


def test_an_app_that_crashes_late_keeps_what_was_found(written, tmp_path):
    server = FEDAVG + "    raise RuntimeError('disk full')\n"
    folder = written("bad_late", SENDS.format(value="np.nan"), server)
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert set(findings(tmp_path / "out")) == {"not-finite@w"}


def test_numbers_that_are_not_finite_are_a_finding(written, tmp_path):
    folder = written("bad_nan", SENDS.format(value="np.nan"))
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert set(findings(tmp_path / "out")) == {"not-finite@w"}


def test_an_app_that_sends_nothing_says_so(written, tmp_path, capsys):
    server = FEDAVG[: FEDAVG.index("    arrays")] + "    pass\n"
    folder = written("bad_idle", "return None", server)
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: app: must train: no client was asked to\n"


def test_an_app_that_does_not_import_is_refused(written, tmp_path, capsys):
    folder = written("bad_import", "return None", "import no_such_module\n")
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 1
    error = "error: serverapp: must import (ModuleNotFoundError: No module named 'no_such_module'),"
    assert capsys.readouterr().err.startswith(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_app_that_never_replies_is_given_up(written, tmp_path):
    folder = written("bad_hang", "time.sleep(100)")
    words = [sys.executable, "-m", "fedsec.audit", str(folder), "--patience", "1"]
    done = subprocess.run([*words, "--out", str(tmp_path / "out")], capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == 2
    assert "within --patience, got nothing for 1 s" in done.stderr
    assert (tmp_path / "out" / "findings.json").exists()


def test_rounds_end_an_app_that_has_no_such_key(written, tmp_path):
    folder = written("bad_endless", SENDS.format(value="0.5"), FEDAVG.replace("=2)", "=10**6)"))
    assert main([str(folder), "--rounds", "3", "--out", str(tmp_path / "out")]) == 0
    said = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert said["traffic"]["rounds"] == 3


WRONG = {
    "folder": ["nowhere"],
    "run-config": [str(APPS / "quickstart"), "--run-config", "depth=3"],
    "rounds": [str(APPS / "quickstart"), "--rounds", "-1"],
    "claim": [str(APPS / "quickstart"), "--claim", "8"],
    "replay": ["--replay", "nowhere"],
    "accept": [str(APPS / "quickstart"), "--accept", "nowhere.toml"],
    "model": [str(APPS / "numpyclient"), "--model", "numpyclient_mlp.task:Missing"],
    "serverapp": [str(APPS / "quickstart"), "--server", "quickstart_pytorch.task:Net"],
    "command line": ["--fail-on", "never"],
    "seed": [str(APPS / "quickstart"), "--seed", "-1"],
    "set": [str(APPS / "quickstart"), "--set", "defense.ratio=0.9"],
    "defense": [str(APPS / "quickstart"), "--defense", ""],
    "fail-above": [str(APPS / "quickstart"), "--attack", "linear", "--fail-above", "psnr=nan"],
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_input_is_one_line(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*WRONG[key], "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--out", "file/out"], ["--model", "missing:Net"]])
def test_wrong_input_is_refused_before_the_app_runs(more, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ran = tmp_path / "ran"
    folder = written("bad_runs", f"__import__('pathlib').Path({str(ran)!r}).touch()")
    assert main([str(folder), "--out", "out"]) == 2
    assert ran.exists()  # else the next lines could not fail
    ran.unlink()
    assert main([str(folder), *([] if "--out" in more else ["--out", "other"]), *more]) == 1
    assert not ran.exists()
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {more[0][2:]}: ")


# ---------------------------------------------------------------- recordings that are damaged


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    words = [str(APPS / "numpyclient"), "--out", str(folder / "out")]
    assert main([*words, "--record", str(folder / "record")]) == 0
    return folder / "record"


@pytest.fixture
def copied(recorded, tmp_path):
    return Path(shutil.copytree(recorded, tmp_path / "record"))


def replayed(folder: Path, status: int) -> set[str]:
    """The findings of a recording whose replay ends with this status."""
    out = folder.parent / "replayed"
    assert main(["--replay", str(folder), "--out", str(out)]) == status
    return set(findings(out)) if out.exists() else set()


def test_a_recording_cut_short_is_judged_by_what_is_left(copied, capsys):
    messages = copied / "messages.jsonl"
    text = messages.read_bytes()
    messages.write_bytes(text[: len(text) * 2 // 3])
    assert replayed(copied, 2) == EXPECTED["numpyclient"]
    errors = capsys.readouterr().err
    assert "error: recording: messages.jsonl line" in errors
    assert "error: recording: holds" in errors


def test_a_recording_whose_run_was_killed_can_be_replayed(copied, capsys):
    header = copied / "recording.json"
    header.write_text(header.read_text().replace('"status": "whole"', '"status": "open"'))
    assert replayed(copied, 2) == EXPECTED["numpyclient"]
    assert "cut short, its run was ended before it was done" in capsys.readouterr().err


FORGED = {
    "number": "a", "round": None, "about": [1], "kind": 5, "size": "x", "metrics": {"m": 5},
    "watched": {"batches": ["a"]}, "arrays": {"arrays": {"file": "a\0b", "names": {"w": "0"}}},
}  # fmt: skip


def forge(folder: Path, **values) -> None:
    """Replaces these values in every message, and mends the checksums."""
    path = folder / "messages.jsonl"
    lines = []
    for line in path.read_text().splitlines():
        said = json.loads(line)["message"] | values
        text = json.dumps(said)
        row = {"message": said, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


@pytest.mark.parametrize("key", FORGED)
def test_forged_messages_are_left_out(key, copied, capsys):
    forge(copied)
    assert replayed(copied, 0) == EXPECTED["numpyclient"]  # mended checksums hold
    shutil.rmtree(copied.parent / "replayed")
    forge(copied, **{key: FORGED[key]})
    assert replayed(copied, 2) == set()
    assert "error: recording: message" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["x", {"layers": 5}, {"layers": [{"name": 1}]}])
def test_a_forged_header_is_refused(value, copied, capsys):
    header = json.loads((copied / "recording.json").read_text())
    header["about"]["structure"] = value
    (copied / "recording.json").write_text(json.dumps(header))
    assert replayed(copied, 1) == set()
    (copied / "recording.json").write_text("[" * 100_000)
    assert replayed(copied, 1) == set()
    assert capsys.readouterr().err.count("error: replay: ") == 2


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))  # type: ignore[attr-defined]


@pytest.mark.parametrize("renamed", [False, True])
def test_pickles_in_a_recording_are_never_executed(copied, renamed, tmp_path, capsys):
    evil = Evil()
    evil.path = str(tmp_path / "executed")  # type: ignore[attr-defined]
    content = pickle.dumps(evil)
    paths = sorted((copied / "arrays").iterdir())
    for path in paths:
        path.write_bytes(content)
    if renamed:  # so that every checksum holds
        name = hashlib.sha256(content).hexdigest()
        (copied / "arrays" / f"{name}.safetensors").write_bytes(content)
        rows = [json.loads(line) for line in (copied / "messages.jsonl").read_text().splitlines()]
        for row in rows:
            for record in row["message"]["arrays"].values():
                record["file"] = f"{name}.safetensors"
            text = json.dumps(row["message"])
            row["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (copied / "messages.jsonl").write_text(lines)
    replayed(copied, 2)
    said = "holds no arrays" if renamed else "is not what was recorded"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    pickle.loads(content)  # the positive control: it would have
    assert (tmp_path / "executed").exists()


def test_a_forged_line_is_left_out(copied, capsys):
    messages = copied / "messages.jsonl"
    messages.write_text(messages.read_text().replace('"num_examples": 8', '"num_examples": 9'))
    replayed(copied, 2)
    assert "is damaged; it is left out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "another 1"}'])
def test_what_is_no_recording_is_refused(copied, text, capsys):
    (copied / "recording.json").write_text(text)
    assert replayed(copied, 1) == set()
    assert capsys.readouterr().err.startswith("error: replay: must ")


def test_a_full_disk_ends_the_recording_and_not_the_audit(tmp_path, monkeypatch, capsys):
    add = Recording.add

    def fails(self, message):
        if message.number == 9:
            raise NotSaved("no space left on device")
        add(self, message)

    monkeypatch.setattr(Recording, "add", fails)
    words = [str(APPS / "numpyclient"), "--out", str(tmp_path / "out")]
    assert main([*words, "--record", str(tmp_path / "record")]) == 2
    assert "error: the recording ends here: no space left" in capsys.readouterr().err
    assert set(findings(tmp_path / "out")) == EXPECTED["numpyclient"]
    assert len((tmp_path / "record" / "messages.jsonl").read_text().splitlines()) == 9


def test_a_recording_keeps_to_its_limit(tmp_path):
    about = About("app", 1, {}, {})
    recording = Recording(tmp_path / "record", about, limit=1000)
    for number in range(3):
        record: dict[str, Values] = {"w": Array(np.full(200, number, np.float32))}
        message = Message(number, False, "train", 1, 0, None, {"arrays": record}, {}, {})
        recording.add(message)
    recording.finish(about)
    size = sum(path.stat().st_size for path in (tmp_path / "record" / "arrays").iterdir())
    assert 800 <= size <= 1000
    traffic = replay(tmp_path / "record")
    assert [m.left_out for m in traffic.messages] == [False, True, True]
    assert traffic.notes == (
        "the recording reached its limit: later messages are without their arrays",
    )


# ---------------------------------------------------------------- the gate and the files


def test_the_gate_fails_from_its_severity_on(recorded, tmp_path, capsys):
    words = ["--replay", str(recorded), "--out"]
    assert main([*words, str(tmp_path / "1"), "--fail-on", "high"]) == 3
    assert "gate: --fail-on high: input-linear@fc1, few-images@train" in capsys.readouterr().err
    tree = ElementTree.parse(tmp_path / "1" / "junit.xml").getroot()
    assert {case.get("name") for case in tree if case.find("failure") is not None} == {
        "input-linear",
        "few-images",
    }
    accept = tmp_path / "accept.toml"
    rows = [
        '[[accept]]\nid = "input-linear@*"\nreason = "data is public"',
        '[[accept]]\nid = "few-images@train"\nreason = "so few"\nuntil = 2100-01-01',
    ]
    accept.write_text("\n".join(rows))
    more = ["--fail-on", "high", "--accept", str(accept)]
    assert main([*words, str(tmp_path / "2"), *more]) == 0
    assert findings(tmp_path / "2")["few-images@train"]["accepted"]["reason"] == "so few"
    assert main([*words, str(tmp_path / "3"), "--fail-on", "medium", *more[2:]]) == 3
    accept.write_text("\n".join(rows).replace("2100", "2000"))
    assert main([*words, str(tmp_path / "4"), *more]) == 3
    assert "few-images@train: accepted until 2000-01-01, which is over" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["[", "accept = 1", "[[accept]]\nid = 'last-bias@fc'", "[[accept]]\nid='nothing'\nreason='x'",
     "[[accept]]\nid='last-bias@*'\nreason=' '",
     "[[accept]]\nid='last-bias@*'\nreason='x'\nuntil=1", "[[accept]]\nid='last-bias'\nreason='x'"],
)  # fmt: skip
def test_a_wrong_list_of_accepted_findings_is_refused(text, recorded, tmp_path, capsys):
    (tmp_path / "accept.toml").write_text(text)
    words = ["--replay", str(recorded), "--accept", str(tmp_path / "accept.toml")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: accept")


def test_sarif_names_rules_places_and_stable_fingerprints(tmp_path):
    out = tmp_path / "out"
    assert main([str(APPS / "numpyclient"), "--out", str(out)]) == 0
    said = json.loads((out / "findings.sarif").read_text())
    assert said["version"] == "2.1.0"
    (run,) = said["runs"]
    rules = run["tool"]["driver"]["rules"]
    for each in run["results"]:
        assert rules[each["ruleIndex"]]["id"] == each["ruleId"]
        place = each["locations"][0]["physicalLocation"]
        file = APPS / "numpyclient" / place["artifactLocation"]["uri"]
        assert file.is_file()
        if each["ruleId"] == "input-linear":  # the network's own line
            line = file.read_text().splitlines()[place["region"]["startLine"] - 1]
            assert line.startswith("class Net")
    prints = {each["partialFingerprints"]["fedsecFindingId/v1"] for each in run["results"]}
    assert prints == EXPECTED["numpyclient"]


def test_the_page_stands_alone_and_escapes_what_an_app_says(written, tmp_path):
    folder = written("bad_page", "raise ValueError('<script>alert(1)</script>')")
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "http" not in page
    for word in ("Data reconstruction", "Membership inference", "Property inference", "legal"):
        assert word in page

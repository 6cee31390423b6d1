"""Other people's apps, unchanged: each has exactly the findings that it should have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fedsec.audit.__main__ import main

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

"""The main job, `make run`, on real images: what it must show. Slow: a minute and a half."""

import json

import pytest

from fedsec.run import main


@pytest.mark.slow
def test_the_main_job_shows_what_it_must(tmp_path, monkeypatch):
    """The control leaks by 3 dB and more, dpsgd does not, and the accuracy it costs means much."""
    monkeypatch.chdir(tmp_path)
    assert main(["attack=inverting", "defense=dpsgd", "out=job"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "job/records.jsonl").read_text().splitlines()]
    run = json.loads((tmp_path / "job/run.json").read_text())

    def mean(defense: str) -> float:
        psnr = [row["psnr"] for row in rows if row["defense"] == defense]
        return sum(psnr) / len(psnr)

    best_null = max(run["nulls"].values())
    assert mean("none") >= best_null + 3
    assert mean("dpsgd") <= best_null
    assert run["utility"]["control_accuracy"] >= 0.5
    assert run["utility"]["accuracy_loss"] > 0.05
    assert 0 < run["privacy"]["epsilon"] < 10
    assert (tmp_path / "job/report.html").exists()

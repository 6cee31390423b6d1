"""Cells of a sweep in other processes: the same rows as in one, and what a sweep shows of them."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import tiny

from fedsec import cells, launch, status

WORDS = ("-m", "attack=inverting,idlg", "control=false", "seed=0,1", "store=auto")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


# ---- the sweep's plan


def plan(sweep: Path, task: list[str], params: str = "{}") -> Path:
    sweep.mkdir(exist_ok=True)
    text = f"hydra:\n  sweeper:\n    params: {params}\n  overrides:\n    task: {json.dumps(task)}\n"
    (sweep / cells.PLAN).write_text(text)
    return sweep


def test_the_plan_names_every_cell_as_hydra_numbers_them(tmp_path):
    sweep = plan(
        tmp_path, ["attack=a,b", "rounds=2", "seed=range(0,2)"], "{seed: 7, images: '1,2'}"
    )
    assert cells.planned(sweep) == [
        f"seed={seed} images={images} attack={attack}"
        for seed in (0, 1)
        for images in (1, 2)
        for attack in ("a", "b")
    ]
    (tmp_path / cells.PLAN).write_text("hydra: {sweeper: ")
    assert cells.planned(sweep) == []
    assert cells.planned(tmp_path / "none") == []


def cell(sweep: Path, name: str, began: float, run: dict | None = None, took: float = 0) -> Path:
    folder = sweep / name
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    os.utime(folder / "config.yaml", (began, began))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
        os.utime(folder / "run.json", (began + took, began + took))
    return folder


def test_the_status_has_a_line_for_each_cell(tmp_path, capsys):
    sweep, now = plan(tmp_path / "out", ["attack=a,b,c,d,e"]), time.time()
    cell(sweep, "000-a-none-0", now - 900, {"status": "done", "reused": {"none": True}}, took=600)
    failed = {"status": "failed", "flags": ["failed: OSError: no"]}
    cell(sweep, "001-b-none-0", now - 900, failed, took=60)
    held = cell(sweep, "002-c-none-0", now - 300)
    (sweep / cells.LOGS).mkdir()
    cells.log(held).write_text("x\nattack       none  1/2 images  2 min left\n")
    with open(held / "config.yaml", "rb") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        said = status.lines(cells.every(sweep), now)
    since = time.strftime("%H:%M:%S", time.localtime(now - 300))
    assert said == [
        "done         000-a-none-0  10 min  reused none",
        "failed       001-b-none-0  60 s  OSError: no",
        f"running      002-c-none-0  since {since} (5 min)  attack none 1/2 images 2 min left",
        "not started  003  attack=d",
        "not started  004  attack=e",
        "sweep        5 cells: 2 not started, 1 done, 1 running, 1 failed; about 25 min left",
    ]
    assert status.main([str(sweep)]) == 0
    assert "not done     002-c-none-0" in capsys.readouterr().out
    assert status.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: folder: must exist, got ")


def test_only_what_changes_is_said_again(tmp_path):
    sweep = plan(tmp_path, ["attack=a,b"])
    before = {c.folder: c for c in cells.every(sweep)}
    cell(sweep, "000-a-none-0", 0.0, {"status": "done"}, took=10)
    found = cells.every(sweep, before)
    assert status.changes(before, found, 0.0) == ["done         000-a-none-0  10 s"]
    assert status.changes({c.folder: c for c in found}, found, 0.0) == []


# ---- what a worker sets up


def test_a_worker_prints_to_the_cells_log(tmp_path, capsys, monkeypatch):
    for said, where in ((launch.here(), "here"), ("elsewhere:1", "log")):
        monkeypatch.setenv(launch.COMMAND, said)
        with launch.job(tmp_path / "000-a"):
            print(f"to the {where}")
            print("error", file=sys.stderr)
    assert capsys.readouterr() == ("to the here\n", "error\n")
    assert cells.log(tmp_path / "000-a").read_text() == "to the log\nerror\n"


def test_workers_of_joblib_share_the_gpus(monkeypatch):
    import multiprocessing

    def seen(worker: str, gpus: str) -> str:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.setattr(multiprocessing.current_process(), "name", worker)
        launch.spread.__wrapped__()
        return os.environ["CUDA_VISIBLE_DEVICES"]

    names = ["LokyProcess-1", "LokyProcess-2", "LokyProcess-3", "MainProcess"]
    assert [seen(name, "4,7") for name in names] == ["4", "7", "4", "4,7"]
    assert seen("LokyProcess-2", "3") == "3"


# ---- whole sweeps


def swept(folder: Path, *more: str, out: str) -> tuple[int, str, str]:
    line = tiny.words(folder, *WORDS, *more, out=out)
    child = tiny.spawn(line, folder)
    said, trouble = child.communicate(timeout=500)
    return child.returncode, said, trouble


def numbers(sweep: Path) -> dict[str, list[dict]]:
    return {each.folder.name: tiny.numbers(each.folder) for each in cells.find(sweep)}


def survives_a_failure(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """One cell cannot start; the others finish, and the same command then finishes it too."""
    blocked = tmp_path / "out/001-inverting-none-1"
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("mine")
    code, said, trouble = swept(tmp_path, *launcher, out="out")
    assert (code, trouble) == (2, "")
    assert "4 cells: 3 done, 1 not done" in said
    assert cells.log(tmp_path / "out/000-inverting-none-0").exists()
    (blocked / "notes.txt").unlink()
    code, said, trouble = swept(tmp_path, *launcher, out="out")
    assert (code, trouble) == (0, "")
    assert "sweep        4 cells: 4 done; 3 were done before" in said
    assert swept(tmp_path, out="serial")[0] == 0
    assert len(numbers(tmp_path / "serial")) == 4
    assert numbers(tmp_path / "out") == numbers(tmp_path / "serial")


@pytest.mark.slow
def test_joblib_gives_what_one_process_gives(tmp_path):
    survives_a_failure(tmp_path, JOBLIB)


@pytest.mark.slow
def test_submitit_gives_what_one_process_gives(tmp_path):
    survives_a_failure(tmp_path, ("hydra/launcher=submitit_local",))


@pytest.mark.slow
def test_what_all_workers_refuse_is_one_line_each_and_leaves_nothing(tmp_path):
    code, _, trouble = swept(tmp_path, *JOBLIB, "images=9999", out="out")
    assert code == 1
    assert trouble.count("error: images: the clients hold ") == trouble.count("\n") == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_slurm_the_launcher_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ENV, "PATH", str(Path(sys.executable).parent))
    code, _, trouble = swept(tmp_path, "hydra/launcher=slurm", out="out")
    rule = "error: hydra/launcher: needs Slurm's sbatch and srun, got slurm\n"
    assert (code, trouble) == (1, rule)

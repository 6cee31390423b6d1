"""A sweep that ends at any moment goes on by the same command: nothing is lost, nothing twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from fedsec import cells, engine, experiment, records, resume, run

GRID = (
    "-m",
    "attack=inverting,inverting_signed",
    "defense=prune",
    "rounds=2",
    "images=2",
    "stack=1",
)
SWEEP = (*GRID, "control=false", "clients=2", "client.batch=4", "attack.steps=8", "store=auto")


ONE = "attack=inverting"


@pytest.fixture(autouse=True)
def _at_every_look(monkeypatch):
    monkeypatch.setattr(engine, "EVERY", 4)
    monkeypatch.setattr(resume, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.npz(tmp_path_factory.mktemp("data"))


@pytest.fixture
def words(data, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A small sweep into `out`; words that are given replace its own."""
    monkeypatch.chdir(tmp_path)

    def line(*more: str, out: str = "out") -> list[str]:
        given = {word.partition("=")[0] for word in more}
        kept = [word for word in SWEEP if word.partition("=")[0] not in given]
        return [*kept, "data=npz", f"data.path={data}", f"out={out}", *more]

    return line


@pytest.fixture
def go(words, monkeypatch, capsys):
    """Run the sweep in this process: (status, lines of stdout, stderr)."""

    def ran(*more: str, out: str = "out") -> tuple[int, list[str], str]:
        capsys.readouterr()
        status = tiny.call(monkeypatch, words(*more, out=out))
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return ran


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> list:
    """The sweep without an interruption, once some test has run it: its folder and its seconds."""
    return [tmp_path_factory.mktemp("first") / "out", 0.0]


@pytest.fixture
def done(go, first, tmp_path) -> float:
    """The sweep as it is when it was not interrupted, in `out`; the seconds that it takes."""
    if not first[0].exists():
        start = time.monotonic()
        status, out, err = go()
        assert (status, err) == (0, "")
        assert out[-2:] == ["sweep        2 cells: 2 done", "federations  1 trained, 1 reused"]
        first[1] = time.monotonic() - start
        shutil.copytree(tmp_path / "out", first[0])
    else:
        shutil.copytree(first[0], tmp_path / "out")
    return first[1]


def found(sweep: Path) -> dict[str, tuple[list[dict], dict]]:
    """Each cell's rows and run.json, but for times and folders; and that it is whole."""
    each = {}
    for folder in sorted(p for p in sweep.iterdir() if cells.NAME.match(p.name)):
        whole = tiny.whole(folder)
        cost = whole["cost"].items()
        whole["cost"] = {k: v for k, v in cost if "seconds" not in k and k != "peak_mb"}
        del whole["command"]
        rows = tiny.numbers(folder)
        keys = [(row["defense"], row["round"], row["victim"], row["image"]) for row in rows]
        assert len(set(keys)) == len(keys), "a row is there twice"
        assert not list(folder.glob(".*")), "half a file is left"
        assert not (folder / "state").exists()
        each[folder.name] = rows, whole
    return each


# ---- killed


def killed_after(line: list[str], seconds: float) -> float | None:
    """Start the sweep in a process of its own and kill it then. If it ended first: its seconds."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(run.main(line))
    ended = 0
    while not ended and time.monotonic() < start + seconds:
        time.sleep(0.002)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if ended:
        return time.monotonic() - start
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def survives(moments: int, lasts: float, go, words, tmp_path: Path, seed: int = 0) -> None:
    """Kill the sweep at so many random moments; each time it goes on to the same end."""
    whole, drawn = found(tmp_path / "out"), random.Random(seed)
    for number in range(moments):
        where = f"killed-{number}"
        while ended := killed_after(words(out=where), drawn.uniform(0, lasts)):
            lasts = min(lasts, ended)  # it was too fast: once more
            shutil.rmtree(tmp_path / where)
        status, _, err = go(out=where)
        assert (status, err) == (0, ""), number
        assert found(tmp_path / where) == whole, number
        entries = tmp_path / where / ".store"
        assert [p.suffix for p in entries.iterdir() if p.suffix != ".half"] == [".safetensors"]


def test_a_sweep_that_is_killed_at_random_moments_loses_nothing(done, go, words, tmp_path):
    survives(3, done, go, words, tmp_path)


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_50_random_moments_loses_nothing(done, go, words, tmp_path):
    survives(50, done, go, words, tmp_path, seed=1)


def test_rows_that_are_written_blindly_would_be_there_twice(go, words, tmp_path, monkeypatch):
    """That the tests above can fail: a run that appends to what a killed process wrote."""

    def blindly(self, rows) -> None:
        with open(self.folder / records.ROWS, "a") as file:
            for row in rows:
                file.write(json.dumps(records._row(row)) + "\n")

    monkeypatch.setattr(records.Records, "append", blindly)
    first = os.fork()
    if first == 0:
        os._exit(run.main(words()))
    rows = tmp_path / "out/000-inverting-prune-0/records.jsonl"
    while not rows.exists() or not rows.read_text():
        time.sleep(0.005)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    go()
    with pytest.raises(AssertionError, match="a row is there twice"):
        found(tmp_path / "out")


@pytest.mark.slow
def test_a_launcher_that_is_killed_for_real_goes_on(words, tmp_path):
    """In processes of their own, once the first of the two cells is done."""
    first = tiny.spawn(words(), tmp_path)
    whole = tmp_path / "out/000-inverting-prune-0/run.json"
    limit = time.time() + 120
    while not whole.exists() and time.time() < limit:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    before = whole.read_bytes()
    second = tiny.spawn(words(), tmp_path)
    out, err = second.communicate(timeout=120)
    assert (second.returncode, err) == (0, "")
    assert "skips        000-inverting-prune-0: done before" in out
    assert whole.read_bytes() == before
    third = tiny.spawn(words(out="other"), tmp_path)
    third.communicate(timeout=120)
    assert found(tmp_path / "out") == found(tmp_path / "other")


# ---- whole, half, failed


def files(tmp_path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in (tmp_path / "out").glob("0*/**/*") if p.is_file()}


@pytest.mark.usefixtures("done")
def test_whole_cells_are_skipped_without_a_second_look(go, tmp_path, monkeypatch):
    before = files(tmp_path)
    monkeypatch.setattr(experiment, "plan", lambda *_: pytest.fail("it was run again"))
    status, out, err = go()
    assert (status, err) == (0, "")
    assert out[:3] == [
        "skips        000-inverting-prune-0: done before",
        "skips        001-inverting_signed-prune-0: done before",
        "sweep        2 cells: 2 done; 2 were done before",
    ]
    assert files(tmp_path) == before
    monkeypatch.setattr(records, "commit", lambda: "abcdef0")
    assert go()[1][0].endswith("; this is abcdef0")


@pytest.mark.usefixtures("done")
def test_a_cell_of_another_sweep_is_not_taken_for_this_ones(go, tmp_path):
    before = files(tmp_path)
    status, out, err = go("rounds=1")
    assert (status, out) == (1, [])
    assert err.count("holds a run with another rounds; repeat its sweep's command") == 2
    assert files(tmp_path) == before
    status, out, err = go(ONE, "images=2,9999")
    assert (status, err.count("error: ")) == (2, 1)
    assert "sweep        3 cells: 2 done, 1 refused; 2 were done before" in out
    assert out[-1].startswith("refused      001-inverting-prune-0: images: the clients hold ")
    assert {p: t for p, t in files(tmp_path).items() if p in before} == before


def test_a_failed_cell_is_tried_again_and_then_forgotten(go, tmp_path, monkeypatch):
    def cursed(self, *_):
        raise ArithmeticError("cursed")

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_attack", cursed)
        status, out, _ = go()
    assert status == 2
    assert out[-5] == "sweep        2 cells: 2 failed"
    assert out[-3].startswith(
        "go on with   python -m fedsec.run -m attack=inverting,inverting_signed "
    )
    assert out[-3].endswith(" out=out")
    assert out[-2:] == [
        "failed       000-inverting-prune-0: ArithmeticError: cursed",
        "failed       001-inverting_signed-prune-0: ArithmeticError: cursed",
    ]
    for name in ("000-inverting-prune-0", "001-inverting_signed-prune-0"):
        assert "ArithmeticError: cursed" in (tmp_path / "out" / name / "error.txt").read_text()
    status, out, err = go()
    assert (status, err) == (0, "")
    assert out[-2] == "sweep        2 cells: 2 done"
    assert not list((tmp_path / "out").glob("*/error.txt"))


def test_a_bug_before_a_run_begins_is_a_failed_cell_too(go, tmp_path, monkeypatch):
    plan = experiment.plan

    def broken(settings, *rest):
        if settings.names["attack"] == "inverting":
            raise ArithmeticError("in the plan")
        return plan(settings, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "plan", broken)
        status, out, err = go(ONE)
    assert status == 2
    assert "Traceback" in err
    assert out[-1] == "failed       000-inverting-prune-0: ArithmeticError: in the plan"
    (left,) = (tmp_path / "out/000-inverting-prune-0").iterdir()
    assert left.name == "error.txt"
    assert go(ONE)[0] == 0


def test_an_interrupted_sweep_says_how_it_goes_on(go, tmp_path, monkeypatch):
    attack = experiment._Run._attack

    def interrupted(self, *rest):
        if self.settings.names["attack"] == "inverting_signed":
            raise KeyboardInterrupt
        return attack(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_attack", interrupted)
        status, out, err = go()
    assert (status, err) == (130, "")
    assert out[-1] == "not done     001-inverting_signed-prune-0"
    assert "1 done, 1 not done" in out[-4]
    assert go()[0] == 0


def test_a_cell_that_another_process_runs_is_left_to_it(go, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_attack", interrupted)
        go(ONE)
    folder = tmp_path / "out/000-inverting-prune-0"
    held = records.reopen(folder, (folder / "config.yaml").read_text())
    assert cells.look(folder).state == cells.RUNNING
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    status, _, err = go(ONE)
    held.close()
    assert status == 1
    assert "one is writing to it" in err
    assert not (folder / "error.txt").exists()
    assert go(ONE)[0] == 0


def test_who_looks_does_not_keep_a_cell_from_going_on(tmp_path):
    records.open_folder(tmp_path / "a", "config").close()
    looking = subprocess.Popen(
        ["flock", "-s", str(tmp_path / "a/config.yaml"), "sleep", "0.3"]
    )  # as `cells.look` does, but longer
    time.sleep(0.1)
    records.reopen(tmp_path / "a", "config").close()
    looking.wait()


# ---- what a folder shows


def folder(where: Path, *, run: dict | None = None, **files: str) -> Path:
    where.mkdir()
    for name, text in files.items():
        (where / name.replace("_", ".")).write_text(text)
    if run is not None:
        (where / "run.json").write_text(json.dumps(run))
    return where


def test_what_a_folder_shows(tmp_path):
    def state(name: str, **more) -> tuple[str, str]:
        cell = cells.look(folder(tmp_path / name, **more))
        return cell.state, cell.why

    assert cells.look(tmp_path / "none").state == cells.ABSENT
    assert state("empty") == (cells.ABSENT, "")
    assert state("started", config_yaml="") == (cells.HALF, "")
    assert state("done", config_yaml="", run={"status": "done"}) == (cells.WHOLE, "")
    stopped = {"status": "interrupted", "flags": ["interrupted: ..."]}
    assert state("stopped", config_yaml="", run=stopped) == (cells.HALF, "")
    broke = {"status": "failed", "flags": ["failed: OSError: no", "other"]}
    assert state("broke", config_yaml="", error_txt="x", run=broke) == (cells.FAILED, "OSError: no")
    assert state("refused", error_txt="error: a: b, got c\n") == (cells.REFUSED, "a: b, got c")
    trace = "Traceback (most recent call last):\n  ...\nKeyError: 1\n"
    assert state("bug", error_txt=trace) == (cells.FAILED, "KeyError: 1")
    damaged, why = state("damaged", config_yaml="", run_json="{")
    assert damaged == cells.FAILED
    assert "must be JSON" in why


def test_only_what_was_left_is_cleared(tmp_path):
    cells.leave(tmp_path / "new", "error: a: b")
    cells.leave(tmp_path / "new", "error: c: d")
    assert (tmp_path / "new/error.txt").read_text() == "error: c: d\n"
    cells.clear(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    mine = folder(tmp_path / "mine", notes_txt="mine")
    cells.leave(mine, "error: a: b")
    cells.clear(mine)
    assert [p.name for p in mine.iterdir()] == ["notes.txt"]


def test_cells_are_found_by_number(tmp_path):
    for name in ("001-b-none-0", "000-a-none-0", "1000-c-none-0", ".store", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "002-file").write_text("")
    names = [cell.folder.name for cell in cells.find(tmp_path)]
    assert names == ["000-a-none-0", "001-b-none-0", "1000-c-none-0"]
    assert cells.named(7, "inverting", "prune+noise", 3) == "007-inverting-prune+noise-3"

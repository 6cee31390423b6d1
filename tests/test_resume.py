"""A killed attack goes on where it was, to the same result; and what is said meanwhile."""

import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_engine import built, nothing, observed, private, rngs, signed
from test_records import ROW

from attacks.inverting import Inverting
from fedsec import console, cost, engine, experiment, records, resume, rules
from fedsec.attack import Progress
from fedsec.config import difference
from fedsec.console import Console


@pytest.fixture(autouse=True)
def _at_every_look(monkeypatch):
    monkeypatch.setattr(engine, "EVERY", 5)
    monkeypatch.setattr(resume, "SECONDS", 0.0)


class Killed(Exception):
    pass


def dying(looks: int):
    """Told `looks` times, and at the next it is dead, before that look is kept."""
    heard: list[int] = []

    def told(step: int, steps: int, loss: float) -> None:
        if len(heard) == looks:
            raise Killed
        heard.append(step)

    return told


def hearing(steps_heard: list[int]):
    return lambda step, steps, loss: steps_heard.append(step)


def kept(folder: Path, told=nothing, state: resume.State | None = None) -> resume.Kept:
    return resume.Kept(state or resume.State(folder), folder / "0-0.safetensors", told)


# ---- one search ---------------------------------------------------------------------------------

LBFGS = rules.LBFGS(history=3)


def still_from(last: int) -> engine.Search:
    """Lanes that stand still from a step on: after 9 more they are done."""
    return signed(26, patience=9, priors=(), schedule=lambda step: float(step < last))


CASES = {
    "adam": (signed(26, restarts=2, schedule=rules.decay(26)), True),
    "lbfgs": (engine.Search(distance=engine.squared, rule=LBFGS, steps=26), True),
    "halved": (signed(26, restarts=4, patience=9, halving=True, spectrum=1.5), True),
    "still from 14": (still_from(14), True),  # done at 23, before the end
    "still from 18": (still_from(18), True),  # not done before the end
    "labels": (engine.Search(distance=engine.squared, rule=LBFGS, steps=26), False),
    "retired": (
        engine.Search(distance=engine.squared, rule=rules.LBFGS(), steps=150, enough=1e-3),
        True,
    ),
}


def problem(case: str, dtype=torch.float64):
    """Two victims, the arguments of `engine.match` for them."""
    search, told = CASES[case]
    torch.manual_seed(0)  # the labels
    model = built("mlp" if case == "retired" else "lenet", dtype=dtype)
    batches = [private(1, seed=v, dtype=dtype) for v in range(2)]
    seen = observed(model, batches)
    if case == "adam":  # one victim's lanes break and retire at the first look
        for tensor in seen.update.tensors.values():
            tensor[1] = torch.nan
    return seen, torch.stack([b.targets for b in batches]) if told else None, search


def equal(one, two) -> bool:
    """To the bit."""
    names = ("images", "labels", "loss", "steps", "gflop")
    pairs = [(getattr(one, k), getattr(two, k)) for k in names]
    same = [a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs]
    return all(same) and one.flags == two.flags


def killed_after(looks: int, folder: Path, case: str, dtype=torch.float64) -> None:
    with pytest.raises(Killed):
        engine.match(*problem(case, dtype), rngs(2), kept(folder, dying(looks)))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float64) for case in CASES]
    + [(case, torch.float32) for case in CASES if case != "retired"],
)
def test_a_killed_search_ends_as_an_uninterrupted_one(tmp_path, case, dtype):
    all_heard = []
    whole = engine.match(*problem(case, dtype), rngs(2), hearing(all_heard))
    looks = 20 if case == "retired" else 4
    killed_after(looks, tmp_path, case, dtype)
    (path,) = tmp_path.glob("0-0-*")
    tensors, about = resume.read(path)
    assert about["at"] == [all_heard[looks - 1], problem(case)[2].steps]
    if case in ("adam", "retired", "halved"):
        assert len(tensors["active"]) < len(tensors["best"]), "else no lane had retired"
    heard = []
    again = engine.match(*problem(case, dtype), rngs(2), kept(tmp_path, hearing(heard)))
    assert heard == all_heard[looks:], "it went on, and not from the start"
    assert equal(whole, again)


def test_one_that_is_killed_at_every_look_arrives_all_the_same(tmp_path):
    whole = engine.match(*problem("adam"), rngs(2), nothing)
    for _ in range(4):
        killed_after(1, tmp_path, "adam")
    assert equal(whole, engine.match(*problem("adam"), rngs(2), kept(tmp_path)))


@pytest.mark.parametrize(
    ("case", "forgotten", "value"),
    [("adam", name, 0) for name in ("rule.mean", "rule.square", "x", "best_x", "best")]
    + [("still from 14", "mark", 1e300), ("still from 18", "fallen", 0)],
)
def test_a_state_that_forgot_something_would_be_noticed(tmp_path, case, forgotten, value):
    whole = engine.match(*problem(case), rngs(2), nothing)
    killed_after(4, tmp_path, case)
    (path,) = tmp_path.glob("0-0-*")
    tensors, about = resume.read(path)
    resume.write(path, tensors | {forgotten: torch.full_like(tensors[forgotten], value)}, about)
    assert not equal(whole, engine.match(*problem(case), rngs(2), kept(tmp_path)))


def test_the_streams_of_a_resumed_search_are_where_they_would_be(tmp_path):
    killed_after(1, tmp_path, "adam")
    resumed, whole = rngs(2), rngs(2)
    engine.match(*problem("adam"), resumed, kept(tmp_path))
    engine.match(*problem("adam"), whole, nothing)
    for a, b in zip(resumed, whole, strict=True):
        assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


def started_at(folder: Path, seen, targets, search, streams=None) -> int:
    heard = []
    engine.match(seen, targets, search, streams or rngs(2), kept(folder, hearing(heard)))
    return heard[0]


SEARCHES = {
    "steps": {"steps": 27},
    "schedule": {"schedule": rules.decay(27)},
    "rule": {"rule": rules.Adam(lr=0.1, signed=False)},
    "distance": {"distance": engine.squared},
    "prior": {"priors": ((1e-2, lambda images: images.mean()),)},
    "weight": {"priors": ((1e-3, engine.total_variation),)},
    "restarts": {"restarts": 3},
    "box": {"boxed": False},
    "enough": {"enough": 0.1},
    "direction": {"direction": True},
}


@pytest.mark.parametrize("changed", SEARCHES)
def test_another_search_starts_anew(tmp_path, changed):
    seen, targets, search = problem("adam")
    killed_after(2, tmp_path, "adam")
    assert started_at(tmp_path, seen, targets, replace(search, **SEARCHES[changed])) == 5


@pytest.mark.parametrize("changed", ["nothing", "update", "model", "targets", "starts", "dtype"])
def test_another_victim_starts_anew(tmp_path, changed):
    seen, targets, search = problem("adam", torch.float32 if changed == "dtype" else torch.float64)
    killed_after(2, tmp_path, "adam")
    streams = rngs(2, seed=1 if changed == "starts" else 0)
    with torch.no_grad():
        if changed == "update":
            next(iter(seen.update.tensors.values()))[0] *= 1 + 1e-15
        if changed == "model":
            next(seen.model.parameters())[0, 0, 0, 0] += 1e-9
    targets = targets * 0.5 if changed == "targets" else targets
    begun = started_at(tmp_path, seen, targets, search, streams)
    assert begun == (15 if changed == "nothing" else 5)


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    resume.write(path, {"x": torch.arange(3.0), "none": torch.zeros(2, 0)}, {"at": [1, 2]})
    whole = path.read_bytes()
    tensors, about = resume.read(path)
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert tensors["none"].shape == (2, 0)
    assert about == {"at": [1, 2]}
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        assert resume.read(path) is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = resume.read(path)
        # a bit of the header that says nothing: the padding, or the order of names
        assert found is None or (
            torch.equal(found[0]["x"], tensors["x"]) and found[1] == about and len(found[0]) == 2
        )
    assert resume.read(tmp_path / "absent") is None


def test_a_damaged_state_starts_anew_to_the_same_result(tmp_path):
    whole = engine.match(*problem("adam"), rngs(2), nothing)
    killed_after(2, tmp_path, "adam")
    (path,) = tmp_path.glob("0-0-*")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    heard = []
    again = engine.match(*problem("adam"), rngs(2), kept(tmp_path, hearing(heard)))
    assert heard[0] == 5
    assert equal(whole, again)


def test_a_full_disk_ends_no_attack_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    whole = engine.match(*problem("adam"), rngs(2), nothing)
    killed_after(2, tmp_path, "adam")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    state = resume.State(tmp_path)
    again = engine.match(*problem("adam"), rngs(2), kept(tmp_path, state=state))
    assert equal(whole, again)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert re.fullmatch(r"an interruption .*: No space left on device; what .*", state.trouble)


def test_states_are_kept_no_more_often_than_said(tmp_path, monkeypatch):
    now, written = [0.0], []

    def told(step, steps, loss):
        now[0] += 1.0  # each look takes a second

    monkeypatch.setattr(resume, "SECONDS", 3.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    write = resume.write
    monkeypatch.setattr(resume, "write", lambda p, t, about: written.append(about["at"][0]))
    seen, targets, search = problem("adam")
    search = replace(search, steps=50)
    engine.match(seen, targets, search, rngs(2), kept(tmp_path, told))
    assert written == [15, 30, 45]
    monkeypatch.setattr(resume, "write", write)


def searches(count: int, told, folder: Path | None):
    """An attack of several searches from the same streams, each of five looks."""
    seen, targets, search = problem("adam")
    progress = Progress() if folder is None else kept(folder, told)
    streams = rngs(2)
    return [engine.match(seen, targets, search, streams, progress) for _ in range(count)]


def test_each_search_of_an_attack_has_its_own_place(tmp_path):
    whole = searches(3, None, None)
    assert not equal(whole[0], whole[1]), "else this test could not fail"
    with pytest.raises(Killed):
        searches(3, dying(2 * 6 + 2), tmp_path)
    assert len(list(tmp_path.glob("0-0-*"))) == 3
    heard = []
    again = searches(3, hearing(heard), tmp_path)
    assert heard == [26, 26, 15, 20, 25, 26], "two were over, the third went on"
    assert all(map(equal, whole, again))


def test_searches_too_short_to_be_kept_are_kept_together(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resume, "SECONDS", 13.0)
    died = dying(2 * 6 + 2)

    def told(step, steps, loss):
        now[0] += 1.0
        died(step, steps, loss)

    with pytest.raises(Killed):
        searches(3, told, tmp_path)
    heard = []
    assert all(map(equal, searches(3, None, None), searches(3, hearing(heard), tmp_path)))
    assert heard == [26, 26, 10, 15, 20, 25, 26]


def test_a_plain_function_still_serves_as_progress():
    heard = []
    engine.match(*problem("adam"), rngs(2), hearing(heard))
    assert heard == [5, 10, 15, 20, 25, 26]


# ---- a run --------------------------------------------------------------------------------------

LINE = ("defense=noise", "control=false", "stack=2", "images=4", "out=out")
FILES = {"run.json", "records.jsonl", "config.yaml", "grid.png", "report.html"}


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """Run words in this process, in a folder of their own: (status, stdout, stderr)."""
    data = tiny.npz(tmp_path)

    def run(where: str, *more: str, out: str = "out") -> tuple[int, str, str]:
        (tmp_path / where).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / where)
        capsys.readouterr()
        given = {word.partition("=")[0] for word in more}
        line = [*tiny.SMALL[:1], *tiny.SMALL[2:], "data=npz", f"data.path={data}", *LINE]
        line += ["attack.steps=12"]
        line = [word for word in line if word.partition("=")[0] not in given]
        return tiny.call(monkeypatch, [*line, *more]), *capsys.readouterr()

    return run


@pytest.fixture
def _timeless(monkeypatch):
    """Times and memory as if measured the same in every run."""
    leave = cost.Clock.__exit__

    def leaving(self, *exception):
        leave(self, *exception)
        self.seconds, self.peak_mb = 2.0, 3.0

    monkeypatch.setattr(cost.Clock, "__exit__", leaving)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)


def dies(monkeypatch, looks: int, error: type[BaseException]) -> None:
    """The attacks of the next run die at their `looks`-th look."""
    heard, hear = [], resume.Kept.__call__

    def told(self, step, steps, loss):
        heard.append(step)
        if len(heard) == looks:
            raise error
        hear(self, step, steps, loss)

    monkeypatch.setattr(resume.Kept, "__call__", told)


def counting(monkeypatch) -> list[int]:
    """The victims of each attack that is started from here on."""
    calls, work = [], Inverting.__call__

    def counted(self, seen, streams, progress):
        calls.append(len(streams))
        return work(self, seen, streams, progress)

    monkeypatch.setattr(Inverting, "__call__", counted)
    return calls


@pytest.mark.usefixtures("_timeless")
@pytest.mark.parametrize(
    ("looks", "error", "reused", "attacks"),
    [
        pytest.param(
            2, KeyboardInterrupt, "the next up to step 5 of 12", 4, marks=pytest.mark.slow
        ),
        (3 + 2, Killed, "2 reconstructions and the next up to step 5 of 12", 3),
        pytest.param(3 * 3 + 1, KeyboardInterrupt, "6 reconstructions", 1, marks=pytest.mark.slow),
    ],
)
def test_the_same_command_ends_as_an_uninterrupted_run(
    go, tmp_path, monkeypatch, looks, error, reused, attacks
):
    assert go("whole", "control=true")[0] == 0
    with monkeypatch.context() as patch:
        dies(patch, looks, error)
        status, out, _ = go("killed", "control=true")
    folder = tmp_path / "killed/out"
    assert status == (130 if error is KeyboardInterrupt else 2)
    assert out.splitlines()[-1].endswith(" out=out")
    assert (folder / "state").is_dir()
    before = records.read(folder).rows
    calls = counting(monkeypatch)
    status, out, err = go("killed", "control=true")
    assert (status, err) == (0, "")
    assert f"resumes      {reused} can be reused" in " ".join(out.split("\n")).replace(13 * " ", "")
    assert calls == [2] * attacks
    assert {p.name for p in folder.iterdir()} == FILES
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes(), name
    assert records.read(folder).rows[: len(before)] == before
    status, _, err = go("killed", "control=true")
    assert (status, err) == (1, "error: out: must be empty or new, got out\n")


def test_rows_that_were_finished_are_there_while_the_run_goes_on(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        go("a")

    def again(job, *_):
        assert len(records.read(tmp_path / "a/out").rows) == 2
        assert not (tmp_path / "a/out/run.json").exists(), "the run is not over"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "federate", again)
        assert go("a")[0] == 130
    assert records.read(tmp_path / "a/out").status == "interrupted"
    assert len(records.read(tmp_path / "a/out").rows) == 2
    assert go("a")[0] == 0
    assert len(tiny.rows(tmp_path / "a/out")) == 4


def test_the_seconds_of_killed_processes_count(go, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch:
        hear = resume.Kept.__call__

        def told(self, step, steps, loss):
            now[0] += 1000.0
            if step == 10:
                raise KeyboardInterrupt
            hear(self, step, steps, loss)

        patch.setattr(resume.Kept, "__call__", told)
        go("a")
    assert go("a")[0] == 0
    seconds = [row["seconds"] for row in tiny.rows(tmp_path / "a/out")]
    assert all(s == pytest.approx(1000 / 2, abs=30) for s in seconds[:2]), "up to the kept look"
    assert all(s < 30 for s in seconds[2:])


CHANGES = {
    "attack.lr=0.2": "attack.lr",
    "seed=1": "seed",
    "defense=prune": "defense.",
    "rounds=2": "rounds",
}


def test_other_settings_are_refused_in_one_line(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 2, KeyboardInterrupt)
        go("a")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    for word, key in CHANGES.items():
        status, _, err = go("a", word)
        assert status == 1
        expected = rf"error: out: holds an unfinished run with another {key}[^\n]*"
        way_out = r"; repeat its command, or name a new folder, got out\n"
        assert re.fullmatch(expected + way_out, err), err
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("length", [0, 40])
def test_a_run_killed_while_its_config_was_written_goes_on(go, tmp_path, monkeypatch, length):
    with monkeypatch.context() as patch:
        dies(patch, 2, KeyboardInterrupt)
        go("a")
    config = tmp_path / "a/out/config.yaml"
    whole = config.read_bytes()
    config.write_bytes(whole[:length])
    assert go("a")[0] == 0
    assert config.read_bytes() == whole


def test_a_damaged_config_is_refused_in_one_line(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 2, KeyboardInterrupt)
        go("a")
    (tmp_path / "a/out/config.yaml").write_text("attack: [")
    status, _, err = go("a")
    assert (status, err) == (
        1, "error: out: holds a config.yaml that is damaged; name a new folder, got out\n"
    )  # fmt: skip


def test_what_other_versions_kept_is_not_mixed_in(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        go("a")
    calls = counting(monkeypatch)
    commit = records.commit()
    monkeypatch.setattr(records, "commit", lambda: "abcdef0")
    status, out, _ = go("a")
    assert status == 0
    assert calls == [2] * 2
    said = f"resumes all is attacked anew, since this differs: commit {commit} -> abcdef0"
    assert said in " ".join(out.split())
    assert len(tiny.rows(tmp_path / "a/out")) == 4


@pytest.mark.parametrize("changed", ["nothing", "commit", "versions", "code", "threads", "name"])
def test_what_a_state_was_made_with_tells_runs_apart(monkeypatch, changed):
    names = {"attack": "a"}
    before = experiment._made("cpu", names)
    other = {
        "commit": (records, "commit", lambda: "abcdef0"),
        "versions": (records, "versions", lambda: {"torch": "0.1"}),
        "code": (resume, "code", lambda: "abcdef0"),
        "threads": (torch, "get_num_threads", lambda: 7),
    }
    if changed in other:
        monkeypatch.setattr(*other[changed])
    names = {"attack": "b"} if changed == "name" else names
    assert (experiment._made("cpu", names) == before) == (changed == "nothing")


def test_the_digest_of_the_code_reads_what_an_attack_from_elsewhere_imports_too(
    tmp_path, monkeypatch
):
    own, helper = tmp_path / "own_attack.py", tmp_path / "own_helper.py"
    own.write_text("import own_helper")
    helper.write_text("a = 1")
    without = resume.code()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_attack")
    before = resume.code()
    assert resume.code() == before != without
    helper.write_text("a = 2")
    assert resume.code() != before


def test_other_data_under_the_same_name_is_attacked_anew(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        go("a")
    arrays = tiny.arrays()
    arrays["train_images"] = 255 - arrays["train_images"]
    tiny.np.savez(tmp_path / "tiny.npz", **arrays)
    calls = counting(monkeypatch)
    assert go("a")[0] == 0
    assert calls == [2] * 2


def test_without_out_the_last_line_says_how_it_goes_on(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        status, out, _ = go("a", "out=null")
    assert status == 130
    python, dash, module, *words = shlex.split(out.splitlines()[-1])
    assert [python, dash, module] == ["python", "-m", "fedsec.run"]
    assert re.fullmatch(r"out=outputs/[\d-]+/inverting-noise-0", words[-1])
    calls = counting(monkeypatch)
    assert tiny.call(monkeypatch, words) == 0
    assert calls == [2]
    assert len(list((tmp_path / "a/outputs").glob("*/*"))) == 1


@pytest.mark.slow
def test_the_cells_of_a_sweep_go_on_likewise(go, tmp_path, monkeypatch):
    sweep = ("-m", "seed=0,1", "images=2")
    with monkeypatch.context() as patch:
        dies(patch, 3 + 2, KeyboardInterrupt)
        status, out, _ = go("a", *sweep)
    assert status == 130
    assert "out=out/001-inverting-noise-1" in out.splitlines()[-1]
    assert shlex.split(out.splitlines()[-1])[-1] == "out=out/001-inverting-noise-1"
    status, _, err = go("a", *sweep)
    cell = "out/000-inverting-noise-0"
    assert (status, err) == (1, f"error: out: must be empty or new, got {cell}\n")
    for cell in (tmp_path / "a/out").glob("0*"):
        assert records.read(cell).whole
    assert go("b", *sweep)[0] == 0
    for cell in ("000-inverting-noise-0", "001-inverting-noise-1"):
        assert tiny.numbers(tmp_path / "a/out" / cell) == tiny.numbers(tmp_path / "b/out" / cell)


def test_two_processes_never_write_to_one_folder(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        go("a")
    folder = tmp_path / "a/out"
    code = (
        "import sys, pathlib; from fedsec import records\n"
        "writer = records.reopen(pathlib.Path(sys.argv[1])); print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=tiny.ENV, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        status, _, err = go("a")
        other.kill()
    assert status == 1
    assert re.fullmatch(r"error: out: must be [^\n]* one is writing to it, got out\n", err)
    assert go("a")[0] == 0, "the lock died with its process"


def test_a_folder_with_anything_else_is_no_unfinished_run(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        go("a")
    (tmp_path / "a/out/mine.txt").write_text("mine")
    status, _, err = go("a")
    assert (status, err) == (1, "error: out: must be empty or new, got out\n")
    assert records.read(tmp_path / "a/out").status == "interrupted"


def test_a_report_in_the_folder_keeps_no_run_from_going_on(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, 5, KeyboardInterrupt)
        go("a")
    subprocess.run([sys.executable, "-m", "fedsec.report", tmp_path / "a/out"], check=True)
    assert (tmp_path / "a/out/report.csv").exists()
    assert go("a")[0] == 0
    assert records.read(tmp_path / "a/out").status == "done"


def test_rows_written_again_alike_stay_and_others_replace_what_follows(tmp_path):
    rows = [replace(ROW, victim=v) for v in range(4)]
    with_all = records.open_folder(tmp_path / "a")
    with_all.append(rows[:2])
    with_all.append(rows[2:])
    with_all.close()
    path = tmp_path / "a/records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed in mid-write
    again = records.reopen(tmp_path / "a")
    again.append(rows[:2])
    assert path.read_bytes() == whole[:-20]
    again.append(rows[2:])
    assert path.read_bytes() == whole
    again.close()
    other = records.reopen(tmp_path / "a")
    other.append([replace(ROW, victim=9)])
    assert [row.victim for row in records.read(tmp_path / "a").rows] == [9]
    other.finish({"status": "done"})
    other.close()
    with pytest.raises(records.Taken, match="^out: must be empty or new, got"):
        records.reopen(tmp_path / "a")


def test_a_run_is_locked_from_its_first_moment_until_it_is_closed(tmp_path):
    first = records.open_folder(tmp_path / "a", "x: 1\n")
    with pytest.raises(records.Taken, match="one is writing to it"):
        records.reopen(tmp_path / "a")
    first.close()
    records.reopen(tmp_path / "a").close()


def test_differences_are_named_in_full():
    assert difference("a: 1\nout: x", "a: 1\nout: y") == ""
    assert difference("a: {b: 1}", "a: {b: 2}") == "a.b"
    assert difference("a: {b: 1, c: 1}", "a: {b: 1}") == "a.c"
    assert difference("a: {b: 1}", "a: {b: 1, c: null}") == "a.c"
    assert difference("", "a: [1]") == "a"


MAIN = """
from fedsec import process
process.enter()
from fedsec import resume, run
resume.SECONDS = 0.0
process.leave(run.main())
"""


def spawned(line: list[str], cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *line], cwd=cwd, env=tiny.ENV, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_for_real_ends_as_another(tmp_path, name):
    """On the built-in photographs: in mid-attack on the second stack of the defense."""
    line = ["data.per_class=8", "defense=prune", "rounds=3", "images=4", "stack=2"]
    line += ["attack.steps=300", "out=out"]
    for where in ("whole", "killed"):
        (tmp_path / where).mkdir()
    first = spawned(line, tmp_path / "killed")
    try:
        half = tmp_path / "killed/out/state/1-00001-00000.safetensors"
        limit = time.time() + 120
        while not half.exists() and first.poll() is None and time.time() < limit:
            time.sleep(0.01)
        first.send_signal(getattr(signal, name))
        _, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (first.returncode, err) == ((-9, "") if name == "SIGKILL" else (130, ""))
    assert half.exists(), "else it was killed too late"
    again = spawned(line, tmp_path / "killed")
    whole = spawned(line, tmp_path / "whole")
    out, err = again.communicate(timeout=120)
    _, _ = whole.communicate(timeout=120)
    assert (again.returncode, err, whole.returncode) == (0, "", 0)
    assert "6 reconstructions and the next up to step" in out
    one, two = (tmp_path / where / "out" for where in ("killed", "whole"))
    assert tiny.numbers(one) == tiny.numbers(two)
    assert (one / "grid.png").read_bytes() == (two / "grid.png").read_bytes()
    runs = [tiny.whole(folder) for folder in (one, two)]
    times = ("federate_seconds", "control_federate_seconds", "attack_seconds", "seconds_per_image",
             "peak_mb")  # fmt: skip
    for run in runs:
        run["cost"] = {k: v for k, v in run["cost"].items() if k not in times}
    assert runs[0] == runs[1]
    assert {p.name for p in one.iterdir()} == FILES


# ---- what is said meanwhile ---------------------------------------------------------------------


class Clock:
    """Goes on when told to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def lines(clock: Clock, work) -> list[str]:
    """What the stage of an attack on eight images prints in a log between its two lines."""
    printed = Console(file=io.StringIO(), now=clock)
    with printed.stage("attack", "none", 8, "images") as stage:
        work(stage)
        stage.close("done")
    started, *between, end = printed.terminal.file.getvalue().splitlines()
    assert started.split() == ["attack", "none", "started"]
    assert end.split() == ["attack", "none", "8/8", "images", "done"]
    return between


def test_a_log_hears_every_half_minute_how_long_it_takes():
    clock = Clock()

    def work(stage):
        told = stage.within(0, 8)
        for step in range(25, 601, 25):  # 2.5 steps a second
            clock.time += 10
            told(step, 600, 1 / step)

    between = lines(clock, work)
    steps = [int(re.search(r"step (\d+)/600", line)[1]) for line in between]
    assert steps == list(range(150, 601, 75)), "a minute of silence, then every 30 s"
    assert between[2] == (
        "attack       none       4/8 images  step 300/600  loss 0.0033  2.5 steps/s"
        "  about 2 min left"
    )
    assert between[1].split("  ")[-1] == "about 2 min left"
    assert between[-1].endswith("8/8 images  step 600/600  loss 0.0017  2.5 steps/s")


def test_a_short_run_says_nothing_in_between():
    clock = Clock()

    def work(stage):
        told = stage.within(0, 8)
        for step in range(25, 601, 25):
            clock.time += 2
            told(step, 600, 0.1)

    assert lines(clock, work) == []


def test_what_was_reused_does_not_count_as_speed():
    """Four images were finished, and the first look at the next comes at step 500."""
    clock = Clock()

    def work(stage):
        stage.skip(4)
        told = stage.within(4, 4)
        for step in range(525, 601, 25):
            clock.time += 50
            told(step, 600, 0.1)

    first, *_, last = lines(clock, work)
    assert "7.7/8 images  step 550/600" in first
    assert first.endswith("0.5 steps/s  about 2 min left")
    assert last.endswith("step 600/600  loss 0.1000  0.5 steps/s")


def test_a_second_search_has_its_own_speed():
    clock = Clock()

    def work(stage):
        told = stage.within(0, 8)
        for seconds in (1, 25):
            for step in range(25, 601, 25):
                clock.time += seconds
                told(step, 600, 0.1)

    assert lines(clock, work)[-1].split("  ")[-1] == "1 steps/s"


def test_a_terminal_shows_the_same_beside_its_bar():
    clock = Clock()
    printed = Console(file=io.StringIO(), now=clock)
    printed.terminal = console.Terminal(file=io.StringIO(), force_terminal=True, width=140)
    with printed.stage("attack", "none", 8, "images") as stage:
        told = stage.within(0, 8)
        for step in (25, 300):
            clock.time += 55
            told(step, 600, 0.5)
        stage.bar.refresh()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", printed.terminal.file.getvalue())
    assert "4/8 images  step 300/600  loss 0.5000  5 steps/s  about 60 s left" in text

"""A federation is trained once for all attacks on it, and a kept one gives the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from test_configs import options, preset
from torch import Tensor

from fedsec import experiment, records, resume, store
from fedsec.client import FedAvg, Gradient
from fedsec.data import Npz
from fedsec.defense import Compose, Defense
from fedsec.federation import Federation, Job, Trajectory, federate
from fedsec.models import LeNetSpec
from fedsec.store import Kept, Store

INLINE = Federation(engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2)
GRADIENT, FEDAVG = Gradient(lr=0.1, batch=4), FedAvg(lr=0.1, batch=4, steps=2)
PROBES = ((0, (0, 1, 2, 3)), (1, (4, 5, 6, 7)))
TITLE = {"data": "tiny", "defense": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Npz(path=str(tiny.npz(tmp_path_factory.mktemp("data")))).load()


def job(**changed) -> Job:
    plain = Job(None, LeNetSpec(), GRADIENT, INLINE, Compose(()), 2, 2, 0, "cpu", (0, 1), PROBES)
    return replace(plain, **changed)


def quiet(*_) -> None:
    pass


def equal(one: object, two: object) -> bool:
    """To the bit, whatever they are made of."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, torch.nn.Module) and isinstance(two, torch.nn.Module):
        return one.training == two.training and equal(one.state_dict(), two.state_dict())
    if isinstance(one, dict) and isinstance(two, dict):
        return list(one) == list(two) and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    if hasattr(one, "__dataclass_fields__") and not isinstance(one, Defense):
        return type(one) is type(two) and equal(vars(one), vars(two))
    return one == two


# ---- the exchanges of a training that is known

CASES: dict[str, dict] = {
    **{f"{name}, gradient": {"defense": name} for name in options("defense")},
    "none, fedavg": {"client": FEDAVG},
    "noise, fedavg": {"defense": "noise", "client": FEDAVG},
    "secagg, fedavg": {"defense": "secagg", "client": FEDAVG},
    "batch norm": {"model": LeNetSpec(norm="batch")},
    "batch norm, fedavg": {"model": LeNetSpec(norm="batch"), "client": FEDAVG},
    "same": {"keep_training": True},
    "last round": {"attack_rounds": (0, 2)},
    "adam": {"federation": replace(INLINE, strategy="fedadam"), "attack_rounds": (1,)},
    "average": {"ema": 0.9},
}


def case(name: str, data) -> Job:
    changed = dict(CASES[name])
    if isinstance(changed.get("defense"), str):
        defense = preset("defense", changed["defense"])
        changed["defense"] = defense.supplied(data.test.batch(range(8), data.classes))
    return job(**changed)


def kept_by(folder: Path, of: Trajectory) -> Trajectory:
    """The same, once written and read."""
    made = {"any": "thing"}
    Store(folder)._write(Store(folder).path(made), made, TITLE, Kept(of, 0.5, 1.0, "run"))
    found = Store(folder)._read(Store(folder).path(made), made)
    assert found is not None
    return found.trajectory


@pytest.mark.parametrize("name", CASES)
def test_the_exchanges_of_a_known_training_are_those_of_a_fresh_one(data, tmp_path, name):
    todo = case(name, data)
    fresh = federate(todo, data, quiet)
    heard = []
    known = kept_by(tmp_path, fresh.trajectory)
    again = federate(todo, data, lambda *told: heard.append(told), known=known)
    assert heard == [], "no round was trained"
    assert len(fresh.exchanges) == len(again.exchanges) > 0
    for one, two in zip(fresh.exchanges, again.exchanges, strict=True):
        for field in fields(one):
            assert equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert equal(fresh.model, again.model)
    assert equal(fresh.averaged, again.averaged)
    assert (fresh.averaged is not None) == bool(todo.ema)
    assert fresh.training == again.training
    assert (fresh.sent_bytes, fresh.seconds_per_round) == (
        again.sent_bytes,
        again.seconds_per_round,
    )


def test_other_models_give_other_exchanges(data):
    """Else the test above could not fail."""
    fresh = federate(job(), data, quiet)
    wrong = replace(fresh.trajectory, sent=dict.fromkeys((0, 1), fresh.trajectory.sent[0]))
    again = federate(job(), data, quiet, known=wrong)
    same = [
        equal(a.update, b.update) for a, b in zip(fresh.exchanges, again.exchanges, strict=True)
    ]
    assert same == [True, True, False, False]


def test_what_a_malicious_server_sends_needs_no_training_of_its_own(data):
    def craft(model, round):
        first, second = (torch.nn.Sequential(deepcopy(model)) for _ in range(2))
        with torch.no_grad():
            next(first.parameters()).mul_(2 + round)
        return first, second

    honest = federate(job(), data, quiet)
    fresh = federate(job(), data, quiet, craft)
    again = federate(job(), data, quiet, craft, honest.trajectory)
    for one, two in zip(fresh.exchanges, again.exchanges, strict=True):
        assert equal(one.update, two.update)
        assert equal(one.queries, two.queries)
        assert len(one.queries) == 1


# ---- the key


def key(todo: Job, data, device: str = "cpu, 1 thread", attack: type = Defense) -> Path:
    return Store(Path("store")).path(store.made(todo, data, device, attack))


DETERMINES = {
    "model": {"model": LeNetSpec(norm="group")},
    "weights": {"seed": 1},
    "client": {"client": replace(GRADIENT, lr=0.2)},
    "kind of client": {"client": FEDAVG},
    "strategy": {"federation": replace(INLINE, strategy="fedadam")},
    "engine": {"federation": replace(INLINE, engine="ray")},
    "split": {"federation": replace(INLINE, split="dirichlet")},
    "clients": {"clients": 3},
    "rounds": {"rounds": 3},
    "kept rounds": {"attack_rounds": (0,)},
    "average": {"ema": 0.9},
    "defense": {"defense": "prune"},
    "its parameter": {"defense": ("prune", "ratio", 0.5)},
    "two defenses": {"defense": Compose((preset("defense", "prune"), preset("defense", "clip")))},
    "their order": {"defense": Compose((preset("defense", "clip"), preset("defense", "prune")))},
}


def test_everything_that_determines_a_training_is_in_its_key(data):
    keys = {"as it is": key(job(), data)}
    for what, changed in DETERMINES.items():
        defense = changed.get("defense")
        if isinstance(defense, str):
            changed = {"defense": preset("defense", defense)}
        if isinstance(defense, tuple):
            changed = {"defense": preset("defense", defense[0], **{defense[1]: defense[2]})}
        keys[what] = key(job(**changed), data)
    other = replace(data, train=replace(data.train, pixels=255 - data.train.pixels))
    keys["pixels"] = key(job(), other)
    keys["labels"] = key(
        job(), replace(data, test=replace(data.test, labels=data.test.labels.flip(0)))
    )
    keys["device"] = key(job(), data, "cpu, 2 threads")
    assert len(set(keys.values())) == len(keys)
    assert key(job(), data) == keys["as it is"]


def test_public_images_that_a_defense_uses_are_in_its_key(data):
    public = [data.test.batch(range(n, n + 8), data.classes) for n in (0, 8)]
    defense = preset("defense", "instahide", inter=True)
    some, others = (job(defense=defense.supplied(each)) for each in public)
    assert key(some, data) == key(some, data) != key(others, data)


def test_what_an_attack_chooses_is_not_in_the_key(data):
    for changed in ({"probes": ()}, {"probes": ((1, (9,)),)}, {"keep_training": True}):
        assert key(job(**changed), data) == key(job(), data)


@pytest.mark.parametrize(
    ("changed", "same"), [("commit", True), ("versions", False), ("code", False)]
)
def test_another_version_trains_anew(data, monkeypatch, changed, same):
    before = key(job(), data)
    now = {
        "commit": (records, "commit", lambda: "abcdef0"),
        "versions": (records, "versions", lambda: {"torch": "0.1"}),
        "code": (resume, "code", lambda *_: "abcdef0"),
    }
    monkeypatch.setattr(*now[changed])
    assert (key(job(), data) == before) == same


def test_the_source_of_an_attack_is_not_in_the_key_but_that_of_a_defense_is(
    data, tmp_path, monkeypatch
):
    text = "from dataclasses import dataclass\nfrom fedsec.defense import Defense\n"
    text += "@dataclass(frozen=True)\nclass Mine(Defense):\n    value: float = 1.0\n"
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_attack", "my_defense"):
        (tmp_path / f"{name}.py").write_text(text)
    from my_attack import Mine as Attack  # type: ignore[import-not-found]
    from my_defense import Mine as Shield  # type: ignore[import-not-found]

    def keys() -> list[Path]:
        jobs = [(job(), Attack), (job(defense=Shield()), Attack), (job(defense=Shield()), Shield)]
        return [key(todo, data, attack=attack) for todo, attack in jobs]

    before = keys()
    (tmp_path / "my_attack.py").write_text(text + "# changed\n")
    assert keys()[:2] == before[:2]
    (tmp_path / "my_defense.py").write_text(text + "# changed\n")
    assert all(now != was for now, was in zip(keys()[1:], before[1:], strict=True))


def test_what_cannot_be_described_is_not_guessed(data):
    @dataclass(frozen=True)
    class Odd(Defense):
        value: object = None

    assert key(job(defense=Odd((1, 2.0, "a", {"b": None}))), data)
    with pytest.raises(TypeError, match="builtin_function_or_method is not a number"):
        key(job(defense=Odd(len)), data)
    one, two = (store.described(Odd(value)) for value in (1, 1.0))
    assert json.dumps(one) != json.dumps(two)


# ---- entries

SMALL = Trajectory(
    {0: {"w": torch.arange(4.0)}}, {"n": torch.tensor(3), "w": torch.ones(4)}, 0.1, 16.0
)
MADE = {"seed": 0}


def once(folder: Path, made: dict | None = None, value: float = 0.5, calls: list | None = None):
    """A kept federation of `value`, and what the store complained of."""
    mine, trained = Store(folder), [] if calls is None else calls

    def train() -> Kept:
        trained.append(value)
        return Kept(SMALL, value, 1.0, "run")

    kept = mine.once(made or MADE, TITLE, train, quiet)
    return kept, mine.troubles


def test_an_entry_is_written_once_and_read_as_it_was(tmp_path):
    calls: list[float] = []
    first, _ = once(tmp_path / "a/b", value=0.25, calls=calls)
    second, troubles = once(tmp_path / "a/b", value=0.75, calls=calls)
    assert calls == [0.25]
    assert equal(vars(first), vars(second))
    assert troubles == []
    assert [p.suffix for p in (tmp_path / "a/b").iterdir()] == [".safetensors"], "nothing is left"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-5])
    if how == "empty":
        path.write_bytes(b"")
    if how == "flipped":
        place = len(content) - 6  # in a tensor
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    if how == "another accuracy":
        path.write_bytes(content.replace(rb"accuracy\": 0.25", rb"accuracy\": 0.95"))
    assert path.read_bytes() != content


HARM = ("cut", "empty", "flipped", "another accuracy")


@pytest.mark.parametrize("how", HARM)
def test_a_damaged_entry_is_trained_anew_and_said_so(tmp_path, how):
    once(tmp_path, value=0.25)
    (path,) = tmp_path.iterdir()
    damage(path, how)
    kept, troubles = once(tmp_path, value=0.75)
    assert kept.accuracy == 0.75
    assert troubles == [f"store: {path} is damaged; it was trained anew"]
    assert once(tmp_path)[0].accuracy == 0.75, "it was mended"


@pytest.mark.parametrize("how", ["flipped", "another accuracy"])
def test_a_store_without_checksums_gives_a_wrong_number(tmp_path, monkeypatch, how):
    """That what is tested above can go wrong."""
    monkeypatch.setattr(resume, "checksum", lambda *_: "")
    once(tmp_path, value=0.25)
    (path,) = tmp_path.iterdir()
    damage(path, how)
    kept, troubles = once(tmp_path)
    assert troubles == []
    wrong = kept.accuracy == 0.95 or not equal(kept.trajectory, SMALL)
    assert wrong


def test_every_flipped_byte_of_an_entry_is_noticed_or_means_nothing(tmp_path):
    once(tmp_path, value=0.25)
    (path,) = tmp_path.iterdir()
    whole, harmless = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = Store(tmp_path)._read(path, MADE)
        assert found is None or equal(vars(found), vars(Kept(SMALL, 0.25, 1.0, "run")))
        harmless += found is not None
    assert harmless < 10, "the header's padding"


def test_an_entry_under_anothers_name_is_not_taken_for_it(tmp_path):
    once(tmp_path, {"seed": 1}, value=0.25)
    (path,) = tmp_path.iterdir()
    path.rename(Store(tmp_path).path(MADE))
    kept, troubles = once(tmp_path, value=0.75)
    assert kept.accuracy == 0.75
    assert "is damaged" in troubles[0]


# ---- who trains


def together(folder: Path, count: int = 4, seconds: float = 0.3) -> list[float]:
    """The trainings that so many processes which ask at the same time start."""
    calls: list[float] = []

    def train() -> Kept:
        calls.append(0.5)
        time.sleep(seconds)
        return Kept(SMALL, 0.5, 1.0, "run")

    def ask() -> None:
        Store(folder).once(MADE, TITLE, train, quiet)

    asking = [threading.Thread(target=ask) for _ in range(count)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return calls


def test_those_who_ask_together_train_once(tmp_path):
    assert together(tmp_path) == [0.5]


def test_without_the_lock_they_would_train_more_than_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "_locked", lambda *_: True)
    assert len(together(tmp_path)) > 1


def test_who_trains_longer_than_the_lease_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 1.0)
    monkeypatch.setattr(store, "HEARTBEAT", 0.1)
    assert together(tmp_path, 2, 2.5) == [0.5]


def test_who_waits_hears_why(tmp_path):
    heard: list[str] = []
    first = threading.Thread(target=together, args=(tmp_path, 1, 1.0))
    first.start()
    while not list(tmp_path.glob("*.lock")):
        time.sleep(0.01)
    kept = Store(tmp_path).once(MADE, TITLE, lambda: pytest.fail("trained twice"), heard.append)
    first.join()
    assert kept.accuracy == 0.5
    (said,) = heard
    assert said.startswith("another process trains this federation (")


HOLD = """
import sys, time
from filelock import SoftFileLease
lease = SoftFileLease(sys.argv[1], lease_duration=float(sys.argv[2]))
with lease:
    print("held", flush=True)
    time.sleep(60)
"""


def holder(lock: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLD, str(lock), str(store.LEASE)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path):
    lock = Store(tmp_path).path(MADE).with_suffix(".lock")
    process = holder(lock)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.exists(), "it could not clear up"
    start = time.monotonic()
    assert once(tmp_path, value=0.25)[0].accuracy == 0.25
    assert time.monotonic() - start < 10 < store.LEASE
    assert not lock.exists()


def test_the_lock_of_a_node_that_is_gone_ends_with_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LEASE", 2.0)
    monkeypatch.setattr(store, "HEARTBEAT", 0.5)
    lock = Store(tmp_path).path(MADE).with_suffix(".lock")
    process = holder(lock)
    text = lock.read_text()
    process.kill()
    process.wait()
    lock.write_text(re.sub(r"host=.*", "host=a-node-that-is-gone", text))
    start = time.monotonic()
    assert once(tmp_path, value=0.25)[0].accuracy == 0.25
    assert 2 <= time.monotonic() - start < 10


def test_a_training_that_fails_is_tried_by_the_next(tmp_path):
    def fails() -> Kept:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        Store(tmp_path).once(MADE, TITLE, fails, quiet)
    assert list(tmp_path.iterdir()) == []
    assert once(tmp_path, value=0.25)[0].accuracy == 0.25


# ---- folders that cannot be used


def test_a_folder_that_cannot_be_made_costs_the_store_only(tmp_path):
    (tmp_path / "file").write_text("")
    kept, troubles = once(tmp_path / "file/store")
    assert kept.accuracy == 0.5
    (said,) = (t for t in troubles if "cannot be used" in t)
    rule = "cannot be used (Not a directory); it was trained without it"
    assert said == f"store: {tmp_path}/file/store {rule}"


@pytest.mark.parametrize("left", [False, True])
def test_a_store_that_can_only_be_read_serves_what_it_has(tmp_path, monkeypatch, left):
    if left:
        once(tmp_path, value=0.25)
    opened, there = os.open, set(tmp_path.iterdir())

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(records, "write_whole", lambda path, _: os.open(path, os.O_WRONLY))
    kept, troubles = once(tmp_path, value=0.75)
    assert kept.accuracy == (0.25 if left else 0.75)
    assert bool(troubles) != left
    assert all("Read-only file system" in said for said in troubles)
    assert set(tmp_path.iterdir()) == there


def test_a_full_disk_keeps_nothing_half(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        kept, troubles = once(tmp_path, value=0.25)
    assert kept.accuracy == 0.25
    (said,) = troubles
    assert "a federation was not kept for other runs: " in said
    assert "No space left on device" in said
    assert list(tmp_path.iterdir()) == []


# ---- runs


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """Run words on tiny images with a store: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*more: str, out: str = "out") -> tuple[int, str, str]:
        capsys.readouterr()
        words = [w for w in tiny.words(tmp_path, *more, out=out) if w != "store=null"]
        words += ["store=store"] * (not any(w.startswith("store=") for w in more))
        return tiny.call(monkeypatch, words), *capsys.readouterr()

    return run


def outcome(folder: Path) -> tuple[list[dict], dict]:
    """The numbers of a run, times aside."""
    run = tiny.whole(folder)
    cost = run["cost"].items()
    run["cost"] = {k: v for k, v in cost if "seconds" not in k and k != "peak_mb"}
    return tiny.numbers(folder), {k: v for k, v in run.items() if k not in ("command", "reused")}


def reused(folder: Path) -> dict[str, bool]:
    return tiny.whole(folder)["reused"]


def test_a_second_attack_trains_nothing_and_has_the_numbers_of_a_fresh_run(go, tmp_path):
    few = ("defense=prune", "rounds=2", "attack_rounds=[0,1]")
    assert go(*few, "threat=known_labels", out="a")[0] == 0
    status, out, err = go(*few, "images=2", out="b")
    assert (status, err) == (0, "")
    assert out.count("s, reused   accuracy") == 2
    assert go(*few, "images=2", "store=null", out="fresh")[0] == 0
    assert outcome(tmp_path / "b") == outcome(tmp_path / "fresh")
    assert reused(tmp_path / "a") == reused(tmp_path / "fresh") == {"none": False, "prune": False}
    assert reused(tmp_path / "b") == {"none": True, "prune": True}
    first, second = (tiny.whole(tmp_path / each)["cost"] for each in "ab")
    for name in ("federate_seconds", "control_federate_seconds", "seconds_per_round"):
        assert first[name] == second[name], "what the training cost, not what reading it does"
    assert len(list((tmp_path / "store").iterdir())) == 2


@pytest.mark.parametrize(
    ("forgotten", "changed"),
    [("seed initial", {"seed": 1}), ("rounds", {"rounds": 3}), ("client", {"client": FEDAVG})],
)
def test_a_key_that_leaves_something_out_would_give_another_runs_numbers(
    data, tmp_path, forgotten, changed
):
    other = job(**changed)
    fresh = federate(other, data, quiet).trajectory.final

    def kept(todo: Job, made: dict, where: str):
        def train() -> Kept:
            return Kept(federate(todo, data, quiet).trajectory, 0.5, 1.0, "run")

        return Store(tmp_path / where).once(made, TITLE, train, quiet).trajectory.final

    def whole(todo: Job) -> dict:
        return store.made(todo, data, "cpu, 1 thread", Defense)

    def short(todo: Job) -> dict:
        return {k: v for k, v in whole(todo).items() if k not in forgotten.split()}

    kept(job(), whole(job()), "right")
    kept(job(), short(job()), "wrong")
    assert same(kept(other, whole(other), "right"), fresh)
    assert not same(kept(other, short(other), "wrong"), fresh)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("how", [pytest.param("cut", marks=pytest.mark.slow), "flipped"])
def test_a_run_with_a_damaged_entry_has_the_numbers_of_a_fresh_run_and_a_flag(go, tmp_path, how):
    few = ("control=false", "images=2")
    go(*few, out="a")
    (path,) = (tmp_path / "store").iterdir()
    damage(path, how)
    assert go(*few, out="b")[0] == 0
    rows, run = outcome(tmp_path / "b")
    first_rows, first = outcome(tmp_path / "a")
    assert rows == first_rows
    said = f"store: store/{path.name} is damaged; it was trained anew"
    assert run["flags"] == [*first["flags"][:-1], said, first["flags"][-1]] or said in run["flags"]
    assert run["utility"] == first["utility"]


def test_a_store_that_cannot_be_used_is_one_flag(go, tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = go("control=false", "images=2", "store=file/store")
    assert (status, err) == (0, "")
    said = "store: file/store cannot be used (Not a directory); it was trained without it"
    assert said in tiny.whole(tmp_path / "out")["flags"]
    assert "cannot be used (Not a directory)" in " ".join(out.split())


def test_a_killed_run_does_not_train_again_and_reuses_nobodys(go, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_attack", interrupted)
        assert go("control=false", "images=2")[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "accuracy", lambda *_: pytest.fail("trained again"))
        assert go("control=false", "images=2")[0] == 0
    assert reused(tmp_path / "out") == {"none": False}


def test_the_default_store_lies_beside_the_outputs(go, tmp_path):
    assert go("control=false", "images=2", "store=auto")[0] == 0
    assert len(list((tmp_path / "outputs/.store").iterdir())) == 1
    status, _, err = go("store=")
    assert (status, err) == (
        1,
        "error: store: must name a folder, or be auto or null, got nothing\n",
    )


@pytest.mark.slow
def test_a_sweep_trains_each_federation_once(go, tmp_path):
    grid = ("attack=inverting,dlg", "defense=prune,noise", "seed=0,1", "images=2", "rounds=2")
    status, out, err = go("-m", *grid, "store=auto", out="kept")
    assert (status, err) == (0, "")
    assert "sweep        8 cells: 8 done\nfederations  6 trained, 10 reused\n" in out
    assert len(list((tmp_path / "kept/.store").iterdir())) == 6
    assert go("-m", *grid, "store=null", out="fresh")[0] == 0
    for cell in sorted((tmp_path / "fresh").glob("0*")):
        assert outcome(tmp_path / "kept" / cell.name) == outcome(cell)


@pytest.mark.slow
def test_two_processes_that_start_together_train_once(tmp_path):
    """On the command line, with different attacks on one federation."""
    words = [w for w in tiny.words(tmp_path, "rounds=20", "images=2", "control=false")
             if not w.startswith(("store=", "out="))]  # fmt: skip
    runs = [tiny.spawn([*words, f"attack={a}", f"out={a}", "store=store"], tmp_path)
            for a in ("inverting", "dlg", "idlg")]  # fmt: skip
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert (run.returncode, err) == (0, "")
    trained = [not reused(tmp_path / a)["none"] for a in ("inverting", "dlg", "idlg")]
    assert sum(trained) == 1


@pytest.mark.slow
def test_six_attacks_on_eight_defenses_with_three_seeds_train_24_federations(go, tmp_path):
    attacks = "inverting,inverting_signed,dlg,idlg,cpl,gradinversion"
    defenses = "prune,sign,quantize,clip,noise,censor,dropout,ats"
    words = ("-m", f"attack={attacks}", f"defense={defenses}", "seed=0,1,2", "images=1")
    status, out, _ = go(*words, "rounds=1", "store=auto", "control=false", steps=1, out="all")
    assert status == 0
    assert "sweep        144 cells: 144 done\nfederations  24 trained, 120 reused\n" in out


# ---- list, verify, prune


@pytest.fixture
def shelf(tmp_path):
    """Three entries of 1, 2 and 3 days ago, and what a killed process left."""
    for seed in range(3):
        once(tmp_path, {"seed": seed}, value=0.25)
        path, ago = Store(tmp_path).path({"seed": seed}), time.time() - 86400 * (seed + 1)
        os.utime(path, (ago, ago))
    for name in ("a-0.half", ".b-0.half", "c.lock"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "young.lock").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def there(shelf: Path) -> set[int]:
    return {seed for seed in range(3) if Store(shelf).path({"seed": seed}).exists()}


def called(capsys, *words: object) -> tuple[int, list[str], str]:
    status = store.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_a_store_is_listed_by_last_use(shelf, capsys):
    status, lines, err = called(capsys, "list", shelf)
    assert (status, err) == (0, "")
    assert [line[:12] for line in lines[1:4]] == [
        Store(shelf).path({"seed": seed}).stem[:12] for seed in range(3)
    ]
    assert "25.0 %" in lines[1]
    assert lines[1].endswith("data=tiny defense=none")
    assert re.fullmatch(r".*: 3 federations, [\d.]+ kB, 0 damaged", lines[4])
    assert lines[5] == "3 files were left by killed processes; prune removes them"


def test_verify_names_what_is_damaged(shelf, capsys):
    assert called(capsys, "verify", shelf)[0] == 0
    path = Store(shelf).path({"seed": 1})
    damage(path, "flipped")
    status, lines, _ = called(capsys, "verify", shelf)
    assert status == 2
    assert lines[0].endswith("1 damaged")
    assert lines[1] == f"damaged: {path}; it will be trained anew, or prune removes it"
    assert called(capsys, "list", shelf)[0] == 0


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], {0, 1, 2}),
        (["--unused", "1.5"], {0}),
        (["--unused", "9"], {0, 1, 2}),
        (["--age", "0"], set()),
        (["--age", "1"], {0, 1, 2}),  # all were written just now
        (["--size", "0kB"], set()),
        (["--size", "1TB"], {0, 1, 2}),
    ],
)
def test_prune_removes_what_it_says(shelf, capsys, words, left):
    status, lines, _ = called(capsys, "prune", shelf, *words, "--dry-run")
    assert (status, there(shelf)) == (0, {0, 1, 2})
    assert len(list(shelf.iterdir())) == 8
    assert all(line.startswith("would remove") for line in lines[:-1])
    status, lines, _ = called(capsys, "prune", shelf, *words)
    assert (status, there(shelf)) == (0, left)
    assert len(lines) == 3 + 3 - len(left) + 1
    assert (shelf / "notes.txt").exists()
    assert (shelf / "young.lock").exists(), "perhaps somebody holds it"
    assert len(list(shelf.iterdir())) == 2 + len(left)


def test_prune_by_size_keeps_what_was_used_last(shelf, capsys):
    size = Store(shelf).path({"seed": 0}).stat().st_size
    assert called(capsys, "prune", shelf, "--size", f"{2.5 * size / 1000}kB")[0] == 0
    assert there(shelf) == {0, 1}


def test_using_an_entry_spares_it(shelf, capsys):
    once(shelf, {"seed": 2})
    called(capsys, "prune", shelf, "--unused", "1.5")
    assert there(shelf) == {0, 2}


def test_prune_removes_damaged_entries(shelf, capsys):
    damage(Store(shelf).path({"seed": 1}), "cut")
    assert called(capsys, "prune", shelf)[0] == 0
    assert there(shelf) == {0, 2}


@pytest.mark.parametrize(
    "words", [["prune", "--size", "many"], ["prune", "--age", "-1"], ["mend"], []]
)
def test_wrong_words_are_refused(tmp_path, capsys, words):
    assert called(capsys, *words[:1], *([tmp_path] * bool(words)), *words[1:])[0] == 1


def test_a_folder_that_is_no_store_is_refused_in_one_line(tmp_path, capsys):
    for command in ("list", "verify", "prune"):
        status, _, err = called(capsys, command, tmp_path / "none")
        assert (status, err) == (1, f"error: folder: must be a store, got {tmp_path}/none\n")


def test_the_command_runs_as_a_module(shelf):
    done = subprocess.run([sys.executable, "-m", "fedsec.store", "list", str(shelf)],
                          env=tiny.ENV, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 federations" in done.stdout

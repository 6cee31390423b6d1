"""The command line: what it writes, what it refuses in one line, and how it ends."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from fedsec import config, experiment, federation, process, records, report
from fedsec.console import Console
from fedsec.privacy import POOLS
from fedsec.run import CONFIGS, prepared
from fedsec.threat import admit

FILES = {"run.json", "records.jsonl", "config.yaml", "grid.png", "report.html"}
ROW = {
    *("run", "attack", "defense", "threat", "client", "data", "model", "seed", "round", "victim"),
    *("image", "batch", "psnr", "ssim", "mse", "lpips", "null_psnr", "label_true", "label_pred"),
    *("label_ok", "loss", "steps", "seconds", "gflop", "backprops", "peak_mb", "flags"),
}
RUN = {
    "status": (),
    "utility": ("accuracy", "control_accuracy", "accuracy_loss"),
    "privacy": ("epsilon", "delta", "accountant"),
    "cost": ("federate_seconds", "attack_seconds", "seconds_per_image", "gflop_per_image",
             "backprops_per_image", "peak_mb", "device"),
    "nulls": (), "grants": (), "flags": (), "commit": (), "versions": (), "command": (),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _signals():
    """The command line takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """Run words on tiny images in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*more: str, **how) -> tuple[int, str, str]:
        capsys.readouterr()
        status = tiny.call(monkeypatch, tiny.words(tmp_path, *more, **how))
        return status, *capsys.readouterr()

    return run


# ---------------------------------------------------------------- what a run writes


def strict(text: str):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_an_informed_adversary_names_stands_beside_the_bound(go, tmp_path):
    words = ("attack=candidates", "threat=informed_labels", "candidates=12", "defense=dpsgd")
    more = ("defense.noise_multiplier=0.001", "rounds=0", "control=false")
    status, out, err = go(*words, *more, steps=0)
    assert (status, err) == (0, "")
    written = strict((tmp_path / "out" / "run.json").read_text())["privacy"]
    (found,) = written["measured"]
    assert found["name"] == "naming 1 of 12"
    assert found["right"] == found["made"] > 0  # hardly any noise
    assert (found["value"], found["bound"], found["chance"]) == (1.0, 1.0, 1.0)
    assert "what is proven at most, and what was measured" in out
    assert re.search(r"naming 1 of 12 .* 100 % \[", out)


def test_a_pool_has_the_size_that_bounds_are_said_of(go, tmp_path):
    words = ("attack=candidates", "threat=informed_labels", "defense=dpsgd", "rounds=0")
    status, _, err = go(*words, "candidates=2", "victim_batch=2", steps=0)
    assert status == 1
    assert line(err) == "candidates: must be above the 2 images behind an update, got 2"
    assert go(*words, "candidates=5000", "control=false", steps=0)[0] == 0
    written = strict((tmp_path / "out" / "run.json").read_text())["privacy"]
    assert written["measured"][0]["name"] == "naming 1 of 80"  # as many as there are


def test_a_run_writes_what_the_contract_says(go, tmp_path):
    status, out, err = go("defense=dpsgd", "rounds=2")
    assert (status, err) == (0, "")
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == FILES
    written = strict((folder / "run.json").read_text())
    for key, inner in RUN.items():
        assert key in written
        assert set(inner) <= set(written[key] or ())
    assert written["status"] == "done"
    assert written["utility"]["accuracy_loss"] == pytest.approx(
        written["utility"]["control_accuracy"] - written["utility"]["accuracy"]
    )
    assert written["privacy"]["epsilon"] > 0
    assert written["privacy"]["accountant"] == "PRV"
    assert written["privacy"]["mechanism"]["steps"] == 2
    whole, one = (written["privacy"][key] for key in ("formal", "formal_update"))
    assert whole[0] == {"name": "epsilon", "value": written["privacy"]["epsilon"],
                        "how": "PRV (Gopi et al. 2021)", "kind": "bound"}  # fmt: skip
    assert [line["name"] for line in one[-4:]] == ["mu", *(f"naming 1 of {k}" for k in POOLS)]
    assert one[-4]["value"] == 1.0  # noise 1, no sampling, one step
    assert one[-3]["value"] == pytest.approx(0.3891, abs=5e-5)
    assert len(written["nulls"]) == 3
    rows = [strict(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert all(set(row) >= ROW for row in rows)
    assert [row["defense"] for row in rows] == ["none"] * 4 + ["dpsgd"] * 4
    assert [row["image"] for row in rows[:4]] == [row["image"] for row in rows[4:]]
    assert all(row["mse"] == pytest.approx(10 ** (-row["psnr"] / 10), rel=1e-4) for row in rows)
    mean = np.mean([row["psnr"] for row in rows[:4]])
    assert f"mean PSNR {mean:.1f} dB" in out
    assert f"accuracy {100 * written['utility']['accuracy']:.1f} %" in out
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > grid.height / 2


def test_a_missing_value_has_its_reason(go, tmp_path):
    assert go("defense=noise", "control=false")[0] == 0
    written, rows = tiny.whole(tmp_path / "out"), tiny.rows(tmp_path / "out")
    assert [row["defense"] for row in rows] == ["noise"] * 4
    assert written["utility"]["control_accuracy"] is None
    flags = " ".join(written["flags"])
    for name in ("control_accuracy", "accuracy_loss", "epsilon", "delta", "accountant"):
        assert name in flags


def test_the_undefended_run_is_its_own_control(go, tmp_path):
    assert go()[0] == 0
    written = tiny.whole(tmp_path / "out")
    assert [row["defense"] for row in tiny.rows(tmp_path / "out")] == ["none"] * 4
    assert written["utility"]["accuracy"] == written["utility"]["control_accuracy"]
    assert written["utility"]["accuracy_loss"] == 0


def test_the_same_words_give_the_same_numbers(go, tmp_path):
    for out in ("one", "two"):
        assert go("defense=[mixup,noise]", "victim_batch=4", out=out)[0] == 0
    assert go("defense=[mixup,noise]", "victim_batch=4", "seed=1", out="three")[0] == 0
    one, two, three = (tiny.numbers(tmp_path / out) for out in ("one", "two", "three"))
    assert one == two
    assert [row["psnr"] for row in one] != [row["psnr"] for row in three]
    same = ("utility", "privacy", "nulls", "grants", "flags")
    runs = [tiny.whole(tmp_path / out) for out in ("one", "two")]
    assert all(runs[0][key] == runs[1][key] for key in same)
    assert (tmp_path / "one/grid.png").read_bytes() == (tmp_path / "two/grid.png").read_bytes()


def test_the_control_does_not_depend_on_the_defense(go, tmp_path):
    """Every draw has its own stream: another defense shifts nobody's noise."""
    for defense in ("dpsgd", "prune"):
        assert go(f"defense={defense}", out=defense)[0] == 0
    one, other = (tiny.numbers(tmp_path / d)[:4] for d in ("dpsgd", "prune"))
    assert one == other


def test_config_yaml_and_the_command_give_the_run_again(go, tmp_path, monkeypatch):
    assert go("defense=[prune,noise]", "defense.prune.ratio=0.3")[0] == 0
    folder = tmp_path / "out"
    choices = tiny.whole(folder)["choices"]
    settings = config.settings(OmegaConf.load(folder / "config.yaml"), choices)
    assert settings.defense.parts[0].ratio == 0.3
    plan = experiment.plan(settings, {}, tmp_path / "again", "", "")
    assert experiment.perform(plan, Console()) == 0
    assert tiny.numbers(tmp_path / "again") == tiny.numbers(folder)
    python, dash, module, *words = shlex.split(tiny.whole(folder)["command"])
    assert [python, dash, module] == ["python", "-m", "fedsec.run"]
    assert tiny.call(monkeypatch, [*words, f"out={tmp_path / 'third'}"]) == 0
    assert tiny.numbers(tmp_path / "third") == tiny.numbers(folder)


def test_attacking_several_rounds(go, tmp_path):
    assert go("rounds=2", "attack_rounds=[0,2]")[0] == 0
    rows = tiny.rows(tmp_path / "out")
    assert [row["round"] for row in rows] == [0] * 4 + [2] * 4
    assert [row["victim"] for row in rows] == list(range(8))
    first, later = ([row["image"] for row in rows[i : i + 4]] for i in (0, 4))
    assert first == later
    assert rows[0]["psnr"] != rows[4]["psnr"]


def test_attacking_the_training_exchanges(go, tmp_path):
    assert go("victim_batch=same", "client=fedavg", "client.steps=2", "images=10")[0] == 0
    rows = tiny.rows(tmp_path / "out")
    assert [row["batch"] for row in rows] == [8] * 16  # whole updates, until there are ten images
    assert len({row["image"] for row in rows}) == 16


@pytest.mark.parametrize(
    ("words", "flagged"),
    [
        (("victim_batch=same",), True),
        (("victim_batch=same", "threat=eavesdropper"), False),  # local steps are not known of
        (("victim_batch=same", "client=gradient"), False),
        (("victim_batch=2",), False),
    ],
)
def test_local_steps_that_poisson_sampling_makes_uneven_are_flagged(go, tmp_path, words, flagged):
    client = () if "client=gradient" in words else ("client=fedavg", "client.steps=2")
    assert go("defense=dpsgd", "control=false", *client, *words)[0] == 0
    flags = [f for f in tiny.whole(tmp_path / "out")["flags"] if "[uneven-steps]" in f]
    assert bool(flags) == flagged
    assert all(f.startswith("dpsgd: the attack took each local step for one of") for f in flags)


def test_secure_aggregation_attacks_the_sum(go, tmp_path):
    assert go("threat=secure_aggregation", "victim_batch=2", "images=8")[0] == 0
    rows = tiny.rows(tmp_path / "out")
    assert [row["batch"] for row in rows] == [4] * 8
    assert len({row["image"] for row in rows}) == 8


def test_each_defense_that_draws_its_own_batches_is_shown_over_its_own_originals(go, tmp_path):
    assert go("victim_batch=same", "defense=dpsgd", "images=8", "client.batch=8")[0] == 0
    rows = tiny.rows(tmp_path / "out")
    control, defended = ([r["image"] for r in rows if r["defense"] == d] for d in ("none", "dpsgd"))
    assert control != defended
    with Image.open(tmp_path / "out/grid.png") as grid:
        titles = [row["title"] for row in json.loads(grid.text["fedsec"])["rows"]]
    assert titles == ["original", "none (control)", "original, dpsgd", "dpsgd"]


def test_a_third_party_brings_its_own_folder(go, tmp_path):
    (tmp_path / "mine/attack").mkdir(parents=True)
    text = (CONFIGS / "attack/inverting.yaml").read_text()
    (tmp_path / "mine/attack/theirs.yaml").write_text(text)
    assert go("--config-dir", "mine", "attack=theirs")[0] == 0
    assert {row["attack"] for row in tiny.rows(tmp_path / "out")} == {"theirs"}
    words = shlex.split(tiny.whole(tmp_path / "out")["command"])[3:]
    assert go(*(word for word in words if not word.startswith("out=")), out="again")[0] == 0
    assert tiny.numbers(tmp_path / "again") == tiny.numbers(tmp_path / "out")


def test_without_out_each_run_gets_a_folder_of_its_own(go, tmp_path):
    for _ in range(2):
        assert go("out=null", "defense=prune")[0] == 0
    names = [p.name for p in sorted((tmp_path / "outputs").glob("*/*"))]
    assert names == ["inverting-prune-0", "inverting-prune-0-2"]


def test_a_default_folder_taken_meanwhile_is_passed_over(go, tmp_path, monkeypatch):
    plan = experiment.plan

    def other_run_first(settings, presets, folder, *rest):
        planned = plan(settings, presets, folder, *rest)
        records.open_folder(folder)
        return planned

    monkeypatch.setattr(experiment, "plan", other_run_first)
    assert go("out=null")[0] == 0
    (day,) = (tmp_path / "outputs").iterdir()
    found = {p.name: {f.name for f in p.iterdir()} for p in day.iterdir()}
    assert found == {"inverting-none-0": {"config.yaml"}, "inverting-none-0-2": FILES}
    status, _, err = go(out="named")
    assert (status, line(err)) == (1, f"out: must be empty or new, got {tmp_path / 'named'}")


def test_an_empty_output_folder_may_be_there(go, tmp_path):
    (tmp_path / "out").mkdir()
    assert go()[0] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES


ODD = "ünï ~(a){b}='[c]\"#,d$e:f%*?!&;|<\\>@`^.x"


def test_every_path_that_the_disk_takes_can_be_named(go, tmp_path):
    tiny.npz(tmp_path).rename(tmp_path / f"{ODD}.npz")
    assert go("data=npz", f"data.path={ODD}.npz", out=ODD)[0] == 0
    assert {p.name for p in (tmp_path / ODD).iterdir()} == FILES
    again = shlex.split(tiny.whole(tmp_path / ODD)["command"])[3:]
    assert go(*again, out="two")[0] == 1  # out= is said again, and later: the folder is in use
    assert go(*(word for word in again if not word.startswith("out=")), out="two")[0] == 0
    assert tiny.numbers(tmp_path / "two") == tiny.numbers(tmp_path / ODD)


def test_the_report_reads_what_runs_write(go, tmp_path, capsys):
    assert go("defense=prune", out="all/a")[0] == 0
    assert go("defense=noise", out="all/b")[0] == 0
    assert report.main([str(tmp_path / "all")]) == 0
    assert "prune" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "all/report.html").read_text()


# ---------------------------------------------------------------- sweeps


def test_a_sweep_writes_a_folder_for_each_cell(go, tmp_path):
    status, _, err = go("-m", "seed=0,1", "defense=none,prune", "images=2")
    assert (status, err) == (0, "")
    names = {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert names == {"000-inverting-none-0", "001-inverting-prune-0",
                     "002-inverting-none-1", "003-inverting-prune-1"}  # fmt: skip
    for name in names:
        assert tiny.whole(tmp_path / "out" / name)["status"] == "done"


def test_a_sweep_takes_odd_paths_and_a_home_folder(go, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.npz(tmp_path).rename(tmp_path / "ä.npz")
    tiny.npz(tmp_path)
    words = ("-m", "data=npz", "data.path=ä.npz,~/tiny.npz", "images=2", "control=false")
    assert go(*words, "out=~/a (b),c")[0] == 0
    cells = [p for p in (tmp_path / "a (b),c").iterdir() if p.is_dir()]
    assert {tiny.whole(cell)["status"] for cell in cells} == {"done"}
    assert len(cells) == 2


def test_a_sweep_without_a_cell_leaves_nothing(go, tmp_path):
    tiny.npz(tmp_path)
    wrong = ("-m", "attack.steps=0,-1")
    assert go(*wrong, out="deep/out")[0] == 1
    assert go(*wrong, "out=null")[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.npz"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/multirun.yaml").write_text("mine")
    (tmp_path / "mine/note.txt").write_text("mine")
    assert go(*wrong, out="mine")[0] == 1
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"multirun.yaml", "note.txt"}


def test_sweeps_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {word for _ in range(2) for word in prepared(["-m", "seed=0,1"]) if "out=" in word}
    assert {word[-7:] for word in folders} == {"sweep-1", "sweep-2"}


def test_a_cell_that_is_refused_or_fails_does_not_stop_the_others(go, tmp_path, monkeypatch):
    rule = "attack.steps: must be at least 1, got 0"
    status, out, err = go("attack.steps=0,1", "-m", "images=2")
    assert (status, err) == (2, f"error: {rule}\n")
    refused, cell = sorted(p for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert tiny.whole(cell)["status"] == "done"
    assert [p.name for p in refused.iterdir()] == ["error.txt"]
    assert (refused / "error.txt").read_text() == f"error: {rule}\n"
    assert out.splitlines()[-1] == f"refused      {refused.name}: {rule}"

    class Cursed(Exception):
        pass

    def break_on_seed(job, *rest):
        if job.seed == 0:
            raise Cursed("seed 0")
        return federate(job, *rest)

    federate = experiment.federate
    monkeypatch.setattr(experiment, "federate", break_on_seed)
    status, out, err = go("-m", "seed=0,1", "images=2", out="failing")
    assert status == 2
    assert "Cursed: seed 0" in err
    states = {p.name[:3]: tiny.whole(p)["status"] for p in (tmp_path / "failing").glob("0*")}
    assert states == {"000": "failed", "001": "done"}
    failed = tmp_path / "failing/000-inverting-none-0"
    assert "Cursed: seed 0" in (failed / "error.txt").read_text()
    assert out.splitlines()[-1] == f"failed       {failed.name}: Cursed: seed 0"


def test_an_interruption_ends_the_sweep_too(go, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "federate", interrupt)
    status, out, err = go("-m", "seed=0,1,2", "images=2")
    assert (status, err) == (130, "")
    assert len(list((tmp_path / "out").glob("0*"))) == 1
    assert "interrupted: what was finished is kept" in out


# What each cell of sweep=assumptions changes, and in which other cell.
ASSUMPTIONS = {
    "realistic": ("realistic", set()),
    "labels_known": ("realistic", {"threat"}),
    "batch4": ("realistic", {"victim_batch", "images"}),
    "batch4_labels_known": ("batch4", {"threat"}),
    "local_steps": ("realistic", {"client"}),
    "resnet20": ("realistic", {"model", "images", "rounds", "attack_rounds"}),
    "eval_mode": ("resnet20", {"model", "rounds", "attack_rounds"}),
    "statistics_none": ("resnet20", {"attack"}),
    "statistics_running": ("statistics_none", {"attack"}),
    "statistics_inferred": ("statistics_none", {"attack"}),
    "statistics_exact": ("statistics_none", {"attack", "threat"}),
}


def test_a_named_sweep_runs_its_cells_with_the_overrides_of_the_command_line(go, tmp_path):
    wanted = ("sweep=assumptions", "assumption=realistic,labels_known", "images=2")
    status, _, err = go(*wanted, "rounds=0", "attack_rounds=[0]", steps=1)
    assert (status, err) == (0, "")
    cells = sorted(p for p in (tmp_path / "out").iterdir() if p.is_dir())
    threats = [[row["threat"] for row in tiny.rows(cell)] for cell in cells]
    assert threats == [["honest_server"] * 2, ["known_labels"] * 2]
    command = shlex.split(tiny.whole(cells[1])["command"])  # of this cell alone
    assert "assumption=labels_known" in command
    assert f"out={cells[1]}" in command


@pytest.mark.parametrize("how", ["named", "typed"])
def test_a_cells_command_runs_just_that_cell_again(go, tmp_path, monkeypatch, how):
    """A sweep's file may set more than what it sweeps over, and choose options."""
    (tmp_path / "mine/sweep").mkdir(parents=True)
    (tmp_path / "mine/sweep/theirs.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /defense: prune\n"
        "images: 2\ndefense:\n  ratio: 0.3\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 3,4\n"
    )
    words = ("--config-dir", "mine", "sweep=theirs") if how == "named" else ("-m", "seed=3,4")
    path = tmp_path / "mine" / "it's, tiny.npz"
    tiny.npz(tmp_path).rename(path)
    small = [w for w in tiny.words(tmp_path, "data=npz") if not w.startswith(("images=", "data="))]
    line = [*small, "data=npz", f"data.path={path}", *words]
    assert tiny.call(monkeypatch, line) == 0
    cells = sorted(p for p in (tmp_path / "out").iterdir() if p.is_dir())
    kept = [(tiny.numbers(cell), tiny.whole(cell), (cell / "config.yaml").read_text())
            for cell in cells]  # fmt: skip
    assert [run["command"].count("seed=") for _, run, _ in kept] == [1, 1]
    assert kept[0][0] != kept[1][0]
    shutil.rmtree(tmp_path / "out")
    for cell, (numbers, run, _) in zip(cells, kept, strict=True):
        python, dash, module, *again = shlex.split(run["command"])
        assert [python, dash, module] == ["python", "-m", "fedsec.run"]
        assert tiny.call(monkeypatch, again) == 0
        assert tiny.numbers(cell) == numbers
        assert {row["defense"] for row in tiny.rows(cell)} >= (
            {"prune"} if how == "named" else {"none"}
        )
        assert len({row["image"] for row in tiny.rows(cell)}) == (2 if how == "named" else 8)
        assert tiny.whole(cell)["command"] == run["command"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {cell.name for cell in cells}


def test_the_sweep_over_defenses_has_each_with_and_without_knowledge_of_it(go, tmp_path):
    params = OmegaConf.load(CONFIGS / "sweep/defenses.yaml").hydra.sweeper.params
    there = {path.stem for path in (CONFIGS / "defense").glob("*.yaml")} - {"composed"}
    assert set(params.defense.split(",")) == there
    naive, knowing = (OmegaConf.load(CONFIGS / f"threat/{name}.yaml").grants
                      for name in params.threat.split(","))  # fmt: skip
    assert set(knowing) - set(naive) == {"defense"}
    assert not set(naive) - set(knowing)
    wanted = ("defense=prune", "seed=0", "images=4", "victim_batch=2", "attack.budget=10")
    status, out, err = go("sweep=defenses", *wanted, "rounds=1", steps=0)
    assert (status, err) == (0, ""), out
    cells = sorted(p for p in (tmp_path / "out").iterdir() if p.is_dir())
    threats = [[row["threat"] for row in tiny.rows(cell)] for cell in cells]
    assert threats == [["naive_server"] * 4, ["honest_server"] * 4]
    command = tiny.whole(cells[1])["command"]  # this cell's, whole
    assert "attack=auto" in command
    assert "control=False" in command


def test_each_assumption_is_a_run_that_changes_one_thing():
    def composed(name: str) -> tuple[dict, dict]:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("run", [f"assumption={name}"], return_hydra_config=True)
        names = {group: cfg.hydra.runtime.choices[group] for group in config.GROUPS}
        cfg = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
        assert isinstance(cfg, DictConfig)
        found = config.settings(cfg, names)
        admit(names["attack"], found.attack.needs, found.threat, {}, found.attack.tampers)
        plain = OmegaConf.to_container(cfg)
        assert isinstance(plain, dict)
        return plain, names

    params = OmegaConf.load(CONFIGS / "sweep/assumptions.yaml").hydra.sweeper.params
    assert params.assumption.split(",") == list(ASSUMPTIONS)
    assert {path.stem for path in (CONFIGS / "assumption").glob("*.yaml")} == set(ASSUMPTIONS)
    for name, (other, keys) in ASSUMPTIONS.items():
        (one, ours), (two, theirs) = composed(name), composed(other)
        assert {k for k in one if one[k] != two[k]} == keys, name
        assert {k for k in ours if ours[k] != theirs[k]} <= keys, name


# ---------------------------------------------------------------- refusals


def line(err: str) -> str:
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err.removeprefix("error: ").rstrip("\n")


REFUSED = [
    # unknown options, groups, keys and flags
    ("attack=nope", r"attack: must be among april, .*, linear, .*, rgap, .*, got nope"),
    ("defense=nope", r"defense: must be among ats, .*, got nope"),
    ("threat=nope", r"threat: must be among eavesdropper, .*, got nope"),
    ("data=nope", r"data: must be among cifar10, .*, got nope"),
    ("model=nope", r"model: must be among cnn6, .*, got nope"),
    ("federation=nope", r"federation: must be among inline, ray, got nope"),
    ("defense=[prune,nope]", r"defense: must be among ats, .*, got nope"),
    ("nope=dlg", r"nope: no such key, got dlg"),
    ("attack.nope=1", r"attack\.nope: no such key, got 1"),
    ("+attack.nope=1", r"attack\.nope: no such key; there are: rule, steps, lr, tv, .*, got 1"),
    ("+nope=1", r"nope: no such key; there are: images, .*, got 1"),
    ("--nope", r"command line: must be key=value, or among -m, .*, got --nope"),
    ("-x", r"command line: .*, got -x"),
    # malformed words
    ("images", r"command line: must be key=value, got images"),
    ("images=[", r"command line: must be key=value, got images=\["),
    ("images==4", r"command line: must be key=value, got images==4"),
    ("=4", r"command line: .*"),
    ("{", r"command line: must be key=value, got \{"),
    ("", r"command line: must be key=value, got nothing"),
    ("attack=null", r"attack: must name an option, got null"),
    ("attack=", r"attack: must be among .*, got nothing"),
    ("attack=inverting,dlg", r"attack: takes one value; sweep over several with -m, got .*"),
    ("defense=prune,noise", r"defense: .* defense=\[prune,noise\], got prune,noise"),
    ("attack=[dlg,idlg]", r"attack: takes one option; .*"),
    ("defense=[prune,prune]", r"defense: must name different defenses, got prune,prune"),
    ("defense=[]", r"defense: must name different defenses, got \[\]"),
    ("--cfg=nope", r"--cfg: must be among job, hydra, all, got nope"),
    ("--config-dir=/nope", r"--config-dir: must be a folder, got /nope"),
    # wrong types
    ("attack.steps=abc", r"attack\.steps: must be of type int, got abc"),
    ("attack.steps=1.5", r"attack\.steps: must be of type int, got 1\.5"),
    ("images=null", r"images: must be of type int, got null"),
    ("control=maybe", r"control: must be of type bool, got maybe"),
    ("attack_rounds=0", r"attack_rounds: must be a list of type int, .*, got 0"),
    ("attack_rounds=[a]", r"attack_rounds: must be a list of type int, .*, got \['a'\]"),
    ("victim_batch=some", r"victim_batch: must be a number or same, got some"),
    # out of range
    ("attack.steps=0", r"attack\.steps: must be at least 1, got 0"),
    ("attack.halving=2", r"attack\.halving: must be true or false, got 2"),
    ("data.path=~nosuch/x", r"data\.path: must be in a home folder that exists, got ~nosuch/x"),
    ("attack.lr=nan", r"attack\.lr: must be .*, got nan"),
    ("attack.lr=inf", r"attack\.lr: must be .* finite, got inf"),
    ("attack.tv=inf", r"attack\.tv: must .* finite, got inf"),
    ("attack=sme attack.labels=idlg victim_batch=2",
     r"attack\.labels: idlg tells one image's label; auto serves batches, got 2"),
    ("attack.labels=idlg threat=secure_aggregation",
     r"attack\.labels: idlg tells one image's label; auto serves batches, got 2"),
    ("attack.labels=yin client=fedavg client.steps=3 victim_batch=same",
     r"attack\.labels: yin finds different labels, at most 4 here; auto .*, got 12"),
    ("images=0", r"images: must be at least 1, got 0"),
    ("images=5000", r"images: the clients hold 80 in batches of 1, got 5000"),
    ("rounds=-1", r"rounds: must not be negative, got -1"),
    ("attack_rounds=[2]", r"attack_rounds: must be within 0 and rounds=1, got 2"),
    ("attack_rounds=[0,0]", r"attack_rounds: must differ, got \[0, 0\]"),
    ("attack_rounds=[]", r"attack_rounds: must name at least one round, got \[\]"),
    ("victim_batch=0", r"victim_batch: must be at least 1, got 0"),
    ("victim_batch=3", r"images: must be a multiple of victim_batch=3, got 4"),
    ("victim_batch=same attack_rounds=[1]", r"attack_rounds: must be training rounds .*"),
    ("clients=0", r"clients: must be at least 1, got 0"),
    ("clients=81", r"clients: must be at most the 80 training images, got 81"),
    ("stack=0", r"stack: must be at least 1, got 0"),
    ("threads=0", r"threads: must be at least 1, got 0"),
    ("threads=many", r"threads: must be a number or auto, got many"),
    ("threads=100000", r"threads: must be at most \d+ here, got 100000"),
    ("device=tpu", r"device: must be auto, cpu or cuda, got tpu"),
    ("client.lr=0", r"client\.lr: must be above 0 and finite, got 0\.0"),
    ("model.mode=odd", r"model\.mode: must be among train, eval, got odd"),
    ("federation.split=odd", r"federation\.split: must be among iid, .*, got odd"),
    ("federation.strategy=odd", r"federation\.strategy: must be among fedavg, .*, got odd"),
    ("federation.split=shards federation.shards=99", r"federation\.shards: .*99 x 2.*"),
    ("defense=prune defense.ratio=1", r"defense\.ratio: must be in \[0, 1\), got 1\.0"),
    ("defense=[prune,noise] defense.prune.ratio=2", r"defense\.prune\.ratio: .*, got 2\.0"),
    ("defense=[prune,noise] defense.noise.std=x", r"defense\.noise\.std: .*, got x"),
    # what does not go together, and the way out
    ("attack=idlg threat.grants=[update]",
     r"threat: attack=idlg needs 'count', 'model', 'shape'; use threat=.*honest_server.*"),
    ("attack=linear model=mlp threat=eavesdropper",
     r"threat: attack=linear needs 'data_range'; use threat=honest_server or .*got eavesdropper, "
     r"which grants count, model, shape, update"),
    ("threat.grants=[pixels]", r"threat\.grants: must be among model, .*, got pixels"),
    ("threat.grants=[]", r"threat\.grants: must name at least one fact.*"),
    ("threat=secure_aggregation images=3",
     r"images: must be a multiple of clients x victim_batch = 2: only sums show, got 3"),
    ("attack=linear", r"model: attack=linear needs .* first layer .*\(model=mlp\).*"),
    ("defense=dpsgd model=resnet20 model.width=2",
     r"model\.norm: dpsgd .* use model\.norm=group or model\.norm=none, got BatchNorm2d"),
    ("defense=dpsgd defense.delta=0.5",
     r"defense\.delta: must be below 1/\d+, .*; lower it, .*, got 0\.5"),
    ("defense=[prune,dpsgd] model=resnet20 model.width=2", r"model\.norm: dpsgd .*"),
    ("defense=mixup", r"victim_batch: mixup needs at least 4 images in a batch; .*, got 1"),
    ("defense=mixup victim_batch=4 client.batch=2", r"client\.batch: mixup needs .*, got 2"),
    ("defense=mixup victim_batch=6 images=6 client=fedavg", r"victim_batch: mixup .*, got 2"),
    ("client=fedavg client.steps=1 victim_batch=8 images=8",
     r"victim_batch: must be at most client.steps x client.batch = 4, .*, got 8"),
    ("model.mean=[0.5]", r"model\.mean: must have one value for each of 3 channels, got 1"),
    ("data=photos data.size=8 model=convnet model.width=2", r"model: convnet needs .*, got 8 x 8"),
    # files that are not there
    ("data=npz data.path=null", r"data\.path: has to be given: an \.npz file, got null"),
    ("data=npz data.path=gone.npz", r"data\.path: must be an \.npz file that exists, got gone.npz"),
    ("data=folder data.path=gone", r"data\.path: must be a folder .*, got gone"),
    ("data=cifar10", r"data\.root: must hold cifar10 .* data\.download=true.*, got data"),
    ("model.weights=gone", r"model\.weights: must be a file that exists, got gone"),
    ("out=", r"out: must name a folder, got nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "rule"), REFUSED, ids=[words for words, _ in REFUSED])
def test_wrong_input_is_one_line_and_nothing_is_written(go, tmp_path, words, rule):
    tiny.npz(tmp_path)
    steps = 0 if "attack=linear" in words else 2
    status, _, err = go(*(words.split(" ") if words else [""]), steps=steps)
    assert status == 1
    assert re.fullmatch(rule, line(err)), err
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.npz"]


BROKEN = {
    "no train_labels": ({"train_labels": None}, r".*must hold train_labels.*"),
    "too few labels": ({"train_labels": np.arange(5)}, r"train_labels of .* must be as many as .*"),
    "labels out of range": ({"test_labels": np.full(24, 9)}, r"test_labels .* in \[0, 4\), got 9"),
    "negative labels": ({"test_labels": np.full(24, -1)}, r"test_labels of .* negative, got -1"),
    "labels of floats": ({"train_labels": np.zeros(80)}, r"train_labels of .* integers.*"),
    "flat images": ({"train_images": np.zeros((80, 768), np.uint8)}, r"train_images .*h w\].*"),
    "other test images": (
        {"test_images": np.zeros((24, 8, 8, 3), np.uint8)}, r"test_images of .* shaped like .*"),
    "images of ints": ({"train_images": np.zeros((80, 16, 16, 3), int)}, r"train_images .*8.*"),
    "images above one": ({"test_images": np.full((24, 16, 16, 3), 2.0)}, r"test_images .* to 2"),
    "NaN": ({"test_images": np.full((24, 16, 16, 3), math.nan)}, r"test_images .* got NaN.*"),
    "objects": ({"train_labels": np.array([{}] * 80)}, r"train_labels of .* array of numbers.*"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_npz_files_are_refused(go, tmp_path, case):
    changed, rule = BROKEN[case]
    kept = {k: v for k, v in (tiny.arrays() | changed).items() if v is not None}
    np.savez(tmp_path / "tiny.npz", **kept)
    status, _, err = go()
    assert status == 1
    assert re.fullmatch(r"data\.path: " + rule, line(err)), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_files_that_are_no_npz_are_refused(go, tmp_path, content):
    (tmp_path / "tiny.npz").write_bytes(content)
    status, _, err = go()
    assert (status, line(err).split(":")[0]) == (1, "data.path")


def test_weights_that_do_not_fit_are_refused(go, tmp_path):
    torch.save({"body.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    torch.save({"fn": print}, tmp_path / "code.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name in ("other", "code", "noise"):
        status, _, err = go(f"model.weights={name}.pt")
        assert (status, line(err).split(":")[0]) == (1, "model.weights")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty_is_left_alone(go, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    status, _, err = go()
    assert (status, line(err)) == (1, f"out: must be empty or new, got {tmp_path / 'out'}")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    status, _, err = go(f"out={tmp_path / 'file/below'}")
    assert (status, line(err)) == (1, f"out: must be writable, got {tmp_path / 'file/below'}")


def test_an_output_folder_that_is_not_writable_is_refused(go):
    for where in ("/proc/fedsec", "/sys/fedsec"):  # where even root cannot write
        status, _, err = go(f"out={where}")
        assert (status, line(err)) == (1, f"out: must be writable, got {where}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(go, tmp_path):
    status, _, err = go("device=cuda")
    assert (status, line(err)) == (
        1,
        "device: no GPU that torch can use; take device=cpu, got cuda",
    )


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["--cfg", "job"]])
def test_asking_for_help_runs_nothing(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert tiny.call(monkeypatch, words) == 0
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_options_may_stand_anywhere():
    assert prepared(["a=1", "--cfg", "job", "b=2"]) == ["a=1", "b=2", "--cfg", "job"]
    assert prepared(["-m", "out=o", "s=1"]) == ["out=o", "s=1", "hydra.sweep.dir=o", "-m"]
    assert prepared(["defense=[a, b]"]) == [
        "defense=composed", "+defense@defense.a=a", "+defense@defense.b=b",
    ]  # fmt: skip


# ---------------------------------------------------------------- what goes wrong later


def test_an_attack_that_raises_keeps_what_is_done(go, tmp_path, monkeypatch):
    from attacks.inverting import Inverting

    calls, work = [], Inverting.__call__

    def third_time_unlucky(self, *rest):
        calls.append(0)
        if len(calls) == 3:
            raise ArithmeticError("the third stack is cursed")
        return work(self, *rest)

    monkeypatch.setattr(Inverting, "__call__", third_time_unlucky)
    status, out, err = go("defense=noise", "stack=2")
    assert status == 2
    assert "Traceback" in err
    assert "ArithmeticError: the third stack is cursed" in err
    folder = tmp_path / "out"
    assert "third_time_unlucky" in (folder / "error.txt").read_text()
    assert [row["defense"] for row in tiny.rows(folder)] == ["none"] * 4
    written = strict((folder / "run.json").read_text())
    assert written["status"] == "failed"
    assert "failed: ArithmeticError: the third stack is cursed" in written["flags"]
    assert written["utility"]["control_accuracy"] is not None
    assert "failed: ArithmeticError" in out


def test_a_client_that_raises_fails_the_run_with_its_traceback(go, tmp_path, monkeypatch):
    def broken(*_):
        raise ArithmeticError("client without data")

    monkeypatch.setattr(federation, "local_update", broken)
    status, _, err = go()
    assert status == 2
    assert "client 0 failed in round 0" in err
    assert "ArithmeticError: client without data" in err
    assert "in broken" in err
    assert tiny.whole(tmp_path / "out")["status"] == "failed"
    assert not (tmp_path / "out/records.jsonl").exists()


def test_a_report_that_cannot_be_written_fails_the_run(go, tmp_path, monkeypatch):
    def broken(*_):
        assert not (tmp_path / "out/run.json").exists(), "run.json is written last"
        raise OSError("no space left")

    monkeypatch.setattr(report, "write", broken)
    status, _, err = go()
    assert status == 2
    assert "no space left" in err
    assert tiny.whole(tmp_path / "out")["status"] == "failed"
    assert len(tiny.rows(tmp_path / "out")) == 4


@pytest.mark.parametrize("stacks", [0, 1, 2, 3])
def test_an_interruption_keeps_the_rows_that_are_done(go, tmp_path, monkeypatch, stacks):
    from attacks.inverting import Inverting

    calls, work = [], Inverting.__call__

    def interrupted(self, *rest):
        if len(calls) == stacks:
            raise KeyboardInterrupt
        calls.append(0)
        return work(self, *rest)

    monkeypatch.setattr(Inverting, "__call__", interrupted)
    status, out, err = go("defense=noise", "stack=2")
    assert (status, err) == (130, "")
    assert "interrupted: what was finished is kept" in out
    run = records.read(tmp_path / "out")
    assert run.status == "interrupted"
    assert len(run.rows) == 2 * stacks
    assert (tmp_path / "out/grid.png").exists() == (stacks > 0)


@pytest.mark.parametrize("late", ["pictures", "write", "finish"])
@pytest.mark.parametrize("first", [True, False])
def test_a_late_interruption_does_not_cost_the_run(go, tmp_path, monkeypatch, late, first):
    """While the folder is closed, after a first Ctrl-C or after all was done."""
    from attacks.inverting import Inverting

    where = {"pictures": experiment._Run, "write": report, "finish": records.Records}[late]
    work = getattr(where, late)

    def disturbed(*rest):
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), each)
        return work(*rest)

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(where, late, disturbed)
    if first:
        monkeypatch.setattr(Inverting, "__call__", interrupted)
    before = [signal.getsignal(each) for each in process.ENDING]
    status, _, err = go()
    assert (status, err) == (130 if first else 0, "")
    assert tiny.whole(tmp_path / "out")["status"] == ("interrupted" if first else "done")
    assert [signal.getsignal(each) for each in process.ENDING] == before


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(go, tmp_path, monkeypatch, room):
    """The disk takes `room` files or rows more: the configuration, the control's rows, ..."""
    left, sync = [room], os.fsync

    def full(handle):
        left[0] -= "/state" not in os.readlink(f"/proc/self/fd/{handle}")
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = go("defense=noise")
    assert status == 2
    assert re.fullmatch(r"error: .*: No space left on device; what was saved .* kept\n", err), err
    kept = {p.name for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "state"}
    kept -= {"tiny.npz"}
    assert kept == {"config.yaml", "records.jsonl"} if room else kept == set()
    if room:
        assert [r["defense"] for r in tiny.rows(tmp_path / "out")] == ["none"] * 4 * (room - 1)


# ---------------------------------------------------------------- processes of their own


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_while_modules_load_is_one_line(tmp_path, name):
    (tmp_path / "hydra.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(10)\n"
        "except BaseException:\n"
        "    raise ImportError('numpy is broken')\n"
    )
    env = tiny.ENV | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tiny.ROOT}"}
    done = subprocess.run([sys.executable, "-m", "fedsec.run"], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted before anything was computed\n"


def test_output_that_nobody_reads_does_not_end_the_run(tmp_path):
    """Both streams go into a pipe that is closed, as with `2>&1 | head -n 0`."""
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "fedsec.run", *tiny.words(tmp_path, "control=false")]
    done = subprocess.run(line, cwd=tmp_path, env=tiny.ENV, stdout=write, stderr=write, timeout=60)
    os.close(write)
    assert done.returncode == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES


def test_a_terminal_without_unicode_gets_something_else(tmp_path):
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-m", "fedsec.run", *tiny.words(tmp_path, "threads=0")]
    done = subprocess.run(line, cwd=tmp_path, env=tiny.ENV | plain, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"error: threads: must be at least 1, got 0\n")
    assert b"attack inverting ? defense none" in done.stdout


def until(process: subprocess.Popen, *pieces: str) -> None:
    """Read what the process prints up to a line with all of `pieces`."""
    assert process.stdout is not None
    limit = time.monotonic() + 120
    seen = []
    while time.monotonic() < limit:
        said = process.stdout.readline()
        seen.append(said)
        if all(piece in said for piece in pieces):
            return
        if not said and process.poll() is not None:
            break
    raise AssertionError("".join(seen) + (process.stderr.read() if process.stderr else ""))


def endless(tmp_path: Path) -> subprocess.Popen:
    """A run whose control finishes soon and whose defense is attacked for ever, nearly."""
    line = tiny.words(tmp_path, "defense=noise", "images=2", steps=400)
    return tiny.spawn(line, tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_signals_end_a_run_and_keep_what_is_done(tmp_path, name):
    process = endless(tmp_path)
    try:
        until(process, "attack", "noise", "started")
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert "interrupted: what was finished is kept" in out
    run = records.read(tmp_path / "out")
    assert run.status == "interrupted"
    assert [row.defense for row in run.rows] == ["none"] * 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES | {"state"}


def test_a_killed_run_leaves_rows_that_can_be_read(tmp_path, capsys):
    process = endless(tmp_path)
    try:
        until(process, "attack", "noise", "started")
    finally:
        process.kill()
        process.communicate(timeout=60)
    run = records.read(tmp_path / "out")
    assert (run.status, run.run) == ("unfinished", None)
    assert [row.defense for row in run.rows] == ["none"] * 2
    assert report.main([str(tmp_path / "out")]) == 0
    assert "unfinished" in capsys.readouterr().out


def test_a_process_refuses_in_one_line(tmp_path):
    process = tiny.spawn(tiny.words(tmp_path, "attack.steps=-1"), tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "error: attack.steps: must be at least 1, got -1\n"
    assert not (tmp_path / "out").exists()


def test_the_banner_comes_before_torch_and_within_seconds(tmp_path):
    script = (
        "import sys, time\n"
        "from fedsec import console, run\n"
        "def banner(*_):\n"
        "    heavy = {'torch', 'flwr', 'numpy', 'scipy', 'lpips', 'opacus'} & set(sys.modules)\n"
        "    print(sorted(heavy), time.process_time() < 2)\n"
        "    raise KeyboardInterrupt\n"
        "console.Console.banner = banner\n"
        "sys.exit(run.main(['attack=idlg']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=tiny.ENV,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "[] True\n")


@pytest.mark.slow
def test_the_wheel_holds_all_that_a_run_needs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)],
        cwd=tiny.ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    unpacked, elsewhere = tmp_path / "unpacked", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    inside = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    here = {p.relative_to(tiny.ROOT).as_posix()
            for folder in ("fedsec", "attacks", "defenses", "configs")
            for p in (tiny.ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".html",
                                                                    ".safetensors")}  # fmt: skip
    assert here <= inside
    assert not any(name.startswith(("tests", "benchmarks")) for name in inside)
    env = os.environ | {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    # the editable install must not stand in for the wheel
    where = [sys.executable, "-c", "import fedsec; print(fedsec.__file__)"]
    assert str(unpacked) in subprocess.check_output(where, cwd=elsewhere, env=env, text=True)
    line = [*tiny.SMALL, "attack.steps=2", "data.per_class=8", "defense=prune", "out=here"]
    done = subprocess.run([sys.executable, "-m", "fedsec.run", *line], cwd=elsewhere, env=env,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert {p.name for p in (elsewhere / "here").iterdir()} == FILES
    assert all(row["lpips"] is not None for row in tiny.rows(elsewhere / "here"))

"""What a run writes survives crashes, full disks and values that are not numbers."""

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from fedsec import records
from fedsec.checks import Refused
from fedsec.records import Row

CONTRACT = (
    *("run", "attack", "defense", "threat", "client", "data", "model", "seed", "round", "victim"),
    *("image", "batch", "psnr", "ssim", "mse", "lpips", "null_psnr", "label_true", "label_pred"),
    *("label_ok", "loss", "steps", "seconds", "gflop", "backprops", "peak_mb", "flags"),
)
ROW = Row(
    run="one", attack="inverting", defense="none", threat="honest_server", client="gradient",
    data="photos", model="convnet", seed=0, round=0, victim=0, image=7, batch=1, psnr=21.4,
    ssim=0.71, mse=0.007, lpips=0.12, null_psnr=13.9, null="mean image", label_true=3,
    label_pred=3, label_ok=True, loss=0.004, steps=600, seconds=4.1, gflop=33.0, backprops=2460.0,
    peak_mb=310.0, mode="eval",
)  # fmt: skip


def _lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_a_row_has_every_field_of_the_contract_and_comes_back_equal(tmp_path):
    records.open_folder(tmp_path / "a" / "b").append([ROW, replace(ROW, victim=1)])
    written = _lines(tmp_path / "a" / "b")
    assert set(CONTRACT) <= set(written[0])
    assert written[0]["flags"] == []
    assert records.read(tmp_path / "a" / "b").rows == (ROW, replace(ROW, victim=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null_with_a_flag(tmp_path, bad):
    records.open_folder(tmp_path).append([replace(ROW, psnr=bad)])
    (written,) = _lines(tmp_path)
    assert written["psnr"] is None
    assert written["flags"] == [f"psnr: the value was {bad}"]
    assert "NaN" not in (tmp_path / "records.jsonl").read_text()


def test_a_missing_value_always_has_a_reason(tmp_path):
    explained = replace(ROW, lpips=None, ssim=None, flags=("ssim, lpips: the image is too small",))
    records.open_folder(tmp_path).append([explained, replace(ROW, loss=None)])
    with_reason, without = _lines(tmp_path)
    assert with_reason["flags"] == ["ssim, lpips: the image is too small"]
    assert without["loss"] is None
    assert without["flags"] == ["loss: missing, and the run gave no reason"]


def test_numpy_values_are_written_as_plain_numbers(tmp_path):
    row = Row(**{f.name: getattr(ROW, f.name) for f in fields(Row)} | {"psnr": float("21.5")})
    object.__setattr__(row, "psnr", np.float32(21.5))
    object.__setattr__(row, "label_ok", np.bool_(True))
    records.open_folder(tmp_path).append([row])
    (written,) = _lines(tmp_path)
    assert (written["psnr"], written["label_ok"]) == (21.5, True)


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_cut_in_mid_write_is_left_out_and_said_so(tmp_path, kept):
    records.open_folder(tmp_path).append([ROW, replace(ROW, victim=1)])
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + kept])
    run = records.read(tmp_path)
    assert run.rows == (ROW,)
    assert run.truncated
    assert run.status == "unfinished"
    path.write_bytes(whole)
    assert not records.read(tmp_path).truncated


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    out = records.open_folder(tmp_path)
    out.append([ROW])
    before = (tmp_path / "records.jsonl").read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(records.NotSaved, match="No space left on device; what was saved before"):
        out.append([replace(ROW, victim=1)])
    assert (tmp_path / "records.jsonl").read_bytes() == before
    with pytest.raises(records.NotSaved, match=r"run\.json"):
        out.finish({"status": "done"})
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "records.jsonl"}
    monkeypatch.undo()
    out.append([replace(ROW, victim=2)])
    assert [row.victim for row in records.read(tmp_path).rows] == [0, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_device_that_is_really_full_is_one_clear_error(tmp_path):
    out = records.open_folder(tmp_path)
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    with pytest.raises(records.NotSaved):
        out.append([ROW])


def test_run_json_is_filled_to_the_contract(tmp_path):
    out = records.open_folder(tmp_path)
    out.finish(
        {
            "status": "done",
            "utility": {"accuracy": np.float64(0.5), "control_accuracy": 0.7},
            "cost": {"device": "cpu", "attack_seconds": math.nan},
            "flags": ["privacy: the defense claims no guarantee"],
            "commit": None,
        }
    )
    run = json.loads((tmp_path / "run.json").read_text())
    for key, inner in records.CONTRACT.items():
        assert key in run
        assert set(inner) <= set(run[key] or {})
    assert run["utility"]["accuracy"] == 0.5
    assert run["cost"]["attack_seconds"] is None
    assert "attack_seconds: the value was nan" in run["flags"]
    assert "accuracy_loss: missing, and the run gave no reason" in run["flags"]
    assert "commit: fedsec does not run from a checkout" in run["flags"]
    assert not [f for f in run["flags"] if f.startswith(("epsilon", "delta", "accountant"))]


def test_run_json_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    out = records.open_folder(tmp_path)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        out.finish({"status": "done"})
    assert not (tmp_path / "run.json").exists()
    monkeypatch.undo()
    out.finish({"status": "interrupted"})
    assert records.read(tmp_path).status == "interrupted"
    assert not records.read(tmp_path).whole


def test_a_folder_in_use_or_out_of_reach_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a.txt").write_text("mine")
    with pytest.raises(Refused, match=r"^out: must be empty or new, got .*used$"):
        records.open_folder(tmp_path / "used")
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="out: must be empty or new"):
        records.open_folder(tmp_path / "file")
    with pytest.raises(Refused, match="out: must be writable"):
        records.open_folder(tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "file", "used"]


def test_a_folder_that_cannot_be_made_leaves_none_of_its_parents(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refusing(self, *args, **kwargs):
        if self.name == "c":
            if not self.parent.exists():
                mkdir(self.parent, parents=True)
            raise PermissionError(errno.EACCES, "no")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(Refused, match="out: must be writable"):
        records.open_folder(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    """Also where both found it free: the second run checked it before the first one opened it."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(records, "check_folder", lambda path: None)
    for name in ("new", "empty"):
        records.open_folder(tmp_path / name, "first: 1\n")
        with pytest.raises(records.Taken, match=f"^out: must be empty or new, got .*{name}$"):
            records.open_folder(tmp_path / name, "second: 2\n")
        assert (tmp_path / name / "config.yaml").read_text() == "first: 1\n"


def test_a_disk_without_room_for_the_configuration_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(records.NotSaved, match=r"config\.yaml: No space left on device"):
        records.open_folder(tmp_path / "a" / "b", "x: 1\n")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_whole_leaves_what_was_there(tmp_path):
    path = tmp_path / "grid.png"
    path.write_text("old")

    def fill():
        with records.saving(path) as half:
            half.write_text("ne")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(records.NotSaved, match=r"grid\.png: No space left on device; what"):
        fill()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("grid.png", "old")]
    with records.saving(path) as half:
        half.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("grid.png", "new")]
    with records.saving(Path(os.devnull)) as half:  # a device is written, never replaced
        assert half == Path(os.devnull)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Refused, match="out: must be writable"):
        records.open_folder(tmp_path / "new")
    tmp_path.chmod(0o700)


def test_default_folders_count_up_and_hold_no_odd_characters(tmp_path):
    names = []
    for _ in range(3):
        folder = records.default_folder(tmp_path, "inverting", "dpsgd", 0, "2026-11-21")
        records.open_folder(folder)
        names.append(str(folder.relative_to(tmp_path)))
    assert names == [f"2026-11-21/inverting-dpsgd-0{end}" for end in ("", "-2", "-3")]
    odd = records.default_folder(tmp_path, "a/b", "[prune,mixup]", 0, "2026-11-21")
    assert odd.parent == tmp_path / "2026-11-21"
    assert odd.name == "a_b-_prune_mixup_-0"


def test_runs_are_found_below_and_broken_ones_refused_by_name(tmp_path):
    for name in ("b/2", "a", "b/1"):
        records.open_folder(tmp_path / name).append([ROW])
    (tmp_path / "empty").mkdir()
    found = records.find([tmp_path / "b", tmp_path])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["b/1", "b/2", "a"]
    with pytest.raises(Refused, match="folder: must exist"):
        records.find([tmp_path / "nowhere"])
    with pytest.raises(Refused, match="folder: must hold a run"):
        records.find([tmp_path / "empty"])
    (tmp_path / "a" / "run.json").write_text("{ not json")
    with pytest.raises(Refused, match=r"a/run\.json: must be JSON"):
        records.read(tmp_path / "a")
    (tmp_path / "b/1/records.jsonl").write_text('{"run": "x"}\n')
    with pytest.raises(Refused, match=r"records\.jsonl:1: must have every field of a row"):
        records.read(tmp_path / "b/1")
    (tmp_path / "b/2/records.jsonl").write_text('{"psnr": NaN}\n')
    with pytest.raises(Refused, match=r"records\.jsonl:1: must be JSON, got NaN is not JSON"):
        records.read(tmp_path / "b/2")


def test_the_commit_is_that_of_this_checkout_and_not_of_one_around_it(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip

    (tmp_path / "fedsec").mkdir()
    file = tmp_path / "fedsec" / "records.py"
    file.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(records, "__file__", str(file))
    clean = records.commit()
    assert clean is not None
    assert len(clean) >= 7
    assert int(clean, 16) >= 0
    file.write_text("changed")
    assert records.commit() == clean + "-dirty"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site" / "fedsec" / "records.py"))
    (tmp_path / "site" / "fedsec").mkdir(parents=True)
    assert records.commit() is None


def test_versions_name_what_decides_the_numbers():
    found = records.versions()
    assert set(found) == {"python", "fedsec", "torch", "flwr", "opacus", "lpips", "numpy"}
    assert found["numpy"] == np.__version__


def test_records_and_report_start_without_torch():
    code = "import sys, fedsec.records, fedsec.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fedsec.report" in loaded
    assert not loaded & {"torch", "numpy", "jinja2", "PIL", "rich", "scipy"}

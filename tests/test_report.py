"""The report says what the rows say, with intervals, and nothing that they do not support."""

import csv
import functools
import html.parser
import importlib.util
import io
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsec import records, report, stats, threat
from fedsec.records import Row
from fedsec.report import numbers, pictures, plots, tables, words

NULL = 13.9


def _row(defense, victim, psnr, seed=0, **changed):
    row = Row(
        run="r", attack="inverting", defense=defense, threat="honest_server", client="gradient",
        data="photos", model="convnet", seed=seed, round=0, victim=victim, image=100 + victim,
        batch=1, psnr=psnr, ssim=0.5, mse=0.1, lpips=0.3, null_psnr=NULL, null="mean image",
        label_true=3, label_pred=3, label_ok=victim % 2 == 0, loss=0.1, steps=600, seconds=4.0,
        gflop=33.0, backprops=2460.0, peak_mb=310.0, mode="eval",
    )  # fmt: skip
    return replace(row, **changed)


def _run(folder, rows, *, status="done", accuracy=0.48, epsilon: float | None = 7.9, config="",
         pictures=True, **changed):  # fmt: skip
    """A run folder as fedsec.run leaves it."""
    out = records.open_folder(folder)
    out.append(rows)
    defenses = list(dict.fromkeys(row.defense for row in rows))
    count = len({row.victim for row in rows})
    if pictures:
        images = np.random.default_rng(0).random((count, 3, 8, 8))
        captions = ["9.9 dB"] * count
        report.grid(folder / "grid.png", images, [(d, images, captions) for d in defenses])
    if config:
        (folder / "config.yaml").write_text(config)
    if status:
        out.finish(
            {
                "status": status,
                "utility": {"accuracy": accuracy, "control_accuracy": 0.712,
                            "accuracy_loss": 0.712 - accuracy, "test_images": 1000},
                "privacy": {"epsilon": epsilon, "delta": 1e-5, "accountant": "PRV"},
                "cost": {"device": "cpu, 1 thread"},
                "nulls": {"grey": 12.5, "mean image": NULL},
                "grants": ["model", "update", "count", "shape"],
                "flags": [], "commit": "abc1234", "versions": {"torch": "2.15.0"},
                "command": "python -m fedsec.run attack=inverting defense=dpsgd",
            } | changed
        )  # fmt: skip
    return folder


def _rows(defense, level, images=8, **changed):
    wiggle = np.random.default_rng(1).normal(size=images)
    return [_row(defense, i, level + float(wiggle[i]), **changed) for i in range(images)]


def _standard(folder, images=8, control=21.4, defended=9.9, **changed):
    rows = _rows("none", control, images) + _rows("dpsgd", defended, images)
    return _run(folder, rows, **changed)


def _page(*folders) -> str:
    path = folders[0] / "report.html"
    report.write([records.read(f) for f in folders], path)
    return path.read_text()


class _Text(html.parser.HTMLParser):
    """The page's text, its tags balanced, and what it refers to."""

    def __init__(self, source):
        super().__init__()
        self.open, self.words, self.refers = [], [], []
        self.feed(source)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.refers += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass  # SVG's lines and circles

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def _answer(*folders) -> str:
    found = numbers.groups([records.read(f) for f in folders])
    ((_, text),) = words.answers(found)
    return text


def test_numbers_on_page_and_console_are_those_of_stats_on_the_rows(tmp_path, capsys):
    folder = _standard(tmp_path / "a")
    assert report.main([str(folder)]) == 0
    console = capsys.readouterr().out
    text = _Text((folder / "report.html").read_text()).text
    for defense in ("none", "dpsgd"):
        rows = [r for r in records.read(folder).rows if r.defense == defense]
        psnr, images = [r.psnr for r in rows], [r.image for r in rows]
        null = [r.null_psnr for r in rows]
        mean, low, high = stats.bootstrap(psnr, images)
        gain = stats.paired_difference(psnr, null, images)
        share = stats.success(psnr, null, images)
        worst = max(rows, key=lambda r: r.psnr)
        expected = (
            f"{mean:.1f} [{low:.1f}, {high:.1f}]",
            f"{gain[0]:.1f} [{gain[1]:.1f}, {gain[2]:.1f}]",
            f"{share[0]:.0%} [{share[1]:.0%}, {share[2]:.0%}]".replace("%", ""),
            f"{worst.psnr:.1f} image {worst.image}",
            f"{statistics.median(psnr):.1f}",
        )
        for figure in expected:
            assert figure in console
            assert figure in text.replace("\u2212", "-")
    # half of the images have their label right
    share, low, high = stats.wilson(4, 8)
    assert f"{share:.0%} [{low:.0%}, {high:.0%}]".replace("%", "") in text


FEDERATION = {
    "federation": {"engine": "inline", "strategy": "fedavg", "split": "iid", "alpha": 0.5,
                   "shards": 2},
    "stack": 16, "threads": 1, "lpips": "alex", "clients": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "apart"),
    [("split", "dirichlet", True), ("alpha", 0.1, True), ("shards", 1, True),
     ("strategy", "fedmedian", True), ("engine", "ray", False), ("stack", 4, False),
     ("threads", 2, False), ("lpips", "vgg", True), ("clients", 8, True)],
)  # fmt: skip
def test_only_runs_that_measure_the_same_are_averaged(tmp_path, key, value, apart):
    other = json.loads(json.dumps(FEDERATION))
    (other["federation"] if key in other["federation"] else other)[key] = value
    for name, config in (("a", FEDERATION), ("b", other)):
        _run(tmp_path / name, _rows("none", 21.4), config=json.dumps(config), pictures=False)
    found = numbers.groups([records.read(tmp_path / name) for name in "ab"])
    assert len(found) == 1 + apart
    headings = [scenario.heading for scenario in numbers.scenarios(found)]
    assert headings == ([f"{key} {FEDERATION['federation'].get(key, FEDERATION.get(key))}",
                         f"{key} {value}"] if apart else [""])  # fmt: skip


def test_rows_with_missing_values_are_counted_not_averaged_as_zero(tmp_path):
    rows = _rows("none", 21.4, 8)
    rows[0] = replace(rows[0], lpips=None, flags=("lpips: no features",))
    rows[1] = replace(rows[1], psnr=float("nan"))
    folder = _run(tmp_path / "a", rows)
    (group,) = numbers.groups([records.read(folder)])
    assert group.estimate("lpips").mean == pytest.approx(0.3)
    assert (group.psnr.count, group.psnr.total) == (7, 8)
    text = _Text(_page(folder)).text
    assert "0.30 7 of 8" in text
    assert "lpips: no features (none 1 of 8 images)" in text
    assert "psnr: the value was nan (none 1 of 8 images)" in text


def test_the_answer_says_what_leaked_and_what_it_costs(tmp_path):
    text = _answer(_standard(tmp_path / "a"))
    assert re.match(
        r"Without a defense, inverting recovers images at 21\.\d dB \[\d+\.\d, \d+\.\d\], "
        r"\d\.\d dB \[\d\.\d, \d\.\d\] above the best null\. "
        r"Under dpsgd \(epsilon 7\.9\), inverting reaches \d+\.\d dB \[.*\], "
        r"not above the best null\. Test accuracy falls from 71\.2 % to 48\.0 %\.$",
        text,
    )


def test_nothing_leaks_unless_the_interval_is_above_the_null(tmp_path):
    wide = [_row("none", i, NULL + g) for i, g in enumerate([9.0, -3.0, 8.0, -4.0, 7.0, -5.0])]
    folder = _run(tmp_path / "a", wide + _rows("dpsgd", 9.9, 6))
    control = numbers.groups([records.read(folder)])[0]
    assert control.gain.mean is not None
    assert control.gain.mean > 0
    assert control.leaks is False
    text = _Text(_page(folder)).text
    assert not re.search(r"\b(recovers|leaks)\b", text.split("Originals")[0])
    assert "no defense can be credited" in text
    assert re.search(r"the control is not above the null \(.*\): this says nothing", text)
    assert text.count("[control-does-not-leak]") == 1


@pytest.mark.parametrize(("images", "claim"), [(1, None), (3, None), (4, True), (40, True)])
def test_too_few_images_give_no_claim(tmp_path, images, claim):
    folder = _standard(tmp_path / "a", images=images)
    groups = numbers.groups([records.read(folder)])
    assert [g.leaks for g in groups] == [claim, None if claim is None else False]
    text = _Text(_page(folder)).text
    if images == 1:
        assert groups[0].psnr.low is None
        assert "1 image: too few for any claim" in text
        assert "1 image is too few to say" in text
    assert ("intervals are wide" in text) == (images == 4)
    assert ("too few for any claim" in text) == (claim is None)


def test_a_run_that_is_not_whole_is_shown_apart(tmp_path):
    whole = _standard(tmp_path / "a")
    killed = _run(tmp_path / "b", _rows("none", 30.0), status="")
    failed = _run(tmp_path / "c", _rows("none", 35.0), status="failed")
    found = numbers.groups([records.read(f) for f in (killed, failed, whole)])
    means = {(g.status, g["defense"]): round(g.psnr.mean or 0) for g in found}
    assert found[0].status == "done"
    assert means[("done", "none")] == 22
    assert means[("unfinished", "none")] == 30
    assert means[("failed", "none")] == 35
    text = _Text(_page(whole, killed, failed)).text
    assert f"{killed}: unfinished after 8 rows; not averaged with whole runs" in text
    assert f"{failed}: failed after 8 rows" in text


def test_settings_with_other_hyperparameters_are_not_pooled_and_their_control_is(tmp_path):
    def cell(name, sigma, level, seed=0):
        config = f"defense: {{noise_multiplier: {sigma}}}\nseed: {seed}\nout: x{name}\n"
        rows = _rows("none", 21.4) + _rows("dpsgd", level)
        return _run(tmp_path / name, [replace(r, seed=seed) for r in rows], config=config)

    folders = [cell("a", 1.0, 9.9), cell("b", 2.0, 8.0), cell("c", 2.0, 8.5, seed=1)]
    found = numbers.groups([records.read(f) for f in folders])
    (scenario,) = numbers.scenarios(found)
    assert scenario.labels == [
        "none (control)", "dpsgd · noise_multiplier 1.0", "dpsgd · noise_multiplier 2.0",
    ]  # fmt: skip
    # cells a and b repeat the same control, which counts once; seed 1 adds its own
    assert [len(g.rows) for g in found] == [16, 8, 16]
    assert [g.images for g in found] == [8, 8, 8]


def test_other_rounds_and_attacks_make_scenarios_of_their_own(tmp_path):
    early = _standard(tmp_path / "a")
    late = _run(tmp_path / "b", [replace(r, round=40) for r in records.read(early).rows])
    other = _run(tmp_path / "c", [replace(r, attack="dlg") for r in records.read(early).rows])
    found = numbers.groups([records.read(f) for f in (early, late, other)])
    headings = [s.heading for s in numbers.scenarios(found)]
    assert headings == ["inverting · round 0", "inverting · round 40", "dlg · round 0"]


def test_more_than_four_defended_settings_are_summed_up(tmp_path):
    folders = [
        _run(
            tmp_path / str(i),
            _rows("none", 21.4) + _rows("prune", level),
            config=f"defense: {{ratio: 0.{i}}}\n",
            accuracy=0.7 - 0.05 * i,
            epsilon=None,
        )
        for i, level in enumerate([20.0, 19.0, 10.0, 9.0, 8.0], 1)
    ]
    text = _answer(*folders)
    assert "2 of 5 defended settings still leak: prune ratio 0.1, prune ratio 0.2." in text
    assert "prune ratio 0.3 costs the least accuracy: 16.2 points." in text


def test_accuracy_has_the_interval_of_the_test_set_or_of_the_seeds(tmp_path):
    one = _standard(tmp_path / "a")
    (_, defended) = numbers.groups([records.read(one)])
    assert (defended.accuracy.low, defended.accuracy.high) == stats.wilson(480, 1000)[1:]
    assert (defended.lost.mean, defended.lost.low) == (pytest.approx(0.232), None)
    two = _run(
        tmp_path / "b",
        [replace(r, seed=1) for r in _rows("none", 21.4) + _rows("dpsgd", 9.9)],
        accuracy=0.52,
    )
    (_, defended) = numbers.groups([records.read(f) for f in (one, two)])
    assert defended.accuracy.mean == pytest.approx(0.5)
    assert defended.accuracy.low is not None
    assert defended.accuracy.low < 0.5


def test_the_page_stands_alone_and_is_well_formed(tmp_path):
    source = _page(_standard(tmp_path / "a"))
    parsed = _Text(source)
    assert parsed.refers
    assert all(ref.startswith("data:image/png;base64,") for ref in parsed.refers)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe|\bon\w+=", source)
    assert not re.search(r"\b(nan|NaN|inf|None|undefined)\b", parsed.text)
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source
    assert "@media print" in source
    titles = re.findall(r"<h2>(.*?)</h2>", source)
    assert titles == [
        "Who knew what", "Originals and reconstructions", "Leakage against accuracy",
        "What leaked", "Against the control, on the same images", "Image by image",
        "What the defense costs", "What the attack costs", "Flags",
        "How each number is computed", "Repeat it",
    ]  # fmt: skip
    assert "abc1234" in parsed.text
    assert "torch 2.15.0" in parsed.text
    assert "python -m fedsec.run attack=inverting defense=dpsgd" in parsed.text


def test_values_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    rows = [
        replace(r, defense=evil if r.defense == "dpsgd" else "none", flags=(evil,), null=evil)
        for r in _rows("none", 21.4) + _rows("dpsgd", 9.9)
    ]
    folder = _run(tmp_path / "a", rows, config=f"name: '{evil}'\n", command=evil, flags=[evil])
    source = _page(folder)
    assert "<script" not in source
    assert source.count("&lt;script&gt;") >= 6


def test_words_for_facts_are_those_of_the_threat_table(tmp_path):
    assert list(words.FACTS) == list(threat.FACTS)
    text = _Text(_page(_standard(tmp_path / "a"))).text
    for fact, meaning in words.FACTS.items():
        granted = fact in ("model", "update", "count", "shape")
        assert f"{fact} {meaning} {'granted' if granted else 'withheld'}" in text


def test_threat_models_stand_side_by_side(tmp_path):
    one = _standard(tmp_path / "a")
    rows = [replace(r, threat="strongest") for r in records.read(one).rows]
    two = _run(tmp_path / "b", rows, grants=["model", "labels"])
    text = _Text(_page(one, two)).text
    assert "fact honest_server strongest" in text
    assert f"labels {words.FACTS['labels']} withheld granted" in text
    assert f"count {words.FACTS['count']} granted withheld" in text


def test_the_scatter_shows_every_setting_and_the_null(tmp_path):
    source = _page(_standard(tmp_path / "a"))
    wide, narrow = re.findall(r"<svg.*?</svg>", source, flags=re.S)
    for svg in (wide, narrow):
        assert svg.count("<circle") == 2
        assert svg.count('class="point leaks"') == 1
        assert "best null 13.9 dB" in svg
        assert "none (control)" in svg
        assert ">dpsgd<" in svg
        assert "test accuracy lost, percentage points" in svg
        box = [int(v) for v in re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0]]
        for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg):
            assert 0 < float(x) < box[0]
            assert 0 < float(y) < box[1]
    (control, defended) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', wide)
    assert float(control[0]) < float(defended[0])  # the defense loses accuracy
    assert float(control[1]) < float(defended[1])  # and leaks less: further down


def test_labels_of_the_scatter_do_not_cover_each_other():
    points = [{"x": 50.0 + i, "y": 100.0, "label": f"prune {i}"} for i in range(6)]
    plots.place_labels(points, 700, [100.0])
    heights = sorted(point["at"][1] for point in points)
    assert all(b - a >= 14 for a, b in itertools.pairwise(heights))


@pytest.mark.parametrize("low_high", [(0.0, 23.2), (9.9, 22.1), (-3.0, 0.01), (5.0, 5.0)])
def test_ticks_are_few_and_hold_the_range(low_high):
    low, high = low_high
    ticks = plots.even_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])


def test_old_or_foreign_run_files_do_not_break_the_page(tmp_path):
    folder = _run(tmp_path / "a", _rows("none", 21.4), status="", pictures=False)
    (folder / "run.json").write_text('{"status": "done"}')
    assert "not recorded" in _Text(_page(folder)).text
    Image.new("RGB", (20, 20)).save(folder / "grid.png")  # tells no places
    assert f"left out: {folder / 'grid.png'}: KeyError" in _Text(_page(folder)).text
    (folder / "grid.png").write_bytes(b"\x89PNG broken")
    assert f"left out: {folder / 'grid.png'}: " in _Text(_page(folder)).text


def test_the_command_line_reports_many_runs_and_refuses_in_one_line(tmp_path, capsys):
    _standard(tmp_path / "runs" / "a")
    _run(tmp_path / "runs" / "b", _rows("none", 21.4), status="interrupted")
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / "records.jsonl").write_text("{ broken\n")
    (tmp_path / "empty").mkdir()

    def run(*args):
        status = report.main([str(a) for a in args])
        return status, *capsys.readouterr()

    status, _, err = run(tmp_path / "runs")
    assert status == 0
    assert "left out:" in err
    assert "must be JSON" in err
    assert (tmp_path / "runs" / "report.html").exists()
    assert run(tmp_path / "runs", "--out", tmp_path / "x" / "y.html")[0] == 0
    assert (tmp_path / "x" / "y.html").exists()
    for args, words_ in (
        ([tmp_path / "nowhere"], "error: folder: must exist, got "),
        ([tmp_path / "empty"], "error: folder: must hold a run"),
        ([tmp_path / "runs" / "c"], "records.jsonl:1: must be JSON"),
        ([tmp_path / "runs" / "a", "--out", "/dev/null/x.html"], "error: out: must be writable"),
    ):
        status, _, err = run(*args)
        assert status == 1
        assert words_ in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
    records.open_folder(tmp_path / "none").append([])
    status, _, err = run(tmp_path / "none")
    assert (status, "at least one finished image" in err) == (1, True)
    assert run()[0] == 1


def test_plain_text_on_a_pipe_has_no_colours_and_no_broken_intervals(tmp_path):
    folder = _standard(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-m", "fedsec.report", str(folder)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for line in done.stdout.splitlines():
        assert line.count("[") == line.count("]")


@pytest.mark.parametrize("width", [80, 140])
def test_no_figure_is_cut_on_a_narrow_terminal(tmp_path, width):
    from rich.console import Console

    run = records.read(_standard(tmp_path / "a"))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    report.show([run], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    tables = [line for line in text.splitlines() if "none (control)" in line]
    assert len(tables) == 4
    for interval in re.findall(r"\[\d[^\]]*\]", text):
        assert "\n" not in interval
    if width == 80:
        assert max(len(line) for line in tables) <= 80


def _decoded(uri):
    import base64

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_grid_shows_each_image_enlarged_and_gives_it_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    truth, guess = rng.random((3, 3, 32, 32)), rng.random((3, 32, 32, 3))
    path = tmp_path / "grid.png"
    captions = ["21.4 dB", "20.0 dB", "19.9 dB"]
    report.grid(path, truth, [("none (control)", guess, captions)])
    sheet = pictures.Sheet(path)
    assert sheet.titles == ["original", "none (control)"]
    assert sheet.layout["rows"][1]["captions"] == captions
    expected = (truth.transpose(0, 2, 3, 1), guess)
    for title, images in zip(sheet.titles, expected, strict=True):
        for n, image in enumerate(images):
            assert (_decoded(sheet.cut(title, n)) == np.rint(image * 255)).all()
    with Image.open(path) as drawn:
        layout = json.loads(drawn.text["fedsec"])  # type: ignore[attr-defined]
        assert layout["size"] == [96, 96]
        # under each reconstruction there is a caption to read: dark pixels on white
        x, y = layout["x"], layout["rows"][1]["y"] + 96
        assert np.asarray(drawn.convert("L").crop((x, y, x + 96, y + 22))).min() < 100


@pytest.mark.parametrize("shape", [(20, 1, 28, 28), (2, 3, 128, 64), (1, 3, 8, 8), (1, 3, 300, 20)])
def test_grid_takes_grey_large_and_many_images(tmp_path, shape):
    images = np.full(shape, 0.5)
    images[0] = np.nan  # a reconstruction that failed is grey, not black or an error
    report.grid(tmp_path / "g.png", images, [("dpsgd", images * 3 - 1, ["x"] * shape[0])])
    sheet = pictures.Sheet(tmp_path / "g.png")
    assert sheet.shown == list(range(min(shape[0], 16)))
    assert ("16 of 20" in sheet.layout["note"]) == (shape[0] == 20)
    first = _decoded(sheet.cut("dpsgd", 0))
    assert set(first.ravel()) == {128}
    assert max(first.shape) <= pictures.WIDEST


def test_a_grid_of_many_images_holds_the_extremes_of_each_defense(tmp_path):
    images, rng = np.zeros((40, 3, 8, 8)), np.random.default_rng(0)
    psnr = [rng.permutation(40).astype(float).tolist() for _ in range(2)]
    psnr[0][30] = None  # not scored
    report.grid(tmp_path / "g.png", images, [("a", images, ["x"] * 40)] * 2, psnr)
    shown = pictures.Sheet(tmp_path / "g.png").shown
    assert len(shown) == 16
    for row in psnr:
        known = {i: v for i, v in enumerate(row) if v is not None}
        assert max(known, key=lambda i: known[i]) in shown
        assert min(known, key=lambda i: known[i]) in shown
        assert sorted(known, key=lambda i: -known[i])[len(known) // 2] in shown
    assert {0, 1, 2} <= set(shown), "the rest are the first"


def test_pictures_of_a_setting_are_its_best_median_worst_and_another(tmp_path):
    rng, count = np.random.default_rng(0), 9
    truth = rng.random((count, 3, 8, 8))
    guesses = {name: rng.random((count, 3, 8, 8)) for name in ("none", "dpsgd")}
    folder = _standard(tmp_path / "a", images=count, pictures=False)
    titles = {"none": "none (control)", "dpsgd": "dpsgd"}
    rows = [(titles[name], images, ["x"] * count) for name, images in guesses.items()]
    report.grid(folder / "grid.png", truth, rows)
    run = records.read(folder)
    album = pictures.album(numbers.worlds(numbers.groups([run])))
    assert (album.left_out, album.damaged) == (0, [])
    control, defended = album.figures
    assert defended.titles == ("original", "none (control)", "dpsgd")
    assert control.titles == ("original", "none (control)")
    own = {r.victim: r for r in run.rows if r.defense == "dpsgd"}
    plain = {r.victim: r for r in run.rows if r.defense == "none"}
    order = sorted(own, key=lambda v: -own[v].psnr)
    expected = [order[0], order[4], order[-1]]
    for victim, (name, cells) in zip(expected, defended.cells, strict=False):
        assert name.endswith(f"image {own[victim].image}")
        images = [truth, guesses["none"], guesses["dpsgd"]]
        for image, (uri, _) in zip(images, cells, strict=True):
            assert (_decoded(uri) == np.rint(image[victim].transpose(1, 2, 0) * 255)).all()
        said = [caption for _, caption in cells]
        assert said == ["", f"{plain[victim].psnr:.1f} dB", f"{own[victim].psnr:.1f} dB"]
    names = [name.partition(":")[0] for name, _ in defended.cells]
    assert names == ["best", "median", "worst", "random"]
    assert len({name for name, _ in defended.cells}) == 4
    text = _Text(_page(folder)).text
    assert "the median and the lowest PSNR, and another one drawn at random (seed 0)" in text
    assert "dpsgd, attacked by inverting, of 9 images" in text


@pytest.mark.parametrize("count", range(1, 8))
def test_picks_are_different_images(count):
    values = [float(v) for v in np.random.default_rng(count).permutation(count)]
    chosen = pictures.picks(values)
    assert len(set(chosen)) == len(chosen) == min(4, count)
    assert values[chosen[0]] == max(values)
    assert min(values) in [values[i] for i in chosen]
    assert len(pictures._names(len(chosen))) == len(chosen)


def test_a_page_holds_as_many_pictures_as_it_has_room_for(tmp_path, monkeypatch):
    folders = [
        _run(tmp_path / str(i), _rows("none", 21.4) + _rows("dpsgd", 9.0 + i),
             config=f"defense: {{noise_multiplier: {i}.0}}\n")
        for i in range(3)
    ]  # fmt: skip
    monkeypatch.setattr(pictures, "FIGURES", 2)
    text = _Text(_page(*folders)).text
    assert text.count("attacked by inverting, of 8 images") == 2
    assert "2 more settings are in the tables only" in text
    monkeypatch.setattr(pictures, "BYTES", 1)
    assert _Text(_page(*folders)).text.count("attacked by inverting, of 8 images") == 1


# ---- comparisons --------------------------------------------------------------------------------


def _sweep(folder):
    """Three defenses and two seeds, of which each cell repeats its seed's control."""
    rng = np.random.default_rng(3)
    folders = []
    for seed in (0, 1):
        control = [_row("none", i, 20 + float(rng.normal()), seed=seed) for i in range(8)]
        for name, shift in (("a", 0.1), ("b", -1.5), ("c", -8.0)):
            own = [_row(name, i, 20 + shift + float(rng.normal()), seed=seed) for i in range(8)]
            folders.append(_run(folder / f"{name}{seed}", control + own, epsilon=None))
    return folders


def test_differences_to_the_control_are_those_of_plain_pairs_from_the_files(tmp_path, capsys):
    """Page, console, CSV, Markdown and LaTeX against a dumb twin that reads records.jsonl."""
    folders = _sweep(tmp_path)
    assert report.main([str(tmp_path)]) == 0
    said = {"console": capsys.readouterr().out}
    said["page"] = _Text((tmp_path / "report.html").read_text()).text.replace("\u2212", "-")
    said["markdown"] = (tmp_path / "report.md").read_text()
    said["latex"] = (tmp_path / "report.tex").read_text().replace("$-$", "-")
    lines = {line["setting"]: line for line in csv.DictReader((tmp_path / "report.csv").open())}
    each = {}
    for name in "abc":
        pairs = []
        for folder in folders:
            rows = [json.loads(line) for line in (folder / "records.jsonl").open()]
            control = {r["image"]: r["psnr"] for r in rows if r["defense"] == "none"}
            pairs += [(r["image"], r["psnr"], control[r["image"]]) for r in rows
                      if r["defense"] == name]  # fmt: skip
        images, own, other = zip(*pairs, strict=True)
        each[name] = (stats.paired_difference(own, other, images), stats.chance(own, other, images))
        line = lines[name]
        expected = [*each[name][0], each[name][1], 16]
        keys = [f"against_control_db{end}" for end in ("", "_low", "_high")]
        assert [float(line[key]) for key in (*keys, "p", "pairs")] == pytest.approx(expected)
        mean, low, high = stats.bootstrap(own, images)
        assert float(line["psnr_db"]) == pytest.approx(statistics.fmean(own))
        found = [float(line[f"psnr_db{end}"]) for end in ("", "_low", "_high")]
        assert found == pytest.approx([mean, low, high])
        for where, text in said.items():
            assert re.search(rf"{mean:.1f} *\[{low:.1f}, {high:.1f}\]", text), where
            gap = each[name][0]
            words_ = rf"{gap[0]:+.1f} *\[{gap[1]:+.1f}, {gap[2]:+.1f}\]"
            assert re.search(words_.replace("+", r"\+"), text), where
    ordered = sorted(p for _, p in each.values())
    for name, (_, p) in each.items():
        rank = ordered.index(p)
        by_hand = max(min(1.0, (3 - i) * ordered[i]) for i in range(rank + 1))
        assert float(lines[name]["p_holm"]) == pytest.approx(by_hand)
        assert float(lines[name]["p_holm"]) > float(lines[name]["p"]) or rank == 2
    assert lines["none (control)"]["p"] == ""
    assert "leaks less" in said["page"]
    assert "not shown" in said["page"]


def test_more_comparisons_make_each_of_them_less_certain(tmp_path):
    """What a report of one defense shows, one of many does not, if it is but chance."""
    control = [_row("none", i, 20.0) for i in range(8)]
    wiggle = [0.1, -0.1, -2, -2, -2, -2, -2, -2]
    own = [_row("a", i, 20.0 + w) for i, w in enumerate(wiggle)]
    alone = _run(tmp_path / "a", control + own)
    (_, group) = numbers.groups([records.read(alone)])
    assert group.chance is not None
    assert group.chance < 0.05
    assert words._changed(group) == "leaks less"
    more = [
        _run(tmp_path / f"b{i}", control + [replace(r, defense=f"b{i}") for r in control])
        for i in range(3)
    ]
    found = numbers.groups([records.read(f) for f in (alone, *more)])
    (group,) = (g for g in found if g["defense"] == "a")
    assert group.chance == 4 * group.against.chance  # type: ignore[union-attr]
    assert words._changed(group) == "not shown"


def test_the_front_is_drawn_from_what_leaks(tmp_path):
    """Further below the null is not more private: only the cheapest of those is on the front."""
    levels = {"a": (18.0, 0.70), "b": (10.0, 0.60), "c": (5.0, 0.55), "d": (20.0, 0.58)}
    folders = [
        _run(tmp_path / name, _rows("none", 21.4) + _rows(name, level), accuracy=accuracy)
        for name, (level, accuracy) in levels.items()
    ]
    (world,) = numbers.worlds(numbers.groups([records.read(f) for f in folders]))
    best = plots.front(world)
    on = {g["defense"] for g in world.groups if best[id(g)]}
    points = {g["defense"]: (g.lost.mean, max(0.0, g.gain.mean)) for g in world.groups}

    def beaten(name):
        x, y = points[name]
        return any(q != (x, y) and q[0] <= x and q[1] <= y for q in points.values())

    assert on == {name for name in points if not beaten(name)} == {"none", "a", "b"}
    svg = re.findall(r"<svg.*?</svg>", _page(*folders), flags=re.S)[0]
    assert svg.count('class="front"') == 1


def test_of_several_attacks_the_strongest_counts(tmp_path):
    weak = [replace(r, attack="dlg", psnr=r.psnr - 2, backprops=100.0)
            for r in _rows("none", 21.4) + _rows("dpsgd", 16.0)]  # fmt: skip
    weak[8:] = [replace(r, psnr=r.psnr + 4) for r in weak[8:]]  # but against dpsgd it is better
    folders = [
        _run(tmp_path / "a", _rows("none", 21.4) + _rows("dpsgd", 16.0)),
        _run(tmp_path / "b", weak),
    ]
    found = numbers.groups([records.read(f) for f in folders])
    (world,) = numbers.worlds(found)
    assert [(g["defense"], g["attack"]) for g in world.groups] == [
        ("none", "inverting"), ("dpsgd", "dlg")]  # fmt: skip
    assert len(world.attacked) == 4
    said = words.headline(found)
    assert said.startswith("Without a defense, the strongest of 2 attacks recovers images at 21.")
    assert "under dpsgd (epsilon 7.9) it reaches 18." in said
    assert "still above the null" in said
    assert said.count(". ") == 0, "one sentence"
    series = dict(plots.spending(world))
    assert [cost for cost, _ in series["none (control)"]] == [100.0, 2460.0]
    assert [cost for cost, _ in series["dpsgd"]] == [100.0], "dearer, and less"
    assert "Leakage against the attack's cost" in _page(*folders)


def test_the_headline_is_one_sentence_that_claims_what_is_shown(tmp_path):
    def said(*folders):
        text = words.headline(numbers.groups([records.read(f) for f in folders]))
        assert text.endswith(".")
        assert not re.search(r"[.!?] [A-Z]", text)
        return text

    one = said(_standard(tmp_path / "a"))
    assert "not above the null, and test accuracy falls from 71.2 % to 48.0 %." in one
    dead = said(_standard(tmp_path / "b", control=10.0))
    assert dead.endswith("not above the best null, so that no defense can be credited.")
    few = said(_standard(tmp_path / "c", images=2))
    assert "too few" in few
    alone = said(_run(tmp_path / "d", _rows("none", 21.4)))
    assert alone.endswith("above the best null.")
    many = said(*_sweep(tmp_path / "e"))
    assert "of 3 defended settings 2 still leak, and the only one not shown to, c, costs" in many
    plain = said(_run(tmp_path / "f", _rows("dpsgd", 9.9)))
    assert plain.startswith("Under dpsgd (epsilon 7.9) ")
    assert words.headline([]) == "No image was attacked yet."


# ---- curves -------------------------------------------------------------------------------------


def test_a_curve_is_the_median_of_its_updates_objectives(tmp_path):
    curves = [
        ((0, 9.0), (5, 4.0), (10, 1.0)),
        ((0, 7.0), (5, 6.0)),
        ((0, 5.0), (5, 5.0), (10, 3.0)),
    ]
    rows = [_row("none", i, 20.0, curve=curve) for i, curve in enumerate(curves)]
    rows.append(_row("none", 3, 20.0))  # of the same update as the one before
    folder = _run(tmp_path / "a", rows)
    (group,) = numbers.groups([records.read(folder)])
    ((name, points),) = plots.objectives(numbers.scenarios([group])[0])
    assert name == "none (control)"
    assert points == [(0, 7.0), (5, 5.0), (10, 3.0)]  # the second had ended with 6
    assert "The attack's objective over its steps" in _page(folder)
    assert "objective over its steps" not in _page(_standard(tmp_path / "b"))


def test_names_at_the_ends_of_lines_do_not_cover_each_other():
    lines = [{"y": y} for y in (390.0, 389.0, 50.0, 51.0, 200.0)]
    plots.place_ends(lines, 14, 400)
    heights = sorted(line["name_y"] for line in lines)
    assert all(b - a >= 14 for a, b in itertools.pairwise(heights))
    assert heights[-1] <= 400


@pytest.mark.parametrize("low_high", [(0.004, 0.9), (120, 300), (1, 1e6), (3.0, 3.0), (1e-9, 1e9)])
def test_logarithmic_ticks_are_few_and_hold_the_range(low_high):
    low, high = low_high
    ticks = plots.log_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= high * (1 - 1e-6)
    assert ticks == sorted(set(ticks))


# ---- the files beside the page ------------------------------------------------------------------

EVIL = r"a_b & 50 % \of #1 {x} $y$ ~z^2 <i> | [c] *d*" + "\\"

COMMANDS = {
    *("usepackage", "begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule"),
    *("multicolumn", "emph", "textbackslash", "textasciitilde", "textasciicircum", "textless"),
    *("textgreater", "textbar", "cdot", "delta", "times", "ldots", "mu", "sigma", "varepsilon"),
    *("leq", "geq", "pm"),
}


def _compiles(text: str) -> None:
    """What TeX would stop at: unknown commands, bare specials, braces, columns, other letters."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    body = "\n".join(lines)
    assert set(re.findall(r"\\([A-Za-z]+)", body)) <= COMMANDS
    bare = re.sub(r"\\[A-Za-z]+|\\.", " ", body.replace("\\\\", " "))
    assert not re.search(r"[%#^_~\\]", bare.replace("~", "")), "specials"
    assert bare.count("$") % 2 == 0
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0
    columns = 0
    for line in lines:
        begun = re.match(r"\\begin\{tabular\}\{(\w+)\}", line)
        columns = len(begun[1]) if begun else columns
        if line.endswith(r" \\"):
            cells = len(re.findall(r"(?<!\\)&", line)) + 1
            spans = sum(int(n) - 1 for n in re.findall(r"multicolumn\{(\d+)\}", line))
            assert cells + spans == columns, line
            assert line[0] not in "[*"
    assert all(c.isascii() or "\u00c0" <= c <= "\u00ff" for c in body)


def test_latex_compiles_whatever_things_are_called(tmp_path):
    rows = [replace(r, defense=EVIL) if r.defense == "dpsgd" else r
            for r in _rows("none", 21.4) + _rows("dpsgd", 9.9)]  # fmt: skip
    other = [replace(r, attack="[évil] \u6f22\u5b57 \U0001f600\n") for r in rows]
    folders = [_run(tmp_path / "a", rows), _run(tmp_path / "b", other)]
    text = tables.as_latex(numbers.groups([records.read(f) for f in folders]))
    _compiles(text)
    assert r"a\_b \& 50 \% \textbackslash{}of \#1 \{x\} \$y\$" in text
    assert "évil" in text
    assert "(U+6F22)" in text
    assert "(epsilon" not in text
    for broken in (text.replace(r"\_", "_"), text.replace(r"\&", "&"), text.replace("\\{x", "{x"),
                   text + r"\unknown"):  # fmt: skip
        with pytest.raises(AssertionError):
            _compiles(broken)


def test_latex_by_hand():
    assert tables.latex("-1.4 [-2.6, +0.4]") == "$-$1.4 [$-$2.6, +0.4]"
    assert tables.latex("[1, 2]") == "{[}1, 2]"
    assert tables.latex("best-of 1e-5 \u03b4 \u2014") == r"best-of 1e-5 $\delta$ ---"
    assert tables.latex("") == ""


def test_csv_and_markdown_take_what_things_are_called(tmp_path):
    name = 'a|b, "c"\nd <e>'
    rows = [replace(r, defense=name) if r.defense == "dpsgd" else r
            for r in _rows("none", 21.4) + _rows("dpsgd", 9.9)]  # fmt: skip
    found = numbers.groups([records.read(_run(tmp_path / "a", rows))])
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert [line["defense"] for line in lines] == ["none", name]
    assert [line["leaks"] for line in lines] == ["True", "False"]
    tabled = [line for line in tables.as_markdown(found).splitlines() if line.startswith("|")]
    for line in tabled:
        assert len(re.findall(r"(?<!\\)\|", line)) in (6, 7, 8, 5), line
    assert any(line.startswith(r'| a\|b, "c" d &lt;e&gt; |') for line in tabled)


# ---- many runs ----------------------------------------------------------------------------------


def _benchmark():
    source = Path(__file__).parents[1] / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("benchmarks_report", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_runs_among_many_are_named_and_left_out(tmp_path, capsys):
    made_up = _benchmark().made_up(tmp_path, images=4, seeds=2, attacks=1, strengths=1)
    assert made_up == 80
    folders = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    broken = {
        0: ("records.jsonl", lambda old: old[:500] + b"\xff\x00" + old[502:]),
        1: ("records.jsonl", lambda old: re.sub(rb'"psnr": [^,]*', b'"psnr": "x"', old)),
        2: ("run.json", lambda old: old[: len(old) // 2]),
        3: ("config.yaml", lambda old: b"{ [" + old),
        4: ("records.jsonl", lambda old: old.replace(b'"image"', b'"imagf"', 1)),
        7: ("run.json", lambda old: old.replace(b'"accuracy": 0.', b'"accuracy": 7.', 1)),
        8: ("run.json", lambda old: old.replace(b'"grants": [', b'"grants": 3, "x": [', 1)),
    }
    for n, (name, damage) in broken.items():
        path = folders[n] / name
        path.write_bytes(damage(path.read_bytes()))
    half = folders[5] / "records.jsonl"
    half.write_bytes(half.read_bytes()[:-100])  # killed in mid-write
    (folders[5] / "run.json").unlink()
    (folders[6] / "grid.png").write_bytes((folders[6] / "grid.png").read_bytes()[:3000])
    assert report.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    text = _Text((tmp_path / "report.html").read_text()).text
    for n, (name, _) in broken.items():
        assert f"left out: {folders[n] / name}" in err
        assert f"left out: {folders[n] / name}" in text
    assert err.count("left out:") == len(broken)
    assert f"{folders[5]}: the last row was cut off in mid-write" in " ".join(out.split())
    assert f"{folders[6] / 'grid.png'}" in text
    assert "4 of 4 images" not in text


@pytest.mark.slow
def test_twenty_thousand_rows_take_less_than_twenty_seconds_and_fifteen_megabytes(tmp_path):
    module = _benchmark()
    assert module.made_up(tmp_path, images=16, seeds=5) == 20_000
    seconds, _, page_size = module.measured(tmp_path)
    assert seconds < 20
    assert page_size < 15
    files = [tmp_path / f"report{suffix}" for suffix in tables.SUFFIXES]
    assert all(file.stat().st_size < 2**20 for file in files)
    assert len(list(csv.DictReader(files[0].open()))) == 130


@functools.cache
def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.mark.skipif(_chromium() is None, reason="no Chromium on PATH to take a screenshot with")
@pytest.mark.parametrize(("width", "scheme"), [(1200, 1), (390, 0)])
def test_the_page_opens_in_chromium(tmp_path, width, scheme):
    folder = _standard(tmp_path / "a")
    _page(folder)
    shot = tmp_path / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    quiet = "--disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [str(_chromium()), *flags.split(), *quiet.split(), f"--user-data-dir={tmp_path / 'user'}",
         f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},1200",
         "--hide-scrollbars", f"--screenshot={shot}", Path(folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.exists(), done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape[1] == width
    # the corner shows the page's own background, light or dark, and the page is not empty
    assert (pixels[2, 2] > 250).all() if scheme else (pixels[2, 2] < 40).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_what_is_proven_stands_beside_what_was_measured(tmp_path):
    def line(name, value, kind="bound", how="PRV", **more):
        return {"name": name, "value": value, "kind": kind, "how": how, **more}

    claim = {
        "epsilon": 2.5, "delta": 1e-5, "accountant": "PRV",
        "formal": [line("epsilon", 2.5), line("mu", 0.5, "approximation"),
                   line("mu ", 12.0, "approximation"), line("naming 1 of 10", 0.219)],
        "formal_update": [line("naming 1 of 10", 0.389), line("epsilon", 4.4, how="Gaussian")],
        "measured": [line("naming 1 of 10", 0.25, "measured", low=0.07, high=0.59, chance=0.5)],
    }  # fmt: skip
    folder = _standard(tmp_path, privacy=claim)
    ((name, facts),) = words.private(numbers.groups([records.read(folder)]))
    assert name == "dpsgd"  # the control claims nothing
    assert facts[:-2] == [
        ("epsilon, PRV", "2.5", words.ABSENT, words.ABSENT),
        ("epsilon, Gaussian", words.ABSENT, "4.4", words.ABSENT),
        ("mu", "about 0.5", words.ABSENT, words.ABSENT),
        ("mu ", words.ABSENT, words.ABSENT, words.ABSENT),  # its central limit says nothing
        ("naming 1 of 10", "21.9 %", "38.9 %", "25 % [7, 59]"),
    ]
    assert [fact[0] for fact in facts[-2:]] == ["PSNR, dB", "the best null's PSNR, dB"]
    page = _page(folder)
    assert "What is proven at most, and what was measured" in page
    assert "25\u00a0% [7,\u00a059]" in page
    assert "is proven at most" not in _page(_standard(tmp_path / "plain"))

"""Differences between runs are of the same images, and say how many there were."""

import pytest

from fedsec import compare, records, stats
from fedsec.records import Row


def run(folder, scores, word="", defense="none", age=0, seed=0, threat="t"):
    """A finished run: image -> PSNR (or several)."""
    out = records.open_folder(folder)
    rows = [(image, psnr) for image, each in scores.items()
            for psnr in (each if isinstance(each, tuple) else (each,))]  # fmt: skip
    out.append(
        Row(run="r", attack="a", defense=defense, threat=threat, client="c", data="d", model="m",
            seed=seed, round=age, victim=v, image=image, batch=1, psnr=psnr)
        for v, (image, psnr) in enumerate(rows)
    )  # fmt: skip
    out.finish({"status": "done", "command": f"python -m fedsec.run seed={seed} {word} out=x"})
    return folder


def told(capsys, *words):
    status = compare.main([str(word) for word in words])
    return status, capsys.readouterr()


@pytest.fixture
def two(tmp_path):
    run(tmp_path / "a", {1: 20.0, 2: 24.0, 3: 31.0, 9: 50.0}, "model=a")
    run(tmp_path / "b", {3: 30.0, 1: 18.0, 2: (19.0, 21.0), 7: 10.0}, "model=b")
    return tmp_path


def test_only_images_that_both_attacked_are_compared(two, capsys):
    status, said = told(capsys, two, "--to", "model=a")
    assert status == 0
    first, second = (line.split("  ") for line in said.out.splitlines()[1:3])
    assert first[0] == "model=a"
    assert "4       19.5 [" in said.out.splitlines()[2], "means are of all of a run's images"
    mean, low, high = stats.paired_difference([18, 20, 30], [20, 24, 31], [1, 2, 3])
    assert mean == pytest.approx(-7 / 3)
    assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" in said.out
    assert [word.strip() for word in second if word][-2:] == ["3", "0.25"]
    whole = stats.paired_difference([18, 20, 30, 10], [20, 24, 31, 50], [1, 2, 3, 4])
    assert f"{whole[0]:+.1f}" not in said.out, "else the order would not matter"


def test_runs_that_differ_in_their_seed_are_one(tmp_path, capsys):
    """An image under two seeds is two pairs, and one image where intervals are drawn."""
    for seed in (0, 1):
        run(tmp_path / f"a{seed}", {1: 20.0, 2: 24.0, 3: 22.0}, "model=a", seed=seed)
        run(tmp_path / f"b{seed}", {1: 18.0 + seed, 2: 19.0, 3: 22.0}, "model=b", seed=seed)
    status, said = told(capsys, tmp_path, "--to", "model=a")
    assert status == 0
    lines = said.out.splitlines()
    assert len(lines) == 6, "head, two settings, and two lines on intervals and p"
    mean, low, high = stats.paired_difference(
        [18, 19, 22, 19, 19, 22], [20, 24, 22] * 2, [1, 2, 3] * 2
    )
    assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" in lines[2]
    assert lines[2].split()[-2:] == ["6", "0.50"]


def test_an_image_of_another_seed_is_another(tmp_path, capsys):
    run(tmp_path / "a", {1: 20.0, 2: 24.0}, "model=a")
    run(tmp_path / "b", {1: 18.0, 2: 19.0}, "model=b", seed=1)
    _, said = told(capsys, tmp_path, "--to", "model=a")
    assert said.out.splitlines()[2].split()[-1] == "0"
    _, said = told(capsys, tmp_path, "--to", "model=c")
    assert said.err == "error: --to: must be among model=a, model=b, got model=c\n"


def test_without_a_reference_a_control_stands_beside_a_defense_and_the_youngest(tmp_path, capsys):
    folder = tmp_path / "a"
    out = records.open_folder(folder)
    for age, shift in ((0, 0.0), (50, -4.0), (200, -9.0)):
        out.append(
            Row(run="r", attack="a", defense=defense, threat="t", client="c", data="d", model="m",
                seed=0, round=age, victim=v, image=v, batch=1, psnr=25.0 + v + shift - less)
            for defense, less in (("none", 0.0), ("prune", 3.0))
            for v in range(3)
        )  # fmt: skip
    status, said = told(capsys, folder)
    assert status == 0
    lines = said.out.splitlines()
    assert [" ".join(line.split()[3:5]) for line in lines[1:7]] == [
        "none 0", "prune 0", "none 50", "prune 50", "none 200", "prune 200"]  # fmt: skip
    gaps = [" ".join(line.split()[9:]) for line in lines[1:7]]
    # the least p of three images is 0.25, and there are five differences
    defended = "none (control) -3.0 [-3.0, -3.0] 3 1.00"
    assert gaps == ["", defended, "round 0 -4.0 [-4.0, -4.0] 3 1.00", defended,
                    "round 0 -9.0 [-9.0, -9.0] 3 1.00", defended]  # fmt: skip


def test_runs_are_named_by_what_their_commands_do_not_share(tmp_path):
    folders = [run(tmp_path / name, {1: 1.0}, word, seed=seed) for name, word, seed in
               (("a", "model=a k=1", 0), ("b", "model=b k=1", 0), ("c", "k=1", 0),
                ("d", "model=a k=1", 1))]  # fmt: skip
    read = [records.read(folder) for folder in folders]
    assert compare.named(read) == ["model=a", "model=b", "as it is", "model=a"]
    assert compare.named([*read, read[0]]) == [
        "model=a",
        "model=b",
        "as it is",
        "model=a",
        "model=a",
    ]
    again = records.read(run(tmp_path / "e", {1: 2.0}, "model=a k=1"))
    assert compare.named([*read, again]) == ["a", "b", "c", "d", "e"]


def test_a_table_for_a_page(two, capsys):
    _, said = told(capsys, two, "--markdown")
    head, rule, *rows = said.out.splitlines()
    assert head.startswith("| run | defense | round | images | PSNR dB |")
    assert "difference" not in head, "there is none"
    assert set(rule) == {"|", "-", " "}
    assert rows[0].startswith("| model=a | none | 0 | 4 | 31.2 [")


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    status, said = told(capsys, tmp_path / "nowhere")
    assert (status, said.out) == (1, "")
    assert said.err.startswith("error: folder: must exist, got ")
    assert said.err.count("\n") == 1
    records.open_folder(tmp_path / "empty").finish({"status": "done"})
    status, said = told(capsys, tmp_path / "empty")
    assert status == 1
    assert said.err.startswith("error: folder: must hold at least one finished image")
    assert told(capsys)[0] == 1


def test_a_run_that_cannot_be_read_is_named_and_left_out(two, capsys):
    (two / "c").mkdir()
    (two / "c" / "records.jsonl").write_text("{ broken\n")
    status, said = told(capsys, two)
    assert (status, len(said.out.splitlines())) == (0, 6)
    assert said.err.startswith(f"left out: {two}/c/records.jsonl:1: must be JSON")


def test_runs_that_differ_in_their_threat_model_stand_side_by_side(tmp_path, capsys):
    for threat, shift in (("naive", 0.0), ("knowing", 4.0)):
        for defense, level in (("prune", 12.0), ("noise", 20.0)):
            for seed in (0, 1):
                scores = {i: level + shift * (i + 1) + seed for i in range(3)}
                word = f"defense={defense} threat={threat} threat.tampers=false"
                run(tmp_path / f"{threat}{defense}{seed}", scores, word, defense, seed=seed,
                    threat=threat)  # fmt: skip
    status, said = told(capsys, tmp_path, "--by", "threat", "--markdown")
    assert status == 0
    head, _, *rows = said.out.splitlines()
    names = [word.strip() for word in head.strip("| ").split("|")]
    assert names == [
        *("run", "defense", "round", "knowing dB", "naive dB", "difference dB", "pairs"),
        "p (Holm)",
    ]
    assert len([row for row in rows if row.startswith("|")]) == 2, "one line for each defense"
    assert stats.holm([0.25, 0.25]) == [0.5, 0.5]
    mean, low, high = stats.paired_difference([0.0] * 6, [4.0, 8, 12] * 2, [0, 1, 2] * 2)
    for defense, level in (("noise", 20.0), ("prune", 12.0)):
        line = next(row for row in rows if row.startswith(f"| defense={defense} |"))
        assert line.endswith(f"| {mean:+.1f} [{low:+.1f}, {high:+.1f}] | 6 | 0.50 |")
        assert f"| {level + 0.5 + 8:.1f} [" in line
        assert f"| {level + 0.5:.1f} [" in line


def test_a_defense_seen_by_one_threat_model_only_leaves_the_others_column_empty(tmp_path, capsys):
    run(tmp_path / "a", {1: 20.0}, "defense=prune threat=t", "prune")
    run(tmp_path / "b", {1: 21.0}, "defense=prune threat=u", "prune", threat="u")
    run(tmp_path / "c", {1: 22.0}, "defense=noise threat=u", "noise", threat="u")
    _, said = told(capsys, tmp_path, "--by", "threat", "--markdown")
    assert "| defense=noise | noise | 0 |  | 22.0 |  |  |" in said.out
    assert "| defense=prune | prune | 0 | 20.0 | 21.0 | +1.0 | 1 |" in said.out
    assert told(capsys, tmp_path, "--by", "colour")[0] == 1

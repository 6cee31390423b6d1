"""Each suspicion is raised where it should be, nowhere else, and has its paragraph."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_configs import options, preset

from fedsec import flags, records
from fedsec.client import client_streams, local_update
from fedsec.defense import Compose, Defense
from fedsec.models import LeNetSpec
from fedsec.report import numbers, words
from fedsec.rng import stream
from fedsec.run import CONFIGS
from fedsec.types import Batch, Local, Party

ROOT = CONFIGS.parent
NULL = 14.0
WIGGLE = torch.linspace(-1, 1, 8).tolist()


def rows(defense: str, psnr: float, images: int = 8, **changed) -> list[records.Row]:
    return [
        replace(
            records.Row(
                run="r", attack="inverting", defense=defense, threat="honest_server",
                client="gradient", data="photos", model="lenet", seed=0, round=0, batch=1,
                victim=i, image=i, psnr=psnr + WIGGLE[i], null_psnr=NULL, loss=0.3,
            ),
            **changed,
        )
        for i in range(images)
    ]  # fmt: skip


def run(*parts: list[records.Row], accuracy=0.6, random=False, status="done", said=(),
        measured=None):  # fmt: skip
    """A run as its folder is read; `parts` are the rows of each defense."""
    utility = {"control_accuracy": accuracy, "accuracy": 0.5, "accuracy_loss": accuracy - 0.5,
               "chance_accuracy": 0.1, "test_images": 500}  # fmt: skip
    told = {"status": status, "utility": utility, "random_defense": random, "flags": list(said)}
    if measured:
        line = {"chance": measured[0], "right": measured[1], "made": 64, "bound": 0.018}
        told["privacy"] = {"measured": [line]}
    return records.Run(Path("nowhere"), told, tuple(r for part in parts for r in part), False)


def lines(*runs: records.Run) -> list[str]:
    return flags.suspicious(numbers.scenarios(numbers.groups(runs)))


def raised(*runs: records.Run) -> list[str]:
    """The names of the flags, each of which must be the end of a line."""
    return [re.fullmatch(r".* \[([a-z-]+)\]", line)[1] for line in lines(*runs)]  # type: ignore


CONTROL, DEFENDED = rows("none", 22.0), rows("prune", 14.0)


def test_a_clean_run_raises_nothing():
    assert raised(run(CONTROL, DEFENDED)) == []


def losses(part: list[records.Row], *values: float | None) -> list[records.Row]:
    return [replace(r, loss=v) for r, v in zip(part, values, strict=False)] + part[len(values) :]


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("control-does-not-leak", run(rows("none", 14.0), DEFENDED)),
        ("accuracy-at-chance", run(CONTROL, DEFENDED, accuracy=0.12)),  # 60 of 500 may be luck
        ("below-null", run(CONTROL, rows("prune", 11.0))),
        ("leaks-more", run(CONTROL, rows("prune", 22.5))),
        ("one-draw", run(CONTROL, DEFENDED, random=True)),
        ("matched-by-another", run(CONTROL, losses(DEFENDED, 0.001))),
        ("more-than-proven", run(CONTROL, DEFENDED, measured=(1e-4, 20))),
        ("loss-not-finite", run(CONTROL, losses(DEFENDED, float("nan")))),
        ("loss-not-finite", run(losses(CONTROL, float("inf")), DEFENDED)),
        ("restarts-lost", run([replace(CONTROL[0], flags=("1 of 4 restarts became non-finite",)),
                               *CONTROL[1:]], DEFENDED)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_each_suspicion_is_raised_alone(name, result):
    assert raised(result) == [name]


@pytest.mark.parametrize(
    "result",
    [
        run(rows("none", 14.0, images=3), rows("prune", 11.0, images=3)),  # too few to tell
        run(CONTROL, DEFENDED, accuracy=0.2),  # of a network that has begun to learn
        run(CONTROL, rows("prune", 13.6)),  # below the null on average, but within the interval
        run(CONTROL, [replace(r, psnr=22 - WIGGLE[r.image]) for r in CONTROL]),  # as much
        run(CONTROL, losses(rows("prune", 16.0), 0.001)),  # matched, and the right image
        run(CONTROL, losses(DEFENDED, -0.5)),  # a log likelihood
        run(rows("none", 14.0), DEFENDED, status="failed"),  # its status is flag enough
        run(rows("none", 22.0), random=True),  # only the control
        run(CONTROL, DEFENDED, measured=(0.01, 4)),  # one in a hundred is luck
    ],
)
def test_what_is_no_suspicion(result):
    assert raised(result) == []


def test_more_seeds_take_the_flag_of_one_draw_back():
    def seed(number: int) -> records.Run:
        return run(rows("none", 22.0, seed=number), rows("noise", 14.0, seed=number), random=True,
                   said=["noise draws [one-draw]", "kept"])  # fmt: skip

    assert raised(seed(0)) == ["one-draw"]
    assert raised(seed(0), seed(1)) == []
    runs = [seed(0), seed(1)]
    shown = words.warnings(runs, numbers.groups(runs))
    assert [line for line in shown if "one-draw" in line] == []  # worked out anew from both
    assert "kept (2 runs)" in shown


def test_numbers_are_in_the_words_and_scenarios_are_named():
    (line,) = lines(run(CONTROL, rows("prune", 11.0)))
    assert line.startswith("inverting under prune is below the null (-3.0 dB [-3.")
    two = run(rows("none", 14.0), rows("none", 22.0, round=5))
    (line,) = lines(two)
    assert line.startswith("round 0: the control is not above the null (0.0 dB [-0.")


def test_many_settings_that_raise_the_same_are_one_line():
    def rounds(count: int) -> records.Run:
        return run(*(rows("none", 14.0, round=r) for r in range(count)))

    assert raised(rounds(2)) == ["control-does-not-leak"] * 2
    (line,) = lines(rounds(5))
    assert line.startswith("round 0: the control is not above the null (0.0 dB [-0.")
    assert line.endswith("; likewise 4 other settings [control-does-not-leak]")


def test_what_rows_say_is_not_said_twice(tmp_path):
    """Read back, a loss that was not finite is None with a flag; the report sums these up."""
    folder = records.open_folder(tmp_path / "a")
    folder.append(losses(CONTROL, float("nan")))
    folder.finish({"status": "done", "flags": []})
    folder.close()
    read = records.read(tmp_path / "a")
    assert read.rows[0].loss is None
    assert raised(read) == ["loss-not-finite"]
    shown = words.warnings([read], numbers.groups([read]))
    assert [line for line in shown if "loss" in line and "accuracy" not in line] == [
        "none (control), 1 of 8 images: the attack's objective ended non-finite [loss-not-finite]"
    ]


@pytest.mark.parametrize("name", [n for n in options("defense") if n != "composed"])
def test_a_defense_says_whether_it_draws(name):
    """By the dumb twin: two draws on one batch and one gradient."""
    defense = preset("defense", name)
    images = torch.rand(4, 3, 16, 16, generator=stream(0, "images"))
    batch = Batch(images, torch.eye(4))
    model = LeNetSpec(norm="none", mode="train", weights=None, mean=None, std=None, init="uniform")
    built = model.build((3, 16, 16), 4, (0.5,) * 3, (0.2,) * 3, stream(0, "model"))

    built = defense.architecture(built, stream(0, "architecture"))

    def sent(seed: int) -> torch.Tensor:
        local, rngs = Local("gradient", 1.0), client_streams(seed, 0, 0)
        update, _ = local_update(built, [batch], defense, local, rngs, len(batch))
        update = defense.seal(update, Party(0, 2, seed, 0, ("train",)))
        return torch.cat([t.flatten() for t in update.tensors.values()])

    assert torch.equal(sent(0), sent(0))
    assert defense.random == (not torch.equal(sent(0), sent(1)))
    assert Compose((Defense(), defense)).random == defense.random


def test_a_run_raises_its_suspicions_once(tmp_path, monkeypatch, capsys):
    assert tiny.call(monkeypatch, tiny.words(tmp_path, "defense=noise", "rounds=0")) == 0
    told = tiny.whole(tmp_path / "out")
    assert told["random_defense"] is True
    assert told["utility"]["chance_accuracy"] == 0.25
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("one-draw", "accuracy-at-chance"):
        assert sum(f"[{name}]" in flag for flag in told["flags"]) == 1
        assert printed.count(f"[{name}]") == 1


# ---------------------------------------------------------------- docs/flags.md


SOURCES = {p: p.read_text() for folder in ("fedsec", "attacks", "defenses")
           for p in (ROOT / folder).rglob("*.py")}  # fmt: skip
PAGE = (ROOT / "docs/flags.md").read_text()


def test_every_flag_with_a_name_has_its_paragraph_and_the_reverse():
    code = "\n".join(SOURCES.values())
    named = set(re.findall(r" \[([a-z]+(?:-[a-z]+)+)\]\"", code))
    assert set(flags.NAMES) <= named
    assert len(named) >= 10
    described = re.findall(r"^### ([a-z]+(?:-[a-z]+)+)$", PAGE, re.MULTILINE)
    assert sorted(described) == sorted(named)


def test_the_words_of_all_other_flags_are_those_of_the_code():
    quoted = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
    assert len(quoted) >= 20
    code = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(SOURCES.values()))  # literals over several lines
    assert [words for words in quoted if words not in code] == []


def test_every_paragraph_says_something():
    paragraphs = re.findall(r"^### .+\n\n((?:.+\n)+)", PAGE, re.MULTILINE)
    assert len(paragraphs) == PAGE.count("\n### ")
    assert all(len(words.split()) >= 12 for words in paragraphs)

"""The benchmarks' arithmetic, and what they do where a peer is missing, lies or dies."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F


def loaded(name):
    source = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


peers, steps, private = loaded("peers"), loaded("engine"), loaded("dpsgd")


# ---- the peer's problem, restated ---------------------------------------------------------------


def convolved_variation(x):
    """The peer's smoothness as it has it: a grouped convolution with zero padding."""
    right = torch.tensor([[0.0, 0, 0], [0, -1, 1], [0, 0, 0]])
    kernel = torch.stack([right.T, right])[:, None].repeat(3, 1, 1, 1)
    size = F.conv2d(x, kernel, padding=1, groups=3).abs() + 1e-8
    return (size[:, 0::2] + size[:, 1::2]).mean()


def test_the_peers_smoothness_is_restated_exactly():
    x = torch.randn(2, 3, 9, 7)
    assert torch.allclose(peers.padded_variation(x), convolved_variation(x), atol=1e-6)


@pytest.mark.parametrize("steps", [7, 60, 600, 4801])
def test_the_peers_schedule_is_restated_exactly(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    points = [steps // 2.667, steps // 1.6, steps // 1.142]
    twin = torch.optim.lr_scheduler.MultiStepLR(optimizer, points, gamma=0.1)  # type: ignore[arg-type]
    ours = peers.step_lr(steps)
    for step in range(steps):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        twin.step()


# ---- arithmetic ---------------------------------------------------------------------------------


def outcome(marks, seconds=9.0):
    return peers.Outcome(torch.zeros(1, 3, 8, 8), [0.0], seconds, marks)


def test_seconds_a_step_leave_out_what_comes_before_and_after_the_steps():
    assert peers.per_step(outcome([(25, 4.0), (50, 5.0), (75, 6.0), (75, 9.0)]), 75) == 2 / 50
    assert peers.per_step(outcome([(10, 4.0)]), 10) == 0.9  # one mark: the whole run
    assert peers.per_step(outcome([]), 10) == 0.9


@pytest.mark.parametrize("most", [1, 33, 1200])
@pytest.mark.parametrize("enough", [1, 2, 37, 600, 1200, 1201])
def test_the_fewest_steps_are_found_to_a_tenth(most, enough):
    tried = []

    def reaches(steps):
        tried.append(steps)
        return steps >= enough

    found = peers.fewest(reaches, most)
    if enough > most:
        assert found is None
    else:
        assert enough <= found <= enough + max(1, found // 10)
    assert max(tried) <= most


def test_a_ratio_is_the_median_of_pairs_with_its_range():
    assert peers._ratios([2.0, 6.0, 4.0], [1.0, 1.0, 1.0]) == "4.00 (2.00..6.00)"
    assert peers._ratios([], [1.0]) == ""


# ---- a whole comparison -------------------------------------------------------------------------


class Twin:
    """A peer in this process: the plainest loop of the same attack, by double backward."""

    offset = 0.0  # added to the objective, to be caught

    def __init__(self, *told):
        self.closed = False

    def close(self):
        self.closed = True

    def ask(self, command, **words):
        return getattr(self, command)(**words)

    def hello(self):
        return "the twin"

    def victim(self, model, gradients, label, shape, mean, std):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self.model, self.gradients, self.label = model, gradients, label
        self.low = torch.tensor(mean).neg().div(torch.tensor(std)).view(3, 1, 1)
        self.high = (1 - torch.tensor(mean)).div(torch.tensor(std)).view(3, 1, 1)

    def run(self, steps, tv, lr, start):
        x = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=lr)
        losses, marks, begun = [], [], time.perf_counter()
        observed = torch.cat([g.flatten() for g in self.gradients])
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * peers.step_lr(steps)(step)
            task = F.cross_entropy(self.model(x), self.label)
            guess = torch.autograd.grad(task, list(self.model.parameters()), create_graph=True)
            flat = torch.cat([g.flatten() for g in guess])
            loss = 1 - F.cosine_similarity(flat, observed, dim=0) + tv * convolved_variation(x)
            (gradient,) = torch.autograd.grad(loss, x)
            if loss < min(losses, default=torch.inf):
                best = x.detach().clone()
            losses.append(loss.item() + self.offset)
            x.grad = gradient.sign()
            optimizer.step()
            x.data = x.data.clamp(self.low, self.high)
            if step % 25 == 0 or step + 1 == steps:
                marks.append((step + 1, time.perf_counter()))
        seconds = time.perf_counter() - begun
        return {"image": best, "seconds": seconds, "marks": marks, "losses": losses}


@pytest.fixture
def short(monkeypatch):
    """Nothing to install, and few steps to a timing."""
    monkeypatch.setattr(peers, "environment", lambda folder: folder)
    monkeypatch.setattr(peers, "STEPS", 10)


def compared(folder, capsys, *more):
    line = [
        "--models", "lenet", "--steps", "20", "--images", "2", "--pairs", "1", "--lanes", "2",
        "--device", "cpu", "--tv", "0.01", "--data", f"npz:{tiny.npz(folder)}",
        "--env", str(folder / "env"),
    ]  # fmt: skip
    status = peers.main([*line, *more])
    said = capsys.readouterr()
    rows = [r.strip("| \n").split(" | ") for r in said.out.splitlines() if r.startswith("| lenet")]
    return status, said, rows[0] if rows else []


def test_a_comparison_with_an_equal_peer(tmp_path, capsys, monkeypatch, short):
    """Equal problems: the objectives agree, and the same steps of the same kind are as good."""
    monkeypatch.setattr(peers, "Peer", Twin)
    monkeypatch.setattr(peers, "LENGTHS", (1.0, 1.5))
    same = ["--attack-overrides", "rule=signed", "lr=0.1", "steps=20"]
    status, said, cells = compared(tmp_path, capsys, "--tv", "0.01", "0.1", *same)
    assert status == 0, said.err
    assert "objectives differ by" in said.out
    for who in ("peer", "fedsec"):
        assert f"{who}: tv 0.01 lr 0.1" in said.out
    assert said.out.count("lr 0.15 ") == 2, "both sides choose among as many"
    assert "not run" not in said.out
    assert len(cells) == len(peers.HEAD)
    assert float(cells[13]) == pytest.approx(float(cells[8]), abs=0.5), "dB, after equal steps"
    assert all(float(cells[i].split()[0]) > 0 for i in (1, 2, 3, 4, 5, 7))


def test_the_tuning_images_are_not_compared(tmp_path):
    words = ["--data", f"npz:{tiny.npz(tmp_path)}", "--device", "cpu", "--images", "3"]
    timed, compared, tuning = peers.cases(peers.arguments().parse_args(words), "lenet")
    assert (len(timed.images), len(compared.images)) == (8, 3)
    assert len(tuning.images) == peers.TUNING
    apart = (compared.images[:, None] - tuning.images).abs().flatten(2).amax(-1)
    assert apart.min() > 0


def test_the_better_weight_and_then_the_better_length_are_chosen(monkeypatch, capsys):
    quality = {(0.1, 1.0): 1.0, (0.2, 1.0): 3.0, (0.2, 0.5): 4.0, (0.2, 2.0): 2.0, (0.1, 0.5): 9.0}

    def run(case, recipe, rows, lanes):
        return type("O", (), {"psnr": lambda self, truth: quality[recipe]})()

    monkeypatch.setattr(peers, "by_fedsec", run)
    case = type("C", (), {"images": [0]})()
    chosen = peers.tune("x", case, lambda t: (t.tv, t.lr), (0.1, 0.2), 1.0, 8)
    assert chosen == peers.Tuned(0.2, 0.5)
    alone = peers.tune("x", case, lambda t: (t.tv, t.lr), (0.1,), 1.0, 8)
    assert alone == peers.Tuned(0.1, 1.0), "one weight: nothing is tuned"


def test_fedsec_may_be_given_a_weight_of_its_own(tmp_path, capsys, monkeypatch, short):
    monkeypatch.setattr(peers, "Peer", Twin)
    status, said, cells = compared(tmp_path, capsys, "--attack-overrides", "tv=0.5", "steps=20")
    assert status == 0, said.err
    assert cells[6] == "0.01, 0.1", "the peer's"
    assert cells[9] == "0.5, 0.5"


def test_a_peer_that_solves_another_problem_is_not_timed(tmp_path, capsys, monkeypatch, short):
    monkeypatch.setattr(peers, "Peer", type("Liar", (Twin,), {"offset": 1e-3}))
    status, said, cells = compared(tmp_path, capsys)
    assert status == 0
    assert "not run      lenet: refused: the objectives differ by 1.0e-03" in said.out
    assert cells[1] == "not run"
    assert float(cells[2]) > 0, "fedsec's own numbers are still there"


def test_a_broken_objective_does_not_pass_for_an_equal_one(tmp_path, capsys, monkeypatch, short):
    monkeypatch.setattr(peers, "Peer", type("Broken", (Twin,), {"offset": float("nan")}))
    _, said, cells = compared(tmp_path, capsys)
    assert "refused: the objectives differ by nan" in said.out
    assert cells[1] == "not run"


def test_a_peer_that_cannot_be_installed_is_a_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "STEPS", 10)
    monkeypatch.setattr(peers, "BREACHING", "/nowhere/breaching.whl")
    status, said, cells = compared(tmp_path, capsys)
    assert status == 0
    assert "not run      peer:" in said.out
    assert "breaching.whl" in said.out
    assert cells[1] == cells[6] == "not run"


def test_a_peer_that_dies_says_why():
    """This interpreter has no breaching."""
    peer = peers.Peer(Path(sys.executable), "cpu", 1, "perf_counter")
    with pytest.raises(peers.PeerFailed, match="No module named 'breaching'"):
        peer.ask("hello")


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    calls = []

    def call(*words):
        calls.append(words)
        (tmp_path / "site").mkdir(exist_ok=True)
        if "venv" in words:
            Path(words[-1]).mkdir()
        return f"{tmp_path / 'site'}\n"

    monkeypatch.setattr(peers, "_call", call)
    python = peers.environment(tmp_path)
    made = len(calls)
    assert made == 3
    assert peers.environment(tmp_path) == python
    assert len(calls) == made
    borrowed = (tmp_path / "site/borrowed.pth").read_text().splitlines()
    assert any((Path(path) / "torch").is_dir() for path in borrowed)
    monkeypatch.setattr(peers, "BREACHING", "breaching==0.1.3")
    assert peers.environment(tmp_path) != python, "another checkout's may be in use"
    assert len(calls) == 2 * made
    monkeypatch.undo()
    assert peers.environment(tmp_path) == python, "and is not made again"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "error: steps: must be at least 1, got 0"),
        (["--data", "imagenet"], "error: data: must be photos or npz:PATH, got imagenet"),
        (["--device", "cuda", "--clock", "cpu"], "error: clock: must be wall on a GPU, got cpu"),
        (
            ["--attack-overrides", "step=3"],
            "error: attack-overrides: Key 'step' not in 'Inverting'",
        ),
        (["--attack-overrides", "lr=-1"], "error: lr: must be"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, said, capsys, monkeypatch, tmp_path):
    def no_environment(folder):
        raise peers.PeerFailed("not in this test")

    monkeypatch.setattr(peers, "environment", no_environment)
    assert peers.main(["--models", "lenet", "--env", str(tmp_path), *words]) == 1
    assert capsys.readouterr().err.startswith(said)


# ---- the engine's own table ---------------------------------------------------------------------


def test_the_engines_table_and_profile_have_a_line_for_each_case(capsys):
    small = ["--models", "lenet", "--device", "cpu", "--lanes", "1", "2"]
    assert steps.main([*small, "--batch", "1", "--mode", "eval", "--seconds", "0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    for line, lanes in zip(lines, ("1", "2"), strict=True):
        assert line[:4] == ["lenet", "eval", "1", lanes]
        assert all(float(cell) > 0 for cell in line[4:11])
        swept, doubled = float(line[10]), float(line[9])
        assert swept < doubled, "GFLOP: the sweeps do the same with less"
    assert steps.main([*small, "--profile"]) == 0
    said = capsys.readouterr().out
    for lanes in ("1 lane", "2 lanes"):
        for when in ("before: autograd", "after: sweeps"):
            assert f"lenet, batch 1, {lanes}, {when}" in said


# ---- dpsgd's table ------------------------------------------------------------------------------


def test_dpsgds_table_has_a_line_for_each_case(capsys):
    assert private.main(["--models", "lenet", "resnet20", "--batch", "2", "--turns", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [line[0] for line in lines] == ["lenet", "resnet20"]
    assert [line.index("*") for line in lines] == [4, 5], "what dpsgd takes: examples, ghost"
    assert all(float(cell) > 0 for line in lines for cell in line[2:6] if cell != "*")

"""sweep=study: the cells of Huang et al. 2021, each composes and is what its name says."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from defenses.instahide import InstaHide
from defenses.mixup import Mixup
from defenses.prune import Prune
from fedsec.config import _part
from fedsec.defense import parts
from fedsec.run import CONFIGS

PRUNED = {"50": 0.5, "70": 0.7, "90": 0.9, "95": 0.95, "99": 0.99, "999": 0.999}
SWEEP = OmegaConf.load(CONFIGS / "sweep/study.yaml").hydra.sweeper.params
CELLS = SWEEP.study.split(",")


def test_the_sweep_has_every_cell_once():
    assert sorted(CELLS) == sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))
    assert len(CELLS) == 13


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_the_defense_that_it_is_called(cell):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("run", [f"study={cell}"])
    found = parts(_part(cfg.defense, "defense"))
    kind, _, number = cell.partition("_")
    kinds = {"prune": Prune, "mixup": Mixup, "instahide": InstaHide}
    if number in kinds:
        first, second = found
        assert isinstance(first, Prune)
        assert first.ratio == 0.9
        assert type(second) is kinds[number]
        assert second.k == 4
        return
    (only,) = found
    if kind == "none":
        assert type(only).__name__ == "Undefended"
    elif kind == "prune":
        assert only.ratio == PRUNED[number]
    else:
        assert type(only) is kinds[kind]
        assert only.k == int(number)
        assert only.k <= SWEEP.victim_batch
        assert kind == "mixup" or not only.inter

"""Which rows may be averaged together, and the averages with their intervals.

Rows are averaged only within a setting: the same attack, defense, threat model, client, data,
model, mode, round and batch, with the same hyperparameters; only seeds and images differ. Runs that
did not finish make settings of their own. Every mean carries a 95 % interval, or none where there
are too few images to have one, and stands beside the best null baseline.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedsec import records
from fedsec.checks import Refused
from fedsec.records import Row, Run

if TYPE_CHECKING:
    from fedsec.compare import Gap

CONTROL = "none"  # the defense of the control
FEWEST = 4  # images below which "leaks" is never said: a bootstrap of two or three is no interval

# Configuration that does not change what is measured, only on how much of it, where and how fast.
ASIDE = (
    *("seed", "out", "device", "control", "images", "attack_rounds", "sweep"),
    *("stack", "threads", "federation.engine", "data.root", "data.download"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (None where none can be had) over `count` of `total` values."""

    mean: float | None
    low: float | None
    high: float | None
    count: int
    total: int


@dataclass
class Family:
    """Comparisons that are shown together: the more there are, the more differ by chance."""

    groups: list[Group] = field(default_factory=list)

    @cached_property
    def chances(self) -> dict[int, float | None]:
        """Of each group, by its id, the p of its difference to the control, corrected (Holm)."""
        from fedsec import stats

        gaps = [group.against for group in self.groups]
        corrected = stats.holm([gap and gap.chance for gap in gaps])
        return dict(zip(map(id, self.groups), corrected, strict=True))


@dataclass(frozen=True, eq=False)  # one is itself: to compare thousands of rows helps nobody
class Group:
    """The rows of one setting, which may be averaged, and the runs that they came from."""

    setting: tuple[tuple[str, str], ...]  # what the rows name: attack, defense, ...
    tuned: tuple[tuple[str, str], ...]  # hyperparameters, from the runs' config.yaml
    status: str
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    family: Family = field(default_factory=Family, compare=False, repr=False)

    def __getitem__(self, key: str) -> str:
        return self.named[key]

    @cached_property
    def named(self) -> dict[str, str]:
        return dict(self.setting)

    def holds(self, row: Row) -> bool:
        """Whether a row of one of its runs is of this setting."""
        return all(str(getattr(row, key)) == value for key, value in self.setting)

    @property
    def control(self) -> bool:
        return self["defense"] == CONTROL

    @cached_property
    def scenario(self) -> tuple:
        """The setting without its defense: what is compared."""
        return self.without("defense")

    def without(self, *parts: str) -> tuple:
        """The setting but for its attack, say, and that one's hyperparameters."""
        named = tuple((k, v) for k, v in self.setting if k not in parts)
        return named, tuple(t for t in self.tuned if t[0].split(".")[0] not in parts), self.status

    @cached_property
    def images(self) -> int:
        return len({row.image for row in self.rows})

    def estimate(self, field: str) -> Estimate:
        """The mean of a row's field, with a bootstrap interval clustered by image."""
        if field not in self._estimates:
            values = [getattr(row, field) for row in self.rows]
            self._estimates[field] = _bootstrap(values, [row.image for row in self.rows])
        return self._estimates[field]

    @cached_property
    def _estimates(self) -> dict[str, Estimate]:
        return {}

    @property
    def psnr(self) -> Estimate:
        return self.estimate("psnr")

    @cached_property
    def gain(self) -> Estimate:
        """PSNR above the best null on the same image."""
        return _bootstrap([gain(row) for row in self.rows], [row.image for row in self.rows])

    @cached_property
    def success(self) -> Estimate:
        """Share of images whose PSNR is more than stats.MARGIN above that of their best null."""
        from fedsec import stats

        images = [row.image for row in self.rows]
        psnr, null = [row.psnr for row in self.rows], [row.null_psnr for row in self.rows]
        share, low, high = stats.success(psnr, null, images)
        known = {row.image for row in self.rows if gain(row) is not None}
        return Estimate(share, low, high, len(known), len(set(images)))

    @cached_property
    def labels(self) -> Estimate:
        """Share of images whose label the attack had right."""
        from fedsec import stats

        by_image: dict[int, list[bool]] = {}
        for row in self.rows:
            if row.label_ok is not None:
                by_image.setdefault(row.image, []).append(row.label_ok)
        right = sum(sum(held) / len(held) for held in by_image.values())
        return Estimate(*stats.wilson(right, len(by_image)), len(by_image), self.images)

    @cached_property
    def worst(self) -> Row | None:
        """The row of the image that leaked most."""
        scored = [row for row in self.rows if row.psnr is not None]
        return max(scored, key=lambda row: row.psnr or 0.0, default=None)

    @cached_property
    def median(self) -> float | None:
        from statistics import median

        scored = [row.psnr for row in self.rows if row.psnr is not None]
        return median(scored) if scored else None

    @cached_property
    def leaks(self) -> bool | None:
        """Whether the interval of the gain is above zero; None where images are too few."""
        scored = len({row.image for row in self.rows if gain(row) is not None})
        return None if self.gain.low is None or scored < FEWEST else self.gain.low > 0

    @cached_property
    def beside(self) -> Group | None:
        """The control of the same scenario."""
        alike = (g for g in self.family.groups if g.control and g.scenario == self.scenario)
        return None if self.control else next(alike, None)

    @cached_property
    def against(self) -> Gap | None:
        """PSNR minus the control's, on the images that both attacked."""
        from fedsec import compare

        if self.beside is None:
            return None
        return compare.difference(compare.scores(self.rows), compare.scores(self.beside.rows))

    @property
    def chance(self) -> float | None:
        """The p of that difference, corrected for the others of the report."""
        return self.family.chances.get(id(self))

    @cached_property
    def accuracy(self) -> Estimate:
        return _over_seeds(self.runs, "control_accuracy" if self.control else "accuracy")

    @cached_property
    def averaged(self) -> Estimate:
        """Accuracy of the weights averaged over the rounds, where a run measured it."""
        field = "averaged_accuracy"
        return _over_seeds(self.runs, f"control_{field}" if self.control else field)

    @cached_property
    def lost(self) -> Estimate:
        if self.control:
            return Estimate(0.0, None, None, 0, 0)
        return _over_seeds(self.runs, "accuracy_loss")

    @cached_property
    def claims(self) -> list[dict]:
        """Of each thing that is hidden the weakest guarantee of the runs, the first claim first."""
        found: dict[str, list[dict]] = {}
        for run in () if self.control else self.runs:
            for claim in claims(run):
                if claim.get("epsilon") is not None:
                    found.setdefault(claim.get("unit", "example"), []).append(claim)
        return [max(same, key=lambda claim: claim["epsilon"]) for same in found.values()]

    @property
    def privacy(self) -> dict:
        """The first of them; empty where there is none."""
        return next(iter(self.claims), {})

    @property
    def null(self) -> str:
        """The name of the baseline that most often was the best null."""
        names = Counter(row.null for row in self.rows if row.null)
        return names.most_common(1)[0][0] if names else "best null"


def claims(run: Run) -> list[dict]:
    """What a run claims to guarantee, each with what it hides."""
    first = inner(run, "privacy")
    return [first, *first.get("also", ())]


def groups(runs: Sequence[Run]) -> list[Group]:
    """The settings of `runs`, each scenario's control first. Equal rows count once."""
    found: dict[tuple, tuple[dict[tuple, Row], dict[Path, Run]]] = {}
    for run in runs:
        tuning = sorted(config(run.folder).items())
        for row in run.rows:
            keys = ("attack", "defense", "threat", "client", "data", "model", "mode", "batch")
            setting = tuple((k, str(getattr(row, k))) for k in (*keys, "round"))
            tuned = tuple(
                (k, v)
                for k, v in tuning
                if not (row.defense == CONTROL and k.startswith("defense"))
            )
            rows, folders = found.setdefault((setting, tuned, run.status), ({}, {}))
            # a sweep repeats its control in every cell: the same draw is one measurement
            rows.setdefault((row.seed, row.victim, row.image, row.psnr, row.loss), row)
            folders.setdefault(run.folder, run)
    made = [
        Group(setting, tuned, status, tuple(rows.values()), tuple(folders.values()))
        for (setting, tuned, status), (rows, folders) in found.items()
    ]
    order = list(dict.fromkeys(group.scenario for group in made))

    def rank(group: Group) -> tuple[bool, int, bool]:
        return group.status != "done", order.index(group.scenario), not group.control

    made.sort(key=rank)
    family = Family()
    family.groups += [replace(group, family=family) for group in made]
    return list(family.groups)


@dataclass(frozen=True)
class Scenario:
    """Settings that differ in their defense only, the control first."""

    heading: str  # what tells it from the others; "" where it is the only one
    groups: tuple[Group, ...]
    names: tuple[str, ...] = ()  # of the groups, where they differ in more than their defense

    @cached_property
    def labels(self) -> list[str]:
        """For each group its defense, and hyperparameters where they differ."""
        if self.names:
            return list(self.names)
        words = _differing(self.groups)
        return [
            "none (control)" if group.control else " · ".join([group["defense"], *more])
            for group, more in zip(self.groups, words, strict=True)
        ]

    def label(self, group: Group) -> str:
        return self.labels[next(i for i, other in enumerate(self.groups) if other is group)]


def scenarios(found: Sequence[Group]) -> list[Scenario]:
    """`found` split into what can be compared with each other."""
    return list(_split(tuple(found), "defense"))


@dataclass(frozen=True)
class World(Scenario):
    """Settings that differ in what client or attacker choose: their defense, and the attack.

    Its groups are those of the attack that reconstructs best on the mean, for each defended
    setting; what is split is data, model, age, client and threat model.
    """

    attacked: tuple[Group, ...] = ()  # by every attack


def worlds(found: Sequence[Group]) -> list[World]:
    return list(_worlds(tuple(found)))


@lru_cache(maxsize=4)
def _worlds(found: tuple[Group, ...]) -> tuple[World, ...]:
    split = []
    for scenario in _split(found, "defense", "attack"):
        same: dict[tuple, list[Group]] = defaultdict(list)
        for group in scenario.groups:
            same[group.without("attack")].append(group)
        best = tuple(max(each, key=lambda g: g.psnr.mean or 0.0) for each in same.values())
        first = sorted(best, key=lambda group: not group.control)
        split.append(World(scenario.heading, tuple(first), (), scenario.groups))
    return tuple(split)


@lru_cache(maxsize=8)  # console, page and files ask for the same
def _split(found: tuple[Group, ...], *parts: str) -> tuple[Scenario, ...]:
    """By everything but these parts of the setting; the heading is what tells each apart."""
    members: dict[tuple, list[Group]] = defaultdict(list)
    for group in found:
        members[group.without(*parts)].append(group)
    firsts = [each[0] for each in members.values()]
    varied = {k for k in firsts[0].named if len({g[k] for g in firsts}) > 1} if firsts else set()
    split = []
    for each, more in zip(members.values(), _differing(firsts, parts), strict=True):
        words = [
            f"{key} {value}" if key in ("mode", "batch", "round") else value
            for key, value in each[0].setting
            if key not in parts and key in varied
        ]
        words += more + ([each[0].status] if each[0].status != "done" else [])
        split.append(Scenario(" · ".join(words), tuple(each)))
    return tuple(split)


def by_stage(found: Sequence[Scenario]) -> list[Scenario]:
    """The same after each stage of attacks that run several; nothing of others.

    Rows stand as the attacker had them then: `psnr` of what it believed, `oracle_psnr` of the best
    so far, `seconds` and `backprops` of all stages up to that one.
    """
    split = []
    for scenario in found:
        parts: dict[str, Group] = {}
        for label, group in zip(scenario.labels, scenario.groups, strict=True):
            order = list(dict.fromkeys(step["stage"] for row in group.rows for step in row.stages))
            for n, stage in enumerate(order):
                rows = tuple(_after(row, order[: n + 1]) for row in group.rows if row.stages)
                parts[f"{label}: {stage}"] = replace(group, rows=rows)
        if parts:
            split.append(Scenario(scenario.heading, tuple(parts.values()), tuple(parts)))
    return split


def _after(row: Row, stages: Sequence[str]) -> Row:
    """A row as it stood after the last of these stages."""
    done = [step for step in row.stages if step["stage"] in stages]
    return replace(
        row,
        psnr=done[-1]["chosen_psnr"],
        oracle_psnr=done[-1]["best_psnr"],
        seconds=sum(step["seconds"] for step in done),
        backprops=sum(step["backprops"] for step in done),
        stages=tuple(done),
    )


def _differing(groups: Sequence[Group], aside: Sequence[str] = ()) -> list[list[str]]:
    """For each group the hyperparameters, by their last name, in which its like differ.

    Those of an attack are compared among settings with the same attack. `aside`: not these parts'.
    """
    tuned = [
        {k: v for k, v in g.tuned if k.split(".")[0] not in aside} for g in groups
    ]  # fmt: skip
    values: dict[tuple, set] = defaultdict(set)
    holders: Counter[tuple] = Counter()
    for group, each in zip(groups, tuned, strict=True):
        for key, value in each.items():
            values[_alike(group, key)].add(value)
            holders[_alike(group, key)] += 1
    peers = Counter((part, group.named.get(part)) for part in {k[0] for k in values}
                    for group in groups)  # fmt: skip
    return [
        [
            f"{key.rpartition('.')[2]} {value}"
            for key, value in each.items()
            if len(values[alike := _alike(group, key)]) > 1 or holders[alike] < peers[alike[:2]]
        ]
        for group, each in zip(groups, tuned, strict=True)
    ]


def _alike(group: Group, key: str) -> tuple[str, str | None, str]:
    part = key.split(".")[0]
    return part, group.named.get(part), key


def gain(row: Row) -> float | None:
    if row.psnr is None or row.null_psnr is None:
        return None
    return row.psnr - row.null_psnr


def _bootstrap(values: Sequence[float | int | None], clusters: Sequence) -> Estimate:
    from fedsec import stats

    floats = [None if value is None else float(value) for value in values]
    known = sum(value is not None for value in values)
    return Estimate(*stats.bootstrap(floats, clusters), known, len(values))


def _over_seeds(runs: Sequence[Run], field: str) -> Estimate:
    """A run's figure, averaged over seeds; one seed's accuracy has the test set's interval."""
    from fedsec import stats

    by_seed = {run.rows[0].seed: inner(run, "utility") for run in runs if run.rows}
    values = [utility.get(field) for utility in by_seed.values()]
    found = _bootstrap(values, list(by_seed))
    tested = next(iter(by_seed.values()), {}).get("test_images")
    if found.count == 1 and tested and found.mean is not None and field != "accuracy_loss":
        _, low, high = stats.wilson(round(found.mean * tested), tested)
        return Estimate(found.mean, low, high, 1, 1)
    return found


def inner(run: Run, key: str) -> dict:
    value = (run.run or {}).get(key)
    return value if isinstance(value, dict) else {}


def config(folder: Path) -> dict[str, str]:
    """A run's hyperparameters by dotted key, without what does not change what is measured."""
    import yaml

    path = folder / records.CONFIG
    try:
        return _parsed(path.read_text("utf-8", "replace")) if path.exists() else {}
    except yaml.YAMLError as error:
        raise Refused(str(path), "must be YAML", str(error).splitlines()[0]) from None
    except OSError as error:
        raise Refused(str(path), "must be readable", error.strerror) from None


@lru_cache(maxsize=2**16)
def _parsed(text: str) -> dict[str, str]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where there is one
    flat = _flat(yaml.load(text, loader))
    return {k: v for k, v in flat.items() if k.split(".")[0] not in ASIDE and k not in ASIDE}


def _flat(node: object, at: str = "") -> dict[str, str]:
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        inner = [_flat(value, f"{at}.{key}" if at else str(key)) for key, value in items]
        return {k: v for part in inner for k, v in part.items()}
    return {at: str(node)} if at else {}

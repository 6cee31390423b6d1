"""Every YAML under configs/ names a class, lists exactly its fields, and runs; every attack keeps
the contract of attacks. A new file is found and tested without a change here."""

import dataclasses
import gzip
import pickle
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from PIL import Image

import attacks
from fedsec import config
from fedsec.attack import crafted
from fedsec.checks import Refused
from fedsec.client import Gradient, mean_gradient
from fedsec.data import Npz
from fedsec.defense import Defense
from fedsec.federation import Federation, Job, federate, summed
from fedsec.models import ConvNetSpec, LeNetSpec, MLPSpec, ViTSpec
from fedsec.rng import stream
from fedsec.run import CONFIGS
from fedsec.threat import FACTS, ThreatModel
from fedsec.types import Batch, Exchange, Local, Reconstruction, Update

LEAST = {"attack": 4, "defense": 6, "threat": 4, "client": 2, "data": 8, "model": 8,
         "federation": 2}  # fmt: skip
OTHER = {"assumption", "study", "sweep", "hydra"}  # whose files are words for Hydra, not classes
FILES = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.parent.name not in OTHER)
CLASSES = [p for p in FILES if p.stem != "composed"]  # a list of defenses fills that one in


def options(group: str) -> list[str]:
    return [p.stem for p in CLASSES if p.parent.name == group]


def preset(group: str, name: str, **changed):
    """The object that a YAML describes, with some of its fields changed."""
    node = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    known = {f.name for f in dataclasses.fields(config.locate(node["_target_"], group))}
    node.update({k: v for k, v in changed.items() if k in known})
    return config._part(node, group)


def test_every_group_was_found():
    assert set(LEAST) == set(config.GROUPS)
    for group, least in LEAST.items():
        assert len(options(group)) >= least, group
    folders = {p.name for p in CONFIGS.iterdir() if p.is_dir()}
    assert folders <= set(LEAST) | OTHER
    assert not (CONFIGS / "__init__.py").exists()


@pytest.mark.parametrize("path", CLASSES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_yaml_lists_exactly_the_fields_of_its_class(path: Path):
    node = OmegaConf.load(path)
    cls = config.locate(node["_target_"], path.parent.name)
    assert set(map(str, node)) == {"_target_", *(f.name for f in dataclasses.fields(cls))}
    if path.parent.name != "data" or "path" not in node:
        built = config._part(node, path.parent.name)
        assert type(built) is cls
        assert all(getattr(built, str(k)) is not None or v is None
                   for k, v in node.items() if k != "_target_")  # fmt: skip


@pytest.mark.parametrize("path", CLASSES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_value_of_a_yaml_has_its_reason(path: Path):
    if path.parent.name == "threat":  # the reason stands above: it is one for the whole
        assert path.read_text().startswith("# ")
        return
    for line in path.read_text().splitlines():
        bare = line.startswith(("_target_", "#")) or not line.strip()
        assert bare or " # " in line, f"{path}: {line}"


# ---------------------------------------------------------------- every option runs


@pytest.fixture
def ran(tmp_path, monkeypatch, capsys):
    """Run words in this process; the result folder. The run must be done and quiet."""

    def go(*more: str, steps: int = 2) -> Path:
        status = tiny.call(monkeypatch, tiny.words(tmp_path, *more, steps=steps))
        said = capsys.readouterr()
        assert (status, said.err) == (0, ""), said.err
        assert tiny.whole(tmp_path / "out")["status"] == "done"
        for row in tiny.rows(tmp_path / "out"):
            assert row["psnr"] > 0
            assert row["null_psnr"] > 0
        return tmp_path / "out"

    return go


def grants(threat: str) -> tuple[str, ...]:
    return preset("threat", threat).grants


def admitting(attack) -> list[str]:
    """The presets that grant what an attack needs, the default first."""
    named = ["honest_server", *(t for t in options("threat") if t != "honest_server")]
    return [
        t
        for t in named
        if all(any(f in grants(t) for f in need.split("|")) for need in attack.needs)
        and (preset("threat", t).tampers or not attack.tampers)
    ]


def suits(attack, spec) -> bool:
    try:
        attack.check(spec.build((3, 16, 16), 4, (0.5,) * 3, (0.25,) * 3, stream(0, "model")))
    except Refused:
        return False
    return True


@pytest.mark.parametrize("name", options("attack"))
def test_every_attack_runs(ran, name):
    attack = preset("attack", name)
    suited = WORDS[nets(attack)[0]]
    steps = 2 if "steps" in vars(attack) else 0
    folder = ran(f"attack={name}", f"threat={admitting(attack)[0]}", *suited, steps=steps)
    assert [row["attack"] for row in tiny.rows(folder)] == [name] * 4


@pytest.mark.parametrize("name", options("defense"))
def test_every_defense_runs(ran, name):
    mixes = preset("defense", name).mixes
    folder = ran(f"defense={name}", *(["victim_batch=4"] if mixes else []))
    names = [row["defense"] for row in tiny.rows(folder)]
    assert names == (["none"] * 4 if name == "none" else ["none"] * 4 + [name] * 4)


def test_defenses_side_by_side_run(ran):
    folder = ran("defense=[prune, noise]", "defense.prune.ratio=0.5", "defense.noise.std=0.2")
    assert [row["defense"] for row in tiny.rows(folder)] == ["none"] * 4 + ["prune+noise"] * 4
    kept = OmegaConf.load(folder / "config.yaml").defense
    assert list(kept) == ["prune", "noise"]
    assert (kept.prune.ratio, kept.noise.std) == (0.5, 0.2)


@pytest.mark.parametrize("name", options("threat"))
def test_every_threat_model_runs(ran, name):
    folder = ran(f"threat={name}", "model=convnet", "model.width=2")
    assert tiny.whole(folder)["grants"] == sorted(grants(name))
    batches = {row["batch"] for row in tiny.rows(folder)}
    assert batches == ({2} if preset("threat", name).sums_only else {1})


@pytest.mark.parametrize("name", options("client"))
@pytest.mark.parametrize("how", ["victim_batch=2", "victim_batch=same"])
def test_every_client_runs(ran, name, how):
    folder = ran(f"client={name}", how)
    assert all(row["client"] == name for row in tiny.rows(folder))
    assert len(tiny.rows(folder)) >= 4


SMALLER = {"width": "4", "hidden": "[8]"}


@pytest.mark.parametrize("name", options("model"))
def test_every_model_runs(ran, name):
    node = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    small = [f"model.{k}={v}" for k, v in SMALLER.items() if k in node]
    folder = ran(f"model={name}", *small, "images=2", "attack.steps=1", "rounds=0")
    assert {row["model"] for row in tiny.rows(folder)} == {name}


@pytest.mark.parametrize("name", [n for n in options("federation") if n != "ray"])
def test_every_federation_runs(ran, name):
    ran(f"federation={name}")


@pytest.mark.slow
def test_ray_gives_the_numbers_of_inline(tmp_path, monkeypatch):
    for name in ("inline", "ray"):
        line = tiny.words(tmp_path, f"federation={name}", "defense=prune", out=name)
        assert tiny.call(monkeypatch, line) == 0
    for one, other in zip(*(tiny.rows(tmp_path / n) for n in ("inline", "ray")), strict=True):
        assert one["image"] == other["image"]
        assert one["psnr"] == pytest.approx(other["psnr"], abs=0.05)


def put_npz(folder: Path) -> list[str]:
    return [f"data.path={tiny.npz(folder)}"]


def put_folder(folder: Path) -> list[str]:
    made = tiny.arrays(size=20)
    for i, (image, label) in enumerate(
        zip(made["train_images"], made["train_labels"], strict=True)
    ):
        (folder / "tree" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "tree" / str(label) / f"{i}.png")
    return [f"data.path={folder / 'tree'}", "data.size=16"]


def put_photos(folder: Path) -> list[str]:
    return ["data.size=16", "data.per_class=8"]


def put_cifar(folder: Path, base: str, files: dict[str, int], meta: str, labels: str, names: str):
    """torchvision's pickles of CIFAR; `files` says how many images each holds."""
    root = folder / base
    root.mkdir()
    rng = np.random.default_rng(0)
    classes = 100 if labels == "fine_labels" else 10
    for name, count in files.items():
        entry = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                 labels: [i % classes for i in range(count)]}  # fmt: skip
        (root / name).write_bytes(pickle.dumps(entry))
    (root / meta).write_bytes(pickle.dumps({names: [f"class {k}" for k in range(classes)]}))
    return [f"data.root={folder}"]


def put_cifar10(folder: Path) -> list[str]:
    files = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 20}
    return put_cifar(folder, "cifar-10-batches-py", files, "batches.meta", "labels", "label_names")


def put_cifar100(folder: Path) -> list[str]:
    files = {"train": 200, "test": 100}
    return put_cifar(folder, "cifar-100-python", files, "meta", "fine_labels", "fine_label_names")


def put_idx(folder: Path, name: str) -> list[str]:
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
                f">{array.ndim}I", *array.shape
            )
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
            with gzip.open(raw / f"{part}-{kind}-ubyte.gz", "wb") as packed:
                packed.write(head + array.tobytes())
    return [f"data.root={folder}"]


def put_svhn(folder: Path) -> list[str]:
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # 10 is the digit 0
        savemat(folder / f"{part}_32x32.mat", {"X": images, "y": labels})
    return [f"data.root={folder}"]


PUT = {
    "npz": put_npz,
    "folder": put_folder,
    "photos": put_photos,
    "cifar10": put_cifar10,
    "cifar100": put_cifar100,
    "mnist": lambda folder: put_idx(folder, "MNIST"),
    "fashion_mnist": lambda folder: put_idx(folder, "FashionMNIST"),
    "svhn": put_svhn,
}


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision compares CIFAR's and SVHN's files with the checksums of the real ones."""
    from torchvision.datasets import cifar, svhn

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setattr(svhn, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.parametrize("name", options("data"))
def test_every_data_set_runs(ran, tmp_path, unchecked, name):
    assert name in PUT, "fabricate a few files of it in PUT"
    folder = ran(f"data={name}", *PUT[name](tmp_path), "rounds=0")
    assert {row["data"] for row in tiny.rows(folder)} == {name}


# ---------------------------------------------------------------- the contract of attacks


def test_every_attack_reads_on_one_screen():
    files = {p.stem: p for p in Path(attacks.__file__).parent.glob("*.py")}
    used = {preset("attack", name).__module__ for name in options("attack")}
    assert used <= {f"attacks.{stem}" for stem in files}, "all were found"
    lines = {stem: len(path.read_text().splitlines()) for stem, path in files.items()}
    assert {stem: n for stem, n in lines.items() if n > 100} == {}


SHAPE, CLASSES_OF = (3, 16, 16), 4
NETS = {
    "lenet": LeNetSpec(),
    "convnet": ConvNetSpec(width=2),  # BatchNorm in train mode
    "mlp": MLPSpec(hidden=(16,)),
    "vit": ViTSpec(width=48, depth=2),  # as many features as pixels of a patch
}
WORDS = {  # the same on the command line
    "lenet": [],
    "convnet": ["model=convnet", "model.width=2"],
    "mlp": ["model=mlp", "model.hidden=[16]"],
    "vit": ["model=vit", "model.width=48", "model.depth=2"],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Npz(path=str(tiny.npz(tmp_path_factory.mktemp("data")))).load()


def craft_for(attack, threat, batch, public, model, round=0):
    """What an attack that tampers sends instead of `model` under a threat model."""
    local, mode = Local("gradient", 0.1, 1, batch), "train" if model.training else "eval"
    nobody = Batch(torch.zeros(batch, *SHAPE), torch.zeros(batch, CLASSES_OF))
    blank = Exchange(round, (), model, mode, Update({}, {}, 0), nobody, nobody, local, Defense(),
                     aux=public)  # fmt: skip
    return crafted(attack, threat or ThreatModel(grants=("count", "shape")), blank,
                   stream(0, "craft"))[0]  # fmt: skip


@pytest.fixture(scope="module")
def exchanges(dataset):
    """Three real exchanges of one round on a network, and public images; memoised.

    Of an attack that tampers they are about the models that it crafts under its `threat`.
    """
    kept: dict[tuple, list[Exchange]] = {}

    def of(net: str, batch: int = 1, attack=None, threat=None) -> list[Exchange]:
        attack = attack if attack is not None and attack.tampers else None
        key = (net, batch, attack, threat and attack and threat.grants)
        if key not in kept:
            probes = tuple((c, tuple(range(c * batch, (c + 1) * batch))) for c in range(3))
            job = Job(
                dataset=None, model=NETS[net], client=Gradient(lr=0.1, batch=4),
                federation=Federation(
                    engine="inline", strategy="fedavg", split="iid", alpha=0.5, shards=2
                ),
                defense=Defense(), clients=3, rounds=0, seed=0, attack_rounds=(0,), probes=probes,
            )  # fmt: skip
            public = dataset.test.batch(range(8), dataset.classes)
            craft = attack and partial(craft_for, attack, threat, batch, public)
            kept[key] = [
                replace(e, aux=public, candidates=dataset.train.batch(range(12), dataset.classes))
                for e in federate(job, dataset, lambda *_: None, craft).exchanges
            ]
        return kept[key]

    return of


def short(name: str):
    """The attack with about as many evaluations as fit into a moment."""
    one = preset("attack", name, steps=1, restarts=1, budget=40)
    return one if one.evaluations > 1 else preset("attack", name, steps=3, restarts=1)


def nets(attack) -> list[str]:
    """Small networks that an attack works on; peculiar ones only where it works on no others."""
    usual = [n for n in ("lenet", "convnet", "mlp") if suits(attack, NETS[n])]
    return usual or [n for n in NETS if suits(attack, NETS[n])]


def attacked(attack, threat: ThreatModel, stack: list[Exchange], seed: int = 0) -> Reconstruction:
    rngs = [stream(seed, "attack", *e.batch.index) for e in stack]
    return attack(threat.observe(stack), rngs, lambda *_: None)


def tensors(found: Reconstruction) -> list[torch.Tensor]:
    return [found.images, found.labels, found.loss, found.steps, found.gflop]


def check(found: Reconstruction, victims: int, count: int, dtype=torch.float32) -> None:
    assert found.images.shape == (victims, count, *SHAPE)
    assert found.images.dtype == dtype
    assert found.images.isfinite().all()
    assert 0 <= found.images.min() <= found.images.max() <= 1
    assert found.labels.shape == (victims, count)
    assert found.labels.dtype == torch.int64
    assert -1 <= found.labels.min() <= found.labels.max() < CLASSES_OF
    assert found.loss.shape == found.steps.shape == found.gflop.shape == (victims,)
    assert found.loss.isfinite().all()
    assert (found.steps >= 0).all()
    assert (found.gflop > 0).all()
    assert len(found.flags) in (0, victims)


def grids():
    for name in options("attack"):
        for threat in admitting(short(name)):
            yield name, threat


@pytest.mark.parametrize(("name", "threat"), grids())
@pytest.mark.parametrize("batch", [1, 2])
def test_an_attack_works_under_every_threat_model_that_admits_it(exchanges, name, threat, batch):
    attack, model = short(name), preset("threat", threat)
    stack = exchanges(nets(attack)[0], batch, attack, model)
    if model.sums_only:
        stack = summed(stack, 3)
    check(attacked(attack, model, stack), len(stack), len(stack[0].batch))


@pytest.mark.parametrize("name", options("attack"))
@pytest.mark.parametrize("either", [0, 1])
def test_an_attack_needs_nothing_beyond_what_it_declares(exchanges, name, either):
    attack = short(name)
    assert all(fact in FACTS for need in attack.needs for fact in need.split("|"))
    least = tuple(sorted(need.split("|")[either * need.count("|")] for need in attack.needs))
    stack = exchanges(nets(attack)[0], 1, attack, ThreatModel(grants=least))
    stack = summed(stack, 3) if "aggregate" in least else stack
    check(attacked(attack, ThreatModel(grants=least), stack), len(stack), len(stack[0].batch))


@pytest.mark.parametrize("name", options("attack"))
def test_an_attack_repeats_with_its_streams_and_only_with_them(exchanges, name):
    attack, threat = short(name), preset("threat", admitting(short(name))[0])
    stack = exchanges(nets(attack)[0], 1, attack, threat)
    first, again, other = (attacked(attack, threat, stack, seed) for seed in (0, 0, 1))
    for one, two in zip(tensors(first), tensors(again), strict=True):
        assert torch.equal(one, two)
    if attack.evaluations:  # it starts somewhere at random
        assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    ("name", "net"), [(n, net) for n in options("attack") for net in nets(short(n))]
)
def test_an_attack_changes_neither_the_victim_nor_what_it_sees(exchanges, name, net):
    attack = short(name)
    threat = preset("threat", admitting(attack)[0])
    stack = exchanges(net, 1, attack, threat)
    seen = threat.observe(stack)
    models = [stack[0].model, seen.model]
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in models]
    update = {k: t.clone() for k, t in seen.update.tensors.items()}
    global_draws = torch.random.get_rng_state()
    check(attack(seen, [stream(0, "a", v) for v in range(3)], lambda *_: None), 3, 1)
    assert torch.equal(torch.random.get_rng_state(), global_draws)
    for model, kept in zip(models, before, strict=True):
        assert model.training == stack[0].model.training
        assert all(torch.equal(t, kept[k]) for k, t in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, update[k]) for k, t in seen.update.tensors.items())


@pytest.fixture(scope="module")
def doubles(dataset):
    """Exchanges of one network in double precision, where rounding does not decide a path."""

    def of(net: str, attack, threat) -> list[Exchange]:
        rng = stream(0, "model")
        model = NETS[net].build(SHAPE, CLASSES_OF, dataset.mean, dataset.std, rng).double()
        model, *others = craft_for(attack, threat, 1, None, model) if attack.tampers else (model,)
        stack = []
        for i in range(3):
            some = dataset.train.batch([i], CLASSES_OF)
            batch = Batch(some.images.double(), some.targets.double(), some.index)
            update = Update(mean_gradient(model, batch), {}, 1)
            local, mode = Local("gradient", 0.1, 1, 1), "train"
            one = Exchange(0, (i,), model, mode, update, batch, batch, local, Defense())
            pool = dataset.train.batch(range(12), CLASSES_OF)
            pool = Batch(pool.images.double(), pool.targets.double())
            queries = tuple((m, Update(mean_gradient(m, batch), {}, 1)) for m in others)
            stack.append(replace(one, aux=pool, candidates=pool, queries=queries))
        return stack

    return of


@pytest.mark.parametrize("name", options("attack"))
def test_a_stack_in_double_gives_what_its_victims_give_alone(doubles, name):
    attack, threat = short(name), preset("threat", admitting(short(name))[0])
    stack = doubles(nets(attack)[0], attack, threat)
    together = attacked(attack, threat, stack)
    check(together, 3, 1, torch.float64)
    for i, exchange in enumerate(stack):
        single = attacked(attack, threat, [exchange])
        assert torch.allclose(together.images[i], single.images[0], atol=1e-4)
        assert torch.equal(together.labels[i], single.labels[0])
        assert torch.allclose(together.loss[i], single.loss[0], rtol=1e-4, atol=1e-9)
        assert together.gflop[i] == pytest.approx(float(single.gflop[0]), rel=0.01)

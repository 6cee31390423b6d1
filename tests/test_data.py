"""Data sets: what is loaded equals what is stored, and what is broken is refused in one line."""

import os
import pickle
import socket
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fedsec import data
from fedsec.checks import Refused
from fedsec.data import Dataset, Folder, Npz, Photos, Split, Torchvision, partition
from fedsec.rng import stream

REAL = os.environ.get("FEDSEC_DATA")
real = pytest.mark.skipif(not REAL, reason="FEDSEC_DATA names no folder with cifar10.npz and MNIST")


@pytest.fixture(scope="module")
def photos() -> Dataset:
    return Photos().load()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# ---------------------------------------------------------------- splits


def small(dtype=torch.uint8) -> Dataset:
    pixels = torch.randint(0, 256, (2500, 3, 4, 5), dtype=torch.uint8)
    pixels = pixels if dtype == torch.uint8 else pixels / 255
    labels = torch.arange(2500) % 7
    split = Split(pixels, labels)
    return Dataset("small", split, split, 7, tuple("abcdefg"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batch_equals_a_loop_over_its_indices(dtype):
    split = small(dtype).train
    indices = [3, 2499, 3, 0]
    batch = split.batch(indices, 7)
    scale = 255 if dtype == torch.uint8 else 1
    for row, i in enumerate(indices):
        assert torch.equal(batch.images[row], split.pixels[i].float() / scale)
        assert batch.targets[row].tolist() == [float(k == i % 7) for k in range(7)]
    assert batch.index == tuple(indices)
    assert batch.labels.tolist() == [3, 0, 3, 0]
    assert batch.images.dtype == torch.float32
    assert torch.equal(split.batch(torch.tensor(indices), 7).images, batch.images)


def test_a_batch_is_a_copy():
    split = small(torch.float32).train
    before = split.pixels.clone()
    split.batch([0, 1], 7).images.zero_()
    assert torch.equal(split.pixels, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moments_in_chunks_equal_numpy_at_once(dtype):
    dataset = small(dtype)
    before = dataset.train.pixels.clone()
    values = dataset.train.pixels.double().numpy() / (255 if dtype == torch.uint8 else 1)
    assert dataset.mean == pytest.approx(values.mean((0, 2, 3)), rel=1e-6)
    assert dataset.std == pytest.approx(values.std((0, 2, 3)), rel=1e-6)
    np.testing.assert_allclose(dataset.mean_image, values.mean(0), rtol=1e-6)
    assert dataset.shape == (3, 4, 5)
    assert torch.equal(dataset.train.pixels, before)


# ---------------------------------------------------------------- photographs


def test_photos_is_a_balanced_set_of_ten_classes(photos):
    assert photos.shape == (3, 32, 32)
    assert photos.classes == len(photos.class_names) == 10
    train, test = (torch.bincount(s.labels, minlength=10) for s in (photos.train, photos.test))
    assert len(photos.train) >= 4000
    assert len(photos.test) >= 1000
    assert train.min() >= 0.7 * train.max()
    assert test.min() >= 0.7 * test.max()
    head = torch.bincount(photos.train.labels[:200], minlength=10)
    assert head.min() >= 8  # a prefix is a fair sample


def test_photos_loads_fast_and_the_same_each_time(photos):
    start = time.process_time()
    again = Photos().load()
    assert time.process_time() - start < 3
    assert torch.equal(again.train.pixels, photos.train.pixels)
    assert torch.equal(again.test.labels, photos.test.labels)


def test_photos_has_no_image_in_both_splits(photos):
    train = {p.numpy().tobytes() for p in photos.train.pixels}
    assert len(train) == len(photos.train)
    assert not train & {p.numpy().tobytes() for p in photos.test.pixels}


def test_train_and_test_patches_share_no_pixel(tmp_path, monkeypatch):
    """On a photograph whose pixels spell their own position, and that needs no scaling."""
    x, y = np.meshgrid(np.arange(288), np.arange(288))
    chart = np.stack([x % 256, y % 256, x // 256 * 2 + y // 256], 2).astype(np.uint8)
    Image.fromarray(chart).save(tmp_path / "chart.png")
    monkeypatch.setattr(data, "_bundled", lambda *_: tmp_path / "chart.png")
    loaded = Photos(contrast=0.0, per_class=10_000).load()

    def places(split: Split) -> set[int]:
        r, g, b = split.pixels.long().unbind(1)
        return set(((r + 256 * (b // 2)) * 1000 + g + 256 * (b % 2)).flatten().tolist())

    train, test = places(loaded.train), places(loaded.test)
    assert not train & test
    assert len(train) + len(test) == 288 * 288  # and none is left out
    assert 0.15 < len(test) / 288**2 < 0.25
    # a patch is a piece of the photograph, upright: x grows to the right, y downwards
    first = loaded.train.pixels[0].long()
    across, down = first[0].diff(dim=1) % 256, first[1].diff(dim=0) % 256
    assert (across == 1).all()
    assert (down == 1).all()


def test_photos_in_other_sizes():
    assert Photos(size=16).load().shape == (3, 16, 16)
    assert Photos(size=64, per_class=20).load().shape == (3, 64, 64)


def test_a_small_network_learns_photos(photos):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (photos.mean, photos.std))
    everything = photos.train.batch(range(len(photos.train)), 10)
    images = (everything.images - mean) / std
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)),
    )
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(5):
        for picked in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(images[picked]), everything.targets[picked]).backward()
            optimiser.step()
    test = photos.test.batch(range(len(photos.test)), 10)
    guess = net((test.images - mean) / std).argmax(1)
    assert (guess == test.labels).float().mean() > 0.6


def test_a_missing_photograph_is_refused_not_fetched(monkeypatch):
    monkeypatch.setitem(data._PHOTOS, "cat", ("skimage", "data/no_such.png"))
    with pytest.raises(Refused, match=r"^data: .*no_such.png .*skimage.*reinstall"):
        Photos().load()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Photos(size=4), "size"),
        (lambda: Photos(per_class=0), "per_class"),
        (lambda: Photos(contrast=0.5), "contrast"),
        (lambda: Torchvision(dataset="imagenet"), "dataset"),
        (lambda: Folder(path="x", size=0), "size"),
        (lambda: Folder(path="x", test_share=1.0), "test_share"),
        (lambda: Npz(path="x", classes=1), "classes"),
    ],
)
def test_a_field_out_of_range_is_refused_by_its_name(make, key):
    with pytest.raises(Refused) as refusal:
        make()
    assert refusal.value.key == key


# ---------------------------------------------------------------- .npz


def arrays(**changed):
    rng = np.random.default_rng(0)
    good = {
        "train_images": rng.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(20) % 4,
        "test_images": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(8) % 4,
    }
    return {k: v for k, v in (good | changed).items() if v is not None}


def written(folder: Path, **changed) -> str:
    np.savez(folder / "mine.npz", **arrays(**changed))
    return str(folder / "mine.npz")


def test_npz_round_trip(tmp_path):
    stored = arrays()
    loaded = Npz(path=written(tmp_path)).load()
    assert (loaded.name, loaded.classes, loaded.shape) == ("mine", 4, (3, 6, 5))
    assert loaded.class_names == ("0", "1", "2", "3")
    for part, split in (("train", loaded.train), ("test", loaded.test)):
        assert np.array_equal(split.pixels.permute(0, 2, 3, 1), stored[f"{part}_images"])
        assert np.array_equal(split.labels, stored[f"{part}_labels"])
        assert split.pixels.is_contiguous()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_grey_floats_with_medmnist_labels(tmp_path, dtype):
    rng = np.random.default_rng(0)
    images = rng.random((20, 6, 5)).astype(dtype)
    labels = (np.arange(20)[:, None] % 4).astype(np.uint8)
    path = written(
        tmp_path, train_images=images, test_images=images, train_labels=labels, test_labels=labels
    )
    loaded = Npz(path=path).load()
    assert loaded.shape == (1, 6, 5)
    assert loaded.train.pixels.dtype == torch.float32
    np.testing.assert_allclose(loaded.train.pixels[:, 0], images.astype(np.float32))
    assert loaded.train.labels.tolist() == labels[:, 0].tolist()


def test_npz_classes_may_be_more_than_the_labels_use(tmp_path):
    labels = np.array([0, 5] * 10)
    path = written(tmp_path, train_labels=labels, test_labels=labels[:8])
    with pytest.raises(Refused, match=r"use each of 0 to 5, or set data.classes, got 2 different"):
        Npz(path=path).load()
    assert Npz(path=path, classes=6).load().classes == 6


FLOATS = np.full((20, 6, 5), 0.5)
BROKEN = {
    "a missing key": ({"test_labels": None}, "must hold test_labels, got train_images"),
    "flat images": ({"train_images": np.zeros((20, 90), np.uint8)}, r"\[n h w\].* got \[20, 90\]"),
    "channels first": ({"train_images": np.zeros((20, 3, 6, 5), np.uint8)}, "with c 1 or 3"),
    "volumes": ({"test_images": np.zeros((8, 6, 6, 6, 1), np.uint8)}, "test_images .* with c 1"),
    "wide integers": ({"train_images": np.zeros((20, 6, 5), np.int32)}, "uint8.* got int32"),
    "NaN": ({"train_images": FLOATS * np.nan}, "must be finite, got NaN"),
    "infinity": ({"train_images": FLOATS * np.inf}, "must be finite"),
    "floats to 255": ({"train_images": FLOATS * 510}, r"in \[0, 1\], got values from 255 to 255"),
    "negative floats": ({"train_images": FLOATS - 1}, r"in \[0, 1\], got values from -0.5"),
    "float labels": ({"train_labels": np.arange(20) % 4 + 0.5}, "be integers, got float64"),
    "text labels": ({"test_labels": np.array(["a"] * 8)}, "test_labels .* be integers, got <U1"),
    "bool labels": ({"train_labels": np.arange(20) % 2 == 0}, "be integers, got bool"),
    "negative labels": ({"train_labels": np.arange(20) % 4 - 1}, "not be negative, got -1"),
    "multi-labels": ({"train_labels": np.zeros((20, 14), int)}, r"\[n\] or \[n 1\], got \[20, 14"),
    "one class": ({"train_labels": np.zeros(20, int)}, "at least two classes, got 1"),
    "an unseen test class": ({"test_labels": np.full(8, 4)}, r"test_labels .* in \[0, 4\), got 4"),
    "a stray label": ({"train_labels": np.array([0, 1, 2, 10**6] * 5)}, "each of 0 to 1000000"),
    "a huge label": ({"train_labels": np.full(20, 2**63, np.uint64)}, "below 2\\^31"),
    "other counts": ({"train_labels": np.arange(19) % 4}, r"as many as .*\(20\), got 19"),
    "no training images": ({"train_images": np.zeros((0, 6, 5), np.uint8)}, "must not be empty"),
    "no test images": ({"test_images": np.zeros((0, 6, 5, 3), np.uint8)}, "must not be empty"),
    "no labels": ({"test_labels": np.zeros(0, int)}, "test_labels .* must not be empty"),
    "other shapes": ({"test_images": np.zeros((8, 5, 5, 3), np.uint8)}, r"shaped like .*\(3, 6, 5"),
    "objects": ({"train_labels": np.array([print] * 20, object)}, "train_labels .* array of numb"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_npz_is_one_line(tmp_path, case):
    changed, says = BROKEN[case]
    with pytest.raises(Refused, match=says) as refusal:
        Npz(path=written(tmp_path, **changed)).load()
    assert refusal.value.key == "data.path"
    assert "\n" not in str(refusal.value)


def test_objects_in_an_npz_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path = written(tmp_path, train_labels=np.array([Trap()] * 20, object))
    pickle.loads(pickle.dumps(Trap()))  # positive control: the trap works
    assert (tmp_path / "sprung").exists()
    (tmp_path / "sprung").unlink()
    with pytest.raises(Refused):
        Npz(path=path).load()
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Refused):
        Npz(path=str(tmp_path / "bare.npz")).load()
    assert not (tmp_path / "sprung").exists()


def test_damaged_files_are_one_line(tmp_path):
    whole = Path(written(tmp_path)).read_bytes()
    inside = whole.find(b"train_labels.npy") + 200
    cases = {
        "empty.npz": b"",
        "text.npz": b"not a zip",
        "cut.npz": whole[: len(whole) // 2],
        "flipped.npz": whole[:inside] + bytes([whole[inside] ^ 255]) + whole[inside + 1 :],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=rf"^data\.path: .*{name}") as refusal:
            Npz(path=str(tmp_path / name)).load()
        assert "\n" not in str(refusal.value)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as other:
        other.writestr("readme.txt", "hello")
    for name in ("single.npy", "other.npz", "absent.npz", "."):
        with pytest.raises(Refused, match=r"^data\.path: "):
            Npz(path=str(tmp_path / name)).load()
    with pytest.raises(Refused, match=r"^data\.path: has to be given"):
        Npz().load()


@real
def test_cifar10_of_the_shared_data():
    cifar = Npz(path=f"{REAL}/cifar10.npz").load()
    assert (len(cifar.train), len(cifar.test), cifar.shape) == (50_000, 10_000, (3, 32, 32))
    assert torch.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert cifar.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-4)  # the textbook's
    assert cifar.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-4)


@real
def test_mnist_of_the_shared_data():
    mnist = Torchvision(dataset="mnist", root=str(REAL)).load()
    assert (len(mnist.train), len(mnist.test), mnist.shape) == (60_000, 10_000, (1, 28, 28))
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.mean == pytest.approx((0.1307,), abs=1e-4)
    assert mnist.std == pytest.approx((0.3081,), abs=1e-4)


# ---------------------------------------------------------------- torchvision


def store(dataset: str, root: Path, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """A tiny data set in the original files' layout; returns test images [n h w c] and labels."""
    from scipy.io import savemat
    from torchvision.datasets import cifar, svhn

    rng = np.random.default_rng(0)
    labels = np.arange(20, dtype=np.uint8) % 10
    if "mnist" in dataset:
        raw = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[dataset] / "raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            images = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
            head = struct.pack(">4i", 2051, 20, 28, 28)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
            head = struct.pack(">2i", 2049, 20)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        return images[..., None], labels
    images = rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    if dataset == "svhn":
        monkeypatch.setattr(svhn, "check_integrity", lambda path, *_: Path(path).exists())
        for part in ("train", "test"):
            stored = {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)}
            savemat(root / f"{part}_32x32.mat", stored)
        return images.transpose(0, 2, 3, 1), labels
    monkeypatch.setattr(cifar, "check_integrity", lambda path, *_: Path(path).exists())
    ten = dataset == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir()
    key, meta, names = (
        ("labels", "batches.meta", "label_names")
        if ten
        else ("fine_labels", "meta", "fine_label_names")
    )
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for file in files:
        entry = {"data": images.reshape(20, -1), key: labels.tolist()}
        (folder / file).write_bytes(pickle.dumps(entry))
    words = [f"word{i}" for i in range(10 if ten else 100)]
    (folder / meta).write_bytes(pickle.dumps({names: words}))
    return images.transpose(0, 2, 3, 1), labels


@pytest.mark.parametrize("dataset", list(data._READERS))
def test_torchvision_sets_round_trip(tmp_path, monkeypatch, dataset):
    images, labels = store(dataset, tmp_path, monkeypatch)
    loaded = Torchvision(dataset=dataset, root=str(tmp_path)).load()
    assert loaded.name == dataset
    assert loaded.classes == len(loaded.class_names) == (100 if dataset == "cifar100" else 10)
    assert len(loaded.train) == (100 if dataset == "cifar10" else 20)
    assert np.array_equal(loaded.test.pixels.permute(0, 2, 3, 1), images)
    assert loaded.test.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("dataset", list(data._READERS))
def test_a_missing_torchvision_set_names_the_ways_out(tmp_path, dataset):
    with pytest.raises(Refused, match=r"data\.root=FOLDER, or data\.download=true") as refusal:
        Torchvision(dataset=dataset, root=str(tmp_path / "nowhere")).load()
    assert refusal.value.key == "data.root"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 20])
def test_a_truncated_torchvision_file_is_one_line(tmp_path, monkeypatch, file, keep):
    store("mnist", tmp_path, monkeypatch)
    path = tmp_path / "MNIST/raw" / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Refused, match=r"^data\.root: ") as refusal:
        Torchvision(dataset="mnist", root=str(tmp_path)).load()
    assert "\n" not in str(refusal.value)


def test_download_without_a_network_is_one_line(tmp_path):
    with pytest.raises(Refused, match=r"^data\.root: "):
        Torchvision(dataset="cifar10", root=str(tmp_path), download=True).load()


# ---------------------------------------------------------------- folders


def paint(folder: Path, classes: int = 3, each: int = 10) -> Path:
    for k in range(classes):
        (folder / f"class{k}").mkdir(parents=True)
        for i in range(each):
            colour = (80 * k, 10 * i, 128)
            Image.new("RGB", (20 + 3 * i, 33), colour).save(folder / f"class{k}/{i:02}.png")
    return folder


def test_folder_reads_every_image_once(tmp_path):
    root = paint(tmp_path / "mine")
    (root / ".cache").mkdir()
    (root / "class0" / ".DS_Store").write_bytes(b"x")
    loaded = Folder(path=str(root), size=8, test_share=0.2).load()
    assert (loaded.name, loaded.shape) == ("mine", (3, 8, 8))
    assert loaded.class_names == ("class0", "class1", "class2")
    seen = []
    for split, count in ((loaded.train, 24), (loaded.test, 6)):
        assert len(split) == count
        for image, label in zip(split.pixels, split.labels, strict=True):
            assert (image == image[:, :1, :1]).all()  # one colour stays that colour
            assert image[0, 0, 0] == 80 * label
            seen.append((int(label), int(image[1, 0, 0]) // 10))
    assert sorted(seen) == [(k, i) for k in range(3) for i in range(10)]
    assert [i for k, i in seen[24:] if k == 0] == [2, 7]  # evenly spaced


def test_folder_crops_the_centre_and_turns_images_upright(tmp_path):
    root = paint(tmp_path)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:48], wide[:, 48:64] = 255, 100  # the central square: white left, grey right
    exif = Image.Exif()
    exif[274] = 3  # stored upside down
    Image.fromarray(wide[:, ::-1]).save(root / "class0/00.jpg", exif=exif, quality=95)
    (root / "class0/00.png").unlink()
    first = Folder(path=str(root), size=32).load().train.pixels[0]
    assert first[:, :, :14].min() > 240
    assert (first[:, :, 18:].float() - 100).abs().max() < 12


def test_folder_splits_two_images_one_and_one(tmp_path):
    loaded = Folder(path=str(paint(tmp_path, each=2)), test_share=0.9).load()
    assert loaded.train.labels.tolist() == loaded.test.labels.tolist() == [0, 1, 2]


def test_broken_folders_are_one_line(tmp_path):
    def refused(says):
        with pytest.raises(Refused, match=says) as refusal:
            Folder(path=str(root)).load()
        assert refusal.value.key == "data.path"
        assert "\n" not in str(refusal.value)

    root = tmp_path / "absent"
    refused("folder of class folders that exists, got .*absent")
    root = paint(tmp_path / "single", classes=1)
    refused("at least two class folders, got 1 in")
    root = paint(tmp_path / "mine")
    victim = root / "class1/03.png"
    whole = victim.read_bytes()
    for content in (b"", b"text", whole[:60], whole[:-30]):
        victim.write_bytes(content)
        refused("every file must be an image, got .*class1/03.png")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(victim)
    refused("8 bits for each channel, got .*class1/03.png .mode I;16")
    victim.write_bytes(whole)
    (root / "class2/sub").mkdir()
    refused("every file must be an image, got .*class2/sub")
    (root / "class2/sub").rmdir()
    (root / "class3").mkdir()
    refused("class3 must hold at least two images, got 0")
    with pytest.raises(Refused, match="has to be given"):
        Folder().load()


# ---------------------------------------------------------------- partitions

LABELS = torch.randint(0, 10, (1003,), generator=stream(0, "labels"))


def parts(split: str, clients: int, alpha=0.5, shards=2, seed=0, labels=LABELS):
    return partition(labels, clients, split, alpha, shards, stream(seed, "partition"))


@pytest.mark.parametrize("split", ["iid", "dirichlet", "shards"])
@pytest.mark.parametrize("clients", [1, 7, 100])
@pytest.mark.parametrize("alpha", [1e-3, 0.5, 1e6])
def test_every_image_is_held_by_one_client(split, clients, alpha):
    held = parts(split, clients, alpha)
    assert len(held) == clients
    assert min(map(len, held)) >= 1
    assert sorted(i for part in held for i in part.tolist()) == list(range(1003))
    spread = max(map(len, held)) - min(map(len, held))
    assert spread <= (2 if split == "shards" else 1)


@pytest.mark.parametrize("split", ["iid", "dirichlet", "shards"])
def test_a_partition_follows_from_its_stream_alone(split):
    first = parts(split, 9)
    torch.rand(5)  # another stream's draw
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    assert all(torch.equal(a, b) for a, b in zip(first, parts(split, 9), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, parts(split, 9, seed=1), strict=True))


def test_as_many_clients_as_images():
    labels = torch.arange(6) % 2
    for split in ("iid", "dirichlet", "shards"):
        assert sorted(p.item() for p in parts(split, 6, shards=1, labels=labels)) == [*range(6)]


def test_shards_hold_few_classes():
    labels = torch.arange(1000) % 10
    for part in parts("shards", 50, shards=2, labels=labels):
        assert len(labels[part].unique()) <= 2
    assert min(len(labels[p].unique()) for p in parts("iid", 50, labels=labels)) > 2


def test_dirichlet_has_the_spread_of_its_alpha():
    """Class counts of the first client follow the Dirichlet-multinomial law, written by hand."""
    labels, size, alpha, k = torch.arange(1600) % 4, 80, 2.0, 4
    draws = [parts("dirichlet", 20, alpha, seed=s, labels=labels)[0] for s in range(400)]
    counts = torch.stack([torch.bincount(labels[d], minlength=k) for d in draws]).double()
    p = 1 / k
    variance = size * p * (1 - p) * (size + alpha) / (1 + alpha)
    assert counts.mean(0).tolist() == pytest.approx([size * p] * k, rel=0.1)
    assert counts.var(0).mean().item() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"split": "random"}, "split"),
        ({"clients": 0}, "clients"),
        ({"clients": 1004}, "clients"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"shards": 0}, "shards"),
        ({"split": "shards", "clients": 100, "shards": 11}, "shards"),
    ],
)
def test_an_impossible_partition_is_refused_by_its_key(changed, key):
    with pytest.raises(Refused) as refusal:
        parts(**({"split": "iid", "clients": 4} | changed))
    assert refusal.value.key == key

"""Images with labels: the embedded photographs, torchvision's sets, .npz files, image folders.

Everything arrives as `Split`s whose batches are float images in [0, 1], [n c h w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import one_hot

from fedsec.checks import Refused, home_read, require
from fedsec.rng import stream
from fedsec.types import Batch

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Split:
    """Labelled images as they are stored: bytes, or floats in [0, 1]."""

    pixels: UInt8[Tensor, "n c h w"] | Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Tensor, classes: int) -> Batch:
        """The images at `indices`, which may repeat, in [0, 1] with one-hot targets."""
        picked = torch.as_tensor(indices, dtype=torch.int64)
        targets = one_hot(self.labels[picked], classes).float()
        return Batch(_unit(self.pixels[picked]), targets, tuple(picked.tolist()))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of images of one shape."""

    name: str
    train: Split
    test: Split
    classes: int
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        c, h, w = self.train.pixels.shape[1:]
        return c, h, w

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel over the training split, in [0, 1] units."""
        return tuple(self._moments[0].mean((1, 2)).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of each channel over the training split."""
        first, second = (m.mean((1, 2)) for m in self._moments)
        return tuple((second - first**2).clamp(min=0).sqrt().tolist())

    @property
    def mean_image(self) -> Float[Tensor, "c h w"]:
        """The pixelwise mean of the training split."""
        return self._moments[0].float()

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Pixelwise mean of x and of x squared, [c h w] in double, read in chunks."""
        first = torch.zeros(self.shape, dtype=torch.float64)
        second = first.clone()
        for chunk in self.train.pixels.split(2000):
            images = _unit(chunk)
            first += images.sum(0, dtype=torch.float64)
            second += images.square_().sum(0, dtype=torch.float64)
        return first / len(self.train), second / len(self.train)


def _unit(pixels: Tensor) -> Tensor:
    """A float copy in [0, 1]."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.clone()


# ---------------------------------------------------------------- the embedded default

_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Ten colour photographs of scikit-image and scikit-learn as patches; class = photograph.

    Each photograph is scaled to a grid of about 36 square blocks, 1.5 patches wide, so that a
    patch spans about an eighth of its height and shows a recognisable piece. Every fifth block,
    along diagonals, is a test block; patches lie within their block, so train and test share no
    pixel, while patches of one block overlap (5 x 5 of them, an eighth of a patch apart).
    Patches with almost no contrast (empty sky, black borders) are dropped: any guess inverts them.
    Both splits are in a fixed random order, so that a prefix is a fair sample.
    """

    size: int = 32  # height and width of a patch, pixels, 8 to 64
    per_class: int = 500  # training patches of a photograph at most; test: a quarter as many
    contrast: float = 0.03  # least standard deviation of a patch's pixels, [0, 1] units

    def __post_init__(self):
        require(8 <= self.size <= 64, "size", "must be in [8, 64]", self.size)
        require(self.per_class >= 4, "per_class", "must be at least 4", self.per_class)
        require(0 <= self.contrast <= 0.1, "contrast", "must be in [0, 0.1]", self.contrast)

    def load(self) -> Dataset:
        splits = [self._patches(*where) for where in _PHOTOS.values()]
        train, test = (_shuffled(part) for part in zip(*splits, strict=True))
        return Dataset("photos", train, test, len(_PHOTOS), tuple(_PHOTOS))

    def _patches(self, package: str, file: str) -> tuple[Tensor, Tensor]:
        """Training and test patches of one photograph, [n c h w] bytes."""
        from PIL import Image

        photo = Image.open(_bundled(package, file)).convert("RGB")
        block, stride = self.size * 3 // 2, max(1, self.size // 8)
        columns = round((36 * photo.width / photo.height) ** 0.5)
        rows = round(36 / columns)
        scaled = photo.resize((columns * block, rows * block), Image.Resampling.LANCZOS)
        train, test = [], []
        for row in range(rows):
            for column in range(columns):
                box = (column * block, row * block, (column + 1) * block, (row + 1) * block)
                cut = _pixels(scaled.crop(box)).unfold(1, self.size, stride)
                cut = cut.unfold(2, self.size, stride).flatten(1, 2).transpose(0, 1)
                keep = _unit(cut).std((2, 3)).mean(1) >= self.contrast
                (test if (2 * row + column) % 5 == 2 else train).append(cut[keep])
        return (
            _thinned(torch.cat(train), self.per_class),
            _thinned(torch.cat(test), self.per_class // 4),
        )


def _bundled(package: str, file: str) -> Path:
    """Where an installed package keeps `file`; importing it could be slow, or could download."""
    from importlib.util import find_spec

    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise Refused("data", f"photos needs {file} of the installed {package}: reinstall it", "none")


def _thinned(patches: Tensor, limit: int) -> Tensor:
    """At most `limit` of them, evenly spaced."""
    count = min(limit, len(patches))
    return patches[torch.arange(count) * len(patches) // count]


def _shuffled(classes: Sequence[Tensor]) -> Split:
    order = torch.randperm(sum(map(len, classes)), generator=stream(0, "photos"))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(c) for c in classes]))
    return Split(torch.cat(list(classes))[order], labels[order])


def _pixels(image: Image) -> UInt8[Tensor, "c h w"]:
    """An RGB image's bytes."""
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------- torchvision's readers

_READERS = {
    "cifar10": ("CIFAR10", "train"),  # its class, and the argument that names the split
    "cifar100": ("CIFAR100", "train"),
    "mnist": ("MNIST", "train"),
    "fashion_mnist": ("FashionMNIST", "train"),
    "svhn": ("SVHN", "split"),
}


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """A classic data set as torchvision stores it under `root`; downloads only when told to."""

    dataset: str  # cifar10, cifar100, mnist, fashion_mnist or svhn
    root: str = "data"  # folder that holds torchvision's files
    download: bool = False  # fetch what is missing

    def __post_init__(self):
        known = ", ".join(_READERS)
        require(self.dataset in _READERS, "dataset", f"must be among {known}", self.dataset)

    def load(self) -> Dataset:
        train, names = self._split(True)
        test, _ = self._split(False)
        return _checked(self.dataset, train, test, "data.root", self.root, names=names)

    def _split(self, train: bool) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
        import numpy as np
        from torchvision import datasets

        reader, argument = _READERS[self.dataset]
        which = train if argument == "train" else ("train" if train else "test")
        root = home_read("data.root", self.root)
        try:
            if self.download:
                root.mkdir(parents=True, exist_ok=True)
            stored = getattr(datasets, reader)(root, **{argument: which}, download=self.download)
        # missing files are a RuntimeError, damaged ones nearly anything: torchvision reads blindly
        except Exception as error:
            found = "" if "not found" in str(error).lower() else f" ({_line(error)})"
            raise Refused(
                "data.root",
                f"must hold {self.dataset} as torchvision stores it; set data.root=FOLDER, or "
                f"data.download=true to fetch it",
                f"{self.root}{found}",
            ) from error
        labels = stored.labels if self.dataset == "svhn" else stored.targets
        images = np.asarray(stored.data)
        if self.dataset == "svhn":  # the only one that is stored [n c h w]
            images = images.transpose(0, 2, 3, 1)
        names = getattr(stored, "classes", None) or [str(digit) for digit in range(10)]
        return (images, np.asarray(labels)), tuple(names)


# ---------------------------------------------------------------- .npz files

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True, kw_only=True)
class Npz:
    """An .npz file with MedMNIST's keys: train_images, train_labels, test_images, test_labels.

    Images are bytes, or floats in [0, 1], [n h w] or [n h w c] with one or three channels; labels
    are whole numbers from zero, [n] or [n 1]. Objects are never unpickled.
    """

    path: str | None = None  # the file; has to be given
    classes: int | None = None  # null: the training labels use every class

    def __post_init__(self):
        holds = self.classes is None or self.classes >= 2
        require(holds, "classes", "must be at least 2, or null", self.classes)

    def load(self) -> Dataset:
        file = _existing(self.path, "an .npz file", Path.is_file)
        arrays = _read_npz(file)
        train = (arrays["train_images"], arrays["train_labels"])
        test = (arrays["test_images"], arrays["test_labels"])
        return _checked(file.stem, train, test, "data.path", str(file), classes=self.classes)


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    import numpy as np

    try:
        archive = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy passes on whatever zipfile, zlib and its parser raise
        raise Refused("data.path", "must be an .npz file", f"{file} ({_line(error)})") from error
    require(isinstance(archive, np.lib.npyio.NpzFile), "data.path", "must be an .npz file", file)
    with archive:
        for name in _ARRAYS:
            has = ", ".join(archive.files) or "nothing"
            require(name in archive.files, "data.path", f"{file} must hold {name}", has)
        arrays = {}
        for name in _ARRAYS:
            try:
                arrays[name] = archive[name]
            except Exception as error:  # the same
                rule = f"{name} of {file} must be a whole array of numbers"
                raise Refused("data.path", rule, _line(error)) from error
        return arrays


# ---------------------------------------------------------------- folders of images


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder with one folder of images for each class, of any size; classes by sorted name.

    An image is turned upright, cropped to its central square, scaled to `size` with anti-aliasing
    and read as RGB. Of the images of a class, sorted by name, evenly spaced ones are the test
    split. Files whose name starts with a dot are passed over; any other must be an image.
    """

    path: str | None = None  # the folder; has to be given
    size: int = 32  # height and width, pixels, 8 to 512
    test_share: float = 0.2  # of each class, in (0, 1); at least one image

    def __post_init__(self):
        require(8 <= self.size <= 512, "size", "must be in [8, 512]", self.size)
        require(0 < self.test_share < 1, "test_share", "must be in (0, 1)", self.test_share)

    def load(self) -> Dataset:
        root = _existing(self.path, "a folder of class folders", Path.is_dir)
        folders = [f for f in _visible(root) if f.is_dir()]
        rule = "must hold at least two class folders"
        require(len(folders) >= 2, "data.path", rule, f"{len(folders)} in {root}")
        train, test = [], []
        for folder in folders:
            files = _visible(folder)
            rule = f"class folder {folder} must hold at least two images"
            require(len(files) >= 2, "data.path", rule, len(files))
            held = min(len(files) - 1, max(1, round(len(files) * self.test_share)))
            chosen = {(2 * i + 1) * len(files) // (2 * held) for i in range(held)}
            images = torch.stack([self._image(file) for file in files])
            is_test = torch.tensor([i in chosen for i in range(len(files))])
            train.append(images[~is_test])
            test.append(images[is_test])
        names = tuple(folder.name for folder in folders)
        return Dataset(root.name, _labelled(train), _labelled(test), len(names), names)

    def _image(self, file: Path) -> UInt8[Tensor, "c h w"]:
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as opened:
                mode = opened.mode
                upright = ImageOps.exif_transpose(opened)
                fitted = ImageOps.fit(upright.convert("RGB"), (self.size, self.size))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            reason = "cannot be decoded" if isinstance(error, OSError) else _line(error)
            raise Refused(
                "data.path", "every file must be an image", f"{file} ({reason})"
            ) from error
        rule = "images must have 8 bits for each channel"
        require(not mode.startswith(("I", "F")), "data.path", rule, f"{file} (mode {mode})")
        return _pixels(fitted)


def _labelled(classes: Sequence[Tensor]) -> Split:
    counts = torch.tensor([len(c) for c in classes])
    return Split(torch.cat(list(classes)), torch.arange(len(classes)).repeat_interleave(counts))


def _visible(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not f.name.startswith("."))


# ---------------------------------------------------------------- checks


def _existing(path: str | None, what: str, holds: Callable[[Path], bool]) -> Path:
    require(path is not None, "data.path", f"has to be given: {what}", "null")
    found = home_read("data.path", str(path))
    require(holds(found), "data.path", f"must be {what} that exists", path)
    return found


def _line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _checked(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    key: str,
    where: str,
    *,
    classes: int | None = None,
    names: tuple[str, ...] = (),
) -> Dataset:
    """A data set of foreign arrays, or a refusal that names the array and what is wrong with it."""
    classes = classes or len(names) or None
    splits = []
    for part, (images, labels) in (("train", train), ("test", test)):
        pixels = _checked_images(images, key, f"{part}_images of {where}")
        target = _checked_labels(labels, key, f"{part}_labels of {where}")
        rule = f"{part}_labels of {where} must be as many as {part}_images ({len(pixels)})"
        require(len(target) == len(pixels), key, rule, len(target))
        if classes is None:
            classes = _contiguous(target, key, f"{part}_labels of {where}")
        rule = f"{part}_labels of {where} must be in [0, {classes})"
        require(int(target.max()) < classes, key, rule, int(target.max()))
        splits.append(Split(pixels, target))
    shapes = [tuple(s.pixels.shape[1:]) for s in splits]
    rule = f"test_images of {where} must be shaped like train_images {shapes[0]}"
    require(shapes[0] == shapes[1], key, rule, shapes[1])
    names = names or tuple(str(k) for k in range(classes or 0))
    return Dataset(name, splits[0], splits[1], len(names), names)


def _checked_images(images: np.ndarray, key: str, what: str) -> Tensor:
    """[n h w] or [n h w c] to [n c h w]."""
    import numpy as np

    shape = images.shape
    fits = images.ndim == 3 or (images.ndim == 4 and shape[3] in (1, 3))
    require(fits, key, f"{what} must be [n h w] or [n h w c] with c 1 or 3", list(shape))
    require(images.size > 0, key, f"{what} must not be empty", list(shape))
    floating = np.issubdtype(images.dtype, np.floating)
    rule = f"{what} must be uint8, or floating point in [0, 1]"
    require(floating or images.dtype == np.uint8, key, rule, images.dtype)
    if floating:
        require(bool(np.isfinite(images).all()), key, f"{what} must be finite", "NaN or infinity")
        least, most = float(images.min()), float(images.max())
        require(least >= 0 and most <= 1, key, rule, f"values from {least:g} to {most:g}")
        images = images.astype(np.float32)
    channels = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(channels.transpose(0, 3, 1, 2)))


def _checked_labels(labels: np.ndarray, key: str, what: str) -> Int[Tensor, " n"]:
    import numpy as np

    fits = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    require(fits, key, f"{what} must be [n] or [n 1]", list(labels.shape))
    require(labels.size > 0, key, f"{what} must not be empty", list(labels.shape))
    whole = np.issubdtype(labels.dtype, np.integer)
    require(whole, key, f"{what} must be integers", labels.dtype)
    require(int(labels.min()) >= 0, key, f"{what} must not be negative", int(labels.min()))
    rule = f"{what} must be class numbers below 2^31"
    require(int(labels.max()) < 2**31, key, rule, int(labels.max()))
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _contiguous(labels: Tensor, key: str, what: str) -> int:
    """How many classes there are, if each has an image: a stray label would invent classes."""
    used = labels.unique()
    rule = f"{what} must use each of 0 to {int(used[-1])}, or set data.classes"
    require(len(used) == int(used[-1]) + 1, key, rule, f"{len(used)} different labels")
    require(len(used) >= 2, key, f"{what} must hold at least two classes", len(used))
    return len(used)


# ---------------------------------------------------------------- which client holds what


def partition(
    labels: Int[Tensor, " n"],
    clients: int,
    split: str,
    alpha: float,
    shards: int,
    rng: torch.Generator,
) -> list[Tensor]:
    """The positions that each client holds: disjoint, none empty, all of them together.

    `iid`: a random part each. `dirichlet`: each client draws its mix of classes from
    Dir(alpha x class shares), then its images by that mix without replacement; a class that has run
    out is passed over (Hsu et al. 2019). `shards`: the images sorted by class are cut into
    clients x shards runs, and each client gets `shards` of them (McMahan et al. 2017). Sizes differ
    by one at most (by one a shard for `shards`). Order within a client is random.
    """
    known = ("iid", "dirichlet", "shards")
    require(split in known, "split", f"must be among {', '.join(known)}", split)
    require(clients >= 1, "clients", "must be at least 1", clients)
    require(shards >= 1, "shards", "must be at least 1", shards)
    require(0 < alpha < float("inf"), "alpha", "must be above 0 and finite", alpha)
    rule = f"must be at most the {len(labels)} training images"
    require(clients <= len(labels), "clients", rule, clients)
    order = torch.randperm(len(labels), generator=rng)
    if split == "iid":
        return list(order.tensor_split(clients))
    if split == "dirichlet":
        return _dirichlet(labels, order, clients, alpha, rng)
    runs = order[labels[order].argsort(stable=True)].tensor_split(clients * shards)
    rule = f"times {clients} clients {rule}"
    require(len(runs[-1]) > 0, "shards", rule, f"{shards} x {clients} = {shards * clients}")
    dealt = torch.randperm(clients * shards, generator=rng).view(clients, shards)
    return [_reordered(torch.cat([runs[i] for i in mine.tolist()]), rng) for mine in dealt]


def _dirichlet(
    labels: Tensor, order: Tensor, clients: int, alpha: float, rng: torch.Generator
) -> list[Tensor]:
    import numpy as np

    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
    pools = [order[labels[order] == k] for k in labels.unique()]
    left = np.array([len(pool) for pool in pools])
    concentration = alpha * left / left.sum()
    held = []
    for size in (len(part) for part in order.tensor_split(clients)):
        mix = draws.dirichlet(concentration)
        take = np.zeros_like(left)
        while (missing := size - take.sum()) > 0:
            weights = mix * (take < left)
            if weights.sum() == 0:  # all of the client's classes have run out
                weights = (left - take).astype(float)
            take = np.minimum(take + draws.multinomial(missing, weights / weights.sum()), left)
        held.append(_reordered(torch.cat([p[:t] for p, t in zip(pools, take, strict=True)]), rng))
        pools = [p[t:] for p, t in zip(pools, take, strict=True)]
        left = left - take
    return held


def _reordered(indices: Tensor, rng: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=rng)]

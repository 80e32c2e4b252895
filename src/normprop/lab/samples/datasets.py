"""The data sets that have names: where each is found and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normprop.errors import NormPropError
from normprop.lab.names import unknown
from normprop.lab.samples.images import Images, from_arrays, read_folder, read_npz


@dataclass(frozen=True)
class Source:
    """A named data set before it is loaded.

    Attributes:
        title: One line for a listing.
        train: Number of training images.
        test: Number of test images.
        shape: Channels, height, width.
        classes: Number of classes.
        licence: As its authors state it.
        layout: The file or folder in which torchvision keeps it under the root folder.
        fetch: Loads it with torchvision from a root folder and may download it; None for a bundled one.
    """

    title: str
    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int
    licence: str
    layout: str
    fetch: Callable[[Path, bool], tuple[Any, Any, Any, Any]] | None


@dataclass(frozen=True)
class Place:
    """The place of a data set: `bundled` with a dependency, an `npz` file, `torchvision`'s files, or yet to `download`."""

    kind: Literal["bundled", "npz", "torchvision", "download"]
    path: Path | None


def _two_sets(dataset: str) -> Callable[[Path, bool], tuple[Any, Any, Any, Any]]:
    """A loader for torchvision's class of that name, which chooses the set by `train=`."""

    def fetch(root: Path, download: bool) -> tuple[Any, Any, Any, Any]:
        import torchvision.datasets

        train, test = (
            getattr(torchvision.datasets, dataset)(str(root), train=train, download=download) for train in (True, False)
        )
        return train.data, train.targets, test.data, test.targets

    return fetch


def _svhn(root: Path, download: bool) -> tuple[Any, Any, Any, Any]:
    from torchvision.datasets import SVHN

    train, test = (SVHN(str(root), split=split, download=download) for split in ("train", "test"))
    return train.data, train.labels, test.data, test.labels


_NO_LICENCE = "none stated; cite Krizhevsky 2009"
_SVHN_LICENCE = "non-commercial use; cite Netzer et al. 2011"
_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)

# Texts are read by `normprop.lab.text`.
TEXTS = ("shakespeare",)

SOURCES: dict[str, Source] = {
    "digits": Source("8×8 digits of scikit-learn", 1437, 360, (1, 8, 8), 10, "CC BY 4.0 (UCI)", "", None),
    "mnist": Source("handwritten digits", 60000, 10000, _GREY, 10, "not stated", "MNIST/raw", _two_sets("MNIST")),
    "fashion-mnist": Source("clothing", 60000, 10000, _GREY, 10, "MIT", "FashionMNIST/raw", _two_sets("FashionMNIST")),
    "cifar10": Source("photographs", 50000, 10000, _COLOUR, 10, _NO_LICENCE, "cifar-10-batches-py", _two_sets("CIFAR10")),
    "cifar100": Source("photographs", 50000, 10000, _COLOUR, 100, _NO_LICENCE, "cifar-100-python", _two_sets("CIFAR100")),
    "svhn": Source("house numbers", 73257, 26032, _COLOUR, 10, _SVHN_LICENCE, "train_32x32.mat", _svhn),
}


def data_root() -> Path:
    """The folder for data sets: `$NORMPROP_DATA`, by default `~/.cache/normprop`."""
    return Path(os.environ.get("NORMPROP_DATA") or "~/.cache/normprop").expanduser()


def locate(name: str, root: Path | None = None) -> Place:
    """The place from which the named set would be loaded.

    Example:
        >>> locate("digits").kind
        'bundled'
    """
    root = root or data_root()
    if SOURCES[name].fetch is None:
        return Place("bundled", None)
    file = root / f"{name}.npz"
    if file.is_file():
        return Place("npz", file)
    files = root / SOURCES[name].layout
    return Place("torchvision", files) if files.exists() else Place("download", root)


def load(data: str, *, root: Path | None = None, image_size: int | None = None) -> Images:
    """A data set by name, from an .npz file, or from a folder of images.

    A name is looked for as `NAME.npz` under `root`, then in torchvision's own layout there, and is downloaded last.

    Args:
        data: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn`, a path that ends in .npz, or a folder.
        root: The folder for named sets; by default `data_root()`.
        image_size: Height and width to which the images of a folder are resized.

    Raises:
        NormPropError: for an unknown name, a set that can't be downloaded, or files that hold something else.

    Example:
        >>> load("digits").shape
        (1, 8, 8)
    """
    if data in SOURCES:
        return _load_named(data, root or data_root())
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        return read_npz(path, path.stem)
    if path.is_dir():
        return read_folder(path, image_size)
    if data in TEXTS or path.suffix == ".txt":
        raise NormPropError(f"{data} is a text.\nUse --model charlstm, or images.")
    raise unknown("data set", data, SOURCES, "A path works too: FILE.npz, or a folder with one subfolder per class.")


def _load_named(name: str, root: Path) -> Images:
    place = locate(name, root)
    if place.kind == "bundled":
        return _digits()
    if place.kind == "npz":
        return read_npz(root / f"{name}.npz", name)
    fetch = SOURCES[name].fetch
    assert fetch is not None
    for download in (False, True):
        try:
            root.mkdir(parents=True, exist_ok=True)
            arrays = fetch(root, download)
        except (RuntimeError, OSError) as error:  # "not found or corrupted"; no network
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        else:
            return from_arrays(name, *arrays)
    raise NormPropError(
        f"{name} isn't on this machine and can't be downloaded: {reason}\n"
        f"Put {name}.npz (x_train, y_train, x_test, y_test) or torchvision's files into {root}, set NORMPROP_DATA to "
        "the folder that has them, or use --data digits, which needs no download."
    )


def _digits() -> Images:
    """scikit-learn's digits, four fifths of them for training, split by a fixed permutation."""
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.images.astype("uint8"), digits.target
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).numpy()
    train, test = order[:1437], order[1437:]
    return from_arrays("digits", x[train], y[train], x[test], y[test])

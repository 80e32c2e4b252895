"""A labelled data set in memory, and its making from files and folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normprop.errors import NormPropError

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True, eq=False)
class Images:
    """Training and test set in uint8 or float32: images `(n, channels, height, width)` or vectors `(n, features)`.

    Attributes:
        name: The name it was loaded by.
        x_train: Samples in their own units; `Standardize` gives them mean 0 and variance 1.
        y_train: Class of each sample, int64 from 0.
        x_test: As `x_train`.
        y_test: As `y_train`.
        classes: Number of classes.
        x_validation: Samples held out of the training set, as `x_train`; None at first.
        y_validation: Their classes.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    x_validation: Tensor | None = None
    y_validation: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, `(channels, height, width)` or `(features,)`."""
        return tuple(self.x_train.shape[1:])

    def subset(self, train_images: int) -> Images:
        """The same set with fewer training images, chosen at random but the same for every seed.

        Raises:
            NormPropError: for fewer than two, or more than there are.
        """
        total = len(self.x_train)
        if not 2 <= train_images <= total:
            raise NormPropError(f"{self.name} has {total} training images, not {train_images}.\nAsk for 2 to {total}.")
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:train_images]
        return replace(self, x_train=self.x_train[chosen], y_train=self.y_train[chosen])

    def hold_out(self, validation: int) -> Images:
        """The same set with some training images held out, chosen at random but the same for every seed.

        Raises:
            NormPropError: if fewer than two images are left to train on, or none is held out.
        """
        total = len(self.x_train)
        if not 1 <= validation <= total - 2:
            raise NormPropError(
                f"{self.name} has {total} training images: {validation} can't be held out.\nHold out 1 to {total - 2}."
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(1))
        held, kept = order[:validation], order[validation:]
        return replace(
            self,
            x_train=self.x_train[kept],
            y_train=self.y_train[kept],
            x_validation=self.x_train[held],
            y_validation=self.y_train[held],
        )


def from_arrays(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Images:
    """Images from arrays in any usual layout: `(n, h, w)`, `(n, h, w, c)`, `(n, c, h, w)` or `(n, features)`.

    Raises:
        NormPropError: for different lengths, empty sets, labels that aren't classes, or an ambiguous layout.

    Example:
        >>> x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 1])
        >>> from_arrays("grey", x, y, x, y).shape
        (1, 8, 8)
    """
    parts = {key: np.asarray(value) for key, value in zip(_ARRAYS, (x_train, y_train, x_test, y_test), strict=True)}
    for split in ("train", "test"):
        x, y = parts[f"x_{split}"], parts[f"y_{split}"]
        if not len(x) or len(x) != y.size:
            raise NormPropError(
                f"{name}: x_{split} has {len(x)} samples, y_{split} {y.size} labels.\nBoth need the same number."
            )
    y_train, y_test = _labels(name, parts["y_train"]), _labels(name, parts["y_test"])
    images = Images(
        name,
        _channels_first(name, parts["x_train"]),
        y_train,
        _channels_first(name, parts["x_test"]),
        y_test,
        int(max(y_train.max(), y_test.max())) + 1,
    )
    if images.x_train.shape[1:] != images.x_test.shape[1:]:
        raise NormPropError(
            f"{name}: training samples are {images.shape}, test samples {tuple(images.x_test.shape[1:])}.\n"
            "Bring both to one size."
        )
    return images


def read_npz(path: Path, name: str) -> Images:
    """Images from one .npz file with the arrays x_train, y_train, x_test, y_test.

    Raises:
        NormPropError: when the file is missing, damaged or lacks an array.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [key for key in _ARRAYS if key not in file]
            if missing:
                raise NormPropError(
                    f"{path} lacks {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}.\n"
                    f"Save it with np.savez(path, {', '.join(f'{key}=…' for key in _ARRAYS)})."
                )
            return from_arrays(name, *(file[key] for key in _ARRAYS))
    except NormPropError:
        raise
    except FileNotFoundError:
        raise NormPropError(f"There is no file {path}.\nCheck the path given to --data.") from None
    except Exception as error:  # zipfile, zlib, pickle and numpy each have their own way to say "damaged"
        raise NormPropError(f"{path} can't be read as .npz: {error}\nFetch or write it again.") from error


def read_folder(folder: Path, image_size: int | None = None) -> Images:
    """RGB images from a folder with one subfolder per class, by `torchvision.datasets.ImageFolder`, held in memory.

    Subfolders `train` and `test` (or `val`) are the two sets. Otherwise every fifth image of a class, in the order of file
    names, is a test image.

    Args:
        folder: The folder with the images.
        image_size: Height and width to resize them to; needed if sizes differ.

    Raises:
        NormPropError: without images, or if classes or sizes differ.
    """
    from torchvision.datasets import ImageFolder  # slow to import, and needed here only

    def open_folder(path: Path) -> Any:
        try:
            return ImageFolder(str(path))
        except FileNotFoundError as error:
            raise NormPropError(f"{path} is no image folder: {error}\nPut each class in a subfolder.") from None

    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out:
        train, test = open_folder(folder / "train"), open_folder(held_out)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise NormPropError(f"{folder}: only one of the two sets has {', '.join(odd)}.\nBoth need the same classes.")
        train_files, test_files = train.samples, test.samples
    else:
        samples: list[tuple[str, int]] = sorted(open_folder(folder).samples)
        by_class = [[s for s in samples if s[1] == label] for label in sorted({label for _, label in samples})]
        train_files = [s for files in by_class for i, s in enumerate(files) if i % 5 != 4]
        test_files = [s for files in by_class for i, s in enumerate(files) if i % 5 == 4]
    return from_arrays(
        folder.name,
        *_decode(train_files, folder, image_size),
        *_decode(test_files, folder, image_size),
    )


def _decode(files: list[tuple[str, int]], folder: Path, size: int | None) -> tuple[Tensor, list[int]]:
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    decode = v2.Compose([default_loader, *([v2.Resize((size, size))] if size else []), v2.PILToTensor()])
    images = [decode(path) for path, _ in files]
    if not images:
        raise NormPropError(f"{folder} leaves one of the two sets empty.\nA class needs at least five images.")
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise NormPropError(f"{folder} holds images of {len(sizes)} sizes.\nPass --image-size N to bring them to N×N.")
    return torch.stack(images), [label for _, label in files]


def _labels(name: str, y: NDArray[Any]) -> Tensor:
    y = y.reshape(-1)
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise NormPropError(f"{name}: labels must be whole numbers from 0, not {y.dtype}.\nNumber the classes.")
    if y.max() >= _MOST_CLASSES:
        raise NormPropError(
            f"{name}: a label is {y.max()}, and a network needs an output for each.\nNumber the classes from 0."
        )
    return torch.from_numpy(y.astype(np.int64))


def _channels_first(name: str, x: NDArray[Any]) -> Tensor:
    if x.dtype.kind not in "uifb":
        raise NormPropError(f"{name}: samples of type {x.dtype} aren't numbers.\nSave them as uint8 or float32.")
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] <= 4 < x.shape[1]:
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim not in (2, 4) or (x.ndim == 4 and x.shape[1] > 4):
        raise NormPropError(f"{name}: can't tell the channels in shape {x.shape}.\nUse (n, height, width, channels).")
    return torch.from_numpy(np.ascontiguousarray(x))

"""Named sets, files and folders: tiny files in the official layouts, and every wrong input named."""

import hashlib
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from normprop.errors import NormPropError
from normprop.lab.samples.datasets import SOURCES, load, locate
from normprop.lab.samples.images import from_arrays


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def arrays(n=6, shape=(8, 8), classes=3, dtype=np.uint8):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (n, *shape)).astype(dtype)
    return {"x_train": x, "y_train": np.arange(n) % classes, "x_test": x[:3], "y_test": np.arange(3) % classes}


@pytest.fixture
def tiny_cifar100(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    for name, n in (("train", 5), ("test", 2)):
        content = {"data": pixels[:n].reshape(n, -1), "fine_labels": [0, 99, 1, 2, 3][:n], "coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
    return tmp_path, pixels


@pytest.fixture
def tiny_svhn(tmp_path, monkeypatch):
    from torchvision.datasets import SVHN

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    splits = {}
    for split, n in (("train", 4), ("test", 2)):
        file = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(file, {"X": pixels[..., :n], "y": np.array([[10], [1], [9], [2]][:n], dtype=np.uint8)})
        splits[split] = ["http://nowhere.invalid", file.name, md5(file)]
    monkeypatch.setattr(SVHN, "split_list", splits)
    return tmp_path, pixels


def test_cifar100_in_its_official_layout(tiny_cifar100):
    root, pixels = tiny_cifar100
    assert locate("cifar100", root).kind == "torchvision"
    images = load("cifar100", root=root)
    assert images.shape == (3, 32, 32)
    assert images.classes == 100
    assert torch.equal(images.x_train, torch.from_numpy(pixels))
    assert images.y_train.tolist() == [0, 99, 1, 2, 3]
    assert len(images.x_test) == 2


def test_svhn_in_its_official_layout_counts_ten_as_zero(tiny_svhn):
    root, pixels = tiny_svhn
    images = load("svhn", root=root)
    assert images.shape == (3, 32, 32)
    assert images.y_train.tolist() == [0, 1, 9, 2]
    assert torch.equal(images.x_train[1], torch.from_numpy(pixels[..., 1]).permute(2, 0, 1))


def test_digits_are_bundled_and_split_the_same_way_always():
    assert locate("digits").kind == "bundled"
    a, b = load("digits"), load("digits")
    assert (len(a.x_train), len(a.x_test), a.classes) == (1437, 360, 10)
    assert torch.equal(a.x_test, b.x_test)
    assert a.y_test.bincount().min() > 20, "every class is tested"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_npz_in_the_data_folder_comes_first(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMPROP_DATA", str(tmp_path))
    assert locate(name).kind == "download"
    np.savez(tmp_path / f"{name}.npz", **arrays())
    assert locate(name).kind == "npz"
    assert load(name).shape == (1, 8, 8)


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "digits"])
def test_without_network_the_ways_around_are_named(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    for module in ("mnist", "cifar", "svhn"):
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", offline, raising=False)
    with pytest.raises(NormPropError, match="can't be downloaded") as caught:
        load(name, root=tmp_path / "new")
    assert f"{name}.npz" in str(caught.value)
    assert "NORMPROP_DATA" in str(caught.value)
    assert "digits" in str(caught.value)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(NormPropError, match="Did you mean cifar10 or cifar100"):
        load("cifar1O")
    with pytest.raises(NormPropError, match="A path works too"):
        load("no/such/folder")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8), (1, 8, 8)), ((8, 8, 3), (3, 8, 8)), ((3, 8, 8), (3, 8, 8)), ((17,), (17,)), ((4, 4, 4), (4, 4, 4))],
)
def test_npz_of_any_usual_layout(shape, expected, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(shape=shape))
    images = load(str(tmp_path / "mine.npz"))
    assert images.shape == expected
    assert images.name == "mine"
    assert images.x_train.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [np.float64, np.int32, bool])
def test_other_numbers_become_float32(dtype):
    assert from_arrays("mine", **arrays(dtype=dtype)).x_train.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": np.arange(5)}, "6 samples, y_train 5 labels"),
        ({"x_test": np.zeros((0, 8, 8)), "y_test": np.zeros(0, int)}, "0 samples"),
        ({"y_train": np.linspace(0, 1, 6)}, "whole numbers"),
        ({"y_test": np.array([-1, 0, 1])}, "whole numbers"),
        ({"x_test": np.zeros((3, 9, 9), np.uint8)}, "one size"),
        ({"x_train": np.zeros((6, 8, 8, 8), np.uint8)}, "can't tell the channels"),
        ({"x_train": np.array(list("abcdef"))}, "aren't numbers"),
    ],
)
def test_wrong_arrays_are_named(change, message):
    with pytest.raises(NormPropError, match=message):
        from_arrays("mine", **(arrays() | change))


def test_damaged_npz_is_named(tmp_path):
    path = tmp_path / "mine.npz"
    with pytest.raises(NormPropError, match="no file"):
        load(str(path))
    np.savez(path, x_train=np.zeros(3))
    with pytest.raises(NormPropError, match="lacks y_train, x_test, y_test; it has x_train"):
        load(str(path))
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(NormPropError, match="can't be read"):
        load(str(path))
    np.savez(path, **(arrays() | {"x_train": np.array([object()])}), allow_pickle=True)
    with pytest.raises(NormPropError, match="can't be read"):
        load(str(path))


def draw(folder, n, size=(6, 6), value=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", size, (value, i, 0)).save(folder / f"{i}.png")


def test_folder_with_two_sets(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for value, name in enumerate(("cat", "dog")):
            draw(tmp_path / split / name, n, value=value)
    images = load(str(tmp_path))
    assert images.shape == (3, 6, 6)
    assert (len(images.x_train), len(images.x_test), images.classes) == (6, 4, 2)
    assert torch.equal(images.x_train[:, 0, 0, 0].long(), images.y_train), "each image has its own class"


def test_single_folder_is_split_by_name_and_class(tmp_path):
    for value, name in enumerate(("cat", "dog")):
        draw(tmp_path / name, 10, value=value)
    a, b = load(str(tmp_path)), load(str(tmp_path))
    assert a.y_test.bincount().tolist() == [2, 2]
    assert a.y_train.bincount().tolist() == [8, 8]
    assert torch.equal(a.x_test, b.x_test)


def test_folder_of_several_sizes_needs_image_size(tmp_path):
    draw(tmp_path / "cat", 5, size=(6, 6))
    draw(tmp_path / "dog", 5, size=(9, 7))
    with pytest.raises(NormPropError, match="--image-size"):
        load(str(tmp_path))
    assert load(str(tmp_path), image_size=4).shape == (3, 4, 4)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(NormPropError, match="no image folder"):
        load(str(tmp_path))
    draw(tmp_path / "one" / "cat", 2)
    with pytest.raises(NormPropError, match="at least five"):
        load(str(tmp_path / "one"))
    draw(tmp_path / "two" / "train" / "cat", 2)
    draw(tmp_path / "two" / "test" / "dog", 2)
    with pytest.raises(NormPropError, match="only one of the two sets has cat, dog"):
        load(str(tmp_path / "two"))


def test_subset_is_the_same_for_every_seed_and_checked():
    images = load("digits")
    a, b = images.subset(100), images.subset(200)
    assert torch.equal(a.x_train, b.x_train[:100])
    assert len(a.x_test) == 360
    for n in (1, 1438):
        with pytest.raises(NormPropError, match="1437 training images"):
            images.subset(n)

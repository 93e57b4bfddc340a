"""Datasets: right ones load, wrong ones end in one line; batches depend on the seed alone."""

from __future__ import annotations

import itertools
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import image_folder
from utils.data import (
    DATASETS,
    Batches,
    ImageSet,
    canonical_name,
    classes_in_turn,
    load_dataset,
    random_crop_flip,
    split_validation,
)
from utils.errors import UserError


def image_set(count: int = 50, channels: int = 3, side: int = 8, classes: int = 5) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator
    )
    return ImageSet("random", images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


def write_folder(
    root: Path,
    *,
    classes: tuple[str, ...] = ("cat", "dog"),
    count: int = 3,
    mode: str = "RGB",
    size: tuple[int, int] = (8, 8),
    suffix: str = ".png",
) -> Path:
    generator = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "test"), classes, range(count)):
        shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        if mode.endswith("A"):
            pixels[..., -1] = 255
        path = root / part / name / f"{number:04}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, mode=None).save(path)
    return root


# ------------------------------------------------------------------------------ image sets


def test_image_set_describes_itself():
    data = image_set(10, channels=1, side=6)
    assert (len(data), data.num_classes, data.in_channels, data.image_size) == (10, 5, 1, (6, 6))
    assert len(data.head(3)) == 3 and len(data.head(99)) == 10
    assert torch.equal(data.subset([4, 2]).labels, torch.tensor([4, 2]))
    images = data.float_images(slice(0, 2))
    assert images.dtype == torch.float32 and torch.equal(images * 255, data.images[:2].float())
    assert torch.equal(data.float_images(torch.tensor([1])), images[1:])


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(label):
    data = image_set()
    labels = data.labels.clone()
    labels[7] = label
    with pytest.raises(UserError, match=f"label {label} is out of range"):
        ImageSet("bad", data.images, labels, data.classes)


def test_images_that_are_not_uint8_are_refused():
    data = image_set()
    with pytest.raises(ValueError, match="uint8"):
        ImageSet("bad", data.images.float() * 3, data.labels, data.classes)
    with pytest.raises(UserError, match="no images"):
        data.head(0)


def test_validation_split_is_a_partition():
    data = image_set(50)
    train, held_out = split_validation(data, 10, seed=3)
    assert (len(train), len(held_out)) == (40, 10)
    together = torch.cat([train.images, held_out.images]).flatten(1).float()
    assert torch.equal(together.sum(0), data.images.flatten(1).float().sum(0))
    again = split_validation(data, 10, seed=3)[1]
    other = split_validation(data, 10, seed=4)[1]
    assert torch.equal(held_out.images, again.images)
    assert not torch.equal(held_out.images, other.images)


@pytest.mark.parametrize("size", [0, -1, 50, 51])
def test_validation_split_must_leave_something(size):
    with pytest.raises(UserError, match="--val_size"):
        split_validation(image_set(50), size, seed=0)


# --------------------------------------------------------------------------------- batches


def as_list(batches, start=0):
    return list(batches.iterate(start))


def test_an_epoch_holds_every_sample_once():
    data = image_set(50)
    batches = Batches(data, 8, shuffle=True, seed=1)
    epoch = as_list(batches)
    index = torch.cat([index for _, _, index in epoch])
    assert torch.equal(index.sort().values, torch.arange(50)) and not torch.equal(
        index, torch.arange(50)
    )
    for x, y, index in epoch:
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, data.float_images(index)) and torch.equal(y, data.labels[index])
    assert len(batches) == len(epoch) == 7 and batches.num_samples == 50


def test_without_shuffling_the_order_is_the_sets():
    index = torch.cat([index for *_, index in Batches(image_set(20), 6, shuffle=False)])
    assert torch.equal(index, torch.arange(20))


@pytest.mark.parametrize("start", [1, 3, 6])
def test_a_resumed_epoch_goes_on_exactly(start):
    full = Batches(image_set(50), 8, shuffle=True, augment=True, seed=5)
    full.set_epoch(2)
    resumed = Batches(image_set(50), 8, shuffle=True, augment=True, seed=5)
    resumed.set_epoch(2)
    torch.rand(7)  # the global generator has nothing to do with it
    pairs = zip(as_list(full)[start:], as_list(resumed, start), strict=True)
    assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs))


def test_epochs_and_seeds_differ():
    def first(seed, epoch):
        batches = Batches(image_set(50), 50, shuffle=True, augment=True, seed=seed)
        batches.set_epoch(epoch)
        x, _, index = next(iter(batches))
        return index, x

    seen = [first(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for (index, x), (other_index, other_x) in itertools.combinations(seen, 2):
        assert not torch.equal(index, other_index)
        assert not torch.equal(x[index.argsort()], other_x[other_index.argsort()])


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_shards_make_up_the_global_batches(processes):
    options = {"shuffle": True, "augment": True, "seed": 2}
    whole = as_list(Batches(image_set(53), 10, **options))
    shards = [
        as_list(Batches(image_set(53), 10, rank=rank, world_size=processes, **options))
        for rank in range(processes)
    ]
    if processes > 3:  # a shard of the last three samples would be empty: they join the others
        whole = as_list(Batches(image_set(53), 10, min_batch=processes, **options))
    for batch, parts in zip(whole, zip(*shards, strict=True), strict=True):
        assert all(len(index) for *_, index in parts)
        for tensor, pieces in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(tensor, torch.cat(pieces))


def test_a_last_batch_of_one_joins_the_one_before():
    sizes = [len(y) for _, y, _ in Batches(image_set(17), 8, shuffle=True)]
    assert sizes == [8, 9]
    batches = Batches(image_set(17), 8, shuffle=True)
    assert [batches.global_size(i) for i in range(len(batches))] == [8, 9]
    assert [len(y) for _, y, _ in Batches(image_set(17), 8, shuffle=True, min_batch=1)] == [8, 8, 1]
    assert [len(y) for _, y, _ in Batches(image_set(17), 8, shuffle=True, drop_last=True)] == [8, 8]
    assert [len(y) for _, y, _ in Batches(image_set(5), 8, shuffle=True)] == [5]
    # to evaluate a single image is fine
    assert [len(y) for _, y, _ in Batches(image_set(5).head(1), 8, shuffle=False)] == [1]


def test_senseless_training_data_is_refused():
    data = image_set(20)
    with pytest.raises(UserError, match="1 sample"):
        Batches(data.head(1), 8, shuffle=True)
    one_class = data.subset(torch.where(data.labels == 2)[0])
    with pytest.raises(UserError, match="all 4 training samples are of class 'c'"):
        Batches(one_class, 8, shuffle=True)
    grey = ImageSet("grey", torch.full_like(data.images, 127), data.labels, data.classes)
    with pytest.raises(UserError, match="all 20 training images are the same"):
        Batches(grey, 8, shuffle=True)
    with pytest.raises(UserError, match="do not fill a batch"):
        Batches(data, 21, shuffle=True, drop_last=True)
    with pytest.raises(UserError, match="batch size 0"):
        Batches(data, 0, shuffle=True)
    with pytest.raises(UserError, match="3 processes"):
        Batches(data, 2, shuffle=True, world_size=3)


def test_generators_belong_to_a_batch():
    batches = Batches(image_set(), 8, shuffle=True, seed=1)
    draw = torch.rand(4, generator=batches.generator(3))
    assert torch.equal(draw, torch.rand(4, generator=batches.generator(3)))
    assert not torch.equal(draw, torch.rand(4, generator=batches.generator(4)))
    assert not torch.equal(draw, torch.rand(4, generator=batches.generator(3, "probe")))
    batches.set_epoch(1)
    assert not torch.equal(draw, torch.rand(4, generator=batches.generator(3)))


def test_crop_and_flip_against_a_loop():
    images = image_set(64, side=9).images
    moved = random_crop_flip(images, torch.Generator().manual_seed(1), padding=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        found = [
            (top, left, mirror)
            for top, left, mirror in itertools.product(range(5), range(5), (False, True))
            if torch.equal(
                before[:, top : top + 9, left : left + 9].flip(2)
                if mirror
                else before[:, top : top + 9, left : left + 9],
                after,
            )
        ]
        assert len(found) == 1
        seen.update(found)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert 20 < sum(torch.equal(a, b) for a, b in zip(moved, moved)) <= 64
    assert {mirror for *_, mirror in seen} == {False, True}


def test_crop_without_mirror():
    images = image_set(64, side=9).images
    options = images, torch.Generator().manual_seed(1), 0
    assert torch.equal(random_crop_flip(*options, mirror=False), images)
    assert not torch.equal(random_crop_flip(*options, mirror=True), images)


# ---------------------------------------------------------------------------------- digits


def test_digits_need_no_files(tmp_path):
    train = load_dataset("digits", tmp_path / "missing", train=True)
    test = load_dataset("DIGITS", tmp_path / "missing", train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (1, 28, 28) and train.classes == tuple("0123456789")
    assert torch.equal(test.labels.bincount(), torch.full((10,), 36))
    assert train.images.max() == 255 and train.images.min() == 0
    both = {bytes(image.numpy()) for image in train.images} & {
        bytes(image.numpy()) for image in test.images
    }
    assert not both
    assert torch.equal(train.images, load_dataset("digits", ".", train=True).images)


# --------------------------------------------------------------------------- image folders


@pytest.mark.parametrize("packed", [False, True])
def test_image_folder(tmp_path, packed):
    root = write_folder(tmp_path / "pets")
    expected = np.asarray(Image.open(root / "train" / "dog" / "0001.png"))
    (root / "train" / "dog" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    if packed:
        with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(tmp_path))
        root = tmp_path / "pets.zip"
    data = load_dataset("folder", root, train=True, expected_channels=3)
    assert data.name == ("pets.zip" if packed else "pets") + " (image folder)"
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]  # the classes take turns
    assert np.array_equal(data.images[3].permute(1, 2, 0).numpy(), expected)
    assert len(load_dataset("folder", root, train=False)) == 6


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_a_named_dataset_may_be_an_image_folder(tmp_path, place):
    names = tuple("abcdefghij")
    write_folder(tmp_path / place, classes=names, count=1, size=(32, 32), suffix=".jpg")
    data = load_dataset("CIFAR10", tmp_path, train=True)
    assert data.name == "cifar10 (image folder, JPEG)" and data.images.shape == (10, 3, 32, 32)


def test_a_zip_file_beside_the_data_is_read(tmp_path):
    names = tuple("abcdefghij")
    write_folder(tmp_path / "x", classes=names, count=1, size=(32, 32))
    with zipfile.ZipFile(tmp_path / "cifar10-png.zip", "w") as archive:
        for path in sorted((tmp_path / "x").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path))
    assert load_dataset("cifar10", tmp_path, train=False).name == "cifar10 (image folder)"


@pytest.mark.parametrize("mode,channels", [("L", 1), ("RGB", 3), ("RGBA", 3), ("LA", 1)])
def test_colour_is_told_from_the_files(tmp_path, mode, channels):
    data = load_dataset("folder", write_folder(tmp_path, mode=mode), train=True)
    assert data.in_channels == channels


def bad_folder(tmp_path: Path, kind: str) -> tuple[str, str]:
    """(dataset, what the error must say)"""
    root = write_folder(tmp_path)
    odd = root / "train" / "dog" / "0001.png"
    if kind == "nothing":
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        return "folder", "no image folder there"
    if kind == "empty train":
        (tmp_path / "other" / "train").mkdir(parents=True)
        return "folder:other", "train: empty"
    if kind == "empty class":
        (root / "train" / "eel").mkdir()
        return "folder", "eel: no images"
    if kind == "no test":
        for path in sorted((root / "test").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (root / "test").rmdir()
        return "folder:test", "test: missing"
    if kind == "one class":
        for part in ("train", "test"):
            for path in (root / part / "dog").iterdir():
                path.unlink()
            (root / part / "dog").rmdir()
        return "folder", "one class only"
    if kind == "strange class":
        (root / "test" / "dog").rename(root / "test" / "wolf")
        return "folder:test", "class 'wolf' is not among the 2 classes"
    if kind == "size":
        Image.new("RGB", (9, 8)).save(odd)
        return "folder", "0001.png: 9x8 pixels, but .*0000.png has 8x8"
    if kind == "grey among colour":
        Image.new("L", (8, 8)).save(odd)
        return "folder", "0001.png: a grey image, but .*0000.png is a colour one"
    if kind == "grey":
        write_folder(tmp_path / "grey", mode="L")
        return "folder:grey", "a grey image where colour is needed"
    if kind == "transparent":
        Image.new("RGBA", (8, 8)).save(odd)
        return "folder", "transparent"
    if kind == "16 bit":
        Image.new("I;16", (8, 8)).save(odd)
        return "folder", "8-bit grey or colour"
    if kind == "truncated":
        odd.write_bytes(odd.read_bytes()[:60])
        return "folder", "0001.png: cannot be read|0001.png: not an image"
    if kind == "text":
        odd.write_text("hello")
        return "folder", "0001.png: not an image"
    if kind == "number of classes":
        return "cifar10", "2 classes .* cifar10 has 10"
    if kind == "wrong size of a named set":
        write_folder(tmp_path / "ten", classes=tuple("abcdefghij"), count=1)
        return "cifar10:ten", "8x8 pixels .* cifar10 has 32x32"
    if kind == "broken zip":
        (tmp_path / "zip").mkdir()
        (tmp_path / "zip" / "cifar10.zip").write_bytes(b"PK\x03\x04 and so on")
        return "cifar10:zip", "not a readable zip file"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "nothing",
        "empty train",
        "empty class",
        "no test",
        "one class",
        "strange class",
        "size",
        "grey among colour",
        "grey",
        "transparent",
        "16 bit",
        "truncated",
        "text",
        "number of classes",
        "wrong size of a named set",
        "broken zip",
    ],
)
def test_a_wrong_image_folder_ends_in_one_line(tmp_path, kind):
    name, message = bad_folder(tmp_path, kind)
    name, _, rest = name.partition(":")
    train = rest != "test"
    root = tmp_path if rest in ("", "test") else tmp_path / rest
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(name, root, train, expected_channels=3)
    assert "\n" not in str(caught.value)


def test_decoded_images_are_kept_beside_the_files(tmp_path, monkeypatch):
    def load():
        return load_dataset("folder", tmp_path, train=True)

    write_folder(tmp_path)
    first = load()
    assert not list(tmp_path.glob(".*"))  # not worth it
    monkeypatch.setattr(image_folder, "_CACHE_SECONDS", -1)
    assert torch.equal(load().images, first.images)
    cache = tmp_path / ".train.pixels"
    made = cache.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "_decode", None)  # must not be needed
        again = load()
    assert torch.equal(again.images, first.images) and torch.equal(again.labels, first.labels)
    # another file, a damaged cache, half a cache, no cache: decoded again
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "0000.png")
    assert load().images[0].sum() == 0 and cache.stat().st_mtime_ns > made
    good = cache.read_bytes()
    for bad in (good[:-1], good[:-1] + b"x", b"", b"[]\n", b"{}\n", bytes(100), good[:20]):
        cache.write_bytes(bad)
        assert torch.equal(load().images[1:], first.images[1:])
        assert cache.read_bytes() == good
    cache.unlink()
    cache.mkdir()
    assert len(load()) == 6


# ------------------------------------------------------------------------------ torchvision


def test_names():
    assert canonical_name("CIFAR10") == "cifar10" and canonical_name("fashionmnist") in DATASETS
    with pytest.raises(UserError, match="--dataset imagenet: unknown, allowed are digits, MNIST"):
        canonical_name("imagenet")


def unreachable(*_args, **_options):
    raise OSError("no network in this test")


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "SVHN", "cifar10", "cifar100"])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        load_dataset(name, tmp_path / "data", train=True)
    line = str(caught.value)
    assert "\n" not in line and "no network in this test" in line and "http" in line
    assert "by hand" in line and "--dataset digits" in line and str(tmp_path) in line
    assert not list((tmp_path / "data").iterdir())


def test_a_silent_network_is_given_up_within_seconds(tmp_path, monkeypatch):
    release = threading.Event()

    def silent(*_args, **_options):
        release.wait(30)
        raise OSError("too late")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    monkeypatch.setattr("utils.data._PATIENCE", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within"):
        load_dataset("MNIST", tmp_path, train=True)
    assert time.monotonic() - start < 15  # most of it torchvision's import
    release.set()


def test_a_damaged_file_is_one_line(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03garbage")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_dataset("MNIST", tmp_path, train=True)
    assert "\n" not in str(caught.value)


def test_a_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        load_dataset("MNIST", tmp_path / "file", train=True)


def test_mnist_from_disk(mnist_test):
    assert mnist_test.name == "MNIST" and mnist_test.images.shape == (10000, 1, 28, 28)
    assert mnist_test.classes == tuple("0123456789")
    assert mnist_test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(mnist_test.float_images().mean().item() - 0.1325) < 1e-3


def test_cifar10_from_the_zip_file(data_dir):
    if not list(data_dir.glob("cifar10*.zip")):
        pytest.skip(f"no cifar10*.zip in {data_dir}")
    data = load_dataset("cifar10", data_dir, train=False)
    assert data.name == "cifar10 (image folder, JPEG)"
    assert data.images.shape == (10000, 3, 32, 32)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert torch.equal(data.labels.bincount(), torch.full((10,), 1000))


def test_the_first_images_of_a_folder_are_of_all_classes():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    order = classes_in_turn(labels)
    assert labels[order].tolist() == [0, 1, 2, 0, 2, 0, 0]
    assert order.tolist() == [0, 4, 5, 1, 6, 2, 3]
    assert classes_in_turn(torch.tensor([2, 0, 2])).tolist() == [1, 0, 2]

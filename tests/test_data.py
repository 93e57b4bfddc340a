"""Datasets: right ones load, wrong ones end in one line; batches depend on the seed alone."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from utils import datasets
from utils.data import Batches, ImageSet, classes_in_turn, random_crop_hflip, split_validation
from utils.datasets import DATASETS, augmentation, load_dataset
from utils.errors import UserError


def image_set(count: int = 50, channels: int = 3, side: int = 8, classes: int = 5) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator
    )
    return ImageSet("random", images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


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
    with pytest.raises(AssertionError):
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
    assert len(batches) == len(epoch) == 7


def test_without_shuffling_the_order_is_the_sets():
    index = torch.cat([index for *_, index in Batches(image_set(20), 6, shuffle=False)])
    assert torch.equal(index, torch.arange(20))


@pytest.mark.parametrize("start", [1, 3, 6])
def test_a_resumed_epoch_goes_on_exactly(start):
    full = Batches(image_set(50), 8, shuffle=True, augment=True, seed=5)
    full.epoch = 2
    resumed = Batches(image_set(50), 8, shuffle=True, augment=True, seed=5)
    resumed.epoch = 2
    torch.rand(7)  # the global generator has nothing to do with it
    pairs = zip(as_list(full)[start:], as_list(resumed, start), strict=True)
    assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs))


def test_epochs_and_seeds_differ():
    def first(seed, epoch):
        batches = Batches(image_set(50), 50, shuffle=True, augment=True, seed=seed)
        batches.epoch = epoch
        x, _, index = next(iter(batches))
        return index, x

    seen = [first(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for (index, x), (other_index, other_x) in itertools.combinations(seen, 2):
        assert not torch.equal(index, other_index)
        assert not torch.equal(x[index.argsort()], other_x[other_index.argsort()])


@pytest.mark.parametrize(("processes", "count"), [(2, 53), (3, 53), (5, 55)])
def test_shards_make_up_the_global_batches(processes, count):
    options = {"shuffle": True, "augment": True, "seed": 2}
    whole = as_list(Batches(image_set(count), 10, **options))
    shards = [
        as_list(Batches(image_set(count), 10, rank=rank, world_size=processes, **options))
        for rank in range(processes)
    ]
    for batch, parts in zip(whole, zip(*shards, strict=True), strict=True):
        for tensor, pieces in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(tensor, torch.cat(pieces))


def test_no_shard_is_empty():
    shards = [Batches(image_set(53), 10, shuffle=True, rank=r, world_size=5) for r in range(5)]
    sizes = [[len(y) for _, y, _ in shard] for shard in shards]
    assert sizes == [[2, 2, 2, 2, size] for size in (2, 3, 2, 3, 3)]  # the last three join


def test_batches_are_those_of_the_published_runs():
    batches = Batches(image_set(50), 8, shuffle=True, augment=True, seed=5, epoch=3)
    x, _, index = next(batches.iterate(2))
    assert index.tolist() == [21, 40, 48, 10, 5, 37, 12, 24]
    assert round(float(x.double().sum()) * 255) == 96359
    noise = torch.rand(1, generator=batches.generator(2, "noise"), dtype=torch.float64)
    assert float(noise) == pytest.approx(0.08155361299010411, abs=1e-12)


def test_a_last_batch_of_one_joins_the_one_before():
    sizes = [len(y) for _, y, _ in Batches(image_set(17), 8, shuffle=True)]
    assert sizes == [8, 9]
    batches = Batches(image_set(17), 8, shuffle=True)
    assert [batches.global_size(i) for i in range(len(batches))] == [8, 9]
    assert [len(y) for _, y, _ in Batches(image_set(5), 8, shuffle=True)] == [5]
    # to evaluate a single image is fine
    assert [len(y) for _, y, _ in Batches(image_set(5).head(1), 8, shuffle=False)] == [1]


def test_senseless_training_data_is_refused():
    data = image_set(20)
    one_class = data.subset(torch.where(data.labels == 2)[0])
    grey = ImageSet("grey", torch.full_like(data.images, 127), data.labels, data.classes)
    for bad, message in (
        (data.head(1), "all 1 training samples are of one class"),
        (one_class, "all 4 training samples are of one class"),
        (grey, "all 20 training samples are the same image"),
    ):
        with pytest.raises(UserError, match=message):
            Batches(bad, 8, shuffle=True)
        assert len(Batches(bad, 8, shuffle=False))
    with pytest.raises(UserError, match="batch size 0"):
        Batches(data, 0, shuffle=True)
    with pytest.raises(UserError, match="3 processes"):
        Batches(data, 2, shuffle=True, world_size=3)


def test_generators_belong_to_a_batch():
    batches = Batches(image_set(), 8, shuffle=True, seed=1)
    draw = torch.rand(4, generator=batches.generator(3, "noise"))
    assert torch.equal(draw, torch.rand(4, generator=batches.generator(3, "noise")))
    assert not torch.equal(draw, torch.rand(4, generator=batches.generator(4, "noise")))
    assert not torch.equal(draw, torch.rand(4, generator=batches.generator(3, "probe")))
    batches.epoch = 1
    assert not torch.equal(draw, torch.rand(4, generator=batches.generator(3, "noise")))


def test_crop_and_flip_against_a_loop():
    images = image_set(64, side=9).images
    moved = random_crop_hflip(images, torch.Generator().manual_seed(1), padding=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        found = [
            (top, left, flip)
            for top, left, flip in itertools.product(range(5), range(5), (False, True))
            if torch.equal(
                before[:, top : top + 9, left : left + 9].flip(2)
                if flip
                else before[:, top : top + 9, left : left + 9],
                after,
            )
        ]
        assert len(found) == 1
        seen.update(found)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert 20 < sum(torch.equal(a, b) for a, b in zip(moved, moved)) <= 64
    assert {flip for *_, flip in seen} == {False, True}


def test_crop_without_hflip():
    images = image_set(64, side=9).images
    options = images, torch.Generator().manual_seed(1), 0
    assert torch.equal(random_crop_hflip(*options, hflip=False), images)
    assert not torch.equal(random_crop_hflip(*options, hflip=True), images)


# ---------------------------------------------------------------------------------- digits


def test_digits_need_no_files(tmp_path):
    train = load_dataset("digits", tmp_path / "missing", train=True)
    test = load_dataset("digits", tmp_path / "missing", train=False)
    assert (len(train), len(test)) == (1437, 360) and train.source == "digits"
    assert train.images.shape[1:] == (1, 28, 28) and train.classes == DIGITS
    assert torch.equal(test.labels.bincount(), torch.full((10,), 36))
    assert train.images.max() == 255 and train.images.min() == 0
    both = {bytes(image.numpy()) for image in train.images} & {
        bytes(image.numpy()) for image in test.images
    }
    assert not both
    # the split and the pixels of the published runs
    assert train.labels[:8].tolist() == [0, 1, 3, 4, 5, 6, 7, 9]
    assert (int(train.images.sum()), int(test.images.sum())) == (87773335, 21892341)


def test_augmentation_knows_what_may_be_flipped():
    found = {name: augmentation(name) for name in DATASETS}
    assert found == {
        "digits": (2, False),
        "MNIST": (2, False),
        "FashionMNIST": (2, True),
        "SVHN": (4, False),
        "cifar10": (4, True),
        "cifar100": (4, True),
        "folder": (4, True),
    }


# --------------------------------------------------------------------------- image folders

DIGITS = tuple("0123456789")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def write_folder(root: Path, classes=("cat", "dog"), count=3, mode="RGB", size=8) -> Path:
    """``root/{train,test}/<class>/000i.png``, opaque noise."""
    generator = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "test"), classes, range(count)):
        pixels = generator.integers(0, 256, (size, size, len(mode)), dtype=np.uint8)
        if mode.endswith("A"):
            pixels[..., -1] = 255
        path = root / part / name / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(path)
    return root


def test_image_folder(tmp_path, capsys):
    root = write_folder(tmp_path / "pets")
    expected = np.asarray(Image.open(root / "train" / "dog" / "0001.png"))
    (root / "train" / ".hidden").mkdir()
    for junk in (".DS_Store", "Thumbs.db"):
        (root / "train" / "dog" / junk).write_text("")
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset("folder", root, train=True)
    assert (data.name, data.source) == ("pets (image folder)", "folder")
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]  # the classes take turns
    assert np.array_equal(data.images[3].permute(1, 2, 0).numpy(), expected)
    assert len(load_dataset("folder", root, train=False)) == 6
    assert capsys.readouterr().out == "" and sorted(tmp_path.rglob("*")) == before


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    root = write_folder(tmp_path)
    place = root / "train" / "dog"
    for name in ("notes.txt", "a.webm", "b.webm", "bare"):
        (place / name).write_text("not an image")
    (place / "gone.png").symlink_to(tmp_path / "nowhere")
    (place / "loop.png").symlink_to(place / "loop.png")
    (place / "deeper").mkdir()
    (root / "train" / "stray.png").write_bytes((place / "0000.png").read_bytes())
    assert len(load_dataset("folder", root, train=True)) == 6
    assert capsys.readouterr().out == (
        f"note: {root}/train: 8 files left out (3 .png, 1 .txt, 2 .webm, 2 without extension)\n"
    )
    load_dataset("folder", root, train=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", "tif tiff gif jfif JPG bmp webp".split())
def test_every_usual_format_is_taken(tmp_path, capsys, suffix):
    root = write_folder(tmp_path)
    path = root / "train" / "dog" / "0001.png"
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    image.save(path.with_suffix(f".{suffix}"), "JPEG" if suffix in ("jfif", "JPG") else None)
    path.unlink()
    data = load_dataset("folder", root, train=True)
    assert len(data) == 6 and capsys.readouterr().out == ""
    assert (data.images[3].float() - torch.tensor([255.0, 0, 0]).view(3, 1, 1)).abs().max() < 3


@pytest.mark.parametrize("place", ["", "cifar10", "CIFAR-10"])
def test_a_named_dataset_may_be_an_image_folder(tmp_path, place):
    # In any case, and labelled in the dataset's own order whatever the names sort to.
    names = [name.title() if name == "truck" else name for name in CIFAR10]
    write_folder(tmp_path / place, names, count=1, size=32)
    data = load_dataset("cifar10", tmp_path, train=True)
    assert (data.name, data.source) == ("cifar10 (image folder)", "cifar10")
    assert data.images.shape == (10, 3, 32, 32) and data.classes == tuple(CIFAR10)
    truck = next((tmp_path / place / "train" / "Truck").iterdir())
    assert np.array_equal(data.images[9].permute(1, 2, 0).numpy(), np.asarray(Image.open(truck)))
    assert data.labels.tolist() == list(range(10))


@pytest.mark.parametrize("name", ["SVHN", "cifar10", "cifar100", "FashionMNIST", "MNIST"])
def test_a_named_dataset_has_its_own_classes(tmp_path, name):
    names = CIFAR10 if name == "SVHN" else [f"class{i}" for i in range(10)]
    grey = name.endswith("MNIST")
    mode, size = ("L", 28) if grey else ("RGB", 32)
    write_folder(tmp_path, names, count=1, mode=mode, size=size)
    with pytest.raises(UserError, match=f"not those of {name}; use --dataset folder"):
        load_dataset(name, tmp_path, train=False)


def test_fashion_mnist_as_an_image_folder(tmp_path):
    names = "T-shirt_top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag ankle-boot".split()
    write_folder(tmp_path, names, count=1, mode="L", size=28)
    data = load_dataset("FashionMNIST", tmp_path, train=True)
    shirt = next((tmp_path / "train" / "T-shirt_top").iterdir())
    assert data.classes[0] == "T-shirt/top" and data.classes[9] == "Ankle boot"
    assert np.array_equal(data.images[0, 0].numpy(), np.asarray(Image.open(shirt)))


def test_test_labels_are_those_of_training(tmp_path, capsys):
    root = write_folder(tmp_path, ("ant", "bee", "cat"), count=2)
    for path in (root / "test" / "ant").iterdir():
        path.unlink()
    (root / "test" / "ant").rmdir()
    data = load_dataset("folder", root, train=False)
    assert data.classes == ("ant", "bee", "cat") and data.labels.tolist() == [1, 2, 1, 2]
    assert capsys.readouterr().out == f"note: {root / 'test'}: 1 of 3 classes have no images\n"


@pytest.mark.parametrize("mode,channels", [("L", 1), ("RGB", 3), ("RGBA", 3), ("LA", 1)])
def test_colour_is_told_from_the_files(tmp_path, mode, channels):
    data = load_dataset("folder", write_folder(tmp_path, mode=mode), train=True)
    assert data.in_channels == channels
    stored = np.asarray(Image.open(tmp_path / "train" / "cat" / "0000.png")).reshape(8, 8, -1)
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), stored[..., :channels])


NOISE_IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
TRANSPARENT = {
    "alpha": (Image.new("RGBA", (8, 8), (9, 9, 9, 254)), {}),
    "grey alpha": (Image.new("LA", (8, 8), (9, 0)), {}),
    "palette": (NOISE_IMAGE.quantize(4), {"transparency": 0}),
    "palette, by bytes": (NOISE_IMAGE.quantize(4), {"transparency": b"\xff\x80"}),
    "colour": (Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}),
    "grey": (Image.new("L", (8, 8), 7), {"transparency": 7}),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.filterwarnings("error")
def test_transparency_is_refused(tmp_path, kind):
    image, options = TRANSPARENT[kind]
    image.save(write_folder(tmp_path) / "train" / "dog" / "0001.png", **options)
    with pytest.raises(UserError, match=r"dog/0001.png: has transparent pixels"):
        load_dataset("folder", tmp_path, train=True)


def test_a_transparent_colour_that_no_pixel_has_is_no_transparency(tmp_path):
    path = write_folder(tmp_path) / "train" / "dog" / "0001.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, transparency=(9, 9, 9))
    data = load_dataset("folder", tmp_path, train=True)
    assert data.images[3, :, 0, 0].tolist() == [1, 2, 3]


def bad_folder(root: Path, kind: str) -> str:
    """What the error must say."""
    odd = root / "train" / "dog" / "0001.png"
    if kind == "empty class":
        (root / "train" / "eel").mkdir()
        return "eel: no readable images"
    if kind == "class of other files":
        (root / "train" / "eel").mkdir()
        (root / "train" / "eel" / "a.svg").write_text("")
        return "eel: no readable images"
    if kind == "dangling class":
        (root / "train" / "eel").symlink_to(root / "nowhere")
        return "train/eel: no such file"
    if kind == "empty train":
        (root / "train").rename(root / "old")
        (root / "train").mkdir()
        return "train: empty"
    if kind == "nothing":
        (root / "train").rename(root / "old")
        (root / "test").rename(root / "older")
        return "no image folder"
    if kind == "one class":
        (root / "train" / "dog").rename(root / "dog")
        return "one class only"
    if kind == "size":
        Image.new("RGB", (9, 8)).save(odd)
        return r"0001.png: .* is \(8, 9, 3\), needed is \(8, 8, 3\)"
    if kind == "grey among colour":
        Image.new("L", (8, 8)).save(odd)
        return r"0001.png: .* is \(8, 8, 1\), needed is \(8, 8, 3\)"
    if kind == "16 bit":
        Image.new("I;16", (8, 8)).save(odd)
        return "8-bit grey or colour"
    if kind == "animation":
        frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 200)]
        frames[0].save(odd.with_suffix(".gif"), save_all=True, append_images=frames[1:])
        return "0001.gif: several images in one file"
    if kind == "truncated":
        odd.write_bytes(odd.read_bytes()[:60])
        return "0001.png: "
    if kind == "text":
        odd.write_text("hello")
        return "0001.png: cannot identify image file"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    """empty class|class of other files|dangling class|empty train|nothing|one class|size
    |grey among colour|16 bit|animation|truncated|text""".replace("\n    ", "").split("|"),
)
def test_a_wrong_image_folder_ends_in_one_line(tmp_path, kind):
    message = bad_folder(write_folder(tmp_path), kind)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("folder", tmp_path, train=True)
    assert "\n" not in str(caught.value)


def test_a_wrong_test_part_ends_in_one_line(tmp_path):
    root = write_folder(tmp_path)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(UserError, match="wolf: not one of the 2 classes in"):
        load_dataset("folder", root, train=False)
    (root / "test").rename(root / "elsewhere")
    with pytest.raises(UserError, match="test: no such file"):
        load_dataset("folder", root, train=False)


def test_a_named_image_folder_has_the_datasets_pixels(tmp_path):
    write_folder(tmp_path, CIFAR10, count=1)
    with pytest.raises(UserError, match=r"is \(8, 8, 3\), needed is \(32, 32, 3\)"):
        load_dataset("cifar10", tmp_path, train=True)
    write_folder(tmp_path / "grey", DIGITS, count=1, size=28)
    with pytest.raises(UserError, match=r"is \(28, 28, 3\), needed is \(28, 28, 1\)"):
        load_dataset("MNIST", tmp_path / "grey", train=True)


def test_the_first_images_of_a_folder_are_of_all_classes():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    order = classes_in_turn(labels)
    assert labels[order].tolist() == [0, 1, 2, 0, 2, 0, 0]
    assert order.tolist() == [0, 4, 5, 1, 6, 2, 3]
    assert classes_in_turn(torch.tensor([2, 0, 2])).tolist() == [1, 0, 2]


# ------------------------------------------------------------------- the sets' published files


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*_args, **_options):
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


IMAGES, LABELS_10 = noise(10, 28, 28), np.arange(10, dtype=np.uint8)


def write_idx(place: Path, spelling: str = "{}-{}-{}-ubyte", labels=LABELS_10) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for part, (kind, code, values) in itertools.product(
        ("train", "t10k"), (("images", "idx3", IMAGES), ("labels", "idx1", labels))
    ):
        content = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
        content += values.tobytes()
        name = spelling.format(part, kind, code)
        (place / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    return place


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize(
    "place,spelling",
    [
        ("{}/raw", "{}-{}-{}-ubyte"),
        ("{}/raw", "{}-{}-{}-ubyte.gz"),
        ("{}", "{}-{}.{}-ubyte"),
        (".", "{}-{}.{}-ubyte.gz"),
        (".", "{}-{}-{}-ubyte.gz"),
        ("raw", "{}-{}-{}-ubyte"),
    ],
)
def test_idx_files_in_the_usual_layouts(tmp_path, name, place, spelling):
    write_idx(tmp_path / place.format(name), spelling)
    for train in (True, False):
        data = load_dataset(name, tmp_path, train)
        assert data.name == data.source == name and data.labels.tolist() == list(range(10))
        assert np.array_equal(data.images[:, 0].numpy(), IMAGES)
        assert data.classes[0] == ("0" if name == "MNIST" else "T-shirt/top")


@pytest.mark.parametrize("place", ["Fashion-MNIST", "fashionmnist/raw"])
def test_files_that_are_named_after_another_dataset(tmp_path, place):
    """Those of MNIST and FashionMNIST have the same names."""
    root = write_idx(tmp_path / "mnist" / place)
    assert load_dataset("FashionMNIST", root, train=True).name == "FashionMNIST"
    with pytest.raises(UserError, match="by its name another dataset than --dataset MNIST"):
        load_dataset("MNIST", root, train=True)


IDX_DAMAGE = {
    "truncated": ("images", lambda c: c[:100], "cannot reshape array of size 84"),
    "too long": ("images", lambda c: c + b"x", "cannot reshape array of size 7841"),
    "empty": ("labels", lambda c: b"", "no idx file"),
    "swapped": ("labels", lambda c: b"\0\0\x08\x03" + c[4:], "no idx file"),
    "text": ("images", lambda c: b"<html>404</html>", "no idx file"),
    "half gzip": ("images", lambda c: gzip.compress(c)[:300], "Compressed file ended"),
}


@pytest.mark.parametrize("kind", IDX_DAMAGE)
def test_a_damaged_idx_file_is_named(tmp_path, kind):
    which, damage, message = IDX_DAMAGE[kind]
    path = (
        write_idx(tmp_path / "MNIST" / "raw") / f"t10k-{which}-idx{'31'[which == 'labels']}-ubyte"
    )
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{path}: {message}") as caught:
        load_dataset("MNIST", tmp_path, train=False)
    assert "\n" not in str(caught.value) and path.read_bytes() == before


def test_idx_files_that_do_not_belong_together(tmp_path):
    write_idx(tmp_path, labels=np.arange(9, dtype=np.uint8))
    with pytest.raises(UserError, match=r"uint8 \(10, 28, 28, 1\), 9 labels"):
        load_dataset("MNIST", tmp_path, train=True)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"incomplete, needed are .*train-labels-idx1-ubyte"):
        load_dataset("MNIST", tmp_path, train=True)


def write_cifar(root: Path, name: str) -> Path:
    """Two images in each batch, image i (of 10) all of value i."""
    place = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    place.mkdir(parents=True)
    key, batches = "labels", {f"data_batch_{i}": (2 * i - 2, 2 * i - 1) for i in range(1, 6)}
    batches["test_batch"] = (3, 4)
    if name == "cifar100":
        key, batches = "fine_labels", {"train": range(10), "test": (3, 4)}
        names = [f"name{i:02}" for i in range(100)]
        (place / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
    for protocol, (batch, values) in enumerate(batches.items()):
        data = np.repeat(np.array(values, np.uint8)[:, None], 3072, 1)
        data[:, 1] = 77  # red, first row, second column
        content = {"data": data, key: list(values), "batch_label": "x"}
        (place / batch).write_bytes(pickle.dumps(content, max(3, protocol)))
    return place


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("layout", ["below", "itself", "in a folder of the name"])
def test_cifar_in_the_usual_layouts(tmp_path, name, layout):
    root = tmp_path / ("CIFAR-10" if name == "cifar10" else "cifar100")
    place = write_cifar(root, name)
    given = {"below": root, "itself": place}.get(layout, tmp_path)
    train, test = (load_dataset(name, given, part) for part in (True, False))
    assert train.labels.tolist() == list(range(10)) and test.labels.tolist() == [3, 4]
    assert train.images[:, 2, 5, 7].tolist() == list(range(10)) and train.name == name
    assert (train.images[:, 0, 0, 1] == 77).all() and test.images.shape == (2, 3, 32, 32)
    assert train.classes[3] == ("cat" if name == "cifar10" else "name03")


class Command:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_damaged_cifar_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = write_cifar(tmp_path, "cifar10")
    batch = place / "data_batch_3"
    good = batch.read_bytes()
    for content, message in (
        (good[:100], "data_batch_3: .*"),
        (b"hello", "data_batch_3: .*"),
        (pickle.dumps({"data": Command()}), "data_batch_3: wants to run or build posix.system"),
        (pickle.dumps({"data": np.zeros((2, 3), np.uint8)}), "data_batch_3: .*"),
        (pickle.dumps([1]), "data_batch_3: .*"),
    ):
        batch.write_bytes(content)
        with pytest.raises(UserError, match=f"{place}/{message}"):
            load_dataset("cifar10", tmp_path, train=True)
    assert not (tmp_path / "pwned").exists()
    batch.unlink()
    with pytest.raises(UserError, match=r"incomplete, needed are data_batch_1, .*data_batch_5"):
        load_dataset("cifar10", tmp_path, train=True)
    assert len(load_dataset("cifar10", tmp_path, train=False)) == 2


@pytest.mark.parametrize("place", ["", "SVHN"])
def test_svhn(tmp_path, place):
    images = noise(32, 32, 3, 10)
    path = tmp_path / place / "train_32x32.mat"
    path.parent.mkdir(exist_ok=True)
    savemat(path, {"X": images, "y": np.arange(1, 11, dtype=np.uint8)[:, None]})
    data = load_dataset("SVHN", tmp_path, train=True)
    assert data.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # ten stands for zero
    assert np.array_equal(data.images[4].numpy(), images[..., 4].transpose(2, 0, 1))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{path}: "):
        load_dataset("SVHN", tmp_path, train=True)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_a_data_dir_that_is_none(tmp_path, no_network, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: no such folder; .*\(unpacked\)"):
        load_dataset(name, tmp_path / "file", train=True)
    for missing in (tmp_path / "mistyped", tmp_path / "file" / "x", "~nosuchuser"):
        with pytest.raises(UserError, match=f"--data_dir {missing}: no such folder"):
            load_dataset(name, missing, train=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("digits", "folder")])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, no_network, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for data_dir in (tmp_path / "empty", "./data"):
        with pytest.raises(UserError) as caught:
            load_dataset(name, data_dir, train=True)
        line = str(caught.value)
        assert "\n" not in line and "no network in this test" in line
        assert "by hand" in line and "--dataset digits" in line and str(Path(data_dir)) in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_downloaded_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def download(folder, download, fail=False):
        if fail:
            raise RuntimeError("cut off\nhalfway")
        write_idx(Path(folder) / "MNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *a, **k: download(*a, **k, fail=True))
    with pytest.raises(UserError, match=r"download failed \(cut off halfway\)"):
        load_dataset("MNIST", "./data", train=True)
    monkeypatch.setattr("torchvision.datasets.MNIST", download)
    assert len(load_dataset("MNIST", "./data", train=True)) == 10
    monkeypatch.setattr("torchvision.datasets.MNIST", None)  # from now on the files are there
    assert len(load_dataset("MNIST", "./data", train=False)) == 10
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_goes_first(tmp_path, monkeypatch, capsys, rank):
    events = []
    (write_folder(tmp_path) / "train" / "cat" / "a.txt").write_text("")
    find = datasets.find_image_folder
    monkeypatch.setattr(datasets, "find_image_folder", lambda *a: events.append("look") or find(*a))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("torch.distributed.barrier", lambda: events.append("barrier"))
    load_dataset("folder", tmp_path, train=True)
    assert events == (["look", "barrier"], ["barrier", "look"])[rank]
    assert ("left out" in capsys.readouterr().out) == (rank == 0)


def test_mnist_from_disk(mnist_test):
    assert mnist_test.name == "MNIST" and mnist_test.images.shape == (10000, 1, 28, 28)
    assert mnist_test.classes == DIGITS
    assert mnist_test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(mnist_test.float_images().mean().item() - 0.1325) < 1e-3

"""Datasets from files: image folders, published files of the usual sets, scikit-learn's digits."""

import gzip
import io
import os
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from utils import foreign
from utils.data import ImageSet, classes_in_turn, keyed_generator
from utils.errors import UserError, printable
from utils.foreign import naming
from utils.progress import Bar


class _Known(NamedTuple):  # what is empty may be anything
    shape: tuple[int, ...]  # height, width, channels
    hflip: bool  # whether an image flipped left to right still shows its class
    classes: tuple[str, ...]  # in the order of the labels
    files: tuple[str, str] = ("", "")  # of the training part, of the test part
    folder: str = ""  # where torchvision puts them


_DIGITS = tuple("0123456789")
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
_CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()
_IDX = tuple(f"{part}-images-idx3-ubyte {part}-labels-idx1-ubyte" for part in ("train", "t10k"))
_BATCHES = (" ".join(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_KNOWN = {
    "digits": _Known((28, 28, 1), False, _DIGITS),
    "MNIST": _Known((28, 28, 1), False, _DIGITS, _IDX, "raw"),
    "FashionMNIST": _Known((28, 28, 1), True, tuple(_FASHION), _IDX, "raw"),
    "SVHN": _Known((32, 32, 3), False, _DIGITS, ("train_32x32.mat", "test_32x32.mat")),
    "cifar10": _Known((32, 32, 3), True, tuple(_CIFAR), _BATCHES, "cifar-10-batches-py"),
    "cifar100": _Known((32, 32, 3), True, (), ("train meta", "test meta"), "cifar-100-python"),
    "folder": _Known((), True, ()),
}
DATASETS = tuple(_KNOWN)
# torchvision's list and two more. Pillow also knows formats that start other programs (EPS).
EXTENSIONS = ".jpg .jpeg .jfif .png .bmp .ppm .pgm .tif .tiff .webp .gif".split()
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")


def augmentation(name: str) -> tuple[int, bool]:
    """(padding, hflip) of :func:`utils.data.random_crop_hflip` that suit a dataset's images."""
    return (2 if 28 in _KNOWN[name].shape else 4), _KNOWN[name].hflip


def load_dataset(name: str, data_dir: str | os.PathLike[str], train: bool) -> ImageSet:
    """The training or the test part of a dataset.

    ``digits`` needs no files. The others are an image folder ``{train,test}/<class>/*`` in
    ``data_dir`` or ``data_dir/<name>``, or the set's published files in any usual layout; where
    there is neither, they are downloaded. Only ``./data`` is created for that. An image folder's
    classes take turns, so that its first N images are a fair sample. UserError names the file or
    folder that is missing or wrong.
    """
    if name == "digits":
        return _load_digits(train)
    root = Path(os.path.expanduser(data_dir))
    if not os.path.isdir(root) and (str(root) != "data" or name == "folder"):
        advice = "name the one of the images (unpacked), or an empty one for a download"
        raise UserError(f"--data_dir {root}: no such folder; {advice}")
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else None
    if rank:
        dist.barrier()  # the first process goes ahead and downloads what all need
    try:
        if folder := find_image_folder(name, root):
            return _load_image_folder(name, folder, train, shown=not rank)
        if not (found := _load_files(name, root, train)):
            _download(name, root, train)
            found = _load_files(name, root, train)
        return found
    finally:
        if rank == 0:
            dist.barrier()


def _load_digits(train: bool) -> ImageSet:
    """scikit-learn's 1,797 digits as 28 x 28 images; 36 of each class are the test part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels, small = torch.tensor(digits.target).long(), torch.tensor(digits.images)[:, None]
    large = F.interpolate(small * (255 / 16), size=(28, 28), mode="bilinear")
    images = large.round().clamp(0, 255).to(torch.uint8)
    order = torch.randperm(len(labels), generator=keyed_generator("digits"))
    test = torch.cat([order[labels[order] == digit][:36] for digit in range(10)])
    chosen = torch.full(labels.shape, train).index_fill(0, test, not train)
    return ImageSet("digits", images[chosen], labels[chosen], _DIGITS, "digits")


def _plain(text: str) -> str:  # a name as it is compared: Fashion-MNIST is FashionMNIST
    return re.sub("[^a-z0-9]", "", text.lower())


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, but for hidden files and Windows' Thumbs.db."""
    with naming(folder):
        names = sorted(os.listdir(folder))
    return [folder / name for name in names if not name.startswith(".") and name != "Thumbs.db"]


def _places(name: str, root: Path) -> list[Path]:
    """The folders in ``root`` that bear the dataset's name, then ``root``."""
    inside = _entries(root) if name != "folder" and os.path.isdir(root) else []
    return [*(path for path in inside if _plain(path.name) == name.lower()), root]


def find_image_folder(name: str, root: Path) -> Path | None:
    """``root/<name>`` or ``root``, whichever has a folder ``train`` or ``test``; else None."""
    for place in _places(name, root):
        if os.path.isdir(place / "train") or os.path.isdir(place / "test"):
            return place
    return None


def _load_image_folder(name: str, folder: Path, train: bool, shown: bool) -> ImageSet:
    known, part = _KNOWN[name], folder / ("train" if train else "test")
    base = folder / "train" if os.path.isdir(folder / "train") else part  # labels are training's
    # Anything but a file counts as a class: a dangling link must not make one disappear.
    classes = [path.name for path in _entries(base) if not os.path.isfile(path)]
    own, key = known.classes or tuple(classes), _plain if known.classes else str
    label_of = {key(class_name): label for label, class_name in enumerate(own)}
    count = 100 if name == "cifar100" else len(own)
    if len(classes) != count or {*map(key, classes)} != {*label_of}:
        found = f"{len(classes)} classes ({', '.join(classes[:3])}, ...), not those of {name}"
        raise UserError(f"{base}: {found}; use --dataset folder for data of your own")
    entries, files = _entries(part), dict[Path, int]()
    left_out = [path for path in entries if os.path.isfile(path)]
    for place in (path for path in entries if not os.path.isfile(path)):
        if key(place.name) not in label_of:
            raise UserError(f"{place}: not one of the {len(classes)} classes in {base}")
        inside = _entries(place)
        taken = [p for p in inside if p.suffix.lower() in EXTENSIONS and os.path.isfile(p)]
        if not taken:
            raise UserError(f"{place}: no readable images (of {' '.join(EXTENSIONS)})")
        files |= dict.fromkeys(taken, label_of[key(place.name)])
        left_out += {*inside}.difference(taken)
    if not files:
        raise UserError(f"{part}: empty, expected are images in {part}/<class>/")
    if left_out and shown:
        kinds = sorted(Counter(path.suffix or "without extension" for path in left_out).items())
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        print(printable(f"note: {part}: {len(left_out)} files left out ({listed})"), flush=True)
    images: list[np.ndarray] = []
    for path in Bar(files, desc=f"reading {part.name} images", shown=shown, delay=1):
        with naming(path):
            images.append(_decode(path))
            shape, wanted = images[-1].shape, known.shape or images[0].shape
            if shape != wanted:
                raise ValueError(f"(height, width, channels) is {shape}, needed is {wanted}")
    if (missing := len(own) - len({*files.values()})) and shown:
        print(f"note: {part}: {missing} of {len(own)} classes have no images", flush=True)
    labels = torch.tensor([*files.values()])
    order = classes_in_turn(labels)
    title = f"{name if known.shape else folder.resolve().name} (image folder)"
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ImageSet(title, pixels[order].contiguous(), labels[order], own, name)


def _decode(path: Path) -> np.ndarray:
    """uint8 [H, W, C] of an image file; C is 1 where it is stored as grey, else 3."""
    with Image.open(path, formats=_FORMATS) as image:
        grey = image.mode in ("1", "L", "LA")
        if not grey and image.mode not in ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise ValueError(f"pixel format {image.mode}, 8-bit grey or colour is needed")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("several images in one file")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                raise ValueError("has transparent pixels, which have no defined colour")
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _load_files(name: str, root: Path, train: bool) -> ImageSet | None:
    """The set from its files in ``root``, or in a folder of its name; None where there are none."""
    known, read = _KNOWN[name], {"S": _read_svhn, "c": _read_cifar}.get(name[0], _read_idx)
    for place in (p for base in _places(name, root) for p in (base / known.folder, base)):
        if files := _contents(place, known.files[not train].split()):
            named = _plain((place.parent if place.name == known.folder else place).resolve().name)
            alike = {n.lower() for n in DATASETS if n != name and _KNOWN[n].files == known.files}
            if named in alike:
                raise UserError(f"{place}: by its name another dataset than --dataset {name}")
            images, labels, classes = read(files)  # [N, H, W, C], [N], names
            if images.shape != (len(labels), *known.shape) or images.dtype != np.uint8:
                raise UserError(f"{place}: {images.dtype} {images.shape}, {len(labels)} labels")
            pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            labels = torch.tensor(labels).long()
            return ImageSet(name, pixels, labels, known.classes or classes, name)
    return None


def _contents(place: Path, files: list[str]) -> dict[Path, bytes]:
    """The contents of all these files, gzipped or not; empty if none is there."""
    found: dict[Path, bytes] = {}
    for file in files:
        dotted = file.replace("-idx", ".idx")
        paths = [place / spelling for spelling in (file, dotted, f"{file}.gz", f"{dotted}.gz")]
        if path := next(filter(os.path.isfile, paths), None):
            with naming(path):
                content = path.read_bytes()
                found[path] = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    if 0 < len(found) < len(files):
        raise UserError(f"{place}: incomplete, needed are {', '.join(files)}, or none")
    return found


def _read_idx(files: dict[Path, bytes]) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    arrays = []
    for (path, content), dims in zip(files.items(), (3, 1)):
        with naming(path):
            if content[:4] != bytes((0, 0, 8, dims)):
                raise ValueError(f"no idx file of bytes in {dims} dimensions")
            shape = np.frombuffer(content, ">u4", dims, offset=4)
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape))
    return arrays[0][..., None], arrays[1], ()


def _read_cifar(files: dict[Path, bytes]) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    images, labels, classes = [], [], ()
    for path, content in files.items():
        with naming(path):
            batch = foreign.load(io.BytesIO(content), encoding="latin1")
            if "fine_label_names" in batch:
                classes = tuple(batch["fine_label_names"])
            else:
                images.append(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels += batch["fine_labels" if "fine_labels" in batch else "labels"]
    return np.concatenate(images), labels, classes


def _read_svhn(files: dict[Path, bytes]) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    from scipy.io import loadmat

    [(path, content)] = files.items()
    with naming(path):
        stored = loadmat(io.BytesIO(content))
        return stored["X"].transpose(3, 0, 1, 2), stored["y"].reshape(-1) % 10, ()


def _download(name: str, root: Path, train: bool) -> None:
    """Have torchvision download a set to ``root``, or unpack the archive there; or UserError."""
    if name == "folder":
        raise UserError(f"--data_dir {root}: no image folder {{train,test}}/<class>/*.png there")
    from torchvision import datasets

    source: Any = getattr(datasets, name.upper() if name.startswith("cifar") else name)
    options = {"split": "train" if train else "test"} if name == "SVHN" else {}
    socket.setdefaulttimeout(5)
    try:
        source(root, download=True, **options)
    except Exception as error:  # network, disk, archive
        needed = f"neither an image folder nor {_KNOWN[name].files[not train]} in {root}"
        failed = f"the download failed ({printable(str(error))})"
        advice = "put the files there by hand, or take --dataset digits, which needs none"
        raise UserError(f"--dataset {name}: {needed}, and {failed}; {advice}") from None

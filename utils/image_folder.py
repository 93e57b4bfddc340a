"""Image folders ``DIR/{train,test}/<class>/*``, unpacked or in a zip file, as one uint8 tensor."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import time
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.runs import write_atomic

# Formats Pillow may open here: it also knows some that start other programs (EPS).
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".webp": "WEBP",
}
_WORDS = {1: "grey", 3: "colour"}
_MAX_FILE_BYTES = 64 << 20
_MAX_TOTAL_BYTES = 64 << 30
# What took longer to decode is kept beside the images: 50,000 small JPEGs take some 10 seconds.
_CACHE_SECONDS = 3.0


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


class ImageFolder(ABC):
    """Where the images are: see :func:`find_image_folder`.

    Args:
        name: what to call it.
        caches: where decoded pixels may be kept; ``{}`` stands for train or test.
    """

    def __init__(self, name: str, caches: Path) -> None:
        self.name = name
        self.caches = caches

    @abstractmethod
    def label(self, *parts: str) -> str:
        """How to call a file or folder in a message."""

    @abstractmethod
    def has(self, part: str) -> bool:
        """Whether there is a ``train`` or ``test``."""

    @abstractmethod
    def classes(self, part: str) -> list[str]:
        """Names of the class folders, sorted."""

    @abstractmethod
    def entries(self, part: str, class_name: str) -> list[str]:
        """Names of all files of a class, sorted."""

    @abstractmethod
    def read(self, part: str, class_name: str, file: str) -> bytes:
        """A file's content."""

    @abstractmethod
    def state(self, part: str, class_name: str, file: str) -> tuple[int, int]:
        """Two numbers that change when the file does."""

    def images(self, part: str, class_name: str) -> list[str]:
        """Names of the image files of a class, sorted."""
        return [file for file in self.entries(part, class_name) if _suffix(file) in _FORMATS]

    @property
    def is_jpeg(self) -> bool:
        """Whether all images are JPEGs, which are not quite the lossless originals."""
        part = "train" if self.has("train") else "test"
        return all(
            _FORMATS[_suffix(file)] == "JPEG"
            for class_name in self.classes(part)
            for file in self.images(part, class_name)
        )


class _Unpacked(ImageFolder):
    def __init__(self, root: Path) -> None:
        super().__init__(root.resolve().name or "folder", root / ".{}.pixels")
        self.root = root

    def label(self, *parts: str) -> str:
        return str(self.root.joinpath(*parts))

    def has(self, part: str) -> bool:
        return (self.root / part).is_dir()

    def classes(self, part: str) -> list[str]:
        return sorted(
            entry.name
            for entry in os.scandir(self.root / part)
            if entry.is_dir() and not entry.name.startswith(".")
        )

    def entries(self, part: str, class_name: str) -> list[str]:
        # is_file() is false for a FIFO or a device, which would block the reader.
        return sorted(
            entry.name
            for entry in os.scandir(self.root / part / class_name)
            if entry.is_file() and not entry.name.startswith(".")
        )

    def read(self, part: str, class_name: str, file: str) -> bytes:
        path = self.root / part / class_name / file
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise OSError(f"file of more than {_MAX_FILE_BYTES >> 20} MB")
        return path.read_bytes()

    def state(self, part: str, class_name: str, file: str) -> tuple[int, int]:
        status = os.stat(f"{self.root}/{part}/{class_name}/{file}")  # pathlib takes 10 times longer
        return status.st_size, status.st_mtime_ns


class _Zipped(ImageFolder):
    """At the top of the zip file or below one folder; nothing is unpacked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name, path.with_name(f".{path.name}.{{}}.pixels"))
        self.path = path
        self.archive = zipfile.ZipFile(path)
        self.tree: dict[str, dict[str, dict[str, zipfile.ZipInfo]]] = {"train": {}, "test": {}}
        for entry in self.archive.infolist():
            parts = PurePosixPath(entry.filename).parts
            if len(parts) == 4:
                parts = parts[1:]
            if len(parts) == 3 and parts[0] in self.tree and not parts[2].startswith("."):
                self.tree[parts[0]].setdefault(parts[1], {})[parts[2]] = entry

    def label(self, *parts: str) -> str:
        return "/".join([str(self.path), *parts])

    def has(self, part: str) -> bool:
        return bool(self.tree[part])

    def classes(self, part: str) -> list[str]:
        return sorted(self.tree[part])

    def entries(self, part: str, class_name: str) -> list[str]:
        return sorted(self.tree[part].get(class_name, ()))

    def read(self, part: str, class_name: str, file: str) -> bytes:
        entry = self.tree[part][class_name][file]
        if entry.file_size > _MAX_FILE_BYTES:
            raise OSError(f"file of more than {_MAX_FILE_BYTES >> 20} MB")
        return self.archive.read(entry)

    def state(self, part: str, class_name: str, file: str) -> tuple[int, int]:
        entry = self.tree[part][class_name][file]
        return entry.file_size, entry.CRC


def find_image_folder(dataset: str | None, root: Path) -> ImageFolder | None:
    """The image folder that ``root`` holds, if any.

    Looked for are ``root`` itself, a folder or a zip file; then for a named dataset
    ``root/<name>``; then zip files ``root/<name>*.zip`` (without a name: any zip file).

    Args:
        dataset: the dataset's name, or None for data of the user's own.
        root: folder or zip file.

    Raises:
        UserError: a damaged zip file, a folder that may not be read.
    """
    try:
        if root.is_file():
            return _open_zip(root)
        names = () if dataset is None else (dataset.lower(), dataset)
        for place in (root, *(root / name for name in names)):
            if (place / "train").is_dir() or (place / "test").is_dir():
                return _Unpacked(place)
        for path in sorted(root.glob("*.zip")) if root.is_dir() else ():
            if path.name.lower().startswith((dataset or "").lower()) and path.is_file():
                source = _open_zip(path)
                if source.has("train") or source.has("test"):
                    return source
    except OSError as error:
        raise UserError(f"--data_dir {root}: {error.strerror or error}") from None
    return None


def _open_zip(path: Path) -> ImageFolder:
    try:
        return _Zipped(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"--data_dir: {path} is not a readable zip file ({error})") from None


def read_image_folder(
    source: ImageFolder, train: bool, channels: int | None = None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Decode ``{train,test}/<class>/*``; labels follow the alphabetical order of the classes.

    Args:
        source: the image folder.
        train: the training part, else the test part.
        channels: 1 where grey images are needed, 3 where colour is.

    Returns:
        Pixels uint8 [N, C, H, W], labels int64 [N], names of the classes.

    Raises:
        UserError: names the first file or folder that is wrong.
    """
    part = "train" if train else "test"
    try:
        files = _list_images(source, part)
        classes = list(dict.fromkeys(class_name for class_name, _ in files))
        if not train and source.has("train"):  # labels are those the network was trained with
            trained = source.classes("train")
            for class_name in classes:
                if class_name not in trained:
                    raise UserError(
                        f"{source.label(part, class_name)}: class {class_name!r} is not among the "
                        f"{len(trained)} classes of {source.label('train')}"
                    )
            classes = trained
        if len(classes) < 2:
            raise UserError(
                f"{source.label(part)}: one class only ({classes[0]!r}), at least 2 are needed"
            )
        images = _cached(source, part, files)
    except OSError as error:
        raise UserError(f"{source.label(part)}: {error.strerror or error}") from None
    if channels is not None and images.shape[1] != channels:
        raise UserError(
            f"{source.label(part, *files[0])}: a {_WORDS[images.shape[1]]} image where "
            f"{_WORDS.get(channels, channels)} is needed"
        )
    label_of = {class_name: label for label, class_name in enumerate(classes)}
    labels = torch.tensor([label_of[class_name] for class_name, _ in files], dtype=torch.int64)
    return images, labels, tuple(classes)


def _list_images(source: ImageFolder, part: str) -> list[tuple[str, str]]:
    """(class, file) of every image, sorted."""
    if not source.has(part):
        raise UserError(f"{source.label(part)}: missing, an image folder needs train and test")
    files = []
    for class_name in source.classes(part):
        names = source.images(part, class_name)
        if not names:
            raise UserError(
                f"{source.label(part, class_name)}: no images (looked for "
                f"{', '.join(sorted(_FORMATS))})"
            )
        files += [(class_name, file) for file in names]
    if not files:
        raise UserError(
            f"{source.label(part)}: empty, expected are images in {part}/<class>/ folders"
        )
    return files


def _cached(source: ImageFolder, part: str, files: list[tuple[str, str]]) -> Tensor:
    """The pixels, from the cache if it was made from exactly these files."""
    path = source.caches.with_name(source.caches.name.format(part))
    digest = hashlib.sha256()
    for class_name, file in files:
        digest.update(repr((class_name, file, source.state(part, class_name, file))).encode())
    key = digest.hexdigest()
    images = _read_cache(path, key)
    if images is None:
        start = time.monotonic()
        images = _decode(source, part, files)
        if time.monotonic() - start > _CACHE_SECONDS:
            _write_cache(path, key, images)
    return images


def _write_cache(path: Path, key: str, images: Tensor) -> None:
    if not path.parent.stat().st_mode & 0o222:  # read-only is meant for root as well
        return
    pixels = images.numpy().tobytes()
    checksum = hashlib.sha256(pixels).hexdigest()
    header = {"files": key, "shape": list(images.shape), "pixels": checksum}
    with contextlib.suppress(UserError, OSError):  # read-only or full: decode again next time
        for leftover in path.parent.glob(f".{path.name}.tmp-*"):
            leftover.unlink()
        write_atomic(path, json.dumps(header).encode() + b"\n" + pixels)


def _read_cache(path: Path, key: str) -> Tensor | None:
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline(10_000))
            shape = header["shape"]
            if header["files"] != key or os.fstat(file.fileno()).st_size > _MAX_TOTAL_BYTES:
                return None
            pixels = bytearray(file.read())
        if hashlib.sha256(pixels).hexdigest() != header["pixels"] or len(pixels) != math.prod(
            shape
        ):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape)


def _decode(
    source: ImageFolder,
    part: str,
    files: list[tuple[str, str]],
) -> Tensor:
    """uint8 [N, C, H, W] of all files; all must agree with the first one's size and channels."""
    pixels = None
    first = source.label(part, *files[0])
    # One thread: decoding tiny images holds the GIL most of the time, and threads were slower.
    bar = tqdm(files, desc=f"reading {part} images", unit="", leave=False, disable=None, delay=1)
    for number, (class_name, file) in enumerate(bar):
        label = source.label(part, class_name, file)
        try:
            stored = io.BytesIO(source.read(part, class_name, file))
            with Image.open(stored, formats=tuple(set(_FORMATS.values()))) as image:
                colour = _channels(image, label)
                if pixels is None:
                    total = len(files) * colour * image.width * image.height
                    if total > _MAX_TOTAL_BYTES:
                        raise UserError(
                            f"{label}: {len(files)} images of {image.width}x{image.height} pixels "
                            f"need {total >> 30} GB of memory"
                        )
                    pixels = np.empty((len(files), image.height, image.width, colour), np.uint8)
                if colour != pixels.shape[3]:
                    raise UserError(
                        f"{label}: a {_WORDS[colour]} image, but {first} is a "
                        f"{_WORDS[pixels.shape[3]]} one"
                    )
                if (image.height, image.width) != pixels.shape[1:3]:
                    raise UserError(
                        f"{label}: {image.width}x{image.height} pixels, but {first} has "
                        f"{pixels.shape[2]}x{pixels.shape[1]}; all images must have one size"
                    )
                decoded = np.asarray(image.convert("L" if colour == 1 else "RGB"))
                pixels[number] = decoded[..., None] if colour == 1 else decoded
        except UnidentifiedImageError:
            raise UserError(f"{label}: not an image, or damaged") from None
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{label}: cannot be read ({error})") from None
        except Image.DecompressionBombError as error:
            raise UserError(f"{label}: {error}") from None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _channels(image: Any, label: str) -> int:
    """1 for a grey image, 3 for a colour one."""
    if image.mode in ("1", "L"):
        return 1
    if image.mode in ("RGB", "P", "CMYK", "YCbCr"):
        return 3
    if image.mode in ("LA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{label}: has transparent pixels, which have no defined colour here")
        return 1 if image.mode == "LA" else 3
    raise UserError(f"{label}: pixel format {image.mode!r}, 8-bit grey or colour is needed")

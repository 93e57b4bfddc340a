"""Datasets held in memory as one uint8 tensor, and reproducible batches of them.

Small images fit in memory (CIFAR-10's training set is 150 MB), so there are no worker processes:
the pixels move to the device once, and each batch is gathered, cropped and flipped there in a few
vectorised operations. Everything random depends on (seed, epoch, batch) alone, never on what was
drawn before, so a run resumed in the middle of an epoch sees exactly the batches it would have
seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.image_folder import find_image_folder, read_image_folder


@dataclass(frozen=True)
class _Known:
    """What a named dataset must look like: channels, side in pixels, number of classes."""

    channels: int
    side: int
    classes: int


_KNOWN = {
    "digits": _Known(1, 28, 10),
    "MNIST": _Known(1, 28, 10),
    "FashionMNIST": _Known(1, 28, 10),
    "SVHN": _Known(3, 32, 10),
    "cifar10": _Known(3, 32, 10),
    "cifar100": _Known(3, 32, 100),
}
DATASETS = (*_KNOWN, "folder")

# Seconds that a server may take to answer before a download counts as failed.
_PATIENCE = 8


# ---------------------------------------------------------------------------------------------
# Images and labels


@dataclass(frozen=True)
class ImageSet:
    """Images and labels, all in memory, on one device.

    Args:
        name: what to print and log; says so when the pixels come from an image folder.
        images: uint8 [N, C, H, W].
        labels: int64 [N], each in [0, number of classes).
        classes: the classes' names, in the order of the labels.

    Raises:
        UserError: no images, one class only by name, a label out of range.
        ValueError: another dtype or shape.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        if len(self.labels) == 0:
            raise UserError(f"dataset {self.name}: no images")
        if len(self.classes) < 2:
            raise UserError(
                f"dataset {self.name}: {len(self.classes)} class, at least 2 are needed"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"dataset {self.name}: label {low if low < 0 else high} is out of range, "
                f"{len(self.classes)} classes allow 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with pixels and labels on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def head(self, count: int) -> ImageSet:
        """The first ``count`` samples (all of them where there are fewer)."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The samples at ``indices``, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def float_images(self, index: Tensor | slice | Sequence[int] = slice(None)) -> Tensor:
        """float32 [n, C, H, W] in [0, 1]: the pixels at ``index`` divided by 255."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        return self.images[index].float().div_(255)


def split_validation(train_set: ImageSet, val_size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out ``val_size`` samples, chosen by ``seed``; both parts keep the original order.

    Returns:
        (what is left for training, the held-out samples).

    Raises:
        UserError: nothing would be left, or nothing held out.
    """
    if not 0 < val_size < len(train_set):
        raise UserError(
            f"--val_size {val_size}: {train_set.name} has {len(train_set)} training samples, "
            f"allowed are 1 to {len(train_set) - 1}"
        )
    order = torch.randperm(len(train_set), generator=_generator("validation", seed))
    held_out, kept = order[:val_size].sort().values, order[val_size:].sort().values
    return train_set.subset(kept), train_set.subset(held_out)


# ---------------------------------------------------------------------------------------------
# Batches


def _generator(*key: str | int) -> torch.Generator:
    """A CPU generator whose stream depends on ``key`` alone.

    The key is hashed because torch's Mersenne Twister takes 32 bits of its seed: sums or products
    of (seed, epoch, batch) would collide and neighbouring seeds would be related.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def random_crop_flip(
    images: Tensor, generator: torch.Generator, padding: int = 4, mirror: bool = True
) -> Tensor:
    """Shift each image by up to ``padding`` pixels (zeros come in) and mirror half of them.

    The usual CIFAR augmentation, with its own offsets for each sample. The numbers are drawn on
    the generator's device, so that a seed gives the same images on every device.

    Args:
        images: [N, C, H, W], any dtype.
        generator: source of the offsets and flips.
        padding: zeros added on every side before an H x W window is cut out, in pixels.
        mirror: False for signs, such as digits, whose mirror image is none or another one.

    Returns:
        [N, C, H, W], the same dtype, channels_last.
    """
    count, channels, height, width = images.shape
    sides = 2 * padding + 1
    offsets = torch.randint(0, sides, (2, count), generator=generator, device=generator.device)
    mirrored = torch.rand(count, generator=generator, device=generator.device) < 0.5
    top, left = offsets.to(images.device)
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()
    # All windows of all images at once, as a view: [N, top, left, H, W, C].
    sample, row, pixel, _ = padded.stride()
    windows = padded.as_strided(
        (count, sides, sides, height, width, channels), (sample, row, pixel, row, pixel, 1)
    )
    cropped = windows[torch.arange(count, device=images.device), top, left]
    if mirror:
        mirrored = mirrored.to(images.device)
        cropped[mirrored] = cropped[mirrored].flip(2)
    return cropped.permute(0, 3, 1, 2)


class Batches:
    """Batches ``(x, y, index)`` of an :class:`ImageSet`, the same for the same (seed, epoch).

    ``x`` is float32 [B, C, H, W] in [0, 1], channels_last, ``y`` int64 [B], and ``index`` int64
    [B] says which samples of the set these are; all three are on the device.

    Args:
        imageset: the data; moved to ``device`` once, here.
        batch_size: samples of a *global* batch, over all ranks.
        shuffle: a new order each epoch (else the set's own order).
        augment: random crop and horizontal flip, see :func:`random_crop_flip`.
        padding, mirror: of that function.
        seed: with the epoch and the batch's number it decides everything random.
        device: where batches live; default: where the set is.
        drop_last: leave out the last batch if it is smaller than the others.
        min_batch: a last batch smaller than this joins the one before it (BatchNorm cannot
            train on one sample).
        rank, world_size: this process gets the rank-th contiguous slice of every global batch, so
            that N processes together see what one would see. No slice is ever empty.

    Raises:
        UserError: fewer samples than a batch needs, or training data of one class only.
    """

    def __init__(
        self,
        imageset: ImageSet,
        batch_size: int,
        *,
        shuffle: bool,
        augment: bool = False,
        padding: int = 4,
        mirror: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        drop_last: bool = False,
        min_batch: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        if batch_size < world_size:
            raise UserError(f"batch size {batch_size} is less than the {world_size} processes")
        if device is not None:
            imageset = imageset.to(device)
        # Channels last in memory, as the batches: gathering them is then copying whole rows.
        pixels = imageset.images.contiguous(memory_format=torch.channels_last)
        self.imageset = replace(imageset, images=pixels)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment, self.padding, self.mirror = augment, padding, mirror
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.bounds = self._bounds(drop_last, max(min_batch, world_size))
        if shuffle:
            self._check_trainable(min_batch)

    def _bounds(self, drop_last: bool, min_batch: int) -> list[tuple[int, int]]:
        """First and last+1 position of each global batch in the epoch's order."""
        total, size = len(self.imageset), self.batch_size
        bounds = [(start, min(start + size, total)) for start in range(0, total, size)]
        start, stop = bounds[-1]
        if drop_last and stop - start < size:
            bounds.pop()
            if not bounds:
                raise UserError(
                    f"dataset {self.imageset.name}: {total} samples do not fill a batch of {size}"
                )
        elif stop - start < min_batch and len(bounds) > 1:
            bounds[-2:] = [(bounds[-2][0], stop)]
        if bounds[-1][1] - bounds[-1][0] < self.world_size:
            raise UserError(
                f"dataset {self.imageset.name}: {total} samples cannot be shared by "
                f"{self.world_size} processes"
            )
        return bounds

    def _check_trainable(self, min_batch: int) -> None:
        name, labels = self.imageset.name, self.imageset.labels
        if len(labels) < min_batch:
            raise UserError(f"dataset {name}: {len(labels)} sample, training needs {min_batch}")
        if bool((labels == labels[0]).all()):
            raise UserError(
                f"dataset {name}: all {len(labels)} training samples are of class "
                f"{self.imageset.classes[int(labels[0])]!r}, at least 2 classes are needed"
            )
        images = self.imageset.images
        if all(bool((part == images[0]).all()) for part in images.split(4096)):
            raise UserError(f"dataset {name}: all {len(labels)} training images are the same")

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.bounds)

    @property
    def num_samples(self) -> int:
        """Samples an epoch, over all ranks."""
        return self.bounds[-1][1]

    def global_size(self, batch: int) -> int:
        """Samples of global batch number ``batch``, over all ranks."""
        start, stop = self.bounds[batch]
        return stop - start

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration uses."""
        self.epoch = epoch

    def generator(self, batch: int, purpose: str = "search") -> torch.Generator:
        """A CPU generator for anything else that is random in a batch, e.g. a random start.

        It depends on (seed, epoch, batch, purpose), so it needs no saving for a resume and is the
        same in every process.
        """
        return _generator(purpose, self.seed, self.epoch, batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches ``start``, ``start + 1``, ... exactly as a full epoch would have given them."""
        epoch, device = self.epoch, self.imageset.device
        order = None
        if self.shuffle:
            generator = _generator("order", self.seed, epoch)
            order = torch.randperm(len(self.imageset), generator=generator).to(device)
        for batch in range(start, len(self.bounds)):
            first, last = self.bounds[batch]
            if order is not None:
                index = order[first:last]
            else:
                index = torch.arange(first, last, device=device)
            share = slice(
                self.rank * (last - first) // self.world_size,
                (self.rank + 1) * (last - first) // self.world_size,
            )
            if self.augment:
                # Drawn for the whole global batch: a rank's slice does not depend on their number.
                generator = _generator("augment", self.seed, epoch, batch)
                images = self._gather(index)
                images = random_crop_flip(images, generator, self.padding, self.mirror)[share]
                index = index[share]
            else:
                index = index[share]
                images = self._gather(index)
            x = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
            yield x, self.imageset.labels[index], index

    def _gather(self, index: Tensor) -> Tensor:
        """The pixels at ``index``, uint8 [n, C, H, W], channels_last."""
        pixels = self.imageset.images.permute(0, 2, 3, 1)
        rows = pixels.flatten(1).index_select(0, index)
        return rows.view(-1, *pixels.shape[1:]).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------
# Loading


def canonical_name(name: str) -> str:
    """``"CIFAR10"`` -> ``"cifar10"``, ``"mnist"`` -> ``"MNIST"``; UserError for an unknown name."""
    for known in DATASETS:
        if name.lower() == known.lower():
            return known
    raise UserError(f"--dataset {name}: unknown, allowed are {', '.join(DATASETS)}")


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str],
    train: bool,
    *,
    expected_channels: int | None = None,
) -> ImageSet:
    """The training or the test part of a dataset.

    For every name but ``digits``, an image folder ``{train,test}/<class>/*`` in ``data_dir``, in
    ``data_dir/<name>``, or inside a zip file ``data_dir/<name>*.zip`` is taken first; then
    torchvision's files in ``data_dir``; and if they are missing too, they are downloaded there.
    The classes of an image folder take turns, so that its first N images are a fair sample.

    Args:
        name: one of :data:`DATASETS`, upper or lower case.
        data_dir: folder of the data; also a zip file that holds an image folder.
        train: the training part, else the test part.
        expected_channels: 1 (grey) or 3 (colour), for ``folder``; the named datasets know theirs.

    Raises:
        UserError: one line that says what is missing or wrong and what would be right.
    """
    name = canonical_name(name)
    root = Path(data_dir).expanduser()
    if name == "digits":
        imageset = _load_digits(train)
    else:
        source = find_image_folder(None if name == "folder" else name, root)
        if source is not None:
            channels = _KNOWN[name].channels if name in _KNOWN else expected_channels
            images, labels, classes = read_image_folder(source, train, channels)
            order = classes_in_turn(labels)
            images, labels = images[order], labels[order]
            kind = "image folder, JPEG" if source.is_jpeg else "image folder"
            shown = source.name if name == "folder" else name  # 'folder' would repeat itself
            imageset = ImageSet(f"{shown} ({kind})", images, labels, classes)
        elif name == "folder":
            raise UserError(
                f"--data_dir {root}: no image folder there, expected are files "
                f"{root}/{{train,test}}/<class>/*.(png|jpg|...)"
            )
        else:
            imageset = _load_torchvision(name, root, train)
    known = _KNOWN.get(name)
    if known is not None and len(imageset.classes) != known.classes:
        raise UserError(
            f"dataset {imageset.name}: {len(imageset.classes)} classes in {root}, {name} has "
            f"{known.classes}; use --dataset folder for data of your own"
        )
    if known is not None and imageset.image_size != (known.side, known.side):
        raise UserError(
            f"dataset {imageset.name}: images of {'x'.join(map(str, imageset.image_size))} pixels "
            f"in {root}, {name} has {known.side}x{known.side}; use --dataset folder for data of "
            f"your own"
        )
    return imageset


def classes_in_turn(labels: Tensor) -> Tensor:
    """The order in which the classes take turns: the first of each, the second of each, ...

    A folder lists one class after the other, so that its first thousand images would know one or
    two classes only. Within a class the order stays.

    Args:
        labels: int64 [N].

    Returns:
        Indices int64 [N].
    """
    by_class = labels.argsort(stable=True)
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    turn = torch.empty_like(labels)
    turn[by_class] = torch.arange(len(labels)) - starts.repeat_interleave(sizes)
    return (turn * len(sizes) + labels).argsort()


def _load_digits(train: bool) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits as 28 x 28 images: 1,437 to train, 360 to test.

    The test part is 36 of each class, drawn with a fixed seed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"--dataset digits needs scikit-learn ({error})") from None

    digits = load_digits()
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    small = torch.as_tensor(digits.images, dtype=torch.float64)[:, None] * (255 / 16)
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8)
    order = torch.randperm(len(labels), generator=_generator("digits"))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[order[labels[order] == digit][:36]] = True
    chosen = ~is_test if train else is_test
    classes = tuple(str(digit) for digit in range(10))
    return ImageSet("digits", images[chosen], labels[chosen], classes)


# ---------------------------------------------------------------------------------------------
# torchvision's datasets


def _load_torchvision(name: str, root: Path, train: bool) -> ImageSet:
    """From torchvision's files in ``root``, downloaded if they are missing."""
    from torchvision import datasets

    source = {
        "MNIST": datasets.MNIST,
        "FashionMNIST": datasets.FashionMNIST,
        "SVHN": datasets.SVHN,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }[name]
    part: dict[str, Any] = {"train": train}
    if name == "SVHN":
        part = {"split": "train" if train else "test"}

    if root.exists() and not root.is_dir():
        raise UserError(f"--data_dir {root}: not a folder")
    try:
        try:
            stored = source(root, **part, download=False)
        except RuntimeError:  # torchvision's word for: files missing or not what they should be
            stored = _download(name, root, source, part)
    except UserError:
        raise
    except Exception as error:  # half-written idx, pickle or mat files fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--dataset {name}: the files in {root} cannot be read ({reason}); delete them to "
            f"have them downloaded again"
        ) from None
    images = torch.as_tensor(stored.data)
    if images.dim() == 3:  # grey, [N, H, W]
        images = images[:, None]
    elif name != "SVHN":  # [N, H, W, C]
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(stored.labels if name == "SVHN" else stored.targets)
    # torchvision's MNIST calls its classes '0 - zero'; SVHN does not name them.
    names = getattr(stored, "classes", None) or [str(digit) for digit in range(10)]
    classes = tuple(str(class_name).split(" - ")[0] for class_name in names)
    return ImageSet(name, images.contiguous(), labels.to(torch.int64), classes)


def _download(name: str, root: Path, source: Callable[..., Any], part: dict[str, Any]) -> Any:
    """torchvision's download, refused within seconds where there is no network."""
    urls = _addresses(name, source, part)
    by_hand = {
        "MNIST": "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
        "FashionMNIST": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
        "SVHN": "{train,test}_32x32.mat",
        "cifar10": "cifar-10-python.tar.gz",
        "cifar100": "cifar-100-python.tar.gz",
    }[name]
    advice = f"put {root}/{by_hand} there by hand, or take --dataset digits, which needs no files"
    with _download_lock(name, root, advice):
        failure = "" if _files_by_hand(name, root) else _unreachable(urls)
        if not failure:
            previous = socket.getdefaulttimeout()
            socket.setdefaulttimeout(20)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    return source(root, **part, download=True)
            except Exception as error:  # network, disk, archive: every kind is a failed download
                failure = " ".join(str(error).split()) or type(error).__name__
            finally:
                socket.setdefaulttimeout(previous)
    raise UserError(
        f"--dataset {name}: not in {root}, and the download failed (tried {', '.join(urls)}: "
        f"{failure}); {advice}"
    )


@contextlib.contextmanager
def _download_lock(name: str, root: Path, advice: str) -> Iterator[None]:
    """Processes of one run must not write the same files at once; the later ones find them."""
    path = root / ".download.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"--dataset {name}: not in {root}, and cannot be downloaded to there "
            f"({error.strerror}); {advice}"
        ) from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _files_by_hand(name: str, root: Path) -> bool:
    """Whether packed files lie there, which torchvision only needs to unpack."""
    patterns = {
        "MNIST": "MNIST/raw/*.gz",
        "FashionMNIST": "FashionMNIST/raw/*.gz",
        "SVHN": "*_32x32.mat",
        "cifar10": "cifar-10-python.tar.gz",
        "cifar100": "cifar-100-python.tar.gz",
    }
    return any(root.glob(patterns[name]))


def _addresses(name: str, source: Any, part: dict[str, Any]) -> list[str]:
    if name in ("MNIST", "FashionMNIST"):
        return [mirror + source.resources[0][0] for mirror in source.mirrors]
    if name == "SVHN":
        return [source.split_list[part["split"]][0]]
    return [source.url]


def _unreachable(urls: list[str]) -> str:
    """Why none of the addresses answers, or an empty string if one does.

    torchvision tries each mirror several times and each address of a host in turn, which may take
    minutes where packets vanish; this asks all at once, with one deadline for name look-up too.
    """
    seconds = _PATIENCE
    answers: queue.Queue[str] = queue.Queue()

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            answers.put("")  # it refuses to say, but there it is
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
            answers.put(" ".join(reason.split()) or type(error).__name__)
        else:
            answers.put("")

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    deadline, failure = time.monotonic() + seconds, ""
    for _ in urls:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return failure or f"no answer within {seconds:.0f} s"
        if not answer:
            return ""
        failure = failure or answer
    return failure

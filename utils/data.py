"""Images in memory as one uint8 tensor, and batches of them.

All that is random depends on (seed, epoch, batch) alone: a resumed run sees the same batches.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Images and labels on one device; UserError: no images, one class, a label out of range."""

    name: str  # what to print and log, e.g. "cifar10 (image folder)"
    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], each in [0, number of classes)
    classes: tuple[str, ...]  # in the order of the labels
    source: str = "folder"  # the --dataset it came from, one of utils.datasets.DATASETS

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8 and self.labels.dtype == torch.int64
        if not len(self):
            raise UserError(f"dataset {self.name}: no images")
        if self.num_classes < 2:
            raise UserError(f"dataset {self.name}: one class only, at least 2 are needed")
        if wrong := {*self.labels.unique().tolist()} - {*range(self.num_classes)}:
            line = f"label {min(wrong)} is out of range, there are {self.num_classes} classes"
            raise UserError(f"dataset {self.name}: {line}")

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

    def to(self, device: torch.device | str) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def head(self, count: int) -> "ImageSet":
        """The first ``count`` samples (all of them where there are fewer)."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageSet":
        """The samples at ``indices``, in that order."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def float_images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """float32 [n, C, H, W] in [0, 1], channels_last: the pixels at ``index`` over 255."""
        return floats(self.images[index])


def floats(pixels: Tensor) -> Tensor:
    """Pixels as float32, channels_last; uint8 ones over 255."""
    images = pixels.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255) if pixels.dtype == torch.uint8 else images


def fingerprint(*tensors: Tensor) -> str:
    """Hexadecimal SHA-256 of what tensors hold: values, shapes, types."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{(tensor.dtype, tuple(tensor.shape))}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def keyed_generator(*key: str | int) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone; hashed, as PyTorch takes 32 bits of a seed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def split_validation(train_set: ImageSet, val_size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """(what is left, ``val_size`` held-out samples chosen by ``seed``), both in the old order."""
    if not 0 < val_size < len(train_set):
        there = f"{train_set.name} has {len(train_set)} training samples"
        raise UserError(f"--val_size {val_size}: too many or none, {there}")
    order = torch.randperm(len(train_set), generator=keyed_generator("validation", seed))
    held_out, kept = order[:val_size].sort().values, order[val_size:].sort().values
    return train_set.subset(kept), train_set.subset(held_out)


def classes_in_turn(labels: Tensor) -> Tensor:
    """Indices int64 [N] by which classes take turns: the first of each, the second of each, ..."""
    turns: dict[int, Iterator[int]] = defaultdict(itertools.count)
    keys = [(next(turns[label]), label) for label in labels.tolist()]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))


def random_crop_hflip(
    images: Tensor, generator: torch.Generator, padding: int = 4, hflip: bool = True
) -> Tensor:
    """Shift each image by up to ``padding`` pixels (zeros come in), flip half left to right.

    [N, C, H, W] of any dtype, generator on the CPU (devices agree) -> the same, in channels_last.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    if hflip:
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *[padding] * 4))
    window = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]
    return padded[tuple(index.to(images.device) for index in window)].permute(0, 3, 1, 2)


@dataclass(eq=False)
class Batches:
    """Batches ``(x, y, index)`` of an :class:`ImageSet`, the same for the same (seed, epoch).

    ``x`` is float32 [B, C, H, W] in [0, 1], channels_last, ``y`` int64 [B], and ``index`` int64
    [B] says which samples these are. UserError: fewer samples than processes, nothing to learn.
    """

    imageset: ImageSet
    # Samples of all ranks together. A last batch of one sample (too few for BatchNorm) or of
    # fewer than there are ranks joins the one before it.
    batch_size: int
    _: KW_ONLY
    shuffle: bool  # a new order each epoch, to train; else the set's own order
    augment: bool = False  # by random_crop_hflip
    padding: int = 4
    hflip: bool = True
    seed: int = 0
    epoch: int = 0
    # This process gets the rank-th slice of every batch, so that N see what one would see.
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        data, size, total = self.imageset, self.batch_size, len(self.imageset)
        if min(size, total) < self.world_size:
            given = f"batch size {size}, {total} samples of {data.name}"
            raise UserError(f"{given}: too few for {self.world_size} processes")
        self.bounds = [(at, min(at + size, total)) for at in range(0, total, size)]
        if 0 < total % size < max(2, self.world_size) and len(self) > 1:
            self.bounds[-2:] = [(self.bounds[-2][0], total)]
        for of, what in ((data.labels, "of one class"), (data.images, "the same image")):
            if self.shuffle and all(bool((part == of[0]).all()) for part in of.split(4096)):
                raise UserError(f"dataset {data.name}: all {total} training samples are {what}")
        # Channels last in memory, as the batches: gathering them is then copying whole rows.
        self.pixels = data.images.contiguous(memory_format=torch.channels_last)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.bounds)

    def global_size(self, batch: int) -> int:
        """Samples of global batch number ``batch``, over all ranks."""
        return self.bounds[batch][1] - self.bounds[batch][0]

    def share(self, batch: int) -> slice:
        """This rank's part of a global batch."""
        size = self.global_size(batch)
        return slice(*((self.rank + i) * size // self.world_size for i in (0, 1)))

    def generator(self, batch: int, purpose: str) -> torch.Generator:
        """For anything else that is random in a batch; on the CPU, the same on every rank."""
        return keyed_generator(purpose, self.seed, self.epoch, batch)

    def iterate(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches ``start``, ``start + 1``, ... exactly as a full epoch would have given them."""
        images, labels = self.pixels, self.imageset.labels
        generator, total = keyed_generator("order", self.seed, self.epoch), len(labels)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        order = order.to(labels.device)
        for batch in range(start, len(self)):
            index, share = order[slice(*self.bounds[batch])], self.share(batch)
            pixels = images[index]
            if self.augment:  # before the share is taken: a crop does not depend on the ranks
                generator = self.generator(batch, "augment")
                pixels = random_crop_hflip(pixels, generator, self.padding, self.hflip)
            yield floats(pixels[share]), labels[index[share]], index[share]

    __iter__ = iterate

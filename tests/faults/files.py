"""Ways to break a checkpoint file.

A mutation takes the bytes of a sound checkpoint and a random generator and returns other bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch


class Command:
    """Pickles to a call that leaves a file behind: proof that something was executed."""

    def __init__(self, evidence: str) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.evidence}",)


def saved(content: Any, legacy: bool = False, protocol: int = 2) -> bytes:
    """What torch.save writes for ``content``."""
    stream = io.BytesIO()
    zipped = not legacy
    torch.save(content, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    return _flip(data, draw, range(len(data)))


def flip_head(data: bytes, draw: random.Random) -> bytes:
    """Bits of the description rather than of the weights."""
    return _flip(data, draw, range(min(len(data), 2000)))


def flip_tail(data: bytes, draw: random.Random) -> bytes:
    """Bits of the zip file's directory."""
    return _flip(data, draw, range(max(0, len(data) - 1500), len(data)))


def _flip(data: bytes, draw: random.Random, places: range) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        damaged[draw.choice(places)] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def cut_out(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.choice((1, 8, 64, 4096)) :]


def insert(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + draw.randbytes(draw.choice((1, 8, 64, 4096))) + data[start:]


def overwrite(data: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(data)), draw.choice((8, 512, 4096))
    return data[:start] + bytes(size) + data[start + size :]


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.choice((1, 100, 70000)))


def shuffle_blocks(data: bytes, draw: random.Random) -> bytes:
    """As a disk would leave it that wrote some blocks and not others."""
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    i, j = draw.randrange(len(blocks)), draw.randrange(len(blocks))
    blocks[i], blocks[j] = blocks[j], blocks[i]
    return b"".join(blocks)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip_bits, flip_head, flip_tail, truncate, cut_out, insert, overwrite, append),
    shuffle_blocks,
)


def rewritten_zip(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The zip file with every entry passed through ``change(name, content)``; checksums fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def lying_sizes(data: bytes) -> bytes:
    """Zip directory that claims a far larger entry than the file holds."""
    damaged = bytearray(data)
    struct.pack_into("<II", damaged, damaged.find(b"PK\x01\x02") + 20, 0x7FFFFFFF, 0x7FFFFFFF)
    return bytes(damaged)


def crafted(body: bytes) -> bytes:
    """A zip checkpoint whose description is ``body`` and whose one storage holds four floats."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        target.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        target.writestr("archive/version", "3\n")
        target.writestr("archive/data/0", bytes(16))
    return out.getvalue()


def crafted_state(
    storage: int = 4, size: int = 4, stride: int = 1, offset: int = 0, key: str = "0"
) -> bytes:
    """{"state_dict": {"w": tensor}}, the tensor with whatever sizes one likes."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        encoded = pickle.encode_long(value)
        return b"\x8a" + bytes([len(encoded)]) + encoded

    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    reference += number(storage) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + number(offset)
    tensor += b"(" + number(size) + b"t(" + number(stride) + b"t\x89ccollections\nOrderedDict\n)RtR"
    return crafted(b"}" + text("state_dict") + b"}" + text("w") + tensor + b"ss")

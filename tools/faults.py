"""Ways to break a checkpoint file, shared by test_runs.py and tools/torture.py.

Each mutation takes the bytes of a sound checkpoint and a random generator and returns other bytes.
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

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Command:
    """Pickles to a call that leaves a file behind: proof that something was executed."""

    def __init__(self, evidence: str) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.evidence}",)


def saved(content: Any, legacy: bool = False) -> bytes:
    """What torch.save writes for ``content``."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def with_command(content: dict[str, Any], evidence: str, legacy: bool = False) -> bytes:
    """A checkpoint that runs a command when it is unpickled."""
    return saved({**content, "args": Command(evidence)}, legacy)


def plain_pickle(evidence: str, protocol: int = 4) -> bytes:
    """A pickle outside torch's formats that runs a command."""
    return pickle.dumps(Command(evidence), protocol)


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def flip_head(data: bytes, draw: random.Random) -> bytes:
    """Bits of the description rather than of the weights."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 2, 5))):
        damaged[draw.randrange(min(len(data), 2000))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def flip_tail(data: bytes, draw: random.Random) -> bytes:
    """Bits of the zip file's directory."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 2, 5))):
        damaged[-1 - draw.randrange(min(len(data), 1500))] ^= 1 << draw.randrange(8)
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
    flip_bits,
    flip_head,
    flip_tail,
    truncate,
    cut_out,
    insert,
    overwrite,
    append,
    shuffle_blocks,
)


def rewritten_zip(
    data: bytes, change: Callable[[str, bytes], bytes | None], **options: Any
) -> bytes:
    """The zip file with every entry passed through ``change(name, content)``; checksums fit."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(out, "w", **options) as target,
    ):
        for entry in source.infolist():
            content = change(entry.filename, source.read(entry))
            if content is not None:
                target.writestr(entry.filename, content)
    return out.getvalue()


def zip_bomb(data: bytes, megabytes: int = 200) -> bytes:
    """Small on the disk, large when unpacked."""

    def blow_up(name: str, content: bytes) -> bytes:
        return bytes(megabytes << 20) if name.endswith("/data/0") else content

    return rewritten_zip(data, blow_up, compression=zipfile.ZIP_DEFLATED)


def lying_sizes(data: bytes) -> bytes:
    """Zip directory that claims a far larger entry than the file holds."""
    damaged = bytearray(data)
    position = damaged.find(b"PK\x01\x02")
    struct.pack_into("<II", damaged, position + 20, 0x7FFFFFFF, 0x7FFFFFFF)
    return bytes(damaged)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tensor_opcodes(
    *,
    storage: int = 4,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    key: str = "0",
) -> bytes:
    """The pickle opcodes of one float tensor, with whatever sizes one likes."""
    reference = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu")
    reference += _number(storage) + b"tQ"
    sizes = b"(" + b"".join(map(_number, size)) + b"t"
    strides = b"(" + b"".join(map(_number, stride)) + b"t"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + reference + _number(offset) + sizes + strides + b"\x89" + hooks + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def crafted(body: bytes, storage: bytes = bytes(16)) -> bytes:
    """A zip checkpoint whose description is ``body`` and whose one storage holds ``storage``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        target.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        target.writestr("archive/version", "3\n")
        target.writestr("archive/data/0", storage)
    return out.getvalue()


def crafted_state(tensor: bytes, storage: bytes = bytes(16)) -> bytes:
    """{"state_dict": {"w": tensor}} with hand-written opcodes for the tensor."""
    return crafted(b"}" + _text("state_dict") + b"}" + _text("w") + tensor + b"ss", storage)


def crafted_legacy(body: bytes, keys: list[str], storages: bytes) -> bytes:
    """The old format with a hand-written description."""
    head = b"".join(pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {"little_endian": True}))
    return head + b"\x80\x02" + body + b"." + pickle.dumps(keys, 2) + storages


def nested_key() -> bytes:
    """{x: 1} with x = (x', x'), x' = (x'', x''), ...: hashing x takes 2**60 steps."""
    body = b"}" + _text("a") + b"q\x00"
    for level in range(60):
        body += b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return crafted(body + b"K\x01s")


def deep_tuple(depth: int = 200_000) -> bytes:
    return crafted(b"}" + _text("state_dict") + b")" + b"\x85" * depth + b"s")


def self_containing() -> bytes:
    return crafted(b"}q\x00" + _text("state_dict") + b"h\x00s")


def many_views(count: int = 2000, numbers: int = 100_000) -> bytes:
    """Tensors that all show the same storage: little on disk, much once copied."""
    tensor = tensor_opcodes(storage=numbers, size=(numbers,))
    items = b"".join(_text(f"w{i}") + tensor for i in range(count))
    return crafted(b"}" + _text("state_dict") + b"}(" + items + b"us", storage=bytes(4 * numbers))

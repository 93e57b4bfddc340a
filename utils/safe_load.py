"""Checkpoint files from strangers: read once, verified completely, and only then handed to torch.

``torch.load(weights_only=True)`` runs no code from the file, and it is what reads the file here in
the end. But it checks no CRC (a flipped bit comes through as a weight of 5e37), it allocates what
the file claims before looking whether the file holds it, and it reports damage in many ways. So the
bytes are read into memory once, and a small abstract machine walks through the pickle first: it
builds nothing, allows only tensors, containers and plain values, and compares every declared
storage with the bytes that are there. What passes is a file that ``torch.save`` could have written.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import stat
import struct
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError

# Large enough for a WRN-28-10 with Adam's state (0.5 GB), small enough to fit in memory twice.
MAX_FILE_BYTES = 4 << 30
_MAX_PICKLE_BYTES = 64 << 20
_MAX_DEPTH = 32
_MAX_DIMENSIONS = 8
# Tied weights are stored once and counted twice; far beyond that a small file claims much memory.
_MAX_SHARING = 8

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP_MAGIC = b"PK\x03\x04"

_ITEM_BYTES = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_SIZE = "torch Size"
_CALLABLE = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, _SIZE}


class Refused(Exception):
    """Why a file is not loaded; the caller adds which file."""


def shown(text: object, limit: int = 60) -> str:
    """Text from a file, safe to print: no control characters, not long."""
    plain = ascii(str(text)[: limit + 1])[1:-1]
    return plain if len(plain) <= limit else plain[:limit] + "..."


# ---------------------------------------------------------------------------------------------
# The abstract machine


@dataclass
class _Global:
    name: str


@dataclass
class _Storage:
    key: str
    item_bytes: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.item_bytes


class _Dict:
    pass


class _Tensor:
    pass


@dataclass
class _Claims:
    """What a pickle says it needs."""

    storages: dict[str, _Storage] = field(default_factory=dict)
    tensor_bytes: int = 0


class _Mark:
    pass


def _walk(stream: BinaryIO, claims: _Claims) -> Any:
    """Walk through one pickle and return an abstract picture of its result.

    Strings, numbers, tuples and lists stand for themselves; dicts and tensors are placeholders.

    Raises:
        Refused: anything but tensors, containers and plain values, or claims that do not add up.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        items = []
        while not isinstance(item := stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def set_items(items: list[Any]) -> None:
        # A key is hashed when the file is loaded: a nested tuple could take forever.
        if not isinstance(stack[-1], _Dict) or len(items) % 2:
            raise Refused("damaged (dict)")
        if not all(key is None or type(key) in (str, int, float, bool) for key in items[::2]):
            raise Refused("a dict's key is neither text nor a number")

    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "PROTO":
            if argument != 2:
                raise Refused(f"pickle protocol {argument}, torch.save writes 2")
        elif name == "STOP":
            return stack.pop()
        elif name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            if name != "GLOBAL":
                raise Refused("holds objects that torch.save(state_dict) does not write")
            if argument not in _CALLABLE and argument not in _ITEM_BYTES:
                raise Refused(
                    f"wants to run or build {shown(argument.replace(' ', '.'))}; a checkpoint may "
                    f"hold tensors and plain values only, nothing of it was run"
                )
            stack.append(_Global(argument))
        elif name in ("MARK",):
            stack.append(_Mark())
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": _Dict()}[name])
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
            stack.append(argument)
        elif name == "SHORT_BINSTRING":
            stack.append(str(argument))
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            if len(stack) < size:
                raise Refused("damaged (tuple)")
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else to_mark()
            if type(stack[-1]) is not list:
                raise Refused("damaged (list)")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else to_mark()
            set_items(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "BINPERSID":
            stack.append(_claim_storage(stack.pop(), claims))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments, claims))
        elif name == "BUILD":  # only what a state_dict's _metadata needs
            state = stack.pop()
            if not isinstance(state, _Dict) or not isinstance(stack[-1], _Dict):
                raise Refused("holds objects that torch.save(state_dict) does not write")
        else:
            raise Refused(f"holds objects that torch.save(state_dict) does not write ({name})")
    raise Refused("truncated (its pickle has no end)")


def _claim_storage(claim: Any, claims: _Claims) -> _Storage:
    """A reference to a block of numbers: ("storage", type, key, location, count[, None])."""
    if not isinstance(claim, tuple) or not 5 <= len(claim) <= 6 or claim[0] != "storage":
        raise Refused("damaged (reference to a storage)")
    kind, key, location, count = claim[1:5]
    if (
        not isinstance(kind, _Global)
        or kind.name not in _ITEM_BYTES
        or type(key) is not str
        or type(location) is not str
        or type(count) is not int
        or count < 0
        or claim[5:] not in ((), (None,))
    ):
        raise Refused("damaged (reference to a storage)")
    storage = _Storage(key, _ITEM_BYTES[kind.name], count)
    if claims.storages.setdefault(key, storage) != storage:
        raise Refused("damaged (one storage claimed with two sizes)")
    return storage


def _call(function: Any, arguments: Any, claims: _Claims) -> Any:
    if not isinstance(function, _Global) or type(arguments) is not tuple:
        raise Refused("damaged (call)")
    if function.name == _ORDERED_DICT and arguments == ():
        return _Dict()
    if function.name == _SIZE and len(arguments) == 1 and _whole_numbers(arguments[0]):
        return arguments[0]
    if (
        function.name == _REBUILD_PARAMETER
        and len(arguments) == 3
        and isinstance(arguments[0], _Tensor)
        and type(arguments[1]) is bool
        and isinstance(arguments[2], _Dict)
    ):
        return arguments[0]
    if function.name == _REBUILD_TENSOR and len(arguments) == 6:
        storage, offset, size, stride, requires_grad, hooks = arguments
        if (
            isinstance(storage, _Storage)
            and _whole_numbers((offset,))
            and _whole_numbers(size)
            and _whole_numbers(stride)
            and len(size) == len(stride) <= _MAX_DIMENSIONS
            and type(requires_grad) is bool
            and isinstance(hooks, _Dict)
        ):
            count = math.prod(size)
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            # torch would enlarge the storage with whatever lies in memory, or repeat its numbers.
            if count > storage.count or (count and last >= storage.count):
                raise Refused(f"a tensor of {count} numbers claims a storage of {storage.count}")
            claims.tensor_bytes += count * storage.item_bytes
            return _Tensor()
    raise Refused("damaged (a tensor's description)")


def _whole_numbers(values: Any) -> bool:
    return type(values) is tuple and all(
        type(value) is int and 0 <= value < 1 << 62 for value in values
    )


# ---------------------------------------------------------------------------------------------
# The two file formats


def _verified_zip(raw: bytes) -> io.BytesIO:
    """The checkpoint in torch's zip format, rebuilt from its verified parts.

    Rebuilt, because a crafted zip file can look one way to Python's zipfile and another to torch's
    reader; torch gets to see only what was verified here.
    """
    archive = zipfile.ZipFile(io.BytesIO(raw))
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise Refused("damaged (a zip file with two entries of one name)")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise Refused("a zip file with compressed entries, which torch.save does not write")
    total = sum(entry.file_size for entry in entries.values())
    if total > len(raw):
        raise Refused(f"its entries claim {total} bytes, the file has {len(raw)}")
    prefixes = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
    if len(prefixes) != 1 or prefixes[0].count("/") != 1:
        raise Refused("a zip file, but not a PyTorch checkpoint")
    prefix = prefixes[0]
    if prefix + "constants.pkl" in entries:
        raise Refused("a TorchScript program, not a checkpoint")
    if prefix + "byteorder" in entries and archive.read(prefix + "byteorder") != b"little":
        raise Refused("written on a machine of another byte order")
    if entries[prefix + "data.pkl"].file_size > _MAX_PICKLE_BYTES:
        raise Refused(f"its description is larger than {_MAX_PICKLE_BYTES >> 20} MB")
    description = archive.read(prefix + "data.pkl")
    claims = _Claims()
    _require_dict(_walk(io.BytesIO(description), claims))
    _check_sharing(claims)
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_STORED) as target:
        target.writestr("archive/data.pkl", description)
        target.writestr("archive/version", "3\n")
        target.writestr("archive/byteorder", "little")
        for storage in claims.storages.values():
            entry = entries.pop(f"{prefix}data/{storage.key}", None)
            if entry is None or entry.file_size != storage.nbytes:
                held = 0 if entry is None else entry.file_size
                raise Refused(f"a tensor claims {storage.nbytes} bytes, the file holds {held}")
            target.writestr(f"archive/data/{storage.key}", archive.read(entry))
    # A damaged entry that nothing refers to is still a damaged file.
    damaged = archive.testzip()
    if damaged is not None:
        raise Refused(f"damaged (checksum of {shown(damaged)})")
    rebuilt.seek(0)
    return rebuilt


def _verified_legacy(raw: bytes) -> io.BytesIO:
    """The checkpoint in the format of PyTorch before 1.6: five pickles, then the raw storages."""
    stream = io.BytesIO(raw)
    claims, nothing = _Claims(), _Claims()
    _walk(stream, nothing)  # the magic number, compared by the caller
    if _walk(stream, nothing) != 1001:
        raise Refused("an unknown version of PyTorch's old format")
    _walk(stream, nothing)  # sizes of C types on the machine that wrote it
    _require_dict(_walk(stream, claims))
    keys = _walk(stream, nothing)
    if nothing.storages or stream.tell() > _MAX_PICKLE_BYTES:
        raise Refused("damaged (description)")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise Refused("damaged (list of storages)")
    if len(keys) != len(set(keys)) or set(keys) != set(claims.storages):
        raise Refused("damaged (its storages are not those its tensors use)")
    _check_sharing(claims)
    position = stream.tell()
    for key in keys:
        storage = claims.storages[key]
        header = raw[position : position + 8]
        position += 8 + storage.nbytes
        if len(header) < 8 or position > len(raw):
            raise Refused(f"truncated (a tensor of {storage.nbytes} bytes is cut off)")
        if struct.unpack("<q", header)[0] != storage.count:
            raise Refused("damaged (size of a storage)")
    if position != len(raw):
        raise Refused(f"damaged ({len(raw) - position} bytes too many)")
    stream.seek(0)
    return stream


def _require_dict(result: Any) -> None:
    if not isinstance(result, _Dict):
        kind = "tensor" if isinstance(result, _Tensor) else type(result).__name__
        raise Refused(f"holds a {kind}, a checkpoint is a dict with 'state_dict'")


def _check_sharing(claims: _Claims) -> None:
    stored = sum(storage.nbytes for storage in claims.storages.values())
    if claims.tensor_bytes > _MAX_SHARING * stored:
        raise Refused(f"its tensors claim {claims.tensor_bytes} bytes, the file holds {stored}")


# ---------------------------------------------------------------------------------------------
# From a path to plain values


def read_regular_file(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of a regular file, through one descriptor; never waits for a FIFO or a device.

    Raises:
        Refused: not a regular file, empty, too large, missing or not allowed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Refused((error.strerror or str(error)).lower()) from None
    except ValueError:  # a null byte in the name
        raise Refused("no such file") from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise Refused("a directory, not a checkpoint file")
        if not stat.S_ISREG(status.st_mode):
            raise Refused("not a regular file")
        if status.st_size > limit:
            raise Refused(f"{status.st_size} bytes, more than the {limit >> 20} MB allowed")
        with open(descriptor, "rb", closefd=False) as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise Refused((error.strerror or str(error)).lower()) from None
    finally:
        os.close(descriptor)
    if not raw:
        raise Refused("an empty file")
    if len(raw) > limit:
        raise Refused(f"more than the {limit >> 20} MB allowed")
    return raw


def verified(raw: bytes) -> io.BytesIO:
    """The bytes of a checkpoint file, verified, as a stream for ``torch.load``.

    Raises:
        Refused: says what is wrong.
    """
    try:
        if raw.startswith(_ZIP_MAGIC):
            return _verified_zip(raw)
        if raw.startswith(_LEGACY_MAGIC):
            return _verified_legacy(raw)
    except (
        zipfile.BadZipFile,
        ValueError,  # includes UnicodeDecodeError
        LookupError,
        EOFError,
        NotImplementedError,
        struct.error,
        OSError,
        OverflowError,
        RuntimeError,  # an encrypted entry
    ) as error:
        raise Refused(f"damaged or truncated ({shown(error)})") from None
    if _LEGACY_MAGIC.startswith(raw) or _ZIP_MAGIC.startswith(raw):
        raise Refused("truncated")
    if raw.startswith(b"version https://git-lfs"):
        raise Refused("a Git LFS pointer, fetch the file itself with 'git lfs pull'")
    if raw.startswith(b"\x80"):
        raise Refused("a pickle that torch.save did not write, or damaged; nothing of it was run")
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in raw[:512]):
        raise Refused("a text file, not a PyTorch checkpoint")
    raise Refused("not a PyTorch checkpoint, or damaged")


def load_plain(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The dict in a checkpoint file: plain dicts, lists, tuples, scalars and CPU tensors.

    Raises:
        UserError: one line, which file and what is wrong with it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a damaged file makes the libraries wonder about
            loaded = _loaded(verified(read_regular_file(path)))
        plain = _plain(loaded, {}, 0)
        if not isinstance(plain, dict):
            raise Refused("a checkpoint is a dict with 'state_dict'")
        return plain
    except Refused as refused:
        raise UserError(f"{Path(path)}: {refused}") from None
    except MemoryError:
        raise UserError(f"{Path(path)}: not enough memory to load it") from None


def _loaded(stream: BinaryIO) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # it promises no kind of error for a bad file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refused(f"damaged ({shown(reason)})") from None


def _plain(value: Any, done: dict[int, Any], depth: int) -> Any:
    """A copy with plain types: whatever else hung on the containers stays behind.

    ``done`` makes it linear for values that occur many times.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if id(value) in done:
        if done[id(value)] is _Mark:
            raise Refused("holds a value that contains itself")
        return done[id(value)]
    if depth > _MAX_DEPTH:
        raise Refused(f"nested more than {_MAX_DEPTH} deep")
    done[id(value)] = _Mark
    if isinstance(value, Tensor):
        result: Any = value.detach()
        if result.layout != torch.strided or result.device.type != "cpu":
            raise Refused("holds a tensor that is not dense")
    elif isinstance(value, dict):
        items = OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value)
        result = {key: _plain(item, done, depth + 1) for key, item in items}
    elif isinstance(value, list):
        result = [_plain(item, done, depth + 1) for item in value]
    elif isinstance(value, tuple):
        result = tuple(_plain(item, done, depth + 1) for item in value)
    else:
        raise Refused(f"holds a {shown(type(value).__name__)}")
    done[id(value)] = result
    return result

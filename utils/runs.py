"""Run folders and checkpoints: written whole or not at all, read with suspicion.

A run folder holds what the original's did (``log.txt``, ``checkpoint.pth.tar``,
``model_best.pth.tar``, ``epochN.pth.tar``, ``scalars/``) and JSON files beside it. Whatever kills
the process, each of these names stands for a complete file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models import build_model, infer_arch
from utils.errors import UserError
from utils.safe_load import Refused, load_plain, shown, verified

LOG_COLUMNS = (
    "Learning Rate",
    "Train Loss",
    "Valid Loss",
    "Train Acc.",
    "Valid Acc.",
    "loss normal",
    "loss gradient",
)
Fields = TypeVar("Fields")
CHECKPOINT = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"
LOG = "log.txt"

# Key of a checkpoint, its types, and what to say when it has another.
_CHECKPOINT_TYPES = (
    ("epoch", (int,), "a number is"),
    ("acc", (int, float), "a number is"),
    ("best_acc", (int, float), "a number is"),
    ("args", (dict, type(None)), "flags by name are"),
)

_TEMPORARY = re.compile(r"\..+\.tmp-\d+")
_CHECKPOINT_NAME = re.compile(r"(checkpoint|model_best|epoch\d+)\.pth\.tar")


# ---------------------------------------------------------------------------------------------
# Writing


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that its name never stands for half of it, not even after a power cut.

    Raises:
        UserError: disk full, no permission, read-only, ...; what was there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(_write_failure(path, error, len(data))) from None


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse to sync a folder; the file itself is safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_failure(path: Path, error: OSError, needed: int) -> str:
    reason = (error.strerror or str(error)).lower()
    line = f"cannot write {path}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line += f" ({needed / 2**20:.1f} MB needed)"
    previous = path.parent / CHECKPOINT
    if previous.is_file():
        line += f"; the last good checkpoint is intact, go on with --resume {previous}"
    return line


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Save a checkpoint atomically; tensors and plain values only, so that it can be loaded again.

    Raises:
        UserError: it cannot be written; an older file of this name is untouched.
        TypeError: the checkpoint holds something :func:`load_checkpoint` would refuse.
    """
    write_atomic(path, _serialized(checkpoint))


def _serialized(checkpoint: Mapping[str, Any]) -> bytes:
    # In memory first: torch's own writer reports a full disk as an internal error.
    stream = io.BytesIO()
    torch.save(dict(checkpoint), stream)
    data = stream.getvalue()
    try:
        verified(data)
    except Refused as refused:
        raise TypeError(f"checkpoint could not be loaded again: {refused}") from None
    return data


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None


class RunFolder:
    """The folder of one training run, locked against a second one.

    The lock is the kernel's (flock): it goes with the process, however that ends, so there is no
    stale lock to clear away. Use as a context manager, or call :meth:`close`.

    Args:
        path: created if missing.
        resume_from: checkpoint to continue from; if it lies in this folder, the folder may hold a
            run, namely that one.
        overwrite: remove the run that the folder holds.

    Raises:
        UserError: not a folder, not writable, in use, or holds another run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_from: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(
                self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
            )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"run folder {self.path}: cannot be written ({reason})") from None
        try:
            self._acquire()
            for leftover in self.path.iterdir():
                if _TEMPORARY.fullmatch(leftover.name) and leftover.is_file():
                    leftover.unlink()
            inside = resume_from is not None and self._holds(Path(resume_from))
            if overwrite and not inside:
                self._clear()
            elif not inside and self._has_run():
                resume = f"go on with --resume {self.checkpoint}, "
                raise UserError(
                    f"run folder {self.path} holds a run; "
                    f"{resume if self.checkpoint.exists() else ''}start again with --overwrite, "
                    f"or choose another --save_dir"
                )
        except OSError as error:
            self.close()
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"run folder {self.path}: cannot be used ({reason})") from None
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            owner = f" (process {owner})" if owner.isdigit() else ""
            raise UserError(f"run folder {self.path} is in use by another run{owner}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return  # a file system without locks (some network shares): better unlocked than not
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _holds(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.path.resolve()

    def _has_run(self) -> bool:
        # A log without rows is that of a run that was stopped before it had anything to lose.
        if any(_CHECKPOINT_NAME.fullmatch(entry.name) for entry in self.path.iterdir()):
            return True
        return (self.path / LOG).exists() and bool(_read_rows(self.path / LOG)[1])

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if _CHECKPOINT_NAME.fullmatch(entry.name) or entry.name == LOG:
                entry.unlink()
        shutil.rmtree(self.scalars, ignore_errors=True)

    @property
    def scalars(self) -> Path:
        """Where TensorBoard's event files go."""
        return self.path / "scalars"

    @property
    def checkpoint(self) -> Path:
        """The newest state of the run."""
        return self.path / CHECKPOINT

    @property
    def best(self) -> Path:
        """The best network so far."""
        return self.path / BEST

    def save(self, checkpoint: Mapping[str, Any], *names: str) -> None:
        """Save one checkpoint under each of the names (default ``checkpoint.pth.tar``).

        Raises:
            UserError: it cannot be written; older files are untouched.
        """
        data = _serialized(checkpoint)
        for name in names or (CHECKPOINT,):
            write_atomic(self.path / name, data)

    def save_json(self, name: str, content: Any) -> None:
        """Write ``content`` as JSON; paths and other strangers become text.

        Raises:
            UserError: it cannot be written.
        """
        text = json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
        write_atomic(self.path / name, text.encode())

    def log(self, extra_columns: Sequence[str] = (), keep: int = 0) -> Log:
        """``log.txt`` with the published columns and then ``extra_columns``; see :class:`Log`."""
        return Log(self.path / LOG, (*LOG_COLUMNS, *extra_columns), keep)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------
# log.txt


class Log:
    """A tab-separated table with a header and a row per epoch.

    Args:
        path: the file.
        columns: names of the columns.
        keep: number of rows to keep from a file that is there: the epochs before the resumed one.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str], keep: int = 0) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        rows: list[list[str]] = []
        if keep and self.path.exists():
            old, kept = _read_rows(self.path)
            place = {name: i for i, name in enumerate(old)}
            rows = [
                [row[place[name]] if name in place else "nan" for name in self.columns]
                for row in kept[:keep]
            ]
        table = [self.columns, *rows]
        write_atomic(self.path, "".join("\t".join(row) + "\n" for row in table).encode())

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row and bring it to the disk; a column without a value gets ``nan``.

        Raises:
            UserError: it cannot be written; the rows before it are untouched.
            KeyError: a value for a column that does not exist.
        """
        unknown = set(row) - set(self.columns)
        if unknown:
            raise KeyError(f"no such columns: {sorted(unknown)}")
        line = "\t".join(f"{row.get(name, math.nan):.8g}" for name in self.columns) + "\n"
        try:
            with open(self.path, "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    file.write(line.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise UserError(_write_failure(self.path, error, len(line))) from None


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and complete rows; a last line cut off by a kill is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    lines = [line.split("\t") for line in text.split("\n")[:-1]]
    header = lines[0] if lines else []
    return header, [line for line in lines[1:] if len(line) == len(header)]


def read_log(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """The columns of a ``log.txt`` by name.

    Raises:
        UserError: it cannot be read, or a cell is not a number.
    """
    header, rows = _read_rows(Path(path))
    try:
        return {name: [float(row[i]) for row in rows] for i, name in enumerate(header)}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------
# Reading checkpoints


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a checkpoint file, on the CPU, verified.

    Reads what this code writes and the original's files (PyTorch's old format, CUDA tensors,
    ``module.`` before each name). Nothing in the file is executed.

    Returns:
        A dict of plain values and tensors; ``["state_dict"]`` has finite tensors by name, without
        ``module.``. ``epoch``, ``acc``, ``best_acc`` and ``arch``, where present, have the right
        types.

    Raises:
        UserError: one line, which file and what is wrong with it.
    """
    checkpoint = load_plain(path)
    state = checkpoint.get("state_dict")
    if "state_dict" not in checkpoint:
        keys = ", ".join(shown(key, 20) for key in list(checkpoint)[:5]) or "nothing"
        raise UserError(f"{path}: no 'state_dict' in it (it holds {keys})")
    _check_state(state, path)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    checkpoint["state_dict"] = state
    for key, kinds, needed in _CHECKPOINT_TYPES:
        if key in checkpoint and type(checkpoint[key]) not in kinds:
            raise UserError(f"{path}: '{key}' is {shown(checkpoint[key])}, {needed} needed")
    if checkpoint.get("epoch", 0) < 0:
        raise UserError(f"{path}: 'epoch' is {checkpoint['epoch']}")
    arch = checkpoint.get("arch")
    if arch is not None:
        if not isinstance(arch, dict) or not isinstance(arch.get("name"), str):
            raise UserError(f"{path}: 'arch' does not describe a network")
        _check_arch(path, arch, state)
    return checkpoint


def _check_state(state: Any, path: str | os.PathLike[str]) -> None:
    """A network's weights are finite tensors by name."""
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: its weights are not a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: its weights hold {shown(name)}, which is not a tensor")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{path}: weights are not finite ({bad} of {tensor.numel()} in {shown(name)} are "
                f"NaN or infinite)"
            )


def _check_arch(path: str | os.PathLike[str], arch: dict[str, Any], state: dict[str, Any]) -> None:
    """No network is built from a description that its own weights cannot fill."""
    for key, value in arch.items():
        if not isinstance(key, str) or type(value) not in (str, int, float, bool, type(None)):
            raise UserError(f"{path}: 'arch' holds {shown(key)} = {shown(value)}")
        largest = len(state) + 4 if key == "depth" else 1 << 16
        if type(value) in (int, float) and not 0 <= value <= largest:
            raise UserError(f"{path}: 'arch' holds {shown(key)} = {shown(value)}")


def load_network(
    path: str | os.PathLike[str],
    arch_override: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on ``device``, and the checkpoint itself.

    The architecture is the one stored in the checkpoint; if there is none (the original's files),
    it is inferred from the names and shapes of the weights.

    Args:
        path: the checkpoint file.
        arch_override: options that the user asked for; they complete what the file says and must
            not contradict it (dropout aside, which evaluation does not use).
        device: where the network goes.

    Raises:
        UserError: the file is refused, or holds another network; nothing was built then.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint["state_dict"]
    asked = {key: value for key, value in (arch_override or {}).items() if value is not None}
    inferred = infer_arch(state)
    stored = checkpoint.get("arch") or inferred
    if stored is None and "name" not in asked:
        names = ", ".join(shown(name, 30) for name in list(state)[:3])
        raise UserError(f"{path}: not a network known here (its weights: {names}, ...)")
    found = dict(stored or {})
    for key, value in asked.items():
        if key != "drop" and key in found and found[key] != value:
            raise UserError(f"{path}: {_contrast(found, asked)}")
    arch = {**found, **asked}
    with torch.device("meta"):  # takes no memory and draws no random numbers
        try:
            network = build_model(**arch)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: {shown(error, 200)}") from None
    check_fits(network, state, path, inferred)
    network.to_empty(device="cpu")
    network.load_state_dict(state)
    return network.to(device).eval(), checkpoint


def check_fits(
    network: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    inferred: Mapping[str, Any] | None = None,
) -> None:
    """Whether ``network.load_state_dict(state)`` would succeed, tried without touching either.

    Raises:
        UserError: names, shapes or kinds of numbers differ; says which network the file holds.
    """
    _check_state(state, path)
    expected = network.state_dict()
    # Files of PyTorch before 0.4.1 have no such counter, and torch adds it by itself.
    missing = [
        name for name in expected if name not in state and not name.endswith("num_batches_tracked")
    ]
    surplus = [name for name in state if name not in expected]
    different = [
        name
        for name, tensor in expected.items()
        if name in state and tensor.shape != state[name].shape
    ]
    holds = ""
    inferred = inferred if inferred is not None else infer_arch(state)
    asked = getattr(network, "arch", {})
    if inferred is not None and any(asked.get(key) != value for key, value in inferred.items()):
        holds = _contrast(inferred, asked) + ": "
    if different:
        name = different[0]
        raise UserError(
            f"{path}: {holds}{shown(name)} has shape {list(state[name].shape)}, needed is "
            f"{list(expected[name].shape)}"
        )
    if missing or surplus:
        parts = []
        if missing:
            parts.append(f"{len(missing)} weights missing (first: {missing[0]})")
        if surplus:
            parts.append(f"{len(surplus)} unknown (first: {shown(surplus[0])})")
        raise UserError(f"{path}: {holds}{', '.join(parts)}")
    for name, tensor in expected.items():
        if name in state and state[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {shown(name)} has numbers of type {state[name].dtype}")


def _contrast(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """``holds resnet (depth 20), asked was resnet (depth 32)``: the options that differ."""

    def describe(arch: Mapping[str, Any], keys: Sequence[str]) -> str:
        options = ", ".join(f"{shown(key)} {shown(arch[key])}" for key in keys if key in arch)
        name = shown(arch.get("name", "a network"))
        return f"{name} ({options})" if options else name

    differing = [
        key for key in asked if key in found and asked[key] != found[key] and key != "name"
    ]
    if asked.get("name", found.get("name")) != found.get("name"):
        differing = []  # options of different networks say nothing about each other
    asked = {"name": found.get("name"), **asked}
    return f"holds {describe(found, differing)}, asked was {describe(asked, differing)}"


def restore_fields(
    kind: type[Fields], values: Any, path: str | os.PathLike[str], what: str
) -> Fields:
    """Build a dataclass from a dict in a checkpoint, whose names and types must be its own.

    Args:
        kind: a dataclass with a default for every field; the defaults' types are the allowed ones.
        values: what the checkpoint holds, ``dataclasses.asdict`` of an earlier instance.
        path: the checkpoint, for the message.
        what: what it is, for the message.

    Raises:
        UserError: not a dict, unknown fields, values of another type, negative or infinite counts.
    """
    defaults = dataclasses.asdict(kind())
    if not isinstance(values, dict) or not set(values) <= set(defaults):
        raise UserError(f"{path}: its {what} does not hold {', '.join(defaults)}")
    for name, value in values.items():
        wanted = type(defaults[name])
        numbers = value.values() if isinstance(value, dict) else [value]
        if (
            (type(value) is not wanted and not (wanted is float and type(value) is int))
            or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
            or (wanted is int and value < 0)
        ):
            raise UserError(f"{path}: its {what} holds {name} = {shown(value)}")
    return kind(**values)


def restore_network(
    network: nn.Module, checkpoint: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Load a checkpoint's weights into a network, all or nothing.

    Raises:
        UserError: they do not fit; the network is untouched.
    """
    check_fits(network, checkpoint["state_dict"], path)
    network.load_state_dict(checkpoint["state_dict"])


def restore_optimizer(
    optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Load a checkpoint's optimizer state, all or nothing.

    Raises:
        UserError: there is none, or it belongs to another optimizer or network; the optimizer is
            untouched.
    """
    state = checkpoint.get("optimizer")
    reason = _optimizer_mismatch(optimizer, state)
    if reason:
        raise UserError(f"{path}: its optimizer state does not fit ({reason})")
    optimizer.load_state_dict(state)


def _optimizer_mismatch(optimizer: torch.optim.Optimizer, state: Any) -> str:
    if not isinstance(state, dict):
        return "there is none"
    groups, buffers = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(buffers, dict):
        return "not an optimizer's"
    own = optimizer.state_dict()["param_groups"]
    if len(groups) != len(own):
        return f"{len(groups)} parameter groups, needed are {len(own)}"
    parameters: dict[Any, Tensor] = {}
    for group, own_group, live in zip(groups, own, optimizer.param_groups, strict=True):
        names = group.get("params") if isinstance(group, dict) else None
        if not isinstance(names, list) or len(names) != len(live["params"]):
            return "another number of parameters"
        if not all(type(name) in (int, str) for name in names):
            return "not an optimizer's"
        if not set(own_group) >= set(group) or "lr" not in group:
            return "another optimizer's settings"
        for key, value in group.items():
            if type(value) in (float, int) and not math.isfinite(value):
                return f"{key} is {value}"
        parameters.update(zip(names, live["params"], strict=True))
    for name, buffer in buffers.items():
        if name not in parameters or not isinstance(buffer, dict):
            return "state of a parameter that does not exist"
        for key, value in buffer.items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() and value.shape != parameters[name].shape:
                return f"{shown(key)} of shape {list(value.shape)}"
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return f"{shown(key)} is not finite"
    return ""

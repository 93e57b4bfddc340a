"""The folder of a training run, in which every name stands for a complete file."""

import contextlib
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.foreign import naming, reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AnyPath = str | os.PathLike[str]
CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
LOG, RECORD = "log.txt", "args.json"
# Our own columns as they were once called; the others are the original's.
OLD_COLUMNS = {"Val Acc.": "Held-out Acc.", "Val Robust Acc.": "Held-out Robust Acc.",
               "Mode Gap": "BN Gap"}  # fmt: skip


def write_atomic(path: AnyPath, data: bytes) -> None:
    """Write a file so that its name never stands for half of it, or UserError: as it was then."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        line = f"cannot write {path}: {reason(error)} ({len(data) / 2**20:.1f} MB needed)"
        if (path.parent / CHECKPOINT).is_file():
            line += f"; the last good checkpoint is intact: --resume {path.parent}"
        raise UserError(line) from None


def serialized(checkpoint: Mapping[str, Any]) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()  # torch reports a full disk as an internal error
    torch.save(dict(checkpoint), stream)
    return stream.getvalue()


class RunFolder(contextlib.AbstractContextManager):
    """The folder of one training run, created if missing, locked until the process ends.

    A folder that holds a run is taken only if ``resume_from`` lies in it, or to ``overwrite`` the
    run; another folder gets a copy of the resumed run's best network. UserError: not a folder, not
    writable, in use, or holds another run.
    """

    def __init__(
        self, path: AnyPath, *, resume_from: AnyPath | None = None, overwrite: bool = False
    ) -> None:
        self.path, self.scalars = Path(path), Path(path, "scalars")
        with naming(f"run folder {path}"), contextlib.ExitStack() as failed:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = failed.enter_context(open(self.path / ".lock", "a"))
            self._acquire()
            self._prepare(None if resume_from is None else Path(resume_from), overwrite)
            failed.pop_all()

    def _acquire(self) -> None:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = (self.path / ".lock").read_text().strip()
            raise UserError(f"in use by process {owner}") from None
        except OSError as error:  # some network shares refuse as well
            why = reason(error)
            print(f"note: {self.path} is not locked against a second run ({why})", file=sys.stderr)
        self._lock.truncate(0)
        print(os.getpid(), file=self._lock, flush=True)

    def _prepare(self, resume_from: Path | None, overwrite: bool) -> None:
        for leftover in self.path.glob(".*.tmp-*"):  # of a run that was killed in a save
            leftover.unlink()
        if resume_from and resume_from.resolve().parent == self.path.resolve():
            if resume_from.name != CHECKPOINT and (self.path / CHECKPOINT).exists():
                line = "is not its newest state, and what came after would be lost"
                raise UserError(f"{resume_from.name} {line}; --checkpoint names another folder")
            return
        log, record = self.path / LOG, self.path / RECORD
        names = re.compile(r"(checkpoint|model_best|epoch\d+)\.pth\.tar")
        run = [entry for entry in self.path.iterdir() if names.fullmatch(entry.name)]
        # A log of ours without a row is left by a run that was killed in its first epoch. An
        # args.json of ours comes after its log.
        if not run and ("Valid Acc." not in read_log(log) if log.exists() else record.exists()):
            raise UserError("holds files that are no run's; choose another --save_dir")
        if overwrite and (run or log.exists()):
            for entry in (*run, log):
                entry.unlink(missing_ok=True)
            shutil.rmtree(self.scalars, ignore_errors=True)
        elif run or (log.exists() and read_log(log)["Valid Acc."]):
            raise UserError("holds a run: --resume it, --overwrite it or choose another --save_dir")
        # Only the newest state's: by an older checkpoint another network was the best.
        if resume_from and resume_from.name == CHECKPOINT:
            with contextlib.suppress(FileNotFoundError):
                write_atomic(self.path / BEST, resume_from.with_name(BEST).read_bytes())

    def save(self, checkpoint: Mapping[str, Any], *names: str) -> None:
        """Save a checkpoint under each name, or UserError."""
        data = serialized(checkpoint)
        for name in names:
            write_atomic(self.path / name, data)

    def __exit__(self, *_: object) -> None:
        self._lock.close()


class Log:
    """A tab-separated table with a row per epoch; of a file that is there the rows up to ``epoch``
    stay, by its column of that name (which older ones lack: they begin with the first)."""

    def __init__(self, path: AnyPath, columns: Sequence[str], epoch: int = 0) -> None:
        self.path, self.columns = Path(path), tuple(columns)
        old = read_log(path) if epoch and self.path.exists() else {}
        if old and not old.keys() & {*columns}:
            raise UserError(f"{path}: not the log of a run; --checkpoint names another folder")
        rows = [dict(zip(old, row)) for row in zip(*old.values())]
        rows = [{"Epoch": number, **row} for number, row in enumerate(rows, 1)]
        self._rows = [row for row in rows if row["Epoch"] <= epoch]
        self._write()

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; a column without a value gets ``nan``."""
        self._rows.append(dict(row))
        self._write()

    def _write(self) -> None:
        cells = [[f"{row.get(name, math.nan):.8g}" for name in self.columns] for row in self._rows]
        lines = ["\t".join(line) + "\n" for line in [self.columns, *cells]]
        write_atomic(self.path, "".join(lines).encode())


def read_log(path: AnyPath) -> dict[str, list[float]]:
    """The columns of a ``log.txt`` by name, today's where it has changed; or UserError."""
    with naming(path):
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        header, *rows = [line.split("\t") for line in text.split("\n")[:-1]] or [[]]
        rows = [row for row in rows if len(row) == len(header)]  # none that a kill has cut off
        names = [OLD_COLUMNS.get(name, name) for name in header]
        return {name: [float(row[i]) for row in rows] for i, name in enumerate(names)}

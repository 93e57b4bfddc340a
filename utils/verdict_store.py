"""An evaluation on disk: its report, and while it runs each image's verdicts beside it.

``report.json.partial`` gets a line for every batch, so that a kill costs seconds. It is locked
while it is written, and removed once the report holds all there is to know.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.foreign import naming
from utils.run_folder import fcntl, write_atomic


class VerdictStore:
    """The report of earlier evaluations, and the verdicts of an unfinished one.

    Args:
        output: the report's file, or None to keep nothing.
        identity: what all verdicts depend on: keys of the report with plain values.
        write: whether this process writes; the others read what there was.

    Raises:
        UserError: one of the files is not this evaluation's, in use, or cannot be written.
    """

    def __init__(self, output: str | None, identity: Mapping[str, Any], write: bool = True) -> None:
        self.output, self.identity = output, dict(identity)
        self.path = Path(f"{output}.partial")
        self.report: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._file = None  # locked, where this process writes
        if output is None:
            return
        self._read_report(Path(output))
        with naming(f"cannot write {self.path}"):
            self._file = open(self.path, "ab", buffering=0) if write else None  # noqa: SIM115
            content = self.path.read_bytes() if self.path.exists() else b""
        self._lock()
        whole = content[: content.rfind(b"\n") + 1]  # without a line that a kill cut off
        with contextlib.suppress(ValueError):
            self._lines = [json.loads(line) for line in whole.splitlines()]
        cut_off = f"{json.dumps(self.identity)}\n".encode().startswith(content)
        if self._lines[:1] != [self.identity] and not cut_off:
            raise _refused(self.path, "is no unfinished evaluation of this kind")
        if self._file:
            self._file.truncate(len(whole))

    def _lock(self) -> None:
        try:
            if self._file and fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refused(self.path, "is being written by another evaluation") from None
        except OSError:  # some network shares have no locks
            pass

    def _read_report(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            self.report = json.loads(path.read_bytes())
            found = {**self.report["versions"], **self.report}
            self.report["attacks"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise _refused(path, "exists and is no report of an evaluation") from None
        for key, value in self.identity.items():
            # Reports of before have no fingerprint of the data.
            if found.get(key, value if key == "data_sha256" else None) != value:
                raise _refused(path, f"is the report of another {key}")

    def lines(self, attack: str) -> list[dict[str, Any]]:
        """What was added before about an attack, named with all its settings."""
        return [line for line in self._lines[1:] if line["attack"] == attack]

    def add(self, **line: Any) -> None:
        """Keep plain values about some images under an ``attack``."""
        if self._file:
            new = [line] if self._lines else [self.identity, line]
            self._lines += new
            with naming(f"cannot write {self.path}"):
                self._file.write("".join(json.dumps(part) + "\n" for part in new).encode())

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the report and remove the verdicts."""
        if self._file:
            write_atomic(self.output, (json.dumps(report, indent=2) + "\n").encode())
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the file; delete it if empty."""
        if self._file:
            if not os.fstat(self._file.fileno()).st_size:
                self.path.unlink(missing_ok=True)
            self._file.close()


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"--output: {path} {why}; name another file")

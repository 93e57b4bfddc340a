"""What an evaluation has found out so far, image by image, so that a kill costs seconds.

One file beside the results (``results.json.partial``), written atomically and removed at the end.
It is bound to everything that the verdicts depend on; another evaluation's is not used.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.runs import write_atomic

_SECONDS_BETWEEN_WRITES = 5.0


class Record:
    """The verdicts of one attack.

    Attributes:
        values: by name float64 [N], nan where the attack has not looked at an image yet.
        seconds: how long it took so far.
        notes: remarks for the results.
    """

    def __init__(self, count: int, names: tuple[str, ...]) -> None:
        self.values = {name: torch.full((count,), torch.nan, dtype=torch.float64) for name in names}
        self.seconds = 0.0
        self.notes: list[str] = []

    def open_rows(self) -> Tensor:
        """Indices of the images that are still to be looked at."""
        return next(iter(self.values.values())).isnan().nonzero()[:, 0]

    def put(self, rows: Tensor, **values: Tensor) -> None:
        """Enter the values of some images."""
        for name, column in values.items():
            self.values[name][rows] = column.to("cpu", torch.float64)

    def to_plain(self) -> dict[str, Any]:
        """JSON knows neither nan nor infinity: they become null and "far"."""
        columns = {}
        for name, column in self.values.items():
            columns[name] = [
                None if value != value else "far" if value == float("inf") else value
                for value in column.tolist()
            ]
        return {"values": columns, "seconds": self.seconds, "notes": self.notes}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_plain` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        found = {}
        for name, column in self.values.items():
            stored = plain["values"][name]
            numbers = [{None: float("nan"), "far": float("inf")}.get(v, v) for v in stored]
            found[name] = torch.tensor(numbers, dtype=torch.float64)
            if found[name].shape != column.shape:
                raise ValueError(f"{len(stored)} values, expected {len(column)}")
        seconds, notes = float(plain["seconds"]), [str(note) for note in plain["notes"]]
        self.values, self.seconds, self.notes = found, seconds, notes


class VerdictStore:
    """All records of one evaluation, on disk where there is a path.

    Args:
        path: the file, or None to keep nothing.
        key: what the verdicts depend on, as JSON values.
        write: whether this process writes.
    """

    def __init__(self, path: str | Path | None, key: Mapping[str, Any], write: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.key = dict(key)
        self.write = write and self.path is not None
        self.note = ""  # what happened to a file that was found
        self._written = float("-inf")
        self._records: dict[str, Record] = {}
        self._stored = self._read()

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text("utf-8"))
            if found["key"] == self.key:
                return dict(found["records"])
            # Hours of work, perhaps, that a mistyped flag must not wipe out.
            kept = self.path.with_name(self.path.name + ".other")
            if self.write:
                os.replace(self.path, kept)
            self.note = f"{self.path}: of another evaluation, not used and kept as {kept.name}"
        except (OSError, ValueError, KeyError, TypeError):
            self.note = f"{self.path}: cannot be read, not used"
        return {}

    def record(self, name: str, count: int, names: tuple[str, ...]) -> Record:
        """The record of an attack (``name`` with all its settings), with what is known already."""
        record = Record(count, names)
        if name in self._stored:
            try:
                record.restore(self._stored[name])
            except (ValueError, KeyError, TypeError):
                self.note = f"{self.path}: record of {name} cannot be read, not used"
        self._records[name] = record
        return record

    def save(self, force: bool = False) -> None:
        """Write all records, at most every few seconds unless forced.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.write or (
            not force and time.monotonic() - self._written < _SECONDS_BETWEEN_WRITES
        ):
            return
        plain = {name: record.to_plain() for name, record in self._records.items()}
        text = json.dumps({"key": self.key, "records": {**self._stored, **plain}})
        write_atomic(self.path, text.encode())
        self._written = time.monotonic()

    def remove(self) -> None:
        """The evaluation is complete: its results file has all there is to know."""
        if self.write:
            self.path.unlink(missing_ok=True)

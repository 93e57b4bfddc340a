"""Running the repository's scripts as a user does, and reading what they leave."""

import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.foreign import naming
from utils.options import integer
from utils.progress import Bar

ROOT = Path(__file__).resolve().parent.parent
positive = integer("N", 1)[0]  # for argparse


def run(command: Sequence[str], output: Path | None = None) -> None:
    """Run a script in the repository's root. On Ctrl-C, wait until it has saved its state.

    Args:
        command: the script and its flags.
        output: file to which the command and its output are appended; default: the terminal.

    Raises:
        UserError: it failed; it has said why.
    """
    with open(output, "a", encoding="utf-8") if output else nullcontext() as stream:
        print(f"\n$ python {shlex.join(command)}", file=stream, flush=True)
        words = [sys.executable, *command]
        process = subprocess.Popen(words, cwd=ROOT, stdout=stream, stderr=stream)
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                continue  # the script got it as well
    if process.returncode == 130:
        raise UserError(f"{command[0]} was interrupted; the same command resumes it")
    if process.returncode:
        where = f", see {output}" if output else ""
        raise UserError(f"{command[0]} ended with exit code {process.returncode}{where}")


def run_each(work: Callable[..., None], items: Sequence[tuple], jobs: int) -> None:
    """Call ``work(*item)`` for every item, ``jobs`` at a time.

    Raises:
        UserError: one or more raised it; the others are done.
    """

    def failed(item: tuple) -> bool:
        try:
            work(*item)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            return True
        return False

    with ThreadPoolExecutor(jobs) as pool:
        if count := sum(Bar(pool.map(failed, items), total=len(items))):
            raise UserError(f"{count} of {len(items)} failed; the same command resumes them")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and in brackets the least and the largest; ``-`` where none is finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    text = f"{statistics.mean(finite):.{digits}f}"
    if len(finite) > 1:
        text += f" ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
    return text


def read_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON file with this ``key``, or UserError."""
    with naming(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if key not in found:
            raise UserError(f"there are no {key} in it")
        return found

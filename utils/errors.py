"""The one kind of error a user should see as a single line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what was given and what is allowed."""


def printable(text: str) -> str:
    """``text`` as one line that no control character in it can tamper with."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave with its exit code; a UserError becomes one line and 2."""
    try:
        code = main()
    except UserError as error:
        line = printable(str(error))
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        sys.stderr.close()  # `script | head` is no failure; python would complain at exit
        code = 1
    sys.exit(code or 0)

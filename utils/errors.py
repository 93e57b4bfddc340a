"""The one kind of error a user should see as a single line."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what was given and what is allowed."""


def printable(text: str) -> str:
    """``text`` as one line that no control character in it can tamper with."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave with its exit code.

    A UserError or an error of a file, disk or pipe becomes one line, and the exit code 2; Ctrl-C
    is the exit code 130.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # names that the terminal's encoding cannot show
    threading.excepthook = lambda failed: None  # TensorBoard's writer; it is raised again in ours
    try:
        code = main() or 0
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except (UserError, OSError) as error:
        code = 2
        if getattr(error, "errno", None) != errno.EPIPE:  # `script | head` is no failure
            print(f"{Path(sys.argv[0]).name}: error: {printable(str(error))}", file=sys.stderr)
        if isinstance(error, OSError) and sys.stdout:  # for python's own flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)

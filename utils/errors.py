"""The one kind of error a user should see as a single line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what was given and what is allowed."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave with its exit code; a UserError becomes one line and 2."""
    try:
        code = main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        sys.stderr.close()  # `script | head` is no failure; python would complain at exit
        code = 1
    sys.exit(code or 0)

"""Progress with an ETA: a bar on a terminal, elsewhere (nohup, Slurm, CI) a plain line a minute."""

import sys
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm on stderr, or nothing where it is not ``shown`` (all processes but the first)."""

    def __init__(self, *args: Any, shown: bool = True, **options: Any) -> None:
        self._plain = not sys.stderr.isatty()
        # tqdm's defaults show old counts where steps get slow, and nothing at updates by 0.
        options |= {"smoothing": 0, "miniters": 0}
        if self._plain:
            options |= {"mininterval": 60, "delay": 60}
        super().__init__(*args, disable=not shown, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print the line; nothing on closing."""
        if not self._plain:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

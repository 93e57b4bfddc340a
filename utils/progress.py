"""Progress with an ETA: a bar on a terminal, elsewhere (nohup, Slurm, CI) a plain line a minute."""

import sys
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm on stderr, or nothing where it is not ``shown`` (all processes but the first)."""

    def __init__(self, *args: Any, shown: bool = True, **options: Any) -> None:
        self._plain = not sys.stderr.isatty()
        self._counted = 0.0  # seconds at the last one counted
        # tqdm's defaults forget the time of updates by 0, and show old counts where steps get slow.
        options |= {"smoothing": 0, "miniters": 0}
        if self._plain:
            options |= {"mininterval": 60, "delay": 60}
        super().__init__(*args, disable=not shown, leave=False, **options)

    def update(self, n: float = 1) -> bool | None:
        """Count ``n`` more, or with 0 show that work goes on."""
        if n and not self.disable:
            self._counted = self._time() - self.start_t
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """With a rate, and so an ETA, that does not fall while the next batch is at work."""
        found = super().format_dict
        if self._counted:
            found["rate"] = (self.n - self.initial) / self._counted
        return found

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print the line; nothing on closing."""
        if not self._plain:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

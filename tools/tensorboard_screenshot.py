"""Save a picture of TensorBoard as it shows a run folder (or a folder of runs) in a real browser.

python -m tools.tensorboard_screenshot SavedModels images/tensorboard.png
python -m tools.tensorboard_screenshot SavedModels custom.png --tab custom_scalars
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tools.browser import Browser, BrowserError

TABS = ("timeseries", "custom_scalars", "images", "text")
# Read by TensorBoard from the browser's storage: curves as logged, the settings out of the way.
_SETTINGS = {
    "timeSeriesSettingsPaneOpened": False,
    "scalarSmoothing": 0,
    "ignoreOutliers": False,
    "stepSelectorEnabled": False,
}
_UNFOLD = """
    document.querySelectorAll("button.group-toolbar").forEach((button) => {
        if (button.querySelector("[svgicon=expand_more_24px]")) button.click();
    })
"""


@contextlib.contextmanager
def tensorboard(log_dir: str | Path, seconds: float = 120) -> Iterator[str]:
    """Serve a folder on this machine as long as the block runs; gives the page's address.

    Raises:
        BrowserError: TensorBoard ended or was not ready in time.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)),
                *("--host", "127.0.0.1", "--port", "0", "--load_fast", "false"),
                *("--samples_per_plugin", "scalars=1000,images=100"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + seconds
            while True:
                log.seek(0)
                text = log.read()
                found = re.search(r"at (http://\S+)", text)
                if found:
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BrowserError(f"TensorBoard did not start: {text.strip()[-500:]}")
                time.sleep(0.2)
            yield found.group(1)
        finally:
            process.terminate()
            process.wait()


def show(browser: Browser, address: str, tab: str, seconds: float = 120) -> str:
    """Open a tab, unfold its groups, wait until it stands still, and give the page's text.

    Raises:
        BrowserError: the page still changed, or showed nothing, when the time was over.
    """
    browser.open(address)
    browser.wait_for("document.readyState === 'complete'", seconds)
    settings = json.dumps(json.dumps(_SETTINGS))
    browser.evaluate(f"localStorage.setItem('_tb_global_settings', {settings})")
    # Leaving the page first makes the browser load it anew: only the part after # differs.
    browser.open("about:blank")
    browser.open(f"{address}#{tab}")
    deadline = time.monotonic() + seconds
    before, still = "", 0
    while still < 4 or len(before) < 200:
        if time.monotonic() > deadline:
            raise BrowserError(f"{tab} was not ready within {seconds:g} seconds: {before[:500]}")
        time.sleep(0.5)
        browser.evaluate(_UNFOLD)
        text = browser.text()
        still = still + 1 if text == before and "Loading" not in text else 0
        before = text
    return before


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log_dir", help="a run folder, or a folder of runs")
    parser.add_argument("output", help="PNG file to write")
    parser.add_argument("--tab", choices=TABS, default=TABS[0])
    parser.add_argument("--width", type=int, default=1440, help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=1400, help="pixels (default: %(default)s)")
    args = parser.parse_args()
    if not Path(args.log_dir).is_dir():
        parser.error(f"{args.log_dir} is no folder")
    try:
        with tensorboard(args.log_dir) as address, Browser(args.width, args.height) as browser:
            show(browser, address, args.tab)
            browser.screenshot(args.output)
    except BrowserError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"{args.tab} of {args.log_dir} -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

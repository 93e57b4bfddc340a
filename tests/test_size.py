"""Size is a cost: the counts stay within a tenth of what they were after the redesign."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What was counted then, in lines (README: characters).
COUNTS = {"all": 6440, "training": 3200, "method": 572, "readme": 9600}

LOADED = """
import json, sys
before = set(sys.modules)
import {module}
files = {{getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}}
print(json.dumps([file for file in files if file and file.startswith({root!r} + "/")]))
"""


def lines(files) -> int:
    return sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files)


def loaded(root, module: str) -> int:
    """Lines of the repository's files that an import loads."""
    code = LOADED.format(module=module, root=str(root))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    files = json.loads(done.stdout)
    return lines(file for file in files if "/.venv/" not in file)


@pytest.mark.parametrize("what", COUNTS)
def test_the_counts_have_not_grown_back(root, what):
    if what == "all":
        folders = [root / name for name in ("models", "utils", "tools", "benchmarks")]
        inside = [file for folder in folders for file in folder.rglob("*.py")]
        found = lines([*root.glob("*.py"), *inside])
    elif what == "readme":
        found = len((root / "README.md").read_text(encoding="utf-8"))
    else:
        found = loaded(root, {"training": "MNIST_defense", "method": "utils.lfr"}[what])
    assert 0 < found <= 1.1 * COUNTS[what], f"{found}, was {COUNTS[what]}"

"""How a script ends: in one line, whatever its standard output is."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from utils.errors import UserError, run_script

def main():
    print("first", flush=True)
    for _ in range(100_000):
        print("caf\\u00e9 \\u732b")
    {last}

run_script(main)
"""


def run(root, last, redirect="", **environment):
    command = f'"{sys.executable}" -c "$SCRIPT" {redirect}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={"PYTHONPATH": str(root), "SCRIPT": SCRIPT.format(last=last), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_full_disk_is_one_line(root):
    done = run(root, "pass", "> /dev/full")
    assert done.returncode == 2
    assert done.stderr == "-c: error: [Errno 28] No space left on device\n"


def test_a_reader_that_has_gone_is_no_complaint(root):
    done = run(root, "pass", "| head -1")
    assert done.stdout == "first\n"
    assert done.stderr == ""


@pytest.mark.parametrize("redirect", ["", ">&-"])
def test_a_mistake_is_one_line_in_any_encoding(root, redirect):
    last = 'raise UserError("no\\nsuch \\u732b")'
    done = run(root, last, redirect, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr == "-c: error: no such ?\n"
    assert redirect or "caf? ?\n" in done.stdout


def test_ctrl_c_is_no_traceback(root):
    done = run(root, "raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "")


def test_an_error_of_a_file_names_it(root):
    done = run(root, 'open("/nowhere/at/all")')
    assert done.returncode == 2
    assert done.stderr == "-c: error: [Errno 2] No such file or directory: '/nowhere/at/all'\n"


def test_other_errors_keep_their_traceback(root):
    done = run(root, "[][0]")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "IndexError" in done.stderr

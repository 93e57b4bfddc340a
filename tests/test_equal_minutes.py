"""benchmarks/equal_minutes.py: minutes become steps, rows are trained and attacked as told."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from benchmarks import equal_minutes
from utils.errors import UserError


@pytest.mark.parametrize(
    ("minutes", "seconds", "epochs", "steps"),
    [(1, 6.0, 1, 10), (1, 0.1, 6, 100), (2, 0.13, 10, 93), (0.001, 60.0, 1, 1)],
)
def test_the_minutes_are_filled(minutes, seconds, epochs, steps):
    args = argparse.Namespace(minutes=minutes, steps_per_epoch=100)
    assert equal_minutes.plan(seconds, args) == (epochs, steps)


@pytest.mark.parametrize(
    "words", [["--minutes", "0"], ["--minutes", "nan"], ["--num_examples", "0"], ["--threads", "0"]]
)
def test_senseless_values_are_refused_in_one_line(words):
    with pytest.raises(UserError, match=f"{words[0]} {words[1]}: allowed is"):
        equal_minutes.parse(words)


@pytest.mark.slow
def test_a_row_is_trained_attacked_and_kept(tmp_path, monkeypatch, capsys):
    result = tmp_path / "found.json"
    words = ["--dataset", "digits", "--minutes", "0.02", "--only", "none", "--attacks", "PGD"]
    words += ["--num_examples", "20", "--runs_dir", str(tmp_path / "runs"), "--output", str(result)]
    monkeypatch.setattr(sys, "argv", ["equal_minutes", *words])
    assert equal_minutes.main() == 0
    run = json.loads(result.read_text())["rows"]["none"]["1000"]
    runs = tmp_path / "runs" / "digits_0.02"
    epochs, steps = json.loads((runs / "none_length.json").read_text())["length"]
    assert run["steps"] == epochs * steps
    assert 0 <= run["robust"]["PGD"] <= run["clean"] <= 100
    assert "| none: `--defense none --lr 0.1` | " in capsys.readouterr().out
    assert "--checkpoint RUNS/none_1000" in run["commands"][0]
    assert str(tmp_path) not in result.read_text()
    # Given again, nothing is trained or attacked twice.
    files = [runs / name for name in ("none_1000/checkpoint.pth.tar", "none_1000.json")]
    times = [file.stat().st_mtime_ns for file in files]
    assert equal_minutes.main() == 0
    assert [file.stat().st_mtime_ns for file in files] == times

"""benchmarks/speed.py: both sides compute the same, and the command ends in a table."""

import json
import sys

import pytest
import torch

from benchmarks import speed
from models import build_model
from utils.errors import UserError
from utils.lfr import Ball, initial_point


@pytest.mark.parametrize(("name", "options"), [("small_cnn", {}), ("resnet", {"depth": 8})])
def test_the_plain_side_computes_the_same(name, options):
    searches = {"step_size": 0.1, "num_steps": 2}, {"step_size": 0.2, "num_steps": 1}
    case = speed.CASES[name]._replace(paper=searches[0], fast=searches[1])
    network = build_model(name, **options).double().eval()
    list(network.modules())[-1].reset_parameters()
    x = torch.rand(4, *((1, 28, 28) if name == "small_cnn" else (3, 32, 32)), dtype=torch.float64)
    y, ball = torch.randint(10, (4,)), Ball("l_inf", case.epsilon)
    given = torch.autocast("cpu", enabled=False), network, x, y, initial_point(x, ball, "paper")
    ours, plain = speed.jobs(case, *given), speed.plain(case, *given)
    assert ours.keys() == plain.keys() == set(speed.ROWS)
    torch.testing.assert_close(ours["paper search"](), plain["paper search"]())
    assert torch.equal(ours["PGD"](), plain["PGD"]())
    if name == "small_cnn":  # without BatchNorm there is nothing that a step does otherwise
        torch.testing.assert_close(ours["paper step"](), plain["paper step"]())
        torch.testing.assert_close(ours["fast step"](), plain["fast step"]())


@pytest.fixture
def command(monkeypatch):
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["speed", *map(str, words)])
        return speed.main()

    return run


def test_a_rehearsal(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(speed.CASES, "resnet", speed.CASES["resnet"]._replace(arch={"depth": 8}))
    output = tmp_path / "speed.json"
    words = ["--turns", 1, "--num_steps", 1, "--batches", 2, "--threads", 1, "--output", output]
    words += ["--dtypes", "bfloat16", "--layouts", "contiguous"]
    assert command(*words) == 0
    report = json.loads(output.read_text())
    assert len(report["rows"]) == 2 * len(speed.ROWS) and report["versions"]["torch"]
    for row in report["rows"].values():
        assert set(row["seconds"]) == {"plain", "ours"} and min(row["seconds"].values()) > 0
        assert row["plain / ours"][1] <= row["plain / ours"][0] <= row["plain / ours"][2]
    assert capsys.readouterr().out.count("| contiguous | bfloat16 | ") == 2 * len(speed.ROWS)
    # Given again, nothing is measured twice.
    monkeypatch.setattr(speed, "paired", None)
    assert command(*words) == 0 and json.loads(output.read_text()) == report
    # Figures of other settings are others.
    for other in (["--num_steps", 2], ["--threads", 2]):
        with pytest.raises(UserError, match="of other versions, threads or --num_steps"):
            command(*words, *other)


def test_an_output_that_is_something_else(command, tmp_path):
    (output := tmp_path / "mine.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="there are no rows in it"):
        command("--output", output)
    assert output.read_text() == '{"a": 1}'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_so(command):
    with pytest.raises(UserError, match="there is no CUDA here"):
        command("--device", "cuda")

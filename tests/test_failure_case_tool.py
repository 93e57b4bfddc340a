"""tools/failure_case.py: the table, the curves, the commands and the measurement."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cifar_defense
from models import build_model
from tests.helpers import save_checkpoint
from tools import failure_case
from utils.errors import UserError
from utils.options import settle_training, training_parser

COLUMNS = (  # as logs were written before and are kept
    "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\tloss normal\tloss gradient\t"
    "Val Acc.\tVal Robust Acc.\tTest Robust Acc.\tMode Gap\tSeconds"
)


def log(train: float, test: float, gap: str, penalty: float) -> str:
    first = f"0.1\t2.2\t2.2\t20\t20\t2.2\t9\t20\t10\t10\t{gap}\t5"
    last = f"0.1\t1\t2\t{train}\t{test}\t1\t{penalty}\t{test}\t5\t5\t{gap}\t5"
    return f"{COLUMNS}\n{first}\n{last}\n"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(failure_case, "KEPT", tmp_path)
    monkeypatch.setattr(failure_case, "WARMUP", 1)
    (tmp_path / "mixed_1000.tsv").write_text(log(80, 10, "70", 0.5))
    (tmp_path / "mixed_1001.tsv").write_text(log(60, 30, "30", 1.5))
    (tmp_path / "mixed_fast_1000.tsv").write_text(log(1, 2, "20", 4))  # not above the limit
    (tmp_path / "group_1000.tsv").write_text(log(50, 48, "nan", 6))
    return tmp_path


@pytest.fixture
def tool(monkeypatch):
    """``tool("table", ...)``: the command line; returns the exit code."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["failure_case", *map(str, words)])
        return failure_case.main()

    return run


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def test_a_row_is_mean_range_and_the_count_of_collapses(kept, tool, capsys):
    assert tool("table") == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 3
    mixed = cells_of(next(row for row in rows if row.startswith("| mixed |")))
    assert mixed[2:5] == ["2 x 2", "70.0 (60.0 to 80.0)", "20.0 (10.0 to 30.0)"]
    assert mixed[5:7] == ["50.0 (30.0 to 70.0)", "2, 2 (from 1, 1)"]
    assert mixed[-2:] == ["1.0 (0.5 to 1.5)", "20.0 (10.0 to 30.0)"]
    fast = cells_of(next(row for row in rows if row.startswith("| mixed_fast |")))
    assert fast[5:7] == ["20.0", "0"]
    group = cells_of(next(row for row in rows if row.startswith("| group |")))
    assert group[5:7] == ["-", "0"]


def test_figures_are_means_over_the_last_quarter_of_the_epochs():
    assert failure_case.tail([1, 2, 3, 4, 5, 6, 8, 10]) == 9
    assert failure_case.tail([7]) == 7


def test_curves_are_drawn_from_the_logs(kept, tool, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "pictures" / "curves.png"
    assert tool("draw", "--only", "mixed", "group", "--output", output) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 10_000
    with pytest.raises(UserError, match="no logs of running in"):
        tool("draw", "--only", "running", "--output", output)


@pytest.mark.parametrize("name", failure_case.VARIANTS)
def test_every_command_is_one_that_the_script_takes(name, tmp_path):
    args = argparse.Namespace(runs_dir=tmp_path, data_dir=tmp_path, epochs=12, threads=1)
    script, *words = failure_case.command(name, 1002, args)
    assert script == "cifar_defense.py"
    parser = training_parser(cifar_defense.DEFAULTS, "")
    parsed = settle_training(parser, cifar_defense.DEFAULTS, parser.given(words))
    assert parsed.manualSeed == 1002 and parsed.resume == "auto"
    assert parsed.epochs == 12 * failure_case.TIMES.get(name, 1)


def test_a_run_leaves_its_log_and_is_not_made_twice(kept, tool, monkeypatch, tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for name in "airplane automobile bird cat deer dog frog horse ship truck".split():
            (folder := tmp_path / "data" / "cifar10" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    asked: list[list[str]] = []

    def pretend(command: list[str], output: Path) -> None:
        asked.append(command)
        folder = Path(command[command.index("--checkpoint") + 1])
        if folder.name == "shared_4":
            raise UserError(f"cifar_defense.py ended with exit code 2, see {output}")
        folder.mkdir()
        (folder / "log.txt").write_text(log(1, 2, "3", 4))

    monkeypatch.setattr(failure_case, "run", pretend)
    monkeypatch.setattr(failure_case, "IMAGES", {"train": 40, "test": 20})
    words = ["run", "--data_dir", tmp_path / "data", "--runs_dir", tmp_path / "runs"]
    words += ["--only", "shared", "--seeds", 3, 4]
    with pytest.raises(UserError, match="1 of 2 failed; the same command resumes them"):
        tool(*words)
    assert (kept / "shared_3.tsv").read_text() == log(1, 2, "3", 4)
    assert not (kept / "shared_4.tsv").exists()
    assert failure_case.logs("shared") == [failure_case.read_log(kept / "shared_3.tsv")]
    images = list((tmp_path / "runs" / "images" / "train").rglob("*.png"))
    assert len(images) == 40 and {Image.open(path).size for path in images} == {(16, 16)}
    with pytest.raises(UserError, match="1 of 1 failed"):
        tool(*words)
    assert len(asked) == 3


def test_one_network_measured_by_both_statistics(tool, digits_test, tmp_path, capsys):
    """Running statistics of the very batch give the same network twice; wide ones do not."""
    torch.manual_seed(0)
    data = digits_test.head(60)
    network = build_model("resnet", depth=8, in_channels=1, num_classes=10).train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over the batches seen
    with torch.no_grad():
        network(data.float_images())
    words = ["--dataset", "digits", "--num_examples", 60]

    def measured() -> dict[str, list[float]]:
        state = {"state_dict": network.state_dict(), "arch": network.arch, "epoch": 1}
        save_checkpoint(tmp_path / "net.pth.tar", state)
        assert tool("measure", tmp_path / "net.pth.tar", *words) == 0
        rows = [cells_of(row) for row in capsys.readouterr().out.splitlines()[2:]]
        return {name: [float(value) for value in values] for name, *values in rows}

    same = measured()
    assert len(same) == 4
    for name in ("accuracy, clean images (%)", "gradient norm, clean images"):
        assert same[name][0] == pytest.approx(same[name][1], rel=0.05)
    widest = "widest layer: running statistics, or those of x_adv, / clean batch"
    assert same[widest][0] == pytest.approx(1, abs=0.02)
    network.layer3[0].bn2.running_var *= 16
    wide = measured()
    assert wide[widest][0] == pytest.approx(4, rel=0.02)
    norm = wide["gradient norm, clean images"]
    assert norm[0] < 0.9 * norm[1]


def test_without_batch_norm_there_is_no_gap_to_measure(tool, small_cnn, tmp_path):
    state = {"state_dict": small_cnn.state_dict(), "arch": small_cnn.arch, "epoch": 1}
    save_checkpoint(tmp_path / "net.pth.tar", state)
    with pytest.raises(UserError, match="has no BatchNorm"):
        tool("measure", tmp_path / "net.pth.tar", "--dataset", "digits")

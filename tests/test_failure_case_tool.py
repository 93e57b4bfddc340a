"""tools/failure_case.py: the table, the curves and the commands, from logs made here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import failure_case
from utils.errors import UserError
from utils.options import parse_training

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
COLUMNS = (
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
    (tmp_path / "mixed_fast_1000.tsv").write_text(log(1, 2, "3", 4))
    (tmp_path / "group_1000.tsv").write_text(log(50, 48, "nan", 6))
    return tmp_path


@pytest.fixture
def folder_data(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for name in CIFAR10:
            folder = tmp_path / "data" / "cifar10" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def test_a_row_is_mean_range_and_the_count_of_collapses(kept):
    rows = failure_case.table(failure_case.pick(None)).splitlines()
    assert len(rows) == 2 + 3
    mixed = cells_of(next(row for row in rows if row.startswith("| mixed |")))
    assert mixed[2:5] == ["2 x 2", "70.0 (60.0 to 80.0)", "20.0 (10.0 to 30.0)"]
    assert mixed[5] == "70.0 (60.0 to 80.0)"  # batch statistics: accuracy plus gap
    assert mixed[6:8] == ["50.0 (30.0 to 70.0)", "2, 2 (from 1, 1)"]
    assert mixed[-2:] == ["1.0 (0.5 to 1.5)", "20.0 (10.0 to 30.0)"]
    group = cells_of(next(row for row in rows if row.startswith("| group |")))
    assert group[5:8] == ["48.0", "-", "0"]


def test_spread_over_seeds():
    assert failure_case.spread([1.0]) == "1.0"
    assert failure_case.spread([-1.0, 4.0, float("nan")]) == "1.5 (-1.0 to 4.0)"
    assert failure_case.spread([float("nan")]) == "-"


def test_figures_are_means_over_the_last_quarter_of_the_epochs():
    assert failure_case.tail([1, 2, 3, 4, 5, 6, 8, 10]) == 9
    assert failure_case.tail([7]) == 7
    assert failure_case.parted([3, 21, float("nan"), 20, 40]) == [2, 5]


def test_a_row_may_be_of_an_earlier_epoch(kept):
    (row,) = failure_case.table(failure_case.pick(["mixed"]), epoch=1).splitlines()[2:]
    cells = cells_of(row)
    assert cells[2:5] == ["2 x 1", "20.0 (20.0 to 20.0)", "20.0 (20.0 to 20.0)"]
    assert cells[7] == "1, 1 (from 1, 1)" and cells[-1] == "-"
    with pytest.raises(UserError, match="--epoch 0: allowed is 1 or more"):
        failure_case.parse(["table", "--epoch", "0"])


def test_curves_are_drawn_from_the_logs(kept, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "pictures" / "curves.png"
    args = failure_case.parse(["draw", "--only", "mixed", "group", "--output", str(output)])
    assert failure_case.draw(args) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 10_000
    assert [path.name for path in output.parent.iterdir()] == ["curves.png"]


def test_without_logs_the_picture_is_refused(kept, tmp_path):
    args = failure_case.parse(["draw", "--only", "running", "--output", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="no logs"):
        failure_case.draw(args)


@pytest.mark.parametrize("variant", failure_case.VARIANTS, ids=lambda v: v.name)
def test_every_command_is_one_that_the_script_takes(variant, tmp_path):
    import cifar_defense

    args = argparse.Namespace(runs_dir=tmp_path, data_dir=tmp_path, epochs=12, threads=1)
    words = failure_case.command(variant, 1002, args)
    assert words[0] == "cifar_defense.py"
    parsed = parse_training(cifar_defense.DEFAULTS, words[1:])
    assert parsed.manualSeed == 1002 and parsed.epochs == 12 * variant.times
    (tmp_path / f"{variant.name}_1002").mkdir()
    (tmp_path / f"{variant.name}_1002" / "checkpoint.pth.tar").touch()
    assert "--resume" in failure_case.command(variant, 1002, args)


def test_a_run_leaves_its_log_and_is_not_made_twice(kept, folder_data, monkeypatch, tmp_path):
    monkeypatch.setattr(
        failure_case,
        "COMMON",
        "cifar_defense.py --dataset folder --depth 8 --train_batch 8 "
        "--probe_size 4 --probe_steps 1 --max_steps 1 --num_steps 1 --image_interval 0",
    )
    monkeypatch.setattr(failure_case, "IMAGES", {"train": 40, "test": 20})
    words = ["run", "--data_dir", str(folder_data), "--runs_dir", str(tmp_path / "runs")]
    args = failure_case.parse([*words, "--only", "shared", "--seeds", "3", "--epochs", "1"])
    assert failure_case.run_all(args) == 0
    log_file = kept / "shared_3.tsv"
    assert len(log_file.read_text().splitlines()) == 2
    told = json.loads((tmp_path / "runs" / "shared_3" / "args.json").read_text())
    assert told["arguments"]["bn_mode"] == "shared"
    images = list((tmp_path / "runs" / "images" / "train").rglob("*.png"))
    assert len(images) == 40 and {Image.open(path).size for path in images} == {(16, 16)}
    written = log_file.stat().st_mtime_ns
    assert failure_case.run_all(args) == 0
    assert log_file.stat().st_mtime_ns == written


def test_a_run_that_fails_is_reported(kept, monkeypatch, tmp_path, capsys):
    (tmp_path / "runs" / "images").mkdir(parents=True)  # and nothing in it
    words = ["run", "--data_dir", str(tmp_path), "--runs_dir", str(tmp_path / "runs")]
    args = failure_case.parse([*words, "--only", "shared", "--seeds", "3"])
    assert failure_case.run_all(args) == 1
    assert "shared, seed 3: exit code 2" in capsys.readouterr().err
    assert not Path(kept / "shared_3.tsv").exists()


def test_the_short_table_has_the_columns_it_names(kept):
    rows = failure_case.table(failure_case.pick(["group"]), short=True).splitlines()
    assert cells_of(rows[0]) == failure_case.SHORT.split("; ")
    assert cells_of(rows[2])[1:] == ["1 x 2", "50.0", "48.0", "-", "0", "6.0"]

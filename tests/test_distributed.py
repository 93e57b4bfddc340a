"""Two processes under torchrun do what one does."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import MNIST_defense
from utils.checkpoints import load_checkpoint
from utils.run_folder import read_log
from utils.training import train

# 80 training images in batches of 23, 23, 23 and 11: two processes have shares of 11 and 12.
FLAGS = (
    "--dataset digits --nlabel 90 --val_size 10 --train_batch 23 --epochs 1 --lr 0.05"
    " --lambada 0.05 --num_steps 1 --step_size 0.1 --probe_size 10 --probe_steps 1"
    " --ckpt_interval 0 --test_batch 360 --image_interval 0 --threads 1"
)


@pytest.fixture
def torchrun(run_script):
    if not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")

    return partial(run_script, "MNIST_defense.py", processes=2, timeout=600)


def test_two_processes_equal_one(torchrun, tmp_path, capsys):
    """The same weights, figures and log to 1e-4 at the same global batch, odd shares and all."""
    done = torchrun(*FLAGS.split(), "--save_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert "UserWarning" not in done.stderr
    for line in ("device: ", "data: ", "run folder: ", "epoch 1/1 "):
        assert done.stdout.count(line) == 1, done.stdout

    words = [*FLAGS.split(), "--save_dir", str(tmp_path / "one")]
    assert train(MNIST_defense.DEFAULTS, "", words) == 0
    name = "digits/lr_0.05_lambada_0.05_rs_1000"
    two, one = (tmp_path / count / name for count in ("two", "one"))
    checkpoints = [load_checkpoint(folder / "checkpoint.pth.tar") for folder in (two, one)]
    for key, value in checkpoints[0]["state_dict"].items():
        torch.testing.assert_close(
            value, checkpoints[1]["state_dict"][key], rtol=0, atol=1e-4, msg=key
        )
    logs = [read_log(folder / "log.txt") for folder in (two, one)]
    for column in ("Train Loss", "Train Acc.", "loss normal", "loss gradient", "Learning Rate"):
        assert logs[0][column] == pytest.approx(logs[1][column], abs=1e-4), column
    assert logs[0]["loss gradient"][-1] > 0


def test_two_processes_go_on_from_one_s_checkpoint(torchrun, tmp_path, capsys):
    """With BatchNorm, whose statistics are the first process's, and averaged weights."""
    flags = f"{FLAGS} --arch resnet --depth 8 --max_steps 1 --probe_size 0 --ema 0.9".split()
    flags += ["--checkpoint", str(tmp_path / "run")]
    assert train(MNIST_defense.DEFAULTS, "", flags) == 0
    done = torchrun(*flags, "--resume", tmp_path / "run", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "2/2" in done.stdout
    assert len(read_log(tmp_path / "run" / "log.txt")["Train Loss"]) == 2

"""tools/publish.py: what goes under savedModel/, and what stays behind."""

from __future__ import annotations

import json

import pytest
import torch

from tools.publish import command_without_machine, publish, without_machine
from utils.board import event_files
from utils.errors import UserError
from utils.runs import load_checkpoint, load_network, sha256_of


@pytest.fixture
def run(run_script, tmp_path):
    folder = tmp_path / "runs" / "one"
    flags = "--dataset digits --epochs 1 --max_steps 2 --train_batch 16 --val_size 16".split()
    flags += "--probe_size 8 --probe_steps 1 --num_steps 1 --search fast".split()
    ended = run_script("MNIST_defense.py", *flags, "--data_dir", tmp_path, "--checkpoint", folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_a_run_becomes_a_published_network(run, tmp_path):
    place = tmp_path / "savedModel"
    target = place / "digits" / "lr_0.1"
    names = publish(run, target, place)
    assert names[:3] == ["args.json", "log.txt", "model_best.pth.tar"] and len(names) == 4
    best = target / "model_best.pth.tar"
    network, checkpoint = load_network(best)
    before = load_checkpoint(run / "model_best.pth.tar")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before["state_dict"][name])
    assert "optimizer" not in checkpoint and "training" not in checkpoint
    assert best.stat().st_size < 0.6 * (run / "model_best.pth.tar").stat().st_size
    line = f"{sha256_of(best)}  digits/lr_0.1/model_best.pth.tar\n"
    assert (place / "SHA256SUMS").read_text() == line
    for path in target.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
    assert json.loads((target / "args.json").read_text())["arguments"]["data_dir"] == "./data"
    assert len(event_files(target / "scalars")) == 1
    with pytest.raises(UserError, match="exists"):
        publish(run, target, place)
    with pytest.raises(UserError, match="below savedModel"):
        publish(run, tmp_path / "elsewhere", place)


def test_folders_of_the_machine_are_replaced():
    command = "/a/MNIST_defense.py --data_dir /b/c --lr 0.1 --save_dir /d -c /e/f --resume /g --amp"
    expected = "MNIST_defense.py --data_dir ./data --lr 0.1 --save_dir SavedModels --amp"
    assert command_without_machine(command) == expected
    told = {"data_dir": "data", "save_dir": "/d", "resume": "/g", "lr": 0.1, "checkpoint": None}
    stays = {"data_dir": "data", "save_dir": "SavedModels", "resume": None, "lr": 0.1}
    assert without_machine(told) == {**stays, "checkpoint": None}

"""tools/anatomy.py: a network whose running statistics fit is one network, others are two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_model
from tools import anatomy
from utils.ball import Ball
from utils.data import load_dataset
from utils.errors import UserError
from utils.runs import save_checkpoint

OPTIONS = {"step_size": 0.05, "num_steps": 1, "batch_size": 60}


@pytest.fixture
def digits():
    return load_dataset("digits", ".", train=False).head(60)


@pytest.fixture
def network(digits):
    torch.manual_seed(0)
    network = build_model("resnet", depth=8, in_channels=1, num_classes=10)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over the batches seen
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network.apply(lambda layer: getattr(layer, "reset_running_stats", lambda: None)())
            network(digits.float_images())
    return network.eval()


def test_one_network(network, digits):
    found = anatomy.measure(network, digits, Ball("l_inf", 0.05), **OPTIONS)
    assert list(found) == list(anatomy.ROWS)
    clean = [value for name, value in found.items() if name.startswith("accuracy, clean")]
    assert clean[0] == pytest.approx(clean[1], abs=2)
    spread = [value for name, value in found.items() if name.startswith("deviation")]
    assert spread[0] == pytest.approx(spread[1], rel=0.01)
    assert found["widest layer: running statistics / clean batch"] == pytest.approx(1, abs=0.01)


def test_two_networks(network, digits):
    """Running variances that are 16 times too large make a network that sees 4 times less."""
    last = network.layer3[0].bn2
    last.running_var *= 16
    found = anatomy.measure(network, digits, Ball("l_inf", 0.05), **OPTIONS)
    assert found["widest layer: running statistics / clean batch"] == pytest.approx(4, rel=0.01)
    spread = [value for name, value in found.items() if name.startswith("deviation")]
    assert spread[0] < 0.9 * spread[1]


def test_measuring_leaves_the_network_alone(network, digits):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    anatomy.measure(network, digits, Ball("l_inf", 0.05), **OPTIONS)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    assert all(not module._forward_pre_hooks for module in network.modules())


def test_from_the_shell(network, tmp_path, monkeypatch, capsys):
    state = {"state_dict": network.state_dict(), "arch": network.arch, "epoch": 1}
    save_checkpoint(tmp_path / "net.pth.tar", state)
    line = f"{tmp_path / 'net.pth.tar'} --dataset digits --num_examples 16 --num_steps 1"
    monkeypatch.setattr("sys.argv", ["anatomy", *line.split()])
    assert anatomy.main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(anatomy.ROWS) and "net.pth.tar" in rows[0]


def test_without_batch_norm_there_is_nothing_to_part(digits):
    plain = build_model("small_cnn", num_classes=10)
    with pytest.raises(UserError, match="no BatchNorm"):
        anatomy.measure(plain, digits, Ball("l_inf", 0.05), **OPTIONS)


@pytest.mark.parametrize(
    "line", ["x --epsilon 0", "x --num_examples 1", "x --num_steps 0", "x --step_size 2"]
)
def test_senseless_flags(line):
    with pytest.raises(UserError, match=f"{line.split()[1]} .*: allowed"):
        anatomy.parse(line.split())

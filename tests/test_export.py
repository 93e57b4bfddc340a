"""tools/export.py: what goes under savedModel/, and what stays behind."""

import json
from contextlib import closing

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import save_checkpoint
from tools.export import PICTURES, STEPS, export, portable
from utils.board import Board, draw_grid
from utils.checkpoints import load_checkpoint
from utils.errors import UserError
from utils.networks import load_network, sha256_of


@pytest.fixture
def run(small_cnn, tmp_path):
    """A run folder as the training leaves it; its TensorBoard log is of two processes."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    optimizer = torch.optim.SGD(small_cnn.parameters(), lr=0.1, momentum=0.9)
    small_cnn(torch.rand(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    state = {"epoch": 1, "state_dict": small_cnn.state_dict(), "arch": small_cnn.arch, "acc": 50.0}
    state |= {"optimizer": optimizer.state_dict(), "args": {"data_dir": str(tmp_path), "lr": 0.1}}
    save_checkpoint(folder / "model_best.pth.tar", state)
    command = f"{tmp_path}/MNIST_defense.py --data_dir {tmp_path} --lr 0.1"
    record = {"command": command, "arguments": {"data_dir": str(tmp_path), "lr": 0.1}}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "log.txt").write_text("Seconds\n1\n")
    x = torch.rand(10, 1, 28, 28)
    for steps in (range(600), range(590, 900)):
        with closing(Board(str(folder / "scalars"))) as board:
            board.describe(command, {"lr": 0.1})
            for step in steps:
                board.scalars(step, {"Loss_iter/Loss": steps[0] + step})
            for epoch in range(4):
                picture = draw_grid(x, x, torch.arange(10), torch.arange(10), "0123456789")
                board.add_image("Images/x_adv", picture, epoch)
    return folder


def test_a_run_becomes_a_published_network(run, tmp_path):
    root = tmp_path / "savedModel"
    target = root / "digits" / "lr_0.1"
    export(run, target, root)
    best = target / "model_best.pth.tar"
    network, checkpoint = load_network(best)
    before = load_checkpoint(run / "model_best.pth.tar")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before["state_dict"][name])
    assert "optimizer" not in checkpoint
    assert best.stat().st_size < 0.6 * (run / "model_best.pth.tar").stat().st_size
    line = f"{sha256_of(best)}  digits/lr_0.1/model_best.pth.tar\n"
    assert (root / "SHA256SUMS").read_text() == line
    for path in target.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
    record = json.loads((target / "args.json").read_text())
    assert record["command"] == f"MNIST_defense.py --data_dir {tmp_path.name} --lr 0.1"
    assert record["arguments"] == {"data_dir": tmp_path.name, "lr": 0.1}
    assert (target / "log.txt").read_text() == "Seconds\n1\n"
    events = EventAccumulator(str(target / "scalars"), {"scalars": 0, "images": 0}).Reload()
    points = {event.step: event.value for event in events.Scalars("Loss_iter/Loss")}
    assert len(points) == STEPS and points[0] == 0 and points[899] == 590 + 899
    assert all(value == step + 590 * (step >= 590) for step, value in points.items())
    assert len(events.Images("Images/x_adv")) == PICTURES
    with pytest.raises(UserError, match="allowed is a new folder below savedModel"):
        export(run, target, root)
    with pytest.raises(UserError, match="allowed is a new folder below savedModel"):
        export(run, tmp_path / "elsewhere", root)


def test_of_an_absolute_path_the_last_part_stays():
    values = ["/a/b c/data", "/a/", "./data", "--data_dir=/a/b", "8/255", 0.1, None, "/"]
    kept = ["data", "a", "./data", "--data_dir=b", "8/255", 0.1, None, ""]
    assert list(map(portable, values)) == kept

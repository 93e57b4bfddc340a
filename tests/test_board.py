"""TensorBoard's log: tags and steps as they are read back, pictures, folders that refuse."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.board import Board, draw_grid
from utils.training import FIGURES

PUBLISHED_EPOCH = {
    "Loss_epoch/train_loss",
    "Loss_epoch/test_loss",
    "Loss_epoch/loss_normal",
    "Loss_epoch/loss_grad",
    "Acc_epoch/train_Acc",
    "Acc_epoch/test_acc",
}


def read(log_dir) -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(log_dir), size_guidance=sizes).Reload()


def test_what_is_logged_is_read_back(tmp_path):
    board = Board(str(tmp_path))
    flags = {"epochs": 5, "lr": 0.1, "amp": False, "schedule": [75, 90], "nlabel": None}
    board.describe("python MNIST_defense.py  --epochs 5 a\udcff", flags, ("zero", "один"))
    for step in range(3):
        board.scalars(step, {"Loss_iter/Loss": 1 / (step + 1)})
    board.flush()  # and then the process is gone: no close
    found = read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("Loss_iter/Loss")] == [
        (step, pytest.approx(1 / (step + 1))) for step in range(3)
    ]
    assert found.Tags()["scalars"] == ["Loss_iter/Loss"]
    (card,) = found.Tensors("Run/command/text_summary")
    text = card.tensor_proto.string_val[0].decode()
    assert "python MNIST_defense.py --epochs 5 a?" in text and "1 один" in text
    assert "custom_scalars__config__" in found.Tags()["tensors"]
    board.close()


def test_published_tags_are_those_of_an_epoch():
    assert {tag for _, _, tag, _ in FIGURES} >= PUBLISHED_EPOCH


def test_a_full_disk_ends_in_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    board = Board(str(tmp_path))
    board.scalars(0, {"Loss_iter/Loss": 1.0})
    board.flush()
    (path,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 300, hard))
        with pytest.raises(OSError, match="File too large"):
            for step in range(1, 100):
                board.scalars(step, {"Loss_iter/Loss": 1.0})
                board.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [e.step for e in read(tmp_path).Scalars("Loss_iter/Loss")][:1] == [0]


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 5), (1, 100)])
def test_the_grid_shows_what_it_should(channels, side):
    x = torch.rand(13, channels, side, side)
    x_adv = x.clone()
    x_adv[:, :, 0, 0] += 0.25
    x_adv[:, :, -1, -1] -= 0.125
    labels = torch.arange(13) % 4
    grid = draw_grid(x, x_adv, labels, labels.flip(0), ("a very long name of a class", *"bcd"))
    zoom = max(1, round(84 / side))
    height, width = zoom * side + 20 + 3, zoom * side + 3
    assert grid.dtype == torch.uint8
    assert tuple(grid.shape) == (3, 3 * height + 3, 5 * width + 3)  # five of the thirteen

    def pixel(row, column, y, x_):
        """Middle of an image's pixel."""
        top, left = 3 + row * height, 3 + column * width
        return grid[:, top + y * zoom + zoom // 2, left + x_ * zoom + zoom // 2]

    for column in range(5):
        for row, images in ((0, x), (1, x_adv)):
            expected = (images[column, :, 1, 2].clamp(0, 1) * 255).round().byte()
            assert (pixel(row, column, 1, 2) == expected).all()
        assert (pixel(2, column, 0, 0) == 255).all()  # the largest change
        assert (pixel(2, column, side - 1, side - 1) == 64).all()  # half of it, downwards
        assert (pixel(2, column, 1, 2) == 128).all()  # none


def test_the_grid_of_an_unchanged_image_is_grey():
    x = torch.rand(2, 1, 8, 8)
    grid = draw_grid(x, x, torch.tensor([0, 1]), torch.tensor([0, 0]), ("a", "b"))
    assert (grid[:, -80:-30, 10:80] == 128).all()

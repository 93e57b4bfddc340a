"""TensorBoard's log: published tags, one run, and a resumed run that reads like a straight one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools.thin_events import thin
from utils.board import Board, draw_grid, event_files, records
from utils.errors import UserError

PUBLISHED = {
    "Loss_epoch/train_loss",
    "Loss_epoch/test_loss",
    "Loss_epoch/loss_normal",
    "Loss_epoch/loss_grad",
    "Acc_epoch/train_Acc",
    "Acc_epoch/test_acc",
    "Loss_iter/Loss",
    "Loss_iter/Loss_normal",
    "Loss_iter/Loss_gradient",
    "Loss_iter/grad_part",
}
STEPS = 7  # of an epoch
CLASSES = tuple("0123456789")


def picture(epoch):
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(epoch))
    return x, (x + 0.1).clamp(0, 1), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4])


def log(board, first, last):
    """Log the steps [first, last) of a run, and its epochs 1, 2, ... where they end."""
    board.describe("python MNIST_defense.py --epochs 5", {"epochs": 5, "save_dir": "a|b"})
    for step in range(first, last):
        values = {"loss": 1 / (step + 1), "loss_normal": 0.1, "loss_gradient": step, "grad_part": 2}
        board.iteration(step, values)
        if (step + 1) % STEPS == 0:
            epoch = (step + 1) // STEPS
            board.epoch(
                epoch,
                {
                    "train_loss": 2 / epoch,
                    "test_loss": 3 / epoch,
                    "loss_normal": 1.5,
                    "loss_grad": 10.0,
                    "train_acc": 10.0 * epoch,
                    "test_acc": 9.0 * epoch,
                    "learning_rate": 0.1,
                    "seconds": 12.0,
                    "Robust/test_pgd": 5.0 * epoch,
                    "Robust/val_pgd": None,
                },
            )
            board.images(epoch, *picture(epoch), CLASSES)
            board.flush()


def stream(log_dir):
    """Everything that TensorBoard reads of a run, times aside."""
    events = EventAccumulator(
        str(log_dir), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()
    tags = events.Tags()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["images"]:
        found[tag] = [(e.step, e.encoded_image_string) for e in events.Images(tag)]
    for tag in tags["tensors"]:
        found[tag] = [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)]
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The stream of a run of three epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    board = Board(folder)
    log(board, 0, 3 * STEPS)
    board.close()
    assert len(event_files(folder)) == 1
    return stream(folder)


def test_published_tags(straight):
    assert set(straight) >= PUBLISHED | {
        "Robust/test_pgd",
        "Schedule/learning_rate",
        "Time/seconds_per_epoch",
        "Images/sharpest_point",
        "Run/command/text_summary",
        "custom_scalars__config__",
    }
    assert "Robust/val_pgd" not in straight
    assert [step for step, _ in straight["Loss_epoch/train_loss"]] == [1, 2, 3]
    assert [step for step, _ in straight["Loss_iter/Loss"]] == list(range(3 * STEPS))
    assert b"MNIST_defense.py" in straight["Run/command/text_summary"][0][1]


@pytest.mark.parametrize(
    ("saved", "killed"),
    [
        (0, 3),  # killed before the first checkpoint
        (3, 3),  # killed right after a checkpoint in the middle of an epoch
        (3, 6),
        (3, 2 * STEPS + 2),  # the checkpoint is two epochs old
        (STEPS, STEPS + 3),
        (STEPS, 2 * STEPS),
        (2 * STEPS + 3, 3 * STEPS),  # killed after the last epoch's log, before its checkpoint
    ],
)
def test_a_resumed_run_reads_like_a_straight_one(tmp_path, straight, saved, killed):
    board = Board(tmp_path)
    log(board, 0, killed)
    board.flush()  # and then the process is gone: no close
    resumed = Board(tmp_path, next_epoch=saved // STEPS + 1, next_iteration=saved)
    log(resumed, saved, 3 * STEPS)
    resumed.close()
    assert stream(tmp_path) == straight
    board.close()


def test_many_kills(tmp_path, straight):
    rng = np.random.default_rng(0)
    saved = 0
    boards = []
    for _ in range(4):
        board = Board(tmp_path, saved // STEPS + 1, saved)
        killed = int(rng.integers(saved + 1, 3 * STEPS))
        log(board, saved, killed)
        board.flush()
        boards.append(board)
        saved = int(rng.integers(saved, killed + 1))
    last = Board(tmp_path, saved // STEPS + 1, saved)
    log(last, saved, 3 * STEPS)
    last.close()
    assert stream(tmp_path) == straight
    for board in boards:
        board.close()


@pytest.mark.parametrize("lost", [1, 5, 40, 100])
def test_half_a_record_at_the_end(tmp_path, straight, lost):
    board = Board(tmp_path)
    log(board, 0, 2 * STEPS + 2)
    board.close()
    (path,) = event_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-lost])  # 100 bytes: two steps' records at most
    resumed = Board(tmp_path, next_epoch=3, next_iteration=2 * STEPS)
    log(resumed, 2 * STEPS, 3 * STEPS)
    resumed.close()
    assert stream(tmp_path) == straight


def test_a_fresh_start_leaves_nothing_of_an_earlier_run(tmp_path, straight):
    board = Board(tmp_path)
    log(board, 0, 3 * STEPS)
    board.close()
    (tmp_path / "events.out.tfevents.123.host").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    board = Board(tmp_path)
    log(board, 0, 3 * STEPS)
    board.close()
    assert stream(tmp_path) == straight
    assert len(event_files(tmp_path)) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_resume_in_a_new_folder_describes_the_run(tmp_path):
    board = Board(tmp_path, next_epoch=2, next_iteration=STEPS)
    log(board, STEPS, 2 * STEPS)
    board.close()
    found = stream(tmp_path)
    assert len(found["Run/command/text_summary"]) == len(found["custom_scalars__config__"]) == 1


def test_a_cut_file_keeps_its_records_byte_for_byte(tmp_path):
    board = Board(tmp_path)
    log(board, 0, 2 * STEPS)
    board.close()
    before = [record for record, _ in records(event_files(tmp_path)[0].read_bytes())]
    Board(tmp_path, next_epoch=2, next_iteration=STEPS).close()
    after = [record for record, _ in records(event_files(tmp_path)[0].read_bytes())]
    assert 0 < len(after) < len(before)
    assert [record for record in before if record in set(after)] == after


def test_thinned_events_keep_every_epoch_and_some_steps(tmp_path, straight):
    board = Board(tmp_path / "run")
    log(board, 0, STEPS + 3)
    board.close()
    resumed = Board(tmp_path / "run", next_epoch=2, next_iteration=STEPS)
    log(resumed, STEPS, 3 * STEPS)
    resumed.close()
    thin(tmp_path / "run", tmp_path / "small", steps=5, pictures=2)
    assert len(event_files(tmp_path / "small")) == 1
    found = stream(tmp_path / "small")
    assert set(found) == set(straight)
    for tag, values in straight.items():
        if tag.startswith("Loss_iter/"):
            assert found[tag] == [values[step] for step in (0, 5, 10, 15, 20)]
        elif tag.startswith("Images/"):
            assert found[tag] == [values[0], values[-1]]
        else:
            assert found[tag] == values
    with pytest.raises(UserError, match="holds event files"):
        thin(tmp_path / "run", tmp_path / "small")
    with pytest.raises(UserError, match="holds no event files"):
        thin(tmp_path, tmp_path / "other")


def test_a_board_without_a_folder_writes_nothing():
    board = Board(None)
    log(board, 0, STEPS)
    board.close()


def test_unknown_names_are_refused():
    board = Board(None)
    for write in (board.epoch, board.iteration):
        with pytest.raises(ValueError, match="no tag 'trian_loss'"):
            write(0, {"trian_loss": 1.0})
    with pytest.raises(ValueError, match="no tag"):
        board.iteration(0, {"Robust/test_pgd": 1.0})  # would not be cut at a resume's step
    with pytest.raises(ValueError, match="no tag"):
        board.epoch(0, {"Loss_iter/Loss": 1.0})


def test_a_folder_that_is_a_file_ends_in_one_line(tmp_path):
    (tmp_path / "scalars").write_text("")
    with pytest.raises(UserError, match="scalars"):
        Board(tmp_path / "scalars")


def test_a_full_disk_ends_in_one_line_and_the_log_can_be_resumed(tmp_path, straight, capfd):
    resource = pytest.importorskip("resource")
    board = Board(tmp_path)
    log(board, 0, STEPS + 2)
    size = event_files(tmp_path)[0].stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300, hard))
        with pytest.raises(UserError, match=r"cannot write TensorBoard.s events to .*: File too"):
            log(board, STEPS + 2, 2 * STEPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    board.close()
    assert capfd.readouterr() == ("", "")
    resumed = Board(tmp_path, next_epoch=2, next_iteration=STEPS)
    log(resumed, STEPS, 3 * STEPS)
    resumed.close()
    assert stream(tmp_path) == straight


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 5), (1, 100)])
def test_the_grid_shows_what_it_should(channels, side):
    x = torch.rand(13, channels, side, side)
    moved = x.clone()
    moved[:, :, 0, 0] += 0.25
    moved[:, :, -1, -1] -= 0.125
    classes = ("a very long name of a class", *"bcd")
    labels = torch.arange(13) % 4
    grid = draw_grid(x, moved.clamp(-1, 2), labels, labels.flip(0), classes)
    assert grid.dtype == np.uint8 and grid.shape[2] == 3
    zoom = max(1, round(84 / side))
    cell = zoom * side
    assert grid.shape[0] == 3 * (cell + 24) + 6
    assert grid.shape[1] == 88 + 10 * (cell + 6)  # ten of the thirteen

    def pixel(row, column, y, x_):
        """Middle of an image's pixel."""
        top, left = 6 + row * (cell + 24), 88 + column * (cell + 6)
        return grid[top + y * zoom + zoom // 2, left + x_ * zoom + zoom // 2]

    for column in range(10):
        for row, images in ((0, x), (1, moved.clamp(0, 1))):
            expected = (images[column, :, 1, 2] * 255).round().byte().numpy()
            assert (pixel(row, column, 1, 2) == expected).all()
        assert (pixel(2, column, 0, 0) == 255).all()  # the largest change
        assert (pixel(2, column, side - 1, side - 1) == 64).all()  # half of it, downwards
        assert (pixel(2, column, 1, 2) == 128).all()  # none


def test_the_grid_of_an_unchanged_image_is_grey():
    x = torch.rand(2, 1, 8, 8)
    grid = draw_grid(x, x, torch.tensor([0, 1]), torch.tensor([0, 0]), ("a", "b"))
    assert (grid[-100:-30, 100:120] == 128).all()

"""TensorBoard: one run per training run, with the original's tags and a few more.

A resumed run goes on in the same folder. Before it does, everything that the killed run had written
from the resumed step on is cut out of the old event files, so that no step shows twice.

The events are PyTorch's (`torch.utils.tensorboard.summary`); its SummaryWriter is not used, as it
writes from a thread of its own, which loses what is queued when the process is killed and prints a
traceback when the disk is full. Here an event is in the file when the call returns.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from utils.errors import UserError
from utils.runs import write_atomic

#: Short names of what is logged once an epoch -> tag.
EPOCH_TAGS = {
    "train_loss": "Loss_epoch/train_loss",
    "test_loss": "Loss_epoch/test_loss",
    "loss_normal": "Loss_epoch/loss_normal",
    "loss_grad": "Loss_epoch/loss_grad",
    "train_acc": "Acc_epoch/train_Acc",
    "test_acc": "Acc_epoch/test_acc",
    "learning_rate": "Schedule/learning_rate",
    "lambada": "Schedule/lambada",
    "seconds": "Time/seconds_per_epoch",
}
#: Short names of what is logged once a step -> tag.
ITERATION_TAGS = {
    "loss": "Loss_iter/Loss",
    "loss_normal": "Loss_iter/Loss_normal",
    "loss_gradient": "Loss_iter/Loss_gradient",
    "grad_part": "Loss_iter/grad_part",
}
_ITERATION_PREFIX = "Loss_iter/"
CARD = "Run"
_LAYOUT_TAG = "custom_scalars__config__"

#: Charts of the Custom Scalars page, several curves of the one run in each.
LAYOUT = {
    "Each epoch": {
        title: ["Multiline", tags]
        for title, tags in {
            "loss: training, test": ["Loss_epoch/train_loss", "Loss_epoch/test_loss"],
            "natural loss and flatness": ["Loss_epoch/loss_normal", "Loss_epoch/loss_grad"],
            "accuracy (%): training, held out, test": ["Acc_epoch/.*"],
            "accuracy (%): clean and under PGD, test": ["Acc_epoch/test_acc", "Robust/test_.*"],
            "accuracy (%): running and batch statistics": ["Mode_gap/accuracy_.*"],
            "flatness: running and batch statistics": ["Mode_gap/flatness_.*"],
        }.items()
    },
    "Each step": {
        "loss: total, natural, weighted flatness": [
            "Multiline",
            ["Loss_iter/Loss$", "Loss_iter/Loss_normal", "Loss_iter/grad_part"],
        ],
    },
}


class Board:
    """The TensorBoard log of one training run.

    Args:
        log_dir: folder of the event files (``RUN/scalars``); None writes nothing, for the
            processes of a distributed run that have no log.
        next_epoch: first epoch that this process will log.
        next_iteration: first step (counted over all epochs) that this process will log. What an
            earlier process logged at or after the two is removed; with the zeros of a fresh
            start, that is all.

    Raises:
        UserError: the folder cannot be written, here and in every method.
    """

    def __init__(
        self, log_dir: str | Path | None, next_epoch: int = 0, next_iteration: int = 0
    ) -> None:
        self._log_dir = Path(log_dir) if log_dir is not None else None
        self._file: io.FileIO | None = None
        if self._log_dir is None:
            return
        with self._one_line():
            self._log_dir.mkdir(parents=True, exist_ok=True)
            self._described = _cut(self._log_dir, next_epoch, next_iteration)
            self._file = open(_new_name(self._log_dir), "xb", buffering=0)  # noqa: SIM115
        self._write(Event(file_version="brain.Event:2"))
        if not self._described:
            self._add(summary.custom_scalars(LAYOUT), 0)

    def epoch(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log what is known after an epoch.

        Args:
            step: the epoch.
            values: by short name (:data:`EPOCH_TAGS`) or by full tag, such as ``Robust/val_pgd``;
                None is left out.
        """
        self._scalars(step, values, EPOCH_TAGS)

    def iteration(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log one training step.

        Args:
            step: counted over all epochs, so that epochs do not overwrite each other.
            values: by short name (:data:`ITERATION_TAGS`) or by full ``Loss_iter/...`` tag.
        """
        self._scalars(step, values, ITERATION_TAGS)

    def describe(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Show the command and the arguments as a text card; a resumed run keeps its first one."""
        if self._file is None or self._described:
            return
        rows = "\n".join(f"| {_cell(name)} | {_cell(arguments[name])} |" for name in arguments)
        text = f"    {' '.join(command.split())}\n\n| argument | value |\n| --- | --- |\n{rows}"
        self._add(summary.text(f"{CARD}/command", text), 0)
        self._described = True

    def images(
        self,
        step: int,
        clean: Tensor,
        sharpest: Tensor,
        predictions: Tensor,
        labels: Tensor,
        classes: Sequence[str],
    ) -> None:
        """Log one picture: clean images, their sharpest points, the perturbations.

        Args:
            step: the epoch.
            clean, sharpest: [N, C, H, W] in [0, 1], C = 1 or 3; the first ten are drawn.
            predictions: [N], classes found at ``sharpest``.
            labels: [N], true classes.
            classes: names of the classes.
        """
        if self._file is not None:
            picture = draw_grid(clean, sharpest, predictions, labels, classes)
            tag = "Images/sharpest_point"
            self._add(summary.image(tag, picture, dataformats="HWC"), step)

    def flush(self) -> None:
        """Have everything logged so far on the disk itself; call it before a checkpoint is saved.

        A resumed run cuts what was logged after its checkpoint and cannot bring back what is
        missing before it.
        """
        if self._file is not None:
            with self._one_line():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing is logged from here on."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _scalars(
        self, step: int, values: Mapping[str, float | None], tags: Mapping[str, str]
    ) -> None:
        of_steps = tags is ITERATION_TAGS
        found = Summary()
        for name, value in values.items():
            tag = name if "/" in name else tags.get(name)
            if tag is None or tag.startswith(_ITERATION_PREFIX) is not of_steps:
                raise ValueError(f"no tag {name!r}; known names are {', '.join(tags)}")
            if value is not None:
                found.MergeFrom(summary.scalar(tag, float(value)))
        if found.value:
            self._add(found, step)

    def _add(self, values: Summary, step: int) -> None:
        self._write(Event(step=step, summary=values))

    def _write(self, event: Event) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        rest = record.getbuffer()
        with self._one_line():
            while rest:  # an unbuffered write may take a part only
                rest = rest[self._file.write(rest) :]

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Make of a file that cannot be written the user's one line, and write no more to it."""
        try:
            yield
        except OSError as error:
            self.close()
            raise UserError(
                f"cannot write TensorBoard's events to {self._log_dir}: {error.strerror or error}"
            ) from error


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")


# ---------------------------------------------------------------------------------------------
# Cutting event files at the step where a run is resumed
# ---------------------------------------------------------------------------------------------


def event_files(log_dir: str | Path) -> list[Path]:
    """The event files of a folder, in the order in which TensorBoard reads them."""
    return sorted(path for path in Path(log_dir).glob("*tfevents*") if path.is_file())


def records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """The records of an event file, each as its bytes and as an event.

    A record is its length (uint64, little-endian), a checksum of that (4 bytes), the event and a
    checksum of that (4 bytes). Reading ends where a killed process left half a record.
    """
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 12 + length + 4
        if end > len(data):
            return
        try:
            event = Event.FromString(data[position + 12 : end - 4])
        except DecodeError:
            return
        yield data[position:end], event
        position = end


def _cut(log_dir: Path, next_epoch: int, next_iteration: int) -> bool:
    """Remove the events at or after the next steps; say whether the run's cards are still there.

    Each file is replaced as a whole: a kill in the middle leaves files that are cut and files that
    the next resume will cut.
    """
    described = False
    for path in event_files(log_dir):
        data = path.read_bytes()
        kept = []
        useful = False
        for record, event in records(data):
            tags = [value.tag for value in event.summary.value]
            if all(_is_before(tag, event.step, next_epoch, next_iteration) for tag in tags):
                kept.append(record)
                useful = useful or bool(tags)
                described = described or _LAYOUT_TAG in tags
        if not useful:
            path.unlink()
        elif sum(map(len, kept)) < len(data):
            _replace(path, b"".join(kept))
    return described


def _is_before(tag: str, step: int, next_epoch: int, next_iteration: int) -> bool:
    if tag.startswith(_ITERATION_PREFIX):
        return step < next_iteration
    if tag == _LAYOUT_TAG or tag.startswith(CARD + "/"):
        return next_epoch > 0 or next_iteration > 0
    return step < next_epoch


def _replace(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of the file, at once."""
    # By way of a name without "tfevents": TensorBoard would read a half-written file of that name.
    whole = path.with_name("cut.tmp")
    write_atomic(whole, data)
    os.replace(whole, path)


def _new_name(log_dir: Path) -> Path:
    """An event file's name that TensorBoard reads after those that are there.

    Names begin with the second of their making and are read in alphabetical order, files of one
    second in the order of their process numbers: so the second of the newest file is waited out.
    """
    files = event_files(log_dir)
    newest = files[-1].name.rpartition("tfevents.")[2].split(".")[0] if files else ""
    deadline = time.monotonic() + 2  # a clock that was set back is not waited for
    while newest.isdigit() and int(newest) >= int(time.time()) and time.monotonic() < deadline:
        time.sleep(0.02)
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
    return log_dir / name


# ---------------------------------------------------------------------------------------------
# The picture of clean images, sharpest points and perturbations
# ---------------------------------------------------------------------------------------------

_COLUMNS = 10
_PAPER, _INK, _RIGHT, _WRONG = (255, 255, 255), (60, 60, 60), (20, 120, 60), (200, 30, 30)


def draw_grid(
    clean: Tensor, sharpest: Tensor, predictions: Tensor, labels: Tensor, classes: Sequence[str]
) -> np.ndarray:
    """Three labelled rows of images: clean, sharpest point, perturbation.

    The perturbation is scaled so that its largest value in the picture is black or white; mid-grey
    is no change. Under a clean image stands its class, under a sharpest point the prediction there
    (green: right, red: wrong), under a perturbation its largest change of a pixel.

    Args:
        clean, sharpest: [N, C, H, W] in [0, 1], C = 1 or 3; the first ten are drawn.
        predictions, labels: [N].
        classes: names of the classes.

    Returns:
        uint8 [height, width, 3].
    """
    count = min(_COLUMNS, clean.shape[0])
    clean, sharpest = (images[:count].detach().float().cpu() for images in (clean, sharpest))
    change = sharpest - clean
    peak = change.abs().max().clamp_min(1e-12)
    rows = [clean, sharpest, 0.5 + 0.5 * change / peak]

    height, width = clean.shape[2:]
    zoom = max(1, round(84 / width))
    cell_width, cell_height, caption, margin, gap = zoom * width, zoom * height, 18, 88, 6
    canvas = Image.new(
        "RGB",
        (margin + count * (cell_width + gap), 3 * (cell_height + caption + gap) + gap),
        _PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)

    for row, (title, images) in enumerate(zip(("clean", "sharpest", "change"), rows)):
        top = gap + row * (cell_height + caption + gap)
        draw.text((gap, top + cell_height // 2 - 8), title, fill=_INK, font=font)
        for column in range(count):
            left = margin + column * (cell_width + gap)
            pixels = (images[column].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
            canvas.paste(tile.resize((cell_width, cell_height), Image.NEAREST), (left, top))
            label, found = int(labels[column]), int(predictions[column])
            text, ink = [
                (classes[label], _INK),
                (classes[found], _RIGHT if found == label else _WRONG),
                (f"{float(change[column].abs().max()):.3f}", _INK),
            ][row]
            text = _fit(str(text), cell_width, font)
            middle = left + (cell_width - font.getlength(text)) / 2
            draw.text((middle, top + cell_height + 1), text, fill=ink, font=font)
    return np.asarray(canvas)


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, its end cut off where it is wider than ``width`` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text

"""TensorBoard's log of a training run: published tags, custom charts, pictures of x_adv.

What a run logs again after a resume takes the place of what it logged before: TensorBoard drops a
curve's points from the step on at which it starts again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from utils.errors import UserError

# Charts of the Custom Scalars page, several curves of one run in each.
_CHARTS = {
    "loss: training, test": ["Loss_epoch/train_loss", "Loss_epoch/test_loss"],
    "natural loss and flatness": ["Loss_epoch/loss_normal", "Loss_epoch/loss_grad"],
    "accuracy (%): training, held out, test": ["Acc_epoch/.*"],
    "accuracy (%): clean and under PGD, test": ["Acc_epoch/test_acc", "Robust/test_.*"],
    "accuracy (%): running and batch statistics": ["BN_gap/accuracy_.*"],
    "flatness: running and batch statistics": ["BN_gap/flatness_.*"],
    "each step: total, natural, weighted flatness": ["Loss_iter/(Loss|Loss_normal|grad_part)$"],
}
LAYOUT = {"Charts": {title: ["Multiline", tags] for title, tags in _CHARTS.items()}}
_PICTURES, _SIDE, _CAPTION, _GAP = 10, 84, 18, 3  # of the grid; all but the first in pixels


class Board:
    """The event files of one run.

    Args:
        log_dir: folder of the event files (``RUN/scalars``); None writes nothing, for the
            processes of a distributed run that have no log.

    Raises:
        UserError: the folder cannot be written, here and in every method.
    """

    def __init__(self, log_dir: Path | None) -> None:
        self._log_dir, self._writer = log_dir, None
        if log_dir is not None:
            self._writer = self._try(SummaryWriter, str(log_dir))

    def describe(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Show the command and the arguments as a text card, and define the custom charts."""
        rows = "".join(f"\n| {name} | {_cell(value)} |" for name, value in arguments.items())
        text = f"    {' '.join(command.split())}\n\n| argument | value |\n| --- | --- |{rows}"
        # Protobuf takes no lone surrogates, which stand for bytes of a file name.
        self._call("add_text", "Run/command", text.encode("utf-8", "replace").decode())
        self._call("add_custom_scalars", LAYOUT)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values by tag; None is left out. Epochs and steps both count over the whole run."""
        for tag, value in values.items():
            if value is not None:
                self._call("add_scalar", tag, value, step)

    def images(self, step: int, *grid: Any) -> None:
        """Log one picture, see :func:`draw_grid`."""
        if self._writer is not None:
            self._call("add_image", "Images/x_adv", draw_grid(*grid), step)

    def flush(self) -> None:
        """Bring everything logged so far to the disk; call it before a checkpoint is saved."""
        self._call("flush")

    def close(self) -> None:
        """Close the file; nothing is logged from here on."""
        self._call("close")
        self._writer = None

    def _call(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            self._try(getattr(self._writer, method), *arguments)

    def _try(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            self._writer = None
            raise UserError(
                f"cannot write TensorBoard's events to {self._log_dir}: {error.strerror or error}"
            ) from None


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")


def draw_grid(
    x: Tensor, x_adv: Tensor, predictions: Tensor, labels: Tensor, classes: Sequence[str]
) -> Tensor:
    """Three rows of images: clean with its class, x_adv with the prediction, the perturbation.

    The prediction is green where right and red where wrong. The perturbation is scaled so that its
    largest value is black or white (mid-grey is no change); below it stands its largest change of a
    pixel.

    Args:
        x, x_adv: [N, C, H, W] in [0, 1], C = 1 or 3; the first ten are drawn.
        predictions, labels: [N].
        classes: names of the classes.

    Returns:
        uint8 [3, height, width].
    """
    x, x_adv = (images[:_PICTURES].detach().float().cpu() for images in (x, x_adv))
    change = x_adv - x
    rows = torch.cat([x, x_adv, 0.5 + 0.5 * change / change.abs().max().clamp_min(1e-12)])
    zoom = max(1, round(_SIDE / x.shape[3]))
    tiles = rows.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    tiles = torch.nn.functional.pad(tiles, (0, 0, 0, _CAPTION), value=1.0)
    grid = make_grid(tiles, nrow=len(x), padding=_GAP, pad_value=1.0)
    canvas = to_pil_image((grid.clamp(0, 1) * 255).round().byte())
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    height, width = (size + _GAP for size in tiles.shape[2:])
    for column, (label, found) in enumerate(zip(labels[: len(x)], predictions)):
        captions = (
            (classes[label], "black"),
            (classes[found], "green" if found == label else "red"),
            (f"{float(change[column].abs().max()):.3f}", "black"),
        )
        for row, (text, ink) in enumerate(captions, 1):
            place = _GAP + column * width, row * height - _CAPTION
            draw.text(place, str(text)[: width // 7], fill=ink, font=font)
    return pil_to_tensor(canvas)

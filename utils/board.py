"""TensorBoard's log of a training run: published tags, custom charts, pictures of x_adv.

What a run logs again after a resume takes the place of what it logged before: TensorBoard drops a
curve's points from the step on at which it starts again.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

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
# The grid is shown some 350 pixels wide: more than five images make captions illegible.
_PICTURES, _SIDE, _CAPTION, _GAP = 5, 84, 20, 3  # all but the first in pixels
# PIL's own font knows Latin letters only.
_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


class Board(SummaryWriter):
    """The event files of one run, in its folder ``scalars``."""

    def describe(self, command: str, flags: Mapping[str, Any], classes: Sequence[str] = ()) -> None:
        """A card with the command and the classes, the flags for the HParams page, the charts."""
        names = ", ".join(f"{label} {name}" for label, name in enumerate(classes))
        text = f"    {' '.join(command.split())}\n\nclasses: {names}"
        # Protobuf takes no lone surrogates, which stand for bytes of a file name.
        self.add_text("Run/command", text.encode("utf-8", "replace").decode())
        self.add_custom_scalars(LAYOUT)
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in flags.items()}
        # The second part alone: TensorBoard then puts flags first that differ between the runs.
        self._get_file_writer().add_summary(hparams(plain, {})[1])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values by tag. Epochs and steps both count over the whole run."""
        for tag, value in values.items():
            self.add_scalar(tag, value, step)


@cache
def _font() -> ImageFont.FreeTypeFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, 15)
        except OSError:  # not on this system
            continue
    return ImageFont.load_default(15)


def draw_grid(
    x: Tensor, x_adv: Tensor, predictions: Tensor, labels: Tensor, classes: Sequence[str]
) -> Tensor:
    """Three rows of images: clean with its class, x_adv with the prediction, the perturbation.

    The prediction is green where right and red where wrong. The perturbation is scaled so that its
    largest value is black or white (mid-grey is no change); below it stands its largest change of a
    pixel.

    Args:
        x, x_adv: [N, C, H, W] in [0, 1], C = 1 or 3; the first five are drawn.
        predictions, labels: [N], of the ``classes``.

    Returns uint8 [3, height, width].
    """
    x, x_adv = (images[:_PICTURES].detach().float().cpu() for images in (x, x_adv))
    change = x_adv - x
    rows = torch.cat([x, x_adv, 0.5 + 0.5 * change / change.abs().max().clamp_min(1e-12)])
    zoom = max(1, round(_SIDE / x.shape[3]))
    tiles = rows.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    tiles = torch.nn.functional.pad(tiles, (0, 0, 0, _CAPTION), value=1.0)
    grid = make_grid(tiles, nrow=len(x), padding=_GAP, pad_value=1.0)
    canvas = to_pil_image((grid.clamp(0, 1) * 255).round().byte())
    draw = ImageDraw.Draw(canvas)
    height, width = (size + _GAP for size in tiles.shape[2:])
    for column, (label, found) in enumerate(zip(labels[: len(x)], predictions)):
        captions = (
            (classes[label], "black"),
            (classes[found], "green" if found == label else "red"),
            (f"{float(change[column].abs().max()):.3f}", "black"),
        )
        for row, (text, ink) in enumerate(captions, 1):
            place = _GAP + column * width, row * height - _CAPTION
            draw.text(place, str(text)[: width // 8], fill=ink, font=_font())
    return pil_to_tensor(canvas)

"""The pictures of the README, drawn from run logs and checkpoints.

    python -m tools.pictures curves RUN/log.txt --output images/mnist_curves.png
    python -m tools.pictures surface   --model FILE --undefended FILE --output images/surface.png
    python -m tools.pictures gradients --model FILE --undefended FILE --output images/gradients.png
    python -m tools.pictures radius --model LFR=FILE undefended=FILE --json radius.json \
        --output images/radius.png
    python -m tools.pictures radius --json radius.json --output images/radius.png

Those with networks take --dataset (MNIST) and --data_dir (./data) as the evaluation scripts do.

* curves: accuracy, natural loss and flatness by epoch; several logs lie over each other.
* surface: the loss around test images, along the sign of its gradient and along random signs.
* gradients: test images and the input gradients of two networks, as images.
* radius: accuracy under PGD by epsilon; what was measured is kept as JSON, to be drawn again.

Needs matplotlib (requirements-dev.txt). The same files and flags give the same picture.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.attacks import attack, family, frozen, gradient_budget, logits_of, misclassified, percent
from utils.ball import Ball
from utils.data import DATASETS, ImageSet, classes_in_turn, load_dataset
from utils.errors import UserError, run_script
from utils.lfr import input_gradient
from utils.options import Parser, gpu_ids, integer, one_of, path, pixel, positive_int
from utils.runs import load_network, read_log, sha256_of, write_atomic
from utils.runtime import world
from utils.second_order import Kernels

if TYPE_CHECKING:  # training and evaluation do without matplotlib, and so does --help here
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches, which are 1600 pixels
DPI = 200
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, "#56B4E9", "#E69F00", "#444444")
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"
STYLE = {
    "figure.facecolor": "white",  # readable on GitHub's dark background, too
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


# ---------------------------------------------------------------------------------------------
# What all pictures share


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib with our settings inside, untouched outside.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is not installed; install it with: pip install -r requirements-dev.txt"
        ) from None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of :data:`WIDTH` x ``height`` inches, laid out by itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def save(figure: Figure, output: str | Path) -> None:
    """Write the figure as PNG, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(output, stream.getvalue())
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    print(f"{output}: {width} x {height} pixels, {len(stream.getvalue()) / 1024:.0f} KiB")


def check_output(*files: str | None) -> None:
    """Files that cannot be written are better known before the work than after it.

    Raises:
        UserError: the folder of one of them does not exist.
    """
    for file in filter(None, files):
        if not Path(file).parent.is_dir():
            raise UserError(f"cannot write {file}: there is no folder {Path(file).parent}")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved apart to at least ``gap``, in their order and around their places."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []

    def bottom(group: list[int]) -> float:
        middle = sum(heights[i] for i in group) / len(group)
        return middle - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and (
            bottom(groups[-2]) + gap * len(groups[-2]) > bottom(groups[-1]) + 1e-9 * gap
        ):
            upper = groups.pop()
            groups[-1] += upper
    moved = [0.0] * len(heights)
    for group in groups:
        for place, i in enumerate(group):
            moved[i] = bottom(group) + gap * place
    return moved


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write ``(height, text, colour)`` beside the right end of lines, none over another."""
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    if logarithmic:
        low, high = math.log(low), math.log(high)
    size = axes.get_position().height * axes.figure.get_size_inches()[1]  # inches
    heights = [math.log(height) if logarithmic else height for height, _, _ in labels]
    gap = 0.17 / size
    places = spread([(height - low) / (high - low) for height in heights], gap)
    limit = 1.0  # above is the title
    for i in sorted(range(len(places)), key=lambda i: -places[i]):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    for place, (_, text, colour) in zip(places, labels):
        axes.text(1.015, place, text, color=colour, va="center", transform=axes.transAxes)


def load_suiting(file: str, data: ImageSet, device: torch.device) -> nn.Module:
    """The network of a checkpoint, in eval mode, if it takes the images and knows the classes.

    Raises:
        UserError: the file is refused, or the network is for other images.
    """
    network, _ = load_network(file, device=device)
    network = network.to(memory_format=torch.channels_last)
    arch = getattr(network, "arch", {})
    for what, has, needs in (
        ("channels", data.in_channels, arch.get("in_channels")),
        ("classes", data.num_classes, arch.get("num_classes")),
        ("rows", data.image_size[0], arch.get("image_size")),
    ):
        if needs is not None and has != needs:
            raise UserError(f"{file} is a network for {needs} {what}, {data.name} has {has}")
    return network


def count_of(number: int) -> str:
    return f"{number:,} test image" + ("s" if number > 1 else "")


# ---------------------------------------------------------------------------------------------
# curves


@dataclass(frozen=True)
class Curves:
    """One run as it is drawn.

    Attributes:
        label: of the run, where there are several.
        log: columns by name, one value per epoch.
        attack: what the robust accuracy was measured with, empty where nobody knows.
    """

    label: str
    log: dict[str, list[float]]
    attack: str

    def column(self, name: str) -> list[float]:
        """The column's values; none at all where the run has not measured it."""
        values = self.log.get(name, [])
        return values if any(math.isfinite(value) for value in values) else []

    @property
    def epochs(self) -> range:
        return range(1, 1 + len(self.log["Valid Acc."]))


def read_runs(files: Sequence[str]) -> list[Curves]:
    """The runs whose logs (or folders) these are.

    Raises:
        UserError: one of them is not the log of a run, or has no epoch yet.
    """
    logs = [Path(file) / "log.txt" if Path(file).is_dir() else Path(file) for file in files]
    folders = [log.resolve().parent for log in logs]
    names = [folder.name for folder in folders]
    runs = []
    for log, folder in zip(logs, folders):
        # Runs of the same hyper-parameters differ by the folder above.
        alone = names.count(folder.name) == 1
        label = folder.name if alone else f"{folder.parent.name}/{folder.name}"
        columns = read_log(log)
        needed = {"Train Acc.", "Valid Acc.", "loss normal", "loss gradient"}
        if not needed <= set(columns):
            raise UserError(
                f"{log}: not the log of a run, it has no column {min(needed - {*columns})!r}"
            )
        if not columns["Valid Acc."]:
            raise UserError(f"{log}: no epoch in it yet")
        runs.append(Curves(label, columns, _probe(folder / "args.json")))
    return runs


def _probe(file: Path) -> str:
    """``PGD-20, $\\epsilon$ = 0.3, 500 images``, as the run's args.json says it."""
    try:
        flags = json.loads(file.read_text())["arguments"]
        epsilon = flags.get("probe_epsilon", flags["epsilon"])
        return (
            f"PGD-{flags['probe_steps']:d}, $\\epsilon$ = {epsilon:.3g}, "
            f"{flags['probe_size']:,d} images"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # a log by itself is drawn as well


def draw_curves(runs: Sequence[Curves], rate: bool = False) -> Figure:
    """Accuracy on the left, natural loss and flatness on the right; ``rate``: its course, too."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(4.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    accuracy = figure.add_subplot(grid[:, 0])
    loss = figure.add_subplot(grid[0, 1])
    flatness = figure.add_subplot(grid[1, 1], sharex=loss)
    longest = max(len(run.epochs) for run in runs)
    for axes in (accuracy, loss, flatness):
        axes.set_xlim(1, max(2, longest))
        axes.locator_params(axis="x", integer=True, nbins=7)
    labels = {accuracy: _draw_accuracy(accuracy, runs)}
    if rate:
        _draw_rate(accuracy, runs[0])
    for axes, name, title, unit in (
        (loss, "loss normal", "Natural loss", "nats"),
        (flatness, "loss gradient", "Flatness", "nats per unit intensity"),
    ):
        labels[axes] = []
        for run, colour in zip(runs, _colours(runs)):
            values = run.log[name]
            axes.plot(run.epochs, values, color=colour, marker=_marker(run))
            labels[axes].append((values[-1], f"{values[-1]:.3g}", colour))
        highest = max(max(run.log[name]) for run in runs)
        lowest = min(min(run.log[name]) for run in runs)
        if highest > 20 * lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.08 * highest or 1)
        axes.set_title(title)
        axes.set_ylabel(unit)
    loss.tick_params(labelbottom=False)
    flatness.set_xlabel("epoch")
    figure.draw_without_rendering()  # the layout, which the labels' distances depend on
    for axes, written in labels.items():
        end_labels(axes, written)
    return figure


def _colours(runs: Sequence[Curves]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _marker(run: Curves) -> str | None:
    """A line needs two points to be seen."""
    return "o" if len(run.epochs) == 1 else None


def _draw_accuracy(axes: Axes, runs: Sequence[Curves]) -> list[tuple[float, str, str]]:
    """Draw the left panel; returns the labels of the lines' ends."""
    from matplotlib.lines import Line2D

    kinds = (
        ("Train Acc.", "train", ":", FAINT),
        ("Valid Acc.", "test", "--", BLUE),
        ("Test Robust Acc.", "test, PGD", "-", VERMILLION),
    )
    several = len(runs) > 1
    labels, everything = [], []
    for run, run_colour in zip(runs, _colours(runs)):
        for name, kind, line, own_colour in kinds:
            values = run.column(name)
            if not values or (several and kind == "train"):
                continue
            colour, line = (run_colour, line) if several else (own_colour, "-")
            axes.plot(run.epochs, values, color=colour, linestyle=line, marker=_marker(run))
            everything += [value for value in values if math.isfinite(value)]
            if not several:
                labels.append((values[-1], f"{kind} {values[-1]:.1f}", colour))
        if several:
            last = (run.column("Test Robust Acc.") or run.column("Valid Acc."))[-1]
            labels.append((last, f"{last:.1f}", run_colour))
    low = 0 if min(everything) < 50 else 10 * math.floor(min(everything) / 10)
    axes.set_ylim(low, 100 + 0.02 * (100 - low))
    axes.set_title("Accuracy")
    axes.set_ylabel("%")
    axes.set_xlabel("epoch")
    attack_used = ", ".join(dict.fromkeys(run.attack for run in runs if run.attack))
    if several:
        handles = [Line2D([], [], color=c, label=r.label) for r, c in zip(runs, _colours(runs))]
        handles += [
            Line2D([], [], color=FAINT, linestyle=line, linewidth=1.4, label=kind)
            for name, kind, line, _ in kinds[1:]
            if any(run.column(name) for run in runs)
        ]
        axes.legend(handles=handles, loc="best", fontsize=8.5)
    if attack_used and "Test Robust Acc." in runs[0].log:
        axes.set_title(
            attack_used,
            loc="right",
            fontsize=8.5,
            fontweight="normal",
            color=FAINT,
        )
    return [label for label in labels if math.isfinite(label[0])]


def _draw_rate(axes: Axes, run: Curves) -> None:
    """The learning rate as a faint shape behind the curves, as high as a quarter of the panel."""
    rate = run.log["Learning Rate"]
    # The log holds each epoch's first rate; epoch 1 begins at 0 on the axis of finished epochs.
    starts = range(len(rate) + 1)
    heights = [0.25 * value / max(rate) for value in (*rate, rate[-1])]
    place = {"transform": axes.get_xaxis_transform()}
    axes.fill_between(starts, heights, step="post", color="#EFEFEF", linewidth=0, zorder=0, **place)
    top = rate.index(max(rate))
    left = top < len(rate) / 2
    axes.text(
        max(starts[top], 1.15) if left else starts[top] + 1,
        0.265,
        f"learning rate, at most {max(rate):.2g}",
        fontsize=8,
        color=FAINT,
        ha="left" if left else "right",
        **place,
    )


# ---------------------------------------------------------------------------------------------
# surface


@torch.no_grad()
def loss_surface(
    network: nn.Module, x: Tensor, y: Tensor, signs: Tensor, offsets: Tensor
) -> Tensor:
    """Mean loss at ``x + a * sign(grad L(x)) + b * signs``, projected onto the l_inf ball.

    The ball's radius is the largest offset. Without the projection the corners would lie at twice
    that distance, where no attack may go and no defense promises anything.

    Args:
        network: images to logits, in eval mode.
        x, y: images [N, C, H, W] and labels [N]; every image has its own gradient.
        signs: the other direction, [N, C, H, W] of -1 and 1.
        offsets: the steps along both directions, [P], in units of pixel intensity.

    Returns:
        [P, P] on the CPU, in nats: rows go along the gradient (a), columns along ``signs`` (b).
    """
    ball = Ball("l_inf", float(offsets.abs().max()))
    with frozen(network):
        steepest = input_gradient(network, x, y, Kernels(frozen=True)).sign()
        surface = torch.zeros(len(offsets), len(offsets))
        # One image and one a at a time: a row of the surface is a batch of a good size.
        for image, label, up, across in zip(x, y, steepest, signs):
            for row, a in enumerate(offsets):
                points = image + a * up + offsets.view(-1, 1, 1, 1) * across
                logits = logits_of(network, ball.project(points, image.expand_as(points)))
                surface[row] += F.cross_entropy(
                    logits, label.expand(len(points)), reduction="none"
                ).cpu()
    return surface / len(x)


def draw_surface(surfaces: dict[str, Tensor], offsets: Tensor, note: str) -> Figure:
    """The surfaces of :func:`loss_surface` side by side, by one scale of height and colour."""
    figure = new_figure(4.1)
    highest = max(float(surface.max()) for surface in surfaces.values())
    across, along = torch.meshgrid(offsets, offsets, indexing="xy")
    for number, (name, surface) in enumerate(surfaces.items()):
        axes: Any = figure.add_subplot(1, len(surfaces), number + 1, projection="3d")
        drawn = axes.plot_surface(
            along.numpy(),
            across.numpy(),
            surface.numpy(),
            cmap="viridis",
            vmin=0,
            vmax=highest,
            rcount=len(offsets),
            ccount=len(offsets),
            linewidth=0.15,
            edgecolor="#FFFFFF60",
        )
        axes.set_zlim(0, highest)
        axes.set_title(name, loc="center", y=0.94)
        axes.set_xlabel("along the gradient's sign", labelpad=2)
        axes.set_ylabel("along random signs", labelpad=2)
        edge = float(offsets.max())
        axes.set(xticks=[-edge, 0, edge], yticks=[-edge, 0, edge])
        axes.tick_params(pad=0)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_major_formatter("{x:.3g}")
            axis.set_pane_color((1, 1, 1))
        axes.view_init(elev=24, azim=-128)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.6, pad=0.06, label="cross-entropy (nats)")
    figure.supxlabel(note, fontsize=8.5, color=FAINT)
    return figure


# ---------------------------------------------------------------------------------------------
# gradients


def draw_gradients(images: Tensor, gradients: dict[str, Tensor]) -> Figure:
    """A row of images and below it a row of gradients per network.

    Args:
        images: [N, C, H, W] in [0, 1].
        gradients: [N, C, H, W] by the network's name; channels are added up, since a sign has no
            colour, and every gradient is scaled by its own largest value.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    count, rows = len(images), 1 + len(gradients)
    height, width = images.shape[2:]
    side = min((WIDTH - 1.9) / count, 1.5)
    figure = new_figure(rows * (side * height / width + 0.06) + 0.1)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    panels = figure.subplots(rows, count, squeeze=False)
    for column in range(count):
        picture = images[column].permute(1, 2, 0).squeeze(2).cpu().numpy()
        panels[0, column].imshow(picture, cmap="gray", vmin=0, vmax=1)
        for row, gradient in enumerate(gradients.values(), start=1):
            signed = gradient[column].sum(0).cpu()
            signed = signed / signed.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            panels[row, column].imshow(signed.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=GRID)
    # The scaling image by image hides how large the gradients are: the label says it.
    norms = [gradient.abs().flatten(1).sum(1).mean() for gradient in gradients.values()]
    names = [f"{name}\nmean $L_1$ {float(norm):.2g}" for name, norm in zip(gradients, norms)]
    for axes, name in zip(panels[:, 0], ("image", *names)):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    scale = ScalarMappable(Normalize(-1, 1), cmap="RdBu_r")
    bar = figure.colorbar(
        scale, ax=panels, shrink=0.6, anchor=(0, 0.08), aspect=12, pad=0.015, ticks=[-1, 0, 1]
    )
    bar.ax.set_yticklabels(["lowers\nthe loss", "0", "raises\nthe loss"], fontsize=8.5)
    bar.outline.set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------
# radius


def accuracy_by_epsilon(
    network: nn.Module,
    data: ImageSet,
    epsilons: Sequence[float],
    *,
    dataset: str,
    norm: str = "l_inf",
    restarts: int = 1,
    seed: int = 0,
    batch: int = 200,
) -> Iterator[float]:
    """Accuracy (percent) under PGD at each of the ascending epsilons; 0 is the clean accuracy.

    PGD takes the dataset's own number of steps, whose length grows with epsilon. A point that
    broke an image lies in every larger ball as well, so such images are not attacked again.
    """
    rows = torch.arange(len(data))
    for epsilon in epsilons:
        standing = []
        budget = gradient_budget(
            "PGD", family(dataset, data.in_channels), norm, epsilon=epsilon, restarts=restarts
        )
        for chosen in rows.split(batch) if len(rows) else ():
            at = chosen.to(data.device)
            x = data.float_images(at).contiguous(memory_format=torch.channels_last)
            if epsilon == 0:
                robust = ~misclassified(network, x, data.labels[at])
            else:
                robust = attack(network, x, data.labels[at], budget, seed=seed, index=chosen).robust
            standing.append(chosen[robust.cpu()])
        rows = torch.cat(standing) if standing else rows
        yield percent(len(rows), len(data))


def read_radius(file: str) -> dict[str, Any]:
    """What ``radius --json`` has written.

    Raises:
        UserError: it cannot be read or is something else.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        epsilons = [float(epsilon) for epsilon in found["epsilons"]]
        for network in found["networks"].values():
            if len([float(value) for value in network["robust_accuracy"]]) != len(epsilons):
                raise ValueError
        if not epsilons or not found["networks"]:
            raise ValueError
        _ = f"{found['attack']} {found['dataset']} {found['num_examples']:d} {found['marked']:g}"
    except OSError as error:
        raise UserError(f"{file}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not a file that 'pictures radius --json' has written") from None
    return found


def draw_radius(found: dict[str, Any]) -> Figure:
    """Accuracy by epsilon for every network of :func:`read_radius`."""
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    for number, (name, network) in enumerate(found["networks"].items()):
        axes.plot(
            found["epsilons"],
            network["robust_accuracy"],
            color=COLOURS[number % len(COLOURS)],
            marker="o",
            markersize=4.5,
            label=name,
            clip_on=False,
            zorder=9 - number % 7,  # the first one named lies on top
        )
    axes.set_xlim(0, max(*found["epsilons"], 1e-9))
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"radius $\\epsilon$ of the {_norm_name(found)} ball (pixels lie in [0, 1])")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"Accuracy under {found['attack']}")
    note = f"{found['dataset']}, first {count_of(found['num_examples'])}"
    axes.set_title(note, loc="right", fontsize=8.5, fontweight="normal", color=FAINT)
    if 0 < found["marked"] < max(found["epsilons"]):
        axes.axvline(found["marked"], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "published $\\epsilon$",
            (found["marked"], 25),
            xytext=(-4, 0),
            textcoords="offset points",
            color=FAINT,
            fontsize=8.5,
            rotation=90,
            ha="right",
            va="center",
        )
    axes.legend(loc="best")
    return figure


def _norm_name(found: dict[str, Any]) -> str:
    return {"l_inf": r"$l_\infty$", "l_2": "$l_2$"}.get(found.get("norm", ""), "")


# ---------------------------------------------------------------------------------------------
# Command line


def curves(args: argparse.Namespace) -> None:
    if args.rate and len(args.logs) > 1:
        raise UserError("--rate is for one log")
    save(draw_curves(read_runs(args.logs), args.rate), args.output)


def _compared(
    args: argparse.Namespace, device: torch.device, data: ImageSet
) -> dict[str, nn.Module]:
    files = {"undefended": args.undefended, "LFR": args.model}
    return {name: load_suiting(file, data, device) for name, file in files.items()}


def surface(args: argparse.Namespace) -> None:
    with world(args.gpu_id, args.threads) as here:
        data = load_dataset(args.dataset, args.data_dir, train=False)
        defaults = family(args.dataset, data.in_channels).l_inf
        epsilon = defaults.epsilon if args.epsilon is None else args.epsilon
        data = data.head(args.num_examples).to(here.device)
        networks = _compared(args, here.device, data)
        generator = torch.Generator().manual_seed(args.seed)
        x = data.float_images().contiguous(memory_format=torch.channels_last)
        signs = (torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1).to(here.device)
        offsets = torch.linspace(-epsilon, epsilon, args.points, device=here.device)
        found = {
            name: loss_surface(network, x, data.labels, signs, offsets)
            for name, network in networks.items()
        }
    mean = f", mean of the first {count_of(len(data))}" if len(data) > 1 else ", first test image"
    note = f"{data.name}{mean}; inside the $l_\\infty$ ball, offsets in units of pixel intensity"
    save(draw_surface(found, offsets.cpu(), note), args.output)


def gradients(args: argparse.Namespace) -> None:
    with world(args.gpu_id, args.threads) as here:
        data = load_dataset(args.dataset, args.data_dir, train=False)
        data = data.subset(classes_in_turn(data.labels)[: args.num_examples]).to(here.device)
        x = data.float_images().contiguous(memory_format=torch.channels_last)
        found = {}
        for name, network in _compared(args, here.device, data).items():
            with frozen(network):
                found[name] = input_gradient(network, x, data.labels, Kernels(frozen=True))
    save(draw_gradients(x, found), args.output)


def radius(args: argparse.Namespace) -> None:
    if args.keep and not (args.model and args.json):
        raise UserError("--keep needs --model, the networks to measure, and --json, those to keep")
    if args.model:
        found = _measure_radius(args)
        if args.json:
            write_atomic(args.json, (json.dumps(found, indent=2) + "\n").encode())
    elif args.json:
        found = read_radius(args.json)
    else:
        raise UserError("radius needs --model NAME=FILE to measure, or --json FILE to draw again")
    save(draw_radius(found), args.output)


def _measure_radius(args: argparse.Namespace) -> dict[str, Any]:
    """The figures that are drawn, and what they were measured with."""
    names = [name for name, _ in args.model]
    if len(set(names)) < len(names):
        raise UserError(f"--model: {', '.join(names)}: each name may stand for one network only")
    with world(args.gpu_id, args.threads) as here:
        data = load_dataset(args.dataset, args.data_dir, train=False).head(args.num_examples)
        data = data.to(here.device)
        networks = {name: load_suiting(file, data, here.device) for name, file in args.model}
        defaults = family(args.dataset, data.in_channels).norm(args.norm)
        if args.epsilons is None:
            args.epsilons = [round(defaults.epsilon * sixth / 6, 6) for sixth in range(9)]
        epsilons = sorted(set(args.epsilons))
        result: dict[str, Any] = {
            "dataset": data.name,
            "num_examples": len(data),
            "attack": f"PGD-{defaults.pgd.number}",
            "norm": args.norm,
            "step_per_epsilon": defaults.pgd.size / defaults.epsilon,
            "restarts": args.restarts,
            "seed": args.seed,
            "marked": defaults.epsilon,
            "epsilons": epsilons,
            "networks": {},
        }
        kept = _kept_networks(args, result)
        for name, file in args.model:
            measured = []
            for accuracy in accuracy_by_epsilon(
                networks[name],
                data,
                epsilons,
                dataset=args.dataset,
                norm=args.norm,
                restarts=args.restarts,
                seed=args.seed,
            ):
                here.say(f"{name}: {accuracy:6.2f} % at epsilon {epsilons[len(measured)]:g}")
                measured.append(accuracy)
            result["networks"][name] = {
                "checkpoint_sha256": sha256_of(file),
                "robust_accuracy": measured,
            }
    result["networks"].update(kept)
    return result


def _kept_networks(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of ``--keep`` as ``--json`` has them.

    Raises:
        UserError: it has no such network, or measured it otherwise.
    """
    if not args.keep:
        return {}
    before = read_radius(args.json)
    for key, value in settings.items():
        if key != "networks" and before.get(key) != value:
            raise UserError(
                f"--keep: {args.json} was measured with {key} {before.get(key)}, not {value}"
            )
    for name in args.keep:
        if name not in before["networks"] or name in dict(args.model):
            raise UserError(
                f"--keep {name!r}: allowed is a network of {args.json} that --model leaves out"
            )
    return {name: before["networks"][name] for name in args.keep}


def named_file(text: str) -> tuple[str, str]:
    """``"LFR=model_best.pth.tar"`` -> ``("LFR", "model_best.pth.tar")``."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is NAME=FILE")
    return name, path(file)


def build_parser() -> Parser:
    """The parser of the four pictures."""
    parser = Parser(prog="pictures", description=(__doc__ or "").splitlines()[0])
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")

    def picture(name: str, work: Any, help: str) -> Parser:
        added = pictures.add_parser(name, help=help, description=help)
        added.set_defaults(work=work)
        added.add_argument("--output", type=path, required=True, metavar="FILE", help="PNG file")
        return added

    def add_data(to: Parser, count: int, what: str) -> None:
        to.add_argument(
            "--dataset",
            type=one_of(DATASETS),
            default="MNIST",
            metavar="NAME",
            help=f"{', '.join(DATASETS)} (default: %(default)s)",
        )
        to.add_argument(
            "--data_dir",
            type=path,
            default="./data",
            metavar="DIR",
            help="where the data are (default: %(default)s)",
        )
        to.add_argument(
            "--num_examples",
            type=positive_int,
            default=count,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
        to.add_argument("--gpu_id", type=gpu_ids, default="0", metavar="ID", help="GPU number")
        to.add_argument(
            "--threads",
            type=integer(0, 1024),
            default=0,
            metavar="N",
            help="CPU threads; 0 = PyTorch's own choice",
        )

    def add_pair(to: Parser) -> None:
        to.add_argument(
            "--model",
            type=path,
            required=True,
            metavar="FILE",
            help="checkpoint of the network that was trained with LFR",
        )
        to.add_argument(
            "--undefended",
            type=path,
            required=True,
            metavar="FILE",
            help="checkpoint of the network that was trained without",
        )

    def add_seed(to: Parser, what: str) -> None:
        to.add_argument(
            "--seed",
            type=integer(0, 2**63 - 1),
            default=0,
            metavar="SEED",
            help=f"seed of the random {what} (default: %(default)s)",
        )

    added = picture("curves", curves, "accuracy, natural loss and flatness by epoch")
    added.add_argument("logs", nargs="+", type=path, metavar="LOG", help="log.txt, or its folder")
    added.add_argument("--rate", action="store_true", help="the learning rate's course as well")

    added = picture("surface", surface, "the loss around test images, undefended and LFR")
    add_pair(added)
    add_data(added, 16, "first N test images, whose losses are averaged")
    added.add_argument(
        "--epsilon",
        type=pixel,
        metavar="LENGTH",
        help="how far along each direction (default: the dataset's own epsilon)",
    )
    added.add_argument(
        "--points",
        type=integer(3, 401),
        default=41,
        metavar="N",
        help="points along each direction (default: %(default)s)",
    )
    add_seed(added, "signs")

    added = picture("gradients", gradients, "test images and two networks' input gradients")
    add_pair(added)
    add_data(added, 10, "test images, the classes take turns")

    added = picture("radius", radius, "accuracy under PGD by epsilon")
    added.add_argument(
        "--model",
        type=named_file,
        nargs="+",
        metavar="NAME=FILE",
        help="checkpoints by the name in the legend; without, --json is drawn",
    )
    added.add_argument(
        "--json",
        type=path,
        metavar="FILE",
        help="what was measured: written with --model, read without",
    )
    added.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="NAME",
        help="networks whose figures in --json stay, behind those of --model",
    )
    add_data(added, 500, "first N test images")
    added.add_argument(
        "--epsilons",
        type=pixel,
        nargs="+",
        metavar="RADIUS",
        help="radii (default: nine from 0 to 4/3 of the dataset's own epsilon)",
    )
    added.add_argument(
        "--norm",
        type=one_of(("l_inf", "l_2")),
        default="l_inf",
        metavar="NORM",
        help="l_inf or l_2 (default: %(default)s)",
    )
    added.add_argument(
        "--restarts",
        type=integer(1, 10_000),
        default=1,
        metavar="N",
        help="random starts per image (default: %(default)s)",
    )
    add_seed(added, "starts")
    return parser


def main() -> int:
    """Command line."""
    args = build_parser().parse_args()
    check_output(args.output, getattr(args, "json", None))
    with house_style():
        args.work(args)
    return 0


if __name__ == "__main__":
    run_script(main)

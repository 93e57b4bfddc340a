"""The figures of README and docs, drawn from logs, reports and checkpoints.

    python -m tools.figures curves RUN [RUN ...] --output images/mnist_curves.png
    python -m tools.figures surface --model FILE --undefended FILE --output images/surface.png
    python -m tools.figures gradients --model FILE --undefended FILE --output images/gradients.png
    python -m tools.figures radius --model LFR=FILE AT=FILE --json images/radius.json \
        --output images/radius.png
    python -m tools.figures radius --json images/radius.json --output images/radius.png
    python -m tools.figures cost benchmarks/equal_cost_MNIST.json --output images/mnist_cost.png

Needs matplotlib (requirements-dev.txt).
"""

import argparse
import fnmatch
import io
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.scripts import positive, read_json
from utils.attacks import Settings, family, gradient_budget, misclassified, pgd
from utils.checkpoints import find_checkpoint
from utils.data import ImageSet, classes_in_turn
from utils.datasets import DATASETS, load_dataset
from utils.errors import UserError, run_script
from utils.lfr import Ball, input_gradient
from utils.networks import load_for, sha256_of
from utils.options import number
from utils.progress import Bar
from utils.run_folder import BEST, read_log, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, DPI = 8.0, 200  # inches, pixels per inch
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
FAINT = "#767676"
STYLE = {  # white: readable on GitHub's dark background, too
    "figure.facecolor": "white", "font.size": 9.5, "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure in the house style, sizes in inches; UserError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install -r requirements-dev.txt") from None
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: "Figure", output: Path) -> None:
    """Write the figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, stream.getvalue())


def load_pair(args: argparse.Namespace, data: ImageSet) -> dict[str, nn.Module]:
    """The undefended network and LFR's."""
    pair = {"undefended": args.undefended, "LFR": args.model}
    return {name: load_for(data, file) for name, file in pair.items()}


def curves(args: argparse.Namespace) -> "Figure":
    """Accuracy on the left, natural loss and penalty on the right; a colour for each run."""
    logs = {}
    for path in args.runs:
        log = read_log(path / "log.txt" if path.is_dir() else path)
        if not log.get("Valid Acc."):
            raise UserError(f"{path}: not the log of a run, or no epoch in it")
        name = path.name if path.is_dir() else path.resolve().parent.name
        logs[str(path) if name in logs else name] = log
    figure = new_figure(4.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    accuracy, loss, penalty = (figure.add_subplot(grid[at]) for at in ((slice(2), 0), 1, 3))
    lines = {"Train Acc.": ("train", ":"), "Valid Acc.": ("test", "--"),
             "Test Robust Acc.": ("test, PGD", "-")}  # fmt: skip
    for (name, log), colour in zip(logs.items(), itertools.cycle(COLOURS)):
        epochs = log.get("Epoch", range(1, len(log["Valid Acc."]) + 1))
        for column, (text, style) in lines.items():
            if math.isfinite(last := log.get(column, [math.nan])[-1]):
                label = f"{name}, {text}: {last:.1f}" if len(logs) > 1 else f"{text}: {last:.1f}"
                accuracy.plot(epochs, log[column], style, color=colour, marker=".", label=label)
        for axes, column in ((loss, "loss normal"), (penalty, "loss gradient")):
            axes.plot(epochs, log[column], color=colour, marker=".")
            if min(log[column]) > 0:
                axes.set_yscale("log")
    titles = ("Accuracy", "%"), ("Natural loss", "nats"), ("Penalty", "nats per unit intensity")
    for axes, (title, unit) in zip((accuracy, loss, penalty), titles):
        axes.set(title=title, ylabel=unit)
        axes.locator_params(axis="x", integer=True)
    accuracy.set(xlabel="epoch", ylim=(0, 101))
    penalty.set_xlabel("epoch")
    accuracy.legend(fontsize=8.5)
    return figure


@torch.no_grad()
def loss_surface(network: nn.Module, x: Tensor, y: Tensor, signs: Tensor, at: Tensor) -> Tensor:
    """Mean loss at ``x + a * sign(grad L(x)) + b * signs``, projected onto the l_inf ball.

    Without the projection the corners would lie at twice the radius, where no attack may go.

    Args:
        x, y: images [N, C, H, W] and labels [N]; every image has its own gradient.
        signs: the other direction, [N, C, H, W] of -1 and 1.
        at: a and b, [P], in units of pixel intensity; the largest is the radius.

    Returns [P, P], in nats: rows go along the gradient (a), columns along ``signs`` (b).
    """
    ball, count = Ball("l_inf", float(at.abs().max())), len(at)
    ascent = input_gradient(network, x, y).sign()
    a, b = (axis.reshape(-1, 1, 1, 1) for axis in torch.meshgrid(at, at, indexing="ij"))
    surface = torch.zeros(count, count)
    for image, label, up, across in zip(x, y, ascent, signs):
        points = ball.project(image + a * up + b * across, image.expand(count**2, *image.shape))
        losses = F.cross_entropy(network(points), label.expand(count**2), reduction="none")
        surface += losses.view(count, count)
    return surface / len(x)


def surface(args: argparse.Namespace) -> "Figure":
    """The surfaces of the two networks side by side, by one scale."""
    data = load_dataset(args.dataset, args.data_dir, train=False).head(args.num_examples)
    x = data.float_images()
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    offsets = torch.linspace(-args.epsilon, args.epsilon, args.points)
    found = {name: loss_surface(network, x, data.labels, signs, offsets)
             for name, network in load_pair(args, data).items()}  # fmt: skip
    figure, highest = new_figure(4.1), max(float(values.max()) for values in found.values())
    along, across = torch.meshgrid(offsets, offsets, indexing="ij")
    ends = [-args.epsilon, 0, args.epsilon]
    for place, (name, values) in enumerate(found.items(), 1):
        axes: Any = figure.add_subplot(1, 2, place, projection="3d")
        options = {"cmap": "viridis", "vmin": 0, "vmax": highest, "rcount": 41, "ccount": 41}
        drawn = axes.plot_surface(along.numpy(), across.numpy(), values.numpy(), **options)
        axes.set_title(name, loc="center", y=0.94)
        axes.set(xlabel="along the gradient's sign", ylabel="along random signs")
        axes.set(xticks=ends, yticks=ends, zlim=(0, highest))
        axes.view_init(elev=24, azim=-128)
    figure.colorbar(drawn, ax=figure.axes, shrink=0.6, pad=0.06, label="cross-entropy (nats)")
    note = f"{data.name}, mean of {len(data)} test images; offsets in units of pixel intensity"
    figure.supxlabel(note, fontsize=8.5, color=FAINT)
    return figure


def gradients(args: argparse.Namespace) -> "Figure":
    """A row of images, and below it a row of gradients per network, each by its own scale."""
    data = load_dataset(args.dataset, args.data_dir, train=False)
    data = data.subset(classes_in_turn(data.labels)[: args.num_examples])
    x, count = data.float_images(), len(data)
    rows, options = {"image": x.permute(0, 2, 3, 1)}, {"cmap": "gray", "vmin": 0, "vmax": 1}
    for name, network in load_pair(args, data).items():
        gradient = input_gradient(network, x, data.labels)
        norm = float(gradient.abs().flatten(1).sum(1).mean())
        signed = gradient.sum(1)  # channels are added up: a sign has no colour
        scale = signed.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
        rows[f"{name}\nmean $L_1$ {norm:.2g}"] = signed / scale
    figure = new_figure(len(rows) * (WIDTH - 1.2) / count + 0.1)
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(panels, rows.items()):
        for axes, image in zip(line, images):
            axes.imshow(image.numpy(), **options)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        options = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}  # red raises the loss
    return figure


def measure_radius(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every network under the evaluation scripts' PGD, by epsilon."""
    data = load_dataset(args.dataset, args.data_dir, train=False).head(args.num_examples)
    x, y, defaults = data.float_images(), data.labels, family(args.dataset, data.in_channels)
    epsilons, networks = sorted(args.epsilons), {}
    files = dict(text.partition("=")[::2] for text in args.model)
    if len(files) < len(args.model):
        raise UserError("--model: two networks of one name")
    for name, file in Bar(files.items()):
        file = find_checkpoint(file, BEST)
        network = load_for(data, file)
        robust = [~misclassified(network, x, y)]
        for epsilon in epsilons:  # a point of a small ball lies in every larger one
            budget = gradient_budget("PGD", defaults, Settings(epsilon=epsilon))
            robust.append(robust[-1] & pgd(network, x, y, budget).robust)
        accuracies = [round(100 * float(each.float().mean()), 2) for each in robust]
        networks[name] = {"checkpoint_sha256": sha256_of(file), "robust_accuracy": accuracies}
    about = {"dataset": data.name, "num_examples": len(data)}
    return {**about, "epsilons": [0.0, *epsilons], "networks": networks}


def radius(args: argparse.Namespace) -> "Figure":
    """Accuracy by epsilon for every network; measured with ``--model``."""
    if args.model:
        if args.json.exists():
            read_json(args.json, "networks")  # only what a chart left is replaced
        write_atomic(args.json, (json.dumps(measure_radius(args), indent=1) + "\n").encode())
    found = read_json(args.json, "networks")
    axes = (figure := new_figure(4.2)).add_subplot()
    for (name, entry), colour in zip(found["networks"].items(), itertools.cycle(COLOURS)):
        axes.plot(found["epsilons"], entry["robust_accuracy"], "o-", color=colour, label=name)
    axes.set(ylim=(0, 101), ylabel="accuracy (%)", title="Accuracy under PGD")
    axes.set_xlabel(r"radius $\epsilon$ of the $l_\infty$ ball (pixels lie in [0, 1])")
    note = f"{found['dataset']}, first {found['num_examples']:,} test images"
    axes.set_title(note, loc="right", fontsize=8.5, fontweight="normal", color=FAINT)
    axes.legend()
    return figure


def cost(args: argparse.Namespace) -> "Figure":
    """Held-out robust accuracy by minutes of training: mean of the seeds, and their range."""
    found = read_json(args.json, "runs")
    robust = {run: entry["robust"] for run, entry in found["runs"].items()}
    shown = {name: row["runs"].values() for name, row in found["rows"].items()}
    for name, _, pattern in (text.partition("=") for text in args.runs):
        shown[name] = fnmatch.filter(robust, pattern)
        if len({len(robust[run]) for run in shown[name]}) != 1:
            raise UserError(f"{args.json}: {name}={pattern} is to match runs of one length")
    axes = (figure := new_figure(4.2)).add_subplot()
    for (name, runs), colour in zip(shown.items(), itertools.cycle(COLOURS)):
        curve = torch.tensor([robust[run] for run in runs], dtype=torch.float64)
        minutes = found["minutes"] * torch.linspace(0, 1, curve.shape[1] + 1)[1:]
        mean, low, high = curve.mean(0), curve.amin(0), curve.amax(0)
        seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
        axes.plot(minutes, mean, color=colour, label=f"{name}, {seeds}: {mean[-1]:.1f}")
        axes.fill_between(minutes, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="core-minutes of training", ylabel="held-out accuracy under PGD (%)")
    axes.set(xlim=(0, None), ylim=(0, None), title=found["dataset"])
    figure.legend(loc="outside right upper")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    figures = parser.add_subparsers(dest="figure", required=True)
    add = {}
    for draw in (curves, surface, gradients, radius, cost):
        figure = figures.add_parser(draw.__name__, help=draw.__doc__.splitlines()[0])
        figure.set_defaults(draw=draw)
        add[draw] = figure.add_argument
        add[draw]("--output", type=Path, required=True, help="PNG file")
    add[curves]("runs", nargs="+", type=Path, help="run folders or their logs")
    for draw, count in ((surface, 16), (gradients, 10), (radius, 500)):
        add[draw]("--dataset", default="MNIST", choices=DATASETS)
        add[draw]("--data_dir", type=Path, default=Path("./data"))
        add[draw]("--num_examples", type=positive, default=count, help="test images")
    for draw in (surface, gradients):
        add[draw]("--model", required=True, help="checkpoint of LFR's network")
        add[draw]("--undefended", required=True, help="checkpoint of the undefended network")
    radius_of = number("PIXELS", 0, 1, above=True)[0]
    add[surface]("--epsilon", type=radius_of, default=0.3, help="the largest offset")
    add[surface]("--points", type=positive, default=41, help="along each direction")
    radii = [round(0.05 * i, 2) for i in range(1, 9)]
    add[radius]("--model", nargs="+", metavar="NAME=FILE", help="without, --json is drawn")
    add[radius]("--json", type=Path, required=True, help="what was measured")
    add[radius]("--epsilons", type=radius_of, nargs="+", default=radii)
    add[cost]("json", type=Path, help="results of benchmarks/equal_cost.py")
    add[cost]("--runs", nargs="+", default=[], metavar="NAME=PATTERN", help="runs to draw, too")
    args = parser.parse_args()
    save(args.draw(args), args.output)
    return 0


if __name__ == "__main__":
    run_script(main)

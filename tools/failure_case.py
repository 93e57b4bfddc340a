"""The failure case: run the experiments, keep their logs, print the table, draw the curves.

    python -m tools.failure_case run --data_dir DATA --jobs 2     every variant, three seeds (hours)
    python -m tools.failure_case run --data_dir DATA --only mixed shared --seeds 1000
    python -m tools.failure_case table
    python -m tools.failure_case draw --output images/failure_case.png
    python -m tools.failure_case measure CHECKPOINT --data_dir DATA

``run`` calls `cifar_defense.py` for each variant and seed, resumes what was stopped, and copies
each finished log to `docs/failure_case/`, which is all that ``table`` and ``draw`` need.
``measure`` looks at one checkpoint by both kinds of statistics. See `docs/failure_case.md`.
"""

import argparse
import itertools
import math
import shutil
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tools.figures import COLOURS, new_figure, save
from tools.scripts import ROOT, positive, run, run_each, spread
from utils.datasets import DATASETS, load_dataset
from utils.errors import UserError, run_script
from utils.lfr import Ball, flatness, inner_maximization
from utils.lfr.batch_norm import normalization
from utils.networks import load_for
from utils.run_folder import read_log, write_atomic
from utils.tables import markdown_table
from utils.training import BN_GAP_LIMIT

KEPT = ROOT / "docs" / "failure_case"
# Small enough for an evening: ResNet-8, CIFAR-10's first images at half their width and height.
# The larger the ball, the more the statistics of a perturbed batch can differ from those of a
# clean one, and the sooner the gap opens: within 1,600 steps here, after 70,000 at the original's
# radius.
IMAGES = {"train": 3712, "test": 2000}
EPSILON, WARMUP, EPOCHS = 0.15, 4, 16
COMMON = (
    "cifar_defense.py --dataset folder --no_augment -a resnet --depth 8 --val_size 512 "
    f"--epsilon {EPSILON} --search paper --num_steps 1 --step_size {EPSILON} "
    f"--lambada 0.03 --warmup {WARMUP} --lr 0.1 --lr_schedule constant --train_batch 32 "
    "--probe_size 500 --probe_steps 5 --image_interval 0 --ckpt_interval 0 --test_batch 500"
)

# Name; flags that are changed; what they mean.
_VARIANTS = """
mixed; --bn_mode mixed; the original's mix of modes
shared; --bn_mode shared; all on the clean batch's statistics (the default)
mixed_silu; --bn_mode mixed --activation silu; mixed, SiLU
shared_silu; --bn_mode shared --activation silu; shared, SiLU
shared_silu_steps; --bn_mode shared --activation silu --num_steps 4 --step_size 0.075; shared, \
SiLU, four steps of half the length in the search
mixed_softplus; --bn_mode mixed --activation softplus; mixed, softplus
shared_softplus; --bn_mode shared --activation softplus; shared, softplus
mixed_fast; --bn_mode mixed --search fast; mixed, loss ascent
shared_fast; --bn_mode shared --search fast; shared, loss ascent
batch; --bn_mode batch; each on its own batch's statistics
running; --bn_mode running --lr 0.02; all on running statistics, lr 0.02
group; --bn_mode mixed --norm_layer group; GroupNorm
none; --bn_mode mixed --norm_layer none --lr 0.02; no normalisation, lr 0.02
mixed_20; --bn_mode mixed --depth 20; mixed, ResNet-20
shared_20; --bn_mode shared --depth 20; shared, ResNet-20
"""
VARIANTS = {name: rest for name, *rest in (s.split("; ") for s in _VARIANTS.strip().split("\n"))}
TIMES = {"mixed": 2, "shared": 2, "mixed_20": 2, "shared_20": 2}  # the usual epochs


def small_images(data_dir: Path, place: Path) -> Path:
    """CIFAR-10's first images, each 2 x 2 pixels averaged into one, as an image folder."""
    if place.exists():
        return place
    unfinished = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, count in IMAGES.items():
        data = load_dataset("cifar10", data_dir, train=part == "train").head(count)
        halved = F.avg_pool2d(data.images.float(), 2).round().byte()
        for number, (image, label) in enumerate(zip(halved, data.labels.tolist())):
            folder = unfinished / part / data.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:05d}.png")
    return unfinished.rename(place)


def command(name: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The command of one run; given again, it resumes the run."""
    epochs = TIMES.get(name, 1) * args.epochs
    words = f"{COMMON} {VARIANTS[name][0]} --epochs {epochs} --manualSeed {seed}".split()
    words += ["--data_dir", str(args.data_dir), "--threads", str(args.threads)]
    return [*words, "--checkpoint", str(args.runs_dir / f"{name}_{seed}"), "--resume", "auto"]


def run_all(args: argparse.Namespace) -> None:
    """Train every variant and seed that has no log yet."""

    def train(name: str, seed: int) -> None:
        folder = args.runs_dir / f"{name}_{seed}"
        run(command(name, seed, args), folder.with_suffix(".out"))
        write_atomic(KEPT / f"{name}_{seed}.tsv", (folder / "log.txt").read_bytes())

    args.runs_dir = args.runs_dir.resolve()
    todo = [(name, seed) for seed in args.seeds for name in args.only]
    todo = [(name, seed) for name, seed in todo if not (KEPT / f"{name}_{seed}.tsv").exists()]
    if todo:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        args.data_dir = small_images(args.data_dir, args.runs_dir / "images")
    run_each(train, todo, args.jobs)


def logs(name: str) -> list[dict[str, list[float]]]:
    """The kept logs of a variant, a seed each."""
    paths = sorted(KEPT.glob(f"{name}_*.tsv"))
    return [read_log(path) for path in paths if path.stem.removeprefix(f"{name}_").isdigit()]


def tail(values: Sequence[float]) -> float:
    """Mean over the last quarter of the epochs, since single epochs swing."""
    last = values[-max(1, len(values) // 4) :]
    return statistics.mean([value for value in last if math.isfinite(value)] or [math.nan])


def table(chosen: Iterable[str]) -> str:
    """Markdown: the last quarter of the epochs, mean (and range) of the seeds.

    Epochs with a wide gap are counted run by run, over all epochs, and the first is named.
    "Lowest" is the least test accuracy that a run showed after the warm-up.
    """
    heads = ("variant; what; runs x epochs; train acc.; test acc.; BN gap; epochs with a gap above "
             f"{BN_GAP_LIMIT:g} points; held-out PGD; penalty; lowest test acc.")  # fmt: skip
    rows = [heads.split("; ")]
    for name, runs in ((name, found) for name in chosen if (found := logs(name))):
        columns = "Train Acc.", "Valid Acc.", "BN Gap", "Held-out Robust Acc.", "loss gradient"
        means = [spread([tail(log[column]) for log in runs]) for column in columns]
        epochs = "-".join(str(n) for n in sorted({len(log["Train Acc."]) for log in runs}))
        wide = [[e for e, g in enumerate(log["BN Gap"], 1) if g > BN_GAP_LIMIT] for log in runs]
        firsts = ", ".join(str(each[0]) for each in wide if each)
        counts = ", ".join(str(len(each)) for each in wide)
        counts += f" (from {firsts})" if firsts else ""
        lowest = [min(log["Valid Acc."][WARMUP:], default=math.nan) for log in runs]
        about = [name, VARIANTS[name][1], f"{len(runs)} x {epochs}"]
        rows.append([*about, *means[:3], counts, *means[3:], spread(lowest)])
    return markdown_table(rows, left=(0, 1))


def draw(chosen: Sequence[str], output: Path) -> None:
    """Collapse and cure side by side, from the kept logs."""
    found = {name: logs(name) for name in chosen}
    if missing := [name for name, runs in found.items() if not runs]:
        raise UserError(f"no logs of {', '.join(missing)} in {KEPT}; make them with: run")
    curves = (
        (0, "Train Acc.", "training batches", COLOURS[0]),
        (0, "Valid Acc.", "test set, eval mode", COLOURS[1]),
        (1, "loss gradient", "at x_adv", COLOURS[0]),
    )
    figure = new_figure(5.6, 3.4 * len(found) + 0.8)
    axes = figure.subplots(2, len(found), sharex="col", sharey="row", squeeze=False)
    for (name, runs), (upper, lower) in zip(found.items(), axes.T):
        upper.set_title(textwrap.fill(f"{name}: {VARIANTS[name][1]}", 36), fontsize=10)
        upper.axhline(10, color="#888888", linewidth=0.8, linestyle=":")
        lower.set_xlabel("epoch")
        for (row, quantity, text, colour), log in itertools.product(curves, runs):
            label = text if log is runs[0] else ""
            epochs = range(1, len(log[quantity]) + 1)
            (upper, lower)[row].plot(epochs, log[quantity], color=colour, label=label)
    for (first, *_), label in zip(axes, ("accuracy (%)", "penalty: gradient norm")):
        first.set_ylabel(label)
        first.legend(fontsize=9)
    save(figure, output)


def measure(args: argparse.Namespace) -> str:
    """One checkpoint by running statistics, as it is used, and by batch statistics, as trained.

    Markdown, means over batches of 128 test images. x_adv is found by running statistics and the
    original's search for CIFAR-10.
    """
    data = load_dataset(args.dataset, args.data_dir, train=False).head(args.num_examples)
    network = load_for(data, args.checkpoint)
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        raise UserError(f"{args.checkpoint}: the network has no BatchNorm")
    ball, widths, clean = Ball("l_inf", 0.031), {}, {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        widths[layer] = inputs[0].detach().transpose(0, 1).flatten(1).std(1)

    for layer in layers:
        layer.register_forward_pre_hook(note)
    found: tuple[list, list] = [], []  # by running, by batch statistics
    for rows in torch.arange(len(data)).split(128):
        x, y = data.float_images(rows), data.labels[rows]
        x_adv = inner_maximization(network, x, y, ball, step_size=0.007, num_steps=10)
        for by_batch in (True, False):
            with normalization(network, batch_statistics=by_batch):
                logits = network(x).detach()
                clean = dict(widths) if by_batch else clean
                row = [100 * (logits.argmax(1) == y).float().mean()]
                row += [flatness(network, at, y, ball).detach().mean() for at in (x, x_adv)]
            # The median over the channels of the widest layer.
            wide = widths if by_batch else {each: each.running_var.sqrt() for each in layers}
            ratios = [wide[each] / clean[each].clamp_min(1e-6) for each in layers]
            found[by_batch].append(
                [float(value) for value in (*row, max(r.median() for r in ratios))]
            )
    labels = ("accuracy, clean images (%)", "gradient norm, clean images", "gradient norm, x_adv",
              "widest layer: running statistics, or those of x_adv, / clean batch")  # fmt: skip
    means = ([f"{statistics.mean(column):.2f}" for column in zip(*t)] for t in found)
    head = (str(args.checkpoint), "running statistics", "batch statistics")
    return markdown_table([head, *zip(labels, *means)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="train what has no log yet")
    show = actions.add_parser("table", help="print the table")
    curves = actions.add_parser("draw", help="draw the curves")
    look = actions.add_parser("measure", help="one network by running and by batch statistics")
    add = run.add_argument
    add("--data_dir", type=Path, required=True, help="where cifar10 is")
    add("--runs_dir", type=Path, default=Path("runs/failure_case"), help="run folders")
    add("--seeds", type=positive, nargs="+", default=[1000, 1001, 1002])
    add("--epochs", type=positive, default=EPOCHS, help="of a run")
    add("--jobs", type=positive, default=1, help="runs at the same time")
    add("--threads", type=positive, default=1, help="CPU threads of a run")
    curves.add_argument("--output", type=Path, default=Path("images/failure_case.png"), help="PNG")
    for action in (run, show, curves):
        action.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add = look.add_argument
    add("checkpoint", type=Path)
    add("--dataset", choices=DATASETS, default="cifar10", help="whose test images to use")
    add("--data_dir", type=Path, default=Path("./data"))
    add("--num_examples", type=positive, default=512, help="first test images")
    args = parser.parse_args()
    if args.action == "draw":
        draw(args.only, args.output)
    elif args.action == "measure":
        print(measure(args))
    else:
        if args.action == "run":
            run_all(args)
        print(table(args.only))
    return 0


if __name__ == "__main__":
    run_script(main)

"""The failure case: run the experiments, keep their logs, draw the curves, print the table.

python -m tools.failure_case run --data_dir DATA --jobs 2     every variant, three seeds (hours)
python -m tools.failure_case run --data_dir DATA --only mixed shared --seeds 1000
python -m tools.failure_case table                             from the logs that are kept
python -m tools.failure_case draw --output images/failure_case.png

One thing is changed at a time. ``run`` calls `cifar_defense.py` as a user would, one process to a
variant and seed, goes on where a stopped run was, and copies each finished run's log to
`docs/failure_case/`, from which ``table`` and ``draw`` work alone.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from tools.pictures import house_style, new_figure, save
from utils.data import load_dataset
from utils.errors import UserError, run_script
from utils.runs import CHECKPOINT, read_log, write_atomic
from utils.training import PARTED

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "failure_case"
SEEDS = (1000, 1001, 1002)

# Small enough for an evening, large enough to part: a ResNet of depth 8, the first 3,712 training
# images (512 of them held out) and the first 2,000 test images, at half their width and height.
# The larger the ball, the more the statistics of a perturbed batch can differ from those of a
# clean one, and the sooner the two networks part: within 1,600 steps here, after 70,000 at the
# original's radius.
IMAGES = {"train": 3712, "test": 2000}
EPSILON, WARMUP, EPOCHS = 0.15, 4, 16
COMMON = (
    "cifar_defense.py --dataset folder --no_augment -a resnet --depth 8 --val_size 512 "
    f"--epsilon {EPSILON} --search paper --num_steps 1 --step_size {EPSILON} "
    f"--lambada 0.03 --warmup {WARMUP} --lr 0.1 --lr_schedule constant --train_batch 32 "
    "--probe_size 500 --probe_steps 5 --image_interval 0 --ckpt_interval 0 --test_batch 500"
)


@dataclass(frozen=True)
class Variant:
    """One row of the table: what is changed, and in which group it stands."""

    name: str
    flags: str
    says: str
    times: int = 1  # as many epochs as the others


VARIANTS = (
    Variant("mixed", "--bn_mode mixed", "the original's mix of modes", times=2),
    Variant("shared", "--bn_mode shared", "all on the clean batch's statistics (the default)"),
    Variant("mixed_silu", "--bn_mode mixed --activation silu", "mixed, SiLU"),
    Variant("shared_silu", "--bn_mode shared --activation silu", "shared, SiLU"),
    Variant(
        "shared_silu_steps",
        "--bn_mode shared --activation silu --num_steps 4 --step_size 0.075",
        "shared, SiLU, four steps of half the length in the search",
    ),
    Variant("mixed_softplus", "--bn_mode mixed --activation softplus", "mixed, softplus"),
    Variant("shared_softplus", "--bn_mode shared --activation softplus", "shared, softplus"),
    Variant("mixed_fast", "--bn_mode mixed --search fast", "mixed, loss ascent"),
    Variant("shared_fast", "--bn_mode shared --search fast", "shared, loss ascent"),
    Variant("batch", "--bn_mode batch", "each on its own batch's statistics"),
    Variant("running", "--bn_mode running", "all on running statistics"),
    Variant("group", "--bn_mode mixed --norm_layer group", "GroupNorm"),
    Variant("none", "--bn_mode mixed --norm_layer none --lr 0.02", "no normalisation, lr 0.02"),
    Variant("mixed_20", "--bn_mode mixed --depth 20", "mixed, ResNet-20", times=2),
    Variant("shared_20", "--bn_mode shared --depth 20", "shared, ResNet-20", times=2),
    Variant(
        "shared_long",
        "--bn_mode shared --lr_schedule step --gamma 0.1",
        "the default five times as long, with a decay of the learning rate",
        times=5,
    ),
)


def kept_log(variant: Variant, seed: int) -> Path:
    """Where the log of a finished run lies."""
    return KEPT / f"{variant.name}_{seed}.tsv"


def small_images(data_dir: Path, place: Path) -> Path:
    """CIFAR-10's first images, each 2 x 2 pixels averaged into one, as an image folder.

    Written once: the folder gets its name when it is whole.
    """
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
    unfinished.rename(place)
    return place


def run_folder(variant: Variant, seed: int, args: argparse.Namespace) -> Path:
    """Where a run is made."""
    return Path(args.runs_dir) / f"{variant.name}_{seed}"


def command(variant: Variant, seed: int, args: argparse.Namespace) -> list[str]:
    """The command of one run."""
    folder = run_folder(variant, seed, args)
    words = [*COMMON.split(), *variant.flags.split()]
    epochs = variant.times * args.epochs
    words += ["--epochs", str(epochs), "--manualSeed", str(seed)]
    if "step" in variant.flags.split():
        words += ["--schedule", str(max(1, epochs * 5 // 6))]
    words += ["--data_dir", str(args.data_dir), "--checkpoint", str(folder)]
    words += ["--threads", str(args.threads)]
    if (folder / CHECKPOINT).exists():
        words += ["--resume", str(folder / CHECKPOINT)]
    return words


def run_logged(command: Sequence[str], out: Path) -> int:
    """Run one of the repository's scripts, its output appended to a file; returns its exit code."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as stream:
        print(f"$ python {shlex.join(command)}", file=stream, flush=True)
        ended = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=stream, stderr=stream, check=False
        )
    return ended.returncode


def run_one(variant: Variant, seed: int, args: argparse.Namespace) -> str | None:
    """Train one variant with one seed; returns what went wrong, if anything did."""
    words = command(variant, seed, args)
    folder = run_folder(variant, seed, args)
    out = folder.with_name(f"{folder.name}.out")
    if code := run_logged(words, out):
        return f"{variant.name}, seed {seed}: exit code {code}, see {out}"
    write_atomic(kept_log(variant, seed), (folder / "log.txt").read_bytes())
    return None


def run_all(args: argparse.Namespace) -> int:
    """Every variant and seed that has no log yet."""
    chosen = pick(args.only)
    args.runs_dir = args.runs_dir.resolve()
    waiting = [(v, seed) for seed in args.seeds for v in chosen]
    waiting = [(v, seed) for v, seed in waiting if args.again or not kept_log(v, seed).exists()]
    if waiting:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        args.data_dir = small_images(args.data_dir, args.runs_dir / "images")
    failures = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(waiting), disable=None) as bar:
        for problem in pool.map(lambda one: run_one(*one, args), waiting):
            bar.update()
            if problem:
                failures.append(problem)
                bar.write(problem, file=sys.stderr)
    print(table(chosen))
    return 1 if failures else 0


def pick(names: Iterable[str] | None) -> list[Variant]:
    """The variants called so, in this order; all of them without names."""
    by_name = {variant.name: variant for variant in VARIANTS}
    return [by_name[name] for name in (by_name if names is None else names)]


def logs(variant: Variant) -> dict[int, dict[str, list[float]]]:
    """The kept logs of a variant by seed."""
    found = {}
    for path in sorted(KEPT.glob(f"{variant.name}_[0-9]*.tsv")):
        seed = path.stem.removeprefix(f"{variant.name}_")
        if seed.isdigit():
            found[int(seed)] = read_log(path)
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and in brackets the least and the largest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    text = f"{statistics.mean(finite):.{digits}f}"
    if len(finite) > 1:
        text += f" ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
    return text


def tail(values: Sequence[float]) -> float:
    """Mean over the last quarter of the epochs: single epochs swing. nan says nothing."""
    last = values[-max(1, len(values) // 4) :]
    finite = [value for value in last if math.isfinite(value)]
    return statistics.mean(finite) if finite else math.nan


def parted(gaps: Sequence[float]) -> list[int]:
    """The epochs, from 1, in which the modes differ by more than the training warns of."""
    return [epoch for epoch, gap in enumerate(gaps, 1) if gap > PARTED]


# heads of the columns that the README shows
SHORT = "what; runs x epochs; train acc.; test acc.; gap of the modes; epochs parted; penalty"


def table(chosen: Sequence[Variant], epoch: int | None = None, short: bool = False) -> str:
    """Markdown: the last quarter of the epochs up to one (default: all), mean (and range) of seeds.

    "Parted" counts, run by run and over all epochs, those in which the modes differ by more than
    20 points, as the training itself warns, and names the first where there are any.
    "Lowest" is the least test accuracy that a run showed after the warm-up.
    """
    heads = (
        "variant",
        "what",
        "runs x epochs",
        "train acc.",
        "test acc.",
        "held-out acc., batch statistics",
        "gap of the modes",
        "epochs parted",
        "held-out PGD",
        "penalty",
        "lowest test acc.",
    )
    shown = [place for place, head in enumerate(heads) if not short or head in SHORT.split("; ")]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells[place] for place in shown) + " |"

    lines = [line(heads), "|" + " --- |" * len(shown)]
    for variant in chosen:
        by_seed = [
            {name: values[:epoch] for name, values in log.items()} for log in logs(variant).values()
        ]
        if not by_seed:
            continue

        def column(name: str, by_seed: list[dict[str, list[float]]] = by_seed) -> str:
            return spread([tail(log[name]) for log in by_seed])

        # Without BatchNorm there is one mode and no gap.
        batch = [
            tail(log["Val Acc."]) + (0 if math.isnan(gap := tail(log["Mode Gap"])) else gap)
            for log in by_seed
        ]
        epochs = sorted({len(log["Train Acc."]) for log in by_seed})
        apart = [parted(log["Mode Gap"]) for log in by_seed]
        counts = ", ".join(str(len(each)) for each in apart)
        firsts = ", ".join(str(each[0]) for each in apart if each)
        cells = (
            variant.name,
            variant.says,
            f"{len(by_seed)} x {'-'.join(map(str, epochs))}",
            column("Train Acc."),
            column("Valid Acc."),
            spread(batch),
            column("Mode Gap"),
            counts + (f" (from {firsts})" if firsts else ""),
            column("Val Robust Acc."),
            column("loss gradient"),
            spread([min(log["Valid Acc."][WARMUP:], default=math.nan) for log in by_seed]),
        )
        lines.append(line(cells))
    return "\n".join(lines)


def draw(args: argparse.Namespace) -> int:
    """Collapse and cure side by side, from the kept logs."""
    chosen = [v for v in pick(args.only) if logs(v)]
    if not chosen:
        raise UserError(f"no logs of these variants in {KEPT}; make them with: run")
    quantities = (
        ("accuracy (%)", ("Train Acc.", "Valid Acc."), ("training batches", "test set, eval mode")),
        ("penalty: gradient norm", ("loss gradient",), ("at the points found",)),
    )
    figure = new_figure(5.6)
    figure.set_figwidth(3.4 * len(chosen) + 0.8)
    axes = figure.subplots(len(quantities), len(chosen), sharex="col", sharey="row", squeeze=False)
    for column, variant in enumerate(chosen):
        title = textwrap.fill(f"{variant.name}: {variant.says}", 36)
        axes[0][column].set_title(title, fontsize=10)
        for row, (label, names, said) in enumerate(quantities):
            axis = axes[row][column]
            for name, words, colour in zip(names, said, ("#4477aa", "#cc3311")):
                for number, log in enumerate(logs(variant).values()):
                    epochs = range(1, len(log[name]) + 1)
                    axis.plot(epochs, log[name], color=colour, label="" if number else words)
            if column == 0:
                axis.set_ylabel(label)
                axis.legend(frameon=False, fontsize=9)
        axes[0][column].axhline(10, color="#888888", linewidth=0.8, linestyle=":")
        axes[-1][column].set_xlabel("epoch")
        axes[-1][column].xaxis.get_major_locator().set_params(integer=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, args.output)
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    names = [variant.name for variant in VARIANTS]
    run = actions.add_parser("run", help="train what has no log yet")
    run.add_argument("--data_dir", type=Path, required=True, help="where cifar10 is")
    run.add_argument("--runs_dir", type=Path, default=Path("runs/failure_case"), help="run folders")
    run.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="one run for each")
    run.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of a run")
    run.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    run.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    run.add_argument("--again", action="store_true", help="also those that have a log")
    show = actions.add_parser("table", help="print the table")
    show.add_argument("--epoch", type=int, default=None, help="after this epoch; default: the last")
    show.add_argument("--short", action="store_true", help="fewer columns: the README's table")
    picture = actions.add_parser("draw", help="draw the curves")
    picture.add_argument("--output", type=Path, default=Path("images/failure_case.png"), help="PNG")
    for action in (run, show, picture):
        action.add_argument("--only", nargs="+", choices=names, help="these variants")
    args = parser.parse_args(argv)
    for flag in ("epochs", "jobs", "threads", "epoch"):
        value = getattr(args, flag, None)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed is 1 or more")
    return args


def main() -> int:
    args = parse()
    if args.action == "run":
        return run_all(args)
    if args.action == "draw":
        with house_style():
            return draw(args)
    print(table(pick(args.only), args.epoch, args.short))
    return 0


if __name__ == "__main__":
    run_script(main)

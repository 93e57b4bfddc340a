"""Train a published network again, evaluate it, and hold it against the published figures.

    python -m tools.reproduce mnist --data_dir DATA      # or: make reproduce-mnist DATA=DATA
    python -m tools.reproduce cifar --data_dir DATA      # or: make reproduce-cifar DATA=DATA
    python -m tools.reproduce mnist --smoke              # the same way on a few digits, seconds

Runs the scripts by the commands a user would type; each is printed before it runs. Interrupted, the
same command goes on where it was: training from its checkpoint, evaluation from its verdicts. Ends
with one table, and with exit code 1 if a figure falls below the published one by more than its
spread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError, run_script
from utils.library_attacks import library_version
from utils.options import Parser, gpu_ids, integer, one_of, path, positive_int
from utils.runs import BEST, CHECKPOINT, read_log, sha256_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """A published figure and how far another machine or seed may be from it."""

    value: float
    spread: float


@dataclass(frozen=True)
class Recipe:
    """How a published network was trained, and what came of it.

    Attributes:
        train, evaluate: the scripts.
        flags: of the training, all that differ from the script's defaults.
        smoke: flags that come after them in a smoke test; the scripts are then MNIST's, which know
            the digits.
        expected: "clean", "pgd" and "autoattack", in percent of the first ``num_examples`` test
            images, and "minutes" of training; None is not measured yet.
        num_examples: test images that the expected figures were measured on.
        stages: flags that the trainings, one after the other in the same folder, differ in; a
            stage that is done already says so and ends.
    """

    train: str
    evaluate: str
    flags: str
    smoke: str
    expected: Mapping[str, Figure | None]
    num_examples: int = 1000
    stages: tuple[str, ...] = ("",)


NOT_YET: dict[str, Figure | None] = dict.fromkeys(("clean", "pgd", "autoattack", "minutes"))
SMOKE = (
    "--dataset digits --epochs 1 --warmup 1 --max_steps 2 --train_batch 16 --val_size 16 "
    "--probe_size 8 --probe_steps 1 --image_interval 0"
)
RECIPES = {
    "mnist": Recipe(
        train="MNIST_defense.py",
        evaluate="MNIST_eval.py",
        flags="--dataset MNIST --search fast --lr 0.1 --lr_schedule onecycle --warmup 2 "
        "--lambada 0.02 --ema 0.999 --probe_steps 20 --probe_size 1000",
        # Going on with a longer schedule raises the learning rate again, to half its peak and less.
        stages=(
            "--epochs 24",
            "--epochs 36",
            "--epochs 48 --epsilon 0.33 --probe_epsilon 0.3",
            "--epochs 72 --epsilon 0.33 --probe_epsilon 0.3",
        ),
        smoke=SMOKE,
        expected={
            "clean": Figure(99.3, 0.3),
            "pgd": Figure(96.2, 1.0),
            "autoattack": Figure(92.7, 1.5),
            "minutes": Figure(252, 130),
        },
    ),
    "cifar": Recipe(
        train="cifar_defense.py",
        evaluate="cifar_eval.py",
        flags="-a resnet --depth 20 --activation silu --search fast --amp "
        "--lr 0.2 --lr_schedule onecycle --lambada 0.02 --warmup 1 --epochs 12 --ema 0.998 "
        "--probe_size 1000",
        smoke=f"{SMOKE} --depth 8",
        expected={
            "clean": Figure(65.9, 1.5),
            "pgd": Figure(39.4, 1.5),
            "autoattack": Figure(35.6, 1.5),
            "minutes": Figure(55, 30),
        },
    ),
}
ATTACKS = {"pgd": "PGD", "autoattack": "AutoAttack"}
# AutoAttack asks thousands of times about an image that stands; a smoke test has a few images.
SMOKE_EXAMPLES = 2


def run(command: list[str]) -> None:
    """Run one of the repository's scripts, its output as the user would see it.

    Raises:
        UserError: the script failed; it has said why.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # Ctrl-C went to the script as well, which saves its state and leaves
    if code == 130:
        raise UserError(f"{command[0]} was interrupted; the same command goes on where it was")
    if code:
        raise UserError(f"{command[0]} ended with exit code {code}")


def training_command(
    recipe: Recipe, stage: str, args: argparse.Namespace, folder: Path
) -> list[str]:
    """The training script and its flags; goes on with the run that the folder holds, if any."""
    script = RECIPES["mnist"].train if args.smoke else recipe.train
    command = [script, *recipe.flags.split(), *stage.split()]
    command += recipe.smoke.split() if args.smoke else ()
    command += ["--data_dir", args.data_dir, *_machine(args), "--checkpoint", str(folder)]
    if (folder / CHECKPOINT).exists():
        command += ["--resume", str(folder)]
    return command


def evaluation_command(recipe: Recipe, args: argparse.Namespace, folder: Path) -> list[str]:
    """The evaluation script and its flags: the published PGD, and AutoAttack where there is one."""
    script = RECIPES["mnist"].evaluate if args.smoke else recipe.evaluate
    command = [script, "--model_path", str(folder / BEST)]
    command += ["--attack_method", *attacks_here(), "--num_examples", str(args.num_examples)]
    command += ["--dataset", "digits"] if args.smoke else []
    return [
        *command,
        "--data_dir",
        args.data_dir,
        *_machine(args),
        "--output",
        str(results(folder)),
    ]


def _machine(args: argparse.Namespace) -> list[str]:
    return ["--gpu_id", args.gpu_id, "--threads", str(args.threads)]


def results(folder: Path) -> Path:
    """Where the evaluation of a run goes."""
    return folder / "results.json"


def attacks_here() -> list[str]:
    """PGD, and AutoAttack where its package is installed."""
    try:
        library_version()
    except UserError:
        return ["PGD"]
    return list(ATTACKS.values())


def is_evaluated(folder: Path, num_examples: int) -> bool:
    """Whether the folder's results are those of its network, these attacks and these images."""
    return holds(results(folder), folder / BEST, attacks_here(), num_examples)


def holds(result: Path, checkpoint: Path, attacks: Sequence[str], num_examples: int) -> bool:
    """Whether a file of results is of this network, these attacks and these images."""
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
        return (
            found["checkpoint_sha256"] == sha256_of(checkpoint)
            and min(num_examples, found["test_set"]) == found["num_examples"]
            and set(attacks) <= set(found["attacks"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def measured_figures(folder: Path) -> dict[str, float | None]:
    """Accuracies in percent and minutes of training; None is not measured.

    The minutes are those of the training steps by the run's log, so that they are the same whether
    or not the run was interrupted; they leave out what watching the run takes.
    """
    try:
        found: dict[str, Any] = json.loads(results(folder).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{results(folder)}: {(error.strerror or str(error)).lower()}") from None
    figures: dict[str, float | None] = {"clean": found["clean_accuracy"]}
    for name, attack in ATTACKS.items():
        figures[name] = found["attacks"].get(attack, {}).get("robust_accuracy")
    figures["minutes"] = sum(read_log(folder / "log.txt")["Seconds"]) / 60
    return figures


def shortfalls(
    measured: Mapping[str, float | None], expected: Mapping[str, Figure | None]
) -> list[str]:
    """A line for every accuracy below the expected one by more than its spread."""
    lines = []
    for name in ("clean", *ATTACKS):
        value, wanted = measured.get(name), expected.get(name)
        if value is None or wanted is None:
            continue
        # Accuracies are tenths of percents: rounding must not decide.
        if not value >= wanted.value - wanted.spread - 1e-9:
            lines.append(f"{name}: {value:.2f} %, expected {wanted.value:g} ± {wanted.spread:g} %")
    return lines


def table(measured: Mapping[str, float | None], expected: Mapping[str, Figure | None]) -> str:
    """The measured and the expected row, aligned."""

    def cell(value: float | Figure | None) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "-"
        return (
            f"{value.value:g} ± {value.spread:g}" if isinstance(value, Figure) else f"{value:.1f}"
        )

    heads = {"clean": "clean", "pgd": "PGD", "autoattack": "AutoAttack", "minutes": "minutes"}
    rows = [("", *heads.values())]
    rows += [("measured", *(cell(measured.get(name)) for name in heads))]
    rows += [("expected", *(cell(expected.get(name)) for name in heads))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{text:{'<' if column == 0 else '>'}{widths[column]}}"
            for column, text in enumerate(row)
        )
        for row in rows
    )


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="reproduce", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("recipe", type=one_of(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    add(
        "--data_dir",
        type=path,
        default="./data",
        metavar="DIR",
        help="where the data are or are downloaded to (default: %(default)s)",
    )
    add(
        "--num_examples",
        type=positive_int,
        metavar="N",
        help="evaluate on the first N test images (default: as many as the expected figures)",
    )
    add(
        "--runs_dir",
        type=path,
        default="runs/reproduce",
        metavar="DIR",
        help="folder of the runs (default: %(default)s)",
    )
    add("--smoke", action="store_true", help="a few digits in place of the data set, two steps")
    add("--gpu_id", type=gpu_ids, default="0", metavar="ID", help="GPU number")
    add(
        "--threads",
        type=integer(0, 1024),
        default=0,
        metavar="N",
        help="CPU threads; 0 = PyTorch's own choice",
    )
    return parser


def main() -> int:
    """Train, evaluate, compare; 1 if a figure falls short."""
    args = build_parser().parse_args()
    recipe = RECIPES[args.recipe]
    # The scripts run in the repository's root; the user's folders are where he stands.
    args.data_dir = os.path.abspath(args.data_dir)
    folder = Path(args.runs_dir).resolve() / (f"{args.recipe}_smoke" if args.smoke else args.recipe)
    if args.num_examples is None:
        args.num_examples = SMOKE_EXAMPLES if args.smoke else recipe.num_examples

    for stage in recipe.stages:
        run(training_command(recipe, stage, args, folder))
    if "AutoAttack" not in attacks_here():
        print("\nAutoAttack is skipped: pip install pyautoattack==0.2.0")
    if is_evaluated(folder, args.num_examples):
        print(f"\n{results(folder)} is this network's evaluation already")
    else:
        run(evaluation_command(recipe, args, folder))

    measured = measured_figures(folder)
    # Other data or another number of images has other figures.
    comparable = not args.smoke and args.num_examples == recipe.num_examples
    print(f"\n{table(measured, recipe.expected if comparable else NOT_YET)}")
    print(f"accuracy (%) on the first {args.num_examples:,} test images; minutes of training")
    if not comparable:
        print("not compared: the expected figures are for other images")
        return 0
    if not any(recipe.expected.values()):
        print("not compared: the expected figures have not been measured yet")
    for line in (missed := shortfalls(measured, recipe.expected)):
        print(f"below what is expected: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    run_script(main)

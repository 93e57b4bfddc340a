"""Searches and defenses given the same minutes of training, compared by AutoAttack.

    python -m benchmarks.equal_minutes --data_dir DATA --minutes 6 --output FILE.json
    python -m benchmarks.equal_minutes --dataset digits --minutes 1 --only paper fast --seeds 1 2 3

Every row is one call of `MNIST_defense.py` and one of `MNIST_eval.py`, as a user would type them;
rows differ in the flags shown and in nothing else. A training step is timed first, the number of
steps follows from the minutes, and the course of the learning rate and the warm-up are stretched
over them: a cheap method gets more steps, not a longer day. What is timed is training alone, on
``--threads`` threads. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.failure_case import run_logged, spread
from tools.reproduce import holds
from utils.attacks import ATTACKS
from utils.data import load_dataset
from utils.errors import UserError, run_script
from utils.runs import CHECKPOINT, read_log, write_atomic
from utils.runtime import versions

# name: what differs. AT and TRADES climb with the steps of `fast`, as many and as large, and at a
# lower learning rate: at that of LFR, whose loss begins as the natural one, they do not take off.
ROWS: Mapping[str, str] = {
    "fast": "--defense lfr --search fast --lr 0.1",
    "paper": "--defense lfr --search paper --lr 0.1",
    "igr": "--defense igr --lr 0.1",
    "at": "--defense at --search fast --lr 0.03",
    "trades": "--defense trades --search fast --lr 0.03",
    "none": "--defense none --lr 0.1",
}
COMMON = "--lr_schedule onecycle --val_size 0 --probe_size 0 --image_interval 0 --ckpt_interval 0"
WARMUP = 1 / 12  # share of the training over which lambda rises
TIMED_STEPS = 6
BATCH = 128


def run(command: Sequence[str], out: Path) -> None:
    """Run one of the repository's scripts, its output appended to a file.

    Raises:
        UserError: it failed; the file says why.
    """
    if code := run_logged(command, out):
        raise UserError(f"{command[0]} ended with exit code {code}, see {out}")


def training(name: str, seed: int, args: argparse.Namespace, folder: Path) -> list[str]:
    """The training command of a row, without its length."""
    words = ["MNIST_defense.py", "--dataset", args.dataset, *ROWS[name].split(), *COMMON.split()]
    words += ["--train_batch", str(BATCH)]
    if args.data_dir:
        words += ["--data_dir", str(args.data_dir)]
    words += ["--manualSeed", str(seed), "--threads", str(args.threads)]
    return [*words, "--checkpoint", str(folder)]


def seconds_a_step(name: str, args: argparse.Namespace) -> float:
    """Median over three short trainings in one process; the first warms up and does not count."""
    folder = args.runs_dir / f"{name}_timing"
    words = training(name, args.seeds[0], args, folder)
    words += ["--epochs", "4", "--max_steps", str(TIMED_STEPS), "--overwrite"]
    run(words, folder.with_suffix(".out"))
    seconds = read_log(folder / "log.txt")["Seconds"]
    return statistics.median(seconds[1:]) / min(TIMED_STEPS, args.steps_per_epoch)


def plan(seconds: float, args: argparse.Namespace) -> tuple[int, int]:
    """Epochs and steps of each that fill the minutes with steps of so many seconds."""
    total = max(1, round(60 * args.minutes / seconds))
    epochs = math.ceil(total / args.steps_per_epoch)
    return epochs, math.ceil(total / epochs)


def as_typed(words: Sequence[str], args: argparse.Namespace) -> str:
    """The command without the folders of this machine."""
    text = shlex.join(["python", *words]).replace(f"{args.runs_dir}/", "RUNS/")
    return text.replace(str(args.data_dir), "DATA") if args.data_dir else text


def measure(name: str, seed: int, length: tuple[int, int], args: argparse.Namespace) -> dict:
    """Train and attack one network; what came of it."""
    folder = args.runs_dir / f"{name}_{seed}"
    result, out = folder.with_suffix(".json"), folder.with_suffix(".out")
    epochs, steps = length
    words = training(name, seed, args, folder)
    words += ["--epochs", str(epochs), "--max_steps", str(steps)]
    words += ["--warmup", f"{WARMUP * epochs:.3f}"]
    resume = ["--resume", str(folder / CHECKPOINT)] if (folder / CHECKPOINT).exists() else []
    run([*words, *resume], out)
    log = read_log(folder / "log.txt")
    # The last weights: where a course of the learning rate ends, and the same rule for every row.
    evaluation = ["MNIST_eval.py", "--dataset", args.dataset, "--threads", str(args.threads)]
    if args.data_dir:
        evaluation += ["--data_dir", str(args.data_dir)]
    evaluation += ["--model_path", str(folder / CHECKPOINT), "--attack_method", *args.attacks]
    evaluation += ["--num_examples", str(args.num_examples), "--output", str(result)]
    if not holds(result, folder / CHECKPOINT, args.attacks, args.num_examples):
        run(evaluation, out)
    report = json.loads(result.read_text())
    return {
        "steps": epochs * steps,
        "minutes": sum(log["Seconds"]) / 60,
        "clean": log["Valid Acc."][-1],
        "robust": {key: report["attacks"][key]["robust_accuracy"] for key in args.attacks},
        "commands": [as_typed(words, args), as_typed(evaluation, args)],
    }


def table(found: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> str:
    """Markdown: a row for each name, mean (and range) over the seeds."""
    heads = ["what", "steps", "minutes", "clean %", *(f"{name} %" for name in args.attacks)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, by_seed in found.items():
        runs = list(by_seed.values())
        cells = [
            f"{name}: `{ROWS[name]}`",
            spread([run["steps"] for run in runs], 0),
            spread([run["minutes"] for run in runs]),
            spread([run["clean"] for run in runs]),
            *(spread([run["robust"][attack] for run in runs]) for attack in args.attacks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("MNIST", "FashionMNIST", "digits"), default="MNIST")
    parser.add_argument("--data_dir", type=Path, default=None, help="where the data are")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of training for each")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="these rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000], help="a training for each")
    parser.add_argument(
        "--attacks", nargs="+", choices=ATTACKS, default=["PGD", "AutoAttack"], help="of MNIST_eval"
    )
    parser.add_argument("--num_examples", type=int, default=200, help="first test images attacked")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a training")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/equal_minutes"))
    parser.add_argument("--output", type=Path, default=None, help="JSON with everything")
    args = parser.parse_args(argv)
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        raise UserError(f"--minutes {args.minutes:g}: allowed is a finite number above 0")
    for flag in ("num_examples", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed is 1 or more")
    # Rows of another length are other rows.
    args.runs_dir = args.runs_dir.resolve() / f"{args.dataset}_{args.minutes:g}"
    args.data_dir = args.data_dir and args.data_dir.resolve()
    return args


def main() -> int:
    args = parse()
    data = load_dataset(args.dataset, args.data_dir or Path("./data"), train=True)
    args.steps_per_epoch = max(1, len(data) // BATCH)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {name: {} for name in args.only}
    with tqdm(total=len(args.only) * len(args.seeds), disable=None) as bar:
        for name in args.only:
            # Kept, so that an interrupted row goes on with the length it began with.
            kept = args.runs_dir / f"{name}_length.json"
            if not kept.exists():
                seconds = seconds_a_step(name, args)
                length = {"seconds_a_step": seconds, "length": plan(seconds, args)}
                write_atomic(kept, json.dumps(length).encode())
            length = json.loads(kept.read_text())
            for seed in args.seeds:
                bar.set_description(f"{name}, seed {seed}")
                one = measure(name, seed, tuple(length["length"]), args)
                found[name][str(seed)] = {**one, "seconds_a_step": length["seconds_a_step"]}
                bar.update()
    print(table(found, args))
    if args.output:
        report = {
            "dataset": args.dataset,
            "minutes": args.minutes,
            "threads": args.threads,
            "num_examples": args.num_examples,
            "versions": versions(),
            "rows": found,
        }
        write_atomic(args.output, (json.dumps(report, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_script(main)

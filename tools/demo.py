"""LFR in three minutes on two cores: the same network with and without it, both attacked.

    python -m tools.demo            # or: make demo

Trains on scikit-learn's 1,797 handwritten digits, which need no download, by the commands a user
would type; each is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
EPSILON = "0.15"
TRAINING = (
    "MNIST_defense.py --dataset digits --epochs 6 --train_batch 32 --lr 0.05 "
    f"--lr_schedule onecycle --epsilon {EPSILON} --probe_size 64 --overwrite"
)
DEFENSES = {
    "LFR": "--defense lfr --search fast --num_steps 2 --step_size 0.1 --lambada 0.05 --warmup 3",
    "undefended": "--defense none",
}
EVALUATION = (
    f"MNIST_eval.py --dataset digits --attack_method FGSM PGD --epsilon {EPSILON} "
    "--num_steps 20 --step_size 0.02"
)


def run(command: list[str]) -> None:
    """Run one of the repository's scripts, its output as the user would see it.

    Raises:
        UserError: the script failed; it has said why.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if code:
        raise UserError(f"{command[0]} ended with exit code {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs_dir", default="runs/demo", help="folder of the two runs")
    args = parser.parse_args()
    started = time.monotonic()
    results = {}
    for name, flags in DEFENSES.items():
        folder = Path(args.runs_dir) / name
        run([*TRAINING.split(), *flags.split(), "--checkpoint", str(folder)])
        output = folder / "results.json"
        checkpoint = str(folder / "checkpoint.pth.tar")
        run([*EVALUATION.split(), "--model_path", checkpoint, "--output", str(output)])
        results[name] = json.loads((ROOT / output).read_text())
    print(f"\n{'':12} {'clean':>7} {'FGSM':>7} {'PGD-20':>7}   accuracy (%) on the 360 test digits")
    for name, result in results.items():
        by_attack = result["attacks"]
        figures = [by_attack["PGD"]["clean_accuracy"]]
        figures += [by_attack[attack]["robust_accuracy"] for attack in ("FGSM", "PGD")]
        print(f"{name:12} " + " ".join(f"{value:7.1f}" for value in figures))
    print(f"l_inf ball of radius {EPSILON}; {time.monotonic() - started:.0f} seconds in all")
    tensorboard = Path(sys.executable).parent / "tensorboard"
    print(f"watch the curves: {tensorboard} --logdir {args.runs_dir}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    run_script(main)

"""LFR in three minutes on two cores: the same network with and without it, both attacked.

    python -m tools.demo            # or: make demo

Trains on scikit-learn's 1,797 handwritten digits, which need no download, by the commands a user
would type; each is printed before it runs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tools.scripts import ROOT, run
from utils.errors import run_script
from utils.run_folder import CHECKPOINT

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs_dir", default="runs/demo", help="folder of the two runs")
    args = parser.parse_args()
    started = time.monotonic()
    results = {}
    for name, flags in DEFENSES.items():
        folder = Path(args.runs_dir) / name
        report = folder / "results.json"
        run([*TRAINING.split(), *flags.split(), "--checkpoint", str(folder)])
        for old in (report, Path(f"{report}.partial")):  # of the network before
            (ROOT / old).unlink(missing_ok=True)
        files = ["--model_path", str(folder / CHECKPOINT), "--output", str(report)]
        run([*EVALUATION.split(), *files])
        results[name] = json.loads((ROOT / report).read_text())
    print(f"\n{'':12} {'clean':>7} {'FGSM':>7} {'PGD-20':>7}   accuracy (%) on the 360 test digits")
    for name, result in results.items():
        robust = [result["attacks"][attack]["robust_accuracy"] for attack in ("FGSM", "PGD")]
        figures = [result["clean_accuracy"], *robust]
        print(f"{name:12} " + " ".join(f"{value:7.1f}" for value in figures))
    print(f"l_inf ball of radius {EPSILON}; {time.monotonic() - started:.0f} seconds in all")
    tensorboard = Path(sys.executable).parent / "tensorboard"
    print(f"watch the curves: {tensorboard} --logdir {args.runs_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)

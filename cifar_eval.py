"""Evaluate a network for CIFAR-10 or CIFAR-100 under one or more attacks.

python cifar_eval.py --model_path PATH/model_best.pth.tar --attack_method PGD
python cifar_eval.py --model_path PATH/model_best.pth.tar --attack_method all --num_examples 1000
"""

from utils.errors import run_script
from utils.evaluation import run_evaluation

DEFAULTS = {
    "dataset": "cifar10",
    "datasets": ("cifar10", "cifar100", "folder"),
    "archs": ("resnet", "preact_resnet", "wrn"),
}


def main() -> int:
    return run_evaluation(DEFAULTS, __doc__.splitlines()[0])


if __name__ == "__main__":
    run_script(main)

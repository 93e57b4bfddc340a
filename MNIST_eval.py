"""Evaluate a network for MNIST, FashionMNIST, SVHN or the digits under one or more attacks.

python MNIST_eval.py --model_path PATH/model_best.pth.tar --attack_method PGD
python MNIST_eval.py --model_path PATH/model_best.pth.tar --attack_method all --num_examples 1000
"""

from utils.errors import run_script
from utils.evaluation import run_evaluation

DEFAULTS = {
    "dataset": "MNIST",
    "datasets": ("MNIST", "FashionMNIST", "SVHN", "digits", "folder"),
    "archs": ("small_cnn", "resnet", "preact_resnet", "wrn"),
}


def main() -> int:
    return run_evaluation(DEFAULTS, __doc__.splitlines()[0])


if __name__ == "__main__":
    run_script(main)

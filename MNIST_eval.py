"""Evaluate a network for MNIST, FashionMNIST, SVHN or the digits under one or more attacks.

python MNIST_eval.py --model_path PATH/model_best.pth.tar --attack_method PGD
python MNIST_eval.py --model_path PATH/model_best.pth.tar --attack_method all --num_examples 1000
"""

from __future__ import annotations

from utils.errors import run_script
from utils.evaluation import evaluate
from utils.options import EvaluationDefaults, parse_evaluation

DEFAULTS = EvaluationDefaults(
    dataset="MNIST",
    datasets=("MNIST", "FashionMNIST", "SVHN", "digits", "folder"),
    archs=("small_cnn", "resnet", "wrn"),
)


def main() -> int:
    return evaluate(parse_evaluation(DEFAULTS, description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    run_script(main)

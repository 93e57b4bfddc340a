"""Train a network for CIFAR-10 or CIFAR-100 with Local Flatness Regularization.

python cifar_defense.py -a resnet --depth 20 --epochs 300 --schedule 150 250 --lambada 0.03
"""

from __future__ import annotations

from utils.errors import run_script
from utils.options import TrainingDefaults, parse_training
from utils.training import train

DEFAULTS = TrainingDefaults(
    dataset="cifar10",
    datasets=("cifar10", "cifar100", "folder"),
    arch="resnet",
    archs=("resnet", "wrn"),
    depth=20,
    widen_factor=6,
    schedule=(75, 90, 100),
    lr=0.1,
    weight_decay=2e-4,
    epsilon=0.031,
    num_steps=10,
    step_size=0.007,
    fast_num_steps=2,
    fast_step_size=0.062,
    lambada=0.03,
    ckpt_interval=5,
    augment=True,
    when={("arch", "wrn"): {"depth": 28}},
)


def main() -> int:
    return train(parse_training(DEFAULTS, description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    run_script(main)

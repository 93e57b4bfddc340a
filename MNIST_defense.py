"""Train a network for MNIST, FashionMNIST, SVHN or the digits with Local Flatness Regularization.

python MNIST_defense.py --dataset MNIST --data_dir ./data --epochs 100 --save_dir SavedModels
python MNIST_defense.py --dataset digits --search fast --epochs 30 --save_dir SavedModels
"""

from __future__ import annotations

from utils.errors import run_script
from utils.options import TrainingDefaults, parse_training
from utils.training import train

DEFAULTS = TrainingDefaults(
    dataset="MNIST",
    datasets=("MNIST", "FashionMNIST", "SVHN", "digits", "folder"),
    arch="small_cnn",
    archs=("small_cnn", "resnet", "wrn"),
    depth=16,
    widen_factor=8,
    schedule=(90,),
    lr=0.01,
    weight_decay=0.0,
    epsilon=0.3,
    num_steps=40,
    step_size=0.01,
    fast_num_steps=4,
    fast_step_size=0.15,
    lambada=0.02,
    ckpt_interval=10,
    augment=False,
    crop_padding=2,
    mirror=False,
    when={
        ("dataset", "SVHN"): {"arch": "wrn"},
        ("dataset", "FashionMNIST"): {"mirror": True},
        ("dataset", "folder"): {"mirror": True},
        ("arch", "resnet"): {"depth": 20},
    },
)


def main() -> int:
    return train(parse_training(DEFAULTS, description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    run_script(main)

"""Train a network for MNIST, FashionMNIST, SVHN or the digits with Local Flatness Regularization.

python MNIST_defense.py --dataset MNIST --data_dir ./data --epochs 100 --save_dir SavedModels
python MNIST_defense.py --dataset digits --search fast --epochs 30 --save_dir SavedModels
"""

from utils.errors import run_script
from utils.training import train

DEFAULTS = {
    "dataset": "MNIST",
    "datasets": ("MNIST", "FashionMNIST", "SVHN", "digits", "folder"),
    "arch": "small_cnn",
    "archs": ("small_cnn", "resnet", "preact_resnet", "wrn"),
    "depth": 16,
    "block_name": "BasicBlock",
    "widen_factor": 8,
    "drop": 0.0,
    "activation": "relu",
    "augment": False,
    "schedule": (90,),
    "lr": 0.01,
    "weight_decay": 0.0,
    "norm": "l_inf",
    "epsilon": 0.3,
    "num_steps": 40,
    "step_size": 0.01,
    "fast_num_steps": 4,
    "fast_step": 0.5,  # times epsilon
    "lambada": 0.02,
    "ckpt_interval": 10,
    "when": {
        ("dataset", "SVHN"): {"arch": "wrn", "epsilon": 0.031, "num_steps": 10, "step_size": 0.007},
        ("arch", "resnet"): {"depth": 20},
        ("norm", "l_2"): {"epsilon": 1.5, "step_size": 0.1, "lambada": 0.1},
        ("norm", "l_2", "dataset", "SVHN"): {"epsilon": 0.5, "step_size": 0.125, "lambada": 0.5},
    },
}


def main() -> int:
    return train(DEFAULTS, __doc__.splitlines()[0])


if __name__ == "__main__":
    run_script(main)

"""Train a network for CIFAR-10 or CIFAR-100 with Local Flatness Regularization.

python cifar_defense.py -a resnet --depth 20 --epochs 300 --schedule 150 250 --lambada 0.03
"""

from utils.errors import run_script
from utils.training import train

DEFAULTS = {
    "dataset": "cifar10",
    "datasets": ("cifar10", "cifar100", "folder"),
    "arch": "resnet",
    "archs": ("resnet", "preact_resnet", "wrn"),
    "depth": 20,
    "block_name": "BasicBlock",
    "widen_factor": 6,
    "drop": 0.0,
    "activation": "relu",
    "augment": True,
    "schedule": (75, 90, 100),
    "lr": 0.1,
    "weight_decay": 2e-4,
    "norm": "l_inf",
    "epsilon": 0.031,
    "num_steps": 10,
    "step_size": 0.007,
    "fast_num_steps": 2,
    "fast_step": 2.0,  # times epsilon
    "lambada": 0.03,
    "ckpt_interval": 5,
    "when": {
        ("arch", "wrn"): {"depth": 28},
        ("norm", "l_2"): {"epsilon": 0.5, "step_size": 0.125, "lambada": 0.5},
    },
}


def main() -> int:
    return train(DEFAULTS, __doc__.splitlines()[0])


if __name__ == "__main__":
    run_script(main)

"""The published networks for torch.hub: eval mode, images [N, C, H, W] in [0, 1] to logits.

    network = torch.hub.load("PATH/TO/REPOSITORY", "mnist_lfr", source="local")

Nothing named `utils` or `models` is imported, so that it works beside modules of those names.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

dependencies = ["torch"]
_HERE = Path(__file__).resolve().parent


def _models() -> ModuleType:
    """The package `models` under a name of its own."""
    if "lfr_models" not in sys.modules:
        place = _HERE / "models" / "__init__.py"
        spec = importlib.util.spec_from_file_location("lfr_models", place)
        sys.modules["lfr_models"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lfr_models"])
    return sys.modules["lfr_models"]


def _published(folder: str) -> nn.Module:
    path = _HERE / "savedModel" / folder / "model_best.pth.tar"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    network = _models().build_model(**checkpoint["arch"])
    network.load_state_dict(checkpoint["state_dict"])
    return network.eval()


def mnist_lfr() -> nn.Module:
    """SmallCNN trained by LFR for l_inf 0.3."""
    return _published("MNIST/lr_0.1_lambada_0.02_rs_1000")


def mnist_undefended() -> nn.Module:
    """The same network trained without a defense."""
    return _published("MNIST/none_lr_0.05_rs_1000")


def cifar10_lfr() -> nn.Module:
    """ResNet-20 (SiLU) trained by LFR, after a start by AT, for l_inf 8/255."""
    return _published("CIFAR10/lr_0.2_lambada_0.03_rs_1000")

"""The networks: images [N, C, H, W] in [0, 1] in, logits [N, num_classes] out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.layers import ACTIVATIONS, NORM_LAYERS
from models.resnet import BLOCKS, ResNet
from models.small_cnn import SmallCNN
from models.wrn import WideResNet

__all__ = ["ACTIVATIONS", "BLOCKS", "MODELS", "NORM_LAYERS", "build_model", "infer_arch"]

MODELS: dict[str, type[nn.Module]] = {
    "small_cnn": SmallCNN,
    "resnet": ResNet,
    "wrn": WideResNet,
}


def build_model(name: str, **options: Any) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: a key of :data:`MODELS`.
        options: any options of any network; each network takes those it knows, so that one set of
            command-line flags serves all of them.

    Returns:
        The network, with ``network.arch``: a plain dict from which ``build_model(**network.arch)``
        builds the same architecture again. Checkpoints store it.

    Raises:
        ValueError: unknown name, or an option the network refuses.
    """
    if name not in MODELS:
        raise ValueError(f"arch is {name!r}, allowed are {', '.join(MODELS)}")
    network_class = MODELS[name]
    parameters = inspect.signature(network_class).parameters
    arch = {key: parameter.default for key, parameter in parameters.items()}
    arch.update({key: value for key, value in options.items() if key in parameters})
    network = network_class(**arch)
    network.arch = {"name": name, **arch}
    return network


def infer_arch(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The architecture whose parameters these are, read from their names and shapes.

    For checkpoints that do not carry their architecture, such as the original's. What leaves no
    trace in the parameters (dropout, activation) takes its default.

    Args:
        state_dict: parameter names without ``module.``.

    Returns:
        Options for :func:`build_model`, or None when no network of ours looks like that.
    """

    def shape(key: str) -> tuple[int, ...]:
        value = state_dict.get(key)
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def blocks(prefix: str) -> int:
        start = len(prefix.split("."))
        return len({key.split(".")[start] for key in state_dict if key.startswith(prefix + ".")})

    if len(shape("feature_extractor.conv1.weight")) == 4 and shape("classifier.fc3.weight"):
        features = shape("classifier.fc1.weight")
        side = round((features[1] / 64) ** 0.5) if len(features) == 2 else 4
        return {
            "name": "small_cnn",
            "num_classes": shape("classifier.fc3.weight")[0],
            "in_channels": shape("feature_extractor.conv1.weight")[1],
            "image_size": (side * 2 + 4) * 2 + 4,
        }
    if len(shape("conv1.weight")) != 4 or not shape("fc.weight"):
        return None
    common = {"num_classes": shape("fc.weight")[0], "in_channels": shape("conv1.weight")[1]}
    norm = "batch" if shape("bn1.running_mean") else "group" if shape("bn1.weight") else "none"
    if shape("layer1.0.conv1.weight"):
        block_name = "Bottleneck" if shape("layer1.0.conv3.weight") else "BasicBlock"
        convolutions = BLOCKS[block_name].convolutions
        return {
            "name": "resnet",
            "depth": 3 * convolutions * blocks("layer1") + 2,
            "block_name": block_name,
            "norm_layer": norm,
            **common,
        }
    if len(shape("block1.layer.0.conv1.weight")) == 4:
        return {
            "name": "wrn",
            "depth": 6 * blocks("block1.layer") + 4,
            "widen_factor": max(1, shape("block1.layer.0.conv1.weight")[0] // 16),
            "norm_layer": norm,
            **common,
        }
    return None

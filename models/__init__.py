"""The networks: images [N, C, H, W] in [0, 1] in, logits [N, num_classes] out."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .layers import ACTIVATIONS, NORM_LAYERS
from .preact_resnet import preact_resnet18, wide_resnet
from .resnet import BLOCKS, ResNet
from .small_cnn import SmallCNN

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "resnet": ResNet,
    "wrn": wide_resnet,
    "preact_resnet": preact_resnet18,
}


def build_model(name: str, **options: Any) -> nn.Module:
    """A freshly initialised network: a key of :data:`MODELS`.

    ``options``: any options of any network; each takes those it knows, so that one set of flags
    serves all. ``network.arch`` is a plain dict from which ``build_model(**network.arch)`` builds
    the same architecture again; checkpoints store it. Raises ValueError for an unknown name, or an
    option that the network refuses.
    """
    known = {"activation": ACTIVATIONS, "norm_layer": NORM_LAYERS, "block_name": BLOCKS}
    for chosen, names in ((name, MODELS), *((options.get(k), known[k]) for k in known)):
        if chosen not in (None, *names):
            raise ValueError(f"{chosen!r} is unknown, allowed are {', '.join(names)}")
    parameters = inspect.signature(MODELS[name]).parameters
    arch = {key: options.get(key, parameter.default) for key, parameter in parameters.items()}
    network = MODELS[name](**arch)
    network.arch = {"name": name, **arch}
    return network


def stated_arch(network: nn.Module) -> dict[str, Any] | None:
    """What :func:`build_model` left in a network; None where a user's means another thing by it."""
    arch = getattr(network, "arch", None)
    return arch if isinstance(arch, dict) else None


def infer_arch(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options for :func:`build_model`, from the names and shapes of parameters; None: not ours.

    For checkpoints that do not carry their architecture, such as the original's. What leaves no
    trace in the parameters (dropout, activation) takes its default.
    """
    shapes = {name: tuple(v.shape) for name, v in state_dict.items() if isinstance(v, Tensor)}
    small = "classifier.fc3.weight" in shapes
    names = ("feature_extractor.conv1", "classifier.fc3") if small else ("conv1", "fc")
    stem, head = (shapes.get(f"{name}.weight", ()) for name in names)
    if len(stem) != 4 or len(head) != 2:
        return None
    arch = {"num_classes": head[0], "in_channels": stem[1]}
    if small:
        side = round((shapes["classifier.fc1.weight"][1] / 64) ** 0.5)
        return {"name": "small_cnn", "image_size": 4 * side + 12, **arch}
    batch, group = (f"bn1.{name}" in shapes for name in ("running_mean", "weight"))
    arch["norm_layer"] = "batch" if batch else "group" if group else "none"
    first = [key for key in shapes if key.startswith(("layer1.", "block1."))]
    first = [shapes[key] for key in first if key.endswith(".conv1.weight")]  # one of each block
    if not first:
        return None
    if "layer1.0.conv1.weight" in shapes:
        block_name = "Bottleneck" if "layer1.0.conv3.weight" in shapes else "BasicBlock"
        depth = 3 * len(BLOCKS[block_name].kernels) * len(first) + 2
        return {"name": "resnet", "depth": depth, "block_name": block_name, **arch}
    if "block4.layer.0.conv1.weight" in shapes:
        return {"name": "preact_resnet", **arch}
    depth, widen_factor = 6 * len(first) + 4, first[0][0] // 16
    return {"name": "wrn", "depth": depth, "widen_factor": widen_factor, **arch}

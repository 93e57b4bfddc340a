"""Parts shared by the networks: activations, normalisations, convolution followed by norm."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": lambda: nn.Softplus(beta=10),
}
MONOTONE = ("relu", "leaky_relu", "elu", "softplus")  # these commute with max-pooling
NORM_LAYERS = ("batch", "group", "none")


def activation_layer(name: str, inplace: bool = False) -> nn.Module:
    """The activation called ``name``. Softplus has beta 10: a ReLU rounded over about +-0.2.

    Args:
        inplace: nobody needs the input again; ReLU then overwrites it, which spares a large image
            the trip through memory that costs as much as the arithmetic on it.

    Raises:
        ValueError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, allowed are {', '.join(ACTIVATIONS)}")
    return nn.ReLU(inplace) if name == "relu" else ACTIVATIONS[name]()


def norm_layer(name: str, channels: int) -> nn.Module:
    """Normalisation of ``channels`` feature maps.

    ``group`` uses groups of 8 channels, so that no sample sees another one.

    Raises:
        ValueError: unknown name.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(max(1, channels // 8), channels)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"norm_layer is {name!r}, allowed are {', '.join(NORM_LAYERS)}")


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``, as one call that a torch function mode can see and fold into one kernel.

    Args:
        x: [N, C, H, W].
        conv: the convolution.
        norm: what follows it, usually BatchNorm.

    Returns:
        [N, C', H', W'].
    """
    if has_torch_function_unary(x):
        return handle_torch_function(conv_norm, (x,), x, conv, norm)
    return norm(conv(x))


def global_average_pool(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def initialize(network: nn.Module) -> None:
    """He et al. 2015 for convolutions (fan out), ones and zeros for the norms."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

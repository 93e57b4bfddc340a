"""Parts shared by the networks: activations, normalisations, convolution followed by norm."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": lambda: nn.Softplus(beta=10),  # a ReLU rounded over about +-0.2
}
MONOTONE = ("relu", "leaky_relu", "elu", "softplus")  # these commute with max-pooling
NORM_LAYERS = ("batch", "group", "none")


def activation_layer(name: str, inplace: bool = False) -> nn.Module:
    """The activation called ``name``, or ValueError; ``inplace``: ReLU may overwrite its input."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, allowed are {', '.join(ACTIVATIONS)}")
    return nn.ReLU(inplace) if name == "relu" else ACTIVATIONS[name]()


def norm_layer(name: str, channels: int) -> nn.Module:
    """Normalisation of ``channels`` feature maps (``group``: groups of 8), or ValueError."""
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(max(1, channels // 8), channels)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"norm_layer is {name!r}, allowed are {', '.join(NORM_LAYERS)}")


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``, [N, C, H, W] -> [N, C', H', W'], as one call that a torch function mode
    sees and may fold into one convolution."""
    if has_torch_function_unary(x):
        return handle_torch_function(conv_norm, (x,), x, conv, norm)
    return norm(conv(x))


conv_norm.folds_batch_norm = True  # the mark by which `utils/lfr/accel.py` knows it


def initialize(network: nn.Module) -> None:
    """He et al. 2015 for convolutions (fan out), zero for their biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

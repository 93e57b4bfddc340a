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
NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(max(1, channels // 8), channels),
    "none": lambda channels: nn.Identity(),
}


def activation_layer(name: str, inplace: bool = False) -> nn.Module:
    """The activation called ``name``; ``inplace``: ReLU may overwrite its input."""
    return nn.ReLU(inplace) if name == "relu" else ACTIVATIONS[name]()


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

"""CIFAR ResNet of depth 6n+2 (BasicBlock) or 9n+2 (Bottleneck): 16, 32, 64 channels.

| depth | block      | parameters |
| ----- | ---------- | ---------- |
| 8     | BasicBlock |     78,042 |
| 20    | BasicBlock |    272,474 |
| 56    | BasicBlock |    855,770 |

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with the
projection shortcut (1x1 convolution and BatchNorm) where the shape changes.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers import activation_layer, conv_norm, global_average_pool, initialize
from models.layers import norm_layer as build_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1
    convolutions = 2

    def __init__(self, inputs: int, width: int, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=norm == "none")
        self.bn1 = build_norm(norm, width)
        self.relu = activation_layer(activation, inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=norm == "none")
        self.bn2 = build_norm(norm, width)
        self.downsample = _projection(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        out = self.relu(conv_norm(x, self.conv1, self.bn1))
        return self.relu(conv_norm(out, self.conv2, self.bn2).add_(shortcut))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution (to 4 times the width) around a shortcut."""

    expansion = 4
    convolutions = 3

    def __init__(self, inputs: int, width: int, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=norm == "none")
        self.bn1 = build_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=norm == "none")
        self.bn2 = build_norm(norm, width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=norm == "none")
        self.bn3 = build_norm(norm, outputs)
        self.relu = activation_layer(activation, inplace=True)
        self.downsample = _projection(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, 4 * width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        out = self.relu(conv_norm(x, self.conv1, self.bn1))
        out = self.relu(conv_norm(out, self.conv2, self.bn2))
        return self.relu(conv_norm(out, self.conv3, self.bn3).add_(shortcut))


def _projection(inputs: int, outputs: int, stride: int, norm: str) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=norm == "none")
    return nn.Sequential(convolution, build_norm(norm, outputs))


BLOCKS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}


class ResNet(nn.Module):
    """The CIFAR ResNet.

    Args:
        depth: 6n+2 for BasicBlock, 9n+2 for Bottleneck.
        num_classes: number of logits.
        in_channels: 3 for colour.
        block_name: ``BasicBlock`` or ``Bottleneck``.
        activation: a name of :data:`models.layers.ACTIVATIONS`.
        norm_layer: ``batch``, ``group`` or ``none``. Without normalisation the second half of each
            block starts at zero (Zhang et al., "Fixup", 2019), which keeps the signal's size.

    Raises:
        ValueError: a depth that no n gives, an unknown block, activation or norm.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        block_name: str = "BasicBlock",
        activation: str = "relu",
        norm_layer: str = "batch",
    ) -> None:
        super().__init__()
        if block_name not in BLOCKS:
            raise ValueError(f"block_name is {block_name!r}, allowed are {', '.join(BLOCKS)}")
        block = BLOCKS[block_name]
        per_n = 3 * block.convolutions
        if depth < per_n + 2 or (depth - 2) % per_n:
            allowed = ", ".join(str(per_n * n + 2) for n in range(1, 4))
            raise ValueError(f"depth is {depth}, {block_name} needs {per_n}n+2: {allowed}, ...")
        count = (depth - 2) // per_n
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=norm_layer == "none")
        self.bn1 = build_norm(norm_layer, 16)
        self.relu = activation_layer(activation, inplace=True)
        channels = 16
        for stage, width in enumerate((16, 32, 64)):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, width, stride, activation, norm_layer))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)
        if norm_layer == "none":
            _start_at_identity(self)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> logits [N, num_classes]."""
        out = self.relu(conv_norm(x, self.conv1, self.bn1))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(global_average_pool(out))


def _start_at_identity(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.conv2 if isinstance(module, BasicBlock) else module.conv3
            nn.init.zeros_(last.weight)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)

"""CIFAR ResNet of depth 6n+2 (BasicBlock) or 9n+2 (Bottleneck): 16, 32, 64 channels.

Depth 8 has 78,042 parameters, depth 20 272,474, depth 56 855,770.
He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with the
projection shortcut (1x1 convolution and BatchNorm) where the shape changes.
"""

from torch import Tensor, nn

from .layers import NORM_LAYERS, activation_layer, conv_norm, initialize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    kernels = (3, 3)  # the first 3x3 takes the stride
    expansion = 1  # output channels by width

    def __init__(self, inputs: int, width: int, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        bias, outputs, channels = norm == "none", width * self.expansion, inputs
        for i, size in enumerate(self.kernels, 1):
            step = stride if i == 1 + self.kernels.index(3) else 1
            after = outputs if i == len(self.kernels) else width
            conv = nn.Conv2d(channels, after, size, step, size // 2, bias=bias)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", NORM_LAYERS[norm](after))
            channels = after
        self.relu = activation_layer(activation, inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
            self.downsample = nn.Sequential(conv, NORM_LAYERS[norm](outputs))

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The convolutions, each with its norm."""
        numbers = range(1, len(self.kernels) + 1)
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in numbers]

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, expansion * width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        *first, last = self.layers()
        for layer in first:
            x = self.relu(conv_norm(x, *layer))
        return self.relu(conv_norm(x, *last).add_(shortcut))


class Bottleneck(BasicBlock):
    """1x1, 3x3 and 1x1 convolution (to 4 times the width) around a shortcut."""

    kernels = (1, 3, 1)
    expansion = 4


BLOCKS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}


class ResNet(nn.Module):
    """The CIFAR ResNet; ValueError: a depth that no n gives.

    Without normalisation each block starts as its shortcut (Zhang et al., "Fixup", 2019).
    """

    def __init__(
        self, depth: int = 20, num_classes: int = 10, in_channels: int = 3,
        block_name: str = "BasicBlock", activation: str = "relu", norm_layer: str = "batch",
    ) -> None:  # fmt: skip
        super().__init__()
        block = BLOCKS[block_name]
        per_n = 3 * len(block.kernels)
        if depth < per_n + 2 or (depth - 2) % per_n:
            allowed = ", ".join(str(per_n * n + 2) for n in range(1, 4))
            raise ValueError(f"depth is {depth}, {block_name} needs {per_n}n+2: {allowed}, ...")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=norm_layer == "none")
        self.bn1 = NORM_LAYERS[norm_layer](16)
        self.relu = activation_layer(activation, inplace=True)
        channels = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range((depth - 2) // per_n):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(block(channels, width, stride, activation, norm_layer))
                channels = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)
        for module in self.modules() if norm_layer == "none" else ():
            if isinstance(module, block):
                nn.init.zeros_(module.layers()[-1][0].weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> logits [N, num_classes]."""
        out = self.relu(conv_norm(x, self.conv1, self.bn1))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean((2, 3)))

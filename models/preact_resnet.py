"""Residual networks with pre-activation: Wide ResNet WRN-d-k and PreActResNet-18.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016: WRN-16-8, with which LFR's authors train
SVHN, has 10,961,370 parameters, WRN-28-10 36,479,194. PreActResNet-18, the usual network of
adversarial training on CIFAR-10 (Rice et al., "Overfitting in adversarially robust deep learning",
ICML 2020), has 11,172,170: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from .layers import NORM_LAYERS, activation_layer, conv_norm, initialize


class PreActBlock(nn.Module):
    """norm, activation, 3x3, norm, activation, dropout, 3x3, around a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, drop: float, activation: str, norm: str
    ) -> None:
        super().__init__()
        self.bn1 = NORM_LAYERS[norm](inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = NORM_LAYERS[norm](outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu, self.drop = activation_layer(activation), nn.Dropout(drop)
        same = inputs == outputs
        self.convShortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        activated = self.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.relu(conv_norm(activated, self.conv1, self.bn2))
        return self.conv2(self.drop(out)) + shortcut


class PreActResNet(nn.Module):
    """Stages of ``blocks`` blocks each; all but the first halve height and width.

    ``stem`` and ``widths``: channels of the first convolution and of each stage.
    """

    def __init__(
        self, stem: int, widths: Sequence[int], blocks: int, num_classes: int, in_channels: int,
        activation: str, norm_layer: str, drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.stages, inputs = [f"block{i + 1}" for i in range(len(widths))], stem
        for stage, width in zip(self.stages, widths):
            layers = []
            for i in range(blocks):
                stride = 2 if stage != "block1" and i == 0 else 1
                layers.append(PreActBlock(inputs, width, stride, drop, activation, norm_layer))
                inputs = width
            layer = nn.Sequential(OrderedDict(layer=nn.Sequential(*layers)))  # the published name
            setattr(self, stage, layer)
        self.bn1 = NORM_LAYERS[norm_layer](inputs)
        self.relu = activation_layer(activation)
        self.fc = nn.Linear(inputs, num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> logits [N, num_classes]."""
        out = self.conv1(x)
        for stage in self.stages:
            out = getattr(self, stage)(out)
        return self.fc(self.relu(self.bn1(out)).mean((2, 3)))


def wide_resnet(
    depth: int = 28, widen_factor: int = 10, num_classes: int = 10, in_channels: int = 3,
    drop: float = 0.0, activation: str = "relu", norm_layer: str = "batch",
) -> PreActResNet:  # fmt: skip
    """WRN-depth-widen_factor; ValueError: a depth that is not 6n+4."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth is {depth}, a wide ResNet needs 6n+4: 10, 16, 22, 28, ...")
    widths, blocks = [width * widen_factor for width in (16, 32, 64)], (depth - 4) // 6
    return PreActResNet(16, widths, blocks, num_classes, in_channels, activation, norm_layer, drop)


def preact_resnet18(
    num_classes: int = 10, in_channels: int = 3, activation: str = "relu", norm_layer: str = "batch"
) -> PreActResNet:
    """PreActResNet-18."""
    widths = (64, 128, 256, 512)
    return PreActResNet(64, widths, 2, num_classes, in_channels, activation, norm_layer)

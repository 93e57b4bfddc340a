"""Wide ResNet WRN-d-k: pre-activation blocks, d = 6n+4, k times the channels of the thin network.

| network   | parameters |
| --------- | ---------- |
| WRN-16-8  | 10,961,370 |
| WRN-28-10 | 36,479,194 |

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016. LFR's authors train SVHN with WRN-16-8.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import activation_layer, global_average_pool, initialize
from models.layers import norm_layer as build_norm


class WideBlock(nn.Module):
    """norm, activation, 3x3, norm, activation, dropout, 3x3, around a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, drop: float, activation: str, norm: str
    ) -> None:
        super().__init__()
        self.bn1 = build_norm(norm, inputs)
        self.relu1 = activation_layer(activation)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = build_norm(norm, outputs)
        self.relu2 = activation_layer(activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.drop = drop
        same = inputs == outputs
        self.convShortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        activated = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.relu2(self.bn2(self.conv1(activated)))
        if self.drop > 0:
            out = F.dropout(out, self.drop, self.training)
        return self.conv2(out) + shortcut


class WideStage(nn.Module):
    """``count`` blocks in a row, the first with the stride."""

    def __init__(
        self,
        count: int,
        inputs: int,
        outputs: int,
        stride: int,
        drop: float,
        activation: str,
        norm: str,
    ) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                WideBlock(
                    inputs if i == 0 else outputs,
                    outputs,
                    stride if i == 0 else 1,
                    drop,
                    activation,
                    norm,
                )
                for i in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide ResNet.

    Args:
        depth: 6n+4, e.g. 16 or 28.
        widen_factor: k, the multiple of 16, 32 and 64 channels.
        num_classes: number of logits.
        in_channels: 3 for colour.
        drop: dropout probability between a block's convolutions.
        activation: a name of :data:`models.layers.ACTIVATIONS`.
        norm_layer: ``batch``, ``group`` or ``none``.

    Raises:
        ValueError: a depth that no n gives, an unknown activation or norm.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        drop: float = 0.0,
        activation: str = "relu",
        norm_layer: str = "batch",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}, a wide ResNet needs 6n+4: 10, 16, 22, 28, ...")
        count = (depth - 4) // 6
        widths = [16, *(width * widen_factor for width in (16, 32, 64))]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        for stage in range(3):
            inputs, outputs = widths[stage], widths[stage + 1]
            stride = 1 if stage == 0 else 2
            blocks = WideStage(count, inputs, outputs, stride, drop, activation, norm_layer)
            setattr(self, f"block{stage + 1}", blocks)
        self.bn1 = build_norm(norm_layer, widths[3])
        self.relu = activation_layer(activation)
        self.fc = nn.Linear(widths[3], num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> logits [N, num_classes]."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_average_pool(self.relu(self.bn1(out))))

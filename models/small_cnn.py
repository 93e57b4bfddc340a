"""SmallCNN, the MNIST network of LFR and TRADES: 4 convolutions, 3 dense layers, no normalisation.

| input       | parameters |
| ----------- | ---------- |
| 1 x 28 x 28 | 312,202    |

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES),
ICML 2019, following Carlini & Wagner 2017.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from models.layers import MONOTONE, activation_layer


class SmallCNN(nn.Module):
    """conv 32, 32, pool, 64, 64, pool, dense 200, 200, classes.

    Args:
        num_classes: number of logits.
        in_channels: 1 for grey images.
        drop: dropout probability after the first dense layer.
        activation: a name of :data:`models.layers.ACTIVATIONS`.
        image_size: side of the square images in pixels; 28 gives the published 1024 features.

    Raises:
        ValueError: images too small for the two poolings, unknown activation.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        drop: float = 0.0,
        activation: str = "relu",
        image_size: int = 28,
    ) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size is {image_size}, SmallCNN needs at least 16 pixels")
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(in_channels, 32, 3),
            "relu1": activation_layer(activation, inplace=True),
            "conv2": nn.Conv2d(32, 32, 3),
            "relu2": activation_layer(activation, inplace=True),
            "maxpool1": nn.MaxPool2d(2),
            "conv3": nn.Conv2d(32, 64, 3),
            "relu3": activation_layer(activation, inplace=True),
            "conv4": nn.Conv2d(64, 64, 3),
            "relu4": activation_layer(activation, inplace=True),
            "maxpool2": nn.MaxPool2d(2),
        }
        order = list(layers)
        if activation in MONOTONE:
            # The same function, gradients included, with a quarter of the activations to compute.
            order[3:5], order[8:10] = ("maxpool1", "relu2"), ("maxpool2", "relu4")
        self.feature_extractor = nn.Sequential(OrderedDict((key, layers[key]) for key in order))
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(64 * side * side, 200),
                relu1=activation_layer(activation, inplace=True),
                drop=nn.Dropout(drop),
                fc2=nn.Linear(200, 200),
                relu2=activation_layer(activation, inplace=True),
                fc3=nn.Linear(200, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.fc3.weight)
        nn.init.zeros_(self.classifier.fc3.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> logits [N, num_classes]."""
        return self.classifier(self.feature_extractor(x).flatten(1))

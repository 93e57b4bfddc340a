"""SmallCNN, the MNIST network of LFR and TRADES: 4 convolutions, 3 dense layers, no normalisation.

312,202 parameters for 28 x 28 grey pixels.
Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES),
ICML 2019, following Carlini & Wagner 2017.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import MONOTONE, activation_layer


class SmallCNN(nn.Module):
    """conv 32, 32, pool, 64, 64, pool, dense 200, dropout, 200, classes.

    ``image_size``: side of the square images in pixels. Raises ValueError for less than 16.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, drop: float = 0.0,
        activation: str = "relu", image_size: int = 28,
    ) -> None:  # fmt: skip
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size is {image_size}, SmallCNN needs at least 16 pixels")
        layers: dict[str, nn.Module] = {}
        channels = in_channels
        for i, width in enumerate((32, 32, 64, 64), 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, width, 3)
            last = {f"relu{i}": activation_layer(activation, inplace=True)}
            if i % 2 == 0:
                last[f"maxpool{i // 2}"] = nn.MaxPool2d(2)
            # Pooling first is the same function, gradients included, with fewer activations.
            order = reversed(last) if activation in MONOTONE else last
            layers.update((key, last[key]) for key in order)
            channels = width
        self.feature_extractor = nn.Sequential(OrderedDict(layers))
        dense = OrderedDict(
            fc1=nn.Linear(64 * side * side, 200),
            relu1=activation_layer(activation, inplace=True),
            drop=nn.Dropout(drop),
            fc2=nn.Linear(200, 200),
            relu2=activation_layer(activation, inplace=True),
            fc3=nn.Linear(200, num_classes),
        )
        self.classifier = nn.Sequential(dense)
        for module in self.feature_extractor:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.fc3.weight)
        nn.init.zeros_(self.classifier.fc3.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> logits [N, num_classes]."""
        return self.classifier(self.feature_extractor(x).flatten(1))

"""The networks against torchvision's blocks, plain functions, published counts and checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from models import ACTIVATIONS, BLOCKS, MODELS, NORM_LAYERS, build_model, infer_arch
from models.layers import activation_layer, conv_norm


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("expected", "name", "options"),
    [
        (312_202, "small_cnn", {}),
        (78_042, "resnet", {"depth": 8}),
        (272_474, "resnet", {}),
        (855_770, "resnet", {"depth": 56}),
        (10_961_370, "wrn", {"depth": 16, "widen_factor": 8}),
        (36_479_194, "wrn", {"depth": 28, "widen_factor": 10}),
        (11_172_170, "preact_resnet", {}),
    ],
)
def test_parameter_counts(expected, name, options):
    """As published: SmallCNN (TRADES), ResNet-20 (0.27 M), WRN-16-8 (11.0 M), WRN-28-10 (36.5 M),
    PreActResNet-18 (11.17 M)."""
    with torch.device("meta"):
        assert count(build_model(name, **options)) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("inputs", "width", "stride"), [(16, 16, 1), (16, 32, 2), (16, 32, 1)])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_torchvision_s(name, inputs, width, stride, training):
    """The same names, the same function; torchvision's have no choice of activation or norm."""
    block = BLOCKS[name](inputs, width, stride, "relu", "batch")
    outputs = width * BLOCKS[name].expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    twin = getattr(torchvision_resnet, name)(inputs, width, stride, shortcut)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(3, inputs, 8, 8)
    torch.testing.assert_close(block.train(training)(x), twin.train(training)(x))
    for (key, buffer), other in zip(block.named_buffers(), twin.buffers()):
        torch.testing.assert_close(buffer, other, msg=key)


def test_resnet_is_stem_stages_pool_and_dense_layer():
    network = build_model("resnet", depth=14).eval()
    x = torch.rand(2, 3, 32, 32)
    out = F.relu(network.bn1(F.conv2d(x, network.conv1.weight, padding=1)))
    sizes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        out = stage(out)
        sizes.append(tuple(out.shape[1:]))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    expected = F.linear(out.mean((2, 3)), network.fc.weight, network.fc.bias)
    torch.testing.assert_close(network(x), expected)


def test_small_cnn_written_out():
    network = build_model("small_cnn")
    nn.init.normal_(network.classifier.fc3.weight)
    weights = network.state_dict()

    def dense(x, name):
        return F.linear(x, weights[f"classifier.{name}.weight"], weights[f"classifier.{name}.bias"])

    x = torch.rand(3, 1, 28, 28)
    out = x
    for i in (1, 2, 3, 4):
        name = f"feature_extractor.conv{i}"
        out = F.conv2d(out, weights[f"{name}.weight"], weights[f"{name}.bias"]).relu()
        out = F.max_pool2d(out, 2) if i in (2, 4) else out
    assert out.shape == (3, 64, 4, 4)
    expected = dense(dense(dense(out.flatten(1), "fc1").relu(), "fc2").relu(), "fc3")
    torch.testing.assert_close(network(x), expected)


def test_wrn_written_out():
    """Pre-activation: norm, activation, convolution, twice; the shortcut starts behind the first
    activation where the shape changes, before it elsewhere."""
    network = build_model("wrn", depth=16, widen_factor=1).eval()
    x = torch.rand(2, 3, 16, 16)
    out = F.conv2d(x, network.conv1.weight, padding=1)
    for stage, stride in ((network.block1, 1), (network.block2, 2), (network.block3, 2)):
        for i, block in enumerate(stage.layer):
            step = stride if i == 0 else 1
            activated = F.relu(block.bn1(out))
            if out.shape[1] != block.conv1.weight.shape[0]:
                out = F.conv2d(activated, block.convShortcut.weight, stride=step)
            inner = F.conv2d(activated, block.conv1.weight, stride=step, padding=1)
            out = out + F.conv2d(F.relu(block.bn2(inner)), block.conv2.weight, padding=1)
    out = F.relu(network.bn1(out)).mean((2, 3))
    torch.testing.assert_close(network(x), network.fc(out))


def preact_resnet_written_out(network, x):
    """Like WRN, with four stages of two blocks."""
    out = F.conv2d(x, network.conv1.weight, padding=1)
    sizes = []
    for i, stage in enumerate((network.block1, network.block2, network.block3, network.block4)):
        for j, block in enumerate(stage.layer):
            step = 2 if i > 0 and j == 0 else 1
            activated = F.relu(block.bn1(out))
            if step == 2:
                out = F.conv2d(activated, block.convShortcut.weight, stride=2)
            inner = F.conv2d(activated, block.conv1.weight, stride=step, padding=1)
            out = out + F.conv2d(F.relu(block.bn2(inner)), block.conv2.weight, padding=1)
        sizes.append(tuple(out.shape[1:]))
    return network.fc(F.relu(network.bn1(out)).mean((2, 3))), sizes


@pytest.mark.parametrize("training", [True, False])
def test_preact_resnet_written_out(training):
    network = build_model("preact_resnet").train(training)
    x = torch.rand(2, 3, 32, 32)
    expected, sizes = preact_resnet_written_out(network, x)
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    torch.testing.assert_close(network(x), expected)


def test_layer_names_are_the_published_ones():
    small = list(build_model("small_cnn").state_dict())
    layers = [f"feature_extractor.conv{i}" for i in (1, 2, 3, 4)]
    layers += [f"classifier.fc{i}" for i in (1, 2, 3)]
    assert small == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    resnet = set(build_model("resnet", depth=14).state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    blocks = [f"layer{s}.{i}." for s in (1, 2, 3) for i in (0, 1)]
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{kind}" for kind in norm)}
    for block in blocks:
        expected |= {f"{block}conv{i}.weight" for i in (1, 2)}
        expected |= {f"{block}bn{i}.{kind}" for i in (1, 2) for kind in norm}
    for block in ("layer2.0.", "layer3.0."):
        expected |= {f"{block}downsample.0.weight", *(f"{block}downsample.1.{k}" for k in norm)}
    assert resnet == expected
    preact = set(build_model("preact_resnet").state_dict())
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{kind}" for kind in norm)}
    for block in (f"block{s}.layer.{i}." for s in (1, 2, 3, 4) for i in (0, 1)):
        expected |= {f"{block}conv{i}.weight" for i in (1, 2)}
        expected |= {f"{block}bn{i}.{kind}" for i in (1, 2) for kind in norm}
    expected |= {f"block{s}.layer.0.convShortcut.weight" for s in (2, 3, 4)}
    assert preact == expected


# -- choices --------------------------------------------------------------------------------------

OPTIONS = [
    ("small_cnn", {"num_classes": 7, "in_channels": 3, "image_size": 32}),
    ("small_cnn", {"image_size": 16, "drop": 0.5}),
    ("resnet", {"depth": 8, "num_classes": 100}),
    ("resnet", {"depth": 11, "block_name": "Bottleneck", "in_channels": 1}),
    ("resnet", {"depth": 8, "norm_layer": "group"}),
    ("resnet", {"depth": 8, "norm_layer": "none"}),
    ("wrn", {"depth": 10, "widen_factor": 2}),
    ("wrn", {"depth": 16, "widen_factor": 1, "norm_layer": "group"}),
    ("wrn", {"depth": 10, "widen_factor": 1, "norm_layer": "none", "drop": 0.3}),
    ("preact_resnet", {"num_classes": 100, "in_channels": 1}),
    ("preact_resnet", {"norm_layer": "group"}),
    ("preact_resnet", {"norm_layer": "none"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_arch_rebuilds_the_network_and_is_read_from_its_weights(name, options):
    network = build_model(name, **options)
    twin = build_model(**network.arch)
    assert twin.arch == network.arch
    twin.load_state_dict(network.state_dict())
    inferred = infer_arch(network.state_dict())
    left_to_defaults = {"drop", "activation"}  # they leave no trace in the weights
    assert set(network.arch) - set(inferred) <= left_to_defaults | {"block_name"}
    assert {key: network.arch[key] for key in inferred} == inferred
    build_model(**inferred).load_state_dict(network.state_dict())
    size = options.get("image_size", 28 if name == "small_cnn" else 16)
    x = torch.rand(2, network.arch["in_channels"], size, size)
    expected = network.eval()(x)
    assert expected.shape == (2, network.arch["num_classes"])
    torch.testing.assert_close(twin.eval()(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_activation_in_every_network(name, activation):
    """It is used, everywhere, in place of ReLU."""
    options = {"depth": 10 if name == "wrn" else 8, "widen_factor": 1, "image_size": 16}
    network = build_model(name, activation=activation, in_channels=1, **options)
    kind = type(activation_layer(activation))
    known = {type(activation_layer(other)) for other in ACTIVATIONS}
    found = [module for module in network.modules() if type(module) in known]
    assert len(found) >= 4 and {type(module) for module in found} == {kind}
    assert network.arch["activation"] == activation
    assert network(torch.rand(2, 1, 16, 16)).isfinite().all()


def test_activations_by_their_formulas():
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    formulas = {
        "relu": x.clamp_min(0),
        "leaky_relu": torch.where(x > 0, x, 0.1 * x),
        "elu": torch.where(x > 0, x, x.exp() - 1),
        "silu": x / (1 + (-x).exp()),
        "gelu": 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "softplus": (1 + (10 * x).exp()).log() / 10,
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    for name, expected in formulas.items():
        torch.testing.assert_close(activation_layer(name)(x), expected, rtol=1e-6, atol=1e-6)


def test_group_norm_sees_one_sample_at_a_time():
    network = build_model("resnet", depth=8, norm_layer="group").train()
    x = torch.rand(4, 3, 16, 16)
    alone = torch.cat([network(image[None]) for image in x])
    torch.testing.assert_close(network(x), alone, rtol=1e-4, atol=1e-5)


def test_without_normalisation_the_network_starts_as_its_shortcuts():
    """Each block's last convolution is zero, so that the signal keeps its size at any depth."""
    shallow, deep = (build_model("resnet", depth=d, norm_layer="none") for d in (8, 56))
    x = torch.rand(8, 3, 16, 16)
    sizes = [
        float(
            network.layer3(network.layer2(network.layer1(network.relu(network.conv1(x)))))
            .std()
            .detach()
        )
        for network in (shallow, deep)
    ]
    assert 0.1 < sizes[1] / sizes[0] < 10
    with torch.no_grad():
        inner = F.relu(torch.rand(2, 16, 8, 8))
        torch.testing.assert_close(deep.layer1[0](inner), inner)


def test_initial_logits_of_small_cnn_are_zero():
    """The last layer starts at zero, and so do the biases of the convolutions."""
    network = build_model("small_cnn")
    assert not network(torch.rand(2, 1, 28, 28)).any()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4
    assert all(m.weight.all() and not m.bias.any() for m in convolutions)


def test_dropout_is_active_in_training_only():
    for name in ("small_cnn", "wrn"):
        network = build_model(name, depth=10, widen_factor=1, drop=0.5, in_channels=1)
        if name == "small_cnn":
            nn.init.normal_(network.classifier.fc3.weight)
        x = torch.rand(2, 1, 28, 28)
        assert not torch.equal(network.train()(x), network(x))
        assert torch.equal(network.eval()(x), network(x))


def test_conv_norm_outside_of_any_mode():
    conv, norm, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), torch.rand(2, 3, 5, 5)
    assert torch.equal(conv_norm(x, conv, norm), norm(conv(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg"}, "'vgg' is unknown, allowed are small_cnn, resnet, wrn, preact_resnet"),
        ({"name": "resnet", "depth": 21}, "depth is 21, BasicBlock needs 6n.2: 8, 14, 20"),
        ({"name": "resnet", "depth": 2}, "depth is 2"),
        ({"name": "resnet", "depth": 20, "block_name": "Bottleneck"}, "needs 9n.2: 11, 20"),
        ({"name": "resnet", "block_name": "Block"}, "'Block' is unknown, allowed are Basic"),
        ({"name": "wrn", "depth": 20}, "depth is 20, a wide ResNet needs 6n.4"),
        ({"name": "wrn", "depth": 4}, "depth is 4"),
        ({"name": "small_cnn", "image_size": 15}, "image_size is 15"),
        ({"name": "small_cnn", "activation": "tanh"}, "'tanh' is unknown, allowed are relu"),
        ({"name": "resnet", "norm_layer": "layer"}, "'layer' is unknown, allowed are batch"),
    ],
)
def test_senseless_options_are_refused(options, message):
    if options == {"name": "resnet", "depth": 20, "block_name": "Bottleneck"}:
        assert count(build_model(**options)) > 0  # 20 = 9 * 2 + 2
        options = {**options, "depth": 26}
    with pytest.raises(ValueError, match=message):
        build_model(**options)


def test_norm_layers():
    for name, kind in zip(NORM_LAYERS, (nn.BatchNorm2d, nn.GroupNorm, nn.Identity)):
        assert isinstance(NORM_LAYERS[name](16), kind)
    assert [NORM_LAYERS["group"](channels).num_groups for channels in (32, 4)] == [4, 1]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"conv1.weight": torch.zeros(16, 3, 3, 3)},
        {"conv1.weight": torch.zeros(16), "fc.weight": torch.zeros(10, 64)},
        {"conv1.weight": torch.zeros(16, 3, 3, 3), "fc.weight": torch.zeros(10, 64)},
        {"feature_extractor.conv1.weight": 3, "classifier.fc3.weight": "x"},
    ],
)
def test_strange_weights_are_no_network_of_ours(state):
    assert infer_arch(state) is None


# -- the original's checkpoints -------------------------------------------------------------------


def original_weights(path) -> dict[str, torch.Tensor]:
    if not path.exists():
        pytest.skip(f"no {path.name}")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix("module."): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("file", "name", "parameters"),
    [
        ("original_mnist.pth.tar", "small_cnn", 312_202),
        ("original_cifar10.pth.tar", "resnet", 272_474),
    ],
)
def test_the_original_s_checkpoints_load(reference_dir, file, name, parameters):
    """Strictly: every weight has its place, and none is left over."""
    state = original_weights(reference_dir / file)
    network = build_model(name)
    assert count(network) == parameters
    network.load_state_dict(state, strict=True)
    assert infer_arch(state) == {key: network.arch[key] for key in infer_arch(state)}


def test_the_original_s_clean_accuracy_on_mnist(reference_dir, mnist_test):
    """99.51 % on the 10,000 test images, as the authors' own code measures."""
    network = build_model("small_cnn").eval().to(memory_format=torch.channels_last)
    network.load_state_dict(original_weights(reference_dir / "original_mnist.pth.tar"))
    right = 0
    with torch.no_grad():
        for x, y in zip(mnist_test.images.split(500), mnist_test.labels.split(500)):
            right += int((network(x.float() / 255).argmax(1) == y).sum())
    assert right == 9951

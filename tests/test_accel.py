"""The fast derivatives are PyTorch's own derivatives: by images and by weights, to any order."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from utils.lfr import (
    BN_MODES,
    NORMS,
    SEARCHES,
    Ball,
    flatness,
    inner_maximization,
    input_gradient,
    lfr_loss,
)
from utils.lfr.accel import Accelerated


class Functional(nn.Module):
    """A network that calls everything as a function, by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.second = nn.Parameter(torch.randn(4, 6, 1, 3) / 4)
        self.bias = nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(F.conv2d(input=x, weight=self.first, bias=self.bias, stride=2, padding=1))
        x = torch.relu(torch.conv2d(x, self.second, None, 1, (0, 1)))
        x = F.relu(input=F.batch_norm(input=x, running_mean=self.mean, running_var=self.var))
        return self.last(x.mean((2, 3)))


class Unbatched(nn.Module):
    """A convolution that sees one image without its batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        return self.last(torch.stack([self.conv(image) for image in x]).relu().mean((2, 3)))


class Branches(nn.Module):
    """What ReLU gives is read by one convolution, by two, by something else, and in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.others = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        one, two, three, four, five = self.others
        x = F.relu(self.first(x))
        left, right = F.relu(one(x)), F.relu(two(x))
        x = F.relu(three(left + right)) * 2 + left
        x = F.relu(x)
        x = x * F.relu(four(x)).tanh()
        return self.last(five(F.max_pool2d(F.relu(x), 2)).mean((2, 3)))


def sequence(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5))


def resnet(**options) -> nn.Module:
    network = build_model("resnet", **{"depth": 8, **options})
    if options.get("norm_layer") == "none":  # its residual branches start at zero: no test of them
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return network


def small_cnn(**options) -> nn.Module:
    network = build_model("small_cnn", image_size=16, **options)
    nn.init.normal_(network.classifier.fc3.weight, std=0.3)
    return network


NETWORKS = {
    "small_cnn": small_cnn,
    "small_cnn colour softplus": lambda: small_cnn(in_channels=3, activation="softplus"),
    "resnet": resnet,
    "resnet silu": lambda: resnet(activation="silu"),
    "resnet softplus": lambda: resnet(activation="softplus"),
    "resnet leaky_relu": lambda: resnet(activation="leaky_relu"),
    "resnet group": lambda: resnet(norm_layer="group"),
    "resnet none": lambda: resnet(norm_layer="none"),
    "resnet grey": lambda: resnet(in_channels=1),
    "resnet bottleneck": lambda: resnet(depth=11, block_name="Bottleneck"),
    "wrn": lambda: build_model("wrn", depth=10, widen_factor=1),
    "functional": Functional,
    "branches": Branches,
    "unbatched": Unbatched,
    "groups, dilation, same": lambda: sequence(
        nn.Conv2d(3, 6, 3, groups=3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 6, 3, dilation=2, padding="same"),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        channels=4,
    ),
    "odd kernels": lambda: sequence(
        nn.Conv2d(3, 4, (1, 5), stride=(1, 2), padding=(2, 0)),
        nn.ReLU(),
        nn.Conv2d(4, 4, (3, 1), padding=(3, 1)),
        nn.ELU(),
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        nn.MaxPool2d(3),
        channels=3,
    ),
}


def prepared(name: str, dtype=torch.float64):
    """The network with BatchNorm statistics and affine parameters of its own, images and labels."""
    torch.manual_seed(3)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    grey = name in ("small_cnn", "resnet grey")
    x = torch.rand(2, 1 if grey else 3, 16, 16, dtype=dtype)
    return network.to(dtype), x, torch.tensor([4, 2])


def double_backward(network, x, y, ball):
    """Gradient norms, and their sum's gradient by x and by all weights: plain PyTorch."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(network(x), y, reduction="sum")
    norms = ball.dual_norm(torch.autograd.grad(loss, x, create_graph=True)[0])
    return norms, gradients(norms.sum(), [x, *network.parameters()])


def accelerated(network, x, y, ball):
    """The same by the method's own functions in the fast mode."""
    x = x.clone().requires_grad_()
    with Accelerated():
        norms = flatness(network, x, y, ball)
    return norms, gradients(norms.sum(), [x, *network.parameters()])


def gradients(value, inputs):
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found)]


def assert_all_close(found, expected, tolerance: float) -> None:
    """Each tensor to a share of the expected one's size; zeros to zeros of the largest's size."""
    found, expected = [f.detach() for f in found], [e.detach() for e in expected]
    size = max(float(e.norm()) for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        assert float((f - e).norm()) <= tolerance * (float(e.norm()) + 1e-3 * size)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_double_backward(name, norm):
    network, x, y = prepared(name)
    network.eval()
    ball = Ball(norm, 0.1)
    expected_norms, expected = double_backward(network, x, y, ball)
    norms, found = accelerated(network, x, y, ball)
    assert_all_close([norms], [expected_norms], 1e-10)
    assert expected[0].any()
    assert_all_close(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["resnet", "wrn", "resnet silu", "groups, dilation, same"])
def test_equal_to_double_backward_by_batch_statistics(name):
    network, x, y = prepared(name)
    network.train()
    ball = Ball("l_inf", 0.1)
    _, expected = double_backward(network, x, y, ball)
    _, found = accelerated(network, x, y, ball)
    assert_all_close(found, expected, 1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["small_cnn", "resnet", "wrn"])
def test_equal_in_single_precision_and_both_layouts(name, layout):
    """oneDNN's kernels, which double precision does not use."""
    network, x, y = prepared(name, torch.float32)
    network.eval().to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    ball = Ball("l_2", 0.1)
    _, expected = double_backward(network, x, y, ball)
    _, found = accelerated(network, x, y, ball)
    assert_all_close(found, expected, 1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["small_cnn", "resnet", "wrn", "resnet silu", "resnet group"])
def test_frozen_gives_the_same_ascent_direction(name, norm):
    """What the search computes: no gradients of weights on the way, the same gradient by x."""
    network, x, y = prepared(name)
    network.eval()
    ball = Ball(norm, 0.1)
    _, (expected, *_) = double_backward(network, x, y, ball)
    x.requires_grad_()
    with Accelerated(frozen=True):
        norms = flatness(network, x, y, ball)
        found = torch.autograd.grad(norms.sum(), x)[0]
    assert_all_close([found], [expected], 1e-9)


GEOMETRIES = {
    "plain": ((2, 3, 5, 5), (4, 3, 3, 3), {}),
    "padding": ((2, 3, 5, 4), (4, 3, 3, 3), {"padding": 1}),
    "full padding": ((1, 2, 4, 4), (3, 2, 3, 3), {"padding": 2}),
    "more than full padding": ((1, 2, 4, 4), (3, 2, 2, 2), {"padding": 3}),
    "1x1 with padding": ((1, 2, 3, 3), (3, 2, 1, 1), {"padding": 1}),
    "stride": ((2, 2, 6, 5), (3, 2, 3, 3), {"stride": 2, "padding": 1}),
    "stride that leaves a rest": ((1, 2, 6, 6), (3, 2, 3, 3), {"stride": 2}),
    "uneven": ((1, 2, 6, 7), (3, 2, 3, 2), {"stride": (1, 2), "padding": (0, 1)}),
    "dilation": ((1, 2, 7, 7), (3, 2, 3, 3), {"dilation": 2, "padding": 2}),
    "groups": ((1, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((1, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
    "same": ((1, 2, 5, 5), (3, 2, 3, 5), {"padding": "same"}),
    "grey": ((2, 1, 6, 6), (3, 1, 3, 3), {}),
    "grey, padding": ((2, 1, 5, 6), (3, 1, 3, 3), {"padding": 1}),
    "grey, 5x5, uneven padding": ((1, 1, 6, 6), (2, 1, 5, 3), {"padding": (2, 0)}),
    "grey, full padding": ((1, 1, 4, 4), (2, 1, 2, 3), {"padding": (1, 2)}),
    "grey, more than full padding": ((1, 1, 3, 3), (2, 1, 1, 1), {"padding": 1}),
    "grey, stride": ((1, 1, 6, 6), (2, 1, 3, 3), {"stride": 2, "padding": 1}),
    "grey, 7x7": ((1, 1, 8, 8), (2, 1, 7, 7), {"padding": 3}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolution_against_finite_differences(name):
    """First and second derivatives by image, weight and bias."""
    shape, weight_shape, options = GEOMETRIES[name]
    inputs = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in (shape, weight_shape, weight_shape[:1])
    ]

    def convolution(x, weight, bias):
        with Accelerated():
            return F.conv2d(x, weight, bias, **options)

    assert torch.equal(convolution(*inputs), F.conv2d(*inputs, **options))
    assert gradcheck(convolution, inputs, fast_mode=True)
    assert gradgradcheck(convolution, inputs, fast_mode=True)


def test_third_derivatives_of_convolution():
    """The three functions are closed under differentiation, so a fourth order needs no code."""
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def gradient(x, weight):
        with Accelerated():
            value = F.conv2d(x, weight, padding=1).pow(3).sum()
        return torch.autograd.grad(value, (x, weight), create_graph=True)

    assert gradgradcheck(gradient, (x, weight), fast_mode=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["small_cnn", "resnet", "wrn"])
def test_gauss_newton_is_the_whole_curvature_of_a_relu_network(name, norm):
    """H v = J^T (diag(p) - p p^T) J v with J by forward mode, which shares no code with us."""
    network, x, y = prepared(name)
    network.eval()
    ball = Ball(norm, 0.1)
    g = input_gradient(network, x, y)
    v = ball.steepest(g)
    logits, jv = torch.func.jvp(network, (x,), (v,))
    p = logits.softmax(1)
    curvature = p * jv - p * (p * jv).sum(1, keepdim=True)
    expected = torch.func.vjp(network, x)[1](curvature)[0]

    _, (found, *_) = accelerated(network, x, y, ball)
    assert_all_close([found], [expected.detach()], 1e-9)


def test_smooth_activations_have_more_curvature_than_gauss_newton():
    """Otherwise the test above would show nothing about ReLU."""
    network, x, y = prepared("resnet silu")
    network.eval()
    v = Ball("l_inf", 0.1).steepest(input_gradient(network, x, y))
    logits, jv = torch.func.jvp(network, (x,), (v,))
    p = logits.softmax(1)
    expected = torch.func.vjp(network, x)[1](p * jv - p * (p * jv).sum(1, keepdim=True))[0]
    _, (found, *_) = accelerated(network, x, y, Ball("l_inf", 0.1))
    difference, size = (found - expected).detach().norm(), expected.detach().norm()
    assert float(difference) > 0.01 * float(size)


class WeightGradients(TorchDispatchMode):
    """Counts the gradients of convolution weights that are computed while it is entered."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.count += args[-1][1]
        return func(*args, **(kwargs or {}))


def test_only_the_training_step_computes_gradients_of_weights():
    """The search none; the penalty's first derivative none, its backward pass two a layer."""
    network, x, y = prepared("resnet")
    network.eval()
    ball = Ball("l_inf", 0.1)
    with WeightGradients() as search:
        inner_maximization(network, x, y, ball, step_size=0.02, num_steps=2)
    assert search.count == 0
    with Accelerated():
        with WeightGradients() as first:
            norms = flatness(network, x, y, ball)
        with WeightGradients() as second:
            norms.sum().backward()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert first.count == 0 and second.count == 2 * convolutions


@pytest.mark.parametrize("search", ["paper", "fast"])
@pytest.mark.parametrize("name", ["small_cnn", "resnet", "wrn"])
def test_memory_does_not_grow_with_the_steps(name, search):
    """Each step's points die with the step, by reference counting alone: no graph, no cycle."""
    network, x, y = prepared(name, torch.float32)
    network.eval()
    alive_at_entry, points = [], []

    def look(module, inputs):
        alive_at_entry.append(sum(point() is not None for point in points))
        points.append(weakref.ref(inputs[0]))

    network.register_forward_pre_hook(look)
    gc.collect()
    gc.disable()
    try:
        inner_maximization(
            network, x, y, Ball("l_inf", 0.1), step_size=0.01, num_steps=5, search=search
        )
        assert not any(point() is not None for point in points)
    finally:
        gc.enable()
    assert len(points) == 5 and max(alive_at_entry) <= 1


@pytest.mark.parametrize("bn_mode", ["shared", "mixed"])
def test_a_training_step_leaves_no_activation_alive(bn_mode):
    """After the backward pass and without waiting for the garbage collector."""
    network, x, y = prepared("resnet", torch.float32)
    network.train()
    seen = []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(
                lambda module, inputs, output: seen.append(weakref.ref(output))
            )
    ball = Ball("l_inf", 0.1)
    gc.collect()
    gc.disable()
    try:
        terms = lfr_loss(
            network, x, y, ball, step_size=0.02, num_steps=2, lambada=0.1, bn_mode=bn_mode
        )
        assert any(output() is not None for output in seen)
        terms.total.backward()
        del terms
        assert len(seen) > 20 and not any(output() is not None for output in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bn_mode", BN_MODES)
def test_a_training_step_leaves_nothing_to_collect(bn_mode, search):
    """No circle of references: one that runs through the graph holds gigabytes in minutes."""
    network, x, y = prepared("resnet", torch.float32)
    network.train()

    def step() -> None:
        options = {"step_size": 0.02, "num_steps": 2, "lambada": 0.1}
        ball = Ball("l_inf", 0.1)
        terms = lfr_loss(network, x, y, ball, search=search, bn_mode=bn_mode, **options)
        terms.total.backward()

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["small_cnn", "resnet", "wrn"])
def test_autocast_is_finite_and_close(name):
    network, x, y = prepared(name, torch.float32)
    network.eval()
    ball = Ball("l_2", 0.1)
    expected_norms, expected = accelerated(network, x, y, ball)
    with torch.autocast("cpu", torch.bfloat16):
        norms, found = accelerated(network, x, y, ball)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected_norms, rtol=0.05, atol=1e-3)
    assert all(f.dtype == torch.float32 and f.isfinite().all() for f in found)
    cosine = F.cosine_similarity(found[0].flatten(), expected[0].flatten(), dim=0)
    assert float(cosine) > 0.9


def test_nothing_of_the_mode_stays():
    """Also after an error inside: the same outputs, and gradients for all weights."""
    network, x, _ = prepared("resnet")
    network.eval()
    before = network(x)
    with pytest.raises(RuntimeError), Accelerated(frozen=True):
        F.conv2d(x, torch.zeros(1, 9, 3, 3, dtype=x.dtype))
    with Accelerated():
        inside = network(x)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(inside.sum(), torch.zeros(1, requires_grad=True))
    torch.testing.assert_close(inside, before)
    after = network(x)
    assert torch.equal(before, after)
    for output in (inside, after):
        network.zero_grad()
        output.sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())

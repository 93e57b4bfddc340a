"""LFR on networks that know nothing of it, against plain double backward in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer, mobilenet_v3_small, resnet18
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from utils.lfr import SEARCHES, Ball, inner_maximization, lfr_loss

BALL = Ball("l_inf", 0.05)
STEP_SIZE, NUM_STEPS, LAMBADA = 0.03, 2, 0.1


def convnext() -> nn.Module:
    """ConvNeXt's blocks (torchvision's convnext_tiny has 18, of up to 768 channels)."""
    return ConvNeXt([CNBlockConfig(12, 24, 1), CNBlockConfig(24, None, 1)], 0.0, num_classes=5)


def vision_transformer() -> nn.Module:
    network = VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.1, num_classes=5)
    nn.init.normal_(network.heads.head.weight)  # it starts at zero: no gradients
    return network


class Encoder(nn.Module):
    """PyTorch's own transformer layers, which have a fast path of their own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.SiLU(),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Dropout(),
        nn.LazyLinear(5),
    )


NETWORKS = {
    "resnet18": lambda: resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: mobilenet_v3_small(num_classes=5),
    "convnext": convnext,
    "vision transformer": vision_transformer,
    "transformer encoder": Encoder,
    "dropout": dropout,
}


class Hardsigmoid(nn.Module):
    """By its formula, for PyTorch's own cannot be differentiated twice."""

    def forward(self, x):
        return (x + 3).clamp(0, 6) / 6


def differentiable(network: nn.Module) -> nn.Module:
    """A copy that plain PyTorch can differentiate twice."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, Hardsigmoid())
    return network


def prepared(name: str, training: bool = True):
    torch.manual_seed(4)
    network = NETWORKS[name]()
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 1])
    with torch.no_grad():
        network(x)  # lazy layers learn their size
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # or a deep network's signal vanishes
                module.momentum = 1.0
        network(torch.rand(16, 3, 16, 16))
    return network.double().train(training), x.double(), y


def gradient_norms(network, x, y):
    loss = F.cross_entropy(network(x), y, reduction="sum")
    return torch.autograd.grad(loss, x, create_graph=True)[0].abs().sum((1, 2, 3))


def search_point(network, x, y, search: str):
    """Ascent from x itself, the network in eval mode."""
    network.eval()
    x_adv = x
    for _ in range(NUM_STEPS):
        x_adv = x_adv.detach().requires_grad_()
        value = (
            gradient_norms(network, x_adv, y).sum()
            if search == "paper"
            else F.cross_entropy(network(x_adv), y, reduction="sum")
        )
        step = STEP_SIZE * torch.autograd.grad(value, x_adv)[0].sign()
        x_adv = (x_adv + step).clamp(x - BALL.epsilon, x + BALL.epsilon).clamp(0, 1).detach()
    return x_adv


def plain_loss(network, x, y, training: bool, search: str):
    """The loss with the running statistics of BatchNorm everywhere: total and x_adv."""

    def mode(on: bool) -> None:
        network.train(on)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    with sdpa_kernel(SDPBackend.MATH):
        mode(training)
        natural = F.cross_entropy(network(x), y)
        x_adv = search_point(network, x, y, search)
        mode(training)
        penalty = gradient_norms(network, x_adv.requires_grad_(), y).mean()
    network.train(training)
    return natural + LAMBADA * penalty, x_adv.detach()


def our_loss(network, x, y, search: str = "paper"):
    terms = lfr_loss(
        network, x, y, BALL, step_size=STEP_SIZE, num_steps=NUM_STEPS, lambada=LAMBADA,
        search=search, bn_mode="running", start=x,
    )  # fmt: skip
    return terms.total, terms.x_adv


def assert_same_step(ours, plain, found, expected) -> None:
    """Loss and points, and after the backward pass the gradient of every weight."""
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=0)
    for total, _ in (found, expected):
        total.backward()
    size = max(float(p.grad.norm()) for p in plain.parameters())
    assert size > 0
    for (name, f), e in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert float((f.grad - e.grad).norm()) <= 1e-9 * size, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_equals_plain_double_backward(name, training):
    """In train mode with the same dropout masks; the search without any."""
    ours, x, y = prepared(name, training)
    plain = differentiable(ours)
    torch.manual_seed(5)
    found = our_loss(ours, x, y)
    torch.manual_seed(5)
    expected = plain_loss(plain, x, y, training, "paper")
    assert_same_step(ours, plain, found, expected)
    assert ours.training == training


@pytest.mark.parametrize("bn_mode", ["shared", "batch", "mixed"])
@pytest.mark.parametrize("search", SEARCHES)
def test_attention_by_its_usual_kernel_cannot_be_differentiated_twice(search, bn_mode):
    """Which is why lfr_loss chooses another one; with the usual kernel the method would fail."""
    network, x, y = prepared("vision transformer")
    network.float()
    x = x.float()
    options = {"step_size": STEP_SIZE, "num_steps": NUM_STEPS, "search": search, "lambada": 0.1}
    lfr_loss(network, x, y, BALL, bn_mode=bn_mode, **options).total.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="derivative"):
        gradient_norms(network, x, y).sum().backward()


@pytest.mark.parametrize("search", SEARCHES)
def test_compiled_networks_are_used_as_they_were_before(search):
    ours, x, y = prepared("convnext")
    plain = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="aot_eager")
    found = our_loss(compiled, x, y, search)
    expected = plain_loss(plain, x, y, True, search)
    assert_same_step(ours, plain, found, expected)
    options = {"step_size": STEP_SIZE, "num_steps": NUM_STEPS, "search": search, "start": x}
    point = inner_maximization(compiled.eval(), x, y, BALL, **options)
    torch.testing.assert_close(point, search_point(ours, x, y, search))

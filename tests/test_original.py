"""The original's training step, written out in plain PyTorch from the facts, beside ours.

The facts, of one step on a batch (x, y):

1. The network in eval mode. x' = clamp(x + 0.001 * noise, 0, 1); num_steps times x' moves by
   step_size * sign(grad_x' ||grad_x' L||_1), then into the l_inf ball around x and into [0, 1].
   BatchNorm's running statistics are those that the step before left.
2. The network in train mode. Mean cross-entropy at x, then the mean over the batch of the L1 norms
   of the input gradients at x', differentiable in the weights: BatchNorm normalises by the clean,
   then by the perturbed batch, and its running statistics see both.
3. One more pass of x in train mode, for the accuracy: a third update of the running statistics.

The loss is natural term + lambda * penalty; the optimizer is SGD.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from utils.lfr import BN_MODES, Ball, lfr_loss

EPSILON, STEP_SIZE, NUM_STEPS, LAMBADA = 0.031, 0.007, 2, 0.03


def gradient_norms(network, x, y):
    """The L1 norm of each sample's input gradient, differentiable; x requires grad."""
    loss = F.cross_entropy(network(x), y) * len(x)
    return torch.autograd.grad(loss, x, create_graph=True)[0].abs().sum((1, 2, 3))


def original_search(network, x, y, noise):
    network.eval()
    x_adv = (x + 0.001 * noise).clamp(0, 1)
    for _ in range(NUM_STEPS):
        x_adv = x_adv.detach().requires_grad_()
        direction = torch.autograd.grad(gradient_norms(network, x_adv, y).sum(), x_adv)[0].sign()
        x_adv = (x_adv + STEP_SIZE * direction).detach()
        x_adv = torch.minimum(torch.maximum(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
    return x_adv


def original_step(network, x, y, noise, search_first: bool = True):
    """(loss, natural term, penalty, x'), before the third pass of step 3."""
    x_adv = original_search(network, x, y, noise) if search_first else None
    network.train()
    natural = F.cross_entropy(network(x), y)
    if x_adv is None:  # the order undone
        x_adv = original_search(network, x, y, noise)
        network.train()
    penalty = gradient_norms(network, x_adv.requires_grad_(), y).mean()
    x_adv = x_adv.detach()
    with torch.no_grad():
        network(x)
    return natural + LAMBADA * penalty, natural, penalty, x_adv


def our_step(network, x, y, noise, bn_mode: str = "mixed"):
    network.train()
    start = (x + 0.001 * noise).clamp(0, 1)
    options = {"step_size": STEP_SIZE, "num_steps": NUM_STEPS, "lambada": LAMBADA}
    terms = lfr_loss(network, x, y, Ball("l_inf", EPSILON), bn_mode=bn_mode, start=start, **options)
    return terms.total, terms.natural, terms.penalty, terms.x_adv


def small_cnn() -> nn.Module:
    network = build_model("small_cnn", image_size=16)
    nn.init.normal_(network.classifier.fc3.weight, std=0.3)  # it starts at zero: no gradients
    return network


NETWORKS = {
    "small_cnn": small_cnn,
    "resnet-8": lambda: build_model("resnet", depth=8),
    "resnet-20": lambda: build_model("resnet", depth=20),
}


def train(step, network, steps: int, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """What each of ``steps`` training steps computes and leaves behind, by name."""
    generator = torch.Generator().manual_seed(7)
    channels = next(network.parameters()).shape[1]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    log = []
    for _ in range(steps):
        side = 16 if channels == 1 else 12
        shape = (size, channels, side, side)
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (size,), generator=generator)
        total, natural, penalty, x_adv = step(network, x, y, noise)
        optimizer.zero_grad()
        total.backward()
        gradients = {f"grad {k}": p.grad.clone() for k, p in network.named_parameters()}
        optimizer.step()
        found = {"total": total, "natural": natural, "penalty": penalty, "x_adv": x_adv}
        state = copy.deepcopy(network.state_dict())
        log.append({k: v.detach().double() for k, v in {**found, **gradients, **state}.items()})
    return log


def largest_difference(ours, originals) -> float:
    """Over all steps and tensors, relative to a tensor's largest entry where that exceeds 1."""
    largest = 0.0
    for found, expected in zip(ours, originals, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            difference = (found[key] - value).abs().max() / value.abs().max().clamp_min(1)
            largest = max(largest, float(difference))
    return largest


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(2)
    network = NETWORKS[name]().double()
    return network, copy.deepcopy(network)


@pytest.mark.parametrize(
    ("name", "steps"), [("small_cnn", 20), ("resnet-8", 1), ("resnet-20", 1), ("resnet-20", 20)]
)
def test_mixed_is_the_original(name, steps):
    """Loss, its terms, points, gradients, weights and running statistics in every step."""
    ours, originals = twins(name)
    found, expected = train(our_step, ours, steps), train(original_step, originals, steps)
    assert largest_difference(found, expected) <= 1e-9


@pytest.mark.parametrize("bn_mode", sorted(set(BN_MODES) - {"mixed"}))
def test_the_other_modes_are_the_original_without_batch_norm_only(bn_mode):
    """With BatchNorm ``mixed`` is the only one that has a counterpart there."""

    def step(*arguments):
        return our_step(*arguments, bn_mode=bn_mode)

    ours, originals = twins("small_cnn")
    assert largest_difference(train(step, ours, 3), train(original_step, originals, 3)) <= 1e-9
    ours, originals = twins("resnet-8")
    assert largest_difference(train(step, ours, 1), train(original_step, originals, 1)) > 1e-3


@pytest.mark.parametrize("name", ["resnet-8", "resnet-20"])
def test_the_order_matters(name):
    """Undone, with the clean pass before the search, the points and the gradients are others."""

    def undone(*arguments):
        return original_step(*arguments, search_first=False)

    ours, originals = twins(name)
    (found,), (expected,) = train(our_step, ours, 1), train(undone, originals, 1)
    assert largest_difference([found], [expected]) > 1e-3
    assert float((found["x_adv"] != expected["x_adv"]).double().mean()) > 0.01
    torch.testing.assert_close(found["natural"], expected["natural"])  # this one has no order

"""Every defense's loss against its formula in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from utils.defenses import DEFENSES, Defense, DefenseLoss
from utils.lfr import NORMS, Ball, initial_point, lfr_loss


def prepared(batch_norm: bool = False):
    torch.manual_seed(2)
    if batch_norm:
        network = build_model("resnet", depth=8, in_channels=1)
        with torch.no_grad():
            network(torch.rand(8, 1, 16, 16))
    else:
        network = build_model("small_cnn", image_size=16)
        nn.init.normal_(network.classifier.fc3.weight, std=0.3)
    x, y = torch.rand(3, 1, 16, 16, dtype=torch.float64), torch.tensor([4, 0, 9])
    return network.double().train(), x, y, torch.randn_like(x)


def defense(name: str, norm: str = "l_inf", **options) -> Defense:
    epsilon = 0.1 if norm == "l_inf" else 1.0
    return Defense(name, Ball(norm, epsilon), epsilon / 3, 3, **options)


def ascent(x, start, ball, step_size, gradient, steps=3):
    """Projected steps of the given gradient, spelled out for both norms."""
    point = start
    for _ in range(steps):
        g = gradient(point.detach().requires_grad_())
        if ball.norm == "l_inf":
            x_adv = point + step_size * g.sign()
            point = torch.maximum(torch.minimum(x_adv, x + ball.epsilon), x - ball.epsilon)
        else:
            per_sample = lambda t: t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # noqa: E731
            delta = point + step_size * g / per_sample(g) - x
            point = x + delta * (ball.epsilon / per_sample(delta)).clamp_max(1)
        point = point.clamp(0, 1)
    return point.detach()


def assert_same_gradients(network, found, expected) -> None:
    parameters = list(network.parameters())
    found = torch.autograd.grad(found, parameters)
    for f, e in zip(found, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("search", ["paper", "fast"])
def test_lfr_is_the_method(search):
    network, x, y, noise = prepared()
    d = defense("lfr", search=search)
    terms = DefenseLoss(network, d)(x, y, noise, 0.7)
    start = initial_point(x, d.ball, search, noise)
    options = {"step_size": d.step_size, "num_steps": 3, "search": search, "start": start}
    expected = lfr_loss(network, x, y, d.ball, lambada=0.7, **options)
    torch.testing.assert_close(terms.total, expected.total)
    assert torch.equal(terms.x_adv, expected.x_adv)
    assert_same_gradients(network, terms.total, expected.total)


@pytest.mark.parametrize("norm", NORMS)
def test_igr_is_lfr_without_a_step(norm):
    network, x, y, noise = prepared()
    terms = DefenseLoss(network, defense("igr", norm))(x, y, noise, 0.7)
    expected = lfr_loss(
        network, x, y, defense("igr", norm).ball, step_size=0.1, num_steps=0, lambada=0.7
    )
    for found, wanted in zip(terms, expected):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(terms.x_adv, x)
    assert_same_gradients(network, terms.total, expected.total)


@pytest.mark.parametrize("norm", NORMS)
def test_adversarial_training(norm):
    """Cross-entropy at the end of PGD from a random start."""
    network, x, y, noise = prepared()
    d = defense("at", norm)
    terms = DefenseLoss(network, d)(x, y, noise, 0.7)

    def gradient(point):
        loss = F.cross_entropy(network(point), y, reduction="sum")
        return torch.autograd.grad(loss, point)[0]

    uniform = 2 * torch.distributions.Normal(0, 1).cdf(noise) - 1
    start = d.ball.project(x + d.ball.epsilon * uniform, x)
    x_adv = ascent(x, start, d.ball, d.step_size, gradient)
    torch.testing.assert_close(terms.x_adv, x_adv)
    expected = F.cross_entropy(network(x_adv), y)
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.natural, expected.detach())
    assert float(terms.penalty) == 0
    torch.testing.assert_close(terms.logits, network(x_adv).detach())
    assert_same_gradients(network, terms.total, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_trades(norm):
    """CE(f(x), y) + beta * mean sum_k p_k(x) log(p_k(x) / p_k(x')), x' where that KL is largest."""
    network, x, y, noise = prepared()
    d = defense("trades", norm, beta=2.5)
    terms = DefenseLoss(network, d)(x, y, noise, 0.7)

    def divergence(p, point):
        return (p * (p.log() - network(point).softmax(1).log())).sum(1)

    fixed = network(x).softmax(1).detach()

    def gradient(point):
        return torch.autograd.grad(divergence(fixed, point).sum(), point)[0]

    x_adv = ascent(x, (x + 0.001 * noise).clamp(0, 1), d.ball, d.step_size, gradient)
    torch.testing.assert_close(terms.x_adv, x_adv)
    natural = F.cross_entropy(network(x), y)
    robust = divergence(network(x).softmax(1), x_adv).mean()
    torch.testing.assert_close(terms.natural, natural.detach())
    torch.testing.assert_close(terms.penalty, robust.detach())
    torch.testing.assert_close(terms.total, natural + 2.5 * robust)
    assert_same_gradients(network, terms.total, natural + 2.5 * robust)


def test_none_is_cross_entropy():
    network, x, y, noise = prepared()
    terms = DefenseLoss(network, defense("none"))(x, y, noise, 0.7)
    torch.testing.assert_close(terms.total, F.cross_entropy(network(x), y))
    assert float(terms.penalty) == 0 and terms.x_adv is x


@pytest.mark.parametrize("name", DEFENSES)
def test_common_to_all(name):
    """One signature; gradients for every weight; BatchNorm and modes as after plain training."""
    network, x, y, noise = prepared(batch_norm=True)
    before = {key: value.clone() for key, value in network.named_buffers()}
    twin = copy.deepcopy(network)
    random = torch.get_rng_state()
    d = defense(name)
    terms = DefenseLoss(network, d)(x, y, noise, 0.5)
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert terms.logits.shape == (3, 10) and not terms.logits.requires_grad
    assert bool((d.ball.distance(terms.x_adv, x) <= d.ball.epsilon + 1e-9).all())
    assert float(terms.natural.detach()) > 0

    seen = {"at": [terms.x_adv], "trades": [x, terms.x_adv]}.get(name, [x])
    with torch.no_grad():
        for images in seen:
            twin(images)
    for key, value in network.named_buffers():
        torch.testing.assert_close(value, dict(twin.named_buffers())[key], msg=key)
        assert not torch.equal(value, before[key]), key

"""FGSM, PGD and MPGD against closed forms, a second library, and their promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models import build_model
from utils.attacks import ATTACKS, Budget, Settings, family, gradient_budget, logits_of, pgd
from utils.attacks.budgets import COLOUR, GREY, SVHN
from utils.attacks.gradient import (
    BudgetViolation,
    _with_momentum,
    filled_up,
    gradients,
    losses_of,
    random_starts,
    sample_generator,
    verify,
)
from utils.errors import UserError
from utils.lfr import NORMS, Ball
from utils.lfr.accel import Accelerated


class Linear(nn.Module):
    """Logits W x + b of the flattened image: everything about it is known in closed form."""

    def __init__(self, values: int, classes: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(values, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Counting(nn.Module):
    """Counts the images it is asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, x):
        self.images += len(x)
        return self.network(x)


def margins(network: Linear, x, y):
    """Logit of the true class minus that of the other, and the gradient of that difference."""
    weight, bias = network.layer.weight, network.layer.bias
    normal = (weight[y] - weight[1 - y]).detach()
    return (normal * x.flatten(1)).sum(1) + (bias[y] - bias[1 - y]).detach(), normal


@pytest.fixture
def linear():
    """A linear network of two classes and images far from the ends of the pixels' range."""
    network = Linear(3 * 4 * 4)
    x = 0.5 + 0.2 * (torch.rand(60, 3, 4, 4) - 0.5)
    with torch.no_grad():
        network.layer.bias.copy_(-0.5 * network.layer.weight.sum(1))  # small margins, both signs
        y = network(x).argmax(1)
        y[:5] = 1 - y[:5]  # misclassified to begin with
    return network, x, y


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_verdicts_of_a_linear_network_are_those_of_the_closed_form(linear, norm):
    network, x, y = linear
    margin, normal = margins(network, x, y)
    reach = normal.norm(p=1 if norm == "l_inf" else 2, dim=1)
    ball = Ball(norm, float((margin / reach)[margin > 0].median()))
    assert ball.epsilon < 0.3  # far from the ends of the pixels' range
    left = margin - ball.epsilon * reach  # of the margin at the worst point of the ball
    clear = left.abs() > 1e-5
    network, x, y, expected = network, x[clear], y[clear], (left > 0)[clear]
    assert 5 < expected.sum() < 50
    for budget in (
        Budget(norm, ball.epsilon, 1, ball.epsilon, random_start=False),
        Budget(norm, ball.epsilon, 20, ball.epsilon / 4, restarts=2),
        Budget(norm, ball.epsilon, 20, ball.epsilon / 4, random_start=False, decay=0.1),
    ):
        result = pgd(network, x, y, budget)
        assert torch.equal(result.robust, expected)
        assert torch.equal(network(result.x_adv).argmax(1) == y, expected)


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_without_early_stop_the_loss_is_the_largest_of_the_ball(linear, norm):
    network, x, y = linear
    margin, normal = margins(network, x, y)
    reach = 0.05 * normal.norm(p=1 if norm == "l_inf" else 2, dim=1)
    found = pgd(network, x, y, Budget(norm, 0.05, 20, 0.02), early_stop=False)
    assert torch.allclose(found.loss, nn.functional.softplus(reach - margin), atol=1e-4)


def test_no_image_leaves_ball_or_box(small_cnn):
    x = torch.rand(12, 1, 28, 28).round(decimals=1)
    y = small_cnn(x).argmax(1)
    for norm, epsilon in (("l_inf", 0.3), ("l_2", 2.0)):
        found = pgd(small_cnn, x, y, Budget(norm, epsilon, 5, epsilon / 2))
        verify(found.x_adv, x, Ball(norm, epsilon))


def test_verify_raises():
    x = torch.full((2, 1, 2, 2), 0.5)
    ball = Ball("l_inf", 0.1)
    verify(x + 0.1, x, ball)
    for wrong in (x + 0.11, x - 0.6, x + 0.6, x * torch.nan):
        with pytest.raises(BudgetViolation):
            verify(wrong, x, ball)
    with pytest.raises(BudgetViolation):
        verify(x - 0.6, x)


@pytest.mark.parametrize("first_bad_pass", [0, 1, 2, 3])
def test_a_network_that_answers_nan_is_no_robust_network(small_cnn, first_bad_pass):
    class Breaks(Counting):
        def forward(self, images):
            bad = self.images >= 8 * first_bad_pass
            return super().forward(images) * (torch.nan if bad else 1) + 100 * torch.eye(10)[0]

    x, y = torch.rand(8, 1, 28, 28), torch.zeros(8, dtype=torch.long)
    with pytest.raises(UserError, match="not finite"):
        pgd(Breaks(small_cnn), x, y, Budget("l_inf", 0.3, 2, 0.3))


def test_verdicts_do_not_depend_on_the_batch(small_cnn):
    x = torch.rand(20, 1, 28, 28)
    y = small_cnn(x).argmax(1)
    y[::9] = (y[::9] + 1) % 10
    budget = Budget("l_inf", 0.02, 2, 0.01, restarts=2)
    index = torch.arange(20)
    whole = pgd(small_cnn, x, y, budget, seed=3, index=index)
    assert 2 < whole.robust.sum() < 17
    for batch in (3, 16):
        parts = [
            pgd(small_cnn, x[rows], y[rows], budget, seed=3, index=rows)
            for rows in index.split(batch)
        ]
        assert torch.equal(torch.cat([part.robust for part in parts]), whole.robust)
        assert torch.equal(torch.cat([part.x_adv for part in parts]), whole.x_adv)
    order = torch.randperm(20)
    shuffled = pgd(small_cnn, x[order], y[order], budget, seed=3, index=order)
    assert torch.equal(shuffled.robust, whole.robust[order])


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_gets_the_same_digits_in_any_batch(small_cnn, tiny_resnet, threads):
    torch.set_num_threads(threads)
    networks = ((small_cnn, (1, 28, 28)), (tiny_resnet, (3, 32, 32)))
    for network, shape in networks[: 3 - threads]:
        x, y = torch.rand(240, *shape), torch.randint(10, (240,))
        with Accelerated(frozen=True):
            whole = gradients(network, x, y, losses_of)
        for count in (1, 3, 11, 17, 100, 200):
            with Accelerated(frozen=True):
                part = gradients(network, x[:count], y[:count], losses_of)
            for values, all_values in zip(part, whole):
                assert torch.equal(values, all_values[:count])
            plain = logits_of(network, x[:count])
            assert torch.equal(plain, logits_of(network, x)[:count])


def test_filled_up_keeps_the_images():
    x = torch.rand(3, 1, 2, 2)
    assert torch.equal(filled_up(x)[:3], x)
    assert len(filled_up(x)) % 8 == 0
    assert len(logits_of(Linear(4), x[:0])) == 0


def test_another_seed_starts_elsewhere_and_the_same_seed_does_not():
    x, ball, index = torch.rand(6, 3, 8, 8), Ball("l_inf", 0.2), torch.arange(6)
    starts = random_starts(x, ball, 0, index, 0)
    verify(starts, x, ball)
    assert torch.equal(starts, random_starts(x, ball, 0, index, 0))
    assert torch.equal(starts[4:], random_starts(x[4:], ball, 0, index[4:], 0))
    assert not torch.equal(starts, random_starts(x, ball, 1, index, 0))
    assert not torch.equal(starts, random_starts(x, ball, 0, index, 1))


def test_generators_differ_in_every_argument():
    keys = [(s, i, r) for s in range(8) for i in range(8) for r in range(8)]
    drawn = {float(torch.rand((), generator=sample_generator(*key))) for key in keys}
    assert len(drawn) == len(keys)


def test_misclassified_images_are_not_attacked_again(linear):
    network, x, y = linear
    x, y = x.repeat(8, 1, 1, 1), y.repeat(8)
    counted = Counting(network)
    found = pgd(counted, x, y, Budget("l_inf", 0.4, 20, 0.1, restarts=3))
    assert not found.robust.any()
    # the clean pass, a few steps until all are misclassified, the check; not 20 steps x 3 starts
    assert counted.images < 8 * len(x)
    assert torch.equal(found.x_adv[:5], x[:5])  # misclassified to begin with: left alone


def test_early_exit_gives_the_verdict_of_the_full_run(small_cnn):
    x = torch.rand(16, 1, 28, 28)
    y = small_cnn(x).argmax(1)
    budget = Budget("l_inf", 0.02, 6, 0.005)
    quick = pgd(small_cnn, x, y, budget)
    full = pgd(small_cnn, x, y, budget, early_stop=False)
    assert 0 < quick.robust.sum() < 16
    assert torch.equal(quick.robust, full.robust)
    assert (full.loss >= quick.loss - 1e-5)[quick.robust].all()


def test_the_network_is_left_as_it_was(tiny_resnet):
    network = tiny_resnet
    network.layer1.train()
    network.fc.weight.requires_grad_(False)
    modes = [module.training for module in network.modules()]
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6)
    random = torch.random.get_rng_state()
    pgd(network, x, y, Budget("l_inf", 0.1, 3, 0.05, restarts=2))
    assert modes == [module.training for module in network.modules()]
    assert wanted == [parameter.requires_grad for parameter in network.parameters()]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_pgd_walks_where_foolbox_walks(norm):
    foolbox = pytest.importorskip("foolbox")
    network = build_model("small_cnn", activation="softplus").eval()
    nn.init.normal_(network.classifier.fc3.weight, std=0.1)
    x = torch.rand(8, 1, 28, 28)
    y = network(x).argmax(1).detach()
    epsilon, step = (0.1, 0.02) if norm == "l_inf" else (1.0, 0.25)
    theirs = foolbox.attacks.LinfPGD if norm == "l_inf" else foolbox.attacks.L2PGD
    theirs = theirs(abs_stepsize=step, steps=7, random_start=False)
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    expected = theirs.run(model, x, foolbox.criteria.Misclassification(y), epsilon=epsilon)
    budget = Budget(norm, epsilon, 7, step, random_start=False)
    found = pgd(network, x, y, budget, early_stop=False)
    assert (found.x_adv - expected).abs().gt(1e-3).float().mean() < 0.002


def test_names_are_the_published_ones():
    published = "FGSM PGD MPGD JSMA DDNL2 point-wise AutoAttack Square"
    assert " ".join(ATTACKS) == published
    assert family("MNIST", 1) is family("digits", 1) is family("folder", 1) is GREY
    assert family("svhn", 3) is SVHN
    assert family("cifar10 (image folder)", 3) is family("folder", 3) is COLOUR


def test_defaults_are_the_published_ones():
    assert gradient_budget("FGSM", GREY) == Budget("l_inf", 0.3, 1, 0.3, random_start=False)
    assert gradient_budget("PGD", GREY) == Budget("l_inf", 0.3, 40, 0.01)
    assert gradient_budget("MPGD", GREY) == Budget("l_inf", 0.3, 40, 0.01, 1, False, 0.1)
    assert gradient_budget("FGSM", COLOUR) == Budget("l_inf", 0.031, 1, 0.031, random_start=False)
    assert gradient_budget("PGD", COLOUR) == Budget("l_inf", 0.031, 10, 0.007)
    assert gradient_budget("MPGD", COLOUR) == Budget("l_inf", 0.031, 20, 0.007, 1, False, 0.1)


def test_settings_replace_defaults():
    assert gradient_budget("PGD", GREY, Settings(epsilon=0.15)).step_size == pytest.approx(0.005)
    given = gradient_budget("PGD", GREY, Settings("l_2", 2.0, 7, 0.5, restarts=3))
    assert given == Budget("l_2", 2.0, 7, 0.5, restarts=3)
    assert str(given) == "l_2 2, 7 x 0.5, 3 starts"
    for name, settings in (
        ("FGSM", Settings(num_steps=9, restarts=4)),
        ("MPGD", Settings(restarts=4)),
    ):
        assert gradient_budget(name, GREY, settings) == gradient_budget(name, GREY)


def test_momentum_pgd_begins_at_the_image():
    """MI-FGSM by its formula (Dong et al., eq. 6 and 7), from the image itself."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, epsilon, decay, step = torch.rand(5, 1, 4, 4, dtype=torch.float64), 0.2, 0.1, 0.03
    y = network(x).argmax(1)
    x_adv, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(7):
        x_adv.requires_grad_()
        loss = nn.functional.cross_entropy(network(x_adv), y, reduction="sum")
        gradient = torch.autograd.grad(loss, x_adv)[0]
        momentum = decay * momentum + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        x_adv = x_adv.detach() + step * momentum.sign()
        x_adv = x_adv.clamp(x - epsilon, x + epsilon).clamp(0, 1)
    budget = gradient_budget("MPGD", GREY, Settings("l_inf", epsilon, 7, step))
    found = pgd(network, x, y, budget, early_stop=False)
    assert torch.allclose(found.x_adv, x_adv, atol=1e-12)


def test_zero_steps_and_a_radius_of_zero(linear):
    network, x, y = linear
    right = network(x).argmax(1) == y
    nothing = Budget("l_inf", 0.0, 3, 0.1)
    assert torch.equal(pgd(network, x, y, nothing).robust, right)
    unmoved = replace(nothing, epsilon=1e-4, num_steps=0)
    verify(pgd(network, x, y, unmoved).x_adv, x, unmoved.ball)


def test_momentum_by_hand():
    """g1 / mean|g1|, then decay * that + g2 / mean|g2|; the sign of the sum is the step."""
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    g1 = torch.tensor([[[[1.0, -2.0], [3.0, -2.0]]]], dtype=torch.float64)
    g2 = torch.tensor([[[[-1.0, 0.1], [0.5, -0.4]]]], dtype=torch.float64)
    directions = {}
    for decay in (0.5, 0.0):
        gradients = iter([g1, g2])
        direction = _with_momentum(lambda _, feed=gradients: next(feed), decay)
        directions[decay] = [direction(x), direction(x)]
    torch.testing.assert_close(directions[0.5], [g1 / 2, 0.5 * g1 / 2 + g2 / 0.5])
    torch.testing.assert_close(directions[0.0], [g1 / 2, g2 / 0.5])


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball_uniformly(norm):
    """P(distance <= r) = (r / eps)^d: the ball's volume, in 2 dimensions and in 64."""
    for pixels in (2, 64):
        x = torch.full((4000, 1, 1, pixels), 0.5, dtype=torch.float64)
        ball = Ball(norm, 0.3)
        found = random_starts(x, ball, 1, torch.arange(4000), 0)
        share = (ball.distance(found, x) / 0.3) ** pixels  # uniform on [0, 1]
        assert float(share.max()) <= 1
        for q in (0.1, 0.5, 0.9):
            assert float(share.quantile(q)) == pytest.approx(q, abs=4 * math.sqrt(0.25 / 4000))
        assert float((found - x).mean(0).abs().max()) < 0.02  # no direction is preferred


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_inside(norm):
    x, ball = torch.rand(5, 3, 4, 4, dtype=torch.float64), Ball(norm, 0.25)
    state = torch.get_rng_state()
    found = random_starts(x, ball, 1, torch.arange(5), 0)
    assert torch.equal(torch.get_rng_state(), state) and found.dtype == x.dtype
    assert bool((ball.distance(found, x) <= 0.25 + 1e-12).all())
    assert float(found.min()) >= 0 and float(found.max()) <= 1

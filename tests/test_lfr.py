"""The method, where its answers are known: linear models, brute force, finite differences."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from models import build_model
from utils.lfr import (
    NORMS,
    SEARCHES,
    Ball,
    flatness,
    initial_point,
    inner_maximization,
    input_gradient,
    lfr_loss,
)
from utils.lfr.loss import full_precision


class Linear(nn.Module):
    """Softmax regression: logits W x + b."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.dense = nn.Linear(pixels, classes).double()
        nn.init.normal_(self.dense.weight)

    def forward(self, x):
        return self.dense(x.flatten(1))


class Smooth(nn.Module):
    """A small network with curvature everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2)
        self.dense = nn.Linear(12, 4)

    def forward(self, x):
        return self.dense(F.silu(self.conv(x)).flatten(1))


def small_cnn(**options) -> nn.Module:
    network = build_model("small_cnn", image_size=16, **options)
    nn.init.normal_(network.classifier.fc3.weight, std=0.3)
    return network


# -- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_norm_of_a_linear_model(norm):
    """grad_x L = W^T (p - onehot(y)), sample by sample."""
    model = Linear(12, 5)
    x, y = torch.rand(7, 3, 2, 2, dtype=torch.float64), torch.arange(7) % 5
    p = model(x).softmax(1) - F.one_hot(y, 5)
    expected = (p @ model.dense.weight).view_as(x).detach()
    torch.testing.assert_close(input_gradient(model, x, y), expected)
    norms = {"l_inf": expected.flatten(1).abs().sum(1), "l_2": expected.flatten(1).norm(dim=1)}
    torch.testing.assert_close(flatness(model, x, y, Ball(norm, 0.1)), norms[norm])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("norm", NORMS)
def test_maximum_of_two_classes_in_closed_form(norm, search):
    """With w = w_1 - w_0 the norm is ||w||_q sigmoid(-margin), largest where the margin is least:

    max ||grad L||_q = ||w||_q * sigmoid(eps ||w||_q - margin(x)).
    """
    model = Linear(8, 2)
    x = 0.4 + 0.2 * torch.rand(6, 2, 2, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    ball = Ball(norm, 0.15)
    found = inner_maximization(model, x, y, ball, step_size=0.05, num_steps=30, search=search)

    w = (model.dense.weight[1] - model.dense.weight[0]).detach()
    logits = model(x).detach()
    margin = (logits[:, 1] - logits[:, 0]) * (2 * y - 1)
    dual = ball.dual_norm(w[None])
    expected = dual * torch.sigmoid(0.15 * dual - margin)
    steepness = flatness(model, found, y, ball)
    torch.testing.assert_close(steepness, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pixels", [1, 2])
def test_maximum_against_brute_force(norm, pixels):
    """Three classes in one and two dimensions, all points of a fine grid tried."""
    model = Linear(pixels, 3)
    with torch.no_grad():
        model.dense.weight.mul_(4)
    x = 0.3 + 0.4 * torch.rand(8, 1, 1, pixels, dtype=torch.float64)
    y = torch.arange(8) % 3
    ball = Ball(norm, 0.1)
    line = torch.linspace(-0.1, 0.1, 61, dtype=torch.float64)
    moves = torch.cartesian_prod(*[line] * pixels).view(-1, 1, 1, pixels)
    moves = moves[ball.distance(moves, torch.zeros_like(moves)) <= 0.1 + 1e-9]
    best = torch.stack(
        [flatness(model, x[i] + moves, y[i].expand(len(moves)), ball).max() for i in range(len(x))]
    ).detach()
    found = inner_maximization(model, x, y, ball, step_size=0.01, num_steps=60)
    ratio = flatness(model, found, y, ball).detach() / best
    assert float(ratio.max()) < 1.01  # the grid may miss the very edge
    assert float(ratio.min()) > 0.98 and float(ratio.median()) > 0.999


# -- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("epsilon", "step_size"), [(0.1, 0.03), (0.05, 1.0), (0.0, 0.1), (2, 0.5)])
def test_points_found_lie_in_ball_and_box(norm, search, epsilon, step_size):
    model = small_cnn()
    x = torch.rand(3, 1, 16, 16)
    x[0] = x[0].round()
    ball = Ball(norm, epsilon)
    y = torch.tensor([1, 2, 3])
    found = inner_maximization(model, x, y, ball, step_size=step_size, num_steps=3, search=search)
    assert found.shape == x.shape and found.dtype == x.dtype and not found.requires_grad
    assert bool((ball.distance(found, x) <= epsilon * (1 + 1e-5) + 1e-6).all())
    assert float(found.min()) >= 0 and float(found.max()) <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_paper_s_rule_step_by_step(norm):
    """x' <- clip(project(x' + step * steepest(grad_x' ||grad_x' L||_q))), in plain PyTorch."""
    model = small_cnn().double()
    x, y = torch.rand(3, 1, 16, 16, dtype=torch.float64), torch.tensor([4, 0, 9])
    start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    expected = start
    for _ in range(4):
        point = expected.detach().requires_grad_()
        loss = F.cross_entropy(model(point), y, reduction="sum")
        g = torch.autograd.grad(loss, point, create_graph=True)[0].flatten(1)
        norms = g.abs().sum(1) if norm == "l_inf" else g.pow(2).sum(1).sqrt()
        second = torch.autograd.grad(norms.sum(), point)[0]
        if norm == "l_inf":
            moved = expected + 0.03 * second.sign()
            expected = torch.maximum(torch.minimum(moved, x + 0.08), x - 0.08).clamp(0, 1)
        else:
            length = second.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = expected + 0.03 * second / length - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            expected = (x + delta * (0.08 / length).clamp_max(1)).clamp(0, 1)
    found = inner_maximization(
        model, x, y, Ball(norm, 0.08), step_size=0.03, num_steps=4, start=start
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_the_fast_search_climbs_the_loss(norm):
    model = small_cnn().double()
    x, y = torch.rand(3, 1, 16, 16, dtype=torch.float64), torch.tensor([4, 0, 9])
    ball, point = Ball(norm, 0.08), x
    for _ in range(3):
        point = point.detach().requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)[0]
        point = ball.project(point + 0.03 * ball.steepest(g), x)
    found = inner_maximization(
        model, x, y, ball, step_size=0.03, num_steps=3, start=x, search="fast"
    )
    torch.testing.assert_close(found, point.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_find_steeper_points(norm):
    model = small_cnn(activation="softplus").double()
    x, y = torch.rand(4, 1, 16, 16, dtype=torch.float64), torch.tensor([4, 0, 9, 1])
    ball = Ball(norm, 0.2 if norm == "l_inf" else 1.0)
    steepness = []
    for steps in (0, 1, 4, 12):
        found = inner_maximization(
            model, x, y, ball, step_size=ball.epsilon / 4, num_steps=steps, start=x
        )
        steepness.append(flatness(model, found, y, ball).detach())
    for fewer, more in itertools.pairwise(steepness):
        assert float(more.mean()) >= 0.99 * float(fewer.mean())
    assert bool((steepness[-1] > 1.02 * steepness[0]).all())


def test_no_steps_are_plain_input_gradient_regularisation():
    model = small_cnn().double()
    x, y = torch.rand(3, 1, 16, 16, dtype=torch.float64), torch.tensor([4, 0, 9])
    ball = Ball("l_inf", 0.3)
    assert torch.equal(inner_maximization(model, x, y, ball, step_size=0.1, num_steps=0), x)
    point = x.clone().requires_grad_()
    g = torch.autograd.grad(
        F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True
    )[0]
    expected = g.abs().flatten(1).sum(1).mean()
    terms = lfr_loss(model, x, y, ball, step_size=0.1, num_steps=0, lambada=0.5)
    torch.testing.assert_close(terms.penalty, expected)
    natural = F.cross_entropy(model(x), y)
    torch.testing.assert_close(terms.total, natural + 0.5 * expected)
    found = torch.autograd.grad(terms.total, list(model.parameters()))
    wanted = torch.autograd.grad(natural + 0.5 * expected, list(model.parameters()))
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_knows_nothing_of_its_batch(norm, search):
    """Points and norms are the same one by one, in any order, and with other samples around."""
    model = small_cnn().double()
    x, y = torch.rand(6, 1, 16, 16, dtype=torch.float64), torch.arange(6)
    start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    ball = Ball(norm, 0.1)

    def found(index):
        moved = inner_maximization(
            model,
            x[index],
            y[index],
            ball,
            step_size=0.03,
            num_steps=3,
            start=start[index],
            search=search,
        )
        return moved, flatness(model, moved, y[index], ball).detach()

    points, norms = found(torch.arange(6))
    single = [found(torch.tensor([i])) for i in range(6)]
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.cat([point for point, _ in single]), points, **close)
    torch.testing.assert_close(torch.cat([norm for _, norm in single]), norms, **close)
    order = torch.tensor([5, 2, 0, 1])
    torch.testing.assert_close(found(order)[1], norms[order], **close)
    torch.testing.assert_close(
        lfr_loss(
            model, x, y, ball, step_size=0.03, num_steps=3, lambada=1, start=start, search=search
        ).penalty,
        norms.mean(),
        **close,
    )


# -- no trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["small_cnn", "resnet", "wrn"])
def test_the_search_leaves_no_trace(name, search, training):
    """Gradients, modes, requires_grad, statistics, images, random numbers: as they were."""
    network = {
        "small_cnn": small_cnn,
        "resnet": lambda: build_model("resnet", depth=8, in_channels=1),
        "wrn": lambda: build_model("wrn", depth=10, widen_factor=1, in_channels=1),
    }[name]()
    network.train(training)
    parameters = list(network.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    next(network.children()).eval()  # a part in another mode than the rest
    x, y = torch.rand(2, 1, 16, 16), torch.tensor([1, 7])
    x.requires_grad_()

    def state():
        return {
            "weights": copy.deepcopy(network.state_dict()),
            "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
            "requires_grad": [p.requires_grad for p in parameters],
            "modes": [m.training for m in network.modules()],
            "hooks": [len(m._forward_hooks) for m in network.modules()],
            "images": x.detach().clone(),
            "image gradient": x.grad,
            "enabled": torch.is_grad_enabled(),
            "random": torch.get_rng_state(),
        }

    before = state()
    inner_maximization(
        network, x, y, Ball("l_inf", 0.1), step_size=0.05, num_steps=2, search=search, start=x
    )
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    with torch.no_grad():
        inner_maximization(network, x, y, Ball("l_2", 0.1), step_size=0.05, num_steps=1, start=x)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)

    class Wrong(Exception):
        pass

    def fail(*_):
        raise Wrong

    handle = network.register_forward_hook(fail)
    with pytest.raises(Wrong):
        inner_maximization(network, x, y, Ball("l_2", 0.1), step_size=0.05, num_steps=1, start=x)
    handle.remove()
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


def test_the_only_random_numbers_are_those_of_the_start():
    """One Gaussian number a pixel from the global generator, of deviation 0.001."""
    model, x = small_cnn(), torch.rand(2, 1, 16, 16)
    y, ball = torch.tensor([1, 7]), Ball("l_inf", 0.1)
    torch.manual_seed(11)
    found = inner_maximization(model, x, y, ball, step_size=0.05, num_steps=2)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    assert torch.equal(torch.get_rng_state(), after)
    again = inner_maximization(model, x, y, ball, step_size=0.05, num_steps=2, start=start)
    assert torch.equal(found, again)


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_the_fast_search_begins_all_over_the_inner_half_of_the_ball(norm):
    x, ball = torch.full((64, 1, 16, 16), 0.5), Ball(norm, 0.3)
    start = initial_point(x, ball, "fast")
    assert not torch.equal(start, initial_point(x, ball, "fast"))
    distance = ball.distance(start, x)
    assert (distance <= 0.3 + 1e-6).all()
    if norm == "l_2":
        assert distance.mean().item() == pytest.approx(0.15, rel=0.05)
    else:
        assert (start - x).std().item() == pytest.approx(0.3 / 4, rel=0.05)
    assert ball.distance(initial_point(x, ball, "paper"), x).max() < 0.02


def test_the_search_never_drops_out():
    """Dropout is for the losses; the points searched for are those of the whole network."""
    network, x = small_cnn(drop=0.5), torch.rand(2, 1, 16, 16)
    y, options = torch.tensor([1, 7]), {"step_size": 0.05, "num_steps": 2, "start": x}
    ball = Ball("l_inf", 0.1)
    expected = inner_maximization(network.eval(), x, y, ball, **options)
    network.train()
    assert torch.equal(inner_maximization(network, x, y, ball, **options), expected)
    terms = [lfr_loss(network, x, y, ball, lambada=0.1, **options) for _ in range(2)]
    assert all(torch.equal(t.x_adv, expected) for t in terms)
    assert terms[0].natural != terms[1].natural
    assert terms[0].penalty != terms[1].penalty


# -- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_of_the_flatness_against_finite_differences(norm):
    """By image and by every weight, in double precision."""
    network = Smooth().double()
    names = list(dict(network.named_parameters()))
    x = torch.rand(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    y, ball = torch.tensor([3, 0]), Ball(norm, 0.1)

    def norms(x, *weights):
        def model(images):
            return functional_call(network, dict(zip(names, weights)), images)

        return flatness(model, x, y, ball)

    weights = [p.detach().clone().requires_grad_() for p in network.parameters()]
    assert gradcheck(norms, (x, *weights), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_the_whole_loss_against_finite_differences(norm):
    """lfr_loss(...).total along random directions in weight space, x_adv fixed."""
    network = Smooth().double()
    x, y = torch.rand(3, 1, 5, 5, dtype=torch.float64), torch.tensor([3, 0, 2])
    options = {"ball": Ball(norm, 0.1), "step_size": 0.1, "num_steps": 0, "lambada": 0.7}
    total = lfr_loss(network, x, y, **options).total
    gradients = torch.autograd.grad(total, list(network.parameters()))
    for _ in range(3):
        directions = [torch.randn_like(p) for p in network.parameters()]
        values = []
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(network)
            with torch.no_grad():
                for parameter, direction in zip(moved.parameters(), directions):
                    parameter.add_(direction, alpha=step)
            values.append(float(lfr_loss(moved, x, y, **options).total.detach()))
        slope = (values[0] - values[1]) / 2e-6
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions))
        assert slope == pytest.approx(expected, rel=1e-5)


def test_without_lambada_the_gradient_is_that_of_cross_entropy():
    network = small_cnn()
    x, y = torch.rand(3, 1, 16, 16), torch.tensor([4, 0, 9])
    terms = lfr_loss(network, x, y, Ball("l_inf", 0.1), step_size=0.1, num_steps=1, lambada=0.0)
    found = torch.autograd.grad(terms.total, list(network.parameters()))
    expected = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6)


# -- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_named_parts(dtype, capsys):
    network = small_cnn().to(dtype)
    x, y = torch.rand(3, 1, 16, 16, dtype=dtype), torch.tensor([4, 0, 9])
    terms = lfr_loss(network, x, y, Ball("l_2", 0.5), step_size=0.1, num_steps=2, lambada=0.3)
    assert {t.dtype for t in terms} == {dtype}
    assert terms.total.requires_grad and terms.total.shape == ()
    torch.testing.assert_close(terms.total, terms.natural + 0.3 * terms.penalty)
    torch.testing.assert_close(terms.natural, F.cross_entropy(network(x), y))
    torch.testing.assert_close(terms.logits, network(x).detach())
    assert not terms.logits.requires_grad and not terms.x_adv.requires_grad
    assert terms.x_adv.shape == x.shape
    terms.total.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in network.parameters())
    assert capsys.readouterr() == ("", "")


def test_training_with_it_makes_a_network_flat():
    """A few steps on two blobs, with lambada and without."""
    x = torch.cat([torch.rand(16, 1, 5, 5) * 0.6, 0.4 + torch.rand(16, 1, 5, 5) * 0.6])
    y = torch.tensor([0] * 16 + [1] * 16)
    ball, found = Ball("l_inf", 0.1), {}
    for lambada in (0.0, 0.3):
        torch.manual_seed(0)
        network = Smooth()
        optimizer = torch.optim.SGD(network.parameters(), 0.3, momentum=0.9)
        for _ in range(25):
            terms = lfr_loss(network, x, y, ball, step_size=0.05, num_steps=2, lambada=lambada)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
        found[lambada] = float(terms.penalty.detach()), float(terms.natural.detach())
    assert found[0.3][0] < 0.8 * found[0.0][0]
    assert found[0.0][1] < 0.6 and found[0.3][1] < 0.69  # ln 2 is what guessing costs


def test_full_precision_logits():
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert full_precision(torch.zeros(1, dtype=dtype)).dtype == expected


def test_unknown_names_are_refused():
    model, x, y = small_cnn(), torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    ball = Ball("l_2", 0.1)
    with pytest.raises(ValueError, match="search is 'slow', allowed are paper, fast"):
        inner_maximization(model, x, y, ball, step_size=0.1, num_steps=1, search="slow")
    with pytest.raises(ValueError, match="bn_mode is 'eval'"):
        lfr_loss(model, x, y, ball, step_size=0.1, num_steps=1, lambada=1, bn_mode="eval")

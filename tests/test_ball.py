"""The ball and the ascent in it, where the answers are known in closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.lfr import NORMS, Ball, ascend


def images(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64)


def size(values: torch.Tensor, norm: str) -> torch.Tensor:
    """||values||_p of each sample, spelled out."""
    flat = values.flatten(1)
    return flat.abs().amax(1) if norm == "l_inf" else flat.pow(2).sum(1).sqrt()


@given(
    norm=st.sampled_from(NORMS),
    epsilon=st.sampled_from([0.0, 1e-6, 8 / 255, 0.3, 1.0, 5.0]),
    far=st.sampled_from([0.0, 1e-8, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_projection_lies_in_ball_and_box(norm, epsilon, far, seed):
    torch.manual_seed(seed)
    x = images(3, 2, 4, 4)
    x[0] = x[0].round()  # pixels at the box's edges
    moved = x + far * torch.randn_like(x)
    ball = Ball(norm, epsilon)
    projected = ball.project(moved, x)
    assert bool((ball.distance(projected, x) <= epsilon * (1 + 1e-12) + 1e-15).all())
    assert float(projected.min()) >= 0 and float(projected.max()) <= 1
    torch.testing.assert_close(ball.distance(projected, x), size(projected - x, norm))
    again = ball.project(projected, x)
    torch.testing.assert_close(again, projected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_points_inside_stay(norm):
    x = images(4, 1, 5, 5, low=0.4, high=0.6)
    moved = x + 0.01 * torch.rand_like(x) - 0.005
    torch.testing.assert_close(Ball(norm, 0.3).project(moved, x), moved, rtol=0, atol=1e-15)


def test_l_inf_projection_is_the_nearest_point():
    """Pixel by pixel: clip to [max(0, x - eps), min(1, x + eps)]."""
    x, moved = images(4, 1, 5, 5), 3 * images(4, 1, 5, 5) - 1
    expected = moved.clone()
    for index, value in enumerate(x.flatten()):
        low, high = max(0.0, float(value) - 0.1), min(1.0, float(value) + 0.1)
        expected.view(-1)[index] = min(max(float(moved.view(-1)[index]), low), high)
    torch.testing.assert_close(Ball("l_inf", 0.1).project(moved, x), expected)


def test_l_2_projection_without_the_box_is_radial():
    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    direction = torch.randn_like(x)
    length = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = Ball("l_2", 0.2).project(x + 7 * direction, x)
    torch.testing.assert_close(found, x + 0.2 * direction / length)


@pytest.mark.parametrize("norm", NORMS)
def test_the_dual_norm_is_the_maximum_over_the_unit_ball(norm):
    """max <d, g> over ||d||_p <= 1 is ||g||_q, and the steepest direction attains it."""
    ball = Ball(norm, 1.0)
    g = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    dual = ball.dual_norm(g)
    expected = g.flatten(1).abs().sum(1) if norm == "l_inf" else g.flatten(1).pow(2).sum(1).sqrt()
    torch.testing.assert_close(dual, expected)
    steepest = ball.steepest(g)
    torch.testing.assert_close(size(steepest, norm), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close((steepest * g).flatten(1).sum(1), dual)
    for _ in range(200):
        d = torch.randn_like(g)
        d = d / size(d, norm).view(-1, 1, 1, 1)
        assert bool(((d * g).flatten(1).sum(1) <= dual + 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_direction_where_the_gradient_is_zero(norm, dtype):
    """And no NaN from gradients too small to be squared."""
    g = torch.zeros(2, 1, 2, 2, dtype=dtype)
    assert torch.equal(Ball(norm, 0.1).steepest(g), g)
    g[0] = torch.tensor([[[3e-30, 0], [0, -4e-30]]])
    found = Ball(norm, 0.1).steepest(g)
    expected = torch.zeros_like(g)
    expected[0] = torch.tensor([[[1, 0], [0, -1]]] if norm == "l_inf" else [[[0.6, 0], [0, -0.8]]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("start", [None, "random"])
@pytest.mark.parametrize("norm", NORMS)
def test_ascent_of_a_linear_function_reaches_the_best_point(norm, start):
    """l_inf: the corner of ball and box at once. l_2: the ball's edge, in the gradient's direction.

    The value there is <g, x> + eps ||g||_q.
    """
    x = images(3, 1, 4, 4, low=0.4, high=0.6)
    g = torch.randn_like(x)
    ball = Ball(norm, 0.2)
    found = ascend(
        x,
        lambda moved: g,
        ball,
        step_size=0.05,
        num_steps=500 if start else 10,
        start=ball.project(x + torch.randn_like(x), x) if start else None,
    )
    gain = (g * (found - x)).flatten(1).sum(1)
    torch.testing.assert_close(gain, 0.2 * ball.dual_norm(g), rtol=1e-3 if start else 1e-9, atol=0)
    if norm == "l_inf":
        torch.testing.assert_close(found, x + 0.2 * g.sign())
        edge = images(3, 1, 4, 4)
        found = ascend(edge, lambda moved: g, Ball("l_inf", 0.3), step_size=0.1, num_steps=4)
        torch.testing.assert_close(found, (edge + 0.3 * g.sign()).clamp(0, 1))


@pytest.mark.parametrize("norm", NORMS)
def test_steps_have_the_length_asked_for(norm):
    x = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    ball, g = Ball(norm, 0.4), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for steps in (0, 1, 3):
        found = ascend(x, lambda moved: g, ball, step_size=0.03, num_steps=steps)
        expected = torch.full((2,), 0.03 * steps, dtype=torch.float64)
        torch.testing.assert_close(ball.distance(found, x), expected)


def test_a_quadratic_s_maximum_is_found():
    """-|x' - c|^2, c outside the l_2 ball: the maximum is the ball's point nearest to c."""
    x = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64)
    c = x + torch.randn_like(x)
    found = ascend(
        x, lambda moved: 2 * (c - moved), Ball("l_2", 0.1), step_size=0.01, num_steps=300
    )
    expected = x + 0.1 * (c - x) / (c - x).norm()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_result_is_detached_and_the_input_untouched():
    x = images(2, 1, 3, 3).requires_grad_()
    before = x.detach().clone()
    found = ascend(x, lambda moved: moved, Ball("l_2", 0.1), step_size=0.1, num_steps=2)
    assert not found.requires_grad and x.grad is None and torch.equal(x, before)
    untouched = ascend(x, lambda moved: moved, Ball("l_2", 0.1), step_size=0.1, num_steps=0)
    assert torch.equal(untouched, before) and not untouched.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_everything_keeps_the_dtype(norm, dtype):
    x, ball = torch.rand(2, 1, 3, 3, dtype=dtype), Ball(norm, 0.1)
    found = ascend(x, torch.randn_like, ball, step_size=0.1, num_steps=1)
    for tensor in (found, ball.dual_norm(x), ball.steepest(x)):
        assert tensor.dtype == dtype
    assert ball.distance(found, x).shape == ball.dual_norm(x).shape == (2,)


@pytest.mark.parametrize(
    ("norm", "epsilon", "message"),
    [
        ("l_1", 0.1, "norm is 'l_1', allowed are l_inf, l_2"),
        ("l_inf", -0.1, "epsilon is -0.1"),
        ("l_inf", float("nan"), "epsilon is nan"),
        ("l_2", float("inf"), "epsilon is inf"),
    ],
)
def test_senseless_balls_are_refused(norm, epsilon, message):
    with pytest.raises(ValueError, match=message):
        Ball(norm, epsilon)

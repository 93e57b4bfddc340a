"""Local Flatness Regularization (LFR): Xu, Li, Jiang & Xia, ICIP 2020, arXiv 1910.12165.

The local flatness of the loss surface at a sample (x, y) is the largest norm of the loss's input
gradient in the sample's neighbourhood. Training minimises, in expectation over the samples,

    L(f(x), y) + lambda * max_{||x' - x||_p <= epsilon} || grad_x' L(f(x'), y) ||_q,  1/p + 1/q = 1

with L the cross-entropy: an l_inf ball goes with the L1 norm of the gradient, an l_2 ball with the
L2 norm. By the mean value theorem ``L(x + d) <= L(x) + epsilon * max ||grad L||_q`` for every d in
the ball: where the surface is flat no small perturbation can do harm, and lambda plays epsilon's
role in that bound.

The functions below read in the order of the formula. They contain the method and nothing of
its speed: that is `utils/second_order.py` (derivatives) and `utils/batch_norm.py` (which statistics
BatchNorm uses in which term; the CIFAR-10 collapse of the original is decided there).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.ball import Ball, ascend
from utils.batch_norm import Passes
from utils.second_order import Kernels

SEARCHES = ("paper", "fast")

Network = Callable[[Tensor], Tensor]


class LFRTerms(NamedTuple):
    """The parts of the training loss of one batch."""

    total: Tensor  # natural_loss + lambada * flatness, differentiable in the weights
    natural_loss: Tensor  # mean cross-entropy at the clean images
    flatness: Tensor  # mean gradient norm at the sharpest points, loss per unit of pixel intensity
    logits: Tensor  # [N, classes] of the clean images, detached
    sharpest: Tensor  # [N, C, H, W] where the flatness was measured


def input_gradient(
    model: Network, x: Tensor, y: Tensor, kernels: Kernels, create_graph: bool = False
) -> Tensor:
    """grad_x L(f(x), y) of every sample: [N, C, H, W], from images [N, C, H, W] and labels [N].

    The losses are summed, not averaged, so that a sample's gradient knows nothing of the batch's
    size. ``create_graph`` keeps it differentiable, by ``x`` if that requires grad and by the
    weights.
    """
    with torch.enable_grad():
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        with kernels:
            loss = F.cross_entropy(full_precision(model(x)), y, reduction="sum")
        with kernels.first_derivative():
            return torch.autograd.grad(loss, x, create_graph=create_graph)[0]


def flatness(model: Network, x: Tensor, y: Tensor, ball: Ball, kernels: Kernels) -> Tensor:
    """|| grad_x L(f(x), y) ||_q of every sample, [N], differentiable in the weights (and in x)."""
    return ball.dual_norm(input_gradient(model, x, y, kernels, create_graph=True))


def first_point(x: Tensor, ball: Ball, search: str, noise: Tensor | None = None) -> Tensor:
    """Where the search begins, [N, C, H, W]: a random point near x, in the ball.

    ``paper``: Gaussian noise of deviation 0.001; at x itself many a gradient is exactly zero.
    ``fast``: noise over the inner half of the ball. A few large steps that always begin at x end at
    the same few points in every epoch; the network learns to be flat there and nowhere else.

    Args:
        noise: standard normal numbers like ``x``; drawn here if not given.
    """
    noise = torch.randn_like(x) if noise is None else noise
    if search == "paper":
        return ball.project(x + 0.001 * noise, x)
    size = 0.5 if ball.norm == "l_inf" else x[0].numel() ** -0.5
    return ball.project(x + 0.5 * ball.epsilon * size * noise, x)


def sharpest_point(
    model: Network,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    search: str = "paper",
    start: Tensor | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """The point of the ball around each image where the loss surface is steepest, approximately.

    Projected ascent from :func:`first_point`. ``search="paper"`` climbs the gradient norm itself, a
    second derivative each step: ``x' <- project(x' + step_size * sign(grad_x' ||grad_x' L||_1))``
    for l_inf, and the normalised gradient for l_2. ``search="fast"`` climbs the loss, a first
    derivative each step; in networks like these its points are as steep.

    Args:
        model: images [N, C, H, W] in [0, 1] to logits.
        x, y: images and labels [N].
        ball: norm and epsilon.
        step_size: in the ball's norm, in units of pixel intensity.
        num_steps: 0 returns x itself, which makes LFR plain input-gradient regularisation.
        start: another first point in the ball.
        kernels: what to compute with; default: as the model stands (in train mode BatchNorm uses
            the batch and keeps its running statistics), weights held constant.

    Returns:
        [N, C, H, W], detached. The model is left as it was: no gradients, modes, statistics.

    Raises:
        ValueError: unknown search.
    """
    if search not in SEARCHES:
        raise ValueError(f"search is {search!r}, allowed are {', '.join(SEARCHES)}")
    if num_steps == 0:
        return x.detach()
    if kernels is None and isinstance(model, nn.Module):
        computing = Passes(model, "batch").search()
    else:
        computing = nullcontext(kernels or Kernels(frozen=True))

    def gradient_of_loss(moved: Tensor) -> Tensor:
        return input_gradient(model, moved, y, kernels)

    def gradient_of_flatness(moved: Tensor) -> Tensor:
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            steepness = flatness(model, moved, y, ball, kernels).sum()
            with kernels.first_derivative():
                return torch.autograd.grad(steepness, moved)[0]

    if start is None:
        start = first_point(x, ball, search)
    with computing as kernels:
        return ascend(
            x,
            gradient_of_flatness if search == "paper" else gradient_of_loss,
            ball,
            step_size=step_size,
            num_steps=num_steps,
            start=start,
        )


def lfr_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    lambada: float,
    search: str = "paper",
    bn_mode: str = "shared",
    start: Tensor | None = None,
) -> LFRTerms:
    """The loss of LFR on one batch; ``lfr_loss(...).total.backward()`` is the training step.

    Args:
        model: the network, in train mode.
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        ball, step_size, num_steps, search, start: see :func:`sharpest_point`.
        lambada: lambda of the formula (the original's spelling).
        bn_mode: which statistics BatchNorm uses where, see :class:`utils.batch_norm.Passes`.

    Raises:
        ValueError: unknown search or bn_mode.
    """
    passes = Passes(model, bn_mode)

    def search_from_here() -> Tensor:
        with passes.search() as kernels:
            return sharpest_point(
                model,
                x,
                y,
                ball,
                step_size=step_size,
                num_steps=num_steps,
                search=search,
                start=start,
                kernels=kernels,
            )

    # The original searches before the clean batch has moved the running statistics by which it
    # searches; "shared" searches by the clean batch's statistics, so it has to see that first.
    sharpest = search_from_here() if passes.bn_mode == "mixed" else None
    with passes.natural() as kernels, kernels:
        logits = model(x)
        natural_loss = F.cross_entropy(full_precision(logits), y)
    if sharpest is None:
        sharpest = search_from_here()
    with passes.penalty() as kernels:
        mean_flatness = flatness(model, sharpest, y, ball, kernels).mean()
    passes.finish(x)
    total = natural_loss + lambada * mean_flatness
    return LFRTerms(total, natural_loss, mean_flatness, logits.detach(), sharpest)


def full_precision(logits: Tensor) -> Tensor:
    """Logits that autocast left in 16 bits as float32; others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

"""LFR written for clarity alone, by double backward: what `utils/` is measured against.

The published procedure without any of its accidents: search in eval mode, natural loss and penalty
in train mode, and a third forward pass for the training accuracy. No kernels of ours, no layouts,
nothing shared with `utils/` but the definition of the method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||grad_x L||_1 of every sample, [N], differentiable."""
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return gradient.flatten(1).abs().sum(1)


def sharpest_point(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    epsilon: float,
    step_size: float,
    num_steps: int,
) -> Tensor:
    """The paper's search in the l_inf ball: second-order sign steps. [N, C, H, W]."""
    model.eval()
    moved = start
    for _ in range(num_steps):
        moved = moved.detach().requires_grad_()
        (direction,) = torch.autograd.grad(gradient_norm(model, moved, y).sum(), moved)
        moved = moved.detach() + step_size * direction.sign()
        moved = torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0, 1)
    return moved.detach()


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    lambada: float,
) -> Tensor:
    """One step of the published training; returns the sharpest points."""
    moved = sharpest_point(model, x, y, start, epsilon, step_size, num_steps)
    model.train()
    optimizer.zero_grad()
    natural_loss = F.cross_entropy(model(x), y)
    penalty = gradient_norm(model, moved.clone().requires_grad_(), y).mean()
    (natural_loss + lambada * penalty).backward()
    optimizer.step()
    with torch.no_grad():
        model(x).argmax(1)
    return moved


def pgd_verdicts(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    epsilon: float,
    step_size: float,
    num_steps: int,
) -> Tensor:
    """PGD on the cross-entropy, every sample through every step: which stay right. bool [N].

    A sample counts as broken when any point on its way is misclassified.
    """
    model.eval()
    right = model(x).argmax(1) == y
    moved = start
    for _ in range(num_steps):
        moved = moved.detach().requires_grad_()
        loss = F.cross_entropy(model(moved), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + step_size * gradient.sign()
        moved = torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0, 1)
        with torch.no_grad():
            right &= model(moved).argmax(1) == y
    return right

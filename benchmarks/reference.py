"""LFR written for clarity alone, by double backward: what `utils/` is measured against.

The published procedure without any of its accidents: search in eval mode, natural loss and penalty
in train mode, and a third forward pass for the training accuracy. It shares nothing with `utils/`
but the definition of the method.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||grad_x L||_1 of every sample, [N], differentiable."""
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return gradient.flatten(1).abs().sum(1)


def inner_maximization(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *,
    epsilon: float, step_size: float, num_steps: int, second_order: bool = True,
) -> Tensor:  # fmt: skip
    """Sign steps in the l_inf ball up the gradient norm (the paper's) or the loss. [N, C, H, W]."""
    model.eval()
    x_adv = start
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        if second_order:
            height = gradient_norm(model, x_adv, y).sum()
        else:
            height = F.cross_entropy(model(x_adv), y, reduction="sum")
        (direction,) = torch.autograd.grad(height, x_adv)
        x_adv = x_adv.detach() + step_size * direction.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv.detach()


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, start: Tensor, *,
    lambada: float, **search: Any,
) -> Tensor:  # fmt: skip
    """One training step; returns the points found."""
    x_adv = inner_maximization(model, x, y, start, **search)
    model.train()
    optimizer.zero_grad()
    natural_loss = F.cross_entropy(model(x), y)
    penalty = gradient_norm(model, x_adv.clone().requires_grad_(), y).mean()
    (natural_loss + lambada * penalty).backward()
    optimizer.step()
    with torch.no_grad():
        model(x).argmax(1)
    return x_adv


def pgd_verdicts(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *,
    epsilon: float, step_size: float, num_steps: int,
) -> Tensor:  # fmt: skip
    """PGD on the cross-entropy, every sample through every step: which stay right. bool [N].

    An image that is misclassified at any point on the way is not robust.
    """
    model.eval()
    right = model(x).argmax(1) == y
    x_adv = start
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        with torch.no_grad():
            right &= model(x_adv).argmax(1) == y
    return right

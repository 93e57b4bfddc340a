"""Local Flatness Regularization (LFR): Xu, Li, Jiang & Xia, ICIP 2020, arXiv 1910.12165.

The local flatness of the loss surface at a sample (x, y) is the largest norm of the loss's input
gradient in the sample's neighbourhood. Training minimises, in expectation over the samples,

    L(f(x), y) + lambda * max_{||x' - x||_p <= epsilon} || grad_x' L(f(x'), y) ||_q,  1/p + 1/q = 1

with L the cross-entropy: an l_inf ball goes with the L1 norm of the gradient, an l_2 ball with the
L2 norm. By the mean value theorem ``L(x + d) <= L(x) + epsilon * max ||grad L||_q`` for every d in
the ball, so lambda plays epsilon's role. The functions below read in the order of the formula.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ball import Ball, ascend
from .batch_norm import StepPolicy

SEARCHES = ("paper", "fast")


class LossTerms(NamedTuple):
    """The training loss of one batch and its parts."""

    total: Tensor  # natural + weight * penalty, differentiable in the weights
    natural: Tensor  # mean cross-entropy
    penalty: Tensor  # LFR: mean gradient norm at x_adv, in loss per unit of pixel intensity
    logits: Tensor  # [N, classes] that the natural loss is of, detached
    x_adv: Tensor  # [N, C, H, W] where the penalty was measured


def input_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, create_graph: bool = False
) -> Tensor:
    """grad_x L(f(x), y) of every sample: [N, C, H, W], from images [N, C, H, W] and labels [N].

    ``create_graph`` keeps it differentiable in the weights, and in ``x`` if that requires grad.
    """
    # Of the kernels of attention only the plain one can be differentiated twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        loss = F.cross_entropy(full_precision(model(x)), y, reduction="sum")
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0]


def flatness(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """|| grad_x L(f(x), y) ||_q of every sample, [N], differentiable in the weights (and in x)."""
    return ball.dual_norm(input_gradient(model, x, y, create_graph=True))


def initial_point(x: Tensor, ball: Ball, search: str, noise: Tensor | None = None) -> Tensor:
    """Where the inner maximisation begins, [N, C, H, W]; ``noise``: standard normal, like ``x``.

    ``paper``: noise of standard deviation 0.001; at x itself many a gradient is exactly zero.
    ``fast``: of deviation epsilon / 4 (l_inf), or about epsilon / 2 long (l_2). A few large steps
    that always begin at x end at the same points every epoch; the network learns to be flat there
    and nowhere else.
    """
    noise = torch.randn_like(x) if noise is None else noise
    if search == "paper":
        return ball.project(x + 0.001 * noise, x)
    size = 0.5 if ball.norm == "l_inf" else x[0].numel() ** -0.5
    return ball.project(x + 0.5 * ball.epsilon * size * noise, x)


def inner_maximization(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, step_size: float, num_steps: int,
    search: str = "paper", start: Tensor | None = None, policy: StepPolicy | None = None,
) -> Tensor:  # fmt: skip
    """The point of the ball around each image where the gradient norm is largest, approximately.

    Projected ascent from :func:`initial_point`. ``search="paper"`` ascends the gradient norm
    itself, by a second derivative each step: ``x' <- project(x' + step_size * sign(grad_x'
    ||grad_x' L||_1))`` for l_inf, and the normalised gradient for l_2. ``search="fast"`` ascends
    the loss, by a first derivative each step, to points as steep (tried on trained networks).

    Args:
        model: images to logits. It is left as it was: gradients, modes, running statistics.
            Dropout is off. Compiled code cannot be differentiated twice: of a ``torch.compile``d
            network the original module is used.
        x, y: images [N, C, H, W] in [0, 1] and labels [N].
        step_size: in the ball's norm, in units of pixel intensity.
        num_steps: 0 returns x itself, which makes LFR plain input-gradient regularisation.
        start: another first point in the ball.
        policy: which statistics BatchNorm uses; default: those of the batch at hand in train mode,
            the running ones in eval mode.

    Returns [N, C, H, W], detached. Raises ValueError for an unknown search.
    """
    if search not in SEARCHES:
        raise ValueError(f"search is {search!r}, allowed are {', '.join(SEARCHES)}")
    if num_steps == 0:
        return x.detach()
    model = getattr(model, "_orig_mod", model)

    def gradient(x_adv: Tensor) -> Tensor:
        if search == "fast":
            return input_gradient(model, x_adv, y)
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            norms = flatness(model, x_adv, y, ball)
            return torch.autograd.grad(norms.sum(), x_adv)[0]

    start = initial_point(x, ball, search) if start is None else start
    with (policy or StepPolicy(model, "batch")).search():
        return ascend(x, gradient, ball, step_size=step_size, num_steps=num_steps, start=start)


def lfr_loss(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, step_size: float, num_steps: int,
    lambada: float, search: str = "paper", bn_mode: str = "shared", start: Tensor | None = None,
) -> LossTerms:  # fmt: skip
    """The loss of LFR on one batch; ``lfr_loss(...).total.backward()`` is the training step.

    ``lambada`` is lambda of the formula (the original's spelling), ``bn_mode`` one of BN_MODES (see
    `batch_norm.py`), the rest is for :func:`inner_maximization`. Raises ValueError for an unknown
    search or bn_mode.
    """
    model = getattr(model, "_orig_mod", model)
    policy = StepPolicy(model, bn_mode)
    options = {"step_size": step_size, "num_steps": num_steps, "search": search, "start": start}
    find_x_adv = partial(inner_maximization, model, x, y, ball, policy=policy, **options)
    # The original searches before the clean batch moves the running statistics that it searches by.
    x_adv = find_x_adv() if policy.bn_mode == "mixed" else None
    with policy.natural():
        logits = model(x)
        natural = F.cross_entropy(full_precision(logits), y)
    x_adv = find_x_adv() if x_adv is None else x_adv
    with policy.penalty():
        penalty = flatness(model, x_adv, y, ball).mean()
    policy.finish(x)
    return LossTerms(natural + lambada * penalty, natural, penalty, logits.detach(), x_adv)


def full_precision(logits: Tensor) -> Tensor:
    """Logits that autocast left in 16 bits as float32; others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

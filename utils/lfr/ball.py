"""The eps-ball around an image, and the projected ascent inside it.

One routine, :func:`ascend`, serves the whole repository: LFR's inner maximisation (`loss.py`) and
the attacks FGSM, PGD and momentum PGD differ only in the direction that they ascend.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = ("l_inf", "l_2")


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ..., 1], to be broadcast over ``like``."""
    return values.view(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True)
class Ball:
    """The set ``{x' : ||x' - x||_p <= epsilon, 0 <= x' <= 1}`` around each image x of a batch.

    Raises ValueError for an unknown norm, or a radius that is negative or not finite.
    """

    norm: str  # one of NORMS
    epsilon: float  # radius, in the unit of the pixels (which lie in [0, 1])

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}, allowed are {', '.join(NORMS)}")
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon is {self.epsilon}, it must be finite and not negative")

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """||gradient||_q with 1/p + 1/q = 1: L1 for l_inf, L2 for l_2. [N, ...] -> [N]."""
        return gradient.flatten(1).norm(p=1 if self.norm == "l_inf" else 2, dim=1)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """||x_adv - x||_p of each sample. [N, ...], [N, ...] -> [N]."""
        difference = (x_adv - x).flatten(1)
        return difference.norm(p=float("inf") if self.norm == "l_inf" else 2, dim=1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit vector of the ball's norm along which a linear function rises fastest.

        sign(g) for l_inf, g / ||g||_2 for l_2; zero where the gradient is zero.
        """
        if self.norm == "l_inf":
            return gradient.sign()
        # By the largest entry first: the squares of a vanishing gradient would be zero.
        tiny = torch.finfo(gradient.dtype).tiny
        largest = gradient.flatten(1).abs().amax(1).clamp_min(tiny)
        scaled = gradient / _per_sample(largest, gradient)
        length = scaled.flatten(1).norm(p=2, dim=1)
        return scaled / _per_sample(length.clamp_min(tiny), gradient)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The images in the ball around ``x`` and in [0, 1] that stand for ``x_adv``."""
        if self.norm == "l_inf":
            low, high = (x - self.epsilon).clamp_min(0), (x + self.epsilon).clamp_max(1)
            return torch.minimum(torch.maximum(x_adv, low), high)
        difference = x_adv - x
        length = difference.flatten(1).norm(p=2, dim=1)
        shrink = (self.epsilon / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
        # The box contains x, so clamping to it can only bring a point nearer to x.
        return (x + difference * _per_sample(shrink, x)).clamp(0, 1)


def ascend(
    x: Tensor, gradient: Callable[[Tensor], Tensor], ball: Ball, *, step_size: float,
    num_steps: int, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Projected steepest ascent: ``x' <- project(x' + step_size * steepest(gradient(x')))``.

    Args:
        x: [N, C, H, W] in [0, 1], the centres of the balls.
        gradient: maps points [N, C, H, W] to the gradient of what is maximised, same shape.
        step_size: length of a step in the ball's norm, in units of pixel intensity.
        num_steps: 0 returns the start.
        start: first point, default ``x``.

    Returns [N, C, H, W], detached, inside the ball and in [0, 1].
    """
    x = x.detach()
    x_adv = x if start is None else start.detach()
    for _ in range(num_steps):
        x_adv = ball.project(x_adv + step_size * ball.steepest(gradient(x_adv).detach()), x)
    return x_adv

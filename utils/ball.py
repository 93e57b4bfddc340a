"""The eps-ball around an image, and the projected ascent inside it.

One routine, :func:`ascend`, serves the whole repository: LFR's search for the sharpest point
(`utils/lfr.py`) and the attacks FGSM, PGD and momentum PGD (`utils/attacks.py`) differ only in the
gradient they climb.
"""

from __future__ import annotations

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

    Args:
        norm: ``"l_inf"`` or ``"l_2"``.
        epsilon: radius, in the unit of the pixels (which lie in [0, 1]).

    Raises:
        ValueError: unknown norm, or a radius that is negative or not finite.
    """

    norm: str
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}, allowed are {', '.join(NORMS)}")
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon is {self.epsilon}, it must be finite and not negative")

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """||gradient||_q with 1/p + 1/q = 1: L1 for l_inf, L2 for l_2. [N, ...] -> [N]."""
        return gradient.flatten(1).norm(p=1 if self.norm == "l_inf" else 2, dim=1)

    def distance(self, moved: Tensor, x: Tensor) -> Tensor:
        """||moved - x||_p of each sample. [N, ...], [N, ...] -> [N]."""
        difference = (moved - x).flatten(1)
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

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The images in the ball around ``x`` and in [0, 1] that stand for ``moved``."""
        if self.norm == "l_inf":
            low, high = (x - self.epsilon).clamp_min(0), (x + self.epsilon).clamp_max(1)
            return torch.minimum(torch.maximum(moved, low), high)
        difference = moved - x
        length = difference.flatten(1).norm(p=2, dim=1)
        shrink = (self.epsilon / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
        # The box contains x, so clamping to it can only bring a point nearer to x.
        return (x + difference * _per_sample(shrink, x)).clamp(0, 1)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball (volume), then clamped to [0, 1].

        Drawn on the generator's device (default: the CPU), so that a seed gives the same start
        whatever device the images are on.
        """
        device = generator.device if generator is not None else "cpu"

        def draw(function: Callable[..., Tensor], *shape: int) -> Tensor:
            return function(*shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

        if self.norm == "l_inf":
            noise = (2 * draw(torch.rand, *x.shape) - 1) * self.epsilon
        else:
            direction = self.steepest(draw(torch.randn, *x.shape))
            radius = draw(torch.rand, x.shape[0]) ** (1 / x[0].numel())
            noise = direction * _per_sample(radius * self.epsilon, x)
        return self.project(x + noise, x)


def ascend(
    x: Tensor,
    gradient: Callable[[Tensor], Tensor],
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    start: Tensor | None = None,
    decay: float | None = None,
) -> Tensor:
    """Projected steepest ascent: ``x' <- project(x' + step_size * steepest(gradient(x')))``.

    Args:
        x: [N, C, H, W] in [0, 1], the centres of the balls.
        gradient: maps points [N, C, H, W] to the gradient of what is climbed, same shape.
        ball: norm and radius.
        step_size: length of a step in the ball's norm, in units of pixel intensity.
        num_steps: number of steps; 0 returns the start.
        start: first point, default ``x``.
        decay: None for plain steps; a number mu for momentum (MI-FGSM, Dong et al. 2018, eq. 6):
            ``g <- mu * g + gradient / mean(|gradient|)``, the step follows g.

    Returns:
        [N, C, H, W], detached, inside the ball and in [0, 1].
    """
    x = x.detach()
    moved = x if start is None else start.detach()
    momentum = torch.zeros_like(x) if decay is not None else None
    for _ in range(num_steps):
        direction = gradient(moved).detach()
        if momentum is not None:
            scale = direction.abs().flatten(1).mean(1).clamp_min(torch.finfo(x.dtype).tiny)
            momentum = decay * momentum + direction / _per_sample(scale, x)
            direction = momentum
        moved = ball.project(moved + step_size * ball.steepest(direction), x)
    return moved

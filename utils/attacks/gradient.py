"""FGSM, PGD and momentum PGD on the ascent routine that LFR's own search uses, batched.

They maximise the cross-entropy. The pass that gives a step's gradient also tells whether the point
before the step is misclassified; from then on the image is left out. Random starts are drawn image
by image from (seed, restart, index in the dataset), and batches are filled up to a multiple of a
few images, so that a verdict depends neither on the batch size nor on the other images.

FGSM: Goodfellow et al. 2015, arXiv 1412.6572. PGD: Madry et al. 2018, arXiv 1706.06083. MPGD: Dong
et al. 2018, arXiv 1710.06081.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.errors import UserError
from utils.lfr import Ball, ascend
from utils.lfr.accel import Accelerated
from utils.lfr.batch_norm import mode
from utils.lfr.loss import full_precision

from .budgets import Budget

ROWS = 16  # rows of a matrix product that are computed together
losses_of = partial(F.cross_entropy, reduction="none")  # logits, labels -> [N]


class BudgetViolation(RuntimeError):
    """An attack returned an image that its budget does not allow. A bug, never a user's mistake."""


def verify(x_adv: Tensor, x: Tensor, ball: Ball | None = None) -> None:
    """Raise BudgetViolation unless all images are in [0, 1] and in the ball, up to rounding."""
    if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):  # nan is neither
        raise BudgetViolation("an attacked image is not finite or has pixels outside [0, 1]")
    if ball and bool((ball.distance(x_adv, x) > ball.epsilon * (1 + 1e-5) + 1e-6).any()):
        raise BudgetViolation(f"an attacked image lies outside of {ball}")


def filled_up(x: Tensor) -> Tensor:
    """``x`` with its first image (or label) repeated until the batch size suits the processor.

    Convolutions of other numbers of images add up in another order, and an image gets other last
    digits, now and then another verdict. Multiples of 8 images per thread, and of :data:`ROWS`,
    give the same digits in every batch.
    """
    threads = min(torch.get_num_threads(), 8) if x.device.type == "cpu" else 1
    missing = -len(x) % (ROWS * -(-8 * threads // ROWS))
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:]))) if missing else x


class _SteadyRows(TorchFunctionMode):
    """While entered, linear layers on a CPU compute :data:`ROWS` rows at a time.

    A matrix product is cut into pieces by its shape, on some processors differently for 192 rows
    than for 200, and each way adds up in another order.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args and args[0].dim() == 2 and args[0].device.type == "cpu":
            call = partial(func, **kwargs or {})
            return torch.cat([call(rows, *args[1:]) for rows in args[0].split(ROWS)])
        return func(*args, **kwargs or {})


def steady_logits(network: nn.Module, x: Tensor) -> Tensor:
    """Logits of images that :func:`filled_up` has made, in float32, the same in every batch."""
    with _SteadyRows():
        return full_precision(network(x))


def _finite(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not bool(torch.isfinite(sum(tensor.sum() for tensor in tensors))):
        raise UserError("the network's answer or its gradient is not finite: no verdict")
    return tensors


@torch.no_grad()
def logits_of(network: nn.Module, x: Tensor) -> Tensor:
    """Logits [N, classes] in float32; UserError if they are not finite."""
    if not len(x):
        return network(x.new_zeros(1, *x.shape[1:]))[:0]
    return _finite(steady_logits(network, filled_up(x))[: len(x)])[0]


def misclassified(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the network, as it is, answers anything but ``y``. [N] bool."""
    return logits_of(network, x).argmax(1) != y


def gradients(
    network: nn.Module, x: Tensor, y: Tensor, *objectives: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Logits [N, classes], and the gradient [N, C, H, W] of each ``objective(logits, y)``, summed.

    UserError if one is not finite: sign steps would stay, and the network would look robust.
    """
    points, labels = filled_up(x).detach().requires_grad_(), filled_up(y)
    with torch.enable_grad():
        logits = steady_logits(network, points)
        values = [objective(logits, labels).sum() for objective in objectives]
        found = [torch.autograd.grad(v, points, retain_graph=v is not values[-1]) for v in values]
    return _finite(logits[: len(x)].detach(), *(gradient[: len(x)] for (gradient,) in found))


def sample_generator(seed: int, index: int, *purpose: int) -> torch.Generator:
    """A CPU generator for one image and one purpose, a function of its arguments alone."""
    mask, state = 2**64 - 1, 0
    for value in (seed, index, *purpose):  # splitmix64: the generator reads 32 bits of its seed
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0xFFFFFFFF)


def random_starts(x: Tensor, ball: Ball, seed: int, index: Tensor, restart: int) -> Tensor:
    """A start for every image, drawn from (seed, restart, the image's index in the dataset).

    Uniform over the ball (by volume), then clamped to [0, 1]; the same on every device.
    """

    def draw(image: Tensor, generator: torch.Generator) -> Tensor:
        options = {"generator": generator, "dtype": x.dtype}
        if ball.norm == "l_inf":
            return (2 * torch.rand(image.shape, **options) - 1) * ball.epsilon
        direction = ball.steepest(torch.randn(image[None].shape, **options))[0]
        return direction * (torch.rand(1, **options) ** (1 / image.numel()) * ball.epsilon)

    generators = (sample_generator(seed, number, restart) for number in index.tolist())
    noise = torch.stack([draw(*pair) for pair in zip(x, generators)])
    return ball.project(x + noise.to(x.device), x)


def _with_momentum(gradient: Callable[[Tensor], Tensor], decay: float) -> Callable[..., Tensor]:
    """MI-FGSM, Dong et al. 2018, eq. 6: ``g <- decay * g + gradient / mean(|gradient|)``."""
    momentum: Tensor | float = 0.0

    def direction(points: Tensor) -> Tensor:
        nonlocal momentum
        found = gradient(points)
        scale = found.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        momentum = decay * momentum + found / scale
        return momentum

    return direction


class Attacked(NamedTuple):
    """What an attack in a ball did to N images."""

    x_adv: Tensor  # [N, C, H, W]: misclassified where not robust, the image itself if it was before
    robust: Tensor  # [N] bool
    loss: Tensor  # [N], the cross-entropy at x_adv


def _maximise_loss(
    network: nn.Module, x: Tensor, y: Tensor, start: Tensor | None, budget: Budget, early_stop: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of one ascent, the last misclassified point on the way, and whether there is one."""
    found, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)

    def gradient(points: Tensor) -> Tensor:
        rows, result = (~(fooled & early_stop)).nonzero()[:, 0], torch.zeros_like(points)
        if len(rows):
            logits, result[rows] = gradients(network, points[rows], y[rows], losses_of)
            rows = rows[logits.argmax(1) != y[rows]]
            found[rows], fooled[rows] = points[rows], True
        return result

    steps = {"step_size": budget.step_size, "num_steps": budget.num_steps}
    ascended = gradient if budget.decay is None else _with_momentum(gradient, budget.decay)
    with Accelerated(frozen=True):
        end = ascend(x, ascended, budget.ball, start=start, **steps)
    return end, found, fooled


@torch.no_grad()
def pgd(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: Budget,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    early_stop: bool = True,
) -> Attacked:
    """Projected ascent of the cross-entropy: FGSM, PGD or momentum PGD, as the budget says.

    An image is not robust if any point on the way is misclassified: all of them lie in the ball.
    Images that are misclassified to begin with are not attacked.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits; used in eval mode, left as it was.
        x, y: images and labels [N].
        seed, index: the starts are drawn from the seed and the images' indices [N] in their
            dataset (default 0, 1, ...).
        early_stop: leave an image alone once it is misclassified. False continues to the last step,
            so that losses compare between budgets; ``x_adv`` is then the end of highest loss.
    """
    index = torch.arange(len(x)) if index is None else index
    with mode(network, training=False):
        x_adv, logits = x.clone(), logits_of(network, x)
        robust, loss = logits.argmax(1) == y, losses_of(logits, y)
        for restart in range(budget.restarts if budget.random_start else 1):
            rows = (robust | (not early_stop)).nonzero()[:, 0]
            if not len(rows):
                break
            start, centre, label = None, x[rows], y[rows]
            if budget.random_start:
                own = index[rows.to(index.device)]
                start = random_starts(centre, budget.ball, seed, own, restart)
            end, found, fooled = _maximise_loss(network, centre, label, start, budget, early_stop)
            if early_stop:
                end = torch.where(fooled.view(-1, 1, 1, 1), found, end)
            verify(end, centre, budget.ball)
            # The verdict is that of the network as it is, without the rounding of Accelerated.
            logits = logits_of(network, end)
            reached, wrong = losses_of(logits, label), logits.argmax(1) != label
            if not early_stop:
                wrong |= fooled & misclassified(network, found, label)
            better = (reached >= loss[rows]) | (wrong & early_stop)
            x_adv[rows[better]], loss[rows[better]] = end[better], reached[better]
            robust[rows[wrong]] = False
    return Attacked(x_adv, robust, loss)

"""FGSM, PGD and momentum PGD on the ascent routine that LFR's own search uses, batched.

What is climbed is the cross-entropy. Three things make an evaluation fast and leave its verdicts
alone: only the gradient of the images is computed (`utils/second_order.py`); the pass that gives a
step's gradient also tells whether the point before the step is misclassified; and from then on the
image is left out. Random starts are drawn image by image from (seed, restart, index in the
dataset), and passes are filled up to a multiple of a few images, so that a verdict depends neither
on the batch size nor on the other images.

- FGSM: Goodfellow et al. 2015, arXiv 1412.6572
- PGD: Madry et al. 2018, arXiv 1706.06083
- MPGD, momentum PGD: Dong et al. 2018, arXiv 1710.06081
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.ball import Ball, ascend
from utils.errors import UserError
from utils.lfr import full_precision
from utils.second_order import Kernels

GRADIENT_ATTACKS = ("FGSM", "PGD", "MPGD")
MINIMUM_NORM_ATTACKS = ("JSMA", "DDNL2", "point-wise")
LIBRARY_ATTACKS = ("AutoAttack", "Square")
# Rows of a matrix product that are computed together, see SteadyRows.
ROWS = 16
ATTACKS = (*GRADIENT_ATTACKS, *MINIMUM_NORM_ATTACKS, *LIBRARY_ATTACKS)


# ---------------------------------------------------------------------------------------------
# Names and defaults


@dataclass(frozen=True)
class Steps:
    """A schedule of the ascent; ``size`` in units of pixel intensity, at the default epsilon."""

    number: int
    size: float


@dataclass(frozen=True)
class NormDefaults:
    """What the gradient attacks do in one norm unless told otherwise."""

    epsilon: float
    pgd: Steps
    mpgd: Steps


@dataclass(frozen=True)
class Family:
    """The defaults of datasets that are attacked alike.

    Attributes:
        l_inf, l_2: epsilon and steps by norm.
        l0_radius: changed values (pixels x channels) at which JSMA's and point-wise's accuracy is
            stated.
        l2_radius: the same for DDNL2, L2 norm.
        pointwise_starts: noise images from which point-wise starts.
    """

    l_inf: NormDefaults
    l_2: NormDefaults
    l0_radius: int
    l2_radius: float
    pointwise_starts: int

    def norm(self, name: str) -> NormDefaults:
        return {"l_inf": self.l_inf, "l_2": self.l_2}[name]


MPGD_DECAY = 0.1  # the original's; Dong et al. use 1.0
JSMA_THETA, JSMA_GAMMA = 1.0, 0.4  # the original's
DDN_STEPS = 20  # the original's
SQUARE_QUERIES = 5000  # AutoAttack's

GREY = Family(
    l_inf=NormDefaults(0.3, pgd=Steps(40, 0.01), mpgd=Steps(40, 0.01)),
    l_2=NormDefaults(1.5, pgd=Steps(40, 0.1), mpgd=Steps(40, 0.1)),
    l0_radius=12,  # both radii are those of Schott et al. 2018
    l2_radius=1.5,
    pointwise_starts=10,
)
SVHN = Family(
    l_inf=NormDefaults(0.031, pgd=Steps(20, 0.007), mpgd=Steps(20, 0.007)),
    l_2=NormDefaults(0.5, pgd=Steps(20, 0.1), mpgd=Steps(20, 0.1)),
    l0_radius=24,
    l2_radius=0.5,
    pointwise_starts=3,
)
COLOUR = Family(
    l_inf=NormDefaults(0.031, pgd=Steps(10, 0.007), mpgd=Steps(20, 0.007)),
    l_2=NormDefaults(0.5, pgd=Steps(10, 0.125), mpgd=Steps(20, 0.125)),
    l0_radius=24,
    l2_radius=0.5,
    pointwise_starts=3,
)


def family(dataset: str, in_channels: int) -> Family:
    """The defaults for a dataset's name; other names go by whether their images are grey."""
    if dataset.lower().startswith("svhn"):
        return SVHN
    return GREY if in_channels == 1 else COLOUR


@dataclass(frozen=True)
class Budget:
    """What a gradient attack may do. ``decay`` None means no momentum."""

    norm: str
    epsilon: float
    num_steps: int
    step_size: float
    restarts: int = 1
    random_start: bool = True
    decay: float | None = None

    @property
    def ball(self) -> Ball:
        return Ball(self.norm, self.epsilon)

    def __str__(self) -> str:
        steps = f"{self.num_steps} x {self.step_size:.4g}"
        restarts = f", {self.restarts} starts" if self.restarts > 1 else ""
        return f"{self.norm} {self.epsilon:.4g}, {steps}{restarts}"


def gradient_budget(
    name: str,
    defaults: Family,
    norm: str = "l_inf",
    *,
    epsilon: float | None = None,
    num_steps: int | None = None,
    step_size: float | None = None,
    restarts: int = 1,
) -> Budget:
    """The budget of FGSM, PGD or MPGD; what is None comes from ``defaults``.

    A step size that is not given grows with epsilon. FGSM is one step of epsilon from the image
    itself, so that it has no steps and no restarts to choose.

    Raises:
        ValueError: not a gradient attack.
    """
    own = defaults.norm(norm)
    radius = own.epsilon if epsilon is None else epsilon
    if name == "FGSM":
        return Budget(norm, radius, 1, radius, random_start=False)
    if name not in GRADIENT_ATTACKS:
        raise ValueError(f"attack is {name!r}, allowed are {', '.join(GRADIENT_ATTACKS)}")
    steps = own.mpgd if name == "MPGD" else own.pgd
    return Budget(
        norm,
        radius,
        steps.number if num_steps is None else num_steps,
        steps.size * radius / own.epsilon if step_size is None else step_size,
        restarts,
        decay=MPGD_DECAY if name == "MPGD" else None,
    )


# ---------------------------------------------------------------------------------------------
# What every attack needs


class BudgetViolation(RuntimeError):
    """An attack returned an image that its budget does not allow. A bug, never a user's mistake."""


def verify(x_adv: Tensor, x: Tensor, ball: Ball | None = None) -> None:
    """Check that images are finite, in [0, 1] and in the ball around the originals.

    Raises:
        BudgetViolation: one of them is not; rounding to float32 is allowed for.
    """
    if x_adv.shape != x.shape:
        raise BudgetViolation(f"images of shape {list(x_adv.shape)} for {list(x.shape)}")
    if not len(x):
        return
    if not torch.isfinite(x_adv).all():
        raise BudgetViolation("an attacked image is not finite")
    low, high = float(x_adv.min()), float(x_adv.max())
    if low < 0 or high > 1:
        raise BudgetViolation(f"attacked pixels span [{low:.8g}, {high:.8g}], outside [0, 1]")
    if ball is not None:
        farthest = float(ball.distance(x_adv, x).max())
        if farthest > ball.epsilon * (1 + 1e-5) + 1e-6:
            raise BudgetViolation(
                f"an attacked image is {farthest:.8g} away in {ball.norm}, "
                f"epsilon is {ball.epsilon:.8g}"
            )


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for parameters inside; everything as it was afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def filled_up(x: Tensor) -> Tensor:
    """``x`` with its first image repeated until the batch size suits the processor.

    Convolutions of a few images, or of images that do not divide among the threads, add up in
    another order: the same image then gets other last digits in another batch, and now and then
    another verdict. Multiples of 8 images per thread, and of :data:`ROWS`, give the same digits.
    """
    quantum = ROWS
    if x.device.type == "cpu":
        quantum *= -(-8 * min(torch.get_num_threads(), 8) // ROWS)
    missing = -len(x) % quantum
    if not missing:
        return x
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:])))


class SteadyRows(TorchFunctionMode):
    """While entered, linear layers on a CPU compute :data:`ROWS` rows at a time.

    A matrix product is cut into pieces by its shape, on some processors differently for 192 rows
    than for 200, and each way adds up in another order.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return (_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.device.type != "cpu" or input.dim() != 2 or len(input) <= ROWS:
        return F.linear(input, weight, bias)
    return torch.cat([F.linear(rows, weight, bias) for rows in input.split(ROWS)])


def steady_logits(network: nn.Module, x: Tensor) -> Tensor:
    """Logits of images that :func:`filled_up` has made, in float32, no digit by the batch."""
    with SteadyRows():
        return full_precision(network(x))


@torch.no_grad()
def logits_of(network: nn.Module, x: Tensor, kernels: Kernels | None = None) -> Tensor:
    """Logits [N, classes] in float32; a row does not depend on the other rows.

    Raises:
        UserError: they are not finite, so that the largest means nothing.
    """
    if not len(x):
        return network(x.new_zeros(1, *x.shape[1:]))[:0]
    with nullcontext() if kernels is None else kernels:
        logits = steady_logits(network, filled_up(x))[: len(x)]
    _check_finite(logits)
    return logits


def _check_finite(*tensors: Tensor) -> None:
    if not bool(torch.isfinite(sum(tensor.sum() for tensor in tensors))):
        raise UserError(
            "the network's answer or its gradient is not finite; it cannot be evaluated"
        )


def misclassified(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the network, as it is, answers anything but ``y``. [N] bool."""
    return logits_of(network, x).argmax(1) != y


def loss_and_gradient(
    network: nn.Module, x: Tensor, y: Tensor, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, classes], cross-entropy [N] and its gradient by the images [N, C, H, W].

    Raises:
        UserError: loss or gradient is not finite. Steps by the sign would silently stay where they
            are, and the network would look robust.
    """
    count = len(x)
    points = filled_up(x).detach().requires_grad_()
    labels = torch.cat((y, y[:1].expand(len(points) - count)))
    with torch.enable_grad():
        with kernels:
            logits = steady_logits(network, points)
            losses = F.cross_entropy(logits, labels, reduction="none")
        with kernels.first_derivative():
            gradient = torch.autograd.grad(losses.sum(), points)[0]
    _check_finite(losses, gradient)
    return logits[:count].detach(), losses[:count].detach(), gradient[:count]


def sample_generator(seed: int, index: int, *purpose: int) -> torch.Generator:
    """A CPU generator for one image and one purpose, a function of its arguments alone.

    PyTorch's CPU generator reads 32 bits of a seed, so they are mixed (splitmix64) before.
    """
    mask = 2**64 - 1
    state = 0
    for value in (seed, index, *purpose):
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0xFFFFFFFF)


def random_starts(x: Tensor, ball: Ball, seed: int, index: Tensor, restart: int) -> Tensor:
    """A start for every image, drawn from (seed, restart, the image's index in the dataset)."""
    starts = torch.empty_like(x)
    for row, number in enumerate(index.tolist()):
        generator = sample_generator(seed, number, restart)
        starts[row] = ball.random_start(x[row : row + 1], generator)[0]
    return starts


# ---------------------------------------------------------------------------------------------
# The attacks


@dataclass(frozen=True)
class Attacked:
    """What an attack in a ball did to N images.

    Attributes:
        x_adv: [N, C, H, W]; misclassified where ``robust`` is False, the image itself where it was
            misclassified before the attack, else where the attack ended.
        robust: [N] bool.
        loss: [N], the cross-entropy at ``x_adv``.
    """

    x_adv: Tensor
    robust: Tensor
    loss: Tensor


class _Climb:
    """The gradient that an ascent asks for, and what its passes tell on the way.

    Attributes:
        standing: indices of the images that are still classified right.
        found: [N, C, H, W], the misclassified points, where there is one.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, y: Tensor, kernels: Kernels, early_stop: bool
    ) -> None:
        self.network, self.y, self.kernels, self.early_stop = network, y, kernels, early_stop
        self.standing = torch.arange(len(x), device=x.device)
        self.found = x.clone()
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def __call__(self, points: Tensor) -> Tensor:
        everyone = len(self.standing) == len(points)
        if not len(self.standing):
            return torch.zeros_like(points)
        at = points if everyone else points[self.standing]
        logits, _, gradient = loss_and_gradient(
            self.network, at, self.y[self.standing], self.kernels
        )
        gradient = self._note(at, logits, gradient)
        if len(gradient) == len(points):
            return gradient
        full = torch.zeros_like(points)
        full[self.standing] = gradient
        return full

    def finish(self, points: Tensor) -> None:
        """Look at the point after the last step, too."""
        if len(self.standing):
            at = points[self.standing]
            self._note(at, logits_of(self.network, at, self.kernels), at)

    def _note(self, at: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        wrong = logits.argmax(1) != self.y[self.standing]
        if not wrong.any():
            return gradient
        rows = self.standing[wrong]
        self.found[rows] = at[wrong]
        self.broken[rows] = True
        if not self.early_stop:
            return gradient
        self.standing = self.standing[~wrong]
        return gradient[~wrong]


@torch.no_grad()
def pgd(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    restarts: int = 1,
    random_start: bool = True,
    decay: float | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    early_stop: bool = True,
) -> Attacked:
    """Projected ascent of the cross-entropy; with ``decay`` momentum PGD.

    An image counts as broken if any point on the way is misclassified by the network: all of them
    lie in the ball. Images that are misclassified to begin with are not attacked.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits; used in eval mode, left as it was.
        x, y: images and labels [N].
        ball: norm and epsilon.
        step_size: in the ball's norm, in units of pixel intensity.
        num_steps: gradients per restart.
        restarts: starts per image; those that are broken are not attacked again.
        random_start: start anywhere in the ball, else at the image.
        decay: momentum, None for none.
        seed, index: the starts are drawn from the seed and the images' indices [N] in their
            dataset (default 0, 1, ...).
        early_stop: leave an image alone once it is broken. False goes on to the last step, so that
            ``loss`` can be compared between budgets; ``x_adv`` is then the point of highest loss.

    Raises:
        BudgetViolation: a point left the ball or [0, 1], or is not finite.
    """
    index = torch.arange(len(x)) if index is None else index
    x_adv = x.clone()
    kernels = Kernels(frozen=True)
    with frozen(network):
        logits = logits_of(network, x)
        robust = logits.argmax(1) == y
        loss = F.cross_entropy(logits, y, reduction="none")
        for restart in range(restarts if random_start else 1):
            rows = robust.nonzero()[:, 0] if early_stop else torch.arange(len(x), device=x.device)
            if not len(rows):
                break
            centre, label = x[rows], y[rows]
            climb = _Climb(network, centre, label, kernels, early_stop)
            start = None
            if random_start:
                start = random_starts(centre, ball, seed, index[rows.to(index.device)], restart)
            end = ascend(
                centre,
                climb,
                ball,
                step_size=step_size,
                num_steps=num_steps,
                start=start,
                decay=decay,
            )
            climb.finish(end)
            if early_stop:
                end = torch.where(climb.broken.view(-1, 1, 1, 1), climb.found, end)
            verify(end, centre, ball)
            # The verdict is that of the network as it is, without the kernels' rounding.
            logits = logits_of(network, end)
            reached = F.cross_entropy(logits, label, reduction="none")
            broken = logits.argmax(1) != label
            if not early_stop:
                broken |= climb.broken & misclassified(network, climb.found, label)
            better = (reached >= loss[rows]) | (broken if early_stop else False)
            x_adv[rows[better]] = end[better]
            loss[rows[better]] = reached[better]
            robust[rows[broken]] = False
    return Attacked(x_adv, robust, loss)


def fgsm(network: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Attacked:
    """One step of length epsilon from the image itself: PGD with one step and no random start."""
    return pgd(network, x, y, ball, step_size=ball.epsilon, num_steps=1, random_start=False)


def attack(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: Budget,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    early_stop: bool = True,
) -> Attacked:
    """:func:`pgd` with a :class:`Budget`; FGSM, PGD or MPGD, as the budget says."""
    return pgd(
        network,
        x,
        y,
        budget.ball,
        step_size=budget.step_size,
        num_steps=budget.num_steps,
        restarts=budget.restarts,
        random_start=budget.random_start,
        decay=budget.decay,
        seed=seed,
        index=index,
        early_stop=early_stop,
    )


def percent(part: int | float, whole: int) -> float:
    """``part`` of ``whole`` in percent, nan for nothing of nothing."""
    return 100.0 * part / whole if whole else math.nan

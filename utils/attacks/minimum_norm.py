"""JSMA, DDN and point-wise: attacks that look for the smallest change, batched.

They have no radius of their own; what they give is a distance for each image, and from these a
success rate, medians, and the accuracy at a radius that has been stated.

- JSMA: Papernot et al. 2016, arXiv 1511.07528
- DDN: Rony et al. 2019, arXiv 1811.09600
- point-wise: Schott et al. 2018, arXiv 1805.09190

All take a network (images [N, C, H, W] in [0, 1] to logits, left as it was), images and labels
[N], ``seed`` and the images' ``index`` [N] in the dataset, from which random numbers are drawn.
"""

import functools
import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.lfr import Ball
from utils.lfr.accel import Accelerated
from utils.lfr.batch_norm import mode

from .gradient import gradients, logits_of, losses_of, misclassified, sample_generator, verify

Generators = list[torch.Generator]
Draws = Callable[..., Generators]  # a purpose -> a generator for each image
_DDN_START, _DDN_RATE = 1.0, 0.05  # the first norm, and the rate at which it changes
_ROWS = 256  # images of one pass of point-wise
# The share of noise in point-wise's starts, tried from the smallest.
_NOISE = (*(0.01 * 1.2**step for step in range(26)), 1.0)
_REFINEMENTS = 20  # more draws with a tenth less noise than the least that was adversarial


class Distances(NamedTuple):
    """What a minimum-norm attack did to N images.

    The distances [N] are infinite where it failed, 0 where the image was misclassified before.
    """

    x_adv: Tensor  # [N, C, H, W]; the image itself where the attack failed or was not needed
    success: Tensor  # [N] bool; also True where the image was misclassified before
    l0: Tensor  # number of changed values
    l2: Tensor
    l_inf: Tensor


def measure(network: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Distances:
    """Verify the images of an attack and measure how far they are."""
    verify(x_adv, x)
    success = misclassified(network, x_adv, y)
    difference = (x_adv - x).flatten(1)
    l0, l2 = (difference != 0).sum(1).float(), difference.norm(dim=1)
    distances = (l0, l2, difference.norm(p=math.inf, dim=1))
    x_adv = torch.where(success.view(-1, 1, 1, 1), x_adv, x)
    return Distances(x_adv, success, *(torch.where(success, far, math.inf) for far in distances))


def _measured(search: Callable[..., Tensor]) -> Callable[..., Distances]:
    """An attack on any images, by a search for x_adv of those that are classified correctly."""

    @functools.wraps(search)
    @torch.no_grad()
    def attack(
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        seed: int = 0,
        index: Tensor | None = None,
        **options: Any,
    ) -> Distances:
        x, index = x.contiguous(), torch.arange(len(x)) if index is None else index
        x_adv = x.clone()
        with mode(network, training=False):
            rows = (~misclassified(network, x, y)).nonzero()[:, 0]
            if len(rows):
                own = index[rows.to(index.device)].tolist()

                def draws(*purpose: int) -> Generators:
                    return [sample_generator(seed, number, *purpose) for number in own]

                x_adv[rows] = search(network, x[rows], y[rows], draws, **options)
            return measure(network, x_adv, x, y)

    return attack


def random_targets(y: Tensor, num_classes: int, drawn: Generators) -> Tensor:
    """A target class for every image, never the true one. [N]."""
    offsets = [int(torch.randint(1, num_classes, (), generator=own)) for own in drawn]
    return (y + torch.tensor(offsets, device=y.device, dtype=y.dtype)) % num_classes


@_measured
def jsma(
    network: nn.Module, x: Tensor, y: Tensor, draws: Draws, theta: float = 1.0, gamma: float = 0.4
) -> Tensor:
    """The Jacobian-based Saliency Map Attack in its published form: pairs of values are raised.

    Each round raises by ``theta`` the pair (p, q) that maximises -alpha * beta, with alpha > 0 the
    pair's derivative of the target's logit (a random class) and beta < 0 that of the sum of all
    others (Papernot et al., algorithm 3). A value at 1 is done. It ends when the image is
    misclassified, no pair helps, or a share ``gamma`` of the values has been used up.
    """
    x_adv = x.clone()
    flat = x_adv.flatten(1)  # shares memory with x_adv
    targets = random_targets(y, logits_of(network, x[:1]).shape[1], draws(1))
    objectives = (lambda logits, y: logits.gather(1, y[:, None]), lambda logits, y: logits)
    rows = torch.arange(len(x), device=x.device)
    for _ in range(int(flat.shape[1] * gamma / 2)):
        with Accelerated(frozen=True):
            found = gradients(network, x_adv[rows], targets[rows], *objectives)
        logits, target, every = (tensor.flatten(1) for tensor in found)
        pair, helps = _best_pair(target, target - every, flat[rows] < 1)
        keep = (logits.argmax(1) == y[rows]) & helps
        rows, pair = rows[keep], pair[keep]
        if not len(rows):
            break
        for column in pair.unbind(1):
            flat[rows, column] = (flat[rows, column] + theta).clamp_max(1)
    return x_adv


def _best_pair(up: Tensor, down: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The pair p != q with the largest (up_p + up_q)(down_p + down_q), both factors above 0.

    A value that two others beat in ``up`` and in ``down`` is in no best pair that one of the two
    could not replace. What remains is a handful of values (the 2-skyband of D points in the
    plane), so that all pairs of D = 3,072 values need not be looked at, and the answer is exact.
    [N, 2] indices and [N] bool, whether there is such a pair.
    """
    up, order = up.masked_fill(~allowed, -math.inf).sort(dim=1, descending=True, stable=True)
    down = down.masked_fill(~allowed, -math.inf).gather(1, order)

    def before(values: Tensor) -> Tensor:
        return torch.cat((torch.full_like(values[:, :1], -math.inf), values[:, :-1]), 1)

    # The largest and the second largest `down` among the values sorted before each.
    second = torch.minimum(down, before(down.cummax(1).values)).cummax(1).values
    candidate = (down > before(second)) & (up > -math.inf)
    width = max(2, int(candidate.sum(1).max()))
    rank = candidate.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    valid = candidate.gather(1, rank)
    up, down = (v.gather(1, rank).masked_fill(~valid, -math.inf) for v in (up, down))
    ups, downs = up[:, :, None] + up[:, None, :], down[:, :, None] + down[:, None, :]
    useful = (ups > 0) & (downs > 0)
    useful &= ~torch.eye(ups.shape[1], dtype=torch.bool, device=ups.device)
    best, place = torch.where(useful, ups * downs, 0.0).flatten(1).max(1)
    chosen = torch.stack((place // ups.shape[2], place % ups.shape[2]), 1)
    return order.gather(1, rank.gather(1, chosen)), best > 0


@_measured
def ddn(network: nn.Module, x: Tensor, y: Tensor, draws: Draws, num_steps: int = 20) -> Tensor:
    """Decoupled Direction and Norm: the smallest L2 perturbation within a number of steps.

    The perturbation follows the normalised gradient with a step that falls from 1 to 0.01 (cosine)
    and is rescaled to a norm, 1 at first, that shrinks by 5 % while it is adversarial and grows by
    5 % while it is not (Rony et al., algorithm 1; no quantisation). A vanishing gradient is
    replaced by a random direction.
    """
    ball, best, delta = Ball("l_2", _DDN_START), x.clone(), torch.zeros_like(x)
    best_norm = torch.full((len(x),), math.inf, device=x.device)
    noise = draws(2)
    radius = torch.full((len(x),), _DDN_START, device=x.device)
    widest = torch.maximum(x, 1 - x).flatten(1).norm(dim=1)

    def keep_best(adversarial: Tensor) -> None:
        length = delta.flatten(1).norm(dim=1)
        better = adversarial & (length < best_norm)
        best[better], best_norm[better] = (x + delta)[better].clamp(0, 1), length[better]

    with Accelerated(frozen=True):
        for step in range(num_steps):
            logits, gradient = gradients(network, x + delta, y, losses_of)
            adversarial = logits.argmax(1) != y
            keep_best(adversarial)
            direction = ball.steepest(gradient)
            for row in (gradient.flatten(1) == 0).all(1).nonzero()[:, 0].tolist():
                drawn = torch.randn(x.shape[1:], generator=noise[row]).to(x)
                direction[row] = drawn / drawn.norm()
            size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / num_steps)) / 2
            delta = delta + size * direction
            factor = torch.where(adversarial, 1 - _DDN_RATE, 1 + _DDN_RATE)
            radius = torch.minimum(radius * factor, widest)
            length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
            delta = (x + delta * (radius / length).view(-1, 1, 1, 1)).clamp(0, 1) - x
        keep_best(misclassified(network, x + delta, y))  # the last point counts as well
    return best


@_measured
def pointwise(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    starts: int = 10,
    donors: Tensor | None = None,
) -> Tensor:
    """Point-wise: adversarial noise, of which as many values as possible are put back.

    From each of several salt-and-pepper images that are misclassified, values go back to the
    original's in random order as long as the image stays misclassified, over and over until no
    single value can go back; the start that ends with the fewest changed values counts. Runs of
    values go back together where that works (doubled after a success, halved after a failure): the
    same kind of point as one at a time, for a tenth of the queries.

    ``starts`` is the number of noise images per sample. ``donors`` [K, C, H, W] are images to start
    from where no noise is misclassified: some networks take all noise for one class.
    """
    best, least = x.clone(), [math.inf] * len(x)  # the fewest changed values so far
    # All starts of all images go side by side: a large batch until the very end.
    rows = torch.arange(len(x), device=x.device).repeat_interleave(starts)
    drawn = [own for image in zip(*(draws(3, start) for start in range(starts))) for own in image]
    centre, label = x[rows], y[rows]
    with Accelerated(frozen=True):
        begin, adversarial = _noise_start(network, centre, label, drawn)
        answers = logits_of(network, x[:0] if donors is None else donors).argmax(1)
        for copy in (~adversarial).nonzero()[:, 0].tolist():
            other = (answers != label[copy]).nonzero()[:, 0]
            if len(other):
                begin[copy], adversarial[copy] = donors[other[0]], True
        chosen = adversarial.nonzero()[:, 0].tolist()
        begin, rows, centre, label = begin[chosen], rows[chosen], centre[chosen], label[chosen]
        end = _put_back(network, begin, centre, label, [drawn[copy] for copy in chosen])
    changed = (end != centre).flatten(1).sum(1).tolist()
    for copy in range(len(chosen)):
        if changed[copy] < least[row := int(rows[copy])]:
            best[row], least[row] = end[copy], changed[copy]
    return best


def _wrong(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether images are misclassified, [N] bool, in batches that fit the caches."""
    batches = zip(x.split(_ROWS), y.split(_ROWS))
    return torch.cat([misclassified(network, images, labels) for images, labels in batches])


def _noise_start(
    network: nn.Module, x: Tensor, y: Tensor, drawn: Generators
) -> tuple[Tensor, Tensor]:
    """Salt-and-pepper images with little noise that are misclassified, and whether they are."""
    begin, least = x.clone(), torch.ones(len(x), device=x.device)
    adversarial = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def draw(rows: Tensor, share: Tensor) -> None:
        if not len(rows):
            return
        noise = torch.stack([torch.rand(x.shape[1:], generator=drawn[row]) for row in rows]).to(x)
        half = share.view(-1, 1, 1, 1) / 2
        noisy = torch.where(noise < half, 0.0, x[rows])
        noisy = torch.where(noise >= 1 - half, 1.0, noisy)
        wrong = _wrong(network, noisy, y[rows])
        begin[rows[wrong]], adversarial[rows[wrong]] = noisy[wrong], True
        least[rows[wrong]] = share[wrong]

    for share in _NOISE:
        draw((~adversarial).nonzero()[:, 0], torch.full_like(least, share)[~adversarial])
    rows = adversarial.nonzero()[:, 0]
    for _ in range(_REFINEMENTS):
        draw(rows, 0.9 * least[rows])
    return begin, adversarial


def _trials(
    point: Tensor, goal: Tensor, drawn: torch.Generator
) -> Generator[Tensor | None, bool, None]:
    """Put values back in ``point`` until no single one can go back.

    Yields what is tried, None at the end, and is sent whether it is misclassified.
    """
    size, improved = 16, True
    while improved:
        order, position, improved = (point != goal).nonzero()[:, 0], 0, False
        order = order[torch.randperm(len(order), generator=drawn)]
        while position < len(order):
            run = order[position : position + size]
            tried = point.index_copy(0, run, goal[run])
            if (yield tried):
                point.copy_(tried)
                improved, position, size = True, position + size, 2 * size
            else:
                position, size = position + (size == 1), max(1, size // 2)
    yield None


def _put_back(network: nn.Module, begin: Tensor, x: Tensor, y: Tensor, drawn: Generators) -> Tensor:
    """Put values of each image back to those of ``x``, all images side by side."""
    points, goals = begin.flatten(1).cpu().clone(), x.flatten(1).cpu()
    searches = [_trials(*image) for image in zip(points, goals, drawn)]
    tried = {row: next(search) for row, search in enumerate(searches)}
    while tried := {row: trial for row, trial in tried.items() if trial is not None}:
        batch = torch.stack(list(tried.values())).view(-1, *x.shape[1:]).to(x.device)
        works = _wrong(network, batch, y[list(tried)]).tolist()
        tried = {row: searches[row].send(wrong) for row, wrong in zip(tried, works)}
    return points.view_as(x).to(x.device)

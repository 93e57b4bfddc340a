"""JSMA, DDN and point-wise: attacks that look for the smallest change, batched.

They have no radius of their own, so an accuracy under them means nothing; what they give is a
distance for each image, and from these a success rate, medians, and the accuracy at a radius that
has been stated. Distances count values, pixels times channels.

- JSMA: Papernot et al. 2016, "The Limitations of Deep Learning in Adversarial Settings",
  arXiv 1511.07528
- DDN: Rony et al. 2019, "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial
  Attacks and Defenses", arXiv 1811.09600
- point-wise: Schott et al. 2018, "Towards the first adversarially robust neural network model on
  MNIST", arXiv 1805.09190
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.attacks import (
    filled_up,
    frozen,
    logits_of,
    loss_and_gradient,
    misclassified,
    sample_generator,
    steady_logits,
    verify,
)
from utils.ball import Ball
from utils.second_order import Kernels

_ROWS = 256  # images of one pass of point-wise
# The share of noise in point-wise's starts, tried from the smallest.
_NOISE = (*(0.01 * 1.2**step for step in range(26)), 1.0)
_REFINEMENTS = 20  # more draws with a tenth less noise than the least that was adversarial


@dataclass(frozen=True)
class Distances:
    """What a minimum-norm attack did to N images.

    Attributes:
        x_adv: [N, C, H, W]; the image itself where the attack failed or was not needed.
        success: [N] bool; also True where the image was misclassified before the attack.
        l0, l2, l_inf: [N], how far ``x_adv`` is; infinite where the attack failed, 0 where the
            image was misclassified before. l0 counts changed values.
    """

    x_adv: Tensor
    success: Tensor
    l0: Tensor
    l2: Tensor
    l_inf: Tensor


def measure(network: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Distances:
    """Verify the images of an attack and measure how far they are."""
    verify(x_adv, x)
    success = misclassified(network, x_adv, y)
    difference = (x_adv - x).flatten(1)
    far = torch.full((len(x),), math.inf, device=x.device)

    def where(values: Tensor) -> Tensor:
        return torch.where(success, values, far)

    return Distances(
        torch.where(success.view(-1, 1, 1, 1), x_adv, x),
        success,
        l0=where((difference != 0).sum(1).float()),
        l2=where(difference.norm(dim=1)),
        l_inf=where(difference.norm(p=math.inf, dim=1)),
    )


# ---------------------------------------------------------------------------------------------
# JSMA


def random_targets(y: Tensor, num_classes: int, seed: int, index: Tensor) -> Tensor:
    """A target class for every image, drawn from (seed, index), never the true one. [N]."""
    offsets = [
        int(torch.randint(1, num_classes, (), generator=sample_generator(seed, number, 1)))
        for number in index.tolist()
    ]
    return (y + torch.tensor(offsets, device=y.device, dtype=y.dtype)) % num_classes


@torch.no_grad()
def jsma(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    theta: float = 1.0,
    gamma: float = 0.4,
    seed: int = 0,
    index: Tensor | None = None,
    targets: Tensor | None = None,
) -> Distances:
    """The Jacobian-based Saliency Map Attack in its published form: pairs of values are raised.

    Each round raises by ``theta`` the pair (p, q) that maximises -alpha * beta, with alpha > 0 the
    pair's derivative of the target's logit and beta < 0 that of the sum of all others (Papernot et
    al., algorithm 3). A value that has reached 1 is done. It ends when the image is misclassified,
    no pair helps, or a share ``gamma`` of the values has been used up.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits; left as it was.
        x, y: images and labels [N].
        theta: how much a value is raised, above 0.
        gamma: share of the values that may be changed; each round counts two.
        seed, index: of the targets, one for every image, never the true class.
        targets: [N], in place of drawn ones.
    """
    index = torch.arange(len(x)) if index is None else index
    with frozen(network):
        kernels = Kernels(frozen=True)
        logits = logits_of(network, x)
        if targets is None:
            targets = random_targets(y, logits.shape[1], seed, index)
        x_adv = x.contiguous().clone()
        flat = x_adv.flatten(1)  # shares memory with x_adv
        standing = (logits.argmax(1) == y).nonzero()[:, 0]
        for _ in range(int(flat.shape[1] * gamma / 2)):
            if not len(standing):
                break
            at = x_adv[standing]
            logits, up, down = _logit_gradients(network, at, targets[standing], kernels)
            keep = logits.argmax(1) == y[standing]
            pair, helps = _best_pair(up, down, at.flatten(1) < 1)
            keep &= helps
            standing, pair = standing[keep], pair[keep]
            for column in range(2):
                place = (standing, pair[:, column])
                flat[place] = (flat[place] + theta).clamp_max(1)
        return measure(network, x_adv, x, y)


def _logit_gradients(
    network: nn.Module, x: Tensor, targets: Tensor, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, gradient of the target's logit, and minus that of all other logits' sum, [N, D]."""
    points = filled_up(x).detach().requires_grad_()
    labels = torch.cat((targets, targets[:1].expand(len(points) - len(x))))
    with torch.enable_grad():
        with kernels:
            logits = steady_logits(network, points)
        with kernels.first_derivative():
            chosen = logits.gather(1, labels[:, None]).sum()
            target = torch.autograd.grad(chosen, points, retain_graph=True)[0]
            every = torch.autograd.grad(logits.sum(), points)[0]
    target, every = (gradient[: len(x)].flatten(1) for gradient in (target, every))
    return logits[: len(x)].detach(), target, target - every


def _best_pair(up: Tensor, down: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The pair p != q with the largest (up_p + up_q)(down_p + down_q), both factors above 0.

    A value that two others beat in ``up`` and in ``down`` is in no best pair that one of the two
    could not replace. What remains is a handful of values (the 2-skyband of D points in the
    plane), so that all pairs of D = 3,072 values need not be looked at, and the answer is exact.

    Returns:
        [N, 2] indices and [N] bool, whether there is such a pair.
    """
    up = up.masked_fill(~allowed, -math.inf)
    down = down.masked_fill(~allowed, -math.inf)
    up, order = up.sort(dim=1, descending=True, stable=True)
    down = down.gather(1, order)
    # The largest and the second largest `down` among the values sorted before each.
    largest = down.cummax(1).values
    before = torch.cat((torch.full_like(down[:, :1], -math.inf), largest[:, :-1]), 1)
    second = torch.minimum(down, before).cummax(1).values
    second = torch.cat((torch.full_like(down[:, :1], -math.inf), second[:, :-1]), 1)
    candidate = (down > second) & (up > -math.inf)
    width = max(2, int(candidate.sum(1).max())) if len(up) else 2
    rank = candidate.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    valid = candidate.gather(1, rank)
    up = up.gather(1, rank).masked_fill(~valid, -math.inf)
    down = down.gather(1, rank).masked_fill(~valid, -math.inf)
    ups, downs = up[:, :, None] + up[:, None, :], down[:, :, None] + down[:, None, :]
    useful = (ups > 0) & (downs > 0)
    useful &= ~torch.eye(ups.shape[1], dtype=torch.bool, device=ups.device)
    score = torch.where(useful, ups * downs, ups.new_zeros(()))
    best, place = score.flatten(1).max(1)
    first, other = place // ups.shape[2], place % ups.shape[2]
    chosen = torch.stack((first, other), 1)
    return order.gather(1, rank.gather(1, chosen)), best > 0


# ---------------------------------------------------------------------------------------------
# DDN


@torch.no_grad()
def ddn(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    num_steps: int = 20,
    init_epsilon: float = 1.0,
    gamma: float = 0.05,
    seed: int = 0,
    index: Tensor | None = None,
) -> Distances:
    """Decoupled Direction and Norm: the smallest L2 perturbation within a number of steps.

    The perturbation follows the normalised gradient with a step that falls from 1 to 0.01 (cosine)
    and is rescaled to a norm that shrinks by ``gamma`` while it is adversarial and grows while it
    is not (Rony et al., algorithm 1; no quantisation). A vanishing gradient is replaced by a
    random direction.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits; left as it was.
        x, y: images and labels [N].
        num_steps: gradients per image.
        init_epsilon: L2 norm to begin with; in n steps it can grow (1 + gamma)**n fold.
        seed, index: of the random directions.
    """
    index = torch.arange(len(x)) if index is None else index
    ball = Ball("l_2", init_epsilon)
    best, best_norm = x.clone(), torch.full((len(x),), math.inf, device=x.device)
    with frozen(network):
        kernels = Kernels(frozen=True)
        rows = (~misclassified(network, x, y)).nonzero()[:, 0]
        centre, label = x[rows], y[rows]
        noise = {
            row: sample_generator(seed, int(number), 2)
            for row, number in enumerate(index[rows.to(index.device)])
        }
        delta = torch.zeros_like(centre)
        radius = torch.full((len(rows),), init_epsilon, device=x.device)
        widest = torch.maximum(centre, 1 - centre).flatten(1).norm(dim=1)

        def note(adversarial: Tensor) -> None:
            length = delta.flatten(1).norm(dim=1)
            better = adversarial & (length < best_norm[rows])
            best[rows[better]] = (centre + delta)[better].clamp(0, 1)
            best_norm[rows[better]] = length[better]

        for step in range(num_steps if len(rows) else 0):
            logits, _, gradient = loss_and_gradient(network, centre + delta, label, kernels)
            adversarial = logits.argmax(1) != label
            note(adversarial)
            direction = ball.steepest(gradient)
            for row in (gradient.flatten(1).abs().amax(1) == 0).nonzero()[:, 0].tolist():
                drawn = torch.randn(x.shape[1:], generator=noise[row]).to(x)
                direction[row] = drawn / drawn.norm()
            size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / num_steps)) / 2
            delta = delta + size * direction
            radius = torch.minimum(radius * torch.where(adversarial, 1 - gamma, 1 + gamma), widest)
            length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
            delta = delta * (radius / length).view(-1, 1, 1, 1)
            delta = (centre + delta).clamp(0, 1) - centre
        if len(rows):  # the last step's point counts as well
            note(logits_of(network, centre + delta, kernels).argmax(1) != label)
        return measure(network, best, x, y)


# ---------------------------------------------------------------------------------------------
# Point-wise


@torch.no_grad()
def pointwise(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    starts: int = 10,
    seed: int = 0,
    index: Tensor | None = None,
    donors: Tensor | None = None,
) -> Distances:
    """Point-wise: adversarial noise, of which as many values as possible are put back.

    From each of several salt-and-pepper images that are misclassified, values go back to the
    original's in random order as long as the image stays misclassified, over and over until no
    single value can go back; the start that ends with the fewest changed values counts. Schott et
    al. put values back one at a time; here runs of values go back together where that works
    (doubled after a success, halved after a failure), which ends in the same kind of point with a
    tenth of the queries.

    Needs no gradient. Deterministic in ``seed`` and ``index``.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits; left as it was.
        x, y: images and labels [N].
        starts: noise images per sample.
        seed, index: of the noise and the orders.
        donors: [K, C, H, W], images to start from where no noise is misclassified, which happens
            when a network takes all noise for one class. Without any, such a sample stands.
    """
    index = torch.arange(len(x)) if index is None else index
    best, best_l0 = x.contiguous().clone(), torch.full((len(x),), math.inf, device=x.device)
    with frozen(network):
        kernels = Kernels(frozen=True)
        rows = (~misclassified(network, x, y)).nonzero()[:, 0]
        # All starts of all images go side by side: a large batch until the very end.
        rows = rows.repeat_interleave(starts)
        generators = [
            sample_generator(seed, number, 3, copy % starts)
            for copy, number in enumerate(index[rows.to(index.device)].tolist())
        ]
        centre, label = x[rows].contiguous(), y[rows]
        begin, adversarial = _noise_start(network, centre, label, generators, kernels)
        if donors is not None and len(donors):
            begin, adversarial = _from_donors(network, begin, adversarial, label, donors, kernels)
        chosen = adversarial.nonzero()[:, 0]
        generators = [generators[copy] for copy in chosen.tolist()]
        rows, centre, label = rows[chosen], centre[chosen], label[chosen]
        end = _put_back(network, begin[chosen], centre, label, generators, kernels)
        l0 = (end != centre).flatten(1).sum(1).float()
        for copy, row in enumerate(rows.tolist()):
            if l0[copy] < best_l0[row]:
                best[row], best_l0[row] = end[copy], l0[copy]
        return measure(network, best, x, y)


def _wrong(network: nn.Module, x: Tensor, y: Tensor, kernels: Kernels) -> Tensor:
    """Whether images are misclassified, [N] bool, in batches that fit the caches."""
    if not len(x):
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    batches = zip(x.split(_ROWS), y.split(_ROWS))
    return torch.cat([logits_of(network, a, kernels).argmax(1) != b for a, b in batches])


def _noise_start(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    generators: list[torch.Generator],
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """Salt-and-pepper images with little noise that are misclassified, and whether they are."""
    begin = x.clone()
    adversarial = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    least = torch.ones(len(x), device=x.device)

    def draw(rows: Tensor, share: Tensor) -> None:
        noise = torch.stack([torch.rand(x.shape[1:], generator=generators[row]) for row in rows])
        noise, half = noise.to(x), share.view(-1, 1, 1, 1) / 2
        noisy = torch.where(noise < half, 0.0, x[rows])
        noisy = torch.where(noise >= 1 - half, 1.0, noisy)
        wrong = _wrong(network, noisy, y[rows], kernels)
        begin[rows[wrong]] = noisy[wrong]
        adversarial[rows[wrong]] = True
        least[rows[wrong]] = share[wrong]

    for share in _NOISE:
        rows = (~adversarial).nonzero()[:, 0]
        if not len(rows):
            break
        draw(rows, torch.full((len(rows),), share, device=x.device))
    rows = adversarial.nonzero()[:, 0]
    for _ in range(_REFINEMENTS if len(rows) else 0):
        draw(rows, 0.9 * least[rows])
    return begin, adversarial


def _from_donors(
    network: nn.Module,
    begin: Tensor,
    adversarial: Tensor,
    y: Tensor,
    donors: Tensor,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """Where no noise was adversarial, the first donor that is."""
    answers = logits_of(network, donors, kernels).argmax(1)
    begin, adversarial = begin.clone(), adversarial.clone()
    for row in (~adversarial).nonzero()[:, 0].tolist():
        other = (answers != y[row]).nonzero()[:, 0]
        if len(other):
            begin[row], adversarial[row] = donors[other[0]], True
    return begin, adversarial


def _put_back(
    network: nn.Module,
    begin: Tensor,
    x: Tensor,
    y: Tensor,
    generators: list[torch.Generator],
    kernels: Kernels,
) -> Tensor:
    """Put values of ``begin`` back to those of ``x`` until no single one can go back any more."""
    point, goal = begin.flatten(1).clone(), x.flatten(1)
    samples, values = point.shape
    rank = torch.empty(samples, values, dtype=torch.long, device=x.device)
    length = torch.zeros(samples, dtype=torch.long, device=x.device)
    position = torch.zeros_like(length)  # of the next run in the sample's order
    size = torch.full_like(length, 16)
    improved = torch.zeros(samples, dtype=torch.bool, device=x.device)

    def new_order(row: int) -> None:
        """Order the values that still differ at random; all others get a rank out of reach."""
        different = (point[row] != goal[row]).nonzero()[:, 0]
        shuffled = torch.randperm(len(different), generator=generators[row]).to(x.device)
        rank[row] = values
        rank[row, different[shuffled]] = torch.arange(len(different), device=x.device)
        length[row], position[row], improved[row] = len(different), 0, False

    for row in range(samples):
        new_order(row)
    active = torch.arange(samples, device=x.device)
    while True:
        ended = position[active] >= length[active]
        for row in active[ended & improved[active]].tolist():
            new_order(row)
        active = active[position[active] < length[active]]
        if not len(active):
            return point.view_as(x)
        from_, to = position[active, None], (position + size)[active, None]
        run = (rank[active] >= from_) & (rank[active] < to)
        tried = torch.where(run, goal[active], point[active])
        images = tried.view(-1, *x.shape[1:])
        works = _wrong(network, images, y[active], kernels)
        point[active[works]] = tried[works]
        improved[active[works]] = True
        single = size[active] == 1
        position[active] += torch.where(works, size[active], single.long())
        size[active] = torch.where(works, size[active] * 2, size[active] // 2).clamp_min(1)

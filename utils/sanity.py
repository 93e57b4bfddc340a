"""Is it real? Signs that a network hides its gradients instead of being robust.

The list follows Athalye et al. 2018, "Obfuscated Gradients Give a False Sense of Security" (arXiv
1802.00420), section 3.1, and Carlini et al. 2019, "On Evaluating Adversarial Robustness" (arXiv
1902.06705). A warning is a reason to look closer, not a proof; nor is a pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from utils.attacks import (
    Budget,
    attack,
    frozen,
    logits_of,
    loss_and_gradient,
    misclassified,
    percent,
    random_starts,
)
from utils.batch_norm import normalization
from utils.library_attacks import CHUNK, run_library
from utils.second_order import Kernels

EXAMPLES = 100  # images that the attacks of the checks look at
QUERIES = 1000  # of Square; its full 5,000 take longer than all other checks together
VANISHING = 1e-12  # largest entry of a gradient below which sign steps follow rounding


@dataclass(frozen=True)
class Check:
    """One question, its verdict (PASS, WARN or SKIP) and the figures it rests on."""

    name: str
    verdict: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"  {self.verdict}  {self.name}: {self.text}"


def _check(name: str, passed: bool, text: str, **figures: Any) -> Check:
    return Check(name, "PASS" if passed else "WARN", text, figures)


class _Examined:
    """The network and the images, with accuracies under a budget, batch by batch."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, seed: int, batch: int) -> None:
        self.network, self.x, self.y, self.seed, self.batch = network, x, y, seed, batch

    def over_batches(self, function: Callable[[Tensor], Any]) -> list[Any]:
        return [function(rows) for rows in torch.arange(len(self.x)).split(self.batch)]

    def attacked(
        self, budget: Budget, network: nn.Module | None = None, early_stop: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Robust [N] bool, loss [N] and images [N, C, H, W] after the attack."""
        found = self.over_batches(
            lambda rows: attack(
                network or self.network,
                self.x[rows],
                self.y[rows],
                budget,
                seed=self.seed,
                index=rows,
                early_stop=early_stop,
            )
        )
        return tuple(
            torch.cat([getattr(part, name) for part in found])
            for name in ("robust", "loss", "x_adv")
        )

    def accuracy(self, budget: Budget) -> float:
        return percent(int(self.attacked(budget)[0].sum()), len(self.x))

    def loss(self, budget: Budget) -> float:
        return float(self.attacked(budget, early_stop=False)[1].mean())


def sanity_checks(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: Budget,
    *,
    seed: int = 0,
    batch: int = 200,
    undefended: nn.Module | None = None,
) -> Iterator[Check]:
    """Yield the checks one by one.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits.
        x, y: images and labels [N]; attacks take the first :data:`EXAMPLES`, the rest all.
        budget: PGD's.
        undefended: a network whose adversarial images are tried on this one.
    """
    some = _Examined(network, x[:EXAMPLES], y[:EXAMPLES], seed, batch)
    robust = some.attacked(budget)[0]
    yield _fgsm_not_stronger(some, budget, robust)
    yield _falls_to_zero(some, budget)
    yield _loss_rises(some, budget)
    yield _gradients_there(some, budget)
    yield _black_box_not_stronger(some, budget, robust)
    yield _transfer_not_stronger(some, budget, robust, undefended)
    yield _modes_agree(_Examined(network, x, y, seed, batch))


def _fgsm_not_stronger(some: _Examined, budget: Budget, robust: Tensor) -> Check:
    one_step = replace(
        budget, num_steps=1, step_size=budget.epsilon, random_start=False, restarts=1
    )
    fgsm, pgd = some.accuracy(one_step), percent(int(robust.sum()), len(robust))
    return _check(
        "FGSM is not stronger than PGD",
        fgsm >= pgd - percent(1, len(robust)),  # one image may go the other way
        f"accuracy {fgsm:.1f} % under FGSM, {pgd:.1f} % under PGD",
        fgsm=fgsm,
        pgd=pgd,
    )


def _falls_to_zero(some: _Examined, budget: Budget) -> Check:
    """PGD whose steps grow with epsilon, up to a ball that holds every image."""
    everything = 1.0 if budget.norm == "l_inf" else float(some.x[0].numel()) ** 0.5
    radii = [budget.epsilon * factor for factor in (0.5, 1.0, 1.5, 2.0, 3.0)]
    radii = [radius for radius in radii if radius < everything] + [everything]
    steps = max(budget.num_steps, 40)
    curve = [
        some.accuracy(
            replace(budget, epsilon=radius, num_steps=steps, step_size=2.5 * radius / steps)
        )
        for radius in radii
    ]
    slack = percent(1, len(some.x))  # one image may go the other way
    falls = all(later <= earlier + slack for earlier, later in pairwise(curve))
    return _check(
        "accuracy falls to zero as epsilon grows",
        falls and curve[-1] <= max(1.0, slack),
        ", ".join(f"{radius:.3g}: {value:.1f} %" for radius, value in zip(radii, curve)),
        epsilon=radii,
        accuracy=curve,
    )


def _loss_rises(some: _Examined, budget: Budget) -> Check:
    steps = sorted({1, max(1, budget.num_steps // 4), budget.num_steps, 2 * budget.num_steps})
    by_steps = [some.loss(replace(budget, num_steps=number, restarts=1)) for number in steps]
    starts = [1, 3]
    by_starts = [some.loss(replace(budget, restarts=number)) for number in starts]
    rises = all(
        later >= earlier * 0.99
        for curve in (by_steps, by_starts)
        for earlier, later in pairwise(curve)
    )
    shown_steps = ", ".join(f"{n}: {loss:.3f}" for n, loss in zip(steps, by_steps))
    shown_starts = ", ".join(f"{n}: {loss:.3f}" for n, loss in zip(starts, by_starts))
    return _check(
        "loss rises with steps and starts",
        rises,
        f"steps {shown_steps}; starts {shown_starts}",
        steps=steps,
        loss_by_steps=by_steps,
        starts=starts,
        loss_by_starts=by_starts,
    )


def _gradients_there(some: _Examined, budget: Budget) -> Check:
    """At the images and at random points of the balls, where PGD begins."""
    zero, vanishing, entries = [], [], []

    def look(rows: Tensor) -> None:
        centre, label = some.x[rows], some.y[rows]
        start = random_starts(centre, budget.ball, some.seed, rows, 0)
        for points in (centre, start):
            gradient = loss_and_gradient(some.network, points, label, Kernels(frozen=True))[2]
            size = gradient.flatten(1).abs()
            zero.append(size.amax(1) == 0)
            vanishing.append(size.amax(1) < VANISHING)
            entries.append((size == 0).double().mean(1))

    with frozen(some.network):
        some.over_batches(look)
    shares = [100 * float(torch.cat(part).double().mean()) for part in (zero, vanishing, entries)]
    return _check(
        "input gradients are there",
        shares[1] <= 1.0,
        f"{shares[0]:.1f} % of the gradients are zero, {shares[1]:.1f} % are below "
        f"{VANISHING:g}; {shares[2]:.1f} % of all their entries are zero",
        zero_percent=shares[0],
        vanishing_percent=shares[1],
        zero_entries_percent=shares[2],
    )


def _black_box_not_stronger(some: _Examined, budget: Budget, robust: Tensor) -> Check:
    name = "the black box (Square) is not stronger than the white box"
    if importlib.util.find_spec("pyautoattack") is None:
        return Check(name, "SKIP", "needs: pip install pyautoattack==0.2.0")
    square = []
    for rows in torch.arange(len(some.x)).split(CHUNK):
        found = run_library(
            some.network,
            some.x[rows],
            some.y[rows],
            "Square",
            budget.ball,
            seed=some.seed + int(rows[0]) // CHUNK,
            queries=QUERIES,
        )
        square.append(found.robust)
    square = torch.cat(square)
    only = int((robust & ~square).sum())
    black, white = percent(int(square.sum()), len(square)), percent(int(robust.sum()), len(robust))
    return _check(
        name,
        black >= white and percent(only, len(square)) <= 1.0,
        f"accuracy {black:.1f} % under Square ({QUERIES} queries), {white:.1f} % under PGD; "
        f"{only} of {len(square)} images fall to Square alone",
        square=black,
        pgd=white,
        only_square=only,
    )


def _transfer_not_stronger(
    some: _Examined, budget: Budget, robust: Tensor, undefended: nn.Module | None
) -> Check:
    name = "transferred images are not stronger than the white box"
    if undefended is None:
        return Check(name, "SKIP", "needs --transfer_from, the checkpoint of another network")
    moved = some.attacked(budget, network=undefended, early_stop=False)[2]
    wrong = some.over_batches(lambda rows: misclassified(some.network, moved[rows], some.y[rows]))
    right = percent(int((~torch.cat(wrong)).sum()), len(some.x))
    white = percent(int(robust.sum()), len(robust))
    return _check(
        name,
        right >= white,
        f"accuracy {right:.1f} % on the other network's images, {white:.1f} % under PGD",
        transfer=right,
        pgd=white,
    )


@torch.no_grad()
def _modes_agree(every: _Examined) -> Check:
    """Whether BatchNorm's running statistics and those of a batch give the same network."""
    name = "train and eval mode agree"
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if not any(isinstance(module, norms) for module in every.network.modules()):
        return Check(name, "PASS", "the network has no BatchNorm")

    def right(rows: Tensor) -> Tensor:
        return logits_of(every.network, every.x[rows]).argmax(1) == every.y[rows]

    def accuracy() -> float:
        return percent(int(torch.cat(every.over_batches(right)).sum()), len(every.x))

    running = accuracy()
    with normalization(every.network, batch_statistics=True):
        batch = accuracy()
    return _check(
        name,
        abs(running - batch) <= 5.0,
        f"accuracy {running:.1f} % with running statistics, {batch:.1f} % with those of "
        f"batches of {min(every.batch, len(every.x))}",
        running=running,
        batch=batch,
    )

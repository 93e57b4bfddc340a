"""Is it real? Signs of gradient masking: a network that hides its gradients is not robust.

The list follows Athalye et al. 2018, "Obfuscated Gradients Give a False Sense of Security" (arXiv
1802.00420), section 3.1, and Carlini et al. 2019, "On Evaluating Adversarial Robustness" (arXiv
1902.06705). A warning is a reason to look closer, not a proof; nor is a pass.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.lfr.accel import Accelerated
from utils.lfr.batch_norm import has_batch_norm, mode, normalization

from .budgets import Budget, percent
from .gradient import Attacked, gradients, losses_of, misclassified, pgd, random_starts
from .library import require_library, run_library

EXAMPLES = 100  # images that the attacks of the checks look at, as many as Square takes at once
QUERIES = 1000  # of Square; its full 5,000 take longer than all other checks together
VANISHING = 1e-12  # largest entry of a gradient below which sign steps follow rounding


class Check(NamedTuple):
    """One question, its verdict (PASS, WARN or SKIP) and the figures it rests on."""

    name: str
    verdict: str
    text: str
    figures: dict[str, Any]

    def __str__(self) -> str:
        return f"  {self.verdict}  {self.name}: {self.text}"


def _check(name: str, passed: bool | None, text: str, **figures: Any) -> Check:
    def words(value: Any) -> str:
        return ", ".join(map(words, value)) if isinstance(value, list) else f"{value:.4g}"

    shown = "; ".join(f"{key.replace('_', ' ')} {words(figures[key])}" for key in figures)
    verdict = {True: "PASS", False: "WARN", None: "SKIP"}[passed]
    return Check(name, verdict, f"{text}: {shown}" if shown else text, figures)


def _share(right: Tensor) -> float:
    return percent(int(right.sum()), right.numel())


def masking_checks(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: Budget,
    *,
    seed: int = 0,
    batch: int = 200,
    transfer_from: nn.Module | None = None,
) -> Iterator[Check]:
    """Yield the seven checks one by one.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits.
        x, y: images and labels [N]; attacks take the first :data:`EXAMPLES`, the BN gap all.
        budget: PGD's.
        transfer_from: a network whose adversarial images are tried on this one.
    """
    every, x, y = (x, y), x[:EXAMPLES], y[:EXAMPLES]
    index, ball, one_image = torch.arange(len(x)), budget.ball, percent(1, len(x))

    def attack(attacked: nn.Module = network, early_stop: bool = True, **changes: Any) -> Attacked:
        own, options = replace(budget, **changes), {"seed": seed, "early_stop": early_stop}
        parts = [pgd(attacked, x[i], y[i], own, index=i, **options) for i in index.split(batch)]
        return Attacked(*map(torch.cat, zip(*parts)))

    def loss(**changes: int) -> float:
        return float(attack(early_stop=False, **changes).loss.mean())

    # One image may go the other way by chance.
    robust = attack().robust
    white_box = _share(robust)
    fgsm = _share(attack(num_steps=1, step_size=budget.epsilon, random_start=False).robust)
    name, passed = "FGSM is not stronger than PGD", fgsm >= white_box - one_image
    yield _check(name, passed, "accuracy in %", fgsm=fgsm, pgd=white_box)

    # PGD whose steps grow with epsilon, up to a ball that holds every image.
    everything = 1.0 if budget.norm == "l_inf" else float(x[0].numel()) ** 0.5
    radii = [budget.epsilon * factor for factor in (0.5, 1.0, 1.5, 2.0, 3.0)]
    radii = [radius for radius in radii if radius < everything] + [everything]
    steps, curve = max(budget.num_steps, 40), []
    for radius in radii:
        found = attack(epsilon=radius, num_steps=steps, step_size=2.5 * radius / steps)
        curve.append(_share(found.robust))
    falls = all(later <= earlier + one_image for earlier, later in pairwise(curve))
    name = "accuracy falls to zero as epsilon grows"
    falls &= curve[-1] <= max(1, one_image)
    yield _check(name, falls, "accuracy in %", epsilon=radii, accuracy=curve)

    steps = sorted({1, max(1, budget.num_steps // 4), budget.num_steps, 2 * budget.num_steps})
    by_steps = [loss(num_steps=n, restarts=1) for n in steps]
    by_starts = [loss(restarts=n) for n in (1, 3)]
    rises = all(b >= a * 0.99 for a, b in (*pairwise(by_steps), *pairwise(by_starts)))
    figures = {"steps": steps, "loss_by_steps": by_steps}
    figures |= {"starts": [1, 3], "loss_by_starts": by_starts}
    yield _check("loss rises with steps and starts", rises, "cross-entropy", **figures)

    # At the images and at random points of the balls, where PGD begins.
    points = torch.cat((x, random_starts(x, ball, seed, index, 0)))
    batches = zip(points.split(batch), y.repeat(2).split(batch))
    with mode(network, training=False), Accelerated(frozen=True):
        size = torch.cat([gradients(network, *part, losses_of)[1] for part in batches])
    size = size.flatten(1).abs()
    figures = {"zero_percent": _share(size.amax(1) == 0)}
    figures["vanishing_percent"] = vanishing = _share(size.amax(1) < VANISHING)
    figures["zero_entries_percent"] = _share(size == 0)
    text = f"gradients that are zero or below {VANISHING:g}"
    yield _check("input gradients are there", vanishing <= 1, text, **figures)

    name = "the black box (Square) is not stronger than the white box"
    try:
        require_library(ball.norm, x.shape)
    except UserError as error:
        yield _check(name, None, str(error))
    else:
        square = run_library(network, x, y, "Square", ball, seed=seed, queries=QUERIES).robust
        only, black = int((robust & ~square).sum()), _share(square)
        text = f"accuracy in %, images that fall to Square ({QUERIES} queries) alone"
        passed = black >= white_box and percent(only, len(x)) <= 1
        yield _check(name, passed, text, square=black, pgd=white_box, only_square=only)

    name = "transferred images are not stronger than the white box"
    if transfer_from is None:
        yield _check(name, None, "needs --transfer_from, the checkpoint of another network")
    else:
        moved = attack(transfer_from, early_stop=False).x_adv
        right = _share(~misclassified(network, moved, y))
        yield _check(name, right >= white_box, "accuracy in %", transfer=right, pgd=white_box)

    yield _bn_gap(network, *every, batch)


@torch.no_grad()
def _bn_gap(network: nn.Module, x: Tensor, y: Tensor, batch: int) -> Check:
    """Whether running statistics and those of a batch give the same network."""
    name = "train and eval mode agree"
    if not has_batch_norm(network):
        return _check(name, True, "the network has no BatchNorm")

    parts = torch.arange(len(x)).tensor_split(max(1, len(x) // batch))  # none of a single image

    def accuracy() -> float:
        return _share(torch.cat([network(x[i]).argmax(1) == y[i] for i in parts]))

    running = accuracy()
    with normalization(network, batch_statistics=True):
        by_batch = accuracy()
    text = f"accuracy in % by running statistics and by those of batches of {len(parts[0])}"
    return _check(name, abs(running - by_batch) <= 5, text, running=running, batch=by_batch)

"""LFR and the defenses it is compared with, as losses of one batch with one signature.

All searches run on :func:`utils.lfr.ascend`. The comparisons are deliberately plain:

- ``igr``: input-gradient regularisation, LFR measured at the image itself (0 steps); Ross &
  Doshi-Velez, AAAI 2018, with the dual norm.
- ``at``: adversarial training, cross-entropy at the points PGD finds; Madry et al., ICLR 2018.
- ``trades``: cross-entropy + beta * KL(clean || perturbed); Zhang et al., ICML 2019.
- ``none``: cross-entropy.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.lfr import Ball, LossTerms, ascend, initial_point, input_gradient, lfr_loss
from utils.lfr.accel import Accelerated
from utils.lfr.batch_norm import mode
from utils.lfr.loss import full_precision

DEFENSES = ("lfr", "igr", "at", "trades", "none")


@dataclass(frozen=True)
class Defense:
    """A defense, one of :data:`DEFENSES`, and its settings: the flags of the training scripts."""

    name: str
    ball: Ball
    step_size: float
    num_steps: int
    search: str = "paper"
    bn_mode: str = "shared"
    beta: float = 6.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Defense":
        """The one that the flags describe."""
        names = ("step_size", "num_steps", "search", "bn_mode", "beta")
        options = {name: getattr(args, name) for name in names}
        return cls(args.defense, Ball(args.norm, args.epsilon), **options)

    def ascend(self, x: Tensor, gradient: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """:func:`utils.lfr.ascend` with these settings."""
        steps = {"step_size": self.step_size, "num_steps": self.num_steps}
        return ascend(x, gradient, self.ball, start=start, **steps)


class DefenseLoss(nn.Module):
    """A network with its training loss: what DistributedDataParallel wraps.

    The loss takes several passes of the network and differentiates inside, so it is the loss, not
    the network, whose one forward and one backward the processes have to agree on.
    """

    def __init__(self, network: nn.Module, defense: Defense) -> None:
        super().__init__()
        self.network, self.defense = network, defense

    def forward(self, x: Tensor, y: Tensor, noise: Tensor, lambada: float) -> LossTerms:
        """The loss and its parts for images x [N, C, H, W] in [0, 1] with labels y [N].

        ``noise``: standard normal numbers like x, for the start of the search.
        """
        d, network = self.defense, self.network
        if d.name in ("lfr", "igr"):
            start = initial_point(x, d.ball, d.search, noise)
            steps = {"step_size": d.step_size, "num_steps": d.num_steps if d.name == "lfr" else 0}
            options = {"search": d.search, "bn_mode": d.bn_mode, "start": start, **steps}
            return lfr_loss(network, x, y, d.ball, lambada=lambada, **options)
        x_adv = x
        if d.name == "at":
            uniform = torch.erf(noise / 2**0.5)  # in [-1, 1]
            x_adv = pgd_point(network, x, y, d, d.ball.project(x + d.ball.epsilon * uniform, x))
        logits = full_precision(network(x_adv))
        natural = F.cross_entropy(logits, y)
        if d.name != "trades":
            return LossTerms(natural, natural, torch.zeros_like(natural), logits.detach(), x_adv)
        x_adv = divergent_point(network, x, d, initial_point(x, d.ball, "paper", noise))
        divergence = _divergence(network(x_adv), logits, "batchmean")
        return LossTerms(natural + d.beta * divergence, natural, divergence, logits.detach(), x_adv)


def pgd_point(network: nn.Module, x: Tensor, y: Tensor, defense: Defense, start: Tensor) -> Tensor:
    """The point that PGD finds from ``start``, network in eval mode. [N, C, H, W]."""
    with mode(network, training=False), Accelerated(frozen=True):
        return defense.ascend(x, lambda x_adv: input_gradient(network, x_adv, y), start)


def divergent_point(network: nn.Module, x: Tensor, defense: Defense, start: Tensor) -> Tensor:
    """The point of the ball whose prediction differs most (KL) from that at x. [N, C, H, W]."""
    with mode(network, training=False), Accelerated(frozen=True):
        with torch.no_grad():
            clean = network(x)

        def gradient(x_adv: Tensor) -> Tensor:
            x_adv = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(_divergence(network(x_adv), clean, "sum"), x_adv)[0]

        return defense.ascend(x, gradient, start)


def _divergence(logits: Tensor, clean_logits: Tensor, reduction: str) -> Tensor:
    """KL(clean || perturbed) of two batches of logits."""
    log_q, log_p = (full_precision(z).log_softmax(1) for z in (logits, clean_logits))
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)

"""LFR and the defenses it is compared with, as losses of one batch with one signature.

All searches run on :func:`utils.ball.ascend`. The comparisons are deliberately plain:

- ``igr``: input-gradient regularisation, LFR measured at the image itself (0 steps); Ross &
  Doshi-Velez, AAAI 2018, with the dual norm.
- ``at``: adversarial training, cross-entropy at the points PGD finds; Madry et al., ICLR 2018.
- ``trades``: cross-entropy + beta * KL(clean || perturbed); Zhang et al., ICML 2019.
- ``none``: cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.ball import Ball, ascend
from utils.batch_norm import mode
from utils.lfr import LFRTerms, first_point, full_precision, input_gradient, lfr_loss
from utils.second_order import Kernels

DEFENSES = ("lfr", "igr", "at", "trades", "none")


@dataclass(frozen=True)
class Defense:
    """A defense and its settings; the fields are the flags of the training scripts.

    Raises:
        ValueError: unknown name.
    """

    name: str
    ball: Ball
    step_size: float
    num_steps: int
    search: str = "paper"
    bn_mode: str = "shared"
    beta: float = 6.0

    def __post_init__(self) -> None:
        if self.name not in DEFENSES:
            raise ValueError(f"defense is {self.name!r}, allowed are {', '.join(DEFENSES)}")


class DefenseLoss(nn.Module):
    """A network with its training loss: what DistributedDataParallel wraps.

    The loss takes several passes of the network and differentiates inside, so it is the loss, not
    the network, whose one forward and one backward the processes have to agree on.
    """

    def __init__(self, network: nn.Module, defense: Defense) -> None:
        super().__init__()
        self.network, self.defense = network, defense

    def forward(self, x: Tensor, y: Tensor, noise: Tensor, lambada: float) -> LFRTerms:
        """The loss and its parts for one batch.

        Args:
            x: images [N, C, H, W] in [0, 1].
            y: labels [N].
            noise: standard normal numbers, [N, C, H, W], for the start of the search.
            lambada: the flatness's weight at this moment.
        """
        d, network = self.defense, self.network
        if d.name in ("lfr", "igr"):
            return lfr_loss(
                network,
                x,
                y,
                d.ball,
                step_size=d.step_size,
                num_steps=0 if d.name == "igr" else d.num_steps,
                lambada=lambada,
                search=d.search,
                bn_mode=d.bn_mode,
                start=first_point(x, d.ball, d.search, noise),
            )
        if d.name == "at":
            uniform = torch.erf(noise / 2**0.5)  # in [-1, 1]
            moved = adversary(network, x, y, d, d.ball.project(x + d.ball.epsilon * uniform, x))
            logits = network(moved)
            loss = F.cross_entropy(full_precision(logits), y)
            return LFRTerms(loss, loss.detach(), torch.zeros_like(loss), logits.detach(), moved)
        logits = network(x)
        natural_loss = F.cross_entropy(full_precision(logits), y)
        if d.name == "none":
            zero = torch.zeros_like(natural_loss)
            return LFRTerms(natural_loss, natural_loss.detach(), zero, logits.detach(), x)
        moved = divergent(network, x, d, first_point(x, d.ball, "paper", noise))
        log_p = full_precision(logits).log_softmax(1)
        log_q = full_precision(network(moved)).log_softmax(1)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        total = natural_loss + d.beta * divergence
        return LFRTerms(total, natural_loss.detach(), divergence.detach(), logits.detach(), moved)


def adversary(network: nn.Module, x: Tensor, y: Tensor, defense: Defense, start: Tensor) -> Tensor:
    """The point PGD finds from ``start``, network in eval mode. [N, C, H, W]."""
    with mode(network, training=False):
        kernels = Kernels(frozen=True)
        return ascend(
            x,
            lambda moved: input_gradient(network, moved, y, kernels),
            defense.ball,
            step_size=defense.step_size,
            num_steps=defense.num_steps,
            start=start,
        )


def divergent(network: nn.Module, x: Tensor, defense: Defense, start: Tensor) -> Tensor:
    """The point of the ball whose prediction differs most (KL) from that at x. [N, C, H, W]."""
    with mode(network, training=False):
        with torch.no_grad():
            log_p = full_precision(network(x)).log_softmax(1)

        def gradient(moved: Tensor) -> Tensor:
            moved = moved.detach().requires_grad_()
            kernels = Kernels(frozen=True)
            with torch.enable_grad(), kernels:
                log_q = full_precision(network(moved)).log_softmax(1)
                divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            return torch.autograd.grad(divergence, moved)[0]

        return ascend(
            x,
            gradient,
            defense.ball,
            step_size=defense.step_size,
            num_steps=defense.num_steps,
            start=start,
        )

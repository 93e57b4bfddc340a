"""AutoAttack and Square, from the package pyautoattack, an optional extra.

- AutoAttack: Croce & Hein 2020, arXiv 2003.01690: APGD-CE, targeted APGD, targeted FAB, Square,
  each on what the ones before it left standing.
- Square: Andriushchenko et al. 2020, arXiv 1912.00049: black box, 5,000 queries.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from utils.attacks import SQUARE_QUERIES, filled_up, frozen, misclassified, steady_logits, verify
from utils.ball import Ball
from utils.errors import UserError
from utils.second_order import Kernels

CHUNK = 100  # images attacked together; part of the result, since they share random numbers
STAGES = {"AutoAttack": ("apgd-ce", "apgd-t", "fab-t", "square"), "Square": ("square",)}
_NORMS = {"l_inf": "Linf", "l_2": "L2"}


def library_version() -> str:
    """Name and version of the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--attack_method AutoAttack and Square need a package that is not installed; install "
            "it with: pip install pyautoattack==0.2.0"
        ) from None


@dataclass(frozen=True)
class Verdicts:
    """What the stages did to N images.

    Attributes:
        robust: [N] bool.
        broken_by: [N], the number of the stage in :data:`STAGES`, -1 where none was needed or none
            was enough.
        warnings: what the package thought worth saying.
    """

    robust: Tensor
    broken_by: Tensor
    warnings: tuple[str, ...]


class _Layouts(Function):
    """Images to the layout that convolutions like; gradients to the one the package expects."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class _Notes(logging.Handler):
    """Keeps the package's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        if line not in self.lines:
            self.lines.append(line)


@contextmanager
def _contained() -> Iterator[_Notes]:
    """Keep to itself what the package does to the process: global seeds, logging, settrace."""
    logger, notes, trace = logging.getLogger("auto-attack"), _Notes(), sys.gettrace()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(notes)
    try:
        with torch.random.fork_rng():
            yield notes
    finally:
        logger.removeHandler(notes)
        logger.propagate = propagate
        sys.settrace(trace)


def run_library(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    ball: Ball,
    *,
    seed: int,
    queries: int = SQUARE_QUERIES,
    on_stage: Callable[[str, int], None] = lambda stage, standing: None,
) -> Verdicts:
    """AutoAttack (standard version) or Square on one chunk of images.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits; left as it was.
        x, y: images and labels [N]; those that are misclassified are not attacked.
        name: a key of :data:`STAGES`.
        ball: norm and epsilon.
        seed: of this chunk. The verdicts are a function of it and of the chunk.
        queries: of Square, per image.
        on_stage: called before each stage with its name and the number of images standing.

    Raises:
        UserError: the package is missing.
        BudgetViolation: it returned an image that the budget does not allow.
    """
    library_version()
    from pyautoattack import AutoAttack

    kernels = Kernels(frozen=True)

    def logits(images: Tensor) -> Tensor:
        with kernels:
            return steady_logits(network, _Layouts.apply(filled_up(images)))[: len(images)]

    with frozen(network), _contained() as notes:
        robust = ~misclassified(network, x, y)
        broken_by = torch.full((len(x),), -1, dtype=torch.long, device=x.device)
        with torch.no_grad():
            classes = logits(x[:1]).shape[1] if len(x) else 0
        for number, stage in enumerate(STAGES[name]):
            standing = robust.nonzero()[:, 0]
            if not len(standing) or ball.epsilon == 0:
                break
            if stage == "apgd-t" and classes < 4:
                notes.lines.append(f"apgd-t left out: it needs 4 classes, there are {classes}")
                continue
            on_stage(stage, len(standing))
            centre, label = x[standing].contiguous(), y[standing]
            library = AutoAttack(
                logits, norm=_NORMS[ball.norm], eps=ball.epsilon, seed=seed, device=x.device
            )
            library.attacks_to_run = [stage]
            library.apgd_targeted.n_target_classes = min(9, classes - 1)
            library.fab.n_target_classes = min(9, classes - 1)
            library.square.n_queries = queries
            moved, _ = library.run_standard_evaluation(centre, label, batch_size=len(centre))
            verify(moved, centre, ball)
            broken = standing[misclassified(network, moved, label)]
            robust[broken] = False
            broken_by[broken] = number
    return Verdicts(robust, broken_by, tuple(notes.lines))

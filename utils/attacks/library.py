"""AutoAttack and Square, from the package pyautoattack, an optional extra.

- AutoAttack: Croce & Hein 2020, arXiv 2003.01690: APGD-CE, targeted APGD, targeted FAB, Square,
  each on the images that are robust to the ones before it.
- Square: Andriushchenko et al. 2020, arXiv 1912.00049: black box, 5,000 queries.
"""

import copy
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from utils.errors import UserError
from utils.lfr import Ball
from utils.lfr.accel import Accelerated

from .budgets import SQUARE_QUERIES
from .gradient import filled_up, misclassified, steady_logits, verify

CHUNK = 100  # images attacked together; part of the result, since they share random numbers
STAGES = {"AutoAttack": ("apgd-ce", "apgd-t", "fab-t", "square"), "Square": ("square",)}


def require_library(norm: str, image_shape: torch.Size) -> str:
    """Name and version of the package; UserError if it is missing or cannot do the job."""
    if norm == "l_2" and image_shape[-1] != image_shape[-2]:
        size = "x".join(map(str, image_shape[-2:]))
        raise UserError(f"AutoAttack and Square take square images only under l_2, not {size}")
    try:
        return f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    except importlib.metadata.PackageNotFoundError:
        line = "AutoAttack and Square need a package that is not installed; install it with: "
        raise UserError(f"--attack_method {line}pip install pyautoattack==0.2.0") from None


class Verdicts(NamedTuple):
    """What the stages did to N images."""

    x_adv: Tensor  # [N, C, H, W]; the image itself where it is robust
    robust: Tensor  # [N] bool
    fell_to: Tensor  # [N], the number of the stage in STAGES, -1 for none
    warnings: list[str]  # the package's


class _Layouts(Function):
    """Images to the layout that convolutions like; gradients to the one the package expects."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


@contextmanager
def _contained() -> Iterator[list[str]]:
    """Undo what the package does to the process (seeds, settrace); gives the list of warnings."""
    logger, warnings, trace = logging.getLogger("auto-attack"), [], sys.gettrace()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(" ".join(record.getMessage().split()))
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with torch.random.fork_rng():
            yield warnings
    finally:
        logger.removeHandler(handler)
        sys.settrace(trace)


def run_library(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    ball: Ball,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    queries: int = SQUARE_QUERIES,
    on_stage: Callable[[str, int], None] = lambda stage, count: None,
) -> Verdicts:
    """AutoAttack (standard version) or Square on one chunk of images; see :func:`require_library`.

    Images [N] that are misclassified are not attacked. The verdicts are a function of the chunk,
    ``seed`` and the chunk's ``index`` [N] in the dataset. ``queries`` are Square's, per image;
    ``on_stage`` is told each stage and the number of images that it attacks.
    """
    from pyautoattack import AutoAttack

    network = copy.deepcopy(network).eval().requires_grad_(False)  # FAB calls backward()

    def logits(images: Tensor) -> Tensor:
        return steady_logits(network, _Layouts.apply(filled_up(images)))[: len(images)]

    seed += 0 if index is None else int(index[0]) // CHUNK
    x_adv, robust, fell_to = x.clone(), ~misclassified(network, x, y), torch.full_like(y, -1)
    with torch.no_grad():
        classes = network(x[:1]).shape[1]
    with _contained() as warnings:
        for number, stage in enumerate(STAGES[name]):
            rows = robust.nonzero()[:, 0]
            if not len(rows) or ball.epsilon == 0:
                break
            if stage == "apgd-t" and classes < 4:
                warnings.append(f"apgd-t left out: it needs 4 classes, there are {classes}")
                continue
            on_stage(stage, len(rows))
            norm = {"l_inf": "Linf", "l_2": "L2"}[ball.norm]
            library = AutoAttack(logits, norm=norm, eps=ball.epsilon, seed=seed, device=x.device)
            library.attacks_to_run = [stage]
            for attack in (library.apgd_targeted, library.fab):
                attack.n_target_classes = min(9, classes - 1)
            library.square.n_queries = queries
            centre = x[rows].contiguous()
            with Accelerated(frozen=True):
                moved, _ = library.run_standard_evaluation(centre, y[rows], batch_size=len(rows))
            verify(moved, centre, ball)
            fell = misclassified(network, moved, y[rows])
            rows = rows[fell]
            x_adv[rows], robust[rows], fell_to[rows] = moved[fell], False, number
    return Verdicts(x_adv, robust, fell_to, list(dict.fromkeys(warnings)))

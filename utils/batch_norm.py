"""Which statistics BatchNorm uses in which part of LFR's loss: why the original collapsed.

LFR looks at the network three times a step: at the clean batch (natural loss), in the search for
the sharpest points, and at those points (penalty). BatchNorm makes three different networks of one
set of weights, depending on the statistics it normalises by:

| bn_mode | natural loss    | search      | penalty         | running statistics see |
| ------- | --------------- | ----------- | --------------- | ---------------------- |
| shared  | the clean batch | clean batch | clean batch     | the clean batch, once  |
| batch   | the clean batch | own batch   | own batch       | the clean batch, once  |
| running | running         | running     | running         | the clean batch, once  |
| mixed   | the clean batch | running     | perturbed batch | clean, perturbed and clean again |

``mixed`` is the original's, whose search comes first, by the running statistics that the batch
before left. There the natural loss and the flatness are measured on two networks, and training can
make them differ in place of becoming flat: see `docs/failure_case.md`.
``shared`` measures everything on one and the same network: the statistics of the clean batch are
computed once, and the search and the penalty normalise by those numbers, through which the
penalty's gradient flows back too. A sample's gradient then depends on that sample alone, and
BatchNorm folds into the convolutions. Networks without BatchNorm do not care.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.second_order import Kernels, Statistics

BN_MODES = ("shared", "batch", "running", "mixed")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The network in train or eval mode inside, every module as it was outside."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@contextmanager
def normalization(
    model: nn.Module, *, batch_statistics: bool, update: bool = False
) -> Iterator[None]:
    """BatchNorm layers use batch or running statistics inside; dropout and all else stay.

    Args:
        batch_statistics: normalise by the statistics of the batch at hand.
        update: let the running statistics move towards those of the batch.
    """
    before = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            before.append((module, module.training, module.track_running_stats))
            module.training = batch_statistics
            if batch_statistics and not update:
                module.track_running_stats = False
    try:
        yield
    finally:
        for module, was_training, tracked in before:
            module.training, module.track_running_stats = was_training, tracked


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the network depends on which statistics it normalises by."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class Passes:
    """The passes of one training step, each a context that yields the kernels to compute with.

    Args:
        model: the network; in eval mode every pass uses the running statistics.
        bn_mode: one of :data:`BN_MODES`.

    Raises:
        ValueError: unknown bn_mode.
    """

    def __init__(self, model: nn.Module, bn_mode: str = "shared") -> None:
        if bn_mode not in BN_MODES:
            raise ValueError(f"bn_mode is {bn_mode!r}, allowed are {', '.join(BN_MODES)}")
        self.model = model
        self.bn_mode = bn_mode if model.training else "running"
        self._statistics: Statistics = {}

    @contextmanager
    def natural(self) -> Iterator[Kernels]:
        """The clean batch."""
        record = self._statistics if self.bn_mode == "shared" else None
        on_batch = self.bn_mode != "running"
        with normalization(self.model, batch_statistics=on_batch, update=True):
            yield Kernels(record=record)

    @contextmanager
    def search(self) -> Iterator[Kernels]:
        """The ascent to the sharpest points; the weights are constants, dropout is off."""
        replay = None
        if self.bn_mode == "shared":
            replay = {key: (m.detach(), s.detach()) for key, (m, s) in self._statistics.items()}
        on_batch = self.bn_mode == "batch"
        with mode(self.model, False), normalization(self.model, batch_statistics=on_batch):
            yield Kernels(replay=replay, frozen=True)

    @contextmanager
    def penalty(self) -> Iterator[Kernels]:
        """The gradient norm at the sharpest points."""
        if self.bn_mode == "shared":
            with normalization(self.model, batch_statistics=False):
                yield Kernels(replay=self._statistics)
        else:
            on_batch = self.bn_mode != "running"
            update = self.bn_mode == "mixed"
            with normalization(self.model, batch_statistics=on_batch, update=update):
                yield Kernels()

    @torch.no_grad()
    def finish(self, x: Tensor) -> None:
        """The updates of the running statistics that are not a by-product of the passes above."""
        again = self.bn_mode in ("running", "mixed")
        if again and self.model.training and has_batch_norm(self.model):
            with normalization(self.model, batch_statistics=True, update=True):
                self.model(x)

"""Which statistics BatchNorm uses in which part of LFR's loss: why the original collapsed.

LFR looks at the network three times a step: at the clean batch (natural loss), in the inner
maximisation (search), and at the points found (penalty). BatchNorm makes three different networks
of one set of weights, depending on the statistics it normalises by:

| bn_mode | natural loss    | search      | penalty         | running statistics see |
| ------- | --------------- | ----------- | --------------- | ---------------------- |
| shared  | the clean batch | clean batch | clean batch     | the clean batch, once  |
| batch   | the clean batch | own batch   | own batch       | the clean batch, once  |
| running | running         | running     | running         | the clean batch, once  |
| mixed   | the clean batch | running     | perturbed batch | clean, perturbed and clean again |

``mixed`` is the original's, whose search comes first, by the running statistics that the batch
before left. Natural loss and flatness are measured on two networks there, and training can make
them differ in place of becoming flat: see `docs/failure_case.md`.
``shared`` measures everything on one network: search and penalty normalise by the statistics of the
clean batch, through which the penalty's gradient flows back too. A sample's gradient then depends
on that sample alone, and BatchNorm folds into the convolutions.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .accel import Accelerated, Statistics

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
    """BatchNorm layers use the batch's or running statistics inside; dropout and all else stay.

    ``update`` lets the running statistics move towards those of the batch.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.training = batch_statistics
        layer.track_running_stats &= update or not batch_statistics
    try:
        yield
    finally:
        for layer, flags in zip(layers, before):
            layer.training, layer.track_running_stats = flags


def has_batch_norm(model: nn.Module) -> bool:
    """Whether it matters to the network which statistics it normalises by."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


class StepPolicy:
    """The three looks of a training step at the network, each a context to compute in.

    In eval mode all of them use the running statistics. Raises ValueError for an unknown bn_mode.
    """

    def __init__(self, model: nn.Module, bn_mode: str = "shared") -> None:
        if bn_mode not in BN_MODES:
            raise ValueError(f"bn_mode is {bn_mode!r}, allowed are {', '.join(BN_MODES)}")
        self.model = model
        self.bn_mode = bn_mode if model.training else "running"
        layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
        # A user's frozen layers, in eval mode while the network trains, stay as they are.
        self._trained = nn.ModuleList(layer for layer in layers if layer.training)
        self._statistics: Statistics | None = {} if self.bn_mode == "shared" else None

    @contextmanager
    def _look(self, on_batch: bool, update: bool = False, **options: Any) -> Iterator[None]:
        normalized = normalization(self._trained, batch_statistics=on_batch, update=update)
        with normalized, Accelerated(**options):
            yield

    def natural(self) -> AbstractContextManager[None]:
        """The clean batch."""
        return self._look(self.bn_mode != "running", update=True, record=self._statistics)

    @contextmanager
    def search(self) -> Iterator[None]:
        """The inner maximisation; the weights are constants, dropout is off."""
        look = self._look(self.bn_mode == "batch", replay=self._statistics, frozen=True)
        with mode(self.model, training=False), look:
            yield

    def penalty(self) -> AbstractContextManager[None]:
        """The gradient norm at x_adv."""
        on_batch, update = self.bn_mode in ("batch", "mixed"), self.bn_mode == "mixed"
        return self._look(on_batch, update, replay=self._statistics)

    @torch.no_grad()
    def finish(self, x: Tensor) -> None:
        """The update of the running statistics that is no by-product of the looks above."""
        again = self.bn_mode in ("running", "mixed") and self.model.training
        if again and has_batch_norm(self._trained):
            with normalization(self._trained, batch_statistics=True, update=True):
                self.model(x)

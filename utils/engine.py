"""The loops: one epoch of training, and what is measured after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.attacks import pgd
from utils.ball import Ball
from utils.batch_norm import has_batch_norm, mode, normalization
from utils.data import Batches, ImageSet
from utils.errors import UserError
from utils.lfr import LFRTerms, flatness
from utils.runtime import World
from utils.second_order import Kernels


@dataclass
class Progress:
    """How far a run is; saved in every checkpoint, so that a resumed run counts on from there.

    Attributes:
        epoch: epochs completed.
        batch: batches completed of the epoch that is running.
        step: training steps over all epochs.
        seconds: time spent in the running epoch by earlier processes.
        sums: of the running epoch's figures, weighted by samples.
        best: robust accuracy (percent) of the best epoch so far.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    best: float = -1.0


class Interrupted(Exception):
    """The run was asked to stop; its state is on disk."""


def train_one_epoch(
    loss_of: Callable[[Tensor, Tensor, Tensor, float], LFRTerms],
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    world: World,
    *,
    rate: Callable[[float], float],
    lambada: Callable[[float], float],
    max_batches: int,
    amp: bool = False,
    after_step: Callable[[dict[str, float]], None] = lambda values: None,
) -> dict[str, float]:
    """Train from ``progress.batch`` to the end of the epoch.

    Args:
        loss_of: (images, labels, noise, lambada) -> the terms of the loss.
        batches: the training set, set to this epoch.
        progress: counted on in place.
        rate, lambada: learning rate and lambada as functions of the time in epochs.
        max_batches: number of batches that make an epoch.
        amp: compute the loss under bfloat16 autocast.
        after_step: called after each step with its figures; the place for logs and checkpoints.

    Returns:
        Means over the epoch: ``loss``, ``natural_loss``, ``flatness`` (loss per unit of pixel
        intensity), ``accuracy`` (percent, of the batches as trained on); and ``seconds``.

    Raises:
        UserError: a loss that is not finite. The weights are those before that step.
    """
    started = time.monotonic() - progress.seconds
    bar = tqdm(
        batches.iterate(progress.batch),
        desc=f"epoch {progress.epoch + 1}",
        initial=progress.batch,
        total=max_batches,
        disable=None if world.is_main else True,
        leave=False,
    )
    with bar:
        for x, y, _ in bar:
            if progress.batch >= max_batches:
                break
            when = progress.epoch + progress.batch / max_batches
            for group in optimizer.param_groups:
                group["lr"] = rate(when)
            # Dropout draws from the global generator: seeding it per step makes resuming exact.
            torch.manual_seed(batches.generator(progress.batch, "dropout").initial_seed())
            noise = _noise(batches, progress.batch, x)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                terms = loss_of(x, y, noise, lambada(when))
            values = _figures(terms, y, world)
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"the loss is {values['loss']} in step {progress.batch + 1} of epoch "
                    f"{progress.epoch + 1} (natural loss {values['natural_loss']:g}, flatness "
                    f"{values['flatness']:g}); try a lower --lr or --lambada, or a --warmup"
                )
            # The processes' gradients are averaged, but their shares of a batch may differ by one.
            share = len(y) * world.size / batches.global_size(progress.batch)
            (terms.total * share).backward()
            optimizer.step()
            progress.batch += 1
            progress.step += 1
            progress.seconds = time.monotonic() - started
            samples = values.pop("samples")
            sums = progress.sums
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * samples
            sums["samples"] = sums.get("samples", 0.0) + samples
            bar.set_postfix(
                loss=f"{values['loss']:.3f}",
                flat=f"{values['flatness']:.3f}",
                acc=f"{values['accuracy']:.1f}%",
            )
            after_step(values)
    samples = progress.sums.pop("samples")
    means = {name: total / samples for name, total in progress.sums.items()}
    means["seconds"] = progress.seconds
    progress.epoch += 1
    progress.batch, progress.seconds, progress.sums = 0, 0.0, {}
    return means


def _noise(batches: Batches, batch: int, x: Tensor) -> Tensor:
    """Standard normal numbers for this process's share, cut from those of the global batch."""
    size = batches.global_size(batch)
    first = batches.rank * size // batches.world_size
    generator = batches.generator(batch, "noise")
    noise = torch.randn(size, *x.shape[1:], generator=generator)[first : first + len(x)]
    return noise.to(x.device).contiguous(memory_format=torch.channels_last)


def _figures(terms: LFRTerms, y: Tensor, world: World) -> dict[str, float]:
    """The step's figures over all processes; accuracy in percent."""
    correct = (terms.logits.argmax(1) == y).sum()
    parts = torch.stack(
        [terms.total.detach(), terms.natural_loss.detach(), terms.flatness.detach()]
    ).double()
    loss, natural_loss, flat = parts.tolist()
    n = len(y)
    sums = world.sum(loss * n, natural_loss * n, flat * n, float(correct), n)
    names = ("loss", "natural_loss", "flatness", "accuracy")
    values = {name: total / sums[-1] for name, total in zip(names, sums)}
    return {**values, "accuracy": 100 * values["accuracy"], "samples": sums[-1]}


@torch.no_grad()
def evaluate(network: nn.Module, data: ImageSet, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy and accuracy (percent) in eval mode: ``{"loss", "accuracy"}``."""
    loss, correct = 0.0, 0
    with mode(network, training=False):
        for x, y, _ in Batches(data, batch_size, shuffle=False, min_batch=1):
            logits = network(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(1) == y).sum())
    return {"loss": loss / len(data), "accuracy": 100 * correct / len(data)}


def probe(network: nn.Module, data: ImageSet, ball: Ball, num_steps: int, batch_size: int) -> float:
    """Robust accuracy (percent) under a short PGD from the images themselves, in eval mode.

    Cheap and repeatable, for comparing epochs; the evaluation scripts have the real attacks. The
    steps are 2.5 * epsilon / num_steps long, so that the ball's edge is within reach.
    """
    robust = 0
    step_size = 2.5 * ball.epsilon / max(1, num_steps)
    for x, y, _ in Batches(data, batch_size, shuffle=False, min_batch=1):
        options = {"step_size": step_size, "num_steps": num_steps, "random_start": False}
        robust += int(pgd(network, x, y, ball, **options).robust.sum())
    return 100 * robust / len(data)


def mode_gap(network: nn.Module, data: ImageSet, ball: Ball, batch_size: int) -> dict[str, float]:
    """The network by running statistics and by batch statistics, side by side.

    Returns:
        ``accuracy_eval``, ``accuracy_batch`` (percent), ``flatness_eval``, ``flatness_batch``
        (mean gradient norm at the images). Equal without BatchNorm, where one measure is both.
    """
    found: dict[str, float] = {}
    for name, on_batch in (("eval", False), ("batch", True)):
        if on_batch and not has_batch_norm(network):
            found["accuracy_batch"] = found["accuracy_eval"]
            found["flatness_batch"] = found["flatness_eval"]
            break
        correct, steepness = 0, 0.0
        with mode(network, training=False), normalization(network, batch_statistics=on_batch):
            for x, y, _ in Batches(data, batch_size, shuffle=False):
                with torch.no_grad():
                    correct += int((network(x).argmax(1) == y).sum())
                norms = flatness(network, x, y, ball, Kernels(frozen=True)).detach()
                steepness += float(norms.sum())
        found[f"accuracy_{name}"] = 100 * correct / len(data)
        found[f"flatness_{name}"] = steepness / len(data)
    return found

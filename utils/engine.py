"""The loops: one epoch of training, and what is measured after it."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.data import Batches, ImageSet
from utils.defenses import Defense, pgd_point
from utils.errors import UserError
from utils.lfr import Ball, LossTerms, flatness
from utils.lfr.batch_norm import has_batch_norm, mode, normalization
from utils.progress import Bar
from utils.runtime import Processes

LR_SCHEDULES = ("step", "cosine", "onecycle", "constant")
BN_GAP = ("accuracy_eval", "accuracy_batch", "flatness_eval", "flatness_batch")
Schedule = Callable[[float], float]  # of the learning rate, lambada, ...: by the time in epochs


@dataclass
class Progress:
    """How far a run is; saved in every checkpoint, so that a resumed run counts on from there."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches completed of the epoch that is running
    step: int = 0  # training steps over all epochs
    seconds: float = 0.0  # spent in the running epoch
    sums: dict[str, float] = field(default_factory=dict)  # its figures so far, times samples
    best: float = -1.0  # score of the best epoch: mean of clean and robust accuracy, percent


class Interrupted(Exception):
    """The run was asked to stop; its state is on disk."""


def train_one_epoch(
    loss_of: Callable[[Tensor, Tensor, Tensor, float], LossTerms], batches: Batches,
    optimizer: torch.optim.Optimizer, progress: Progress, processes: Processes, *,
    rate: Schedule, max_batches: int, amp: bool = False, clip_grad: float = 0.0,
    after_step: Callable[[dict[str, float]], None] = lambda values: None,
) -> dict[str, float]:  # fmt: skip
    """Train from batch ``progress.batch`` to the end of the epoch, and count ``progress`` on.

    Args:
        loss_of: (images, labels, noise, time in epochs) -> the terms of the loss.
        amp: compute the loss under bfloat16 autocast.
        clip_grad: largest L2 norm of the loss gradient by all weights; a longer one is scaled
            down to it. 0 = off.
        after_step: called after each step with its figures; the place for logs and checkpoints.

    Returns means over the epoch: ``loss``, ``natural``, ``penalty`` (loss per unit of pixel
    intensity), ``accuracy`` (percent, of the batches as trained on); and ``seconds``. UserError: a
    loss that is not finite. The weights are those before that step.
    """
    started = time.monotonic() - progress.seconds
    counts = {"initial": progress.batch, "total": max_batches, "shown": processes.is_main}
    rest = islice(batches.iterate(progress.batch), max(0, max_batches - progress.batch))
    weights = [each for group in optimizer.param_groups for each in group["params"]]
    with Bar(rest, desc=f"epoch {progress.epoch + 1}", **counts) as bar:
        for x, y, _ in bar:
            when = progress.epoch + progress.batch / max_batches
            for group in optimizer.param_groups:
                group["lr"] = rate(when)
            # Dropout draws from the global generator: seeding it per step makes resuming exact.
            torch.manual_seed(batches.generator(progress.batch, "dropout").initial_seed())
            noise = _noise(batches, progress.batch, x)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                terms = loss_of(x, y, noise, when)
            # The processes' gradients are averaged, but their shares of a batch may differ by one.
            share = len(y) * processes.size / batches.global_size(progress.batch)
            (terms.total * share).backward()
            values = _figures(terms, y, processes)  # waits for a GPU: not before it has work
            if not math.isfinite(values["loss"]):
                where = f"in step {progress.batch + 1} of epoch {progress.epoch + 1}"
                parts = ", ".join(f"{name} {values[name]:g}" for name in ("natural", "penalty"))
                advice = "try a lower --lr or --lambada, a --warmup or --clip_grad"
                raise UserError(f"the loss is {values['loss']} {where} ({parts}); {advice}")
            if clip_grad:
                nn.utils.clip_grad_norm_(weights, clip_grad)
            optimizer.step()
            progress.batch += 1
            progress.step += 1
            progress.seconds = time.monotonic() - started
            samples, sums = values.pop("samples"), progress.sums
            for name, value in {**values, "samples": 1.0}.items():
                sums[name] = sums.get(name, 0.0) + value * samples
            shown = {"loss": "loss", "penalty": "penalty", "acc %": "accuracy"}
            bar.set_postfix({key: f"{values[name]:.3f}" for key, name in shown.items()}, False)
            after_step(values)
    samples = progress.sums.pop("samples")
    means = {name: total / samples for name, total in progress.sums.items()}
    means["seconds"], progress.epoch = progress.seconds, progress.epoch + 1
    progress.batch, progress.seconds, progress.sums = 0, 0.0, {}
    return means


def _noise(batches: Batches, batch: int, x: Tensor) -> Tensor:
    """Standard normal numbers for this process's share, cut from those of the global batch."""
    shape = (batches.global_size(batch), *x.shape[1:])
    noise = torch.randn(shape, generator=batches.generator(batch, "noise"))[batches.share(batch)]
    return noise.to(x.device).contiguous(memory_format=torch.channels_last)


def _figures(terms: LossTerms, y: Tensor, processes: Processes) -> dict[str, float]:
    """The step's figures over all processes; accuracy in percent."""
    correct = (terms.logits.argmax(1) == y).sum().to(terms.total.dtype)
    parts = torch.stack([terms.total, terms.natural, terms.penalty, correct]).detach().tolist()
    sums = processes.sum(*(part * len(y) for part in parts[:3]), 100 * parts[3], len(y))
    names = ("loss", "natural", "penalty", "accuracy")
    return {**{name: total / sums[-1] for name, total in zip(names, sums)}, "samples": sums[-1]}


@torch.no_grad()
def evaluate(network: nn.Module, data: ImageSet, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy and accuracy (percent) in eval mode: ``{"loss", "accuracy"}``."""
    loss, correct = 0.0, 0
    with mode(network, training=False):
        for x, y, _ in Batches(data, batch_size, shuffle=False):
            logits = network(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(1) == y).sum())
    return {"loss": loss / len(data), "accuracy": 100 * correct / len(data)}


def probe(network: nn.Module, data: ImageSet, ball: Ball, num_steps: int, batch_size: int) -> float:
    """Robust accuracy (percent) under a short PGD from the images themselves, in eval mode."""
    attack = Defense("at", ball, 2.5 * ball.epsilon / num_steps, num_steps)  # reaches the edge
    robust = 0
    with mode(network, training=False):
        for x, y, _ in Batches(data, batch_size, shuffle=False):
            x_adv = pgd_point(network, x, y, attack, start=x)
            with torch.no_grad():
                right = (network(x).argmax(1) == y) & (network(x_adv).argmax(1) == y)
            robust += int(right.sum())
    return 100 * robust / len(data)


def bn_gap(network: nn.Module, data: ImageSet, ball: Ball, batch_size: int) -> dict[str, float]:
    """The network by running statistics and by batch statistics, side by side.

    Returns :data:`BN_GAP`: accuracies in percent, mean gradient norms at the images; without
    BatchNorm those of ``eval`` alone.
    """
    found: dict[str, float] = {}
    for name in ("eval", "batch")[: 1 + has_batch_norm(network)]:
        correct, norms, by_batch = 0, 0.0, name == "batch"
        with mode(network, training=False), normalization(network, batch_statistics=by_batch):
            for x, y, _ in Batches(data, batch_size, shuffle=False):
                with torch.no_grad():
                    correct += int((network(x).argmax(1) == y).sum())
                norms += float(flatness(network, x, y, ball).detach().sum())
        found[f"accuracy_{name}"] = 100 * correct / len(data)
        found[f"flatness_{name}"] = norms / len(data)
    return found


def schedules(args: argparse.Namespace) -> tuple[Schedule, Schedule, Schedule, float]:
    """By the time in epochs: rate, lambada, share of epsilon; and the time when at_start ends."""
    total, start = args.epochs, round(args.at_start * args.epochs, 6)  # 0.29 of 100 is 29

    def onecycle(when: float) -> float:
        rising, falling = when / (0.3 * total), (total - when) / (0.7 * total)
        return 0.04 + 0.96 * rising if rising < 1 else max(0.002, falling)

    share = {
        "step": lambda when: args.gamma ** sum(when >= epoch for epoch in args.schedule),
        "cosine": lambda when: 0.5 * (1 + math.cos(math.pi * min(1.0, when / total))),
        "onecycle": onecycle,
        "constant": lambda when: 1.0,
    }[args.lr_schedule]

    def risen(since: float, warmup: float) -> float:
        return min(1.0, max(0.0, since / warmup)) if warmup else 1.0

    return (
        lambda when: args.lr * share(when),
        lambda when: args.lambada * risen(when - start, args.warmup),
        lambda when: risen(when, args.epsilon_warmup),
        start,
    )

"""A training run from its flags to its run folder; both training scripts call :func:`train`."""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from models import build_model
from utils.ball import Ball
from utils.batch_norm import has_batch_norm, mode
from utils.board import Board
from utils.data import Batches, ImageSet, load_dataset, split_validation
from utils.defenses import Defense, DefenseLoss
from utils.engine import Interrupted, Progress, evaluate, mode_gap, probe, train_one_epoch
from utils.errors import UserError
from utils.lfr import sharpest_point
from utils.runs import (
    BEST,
    CHECKPOINT,
    RunFolder,
    load_checkpoint,
    restore_fields,
    restore_network,
    restore_optimizer,
)
from utils.runtime import StopSignal, World, seed_everything, versions, world

EXTRA_COLUMNS = (
    "Val Acc.",
    "Val Robust Acc.",
    "Test Robust Acc.",
    "Mode Gap",
    "Seconds",
)

# The two modes of BatchNorm have parted when they disagree by this many percent points.
PARTED = 20.0

# The sharpest point of a ball is at least as sharp as its centre. Where the penalty is this many
# times less than the gradient norm at held-out images, the search no longer finds what is there.
HIDDEN = 3.0

# Flags that may differ in a resumed run without a word: they say where things are.
ELSEWHERE = {
    "resume",
    "pretrained",
    "overwrite",
    "gpu_id",
    "threads",
    "data_dir",
    "save_dir",
    "checkpoint",
}

# What decides which training images are held out.
SPLIT = ("val_size", "nlabel", "manualSeed")

# What the score of an epoch depends on; those before and after another choice do not compare.
MEASURE = ("norm", "probe_epsilon", "probe_steps", "probe_size", *SPLIT)

# Weight of the clean accuracy in the choice of the best epoch: it decides between equals only.
TIE_BREAK = 1e-6

# Batches from which an averaged network gets the running statistics of its BatchNorm.
STATISTICS_BATCHES = 20


def learning_rate(args: argparse.Namespace) -> Callable[[float], float]:
    """The learning rate as a function of the time in epochs.

    A function of time has no state, so there is nothing to save, to resume wrongly, or to log
    differently from what was used.
    """
    total, peak = args.epochs, args.lr

    def step(when: float) -> float:
        return peak * args.gamma ** sum(when >= epoch for epoch in args.schedule)

    def cosine(when: float) -> float:
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, when / total)))

    def onecycle(when: float) -> float:
        rise = 0.3 * total
        if when < rise:
            return peak * (0.04 + 0.96 * when / rise)
        return peak * max(0.002, (total - when) / (total - rise))

    def constant(when: float) -> float:
        return peak

    schedules = {"step": step, "cosine": cosine, "onecycle": onecycle, "constant": constant}
    return schedules[args.lr_schedule]


def flatness_weight(args: argparse.Namespace) -> Callable[[float], float]:
    """Lambada as a function of the time in epochs: linear from 0 during the warm-up."""
    if args.warmup == 0:
        return lambda when: args.lambada
    return lambda when: args.lambada * min(1.0, when / args.warmup)


def run_path(args: argparse.Namespace) -> Path:
    """The published folder of a run, or the one that ``--checkpoint`` names."""
    if args.checkpoint is not None:
        return Path(args.checkpoint)
    weight = {
        "lfr": f"lr_{args.lr:g}_lambada_{args.lambada:g}",
        "igr": f"igr_lr_{args.lr:g}_lambada_{args.lambada:g}",
        "at": f"at_lr_{args.lr:g}",
        "trades": f"trades_lr_{args.lr:g}_beta_{args.beta:g}",
        "none": f"none_lr_{args.lr:g}",
    }[args.defense]
    network = {
        "small_cnn": "",
        "resnet": f"resnet_{args.depth}_{args.widen_factor}",
        "wrn": f"wrn_{args.depth}_{args.widen_factor}",
    }[args.arch]
    return Path(args.save_dir) / args.dataset / network / f"{weight}_rs_{args.manualSeed}"


def train(args: argparse.Namespace) -> int:
    """Train as the flags say; returns the exit code.

    Raises:
        UserError: anything the user can mend.
    """
    with world(args.gpu_id, args.threads) as here:
        return _Run(args, here).go()


class _Run:
    """The state of one training run."""

    def __init__(self, args: argparse.Namespace, here: World) -> None:
        self.args, self.here = args, here
        if args.dry_run:
            args.epochs, args.max_steps, args.schedule, args.warmup = 1, 1, [], 0.0
            args.probe_size = min(args.probe_size, args.train_batch)
            args.start_epoch = 0
        seed_everything(args.manualSeed)
        self.checkpoint = self._read_checkpoint()
        self.train_set, self.val_set, self.test_set = self._load_data()
        self.ball = Ball(args.norm, args.epsilon)
        self.probe_ball = Ball(args.norm, args.probe_epsilon)
        self.network = self._build()
        if args.pretrained is not None and self.checkpoint is None:
            self._begin_with(_file_in(args.pretrained, BEST))
        self.rate, self.weight = learning_rate(args), flatness_weight(args)
        self.optimizer = self._optimizer()
        self.average = None
        if args.ema:
            average = get_ema_multi_avg_fn(args.ema)
            self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.progress = Progress(epoch=args.start_epoch)
        if self.checkpoint is not None:
            self._restore()

    # -- setting up ---------------------------------------------------------------------------

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if self.args.resume is None:
            return None
        path = _file_in(self.args.resume, CHECKPOINT)
        self.args.resume = str(path)
        return load_checkpoint(path)

    def _load_data(self) -> tuple[ImageSet, ImageSet | None, ImageSet]:
        args = self.args
        train_set = load_dataset(args.dataset, args.data_dir, train=True)
        test_set = load_dataset(args.dataset, args.data_dir, train=False)
        if args.nlabel is not None:
            if args.nlabel > len(train_set):
                raise UserError(
                    f"--nlabel {args.nlabel}: {train_set.name} has {len(train_set)} training "
                    f"samples, allowed are 1 to {len(train_set)}"
                )
            train_set = train_set.head(args.nlabel)
        if args.val_size is None:
            args.val_size = min(1000, len(train_set) // 10)
        val_set = None
        if args.val_size:
            train_set, val_set = split_validation(train_set, args.val_size, args.manualSeed)
            val_set = val_set.to(self.here.device)
        return train_set, val_set, test_set.to(self.here.device)

    def _build(self) -> nn.Module:
        args, data = self.args, self.train_set
        height, width = data.image_size
        if height != width and args.arch == "small_cnn":
            raise UserError(
                f"dataset {data.name}: images of {height}x{width} pixels, "
                "small_cnn needs square ones"
            )
        try:
            network = build_model(
                args.arch,
                num_classes=data.num_classes,
                in_channels=data.in_channels,
                image_size=height,
                depth=args.depth,
                block_name=args.block_name,
                widen_factor=args.widen_factor,
                drop=args.drop,
                activation=args.activation,
                norm_layer=args.norm_layer,
            )
        except ValueError as error:
            raise UserError(f"--arch {args.arch}: {error}") from None
        return network.to(self.here.device, memory_format=torch.channels_last)

    def _optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        if args.optimizer_type == "Adam":
            return torch.optim.Adam(
                self.network.parameters(), lr=args.lr, weight_decay=args.weight_decay
            )
        return torch.optim.SGD(
            self.network.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
        )

    def _begin_with(self, path: Path) -> None:
        """The weights of a finished network, the averaged ones where there are any.

        A run that is resumed has long left them: ``--resume`` goes before ``--pretrained``.
        """
        found = load_checkpoint(path)
        restore_network(self.network, found, path)
        self.here.say(f"beginning with the weights of {path}")
        changed = [line for name, line in self._changed_flags(found).items() if name in SPLIT]
        if changed and self.val_set is not None and found.get("dataset") == self.train_set.name:
            self.here.say(
                f"note: these weights were trained on images that are held out now "
                f"({'; '.join(changed)}), which flatters the choice of {BEST}"
            )

    def _restore(self) -> None:
        """Everything the checkpoint holds; the original's hold weights, optimizer and epoch."""
        found, path = self.checkpoint, self.args.resume
        state, weights = found.get("training"), found["state_dict"]
        if state is None:
            self.progress.epoch = found.get("epoch", 0)
        elif not isinstance(state, dict):
            raise UserError(f"{path}: its 'training' is not the state of a run")
        else:
            self.progress = restore_fields(Progress, state.get("progress"), path, "progress")
            if self.progress.batch and not self.progress.sums.get("samples"):
                raise UserError(f"{path}: its progress counts batches but no samples")
            # The averaged weights are what is published: --evaluate looks at those.
            if state.get("weights") is not None and not self.args.evaluate:
                weights = state["weights"]
        restore_network(self.network, {"state_dict": weights}, path)
        if self.average is not None:
            restore_network(self.average.module, found, path)
            self.average.n_averaged.fill_(self.progress.step)
        if not self.args.evaluate:
            restore_optimizer(self.optimizer, found, path)
            # Where an old checkpoint's tensors lay in memory must not decide how fast we are.
            for buffers in self.optimizer.state.values():
                for key, value in buffers.items():
                    if isinstance(value, torch.Tensor) and value.dim() == 4:
                        buffers[key] = value.contiguous(memory_format=torch.channels_last)

    # -- running ------------------------------------------------------------------------------

    def go(self) -> int:
        args, here = self.args, self.here
        here.say(
            f"data: {self.train_set.name}, {len(self.train_set)} training, "
            f"{len(self.val_set) if self.val_set is not None else 0} held-out and "
            f"{len(self.test_set)} test images"
        )
        if args.workers is not None:
            here.say(f"note: --workers {args.workers} starts nothing, the data are in memory")
        if args.evaluate:
            return self._evaluate_only()
        with ExitStack() as stack:
            folder = self._open_folder(stack)
            here.say(f"run folder: {run_path(args)}")
            if self.checkpoint is not None:
                self._compare_flags()
                batch = f", batch {self.progress.batch}" if self.progress.batch else ""
                here.say(f"resumed from {args.resume} after epoch {self.progress.epoch}{batch}")
            if self.progress.epoch >= args.epochs:
                here.say(f"nothing to do: {self.progress.epoch} of {args.epochs} epochs are done")
                return 0
            stop = stack.enter_context(StopSignal())
            try:
                self._epochs(folder, stack, stop)
            except Interrupted:
                if folder is not None:
                    here.say(f"stopped; go on with the same flags and --resume {folder.checkpoint}")
                return 128 + (stop.received or signal.SIGTERM)
        return 0

    def _open_folder(self, stack: ExitStack) -> RunFolder | None:
        args = self.args
        folder = None
        if self.here.is_main:
            folder = stack.enter_context(
                RunFolder(run_path(args), resume_from=args.resume, overwrite=args.overwrite)
            )
            folder.save_json(
                "args.json",
                {
                    "command": shlex.join(sys.argv),
                    "arguments": vars(args),
                    "dataset": self.train_set.name,
                    "architecture": self.network.arch,
                    "parameters": sum(p.numel() for p in self.network.parameters()),
                    "processes": self.here.size,
                    "versions": versions(),
                },
            )
        self.here.barrier()
        return folder

    def _changed_flags(self, checkpoint: dict[str, Any]) -> dict[str, str]:
        """What to say of each flag that differs from the checkpoint's."""
        before = checkpoint.get("args") or {}
        return {
            name: f"--{name} {before[name]} is now {value}"
            for name, value in _plain(vars(self.args)).items()
            if name in before and before[name] != value
        }

    def _compare_flags(self) -> None:
        """One line naming the flags that differ from the checkpoint's, if any."""
        before = self.checkpoint.get("args") or {}
        changed = [
            line
            for name, line in self._changed_flags(self.checkpoint).items()
            if name not in ELSEWHERE
        ]
        if changed:
            self.here.say(
                f"note: the checkpoint was written with other flags: {'; '.join(changed)}"
            )
        # Older checkpoints were probed at the radius of the training.
        before = {"probe_epsilon": before.get("epsilon"), **before}
        if any(name in before and before[name] != getattr(self.args, name) for name in MEASURE):
            self.progress.best = Progress().best
            self.here.say(f"note: {BEST} is chosen anew, by what is measured from now on")

    def _epochs(self, folder: RunFolder | None, stack: ExitStack, stop: StopSignal) -> None:
        args, here, progress = self.args, self.here, self.progress
        batches = Batches(
            self.train_set,
            args.train_batch,
            shuffle=True,
            augment=args.augment,
            padding=args.crop_padding,
            mirror=args.mirror,
            seed=args.manualSeed,
            device=here.device,
            rank=here.rank,
            world_size=here.size,
        )
        defense = Defense(
            args.defense,
            self.ball,
            args.step_size,
            args.num_steps,
            search=args.search,
            bn_mode=args.bn_mode,
            beta=args.beta,
        )
        loss_of: nn.Module = DefenseLoss(self.network, defense)
        if here.size > 1:
            devices = [here.device] if here.device.type == "cuda" else None
            loss_of = DistributedDataParallel(loss_of, device_ids=devices)
        board = Board(folder.scalars if folder else None, progress.epoch, progress.step)
        stack.callback(board.close)
        board.describe(shlex.join(sys.argv), vars(args))
        log = folder.log(EXTRA_COLUMNS, keep=progress.epoch - args.start_epoch) if folder else None
        max_batches = min(args.max_steps or len(batches), len(batches))
        saved = time.monotonic()

        def after_step(values: dict[str, float]) -> None:
            nonlocal saved
            if self.average is not None:
                self.average.update_parameters(self.network)
            board.iteration(
                progress.step - 1,
                {
                    "loss": values["loss"],
                    "loss_normal": values["natural_loss"],
                    "loss_gradient": values["flatness"],
                    "grad_part": values["loss"] - values["natural_loss"],
                },
            )
            asked = here.sum(float(stop.received is not None))[0] > 0
            due = args.save_minutes and time.monotonic() - saved > 60 * args.save_minutes
            if folder is not None and (asked or due):
                board.flush()
                folder.save(self._state(), CHECKPOINT)
                saved = time.monotonic()
            if asked:
                raise Interrupted

        here.say(_HEADER)
        while progress.epoch < args.epochs:
            batches.set_epoch(progress.epoch)
            used_rate = self.rate(float(progress.epoch))
            self.network.train()
            means = train_one_epoch(
                loss_of,
                batches,
                self.optimizer,
                progress,
                here,
                rate=self.rate,
                lambada=self.weight,
                max_batches=max_batches,
                amp=args.amp,
                after_step=after_step,
            )
            if folder is not None:
                self._report(folder, log, board, means, used_rate, batches)
                saved = time.monotonic()
            here.barrier()
            if stop.received is not None:
                raise Interrupted

    def _evaluated(self) -> nn.Module:
        """The network that is measured and published: the average where there is one."""
        return self.average.module if self.average is not None else self.network

    def _report(
        self,
        folder: RunFolder,
        log: Any,
        board: Board,
        means: dict[str, float],
        used_rate: float,
        batches: Batches,
    ) -> None:
        """Measure the network after an epoch, write every log, save the checkpoints."""
        args, progress = self.args, self.progress
        if self.average is not None and has_batch_norm(self.network):
            # Statistics of averaged weights are not the average of the statistics: while the
            # weights still move fast, such a network is at chance.
            images = (x for x, _, _ in islice(batches.iterate(), STATISTICS_BATCHES))
            update_bn(images, self.average.module)
        found = self._measure(self._evaluated())
        epoch = progress.epoch - 1
        board.epoch(
            epoch,
            {
                "train_loss": means["loss"],
                "test_loss": found["test_loss"],
                "loss_normal": means["natural_loss"],
                "loss_grad": means["flatness"],
                "train_acc": means["accuracy"],
                "test_acc": found["test_accuracy"],
                "learning_rate": used_rate,
                "lambada": self.weight(float(progress.epoch)),
                "seconds": means["seconds"],
                "Robust/test_pgd": found.get("test_robust"),
                "Robust/val_pgd": found.get("val_robust"),
                "Acc_epoch/val_acc": found.get("val_accuracy"),
                "Mode_gap/accuracy_eval": found.get("accuracy_eval"),
                "Mode_gap/accuracy_batch": found.get("accuracy_batch"),
                "Mode_gap/flatness_eval": found.get("flatness_eval"),
                "Mode_gap/flatness_batch": found.get("flatness_batch"),
                "Mode_gap/gap": found.get("gap"),
            },
        )
        if args.image_interval and (epoch % args.image_interval == 0 or args.dry_run):
            self._draw(board, epoch)
        score = self._score(found)
        parted = abs(found.get("gap", 0.0)) > PARTED
        names = []
        # The first epochs' running statistics lag behind: without a best yet, any is the best.
        if score > progress.best and (not parted or progress.best < 0):
            progress.best = score
            names.append(BEST)
        if args.ckpt_interval and progress.epoch % args.ckpt_interval == 0:
            names.append(f"epoch{progress.epoch}.pth.tar")
        if parted:
            print(
                f"warning: epoch {progress.epoch}: the network by running statistics "
                f"({found['accuracy_eval']:.1f} %) and by batch statistics "
                f"({found['accuracy_batch']:.1f} %) have parted; the last good checkpoint stays "
                f"model_best.pth.tar (--bn_mode {args.bn_mode}, see docs/failure_case.md)",
                file=sys.stderr,
                flush=True,
            )
        elif warning := self._hides(means, found):
            print(f"warning: epoch {progress.epoch}: {warning}", file=sys.stderr, flush=True)
        board.flush()
        log.append(
            {
                "Learning Rate": used_rate,
                "Train Loss": means["loss"],
                "Valid Loss": found["test_loss"],
                "Train Acc.": means["accuracy"],
                "Valid Acc.": found["test_accuracy"],
                "loss normal": means["natural_loss"],
                "loss gradient": means["flatness"],
                "Val Acc.": found.get("val_accuracy", math.nan),
                "Val Robust Acc.": found.get("val_robust", math.nan),
                "Test Robust Acc.": found.get("test_robust", math.nan),
                "Mode Gap": found.get("gap", math.nan),
                "Seconds": means["seconds"],
            }
        )
        state = self._state(found)
        folder.save(state, *names, CHECKPOINT)
        best = "  *" if BEST in names else ""
        self.here.say(_row(progress.epoch, args.epochs, used_rate, means, found) + best)

    def _measure(self, network: nn.Module) -> dict[str, float]:
        args = self.args
        tested = evaluate(network, self.test_set, args.test_batch)
        found = {"test_loss": tested["loss"], "test_accuracy": tested["accuracy"]}
        probes = args.probe_size and args.probe_steps
        if self.val_set is not None:
            found["val_accuracy"] = evaluate(network, self.val_set, args.test_batch)["accuracy"]
        for name, data in (("val", self.val_set), ("test", self.test_set)):
            if probes and data is not None:
                head = data.head(args.probe_size)
                found[f"{name}_robust"] = probe(
                    network, head, self.probe_ball, args.probe_steps, args.test_batch
                )
        held_out = self.val_set if self.val_set is not None else self.test_set
        slice_ = held_out.head(max(2, min(512, len(held_out))))
        found.update(mode_gap(network, slice_, self.ball, args.train_batch))
        if has_batch_norm(network):
            found["gap"] = found["accuracy_batch"] - found["accuracy_eval"]
        return found

    def _score(self, found: dict[str, float]) -> float:
        """What the best epoch is chosen by: robust accuracy, and the clean one among equals.

        Equal are the epochs of an undefended network, of which a probe leaves nothing. One that
        answers with a constant is robust where it is right: a tenth of the images of ten classes,
        which is more than a good network may reach under a strong attack.
        """
        clean = found.get("val_accuracy", found["test_accuracy"])
        if clean < 1.25 * 100 / self.train_set.num_classes:
            return 0.0
        return found.get("val_robust", clean) + TIE_BREAK * clean

    def _hides(self, means: dict[str, float], found: dict[str, float]) -> str | None:
        """What to say when the network is flat at the points of the search and nowhere else."""
        args = self.args
        if args.defense != "lfr" or args.num_steps == 0:
            return None
        at_images = found["flatness_eval" if args.bn_mode == "running" else "flatness_batch"]
        # Not where the network is flat anyway, nor early: the penalty is the mean over an epoch in
        # which a fresh network's gradients grow from nothing.
        early = self.progress.epoch <= max(1.0, args.warmup)
        if early or args.epsilon * at_images < 0.1 or HIDDEN * means["flatness"] >= at_images:
            return None
        return (
            f"the penalty ({means['flatness']:.3g}) is less than a third of the gradient norm at "
            f"held-out images ({at_images:.3g}), which a search in their neighbourhood should "
            "exceed: the network hides from the search; try more --num_steps of a smaller "
            "--step_size, or --search fast (see docs/failure_case.md)"
        )

    def _draw(self, board: Board, epoch: int) -> None:
        args = self.args
        network = self._evaluated()
        data = (self.val_set if self.val_set is not None else self.test_set).head(10)
        clean = data.float_images().contiguous(memory_format=torch.channels_last)
        with mode(network, training=False):
            sharpest = sharpest_point(
                network,
                clean,
                data.labels,
                self.ball,
                step_size=args.step_size,
                num_steps=args.num_steps,
                search=args.search,
                start=clean,
            )
            with torch.no_grad():
                predictions = network(sharpest).argmax(1)
        board.images(epoch, clean, sharpest, predictions, data.labels, data.classes)

    def _state(self, found: dict[str, float] | None = None) -> dict[str, Any]:
        """A checkpoint: the original's keys, then what evaluation and resuming need."""
        found = found or {}
        averaged = self.average is not None
        return {
            "epoch": self.progress.epoch,
            "state_dict": self._evaluated().state_dict(),
            "acc": found.get("test_accuracy", math.nan),
            "best_acc": self.progress.best,
            "optimizer": self.optimizer.state_dict(),
            "arch": self.network.arch,
            "dataset": self.train_set.name,
            "classes": list(self.train_set.classes),
            "args": _plain(vars(self.args)),
            "measured": found,
            "versions": versions(),
            "training": {
                "progress": asdict(self.progress),
                "weights": self.network.state_dict() if averaged else None,
            },
        }

    def _evaluate_only(self) -> int:
        found = self._measure(self._evaluated())
        self.here.say(
            f"test: loss {found['test_loss']:.4f}, clean accuracy {found['test_accuracy']:.2f} %"
            + (
                f", robust accuracy {found['test_robust']:.2f} % (PGD-{self.args.probe_steps}, "
                f"first {min(self.args.probe_size, len(self.test_set))})"
                if "test_robust" in found
                else ""
            )
        )
        return 0


def _file_in(path: str, name: str) -> Path:
    """``path`` itself, or the file of that name in it if it is a run folder."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Flags as plain values, which a checkpoint may hold."""
    allowed = (int, float, str, bool, type(None), list)
    return {
        key: value if isinstance(value, allowed) else str(value) for key, value in values.items()
    }


_HEADER = (
    "   epoch         rate   loss  natural  flatness  train   val  val-pgd   test  test-pgd"
    "  seconds"
)


def _row(
    epoch: int, epochs: int, rate: float, means: dict[str, float], found: dict[str, float]
) -> str:
    def percent(name: str, width: int) -> str:
        return f"{found[name]:{width}.1f}" if name in found else " " * (width - 1) + "-"

    return (
        f"{epoch:4d}/{epochs:<4d} {rate:10.3g} {means['loss']:7.4f} {means['natural_loss']:7.4f} "
        f"{means['flatness']:9.4f} {means['accuracy']:6.2f} {percent('val_accuracy', 5)} "
        f"{percent('val_robust', 8)} {percent('test_accuracy', 6)} {percent('test_robust', 9)} "
        f"{means['seconds']:8.1f}"
    )

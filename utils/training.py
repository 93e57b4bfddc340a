"""A training run from its command line to its run folder; both training scripts call `train`."""

import argparse
import json
import math
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from models import build_model
from utils import checkpoints, engine
from utils.board import Board, draw_grid
from utils.data import Batches, ImageSet, fingerprint, split_validation
from utils.datasets import augmentation, load_dataset
from utils.defenses import Defense, DefenseLoss
from utils.engine import Interrupted, Progress
from utils.errors import UserError
from utils.lfr import Ball, LossTerms, inner_maximization
from utils.lfr.batch_norm import has_batch_norm, mode
from utils.networks import NAMED
from utils.options import doubtful_steps, settle_training, training_parser, unused_flags
from utils.run_folder import BEST, CHECKPOINT, LOG, RECORD, Log, RunFolder, write_atomic
from utils.runtime import Processes, StopSignal, processes, versions

# What is known after an epoch: its name here, its column in log.txt ("Valid" is the test set, as in
# the original), its tag in TensorBoard, and the word for it in the line that is printed.
FIGURES = (
    ("rate", "Learning Rate", "Schedule/learning_rate", "rate"),
    ("loss", "Train Loss", "Loss_epoch/train_loss", "loss"),
    ("test_loss", "Valid Loss", "Loss_epoch/test_loss", ""),
    ("accuracy", "Train Acc.", "Acc_epoch/train_Acc", "train %"),
    ("test_accuracy", "Valid Acc.", "Acc_epoch/test_acc", "test %"),
    ("natural", "loss normal", "Loss_epoch/loss_normal", "natural"),
    ("penalty", "loss gradient", "Loss_epoch/loss_grad", "penalty"),
    ("held_out_accuracy", "Held-out Acc.", "Acc_epoch/held_out_acc", "held-out %"),
    ("held_out_robust", "Held-out Robust Acc.", "Robust/held_out_pgd", "held-out PGD %"),
    ("test_robust", "Test Robust Acc.", "Robust/test_pgd", "test PGD %"),
    ("gap", "BN Gap", "BN_gap/gap", ""),
    *((name, "", f"BN_gap/{name}", "") for name in engine.BN_GAP),
    ("lambada", "", "Schedule/lambada", ""),
    ("epsilon", "", "Schedule/epsilon", ""),
    ("seconds", "Seconds", "Time/seconds_per_epoch", "seconds"),
    ("epoch", "Epoch", "", ""),
)
COLUMNS = tuple(column for _, column, _, _ in FIGURES if column)

# BatchNorm has made two networks when its statistics disagree by more percentage points.
BN_GAP_LIMIT = 20.0

# Flags of one command only: a resumed run does not take them from its checkpoint.
OF_THE_COMMAND = set(
    "resume pretrained overwrite force evaluate dry_run gpu_id threads data_dir save_dir "
    "checkpoint".split()
)
# What decides which training images are held out, and what the score of an epoch depends on.
SPLIT = {"val_size", "nlabel", "manualSeed"}
MEASURE = {"norm", "probe_epsilon", "probe_steps", "probe_size", *SPLIT}
# Flags that describe a network, by their names in a checkpoint's 'arch'.
ARCH = {"name": "arch", **{name: name for name in (*NAMED, "norm_layer")}}


def train(table: Mapping[str, Any], description: str, argv: Sequence[str] | None = None) -> int:
    """Train as the command line (default ``sys.argv[1:]``) says; returns the exit code.

    ``table`` holds the script's defaults. UserError: anything the user can mend.
    """
    parser = training_parser(table, description)
    typed = parser.given(sys.argv[1:] if argv is None else argv)
    checkpoint = None
    try:
        args = settle_training(parser, table, typed)
        if args.pretrained is not None and args.resume in (None, "auto"):
            args.pretrained = checkpoints.find_checkpoint(args.pretrained, BEST)
            checkpoint = checkpoints.load_checkpoint(args.pretrained)
            _take_arch(args, typed, checkpoint, args.pretrained)  # which also names the run folder
        if args.resume == "auto":
            path = run_path(args) / CHECKPOINT
            args.resume = path if path.exists() else None
        if args.resume is not None:
            path = checkpoints.find_checkpoint(args.resume, CHECKPOINT)
            checkpoint = checkpoints.load_checkpoint(path)
            if (checkpoint.get("args") or {}).get("dry_run"):
                raise UserError(f"{path} is of a --dry_run; start again with --overwrite")
            before = parser.given(parser.words(_given(checkpoint), without=OF_THE_COMMAND))
            args = settle_training(parser, table, {**before, **typed})
            args.resume = str(path)
            _take_arch(args, typed, checkpoint, path)
            if "training" in checkpoint and not {"save_dir", "checkpoint"} & typed.keys():
                args.checkpoint = str(path.parent)
    except UserError as error:
        parser.error(str(error))
    with processes(args.gpu_id, args.threads) as run:
        return _Training(args, typed, checkpoint, run).run()


def _take_arch(
    args: argparse.Namespace, typed: Mapping[str, Any], checkpoint: Mapping[str, Any], path: Path
) -> None:
    """The network is what a checkpoint says, whatever the flags' defaults."""
    asked = {key: typed[flag] for key, flag in ARCH.items() if flag in typed}
    for key, value in checkpoints.arch_of(checkpoint, asked, path).items():
        if key in ARCH:
            setattr(args, ARCH[key], value)


def _given(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint's run was given; all of them where it does not say."""
    return checkpoint.get("given", checkpoint.get("args") or {})


def run_path(args: argparse.Namespace) -> Path:
    """The published folder of a run, or the one that ``--checkpoint`` names."""
    if args.checkpoint is not None:
        return Path(args.checkpoint)
    name = ("" if args.defense == "lfr" else f"{args.defense}_") + f"lr_{args.lr}"
    if args.defense in ("lfr", "igr"):
        name += f"_lambada_{args.lambada}"
    if args.defense == "trades":
        name += f"_beta_{args.beta}"
    own = {"small_cnn": "", "preact_resnet": "preact_resnet"}
    network = own.get(args.arch, f"{args.arch}_{args.depth}_{args.widen_factor}")
    return Path(args.save_dir) / args.dataset / network / f"{name}_rs_{args.manualSeed}"


def network_of(args: argparse.Namespace, data: ImageSet, device: torch.device) -> nn.Module:
    """A fresh network, as the flags describe it, for such data; UserError if it cannot be."""
    height, width = data.image_size
    if height != width and args.arch == "small_cnn":
        raise UserError(f"{data.name} has {height}x{width} pixels, small_cnn needs squares")
    shapes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    try:
        options = {key: getattr(args, flag) for key, flag in ARCH.items()}
        network = build_model(**options, **shapes, image_size=height)
    except ValueError as error:
        raise UserError(f"--arch {args.arch}: {error}") from None
    return network.to(device, memory_format=torch.channels_last)


class _Training:
    """One run: everything that its epochs need."""

    def __init__(
        self, args: argparse.Namespace, typed: Mapping[str, Any], checkpoint: Any, run: Processes
    ) -> None:
        self.args, self.typed, self.processes = args, typed, run
        self.resumed = checkpoint if args.resume else None
        self.given = {k: v for k, v in typed.items() if k not in OF_THE_COMMAND}
        torch.manual_seed(args.manualSeed)
        self._load_data()
        path = args.resume or args.pretrained
        for note in checkpoints.unstated(checkpoint, typed.get("activation")) if checkpoint else ():
            self.processes.log(f"note: {path}: {note} (--activation)")
        self.ball = Ball(args.norm, args.epsilon)
        self.network = network_of(args, self.train_set, self.processes.device)
        kind = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[args.optimizer_type]
        options = {"momentum": args.momentum} if args.optimizer_type == "SGD" else {}
        options |= {"lr": args.lr, "weight_decay": args.weight_decay}
        self.optimizer = kind(self.network.parameters(), **options)
        self.average = None
        if args.ema:
            average = get_ema_multi_avg_fn(args.ema)
            self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.progress = Progress(epoch=args.start_epoch)
        if self.resumed is not None:
            self.given = {**_given(checkpoint), **self.given}
            checkpoints.check_data(checkpoint, path, self.train_set, args.force, self.data_sha256)
            self._restore(checkpoint)
        elif checkpoint is not None:
            self._start_from(checkpoint, path)
        if checkpoint is not None:
            self._tell_what_was_seen(checkpoint)

    def _load_data(self) -> None:
        args, device = self.args, self.processes.device
        data = load_dataset(args.dataset, args.data_dir, train=True)
        self.data_sha256 = fingerprint(data.images, data.labels)
        self.test_set = load_dataset(args.dataset, args.data_dir, train=False).to(device)
        sizes = ["x".join(map(str, part.images.shape[1:])) for part in (data, self.test_set)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{data.name}: training images are {sizes[0]}, test images {sizes[1]}")
        if (args.nlabel or 0) > len(data):
            raise UserError(f"--nlabel {args.nlabel}: allowed are 1 to {len(data)}, all samples")
        self.train_set, self.val_set = data.head(args.nlabel or len(data)), None
        if args.val_size is None:
            args.val_size = min(1000, len(self.train_set) // 10)
        if args.val_size:
            parts = split_validation(self.train_set, args.val_size, args.manualSeed)
            self.train_set, self.val_set = parts[0], parts[1].to(device)

    def _start_from(self, checkpoint: dict[str, Any], path: Path) -> None:
        """The weights of a finished network, the averaged ones where there are any."""
        log, own, state = self.processes.log, self.network.state_dict(), checkpoint["state_dict"]
        count = checkpoints.arch_of(checkpoint, None, path)["num_classes"]
        if count != self.train_set.num_classes and own.keys() == state.keys():
            head = [name for name in own if own[name].shape != state[name].shape]
            weights = {**state, **{name: own[name] for name in head}}
            checkpoint = {**checkpoint, "arch": None, "state_dict": weights}
            log(f"note: {path} has another number of classes; {', '.join(head)} start anew")
        checkpoints.restore_network(self.network, checkpoint, path)
        log(f"starting from the weights of {path}")

    def _tell_what_was_seen(self, checkpoint: dict[str, Any]) -> None:
        """A note where the weights were trained on images that are held out now."""
        changed = self._changed_flags(checkpoint)
        changed = [changed[name] for name in changed if name in SPLIT]
        of_these_data = checkpoint.get("dataset") == self.train_set.source
        if changed and self.val_set is not None and of_these_data:
            line = f"were trained on images that are held out now ({'; '.join(changed)})"
            self.processes.log(f"note: these weights {line}, which flatters accuracy there")

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Everything the checkpoint holds; the original's hold weights, optimizer and epoch."""
        path, state = self.args.resume, checkpoint.get("training")
        weights = checkpoint["state_dict"]
        if state is None:
            self.progress.epoch = checkpoint.get("epoch", 0)
        else:
            try:
                self.progress, own = Progress(**state["progress"]), state.get("weights")
            except (LookupError, TypeError):
                raise UserError(f"{path}: its 'training' is not the state of a run") from None
            # The averaged weights are what is published: --evaluate looks at those.
            weights = weights if own is None or self.args.evaluate else own
        checkpoints.restore_network(self.network, {"state_dict": weights}, path)
        if self.average is not None:
            checkpoints.restore_network(self.average.module, checkpoint, path)
            self.average.n_averaged.fill_(self.progress.step)
        if not self.args.evaluate:
            checkpoints.restore_optimizer(self.optimizer, checkpoint, path)
            new = {k: vars(self.args)[k] for k in ("momentum", "weight_decay") if k in self.given}
            for group in self.optimizer.param_groups:
                group.update({k: v for k, v in new.items() if k in group})
            changed = self._changed_flags(checkpoint)
            inside = changed.keys() & {"train_batch", "max_steps", *SPLIT}
            if self.progress.batch and inside:
                line = f"--{min(inside)} cannot change within an epoch"
                raise UserError(f"{path}: stopped at batch {self.progress.batch}; {line}")

    def _changed_flags(self, checkpoint: Mapping[str, Any]) -> dict[str, str]:
        """What to say of each flag that differs from the checkpoint's."""
        before = checkpoint.get("args") or {}
        return {
            name: f"--{name} {before[name]} is now {value}"
            for name, value in _plain(vars(self.args)).items()
            if name in before and before[name] != value and name not in OF_THE_COMMAND
        }

    def run(self) -> int:
        args, log, progress = self.args, self.processes.log, self.progress
        counts = [len(part or ()) for part in (self.train_set, self.val_set, self.test_set)]
        line = "data: {}, {} training, {} held-out and {} test images"
        log(line.format(self.train_set.name, *counts))
        if self.val_set is None:
            log(f"note: no images are held out: {BEST} is chosen by test images")
        if args.evaluate:
            row = _row(self._measure(self._evaluated()))
            probe = f"PGD-{args.probe_steps}, {args.norm} {args.probe_epsilon:.4g}"
            log(f"{row}  ({probe}, first {args.probe_size})")
            return 0
        notes = doubtful_steps(args.norm, args.epsilon, args.num_steps, args.step_size)
        if "bn_mode" in self.given and not has_batch_norm(self.network):
            notes.append("--bn_mode is not used: the network has no BatchNorm")
        for note in [*notes, *unused_flags(args, self.given)]:
            log(f"note: {note}")
        done, changed = progress.epoch >= args.epochs, self._changed_flags(self.resumed or {})
        other = [changed[name] for name in changed if name in self.typed and name != "epochs"]
        asked = not args.dry_run and other  # another run than was asked for
        if asked and (done or self.typed["resume"] == "auto"):
            raise UserError(f"{args.resume} was written with other flags: {'; '.join(other)}")
        if done:
            log(f"nothing to do: {progress.epoch} of {args.epochs} epochs are done")
            return 0
        with ExitStack() as stack:
            folder, path = None, run_path(args)
            if self.processes.is_main:
                folder = RunFolder(path, resume_from=args.resume, overwrite=args.overwrite)
                stack.enter_context(folder)
            self.processes.barrier()
            log(f"run folder: {path}")
            if self.resumed is not None:
                self._compare_flags(changed)
                batch = f", batch {progress.batch}" if progress.batch else ""
                log(f"resumed from {args.resume} after epoch {progress.epoch}{batch}")
            stop = stack.enter_context(StopSignal())
            try:
                self._epochs(folder, stack, stop)
            except Interrupted:
                log(f"stopped; the same command with --resume {path} resumes the run")
                return 128 + (stop.received or signal.SIGTERM)
        return 0

    def _record(self) -> bytes:
        """What args.json says of a run."""
        content = {"command": shlex.join(sys.argv), "arguments": vars(self.args)}
        content |= {"dataset": self.train_set.name, "architecture": self.network.arch}
        content |= {"parameters": sum(p.numel() for p in self.network.parameters())}
        content |= {"processes": self.processes.size, "versions": versions()}
        return (json.dumps(content, indent=2, sort_keys=True, default=str) + "\n").encode()

    def _compare_flags(self, changed: Mapping[str, str]) -> None:
        """One line naming the flags that differ from the checkpoint's, if any."""
        if lines := "; ".join(changed.values()):
            self.processes.log(f"note: the checkpoint was written with other flags: {lines}")
        other_data = self.resumed.get("data_sha256", self.data_sha256) != self.data_sha256
        best = run_path(self.args) / BEST
        if other_data or not best.exists() or changed.keys() & MEASURE:
            self.progress.best = Progress().best
            self.processes.log(f"note: {BEST} is chosen anew, by what is measured from now on")

    def _epochs(self, folder: RunFolder | None, stack: ExitStack, stop: StopSignal) -> None:
        args, run, progress = self.args, self.processes, self.progress
        padding, hflip = augmentation(args.dataset)
        batches = Batches(
            self.train_set.to(run.device), args.train_batch, shuffle=True, augment=args.augment,
            padding=padding, hflip=hflip, seed=args.manualSeed, rank=run.rank, world_size=run.size,
        )  # fmt: skip
        defense = Defense.of(args)
        objective = DefenseLoss(self.network, defense)
        wrapped: nn.Module = objective
        if run.size > 1:
            devices = [run.device] if run.device.type == "cuda" else None
            # Of grey images' kernels, whose layout has two names: no error, and they are few.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            wrapped = DistributedDataParallel(objective, device_ids=devices)
        if folder is not None:
            log = Log(folder.path / LOG, COLUMNS, progress.epoch)
            write_atomic(folder.path / RECORD, self._record())
            board = stack.enter_context(Board(folder.scalars))
            flags = {k: v for k, v in vars(args).items() if k not in OF_THE_COMMAND}
            board.describe(shlex.join(sys.argv), flags, self.train_set.classes)
        saved = time.monotonic()

        def after_step(values: dict[str, float]) -> None:
            nonlocal saved
            if self.average is not None:
                self.average.update_parameters(self.network)
            asked = run.sum(float(stop.received is not None))[0] > 0
            if folder is not None:
                curves = {
                    "Loss_iter/Loss": values["loss"],
                    "Loss_iter/Loss_normal": values["natural"],
                    "Loss_iter/Loss_gradient": values["penalty"],
                    "Loss_iter/grad_part": values["loss"] - values["natural"],
                }
                board.scalars(progress.step - 1, curves)
                due = args.save_minutes and time.monotonic() - saved > 60 * args.save_minutes
                if asked or due:
                    self._settle_average(batches)
                    board.flush()
                    folder.save(self._state(), CHECKPOINT)
                    saved = time.monotonic()
            if asked:
                raise Interrupted

        rate, lambada, widened, start = engine.schedules(args)

        def loss_of(x: Tensor, y: Tensor, noise: Tensor, when: float) -> LossTerms:
            ball = replace(self.ball, epsilon=args.epsilon * widened(when))
            steps = {"ball": ball, "step_size": args.step_size * widened(when)}
            name = "at" if when < start else args.defense
            objective.defense = replace(defense, name=name, **steps)
            return wrapped(x, y, noise, lambada(when))

        while progress.epoch < args.epochs:
            batches.epoch = when = progress.epoch
            first = {"rate": rate(when), "lambada": lambada(when)}
            first["epsilon"] = args.epsilon * widened(when)
            # The best one has the full loss.
            if when <= math.ceil(max(start + args.warmup, args.epsilon_warmup)):
                progress.best = Progress().best
            self.network.train()
            means = engine.train_one_epoch(
                loss_of, batches, self.optimizer, progress, run, rate=rate,
                max_batches=min(args.max_steps or len(batches), len(batches)), amp=args.amp,
                clip_grad=args.clip_grad, after_step=after_step,
            )  # fmt: skip
            if folder is not None:
                self._report(folder, log, board, {**first, **means}, batches)
                saved = time.monotonic()

    def _evaluated(self) -> nn.Module:
        """The network that is measured and published: the average where there is one."""
        return self.average.module if self.average is not None else self.network

    def _settle_average(self, batches: Batches) -> None:
        """BatchNorm's statistics of the averaged weights, which are not the average of the
        statistics: while the weights still move fast, such a network is at chance."""
        if self.average is not None and has_batch_norm(self.network):
            update_bn((x for x, _, _ in islice(batches.iterate(), 20)), self.average.module)

    def _report(
        self, folder: RunFolder, log: Log, board: Board, means: dict[str, float], batches: Batches
    ) -> None:
        """Measure the network after an epoch, write every log, save the checkpoints."""
        args, progress = self.args, self.progress
        self._settle_average(batches)
        figures = {**means, **self._measure(self._evaluated()), "epoch": progress.epoch}
        curves = {tag: figures[name] for name, _, tag, _ in FIGURES if tag and name in figures}
        board.scalars(progress.epoch - 1, curves)
        if args.image_interval and (progress.epoch - 1) % args.image_interval == 0:
            self._draw(board, progress.epoch - 1)
        score, gap, names = self._score(figures), abs(figures.get("gap", 0.0)) > BN_GAP_LIMIT, []
        # The first epochs' running statistics lag behind: without a best yet, any is the best.
        if score > progress.best and (not gap or progress.best < 0):
            progress.best, names = score, [BEST]
        if args.ckpt_interval and progress.epoch % args.ckpt_interval == 0:
            names.append(f"epoch{progress.epoch}.pth.tar")
        if gap:
            running, batch = (f"{figures[f'accuracy_{name}']:.1f} %" for name in ("eval", "batch"))
            line = f"accuracy is {running} by BatchNorm's running statistics, {batch} by a batch's"
            kept = "is this epoch's, for want of a better" if BEST in names else "is kept as it was"
            see = f"{BEST} {kept} (--bn_mode {args.bn_mode}, see docs/failure_case.md)"
            print(f"warning: epoch {progress.epoch}: {line}; {see}", file=sys.stderr, flush=True)
        board.flush()
        log.append({column: figures[name] for name, column, _, _ in FIGURES if name in figures})
        folder.save(self._state(figures), *names, CHECKPOINT)
        best = "  *" if BEST in names else ""
        self.processes.log(f"epoch {progress.epoch}/{args.epochs}  {_row(figures)}{best}")

    def _measure(self, network: nn.Module) -> dict[str, float]:
        args, figures = self.args, {}
        ball = Ball(args.norm, args.probe_epsilon)
        for name, data in (("held_out", self.val_set), ("test", self.test_set)):
            if data is not None:
                measured = engine.evaluate(network, data, args.test_batch)
                figures |= {f"{name}_{key}": value for key, value in measured.items()}
            if data is not None and args.probe_size:
                figures[f"{name}_robust"] = engine.probe(
                    network, data.head(args.probe_size), ball, args.probe_steps, args.test_batch
                )
        held_out = (self.val_set or self.test_set).head(512)
        figures |= engine.bn_gap(network, held_out, self.ball, args.train_batch)
        if has_batch_norm(network):
            figures["gap"] = figures["accuracy_batch"] - figures["accuracy_eval"]
        return figures

    def _score(self, figures: Mapping[str, float]) -> float:
        """Clean and robust accuracy: the latter alone chooses a constant, robust where right."""
        clean = figures.get("held_out_accuracy", figures["test_accuracy"])
        robust = figures.get("held_out_robust", figures.get("test_robust", clean))
        return (clean + robust) / 2

    def _draw(self, board: Board, epoch: int) -> None:
        args, network = self.args, self._evaluated()
        data = (self.val_set or self.test_set).head(5)
        x = data.float_images()
        steps = {"step_size": args.step_size, "num_steps": args.num_steps, "search": args.search}
        with mode(network, training=False), torch.no_grad():
            x_adv = inner_maximization(network, x, data.labels, self.ball, start=x, **steps)
            predictions = network(x_adv).argmax(1)
        picture = draw_grid(x, x_adv, predictions, data.labels, data.classes)
        board.add_image("Images/x_adv", picture, epoch)

    def _state(self, figures: Mapping[str, float] | None = None) -> dict[str, Any]:
        """A checkpoint: the original's keys, then what evaluation and resuming need."""
        weights = self.network.state_dict() if self.average is not None else None
        state = self._evaluated().state_dict()
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise UserError("the weights are not finite; what was saved before is intact")
        return {
            "epoch": self.progress.epoch,
            "state_dict": state,
            "acc": (figures or {}).get("test_accuracy", math.nan),
            "best_acc": self.progress.best,
            "optimizer": self.optimizer.state_dict(),
            "arch": self.network.arch,
            "dataset": self.train_set.source,
            "data_sha256": self.data_sha256,
            "classes": list(self.train_set.classes),
            "args": _plain(vars(self.args)),
            "given": _plain(self.given),
            "measured": dict(figures or {}),
            "versions": versions(),
            "training": {"progress": asdict(self.progress), "weights": weights},
        }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as plain values, which a checkpoint may hold."""
    allowed = (int, float, str, bool, type(None), list)
    return {k: v if isinstance(v, allowed) else str(v) for k, v in values.items()}


def _row(figures: Mapping[str, float]) -> str:
    """The figures in a line."""
    words = [(word, figures.get(name)) for name, _, _, word in FIGURES if word]
    return "  ".join(f"{word} {value:.4g}" for word, value in words if value is not None)

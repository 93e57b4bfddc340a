"""The command lines of the four scripts: flags, units, ranges, and the checks across flags.

A script brings one table of defaults, a :class:`TrainingDefaults` or :class:`EvaluationDefaults`,
and calls :func:`parse_training` or :func:`parse_evaluation`; everything else is shared. Flags of
several words are understood with underscores and with hyphens (``--train_batch``,
``--train-batch``).

A mistake ends in one line on stderr, ``script: error: ...``, and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from utils.ball import NORMS
from utils.errors import UserError, printable

ACTIVATIONS = ("relu", "silu", "softplus", "gelu", "elu", "leaky_relu")
ATTACKS = ("FGSM", "PGD", "MPGD", "JSMA", "DDNL2", "point-wise", "AutoAttack", "Square")
BLOCKS = ("BasicBlock", "Bottleneck")
BN_MODES = ("shared", "batch", "running", "mixed")
DEFENSES = ("lfr", "igr", "at", "trades", "none")
LR_SCHEDULES = ("step", "cosine", "onecycle", "constant")
NORM_LAYERS = ("batch", "group", "none")
OPTIMIZERS = ("SGD", "Adam")
SEARCHES = ("paper", "fast")

_LARGEST_SEED = 2**32 - 1  # NumPy's limit, the tightest of the generators that are seeded


# ---------------------------------------------------------------------------------------------
# Defaults tables
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingDefaults:
    """What one training script does when a flag is not given; all that the scripts differ in.

    Attributes:
        datasets, archs: the names the script allows.
        num_steps, step_size: the search of ``--search paper``.
        fast_num_steps, fast_step_size: the search of ``--search fast``, its step size at the
            default epsilon; another epsilon scales it.
        when: (flag, value) -> {flag: default}, where the value of one flag asks for other defaults
            of others, such as ``("dataset", "SVHN"): {"arch": "wrn"}``; applied in order.
    """

    dataset: str
    datasets: tuple[str, ...]
    arch: str
    archs: tuple[str, ...]
    depth: int
    widen_factor: int
    schedule: tuple[int, ...]
    lr: float
    weight_decay: float
    epsilon: float
    num_steps: int
    step_size: float
    fast_num_steps: int
    fast_step_size: float
    lambada: float
    ckpt_interval: int
    augment: bool
    epochs: int = 100
    crop_padding: int = 4
    mirror: bool = True
    bn_mode: str = "shared"
    when: Mapping[tuple[str, Any], Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationDefaults:
    """What one evaluation script does when a flag is not given.

    ``num_steps`` and ``step_size`` have no entry here: left out, each attack uses its own (see
    `utils/attacks.py`), and so it is with ``epsilon`` where that is None.
    """

    dataset: str
    datasets: tuple[str, ...]
    archs: tuple[str, ...]
    epsilon: float | None = None
    when: Mapping[tuple[str, Any], Mapping[str, Any]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------
# Value types: text -> value, or ArgumentTypeError saying what is allowed
# ---------------------------------------------------------------------------------------------


def integer(low: int, high: int = 10**9) -> Callable[[str], int]:
    """A whole number in [low, high]."""
    allowed = f"a whole number from {low}" + (f" to {high}" if high < 10**9 else " up")

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {_quote(text)}, allowed is {allowed}")
        return value

    return convert


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    unit: str = "",
) -> Callable[[str], float]:
    """A finite number in [low, high]; ``open_low``/``open_high`` leave the end itself out.

    A quotient such as ``8/255`` counts as a number. ``unit`` ends the message.
    """
    ends = []
    if low > -math.inf:
        ends.append(f"{'above' if open_low else 'at least'} {low:g}")
    if high < math.inf:
        ends.append(f"{'below' if open_high else 'at most'} {high:g}")
    allowed = "a finite number" + (" " + " and ".join(ends) if ends else "") + unit

    def convert(text: str) -> float:
        value = _quotient(text)
        inside = value is not None and math.isfinite(value) and low <= value <= high
        if not inside or (open_low and value == low) or (open_high and value == high):
            raise argparse.ArgumentTypeError(f"got {_quote(text)}, allowed is {allowed}")
        return value

    return convert


def _quotient(text: str) -> float | None:
    """The value of ``"0.031"`` or ``"8/255"``; None when it is neither."""
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        return None
    if len(parts) == 1:
        return parts[0] + 0.0  # -0.0 becomes 0.0, which prints as people expect
    if len(parts) == 2 and parts[1] != 0:
        return parts[0] / parts[1] + 0.0
    return None


positive_int = integer(1)
non_negative_int = integer(0)
positive_float = number(0, open_low=True)
non_negative_float = number(0)
fraction = number(0, 1, open_high=True)
pixel = number(0, unit=" in units of pixel intensity, such as 0.031 or 8/255")


def one_of(names: Iterable[str], extra: Iterable[str] = ()) -> Callable[[str], str]:
    """One of ``names`` (or ``extra``), whatever its case, ``-`` or ``_``; returned as listed."""
    listed = (*names, *extra)

    def plain(name: str) -> str:
        return re.sub(r"[-_ ]", "", name).lower()

    def convert(text: str) -> str:
        for name in listed:
            if plain(name) == plain(text):
                return name
        raise argparse.ArgumentTypeError(
            f"got {_quote(text)}, allowed is {', '.join(listed)}{did_you_mean(text, listed)}"
        )

    return convert


def path(text: str) -> str:
    """A file or folder name; the empty one stands for 'not given'."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"got {_quote(text)}, allowed is a file or folder name")
    return os.path.expanduser(text)


def gpu_ids(text: str) -> str:
    """``"0"`` or ``"0,1"``: GPU numbers, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,3}", part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {_quote(text)}, allowed are GPU numbers separated by commas, such as 0 or 0,1"
        )
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"got {_quote(text)}, allowed is each GPU number once")
    return ",".join(str(value) for value in numbers)


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the nearest name, or nothing."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


def _quote(text: str) -> str:
    """The text between quotes, shortened, so that no input makes the message unreadable."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---------------------------------------------------------------------------------------------
# The parser
# ---------------------------------------------------------------------------------------------


class _Formatter(argparse.HelpFormatter):
    """Lists each flag once: its spelling with hyphens is understood but not shown."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [
            name
            for name in action.option_strings
            if not ("-" in name[2:] and name.replace("-", "_")[2:] in _bare(action))
        ]
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(names) + value


def _bare(action: argparse.Action) -> list[str]:
    return [name[2:] for name in action.option_strings if "-" not in name[2:]]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with no abbreviations, whose errors are one line and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)
        # argparse takes -8/255, -1e-3 or -inf for flags and then misses a value; taking them for
        # values gives the better message: which flag, what was given, what is allowed.
        self._negative_number_matcher = re.compile(r"^-(\.?\d|inf\b|nan\b)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        # "argument --train_batch/--train-batch: ..." -> "--train_batch: ..."
        message = re.sub(r"^argument (?:\S+/)*?(--[^/-][^/:]*)(?:/\S+)*:", r"\1:", message)
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def parse_given(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Only the values that the command line really holds, by destination."""
        unset = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        blank = argparse.Namespace(**dict.fromkeys(names, unset))
        namespace, unknown = self.parse_known_args(argv, blank)
        if unknown:
            flags = [name for name in self._option_string_actions if name.startswith("--")]
            name = unknown[0].partition("=")[0]
            hint = did_you_mean(name, flags) if name.startswith("-") else ""
            self.error(f"{_quote(unknown[0])} is not understood{hint}; --help lists the flags")
        return {name: value for name, value in vars(namespace).items() if value is not unset}

    def defaults(self) -> dict[str, Any]:
        """Every destination's default."""
        return {a.dest: a.default for a in self._actions if a.dest != "help"}


class _Group:
    """A titled group of flags; names are written with underscores, hyphens are added."""

    def __init__(self, parser: Parser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def value(
        self,
        names: str,
        convert: Callable[[str], Any],
        metavar: str,
        default: Any,
        help: str,
        **options: Any,
    ) -> None:
        """A flag with a value (or several: ``nargs``); names separated by spaces."""
        self._add(names, help, type=convert, metavar=metavar, default=default, **options)

    def choice(self, names: str, choices: Sequence[str], default: str | None, help: str) -> None:
        """A flag whose value is one of ``choices``."""
        listed = "{" + ",".join(choices) + "}"
        self._add(names, help, type=one_of(choices), metavar=listed, default=default)

    def switch(self, names: str, help: str, **options: Any) -> None:
        """A flag without a value."""
        self._add(names, help, **{"action": "store_true", "default": False, **options})

    def _add(self, names: str, help: str, **options: Any) -> None:
        spellings = []
        for name in names.split():
            spellings.append(name)
            if name.startswith("--"):
                spellings.append("--" + name[2:].replace("_", "-"))
        shows = isinstance(options["default"], (int, float, str, list)) and options["default"] != ""
        if shows and "type" in options and "(default" not in help:
            help += " (default: %(default)s)"
        self._group.add_argument(*dict.fromkeys(spellings), help=help, **options)


# Each flag with its help below it is a table that the formatter would pull apart.
# fmt: off
def _add_data_flags(group: _Group, datasets: Sequence[str], dataset: str) -> None:
    group.choice("-d --dataset", datasets, dataset, "dataset")
    group.value("--data_dir", path, "DIR", "./data",
        "where the data are or are downloaded to; also an image folder {train,test}/<class>/*")


def _add_network_flags(group: _Group, archs: Sequence[str], defaults: Mapping[str, Any]) -> None:
    """The flags that describe a network; an empty ``defaults`` leaves them to the checkpoint."""
    get = defaults.get
    group.choice("-a --arch", archs, get("arch"), "architecture")
    group.value("--depth", integer(4, 1202), "LAYERS", get("depth"),
        "layers: resnet 6n+2 (Bottleneck 9n+2), wrn 6n+4; small_cnn has no choice")
    group.choice("--block_name", BLOCKS, get("block_name"), "building block of resnet")
    group.value("--widen_factor", integer(1, 64), "TIMES", get("widen_factor"),
        "width of wrn, x 16 channels")
    group.value("--drop --dropout", fraction, "SHARE", get("drop"),
        "share of activations that dropout sets to zero (small_cnn, wrn)")


def _add_ball_flags(group: _Group, epsilon: float | None) -> None:
    group.choice("--norm", NORMS, "l_inf",
        "norm of the ball; the gradient is measured in its dual (l_inf: L1, l_2: L2)")
    group.value("--epsilon", pixel, "RADIUS", epsilon,
        "radius of the ball, in units of pixel intensity (pixels lie in [0, 1]); 8/255 works"
        + (" (default: the dataset's own)" if epsilon is None else ""))


def _add_device_flags(group: _Group) -> None:
    group.value("--gpu_id", gpu_ids, "ID[,ID]", "0",
        "GPU number(s); without CUDA the command runs on MPS or the CPU and says so")
    group.value("--threads", integer(0, 1024), "N", 0, "CPU threads; 0 = PyTorch's own choice")
# fmt: on


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


# fmt: off
def add_training_options(parser: Parser, defaults: TrainingDefaults) -> None:
    """Add every flag of a training script to ``parser``."""
    data = _Group(parser, "data")
    _add_data_flags(data, defaults.datasets, defaults.dataset)
    data.value("-j --workers", integer(0, 256), "N", None,
        "accepted for the sake of old commands: the data are in memory, no workers are needed")
    data.value("--nlabel", positive_int, "SAMPLES", None,
        "use the first N training samples only (default: all, 50000 on CIFAR)")
    data.value("--val_size", non_negative_int, "SAMPLES", None,
        "training samples held out to choose the best checkpoint; 0 = none "
        "(default: 1000, at most a tenth of the training set)")
    data.switch("--augment",
        "random crop (--crop_padding) and horizontal flip (--mirror) "
        f"(default: {'on' if defaults.augment else 'off'})", default=defaults.augment)
    data.switch("--no_augment", "train on images as they are",
        action="store_false", dest="augment", default=defaults.augment)
    data.value("--crop_padding", integer(0, 16), "PIXELS", defaults.crop_padding,
        "of --augment: the crop moves an image by up to this many pixels each way")
    data.switch("--mirror", "of --augment: mirror half of the images "
        "(default: on, but for the digits of MNIST, SVHN and digits)", default=defaults.mirror)
    data.switch("--no_mirror", "of --augment: mirror none",
        action="store_false", dest="mirror", default=defaults.mirror)

    network = _Group(parser, "network")
    own = {"block_name": "BasicBlock", "drop": 0.0}
    _add_network_flags(network, defaults.archs, {**vars(defaults), **own})
    network.choice("--activation", ACTIVATIONS, "relu", "activation function")
    network.choice("--norm_layer", NORM_LAYERS, "batch", "normalisation layer of resnet and wrn")

    _add_optimisation_flags(_Group(parser, "optimisation"), defaults)
    _add_defense_flags(_Group(parser, "defense"), defaults)

    watch = _Group(parser, "watching")
    watch.value("--probe_size", non_negative_int, "SAMPLES", 500,
        "held-out and test samples attacked by a short PGD after each epoch; 0 = no probe")
    watch.value("--probe_steps", integer(0, 100_000), "N", 10, "steps of that PGD; 0 = no probe")
    watch.value("--probe_epsilon", pixel, "RADIUS", None,
        "radius of that PGD's ball, in units of pixel intensity (default: --epsilon)")
    watch.value("--image_interval", non_negative_int, "EPOCHS", 5,
        "epochs between image grids in TensorBoard; 0 = none")
    _add_run_flags(_Group(parser, "run"), defaults)


def _add_optimisation_flags(group: _Group, defaults: TrainingDefaults) -> None:
    batch = integer(1, 2**20)
    group.value("--epochs", positive_int, "N", defaults.epochs, "passes over the training set")
    group.value("--start_epoch", non_negative_int, "N", 0,
        "epochs to leave out at the start; --resume sets it itself")
    group.value("--train_batch", batch, "SAMPLES", 128,
        "batch size in training, over all processes")
    group.value("--test_batch", batch, "SAMPLES", 128, "batch size in evaluation")
    group.choice("--optimizer_type", OPTIMIZERS, "SGD", "optimizer; Adam ignores --momentum")
    group.value("--lr --learning_rate", positive_float, "RATE", defaults.lr,
        "learning rate: the first one of step, the peak of cosine and onecycle")
    group.choice("--lr_schedule", LR_SCHEDULES, "step",
        "course of the learning rate; step uses --schedule and --gamma")
    group.value("--schedule", positive_int, "EPOCH", list(defaults.schedule),
        "epochs after which the learning rate is multiplied by --gamma", nargs="+")
    group.value("--gamma", number(0, 1, open_low=True), "FACTOR", 0.1,
        "factor of the learning rate at each --schedule epoch")
    group.value("--momentum", fraction, "SHARE", 0.9, "momentum of SGD")
    group.value("--weight_decay --wd", non_negative_float, "RATE", defaults.weight_decay,
        "weight decay (L2 penalty on the weights)")
    group.value("--ema", fraction, "DECAY", 0.0,
        "decay per step of the averaged weights that are evaluated and saved as best; 0 = off")
    group.switch("--amp", "bfloat16 autocast where it is safe")


def _add_defense_flags(group: _Group, defaults: TrainingDefaults) -> None:
    group.choice("--defense", DEFENSES, "lfr",
        "lfr; for comparison igr (input-gradient regularisation: LFR with 0 steps), "
        "at (PGD adversarial training), trades, none")
    _add_ball_flags(group, defaults.epsilon)
    group.value("--num_steps", integer(0, 100_000), "N", defaults.num_steps,
        "steps of the search for the sharpest point; 0 = the image itself "
        f"(default: %(default)s, --search fast {defaults.fast_num_steps})")
    group.value("--step_size", pixel, "LENGTH", defaults.step_size,
        "length of a step, in units of pixel intensity; 2/255 works "
        f"(default: %(default)s, --search fast {defaults.fast_step_size:g} at the default epsilon)")
    group.choice("--search", SEARCHES, "paper",
        "paper: second-order ascent in small steps; fast: the same flatness in fewer passes")
    group.value("--lambada --lambda", non_negative_float, "WEIGHT", defaults.lambada,
        "weight of the flatness in the loss; plays the role of epsilon "
        "(loss nearby <= natural loss + epsilon x flatness)")
    group.value("--warmup", non_negative_float, "EPOCHS", 0.0,
        "epochs over which lambada rises linearly from 0")
    group.value("--beta", non_negative_float, "WEIGHT", 6.0, "weight of the robust term of trades")
    group.choice("--bn_mode", BN_MODES, defaults.bn_mode,
        "which statistics BatchNorm uses in natural loss, search and penalty; "
        "mixed is the original's, see docs/failure_case.md")


def _add_run_flags(group: _Group, defaults: TrainingDefaults) -> None:
    group.value("--save_dir", path, "DIR", ".",
        "the run folder is made below it, named after dataset, network and hyper-parameters")
    group.value("-c --checkpoint", path, "DIR", ".",
        "use this very run folder; . = one below --save_dir")
    group.value("--resume", path, "PATH", "",
        "checkpoint (or run folder) to go on from, with the same flags")
    group.value("--pretrained", path, "PATH", "",
        "network (or run folder, its best one) whose weights a new run begins with; "
        "optimizer and epochs start anew")
    group.switch("--overwrite", "start again in a folder that holds a run")
    group.value("--ckpt_interval", non_negative_int, "EPOCHS", defaults.ckpt_interval,
        "epochs between the kept epochN.pth.tar; 0 = none")
    group.value("--save_minutes", non_negative_float, "MINUTES", 10.0,
        "minutes between checkpoints within an epoch; 0 = at the end of epochs only")
    group.switch("-e --evaluate", "evaluate the checkpoint of --resume and leave")
    group.value("--manualSeed --manual_seed", integer(0, _LARGEST_SEED), "SEED", 1000,
        "seed of weights, order, augmentation and search")
    group.value("--max_steps", non_negative_int, "N", 0,
        "stop each epoch after N steps; 0 = whole epochs")
    group.switch("--dry_run", "one batch of every part, the run folder written, then leave")
    _add_device_flags(group)
# fmt: on


def parse_training(
    defaults: TrainingDefaults, argv: Sequence[str] | None = None, **parser_options: Any
) -> argparse.Namespace:
    """The checked flags of a training script; a mistake leaves with one line and exit code 2.

    Args:
        defaults: the script's table.
        argv: the arguments, default ``sys.argv[1:]``.
        parser_options: ``description``, ``prog``, ... of the parser.
    """
    parser = Parser(**parser_options)
    add_training_options(parser, defaults)
    args, given = _merge(parser, defaults, argv)
    try:
        validate_training(args, defaults, given)
    except UserError as error:
        parser.error(str(error))
    return args


def validate_training(
    args: argparse.Namespace, defaults: TrainingDefaults, given: Iterable[str] = ()
) -> None:
    """Settle the defaults that depend on other flags and check the flags against each other.

    Args:
        args: all flags; changed in place: ``schedule`` loses default entries beyond ``epochs``,
            ``num_steps`` and ``step_size`` follow ``search`` and ``defense``, ``probe_epsilon``
            follows ``epsilon``, ``checkpoint``, ``resume`` and ``pretrained`` become None when not
            given.
        defaults: the script's table.
        given: the flags that the user gave himself.

    Raises:
        UserError: flags that contradict each other.
    """
    given = frozenset(given)
    for name in ("checkpoint", "resume", "pretrained"):
        if getattr(args, name) in ("", "."):
            setattr(args, name, None)
    if args.evaluate and args.resume is None:
        raise UserError("--evaluate needs --resume PATH, the checkpoint to evaluate")
    if args.resume and args.overwrite:
        raise UserError("--overwrite starts a run again and --resume goes on with it: give one")
    if not args.save_dir or not args.data_dir:
        name = "data_dir" if args.save_dir else "save_dir"
        raise UserError(f"--{name} is empty, allowed is a folder's name")

    for name in ("crop_padding", "mirror"):
        if name in given and not args.augment:
            flag = name if args.mirror or name != "mirror" else "no_mirror"
            raise UserError(f"--{flag} is of --augment, which is off; give both or neither")
    _settle_schedule(args, given)
    _settle_search(args, defaults, given)
    if args.probe_epsilon is None:
        args.probe_epsilon = args.epsilon
    _check_ball(args, "epsilon", "probe_epsilon")
    _check_network(args)

    if args.start_epoch >= args.epochs and not args.evaluate:
        raise UserError(
            f"--start_epoch {args.start_epoch} leaves no epoch of --epochs {args.epochs}, "
            f"allowed is 0 to {args.epochs - 1}"
        )
    if args.warmup > args.epochs:
        raise UserError(
            f"--warmup {args.warmup:g} is longer than --epochs {args.epochs}, "
            "so lambada would never be reached"
        )


def _settle_schedule(args: argparse.Namespace, given: frozenset[str]) -> None:
    if "schedule" not in given:
        args.schedule = [epoch for epoch in args.schedule if epoch <= args.epochs]
        return
    text = " ".join(map(str, args.schedule))
    if args.lr_schedule != "step":
        raise UserError(
            f"--schedule {text} is for --lr_schedule step, but that is {args.lr_schedule}"
        )
    if any(later <= earlier for earlier, later in zip(args.schedule, args.schedule[1:])):
        raise UserError(f"--schedule {text} is not increasing, allowed is for instance 50 75 90")
    if args.schedule[-1] > args.epochs:
        raise UserError(
            f"--schedule {text} goes beyond --epochs {args.epochs}, "
            f"allowed are epochs from 1 to {args.epochs}"
        )


def _settle_search(
    args: argparse.Namespace, defaults: TrainingDefaults, given: frozenset[str]
) -> None:
    if args.search == "fast":
        if "num_steps" not in given:
            args.num_steps = defaults.fast_num_steps
        if "step_size" not in given:
            args.step_size = defaults.fast_step_size * args.epsilon / defaults.epsilon
    if args.defense == "igr":
        if "num_steps" in given and args.num_steps > 0:
            raise UserError(
                f"--num_steps {args.num_steps} contradicts --defense igr, which is lfr with 0 steps"
            )
        args.num_steps = 0
    if "step_size" in given:
        _check_step(args)


def _check_step(args: argparse.Namespace) -> None:
    if args.step_size == 0 and args.num_steps != 0:
        count = "the attacks' own" if args.num_steps is None else args.num_steps
        raise UserError(
            f"--step_size 0 with {count} steps moves nothing, "
            "allowed is a length above 0, or --num_steps 0"
        )


def _check_ball(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        radius = getattr(args, name)
        if args.norm == "l_inf" and radius is not None and radius > 1:
            raise UserError(
                f"--{name} {radius:g} is wider than the pixels' range, allowed is 0 to 1 "
                f"with --norm l_inf ({radius:g}/255 = {radius / 255:.4g}?)"
            )


def _check_network(args: argparse.Namespace) -> None:
    """The depths that an architecture's blocks can make up; nothing where the depth is open."""
    if args.arch is None or args.depth is None:
        return
    bottleneck = args.block_name == "Bottleneck"
    period, rest = {"resnet": (9 if bottleneck else 6, 2), "wrn": (6, 4)}.get(args.arch, (1, 0))
    if args.depth % period != rest % period or args.depth < period + rest:
        below = max(1, (args.depth - rest) // period) * period + rest
        block = f" of {args.block_name}" if args.arch == "resnet" else ""
        raise UserError(
            f"--depth {args.depth} does not suit {args.arch}{block}, "
            f"allowed is {period}n+{rest}; the nearest are {below} and {below + period}"
        )


def _merge(
    parser: Parser, defaults: TrainingDefaults | EvaluationDefaults, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """All flags, and the names of those that were given.

    What is given goes before ``defaults.when``, and that before the parser's defaults.
    """
    given = parser.parse_given(sys.argv[1:] if argv is None else argv)
    values = {**parser.defaults(), **given}
    for (flag, value), others in defaults.when.items():
        if values[flag] == value:
            values = {**values, **others, **given}
    return argparse.Namespace(**values), frozenset(given)


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


# fmt: off
def add_evaluation_options(parser: Parser, defaults: EvaluationDefaults) -> None:
    """Add every flag of an evaluation script to ``parser``."""
    what = _Group(parser, "what is evaluated")
    what.value("--model_path", path, "FILE", None,
        "checkpoint, of this repository or of the original implementation",
        required=True)
    _add_data_flags(what, defaults.datasets, defaults.dataset)
    what.value("--num_examples", positive_int, "SAMPLES", None,
        "attack the first N test images only (default: all)")

    attack = _Group(parser, "attack")
    attack.value("--attack_method", one_of(ATTACKS, ["all"]), "NAME", ["PGD"],
        f"one or more of {', '.join(ATTACKS)}, or all, in any case (default: PGD)",
        nargs="+")
    _add_ball_flags(attack, defaults.epsilon)
    attack.value("--num_steps", integer(0, 100_000), "N", None,
        "steps of the attack (default: each attack's own)")
    attack.value("--step_size", pixel, "LENGTH", None,
        "length of a step, in units of pixel intensity; 2/255 works (default: each attack's own)")
    attack.value("--restarts", integer(1, 10_000), "N", 1,
        "random starts per image of PGD and MPGD")
    attack.value("--l0_radius", positive_int, "VALUES", None,
        "changed values (pixels x channels) at which the accuracy under JSMA and point-wise is "
        "stated (default: the dataset's own)")
    attack.value("--l2_radius", positive_float, "RADIUS", None,
        "L2 distance at which the accuracy under DDNL2 is stated (default: the dataset's own)")
    attack.value("--seed --manualSeed", integer(0, _LARGEST_SEED), "SEED", 0,
        "seed of the attacks' random choices")
    attack.switch("--sanity", "also look for signs of masked gradients and print the verdicts")
    attack.value("--transfer_from", path, "FILE", "",
        "checkpoint of a network whose adversarial examples are tried on this one")

    network = _Group(parser, "network, where the checkpoint does not say")
    _add_network_flags(network, defaults.archs, {})

    run = _Group(parser, "run")
    run.value("--test_batch", integer(1, 2**20), "SAMPLES", 200,
        "batch size; the result does not depend on it")
    run.value("--output", path, "FILE", "", "write the results to this JSON file")
    _add_device_flags(run)
# fmt: on


def parse_evaluation(
    defaults: EvaluationDefaults, argv: Sequence[str] | None = None, **parser_options: Any
) -> argparse.Namespace:
    """The checked flags of an evaluation script; a mistake leaves with one line and exit code 2."""
    parser = Parser(**parser_options)
    add_evaluation_options(parser, defaults)
    args, _ = _merge(parser, defaults, argv)
    try:
        validate_evaluation(args)
    except UserError as error:
        parser.error(str(error))
    return args


def validate_evaluation(args: argparse.Namespace) -> None:
    """Check the flags against each other; ``attack_method`` loses ``all`` and repetitions.

    Raises:
        UserError: flags that contradict each other.
    """
    if not args.model_path:
        raise UserError("--model_path is empty, allowed is a checkpoint's file name")
    if not args.data_dir:
        raise UserError("--data_dir is empty, allowed is a folder's name")
    chosen = ATTACKS if "all" in args.attack_method else args.attack_method
    args.attack_method = list(dict.fromkeys(chosen))
    args.output = args.output or None
    args.transfer_from = args.transfer_from or None
    _check_ball(args, "epsilon")
    _check_network(args)
    if args.step_size is not None:
        _check_step(args)

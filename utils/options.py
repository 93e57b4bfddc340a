"""The command lines of the four scripts: flags, their units and ranges, and the checks across flags.

A script brings one table of defaults (:class:`TrainingDefaults` or :class:`EvaluationDefaults`) and
calls :func:`parse_training` or :func:`parse_evaluation`; everything else is shared. Multi-word flags
are understood with underscores and with hyphens (``--train_batch``, ``--train-batch``).

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
from utils.errors import UserError

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
    bn_mode: str = "shared"
    when: Mapping[tuple[str, Any], Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationDefaults:
    """What one evaluation script does when a flag is not given.

    ``num_steps`` and ``step_size`` have no entry here: left out, each attack uses its own (see
    `utils/evaluation.py`).
    """

    dataset: str
    datasets: tuple[str, ...]
    archs: tuple[str, ...]
    epsilon: float
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
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        self.exit(2, f"{self.prog}: error: {line}\n")

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


def _flag(group: Any, *names: str, help: str, **options: Any) -> None:
    """Add a flag under both spellings, its default at the end of its help."""
    spellings = []
    for name in names:
        spellings.append(name)
        if name.startswith("--") and "_" in name:
            spellings.append("--" + name[2:].replace("_", "-"))
    default = options.get("default")
    if not (default is None or default is False or default == "") and "default" not in help:
        help += " (default: %(default)s)"
    group.add_argument(*dict.fromkeys(spellings), help=help, **options)


def _choice(group: Any, *names: str, choices: Sequence[str], help: str, **options: Any) -> None:
    """Add a flag whose value is one of ``choices``."""
    listed = "{" + ",".join(choices) + "}"
    _flag(group, *names, type=one_of(choices), metavar=listed, help=help, **options)


def _network_flags(parser: Parser, archs: Sequence[str], defaults: Mapping[str, Any]) -> Any:
    """The flags that describe a network; an empty ``defaults`` leaves them to the checkpoint."""
    group = parser.add_argument_group("network")
    get = defaults.get
    _choice(group, "-a", "--arch", choices=archs, default=get("arch"), help="architecture")
    _flag(
        group,
        "--depth",
        type=integer(4, 1202),
        metavar="LAYERS",
        default=get("depth"),
        help="layers: resnet 6n+2 (Bottleneck 9n+2), wrn 6n+4; small_cnn has no choice",
    )
    _choice(
        group,
        "--block_name",
        choices=BLOCKS,
        default=get("block_name"),
        help="building block of resnet",
    )
    _flag(
        group,
        "--widen_factor",
        type=integer(1, 64),
        metavar="TIMES",
        default=get("widen_factor"),
        help="width of wrn, times 16 channels",
    )
    _flag(
        group,
        "--drop",
        "--dropout",
        type=fraction,
        metavar="SHARE",
        default=get("drop"),
        help="share of activations that dropout sets to zero (small_cnn, wrn)",
    )
    return group


def _device_flags(group: Any) -> None:
    _flag(
        group,
        "--gpu_id",
        type=gpu_ids,
        metavar="ID[,ID]",
        default="0",
        help="GPU number(s); without CUDA the command runs on MPS or the CPU and says so",
    )
    _flag(
        group,
        "--threads",
        type=integer(0, 1024),
        metavar="N",
        default=0,
        help="CPU threads of PyTorch; 0 = PyTorch's own choice",
    )


def _ball_flags(group: Any, epsilon: float) -> None:
    _choice(
        group,
        "--norm",
        choices=NORMS,
        default="l_inf",
        help="norm of the ball; the gradient is measured in the dual norm (l_inf: L1, l_2: L2)",
    )
    _flag(
        group,
        "--epsilon",
        type=pixel,
        metavar="RADIUS",
        default=epsilon,
        help="radius of the ball, in units of pixel intensity (pixels lie in [0, 1]); 8/255 works",
    )


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def add_training_options(parser: Parser, defaults: TrainingDefaults) -> None:
    """Add every flag of a training script to ``parser``."""
    data = parser.add_argument_group("data")
    _choice(
        data, "-d", "--dataset", choices=defaults.datasets, default=defaults.dataset, help="dataset"
    )
    _flag(
        data,
        "--data_dir",
        type=path,
        metavar="DIR",
        default="./data",
        help="where the data are or are downloaded to; also an image folder {train,test}/<class>/*",
    )
    _flag(
        data,
        "--nlabel",
        type=positive_int,
        metavar="SAMPLES",
        help="use the first N training samples only (default: all, 50000 on CIFAR)",
    )
    _flag(
        data,
        "--val_size",
        type=non_negative_int,
        metavar="SAMPLES",
        help="training samples held out to choose the best checkpoint; 0 = none "
        "(default: 1000, at most a tenth of the training set)",
    )
    _flag(
        data,
        "--augment",
        action="store_true",
        default=defaults.augment,
        help="random crop (padding 4 pixels) and horizontal flip "
        f"(default: {'on' if defaults.augment else 'off'})",
    )
    _flag(
        data,
        "--no_augment",
        action="store_false",
        dest="augment",
        default=defaults.augment,
        help="train on images as they are",
    )
    _flag(
        data,
        "-j",
        "--workers",
        type=integer(0, 256),
        metavar="THREADS",
        default=4,
        help="threads that decode an image folder; other datasets are held in memory",
    )

    network = _network_flags(
        parser,
        defaults.archs,
        {
            "arch": defaults.arch,
            "depth": defaults.depth,
            "block_name": "BasicBlock",
            "widen_factor": defaults.widen_factor,
            "drop": 0.0,
        },
    )
    _choice(
        network, "--activation", choices=ACTIVATIONS, default="relu", help="activation function"
    )
    _choice(
        network,
        "--norm_layer",
        choices=NORM_LAYERS,
        default="batch",
        help="normalisation layer of resnet and wrn",
    )

    optimisation = parser.add_argument_group("optimisation")
    _flag(
        optimisation,
        "--epochs",
        type=positive_int,
        metavar="N",
        default=defaults.epochs,
        help="passes over the training set",
    )
    _flag(
        optimisation,
        "--start_epoch",
        type=non_negative_int,
        metavar="N",
        default=0,
        help="epochs to leave out at the start; --resume sets it itself",
    )
    _flag(
        optimisation,
        "--train_batch",
        type=integer(1, 2**20),
        metavar="SAMPLES",
        default=128,
        help="batch size in training, over all processes",
    )
    _flag(
        optimisation,
        "--test_batch",
        type=integer(1, 2**20),
        metavar="SAMPLES",
        default=128,
        help="batch size in evaluation",
    )
    _choice(
        optimisation,
        "--optimizer_type",
        choices=OPTIMIZERS,
        default="SGD",
        help="optimizer; Adam ignores --momentum",
    )
    _flag(
        optimisation,
        "--lr",
        "--learning_rate",
        type=positive_float,
        metavar="RATE",
        default=defaults.lr,
        help="learning rate: the first one of step, the peak of cosine and onecycle",
    )
    _choice(
        optimisation,
        "--lr_schedule",
        choices=LR_SCHEDULES,
        default="step",
        help="course of the learning rate; step uses --schedule and --gamma",
    )
    _flag(
        optimisation,
        "--schedule",
        type=positive_int,
        nargs="+",
        metavar="EPOCH",
        default=list(defaults.schedule),
        help="epochs after which the learning rate is multiplied by --gamma",
    )
    _flag(
        optimisation,
        "--gamma",
        type=number(0, 1, open_low=True),
        metavar="FACTOR",
        default=0.1,
        help="factor of the learning rate at each --schedule epoch",
    )
    _flag(
        optimisation,
        "--momentum",
        type=fraction,
        metavar="SHARE",
        default=0.9,
        help="momentum of SGD",
    )
    _flag(
        optimisation,
        "--weight_decay",
        "--wd",
        type=non_negative_float,
        metavar="RATE",
        default=defaults.weight_decay,
        help="weight decay (L2 penalty on the weights)",
    )
    _flag(
        optimisation,
        "--ema",
        type=fraction,
        metavar="DECAY",
        default=0.0,
        help="decay per step of the averaged weights that are evaluated and saved as best; 0 = off",
    )
    _flag(optimisation, "--amp", action="store_true", help="bfloat16 autocast where it is safe")

    method = parser.add_argument_group("defense")
    _choice(
        method,
        "--defense",
        choices=DEFENSES,
        default="lfr",
        help="lfr; for comparison igr (input-gradient regularisation: LFR with 0 steps), "
        "at (PGD adversarial training), trades, none",
    )
    _ball_flags(method, defaults.epsilon)
    _flag(
        method,
        "--num_steps",
        type=integer(0, 100_000),
        metavar="N",
        default=defaults.num_steps,
        help=f"steps of the search for the sharpest point; 0 = the image itself "
        f"(default: %(default)s, --search fast {defaults.fast_num_steps})",
    )
    _flag(
        method,
        "--step_size",
        type=pixel,
        metavar="LENGTH",
        default=defaults.step_size,
        help=f"length of a step, in units of pixel intensity; 2/255 works "
        f"(default: %(default)s, --search fast {defaults.fast_step_size:g} at the default epsilon)",
    )
    _choice(
        method,
        "--search",
        choices=SEARCHES,
        default="paper",
        help="paper: second-order ascent in small steps; fast: the same flatness in fewer passes",
    )
    _flag(
        method,
        "--lambada",
        "--lambda",
        type=non_negative_float,
        metavar="WEIGHT",
        default=defaults.lambada,
        help="weight of the flatness in the loss; plays the role of epsilon "
        "(loss <= natural loss + epsilon x flatness)",
    )
    _flag(
        method,
        "--warmup",
        type=non_negative_float,
        metavar="EPOCHS",
        default=0.0,
        help="epochs over which lambada rises linearly from 0",
    )
    _flag(
        method,
        "--beta",
        type=non_negative_float,
        metavar="WEIGHT",
        default=6.0,
        help="weight of the robust term of trades",
    )
    _choice(
        method,
        "--bn_mode",
        choices=BN_MODES,
        default=defaults.bn_mode,
        help="which statistics BatchNorm uses in natural loss, search and penalty; "
        "mixed is the original's, see docs/failure_case.md",
    )

    watch = parser.add_argument_group("watching")
    _flag(
        watch,
        "--probe_size",
        type=non_negative_int,
        metavar="SAMPLES",
        default=500,
        help="held-out and test samples attacked by a short PGD after each epoch",
    )
    _flag(
        watch,
        "--probe_steps",
        type=integer(0, 100_000),
        metavar="N",
        default=10,
        help="steps of that PGD; 0 = no probe",
    )
    _flag(
        watch,
        "--image_interval",
        type=non_negative_int,
        metavar="EPOCHS",
        default=5,
        help="epochs between image grids in TensorBoard; 0 = none",
    )

    run = parser.add_argument_group("run")
    _flag(
        run,
        "--save_dir",
        type=path,
        metavar="DIR",
        default=".",
        help="the run folder is made below it, named after dataset, network and hyper-parameters",
    )
    _flag(
        run,
        "-c",
        "--checkpoint",
        type=path,
        metavar="DIR",
        default=".",
        help="use this very run folder; . = one below --save_dir",
    )
    _flag(
        run,
        "--resume",
        type=path,
        metavar="PATH",
        default="",
        help="checkpoint (or run folder) to go on from, with the same flags",
    )
    _flag(run, "--overwrite", action="store_true", help="start again in a folder that holds a run")
    _flag(
        run,
        "--ckpt_interval",
        type=non_negative_int,
        metavar="EPOCHS",
        default=defaults.ckpt_interval,
        help="epochs between the kept epochN.pth.tar; 0 = none",
    )
    _flag(
        run,
        "--save_minutes",
        type=non_negative_float,
        metavar="MINUTES",
        default=10.0,
        help="minutes between checkpoints within an epoch; 0 = at the end of epochs only",
    )
    _flag(
        run,
        "-e",
        "--evaluate",
        action="store_true",
        help="evaluate the checkpoint of --resume and leave",
    )
    _flag(
        run,
        "--manualSeed",
        "--manual_seed",
        type=integer(0, _LARGEST_SEED),
        metavar="SEED",
        default=1000,
        help="seed of weights, order, augmentation and search",
    )
    _flag(
        run,
        "--max_steps",
        type=non_negative_int,
        metavar="N",
        default=0,
        help="stop each epoch after N steps; 0 = whole epochs",
    )
    _flag(
        run,
        "--dry_run",
        action="store_true",
        help="one batch of every part, the run folder written, then leave",
    )
    _device_flags(run)


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
            ``num_steps`` and ``step_size`` follow ``search`` and ``defense``, ``checkpoint`` and
            ``resume`` become None when not given.
        defaults: the script's table.
        given: the flags that the user gave himself.

    Raises:
        UserError: flags that contradict each other.
    """
    given = frozenset(given)
    args.checkpoint = None if args.checkpoint in ("", ".") else args.checkpoint
    args.resume = None if args.resume in ("", ".") else args.resume
    if args.evaluate and args.resume is None:
        raise UserError("--evaluate needs --resume PATH, the checkpoint to evaluate")
    if args.resume and args.overwrite:
        raise UserError("--overwrite starts a run again and --resume goes on with it: give one")
    if not args.save_dir or not args.data_dir:
        name = "data_dir" if args.save_dir else "save_dir"
        raise UserError(f"--{name} is empty, allowed is a folder's name")

    _settle_schedule(args, given)
    _settle_search(args, defaults, given)
    _check_ball(args)
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


def _check_ball(args: argparse.Namespace) -> None:
    if args.norm == "l_inf" and args.epsilon > 1:
        raise UserError(
            f"--epsilon {args.epsilon:g} is wider than the pixels' range, allowed is 0 to 1 "
            f"with --norm l_inf ({args.epsilon:g}/255 = {args.epsilon / 255:.4g}?)"
        )


def _check_network(args: argparse.Namespace) -> None:
    """The depths that an architecture's blocks can make up; nothing where the depth is open."""
    if args.arch is None or args.depth is None:
        return
    bottleneck = args.block_name == "Bottleneck"
    period, rest = {"resnet": (9 if bottleneck else 6, 2), "wrn": (6, 4)}.get(args.arch, (1, 0))
    if args.depth % period != rest % period or args.depth < period + rest:
        examples = ", ".join(str(period * n + rest) for n in (1, 2, 3, 6, 9))
        block = f" of {args.block_name}" if args.arch == "resnet" else ""
        raise UserError(
            f"--depth {args.depth} does not suit {args.arch}{block}, "
            f"allowed is {period}n+{rest}: {examples}, ..."
        )


def _merge(
    parser: Parser, defaults: TrainingDefaults | EvaluationDefaults, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """All flags, what is given before ``defaults.when`` before the parser's defaults; and the given."""
    given = parser.parse_given(sys.argv[1:] if argv is None else argv)
    values = {**parser.defaults(), **given}
    for (flag, value), others in defaults.when.items():
        if values[flag] == value:
            values = {**values, **others, **given}
    return argparse.Namespace(**values), frozenset(given)


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


def add_evaluation_options(parser: Parser, defaults: EvaluationDefaults) -> None:
    """Add every flag of an evaluation script to ``parser``."""
    what = parser.add_argument_group("what is evaluated")
    _flag(
        what,
        "--model_path",
        type=path,
        metavar="FILE",
        required=True,
        help="checkpoint, of this repository or of the original implementation",
    )
    _choice(
        what, "-d", "--dataset", choices=defaults.datasets, default=defaults.dataset, help="dataset"
    )
    _flag(
        what,
        "--data_dir",
        type=path,
        metavar="DIR",
        default="./data",
        help="where the data are or are downloaded to; also an image folder {train,test}/<class>/*",
    )
    _flag(
        what,
        "--num_examples",
        type=positive_int,
        metavar="SAMPLES",
        help="attack the first N test images only (default: all)",
    )
    _flag(
        what,
        "-j",
        "--workers",
        type=integer(0, 256),
        metavar="THREADS",
        default=4,
        help="threads that decode an image folder",
    )

    attack = parser.add_argument_group("attack")
    _flag(
        attack,
        "--attack_method",
        type=one_of(ATTACKS, ["all"]),
        nargs="+",
        metavar="NAME",
        default=["PGD"],
        help=f"one or more of {', '.join(ATTACKS)}, or all, in any case (default: PGD)",
    )
    _ball_flags(attack, defaults.epsilon)
    _flag(
        attack,
        "--num_steps",
        type=integer(0, 100_000),
        metavar="N",
        help="steps of the attack (default: each attack's own)",
    )
    _flag(
        attack,
        "--step_size",
        type=pixel,
        metavar="LENGTH",
        help="length of a step, in units of pixel intensity; 2/255 works "
        "(default: each attack's own)",
    )
    _flag(
        attack,
        "--restarts",
        type=integer(1, 10_000),
        metavar="N",
        default=1,
        help="random starts per image of PGD and MPGD",
    )
    _flag(
        attack,
        "--seed",
        "--manualSeed",
        type=integer(0, _LARGEST_SEED),
        metavar="SEED",
        default=0,
        help="seed of the attacks' random choices",
    )
    _flag(
        attack,
        "--sanity",
        action="store_true",
        help="also look for signs of masked gradients and print the verdicts",
    )
    _flag(
        attack,
        "--transfer_from",
        type=path,
        metavar="FILE",
        default="",
        help="checkpoint of a network whose adversarial examples are tried on this one",
    )

    _network_flags(parser, defaults.archs, {})

    run = parser.add_argument_group("run")
    _flag(
        run,
        "--test_batch",
        type=integer(1, 2**20),
        metavar="SAMPLES",
        default=200,
        help="batch size; the result does not depend on it",
    )
    _flag(
        run,
        "--output",
        type=path,
        metavar="FILE",
        default="",
        help="write the results to this JSON file",
    )
    _device_flags(run)


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
    _check_ball(args)
    _check_network(args)
    if args.step_size is not None:
        _check_step(args)

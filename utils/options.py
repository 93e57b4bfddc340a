"""Command lines: kinds of values, a parser whose mistakes are one line, the flags of training.

A script brings one table of defaults; everything else is shared. A mistake ends in one line on
stderr, ``script: error: ...``, and exit code 2. ``--train-batch`` is understood as
``--train_batch``.
"""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from models import ACTIVATIONS, BLOCKS, NORM_LAYERS
from utils.defenses import DEFENSES
from utils.engine import LR_SCHEDULES
from utils.errors import UserError, printable
from utils.lfr import BN_MODES, NORMS, SEARCHES

OPTIMIZERS = ("SGD", "Adam")
# The type of a flag's value, text -> value or ArgumentTypeError, and its word in the help.
Kind = tuple[Callable[[str], Any], str]


def _refuse(text: str, allowed: str) -> NoReturn:
    """Say what was given, shortened, and what is allowed."""
    quoted = repr(text if len(text) <= 60 else text[:57] + "...")
    raise argparse.ArgumentTypeError(f"got {quoted}, allowed is {allowed}")


def integer(word: str, low: int = 0, high: int = 10**9) -> Kind:
    """A whole number in [low, high]."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text.strip()) or not low <= int(text) <= high:
            up = f"to {high}" if high < 10**9 else "up"
            _refuse(text, f"a whole number from {low} {up}")
        return int(text)

    return convert, word


def number(
    word: str, low: float = 0, high: float = math.inf, above: bool = False, below: bool = False
) -> Kind:
    """A finite number in [low, high], such as ``8/255``; ``above``, ``below``: exclude that end."""
    allowed = f"a finite number {'above' if above else 'at least'} {low:g}"
    allowed += f" and {'below' if below else 'at most'} {high:g}" if high < math.inf else ""

    def convert(text: str) -> float:
        try:
            over, _, under = text.partition("/")
            value = float(over) / float(under or 1) + 0.0  # -0.0 becomes 0.0
        except (ValueError, ZeroDivisionError):
            value = math.nan
        inside = low <= value <= high and abs(value) < 3e38  # finite as float32, too
        if not inside or (above and value == low) or (below and value == high):
            _refuse(text, allowed)
        return value

    return convert, word


def one_of(*names: str) -> Kind:
    """One of ``names``, whatever its case, ``-`` or ``_``; returned as listed."""

    def plain(name: str) -> str:
        return re.sub(r"[-_ ]", "", name).lower()

    def convert(text: str) -> str:
        found = [name for name in names if plain(name) == plain(text)]
        return found[0] if found else _refuse(text, ", ".join(names))

    return convert, "{" + ",".join(names) + "}"


def _path(text: str) -> str:
    """A file or folder name, ``~`` resolved."""
    expanded = os.path.expanduser(text)
    if not text or expanded.startswith("~"):
        _refuse(text, "a file or folder name")
    return expanded


def _gpu_ids(text: str) -> str:
    """``"0"`` or ``"0,1"``: GPU numbers, each once."""
    numbers = [int(n) for n in text.split(",")] if re.fullmatch(r"\d+(, ?\d+)*", text) else []
    if not 0 < len({*numbers}) == len(numbers):
        _refuse(text, "GPU numbers separated by commas, each once: 0 or 0,1")
    return ",".join(map(str, numbers))


PATH: Kind = (_path, "PATH")
# "." is the original's word for none.
OPTIONAL: Kind = (lambda text: None if text in ("", ".") else _path(text), "PATH")
N, SAMPLES, EPOCHS = integer("N"), integer("SAMPLES"), integer("EPOCHS")
BATCH, STEPS = integer("SAMPLES", 1, 2**20), integer("N", 0, 100_000)
SEED = integer("SEED", 0, 2**32 - 1)
WEIGHT, SHARE = number("WEIGHT"), number("SHARE", 0, 1, below=True)
LENGTH = number("PIXELS")
# Training flags that count only with some values of another flag.
COUNTS_WITH = {
    "schedule": ("lr_schedule", "step"),
    "gamma": ("lr_schedule", "step"),
    "momentum": ("optimizer_type", "SGD"),
    "lambada": ("defense", "lfr igr"),
    "bn_mode": ("defense", "lfr igr"),
    "warmup": ("defense", "lfr igr"),
    "epsilon_warmup": ("defense", "lfr at trades"),
    "at_start": ("defense", "lfr igr trades none"),
    "beta": ("defense", "trades"),
    "depth": ("arch", "resnet wrn"),
    "block_name": ("arch", "resnet"),
    "widen_factor": ("arch", "wrn"),
    "drop": ("arch", "small_cnn wrn"),
    "norm_layer": ("arch", "resnet preact_resnet wrn"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that knows which flags were given, and whose errors are one line."""

    def __init__(self, description: str) -> None:
        wide = partial(argparse.HelpFormatter, max_help_position=34, width=100)
        super().__init__(description=description, formatter_class=wide, allow_abbrev=False)
        self.fallback: dict[str, Any] = {}  # by destination, the value of a flag that is not given
        # argparse takes -8/255, -1e-3 or -inf for flags and then misses a value; taking them for
        # values gives the better message: which flag, what was given, what is allowed.
        self._negative_number_matcher = re.compile(r"^-(\.?\d|inf\b|nan\b)", re.IGNORECASE)

    def group(self, title: str) -> Callable[..., None]:
        """A function that adds flags under a title: names, default, kind, help."""
        group = self.add_argument_group(title)

        def add(names: str, default: Any, kind: Kind | None, help: str, **options: Any) -> None:
            if default not in (None, "", False) and "(default" not in help:
                words = default if isinstance(default, list) else [default]
                help += f" (default: {' '.join(map(str, words))})"
            if kind is None:
                options = {"action": "store_true", **options}
            else:
                options |= {"type": kind[0], "metavar": kind[1]}
            options |= {"help": help, "default": argparse.SUPPRESS}
            self.fallback.setdefault(group.add_argument(*names.split(), **options).dest, default)

        return add

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        # "argument --lr/--learning_rate: ..." -> "--lr: ..."
        message = re.sub(r"^argument (?:-\w/)?(--[^/:]*)(?:/\S+)*:", r"\1:", message)
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values that the command line holds, by destination."""
        names = re.compile("^--[^=]*")  # with "-" or "_"
        argv = [names.sub(lambda m: "--" + m[0][2:].replace("-", "_"), word, 1) for word in argv]
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            name, flags = unknown[0].partition("=")[0], [*self._option_string_actions]
            close = [flag for flag in flags if name.startswith("--") and flag.startswith(name)]
            close = close or difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the flags"
            self.error(f"{unknown[0][:60]!r} is not understood; {hint}")
        for name in (name for name, value in vars(namespace).items() if value == []):
            self.error(f"--{name}: expected a value")  # what argparse makes of --name=--
        return vars(namespace)

    def words(self, values: Mapping[str, Any], without: Iterable[str] = ()) -> list[str]:
        """The command line that gives these values; what the parser does not know is left out."""
        found: list[str] = []
        for action in self._actions:
            value = values.get(action.dest)
            if action.dest in without or value is None or value == []:
                continue
            name = next(name for name in action.option_strings if name.startswith("--"))
            if isinstance(value, bool):
                found += [name] if value is action.const else []
            else:
                found += [name, *map(str, value if isinstance(value, list) else [value])]
        return found

    def settle(self, given: Mapping[str, Any], when: Mapping[tuple, Any]) -> argparse.Namespace:
        """All flags: what is given goes before ``when``, and that before the fallbacks.

        ``when``: (flag, value, ...) -> {flag: default}, where these values ask for others.
        """
        values = {**self.fallback, **given}
        for pairs, others in when.items():
            if all(values[flag] == value for flag, value in zip(pairs[::2], pairs[1::2])):
                values = {**values, **others, **given}
        return argparse.Namespace(**values)


# Flags that training and evaluation share. Each `add` is: names, default, kind, help.
# fmt: off
def add_data_flags(parser: Parser, title: str, table: Mapping[str, Any]) -> Callable[..., None]:
    """``--dataset``, ``--data_dir``; returns the group, for more."""
    add = parser.group(title)
    add("-d --dataset", table.get("dataset"), one_of(*table["datasets"]), "dataset")
    add("--data_dir", "./data", PATH, "folder where the data are or are downloaded to; also an "
        "image folder {train,test}/<class>/*")
    return add


def add_network_flags(parser: Parser, title: str, table: Mapping[str, Any]) -> Callable[..., None]:
    """The flags that describe a network; what ``table`` lacks is left to the checkpoint."""
    add, get = parser.group(title), table.get
    add("-a --arch", get("arch"), one_of(*table["archs"]), "architecture")
    add("--depth", get("depth"), integer("LAYERS", 4, 1202), "layers: resnet 6n+2, wrn 6n+4")
    add("--block_name", get("block_name"), one_of(*BLOCKS), "building block of resnet")
    add("--widen_factor", get("widen_factor"), integer("TIMES", 1, 64), "width of wrn by 16")
    add("--drop --dropout", get("drop"), SHARE, "share of activations dropped (small_cnn, wrn)")
    add("--activation", get("activation"), one_of(*ACTIVATIONS), "activation function")
    return add


def add_ball_flags(add: Callable[..., None], table: Mapping[str, Any]) -> None:
    """``--norm``, ``--epsilon``."""
    add("--norm", table.get("norm"), one_of(*NORMS),
        "norm of the ball; the gradient is measured in its dual (l_inf: L1, l_2: L2)")
    add("--epsilon", table.get("epsilon"), LENGTH,
        "radius of the ball, in units of pixel intensity (pixels lie in [0, 1]); 8/255 works")


def add_device_flags(add: Callable[..., None]) -> None:
    """``--gpu_id``, ``--threads``."""
    add("--gpu_id", "0", (_gpu_ids, "ID[,ID]"),
        "GPU number(s); without CUDA the command runs on MPS or the CPU and says so")
    add("--threads", 0, integer("N", 0, 1024), "CPU threads; 0 = PyTorch's own choice")


def training_parser(table: Mapping[str, Any], description: str) -> Parser:
    """The parser of a training script; ``table`` holds what the scripts differ in."""
    get, parser = table.get, Parser(description)
    add = add_data_flags(parser, "data", table)
    add("-j --workers", None, integer("N", 0, 256), "ignored: the data are in memory")
    add("--nlabel", None, integer("SAMPLES", 1), "use the first N training samples (default: all)")
    add("--val_size", None, SAMPLES, "training samples held out to choose the best checkpoint; "
        "0 = none (default: 1000, at most a tenth)")
    add("--augment", get("augment"), None, "random crop and, where the classes allow it, "
        f"horizontal flip (default: {'on' if get('augment') else 'off'})")
    add("--no_augment", None, None, "train on images as they are",
        dest="augment", action="store_false")

    add = add_network_flags(parser, "network", table)
    add("--norm_layer", "batch", one_of(*NORM_LAYERS), "normalisation of all but small_cnn")

    add = parser.group("optimisation")
    add("--epochs", 100, integer("N", 1), "passes over the training set")
    add("--start_epoch", 0, N, "epochs to leave out at the start; --resume sets it itself")
    add("--train_batch", 128, BATCH, "batch size in training, over all processes")
    add("--test_batch", 128, BATCH, "batch size in evaluation")
    add("--optimizer_type", "SGD", one_of(*OPTIMIZERS), "optimizer; Adam ignores --momentum")
    add("--lr --learning_rate", get("lr"), number("RATE", above=True), "highest learning rate")
    add("--lr_schedule", "step", one_of(*LR_SCHEDULES),
        "course of the learning rate; step uses --schedule and --gamma")
    add("--schedule", list(get("schedule")), integer("EPOCH", 1),
        "epochs after which the learning rate is multiplied by --gamma", nargs="+")
    add("--gamma", 0.1, number("FACTOR", 0, 1, above=True), "factor of --schedule")
    add("--momentum", 0.9, SHARE, "momentum of SGD")
    add("--weight_decay --wd", get("weight_decay"), number("RATE"), "L2 penalty on the weights")
    add("--clip_grad", 0.0, number("NORM"),
        "scale a loss gradient down to this L2 norm, over all weights; 0 = off")
    add("--ema", 0.0, SHARE, "publish averaged weights, of this decay per step; 0 = off")
    add("--amp", False, None, "bfloat16 autocast where it is safe")

    add = parser.group("defense")
    add("--defense", "lfr", one_of(*DEFENSES), "lfr; for comparison igr (input-gradient "
        "regularisation: lfr with 0 steps), at (PGD adversarial training), trades, none")
    add_ball_flags(add, table)
    add("--num_steps", get("num_steps"), STEPS, "steps of the inner maximisation; 0 = the image "
        f"itself (default: {get('num_steps')}, --search fast {get('fast_num_steps')})")
    add("--step_size", get("step_size"), LENGTH, "length of a step, in units of pixel intensity "
        f"(default: {get('step_size')}, --search fast {get('fast_step'):g} x epsilon)")
    add("--search", "paper", one_of(*SEARCHES), "paper: second-order ascent of the gradient norm "
        "in small steps; fast: ascent of the loss, the same flatness in fewer passes")
    add("--lambada --lambda", get("lambada"), WEIGHT, "weight of the flatness in the loss")
    add("--warmup", 0.0, number("EPOCHS"), "epochs over which lambada rises linearly from 0")
    add("--epsilon_warmup", 0.0, number("EPOCHS"),
        "epochs over which epsilon, and the step with it, rise linearly from 0")
    add("--at_start", 0.0, SHARE, "first share of the steps, which train by at")
    add("--beta", 6.0, WEIGHT, "weight of the robust term of trades")
    add("--bn_mode", "shared", one_of(*BN_MODES),
        "statistics of BatchNorm; mixed is the original's, see docs/failure_case.md")

    add = parser.group("monitoring")
    add("--probe_size", 500, SAMPLES,
        "held-out and test samples attacked by a short PGD after each epoch; 0 = no probe")
    add("--probe_steps", 10, integer("N", 1, 100_000), "steps of that PGD")
    add("--probe_epsilon", None, LENGTH, "its radius, in pixel intensity (default: --epsilon)")
    add("--image_interval", 5, EPOCHS, "epochs between image grids in TensorBoard; 0 = none")

    add = parser.group("run")
    add("--save_dir", ".", PATH, "where the run folder is made, named after its hyper-parameters")
    add("-c --checkpoint", None, OPTIONAL, "use this run folder (default: one below --save_dir)")
    add("--resume", None, OPTIONAL, "checkpoint or run folder to resume, with the flags that it "
        "states unless given anew; auto = the run folder's own, if there is one")
    add("--pretrained", None, OPTIONAL, "network (or run folder, its best one) whose weights a new "
        "run begins with; optimizer and epochs start anew")
    add("--overwrite", False, None, "start again in a folder that holds a run")
    add("--force", False, None, "resume although the checkpoint states other data")
    add("--ckpt_interval", get("ckpt_interval"), EPOCHS, "epochs between epochN.pth.tar; 0 = none")
    add("--save_minutes", 10.0, number("MINUTES"),
        "minutes between checkpoints within an epoch; 0 = at the end of epochs only")
    add("-e --evaluate", False, None, "evaluate the checkpoint of --resume and leave")
    add("--manualSeed --manual_seed", 1000, SEED, "seed of weights, order, augmentation, search")
    add("--max_steps", 0, N, "stop each epoch after N steps; 0 = whole epochs")
    add("--dry_run", False, None, "one training step, then an epoch's measurements and files")
    add_device_flags(add)
    return parser
# fmt: on


def settle_training(
    parser: Parser, table: Mapping[str, Any], given: Mapping[str, Any]
) -> argparse.Namespace:
    """All flags of a training, the dependent ones settled; UserError where they contradict."""
    args = parser.settle(given, table["when"])
    if args.evaluate and args.resume is None:
        raise UserError("--evaluate needs --resume PATH, the checkpoint to evaluate")
    if args.resume and args.overwrite:
        raise UserError("--overwrite starts a run again and --resume goes on with it: give one")
    if args.dry_run:
        args.epochs, args.max_steps, args.schedule, args.start_epoch = 1, 1, [], 0
        args.probe_size = min(args.probe_size, args.train_batch)
    if "schedule" not in given or args.lr_schedule != "step":
        args.schedule = [epoch for epoch in args.schedule if epoch <= args.epochs]
    if args.schedule != sorted(set(args.schedule)) or max(args.schedule, default=0) > args.epochs:
        text = f"--schedule {' '.join(map(str, args.schedule))}"
        raise UserError(f"{text}: allowed are rising numbers up to --epochs {args.epochs}")
    if args.search == "fast":
        args.num_steps = given.get("num_steps", table["fast_num_steps"])
        args.step_size = given.get("step_size", table["fast_step"] * args.epsilon)
    if args.defense == "igr" and not args.at_start:  # whose steps they would be
        if given.get("num_steps"):
            raise UserError(f"--num_steps {args.num_steps}: --defense igr is lfr with 0 steps")
        args.num_steps = 0
    # These also decide from which epoch on the best is chosen.
    for name in ("warmup", "epsilon_warmup", "at_start"):
        if args.dry_run or args.defense not in COUNTS_WITH[name][1].split():
            setattr(args, name, 0.0)
    args.probe_epsilon = args.epsilon if args.probe_epsilon is None else args.probe_epsilon
    check_ball(args, "epsilon", "probe_epsilon")
    if args.start_epoch >= args.epochs and not args.evaluate:
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of --epochs {args.epochs}")
    for name, start in {"warmup": args.at_start, "epsilon_warmup": 0}.items():
        if start * args.epochs + (length := getattr(args, name)) > args.epochs + 1e-6:
            behind = f" after --at_start {start:g}" if start else ""
            raise UserError(f"--{name} {length:g} is longer than --epochs {args.epochs}{behind}")
    return args


def check_ball(args: argparse.Namespace, *names: str) -> None:
    """Refuse steps of no length, and an l_inf radius wider than the pixels' range."""
    if args.step_size == 0 and args.num_steps != 0 and args.epsilon != 0:
        raise UserError("--step_size 0 moves nothing, allowed is a length above 0")
    for name in names:
        radius = getattr(args, name)
        if args.norm == "l_inf" and radius is not None and radius > 1:
            wide = f"--{name} {radius:g} is wider than the pixels' range, allowed is 0 to 1"
            raise UserError(f"{wide} with --norm l_inf ({radius:g}/255 = {radius / 255:.4g}?)")


def unused_flags(args: argparse.Namespace, given: Iterable[str]) -> list[str]:
    """One note for each given flag that does nothing, for the value of another one."""
    notes = []
    for name in COUNTS_WITH.keys() & set(given):
        other, values = COUNTS_WITH[name]
        if (value := getattr(args, other)) not in values.split():
            counts = f"it counts with {values.replace(' ', ', ')}"
            notes.append(f"--{name} is not used with --{other} {value}; {counts}")
    return sorted(notes)


def doubtful_steps(norm: str, epsilon: float, num_steps: int, step_size: float) -> list[str]:
    """One note for each setting of an ascent that makes little sense."""
    notes, steps = [], f"{num_steps} x {step_size:.4g}"
    if num_steps and step_size > 2 * epsilon:
        notes.append(f"steps of {steps} are longer than the ball is wide, epsilon {epsilon:.4g}")
    elif 0 < num_steps * step_size < epsilon:
        notes.append(f"steps of {steps} do not reach the edge of the ball, epsilon {epsilon:.4g}")
    if norm == "l_2" and epsilon and not 0.3 < epsilon < 20:
        notes.append(f"epsilon {epsilon:.4g} in l_2: usual are 0.5 (colour), 1.5 (grey)")
    if norm == "l_inf" and epsilon > 1:
        notes.append(f"epsilon {epsilon:.4g} is wider than the pixels' range")
    return notes

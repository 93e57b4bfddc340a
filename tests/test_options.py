"""The command lines: published commands, units, ranges, and that no input ends in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import math
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cifar_defense
import MNIST_defense
from models import MODELS
from utils.errors import UserError
from utils.options import doubtful_steps, settle_training, training_parser, unused_flags

MNIST, CIFAR = MNIST_defense.DEFAULTS, cifar_defense.DEFAULTS


def parser_of(table=MNIST):
    parser = training_parser(table, "A script.")
    parser.prog = "script.py"
    return parser


def parse(table, words):
    parser = parser_of(table)
    try:
        return settle_training(parser, table, parser.given(words))
    except UserError as error:
        parser.error(str(error))


def train(line, table=MNIST):
    return parse(table, shlex.split(line))


def mistake(parse, line):
    """The one line that a wrong command line ends in."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        parse(line)
    text = stderr.getvalue()
    assert end.value.code == 2
    assert text.startswith("script.py: error: ")
    assert text.count("\n") == 1 and text.endswith("\n")
    return text


def test_published_mnist_command():
    args = train(
        "--dataset MNIST --epochs 100 --lr 0.01 --gamma 0.1 --train_batch 128 --norm 'l_inf' "
        "--epsilon 0.3 --step_size 0.01 --num_steps 40 --lambada 0.02 --gpu_id 1 "
        "--save_dir SavedModels"
    )
    assert (args.gpu_id, args.save_dir) == ("1", "SavedModels")
    # The command states the defaults, apart from those two.
    without = {k: v for k, v in vars(args).items() if k not in ("gpu_id", "save_dir")}
    plain = vars(train(""))
    assert without == {k: plain[k] for k in without}
    assert (args.norm, args.epsilon, args.num_steps, args.step_size) == ("l_inf", 0.3, 40, 0.01)
    assert (args.schedule, args.gamma, args.momentum, args.manualSeed) == ([90], 0.1, 0.9, 1000)
    assert (args.search, args.defense, args.ckpt_interval) == ("paper", "lfr", 10)


@pytest.mark.parametrize(
    ("defaults", "published"),
    [
        (
            MNIST,
            {
                "dataset": "MNIST",
                "drop": 0,
                "schedule": [90],
                "lr": 0.01,
                "weight_decay": 0,
                "epsilon": 0.3,
                "num_steps": 40,
                "step_size": 0.01,
                "lambada": 0.02,
                "ckpt_interval": 10,
            },
        ),
        (
            CIFAR,
            {
                "dataset": "cifar10",
                "block_name": "BasicBlock",
                "widen_factor": 6,
                "drop": 0,
                "schedule": [75, 90, 100],
                "lr": 0.1,
                "weight_decay": 2e-4,
                "epsilon": 0.031,
                "num_steps": 10,
                "step_size": 0.007,
                "ckpt_interval": 5,
                # Other than the original's, whose own commands need them: its wrn-28, its 1.0.
                "arch": "resnet",
                "depth": 20,
                "lambada": 0.03,
            },
        ),
    ],
)
def test_published_defaults(defaults, published):
    published = published | {
        "epochs": 100,
        "start_epoch": 0,
        "gamma": 0.1,
        "train_batch": 128,
        "test_batch": 128,
        "workers": None,
        "momentum": 0.9,
        "optimizer_type": "SGD",
        "norm": "l_inf",
        "manualSeed": 1000,
        "gpu_id": "0",
        "save_dir": ".",
        "evaluate": False,
    }
    args = vars(train("", defaults))
    assert {name: args[name] for name in published} == published


def test_published_cifar_command():
    args = train(
        "-a resnet --depth 20 --epochs 300 --schedule 150 250 --lambada 0.03 --gpu_id 3 "
        "--save_dir SavedModels",
        CIFAR,
    )
    assert (args.arch, args.depth, args.epochs, args.schedule) == ("resnet", 20, 300, [150, 250])
    assert (args.lr, args.weight_decay, args.epsilon) == (0.1, 2e-4, 0.031)
    assert args.augment is True


@pytest.mark.parametrize(
    "line",
    [
        "--train-batch 7 --learning-rate 0.2 --wd 0.3 --lambda 0.4 --manual-seed 5 --data-dir x",
        "--train_batch 7 --learning_rate 0.2 --weight-decay 0.3 --lambada 0.4 --manualSeed 5 "
        "--data_dir x",
        "--train_batch=7 --lr=0.2 --weight_decay=0.3 --lambada=0.4 --manual_seed=5 --data_dir=x",
    ],
)
def test_spellings(line):
    args = train(line)
    assert (args.train_batch, args.lr, args.weight_decay, args.lambada) == (7, 0.2, 0.3, 0.4)
    assert (args.manualSeed, args.data_dir) == (5, "x")


def test_pixel_units():
    args = train("--epsilon 8/255 --step_size 2/255")
    assert (args.epsilon, args.step_size) == (8 / 255, 2 / 255)


def test_flags_that_do_nothing_do_not_restrict_the_choice_of_the_best_epoch():
    """Epochs of the start by at and of the warmup are not chosen: see `_Training._epochs`."""
    args = train("--defense at --warmup 3 --at_start 0.5 --epsilon_warmup 3")
    assert args.warmup == args.at_start == 0 and args.epsilon_warmup == 3
    assert train("--defense igr --warmup 3 --epsilon_warmup 3").epsilon_warmup == 0
    args = train("--defense trades --warmup 3 --at_start 0.5")
    assert (args.warmup, args.at_start) == (0, 0.5)


def test_warmup_may_fill_what_the_start_by_at_leaves():
    assert train("--epochs 10 --at_start 2/3 --warmup 10/3").warmup == 10 / 3


def test_names_in_any_case():
    args = train("-d mnist --norm L2 --optimizer_type sgd --search FAST --block_name basicblock")
    assert (args.dataset, args.norm, args.optimizer_type) == ("MNIST", "l_2", "SGD")
    assert (args.search, args.block_name) == ("fast", "BasicBlock")


def test_defaults_that_depend_on_other_flags():
    assert train("-d SVHN").arch == "wrn"
    assert train("-d SVHN -a small_cnn").arch == "small_cnn"
    for flags, table in (("-d SVHN --norm l_2", MNIST), ("--norm l_2", CIFAR)):  # colour
        args = train(flags, table)
        assert (args.epsilon, args.step_size, args.lambada) == (0.5, 0.125, 0.5)
    assert train("-a wrn", CIFAR).depth == 28
    assert train("--epochs 80", CIFAR).schedule == [75]
    assert train("--epochs 3").schedule == []
    assert train("--no-augment", CIFAR).augment is False
    assert train("--augment").augment is True
    assert train("--no_augment", CIFAR).augment is False
    assert train("--defense igr").num_steps == 0
    assert train("--resume . --checkpoint .").resume is None
    assert train("-e --resume run").resume == "run"


@pytest.mark.parametrize(
    ("table", "steps", "size", "epsilon"), [(MNIST, 4, 0.15, 0.3), (CIFAR, 2, 0.062, 0.031)]
)
def test_fast_search(table, steps, size, epsilon):
    def fast(line):
        args = train(f"--search fast {line}", table)
        return args.num_steps, args.step_size

    assert fast("") == (steps, pytest.approx(size))
    assert fast(f"--epsilon {epsilon / 3}") == (steps, pytest.approx(size / 3))
    assert fast("--num_steps 5 --step_size 0.02") == (5, 0.02)
    assert fast("--defense igr") == (0, pytest.approx(size))


@pytest.mark.parametrize(("table", "epsilon", "steps"), [(MNIST, 1.5, 40), (CIFAR, 0.5, 10)])
def test_each_norm_has_defaults_of_its_own(table, epsilon, steps):
    """l_inf's radius and weight make no sense in l_2; the steps reach the edge of the ball."""
    plain, args = train("", table), train("--norm l_2", table)
    assert args.epsilon == args.probe_epsilon == epsilon and args.num_steps == steps
    assert args.num_steps * args.step_size > args.epsilon and args.lambada > plain.lambada
    assert train("--norm l_2 --epsilon 0.25", table).epsilon == 0.25
    assert not doubtful_steps("l_2", args.epsilon, args.num_steps, args.step_size)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("l_inf", 0.3, 40, 0.01), []),
        (("l_inf", 0.3, 40, 0.001), ["40 x 0.001 do not reach"]),
        (("l_inf", 0.3, 4, 2.0), ["4 x 2 are longer"]),
        (("l_2", 0.03, 4, 0.01), ["0.03 in l_2: usual are"]),
        (("l_2", 128, 4, 64), ["128 in l_2: usual are"]),
        (("l_2", 0, 4, 1), ["4 x 1 are longer"]),
        (("l_inf", 8, 4, 4), ["8 is wider than the pixels"]),
        (("l_inf", 0.3, 0, 2.0), []),
    ],
)
def test_settings_that_make_no_sense_are_noted(settings, says):
    notes = doubtful_steps(*settings)
    assert len(notes) == len(says) and all(part in note for part, note in zip(says, notes))


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("--lambada 0.1 --bn_mode mixed --momentum 0.5 --gamma 0.5 --drop 0.1", []),
        ("--defense at --lambada 0.1 --bn_mode mixed", ["bn_mode", "lambada"]),
        ("--defense igr --lambada 0.1 --beta 3", ["beta"]),
        ("--defense trades --beta 3 --at_start 0.5 --warmup 3", ["warmup"]),
        ("--defense at --at_start 0.5 --warmup 3", ["at_start", "warmup"]),
        ("--defense none --epsilon_warmup 3", ["epsilon_warmup"]),
        ("--optimizer_type Adam --momentum 0.5", ["momentum"]),
        ("--schedule 5 9 200 --lr_schedule cosine --gamma 0.5", ["gamma", "schedule"]),
    ],
)
def test_given_flags_that_do_nothing_are_noted(line, unused):
    parser = parser_of()
    typed = parser.given(line.split())
    notes = unused_flags(settle_training(parser, MNIST, typed), typed)
    assert [note.split()[0] for note in notes] == [f"--{name}" for name in unused]


@pytest.mark.parametrize("arch", MODELS)
def test_the_flags_that_an_architecture_uses(arch):
    """As its function takes them."""
    flags = {"depth", "block_name", "widen_factor", "drop", "activation", "norm_layer"}
    args = argparse.Namespace(arch=arch)
    unused = {note.split()[0][2:] for note in unused_flags(args, flags)}
    assert unused == flags - inspect.signature(MODELS[arch]).parameters.keys()


def test_a_checkpoint_s_flags_as_a_command_line():
    """What a run was given is given again, whatever the kind of value."""
    line = "--lr 0.2 --schedule 5 7 --amp --no_augment --norm l_2 --epochs 9 --nlabel 100"
    parser = parser_of(CIFAR)
    given = parser.given(line.split())
    assert parser.given(parser.words(given)) == given
    assert parser.words({"lr": 0.5, "unknown": 3, "schedule": [], "epochs": None}) == [
        "--lr",
        "0.5",
    ]
    assert parser.words(given, without=["lr", "schedule"])[:1] != ["--lr"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--epsilon -0.1", ["--epsilon", "-0.1", "at least 0"]),
        ("--probe_epsilon 8", ["--probe_epsilon", "8", "0 to 1"]),
        ("--epsilon -8/255", ["--epsilon", "-8/255"]),
        ("--epsilon nan", ["--epsilon", "nan"]),
        ("--epsilon 1e400", ["--epsilon", "finite"]),
        ("--epsilon 8", ["--epsilon", "0 to 1", "0.03137"]),
        ("--epsilon 1/0", ["--epsilon", "1/0"]),
        ("--lambada nan", ["--lambada", "nan", "finite"]),
        ("--lambada -inf", ["--lambada", "-inf"]),
        ("--train_batch 0", ["--train_batch", "'0'", "from 1"]),
        ("--test-batch -3", ["--test_batch", "-3"]),
        ("--epochs 0", ["--epochs", "from 1"]),
        ("--epochs 1.5", ["--epochs", "1.5"]),
        ("--lr 0", ["--lr", "above 0"]),
        ("--momentum 1", ["--momentum", "below 1"]),
        ("--drop 1", ["--drop", "below 1"]),
        ("--dataset MNSIT", ["--dataset", "MNSIT", "FashionMNIST"]),
        ("--norm l1", ["--norm", "l1", "l_inf, l_2"]),
        ("-a small_cn", ["--arch", "small_cn", "small_cnn, resnet"]),
        ("--optimizer_type RMS", ["--optimizer_type", "SGD, Adam"]),
        ("--epoch 3", ["--epoch", "did you mean --epochs?"]),
        ("--lr 1e39", ["--lr: got '1e39'", "a finite number"]),
        ("--probe_epsilon=--", ["--probe_epsilon", "expected a value"]),
        ("--eps 0.3", ["--eps", "did you mean --epsilon?"]),
        ("--probe_steps 0", ["--probe_steps", "from 1"]),
        ("--save_dir ~nosuchuser/x", ["--save_dir", "~nosuchuser"]),
        ("3", ["'3' is not understood"]),
        ("--schedule 5 200", ["--schedule 5 200", "up to --epochs 100"]),
        ("--schedule 90 50", ["--schedule 90 50", "rising"]),
        ("--schedule 50 50", ["--schedule 50 50", "rising"]),
        ("--schedule 0 50", ["--schedule", "'0'"]),
        ("--schedule", ["--schedule", "expected at least one argument"]),
        ("--start_epoch 100", ["--start_epoch 100", "--epochs 100"]),
        ("--warmup 101", ["--warmup", "--epochs 100"]),
        ("--epsilon_warmup 11 --epochs 10 --at_start 0.9", ["--epsilon_warmup 11", "--epochs 10"]),
        ("--warmup 11 --at_start 0.9", ["--warmup 11", "--epochs 100 after --at_start 0.9"]),
        ("--step_size 0", ["--step_size 0"]),
        ("--defense igr --num_steps 3", ["--num_steps 3", "igr"]),
        ("-e", ["--evaluate", "--resume"]),
        ("--resume x --overwrite", ["--overwrite", "--resume"]),
        ("--gpu_id a", ["--gpu_id", "'a'"]),
        ("--gpu_id 0,0", ["--gpu_id", "once"]),
        ("--gpu_id -1", ["--gpu_id", "-1"]),
        ("--manualSeed -1", ["--manualSeed", "-1"]),
        ("--save_dir ''", ["--save_dir", "got ''"]),
        ("--lr", ["--lr", "expected one argument"]),
        ("--amp=yes", ["--amp", "yes"]),
    ],
)
def test_mistakes_in_training(line, parts):
    text = mistake(train, line)
    for part in parts:
        assert part in text


def test_help_names_every_flag_its_unit_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        train("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for piece in (
        "--epsilon PIXELS radius of the ball, in units of pixel intensity",
        "(default: 0.3)",
        "--lambda WEIGHT",
        "--schedule EPOCH [EPOCH ...]",
        "(default: 90)",
    ):
        assert piece in text
    for action in parser_of()._actions:
        assert action.help
        assert action.option_strings[0] in text


# ---------------------------------------------------------------------------------------------
# Any command line at all
# ---------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.integers(-3, 300).map(str),
    st.integers().map(str),
    st.floats(width=32).map(str),
    st.floats(0, 1).map(lambda value: f"{value:.4f}"),
    st.sampled_from(
        """8/255 1/0 0/0 nan -inf 1e400 0x10 1_000 -1 -0 +3 . .. / - -- -h -e -x --resume=x =  =3
        l_inf l_2 L2 MNIST cifar10 digits wrn resnet 20 28 PGD all fast paper igr trades cosine
        0,1 0,0 , 0, none batch SGD adam ../x é ٣ ½ %s %(default)s {} {0}""".split()
    ),
    st.sampled_from(
        ["", " ", "\n", "a\nb", "\r", "\0", "\x1b[2J", "\u2028", "x" * 5000, "1" * 5000, "\udc80"]
    ),
    st.text(max_size=12),
)


PLAUSIBLE = """0 1 2 3 10 20 28 50 90 150 0.01 0.5 0.9 8/255 0,1 x ./data l_inf l_2 MNIST mnist
    SVHN digits cifar10 small_cnn resnet wrn Bottleneck SGD Adam step cosine onecycle constant lfr
    igr at trades none paper fast shared mixed silu group PGD FGSM pointwise all""".split()


def accepted(action):
    """The plausible words that a flag takes."""
    words = []
    for word in PLAUSIBLE:
        with contextlib.suppress(argparse.ArgumentTypeError):
            action.type(word)
            words.append(word)
    return words


def command_lines(parser):
    """Flags of the parser in any spelling and number, with sensible and senseless values."""
    actions = [action for action in parser._actions if action.option_strings]
    sensible = {action.dest: accepted(action) for action in actions if action.nargs != 0}

    @st.composite
    def one(draw):
        line = []
        for action in draw(st.lists(st.sampled_from(actions), max_size=5)):
            name = draw(st.sampled_from(action.option_strings))
            values = []
            if action.nargs != 0:
                good = st.sampled_from(sensible[action.dest])
                words = good if draw(st.integers(0, 9)) else WORDS
                values = draw(st.lists(words, min_size=1, max_size=3))
            if values and action.nargs is None:
                values = values[:1]
            if values and draw(st.booleans()) and name.startswith("--"):
                line.append(f"{name}={values[0]}")
                line.extend(values[1:])
            else:
                line.extend([name, *values])
        line.extend(draw(st.lists(WORDS, max_size=1)) if draw(st.integers(0, 9)) == 0 else [])
        return line

    return one()


def outcome(table, line):
    """The flags, or None when the line was refused as it should be (or asked for help)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            args = parse(table, line)
    except SystemExit as end:
        text = stderr.getvalue()
        if end.code == 0:
            assert stdout.getvalue().startswith("usage:") and text == ""
            return None
        assert end.code == 2
        assert text.startswith("script.py: error: ") and len(text) < 1000
        assert len(text.splitlines()) == 1 and text.endswith("\n")
        assert text[:-1].isprintable()
        return None
    assert stderr.getvalue() == stdout.getvalue() == ""
    json.dumps(vars(args), allow_nan=False)
    return args


TRAINING_LINES = st.one_of(
    [st.tuples(st.just(table), command_lines(parser_of(table))) for table in (MNIST, CIFAR)]
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TRAINING_LINES)
def test_any_training_command_line(table_and_line):
    table, line = table_and_line
    args = outcome(table, line)
    if args is None:
        return
    assert args.dataset in table["datasets"] and args.arch in table["archs"]
    assert 0 <= args.epsilon < math.inf and (args.norm == "l_2" or args.epsilon <= 1)
    assert args.num_steps >= 0 and 0 <= args.step_size < math.inf
    assert args.schedule == sorted(set(args.schedule))
    assert all(1 <= epoch <= args.epochs for epoch in args.schedule)
    assert args.train_batch >= 1 and args.lr > 0 and 0 <= args.lambada < math.inf
    assert args.resume is not None or not args.evaluate

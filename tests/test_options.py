"""The command lines: published commands, units, ranges, and that no input ends in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cifar_defense
import MNIST_defense
import MNIST_eval
from utils.options import (
    ATTACKS,
    Parser,
    add_evaluation_options,
    add_training_options,
    parse_evaluation,
    parse_training,
)

MNIST, CIFAR, MNIST_EVALUATION = (
    MNIST_defense.DEFAULTS,
    cifar_defense.DEFAULTS,
    MNIST_eval.DEFAULTS,
)


def _training_parser(defaults=MNIST):
    parser = Parser(prog="script.py")
    add_training_options(parser, defaults)
    return parser


def _evaluation_parser():
    parser = Parser(prog="script.py")
    add_evaluation_options(parser, MNIST_EVALUATION)
    return parser


def train(line, defaults=MNIST):
    return parse_training(defaults, shlex.split(line), prog="script.py")


def evaluate(line):
    return parse_evaluation(MNIST_EVALUATION, shlex.split(line), prog="script.py")


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


@pytest.mark.parametrize("folder", ["MNIST/lr_0.01_lambada_0.02_rs_1000", "CIFAR10/lr_0.1"])
def test_published_evaluation_command(folder):
    args = evaluate(f"--model_path savedModel/{folder}/model_best.pth.tar --attack_method PGD")
    assert args.model_path == f"savedModel/{folder}/model_best.pth.tar"
    assert (args.attack_method, args.test_batch, args.epsilon) == (["PGD"], 200, None)
    assert args.num_steps is None and args.arch is None


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


def test_every_flag_of_several_words_has_both_spellings():
    for parser in (_training_parser(), _evaluation_parser()):
        for action in parser._actions:
            for name in action.option_strings:
                if "_" in name:
                    assert "--" + name[2:].replace("_", "-") in action.option_strings


def test_pixel_units():
    args = train("--epsilon 8/255 --step_size 2/255")
    assert (args.epsilon, args.step_size) == (8 / 255, 2 / 255)


def test_names_in_any_case():
    args = train("-d mnist --norm L2 --optimizer_type sgd --search FAST --block_name basicblock")
    assert (args.dataset, args.norm, args.optimizer_type) == ("MNIST", "l_2", "SGD")
    assert (args.search, args.block_name) == ("fast", "BasicBlock")
    args = evaluate("--model_path x --attack_method pgd PointWise autoattack")
    assert args.attack_method == ["PGD", "point-wise", "AutoAttack"]


def test_all_attacks_once():
    assert evaluate("--model_path x --attack_method pgd all").attack_method == list(ATTACKS)
    assert evaluate("--model_path x --attack_method PGD pgd").attack_method == ["PGD"]


def test_defaults_that_depend_on_other_flags():
    assert train("-d SVHN").arch == "wrn"
    assert train("-d SVHN -a small_cnn").arch == "small_cnn"
    assert train("-a wrn", CIFAR).depth == 28
    assert train("--epochs 80", CIFAR).schedule == [75]
    assert train("--epochs 3").schedule == []
    assert train("--no-augment", CIFAR).augment is False
    assert train("--augment").augment is True
    assert train("", CIFAR).mirror is True and train("-d FashionMNIST").mirror is True
    assert train("").mirror is False and train("-d SVHN").mirror is False
    assert train("--defense igr").num_steps == 0
    assert train("--resume . --checkpoint .").resume is None
    assert train("-e --resume run").resume == "run"


@pytest.mark.parametrize("defaults", [MNIST, CIFAR])
def test_fast_search(defaults):
    def fast(line):
        args = train(f"--search fast {line}", defaults)
        return args.num_steps, args.step_size

    steps, size = defaults.fast_num_steps, defaults.fast_step_size
    assert fast("") == (steps, size)
    assert fast(f"--epsilon {defaults.epsilon / 3}") == (steps, pytest.approx(size / 3))
    assert fast("--num_steps 5 --step_size 0.02") == (5, 0.02)
    assert fast("--defense igr") == (0, size)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--epsilon -0.1", ["--epsilon", "-0.1", "at least 0"]),
        ("--probe_epsilon 8", ["--probe_epsilon", "8", "0 to 1"]),
        ("--crop_padding 2", ["--crop_padding", "--augment"]),
        ("--no-mirror", ["--no_mirror", "--augment"]),
        ("--augment --crop_padding 17", ["--crop_padding", "17", "0 to 16"]),
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
        ("--dataset MNSIT", ["--dataset", "MNSIT", "FashionMNIST", "did you mean MNIST?"]),
        ("--norm l1", ["--norm", "l1", "l_inf, l_2"]),
        ("-a small_cn", ["--arch", "small_cn", "did you mean small_cnn?"]),
        ("--optimizer_type RMS", ["--optimizer_type", "SGD, Adam"]),
        ("--epoch 3", ["--epoch", "did you mean --epochs?"]),
        ("3", ["'3' is not understood"]),
        ("--schedule 5 200", ["--schedule", "beyond --epochs 100"]),
        ("--schedule 90 50", ["--schedule", "not increasing"]),
        ("--schedule 50 50", ["--schedule", "not increasing"]),
        ("--schedule 0 50", ["--schedule", "'0'"]),
        ("--schedule", ["--schedule", "expected at least one argument"]),
        ("--schedule 5 --lr_schedule cosine", ["--schedule 5", "--lr_schedule"]),
        ("--start_epoch 100", ["--start_epoch 100", "--epochs 100"]),
        ("--warmup 101", ["--warmup", "--epochs 100"]),
        ("--step_size 0", ["--step_size 0", "40 steps"]),
        ("--defense igr --num_steps 3", ["--num_steps 3", "igr"]),
        ("-a wrn --depth 20", ["--depth 20", "wrn", "6n+4", "16 and 22"]),
        ("-e", ["--evaluate", "--resume"]),
        ("--resume x --overwrite", ["--overwrite", "--resume"]),
        ("--gpu_id a", ["--gpu_id", "'a'"]),
        ("--gpu_id 0,0", ["--gpu_id", "once"]),
        ("--gpu_id -1", ["--gpu_id", "-1"]),
        ("--manualSeed -1", ["--manualSeed", "-1"]),
        ("--save_dir ''", ["--save_dir", "empty"]),
        ("--lr", ["--lr", "expected one argument"]),
        ("--amp=yes", ["--amp", "yes"]),
    ],
)
def test_mistakes_in_training(line, parts):
    text = mistake(train, line)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["--model_path", "required"]),
        ("--model_path ''", ["--model_path", "empty"]),
        ("--model_path x --attack_method PDG", ["--attack_method", "PDG", "did you mean PGD?"]),
        ("--model_path x --attack_method foo", ["--attack_method", *ATTACKS, "all"]),
        ("--model_path x --restarts 0", ["--restarts", "from 1"]),
        ("--model_path x --num_examples 0", ["--num_examples", "from 1"]),
        ("--model_path x --epsilon 2", ["--epsilon 2", "0 to 1"]),
        ("--model_path x --step_size 0", ["--step_size 0", "the attacks' own"]),
        ("--model_path x --test_batch 0", ["--test_batch", "from 1"]),
    ],
)
def test_mistakes_in_evaluation(line, parts):
    text = mistake(evaluate, line)
    for part in parts:
        assert part in text


def test_a_bottleneck_needs_its_own_depths():
    def train_cifar(line):
        return train(line, CIFAR)

    assert train_cifar("--block_name Bottleneck --depth 29").depth == 29
    assert "9n+2" in mistake(train_cifar, "--block_name Bottleneck --depth 26")
    assert "6n+2" in mistake(train_cifar, "--depth 21")


def test_help_names_every_flag_its_unit_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        train("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for piece in (
        "--epsilon RADIUS radius of the ball, in units of pixel intensity",
        "(default: 0.3)",
        "--lambada, --lambda WEIGHT",
        "--schedule EPOCH [EPOCH ...]",
        "(default: [90])",
    ):
        assert piece in text
    for action in _training_parser()._actions:
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


def outcome(parse, defaults, line):
    """The flags, or None when the line was refused as it should be (or asked for help)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            args = parse(defaults, line, prog="script.py")
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
    [
        st.tuples(st.just(defaults), command_lines(_training_parser(defaults)))
        for defaults in (MNIST, CIFAR)
    ]
)
EVALUATION_LINES = command_lines(_evaluation_parser())


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TRAINING_LINES)
def test_any_training_command_line(defaults_and_line):
    defaults, line = defaults_and_line
    args = outcome(parse_training, defaults, line)
    if args is None:
        return
    assert args.dataset in defaults.datasets and args.arch in defaults.archs
    assert 0 <= args.epsilon < math.inf and (args.norm == "l_2" or args.epsilon <= 1)
    assert args.num_steps >= 0 and 0 <= args.step_size < math.inf
    assert args.schedule == sorted(set(args.schedule))
    assert all(1 <= epoch <= args.epochs for epoch in args.schedule)
    assert args.train_batch >= 1 and args.lr > 0 and 0 <= args.lambada < math.inf
    assert args.resume is not None or not args.evaluate


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EVALUATION_LINES, st.integers(0, 4))
def test_any_evaluation_command_line(line, with_model):
    if with_model:
        line = ["--model_path", "x", *line]
    args = outcome(parse_evaluation, MNIST_EVALUATION, line)
    if args is None:
        return
    assert args.model_path
    assert args.attack_method and set(args.attack_method) <= set(ATTACKS)
    assert len(set(args.attack_method)) == len(args.attack_method)
    assert args.epsilon is None or 0 <= args.epsilon < math.inf
    assert args.restarts >= 1

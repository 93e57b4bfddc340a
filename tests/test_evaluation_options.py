"""The evaluation scripts' command line: published commands, and mistakes in one line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cifar_eval
import MNIST_eval
from utils.attacks import ATTACKS
from utils.evaluation_options import evaluation_parser, parse_evaluation, unused_attack_flags


def parse(line, table=MNIST_eval.DEFAULTS):
    return parse_evaluation(table, "", shlex.split(line))


def mistake(line):
    """The one line that a wrong command line ends in."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        parse(line)
    text = stderr.getvalue()
    assert end.value.code == 2
    assert text.count("\n") == 1
    assert ": error: " in text
    return text


@pytest.mark.parametrize("table", [MNIST_eval.DEFAULTS, cifar_eval.DEFAULTS])
def test_published_command(table):
    path = "savedModel/MNIST/lr_0.01_lambada_0.02_rs_1000/model_best.pth.tar"
    args = parse(f"--model_path {path} --attack_method PGD", table)
    assert args.model_path == path
    assert (args.attack_method, args.test_batch, args.gpu_id) == (["PGD"], 200, "0")
    assert args.dataset is args.arch is args.norm is args.epsilon is args.num_steps is None


def test_names_in_any_case_and_all_attacks_once():
    args = parse("--model-path x --attack-method pgd PointWise autoattack")
    assert args.attack_method == ["PGD", "point-wise", "AutoAttack"]
    assert parse("--model_path x --attack_method pgd all").attack_method == list(ATTACKS)
    assert parse("--model_path x --attack_method PGD pgd").attack_method == ["PGD"]


def test_pixel_units_and_architectures():
    args = parse("--model_path x --epsilon 8/255 --step_size 2/255 --arch timm:resnet18")
    assert (args.epsilon, args.step_size, args.arch) == (8 / 255, 2 / 255, "timm:resnet18")
    assert parse("--network mine.nets:make --mean 0.1 0.2 0.3 --std 1").mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["--model_path", "required", "--network"]),
        ("--model_path ''", ["--model_path", "got ''"]),
        ("--model_path ~nosuchuser/x", ["--model_path", "~nosuchuser/x", "user"]),
        ("--model_path x --output ''", ["--output", "got ''"]),
        ("--model_path x --attack_method PDG", ["--attack_method", "PDG", "PGD"]),
        ("--model_path x --attack_method foo", ["--attack_method", *ATTACKS, "all"]),
        ("--model_path x --restarts 0", ["--restarts", "from 1"]),
        ("--model_path x --num_examples 0", ["--num_examples", "from 1"]),
        ("--model_path x --epsilon -8/255", ["--epsilon", "-8/255"]),
        ("--model_path x --step_size 0", ["--step_size 0"]),
        ("--model_path x --test_batch 0", ["--test_batch", "from 1"]),
        ("--model_path x --mean 0.5", ["--mean and --std"]),
        ("--model_path x --transfer_from y", ["--transfer_from", "--sanity"]),
        ("--model_path x --std 0", ["--std", "above 0"]),
        ("--model_path x --arch vgg", ["--arch", "vgg", "small_cnn"]),
        ("--network mine", ["--network", "module:function"]),
        ("--network a:b --arch resnet", ["--arch resnet", "--network"]),
        ("--network a:b --activation silu", ["--activation silu", "--network"]),
        ("--arch timm:resnet18", ["--model_path"]),
        ("--model_path x --num_steps 0", ["--num_steps", "from 1"]),
        ("--model_path x --eps 0.1", ["--eps", "--epsilon"]),
    ],
)
def test_mistakes(line, parts):
    text = mistake(line)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("PGD --norm l_2 --epsilon 1 --num_steps 1 --step_size 1 --restarts 2", []),
        ("FGSM --norm l_2 --epsilon 0.1", []),
        ("FGSM --num_steps 1 --step_size 0.1 --restarts 2", ["num_steps", "step_size", "restarts"]),
        ("FGSM MPGD --num_steps 3 --step_size 0.1 --restarts 2", ["restarts"]),
        ("AutoAttack Square --epsilon 0.1 --num_steps 3", ["num_steps"]),
        ("DDNL2 --epsilon 0.1 --num_steps 3", ["epsilon"]),
        ("JSMA point-wise --norm l_inf --num_steps 3", ["norm", "num_steps"]),
        ("DDNL2 PGD --epsilon 0.1 --restarts 2", []),
        ("AutoAttack --num_steps 3 --sanity", []),
        ("DDNL2 --epsilon 0.1 --report page.html", []),
    ],
)
def test_flags_that_no_chosen_attack_uses_are_noted(line, unused):
    notes = unused_attack_flags(parse(f"--model_path x --attack_method {line}"))
    assert [note.split()[0] for note in notes] == [f"--{name}" for name in unused]


WORDS = st.sampled_from(
    "x 0 1 -1 3 0.5 8/255 1e9 nan inf PGD all l_2 timm:a a:b '' ~nosuchuser é train".split()
)


@st.composite
def command_lines(draw):
    """Any flags with any values."""
    actions = evaluation_parser(MNIST_eval.DEFAULTS, "")._actions
    line = draw(st.sampled_from([[], ["--model_path", "x"]]))
    for action in draw(st.lists(st.sampled_from(actions), max_size=5)):
        count = 0 if action.nargs == 0 else draw(st.integers(1, 1 if action.nargs is None else 3))
        name = draw(st.sampled_from(action.option_strings))
        line = [*line, name, *(draw(WORDS) for _ in range(count))]
    return line


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(command_lines())
def test_any_command_line(line):
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            args = parse_evaluation(MNIST_eval.DEFAULTS, "", line)
    except SystemExit as end:
        text = stderr.getvalue()
        assert end.code == (0 if stdout.getvalue() else 2)
        assert bool(stdout.getvalue()) or (text.count("\n") == 1 and len(text) < 1000)
        return
    json.dumps(vars(args), allow_nan=False)
    assert args.model_path or args.network
    assert set(args.attack_method) <= set(ATTACKS)
    assert args.epsilon is None or 0 <= args.epsilon < math.inf

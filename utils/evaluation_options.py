"""The flags of the evaluation scripts, and how they go with what a checkpoint states."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.attacks import ATTACKS
from utils.attacks.budgets import GRADIENT_ATTACKS, LIBRARY_ATTACKS
from utils.checkpoints import stated_dataset
from utils.errors import UserError
from utils.lfr import NORMS
from utils.networks import NAMED
from utils.options import (
    BATCH,
    LENGTH,
    PATH,
    SEED,
    Parser,
    add_ball_flags,
    add_data_flags,
    add_device_flags,
    add_network_flags,
    check_ball,
    integer,
    number,
    one_of,
)

IN_A_BALL = (*GRADIENT_ATTACKS, *LIBRARY_ATTACKS)
# Flags of the attacks that not all of them use.
USED_BY = {
    "norm": IN_A_BALL,
    "epsilon": IN_A_BALL,
    "num_steps": ("PGD", "MPGD", "DDNL2"),
    "step_size": ("PGD", "MPGD"),
    "restarts": ("PGD",),
}


def _function_name(text: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", text):
        raise argparse.ArgumentTypeError(f"got {text!r:.60}, allowed is module:function")
    return text


# fmt: off
def evaluation_parser(table: Mapping[str, Any], description: str) -> Parser:
    """The parser of an evaluation script; ``table`` holds what the scripts differ in."""
    parser = Parser(description)
    add = add_data_flags(parser, "what is evaluated", {"datasets": table["datasets"]})
    add("--model_path", None, PATH,
        "checkpoint (or run folder, its best one), of this repository, the original or others")
    add("--network", None, (_function_name, "MODULE:FUNCTION"), "a function of yours, without "
        "arguments, that returns the network as an nn.Module; --model_path, if given, holds its "
        "weights")
    add("--mean", None, number("VALUE", -1e9), "mean by channel, for a network that wants "
        "normalised images", nargs="+")
    add("--std", None, number("VALUE", above=True), "standard deviation by channel, with --mean",
        nargs="+")
    add("--split", "test", one_of("train", "held-out", "test"), "part of the dataset; held-out are "
        "the training images that the checkpoint's run did not train on")
    add("--num_examples", None, integer("SAMPLES", 1), "attack the first N only (default: all)")
    add("--force", False, None, "evaluate although the checkpoint states other data")

    add = parser.group("attack")
    add("--attack_method", ["PGD"], (one_of(*ATTACKS, "all")[0], "NAME"),
        f"one or more of {', '.join(ATTACKS)}, or all, in any case", nargs="+")
    add_ball_flags(add, {})
    add("--num_steps", None, integer("N", 1, 100_000),
        "steps of the attack (default: each attack's own)")
    add("--step_size", None, LENGTH,
        "length of a step, in units of pixel intensity (default: each attack's own)")
    add("--restarts", 1, integer("N", 1, 10_000), "random starts per image of PGD")
    add("--seed --manualSeed", 0, SEED, "seed of the attacks' random choices")
    add("--sanity", False, None, "also look for signs of masked gradients and print the verdicts")
    add("--transfer_from", None, PATH,
        "checkpoint of a network whose adversarial examples are tried on this one by --sanity")

    add_network_flags(parser, "network, where the checkpoint does not say", table)
    arch, known = parser._option_string_actions["--arch"], one_of(*table["archs"])[0]
    arch.type = lambda text: text if text.startswith("timm:") else known(text)
    arch.help += ", or timm:NAME for one of the package timm, with the weights of --model_path"

    add = parser.group("run")
    add("--test_batch", 200, BATCH, "batch size; the result does not depend on it")
    add("--output", None, PATH,
        "write the results to this JSON file; one of the same evaluation is continued")
    add("--report", None, PATH, "write the results to this HTML page for people, with a curve over "
        "the radius, images that broke and confusion matrices")
    add("--save_adversarial", None, PATH,
        "folder for each attack's images: ATTACK.npy and, of the first 64, ATTACK.png")
    add_device_flags(add)
    return parser
# fmt: on


def parse_evaluation(
    table: Mapping[str, Any], description: str, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The checked flags of an evaluation script; a mistake leaves with one line and exit code 2.

    ``attack_method`` loses ``all`` and repetitions. ``dataset``, ``norm`` and ``epsilon`` are None
    where they were not given: :func:`apply_statement` fills them in.
    """
    parser = evaluation_parser(table, description)
    args = parser.settle(parser.given(sys.argv[1:] if argv is None else argv), {})
    chosen = ATTACKS if "all" in args.attack_method else args.attack_method
    args.attack_method = list(dict.fromkeys(chosen))
    try:
        if args.report and args.output and Path(args.report) == Path(args.output):
            raise UserError(f"--report and --output both name {args.report}: give two files")
        if args.model_path is None and args.network is None:
            raise UserError("--model_path is required (or --network, for a network of your own)")
        of_a_file = [name for name in ("arch", *NAMED) if getattr(args, name) is not None]
        if of_a_file and (args.model_path is None or args.network):
            text = f"--{of_a_file[0]} {getattr(args, of_a_file[0])}"
            raise UserError(f"{text} goes with --model_path, and not with --network")
        if args.transfer_from and not args.sanity:
            raise UserError("--transfer_from goes with --sanity")
        if (args.mean is None) != (args.std is None):
            raise UserError("--mean and --std belong together: give both or neither")
        check_ball(args)
    except UserError as error:
        parser.error(str(error))
    return args


def unused_attack_flags(args: argparse.Namespace) -> list[str]:
    """One note for each flag that was given and that none of the chosen attacks uses."""
    # The checks for masking and the report's curve run PGD, whatever the chosen attacks.
    running = {*args.attack_method, *(["PGD"] if args.sanity or args.report else [])}
    chosen = ", ".join(args.attack_method)
    return [
        f"--{name} is not used by {chosen}; it counts with {', '.join(attacks)}"
        for name, attacks in USED_BY.items()
        if getattr(args, name) != (1 if name == "restarts" else None)
        and not running.intersection(attacks)
    ]


def apply_statement(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], table: Mapping[str, Any]
) -> list[str]:
    """Fill in what was not given, from what the checkpoint states; returns notes for the user."""
    stated, flags = stated_dataset(checkpoint), checkpoint.get("args") or {}
    if args.dataset is None:
        args.dataset = stated if stated in table["datasets"] else table["dataset"]
    norm, radius, notes = flags.get("norm"), flags.get("probe_epsilon") or flags.get("epsilon"), []
    if norm in NORMS and args.norm not in (None, norm):
        notes, radius = [f"--norm {args.norm}, the checkpoint states {norm}"], None
    args.norm = args.norm or (norm if norm in NORMS else "l_inf")
    if isinstance(radius, (int, float)) and 0 < radius <= (1 if args.norm == "l_inf" else 1e6):
        if args.epsilon is None:
            args.epsilon = float(radius)
        elif abs(args.epsilon - radius) > 1e-9:
            notes.append(f"--epsilon {args.epsilon:g}, the checkpoint states {radius:g}")
    check_ball(args, "epsilon")
    return notes

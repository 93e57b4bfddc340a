"""Any valid combination of training flags runs a step of every part and leaves a run folder."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import MNIST_defense
from models import ACTIVATIONS, NORM_LAYERS
from utils.datasets import load_dataset
from utils.defenses import DEFENSES
from utils.engine import LR_SCHEDULES
from utils.lfr import BN_MODES, SEARCHES
from utils.networks import load_network
from utils.options import OPTIMIZERS
from utils.run_folder import read_log
from utils.training import train

NETWORKS = [
    "-a small_cnn",
    "-a small_cnn --drop 0.3",
    "-a resnet --depth 8",
    "-a resnet --depth 11 --block_name Bottleneck",
    "-a wrn --depth 10 --widen_factor 1 --drop 0.2",
]


def flag(name, values):
    """The flag with one of the values, or no such flag."""
    return st.one_of(st.just(""), st.sampled_from(list(values)).map(lambda v: f"--{name} {v}"))


COMMANDS = st.tuples(
    st.sampled_from(NETWORKS),
    flag("activation", ACTIVATIONS),
    flag("norm_layer", NORM_LAYERS),
    flag("defense", DEFENSES),
    flag("norm", ["l_inf", "l_2"]),
    flag("epsilon", ["0", "8/255", "0.1", "1"]),
    flag("search", SEARCHES),
    st.sampled_from(["--num_steps 2", "--step_size 0.05 --num_steps 1"]),
    flag("lambada", ["0", "0.02", "1"]),
    flag("beta", ["0", "6"]),
    flag("warmup", ["0.5", "1"]),
    flag("epsilon_warmup", ["1"]),
    flag("bn_mode", BN_MODES),
    flag("lr_schedule", LR_SCHEDULES),
    flag("optimizer_type", OPTIMIZERS),
    flag("momentum", ["0"]),
    flag("weight_decay", ["0.001"]),
    flag("clip_grad", ["0.5"]),
    flag("ema", ["0.9"]),
    st.sampled_from(["", "--amp"]),
    st.sampled_from(["", "--augment"]),
    st.sampled_from(["--nlabel 40", "--nlabel 41 --val_size 0", "--nlabel 30 --val_size 20"]),
    flag("train_batch", ["2", "13", "1000"]),
    flag("test_batch", ["7", "1000"]),
    flag("probe_size", ["0", "5"]),
    flag("probe_steps", ["1"]),
    flag("image_interval", ["0", "1"]),
    flag("ckpt_interval", ["0", "1"]),
    flag("manualSeed", ["0", "4294967295"]),
).map(lambda parts: " ".join(filter(None, parts)))


@functools.cache
def few_digits(name, data_dir, train, **options):
    """Sixty digits, so that the measurements after the step do not take most of the time."""
    return load_dataset(name, data_dir, train, **options).head(60)


# More of them in `make faults`.
@settings(
    max_examples=int(os.environ.get("LFR_DRY_RUNS", "10")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(COMMANDS)
def test_any_valid_combination_runs(command):
    if "--defense igr" in command:  # LFR without steps, which refuses to be given some
        command = re.sub("--num_steps [0-9]", "", command)
    with tempfile.TemporaryDirectory() as folder:
        line = f"{command} --dataset digits --dry_run --threads 1 --checkpoint {folder}/run"
        output = io.StringIO()
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            mock.patch("utils.training.load_dataset", few_digits),
        ):
            assert train(MNIST_defense.DEFAULTS, "", line.split()) == 0, output.getvalue()
        run = Path(folder) / "run"
        json.loads((run / "args.json").read_text())
        log = read_log(run / "log.txt")
        assert len(log["Train Loss"]) == 1 and math.isfinite(log["Train Loss"][0])
        assert 0 <= log["Valid Acc."][0] <= 100
        network, _ = load_network(run / "checkpoint.pth.tar")
        assert f"-a {network.arch['name']}" in command
        assert list((run / "scalars").glob("*tfevents*"))

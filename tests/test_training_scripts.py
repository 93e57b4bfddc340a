"""The two training scripts as users type them: published commands, every choice, stop and resume.

Starting Python and PyTorch takes seconds, so most commands run in this process: through the
script's own ``main`` and exit path, with ``sys.argv`` as the shell would have filled it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import cifar_defense
import MNIST_defense
import MNIST_eval
from tests.helpers import save_checkpoint
from tests.test_board import read as read_scalars
from utils import training
from utils.board import Board
from utils.checkpoints import load_checkpoint
from utils.data import split_validation
from utils.datasets import load_dataset
from utils.errors import run_script as finish
from utils.evaluation import run_evaluation
from utils.networks import load_network
from utils.options import settle_training, training_parser
from utils.run_folder import read_log

SCRIPTS = {"MNIST_defense.py": MNIST_defense, "cifar_defense.py": cifar_defense}
PUBLISHED_COLUMNS = (
    "Learning Rate|Train Loss|Valid Loss|Train Acc.|Valid Acc.|loss normal|loss gradient"
).split("|")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def make_image_folder(folder, mode: str, size: int, classes: int, train: int, test: int):
    """``folder/{train,test}/<class>/*.png``: each class a brightness, with noise."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for label in range(classes):
            place = folder / part / (CIFAR10[label] if classes == 10 else f"class{label}")
            place.mkdir(parents=True)
            for i in range(count):
                shape = (size, size) if mode == "L" else (size, size, 3)
                pixels = random.integers(0, 120, shape) + 130 * label // classes
                Image.fromarray(pixels.astype(np.uint8), mode=mode).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def grey_folder(tmp_path_factory):
    """16 x 16 grey images of 3 classes: 48 to train, 12 to test."""
    return make_image_folder(tmp_path_factory.mktemp("grey"), "L", 16, 3, 16, 4)


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    """What CIFAR-10 looks like: 32 x 32 colour images of 10 classes, 2 + 1 of each."""
    return make_image_folder(tmp_path_factory.mktemp("colour"), "RGB", 32, 10, 2, 1)


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory):
    """13 + 4 images in MNIST's own file format."""
    raw = tmp_path_factory.mktemp("mnist") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 13), ("t10k", 4)):
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return raw.parent.parent


@pytest.fixture
def command(monkeypatch, capfd):
    """``command("MNIST_defense.py --dataset digits ...")`` -> (exit code, stdout, stderr)."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(line: str, **places) -> tuple[int, str, str]:
        words = [word.format(**places) for word in line.split()]
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            finish(SCRIPTS[words[0]].main)
        out, err = capfd.readouterr()
        now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert now == handlers
        return caught.value.code or 0, out, err

    return run


SHORT = (
    "MNIST_defense.py --dataset folder --data_dir {data} --save_dir {save} --epochs 1 --max_steps 2"
    " --train_batch 8 --val_size 8 --probe_size 8 --probe_steps 1 --num_steps 1 --threads 1"
    " --test_batch 16"
)
RESNET = " --arch resnet --depth 8"


# -- what a run leaves behind -------------------------------------------------------------------


def test_a_newcomer_s_command(run_script, tmp_path):
    """A run from the shell: its folder, its files, what they hold, and what it prints."""
    flags = "--dataset digits --search fast --epochs 2 --max_steps 2 --ckpt_interval 1"
    flags += " --train_batch 16 --probe_size 20"
    done = run_script("MNIST_defense.py", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "no CUDA here, --gpu_id 0 not used" in done.stdout
    assert "data: digits, 1294 training, 143 held-out and 360 test images" in done.stdout

    folder = tmp_path / "digits" / "lr_0.01_lambada_0.02_rs_1000"
    assert f"run folder: {folder.relative_to(tmp_path)}" in done.stdout
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    checkpoints = {f"{name}.pth.tar" for name in ("checkpoint", "model_best", "epoch1", "epoch2")}
    assert names == {"log.txt", "args.json", "scalars", *checkpoints}
    assert list((folder / "scalars").glob("events.out.tfevents.*"))

    header, *rows = (folder / "log.txt").read_text().splitlines()
    assert header.split("\t")[:7] == PUBLISHED_COLUMNS
    log = read_log(folder / "log.txt")
    assert len(rows) == 2 and log["Learning Rate"] == [0.01, 0.01]
    assert all(math.isfinite(value) for name in PUBLISHED_COLUMNS for value in log[name])
    total = [n + 0.02 * g for n, g in zip(log["loss normal"], log["loss gradient"])]
    assert log["Train Loss"] == pytest.approx(total, rel=1e-5)

    told = json.loads((folder / "args.json").read_text())
    assert told["arguments"]["lambada"] == 0.02 and told["parameters"] == 312_202
    assert told["command"].endswith(flags) and told["versions"]["torch"] == torch.__version__

    checkpoint = load_checkpoint(folder / "checkpoint.pth.tar")
    assert {"epoch", "state_dict", "acc", "best_acc", "optimizer"} <= set(checkpoint)
    assert checkpoint["epoch"] == 2
    assert not any(name.startswith("module.") for name in checkpoint["state_dict"])
    network, _ = load_network(folder / "model_best.pth.tar")
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_published_mnist_command(command, mnist_folder, tmp_path, monkeypatch):
    """Word for word, plus --dry_run and where the data are."""
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        "MNIST_defense.py --dataset MNIST --epochs 100 --lr 0.01 --gamma 0.1 --train_batch 128"
        " --norm l_inf --epsilon 0.3 --step_size 0.01 --num_steps 40 --lambada 0.02 --gpu_id 1"
        " --save_dir SavedModels --dry_run --data_dir {data}",
        data=mnist_folder,
    )
    assert code == 0, err
    assert "--gpu_id 1 not used" in out and "epoch 1/1 " in out
    folder = tmp_path / "SavedModels" / "MNIST" / "lr_0.01_lambada_0.02_rs_1000"
    assert (folder / "model_best.pth.tar").is_file() and (folder / "log.txt").is_file()


def test_the_published_cifar_command(command, colour_folder, tmp_path, monkeypatch):
    """Word for word, plus --dry_run and where the data are."""
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        "cifar_defense.py -a resnet --depth 20 --epochs 300 --schedule 150 250 --lambada 0.03"
        " --gpu_id 3 --save_dir SavedModels --dry_run --data_dir {data}",
        data=colour_folder,
    )
    assert code == 0, err
    assert "--gpu_id 3 not used" in out and "data: cifar10 (image folder), 18 training" in out
    folder = tmp_path / "SavedModels" / "cifar10" / "resnet_20_6" / "lr_0.1_lambada_0.03_rs_1000"
    checkpoint = load_checkpoint(folder / "model_best.pth.tar")
    assert (
        sum(v.numel() for k, v in checkpoint["state_dict"].items() if "num_b" not in k) == 274_042
    )


CHOICES = [
    *(f"--defense {name}" for name in ("igr --num_steps 0", "at", "trades --beta 2", "none")),
    "--search fast",
    "--norm l_2 --epsilon 1 --step_size 0.3",
    *(f"--bn_mode {name}" + RESNET for name in ("shared", "batch", "running", "mixed")),
    *(f"--activation {name}" for name in ("silu", "softplus", "gelu", "elu", "leaky_relu")),
    "--norm_layer group" + RESNET,
    "--norm_layer none" + RESNET,
    "--arch resnet --depth 11 --block_name Bottleneck",
    "--arch wrn --depth 10 --widen_factor 1 --drop 0.2",
    "--optimizer_type Adam --lr 0.001 --weight_decay 0.001",
    "--lr_schedule cosine --warmup 0.5 --ema 0.9",
    "--lr_schedule onecycle --augment --drop 0.1",
    "--schedule 1 --gamma 0.5 --momentum 0",
    "--val_size 0 --probe_size 0 --image_interval 0 --ckpt_interval 0",
    "--amp" + RESNET,
    "--save_minutes 0.00001",
    "--at_start 0.5 --epochs 2",
    "--num_steps 0",
    "--lambada 0",
    "--epsilon 0",
    "--train_batch 1000 --max_steps 0 --epochs 2",
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_runs(command, grey_folder, tmp_path, choice):
    code, _, err = command(f"{SHORT} {choice}", data=grey_folder, save=tmp_path)
    lines = [line for line in err.splitlines() if not line.startswith("warning: epoch ")]
    assert code == 0 and not lines, err
    assert next(tmp_path.rglob("model_best.pth.tar")).is_file()
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    saved = load_checkpoint(checkpoint)
    assert all(v.isfinite().all() for v in saved["state_dict"].values())
    network, _ = load_network(checkpoint)
    assert network(torch.rand(1, 1, 16, 16)).shape == (1, 3)
    log = read_log(checkpoint.parent / "log.txt")
    assert all(math.isfinite(loss) for loss in log["Train Loss"])
    measured = choice not in ("--defense at", "--defense none")
    assert (log["loss gradient"][-1] > 0) == measured


def settled(words):
    table = MNIST_defense.DEFAULTS
    parser = training_parser(table, "")
    return settle_training(parser, table, parser.given(words))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "folder/lr_0.01_lambada_0.02_rs_1000"),
        ("--defense igr --manualSeed 7", "folder/igr_lr_0.01_lambada_0.02_rs_7"),
        ("--defense at", "folder/at_lr_0.01_rs_1000"),
        ("--defense trades", "folder/trades_lr_0.01_beta_6.0_rs_1000"),
        ("--defense none --lr 0.1", "folder/none_lr_0.1_rs_1000"),
        ("--arch resnet", "folder/resnet_20_8/lr_0.01_lambada_0.02_rs_1000"),
        ("--dataset SVHN", "SVHN/wrn_16_8/lr_0.01_lambada_0.02_rs_1000"),
        ("--lr 1", "folder/lr_1.0_lambada_0.02_rs_1000"),  # as the original writes it
        ("--checkpoint mine", None),
    ],
)
def test_run_folders_have_the_published_names(flags, name):
    words = f"--dataset folder --save_dir saved {flags}".split()
    args = settled(words)
    assert str(training.run_path(args)) == (f"saved/{name}" if name else "mine")


def test_svhn_builds_the_wrn_16_8():
    args = settled(["--dataset", "SVHN"])
    assert (args.arch, args.depth, args.widen_factor) == ("wrn", 16, 8)


# -- stop, resume, evaluate -----------------------------------------------------------------------

RESUMABLE = {
    "small_cnn": "--drop 0.3 --at_start 0.5",
    "resnet": RESNET + " --augment --ema 0.9 --optimizer_type Adam --lr 0.002 --warmup 1.5",
    "wrn": "--arch wrn --depth 10 --widen_factor 1 --drop 0.2 --lr_schedule onecycle --amp",
}


def stopped_at(
    monkeypatch, step: int, number: int = signal.SIGTERM, curve: str = "Loss_iter/Loss"
) -> None:
    """Send this process a signal while it logs a curve at the given step."""
    plain = Board.scalars

    def scalars(self, now, values):
        if now == step and curve in values:
            os.kill(os.getpid(), number)
        plain(self, now, values)

    monkeypatch.setattr(Board, "scalars", scalars)


def without_seconds(checkpoint) -> dict:
    parts = {
        key: checkpoint[key]
        for key in ("epoch", "state_dict", "acc", "best_acc", "optimizer", "training", "measured")
    }
    for figures in (parts["training"]["progress"], parts["measured"]):
        figures.pop("seconds", None)
    return parts


def assert_same(a, b, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_run(one, other) -> None:
    """Two run folders hold the same weights, optimizer state, figures and log, bit for bit."""
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        found = [without_seconds(load_checkpoint(folder / name)) for folder in (one, other)]
        assert_same(*found)
    logs = [read_log(folder / "log.txt") for folder in (one, other)]
    for log in logs:
        log.pop("Seconds")
    assert_same(*logs)


@pytest.fixture(scope="module")
def straight_runs(tmp_path_factory):
    """Folders of the runs that were never stopped, made on first use."""
    return {}, tmp_path_factory.mktemp("straight")


# Within an epoch; in its last step; in the first step of the next one.
@pytest.mark.parametrize(
    ("name", "step"),
    [(name, step) for name in ("small_cnn", "resnet") for step in (1, 2, 3)] + [("wrn", 1)],
)
def test_resume_equals_the_straight_run(
    command, grey_folder, tmp_path, monkeypatch, straight_runs, name, step
):
    known, place = straight_runs
    flags = f"{SHORT} --epochs 2 --max_steps 0 --nlabel 32 {RESUMABLE[name]}"  # 3 steps an epoch
    if name not in known:
        code, _, err = command(flags, data=grey_folder, save=place / name)
        assert code == 0, err
        (known[name],) = (path.parent for path in (place / name).rglob("log.txt"))

    places = {"data": grey_folder, "save": tmp_path}
    with monkeypatch.context() as patch:
        stopped_at(patch, step)
        code, out, _ = command(flags, **places)
    (stopped,) = (path.parent for path in tmp_path.rglob("log.txt"))
    assert code == 128 + signal.SIGTERM
    assert f"the same command with --resume {stopped} resumes the run" in out
    code, out, err = command(f"{flags} --resume {stopped}", **places)
    assert code == 0, err
    assert "resumed from" in out and "other flags" not in out
    assert_same_run(known[name], stopped)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_signal_between_epochs(command, grey_folder, tmp_path, monkeypatch, epochs):
    """A run that is done is not called stopped; another one stops in its next step."""
    stopped_at(monkeypatch, 0, curve="Loss_epoch/train_loss")
    code, out, err = command(f"{SHORT} --epochs {epochs}", data=grey_folder, save=tmp_path)
    assert code == (0 if epochs == 1 else 128 + signal.SIGTERM), err
    assert ("stopped" in out) == (epochs == 2)
    (path,) = tmp_path.rglob("checkpoint.pth.tar")
    progress = load_checkpoint(path)["training"]["progress"]
    assert (progress["epoch"], progress["batch"]) == (1, epochs - 1)


def test_sigterm_from_outside(run_script, grey_folder, tmp_path, command, root):
    """A process of its own, stopped in the middle of an epoch: 143, and it says how to go on."""
    flags = f"{SHORT} --epochs 40 --max_steps 0 --train_batch 8 --probe_size 0 --image_interval 0"
    words = flags.format(data=grey_folder, save=tmp_path).split()[1:]
    process = subprocess.Popen(
        [sys.executable, str(root / "MNIST_defense.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if "epoch 1/40 " in line:
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    assert f"--resume {checkpoint.parent}" in out.splitlines()[-1]
    done = load_checkpoint(checkpoint)["training"]["progress"]
    # The same command goes on from there; what remains is cut to the epoch that was running.
    more = flags.replace("--epochs 40", f"--epochs {done['epoch'] + 1}") + f" --resume {checkpoint}"
    code, out, err = command(more, data=grey_folder, save=tmp_path)
    assert code == 0, err
    assert "note: the checkpoint was written with other flags: --epochs 40 is now" in out
    assert len(read_log(checkpoint.parent / "log.txt")["Train Loss"]) == done["epoch"] + 1


def test_a_run_that_is_done_stays_done(command, grey_folder, tmp_path):
    places = {"data": grey_folder, "save": tmp_path}
    assert command(SHORT, **places)[0] == 0
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    before = checkpoint.read_bytes()
    code, out, _ = command(f"{SHORT} --resume {checkpoint}", **places)
    assert code == 0 and "nothing to do: 1 of 1 epochs are done" in out
    assert checkpoint.read_bytes() == before
    code, _, err = command(SHORT, **places)
    assert code == 2 and "holds a run" in err and "--overwrite" in err
    assert checkpoint.read_bytes() == before
    code, _, err = command(SHORT + " --overwrite", **places)
    assert code == 0, err
    # The best score of the run survives a resume, so that a worse epoch does not replace it.
    state = load_checkpoint(checkpoint)
    state["training"]["progress"]["best"] = 99.0
    save_checkpoint(checkpoint, state)
    code, _, err = command(f"{SHORT} --epochs 2 --resume {checkpoint}", **places)
    assert code == 0, err
    assert load_checkpoint(checkpoint)["best_acc"] == 99.0
    # Robust accuracies in balls of two radii do not compare.
    code, out, err = command(
        f"{SHORT} --epochs 3 --probe_epsilon 0.9 --resume {checkpoint}", **places
    )
    assert code == 0 and "--probe_epsilon 0.3 is now 0.9" in out, err
    assert "model_best.pth.tar is chosen anew" in out
    assert load_checkpoint(checkpoint)["best_acc"] < 99.0


@pytest.mark.parametrize("flags", ["", RESNET + " --ema 0.5 --lr 0.5"])
def test_evaluate_only(command, grey_folder, tmp_path, flags):
    """-e repeats the figures of the log's last line, and writes nothing."""
    places = {"data": grey_folder, "save": tmp_path}
    assert command(SHORT + flags, **places)[0] == 0
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    log = read_log(checkpoint.parent / "log.txt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    # An averaged network's checkpoint holds the average as its state_dict: that is evaluated,
    # whether or not --ema is given again.
    flags = flags.replace(" --ema 0.5", "")
    code, out, err = command(f"{SHORT}{flags} -e --resume {checkpoint}", **places)
    assert code == 0, err
    assert f"test % {log['Valid Acc.'][0]:.4g}  " in out
    assert f"test PGD % {log['Test Robust Acc.'][0]:.4g}  (PGD-1, l_inf 0.3, first 8)" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_held_out_images_are_evaluated(command, grey_folder, tmp_path):
    """--split held-out takes the images by which the best network was chosen."""
    flags = SHORT.replace("--val_size 8", "--nlabel 40")
    assert command(flags, data=grey_folder, save=tmp_path)[0] == 0
    (log,) = tmp_path.rglob("log.txt")
    words = f"--model_path {log.parent} --data_dir {grey_folder} --split held-out --num_steps 1"
    words += f" --output {tmp_path / 'report.json'}"
    assert run_evaluation(MNIST_eval.DEFAULTS, "", words.split()) == 0
    report, found = json.loads((tmp_path / "report.json").read_text()), read_log(log)
    stated = load_checkpoint(log.parent / "model_best.pth.tar")["args"]
    assert report["test_set"] == stated["val_size"] == stated["nlabel"] // 10
    assert report["clean_accuracy"] == found["Held-out Acc."][0]


def test_an_averaged_network_has_statistics_of_its_own(command, grey_folder, tmp_path):
    """Those of its averaged weights on the training set, not an average of old statistics."""
    places = {"data": grey_folder, "save": tmp_path}
    assert command(f"{SHORT}{RESNET} --ema 0.9 --lr 0.5", **places)[0] == 0
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    network, _ = load_network(checkpoint)
    train_set, _ = split_validation(load_dataset("folder", grey_folder, train=True), 8, seed=1000)
    with torch.no_grad():
        expected = network.conv1(train_set.float_images()).mean((0, 2, 3))
    torch.testing.assert_close(network.bn1.running_mean, expected, rtol=1e-4, atol=1e-5)


def test_a_run_stopped_within_an_epoch(command, grey_folder, tmp_path, monkeypatch):
    """An averaged network has statistics of its own there as well; the batches stay the same."""
    stopped = []

    def scalars(board, step, values):
        if step == 0 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(Board, "scalars", scalars)
    places = {"data": grey_folder, "save": tmp_path}
    line = f"{SHORT}{RESNET} --ema 0.9 --lr 0.5 --max_steps 4"
    assert command(line, **places)[0] == 143
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    network, found = load_network(checkpoint)
    assert found["training"]["progress"]["batch"] == 2
    train_set, _ = split_validation(load_dataset("folder", grey_folder, train=True), 8, seed=1000)
    with torch.no_grad():
        expected = network.conv1(train_set.float_images()).mean((0, 2, 3))
    torch.testing.assert_close(network.bn1.running_mean, expected, rtol=1e-4, atol=1e-5)
    for flags in ("--train_batch 16", "--max_steps 1"):
        code, _, err = command(f"{line} {flags} --resume {checkpoint}", **places)
        assert code == 2 and f"stopped at batch 2; {flags.split()[0]} cannot change within" in err


def test_the_original_s_checkpoint_is_a_start(command, mnist_folder, reference_dir, tmp_path):
    """-e and further training from the original's file, prefix, CUDA tensors and all."""
    path = reference_dir / "original_mnist.pth.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    flags = (
        "MNIST_defense.py --data_dir {data} --save_dir {save} --num_steps 1 --train_batch 16"
        f" --probe_size 4 --probe_steps 1 --resume {path}"
    )
    places = {"data": mnist_folder, "save": tmp_path}
    code, out, err = command(flags + " -e", **places)
    assert code == 0 and "test % " in out, err
    epoch = load_checkpoint(path)["epoch"]
    code, out, err = command(f"{flags} --epochs {epoch + 1} --max_steps 1", **places)
    assert code == 0 and f"after epoch {epoch}" in out, err


def test_a_new_run_begins_with_a_finished_network(command, grey_folder, tmp_path):
    """--pretrained takes the published (averaged) weights, and neither optimizer nor epochs."""
    places = {"data": grey_folder, "save": tmp_path / "first"}
    assert command(f"{SHORT} --ema 0.5 --epochs 2", **places)[0] == 0
    (first,) = (path.parent for path in (tmp_path / "first").rglob("log.txt"))
    best = load_checkpoint(first / "model_best.pth.tar")

    # At a learning rate of nothing the weights stay, so what the run began with can be read.
    flags = f"{SHORT} --lr 1e-30 --pretrained {first}"
    code, out, err = command(flags, data=grey_folder, save=tmp_path / "second")
    assert code == 0, err
    assert f"starting from the weights of {first / 'model_best.pth.tar'}" in out
    assert "held out" not in out.split("starting")[1].split("data:")[0]
    (second,) = (path.parent for path in (tmp_path / "second").rglob("log.txt"))
    found = load_checkpoint(second / "checkpoint.pth.tar")
    assert found["epoch"] == 1 and found["training"]["progress"]["step"] == 2
    assert_same(dict(found["state_dict"]), dict(best["state_dict"]))

    # A resumed run goes on with its own weights, the file may be gone.
    (first / "model_best.pth.tar").unlink()
    again = f"{flags} --epochs 2 --resume {second}"
    code, out, err = command(again, data=grey_folder, save=tmp_path / "second")
    assert code == 0 and "starting" not in out and "--pretrained" not in out, err


def test_a_beginning_that_has_seen_the_held_out_images_says_so(command, grey_folder, tmp_path):
    places = {"data": grey_folder, "save": tmp_path / "first"}
    assert command(SHORT, **places)[0] == 0
    (first,) = (path.parent for path in (tmp_path / "first").rglob("log.txt"))
    flags = f"{SHORT} --manualSeed 7 --pretrained {first}"
    code, out, err = command(flags, data=grey_folder, save=tmp_path / "second")
    assert code == 0, err
    says = "were trained on images that are held out now (--manualSeed 1000 is now 7)"
    assert says in out
    for more in ("-e", "--epochs 2"):
        line = f"{SHORT} --manualSeed 7 --resume {first} {more}"
        code, out, err = command(line, **places)
        assert code == 0 and says in out, err


def test_nothing_is_held_out(command, grey_folder, tmp_path):
    places = {"data": grey_folder, "save": tmp_path}
    says = "no images are held out: model_best.pth.tar is chosen by test images"
    for count in (8, 0):
        code, out, err = command(f"{SHORT} --val_size {count} --overwrite", **places)
        assert code == 0 and (says in out) == (not count), err


def test_training_images_that_changed(command, tmp_path):
    """By the seed others would be held out, some of which were trained on."""
    data = make_image_folder(tmp_path / "data", "L", 16, 3, 16, 4)
    places = {"data": data, "save": tmp_path / "runs"}
    assert command(SHORT, **places)[0] == 0
    Image.new("L", (16, 16)).save(data / "train" / "class1" / "new.png")
    again = f"{SHORT} --epochs 2 --resume auto"
    code, _, err = command(again, **places)
    assert code == 2 and "its training images were others" in err
    code, out, err = command(f"{again} --force", **places)
    assert code == 0 and "is chosen anew" in out, err


def test_test_images_of_another_shape(command, tmp_path):
    data = make_image_folder(tmp_path / "data", "L", 16, 3, 16, 4)
    shutil.rmtree(data / "test")
    (make_image_folder(tmp_path / "rgb", "RGB", 16, 3, 1, 4) / "test").rename(data / "test")
    code, _, err = command(SHORT, data=data, save=tmp_path / "runs")
    assert code == 2 and "training images are 1x16x16, test images 3x16x16" in err


def test_a_run_that_is_done_keeps_its_record(command, grey_folder, tmp_path):
    places = {"data": grey_folder, "save": tmp_path}
    assert command(SHORT, **places)[0] == 0
    (record,) = tmp_path.rglob("args.json")
    before = record.read_bytes()
    for start in (f"--resume {record.parent}", f"--resume auto --checkpoint {record.parent}"):
        code, out, err = command(f"{SHORT} {start} --dry_run", **places)
        assert code == 0 and "nothing to do: 1 of 1 epochs" in out, err
        # Not what was asked for: another run, of the same name.
        code, out, err = command(f"{SHORT} {start} --epsilon 0.1", **places)
        assert code == 2 and "written with other flags: --epsilon 0.3 is now 0.1" in err
        assert record.read_bytes() == before


def test_auto_resumes_the_same_command_alone(command, grey_folder, tmp_path):
    places = {"data": grey_folder, "save": tmp_path / "a"}
    flags = f"{SHORT} --resume auto"
    assert command(f"{flags} --epsilon 0.2", **places)[0] == 0
    code, _, err = command(f"{flags} --epochs 2", **places)
    assert code == 0, err
    code, _, err = command(f"{flags} --epsilon 0.1 --epochs 3", **places)
    assert code == 2 and "--epsilon 0.2 is now 0.1" in err
    # What a trial has left is no beginning of a run.
    places["save"] = tmp_path / "b"
    assert command(f"{SHORT} --dry_run", **places)[0] == 0
    code, _, err = command(flags, **places)
    assert code == 2 and "is of a --dry_run" in err
    # The folder's name has the network that the weights come with.
    network = f"{SHORT}{RESNET}"
    assert command(network, data=grey_folder, save=tmp_path / "c")[0] == 0
    (weights,) = tmp_path.glob("c/**/model_best.pth.tar")
    flags = f"{SHORT} -a resnet --pretrained {weights} --resume auto"
    places["save"] = tmp_path / "d"
    assert command(flags, **places)[0] == 0
    code, out, err = command(flags, **places)
    assert code == 0 and "nothing to do: 1 of 1" in out, err


def test_new_flags_of_a_resumed_run_count(command, grey_folder, tmp_path):
    """Also those of the optimizer, and for one that had none of its own."""
    places = {"data": grey_folder, "save": tmp_path / "a"}
    assert command(SHORT, **places)[0] == 0
    (run,) = (path.parent for path in tmp_path.rglob("log.txt"))
    line = f"MNIST_defense.py --resume {run} --data_dir {grey_folder} --threads 1"
    for epochs in (2, 3):  # and stay
        more = "--weight_decay 0.5 --momentum 0.1" if epochs == 2 else ""
        code, _, err = command(f"{line} --epochs {epochs} {more}")
        assert code == 0, err
        state = load_checkpoint(run / "checkpoint.pth.tar")
        (group,) = state["optimizer"]["param_groups"]
        assert (group["weight_decay"], group["momentum"]) == (0.5, 0.1)
    state["given"] = {}
    save_checkpoint(run / "checkpoint.pth.tar", state)
    code, out, err = command(f"{line} --dataset folder --search fast --epochs 4 --max_steps 1")
    assert code == 0 and "is not used" not in out, err
    args = load_checkpoint(run / "checkpoint.pth.tar")["args"]
    assert (args["search"], args["num_steps"], args["step_size"]) == ("fast", 4, 0.15)


def test_a_branch_has_a_log_of_its_own(command, grey_folder, tmp_path):
    """Going on from an earlier epoch in the same folder would lose what came after."""
    places = {"data": grey_folder, "save": tmp_path / "a"}
    flags = f"{SHORT} --ckpt_interval 1 --epochs 3"
    assert command(flags, **places)[0] == 0
    (run,) = (path.parent for path in tmp_path.rglob("log.txt"))
    before = (run / "log.txt").read_bytes()
    code, _, err = command(f"{flags} --resume {run / 'epoch1.pth.tar'}", **places)
    assert code == 2 and "what came after would be lost" in err
    assert (run / "log.txt").read_bytes() == before
    assert read_log(run / "log.txt")["Epoch"] == [1, 2, 3]
    branch = tmp_path / "branch"
    for start, epochs in ((run / "epoch1.pth.tar", 3), (branch, 4)):
        line = f"{flags} --resume {start} --checkpoint {branch} --epochs {epochs} --start_epoch 1"
        code, _, err = command(line, **places)
        assert code == 0, err
    assert read_log(branch / "log.txt")["Epoch"] == [2, 3, 4]


def test_two_seeds_differ_and_one_repeats(command, grey_folder, tmp_path):
    found = []
    for run, seed in enumerate((1, 1, 2)):
        save = tmp_path / str(run)
        line = f"{SHORT} --drop 0.2 --augment --manualSeed {seed}"
        assert command(line, data=grey_folder, save=save)[0] == 0
        found.append(without_seconds(load_checkpoint(next(save.rglob("checkpoint.pth.tar")))))
    assert_same(found[0], found[1])
    weight = "classifier.fc1.weight"
    assert not torch.equal(found[0]["state_dict"][weight], found[2]["state_dict"][weight])


def test_a_start_by_adversarial_training(command, grey_folder, tmp_path):
    """Steps of `at`, then of the defense; the best epoch is one with the full loss all along."""
    flags = f"{SHORT} --lr_schedule constant --lr 0.1 --lambada 50 --probe_epsilon 0 --epochs 3"
    logs = {}
    for name, more, epochs in (
        ("at", "--defense at", 3),
        ("whole", "--at_start 2/3", 2),
        ("warm", "--at_start 1/3 --warmup 1", 1),
        ("half", "--at_start 1/2", 1),
        ("gradient", "--at_start 2/3 --defense igr", 2),
    ):
        assert command(f"{flags} {more}", data=grey_folder, save=tmp_path / name)[0] == 0
        path = next((tmp_path / name).rglob("log.txt"))
        log = logs[name] = read_log(path)
        for column in ("Train Loss", "Held-out Acc.", "loss gradient"):
            assert log[column][:epochs] == logs["at"][column][:epochs]
        assert [penalty > 0 for penalty in log["loss gradient"]] == [n >= epochs for n in range(3)]
        best = load_checkpoint(path.parent / "model_best.pth.tar")["epoch"]
        assert best == 3 or name == "at"
    path = next((tmp_path / "half").rglob("log.txt"))
    curve = read_scalars(path.parent / "scalars").Scalars("Loss_iter/Loss_gradient")
    assert [event.value > 0 for event in curve] == [False] * 3 + [True] * 3  # two steps an epoch


def test_epsilon_rises_and_the_step_with_it(command, grey_folder, tmp_path, monkeypatch):
    used = []
    forward = training.DefenseLoss.forward

    def recorded(self, *arguments):
        terms = forward(self, *arguments)
        used.append((self.defense.ball.epsilon, self.defense.step_size))
        moved = self.defense.ball.distance(terms.x_adv, arguments[0]).max()
        assert moved == pytest.approx(used[-1][0], abs=1e-6)
        return terms

    monkeypatch.setattr(training.DefenseLoss, "forward", recorded)
    flags = f"{SHORT} --defense at --epsilon 0.4 --step_size 0.8 --epsilon_warmup 2 --epochs 3"
    assert command(flags, data=grey_folder, save=tmp_path)[0] == 0
    radii = (0, 0.1, 0.2, 0.3, 0.4, 0.4)  # two steps an epoch
    assert np.allclose(used, [(radius, 2 * radius) for radius in radii])
    (best,) = tmp_path.rglob("model_best.pth.tar")
    assert load_checkpoint(best)["epoch"] == 3  # the only one with the whole radius all along
    curve = read_scalars(best.parent / "scalars").Scalars("Schedule/epsilon")
    assert [event.value for event in curve] == pytest.approx([0, 0.2, 0.4])


def test_the_limit_of_the_gradient_is_that_of_the_flag(command, grey_folder, tmp_path):
    found = []
    for name, flag in {"still": "--lr 1e-9", "step": "--lr 0.5 --clip_grad 0.01"}.items():
        flags = f"{SHORT.replace('--max_steps 2', '--max_steps 1')} --weight_decay 0 {flag}"
        assert command(flags, data=grey_folder, save=tmp_path / name)[0] == 0
        (path,) = (tmp_path / name).rglob("checkpoint.pth.tar")
        found.append(load_checkpoint(path)["state_dict"])
    moved = math.sqrt(sum(float((found[1][k] - found[0][k]).square().sum()) for k in found[0]))
    assert moved == pytest.approx(0.5 * 0.01, rel=0.01)


def test_a_diverging_run_ends_in_one_line(command, grey_folder, tmp_path):
    """The step is named, what to change is said, and the checkpoint is that of the epoch before."""
    places = {"data": grey_folder, "save": tmp_path}
    flags = SHORT.replace("--max_steps 2", "--max_steps 5")
    assert command(flags, **places)[0] == 0
    (checkpoint,) = tmp_path.rglob("checkpoint.pth.tar")
    before = checkpoint.read_bytes()
    code, _, err = command(f"{flags} --epochs 2 --lr 1e30 --resume {checkpoint}", **places)
    assert code == 2
    line = err.replace("\r", "\n").strip().splitlines()[-1]
    assert line.startswith("MNIST_defense.py: error: the loss is ")
    assert " of epoch 2 " in line and "lower --lr" in line and "Traceback" not in err
    assert checkpoint.read_bytes() == before


# -- what a checkpoint states -----------------------------------------------------------------


def test_one_command_starts_and_resumes(command, grey_folder, tmp_path, monkeypatch):
    """For schedulers that give the same command again; HUP and USR1 stop a run as TERM does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    flags = f"{SHORT} --epochs 2 --max_steps 0 --nlabel 32 --resume auto"
    places = {"data": grey_folder, "save": tmp_path}
    for step, number in ((1, signal.SIGUSR1), (3, signal.SIGHUP)):
        with monkeypatch.context() as patch:
            stopped_at(patch, step, number)
            code, out, err = command(flags, **places)
        assert code == 128 + number, err
        assert ("resumed from" in out) == (step == 3)
    code, out, err = command(flags, **places)
    assert code == 0 and "resumed from" in out, err
    code, out, _ = command(flags, **places)
    assert code == 0 and "nothing to do" in out


def test_a_resumed_run_takes_its_flags_and_its_folder_from_the_checkpoint(
    command, grey_folder, tmp_path, monkeypatch
):
    flags = f"{SHORT} --norm l_2 --lr 0.02 --schedule 1{RESNET} --activation silu"
    code, _, err = command(flags, data=grey_folder, save=tmp_path / "first")
    assert code == 0, err
    (folder,) = (path.parent for path in tmp_path.rglob("log.txt"))
    monkeypatch.chdir(tmp_path)
    line = f"MNIST_defense.py --data_dir {grey_folder} --resume {folder} --epochs 2 --threads 1"
    code, out, err = command(f"{line} --lr_schedule cosine")
    assert code == 0, err
    assert "other flags: --epochs 1 is now 2; --lr_schedule step is now cosine\n" in out
    assert "note: --schedule is not used" in out and f"run folder: {folder}\n" in out
    state = load_checkpoint(folder / "checkpoint.pth.tar")
    assert (state["epoch"], state["args"]["norm"], state["args"]["epsilon"]) == (2, "l_2", 1.5)
    assert state["arch"]["activation"] == "silu"
    # Evaluated by what it states; a flag that contradicts it is refused.
    code, out, err = command(f"MNIST_defense.py --data_dir {grey_folder} -e --resume {folder}")
    assert code == 0 and "(PGD-1, l_2 1.5, first 8)" in out, err
    code, _, err = command(f"{line} --activation relu")
    assert code == 2 and "silu" in err and "relu" in err and err.count("\n") == 1
    # So is the network that a new run begins with.
    code, out, err = command(f"{SHORT} --pretrained {folder}", data=grey_folder, save=tmp_path)
    assert code == 0, err
    (second,) = (path for path in tmp_path.rglob("checkpoint.pth.tar") if path.parent != folder)
    assert load_checkpoint(second)["arch"]["activation"] == "silu"


def test_data_that_the_checkpoint_does_not_state_are_refused(command, grey_folder, tmp_path):
    """Renamed classes shift the labels of all others."""
    assert command(SHORT, data=grey_folder, save=tmp_path / "run")[0] == 0
    (folder,) = (path.parent for path in (tmp_path / "run").rglob("log.txt"))
    shutil.copytree(grey_folder, tmp_path / "renamed")
    for part in ("train", "test"):
        (tmp_path / "renamed" / part / "class0").rename(tmp_path / "renamed" / part / "klass")
    line = f"MNIST_defense.py --data_dir {tmp_path / 'renamed'} --resume {folder}"
    for more in ("-e", "--epochs 2"):
        code, _, err = command(f"{line} {more}")
        assert code == 2 and err.count("\n") == 1, err
        assert "class0" in err and "--force" in err
        code, _, err = command(f"{line} {more} --force --threads 1")
        assert code == 0, err
    code, _, err = command(f"MNIST_defense.py --dataset digits -e --resume {folder}")
    assert code == 2 and "digits" in err, err


def test_another_number_of_classes_gets_a_new_head(command, grey_folder, tmp_path):
    assert command(SHORT, data=grey_folder, save=tmp_path / "run")[0] == 0
    (folder,) = (path.parent for path in (tmp_path / "run").rglob("log.txt"))
    make_image_folder(tmp_path / "four", "L", 16, 4, 16, 4)
    line = f"{SHORT} --pretrained {folder}"
    code, out, err = command(line, data=tmp_path / "four", save=tmp_path / "second")
    assert code == 0, err
    assert "another number of classes; classifier.fc3.weight, classifier.fc3.bias start anew" in out
    # Weights alone say it by their shapes.
    weights = load_checkpoint(folder / "model_best.pth.tar")["state_dict"]
    torch.save(weights, tmp_path / "weights.pt")
    line = f"{SHORT} --pretrained {tmp_path}/weights.pt"
    for data, anew in ((grey_folder, False), (tmp_path / "four", True)):
        code, out, err = command(f"{line} --overwrite", data=data, save=tmp_path / "third")
        assert code == 0 and ("start anew" in out) == anew, err


def test_flags_of_something_else_do_not_reach_the_optimizer(command, grey_folder, tmp_path):
    places = {"data": grey_folder, "save": tmp_path}
    assert command(SHORT, **places)[0] == 0
    (path,) = tmp_path.rglob("checkpoint.pth.tar")
    state = load_checkpoint(path)
    state["given"] = {**state["given"], "maximize": True, "weight_decay": "5e-4"}
    torch.save(state, path)
    code, _, err = command(f"{SHORT} --epochs 2 --resume {path}", **places)
    assert code == 0, err
    (group,) = load_checkpoint(path)["optimizer"]["param_groups"]
    assert (group["maximize"], group["weight_decay"]) == (False, 5e-4)


def test_weights_that_are_not_finite_are_not_saved(command, grey_folder, tmp_path):
    line = f"{SHORT} --lr 1e38 --weight_decay 1e9 --max_steps 1"
    code, _, err = command(line, data=grey_folder, save=tmp_path)
    assert code == 2 and "the weights are not finite" in err
    assert not [*tmp_path.rglob("*.pth.tar")]


@pytest.mark.parametrize("defense", ["none", "igr"])
def test_the_best_epoch_is_a_trained_one(command, tmp_path, defense):
    """A network that has learned nothing yet is robust where it is right by chance."""
    line = "MNIST_defense.py --dataset digits --nlabel 600 --epochs 5 --train_batch 32 --lr 0.02"
    line += " --probe_size 60 --probe_steps 5 --threads 1 --image_interval 0"
    code, _, err = command(f"{line} --defense {defense} --save_dir {tmp_path}")
    assert code == 0, err
    (log,) = tmp_path.rglob("log.txt")
    robust = read_log(log)["Held-out Robust Acc."]
    best = load_checkpoint(log.with_name("model_best.pth.tar"))
    assert best["measured"]["held_out_accuracy"] > 25
    assert best["measured"]["held_out_robust"] < max(robust)  # by which it would not be chosen


# -- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "negative epsilon": ("--epsilon -0.1", "--epsilon: got '-0.1'"),
    "zero batch size": ("--train_batch 0", "--train_batch: got '0'"),
    "unknown dataset": ("--dataset cifar11", "--dataset"),
    "unknown norm": ("--norm l_1", "allowed is l_inf, l_2"),
    "unknown defense": ("--defense lfrr", "allowed is lfr, igr"),
    "lambada nan": ("--lambada nan", "--lambada: got 'nan'"),
    "schedule beyond the epochs": (
        "--schedule 5 --epochs 3",
        "--schedule 5: allowed are rising numbers up to --epochs 3",
    ),
    "unknown flag": ("--lamdaba 1", "did you mean --lambda"),
    "depth of a wrn": ("--arch wrn --depth 20", "depth is 20, a wide ResNet needs 6n+4"),
    "depth": ("--arch resnet --depth 21", "depth is 21, BasicBlock needs 6n+2"),
    "missing checkpoint": ("--resume {tmp}/none.pth.tar", "none.pth.tar"),
    "text as checkpoint": ("--resume {tmp}/text.pth.tar", "text.pth.tar"),
    "truncated checkpoint": ("--resume {tmp}/cut.pth.tar", "cut.pth.tar"),
    "empty checkpoint": ("--resume {tmp}/empty.pth.tar", "empty.pth.tar"),
    "folder without a checkpoint": ("--resume {tmp}/void", "void"),
    "another architecture": ("--arch resnet --depth 8 --resume {tmp}/good.pth.tar", "good.pth.tar"),
    "another depth": ("--arch resnet --depth 14 --resume {tmp}/resnet.pth.tar", "resnet.pth.tar"),
    "senseless training state": ("--resume {tmp}/odd.pth.tar", "odd.pth.tar"),
    "senseless progress": ("--resume {tmp}/odd2.pth.tar", "odd2.pth.tar"),
    "senseless flags": ("--resume {tmp}/odd4.pth.tar", "--epsilon: got '-3'"),
    "average of another shape": ("--ema 0.9 --resume {tmp}/odd3.pth.tar", "odd3.pth.tar"),
    "pretrained, another architecture": (
        "--arch resnet --depth 8 --pretrained {tmp}/good.pth.tar",
        "good.pth.tar",
    ),
    "pretrained, no network": ("--pretrained {tmp}/void", "model_best.pth.tar"),
    "evaluate nothing": ("-e", "--evaluate needs --resume"),
    "save_dir is a file": ("--save_dir {tmp}/text.pth.tar", "text.pth.tar"),
    "save_dir below a file": ("--save_dir {tmp}/text.pth.tar/x", "text.pth.tar"),
    "no data": ("--data_dir {tmp}/nothing", "nothing"),
    "empty image folder": ("--data_dir {tmp}/void", "void"),
    "more labels than samples": ("--nlabel 4900", "--nlabel 4900: "),
    "more validation than samples": ("--val_size 48", "48"),
    "images too small": ("--data_dir {tmp}/small", "image_size is 8"),
}


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    """Files that are not what a command needs."""
    from models import build_model

    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "void" / "train").mkdir(parents=True)
    (tmp / "void" / "test").mkdir()
    make_image_folder(tmp / "small", "L", 8, 2, 8, 2)
    (tmp / "text.pth.tar").write_text("not a checkpoint\n")
    (tmp / "empty.pth.tar").write_bytes(b"")
    network = build_model("small_cnn", num_classes=3, image_size=16)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9).state_dict()
    good = {"epoch": 0, "state_dict": network.state_dict(), "optimizer": optimizer}
    save_checkpoint(tmp / "good.pth.tar", {**good, "arch": network.arch})
    save_checkpoint(tmp / "odd.pth.tar", {**good, "training": 5})
    save_checkpoint(tmp / "odd4.pth.tar", {**good, "args": {"epsilon": -3}})
    progress = {"epoch": 0, "batch": "x", "colour": 3}
    save_checkpoint(
        tmp / "odd2.pth.tar", {**good, "training": {"progress": progress, "weights": None}}
    )
    progress = {"epoch": 0, "batch": 0, "step": 0, "seconds": 0.0, "sums": {}, "best": 0.0}
    other = build_model("small_cnn", num_classes=4, image_size=16).state_dict()
    averaged = {"progress": progress, "weights": network.state_dict()}
    save_checkpoint(tmp / "odd3.pth.tar", {**good, "state_dict": other, "training": averaged})
    cut = (tmp / "good.pth.tar").read_bytes()
    (tmp / "cut.pth.tar").write_bytes(cut[: len(cut) // 2])
    resnet = build_model("resnet", depth=8, num_classes=3, in_channels=1)
    save_checkpoint(tmp / "resnet.pth.tar", {**good, "state_dict": resnet.state_dict()})
    return tmp


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(command, grey_folder, mistakes, tmp_path, name):
    flags, message = MISTAKES[name]
    places = {"data": grey_folder, "save": tmp_path, "tmp": mistakes}
    code, _, err = command(f"{SHORT} {flags}", **places)
    assert code == 2
    assert err.startswith("MNIST_defense.py: error: ") and err.count("\n") == 1, err
    assert message in err


def test_grey_images_where_colour_is_needed(command, grey_folder, tmp_path):
    make_image_folder(tmp_path / "grey", "L", 32, 10, 2, 1)
    code, _, err = command("cifar_defense.py --data_dir {data}", data=tmp_path / "grey")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("cifar_defense.py: error: ") and "grey" in err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("MNIST_defense.py", "--dataset digits --lambada nan"),
        ("cifar_defense.py", "--data_dir /dev/null/nothing"),
    ],
)
def test_mistakes_from_the_shell(run_script, tmp_path, script, flags):
    done = run_script(script, *flags.split(), cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout.startswith("Traceback")
    assert done.stderr.startswith(f"{script}: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""Run folders and checkpoints: nothing half-written, nothing let in."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import build_model
from tools import faults
from utils import safe_load
from utils.errors import UserError
from utils.runs import (
    BEST,
    CHECKPOINT,
    LOG_COLUMNS,
    Log,
    RunFolder,
    load_checkpoint,
    load_network,
    read_log,
    restore_fields,
    restore_network,
    restore_optimizer,
    save_checkpoint,
    sha256_of,
    write_atomic,
)

NUMBERS = torch.arange(600, dtype=torch.float32)


def small_checkpoint(**more):
    """A checkpoint of some kilobytes with all that ours may hold."""
    state = {"layer.weight": NUMBERS.view(20, 30), "layer.bias": torch.ones(20) / 3}
    return {
        "epoch": 3,
        "state_dict": state,
        "acc": 55.5,
        "best_acc": 60.25,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(20, 30)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1], "nesterov": False, "foreach": None}],
        },
        "arch": {"name": "resnet", "depth": 2, "activation": "relu", "drop": 0.0},
        "rng": torch.get_rng_state(),
        "python_rng": random.Random(1).getstate(),
        "args": {"lr": 0.1, "schedule": [75, 90], "resume": None},
        "done": True,
        "limits": (1, -(2**70), float("inf")),
        **more,
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def refused(path, message: str = "") -> str:
    """load_checkpoint refuses the file, in one line that names it."""
    with pytest.raises(UserError, match=message or None) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert (
        "\n" not in line and line.isprintable() and line.startswith(str(path)) and len(line) < 700
    )
    return line


# ------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_saved_comes_back(tmp_path, legacy):
    path, content = tmp_path / "a.pth.tar", small_checkpoint()
    if legacy:
        path.write_bytes(faults.saved(content, legacy=True))
    else:
        save_checkpoint(path, content)
    assert same(load_checkpoint(path), content)
    assert os.listdir(tmp_path) == ["a.pth.tar"]


def test_saving_is_deterministic(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, small_checkpoint())
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    assert len(sha256_of(tmp_path / "a")) == 64


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    import numpy as np

    for value in (np.float64(1.0), Path("x"), {1, 2}, {("a", "b"): 1}, torch.float32, b"bytes"):
        with pytest.raises(TypeError, match="could not be loaded again"):
            save_checkpoint(tmp_path / "x", small_checkpoint(extra=value))
    assert not list(tmp_path.iterdir())


def test_dataparallel_prefix_goes(tmp_path):
    content = {"state_dict": {"module.a": torch.ones(2), "module.b": torch.zeros(1)}}
    (tmp_path / "x").write_bytes(faults.saved(content, legacy=True))
    assert list(load_checkpoint(tmp_path / "x")["state_dict"]) == ["a", "b"]


def test_parameters_and_half_precision_load(tmp_path):
    layer = torch.nn.Linear(3, 4)
    content = {"state_dict": dict(layer.named_parameters()), "half": torch.ones(2).bfloat16()}
    (tmp_path / "x").write_bytes(faults.saved(content))
    loaded = load_checkpoint(tmp_path / "x")
    assert torch.equal(loaded["state_dict"]["weight"], layer.weight)
    assert not loaded["state_dict"]["weight"].requires_grad


def test_views_and_tied_weights_load(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"whole": base, "row": base[1], "turned": base.t(), "tied": base, "none": base[:0]}
    (tmp_path / "x").write_bytes(faults.saved({"state_dict": state}))
    assert same(load_checkpoint(tmp_path / "x")["state_dict"], state)


@pytest.mark.parametrize(
    "name,parameters,accuracy",
    [("original_mnist", 312_202, 99.5), ("original_cifar10", 272_474, 55.85)],
)
def test_the_originals_checkpoints_load(reference_dir, name, parameters, accuracy):
    network, checkpoint = load_network(reference_dir / f"{name}.pth.tar")
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert abs(checkpoint["acc"] - accuracy) < 0.1 and not network.training
    direct = torch.load(reference_dir / f"{name}.pth.tar", map_location="cpu", weights_only=True)
    for key, value in network.state_dict().items():
        assert torch.equal(value, direct["state_dict"]["module." + key])
    optimizer = torch.optim.SGD(network.parameters(), lr=1, momentum=0.9)
    restore_optimizer(optimizer, checkpoint, "x")
    assert optimizer.param_groups[0]["lr"] < 1
    small = torch.rand(2, *((1, 28, 28) if "mnist" in name else (3, 32, 32)))
    assert network(small).shape == (2, 10)


# ------------------------------------------------------------------------- refused files


def test_a_flipped_bit_is_not_a_weight(tmp_path):
    """torch.load checks no checksum: it would return the damaged weight."""
    data = bytearray(faults.saved(small_checkpoint()))
    data[data.find(NUMBERS.numpy().tobytes()) + 403] ^= 0x40
    (tmp_path / "x").write_bytes(data)
    believed = torch.load(tmp_path / "x", weights_only=True)["state_dict"]["layer.weight"]
    assert not torch.equal(believed, NUMBERS.view(20, 30))
    refused(tmp_path / "x", "CRC|checksum")


@pytest.mark.parametrize("legacy", [False, True])
def test_200_mutations(tmp_path, legacy):
    """Each damaged file gives the same weights or one line; in the old format, which has no
    checksums, damage to the numbers themselves cannot be seen."""
    content = small_checkpoint()
    data = faults.saved(content, legacy)
    path, harmless = tmp_path / "x", 0
    start = time.monotonic()
    for seed in range(200):
        draw = random.Random(seed)
        damaged = faults.MUTATIONS[seed % len(faults.MUTATIONS)](data, draw)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error) and str(error).isprintable(), seed
        else:
            harmless += 1
            assert legacy or same(loaded["state_dict"], content["state_dict"]), seed
    assert harmless < 100
    assert time.monotonic() - start < 60


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=200), head=st.sampled_from([b"", b"}", b"}X\x01\0\0\0a", b"(", b"]"])
)
def test_any_description_is_read_or_refused(tmp_path, body, head):
    (tmp_path / "x").write_bytes(faults.crafted(head + body))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path, legacy):
    evidence = tmp_path / "evidence"
    path = tmp_path / "x"
    path.write_bytes(faults.with_command(small_checkpoint(), str(evidence), legacy))
    refused(path, r"wants to run or build posix.system.*nothing of it was run")
    assert not evidence.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_not_run(tmp_path, protocol):
    evidence = tmp_path / "evidence"
    (tmp_path / "x").write_bytes(faults.plain_pickle(str(evidence), protocol))
    refused(tmp_path / "x")
    assert not evidence.exists()


HOSTILE = {
    "zip bomb": (lambda: faults.zip_bomb(faults.saved(small_checkpoint()), 20), "compressed"),
    "lying sizes": (lambda: faults.lying_sizes(faults.saved(small_checkpoint())), ""),
    "huge storage": (
        lambda: faults.crafted_state(faults.tensor_opcodes(storage=1 << 40, size=(1 << 40,))),
        "claims 4398046511104 bytes, the file holds 16",
    ),
    "negative storage": (lambda: faults.crafted_state(faults.tensor_opcodes(storage=-1)), ""),
    "absurd storage": (lambda: faults.crafted_state(faults.tensor_opcodes(storage=1 << 900)), ""),
    "tensor larger than its storage": (
        lambda: faults.crafted_state(faults.tensor_opcodes(size=(5,))),
        "5 numbers claims a storage of 4",
    ),
    "tensor beyond its storage": (
        lambda: faults.crafted_state(faults.tensor_opcodes(offset=1)),
        "claims a storage",
    ),
    "repeated number": (
        lambda: faults.crafted_state(faults.tensor_opcodes(size=(1 << 40,), stride=(0,))),
        "claims a storage",
    ),
    "stride beyond": (
        lambda: faults.crafted_state(faults.tensor_opcodes(size=(2,), stride=(9,))),
        "claims a storage",
    ),
    "negative size": (lambda: faults.crafted_state(faults.tensor_opcodes(size=(-4,))), ""),
    "views without end": (lambda: faults.many_views(), "its tensors claim 800000000 bytes"),
    "key that takes forever": (faults.nested_key, "key is neither text nor a number"),
    "deep nesting": (faults.deep_tuple, "deep"),
    "itself inside": (faults.self_containing, "contains itself"),
    "bytearray of 1 TB": (
        lambda: faults.crafted(
            b"}X\x01\0\0\0acbuiltins\nbytearray\n\x8a\x06" + b"\1" * 6 + b"\x85Rs"
        ),
        "builtins.bytearray",
    ),
    "legacy, storage missing": (
        lambda: faults.crafted_legacy(
            b"}X\x0a\0\0\0state_dict}X\x01\0\0\0w" + faults.tensor_opcodes() + b"ss", [], b""
        ),
        "not those its tensors use",
    ),
    "legacy, storage cut off": (
        lambda: faults.crafted_legacy(
            b"}X\x0a\0\0\0state_dict}X\x01\0\0\0w" + faults.tensor_opcodes() + b"ss",
            ["0"],
            b"\x04" + bytes(9),
        ),
        "truncated",
    ),
    "empty": (lambda: b"", "an empty file"),
    "text": (lambda: b"epoch 1 loss 0.3\n" * 100, "a text file"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "not a PyTorch checkpoint"),
    "zip of something else": (
        lambda: faults.rewritten_zip(faults.saved({}), lambda n, c: None if "pkl" in n else c),
        "a zip file, but not a PyTorch checkpoint",
    ),
    "a network, not its weights": (
        lambda: faults.saved(torch.nn.Linear(2, 2)),
        "torch.nn.modules.linear.Linear",
    ),
    "not a dict": (lambda: faults.saved([1, 2]), "holds a list"),
    "a tensor": (lambda: faults.saved(torch.ones(3)), "holds a tensor"),
    "no state_dict": (
        lambda: faults.saved({"model": {}, "epoch": 3}),
        "no 'state_dict' in it \\(it holds model, epoch\\)",
    ),
    "empty state_dict": (
        lambda: faults.saved({"state_dict": {}}),
        "weights are not a dict of tensors",
    ),
    "state_dict of numbers": (lambda: faults.saved({"state_dict": {"a": 1.0}}), "not a tensor"),
    "nan": (
        lambda: faults.saved({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}),
        r"not finite \(1 of 2 in w are NaN or infinite\)",
    ),
    "infinite": (
        lambda: faults.saved({"state_dict": {"w": torch.tensor(float("inf"))}}),
        "not finite",
    ),
    "epoch of another type": (
        lambda: faults.saved(small_checkpoint(epoch="\x1b[31mfour")),
        "'epoch' is .x1b.31mfour, a number is needed",
    ),
    "negative epoch": (lambda: faults.saved(small_checkpoint(epoch=-4)), "'epoch' is -4"),
    "arch": (lambda: faults.saved(small_checkpoint(arch=[])), "'arch' does not describe"),
    "arch of a million layers": (
        lambda: faults.saved(small_checkpoint(arch={"name": "resnet", "depth": 10**6})),
        "'arch' holds depth = 1000000",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path, kind):
    make, message = HOSTILE[kind]
    (tmp_path / "x").write_bytes(make())
    start = time.monotonic()
    refused(tmp_path / "x", message)
    assert time.monotonic() - start < 10


def test_paths_that_are_no_files(tmp_path):
    refused(tmp_path, "a directory")
    refused(tmp_path / "missing", "no such file")
    refused(tmp_path / "missing" / "x", "no such file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")
    refused("/dev/zero", "not a regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "symbolic links")
    refused(tmp_path / ("n" * 300), "name too long")
    with pytest.raises(UserError):
        load_checkpoint("a\0b")


def test_a_file_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "x").write_bytes(faults.saved(small_checkpoint()))
    (tmp_path / "x").chmod(0)
    refused(tmp_path / "x", "permission denied")


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(safe_load.MAX_FILE_BYTES + 1)
    refused(tmp_path / "x", "more than the 4096 MB allowed")


# ------------------------------------------------------------------------------- networks


def save_network(path, network, **more):
    content = {"state_dict": network.state_dict(), "arch": network.arch, "epoch": 1, **more}
    save_checkpoint(path, content)


@pytest.mark.parametrize("options", [{"name": "small_cnn"}, {"name": "resnet", "depth": 8}])
@pytest.mark.parametrize("stored", [True, False])
def test_a_network_comes_back(tmp_path, options, stored):
    network = build_model(**options)
    save_network(tmp_path / "x", network, **({} if stored else {"arch": None}))
    before = torch.get_rng_state()
    again, checkpoint = load_network(tmp_path / "x")
    assert torch.equal(before, torch.get_rng_state())
    assert again.arch == network.arch and not again.training and checkpoint["epoch"] == 1
    assert same(dict(again.state_dict()), dict(network.state_dict()))
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())


def test_the_activation_is_stored_and_may_be_asked_for_where_it_is_not(tmp_path):
    silu = build_model("resnet", depth=8, activation="silu")
    save_network(tmp_path / "ours", silu)
    assert load_network(tmp_path / "ours")[0].arch["activation"] == "silu"
    with pytest.raises(UserError, match=r"holds resnet \(activation silu\), asked was resnet"):
        load_network(tmp_path / "ours", {"activation": "relu"})
    save_network(tmp_path / "theirs", silu, arch=None)
    asked = load_network(tmp_path / "theirs", {"activation": "silu"})[0]
    assert asked.arch["activation"] == "silu"


def test_another_architecture_is_named(tmp_path):
    save_network(tmp_path / "x", build_model("resnet", depth=8))
    with pytest.raises(UserError, match=r"holds resnet \(depth 8\), asked was resnet \(depth 20\)"):
        load_network(tmp_path / "x", {"name": "resnet", "depth": 20})
    with pytest.raises(UserError, match="holds resnet, asked was small_cnn"):
        load_network(tmp_path / "x", {"name": "small_cnn"})
    # dropout does nothing in evaluation; None means: not asked for
    load_network(tmp_path / "x", {"drop": 0.5, "depth": None})


def break_state(kind, state):
    if kind == "missing":
        del state["fc.bias"]
    elif kind == "surplus":
        state["more"] = torch.ones(1)
    elif kind == "shape":
        state["layer1.0.conv1.weight"] = torch.ones(16, 16, 5, 5)
    elif kind == "kind":
        state["fc.bias"] = torch.ones(10, dtype=torch.int64)
    elif kind == "classes":
        state["fc.weight"], state["fc.bias"] = torch.ones(7, 64), torch.ones(7)
    elif kind == "unknown":
        for name in list(state):
            state["net." + name] = state.pop(name)


@pytest.mark.parametrize(
    "kind,message",
    [
        ("missing", "1 weights missing .first: fc.bias"),
        ("surplus", "1 unknown .first: more"),
        ("shape", "layer1.0.conv1.weight has shape .16, 16, 5, 5., needed is .16, 16, 3, 3."),
        ("kind", "fc.bias has numbers of type torch.int64"),
        ("classes", "num_classes 7.*num_classes 10.*needed is .10, 64."),
        ("unknown", "missing .*unknown"),
    ],
)
def test_weights_that_do_not_fit_reach_no_network(tmp_path, kind, message):
    network = build_model("resnet", depth=8)
    state = dict(network.state_dict())
    break_state(kind, state)
    save_checkpoint(tmp_path / "x", {"state_dict": state, "arch": network.arch})
    with pytest.raises(UserError, match=message):
        load_network(tmp_path / "x")
    running = build_model("resnet", depth=8)
    before = {name: tensor.clone() for name, tensor in running.state_dict().items()}
    with pytest.raises(UserError, match=message):
        restore_network(running, load_checkpoint(tmp_path / "x"), tmp_path / "x")
    for strange in ("text", None, {}, {"w": 1}, {1: torch.ones(1)}):
        with pytest.raises(UserError):
            restore_network(running, {"state_dict": strange}, "x")
    assert same(dict(running.state_dict()), before)


def test_a_strange_network_without_description(tmp_path):
    save_checkpoint(tmp_path / "x", {"state_dict": {"a.weight": torch.ones(3)}})
    with pytest.raises(UserError, match=r"not a network known here \(its weights: a.weight"):
        load_network(tmp_path / "x")


def test_a_description_that_names_no_network(tmp_path):
    network = build_model("small_cnn")
    for arch in (
        {"name": "vgg"},
        {"name": "resnet", "depth": 9},
        {"name": "small_cnn", "drop": "x"},
    ):
        save_network(tmp_path / "x", network, arch=arch)
        with pytest.raises(UserError) as caught:
            load_network(tmp_path / "x")
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ optimizer


def trained(network, kind="SGD"):
    if kind == "SGD":
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    network(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_optimizer_state_comes_back(tmp_path, kind):
    network = torch.nn.Linear(3, 2)
    optimizer = trained(network, kind)
    content = {"state_dict": network.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path / "x", content)
    again = trained(torch.nn.Linear(3, 2), kind)
    restore_optimizer(again, load_checkpoint(tmp_path / "x"), tmp_path / "x")
    assert same(again.state_dict(), optimizer.state_dict())


def test_optimizer_state_that_does_not_fit_is_refused(tmp_path):
    network = torch.nn.Linear(3, 2)
    sgd = trained(network)
    good = sgd.state_dict()
    wrong_shape = {**good, "state": {0: {"momentum_buffer": torch.ones(7)}}}
    not_finite = {**good, "state": {0: {"momentum_buffer": torch.full((2, 3), float("nan"))}}}
    nan_lr = {**good, "param_groups": [{**good["param_groups"][0], "lr": float("nan")}]}
    for state, message in [
        (None, "there is none"),
        ([], "there is none"),
        ({}, "not an optimizer's"),
        (wrong_shape, "momentum_buffer of shape"),
        (not_finite, "not finite"),
        (nan_lr, "lr is nan"),
        (trained(torch.nn.Linear(3, 2), "Adam").state_dict(), "another optimizer's settings"),
        (trained(torch.nn.Linear(3, 2, bias=False)).state_dict(), "another number of parameters"),
        ({**good, "state": {9: {}}}, "does not exist"),
        ({**good, "param_groups": [3]}, "another number of parameters"),
    ]:
        with pytest.raises(UserError, match=message):
            restore_optimizer(sgd, {"optimizer": state}, "x")
        assert same(sgd.state_dict(), good)


@dataclasses.dataclass
class Counted:
    epoch: int = 0
    best: float = -1.0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)


def test_progress_comes_back_or_is_refused():
    progress = Counted(3, 0.5, {"loss": 1.5, "samples": 7})
    assert restore_fields(Counted, dataclasses.asdict(progress), "x", "progress") == progress
    assert restore_fields(Counted, {"best": 1}, "x", "progress").best == 1
    for values, message in [
        (None, "does not hold epoch, best, sums"),
        ([1], "does not hold"),
        ({"more": 1}, "does not hold"),
        ({"epoch": "one"}, "epoch = one"),
        ({"epoch": -1}, "epoch = -1"),
        ({"epoch": True}, "epoch = True"),
        ({"epoch": 1.0}, "epoch = 1.0"),
        ({"best": float("nan")}, "best = nan"),
        ({"sums": {"loss": "x"}}, "sums"),
        ({"sums": 3}, "sums = 3"),
    ]:
        with pytest.raises(UserError, match=message):
            restore_fields(Counted, values, "x", "progress")


# ----------------------------------------------------------------------------- run folder


def test_a_run_folder(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as run:
        run.save(small_checkpoint(), CHECKPOINT, BEST)
        run.save_json("args.json", {"lr": 0.1, "path": Path("x")})
        run.log(["epoch"]).append({"epoch": 1, "Learning Rate": 0.1})
        names = {entry.name for entry in run.path.iterdir()}
        assert names == {".lock", CHECKPOINT, BEST, "args.json", "log.txt"}
        assert run.checkpoint.read_bytes() == run.best.read_bytes()
        assert json.loads((run.path / "args.json").read_text()) == {"lr": 0.1, "path": "x"}
        assert run.scalars == run.path / "scalars"


def test_one_run_a_folder(tmp_path):
    with RunFolder(tmp_path), pytest.raises(UserError, match=f"in use.*process {os.getpid()}"):
        RunFolder(tmp_path)
    with RunFolder(tmp_path):  # given back
        pass


def in_child(function, *arguments):
    """Start ``function(send, *arguments)`` in a process of its own; what it sends arrives here."""
    context = multiprocessing.get_context("fork")  # no second import of torch
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender.send, *arguments), daemon=True)
    process.start()
    return process, receiver.recv


def hold_a_folder(send, path):
    run = RunFolder(path)
    (run.path / f".{CHECKPOINT}.tmp-1").write_text("half")
    send("ready")
    time.sleep(60)


def test_a_killed_run_leaves_no_lock(tmp_path):
    process, receive = in_child(hold_a_folder, tmp_path)
    assert receive() == "ready"
    with pytest.raises(UserError, match=f"process {process.pid}"):
        RunFolder(tmp_path)
    process.kill()
    process.join()
    with RunFolder(tmp_path):
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]  # the half file is gone


def test_a_folder_that_holds_a_run(tmp_path):
    with RunFolder(tmp_path) as run:
        run.save(small_checkpoint())
        run.log().append({"Learning Rate": 1})
        (run.scalars).mkdir()
        (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds a run; go on with --resume .*checkpoint.pth.tar"):
        RunFolder(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        RunFolder(tmp_path, resume_from=tmp_path / "elsewhere" / CHECKPOINT)
    with RunFolder(tmp_path, resume_from=tmp_path / "." / CHECKPOINT) as run:
        assert run.checkpoint.exists()
    with RunFolder(tmp_path, overwrite=True) as run:
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_places_that_cannot_be_run_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder("/proc/run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="symbolic links"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    write_atomic(tmp_path / CHECKPOINT, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=r"no space left.*needed.*intact, go on with --resume"):
        write_atomic(tmp_path / CHECKPOINT, b"new")
    assert (tmp_path / CHECKPOINT).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [CHECKPOINT]


def fill_the_disk(send, path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    run = RunFolder(path, resume_from=path / CHECKPOINT)
    log = run.log(["x"])
    try:
        run.save({"state_dict": {"w": torch.ones(9000)}})
    except UserError as error:
        send(str(error))
    try:
        while True:
            log.append({"x": 1})
    except UserError as error:
        send(str(error))


def test_a_file_system_that_is_full(tmp_path):
    """The kernel's own limit on file sizes stands for a full disk, in a process of its own."""
    save_checkpoint(tmp_path / CHECKPOINT, small_checkpoint())
    before = (tmp_path / CHECKPOINT).read_bytes()
    process, receive = in_child(fill_the_disk, tmp_path)
    line = receive()
    assert f"{CHECKPOINT}: file too large" in line and "MB needed" in line
    line = receive()
    assert "log.txt: file too large" in line and "--resume" in line
    process.join()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert set(os.listdir(tmp_path)) == {".lock", CHECKPOINT, "log.txt"}
    assert len(set(read_log(tmp_path / "log.txt")["x"])) == 1


# ------------------------------------------------------------------------------------ log


def test_the_log_is_the_originals_and_more(tmp_path):
    log = Log(tmp_path / "log.txt", (*LOG_COLUMNS, "seconds"))
    log.append({"Learning Rate": 0.1, "Valid Acc.": 55.34, "seconds": 12})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0].split("\t")[:7] == [
        "Learning Rate",
        "Train Loss",
        "Valid Loss",
        "Train Acc.",
        "Valid Acc.",
        "loss normal",
        "loss gradient",
    ]
    assert lines[1].split("\t") == ["0.1", "nan", "nan", "nan", "55.34", "nan", "nan", "12"]
    with pytest.raises(KeyError, match="tpyo"):
        log.append({"tpyo": 1})


def test_a_resumed_log_keeps_the_epochs_before(tmp_path):
    path = tmp_path / "log.txt"
    log = Log(path, ("a", "b"))
    for i in range(5):
        log.append({"a": i, "b": i / 7})
    with open(path, "a") as file:
        file.write("5\t0.7")  # a kill in the middle of a row
    log = Log(path, ("a", "c", "b"), keep=3)
    log.append({"a": 3, "b": 9, "c": 1})
    table = read_log(path)
    assert list(table) == ["a", "c", "b"] and table["a"] == [0, 1, 2, 3]
    assert table["b"][1] == pytest.approx(1 / 7, rel=1e-7) and table["c"][3] == 1
    Log(path, ("a",), keep=99)
    assert len(read_log(path)["a"]) == 4
    Log(path, ("a",))
    assert read_log(path) == {"a": []}

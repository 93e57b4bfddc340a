"""Checkpoints: what is saved comes back, what is damaged or does not fit is refused."""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import build_model
from tests.faults import files
from tests.helpers import save_checkpoint
from utils import checkpoints
from utils.checkpoints import (
    arch_of,
    check_data,
    find_checkpoint,
    load_checkpoint,
    restore_network,
    restore_optimizer,
)
from utils.data import ImageSet
from utils.errors import UserError
from utils.networks import load_network, sha256_of
from utils.run_folder import BEST, CHECKPOINT

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


def refused(path, message: str = "") -> None:
    """load_checkpoint refuses the file, in one line that names it."""
    with pytest.raises(UserError, match=message or None) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(path)) and len(line) < 700


# ------------------------------------------------------------------------- save and load


FORMATS = {"today's": {}, "legacy": {"legacy": True}, "protocol 4": {"protocol": 4}}


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_what_is_saved_comes_back(tmp_path, form):
    path, content = tmp_path / "a.pth.tar", small_checkpoint()
    if form is None:
        save_checkpoint(path, content)
    else:
        path.write_bytes(files.saved(content, **FORMATS[form]))
    assert same(load_checkpoint(path), content)
    assert os.listdir(tmp_path) == ["a.pth.tar"]


def test_saving_is_deterministic(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, small_checkpoint())
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    assert len(sha256_of(tmp_path / "a")) == 64
    with pytest.raises(UserError, match="no such file"):
        sha256_of(tmp_path / "c")


def test_parameters_and_half_precision_load(tmp_path):
    layer = torch.nn.Linear(3, 4)
    content = {"state_dict": dict(layer.named_parameters()), "half": torch.ones(2).bfloat16()}
    (tmp_path / "x").write_bytes(files.saved(content))
    loaded = load_checkpoint(tmp_path / "x")
    assert torch.equal(loaded["state_dict"]["weight"], layer.weight)
    assert not loaded["state_dict"]["weight"].requires_grad


@pytest.mark.parametrize("form", FORMATS)
def test_views_and_tied_weights_load(tmp_path, form):
    base = torch.arange(12.0).view(3, 4)
    state = {"whole": base, "row": base[1], "turned": base.t(), "tied": base, "none": base[:0]}
    (tmp_path / "x").write_bytes(files.saved({"state_dict": state}, **FORMATS[form]))
    assert same(load_checkpoint(tmp_path / "x")["state_dict"], state)


def test_a_run_folder_stands_for_its_file(tmp_path):
    save_network(tmp_path / BEST, build_model("resnet", depth=8))
    assert find_checkpoint(tmp_path, BEST) == find_checkpoint(tmp_path / BEST, BEST)
    assert load_network(tmp_path)[0].arch["depth"] == 8
    with pytest.raises(UserError, match=f"a directory without {CHECKPOINT}"):
        find_checkpoint(tmp_path, CHECKPOINT)
    assert find_checkpoint(tmp_path / "missing", BEST) == tmp_path / "missing"


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


def test_the_originals_wrn_loads_without_its_unused_block(tmp_path):
    """WRN-28-6 with a second copy of its first group: 13.74 M parameters, 13.14 M of them used."""
    network = build_model("wrn", depth=28, widen_factor=6)
    network.sub_block1 = build_model("wrn", depth=28, widen_factor=6).block1
    # Registered after block1, as in the original: the optimizer counts parameters in that order.
    for name in ("block2", "block3", "bn1", "relu", "fc"):
        module = getattr(network, name)
        delattr(network, name)
        setattr(network, name, module)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 13.74
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.rand(2, 3, 8, 8)).logsumexp(1).sum().backward()
    optimizer.step()
    state = {"module." + name: tensor for name, tensor in network.state_dict().items()}
    content = {"epoch": 4, "state_dict": state, "acc": 50.0, "optimizer": optimizer.state_dict()}
    (tmp_path / "x").write_bytes(files.saved(content, legacy=True))
    loaded, checkpoint = load_network(tmp_path / "x")
    assert round(sum(p.numel() for p in loaded.parameters()) / 1e6, 2) == 13.14
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded(x), network.eval()(x), rtol=0, atol=0)
    assert "optimizer" not in checkpoint and checkpoint["epoch"] == 4
    # Elsewhere such weights are unknown ones.
    resnet = build_model("resnet", depth=8)
    state = {**resnet.state_dict(), "sub_block1.layer.0.conv1.weight": torch.ones(1)}
    save_checkpoint(tmp_path / "y", {"state_dict": state})
    with pytest.raises(UserError, match=r"1 weights do not fit .sub_block1"):
        load_network(tmp_path / "y")


# ------------------------------------------------------------------ checkpoints of others


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net"])
def test_the_weights_are_found(tmp_path, key, prefix):
    network = build_model("resnet", depth=8, num_classes=3)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    (tmp_path / "x").write_bytes(files.saved(state if key is None else {key: state, "epoch": 2}))
    again, checkpoint = load_network(tmp_path / "x")
    assert again.arch == network.arch
    assert same(dict(again.state_dict()), dict(network.state_dict()))
    assert key is None or checkpoint["epoch"] == 2


def test_a_prefix_of_some_weights_stays(tmp_path):
    state = {"module.a": torch.ones(2), "b": torch.zeros(1)}
    (tmp_path / "x").write_bytes(files.saved(state))
    assert list(load_checkpoint(tmp_path / "x")["state_dict"]) == ["module.a", "b"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_others_store_beside_the_weights(tmp_path, protocol):
    """Every number as a number, flags by name, whatever the pickle protocol."""
    network = build_model("resnet", depth=8, activation="silu")
    content = {
        "model": network.state_dict(),
        "arch": "resnet20",
        "epoch": np.int64(7),
        "acc": torch.tensor(61.5),
        "best_acc": np.float64(62.25),
        "args": argparse.Namespace(lr=0.1, arch="resnet20"),
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1).state_dict(),
    }
    (tmp_path / "x").write_bytes(files.saved(content, protocol=protocol))
    again, found = load_network(tmp_path / "x", {"activation": "silu"})
    assert same(dict(again.state_dict()), dict(network.state_dict()))
    assert again.arch == network.arch and "arch" not in found
    for key, value in {"epoch": 7, "acc": 61.5, "best_acc": 62.25}.items():
        assert found[key] == value and type(found[key]) is type(value)
    assert found["args"] == {"lr": 0.1, "arch": "resnet20"}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_numpys_scalars_under_both_names_of_its_module(tmp_path, core):
    data = files.saved(small_checkpoint(best_acc=np.float64(62.25)))

    def renamed(name, content):
        return re.sub(rb"cnumpy\._?core\.multi", b"cnumpy." + core + b".multi", content)

    (tmp_path / "x").write_bytes(files.rewritten_zip(data, renamed))
    assert load_checkpoint(tmp_path / "x")["best_acc"] == 62.25


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    network = build_model("resnet", depth=8)
    safetensors.save_file(network.state_dict(), tmp_path / "x.safetensors")
    again, _ = load_network(tmp_path / "x.safetensors")
    assert same(dict(again.state_dict()), dict(network.state_dict()))
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-9])
    refused(tmp_path / "x.safetensors", "damaged or truncated")


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").write_bytes(bytes(100))
    refused(tmp_path / "x.safetensors", "safetensors")


# ------------------------------------------------------------------------- refused files


def test_a_flipped_bit_is_not_a_weight(tmp_path):
    """torch.load checks no checksum: it would return the damaged weight."""
    data = bytearray(files.saved(small_checkpoint()))
    data[data.find(NUMBERS.numpy().tobytes()) + 403] ^= 0x40
    (tmp_path / "x").write_bytes(data)
    believed = torch.load(tmp_path / "x", weights_only=True)["state_dict"]["layer.weight"]
    assert not torch.equal(believed, NUMBERS.view(20, 30))
    refused(tmp_path / "x", "checksum")


@pytest.mark.parametrize("form", FORMATS)
def test_200_mutations(tmp_path, form):
    """Each damaged file gives the same weights or one line; in the old format, which has no
    checksums, damage to the numbers themselves cannot be seen."""
    content = small_checkpoint()
    data, legacy = files.saved(content, **FORMATS[form]), form == "legacy"
    path, harmless = tmp_path / "x", 0
    start = time.monotonic()
    for seed in range(200):
        draw = random.Random(seed)
        path.write_bytes(files.MUTATIONS[seed % len(files.MUTATIONS)](data, draw))
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error), seed
        else:
            harmless += 1
            assert legacy or same(loaded["state_dict"], content["state_dict"]), seed
    assert harmless < (150 if legacy else 50)
    assert time.monotonic() - start < 60


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=200), head=st.sampled_from([b"", b"}", b"}X\x01\0\0\0a", b"(", b"]"])
)
def test_any_description_is_read_or_refused(tmp_path, body, head):
    (tmp_path / "x").write_bytes(files.crafted(head + body))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("legacy,protocol", [(False, 2), (False, 4), (False, 5), (True, 2)])
def test_code_in_a_checkpoint_is_not_run(tmp_path, legacy, protocol):
    evidence, path = tmp_path / "evidence", tmp_path / "x"
    content = small_checkpoint(args=files.Command(str(evidence)))
    path.write_bytes(files.saved(content, legacy, protocol))
    refused(path, r"wants to run or build posix.system")
    assert not evidence.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_not_run(tmp_path, protocol):
    evidence = tmp_path / "evidence"
    (tmp_path / "x").write_bytes(files.pickle.dumps(files.Command(str(evidence)), protocol))
    refused(tmp_path / "x", "not a PyTorch checkpoint")
    assert not evidence.exists()


def pickled(*parts) -> bytes:
    """A zip checkpoint of protocol 4 that names functions and classes by these opcodes."""

    def as_protocol_4(name, content):
        return b"\x80\x04" + content[2:] if name.endswith("data.pkl") else content

    return files.rewritten_zip(files.crafted(b"".join(parts)), as_protocol_4)


def named(module: str, name: str) -> bytes:
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"".join(texts) + b"\x93"


def test_a_checkpoint_cannot_reach_beyond_what_is_allowed(tmp_path):
    """Nor change what it may build, nor have memory taken for objects."""
    path, text = tmp_path / "x", b"\x8c\x01x"
    for module, name in (
        ("os", "system"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("torch", "load"),
    ):
        path.write_bytes(pickled(named(module, name), text, b"\x85R"))
        refused(path, f"wants to run or build {module}.{re.escape(name)}, .*; not run")
    for module, name in (("argparse", "Namespace"), ("numpy", "ndarray")):
        path.write_bytes(pickled(named(module, name), b"N}", text, b"K\x01s\x86b"))
        refused(path)
    assert not hasattr(argparse.Namespace, "x") and not hasattr(types.SimpleNamespace, "x")
    dtype = named("numpy", "dtype") + b"\x8c\x01O\x85R"
    for module, name in (("multiarray", "scalar"), ("numeric", "_frombuffer")):
        function = named(f"numpy._core.{module}", name)
        path.write_bytes(pickled(function, b"(", dtype, b"C\x08", b"\x10" * 8, b"tR"))
        refused(path)


REFUSED = {
    "TorchScript": (
        lambda: files.saved(small_checkpoint()) + b"constants.pkl",
        "TorchScript, which is code; not run",
    ),
    "lying sizes": (lambda: files.lying_sizes(files.saved(small_checkpoint())), ""),
    "huge storage": (lambda: files.crafted_state(1 << 40, 1 << 40), "does not match"),
    "negative storage": (lambda: files.crafted_state(-1), ""),
    "absurd storage": (lambda: files.crafted_state(1 << 900), ""),
    "tensor larger than its storage": (lambda: files.crafted_state(size=5), ""),
    "tensor beyond its storage": (lambda: files.crafted_state(offset=1), ""),
    "stride beyond": (lambda: files.crafted_state(size=2, stride=9), ""),
    "negative size": (lambda: files.crafted_state(size=-4), ""),
    "deep nesting": (
        lambda: files.crafted(b"}X\x0a\0\0\0state_dict)" + b"\x85" * 200_000 + b"s"),
        "not a dict of tensors",
    ),
    "itself inside": (
        lambda: files.crafted(b"}q\x00X\x0a\0\0\0state_dicth\x00s"),
        "state_dict, which is not a tensor",
    ),
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"epoch 1 loss 0.3\n" * 100, "begins with b'epoch 1"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "not a PyTorch checkpoint"),
    "a network, not its weights": (
        lambda: files.saved(torch.nn.Linear(2, 2)),
        "torch.nn.modules.linear.Linear",
    ),
    "not a dict": (lambda: files.saved([1, 2]), "holds a list"),
    "a tensor": (lambda: files.saved(torch.ones(3)), "holds a Tensor"),
    "no state_dict": (
        lambda: files.saved({"weights": {}, "epoch": 3}),
        r"no 'state_dict' in it \(it holds weights, epoch\)",
    ),
    "empty state_dict": (
        lambda: files.saved({"state_dict": {}}),
        "weights are not a dict of tensors",
    ),
    "state_dict of numbers": (lambda: files.saved({"state_dict": {"a": 1.0}}), "not a tensor"),
    "nan": (
        lambda: files.saved({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}),
        r"not finite \(1 of 2 in w\)",
    ),
    "infinite": (
        lambda: files.saved({"state_dict": {"w": torch.tensor(float("inf"))}}),
        "not finite",
    ),
    "epoch of another type": (
        lambda: files.saved(small_checkpoint(epoch="\x1b[31mfour")),
        "invalid literal for int.*four",
    ),
    "classes of another type": (
        lambda: files.saved(small_checkpoint(classes=10)),
        "not iterable",
    ),
    "flags of another type": (
        lambda: files.saved(small_checkpoint(args=[1])),
        "cannot convert dictionary",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_checkpoint_ends_in_one_line(tmp_path, kind):
    make, message = REFUSED[kind]
    (tmp_path / "x").write_bytes(make())
    start = time.monotonic()
    refused(tmp_path / "x", message)
    assert time.monotonic() - start < 10


def test_paths_that_are_no_files(tmp_path):
    refused(tmp_path, "not a regular file")
    refused(tmp_path / "missing", "no such file")
    refused(tmp_path / "missing" / "x", "no such file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")
    refused("/dev/zero", "not a regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "symbolic links")
    refused(tmp_path / ("n" * 300), "name too long")
    refused("a\0b")


def test_a_file_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "x").write_bytes(files.saved(small_checkpoint()))
    (tmp_path / "x").chmod(0)
    refused(tmp_path / "x", "permission denied")


def test_a_file_that_is_too_large(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(checkpoints.MAX_BYTES + 1)
    refused(tmp_path / "x", "not a regular file of at most 4096 MB")


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
    with pytest.raises(UserError, match="holds activation silu, asked was activation relu"):
        load_network(tmp_path / "ours", {"activation": "relu"})
    save_network(tmp_path / "theirs", silu, arch=None)
    asked = load_network(tmp_path / "theirs", {"activation": "silu"})[0]
    assert asked.arch["activation"] == "silu"


def test_another_architecture_is_named(tmp_path):
    save_network(tmp_path / "x", build_model("resnet", depth=8))
    with pytest.raises(UserError, match="holds depth 8, asked was depth 20"):
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
        ("missing", "1 weights do not fit .fc.bias: missing, needed is float .10."),
        ("surplus", "1 weights do not fit .more: float .1., needed is nothing"),
        ("shape", "layer1.0.conv1.weight: float .16, 16, 5, 5., needed is float .16, 16, 3, 3."),
        ("kind", "fc.bias: int .10., needed is float .10."),
        ("classes", "num_classes 7, asked was num_classes 10"),
        ("unknown", "weights do not fit .conv1.weight: missing"),
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
    with pytest.raises(UserError):
        restore_network(running, {"state_dict": {}}, "x")
    assert same(dict(running.state_dict()), before)


def test_a_strange_network_without_description(tmp_path):
    save_checkpoint(tmp_path / "x", {"state_dict": {"a.weight": torch.ones(3)}})
    incomplete = build_model("small_cnn").state_dict()
    del incomplete["classifier.fc1.weight"]
    with pytest.raises(UserError, match="x: damaged or truncated"):
        checkpoints.arch_of({"state_dict": incomplete}, None, "x")
    with pytest.raises(UserError, match=r"not a network known here \(its weights: a.weight"):
        load_network(tmp_path / "x")


def test_what_the_file_says_of_its_network_is_used_or_contradicted(tmp_path):
    """A run that continues from a checkpoint must not build another network without a word."""
    silu = build_model("resnet", depth=8, activation="silu")
    save_network(tmp_path / "x", silu)
    checkpoint = load_checkpoint(tmp_path / "x")
    assert arch_of(checkpoint, {}, "x") == silu.arch
    assert arch_of(checkpoint, {"drop": 0.5, "activation": None}, "x") == {**silu.arch, "drop": 0.5}
    relu = build_model("resnet", depth=8)
    before = {name: tensor.clone() for name, tensor in relu.state_dict().items()}
    with pytest.raises(UserError, match="holds activation silu, asked was activation relu"):
        restore_network(relu, checkpoint, "x")
    assert same(dict(relu.state_dict()), before)
    restore_network(silu, checkpoint, "x")
    # The weights know better than the description.
    save_network(tmp_path / "y", silu, arch={"name": "wrn", "depth": 10**6 + 2})
    with pytest.raises(UserError, match="holds resnet, asked was wrn"):
        load_network(tmp_path / "y")


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


def test_data_that_are_not_those_of_the_checkpoint():
    """Labels stand for classes in their order; a dataset of the same classes may be another."""

    def data(classes, source):
        images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
        return ImageSet("shown", images, labels, tuple(classes), source)

    stated = {"classes": ["cat", "dog"], "args": {"dataset": "MNIST"}}
    check_data(stated, "x", data(["cat", "dog"], "MNIST"))
    check_data(stated, "x", data(["cat", "dog"], "folder"))
    check_data({**stated, "args": {"dataset": "folder"}}, "x", data(["cat", "dog"], "MNIST"))
    check_data({}, "x", data(["a", "b"], "MNIST"))
    check_data({"dataset": " "}, "x", data(["a", "b"], "MNIST"))
    for other, message in [
        (data(["dog", "cat"], "MNIST"), "its class 'cat' is 'dog' in the data"),
        (data(["cat", "dog", "owl"], "folder"), "its class 'no class' is 'owl' in the data"),
        (data(["cat", "dog"], "FashionMNIST"), "its dataset is MNIST .--dataset FashionMNIST"),
    ]:
        with pytest.raises(UserError, match=f"{message}.*; --force takes the data anyhow"):
            check_data(stated, "x", other)
        check_data(stated, "x", other, force=True)


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
    group = good["param_groups"][0]
    for state in (
        None,
        [],
        {},
        {**good, "param_groups": [3]},
        {**good, "param_groups": [group, group]},
        trained(torch.nn.Linear(3, 2), "Adam").state_dict(),
        trained(torch.nn.Linear(3, 2, bias=False)).state_dict(),
    ):
        with pytest.raises(UserError, match="its optimizer state is missing, damaged or of anoth"):
            restore_optimizer(sgd, {"optimizer": state}, "x")
        assert same(sgd.state_dict(), good)

"""Checkpoint files: read without running anything in them, restored completely or not at all."""

import io
import os
import warnings
import zipfile
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models import infer_arch, stated_arch
from utils import foreign
from utils.data import ImageSet
from utils.datasets import DATASETS
from utils.errors import UserError, printable
from utils.foreign import naming
from utils.run_folder import AnyPath

MAX_BYTES = 4 << 30
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= 80 else text[:80] + "..."


def find_checkpoint(path: AnyPath, name: str) -> Path:
    """``path`` itself or, if it is a run folder, the file of that name in it, or UserError."""
    if not os.path.isdir(path):
        return Path(path)
    if not Path(path, name).exists():
        raise UserError(f"{path}: a directory without {name}")
    return Path(path, name)


def load_checkpoint(path: AnyPath) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU, or UserError; nothing in it is executed.

    Reads our files, the original's and others': PyTorch's two formats and safetensors, the weights
    alone or under ``state_dict``, ``model_state_dict``, ``model`` or ``net``. Returns finite
    tensors by plain name as ``state_dict``, numbers as ``epoch``, ``acc`` and ``best_acc``, dicts
    as ``args`` and ``arch``, where they are present, and the rest as it is.
    """
    with naming(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a damaged file makes the libraries wonder about
        if os.path.getsize(path) > MAX_BYTES or not os.path.isfile(path):
            raise UserError(f"not a regular file of at most {MAX_BYTES >> 20} MB")
        data = Path(path).read_bytes()
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load

            return _standard(load(data))
        if not data.startswith((ZIP, LEGACY)):
            begins = f"it begins with {data[:50]!r}" if data else "it is empty"
            raise UserError(f"not a PyTorch checkpoint, or damaged ({begins})")
        if data.startswith(ZIP):
            if b"constants.pkl" in data:  # torch.load would run it
                raise UserError("TorchScript, which is code; not run")
            if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():  # torch.load does not look
                raise UserError(f"damaged (checksum of {_short(damaged)})")
        # weights_only reads one pickle protocol; with our Unpickler all are as harmless.
        options = {"weights_only": False, "pickle_module": foreign}
        return _standard(torch.load(io.BytesIO(data), map_location="cpu", **options))


def _standard(found: Any) -> dict[str, Any]:
    """The content of anyone's checkpoint under our keys."""
    if not isinstance(found, dict):
        raise UserError(f"holds a {type(found).__name__}, a checkpoint is a dict")
    if found and all(isinstance(value, Tensor) for value in found.values()):
        found = {"state_dict": found}
    names = [key for key in ("state_dict", "model_state_dict", "model", "net") if key in found]
    if not names:
        raise UserError(f"no 'state_dict' in it (it holds {_short(', '.join(map(str, found)))})")
    state = found[names[0]]
    if not isinstance(state, Mapping) or not state:
        raise UserError("its weights are not a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"its weights hold {_short(name)}, which is not a tensor")
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise UserError(f"not finite ({bad} of {tensor.numel()} in {_short(name)})")
    while all(name.startswith(("module.", "_orig_mod.")) for name in state):
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    if "block1.layer.0.conv1.weight" in state and "sub_block1.layer.0.conv1.weight" in state:
        # The original's WRN carries a copy of its first group that nothing uses.
        state = {k: v for k, v in state.items() if not k.startswith("sub_block1.")}
        found = {key: value for key, value in found.items() if key != "optimizer"}
    checkpoint = {"state_dict": {name: tensor.detach() for name, tensor in state.items()}}
    kinds = {"epoch": int, "acc": float, "best_acc": float, "args": dict, "classes": list}
    for key, value in found.items():
        value = vars(value) if isinstance(value, SimpleNamespace) else value
        bare_name = key == "arch" and not isinstance(value, dict)  # the weights' shapes say more
        if key != names[0] and value is not None and not bare_name:
            checkpoint[key] = kinds[key](value) if key in kinds else value
    return checkpoint


def arch_of(
    checkpoint: Mapping[str, Any], asked: Mapping[str, Any] | None, path: AnyPath
) -> dict[str, Any]:
    """The options for ``build_model`` that a checkpoint states, or its weights' shapes.

    ``asked``, what the user gave (None: not given), completes them. UserError: it contradicts them,
    dropout aside, or the network is not known.
    """
    with naming(path):
        found, stored = infer_arch(checkpoint["state_dict"]) or {}, checkpoint.get("arch") or {}
    asked = {key: value for key, value in (asked or {}).items() if value is not None}
    if "name" not in {**found, **stored, **asked}:
        names = _short(", ".join(checkpoint["state_dict"]))
        raise UserError(f"{path}: not a network known here (its weights: {names})")
    for source in (stored, asked):
        shared = found.keys() & source.keys() - {"drop", "image_size"}  # no sure trace in weights
        for key in sorted(shared, key=lambda key: (key != "name", key)):
            if found[key] != source[key]:
                told = (f"{key} {arch[key]}".removeprefix("name ") for arch in (found, source))
                raise UserError(f"{path}: holds {', asked was '.join(map(_short, told))}")
        found |= source
    return found


def unstated(checkpoint: Mapping[str, Any], activation: str | None = None) -> list[str]:
    """A note where nothing says what activation a network has: it leaves no trace in weights."""
    if activation or "activation" in (checkpoint.get("arch") or {}):
        return []
    return ["its activation is not stated, relu is taken"]


def stated_dataset(checkpoint: Mapping[str, Any]) -> str | None:
    """The dataset that a checkpoint states, as ``--dataset`` calls it; None if it states none."""
    stated = (checkpoint.get("args") or {}).get("dataset") or checkpoint.get("dataset")
    known = {name.lower(): name for name in DATASETS}
    # Older ones call an image folder by its name.
    return known.get(str(stated).partition(" ")[0].lower(), "folder") if stated else None


def check_data(
    checkpoint: Mapping[str, Any], path: AnyPath, data: ImageSet, force: bool = False,
    training_images: str | None = None,
) -> None:  # fmt: skip
    """UserError where labels, or training images (their fingerprint), are not those that the
    checkpoint states, unless ``force``."""
    stated, classes = stated_dataset(checkpoint), checkpoint.get("classes") or data.classes
    pairs = zip_longest(classes, data.classes, fillvalue="no class")
    wrong = [f"its class {_short(c)!r} is {own!r} in the data" for c, own in pairs if c != own]
    if stated not in (None, data.source) and "folder" not in (stated, data.source):
        wrong = [f"its dataset is {stated}"]
    if training_images not in (None, checkpoint.get("data_sha256", training_images)):
        wrong.append("its training images were others")
    if wrong and not force:
        advice = f"(--dataset {data.source}); --force takes the data anyhow"
        raise UserError(f"{path}: {wrong[0]} {advice}")


def restore_network(network: nn.Module, checkpoint: Mapping[str, Any], path: AnyPath) -> None:
    """Load a checkpoint's weights into a network, or UserError; it is untouched then."""
    state = checkpoint["state_dict"]
    if stated := stated_arch(network):
        arch_of(checkpoint, stated, path)
    have, need = (
        {n: f"{'float' if t.is_floating_point() else 'int'} {list(t.shape)}" for n, t in w.items()}
        for w in (state, network.state_dict())
    )
    wrong = [name for name in {**need, **have} if have.get(name) != need.get(name)]
    if wrong:
        first = f"{have.get(wrong[0], 'missing')}, needed is {need.get(wrong[0], 'nothing')}"
        raise UserError(f"{path}: {len(wrong)} weights do not fit ({_short(wrong[0])}: {first})")
    network.load_state_dict(state)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any], path: AnyPath
) -> None:
    """Load a checkpoint's optimizer state, or UserError; the optimizer is untouched then."""
    state = checkpoint.get("optimizer")
    try:
        for stored, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
            if not stored.keys() <= group.keys():
                raise ValueError("settings of another optimizer")
        optimizer.load_state_dict(state)
    except (AttributeError, LookupError, TypeError, ValueError):
        line = "its optimizer state is missing, damaged or of another optimizer"
        raise UserError(f"{path}: {line}") from None

"""Networks to evaluate: of a checkpoint, of the user's own function, of the package timm."""

import argparse
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import build_model, stated_arch
from utils import checkpoints
from utils.data import ImageSet
from utils.errors import UserError
from utils.foreign import naming
from utils.run_folder import BEST, AnyPath

# The flags that complete what a checkpoint states of its network.
NAMED = ("depth", "block_name", "widen_factor", "drop", "activation")


def sha256_of(path: AnyPath) -> str:
    """Hexadecimal SHA-256 of a file, or UserError."""
    with naming(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_network(
    path: AnyPath, asked: Mapping[str, Any] | None = None, checkpoint: Any = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, or of a run folder's best, in eval mode; and the checkpoint.

    ``checkpoint`` is what the file holds, where it is loaded already. UserError: the file is
    refused, or holds another network than is ``asked``, see :func:`utils.checkpoints.arch_of`.
    """
    path = checkpoints.find_checkpoint(path, BEST)
    checkpoint = checkpoints.load_checkpoint(path) if checkpoint is None else checkpoint
    arch = checkpoints.arch_of(checkpoint, asked, path)
    with naming(path), torch.device("meta"):  # takes no memory and draws no random numbers
        network = build_model(**arch)
    network.to_empty(device="cpu")
    checkpoints.restore_network(network, checkpoint, path)
    return network.eval(), checkpoint


def _call(name: str) -> nn.Module:
    """The network that the user's ``module:function`` returns."""
    module_name, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function)
        inspect.signature(make).bind()
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise UserError(f"--network {name}: {error}") from None
    network = make()
    if not isinstance(network, nn.Module):
        raise UserError(f"--network {name}: returned {type(network).__name__}, not an nn.Module")
    return network


def sources_of(network: nn.Module, name: str) -> str:
    """Hexadecimal SHA-256 of the files that a network's parts, and ``module:function``, are in."""
    names = {name.partition(":")[0], *(type(part).__module__ for part in network.modules())}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names} - {None}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


def own_network(args: argparse.Namespace) -> str | None:
    """How the flags name a network that is none of ours: module:function, timm:NAME; or None."""
    return args.network or (args.arch if ":" in (args.arch or "") else None)


def check_fits(network: nn.Module, data: ImageSet, name: AnyPath) -> None:
    """UserError unless a network that states its shapes, as ours do, is for such data."""
    arch, (height, width) = stated_arch(network) or {}, data.image_size
    side = arch.get("image_size")
    for what, has, needs in (
        ("channels", data.in_channels, arch.get("in_channels")),
        ("classes", data.num_classes, arch.get("num_classes")),
        ("pixels", f"{height} x {width}", side and f"{side} x {side}"),
    ):
        if needs is not None and has != needs:
            line = f"a network for {needs} {what}, dataset {data.name} has {has}"
            raise UserError(f"{name} is {line}")


def load_for(data: ImageSet, path: AnyPath, force: bool = False) -> nn.Module:
    """A checkpoint's network, where the data are, in eval mode; UserError: not for these images."""
    network, checkpoint = load_network(path)
    checkpoints.check_data(checkpoint, path, data, force)
    check_fits(network, data, path)
    for note in checkpoints.unstated(checkpoint):
        print(f"note: {path}: {note}", file=sys.stderr)
    return network.to(data.images.device)


def build_network(
    args: argparse.Namespace,
    path: str | None,
    checkpoint: Mapping[str, Any],
    data: ImageSet,
    device: torch.device,
) -> nn.Module:
    """The network that the flags name, with a checkpoint's weights, in eval mode, or UserError."""
    own = own_network(args)
    if args.network:
        network = _call(args.network)
    elif own:
        try:
            create = importlib.import_module("timm").create_model
            network = create(args.arch[5:], num_classes=data.num_classes, in_chans=data.in_channels)
        except (ImportError, RuntimeError, TypeError) as error:
            raise UserError(f"--arch {args.arch}: {error} (pip install timm?)") from None
    else:
        asked = {n: getattr(args, n) for n in NAMED}
        network, _ = load_network(path, {"name": args.arch, **asked}, checkpoint)
    if path and own:
        checkpoints.restore_network(network, checkpoint, path)
    check_fits(network, data, path or own)
    if args.mean:
        from torchvision.transforms import Normalize  # importing it takes seconds

        if not {len(args.mean), len(args.std)} <= {1, data.in_channels}:
            has = f"{data.name} has {data.in_channels}"
            raise UserError(f"--mean and --std: give one value, or one for each channel ({has})")
        network = nn.Sequential(Normalize(args.mean, args.std), network)
    return network.to(device, memory_format=torch.channels_last).eval()

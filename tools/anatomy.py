"""The two networks in one checkpoint: what BatchNorm's running and batch statistics make of it.

    python -m tools.anatomy FILE [FILE ...] --data_dir DATA

For every checkpoint: accuracy, spread of the logits and gradient norm by running statistics (the
network that is used) and by batch statistics (the network that is trained), at clean images and at
the sharpest points that the original's search finds for the first of the two; and how much wider
than on the clean batch the inputs of the BatchNorm layers are on the perturbed batch and in the
running statistics. One network would show the same numbers twice and ratios of 1. See
`docs/failure_case.md`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from utils.ball import Ball
from utils.batch_norm import mode, normalization
from utils.data import Batches, ImageSet, load_dataset
from utils.errors import UserError, run_script
from utils.lfr import flatness, sharpest_point
from utils.runs import load_network
from utils.second_order import Kernels

ROWS = {
    "accuracy, clean, running statistics (%)": "{:.1f}",
    "accuracy, clean, batch statistics (%)": "{:.1f}",
    "accuracy, sharpest points, batch statistics (%)": "{:.1f}",
    "deviation of the logits over the images, running statistics": "{:.2f}",
    "deviation of the logits over the images, batch statistics": "{:.2f}",
    "gradient norm, clean, running statistics": "{:.1f}",
    "gradient norm, clean, batch statistics": "{:.1f}",
    "gradient norm, sharpest points, running statistics": "{:.1f}",
    "gradient norm, sharpest points, batch statistics: the penalty": "{:.1f}",
    "widest layer: perturbed batch / clean batch": "{:.2f}",
    "widest layer: running statistics / clean batch": "{:.2f}",
}


@contextmanager
def watched(network: nn.Module, note: Callable[[_BatchNorm, Tensor], None]) -> Iterator[None]:
    """Call ``note(layer, input)`` for every BatchNorm layer that runs inside."""
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: note(layer, inputs[0]))
        for layer in network.modules()
        if isinstance(layer, _BatchNorm)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def deviations(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[_BatchNorm, Tensor]]:
    """Logits [N, classes] by batch statistics, and each layer's input deviation by channel."""
    found: dict[_BatchNorm, Tensor] = {}

    def note(layer: _BatchNorm, inputs: Tensor) -> None:
        found[layer] = inputs.transpose(0, 1).flatten(1).std(1)

    with watched(network, note), torch.no_grad(), normalization(network, batch_statistics=True):
        return network(x), found


def widest(wide: dict[_BatchNorm, Tensor], clean: dict[_BatchNorm, Tensor]) -> float:
    """Median over a layer's channels of the ratio of two deviations, in the layer where it is
    largest. Channels that are constant on the clean batch have no ratio."""
    ratios = []
    for layer, deviation in clean.items():
        alive = deviation > 1e-6
        if alive.any():
            ratios.append(float((wide[layer][alive] / deviation[alive]).median()))
    return max(ratios, default=float("nan"))


def measure(
    network: nn.Module,
    data: ImageSet,
    ball: Ball,
    *,
    step_size: float,
    num_steps: int,
    batch_size: int = 128,
) -> dict[str, float]:
    """Means over the batches of everything in :data:`ROWS`, in that order.

    Raises:
        UserError: the network has no BatchNorm.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        raise UserError("the network has no BatchNorm: it is one network, there is nothing to part")
    running = {layer: layer.running_var.sqrt() for layer in layers}
    found: list[list[float]] = []
    generator = torch.Generator().manual_seed(0)
    with mode(network, training=False):
        for x, y, _ in tqdm(Batches(data, batch_size, shuffle=False), disable=None, leave=False):
            x = x.contiguous(memory_format=torch.channels_last)
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            sharp = sharpest_point(
                network,
                x,
                y,
                ball,
                step_size=step_size,
                num_steps=num_steps,
                start=ball.project(x + 0.001 * noise, x),
                kernels=Kernels(frozen=True),
            )

            def steepness(at: Tensor, y: Tensor = y) -> float:
                return float(flatness(network, at, y, ball, Kernels(frozen=True)).detach().mean())

            with torch.no_grad():
                used = network(x)
            trained, clean = deviations(network, x)
            perturbed, wide = deviations(network, sharp)
            by_running = [steepness(x), steepness(sharp)]
            with normalization(network, batch_statistics=True):
                by_batch = [steepness(x), steepness(sharp)]
            right = [
                100 * float((logits.argmax(1) == y).float().mean())
                for logits in (used, trained, perturbed)
            ]
            spread = [float(logits.std(0).mean()) for logits in (used, trained)]
            norms = [by_running[0], by_batch[0], by_running[1], by_batch[1]]
            found.append([*right, *spread, *norms, widest(wide, clean), widest(running, clean)])
    return dict(zip(ROWS, (statistics.mean(column) for column in zip(*found)), strict=True))


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown, a column for each checkpoint."""
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row, form in ROWS.items():
        lines.append(
            f"| {row} | " + " | ".join(form.format(found[row]) for found in columns.values()) + " |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="checkpoints of networks with BatchNorm")
    parser.add_argument("--dataset", default="cifar10", help="whose test images to use")
    parser.add_argument("--data_dir", type=Path, default=Path("./data"), help="where it is")
    parser.add_argument("--num_examples", type=int, default=512, help="first test images")
    parser.add_argument("--epsilon", type=float, default=0.031, help="l_inf radius, pixels 0 to 1")
    parser.add_argument("--step_size", type=float, default=0.007, help="of the search, likewise")
    parser.add_argument("--num_steps", type=int, default=10, help="of the search")
    args = parser.parse_args(argv)
    for flag in ("num_examples", "num_steps"):
        if getattr(args, flag) < 1 + (flag == "num_examples"):
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed is 1 or more, images 2")
    for flag in ("epsilon", "step_size"):
        if not 0 < getattr(args, flag) <= 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed is above 0, at most 1")
    return args


def main() -> int:
    args = parse()
    data = load_dataset(args.dataset, args.data_dir, train=False).head(args.num_examples)
    columns = {}
    for file in args.files:
        network, _ = load_network(file)
        columns[Path(file).parent.name + "/" + Path(file).name] = measure(
            network.to(memory_format=torch.channels_last),
            data,
            Ball("l_inf", args.epsilon),
            step_size=args.step_size,
            num_steps=args.num_steps,
        )
    print(table(columns))
    return 0


if __name__ == "__main__":
    run_script(main)

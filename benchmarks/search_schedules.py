"""Which schedule finds the sharpest points: flatness reached and seconds, against the paper's.

    python -m benchmarks.search_schedules --dataset MNIST --model FILE --data_dir DATA
    python -m benchmarks.search_schedules --dataset cifar10 --model FILE --data_dir DATA

Every row is a search on the same images of the test set by the network of a checkpoint: the
paper's, and ascents of the loss by number, size and start of the steps, with momentum, with early
stop (a sample stands still once its loss has grown by less than a hundredth in a step), and with a
warm start where the epoch before left the point (played here by a first search from the same start,
whose seconds are counted too).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.ball import Ball, ascend
from utils.data import load_dataset
from utils.errors import UserError, run_script
from utils.lfr import first_point, flatness, input_gradient, sharpest_point
from utils.runs import load_network
from utils.second_order import Kernels

# epsilon, the paper's steps, and those of `--search fast` as multiples of epsilon
SETTINGS = {"MNIST": (0.3, 40, 0.01, 4, 0.5), "cifar10": (0.031, 10, 0.007, 2, 2.0)}

Search = Callable[[Tensor, Tensor], Tensor]


def climb(
    network: nn.Module,
    ball: Ball,
    num_steps: int,
    step_size: float,
    *,
    begin: str = "fast",
    decay: float | None = None,
    early_stop: bool = False,
    warm: bool = False,
) -> Search:
    """An ascent of the loss: images and labels to points. ``begin``: image, paper or fast."""

    def search(x: Tensor, y: Tensor) -> Tensor:
        start = x if begin == "image" else first_point(x, ball, begin)
        standing = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool)
        before = torch.full((len(x),), -torch.inf)

        def gradient(moved: Tensor) -> Tensor:
            nonlocal standing, before
            steep = input_gradient(network, moved, y, kernels)
            if early_stop:
                with torch.no_grad(), kernels:
                    loss = F.cross_entropy(network(moved), y, reduction="none")
                standing |= (loss < 1.01 * before).view(-1, 1, 1, 1)
                before = loss
                steep = steep.masked_fill(standing, 0)
            return steep

        with Kernels(frozen=True) as kernels:
            for _ in range(1 + warm):
                start = ascend(
                    x,
                    gradient,
                    ball,
                    step_size=step_size,
                    num_steps=num_steps,
                    start=start,
                    decay=decay,
                )
        return start

    return search


def schedules(network: nn.Module, dataset: str) -> dict[str, Search]:
    """The searches to compare, the paper's first."""
    epsilon, paper_steps, paper_size, steps, size = SETTINGS[dataset]
    ball = Ball("l_inf", epsilon)

    def paper(x: Tensor, y: Tensor) -> Tensor:
        options = {"step_size": paper_size, "num_steps": paper_steps}
        return sharpest_point(network, x, y, ball, kernels=Kernels(frozen=True), **options)

    found: dict[str, Search] = {f"paper: {paper_steps} x {paper_size:g}": paper}
    for number in (1, 2, 3, 4, 6, 10):
        for multiple in (0.25, 0.5, 1, 2):
            if 1 <= number * multiple <= 6:
                length = multiple * epsilon
                found[f"{number} x {length:.3g}"] = climb(network, ball, number, length)
    usual = f"{steps} x {size * epsilon:.3g}"
    changed: dict[str, dict] = {
        "from the image": {"begin": "image"},
        "from noise of 0.001": {"begin": "paper"},
        "momentum 0.5": {"decay": 0.5},
        "momentum 1": {"decay": 1.0},
        "early stop": {"early_stop": True},
        "warm start": {"warm": True},
    }
    for says, options in changed.items():
        found[f"{usual}, {says}"] = climb(network, ball, steps, size * epsilon, **options)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=SETTINGS, required=True)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of a trained network")
    parser.add_argument("--data_dir", type=Path, default=Path("./data"), help="folder of the data")
    parser.add_argument("--num_examples", type=int, default=512, help="first test images")
    args = parser.parse_args()
    if args.num_examples < 1:
        raise UserError(f"--num_examples {args.num_examples}: allowed is 1 or more")
    data = load_dataset(args.dataset, args.data_dir, train=False).head(args.num_examples)
    network, _ = load_network(args.model)
    network = network.to(memory_format=torch.channels_last).eval()
    ball = Ball("l_inf", SETTINGS[args.dataset][0])
    reference = 0.0
    print(f"{'search':32} {'flatness':>9} {'of the paper':>13} {'seconds a batch':>16}")
    for name, search in tqdm(schedules(network, args.dataset).items(), leave=False, disable=None):
        total, spent, batches = 0.0, 0.0, torch.arange(len(data)).split(128)
        for rows in batches:
            x = data.float_images(rows).contiguous(memory_format=torch.channels_last)
            y = data.labels[rows]
            torch.manual_seed(int(rows[0]))  # the same starts for every search
            began = time.perf_counter()
            points = search(x, y)
            spent += time.perf_counter() - began
            total += float(flatness(network, points, y, ball, Kernels(frozen=True)).detach().sum())
        mean = total / len(data)
        reference = reference or mean
        print(
            f"{name:32} {mean:9.3f} {100 * mean / reference:11.1f} % {spent / len(batches):16.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_script(main)

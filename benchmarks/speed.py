"""What LFR costs: paired times of this code and of plain double backward.

    python -m benchmarks.speed --data_dir DATA --small_cnn FILE --resnet FILE --output FILE.json
    python -m benchmarks.speed --device cuda --networks preact_resnet wrn --dtypes tf32 bfloat16
    python -m benchmarks.speed --batches 4 --turns 1 --num_steps 1            # a rehearsal

Rows: the paper's search, a training step with ``--search paper`` and ``fast``, and PGD, for every
network, data type, layout and batch named. The sides take turns, so that a machine whose speed
drifts slows both; a row gives the median of the paired ratios. The plain side is `reference.py`
with the same search, data type and layout. On CUDA the clock is CUDA events, and "busy" is the
share of the time in which a kernel runs: the rest are gaps. Rows that the output has are not
measured again.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import reference
from models import build_model
from tools.scripts import positive, read_json
from utils.attacks import Budget, pgd
from utils.datasets import load_dataset
from utils.errors import UserError, run_script
from utils.lfr import Ball, initial_point, inner_maximization, lfr_loss
from utils.networks import load_network
from utils.run_folder import write_atomic
from utils.runtime import versions
from utils.tables import markdown_table


class Case(NamedTuple):
    """A network, and the settings of its dataset."""

    arch: dict[str, Any]
    dataset: str
    epsilon: float
    lambada: float
    paper: dict[str, Any]  # the two searches
    fast: dict[str, Any]


_GREY = {"step_size": 0.01, "num_steps": 40}, {"step_size": 0.15, "num_steps": 4}
_COLOUR = {"step_size": 0.007, "num_steps": 10}, {"step_size": 0.062, "num_steps": 2}
CASES = {"small_cnn": Case({}, "MNIST", 0.3, 0.02, *_GREY)} | {
    name: Case(arch, "cifar10", 0.031, 0.03, *_COLOUR)
    for name, arch in (("resnet", {"depth": 20}), ("preact_resnet", {}),
                       ("wrn", {"depth": 28, "widen_factor": 10}))
}  # fmt: skip
ROWS = ("paper search", "paper step", "fast step", "PGD")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
Jobs = dict[str, Callable[[], Tensor]]  # by row; they return x_adv or verdicts


def set_up(threads: int, dtype: str, device: torch.device) -> torch.autocast:
    """What a process computes with."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def jobs(case: Case, autocast: Any, network: nn.Module, *batch: Tensor) -> Jobs:
    """Every row as this checkout's code does it; ``network`` in eval mode."""
    (x, y, start), ball = batch, Ball("l_inf", case.epsilon)
    budget = Budget("l_inf", case.epsilon, random_start=False, **case.paper)
    trained = copy.deepcopy(network).train()
    # A learning rate of zero: the weights must be the same in every run that is timed.
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0, momentum=0.9)

    def step(search: str) -> Tensor:
        optimizer.zero_grad()
        options = {**getattr(case, search), "lambada": case.lambada, "search": search}
        with autocast:
            terms = lfr_loss(trained, x, y, ball, start=start, **options)
        terms.total.backward()
        optimizer.step()
        return terms.x_adv

    find = partial(inner_maximization, network, x, y, ball, start=start, **case.paper)
    attack = autocast(lambda: pgd(network, x, y, budget).robust)
    return dict(zip(ROWS, (autocast(find), partial(step, "paper"), partial(step, "fast"), attack)))


def plain(case: Case, autocast: Any, network: nn.Module, *batch: Tensor) -> Jobs:
    """The same rows by `reference.py`."""
    trained = copy.deepcopy(network)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0, momentum=0.9)
    paper, fast = ({"epsilon": case.epsilon, **search} for search in (case.paper, case.fast))
    find = partial(reference.inner_maximization, network, *batch, **paper)
    step = partial(reference.training_step, trained, optimizer, *batch, lambada=case.lambada)
    both = partial(step, **paper), partial(step, **fast, second_order=False)
    attack = partial(reference.pgd_verdicts, network, *batch[:2], batch[0], **paper)
    return dict(zip(ROWS, map(autocast, (find, *both, attack))))


class Operations(TorchDispatchMode):
    """Counts multiplications and additions; FlopCounterMode fails on inner gradients."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def profile(job: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """The 10^12 operations of one call, and the share of its time in which the card is busy."""
    with Operations() as counter:
        job()
    found = {"TFLOP": counter.total / 1e12, "busy": math.nan}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            job()
            torch.cuda.synchronize()
        spans = [e.time_range for e in seen.events() if e.device_type == DeviceType.CUDA]
        whole = max(span.end for span in spans) - min(span.start for span in spans)
        found["busy"] = sum(span.elapsed_us() for span in spans) / whole
    return found


def measure(job: Callable[[], Tensor], device: torch.device) -> tuple[float, ...]:
    """Seconds and peak GiB of one call; NaN where the memory does not suffice."""
    if device.type != "cuda":
        began = time.perf_counter()
        job()
        return time.perf_counter() - began, 0.0
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        start.record()
        job()
        end.record()
    except torch.OutOfMemoryError:
        return math.nan, math.nan
    end.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() / 2**30


def paired(sides: dict[str, Callable[[], tuple[float, ...]]], turns: int) -> dict[str, Any]:
    """Medians of each side, and ratios to ours: median, least, largest."""
    taken = [{name: side() for name, side in sides.items()} for _ in range(turns + 1)][1:]
    found: dict[str, Any] = {"seconds": {}, "GiB": {}}
    for name in sides:
        for key, values in zip(found, zip(*(each[name] for each in taken))):
            found[key][name] = statistics.median(values)
        ratios = [each[name][0] / each["ours"][0] for each in taken]
        found |= {f"{name} / ours": [statistics.median(ratios), min(ratios), max(ratios)]}
    return found


def compare(
    args: argparse.Namespace, setting: tuple[str, int, str, str], rows: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Some rows of one network, batch, layout and data type, one after the other."""
    name, batch, layout, dtype = setting
    case, device, form = CASES[name], torch.device(args.device), LAYOUTS[layout]
    if args.num_steps:
        fewer = {"num_steps": args.num_steps}
        case = case._replace(paper=case.paper | fewer, fast=case.fast | fewer)
    torch.manual_seed(0)
    shape = (1, 28, 28) if case.dataset == "MNIST" else (3, 32, 32)
    x, y = torch.rand(batch, *shape), torch.randint(10, (batch,))
    if args.data_dir:
        data = load_dataset(case.dataset, args.data_dir, train=False).head(batch)
        x, y = data.float_images(), data.labels
    if file := getattr(args, name):
        network = load_network(file)[0]
    else:  # SmallCNN's last layer begins at zero, where there is no gradient
        network = build_model(name, **case.arch).eval()
        [each for each in network.modules() if isinstance(each, nn.Linear)][-1].reset_parameters()
    network.to(device, memory_format=form)
    x, y, ball = x.to(device, memory_format=form), y.to(device), Ball("l_inf", case.epsilon)
    given = network, x, y, initial_point(x, ball, "paper")
    autocast = set_up(args.threads, dtype, device)
    ours, theirs = jobs(case, autocast, *given), plain(case, autocast, *given)
    for row in rows:
        sides = {"plain": theirs[row], "ours": ours[row]}
        found = paired({k: partial(measure, job, device) for k, job in sides.items()}, args.turns)
        fits = not math.isnan(found["seconds"]["ours"])
        yield row, found | (profile(ours[row], device) if fits else {})


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of all rows."""
    columns = [(key, side) for key in ("seconds", "GiB") for side in ("plain", "ours")]
    keys = ("network", "batch", "layout", "type", "what")
    rates = "ours, images/s", "ours, TFLOP/s", "busy"
    rows = [[*keys, *map(", ".join, columns), *rates, "plain / ours"]]
    for key, row in found.items():
        cells = [f"{row[name][side]:.4g}" for name, side in columns]
        done = int(key.split(" | ")[1]), row.get("TFLOP", math.nan)
        cells += [f"{count / row['seconds']['ours']:.4g}" for count in done]
        cells.append(f"{row.get('busy', math.nan):.0%}")
        cells.append("{:.2f}x ({:.2f} to {:.2f})".format(*row["plain / ours"]))
        rows.append([*key.split(" | "), *cells])
    return markdown_table(rows, left=range(4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--networks", nargs="+", choices=CASES, default=["small_cnn", "resnet"])
    add("--batches", nargs="+", type=positive, default=[128])
    add("--layouts", nargs="+", choices=LAYOUTS, default=["channels_last"])
    add("--dtypes", nargs="+", choices=("float32", "tf32", "bfloat16"), default=["float32"])
    add("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to measure")
    add("--turns", type=positive, default=5, help="timed turns; one more warms up")
    add("--num_steps", type=positive, help="of every search and attack; default: as published")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--data_dir", type=Path, help="folder of the data sets; default: random images")
    for name in CASES:
        add(f"--{name}", type=Path, metavar="FILE", help="its checkpoint; default: fresh weights")
    add("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA here")
    torch.set_num_threads(args.threads)
    setting = {"versions": versions(), "num_steps": args.num_steps}
    report: dict[str, Any] = {**setting, "rows": {}}
    if args.output and args.output.exists():
        report = read_json(args.output, "rows")
        if any(report.get(key) != value for key, value in setting.items()):
            raise UserError(f"--output: {args.output} is of other versions, threads or --num_steps")
    found, lists = report["rows"], (args.networks, args.batches, args.layouts, args.dtypes)
    for setting in itertools.product(*lists):
        keys = {row: " | ".join(map(str, (*setting, row))) for row in args.only}
        todo = [row for row, key in keys.items() if key not in found]
        for row, figures in compare(args, setting, todo) if todo else ():
            found[keys[row]] = figures
            if args.output:
                write_atomic(args.output, (json.dumps(report, indent=1) + "\n").encode())
    print(table(found))
    return 0


if __name__ == "__main__":
    run_script(main)

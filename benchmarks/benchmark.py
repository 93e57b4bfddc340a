"""What LFR costs: this repository against a plain implementation, in one process.

    python -m benchmarks.benchmark                                  # everything, about 25 minutes
    python -m benchmarks.benchmark --only search step --pairs 3     # a part of it
    python -m benchmarks.benchmark --mnist FILE --cifar FILE        # trained weights to time on

Every comparison alternates the two sides and reports the median of the paired ratios, so that a
machine whose speed drifts slows both. Float32, but for the row that says amp; batch 128. The
weights are fresh ones and, where a checkpoint is given, trained ones; the images are the first of
the test set of ``--data_dir``, and where there is none random smooth ones, whose timing is the same
but whose flatness means little.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import reference
from models import build_model
from utils.attacks import pgd
from utils.ball import Ball
from utils.data import load_dataset
from utils.errors import UserError, run_script
from utils.lfr import SEARCHES, first_point, flatness, lfr_loss, sharpest_point
from utils.runs import load_network, write_atomic
from utils.runtime import versions
from utils.second_order import Kernels

PARTS = ("search", "step", "evaluation", "precision", "memory", "growth")
# The training steps that are timed: (search, under bfloat16 autocast).
STEPS = {"paper": ("paper", False), "fast": ("fast", False), "fast, amp": ("fast", True)}


class Case(NamedTuple):
    """A network with the published setting of its dataset, and the ``fast`` search's."""

    name: str
    dataset: str
    arch: dict[str, Any]
    shape: tuple[int, int, int]
    epsilon: float
    step_size: float
    num_steps: int
    lambada: float
    lr: float
    fast_step_size: float
    fast_num_steps: int


CASES = (
    Case(
        "SmallCNN",
        "MNIST",
        {"name": "small_cnn"},
        (1, 28, 28),
        0.3,
        0.01,
        40,
        0.02,
        0.01,
        0.15,
        4,
    ),
    Case(
        "ResNet-20",
        "cifar10",
        {"name": "resnet", "depth": 20},
        (3, 32, 32),
        0.031,
        0.007,
        10,
        0.03,
        0.1,
        0.062,
        2,
    ),
)


def images(case: Case, data_dir: Path, count: int) -> tuple[Tensor, Tensor, str]:
    """Images [count, C, H, W], labels [count], and what they are."""
    try:
        data = load_dataset(case.dataset, data_dir, train=False)
        return data.float_images(slice(count)), data.labels[:count].clone(), data.name
    except UserError:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, case.shape[0], 7, 7, generator=generator)
        x = F.interpolate(coarse, case.shape[1:], mode="bilinear")
        return x, torch.randint(0, 10, (count,), generator=generator), "random smooth images"


def fresh(case: Case) -> nn.Module:
    """An untrained network whose last layer is not zero, as SmallCNN's is: zero has no gradient."""
    network = build_model(**case.arch)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    last.reset_parameters()
    return network


def pair(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The network twice: as a plain implementation holds it, and as ours does."""
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    ours = copy.deepcopy(network).to(memory_format=torch.channels_last)
    return plain, ours


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and what it returned."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def compare(
    plain: Callable[[], Any], ours: Callable[[], Any], pairs: int, label: str
) -> tuple[dict[str, float], Any, Any]:
    """Times of the two in turn; medians, and the median, least and largest paired ratio."""
    a_times, b_times = [], []
    a = b = None
    for number in tqdm(range(pairs + 1), desc=label, leave=False, disable=None):
        a_seconds, a = seconds(plain)
        b_seconds, b = seconds(ours)
        if number:  # the first pair warms up
            a_times.append(a_seconds)
            b_times.append(b_seconds)
    ratios = [x / y for x, y in zip(a_times, b_times)]
    figures = {
        "plain_seconds": statistics.median(a_times),
        "ours_seconds": statistics.median(b_times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    return figures, a, b


def steepness(network: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> float:
    """Mean gradient norm at ``x``, network in eval mode."""
    network.eval()
    return float(flatness(network, x, y, ball, Kernels(frozen=True)).detach().mean())


def search(case: Case, network: nn.Module, x: Tensor, y: Tensor, pairs: int) -> dict[str, Any]:
    """The paper's search, and its passes against the measured forward pass."""
    plain, ours = pair(network)
    plain.eval(), ours.eval()
    ball = Ball("l_inf", case.epsilon)
    begin = {name: first_point(x, ball, name) for name in SEARCHES}
    start = begin["paper"]
    rows = x.contiguous(memory_format=torch.channels_last)

    def run_plain() -> Tensor:
        return reference.sharpest_point(
            plain, x, y, start, case.epsilon, case.step_size, case.num_steps
        )

    def run_ours(search: str = "paper", step_size: float = 0.0, num_steps: int = 0) -> Tensor:
        return sharpest_point(
            ours,
            rows,
            y,
            ball,
            step_size=step_size or case.step_size,
            num_steps=num_steps or case.num_steps,
            search=search,
            start=begin[search].contiguous(memory_format=torch.channels_last),
        )

    found, a, b = compare(run_plain, run_ours, pairs, f"{case.name} search")
    with torch.no_grad():
        forward, _, _ = compare(lambda: plain(x), lambda: ours(rows), 2 * pairs, "forward")
    fast = run_ours("fast", case.fast_step_size, case.fast_num_steps)
    exact_a, exact_b = in_float64(case, network, x[:16], y[:16], start[:16])
    # How well the plain search agrees with itself when float32 only rounds in another order.
    again = plain.to(memory_format=torch.channels_last)
    control = reference.sharpest_point(
        again, rows, y, start, case.epsilon, case.step_size, case.num_steps
    )
    steep = steepness(ours, a, y, ball)
    step = found["ours_seconds"] / case.num_steps
    return {
        **found,
        "sign_agreement": agreement(a, b, x),
        "sign_agreement_float64": agreement(exact_a, exact_b, x[:16]),
        "sign_agreement_control": agreement(a, control, x),
        "flatness_control": steepness(ours, control, y, ball) / steep,
        "flatness_plain": steep,
        "flatness_ratio": steepness(ours, b, y, ball) / steep,
        "fast_flatness_ratio": steepness(ours, fast, y, ball) / steep,
        "forward_plain_seconds": forward["plain_seconds"],
        "forward_ours_seconds": forward["ours_seconds"],
        "passes_per_step": step / forward["ours_seconds"],
        "passes_per_step_plain": found["plain_seconds"] / case.num_steps / forward["plain_seconds"],
    }


def agreement(a: Tensor, b: Tensor, x: Tensor) -> float:
    """Share of the pixels that two searches moved to the same side of ``x``."""
    return float(((a - x).sign() == (b - x).sign()).float().mean())


def in_float64(
    case: Case, network: nn.Module, x: Tensor, y: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The points of the plain search and of ours where rounding decides no sign."""
    network = copy.deepcopy(network).double().eval()
    x, start, ball = x.double(), start.double(), Ball("l_inf", case.epsilon)
    size, number = case.step_size, case.num_steps
    plain = reference.sharpest_point(network, x, y, start, case.epsilon, size, number)
    options = {"step_size": size, "num_steps": number, "start": start}
    return plain, sharpest_point(network, x, y, ball, **options)


def step(case: Case, network: nn.Module, x: Tensor, y: Tensor, pairs: int) -> dict[str, Any]:
    """A full training step: the published setting, plain, against ours, by :data:`STEPS`."""
    ball = Ball("l_inf", case.epsilon)
    begin = {name: first_point(x, ball, name) for name in SEARCHES}
    rows = x.contiguous(memory_format=torch.channels_last)
    found = {}
    for label, (name, amp) in STEPS.items():
        plain, ours = pair(network)
        # A learning rate of zero: the weights must be the same in every run that is timed.
        plain_sgd = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9)
        ours_sgd = torch.optim.SGD(ours.parameters(), lr=0.0, momentum=0.9)

        def run_plain(plain: nn.Module = plain, sgd: Any = plain_sgd) -> Tensor:
            return reference.training_step(
                plain,
                sgd,
                x,
                y,
                begin["paper"],
                epsilon=case.epsilon,
                step_size=case.step_size,
                num_steps=case.num_steps,
                lambada=case.lambada,
            )

        def run_ours(
            ours: nn.Module = ours, sgd: Any = ours_sgd, name: str = name, amp: bool = amp
        ) -> Tensor:
            fast = name == "fast"
            ours.train()
            sgd.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                terms = lfr_loss(
                    ours,
                    rows,
                    y,
                    ball,
                    step_size=case.fast_step_size if fast else case.step_size,
                    num_steps=case.fast_num_steps if fast else case.num_steps,
                    lambada=case.lambada,
                    search=name,
                    start=begin[name].contiguous(memory_format=torch.channels_last),
                )
            terms.total.backward()
            sgd.step()
            return terms.sharpest

        figures, a, b = compare(run_plain, run_ours, pairs, f"{case.name} step, {label}")
        # Both points are judged on one network: the one both implementations were given.
        judged = pair(network)[1]
        figures["flatness_ratio"] = steepness(judged, b, y, ball) / steepness(judged, a, y, ball)
        found[label] = figures
    return found


def evaluation(case: Case, network: nn.Module, x: Tensor, y: Tensor, pairs: int) -> dict[str, Any]:
    """PGD with the published budget, ours against a plain loop over the same starts."""
    plain, ours = pair(network)
    plain.eval(), ours.eval()
    ball = Ball("l_inf", case.epsilon)
    num_steps, step_size = (40, 0.01) if case.epsilon == 0.3 else (10, 0.007)
    rows = x.contiguous(memory_format=torch.channels_last)

    def run_plain() -> Tensor:
        return reference.pgd_verdicts(plain, x, y, x, case.epsilon, step_size, num_steps)

    def run_ours() -> Tensor:
        options = {"step_size": step_size, "num_steps": num_steps, "random_start": False}
        return pgd(ours, rows, y, ball, **options).robust

    found, a, b = compare(run_plain, run_ours, pairs, f"{case.name} evaluation")
    return {
        **found,
        "robust_percent": 100 * float(b.float().mean()),
        "identical": bool((a == b).all()),
    }


def precision(case: Case, network: nn.Module, x: Tensor, y: Tensor, pairs: int) -> dict[str, float]:
    """Cosine between the penalty's gradient in the weights, at sharp points, and float64's."""
    ball = Ball("l_inf", case.epsilon)
    options = {"step_size": case.fast_step_size, "num_steps": case.fast_num_steps}
    sharp = sharpest_point(network.eval(), x, y, ball, search="fast", start=x, **options)

    def gradient(dtype: torch.dtype, amp: bool) -> Tensor:
        judged = copy.deepcopy(network).to(dtype, memory_format=torch.channels_last).train()
        rows = sharp.to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            terms = lfr_loss(judged, rows, y, ball, step_size=0.0, num_steps=0, lambada=1.0)
        terms.flatness.backward()
        parts = [p.grad for p in judged.parameters() if p.grad is not None]
        return torch.cat([part.double().flatten() for part in parts])

    exact = gradient(torch.float64, False)
    return {
        name: float(F.cosine_similarity(exact, gradient(torch.float32, amp), dim=0))
        for name, amp in (("float32", False), ("bfloat16", True))
    }


def _peak(case: Case, num_steps: int, batch: int) -> float:
    """Peak resident memory, in MB, of a process that does one training step (``paper``)."""
    torch.manual_seed(0)
    network = build_model(**case.arch).to(memory_format=torch.channels_last)
    x, y = torch.rand(batch, *case.shape), torch.randint(0, 10, (batch,))
    x = x.contiguous(memory_format=torch.channels_last)
    options = {"step_size": case.step_size, "num_steps": num_steps, "lambada": case.lambada}
    for _ in range(2):
        lfr_loss(network, x, y, Ball("l_inf", case.epsilon), **options).total.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(case: Case, batch: int) -> dict[str, float]:
    """Peak resident memory (MB) by the number of steps: it must not grow."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {str(n): pool.apply(_peak, (case, n, batch)) for n in (1, 5, 20)}


def growth(case: Case, pairs: int) -> dict[str, dict[str, float]]:
    """Seconds of our search by batch size, by number of steps, and by depth."""

    def cost(arch: dict[str, Any], batch: int, num_steps: int, name: str) -> float:
        torch.manual_seed(0)
        network = build_model(**arch).eval().to(memory_format=torch.channels_last)
        x = torch.rand(batch, *case.shape).contiguous(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (batch,))
        ball = Ball("l_inf", case.epsilon)
        times = []
        for _ in range(max(2, pairs)):
            elapsed, _ = seconds(
                lambda: sharpest_point(
                    network,
                    x,
                    y,
                    ball,
                    step_size=case.step_size,
                    num_steps=num_steps,
                    search=name,
                )
            )
            times.append(elapsed)
        return statistics.median(times[1:])

    found = {}
    for name in ("paper", "fast"):
        found[f"{name}, batch (2 steps)"] = {
            str(n): cost(case.arch, n, 2, name) for n in (32, 64, 128, 256, 512)
        }
        found[f"{name}, steps (batch 32)"] = {
            str(n): cost(case.arch, 32, n, name) for n in (1, 5, 10, 20, 40)
        }
        if case.arch["name"] == "resnet":
            found[f"{name}, depth (batch 32, 2 steps)"] = {
                str(n): cost({**case.arch, "depth": n}, 32, 2, name) for n in (20, 32, 44, 56)
            }
    return found


def show(results: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\n{'network':10} {'weights':8} {'what':24} {'plain s':>9} {'ours s':>8} {'ratio':>7} "
        f"{'(range)':>13}  notes"
    )
    for case, by_weights in results["cases"].items():
        for weights, parts in by_weights.items():
            for label, figures, notes in rows(parts):
                low, high = figures["ratio_min"], figures["ratio_max"]
                print(
                    f"{case:10} {weights:8} {label:24} {figures['plain_seconds']:9.3f} "
                    f"{figures['ours_seconds']:8.3f} {figures['ratio']:6.2f}x "
                    f"{f'({low:.2f}-{high:.2f})':>13}  {notes}"
                )
    for case, by_weights in results["cases"].items():
        for weights, parts in by_weights.items():
            text = ", ".join(
                f"{n} {cosine:.4f}" for n, cosine in parts.get("precision", {}).items()
            )
            if text:
                print(f"{case}, {weights}: cosine of the penalty's gradient with float64's: {text}")
    for case, figures in results.get("memory", {}).items():
        text = ", ".join(f"{n} steps {mb:.0f} MB" for n, mb in figures.items())
        print(f"{case}: peak memory of a training step: {text}")
    for case, tables in results.get("growth", {}).items():
        for label, figures in tables.items():
            text = ", ".join(f"{n}: {value:.3f}" for n, value in figures.items())
            print(f"{case}: seconds by {label}: {text}")


def rows(parts: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Table rows (label, figures, notes) of one network with one set of weights."""
    listed = []
    if "search" in parts:
        f = parts["search"]
        listed.append(
            (
                "search, paper",
                f,
                # The plain search in another memory layout is the control: what rounding does.
                f"signs {100 * f['sign_agreement']:.2f} % (float64 "
                f"{100 * f['sign_agreement_float64']:.2f} %, plain in another layout "
                f"{100 * f['sign_agreement_control']:.2f} %), flatness "
                f"{100 * f['flatness_ratio']:.1f} % ({100 * f['flatness_control']:.1f} %), "
                f"{f['passes_per_step']:.1f} passes a step (plain "
                f"{f['passes_per_step_plain']:.1f}); "
                f"fast reaches {100 * f['fast_flatness_ratio']:.1f} %",
            )
        )
    for name, f in parts.get("step", {}).items():
        listed.append((f"training step, {name}", f, f"flatness {100 * f['flatness_ratio']:.1f} %"))
    if "evaluation" in parts:
        f = parts["evaluation"]
        verdicts = "identical verdicts" if f["identical"] else "VERDICTS DIFFER"
        listed.append(("PGD evaluation", f, f"{verdicts}, {f['robust_percent']:.1f} % robust"))
    return listed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--networks", nargs="+", choices=[c.name for c in CASES], default=None)
    parser.add_argument(
        "--weights",
        nargs="*",
        choices=["fresh"],
        default=["fresh"],
        help="untrained weights besides the checkpoints; --weights alone leaves them out",
    )
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of runs")
    parser.add_argument("--batch", type=int, default=128, help="samples")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice")
    parser.add_argument("--data_dir", type=Path, default=Path("./data"), help="folder of the data")
    parser.add_argument("--mnist", type=Path, default=None, help="checkpoint of SmallCNN")
    parser.add_argument("--cifar", type=Path, default=None, help="checkpoint of ResNet-20")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args(argv)
    for flag in ("pairs", "batch"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: allowed is 1 or more")
    return args


def main() -> int:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    results: dict[str, Any] = {
        "versions": versions(),
        "machine": platform.processor() or platform.machine(),
        "batch": args.batch,
        "pairs": args.pairs,
        "cases": {},
    }
    chosen = [c for c in CASES if args.networks is None or c.name in args.networks]
    for case in chosen:
        x, y, what = images(case, args.data_dir, args.batch)
        print(f"{case.name}: {len(x)} images of {what}", flush=True)
        torch.manual_seed(0)
        networks = {}
        path = args.mnist if case.dataset == "MNIST" else args.cifar
        if path is not None:
            networks["trained"] = load_network(path, device="cpu")[0]
        if "fresh" in args.weights:
            networks["fresh"] = fresh(case)
        table = results["cases"][case.name] = {}
        for weights, network in networks.items():
            parts = table[weights] = {}
            for function in (search, step, evaluation, precision):
                if function.__name__ in args.only:
                    torch.manual_seed(0)
                    found = function(case, network, x, y, args.pairs)
                    parts[function.__name__] = found
        if "memory" in args.only:
            results.setdefault("memory", {})[case.name] = memory(case, args.batch)
        if "growth" in args.only:
            results.setdefault("growth", {})[case.name] = growth(case, args.pairs)
    show(results)
    if args.output is not None:
        write_atomic(args.output, (json.dumps(results, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_script(main)

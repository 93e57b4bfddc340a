"""The evaluation scripts' work: one checkpoint under a list of attacks, one table, one JSON file.

Every attack is a function from a few images to verdicts image by image (:class:`Plan`); the rest,
batches, processes, resuming, counting, is the same for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.attacks import (
    DDN_STEPS,
    GRADIENT_ATTACKS,
    JSMA_GAMMA,
    JSMA_THETA,
    LIBRARY_ATTACKS,
    SQUARE_QUERIES,
    Family,
    attack,
    family,
    gradient_budget,
    misclassified,
    percent,
)
from utils.ball import Ball
from utils.data import ImageSet, load_dataset
from utils.errors import UserError
from utils.library_attacks import CHUNK, STAGES, library_version, run_library
from utils.minimum_norm import Distances, ddn, jsma, pointwise
from utils.runs import load_network, sha256_of, write_atomic
from utils.runtime import World, versions, world
from utils.sanity import Check, sanity_checks
from utils.verdict_store import Record, VerdictStore

DISTANCES = ("l0", "l2", "l_inf")


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a network in eval mode and images it has been asked about."""

    network: nn.Module
    data: ImageSet
    correct: Tensor  # [N] bool, right on the clean image

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images float [n, C, H, W] and labels [n], on the network's device."""
        rows = rows.to(self.data.device)
        x = self.data.float_images(rows).contiguous(memory_format=torch.channels_last)
        return x, self.data.labels[rows]

    @property
    def clean_accuracy(self) -> float:
        return percent(int(self.correct.sum()), len(self.correct))


# Rows of the dataset -> what was found about each of them, [n] by name.
Look = Callable[[Subject, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """One attack with all its settings.

    Attributes:
        name: as published.
        look: does the attack.
        budget: everything that ``look`` depends on, for the results.
        shown: the same in a few words, for the table.
        columns: names that ``look`` returns; "robust" is among them.
        chunk: images that belong together, for attacks whose images share random numbers.
    """

    name: str
    look: Look
    budget: dict[str, Any]
    shown: str
    columns: tuple[str, ...] = ("robust",)
    chunk: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Attack and settings as one string."""
        return f"{self.name} {json.dumps(self.budget, sort_keys=True)}"


# ---------------------------------------------------------------------------------------------
# The attacks as plans


def make_plan(name: str, args: argparse.Namespace, defaults: Family, subject: Subject) -> Plan:
    """The attack of a published name with the command line's settings.

    Raises:
        UserError: a package is missing, or the settings make no sense for this attack.
    """
    if name in GRADIENT_ATTACKS:
        return _gradient_plan(name, args, defaults)
    if name in LIBRARY_ATTACKS:
        return _library_plan(name, args, defaults)
    return _minimum_norm_plan(name, args, defaults, subject)


def _gradient_plan(name: str, args: argparse.Namespace, defaults: Family) -> Plan:
    budget = gradient_budget(
        name,
        defaults,
        args.norm,
        epsilon=args.epsilon,
        num_steps=args.num_steps,
        step_size=args.step_size,
        restarts=args.restarts,
    )

    def look(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
        x, y = subject.images(rows)
        found = attack(subject.network, x, y, budget, seed=args.seed, index=rows)
        return {"robust": found.robust}

    notes = []
    if name != "FGSM" and 0 < budget.num_steps * budget.step_size < budget.epsilon:
        reach = budget.num_steps * budget.step_size
        notes.append(f"{name}: all steps together reach {reach:.4g}, epsilon is {budget.epsilon:g}")
    return Plan(name, look, asdict(budget), str(budget), notes=notes)


def _library_plan(name: str, args: argparse.Namespace, defaults: Family) -> Plan:
    package = library_version()
    epsilon = defaults.norm(args.norm).epsilon if args.epsilon is None else args.epsilon
    ball = Ball(args.norm, epsilon)
    budget: dict[str, Any] = {
        "norm": args.norm,
        "epsilon": epsilon,
        "version": "standard",
        "stages": list(STAGES[name]),
        "chunk": CHUNK,
        "package": package,
    }
    shown = f"{args.norm} {epsilon:.4g}, " + (
        "standard" if name == "AutoAttack" else f"{SQUARE_QUERIES} queries"
    )
    plan_notes: list[str] = []

    def look(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
        x, y = subject.images(rows)
        seed = args.seed + int(rows[0]) // CHUNK
        found = run_library(subject.network, x, y, name, ball, seed=seed, on_stage=_Progress.stage)
        plan_notes.extend(line for line in found.warnings if line not in plan_notes)
        return {"robust": found.robust, "broken_by": found.broken_by}

    return Plan(name, look, budget, shown, ("robust", "broken_by"), CHUNK, plan_notes)


def _minimum_norm_plan(
    name: str, args: argparse.Namespace, defaults: Family, subject: Subject
) -> Plan:
    l0_radius = args.l0_radius or defaults.l0_radius
    l2_radius = args.l2_radius or defaults.l2_radius
    norm, radius = ("l2", l2_radius) if name == "DDNL2" else ("l0", l0_radius)
    run: Callable[[nn.Module, Tensor, Tensor, Tensor], Distances]
    if name == "JSMA":
        budget: dict[str, Any] = {"theta": JSMA_THETA, "gamma": JSMA_GAMMA}
        settings = f"theta {JSMA_THETA:g}, gamma {JSMA_GAMMA:g}"

        def run(network: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Distances:
            return jsma(
                network, x, y, theta=JSMA_THETA, gamma=JSMA_GAMMA, seed=args.seed, index=rows
            )

    elif name == "DDNL2":
        steps = DDN_STEPS if args.num_steps is None else args.num_steps
        budget, settings = {"num_steps": steps}, f"{steps} steps"

        def run(network: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Distances:
            return ddn(network, x, y, num_steps=steps, seed=args.seed, index=rows)

    else:
        starts = defaults.pointwise_starts
        budget, settings = {"starts": starts}, f"{starts} starts"
        donors = _donors(subject)

        def run(network: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Distances:
            return pointwise(
                network, x, y, starts=starts, seed=args.seed, index=rows, donors=donors
            )

    def look(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
        found = run(subject.network, *subject.images(rows), rows)
        distance = getattr(found, norm)
        return {
            "robust": ~(distance <= radius),
            "l0": found.l0,
            "l2": found.l2,
            "l_inf": found.l_inf,
        }

    budget |= {"radius_norm": norm, "radius": radius}
    shown = f"{norm} {radius:g}; {settings}"
    return Plan(name, look, budget, shown, ("robust", *DISTANCES))


def _donors(subject: Subject) -> Tensor:
    """The first image of each class that the network gets right, to start point-wise from."""
    labels = subject.data.labels.cpu()
    right = subject.correct.nonzero()[:, 0]
    first = {int(label): row for row, label in reversed(list(zip(right, labels[right])))}
    rows = torch.tensor([int(first[label]) for label in sorted(first)], dtype=torch.long)
    return subject.images(rows)[0]


# ---------------------------------------------------------------------------------------------
# Doing the work


class _Progress:
    """A bar on stderr, if that is a terminal; class-wide, so that a stage can be shown."""

    bar: tqdm | None = None

    @classmethod
    def start(cls, name: str, total: int, done: int, shown: bool) -> tqdm:
        cls.bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="image",
            disable=not (shown and sys.stderr.isatty()),
            dynamic_ncols=True,
            leave=False,
        )
        return cls.bar

    @classmethod
    def stage(cls, stage: str, standing: int) -> None:
        if cls.bar is not None:
            cls.bar.set_postfix_str(f"{stage}, {standing} standing")


def clean_verdicts(network: nn.Module, data: ImageSet, batch: int, here: World) -> Tensor:
    """[N] bool: which images the network gets right.

    Raises:
        UserError: it answers with numbers that are not finite.
    """
    right = torch.zeros(len(data), dtype=torch.float64)
    starts = range(here.rank * batch, len(data), here.size * batch)
    for start in starts:
        chosen = slice(start, start + batch)
        x = data.float_images(chosen).contiguous(memory_format=torch.channels_last)
        right[chosen] = (~misclassified(network, x, data.labels[chosen])).double().cpu()
    return _over_processes(right, here) > 0


def _over_processes(values: Tensor, here: World) -> Tensor:
    """The sum over all processes of float64 values, each entered by one of them."""
    return torch.tensor(here.sum(*values.tolist()), dtype=torch.float64)


def _units(plan: Plan, rows: Tensor, batch: int) -> list[Tensor]:
    """Rows that are attacked together; a fixed chunk of the dataset where the attack needs it."""
    if plan.chunk is None:
        return list(rows.split(batch)) if len(rows) else []
    number = rows // plan.chunk
    return [rows[number == chunk] for chunk in number.unique()]


def run_plan(plan: Plan, subject: Subject, store: VerdictStore, here: World, batch: int) -> Record:
    """Attack every image that is right and has not been attacked yet; all processes share in it."""
    record = store.record(plan.key, len(subject.data), plan.columns)
    plan.notes.extend(note for note in record.notes if note not in plan.notes)
    wrong = (~subject.correct).nonzero()[:, 0]
    record.put(wrong, **{name: torch.zeros(len(wrong)) for name in plan.columns})
    units = _units(plan, record.open_rows(), batch)
    total = int(subject.correct.sum())
    done = total - sum(len(unit) for unit in units)
    with _Progress.start(plan.name, total, done, here.is_main) as bar:
        for first in range(0, len(units), here.size):
            began = time.perf_counter()
            share = units[first : first + here.size]
            rows = torch.cat(share)
            found = {name: torch.zeros(len(rows), dtype=torch.float64) for name in plan.columns}
            if here.rank < len(share):
                mine = plan.look(subject, share[here.rank])
                before = sum(len(unit) for unit in share[: here.rank])
                for name, values in mine.items():
                    found[name][before : before + len(values)] = values.double().cpu()
            found = {name: _over_processes(values, here) for name, values in found.items()}
            record.put(rows, **found)
            record.seconds += time.perf_counter() - began
            record.notes = list(plan.notes)
            store.save()
            bar.update(len(rows))
    store.save(force=True)
    return record


def summarize(plan: Plan, record: Record, subject: Subject) -> dict[str, Any]:
    """One attack's entry in the results; accuracies in percent of all selected images."""
    count = len(subject.data)
    robust = record.values["robust"] > 0
    entry: dict[str, Any] = {
        "clean_accuracy": subject.clean_accuracy,
        "robust_accuracy": percent(int(robust.sum()), count),
        "num_examples": count,
        "budget": {"shown": plan.shown, **plan.budget},
        "seconds": round(record.seconds, 3),
    }
    if "l2" in plan.columns:
        attacked = subject.correct
        reached = attacked & record.values["l2"].isfinite()
        entry["success_rate"] = percent(int(reached.sum()), int(attacked.sum()))
        entry["accuracy_at_any_distance"] = percent(int((attacked & ~reached).sum()), count)
        for name in DISTANCES:
            values = record.values[name][reached].tolist()
            entry[f"median_{name}"] = statistics.median(values) if values else None
    if "broken_by" in plan.columns:
        after = {}
        standing = int(subject.correct.sum())
        for number, stage in enumerate(plan.budget["stages"]):
            standing -= int((subject.correct & (record.values["broken_by"] == number)).sum())
            after[stage] = percent(standing, count)
        entry["accuracy_after"] = after
    if plan.notes:
        entry["notes"] = list(plan.notes)
    return {key: _plain(value) for key, value in entry.items()}


def _plain(value: Any) -> Any:
    """JSON has no nan."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------
# What people read


def table(results: dict[str, dict[str, Any]]) -> str:
    """The attacks' entries as aligned text; medians over the images that were broken."""
    head = ["attack", "clean %", "robust %", "budget", "success %", "L0", "L2", "L_inf", "seconds"]
    with_distances = any("success_rate" in entry for entry in results.values())
    rows = [head]
    for name, entry in results.items():
        budget = entry["budget"]["shown"]
        rows.append(
            [
                name,
                _number(entry["clean_accuracy"], 2),
                _number(entry["robust_accuracy"], 2),
                f"at {budget}" if "success_rate" in entry else budget,
                _number(entry.get("success_rate"), 1),
                _number(entry.get("median_l0"), 0),
                _number(entry.get("median_l2"), 2),
                _number(entry.get("median_l_inf"), 3),
                _number(entry["seconds"], 1),
            ]
        )
    if not with_distances:
        rows = [row[:4] + row[8:] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    if with_distances:
        lines.append("L0, L2, L_inf: medians over the images that the attack broke.")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------------------------------------
# A script's main


def evaluate(args: argparse.Namespace) -> int:
    """Run an evaluation script with its checked flags; returns the exit code.

    Raises:
        UserError: a file, a dataset or a combination of flags that cannot be evaluated.
    """
    with world(args.gpu_id, args.threads) as here, torch.no_grad():
        # Attacks compare losses that differ in the last digits: no TensorFloat-32 here.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return _evaluate(args, here)


def _evaluate(args: argparse.Namespace, here: World) -> int:
    network, digest = _load(args.model_path, args, here)
    data = load_dataset(args.dataset, args.data_dir, train=False)
    available = len(data)
    data = data.head(available if args.num_examples is None else args.num_examples)
    data = data.to(here.device)
    _check_suits(args.model_path, network, data)
    if args.num_examples is not None and args.num_examples > available:
        here.say(f"--num_examples {args.num_examples}: the test set has {available}, all are taken")
    here.say(f"model: {args.model_path} (sha256 {digest[:12]})")
    here.say(f"data: first {len(data):,} of {available:,} test images of {data.name}")

    key = {
        "checkpoint_sha256": digest,
        "data": _fingerprint(data),
        "num_examples": len(data),
        "seed": args.seed,
        "torch": str(torch.__version__),
    }
    store = VerdictStore(args.output and f"{args.output}.partial", key, here.is_main)
    if store.note:
        here.say(store.note)
    store.save(force=True)  # an output that cannot be written is better known before the work
    if set(args.attack_method) & set(LIBRARY_ATTACKS):
        library_version()
    subject = Subject(network, data, clean_verdicts(network, data, args.test_batch, here))
    defaults = family(args.dataset, data.in_channels)
    here.say(f"clean accuracy: {subject.clean_accuracy:.2f} %")
    plans = [make_plan(name, args, defaults, subject) for name in args.attack_method]
    report: dict[str, Any] = {
        "model_path": str(args.model_path),
        "checkpoint_sha256": digest,
        "arch": getattr(network, "arch", None),
        "dataset": data.name,
        "num_examples": len(data),
        "test_set": available,
        "seed": args.seed,
        "device": str(here.device),
        "processes": here.size,
        "versions": versions(),
        "clean_accuracy": subject.clean_accuracy,
        "attacks": {},
    }
    try:
        for plan in plans:
            record = run_plan(plan, subject, store, here, args.test_batch)
            entry = summarize(plan, record, subject)
            report["attacks"][plan.name] = {**entry, "versions": report["versions"]}
            here.say(
                f"{plan.name}: {entry['robust_accuracy']:.2f} % robust, {plan.shown}, "
                f"{record.seconds:.1f} s"
            )
            for note in plan.notes:
                here.say(f"  note: {note}")
    except KeyboardInterrupt:
        store.save(force=True)
        kept = f"; the same command goes on from {store.path}" if store.path else ""
        here.say(f"stopped{kept}")
        return 130
    here.say("")
    here.say(table(report["attacks"]))
    if args.sanity:
        checks = _sanity(args, subject, defaults, here)
        report["sanity"] = [asdict(check) for check in checks]
    if args.output and here.is_main:
        write_atomic(args.output, (json.dumps(report, indent=2) + "\n").encode())
        here.say(f"results: {args.output}")
        store.remove()
    here.barrier()
    return 0


def _load(path: str, args: argparse.Namespace, here: World) -> tuple[nn.Module, str]:
    """The network of a checkpoint, laid out for the processor, and the file's SHA-256."""
    asked = {
        "name": args.arch,
        "depth": args.depth,
        "block_name": args.block_name,
        "widen_factor": args.widen_factor,
        "drop": args.drop,
    }
    network, _ = load_network(path, asked, here.device)
    return network.to(memory_format=torch.channels_last), sha256_of(path)


def _check_suits(path: str, network: nn.Module, data: ImageSet) -> None:
    """A network and data that do not belong together, told before anything is computed."""
    arch = getattr(network, "arch", {})
    height, width = data.image_size
    for what, has, needs in (
        ("channels", data.in_channels, arch.get("in_channels")),
        ("classes", data.num_classes, arch.get("num_classes")),
        ("rows", height, arch.get("image_size")),
        ("columns", width, arch.get("image_size")),
    ):
        if needs is not None and has != needs:
            raise UserError(
                f"--model_path {path} is a network for {needs} {what}, "
                f"--dataset {data.name} has {has}"
            )


def _fingerprint(data: ImageSet) -> str:
    """SHA-256 of pixels and labels."""
    digest = hashlib.sha256(str(tuple(data.images.shape)).encode())
    digest.update(data.images.cpu().numpy().tobytes())
    digest.update(data.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sanity(
    args: argparse.Namespace, subject: Subject, defaults: Family, here: World
) -> Sequence[Check]:
    """The sanity checks, by the main process; prints their verdicts."""
    checks: list[Check] = []
    if here.is_main:
        budget = gradient_budget(
            "PGD",
            defaults,
            args.norm,
            epsilon=args.epsilon,
            num_steps=args.num_steps,
            step_size=args.step_size,
        )
        undefended = _load(args.transfer_from, args, here)[0] if args.transfer_from else None
        here.say("\nIs it real? Signs of masked gradients:")
        for check in sanity_checks(
            subject.network,
            *subject.images(torch.arange(len(subject.data))),
            budget,
            seed=args.seed,
            batch=args.test_batch,
            undefended=undefended,
        ):
            checks.append(check)
            here.say(str(check))
    here.barrier()
    return checks

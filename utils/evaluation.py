"""A network under a list of attacks: one table, one JSON report.

:func:`evaluate` takes any network and images in memory; :func:`run_evaluation` is the main of the
evaluation scripts. Every attack is a function from a few images to verdicts image by image
(:class:`Attack`); the rest, batches, processes, resuming, counting, is the same for all.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import stated_arch
from utils import checkpoints
from utils.attacks import Settings, budgets, family, gradient_budget, misclassified, percent, pgd
from utils.attacks.budgets import ATTACKS, GRADIENT_ATTACKS, LIBRARY_ATTACKS, Budget, Family
from utils.attacks.library import CHUNK, STAGES, require_library, run_library
from utils.attacks.masking import masking_checks
from utils.attacks.minimum_norm import ddn, jsma, pointwise
from utils.data import ImageSet, fingerprint, floats, split_validation
from utils.datasets import load_dataset
from utils.errors import UserError
from utils.evaluation_options import apply_statement, parse_evaluation, unused_attack_flags
from utils.foreign import naming
from utils.networks import NAMED, build_network, load_for, own_network, sha256_of, sources_of
from utils.options import doubtful_steps
from utils.progress import Bar
from utils.report import check_page, write_page
from utils.run_folder import BEST
from utils.runtime import Processes, processes, versions
from utils.tables import MEDIANS, number, text_table
from utils.verdict_store import VerdictStore

DISTANCES = ("l0", "l2", "l_inf")


class Attack(NamedTuple):
    """One attack with all its settings."""

    name: str
    run: Callable[..., NamedTuple]  # network, x, y, index= -> x_adv, and by column [n]
    budget: dict[str, Any]  # all that ``run`` depends on, for the report; "shown": in a few words
    columns: tuple[str, ...]
    chunk: int | None  # images that belong together, where images share random numbers
    notes: list[str]


def make_attack(name: str, settings: Settings, defaults: Family, shape: torch.Size) -> Attack:
    """The attack of a published name; UserError if there is none that can attack such images."""
    columns, chunk, notes = ("robust",), None, []
    if name in GRADIENT_ATTACKS:
        steps = gradient_budget(name, defaults, settings)
        run, budget, shown = partial(pgd, budget=steps), asdict(steps), str(steps)
        notes = doubtful_steps(steps.norm, steps.epsilon, steps.num_steps, steps.step_size)
    elif name in LIBRARY_ATTACKS:
        ball = gradient_budget("FGSM", defaults, settings).ball
        run, chunk = partial(run_library, name=name, ball=ball), CHUNK
        columns = ("robust", "fell_to")
        budget = {**asdict(ball), "version": "standard", "stages": list(STAGES[name])}
        budget |= {"chunk": CHUNK, "package": require_library(ball.norm, shape)}
        kind = "standard" if name == "AutoAttack" else f"{budgets.SQUARE_QUERIES} queries"
        shown = f"{ball.norm} {ball.epsilon:.4g}, {kind}"
    elif name in ATTACKS:
        steps, columns = settings.num_steps, DISTANCES
        attack, norm, budget = {
            "JSMA": (jsma, "l0", {"theta": budgets.JSMA_THETA, "gamma": budgets.JSMA_GAMMA}),
            "DDNL2": (ddn, "l2", {"num_steps": budgets.DDN_STEPS if steps is None else steps}),
            "point-wise": (pointwise, "l0", {"starts": defaults.pointwise_starts}),
        }[name]
        run, radius = partial(attack, **budget), getattr(defaults, f"{norm}_radius")
        words = ", ".join(f"{key} {value:g}" for key, value in budget.items())
        shown = f"{norm} {radius:g}; {words}"
        budget |= {"radius_norm": norm, "radius": radius}
    else:
        raise UserError(f"attack {name!r} is unknown, allowed are {', '.join(ATTACKS)}")
    run = partial(run, seed=settings.seed)
    return Attack(name, run, {"shown": shown, **budget}, columns, chunk, notes)


@dataclass
class _Subject:
    """A network and the images that it is asked about; all processes share in the work."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    batch: int
    process: Processes

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.to(self.images.device)
        return floats(self.images[rows]), self.labels[rows]

    def shared(
        self, work: Callable[[Tensor], Any], units: Sequence[Tensor], bar: Bar
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """``work`` on rows of the dataset, a unit at a time for each process.

        Yields the rows of all processes, and what each process's work gave.
        """
        rank, size = self.process.rank, self.process.size
        # The bar lives with each pass of the network, however long a batch takes.
        with bar, self.network.register_forward_hook(lambda *_: bar.update(0) and None):
            for share in (units[first : first + size] for first in range(0, len(units), size)):
                found = self.process.gather(work(share[rank]) if rank < len(share) else None)
                yield (rows := torch.cat(share)), found[: len(share)]
                bar.update(len(rows))

    def bar(self, name: str, total: int, done: int = 0) -> Bar:
        shown = self.process.is_main
        return Bar(desc=name, total=total, initial=done, unit="image", shown=shown)

    def clean(self) -> Tensor:
        """[N] bool: which images the network gets right; UserError if it does not suit them."""
        x, _ = self.rows(torch.arange(1))
        try:
            _, classes = self.network(given := x.clone()).shape
            if not torch.equal(given, x):
                raise ValueError("it changes its input in place")
        except (AttributeError, RuntimeError, ValueError) as error:
            size, reason = "x".join(map(str, self.images.shape[1:])), str(error).partition("\n")[0]
            line = f"the network gives no logits [N, classes] for images of {size}: {reason}"
            raise UserError(line) from None
        if (largest := int(self.labels.max())) >= classes:
            raise UserError(f"the network knows {classes} classes, a label is {largest}")

        def work(rows: Tensor) -> Tensor:
            return ~misclassified(self.network, *self.rows(rows)).cpu()

        right = torch.zeros(len(self.labels), dtype=torch.bool)
        units = torch.arange(len(right)).split(self.batch)
        bar = self.bar("clean images", len(right))
        for rows, found in self.shared(work, units, bar):
            right[rows] = torch.cat(found)
        return right

    def attack(
        self, attack: Attack, right: Tensor, store: VerdictStore, saved: Tensor | None
    ) -> tuple[dict[str, Tensor], float]:
        """Attack every image that is ``right`` and not attacked yet.

        Returns by column float64 [N], 0 for images that were wrong before, and the seconds it
        took. The attacked images replace those of ``saved``.
        """
        names, count, seconds, extra = attack.columns, int(right.sum()), 0.0, {}
        key = f"{attack.name} {json.dumps(attack.budget, sort_keys=True)}"
        values = torch.full((len(names), len(right)), torch.nan, dtype=torch.float64)
        values[:, ~right] = 0
        for line in store.lines(key) if saved is None else []:
            for name, column in zip(names, values):
                column[line["rows"]] = torch.tensor(line["values"][name], dtype=torch.float64)
            seconds, attack.notes[:] = seconds + line["seconds"], line["notes"]
        rows = values[0].isnan().nonzero()[:, 0]
        units = rows.split(self.batch) if len(rows) else ()
        if attack.chunk:  # fixed parts of the dataset, whatever of them is still to do
            chunks = rows // attack.chunk
            units = [rows[chunks == chunk] for chunk in chunks.unique()]
        if attack.name == "point-wise":
            first = {int(self.labels[i]): i for i in reversed(right.nonzero()[:, 0].tolist())}
            extra["donors"] = self.rows(torch.tensor(sorted(first.values())).long())[0]

        bar = self.bar(attack.name, count, count - len(rows))
        if attack.chunk:
            extra["on_stage"] = lambda name, left: bar.set_postfix_str(f"{name}: {left}", False)

        def work(rows: Tensor) -> tuple[Tensor, list[str]]:
            found = attack.run(self.network, *self.rows(rows), index=rows, **extra)
            if saved is not None:
                saved[rows] = found.x_adv.cpu()
            columns = torch.stack([getattr(found, name).cpu().double() for name in names])
            return columns, getattr(found, "warnings", [])

        began = time.perf_counter()
        for rows, parts in self.shared(work, units, bar):
            took, began = time.perf_counter() - began, time.perf_counter()
            columns, warnings = zip(*parts)
            found, seconds = torch.cat(columns, 1), seconds + took
            attack.notes[:] = dict.fromkeys(chain(attack.notes, *warnings))
            values[:, rows] = found
            line = {"rows": rows.tolist(), "values": dict(zip(names, found.tolist()))}
            store.add(attack=key, **line, seconds=took, notes=attack.notes)
        return dict(zip(names, values)), seconds


def summarize(
    attack: Attack, values: dict[str, Tensor], correct: Tensor, seconds: float
) -> dict[str, Any]:
    """One attack's entry in the report; accuracies in percent of all images."""
    count, budget = len(correct), attack.budget
    if minimum_norm := attack.columns == DISTANCES:
        robust = ~(values[budget["radius_norm"]] <= budget["radius"])
    else:
        robust = values["robust"] > 0
    entry: dict[str, Any] = {
        "clean_accuracy": percent(int(correct.sum()), count),
        "robust_accuracy": percent(int(robust.sum()), count),
        "num_examples": count,
        "budget": budget,
        "seconds": round(seconds, 3),
    }
    if minimum_norm:
        reached = correct & values["l2"].isfinite()
        entry["success_rate"] = percent(int(reached.sum()), int(correct.sum()))
        entry["accuracy_at_any_distance"] = percent(int((correct & ~reached).sum()), count)
        for name in DISTANCES:
            found = values[name][reached].tolist()
            entry[f"median_{name}"] = statistics.median(found) if found else None
    if "fell_to" in values:
        fell = values["fell_to"].where(correct, -1)
        left, entry["accuracy_after"] = int(correct.sum()), {}
        for stage, name in enumerate(budget["stages"]):
            left -= int((fell == stage).sum())
            entry["accuracy_after"][name] = percent(left, count)
    return {**entry, **({"notes": attack.notes} if attack.notes else {}), "versions": versions()}


def results_rows(attacks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The cells of :func:`results_table`, the first row its header."""
    with_distances = any("success_rate" in entry for entry in attacks.values())
    figures = [("seconds", "seconds", 1)]
    if with_distances:
        medians = [("L0", "median_l0", 0), ("L2", "median_l2", 2), ("L_inf", "median_l_inf", 3)]
        figures = [("success %", "success_rate", 1), *medians, *figures]
    rows = [["attack", "clean %", "robust %", "budget", *(head for head, *_ in figures)]]
    for name, entry in attacks.items():
        accuracies = [number(entry[key], 2) for key in ("clean_accuracy", "robust_accuracy")]
        budget = ("at " if "success_rate" in entry else "") + entry["budget"]["shown"]
        cells = [number(entry.get(key), digits) for _, key, digits in figures]
        rows.append([name, *accuracies, budget, *cells])
    return rows


def results_table(attacks: dict[str, dict[str, Any]]) -> str:
    """A report's ``attacks`` as aligned text."""
    rows = results_rows(attacks)
    return text_table(rows, left=(0, 3)) + (f"\n{MEDIANS}" if "L0" in rows[0] else "")


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Sequence[str] = ("PGD",),
    settings: Settings | None = None,
    *,
    dataset: str = "",
    batch: int = 200,
    save_to: str | None = None,
    store: VerdictStore | None = None,
    process: Processes | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Clean and robust accuracy of a network, as the evaluation scripts report them.

        report = evaluate(network, images, labels, ["PGD", "AutoAttack"], Settings(epsilon=8 / 255))
        report["attacks"]["PGD"]["robust_accuracy"]     # percent; print(results_table(...))

    Args:
        network: images float [N, C, H, W] in [0, 1] to logits; evaluated in eval mode.
        images, labels: [N, C, H, W], uint8 or float in [0, 1], and int64 [N], where the network is.
        attacks: names of :data:`ATTACKS`.
        dataset: its name, for the defaults; unknown ones go by the number of channels.
        save_to: folder for the attacked images.
        store, process, log: earlier verdicts; this process among several; gets lines for people.

    Raises:
        UserError: an unknown attack, a missing package, images, labels and network that do not fit.
    """
    if images.dtype != torch.uint8 and not (
        images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())
    ):
        raise UserError(f"{images.dtype} images, allowed are uint8, or floats in [0, 1]")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or bool((labels < 0).any()):
        has = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"labels are {has}, needed are {len(images)}, int64, from 0 on")
    if save_to:
        with naming(f"--save_adversarial {save_to}"):
            Path(save_to).mkdir(parents=True, exist_ok=True)
            if old := [name for name in attacks if Path(save_to, f"{name}.npy").exists()]:
                raise UserError(f"holds {old[0]}.npy; name another folder")
    process, store = process or Processes(images.device), store or VerdictStore(None, {})
    network = getattr(network, "_orig_mod", network).eval()  # as it was before torch.compile
    defaults, kept = family(dataset, images.shape[1]), store.report.get("attacks", {})
    settings = settings or Settings()
    chosen = [make_attack(name, settings, defaults, images.shape) for name in attacks]
    for attack in chosen:
        before = kept.get(attack.name, {}).get("budget", attack.budget)
        if {**before, "shown": ""} != {**attack.budget, "shown": ""}:
            shown = f"{attack.name} at {before['shown']}, not at {attack.budget['shown']}"
            raise UserError(f"--output: {store.output} holds {shown}; name another file")
    said = {note for attack in chosen for note in attack.notes}
    for note in sorted(said):
        log(f"note: {note}")
    subject = _Subject(network, images, labels, batch, process)
    right = subject.clean()
    clean = percent(int(right.sum()), len(right))
    log(f"clean accuracy: {clean:.2f} %")
    report = {"num_examples": len(labels), "seed": settings.seed, "device": str(process.device)}
    report |= {"processes": process.size, "versions": versions(), "clean_accuracy": clean}
    report["attacks"] = dict(kept)
    for attack in chosen:
        if attack.name in kept and save_to is None:
            log(f"{attack.name}: kept from {store.output}")
            continue
        saved = floats(images).cpu().contiguous().clone() if save_to else None
        values, seconds = subject.attack(attack, right, store, saved)
        entry = report["attacks"][attack.name] = summarize(attack, values, right, seconds)
        accuracy, shown = entry["robust_accuracy"], attack.budget["shown"]
        log(f"{attack.name}: {accuracy:.2f} % robust, {shown}, {seconds:.1f} s")
        for note in (note for note in attack.notes if note not in said):
            log(f"  note: {note}")
        if save_to:
            _save_images(saved, Path(save_to), attack.name)
    return report


def _save_images(images: Tensor, folder: Path, name: str) -> None:
    from torchvision.utils import save_image  # importing it takes seconds

    with naming(f"--save_adversarial {folder}"):
        np.save(folder / f"{name}.npy", images.numpy())
        save_image(images[:64], folder / f"{name}.png")


def run_evaluation(
    table: Mapping[str, Any], description: str, argv: Sequence[str] | None = None
) -> int:
    """Run an evaluation script; returns the exit code. UserError: what cannot be evaluated."""
    args = parse_evaluation(table, description, argv)
    with processes(args.gpu_id, args.threads) as process, torch.no_grad():
        # Attacks compare losses that differ in the last digits: no TensorFloat-32 here.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if (args.save_adversarial or args.report) and process.size > 1:
            name = "save_adversarial" if args.save_adversarial else "report"
            raise UserError(f"--{name} works in one process, torchrun started several")
        if args.report:
            check_page(args.report)
        path = args.model_path and str(checkpoints.find_checkpoint(args.model_path, BEST))
        checkpoint = checkpoints.load_checkpoint(path) if path else {}
        notes = [*unused_attack_flags(args), *apply_statement(args, checkpoint, table)]
        data = load_dataset(args.dataset, args.data_dir, train=args.split != "test")
        whole = None if args.split == "test" else fingerprint(data.images, data.labels)
        checkpoints.check_data(checkpoint, path, data, args.force, whole)
        if args.split == "held-out":
            data = _held_out(data, checkpoint, path)
        available = len(data)
        if (args.num_examples or 0) > available:
            notes.append(f"--num_examples {args.num_examples}: all {available} are taken")
        data = data.head(args.num_examples or available).to(process.device)
        network = build_network(args, path, checkpoint, data, process.device)
        digest = sha256_of(path) if path else fingerprint(*network.state_dict().values())
        process.log(f"model: {path or args.network} (sha256 {digest[:12]})")
        part = f"first {len(data):,} of {available:,} {args.split} images"
        process.log(f"data: {part} of {data.name}")
        own = own_network(args)
        facts = [own and f"{own} {sources_of(network, own)}", args.mean, args.std]
        if not (own or "activation" in (checkpoint.get("arch") or {})):
            facts += [getattr(args, name) for name in NAMED]
            unstated = checkpoints.unstated(checkpoint, args.activation)
            notes += [f"{note} (--activation)" for note in unstated]
        for note in notes:
            process.log(f"note: {note}")
        identity = {
            "checkpoint_sha256": digest,
            "network": " ".join(map(str, facts)) if any(facts) else None,
            "dataset": data.name,
            "data_sha256": fingerprint(data.images, data.labels),
            "num_examples": len(data),
            "seed": args.seed,
            "torch": str(torch.__version__),
        }
        settings = Settings(*(getattr(args, name) for name in Settings._fields))
        if other := args.transfer_from:
            other = checkpoints.find_checkpoint(other, BEST)
            if own or args.mean:  # a network of the same kind, normalised alike
                found = checkpoints.load_checkpoint(other)
                checkpoints.check_data(found, other, data, args.force)
                other = build_network(args, other, found, data, process.device)
            else:
                other = load_for(data, other, args.force)
        budget = gradient_budget("PGD", family(args.dataset, data.in_channels), settings)
        words = ["python", Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]
        options = {"dataset": args.dataset, "batch": args.test_batch, "log": process.log}
        options |= {"save_to": args.save_adversarial, "process": process}
        inputs = (network, data.images, data.labels, args.attack_method, settings)
        with contextlib.closing(VerdictStore(args.output, identity, process.is_main)) as store:
            try:
                report = evaluate(*inputs, store=store, **options)
                process.log(f"\n{results_table(report['attacks'])}")
                if args.sanity and process.is_main:
                    report["sanity"] = _masking(args, network, other, data, budget)
                    report["sanity_budget"] = str(budget)
                about = {"model_path": path, "arch": stated_arch(network) or args.arch}
                about |= {"test_set": available, "split": args.split, "command": shlex.join(words)}
                report = {**store.report, **about, **identity, **report}
                if args.report:
                    write_page(args, network, data, budget, report, results_rows(report["attacks"]))
                store.finish(report)
            except KeyboardInterrupt:
                kept = f"; the same command continues from {store.path}" if args.output else ""
                process.log(f"stopped{kept}")
                return 130
        if args.output:
            process.log(f"results: {args.output}")
        if args.report:
            process.log(f"page: {args.report}")
        process.barrier()
        return 0


def _held_out(data: ImageSet, checkpoint: Mapping[str, Any], path: str | None) -> ImageSet:
    """The training images that the checkpoint's run held out; UserError if it states none."""
    flags = checkpoint.get("args") or {}
    size, seed, used = (flags.get(name) for name in ("val_size", "manualSeed", "nlabel"))
    if not size or not all(isinstance(value, int) for value in (size, seed, used or 0)):
        name = path or "the network"
        raise UserError(f"--split held-out: {name} does not state which images were held out")
    return split_validation(data.head(used or len(data)), size, seed)[1]


def _masking(
    args: argparse.Namespace, network: nn.Module, other: nn.Module | None, data: ImageSet,
    budget: Budget,
) -> list[dict[str, Any]]:  # fmt: skip
    """The checks for gradient masking; prints their verdicts."""
    found, options = [], {"seed": args.seed, "batch": args.test_batch, "transfer_from": other}
    print("\nIs it real? Signs of masked gradients:")
    checks = masking_checks(network, data.float_images(), data.labels, budget, **options)
    for check in Bar(checks, total=7, desc="checks"):
        found.append(check._asdict())
        print(check, flush=True)
    return found

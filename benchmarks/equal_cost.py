"""Defenses at the same cost of training, compared by clean accuracy, PGD and AutoAttack.

    python -m benchmarks.equal_cost MNIST --minutes 60 --data_dir DATA
    python -m benchmarks.equal_cost digits --minutes 0.1 --seeds 1000         # a rehearsal

One command makes a table; given again, it resumes. What is done is kept in one file (``--results``)
and not done again; for what is missing there, the networks of the run folder are used, or trained
anew. Its stages:

* time: the cost of a step relative to AT's, in one quiet run in which the methods take turns, kept
  in `step_times.json`. It turns minutes into AT steps, and these into every other method's steps,
  so that rows compare whenever and wherever they are trained.
* search: for each method six short trainings (:func:`grid`). The best two have the highest robust
  accuracy (PGD) on held-out training images after the last epoch; among equals, clean accuracy.
* finals: these two at full length with the first seed. The method's flags are those of the better
  one, by the repository's rule: clean and robust accuracy on held-out images at the best epoch.
* train: these flags with the other seeds. Flags by which a full training fails, with any seed, are
  out; where none are left, the next best try follows. `python -m tools.figures cost` draws them.
* attack: of each network the epoch that the repository's rule chooses by held-out images.
* table: mean and range over the seeds.

On a GPU, and with ``--flags``, steps have times of their own and runs a folder of their own.
``--extra NAME "FLAGS"`` adds a variant of LFR: its flags come behind LFR's, the tries are the same.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from timeit import timeit
from typing import NamedTuple

import torch

import cifar_defense
import MNIST_defense
from tools.scripts import ROOT, positive, read_json, run, run_each, spread
from utils.checkpoints import load_checkpoint
from utils.datasets import load_dataset
from utils.defenses import Defense, DefenseLoss
from utils.errors import UserError, run_script
from utils.options import number, settle_training, training_parser
from utils.progress import Bar
from utils.run_folder import BEST, LOG, RECORD, read_log, write_atomic
from utils.runtime import versions
from utils.tables import markdown_table
from utils.training import network_of

TIMES = ROOT / "benchmarks" / "step_times.json"
BATCH, SEARCH_SEED = 128, 1
SINGLE = ("none", "igr")  # far behind with any rate: one full training, with one seed
WARMUP = 1 / 12  # share of the training over which lambda rises
COMMON = (f"--lr_schedule onecycle --train_batch {BATCH} --probe_size 500 --image_interval 0 "
          "--ckpt_interval 0")  # fmt: skip
# Of a dataset: the first word of its scripts, training flags, and attack, epsilon: test images.
_SMALL = "-a small_cnn --epsilon 0.3 --probe_steps 20"
HALF = {"MNIST": "0.15", "cifar": "4/255"}
_RESNET = "-a resnet --depth 20 --activation silu --epsilon 8/255 --probe_steps 10"
_CIFAR = {"PGD 8/255": 10_000, "PGD 0.031": 10_000, "AutoAttack 8/255": 1000}
SETTINGS = {
    "MNIST": ("MNIST", _SMALL, {"PGD 0.3": 10_000, "AutoAttack 0.3": 1000}),
    "cifar10": ("cifar", _RESNET, _CIFAR),
    "digits": ("MNIST", _SMALL, {"PGD 0.3": 360}),
}
METHODS = {name: f"--defense {name}" for name in ("none", "igr")}
# Four steps of half the radius; LFR's own default on CIFAR-10 is too weak an attack for these two.
METHODS |= {name: f"--defense {name} --num_steps 4 --step_size HALF" for name in ("at", "trades")}
METHODS["lfr"] = "--defense lfr --search fast"
# What is tried for each method (see docs/results.md, rule 4): six rates, or three by two weights.
# Those of LFR depend on the dataset; the smaller lambda is the published one.
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
GRIDS = {
    "trades": ((0.1, 0.2, 0.4), "--beta", (1, 6)),
    "MNIST": ((0.02, 0.05, 0.1), "--lambada", (0.02, 0.1)),
    "cifar": ((0.1, 0.2, 0.4), "--lambada", (0.03, 0.1)),
}


def grid(scripts: str, method: str) -> list[str]:
    """The flags that are tried for a method; igr and all variants get LFR's."""
    if method in ("none", "at"):
        return [f"--lr {rate:g}" for rate in RATES]
    rates, flag, weights = GRIDS["trades" if method == "trades" else scripts]
    return [f"--lr {rate:g} {flag} {weight:g}" for rate in rates for weight in weights]


class Run(NamedTuple):
    """A training: its method, the flags that the search tries, and its share of the budget."""

    name: str
    choice: str
    seed: int
    share: float = 1.0


class Table:
    """The runs of one table; the methods called as its stages make it, in that order."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scripts, self.setting, self.attacks = SETTINGS[args.dataset]
        self.known = {k: v.replace("HALF", HALF[self.scripts]) for k, v in METHODS.items()}
        self.methods = {name: self.known[name] for name in args.only}
        self.methods |= {name: f"{METHODS['lfr']} {flags}" for name, flags in args.extra}
        self.data = ["--dataset", args.dataset, "--data_dir", str(args.data_dir.resolve())]
        self.data += ["--threads", str(args.threads)]
        # Whatever changes the time of a step has times and runs of its own.
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        threads = args.threads > 1 and f"{args.threads} threads"
        self.key = " ".join(filter(None, (args.dataset, args.flags, threads, gpu)))
        name = re.sub(r"[^\w.]+", "_", f"{self.key}_{args.minutes:g}")
        self.folder = args.runs_dir.resolve() / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = args.results or self.folder / "results.json"
        self.lock = threading.Lock()
        self.train_set = load_dataset(args.dataset, args.data_dir, train=True)
        count = len(self.train_set)
        self.epoch = (count - min(1000, count // 10)) // BATCH  # steps of a whole epoch
        self.times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
        new = ", ".join(map(self.title, self.untimed()))
        if new and "time" not in args.stages:
            raise UserError(f"{TIMES} has no times of '{self.key}', {new}: run --stages time first")

    def title(self, name: str) -> str:
        """A method's name; of a variant with its flags, for others are another variant."""
        return " ".join([name, *dict(self.args.extra).get(name, "").split()])

    def untimed(self) -> list[str]:
        """The methods whose times the file does not have."""
        known = self.times.get(self.key, {}).get("relative", {})
        return [name for name in self.methods if self.title(name) not in known]

    def flags(self, name: str) -> list[str]:
        """All training flags of a method but its tries, its length and its seed."""
        method = self.methods.get(name, self.known["at"])  # which is timed in any case
        return f"{COMMON} {self.setting} {method} {self.args.flags}".split()

    def length(self, each: Run) -> tuple[int, int]:
        """Epochs, and steps of each, that cost its share of the budget."""
        times = self.times[self.key]
        budget = round(60 * self.args.minutes / times["at_seconds"])  # AT steps
        steps = max(1, round(each.share * budget / times["relative"][self.title(each.name)]))
        epochs = math.ceil(steps / self.epoch)
        return epochs, max(1, round(steps / epochs))

    def named(self, each: Run) -> str:
        """A training, after all that defines it: no other one meets its files and its results."""
        steps = math.prod(self.length(each))
        title = f"{self.title(each.name)} {each.choice} steps {steps} seed {each.seed}"
        return re.sub(r"[^\w.]+", "_", title)

    def path(self, each: Run, suffix: str = "") -> Path:
        """The folder of a training; with ``.out`` the file of what it printed."""
        return self.folder / f"{self.named(each)}{suffix}"

    def content(self) -> dict:
        """The results so far: ``runs`` by the name of their folder, ``rows`` of the table."""
        if self.results.exists():
            found = read_json(self.results, "table")
            if found["table"] != self.folder.name:
                raise UserError(f"{self.results} is of {found['table']}, not {self.folder.name}")
            return found
        table = {"table": self.folder.name, "dataset": self.args.dataset}
        return table | {"minutes": self.args.minutes, "runs": {}, "rows": {}}

    def record(self, each: Run, found: dict) -> None:
        """Add to the results of a training."""
        with self.lock:
            content = self.content()
            content["runs"].setdefault(self.named(each), {}).update(found)
            self.write(content)

    def write(self, content: dict) -> None:
        """Keep the results, a list of numbers in one line."""
        text = re.sub(
            r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(content, indent=1)
        )
        write_atomic(self.results, f"{text}\n".encode())

    def outcome(self, each: Run) -> dict:
        """The results of a training; empty before it ended."""
        return self.content()["runs"].get(self.named(each), {})

    def read(self, each: Run) -> dict:
        """The same from its folder; ``best`` is 0 if it diverged or ends with a constant answer."""
        path, output = self.path(each), self.path(each, ".out")
        log = read_log(path / LOG) if (path / LOG).exists() else {}
        clean, robust = log.get("Held-out Acc.", []), log.get("Held-out Robust Acc.", [])
        printed = output.read_text() if output.exists() else ""
        diverged = bool(re.search("error: the (loss is|weights are not finite)", printed))
        if not diverged and len(clean) < self.length(each)[0]:
            return {}
        failed = diverged or clean[-1] < max(clean) / 2
        best = 0.0 if failed else load_checkpoint(path / BEST)["best_acc"]
        minutes = sum(log.get("Seconds", [])) / 60
        cpu = json.loads((path / RECORD).read_text())["versions"]["cpu"]
        return {"robust": robust, "clean": clean, "best": best, "minutes": minutes, "cpu": cpu}

    def train_one(self, each: Run) -> None:
        """Train one network, unless its folder has it; to fail is a result as well."""
        if not self.read(each):
            epochs, steps = self.length(each)
            words = [f"{self.scripts}_defense.py", *self.data, *self.flags(each.name)]
            words += [*each.choice.split(), "--epochs", str(epochs), "--max_steps", str(steps)]
            words += ["--manualSeed", str(each.seed)]
            words += ["--warmup", f"{WARMUP * epochs:.3f}", "--checkpoint", str(self.path(each))]
            try:
                run([*words, "--resume", "auto"], self.path(each, ".out"))
            except UserError:
                if not self.read(each):
                    raise
        self.record(each, self.read(each))

    def train_all(self, runs: list[Run]) -> None:
        """Train what is not trained yet, ``--jobs`` at a time."""
        missing = [(each,) for each in runs if not self.outcome(each)]
        run_each(self.train_one, missing, self.args.jobs)

    def time(self) -> None:
        """The costs of steps that the file does not have."""
        new = self.untimed()
        if not new:
            return
        entry = self.times.setdefault(self.key, {"relative": {}})
        torch.set_num_threads(self.args.threads)
        torch.set_flush_denormal(True)
        steps = {name: self.step(name) for name in dict.fromkeys(["at", *new])}
        seconds = [
            {name: timeit(step, number=1) for name, step in steps.items()}
            for _ in Bar(range(self.args.turns + 2), desc="timing")
        ][2:]  # the first turns warm up
        for name in new:
            ratio = statistics.median(turn[name] / turn["at"] for turn in seconds)
            at_start = self.settled(name).at_start  # whose steps are AT's
            entry["relative"][self.title(name)] = round(at_start + (1 - at_start) * ratio, 4)
        entry.setdefault("at_seconds", round(statistics.median(turn["at"] for turn in seconds), 4))
        entry.setdefault("measured_on", versions())
        write_atomic(TIMES, (json.dumps(self.times, indent=1) + "\n").encode())

    def settled(self, name: str) -> argparse.Namespace:
        """The flags of a method as a script understands them."""
        table = {"MNIST": MNIST_defense, "cifar": cifar_defense}[self.scripts].DEFAULTS
        parser = training_parser(table, "")
        return settle_training(parser, table, parser.given([*self.data, *self.flags(name)]))

    def step(self, name: str) -> Callable[[], None]:
        """One training step of a method, as a function."""
        flags = self.settled(name)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = self.train_set.head(BATCH).to(device)
        x, y, network = data.float_images(), data.labels, network_of(flags, data, device)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
        loss = DefenseLoss(network, Defense.of(flags))

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=flags.amp):
                terms = loss(x, y, torch.randn_like(x), flags.lambada)
            terms.total.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return step

    def tries(self, name: str) -> list[Run]:
        """The short trainings of a method's search."""
        found = grid(self.scripts, name)
        return [Run(name, flags, SEARCH_SEED, self.args.share) for flags in found]

    def score(self, each: Run) -> tuple[float, float]:
        """Held-out robust and clean accuracy after the last epoch of a try; 0 if it failed."""
        found = self.require(each)
        return (found["robust"][-1], found["clean"][-1]) if found["best"] else (0.0, 0.0)

    def best_score(self, each: Run) -> float:
        """Of a full training's best epoch, by the repository's rule; 0 if any seed's fails."""
        seeds = [self.outcome(each._replace(seed=seed)) for seed in self.args.seeds]
        failed = any(found and not found["best"] for found in seeds)
        return 0.0 if failed else self.require(each)["best"]

    def require(self, each: Run, *attacks: str) -> dict:
        """The results of a training, with those of ``attacks``, or UserError before they ended."""
        if (found := self.outcome(each)) and found.keys() >= {*attacks}:
            return found
        what = "attacked" if found else "trained"
        raise UserError(f"{self.path(each)} is not {what}: run the stages before this one")

    def search(self) -> None:
        """Run the tries and print their accuracies."""
        runs = [each for name in self.methods for each in self.tries(name)]
        self.train_all(runs)
        rows = [["method", "steps", "flags", "held-out PGD (%)", "clean (%)"]]
        for each in runs:
            accuracies = [f"{value:.1f}" for value in self.score(each)]
            steps = math.prod(self.length(each))
            rows.append([each.name, str(steps), f"`{each.choice}`", *accuracies])
        print(markdown_table(rows, left=(0, 2)))

    def finalists(self, name: str) -> list[Run]:
        """A method's best two tries (of SINGLE the best), at full length with the first seed.

        While all of them fail, the next best one joins them.
        """
        best = sorted(self.tries(name), key=self.score, reverse=True)
        runs = [Run(name, each.choice, self.args.seeds[0]) for each in best]
        count = 1 if name in SINGLE else 2
        while all(self.outcome(r) and not self.best_score(r) for r in runs[:count]):
            if count == len(runs):
                raise UserError(f"{name}: the training fails with all flags that are tried")
            count += 1
        return runs[:count]

    def train_finalists(self) -> list[Run]:
        """The finalists of all methods, all trained: those that fail may call for the next."""
        while True:
            runs = [each for name in self.methods for each in self.finalists(name)]
            if all(map(self.outcome, runs)):
                return runs
            self.train_all(runs)

    def finals(self) -> None:
        """Train the finalists and print their scores: the best one's flags are the method's."""
        runs = self.train_finalists()
        rows = [["method", "flags", "held-out score of the best epoch (%)"]]
        rows += [[each.name, f"`{each.choice}`", f"{self.best_score(each):.2f}"] for each in runs]
        print(markdown_table(rows, left=(0, 1)))

    def runs(self) -> list[Run]:
        """The networks of the table, seed by seed."""
        chosen = [max(self.finalists(name), key=self.best_score) for name in self.methods]
        pairs = itertools.product(self.args.seeds, chosen)
        found = [each._replace(seed=seed) for seed, each in pairs]
        return [each for each in found if each in chosen or each.name not in SINGLE]

    def train(self) -> None:
        """The networks of the table; which ones is kept with the results."""
        while not all(map(self.outcome, runs := self.runs())):
            self.train_all(runs)
            self.train_finalists()
        content = self.content()
        content["rows"] |= self.rows()
        self.write(content)

    def rows(self) -> dict[str, dict]:
        """What is in the table: by method its flags, its steps and its runs by seed."""
        rows: dict[str, dict] = {}
        for each in self.runs():
            flags = f"{self.methods[each.name]} {each.choice}"
            row = {"flags": flags, "steps": math.prod(self.length(each)), "runs": {}}
            rows.setdefault(each.name, row)["runs"][str(each.seed)] = self.named(each)
        return rows

    def attack(self) -> None:
        """Every network by every attack, all networks by one attack before the next."""

        def missing(each: Run) -> list[str]:
            return [attack for attack in self.attacks if attack not in self.outcome(each)]

        def evaluate(each: Run, attack: str) -> None:
            name, epsilon = attack.split()
            report = self.path(each) / f"{re.sub('[ /]', '_', attack)}.json"
            words = [f"{self.scripts}_eval.py", *self.data, "--attack_method", name]
            words += ["--epsilon", epsilon, "--num_examples", str(self.attacks[attack])]
            words += ["--model_path", str(self.path(each) / BEST), "--output", str(report)]
            run(words, report.with_suffix(".out"))
            found = json.loads(report.read_text())
            entry = {"checkpoint_sha256": found["checkpoint_sha256"], **found["attacks"][name]}
            del entry["versions"]
            self.record(each, {attack: entry})

        lost = [each for each in self.runs() if missing(each)]
        lost = [each for each in lost if not (self.path(each) / BEST).exists()]
        for each in lost:  # trained anew it may be another network
            if len(missing(each)) < len(self.attacks):
                line = f"{self.results} has attacks on it; put it there, or remove the attacks"
                raise UserError(f"{self.path(each) / BEST} is missing, and {line}")
        run_each(self.train_one, [(each,) for each in lost], self.args.jobs)
        self.train()  # what ended well on one machine may fail on another
        pairs = itertools.product(self.attacks, self.runs())
        todo = [(each, attack) for attack, each in pairs if attack in missing(each)]
        run_each(evaluate, todo, self.args.jobs)

    def table(self) -> None:
        """Print the table."""
        figures: dict[str, list[dict]] = {}
        for each in self.runs():
            found = self.require(each, *self.attacks)
            shown = {"clean (%)": found[next(iter(self.attacks))]["clean_accuracy"]}
            for attack in self.attacks:
                title = f"{attack}, first {found[attack]['num_examples']:,} (%)"
                shown[title] = found[attack]["robust_accuracy"]
            figures.setdefault(each.name, []).append(shown | {"minutes": found["minutes"]})
        cells = [["method", "flags", "steps", *next(iter(figures.values()))[0]]]
        for name, row in self.rows().items():
            cells.append([name, f"`{row['flags']}`", f"{row['steps']:,}"])
            cells[-1] += [spread([each[key] for each in figures[name]]) for key in cells[0][3:]]
        print(markdown_table(cells, left=(0, 1)))


def main() -> int:
    stages = ("time", "search", "finals", "train", "attack", "table")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", choices=SETTINGS)
    minutes, share = number("MINUTES", above=True)[0], number("SHARE", 0, 1, above=True)[0]
    add("--minutes", type=minutes, default=60.0, help="of one core, by AT")
    add("--stages", nargs="+", choices=stages, default=stages)
    add("--only", nargs="*", choices=METHODS, default=list(METHODS), help="these methods")
    add("--extra", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"),
        help="a variant of LFR")  # fmt: skip
    add("--flags", default="", help="training flags that all methods get, as one word")
    add("--share", type=share, default=0.1, help="of the minutes, for each try of the search")
    add("--seeds", type=int, nargs="+", default=[1000, 1001, 1002], help="a network for each")
    add("--turns", type=positive, default=20, help="timed turns of each method")
    add("--data_dir", type=Path, default=Path("./data"))
    add("--runs_dir", type=Path, default=Path("runs/equal_cost"))
    add("--threads", type=positive, default=1, help="CPU threads of a run")
    add("--jobs", type=positive, default=1, help="runs at the same time")
    add("--results", type=Path, help="JSON: what is done; default: results.json in the run folder")
    args = parser.parse_args()
    if not (args.only or args.extra):
        parser.error("--only without a method needs an --extra")
    extra = [*METHODS, *(name for name, _ in args.extra)]
    for what, names in (("extra", extra), ("seeds", args.seeds)):
        if len({*names}) < len(names):
            parser.error(f"--{what}: {', '.join(map(str, names))} are not all different")
    table = Table(args)
    for stage in stages:
        if stage in args.stages:
            getattr(table, stage)()
    return 0


if __name__ == "__main__":
    run_script(main)

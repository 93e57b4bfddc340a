"""Fault injection: do the worst to runs, evaluations and checkpoints, and count what survives.

python -m tests.faults                      everything, some minutes
python -m tests.faults --only kill,memory --kills 5

* kill: killed and resumed runs must end bit for bit as the run that was never interrupted.
* files: damaged checkpoints must load to the same weights or end in one line.
* disk: a full disk, a read-only folder, a second run: one line, and the last checkpoint intact.
* evaluation: killed and resumed evaluations must end in the same verdicts.
* flags: valid combinations of flags run a step.
* memory: a run after 2,000 steps has 3 % more than after 200 at most.

Runs are forked from this process, which has imported torch once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402 - after the thread count
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import utils.evaluation  # noqa: E402 - imported once, here, for all forked runs
import utils.training  # noqa: E402, F401
from tests.faults import files  # noqa: E402
from tests.helpers import save_checkpoint  # noqa: E402
from tests.test_checkpoints import REFUSED  # noqa: E402
from utils.checkpoints import load_checkpoint  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.run_folder import CHECKPOINT  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN, EVALUATE = "MNIST_defense.py", "MNIST_eval.py"
SMALL = (
    "--dataset folder --threads 1 --train_batch 16 --test_batch 64 --val_size 32 --probe_size 16 "
    "--probe_steps 2 --image_interval 2 --ckpt_interval 1"
).split()
# Two kinds of run: everything random (dropout), and everything with a state (BatchNorm, averaged
# weights, Adam) or with graphs of second derivatives (SiLU), which a circle of references keeps.
KINDS = {
    "small_cnn": "--epochs 3 --num_steps 1 --step_size 0.1 --drop 0.2".split(),
    "resnet": (
        "--arch resnet --depth 8 --activation silu --epochs 3 --max_steps 9 --search fast "
        "--num_steps 1 --optimizer_type Adam --lr 0.002 --ema 0.9 --warmup 1 --lr_schedule cosine"
    ).split(),
}
# 40 steps an epoch: the log's rows tell how far a run is
MEMORY = (
    "--epochs 50 --train_batch 4 --max_steps 40 --num_steps 1 --step_size 0.1 --image_interval 5 "
    "--ckpt_interval 5 --save_minutes 0.02 --probe_size 8"
).split()
OFTEN = ("--save_minutes", 0.001)


@dataclass
class Count:
    """Faults tried and survived, and what went wrong."""

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, what: str, problem: str | None) -> bool:
        """One more fault; ``problem`` says what went wrong, if anything did."""
        self.tried += 1
        if problem:
            self.failures.append(f"{what}: {problem}")
            print(f"  FAILED {self.name}, {what}: {problem}", flush=True)
        return not problem


@dataclass
class Ended:
    code: int
    out: str
    err: str

    def one_line(self, *words: str) -> str | None:
        """What is wrong if this was meant to end in one line with exit code 2."""
        lines = self.err.strip().splitlines()
        if self.code != 2 or len(lines) != 1 or ": error: " not in lines[-1]:
            return f"exit code {self.code}, stderr: {self.err.strip()[-600:]!r}"
        missing = [word for word in words if word not in lines[0]]
        return f"{lines[0]!r} does not say {missing}" if missing else None

    def success(self) -> str | None:
        """What is wrong if this was meant to succeed."""
        return None if self.code == 0 else f"exit code {self.code}, stderr: {self.err[-600:]!r}"


class Run:
    """A script in a process that is forked from this one; ``prepare`` is called in it first."""

    def __init__(
        self, arguments: Sequence[object], prepare: Callable[[], None] = lambda: None
    ) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(
                self._child([str(ROOT / str(arguments[0])), *map(str, arguments[1:])], prepare)
            )

    def _child(self, words: list[str], prepare: Callable[[], None]) -> int:
        code = 0
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._err.fileno(), 2)
            sys.argv = words
            prepare()
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:  # as the interpreter would
            sys.excepthook(*sys.exc_info())
            code = 1
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        return code

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def kill(self) -> bool:
        """SIGKILL; whether the process was still there."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
        return self.wait().code == -signal.SIGKILL

    def wait(self, timeout: float = 1800) -> Ended:
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Ended(self.code, *texts)


def data_flags() -> tuple[str, str]:
    return ("--data_dir", os.environ["LFR_FAULTS_DATA"])


def train(folder: Path, kind: str, *more: object, **options: Any) -> Run:
    """Start a training run in ``folder``."""
    flags = (*SMALL, *data_flags(), *KINDS[kind], "--checkpoint", folder, *more)
    return Run([TRAIN, *flags], **options)


def start_or_resume(folder: Path, kind: str, *more: object) -> Run:
    resume = ("--resume", folder / CHECKPOINT) if (folder / CHECKPOINT).exists() else ()
    return train(folder, kind, *more, *resume)


def write_images(place: Path) -> None:
    """A small image folder for the runs: digits of 16 x 16 pixels, 192 to train, 64 to test."""
    digits = load_digits()
    for number in range(256):
        pixels = (digits.images[number] * 15.9).astype("uint8").repeat(2, 0).repeat(2, 1)
        split = "train" if number < 192 else "test"
        folder = place / split / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    os.environ["LFR_FAULTS_DATA"] = str(place)


def result_of(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was killed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pth.tar")):
        checkpoint = load_checkpoint(path)
        training = dict(checkpoint.get("training") or {})
        progress = dict(training.pop("progress", None) or {})
        progress.pop("seconds", None)
        kept = ("state_dict", "optimizer", "epoch", "acc", "best_acc", "arch")
        found[path.name] = [*(checkpoint.get(part) for part in kept), training, progress]
    header, *rows = [line.split("\t") for line in (folder / "log.txt").read_text().splitlines()]
    keep = [i for i, name in enumerate(header) if "econds" not in name]
    found["log.txt"] = [[row[i] for i in keep] for row in (header, *rows)]
    events = EventAccumulator(str(folder / "scalars"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    # Of a step that was logged twice TensorBoard shows the later one, and nothing of the former.
    for tag in events.Tags()["scalars"]:
        if "econds" not in tag:
            found[f"scalar {tag}"] = {event.step: event.value for event in events.Scalars(tag)}
    for tag in events.Tags()["images"]:
        images = {event.step: event.encoded_image_string for event in events.Images(tag)}
        found[f"image {tag}"] = images
    found["files"] = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    return found


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two results are not identical to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        return None if same else where
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(filter(None, (difference(a[key], b[key], f"{where}/{key}") for key in a)), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (difference(x, y, f"{where}/{i}") for i, (x, y) in pairs)), None)
    same = type(a) is type(b) and (a == b or (a != a and b != b))
    return None if same else f"{where}: {str(a)[:80]} against {str(b)[:80]}"


def wait_for_save(run: Run, folder: Path, saves: int, inside: bool) -> None:
    """Return at the ``saves``-th save from now: while it is being written, or just after it."""
    last: object = "none yet"
    while run.running() and saves >= 0:
        with contextlib.suppress(OSError):
            if inside:
                now: object = frozenset(name for name in os.listdir(folder) if ".tmp-" in name)
            else:
                now = (folder / CHECKPOINT).stat().st_ino
            saves -= bool(now) and now != last
            last = now
        time.sleep(0.0002)


def whole(folder: Path) -> str | None:
    """What is wrong if a checkpoint in it is only half there."""
    for path in folder.glob("*.pth.tar") if folder.is_dir() else ():
        try:
            load_checkpoint(path)
        except UserError as error:
            return f"half-written: {error}"
    return None


def inject_kill(place: Path, args: argparse.Namespace, draw: random.Random) -> Count:
    """Runs that are killed one to three times each and then resumed to their end."""
    count = Count("killed and resumed")
    wanted, seconds = {}, {}
    for kind in KINDS:
        straight, again = place / f"straight_{kind}", place / f"again_{kind}"
        problem = train(straight, kind, "--save_minutes", 0).wait().success()
        if not count.check(f"the run that nobody kills, {kind}", problem):
            return count
        wanted[kind] = result_of(straight)
        start = time.monotonic()
        train(again, kind, *OFTEN).wait()
        seconds[kind] = time.monotonic() - start
        count.check(f"not repeatable, {kind}", difference(wanted[kind], result_of(again)))
    places: dict[str, int] = {}
    resumed_inside = 0
    for number in range(args.kills):
        kind, folder = list(KINDS)[number % len(KINDS)], place / f"killed_{number}"
        problem, killed = None, True
        for _ in range(draw.choice((1, 1, 2, 3))):
            run = start_or_resume(folder, kind, *OFTEN)
            where = draw.choice(("anywhere", "in a save", "after a save"))
            if where == "anywhere":
                time.sleep(draw.uniform(0, seconds[kind]))
            else:
                wait_for_save(run, folder, draw.randrange(8), inside=where == "in a save")
            killed = run.kill()
            problem = whole(folder) if killed else run.wait().success()
            if problem or not killed:
                break
            places[where] = places.get(where, 0) + 1
        if problem is None:
            ended = start_or_resume(folder, kind, *OFTEN).wait()
            resumed_inside += ", batch " in ended.out
            problem = ended.success() or difference(wanted[kind], result_of(folder))
        if count.check(f"run {number} ({kind})", problem):
            shutil.rmtree(folder)
    count.notes.append(f"kills: {places}; resumed in the middle of an epoch: {resumed_inside}")
    return count


def bad_files(content: dict[str, Any], evidence: Path) -> Iterator[tuple[str, bytes]]:
    """Files that must be refused, with a name for each."""
    state, command = content["state_dict"], files.Command(str(evidence))
    first = next(iter(state))
    for form in ({}, {"legacy": True}, {"protocol": 4}):
        yield f"code {form}", files.saved({**content, "args": command}, **form)
    yield "bare pickle", files.pickle.dumps(command)
    for name, changed in {
        "code among the weights": {first: command},
        "wrong shape": {first: torch.ones(3, 3)},
        "wrong kind": {first: state[first].long()},
        "one too many": {"extra": torch.ones(1)},
    }.items():
        yield name, files.saved({**content, "state_dict": {**state, **changed}})
    yield "other arch", files.saved({**content, "arch": {"name": "wrn", "depth": 10**6 + 2}})
    yield "noise", random.Random(0).randbytes(5000)
    for name, (make, _) in REFUSED.items():
        yield name, make()


def inject_files(place: Path, args: argparse.Namespace, draw: random.Random) -> Count:
    """Mutated and strange files, each given to the evaluation script or to a resumed run."""
    count = Count("damaged files")
    folder, harmless = place / "files", 0
    train(folder, "small_cnn", "--epochs", 1, "--schedule", 1).wait()
    content = load_checkpoint(folder / CHECKPOINT)
    path, evidence = place / "mutated.pth.tar", place / "evidence"

    def offer(name: str, may_load: bool = False) -> None:
        nonlocal harmless
        flags = "--dataset folder --attack_method FGSM --num_examples 4".split()
        ended = Run([EVALUATE, "--model_path", path, *data_flags(), *flags]).wait()
        loaded = ended.code == 0 and may_load
        harmless += loaded
        count.check(name, "code was executed" if evidence.exists() else None)
        count.check(name, None if loaded else ended.one_line(str(path)))
        evidence.unlink(missing_ok=True)

    save_checkpoint(path, content)
    offer("sound", may_load=True)
    good, old = files.saved(content), files.saved(content, legacy=True)
    strange = list(bad_files(content, evidence))
    for name, data in strange:
        path.write_bytes(data)
        offer(name)
    for number in range(max(0, args.mutations - len(strange))):
        mutate = files.MUTATIONS[number % len(files.MUTATIONS)]
        source = good if number % 4 else old
        path.write_bytes(mutate(source, draw))
        offer(f"{mutate.__name__} {number}", may_load=True)
        if source is good:
            with contextlib.suppress(UserError):
                loaded = load_checkpoint(path)["state_dict"]
                problem = difference(content["state_dict"], loaded)
                count.check(f"{mutate.__name__} {number} believed", problem)
    path.unlink()
    for name, make in {
        "missing": lambda: None,
        "fifo": lambda: os.mkfifo(path),
        "loop of links": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }.items():
        make()
        offer(name)
        path.unlink(missing_ok=True)
    path.mkdir()
    offer("directory")
    path.rmdir()
    # A run that resumes from such a file must not start with it either.
    for number, changed in enumerate((
        {"training": "state"},
        {"training": {"progress": [1], "weights": None}},
        {"training": {"progress": {"epoch": 0, "more": 1}}},
        {"training": {"progress": {"epoch": "one"}}},
        {"training": {"progress": {"epoch": 0}, "weights": "none"}},
        {"training": {"progress": {"epoch": 0}, "weights": {"a": torch.ones(1)}}},
        {"optimizer": None},
        {"optimizer": "SGD"},
    )):  # fmt: skip
        save_checkpoint(path, {**content, **changed})
        ended = train(place / "resumed", "small_cnn", "--resume", path).wait()
        count.check(f"resumed from {number}", ended.one_line(str(path)))
        shutil.rmtree(place / "resumed", ignore_errors=True)
    count.notes.append(f"{harmless - 1} of the mutations left the file as good as it was")
    return count


def limit_files(size: int) -> Callable[[], None]:
    """No file may grow beyond ``size`` bytes: what the kernel reports is much like a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def intact(folder: Path, newest: bool = True) -> str | None:
    """What is wrong if the last good checkpoint is not there and whole."""
    if newest and not (folder / CHECKPOINT).exists():
        return "no checkpoint is left"
    leftovers = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    return f"left behind: {leftovers}" if leftovers else whole(folder)


def inject_disk(place: Path, args: argparse.Namespace, draw: random.Random) -> Count:
    """Files that may not grow, a folder that becomes read-only, two runs in one folder."""
    count = Count("full disk, read-only, second run")
    folder = place / "whole"
    count.check("a run", train(folder, "small_cnn").wait().success())
    size = (folder / CHECKPOINT).stat().st_size
    for limit in (3000, size // 2, size - 1):
        run_folder = place / f"limited_{limit}"
        ended = train(run_folder, "small_cnn", prepare=limit_files(limit)).wait()
        problem = ended.one_line("too large") or intact(run_folder, newest=False)
        count.check(f"files of at most {limit} bytes", problem)
    run_folder = place / "limited_later"
    train(run_folder, "small_cnn", "--epochs", 1, "--schedule", 1).wait()
    flags = ("--resume", run_folder / CHECKPOINT)
    ended = train(run_folder, "small_cnn", *flags, prepare=limit_files(size // 2)).wait()
    count.check("a resumed run on a full disk", ended.one_line("--resume") or intact(run_folder))
    for saves in (0, 5) if os.geteuid() else ():  # root may write everywhere
        run_folder = place / f"readonly_{saves}"
        run = train(run_folder, "small_cnn", *OFTEN)
        wait_for_save(run, run_folder, saves, inside=False)
        run_folder.chmod(0o555)
        problem = run.wait().one_line("permission denied") or intact(run_folder)
        run_folder.chmod(0o755)
        count.check(f"read-only after {saves + 1} saves", problem)
    run_folder = place / "shared"
    first = train(run_folder, "small_cnn", *OFTEN)
    wait_for_save(first, run_folder, 0, inside=False)
    os.kill(first.pid, signal.SIGSTOP)  # it shall not end before the others have tried
    for more in ((), ("--overwrite",), ("--resume", run_folder / CHECKPOINT)):
        ended = train(run_folder, "small_cnn", *more).wait()
        count.check(f"second run {more}", ended.one_line("in use", str(first.pid)))
    os.kill(first.pid, signal.SIGCONT)
    problem = first.wait().success() or difference(result_of(folder), result_of(run_folder))
    count.check("the first run, after others tried its folder", problem)
    ended = train(run_folder, "small_cnn").wait()
    problem = ended.one_line("holds a run", "--resume", "--overwrite")
    count.check("a run that is there already", problem)
    return count


def verdicts_of(output: Path) -> dict[str, Any]:
    """What an evaluation found, without the seconds it took."""
    report = json.loads(output.read_text(encoding="utf-8"))
    found = {"clean": report["clean_accuracy"]}
    for name, entry in report["attacks"].items():
        found[name] = {key: value for key, value in entry.items() if key != "seconds"}
    return found


def inject_evaluation(place: Path, args: argparse.Namespace, draw: random.Random) -> Count:
    """Evaluations killed one to three times and given again."""
    count = Count("evaluations killed and resumed")
    folder, straight = place / "trained", place / "straight.json"
    # Well enough for robust and misclassified images, both.
    longer = ("--epochs", 8, "--schedule", 8, "--lr", 0.05, "--lambada", 0.005)
    if not count.check("training", train(folder, "small_cnn", *longer).wait().success()):
        return count
    attacks = ["FGSM", "PGD", "point-wise"]
    attacks += ["AutoAttack"] if importlib.util.find_spec("pyautoattack") else []

    def start(output: Path, batch: int) -> Run:
        flags = ["--dataset", "folder", "--epsilon", 0.05, "--num_examples", 16, "--threads", 1]
        flags += ["--attack_method", *attacks, "--output", output, "--test_batch", batch]
        return Run([EVALUATE, "--model_path", folder / CHECKPOINT, *data_flags(), *flags])

    began = time.monotonic()
    if not count.check("evaluation", start(straight, 8).wait().success()):
        return count
    seconds, wanted, resumed = time.monotonic() - began, verdicts_of(straight), 0
    reached = {name: wanted[name]["robust_accuracy"] for name in attacks}
    for number in range(args.evaluations):
        output, problem = place / f"killed_{number}.json", None
        for _ in range(draw.choice((1, 2, 3))):
            run = start(output, draw.choice((3, 8, 32)))
            time.sleep(draw.uniform(0.2, 1) * seconds)
            problem = None if run.kill() else run.wait().success()
            if problem or output.exists():
                break
            resumed += output.with_name(f"{output.name}.partial").exists()
        if problem is None and not output.exists():
            problem = start(output, 5).wait().success()
        problem = problem or difference(wanted, verdicts_of(output))
        count.check(f"evaluation {number}", problem)
    count.notes.append(f"clean {wanted['clean']:.1f} %, then {reached}; {seconds:.0f} s straight")
    count.notes.append(f"resumed from a partial file: {resumed}")
    return count


def inject_flags(place: Path, args: argparse.Namespace, draw: random.Random) -> Count:
    """tests/test_dry_runs.py with more examples than CI has time for."""
    count = Count("valid combinations of flags")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_dry_runs.py"]
    environment = {**os.environ, "LFR_DRY_RUNS": str(args.dry_runs)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    count.tried = args.dry_runs - 1
    count.check("a combination", done.stdout[-2000:] if done.returncode else None)
    return count


def inject_memory(place: Path, args: argparse.Namespace, draw: random.Random) -> Count:
    """Resident memory of a run after 200 and after 2,000 steps."""
    count = Count("memory")
    for kind in KINDS:
        folder = place / kind
        run = train(folder, kind, *MEMORY)
        sizes: dict[int, float] = {}
        while run.running():
            with contextlib.suppress(OSError):
                epochs = (folder / "log.txt").read_text().count("\n") - 1
                pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
                if pages:  # none: it has ended
                    sizes[40 * epochs] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            time.sleep(0.02)
        problem = run.wait().success()
        if not problem:
            early = next((size for steps, size in sorted(sizes.items()) if steps >= 200), 0.0)
            last = max(sizes)
            grown = f"{early:.1f} MB after 200 steps, {sizes[last]:.1f} MB after {last}"
            count.notes.append(f"{kind}: {grown}")
            problem = grown if last < 1900 or sizes[last] > 1.03 * early else None
        count.check(kind, problem)
    return count


def main() -> int:
    parts = {
        "kill": inject_kill,
        "files": inject_files,
        "disk": inject_disk,
        "evaluation": inject_evaluation,
        "flags": inject_flags,
        "memory": inject_memory,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(parts), help="parts, comma-separated")
    parser.add_argument("--kills", type=int, default=50, help="runs to kill")
    parser.add_argument("--evaluations", type=int, default=5, help="evaluations to kill")
    parser.add_argument("--dry_runs", type=int, default=200, help="combinations of flags to try")
    parser.add_argument("--mutations", type=int, default=200, help="files to damage")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if not set(chosen) <= set(parts):
        parser.error(f"--only {args.only}: allowed are {', '.join(parts)}")
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="lfr_faults_"))
    write_images(place / "images")
    tried = failed = 0
    for name in chosen:
        start = time.monotonic()
        (place / name).mkdir()
        count = parts[name](place / name, args, random.Random(args.seed))
        survived, seconds = count.tried - len(count.failures), time.monotonic() - start
        print(f"{count.name}: {count.tried} tried, {survived} survived, {seconds:.0f} s")
        print("".join(f"  {note}\n" for note in count.notes), end="", flush=True)
        tried, failed = tried + count.tried, failed + len(count.failures)
    print(f"all: {tried} faults tried, {tried - failed} survived")
    if failed:
        print(f"the runs are in {place}")
    else:
        shutil.rmtree(place)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

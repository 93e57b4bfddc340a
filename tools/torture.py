"""Do the worst to training runs and checkpoints, and count what survives.

python -m tools.torture                      everything, some minutes
python -m tools.torture --only kill --kills 5
python -m tools.torture --only files,disk,evaluation,memory

* kill: runs killed with SIGKILL at random instants, in the middle of a save and right after one,
  then resumed, must end bit for bit as the run that was never interrupted.
* files: damaged and hostile checkpoints must load to the same weights or end in one line.
* disk: a full disk, a read-only folder and a second run in one folder must end in one line, with
  the last good checkpoint intact.
* evaluation: FGSM, PGD, point-wise and AutoAttack, killed at random instants and given again with
  another batch size, must end in the verdicts of the evaluation that was never interrupted; another
  number of threads may move an image or two and nothing else.
* flags: valid combinations of flags, found by hypothesis, run a step.
* memory: resident memory after 2,000 steps is within 3 % of that after 200.

The exit code is 0 if every fault was survived. Runs are forked from this process, which has
imported torch once; the first run of each kind is started as a user would start it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
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

ROOT = Path(__file__).resolve().parent.parent
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402 - after the thread count
from PIL import Image  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import utils.evaluation  # noqa: E402 - imported once, here, for all forked runs
import utils.training  # noqa: E402, F401
from tools import faults  # noqa: E402
from utils.data import load_dataset  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.library_attacks import library_version  # noqa: E402
from utils.runs import CHECKPOINT, load_checkpoint, save_checkpoint  # noqa: E402

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


@dataclass
class Count:
    """Faults tried and survived, and what went wrong."""

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, problem: str | None) -> None:
        """One more fault; ``problem`` says what went wrong, if anything did."""
        self.tried += 1
        if problem:
            self.failures.append(problem)
            print(f"  FAILED {self.name}: {problem}", flush=True)


# ---------------------------------------------------------------------------------------------
# Running the scripts


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
    """A script in a process of its own, forked from this one or started afresh.

    Args:
        arguments: the script and its flags.
        fresh: start a new interpreter.
        prepare: called in the forked process first.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        fresh: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        words = [str(ROOT / str(arguments[0])), *map(str, arguments[1:])]
        self.code: int | None = None
        if fresh:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._err,
                cwd=ROOT,
            )
            process.returncode = 0  # waited for here
            self.pid = process.pid
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._child(words, prepare))

    def _child(self, words: list[str], prepare: Callable[[], None] | None) -> int:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._err.fileno(), 2)
            sys.argv = words
            if prepare is not None:
                prepare()
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:  # as the interpreter would
            sys.excepthook(*sys.exc_info())
            code = 1
        finally:
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
        if not self.running():
            return False
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        return self.code == -signal.SIGKILL

    def wait(self, timeout: float = 1800) -> Ended:
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = -1000
                break
            time.sleep(0.005)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        if self.code == -1000:
            texts[1] += f"\n(hung for {timeout:.0f} s)"
        return Ended(self.code, *texts)


def train(folder: Path, kind: str, *more: object, **options: Any) -> Run:
    """Start a training run in ``folder``."""
    data = ("--data_dir", os.environ["LFR_TORTURE_DATA"])
    return Run([TRAIN, *SMALL, *data, *KINDS[kind], "--checkpoint", folder, *more], **options)


def write_images(place: Path) -> None:
    """A small image folder for the runs: digits of 16 x 16 pixels, 192 to train, 64 to test."""
    digits = load_dataset("digits", ".", train=True).head(256)
    small = torch.nn.functional.avg_pool2d(digits.float_images()[:, :, 2:-2, 2:-2], 3, 1, 1)
    small = (small[:, 0, ::3, ::3].repeat_interleave(2, 1).repeat_interleave(2, 2) * 255).byte()
    for number, (pixels, label) in enumerate(zip(small, digits.labels.tolist(), strict=True)):
        folder = place / ("train" if number < 192 else "test") / digits.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:04}.png")
    os.environ["LFR_TORTURE_DATA"] = str(place)


# ---------------------------------------------------------------------------------------------
# (a) killed at any moment


def result_of(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was killed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pth.tar")):
        checkpoint = load_checkpoint(path)
        for part in ("state_dict", "optimizer", "epoch", "acc", "best_acc", "arch"):
            found[f"{path.name} {part}"] = checkpoint.get(part)
        training = dict(checkpoint.get("training") or {})
        found[f"{path.name} weights"] = training.pop("weights", None)
        progress = dict(training.pop("progress", None) or {})
        progress.pop("seconds", None)
        found[f"{path.name} training"] = (training, progress)
    header, *rows = [line.split("\t") for line in (folder / "log.txt").read_text().splitlines()]
    keep = [i for i, name in enumerate(header) if "econds" not in name]
    found["log.txt"] = [[row[i] for i in keep] for row in (header, *rows)]
    events = EventAccumulator(str(folder / "scalars"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if "econds" not in tag:
            found[f"scalar {tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["images"]:
        found[f"image {tag}"] = [
            (event.step, event.encoded_image_string) for event in events.Images(tag)
        ]
    found["files"] = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    return found


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two results are not identical to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        return None if same else where
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))[:4]} in one of them only"
        return next(filter(None, (difference(a[key], b[key], f"{where}/{key}") for key in a)), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} against {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (difference(x, y, f"{where}/{i}") for i, (x, y) in pairs)), None)
    same = type(a) is type(b) and (a == b or (a != a and b != b))
    return None if same else f"{where}: {str(a)[:60]} against {str(b)[:60]}"


def wait_for_save(run: Run, folder: Path, saves: int, inside: bool) -> None:
    """Return at the ``saves``-th save from now: while it is being written, or just after it."""
    target = folder / CHECKPOINT
    last: object = "none yet"
    while run.running():
        if inside:
            with contextlib.suppress(OSError):
                now = frozenset(name for name in os.listdir(folder) if ".tmp-" in name)
                if now and now != last:
                    saves -= 1
                last = now
        else:
            with contextlib.suppress(OSError):
                now = target.stat().st_ino
                saves -= now != last
                last = now
        if saves < 0:
            return
        time.sleep(0.0002)


def kill_somewhere(run: Run, folder: Path, seconds: float, draw: random.Random) -> tuple[str, bool]:
    """Kill a run at a random instant; returns where, and whether it was still running."""
    where = draw.choice(("anywhere", "in a save", "after a save"))
    if where == "anywhere":
        time.sleep(draw.uniform(0, seconds))
    else:
        wait_for_save(run, folder, draw.randrange(8), inside=where == "in a save")
    return where, run.kill()


def start_or_resume(folder: Path, kind: str, *more: object, **options: Any) -> Run:
    if (folder / CHECKPOINT).exists():
        return train(folder, kind, *more, "--resume", folder / CHECKPOINT, **options)
    return train(folder, kind, *more, **options)


def torture_kill(place: Path, kills: int, draw: random.Random) -> Count:
    """``kills`` runs, each killed one to three times and then resumed to its end."""
    count = Count("killed and resumed")
    wanted, seconds = {}, {}
    for kind in KINDS:
        straight = place / f"straight_{kind}"
        problem = train(straight, kind, "--save_minutes", 0, fresh=True).wait().success()
        if problem:
            count.check(f"the run that nobody kills, {kind}: {problem}")
            return count
        wanted[kind] = result_of(straight)
        again = place / f"again_{kind}"
        start = time.monotonic()
        train(again, kind, "--save_minutes", 0.001).wait()
        seconds[kind] = time.monotonic() - start
        count.check(difference(wanted[kind], result_of(again), f"not repeatable, {kind}"))
    places: dict[str, int] = {}
    resumed_inside = 0
    for number in range(kills):
        kind = list(KINDS)[number % len(KINDS)]
        folder = place / f"killed_{number}"
        problem = None
        for _ in range(draw.choice((1, 1, 2, 3))):
            run = start_or_resume(folder, kind, "--save_minutes", 0.001)
            where, killed = kill_somewhere(run, folder, seconds[kind], draw)
            ended = run.wait()
            if not killed:
                problem = ended.success()
                break
            places[where] = places.get(where, 0) + 1
            problem = whole(folder)
            if problem:
                break
        if problem is None:
            ended = start_or_resume(folder, kind, "--save_minutes", 0.001).wait()
            resumed_inside += ", batch " in ended.out
            problem = ended.success() or difference(wanted[kind], result_of(folder))
        count.check(problem and f"run {number} ({kind}): {problem}")
        if problem is None:
            shutil.rmtree(folder)
    count.notes.append(f"kills: {places}; resumed in the middle of an epoch: {resumed_inside}")
    return count


def whole(folder: Path) -> str | None:
    """What is wrong if a file of a killed run is only half there."""
    for path in folder.glob("*.pth.tar") if folder.is_dir() else ():
        try:
            load_checkpoint(path)
        except UserError as error:
            return f"half-written: {error}"
    return None


# ---------------------------------------------------------------------------------------------
# (b) damaged and hostile checkpoints


def hostile_files(
    good: bytes, content: dict[str, Any], evidence: Path
) -> Iterator[tuple[str, bytes]]:
    """Files that must be refused, with a name for each."""
    state = content["state_dict"]
    first = next(iter(state))

    def with_state(**changed: Any) -> bytes:
        return faults.saved({**content, "state_dict": {**state, **changed}})

    for legacy in (False, True):
        old = ", old format" if legacy else ""
        yield f"code{old}", faults.with_command(content, str(evidence), legacy)
        yield (
            f"code among the weights{old}",
            faults.saved(
                {**content, "state_dict": {**state, first: faults.Command(str(evidence))}}, legacy
            ),
        )
    for protocol in range(6):
        yield f"bare pickle {protocol}", faults.plain_pickle(str(evidence), protocol)
    yield "nan", with_state(**{first: torch.full_like(state[first], float("nan"))})
    yield "infinite", with_state(**{first: torch.full_like(state[first], float("inf"))})
    yield "wrong shape", with_state(**{first: torch.ones(3, 3)})
    yield "wrong kind", with_state(**{first: state[first].long()})
    yield "one too many", with_state(extra=torch.ones(1))
    yield (
        "one too few",
        faults.saved({**content, "state_dict": {k: v for k, v in state.items() if k != first}}),
    )
    yield (
        "other architecture",
        faults.saved({**content, "arch": {**content["arch"], "name": "resnet", "depth": 20}}),
    )
    yield "million layers", faults.saved({**content, "arch": {"name": "wrn", "depth": 10**6 + 2}})
    yield "arch of text", faults.saved({**content, "arch": "small_cnn"})
    yield "no state_dict", faults.saved({"model": state})
    yield "state_dict of text", faults.saved({"state_dict": "weights"})
    yield "a list", faults.saved([state])
    yield "a network", faults.saved(torch.nn.Linear(2, 2))
    yield "zip bomb", faults.zip_bomb(good, 100)
    yield "lying sizes", faults.lying_sizes(good)
    yield (
        "1 TB of storage",
        faults.crafted_state(faults.tensor_opcodes(storage=1 << 38, size=(1 << 38,))),
    )
    yield (
        "repeated number",
        faults.crafted_state(faults.tensor_opcodes(size=(1 << 40,), stride=(0,))),
    )
    yield "views without end", faults.many_views()
    yield "key that takes forever", faults.nested_key()
    yield "deep tuple", faults.deep_tuple()
    yield "itself inside", faults.self_containing()
    yield "empty", b""
    yield "text", b"not a checkpoint\n" * 10
    yield "noise", random.Random(0).randbytes(5000)


def torture_files(place: Path, mutations: int, draw: random.Random) -> Count:
    """Mutated and hostile files, each given to the evaluation script or to a resumed run."""
    count = Count("damaged and hostile files")
    folder = place / "files"
    train(folder, "small_cnn", "--epochs", 1, "--schedule", 1).wait()
    content = load_checkpoint(folder / CHECKPOINT)
    path, evidence = place / "mutated.pth.tar", place / "evidence"
    save_checkpoint(path, content)
    good, old = path.read_bytes(), faults.saved(content, legacy=True)
    harmless = 0

    def evaluate() -> Ended:
        flags = "--dataset folder --attack_method FGSM --num_examples 4".split()
        data = ("--data_dir", os.environ["LFR_TORTURE_DATA"])
        return Run([EVALUATE, "--model_path", path, *data, *flags]).wait()

    usual = evaluate()
    count.check(usual.success())

    def offer(name: str, may_load: bool) -> None:
        nonlocal harmless
        ended = evaluate()
        if ended.code == 0 and may_load:
            harmless += 1
            problem = None
        else:
            problem = ended.one_line(str(path))
        if evidence.exists():
            evidence.unlink()
            problem = "code was executed"
        count.check(problem and f"{name}: {problem}")

    hostile = list(hostile_files(good, content, evidence))
    for name, data in hostile:
        path.write_bytes(data)
        offer(name, may_load=False)
    for number in range(max(0, mutations - len(hostile))):
        mutate = faults.MUTATIONS[number % len(faults.MUTATIONS)]
        source = good if number % 4 else old
        path.write_bytes(mutate(source, draw))
        offer(f"{mutate.__name__} {number}", may_load=True)
        if source is good:
            with contextlib.suppress(UserError):
                loaded = load_checkpoint(path)["state_dict"]
                count.check(
                    difference(content["state_dict"], loaded, f"{mutate.__name__} believed")
                )
    path.unlink()
    for name, make in {
        "missing": lambda: None,
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "loop of links": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }.items():
        make()
        offer(name, may_load=False)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    # A run that resumes from such a file must not go on with it either.
    for name, training in {
        "training state of text": "state",
        "training state of another kind": {"progress": [1], "weights": None},
        "strange progress": {"progress": {"epoch": 0, "more": 1}, "weights": None},
        "progress of text": {"progress": {"epoch": "one"}, "weights": None},
        "weights of text": {"progress": {"epoch": 0}, "weights": "none"},
        "weights of another network": {"progress": {"epoch": 0}, "weights": {"a": torch.ones(1)}},
    }.items():
        save_checkpoint(path, {**content, "training": training})
        ended = train(place / "resumed", "small_cnn", "--resume", path).wait()
        problem = ended.one_line(str(path))
        count.check(problem and f"{name}: {problem}")
        shutil.rmtree(place / "resumed", ignore_errors=True)
    for name, optimizer in {"no optimizer": None, "optimizer of text": "SGD"}.items():
        save_checkpoint(path, {**content, "optimizer": optimizer})
        ended = train(place / "resumed", "small_cnn", "--resume", path).wait()
        problem = ended.one_line(str(path))
        count.check(problem and f"{name}: {problem}")
        shutil.rmtree(place / "resumed", ignore_errors=True)
    count.notes.append(f"{harmless} of the mutations left the file as good as it was")
    return count


# ---------------------------------------------------------------------------------------------
# (c) full disk, read-only folder, two runs in one folder


def obey_permissions() -> None:
    """Take away root's right to write where permissions forbid it."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for part in range(3):  # without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        data[part] &= ~0b110
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def small_disk(place: Path, megabytes: float) -> Iterator[Path | None]:
    """A file system of that size, or None where it cannot be mounted."""
    mount = place / "disk"
    mount.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "lfr-torture", str(mount)],
        capture_output=True,
        check=False,
    )
    try:
        yield mount if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(mount)], check=False)


def limit_files(size: int) -> Callable[[], None]:
    """No file may grow beyond ``size`` bytes: stands for a full disk where none can be made."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def intact(folder: Path, newest: bool = True) -> str | None:
    """What is wrong if the last good checkpoint is not there and whole."""
    if newest and not (folder / CHECKPOINT).exists():
        return "no checkpoint is left"
    leftovers = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    if leftovers:
        return f"left behind: {leftovers}"
    return whole(folder)


def torture_disk(place: Path) -> Count:
    """Full disks of several sizes, a folder that becomes read-only, two runs in one folder."""
    count = Count("full disk, read-only, second run")
    folder = place / "whole"
    count.check(train(folder, "small_cnn").wait().success())
    size = (folder / CHECKPOINT).stat().st_size / 2**20
    total = sum(path.stat().st_size for path in folder.rglob("*")) / 2**20
    kind_of_disk = "tmpfs"
    for share in (0.05, 0.3, 0.5, 0.7, 0.9, 0.97):
        with small_disk(place, share * total) as disk:
            if disk is None:
                kind_of_disk = "limited file size"
                break
            run = disk / "run"
            ended = train(run, "small_cnn").wait()
            saved = share * total > 3.2 * size  # best, epoch1, and then the checkpoint
            problem = ended.one_line() or intact(run, newest=saved)
            if not problem and "no space left" not in ended.err:
                problem = f"does not name the reason: {ended.err!r}"
            count.check(problem and f"disk of {share:.0%} of what is needed: {problem}")
            if saved and not problem:  # room is made, the run goes on and ends
                for path in run.glob("epoch*"):
                    path.unlink()
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=False)
                again = start_or_resume(run, "small_cnn").wait()
                wanted, found = result_of(folder), result_of(run)
                for result in (wanted, found):
                    for name in [name for name in result if name.startswith(("epoch", "files"))]:
                        del result[name]
                problem = again.success() or difference(wanted, found)
                count.check(problem and f"resumed after a full disk of {share:.0%}: {problem}")
        (place / "disk").rmdir()
    if kind_of_disk != "tmpfs":
        shutil.rmtree(place / "disk", ignore_errors=True)
        for limit in (100, 3000, int(size * 2**19)):
            run = place / f"limited_{limit}"
            ended = train(run, "small_cnn", prepare=limit_files(limit)).wait()
            problem = ended.one_line() or intact(run, newest=False)
            count.check(problem and f"files of at most {limit} bytes: {problem}")
    for saves in (0, 2, 5):
        run_folder = place / f"readonly_{saves}"
        run = train(run_folder, "small_cnn", "--save_minutes", 0.001, prepare=obey_permissions)
        wait_for_save(run, run_folder, saves, inside=False)
        run_folder.chmod(0o555)
        ended = run.wait()
        run_folder.chmod(0o755)
        problem = ended.one_line("permission denied") or intact(run_folder)
        count.check(problem and f"read-only after {saves + 1} saves: {problem}")
    locked = place / "locked"
    locked.mkdir(mode=0o555)
    ended = train(locked, "small_cnn", prepare=obey_permissions).wait()
    count.check(ended.one_line(str(locked)) or None)
    run_folder = place / "shared"
    first = train(run_folder, "small_cnn", "--save_minutes", 0.001)
    wait_for_save(first, run_folder, 0, inside=False)
    os.kill(first.pid, signal.SIGSTOP)  # it shall not end before the others have tried
    for more in ((), ("--overwrite",), ("--resume", run_folder / CHECKPOINT)):
        ended = train(run_folder, "small_cnn", *more).wait()
        problem = ended.one_line("in use", str(first.pid))
        count.check(problem and f"second run {' '.join(map(str, more))}: {problem}")
    os.kill(first.pid, signal.SIGCONT)
    problem = first.wait().success() or difference(result_of(folder), result_of(run_folder))
    count.check(problem and f"the first run, after others tried its folder: {problem}")
    ended = train(run_folder, "small_cnn").wait()
    problem = ended.one_line("holds a run", "--resume", "--overwrite")
    count.check(problem and f"a run that is there already: {problem}")
    count.notes.append(f"full disk by {kind_of_disk}")
    return count


# ---------------------------------------------------------------------------------------------
# (d) evaluation, killed at any moment


def verdicts_of(output: Path) -> dict[str, Any]:
    """What an evaluation found, without the seconds it took."""
    report = json.loads(output.read_text(encoding="utf-8"))
    found = {"clean": report["clean_accuracy"]}
    for name, entry in report["attacks"].items():
        found[name] = {key: value for key, value in entry.items() if key != "seconds"}
    return found


def torture_evaluation(place: Path, kills: int, draw: random.Random) -> Count:
    """Evaluations killed one to three times and given again."""
    count = Count("evaluations killed and resumed")
    folder = place / "trained"
    # Well enough for robust and broken images, both.
    lasting = ("--epochs", 8, "--schedule", 8, "--lr", 0.05, "--lambada", 0.005)
    problem = train(folder, "small_cnn", *lasting).wait().success()
    if problem:
        count.check(f"training: {problem}")
        return count
    attacks = ["FGSM", "PGD", "point-wise"]
    with contextlib.suppress(UserError):
        library_version()
        attacks.append("AutoAttack")
    data = ("--data_dir", os.environ["LFR_TORTURE_DATA"], "--epsilon", 0.05, "--num_examples", 16)

    def start(output: Path, batch: int, threads: int = 1) -> Run:
        flags = ["--dataset", "folder", *data, "--attack_method", *attacks]
        flags += ["--output", output, "--test_batch", batch, "--threads", threads]
        return Run([EVALUATE, "--model_path", folder / CHECKPOINT, *flags])

    straight = place / "straight.json"
    began = time.monotonic()
    count.check(start(straight, 8).wait().success())
    seconds = time.monotonic() - began
    if count.failures:
        return count
    wanted = verdicts_of(straight)
    reached = {name: wanted[name]["robust_accuracy"] for name in attacks}
    count.notes.append(f"clean {wanted['clean']:.1f} %, then {reached}; {seconds:.0f} s straight")
    resumed = 0
    for number in range(kills):
        output = place / f"killed_{number}.json"
        problem = None
        for _ in range(draw.choice((1, 2, 3))):
            run = start(output, draw.choice((3, 8, 32)))
            time.sleep(draw.uniform(0.2, 1) * seconds)
            killed = run.kill()
            ended = run.wait()
            if not killed:
                problem = ended.success()
                break
            if output.exists():  # killed after its results were written
                break
            resumed += output.with_name(f"{output.name}.partial").exists()
        if problem is None and not output.exists():
            problem = start(output, 5).wait().success()
        problem = problem or difference(wanted, verdicts_of(output))
        count.check(problem and f"evaluation {number}: {problem}")
    count.notes.append(f"gone on from a partial file: {resumed}")
    two = place / "two_threads.json"
    problem = start(two, 8, threads=2).wait().success()
    if not problem:
        moved = {name: verdicts_of(two)[name]["robust_accuracy"] for name in attacks}
        if any(abs(moved[name] - reached[name]) > 2 * 100 / 16 for name in attacks):
            problem = f"{reached} by one thread, {moved} by two"
    count.check(problem)
    return count


# ---------------------------------------------------------------------------------------------
# (e) flags


def torture_flags(examples: int) -> Count:
    """tests/test_dry_runs.py with more examples than CI has time for, each of them one fault."""
    count = Count("valid combinations of flags")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_dry_runs.py", "--hypothesis-seed=0"],
        cwd=ROOT,
        env={**os.environ, "LFR_DRY_RUNS": str(examples)},
        capture_output=True,
        text=True,
        check=False,
    )
    count.tried = examples - 1
    count.check(done.stdout[-2000:] if done.returncode else None)
    return count


# ---------------------------------------------------------------------------------------------
# (f) memory


def torture_memory(place: Path, limit: float = 0.03) -> Count:
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
            count.notes.append(
                f"{kind}: {early:.1f} MB after 200 steps, {sizes[last]:.1f} MB after {last}"
            )
            if last < 1900 or sizes[last] > (1 + limit) * early:
                problem = f"{early:.1f} MB grew to {sizes[last]:.1f} MB at step {last}"
        count.check(problem and f"{kind}: {problem}")
    return count


# ---------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="kill,files,disk,evaluation,flags,memory", help="parts, comma-separated"
    )
    parser.add_argument("--kills", type=int, default=50, help="runs to kill")
    parser.add_argument("--evaluations", type=int, default=5, help="evaluations to kill")
    parser.add_argument("--dry_runs", type=int, default=200, help="combinations of flags to try")
    parser.add_argument("--mutations", type=int, default=200, help="files to break")
    parser.add_argument("--seed", type=int, default=0, help="where and when to strike")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="lfr_torture_"))
    write_images(place / "images")
    parts: dict[str, Callable[[Path], Count]] = {
        "kill": lambda at: torture_kill(at, args.kills, random.Random(args.seed)),
        "files": lambda at: torture_files(at, args.mutations, random.Random(args.seed)),
        "disk": torture_disk,
        "evaluation": lambda at: torture_evaluation(at, args.evaluations, random.Random(args.seed)),
        "flags": lambda at: torture_flags(args.dry_runs),
        "memory": torture_memory,
    }
    counts = []
    for name in args.only.split(","):
        if name not in parts:
            parser.error(f"--only {name}: allowed are {', '.join(parts)}")
        start = time.monotonic()
        folder = place / name
        folder.mkdir()
        count = parts[name](folder)
        survived = count.tried - len(count.failures)
        seconds = time.monotonic() - start
        print(
            f"{count.name}: {count.tried} tried, {survived} survived, {seconds:.0f} s", flush=True
        )
        for note in count.notes:
            print(f"  {note}")
        counts.append(count)
    tried = sum(count.tried for count in counts)
    failed = sum(len(count.failures) for count in counts)
    print(f"all: {tried} faults tried, {tried - failed} survived")
    if failed or args.keep:
        print(f"the runs are in {place}")
    else:
        shutil.rmtree(place)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""What a run runs on: device, processes, seeds, versions, and the signals that stop it."""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of a run: the only one, unless ``torchrun`` started several."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    def log(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(line, flush=True)

    def sum(self, *values: float) -> list[float]:
        """The sums of ``values`` over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


def pick_device(gpu_id: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """The device for ``--gpu_id`` ("0" or "0,1"), and a line that says which one and why.

    Without CUDA that is Apple's MPS or the CPU. UserError: CUDA is there, that GPU is not.
    """
    ids = [int(part) for part in gpu_id.split(",")]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        for missing in (chosen for chosen in ids if chosen >= count):
            allowed = "0" if count == 1 else f"0 to {count - 1}"
            raise UserError(f"--gpu_id {gpu_id}: there is no GPU {missing}, allowed is {allowed}")
        chosen = ids[local_rank]
        torch.cuda.set_device(chosen)
        return torch.device("cuda", chosen), f"device: cuda:{chosen}"
    kind = "mps" if torch.backends.mps.is_available() else "cpu"
    threads = f", {torch.get_num_threads()} threads" if kind == "cpu" else ""
    return torch.device(kind), f"device: {kind}{threads} (no CUDA here, --gpu_id {gpu_id} not used)"


@contextmanager
def processes(gpu_id: str, threads: int = 0) -> Iterator[Processes]:
    """Set up device and process group for the duration of a run; 0 threads: PyTorch's choice.

    UserError: no such GPU; another number of GPUs than of processes.
    """
    launched = dist.is_torchelastic_launched()
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if launched else ()
    size, rank, local_rank, here = [int(os.environ[name]) for name in names] or (1, 0, 0, 1)
    if threads:
        torch.set_num_threads(threads)
    count = len(gpu_id.split(","))
    if torch.cuda.is_available() and count != here:
        start = f"torchrun --nproc_per_node={count} {sys.argv[0]} ..., or name {here} of them"
        raise UserError(f"--gpu_id {gpu_id}: one process drives one GPU; start {start}")
    device, line = pick_device(gpu_id, local_rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    _keep_freed_memory()
    # oneDNN and MKL are slow on denormal numbers, which vanishing gradients produce in masses.
    torch.set_flush_denormal(True)
    run = Processes(device, rank, size)
    run.log(line + (f", {size} processes" if size > 1 else ""))
    if size > 1:
        # A batch of AutoAttack takes hours where its images resist; the other process waits.
        week = timedelta(days=7)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=week)
    try:
        yield run
    finally:
        torch.set_flush_denormal(False)
        if size > 1:
            dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: a quarter of the time of a forward pass on MNIST.

    Else the system clears every page again when the next batch asks for it.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its arguments."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in ("torchvision", "numpy")},
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


class StopSignal:
    """Ctrl-C and what schedulers send, as a flag to read; a second signal stops at once."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # not all on Windows

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup: the run outlives its terminal
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, self._before[number])

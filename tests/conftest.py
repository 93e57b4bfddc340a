"""Fixtures shared by the tests. Data and reference files are optional: tests skip without them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models import build_model
from utils.data import ImageSet
from utils.datasets import load_dataset

ROOT = Path(__file__).resolve().parent.parent
# Small tensors are fastest on one thread, and results do not depend on the machine's cores.
# Set here, it counts for a module's fixtures as well: they run before those of a test.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Afterwards the process computes as before: what runs in it may have set either."""
    yield
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


def _optional_folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / default)
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set and {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data sets (LFR_DATA_DIR)."""
    return _optional_folder("LFR_DATA_DIR", "data")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder with the original's checkpoints (LFR_REFERENCE_DIR)."""
    return _optional_folder("LFR_REFERENCE_DIR", "reference")


@pytest.fixture(scope="session")
def mnist_test(data_dir: Path) -> ImageSet:
    """MNIST's 10,000 test images."""
    if not (data_dir / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {data_dir}")
    return load_dataset("MNIST", data_dir, train=False)


@pytest.fixture(scope="session")
def digits_train() -> ImageSet:
    return load_dataset("digits", ".", train=True)


@pytest.fixture(scope="session")
def digits_test() -> ImageSet:
    return load_dataset("digits", ".", train=False)


@pytest.fixture
def small_cnn() -> torch.nn.Module:
    """SmallCNN with a last layer that is not zero, in eval mode."""
    network = build_model("small_cnn")
    torch.nn.init.normal_(network.classifier.fc3.weight, std=0.1)
    return network.eval()


@pytest.fixture
def tiny_resnet() -> torch.nn.Module:
    """ResNet-8 on colour images, BatchNorm statistics that are not the initial ones, eval mode."""
    network = build_model("resnet", depth=8).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 32, 32))
    return network.eval()


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_script("MNIST_eval.py", "--help", timeout=60)``: a script as a user starts it.

    One thread, no CUDA, the repository as working directory unless ``cwd`` says otherwise. Several
    ``processes`` are started by torchrun.
    """

    def run(
        name: str,
        *args: object,
        timeout: float = 120,
        cwd: Path = ROOT,
        processes: int = 1,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={processes}"]
            # Processes of one machine talk over its loopback interface, with or without a network.
            environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", **environment}
        return subprocess.run(
            [*launcher, str(ROOT / name), *map(str, args)],
            cwd=cwd,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": str(ROOT),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run

"""Devices, seeds and signals."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from utils import runtime
from utils.errors import UserError, run_script
from utils.runtime import StopSignal, pick_device, versions

# What torchrun tells the second of two processes.
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, as far as PyTorch's questions go."""

    def pretend(count: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_the_gpu_asked_for(gpus):
    gpus(4)
    assert pick_device("3") == (torch.device("cuda", 3), "device: cuda:3")
    assert pick_device("2,1", local_rank=1)[0] == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("count", "asked", "allowed"), [(1, "1", "is 0"), (2, "5", "is 0 to 1"), (2, "0,2", "0 to 1")]
)
def test_a_gpu_that_is_not_there(gpus, count, asked, allowed):
    gpus(count)
    with pytest.raises(UserError, match=f"--gpu_id {asked}: there is no GPU .* {allowed}"):
        pick_device(asked)


def test_without_cuda_the_same_command_runs_and_says_where(gpus):
    gpus(0)
    device, line = pick_device("3")
    assert device.type == "cpu" and "no CUDA here, --gpu_id 3 not used" in line
    gpus(0, mps=True)
    device, line = pick_device("0,1")
    assert device.type == "mps" and "no CUDA here" in line


def test_several_gpus_need_several_processes(gpus, monkeypatch):
    gpus(2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2"), runtime.processes("0,1"):
        pass
    # Else both processes would drive GPU 0.
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(UserError, match="or name 2 of them"), runtime.processes("0"):
        pass


def test_one_process_alone(gpus, capsys):
    gpus(0)
    with runtime.processes("0") as run:
        assert run.is_main and run.sum(1.5, 2) == [1.5, 2]
        run.barrier()
        run.log("hello")
    assert capsys.readouterr().out.splitlines()[-1] == "hello"


def test_versions_are_plain_text():
    assert {"python", "torch", "numpy", "cpu"} <= versions().keys()
    assert all(type(value) is str for value in versions().values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_a_second_one_acts(number):
    before = signal.getsignal(number)
    acted = []
    signal.signal(number, lambda *_: acted.append(1))
    try:
        with StopSignal() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received == number and not acted
            os.kill(os.getpid(), number)
            assert acted
        assert signal.getsignal(number) != stop._note
    finally:
        signal.signal(number, before)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_wait_for_each_other_for_days(monkeypatch, capsys):
    """As long as the other one's batch of AutoAttack takes."""
    asked = []
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(
        runtime.dist, "init_process_group", lambda backend, timeout: asked.append(timeout)
    )
    monkeypatch.setattr(runtime.dist, "destroy_process_group", lambda: None)
    with runtime.processes("0", 1) as run:
        assert (run.size, run.rank) == (2, 1)
    assert [timeout.days >= 1 for timeout in asked] == [True]


def test_variables_of_another_launcher_do_not_count(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with runtime.processes("0", 1) as run:
        assert (run.size, run.rank) == (1, 0)


def test_a_mistake_leaves_with_one_line_and_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py"])

    def main():
        raise UserError("two\n  lines of it")

    with pytest.raises(SystemExit) as left:
        run_script(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "script.py: error: two lines of it\n"
    for code, expected in ((None, 0), (0, 0), (143, 143)):
        with pytest.raises(SystemExit) as left:
            run_script(lambda code=code: code)
        assert left.value.code == expected

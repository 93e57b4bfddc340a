"""A CUDA GPU computes what the CPU computes: make gpu, or pytest -m gpu.

A rehearsal without one, in minutes: LFR_GPU=cpu pytest -m gpu -k "not preact"
"""

import copy
import os

import pytest
import torch

from models import build_model
from utils.attacks import Budget, pgd
from utils.attacks.library import run_library
from utils.checkpoints import load_checkpoint
from utils.lfr import Ball, flatness, initial_point, inner_maximization, lfr_loss

CUDA = torch.cuda.is_available()
GPU = os.environ.get("LFR_GPU", "cuda")
needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA here")
pytestmark = [pytest.mark.gpu] + [needs_cuda] * (GPU == "cuda")
DEVICES = "cpu", GPU
NETWORKS = {"small_cnn": 1, "resnet": 3, "preact_resnet": 3}  # and their channels
SEARCHES = {
    "paper": {"search": "paper", "step_size": 0.05, "num_steps": 3},
    "fast": {"search": "fast", "step_size": 0.1, "num_steps": 2},
}
BALL = Ball("l_inf", 0.1)


@pytest.fixture(params=NETWORKS)
def case(request):
    """A network on the CPU, images, labels and noise, in float64."""
    network = build_model(request.param, depth=8).double()
    list(network.modules())[-1].reset_parameters()  # SmallCNN's would be zero
    channels = NETWORKS[request.param]
    x = torch.rand(8, channels, 28, 28, dtype=torch.float64)
    return network, x, torch.randint(10, (8,)), torch.randn_like(x)


def on(device, case, dtype=torch.float64):
    """A copy of the network there, in ``dtype`` as the images, the labels and a start."""
    network, x, y, noise = case
    network = copy.deepcopy(network).to(device, dtype)
    x, noise = x.to(device, dtype), noise.to(device, dtype)
    return network, x, y.to(device), initial_point(x, BALL, "fast", noise)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_step_and_twenty(case, search):
    """x_adv, loss and gradients of the first step, and the weights after 20."""
    found = []
    for device in DEVICES:
        network, x, y, start = on(device, case)
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01)
        for step in range(20):
            optimizer.zero_grad()
            terms = lfr_loss(network, x, y, BALL, lambada=0.02, start=start, **SEARCHES[search])
            terms.total.backward()
            if step == 0:
                gradients = [weight.grad.clone() for weight in network.parameters()]
                found.append([terms.x_adv, terms.total.detach(), *gradients])
            optimizer.step()
        found[-1] += [value.detach() for value in network.state_dict().values()]
    for cpu, cuda in zip(*found):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("search", SEARCHES)
def test_bfloat16_finds_points_as_steep(case, search):
    network, x, y, start = on(GPU, case, torch.float32)
    means = []
    for enabled in (True, False):
        with torch.autocast(GPU, torch.bfloat16, enabled=enabled):
            x_adv = inner_maximization(network.eval(), x, y, BALL, start=start, **SEARCHES[search])
        means.append(flatness(network, x_adv, y, BALL).mean().item())
    assert means[0] > 0.9 * means[1] > 0


def test_verdicts_of_pgd(case):
    network, x, y, _ = case
    y = network.eval()(x).argmax(1)  # all are right to begin with
    budget = Budget("l_inf", 0.01, 10, 0.002)
    cpu, cuda = (
        pgd(n, x, y, budget) for n, x, y, _ in (on(d, (network, x, y, x)) for d in DEVICES)
    )
    assert torch.equal(cuda.robust.cpu(), cpu.robust)
    torch.testing.assert_close(cuda.loss.cpu(), cpu.loss, rtol=1e-6, atol=1e-8)


def test_verdicts_of_autoattack(digits_train, digits_test):
    pytest.importorskip("pyautoattack")
    network = build_model("small_cnn")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for rows in torch.arange(len(digits_train)).split(50):
        x, y = digits_train.float_images(rows), digits_train.labels[rows]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    x, y, robust = digits_test.float_images(slice(16)), digits_test.labels[:16], []
    ball = Ball("l_inf", 0.05)
    for device in DEVICES:  # each draws its own random numbers
        there = copy.deepcopy(network).to(device), x.to(device), y.to(device)
        robust.append(run_library(*there, "AutoAttack", ball, queries=50).robust.cpu())
    assert (robust[0] != robust[1]).sum() <= 1 and 0 < robust[0].sum() < 16


TRAINING = "--dataset digits --search fast --probe_size 0 --max_steps 5 --resume auto"


@pytest.fixture
def train(run_script, tmp_path):
    def run(name: str, epochs: int, gpus: str = "0"):
        words = [*TRAINING.split(), "--epochs", epochs, "--gpu_id", gpus]
        words += ["--lr_schedule", "constant", "--checkpoint", tmp_path / name]
        visible = ",".join(map(str, range(torch.cuda.device_count())))
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", visible)
        options = {"processes": len(gpus.split(",")), "CUDA_VISIBLE_DEVICES": devices}
        return run_script("MNIST_defense.py", *words, timeout=600, **options)

    return run


def same_weights(*folders):
    one, two = (load_checkpoint(each / "checkpoint.pth.tar")["state_dict"] for each in folders)
    for name, weight in one.items():  # cuDNN may sum in another order each time
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_same(train, tmp_path):
    for name, epochs in (("straight", 2), ("resumed", 1), ("resumed", 2)):
        done = train(name, epochs)
        assert done.returncode == 0 and f"device: {GPU}" in done.stdout, done.stderr
    same_weights(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus_are_as_one(train, tmp_path):
    for name, gpus in (("one", "0"), ("two", "0,1")):
        done = train(name, 1, gpus)
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    same_weights(tmp_path / "one", tmp_path / "two")


@needs_cuda
def test_a_gpu_that_is_not_there(train):
    done = train("bad", 1, "99")
    assert done.returncode == 2 and "--gpu_id 99: there is no GPU 99" in done.stderr

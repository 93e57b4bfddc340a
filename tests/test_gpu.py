"""A CUDA GPU computes what the CPU computes: make gpu, or pytest -m gpu."""

import copy
import os

import pytest
import torch

from models import build_model
from utils.attacks import Budget, pgd
from utils.checkpoints import load_checkpoint
from utils.lfr import Ball, flatness, initial_point, inner_maximization, lfr_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here"),
]
DEVICES = "cpu", "cuda"
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
    network, x, y, start = on("cuda", case, torch.float32)
    means = []
    for enabled in (True, False):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
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


TRAINING = "--dataset digits --search fast --probe_size 0 --max_steps 5 --resume auto"


@pytest.fixture
def train(run_script, tmp_path):
    def run(name: str, epochs: int, gpu: int = 0):
        words = [*TRAINING.split(), "--epochs", epochs, "--gpu_id", gpu]
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        words += ["--lr_schedule", "constant", "--checkpoint", tmp_path / name]
        return run_script("MNIST_defense.py", *words, CUDA_VISIBLE_DEVICES=devices)

    return run


def test_a_resumed_run_is_the_same(train, tmp_path):
    for name, epochs in (("straight", 2), ("resumed", 1), ("resumed", 2)):
        done = train(name, epochs)
        assert done.returncode == 0 and "device: cuda:0" in done.stdout, done.stderr
    one, two = (
        load_checkpoint(tmp_path / name / "checkpoint.pth.tar")["state_dict"]
        for name in ("straight", "resumed")
    )
    for name, weight in one.items():  # cuDNN may sum in another order each time
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_a_gpu_that_is_not_there(train):
    done = train("bad", 1, gpu=99)
    assert done.returncode == 2 and "--gpu_id 99: there is no GPU 99" in done.stderr

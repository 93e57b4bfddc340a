"""The published networks outside of this repository: torch.hub and what people attack with."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from utils.attacks import family, gradient_budget, misclassified, pgd

NAMES = {"mnist_lfr": (1, 28), "mnist_undefended": (1, 28), "cifar10_lfr": (3, 32)}


@pytest.fixture(scope="module")
def hub(root):
    return {name: torch.hub.load(str(root), name, source="local") for name in NAMES}


@pytest.fixture(scope="module")
def hundred(mnist_test):
    data = mnist_test.head(100)
    return data.float_images(), data.labels


@pytest.fixture(scope="module")
def robust(hub, hundred):
    """Which images our PGD leaves right."""
    x, y = hundred
    return pgd(hub["mnist_lfr"], x, y, gradient_budget("PGD", family("MNIST", 1))).robust


@pytest.mark.parametrize("name", NAMES)
def test_logits_for_images(hub, name):
    channels, side = NAMES[name]
    network = hub[name]
    assert not network.training and not any(m.training for m in network.modules())
    logits = network(torch.rand(2, channels, side, side))
    assert logits.shape == (2, 10) and bool((logits < 0).any())


def test_beside_modules_of_the_same_names(root, tmp_path):
    """A project with a utils.py and a models.py of its own."""
    for name in ("utils", "models"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    code = (
        "import models, torch, utils\n"
        f"network = torch.hub.load({str(root)!r}, 'mnist_lfr', source='local')\n"
        "assert models.MINE and utils.MINE and network(torch.rand(1, 1, 28, 28)).shape == (1, 10)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_accuracy_as_robustbench_measures_it(hub, hundred):
    x, y = hundred
    with torch.no_grad():
        assert (hub["mnist_lfr"](x).max(1)[1] == y).float().mean() >= 0.99


def test_foolbox(hub, hundred, robust):
    foolbox = pytest.importorskip("foolbox")
    x, y = hundred
    model = foolbox.PyTorchModel(hub["mnist_lfr"], bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.01, steps=40)
    _, _, success = attack(model, x, y, epsilons=0.3)
    assert abs(int((~success).sum()) - int(robust.sum())) <= 1


def test_art(hub, hundred, robust):
    art = pytest.importorskip("art.estimators.classification")
    evasion = pytest.importorskip("art.attacks.evasion")
    x, y = hundred
    loss = torch.nn.CrossEntropyLoss()
    classifier = art.PyTorchClassifier(
        hub["mnist_lfr"], loss, (1, 28, 28), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = evasion.ProjectedGradientDescent(
        classifier, eps=0.3, eps_step=0.01, max_iter=40, num_random_init=1, verbose=False
    )
    np.random.seed(0)  # noqa: NPY002 (ART's)
    answers = classifier.predict(attack.generate(x.numpy(), y.numpy())).argmax(1)
    assert abs(int((answers == y.numpy()).sum()) - int(robust.sum())) <= 1


def test_pyautoattack(hub, hundred):
    auto = pytest.importorskip("pyautoattack")
    x, y = hundred[0][:10], hundred[1][:10]
    attack = auto.AutoAttack(hub["mnist_lfr"], norm="Linf", eps=0.3, device="cpu")
    attack.attacks_to_run = ["apgd-ce"]
    moved, _ = attack.run_standard_evaluation(x, y, batch_size=10)
    assert float((moved - x).abs().max()) <= 0.3 + 1e-6
    assert int((~misclassified(hub["mnist_lfr"], moved, y)).sum()) >= 9


@pytest.mark.parametrize("name", ["mnist_lfr", "cifar10_lfr"])
def test_onnx(hub, name, tmp_path):
    """onnxruntime answers as PyTorch does, for any batch size."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    channels, side = NAMES[name]
    x = torch.rand(5, channels, side, side)
    path = str(tmp_path / "network.onnx")
    torch.onnx.export(
        hub[name], x[:1], path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}
    )
    (answer,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(answer), hub[name](x).detach(), rtol=1e-3, atol=1e-4
    )

"""The method taken along: `utils/lfr` copied or installed as `lfr`, used on a network of others."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Run where nothing of the repository can be imported: training steps of torchvision's ResNet-18 by
# lfr_loss and, on a twin, by plain double backward. Prints what was imported, and how far apart
# losses and weights are.
PROGRAM = """
import json, sys
before = set(sys.modules)
import torch
with_torch = set(sys.modules)
from lfr import Ball, lfr_loss
imported = sorted(set(sys.modules) - with_torch)

import copy
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, ResNet

torch.set_num_threads(1)
torch.manual_seed(0)


class Narrow(ResNet):  # torchvision's ResNet-18 with an eighth of its channels
    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


ours = Narrow(BasicBlock, [2, 2, 2, 2])
ours.fc = torch.nn.Linear(64, 5)
ours.double().train()
plain = copy.deepcopy(ours)


def eval_norms(network, training):
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(training)


def gradient_norms(network, x, y):
    loss = F.cross_entropy(network(x), y, reduction="sum")
    return torch.autograd.grad(loss, x, create_graph=True)[0].abs().sum((1, 2, 3))


def plain_loss(network, x, y, start):  # the whole step by the running statistics
    eval_norms(network, False)
    natural = F.cross_entropy(network(x), y)
    x_adv = start
    for _ in range(2):
        x_adv = x_adv.detach().requires_grad_()
        step = torch.autograd.grad(gradient_norms(network, x_adv, y).sum(), x_adv)[0].sign()
        x_adv = (x_adv + 0.02 * step).clamp(x - 0.03, x + 0.03).clamp(0, 1)
    penalty = gradient_norms(network, x_adv.detach().requires_grad_(), y).mean()
    total = natural + 0.05 * penalty
    total.backward()
    eval_norms(network, True)
    with torch.no_grad():
        network(x)
    return total


optimizers = [torch.optim.SGD(n.parameters(), 0.01, momentum=0.9) for n in (ours, plain)]
losses = 0.0
for _ in range(int(sys.argv[1])):
    x, y = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.randint(0, 5, (4,))
    start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    for optimizer in optimizers:
        optimizer.zero_grad()
    found = lfr_loss(
        ours, x, y, Ball("l_inf", 0.03), step_size=0.02, num_steps=2, lambada=0.05,
        bn_mode="running", start=start,
    ).total
    found.backward()
    expected = plain_loss(plain, x, y, start)
    for optimizer in optimizers:
        optimizer.step()
    losses = max(losses, float((found - expected).abs().detach() / expected.detach()))
weights = max(
    float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values())
    if a.is_floating_point()
)
print(json.dumps({"imported": imported, "losses": losses, "weights": weights}))
"""


def train(folder: Path, steps: int) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (folder / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(steps)], cwd=folder / "elsewhere", env=environment,
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(report: dict) -> None:
    """Nothing but the package itself and the standard library came with it, and it is right."""
    foreign = [name for name in report["imported"] if name.split(".")[0] != "lfr"]
    roots = {name.split(".")[0] for name in foreign}
    assert "lfr.loss" in report["imported"]
    assert roots <= set(sys.stdlib_module_names) | {"torch"}
    assert report["losses"] < 1e-9 and report["weights"] < 1e-9


def test_copied_into_an_empty_folder(root, tmp_path):
    shutil.copytree(root / "utils" / "lfr", tmp_path / "lfr")
    check(train(tmp_path, steps=20))


def test_installed_by_pip(root, tmp_path):
    """`pip install .`: the package `lfr`, nothing else, and torch as its only requirement."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, and the test downloads nothing")
    source, target = tmp_path / "source", tmp_path / "target"  # builds leave files in the source
    shutil.copytree(root / "utils" / "lfr", source / "utils" / "lfr")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *options, str(source)],
        check=True, timeout=300,
    )  # fmt: skip
    (metadata,) = target.glob("*.dist-info/METADATA")
    required = [line for line in metadata.read_text().splitlines() if "Requires-Dist" in line]
    assert required == ["Requires-Dist: torch"]
    assert {path.name for path in target.iterdir()} == {"lfr", metadata.parent.name}
    check(train(target, steps=2))


def test_the_repository_s_own_import_is_the_same_package(root):
    """Relative imports only: no line names the repository's packages."""
    for path in (root / "utils" / "lfr").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                first = line.split()[1].split(".")[0]
                assert first in ("", "torch", *sys.stdlib_module_names), line


def test_the_code_of_the_page_runs(root, monkeypatch, capsys):
    """docs/use_it.md, block by block, each with what the ones before have defined."""
    from utils import lfr

    monkeypatch.chdir(root)
    monkeypatch.setitem(sys.modules, "lfr", lfr)
    page = (root / "docs" / "use_it.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {"network": torch.nn.Identity()}
    for block in blocks[:-1]:
        exec(block, names)
    assert capsys.readouterr().out.startswith("natural 2.") and names["logits"].shape == (1, 10)
    assert names["my_network"]().fc.out_features == 10
    # The last one evaluates `network`, by now the published one, on images of ours.
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    network = names["network"].to(memory_format=torch.channels_last)
    wrong = (network(images.float()).argmax(1) + 1) % 10
    exec(blocks[-1], {"network": network, "images": images, "labels": wrong})
    found, _, _, *rows = capsys.readouterr().out.splitlines()
    assert found == "0.0 0.0" and [row.split()[0] for row in rows[-2:]] == ["PGD", "AutoAttack"]

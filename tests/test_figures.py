"""tools/figures.py: every figure is drawn, of the right things, and says what is wrong."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models import build_model
from tests.helpers import save_checkpoint
from tools import figures
from utils.datasets import load_dataset
from utils.errors import UserError
from utils.networks import load_network
from utils.training import COLUMNS

pytest.importorskip("matplotlib")


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """``draw("curves", ...)``: the command line; gives the picture as [height, width, 3]."""

    def run(*words: object) -> np.ndarray:
        output = tmp_path / "picture.png"
        output.unlink(missing_ok=True)
        line = ["figures.py", *map(str, words), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", line)
        assert figures.main() == 0
        with Image.open(io.BytesIO(output.read_bytes())) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert abs(pixels.shape[1] - 1600) <= 1 and 300 < pixels.shape[0] < 1600
        assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()  # nothing cut off
        assert len(np.unique(pixels @ np.array([1, 256, 65536]))) > 50
        return pixels

    return run


def write_log(folder, epochs: int = 3, robust: bool = True):
    folder.mkdir(parents=True)
    names = COLUMNS[:7] + (("Test Robust Acc.", "Seconds") if robust else ())
    rows = ["\t".join(names)]
    for epoch in range(1, epochs + 1):
        values = [0.1, 1 / epoch, 1 / epoch, 90 + epoch, 89 + epoch, 1 / epoch, 50 / epoch**3]
        rows.append("\t".join(map(str, values + ([20 * epoch, 9.0] if robust else []))))
    (folder / "log.txt").write_text("\n".join(rows) + "\n")
    return folder / "log.txt"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Flags of two networks for digits that nobody has trained, and one for colours."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(1)
    for name, options in {"a": {}, "b": {}, "colour": {"in_channels": 3, "image_size": 32}}.items():
        network = build_model("small_cnn", **options)
        nn.init.normal_(network.classifier.fc3.weight, std=0.1)
        state = {"state_dict": network.state_dict(), "arch": network.arch, "epoch": 1}
        save_checkpoint(folder / name, state)
    return ["--model", folder / "a", "--undefended", folder / "b", "--dataset", "digits"]


def test_curves(draw, tmp_path):
    """One run; and several, one of which has a single epoch and no robust accuracy."""
    logs = [write_log(tmp_path / "a"), write_log(tmp_path / "b", 1, False)]
    one = draw("curves", logs[0].parent)
    several = draw("curves", *logs)
    assert one.shape == several.shape and (one != several).any()


def test_surface(draw, pair):
    draw("surface", *pair, "--num_examples", 1, "--points", 3)


def test_gradients(draw, pair):
    draw("gradients", *pair, "--num_examples", 3)


def test_radius_is_measured_once_and_drawn_again(draw, pair, tmp_path, monkeypatch):
    kept = tmp_path / "radius.json"
    words = ["--json", kept, "--dataset", "digits", "--num_examples", 8]
    (run := tmp_path / "run").mkdir()
    (run / "model_best.pth.tar").write_bytes(pair[1].read_bytes())
    first = draw("radius", "--model", f"one={run}", *words, "--epsilons", 0.4, 0.001)
    found = json.loads(kept.read_text())
    assert found["epsilons"] == [0, 0.001, 0.4] and found["num_examples"] == 8
    data = load_dataset("digits", ".", train=False).head(8)
    network, _ = load_network(pair[1])
    clean = (network(data.float_images()).argmax(1) == data.labels).float().mean()
    accuracies = found["networks"]["one"]["robust_accuracy"]
    assert accuracies[0] == 100 * clean and accuracies == sorted(accuracies, reverse=True)
    monkeypatch.setattr(figures, "pgd", None)
    assert (draw("radius", "--json", kept) == first).all()


def test_networks_and_radii_that_make_no_chart(draw, pair, tmp_path, capsys):
    words = ["radius", "--json", tmp_path / "radius.json", "--dataset", "digits"]
    words += ["--model", f"a={pair[1]}"]
    with pytest.raises(SystemExit):
        draw(*words, "--epsilons", 8)
    assert "--epsilons: got '8', allowed is a finite number" in capsys.readouterr().err
    with pytest.raises(UserError, match="two networks of one name"):
        draw(*words, f"a={pair[1]}")
    torch.save(load_network(pair[1])[0].state_dict(), bare := tmp_path / "bare.pth")
    draw(*words, f"bare={bare}", "--num_examples", 2)
    assert f"note: {bare}: its activation is not stated, relu is taken\n" in capsys.readouterr().err
    (tmp_path / "radius.json").unlink()
    with pytest.raises(UserError, match="a network for 3 channels, dataset digits has 1"):
        draw(*words[:-1], f"a={pair[1].with_name('colour')}")
    (tmp_path / "radius.json").write_text("{}")
    with pytest.raises(UserError, match="no networks in it"):
        draw(*words)
    assert (tmp_path / "radius.json").read_text() == "{}"
    with pytest.raises(UserError, match="no networks in it"):
        draw("radius", "--json", tmp_path / "radius.json")


def test_radius_uses_the_attack_of_the_evaluation(draw, pair, tmp_path, monkeypatch):
    robust = {0.1: [True, True], 0.2: [True, False], 0.4: [True, True]}
    budgets = []

    def pretend(network, x, y, budget):
        budgets.append(budget)
        return SimpleNamespace(robust=torch.tensor(robust[budget.epsilon]))

    monkeypatch.setattr(figures, "pgd", pretend)
    monkeypatch.setattr(figures, "misclassified", lambda network, x, y: torch.zeros(2).bool())
    words = ["--json", tmp_path / "radius.json", "--dataset", "digits", "--num_examples", 2]
    draw("radius", "--model", f"one={pair[1]}", *words, "--epsilons", 0.4, 0.1, 0.2)
    found = json.loads((tmp_path / "radius.json").read_text())
    # A point of a small ball lies in every larger one.
    assert found["networks"]["one"]["robust_accuracy"] == [100, 100, 50, 50]
    assert [budget.num_steps for budget in budgets] == [40] * 3
    assert [budget.step_size for budget in budgets] == pytest.approx([0.1 / 30, 0.2 / 30, 0.4 / 30])


def test_cost(draw, tmp_path):
    runs = {f"at_{seed}": {"robust": [seed, 2 * seed, 3 * seed]} for seed in (10, 20)}
    runs["none_10"] = {"robust": [0.0]}
    rows = {"at": {"runs": {"10": "at_10", "20": "at_20"}}, "none": {"runs": {"10": "none_10"}}}
    report = tmp_path / "table.json"
    report.write_text(json.dumps({"dataset": "digits", "minutes": 6, "runs": runs, "rows": rows}))
    rows_alone = draw("cost", report)
    runs["trades_10"] = {"robust": [50.0, 60.0]}
    report.write_text(json.dumps({"dataset": "digits", "minutes": 6, "runs": runs, "rows": rows}))
    assert (draw("cost", report) == rows_alone).all()
    assert (draw("cost", report, "--runs", "trades=trades_*") != rows_alone).any()
    for wrong in ("at=gone", "at", "at=*_10"):
        with pytest.raises(UserError, match=r"table\.json: at=.* runs of one length"):
            draw("cost", report, "--runs", wrong)


def test_the_surface_is_that_of_the_loss():
    """Of a linear network, whose gradient's sign is known; no point leaves the ball."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    signs = torch.ones_like(x)
    offsets = torch.linspace(-0.2, 0.2, 5)
    surface = figures.loss_surface(network, x, y, signs, offsets)
    assert surface.shape == (5, 5)
    torch.testing.assert_close(surface[2, 2], F.cross_entropy(network(x), y))
    assert (surface[1:, 2] > surface[:-1, 2]).all()
    weight = network[1].weight
    steepest = torch.stack([weight[1] - weight[0], weight[0] - weight[1]]).sign().view_as(x)
    # Where both signs agree the corner would be 0.4 away.
    corner = (0.2 * steepest + 0.2 * signs).clamp(-0.2, 0.2)
    torch.testing.assert_close(surface[4, 4], F.cross_entropy(network(x + corner), y))


def test_mistakes_are_one_line(draw, pair, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{")
    colour = ["--model", pair[1].with_name("colour"), *pair[2:]]
    for words, message in (
        (["curves", tmp_path / "gone"], "no such file"),
        (["curves", other], "not the log of a run"),
        (["curves", write_log(tmp_path / "empty", epochs=0)], "no epoch in it"),
        (["surface", *colour], "a network for 3 channels, dataset digits has 1"),
        (["radius", "--json", other], "other.json"),
        (["radius", "--json", tmp_path / "gone.json"], "(?i)no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            draw(*words)
        assert "\n" not in str(caught.value)

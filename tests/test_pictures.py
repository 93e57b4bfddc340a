"""tools/pictures.py: every picture is drawn, of the right things, and says what is wrong."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models import build_model
from tools import pictures
from utils.errors import UserError
from utils.runs import LOG_COLUMNS, save_checkpoint

pytest.importorskip("matplotlib")

EXTRA = ("Test Robust Acc.", "Seconds")


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """``draw("curves", ...)``: the command line; gives the picture as [height, width, 3]."""

    def run(*words: object) -> np.ndarray:
        output = tmp_path / "picture.png"
        output.unlink(missing_ok=True)
        line = ["pictures.py", *map(str, words), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", line)
        assert pictures.main() == 0
        data = output.read_bytes()
        assert 10_000 < len(data) < 2_000_000
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert abs(pixels.shape[1] - 1600) <= 1 and 300 < pixels.shape[0] < 1600
        assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()  # nothing cut off
        colours = pixels @ np.array([1, 256, 65536])
        assert len(np.unique(colours)) > 50
        return pixels

    yield run
    torch.set_flush_denormal(False)


def write_log(folder, epochs: int = 3, robust: bool = True, settings: bool = True):
    folder.mkdir(parents=True)
    names = LOG_COLUMNS + (EXTRA if robust else ())
    rows = ["\t".join(names)]
    for epoch in range(1, epochs + 1):
        values = [0.1, 1 / epoch, 1 / epoch, 90 + epoch, 89 + epoch, 1 / epoch, 50 / epoch**3]
        rows.append("\t".join(map(str, values + ([20 * epoch, 9.0] if robust else []))))
    (folder / "log.txt").write_text("\n".join(rows) + "\n")
    if settings:
        flags = {"probe_steps": 10, "probe_size": 500, "epsilon": 0.3}
        (folder / "args.json").write_text(json.dumps({"arguments": flags}))
    return folder / "log.txt"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Checkpoints of two networks for digits that nobody has trained, and of one for colours."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(1)
    for name, options in {"a": {}, "b": {}, "colour": {"in_channels": 3, "image_size": 32}}.items():
        network = build_model("small_cnn", **options)
        nn.init.normal_(network.classifier.fc3.weight, std=0.1)
        save_checkpoint(folder / name, {"state_dict": network.state_dict(), "arch": network.arch})
    return folder


# -- every picture ------------------------------------------------------------------------------


def test_curves_of_one_run(draw, tmp_path):
    draw("curves", write_log(tmp_path / "run"), "--rate")


def test_curves_of_several_runs(draw, tmp_path):
    """One has a single epoch, and like the original's logs no robust accuracy, no settings."""
    logs = [write_log(tmp_path / "a" / "run"), write_log(tmp_path / "b" / "run", 1, False, False)]
    runs = pictures.read_runs([str(logs[0]), str(logs[1].parent)])
    assert [run.label for run in runs] == ["a/run", "b/run"]
    assert [bool(run.column("Test Robust Acc.")) for run in runs] == [True, False]
    assert ["PGD-10" in run.attack for run in runs] == [True, False]
    draw("curves", *logs)


def test_surface(draw, networks):
    pair = ["--model", networks / "a", "--undefended", networks / "b", "--dataset", "digits"]
    pixels = draw("surface", *pair, "--num_examples", 1, "--points", 3, "--threads", 1)
    assert pixels.std() > 5


def test_gradients(draw, networks):
    pair = ["--model", networks / "a", "--undefended", networks / "b", "--dataset", "digits"]
    draw("gradients", *pair, "--num_examples", 3, "--threads", 1)


def test_radius_is_measured_once_and_drawn_again(draw, networks, tmp_path, capsys):
    kept = tmp_path / "radius.json"
    first = draw(
        *("radius", "--model", f"one={networks / 'a'}", "--dataset", "digits", "--json", kept),
        *("--num_examples", 8, "--epsilons", 0.3, 0, "--threads", 1),
    )
    found = json.loads(kept.read_text())
    assert found["epsilons"] == [0, 0.3] and found["num_examples"] == 8
    clean, robust = found["networks"]["one"]["robust_accuracy"]
    assert 0 <= robust <= clean <= 100
    assert str(tmp_path) not in kept.read_text()
    assert f"one: {clean:6.2f} % at epsilon 0" in capsys.readouterr().out
    assert (draw("radius", "--json", kept) == first).all()

    # Another network beside it, and the first is not measured again.
    words = ("radius", "--model", f"two={networks / 'b'}", "--dataset", "digits", "--json", kept)
    words += ("--threads", 1, "--keep", "one", "--num_examples")
    for count, more, message in (
        (8, ["three"], "'three': allowed is a network of"),
        (7, [], "measured with num_examples 8, not 7"),
    ):
        with pytest.raises(UserError, match=message):
            draw(*words[:-1], *more, "--num_examples", count, "--epsilons", 0.3, 0)
    draw(*words, 8, "--epsilons", 0.3, 0)
    both = json.loads(kept.read_text())
    assert list(both["networks"]) == ["two", "one"]
    assert both["networks"]["one"] == found["networks"]["one"]
    assert "one:" not in capsys.readouterr().out


# -- what is drawn ------------------------------------------------------------------------------


def test_the_surface_is_that_of_the_loss():
    """Of a linear network, whose gradient's sign is known; no point leaves the ball."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    signs = torch.ones_like(x)
    offsets = torch.linspace(-0.2, 0.2, 5)
    surface = pictures.loss_surface(network, x, y, signs, offsets)
    assert surface.shape == (5, 5)
    torch.testing.assert_close(surface[2, 2], F.cross_entropy(network(x), y))
    assert (surface[1:, 2] > surface[:-1, 2]).all()
    weight = network[1].weight
    steepest = torch.stack([weight[1] - weight[0], weight[0] - weight[1]]).sign().view_as(x)
    # Where both signs agree the corner would be 0.4 away.
    corner = (0.2 * steepest + 0.2 * signs).clamp(-0.2, 0.2)
    torch.testing.assert_close(surface[4, 4], F.cross_entropy(network(x + corner), y))


def test_accuracy_by_epsilon_falls(digits_test):
    """Once broken is broken in every larger ball; what is right nowhere is not attacked."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    data = digits_test.head(24)
    epsilons = [0, 0.0005, 0.002, 0.3]
    found = list(pictures.accuracy_by_epsilon(network, data, epsilons, dataset="digits", batch=10))
    clean = (network(data.float_images()).argmax(1) == data.labels).float().mean()
    assert found[0] == pytest.approx(100 * float(clean))
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] == 0


@pytest.mark.parametrize("heights", [[0.5], [0.9, 0.91, 0.3], [0.0, 0.0, 0.0, 0.2], [1.0, 0.1]])
def test_labels_are_moved_apart(heights):
    moved = pictures.spread(heights, 0.1)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(moved)[order]) > 0.1 - 1e-9).all()
    assert sum(moved) == pytest.approx(sum(heights))
    apart = np.diff(np.sort(heights))
    if (apart > 0.1).all():
        assert moved == pytest.approx(heights)


# -- mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_one_line(draw, networks, tmp_path):
    empty = write_log(tmp_path / "empty", epochs=0)
    other = tmp_path / "other.json"
    other.write_text('{"networks": {}, "epsilons": []}')
    digits = ["--dataset", "digits", "--threads", 1]
    model = ["--model", networks / "colour", "--undefended", networks / "a"]
    for words, message in (
        (["curves", tmp_path / "gone"], "no such file"),
        (["curves", other], "not the log of a run"),
        (["curves", empty], "no epoch in it yet"),
        (["curves", empty, empty, "--rate"], "--rate is for one log"),
        (["surface", *model, *digits], "is a network for 3 channels, digits has 1"),
        (["radius"], "needs --model NAME=FILE"),
        (["radius", "--json", other], "not a file that"),
        (["radius", "--json", tmp_path / "gone.json"], "no such file"),
        (["radius", "--json", tmp_path / "no" / "x.json"], "there is no folder"),
        (["radius", "--model", "a=x", "a=y", *digits], "one network only"),
        (["radius", "--model", "a=x", "--keep", "b"], "--keep needs"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            draw(*words)
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit):
        draw("radius", "--model", "no name")


def test_matplotlib_is_left_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with pictures.house_style():
        assert matplotlib.rcParams["axes.titleweight"] == "bold"
    assert dict(matplotlib.rcParams) == before
    assert math.isclose(pictures.WIDTH * pictures.DPI, 1600)

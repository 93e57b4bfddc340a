"""The evaluation scripts: counting, resuming, processes, sanity checks, wrong input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import MNIST_eval
from models import build_model
from tests.helpers import save_checkpoint
from utils import evaluation
from utils.attacks import Budget
from utils.attacks.budgets import GREY
from utils.attacks.library import CHUNK, Verdicts, run_library
from utils.attacks.masking import masking_checks
from utils.checkpoints import load_checkpoint
from utils.data import fingerprint, split_validation
from utils.datasets import load_dataset
from utils.errors import UserError
from utils.lfr import Ball
from utils.verdict_store import VerdictStore


@pytest.fixture(scope="module")
def digits_network():
    """A SmallCNN that has seen the digits for a few seconds: mostly right, not at all robust."""
    torch.manual_seed(0)
    network = build_model("small_cnn")
    data = load_dataset("digits", ".", train=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.004)
    for step in range(30):
        rows = torch.arange(32 * step, 32 * step + 32) % len(data)
        loss = nn.functional.cross_entropy(network(data.float_images(rows)), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(digits_network, tmp_path_factory):
    """The same network as a checkpoint file."""
    path = tmp_path_factory.mktemp("run") / "model_best.pth.tar"
    save_checkpoint(
        path,
        {"epoch": 1, "state_dict": digits_network.state_dict(), "arch": digits_network.arch},
    )
    return path


def evaluate(checkpoint, *flags):
    """MNIST_eval.py on the digits, in this process."""
    given = ["--model_path", str(checkpoint), "--dataset", "digits", "--num_examples", "24"]
    return start(*given, *flags)


def start(*flags):
    """MNIST_eval.py in this process."""
    return evaluation.run_evaluation(MNIST_eval.DEFAULTS, "", list(map(str, flags)))


def attacks_of(path):
    return {
        name: {key: value for key, value in entry.items() if key not in ("seconds", "notes")}
        for name, entry in json.loads(path.read_text())["attacks"].items()
    }


# ---------------------------------------------------------------------------------------------
# Results


def test_table_and_json_say_what_was_found(checkpoint, tmp_path, capsys, monkeypatch):
    one_start = GREY._replace(pointwise_starts=1)
    monkeypatch.setattr(evaluation, "family", lambda dataset, channels: one_start)
    output = tmp_path / "results.json"
    names = ["fgsm", "PGD", "MPGD", "jsma", "DDNL2", "pointwise"]
    flags = ["--attack_method", *names, "--num_examples", 5]
    assert evaluate(checkpoint, *flags, "--output", output) == 0
    report = json.loads(output.read_text())
    assert list(report["attacks"]) == ["FGSM", "PGD", "MPGD", "JSMA", "DDNL2", "point-wise"]
    assert report["num_examples"] == 5
    assert report["dataset"] == "digits"
    assert len(report["checkpoint_sha256"]) == 64
    assert "torch" in report["versions"]
    for name, entry in report["attacks"].items():
        assert 0 <= entry["robust_accuracy"] <= entry["clean_accuracy"] == report["clean_accuracy"]
        assert entry["seconds"] >= 0
        assert entry["versions"] == report["versions"]
        if name in ("JSMA", "DDNL2", "point-wise"):
            assert 0 <= entry["success_rate"] <= 100
            assert entry["budget"]["radius"] > 0
            assert entry["median_l0"] >= 1
            assert entry["accuracy_at_any_distance"] <= entry["robust_accuracy"]
    assert report["attacks"]["PGD"]["budget"]["step_size"] == 0.01
    printed = capsys.readouterr().out
    table = printed[printed.index("attack  ") :].splitlines()
    assert [line.split()[0] for line in table[2:8]] == list(report["attacks"])
    assert not list(tmp_path.glob("*.partial"))


def test_robust_accuracy_is_counted_over_all_images(checkpoint, digits_network, tmp_path):
    output = tmp_path / "results.json"
    assert evaluate(checkpoint, "--attack_method", "DDNL2", "--output", output) == 0
    data = load_dataset("digits", ".", train=False).head(24)
    with torch.no_grad():
        right = digits_network(data.float_images()).argmax(1) == data.labels
    entry = json.loads(output.read_text())["attacks"]["DDNL2"]
    assert entry["clean_accuracy"] == pytest.approx(100 * int(right.sum()) / 24)


def test_results_do_not_depend_on_the_batch(checkpoint, tmp_path):
    flags = ["--attack_method", "PGD", "DDNL2", "--num_steps", 5, "--epsilon", 0.1]
    found = []
    for batch in (5, 200):
        output = tmp_path / f"{batch}.json"
        assert evaluate(checkpoint, *flags, "--test_batch", batch, "--output", output) == 0
        found.append(attacks_of(output))
    assert found[0] == found[1]


def two_processes(checkpoint, flags, script="MNIST_eval.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=29541", script, "--model_path", checkpoint]
    done = subprocess.run(
        list(map(str, [*command, "--dataset", "digits", "--num_examples", 24, *flags])),
        cwd=(root := Path(MNIST_eval.__file__).parent),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_find_what_one_finds(checkpoint, tmp_path):
    flags = ["--attack_method", "FGSM", "PGD", "--num_steps", 4, "--test_batch", 5]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert evaluate(checkpoint, *flags, "--output", one) == 0
    printed = two_processes(checkpoint, [*flags, "--output", two])
    assert attacks_of(one) == attacks_of(two)
    assert printed.count("clean accuracy") == 1


def test_a_warning_of_any_process_is_in_the_report(checkpoint, tmp_path):
    script, report = tmp_path / "warned.py", tmp_path / "report.json"
    script.write_text("""
from types import SimpleNamespace
import MNIST_eval
from utils import evaluation

def pgd(network, x, y, budget, index, seed):
    return SimpleNamespace(x_adv=x, robust=y >= 0, warnings=[f"{i} odd" for i in index if i == 7])

evaluation.pgd = pgd
MNIST_eval.main()
""")
    two_processes(checkpoint, ["--test_batch", 5, "--output", report], script)
    assert json.loads(report.read_text())["attacks"]["PGD"]["notes"] == ["7 odd"]


# ---------------------------------------------------------------------------------------------
# Resuming


def test_a_stopped_evaluation_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch, capsys):
    flags = ["--attack_method", "FGSM", "PGD", "--num_steps", 4, "--test_batch", 8]
    straight, output = tmp_path / "straight.json", tmp_path / "results.json"
    assert evaluate(checkpoint, *flags, "--output", straight) == 0

    plain, looked = evaluation.pgd, []

    def stopped(network, x, y, budget, **options):
        looked.extend((budget.num_steps, row) for row in options["index"].tolist())
        if len(looked) > 30:  # in the second attack
            raise KeyboardInterrupt
        return plain(network, x, y, budget, **options)

    monkeypatch.setattr(evaluation, "pgd", stopped)
    assert evaluate(checkpoint, *flags, "--output", output) == 130
    assert "continues from" in capsys.readouterr().out
    assert not output.exists()
    finished = set(looked[:-8])
    looked.clear()
    monkeypatch.setattr(
        evaluation,
        "pgd",
        lambda *a, **k: (
            looked.extend((k["budget"].num_steps, r) for r in k["index"].tolist()) or plain(*a, **k)
        ),
    )
    assert evaluate(checkpoint, *flags, "--output", output) == 0
    assert not finished & set(looked)
    assert attacks_of(output) == attacks_of(straight)
    assert not output.with_name("results.json.partial").exists()


def test_the_store_knows_its_own(tmp_path):
    output, identity = tmp_path / "results.json", {"seed": 0}
    store = VerdictStore(output, identity)
    values = {"robust": [1.0, 0.0], "l2": [0.5, float("inf")]}
    store.add(attack="PGD", rows=[1, 3], values=values, seconds=2.0)
    with pytest.raises(UserError, match="written by another"):
        VerdictStore(output, identity)
    assert VerdictStore(output, identity, write=False).lines("PGD")[0]["seconds"] == 2
    store.close()
    with open(f"{output}.partial", "ab") as file:
        file.write(b'{"attack": "PGD", "rows": [0')  # a kill in the middle of a line
    store = VerdictStore(output, identity)
    (again,) = store.lines("PGD")
    assert (again["rows"], again["values"]) == ([1, 3], values)
    assert store.lines("MPGD") == []
    store.add(attack="PGD", rows=[0], values={name: [1.0] for name in values}, seconds=1.0)
    store.close()
    lines = VerdictStore(output, identity).lines("PGD")
    assert [line["seconds"] for line in lines] == [2, 1]


def test_a_kill_in_the_first_line_costs_nothing(tmp_path):
    (tmp_path / "results.json.partial").write_bytes(b'{"se')
    store = VerdictStore(tmp_path / "results.json", {"seed": 0})
    store.add(attack="PGD", rows=[1], seconds=1.0)
    assert len(store.lines("PGD")) == 1
    store.close()


@pytest.mark.parametrize("content", [b"x", b"{\n", b"[]\n", b'{"seed": 1}\n', b"\x80\n"])
def test_the_store_refuses_what_is_not_its_own(tmp_path, content):
    output = tmp_path / "results.json"
    partial = output.with_name("results.json.partial")
    partial.write_bytes(content)
    with pytest.raises(UserError, match=r"results\.json\.partial"):
        VerdictStore(output, {"seed": 0})
    assert partial.read_bytes() == content


def test_a_report_is_continued(checkpoint, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert evaluate(checkpoint, "--attack_method", "FGSM", "--output", output) == 0
    first = json.loads(output.read_text())["attacks"]["FGSM"]
    flags = ["--attack_method", "FGSM", "DDNL2", "--output", output]
    assert evaluate(checkpoint, *flags) == 0
    attacks = json.loads(output.read_text())["attacks"]
    assert list(attacks) == ["FGSM", "DDNL2"]
    assert attacks["FGSM"] == first
    assert "FGSM: kept" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds FGSM at l_inf 0\.3"):
        evaluate(checkpoint, "--attack_method", "FGSM", "--epsilon", 0.1, "--output", output)
    for flags in (["--seed", 1], ["--num_examples", 23], ["--split", "train"]):
        with pytest.raises(UserError, match="is the report of another"):
            evaluate(checkpoint, "--attack_method", "FGSM", *flags, "--output", output)
    assert json.loads(output.read_text())["attacks"] == attacks
    assert os.listdir(tmp_path) == ["results.json"]


def test_output_never_replaces_anything_else(checkpoint, tmp_path):
    other = tmp_path / "other"
    for content in (checkpoint.read_bytes(), b"notes", b"{}", b'{"attacks": {}}', b""):
        other.write_bytes(content)
        with pytest.raises(UserError, match="no report"):
            evaluate(checkpoint, "--output", other)
        assert other.read_bytes() == content
    assert os.listdir(tmp_path) == ["other"]


# ---------------------------------------------------------------------------------------------
# AutoAttack and Square


class Tiny(nn.Module):
    """Ten classes, one hidden layer: AutoAttack takes a second or two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, x):
        return self.layers(x)


def _shorten(monkeypatch, package):
    """Fewer iterations in all four attacks of the package."""
    module = sys.modules[package.AutoAttack.__module__]
    for name, field, number in (
        ("APGDAttack", "n_iter", 10),
        ("APGDAttack_targeted", "n_iter", 10),
        ("FABAttack_PT", "n_iter", 5),
        ("SquareAttack", "n_queries", 50),
    ):
        attack = getattr(module, name)

        def perturb(self, *args, plain=attack.perturb, field=field, number=number, **options):
            setattr(self, field, number)
            return plain(self, *args, **options)

        monkeypatch.setattr(attack, "perturb", perturb)


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_autoattack_is_the_packages_standard_evaluation(norm, monkeypatch):
    package = pytest.importorskip("pyautoattack")
    _shorten(monkeypatch, package)
    network = Tiny().eval()
    x = torch.rand(30, 1, 6, 6)
    y = network(x).argmax(1)
    y[:3] = (y[:3] + 1) % 10
    epsilon = 0.05 if norm == "l_inf" else 0.3
    ball, stages = Ball(norm, epsilon), []
    random = torch.random.get_rng_state()
    ours = run_library(
        network, x, y, "AutoAttack", ball, seed=5, on_stage=lambda *stage: stages.append(stage)
    )
    assert torch.equal(random, torch.random.get_rng_state())
    theirs = package.AutoAttack(
        network, norm="Linf" if norm == "l_inf" else "L2", eps=epsilon, seed=5
    )
    moved, _ = theirs.run_standard_evaluation(x, y, batch_size=30)
    assert torch.equal(ours.robust, network(moved).argmax(1) == y)
    assert 3 < ours.robust.sum() < 27
    assert [stage for stage, _ in stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert stages[0][1] == 27
    assert ((ours.fell_to >= 0) == ~ours.robust)[3:].all()
    assert torch.equal(network(ours.x_adv).argmax(1) == y, ours.robust)


def test_autoattack_resumed_equals_straight(checkpoint, tmp_path, monkeypatch):
    """The chunks are the unit of work; here the package's place is taken by a seeded coin."""
    pytest.importorskip("pyautoattack")
    calls = []

    def coin(network, x, y, name, ball, *, seed, index, on_stage):
        seed += int(index[0]) // CHUNK
        calls.append((seed, len(x)))
        if len(calls) == 2 and interrupted:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(seed)
        robust = torch.rand(len(x), generator=generator) < 0.5
        return Verdicts(x, robust, torch.where(robust, -1, 1), [])

    monkeypatch.setattr(evaluation, "run_library", coin)
    flags = ["--attack_method", "AutoAttack", "--num_examples", 250]
    straight, output = tmp_path / "straight.json", tmp_path / "results.json"
    interrupted = False
    assert evaluate(checkpoint, *flags, "--output", straight) == 0
    assert [seed for seed, _ in calls] == [0, 1, 2]
    assert all(count <= CHUNK for _, count in calls)
    calls.clear()
    interrupted = True
    assert evaluate(checkpoint, *flags, "--output", output) == 130
    calls.clear()
    interrupted = False
    assert evaluate(checkpoint, *flags, "--output", output, "--test_batch", 7) == 0
    assert [seed for seed, _ in calls] == [1, 2]
    assert attacks_of(output) == attacks_of(straight)
    entry = attacks_of(output)["AutoAttack"]
    assert entry["accuracy_after"]["apgd-ce"] == entry["clean_accuracy"]
    assert entry["accuracy_after"]["square"] == entry["robust_accuracy"]


def test_a_missing_package_is_one_line(checkpoint, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="pip install pyautoattack"):
        evaluate(checkpoint, "--attack_method", "Square")


def test_square_under_l_2_takes_square_images(small_cnn):
    x, y = torch.rand(2, 1, 28, 20), torch.zeros(2, dtype=torch.long)
    with pytest.raises(UserError, match="square images only under l_2, not 28x20"):
        evaluation.evaluate(Tiny(), x, y, ["Square"], evaluation.Settings(norm="l_2"))


# ---------------------------------------------------------------------------------------------
# Gradient masking


def no_library(norm, shape):
    raise UserError("not installed")


def verdicts(network, x, y, budget, **options):
    return {
        check.name.split()[0]: check for check in masking_checks(network, x, y, budget, **options)
    }


def test_sanity_passes_an_honest_network_and_warns_of_a_masked_one(monkeypatch):
    class Masked(Tiny):
        """The same answers, but where two classes are close the gradient is zero."""

        def forward(self, x):
            logits = super().forward(x)
            return (100 * logits).round() / 100 + 0 * logits

    monkeypatch.setattr("utils.attacks.masking.require_library", no_library)
    honest, masked = Tiny().eval(), Masked().eval()
    masked.load_state_dict(honest.state_dict())
    x = torch.rand(40, 1, 6, 6)
    y = honest(x).argmax(1)
    budget = Budget("l_inf", 0.05, 20, 0.01)
    found = verdicts(honest, x, y, budget, transfer_from=Tiny())
    assert found.pop("the").verdict == "SKIP"
    assert {check.verdict for check in found.values()} == {"PASS"}, found
    found = verdicts(masked, x, y, budget, transfer_from=honest)
    assert found["input"].verdict == "WARN"
    assert found["input"].figures["zero_percent"] > 90
    assert found["accuracy"].verdict == "WARN"
    assert found["transferred"].verdict == "WARN"


def standardized(x):
    """By the statistics of this batch."""
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def test_sanity_sees_modes_that_have_parted(monkeypatch):
    monkeypatch.setattr("utils.attacks.masking.EXAMPLES", 4)
    monkeypatch.setattr("utils.attacks.masking.require_library", no_library)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 10)).eval()
    x, budget = torch.rand(400, 1, 6, 6), Budget("l_inf", 0.01, 1, 0.01)
    network[1].running_mean.copy_(x.flatten(1).mean(0))
    network[1].running_var.copy_(x.flatten(1).var(0))
    y = network(x).argmax(1)
    assert verdicts(network, x, y, budget, batch=400)["train"].verdict == "PASS"
    # 7 batches of 56 or 57, none of them filled up by copies of an image.
    few = verdicts(network, x[:397], y[:397], budget, batch=50)["train"]
    right = sum(
        int((network[2](standardized(part)).argmax(1) == labels).sum())
        for part, labels in zip(x[:397].flatten(1).tensor_split(7), y[:397].tensor_split(7))
    )
    assert few.figures["batch"] == pytest.approx(100 * right / 397)
    network[1].running_mean += 20 * torch.randn(36)
    check = verdicts(network, x, y, budget, batch=400)["train"]
    assert check.verdict == "WARN"
    assert check.figures["batch"] > check.figures["running"] + 5


def test_images_come_over_from_other_weights_of_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.attacks.masking.EXAMPLES", 4)
    monkeypatch.setattr("utils.attacks.masking.require_library", no_library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "transferring.py").write_text(MINE)
    weights = __import__("transferring").make().state_dict()
    save_checkpoint("weights.pth", weights)
    flags = ["--network", "transferring:make", "--mean", 0.5, "--std", 0.25, "--sanity"]
    flags += ["--attack_method", "FGSM", "--num_steps", 2, "--output", "results.json"]
    assert evaluate("weights.pth", *flags, "--transfer_from", "weights.pth") == 0
    checks = json.loads(Path("results.json").read_text())["sanity"]
    (check,) = (check for check in checks if check["name"].startswith("transferred"))
    assert check["verdict"] != "SKIP"


def test_the_network_that_images_come_from_is_normalised_alike(checkpoint, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        evaluation, "masking_checks", lambda *_, **options: asked.update(options) or []
    )
    flags = ["--attack_method", "FGSM", "--sanity", "--transfer_from", checkpoint]
    assert evaluate(checkpoint, *flags, "--mean", 0.5, "--std", 0.25) == 0
    normalize, own = asked["transfer_from"]
    assert (normalize.mean, normalize.std) == ([0.5], [0.25])
    assert own.state_dict().keys() == load_checkpoint(checkpoint)["state_dict"].keys()


def test_sanity_is_in_the_results(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.attacks.masking.EXAMPLES", 4)
    monkeypatch.setattr("utils.attacks.masking.require_library", no_library)
    output = tmp_path / "results.json"
    flags = ["--attack_method", "FGSM", "--num_steps", 2, "--sanity", "--output", output]
    assert evaluate(checkpoint, *flags, "--transfer_from", checkpoint) == 0
    save_checkpoint(other := tmp_path / "other", {**load_checkpoint(checkpoint), "dataset": "SVHN"})
    with pytest.raises(UserError, match="other: its dataset is SVHN"):
        evaluate(checkpoint, *flags, "--transfer_from", other)
    report = json.loads(output.read_text())
    assert len(report["sanity"]) == 7
    assert all(check["verdict"] in ("PASS", "WARN", "SKIP") for check in report["sanity"])
    assert "Is it real?" in capsys.readouterr().out
    # A page of another radius does not show them.
    page = tmp_path / "page.html"
    for epsilon, shown in ((0.3, True), (0.01, False)):
        more = ["--epsilon", epsilon, "--report", page, "--attack_method", "MPGD"]
        more += ["--output", tmp_path / f"{epsilon}.json", "--num_steps", 2]
        (tmp_path / f"{epsilon}.json").write_bytes(output.read_bytes())
        assert evaluate(checkpoint, *more) == 0
        assert ("Signs of masked gradients" in page.read_text()) == shown
        page.unlink()


# ---------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--dataset", "digits", "--model_path", "nowhere.pth.tar"], "nowhere.pth.tar"),
        (["--dataset", "digits", "--model_path", "README.txt"], "README.txt"),
    ],
)
def test_wrong_files(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.txt").write_text("not a checkpoint")
    with pytest.raises(UserError, match=line):
        start(*flags)


def test_a_network_for_other_images(tmp_path):
    network = build_model("resnet", depth=8)
    path = tmp_path / "colour.pth.tar"
    save_checkpoint(path, {"epoch": 1, "state_dict": network.state_dict(), "arch": network.arch})
    with pytest.raises(UserError, match=r"network for 3 channels, .*digits has 1"):
        evaluate(path)
    with pytest.raises(UserError, match="holds resnet, asked was small_cnn"):
        evaluate(path, "--arch", "small_cnn")


def test_an_output_that_cannot_be_written_is_known_before_the_work(checkpoint, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        evaluate(checkpoint, "--output", tmp_path / "missing" / "results.json")


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("MNIST_eval.py", ["--attack_method", "PDG"], ["--attack_method", "PDG", "AutoAttack"]),
        ("cifar_eval.py", ["--epsilon", "-8/255"], ["--epsilon", "-8/255"]),
        ("MNIST_eval.py", ["--dataset", "digits"], ["nowhere.pth.tar"]),
    ],
)
def test_scripts_end_in_one_line(run_script, script, flags, words):
    done = run_script(script, "--model_path", "nowhere.pth.tar", *flags)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(f"{script}: error: ")
    assert all(word in done.stderr for word in words)


def test_a_script_as_typed(run_script, checkpoint, tmp_path):
    output = tmp_path / "results.json"
    done = run_script(
        "MNIST_eval.py", "--model_path", checkpoint, "--dataset", "digits", "--num_examples", 8,
        "--attack_method", "PGD", "--epsilon", "8/255", "--num_steps", 2, "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "PGD" in done.stdout
    assert json.loads(output.read_text())["attacks"]["PGD"]["budget"]["epsilon"] == 8 / 255


# ---------------------------------------------------------------------------------------------
# The original's networks


def test_the_originals_mnist_network_reaches_its_figures(data_dir, reference_dir, tmp_path):
    output = tmp_path / "results.json"
    assert start(
        "--model_path", str(reference_dir / "original_mnist.pth.tar"), "--data_dir",
         str(data_dir), "--attack_method", "FGSM", "--num_examples", "400", "--output",
         str(output)
    ) == 0  # fmt: skip
    report = json.loads(output.read_text())
    assert report["clean_accuracy"] == pytest.approx(99.51, abs=0.6)
    assert report["attacks"]["FGSM"]["robust_accuracy"] == pytest.approx(97.4, abs=2)


# ---------------------------------------------------------------------------------------------
# What a checkpoint states


def stating(checkpoint, folder, **statement):
    """The checkpoint with a statement about its training, in a run folder of its own."""
    content = torch.load(checkpoint, weights_only=True)
    folder.mkdir()
    save_checkpoint(folder / "model_best.pth.tar", {**content, **statement})
    return folder


def run(path, *flags):
    """Eight images under FGSM, with no word about the dataset."""
    return start("--model_path", path, "--num_examples", 8, "--attack_method", "FGSM", *flags)


DIGITS = [str(digit) for digit in range(10)]


def test_a_run_folder_states_dataset_norm_and_radius(checkpoint, tmp_path, capsys):
    flags = {"dataset": "digits", "norm": "l_2", "epsilon": 0.7, "probe_epsilon": 0.9}
    folder = stating(checkpoint, tmp_path / "run", dataset="digits", classes=DIGITS, args=flags)
    assert run(folder) == 0
    printed = capsys.readouterr().out
    assert "test images of digits" in printed
    assert "l_2 0.9," in printed
    assert "note" not in printed
    assert run(folder, "--epsilon", 0.7) == 0
    assert "note: --epsilon 0.7, the checkpoint states 0.9\n" in capsys.readouterr().out
    assert run(folder, "--epsilon", 2) == 0
    with pytest.raises(UserError, match="--epsilon 2"):
        run(folder, "--epsilon", 2, "--norm", "l_inf")
    assert run(folder, "--norm", "l_inf") == 0
    printed = capsys.readouterr().out
    assert "note: --norm l_inf, the checkpoint states l_2\n" in printed
    assert "l_inf 0.3," in printed  # the dataset's own, not the other norm's


@pytest.mark.parametrize(
    ("statement", "flags", "words"),
    [
        ({"dataset": "FashionMNIST"}, ["-d", "digits"], "its dataset is FashionMNIST"),
        ({"dataset": "cifar10 (image folder, JPEG)"}, ["-d", "digits"], "its dataset is cifar10"),
        ({"dataset": "MNIST", "classes": DIGITS}, ["-d", "digits"], "its dataset is MNIST"),
        ({"classes": DIGITS[::-1]}, ["-d", "digits"], "its class '9' is '0' in the data"),
        (
            {"dataset": "mine (image folder)", "classes": ["a", "b"]},
            ["-d", "digits"],
            "its class 'a' is '0'",
        ),
    ],
)
def test_another_dataset_or_other_classes_are_refused(
    checkpoint, tmp_path, capsys, statement, flags, words
):
    folder = stating(checkpoint, tmp_path / "run", **statement)
    with pytest.raises(UserError, match=f"{words}.*--force takes the data anyhow"):
        run(folder, *flags)
    assert run(folder, "-d", "digits", "--force") == 0


def test_a_folder_goes_by_its_classes(checkpoint, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name in DIGITS:
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / "data" / "test" / name / "0.png")
    folder = stating(checkpoint, tmp_path / "run", dataset="MNIST", classes=DIGITS)
    flags = ["-d", "folder", "--data_dir", tmp_path / "data"]
    assert run(folder, *flags) == 0
    (tmp_path / "data" / "test" / "9").rename(tmp_path / "data" / "test" / "Z")
    with pytest.raises(UserError, match="its class '9' is 'Z' in the data"):
        run(folder, *flags)


# ---------------------------------------------------------------------------------------------
# Networks of the user's own


MINE = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x):
        assert MEAN is None or x.min() < 0
        return self.layer(x.flatten(1))

MEAN = None

def make():
    torch.manual_seed(0)
    return Mine()

number = 3

class Odd(Mine):
    arch = "odd"

class Pair(Mine):
    def forward(self, x):
        return super().forward(x), x

class Flat(Mine):
    def forward(self, x):
        return super().forward(x)[:, 0]

class Changing(Mine):
    def forward(self, x):
        return super().forward(x.sub_(0.5))
"""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Odd", ""),
        ("Pair", "no logits .* 'tuple' object has no attribute 'shape'"),
        ("Flat", "no logits .* not enough values"),
        ("Changing", "no logits .* it changes its input in place"),
    ],
)
def test_what_a_network_of_the_users_own_may_answer(tmp_path, monkeypatch, kind, says):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "several.py").write_text(MINE)
    flags = ["--network", f"several:{kind}", "-d", "digits", "--attack_method", "FGSM"]
    flags += ["--num_examples", 8]
    if not says:
        assert start(*flags) == 0
        return
    with pytest.raises(UserError, match=says):
        start(*flags)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_network_of_the_users_own(tmp_path, monkeypatch, digits_test, with_weights):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"mine_{with_weights}"
    (tmp_path / f"{name}.py").write_text(MINE)
    flags = ["--network", f"{name}:make", "-d", "digits", "--attack_method", "FGSM"]
    output = tmp_path / "results.json"
    network = __import__(name).make()
    if with_weights:
        nn.init.normal_(network.layer.weight)
        save_checkpoint("weights.pth", {"state_dict": network.state_dict()})
        flags += ["--model_path", "weights.pth"]
    flags += ["--mean", "0.5", "--std", "0.25", "--output", str(output)]
    assert start(*flags) == 0
    x = (digits_test.float_images() - 0.5) / 0.25
    right = (network(x).argmax(1) == digits_test.labels).sum()
    report = json.loads(output.read_text())
    assert report["clean_accuracy"] == pytest.approx(100 * int(right) / len(x))
    assert "mine" in report["network"]
    (tmp_path / f"{name}.py").write_text(MINE + "# another network, for all that anyone knows\n")
    with pytest.raises(UserError, match="is the report of another network"):
        start(*flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--network", "nowhere_at_all:make"], "No module named 'nowhere_at_all'"),
        (["--network", "math:make"], "math.*has no attribute 'make'"),
        (["--network", "os:getpid"], "returned int, not an nn.Module"),
        (["--network", "utils.evaluation:Attack"], "Attack.*: missing a required argument"),
        (["--network", "torch.nn:Identity"], "no logits"),
        (["--arch", "timm:no_such_net", "--model_path", "x.pth"], "timm"),
    ],
)
def test_networks_that_are_none(checkpoint, flags, words):
    flags = [str(checkpoint) if flag == "x.pth" else flag for flag in flags]
    with pytest.raises(UserError, match=words):
        start(*flags, "-d", "digits")


def test_evaluate_as_a_function(digits_network, digits_test):
    data = digits_test.head(12)
    options = evaluation.Settings(epsilon=0.1, num_steps=3)
    report = evaluation.evaluate(
        digits_network.train(), data.float_images(), data.labels, ["PGD", "DDNL2"], options
    )
    assert report == {
        **report,
        **evaluation.evaluate(digits_network, data.images, data.labels, ["PGD"], options)
        | {"attacks": report["attacks"]},
    }
    table = evaluation.results_table(report["attacks"])
    assert [line.split()[0] for line in table.splitlines()[2:4]] == ["PGD", "DDNL2"]
    with pytest.raises(UserError, match="unknown"):
        evaluation.evaluate(digits_network, data.images, data.labels, ["PDG"])
    with pytest.raises(UserError, match=r"no logits .* for images of 1x8x8"):
        evaluation.evaluate(digits_network, torch.rand(2, 1, 8, 8), data.labels[:2])


# ---------------------------------------------------------------------------------------------
# Attacked images, the training split, notes


def test_attacked_images_are_saved(checkpoint, digits_network, digits_test, tmp_path):
    names = ["FGSM", "PGD", "DDNL2"]
    flags = ["--attack_method", *names, "--epsilon", 0.2, "--num_steps", 5]
    output, folder = tmp_path / "results.json", tmp_path / "images"
    for where in (tmp_path / "first", folder):  # again, although the report is there
        assert evaluate(checkpoint, *flags, "--output", output, "--save_adversarial", where) == 0
    with pytest.raises(UserError, match=r"images: holds PGD\.npy; name another"):
        evaluate(checkpoint, "--save_adversarial", folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("npy", "png")
    )
    report, data = json.loads(output.read_text()), digits_test.head(24)
    for name in names:
        x_adv = torch.from_numpy(np.load(folder / f"{name}.npy"))
        wrong = digits_network(x_adv).argmax(1) != data.labels
        if name != "DDNL2":
            assert (x_adv - data.float_images()).abs().max() <= 0.2 + 1e-6
            robust = report["attacks"][name]["robust_accuracy"]
            assert 100 - 100 * int(wrong.sum()) / 24 == pytest.approx(robust)
        assert wrong.any()


def test_the_training_split(checkpoint, tmp_path, digits_network, digits_train):
    output = tmp_path / "results.json"
    assert evaluate(checkpoint, "--split", "train", "--output", output) == 0
    data = digits_train.head(24)
    right = digits_network(data.float_images()).argmax(1) == data.labels
    report = json.loads(output.read_text())
    assert report["clean_accuracy"] == pytest.approx(100 * int(right.sum()) / 24)
    assert (report["split"], report["test_set"]) == ("train", len(digits_train))


def test_the_held_out_split(checkpoint, tmp_path, digits_network, digits_train):
    """Of the images that a run used, those that it kept out; the rest are what it trained on."""
    content, output = torch.load(checkpoint), tmp_path / "results.json"
    content["args"] = {"val_size": 30, "manualSeed": 7, "nlabel": 500}
    torch.save(content, path := tmp_path / "other.pth.tar")
    assert evaluate(path, "--split", "held-out", "--num_examples", 30, "--output", output) == 0
    report = json.loads(output.read_text())
    assert (report["split"], report["test_set"], report["num_examples"]) == ("held-out", 30, 30)
    _, held_out = split_validation(digits_train.head(500), 30, seed=7)
    right = digits_network(held_out.float_images()).argmax(1) == held_out.labels
    assert report["clean_accuracy"] == pytest.approx(100 * int(right.sum()) / 30)
    assert report["data_sha256"] == fingerprint(held_out.images, held_out.labels)


@pytest.mark.parametrize("args", [None, {"val_size": 0, "manualSeed": 7}, {"val_size": 9.5}])
def test_a_checkpoint_that_does_not_state_its_held_out_images(checkpoint, tmp_path, args):
    torch.save(torch.load(checkpoint) | {"args": args}, path := tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match="does not state which images were held out"):
        evaluate(path, "--split", "held-out")


def test_training_images_that_changed(checkpoint, tmp_path, digits_train, capsys):
    """Which of them were held out is no longer known; the test images are another matter."""
    flags = {"val_size": 30, "manualSeed": 7}
    for seen in (digits_train.head(99), digits_train):
        state = {"args": flags, "data_sha256": fingerprint(seen.images, seen.labels)}
        torch.save(torch.load(checkpoint) | state, path := tmp_path / "other.pth.tar")
        assert evaluate(path) == 0
        if seen is digits_train:
            assert evaluate(path, "--split", "held-out") == 0
        else:
            with pytest.raises(UserError, match="its training images were others"):
                evaluate(path, "--split", "held-out")
            assert evaluate(path, "--split", "train", "--force") == 0


def test_an_activation_that_no_weight_tells(tmp_path, capsys):
    torch.manual_seed(0)
    network = build_model("resnet", depth=8, activation="silu", in_channels=1)
    save_checkpoint(path := tmp_path / "weights.pth.tar", network.state_dict())
    reports = []
    for flags in ([], ["--activation", "silu"]):
        capsys.readouterr()
        assert evaluate(path, *flags, "--output", tmp_path / f"{len(flags)}.json") == 0
        noted = "activation is not stated, relu is taken" in capsys.readouterr().out
        assert noted == (not flags)
        reports.append(json.loads((tmp_path / f"{len(flags)}.json").read_text()))
    assert [report["arch"]["activation"] for report in reports] == ["relu", "silu"]
    with pytest.raises(UserError, match="is the report of another network"):
        evaluate(path, "--activation", "silu", "--output", tmp_path / "0.json")
    partly = {key: value for key, value in network.arch.items() if key != "activation"}
    save_checkpoint(path, {"state_dict": network.state_dict(), "arch": partly})
    assert evaluate(path, "--output", tmp_path / "partly.json") == 0
    with pytest.raises(UserError, match="is the report of another network"):
        evaluate(path, "--activation", "silu", "--output", tmp_path / "partly.json")
    stated = {"state_dict": network.state_dict(), "arch": network.arch}
    save_checkpoint(path, stated)
    capsys.readouterr()
    assert evaluate(path) == 0 and "activation is not" not in capsys.readouterr().out
    with pytest.raises(UserError, match="holds activation silu, asked was activation relu"):
        evaluate(path, "--activation", "relu")


def test_images_and_labels_in_memory_are_checked(digits_network):
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    for images, labels in (
        (x * 255, y), (x - 0.5, y), ((x * 255).int(), y), (x * float("nan"), y),
        (x, y.int()), (x, y - 1), (x, y[:3]),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"images, allowed are|labels are"):
            evaluation.evaluate(digits_network, images, labels)


def test_a_folder_for_images_is_made_before_the_attacks(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pgd", None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--save_adversarial .*file"):
        evaluate(checkpoint, "--save_adversarial", tmp_path / "file")


def test_a_note_where_settings_make_no_sense(checkpoint, capsys):
    assert evaluate(checkpoint, "--attack_method", "PGD", "--step_size", 2) == 0
    assert capsys.readouterr().out.count("note: ") == 1
    assert evaluate(checkpoint, "--attack_method", "PGD", "--norm", "l_2", "--epsilon", 0.3) == 0
    assert capsys.readouterr().out.count("note: ") == 1
    assert evaluate(checkpoint, "--attack_method", "FGSM", "PGD") == 0
    assert "note: " not in capsys.readouterr().out


def test_the_time_left_counts_the_minutes_in_which_no_image_was_done(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    bar = evaluation.Bar(total=10)
    for minute in range(1, 7):
        clock[0] = 60.0 * minute
        bar.update(2 if minute == 6 else 0)
    assert "[06:00<24:00," in str(bar)  # two of ten in six minutes


def test_there_is_a_line_for_every_minute_also_where_steps_slow_down(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for step in evaluation.Bar(range(8)):
        clock[0] += 20 if step < 6 else 90
    assert re.findall(r"(\d+)/8 ", capsys.readouterr().err) == ["3", "6", "7", "8"]


def test_progress_is_a_line_where_there_is_no_terminal(checkpoint, monkeypatch, capsys):
    class Impatient(evaluation.Bar):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.mininterval = self.delay = 0

    monkeypatch.setattr(evaluation, "Bar", Impatient)
    assert evaluate(checkpoint, "--attack_method", "PGD", "--num_steps", 3) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("PGD")]
    assert len(lines) > 3  # one for each pass of the network
    assert not any("\r" in line for line in lines)

"""The evaluation scripts: counting, resuming, processes, sanity checks, wrong input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cifar_eval
import MNIST_eval
from models import build_model
from utils import evaluation, library_attacks
from utils.attacks import GREY, Budget
from utils.ball import Ball
from utils.data import load_dataset
from utils.errors import UserError
from utils.library_attacks import CHUNK, run_library
from utils.options import parse_evaluation
from utils.runs import save_checkpoint
from utils.sanity import sanity_checks
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
    args = parse_evaluation(MNIST_eval.DEFAULTS, [*given, *map(str, flags)])
    return evaluation.evaluate(args)


def attacks_of(path):
    return {
        name: {key: value for key, value in entry.items() if key not in ("seconds", "notes")}
        for name, entry in json.loads(path.read_text())["attacks"].items()
    }


# ---------------------------------------------------------------------------------------------
# Results


def test_table_and_json_say_what_was_found(checkpoint, tmp_path, capsys, monkeypatch):
    one_start = replace(GREY, pointwise_starts=1)
    monkeypatch.setattr(evaluation, "family", lambda dataset, channels: one_start)
    output = tmp_path / "results.json"
    names = ["fgsm", "PGD", "MPGD", "jsma", "DDNL2", "pointwise"]
    flags = ["--attack_method", *names, "--num_examples", 10]
    assert evaluate(checkpoint, *flags, "--output", output) == 0
    report = json.loads(output.read_text())
    assert list(report["attacks"]) == ["FGSM", "PGD", "MPGD", "JSMA", "DDNL2", "point-wise"]
    assert report["num_examples"] == 10
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


def test_two_processes_find_what_one_finds(checkpoint, tmp_path):
    flags = ["--attack_method", "FGSM", "PGD", "--num_steps", 4, "--test_batch", 5]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert evaluate(checkpoint, *flags, "--output", one) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=29541", "MNIST_eval.py", "--model_path", checkpoint]
    command += ["--dataset", "digits", "--num_examples", 24, *flags, "--output", two]
    done = subprocess.run(
        list(map(str, command)),
        cwd=Path(MNIST_eval.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert attacks_of(one) == attacks_of(two)
    assert done.stdout.count("clean accuracy") == 1


# ---------------------------------------------------------------------------------------------
# Resuming


def test_a_stopped_evaluation_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch, capsys):
    flags = ["--attack_method", "FGSM", "PGD", "--num_steps", 4, "--test_batch", 8]
    straight, output = tmp_path / "straight.json", tmp_path / "results.json"
    assert evaluate(checkpoint, *flags, "--output", straight) == 0

    plain, looked = evaluation.attack, []

    def stopped(network, x, y, budget, **options):
        looked.extend((budget.num_steps, row) for row in options["index"].tolist())
        if len(looked) > 30:  # in the second attack
            raise KeyboardInterrupt
        return plain(network, x, y, budget, **options)

    monkeypatch.setattr(evaluation, "attack", stopped)
    assert evaluate(checkpoint, *flags, "--output", output) == 130
    assert "goes on" in capsys.readouterr().out
    assert not output.exists()
    finished = set(looked[:-8])
    looked.clear()
    monkeypatch.setattr(
        evaluation,
        "attack",
        lambda *a, **k: (
            looked.extend((a[3].num_steps, r) for r in k["index"].tolist()) or plain(*a, **k)
        ),
    )
    assert evaluate(checkpoint, *flags, "--output", output) == 0
    assert not finished & set(looked)
    assert attacks_of(output) == attacks_of(straight)
    assert not output.with_name("results.json.partial").exists()


def test_the_store_refuses_what_is_not_its_own(tmp_path):
    path = tmp_path / "results.json.partial"
    store = VerdictStore(path, {"seed": 0})
    record = store.record("PGD", 4, ("robust", "l2"))
    record.put(torch.tensor([1, 3]), robust=torch.tensor([1, 0]), l2=torch.tensor([0.5, torch.inf]))
    store.save(force=True)
    again = VerdictStore(path, {"seed": 0}).record("PGD", 4, ("robust", "l2"))
    assert again.open_rows().tolist() == [0, 2]
    assert again.values["l2"][3] == torch.inf
    assert len(VerdictStore(path, {"seed": 0}).record("MPGD", 4, ("robust",)).open_rows()) == 4
    assert len(VerdictStore(path, {"seed": 0}).record("PGD", 5, ("robust",)).open_rows()) == 5
    other = VerdictStore(path, {"seed": 1})
    assert "not used" in other.note
    assert json.loads(path.with_name(path.name + ".other").read_text())["key"] == {"seed": 0}
    assert len(other.record("PGD", 4, ("robust", "l2")).open_rows()) == 4
    for text in ("", "{", "[]", '{"key": {"seed": 0}, "records": {"PGD": 7}}'):
        path.write_text(text)
        broken = VerdictStore(path, {"seed": 0})
        assert len(broken.record("PGD", 4, ("robust",)).open_rows()) == 4


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
    assert ((ours.broken_by >= 0) == ~ours.robust)[3:].all()


def test_autoattack_resumed_equals_straight(checkpoint, tmp_path, monkeypatch):
    """The chunks are the unit of work; here the package's place is taken by a seeded coin."""
    pytest.importorskip("pyautoattack")
    calls = []

    def coin(network, x, y, name, ball, *, seed, on_stage):
        calls.append((seed, len(x)))
        if len(calls) == 2 and interrupted:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(seed)
        robust = torch.rand(len(x), generator=generator) < 0.5
        return library_attacks.Verdicts(robust, torch.where(robust, -1, 1), ())

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


# ---------------------------------------------------------------------------------------------
# Sanity


def verdicts(network, x, y, budget, **options):
    return {
        check.name.split()[0]: check for check in sanity_checks(network, x, y, budget, **options)
    }


def test_sanity_passes_an_honest_network_and_warns_of_a_masked_one(monkeypatch):
    class Masked(Tiny):
        """The same answers, but where two classes are close the gradient is zero."""

        def forward(self, x):
            logits = super().forward(x)
            return (100 * logits).round() / 100 + 0 * logits

    monkeypatch.setattr("utils.sanity.importlib.util.find_spec", lambda name: None)
    honest, masked = Tiny().eval(), Masked().eval()
    masked.load_state_dict(honest.state_dict())
    x = torch.rand(40, 1, 6, 6)
    y = honest(x).argmax(1)
    budget = Budget("l_inf", 0.05, 20, 0.01)
    found = verdicts(honest, x, y, budget, undefended=Tiny())
    assert found.pop("the").verdict == "SKIP"
    assert {check.verdict for check in found.values()} == {"PASS"}, found
    found = verdicts(masked, x, y, budget, undefended=honest)
    assert found["input"].verdict == "WARN"
    assert found["input"].figures["zero_percent"] > 90
    assert found["accuracy"].verdict == "WARN"
    assert found["transferred"].verdict == "WARN"


def test_sanity_sees_modes_that_have_parted(monkeypatch):
    monkeypatch.setattr("utils.sanity.EXAMPLES", 4)
    monkeypatch.setattr("utils.sanity.importlib.util.find_spec", lambda name: None)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 10)).eval()
    x, budget = torch.rand(400, 1, 6, 6), Budget("l_inf", 0.01, 1, 0.01)
    network[1].running_mean.copy_(x.flatten(1).mean(0))
    network[1].running_var.copy_(x.flatten(1).var(0))
    y = network(x).argmax(1)
    assert verdicts(network, x, y, budget, batch=400)["train"].verdict == "PASS"
    network[1].running_mean += 20 * torch.randn(36)
    check = verdicts(network, x, y, budget, batch=400)["train"]
    assert check.verdict == "WARN"
    assert check.figures["batch"] > check.figures["running"] + 5


def test_sanity_is_in_the_results(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.sanity.EXAMPLES", 4)
    monkeypatch.setattr("utils.sanity.importlib.util.find_spec", lambda name: None)
    output = tmp_path / "results.json"
    flags = ["--attack_method", "FGSM", "--num_steps", 2, "--sanity", "--output", output]
    assert evaluate(checkpoint, *flags, "--transfer_from", checkpoint) == 0
    report = json.loads(output.read_text())
    assert len(report["sanity"]) == 7
    assert all(check["verdict"] in ("PASS", "WARN", "SKIP") for check in report["sanity"])
    assert "Is it real?" in capsys.readouterr().out


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
        evaluation.evaluate(parse_evaluation(MNIST_eval.DEFAULTS, flags))


def test_a_network_for_other_images(tmp_path):
    network = build_model("resnet", depth=8)
    path = tmp_path / "colour.pth.tar"
    save_checkpoint(path, {"epoch": 1, "state_dict": network.state_dict(), "arch": network.arch})
    with pytest.raises(UserError, match=r"network for 3 channels.*digits has 1"):
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
    args = parse_evaluation(
        MNIST_eval.DEFAULTS,
        ["--model_path", str(reference_dir / "original_mnist.pth.tar"), "--data_dir",
         str(data_dir), "--attack_method", "FGSM", "--num_examples", "400", "--output",
         str(output)],
    )  # fmt: skip
    assert evaluation.evaluate(args) == 0
    report = json.loads(output.read_text())
    assert report["clean_accuracy"] == pytest.approx(99.51, abs=0.6)
    assert report["attacks"]["FGSM"]["robust_accuracy"] == pytest.approx(97.4, abs=2)


def test_defaults_of_both_scripts():
    for module in (MNIST_eval, cifar_eval):
        args = parse_evaluation(module.DEFAULTS, ["--model_path", "x"])
        assert args.attack_method == ["PGD"]
        assert args.epsilon is args.num_steps is args.step_size is None
        assert args.test_batch == 200

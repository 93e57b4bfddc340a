"""tools/reproduce.py: its commands are valid, its pipeline runs, its verdict is right."""

from __future__ import annotations

import json
import sys

import pytest

import cifar_defense
import cifar_eval
import MNIST_defense
import MNIST_eval
from tools import reproduce
from tools.reproduce import RECIPES, Figure, Recipe
from utils.errors import UserError
from utils.options import parse_evaluation, parse_training
from utils.runs import LOG_COLUMNS, read_log, sha256_of

SCRIPTS = {
    "MNIST_defense.py": MNIST_defense,
    "MNIST_eval.py": MNIST_eval,
    "cifar_defense.py": cifar_defense,
    "cifar_eval.py": cifar_eval,
}


def arguments(*words: object):
    return reproduce.build_parser().parse_args(["mnist", *map(str, words)])


@pytest.fixture
def reproduction(monkeypatch, tmp_path, capfd):
    """``reproduction("mnist", ...)`` -> (exit code, stdout); runs below ``tmp_path``."""

    def run(*words: object) -> tuple[int, str]:
        line = ["reproduce.py", *map(str, words), "--runs_dir", str(tmp_path), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", line)
        code = reproduce.main()
        return code, capfd.readouterr().out

    return run


@pytest.fixture
def commands(monkeypatch):
    """The commands that would have been run, in place of running them."""
    asked: list[list[str]] = []
    monkeypatch.setattr(reproduce, "run", asked.append)
    return asked


def pretend_run(folder, pgd: float, attacks=("PGD", "AutoAttack")):
    """What a training and an evaluation leave behind."""
    folder.mkdir(parents=True)
    (folder / "checkpoint.pth.tar").write_bytes(b"newest")
    (folder / "model_best.pth.tar").write_bytes(b"best")
    columns = [*LOG_COLUMNS, "Seconds"]
    rows = ["\t".join(columns)] + ["\t".join(["0"] * len(LOG_COLUMNS) + ["90"])] * 2
    (folder / "log.txt").write_text("\n".join(rows) + "\n")
    report = {
        "checkpoint_sha256": sha256_of(folder / "model_best.pth.tar"),
        "num_examples": 1000,
        "test_set": 10000,
        "clean_accuracy": 99.2,
        "attacks": {name: {"robust_accuracy": pgd} for name in attacks},
    }
    (folder / "results.json").write_text(json.dumps(report))


def test_the_smoke_pipeline(reproduction, tmp_path, monkeypatch):
    """Train and evaluate digits for real; then the same command has nothing left to do."""
    code, out = reproduction("mnist", "--smoke")
    folder = tmp_path / "mnist_smoke"
    assert code == 0
    stages = len(RECIPES["mnist"].stages)
    assert out.count("$ python MNIST_defense.py") == stages
    assert out.count("nothing to do: 1 of 1 epochs are done") == stages - 1
    assert out.count("$ python MNIST_eval.py") == 1
    assert len(read_log(folder / "log.txt")["Seconds"]) == 1
    report = json.loads((folder / "results.json").read_text())
    assert report["dataset"] == "digits" and report["num_examples"] == reproduce.SMOKE_EXAMPLES
    assert list(report["attacks"]) == reproduce.attacks_here()
    measured = next(line for line in out.splitlines() if line.startswith("measured"))
    assert f"{report['clean_accuracy']:.1f}" in measured
    assert "not compared: the expected figures are for other images" in out

    asked: list[list[str]] = []
    monkeypatch.setattr(reproduce, "run", asked.append)
    code, again = reproduction("mnist", "--smoke")
    assert code == 0 and [command[0] for command in asked] == ["MNIST_defense.py"] * stages
    assert all(command[-2:] == ["--resume", str(folder)] for command in asked)
    assert "is this network's evaluation already" in again and measured in again


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_the_scripts_understand_the_commands(name, smoke, tmp_path):
    args = arguments("--data_dir", tmp_path, *(["--smoke"] if smoke else []))
    args.num_examples = 1000
    trainings = [
        reproduce.training_command(RECIPES[name], stage, args, tmp_path)
        for stage in RECIPES[name].stages
    ]
    training = trainings[-1]
    evaluation = reproduce.evaluation_command(RECIPES[name], args, tmp_path)
    evaluated = parse_evaluation(SCRIPTS[evaluation[0]].DEFAULTS, evaluation[1:])
    stages = [parse_training(SCRIPTS[words[0]].DEFAULTS, words[1:]) for words in trainings]
    trained = stages[-1]
    epochs = [stage.epochs for stage in stages]
    assert epochs == sorted(epochs) and trained.epochs == epochs[-1]
    assert trained.dataset == evaluated.dataset
    assert (trained.dataset == "digits") is smoke
    assert trained.search == "fast" and trained.checkpoint == str(tmp_path)
    assert trained.resume is None and evaluated.attack_method == reproduce.attacks_here()
    # Whatever radius a stage trains with, its best epoch is chosen at the published one.
    published = 0.3 if "MNIST" in training[0] else 0.031
    assert [stage.probe_epsilon for stage in stages] == pytest.approx([published] * len(stages))
    radii = {"mnist": [0.3, 0.3, 0.33, 0.33], "cifar": [published]}[name]
    assert [stage.epsilon for stage in stages] == pytest.approx(radii)
    # The published setting: nothing of the attack is chosen by us.
    assert evaluated.epsilon is None and evaluated.num_steps is None and evaluated.step_size is None


@pytest.mark.parametrize(("pgd", "code"), [(95.0, 0), (94.0, 0), (93.9, 1)])
def test_a_figure_that_falls_short_is_an_exit_code(
    reproduction, commands, monkeypatch, tmp_path, pgd, code
):
    expected = {"clean": Figure(99.3, 0.2), "pgd": Figure(95, 1), "autoattack": None}
    recipe = Recipe("MNIST_defense.py", "MNIST_eval.py", "", "", expected)
    monkeypatch.setitem(RECIPES, "mnist", recipe)
    pretend_run(tmp_path / "mnist", pgd)
    found, out = reproduction("mnist")
    assert found == code
    assert [command[0] for command in commands] == ["MNIST_defense.py"]
    lines = out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("measured"))
    head, measured, wanted = lines[place - 1 : place + 2]
    assert head.split() == ["clean", "PGD", "AutoAttack", "minutes"]
    assert measured.split() == ["measured", "99.2", str(pgd), str(pgd), "3.0"]
    assert wanted.split() == "expected 99.3 ± 0.2 95 ± 1 - -".split()
    assert ("below what is expected: pgd: 93.90 %, expected 95 ± 1 %" in out) is (code == 1)


def test_other_images_are_not_compared(reproduction, commands, monkeypatch, tmp_path):
    expected = {"clean": Figure(99.9, 0.1), "pgd": Figure(99.9, 0.1)}
    recipe = Recipe("MNIST_defense.py", "MNIST_eval.py", "", "", expected)
    monkeypatch.setitem(RECIPES, "mnist", recipe)
    pretend_run(tmp_path / "mnist", 90.0)
    code, out = reproduction("mnist", "--num_examples", 200)
    assert code == 0 and "not compared" in out
    # The results at hand are of 1,000 images: evaluated anew.
    assert [command[0] for command in commands] == ["MNIST_defense.py", "MNIST_eval.py"]


def test_what_counts_as_evaluated(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    pretend_run(folder, 95.0, attacks=("PGD",))
    monkeypatch.setattr(reproduce, "attacks_here", lambda: ["PGD"])
    assert reproduce.is_evaluated(folder, 1000)
    assert not reproduce.is_evaluated(folder, 999)
    monkeypatch.setattr(reproduce, "attacks_here", lambda: ["PGD", "AutoAttack"])
    assert not reproduce.is_evaluated(folder, 1000)
    (folder / "model_best.pth.tar").write_bytes(b"another")
    assert not reproduce.is_evaluated(folder, 1000)
    (folder / "results.json").write_text("{")
    assert not reproduce.is_evaluated(folder, 1000)


def test_without_autoattack(reproduction, commands, monkeypatch, tmp_path):
    def missing() -> str:
        raise UserError("not installed")

    monkeypatch.setattr(reproduce, "library_version", missing)
    expected = {"clean": Figure(99, 1), "pgd": Figure(30, 1), "autoattack": Figure(25, 1)}
    recipe = Recipe("cifar_defense.py", "cifar_eval.py", "", "", expected)
    monkeypatch.setitem(RECIPES, "cifar", recipe)
    pretend_run(tmp_path / "cifar", 30.0, attacks=("PGD",))
    code, out = reproduction("cifar")
    assert code == 0 and "AutoAttack is skipped: pip install pyautoattack" in out
    measured = next(line for line in out.splitlines() if line.startswith("measured"))
    assert measured.split() == ["measured", "99.2", "30.0", "-", "3.0"]


def test_a_failing_script_is_one_line():
    with pytest.raises(UserError, match=r"MNIST_eval\.py ended with exit code 2"):
        reproduce.run(["MNIST_eval.py", "--no_such_flag"])

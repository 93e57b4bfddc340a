"""benchmarks/equal_cost.py: equal cost, the choice by held-out images, stages that resume."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import cifar_defense
import MNIST_defense
from benchmarks import equal_cost
from tools import scripts
from utils.errors import UserError
from utils.networks import sha256_of
from utils.options import settle_training, training_parser

RELATIVE = {"at": 1.0, "lfr": 2.0, "none": 0.25, "igr": 0.5, "trades": 1.5, "wide --ema 0.9": 2.5}
TIMES = {name: {"at_seconds": 0.5, "relative": RELATIVE} for name in equal_cost.SETTINGS}
STEPS = {"at": 120, "lfr": 60, "none": 480, "wide": 48}  # one minute of AT, and the others


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Scripts are not run: the commands are kept, and their files are made up."""
    asked: list[list[str]] = []

    def value(command: list[str], flag: str) -> str:
        return command[command.index(flag) + 1]

    def pretend(command: list[str], output: Path) -> None:
        asked.append(command)
        if "_eval" in command[0]:
            path = Path(value(command, "--model_path"))
            verdicts = {
                "robust_accuracy": 40.0,
                "clean_accuracy": 90.0,
                "num_examples": 360,
                "versions": {},
            }
            report = {"checkpoint_sha256": sha256_of(path)}
            report |= {"attacks": {value(command, "--attack_method"): verdicts}}
            Path(value(command, "--output")).write_text(json.dumps(report))
            return
        folder = Path(value(command, "--checkpoint"))
        folder.mkdir(exist_ok=True)
        (folder / "args.json").write_text('{"versions": {"cpu": "of the training"}}')
        lr = float(value(command, "--lr"))
        rows = [f"{50 if lr == 0.1 else 40 + lr}\t{90 - lr}\t30"] * int(value(command, "--epochs"))
        if lr == 0.05 and value(command, "--defense") == "lfr":
            rows.pop()
        lines = ["Held-out Robust Acc.\tHeld-out Acc.\tSeconds", *rows]
        (folder / "log.txt").write_text("\n".join(lines) + "\n")
        # At full length 0.4, the second best of the tries where there is one, is the best.
        best = {"state_dict": {"w": torch.zeros(1)}, "best_acc": 80.0 if lr == 0.4 else 70.0}
        torch.save(best, folder / "model_best.pth.tar")
        if lr == 0.05 and value(command, "--defense") == "lfr":
            lambada = value(command, "--lambada") == "0.02"
            line = "loss is nan in step 1 of epoch 2" if lambada else "weights are not finite; what"
            output.write_text(f"MNIST_defense.py: error: the {line}")
            raise UserError("MNIST_defense.py ended with exit code 2")

    monkeypatch.setattr(equal_cost, "run", pretend)
    monkeypatch.setattr(equal_cost, "TIMES", tmp_path / "step_times.json")
    (tmp_path / "step_times.json").write_text(json.dumps(TIMES))
    return asked


@pytest.fixture
def table(monkeypatch, tmp_path):
    def run(*words: object) -> int:
        line = ["equal_cost", "digits", "--minutes", 1, "--runs_dir", tmp_path / "runs", *words]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        return equal_cost.main()

    return run


@pytest.mark.parametrize("scripts_of", ["MNIST", "cifar"])
def test_every_method_has_as_many_tries(scripts_of):
    for name in [*equal_cost.METHODS, "a_variant"]:
        assert len(set(equal_cost.grid(scripts_of, name))) == 6


@pytest.mark.parametrize("dataset", equal_cost.SETTINGS)
def test_the_scripts_understand_the_flags(dataset):
    scripts, setting, _ = equal_cost.SETTINGS[dataset]
    defaults = {"MNIST": MNIST_defense, "cifar": cifar_defense}[scripts].DEFAULTS
    for name, method in equal_cost.METHODS.items():
        method = method.replace("HALF", equal_cost.HALF[scripts])
        words = f"--dataset {dataset} {equal_cost.COMMON} {setting} {method}".split()
        for tried in equal_cost.grid(scripts, name):
            parser = training_parser(defaults, "")
            args = settle_training(parser, defaults, parser.given([*words, *tried.split()]))
            assert args.defense == name and args.val_size is None
            assert args.epsilon == pytest.approx(8 / 255 if scripts == "cifar" else 0.3)
            if name in ("at", "trades"):
                assert (args.num_steps, args.step_size) == (4, pytest.approx(args.epsilon / 2))
            assert name != "lfr" or args.search == "fast"


def test_a_table_from_nothing(commands, table, tmp_path, capsys):
    words = ["--only", "at", "lfr", "none", "--extra", "wide", "--ema 0.9", "--seeds", 1, 2]
    words += ["--results", tmp_path / "results.json"]
    assert table(*words) == 0
    train = [c for c in commands if "_defense" in c[0]]
    # Six tries, two finalists of the first seed, and the better one with the other seed; of `none`
    # there is one network.
    assert len(train) == 3 * (6 + 2 + 1) + 6 + 1 and len(commands) == len(train) + 2 * 3 + 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["rows"]) == set(STEPS) and len(found["runs"]) == len(train)
    assert (found["dataset"], found["minutes"]) == ("digits", 1)
    for name, row in found["rows"].items():
        assert row["steps"] == pytest.approx(STEPS[name], rel=0.05)
        assert ("--lr 0.4" if name == "at" else "--lr 0.1") in row["flags"]
        for run in (found["runs"][title] for title in row["runs"].values()):
            assert run["PGD 0.3"]["clean_accuracy"] == 90 and run["PGD 0.3"]["num_examples"] == 360
            assert run["minutes"] == len(run["robust"]) / 2 == len(run["clean"]) / 2
            assert run["cpu"] == "of the training"
    assert "--ema 0.9" in found["rows"]["wide"]["flags"]
    tried = found["runs"]["lfr_lr_0.1_lambada_0.02_steps_6_seed_1"]
    assert (tried["robust"][-1], tried["clean"][-1], tried["best"]) == (50, 89.9, 70)
    for lambada in (0.02, 0.1):  # both diverged
        assert found["runs"][f"lfr_lr_0.05_lambada_{lambada}_steps_6_seed_1"]["best"] == 0
    flags = "--defense at --num_steps 4 --step_size 0.15 --lr 0.4"
    out = capsys.readouterr().out
    assert f"| at | `{flags}` | 120 | 90.0 (90.0 to 90.0) | 40.0 (40.0 to 40.0) | " in out
    assert "| at | 12 | `--lr 0.1` | 50.0 | 89.9 |" in out and "| at | `--lr 0.4` | 80.00 |" in out
    assert "| at | `--lr 0.1` | 70.00 |" in out
    assert "| lfr | 6 | `--lr 0.05 --lambada 0.02` | 0.0 | 0.0 |" in out  # diverged
    # The short trainings of the search have a seed of their own and a tenth of the length.
    seeds = {c[c.index("--manualSeed") + 1] for c in train}
    assert seeds == {"1", "2"} and equal_cost.SEARCH_SEED == 1
    # Given again, nothing is run.
    commands.clear()
    assert table(*words) == 0 and not commands


def test_other_flags_have_times_and_runs_of_their_own(commands, table, tmp_path, capsys):
    words = ["--flags=--amp", "--only", "at", "--seeds", 1]
    with pytest.raises(UserError, match="no times of 'digits --amp'"):
        table(*words, "--stages", "search")
    times = TIMES | {"digits --amp": {"at_seconds": 0.25, "relative": RELATIVE}}
    (tmp_path / "step_times.json").write_text(json.dumps(times))
    assert table(*words) == 0
    assert "| 240 | 90.0 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"digits_amp_1"}


def test_what_defines_a_training_names_its_folder(commands, table, tmp_path):
    """So a variant with other flags, and tries of another length, are not taken for done."""
    words = ["--only", "at", "--seeds", 1, "--extra", "wide"]
    assert table(*words, "--ema 0.9") == 0
    commands.clear()
    with pytest.raises(UserError, match="no times of 'digits', wide --ema"):
        table(*words, "--ema 0.99", "--stages", "search")
    times = {"digits": {"at_seconds": 0.5, "relative": RELATIVE | {"wide --ema 0.99": 2.5}}}
    (tmp_path / "step_times.json").write_text(json.dumps(times))
    assert table(*words, "--ema 0.99") == 0
    assert len(commands) == 6 + 2 + 1
    assert all("0.99" in command for command in commands if "_defense" in command[0])
    commands.clear()
    assert table(*words, "--ema 0.99", "--share", 0.2) == 0
    assert len(commands) == 2 * 6


def test_flags_that_fail_with_a_seed_are_out(commands, table, monkeypatch, tmp_path):
    """The best tries are 0.1, 0.4 and 0.2; by two of them a full training ends as a constant."""
    pretend = equal_cost.run

    def falling(command: list[str], output: Path) -> None:
        pretend(command, output)
        if "_eval" not in command[0]:
            path = Path(command[command.index("--checkpoint") + 1], "log.txt")
            if any(
                part in str(path) for part in ("lr_0.1_steps_120_seed_5", "lr_0.4_steps_120_seed_6")
            ):
                lines = path.read_text().splitlines()[:-1]
                path.write_text("\n".join([*lines, "10\t11\t30"]) + "\n")

    monkeypatch.setattr(equal_cost, "run", falling)
    words = ["--only", "at", "--seeds", 5, 6, "--results", tmp_path / "results.json"]
    assert table(*words) == 0
    full = [c for c in commands if "--manualSeed 1 " not in " ".join(c) and "_defense" in c[0]]
    rates = [(c[c.index("--lr") + 1], c[c.index("--manualSeed") + 1]) for c in full]
    assert rates == [("0.1", "5"), ("0.4", "5"), ("0.4", "6"), ("0.2", "5"), ("0.2", "6")]
    found = json.loads((tmp_path / "results.json").read_text())
    assert "--lr 0.2" in found["rows"]["at"]["flags"] and len(found["rows"]["at"]["runs"]) == 2
    ends = [f"at_lr_{end}" for end in ("0.1_steps_120_seed_5", "0.4_steps_120_seed_6")]
    assert [found["runs"][end]["best"] for end in ends] == [0, 0]
    assert found["runs"]["at_lr_0.2_steps_120_seed_5"]["best"] == 70
    commands.clear()
    assert table(*words) == 0 and not commands


def test_nothing_is_chosen_before_all_that_compete_are_trained(commands, table, tmp_path):
    words = ["--only", "at", "--seeds", 1]
    for stages, missing in ((["search"], "finals"), (["search", "finals"], "train")):
        with pytest.raises(UserError, match="is not trained: run the stages before"):
            table(*words, "--stages", missing)
        assert table(*words, "--stages", *stages) == 0
    assert table(*words, "--stages", "train") == 0
    with pytest.raises(UserError, match="is not attacked: run the stages before"):
        table(*words, "--stages", "table")


def test_an_interrupted_search_is_not_a_choice(commands, table, monkeypatch, capsys):
    def fail(command: list[str], output: Path) -> None:
        output.write_text("killed")
        raise UserError("MNIST_defense.py was interrupted")

    monkeypatch.setattr(equal_cost, "run", fail)
    with pytest.raises(UserError, match="the same command resumes them"):
        table("--only", "at")
    assert not capsys.readouterr().out


def test_an_interrupted_training_has_not_failed(commands, table, monkeypatch):
    """Not even where its last epoch is a bad one."""

    def stop(command: list[str], output: Path) -> None:
        folder = Path(command[command.index("--checkpoint") + 1])
        folder.mkdir()
        rows = ["Held-out Robust Acc.\tHeld-out Acc.\tSeconds", "50\t60\t30", "10\t20\t30"]
        (folder / "log.txt").write_text("\n".join(rows) + "\n")
        raise UserError("MNIST_defense.py was interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(equal_cost, "run", stop)
        with pytest.raises(UserError, match="the same command resumes them"):
            table("--only", "at", "--stages", "search", "--share", 1)
    commands.clear()
    assert table("--only", "at", "--stages", "search", "--share", 1) == 0
    assert len(commands) == 6


def test_the_cost_of_a_step_is_measured_once(table, commands, tmp_path):
    path = tmp_path / "step_times.json"
    path.write_text(json.dumps({"MNIST": {"kept": 1}}))
    words = ["--only", "none", "lfr", "--stages", "time", "--turns", 1]
    assert table(*words) == 0
    times = json.loads(path.read_text())
    assert times["MNIST"] == {"kept": 1}
    relative = times["digits"]["relative"]
    assert set(relative) == {"none", "lfr"} and relative["none"] < relative["lfr"]
    assert times["digits"]["at_seconds"] > 0
    written = path.stat().st_mtime_ns
    assert table(*words) == 0 and path.stat().st_mtime_ns == written


def test_what_is_timed_is_what_is_trained(table, commands, monkeypatch):
    class Built(Exception):
        pass

    def build(network, defense):
        raise Built(network.arch, defense)

    monkeypatch.setattr(equal_cost, "DefenseLoss", build)
    flags = "-a wrn --depth 10 --norm_layer group --norm l_2 --epsilon 1.5"
    with pytest.raises(Built) as built:
        table("--stages", "time", "--flags", flags)
    arch, defense = built.value.args
    assert arch["widen_factor"] == MNIST_defense.DEFAULTS["widen_factor"] != 10
    assert (arch["name"], arch["depth"], arch["norm_layer"]) == ("wrn", 10, "group")
    assert (defense.name, defense.ball.norm, defense.ball.epsilon) == ("at", "l_2", 1.5)


def test_a_start_by_at_costs_what_at_costs(table, commands, tmp_path, monkeypatch):
    seconds = itertools.cycle([1.0, 3.0])  # of a step by at, and of one by the variant's defense
    monkeypatch.setattr(equal_cost, "timeit", lambda step, number: next(seconds))
    words = ["--only", "--extra", "mix", "--at_start 0.25", "--stages", "time", "--turns", 1]
    (tmp_path / "step_times.json").unlink()
    assert table(*words) == 0
    found = json.loads((tmp_path / "step_times.json").read_text())["digits"]["relative"]
    assert found == {"mix --at_start 0.25": 0.25 + 0.75 * 3}


@pytest.mark.parametrize(
    "words",
    [
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--jobs", "0"],
        ["--only"],
        ["--extra", "at", ""],
        ["--extra", "a", "", "--extra", "a", "--ema 0.9"],
        ["--seeds", "1", "1"],
    ],
)
def test_senseless_values_are_refused(words, table, commands, capsys):
    with pytest.raises(SystemExit, match="2"):
        table(*words)
    assert words[0] in capsys.readouterr().err


def test_a_failing_script_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"MNIST_eval\.py ended with exit code 2, see .*log$"):
        scripts.run(["MNIST_eval.py", "--no_such_flag"], tmp_path / "log")
    assert "--no_such_flag" in (tmp_path / "log").read_text()


def test_several_runs_go_on_when_one_fails(capsys):
    done = []

    def work(number: int) -> None:
        if number == 2:
            raise UserError("two")
        done.append(number)

    with pytest.raises(UserError, match="1 of 3 failed; the same command resumes them"):
        scripts.run_each(work, [(1,), (2,), (3,)], jobs=2)
    assert sorted(done) == [1, 3] and capsys.readouterr().err == "two\n"
    scripts.run_each(work, [], 1)


def test_lost_run_folders(commands, table, tmp_path, monkeypatch):
    """The results are enough for a table; a network that is still to be attacked is trained."""
    words = ["--only", "at", "igr", "--seeds", 1, 2, "--results", tmp_path / "results.json"]
    assert table(*words) == 0
    commands.clear()
    shutil.rmtree(tmp_path / "runs")
    assert table(*words) == 0 and not commands
    found = json.loads((tmp_path / "results.json").read_text())
    del found["runs"]["at_lr_0.4_steps_120_seed_2"]["PGD 0.3"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert table(*words) == 0
    assert [command[0] for command in commands] == ["MNIST_defense.py", "MNIST_eval.py"]
    assert commands[0][commands[0].index("--manualSeed") + 1] == "2"
    # Verdicts of two networks never meet in one row.
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setitem(
        equal_cost.SETTINGS,
        "digits",
        (*equal_cost.SETTINGS["digits"][:2], {"PGD 0.3": 360, "FGSM 0.3": 9}),
    )
    with pytest.raises(
        UserError, match=r"model_best\.pth\.tar is missing, and .* has attacks on it"
    ):
        table(*words)
    with pytest.raises(UserError, match="is of digits_1, not digits_2"):
        table(*words, "--minutes", 2)


def test_spread_over_seeds():
    assert scripts.spread([1.0]) == "1.0"
    assert scripts.spread([-1.0, 4.0, float("nan")]) == "1.5 (-1.0 to 4.0)"
    assert scripts.spread([float("nan")]) == "-"

"""Run folders: locked, and nothing in them half-written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from utils import run_folder
from utils.errors import UserError
from utils.run_folder import BEST, CHECKPOINT, LOG, Log, RunFolder, read_log, write_atomic

UNUSABLE = "run folder .*: (file exists|not a directory|no such file)"
STATE = {"state_dict": {"w": torch.arange(600.0)}, "epoch": 3}

# ----------------------------------------------------------------------------- run folder


def test_a_run_folder(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as run:
        run.save(STATE, CHECKPOINT, BEST)
        Log(run.path / LOG, ["epoch"]).append({"epoch": 1})
        names = {entry.name for entry in run.path.iterdir()}
        assert names == {".lock", CHECKPOINT, BEST, "log.txt"}
        assert (run.path / CHECKPOINT).read_bytes() == (run.path / BEST).read_bytes()
        assert run.scalars == run.path / "scalars"


def test_one_run_a_folder(tmp_path):
    with RunFolder(tmp_path), pytest.raises(UserError, match=f"in use.*process {os.getpid()}"):
        RunFolder(tmp_path)
    with RunFolder(tmp_path):  # given back
        pass


def in_child(function, *arguments):
    """Start ``function(send, *arguments)`` in a process of its own; what it sends arrives here."""
    context = multiprocessing.get_context("fork")  # no second import of torch
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender.send, *arguments), daemon=True)
    process.start()
    return process, receiver.recv


def hold_a_folder(send, path):
    run = RunFolder(path)
    (run.path / f".{CHECKPOINT}.tmp-1").write_text("half")
    send("ready")
    time.sleep(60)


def test_a_killed_run_leaves_no_lock(tmp_path):
    process, receive = in_child(hold_a_folder, tmp_path)
    assert receive() == "ready"
    with pytest.raises(UserError, match=f"process {process.pid}"):
        RunFolder(tmp_path)
    process.kill()
    process.join()
    with RunFolder(tmp_path):
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]  # the half file is gone


def test_a_folder_that_holds_a_run(tmp_path):
    with RunFolder(tmp_path) as run:
        run.save(STATE, CHECKPOINT)
        Log(run.path / LOG, ["epoch"]).append({"epoch": 1})
        (run.scalars).mkdir()
        (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds a run: --resume it, --overwrite it or"):
        RunFolder(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        RunFolder(tmp_path, resume_from=tmp_path / "elsewhere" / CHECKPOINT)
    with RunFolder(tmp_path, resume_from=tmp_path / "." / CHECKPOINT) as run:
        assert (run.path / CHECKPOINT).exists()
    (tmp_path / "epoch1.pth.tar").write_bytes(b"an earlier state")
    with pytest.raises(UserError, match="what came after would be lost; --checkpoint names"):
        RunFolder(tmp_path, resume_from=tmp_path / "epoch1.pth.tar")
    with RunFolder(tmp_path, overwrite=True):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_a_run_that_moves_takes_its_best_network_along(tmp_path):
    with RunFolder(tmp_path / "old") as old:
        old.save(STATE, BEST, "epoch1.pth.tar", CHECKPOINT)
    with RunFolder(tmp_path / "new", resume_from=(old.path / CHECKPOINT)) as new:
        assert (new.path / BEST).read_bytes() == (old.path / BEST).read_bytes() and not (
            new.path / CHECKPOINT
        ).exists()
    with RunFolder(tmp_path / "earlier", resume_from=old.path / "epoch1.pth.tar") as earlier:
        assert not (earlier.path / BEST).exists()  # that epoch's best may have been another
    (old.path / BEST).unlink()
    with RunFolder(tmp_path / "none", resume_from=(old.path / CHECKPOINT)) as none:
        assert not (none.path / BEST).exists()


@pytest.mark.parametrize("how", ["no fcntl", "refused"])
def test_a_system_without_locks(tmp_path, monkeypatch, capsys, how):
    if how == "no fcntl":  # Windows
        monkeypatch.setattr(run_folder, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with RunFolder(tmp_path) as run:
        run.save(STATE, CHECKPOINT)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not locked against a second run" in err


def test_places_that_cannot_be_run_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=UNUSABLE):
        RunFolder(tmp_path / "file")
    with pytest.raises(UserError, match=UNUSABLE):
        RunFolder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=UNUSABLE):
        RunFolder("/proc/run")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    write_atomic(tmp_path / CHECKPOINT, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=r"no space left.*needed.*intact: --resume"):
        write_atomic(tmp_path / CHECKPOINT, b"new")
    assert (tmp_path / CHECKPOINT).read_bytes() == b"old"
    assert os.listdir(tmp_path) == [CHECKPOINT]


def fill_the_disk(send, path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    run = RunFolder(path, resume_from=path / CHECKPOINT)
    log = Log(path / LOG, ["x"])
    try:
        run.save({"state_dict": {"w": torch.ones(9000)}}, CHECKPOINT)
    except UserError as error:
        send(str(error))
    try:
        while True:
            log.append({"x": 1})
    except UserError as error:
        send(str(error))


def test_a_file_system_that_is_full(tmp_path):
    """The kernel's own limit on file sizes stands for a full disk, in a process of its own."""
    with RunFolder(tmp_path) as run:
        run.save(STATE, CHECKPOINT)
    before = (tmp_path / CHECKPOINT).read_bytes()
    process, receive = in_child(fill_the_disk, tmp_path)
    line = receive()
    assert f"{CHECKPOINT}: file too large" in line and "MB needed" in line
    line = receive()
    assert "log.txt: file too large" in line and "--resume" in line
    process.join()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert set(os.listdir(tmp_path)) == {".lock", CHECKPOINT, "log.txt"}
    assert len(set(read_log(tmp_path / "log.txt")["x"])) == 1


# ------------------------------------------------------------------------------------ log


def test_a_log_has_a_column_for_each_name(tmp_path):
    log = Log(tmp_path / LOG, ("Learning Rate", "Valid Acc.", "loss normal"))
    log.append({"Learning Rate": 0.1, "loss normal": 12})
    assert (tmp_path / LOG).read_text().splitlines() == [
        "Learning Rate\tValid Acc.\tloss normal",
        "0.1\tnan\t12",
    ]


def test_a_resumed_log_keeps_the_epochs_before(tmp_path):
    path = tmp_path / "log.txt"
    log = Log(path, ("a", "b"))
    for i in range(5):
        log.append({"a": i, "b": i / 7})
    with open(path, "a") as file:
        file.write("5\t0.7")  # a kill in the middle of a row
    log = Log(path, ("a", "c", "b"), epoch=3)
    log.append({"a": 3, "b": 9, "c": 1})
    table = read_log(path)
    assert list(table) == ["a", "c", "b"] and table["a"] == [0, 1, 2, 3]
    assert table["b"][1] == pytest.approx(1 / 7, rel=1e-7) and table["c"][3] == 1
    Log(path, ("a",), epoch=99)
    assert len(read_log(path)["a"]) == 4
    Log(path, ("a",))
    assert read_log(path) == {"a": []}


def test_the_epochs_of_a_log_need_not_begin_with_the_first(tmp_path):
    log = Log(path := tmp_path / "log.txt", ("a", "Epoch"), epoch=7)
    for epoch in (8, 9, 10):
        log.append({"a": epoch / 10, "Epoch": epoch})
    Log(path, ("a", "Epoch"), epoch=9)
    assert read_log(path) == {"a": [0.8, 0.9], "Epoch": [8, 9]}


def test_a_log_of_an_earlier_version_is_read_under_todays_names(tmp_path):
    path, old = tmp_path / "log.txt", ("Valid Acc.", "Val Acc.", "Val Robust Acc.", "Mode Gap")
    Log(path, old).append({"Valid Acc.": 1, "Val Acc.": 2, "Val Robust Acc.": 3, "Mode Gap": 4})
    new = ("Valid Acc.", "Held-out Acc.", "Held-out Robust Acc.", "BN Gap")
    assert read_log(path) == {name: [i + 1] for i, name in enumerate(new)}
    Log(path, new, epoch=1).append({"BN Gap": 5})
    assert path.read_text().splitlines() == ["\t".join(new), "1\t2\t3\t4", "nan\tnan\tnan\t5"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["log.txt", "args.json"])
def test_a_file_of_something_else_is_not_replaced(tmp_path, name, overwrite):
    (file := tmp_path / name).write_text("my notes\n")
    (scalar := tmp_path / "scalars" / "mine").parent.mkdir()
    scalar.touch()
    with pytest.raises(UserError, match="no run's"), RunFolder(tmp_path, overwrite=overwrite):
        pass
    assert file.read_text() == "my notes\n" and scalar.exists()


def test_a_log_of_something_else_is_not_continued(tmp_path):
    (log := tmp_path / "log.txt").write_text("my notes\n")
    with pytest.raises(UserError, match="not the log of a run"):
        Log(log, ("a", "Epoch"), epoch=3)
    assert log.read_text() == "my notes\n"


def test_a_run_that_was_killed_in_its_first_epoch_may_begin_again(tmp_path):
    Log(tmp_path / "log.txt", ("Valid Acc.",))
    (tmp_path / "args.json").write_text("{}")
    with RunFolder(tmp_path):
        pass


def test_a_log_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_log(tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("a\tb\n1\tx\n")
    with pytest.raises(UserError, match=r"log.txt: could not convert"):
        read_log(tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("")
    assert read_log(tmp_path / "log.txt") == {}

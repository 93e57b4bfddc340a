"""The published networks under savedModel/: their files are whole and as good as it says there.

``savedModel/SHA256SUMS`` (checked as well by ``cd savedModel && sha256sum -c SHA256SUMS``) lists
every checkpoint; ``savedModel/results.json`` has what each ``model_best.pth.tar`` reaches on the
first 100 images of its test set::

    {"MNIST/lr_0.1_.../model_best.pth.tar": {"dataset": "MNIST", "clean": 100.0, "pgd": 98.0}}

in percent, PGD by the published setting and seed 0, as the evaluation scripts measure it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from utils.attacks import family, gradient_budget, percent, pgd
from utils.datasets import find_image_folder, load_dataset
from utils.networks import load_network, sha256_of
from utils.run_folder import read_log

PLACE = Path(__file__).resolve().parent.parent / "savedModel"
SUMS, RESULTS = "SHA256SUMS", "results.json"
IMAGES = 100
TOLERANCE = 1  # percent point, one image; other processors round otherwise


def checkpoints(place: Path) -> list[str]:
    """Every checkpoint, relative to ``place``."""
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*.pth.tar"))


def wrong_sums(place: Path) -> list[str]:
    """What is wrong with ``SHA256SUMS``: a line for every file."""
    lines = (place / SUMS).read_text().splitlines() if (place / SUMS).exists() else []
    listed: dict[str, str] = {}
    wrong = []
    for line in lines:
        # sha256sum's format: digest, space, space (text) or star (binary), name
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            wrong.append(f"not a line of sha256sum: {line[:80]!r}")
        else:
            listed[match[2]] = match[1]
    for name in sorted({*listed, *checkpoints(place)}):
        if name not in listed:
            wrong.append(f"{name}: not listed")
        elif not (place / name).is_file():
            wrong.append(f"{name}: listed, but not there")
        elif sha256_of(place / name) != listed[name]:
            wrong.append(f"{name}: another hash")
    return wrong


MODELS = checkpoints(PLACE)
BEST = [name for name in MODELS if name.endswith("model_best.pth.tar")]
published = pytest.mark.skipif(not MODELS, reason="savedModel/ holds no networks")


# -- the check itself ---------------------------------------------------------------------------


def test_the_check_of_the_sums(tmp_path):
    (tmp_path / "MNIST").mkdir()
    best, newest = (tmp_path / "MNIST" / f"{name}.pth.tar" for name in ("model_best", "checkpoint"))
    best.write_bytes(b"weights")
    newest.write_bytes(b"more")
    right = hashlib.sha256(b"weights").hexdigest()
    assert wrong_sums(tmp_path) == [
        "MNIST/checkpoint.pth.tar: not listed",
        "MNIST/model_best.pth.tar: not listed",
    ]
    newest.unlink()
    (tmp_path / SUMS).write_text(f"{right}  MNIST/model_best.pth.tar\n")
    assert wrong_sums(tmp_path) == []
    (tmp_path / SUMS).write_text(
        f"{right} *MNIST/model_best.pth.tar\n{right}  gone.pth.tar\nhello\n"
    )
    assert wrong_sums(tmp_path) == [
        "not a line of sha256sum: 'hello'",
        "gone.pth.tar: listed, but not there",
    ]
    best.write_bytes(b"Weights")
    assert "MNIST/model_best.pth.tar: another hash" in wrong_sums(tmp_path)


# -- the networks -------------------------------------------------------------------------------


@published
def test_the_sums():
    assert wrong_sums(PLACE) == []


@published
@pytest.mark.parametrize("name", MODELS or ["none"])
def test_a_network_is_whole(name):
    """It loads, carries its architecture, and lies beside the record of its run."""
    network, checkpoint = load_network(PLACE / name)
    assert checkpoint["arch"] == network.arch
    assert not network.training
    folder = (PLACE / name).parent
    record = json.loads((folder / "args.json").read_text())
    assert record["architecture"] == network.arch
    assert checkpoint["dataset"].split()[0] == record["dataset"].split()[0]  # "(image folder)"
    epochs = len(read_log(folder / "log.txt")["Valid Acc."])
    assert 0 < checkpoint["epoch"] <= epochs
    if words := re.match(r"lr_([\d.]+)_lambada_([\d.]+)", folder.name):  # the path says it
        arguments = record["arguments"]
        assert [*map(float, words.groups())] == [arguments["lr"], arguments["lambada"]]


@published
def test_a_kept_report_is_of_the_network_beside_it():
    """AutoAttack takes hours, so its report is kept; of another checkpoint it would say nothing."""
    reports = sorted(PLACE.rglob("autoattack.json"))
    assert reports
    for path in reports:
        report = json.loads(path.read_text())
        assert report["checkpoint_sha256"] == sha256_of(path.parent / "model_best.pth.tar")
        assert not Path(report["model_path"]).is_absolute()
        found = report["attacks"]["AutoAttack"]
        after = list(found["accuracy_after"].values())
        assert after == sorted(after, reverse=True)  # a stage attacks what the one before left
        assert found["robust_accuracy"] == after[-1] <= report["clean_accuracy"]


@published
@pytest.mark.slow  # the only one: up to half a minute for each network
@pytest.mark.parametrize("name", BEST or ["none"])
def test_a_network_is_as_good_as_published(name, data_dir):
    results = json.loads((PLACE / RESULTS).read_text())
    assert name in results, f"{name} is not in savedModel/{RESULTS}"
    entry = results[name]
    network, checkpoint = load_network(PLACE / name)
    dataset = checkpoint["args"]["dataset"]
    # load_dataset would download what is missing.
    if find_image_folder(dataset, data_dir) is None and not (data_dir / dataset / "raw").is_dir():
        pytest.skip(f"no {dataset} in {data_dir}")
    data = load_dataset(dataset, data_dir, train=False)
    if entry["dataset"] != data.name:
        pytest.skip(f"measured on {entry['dataset']}, here is {data.name}")

    network = network.to(memory_format=torch.channels_last)
    index = torch.arange(IMAGES)
    x = data.float_images(index).contiguous(memory_format=torch.channels_last)
    y = data.labels[index]
    with torch.no_grad():
        clean = int((network(x).argmax(1) == y).sum())
    budget = gradient_budget("PGD", family(dataset, data.in_channels))
    robust = int(pgd(network, x, y, budget, seed=0, index=index).robust.sum())
    assert percent(clean, IMAGES) == pytest.approx(entry["clean"], abs=TOLERANCE)
    assert percent(robust, IMAGES) == pytest.approx(entry["pgd"], abs=TOLERANCE)

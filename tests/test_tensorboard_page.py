"""TensorBoard, started as a user does, serves every curve, picture and card of a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing

import pytest
import torch

from utils.board import LAYOUT, Board, draw_grid

RUN = "MNIST/lr_0.01_lambada_0.02_rs_1000/scalars"
TAGS = ("Loss_epoch/train_loss", "Acc_epoch/test_acc", "Loss_iter/Loss", "Robust/test_pgd")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """``ask("scalars/tags")``: what a started TensorBoard answers to /data/plugin/..."""
    folder = tmp_path_factory.mktemp("SavedModels")
    with closing(Board(str(folder / RUN))) as board:
        board.describe("python MNIST_defense.py --dataset MNIST", {"epsilon": 0.3}, "ab")
        for step in range(5):
            board.scalars(step, dict.fromkeys(TAGS, step / 2))
        x = torch.rand(10, 1, 28, 28)
        picture = draw_grid(x, 1 - x, torch.arange(10), torch.arange(10), "0123456789")
        board.add_image("Images/x_adv", picture, 0)
    words = ["-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    log = open(folder / "tensorboard.log", "w+")  # noqa: SIM115
    process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)

    def question(path: str, **query: str) -> object:
        for _ in range(100):  # the server starts, and then reads the files
            log.seek(0)
            address = [word for word in log.read().split() if word.startswith("http://localhost:")]
            if address:
                url = f"{address[0].rstrip('/')}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
                try:
                    with urllib.request.urlopen(url, timeout=10) as reply:
                        if found := json.load(reply):
                            return found
                except urllib.error.HTTPError:
                    pass  # not read yet
            assert process.poll() is None, "TensorBoard has ended"
            time.sleep(0.2)
        raise AssertionError(f"no answer to {path}")

    yield question
    process.terminate()
    process.wait()
    log.close()


def test_curves(ask):
    tags = ask("scalars/tags")
    assert list(tags) == [RUN] and sorted(tags[RUN]) == sorted(TAGS)
    for tag in TAGS:
        points = ask("scalars/scalars", run=RUN, tag=tag)
        assert [point[1:] for point in points] == [[step, step / 2] for step in range(5)]


def test_picture_command_and_charts(ask):
    assert ask("images/tags")[RUN]["Images/x_adv"]["samples"] == 1
    card = json.dumps(ask("text/text", run=RUN, tag="Run/command/text_summary"))
    assert "python MNIST_defense.py --dataset MNIST" in card and "1 b" in card
    layout = ask("custom_scalars/layout")
    charts = {category["title"]: category["chart"] for category in layout["category"]}
    assert set(charts) == set(LAYOUT)
    for title, described in LAYOUT.items():
        assert [chart["title"] for chart in charts[title]] == list(described)


def test_runs_are_compared_by_their_flags(ask):
    page = ask("hparams/experiment", request="{}")
    assert [flag["name"] for flag in page["hparamInfos"]] == ["epsilon"]
    assert {metric["name"]["tag"] for metric in page["metricInfos"]} == set(TAGS)

"""TensorBoard in a real browser: every published curve has its card, and the cards are drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tools.browser import Browser, find_browser
from tools.tensorboard_screenshot import show, tensorboard
from utils.board import Board

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")

EPOCHS, STEPS = 4, 20


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser, and TensorBoard's address for a folder of runs that holds one run."""
    folder = tmp_path_factory.mktemp("SavedModels")
    board = Board(folder / "MNIST" / "lr_0.01_lambada_0.02_rs_1000" / "scalars")
    board.describe("python MNIST_defense.py --dataset MNIST --epochs 4", {"epsilon": 0.3})
    x = torch.rand(10, 1, 28, 28)
    for epoch in range(EPOCHS):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            loss = 1 / (1 + step)
            values = {"loss": 2 * loss, "loss_normal": loss, "loss_gradient": 9, "grad_part": loss}
            board.iteration(step, values)
        board.epoch(
            epoch,
            {
                "train_loss": 1 / (epoch + 1),
                "test_loss": 2 / (epoch + 1),
                "loss_normal": 0.5 / (epoch + 1),
                "loss_grad": 10 / (epoch + 1),
                "train_acc": 80 + epoch,
                "test_acc": 78 + epoch,
                "learning_rate": 0.01,
                "seconds": 3.0,
                "Robust/test_pgd": 50 + 2 * epoch,
                "Mode_gap/gap": 0.1,
            },
        )
        board.images(epoch, x, 1 - x, torch.arange(10), torch.arange(10), list("0123456789"))
    board.close()
    with tensorboard(folder) as address, Browser(1440, 4000) as browser:
        yield browser, address


def test_every_curve_has_a_drawn_card(page, tmp_path):
    browser, address = page
    text = show(browser, address, "timeseries")
    assert "MNIST/lr_0.01_lambada_0.02_rs_1000/scalars" in text.replace(" ", "")
    tags = browser.evaluate("[...document.querySelectorAll('scalar-card .tag')].map(e => e.title)")
    assert sorted(tags) == [
        "Acc_epoch/test_acc",
        "Acc_epoch/train_Acc",
        "Loss_epoch/loss_grad",
        "Loss_epoch/loss_normal",
        "Loss_epoch/test_loss",
        "Loss_epoch/train_loss",
        "Loss_iter/Loss",
        "Loss_iter/Loss_gradient",
        "Loss_iter/Loss_normal",
        "Loss_iter/grad_part",
        "Mode_gap/gap",
        "Robust/test_pgd",
        "Schedule/learning_rate",
        "Time/seconds_per_epoch",
    ]
    # One run: one line in the list of runs, not one for each curve.
    swatches = browser.evaluate(
        """[...document.querySelectorAll("runs-data-table .run-color-swatch")].map(
            (element) => getComputedStyle(element).backgroundColor)"""
    )
    assert len(swatches) == 1

    browser.screenshot(tmp_path / "page.png")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    colour = [int(value) for value in re.findall(r"\d+", swatches[0])[:3]]
    boxes = browser.evaluate(
        """[...document.querySelectorAll("scalar-card line-chart")].map((element) => {
            const box = element.getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom].map(Math.round);
        })"""
    )
    assert len(boxes) == len(tags)
    for tag, (left, top, right, bottom) in zip(tags, boxes):
        inside = picture[top:bottom, left:right]
        drawn = (np.abs(inside - colour).max(axis=2) < 60).any(axis=0).sum()
        assert drawn > (right - left) / 2, f"no curve in the card of {tag}"


def test_the_picture_is_shown(page):
    browser, address = page
    show(browser, address, "timeseries")
    size = browser.wait_for(
        """(() => {
            const image = document.querySelector("image-card img");
            return image && image.complete && [image.naturalWidth, image.naturalHeight];
        })()"""
    )
    assert size == [88 + 10 * 90, 3 * (84 + 24) + 6]


def test_curves_that_belong_together_share_a_chart(page):
    browser, address = page
    text = show(browser, address, "custom_scalars")
    assert "loss: training, test" in text
    assert "accuracy (%): clean and under PGD, test" in text
    assert text.count("Matches (2)") >= 3
    assert "Matches (3)" in text  # total, natural and weighted flatness of a step


def test_the_command_is_shown(page):
    browser, address = page
    text = show(browser, address, "text")
    assert "python MNIST_defense.py --dataset MNIST --epochs 4" in text
    assert "epsilon" in text and "0.3" in text

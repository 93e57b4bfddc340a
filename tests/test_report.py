"""The page of an evaluation: it says what the JSON report says, and needs nothing but itself."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import MNIST_eval
from utils import evaluation, report
from utils.attacks import Budget
from utils.data import ImageSet
from utils.datasets import load_dataset
from utils.errors import UserError
from utils.runtime import Processes


def nearest_mean():
    """Answers with the class whose mean is nearest: mostly right, not at all robust."""
    data = load_dataset("digits", ".", train=True)
    x = data.float_images().flatten(1)
    means = torch.stack([x[data.labels == label].mean(0) for label in range(10)])
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    network[1].load_state_dict({"weight": means, "bias": -means.square().sum(1) / 2})
    return network


def evaluate(*flags):
    given = ["--network", f"{__name__}:nearest_mean", "--dataset", "digits", "--epsilon", "0.15"]
    given += ["--num_examples", 60, "--num_steps", 5, "--step_size", 0.05, *flags]
    return evaluation.run_evaluation(MNIST_eval.DEFAULTS, "", list(map(str, given)))


class Page(HTMLParser):
    """What a browser would see: texts by the tag before, tables, and what it would load."""

    def __init__(self, path) -> None:
        super().__init__()
        self.texts, self.tables, self.sources, self.tags = [], [], [], ["html"]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data) -> None:
        self.texts.append((self.tags[-1], data.strip()))
        if self.tags[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.strip()

    def counts(self, table):
        return torch.tensor(
            [[int(cell or 0) for cell in row[1:]] for row in self.tables[table][1:]]
        )


def test_the_page_says_what_the_json_report_says(tmp_path, monkeypatch, capsys):
    def no_library(norm, shape):
        raise UserError("not installed")

    monkeypatch.setattr("utils.attacks.masking.require_library", no_library)
    output, path = tmp_path / "results.json", tmp_path / "page.html"
    assert evaluate("--output", output, "--attack_method", "PGD", "--restarts", 2) == 0
    flags = "--restarts 2 --sanity --attack_method FGSM PGD DDNL2".split()  # PGD is done
    for _ in range(2):  # our own page may be replaced
        assert evaluate("--output", output, "--report", path, *flags) == 0
    results, page = json.loads(output.read_text()), Page(path)
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in page.tables[0]] == ["attack", "PGD", "FGSM", "DDNL2"]
    for row, entry in zip(page.tables[0][1:], results["attacks"].values()):
        assert " ".join(row) in printed
        assert row[1:3] == [f"{entry[key]:.2f}" for key in ("clean_accuracy", "robust_accuracy")]
        assert row[-1] == f"{entry['seconds']:.1f}"
    assert page.tables[0][3][6] == f"{results['attacks']['DDNL2']['median_l2']:.2f}"

    clean, robust = results["clean_accuracy"], results["attacks"]["PGD"]["robust_accuracy"]
    curve = [text for tag, text in page.texts if tag == "text" and text][5:]
    assert curve[1::2] == ["0", "0.05", "0.1", "0.15", "0.225", "0.3"]
    assert (curve[0], curve[6]) == (f"{clean:.1f}", f"{robust:.1f}")
    assert page.counts(1).sum() == page.counts(2).sum() == 60
    assert [100 * int(page.counts(i).trace()) / 60 for i in (1, 2)] == pytest.approx(
        [clean, robust]
    )

    data, text = load_dataset("digits", ".", train=False), " ".join(text for _, text in page.texts)
    true, wrong, number = re.search(r"(\d) → (\d) image (\d+), changed by up to", text).groups()
    assert int(true) == data.labels[int(number)] != int(wrong)
    pictures = [base64.b64decode(source.partition("base64,")[2]) for source in page.sources]
    first, attacked, _ = (pil_to_tensor(Image.open(io.BytesIO(png))) for png in pictures[:3])
    assert torch.equal(first, data.images[int(number)])
    assert 0 < (attacked.int() - first).abs().max() <= round(0.15 * 255)
    assert nearest_mean()(attacked[None] / 255).argmax() == int(wrong)
    assert len(pictures) == 3 * min(round((clean - robust) * 0.6), 10)
    for check in results["sanity"]:
        assert f"{check['verdict']} {check['name']} {check['text']}" in text
    for key in ("command", "checkpoint_sha256", "data_sha256"):
        assert results[key] in text
    assert "--sanity" in results["command"]
    assert "5 x 0.05, 2 starts) on the first 60 images" in text


def write(path, classes, epsilon=0.3, outputs=None, norm="l_inf"):
    """The page of an untrained network on random colour images that it gets right."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, outputs or len(classes))).eval()
    images = torch.randint(256, (30, 3, 6, 5)).byte()
    labels = network(images / 255).argmax(1) % len(classes)
    data = ImageSet("<i>mine</i>", images, labels, classes)
    budget = Budget(norm, epsilon, 3, epsilon / 2)
    entry = {"robust_accuracy": 0.0}
    results = {"attacks": {"PGD": entry}, "command": "python <x>", "seed": 0, "model_path": None}
    results |= {"clean_accuracy": 10.0, "versions": {}, "num_examples": 30, "test_set": 30}
    results |= {"split": "test", "checkpoint_sha256": "0", "data_sha256": "1"}
    args = argparse.Namespace(report=path, network="<u>:x", seed=0, test_batch=7)
    report.write_page(args, network, data, budget, results, [["attack"], ["PGD"]])
    return Page(path)


@pytest.mark.parametrize(("norm", "epsilon"), [("l_inf", 0.3), ("l_2", 3.0)])
def test_names_are_text_and_nothing_is_loaded(tmp_path, norm, epsilon):
    names = ("<b>", "猫 & \"é'", "\udc80", "x" * 40)
    page = write(tmp_path / "page.html", names, epsilon, norm=norm)
    assert page.tables[1][0][1:] == [*names[:2], "?", "x" * 15 + "…"]
    assert ("title", "Sequential on <i>mine</i>") in page.texts
    assert {names[0], names[3]} <= {text for tag, text in page.texts if tag == "b"}
    assert not {"script", "link", "i", "u", "x"} & set(page.tags)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not any(word in text for word in ("http://", "https://", "url(", "@import"))
    assert "default-src 'none'" in text


def test_many_classes_and_no_radius(tmp_path):
    page = write(tmp_path / "page.html", ("a", "b"), epsilon=0.0, outputs=40)
    assert len(page.tables) == 1  # the network answers with classes that the data lack
    assert any("classes are too many" in text for _, text in page.texts)
    assert any(text.startswith("0 images were right") for _, text in page.texts)


def test_a_page_replaces_nothing_else_and_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    other = tmp_path / "page.html"
    for content in (b"", b"PK\x03\x04 a checkpoint", b"<!doctype html>\n<p>of somebody else"):
        other.write_bytes(content)
        with pytest.raises(UserError, match=r"--report .*page\.html: exists and is no page"):
            evaluate("--report", other)
        assert other.read_bytes() == content
    for path, words in (("missing/x.html", "folder is missing"), (".", "is a directory")):
        with pytest.raises(UserError, match=words):
            evaluate("--report", tmp_path / path)
    for flags in (["--report", ""], ["--report", "./x", "--output", "x"]):
        with pytest.raises(SystemExit):
            evaluate(*flags)
    assert "--report: got ''" in (lines := capsys.readouterr().err)
    assert "--report and --output both name ./x" in lines
    several = contextlib.nullcontext(Processes(torch.device("cpu"), 0, 2))
    monkeypatch.setattr(evaluation, "processes", lambda *_: several)
    with pytest.raises(UserError, match="--report works in one process"):
        evaluate("--report", tmp_path / "new.html")

"""The loops: means, schedules, stops in the middle, and measures with known answers."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from utils.data import Batches, ImageSet
from utils.defenses import Defense, DefenseLoss
from utils.engine import (
    Progress,
    bn_gap,
    evaluate,
    probe,
    schedules,
    train_one_epoch,
)
from utils.errors import UserError
from utils.lfr import NORMS, Ball, LossTerms
from utils.runtime import Processes
from utils.training import _Training

HERE = Processes(torch.device("cpu"))


def imageset(count: int = 11, channels: int = 1, size: int = 4, classes: int = 3) -> ImageSet:
    torch.manual_seed(9)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    names = tuple(str(label) for label in range(classes))
    return ImageSet("random", images, torch.arange(count) % classes, names)


class Dense(nn.Module):
    def __init__(self, pixels: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.dense = nn.Linear(pixels, classes)

    def forward(self, x):
        return self.dense(x.flatten(1))


def epoch_of(loss_of, network, progress=None, batches=None, **options):
    settings = {
        "rate": lambda when: 0.1,
        "max_batches": 3,
        **options,
    }
    batches = batches or Batches(imageset(), 4, shuffle=True, seed=3)
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(network.parameters(), 0.1)
    progress = progress or Progress()
    return train_one_epoch(loss_of, batches, optimizer, progress, HERE, **settings), progress


# -- train_one_epoch ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit, moved", [(0, 10), (20, 10), (5, 5)])
def test_a_long_gradient_is_scaled_down_as_a_whole(limit, moved):
    """48 weights with slope 1, 3 biases with slope sqrt(52 / 3): norm sqrt(48 + 52) = 10."""
    network, slope = Dense(), math.sqrt(52 / 3)
    before = copy.deepcopy(network.dense)

    def loss_of(x, y, noise, when):
        total = network.dense.weight.sum() + slope * network.dense.bias.sum()
        return LossTerms(total, total.detach(), total.detach(), F.one_hot(y, 3).float(), x)

    epoch_of(loss_of, network, max_batches=1, clip_grad=limit)  # SGD with rate 0.1
    with torch.no_grad():
        weight = before.weight - network.dense.weight
        bias = before.bias - network.dense.bias
    assert math.hypot(weight.norm(), bias.norm()) == pytest.approx(0.1 * moved, rel=1e-4)
    assert torch.allclose(bias / slope, weight.mean().expand(3), rtol=1e-3)


def test_means_are_weighted_by_samples():
    """Batches of 4, 4 and 3: losses 1, 2, 6 have the mean (4 + 8 + 18) / 11."""
    network, losses, seen = Dense(), iter([1.0, 2.0, 6.0]), []

    def loss_of(x, y, noise, when):
        value = next(losses)
        seen.append((len(y), tuple(noise.shape) == tuple(x.shape)))
        logits = F.one_hot(y, 3).float()
        logits[0] = -logits[0]  # the first answer of each batch is wrong
        total = network.dense.weight.sum() * 0 + value
        return LossTerms(total, total.detach() / 2, total.detach() * 10, logits, x)

    reported = []
    means, progress = epoch_of(loss_of, network, after_step=lambda v: reported.append(v["loss"]))
    assert [count for count, _ in seen] == [4, 4, 3] and all(same for _, same in seen)
    assert means["loss"] == pytest.approx(30 / 11)
    assert means["natural"] == pytest.approx(15 / 11)
    assert means["penalty"] == pytest.approx(300 / 11)
    assert means["accuracy"] == pytest.approx(100 * 8 / 11)
    assert means["seconds"] > 0
    assert reported == pytest.approx([1, 2, 6])
    assert progress == Progress(epoch=1, batch=0, step=3)


def test_schedules_are_asked_at_the_right_times():
    """Time in epochs: that of the step's beginning."""
    network, asked = Dense(), {"rate": [], "loss": []}
    optimizer = torch.optim.SGD(network.parameters(), 99.0)
    rates = []

    def loss_of(x, y, noise, when):
        asked["loss"].append(when)
        rates.append(optimizer.param_groups[0]["lr"])
        return DefenseLoss(network, Defense("none", Ball("l_inf", 0.1), 0.1, 1))(x, y, noise, 0)

    epoch_of(
        loss_of,
        network,
        progress=Progress(epoch=2),
        optimizer=optimizer,
        rate=lambda when: asked["rate"].append(when) or 0.125,
    )
    assert asked["rate"] == asked["loss"] == pytest.approx([2, 2 + 1 / 3, 2 + 2 / 3])
    assert rates == [0.125] * 3


def test_a_step_is_plain_gradient_descent():
    network = Dense()
    twin = copy.deepcopy(network)
    batches = Batches(imageset(), 4, shuffle=True, seed=3)
    loss_of = DefenseLoss(network, Defense("none", Ball("l_inf", 0.1), 0.1, 1))
    epoch_of(loss_of, network, batches=batches, max_batches=2)
    for (x, y, _), _ in zip(batches, range(2)):
        gradients = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients):
                parameter.sub_(0.1 * gradient)
    for found, expected in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad):
    network = Dense()
    loss = DefenseLoss(network, Defense("none", Ball("l_inf", 0.1), 0.1, 1))
    steps, weights = [], []

    def loss_of(x, y, noise, when):
        steps.append(1)
        weights.append(copy.deepcopy(network.state_dict()))
        terms = loss(x, y, noise, when)
        return terms._replace(total=terms.total + bad) if len(steps) == 3 else terms

    progress = Progress(epoch=1)
    with pytest.raises(UserError, match=r"the loss is .* in step 3 of epoch 2 .*--lr") as caught:
        epoch_of(loss_of, network, progress=progress)
    assert "\n" not in str(caught.value)
    assert (progress.epoch, progress.batch, progress.step) == (1, 2, 2)
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[-1][key]) and not torch.equal(value, weights[0][key])


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("name", ["small_cnn", "resnet"])
def test_an_epoch_in_two_parts_equals_one(name, after):
    """Stopped after a step and taken up from copies: weights, statistics, means, to the bit.

    Dropout, augmentation and the noise of the search are random in every step.
    """
    data = imageset(13, size=16)

    def start():
        torch.manual_seed(1)
        options = {"drop": 0.4, "image_size": 16} if name == "small_cnn" else {"depth": 8}
        network = build_model(name, num_classes=3, in_channels=1, **options).train()
        return network, torch.optim.Adam(network.parameters(), 0.003)

    def run(network, optimizer, progress, stop=None):
        batches = Batches(data, 5, shuffle=True, augment=True, seed=4)
        batches.epoch = progress.epoch
        loss = DefenseLoss(network, Defense("lfr", Ball("l_inf", 0.1), 0.05, 1))

        def after_step(values):
            if progress.batch == stop:
                raise Stop

        means, _ = epoch_of(
            lambda x, y, noise, when: loss(x, y, noise, 0.1 * when),
            network,
            progress,
            batches,
            optimizer=optimizer,
            after_step=after_step,
        )
        return means

    straight = start()
    expected = run(*straight, Progress())

    network, optimizer = start()
    progress = Progress()
    with pytest.raises(Stop):
        run(network, optimizer, progress, stop=after)
    torch.manual_seed(77)  # whatever the new process did before
    again, taken_up = start()
    again.load_state_dict(network.state_dict())
    taken_up.load_state_dict(optimizer.state_dict())
    torch.rand(5)
    means = run(again, taken_up, Progress(**vars(copy.deepcopy(progress))))

    expected.pop("seconds"), means.pop("seconds")
    assert means == expected
    for key, value in again.state_dict().items():
        assert torch.equal(value, straight[0].state_dict()[key]), key


def test_max_batches_ends_an_epoch_early():
    network = Dense()
    loss_of = DefenseLoss(network, Defense("none", Ball("l_inf", 0.1), 0.1, 1))
    counted = []
    _, progress = epoch_of(
        loss_of, network, max_batches=2, after_step=lambda values: counted.append(1)
    )
    assert len(counted) == progress.step == 2 and progress.epoch == 1


# -- measures -------------------------------------------------------------------------------------


def test_evaluate_knows_accuracy_and_loss():
    """Independent of the batch size; the network in eval mode meanwhile, then as it was."""
    data, network = imageset(), Dense()
    logits = network(data.float_images())
    loss = float(F.cross_entropy(logits, data.labels).detach())
    accuracy = 100 * float((logits.argmax(1) == data.labels).double().mean())
    modes = []
    network.register_forward_hook(lambda module, *_: modes.append(module.training))
    for batch_size in (1, 4, 11, 100):
        found = evaluate(network.train(), data, batch_size)
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["accuracy"] == pytest.approx(accuracy)
    assert network.training and not any(modes)


@pytest.mark.parametrize("norm", NORMS)
def test_probe_of_a_linear_classifier(norm):
    """Robust exactly where the margin exceeds epsilon times the dual norm of w_1 - w_0."""
    torch.manual_seed(4)
    network = Dense(classes=2)
    images = torch.randint(110, 145, (60, 1, 4, 4), dtype=torch.uint8)  # far from the box's edges
    data = ImageSet("grey", images, torch.arange(60) % 2, ("0", "1"))
    w = (network.dense.weight[1] - network.dense.weight[0]).detach()
    logits = network(data.float_images()).detach()
    with torch.no_grad():  # centre the margins, so that some samples are right and some robust
        network.dense.bias[0] += (logits[:, 1] - logits[:, 0]).median()
    logits = network(data.float_images()).detach()
    margin = (logits[:, 1] - logits[:, 0]) * (2 * data.labels - 1)
    epsilon = 0.02 if norm == "l_inf" else 0.05
    ball = Ball(norm, epsilon)
    expected = 100 * float((margin > epsilon * ball.dual_norm(w[None])).double().mean())
    clean = 100 * float((margin > 0).double().mean())
    assert 0 < expected < clean
    for batch_size in (7, 60):
        assert probe(network, data, ball, 10, batch_size) == pytest.approx(expected)
    assert probe(network, data, Ball(norm, 0.0), 3, 60) == pytest.approx(clean)
    assert network.training


def test_without_batch_norm_there_is_one_measure():
    found = bn_gap(Dense(), imageset(), Ball("l_inf", 0.1), 4)
    assert found.keys() == {"accuracy_eval", "flatness_eval"} and found["flatness_eval"] > 0


def test_bn_gap_by_hand():
    """Running statistics that are far off: each side equals the network in that mode."""
    torch.manual_seed(1)
    network = build_model("resnet", depth=8, in_channels=1, num_classes=3).train()
    network.bn1.running_mean.fill_(5)
    before = copy.deepcopy(network.state_dict())
    data, ball = imageset(12, size=16), Ball("l_2", 0.1)
    found = bn_gap(network, data, ball, 12)
    twin = copy.deepcopy(network)
    for name in ("eval", "batch"):
        twin.train(name == "batch")
        x = data.float_images().requires_grad_()
        logits = twin(x)
        loss = F.cross_entropy(logits, data.labels, reduction="sum")
        norms = torch.autograd.grad(loss, x)[0].flatten(1).norm(dim=1)
        accuracy = 100 * float((logits.argmax(1) == data.labels).double().mean())
        assert found[f"accuracy_{name}"] == pytest.approx(accuracy)
        assert found[f"flatness_{name}"] == pytest.approx(float(norms.mean()), rel=1e-4)
        twin.load_state_dict(before)
    assert found["flatness_eval"] != pytest.approx(found["flatness_batch"], rel=0.01)
    assert network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


# Held-out clean and robust accuracy of the epochs of real runs (digits, ten epochs).
BARELY_TRAINED, TRAINED = (16.1, 9.1), (80.4, 0.0)


def score(clean: float, robust: float) -> float:
    found = {"test_accuracy": 0.0, "held_out_accuracy": clean, "held_out_robust": robust}
    return _Training._score(None, found)


def test_a_network_that_answers_with_near_constants_is_not_the_best():
    """It is robust wherever it is right, which is on a tenth of the images."""
    assert score(*TRAINED) > score(*BARELY_TRAINED)
    assert score(75.8, 0.0) > score(18.9, 18.9)
    assert score(30.0, 1.0) > score(10.0, 10.0)
    assert score(98.9, 0.0) > score(98.6, 0.0)


def test_of_two_trained_networks_the_more_robust_is_the_best():
    assert score(98.0, 60.0) > score(99.0, 50.0)
    assert score(60.0, 36.0) > score(62.0, 30.0)


def test_the_score_without_a_probe_or_held_out_images():
    assert _Training._score(None, {"test_accuracy": 40.0}) == 40.0
    assert _Training._score(None, {"test_accuracy": 1.0, "held_out_accuracy": 41.0}) == 41.0
    found = {"test_accuracy": 40.0, "test_robust": 20.0}
    assert _Training._score(None, found) == 30.0


# -- schedules ------------------------------------------------------------------------------------


def schedule(name: str, **options):
    flags = {
        "epochs": 100,
        "lr": 0.1,
        "gamma": 0.1,
        "schedule": [50, 75],
        "warmup": 0,
        "epsilon_warmup": 0,
        "at_start": 0,
    }
    return schedules(SimpleNamespace(lr_schedule=name, **{**flags, **options}))[0]


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("step", {0: 0.1, 49.99: 0.1, 50: 0.01, 74.9: 0.01, 75: 0.001, 100: 0.001}),
        ("constant", {0: 0.1, 99: 0.1}),
        ("cosine", {0: 0.1, 25: 0.1 * (2 + 2**0.5) / 4, 50: 0.05, 100: 0.0}),
        ("onecycle", {0: 0.004, 15: 0.052, 30: 0.1, 65: 0.05, 100: 0.0002}),
    ],
)
def test_learning_rates_at_known_points(name, points):
    rate = schedule(name)
    for when, expected in points.items():
        assert rate(when) == pytest.approx(expected, abs=1e-12), when


@pytest.mark.parametrize("name", ["cosine", "onecycle", "step", "constant"])
@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_learning_rates_stay_between_zero_and_the_peak(name, epochs):
    rate = schedule(name, epochs=epochs, schedule=[1])
    values = [rate(epochs * i / 200) for i in range(201)]
    assert all(0 <= value <= 0.1 + 1e-12 for value in values)
    assert max(values) > 0.09 and all(value > 0 for value in values[:-1])


def test_lambada_s_warm_up():
    flags = {"lr": 0.1, "lr_schedule": "constant", "epochs": 30, "lambada": 0.4}
    flags["epsilon_warmup"] = 0
    for at_start, epochs in ((0.0, 0), (0.1, 3), (0.13, 3.9), (0.7, 21)):
        _, weight, _, start = schedules(SimpleNamespace(warmup=2.0, at_start=at_start, **flags))
        assert start == epochs  # of adversarial training, after which lambada rises
        found = [weight(start + when) for when in (0, 0.5, 1, 2, 9)]
        assert found == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert weight(1.0) == 0
    assert schedules(SimpleNamespace(warmup=0.0, at_start=0.0, **flags))[1](0) == 0.4


def test_epsilon_s_warm_up():
    flags = {"lr": 0.1, "lr_schedule": "constant", "epochs": 30, "lambada": 0.4, "warmup": 0}
    flags["at_start"] = 0.9  # it has nothing to do with it
    widened = schedules(SimpleNamespace(epsilon_warmup=4.0, **flags))[2]
    assert [widened(when) for when in (0, 1, 3, 4, 20)] == [0, 0.25, 0.75, 1, 1]
    assert schedules(SimpleNamespace(epsilon_warmup=0.0, **flags))[2](0) == 1

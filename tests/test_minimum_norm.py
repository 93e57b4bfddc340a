"""JSMA, DDN and point-wise against brute force, closed forms and the libraries."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import nn

from models import build_model
from utils.attacks.gradient import sample_generator
from utils.attacks.minimum_norm import _best_pair, ddn, jsma, measure, pointwise, random_targets


class Linear(nn.Module):
    def __init__(self, values: int, classes: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(values, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Constant(nn.Module):
    """Class 1 where the first value is below 0.9, else class 0; its gradient vanishes."""

    def forward(self, x):
        first = x.flatten(1)[:, 0]
        return torch.stack(((first >= 0.9).float(), (first < 0.9).float()), 1) + 0 * first[:, None]


@pytest.fixture
def linear():
    """A linear network of two classes, images of 8 values, labels that it gets right."""
    network = Linear(8)
    x = 0.2 + 0.6 * torch.rand(24, 2, 2, 2)
    with torch.no_grad():
        network.layer.bias.copy_(-0.5 * network.layer.weight.sum(1))
        return network, x, network(x).argmax(1)


@pytest.fixture
def rising():
    """A linear network whose class 1 any value speaks for, and images of zeros and ones."""
    network = Linear(8)
    with torch.no_grad():
        network.layer.weight.copy_(torch.rand(8) * torch.tensor([[-1.0], [1.0]]))
        network.layer.bias.copy_(-0.7 * network.layer.weight.sum(1))
    x = (torch.rand(40, 2, 2, 2) < 0.4).float()
    x = x[network(x).argmax(1) == 0]
    return network, x, torch.zeros(len(x), dtype=torch.long)


@torch.no_grad()
def fewest_changes(network, x, y, ends):
    """Brute force: how many values must become one of ``ends`` until the answer is wrong."""
    choices = torch.tensor(list(product(range(len(ends) + 1), repeat=x.numel())))
    values = torch.tensor([0.0, *ends])[choices]
    moved = torch.where(choices > 0, values, x.flatten())
    wrong = network(moved.view(-1, *x.shape)).argmax(1) != y
    return int((choices > 0).sum(1)[wrong].min()) if wrong.any() else None


# ---------------------------------------------------------------------------------------------
# JSMA


@pytest.mark.parametrize("ties", [False, True])
def test_best_pair_is_the_best_of_all_pairs(ties):
    up, down = torch.randn(200, 15), torch.randn(200, 15)
    up[100:] += down[100:]
    if ties:
        up, down = (2 * up).round(), (2 * down).round()
    allowed = torch.rand(200, 15) < 0.7
    allowed[:3] = False
    allowed[3, 1:] = False
    pair, helps = _best_pair(up, down, allowed)
    for row in range(200):
        scores = {
            (p, q): float((up[row, p] + up[row, q]) * (down[row, p] + down[row, q]))
            for p, q in combinations(range(15), 2)
            if allowed[row, p] and allowed[row, q]
            and up[row, p] + up[row, q] > 0
            and down[row, p] + down[row, q] > 0
        }  # fmt: skip
        assert bool(helps[row]) == bool(scores)
        if scores:
            chosen = tuple(sorted(pair[row].tolist()))
            assert chosen in scores
            assert scores[chosen] == pytest.approx(max(scores.values()), rel=1e-5)


def test_targets_are_any_class_but_the_true_one():
    y = torch.arange(10).repeat(100)

    def targets(rows, seed=0):
        drawn = [sample_generator(seed, row, 1) for row in rows]
        return random_targets(y[list(rows)], 10, drawn)

    found = targets(range(1000))
    assert (found != y).all()
    assert set(found.tolist()) == set(range(10))
    assert torch.equal(found, targets(range(1000)))
    assert torch.equal(found[7:9], targets(range(7, 9)))
    assert not torch.equal(found, targets(range(1000), seed=1))


def test_jsma_raises_as_few_values_as_there_must_be(rising):
    network, x, y = rising
    assert len(x) > 20
    found = jsma(network, x, y, gamma=1.0)
    for row in range(len(x)):
        fewest = fewest_changes(network, x[row], y[row], [1.0])
        room = 2 * (int((x[row] == 0).sum()) // 2)  # values are raised in pairs
        assert found.l0[row] == (fewest + fewest % 2 if fewest <= room else torch.inf)
    changed = found.x_adv != x
    assert (found.x_adv[changed] == 1).all()


def test_jsma_keeps_to_its_share_of_values(linear):
    network, x, y = linear
    found = jsma(network, x, y, gamma=0.5)
    assert (found.l0[found.success] <= 4).all()
    assert 0 < found.success.sum() < len(x)


def test_jsma_agrees_with_art_where_one_logit_is_all(rising):
    evasion = pytest.importorskip("art.attacks.evasion")
    classification = pytest.importorskip("art.estimators.classification")
    network, x, y = rising
    ours = jsma(network, x, y, gamma=1.0)
    classifier = classification.PyTorchClassifier(
        network, nn.CrossEntropyLoss(), (2, 2, 2), 2, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = evasion.SaliencyMapMethod(classifier, theta=1.0, gamma=1.0, verbose=False)
    theirs = measure(network, torch.from_numpy(attack.generate(x.numpy(), y=1 - y.numpy())), x, y)
    # ART looks at the target's logit alone; with two opposite logits that is the same order.
    both = ours.success & theirs.success
    assert both.sum() > 15
    assert torch.equal(ours.x_adv[both], theirs.x_adv[both])


# ---------------------------------------------------------------------------------------------
# DDN


def test_ddn_on_a_linear_network_finds_the_distance_to_the_boundary(linear):
    network, x, y = linear
    found = ddn(network, x, y, num_steps=300)
    weight, bias = network.layer.weight.detach(), network.layer.bias.detach()
    normal = weight[y] - weight[1 - y]
    margin = (normal * x.flatten(1)).sum(1) + bias[y] - bias[1 - y]
    distance = margin / normal.norm(dim=1)
    inside = distance < 0.15  # the nearest point of the boundary lies in the box
    assert inside.sum() > 5
    assert found.success[inside].all()
    assert (found.l2 >= distance * 0.999)[inside].all()
    assert (found.l2 <= distance * 1.05 + 0.02)[inside].all()


def test_ddn_agrees_with_foolbox():
    foolbox = pytest.importorskip("foolbox")
    network = build_model("small_cnn").eval()
    nn.init.normal_(network.classifier.fc3.weight, std=0.1)
    x = torch.rand(12, 1, 28, 28)
    y = network(x).argmax(1).detach()
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.DDNAttack(steps=20)
    theirs = measure(network, attack.run(model, x, foolbox.criteria.Misclassification(y)), x, y)
    ours = ddn(network, x, y, num_steps=20)
    assert torch.equal(ours.success, theirs.success)
    assert ours.success.sum() > 6
    ratio = ours.l2[ours.success] / theirs.l2[ours.success]
    assert ratio.max() < 1.1  # the last point counts here, so ours may be a little smaller
    assert 0.9 < ratio.median() < 1.02


def test_ddn_gets_away_from_vanishing_gradients():
    x = torch.full((4, 1, 2, 2), 0.85)
    y = torch.ones(4, dtype=torch.long)
    found = ddn(Constant(), x, y, num_steps=30)
    assert found.success.any()
    again = ddn(Constant(), x, y, num_steps=30)
    assert torch.equal(found.x_adv, again.x_adv)
    part = ddn(Constant(), x[2:], y[2:], num_steps=30, index=torch.arange(2, 4))
    assert torch.equal(part.x_adv, found.x_adv[2:])


# ---------------------------------------------------------------------------------------------
# Point-wise


def test_pointwise_comes_to_the_fewest_changes_there_are(linear):
    network, x, y = linear
    found = pointwise(network, x, y, starts=40)
    fewest = [fewest_changes(network, x[row], y[row], [0.0, 1.0]) for row in range(len(x))]
    assert found.success.all()
    assert all(mine >= least for mine, least in zip(found.l0.tolist(), fewest))
    assert sum(mine == least for mine, least in zip(found.l0.tolist(), fewest)) >= 0.9 * len(x)


def test_no_value_of_pointwise_can_go_back(small_cnn):
    x = torch.rand(3, 1, 28, 28)
    y = small_cnn(x).argmax(1)
    found = pointwise(small_cnn, x, y, starts=1)
    assert found.success.any()
    for row in found.success.nonzero()[:, 0].tolist():
        places = (found.x_adv[row] != x[row]).flatten().nonzero()[:, 0]
        assert len(places) == found.l0[row]
        back = found.x_adv[row].flatten().repeat(len(places), 1)
        back[torch.arange(len(places)), places] = x[row].flatten()[places]
        assert (small_cnn(back.view(-1, 1, 28, 28)).argmax(1) == y[row]).all()


def test_pointwise_does_not_depend_on_the_batch(linear):
    network, x, y = linear
    whole = pointwise(network, x, y, starts=3, seed=5)
    part = pointwise(network, x[9:], y[9:], starts=3, seed=5, index=torch.arange(9, 24))
    assert torch.equal(part.x_adv, whole.x_adv[9:])
    assert not torch.equal(pointwise(network, x, y, starts=3, seed=6).x_adv, whole.x_adv)


def test_pointwise_agrees_with_foolbox():
    foolbox = pytest.importorskip("foolbox")
    network = Linear(64, classes=10)
    x = torch.rand(12, 1, 8, 8)
    y = network(x).argmax(1)
    model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.PointwiseAttack(
        foolbox.attacks.SaltAndPepperNoiseAttack(steps=100), l2_binary_search=False
    )
    moved = attack.run(model, x, foolbox.criteria.Misclassification(y))
    theirs = measure(network, moved, x, y)
    ours = pointwise(network, x, y, starts=2)
    assert ours.success.all()
    assert theirs.success.all()
    assert ours.l0.mean() <= 1.2 * theirs.l0.mean()


class NoiseIsZero(nn.Module):
    """Class 1 where all values are 1, else class 0: no noise image changes its mind."""

    def forward(self, x):
        ones = (x.flatten(1) == 1).all(1).float()
        return torch.stack((1 - ones, ones), 1)


def test_pointwise_without_an_adversarial_start():
    x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
    nothing = pointwise(NoiseIsZero(), x, y, starts=2)
    assert not nothing.success.any()
    assert nothing.l0.isinf().all()
    assert torch.equal(nothing.x_adv, x)
    donors = torch.stack((torch.zeros(1, 8, 8), torch.ones(1, 8, 8)))
    found = pointwise(NoiseIsZero(), x, y, starts=2, donors=donors)
    assert found.success.all()
    assert (found.l0 == 64).all()


# ---------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("attack", [jsma, ddn, pointwise])
def test_misclassified_images_are_left_alone(linear, attack):
    network, x, y = linear
    found = attack(network, x, 1 - y)
    assert found.success.all()
    assert torch.equal(found.x_adv, x)
    assert (found.l0 == 0).all()
    assert (found.l2 == 0).all()
    empty = attack(network, x[:0], y[:0])
    assert len(empty.l0) == 0


def test_distances_are_those_of_the_images(linear):
    network, x, y = linear
    found = ddn(network, x, y)
    for row in range(len(x)):
        if not found.success[row]:
            assert found.l2[row] == found.l0[row] == found.l_inf[row] == torch.inf
            continue
        change = (found.x_adv[row] - x[row]).flatten()
        assert found.l0[row] == (change != 0).sum()
        assert float(found.l2[row]) == pytest.approx(float((change**2).sum().sqrt()), rel=1e-5)
        assert found.l_inf[row] == change.abs().max()

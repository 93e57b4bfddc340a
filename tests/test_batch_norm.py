"""Which statistics BatchNorm uses and updates, checked against BatchNorm written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from utils.lfr import BN_MODES, NORMS, Ball, flatness, inner_maximization, lfr_loss
from utils.lfr.accel import Accelerated
from utils.lfr.batch_norm import StepPolicy, mode, normalization


class Plain(nn.Module):
    """BatchNorm after a pooling, without affine parameters, after a dense layer, and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.AvgPool2d(2)
        self.norm1 = nn.BatchNorm2d(6, affine=False, momentum=0.3)
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(4)
        self.dense = nn.Linear(4 * 9, 7)
        self.norm3 = nn.BatchNorm1d(7, eps=1e-3)
        self.last = nn.Linear(7, 5)

    def forward(self, x):
        x = F.softplus(self.norm1(self.pool(self.conv(x))))
        x = F.softplus(self.norm2(self.conv2(x)))
        return self.last(self.norm3(self.dense(x.flatten(1))))


def resnet(**options) -> nn.Module:
    return build_model("resnet", **{"depth": 8, **options})


def wrn() -> nn.Module:
    return build_model("wrn", depth=10, widen_factor=1)


NETWORKS = {
    "resnet": resnet,
    "resnet silu": lambda: resnet(activation="silu"),
    "wrn": wrn,
    "plain": Plain,
}
BALL = Ball("l_inf", 0.1)
BATCH = 5


def prepared(name: str):
    """Network in train mode with statistics of its own, images, labels, start of the search."""
    torch.manual_seed(5)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    x = torch.rand(BATCH, 3, 16, 16, dtype=torch.float64)
    start = BALL.project(x + 0.01 * torch.randn_like(x), x)
    return network.double().train(), x, torch.arange(BATCH), start


def norms(network) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def buffers(network) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def loss(network, x, y, start, bn_mode, **options):
    settings = {"step_size": 0.02, "num_steps": 3, "lambada": 0.7, **options}
    return lfr_loss(network, x, y, BALL, start=start, bn_mode=bn_mode, **settings)


class ByHand(nn.Module):
    """BatchNorm as a formula: by the batch at hand, which it may remember, or by what it remembers.

    What it remembers stays a differentiable function of the weights.
    """

    def __init__(self, norm: nn.Module, how: dict[str, str]) -> None:
        super().__init__()
        self.norm, self.how, self.kept = norm, how, None

    def forward(self, x):
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        how = self.how["statistics"]
        if how == "running":
            mean, var = self.norm.running_mean, self.norm.running_var
        elif how == "kept":
            mean, var = self.kept
        else:
            mean = x.mean(dims)
            var = (x - mean.view(shape)).pow(2).mean(dims)
            if how == "keep":
                self.kept = mean, var
            if self.how["update"]:
                share, count = self.norm.momentum, x.numel() // x.shape[1]
                unbiased = var.detach() * count / (count - 1)
                self.norm.running_mean = torch.lerp(self.norm.running_mean, mean.detach(), share)
                self.norm.running_var = torch.lerp(self.norm.running_var, unbiased, share)
        y = (x - mean.view(shape)) / (var.view(shape) + self.norm.eps).sqrt()
        if self.norm.affine:
            y = y * self.norm.weight.view(shape) + self.norm.bias.view(shape)
        return y


def by_hand(network: nn.Module, how: dict[str, str]) -> nn.Module:
    """A copy of the network that shares its parameters, each BatchNorm replaced by its formula."""
    parameters = {id(p): p for p in network.parameters()}
    written_out = copy.deepcopy(network, memo=parameters)
    for module in list(written_out.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, ByHand(child, how))
    return written_out


def reference(network, x, y, start, statistics: tuple[str, str, str], **options):
    """LFR's loss in plain PyTorch; ``statistics``: of natural loss, search and penalty.

    The search comes first, as in the original, unless it needs what the clean batch leaves.
    """
    settings = {"step_size": 0.02, "num_steps": 3, "lambada": 0.7, **options}
    how = {"update": False}
    network = by_hand(network, how)

    def clean_batch():
        how.update(statistics=statistics[0], update=True)
        natural = F.cross_entropy(network(x), y)
        how["update"] = False
        return natural

    def gradient_norms(point):
        value = F.cross_entropy(network(point), y, reduction="sum")
        return BALL.dual_norm(torch.autograd.grad(value, point, create_graph=True)[0])

    natural = clean_batch() if statistics[1] == "kept" else None
    how["statistics"] = statistics[1]
    point = start
    for _ in range(settings["num_steps"]):
        point = point.detach().requires_grad_()
        direction = torch.autograd.grad(gradient_norms(point).sum(), point)[0]
        point = BALL.project((point + settings["step_size"] * direction.sign()).detach(), x)
    natural = clean_batch() if natural is None else natural
    how["statistics"] = statistics[2]
    flat = gradient_norms(point.detach().requires_grad_()).mean()
    return natural, flat, natural + settings["lambada"] * flat, point


STATISTICS = {
    "shared": ("keep", "kept", "kept"),
    "batch": ("batch", "batch", "batch"),
    "running": ("running", "running", "running"),
    "mixed": ("batch", "running", "batch"),
}


@pytest.mark.parametrize("bn_mode", BN_MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradient_equal_batch_norm_written_out(name, bn_mode):
    """Values, the points found, and the gradient by every weight, in double precision.

    For ``shared`` this includes the penalty's gradient through the clean batch's statistics.
    """
    network, x, y, start = prepared(name)
    natural, flat, total, point = reference(network, x, y, start, STATISTICS[bn_mode])
    expected = torch.autograd.grad(total, list(network.parameters()), allow_unused=True)

    terms = loss(network, x, y, start, bn_mode)
    found = torch.autograd.grad(terms.total, list(network.parameters()), allow_unused=True)

    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(terms.natural, natural, **close)
    torch.testing.assert_close(terms.x_adv, point, **close)
    torch.testing.assert_close(terms.penalty, flat, **close)
    torch.testing.assert_close(terms.total, total, **close)
    for (parameter, _), f, e in zip(network.named_parameters(), found, expected):
        torch.testing.assert_close(
            f, e, rtol=1e-7, atol=1e-9, msg=lambda m, p=parameter: f"{p} {m}"
        )


def test_shared_gradient_does_flow_through_the_statistics():
    """Treating them as constants gives another gradient; else the test above would prove little."""
    network, x, y, start = prepared("resnet")
    weight = network.conv1.weight
    whole = torch.autograd.grad(loss(network, x, y, start, "shared").penalty, weight)[0]
    policy = StepPolicy(network, "shared")
    with policy.natural():
        network(x)
    policy._statistics = {k: (m.detach(), s.detach()) for k, (m, s) in policy._statistics.items()}
    point = inner_maximization(
        network, x, y, BALL, step_size=0.02, num_steps=3, start=start, policy=policy
    )
    with policy.penalty():
        constant = flatness(network, point, y, BALL).mean()
    part = torch.autograd.grad(constant, weight)[0]
    assert float((whole - part).norm()) > 0.01 * float(whole.norm())


def test_shared_makes_a_sample_s_flatness_its_own():
    """Given the statistics, moving one image changes no other image's gradient norm."""
    network, x, y, _ = prepared("wrn")
    policy = StepPolicy(network, "shared")
    with policy.natural():
        network(x)
    moved = x.clone()
    moved[0] = torch.rand_like(moved[0])

    def found(images):
        with policy.penalty():
            return flatness(network, images, y, BALL).detach()

    before, after = found(x), found(moved)
    assert not torch.isclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-12, atol=0)


def statistics_after(network, *batches) -> dict[str, torch.Tensor]:
    """The buffers after train-mode forward policy of these batches by PyTorch itself."""
    twin = copy.deepcopy(network).train()
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return buffers(twin)


@pytest.mark.parametrize("bn_mode", BN_MODES)
@pytest.mark.parametrize("name", ["resnet", "wrn", "plain"])
def test_what_the_running_statistics_see(name, bn_mode):
    """The clean batch once; in the original's mode the clean, the perturbed, the clean one again.

    Counters of batches included: a network with ``momentum=None`` averages by them.
    """
    network, x, y, start = prepared(name)
    twin = copy.deepcopy(network)
    terms = loss(network, x, y, start, bn_mode)
    seen = [x, terms.x_adv, x] if bn_mode == "mixed" else [x]
    expected = statistics_after(twin, *seen)
    for key, buffer in buffers(network).items():
        torch.testing.assert_close(buffer, expected[key], rtol=1e-9, atol=1e-12, msg=key)


def test_cumulative_average_of_statistics():
    """momentum=None: the mean over all batches so far, in the mode the training uses."""
    network, x, y, _ = prepared("wrn")
    for norm in norms(network):
        norm.momentum = None
        norm.reset_running_stats()
    batches = [x, x.flip(0) * 0.5, x**2]
    expected = statistics_after(network, *batches)
    for batch in batches:
        loss(network, batch, y, batch, "shared", num_steps=1)
    for key, buffer in buffers(network).items():
        torch.testing.assert_close(buffer, expected[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("bn_mode", BN_MODES)
def test_eval_mode_uses_and_keeps_the_running_statistics(bn_mode):
    network, x, y, start = prepared("resnet")
    network.eval()
    before = buffers(network)
    natural, flat, _, _ = reference(network, x, y, start, STATISTICS["running"])
    terms = loss(network, x, y, start, bn_mode)
    torch.testing.assert_close(terms.natural, natural)
    torch.testing.assert_close(terms.penalty, flat)
    for key, buffer in buffers(network).items():
        assert torch.equal(buffer, before[key]), key


@pytest.mark.parametrize("bn_mode", BN_MODES)
@pytest.mark.parametrize("frozen_layer", [False, True])
def test_modes_and_flags_come_back(bn_mode, frozen_layer):
    network, x, y, start = prepared("wrn")
    if frozen_layer:
        network.block1.eval()  # some layers in eval mode, as in fine-tuning
    flags = lambda: [  # noqa: E731
        (m.training, getattr(m, "track_running_stats", None)) for m in network.modules()
    ]
    before = flags()
    loss(network, x, y, start, bn_mode)
    assert flags() == before

    class Wrong(Exception):
        pass

    for stage in ("natural", "search", "penalty"):
        with pytest.raises(Wrong), getattr(StepPolicy(network, bn_mode), stage)():
            raise Wrong
        assert flags() == before
    with pytest.raises(Wrong), mode(network, training=False):
        assert not any(m.training for m in network.modules())
        raise Wrong
    with pytest.raises(Wrong), normalization(network, batch_statistics=False):
        assert network.training and not any(m.training for m in norms(network))
        raise Wrong
    assert flags() == before


@pytest.mark.parametrize("bn_mode", BN_MODES)
def test_networks_without_batch_norm_do_not_care(bn_mode):
    network = resnet(norm_layer="group").double().train()
    x, y = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.arange(3)
    found = loss(network, x, y, x, bn_mode)
    expected = loss(network, x, y, x, "running")
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("norm", NORMS)
def test_the_search_alone_leaves_a_training_network_as_it_was(norm):
    """inner_maximization on a network in train mode, without naming a policy."""
    network, x, y, _ = prepared("resnet")
    before = buffers(network)
    inner_maximization(network, x, y, Ball(norm, 0.1), step_size=0.02, num_steps=2)
    assert network.training
    for key, buffer in buffers(network).items():
        assert torch.equal(buffer, before[key]), key


def test_networks_share_no_statistics():
    """Layers are told apart even when a network has many of the same size."""
    network, x, _, _ = prepared("wrn")
    policy = StepPolicy(network, "shared")
    with policy.natural():
        network(x)
    assert len(policy._statistics) == len(norms(network))


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="bn_mode is 'train', allowed are shared, batch"):
        StepPolicy(nn.Identity(), "train")


@pytest.mark.parametrize("bn_mode", BN_MODES)
def test_autocast_and_single_precision(bn_mode):
    """The same loss in float32 and, roughly, under bfloat16; statistics stay float32."""
    network, x, y, start = prepared("resnet")
    expected = loss(copy.deepcopy(network), x, y, start, bn_mode)
    single = copy.deepcopy(network).float()
    found = loss(single, x.float(), y, start.float(), bn_mode)
    torch.testing.assert_close(found.total, expected.total.float(), rtol=1e-3, atol=1e-3)
    single = copy.deepcopy(network).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(single, x.float(), y, start.float(), bn_mode)
    found.total.backward()
    torch.testing.assert_close(found.total, expected.total.float(), rtol=0.1, atol=0.1)
    assert all(b.dtype != torch.bfloat16 and b.isfinite().all() for b in single.buffers())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in single.parameters())


def test_frozen_without_statistics_uses_the_batch():
    network, x, _, _ = prepared("resnet")
    with normalization(network, batch_statistics=True), Accelerated(frozen=True):
        found = network(x)
    expected = by_hand(network, {"statistics": "batch", "update": False})(x)
    torch.testing.assert_close(found, expected)


def test_frozen_layers_stay_frozen():
    """As in fine-tuning: a layer in eval mode while the network trains."""
    network, x, y, start = prepared("plain")
    network.norm1.eval()
    before = network.norm1.running_mean.clone()
    expected = F.cross_entropy(copy.deepcopy(network)(x), y)
    options = {"step_size": 0.05, "num_steps": 2, "lambada": 1, "start": start}
    for bn_mode in BN_MODES:
        trained = copy.deepcopy(network)
        found = lfr_loss(trained, x, y, BALL, bn_mode=bn_mode, **options)
        assert bn_mode == "running" or torch.allclose(found.natural, expected)
        assert torch.equal(trained.norm1.running_mean, before)
        assert not torch.equal(trained.norm2.running_mean, network.norm2.running_mean)
        assert not trained.norm1.training and trained.norm2.training


def test_a_layer_that_is_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.norm(F.softplus(self.norm(x))).mean((2, 3)))

    x, y = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 0, 1])
    options = {"step_size": 0.05, "num_steps": 1, "lambada": 1}
    with pytest.raises(ValueError, match="used twice"):
        lfr_loss(Twice(), x, y, BALL, **options)
    assert lfr_loss(Twice(), x, y, BALL, bn_mode="batch", **options).total > 0

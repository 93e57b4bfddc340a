"""Our DDN, point-wise and JSMA against foolbox's and ART's: seconds and distances, side by side.

python -m benchmarks.attack_libraries --model_path PATH --dataset MNIST --data_dir ./data

Needs the packages of requirements-dev.txt. One thread, the same images, one after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from utils.attacks import logits_of
from utils.data import load_dataset
from utils.minimum_norm import ddn, jsma, measure, pointwise, random_targets
from utils.runs import load_network


def foolbox_ddn(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    import foolbox

    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
    return foolbox.attacks.DDNAttack(steps=20).run(model, x, foolbox.criteria.Misclassification(y))


def foolbox_pointwise(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One start each; its own noise start, and an image at a time where a batch would assert."""
    import foolbox

    np.random.seed(0)  # noqa: NPY002 (foolbox draws from the global generator)
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.PointwiseAttack(l2_binary_search=False)
    moved = x.clone()
    try:
        return attack.run(model, x, foolbox.criteria.Misclassification(y))
    except AssertionError:
        for row in range(len(x)):
            one = slice(row, row + 1)
            try:
                moved[one] = attack.run(model, x[one], foolbox.criteria.Misclassification(y[one]))
            except AssertionError:
                print("  foolbox: a start is not adversarial, image left out")
    return moved


def art_jsma(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from art.attacks.evasion import SaliencyMapMethod
    from art.estimators.classification import PyTorchClassifier

    targets = random_targets(y, logits_of(network, x[:1]).shape[1], 0, torch.arange(len(x)))
    classifier = PyTorchClassifier(
        network,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        logits_of(network, x[:1]).shape[1],
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = SaliencyMapMethod(classifier, theta=1.0, gamma=0.4, batch_size=len(x), verbose=False)
    return torch.from_numpy(attack.generate(x.numpy(), y=targets.numpy()))


def report(name: str, network: nn.Module, x: Tensor, y: Tensor, run: Callable[[], Tensor]) -> None:
    began = time.process_time()
    moved = run()
    seconds = time.process_time() - began
    found = measure(network, moved, x, y)
    reached = found.success

    def median(values: Tensor) -> float:
        return float(values[reached].median()) if reached.any() else float("nan")

    print(
        f"{name:24s} {seconds:8.1f} s CPU  success {100 * reached.float().mean():5.1f} %  "
        f"medians: L0 {median(found.l0):6.0f}  L2 {median(found.l2):6.3f}  "
        f"L_inf {median(found.l_inf):6.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--dataset", default="MNIST")
    parser.add_argument("--data_dir", default="./data")
    parser.add_argument("--num_examples", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network, _ = load_network(args.model_path)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    data = load_dataset(args.dataset, args.data_dir, train=False).head(4 * args.num_examples)
    x, y = data.float_images(), data.labels
    right = (logits_of(network, x).argmax(1) == y).nonzero()[: args.num_examples, 0]
    x, y = x[right], y[right]
    print(f"{len(x)} images of {data.name} that the network gets right, 1 thread")
    runs: dict[str, Callable[[], Tensor]] = {
        "DDN, foolbox": lambda: foolbox_ddn(network, x, y),
        "DDN, ours": lambda: ddn(network, x, y).x_adv,
        "JSMA, ART": lambda: art_jsma(network, x, y),
        "JSMA, ours": lambda: jsma(network, x, y).x_adv,
        "point-wise, ours": lambda: pointwise(network, x, y, starts=1).x_adv,
        "point-wise, foolbox": lambda: foolbox_pointwise(network, x, y),
    }
    for name, run in runs.items():
        report(name, network, x, y, run)


if __name__ == "__main__":
    main()

"""How much the inputs of each layer have in common before training, in the networks of four experiments.

    pip install gymnasium
    python experiments/common_share.py    # a minute

r of docs/method.md, "How far": how many times more than other filters one of equal weights would vary. It is measured by
`keep_calibrated`, layer by layer, each behind layers that are centred so already. Layers with one input
channel aren't centred, and left out. Data as in own_loop.py, detection.py and segmentation.py; 64 states of CartPole under
a random policy.
"""

from __future__ import annotations

import itertools

import torch
from detection import MEASURED, SIZE, Backbone
from own_loop import data
from reinforcement import critic
from scenes import CLASSES, training_and_test
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import normprop
from normprop.conversion.calibration import COMMON
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer
from normprop.sites.site import Site


def shares(model: nn.Module, samples: Tensor) -> list[str]:
    """Kernel, inputs and r of each layer."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    normprop.keep_calibrated(model, optimizer, samples, samples=len(samples))
    found = []
    for entry in normprop.lane(model).all_entries():
        site = model.get_submodule(entry.site)
        if entry.layer is None or not isinstance(site, Site):
            continue
        weight = model.get_submodule(entry.layer).get_parameter("weight")
        if weight.shape[1] > 1:
            kernel = "×".join(map(str, weight.shape[2:])) or "linear"
            found.append(f"{kernel}, {weight.shape[1]}: {(1 - site.center) ** (-1 / COMMON):.1f}")
    return found


def states(count: int) -> Tensor:
    """Of CartPole, under a random policy."""
    import gymnasium

    environment = gymnasium.make("CartPole-v1")
    environment.action_space.seed(0)
    found = [environment.reset(seed=0)[0]]
    for _ in itertools.repeat(None, count - 1):
        state, _, failed, late, _ = environment.step(environment.action_space.sample())
        found.append(environment.reset()[0] if failed or late else state)
    return torch.stack([torch.as_tensor(state) for state in found])


def main() -> None:
    torch.manual_seed(0)
    images = data()["train"][0][:64]
    scenes, _ = training_and_test(SIZE)
    pictures = torch.stack([scenes.boxed(number)[0] for number in range(10_000_000, 10_000_000 + MEASURED)])
    resnet = build("resnet8", shape=(3, 32, 32), classes=10, norm=normalizer("batch"), width=0.5)
    lraspp = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    moving = states(64)
    for name, model, samples in (
        ("ResNet-8, CIFAR-10", normprop.convert(resnet, example=images[:2]), images),
        ("the detector's backbone, scenes", normprop.convert(Backbone(), example=pictures[:2]), pictures),
        ("LR-ASPP, scenes", normprop.convert(lraspp, example=pictures[:2]), pictures),
        ("the critic, CartPole", critic("normprop", 4, 2, moving), moving),
    ):
        print(f"{name} (kernel, input channels: r)\n    " + "; ".join(shares(model, samples)))


if __name__ == "__main__":
    main()

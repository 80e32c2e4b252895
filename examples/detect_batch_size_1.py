"""Find digits with one image a step: torchvision's SSD with its SSDlite head, with GroupNorm, and converted in two ways.

A digit of scikit-learn lies on a piece of one of its photographs. Backbone and head are converted each by itself, in place,
and kept calibrated each by itself: the head on what the backbone makes of the same images at that time. Uncentred, filters
keep their means, and what inputs have in common is counted nearly whole (`shrinkage`).

    python examples/detect_batch_size_1.py            # about a minute on one core
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import box_iou

import normprop
from normprop.optim import AdaptiveGradientClipping

SIZE = 96


class Scenes:
    """Made anew from a number each time."""

    def __init__(self) -> None:
        self.items = torch.tensor(load_digits().images / 16, dtype=torch.float32)
        self.photographs = [
            torch.tensor(p.transpose(2, 0, 1) / 255, dtype=torch.float32) for p in load_sample_images().images
        ]

    def __getitem__(self, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A standardised image ``(3, size, size)``, and the box of the digit."""
        random = torch.Generator().manual_seed(seed)
        pick = lambda below: int(torch.randint(below, (), generator=random))
        photograph = self.photographs[pick(2)]
        top, left = pick(photograph.shape[1] - SIZE), pick(photograph.shape[2] - SIZE)
        image = photograph[:, top : top + SIZE, left : left + SIZE].clone()
        index, extent = pick(len(self.items)), SIZE // 3 + pick(SIZE // 3)
        item = F.interpolate(self.items[index][None, None], (extent, extent), mode="bilinear")[0, 0]
        y, x = pick(SIZE - extent), pick(SIZE - extent)
        place, colour = (slice(y, y + extent), slice(x, x + extent)), 0.5 + torch.rand(3, 1, 1, generator=random) / 2
        image[:, *place] = torch.where(item > 0.4, item * colour, image[:, *place])
        box = torch.tensor([[x, y, x + extent, y + extent]], dtype=torch.float32)
        return (image - 0.45) / 0.25, {"boxes": box, "labels": torch.tensor([1])}


class Backbone(nn.Module):
    """A stem and residual blocks; maps at an 8th, a 16th and a 32nd of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.early = nn.Sequential(block(16, 32), block(32, 48))
        self.middle, self.late = block(48, 64), block(64, 96)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        early = self.early(self.stem(x))
        middle = self.middle(early)
        return OrderedDict(early=early, middle=middle, late=self.late(middle))


def block(inside: int, outside: int) -> BasicBlock:
    skip = nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), nn.BatchNorm2d(outside))
    return BasicBlock(inside, outside, stride=2, downsample=skip)


def detector() -> SSD:
    boxes = DefaultBoxGenerator([[], [], []], scales=[0.3, 0.4, 0.5, 0.7])
    head = SSDLiteHead([48, 64, 96], boxes.num_anchors_per_location(), 2, nn.BatchNorm2d)
    return SSD(Backbone(), boxes, (SIZE, SIZE), 2, head=head, image_mean=[0.0] * 3, image_std=[1.0] * 3, topk_candidates=20)


def with_groups(module: nn.Module) -> None:
    """GroupNorm in place of every BatchNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(8, child.num_features))
        else:
            with_groups(child)


def converted(model: SSD, samples: Tensor, rate: float, *, centred: bool) -> torch.optim.Optimizer:
    """What a converted detector needs in all."""
    center: Literal["auto", False] = "auto" if centred else False
    shrinkage = 0.9 if centred else 0.1
    maps = lambda: [map.detach() for map in model.backbone(samples).values()]
    normprop.convert(model.backbone, center=center, in_place=True)
    normprop.convert(model.head, example=(maps(),), center=center, in_place=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    print(normprop.keep_calibrated(model.backbone, optimizer, samples, shrinkage=shrinkage))
    print(
        normprop.keep_calibrated(model.head, optimizer, lambda _step: [maps()], shrinkage=shrinkage, clip=0)
    )  # clipped already
    return optimizer


@torch.no_grad()
def found(model: SSD, scenes: Scenes, seeds: range) -> float:
    """In how many scenes, in %, the box with the highest score overlaps the digit's by half or more."""
    model.eval()
    right = 0
    for image, target in map(scenes.__getitem__, seeds):
        best = model([image])[0]
        if len(best["boxes"]):
            right += float(box_iou(best["boxes"][:1], target["boxes"])) >= 0.5
    return 100 * right / len(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    steps = 3 if options.quick else options.steps

    scenes = Scenes()
    samples = torch.stack([scenes[seed][0] for seed in range(10**6, 10**6 + 16)])
    for label in ("GroupNorm", "converted", "converted, uncentred"):
        torch.manual_seed(options.seed)
        model = detector()
        if label != "GroupNorm":
            optimizer = converted(model, samples, options.rate, centred=label == "converted")
        else:
            with_groups(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
            AdaptiveGradientClipping(optimizer)  # the same clipping
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps, cycle_momentum=False)
        model.train()
        began = time.perf_counter()
        for step in range(steps):
            image, target = scenes[10_000 * options.seed + step]
            optimizer.zero_grad()
            sum(model([image], [target]).values()).backward()
            optimizer.step()
            schedule.step()
        took = 1e3 * (time.perf_counter() - began) / steps
        score = found(model, scenes, range(2 * 10**6, 2 * 10**6 + (4 if options.quick else 200)))
        print(f"{label}: {score:.1f} % found, {took:.0f} ms a step")


if __name__ == "__main__":
    main()

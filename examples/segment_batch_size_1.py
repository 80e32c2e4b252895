"""Segment scenes with one image a step: torchvision's LR-ASPP with GroupNorm, and converted.

Digits of scikit-learn lie on pieces of its photographs; each pixel is background, a small digit (0 to 4) or a large one.

    python examples/segment_batch_size_1.py            # about two minutes on one core
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import normprop
from normprop.optim import AdaptiveGradientClipping

SIZE = 96


class Scenes:
    """Made anew from a number each time."""

    def __init__(self) -> None:
        digits = load_digits()
        self.items, self.labels = torch.tensor(digits.images / 16, dtype=torch.float32), digits.target
        self.photographs = [
            torch.tensor(p.transpose(2, 0, 1) / 255, dtype=torch.float32) for p in load_sample_images().images
        ]

    def __getitem__(self, seed: int) -> tuple[Tensor, Tensor]:
        """A standardised image ``(3, size, size)``, and the class of every pixel."""
        random = torch.Generator().manual_seed(seed)
        pick = lambda below: int(torch.randint(below, (), generator=random))
        photograph = self.photographs[pick(2)]
        top, left = pick(photograph.shape[1] - SIZE), pick(photograph.shape[2] - SIZE)
        image, classes = (
            photograph[:, top : top + SIZE, left : left + SIZE].clone(),
            torch.zeros(SIZE, SIZE, dtype=torch.long),
        )
        for _ in range(1 + pick(3)):
            index, extent = pick(len(self.items)), SIZE // 3 + pick(SIZE // 3)
            item = F.interpolate(self.items[index][None, None], (extent, extent), mode="bilinear")[0, 0]
            y, x = pick(SIZE - extent), pick(SIZE - extent)
            place, inside = (slice(y, y + extent), slice(x, x + extent)), item > 0.4
            colour = torch.rand(3, 1, 1, generator=random)
            image[:, *place] = torch.where(inside, item * colour, image[:, *place])
            classes[place] = torch.where(inside, 1 + int(self.labels[index] > 4), classes[place])
        return (image - 0.45) / 0.25, classes

    def batch(self, seeds: range) -> tuple[Tensor, Tensor]:
        """Several of them."""
        images, classes = zip(*(self[seed] for seed in seeds), strict=True)
        return torch.stack(images), torch.stack(classes)


def with_groups(module: nn.Module) -> nn.Module:
    """GroupNorm in place of every BatchNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(8, child.num_features))
        else:
            with_groups(child)
    return module


@torch.no_grad()
def mean_iou(model: nn.Module, scenes: Scenes, seeds: range) -> float:
    """Mean over classes of intersection over union, in %."""
    images, truth = scenes.batch(seeds)
    found = torch.cat([model.eval()(part)["out"].argmax(1) for part in images.split(16)])
    ratios = [((found == c) & (truth == c)).sum() / ((found == c) | (truth == c)).sum().clamp(min=1) for c in range(3)]
    return 100 * float(torch.stack(ratios).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    steps = 3 if options.quick else options.steps

    scenes = Scenes()
    samples, _ = scenes.batch(range(10**6, 10**6 + (4 if options.quick else 16)))
    for label in ("GroupNorm", "converted"):
        torch.manual_seed(0)
        model: nn.Module = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        model = normprop.convert(model, example=samples[:2]) if label == "converted" else with_groups(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
        began = time.perf_counter()
        if label == "converted":
            print(normprop.keep_calibrated(model, optimizer, samples))
        else:
            AdaptiveGradientClipping(optimizer)  # the same clipping
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps, cycle_momentum=False)
        model.train()
        for step in range(steps):
            images, classes = scenes.batch(range(step, step + 1))
            optimizer.zero_grad()
            F.cross_entropy(model(images)["out"], classes).backward()
            optimizer.step()
            schedule.step()
        score = mean_iou(model, scenes, range(2 * 10**6, 2 * 10**6 + (4 if options.quick else 64)))
        print(f"{label}: {score:.1f} mIoU, {1e3 * (time.perf_counter() - began) / steps:.0f} ms a step")


if __name__ == "__main__":
    main()

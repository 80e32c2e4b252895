"""Scenes to segment or to find boxes in: Fashion-MNIST's clothes on pieces of scikit-learn's photographs, made anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.ops import masks_to_boxes

from normprop.lab.samples.datasets import load

# What is behind the clothes, and of these: tops, trousers, shoes, bags.
CLASSES = 5
# The class of each of Fashion-MNIST's ten kinds.
_KINDS = torch.tensor([1, 2, 1, 1, 1, 3, 1, 3, 4, 3])
# Where an item's pixels are brighter than this, it is.
_INSIDE = 0.1
# An item of which less is to be seen has no box.
_VISIBLE = 0.25


@dataclass(frozen=True)
class Scenes:
    """Photographs and items to make scenes of, of one part of the data.

    Attributes:
        photographs: ``(3, H, W)`` each, values in [0, 1].
        items: ``(N, 1, 28, 28)``, values in [0, 1].
        labels: their classes, from 1.
        size: height and width of a scene.
        shift: whether to take colours as if by other light.
    """

    photographs: list[Tensor]
    items: Tensor
    labels: Tensor
    size: int
    shift: bool = False

    def scene(self, seed: int) -> tuple[Tensor, Tensor]:
        """A standardised image ``(3, size, size)`` and the class of every pixel, 0 for the background."""
        image, classes, _, _ = self._drawn(seed)
        return image, classes

    def boxed(self, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same image, and what torchvision's detectors take: `boxes` ``(N, 4)`` in pixels, and `labels`, from 1.

        A box holds the whole of its item. Items of which others hide more than three quarters have none.
        """
        image, _, masks, labels = self._drawn(seed)
        hidden = torch.zeros(self.size, self.size, dtype=torch.bool)
        kept = []
        for number in reversed(range(len(masks))):
            if (masks[number] & ~hidden).sum() >= _VISIBLE * masks[number].sum():
                kept.insert(0, number)
            hidden |= masks[number]
        boxes = masks_to_boxes(torch.stack([masks[number] for number in kept]))
        boxes[:, 2:] += 1  # the far edges of the last pixels
        return image, {"boxes": boxes, "labels": torch.stack([labels[number] for number in kept])}

    def _drawn(self, seed: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """An image, the class of every pixel, and the pixels and the class of every item, the hindmost first."""
        random = np.random.default_rng(seed)
        photograph = self.photographs[random.integers(len(self.photographs))]
        top, left = (int(random.integers(extent - self.size + 1)) for extent in photograph.shape[1:])
        image = photograph[:, top : top + self.size, left : left + self.size].clone()
        classes = torch.zeros(self.size, self.size, dtype=torch.long)
        masks, labels = [], []
        for _ in range(random.integers(1, 4)):
            index, extent = int(random.integers(len(self.items))), int(random.integers(self.size // 3, self.size * 2 // 3))
            item = F.interpolate(self.items[index : index + 1], (extent, extent), mode="bilinear")[0]
            colour = torch.tensor(random.uniform(0.3, 1.0, (3, 1, 1)), dtype=torch.float32)
            y, x = (int(random.integers(self.size - extent + 1)) for _ in range(2))
            inside = item[0] > _INSIDE
            place = (slice(y, y + extent), slice(x, x + extent))
            image[:, *place] = torch.where(inside, item * colour, image[:, *place])
            classes[place] = torch.where(inside, self.labels[index], classes[place])
            masks.append(torch.zeros(self.size, self.size, dtype=torch.bool))
            masks[-1][place] = inside
            labels.append(self.labels[index])
        if self.shift:
            image = 1 - 0.6 * image
        return (image - 0.45) / 0.25, classes, masks, labels

    def batch(self, seeds: range) -> tuple[Tensor, Tensor]:
        """Several scenes, one a seed."""
        images, classes = zip(*map(self.scene, seeds), strict=True)
        return torch.stack(images), torch.stack(classes)


def training_and_test(size: int, *, shift: bool = False) -> tuple[Scenes, Scenes]:
    """Scenes of training items on the left two thirds of the photographs, and of test items on the right third."""
    clothes = load("fashion-mnist")
    photographs = [torch.tensor(p.transpose(2, 0, 1), dtype=torch.float32) / 255 for p in load_sample_images().images]
    edge = photographs[0].shape[2] * 2 // 3
    parts = []
    for x, y, found in (
        (clothes.x_train, clothes.y_train, [p[:, :, :edge] for p in photographs]),
        (clothes.x_test, clothes.y_test, [p[:, :, edge:] for p in photographs]),
    ):
        parts.append(Scenes(found, x.float() / (255 if x.max() > 1 else 1), _KINDS[y], size, shift))
    return parts[0], parts[1]


def intersections_over_unions(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU of every class, NaN for one that is in neither."""
    both = torch.bincount((predicted * CLASSES + truth).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES).double()
    inside = both.diagonal()
    return inside / (both.sum(0) + both.sum(1) - inside)

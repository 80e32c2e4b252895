"""Average precision of boxes, as PASCAL VOC has it since 2010 (Everingham et al. 2015): the area under all of the curve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

Boxes = dict[str, Tensor]


def mean_average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], *, iou: float = 0.5) -> float:
    """Mean of `average_precision` over the classes that are in the truth.

    Args:
        found: per image `boxes` ``(N, 4)``, `labels` and `scores` ``(N,)``, as torchvision's detectors give them.
        truth: per image `boxes` and `labels`.
        iou: from which overlap on a box is found.
    """
    classes = sorted({int(label) for image in truth for label in image["labels"]})
    return sum(average_precision(found, truth, c, iou=iou) for c in classes) / len(classes)


def average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], label: int, *, iou: float = 0.5) -> float:
    """∫ p(r) dr of one class, p(r) the best precision at a recall of r or more.

    From the highest score to the lowest, a box is right if the box of the truth that it overlaps most overlaps it by `iou`
    or more and wasn't found before.
    """
    wanted = [image["boxes"][image["labels"] == label] for image in truth]
    total = sum(map(len, wanted))
    ranked = [
        (float(score), number, box)
        for number, image in enumerate(found)
        for score, box, kind in zip(image["scores"], image["boxes"], image["labels"], strict=True)
        if kind == label
    ]
    taken: set[tuple[int, int]] = set()
    right = []
    for _, number, box in sorted(ranked, key=lambda one: -one[0]):
        best, overlap = _nearest(box, wanted[number])
        right.append(overlap >= iou and (number, best) not in taken)
        if right[-1]:
            taken.add((number, best))
    if not right or not total:
        return 0.0
    hits = torch.tensor(right).double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    highest = precision.flip(0).cummax(0).values.flip(0)
    steps = torch.diff(hits / total, prepend=torch.zeros(1, dtype=torch.double))
    return float((steps * highest).sum())


def _nearest(box: Tensor, boxes: Tensor) -> tuple[int, float]:
    """Which of the boxes overlaps a box most, and by how much."""
    if not len(boxes):
        return -1, 0.0
    overlap, best = box_iou(box[None], boxes)[0].max(0)
    return int(best), float(overlap)

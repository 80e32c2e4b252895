"""Average precision is what its definition says, found by trying every threshold."""

from __future__ import annotations

import pytest
import torch
from average_precision import average_precision, mean_average_precision
from torch import Tensor


def boxes(corners: list[list[float]], scores: list[float] | None = None, label: int = 1) -> dict[str, Tensor]:
    image = {"boxes": torch.tensor(corners).view(-1, 4), "labels": torch.full((len(corners),), label)}
    return image if scores is None else image | {"scores": torch.tensor(scores)}


LEFT, RIGHT, ELSEWHERE = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [50.0, 50, 60, 60]


def test_all_found_is_one_and_nothing_is_zero() -> None:
    truth = [boxes([LEFT, RIGHT])]
    assert average_precision([boxes([RIGHT, LEFT], [0.3, 0.9])], truth, 1) == pytest.approx(1)
    assert average_precision([boxes([], [])], truth, 1) == 0
    assert average_precision([boxes([LEFT, RIGHT], [0.9, 0.8], label=2)], truth, 1) == 0


def test_a_wrong_box_costs_by_its_rank() -> None:
    truth = [boxes([LEFT, RIGHT])]
    between = [boxes([LEFT, ELSEWHERE, RIGHT], [0.9, 0.5, 0.1])]
    last = [boxes([LEFT, ELSEWHERE, RIGHT], [0.9, 0.1, 0.5])]
    assert average_precision(between, truth, 1) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(last, truth, 1) == pytest.approx(1)


def test_a_box_is_found_once_and_only_with_overlap() -> None:
    truth = [boxes([LEFT, RIGHT])]
    twice = [boxes([LEFT, LEFT, RIGHT], [0.9, 0.8, 0.1])]
    assert average_precision(twice, truth, 1) == pytest.approx((1 + 2 / 3) / 2)
    shifted = [[0.0, 0, 10, 5.1], [0.0, 0, 10, 4.9]]  # overlaps of .51 and .49
    assert [average_precision([boxes([box], [1.0])], [boxes([LEFT])], 1) for box in shifted] == [1, 0]


def test_a_box_of_another_image_is_not_found() -> None:
    assert average_precision([boxes([], []), boxes([LEFT], [1.0])], [boxes([LEFT]), boxes([])], 1) == 0


def test_random_boxes_agree_with_every_threshold_tried() -> None:
    """Interpolated precision by hand: the detections above a score are matched anew for each score."""
    torch.manual_seed(0)
    for _ in range(20):
        truth = [boxes((torch.rand(3, 2).repeat(1, 2) * 20 + torch.tensor([0, 0, 10, 10])).tolist()) for _ in range(2)]
        found = [
            boxes((image["boxes"] + 4 * torch.randn(3, 4)).tolist(), torch.rand(3).tolist()) for image in truth
        ]  # fmt: skip
        expected = sum(best_precision(found, truth, k / 6) for k in range(1, 7)) / 6
        assert average_precision(found, truth, 1) == pytest.approx(expected)


def best_precision(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], recall: float) -> float:
    best = 0.0
    for threshold in torch.cat([image["scores"] for image in found]).tolist():
        right, shown = 0, 0
        for image, real in zip(found, truth, strict=True):
            free = dict(enumerate(real["boxes"].tolist()))
            for index in image["scores"].argsort(descending=True).tolist():
                if image["scores"][index] < threshold:
                    break
                shown += 1
                box = image["boxes"][index].tolist()
                nearest = max(range(len(real["boxes"])), key=lambda i: overlap(box, real["boxes"][i].tolist()))
                if nearest in free and overlap(box, free[nearest]) >= 0.5:
                    right += 1
                    del free[nearest]
        if right / 6 >= recall - 1e-9:
            best = max(best, right / shown)
    return best


def overlap(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_the_mean_is_over_the_classes_of_the_truth() -> None:
    truth = [boxes([LEFT], label=1), boxes([RIGHT], label=3)]
    found = [boxes([LEFT], [0.9], label=1), boxes([RIGHT], [0.9], label=2)]
    assert mean_average_precision(found, truth) == pytest.approx(0.5)

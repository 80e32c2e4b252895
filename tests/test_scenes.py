"""Boxes of scenes are those of what is drawn."""

from __future__ import annotations

import pytest
import torch
from scenes import Scenes
from torch import Tensor


@pytest.fixture
def scenes() -> Scenes:
    """Black photographs, and items that are bright rectangles of a label each."""
    items = torch.zeros(3, 1, 28, 28)
    for number, (top, left) in enumerate(((0, 0), (4, 8), (10, 2))):
        items[number, :, top : 28 - top, left : 28 - left] = 1
    return Scenes([torch.zeros(3, 80, 90)], items, torch.tensor([1, 2, 4]), 64)


def test_a_box_holds_its_item_and_no_more(scenes: Scenes) -> None:
    alone = 0
    for seed in range(40):
        image, target = scenes.boxed(seed)
        same, classes = scenes.scene(seed)
        torch.testing.assert_close(image, same, rtol=0, atol=0)
        assert set(classes.unique().tolist()) - {0} >= {int(target["labels"][-1])}
        if len(target["labels"]) == 1 and len(scenes._drawn(seed)[2]) == 1:
            alone += 1
            rows, columns = torch.where(classes > 0)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert target["boxes"][0].tolist() == [float(edge) for edge in edges]
    assert alone > 5


def test_hidden_items_have_no_box() -> None:
    def square(start: int, end: int) -> Tensor:
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[start:end, start:end] = True
        return mask

    class Drawn(Scenes):
        def _drawn(self, seed: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
            masks = [square(10, 20), square(0, 8), square(0, 6), square(8, 24)]
            return torch.zeros(3, 64, 64), torch.zeros(64, 64), masks, [torch.tensor(label) for label in (1, 2, 3, 4)]

    target = Drawn([], torch.zeros(0), torch.zeros(0), 64).boxed(0)[1]
    assert target["labels"].tolist() == [2, 3, 4]  # of the second 28 of 64 pixels are to be seen, of the first none
    assert target["boxes"][0].tolist() == [0, 0, 8, 8]

"""Detection with one image a step: a small SSDlite from scratch, with several normalisers.

    python experiments/detection.py            # what isn't finished yet; a killed one continues
    python experiments/detection.py --report   # the table from the runs that are there

torchvision's SSD with its SSDlite head on a backbone of five of its residual blocks. The same for all: scenes, their
order, AdamW, rates, adaptive gradient clipping or none. Rate and clipping are chosen on 100 scenes of training material
(validation) with the first seed. A converted detector has `keep_calibrated` on its backbone and on its head; frozen
BatchNorm is measured once on the same 16 scenes. Fashion-MNIST comes from $NORMPROP_DATA/fashion-mnist.npz or
torchvision's download.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import runs_file
import torch
from average_precision import mean_average_precision
from rivals import CONVERTED, NAMES, conversion, with_normalizer
from scenes import CLASSES, Scenes, training_and_test
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.resnet import BasicBlock

import normprop
from normprop.optim import AdaptiveGradientClipping

OUT = Path(__file__).resolve().parent / "results" / "detection" / "runs.jsonl"
NORMS = (*CONVERTED, *NAMES[1:])
# Rate and clipping.
SETTINGS, SEEDS = ((1e-3, 0.0), (1e-3, 0.05), (3e-3, 0.05)), 3
SIZE, STEPS, MEASURED, EVALUATED = 96, 600, 16, 100
# Where the seeds of scenes begin: for measuring, validation, tests, and training.
_MEASURE, _VALIDATE, _TEST, _TRAIN = 10_000_000, 20_000_000, 30_000_000, 0
_CHANNELS = (64, 96, 128)
KEYS = ("norm", "rate", "clip", "seed")


class Backbone(nn.Module):
    """A stem and five residual blocks; maps at an 8th, a 16th and a 32nd of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.early = nn.Sequential(_block(24, 32), _block(32, _CHANNELS[0]), BasicBlock(_CHANNELS[0], _CHANNELS[0]))
        self.middle = _block(_CHANNELS[0], _CHANNELS[1])
        self.late = _block(_CHANNELS[1], _CHANNELS[2])
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Three maps by name."""
        early = self.early(self.stem(x))
        middle = self.middle(early)
        return OrderedDict(early=early, middle=middle, late=self.late(middle))


def _block(inside: int, outside: int) -> BasicBlock:
    skip = nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), nn.BatchNorm2d(outside))
    return BasicBlock(inside, outside, stride=2, downsample=skip)


def detector(norm: str, samples: Tensor) -> SSD:
    """A fresh SSDlite with that normaliser."""
    boxes = DefaultBoxGenerator([[2], [2], [2]], scales=[0.25, 0.4, 0.6, 0.8])
    head = SSDLiteHead(list(_CHANNELS), boxes.num_anchors_per_location(), CLASSES, nn.BatchNorm2d)
    backbone: nn.Module = with_normalizer(Backbone(), norm, samples)
    with torch.no_grad():
        maps = list(backbone(samples).values())
    if norm in CONVERTED:
        normprop.convert(head, example=([m[:2] for m in maps],), in_place=True, **conversion(norm)[0])
    else:
        with_normalizer(head, norm, maps)
    return SSD(
        backbone, boxes, (SIZE, SIZE), CLASSES, head=head, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        detections_per_img=20, topk_candidates=50,
    )  # fmt: skip


def kept(model: SSD, norm: str, optimizer: torch.optim.Optimizer, samples: Tensor, clip: float) -> list[Any]:
    """The two parts kept calibrated: the head on what the backbone makes of the same images at that time."""

    @torch.no_grad()
    def maps(_step: int) -> list[list[Tensor]]:
        return [list(model.backbone(samples).values())]

    options = conversion(norm)[1]
    return [
        normprop.keep_calibrated(model.backbone, optimizer, samples, clip=clip, **options),
        normprop.keep_calibrated(model.head, optimizer, maps, clip=0, **options),  # gradients are clipped already
    ]


def train(parts: tuple[Scenes, Scenes], what: tuple[Any, ...], steps: int = STEPS) -> dict[str, Any]:
    """One run: what it was, and what came of it."""
    norm, rate, clip, seed = what
    training, test = parts
    torch.manual_seed(seed)
    samples = torch.stack([training.boxed(number)[0] for number in range(_MEASURE, _MEASURE + MEASURED)])
    model = detector(norm, samples).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    began = time.process_time()
    handles = []
    if norm in CONVERTED:
        handles = kept(model, norm, optimizer, samples, clip)
    elif clip:
        AdaptiveGradientClipping(optimizer, clip=clip)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    losses = []
    for step in range(steps):
        image, target = training.boxed(_TRAIN + seed * 1_000_000 + step)
        loss = sum(model([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.process_time() - began
    return dict(zip(KEYS, what, strict=True)) | {
        "steps": steps, "loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": seconds,
        "measuring": sum(handle.seconds for handle in handles),
        "validation": precision(model, training, _VALIDATE), "test": precision(model, test, _TEST),
    }  # fmt: skip


@torch.no_grad()
def precision(model: SSD, scenes: Scenes, first: int) -> float:
    """Mean average precision at an IoU of ½ in %, of a detector in eval mode."""
    model.eval()
    images, truth = zip(*map(scenes.boxed, range(first, first + EVALUATED)), strict=True)
    found = [one for start in range(0, EVALUATED, 20) for one in model(list(images[start : start + 20]))]
    return 100 * mean_average_precision(found, truth)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: see `runs_file.table`."""
    rows = ((norm, {"norm": norm}) for norm in NORMS)
    return runs_file.table(runs, KEYS, SETTINGS, "normaliser | test AP at IoU ½, %", rows)


def main() -> None:
    parser = runs_file.parser(__doc__, OUT, SEEDS)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    options = parser.parse_args()
    runs = runs_file.read(options.out)
    if not options.report:
        parts, cells = training_and_test(SIZE), ((norm,) for norm in options.norms)
        runs_file.study(options.out, runs, KEYS, cells, SETTINGS, options.seeds, lambda what: train(parts, what))
    print(table(runs))


if __name__ == "__main__":
    main()

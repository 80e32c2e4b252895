"""Convert torchvision's detectors in parts and its segmentation networks whole; compare, train on one image, fold.

python examples/convert_detectors.py                                  # all of them, some minutes on one core
python examples/convert_detectors.py ssdlite320_mobilenet_v3_large

Nothing is downloaded: networks have random weights and running statistics, and images are noise, in double precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import detection, get_model, list_models, segmentation
from torchvision.ops import FrozenBatchNorm2d

import normprop

KINDS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, KINDS) for m in module.modules())


def build(name: str) -> nn.Module:
    """A network with statistics as training leaves them."""
    options = {"num_classes": 2 if "keypoint" in name else 4}
    if name in list_models(detection) and "ssd" not in name:
        options |= {"min_size": 64, "max_size": 96}
    if "rcnn" in name:
        options |= {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
    model: nn.Module = get_model(name, weights=None, weights_backbone=None, **options)
    for module in model.modules():
        if isinstance(module, KINDS):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
    return model.eval()


def parts(model: nn.Module) -> Iterator[str]:
    """Paths of what to convert: the parts of a detector that hold BatchNorms, or the whole network."""
    if not hasattr(model, "transform"):
        yield ""
        return
    for path in ("backbone", "head", "roi_heads.box_head", "roi_heads.mask_head", "roi_heads.keypoint_head"):
        module = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None and norms(module):
            yield path


@torch.no_grad()
def watched(model: nn.Module, paths: list[str], images: Any) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """What parts of a network take and give in one forward."""
    given: dict[str, Any] = {}
    found: dict[str, list[Tensor]] = {}

    def note(path: str, args: Any, output: Any) -> None:
        given[path] = args
        found[path] = [t.clone() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]

    hooks = [model.get_submodule(p).register_forward_hook(lambda _, a, out, p=p: note(p, a, out)) for p in paths]
    model(images)
    for hook in hooks:
        hook.remove()
    return given, found


def difference(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> float:
    """Largest difference of what parts give, relative to the largest number of each."""
    pairs = [pair for path in a for pair in zip(a[path], b[path], strict=True)]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


def loss(model: nn.Module) -> Tensor:
    """Of one image in training mode."""
    model.train()
    if not hasattr(model, "transform"):
        outputs = model(torch.rand(1, 3, 64, 64))
        return sum(nn.functional.cross_entropy(y, torch.zeros(1, 64, 64, dtype=torch.long)) for y in outputs.values())
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.zeros(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.ones(1, 17, 3, dtype=torch.float32),
    }
    return sum(model([torch.rand(3, 64, 64)], [target]).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of torchvision's models; all by default")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print(f"{'':40}{'BatchNorms':>12}{'converted':>12}{'folded':>12}   converted parts")
    for name in options.names or (*list_models(detection), *list_models(segmentation)):
        torch.manual_seed(0)
        model = build(name)
        images: Any = (
            [torch.rand(3, 64, 80), torch.rand(3, 72, 64)] if hasattr(model, "transform") else torch.rand(2, 3, 64, 64)
        )
        paths, count = list(parts(model)), norms(model)
        if not count:
            print(f"{name:40}{count:>12}")
            continue
        given, before = watched(model, paths, images)
        for path in paths:
            normprop.convert(model.get_submodule(path), example=given[path], in_place=True)
        assert norms(model) == 0
        after = watched(model, paths, images)[1]
        loss(model).backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        folded = watched(normprop.fold(model.eval()), paths, images)[1]
        changes = f"{difference(before, after):>12.0e}{difference(after, folded):>12.0e}"
        print(f"{name:40}{count:>12}{changes}   {', '.join(paths) or 'the whole'}", flush=True)


if __name__ == "__main__":
    main()

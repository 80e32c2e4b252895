"""Convert any timm network with BatchNorm, check that it computes the same on real images, fold it and export to ONNX.

python examples/convert_timm.py resnet18
python examples/convert_timm.py mobilenetv3_small_100 --checkpoint weights.safetensors

Without a checkpoint nothing is downloaded: the network gets random running statistics, γ and β, so that every
BatchNorm does something.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normprop


def images(model: nn.Module) -> Tensor:
    """scikit-learn's two photographs, in four crops each, as the model wants them."""
    from PIL import Image

    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    boxes = [(0, 0, 427, 427), (213, 0, 640, 427), (100, 0, 500, 400), (150, 50, 450, 350)]
    return torch.stack([transform(photograph.crop(box)) for photograph in photographs for box in boxes])


@torch.no_grad()
def randomise_(model: nn.Module, x: Tensor) -> None:
    """Random γ and β; running statistics measured on the images, then disturbed, as training on other data would."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.1)
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))


def seconds(model: nn.Module, x: Tensor, backward: bool = False) -> float:
    """Least of five runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = model(x)
        if backward:
            y.square().mean().backward()
        times.append(time.perf_counter() - start)
    return min(times)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of a score, relative to the largest score."""
    return float((a - b).abs().max() / a.abs().max())


def onnx_output(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """What ONNX Runtime makes of the exported model for another batch size, and the file's size."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        path = Path(folder, "model.onnx")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path)
        output = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})[0]
        return torch.from_numpy(output), path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="resnet18", help="any name of timm.list_models()")
    parser.add_argument("--checkpoint", type=Path, help="local weights, in any format that timm loads")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(options.name, pretrained=False, checkpoint_path=str(options.checkpoint or ""))
    x = images(model)
    if options.checkpoint is None:
        randomise_(model, x)
    model.eval()
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.name}: {size:.1f} M parameters, {norms} BatchNorms, images of {tuple(x.shape[1:])}")

    start = time.perf_counter()
    converted = normprop.convert(model)
    print(f"converted in {time.perf_counter() - start:.1f} s")
    folded = normprop.fold(converted)
    with torch.no_grad():
        expected = model(x)
        print(f"same function on {len(x)} photographs: relative difference {difference(expected, converted(x)):.0e}")
        print(f"folded:                         relative difference {difference(expected, folded(x)):.0e}")
        alone = torch.cat([converted(x[i : i + 1]) for i in range(len(x))])
        print(f"one image at a time:            relative difference {difference(expected, alone):.0e}")
    if not options.no_onnx:
        output, length = onnx_output(folded, x)
        print(
            f"ONNX Runtime, folded, batch 3:  relative difference {difference(expected[:3], output):.0e}, "
            f"{length / 1e6:.1f} MB"
        )

    print(f"\nSeconds, least of five, {torch.get_num_threads()} thread(s):  BatchNorm  converted  folded")
    for count in (1, len(x)):
        forward = [seconds(m, x[:count]) for m in (model, converted, folded)]
        print(f"  eval, batch {count:<24}" + "".join(f"{t:>11.3f}" for t in forward))
    trained = copy.deepcopy(model).train(), converted.train()
    steps = [seconds(m, x, backward=True) for m in trained]
    print(f"  forward and backward, batch {len(x):<8}" + "".join(f"{t:>11.3f}" for t in steps))


if __name__ == "__main__":
    main()

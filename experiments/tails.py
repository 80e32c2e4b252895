"""The largest standard deviation in timm's repvgg_b0, whose sites without a layer divide by what nearly dead units vary.

python experiments/tails.py
"""

from __future__ import annotations

import timm
import torch

import normprop
from normprop.sites.site import Site


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def largest(model: torch.nn.Module) -> float:
    report = normprop.inspect(model, noise(8, 0))
    return max(float(row.measured.std.max()) for row in report.rows if row.measured is not None)


def main() -> None:
    torch.manual_seed(0)
    model = normprop.convert(timm.create_model("repvgg_b0"), example=noise(2, 0))
    print(f"converted fresh {largest(model):.2g}")
    with torch.no_grad():
        for site in model.modules():
            if isinstance(site, Site):
                site.bias.zero_()
    print(f"β at 0 {largest(model):.2g}")
    normprop.calibrate(model, noise(64, 1))
    print(f"calibrated besides {largest(model):.2g}")


if __name__ == "__main__":
    main()

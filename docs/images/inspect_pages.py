"""Write the screenshots of docs/inspect.md: `python docs/images/inspect_pages.py`. Needs Chromium and playwright."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

import normprop

HERE = Path(__file__).parent


def network() -> nn.Sequential:
    """The network of the page: twelve convolutions, one of which starts too large."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(12):
        layers += [nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    with torch.no_grad():
        layers[10].weight.mul_(200)  # left over from an experiment
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def save(page: Any, name: str) -> None:
    """A small picture: half of a byte's colours are enough for a page."""
    path = HERE / f"{name}.png"
    page.screenshot(path=str(path))
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """Open the page, then the place of its first finding, then colour it by size."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder) / "report.html"
        normprop.inspect(network(), torch.randn(64, 3, 16, 16)).save_html(report)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 560})
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.locator(".findings button").first.click()
        save(page, "inspect_fault")
        page.locator("#details .close").click()
        page.locator("#colour").select_option("std")
        page.get_by_label("Fit the whole graph").click()
        save(page, "inspect_std")
        browser.close()


if __name__ == "__main__":
    main()

"""The documentation site builds without a warning, and its reference has every public name."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import normprop

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not re.search("^WARNING", run.stderr, re.MULTILINE)
    return target


def anchors(page: Path) -> set[str]:
    return set(re.findall(r'id="([^"]+)"', page.read_text(encoding="utf-8")))


def test_every_public_name_has_an_entry(site: Path) -> None:
    names = {f"normprop.{name}" for name in normprop.__all__}
    names |= {f"normprop.nn.{name}" for name in normprop.nn.__all__}
    assert names - anchors(site / "reference" / "index.html") == set()


def test_every_page_is_there_and_the_map_leads_into_the_reference(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "index.html" if page.stem == "index" else site / page.stem / "index.html").exists()
    assert (site / "lineage.html").read_text(encoding="utf-8") == (ROOT / "docs" / "lineage.html").read_text(
        encoding="utf-8"
    )
    papers = runpy.run_path(str(ROOT / "docs" / "lineage" / "build.py"))["papers"]()
    for target in {paper["page"] for paper in papers if "page" in paper}:
        path, _, anchor = target.partition("#")
        assert not anchor or anchor in anchors(site / path / "index.html"), target


def test_formulas_are_set_without_a_script(site: Path) -> None:
    text = (site / "method" / "index.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "$\\" not in text
    assert "mathjax" not in text.lower()

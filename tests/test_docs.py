"""The documentation runs, its links lead somewhere, the examples work."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")  # Opacus says these to whoever tries it
    for said in ("Secure RNG turned off", "Full backward hook is firing")
]
ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RUN = [page for page in PAGES if "```python" in page.read_text()]
EXAMPLES = {
    "finetune_batch_size_1.py": ["--quick"],
    "convert_timm.py": ["test_resnet", "--no-onnx"],
    "convert_detectors.py": ["lraspp_mobilenet_v3_large"],
    "detect_batch_size_1.py": ["--quick"],
    "moments.py": [],
    "paper_layers.py": ["--quick"],
    "segment_batch_size_1.py": ["--quick"],
    "train_adamw.py": ["--quick"],
    "train_privately.py": ["--quick"],
    "character_lstm.py": ["--updates", "20"],
}
_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.usefixtures("_rules_of_the_page_end_with_it")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One namespace a page; a block marked `text output` is what the code before it has printed last."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        language, kind, body = match.groups()
        if language == "python":
            line = text[: match.start(3)].count("\n")
            exec(compile("\n" * line + body, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif kind.strip() == "output":
            assert printed.strip() == body.strip(), f"{page.name} shows another output than its code prints"


@pytest.fixture
def _rules_of_the_page_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from normprop.rules.table import TABLE

    monkeypatch.setattr(TABLE, "_rules", dict(TABLE._rules))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_and_anchors_exist(page: Path) -> None:
    text = _BLOCK.sub("", page.read_text())
    for target in _LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}, which has no such heading"


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_example_is_run() -> None:
    assert EXAMPLES.keys() == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.usefixtures("_torch_as_it_was")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *EXAMPLES[name]])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


@pytest.fixture
def _torch_as_it_was() -> Iterator[None]:
    """Examples are run here, not in processes of their own, which would spend their time on imports."""
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_changelog_and_citation_name_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    top = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top is not None
    assert top[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()

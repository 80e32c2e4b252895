"""Settings of the whole suite."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.chromium import CHROMIUM

# The same examples in every run: a suite that fails must fail again. Drop the profile to search for new ones.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--inductor", action="store_true", help="only tests that compile, and those in earnest")


def pytest_configure(config: pytest.Config) -> None:
    """With --inductor, have torch's own compiler take the place of backends that compile nothing and are quicker."""
    if not config.getoption("--inductor"):
        return
    torch_compile = torch.compile

    def compile_in_earnest(*args: Any, backend: Any = "inductor", **options: Any) -> Any:
        return torch_compile(*args, backend="inductor" if backend in ("eager", "aot_eager") else backend, **options)

    torch.compile = compile_in_earnest  # type: ignore[assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--inductor"):
        return
    compiling = [item for item in items if _compiles(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in compiling])
    items[:] = compiling


def _compiles(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and bool(
        re.search(r"torch\.compile|compiled", inspect.getsource(item.function))
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()

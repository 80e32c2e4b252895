"""A real browser for pages: Chromium, headless."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it with `apt-get install chromium`")
Open = Callable[..., Any]


@contextmanager
def opened_pages(browser: Any, pages: Mapping[str, Path]) -> Iterator[Open]:
    """Opens pages by name; at the end nothing may have gone wrong in them, and nothing been asked of a network."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_page(name: str, width: int = 1200, height: int = 760, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(pages[name].as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def position(page: Any, node: str) -> tuple[float, float]:
    """Where a node is on the screen."""
    x, y = page.evaluate(
        """id => { const p = view.cy.getElementById(id).renderedPosition(), box = view.canvas.getBoundingClientRect();
        return [p.x + box.x, p.y + box.y]; }""",
        node,
    )
    return x, y

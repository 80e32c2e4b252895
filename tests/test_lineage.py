"""The map of the literature: its data, and its page in a real browser."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

import normprop
from normprop.lab.commands import COMMANDS
from tests.chromium import Open, needs_chromium, opened_pages, position

DOCS = Path(__file__).parents[1] / "docs"
BUILD = runpy.run_path(str(DOCS / "lineage" / "build.py"))
PAPERS: list[dict[str, Any]] = BUILD["papers"]()


def test_the_page_is_that_of_the_data() -> None:
    assert (DOCS / "lineage.html").read_text(encoding="utf-8") == BUILD["page"](), "run python docs/lineage/build.py"


def test_every_entry_is_complete_and_there_once() -> None:
    assert len({paper["title"].lower() for paper in PAPERS}) == len(PAPERS) > 125
    for paper in PAPERS:
        assert paper["title"]
        assert isinstance(paper["authors"], list)
        assert paper["year"] is None or 1950 < paper["year"] < 2100
        assert paper["relation"] in ("root", "cites", "cited")
        assert not {*paper} - {"title", "authors", "year", "relation", "adds", "arxiv", "api", "id", "page"}
    assert [paper["relation"] for paper in PAPERS].count("root") == 1


def test_places_in_normprop_exist() -> None:
    for api in {paper["api"] for paper in PAPERS if "api" in paper}:
        if " " in api:
            assert api.split()[1] in COMMANDS
        else:
            assert reduce(getattr, api.split(".")[1:], normprop) is not None


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    with opened_pages(browser, {"lineage": DOCS / "lineage.html"}) as open_page:
        yield open_page


def of(title: str) -> str:
    return next(str(paper["id"]) for paper in PAPERS if paper["title"] == title)


@needs_chromium
def test_gestures(opened: Open) -> None:
    page, group = opened("lineage"), of("Group Normalization")
    place = position(page, group)
    page.mouse.move(*place)
    page.wait_for_selector(".tooltip:not([hidden])")
    assert page.locator(".tooltip").inner_text() == "Group Normalization"
    page.mouse.click(*place)
    page.wait_for_selector("#details:not([hidden])")
    text = page.locator("#details").inner_text()
    assert all(word in text for word in ("Group Normalization", "Yuxin Wu", "2018", "cites", "channels"))
    links = page.locator("#details a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert links == ["https://arxiv.org/abs/1803.08494", "compare/"]
    place = position(page, group)  # the details took their room
    page.mouse.move(*place)
    page.mouse.down()
    page.mouse.move(place[0] + 60, place[1] + 20, steps=4)
    page.mouse.up()
    moved = position(page, group)
    assert (round(moved[0] - place[0]), round(moved[1] - place[1])) == (60, 20)
    before = page.evaluate("view.cy.zoom()")
    page.get_by_label("Zoom in").click()
    assert page.evaluate("view.cy.zoom()") > before
    page.locator("#search").fill("shekhovtsov")
    assert page.evaluate("view.cy.nodes('.hit').length") == 3
    page.locator("#search").fill("")
    page.locator("#ours").check()
    assert page.evaluate("view.cy.nodes('.hit').length") == sum("api" in paper for paper in PAPERS)


@needs_chromium
def test_colours_tell_the_relation(opened: Open) -> None:
    page = opened("lineage")
    fills = page.evaluate("view.cy.nodes().map(n => [n.data('relation'), n.data('fill')])")
    by_relation = {relation: {fill for r, fill in fills if r == relation} for relation, _ in fills}
    assert all(len(tones) == 1 for tones in by_relation.values())
    grey, green, blue = (
        [int(tone[i : i + 2], 16) for i in (1, 3, 5)] for tone in map(min, map(by_relation.get, ("root", "cites", "cited")))
    )
    assert max(grey) - min(grey) < 20  # dark grey
    assert max(grey) < 110
    assert green[1] == max(green)
    assert blue[2] == max(blue)
    page.locator("#as-table").click()
    assert page.locator("#table li:visible").count() == len(PAPERS)

"""The interactive page, in a real browser: each gesture changes what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normprop
from tests.chromium import Open, needs_chromium, opened_pages, position
from tests.zoo import build

pytestmark = needs_chromium


def exploding() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(64, 64), nn.ReLU())]
    net = nn.Sequential(nn.Sequential(*layers[:8]), nn.Sequential(*layers[8:]))
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        net[1][0].weight.mul_(40)
    return net


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of an exploding network and of a residual one, written once."""
    folder = tmp_path_factory.mktemp("pages")
    net = exploding()
    log = [{"step": 10 * i, "normprop/1.0/std": 2.0**i, "normprop/1.0/mean": 0.0} for i in range(5)]
    normprop.inspect(net, torch.randn(256, 64)).save_html(folder / "exploding.html", log=log)
    normprop.propagate(build("torchvision:resnet50")).save_html(folder / "resnet50.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    with opened_pages(browser, pages) as open_page:
        yield open_page


def shown(page: Any) -> list[str]:
    return page.evaluate("view.cy.nodes().filter(n => !n.isParent()).map(n => n.id())")  # type: ignore[no-any-return]


def test_hovering_tells_name_and_moments(opened: Open) -> None:
    page = opened("exploding")
    assert page.locator(".tooltip").is_hidden()
    page.evaluate("view.reach('r:1_0')")
    page.mouse.move(*position(page, "r:1_0"))
    page.wait_for_selector(".tooltip:not([hidden])")
    text = page.locator(".tooltip").inner_text()
    assert text.startswith("1.0\nLinear\npredicted mean")
    assert "measured mean" in text
    assert "jumps" in text
    page.mouse.move(5, 5)
    page.wait_for_selector(".tooltip", state="hidden")


def test_clicking_shows_details(opened: Open) -> None:
    page = opened("exploding")
    assert page.locator("#details").is_hidden()
    page.mouse.click(*position(page, "r:0_0"))
    page.wait_for_selector("#details:not([hidden])")
    text = page.locator("#details").inner_text()
    assert "64" in text
    assert "normprop.rules.linear.linear" in text
    assert "test_page.py:" in text
    assert "normprop.inspect(net" in text  # the line of code
    assert page.locator("#details svg").count() >= 3  # std and mean per channel, histogram
    assert page.locator("#details svg[aria-label^=Histogram] rect").count() == 40
    page.locator("#details .close").click()
    assert page.locator("#details").is_hidden()


def test_a_finding_leads_to_its_place(opened: Open) -> None:
    page = opened("exploding")
    page.locator(".findings button").first.click()
    assert page.evaluate("view.cy.nodes(':selected').map(n => n.id())") == ["r:1_0"]
    assert "jumps" in page.locator("#details").inner_text()


def test_dragging_moves_a_node_alone(opened: Open) -> None:
    page = opened("exploding")
    other, before = position(page, "r:0_2"), position(page, "r:0_0")
    page.mouse.move(*before)
    page.mouse.down()
    page.mouse.move(before[0] + 120, before[1] + 30, steps=5)
    page.mouse.up()
    after = position(page, "r:0_0")
    assert (round(after[0] - before[0]), round(after[1] - before[1])) == (120, 30)
    assert position(page, "r:0_2") == other


def test_buttons_and_wheel_zoom(opened: Open) -> None:
    page = opened("exploding")
    zoom = lambda: page.evaluate("view.cy.zoom()")
    box = page.locator(".controls").bounding_box()
    assert box["x"] + box["width"] > 1150
    assert box["y"] + box["height"] > 700  # at the bottom right
    start = zoom()
    page.get_by_label("Zoom in").click()
    nearer = zoom()
    page.get_by_label("Zoom out").click()
    page.get_by_label("Zoom out").click()
    assert zoom() < start < nearer
    page.get_by_label("Fit the whole graph").click()
    extent = page.evaluate("[view.cy.elements().renderedBoundingBox(), view.cy.height()]")
    assert extent[0]["y1"] >= 0
    assert extent[0]["y2"] <= extent[1]
    fitted = zoom()
    page.mouse.move(600, 500)
    page.mouse.wheel(0, -300)
    page.wait_for_function("before => view.cy.zoom() > before", arg=fitted)


def test_searching_dims_the_rest_and_filters_the_table(opened: Open) -> None:
    page = opened("exploding")
    page.locator("#search").fill("relu")
    bright = page.evaluate("view.cy.nodes().filter(n => !n.isParent() && !n.hasClass('dim')).map(n => n.id())")
    assert bright == [f"r:{i}_{j}" for i in range(2) for j in (1, 3, 5, 7)]
    assert page.locator("#hits").inner_text() == "8 of 17"
    page.locator("#as-table").click()
    assert page.locator("tbody tr:visible").count() == 8
    page.locator("#search").fill("")
    assert page.locator("tbody tr:visible").count() == 17
    assert page.evaluate("view.cy.nodes('.dim').length") == 0


def test_blocks_open_and_close(opened: Open) -> None:
    page = opened("resnet50")
    stages = [f"g:layer{i}" for i in range(1, 5)]
    start = shown(page)
    assert len(start) <= 40
    page.locator("#collapse").click()
    closed = shown(page)
    assert [node for node in closed if node.startswith("g:")] == stages
    page.mouse.dblclick(*position(page, "g:layer2"))
    page.wait_for_function("view.cy.getElementById('b:layer2').length === 1")
    assert {f"g:layer2.{i}" for i in range(4)} <= set(shown(page))
    page.locator("#details button", has_text="Collapse this block").click()
    assert shown(page) == closed
    page.locator("#expand").click()
    assert len(shown(page)) == page.evaluate("rows.length")


def test_colours_follow_what_is_chosen(opened: Open) -> None:
    page = opened("exploding")
    leaves = "view.cy.nodes().filter(n => !n.isParent())"
    fills = lambda: page.evaluate(f"Object.fromEntries({leaves}.map(n => [n.id(), n.data('fill')]))")
    finding = fills()
    assert [node for node, fill in finding.items() if fill == finding["r:1_0"]] == ["r:1_0"]
    for choice in ("drift", "std", "mean"):
        page.locator("#colour").select_option(choice)
        assert fills() != finding
        assert page.locator("#legend i").count() >= 2
    page.locator("#colour").select_option("std")
    assert len({fill for node, fill in fills().items() if node.startswith("r:1_")}) < len(set(fills().values()))


def test_the_table_sorts(opened: Open) -> None:
    page = opened("exploding")
    page.locator("#as-table").click()
    assert page.locator("#stage").is_hidden()
    column = lambda: [float(text) for text in page.locator("tbody tr td:nth-child(5)").all_inner_texts()]
    unsorted = column()
    page.locator("th button", has_text="std").first.click()
    assert column() == sorted(unsorted) != unsorted
    page.locator("th button", has_text="std").first.click()
    assert column() == sorted(unsorted, reverse=True)
    page.locator("tbody tr").first.focus()
    name = page.locator("tbody tr").first.get_attribute("data-name")
    page.keyboard.press("Enter")
    assert page.evaluate("view.cy.nodes(':selected').map(n => n.id())") == [f"r:{name}"]


def test_the_keyboard_reaches_everything(opened: Open) -> None:
    page = opened("resnet50")
    selected = lambda: page.evaluate("view.cy.nodes(':selected').map(n => n.id())")
    page.locator(".canvas").focus()
    page.keyboard.press("ArrowDown")
    assert selected() == ["r:x"]
    page.keyboard.press("ArrowDown")
    assert selected() == ["r:conv1"]
    page.keyboard.press("ArrowUp")
    assert selected() == ["r:x"]
    before = page.evaluate("view.cy.zoom()")
    page.keyboard.press("+")
    assert page.evaluate("view.cy.zoom()") > before
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    [block] = selected()
    assert block.startswith("g:layer1")
    count = len(shown(page))
    page.keyboard.press("Enter")
    assert len(shown(page)) > count
    page.keyboard.press("Escape")
    assert selected() == []
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_a_log_is_gone_through_by_a_slider(opened: Open) -> None:
    page = opened("exploding")
    page.locator("#colour").select_option("std")
    page.locator("#step").fill("0")
    first = page.evaluate("view.cy.getElementById('r:1_0').data()")
    page.locator("#step").fill("4")
    last = page.evaluate("view.cy.getElementById('r:1_0').data()")
    assert page.locator("#step-shown").inner_text() == "40"
    assert first["fill"] != last["fill"]
    assert first["label"].endswith("std 1")
    assert last["label"].endswith("std 16")
    assert opened("resnet50").locator("#steps").is_hidden()


def test_light_and_dark(opened: Open) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = opened("exploding", color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ink, ground = page.evaluate("[colour('ink'), colour('ground')]")
        light = lambda tone: sum(int(tone[i : i + 2], 16) for i in (1, 3, 5))
        assert abs(light(ink) - light(ground)) > 500
    assert len(set(grounds)) == 2


def test_a_narrow_screen_needs_no_sideways_scrolling(opened: Open) -> None:
    page = opened("exploding", width=400, height=760)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.mouse.click(*position(page, "r:0_0"))
    page.wait_for_selector("#details:not([hidden])")
    box = page.locator("#details").bounding_box()
    assert box["x"] >= 0
    assert box["width"] <= 400
    assert box["y"] + box["height"] <= 761
    assert page.get_by_label("Zoom in").is_visible()
    assert position(page, "r:0_0")[1] < box["y"]  # the details leave the node in sight


def test_the_table_stands_without_scripts(opened: Open, browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["exploding"].as_uri())
    assert page.locator("tbody tr").first.is_visible()
    assert page.locator("tbody tr").count() == 17
    context.close()


def test_a_large_network_has_a_page_of_a_few_megabytes(pages: dict[str, Path]) -> None:
    assert pages["resnet50"].stat().st_size < 3e6

"""Customize in a browser: the example is learnt with a painted mask; a stopped run goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from clicks import PHONE, ended, overflow, tab
from PIL import Image

from tabs.base import App

TimeoutError = pytest.importorskip("playwright.sync_api", reason="needs playwright").TimeoutError
Visit = Callable[..., Any]


def quickly(panel: Any, train_steps: int, every: int) -> None:
    """The example, with few steps of everything."""
    pictures = panel.locator("#cut").locator("img")
    for _ in range(3):  # a page that was just opened may miss a click
        panel.get_by_role("button", name="Try an example").click()
        with suppress(TimeoutError):
            pictures.nth(4).wait_for(timeout=40_000)
            break
    assert pictures.count() >= 5
    panel.get_by_role("button", name="Options of the method").click()
    for option, value in (("max_train_steps", train_steps), ("train_batch_size", 1), ("rank", 2)):
        box = panel.get_by_label(option, exact=False).first
        box.fill(str(value))
        box.press("Tab")
    panel.get_by_role("button", name="Samples and pictures").click()
    panel.get_by_label("Prompts to try it with").fill("a {} on a red background")
    for label, value in (("Pictures for each prompt", 2), ("Steps of drawing", 2), ("A sample and a checkpoint", every)):
        panel.get_by_label(f"number input for {label}").fill(str(value))


def paint(page: Any, panel: Any) -> None:
    """A stroke over the canvas."""
    panel.get_by_role("button", name="Masks: what counts").click()
    panel.locator("#cut img").first.click()
    canvas = panel.locator(".image-container canvas, canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)
    panel.get_by_role("button", name="Brush", exact=True).first.click()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.35 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    for share in (0.45, 0.55, 0.65):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + share * box["height"], steps=3)
    page.mouse.up()


def test_an_example_is_learnt_with_a_mask_and_offered(visit: Visit, app: App, picture: Callable[..., None]) -> None:
    page = visit()
    panel = tab(page, "Customize")
    quickly(panel, 4, 2)
    paint(page, panel)
    panel.get_by_role("button", name="Keep as its mask").click()
    panel.get_by_text("of picture 1").wait_for()
    panel.get_by_role("button", name="Masks: what counts").click()
    panel.get_by_role("button", name="Learn it").click()
    ended(panel)
    panel.get_by_text("which Compare and Compose offer").wait_for()
    assert panel.locator("#learnt").locator("img").count() == 2
    for opened in ("Options of the method", "Samples and pictures"):
        panel.get_by_role("button", name=opened).click()
    page.wait_for_timeout(1500)  # for pictures to be loaded
    picture(page, "customize")
    newest = app.workspace.edits()[0]
    folder = app.workspace.path(newest)
    assert len(list((folder / "images").glob("*.png"))) == 5 and len(list((folder / "samples").glob("*.png"))) == 2
    with Image.open(folder / "masks" / "000.png") as painted, Image.open(folder / "masks" / "001.png") as other:
        assert 0 < sum(painted.histogram()[128:]) < painted.width * painted.height and other.getextrema() == (255, 255)
    panel = tab(page, "Compare")
    panel.get_by_label("Edits, in order", exact=True).click()
    page.get_by_role("option", name=newest.partition("/")[2]).wait_for()


def test_a_stopped_run_is_gone_on_with_and_kept_early(visit: Visit, app: App) -> None:
    runs = app.workspace.folder / "runs"
    before = {path.name for path in runs.glob("*")}  # by other tests of this app
    page = visit()
    panel = tab(page, "Customize")
    quickly(panel, 300, 1)
    panel.get_by_role("button", name="Learn it").click()
    panel.locator("#samples img").first.wait_for()
    panel.get_by_role("button", name="Stop", exact=True).click()
    ended(panel, "Stopped.")
    [stopped] = {path.name for path in runs.iterdir()} - before
    panel.get_by_role("button", name="Go on with it").click()
    panel.get_by_role("button", name="Stop and keep").click()
    ended(panel)
    assert f"runs/{stopped}" == app.workspace.edits()[0] and not list(app.workspace.path(f"runs/{stopped}").glob("checkpoint-*"))


@pytest.mark.parametrize("title", ["Customize", "Compose"])
def test_it_fits_a_phone(visit: Visit, picture: Callable[..., None], title: str) -> None:
    page = visit(PHONE, "dark")
    tab(page, title)
    assert overflow(page) <= 0
    picture(page, f"{title.lower()}-phone")

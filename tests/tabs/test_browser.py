"""Each tab's main job, done by clicking in a real browser on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from clicks import PHONE, choose, ended, few_pictures, fits_a_phone, overflow, tab

from tabs.base import App

Visit = Callable[..., Any]


def test_compare_draws_and_shows_attention(visit: Visit, picture: Callable[..., None]) -> None:
    page = visit()
    panel = tab(page, "Compare")
    panel.get_by_role("button", name="Draw").click()
    ended(panel)
    assert panel.locator(".pal-slider img").count() == 2
    panel.get_by_label("pistol", exact=True).click()
    panel.get_by_text("without edits", exact=True).wait_for()
    picture(page, "compare")


def test_an_edit_that_was_erased_is_compared_at_half_its_strength(visit: Visit, app: App, picture: Callable[..., None]) -> None:
    page = visit()
    panel = tab(page, "Erase")
    few_pictures(panel)
    panel.get_by_role("button", name="Erase", exact=True).click()
    ended(panel)
    assert "is drawn, asked by name" in panel.get_by_role("grid").inner_text()
    picture(page, "erase")
    fits_a_phone(page)
    newest = app.workspace.edits()[0].partition("/")[2]

    panel = tab(page, "Compare")
    choose(page, panel, "Edits, in order", newest)
    panel.get_by_label("Prompt").click()
    strength = panel.get_by_label(f"number input for Strength of {newest}")
    strength.fill("0.5")
    strength.press("Tab")
    panel.get_by_label("number input for Pictures").fill("4")
    panel.get_by_role("button", name="Draw").click()
    ended(panel)
    assert panel.locator("#without-edits img").count() == panel.locator("#with-edits img").count() == 4
    picture(page, "compare-edited")

    panel = tab(page, "Jobs")
    panel.get_by_text("Erase pistol with uce").first.wait_for()
    choose(page, panel, "Look at what was kept", newest)
    panel.get_by_text("Measured").wait_for()
    picture(page, "jobs")
    fits_a_phone(page)


def test_training_is_stopped_in_its_middle_and_leaves_nothing(visit: Visit, app: App) -> None:
    page = visit()
    panel = tab(page, "Erase")
    choose(page, panel, "Method", "esd")
    panel.get_by_text("Trains by gradient steps").wait_for()
    before = app.workspace.runs()
    panel.get_by_role("button", name="Erase", exact=True).click()
    panel.get_by_role("button", name="Stop", exact=True).click()
    ended(panel, "Stopped.")
    assert app.workspace.runs() == before and not app.shelf.model.edits


def test_who_closes_the_page_stops_what_need_not_go_on(visit: Visit, app: App) -> None:
    page = visit()
    panel = tab(page, "Compare")
    panel.get_by_label("number input for Pictures").fill("16")
    panel.get_by_role("button", name="Draw").click()
    panel.get_by_role("status").get_by_text("without edits").wait_for()
    page.close()
    job = app.jobs.all()[0]  # the newest
    assert job.title.startswith("Compare")
    for _ in range(300):
        if job.over:
            break
        visit().wait_for_timeout(100)
    assert job.state == "stopped"


def test_a_mistake_is_one_line_in_the_page(visit: Visit) -> None:
    page = visit()
    panel = tab(page, "Erase")
    panel.get_by_label("Preserve, with commas between").fill("gun, <img src=x onerror=alert(1)>")
    panel.get_by_role("button", name="Erase", exact=True).click()
    page.get_by_text("'gun' is both erased and preserved; remove it from one of the two").wait_for()


@pytest.mark.parametrize(("viewport", "scheme", "name"), [(PHONE, "light", "phone"), (None, "dark", "dark")])
def test_other_screens(visit: Visit, picture: Callable[..., None], viewport: Any, scheme: str, name: str) -> None:
    page = visit(viewport, scheme)
    panel = tab(page, "Compare")
    panel.get_by_role("button", name="Draw").click()
    ended(panel)
    assert overflow(page) <= 0, "the page is wider than the screen"
    picture(page, f"compare-{name}")


def test_the_keyboard_reaches_everything(visit: Visit) -> None:
    page = visit()
    panel = tab(page, "Compare")
    panel.get_by_label("Prompt").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Draw":
            break
    page.keyboard.press("Enter")
    ended(panel)

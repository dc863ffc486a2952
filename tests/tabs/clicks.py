"""What people do in the app, for tests in a browser."""

from __future__ import annotations

from typing import Any

PHONE = {"width": 390, "height": 844}


def tab(page: Any, title: str) -> Any:
    """Show a tab; gives what is in it."""
    page.get_by_role("tab", name="Compare", exact=True).wait_for()
    shown = page.get_by_role("tab", name=title, exact=True).filter(visible=True)
    if not shown.count():  # on a narrow screen
        page.get_by_role("button", name="More tabs").filter(visible=True).first.click()
        shown = page.locator(".overflow-dropdown button").get_by_text(title, exact=True)
    shown.first.click()
    return page.get_by_role("tabpanel").filter(visible=True).first  # it may hold tabs of its own


def ended(panel: Any, words: str = "Done in") -> None:
    """Wait until the tab's job has ended, with these words."""
    panel.get_by_role("status").get_by_text(words).wait_for()


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def fits_a_phone(page: Any) -> None:
    """Show what is on the page on a phone: nothing is wider than the screen."""
    before = page.viewport_size
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)  # for it to be laid out anew
    wide = overflow(page)
    assert wide <= 0, f"the page is {wide} pixels wider than the screen"
    page.set_viewport_size(before)


def choose(page: Any, panel: Any, label: str, option: str) -> None:
    """Choose an option of a dropdown."""
    panel.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option).first.click()


def few_pictures(panel: Any) -> None:
    """Make the Erase tab draw little."""
    panel.get_by_role("button", name="Pictures and measurement").click()
    panel.get_by_label("number input for Images").fill("1")
    panel.get_by_label("number input for Steps of drawing").fill("4")

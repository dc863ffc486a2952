"""Compose in a browser: two edits of the library become one, and regions are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from clicks import choose, ended, tab

from tabs.base import App
from toolkit import registry
from toolkit.commands import save_result
from toolkit.concepts import Concept, EraseTask
from toolkit.io.files import load_edit

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def two(app: App) -> list[str]:
    """Two erasing edits in the working folder."""
    names = []
    for word in ("pistol", "dog"):
        out = app.workspace.new_run("uce", word)
        task = {"concepts": [{"name": word}]}
        edit = registry.load("method", "uce")().fit(app.shelf.model, EraseTask((Concept(word),)))
        save_result(out, edit, {"method": "uce", "config": {}, "model": "emoji-sd", "edits": [], "task": task}, {})
        names.append(app.workspace.name(out))
    return names


def test_two_edits_of_the_library_become_one(visit: Visit, app: App, two: list[str], picture: Callable[..., None]) -> None:
    page = visit()
    panel = tab(page, "Compose")
    for word in ("pistol", "dog"):
        panel.locator("#library").get_by_text(f"without {word} · uce").first.click()
    panel.get_by_text("No conflicts between them.").wait_for()
    panel.get_by_label("number input for Steps of drawing").fill("4")
    panel.get_by_role("button", name="Compose and save").click()
    ended(panel)
    panel.get_by_text("which Compare and Checkpoints offer").wait_for()
    assert panel.locator("#composed").locator("img").count() == 4
    picture(page, "compose")
    assert load_edit(app.workspace.path(app.workspace.edits()[0])).kind() in ("low_rank", "chain")


def test_regions_are_drawn_through_their_edits(visit: Visit, two: list[str], picture: Callable[..., None]) -> None:
    page = visit()
    panel = tab(page, "Compose")
    panel.get_by_role("tab", name="Regions of a picture").click()
    choose(page, panel, "Edit in red", two[0].partition("/")[2])
    panel.get_by_role("button", name="Sampling").filter(visible=True).click()
    panel.get_by_label("number input for Steps").filter(visible=True).first.fill("4")
    panel.get_by_role("button", name="Draw the regions").click()
    ended(panel.get_by_role("tabpanel").filter(visible=True))
    assert panel.locator("#regions-drawn").locator("img").count() == 2
    picture(page, "compose-regions")

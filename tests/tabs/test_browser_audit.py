"""Attack and audit, and Checkpoints, by clicking in a real browser on the embedded model; and every tab on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clicks import PHONE, choose, ended, fits_a_phone, overflow, tab
from safetensors import safe_open

from tabs.base import App
from toolkit import registry

Visit = Callable[..., Any]


def test_an_erased_concept_is_attacked(visit: Visit, app: App, saved_edit: str, picture: Callable[..., None], tmp_path: Path) -> None:
    page = visit()
    panel = tab(page, "Attack and audit")
    choose(page, panel, "Saved edit", saved_edit.partition("/")[2])
    panel.get_by_label("What it erased, with commas between").and_(page.locator("textarea, input")).wait_for()
    page.wait_for_function("[...document.querySelectorAll('textarea, input')].some(box => box.value === 'pistol')")
    panel.get_by_role("button", name="Pictures and measurement").click()
    panel.get_by_label("number input for Images").fill("2")
    panel.get_by_label("number input for Steps of drawing").fill("8")
    panel.get_by_role("button", name="Attack", exact=True).click()
    ended(panel)
    assert "closed_form_preimage" in panel.get_by_role("grid").first.inner_text()
    shown = panel.frame_locator("iframe[title='Audit page']")
    shown.get_by_role("heading", name="How it was attacked").wait_for()
    picture(page, "attack")
    fits_a_phone(page)
    with page.expect_download() as started:
        panel.get_by_role("button", name="Download the audit page").click()
    started.value.save_as(tmp_path / "audit.html")
    assert f"Audit of {saved_edit}" in (tmp_path / "audit.html").read_text(encoding="utf-8")

    panel = tab(page, "Jobs")
    kept = next(name for name in app.workspace.runs() if "-audit-" in name)
    choose(page, panel, "Look at what was kept", kept.partition("/")[2])
    panel.locator(".file-preview .stem", has_text="audit").first.wait_for()


def test_the_forms_of_chosen_attacks_are_given(visit: Visit, saved_edit: str) -> None:
    page = visit()
    panel = tab(page, "Attack and audit")
    panel.get_by_role("button", name="Options of the attacks").click()
    panel.get_by_label("ring_a_bell (text-only)").check()
    panel.get_by_label("generations").wait_for()
    panel.get_by_label("generations").fill("0")
    panel.get_by_label("generations").press("Tab")
    panel.get_by_label("relearn (fine-tuning)").check()
    panel.get_by_label("train_batch_size").first.wait_for()
    assert panel.get_by_label("generations").input_value() == "0"
    choose(page, panel, "Saved edit", saved_edit.partition("/")[2])
    panel.get_by_role("button", name="Attack", exact=True).click()
    page.get_by_text("generations is 0, needs at least 1").wait_for()


def test_a_model_is_looked_at_and_an_edit_exported(visit: Visit, saved_edit: str, picture: Callable[..., None], tmp_path: Path) -> None:
    page = visit()
    panel = tab(page, "Checkpoints")
    panel.get_by_role("button", name="Look at it").click()
    ended(panel)
    assert "v_prediction" in panel.get_by_role("grid").first.inner_text()
    choose(page, panel, "Edits to export, in order", saved_edit.partition("/")[2])
    page.keyboard.press("Escape")
    panel.get_by_label("diffusers-lora", exact=False).check()
    panel.get_by_role("button", name="Export", exact=True).click()
    panel.get_by_role("button", name="Download").wait_for()
    picture(page, "checkpoints")
    with page.expect_download() as started:
        panel.get_by_role("button", name="Download").click()
    started.value.save_as(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118 (a safe_open is no dict)


def test_every_tab_fits_a_phone(visit: Visit, picture: Callable[..., None]) -> None:
    page = visit(PHONE)
    for title in sorted(registry.load("tab", name).title for name in registry.names("tab")):
        page.get_by_role("tab", name=title, exact=True).or_(page.get_by_label("More tabs")).first.wait_for()
        show(page, title)
        page.wait_for_timeout(300)
        wide = overflow(page)
        assert wide <= 0, f"{title} is {wide} pixels wider than the screen"


def show(page: Any, title: str) -> None:
    """Show a tab that may be behind the menu of those that have no place."""
    here = page.get_by_role("tab", name=title, exact=True)
    if not here.is_visible():
        page.get_by_label("More tabs").first.click()
        here = page.locator(".overflow-dropdown button", has_text=title).first
    here.click()

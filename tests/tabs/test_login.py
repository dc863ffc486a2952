"""An app that others can reach asks who they are, before it answers anything."""

from __future__ import annotations

from typing import Any

import httpx
from clicks import ended, tab


def test_nobody_is_let_in_without_the_password(locked: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(locked)
    for password, enters in (("a long guess", False), ("a long secret", True)):
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill(password)
        page.get_by_role("button", name="Login").click()
        if not enters:
            page.get_by_text("Incorrect Credentials").wait_for()
            assert not page.get_by_role("tab").count()
    panel = tab(page, "Compare")
    panel.get_by_role("button", name="Draw").click()
    ended(panel)
    page.close()


def test_its_api_and_files_are_closed_too(locked: str) -> None:
    with httpx.Client(base_url=locked) as client:
        assert client.post("/gradio_api/call/compare", json={"data": []}).status_code == 401
        assert client.post("/gradio_api/upload", files={"files": ("a.png", b"")}).status_code == 401
        assert client.get("/gradio_api/info").status_code == 401
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 401
        assert client.get("/config").status_code == 401

"""The app as users start it, on the embedded model, and a browser that looks at it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import app as command
from tabs.base import App
from toolkit import registry
from toolkit.cli import _add_run_arguments
from toolkit.commands import save_result
from toolkit.concepts import Concept, EraseTask

HINT = "needs a browser: apt-get install chromium, see CONTRIBUTING.md"
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "images" / "app"
WIDE = {"width": 1280, "height": 900}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One server for all of them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("app"))


def arguments(*written: str) -> Namespace:
    """The command's options, as they are written."""
    parser = ArgumentParser()
    command.add_arguments(parser)
    _add_run_arguments(parser)
    return parser.parse_args(written)


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    made = App.of(arguments("--folder", str(tmp_path_factory.mktemp("app")), "--device", "cpu"))
    yield made
    made.jobs.close()


@pytest.fixture(scope="session")
def saved_edit(app: App) -> str:
    """The name of an edit that erases pistols, as the Erase tab writes it."""
    task = EraseTask((Concept("pistol", ("gun", "revolver")),), ("knife", "dog"))
    method = registry.load("method", "uce")()
    out = app.workspace.new_run("uce", "pistol")
    config = {"method": "uce", "config": method.config(), "task": dataclasses.asdict(task)}
    save_result(out, method.fit(app.shelf.model, task), config, {"seconds": 1.0})
    return app.workspace.name(out)


@contextmanager
def served(app: App, auth: tuple[str, str] | None = None) -> Iterator[str]:
    """Its address while it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        page = command.serve(app, arguments("--port", str(port)), auth, block=False)
        yield str(page.local_url).rstrip("/")
        page.close()


@pytest.fixture(scope="session")
def server(app: App) -> Iterator[str]:
    """The address of a running app."""
    with served(app) as address:
        yield address


@pytest.fixture(scope="session")
def locked(app: App) -> Iterator[str]:
    """The address of one that asks for a user and a password."""
    with served(app, ("me", "a long secret")) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    found = os.environ.get("PALIMPSEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip(HINT)
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Callable[..., Any]]:
    """Opens the app in a browser of its own. Errors in its console, and requests to anywhere else, fail the test."""
    wrong: list[str] = []
    contexts = []

    def open_page(viewport: dict[str, int] | None = None, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport or WIDE, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("http", "ws")) and server not in request.url and wrong.append(request.url)
        )
        page.goto(server)
        page.get_by_role("tab", name="Compare").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def picture() -> Callable[..., None]:
    """Keeps a picture of the page for the documentation, when PALIMPSEST_SCREENSHOTS is set."""

    def keep(page: Any, name: str) -> None:
        if os.environ.get("PALIMPSEST_SCREENSHOTS"):
            page.wait_for_timeout(500)  # for what is still being faded in
            PICTURES.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    return keep

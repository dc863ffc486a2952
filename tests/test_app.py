"""The command: who may come in, and what the page is made of."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import gradio as gr
import pytest

import app
from tabs.base import App
from tabs.compare import compared
from tabs.page import build
from tabs.shelf import Shelf
from toolkit import registry
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.jobs import Jobs
from toolkit.model import Model
from toolkit.sample import generate
from toolkit.workspace import Workspace


def options(*written: str):
    parser = ArgumentParser()
    app.add_arguments(parser)
    return parser.parse_args(written)


@pytest.fixture
def shelf(tiny: Model, tmp_path: Path) -> Shelf:
    """A tiny model with one edit of the command line, at half its strength."""
    edit = registry.load("method", "uce").from_config({}).fit(tiny, EraseTask((Concept("cat", anchor="dog"),)))
    return Shelf(Workspace(tmp_path / "app"), tiny, {"given/1-cat": (edit, 0.5)}, {"model": "tiny"})


@pytest.mark.parametrize("written", [["--share"], ["--host", "0.0.0.0"], ["--host", "192.168.1.2"], ["--share", "--host", "127.0.0.1"]])
def test_others_are_let_in_with_a_password_only(written: list[str]) -> None:
    with pytest.raises(UserError, match="give --auth USER:PASSWORD too"):
        app.credentials(options(*written))
    assert app.credentials(options(*written, "--auth", "me:long enough")) == ("me", "long enough")


@pytest.mark.parametrize("auth", ["", "me", "me:", ":password1", "me:short"])
def test_a_password_is_one(auth: str) -> None:
    with pytest.raises(UserError, match="--auth needs a user and a password"):
        app.credentials(options("--auth", auth))


def test_nobody_else_is_let_in_by_default() -> None:
    assert (options().host, app.credentials(options())) == ("127.0.0.1", None)


def test_every_tab_is_on_the_page_in_its_order(shelf: Shelf) -> None:
    jobs = Jobs()
    page = build(App(shelf, jobs, shelf.workspace))
    jobs.close()
    outer = next(block for block in page.blocks.values() if isinstance(block, gr.Tabs))
    titles = [block.label for block in outer.children if isinstance(block, gr.Tab)]
    tabs = sorted((registry.load("tab", name) for name in registry.names("tab")), key=lambda tab: tab.order)
    assert titles == [tab.title for tab in tabs] and {"Compare", "Erase", "Jobs"} <= set(titles)


def test_events_say_what_they_are_given(shelf: Shelf) -> None:
    """The API has names, and every input has one."""
    jobs = Jobs()
    page = build(App(shelf, jobs, shelf.workspace))
    jobs.close()
    endpoints = page.get_api_info()["named_endpoints"]
    assert {"/compare", "/attention", "/erase", "/stop", "/look"} <= endpoints.keys()
    for endpoint in endpoints.values():
        assert not [parameter for parameter in endpoint["parameters"] if parameter["parameter_name"].startswith("param_")]


def test_before_and_after_are_what_the_sampler_gives(shelf: Shelf) -> None:
    options = {"prompt": "a cat", "model": shelf.first, "seeds": [3, 4], "steps": 2, "guidance": 4.0}
    _, side, before, after = compared(shelf, strengths={"given/1-cat": 0.5}, **options)
    model = shelf.model
    assert not model.edits and side == model.arch.image_size
    assert before == generate(model, ["a cat"] * 2, [3, 4], steps=2, guidance=4.0)
    model.attach(shelf.given["given/1-cat"][0], 0.5)
    assert after == generate(model, ["a cat"] * 2, [3, 4], steps=2, guidance=4.0) != before
    _, _, before, after = compared(shelf, strengths={}, **options)
    assert before == after


def test_an_error_while_drawing_leaves_no_edit_attached(shelf: Shelf) -> None:
    with pytest.raises(UserError):
        compared(shelf, "a cat", shelf.first, {"given/1-cat": 1.0, "runs/none": 1.0}, [0], 2, 4.0)
    assert not shelf.model.edits


def test_models_are_those_of_the_folder_and_hub_ids_when_allowed(shelf: Shelf) -> None:
    (shelf.workspace.folder / "models" / "mine.safetensors").touch()
    assert shelf.check_model("models/mine.safetensors")
    for name in ("/etc", "../x", "models/none.safetensors", "toolkit/world"):
        with pytest.raises(UserError, match="no model"):
            shelf.check_model(name)
    with pytest.raises(UserError, match="start the app with --allow-hub"):
        shelf.check_model("owner/name")
    shelf.allow_hub = True
    assert shelf.check_model("owner/name") == "owner/name"

"""The app on a tiny random model: what a click on its button gives."""

from __future__ import annotations

import gradio as gr
import pytest
import torch

from app import build
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.registry import load
from toolkit.sample import generate


@pytest.fixture
def edited(tiny: Model) -> Model:
    tiny.attach(load("method", "uce").from_config({}).fit(tiny, EraseTask((Concept("cat", anchor="dog"),))))
    return tiny


def click(page: gr.Blocks, *values: object) -> object:
    """What the function behind the button gives for the values of its inputs."""
    [function] = [fn for fn in page.fns.values() if fn.api_name == "compare"]
    assert len(function.inputs) == len(values), "one value for each input"
    assert function.fn is not None
    return function.fn(*values)


def test_a_click_draws_without_and_with_the_edit(edited: Model) -> None:
    page = build(edited)
    before, after = click(page, "a cat", 3, 2, 4.0, 1.0)  # type: ignore[misc]
    edited.detach_all()
    assert before == generate(edited, ["a cat"], [3], steps=2, guidance=4.0)[0] != after


def test_the_strength_is_what_the_slider_says(edited: Model) -> None:
    [(edit, _)] = edited.edits
    _, half = click(build(edited), "a cat", 3, 2, 4.0, 0.5)  # type: ignore[misc]
    edited.detach_all()
    edited.attach(edit, 0.5)
    assert generate(edited, ["a cat"], [3], steps=2, guidance=4.0)[0] == half
    same, none = click(build(edited), "a cat", 3, 2, 4.0, 0.0)  # type: ignore[misc]
    assert same == none


def test_a_prompt_that_cannot_be_drawn_is_an_error_in_the_page(edited: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise UserError("no such thing; ask for another")

    monkeypatch.setattr("toolkit.sample.generate", refuse)
    with pytest.raises(gr.Error, match="no such thing"):
        click(build(edited), "a cat", 0, 1, 1.0, 1.0)

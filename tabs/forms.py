"""Forms of what only the moment tells: the options of a chosen method, the strengths of chosen edits.

Their values are collected, in the browser, as one JSON object in a text box that nobody sees. An event has that box among its inputs;
whoever calls the API writes the JSON.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.context import get_blocks_context

from tabs.base import App
from tabs.live import RENDERED, number, optional, told
from toolkit import registry
from toolkit.errors import UserError
from toolkit.options import written
from toolkit.workspace import PARTS

LONGEST_JSON = 20_000
MAX_STRENGTH = 2.0
MAX_EDITS = 100
LARGEST = 100_000  # of whole numbers among options, seeds apart: larger ones only keep everybody else waiting
COLLECT = "(value, all) => JSON.stringify({...JSON.parse(all || '{}'), [%s]: value})"
FORGET = """(keys, all) => JSON.stringify(Object.fromEntries(Object.entries(JSON.parse(all || '{}')).filter(
    ([key]) => keys.some(kept => key === kept || key.startsWith(kept + '.')))))"""


def collected(label: str) -> gr.Textbox:
    """The box that values are collected in."""
    return gr.Textbox("{}", label=label, visible="hidden", max_length=LONGEST_JSON)


def collect(component: Any, key: str, into: gr.Textbox) -> None:
    """Have what a user does to a component be noted under a key."""
    component.input(
        None, [component, into], into, js=COLLECT % json.dumps(key), queue=False, show_progress="hidden", api_visibility="private"
    )


def forget(keys: Any, into: gr.Textbox) -> None:
    """Have what was noted be forgotten when its key, or what stands before its point, is no longer among those chosen."""
    keys.change(None, [keys, into], into, js=FORGET, queue=False, show_progress="hidden", api_visibility="private")


def rendered(choices: Any, collected: gr.Textbox) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Has a function make components of what is chosen and of what was collected so far, anew whenever something else is chosen."""
    blocks = get_blocks_context()
    assert blocks is not None, "tabs are built within a page"
    return gr.render([choices, collected], triggers=[blocks.root_block.load, choices.change], **RENDERED)


def read(value: Any, what: str) -> dict[str, Any]:
    """What was collected."""
    try:
        given = json.loads(optional(value, what, longest=LONGEST_JSON) or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"{what} are no JSON object; write for example {{}}")
    return given


# --- methods ----------------------------------------------------------------------------------------------------------
def methods(kind: str, architecture: str) -> list[str]:
    """The methods of a kind that work on an architecture: those without training first."""
    found = {name: registry.load("method", name) for name in registry.names("method")}
    fit = [name for name, method in found.items() if method.kind == kind and architecture in method.architectures]
    return sorted(fit, key=lambda name: (not found[name].training_free, name))


def does(name: str, what: str = "method") -> str:
    """What a method (or what else the registry has) does, in one sentence: the first line of its file."""
    module = importlib.import_module(registry.load(what, name).__module__)
    return (module.__doc__ or "").strip().partition("\n")[0]


def paper(name: str, what: str = "method") -> str:
    """Of which paper it is; Markdown, empty where there is none."""
    number = registry.load(what, name).paper.removeprefix("arXiv:")
    return f" [arXiv {number}](https://arxiv.org/abs/{number})." if number else ""


def about(method: str) -> str:
    """What a method does, of which paper it is, and whether it trains; Markdown."""
    trains = "Needs no training." if registry.load("method", method).training_free else "Trains by gradient steps."
    return f"{does(method)}{paper(method)} {trains}"


def options(cls: type, changed: Mapping[str, Any], into: gr.Textbox, prefix: str = "") -> None:
    """A component for every option of a dataclass. changed: what is not at its default. prefix: of their keys."""
    types = typing.get_type_hints(cls)
    with gr.Row():
        for field in dataclasses.fields(cls):
            value = changed.get(field.name, field.default)
            collect(_component(field, types[field.name], value), prefix + field.name, into)


def _component(field: Any, kind: Any, value: Any) -> Any:
    """By the option's type."""
    shown: dict[str, Any] = {"label": field.name, "info": field.metadata["help"], "min_width": 220, "interactive": True}
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return gr.Checkbox(value, **shown)
    if origin is Literal:
        return gr.Dropdown([str(choice) for choice in choices], value=str(value), **shown)
    if kind in (int, float) and value == value and abs(value) != float("inf"):
        return gr.Number(value, precision=0 if kind is int else None, **shown)
    return gr.Textbox(written(value), **shown)


def configured(app: App, kind: str, name: Any, given: Any, what: str = "method") -> Any:
    """The method (or what else the registry has) of this name and kind with the options that were collected.

    An option that names a file or folder is a name in the working folder here.
    """
    if name not in registry.names(what) or (kind and registry.load(what, name).kind != kind):
        raise UserError(f"no {what} {str(name)[:100]!r}{f' to {kind}' if kind else ''}; choose one from the list")
    cls = registry.load(what, name)
    made = cls.from_config(read(given, "options"))
    for key, value in made.config().items():
        for number_given in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number_given, int) and number_given > LARGEST and key != "seed":
                raise UserError(f"{key} is {number_given}, at most {LARGEST} is taken here; give a smaller number")
    changed = {key: getattr(made, key) for key in made.changed() if isinstance(getattr(made, key), str)}
    types = typing.get_type_hints(cls)
    free = {key: inside(app, value) for key, value in changed.items() if typing.get_origin(types[key]) is not Literal}
    return dataclasses.replace(made, **free) if free else made


def inside(app: App, value: str) -> str:
    """An option's text, where what stands for a file is a name in the working folder, and then its path; any other is a UserError."""
    if value.partition("/")[0] in PARTS:
        return str(app.workspace.path(value))
    if value.startswith("hf-hub:") and app.shelf.allow_hub:
        return value
    if re.search(r"[/\\:]|\.\w+$", value) or Path(value).exists():
        where = app.workspace.folder / "edits"
        raise UserError(f"{value[:100]!r} is outside the working folder; put it into {where} and write edits/NAME")
    return value


# --- models and edits -------------------------------------------------------------------------------------------------
def current(box: gr.Dropdown) -> gr.Dropdown:
    """The box without Gradio's own check, which knows the choices of when the page was made: events check what is there by now."""
    box.preprocess = lambda payload: payload
    return box


def model_choice(app: App) -> gr.Dropdown:
    """Which model; a list that is looked up whenever the tab is shown."""
    box = current(gr.Dropdown(app.shelf.models(), value=app.shelf.first, label="Model", allow_custom_value=app.shelf.allow_hub))
    app.on_show(lambda: gr.Dropdown(choices=app.shelf.models()), [box])
    return box


def edits_choice(app: App, label: str, **more: Any) -> gr.Dropdown:
    """Which saved edits, likewise."""
    box = current(gr.Dropdown(app.shelf.edits(), label=label, multiselect=True, **more))
    app.on_show(lambda: gr.Dropdown(choices=app.shelf.edits()), [box])
    return box


def chosen(app: App, names: Any) -> list[str]:
    """The names of edits that are on the shelf, each once."""
    known = [name for _, name in app.shelf.edits()]
    if not isinstance(names, list | tuple | None) or len(names or ()) > MAX_EDITS:
        raise UserError(f"the edits are no list of at most {MAX_EDITS} names; choose from the list")
    for name in names or ():
        if name not in known:
            raise UserError(f"no edit {str(name)[:100]!r}; choose one from the list")
    return list(dict.fromkeys(names or ()))


def strengths(app: App, edits: gr.Dropdown, into: gr.Textbox) -> None:
    """A slider for every chosen edit that can be scaled."""
    forget(edits, into)

    @rendered(edits, into)
    def sliders(names: list[str] | None, given: str) -> None:
        with told():
            for name, strength in strengths_of(app, names, given).items():
                scalable = app.shelf.scalable(name)
                label = f"Strength of {name.partition('/')[2]}{'' if scalable else ', which has only one'}"
                collect(gr.Slider(0, MAX_STRENGTH, strength, step=0.05, label=label, interactive=scalable), name, into)


def strengths_of(app: App, edits: Any, given: Any) -> dict[str, float]:
    """The chosen edits in their order, each with the strength that was collected, or its own."""
    names, collected = chosen(app, edits), read(given, "strengths")
    return {name: number(collected.get(name, app.shelf.scale(name)), f"strength of {name}", 0, MAX_STRENGTH) for name in names}

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from tabs.base import App
from tabs.live import optional
from toolkit import registry
from toolkit.errors import UserError
from toolkit.workspace import PARTS

LONGEST_JSON = 20_000
LARGEST = 100_000  # of whole numbers among options, seeds apart: larger ones only keep everybody else waiting
COLLECT = "(value, all) => JSON.stringify({...JSON.parse(all || '{}'), [%s]: value})"
FORGET = "(keys, all) => JSON.stringify(Object.fromEntries(Object.entries(JSON.parse(all || '{}')).filter(([key]) => keys.includes(key))))"


def collected(label: str) -> gr.Textbox:
    """The box that values are collected in."""
    return gr.Textbox("{}", label=label, visible="hidden", max_length=LONGEST_JSON)


def collect(component: Any, key: str, into: gr.Textbox) -> None:
    """Have what a user does to a component be noted under a key."""
    component.input(
        None, [component, into], into, js=COLLECT % json.dumps(key), queue=False, show_progress="hidden", api_visibility="private"
    )


def forget(keys: Any, into: gr.Textbox) -> None:
    """Have what was noted be forgotten when its key is no longer among those chosen."""
    keys.change(None, [keys, into], into, js=FORGET, queue=False, show_progress="hidden", api_visibility="private")


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


def does(method: str) -> str:
    """What a method does, in one sentence: the first line of its file."""
    module = importlib.import_module(registry.load("method", method).__module__)
    return (module.__doc__ or "").strip().partition("\n")[0]


def about(method: str) -> str:
    """What a method does, of which paper it is, and whether it trains; Markdown."""
    cls = registry.load("method", method)
    paper = cls.paper.removeprefix("arXiv:")
    link = f"[arXiv {paper}](https://arxiv.org/abs/{paper})"
    return f"{does(method)} {link}. {'Needs no training.' if cls.training_free else 'Trains by gradient steps.'}"


def options(cls: type, changed: Mapping[str, Any], into: gr.Textbox, prefix: str = "") -> None:
    """A component for every option of a dataclass. changed: what is not at its default. prefix: of their keys; with one, what was
    written stays when the form is made again."""
    types = typing.get_type_hints(cls)
    with gr.Row():
        for field in dataclasses.fields(cls):
            value, key = changed.get(field.name, field.default), prefix + field.name
            collect(_component(field, types[field.name], value, key if prefix else None), key, into)


def _component(field: Any, kind: Any, value: Any, key: str | None) -> Any:
    """By the option's type."""
    shown: dict[str, Any] = {"label": field.name, "info": field.metadata["help"], "min_width": 220, "interactive": True, "key": key}
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return gr.Checkbox(value, **shown)
    if origin is Literal:
        return gr.Dropdown([str(choice) for choice in choices], value=str(value), **shown)
    if kind in (int, float) and value == value and abs(value) != float("inf"):
        return gr.Number(value, precision=0 if kind is int else None, **shown)
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)
    return gr.Textbox(text, **shown)


def configured(app: App, kind: str, name: Any, given: Any, what: str = "method") -> Any:
    """The method (or what else the registry has) of this name and kind with the options that were collected.

    An option that names a file or folder is a name in the working folder here.
    """
    if name not in registry.names(what) or (kind and registry.load(what, name).kind != kind):
        raise UserError(f"no {what} {str(name)[:100]!r}{f' to {kind}' if kind else ''}; choose one from the list")
    cls = registry.load(what, name)
    made = cls.from_config(read(given, "options"))
    for key, value in made.config().items():
        if isinstance(value, int) and value > LARGEST and key != "seed":
            raise UserError(f"{key} is {value}, at most {LARGEST} is taken here; give a smaller number")
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
def model_choice(app: App) -> gr.Dropdown:
    """Which model; a list that is looked up whenever the tab is shown."""
    box = gr.Dropdown(app.shelf.models(), value=app.shelf.first, label="Model", allow_custom_value=app.shelf.allow_hub)
    app.on_show(lambda: gr.Dropdown(choices=app.shelf.models()), [box])
    return box


def edits_choice(app: App, label: str, **more: Any) -> gr.Dropdown:
    """Which saved edits, likewise."""
    box = gr.Dropdown(app.shelf.edits(), label=label, multiselect=True, **more)
    app.on_show(lambda: gr.Dropdown(choices=app.shelf.edits()), [box])
    return box


def chosen(app: App, names: Any) -> list[str]:
    """The names of edits that are on the shelf, each once."""
    known = {name for _, name in app.shelf.edits()}
    for name in names or ():
        if name not in known:
            raise UserError(f"no edit {str(name)[:100]!r}; choose one from the list")
    return list(dict.fromkeys(names or ()))

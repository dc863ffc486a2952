"""Which method, what is said about it, and a form of its options, made anew when another is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from tabs import forms, live
from tabs.base import App
from toolkit import registry

Presets = Callable[[str], Mapping[str, Any]]


def nothing(_: str) -> Mapping[str, Any]:
    """No options besides the defaults."""
    return {}


class MethodForm:
    """To be made where it shall stand.

    kind: of the methods. names: those to choose among; "" stands for none. say: what is said about one, Markdown. chosen: options to
    begin with, where they are not the defaults. Its `inputs` are what an event is given: the name, and the options as JSON.
    """

    def __init__(
        self,
        app: App,
        kind: str,
        names: Sequence[str | tuple[str, str]],
        first: str,
        say: Callable[[str], str],
        chosen: Presets = nothing,
        label: str = "Method",
    ) -> None:
        self.app, self.kind, self.say, self.chosen = app, kind, say, chosen
        self.name = gr.Dropdown(list(names), value=first, label=label)
        self.about = gr.Markdown(say(first), elem_classes="pal-note")
        self.options = forms.collected("options")
        self._start = gr.State((first, dict(chosen(first))))
        with gr.Accordion("Options of the method", open=False, visible=bool(first)) as self._box:
            self._form()
        self.options.value = json.dumps(self._start.value[1])
        self.name.change(
            self._choose, self.name, [self.about, self.options, self._start, self._box], api_visibility="private", **live.QUIET
        )

    @property
    def inputs(self) -> list[Any]:
        return [self.name, self.options]

    def _choose(self, name: Any) -> tuple[Any, ...]:
        with live.told():
            if name:
                forms.configured(self.app, self.kind, name, "{}")
            options = dict(self.chosen(name)) if name else {}
            return self.say(name), json.dumps(options), (name, options), gr.Accordion(visible=bool(name))

    def _form(self) -> None:
        @gr.render(self._start, **live.RENDERED)
        def form(chosen: tuple[str, dict[str, Any]]) -> None:
            name, changed = chosen
            if name:
                forms.options(registry.load("method", name), changed, self.options)
